// Cross-entropy of the LM head at the rows that have a loss, forward and backward, without the logits in memory.
//
// Backward walks over the vocabulary in chunks: the gradients of a chunk's logits lie in a buffer of rows x kChunk, from which
// both products are made, so that each of the three matrix products is done once and every sum has one order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "head.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kChunk = 8 * kHeadColumns;

// The sum of exp(logit - greatest) over some columns of a row.
struct Part {
  float greatest = -kInfinity;
  double total = 0;
};

template <typename T>
struct CrossEntropy {
  const CrossEntropyArgs& args;
  const HeadRows rows = HeadRows(args.r, [this](int64_t row) { return args.active[row]; });
  const T* hidden = static_cast<const T*>(args.hidden);
  const T* weight = static_cast<const T*>(args.weight);

  void forward(const Parallel& parallel) {
    const int64_t tiles = (args.v + kHeadColumns - 1) / kHeadColumns;
    HeadProduct<T> product(args.hidden, args.weight, false, args.v, args.d);
    std::vector<Part> parts(rows.size() * tiles);
    std::vector<float> target_logit(rows.size(), NAN);  // stays so where the target is no token
    for (int64_t block = 0; block < rows.blocks(); ++block) {
      product.take(rows, block, parallel);
      parallel(tiles, [&](int64_t tile) {
        const int64_t first = rows.first(block), column = tile * kHeadColumns, n = std::min(kHeadColumns, args.v - column);
        Scratch& scratch = thread_scratch();
        scratch.reset(product.scratch() + 4 * kHeadRows * kHeadColumns + 64);
        float* logits = scratch.take<float>(kHeadRows * kHeadColumns);
        product.tile(column, n, scratch, logits);
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
    }
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
    for (int64_t j = 0; j < n; j += kLanes) total += exp(load(row + j) - greatest);
    return {greatest, sum(total)};
  }

  void backward(const Parallel& parallel) {
    const int64_t d = args.d, count = rows.size(), width = round_up(d, kPanel), panels = width / kPanel;
    Scratch memory;
    memory.reset(4 * count * (kChunk + 2 * width) + 256);
    float* dlogits = memory.take<float>(count * kChunk);          // [rows, kChunk]
    float* hidden_panels = memory.take<float>(count * width);     // [D / kPanel][rows][kPanel]
    float* dhidden = memory.take<float>(count * width);           // [D / kPanel][rows][kPanel]
    std::fill(dhidden, dhidden + count * width, 0.0f);
    parallel(panels, [&](int64_t panel) {
      const int64_t from = panel * kPanel, n = std::min<int64_t>(kPanel, d - from);
      for (int64_t i = 0; i < count; ++i)
        widen(hidden + rows[i] * d + from, n, 1.0f, hidden_panels + (panel * count + i) * kPanel);
    });

    HeadProduct<T> product(args.hidden, args.weight, false, args.v, args.d);
    for (int64_t chunk = 0; chunk < args.v; chunk += kChunk) {
      const int64_t columns = std::min(kChunk, args.v - chunk), tiles = (columns + kHeadColumns - 1) / kHeadColumns;
      for (int64_t block = 0; block < rows.blocks(); ++block) {
        product.take(rows, block, parallel);
        parallel(tiles, [&](int64_t tile) { logit_gradients(product, tile, block, chunk, columns, dlogits); });
      }
      parallel(tiles, [&](int64_t tile) { weight_gradients(tile, chunk, columns, dlogits, hidden_panels); });
      parallel(panels, [&](int64_t panel) {
        Scratch& scratch = thread_scratch();
        scratch.reset(4 * kChunk * kPanel + 64);
        float* right = scratch.take<float>(kChunk * kPanel);      // [columns][kPanel]
        const int64_t from = panel * kPanel, n = std::min<int64_t>(kPanel, d - from);
        pack(weight + chunk * d + from, d, columns, n, nullptr, right);
        multiply(dlogits, kChunk, 1, count, right, columns, kPanel, dhidden + panel * count * kPanel, kPanel, true);
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

  // dlogits[i][chunk's column] of one tile of columns and one block of rows; zeros behind the last column of the vocabulary.
  void logit_gradients(const HeadProduct<T>& product, int64_t tile, int64_t block, int64_t chunk, int64_t columns, float* dlogits) {
    const int64_t first = rows.first(block), count = rows.count(block), at = tile * kHeadColumns, column = chunk + at;
    const int64_t n = std::min(kHeadColumns, columns - at);
    Scratch& scratch = thread_scratch();
    scratch.reset(product.scratch() + 4 * kHeadRows * kHeadColumns + 64);
    float* logits = scratch.take<float>(kHeadRows * kHeadColumns);
    product.tile(column, n, scratch, logits);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows[first + i], target = args.targets[row] - column;
      float *from = logits + i * kHeadColumns, *to = dlogits + (first + i) * kChunk + at;
      const float dloss = args.dloss[row], lse = args.lse[row];
      for (int64_t j = 0; j < n; j += kLanes) {
        F x = load(from + j), slope = splat(dloss);
        if (args.soft_cap != 0) {
          const F bent = tanh(x / args.soft_cap);
          x = args.soft_cap * bent;
          slope *= 1.0f - bent * bent;
        }
        F p = exp(x - lse);
        if (target >= j && target < j + kLanes) p[target - j] -= 1.0f;
        store(from + j, p * slope);
      }
      std::copy(from, from + n, to);
    }
  }

  void weight_gradients(int64_t tile, int64_t chunk, int64_t columns, const float* dlogits, const float* hidden_panels) {
    const int64_t at = tile * kHeadColumns, n = std::min(kHeadColumns, columns - at), count = rows.size();
    Scratch& scratch = thread_scratch();
    scratch.reset(4 * kHeadColumns * kPanel + 64);
    float* sums = scratch.take<float>(kHeadColumns * kPanel);
    for (int64_t from = 0; from < args.d; from += kPanel) {
      multiply(dlogits + at, 1, kChunk, n, hidden_panels + from * count, count, kPanel, sums, kPanel, false);
      T* out = static_cast<T*>(args.dweight) + (chunk + at) * args.d + from;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < std::min<int64_t>(kPanel, args.d - from); ++j) from_float(sums[i * kPanel + j], out[i * args.d + j]);
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
