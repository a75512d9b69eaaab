// A mixture of experts, as fast as the weights of the chosen experts can be read. The pairs of a row and one of its experts are
// sorted by expert; then the hidden activations of all pairs are computed, then what each pair adds, then each row's sum of them.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "scratch.h"
#include "tiles.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kSlice = 1024;   // rows whose pairs are kept at one time
constexpr int64_t kGroup = 96;     // pairs of one expert that share a read of its weights
constexpr int64_t kColumns = 512;  // of a weight in one tile
// Rows of a weight that are read at a time: lines a page apart share a set of the first-level cache, and 8 fit into it.
constexpr int64_t kDepth = 8;
// Pairs that are worth laying a panel of a weight out, as many of its rows at a time as the LM head does: fewer multiply it where it
// lies, which reads and writes their sums every kDepth rows.
template <typename T>
constexpr int64_t kMany = sizeof(T) == 4 ? 24 : 16;
constexpr int64_t kLaidOut = tiles::kHeadDepth;
static_assert(kGroup % kRowTile == 0 && kColumns % kPanel == 0);

// Pairs [first, first + count) of the sorted ones, all of one expert.
struct Group {
  int64_t expert, first, count;
};

// The pairs row * K + j of some rows, by expert; those whose expert is outside [0, E) are left out.
struct Pairs {
  Pairs(const MixtureArgs& args, int64_t row, int64_t rows) : place(rows * args.k, -1) {
    std::vector<int64_t> end(args.e + 1);  // then where an expert's pairs end, at index expert + 1
    const int32_t* expert = args.expert + row * args.k;
    const auto known = [&](int64_t pair) { return expert[pair] >= 0 && expert[pair] < args.e; };
    for (int64_t pair = 0; pair < rows * args.k; ++pair)
      if (known(pair)) ++end[expert[pair] + 1];
    for (int64_t e = 0; e < args.e; ++e) {
      for (int64_t at = 0; at < end[e + 1]; at += kGroup)
        groups.push_back({e, end[e] + at, std::min(kGroup, end[e + 1] - at)});
      end[e + 1] += end[e];
    }
    sorted.resize(end[args.e]);
    for (int64_t pair = 0; pair < rows * args.k; ++pair)
      if (known(pair)) sorted[place[pair] = end[expert[pair]]++] = pair;
  }

  std::vector<int64_t> sorted;  // place -> pair
  std::vector<int64_t> place;   // pair -> place; -1: left out
  std::vector<Group> groups;
};

inline F activated(MixtureArgs::Activation activation, F x) {
  // exp ends at 88, where silu is less than any normal number.
  if (activation == MixtureArgs::Activation::kSilu) return x < -88.0f ? splat(0.0f) : x / (1.0f + exp(-x));
  return 0.5f * x * (1.0f + tanh(0.797884561f * (x + 0.044715f * x * x * x)));  // sqrt(2 / pi)
}

// rows x kPanel floats: n columns of a weight, or the whole panel that they begin, in the order of load_half; zeros behind n.
template <typename T>
inline void lay_out(const T* b, int64_t b_row, int64_t rows, int64_t n, float* panel) {
  for (int64_t i = 0; i < rows; ++i, b += b_row, panel += kPanel) {
    __builtin_prefetch(b + kAhead * b_row);
    T last[kPanel] = {};
    if (n < kPanel) std::copy_n(b, n, last);
    const T* from = n < kPanel ? last : b;
    store(panel, load_half<0>(from));
    store(panel + kLanes, load_half<1>(from));
  }
}

// C [count, n] = A [count, depth] B [depth, n], where B are columns of a weight with `b_row` values a row. In C, of which a panel
// is a whole one, a panel's columns are in the order of load_half. A sum has one order, however many rows there are.
// room: [kLaidOut][kPanel].
template <typename T>
void multiply_weight(const float* a, int64_t a_row, int64_t count, const T* b, int64_t b_row, int64_t depth, int64_t n, float* c,
                     int64_t c_row, float* room) {
  const int64_t step = count < kMany<T> ? kDepth : kLaidOut;
  for (int64_t p = 0; p < depth; p += step, b += step * b_row) {
    const int64_t rows = std::min(step, depth - p);
    for (int64_t j = 0; j < n; j += kPanel) {
      if (count < kMany<T> && n - j >= kPanel) {
        // Those that are next, which may lie pages apart, where no hardware prefetcher follows.
        for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(b + (kDepth + i) * b_row + j);
        multiply_panel<2>(a + p, a_row, 1, count, b + j, b_row, rows, c + j, c_row, p > 0);
      } else {
        lay_out(b + j, b_row, rows, n - j, room);
        multiply_panel<2>(a + p, a_row, 1, count, room, kPanel, rows, c + j, c_row, p > 0);
      }
    }
  }
}

// The first n values, or a whole panel's if there are more, from its halves.
template <typename T>
inline void store_panel(T* out, int64_t n, F first, F second) {
  if (n >= kPanel) return store_halves(out, first, second);
  T panel[kPanel];
  store_halves(panel, first, second);
  std::copy_n(panel, n, out);
}

template <typename T>
class Mixture {
 public:
  explicit Mixture(const MixtureArgs& args) : args_(args), y_row_(round_up(args.d, kPanel)) {}

  void mix(int64_t row, int64_t rows, const Parallel& parallel) {
    const Pairs pairs(args_, row, rows);
    const int64_t count = (int64_t)pairs.sorted.size(), groups = (int64_t)pairs.groups.size();
    memory_.reset(count * (args_.f * (int64_t)sizeof(T) + y_row_ * 4) + 128);
    hidden_ = memory_.take<T>(count * args_.f), y_ = memory_.take<float>(count * y_row_);
    const int64_t inside = tiles(args_.f), outside = tiles(args_.d), work = count * args_.d * args_.f;
    parallel(groups * inside, [&](int64_t i) { hide(pairs, row, pairs.groups[i / inside], i % inside * kColumns); }, 2 * work);
    parallel(groups * outside, [&](int64_t i) { unhide(pairs.groups[i / outside], i % outside * kColumns); }, work);
    parallel(rows, [&](int64_t i) { sum(pairs, row, i); }, rows * args_.k * args_.d);
  }

 private:
  static int64_t tiles(int64_t columns) { return (columns + kColumns - 1) / kColumns; }

  // Between rows of A: a line more than a row takes, that those of a tile lie in several sets of the first-level cache.
  static int64_t a_row(int64_t depth) { return round_up(depth, kLanes) + 16; }

  // hidden_ of a group's pairs, columns [column, column + kColumns) of them.
  void hide(const Pairs& pairs, int64_t first_row, const Group& group, int64_t column) {
    const int64_t n = std::min(kColumns, args_.f - column), depth = args_.d, offset = group.expert * depth * args_.f + column;
    Scratch& scratch = thread_scratch();
    scratch.reset(4 * (group.count * (a_row(depth) + 2 * kColumns) + kLaidOut * kPanel) + 4 * 64);
    float* a = scratch.take<float>(group.count * a_row(depth));
    float *gate = scratch.take<float>(group.count * kColumns), *up = scratch.take<float>(group.count * kColumns);
    float* room = scratch.take<float>(kLaidOut * kPanel);
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t row = first_row + pairs.sorted[group.first + i] / args_.k;
      copy_rows(static_cast<const T*>(args_.x) + row * depth, 0, 1, depth, nullptr, a + i * a_row(depth), 0);
    }
    const T *of_gate = static_cast<const T*>(args_.gate) + offset, *of_up = static_cast<const T*>(args_.up) + offset;
    multiply_weight(a, a_row(depth), group.count, of_gate, args_.f, depth, n, gate, kColumns, room);
    multiply_weight(a, a_row(depth), group.count, of_up, args_.f, depth, n, up, kColumns, room);
    for (int64_t i = 0; i < group.count; ++i)
      for (int64_t j = 0; j < n; j += kPanel) {
        const float *g = gate + i * kColumns + j, *u = up + i * kColumns + j;
        const F first = activated(args_.activation, load(g)) * load(u);
        const F second = activated(args_.activation, load(g + kLanes)) * load(u + kLanes);
        store_panel(hidden_ + (group.first + i) * args_.f + column + j, n - j, first, second);
      }
  }

  // y_ of a group's pairs, likewise.
  void unhide(const Group& group, int64_t column) {
    const int64_t n = std::min(kColumns, args_.d - column), depth = args_.f;
    const T* down = static_cast<const T*>(args_.down) + group.expert * depth * args_.d + column;
    Scratch& scratch = thread_scratch();
    scratch.reset(4 * (group.count * a_row(depth) + kLaidOut * kPanel) + 2 * 64);
    float *a = scratch.take<float>(group.count * a_row(depth)), *room = scratch.take<float>(kLaidOut * kPanel);
    copy_rows(hidden_ + group.first * depth, depth, group.count, depth, nullptr, a, a_row(depth));
    float* y = y_ + group.first * y_row_ + column;
    multiply_weight(a, a_row(depth), group.count, down, args_.d, depth, n, y, y_row_, room);
  }

  // The output of row `first_row` + i. Its pairs are added in their order, whatever else there is.
  void sum(const Pairs& pairs, int64_t first_row, int64_t i) {
    const int64_t row = first_row + i, *place = &pairs.place[i * args_.k];
    const float* weight = args_.weight + row * args_.k;
    const float start = std::any_of(place, place + args_.k, [](int64_t at) { return at < 0; }) ? __builtin_nanf("") : 0.0f;
    T* out = static_cast<T*>(args_.out) + row * args_.d;
    for (int64_t j = 0; j < args_.d; j += kPanel) {
      F first = splat(start), second = first;
      for (int64_t k = 0; k < args_.k; ++k) {
        if (place[k] < 0) continue;
        const float* y = y_ + place[k] * y_row_ + j;
        first += weight[k] * load(y), second += weight[k] * load(y + kLanes);
      }
      store_panel(out + j, args_.d - j, first, second);
    }
  }

  const MixtureArgs& args_;
  int64_t y_row_;
  Scratch memory_;
  T* hidden_ = nullptr;    // [pairs, F], sorted
  float* y_ = nullptr;     // [pairs, y_row_], sorted: what an expert makes of a row
};

}  // namespace

void mix_experts(const MixtureArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) {
    Mixture<decltype(of)> mixture(args);
    for (int64_t row = 0; row < args.r; row += kSlice) mixture.mix(row, std::min(kSlice, args.r - row), parallel);
  });
}

}  // namespace dlm::DLM_ISA
