// Any CPU: plain C++ that the compiler vectorises for the baseline instruction set.
#include "table.h"

namespace ctfp8 {
namespace {

struct Portable {
  using X = float;
  struct Acc {
    float lane[8];
  };
  using Chunk = Acc;
  static constexpr int step = 8, registers = 8, constants = 0, parts = 1, ahead = 256, in_turn = 0;
  static constexpr float gain = 1;

  static void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
  static void prefetch_once(const uint8_t* p) { prefetch(p); }
  static Acc zero() { return {}; }
  static Chunk zeros() { return {}; }
  Chunk decode(const uint8_t* p) const {
    Chunk chunk;
    for (int i = 0; i < step; ++i) chunk.lane[i] = tables.value[p[i]];
    return chunk;
  }
  Chunk decode_tail(const uint8_t* p, int n) const {
    Chunk chunk = {};
    for (int i = 0; i < n; ++i) chunk.lane[i] = tables.value[p[i]];
    return chunk;
  }
  static void hold(Chunk&) {}
  static Chunk load(const X* p) {
    Chunk chunk;
    std::memcpy(&chunk, p, sizeof(chunk));
    return chunk;
  }
  static Chunk widen(const uint16_t* p) {
    Chunk chunk;
    for (int i = 0; i < step; ++i) chunk.lane[i] = float_of_bits(uint32_t{p[i]} << 16);
    return chunk;
  }
  static void store(X* p, Chunk chunk) { std::memcpy(p, &chunk, sizeof(chunk)); }
  static Acc dot(Acc sum, const Chunk& w, const Chunk& x) {
    for (int i = 0; i < step; ++i) sum.lane[i] += w.lane[i] * x.lane[i];
    return sum;
  }
  static Acc scale_add(Acc total, const Acc& sum, float scale) {
    for (int i = 0; i < step; ++i) total.lane[i] += sum.lane[i] * scale;
    return total;
  }
  static Chunk shift(const Chunk& chunk, const uint8_t* e, bool) { return times(chunk, float_of_exponent(*e)); }
  static Chunk times(Chunk chunk, float scale) {
    for (float& lane : chunk.lane) lane *= scale;
    return chunk;
  }
  static float reduce(const Acc& sum) {
    float total = 0;
    for (float lane : sum.lane) total += lane;
    return total;
  }
  static void arrange(const X* from, X* to) { std::memcpy(to, from, step * sizeof(X)); }
  static void round_f16(const float* row, const float* bias, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = f16_of_float(bias ? row[i] + bias[i] : row[i]);
  }
};

}  // namespace

const Kernels* portable() {
  using V = Portable;
  static const Kernels kernels = {"portable", 4,         kTileCols,     bytes<V>,    prepare<V>,
                                  matmul<V>,  finish<V>, dequantize<V>, attention<V>};
  return &kernels;
}

}  // namespace ctfp8
