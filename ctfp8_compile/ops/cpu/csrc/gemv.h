// Few activation rows: every weight row is read once, decoded in registers and multiplied with all of them.
//
// Included once by each instruction-set file, for its vector type `V` (see vector.h).
#pragma once
#include "kernels.h"
#include "vector.h"

namespace ctfp8 {
namespace {

constexpr int kFew = 12;          // activation rows, at most, where decoding once into a buffer costs more than it saves
constexpr int kAtOnce = 8;        // activation rows that share one decoding of the weight
constexpr int64_t kGrain = 64;    // columns: chunks of all instruction sets, and groups of MXFP8, are whole parts of it
constexpr int64_t kSpan = 16384;  // bytes of their activations that stay in the first-level cache while weight rows pass

// A prepared activation row holds the segments of a weight row, each padded with zeros to whole chunks.
template <Vector V>
int64_t padded(const Weight& w) {
  return (w.block_cols + V::step - 1) / V::step * V::step;
}

// An odd number of cache lines, so that rows do not compete for the same sets of the first-level cache.
template <Vector V>
int64_t stride(const Weight& w) {
  constexpr int64_t line = 64 / sizeof(typename V::X);
  return ((w.segments * padded<V>(w) + line - 1) / line | 1) * line;
}

// With one or two rows of activations their chunks stay in registers while weight rows pass; with more, weight chunks stay.
template <Vector V>
constexpr bool hold_weights(int m) {
  return m > 2;
}

// Weight rows at a time, so that all of it fits the registers. With several scales a row each sum needs a second one, which
// may lie in memory where many activation rows share a chunk.
template <Vector V>
constexpr int rows_for(int m, bool blocked) {
  const int sums = m * (blocked && m <= 4 ? 2 : 1), free = V::registers - V::constants - V::parts;
  const int rows = hold_weights<V>(m) ? free / (sums + V::parts) : (free - m * V::parts) / sums;
  const int most = 16 / m < 8 ? 16 / m : 8;
  return rows > most ? most : rows < 1 ? 1 : rows;
}

// Weight rows pass some abreast, sharing chunks of activations, or in turn, which memory likes best: one run from the first FP8
// value to the last. Then each of them reads all activations again, which have to stay in the first-level cache: they do, or, for
// a `PlainVector`, columns are cut into spans so that they do.
template <Vector V>
constexpr int kInTurn = PlainVector<V> ? kAtOnce
                        : V::in_turn   ? 4
                                       : 0;  // activation rows, at most

template <Vector V>
bool in_turn(const Weight& w, int64_t m) {
  if constexpr (requires { V::runs(); }) {
    if (!V::runs()) return false;
  }
  return PlainVector<V> || m * w.segments * padded<V>(w) <= V::in_turn;
}

// What scales a row of weights has: one, one for each segment, bytes.
enum class Scales { one, blocked, bytes };

// n decoded FP8 values, with their bytes where scales are bytes.
template <Vector V, Scales scales>
inline typename V::Chunk decode(const V& v, const uint8_t* p, const uint8_t* exponents, int n = V::step) {
  const auto chunk = n == V::step ? v.decode(p) : v.decode_tail(p, n);
  if constexpr (scales == Scales::bytes) return V::shift(chunk, exponents, n > kMxCols);
  return chunk;
}

// The sum of the lanes of each of N <= 16 vectors.
template <class V, int N>
inline void reduce_all(const typename V::Acc* sums, float* results) {
  if constexpr (requires { &V::reduce16; }) {
    typename V::Acc all[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) all[i] = i < N ? sums[i] : V::zero();
    V::reduce16(all, results);
  } else {
    for (int i = 0; i < N; ++i) results[i] = V::reduce(sums[i]);
  }
}

// Hardware prefetchers stop at a page, and the rows after these begin on others.
class CodesAhead {
 public:
  // FP8 values `bytes` later, where rows pass `abreast` at a time.
  CodesAhead(const Weight& w, int64_t bytes, int abreast)
      : cols_(w.cols), jump_(abreast * w.row_stride), later_(bytes % w.cols), groups_(bytes / w.cols * jump_) {}

  // Where those are, from the beginning of the row that is at this column.
  int64_t of(int64_t column) const {
    const int64_t next = column + later_;
    return groups_ + (next < cols_ ? next : next + jump_ - cols_);
  }

 private:
  int64_t cols_, jump_, later_, groups_;
};

// y[i * ldy + r] (+)= the sum of sums[i * R + r], scaled, for M activation rows and R weight rows from row n on.
template <Vector V, int M, int R, Scales kind>
inline void put(const Weight& w, int64_t n, const typename V::Acc* sums, bool add, float* y, int64_t ldy) {
  alignas(64) float results[16];
  reduce_all<V, M * R>(sums, results);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float scale = kind == Scales::blocked ? 1.f : w.scale_of(n + r)[0];  // of blocks, they are part of the sums
      const float result = results[i * R + r] * (scale * V::gain);
      y[i * ldy + r] = add ? y[i * ldy + r] + result : result;
    }
}

// Weight rows, at most, that pass in turn a few columns at a time: of one or two rows of activations, several runs through memory
// keep it busier than one.
template <Vector V>
constexpr int together(int m) {
  return PlainVector<V> && m <= 2 ? 8 / m : 1;
}

// sums[i * ld + r] = the products of M activation rows with R weight rows from row n on, lane by lane.
template <Vector V, int M, int R, Scales kind>
inline void dot_in_turn(const V& v, const Weight& w, int64_t n, const typename V::X* x, int64_t x_stride, typename V::Acc* sums,
                        int ld) {
  const uint8_t* row = w.fp8 + n * w.row_stride;
  const uint8_t* exponents = w.exponents_of(n);
  const CodesAhead ahead(w, 2 * V::ahead / R, R);
#pragma GCC unroll 16
  for (int i = 0; i < M * R; ++i) sums[i / R * ld + i % R] = V::zero();
  for (int64_t segment = 0; segment < w.segments; ++segment) {
    const int64_t length = w.length_of(segment), start = segment * w.block_cols;
    const typename V::X* xs = x + segment * padded<V>(w);
    constexpr int C = !PlainVector<V> || M <= 4 ? 2 : 1;
    typename V::Acc sum[R][C][M];  // of every C-th chunk: an addition waits for the one before
#pragma GCC unroll 16
    for (int i = 0; i < R * C * M; ++i) sum[i / M / C][i / M % C][i % M] = V::zero();

    const auto add = [&](int r, int c, int64_t k, int n) __attribute__((always_inline)) {
      const uint8_t* p = row + r * w.row_stride + start + k;
      const uint8_t* bytes = exponents + r * w.exponent_stride + k / kMxCols;
      typename V::Acc* to = sum[r][c % C];
      if constexpr (kind == Scales::bytes && requires { &V::shift_dot; }) {
        if (n == V::step) {
          const auto chunk = v.decode(p);
#pragma GCC unroll 16
          for (int i = 0; i < M; ++i) to[i] = V::shift_dot(to[i], chunk, V::load(xs + i * x_stride + k), bytes);
          return;
        }
      }
      const auto chunk = decode<V, kind>(v, p, bytes, n);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) to[i] = V::dot(to[i], chunk, V::load(xs + i * x_stride + k));
    };
    int64_t k = 0;
    if constexpr (PlainVector<V>) {
      for (; k + kPlain <= length; k += kPlain) {
        const int64_t next = ahead.of(start + k);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const uint8_t* p = row + r * w.row_stride;
          for (int j = 0; j < kPlain; j += 64) V::prefetch_once(p + next + j);
          if (V::plain(p + start + k)) [[likely]] {
#pragma GCC unroll 16
            for (int j = 0; j < kPlain; j += V::step)
              V::template add_plain<M, kind == Scales::bytes>(sum[r][j / V::step % C], p + start + k + j, xs + k + j, x_stride,
                                                              exponents + r * w.exponent_stride + (k + j) / kMxCols);
          } else {
#pragma GCC unroll 1  // more would cost the other path registers
            for (int j = 0; j < kPlain; j += V::step) add(r, 0, k + j, V::step);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int64_t j = k;
      for (; j + 2 * V::step <= length; j += 2 * V::step) {
        V::prefetch_once(row + r * w.row_stride + ahead.of(start + j));
        add(r, 0, j, V::step);
        V::prefetch_once(row + r * w.row_stride + ahead.of(start + j + V::step));
        add(r, 1, j + V::step, V::step);
      }
      if (j + V::step <= length) add(r, 0, j, V::step), j += V::step;
      if (j < length) add(r, 1, j, static_cast<int>(length - j));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        auto all = sum[r][0][i];
        if constexpr (C == 2) all = V::scale_add(all, sum[r][1][i], 1.f);
        typename V::Acc& to = sums[i * ld + r];
        to = kind == Scales::blocked ? V::scale_add(to, all, w.scale_of(n + r)[segment]) : all;
      }
  }
}

template <Vector V, int M, Scales kind>
void gemv_in_turn(const Weight& w, int64_t begin, int64_t end, const typename V::X* x, int64_t x_stride, bool add, float* y,
                  int64_t ldy) {
  constexpr int R = M <= 2 ? 8 : M <= 4 ? 4 : 2;  // work is cut into eight rows and more
  constexpr int T = together<V>(M);
  const V v;
  typename V::Acc sums[M * R];
  int64_t n = begin;
  for (; n + R <= end; n += R) {
    for (int r = 0; r < R; r += T) dot_in_turn<V, M, T, kind>(v, w, n + r, x, x_stride, sums + r, R);
    put<V, M, R, kind>(w, n, sums, add, y + n - begin, ldy);
  }
  for (; n < end; ++n) {
    dot_in_turn<V, M, 1, kind>(v, w, n, x, x_stride, sums, 1);
    put<V, M, 1, kind>(w, n, sums, add, y + n - begin, ldy);
  }
}

// y[i * ldy + r] (+)= … for M activation rows and R weight rows abreast, from row n on.
template <Vector V, int M, int R, Scales kind>
inline void dot_rows(const V& v, const Weight& w, int64_t n, const typename V::X* x, int64_t x_stride, bool add, float* y,
                     int64_t ldy) {
  constexpr bool blocked = kind == Scales::blocked;
  typename V::Acc sum[M][R], total[blocked ? M : 1][blocked ? R : 1];
  const uint8_t* row = w.fp8 + n * w.row_stride;
  const int64_t pad = padded<V>(w);
  const CodesAhead ahead(w, V::ahead, R);
  const float* scales[R];
  const uint8_t* exponents[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) scales[r] = blocked ? w.scale_of(n + r) : nullptr, exponents[r] = w.exponents_of(n + r);
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
      const int64_t next = ahead.of(start + k);
      if constexpr (hold_weights<V>(M)) {
        typename V::Chunk chunk[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          V::prefetch(row + r * w.row_stride + next);
          chunk[r] = decode<V, kind>(v, p + r * w.row_stride + k, exponents[r] + k / kMxCols);
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
          auto xs_chunk = V::load(xs + i * x_stride + k);
          if constexpr (R > 1) V::hold(xs_chunk);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) sum[i][r] = V::dot(sum[i][r], chunk[r], xs_chunk);
        }
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          V::prefetch(row + r * w.row_stride + next);
          if constexpr (kind == Scales::bytes && requires { &V::shift_dot; }) {
            const auto chunk = v.decode(p + r * w.row_stride + k);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i)
              sum[i][r] = V::shift_dot(sum[i][r], chunk, V::load(xs + i * x_stride + k), exponents[r] + k / kMxCols);
          } else {
            const auto chunk = decode<V, kind>(v, p + r * w.row_stride + k, exponents[r] + k / kMxCols);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) sum[i][r] = V::dot(sum[i][r], chunk, V::load(xs + i * x_stride + k));
          }
        }
      }
    }
    if (k < length) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const auto chunk = decode<V, kind>(v, p + r * w.row_stride + k, exponents[r] + k / kMxCols, static_cast<int>(length - k));
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
  put<V, M, R, kind>(w, n, blocked ? &total[0][0] : &sum[0][0], add, y, ldy);
}

template <Vector V, int M, Scales kind>
void gemv_of(const Weight& w, int64_t begin, int64_t end, const typename V::X* x, int64_t x_stride, bool add, float* y,
             int64_t ldy) {
  if constexpr (M <= kInTurn<V>) {
    if (in_turn<V>(w, M)) return gemv_in_turn<V, M, kind>(w, begin, end, x, x_stride, add, y, ldy);
  }
  if constexpr (!PlainVector<V>) {
    constexpr int R = rows_for<V>(M, kind == Scales::blocked);
    const V v;
    int64_t n = begin;
    for (; n + R <= end; n += R) dot_rows<V, M, R, kind>(v, w, n, x, x_stride, add, y + n - begin, ldy);
    for (; n < end; ++n) dot_rows<V, M, 1, kind>(v, w, n, x, x_stride, add, y + n - begin, ldy);
  }
}

template <Vector V, int M>
void gemv_span(const Weight& w, int64_t begin, int64_t end, const typename V::X* x, int64_t x_stride, int64_t m, bool add,
               float* y, int64_t ldy) {
  if (m != M) {
    if constexpr (M > 1) gemv_span<V, M - 1>(w, begin, end, x, x_stride, m, add, y, ldy);
  } else if (w.exponents) {
    gemv_of<V, M, Scales::bytes>(w, begin, end, x, x_stride, add, y, ldy);
  } else if (w.segments == 1) {
    gemv_of<V, M, Scales::one>(w, begin, end, x, x_stride, add, y, ldy);
  } else {
    gemv_of<V, M, Scales::blocked>(w, begin, end, x, x_stride, add, y, ldy);
  }
}

// The columns are cut into spans: whole segments, or parts of one. The second eight activation rows find a span of the
// weight in the second-level cache. Up to four rows are bound by memory, which likes long runs, or by decoding, if at all.
template <Vector V, int Most = kAtOnce>
void gemv(const Weight& w, int64_t begin, int64_t end, const typename V::X* x, int64_t m, float* y, int64_t ldy) {
  const int64_t pad = padded<V>(w), x_stride = stride<V>(w), at_once = m < Most ? m : Most;
  const int64_t span = PlainVector<V> ? V::in_turn : kSpan / int64_t{sizeof(typename V::X)};
  const int64_t cols = m <= 4 && !PlainVector<V> ? pad * w.segments : span / at_once / kGrain * kGrain;
  const int64_t segments = pad < cols ? cols / pad : 1, part = pad < cols ? pad : cols;
  for (int64_t first = 0; first < w.segments; first += segments) {
    for (int64_t offset = 0; offset < w.length_of(first); offset += part) {
      Weight span = w;
      span.fp8 += first * w.block_cols + offset;
      span.scale += first;
      if (w.exponents) span.exponents += offset / kMxCols;
      span.segments = w.segments - first < segments ? w.segments - first : segments;
      if (span.segments == 1) {
        const int64_t left = w.length_of(first) - offset;
        span.cols = span.block_cols = left < part ? left : part;
      } else {
        span.cols = w.cols - first * w.block_cols;
        if (span.cols > segments * w.block_cols) span.cols = segments * w.block_cols;
      }
      for (int64_t i = 0; i < m;) {
        const int64_t left = m - i, rows = left <= Most ? left : left < 2 * Most ? (left + 1) / 2 : Most;
        gemv_span<V, Most>(span, begin, end, x + i * x_stride + first * pad + offset, x_stride, rows, first + offset > 0,
                           y + i * ldy, ldy);
        i += rows;
      }
    }
  }
}

}  // namespace
}  // namespace ctfp8
