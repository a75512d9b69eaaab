// What attention's forward and backward share: where rows lie, which keys a tile of rows sees, and the exponential.
//
// Logits are computed transposed: keys are the rows of a tile, and query rows its lanes. So keys and values are multiplied as
// they lie, without being transposed; maxima and sums over keys are additions of vectors; and a row is one lane everywhere, so
// that nothing of it depends on the rows beside it.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "pack.h"
#include "scratch.h"
#include "tiles.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kRows = tiles::kAttentionPanels * kPanel;  // most query rows of a tile, which share its copies of keys and values
constexpr int64_t kKeys = tiles::kAttentionKeys;              // most keys of a tile: even, for pairs, and a multiple of kRowTile

// Of row m of a kv head: query m / G, head (kv head) * G + m % G.
inline int64_t query_offset(const AttentionArgs& args, int64_t batch, int64_t head, int64_t m) {
  const int64_t groups = args.n / args.k;
  return ((batch * args.t + m / groups) * args.n + head * groups + m % groups) * args.h;
}

inline int64_t lse_offset(const AttentionArgs& args, int64_t batch, int64_t head, int64_t m) {
  const int64_t groups = args.n / args.k;
  return (batch * args.n + head * groups + m % groups) * args.t + m / groups;
}

// Rows [first, first + count) of `in` [B,T,N,H] as out [count, H].
template <typename T>
inline void gather(const AttentionArgs& args, const void* in, int64_t batch, int64_t head, int64_t first, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(out + i * args.h, static_cast<const T*>(in) + query_offset(args, batch, head, first + i), args.h * sizeof(T));
}

// Two keys' weights, which follow each other along the depth of the products with values.
inline void store_keys(float* p, F even, F odd) {
  store(p, even);
  store(p + kPanel, odd);
}
#if defined(__AVX512BF16__)
inline void store_keys(Pair* p, F even, F odd) {
  static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_loadu_si512(kInterleave), halves));
}
#endif

// Which keys the rows of a tile see, a panel of rows at a time.
class Sight {
 public:
  // Keys [start, stop) of the tile, of which rows of a panel see some; whole: every row sees them all.
  struct Range {
    int64_t start, stop;
    bool whole;
  };

  void init(const AttentionArgs& args, int64_t batch, int64_t first, int64_t count) {
    pairs_ = args.bounds == nullptr ? 0 : args.bounds_width / 2;
    panels_ = (count + kPanel - 1) / kPanel;
    const int64_t groups = args.n / args.k, row = args.bounds_b == 1 ? 0 : batch;
    // Rows of padding see nothing.
    std::memset(start_, 0, sizeof(start_));
    std::memset(stop_, 0, sizeof(stop_));
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t pair = 0; pair < pairs_; ++pair) {
        const int32_t* bounds = args.bounds + (row * args.t + (first + i) / groups) * args.bounds_width + 2 * pair;
        start_[pair][i] = bounds[0];
        stop_[pair][i] = bounds[1];
      }
    }
  }

  // Turns to the keys [key, key + n), n at most kKeys. False where no row sees any of them.
  bool look(int64_t key, int64_t n) {
    key_ = key;
    if (pairs_ == 0) {
      for (int64_t panel = 0; panel < panels_; ++panel) ranges_[panel] = {0, n, true};
      return true;
    }
    int32_t steps[kKeys + 1] = {};
    for (int64_t panel = 0; panel < panels_; ++panel) {
      Range range{n, 0, true};
      int64_t least = n;
      for (int64_t i = panel * kPanel; i < (panel + 1) * kPanel; ++i) {
        int64_t seen = 0;
        for (int64_t pair = 0; pair < pairs_; ++pair) {
          const int64_t start = std::clamp<int64_t>(start_[pair][i] - key, 0, n);
          const int64_t stop = std::clamp<int64_t>(stop_[pair][i] - key, 0, n);
          if (start >= stop) continue;
          range = {std::min(range.start, start), std::max(range.stop, stop), true};
          seen += stop - start;
          steps[start] += 1;
          steps[stop] -= 1;
        }
        least = std::min(least, seen);
      }
      range.start &= ~int64_t{1};  // where a pair of keys starts
      range.whole = least == range.stop - range.start;
      ranges_[panel] = range;
    }
    int32_t rows = 0;
    bool some = false;
    every_ = true;
    for (int64_t j = 0; j < n; ++j) {
      rows += steps[j];
      keep_[j] = rows > 0;
      some |= keep_[j];
      every_ &= keep_[j];
    }
    return some;
  }

  // Per key whether any row sees it; null where all are seen. Only such keys may be read: others may hold NaN.
  const uint8_t* keep() const { return pairs_ == 0 || every_ ? nullptr : keep_; }

  const Range& range(int64_t panel) const { return ranges_[panel]; }

  // Sets the logits [kKeys, kPanel] of the panel's keys in range that one of its first `columns` rows does not see to -inf.
  void hide(int64_t panel, int64_t columns, float* logits) const {
    const Range& range = ranges_[panel];
    if (range.whole) return;
    for (int64_t i = 0; i < columns; i += kLanes) {
      U start[2] = {}, length[2] = {};
      for (int64_t pair = 0; pair < pairs_; ++pair) {
        start[pair] = *(const ULoad*)(start_[pair] + panel * kPanel + i) - (uint32_t)key_;
        length[pair] = *(const ULoad*)(stop_[pair] + panel * kPanel + i) - (uint32_t)key_ - start[pair];
      }
      for (int64_t j = range.start; j < range.stop; ++j) {
        float* row = logits + j * kPanel + i;
        const I seen = ((uint32_t)j - start[0] < length[0]) | ((uint32_t)j - start[1] < length[1]);
        store(row, seen ? load(row) : splat(-kInfinity));
      }
    }
  }

 private:
  int64_t pairs_, panels_, key_;
  int32_t start_[2][kRows], stop_[2][kRows];
  Range ranges_[kRows / kPanel];
  bool every_;  // key is seen by some row
  uint8_t keep_[kKeys];
};

}  // namespace
}  // namespace dlm::DLM_ISA
