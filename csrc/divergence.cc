// The divergence of an LM head's distribution from a target's, at the rows that have a loss, forward and backward: of neither head
// are the logits in memory.
#include "head_loss.h"
#include "kernels.h"

namespace dlm::DLM_ISA {
namespace {

// What some columns of a row say of the target's distribution, relative to its greatest logit there.
struct TargetSum : ExpSum {
  double gap = 0;  // the sum of exp(target - greatest) * (target - logit)
};

// Of the columns [0, n), behind which -inf stands up to a multiple of kLanes.
inline TargetSum target_sum(const float* targets, const float* logits, int64_t n) {
  const float greatest = greatest_of(targets, n), base = base_of(greatest);
  F total = F{}, gap = F{};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F target = load(targets + j), p = exp(target - base);
    total += p;
    // What the target excludes counts for nothing, where the difference is infinite too.
    gap += select(p == 0.0f, F{}, p * (target - load(logits + j)));
  }
  return {{greatest, sum(total)}, sum(gap)};
}

template <typename T>
struct Divergence {
  const DivergenceArgs& args;
  const HeadRows rows = HeadRows(args.r, [this](int64_t row) { return args.active[row]; });
  HeadProduct<T> model = HeadProduct<T>(args.hidden, args.weight, false, args.v, args.d);
  HeadProduct<T> target = HeadProduct<T>(args.target_hidden, args.target_weight, false, args.v, args.e);

  // Calls use(i, logits, targets) for all rows i that have a loss: [n] of each, to write to, up to a multiple of kLanes.
  template <typename Use>
  void for_rows(int64_t column, int64_t n, Use&& use) const {
    Scratch& scratch = thread_scratch();
    scratch.reset(model.scratch() + target.scratch());
    const auto tile = model.tile(column, n, scratch), target_tile = target.tile(column, n, scratch);
    for (int64_t block = 0; block < rows.blocks(); ++block) {
      model.fill(tile, block);
      target.fill(target_tile, block);
      for (int64_t i = 0; i < rows.count(block); ++i)
        use(rows.first(block) + i, tile.logits + i * kHeadColumns, target_tile.logits + i * kHeadColumns);
    }
  }

  void forward(const Parallel& parallel) {
    const int64_t tiles = (args.v + kHeadColumns - 1) / kHeadColumns;
    std::vector<ExpSum> parts(rows.size() * tiles);
    std::vector<TargetSum> target_parts(rows.size() * tiles);
    model.take(rows, parallel);
    target.take(rows, parallel);
    parallel(tiles, [&](int64_t tile) {
      const int64_t column = tile * kHeadColumns, n = std::min(kHeadColumns, args.v - column);
      for_rows(column, n, [&](int64_t i, float* logits, float* targets) {
        std::fill(logits + n, logits + round_up(n, kLanes), -kInfinity);
        std::fill(targets + n, targets + round_up(n, kLanes), -kInfinity);
        parts[i * tiles + tile] = exp_sum(logits, n);
        target_parts[i * tiles + tile] = target_sum(targets, logits, n);
      });
    });
    for (float* out : {args.loss, args.lse, args.target_lse}) std::fill(out, out + args.r, 0.0f);
    for (int64_t i = 0; i < rows.size(); ++i) {
      const ExpSum all = merged(tiles, [&](int64_t tile) { return parts[i * tiles + tile]; });
      const TargetSum* part = &target_parts[i * tiles];
      const ExpSum target_all = merged(tiles, [&](int64_t tile) { return part[tile]; });
      double gap = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const double share = std::exp((double)part[tile].greatest - target_all.greatest);
        if (share != 0) gap += part[tile].gap * share;  // the gap may be infinite
      }
      args.lse[rows[i]] = (float)all.logsumexp();
      args.target_lse[rows[i]] = (float)target_all.logsumexp();
      args.loss[rows[i]] = (float)(gap / target_all.total + all.logsumexp() - target_all.logsumexp());
    }
  }

  void backward(const Parallel& parallel) {
    model.take(rows, parallel);
    target.take(rows, parallel);
    HeadGradients<T>(args, rows).run(parallel, [&](int64_t column, auto* dlogits) {
      const int64_t n = std::min(kHeadColumns, args.v - column);
      for_rows(column, n, [&](int64_t i, const float* logits, const float* targets) {
        const float dloss = args.dloss[rows[i]], lse = args.lse[rows[i]], target_lse = args.target_lse[rows[i]];
        auto* out = dlogits + i * kHeadColumns;
        for (int64_t j = 0; j < n; j += kLanes)
          store(out + j, dloss * (exp(load(logits + j) - lse) - exp(load(targets + j) - target_lse)));
      });
    });
  }
};

}  // namespace

void masked_divergence_forward(const DivergenceArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { Divergence<decltype(of)>{args}.forward(parallel); });
}

void masked_divergence_backward(const DivergenceArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { Divergence<decltype(of)>{args}.backward(parallel); });
}

}  // namespace dlm::DLM_ISA
