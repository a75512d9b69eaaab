// The vocabulary read once: scores of tokens. And the positions that those scores unmask.
#include <algorithm>
#include <memory>
#include <numeric>

#include "guidance.h"
#include "scoring.h"
#include "scratch.h"
#include "tiles.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kPiece = tiles::kScorePiece;  // columns that one Statistics adds up; of V alone, so that a row's sums do not depend on its batch
constexpr int64_t kTiles = 64;     // about as many to share out, or more

// A row's logits as they lie in memory: one stream, or two to be mixed.
template <typename T>
struct Row {
  Row(const ScoreArgs& args, int64_t row) : logits(static_cast<const T*>(args.logits) + row * args.v) {
    if (args.unconditional == nullptr || args.guidance_scale[row] == 1) return;
    scale = args.guidance_scale[row];
    const T* other = static_cast<const T*>(args.unconditional) + row * args.v;
    // A stream of weight zero is not read: it may hold -inf or NaN.
    (scale == 0 ? logits : unconditional) = other;
  }

  Ahead ahead(int64_t column) const {
    return {{(const char*)(logits + column), unconditional == nullptr ? nullptr : (const char*)(unconditional + column)}, sizeof(T)};
  }

  const T* logits;
  const T* unconditional = nullptr;
  float scale = 1;
};

// Logits of columns [column, column + n), mixed, capped, divided and banned; in `buffer`, or where they lie if nothing is to be
// done to them.
template <typename T>
const float* prepare(const Row<T>& row, const Scoring& scoring, const RowScorer& scorer, const Banned& banned, int64_t column,
                     int64_t n, float* buffer) {
  const T* logits = row.logits + column;
  if constexpr (std::is_same_v<T, float>) {
    if (row.unconditional == nullptr && scoring.soft_cap == 0 && scorer.logit_divisor() == 1 && n % kLanes == 0 &&
        !banned.any_in(column, n))
      return logits;
  }
  const int64_t whole = n / kLanes * kLanes;
  if (row.unconditional == nullptr) {
    for (int64_t j = 0; j < whole; j += kLanes) store(buffer + j, load(logits + j));
    if (whole < n) store(buffer + whole, load_first(logits + whole, n - whole, 0.0f));
  } else {
    const T* other = row.unconditional + column;
    for (int64_t j = 0; j < whole; j += kLanes) store(buffer + j, mix(load(logits + j), load(other + j), row.scale));
    if (whole < n)
      store(buffer + whole, mix(load_first(logits + whole, n - whole, 0.0f), load_first(other + whole, n - whole, 0.0f), row.scale));
  }
  finish_logits(scoring, scorer, banned, buffer, n, column);
  return buffer;
}

template <typename T>
void score_rows(const ScoreArgs& args, const Parallel& parallel) {
  const int64_t pieces = (args.v + kPiece - 1) / kPiece;
  const Banned banned(args.scoring);
  std::vector<Statistics> partial(args.r * pieces);
  const std::unique_ptr<std::atomic<float>[]> floors(new std::atomic<float>[args.r]);
  for (int64_t row = 0; row < args.r; ++row) floors[row].store(-kInfinity, std::memory_order_relaxed);
  // Whole rows to a tile where there are many: what is fetched ahead is then read by the same thread.
  const int64_t run = std::clamp<int64_t>(args.r * pieces / kTiles, 1, pieces), tiles = (pieces + run - 1) / run;
  parallel(args.r * tiles, [&](int64_t index) {
    const int64_t row = index / tiles, first = index % tiles * run, stop = std::min(pieces, first + run);
    if (!is_active(args.scoring, row)) return;
    const RowScorer scorer(args.scoring, row, args.v, floors[row]);
    const Row<T> logits(args, row);
    alignas(64) float buffer[kChunk];
    for (int64_t piece = first; piece < stop; ++piece) {
      Statistics statistics;
      const int64_t end = std::min(args.v, (piece + 1) * kPiece);
      for (int64_t column = piece * kPiece; column < end; column += kChunk) {
        const int64_t n = std::min(kChunk, end - column);
        scorer.take(statistics, prepare(logits, args.scoring, scorer, banned, column, n, buffer), n, column,
                    logits.ahead(column + n));
      }
      partial[row * pieces + piece] = statistics;
    }
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
    while (leading < eligible && confidence[order[leading]] >= 1 - args.factor[b] / (float)(leading + 2)) ++leading;
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
  switch (args.dtype) {
    case DType::kFloat32: return score_rows<float>(args, parallel);
    case DType::kBFloat16: return score_rows<BFloat16>(args, parallel);
    case DType::kFloat16: return score_rows<Float16>(args, parallel);
  }
}

void unmask_topk(const UnmaskArgs& args, const Parallel& parallel) {
  parallel(args.b, [&](int64_t b) { unmask_row(args, b); });
}

}  // namespace dlm::DLM_ISA
