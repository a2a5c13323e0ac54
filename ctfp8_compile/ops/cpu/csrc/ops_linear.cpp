// The operator `ctfp8::linear` on CPU tensors: a bfloat16 weight streamed through a GEMV, where that is what takes the time.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include "buffer.h"
#include "dispatch.h"

namespace ctfp8 {
namespace {

using at::Tensor;

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Kernels& kernels = *selection().bf16;
  const auto is_bf16 = [](const Tensor& t) { return t.scalar_type() == at::kBFloat16; };
  const int64_t n = weight.size(0), k = weight.size(1), m = k ? x.numel() / k : 0;
  // Anything else, and what is wrong, is torch's.
  if (!kernels.dense || !is_bf16(x) || !is_bf16(weight) || x.dim() == 0 || x.size(-1) != k || weight.stride(1) != 1 || m == 0 ||
      m > kDenseRows || m * k > kDenseActivations || (bias && (!is_bf16(*bias) || bias->dim() != 1 || bias->size(0) != n)))
    return at::linear(x, weight, bias);
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  Tensor out = at::empty(sizes, x.options().memory_format(at::MemoryFormat::Contiguous));
  const Tensor rows = x.contiguous(), added = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const uint16_t* at[kDenseRows];
  for (int64_t i = 0; i < m; ++i) at[i] = static_cast<const uint16_t*>(rows.const_data_ptr()) + i * k;
  const Dense w{static_cast<const uint16_t*>(weight.const_data_ptr()), weight.stride(0), k};
  auto* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  constexpr int64_t kPart = 64;
  share((n + kPart - 1) / kPart, kPart * k * m, [&](int64_t item) {
    const int64_t begin = item * kPart, end = std::min(n, begin + kPart);
    float sums[kDenseRows * kPart];
    kernels.dense(w, begin, end, at, m, sums, kPart);
    for (int64_t i = 0; i < m; ++i)
      kernels.finish(sums + i * kPart, bias ? added.const_data_ptr<float>() + begin : nullptr, end - begin, to + i * n + begin,
                     Dtype::bf16);
  });
  return out;
}

bool has_streaming_gemv() { return selection().bf16->dense != nullptr; }

}  // namespace
}  // namespace ctfp8

TORCH_LIBRARY_IMPL(ctfp8, CPU, m) { m.impl("linear", &ctfp8::linear); }

TORCH_LIBRARY_FRAGMENT(ctfp8_cpu, m) { m.def("has_streaming_gemv() -> bool", &ctfp8::has_streaming_gemv); }
