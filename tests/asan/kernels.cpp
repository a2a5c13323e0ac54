// Every kernel of every instruction set of this CPU on odd shapes, each array ending at the end of its allocation, for
// AddressSanitizer; results are checked against double arithmetic. Built and run by tests/ops/test_cpu_kernels.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
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

}  // namespace

int main() {
  long cases = 0;
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
