// The float32 kernels for AVX-512 (F, BW, VL, DQ: every server since Skylake).
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#define CTFP8_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#include "isa_begin.h"
//
#include "float_kernels.h"

namespace ctfp8 {
namespace {

struct Avx512 {
  using F = __m512;
  static constexpr int W = 16, R = 4;
  static constexpr int64_t kDotRows = 8;
  static constexpr float kUnit = 256;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static float reduce(F a) { return _mm512_reduce_add_ps(a); }

  // As in isa_avx2.cpp: through float16, as value / 2^8, and NaN apart.
  static void decode(const uint8_t* p, F* out) {
    const __m512i keep = _mm512_set1_epi16(static_cast<short>(0xbf80));
    for (int i = 0; i < 2; ++i) {
      __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i)));
      __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), keep);
      out[2 * i] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
      out[2 * i + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
    }
    __m512i codes = _mm512_or_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(0x80)));
    __mmask64 nan = _mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(-1));
    if (__builtin_expect(nan != 0, 0)) {
      const F value = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
      for (int i = 0; i < 4; ++i) out[i] = _mm512_mask_mov_ps(out[i], static_cast<__mmask16>(nan >> (16 * i)), value);
    }
  }

  static void store(F a, Type type, void* out) {
    if (type == Type::F32) {
      _mm512_storeu_ps(out, a);
    } else if (type == Type::F16) {
      __m256i half = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm256_storeu_si256(static_cast<__m256i*>(out), half);
    } else {  // not vcvtneps2bf16, which takes subnormals for zero
      __m512i bits = _mm512_castps_si512(a);
      __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
      __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
      rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
      _mm256_storeu_si256(static_cast<__m256i*>(out), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
  }

  static F widen(const void* p, Type type) {
    if (type == Type::F32) return _mm512_loadu_ps(p);
    __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if (type == Type::F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
};

}  // namespace

const FloatKernels* avx512_kernels() {
  static constexpr FloatKernels kernels = FloatImpl<Avx512>::table("avx512");
  bool here = avx2_kernels() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return here ? &kernels : nullptr;
}

}  // namespace ctfp8

#include "isa_end.h"
#else
const ctfp8::FloatKernels* ctfp8::avx512_kernels() { return nullptr; }
#endif
