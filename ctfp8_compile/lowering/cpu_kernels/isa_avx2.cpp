// The float32 kernels for AVX2 with FMA and F16C.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#define CTFP8_TARGET "avx2,fma,f16c"
#include "isa_begin.h"
//
#include "float_kernels.h"

namespace ctfp8 {
namespace {

struct Avx2 {
  using F = __m256;
  static constexpr int W = 8, R = 4;
  static constexpr int64_t kDotRows = 8;
  static constexpr float kUnit = 256;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static float reduce(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }

  // A code moved into the exponent and mantissa of a float16 is its value / 2^8, subnormals included; only NaN is not
  // (it would be 480), so that rare case is looked for on the whole chunk.
  static void decode(const uint8_t* p, F* out) {
    const __m256i keep = _mm256_set1_epi16(static_cast<short>(0xbf80));
    for (int i = 0; i < 4; ++i) {
      __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
      __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), keep);
      out[2 * i] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
      out[2 * i + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
    }
    const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80)), ones = _mm256_set1_epi8(-1);
    __m256i a = _mm256_or_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), sign);
    __m256i b = _mm256_or_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32)), sign);
    __m256i nan = _mm256_or_si256(_mm256_cmpeq_epi8(a, ones), _mm256_cmpeq_epi8(b, ones));
    if (__builtin_expect(!_mm256_testz_si256(nan, nan), 0)) {
      const __m256i magnitude = _mm256_set1_epi32(0x7f);
      for (int i = 0; i < 8; ++i) {
        __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i)));
        __m256i is_nan = _mm256_cmpeq_epi32(_mm256_and_si256(codes, magnitude), magnitude);
        out[i] = _mm256_or_ps(out[i], _mm256_castsi256_ps(is_nan));
      }
    }
  }

  static void store(F a, Type type, void* out) {
    if (type == Type::F32) {
      _mm256_storeu_ps(static_cast<float*>(out), a);
    } else if (type == Type::F16) {
      _mm_storeu_si128(static_cast<__m128i*>(out), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
      __m256i bits = _mm256_castps_si256(a);
      __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
      __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
      rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
      __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
      _mm_storeu_si128(static_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
    }
  }

  static F widen(const void* p, Type type) {
    if (type == Type::F32) return _mm256_loadu_ps(static_cast<const float*>(p));
    __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
    if (type == Type::F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
};

}  // namespace

const FloatKernels* avx2_kernels() {
  static constexpr FloatKernels kernels = FloatImpl<Avx2>::table("avx2");
  bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return here ? &kernels : nullptr;
}

}  // namespace ctfp8

#include "isa_end.h"
#else
const ctfp8::FloatKernels* ctfp8::avx2_kernels() { return nullptr; }
#endif
