// The vocabulary read once: scores of tokens. And the positions that those scores unmask.
#include <algorithm>
#include <numeric>

#include "guidance.h"
#include "scoring.h"
#include "scratch.h"
#include "tiles.h"

namespace dlm::DLM_ISA {
namespace {

// Columns that one Statistics adds up; of V alone, so that a row's sums do not depend on its batch.
constexpr int64_t kPiece = tiles::kScorePiece;
constexpr int64_t kTiles = 64;  // about as many to share out, or more: several for each thread, that none ends long after the rest

// Logits as they lie in memory, to be read by RowScorer.
template <typename T>
struct Stream : Plain<T> {
  Stream from(int64_t column) const { return {this->logits + column}; }
  // Processors fetch ahead on their own, but not past the end of a page; where the next ones lie takes as long to find as the
  // fetching does, so they are asked for two pages ahead.
  void read(int64_t j, int64_t n) const {
    constexpr int64_t kAheadBytes = 8192, kLine = 64;
    const char* first = (const char*)(this->logits + j) + kAheadBytes;
    for (int64_t byte = 0; byte < n * (int64_t)sizeof(T); byte += kLine) __builtin_prefetch(first + byte, 0, 2);
  }
};

// Two streams, mixed as they are read.
template <typename T>
struct Mixed {
  Stream<T> conditional, unconditional;
  float scale;

  Mixed from(int64_t column) const { return {conditional.from(column), unconditional.from(column), scale}; }
  F at(int64_t j) const { return mix(conditional.at(j), unconditional.at(j), scale); }
  F up_to(int64_t j, int64_t n) const { return mix(conditional.up_to(j, n), unconditional.up_to(j, n), scale); }
  void pair(int64_t j, F* x) const {
    F other[2];
    conditional.pair(j, x);
    unconditional.pair(j, other);
    for (int i = 0; i < 2; ++i) x[i] = mix(x[i], other[i], scale);
  }
  void read(int64_t j, int64_t n) const {
    conditional.read(j, n);
    unconditional.read(j, n);
  }
};

// Calls use(logits) with the row's logits.
template <typename T, typename Use>
void with_row(const ScoreArgs& args, int64_t row, Use&& use) {
  const Stream<T> logits{static_cast<const T*>(args.logits) + row * args.v};
  if (args.unconditional == nullptr) return use(logits);
  const Stream<T> other{static_cast<const T*>(args.unconditional) + row * args.v};
  const float scale = args.guidance_scale[row];
  // A stream of weight zero is not read: it may hold -inf or NaN.
  if (scale == 0 || scale == 1) return use(scale == 0 ? other : logits);
  use(Mixed<T>{logits, other, scale});
}

template <typename T>
void score_rows(const ScoreArgs& args, const Parallel& parallel) {
  const int64_t pieces = (args.v + kPiece - 1) / kPiece;
  const Banned banned(args.scoring);
  std::vector<Statistics> partial(args.r * pieces);
  std::vector<std::atomic<float>> floors(args.r);
  for (auto& floor : floors) floor = -kInfinity;
  // Whole rows to a tile where there are many: what is fetched ahead is then read by the same thread.
  const int64_t run = std::clamp<int64_t>(args.r * pieces / kTiles, 1, pieces), tiles = (pieces + run - 1) / run;
  parallel(args.r * tiles, [&](int64_t index) {
    const int64_t row = index / tiles, first = index % tiles * run, stop = std::min(pieces, first + run);
    if (!is_active(args.scoring, row)) return;
    const RowScorer scorer(args.scoring, row, args.v, floors[row]);
    alignas(64) float buffer[kSampleChunk];
    with_row<T>(args, row, [&](const auto& logits) {
      // Calls use(logits, n, column) for each chunk of a piece, of `most` columns or fewer.
      const auto for_chunks = [&](int64_t piece, int64_t most, auto&& use) {
        const int64_t end = std::min(args.v, (piece + 1) * kPiece);
        for (int64_t column = piece * kPiece; column < end; column += most) {
          const int64_t n = std::min(most, end - column);
          const auto chunk = logits.from(column);
          if (args.scoring.soft_cap == 0 && scorer.logit_divisor() == 1 && !banned.any_in(column, n)) {
            use(chunk, n, column);
          } else {
            for_vectors(chunk, n, [&](int64_t j, F x) { store(buffer + j, x); });
            finish_logits(args.scoring, scorer, banned, buffer, n, column);
            use(Plain<float>{buffer}, n, column);
          }
        }
      };
      for (int64_t piece = first; piece < stop; ++piece) {
        Statistics statistics;
        for_chunks(piece, kChunk, [&](const auto& chunk, int64_t n, int64_t column) { scorer.take(statistics, chunk, n, column); });
        partial[row * pieces + piece] = statistics;
      }
      // Only then, for knowing the greatest logits spares the noise of most others; the row still lies in second-level cache.
      for (int64_t piece = first; piece < stop; ++piece) {
        Statistics& statistics = partial[row * pieces + piece];
        if (!scorer.may_win(statistics.top)) continue;
        for_chunks(piece, kSampleChunk,
                   [&](const auto& chunk, int64_t n, int64_t column) { scorer.sample(statistics, chunk, n, column); });
      }
    });
  });
  merge_parts(args.scoring, args.r, pieces, partial, parallel);
}

// How many of the best-ranked positions the rules of batch row b commit. order: the eligible positions, best first.
int64_t count_to_unmask(const UnmaskArgs& args, int64_t b, const int32_t* order, int64_t eligible) {
  const float* confidence = args.confidence + b * args.l;
  int64_t n = 0;
  if (args.num_unmask != nullptr) n = std::max<int64_t>(n, args.num_unmask[b]);
  if (args.threshold != nullptr) {
    // All of them: under an entropy budget the order is not by confidence.
    int64_t above = 0;
    for (int64_t k = 0; k < eligible; ++k) above += confidence[order[k]] > args.threshold[b];
    n = std::max<int64_t>({n, above, 1});
  }
  if (args.factor != nullptr) {
    int64_t leading = 1;
    const auto sure = [&](int64_t k) { return confidence[order[k]] == confidence[order[k]] ? confidence[order[k]] : -kInfinity; };
    while (leading < eligible && sure(leading) >= 1 - args.factor[b] / (float)(leading + 2)) ++leading;
    n = std::max(n, leading);
  }
  if (args.entropy_budget != nullptr) {
    int64_t leading = 1;
    float before = eligible > 0 ? args.entropy[b * args.l + order[0]] : 0;
    while (leading < eligible && before <= args.entropy_budget[b]) before += args.entropy[b * args.l + order[leading++]];
    n = std::max(n, leading);
  }
  return std::min(n, eligible);
}

void unmask_row(const UnmaskArgs& args, int64_t b) {
  const int64_t at = b * args.l;
  Scratch& scratch = thread_scratch();
  scratch.reset(8 * args.l + 128);
  int32_t* order = scratch.take<int32_t>(args.l);
  float* rank = scratch.take<float>(args.l);  // sorted by, descending; NaN would break the order, so it ranks as -inf
  int64_t eligible = 0;
  for (int64_t i = 0; i < args.l; ++i) {
    args.new_tokens[at + i] = args.tokens[at + i];
    args.unmasked[at + i] = false;
    if (args.editable != nullptr && args.editable[at + i] && args.confidence[at + i] > args.edit_threshold[b])
      args.new_tokens[at + i] = args.proposal[at + i];
    const float by = args.entropy_budget == nullptr ? args.confidence[at + i] : -args.entropy[at + i];
    rank[i] = by == by ? by : -kInfinity;
    if (args.eligible[at + i]) order[eligible++] = (int32_t)i;
  }
  std::sort(order, order + eligible, [&](int32_t i, int32_t j) { return rank[i] != rank[j] ? rank[i] > rank[j] : i < j; });
  const int64_t n = count_to_unmask(args, b, order, eligible);
  for (int64_t k = 0; k < n; ++k) {
    args.new_tokens[at + order[k]] = args.proposal[at + order[k]];
    args.unmasked[at + order[k]] = true;
  }
  args.count[b] = (int32_t)n;
}

}  // namespace

void score_tokens(const ScoreArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { score_rows<decltype(of)>(args, parallel); });
}

void unmask_topk(const UnmaskArgs& args, const Parallel& parallel) {
  parallel(args.b, [&](int64_t b) { unmask_row(args, b); });
}

}  // namespace dlm::DLM_ISA
