// The product under the LM head and its loss: blocks of rows of hidden states times tiles of columns of the weight.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "scratch.h"
#include "tiles.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kHeadRows = tiles::kHeadRows;
constexpr int64_t kHeadColumns = tiles::kHeadColumns;  // with kHeadRows: a tile of logits lies in second-level cache
constexpr int64_t kHeadDepth = tiles::kHeadDepth;  // elements; that much of a panel and of kRowTile rows is in first-level cache

// A packed weight has panels of this many columns on every instruction set, so that what one wrote another reads.
constexpr int64_t kPackedPanel = 32;
static_assert(kPackedPanel % kPanel == 0);

// The rows to compute, in equal blocks of at most kHeadRows: one full block and a small rest would waste the rest's weight tiles.
class HeadRows {
 public:
  template <typename Wanted>
  HeadRows(int64_t rows, Wanted&& wanted) {
    for (int64_t row = 0; row < rows; ++row)
      if (wanted(row)) rows_.push_back(row);
    const int64_t count = std::max<int64_t>(1, (size() + kHeadRows - 1) / kHeadRows);
    block_ = (size() + count - 1) / count;
  }

  int64_t size() const { return (int64_t)rows_.size(); }
  int64_t blocks() const { return block_ == 0 ? 0 : (size() + block_ - 1) / block_; }
  int64_t first(int64_t block) const { return block * block_; }
  int64_t count(int64_t block) const { return std::min(block_, size() - block * block_); }
  int64_t operator[](int64_t i) const { return rows_[i]; }

 private:
  std::vector<int64_t> rows_;
  int64_t block_;
};

// Rows of `hidden` [R,D] times columns of `weight`: [V,D], or packed
// [ceil(V / kPackedPanel)][ceil(D / kTogether)][kPackedPanel][kTogether] with zeros behind V and D.
template <typename T>
class HeadProduct {
  using E = Element<T>;

 public:
  HeadProduct(const void* hidden, const void* weight, bool packed, int64_t v, int64_t d)
      : hidden_(static_cast<const T*>(hidden)), weight_(static_cast<const T*>(weight)), packed_(packed), v_(v), d_(d) {}

  // Lays out the hidden states of all rows, which must outlive the product.
  void take(const HeadRows& rows, const Parallel& parallel) {
    const int64_t parts = (depth_ + kHeadDepth - 1) / kHeadDepth;
    rows_ = &rows;
    memory_.reset(sizeof(E) * parts * rows.size() * kHeadDepth + 64);
    left_ = memory_.take<E>(parts * rows.size() * kHeadDepth);
    parallel(parts * rows.blocks(), [&](int64_t index) {
      const int64_t block = index / parts, part = index % parts, first = rows.first(block), count = rows.count(block);
      const int64_t from = part * kHeadDepth * kValues<E>, depth = std::min(kHeadDepth * kValues<E>, d_ - from);
      E* out = left_ + (first * parts + part * count) * kHeadDepth;
      for (int64_t i = 0; i < count; ++i)
        copy_rows<E>(hidden_ + rows[first + i] * d_ + from, 0, 1, depth, nullptr, out + i * kHeadDepth, 0);
    });
  }

  // What a tile takes of a Scratch, in bytes.
  int64_t scratch() const {
    return (int64_t)sizeof(E) * laid_out() + 4 * kHeadRows * kHeadColumns + 128;
  }

  // The logits of a tile, a block of rows at a time.
  struct Tile {
    int64_t column, n;  // columns [column, column + n), n <= kHeadColumns
    float* logits;      // [rows of the block, kHeadColumns], to write to
    E* room;            // [laid_out()]
  };
  Tile tile(int64_t column, int64_t n, Scratch& scratch) const {
    return {column, n, scratch.take<float>(kHeadRows * kHeadColumns), scratch.take<E>(laid_out())};
  }

  // tile.logits[i][j] = hidden of the block's row i . weight[column + j] for j < n; something for j from n up to the next multiple
  // of kPanel. All blocks in order, from the first. A logit's sum has one order, whatever tile it falls in.
  void fill(const Tile& tile, int64_t block) const {
    const int64_t parts = (depth_ + kHeadDepth - 1) / kHeadDepth, count = rows_->count(block);
    const E* left = left_ + rows_->first(block) * parts * kHeadDepth;
    for (int64_t p = 0; p < depth_; p += kHeadDepth)  // which of all the block's rows stays in second-level cache
      for (int64_t j = 0; j < tile.n; j += kPanel) {
        const int64_t depth = std::min(kHeadDepth, depth_ - p);
        // Laid out for the first block, right before it is used, and kept for the others if there are any.
        E* kept = rows_->blocks() > 1 ? tile.room + j * depth_ + p * kPanel : tile.room;
        const E* right = (packed_ && kInPlace) || block == 0 ? panel(tile.column + j, p, depth, kept) : kept;
        multiply(left + p * count, kHeadDepth, 1, count, right, depth, kPanel, tile.logits + j, kHeadColumns, p > 0);
      }
  }

 private:
  static constexpr int64_t kTogether = __is_same(T, BFloat16) ? 2 : 1;  // values along the depth that lie together when packed

  // Whether this instruction set multiplies a packed weight where it lies.
  static constexpr bool kInPlace = kPanel == kPackedPanel && kValues<E> == kTogether && sizeof(E) == kTogether * sizeof(T);
  static_assert(kInPlace || __is_same(E, float), "no other elements are unpacked");

  // Elements of the weight that are laid out for a tile.
  int64_t laid_out() const { return rows_->blocks() > 1 ? kHeadColumns * depth_ : kPanel * kHeadDepth; }

  // Elements [p, p + depth) of columns [column, column + kPanel): [depth][kPanel], where they lie or else laid out in `room`.
  const E* panel(int64_t column, int64_t p, int64_t depth, E* room) const {
    const int64_t first = p * kValues<E>, values = std::min(depth * kValues<E>, d_ - first);
    if (!packed_) {
      pack_transposed(weight_ + column * d_ + first, d_, std::min<int64_t>(kPanel, v_ - column), values, nullptr, room);
      return room;
    }
    const int64_t steps = (d_ + kTogether - 1) / kTogether;
    const T* from = weight_ + column / kPackedPanel * steps * kPackedPanel * kTogether + column % kPackedPanel * kTogether +
                    first * kPackedPanel;
    if constexpr (kInPlace) {
      return reinterpret_cast<const E*>(from);
    } else {
      for (int64_t i = 0; i < values; i += kTogether, from += kPackedPanel * kTogether)
        for (int64_t j = 0; j < kPanel; j += kLanes) {
          float* to = room + i * kPanel + j;
          if constexpr (kTogether == 1) {
            store(to, load(from + j));
          } else {
            const U pair = *(const ULoad*)(from + 2 * j);
            store(to, as_float(pair << 16));
            if (i + 1 < values) store(to + kPanel, as_float(pair & 0xFFFF0000u));
          }
        }
      return room;
    }
  }

  const T *hidden_, *weight_;
  bool packed_;
  int64_t v_, d_, depth_ = elements<E>(d_);
  const HeadRows* rows_ = nullptr;
  Scratch memory_;
  E* left_ = nullptr;  // [blocks][parts of kHeadDepth][rows of the block][kHeadDepth]
};

}  // namespace
}  // namespace dlm::DLM_ISA
