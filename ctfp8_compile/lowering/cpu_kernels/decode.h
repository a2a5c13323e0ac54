// e4m3fn, by definition: sign, 4 exponent bits (bias 7), 3 mantissa bits, no infinities, NaN where all seven are set.
#pragma once

#include <cstdint>

namespace ctfp8 {

// The upper half of the float32 with the value of a code without its sign; its lower half is zero, so this is also
// the bfloat16 of that value, exactly.
constexpr uint16_t bf16_of_magnitude(unsigned code) {
  unsigned exponent = code >> 3, mantissa = code & 7;
  if (code == 0x7f) return 0x7fc0;
  if (exponent == 0) {  // mantissa * 2^-9: normalize
    if (mantissa == 0) return 0;
    unsigned top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;
    return static_cast<uint16_t>(((top + 127 - 9) << 7) | ((mantissa << (7 - top)) & 0x7f));
  }
  return static_cast<uint16_t>(((exponent + 127 - 7) << 7) | (mantissa << 4));
}

// Bytes of bf16_of_magnitude for the 128 magnitudes, as vector table look-ups want them.
struct Bf16Bytes {
  alignas(64) uint8_t high[128] = {};
  alignas(64) uint8_t low[128] = {};
  constexpr Bf16Bytes() {
    for (unsigned code = 0; code < 128; ++code) {
      high[code] = static_cast<uint8_t>(bf16_of_magnitude(code) >> 8);
      low[code] = static_cast<uint8_t>(bf16_of_magnitude(code) & 0xff);
    }
  }
};

// The bits of the float32 of each code.
struct FloatBits {
  uint32_t bits[256] = {};
  constexpr FloatBits() {
    for (unsigned code = 0; code < 256; ++code)
      bits[code] = (uint32_t{bf16_of_magnitude(code & 0x7f)} << 16) | (uint32_t{code & 0x80} << 24);
  }
};

inline constexpr Bf16Bytes kBf16Bytes;
inline constexpr FloatBits kFloatBits;

}  // namespace ctfp8
