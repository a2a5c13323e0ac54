// How many threads share a parallel region, learnt from how long its caller had to wait for them.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

namespace ctfp8 {
namespace {

// Of one calling thread. A region ends with its last thread. On a busy machine that one may have to wait for a core,
// milliseconds where the work is a tenth of one, and a decoder has a hundred regions a step. When a caller has lately waited
// longer than it worked, half the threads would have been as fast. They are what the next regions get, the more regions the more
// often that happened.
class Team {
 public:
  using Time = std::chrono::duration<double, std::milli>;

  int64_t size(int64_t wanted) {
    if (rest_ > 0 && --rest_ == 0) limit_ = kMost;
    return std::min(wanted, limit_);
  }

  // After a region of `size` threads: how long the caller worked, then waited for the others.
  void ended(int64_t size, Time worked, Time waited) {
    worked_ = worked_ * kKept + worked;
    waited_ = waited_ * kKept + waited;
    if (waited_ < worked_ + kLong) {
      penalty_ -= (penalty_ + 63) / 64;
      return;
    }
    worked_ = waited_ = Time{};
    limit_ = std::max<int64_t>(1, size / 2);
    rest_ = penalty_ = std::min<int64_t>(2 * penalty_ + 16, 2048);
  }

 private:
  static constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  static constexpr double kKept = 31. / 32;  // of the sums, from a region to the next
  static constexpr Time kLong{1};            // threads start, and now and then a system does something else

  Time worked_{}, waited_{};
  int64_t limit_ = kMost, rest_ = 0, penalty_ = 0;  // the latter two in regions
};

}  // namespace
}  // namespace ctfp8
