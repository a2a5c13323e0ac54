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

// One or two rows of activations are bound by decoding, for which AVX2 has the better instructions.
constexpr int kNarrow = 2;

int64_t bytes_of(const Weight& w, int64_t m) { return m <= kNarrow ? avx2()->bytes(w, m) : bytes<Avx512>(w, m); }

void prepare_rows(const Weight& w, const void* const* rows, int64_t begin, int64_t count, int64_t m, void* prepared) {
  (m <= kNarrow ? avx2()->prepare : prepare<Avx512>)(w, rows, begin, count, m, prepared);
}

void multiply(const Weight& w, int64_t begin, int64_t end, const void* prepared, int64_t m, float* y, int64_t ldy) {
  (m <= kNarrow ? avx2()->matmul : matmul<Avx512>)(w, begin, end, prepared, m, y, ldy);
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
