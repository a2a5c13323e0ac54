// The operator `ctfp8::paged_attention` on CPU tensors: new tokens are written to their pages, and pages are read where they lie.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/tril.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "cached.h"
#include "dispatch.h"

namespace ctfp8 {
namespace {

using at::Tensor;

// Keys and values of one layer, `page` tokens of the one behind as many of the other, seen as rows of `[heads, bytes]`.
struct Pages {
  Tensor rows;  // [rows, heads, numbers, or FP8 values and what is behind them]
  int64_t page, first, width;
  Stored kind;
  Scales scales[2];  // of keys, and of values

  int64_t heads() const { return rows.size(1); }
  int64_t bytes() const { return rows.size(2) * rows.element_size(); }  // of a head's token
  // Where a token's keys are, of all heads; its values, for `which` 1.
  char* of(int64_t index, int64_t which) const {
    const int64_t row = index + first + which * page;
    TORCH_CHECK(row >= 0 && row < rows.size(0), "ctfp8::paged_attention: row ", row, " of ", rows.size(0));
    return static_cast<char*>(rows.mutable_data_ptr()) + row * heads() * bytes();
  }
  // Those of one head from a token on, to the end of its page.
  Tokens tokens(int64_t index, int64_t which, int64_t head) const {
    return {of(index, which) + head * bytes(), heads() * bytes(), width, scales[which].of(head)};
  }
};

// One text of a step: `tokens` new ones from `begin` on, and where the `length` that it has with them are in `read`.
struct Text {
  int64_t begin, tokens, at, length;
};

std::vector<Text> texts_of(const Tensor& query_starts, const Tensor& key_starts, int64_t tokens, int64_t all) {
  std::vector<Text> texts;
  const int32_t* q = query_starts.const_data_ptr<int32_t>();
  const int32_t* k = key_starts.const_data_ptr<int32_t>();
  for (int64_t i = 0; i + 1 < query_starts.numel(); ++i) {
    const Text text{q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i]};
    TORCH_CHECK(text.begin >= 0 && text.tokens >= 0 && text.begin + text.tokens <= tokens && text.at >= 0 &&
                    text.length >= text.tokens && text.at + text.length <= all,
                "ctfp8::paged_attention: text ", i, " has ", text.tokens, " new tokens of ", text.length,
                ", which are not among those given");
    if (text.tokens > 0) texts.push_back(text);
  }
  return texts;
}

// [1, heads, tokens, columns], as they are kept, into the pages.
void write_to(const Pages& pages, const Tensor& states, const Tensor& write, int64_t which) {
  const Tensor lines = states.stride(3) == 1 || states.size(3) <= 1 ? states : states.contiguous();
  const int64_t item = lines.element_size(), bytes = lines.size(3) * item;
  const char* from = static_cast<const char*>(lines.const_data_ptr());
  const int64_t* index = write.const_data_ptr<int64_t>();
  for (int64_t token = 0; token < write.numel(); ++token) {
    char* to = pages.of(index[token], which);
    for (int64_t h = 0; h < pages.heads(); ++h)
      std::memcpy(to + h * pages.bytes(), from + (h * lines.stride(1) + token * lines.stride(2)) * item, bytes);
  }
}

// A text's keys or values, in order, as numbers: [1, heads, length, width].
Tensor gathered(const Pages& pages, const Text& text, const int64_t* read, int64_t which, at::ScalarType type) {
  const int64_t heads = pages.heads(), bytes = heads * pages.bytes();
  Tensor out = at::empty({text.length, heads, pages.width}, pages.rows.options().dtype(type));
  const Dtype dtype = dtype_of(out, "ctfp8::paged_attention");
  const int64_t line = pages.width * out.element_size();
  char* to = static_cast<char*>(out.mutable_data_ptr());
  share((text.length + pages.page - 1) / pages.page, pages.page * heads * pages.width, [&](int64_t part) {
    const int64_t from = part * pages.page, n = std::min(pages.page, text.length - from), index = read[text.at + from];
    if (pages.kind != Stored::fp8) {
      std::memcpy(to + from * bytes, pages.of(index, which), n * bytes);
      return;
    }
    for (int64_t h = 0; h < heads; ++h) {
      const Tokens tokens = pages.tokens(index, which, h);
      for (int64_t i = 0; i < n; ++i) dequantize_token(tokens, i, to + ((from + i) * heads + h) * line, dtype);
    }
  });
  return out.transpose(0, 1).unsqueeze(0);
}

// Many tokens of a text are bound by arithmetic, which torch's own attention does with matmuls.
void attend_many(const Tensor& query, const Pages& pages, const Text& text, const int64_t* read, double scale, Tensor& out) {
  std::optional<Tensor> mask;
  const bool fresh = text.tokens == text.length;
  if (!fresh && text.tokens > 1)
    mask = at::ones({text.tokens, text.length}, query.options().dtype(at::kBool)).tril(text.length - text.tokens);
  const Tensor keys = gathered(pages, text, read, 0, query.scalar_type());
  const Tensor values = gathered(pages, text, read, 1, query.scalar_type());
  const Tensor result = at::scaled_dot_product_attention(query.narrow(2, text.begin, text.tokens), keys, values, mask, 0.0,
                                                         fresh && text.tokens > 1, scale, query.size(1) != pages.heads());
  out.narrow(1, text.begin, text.tokens).copy_(result.transpose(1, 2));
}

// One token of each text, page by page; then what the pages gave is put together.
void attend_one(const Tensor& query, const Pages& pages, const std::vector<Text>& texts, const int64_t* read, double scale,
                Dtype dtype, Tensor& out) {
  const int64_t heads = pages.heads(), rows = query.size(1) / heads, width = pages.width, ld = query_stride(width);
  const int64_t size = rows * (ld + 2);
  const Kernels& kernels = *(dtype == Dtype::bf16 && selection().bf16->attention ? selection().bf16 : selection().others);
  static thread_local Buffer queries_buffer, partial_buffer;
  const Buffer::Release release_queries{queries_buffer}, release_partial{partial_buffer};
  const auto count = static_cast<int64_t>(texts.size());
  float* queries = static_cast<float*>(queries_buffer.get(count * query.size(1) * ld * 4));
  std::memset(queries, 0, count * query.size(1) * ld * 4);
  std::vector<int64_t> first_page{0};
  for (int64_t i = 0; i < count; ++i) {
    const Tensor wide = at::from_blob(queries + i * query.size(1) * ld, {query.size(1), ld}, at::kFloat);
    wide.narrow(1, 0, width).copy_(query.select(0, 0).select(1, texts[i].begin));
    first_page.push_back(first_page.back() + (texts[i].length + pages.page - 1) / pages.page);
  }
  std::vector<int64_t> text_of(first_page.back());
  for (int64_t i = 0; i < count; ++i) std::fill(text_of.begin() + first_page[i], text_of.begin() + first_page[i + 1], i);
  std::vector<int64_t> blocks((pages.page + kTokens - 1) / kTokens);
  for (size_t b = 0; b < blocks.size(); ++b) blocks[b] = static_cast<int64_t>(b);
  float* partial = static_cast<float*>(partial_buffer.get(first_page.back() * heads * size * 4));
  share(first_page.back() * heads, 2 * rows * pages.page * width, [&](int64_t part) {
    const int64_t page = part / heads, h = part % heads, i = text_of[page], from = (page - first_page[i]) * pages.page;
    const int64_t n = std::min(pages.page, texts[i].length - from), index = read[texts[i].at + from];
    float* at = partial + part * size;
    const Attention problem{pages.kind,
                            pages.tokens(index, 0, h),
                            pages.tokens(index, 1, h),
                            n,
                            rows,
                            queries + (i * heads + h) * rows * ld,
                            static_cast<float>(scale),
                            nullptr};
    kernels.attention(problem, blocks.data(), (n + kTokens - 1) / kTokens, at, at + rows * ld, at + rows * (ld + 1));
  });
  char* to = static_cast<char*>(out.mutable_data_ptr());
  share(count * heads * rows, 2 * width * (first_page.back() / count + 1), [&](int64_t line) {
    const int64_t i = line / (heads * rows), h = line / rows % heads, r = line % rows;
    float most = -INFINITY, sum = 0;
    const auto part = [&](int64_t page) { return partial + (page * heads + h) * size; };
    for (int64_t p = first_page[i]; p < first_page[i + 1]; ++p) most = std::max(most, part(p)[rows * ld + r]);
    static thread_local Buffer buffer;
    float* total = static_cast<float*>(buffer.get(ld * 4));
    std::fill(total, total + ld, 0.f);
    for (int64_t p = first_page[i]; p < first_page[i + 1]; ++p) {
      const float* one = part(p);
      const float share_of = std::exp(one[rows * ld + r] - most);
      sum += one[rows * (ld + 1) + r] * share_of;
      for (int64_t c = 0; c < width; ++c) total[c] += one[r * ld + c] * share_of;
    }
    for (int64_t c = 0; c < width; ++c) total[c] /= sum;
    const int64_t place = texts[i].begin * query.size(1) + h * rows + r;
    kernels.finish(total, nullptr, width, to + place * width * out.element_size(), dtype);
  });
}

Tensor paged_attention(const Tensor& query, const Tensor& key, const Tensor& value, Tensor& pages, const Tensor& write,
                       const Tensor& read, const Tensor& query_starts, const Tensor& key_starts, int64_t layer, double scale,
                       const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
  const char* op = "ctfp8::paged_attention";
  const Dtype dtype = dtype_of(query, op);
  TORCH_CHECK(query.dim() == 4 && query.size(0) == 1 && key.dim() == 4 && value.dim() == 4 && key.size(0) == 1 &&
                  value.size(0) == 1 && key.size(1) == value.size(1) && key.size(2) == query.size(2) &&
                  value.size(2) == query.size(2) && key.size(1) > 0 && query.size(1) % key.size(1) == 0,
              op, ": query must be [1, heads, tokens, columns], keys and values the same with a divisor of the heads, not ",
              query.sizes(), ", ", key.sizes(), " and ", value.sizes());
  const bool fp8 = pages.scalar_type() == at::kByte;
  const Scales scales[] = {scales_of(key_scale, key.size(1), fp8, op, "keys"),
                           scales_of(value_scale, key.size(1), fp8, op, "values")};
  const int64_t width = query.size(3);
  TORCH_CHECK(pages.dim() == 5 && pages.size(1) == 2 && pages.size(2) > 0 && pages.size(3) == key.size(1) &&
                  pages.is_contiguous() && key.scalar_type() == pages.scalar_type() &&
                  value.scalar_type() == pages.scalar_type() && (fp8 || pages.scalar_type() == query.scalar_type()),
              op,
              ": pages must be [pages, 2, page, heads, columns] of the keys' heads and dtype, that of the query or uint8, not ",
              pages.sizes(), " of ", pages.scalar_type());
  for (int64_t which : {0, 1}) {
    const int64_t kept = (which ? value : key).size(3), wanted = width + (fp8 && !scales[which].first);
    TORCH_CHECK(kept == wanted && pages.size(4) >= kept, op, ": ", which ? "values" : "keys", " have ", kept,
                " columns, not the query's ", width, wanted == width ? "" : " and a byte for each token's scale",
                ", or pages have not room for them");
  }
  TORCH_CHECK(
      write.scalar_type() == at::kLong && read.scalar_type() == at::kLong && write.is_contiguous() && read.is_contiguous() &&
          write.numel() == query.size(2) && query_starts.scalar_type() == at::kInt && key_starts.scalar_type() == at::kInt &&
          query_starts.is_contiguous() && key_starts.is_contiguous() && query_starts.numel() == key_starts.numel(),
      op, ": write and read must be int64, a place for each new token, and starts int32, as many of the one as of the other");
  const int64_t page = pages.size(2);
  const Stored kind = fp8 ? Stored::fp8 : dtype == Dtype::bf16 ? Stored::bf16 : Stored::f32;
  const Pages kept{pages.view({-1, pages.size(3), pages.size(4)}), page, 2 * layer * page, width, kind, {scales[0], scales[1]}};
  const std::vector<Text> texts = texts_of(query_starts, key_starts, query.size(2), read.numel());
  write_to(kept, key, write, 0);
  write_to(kept, value, write, 1);
  Tensor out = at::empty({1, query.size(2), query.size(1), width}, query.options());
  std::vector<Text> single;
  for (const Text& text : texts) {
    for (int64_t from = 0; from < text.length; from += page) {  // before threads read them
      const int64_t index = read.const_data_ptr<int64_t>()[text.at + from];
      kept.of(index, 0);
      kept.of(index + std::min(page, text.length - from) - 1, 1);
    }
    if (text.tokens == 1 && dtype != Dtype::f16 && query.size(1) / key.size(1) <= kQueries)
      single.push_back(text);
    else
      attend_many(query, kept, text, read.const_data_ptr<int64_t>(), scale, out);
  }
  if (!single.empty()) attend_one(query, kept, single, read.const_data_ptr<int64_t>(), scale, dtype, out);
  return out;
}

}  // namespace
}  // namespace ctfp8

TORCH_LIBRARY_IMPL(ctfp8, CPU, m) { m.impl("paged_attention", &ctfp8::paged_attention); }
