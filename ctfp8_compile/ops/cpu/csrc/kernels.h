// What an instruction-set file offers to the operators. No torch header is included on this side: those files are compiled with
// `#pragma GCC target`, and an inline function of torch compiled there could end up in the binary for every CPU.
#pragma once
#include <cstdint>

namespace ctfp8 {

enum class Dtype { bf16, f16, f32 };

// One expert's weight: `rows x cols` e4m3 values and a scale for each `block_rows x block_cols` of them. A row is cut into
// `segments` of `block_cols` columns, each with one scale; a scale per row is one segment.
//
// MXFP8 instead has a byte e for each `kMxCols` columns, which stands for 2^(e - 127). Such a row is one segment with a scale of
// 1; its bytes become part of the values when FP8 values are decoded, since powers of two are exact there.
constexpr int64_t kMxCols = 32;

struct Weight {
  const uint8_t* fp8;
  int64_t row_stride;
  const float* scale;
  int64_t scale_stride;
  int64_t rows, cols;
  int64_t block_rows, block_cols;
  int64_t segments;
  const uint8_t* exponents = nullptr;
  int64_t exponent_stride = 0;

  const float* scale_of(int64_t row) const { return scale + row / block_rows * scale_stride; }
  const uint8_t* exponents_of(int64_t row) const { return exponents + row * exponent_stride; }
  int64_t length_of(int64_t segment) const {
    const int64_t left = cols - segment * block_cols;
    return left < block_cols ? left : block_cols;
  }
};

// Keys or values of one head: `width` columns a token. `fp8` are e4m3 with one scale for all tokens, or, where there is none, a
// byte e behind each token's FP8 values, which stands for 2^(e - 127).
enum class Stored { f32, bf16, fp8 };

struct Tokens {
  const char* first;
  int64_t stride;  // bytes from a token to the next
  int64_t width;
  const float* scale = nullptr;
};

constexpr int64_t kTokens = 64;   // a block: it is read whole or not at all
constexpr int64_t kQueries = 64;  // at most

// Columns from one row of queries, or of results, to the next: whole chunks of all instruction sets.
inline int64_t query_stride(int64_t width) { return (width + 63) / 64 * 64; }

// The attention of `rows` queries to `length` tokens of one head. Queries are float32, padded with zeros, and their products
// with keys are multiplied with `scale`; `mask` has a pointer to `length` summands for each of them, or is null.
struct Attention {
  Stored stored;
  Tokens keys, values;
  int64_t length, rows;
  const float* queries;
  float scale;
  const float* const* mask;
};

// A weight of bfloat16s, and for how many rows of activations, and activations in all, it is streamed: they have to stay
// in the first-level cache.
constexpr int64_t kDenseRows = 4, kDenseActivations = 16384;

struct Dense {
  const uint16_t* values;
  int64_t row_stride;
  int64_t cols;
};

struct Kernels {
  const char* name;
  int64_t item;  // bytes of an activation as `prepare` takes it: 2 for bfloat16, 4 for float32
  int64_t cols;  // weight rows that `matmul` likes to take at a time

  // A block of `m` activation rows is first brought into the layout that `matmul` reads: `bytes` long, a slice of 16 rows
  // at a time (`rows` points to the `count` rows from `begin` on), so that threads can share the work.
  int64_t (*bytes)(const Weight& w, int64_t m);
  void (*prepare)(const Weight& w, const void* const* rows, int64_t begin, int64_t count, int64_t m, void* prepared);

  // y[i * ldy + n - begin] = sum_k x[i, k] * weight[n, k] * scale for a prepared block of `m` rows and n in [begin, end).
  void (*matmul)(const Weight& w, int64_t begin, int64_t end, const void* prepared, int64_t m, float* y, int64_t ldy);

  // out[n] = dtype(row[n] + bias[n]), rounded to nearest even; bias may be null.
  void (*finish)(const float* row, const float* bias, int64_t n, void* out, Dtype dtype);

  // row[k] = float(FP8 value) * scale for one weight row: exactly what the reference computes.
  void (*dequantize)(const Weight& w, int64_t n, float* row);

  // Over the tokens of some blocks: out[r] = sum_j e^(s_j - most[r]) value_j and sum[r] = sum_j e^(s_j - most[r]), most[r] the
  // largest s_j, -inf if every one is.
  void (*attention)(const Attention& a, const int64_t* blocks, int64_t count, float* out, float* most, float* sum);

  // y[i * ldy + n - begin] = sum_k x[i][k] * weight[n, k] for `m` rows of bfloat16 activations; null where torch's is no slower.
  void (*dense)(const Dense& w, int64_t begin, int64_t end, const uint16_t* const* x, int64_t m, float* y, int64_t ldy) = nullptr;
};

// Null where this CPU, or this build, lacks the instructions.
const Kernels* portable();
const Kernels* avx2();
const Kernels* avx512();
const Kernels* avx512_bf16();  // bfloat16 activations only, in attention bfloat16 queries; no dequantize
const Kernels* neon();
const Kernels* neon_bf16();  // bfloat16 activations only; no dequantize, no attention

// Best first. One for bfloat16 only has others behind it.
constexpr const Kernels* (*kAll[])() = {avx512_bf16, avx512, avx2, neon_bf16, neon, portable};

// C[m, n] (+)= A[m, k] B[k, n] in bfloat16 with B in pairs of rows (VNNI): torch's, which uses AMX tiles where they exist.
// While it is set, avx512_bf16 multiplies blocks of many rows with it.
using Brgemm = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const void* a, const void* b,
                        float* c);
void set_brgemm(Brgemm brgemm);

}  // namespace ctfp8
