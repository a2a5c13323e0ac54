// The entries of `Kernels` that are written once for every vector type `V`.
#pragma once
#include <cstring>

#include "attention.h"
#include "decode.h"
#include "gemm.h"
#include "gemv.h"
#include "kernels.h"

namespace ctfp8 {
namespace {

// Whether `m` activation rows lie in pairs, and that is also how the weight is decoded.
template <Vector V>
bool in_pairs(int64_t m) {
  return RowPairVector<V> && m > kFew;
}

template <Vector V>
int64_t bytes(const Weight& w, int64_t m) {
  return (in_pairs<V>(m) ? (m + 7) / 8 * 8 : m) * stride<V>(w) * static_cast<int64_t>(sizeof(typename V::X));
}

template <Vector V>
void prepare(const Weight& w, const void* const* rows, int64_t begin, int64_t count, int64_t m, void* prepared) {
  using X = typename V::X;
  const int64_t pad = padded<V>(w), all = stride<V>(w);
  X* to = static_cast<X*>(prepared);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t segment = 0; segment < w.segments; ++segment) {
      const X* from = static_cast<const X*>(rows[i]) + segment * w.block_cols;
      const int64_t length = w.length_of(segment);
      for (int64_t k = 0; k < pad; k += V::step) {
        alignas(64) X chunk[V::step] = {};
        if (k < length) std::memcpy(chunk, from + k, (length - k < V::step ? length - k : V::step) * sizeof(X));
        const int64_t at = segment * pad + k;
        if constexpr (RowPairVector<V>) {
          if (in_pairs<V>(m)) {
            V::store_half(place<V>(to, all, begin + i, at), V::load(chunk));
            continue;
          }
        }
        V::arrange(chunk, to + (begin + i) * all + at);
      }
    }
  }
}

template <Vector V>
void finish(const float* row, const float* bias, int64_t n, void* out, Dtype dtype) {
  if (dtype == Dtype::bf16) {
    auto* to = static_cast<uint16_t*>(out);
    if (bias) {
      for (int64_t i = 0; i < n; ++i) to[i] = bf16_of_float(row[i] + bias[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = bf16_of_float(row[i]);
    }
  } else if (dtype == Dtype::f16) {
    V::round_f16(row, bias, n, static_cast<uint16_t*>(out));
  } else {
    auto* to = static_cast<float*>(out);
    for (int64_t i = 0; i < n; ++i) to[i] = bias ? row[i] + bias[i] : row[i];
  }
}

template <TileVector V>
void matmul(const Weight& w, int64_t begin, int64_t end, const void* prepared, int64_t m, float* y, int64_t ldy) {
  const auto* rows = static_cast<const typename V::X*>(prepared);
  if (m <= kFew) {
    gemv<V>(w, begin, end, rows, m, y, ldy);
  } else {
    gemm<V>(w, begin, end, rows, m, y, ldy);
  }
}

// Columns that share a scale.
template <FloatVector V>
void dequantize_run(const uint8_t* fp8, int64_t count, float scale, float* out) {
  const V v;
  int64_t k = 0;
  for (; k + V::step <= count; k += V::step) V::store(out + k, V::times(V::times(v.decode(fp8 + k), V::gain), scale));
  if (k < count) {
    alignas(64) float tail[V::step];
    V::store(tail, V::times(V::times(v.decode_tail(fp8 + k, static_cast<int>(count - k)), V::gain), scale));
    std::memcpy(out + k, tail, (count - k) * sizeof(float));
  }
}

template <FloatVector V>
void dequantize(const Weight& w, int64_t n, float* row) {
  const int64_t width = w.exponents ? kMxCols : w.block_cols;
  for (int64_t begin = 0; begin < w.cols; begin += width) {
    const float scale = w.exponents ? float_of_exponent(w.exponents_of(n)[begin / width]) : w.scale_of(n)[begin / width];
    const int64_t left = w.cols - begin;
    dequantize_run<V>(w.fp8 + n * w.row_stride + begin, left < width ? left : width, scale, row + begin);
  }
}

}  // namespace
}  // namespace ctfp8
