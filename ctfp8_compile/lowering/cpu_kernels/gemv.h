// Few activation rows: every weight row is read once, decoded in registers and multiplied with all of them.
//
// `V` is the vector type of an instruction set (see isa_*.cpp): it decodes a chunk of `V::step` codes and accumulates the
// products of a weight chunk and an activation chunk in `V::Acc`. Included once by each instruction-set file.
#pragma once
#include "kernels.h"

namespace ctfp8 {
namespace {

constexpr int kFew = 12;   // activation rows, at most
constexpr int kAtOnce = 8;  // of them, that share one reading of the weight

// A prepared activation row holds the segments of a weight row, each padded with zeros to whole chunks.
template <class V>
int64_t padded(const Weight& w) {
  return (w.block_cols + V::step - 1) / V::step * V::step;
}

// An odd number of cache lines, so that rows do not compete for the same sets of the first-level cache.
template <class V>
int64_t stride(const Weight& w) {
  constexpr int64_t line = 64 / sizeof(typename V::X);
  return ((w.segments * padded<V>(w) + line - 1) / line | 1) * line;
}

// With one or two rows of activations their chunks stay in registers while weight rows pass; with more, weight chunks stay.
template <class V>
constexpr bool hold_weights(int m) {
  return m > 2;
}

// Weight rows at a time, so that all of it fits the registers. With several scales a row each sum needs a second one.
template <class V>
constexpr int rows_for(int m, bool blocked) {
  const int sums = m * (blocked ? 2 : 1), free = V::registers - V::constants - V::parts;
  const int rows = hold_weights<V>(m) ? free / (sums + V::parts) : (free - m * V::parts) / sums;
  return rows > 8 ? 8 : rows < 1 ? 1 : rows;
}

// y[i * ldy + r] for M activation rows and R weight rows starting at row n.
template <class V, int M, int R, bool blocked>
inline void dot_rows(const V& v, const Weight& w, int64_t n, const typename V::X* x, int64_t x_stride, float* y, int64_t ldy) {
  typename V::Acc sum[M][R], total[blocked ? M : 1][blocked ? R : 1];
  const uint8_t* row = w.codes + n * w.row_stride;
  const int64_t pad = padded<V>(w);
  const float* scales[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) scales[r] = w.scale_of(n + r);
  if constexpr (blocked) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) total[i][r] = V::zero();
  }
  for (int64_t segment = 0; segment < w.segments; ++segment) {
    const int64_t length = w.length_of(segment), start = segment * w.block_cols;
    const uint8_t* p = row + start;
    const typename V::X* xs = x + segment * pad;
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[i][r] = V::zero();

    int64_t k = 0;
    for (; k + V::step <= length; k += V::step) {
      // Hardware prefetchers stop at a page, and the rows after these begin on others. `prefetch` asks for the second-level
      // cache: requests for the first-level one occupy its few miss buffers and halve the rate.
      int64_t ahead = start + k + V::ahead;
      if (ahead >= w.cols) ahead += R * w.row_stride - w.cols;
      if constexpr (hold_weights<V>(M)) {
        typename V::Chunk chunk[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          V::prefetch(row + r * w.row_stride + ahead);
          chunk[r] = v.decode(p + r * w.row_stride + k);
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
          const auto xs_chunk = V::load(xs + i * x_stride + k);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) sum[i][r] = V::dot(sum[i][r], chunk[r], xs_chunk);
        }
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          V::prefetch(row + r * w.row_stride + ahead);
          const auto chunk = v.decode(p + r * w.row_stride + k);
#pragma GCC unroll 16
          for (int i = 0; i < M; ++i) sum[i][r] = V::dot(sum[i][r], chunk, V::load(xs + i * x_stride + k));
        }
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
        const float scale = scales[r][segment];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) total[i][r] = V::scale_add(total[i][r], sum[i][r], scale);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const float scale = (blocked ? 1.f : scales[r][0]) * V::gain;
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) y[i * ldy + r] = V::reduce(blocked ? total[blocked ? i : 0][blocked ? r : 0] : sum[i][r]) * scale;
  }
}

template <class V, int M, bool blocked>
void gemv_of(const Weight& w, int64_t begin, int64_t end, const typename V::X* x, float* y, int64_t ldy) {
  constexpr int R = rows_for<V>(M, blocked);
  const V v;
  const int64_t x_stride = stride<V>(w);
  int64_t n = begin;
  for (; n + R <= end; n += R) dot_rows<V, M, R, blocked>(v, w, n, x, x_stride, y + n - begin, ldy);
  for (; n < end; ++n) dot_rows<V, M, 1, blocked>(v, w, n, x, x_stride, y + n - begin, ldy);
}

template <class V, int M = kAtOnce>
void gemv(const Weight& w, int64_t begin, int64_t end, const typename V::X* x, int64_t m, float* y, int64_t ldy) {
  if (m > kAtOnce) {  // the second part finds the weight in the cache
    const int64_t half = m > 10 ? kAtOnce : m / 2;
    gemv<V>(w, begin, end, x, half, y, ldy);
    gemv<V>(w, begin, end, x + half * stride<V>(w), m - half, y + half * ldy, ldy);
  } else if (m != M) {
    if constexpr (M > 1) gemv<V, M - 1>(w, begin, end, x, m, y, ldy);
  } else if (w.segments == 1) {
    gemv_of<V, M, false>(w, begin, end, x, y, ldy);
  } else {
    gemv_of<V, M, true>(w, begin, end, x, y, ldy);
  }
}

}  // namespace
}  // namespace ctfp8
