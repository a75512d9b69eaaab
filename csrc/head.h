// A tile of the LM head's logits: some rows of hidden states times some rows of the weight.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "scratch.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kHeadRows = 192;   // with kHeadColumns and kHeadDepth: hidden, weight and logits fill 420 KiB of second-level cache
constexpr int64_t kHeadColumns = 128;
constexpr int64_t kHeadDepth = 256;

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

constexpr int64_t kHeadScratch = 4 * (kHeadRows * kHeadDepth + kHeadColumns * kHeadDepth) + 256;  // bytes that head_tile takes

// logits[i][j] = hidden[rows[first + i]] . weight[column + j] for i < count <= kHeadRows, j < n <= kHeadColumns; zeros for j from n
// up to the next multiple of kPanel. logits: [kHeadRows, kHeadColumns]. A logit's sum has one order, whatever tile it falls in.
template <typename T>
void head_tile(const T* hidden, const T* weight, int64_t d, const HeadRows& rows, int64_t first, int64_t count, int64_t column,
               int64_t n, Scratch& scratch, float* logits) {
  float* left = scratch.take<float>(kHeadRows * kHeadDepth);      // [rows, kHeadDepth]
  float* right = scratch.take<float>(kHeadColumns * kHeadDepth);  // [columns / kPanel][depth][kPanel]
  for (int64_t p = 0; p < d; p += kHeadDepth) {
    const int64_t depth = std::min(kHeadDepth, d - p);
    for (int64_t i = 0; i < count; ++i) widen(hidden + rows[first + i] * d + p, depth, 1.0f, left + i * kHeadDepth);
    pack_transposed(weight + column * d + p, d, n, depth, nullptr, right);
    multiply(left, kHeadDepth, 1, count, right, depth, round_up(n, kPanel), logits, kHeadColumns, p > 0);
  }
}

}  // namespace
}  // namespace dlm::DLM_ISA
