// Every kernel of every instruction set of this CPU on odd shapes, each array ending where its memory ends; results are checked
// against double arithmetic. Built and run by tests/ops/test_cpu_kernels.py, under AddressSanitizer, and by
// tests/ops/test_emulated_kernels.py, for another processor.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "decode.h"
#include "kernels.h"

using namespace ctfp8;

namespace {

// AddressSanitizer watches both ends of what malloc gives; without it, the page behind the array cannot be read.
template <class T>
class Array {
 public:
  explicit Array(int64_t n) : bytes_(n * static_cast<int64_t>(sizeof(T))) {
#if defined(__SANITIZE_ADDRESS__)
    memory_ = data_ = static_cast<char*>(aligned_alloc(alignof(T), (bytes_ + alignof(T) - 1) / alignof(T) * alignof(T)));
#else
    pages_ = (bytes_ + kPage - 1) / kPage * kPage;
    memory_ = static_cast<char*>(mmap(nullptr, pages_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_ + pages_, kPage, PROT_NONE) != 0) std::abort();
    data_ = memory_ + pages_ - bytes_;
#endif
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() {
#if defined(__SANITIZE_ADDRESS__)
    free(memory_);
#else
    munmap(memory_, pages_ + kPage);
#endif
  }
  T* data() const { return reinterpret_cast<T*>(data_); }
  T& operator[](int64_t i) const { return data()[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + bytes_ / static_cast<int64_t>(sizeof(T)); }

 private:
  static constexpr int64_t kPage = 65536;  // at least a page, whatever the processor
  int64_t bytes_, pages_ = 0;
  char *memory_, *data_;
};

struct alignas(64) Line {
  char bytes[64];
};

struct Shape {
  int64_t m, n, cols, block;  // a block of 0: a byte of scale for 32 columns
};

// What `Kernels` wants of activations: bfloat16 or float32.
void store(const Kernels& kernels, char* x, int64_t i, float value) {
  if (kernels.item == 2) {
    const uint16_t bits = bf16_of_float(value);
    std::memcpy(x + i * 2, &bits, 2);
  } else {
    std::memcpy(x + i * 4, &value, 4);
  }
}

void multiply(const Kernels& kernels, const Weight& w, const char* x, int64_t m, float* y) {
  const Array<Line> prepared((kernels.bytes(w, m) + 63) / 64);
  for (int64_t i = 0; i < m; i += 16) {
    const void* rows[16];
    const int64_t count = m - i < 16 ? m - i : 16;
    for (int64_t j = 0; j < count; ++j) rows[j] = x + (i + j) * w.cols * kernels.item;
    kernels.prepare(w, rows, i, count, m, prepared.data());
  }
  kernels.matmul(w, 0, w.rows, prepared.data(), m, y, w.rows);
}

// False if a result is off by more than float32 accumulation explains.
bool run(const Kernels& kernels, const Shape& s) {
  const bool bytes = s.block == 0;
  const int64_t width = bytes ? kMxCols : s.block, segments = (s.cols + width - 1) / width;
  const Array<uint8_t> allocation(s.n * s.cols + 1);
  uint8_t* fp8 = allocation.data() + 1;  // at an odd address, as a memory-mapped file may give it
  const bool normal = rand() % 2;        // or zero: runs of those have a path of their own
  for (int64_t i = 0; i < s.n * s.cols; ++i) {
    fp8[i] = normal ? 8 + rand() % 112 : rand() % 120;
    fp8[i] = normal && rand() % 9 == 0 ? 0 : fp8[i] | (rand() & 128);
  }
  const Array<float> scale(s.n * segments);
  const Array<uint8_t> exponents(s.n * segments);
  for (int64_t i = 0; i < s.n * segments; ++i) {
    exponents[i] = 115 + rand() % 20;
    scale[i] = bytes ? float_of_exponent(exponents[i]) : (rand() % 100 + 1) / 100.f;
  }
  const float one = 1;
  const Weight w = bytes ? Weight{fp8, s.cols, &one, 0, s.n, s.cols, 1, s.cols, 1, exponents.data(), segments}
                         : Weight{fp8, s.cols, scale.data(), segments, s.n, s.cols, 1, s.block, segments};
  const Array<char> x(s.m * s.cols * kernels.item);
  std::vector<double> exact(s.m * s.cols);
  for (int64_t i = 0; i < s.m * s.cols; ++i) {
    const float value = (rand() % 17 - 8) / 4.f;
    exact[i] = value;
    store(kernels, x.data(), i, value);
  }
  const Array<float> y(s.m * s.n);
  multiply(kernels, w, x.data(), s.m, y.data());

  bool right = true;
  for (int64_t i = 0; i < s.m; i += 3) {
    for (int64_t r = 0; r < s.n; r += 5) {
      double sum = 0, size = 0;
      for (int64_t j = 0; j < s.cols; ++j) {
        const double term = exact[i * s.cols + j] * tables.value[fp8[r * s.cols + j]] * scale[r * segments + j / width];
        sum += term;
        size += std::fabs(term);
      }
      right = right && std::fabs(sum - y[i * s.n + r]) <= 1e-5 * size + 1e-6;
    }
  }
  const Array<uint16_t> out(s.n);
  kernels.finish(y.data(), y.data(), s.n, out.data(), Dtype::bf16);
  for (int64_t r = 0; r < s.n; ++r) right = right && out[r] == bf16_of_float(y[r] + y[r]);
  if (!kernels.dequantize) return right;
  kernels.finish(y.data(), nullptr, s.n, out.data(), Dtype::f16);
  for (int64_t r = 0; r < s.n; ++r) right = right && out[r] == f16_of_float(y[r]);
  const Array<float> row(s.cols);
  kernels.dequantize(w, s.n - 1, row.data());
  for (int64_t j = 0; j < s.cols; ++j) {
    const float value = tables.value[fp8[(s.n - 1) * s.cols + j]] * scale[(s.n - 1) * segments + j / width];
    right = right && row[j] == value;
  }
  return right;
}

// A weight that is bfloat16 itself, in two parts.
bool dense(const Kernels& kernels, int64_t m, int64_t n, int64_t cols) {
  const Array<uint16_t> weight(n * cols), activations(m * cols);
  for (const Array<uint16_t>* array : {&weight, &activations}) {
    for (uint16_t& value : *array) value = bf16_of_float((rand() % 17 - 8) / 4.f);
  }
  const uint16_t* x[kDenseRows];
  for (int64_t i = 0; i < m; ++i) x[i] = activations.data() + i * cols;
  const Array<float> y(m * n);
  const int64_t half = n / 2;
  kernels.dense({weight.data(), cols, cols}, 0, half, x, m, y.data(), n);
  kernels.dense({weight.data(), cols, cols}, half, n, x, m, y.data() + half, n);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t r = 0; r < n; ++r) {
      double sum = 0;
      for (int64_t j = 0; j < cols; ++j) {
        sum += double{float_of_bits(weight[r * cols + j] << 16)} * float_of_bits(x[i][j] << 16);
      }
      if (std::fabs(sum - y[i * n + r]) > 1e-5 * cols) return false;
    }
  }
  return true;
}

// Whether each FP8 value, NaN among them, times one is its value, at each of some places of a chunk.
bool every_value(const Kernels& kernels, int64_t m) {
  constexpr int64_t cols = 101;
  const float one = 1;
  for (int64_t place : {0, 7, 8, 15, 16, 33, 63, 64, 100}) {
    const Array<uint8_t> fp8(256 * cols);
    const Array<char> x(m * cols * kernels.item);
    std::memset(fp8.data(), 0, 256 * cols);
    std::memset(x.data(), 0, m * cols * kernels.item);
    for (int64_t byte = 0; byte < 256; ++byte) fp8[byte * cols + place] = static_cast<uint8_t>(byte);
    for (int64_t i = 0; i < m; ++i) store(kernels, x.data(), i * cols + place, 1);
    const Array<float> y(m * 256);
    multiply(kernels, {fp8.data(), cols, &one, 0, 256, cols, 1, cols, 1}, x.data(), m, y.data());
    for (int64_t i = 0; i < m * 256; ++i) {
      const float value = tables.value[i % 256];
      if (!(y[i] == value || (std::isnan(y[i]) && std::isnan(value)))) return false;
    }
  }
  return true;
}

// Attention over all blocks of a cache but the first, where it has several.
bool attend(const Kernels& kernels, Stored stored, bool scaled, int64_t rows, int64_t length, int64_t width) {
  const int64_t item = stored == Stored::f32    ? 4
                       : stored == Stored::bf16 ? 2
                                                : 1,
                stride = (width + (item == 1 && !scaled)) * item;
  const Array<char> keys(length * stride), values(length * stride);
  const float scale = 0.125f;
  std::vector<double> exact(2 * length * width);
  for (char* to : {keys.data(), values.data()}) {
    for (int64_t j = 0; j < length; ++j) {
      for (int64_t k = 0; k < width; ++k) {
        double& number = exact[((to == values.data()) * length + j) * width + k];
        const float value = (rand() % 17 - 8) / 8.f;
        const uint16_t half = bf16_of_float(value);
        const uint8_t byte = rand() % 64 | (rand() & 128);
        char* at = to + j * stride + k * item;
        number = item == 1 ? tables.value[byte] * (scaled ? scale : 2.) : value;
        if (item == 1) *at = static_cast<char>(byte);
        if (item == 2) std::memcpy(at, &half, 2);
        if (item == 4) std::memcpy(at, &value, 4);
      }
      if (item == 1 && !scaled) to[j * stride + width] = static_cast<char>(128);
    }
  }
  const int64_t ldq = query_stride(width);
  const Array<Line> lines(rows * ldq / 16);
  auto* queries = reinterpret_cast<float*>(lines.data());
  for (int64_t i = 0; i < rows * ldq; ++i) queries[i] = i % ldq < width ? (rand() % 9 - 4) / 8.f : 0.f;
  const Array<float> mask(length), out(rows * ldq);
  for (float& added : mask) added = rand() % 3 ? 0.f : -__builtin_inff();
  std::vector<const float*> masks(rows, mask.data());
  std::vector<int64_t> blocks;
  for (int64_t b = length > kTokens ? 1 : 0; b * kTokens < length; ++b) blocks.push_back(b);
  std::vector<float> most(rows), sum(rows);
  const Attention problem{stored,
                          {keys.data(), stride, width, scaled ? &scale : nullptr},
                          {values.data(), stride, width, scaled ? &scale : nullptr},
                          length,
                          rows,
                          queries,
                          0.5f,
                          masks.data()};
  kernels.attention(problem, blocks.data(), static_cast<int64_t>(blocks.size()), out.data(), most.data(), sum.data());
  // weights of the softmax are rounded where queries are bfloat16; numbers are below 4
  const double allowed = kernels.item == 2 ? 1e-2 : 8e-4;
  bool right = true;
  for (int64_t r = 0; r < rows; ++r) {
    double total = 0;
    std::vector<double> expected(width);
    for (int64_t j = blocks[0] * kTokens; j < length; ++j) {
      double score = mask[j];
      for (int64_t c = 0; c < width; ++c) score += exact[j * width + c] * queries[r * ldq + c] * 0.5;
      const double weight = mask[j] == 0 ? std::exp(score - most[r]) : 0;
      total += weight;
      for (int64_t c = 0; c < width; ++c) expected[c] += weight * exact[(length + j) * width + c];
    }
    right = right && std::fabs(total - sum[r]) <= 1e-4 * total;
    for (int64_t c = 0; c < width; ++c) right = right && std::fabs(expected[c] - out[r * ldq + c]) <= allowed * total + 1e-4;
  }
  return right;
}

long cases = 0;

bool attention(const Kernels& kernels) {
  for (int64_t rows : {1, 3, 15, 64}) {
    for (int64_t length : {1, 63, 65, 200}) {
      for (int64_t width : {1, 8, 15, 33, 80, 300}) {
        for (const auto& [stored, scaled] : {std::pair{Stored::f32, false}, std::pair{Stored::bf16, false},
                                             std::pair{Stored::fp8, false}, std::pair{Stored::fp8, true}}) {
          if (stored == Stored::f32 && kernels.item == 2) continue;
          ++cases;
          if (attend(kernels, stored, scaled, rows, length, width)) continue;
          std::printf("wrong: %s, attention, stored %d, rows %ld, length %ld, width %ld\n", kernels.name, int(stored), long(rows),
                      long(length), long(width));
          return false;
        }
      }
    }
  }
  return true;
}

bool matmul(const Kernels& kernels) {
  for (int64_t m : {1, 2, 3, 4, 5, 8, 9, 11, 13, 16, 17, 24, 32, 33, 64, 70, 130}) {
    if (!every_value(kernels, m)) return std::printf("wrong: %s, the FP8 values, m %ld\n", kernels.name, long(m)), false;
    for (int64_t n : {1, 2, 3, 8, 15, 33, 97}) {
      for (int64_t cols : {1, 2, 7, 15, 16, 17, 63, 64, 65, 127, 129, 300, 1100, 5500}) {
        for (int64_t block : {int64_t{0}, int64_t{1}, int64_t{7}, int64_t{128}, int64_t{1030}, cols}) {
          if (block > cols || (block && block < 128 && cols > 300) || (block == 1 && cols > 17) || (cols > 300 && n > 15) ||
              (cols > 1100 && (n != 8 || m < 3 || m > 4)))  // more activations than `in_turn` takes
            continue;
          ++cases;
          if (run(kernels, {m, n, cols, block})) continue;
          std::printf("wrong: %s, m %ld, n %ld, cols %ld, block %ld\n", kernels.name, long(m), long(n), long(cols), long(block));
          return false;
        }
      }
    }
  }
  return true;
}

bool dense(const Kernels& kernels) {
  for (int64_t m = 1; m <= kDenseRows; ++m) {
    for (int64_t n : {1, 7, 8, 9, 16, 37}) {
      for (int64_t cols : {1, 2, 63, 64, 65, 127, 128, 129, 255, 300}) {
        ++cases;
        if (!dense(kernels, m, n, cols))
          return std::printf("wrong: dense, m %ld, n %ld, cols %ld\n", long(m), long(n), long(cols)), false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  for (const auto get : kAll) {
    const Kernels* kernels = get();
    if (!kernels) continue;
    if ((kernels->attention && !attention(*kernels)) || !matmul(*kernels) || (kernels->dense && !dense(*kernels))) return 1;
    std::printf("%s\n", kernels->name);
  }
  std::printf("%ld cases, no fault\n", cases);
}
