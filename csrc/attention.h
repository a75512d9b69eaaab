// What attention's forward and backward share: where rows lie, and which keys of a tile are seen at all.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "pack.h"
#include "scratch.h"
#include "tiles.h"

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

// Which keys of a tile, at most Most, some row sees.
template <int64_t Most>
class SeenKeys {
 public:
  void clear() { std::fill(steps_, steps_ + Most + 1, 0); }

  // Of one row, keys [start, stop).
  void add(int64_t start, int64_t stop) {
    steps_[start] += 1;
    steps_[stop] -= 1;
  }

  // Once all rows are added: whether any of the tile's n keys is seen.
  bool some(int64_t n) {
    int32_t rows = 0;
    bool some = false;
    every_ = true;
    for (int64_t j = 0; j < n; ++j) {
      rows += steps_[j];
      keep_[j] = rows > 0;
      some |= keep_[j];
      every_ &= keep_[j];
    }
    return some;
  }

  // Per key whether any row sees it; null where all are seen. Only such keys may be read: others may hold NaN.
  const uint8_t* keep() const { return every_ ? nullptr : keep_; }

 private:
  int32_t steps_[Most + 1];  // by how many more rows a key is seen than the key before it
  bool every_;
  uint8_t keep_[Most];
};

}  // namespace
}  // namespace dlm::DLM_ISA
