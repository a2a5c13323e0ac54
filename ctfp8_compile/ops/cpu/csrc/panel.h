// Many activation rows in bfloat16: out^T = weight x^T.
//
// The weight is the left operand as it lies in memory, so a tile of it is only decoded, never transposed. Activations are
// the right operand: packed once into panels of up to 64 rows, pairs of columns together, as vdpbf16ps and AMX want them.
// Products are of unscaled FP8 values, exact in bfloat16; each scale multiplies the float32 sum over its columns.
#pragma once
#include "buffer.h"
#include "gemv.h"
#include "lanes.h"

namespace ctfp8 {
namespace {

constexpr int64_t kPanelCols = 96;  // weight rows that a thread takes at a time
constexpr int64_t kPanel = 64;      // activation rows of a panel
constexpr int64_t kPiece = 128;     // columns multiplied at a time: a panel of them fits the first-level cache

// A tile of decoded weights: with AMX what suits torch's brgemm, read in longer runs; without, what fits the first-level cache.
template <bool amx>
struct Tile {
  // A multiple of the 24, 12, 8 and 6 of `panel_rows`. Each tile meets all activations: where those are too many for the
  // third-level cache, tiles are fewer and larger.
  static int64_t rows(const Weight& w, int64_t m) { return amx || m * w.cols > 4 << 20 ? kPanelCols : 24; }
  static constexpr int64_t group = amx ? 4 : 1;           // pieces decoded at a time
  static constexpr int64_t stride = group * kPiece + 32;  // no power of two, so that rows use different cache sets
};

// What this file needs besides `Vector`: bfloat16 pairs in sixteen lanes.
template <class V>
concept PairVector = Vector<V> && requires(const V v, const uint8_t* fp8, uint16_t* to, typename V::Acc sum, __m512i pairs) {
  // `step` FP8 values as bfloat16s in the order of the columns; the bytes may be null, else they are as in `shift`.
  v.decode_in_order(pairs, fp8, bool{}, to);
  // Up to `step` FP8 values, the rest zero; reads nothing behind them.
  pairs = V::load_tail(fp8, int64_t{});
  // sum + the products of sixteen pairs.
  { V::dot(sum, pairs, pairs) } -> std::same_as<typename V::Acc>;
};

Brgemm brgemm = nullptr;

// Whether the weight is decoded in registers for `m` activation rows. Panels are of whole sixteens: a few rows more than sixteen
// cost them as much as thirty-two.
bool in_registers(const Weight& w, int64_t m) { return m <= kFew || (!brgemm && m > 16 && m <= (w.segments > 1 ? 19 : 24)); }

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
int64_t pairs(const Weight& w) { return (w.block_cols + 1) / 2; }  // of a segment

template <PairVector V>
int64_t panel_bytes(const Weight& w, int64_t m) {
  return in_registers(w, m) ? bytes<V>(w, m) : round_up(m, 16) * w.segments * pairs(w) * 4;
}

// Panel p of a block begins at pair 64 p * segments * pairs; in it, pair q of all its rows is one line of `width` pairs.
template <PairVector V>
void panel_prepare(const Weight& w, const void* const* rows, int64_t begin, int64_t count, int64_t m, void* prepared) {
  if (in_registers(w, m)) return prepare<V>(w, rows, begin, count, m, prepared);
  const int64_t panel = begin / kPanel, left = round_up(m, 16) - panel * kPanel, width = left < kPanel ? left : kPanel;
  auto* out = static_cast<uint32_t*>(prepared) + panel * kPanel * w.segments * pairs(w) + begin % kPanel;
  for (int64_t segment = 0; segment < w.segments; ++segment) {
    const int64_t length = w.length_of(segment);
    for (int64_t pair = 0; pair < pairs(w); pair += 16) {
      const int64_t rest = length - pair * 2;
      const __mmask32 mask = rest >= 32 ? 0xffffffff : rest <= 0 ? 0 : (1u << rest) - 1;
      __m512i v[16];
      for (int64_t i = 0; i < 16; ++i) {
        v[i] = i < count && mask
                   ? _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(rows[i]) + segment * w.block_cols + pair * 2)
                   : _mm512_setzero_si512();
      }
      transpose(v);
      uint32_t* to = out + (segment * pairs(w) + pair) * width;
      for (int64_t i = 0; i < 16 && pair + i < pairs(w); ++i) _mm512_storeu_si512(to + i * width, v[i]);
    }
  }
}

// FP8 values that will be decoded soon, of the weight rows that are being multiplied or of those after them.
struct Ahead {
  const uint8_t* fp8;
  int64_t row_stride;
};

// sums[r, :] += scale[r] * (tile[r, :] . panel) for R weight rows and Z * 16 activation rows. Meanwhile two cache lines of each
// of R rows of FP8 values are asked for: memory would otherwise rest.
template <PairVector V, int R, int Z>
inline void panel_block(const uint16_t* tile, const uint32_t* x, int64_t count, const float* scale, float* sums,
                        int64_t sums_stride, Ahead ahead) {
  __m512 sum[R][Z];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int z = 0; z < Z; ++z) sum[r][z] = V::zero();
  for (int64_t pair = 0; pair < count; ++pair) {
    __m512i xs[Z];
#pragma GCC unroll 4
    for (int z = 0; z < Z; ++z) xs[z] = _mm512_loadu_si512(x + pair * Z * 16 + z * 16);
    if (pair < 2 * R) V::prefetch(ahead.fp8 + pair / 2 * ahead.row_stride + pair % 2 * 64);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      int32_t both;
      std::memcpy(&both, tile + r * Tile<false>::stride + pair * 2, 4);
      const __m512i weight = _mm512_set1_epi32(both);
#pragma GCC unroll 4
      for (int z = 0; z < Z; ++z) sum[r][z] = V::dot(sum[r][z], weight, xs[z]);
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int z = 0; z < Z; ++z) {
      float* to = sums + r * sums_stride + z * 16;
      _mm512_storeu_ps(to, V::scale_add(_mm512_loadu_ps(to), sum[r][z], scale[r]));
    }
}

template <PairVector V, int Z>
void panel_rows(const uint16_t* tile, int64_t rows, const uint32_t* x, int64_t count, const float* scale, float* sums,
                int64_t sums_stride, Ahead ahead) {
  constexpr int R = 24 / Z;
  for (int64_t r = 0; r < rows; r += R)
    panel_block<V, R, Z>(tile + r * Tile<false>::stride, x, count, scale + r, sums + r * sums_stride, sums_stride,
                         {ahead.fp8 + r * ahead.row_stride, ahead.row_stride});
}

void brgemm_rows(const uint16_t* tile, int64_t rows, const uint32_t* x, int64_t width, int64_t count, const float* scale,
                 float* sums, int64_t sums_stride) {
  alignas(64) float product[kPanelCols * kPanel];
  brgemm(rows, width, count * 2, Tile<true>::stride, width, width, tile, x, product);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; ++i) sums[r * sums_stride + i] += product[r * width + i] * scale[r];
}

// Columns of one segment that are multiplied together.
struct Piece {
  int64_t segment, offset, length;
};

// Each piece of a weight row to its own place in the tile, with zeros to a multiple of 64.
template <PairVector V, bool amx>
inline void decode_pieces(const V& v, const Weight& w, int64_t row, const Piece* pieces, int64_t count, uint16_t* to) {
  for (int64_t g = 0; g < count; ++g) {
    const uint8_t* p = w.fp8 + row * w.row_stride + pieces[g].segment * w.block_cols + pieces[g].offset;
    const uint8_t* e = w.exponents ? w.exponents_of(row) + pieces[g].offset / kMxCols : nullptr;
    const auto at = [&](int64_t k) { return e ? e + k / kMxCols : nullptr; };
    uint16_t* q = to + g * kPiece;
    int64_t k = 0;
    for (; k + 64 <= pieces[g].length; k += 64) {
      if constexpr (amx) V::prefetch(p + k + Tile<amx>::group * kPiece);
      v.decode_in_order(_mm512_loadu_si512(p + k), at(k), true, q + k);
    }
    const int64_t left = pieces[g].length - k;
    if (left > 0) v.decode_in_order(V::load_tail(p + k, left), at(k), left > kMxCols, q + k);
  }
}

template <PairVector V, bool amx>
void panel_multiply(const Weight& w, int64_t begin, int64_t end, const uint32_t* x, int64_t m, float* y, int64_t ldy) {
  static thread_local Buffer sums_buffer;
  constexpr int64_t tile_stride = Tile<amx>::stride, group = Tile<amx>::group;
  alignas(64) static thread_local uint16_t tile[kPanelCols * tile_stride];
  const V v;
  const int64_t most_rows = Tile<amx>::rows(w, m), rows = end - begin, wide = round_up(m, 16), segment_pairs = pairs(w);
  const int64_t sums_bytes = (most_rows + 15) / 16 * 16 * wide * 4;  // transposed sixteen rows at a time
  auto* sums = static_cast<float*>(sums_buffer.get(sums_bytes));
  std::memset(sums, 0, static_cast<size_t>(sums_bytes));
  // Rows past the end are multiplied too.
  if (rows < most_rows) std::memset(tile + rows * tile_stride, 0, static_cast<size_t>((most_rows - rows) * tile_stride * 2));
  const float* scales[kPanelCols];
  for (int64_t r = 0; r < rows; ++r) scales[r] = w.scale_of(begin + r);
  float scale[kPanelCols] = {};

  // brgemm blocks for the caches itself, and a call of it is not cheap.
  const bool whole = amx && w.block_cols > kPiece;
  const int64_t step = whole ? group * kPiece : kPiece, most = whole ? 1 : group;
  Piece pieces[group];
  int64_t segment = 0, offset = 0;  // of the next piece
  while (segment < w.segments) {
    int64_t count = 0;
    for (; count < most && segment < w.segments; ++count) {
      const int64_t left = w.length_of(segment) - offset;
      pieces[count] = {segment, offset, left < step ? left : step};
      offset += step;
      if (left <= step) ++segment, offset = 0;
    }
    for (int64_t r = 0; r < rows; ++r) decode_pieces<V, amx>(v, w, begin + r, pieces, count, tile + r * tile_stride);
    for (int64_t g = 0; g < count; ++g) {
      const Piece& piece = pieces[g];
      const int64_t piece_pairs = (piece.length + 1) / 2;
      for (int64_t r = 0; r < rows; ++r) scale[r] = scales[r][piece.segment];
      const uint16_t* from = tile + g * kPiece;
      // Two pieces on, for one is not long enough; behind the last column, the first of the next rows.
      const int64_t next = piece.segment * w.block_cols + piece.offset + 2 * kPiece;
      const Ahead ahead{w.fp8 + (next < w.cols ? begin * w.row_stride + next : end * w.row_stride + next - w.cols), w.row_stride};
      for (int64_t i = 0; i < wide; i += kPanel) {
        const int64_t width = wide - i < kPanel ? wide - i : kPanel;
        const uint32_t* xs = x + i * w.segments * segment_pairs + (piece.segment * segment_pairs + piece.offset / 2) * width;
        float* to = sums + i;
        if constexpr (amx) {
          brgemm_rows(from, rows, xs, width, piece_pairs, scale, to, wide);
        } else if (width == 64) {
          panel_rows<V, 4>(from, rows, xs, piece_pairs, scale, to, wide, ahead);
        } else if (width == 48) {
          panel_rows<V, 3>(from, rows, xs, piece_pairs, scale, to, wide, ahead);
        } else if (width == 32) {
          panel_rows<V, 2>(from, rows, xs, piece_pairs, scale, to, wide, ahead);
        } else {
          panel_rows<V, 1>(from, rows, xs, piece_pairs, scale, to, wide, ahead);
        }
      }
    }
  }
  for (int64_t n = 0; n < rows; n += 16) {
    const __mmask16 mask = rows - n >= 16 ? 0xffff : (1u << (rows - n)) - 1;
    for (int64_t i = 0; i < m; i += 16) {
      __m512i t[16];
      for (int64_t j = 0; j < 16; ++j) t[j] = _mm512_loadu_si512(sums + (n + j) * wide + i);
      transpose(t);
      for (int64_t j = 0; j < 16 && i + j < m; ++j) _mm512_mask_storeu_epi32(y + (i + j) * ldy + n, mask, t[j]);
    }
  }
}

template <PairVector V>
void panel_matmul(const Weight& w, int64_t begin, int64_t end, const void* prepared, int64_t m, float* y, int64_t ldy) {
  if (in_registers(w, m)) return gemv<V>(w, begin, end, static_cast<const typename V::X*>(prepared), m, y, ldy);
  const auto multiply = [&]<bool amx>() {
    const int64_t rows = Tile<amx>::rows(w, m);
    for (int64_t n = begin; n < end; n += rows) {
      const int64_t last = end - n < rows ? end : n + rows;
      panel_multiply<V, amx>(w, n, last, static_cast<const uint32_t*>(prepared), m, y + n - begin, ldy);
    }
  };
  if (brgemm)
    multiply.template operator()<true>();
  else
    multiply.template operator()<false>();
}

}  // namespace
}  // namespace ctfp8
