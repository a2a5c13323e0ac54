// What an instruction-set file offers to ops.cpp. No torch header is included on this side: those files are compiled with
// `#pragma GCC target`, and an inline function of torch compiled there could end up in the binary for every CPU.
#pragma once
#include <cstdint>

namespace ctfp8 {

enum class Dtype { bf16, f16, f32 };

// One expert's weight: `rows x cols` e4m3 codes and a scale for each `block_rows x block_cols` of them.
//
// A row is cut into `segments` of `block_cols` columns, each with one scale. A prepared activation row holds the same
// segments, each padded with zeros to `padded` elements, so that kernels read it in whole vectors.
struct Weight {
  const uint8_t* codes;
  int64_t row_stride;
  const float* scale;
  int64_t scale_stride;
  int64_t rows, cols;
  int64_t block_rows, block_cols;
  int64_t segments, padded;

  const float* scale_of(int64_t row) const { return scale + row / block_rows * scale_stride; }
  int64_t length_of(int64_t segment) const {
    const int64_t left = cols - segment * block_cols;
    return left < block_cols ? left : block_cols;
  }
};

struct Kernels {
  const char* name;
  int64_t step;       // elements of a chunk: segments of a prepared row are padded to a multiple of it
  int64_t item;       // bytes of a prepared element: 2 for bfloat16, 4 for float32
  int64_t tile_rows;  // above this many activation rows `matmul` wants work items of `tile_cols` weight rows
  int64_t tile_cols;

  // Copies a row of activations (bfloat16 or float32, as `item` says) into the layout the kernels read.
  void (*prepare)(const Weight& w, const void* row, void* prepared);

  // y[i * ldy + n - begin] = sum_k x[i, k] * weight[n, k] * scale for `m` prepared rows and n in [begin, end).
  void (*matmul)(const Weight& w, int64_t begin, int64_t end, const void* x, int64_t x_stride, int64_t m, float* y, int64_t ldy);

  // out[n] = dtype(row[n] + bias[n]), rounded to nearest even; bias may be null.
  void (*finish)(const float* row, const float* bias, int64_t n, void* out, Dtype dtype);

  // row[k] = float(code) * scale for one weight row: exactly what the reference computes.
  void (*dequantize)(const Weight& w, int64_t n, float* row);
};

// Null where this CPU, or this build, lacks the instructions.
const Kernels* portable();
const Kernels* avx2();
const Kernels* avx512();
const Kernels* avx512_bf16();  // bfloat16 activations only

}  // namespace ctfp8
