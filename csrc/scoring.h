// From logits to a token, its confidence, an entropy and a log-sum-exp: chunks of a row's columns add to its statistics.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "noise.h"
#include "statistics.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kChunk = 2048;  // the most columns to take at once: they stay in first-level cache if they are read again
constexpr int64_t kSampleChunk = 8192;  // the most to sample at once

// Logits that lie ready in cache. What takes logits asks its source for them a vector at a time.
template <typename T>
struct Plain {
  const T* logits;

  // A vector of columns, from the j-th of those at hand; and with no more than n of them, -inf behind.
  F at(int64_t j) const { return load(logits + j); }
  F up_to(int64_t j, int64_t n) const { return load_up_to(logits + j, n, -kInfinity); }
  // Columns [j, j + 2 * kLanes), in any order.
  void pair(int64_t j, F* x) const {
    x[0] = load_half<0>(logits + j);
    x[1] = load_half<1>(logits + j);
  }
  // Is told when columns [j, j + n) are read for the first time.
  void read(int64_t, int64_t) const {}
};

// Calls body(j, x) for each vector x of columns j ... of n, -inf behind the last.
template <typename Logits, typename Body>
inline void for_vectors(const Logits& logits, int64_t n, Body&& body) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) body(j, logits.at(j));
  if (j < n) body(j, logits.up_to(j, n - j));
}

// Whether row draws its token; else the greatest logit's is taken, also where the temperature is NaN.
inline bool samples(const Scoring& scoring, int64_t row) { return scoring.temperature != nullptr && scoring.temperature[row] > 0; }

// What one row asks of its columns.
class RowScorer {
 public:
  // floor is shared by all who score parts of this row: a score that some column is known to reach.
  RowScorer(const Scoring& scoring, int64_t row, int64_t vocabulary, std::atomic<float>& floor)
      : margin_(scoring.confidence_kind == Scoring::Confidence::kMargin), samples_(samples(scoring, row)), floor_(floor) {
    if (!samples_) return;
    (scoring.tempered_confidence ? logit_divisor_ : sample_divisor_) = scoring.temperature[row];
    if (scoring.noise != nullptr) {
      noise_ = scoring.noise + row * vocabulary;
    } else {
      key_ = scoring.key_data + 2 * row;
      counter_ = (uint64_t)((int64_t)scoring.counter_row[row] * vocabulary);
    }
  }

  // By which the caller divides logits before they come here: the temperature where the distribution is a tempered one.
  float logit_divisor() const { return logit_divisor_; }

  // Adds columns [column, column + n) of the row, n <= kChunk.
  template <typename Logits>
  void take(Statistics& row, const Logits& logits, int64_t n, int64_t column) const {
    const float before = row.top;
    float base = before == -kInfinity ? some_of(logits, n) : before, greatest = before;
    Sums sums = add(logits, n, base);
    int64_t at = 0;
    if (any(sums.best > before)) {
      greatest = max_lane(max(sums.best, splat(before)));  // a NaN must not win
      at = find(logits, n, greatest);
      row.token = (int32_t)(column + at);
    }
    if (margin_) row.second = second_of(logits, n, before, row.second);
    if (greatest > base + kNear) sums = add(logits, n, base = greatest);
    row.rebase(base);
    row.total += sum(sums.total);
    row.moment += sum(sums.moment);
    row.rebase(greatest);
    if (key_ != nullptr && greatest > before) raise_with(greatest, column + at);
  }

  // Whether sample() may find a greater score among columns whose greatest logit this is.
  bool may_win(float greatest) const { return samples_ && (noise_ != nullptr || greatest >= least_to_win(floor())); }

  // Adds the scores with noise of columns [column, column + n), n <= kSampleChunk, whose logits take() has added to the row. Noise
  // of our own is made only for logits that may win with the greatest there is, closed up into whole vectors; what is left out
  // changes no result.
  template <typename Logits>
  void sample(Statistics& row, const Logits& logits, int64_t n, int64_t column) const {
    if (noise_ != nullptr) {
      for_vectors(logits, n, [&](int64_t j, F x) {
        take_scores(row, x, load_up_to(noise_ + column + j, n - j, 0.0f), offsets(j), column);
      });
      return;
    }
    const uint64_t counter = counter_ + (uint64_t)column;
    // All counters of one call have the same high word.
    const int64_t until = std::min<int64_t>(n, (int64_t)(UINT32_MAX - (uint32_t)counter) + 1);
    draw_among(row, logits, 0, until, counter, column);
    if (until < n) draw_among(row, logits, until, n, counter, column);
    raise(row.sampled_score);
  }

 private:
  // The exponentials of a chunk are taken relative to the greatest logit before it, and taken again where the chunk has a greater
  // one, unless by this little. So one that outweighs all others is e^0, which is exact.
  static constexpr float kNear = 4;

  // The greatest of the first few logits: nearer to the greatest of all than nothing.
  template <typename Logits>
  static float some_of(const Logits& logits, int64_t n) {
    F best = splat(-kInfinity);
    for_vectors(logits, std::min<int64_t>(n, 256), [&](int64_t, F x) { best = max(best, x); });
    return max_lane(max(best, splat(-kInfinity)));
  }

  struct Sums {
    F total = {}, moment = {}, best = splat(-kInfinity);
  };

  // The first column of the value, which is among them.
  template <typename Logits>
  static int64_t find(const Logits& logits, int64_t n, float value) {
    int64_t j = 0;
    while (j + kLanes <= n && !any(logits.at(j) == value)) j += kLanes;
    const F x = logits.up_to(j, n - j);
    int lane = 0;
    // Bounded: the buffer may be written meanwhile by another thread, and then holds the value no more.
    while (lane < kLanes - 1 && x[lane] != value) ++lane;
    return j + lane;
  }

  // The second greatest of all columns so far, given the first two before these.
  template <typename Logits>
  static float second_of(const Logits& logits, int64_t n, float first, float second) {
    F most = splat(-kInfinity), next = splat(-kInfinity);
    for_vectors(logits, n, [&](int64_t, F x) {
      next = max(next, min(most, x));
      most = max(most, x);
    });
    for (int i = 0; i < 2 * kLanes; ++i) {
      const float x = i < kLanes ? most[i] : next[i - kLanes];
      second = std::max(second, std::min(first, x));
      first = std::max(first, x);
    }
    return second;
  }

  template <int N>
  [[gnu::always_inline]] static void add_vectors(const F* x, float base, Sums* sums) {
    F distance[N], p[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = distance[i] = max(splat(kLeastExponent), x[i] - base);
    exp_bounded<N>(p);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      sums[i % 2].total += p[i];
      sums[i % 2].moment += distance[i] * p[i];
      sums[i % 2].best = max(sums[i % 2].best, x[i]);
    }
  }

  template <typename Logits>
  static Sums add(const Logits& logits, int64_t n, float base) {
    // A row that has seen only -inf: -inf - -inf would be NaN.
    if (base == -kInfinity) base = 0;
    Sums sums[2];
    int64_t j = 0;
    for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
      F x[2];
      logits.pair(j, x);
      logits.read(j, 2 * kLanes);
      add_vectors<2>(x, base, sums);
    }
    for (; j < n; j += kLanes) {
      const F x = logits.up_to(j, n - j);
      add_vectors<1>(&x, base, sums);
    }
    return {sums[0].total + sums[1].total, sums[0].moment + sums[1].moment, max(sums[0].best, sums[1].best)};
  }

  float floor() const { return floor_.load(std::memory_order_relaxed); }

  void raise(float score) const {
    float known = floor();
    while (score > known && !floor_.compare_exchange_weak(known, score, std::memory_order_relaxed)) {
    }
  }

  // Raises the floor to the score of one column.
  void raise_with(float logit, int64_t column) const {
    const uint64_t counter = counter_ + (uint64_t)column;
    const U low = U{} + (uint32_t)counter;
    U bits;
    threefry_bits<1>(key_, (uint32_t)(counter >> 32), &low, &bits);
    raise((splat(logit) / sample_divisor_ + gumbel(bits))[0]);
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

  // Scores with noise of our own columns column + [first, stop), whose counters are counter + [first, stop).
  template <typename Logits>
  void draw_among(Statistics& row, const Logits& logits, int64_t first, int64_t stop, uint64_t counter, int64_t column) const {
    const float known = floor(), bar = least_to_win(known);
    // A word for each that may win: its offset in the last bits, its logit cut short in the others. Few words come here over and
    // over, and a store across the border of two pages takes ten times as long.
    alignas(4096) uint32_t kept[kSampleChunk + kVectors * kLanes];
    int64_t count = 0;
    const auto keep = [&](int64_t j, F x) {
      count += store_at_least(bar, x, (as_bits(x) & ~kOffset) | offsets(j), kept + count);
    };
    int64_t j = first;
    for (; j + kLanes <= stop; j += kLanes) keep(j, logits.at(j));
    if (j < stop) keep(j, logits.up_to(j, stop - j));
    // Behind the last, low ones that are not infinite and have offset 0.
    for (int i = 0; i < kVectors; ++i) store(kept + count + i * kLanes, as_bits(splat(-0x1p64f)));
    const float multiplier = 1.0f / sample_divisor_;
    const float cut_short = kCutShort * multiplier * std::max(std::fabs(bar), std::fabs(row.top));
    const uint32_t high = (uint32_t)((counter + (uint64_t)first) >> 32);
    for (int64_t at = 0; at < count; at += kVectors * kLanes) {
      U offset[kVectors], low[kVectors], bits[kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        offset[i] = load(kept + at + i * kLanes) & kOffset;
        low[i] = offset[i] + (uint32_t)counter;
      }
      threefry_bits<kVectors>(key_, high, low, bits);
      const float to_beat = std::max(known, row.sampled_score);
      // 1e-6 outweighs the rounding of x / divisor.
      const float room = kMostBound + cut_short + 1e-6f * std::fabs(to_beat) - to_beat;
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        // Cut short, an infinite logit is a NaN, and may win too.
        const F most = as_float(load(kept + at + i * kLanes)) * multiplier + room, less = shortfall(bits[i]);
        if (any_not_less(most, less)) take_exactly(row, logits, stop, ~(most < less), offset[i], bits[i], column);
      }
    }
  }

  // The logits themselves, and both logarithms, of the lanes where they may decide. Rare, so apart from the loop that it would
  // crowd out.
  template <typename Logits>
  [[gnu::noinline]] void take_exactly(Statistics& row, const Logits& logits, int64_t n, I lanes, U offset, U bits,
                                      int64_t column) const {
    F x = splat(-kInfinity);
    for (int i = 0; i < kLanes; ++i)
      if (lanes[i]) x[i] = logits.up_to(offset[i], n - offset[i])[0];
    take_scores(row, x, gumbel(bits), offset, column);
  }

  // x and noise of columns column + offset.
  void take_scores(Statistics& row, F x, F noise, U offset, int64_t column) const {
    const F score = x / sample_divisor_ + noise;
    if (!any(score > row.sampled_score)) return;
    for (int i = 0; i < kLanes; ++i) {
      if (!(score[i] > row.sampled_score)) continue;  // columns come in order: of a tie the first stays
      row.sampled = (int32_t)(column + offset[i]);
      row.sampled_score = score[i];
      row.sampled_logit = x[i];
    }
  }

  // Vectors of noise in turn, as many as registers hold: one alone waits for itself at every step.
  static constexpr int kVectors = kLanes == 16 ? 8 : 4;
  static constexpr uint32_t kOffset = kSampleChunk - 1;        // the bits of a word that hold an offset
  static constexpr float kCutShort = kSampleChunk * 0x1p-23f;  // what a logit may lose to it, relatively

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
      if (scoring.soft_cap != 0) x = capped(x, scoring.soft_cap);
      store(logits + j, x / divisor);
    }
  }
  banned.apply(logits, n, column);
  for (int64_t j = n; j % kLanes != 0; ++j) logits[j] = -kInfinity;
}

// Writes row's results from the statistics of all its columns.
inline void write_scores(const Scoring& scoring, int64_t row, const Statistics& all) {
  const bool hot = samples(scoring, row);
  const double log_total = std::log(all.total), logsumexp = all.top + log_total;
  // Not from logsumexp, which is no more than the top where the temperature makes logits huge.
  const auto probability = [&](double logit) { return std::exp(logit - all.top - log_total); };
  const double entropy = log_total - all.moment / all.total;
  scoring.token[row] = hot ? all.sampled : all.token;
  scoring.logsumexp[row] = (float)logsumexp;
  scoring.entropy[row] = (float)entropy;
  switch (scoring.confidence_kind) {
    case Scoring::Confidence::kProbability:
      scoring.confidence[row] = (float)probability(hot ? all.sampled_logit : all.top);
      break;
    case Scoring::Confidence::kMargin:
      scoring.confidence[row] = (float)(probability(all.top) - probability(all.second));
      break;
    case Scoring::Confidence::kNegEntropy:
      scoring.confidence[row] = (float)-entropy;
      break;
  }
}

inline void write_inactive(const Scoring& scoring, int64_t row) {
  scoring.token[row] = -1;
  scoring.confidence[row] = scoring.logsumexp[row] = -kInfinity;
  scoring.entropy[row] = kInfinity;
}

inline bool is_active(const Scoring& scoring, int64_t row) { return scoring.active == nullptr || scoring.active[row]; }

// Merges each active row's parts, which lie in the order of its columns, and writes the results of all rows.
inline void merge_parts(const Scoring& scoring, int64_t rows, int64_t parts, const std::vector<Statistics>& partial,
                        const Parallel& parallel) {
  constexpr int64_t kRows = 64;  // to a tile: one row's parts are merged sooner than a thread is woken
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
