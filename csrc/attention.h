// What attention's forward and backward share: where rows lie, and which keys a tile of rows sees.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "pack.h"
#include "scratch.h"

namespace dlm::DLM_ISA {
namespace {

// Of row m of a kv head: query m / G, head (kv head) * G + m % G.
inline int64_t query_offset(const AttentionArgs& args, int64_t batch, int64_t head, int64_t m) {
  const int64_t groups = args.n / args.k;
  return ((batch * args.t + m / groups) * args.n + head * groups + m % groups) * args.h;
}

inline int64_t lse_offset(const AttentionArgs& args, int64_t batch, int64_t head, int64_t m) {
  const int64_t groups = args.n / args.k;
  return (batch * args.n + head * groups + m % groups) * args.t + m / groups;
}

inline void cap(float* row, int64_t n, float soft_cap) {
  for (int64_t j = 0; j < n; j += kLanes) store(row + j, soft_cap * tanh(load(row + j) / soft_cap));
}

// Which keys of a tile each of up to 192 rows sees.
class RowTile {
 public:
  void init(const AttentionArgs& args, int64_t batch, int64_t first, int64_t count) {
    count_ = count;
    width_ = args.bounds == nullptr ? 0 : args.bounds_width;
    const int64_t groups = args.n / args.k, row = args.bounds_b == 1 ? 0 : batch;
    for (int64_t i = 0; i < count && width_ > 0; ++i)
      bounds_[i] = args.bounds + (row * args.t + (first + i) / groups) * width_;
  }

  // Turns to the keys [key, key + n), n at most kMost. False where no row sees any of them.
  bool look(int64_t key, int64_t n) {
    key_ = key;
    n_ = n;
    if (width_ == 0) return true;
    int32_t steps[kMost + 1] = {};
    whole_ = true;
    for (int64_t i = 0; i < count_; ++i) {
      int64_t seen = 0;
      for (int64_t w = 0; w < width_; w += 2) {
        const int64_t start = clip(bounds_[i][w]), stop = clip(bounds_[i][w + 1]);
        steps[start] += 1;
        steps[stop] -= 1;
        seen += stop - start;
      }
      whole_ &= seen == n;
    }
    int32_t rows = 0;
    bool some = false, all = true;
    for (int64_t j = 0; j < n; ++j) {
      rows += steps[j];
      keep_[j] = rows > 0;
      some |= keep_[j];
      all &= keep_[j];
    }
    every_ = all;
    return some;
  }

  // Per key whether any row sees it; null where all are seen. Only such keys may be read: others may hold NaN.
  const uint8_t* keep() const { return width_ == 0 || every_ ? nullptr : keep_; }

  // Sets the logits of keys that row i does not see, and those of the padding behind the n-th, to -inf.
  void hide(int64_t i, float* row, int64_t padded) const {
    std::fill(row + n_, row + padded, -kInfinity);
    if (width_ == 0 || whole_) return;
    int64_t at = 0;
    for (int64_t w = 0; w < width_; w += 2) {
      const int64_t start = clip(bounds_[i][w]), stop = clip(bounds_[i][w + 1]);
      if (start == stop) continue;
      std::fill(row + at, row + start, -kInfinity);
      at = stop;
    }
    std::fill(row + at, row + n_, -kInfinity);
  }

 private:
  static constexpr int64_t kMost = 128;

  int64_t clip(int64_t end) const { return std::clamp<int64_t>(end - key_, 0, n_); }

  int64_t count_, width_, key_, n_;
  bool whole_, every_;         // every row sees every key; every key is seen by some row
  const int32_t* bounds_[192];  // per row, its [start, stop) pairs
  uint8_t keep_[kMost];
};

}  // namespace
}  // namespace dlm::DLM_ISA
