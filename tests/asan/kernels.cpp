// Every kernel of every instruction set of this CPU on odd shapes, each array ending at the end of its allocation, for
// AddressSanitizer; results are checked against double arithmetic. Built and run by tests/ops/test_cpu_kernels.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "decode.h"
#include "kernels.h"

using namespace ctfp8;

namespace {

struct Shape {
  int64_t m, n, cols, block;
};

// False if a result is off by more than float32 accumulation explains.
bool run(const Kernels& kernels, const Shape& s) {
  const int64_t segments = (s.cols + s.block - 1) / s.block;
  // at an odd address, as a memory-mapped file may give it
  auto* allocation = static_cast<uint8_t*>(malloc(s.n * s.cols + 1));
  uint8_t* codes = allocation + 1;
  for (int64_t i = 0; i < s.n * s.cols; ++i) codes[i] = rand() % 120 | (rand() & 128);
  std::vector<float> scale(s.n * segments);
  for (float& value : scale) value = (rand() % 100 + 1) / 100.f;
  const Weight w{codes, s.cols, scale.data(), segments, s.n, s.cols, 1, s.block, segments};

  std::vector<char> x(s.m * s.cols * kernels.item);
  std::vector<double> exact(s.m * s.cols);
  for (int64_t i = 0; i < s.m * s.cols; ++i) {
    const float value = (rand() % 17 - 8) / 4.f;
    exact[i] = value;
    if (kernels.item == 2) {
      reinterpret_cast<uint16_t*>(x.data())[i] = bf16_of_float(value);
    } else {
      reinterpret_cast<float*>(x.data())[i] = value;
    }
  }
  void* prepared = aligned_alloc(64, (kernels.bytes(w, s.m) + 63) / 64 * 64);
  for (int64_t i = 0; i < s.m; i += 16) {
    const void* rows[16];
    const int64_t count = s.m - i < 16 ? s.m - i : 16;
    for (int64_t j = 0; j < count; ++j) rows[j] = x.data() + (i + j) * s.cols * kernels.item;
    kernels.prepare(w, rows, i, count, s.m, prepared);
  }
  auto* y = static_cast<float*>(malloc(s.m * s.n * sizeof(float)));
  kernels.matmul(w, 0, s.n, prepared, s.m, y, s.n);

  bool right = true;
  for (int64_t i = 0; i < s.m; i += 3) {
    for (int64_t r = 0; r < s.n; r += 5) {
      double sum = 0, size = 0;
      for (int64_t j = 0; j < s.cols; ++j) {
        const double term = exact[i * s.cols + j] * tables.value[codes[r * s.cols + j]] * scale[r * segments + j / s.block];
        sum += term;
        size += std::fabs(term);
      }
      right = right && std::fabs(sum - y[i * s.n + r]) <= 1e-5 * size + 1e-6;
    }
  }
  auto* out = static_cast<uint16_t*>(malloc(s.n * sizeof(uint16_t)));
  kernels.finish(y, y, s.n, out, Dtype::bf16);
  if (kernels.dequantize) {
    auto* row = static_cast<float*>(malloc(s.cols * sizeof(float)));
    kernels.dequantize(w, s.n - 1, row);
    free(row);
  }
  free(out);
  free(y);
  free(prepared);
  free(allocation);
  return right;
}

// Attention over all blocks of a cache but the first, where it has several.
bool attend(const Kernels& kernels, Stored stored, bool scaled, int64_t rows, int64_t length, int64_t width) {
  const int64_t item = stored == Stored::f32    ? 4
                       : stored == Stored::bf16 ? 2
                                                : 1,
                stride = (width + (item == 1 && !scaled)) * item;
  auto* keys = static_cast<uint8_t*>(malloc(length * stride));
  auto* values = static_cast<uint8_t*>(malloc(length * stride));
  const float scale = 0.125f;
  std::vector<double> exact(2 * length * width);
  for (uint8_t* to : {keys, values}) {
    for (int64_t j = 0; j < length; ++j) {
      for (int64_t k = 0; k < width; ++k) {
        double& number = exact[((to == values) * length + j) * width + k];
        const float value = (rand() % 17 - 8) / 8.f;
        const uint8_t code = rand() % 64 | (rand() & 128);
        uint8_t* at = to + j * stride + k * item;
        number = item == 1 ? tables.value[code] * (scaled ? scale : 2.) : value;
        if (item == 1) *at = code;
        if (item == 2) *reinterpret_cast<uint16_t*>(at) = bf16_of_float(value);
        if (item == 4) *reinterpret_cast<float*>(at) = value;
      }
      if (item == 1 && !scaled) to[j * stride + width] = 128;
    }
  }
  const int64_t ldq = query_stride(width);
  auto* queries = static_cast<float*>(aligned_alloc(64, rows * ldq * sizeof(float)));
  for (int64_t i = 0; i < rows * ldq; ++i) queries[i] = i % ldq < width ? (rand() % 9 - 4) / 8.f : 0.f;
  auto* mask = static_cast<float*>(malloc(length * sizeof(float)));
  for (int64_t j = 0; j < length; ++j) mask[j] = rand() % 3 ? 0.f : -__builtin_inff();
  std::vector<const float*> masks(rows, mask);
  std::vector<int64_t> blocks;
  for (int64_t b = length > kTokens ? 1 : 0; b * kTokens < length; ++b) blocks.push_back(b);
  auto* out = static_cast<float*>(malloc(rows * ldq * sizeof(float)));
  std::vector<float> most(rows), sum(rows);
  const char *k = reinterpret_cast<char*>(keys), *v = reinterpret_cast<char*>(values);
  const Attention problem{stored,
                          {k, stride, width, scaled ? &scale : nullptr},
                          {v, stride, width, scaled ? &scale : nullptr},
                          length,
                          rows,
                          queries,
                          masks.data()};
  kernels.attention(problem, blocks.data(), static_cast<int64_t>(blocks.size()), out, most.data(), sum.data());
  bool right = true;
  for (int64_t r = 0; r < rows; ++r) {
    double total = 0;
    std::vector<double> expected(width);
    for (int64_t j = blocks[0] * kTokens; j < length; ++j) {
      double score = mask[j];
      for (int64_t c = 0; c < width; ++c) score += exact[j * width + c] * queries[r * ldq + c];
      const double weight = mask[j] == 0 ? std::exp(score - most[r]) : 0;
      total += weight;
      for (int64_t c = 0; c < width; ++c) expected[c] += weight * exact[(length + j) * width + c];
    }
    right = right && std::fabs(total - sum[r]) <= 1e-4 * total;
    for (int64_t c = 0; c < width; ++c) right = right && std::fabs(expected[c] - out[r * ldq + c]) <= 1e-4 * (total * 8 + 1);
  }
  for (void* p : {static_cast<void*>(keys), static_cast<void*>(values), static_cast<void*>(queries), static_cast<void*>(mask),
                  static_cast<void*>(out)})
    free(p);
  return right;
}

}  // namespace

int main() {
  long cases = 0;
  for (const Kernels* kernels : {avx512(), avx2(), portable()}) {
    if (!kernels) continue;
    for (int64_t rows : {1, 3, 15, 64}) {
      for (int64_t length : {1, 63, 65, 200}) {
        for (int64_t width : {1, 8, 15, 33, 80}) {
          for (const auto& [stored, scaled] : {std::pair{Stored::f32, false}, std::pair{Stored::bf16, false},
                                               std::pair{Stored::codes, false}, std::pair{Stored::codes, true}}) {
            if (!attend(*kernels, stored, scaled, rows, length, width)) {
              std::printf("wrong: %s, attention, stored %d, rows %ld, length %ld, width %ld\n", kernels->name, int(stored),
                          long(rows), long(length), long(width));
              return 1;
            }
            ++cases;
          }
        }
      }
    }
  }
  for (const Kernels* kernels : {avx512_bf16(), avx512(), avx2(), portable()}) {
    if (!kernels) continue;
    for (int64_t m : {1, 2, 3, 5, 8, 9, 11, 13, 16, 17, 24, 32, 33, 64, 70, 130}) {
      for (int64_t n : {1, 2, 3, 8, 15, 33, 97}) {
        for (int64_t cols : {1, 2, 7, 15, 16, 17, 63, 64, 65, 127, 129, 300, 1100}) {
          for (int64_t block : {int64_t{1}, int64_t{7}, int64_t{128}, int64_t{1030}, cols}) {
            if (block > cols || (block < 128 && cols > 300) || (block == 1 && cols > 17) || (cols > 300 && n > 15)) continue;
            if (!run(*kernels, {m, n, cols, block})) {
              std::printf("wrong: %s, m %ld, n %ld, cols %ld, block %ld\n", kernels->name, long(m), long(n), long(cols),
                          long(block));
              return 1;
            }
            ++cases;
          }
        }
      }
    }
  }
  std::printf("%ld cases, no fault\n", cases);
}
