// e4m3 values and float rounding in plain C++: the truth that the vector paths are checked against.
//
// Tables are constants of the compiler's. One that is filled when the library is loaded would be so by code for the instruction
// set of the file that has it, and end the process on a CPU without (a test looks for such code).
#pragma once
#include <bit>
#include <cstdint>

namespace ctfp8 {
namespace {

constexpr float float_of_bits(uint32_t bits) { return std::bit_cast<float>(bits); }

constexpr uint32_t bits_of_float(float value) { return std::bit_cast<uint32_t>(value); }

// 2^(e - 127). Of a byte of MXFP8, 255 excepted, which is NaN and no scale.
constexpr float float_of_exponent(uint8_t e) { return float_of_bits(e ? uint32_t{e} << 23 : 1u << 22); }

// The same of all bytes, for vectors.
struct Powers {
  float of[256] = {};
  constexpr Powers() {
    for (int e = 0; e < 256; ++e) of[e] = float_of_exponent(static_cast<uint8_t>(e));
  }
};
constexpr Powers powers;

// The float32 bits of an FP8 value: sign, 4 exponent bits of bias 7, 3 mantissa bits; 0x7f and 0xff are the only NaNs.
// Every FP8 value is also exact in bfloat16, which is the upper half of these bits.
constexpr uint32_t float_bits_of_fp8(uint32_t value) {
  const uint32_t sign = (value & 0x80) << 24, exponent = value >> 3 & 15, mantissa = value & 7;
  if ((value & 0x7f) == 0x7f) return sign | 0x7ff00000;
  if (exponent) return sign | (exponent + 120) << 23 | mantissa << 20;
  if (!mantissa) return sign;
  const uint32_t top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;  // subnormal: mantissa * 2^-9
  return sign | (127 - 9 + top) << 23 | (mantissa << (3 - top) & 7) << 20;
}

// For vector table look-ups: the two bytes of the bfloat16 of each of the 128 non-negative FP8 values.
struct Tables {
  alignas(64) uint8_t high[128] = {};
  alignas(64) uint8_t low[128] = {};
  float value[256] = {};
  constexpr Tables() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t bits = float_bits_of_fp8(byte);
      value[byte] = float_of_bits(bits);
      if (byte < 128) high[byte] = bits >> 24, low[byte] = bits >> 16 & 255;
    }
  }
};
constexpr Tables tables;

// Integer rounding, unlike vcvtneps2bf16, keeps subnormal results; the compiler vectorises it.
inline uint16_t bf16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

inline uint16_t f16_of_float(float value) {
  uint32_t bits = bits_of_float(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (bits < 0x38800000) {                       // subnormal: let a float addition do the rounding
    return sign | (bits_of_float(float_of_bits(bits) + 0.5f) - 0x3f000000);
  }
  return sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
}

}  // namespace
}  // namespace ctfp8
