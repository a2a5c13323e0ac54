// The float32 kernels, written once over a vector type V; each instruction set's file includes this inside its own
// target region. V has
//   F, W, R                       a vector of W floats; rows of the weight that dot works on at a time
//   zero, set1, load, fma, mul, add, reduce
//   decode(p, out)                kChunk codes to kChunk / W vectors, exactly their values / kUnit
//   store(v, type, out)           W floats rounded to the type
//   widen(p, type)                W elements of the type as floats
#pragma once

#include <cstring>

#include "kernels.h"

namespace ctfp8 {

template <class V>
struct FloatImpl {
  using F = typename V::F;
  static constexpr int W = V::W;
  static constexpr int kVectors = kChunk / W;

  static void pack(const Columns& columns, const void* x, Type type, float* out) {
    const char* source = static_cast<const char*>(x);
    for (int64_t span = 0; span < columns.spans; ++span) {
      int64_t n = columns.length(span), done = n / W * W;
      const char* from = source + span * columns.block * size_of(type);
      float* to = out + span * columns.stride;
      for (int64_t i = 0; i < done; i += W) V::store(V::widen(from + i * size_of(type), type), Type::F32, to + i);
      if (done < n) {
        alignas(64) char rest[W * 4] = {};
        std::memcpy(rest, from + done * size_of(type), static_cast<size_t>((n - done) * size_of(type)));
        V::store(V::widen(rest, type), Type::F32, to + done);
        done += W;
      }
      std::memset(to + done, 0, static_cast<size_t>(round_up(n, kChunk) - done) * 4);
    }
  }

  template <int M, int R>
  static void dot_tile(const Dot& a, const float* x, int64_t n, float* out) {
    F total[R][M];
    for (auto& row : total)
      for (auto& v : row) v = V::zero();
    const uint8_t* codes = a.rows.row(n);
    for (int64_t span = 0; span < a.columns.spans; ++span) {
      F sum[R][M];
      for (auto& row : sum)
        for (auto& v : row) v = V::zero();
      const float* xs = x + span * a.columns.stride;
      const uint8_t* ws = codes + span * a.columns.block;
      int64_t length = a.columns.length(span), full = length / kChunk * kChunk;
      auto step = [&](const uint8_t* p, int64_t k, int r) __attribute__((always_inline)) {
        F w[kVectors];
        V::decode(p, w);
        for (int m = 0; m < M; ++m)
          for (int i = 0; i < kVectors; ++i)
            sum[r][m] = V::fma(w[i], V::load(xs + m * a.columns.packed + k + i * W), sum[r][m]);
      };
      for (int64_t k = 0; k < full; k += kChunk)
        for (int r = 0; r < R; ++r) {
          const uint8_t* p = ws + r * a.rows.stride + k;
          __builtin_prefetch(p + 512);
          step(p, k, r);
        }
      if (full < length)
        for (int r = 0; r < R; ++r) {
          alignas(64) uint8_t rest[kChunk] = {};
          std::memcpy(rest, ws + r * a.rows.stride + full, static_cast<size_t>(length - full));
          step(rest, full, r);
        }
      for (int r = 0; r < R; ++r) {
        F scale = V::set1(a.rows.scale(n + r, a.columns.spans)[span]);
        for (int m = 0; m < M; ++m)
          // One span: scale the finished sum instead, which rounds once.
          total[r][m] = a.columns.spans == 1 ? sum[r][m] : V::fma(scale, sum[r][m], total[r][m]);
      }
    }
    for (int r = 0; r < R; ++r) {
      float scale = a.columns.spans == 1 ? a.rows.scale(n + r, 1)[0] : 1.0f;
      for (int m = 0; m < M; ++m) out[m * a.out_stride + r] = V::reduce(total[r][m]) * V::kUnit * scale;
    }
  }

  template <int M>
  static void dot_rows(const Dot& a, const float* x, float* out) {
    int64_t n = a.rows.begin;
    for (; n + V::R <= a.rows.end; n += V::R) dot_tile<M, V::R>(a, x, n, out + n - a.rows.begin);
    for (; n < a.rows.end; ++n) dot_tile<M, 1>(a, x, n, out + n - a.rows.begin);
  }

  static void dot(const Dot& a) {
    for (int64_t m = 0; m < a.m;) {
      const float* x = static_cast<const float*>(a.x) + m * a.columns.packed;
      float* out = a.out + m * a.out_stride;
      int64_t left = a.m - m;
      if (left >= 4) dot_rows<4>(a, x, out), m += 4;
      else if (left >= 2) dot_rows<2>(a, x, out), m += 2;
      else dot_rows<1>(a, x, out), m += 1;
    }
  }

  static void dequantize(const uint8_t* codes, int64_t n, float scale, Type type, void* out) {
    char* to = static_cast<char*>(out);
    int64_t full = n / kChunk * kChunk, size = size_of(type);
    F unit = V::set1(V::kUnit), s = V::set1(scale), w[kVectors];
    // The unit first: a product of it and the scale could overflow, one with the code cannot.
    auto value = [&](int i) __attribute__((always_inline)) { return V::mul(V::mul(w[i], unit), s); };
    for (int64_t k = 0; k < full; k += kChunk) {
      V::decode(codes + k, w);
      for (int i = 0; i < kVectors; ++i) V::store(value(i), type, to + (k + i * W) * size);
    }
    if (full < n) {
      alignas(64) uint8_t rest[kChunk] = {};
      alignas(64) char values[kChunk * 4];
      std::memcpy(rest, codes + full, static_cast<size_t>(n - full));
      V::decode(rest, w);
      for (int i = 0; i < kVectors; ++i) V::store(value(i), type, values + i * W * size);
      std::memcpy(to + full * size, values, static_cast<size_t>((n - full) * size));
    }
  }

  static void store(const float* x, const float* bias, int64_t n, Type type, void* out) {
    char* to = static_cast<char*>(out);
    int64_t i = 0, size = size_of(type);
    for (; i + W <= n; i += W) {
      F v = V::load(x + i);
      V::store(bias ? V::add(v, V::load(bias + i)) : v, type, to + i * size);
    }
    if (i < n) {
      alignas(64) float rest[W] = {}, rest_bias[W] = {};
      alignas(64) char values[W * 4];
      std::memcpy(rest, x + i, static_cast<size_t>(n - i) * 4);
      if (bias) std::memcpy(rest_bias, bias + i, static_cast<size_t>(n - i) * 4);
      V::store(bias ? V::add(V::load(rest), V::load(rest_bias)) : V::load(rest), type, values);
      std::memcpy(to + i * size, values, static_cast<size_t>((n - i) * size));
    }
  }

  static constexpr FloatKernels table(const char* name) {
    return {name, V::kDotRows, pack, dot, dequantize, store};
  }
};

}  // namespace ctfp8
