// Weights that are bfloat16 themselves, for a few rows of activations: streamed through a GEMV, as by `dot_row` of gemv.h.
#pragma once
#include "gemv.h"

namespace ctfp8 {
namespace {

// What this file needs: chunks of bfloat16s, weights and activations in the same order, and of vector.h what sums take.
template <class V>
concept HalvesVector = requires(const uint16_t* p, typename V::Acc sum, typename V::Chunk chunk) {
  // `step` of them.
  { V::load(p) } -> std::same_as<typename V::Chunk>;
  // Up to `step` of them, the rest zero; reads nothing behind them.
  { V::halves(p, int64_t{}) } -> std::same_as<typename V::Chunk>;
  { V::dot(V::zero(), chunk, chunk) } -> std::same_as<typename V::Acc>;
  { V::scale_add(sum, sum, float{}) } -> std::same_as<typename V::Acc>;
};

template <HalvesVector V, int M>
inline void dense_row(const uint16_t* row, int64_t cols, const uint16_t* const* x, typename V::Acc* sums, int ld) {
  typename V::Acc sum[2][M];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) sum[0][i] = sum[1][i] = V::zero();
  const auto add = [&](typename V::Acc* sum, int64_t k) {
    for (int line = 0; line < V::step; line += 32)
      V::prefetch_once(reinterpret_cast<const uint8_t*>(row + k + line) + 2 * V::ahead);
    const auto chunk = V::load(row + k);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) sum[i] = V::dot(sum[i], chunk, V::load(x[i] + k));
  };
  int64_t k = 0;
  for (; k + 2 * V::step <= cols; k += 2 * V::step) add(sum[0], k), add(sum[1], k + V::step);
  for (; k < cols; k += V::step) {
    const auto chunk = V::halves(row + k, cols - k);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) sum[0][i] = V::dot(sum[0][i], chunk, V::halves(x[i] + k, cols - k));
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) sums[i * ld] = V::scale_add(sum[0][i], sum[1][i], 1.f);
}

template <HalvesVector V, int M>
void dense_rows(const Dense& w, int64_t begin, int64_t end, const uint16_t* const* x, float* y, int64_t ldy) {
  constexpr int R = M <= 2 ? 8 : 4;
  const auto some = [&]<int N>(int64_t n) {
    typename V::Acc sums[M * N];
    alignas(64) float results[16];
    for (int r = 0; r < N; ++r) dense_row<V, M>(w.values + (n + r) * w.row_stride, w.cols, x, sums + r, N);
    reduce_all<V, M * N>(sums, results);
    for (int i = 0; i < M; ++i)
      for (int r = 0; r < N; ++r) y[i * ldy + n - begin + r] = results[i * N + r];
  };
  int64_t n = begin;
  for (; n + R <= end; n += R) some.template operator()<R>(n);
  for (; n < end; ++n) some.template operator()<1>(n);
}

template <HalvesVector V, int M = kDenseRows>
void dense(const Dense& w, int64_t begin, int64_t end, const uint16_t* const* x, int64_t m, float* y, int64_t ldy) {
  if (m == M) return dense_rows<V, M>(w, begin, end, x, y, ldy);
  if constexpr (M > 1) dense<V, M - 1>(w, begin, end, x, m, y, ldy);
}

}  // namespace
}  // namespace ctfp8
