// Attention backward: per batch row and kv head, each key tile meets all tiles of query rows that see it. The weights are
// recomputed from lse, each of the five products is done once, and every sum has one fixed order.
#include <cmath>

#include "attention.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kTileRows = tiles::kBackwardRows;
constexpr int64_t kTileKeys = tiles::kBackwardKeys;

// Which keys of a tile each of at most kTileRows query rows sees.
class RowTile {
 public:
  void init(const AttentionArgs& args, int64_t batch, int64_t first, int64_t count) {
    count_ = count;
    width_ = args.bounds == nullptr ? 0 : args.bounds_width;
    const int64_t groups = args.n / args.k, row = args.bounds_b == 1 ? 0 : batch;
    for (int64_t i = 0; i < count && width_ > 0; ++i)
      bounds_[i] = args.bounds + (row * args.t + (first + i) / groups) * width_;
  }

  // Turns to the keys [key, key + n), n at most kTileKeys. False where no row sees any of them.
  bool look(int64_t key, int64_t n) {
    key_ = key;
    n_ = n;
    if (width_ == 0) return true;
    seen_.clear();
    whole_ = true;
    for (int64_t i = 0; i < count_; ++i) {
      int64_t seen = 0;
      for (int64_t w = 0; w < width_; w += 2) {
        const int64_t start = clip(bounds_[i][w]), stop = clip(bounds_[i][w + 1]);
        seen_.add(start, stop);
        seen += stop - start;
      }
      whole_ &= seen == n;
    }
    return seen_.some(n);
  }

  // As SeenKeys has it.
  const uint8_t* keep() const { return width_ == 0 ? nullptr : seen_.keep(); }

  // Sets the logits of keys that row i does not see, and those of the padding behind the n-th, to -inf.
  void hide(int64_t i, float* row, int64_t padded) const {
    std::fill(row + n_, row + padded, -kInfinity);
    if (width_ == 0 || whole_) return;
    int64_t at = 0;
    for (int64_t w = 0; w < width_; w += 2) {
      const int64_t start = clip(bounds_[i][w]), stop = clip(bounds_[i][w + 1]);
      std::fill(row + at, row + start, -kInfinity);
      at = stop;
    }
    std::fill(row + at, row + n_, -kInfinity);
  }

 private:
  int64_t clip(int64_t end) const { return std::clamp<int64_t>(end - key_, 0, n_); }

  int64_t count_, width_, key_, n_;
  bool whole_;                        // every row sees every key
  const int32_t* bounds_[kTileRows];  // per row, its [start, stop) pairs
  SeenKeys<kTileKeys> seen_;
};

template <typename T>
struct Backward {
  const AttentionArgs& args;
  const int64_t groups = args.n / args.k;
  const int64_t rows = args.t * groups;
  const int64_t width = round_up(args.h, kPanel);

  void run(const Parallel& parallel) {
    parallel(args.b * args.k, [&](int64_t index) { head(index / args.k, index % args.k); });
  }

  void head(int64_t batch, int64_t head) {
    Scratch& scratch = thread_scratch();
    scratch.reset(4 * ((5 * kTileRows + 5 * kTileKeys) * width + 3 * kTileRows * kTileKeys + 2 * kTileRows) +
                  sizeof(RowTile) + 4096);
    // Not the thread's to keep: it grows with the number of queries.
    Scratch memory;
    memory.reset(4 * rows * width + 64);
    float* dquery = memory.take<float>(rows * width);             // [rows, width], to be scaled
    float* query = scratch.take<float>(kTileRows * width);        // [rows, width], scaled
    float* dout = scratch.take<float>(kTileRows * width);         // [rows, width]
    float* query_panels = scratch.take<float>(kTileRows * width); // [width / kPanel][rows][kPanel]
    float* dout_panels = scratch.take<float>(kTileRows * width);  // likewise
    float* sums = scratch.take<float>(kTileRows * width);         // [rows, width], the key tile's part of dquery
    float* key_columns = scratch.take<float>(kTileKeys * width);  // [kTileKeys / kPanel][H][kPanel], as value_columns
    float* value_columns = scratch.take<float>(kTileKeys * width);
    float* key_panels = scratch.take<float>(kTileKeys * width);   // [width / kPanel][keys][kPanel]
    float* dkey = scratch.take<float>(kTileKeys * width);         // [keys, width]
    float* dvalue = scratch.take<float>(kTileKeys * width);       // [keys, width]
    float* weights = scratch.take<float>(kTileRows * kTileKeys);      // [rows, kTileKeys], as the two below
    float* slopes = scratch.take<float>(kTileRows * kTileKeys);       // of the soft cap
    float* dlogits = scratch.take<float>(kTileRows * kTileKeys);
    float* lse = scratch.take<float>(kTileRows);
    float* delta = scratch.take<float>(kTileRows);
    RowTile& tile = *scratch.take<RowTile>(1);

    std::fill(dquery, dquery + rows * width, 0.0f);
    const int64_t key_row = args.k * args.h;
    for (int64_t key = 0; key < args.s; key += kTileKeys) {
      const int64_t n = std::min(kTileKeys, args.s - key), padded = round_up(n, kPanel);
      const int64_t offset = ((batch * args.s + key) * args.k + head) * args.h;
      std::fill(dkey, dkey + n * width, 0.0f);
      std::fill(dvalue, dvalue + n * width, 0.0f);
      for (int64_t first = 0; first < rows; first += kTileRows) {
        const int64_t count = std::min(kTileRows, rows - first);
        tile.init(args, batch, first, count);
        if (!tile.look(key, n)) continue;
        // Keys seen by other row tiles only are zeros here: they may hold what no row of this one may see.
        pack_transposed(static_cast<const T*>(args.key) + offset, key_row, n, args.h, tile.keep(), key_columns);
        pack_transposed(static_cast<const T*>(args.value) + offset, key_row, n, args.h, tile.keep(), value_columns);
        pack(static_cast<const T*>(args.key) + offset, key_row, n, args.h, tile.keep(), key_panels);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t at = query_offset(args, batch, head, first + i);
          widen(static_cast<const T*>(args.query) + at, args.h, args.scale, query + i * width);
          widen(static_cast<const T*>(args.dout) + at, args.h, 1.0f, dout + i * width);
          const int64_t lse_at = lse_offset(args, batch, head, first + i);
          lse[i] = args.lse[lse_at];
          delta[i] = dot(static_cast<const T*>(args.out) + at, dout + i * width) - args.dlse[lse_at];
        }
        pack(query, width, count, width, nullptr, query_panels);
        pack(dout, width, count, width, nullptr, dout_panels);
        multiply(query, width, 1, count, key_columns, args.h, padded, weights, kTileKeys, false);
        multiply(dout, width, 1, count, value_columns, args.h, padded, dlogits, kTileKeys, false);
        for (int64_t i = 0; i < count; ++i) {
          float *row = weights + i * kTileKeys, *slope = slopes + i * kTileKeys;
          if (args.soft_cap != 0) cap_with_slope(row, slope, padded);
          tile.hide(i, row, padded);
          // A row that sees nothing has lse -inf; its logits are all -inf, so any finite number gives weights of zero.
          const float base = lse[i] == -kInfinity ? 0.0f : lse[i];
          for (int64_t j = 0; j < padded; j += kPanel) {
            F p[2];
            // No weight is above 1, but huge logits round by hundreds, and here otherwise than for lse. NaN, the second, stays.
            for (int half = 0; half < 2; ++half) p[half] = min(splat(0.0f), load(row + j + half * kLanes) - base);
            exp_each<2>(p);
            for (int half = 0; half < 2; ++half) {
              const int64_t at = j + half * kLanes;
              F d = p[half] * (load(dlogits + i * kTileKeys + at) - delta[i]);
              if (args.soft_cap != 0) d = d * load(slope + at);
              store(row + at, p[half]);
              store(dlogits + i * kTileKeys + at, d);
            }
          }
        }
        multiply(weights, 1, kTileKeys, n, dout_panels, count, width, dvalue, width, true);
        multiply(dlogits, 1, kTileKeys, n, query_panels, count, width, dkey, width, true);
        // The tile's own sums first: one running sum over all keys would round as often as there are keys.
        multiply(dlogits, kTileKeys, 1, count, key_panels, n, width, sums, width, false);
        float* own = dquery + first * width;
        for (int64_t j = 0; j < count * width; j += kLanes) store(own + j, load(own + j) + load(sums + j));
      }
      for (int64_t j = 0; j < n; ++j) {
        narrow(dkey + j * width, 1.0f, static_cast<T*>(args.dkey) + offset + j * key_row);
        narrow(dvalue + j * width, 1.0f, static_cast<T*>(args.dvalue) + offset + j * key_row);
      }
    }
    for (int64_t m = 0; m < rows; ++m)
      narrow(dquery + m * width, args.scale, static_cast<T*>(args.dquery) + query_offset(args, batch, head, m));
  }

  float dot(const T* out, const float* dout) const {
    F total = F{};
    for (int64_t j = 0; j < args.h; j += kLanes) total += load_up_to(out + j, args.h - j, 0.0f) * load(dout + j);
    return sum(total);
  }

  void cap_with_slope(float* row, float* slopes, int64_t n) const {
    for (int64_t j = 0; j < n; j += kLanes) {
      F slope;
      store(row + j, capped(load(row + j), args.soft_cap, &slope));
      store(slopes + j, slope);
    }
  }

  void narrow(const float* in, float factor, T* out) const {
    for (int64_t j = 0; j < args.h; ++j) from_float(in[j] * factor, out[j]);
  }
};

}  // namespace

void attention_backward(const AttentionArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { Backward<decltype(of)>{args}.run(parallel); });
}

}  // namespace dlm::DLM_ISA
