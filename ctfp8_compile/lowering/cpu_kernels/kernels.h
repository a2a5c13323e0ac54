// What an instruction set has to offer: plain functions over raw memory, without torch. matmul.cpp composes them.
//
// Weights are e4m3fn codes, one byte each, a row of K of them contiguous. A row is cut into spans of `block` columns
// that share a scale (one span where the scale is per row). Packed activations hold the same spans, each padded with
// zeros to a multiple of kChunk, so that inner loops never see a ragged end on the activation side.
#pragma once

#include <cstdint>

namespace ctfp8 {

constexpr int64_t kChunk = 64;

enum class Type { F32, BF16, F16 };

inline int64_t size_of(Type type) { return type == Type::F32 ? 4 : 2; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Columns {
  int64_t K;       // columns of the weight
  int64_t block;   // columns that share a scale, at most K
  int64_t spans;   // ceil(K / block)
  int64_t stride;  // packed elements from one span to the next: block rounded up to kChunk
  int64_t packed;  // packed elements of a whole row

  Columns(int64_t K, int64_t block_cols)
      : K(K),
        block(block_cols < K ? block_cols : (K > 0 ? K : 1)),
        spans(ceil_div(K, block)),
        stride(round_up(block, kChunk)),
        packed(spans > 0 ? (spans - 1) * stride + round_up(K - (spans - 1) * block, kChunk) : 0) {}

  int64_t length(int64_t span) const { return span + 1 < spans ? block : K - span * block; }
};

// Rows [begin, end) of one weight matrix with its scales.
struct Rows {
  const uint8_t* codes;  // row 0, column 0
  int64_t stride;        // bytes from one row to the next
  const float* scales;   // [ceil(N / block_rows), spans]
  int64_t block_rows;
  int64_t begin, end;

  const uint8_t* row(int64_t n) const { return codes + n * stride; }
  const float* scale(int64_t n, int64_t spans) const { return scales + n / block_rows * spans; }
};

// out[m * out_stride + n - rows.begin] = sum_k x[m][k] * weight[n][k] * scale: for few rows of x, read once per weight.
struct Dot {
  Rows rows;
  Columns columns;
  const void* x;  // packed, `columns.packed` elements a row
  int64_t m;
  float* out;
  int64_t out_stride;
};

// The kernels that compute in float32, for any type of x. Every instruction set has them.
struct FloatKernels {
  const char* name;
  int64_t dot_rows;  // above this many rows of x a matrix product is faster
  void (*pack)(const Columns&, const void* x, Type, float* out);  // one row
  void (*dot)(const Dot&);                                        // x: float
  // n codes as `(float32(code) * scale)` rounded once to the type; out needs room for n elements only.
  void (*dequantize)(const uint8_t* codes, int64_t n, float scale, Type, void* out);
  // out[i] = x[i] + bias[i], rounded to the type; bias may be null.
  void (*store)(const float* x, const float* bias, int64_t n, Type, void* out);
};

// The kernels that multiply in bfloat16 and accumulate in float32; e4m3 is exact in bfloat16.
// Within each chunk, packed activations and decoded weights share one order of columns, the one decoding produces.
struct Bf16Kernels {
  int64_t dot_rows;
  void (*pack_dot)(const Columns&, const void* x, uint16_t* out);  // one row
  // `count` <= 64 rows to [packed / 2][width][2], zero where there is no row; width = count rounded up to 16.
  void (*pack_panel)(const Columns&, const uint16_t* const* rows, int64_t count, uint16_t* out);
  void (*dot)(const Dot&);  // x: as pack_dot leaves it
  // n unscaled codes, padded with zeros to a multiple of kChunk. Prefetches `ahead` bytes further on.
  void (*decode)(const uint8_t* codes, int64_t n, int64_t ahead, uint16_t* out);
  // sum[i] += scale * x[i]; n is a multiple of 16.
  void (*add_scaled)(const float* x, float scale, int64_t n, float* sum);
  // out[m][n] = c[n][m] * scale[n] + bias[n] for m < count, n < rows; scale and bias may be null.
  void (*store_transposed)(const float* c, int64_t width, int64_t rows, int64_t count, const float* scale,
                           const float* bias, uint16_t* const* out);
};

// Null where this build or this CPU has not got them.
const FloatKernels* portable_kernels();
const FloatKernels* avx2_kernels();
const FloatKernels* avx512_kernels();
const Bf16Kernels* avx512_bf16_kernels();

}  // namespace ctfp8
