// Cross-entropy of the LM head at the rows that have a loss, forward and backward, without the logits in memory.
#include "head_loss.h"
#include "kernels.h"

namespace dlm::DLM_ISA {
namespace {

template <typename T>
struct CrossEntropy {
  const CrossEntropyArgs& args;
  const HeadRows rows = HeadRows(args.r, [this](int64_t row) { return args.active[row]; });
  HeadProduct<T> product = HeadProduct<T>(args.hidden, args.weight, false, args.v, args.d);

  // Calls use(i, logits) for all rows i that have a loss: [n], to write to, up to a multiple of kLanes.
  template <typename Use>
  void for_rows(int64_t column, int64_t n, Use&& use) const {
    Scratch& scratch = thread_scratch();
    scratch.reset(product.scratch());
    const auto tile = product.tile(column, n, scratch);
    for (int64_t block = 0; block < rows.blocks(); ++block) {
      product.fill(tile, block);
      for (int64_t i = 0; i < rows.count(block); ++i) use(rows.first(block) + i, tile.logits + i * kHeadColumns);
    }
  }

  void forward(const Parallel& parallel) {
    const int64_t tiles = (args.v + kHeadColumns - 1) / kHeadColumns;
    std::vector<ExpSum> parts(rows.size() * tiles);
    std::vector<float> target_logit(rows.size(), NAN);  // stays so where the target is no token
    product.take(rows, parallel);
    parallel(tiles, [&](int64_t tile) {
      const int64_t column = tile * kHeadColumns, n = std::min(kHeadColumns, args.v - column);
      for_rows(column, n, [&](int64_t i, float* logits) {
        if (args.soft_cap != 0)
          for (int64_t j = 0; j < n; j += kLanes) store(logits + j, capped(load(logits + j), args.soft_cap));
        std::fill(logits + n, logits + round_up(n, kLanes), -kInfinity);
        const int64_t target = args.targets[rows[i]] - column;
        if (target >= 0 && target < n) target_logit[i] = logits[target];
        parts[i * tiles + tile] = exp_sum(logits, n);
      });
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
    product.take(rows, parallel);
    HeadGradients<T>(args, rows).run(parallel, [&](int64_t column, auto* dlogits) {
      const int64_t n = std::min(kHeadColumns, args.v - column);
      for_rows(column, n, [&](int64_t i, const float* logits) {
        const int64_t row = rows[i], target = args.targets[row] - column;
        const float dloss = args.dloss[row], lse = args.lse[row];
        auto* out = dlogits + i * kHeadColumns;
        for (int64_t j = 0; j < n; j += kLanes) {
          F x = load(logits + j), slope = splat(1.0f);
          if (args.soft_cap != 0) x = capped(x, args.soft_cap, &slope);
          F p = exp(x - lse);
          if (target >= j && target < j + kLanes) p[target - j] -= 1.0f;
          store(out + j, p * (dloss * slope));
        }
      });
    });
  }
};

}  // namespace

void masked_cross_entropy_forward(const CrossEntropyArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { CrossEntropy<decltype(of)>{args}.forward(parallel); });
}

void masked_cross_entropy_backward(const CrossEntropyArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { CrossEntropy<decltype(of)>{args}.backward(parallel); });
}

}  // namespace dlm::DLM_ISA
