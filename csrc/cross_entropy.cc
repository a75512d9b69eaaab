// Cross-entropy of the LM head at the rows that have a loss, forward and backward, without the logits in memory.
#include "head_loss.h"
#include "kernels.h"

namespace dlm::DLM_ISA {
namespace {

template <typename T>
struct CrossEntropy {
  const CrossEntropyArgs& args;
  const HeadRows rows = HeadRows(args.r, [this](int64_t row) { return args.active[row]; });

  void forward(const Parallel& parallel) {
    const int64_t tiles = (args.v + kHeadColumns - 1) / kHeadColumns;
    HeadProduct<T> product(args.hidden, args.weight, false, args.v, args.d);
    std::vector<ExpSum> parts(rows.size() * tiles);
    std::vector<float> target_logit(rows.size(), NAN);  // stays so where the target is no token
    product.take(rows, parallel);
    parallel(tiles, [&](int64_t index) {
      const int64_t column = index * kHeadColumns, n = std::min(kHeadColumns, args.v - column);
      Scratch& scratch = thread_scratch();
      scratch.reset(product.scratch());
      const auto tile = product.tile(column, n, scratch);
      for (int64_t block = 0; block < rows.blocks(); ++block) {
        product.fill(tile, block);
        for (int64_t i = 0; i < rows.count(block); ++i) {
          const int64_t at = rows.first(block) + i, target = args.targets[rows[at]] - column;
          float* row = tile.logits + i * kHeadColumns;
          if (args.soft_cap != 0)
            for (int64_t j = 0; j < n; j += kLanes) store(row + j, args.soft_cap * tanh(load(row + j) / args.soft_cap));
          std::fill(row + n, row + round_up(n, kLanes), -kInfinity);
          if (target >= 0 && target < n) target_logit[at] = row[target];
          parts[at * tiles + index] = exp_sum(row, n);
        }
      }
    });
    std::fill(args.loss, args.loss + args.r, 0.0f);
    std::fill(args.lse, args.lse + args.r, 0.0f);
    for (int64_t i = 0; i < rows.size(); ++i) {
      const double lse = merged(tiles, [&](int64_t tile) { return parts[i * tiles + tile]; }).logsumexp();
      args.lse[rows[i]] = (float)lse;
      args.loss[rows[i]] = (float)(lse - target_logit[i]);
    }
  }

  void backward(const Parallel& parallel) {
    HeadProduct<T> product(args.hidden, args.weight, false, args.v, args.d);
    product.take(rows, parallel);
    HeadGradients<T>(args, rows).run(parallel, [&](int64_t column, auto* slopes) {
      const int64_t n = std::min(kHeadColumns, args.v - column);
      Scratch& scratch = thread_scratch();
      scratch.reset(product.scratch());
      const auto tile = product.tile(column, n, scratch);
      for (int64_t block = 0; block < rows.blocks(); ++block) {
        product.fill(tile, block);
        for (int64_t i = 0; i < rows.count(block); ++i) {
          const int64_t at = rows.first(block) + i, row = rows[at], target = args.targets[row] - column;
          const float* logits = tile.logits + i * kHeadColumns;
          const float dloss = args.dloss[row], lse = args.lse[row];
          auto* out = slopes + at * kHeadColumns;
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
          std::fill(out + n, out + round_up(n, kLanes), std::remove_reference_t<decltype(*out)>{});
        }
      }
    });
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
