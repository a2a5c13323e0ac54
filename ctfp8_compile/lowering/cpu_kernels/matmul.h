// One matrix product with an e4m3 weight per group of rows: a linear is one group, a mixture of experts has several.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace ctfp8 {

// Rows [begin, end) of Matmul::order, which all meet the same expert.
struct Group {
  int64_t expert, begin, end;
};

struct Matmul {
  const uint8_t* weight;  // [E, N, K], last dimension contiguous
  int64_t expert_stride, row_stride;
  const float* scales;  // [E, ceil(N / block_rows), columns.spans], contiguous
  int64_t expert_scales, block_rows;
  int64_t N;
  Columns columns;
  Type type;  // of x and out
  const void* x;
  int64_t x_stride;             // elements
  const float* bias;            // [N] or null
  std::vector<int64_t> order;   // packed row i is row order[i] of x, and of out
  std::vector<Group> groups;
  void* out;  // [rows, N], contiguous

  const char* x_row(int64_t i) const {
    return static_cast<const char*>(x) + order[static_cast<size_t>(i)] * x_stride * size_of(type);
  }
  char* out_row(int64_t i) const { return static_cast<char*>(out) + order[static_cast<size_t>(i)] * N * size_of(type); }
  Rows rows(const Group& group, int64_t begin, int64_t end) const {
    return {weight + group.expert * expert_stride, row_stride, scales + group.expert * expert_scales,
            block_rows,                            begin,      end};
  }
};

void run(const Matmul&);

// The instruction set in use, and the names that `choose_isa` takes here, best first.
struct Isa {
  const FloatKernels* floats;
  const Bf16Kernels* bf16;  // null: bfloat16 activations are widened and go through `floats`
  bool amx;                 // brgemm will use tiles
  std::string name;
};
const Isa& isa();
std::vector<std::string> isas();
bool choose_isa(const std::string& name);  // false if there is none of that name; "" is the best

}  // namespace ctfp8
