// The one matrix product under attention and the LM head: C (+)= A B on tiles that lie in cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace dlm::DLM_ISA {
namespace {

// A register tile is kRowTile x kPanel: as many accumulators as leave registers for a row of B and one element of A.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRowTile = 12;
#else
constexpr int kRowTile = 6;
#endif
constexpr int kPanel = 2 * kLanes;

// Packing prefetches rows this far ahead: they lie pages apart, where no hardware prefetcher follows.
constexpr int64_t kAhead = 8;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// c[i][j] (+)= sum over p < depth of a[i * a_row + p * a_step] * b[p * kPanel + j], for i < Rows, j < kPanel.
template <int Rows, typename B>
inline void register_tile(const float* a, int64_t a_row, int64_t a_step, const B* b, int64_t depth, float* c,
                          int64_t c_row, bool accumulate) {
  F left[Rows], right[Rows];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    left[i] = accumulate ? load(c + i * c_row) : F{};
    right[i] = accumulate ? load(c + i * c_row + kLanes) : F{};
  }
  for (int64_t p = 0; p < depth; ++p, a += a_step, b += kPanel) {
    const F b_left = load(b), b_right = load(b + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const F x = splat(a[i * a_row]);
      left[i] += x * b_left;
      right[i] += x * b_right;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    store(c + i * c_row, left[i]);
    store(c + i * c_row + kLanes, right[i]);
  }
}

template <int Rows, typename B>
inline void last_rows(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const B* b, int64_t depth, float* c,
                      int64_t c_row, bool accumulate) {
  if constexpr (Rows > 0) {
    if (rows == Rows) return register_tile<Rows>(a, a_row, a_step, b, depth, c, c_row, accumulate);
    last_rows<Rows - 1>(rows, a, a_row, a_step, b, depth, c, c_row, accumulate);
  }
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns]; columns is a multiple of kPanel, B lies in panels:
// b[panel][p][kPanel]. An element's sum runs over p in order, whatever the tile it falls in: rows do not depend on each other.
template <typename B>
inline void multiply(const float* a, int64_t a_row, int64_t a_step, int64_t rows, const B* b, int64_t depth,
                     int64_t columns, float* c, int64_t c_row, bool accumulate) {
  for (int64_t j = 0; j < columns; j += kPanel, b += depth * kPanel, c += kPanel) {
    int64_t i = 0;
    for (; i + kRowTile <= rows; i += kRowTile)
      register_tile<kRowTile>(a + i * a_row, a_row, a_step, b, depth, c + i * c_row, c_row, accumulate);
    last_rows<kRowTile - 1>(rows - i, a + i * a_row, a_row, a_step, b, depth, c + i * c_row, c_row, accumulate);
  }
}

template <int Distance>
inline void exchange(F* rows) {
  I low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane & Distance ? kLanes + lane - Distance : lane;
    high[lane] = lane & Distance ? kLanes + lane : lane + Distance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Distance) continue;
    const F a = rows[i], b = rows[i + Distance];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + Distance] = __builtin_shuffle(a, b, high);
  }
}

// Transposes kLanes x kLanes in registers, exchanging ever larger blocks.
inline void transpose(F* rows) {
  exchange<1>(rows);
  exchange<2>(rows);
  if constexpr (kLanes > 4) exchange<4>(rows);
  if constexpr (kLanes > 8) exchange<8>(rows);
}

// Rows of `in` become columns of panels: out[j / kPanel][p][j % kPanel] = in[j * in_row + p] for j < n, p < depth; zeros for
// j in [n, n rounded up to kPanel). keep (per j) may be null; where it is false the column is zero and `in` is not read.
template <typename T>
inline void pack_transposed(const T* in, int64_t in_row, int64_t n, int64_t depth, const uint8_t* keep, float* out) {
  for (int64_t j = 0; j < round_up(n, kPanel); j += kLanes) {
    float* column = out + j / kPanel * depth * kPanel + j % kPanel;
    for (int64_t p = 0; p < depth; p += kLanes) {
      F rows[kLanes];
      const int64_t left = depth - p;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const bool real = j + i < n && (keep == nullptr || keep[j + i]);
        const T* row = in + (j + i) * in_row + p;
        __builtin_prefetch(row + kLanes * in_row);
        rows[i] = !real ? F{} : left >= kLanes ? load(row) : load_first(row, left, 0.0f);
      }
      transpose(rows);
      for (int i = 0; i < std::min<int64_t>(kLanes, left); ++i) store(column + (p + i) * kPanel, rows[i]);
    }
  }
}

// Columns stay columns: out[j / kPanel][p][j % kPanel] = in[p * in_row + j] for p < depth, j < n; zeros beyond n, and in
// rows p where keep is false.
template <typename T>
inline void pack(const T* in, int64_t in_row, int64_t depth, int64_t n, const uint8_t* keep, float* out) {
  for (int64_t p = 0; p < depth; ++p) {
    const bool real = keep == nullptr || keep[p];
    for (int64_t j = 0; j < round_up(n, kPanel); j += kLanes) {
      const T* source = in + p * in_row + j;
      __builtin_prefetch(source + kAhead * in_row);
      const F x = !real || j >= n ? F{} : n - j >= kLanes ? load(source) : load_first(source, n - j, 0.0f);
      store(out + j / kPanel * depth * kPanel + p * kPanel + j % kPanel, x);
    }
  }
}

// out[i] = in[i] * factor for i < n, zeros up to n rounded up to kPanel.
template <typename T>
inline void widen(const T* in, int64_t n, float factor, float* out) {
  for (int64_t j = 0; j < round_up(n, kPanel); j += kLanes) {
    const F x = j >= n ? F{} : n - j >= kLanes ? load(in + j) : load_first(in + j, n - j, 0.0f);
    store(out + j, x * factor);
  }
}

}  // namespace
}  // namespace dlm::DLM_ISA
