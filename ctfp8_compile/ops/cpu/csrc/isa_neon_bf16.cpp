// ARM64 with FEAT_BF16 (Neoverse V1 and N2, Apple M2 and later): FP8 values become bfloat16 by byte arithmetic; bfloat16 dot
// products.
#include "vector.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <cstdlib>
#include <cstring>

#if defined(__clang__)
#define CTFP8_TARGET "bf16"
#else
#define CTFP8_TARGET "arch=armv8.2-a+bf16"
#endif
#include "target_begin.h"
//
#include "table.h"

namespace ctfp8 {
namespace {

// The bytes of an FP8 value's bfloat16, from their places: those of the sixteen smallest FP8 values, and the upper ones of the
// largest.
struct Ends {
  uint8_t low[16], high[16], top[16];
  Ends() {
    for (int i = 0; i < 16; ++i) low[i] = tables.low[i], high[i] = tables.high[i], top[i] = tables.high[112 + i];
  }
};
static const Ends ends;

struct NeonBf16 {
  using X = uint16_t;
  using Acc = float32x4_t;
  struct Chunk {
    uint16x8_t first, second;
  };
  static constexpr int step = 16, registers = 32, constants = 5, parts = 2, ahead = 1024, in_turn = 0;
  static constexpr float gain = 1;

  uint8x16_t low, high, top;

  NeonBf16() { low = vld1q_u8(ends.low), high = vld1q_u8(ends.high), top = vld1q_u8(ends.top); }

  static void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
  static void prefetch_once(const uint8_t* p) { prefetch(p); }
  static Acc zero() { return vdupq_n_f32(0); }
  static Chunk zeros() { return {vdupq_n_u16(0), vdupq_n_u16(0)}; }

  // s eeee mmm is the bfloat16 s 0eeee mmm0000 with 120 added to its exponent: bytes s 0111eee + 60 and e mmm0000. Subnormal
  // FP8 values and NaN are not; a look-up that leaves lanes with an index over 15 as they are puts those right.
  Chunk expand(uint8x16_t fp8) const {
    const uint8x16_t sign = vdupq_n_u8(0x80), size = vbicq_u8(fp8, sign);
    uint8x16_t upper = vaddq_u8(vshrq_n_u8(size, 4), vdupq_n_u8(60));
    upper = vqtbx1q_u8(upper, high, size);
    upper = vqtbx1q_u8(upper, top, veorq_u8(size, vdupq_n_u8(112)));
    upper = vbslq_u8(sign, fp8, upper);
    const uint8x16_t lower = vqtbx1q_u8(vshlq_n_u8(fp8, 4), low, size);
    return {vreinterpretq_u16_u8(vzip1q_u8(lower, upper)), vreinterpretq_u16_u8(vzip2q_u8(lower, upper))};
  }
  Chunk decode(const uint8_t* p) const { return expand(vld1q_u8(p)); }
  Chunk decode_tail(const uint8_t* p, int n) const {
    alignas(16) uint8_t fp8[16] = {};
    std::memcpy(fp8, p, n);
    return expand(vld1q_u8(fp8));
  }

  // Adds to the exponents of bfloat16s that are not zero; see Exponents in isa_avx512_bf16.cpp.
  static uint16x8_t add_exponents(uint16x8_t values, uint16x8_t exponents) {
    return vaddq_u16(values, vandq_u16(vtstq_u16(values, vdupq_n_u16(0x7fff)), exponents));
  }
  static Chunk shift(const Chunk& chunk, const uint8_t* e, bool) {
    const uint16x8_t exponents = vdupq_n_u16(static_cast<uint16_t>(((*e < 10 ? 10 : *e) - 127) * 128));
    return {add_exponents(chunk.first, exponents), add_exponents(chunk.second, exponents)};
  }

  static void hold(Chunk& chunk) { __asm__("" : "+w"(chunk.first), "+w"(chunk.second)); }
  static Chunk load(const X* p) { return {vld1q_u16(p), vld1q_u16(p + 8)}; }
  static void store(X* p, Chunk chunk) { vst1q_u16(p, chunk.first), vst1q_u16(p + 8, chunk.second); }
  static Acc dot(Acc sum, const Chunk& w, const Chunk& x) { return dot(dot(sum, w.first, x.first), w.second, x.second); }
  static Acc dot(Acc sum, uint16x8_t w, uint16x8_t x) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_u16(w), vreinterpretq_bf16_u16(x));
  }
  static void store_half(X* p, Chunk chunk) {
    vst1_u16(p, vget_low_u16(chunk.first)), vst1_u16(p + 8, vget_high_u16(chunk.first));
    vst1_u16(p + 16, vget_low_u16(chunk.second)), vst1_u16(p + 24, vget_high_u16(chunk.second));
  }
  static uint16x8_t load_pair(const X* p) { return vld1q_u16(p); }
  static Acc multiply(Acc sum, uint16x8_t x, uint16x8_t w) {
    return vbfmmlaq_f32(sum, vreinterpretq_bf16_u16(x), vreinterpretq_bf16_u16(w));
  }
  static void store_sums(float* p, Acc sum) { vst1q_f32(p, sum); }
  static Acc scale_add(Acc total, Acc sum, float scale) { return vfmaq_n_f32(total, sum, scale); }
  static float reduce(Acc sum) { return vaddvq_f32(sum); }
  static void arrange(const X* from, X* to) { std::memcpy(to, from, step * sizeof(X)); }
  static void round_f16(const float*, const float*, int64_t, uint16_t*) {}  // activations, hence outputs, are bfloat16
};

bool has_bf16() {
#if defined(__linux__)
  constexpr unsigned long bf16 = 1ul << 14;  // HWCAP2_BF16, which not all headers have
  return getauxval(AT_HWCAP2) & bf16;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}

}  // namespace

const Kernels* neon_bf16() {
  using V = NeonBf16;
  static const Kernels kernels = {"neon-bf16", 2, kTileCols, bytes<V>, prepare<V>, matmul<V>, finish<V>, nullptr, nullptr};
  static const bool here = has_bf16();
  return here ? &kernels : nullptr;
}

}  // namespace ctfp8
#include "target_end.h"
#else
const ctfp8::Kernels* ctfp8::neon_bf16() { return nullptr; }
#endif
