// Attention of a few queries: keys and values are read once for all queries of their head, a block of tokens at a time.
//
// The softmax is taken as blocks pass: a larger maximum scales down what was summed before. Included once by each
// instruction-set file, for its vector type `V` (see vector.h). Where that multiplies pairs of bfloat16, queries are bfloat16,
// and so are the softmax's weights, as in torch's own attention; values of two tokens are then added at a time.
#pragma once
#include <cstring>

#include "buffer.h"
#include "decode.h"
#include "gemv.h"

namespace ctfp8 {
namespace {

constexpr float kInfinity = __builtin_inff();

// e^x for x <= 0, to 1e-7 of it; NaN for NaN. Below the smallest normal number it is 0. The compiler vectorises it.
inline float exp_of(float x) {
  const float bounded = x < -87.f ? -87.f : x;
  const float shifted = bounded * 1.44269504f + 12582912.f, n = shifted - 12582912.f;  // rounded to a whole number
  const float r = bounded - n * 0.693145752f - n * 1.42860677e-6f;
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const float power = float_of_bits((bits_of_float(shifted) + 127) << 23);
  return x < -87.f ? 0.f : p * power;
}

template <Vector V>
constexpr bool kPairs = requires { &V::pairs; };

// Columns [k, k + n) of a token, n <= step, as numbers; what is missing in a chunk is zero.
template <Vector V, Stored stored>
inline typename V::Chunk columns(const V& v, const char* token, int64_t k, int64_t n) {
  if constexpr (stored == Stored::fp8) {
    const auto* p = reinterpret_cast<const uint8_t*>(token) + k;
    return n >= V::step ? v.decode(p) : v.decode_tail(p, static_cast<int>(n));
  } else if constexpr (kPairs<V>) {
    return V::halves(reinterpret_cast<const uint16_t*>(token) + k, n);
  } else {
    using T = std::conditional_t<stored == Stored::bf16, uint16_t, float>;
    const T* p = reinterpret_cast<const T*>(token) + k;
    alignas(64) T tail[V::step];
    if (n < V::step) {
      std::memset(tail, 0, sizeof(tail));
      std::memcpy(tail, p, n * sizeof(T));
      p = tail;
    }
    if constexpr (stored == Stored::bf16)
      return V::widen(p);
    else
      return V::load(p);
  }
}

// What the values that `columns` gives have to be multiplied with.
template <Vector V, Stored stored>
inline float factor(const Tokens& t, int64_t token) {
  if constexpr (stored != Stored::fp8) return 1.f;
  const auto* exponent = reinterpret_cast<const uint8_t*>(t.first + token * t.stride) + t.width;
  return V::gain * (t.scale ? *t.scale : float_of_exponent(*exponent));
}

// Sums in registers at a time for each of M queries: half of the registers in all.
template <Vector V, int M>
constexpr int kSums = V::registers / 2 > M ? V::registers / 2 / M : 1;

// scores[r * kTokens + j] = query r times key j, for M queries and the n keys from `begin` on.
template <Vector V, Stored stored, int M>
void dot_keys(const V& v, const Attention& a, int64_t begin, int64_t n, const typename V::X* queries, float* scores) {
  constexpr int N = kSums<V, M>;
  const int64_t width = a.keys.width, ldq = query_stride(width), whole = width / V::step * V::step;
  for (int64_t j = 0; j < n; j += N) {
    const char* token[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) token[i] = a.keys.first + (begin + (j + i < n ? j + i : n - 1)) * a.keys.stride;
    typename V::Acc sum[N * M];
#pragma GCC unroll 16
    for (int i = 0; i < N * M; ++i) sum[i] = V::zero();
    const auto add = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        const auto key = columns<V, stored>(v, token[i], k, count);
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r) sum[i * M + r] = V::dot(sum[i * M + r], key, V::load(queries + r * ldq + k));
      }
    };
    for (int64_t k = 0; k < whole; k += V::step) add(k, V::step);
    if (whole < width) add(whole, width - whole);
    float results[16];
    reduce_all<V, N * M>(sum, results);
    for (int i = 0; i < N && j + i < n; ++i) {
      const float scale = factor<V, stored>(a.keys, begin + j + i) * a.scale;
      for (int r = 0; r < M; ++r) scores[r * kTokens + j + i] = results[i * M + r] * scale;
    }
  }
}

// out[r] += the n values from `begin` on times weights[r * kTokens + j], for M queries, N chunks of columns from k on.
template <FloatVector V, Stored stored, int M, int N>
void add_columns(const V& v, const Attention& a, int64_t begin, int64_t n, const float* weights, int64_t k, float* out) {
  const int64_t width = a.values.width, ldo = query_stride(width);
  typename V::Acc sum[M * N];
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < N; ++c) sum[r * N + c] = V::load(out + r * ldo + k + c * V::step);
  const auto add = [&](auto&& count) __attribute__((always_inline)) {
    for (int64_t j = 0; j < n; ++j) {
      const char* token = a.values.first + (begin + j) * a.values.stride;
#pragma GCC unroll 16
      for (int c = 0; c < N; ++c) {
        const auto value = columns<V, stored>(v, token, k + c * V::step, count(c));
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r) sum[r * N + c] = V::scale_add(sum[r * N + c], value, weights[r * kTokens + j]);
      }
    }
  };
  if (k + N * V::step <= width) {
    add([](int) { return int64_t{V::step}; });
  } else {
    add([&](int c) { return width - k - c * V::step; });
  }
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < N; ++c) V::store(out + r * ldo + k + c * V::step, sum[r * N + c]);
}

template <FloatVector V, Stored stored, int M>
void add_values(const V& v, const Attention& a, int64_t begin, int64_t n, const float* weights, float* out) {
  constexpr int N = kSums<V, M>;
  int64_t k = 0;
  for (; k + N * V::step <= a.values.width; k += N * V::step) add_columns<V, stored, M, N>(v, a, begin, n, weights, k, out);
  for (; k < a.values.width; k += V::step) add_columns<V, stored, M, 1>(v, a, begin, n, weights, k, out);
}

// Asks for `count` tokens, of a block that is read later.
template <Vector V>
void fetch(const Tokens& tokens, int64_t first, int64_t count, int64_t bytes) {
  for (int64_t j = first; j < first + count; ++j)
    for (int64_t k = 0; k < bytes; k += 64) V::prefetch(reinterpret_cast<const uint8_t*>(tokens.first + j * tokens.stride + k));
}

// From this many queries on it pays to bring a block of keys and values into the order of a matmul once, for all of them.
constexpr int64_t kMany = 3;

// to[i * kTokens + j]: columns 2 i and 2 i + 1 of key begin + j.
template <Vector V, Stored stored>
void pair_keys(const V& v, const Attention& a, int64_t begin, int64_t n, int64_t next, uint32_t* to) {
  for (int64_t k = 0; k < a.keys.width; k += V::step)
    for (int64_t j = 0; j < kTokens; j += 16) {
      const int64_t columns = a.keys.width - k < V::step ? a.keys.width - k : V::step, count = n - j < 16 ? n - j : 16;
      const char* token = a.keys.first + (begin + j) * a.keys.stride;
      if (k == 0) fetch<V>(a.keys, next + j, 16, a.keys.width * (stored == Stored::fp8 ? 1 : 2));
      if constexpr (stored == Stored::fp8)
        v.across_codes(token + k, a.keys.stride, count, columns, to + k / 2 * kTokens + j, kTokens);
      else
        V::across_halves(token + k * 2, a.keys.stride, count, columns, to + k / 2 * kTokens + j, kTokens);
    }
}

// to[j / 2 * ldo + k]: column k of the values begin + j and begin + j + 1; columns in the order in which `pairs` gives them.
template <Vector V, Stored stored>
void pair_values(const V& v, const Attention& a, int64_t begin, int64_t n, int64_t next, uint32_t* to) {
  const int64_t width = a.values.width, ldo = query_stride(width);
  for (int64_t j = 0; j < n; j += 2) {
    const char* token = a.values.first + (begin + j) * a.values.stride;
    fetch<V>(a.values, next + j, 2, width * (stored == Stored::fp8 ? 1 : 2));
    for (int64_t k = 0; k < width; k += V::step) {
      const int64_t count = width - k < V::step ? width - k : V::step;
      const auto one = columns<V, stored>(v, token, k, count);
      const auto two = j + 1 < n ? columns<V, stored>(v, token + a.values.stride, k, count) : V::zeros();
      typename V::Pair pair[4];
      V::pairs(one, two, pair);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) V::store_pairs(to + j / 2 * ldo + k + 16 * i, pair[i]);
    }
  }
}

// sums[r * ldc + j] (+)= the products of `count` pairs, those of row r, ld halves apart, with those in `right`, for j < 32.
template <Vector V, int M, bool add>
void multiply_pairs(const uint16_t* left, int64_t ld, const uint32_t* right, int64_t ldr, int64_t count, float* sums,
                    int64_t ldc) {
  typename V::Acc sum[M * 2];
#pragma GCC unroll 16
  for (int i = 0; i < M * 2; ++i) sum[i] = add ? V::load_sum(sums + i / 2 * ldc + i % 2 * 16) : V::zero();
  for (int64_t p = 0; p < count; ++p) {
    const auto one = V::load_pairs(right + p * ldr), two = V::load_pairs(right + p * ldr + 16);
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
      const auto with = V::repeat(left + r * ld + 2 * p);
      sum[2 * r] = V::dot(sum[2 * r], one, with);
      sum[2 * r + 1] = V::dot(sum[2 * r + 1], two, with);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M * 2; ++i) V::store_sum(sums + i / 2 * ldc + i % 2 * 16, sum[i]);
}

// Calls body<M>(row) for all rows, Most, …, 4, 2 or 1 of them at a time.
template <int Most, class F>
void by_rows(int64_t rows, const F& body, int64_t r = 0) {
  for (; r + Most <= rows; r += Most) body.template operator()<Most>(r);
  if constexpr (Most > 1) by_rows<Most / 2>(rows, body, r);
}

// As dot_keys, for all queries.
template <Vector V, Stored stored>
void dot_pairs(const V& v, const Attention& a, int64_t begin, int64_t n, int64_t next, const uint16_t* queries, uint32_t* paired,
               float* scores) {
  const int64_t ldq = query_stride(a.keys.width);
  pair_keys<V, stored>(v, a, begin, n, next, paired);
  by_rows<8>(a.rows, [&]<int M>(int64_t r) {
    for (int64_t j = 0; j < kTokens; j += 32)
      multiply_pairs<V, M, false>(queries + r * ldq, ldq, paired + j, kTokens, (a.keys.width + 1) / 2, scores + r * kTokens + j,
                                  kTokens);
  });
  alignas(64) float factors[kTokens];
  for (int64_t j = 0; j < kTokens; ++j) factors[j] = j < n ? factor<V, stored>(a.keys, begin + j) * a.scale : 0;
  for (int64_t r = 0; r < a.rows; ++r)
    for (int64_t j = 0; j < kTokens; ++j) scores[r * kTokens + j] *= factors[j];
}

// Queries as `dot_keys` takes them.
template <Vector V, Stored stored>
const typename V::X* prepared(const Attention& a) {
  if constexpr (!kPairs<V>) {
    return a.queries;
  } else {
    static thread_local Buffer buffer;
    const int64_t ldq = query_stride(a.keys.width);
    auto* to = static_cast<uint16_t*>(buffer.get(a.rows * ldq * 2));
    alignas(64) uint16_t chunk[V::step];
    for (int64_t k = 0; k < a.rows * ldq; k += V::step) {
      for (int i = 0; i < V::step; ++i) chunk[i] = bf16_of_float(a.queries[k + i]);
      if (stored == Stored::fp8 && a.rows < kMany)
        V::arrange(chunk, to + k);
      else
        std::memcpy(to + k, chunk, sizeof(chunk));
    }
    return to;
  }
}

template <Vector V, Stored stored>
void attend(const Attention& a, const int64_t* blocks, int64_t count, float* out, float* most, float* sum) {
  const V v;
  const int64_t ldq = query_stride(a.keys.width), width = a.values.width, ldo = query_stride(width);
  const typename V::X* queries = prepared<V, stored>(a);
  alignas(64) float scores[kQueries * kTokens], factors[kTokens];
  alignas(64) uint16_t halves[kPairs<V> ? kQueries * kTokens : 1];
  static thread_local Buffer buffer;
  auto* paired = static_cast<uint32_t*>(kPairs<V> ? buffer.get((ldq + ldo) * kTokens / 2 * 4) : nullptr);
  alignas(64) float sums[kQueries][16] = {};  // in lanes: each block adds to all of them, and only the end adds them up
  for (int64_t r = 0; r < a.rows; ++r) most[r] = -kInfinity;
  std::memset(out, 0, a.rows * ldo * sizeof(float));
  for (int64_t b = 0; b < count; ++b) {
    const int64_t begin = blocks[b] * kTokens, n = a.length - begin < kTokens ? a.length - begin : kTokens;
    const int64_t next = blocks[b + 1 < count ? b + 1 : b] * kTokens;
    bool dotted = false;
    if constexpr (kPairs<V>) {
      if (a.rows >= kMany) {
        dot_pairs<V, stored>(v, a, begin, n, next, queries, paired, scores);
        dotted = true;
      }
    }
    if (!dotted)
      by_rows<8>(a.rows,
                 [&]<int M>(int64_t r) { dot_keys<V, stored, M>(v, a, begin, n, queries + r * ldq, scores + r * kTokens); });
    for (int64_t j = 0; j < n; ++j) factors[j] = factor<V, stored>(a.values, begin + j);
    for (int64_t r = 0; r < a.rows; ++r) {
      float* s = scores + r * kTokens;
      for (int64_t j = n; j < kTokens; ++j) s[j] = -kInfinity;
      if (a.mask) {
        for (int64_t j = 0; j < n; ++j) s[j] += a.mask[r][begin + j];
      }
      float larger = most[r];
#pragma omp simd reduction(max : larger)
      for (int64_t j = 0; j < kTokens; ++j) larger = s[j] > larger ? s[j] : larger;
      const float base = larger == -kInfinity ? 0.f : larger;  // of a query that has seen nothing yet
      const float shrink = larger == most[r] ? 1.f : exp_of(most[r] - base);
      for (float& lane : sums[r]) lane *= shrink;
      for (int64_t j = 0; j < kTokens; j += 16)
        for (int i = 0; i < 16; ++i) {
          s[j + i] = exp_of(s[j + i] - base);
          sums[r][i] += s[j + i];
        }
      most[r] = larger;
      if (shrink != 1.f) {
        for (int64_t k = 0; k < ldo; ++k) out[r * ldo + k] *= shrink;
      }
      if constexpr (stored == Stored::fp8) {
        for (int64_t j = 0; j < n; ++j) s[j] *= factors[j];
      }
    }
    if constexpr (kPairs<V>) {
      for (int64_t i = 0; i < a.rows * kTokens; ++i) halves[i] = bf16_of_float(scores[i]);
      pair_values<V, stored>(v, a, begin, n, next, paired);
      by_rows<8>(a.rows, [&]<int M>(int64_t r) {
        for (int64_t k = 0; k < ldo; k += 32)
          multiply_pairs<V, M, true>(halves + r * kTokens, kTokens, paired + k, ldo, (n + 1) / 2, out + r * ldo + k, ldo);
      });
    } else {
      by_rows<8>(a.rows,
                 [&]<int M>(int64_t r) { add_values<V, stored, M>(v, a, begin, n, scores + r * kTokens, out + r * ldo); });
    }
  }
  for (int64_t r = 0; r < a.rows; ++r) {
    sum[r] = 0;
    for (float lane : sums[r]) sum[r] += lane;
  }
  if constexpr (kPairs<V>) {
    for (int64_t k = 0; k < a.rows * ldo; k += V::step) V::in_order(out + k, stored == Stored::fp8);
  }
}

template <Vector V>
void attention(const Attention& a, const int64_t* blocks, int64_t count, float* out, float* most, float* sum) {
  if (a.stored == Stored::fp8)
    attend<V, Stored::fp8>(a, blocks, count, out, most, sum);
  else if (a.stored == Stored::bf16)
    attend<V, Stored::bf16>(a, blocks, count, out, most, sum);
  else if constexpr (!kPairs<V>)
    attend<V, Stored::f32>(a, blocks, count, out, most, sum);
}

}  // namespace
}  // namespace ctfp8
