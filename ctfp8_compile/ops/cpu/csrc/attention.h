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
  if constexpr (stored == Stored::codes) {
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
  if constexpr (stored != Stored::codes) return 1.f;
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

// The same for N chunks of pairs of tokens; columns are left in the order in which `pairs` gives them.
template <Vector V, Stored stored, int M, int N>
void add_pairs(const V& v, const Attention& a, int64_t begin, int64_t n, const uint16_t* weights, int64_t k, float* out) {
  const int64_t width = a.values.width, ldo = query_stride(width);
  constexpr int kParts = 4;
  typename V::Acc sum[M * N * kParts];
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < N * kParts; ++i) sum[r * N * kParts + i] = V::load_sum(out + r * ldo + k + i * 16);
  const auto add = [&](auto&& count) __attribute__((always_inline)) {
    for (int64_t j = 0; j < n; j += 2) {
      const char* token = a.values.first + (begin + j) * a.values.stride;
#pragma GCC unroll 16
      for (int c = 0; c < N; ++c) {
        const auto one = columns<V, stored>(v, token, k + c * V::step, count(c));
        const auto two = j + 1 < n ? columns<V, stored>(v, token + a.values.stride, k + c * V::step, count(c)) : V::zeros();
        typename V::Pair pair[kParts];
        V::pairs(one, two, pair);
#pragma GCC unroll 16
        for (int i = 0; i < kParts; ++i)
#pragma GCC unroll 16
          for (int r = 0; r < M; ++r) {
            auto& to = sum[(r * N + c) * kParts + i];
            to = V::dot(to, pair[i], V::repeat(weights + r * kTokens + j));
          }
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
    for (int i = 0; i < N * kParts; ++i) V::store_sum(out + r * ldo + k + i * 16, sum[r * N * kParts + i]);
}

// Calls body<M>(row) for all rows, Most, …, 4, 2 or 1 of them at a time.
template <int Most, class F>
void by_rows(int64_t rows, const F& body, int64_t r = 0) {
  for (; r + Most <= rows; r += Most) body.template operator()<Most>(r);
  if constexpr (Most > 1) by_rows<Most / 2>(rows, body, r);
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
      if constexpr (stored == Stored::codes)
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
  for (int64_t r = 0; r < a.rows; ++r) most[r] = -kInfinity, sum[r] = 0;
  std::memset(out, 0, a.rows * ldo * sizeof(float));
  for (int64_t b = 0; b < count; ++b) {
    const int64_t begin = blocks[b] * kTokens, n = a.length - begin < kTokens ? a.length - begin : kTokens;
    by_rows<8>(a.rows,
               [&]<int M>(int64_t r) { dot_keys<V, stored, M>(v, a, begin, n, queries + r * ldq, scores + r * kTokens); });
    for (int64_t j = 0; j < n; ++j) factors[j] = factor<V, stored>(a.values, begin + j);
    for (int64_t r = 0; r < a.rows; ++r) {
      float* s = scores + r * kTokens;
      float top[16], total[16] = {};  // lanes, so that the compiler may vectorise
      for (int64_t j = n; j < kTokens; ++j) s[j] = -kInfinity;
      if (a.mask) {
        for (int64_t j = 0; j < n; ++j) s[j] += a.mask[r][begin + j];
      }
      for (int i = 0; i < 16; ++i) top[i] = most[r];
      for (int64_t j = 0; j < kTokens; j += 16)
        for (int i = 0; i < 16; ++i) top[i] = s[j + i] > top[i] ? s[j + i] : top[i];
      float larger = top[0];
      for (float lane : top) larger = lane > larger ? lane : larger;
      const float base = larger == -kInfinity ? 0.f : larger;  // of a query that has seen nothing yet
      for (int64_t j = 0; j < kTokens; j += 16) {
        for (int i = 0; i < 16; ++i) {
          s[j + i] = exp_of(s[j + i] - base);
          total[i] += s[j + i];
        }
      }
      float added = 0;
      for (float lane : total) added += lane;
      const float shrink = exp_of(most[r] - base);
      sum[r] = sum[r] * shrink + added;
      most[r] = larger;
      if (shrink != 1.f) {
        for (int64_t k = 0; k < ldo; ++k) out[r * ldo + k] *= shrink;
      }
      if constexpr (stored == Stored::codes) {
        for (int64_t j = 0; j < n; ++j) s[j] *= factors[j];
      }
    }
    if constexpr (kPairs<V>) {
      for (int64_t i = 0; i < a.rows * kTokens; ++i) halves[i] = bf16_of_float(scores[i]);
      by_rows<4>(a.rows, [&]<int M>(int64_t r) {
        const uint16_t* weights = halves + r * kTokens;
        int64_t k = 0;
        for (; k + 4 / M * V::step <= width; k += 4 / M * V::step)
          add_pairs<V, stored, M, 4 / M>(v, a, begin, n, weights, k, out + r * ldo);
        for (; k < width; k += V::step) add_pairs<V, stored, M, 1>(v, a, begin, n, weights, k, out + r * ldo);
      });
    } else {
      by_rows<8>(a.rows,
                 [&]<int M>(int64_t r) { add_values<V, stored, M>(v, a, begin, n, scores + r * kTokens, out + r * ldo); });
    }
  }
  if constexpr (kPairs<V>) {
    for (int64_t k = 0; k < a.rows * ldo; k += V::step) V::in_order(out + k, stored == Stored::codes);
  }
}

template <Vector V>
void attention(const Attention& a, const int64_t* blocks, int64_t count, float* out, float* most, float* sum) {
  if (a.stored == Stored::codes)
    attend<V, Stored::codes>(a, blocks, count, out, most, sum);
  else if (a.stored == Stored::bf16)
    attend<V, Stored::bf16>(a, blocks, count, out, most, sum);
  else if constexpr (!kPairs<V>)
    attend<V, Stored::f32>(a, blocks, count, out, most, sum);
}

}  // namespace
}  // namespace ctfp8
