// AVX-512 VBMI + BF16 (Zen 4, Sapphire Rapids and later): FP8 values become bfloat16 by two byte look-ups; bfloat16 dot products.
#include "vector.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdlib>
#include <cstring>

#define CTFP8_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16"
#include "target_begin.h"
//
#include "lanes.h"
#include "table.h"

namespace ctfp8 {
namespace {

// What a byte of MXFP8 adds to two bfloat16s, read as integers. Bytes below 10, at which 2^-9 is no normal number any more,
// count as 10.
struct Exponents {
  int32_t pair[256] = {};
  constexpr Exponents() {
    for (int e = 0; e < 256; ++e) pair[e] = static_cast<uint16_t>(((e < 10 ? 10 : e) - 127) * 128) * 0x10001u;
  }
};
constexpr Exponents exponents;

bool intel = false;  // set when kernels are chosen

struct Avx512Bf16 {
  using X = uint16_t;
  using Acc = __m512;
  struct Chunk {
    __m512i first, second;
  };
  static constexpr int step = 64, registers = 32, constants = 5, parts = 2, ahead = 2048, in_turn = 16384;
  static constexpr float gain = 1;

  __m512i high0, high1, low0, low1;

  Avx512Bf16() {  // not member initialisers: GCC compiles an implicit constructor without the target
    high0 = _mm512_load_si512(tables.high), high1 = _mm512_load_si512(tables.high + 64);
    low0 = _mm512_load_si512(tables.low), low1 = _mm512_load_si512(tables.low + 64);
  }

  static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
  static void prefetch_once(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_NTA); }
  static bool runs() { return !intel; }
  static Acc zero() { return _mm512_setzero_ps(); }

  // Unpacking works within 128-bit lanes, so `first` holds columns 0-7, 16-23, 32-39, 48-55 and `second` the others.
  // Activations are arranged in the same order once, rather than every weight chunk put right.
  Chunk expand(__m512i fp8) const {
    __asm__("" : "+v"(fp8));  // as in `hold`
    __m512i high = _mm512_permutex2var_epi8(high0, fp8, high1);
    const __m512i low = _mm512_permutex2var_epi8(low0, fp8, low1);
    high = _mm512_ternarylogic_epi32(high, fp8, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);  // high | FP8 values & sign
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
  }
  Chunk decode(const uint8_t* p) const { return expand(_mm512_loadu_si512(p)); }
  static __m512i load_tail(const uint8_t* p, int64_t n) { return _mm512_maskz_loadu_epi8((1ull << n) - 1, p); }
  Chunk decode_tail(const uint8_t* p, int n) const { return expand(load_tail(p, n)); }

  // Adds to the exponents of bfloat16s that are neither zero nor NaN.
  static __m512i add_exponents(__m512i values, __m512i exponents) {
    const __m512i below = _mm512_sub_epi16(_mm512_add_epi16(values, values), _mm512_set1_epi16(1));  // zero is the largest
    const __mmask32 numbers = _mm512_cmplt_epu16_mask(below, _mm512_set1_epi16(static_cast<short>(0xff00)));
    return _mm512_mask_add_epi16(values, numbers, values, exponents);
  }
  static __m512i exponents_of(uint8_t e) { return _mm512_set1_epi32(exponents.pair[e]); }
  static Chunk shift(const Chunk& chunk, const uint8_t* e, bool both) {
    const __m512i one = exponents_of(e[0]);
    const __m512i all = both ? _mm512_mask_mov_epi32(one, 0xff00, exponents_of(e[1])) : one;
    return {add_exponents(chunk.first, all), add_exponents(chunk.second, all)};
  }

  // For one or two rows of activations it is cheaper to multiply the products: lanes 0-7 of both halves are of the first 32
  // columns, lanes 8-15 of the others.
  static Acc shift_dot(Acc total, const Chunk& w, const Chunk& x, const uint8_t* e) {
    const __m512 scale = _mm512_mask_mov_ps(_mm512_set1_ps(powers.of[e[0]]), 0xff00, _mm512_set1_ps(powers.of[e[1]]));
    return _mm512_fmadd_ps(dot(zero(), w, x), scale, total);
  }

  // To 64 consecutive bfloat16s in the order of the columns; `e` may be null, or has a byte for each 32 of them.
  void decode_in_order(__m512i fp8, const uint8_t* e, bool both, X* to) const {
    Chunk chunk = expand(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), fp8));
    if (e) {
      chunk.first = add_exponents(chunk.first, exponents_of(e[0]));
      if (both) chunk.second = add_exponents(chunk.second, exponents_of(e[1]));
    }
    _mm512_storeu_si512(to, chunk.first);
    _mm512_storeu_si512(to + 32, chunk.second);
  }

  // Keeps GCC from reading a chunk again at each use.
  static void hold(Chunk& chunk) { __asm__("" : "+v"(chunk.first), "+v"(chunk.second)); }
  static Chunk load(const X* p) { return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 32)}; }
  static Acc dot(Acc sum, Chunk w, Chunk x) { return dot(dot(sum, w.first, x.first), w.second, x.second); }
  static Acc dot(Acc sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
  static Acc scale_add(Acc total, Acc sum, float scale) { return _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), total); }
  static float reduce(Acc sum) { return _mm512_reduce_add_ps(sum); }
  static void reduce16(const Acc* sums, float* results) { sum_lanes(sums, results); }
  static void arrange(const X* from, X* to) {
    for (int lane = 0; lane < 4; ++lane) {
      std::memcpy(to + lane * 8, from + lane * 16, 16);
      std::memcpy(to + 32 + lane * 8, from + lane * 16 + 8, 16);
    }
  }

  // For attention: 64 bfloat16s in order, n of them if that is less; the values of two tokens interleaved, and what they are
  // multiplied with.
  using Pair = __m512i;
  static Chunk halves(const uint16_t* p, int64_t n) {
    const uint64_t mask = n < step ? (1ull << n) - 1 : ~0ull;
    return {_mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), p),
            _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask >> 32), p + 32)};
  }
  static Chunk zeros() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  static void pairs(const Chunk& one, const Chunk& two, Pair* to) {
    to[0] = _mm512_unpacklo_epi16(one.first, two.first), to[1] = _mm512_unpackhi_epi16(one.first, two.first);
    to[2] = _mm512_unpacklo_epi16(one.second, two.second), to[3] = _mm512_unpackhi_epi16(one.second, two.second);
  }
  static Pair repeat(const uint16_t* p) {
    int32_t both;
    std::memcpy(&both, p, 4);
    return _mm512_set1_epi32(both);
  }
  // Columns [0, n) of `count` tokens, no more than 64 of sixteen: to[i * ld + j] is the pair of columns 2 i of token j. What is
  // missing is zero.
  void across_codes(const char* token, int64_t stride, int64_t count, int64_t n, uint32_t* to, int64_t ld) const {
    const __mmask64 mask = n < step ? (1ull << n) - 1 : ~0ull;
    __m512i v[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) v[j] = _mm512_maskz_loadu_epi8(j < count ? mask : 0, token + j * stride);
    transpose(v);
    // Of four tokens in a lane first the columns 0 and 1, then 2 and 3, so that `expand` gives both pairs.
    const __m512i apart = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const Chunk pairs = expand(_mm512_shuffle_epi8(v[i], apart));
      _mm512_storeu_si512(to + 2 * i * ld, pairs.first);
      _mm512_storeu_si512(to + (2 * i + 1) * ld, pairs.second);
    }
  }
  static void across_halves(const char* token, int64_t stride, int64_t count, int64_t n, uint32_t* to, int64_t ld) {
    const uint64_t mask = n < step ? (1ull << n) - 1 : ~0ull;
    for (int half = 0; half < 2; ++half) {
      const __mmask32 part = static_cast<__mmask32>(mask >> 32 * half);
      __m512i v[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) v[j] = _mm512_maskz_loadu_epi16(j < count ? part : 0, token + j * stride + 64 * half);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (16 * half + i) * ld, v[i]);
    }
  }
  static Pair load_pairs(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store_pairs(uint32_t* p, Pair pair) { _mm512_storeu_si512(p, pair); }
  static Acc load_sum(const float* p) { return _mm512_loadu_ps(p); }
  static void store_sum(float* p, Acc sum) { _mm512_storeu_ps(p, sum); }
  // 64 sums in the order of `pairs` of decoded FP8 values, or of `halves`, brought into the order of columns.
  static void in_order(float* sums, bool fp8) {
    float from[64];
    std::memcpy(from, sums, sizeof(from));
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < 4; ++lane) {
        const int column = fp8 ? 16 * lane + 4 * i : 32 * (i / 2) + 8 * lane + 4 * (i % 2);
        std::memcpy(sums + column, from + 16 * i + 4 * lane, 16);
      }
  }
  static void round_f16(const float*, const float*, int64_t, uint16_t*) {}  // activations, hence outputs, are bfloat16
};

}  // namespace
}  // namespace ctfp8
#include "dense.h"
#include "panel.h"

namespace ctfp8 {
namespace {

struct Intel : Avx512Bf16 {
  static void prefetch_once(const uint8_t* p) { prefetch(p); }
};

}  // namespace

void set_brgemm(Brgemm function) { brgemm = function; }

const Kernels* avx512_bf16() {
  using V = Avx512Bf16;
  if (!avx512() || !__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512bf16")) return nullptr;
  intel = __builtin_cpu_is("intel");
  static const Kernels kernels = {"avx512-bf16",   2,         kPanelCols, panel_bytes<V>, panel_prepare<V>,
                                  panel_matmul<V>, finish<V>, nullptr,    attention<V>,   intel ? dense<Intel> : dense<V>};
  return &kernels;
}

}  // namespace ctfp8
#include "target_end.h"
#else
const ctfp8::Kernels* ctfp8::avx512_bf16() { return nullptr; }
void ctfp8::set_brgemm(Brgemm) {}
#endif
