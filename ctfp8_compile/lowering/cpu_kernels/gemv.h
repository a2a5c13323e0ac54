// Few activation rows: every weight row is read once, decoded in registers and multiplied with all of them.
//
// `V` is the vector type of an instruction set (see isa_*.cpp): it decodes a chunk of `V::step` codes and accumulates the
// products of a weight chunk and an activation chunk in `V::Acc`. Included once by each instruction-set file.
#pragma once
#include "kernels.h"

namespace ctfp8 {
namespace {

// Weight rows that share the activation registers. With several scales a row each sum needs a second register.
template <class V>
constexpr int rows_for(int m, bool blocked) {
  const int budget = V::accumulators / (blocked ? 2 : 1) / m;
  return budget >= 8 ? 8 : budget >= 4 ? 4 : budget >= 2 ? 2 : 1;
}

// y[i * ldy + r] for M activation rows and R weight rows starting at row n.
template <class V, int M, int R, bool blocked>
inline void dot_rows(const V& v, const Weight& w, int64_t n, const typename V::X* x, int64_t x_stride, float* y, int64_t ldy) {
  typename V::Acc sum[M][R], total[blocked ? M : 1][blocked ? R : 1];
  const uint8_t* row = w.codes + n * w.row_stride;
  if constexpr (blocked) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) total[i][r] = V::zero();
  }
  for (int64_t segment = 0; segment < w.segments; ++segment) {
    const int64_t length = w.length_of(segment), start = segment * w.block_cols;
    const uint8_t* p = row + start;
    const typename V::X* xs = x + segment * w.padded;
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[i][r] = V::zero();

    int64_t k = 0;
    for (; k + V::step <= length; k += V::step) {
      // Hardware prefetchers stop at a page, and the rows after these begin on others.
      int64_t ahead = start + k + V::ahead;
      if (ahead >= w.cols) ahead += R * w.row_stride - w.cols;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        V::prefetch(row + r * w.row_stride + ahead);
        const auto chunk = v.decode(p + r * w.row_stride + k);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) sum[i][r] = V::dot(sum[i][r], chunk, V::load(xs + i * x_stride + k));
      }
    }
    if (k < length) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const auto chunk = v.decode_tail(p + r * w.row_stride + k, static_cast<int>(length - k));
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) sum[i][r] = V::dot(sum[i][r], chunk, V::load(xs + i * x_stride + k));
      }
    }
    if constexpr (blocked) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const float scale = w.scale_of(n + r)[segment];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) total[i][r] = V::scale_add(total[i][r], sum[i][r], scale);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const float scale = (blocked ? 1.f : w.scale_of(n + r)[0]) * V::gain;
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) y[i * ldy + r] = V::reduce(blocked ? total[blocked ? i : 0][blocked ? r : 0] : sum[i][r]) * scale;
  }
}

template <class V, int M, bool blocked>
void gemv_of(const Weight& w, int64_t begin, int64_t end, const typename V::X* x, int64_t x_stride, float* y, int64_t ldy) {
  constexpr int R = rows_for<V>(M, blocked);
  const V v;
  int64_t n = begin;
  for (; n + R <= end; n += R) dot_rows<V, M, R, blocked>(v, w, n, x, x_stride, y + n - begin, ldy);
  for (; n < end; ++n) dot_rows<V, M, 1, blocked>(v, w, n, x, x_stride, y + n - begin, ldy);
}

template <class V, int M>
void gemv(const Weight& w, int64_t begin, int64_t end, const typename V::X* x, int64_t x_stride, int64_t m, float* y, int64_t ldy) {
  if (m != M) {
    if constexpr (M > 1) gemv<V, M - 1>(w, begin, end, x, x_stride, m, y, ldy);
  } else if (w.segments == 1) {
    gemv_of<V, M, false>(w, begin, end, x, x_stride, y, ldy);
  } else {
    gemv_of<V, M, true>(w, begin, end, x, x_stride, y, ldy);
  }
}

}  // namespace
}  // namespace ctfp8
