// The contract of an instruction set: what each isa_*.cpp gives, as a class `V`, to the loops that are written once.
//
// `V` decodes FP8 values a chunk at a time and accumulates products of a weight chunk and an activation chunk in float32. A new
// instruction set is one file with such a class and an entry in the list of kernels.h.
#pragma once
#include <concepts>
#include <cstdint>

#include "kernels.h"

namespace ctfp8 {
namespace {

template <class V>
concept Vector =
    std::default_initializable<V> && requires(const V v, const uint8_t* fp8, const typename V::X* x, typename V::X* to,
                                              typename V::Acc sum, typename V::Chunk chunk, const float* row, uint16_t* halves) {
      // What an activation is multiplied as: float, or uint16_t for bfloat16.
      typename V::X;
      // Elements of a chunk: the stride of every loop over columns.
      { V::step } -> std::convertible_to<int>;
      // Vector registers that there are, those that constants of `decode` occupy, and those of one chunk.
      { V::registers + V::constants + V::parts } -> std::convertible_to<int>;
      // Bytes ahead of the FP8 values being read that are worth asking for.
      { V::ahead } -> std::convertible_to<int>;
      // Activations, at most, that each weight row may read again for weight rows to pass one by one; 0 where that is no faster.
      // A static `runs()` says whether this processor likes that at all: Intel's with bfloat16 like rows abreast.
      { V::in_turn } -> std::convertible_to<int>;
      // What `decode` divides values by; sums are multiplied with it once, together with the scale.
      { V::gain } -> std::convertible_to<float>;
      // Asks for a cache line of FP8 values in the second-level cache; any address is allowed.
      V::prefetch(fp8);
      // The same of one that is read once, and need not push anything out of larger caches: the code and data of all that runs
      // between two matmuls, which an interpreter has much of.
      V::prefetch_once(fp8);
      // `step` FP8 values from any address as a chunk of values / gain, exactly; NaN values give NaN.
      { v.decode(fp8) } -> std::same_as<typename V::Chunk>;
      // The same for the last n < step of them, the rest zero; reads nothing behind them.
      { v.decode_tail(fp8, int{}) } -> std::same_as<typename V::Chunk>;
      // Brings `step` activations into the order in which `decode` leaves FP8 values.
      V::arrange(x, to);
      // A chunk of activations as `arrange` left them.
      { V::load(x) } -> std::same_as<typename V::Chunk>;
      // Keeps a chunk in registers, where the compiler would read it again at each use.
      V::hold(chunk);
      // The values of 32 columns (the chunk has them once or twice) times 2^(e - 127) of their byte; a product that would be
      // too small may be another tiny number. `both` says whether the second byte is there.
      { V::shift(chunk, fp8, bool{}) } -> std::same_as<typename V::Chunk>;
      // A static `shift_dot(total, chunk, chunk, bytes)`, total + the products times those powers, is taken where there is one
      // and few rows of activations.
      // A sum of nothing.
      { V::zero() } -> std::same_as<typename V::Acc>;
      // sum + the products of two chunks, lane by lane, in float32.
      { V::dot(sum, chunk, chunk) } -> std::same_as<typename V::Acc>;
      // total + sum * scale.
      { V::scale_add(sum, sum, float{}) } -> std::same_as<typename V::Acc>;
      // The sum of the lanes. A static `reduce16(sums, results)`, which does sixteen at once, is taken where there is one.
      { V::reduce(sum) } -> std::same_as<float>;
      // out[i] = float16(row[i] + bias[i]), rounded to nearest even; bias may be null.
      V::round_f16(row, row, int64_t{}, halves);
    };

// Most FP8 values are normal numbers, which decode in fewer instructions: for few rows of activations `kPlain` of them are looked
// at together, and where all are normal, multiplied so.
constexpr int kPlain = 128;

template <class V>
concept PlainVector = Vector<V> && requires(typename V::Acc* sums, const uint8_t* fp8, const typename V::X* x) {
  // Whether all of `kPlain` FP8 values are normal.
  { V::plain(fp8) } -> std::same_as<bool>;
  // sums[i] += the products of `step` such values, times 2^(e - 127) of a byte if asked, with each of M rows of activations.
  V::template add_plain<1, true>(sums, fp8, x, int64_t{}, fp8);
};

// What `gemm` needs besides. Chunks have no more than 32 columns.
template <class V>
concept TileVector = Vector<V> && (V::step <= 32) && requires(typename V::X* to, typename V::Chunk chunk) {
  // Writes a chunk to where `load` reads it.
  V::store(to, chunk);
  // A chunk of zeros.
  { V::zeros() } -> std::same_as<typename V::Chunk>;
};

// A processor that multiplies pairs of rows at once, four columns of each: in memory, four of one row lie beside four of the
// other.
template <class V>
concept RowPairVector = TileVector<V> && requires(typename V::X* to, float* sums, typename V::Acc sum, typename V::Chunk chunk) {
  // Writes a chunk of one row of a pair, leaving the places of the other.
  V::store_half(to, chunk);
  // sum + [x0 w0, x0 w1, x1 w0, x1 w1], each a sum over four columns, of a pair of activation rows and one of weight rows.
  { V::multiply(sum, V::load_pair(to), V::load_pair(to)) } -> std::same_as<typename V::Acc>;
  // The four lanes of such a sum.
  V::store_sums(sums, sum);
};

// Chunks are float32 in the order of the columns: what `dequantize` and `attention` need besides.
template <class V>
concept FloatVector = TileVector<V> && std::same_as<typename V::X, float> && requires(typename V::Chunk chunk) {
  // `step` bfloat16 from any address.
  { V::widen(static_cast<const uint16_t*>(nullptr)) } -> std::same_as<typename V::Chunk>;
  // A chunk times a number.
  { V::times(chunk, float{}) } -> std::same_as<typename V::Chunk>;
};

}  // namespace
}  // namespace ctfp8
