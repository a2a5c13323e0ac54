// The operator `ctfp8::attention` on CPU tensors: checks, which blocks of a cache are read, and the parts that threads take.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/where.h>

#include <cmath>
#include <vector>

#include "buffer.h"
#include "cached.h"
#include "dispatch.h"

namespace ctfp8 {
namespace {

using at::Tensor;

// Keys or values `[batch, heads, length, columns]` as they are stored.
struct Cached {
  Tensor stored;
  Stored kind;
  Scales scales;

  int64_t width() const { return stored.size(3) - (kind == Stored::fp8 && !scales.first); }
  Tokens of(int64_t batch, int64_t head) const {
    const int64_t item = stored.element_size();
    const char* first = static_cast<const char*>(stored.const_data_ptr());
    return {first + (batch * stored.stride(0) + head * stored.stride(1)) * item, stored.stride(2) * item, width(),
            scales.of(head)};
  }
};

Cached cached(const Tensor& t, const std::optional<Tensor>& scale, const Tensor& query, const char* op, const char* name) {
  TORCH_CHECK(t.dim() == 4 && t.size(0) == query.size(0) && t.size(1) > 0 && query.size(1) % t.size(1) == 0, op, ": ", name,
              " must be [batch, heads, length, columns] with the batch and a divisor of the heads of query ", query.sizes(),
              ", but is ", t.sizes());
  const bool fp8 = t.scalar_type() == at::kByte;
  TORCH_CHECK(fp8 || t.scalar_type() == query.scalar_type(), op, ": ", name, " must be FP8 values (uint8), or ",
              query.scalar_type(), " as the query, not ", t.scalar_type());
  Cached out{t.stride(3) == 1 || t.size(3) <= 1 ? t : t.contiguous(), fp8                             ? Stored::fp8
                                                                      : t.scalar_type() == at::kFloat ? Stored::f32
                                                                                                      : Stored::bf16};
  out.scales = scales_of(scale, t.size(1), fp8, op, name);
  return out;
}

// The tokens [begin, end) as numbers.
Tensor dequantized(const Cached& c, int64_t begin, int64_t end, at::ScalarType type) {
  if (c.kind != Stored::fp8) return c.stored.slice(2, begin, end);
  const int64_t heads = c.stored.size(1), n = end - begin, width = c.width();
  Tensor out = at::empty({c.stored.size(0), heads, n, width}, c.stored.options().dtype(type));
  const Dtype dtype = dtype_of(out, "ctfp8::attention");
  char* to = static_cast<char*>(out.mutable_data_ptr());
  constexpr int64_t kSome = 256;
  const int64_t parts = (n + kSome - 1) / kSome;
  share(out.size(0) * heads * parts, kSome * width, [&](int64_t item) {
    const int64_t head = item / parts, from = item % parts * kSome;
    const Tokens tokens = c.of(head / heads, head % heads);
    for (int64_t i = from; i < std::min(n, from + kSome); ++i)
      dequantize_token(tokens, begin + i, to + (head * n + i) * width * out.element_size(), dtype);
  });
  return out;
}

// The blocks of tokens that some query of a sequence sees; all where there is no mask.
std::vector<int64_t> seen(const std::optional<Tensor>& mask, int64_t batch, int64_t length) {
  std::vector<int64_t> found;
  const float* first = nullptr;
  int64_t rows = 0;
  if (mask) {
    rows = mask->size(1) * mask->size(2);
    first = mask->const_data_ptr<float>() + (mask->size(0) == 1 ? 0 : batch) * rows * length;
  }
  for (int64_t begin = 0; begin < length; begin += kTokens) {
    const int64_t end = std::min(length, begin + kTokens);
    int hidden = first ? 1 : 0;
    for (int64_t row = 0; row < rows && hidden; ++row) {
      for (int64_t j = begin; j < end; ++j) hidden &= first[row * length + j] == -INFINITY;
    }
    if (!hidden) found.push_back(begin / kTokens);
  }
  return found;
}

Tensor attention(const Tensor& query, const Tensor& keys, const Tensor& values, const std::optional<Tensor>& key_scale,
                 const std::optional<Tensor>& value_scale, const std::optional<Tensor>& mask, double scale) {
  const char* op = "ctfp8::attention";
  const Dtype dtype = dtype_of(query, op);
  TORCH_CHECK(query.dim() == 4, op, ": query must be [batch, heads, tokens, columns], not ", query.sizes());
  const Cached k = cached(keys, key_scale, query, op, "keys"), v = cached(values, value_scale, query, op, "values");
  const int64_t batch = query.size(0), heads = keys.size(1), tokens = query.size(2), width = query.size(3);
  const int64_t length = keys.size(2), group = query.size(1) / heads, rows = group * tokens;
  TORCH_CHECK(k.width() == width && values.size(1) == heads && values.size(2) == length && k.kind == v.kind, op, ": keys ",
              keys.sizes(), " and values ", values.sizes(), " do not fit each other, or the query ", query.sizes());
  std::optional<Tensor> added;
  if (mask) {
    const auto fits = [&](int64_t dim, int64_t size) { return mask->size(dim) == 1 || mask->size(dim) == size; };
    TORCH_CHECK(mask->dim() == 4 && fits(0, batch) && fits(1, query.size(1)) && fits(2, tokens) && mask->size(3) == length, op,
                ": mask must be [batch, heads, tokens, length], the first three of them or 1, but is ", mask->sizes());
    added = mask->scalar_type() == at::kBool ? at::where(*mask, 0.f, -INFINITY) : *mask;
    added = added->to(at::kFloat).contiguous();
  }
  Tensor out = at::empty({batch, tokens, query.size(1), v.width()}, query.options()).transpose(1, 2);
  if (out.numel() == 0) return out;
  std::vector<std::vector<int64_t>> blocks;
  int64_t begin = length, end = 0, most_blocks = 0;
  for (int64_t b = 0; b < batch; ++b) {
    blocks.push_back(mask && mask->size(0) == 1 && b > 0 ? blocks[0] : seen(added, b, length));
    if (blocks[b].empty()) continue;
    begin = std::min(begin, blocks[b].front() * kTokens);
    end = std::max(end, std::min(length, (blocks[b].back() + 1) * kTokens));
    most_blocks = std::max(most_blocks, static_cast<int64_t>(blocks[b].size()));
  }
  if (end == 0) return out.zero_();
  // Long queries are bound by arithmetic, which torch's own attention does with matmuls; it too reads only what is seen.
  if (rows > kQueries || dtype == Dtype::f16) {
    std::optional<Tensor> part;
    if (mask) part = (mask->scalar_type() == at::kBool ? *mask : mask->to(query.scalar_type())).slice(3, begin, end);
    const Tensor keys_seen = dequantized(k, begin, end, query.scalar_type());
    const Tensor values_seen = dequantized(v, begin, end, query.scalar_type());
    return out.copy_(at::scaled_dot_product_attention(query, keys_seen, values_seen, part, 0.0, false, scale, group > 1));
  }

  const int64_t ldq = query_stride(width), ldo = query_stride(v.width());
  static thread_local Buffer queries_buffer, partial_buffer;
  const Buffer::Release release_queries{queries_buffer}, release_partial{partial_buffer};
  float* queries = static_cast<float*>(queries_buffer.get(batch * query.size(1) * tokens * ldq * 4));
  {
    const Tensor wide = at::from_blob(queries, {batch, query.size(1), tokens, ldq}, at::kFloat);
    wide.narrow(3, width, ldq - width).zero_();
    wide.narrow(3, 0, width).copy_(query);
  }
  // A thread takes one head of one sequence, or, where those are few, a part of its blocks.
  constexpr int64_t kSplit = 8;
  const int64_t wanted = (4 * threads() + batch * heads - 1) / (batch * heads);
  const int64_t splits = std::clamp<int64_t>(std::min(wanted, most_blocks / kSplit), 1, 64);
  const int64_t size = rows * (ldo + 2);
  float* partial = static_cast<float*>(partial_buffer.get(batch * heads * splits * size * 4));
  const Kernels& kernels = *(dtype == Dtype::bf16 && selection().bf16->attention ? selection().bf16 : selection().others);
  share(batch * heads * splits, rows * most_blocks / splits * kTokens * 2 * width, [&](int64_t item) {
    const int64_t b = item / splits / heads, h = item / splits % heads, part = item % splits;
    const int64_t count = static_cast<int64_t>(blocks[b].size()), from = count * part / splits, to = count * (part + 1) / splits;
    const float* rows_of_mask[kQueries];
    for (int64_t r = 0; added && r < rows; ++r) {
      const int64_t head = added->size(1) == 1 ? 0 : h * group + r / tokens, token = added->size(2) == 1 ? 0 : r % tokens;
      rows_of_mask[r] = added->const_data_ptr<float>() +
                        (((added->size(0) == 1 ? 0 : b) * added->size(1) + head) * added->size(2) + token) * length;
    }
    float* at = partial + item * size;
    const Attention problem{k.kind,
                            k.of(b, h),
                            v.of(b, h),
                            length,
                            rows,
                            queries + (b * heads + h) * rows * ldq,
                            static_cast<float>(scale),
                            added ? rows_of_mask : nullptr};
    kernels.attention(problem, blocks[b].data() + from, to - from, at, at + rows * ldo, at + rows * (ldo + 1));
  });
  char* to = static_cast<char*>(out.mutable_data_ptr());
  std::vector<float> line(ldo);
  for (int64_t item = 0; item < batch * heads * rows; ++item) {
    const int64_t b = item / rows / heads, h = item / rows % heads, r = item % rows;
    const float* first = partial + item / rows * splits * size;
    float most = -INFINITY, sum = 0;
    for (int64_t s = 0; s < splits; ++s) most = std::max(most, first[s * size + rows * ldo + r]);
    std::fill(line.begin(), line.end(), 0.f);
    for (int64_t s = 0; s < splits; ++s) {
      const float* part = first + s * size;
      const float larger = part[rows * ldo + r];
      const float share_of = larger == most ? 1.f : std::exp(larger - most);
      sum += part[rows * (ldo + 1) + r] * share_of;
      for (int64_t c = 0; c < ldo; ++c) line[c] += part[r * ldo + c] * share_of;
    }
    if (sum != 0) {
      for (float& value : line) value /= sum;
    }
    const int64_t place = (b * tokens + r % tokens) * query.size(1) + h * group + r / tokens;
    kernels.finish(line.data(), nullptr, v.width(), to + place * v.width() * out.element_size(), dtype);
  }
  return out;
}

}  // namespace
}  // namespace ctfp8

TORCH_LIBRARY_IMPL(ctfp8, CPU, m) { m.impl("attention", &ctfp8::attention); }
