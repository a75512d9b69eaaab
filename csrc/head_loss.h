// What the losses of an LM head share: the sums over a row of logits, and the gradients of hidden states and weight.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "head.h"
#include "pages.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kRun = 128;  // of a row of the weight's gradient, written at once: lone cache lines take memory twice as long

// The sum of exp(logit - greatest) over some columns of a row.
struct ExpSum {
  float greatest = -kInfinity;
  double total = 0;

  double logsumexp() const { return greatest + std::log(total); }
};

inline float greatest_of(const float* row, int64_t n) {
  F best = splat(-kInfinity);
  for (int64_t j = 0; j < n; j += kLanes) best = max(best, load(row + j));
  return max_lane(best);
}

// What exponents are taken relative to: where all are -inf, -inf - -inf would be NaN.
inline float base_of(float greatest) { return greatest == -kInfinity ? 0.0f : greatest; }

// Of the columns [0, n), behind which -inf stands up to a multiple of kLanes.
inline ExpSum exp_sum(const float* row, int64_t n) {
  const float greatest = greatest_of(row, n), base = base_of(greatest);
  F total = F{};
  constexpr int kEach = 4;
  int64_t j = 0;
  for (; j + kEach * kLanes <= n; j += kEach * kLanes) {
    F p[kEach];
    for (int i = 0; i < kEach; ++i) p[i] = load(row + j + i * kLanes) - base;
    exp_each<kEach>(p);
    for (int i = 0; i < kEach; ++i) total += p[i];
  }
  for (; j < n; j += kLanes) total += exp(load(row + j) - base);
  return {greatest, sum(total)};
}

// Of all parts of a row, in their order. NaN where all of them are -inf.
template <typename Part>
inline ExpSum merged(int64_t parts, Part&& part) {
  ExpSum all;
  for (int64_t i = 0; i < parts; ++i) all.greatest = std::max(all.greatest, part(i).greatest);
  for (int64_t i = 0; i < parts; ++i) all.total += part(i).total * std::exp((double)part(i).greatest - all.greatest);
  return all;
}

// The gradients of hidden states and weight, from those of the logits. It walks over the vocabulary in chunks: the gradients of a
// chunk's logits lie in a buffer, from which both products are made, so that each product is done once and every sum has one order.
template <typename T>
struct HeadGradients {
  using E = Element<T>;
  // The gradients of logits, as they are multiplied: no wider than the hidden states and the weight that they meet.
  using Gradient = std::conditional_t<kValues<E> == 1, float, BFloat16>;

  int64_t r, d, v;
  const HeadRows& rows;  // the others have no gradient
  const T* hidden;       // [R,D]
  const T* weight;       // [V,D]
  T* dhidden;            // [R,D]
  T* dweight;            // [V,D]

  template <typename Args>
  HeadGradients(const Args& args, const HeadRows& rows)
      : r(args.r), d(args.d), v(args.v), rows(rows), hidden(static_cast<const T*>(args.hidden)),
        weight(static_cast<const T*>(args.weight)), dhidden(static_cast<T*>(args.dhidden)),
        dweight(static_cast<T*>(args.dweight)) {}

  // logit_gradients(column, dlogits) sets dlogits[i][j], for all rows, to the gradient of the logit of column + j; behind the
  // vocabulary's last column it may write up to a multiple of kLanes. dlogits: [rows, kHeadColumns].
  template <typename LogitGradients>
  void run(const Parallel& parallel, LogitGradients&& logit_gradients) const {
    const int64_t count = rows.size(), panels = (d + kPanel - 1) / kPanel, depth = elements<E>(count);
    const int64_t tiles = (v + kHeadColumns - 1) / kHeadColumns;
    Scratch memory;
    // Tiles at once: a few for each thread. Where a chunk ends changes no sum's order.
    const int64_t most = std::max<int64_t>(8, 2 * parallel.threads());
    memory.reset(sizeof(Gradient) * most * count * kHeadColumns + (sizeof(E) * depth + 4 * count) * panels * kPanel + 256);
    Gradient* chunk_dlogits = memory.take<Gradient>(most * count * kHeadColumns);  // [tiles of the chunk][rows][kHeadColumns]
    E* hidden_panels = memory.take<E>(panels * depth * kPanel);                      // [D / kPanel][elements of rows][kPanel]
    float* sums = memory.take<float>(panels * count * kPanel);                       // [D / kPanel][rows][kPanel]
    std::fill(sums, sums + panels * count * kPanel, 0.0f);
    parallel(panels, [&](int64_t panel) {
      const int64_t from = panel * kPanel;
      for (int64_t i = 0; i < count; i += kValues<E>)
        for (int64_t j = 0; j < kPanel; j += kLanes) {
          const T* even = hidden + rows[i] * d + from + j;
          const T* odd = i + 1 < count ? hidden + rows[i + 1] * d + from + j : nullptr;
          E* out = hidden_panels + (panel * depth + i / kValues<E>) * kPanel + j;
          store_elements(out, column_elements<E>(even, odd, d - from - j));
        }
    });
    const int64_t bytes = v * d * (int64_t)sizeof(T);
    if (bytes >= kLargeBytes) prefer_huge_pages(dweight, bytes);

    for (int64_t chunk = 0; chunk < tiles; chunk += most) {
      const int64_t some = std::min(most, tiles - chunk);
      parallel(some, [&](int64_t tile) {
        const int64_t column = (chunk + tile) * kHeadColumns, n = std::min(kHeadColumns, v - column);
        Gradient* dlogits = chunk_dlogits + tile * count * kHeadColumns;
        logit_gradients(column, dlogits);
        // Zeros behind the last column, which is the first of a pair where their number is odd.
        for (int64_t i = 0; i < count; ++i)
          std::fill(dlogits + i * kHeadColumns + n, dlogits + i * kHeadColumns + round_up(n, kLanes), Gradient{});
        weight_gradients(column, dlogits, hidden_panels, depth);
      });
      parallel(panels, [&](int64_t panel) {
        Scratch& scratch = thread_scratch();
        scratch.reset(sizeof(E) * kHeadColumns * kPanel + 64);
        E* right = scratch.take<E>(kHeadColumns * kPanel);  // [elements of a tile's columns][kPanel]
        const int64_t from = panel * kPanel, n = std::min<int64_t>(kPanel, d - from);
        for (int64_t tile = 0; tile < some; ++tile) {
          const int64_t column = (chunk + tile) * kHeadColumns, columns = std::min(kHeadColumns, v - column);
          pack(weight + column * d + from, d, columns, n, nullptr, right);
          multiply(reinterpret_cast<const E*>(chunk_dlogits + tile * count * kHeadColumns), kHeadColumns / kValues<E>, 1, count,
                   right, elements<E>(columns), kPanel, sums + panel * count * kPanel, kPanel, true);
        }
      });
    }

    std::fill(dhidden, dhidden + r * d, T{});
    parallel(panels, [&](int64_t panel) {
      const int64_t from = panel * kPanel, n = std::min<int64_t>(kPanel, d - from);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < n; ++j)
          from_float(sums[(panel * count + i) * kPanel + j], dhidden[rows[i] * d + from + j]);
    });
  }

  // The gradient of a tile's rows of the weight, from dlogits [rows, kHeadColumns]; depth: elements of rows.
  void weight_gradients(int64_t column, const Gradient* dlogits, const E* hidden_panels, int64_t depth) const {
    const int64_t n = std::min(kHeadColumns, v - column);
    Scratch& scratch = thread_scratch();
    scratch.reset((sizeof(E) * depth + 4 * kRun) * kHeadColumns + 128);
    float* sums = scratch.take<float>(kHeadColumns * kRun);
    E* left = scratch.take<E>(depth * kHeadColumns);  // [elements of rows][kHeadColumns]
    copy_columns(dlogits, kHeadColumns, rows.size(), round_up(n, kLanes), nullptr, left, kHeadColumns);
    T* out = dweight + column * d;
    for (int64_t from = 0; from < d; from += kRun) {
      const int64_t width = std::min(kRun, d - from);
      for (int64_t j = 0; j < width; j += kPanel) {
        int64_t p = 0;
        do {  // once at least: without rows the gradient is zero
          multiply(left + p * kHeadColumns, 1, kHeadColumns, n, hidden_panels + (from + j) * depth + p * kPanel,
                   std::min(kHeadDepth, depth - p), kPanel, sums + j, kRun, p > 0);
          p += kHeadDepth;
        } while (p < depth);
      }
      for (int64_t i = 0; i < n; ++i) write_row(sums + i * kRun, width, out + i * d + from);
    }
    finish_stores_past_caches();
  }

  // Nobody reads the weight's gradient before all of it is written, which is more than the caches hold.
  static void write_row(const float* sums, int64_t n, T* out) {
    constexpr int64_t kBytes = kLanes * sizeof(T);
    for (int64_t j = 0; j < n; j += kLanes) {
      if (n - j >= kLanes && (uintptr_t)(out + j) % kBytes == 0) store_past_caches(out + j, load(sums + j));
      else store_up_to(out + j, n - j, load(sums + j));
    }
  }
};

}  // namespace
}  // namespace dlm::DLM_ISA
