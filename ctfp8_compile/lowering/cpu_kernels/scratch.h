// Memory that a thread keeps from call to call, so that the hot path allocates nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace ctfp8 {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Room for n elements, on a cache line of its own; what was there before is lost.
  template <class T>
  T* get(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 127) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

  // Gives back what only a long prompt needed.
  void trim() {
    if (size_ <= (size_t{16} << 20)) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace ctfp8
