// The LM head fused with scoring: each tile of logits is scored while it lies in cache, and never written to memory.
#include <algorithm>

#include "head.h"
#include "scoring.h"

namespace dlm::DLM_ISA {
namespace {

// Rounds n logits to what a model that keeps them in that format would have.
template <typename T>
void round_to(float* logits, int64_t n) {
  for (int64_t j = 0; j < n; j += kLanes) {
    T rounded[kLanes];
    store(rounded, load(logits + j));
    store(logits + j, load(rounded));
  }
}

void round_logits(DType dtype, float* logits, int64_t n) {
  if (dtype == DType::kBFloat16) round_to<BFloat16>(logits, n);
  if (dtype == DType::kFloat16) round_to<Float16>(logits, n);
}

template <typename T>
void score_head(const HeadArgs& args, const Parallel& parallel) {
  const HeadRows rows(args.r, [&](int64_t row) { return is_active(args.scoring, row); });
  HeadProduct<T> product(args.hidden, args.weight, args.packed, args.v, args.d);
  const Banned banned(args.scoring);
  const int64_t tiles = (args.v + kHeadColumns - 1) / kHeadColumns;
  // Statistics of a whole tile, not logits: 1 / 16 of the logits' size, and of a run of tiles less still.
  const int64_t run = std::max<int64_t>(1, tiles / 256);  // tiles that one row's statistics go through; of V alone
  const int64_t parts = (tiles + run - 1) / run;
  std::vector<Statistics> partial(args.r * parts);
  std::vector<std::atomic<float>> floors(args.r);
  for (auto& floor : floors) floor = -kInfinity;

  product.take(rows, parallel);
  parallel(parts, [&](int64_t part) {
    Scratch& scratch = thread_scratch();
    for (int64_t index = part * run; index < std::min(tiles, (part + 1) * run); ++index) {
      scratch.reset(product.scratch());
      const int64_t column = index * kHeadColumns, n = std::min(kHeadColumns, args.v - column);
      const auto tile = product.tile(column, n, scratch);
      for (int64_t block = 0; block < rows.blocks(); ++block) {
        product.fill(tile, block);
        for (int64_t i = 0; i < rows.count(block); ++i) {
          float* row_logits = tile.logits + i * kHeadColumns;
          const int64_t row = rows[rows.first(block) + i];
          const RowScorer scorer(args.scoring, row, args.v, floors[row]);
          if (args.round_logits) round_logits(args.logits_dtype, row_logits, n);
          finish_logits(args.scoring, scorer, banned, row_logits, n, column);
          Statistics& statistics = partial[row * parts + part];
          scorer.take(statistics, Plain<float>{row_logits}, n, column);
          if (scorer.may_win(statistics.top)) scorer.sample(statistics, Plain<float>{row_logits}, n, column);
        }
      }
    }
  });
  merge_parts(args.scoring, args.r, parts, partial, parallel);
}

}  // namespace

void lm_head_scores(const HeadArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { score_head<decltype(of)>(args, parallel); });
}

}  // namespace dlm::DLM_ISA
