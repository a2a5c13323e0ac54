// AVX-512 of 2017 (F, BW, VL, DQ): as AVX2, sixteen lanes at a time. Also serves float32 activations on newer CPUs.
#include "vector.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdlib>
#include <cstring>

#define CTFP8_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"
#include "target_begin.h"
//
#include "lanes.h"
#include "table.h"

namespace ctfp8 {
namespace {

struct Avx512 {
  using X = float;
  using Acc = __m512;
  using Chunk = __m512;
  static constexpr int step = 16, registers = 32, constants = 3, parts = 1, ahead = 2048, in_turn = 0;
  static constexpr float gain = 256;

  static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
  static void prefetch_once(const uint8_t* p) { prefetch(p); }
  static Acc zero() { return _mm512_setzero_ps(); }
  static Chunk zeros() { return _mm512_setzero_ps(); }

  // See Avx2::convert.
  static __m512 convert(__m128i fp8) {
    const __m256i keep = _mm256_set1_epi16(static_cast<short>(0xbf80)), top = _mm256_set1_epi16(0x3f80);
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(fp8), 7), keep);
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(half, top), top);
    return _mm512_cvtph_ps(_mm256_mask_blend_epi16(nan, half, _mm256_set1_epi16(0x7f80)));
  }
  Chunk decode(const uint8_t* p) const { return convert(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  Chunk decode_tail(const uint8_t* p, int n) const {
    return convert(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p));
  }
  static void hold(Chunk& chunk) { __asm__("" : "+v"(chunk)); }
  static Chunk load(const X* p) { return _mm512_loadu_ps(p); }
  static Chunk widen(const uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static void store(X* p, Chunk chunk) { _mm512_storeu_ps(p, chunk); }
  static Acc dot(Acc sum, Chunk w, Chunk x) { return _mm512_fmadd_ps(w, x, sum); }
  static Acc scale_add(Acc total, Acc sum, float scale) { return _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), total); }
  static Chunk shift(const Chunk& chunk, const uint8_t* e, bool) { return times(chunk, float_of_exponent(*e)); }
  static Chunk times(Chunk chunk, float scale) { return _mm512_mul_ps(chunk, _mm512_set1_ps(scale)); }
  static float reduce(Acc sum) { return _mm512_reduce_add_ps(sum); }
  static void reduce16(const Acc* sums, float* results) { sum_lanes(sums, results); }
  static void arrange(const X* from, X* to) { std::memcpy(to, from, step * sizeof(X)); }
  static void round_f16(const float* row, const float* bias, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = _cvtss_sh(bias ? row[i] + bias[i] : row[i], _MM_FROUND_TO_NEAREST_INT);
  }
};

// As Avx2Row, 64 FP8 values at a time, for up to two rows of activations.
struct Avx512Row : Avx512 {
  struct Chunk {
    __m512 part[4];
  };
  static constexpr int step = 64, parts = 4, in_turn = 6144;
  static constexpr float gain = 1;

  // Whether each of `kPlain` FP8 values is a normal number or 0.
  static bool plain(const uint8_t* p) {
    __mmask64 others = 0;
    for (int i = 0; i < kPlain; i += step) {
      const __m512i fp8 = _mm512_loadu_si512(p + i);
      const __m512i above = _mm512_sub_epi8(_mm512_add_epi8(fp8, fp8), _mm512_set1_epi8(2 * 0x08));  // without signs
      const __mmask64 other = _mm512_cmpgt_epu8_mask(above, _mm512_set1_epi8(static_cast<char>(2 * 0x7e - 2 * 0x08)));
      others |= _mm512_mask_test_epi8_mask(other, fp8, fp8);
    }
    return others == 0;
  }
  // The powers of one byte, or of two for 32 columns each.
  static __m512 powers_of(const uint8_t* e, bool both) {
    const __m512 one = _mm512_set1_ps(powers.of[e[0]]);
    return both ? _mm512_mask_mov_ps(one, 0xff00, _mm512_set1_ps(powers.of[e[1]])) : one;
  }
  // See Avx2Row::add_plain; there is no vpsignw here.
  template <int M, bool shifted>
  static void add_plain(Acc* sum, const uint8_t* p, const X* x, int64_t stride, const uint8_t* e) {
    const __m512i fp8 = _mm512_loadu_si512(p);
    const auto add = [&](__m512i floats, int part) {
      __m512 w = _mm512_castsi512_ps(floats);
      if constexpr (shifted) w = _mm512_mul_ps(w, powers_of(e, true));
      hold(w);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) sum[i] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + i * stride + 16 * part), sum[i]);
    };
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {  // every other value
      const __m512i products = _mm512_maddubs_epi16(_mm512_set1_epi16(odd ? 16 << 8 : 16), fp8);
      const __m512i bits = _mm512_and_si512(products, _mm512_set1_epi16(static_cast<short>(0x87f0)));
      __m512i halves = _mm512_maskz_add_epi16(_mm512_test_epi16_mask(products, products), bits, _mm512_set1_epi16(0x3c00));
      hold(halves);
      add(_mm512_slli_epi32(halves, 16), odd);
      add(_mm512_and_si512(halves, _mm512_set1_epi32(static_cast<int>(0xffff0000))), odd + 2);
    }
  }
  static void hold(auto& vector) { __asm__("" : "+v"(vector)); }

  // Values 0, 4, 8, … of 64, then 1, 5, 9, …, as add_plain has them.
  static __attribute__((noinline)) Chunk ordered(__m512i fp8) {
    const __m512i by_four = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    fp8 = _mm512_permutexvar_epi32(lanes, _mm512_shuffle_epi8(fp8, by_four));
    const auto value = [](__m128i part) { return _mm512_mul_ps(convert(part), _mm512_set1_ps(Avx512::gain)); };
    return {{value(_mm512_extracti32x4_epi32(fp8, 0)), value(_mm512_extracti32x4_epi32(fp8, 1)),
             value(_mm512_extracti32x4_epi32(fp8, 2)), value(_mm512_extracti32x4_epi32(fp8, 3))}};
  }
  static Chunk decode(const uint8_t* p) { return ordered(_mm512_loadu_si512(p)); }
  static Chunk decode_tail(const uint8_t* p, int n) { return ordered(_mm512_maskz_loadu_epi8((1ull << n) - 1, p)); }
  static void arrange(const X* from, X* to) {
    for (int i = 0; i < step; ++i) to[i % 4 * 16 + i / 4] = from[i];
  }
  static Chunk load(const X* p) {
    return {{_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16), _mm512_loadu_ps(p + 32), _mm512_loadu_ps(p + 48)}};
  }
  static void hold(Chunk&) {}
  static Acc dot(Acc sum, const Chunk& w, const Chunk& x) {
    for (int i = 0; i < 4; ++i) sum = _mm512_fmadd_ps(w.part[i], x.part[i], sum);
    return sum;
  }
  static Chunk shift(Chunk chunk, const uint8_t* e, bool both) {
    for (__m512& part : chunk.part) part = _mm512_mul_ps(part, powers_of(e, both));
    return chunk;
  }
};

constexpr int kNarrow = 2;  // with more, and a scale for each block, Avx512 is faster

int64_t bytes_of(const Weight& w, int64_t m) { return m <= kNarrow ? bytes<Avx512Row>(w, m) : bytes<Avx512>(w, m); }

void prepare_rows(const Weight& w, const void* const* rows, int64_t begin, int64_t count, int64_t m, void* prepared) {
  (m <= kNarrow ? prepare<Avx512Row> : prepare<Avx512>)(w, rows, begin, count, m, prepared);
}

void multiply(const Weight& w, int64_t begin, int64_t end, const void* prepared, int64_t m, float* y, int64_t ldy) {
  if (m <= kNarrow)
    gemv<Avx512Row, kNarrow>(w, begin, end, static_cast<const float*>(prepared), m, y, ldy);
  else
    matmul<Avx512>(w, begin, end, prepared, m, y, ldy);
}

}  // namespace

const Kernels* avx512() {
  using V = Avx512;
  if (!avx2()) return nullptr;
  static const Kernels kernels = {"avx512", 4,         kTileCols,     bytes_of,     prepare_rows,
                                  multiply, finish<V>, dequantize<V>, attention<V>, avx2()->dense};
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return here ? &kernels : nullptr;
}

}  // namespace ctfp8
#include "target_end.h"
#else
const ctfp8::Kernels* ctfp8::avx512() { return nullptr; }
#endif
