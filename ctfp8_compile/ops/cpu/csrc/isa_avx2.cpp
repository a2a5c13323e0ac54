// AVX2 + FMA + F16C: FP8 values become float16 by a shift, then float32; float32 multiply-add.
#include "vector.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdlib>
#include <cstring>

#define CTFP8_TARGET "avx2,fma,f16c"
#include "target_begin.h"
//
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

// For one row of activations, which is bound by decoding: 32 FP8 values at a time, that share a look for NaNs and, of MXFP8, a
// byte.
struct Avx2Row : Avx2 {
  struct Chunk {
    __m256 part[4];
  };
  static constexpr int step = 32, parts = 4;

  // As Avx2::convert, 16 FP8 values to 2 parts; NaNs come out as numbers.
  static void convert(__m128i fp8, __m256* parts_of) {
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(fp8), 7), _mm256_set1_epi16(-0x4080));
    parts_of[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    parts_of[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
  }
  static Chunk decode(const uint8_t* p) {
    Chunk chunk;
    convert(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), chunk.part);
    convert(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)), chunk.part + 2);
    const __m256i fp8 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), most = _mm256_set1_epi8(0x7f);
    const __m256i nan = _mm256_cmpeq_epi8(_mm256_and_si256(fp8, most), most);
    if (__builtin_expect(!_mm256_testz_si256(nan, nan), 0)) chunk = one_by_one(p);
    return chunk;
  }
  __attribute__((noinline)) static Chunk one_by_one(const uint8_t* p) {
    Chunk chunk;
    for (int i = 0; i < 4; ++i) chunk.part[i] = Avx2().decode(p + 8 * i);
    return chunk;
  }
  static Chunk decode_tail(const uint8_t* p, int n) {
    alignas(32) uint8_t fp8[step] = {};
    std::memcpy(fp8, p, n);
    return decode(fp8);
  }
  static void arrange(const X* from, X* to) { std::memcpy(to, from, step * sizeof(X)); }
  static Chunk load(const X* p) {
    return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8), _mm256_loadu_ps(p + 16), _mm256_loadu_ps(p + 24)}};
  }
  static void hold(Chunk&) {}
  static Acc dot(Acc sum, const Chunk& w, const Chunk& x) {
    for (int i = 0; i < 4; ++i) sum = _mm256_fmadd_ps(w.part[i], x.part[i], sum);
    return sum;
  }
  static Acc shift_dot(Acc total, const Chunk& w, const Chunk& x, const uint8_t* e) {
    return scale_add(total, dot(_mm256_setzero_ps(), w, x), powers.of[*e]);
  }
  static Chunk shift(Chunk chunk, const uint8_t* e, bool both) {
    for (__m256& part : chunk.part) part = Avx2::shift(part, e, both);
    return chunk;
  }
};

int64_t bytes_of(const Weight& w, int64_t m) { return m == 1 ? bytes<Avx2Row>(w, m) : bytes<Avx2>(w, m); }

void prepare_rows(const Weight& w, const void* const* rows, int64_t begin, int64_t count, int64_t m, void* prepared) {
  (m == 1 ? prepare<Avx2Row> : prepare<Avx2>)(w, rows, begin, count, m, prepared);
}

void multiply(const Weight& w, int64_t begin, int64_t end, const void* prepared, int64_t m, float* y, int64_t ldy) {
  if (m == 1)
    gemv<Avx2Row, 1>(w, begin, end, static_cast<const float*>(prepared), m, y, ldy);
  else
    matmul<Avx2>(w, begin, end, prepared, m, y, ldy);
}

}  // namespace

const Kernels* avx2() {
  using V = Avx2;
  static const Kernels kernels = {"avx2", 4, kTileCols, bytes_of, prepare_rows, multiply, finish<V>, dequantize<V>, attention<V>};
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return here ? &kernels : nullptr;
}

}  // namespace ctfp8
#include "target_end.h"
#else
const ctfp8::Kernels* ctfp8::avx2() { return nullptr; }
#endif
