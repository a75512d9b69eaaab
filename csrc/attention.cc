// Attention forward: tiles of query rows against tiles of keys, with an online softmax; the logits never leave the cache.
//
// The G query heads that share a kv head make one run of rows: row m is query m / G, head m % G. Within a tile, a panel of rows
// at a time goes from logits over weights to its part of the result, all of which lie in first-level cache.
//
// Logits are computed transposed: keys are the rows of a tile, and query rows its lanes. So keys and values are multiplied as
// they lie, without being transposed; maxima and sums over keys are additions of vectors; and a row is one lane everywhere, so
// that nothing of it depends on the rows beside it.
#include <cmath>
#include <cstring>

#include "attention.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kSplitKeys = 4096;  // few rows split their keys in pieces of this; of S alone, so batch-invariant
constexpr int64_t kRows = tiles::kAttentionPanels * kPanel;  // most query rows of a tile, which share its copies of keys and values
constexpr int64_t kKeys = tiles::kAttentionKeys;  // most keys of a tile
static_assert(kKeys % 2 == 0, "weights are stored in pairs of keys");
constexpr float kLog2E = 1.44269504f;

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
    seen_.clear();
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
          seen_.add(start, stop);
        }
        least = std::min(least, seen);
      }
      range.start &= ~int64_t{1};  // where a pair of keys starts
      range.whole = least == range.stop - range.start;
      ranges_[panel] = range;
    }
    return seen_.some(n);
  }

  // As SeenKeys has it.
  const uint8_t* keep() const { return pairs_ == 0 ? nullptr : seen_.keep(); }

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
  SeenKeys<kKeys> seen_;
};

// What a panel of rows has summed so far.
struct Sums {
  float* out;       // [H, kPanel], to be divided by total
  float* greatest;  // [kPanel] logit; -inf: nothing seen yet
  float* total;     // [kPanel] of the weights, relative to the greatest
};

template <typename T>
struct Forward {
  using E = Element<T>;

  const AttentionArgs& args;
  const int64_t rows = args.t * (args.n / args.k);    // per kv head
  const int64_t panels = (rows + kPanel - 1) / kPanel;
  const int64_t tile_panels = std::min(panels, kRows / kPanel);
  const int64_t row_tiles = (panels + tile_panels - 1) / tile_panels;
  const int64_t splits = row_tiles == 1 ? (args.s + kSplitKeys - 1) / kSplitKeys : 1;
  const int64_t depth = elements<E>(args.h);          // of the product with keys
  const int64_t key_row = round_up(depth, kLanes), value_row = round_up(args.h, kLanes);
  // A scale that is not positive, or a soft cap, is applied to the logits; else they go without the scale up to the exponent.
  const bool scaled_early = args.soft_cap != 0 || !(args.scale > 0);
  const float scale = scaled_early ? 1.0f : args.scale;  // that the logits still lack
  const float factor = scale * kLog2E;

  float* partial = nullptr;                           // [B,K,splits,panels] sums, as sums_at() lays them

  int64_t sums_size() const { return kPanel * (args.h + 2); }
  Sums sums_at(float* at) const { return {at, at + kPanel * args.h, at + kPanel * (args.h + 1)}; }

  void run(const Parallel& parallel) {
    Scratch partials;
    if (splits > 1) {
      const int64_t count = args.b * args.k * splits * panels * sums_size();
      partials.reset(4 * count + 64);
      partial = partials.take<float>(count);
    }
    const int64_t work = 2 * args.b * args.n * args.t * args.s * args.h;
    parallel(args.b * args.k * row_tiles * splits, [&](int64_t index) { tile(index); }, work);
    if (splits > 1) parallel(args.b * args.k * panels, [&](int64_t index) { combine(index); });
  }

  void tile(int64_t index) {
    const int64_t split = index % splits, row_tile = index / splits % row_tiles;
    const int64_t head = index / splits / row_tiles % args.k, batch = index / splits / row_tiles / args.k;
    const int64_t first = row_tile * tile_panels * kPanel, count = std::min(tile_panels * kPanel, rows - first);
    const int64_t own_panels = (count + kPanel - 1) / kPanel, query_panel = depth * kPanel;

    Scratch& scratch = thread_scratch();
    const int64_t key_tile = kKeys * (key_row + value_row + 2 * kPanel);
    scratch.reset(count * args.h * sizeof(T) + 4 * (own_panels * (query_panel + sums_size()) + key_tile) + sizeof(Sight) + 1024);
    T* gathered = scratch.take<T>(count * args.h);                // [rows, H]
    E* query = scratch.take<E>(own_panels * query_panel);         // [panels][depth][kPanel]
    E* key = scratch.take<E>(kKeys * key_row);                    // [kKeys, key_row]
    E* value = scratch.take<E>(kKeys * value_row);                // [elements(kKeys), value_row]
    float* logits = scratch.take<float>(kKeys * kPanel);          // [kKeys, kPanel]
    E* weights = scratch.take<E>(kKeys * kPanel);                 // [elements(kKeys), kPanel]
    float* own_sums = scratch.take<float>(own_panels * sums_size());
    Sight& sight = *scratch.take<Sight>(1);

    gather(args, args.query, batch, head, first, count, gathered);
    pack_transposed(gathered, args.h, count, args.h, nullptr, query);
    sight.init(args, batch, first, count);
    if (splits > 1) own_sums = partial + ((batch * args.k + head) * splits + split) * panels * sums_size();
    for (int64_t panel = 0; panel < own_panels; ++panel) {
      const Sums sums = sums_at(own_sums + panel * sums_size());
      std::fill(sums.out, sums.greatest, 0.0f);
      std::fill(sums.greatest, sums.total, -kInfinity);
      std::fill(sums.total, sums.total + kPanel, 0.0f);
    }

    const int64_t to = splits == 1 ? args.s : std::min(args.s, (split + 1) * kSplitKeys);
    for (int64_t from = split * kSplitKeys; from < to; from += kKeys) {
      const int64_t n = std::min(kKeys, to - from);
      if (!sight.look(from, n)) continue;
      const int64_t stride = args.k * args.h, offset = ((batch * args.s + from) * args.k + head) * args.h;
      copy_rows(static_cast<const T*>(args.key) + offset, stride, n, args.h, sight.keep(), key, key_row);
      copy_columns(static_cast<const T*>(args.value) + offset, stride, n, args.h, sight.keep(), value, value_row);
      for (int64_t panel = 0; panel < own_panels; ++panel) {
        const auto [start, stop, whole] = sight.range(panel);
        if (start >= stop) continue;
        // A run of rows often ends within a first half: four queries in groups of four are 16 rows.
        const int64_t columns = std::min<int64_t>(kPanel, round_up(count - panel * kPanel, kLanes));
        const Sums sums = sums_at(own_sums + panel * sums_size());
        const int64_t seen = elements<E>(stop - start), first_element = start / kValues<E>;
        multiply(key + start * key_row, key_row, 1, stop - start, query + panel * query_panel, depth, columns,
                 logits + start * kPanel, kPanel, false);
        if (scaled_early) scale_early(logits + start * kPanel, stop - start, columns);
        if (!whole) sight.hide(panel, columns, logits);
        if (columns == kPanel) softmax<2>(logits + start * kPanel, stop - start, sums, weights);
        else softmax<1>(logits + start * kPanel, stop - start, sums, weights);
        multiply(value + first_element * value_row, 1, value_row, args.h, weights, seen, columns, sums.out, kPanel, true);
      }
    }
    for (int64_t panel = 0; panel < own_panels && splits == 1; ++panel)
      finish(batch, head, first + panel * kPanel, sums_at(own_sums + panel * sums_size()));
  }

  void scale_early(float* logits, int64_t n, int64_t columns) const {
    for (int64_t j = 0; j < n; ++j, logits += kPanel) {
      for (int64_t i = 0; i < columns; i += kLanes) {
        const F x = load(logits + i) * args.scale;
        store(logits + i, args.soft_cap == 0 ? x : capped(x, args.soft_cap));
      }
    }
  }

  // Turns logits [n, kPanel] into weights [elements(n), kPanel] relative to the greatest logit so far, which they are added
  // to the sums' total with; what was summed before is scaled to it. All that in the first of the panel's halves, or in both.
  template <int Halves>
  void softmax(const float* logits, int64_t n, const Sums& sums, E* weights) const {
    F greatest[Halves], base[Halves], rescale[Halves];
    bool moved = false;
    for (int half = 0; half < Halves; ++half) {
      const float* column = logits + half * kLanes;
      F best[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
      int64_t j = 0;
      for (; j + 4 <= n; j += 4)
        for (int i = 0; i < 4; ++i) best[i] = max(best[i], load(column + (j + i) * kPanel));
      for (; j < n; ++j) best[0] = max(best[0], load(column + j * kPanel));
      const F before = load(sums.greatest + half * kLanes);
      greatest[half] = max(before, max(max(best[0], best[1]), max(best[2], best[3])));
      // A row that has seen nothing yet: -inf - -inf would be NaN.
      base[half] = greatest[half] == -kInfinity ? splat(0.0f) : greatest[half];
      rescale[half] = (before - base[half]) * factor;
      moved |= any(before != greatest[half]);
    }
    if (moved) {
      exp2_each<Halves>(rescale);
      for (int half = 0; half < Halves; ++half) {
        store(sums.greatest + half * kLanes, greatest[half]);
        store(sums.total + half * kLanes, load(sums.total + half * kLanes) * rescale[half]);
      }
      for (int64_t i = 0; i < args.h * kPanel; i += kPanel)
        for (int half = 0; half < Halves; ++half)
          store(sums.out + i + half * kLanes, load(sums.out + i + half * kLanes) * rescale[half]);
    }
    // The tile's own sums first: one running sum over all keys would round as often as there are keys.
    F added[2 * Halves] = {};
    for (int64_t j = 0; j < n; j += 2, logits += 2 * kPanel, weights += 2 / kValues<E> * kPanel) {
      F p[2 * Halves];
      for (int half = 0; half < Halves; ++half) {
        // Before the factor: of huge products a fused multiply-subtract would leave the rounding, which may be hundreds.
        p[half] = (load(logits + half * kLanes) - base[half]) * factor;
        p[Halves + half] = j + 1 < n ? (load(logits + kPanel + half * kLanes) - base[half]) * factor : splat(-kInfinity);
      }
      exp2_each<2 * Halves>(p);
      for (int i = 0; i < 2 * Halves; ++i) added[i] += p[i];
      for (int half = 0; half < Halves; ++half) store_keys(weights + half * kLanes, p[half], p[Halves + half]);
    }
    for (int half = 0; half < Halves; ++half)
      store(sums.total + half * kLanes, load(sums.total + half * kLanes) + (added[half] + added[Halves + half]));
  }

  // Rows m, m + 1 ... of the panel's sums to out and lse.
  void finish(int64_t batch, int64_t head, int64_t m, const Sums& sums) const {
    for (int64_t half = 0; half < kPanel && m + half < rows; half += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, rows - m - half);
      const F greatest = load(sums.greatest + half), total = load(sums.total + half);
      const I unseen = (greatest == -kInfinity) & (total == 0.0f);
      const F inverse = unseen ? splat(0.0f) : 1.0f / total;
      float lse[kLanes];
      // 0 * NaN, for log() gives a number for NaN.
      store(lse, unseen ? splat(-kInfinity) : greatest * scale + log(total) + 0.0f * total);
      T* targets[kLanes];
      for (int64_t i = 0; i < count; ++i) {
        args.lse[lse_offset(args, batch, head, m + half + i)] = lse[i];
        targets[i] = static_cast<T*>(args.out) + query_offset(args, batch, head, m + half + i);
      }
      for (int64_t p = 0; p < args.h; p += kLanes) {
        const int64_t left = std::min<int64_t>(kLanes, args.h - p);
        F block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = i < left ? load(sums.out + (p + i) * kPanel + half) * inverse : F{};
        transpose(block);
        for (int64_t i = 0; i < count; ++i) store_up_to(targets[i] + p, left, block[i]);
      }
    }
  }

  void combine(int64_t index) {
    const int64_t panel = index % panels, batch_head = index / panels;
    const auto part = [&](int64_t split) {
      return sums_at(partial + ((batch_head * splits + split) * panels + panel) * sums_size());
    };
    const Sums sums = part(0);
    for (int64_t half = 0; half < kPanel; half += kLanes) {
      F greatest = load(sums.greatest + half);
      for (int64_t split = 1; split < splits; ++split) greatest = max(greatest, load(part(split).greatest + half));
      const F base = greatest == -kInfinity ? splat(0.0f) : greatest;
      F total = F{};
      for (int64_t split = 0; split < splits; ++split) {
        F rescale = (load(part(split).greatest + half) - base) * factor;
        exp2_each<1>(&rescale);
        total += load(part(split).total + half) * rescale;
        for (int64_t i = half; i < args.h * kPanel; i += kPanel) {
          const F x = load(part(split).out + i) * rescale;
          store(sums.out + i, split == 0 ? x : load(sums.out + i) + x);
        }
      }
      store(sums.greatest + half, greatest);
      store(sums.total + half, total);
    }
    finish(batch_head / args.k, batch_head % args.k, panel * kPanel, sums);
  }
};

}  // namespace

void attention_forward(const AttentionArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { Forward<decltype(of)>{args}.run(parallel); });
}

}  // namespace dlm::DLM_ISA
