// Many activation rows: a tile of the weight is decoded once into a buffer that stays in the cache, then multiplied with
// all of them, M x R dot products at a time.
//
// FP8 values are decoded without their scale, which is exact in bfloat16 and float32; scales multiply the float32 sums.
#pragma once
#include "buffer.h"
#include "gemv.h"

namespace ctfp8 {
namespace {

constexpr int kTileCols = 64;

// y[i * ldy + r] += scale * (x . tile) over `segments` segments of `padded` elements that lie next to each other.
template <TileVector V, int M, int R>
inline void dot_tile(const typename V::X* tile, int64_t tile_stride, const typename V::X* x, int64_t x_stride, int64_t segments,
                     int64_t padded, const float* const* scale, float* y, int64_t ldy) {
  typename V::Acc sum[M][R];
  for (int64_t segment = 0; segment < segments; ++segment) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[i][r] = V::zero();
    for (int64_t k = segment * padded; k < (segment + 1) * padded; k += V::step) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const auto chunk = V::load(tile + r * tile_stride + k);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) sum[i][r] = V::dot(sum[i][r], chunk, V::load(x + i * x_stride + k));
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) y[i * ldy + r] += V::reduce(sum[i][r]) * (scale[r][segment] * V::gain);
  }
}

template <TileVector V, int R>
void dot_tile_rows(const typename V::X* tile, int64_t tile_stride, const typename V::X* x, int64_t x_stride, int64_t m,
                   int64_t segments, int64_t padded, const float* const* scale, float* y, int64_t ldy) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    dot_tile<V, 4, R>(tile, tile_stride, x + i * x_stride, x_stride, segments, padded, scale, y + i * ldy, ldy);
  for (; i < m; ++i) dot_tile<V, 1, R>(tile, tile_stride, x + i * x_stride, x_stride, segments, padded, scale, y + i * ldy, ldy);
}

// Where the chunk at column k of a row is stored: rows lie one after the other, or in pairs.
template <TileVector V, class X>
X* place(X* rows, int64_t stride, int64_t row, int64_t k) {
  if constexpr (RowPairVector<V>) return rows + (row / 2 * stride + k) * 2 + row % 2 * 4;
  return rows + row * stride + k;
}

template <TileVector V>
void put(typename V::X* to, typename V::Chunk chunk) {
  if constexpr (RowPairVector<V>)
    V::store_half(to, chunk);
  else
    V::store(to, chunk);
}

// As dot_tile_rows, for up to P pairs of activation rows and Q pairs of weight rows.
template <RowPairVector V, int P, int Q>
void dot_pairs(const typename V::X* tile, int64_t tile_stride, const typename V::X* x, int64_t x_stride, int64_t m, int64_t n,
               int64_t segments, int64_t padded, const float* const* scale, float* y, int64_t ldy) {
  typename V::Acc sum[P][Q];
  for (int64_t segment = 0; segment < segments; ++segment) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
      for (int q = 0; q < Q; ++q) sum[p][q] = V::zero();
    for (int64_t k = segment * padded; k < (segment + 1) * padded; k += 4) {
      decltype(V::load_pair(tile)) rows[Q];
#pragma GCC unroll 16
      for (int q = 0; q < Q; ++q) rows[q] = V::load_pair(tile + (q * tile_stride + k) * 2);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const auto xs = V::load_pair(x + (p * x_stride + k) * 2);
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) sum[p][q] = V::multiply(sum[p][q], xs, rows[q]);
      }
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
      for (int q = 0; q < Q; ++q) {
        float sums[4];
        V::store_sums(sums, sum[p][q]);
        for (int i = 0; i < 2 && 2 * p + i < m; ++i)
          for (int j = 0; j < 2 && 2 * q + j < n; ++j)
            y[(2 * p + i) * ldy + 2 * q + j] += sums[2 * i + j] * (scale[2 * q + j][segment] * V::gain);
      }
  }
}

template <TileVector V>
void gemm(const Weight& w, int64_t begin, int64_t end, const typename V::X* x, int64_t m, float* y, int64_t ldy) {
  constexpr int R = V::registers >= 32 ? 4 : 2;
  constexpr int64_t kChunk = 4096 / sizeof(typename V::X) / V::step * V::step;  // 4 KiB of a row at a time
  static thread_local Buffer buffer;
  const V v;
  const int64_t x_stride = stride<V>(w), pad = padded<V>(w);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t n = 0; n < end - begin; ++n) y[i * ldy + n] = 0;

  // A chunk is either some whole segments or a part of one.
  const int64_t per_chunk = pad < kChunk ? kChunk / pad : 1;
  for (int64_t first = 0; first < w.segments; first += per_chunk) {
    const int64_t segments = w.segments - first < per_chunk ? w.segments - first : per_chunk;
    const int64_t part = pad < kChunk ? pad : kChunk;
    for (int64_t offset = 0; offset < pad; offset += part) {
      const int64_t padded = pad - offset < part ? pad - offset : part, tile_stride = segments * padded;
      auto* tile = static_cast<typename V::X*>(buffer.get(kTileCols * tile_stride * static_cast<int64_t>(sizeof(typename V::X))));
      for (int64_t n0 = begin; n0 < end; n0 += kTileCols) {
        const int64_t rows = end - n0 < kTileCols ? end - n0 : kTileCols;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t s = 0; s < segments; ++s) {
            const uint8_t* p = w.fp8 + (n0 + r) * w.row_stride + (first + s) * w.block_cols + offset;
            const int64_t left = w.length_of(first + s) - offset, length = left < padded ? left : padded;
            const uint8_t* e = w.exponents ? w.exponents_of(n0 + r) + offset / kMxCols : nullptr;
            for (int64_t k = 0; k < padded; k += V::step) {
              typename V::X* q = place<V>(tile, tile_stride, r, s * padded + k);
              if (k + V::step <= length) {
                put<V>(q, e ? V::shift(v.decode(p + k), e + k / kMxCols, false) : v.decode(p + k));
              } else {
                const auto chunk = k < length ? v.decode_tail(p + k, static_cast<int>(length - k)) : V::zeros();
                put<V>(q, e && k < length ? V::shift(chunk, e + k / kMxCols, false) : chunk);
              }
            }
          }
        }
        const typename V::X* xs = place<V>(x, x_stride, 0, first * pad + offset);
        const float* scale[8];
        for (int64_t m0 = 0; m0 < m; m0 += 8) {
          const int64_t ms = m - m0 < 8 ? m - m0 : 8;
          float* to = y + m0 * ldy + n0 - begin;
          const auto* from = xs + m0 * x_stride;
          int64_t r = 0;
          const auto take = [&](int64_t n) {
            for (int64_t j = 0; j < n; ++j) scale[j] = w.scale_of(n0 + r + j) + first;
            return tile + r * tile_stride;
          };
          if constexpr (RowPairVector<V>) {
            for (; r < rows; r += 8) {
              const int64_t n = rows - r < 8 ? rows - r : 8;
              const auto* at = take(n);
              if (ms > 4)
                dot_pairs<V, 4, 4>(at, tile_stride, from, x_stride, ms, n, segments, padded, scale, to + r, ldy);
              else if (ms > 2)
                dot_pairs<V, 2, 4>(at, tile_stride, from, x_stride, ms, n, segments, padded, scale, to + r, ldy);
              else
                dot_pairs<V, 1, 4>(at, tile_stride, from, x_stride, ms, n, segments, padded, scale, to + r, ldy);
            }
          } else {
            for (; r + R <= rows; r += R)
              dot_tile_rows<V, R>(take(R), tile_stride, from, x_stride, ms, segments, padded, scale, to + r, ldy);
            for (; r < rows; ++r)
              dot_tile_rows<V, 1>(take(1), tile_stride, from, x_stride, ms, segments, padded, scale, to + r, ldy);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace ctfp8
