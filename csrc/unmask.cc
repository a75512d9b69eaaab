// The vocabulary read once: scores of tokens. And the positions that those scores unmask.
#include <algorithm>
#include <memory>
#include <numeric>

#include "guidance.h"
#include "scoring.h"
#include "scratch.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kPiece = 16384;  // columns per tile; of V alone, so that a row's sums do not depend on its batch
constexpr int64_t kChunk = 1024;   // columns that stay in first-level cache between the maximum and the exponentials

// Logits of columns [column, column + n) of a row, mixed, capped, divided and banned; in `buffer`, or where they lie if nothing
// is to be done to them.
template <typename T>
const float* prepare(const ScoreArgs& args, const RowScorer& scorer, const Banned& banned, int64_t row, int64_t column, int64_t n,
                     float* buffer) {
  const T* logits = static_cast<const T*>(args.logits) + row * args.v + column;
  const T* unconditional = nullptr;
  const float scale = args.unconditional == nullptr ? 1.0f : args.guidance_scale[row];
  if (scale != 1) {
    unconditional = static_cast<const T*>(args.unconditional) + row * args.v + column;
    // A stream of weight zero is not read: it may hold -inf or NaN.
    if (scale == 0) std::swap(logits, unconditional), unconditional = nullptr;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (unconditional == nullptr && args.scoring.soft_cap == 0 && scorer.logit_divisor() == 1 && n % kLanes == 0 &&
        !banned.any_in(column, n))
      return logits;
  }
  for (int64_t j = 0; j < n; j += kLanes) {
    const bool whole = n - j >= kLanes;
    F x = whole ? load(logits + j) : load_first(logits + j, n - j, 0.0f);
    if (unconditional != nullptr)
      x = mix(x, whole ? load(unconditional + j) : load_first(unconditional + j, n - j, 0.0f), scale);
    store(buffer + j, x);
  }
  finish_logits(args.scoring, scorer, banned, buffer, n, column);
  return buffer;
}

template <typename T>
void score_rows(const ScoreArgs& args, const Parallel& parallel) {
  const int64_t pieces = (args.v + kPiece - 1) / kPiece;
  const Banned banned(args.scoring);
  std::vector<Statistics> partial(args.r * pieces);
  const std::unique_ptr<std::atomic<float>[]> floors(new std::atomic<float>[args.r]);
  for (int64_t row = 0; row < args.r; ++row) floors[row].store(-kInfinity, std::memory_order_relaxed);
  parallel(args.r * pieces, [&](int64_t index) {
    const int64_t row = index / pieces, first = index % pieces * kPiece, stop = std::min(args.v, first + kPiece);
    if (!is_active(args.scoring, row)) return;
    const RowScorer scorer(args.scoring, row, args.v, floors[row]);
    alignas(64) float buffer[kChunk];
    Statistics statistics;
    for (int64_t column = first; column < stop; column += kChunk) {
      const int64_t n = std::min(kChunk, stop - column);
      const T* next = static_cast<const T*>(args.logits) + row * args.v + column + n;
      scorer.take(statistics, prepare<T>(args, scorer, banned, row, column, n, buffer), n, column,
                  reinterpret_cast<const float*>(next));
    }
    partial[index] = statistics;
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
