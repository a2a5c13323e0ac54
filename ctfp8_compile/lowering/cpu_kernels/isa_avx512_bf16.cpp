// The bfloat16 kernels for AVX-512 with VBMI and BF16 (Intel since Sapphire Rapids, AMD since Zen 4).
//
// Decoding: two 128-entry byte look-ups (vpermi2b ignores the sign bit of the index) give the high and low bytes of
// the bfloat16s, and the two byte unpacks interleave them. Those work within 128-bit lanes, so of the 64 columns of a
// chunk the first vector holds 0-7, 16-23, 32-39, 48-55 and the second the others. Packed activations use that order,
// which costs nothing there and saves a permutation of every weight.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "decode.h"

#define CTFP8_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma,f16c"
#include "isa_begin.h"

namespace ctfp8 {
namespace {

struct Decoder {
  __m512i high0, high1, low0, low1, sign;

  Decoder()  // spelled out: GCC leaves the target off a constructor it writes itself
      : high0(_mm512_load_si512(kBf16Bytes.high)),
        high1(_mm512_load_si512(kBf16Bytes.high + 64)),
        low0(_mm512_load_si512(kBf16Bytes.low)),
        low1(_mm512_load_si512(kBf16Bytes.low + 64)),
        sign(_mm512_set1_epi8(static_cast<char>(0x80))) {}

  void operator()(__m512i codes, __m512bh* out) const {
    __m512i high = _mm512_permutex2var_epi8(high0, codes, high1), low = _mm512_permutex2var_epi8(low0, codes, low1);
    high = _mm512_ternarylogic_epi32(high, codes, sign, 0xf8);  // high | (codes & sign)
    out[0] = (__m512bh)_mm512_unpacklo_epi8(low, high);
    out[1] = (__m512bh)_mm512_unpackhi_epi8(low, high);
  }
};

__mmask64 first(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

void pack_dot(const Columns& columns, const void* x, uint16_t* out) {
  const uint16_t* source = static_cast<const uint16_t*>(x);
  for (int64_t span = 0; span < columns.spans; ++span) {
    int64_t n = columns.length(span);
    const uint16_t* from = source + span * columns.block;
    uint16_t* to = out + span * columns.stride;
    for (int64_t k = 0; k < n; k += kChunk) {
      alignas(64) uint16_t rest[kChunk] = {};
      const uint16_t* chunk = from + k;
      if (n - k < kChunk) {
        std::memcpy(rest, chunk, static_cast<size_t>(n - k) * 2);
        chunk = rest;
      }
      for (int lane = 0; lane < 4; ++lane)
        for (int half = 0; half < 2; ++half)
          std::memcpy(to + k + half * 32 + lane * 8, chunk + lane * 16 + half * 8, 16);
    }
  }
}

// As 32-bit elements: out[j] = (in[0][j], in[1][j], ... in[15][j]).
void transpose(__m512i* v) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // v[4g + c] holds, in lane l, column 4l + c of rows 4g .. 4g + 3.
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
  }
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm512_shuffle_i32x4(t[c], t[4 + c], 0x88);
    v[8 + c] = _mm512_shuffle_i32x4(t[c], t[4 + c], 0xdd);
    v[4 + c] = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0x88);
    v[12 + c] = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0xdd);
  }
}

void pack_panel(const Columns& columns, const uint16_t* const* rows, int64_t count, uint16_t* out) {
  int64_t width = round_up(count, 16);
  for (int64_t span = 0; span < columns.spans; ++span) {
    int64_t n = columns.length(span);
    for (int64_t k = 0; k < n; k += kChunk)
      for (int64_t m = 0; m < width; m += 16)
        for (int64_t part = 0; part < 2; ++part) {  // 16 pairs of columns of 16 rows
          int64_t left = n - k - part * 32;
          auto mask = static_cast<__mmask32>(first(left > 0 ? left : 0));
          __m512i v[16];
          for (int64_t i = 0; i < 16; ++i)
            v[i] = m + i < count
                       ? _mm512_maskz_loadu_epi16(mask, rows[m + i] + span * columns.block + k + part * 32)
                       : _mm512_setzero_si512();
          transpose(v);
          uint16_t* to = out + (span * columns.stride + k) * width + m * 2;
          for (int64_t i = 0; i < 16; ++i) {
            int64_t pair = part * 16 + i;  // of the chunk; where decoding puts it:
            int64_t at = (pair / 4 % 2) * 16 + pair / 8 * 4 + pair % 4;
            _mm512_storeu_si512(to + at * width * 2, v[i]);
          }
        }
  }
}

template <int M, int R>
void dot_tile(const Dot& a, const uint16_t* x, int64_t n, float* out) {
  const Decoder decoder;
  const int64_t stride = a.rows.stride, packed = a.columns.packed;
  const uint8_t* codes = a.rows.row(n);
  __m512 total[R][M];
  for (auto& row : total)
    for (auto& v : row) v = _mm512_setzero_ps();
  for (int64_t span = 0; span < a.columns.spans; ++span) {
    __m512 sum[R][M];
    for (auto& row : sum)
      for (auto& v : row) v = _mm512_setzero_ps();
    const uint16_t* xs = x + span * a.columns.stride;
    const uint8_t* ws = codes + span * a.columns.block;
    int64_t length = a.columns.length(span), full = length / kChunk * kChunk;
    auto step = [&](__m512i q, int64_t k, int r) __attribute__((always_inline)) {
      __m512bh w[2];
      decoder(q, w);
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < 2; ++i) {
          auto value = (__m512bh)_mm512_loadu_si512(xs + m * packed + k + 32 * i);
          sum[r][m] = _mm512_dpbf16_ps(sum[r][m], value, w[i]);
        }
    };
    for (int64_t k = 0; k < full; k += kChunk)
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = ws + r * stride + k;
        _mm_prefetch(reinterpret_cast<const char*>(p + 512), _MM_HINT_T0);
        step(_mm512_loadu_si512(p), k, r);
      }
    if (full < length)
      for (int r = 0; r < R; ++r)
        step(_mm512_maskz_loadu_epi8(first(length - full), ws + r * stride + full), full, r);
    if (a.columns.spans == 1) {  // scale the finished sum instead, which rounds once
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) out[m * a.out_stride + r] = _mm512_reduce_add_ps(sum[r][m]) * *a.rows.scale(n + r, 1);
      return;
    }
    for (int r = 0; r < R; ++r) {
      __m512 scale = _mm512_set1_ps(a.rows.scale(n + r, a.columns.spans)[span]);
      for (int m = 0; m < M; ++m) total[r][m] = _mm512_fmadd_ps(scale, sum[r][m], total[r][m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[m * a.out_stride + r] = _mm512_reduce_add_ps(total[r][m]);
}

template <int M>
void dot_rows(const Dot& a, const uint16_t* x, float* out) {
  constexpr int R = M <= 4 ? 4 : 2;
  int64_t n = a.rows.begin;
  for (; n + R <= a.rows.end; n += R) dot_tile<M, R>(a, x, n, out + n - a.rows.begin);
  for (; n < a.rows.end; ++n) dot_tile<M, 1>(a, x, n, out + n - a.rows.begin);
}

void dot(const Dot& a) {
  using Rows = void (*)(const Dot&, const uint16_t*, float*);
  static constexpr Rows by_count[] = {nullptr,     dot_rows<1>, dot_rows<2>, dot_rows<3>, dot_rows<4>,
                                      dot_rows<5>, dot_rows<6>, dot_rows<7>, dot_rows<8>};
  for (int64_t m = 0; m < a.m; m += 8)
    by_count[a.m - m < 8 ? a.m - m : 8](a, static_cast<const uint16_t*>(a.x) + m * a.columns.packed,
                                        a.out + m * a.out_stride);
}

void decode(const uint8_t* codes, int64_t n, int64_t ahead, uint16_t* out) {
  const Decoder decoder;
  __m512bh w[2];
  int64_t k = 0;
  for (; k + kChunk <= n; k += kChunk) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + k + ahead), _MM_HINT_T0);
    decoder(_mm512_loadu_si512(codes + k), w);
    _mm512_storeu_si512(out + k, (__m512i)w[0]);
    _mm512_storeu_si512(out + k + 32, (__m512i)w[1]);
  }
  if (k < n) {
    decoder(_mm512_maskz_loadu_epi8(first(n - k), codes + k), w);
    _mm512_storeu_si512(out + k, (__m512i)w[0]);
    _mm512_storeu_si512(out + k + 32, (__m512i)w[1]);
  }
}

void add_scaled(const float* x, float scale, int64_t n, float* sum) {
  __m512 s = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; i += 16)
    _mm512_storeu_ps(sum + i, _mm512_fmadd_ps(s, _mm512_loadu_ps(x + i), _mm512_loadu_ps(sum + i)));
}

void store_transposed(const float* c, int64_t width, int64_t rows, int64_t count, const float* scale, const float* bias,
                      uint16_t* const* out) {
  for (int64_t n = 0; n < rows; n += 16) {
    int64_t here = rows - n < 16 ? rows - n : 16;
    auto mask = static_cast<__mmask16>(first(here));
    __m512 added = bias ? _mm512_maskz_loadu_ps(mask, bias + n) : _mm512_setzero_ps();
    for (int64_t m = 0; m < count; m += 16) {
      __m512i v[16];
      for (int64_t i = 0; i < 16; ++i)
        v[i] = i < here ? _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(c + (n + i) * width + m),
                                                           _mm512_set1_ps(scale ? scale[n + i] : 1.0f)))
                        : _mm512_setzero_si512();
      transpose(v);
      for (int64_t i = 0; i < 16 && m + i < count; ++i) {
        __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(_mm512_castsi512_ps(v[i]), added));
        _mm256_mask_storeu_epi16(out[m + i] + n, mask, (__m256i)rounded);
      }
    }
  }
}

}  // namespace

const Bf16Kernels* avx512_bf16_kernels() {
  static constexpr Bf16Kernels kernels = {16,  pack_dot,   pack_panel,      dot,
                                          decode, add_scaled, store_transposed};
  bool here = avx512_kernels() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
  return here ? &kernels : nullptr;
}

}  // namespace ctfp8

#include "isa_end.h"
#else
const ctfp8::Bf16Kernels* ctfp8::avx512_bf16_kernels() { return nullptr; }
#endif
