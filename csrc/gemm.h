// The one matrix product, under attention, the LM head and the experts: C (+)= A B on tiles that lie in cache, with float32 sums.
//
// Operands are made of elements: floats, or pairs of bfloat16 that follow each other along the depth, which one instruction
// multiplies and adds. Element<T> is what an array of T is multiplied in. pack.h lays operands out.
#pragma once

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

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename T>
struct ElementOf {
  using type = float;
};
inline F multiply_add(F a, F b, F sum) { return a * b + sum; }

#if defined(__AVX512BF16__)
// Neighbours along the depth, zero behind an odd last one.
struct Pair {
  BFloat16 even, odd;
};
template <>
struct ElementOf<BFloat16> {
  using type = Pair;
};
inline U load(const Pair* p) { return *(const ULoad*)p; }
inline void store(Pair* p, U x) { *(ULoad*)p = x; }
inline U splat(Pair x) { return U{} + __builtin_bit_cast(uint32_t, x); }
// Denormal products and sums count as zero.
inline F multiply_add(U a, U b, F sum) { return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#endif

template <typename T>
using Element = typename ElementOf<T>::type;

// How many values along the depth an element holds, and how many elements a depth takes.
template <typename E>
constexpr int64_t kValues = __is_same(E, float) ? 1 : 2;
template <typename E>
inline int64_t elements(int64_t depth) {
  return (depth + kValues<E> - 1) / kValues<E>;
}

// c[i][j] (+)= sum over p < depth of a[i * a_row + p * a_step] * b[p * b_step + j], for i < Rows, j < Halves * kLanes. b may be of
// numbers that are widened as they are loaded: then columns lie in c as load_half has them.
template <int Rows, int Halves, typename E, typename B>
inline void register_tile(const E* a, int64_t a_row, int64_t a_step, const B* b, int64_t b_step, int64_t depth, float* c,
                          int64_t c_row, bool accumulate) {
  F left[Rows], right[Rows];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    left[i] = accumulate ? load(c + i * c_row) : F{};
    if constexpr (Halves == 2) right[i] = accumulate ? load(c + i * c_row + kLanes) : F{};
  }
  for (int64_t p = 0; p < depth; ++p, a += a_step, b += b_step) {
    const auto b_left = load_half<0>(b), b_right = Halves == 2 ? load_half<1>(b) : b_left;
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const auto x = splat(a[i * a_row]);
      left[i] = multiply_add(x, b_left, left[i]);
      if constexpr (Halves == 2) right[i] = multiply_add(x, b_right, right[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    store(c + i * c_row, left[i]);
    if constexpr (Halves == 2) store(c + i * c_row + kLanes, right[i]);
  }
}

template <int Rows, int Halves, typename E, typename B>
inline void last_rows(int64_t rows, const E* a, int64_t a_row, int64_t a_step, const B* b, int64_t b_step, int64_t depth, float* c,
                      int64_t c_row, bool accumulate) {
  if constexpr (Rows > 0) {
    if (rows == Rows) return register_tile<Rows, Halves>(a, a_row, a_step, b, b_step, depth, c, c_row, accumulate);
    last_rows<Rows - 1, Halves>(rows, a, a_row, a_step, b, b_step, depth, c, c_row, accumulate);
  }
}

template <int Halves, typename E, typename B>
inline void multiply_panel(const E* a, int64_t a_row, int64_t a_step, int64_t rows, const B* b, int64_t b_step, int64_t depth,
                           float* c, int64_t c_row, bool accumulate) {
  int64_t i = 0;
  for (; i + kRowTile <= rows; i += kRowTile)
    register_tile<kRowTile, Halves>(a + i * a_row, a_row, a_step, b, b_step, depth, c + i * c_row, c_row, accumulate);
  last_rows<kRowTile - 1, Halves>(rows - i, a + i * a_row, a_row, a_step, b, b_step, depth, c + i * c_row, c_row, accumulate);
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns]; depth, a_row and a_step count elements; B lies in panels:
// b[panel][p][kPanel]. Columns is a multiple of kLanes: of the last panel, half may be all that is wanted. A sum runs over p in
// order, whatever the tile it falls in: neither rows nor columns depend on each other.
template <typename E>
inline void multiply(const E* a, int64_t a_row, int64_t a_step, int64_t rows, const E* b, int64_t depth, int64_t columns,
                     float* c, int64_t c_row, bool accumulate) {
  int64_t j = 0;
  for (; j + kPanel <= columns; j += kPanel)
    multiply_panel<2>(a, a_row, a_step, rows, b + j * depth, kPanel, depth, c + j, c_row, accumulate);
  if (j < columns) multiply_panel<1>(a, a_row, a_step, rows, b + j * depth, kPanel, depth, c + j, c_row, accumulate);
}

}  // namespace
}  // namespace dlm::DLM_ISA
