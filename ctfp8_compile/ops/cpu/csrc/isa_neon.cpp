// ARM64 (NEON, which every one has): FP8 values become float16 by a shift, then float32; float32 multiply-add.
#include "vector.h"
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstdlib>
#include <cstring>

#include "table.h"

namespace ctfp8 {
namespace {

struct Neon {
  using X = float;
  struct Acc {
    float32x4_t first, second;
  };
  using Chunk = Acc;
  // A chunk is two of the 32 vectors; registers are counted in chunks.
  static constexpr int step = 8, registers = 16, constants = 2, parts = 1, ahead = 1024, in_turn = 0;
  static constexpr float gain = 256;

  static void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
  static void prefetch_once(const uint8_t* p) { prefetch(p); }
  static Acc zero() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
  static Chunk zeros() { return zero(); }

  // See Avx2::convert. Conversions from float16 read subnormals whatever the flush-to-zero flags say.
  static Chunk convert(uint8x8_t fp8) {
    const uint16x8_t shifted = vreinterpretq_u16_s16(vshll_n_s8(vreinterpret_s8_u8(fp8), 7));
    const uint16x8_t half = vandq_u16(shifted, vdupq_n_u16(0xbf80)), top = vdupq_n_u16(0x3f80);
    const uint16x8_t nan = vandq_u16(vceqq_u16(vandq_u16(half, top), top), vdupq_n_u16(0x7c00));
    const float16x8_t values = vreinterpretq_f16_u16(vorrq_u16(half, nan));
    return {vcvt_f32_f16(vget_low_f16(values)), vcvt_high_f32_f16(values)};
  }
  Chunk decode(const uint8_t* p) const { return convert(vld1_u8(p)); }
  Chunk decode_tail(const uint8_t* p, int n) const {
    uint64_t fp8 = 0;
    std::memcpy(&fp8, p, n);
    return convert(vcreate_u8(fp8));
  }
  static void hold(Chunk& chunk) { __asm__("" : "+w"(chunk.first), "+w"(chunk.second)); }
  static Chunk load(const X* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static Chunk widen(const uint16_t* p) {
    const uint16x8_t halves = vld1q_u16(p);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16))};
  }
  static void store(X* p, Chunk chunk) { vst1q_f32(p, chunk.first), vst1q_f32(p + 4, chunk.second); }
  static Acc dot(Acc sum, const Chunk& w, const Chunk& x) {
    return {vfmaq_f32(sum.first, w.first, x.first), vfmaq_f32(sum.second, w.second, x.second)};
  }
  static Acc scale_add(Acc total, const Acc& sum, float scale) {
    return {vfmaq_n_f32(total.first, sum.first, scale), vfmaq_n_f32(total.second, sum.second, scale)};
  }
  static Chunk shift(const Chunk& chunk, const uint8_t* e, bool) { return times(chunk, float_of_exponent(*e)); }
  static Chunk times(Chunk chunk, float scale) { return {vmulq_n_f32(chunk.first, scale), vmulq_n_f32(chunk.second, scale)}; }
  static float reduce(const Acc& sum) { return vaddvq_f32(vaddq_f32(sum.first, sum.second)); }
  static void arrange(const X* from, X* to) { std::memcpy(to, from, step * sizeof(X)); }
  static void round_f16(const float* row, const float* bias, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = f16_of_float(bias ? row[i] + bias[i] : row[i]);
  }
};

}  // namespace

const Kernels* neon() {
  using V = Neon;
  static const Kernels kernels = {"neon", 4, kTileCols, bytes<V>, prepare<V>, matmul<V>, finish<V>, dequantize<V>, attention<V>};
  return &kernels;
}

}  // namespace ctfp8
#else
const ctfp8::Kernels* ctfp8::neon() { return nullptr; }
#endif
