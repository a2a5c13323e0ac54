// The float32 kernels in plain C++: any CPU, and the yardstick the vector versions are tested against.
#include <cstring>

#include "decode.h"
#include "float_kernels.h"

namespace ctfp8 {
namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint16_t bf16_of(float x) {
  uint32_t bits = bits_of(x);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

uint16_t f16_of(float x) {
  uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and up round to infinity
  if (magnitude < 0x38800000)  // below 2^-14: let float32 addition round at 2^-24, the last bit of a subnormal
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

float of_f16(uint16_t half) {
  uint32_t sign = uint32_t{half & 0x8000u} << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude << 13));
  if (magnitude >= 0x0400) return float_of(sign | ((magnitude << 13) + 0x38000000));
  return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
}

struct Portable {
  struct F {
    float v[8];
  };
  static constexpr int W = 8, R = 4;
  static constexpr int64_t kDotRows = 8;
  static constexpr float kUnit = 1;

  static F zero() { return F{}; }
  static F set1(float x) { return {{x, x, x, x, x, x, x, x}}; }
  static F load(const float* p) {
    F f;
    std::memcpy(f.v, p, sizeof f.v);
    return f;
  }
  template <class Op>
  static F map(Op op) {
    F f;
    for (int i = 0; i < W; ++i) f.v[i] = op(i);
    return f;
  }
  static F fma(F a, F b, F c) {
    return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static F mul(F a, F b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F add(F a, F b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  static float reduce(F a) {
    float sum = 0;
    for (float x : a.v) sum += x;
    return sum;
  }
  static void decode(const uint8_t* p, F* out) {
    for (int i = 0; i < kChunk; ++i) out[i / W].v[i % W] = float_of(kFloatBits.bits[p[i]]);
  }
  static void store(F a, Type type, void* out) {
    if (type == Type::F32) {
      std::memcpy(out, a.v, sizeof a.v);
      return;
    }
    uint16_t half[W];
    for (int i = 0; i < W; ++i) half[i] = type == Type::BF16 ? bf16_of(a.v[i]) : f16_of(a.v[i]);
    std::memcpy(out, half, sizeof half);
  }
  static F widen(const void* p, Type type) {
    if (type == Type::F32) {
      F f;
      std::memcpy(f.v, p, sizeof f.v);
      return f;
    }
    uint16_t half[W];
    std::memcpy(half, p, sizeof half);
    return map([&](int i) { return type == Type::BF16 ? float_of(uint32_t{half[i]} << 16) : of_f16(half[i]); });
  }
};

}  // namespace

const FloatKernels* portable_kernels() {
  static constexpr FloatKernels kernels = FloatImpl<Portable>::table("portable");
  return &kernels;
}

}  // namespace ctfp8
