// What the files of operators share: the instruction set that was chosen, and how work is shared by threads.
#pragma once
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "kernels.h"
#include "team.h"

namespace ctfp8 {

struct Selection {
  const Kernels* bf16;    // for bfloat16 activations
  const Kernels* others;  // for float32 and float16 activations, and for dequantize
};

Selection& selection();

// Frees what torch's brgemm keeps for this thread, where it is used.
void release_brgemm();

// Of activations; an error that names the operator, where they are of another.
Dtype dtype_of(const at::Tensor& x, const char* op);

namespace {

// How many threads `share` may use: 1 where this file was compiled without OpenMP.
int64_t threads() {
#ifdef INTRA_OP_PARALLEL
  return at::get_num_threads();
#else
  return 1;
#endif
}

// Runs `body(item)` for every item on torch's threads. Each takes the next item when it is done with one: items differ in
// size, and threads in speed. `work` is the number of multiply-adds (or elements) of an item: below the sum of them at which
// two threads begin to be faster than one, waiting for the other is all risk.
template <class F>
void share(int64_t items, int64_t work, const F& body) {
  static thread_local Team team;
  const int64_t all = threads();
  const bool alone = std::min(all, items) <= 1 || items * work < 200'000 || at::in_parallel_region();
  const int64_t size = alone ? 1 : team.size(all);
  if (size == 1) {
    for (int64_t item = 0; item < items; ++item) body(item);
    return;
  }
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = Clock::now();
  Clock::time_point end;
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int64_t> next{0};
  const auto work_on = [&](int64_t, int64_t) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(item);
    if (std::this_thread::get_id() == caller) end = Clock::now();
  };
  if (size == all) {
    at::parallel_for(0, std::min(all, items), 1, work_on);
  } else {  // not otherwise: GNU's OpenMP ends threads that a region leaves out, and starts them again for the next
#pragma omp parallel num_threads(static_cast<int>(size))
    work_on(0, 0);
  }
  team.ended(size, end - begin, Clock::now() - end);
}

}  // namespace
}  // namespace ctfp8
