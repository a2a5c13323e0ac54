// A block of scratch memory that grows and, up to a size, is kept: one per thread and use.
//
// Not std::vector: its members, instantiated in a file compiled for one instruction set, could be linked into all others.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace ctfp8 {
namespace {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // At least `bytes` bytes, aligned to a cache line. What was there before is lost.
  void* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, static_cast<size_t>(size_));
      if (!data_) std::abort();
    }
    return data_;
  }

  // At its end, what only a large call needs goes back to the system.
  struct Release {
    Buffer& buffer;
    ~Release() {
      if (buffer.size_ <= kKeep) return;
      std::free(buffer.data_);
      buffer.data_ = nullptr;
      buffer.size_ = 0;
    }
  };

 private:
  static constexpr int64_t kKeep = 8 << 20;

  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace
}  // namespace ctfp8
