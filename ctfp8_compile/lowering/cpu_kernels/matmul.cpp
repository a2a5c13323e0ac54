// Packs the activations, cuts the weight into tiles of rows, and lets threads take tile after tile.
//
// Few rows in a group: the weight streams through registers once, decoded on the way (kernels.h, `dot`). More: a tile of
// the weight is decoded into a buffer that stays in the L2 cache and multiplied from there, so the whole matrix never
// exists in bfloat16. That product is computed transposed, out^T = weight * x^T: the weight then needs no re-arranging
// after it is decoded, and what has to be interleaved for the hardware (VNNI) is x, which is smaller and packed once.
#include "matmul.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "scratch.h"

namespace ctfp8 {
namespace {

constexpr int64_t kPanel = 64;          // rows of x in one packed panel
constexpr int64_t kPanelsPerItem = 4;   // rows of x that share a decoded tile, in panels
constexpr int64_t kDotTileBytes = 96 << 10;
constexpr int64_t kDotTileRows = 256;

// Consecutive packed rows of one group.
struct Panel {
  int64_t group, begin, count;
  int64_t at;  // where its packed activations are, in elements
};

// Rows [n0, n1) of a group's weight times panels [p0, p1).
struct Item {
  const Group& group;
  int64_t n0, n1, p0, p1;
};

// bfloat16 activations, multiplied as bfloat16.
struct Bf16Engine {
  using X = uint16_t;
  const Matmul& m;
  const Bf16Kernels& kernels;
  const FloatKernels& floats;

  int64_t dot_rows() const { return kernels.dot_rows; }
  int64_t packed(int64_t count) const {
    return (count <= dot_rows() ? count : round_up(count, 16)) * m.columns.packed;
  }

  void pack(const Panel& panel, bool dot, X* out) const {
    if (dot) {
      for (int64_t i = 0; i < panel.count; ++i)
        kernels.pack_dot(m.columns, m.x_row(panel.begin + i), out + i * m.columns.packed);
      return;
    }
    const uint16_t* rows[kPanel];
    for (int64_t i = 0; i < panel.count; ++i) rows[i] = reinterpret_cast<const uint16_t*>(m.x_row(panel.begin + i));
    kernels.pack_panel(m.columns, rows, panel.count, out);
  }

  void dot(const Dot& a) const { kernels.dot(a); }

  // Tiles of few columns of out^T leave room in the cache for whole rows of the weight, which is how memory likes it.
  int64_t gemm_rows(int64_t panels) const { return panels == 1 ? 32 : 128; }

  void gemm(const Item& item, const Panel* panels, const X* x, Scratch& scratch) const {
    const Columns& columns = m.columns;
    const Rows rows = m.rows(item.group, item.n0, item.n1);
    const int64_t n = item.n1 - item.n0, depth = item.p1 - item.p0 == 1 ? 4096 : 512;
    const bool spans = columns.spans > 1;
    const int64_t panel_size = n * kPanel, sums = panel_size * (item.p1 - item.p0);
    uint16_t* tile = scratch.get<uint16_t>(n * std::min(depth, columns.stride) + 2 * (spans ? 2 : 1) * sums);
    float* total = reinterpret_cast<float*>(tile + n * std::min(depth, columns.stride));
    float* sum = spans ? total + sums : total;
    if (spans) std::memset(total, 0, static_cast<size_t>(sums) * 4);
    for (int64_t span = 0; span < columns.spans; ++span) {
      const int64_t length = columns.length(span);
      for (int64_t k = 0; k < length; k += depth) {
        const int64_t here = std::min(depth, length - k), padded = round_up(here, kChunk);
        for (int64_t i = 0; i < n; ++i)
          kernels.decode(rows.row(item.n0 + i) + span * columns.block + k, here, 1024, tile + i * padded);
        for (int64_t p = item.p0; p < item.p1; ++p) {
          const int64_t width = round_up(panels[p].count, 16);
          at::native::cpublas::brgemm(n, width, padded, padded, width, width, k > 0,
                                      reinterpret_cast<const at::BFloat16*>(tile),
                                      reinterpret_cast<const at::BFloat16*>(
                                          x + panels[p].at + (span * columns.stride + k) * width),
                                      sum + (p - item.p0) * panel_size);
        }
      }
      if (!spans) continue;
      for (int64_t p = item.p0; p < item.p1; ++p) {
        const int64_t width = round_up(panels[p].count, 16), at = (p - item.p0) * panel_size;
        for (int64_t i = 0; i < n; ++i)
          kernels.add_scaled(sum + at + i * width, rows.scale(item.n0 + i, columns.spans)[span], width,
                             total + at + i * width);
      }
    }
    float scale[128];
    for (int64_t i = 0; i < n && !spans; ++i) scale[i] = *rows.scale(item.n0 + i, 1);
    for (int64_t p = item.p0; p < item.p1; ++p) {
      uint16_t* out[kPanel];
      for (int64_t i = 0; i < panels[p].count; ++i)
        out[i] = reinterpret_cast<uint16_t*>(m.out_row(panels[p].begin + i)) + item.n0;
      kernels.store_transposed(total + (p - item.p0) * panel_size, round_up(panels[p].count, 16), n, panels[p].count,
                               spans ? nullptr : scale, m.bias ? m.bias + item.n0 : nullptr, out);
    }
  }

  // Tells oneDNN that this thread is done with its tile configuration.
  void finish() const { at::native::cpublas::brgemm_release(true); }
};

// Any activations, widened to float32 and multiplied by the BLAS that torch was built with.
struct FloatEngine {
  using X = float;
  const Matmul& m;
  const FloatKernels& floats;

  int64_t dot_rows() const { return floats.dot_rows; }
  int64_t packed(int64_t count) const { return count * m.columns.packed; }

  void pack(const Panel& panel, bool, X* out) const {
    for (int64_t i = 0; i < panel.count; ++i)
      floats.pack(m.columns, m.x_row(panel.begin + i), m.type, out + i * m.columns.packed);
  }

  void dot(const Dot& a) const { floats.dot(a); }

  int64_t gemm_rows(int64_t) const { return 64; }

  void gemm(const Item& item, const Panel* panels, const X* x, Scratch& scratch) const {
    const Columns& columns = m.columns;
    const Rows rows = m.rows(item.group, item.n0, item.n1);
    const int64_t n = item.n1 - item.n0, depth = std::max<int64_t>(1, 1024 / columns.stride) * columns.stride;
    const int64_t begin = panels[item.p0].begin, count = panels[item.p1 - 1].begin + panels[item.p1 - 1].count - begin;
    float* tile = scratch.get<float>(n * std::min(depth, columns.packed) + n * count);
    float* sum = tile + n * std::min(depth, columns.packed);
    for (int64_t k = 0; k < columns.packed; k += depth) {
      const int64_t here = std::min(depth, columns.packed - k);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t span = k / columns.stride; span * columns.stride < k + here; ++span) {
          // Scaling the weight itself rounds as its dequantized float32 copy does.
          float* to = tile + i * here + span * columns.stride - k;
          const int64_t length = columns.length(span);
          floats.dequantize(rows.row(item.n0 + i) + span * columns.block, length,
                            rows.scale(item.n0 + i, columns.spans)[span], Type::F32, to);
          std::memset(to + length, 0, static_cast<size_t>(round_up(length, kChunk) - length) * 4);
        }
      at::native::cpublas::gemm(at::native::TransposeType::Transpose, at::native::TransposeType::NoTranspose, n, count,
                                here, 1.0f, tile, here, x + panels[item.p0].at + k, columns.packed, k > 0 ? 1.0f : 0.0f,
                                sum, n);
    }
    for (int64_t i = 0; i < count; ++i)
      floats.store(sum + i * n, m.bias ? m.bias + item.n0 : nullptr, n, m.type,
                   m.out_row(begin + i) + item.n0 * size_of(m.type));
  }

  void finish() const {}
};

// The plan of one call: every group's panels, and how many items each group's work is cut into.
struct Plan {
  std::vector<Panel> panels;
  std::vector<int64_t> first_panel, first_item, tile_rows;  // by group; the first two with the total at the end
  int64_t packed = 0;

  template <class Engine>
  Plan(const Matmul& m, const Engine& engine) {
    const int64_t threads = at::get_num_threads();
    int64_t items = 0;
    for (size_t g = 0; g < m.groups.size(); ++g) {
      const Group& group = m.groups[g];
      const int64_t count = group.end - group.begin;
      const bool dot = count <= engine.dot_rows();
      first_panel.push_back(static_cast<int64_t>(panels.size()));
      first_item.push_back(items);
      for (int64_t at = group.begin; at < group.end; at += kPanel) {
        const int64_t here = std::min(kPanel, group.end - at);
        panels.push_back({static_cast<int64_t>(g), at, here, packed});
        packed += engine.packed(here);
      }
      const int64_t blocks = ceil_div(ceil_div(count, kPanel), kPanelsPerItem);
      int64_t rows = dot ? std::min(kDotTileRows, kDotTileBytes / std::max<int64_t>(1, m.columns.K))
                         : engine.gemm_rows(ceil_div(count, kPanel));
      // At least four items a thread over all groups, so that none waits long for the last one.
      const int64_t wanted = ceil_div(4 * threads, static_cast<int64_t>(m.groups.size()) * blocks);
      rows = std::max<int64_t>(16, round_up(std::min(rows, ceil_div(m.N, wanted)), 16));
      tile_rows.push_back(rows);
      items += ceil_div(m.N, rows) * blocks;
    }
    first_panel.push_back(static_cast<int64_t>(panels.size()));
    first_item.push_back(items);
  }
};

template <class Engine>
void run_with(const Matmul& m, const Engine& engine) {
  using X = typename Engine::X;
  thread_local Scratch activations;
  const Plan plan(m, engine);
  X* x = activations.get<X>(plan.packed);

  auto pack = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = plan.panels[static_cast<size_t>(p)];
      const Group& group = m.groups[static_cast<size_t>(panel.group)];
      engine.pack(panel, group.end - group.begin <= engine.dot_rows(), x + panel.at);
    }
  };
  const auto panels = static_cast<int64_t>(plan.panels.size());
  if (plan.packed < (int64_t{1} << 16)) pack(0, panels);
  else at::parallel_for(0, panels, 1, pack);

  std::atomic<int64_t> next{0};
  auto work = [&](int64_t, int64_t) {
    thread_local Scratch scratch;
    bool tiles = false;
    size_t g = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < plan.first_item.back();) {
      while (i >= plan.first_item[g + 1]) ++g;
      const Group& group = m.groups[g];
      const int64_t count = group.end - group.begin, rows = plan.tile_rows[g];
      const int64_t local = i - plan.first_item[g], tiles_n = ceil_div(m.N, rows);
      const int64_t n0 = local % tiles_n * rows, n1 = std::min(m.N, n0 + rows);
      const Panel* group_panels = plan.panels.data() + plan.first_panel[g];
      if (count > engine.dot_rows()) {
        const int64_t p0 = local / tiles_n * kPanelsPerItem;
        engine.gemm({group, n0, n1, p0, std::min(p0 + kPanelsPerItem, ceil_div(count, kPanel))}, group_panels, x,
                    scratch);
        tiles = true;
        continue;
      }
      float* y = scratch.get<float>(count * rows);
      engine.dot({m.rows(group, n0, n1), m.columns, x + group_panels->at, count, y, rows});
      for (int64_t r = 0; r < count; ++r)
        engine.floats.store(y + r * rows, m.bias ? m.bias + n0 : nullptr, n1 - n0, m.type,
                            m.out_row(group.begin + r) + n0 * size_of(m.type));
    }
    if (tiles) engine.finish();
  };
  // Waking threads costs a few microseconds, which is what this many multiplications take.
  const auto rows = static_cast<int64_t>(m.order.size());
  const bool small = rows * m.N * m.columns.packed < (int64_t{1} << 17);
  const int64_t threads = small ? 1 : std::min<int64_t>(at::get_num_threads(), plan.first_item.back());
  if (threads <= 1) work(0, 1);
  else at::parallel_for(0, threads, 1, work);
  activations.trim();
}

}  // namespace

void run(const Matmul& m) {
  if (m.groups.empty() || m.N == 0) return;
  const Isa& here = isa();
  // brgemm is oneDNN's, which a user may have switched off.
  if (m.type == Type::BF16 && here.bf16 && at::globalContext().userEnabledMkldnn())
    run_with(m, Bf16Engine{m, *here.bf16, *here.floats});
  else
    run_with(m, FloatEngine{m, *here.floats});
}

}  // namespace ctfp8
