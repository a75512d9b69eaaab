// Attention forward: tiles of query rows against tiles of keys, with an online softmax; the logits never leave the cache.
//
// The G query heads that share a kv head are packed into one tile of rows: row m is query m / G, head m % G. Each key tile is
// converted to float32 and packed once for all rows of the tile.
#include <cmath>

#include "attention.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kRows = 192;       // a multiple of every kRowTile; each key tile is packed once for so many rows
constexpr int64_t kKeys = 128;       // rows x keys of logits, query, out, the key and the value tile share 512 KiB of second-level cache
constexpr int64_t kSplitKeys = 4096; // a lone row tile splits its keys in pieces of this; of S alone, so batch-invariant

template <typename T>
struct Forward {
  const AttentionArgs& args;
  const int64_t groups = args.n / args.k;
  const int64_t rows = args.t * groups;               // per kv head
  const int64_t row_tiles = (rows + kRows - 1) / kRows;
  const int64_t splits = row_tiles == 1 ? (args.s + kSplitKeys - 1) / kSplitKeys : 1;
  const int64_t width = round_up(args.h, kPanel);

  float* partial_out = nullptr;                       // [B,K,splits,rows,width], not normalised
  float* partial_max = nullptr;                       // [B,K,splits,rows]
  float* partial_sum = nullptr;                       // [B,K,splits,rows]

  void run(const Parallel& parallel) {
    Scratch partials;
    if (splits > 1) {
      const int64_t count = args.b * args.k * splits * rows;
      partials.reset(count * (width + 2) * 4 + 192);
      partial_out = partials.take<float>(count * width);
      partial_max = partials.take<float>(count);
      partial_sum = partials.take<float>(count);
    }
    parallel(args.b * args.k * row_tiles * splits, [&](int64_t index) { tile(index); });
    if (splits > 1) parallel(args.b * args.k * rows, [&](int64_t index) { combine(index); });
  }

  void tile(int64_t index) {
    const int64_t split = index % splits, row_tile = index / splits % row_tiles;
    const int64_t head = index / splits / row_tiles % args.k, batch = index / splits / row_tiles / args.k;
    const int64_t first = row_tile * kRows, count = std::min(kRows, rows - first);

    Scratch& scratch = thread_scratch();
    scratch.reset(4 * (kRows * (2 * width + kKeys + 2) + 2 * kKeys * width) + sizeof(RowTile) + 1024);
    float* query = scratch.take<float>(kRows * width);     // [rows, width], scaled
    float* keys = scratch.take<float>(kKeys * width);      // [kKeys / kPanel][H][kPanel]
    float* values = scratch.take<float>(kKeys * width);    // [width / kPanel][kKeys][kPanel]
    float* logits = scratch.take<float>(kRows * kKeys);    // [rows, kKeys]
    float* out = scratch.take<float>(kRows * width);       // [rows, width]
    float* greatest = scratch.take<float>(kRows);
    float* total = scratch.take<float>(kRows);
    RowTile& tile = *scratch.take<RowTile>(1);

    tile.init(args, batch, first, count);
    for (int64_t i = 0; i < count; ++i) {
      widen(static_cast<const T*>(args.query) + query_offset(args, batch, head, first + i), args.h, args.scale, query + i * width);
      greatest[i] = -kInfinity;
      total[i] = 0;
    }
    std::fill(out, out + count * width, 0.0f);

    const int64_t from = split * kSplitKeys, to = splits == 1 ? args.s : std::min(args.s, from + kSplitKeys);
    const int64_t key_row = args.k * args.h, head_offset = (batch * args.s * args.k + head) * args.h;
    for (int64_t key = from; key < to; key += kKeys) {
      const int64_t n = std::min(kKeys, to - key), padded = round_up(n, kPanel);
      if (!tile.look(key, n)) continue;
      const int64_t offset = head_offset + key * key_row;
      pack_transposed(static_cast<const T*>(args.key) + offset, key_row, n, args.h, tile.keep(), keys);
      multiply(query, width, 1, count, keys, args.h, padded, logits, kKeys, false);
      for (int64_t i = 0; i < count; ++i) {
        float* row = logits + i * kKeys;
        if (args.soft_cap != 0) cap(row, padded, args.soft_cap);
        tile.hide(i, row, padded);
        const float rescale = softmax(row, padded, greatest[i], total[i]);
        if (rescale != 1.0f)
          for (int64_t j = 0; j < width; j += kLanes) store(out + i * width + j, load(out + i * width + j) * rescale);
      }
      pack(static_cast<const T*>(args.value) + offset, key_row, n, args.h, tile.keep(), values);
      multiply(logits, kKeys, 1, count, values, n, width, out, width, true);
    }
    if (splits == 1) {
      for (int64_t i = 0; i < count; ++i) finish(batch, head, first + i, out + i * width, greatest[i], total[i]);
    } else {
      const int64_t base = ((batch * args.k + head) * splits + split) * rows;
      std::copy(out, out + count * width, partial_out + base * width);
      std::copy(greatest, greatest + count, partial_max + base);
      std::copy(total, total + count, partial_sum + base);
    }
  }

  // Turns a row of logits into exponentials relative to the greatest so far, and returns what earlier sums are to be scaled by.
  static float softmax(float* row, int64_t n, float& greatest, float& total) {
    F best = splat(-kInfinity);
    for (int64_t j = 0; j < n; j += kLanes) best = max(best, load(row + j));
    const float before = greatest, now = std::max(before, max_lane(best));
    // A row that has seen nothing yet: -inf - -inf would be NaN.
    const float base = now == -kInfinity ? 0.0f : now;
    F added = F{};
    for (int64_t j = 0; j < n; j += kPanel) {
      F p[2] = {load(row + j) - base, load(row + j + kLanes) - base};
      exp_each<2>(p);
      store(row + j, p[0]);
      store(row + j + kLanes, p[1]);
      added += p[0] + p[1];
    }
    const float rescale = before == now ? 1.0f : std::exp(before - base);
    greatest = now;
    total = total * rescale + sum(added);
    return rescale;
  }

  void finish(int64_t batch, int64_t head, int64_t m, const float* out, float greatest, float total) {
    T* target = static_cast<T*>(args.out) + query_offset(args, batch, head, m);
    const bool seen = !(greatest == -kInfinity && total == 0);
    const float inverse = seen ? 1.0f / total : 0.0f;
    for (int64_t j = 0; j < args.h; ++j) from_float(out[j] * inverse, target[j]);
    args.lse[lse_offset(args, batch, head, m)] = seen ? greatest + std::log(total) : -kInfinity;
  }

  void combine(int64_t index) {
    const int64_t m = index % rows, pair = index / rows;
    Scratch& scratch = thread_scratch();
    scratch.reset(width * 4 + 64);
    float* out = scratch.take<float>(width);
    std::fill(out, out + width, 0.0f);
    float greatest = -kInfinity, total = 0;
    for (int64_t split = 0; split < splits; ++split) greatest = std::max(greatest, partial_max[(pair * splits + split) * rows + m]);
    for (int64_t split = 0; split < splits; ++split) {
      const int64_t at = (pair * splits + split) * rows + m;
      if (partial_max[at] == -kInfinity && partial_sum[at] == 0) continue;
      const float factor = std::exp(partial_max[at] - greatest);
      total += partial_sum[at] * factor;
      for (int64_t j = 0; j < width; j += kLanes) store(out + j, load(out + j) + load(partial_out + at * width + j) * factor);
    }
    finish(pair / args.k, pair % args.k, m, out, greatest, total);
  }
};

}  // namespace

void attention_forward(const AttentionArgs& args, const Parallel& parallel) {
  switch (args.dtype) {
    case DType::kFloat32: return Forward<float>{args}.run(parallel);
    case DType::kBFloat16: return Forward<BFloat16>{args}.run(parallel);
    case DType::kFloat16: return Forward<Float16>{args}.run(parallel);
  }
}

}  // namespace dlm::DLM_ISA
