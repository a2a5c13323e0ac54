// Tokens of a key-value cache as numbers, and its scales: what the operators of attention share.
#pragma once
#include <cmath>

#include "buffer.h"
#include "dispatch.h"

namespace ctfp8 {
namespace {

// The scales of keys, or of values, that are FP8: one, one for each head, or none, where each token has its own.
struct Scales {
  const float* first = nullptr;
  int64_t step = 0;

  const float* of(int64_t head) const { return first ? first + head * step : nullptr; }
};

Scales scales_of(const std::optional<at::Tensor>& scale, int64_t heads, bool fp8, const char* op, const char* name) {
  if (!scale) return {};
  TORCH_CHECK(
      fp8 && scale->scalar_type() == at::kFloat && scale->is_contiguous() && (scale->numel() == 1 || scale->numel() == heads), op,
      ": ", name, " may have one float32 scale, or one a head, if they are FP8 values");
  return {scale->const_data_ptr<float>(), scale->numel() == 1 ? 0 : 1};
}

// Token i, of FP8 values, as `width` numbers of a dtype.
void dequantize_token(const Tokens& tokens, int64_t i, char* to, Dtype dtype) {
  static thread_local Buffer buffer;
  float* line = static_cast<float*>(buffer.get(tokens.width * 4));
  const auto* fp8 = reinterpret_cast<const uint8_t*>(tokens.first + i * tokens.stride);
  const float power = tokens.scale ? *tokens.scale : std::ldexp(1.f, fp8[tokens.width] - 127);
  selection().others->dequantize({fp8, 0, &power, 0, 1, tokens.width, 1, tokens.width, 1}, 0, line);
  selection().others->finish(line, nullptr, tokens.width, to, dtype);
}

}  // namespace
}  // namespace ctfp8
