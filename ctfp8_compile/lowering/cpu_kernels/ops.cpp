// The `ctfp8::` operators on CPU tensors: what they expect, in sentences, and how tensors become a Matmul.
//
// Layouts: the last dimension of a weight must be contiguous; expert and row strides are free (a weight that is laid out
// otherwise is copied on every call). Activations are packed anyway, so their row stride is free too.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>

#include "matmul.h"

namespace ctfp8 {
namespace {

using at::IntArrayRef;
using at::Tensor;

Type type_of(const char* op, const char* what, at::ScalarType type) {
  if (type == at::kFloat) return Type::F32;
  if (type == at::kBFloat16) return Type::BF16;
  TORCH_CHECK(type == at::kHalf, op, " expects ", what, " to be float32, bfloat16 or float16, got ", type, ".");
  return Type::F16;
}

void check_weight(const char* op, const Tensor& weight, const Tensor& scale, IntArrayRef block) {
  TORCH_CHECK(weight.is_cpu() && scale.is_cpu(), op, " expects weight and weight_scale on the CPU.");
  TORCH_CHECK(weight.scalar_type() == at::kFloat8_e4m3fn, op, " expects a float8_e4m3fn weight, got ",
              weight.scalar_type(), ".");
  TORCH_CHECK(scale.scalar_type() == at::kFloat, op, " expects a float32 weight_scale, got ", scale.scalar_type(), ".");
  TORCH_CHECK(block.size() == 2 && block[0] > 0 && block[1] > 0, op,
              " expects block to be two positive numbers, rows and columns that share a scale, got ", block, ".");
  std::vector<int64_t> expected = weight.sizes().vec();
  for (size_t i = 0; i < 2; ++i) {
    int64_t& size = expected[expected.size() - 2 + i];
    size = ceil_div(size, block[i]);
  }
  TORCH_CHECK(scale.sizes() == IntArrayRef(expected), op, " expects weight_scale of shape ", IntArrayRef(expected),
              ", one scale for each block of ", block, " of the weight ", weight.sizes(), ", got ", scale.sizes(), ".");
}

Tensor rows_contiguous(const Tensor& t) {
  return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous();
}

// The operands that all three matmuls share; x is [M, K], weight [N, K] or [E, N, K], both with contiguous rows.
Matmul problem(const Tensor& x, const Tensor& weight, const Tensor& scale, IntArrayRef block, Type type, Tensor& out) {
  const int64_t dims = weight.dim(), N = weight.size(-2);
  Columns columns(weight.size(-1), block[1]);
  return {static_cast<const uint8_t*>(weight.const_data_ptr()),
          dims == 3 ? weight.stride(0) : 0,
          weight.stride(-2),
          scale.const_data_ptr<float>(),
          ceil_div(N, block[0]) * columns.spans,
          block[0],
          N,
          columns,
          type,
          x.const_data_ptr(),
          x.stride(0),
          nullptr,
          {},
          {},
          out.mutable_data_ptr()};
}

Tensor dequantized_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                          const std::optional<Tensor>& bias, IntArrayRef block) {
  static constexpr const char* op = "ctfp8::dequantized_linear";
  TORCH_CHECK(weight.dim() == 2, op, " expects a weight of shape [N, K], got ", weight.sizes(), ".");
  check_weight(op, weight, weight_scale, block);
  const Type type = type_of(op, "x", x.scalar_type());
  const int64_t N = weight.size(0), K = weight.size(1);
  TORCH_CHECK(x.is_cpu() && x.dim() >= 1 && x.size(-1) == K, op, " expects x of shape [..., ", K, "] on the CPU, got ",
              x.sizes(), ".");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = N;
  const int64_t M = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  Tensor added;
  if (bias) {
    TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == N, op, " expects a bias of shape [", N,
                "] on the CPU, got ", bias->sizes(), ".");
    TORCH_CHECK(at::isFloatingType(bias->scalar_type()), op, " expects a floating-point bias, got ",
                bias->scalar_type(), ".");
    added = bias->to(at::kFloat).contiguous();
  }
  if (K == 0) {
    Tensor out = at::zeros(shape, x.options());
    return bias ? out.add_(added) : out;
  }
  Tensor out = at::empty(shape, x.options());
  const Tensor rows = rows_contiguous(x.reshape({M, K})), w = rows_contiguous(weight), s = weight_scale.contiguous();
  Matmul m = problem(rows, w, s, block, type, out);
  if (bias) m.bias = added.const_data_ptr<float>();
  m.order.resize(static_cast<size_t>(M));
  std::iota(m.order.begin(), m.order.end(), 0);
  if (M > 0) m.groups.push_back({0, 0, M});
  run(m);
  return out;
}

void check_experts(const char* op, const Tensor& x, const Tensor& weight, const Tensor& scale, IntArrayRef block) {
  TORCH_CHECK(weight.dim() == 3, op, " expects a weight of shape [experts, N, K], got ", weight.sizes(), ".");
  check_weight(op, weight, scale, block);
  TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) == weight.size(2), op, " expects x of shape [rows, ",
              weight.size(2), "] on the CPU, got ", x.sizes(), ".");
}

Tensor dequantized_grouped_mm(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& offs,
                              IntArrayRef block) {
  static constexpr const char* op = "ctfp8::dequantized_grouped_mm";
  check_experts(op, x, weight, weight_scale, block);
  const Type type = type_of(op, "x", x.scalar_type());
  const int64_t E = weight.size(0), M = x.size(0);
  TORCH_CHECK(offs.is_cpu() && offs.scalar_type() == at::kInt && offs.dim() == 1 && offs.size(0) == E, op,
              " expects offs, the end row of each expert, as int32 of shape [", E, "], got ", offs.scalar_type(), " ",
              offs.sizes(), ".");
  Tensor out = at::empty({M, weight.size(1)}, x.options());
  const Tensor rows = rows_contiguous(x), w = rows_contiguous(weight), s = weight_scale.contiguous(),
               ends = offs.contiguous();
  Matmul m = problem(rows, w, s, block, type, out);
  m.order.resize(static_cast<size_t>(M));
  std::iota(m.order.begin(), m.order.end(), 0);
  int64_t begin = 0;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t end = ends.const_data_ptr<int32_t>()[e];
    TORCH_CHECK(end >= begin && end <= M, op, " expects offs to rise from 0 to at most the ", M, " rows of x, got ",
                end, " after ", begin, " for expert ", e, ".");
    if (end > begin) m.groups.push_back({e, begin, end});
    begin = end;
  }
  if (weight.size(2) == 0) return out.zero_();
  run(m);
  if (begin < M) out.slice(0, begin).zero_();
  return out;
}

Tensor dequantized_gathered_mm(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& ids,
                               IntArrayRef block) {
  static constexpr const char* op = "ctfp8::dequantized_gathered_mm";
  check_experts(op, x, weight, weight_scale, block);
  const Type type = type_of(op, "x", x.scalar_type());
  const int64_t E = weight.size(0), T = x.size(0);
  TORCH_CHECK(ids.is_cpu() && ids.scalar_type() == at::kLong && ids.dim() == 1 && ids.size(0) == T, op,
              " expects ids, the expert of each row, as int64 of shape [", T, "], got ", ids.scalar_type(), " ",
              ids.sizes(), ".");
  Tensor out = at::empty({T, weight.size(1)}, x.options());
  const Tensor rows = rows_contiguous(x), w = rows_contiguous(weight), s = weight_scale.contiguous(),
               experts = ids.contiguous();
  Matmul m = problem(rows, w, s, block, type, out);
  const int64_t* expert = experts.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < T; ++i)
    TORCH_CHECK(expert[i] >= 0 && expert[i] < E, op, " expects ids from 0 to ", E - 1, ", got ", expert[i], " for row ",
                i, ".");
  // Rows of one expert become neighbours, so that its weight is read once.
  m.order.resize(static_cast<size_t>(T));
  std::iota(m.order.begin(), m.order.end(), 0);
  std::stable_sort(m.order.begin(), m.order.end(), [&](int64_t a, int64_t b) { return expert[a] < expert[b]; });
  for (int64_t i = 0; i < T; ++i) {
    const int64_t e = expert[m.order[static_cast<size_t>(i)]];
    if (m.groups.empty() || m.groups.back().expert != e) m.groups.push_back({e, i, i});
    m.groups.back().end = i + 1;
  }
  if (weight.size(2) == 0) return out.zero_();
  run(m);
  return out;
}

Tensor dequantize_cpu(const Tensor& weight, const Tensor& weight_scale, IntArrayRef block, at::ScalarType dtype) {
  static constexpr const char* op = "ctfp8::dequantize_cpu";
  TORCH_CHECK(weight.dim() >= 2, op, " expects a weight of shape [..., N, K], got ", weight.sizes(), ".");
  check_weight(op, weight, weight_scale, block);
  const Type type = type_of(op, "dtype", dtype);
  Tensor out = at::empty(weight.sizes(), weight.options().dtype(dtype));
  const int64_t N = weight.size(-2), K = weight.size(-1);
  if (out.numel() == 0) return out;
  const Tensor w = weight.contiguous(), s = weight_scale.contiguous();
  const Columns columns(K, block[1]);
  const int64_t scale_rows = ceil_div(N, block[0]), size = size_of(type);
  const auto* codes = static_cast<const uint8_t*>(w.const_data_ptr());
  const float* scales = s.const_data_ptr<float>();
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const FloatKernels& kernels = *isa().floats;
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 16) / K);
  at::parallel_for(0, weight.numel() / K, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* row_scales = scales + (row / N * scale_rows + row % N / block[0]) * columns.spans;
      for (int64_t span = 0; span < columns.spans; ++span) {
        const int64_t at = row * K + span * columns.block;
        kernels.dequantize(codes + at, columns.length(span), row_scales[span], type, to + at * size);
      }
    }
  });
  return out;
}

void cpu_isa_set(std::string name) {
  std::string names;
  for (const std::string& one : isas()) names += (names.empty() ? "" : ", ") + one;
  TORCH_CHECK(choose_isa(name), "ctfp8: this CPU has no instruction set called '", name, "'; choose one of: ", names,
              ".");
}

// The Python package declares the schemas of the matmuls (ctfp8_compile/ops.py); a C++ process that runs an exported
// model has no Python, and loads this library alone.
void define(torch::Library& m, const char* name, const char* schema) {
  if (!c10::Dispatcher::singleton().findSchema({std::string("ctfp8::") + name, ""})) m.def(schema);
}

TORCH_LIBRARY_FRAGMENT(ctfp8, m) {
  define(m, "dequantized_linear",
         "dequantized_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int[] block) -> Tensor");
  define(m, "dequantized_grouped_mm",
         "dequantized_grouped_mm(Tensor x, Tensor weight, Tensor weight_scale, Tensor offs, int[] block) -> Tensor");
  define(m, "dequantized_gathered_mm",
         "dequantized_gathered_mm(Tensor x, Tensor weight, Tensor weight_scale, Tensor ids, int[] block) -> Tensor");
  define(m, "dequantize_cpu",
         "dequantize_cpu(Tensor weight, Tensor weight_scale, int[] block, ScalarType dtype) -> Tensor");
  m.def("cpu_isa() -> str", [] { return isa().name; });
  m.def("cpu_isas() -> str[]", &isas);
  m.def("cpu_isa_set(str name) -> ()", &cpu_isa_set);
}

TORCH_LIBRARY_IMPL(ctfp8, CPU, m) {
  m.impl("dequantized_linear", &dequantized_linear);
  m.impl("dequantized_grouped_mm", &dequantized_grouped_mm);
  m.impl("dequantized_gathered_mm", &dequantized_gathered_mm);
  m.impl("dequantize_cpu", &dequantize_cpu);
}

}  // namespace
}  // namespace ctfp8
