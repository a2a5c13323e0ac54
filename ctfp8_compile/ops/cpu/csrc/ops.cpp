// The `ctfp8::` operators on CPU tensors: checks, and how the work is cut and shared by threads.
//
// All matmuls are one routine, `multiply`: groups of activation rows, each with the weight of one expert. Schemas and
// reference implementations are in ctfp8_compile/ops/operators.py.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <string>
#include <vector>

#include "buffer.h"
#include "dispatch.h"

namespace ctfp8 {

using at::Tensor;

// ------------------------------------------------------------------------------------------------------------- checks

Dtype dtype_of(const Tensor& x, const char* op) {
  if (x.scalar_type() == at::kBFloat16) return Dtype::bf16;
  if (x.scalar_type() == at::kHalf) return Dtype::f16;
  TORCH_CHECK(x.scalar_type() == at::kFloat, op, ": x must be bfloat16, float16 or float32, not ", x.scalar_type());
  return Dtype::f32;
}

namespace {

// A weight with `[experts, N, K]` FP8 values, and the tensors that keep its memory alive.
struct Weights {
  Tensor fp8, scale;
  Weight first;
  int64_t experts;

  Weight of(int64_t expert) const {
    Weight w = first;
    w.fp8 += expert * (fp8.dim() == 3 ? fp8.stride(0) : 0);
    const int64_t scales = expert * (scale.dim() == 3 ? scale.stride(0) : 0);
    if (w.exponents) {
      w.exponents += scales;
    } else {
      w.scale += scales;
    }
    return w;
  }
};

Weights weights(const Tensor& weight, const Tensor& weight_scale, at::IntArrayRef block, int64_t dim, const char* op) {
  TORCH_CHECK(weight.scalar_type() == at::kFloat8_e4m3fn, op, ": weight must be float8_e4m3fn, not ", weight.scalar_type());
  TORCH_CHECK(weight.dim() == dim, op, ": weight must have ", dim, " dimensions, not ", weight.dim());
  TORCH_CHECK(block.size() == 2 && block[0] > 0 && block[1] >= 0, op, ": block must be two positive sizes, not ", block);
  const bool bytes = weight_scale.scalar_type() == at::kByte;
  TORCH_CHECK(bytes || weight_scale.scalar_type() == at::kFloat, op,
              ": weight_scale must be float32 or, as powers of two, uint8, not ", weight_scale.scalar_type());
  TORCH_CHECK(!bytes || (block[0] == 1 && (block[1] == kMxCols || weight.size(-1) <= kMxCols)), op,
              ": weight_scale may be uint8 for blocks of 1 x ", kMxCols, ", not ", block);
  Weights out;
  const int64_t rows = weight.size(-2), cols = weight.size(-1);
  out.experts = dim == 3 ? weight.size(0) : 1;
  out.first.rows = rows;
  out.first.cols = cols;
  out.first.block_rows = block[0];
  out.first.block_cols = std::max<int64_t>(std::min(block[1], cols), 1);
  int64_t scale_rows = (rows + block[0] - 1) / block[0], scale_cols = (cols + out.first.block_cols - 1) / out.first.block_cols;
  // Like the reference, take one scale for a whole dimension whatever the block says.
  const bool sized = weight_scale.dim() == dim && (dim == 2 || weight_scale.size(0) == out.experts);
  if (sized && weight_scale.size(-2) == 1) scale_rows = 1, out.first.block_rows = std::max<int64_t>(rows, 1);
  if (sized && weight_scale.size(-1) == 1 && !bytes) scale_cols = 1, out.first.block_cols = std::max<int64_t>(cols, 1);
  TORCH_CHECK(sized && weight_scale.size(-2) == scale_rows && (weight_scale.size(-1) == scale_cols || !cols), op,
              ": weight_scale must be ", dim == 3 ? std::to_string(out.experts) + " x " : std::string(), scale_rows, " x ",
              scale_cols, " for a weight of ", weight.sizes(), " in blocks of ", block, ", not ", weight_scale.sizes());
  // A slice of rows or experts keeps its memory; only columns must lie next to each other.
  out.fp8 = weight.stride(-1) == 1 || cols <= 1 ? weight : weight.contiguous();
  out.scale = weight_scale.stride(-1) == 1 || weight_scale.size(-1) <= 1 ? weight_scale : weight_scale.contiguous();
  out.first.fp8 = static_cast<const uint8_t*>(out.fp8.const_data_ptr());
  out.first.row_stride = out.fp8.stride(-2);
  if (bytes) {
    static const float one = 1;
    out.first.exponents = out.scale.const_data_ptr<uint8_t>();
    out.first.exponent_stride = scale_rows == 1 ? 0 : out.scale.stride(-2);
    out.first.scale = &one;
    out.first.scale_stride = 0;
    out.first.block_cols = std::max<int64_t>(cols, 1);
    out.first.segments = 1;
    return out;
  }
  out.first.scale = out.scale.const_data_ptr<float>();
  out.first.scale_stride = out.scale.stride(-2);
  out.first.segments = scale_cols;
  return out;
}

// ----------------------------------------------------------------------------------------------------- cutting the work

struct Group {
  int64_t expert, begin, end;  // rows [begin, end) of the order in which activations are prepared
};

// Whether a sum of products with FP8 values might overflow before its scale is applied: 2^27 of them, each below 448 * 2^91, do
// not. bfloat16 and float32 order their magnitudes like integers.
template <class T>
bool any_above(const T* x, int64_t n, T limit, T magnitude) {
  T most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max<T>(most, x[i] & magnitude);
  return most > limit;
}

bool huge(const Tensor& x) {
  constexpr uint32_t limit = (127u + 91) << 23;
  const void* data = x.const_data_ptr();
  if (x.element_size() == 2) return any_above<uint16_t>(static_cast<const uint16_t*>(data), x.numel(), limit >> 16, 0x7fff);
  return any_above<uint32_t>(static_cast<const uint32_t*>(data), x.numel(), limit, 0x7fffffff);
}

// `multiply` for such activations: an expert at a time, its weight dequantized. Slow, and as rare as they are.
void multiply_huge(const Tensor& x, const Weights& weights, const std::vector<Group>& groups, const std::vector<int64_t>& order,
                   const float* bias, Tensor& out) {
  const int64_t n = weights.first.rows, k = weights.first.cols;
  const Tensor from = x.reshape({-1, k}), weight = at::empty({n, k}, at::kFloat);
  const Tensor added = bias ? at::from_blob(const_cast<float*>(bias), {n}, at::kFloat) : at::zeros({n}, at::kFloat);
  Tensor to = out.view({-1, n});
  for (const Group& group : groups) {
    const Weight w = weights.of(group.expert);
    for (int64_t row = 0; row < n; ++row) selection().others->dequantize(w, row, weight.mutable_data_ptr<float>() + row * k);
    Tensor places = at::arange(group.begin, group.end, at::kLong);
    if (!order.empty()) places.copy_(at::from_blob(const_cast<int64_t*>(order.data()) + group.begin, places.sizes(), at::kLong));
    const Tensor product = at::mm(from.index_select(0, places).to(at::kFloat), weight.t());
    to.index_copy_(0, places, product.add_(added).to(out.scalar_type()));
  }
}

// out[order[i]] = x[order[i]] @ weight[expert].T + bias for i in a group; `order` is the identity where it is empty.
void multiply(const Tensor& x, const Weights& weights, const std::vector<Group>& groups, const std::vector<int64_t>& order,
              const float* bias, Tensor& out, Dtype dtype) {
  const Kernels& kernels = dtype == Dtype::bf16 ? *selection().bf16 : *selection().others;
  const int64_t n = weights.first.rows, item = kernels.item;
  if (groups.empty() || n == 0) return;
  const Tensor source = item == 4 ? x.to(at::kFloat) : x;
  if (huge(source)) return multiply_huge(x, weights, groups, order, bias, out);

  // A block of a group's rows is prepared once, and multiplied with all rows of the weight.
  constexpr int64_t kRows = 512, kSlice = 16;
  struct Block {
    int64_t expert, row, rows, at;
  };
  std::vector<Block> blocks;
  std::vector<std::pair<int64_t, int64_t>> slices;  // block, first row in it
  int64_t bytes = 0, total = 0;
  for (const Group& group : groups) {
    total += group.end - group.begin;
    for (int64_t row = group.begin; row < group.end; row += kRows) {
      const int64_t rows = std::min(kRows, group.end - row), block = static_cast<int64_t>(blocks.size());
      blocks.push_back({group.expert, row, rows, bytes});
      for (int64_t i = 0; i < rows; i += kSlice) slices.emplace_back(block, i);
      bytes += (kernels.bytes(weights.first, rows) + 63) / 64 * 64;
    }
  }
  static thread_local Buffer prepared_buffer;
  const Buffer::Release release{prepared_buffer};
  char* prepared = static_cast<char*>(prepared_buffer.get(bytes));
  const char* from = static_cast<const char*>(source.const_data_ptr());
  const auto place = [&](int64_t row) { return order.empty() ? row : order[row]; };
  share(static_cast<int64_t>(slices.size()), kSlice * weights.first.cols, [&](int64_t index) {
    const auto& [number, first] = slices[index];
    const Block& block = blocks[number];
    const int64_t count = std::min(kSlice, block.rows - first);
    const void* rows[kSlice];
    for (int64_t i = 0; i < count; ++i) rows[i] = from + place(block.row + first + i) * weights.first.cols * item;
    kernels.prepare(weights.first, rows, first, count, block.rows, prepared + block.at);
  });

  // Narrow slices keep threads even, but not fewer than eight rows of the weight, which a kernel reads together.
  int64_t width = kernels.cols;
  const auto count = [&] { return static_cast<int64_t>(blocks.size()) * ((n + width - 1) / width); };
  while (width > 8 && count() < 8 * at::get_num_threads()) width = (width / 2 + 7) / 8 * 8;
  const int64_t parts = (n + width - 1) / width;
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t out_item = out.element_size();
  share(count(), width * weights.first.cols * total / std::max<int64_t>(1, blocks.size()), [&](int64_t index) {
    const Block& block = blocks[index / parts];
    const int64_t begin = index % parts * width, end = std::min(n, begin + width);
    static thread_local Buffer sums_buffer;
    float* sums = static_cast<float*>(sums_buffer.get(block.rows * (end - begin) * 4));
    kernels.matmul(weights.of(block.expert), begin, end, prepared + block.at, block.rows, sums, end - begin);
    release_brgemm();
    for (int64_t i = 0; i < block.rows; ++i) {
      kernels.finish(sums + i * (end - begin), bias ? bias + begin : nullptr, end - begin,
                     to + (place(block.row + i) * n + begin) * out_item, dtype);
    }
  });
}

// ----------------------------------------------------------------------------------------------------------- operators

Tensor dequantized_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias,
                          at::IntArrayRef block) {
  const char* op = "ctfp8::dequantized_linear";
  const Dtype dtype = dtype_of(x, op);
  const Weights w = weights(weight, weight_scale, block, 2, op);
  const int64_t n = w.first.rows, k = w.first.cols;
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == k, op, ": the last dimension of x must be ", k, ", as in the weight, but x is ",
              x.sizes());
  Tensor bias_f32;
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, op, ": bias must have ", n, " elements, but is ", bias->sizes());
    bias_f32 = bias->to(at::kFloat).contiguous();
  }
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  int64_t m = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) m *= sizes[i];
  if (k == 0) {
    Tensor out = at::zeros(sizes, x.options());
    return bias ? out.add_(*bias) : out;
  }
  Tensor out = at::empty(sizes, x.options().memory_format(at::MemoryFormat::Contiguous));
  multiply(x.contiguous(), w, {{0, 0, m}}, {}, bias ? bias_f32.const_data_ptr<float>() : nullptr, out, dtype);
  return out;
}

void check_rows(const Tensor& x, const Weights& w, const Tensor& index, const char* name, const char* op) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == w.first.cols, op, ": x must be rows of ", w.first.cols,
              " columns, as in the weight, but is ", x.sizes());
  TORCH_CHECK(index.dim() == 1 && (index.scalar_type() == at::kInt || index.scalar_type() == at::kLong), op, ": ", name,
              " must be a vector of int32 or int64, not ", index.scalar_type(), " ", index.sizes());
}

Tensor dequantized_grouped_mm(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& offs,
                              at::IntArrayRef block) {
  const char* op = "ctfp8::dequantized_grouped_mm";
  const Dtype dtype = dtype_of(x, op);
  const Weights w = weights(weight, weight_scale, block, 3, op);
  check_rows(x, w, offs, "offs", op);
  TORCH_CHECK(offs.size(0) == w.experts, op, ": offs must have one end for each of ", w.experts, " experts, not ", offs.size(0));
  const Tensor ends = offs.to(at::kLong).contiguous();
  std::vector<Group> groups;
  int64_t start = 0;
  for (int64_t expert = 0; expert < w.experts; ++expert) {
    const int64_t end = ends.const_data_ptr<int64_t>()[expert];
    TORCH_CHECK(end >= start && end <= x.size(0), op, ": offs must rise from 0 to at most the ", x.size(0),
                " rows of x, but end ", expert, " is ", end, " after ", start);
    if (end > start) groups.push_back({expert, start, end});
    start = end;
  }
  Tensor out = at::empty({x.size(0), w.first.rows}, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (w.first.cols == 0) return out.zero_();
  if (start < x.size(0)) out.narrow(0, start, x.size(0) - start).zero_();
  multiply(x.contiguous(), w, groups, {}, nullptr, out, dtype);
  return out;
}

Tensor dequantized_gathered_mm(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& ids,
                               at::IntArrayRef block) {
  const char* op = "ctfp8::dequantized_gathered_mm";
  const Dtype dtype = dtype_of(x, op);
  const Weights w = weights(weight, weight_scale, block, 3, op);
  check_rows(x, w, ids, "ids", op);
  const int64_t t = x.size(0);
  TORCH_CHECK(ids.size(0) == t, op, ": ids must name the expert of each of ", t, " rows, not of ", ids.size(0));
  const Tensor given = ids.to(at::kLong).contiguous();

  // Counting sort: rows of one expert become a group, so that its weight is read once.
  std::vector<int64_t> start(w.experts + 1, 0), order(t), experts(t);
  for (int64_t i = 0; i < t; ++i) {
    const int64_t id = given.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(id >= -w.experts && id < w.experts, op, ": ids must be from ", -w.experts, " to ", w.experts - 1, ", but row ", i,
                " has ", id);
    experts[i] = id < 0 ? id + w.experts : id;  // from the end, as in an index
    ++start[experts[i] + 1];
  }
  std::vector<Group> groups;
  for (int64_t expert = 0; expert < w.experts; ++expert) {
    start[expert + 1] += start[expert];
    if (start[expert + 1] > start[expert]) groups.push_back({expert, start[expert], start[expert + 1]});
  }
  for (int64_t i = 0; i < t; ++i) order[start[experts[i]]++] = i;

  Tensor out = at::empty({t, w.first.rows}, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (w.first.cols == 0) return out.zero_();
  multiply(x.contiguous(), w, groups, order, nullptr, out, dtype);
  return out;
}

Tensor dequantize(const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>&, at::IntArrayRef block,
                  std::string_view, at::ScalarType type) {
  const char* op = "ctfp8::dequantize";
  TORCH_CHECK(weight.dim() >= 2, op, ": weight must have rows and columns, not ", weight.dim(), " dimensions");
  TORCH_CHECK(weight_scale.dim() == weight.dim() &&
                  weight_scale.sizes().slice(0, weight.dim() - 2) == weight.sizes().slice(0, weight.dim() - 2),
              op, ": weight_scale must have the leading dimensions of the weight ", weight.sizes(), ", but is ",
              weight_scale.sizes());
  const bool direct = type == at::kBFloat16 || type == at::kHalf || type == at::kFloat;
  Tensor out =
      at::empty(weight.sizes(), weight.options().dtype(direct ? type : at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  const int64_t rows = weight.size(-2), cols = weight.size(-1);
  if (out.numel() == 0) return direct ? out : out.to(type);
  const Weights w =
      weight.dim() == 2
          ? weights(weight, weight_scale, block, 2, op)
          : weights(weight.dim() == 3 ? weight : weight.reshape({-1, rows, cols}),
                    weight.dim() == 3 ? weight_scale : weight_scale.reshape({-1, weight_scale.size(-2), weight_scale.size(-1)}),
                    block, 3, op);
  const Dtype dtype = type == at::kBFloat16 ? Dtype::bf16 : type == at::kHalf ? Dtype::f16 : Dtype::f32;
  const Kernels& kernels = *selection().others;
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t item_rows = std::max<int64_t>(1, 65536 / cols), total = w.experts * rows, size = out.element_size();
  share((total + item_rows - 1) / item_rows, item_rows * cols, [&](int64_t item) {
    static thread_local Buffer buffer;
    float* line = static_cast<float*>(buffer.get(cols * 4));
    for (int64_t row = item * item_rows; row < std::min(total, (item + 1) * item_rows); ++row) {
      kernels.dequantize(w.of(row / rows), row % rows, line);
      kernels.finish(line, nullptr, cols, to + row * cols * size, dtype);
    }
  });
  return direct ? out : out.to(type);
}

}  // namespace
}  // namespace ctfp8

TORCH_LIBRARY_IMPL(ctfp8, CPU, m) {
  m.impl("dequantize", &ctfp8::dequantize);
  m.impl("dequantized_linear", &ctfp8::dequantized_linear);
  m.impl("dequantized_grouped_mm", &ctfp8::dequantized_grouped_mm);
  m.impl("dequantized_gathered_mm", &ctfp8::dequantized_gathered_mm);
}
