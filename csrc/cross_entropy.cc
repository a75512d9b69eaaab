// Cross-entropy of the LM head at the rows that have a loss, forward and backward, without the logits in memory.
//
// Backward walks over the vocabulary in chunks: the gradients of a chunk's logits lie in a buffer, from which both products are
// made, so that each of the three matrix products is done once and every sum has one order.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "head.h"
#include "pages.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kChunk = 8;  // tiles of kHeadColumns
constexpr int64_t kRun = 128;  // of a row of the weight's gradient, written at once: lone cache lines take memory twice as long

// The sum of exp(logit - greatest) over some columns of a row.
struct Part {
  float greatest = -kInfinity;
  double total = 0;
};

template <typename T>
struct CrossEntropy {
  using E = Element<T>;
  // The gradients of logits, as they are multiplied: no wider than the hidden states and the weight that they meet.
  using Gradient = std::conditional_t<kValues<E> == 1, float, BFloat16>;

  const CrossEntropyArgs& args;
  const HeadRows rows = HeadRows(args.r, [this](int64_t row) { return args.active[row]; });
  const T* hidden = static_cast<const T*>(args.hidden);
  const T* weight = static_cast<const T*>(args.weight);

  void forward(const Parallel& parallel) {
    const int64_t tiles = (args.v + kHeadColumns - 1) / kHeadColumns;
    HeadProduct<T> product(args.hidden, args.weight, false, args.v, args.d);
    std::vector<Part> parts(rows.size() * tiles);
    std::vector<float> target_logit(rows.size(), NAN);  // stays so where the target is no token
    product.take(rows, parallel);
    parallel(tiles, [&](int64_t tile) {
      const int64_t column = tile * kHeadColumns, n = std::min(kHeadColumns, args.v - column);
      Scratch& scratch = thread_scratch();
      scratch.reset(product.scratch());
      product.tile(column, n, scratch, [&](int64_t block, float* logits) {
        const int64_t first = rows.first(block);
        for (int64_t i = 0; i < rows.count(block); ++i) {
          float* row = logits + i * kHeadColumns;
          if (args.soft_cap != 0)
            for (int64_t j = 0; j < n; j += kLanes) store(row + j, args.soft_cap * tanh(load(row + j) / args.soft_cap));
          std::fill(row + n, row + round_up(n, kLanes), -kInfinity);
          const int64_t target = args.targets[rows[first + i]] - column;
          if (target >= 0 && target < n) target_logit[first + i] = row[target];
          parts[(first + i) * tiles + tile] = sum_of(row, n);
        }
      });
    });
    std::fill(args.loss, args.loss + args.r, 0.0f);
    std::fill(args.lse, args.lse + args.r, 0.0f);
    for (int64_t i = 0; i < rows.size(); ++i) {
      Part all;
      for (int64_t tile = 0; tile < tiles; ++tile) all.greatest = std::max(all.greatest, parts[i * tiles + tile].greatest);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const Part& part = parts[i * tiles + tile];
        all.total += part.total * std::exp((double)part.greatest - all.greatest);
      }
      const double lse = all.greatest + std::log(all.total);
      args.lse[rows[i]] = (float)lse;
      args.loss[rows[i]] = (float)(lse - target_logit[i]);
    }
  }

  static Part sum_of(const float* row, int64_t n) {
    F best = splat(-kInfinity), total = F{};
    for (int64_t j = 0; j < n; j += kLanes) best = max(best, load(row + j));
    const float greatest = max_lane(best);
    constexpr int kEach = 4;
    int64_t j = 0;
    for (; j + kEach * kLanes <= n; j += kEach * kLanes) {
      F p[kEach];
      for (int i = 0; i < kEach; ++i) p[i] = load(row + j + i * kLanes) - greatest;
      exp_each<kEach>(p);
      for (int i = 0; i < kEach; ++i) total += p[i];
    }
    for (; j < n; j += kLanes) total += exp(load(row + j) - greatest);
    return {greatest, sum(total)};
  }

  void backward(const Parallel& parallel) {
    const int64_t d = args.d, count = rows.size(), panels = (d + kPanel - 1) / kPanel, depth = elements<E>(count);
    const int64_t tiles = (args.v + kHeadColumns - 1) / kHeadColumns;
    Scratch memory;
    memory.reset(sizeof(Gradient) * kChunk * count * kHeadColumns + (sizeof(E) * depth + 4 * count) * panels * kPanel + 256);
    Gradient* dlogits = memory.take<Gradient>(kChunk * count * kHeadColumns);  // [tiles of the chunk][rows][kHeadColumns]
    E* hidden_panels = memory.take<E>(panels * depth * kPanel);                // [D / kPanel][elements of rows][kPanel]
    float* dhidden = memory.take<float>(panels * count * kPanel);              // [D / kPanel][rows][kPanel]
    std::fill(dhidden, dhidden + panels * count * kPanel, 0.0f);
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
    const int64_t bytes = args.v * d * (int64_t)sizeof(T);
    if (bytes >= kLargeBytes) prefer_huge_pages(args.dweight, bytes);

    HeadProduct<T> product(args.hidden, args.weight, false, args.v, args.d);
    product.take(rows, parallel);
    for (int64_t chunk = 0; chunk < tiles; chunk += kChunk) {
      const int64_t some = std::min(kChunk, tiles - chunk);
      parallel(some, [&](int64_t tile) {
        Gradient* slopes = dlogits + tile * count * kHeadColumns;
        logit_gradients(product, (chunk + tile) * kHeadColumns, slopes);
        weight_gradients((chunk + tile) * kHeadColumns, slopes, hidden_panels, depth);
      });
      parallel(panels, [&](int64_t panel) {
        Scratch& scratch = thread_scratch();
        scratch.reset(sizeof(E) * kHeadColumns * kPanel + 64);
        E* right = scratch.take<E>(kHeadColumns * kPanel);  // [elements of a tile's columns][kPanel]
        const int64_t from = panel * kPanel, n = std::min<int64_t>(kPanel, d - from);
        for (int64_t tile = 0; tile < some; ++tile) {
          const int64_t column = (chunk + tile) * kHeadColumns, columns = std::min(kHeadColumns, args.v - column);
          pack(weight + column * d + from, d, columns, n, nullptr, right);
          multiply(reinterpret_cast<const E*>(dlogits + tile * count * kHeadColumns), kHeadColumns / kValues<E>, 1, count, right,
                   elements<E>(columns), kPanel, dhidden + panel * count * kPanel, kPanel, true);
        }
      });
    }

    std::fill(static_cast<T*>(args.dhidden), static_cast<T*>(args.dhidden) + args.r * d, T{});
    parallel(panels, [&](int64_t panel) {
      const int64_t from = panel * kPanel, n = std::min<int64_t>(kPanel, d - from);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < n; ++j)
          from_float(dhidden[(panel * count + i) * kPanel + j], static_cast<T*>(args.dhidden)[rows[i] * d + from + j]);
    });
  }

  // slopes[i][j], for all rows: the gradient of the logit of column + j; zeros behind the vocabulary's last column, up to a
  // multiple of kLanes.
  void logit_gradients(const HeadProduct<T>& product, int64_t column, Gradient* slopes) {
    const int64_t n = std::min(kHeadColumns, args.v - column);
    Scratch& scratch = thread_scratch();
    scratch.reset(product.scratch());
    product.tile(column, n, scratch, [&](int64_t block, const float* logits) {
      for (int64_t i = rows.first(block); i < rows.first(block) + rows.count(block); ++i, logits += kHeadColumns) {
        const int64_t row = rows[i], target = args.targets[row] - column;
        const float dloss = args.dloss[row], lse = args.lse[row];
        Gradient* out = slopes + i * kHeadColumns;
        for (int64_t j = 0; j < n; j += kLanes) {
          F x = load(logits + j), slope = splat(dloss);
          if (args.soft_cap != 0) {
            const F bent = tanh(x / args.soft_cap);
            x = args.soft_cap * bent;
            slope *= 1.0f - bent * bent;
          }
          F p = exp(x - lse);
          if (target >= j && target < j + kLanes) p[target - j] -= 1.0f;
          store(out + j, p * slope);
        }
        std::fill(out + n, out + round_up(n, kLanes), Gradient{});
      }
    });
  }

  // The gradient of a tile's rows of the weight, from slopes [rows, kHeadColumns]; depth: elements of rows.
  void weight_gradients(int64_t column, const Gradient* slopes, const E* hidden_panels, int64_t depth) {
    const int64_t n = std::min(kHeadColumns, args.v - column);
    Scratch& scratch = thread_scratch();
    scratch.reset((sizeof(E) * depth + 4 * kRun) * kHeadColumns + 128);
    float* sums = scratch.take<float>(kHeadColumns * kRun);
    E* left = scratch.take<E>(depth * kHeadColumns);  // [elements of rows][kHeadColumns]
    copy_columns(slopes, kHeadColumns, rows.size(), round_up(n, kLanes), nullptr, left, kHeadColumns);
    T* out = static_cast<T*>(args.dweight) + column * args.d;
    for (int64_t from = 0; from < args.d; from += kRun) {
      const int64_t width = std::min(kRun, args.d - from);
      for (int64_t j = 0; j < width; j += kPanel) {
        int64_t p = 0;
        do {  // once at least: without rows the gradient is zero
          multiply(left + p * kHeadColumns, 1, kHeadColumns, n, hidden_panels + (from + j) * depth + p * kPanel,
                   std::min(kHeadDepth, depth - p), kPanel, sums + j, kRun, p > 0);
          p += kHeadDepth;
        } while (p < depth);
      }
      for (int64_t i = 0; i < n; ++i) write_row(sums + i * kRun, width, out + i * args.d + from);
    }
    finish_stores_past_caches();
  }

  // Nobody reads the weight's gradient before all of it is written, which is more than the caches hold.
  static void write_row(const float* sums, int64_t n, T* out) {
    constexpr int64_t kBytes = kLanes * sizeof(T);
    for (int64_t j = 0; j < n; j += kLanes) {
      if (j + kLanes > n) store_first(out + j, n - j, load(sums + j));
      else if ((uintptr_t)(out + j) % kBytes == 0) store_past_caches(out + j, load(sums + j));
      else store(out + j, load(sums + j));
    }
  }
};

}  // namespace

void masked_cross_entropy_forward(const CrossEntropyArgs& args, const Parallel& parallel) {
  switch (args.dtype) {
    case DType::kFloat32: return CrossEntropy<float>{args}.forward(parallel);
    case DType::kBFloat16: return CrossEntropy<BFloat16>{args}.forward(parallel);
    case DType::kFloat16: return CrossEntropy<Float16>{args}.forward(parallel);
  }
}

void masked_cross_entropy_backward(const CrossEntropyArgs& args, const Parallel& parallel) {
  switch (args.dtype) {
    case DType::kFloat32: return CrossEntropy<float>{args}.backward(parallel);
    case DType::kBFloat16: return CrossEntropy<BFloat16>{args}.backward(parallel);
    case DType::kFloat16: return CrossEntropy<Float16>{args}.backward(parallel);
  }
}

}  // namespace dlm::DLM_ISA
