// From logits to a token, its confidence, an entropy and a log-sum-exp: statistics that chunks of a row's columns add to, and
// that merge in the order of the columns.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "noise.h"

namespace dlm::DLM_ISA {
namespace {

struct Statistics {
  float greatest = -kInfinity;  // logit
  float second = -kInfinity;    // the greatest but one; equal to greatest on a tie. Only kept for margins
  int32_t token = 0;            // lowest column of the greatest
  int32_t sampled = 0;          // lowest column of the greatest sampled_score
  float sampled_score = -kInfinity;
  float sampled_logit = -kInfinity;
  double total = 0;             // sum of exp(logit - greatest)
  double weighted = 0;          // sum of (logit - greatest) * exp(logit - greatest)

  // Moves the sums to a new greatest logit.
  void rebase(float to) {
    if (to == greatest) return;
    const double shift = (double)greatest - to, factor = std::exp(shift);
    // From -inf the sums are 0, and 0 * -inf would be NaN.
    weighted = greatest == -kInfinity ? 0 : (weighted + shift * total) * factor;
    total *= factor;
    greatest = to;
  }

  // Adds what is known of later columns.
  void merge(Statistics later) {
    second = later.greatest > greatest ? std::max(greatest, later.second) : std::max(second, later.greatest);
    if (later.greatest > greatest) {
      token = later.token;
      rebase(later.greatest);
    } else {
      later.rebase(greatest);
    }
    total += later.total;
    weighted += later.weighted;
    if (later.sampled_score > sampled_score) {
      sampled = later.sampled;
      sampled_score = later.sampled_score;
      sampled_logit = later.sampled_logit;
    }
  }
};

constexpr int64_t kChunk = 1024;  // the most columns to take at once: they stay in first-level cache from one loop to the next

// The logits that come next, to be fetched while the exponentials leave the memory idle.
struct Ahead {
  const char* streams[2] = {};  // null: none
  int64_t size = 0;             // bytes of a logit

  // Fetches the logits from j on, n of them.
  void fetch(int64_t j, int64_t n) const {
    for (const char* stream : streams)
      if (stream != nullptr)
        for (int64_t byte = j * size; byte < (j + n) * size; byte += 64) __builtin_prefetch(stream + byte);
  }
};

// What one row asks of its columns.
class RowScorer {
 public:
  // floor is shared by all who score parts of this row: a score that some column is known to reach.
  RowScorer(const Scoring& scoring, int64_t row, int64_t vocabulary, std::atomic<float>& floor)
      : margin_(scoring.confidence == Scoring::Confidence::kMargin), floor_(floor) {
    const float temperature = scoring.temperature == nullptr ? 0.0f : scoring.temperature[row];
    samples_ = temperature != 0;
    if (!samples_) return;
    (scoring.tempered ? logit_divisor_ : sample_divisor_) = temperature;
    if (scoring.noise != nullptr) {
      noise_ = scoring.noise + row * vocabulary;
    } else {
      key_ = scoring.key_data + 2 * row;
      counter_ = (uint64_t)((int64_t)scoring.counter_row[row] * vocabulary);
    }
  }

  // By which the caller divides logits before they come here: the temperature where the distribution is a tempered one.
  float logit_divisor() const { return logit_divisor_; }

  // Adds columns [column, column + n) of the row, n <= kChunk. logits holds -inf from n up to the next multiple of kLanes.
  void take(Statistics& row, const float* logits, int64_t n, int64_t column, const Ahead& ahead = {}) const {
    const float before = row.greatest;
    const float greatest = greatest_of(logits, n);
    int64_t at = 0;
    if (greatest > before) {
      at = find(logits, greatest);
      row.token = (int32_t)(column + at);
    }
    if (margin_) row.second = second_of(logits, n, before, row.second);
    if (greatest > before) row.rebase(greatest);
    add(row, logits, n, ahead);
    if (samples_) sample(row, logits, n, column, at / kLanes * kLanes, greatest);
  }

 private:
  static float greatest_of(const float* logits, int64_t n) {
    F best[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
    int64_t j = 0;
    for (; j + 4 * kLanes <= n; j += 4 * kLanes)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) best[i] = max(best[i], load(logits + j + i * kLanes));
    for (; j < n; j += kLanes) best[0] = max(best[0], load(logits + j));
    return max_lane(max(max(best[0], best[1]), max(best[2], best[3])));
  }

  // The first column of the value, which is among them.
  static int64_t find(const float* logits, float value) {
    int64_t j = 0;
    while (!any(load(logits + j) == value)) j += kLanes;
    while (logits[j] != value) ++j;
    return j;
  }

  // The second greatest of all columns so far, given the first two before these.
  static float second_of(const float* logits, int64_t n, float first, float second) {
    F most = splat(-kInfinity), next = splat(-kInfinity);
    for (int64_t j = 0; j < n; j += kLanes) {
      const F x = load(logits + j);
      next = max(next, min(most, x));
      most = max(most, x);
    }
    for (int i = 0; i < 2 * kLanes; ++i) {
      const float x = i < kLanes ? most[i] : next[i - kLanes];
      second = std::max(second, std::min(first, x));
      first = std::max(first, x);
    }
    return second;
  }

  template <int N>
  static void add_vectors(const float* logits, float base, F* totals, F* weighteds) {
    F distance[N], p[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = distance[i] = max(splat(kLeastExponent), load(logits + i * kLanes) - base);
    exp_bounded<N>(p);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      totals[i] += p[i];
      weighteds[i] += distance[i] * p[i];
    }
  }

  static void add(Statistics& row, const float* logits, int64_t n, const Ahead& ahead) {
    // A row that has seen only -inf: -inf - -inf would be NaN.
    const float base = row.greatest == -kInfinity ? 0.0f : row.greatest;
    constexpr int kEach = 4;
    F totals[kEach] = {}, weighteds[kEach] = {};
    int64_t j = 0;
    for (; j + kEach * kLanes <= n; j += kEach * kLanes) {
      ahead.fetch(j, kEach * kLanes);
      add_vectors<kEach>(logits + j, base, totals, weighteds);
    }
    for (; j < n; j += kLanes) add_vectors<1>(logits + j, base, totals, weighteds);
    const F total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
    const F weighted = (weighteds[0] + weighteds[1]) + (weighteds[2] + weighteds[3]);
    row.total += sum(total);
    row.weighted += sum(weighted);
  }

  // Adds the scores with noise. Noise of our own is made only for logits that may win with the greatest there is, closed up into
  // whole vectors; what is left out changes no result. `hint` is the first column of the vector that holds the greatest logit.
  void sample(Statistics& row, const float* logits, int64_t n, int64_t column, int64_t hint, float greatest) const {
    if (noise_ != nullptr) {
      for (int64_t j = 0; j < n; j += kLanes) {
        const F noise = n - j >= kLanes ? load(noise_ + column + j) : load_first(noise_ + column + j, n - j, 0.0f);
        take_scores(row, load(logits + j), noise, offsets(j), n - j, column);
      }
      return;
    }
    float to_beat = std::max(row.sampled_score, floor_.load(std::memory_order_relaxed));
    if (!(greatest >= least_to_win(to_beat))) return;
    if (to_beat == -kInfinity) {
      // Drawn first, the greatest logit lets most of the others be left out. Only its score counts: a column before it may tie.
      Statistics first = row;
      draw(first, load(logits + hint), offsets(hint), n - hint, column, to_beat);
      to_beat = first.sampled_score;
    }
    const float bar = least_to_win(to_beat);
    alignas(64) float kept[kChunk + kLanes];
    alignas(64) uint32_t kept_offsets[kChunk + kLanes];
    int64_t count = 0;
    for (int64_t j = 0; j < n; j += kLanes) {
      const F x = load(logits + j);
      const I may_win = x >= bar;
      if (!any(may_win)) continue;
      store_set(kept_offsets + count, may_win, offsets(j));
      count += store_set(kept + count, may_win, x);
    }
    store(kept + count, splat(-kInfinity));
    for (int64_t j = 0; j < count; j += kLanes)
      draw(row, load(kept + j), load(kept_offsets + j), count - j, column, to_beat);
    float known = floor_.load(std::memory_order_relaxed);
    while (row.sampled_score > known && !floor_.compare_exchange_weak(known, row.sampled_score, std::memory_order_relaxed)) {
    }
  }

  static U offsets(int64_t first) {
    U lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = (uint32_t)i;
    return lane + (uint32_t)first;
  }

  // A logit below this loses with the greatest noise there is.
  float least_to_win(float to_beat) const {
    // The last term outweighs the rounding of the divisions that it stands for.
    return (to_beat - kMostNoise - 1e-6f * std::fabs(to_beat)) * sample_divisor_;
  }

  // Scores the first n lanes with noise of our own; x holds the logits of columns column + offset, ascending. to_beat: a score
  // that some column of the row is known to reach.
  void draw(Statistics& row, F x, U offset, int64_t n, int64_t column, float to_beat) const {
    const F uniform = draw_uniform(key_, counter_ + (uint64_t)column, offset);
    // Both logarithms only where they may decide; the last term outweighs the rounding of x / divisor.
    to_beat = std::max(to_beat, row.sampled_score);
    const F most = x * (1.0f / sample_divisor_) + most_gumbel(uniform);
    if (any(most >= to_beat - 1e-6f * std::fabs(to_beat))) take_scores(row, x, gumbel(uniform), offset, n, column);
  }

  // Scores the first n lanes: x and noise of columns column + offset, ascending.
  void take_scores(Statistics& row, F x, F noise, U offset, int64_t n, int64_t column) const {
    const F score = x / sample_divisor_ + noise;
    if (!any(score > row.sampled_score)) return;
    for (int i = 0; i < std::min<int64_t>(kLanes, n); ++i) {
      if (!(score[i] > row.sampled_score)) continue;
      row.sampled = (int32_t)(column + offset[i]);
      row.sampled_score = score[i];
      row.sampled_logit = x[i];
    }
  }

  bool margin_, samples_;
  float logit_divisor_ = 1, sample_divisor_ = 1;
  const uint32_t* key_ = nullptr;
  uint64_t counter_ = 0;
  const float* noise_ = nullptr;
  std::atomic<float>& floor_;
};

// The banned ids of a call, sorted, for runs of columns to look up.
class Banned {
 public:
  explicit Banned(const Scoring& scoring) : ids_(scoring.banned, scoring.banned + scoring.banned_count) {
    std::sort(ids_.begin(), ids_.end());
  }

  bool any_in(int64_t column, int64_t n) const {
    const auto first = std::lower_bound(ids_.begin(), ids_.end(), column);
    return first != ids_.end() && *first < column + n;
  }

  // logits[j] belongs to column + j.
  void apply(float* logits, int64_t n, int64_t column) const {
    for (auto id = std::lower_bound(ids_.begin(), ids_.end(), column); id != ids_.end() && *id < column + n; ++id)
      logits[*id - column] = -kInfinity;
  }

 private:
  std::vector<int32_t> ids_;
};

// Caps and divides n logits where asked, applies the ban, and pads to a whole vector with -inf.
inline void finish_logits(const Scoring& scoring, const RowScorer& scorer, const Banned& banned, float* logits, int64_t n,
                          int64_t column) {
  const float divisor = scorer.logit_divisor();
  if (scoring.soft_cap != 0 || divisor != 1) {
    for (int64_t j = 0; j < n; j += kLanes) {
      F x = load(logits + j);
      if (scoring.soft_cap != 0) x = scoring.soft_cap * tanh(x / scoring.soft_cap);
      store(logits + j, x / divisor);
    }
  }
  banned.apply(logits, n, column);
  for (int64_t j = n; j % kLanes != 0; ++j) logits[j] = -kInfinity;
}

// Writes row's results from the statistics of all its columns.
inline void write_scores(const Scoring& scoring, int64_t row, const Statistics& all) {
  const bool samples = scoring.temperature != nullptr && scoring.temperature[row] != 0;
  const double log_total = std::log(all.total), logsumexp = all.greatest + log_total;
  const double entropy = log_total - all.weighted / all.total;
  scoring.token[row] = samples ? all.sampled : all.token;
  scoring.logsumexp[row] = (float)logsumexp;
  scoring.entropy[row] = (float)entropy;
  switch (scoring.confidence) {
    case Scoring::Confidence::kProbability:
      scoring.sureness[row] = (float)std::exp((samples ? all.sampled_logit : all.greatest) - logsumexp);
      break;
    case Scoring::Confidence::kMargin:
      scoring.sureness[row] = (float)(std::exp(all.greatest - logsumexp) - std::exp(all.second - logsumexp));
      break;
    case Scoring::Confidence::kNegEntropy:
      scoring.sureness[row] = (float)-entropy;
      break;
  }
}

inline void write_inactive(const Scoring& scoring, int64_t row) {
  scoring.token[row] = -1;
  scoring.sureness[row] = scoring.logsumexp[row] = -kInfinity;
  scoring.entropy[row] = kInfinity;
}

inline bool is_active(const Scoring& scoring, int64_t row) { return scoring.active == nullptr || scoring.active[row]; }

// Merges each active row's parts, which lie in the order of its columns, and writes the results of all rows.
inline void merge_parts(const Scoring& scoring, int64_t rows, int64_t parts, const std::vector<Statistics>& partial,
                        const Parallel& parallel) {
  constexpr int64_t kRows = 64;
  parallel((rows + kRows - 1) / kRows, [&](int64_t index) {
    for (int64_t row = index * kRows; row < std::min(rows, (index + 1) * kRows); ++row) {
      if (!is_active(scoring, row)) {
        write_inactive(scoring, row);
        continue;
      }
      Statistics all = partial[row * parts];
      for (int64_t part = 1; part < parts; ++part) all.merge(partial[row * parts + part]);
      write_scores(scoring, row, all);
    }
  });
}

}  // namespace
}  // namespace dlm::DLM_ISA
