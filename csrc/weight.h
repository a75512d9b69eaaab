// The product of a few rows and a weight [depth, columns], of which each value is read once: under the experts and `matmul`.
#pragma once

#include <algorithm>

#include "pack.h"
#include "tiles.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kWeightRows = 96;      // that share a read of the weight
constexpr int64_t kWeightColumns = 512;  // in one tile
// Rows of a weight that are read at a time: lines a page apart share a set of the first-level cache, and 8 fit into it.
constexpr int64_t kWeightDepth = 8;
// Rows of A that are worth laying a panel of the weight out, as many of its rows at a time as the LM head does: fewer multiply it
// where it lies, which reads and writes their sums every kWeightDepth rows.
template <typename T>
constexpr int64_t kMany = sizeof(T) == 4 ? 24 : 16;
static_assert(kWeightRows % kRowTile == 0 && kWeightColumns % kPanel == 0);

// Between rows of A: a line more than a row takes, that those of a tile lie in several sets of the first-level cache.
template <typename T>
inline int64_t weight_a_row(int64_t depth) {
  return round_up(elements<Element<T>>(depth), kLanes) + 16;
}

// Panels that share a line.
template <typename T>
constexpr int64_t kSharing = std::max<int64_t>(1, 64 / (kPanel * sizeof(T)));

// What multiply_weight takes of a Scratch, in elements.
template <typename T>
constexpr int64_t kWeightRoom = tiles::kHeadDepth * kSharing<T> * kPanel;

// [Panels][rows][kPanel]: n columns of a weight, in the order of load_half; zeros behind n.
template <int64_t Panels, typename T>
inline void lay_out(const T* b, int64_t b_row, int64_t rows, int64_t n, float* out) {
  for (int64_t i = 0; i < rows; ++i, b += b_row, out += kPanel) {
    __builtin_prefetch(b + kAhead * b_row);
    T last[Panels * kPanel] = {};
    if (n < Panels * kPanel) std::copy_n(b, n, last);
    const T* from = n < Panels * kPanel ? last : b;
#pragma GCC unroll 4
    for (int64_t panel = 0; panel < Panels; ++panel, from += kPanel) {
      store(out + panel * rows * kPanel, load_half<0>(from));
      store(out + panel * rows * kPanel + kLanes, load_half<1>(from));
    }
  }
}

#if defined(__AVX512BF16__)
// The same in pairs: [Panels][rows / 2][kPanel], columns in their own order.
template <int64_t Panels>
inline void lay_out(const BFloat16* b, int64_t b_row, int64_t rows, int64_t n, Pair* out) {
  pack(b, b_row, rows, n, nullptr, out);
}
#endif

// C [count, n] = A [count, depth] B [depth, n], where B are columns of a weight with `b_row` values a row. In C, of which a panel
// is a whole one, columns are as store_panel takes them. A sum has one order, however many rows there are.
// a: elements, zeros behind depth in the last; room: [kWeightRoom<T>].
template <typename T>
void multiply_weight(const Element<T>* a, int64_t a_row, int64_t count, const T* b, int64_t b_row, int64_t depth, int64_t n, float* c,
                     int64_t c_row, Element<T>* room) {
  using E = Element<T>;
  // Pairs lie in no weight as they are multiplied.
  const bool in_place = kValues<E> == 1 && count < kMany<T>;
  // Where its rows lie pages apart, of lines that share a set the cache has lost the first by the time of their second panel.
  const int64_t together = b_row * sizeof(T) % 4096 == 0 ? kSharing<T> * kPanel : kPanel;
  const int64_t step = in_place ? kWeightDepth : tiles::kHeadDepth * kValues<E>;
  for (int64_t p = 0; p < depth; p += step, b += step * b_row, a += elements<E>(step)) {
    const int64_t rows = std::min(step, depth - p);
    int64_t j = 0;
    if constexpr (kValues<E> == 1) {
      for (; in_place && j + kPanel <= n; j += kPanel) {
        // Those that are next, which may lie pages apart, where no hardware prefetcher follows.
        for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(b + (kWeightDepth + i) * b_row + j);
        multiply_panel<2>(a, a_row, 1, count, b + j, b_row, rows, c + j, c_row, p > 0);
      }
    }
    for (; j < n; j += together) {
      const int64_t columns = std::min(together, n - j);
      if (together > kPanel) lay_out<kSharing<T>>(b + j, b_row, rows, columns, room);
      else lay_out<1>(b + j, b_row, rows, columns, room);
      multiply(a, a_row, 1, count, room, elements<E>(rows), round_up(columns, kPanel), c + j, c_row, p > 0);
    }
  }
}

// The first n values of a panel of multiply_weight's C, or all if there are more.
template <typename T>
inline void store_panel(T* out, int64_t n, F first, F second) {
  T panel[kPanel];
  T* to = n < kPanel ? panel : out;
  if constexpr (kValues<Element<T>> == 1) store_halves(to, first, second);
  else store(to, first), store(to + kLanes, second);
  if (n < kPanel) std::copy_n(panel, n, out);
}

}  // namespace
}  // namespace dlm::DLM_ISA
