// A mixture of experts, as fast as the weights of the chosen experts can be read. The pairs of a row and one of its experts are
// sorted by expert; then the hidden activations of all pairs are computed, then what each pair adds, then each row's sum of them.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "scratch.h"
#include "weight.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kSlice = 1024;  // rows whose pairs are kept at one time

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
      for (int64_t at = 0; at < end[e + 1]; at += kWeightRows)
        groups.push_back({e, end[e] + at, std::min(kWeightRows, end[e + 1] - at)});
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

template <typename T>
class Mixture {
  using E = Element<T>;

 public:
  explicit Mixture(const MixtureArgs& args) : args_(args), y_row_(round_up(args.d, kPanel)) {}

  void mix(int64_t row, int64_t rows, const Parallel& parallel) {
    const Pairs pairs(args_, row, rows);
    const int64_t count = (int64_t)pairs.sorted.size(), groups = (int64_t)pairs.groups.size();
    memory_.reset(count * (args_.f * (int64_t)sizeof(T) + y_row_ * 4) + 128);
    hidden_ = memory_.take<T>(count * args_.f), y_ = memory_.take<float>(count * y_row_);
    const int64_t inside = tiles(args_.f), outside = tiles(args_.d), work = count * args_.d * args_.f;
    const auto column = [](int64_t tile) { return tile * kWeightColumns; };
    parallel(groups * inside, [&](int64_t i) { hide(pairs, row, pairs.groups[i / inside], column(i % inside)); }, 2 * work);
    parallel(groups * outside, [&](int64_t i) { unhide(pairs.groups[i / outside], column(i % outside)); }, work);
    parallel(rows, [&](int64_t i) { sum(pairs, row, i); }, rows * args_.k * args_.d);
  }

 private:
  static int64_t tiles(int64_t columns) { return (columns + kWeightColumns - 1) / kWeightColumns; }

  // hidden_ of a group's pairs, columns [column, column + kWeightColumns) of them.
  void hide(const Pairs& pairs, int64_t first_row, const Group& group, int64_t column) {
    const int64_t n = std::min(kWeightColumns, args_.f - column), depth = args_.d, offset = group.expert * depth * args_.f + column;
    const int64_t a_row = weight_a_row<T>(depth), tile = group.count * kWeightColumns;
    Scratch& scratch = thread_scratch();
    scratch.reset(sizeof(E) * (group.count * a_row + kWeightRoom<T>) + 4 * 2 * tile + 4 * 64);
    E *a = scratch.take<E>(group.count * a_row), *room = scratch.take<E>(kWeightRoom<T>);
    float *gate = scratch.take<float>(tile), *up = scratch.take<float>(tile);
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t row = first_row + pairs.sorted[group.first + i] / args_.k;
      copy_rows(static_cast<const T*>(args_.x) + row * depth, 0, 1, depth, nullptr, a + i * a_row, 0);
    }
    const T *of_gate = static_cast<const T*>(args_.gate) + offset, *of_up = static_cast<const T*>(args_.up) + offset;
    multiply_weight(a, a_row, group.count, of_gate, args_.f, depth, n, gate, kWeightColumns, room);
    multiply_weight(a, a_row, group.count, of_up, args_.f, depth, n, up, kWeightColumns, room);
    for (int64_t i = 0; i < group.count; ++i)
      for (int64_t j = 0; j < n; j += kPanel) {
        const float *g = gate + i * kWeightColumns + j, *u = up + i * kWeightColumns + j;
        const F first = activated(args_.activation, load(g)) * load(u);
        const F second = activated(args_.activation, load(g + kLanes)) * load(u + kLanes);
        store_panel(hidden_ + (group.first + i) * args_.f + column + j, n - j, first, second);
      }
  }

  // y_ of a group's pairs, likewise.
  void unhide(const Group& group, int64_t column) {
    const int64_t n = std::min(kWeightColumns, args_.d - column), depth = args_.f, a_row = weight_a_row<T>(depth);
    const T* down = static_cast<const T*>(args_.down) + group.expert * depth * args_.d + column;
    Scratch& scratch = thread_scratch();
    scratch.reset(sizeof(E) * (group.count * a_row + kWeightRoom<T>) + 2 * 64);
    E *a = scratch.take<E>(group.count * a_row), *room = scratch.take<E>(kWeightRoom<T>);
    copy_rows(hidden_ + group.first * depth, depth, group.count, depth, nullptr, a, a_row);
    float* y = y_ + group.first * y_row_ + column;
    multiply_weight(a, a_row, group.count, down, args_.d, depth, n, y, y_row_, room);
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
