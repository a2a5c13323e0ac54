// AVX2 + FMA + F16C: FP8 values become float16 by a shift, then float32; float32 multiply-add.
#include "vector.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdlib>
#include <cstring>

#define CTFP8_TARGET "avx2,fma,f16c"
#include "target_begin.h"
//
#include "dense.h"
#include "table.h"

namespace ctfp8 {
namespace {

struct Avx2 {
  using X = float;
  using Acc = __m256;
  using Chunk = __m256;
  static constexpr int step = 8, registers = 16, constants = 4, parts = 1, ahead = 2048, in_turn = 0;
  static constexpr float gain = 256;

  static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
  static void prefetch_once(const uint8_t* p) { prefetch(p); }
  static Acc zero() { return _mm256_setzero_ps(); }
  static Chunk zeros() { return _mm256_setzero_ps(); }

  // s eeee mmm -> s 0eeee mmm0000000 is the float16 of value / 256, subnormals included, as float16's exponent bias is 15
  // and not 7. vcvtph2ps reads subnormals whatever the denormals-are-zero flag says.
  static __m256 convert(__m128i fp8) {
    const __m128i keep = _mm_set1_epi16(static_cast<short>(0xbf80)), top = _mm_set1_epi16(0x3f80);
    const __m128i half = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(fp8), 7), keep);
    const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(_mm_and_si128(half, top), top), _mm_set1_epi16(0x7c00));
    return _mm256_cvtph_ps(_mm_or_si128(half, nan));
  }
  Chunk decode(const uint8_t* p) const { return convert(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  Chunk decode_tail(const uint8_t* p, int n) const {
    uint64_t fp8 = 0;
    std::memcpy(&fp8, p, n);
    return convert(_mm_cvtsi64_si128(static_cast<long long>(fp8)));
  }
  static void hold(Chunk& chunk) { __asm__("" : "+x"(chunk)); }
  static Chunk load(const X* p) { return _mm256_loadu_ps(p); }
  static Chunk widen(const uint16_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static void store(X* p, Chunk chunk) { _mm256_storeu_ps(p, chunk); }
  static Acc dot(Acc sum, Chunk w, Chunk x) { return _mm256_fmadd_ps(w, x, sum); }
  static Acc scale_add(Acc total, Acc sum, float scale) { return _mm256_fmadd_ps(sum, _mm256_set1_ps(scale), total); }
  static Chunk shift(const Chunk& chunk, const uint8_t* e, bool) { return times(chunk, powers.of[*e]); }
  static Chunk times(Chunk chunk, float scale) { return _mm256_mul_ps(chunk, _mm256_set1_ps(scale)); }
  static float reduce(Acc sum) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static void arrange(const X* from, X* to) { std::memcpy(to, from, step * sizeof(X)); }
  static void round_f16(const float* row, const float* bias, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = _cvtss_sh(bias ? row[i] + bias[i] : row[i], _MM_FROUND_TO_NEAREST_INT);
  }
};

// For few rows of activations, which are bound by decoding: 32 FP8 values at a time, every fourth of them in a vector.
struct Avx2Row : Avx2 {
  struct Chunk {
    __m256 part[4];
  };
  static constexpr int step = 32, parts = 4, in_turn = 6144;
  static constexpr float gain = 1;

  // Whether each of `kPlain` FP8 values is a normal number or 0.
  static bool plain(const uint8_t* p) {
    const auto below = [&](bool zeros) {
      __m256i most = _mm256_setzero_si256();
      for (int i = 0; i < kPlain; i += 32) {
        const __m256i fp8 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
        __m256i above = _mm256_sub_epi8(_mm256_add_epi8(fp8, fp8), _mm256_set1_epi8(2 * 0x08));  // without signs
        if (zeros) above = _mm256_andnot_si256(_mm256_cmpeq_epi8(fp8, _mm256_setzero_si256()), above);
        most = _mm256_max_epu8(most, above);
      }
      most = _mm256_subs_epu8(most, _mm256_set1_epi8(static_cast<char>(2 * 0x7e - 2 * 0x08)));
      return _mm256_testz_si256(most, most);
    };
    return below(false) || below(true);
  }
  // The upper half of float32 of a normal number s eeee mmm is s with 0x3c00 + 16 * eeeemmm behind it; of 0 it is 0. Sixteen
  // times an FP8 value, taken for an integer, is 0x3c00 less where it is positive, and 0x3c00 more, modulo 2^16, where it is
  // negative.
  template <int M, bool shifted>
  static void add_plain(Acc* sum, const uint8_t* p, const X* x, int64_t stride, const uint8_t* e) {
    const __m256i fp8 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const auto add = [&](__m256i floats, int part) {
      __m256 w = _mm256_castsi256_ps(floats);
      if constexpr (shifted) w = _mm256_mul_ps(w, _mm256_set1_ps(powers.of[*e]));
      hold(w);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) sum[i] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + i * stride + 8 * part), sum[i]);
    };
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {  // every other value
      const __m256i products = _mm256_maddubs_epi16(_mm256_set1_epi16(odd ? 16 << 8 : 16), fp8);
      __m256i halves = _mm256_add_epi16(products, _mm256_sign_epi16(_mm256_set1_epi16(0x3c00), products));
      hold(halves);
      add(_mm256_slli_epi32(halves, 16), odd);
      add(_mm256_and_si256(halves, _mm256_set1_epi32(static_cast<int>(0xffff0000))), odd + 2);
    }
  }
  static void hold(auto& vector) { __asm__("" : "+x"(vector)); }

  // Values 0, 4, 8, … of 32, then 1, 5, 9, …, as add_plain has them.
  __attribute__((noinline)) static Chunk decode(const uint8_t* p) {
    const __m128i by_four = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m128i low = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), by_four);
    const __m128i high = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)), by_four);
    const __m128i first = _mm_unpacklo_epi32(low, high), last = _mm_unpackhi_epi32(low, high);
    const auto value = [](__m128i fp8) { return _mm256_mul_ps(convert(fp8), _mm256_set1_ps(Avx2::gain)); };
    return {{value(first), value(_mm_unpackhi_epi64(first, first)), value(last), value(_mm_unpackhi_epi64(last, last))}};
  }
  static Chunk decode_tail(const uint8_t* p, int n) {
    alignas(32) uint8_t fp8[step] = {};
    std::memcpy(fp8, p, n);
    return decode(fp8);
  }
  static void arrange(const X* from, X* to) {
    for (int i = 0; i < step; ++i) to[i % 4 * 8 + i / 4] = from[i];
  }
  static Chunk load(const X* p) {
    return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8), _mm256_loadu_ps(p + 16), _mm256_loadu_ps(p + 24)}};
  }
  static void hold(Chunk&) {}
  static Acc dot(Acc sum, const Chunk& w, const Chunk& x) {
    for (int i = 0; i < 4; ++i) sum = _mm256_fmadd_ps(w.part[i], x.part[i], sum);
    return sum;
  }
  static Chunk shift(Chunk chunk, const uint8_t* e, bool both) {
    for (__m256& part : chunk.part) part = Avx2::shift(part, e, both);
    return chunk;
  }
};

// bfloat16 weights and activations: 32 of them, as float32.
struct Avx2Halves : Avx2 {
  using Chunk = Avx2Row::Chunk;
  static constexpr int step = 32;

  static Chunk load(const uint16_t* p) {
    const auto two = reinterpret_cast<const __m256i*>(p);
    const __m256i first = _mm256_loadu_si256(two), last = _mm256_loadu_si256(two + 1);
    const auto even = [](__m256i halves) { return _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16)); };
    const auto odd = [](__m256i halves) {
      return _mm256_castsi256_ps(_mm256_and_si256(halves, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
    };
    return {{even(first), odd(first), even(last), odd(last)}};
  }
  static Chunk halves(const uint16_t* p, int64_t n) {
    uint16_t chunk[step] = {};
    std::memcpy(chunk, p, (n < step ? n : step) * sizeof(uint16_t));
    return load(chunk);
  }
  static Acc dot(Acc sum, const Chunk& w, const Chunk& x) { return Avx2Row::dot(sum, w, x); }
};

int64_t bytes_of(const Weight& w, int64_t m) { return m <= kFew ? bytes<Avx2Row>(w, m) : bytes<Avx2>(w, m); }

void prepare_rows(const Weight& w, const void* const* rows, int64_t begin, int64_t count, int64_t m, void* prepared) {
  (m <= kFew ? prepare<Avx2Row> : prepare<Avx2>)(w, rows, begin, count, m, prepared);
}

void multiply(const Weight& w, int64_t begin, int64_t end, const void* prepared, int64_t m, float* y, int64_t ldy) {
  const auto* rows = static_cast<const float*>(prepared);
  if (m <= kFew)
    gemv<Avx2Row>(w, begin, end, rows, m, y, ldy);
  else
    gemm<Avx2>(w, begin, end, rows, m, y, ldy);
}

}  // namespace

const Kernels* avx2() {
  using V = Avx2;
  static const Kernels kernels = {"avx2",   4,         kTileCols,     bytes_of,     prepare_rows,
                                  multiply, finish<V>, dequantize<V>, attention<V>, dense<Avx2Halves>};
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return here ? &kernels : nullptr;
}

}  // namespace ctfp8
#include "target_end.h"
#else
const ctfp8::Kernels* ctfp8::avx2() { return nullptr; }
#endif
