// Lays out the operands of gemm.h's product, from arrays of any dtype.
#pragma once

#include <algorithm>
#include <utility>

#include "gemm.h"

namespace dlm::DLM_ISA {
namespace {

// Packing prefetches rows this far ahead: they lie pages apart, where no hardware prefetcher follows.
constexpr int64_t kAhead = 8;

// The next kLanes elements of a row that has n more values at p, as bits; zeros behind the last one, which nothing is read past.
template <typename E, typename T>
inline F row_elements(const T* p, int64_t n) {
  if constexpr (kValues<E> == 1) return load_up_to(p, n, 0.0f);
#if defined(__AVX512BF16__)
  else return (F)_mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << std::max<int64_t>(n, 0)) - 1, p);
#endif
}

// The next kLanes elements of a column each: rows p and, in pairs, the one behind it, null for zeros; n more values in each.
template <typename E, typename T>
inline F column_elements(const T* even, const T* odd, int64_t n) {
  if constexpr (kValues<E> == 1) return even == nullptr ? F{} : row_elements<E>(even, n);
#if defined(__AVX512BF16__)
  else {
    const __mmask16 some = n >= 16 ? 0xFFFF : (1u << std::max<int64_t>(n, 0)) - 1;
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even == nullptr ? 0 : some, even));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd == nullptr ? 0 : some, odd));
    return (F)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
#endif
}

template <typename E>
inline void store_elements(E* p, F bits) {
  store(reinterpret_cast<float*>(p), bits);
}

template <int Distance, int... Lane>
inline void exchange(F* rows, std::integer_sequence<int, Lane...>) {
  using Low = std::integer_sequence<int, (Lane & Distance ? kLanes + Lane - Distance : Lane)...>;
  using High = std::integer_sequence<int, (Lane & Distance ? kLanes + Lane : Lane + Distance)...>;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Distance) continue;
    const F a = rows[i], b = rows[i + Distance];
    rows[i] = shuffle(a, b, Low());
    rows[i + Distance] = shuffle(a, b, High());
  }
}

// Transposes kLanes x kLanes in registers, exchanging ever larger blocks.
inline void transpose(F* rows) {
  constexpr std::make_integer_sequence<int, kLanes> lanes;
  exchange<1>(rows, lanes);
  exchange<2>(rows, lanes);
  if constexpr (kLanes > 4) exchange<4>(rows, lanes);
  if constexpr (kLanes > 8) exchange<8>(rows, lanes);
}

// In all four, keep may be null; where it is false for a row of `in`, that row counts as zeros and is not read.

// A by rows: out[i * out_row + p] = element p of in[i * in_row ...], for i < n; zeros for the elements from depth up to a
// multiple of kLanes.
template <typename E, typename T>
inline void copy_rows(const T* in, int64_t in_row, int64_t n, int64_t depth, const uint8_t* keep, E* out, int64_t out_row) {
  for (int64_t i = 0; i < n; ++i) {
    const bool real = keep == nullptr || keep[i];
    for (int64_t p = 0; p < depth; p += kLanes * kValues<E>) {
      const T* source = in + i * in_row + p;
      __builtin_prefetch(source + kAhead * in_row);
      store_elements(out + i * out_row + p / kValues<E>, real ? row_elements<E>(source, depth - p) : F{});
    }
  }
}

// A by columns: out[p * out_row + j] = element p of column j, for j < n; zeros for j from n up to a multiple of kLanes.
template <typename E, typename T>
inline void copy_columns(const T* in, int64_t in_row, int64_t depth, int64_t n, const uint8_t* keep, E* out, int64_t out_row) {
  for (int64_t p = 0; p < depth; p += kValues<E>) {
    const bool second = p + 1 < depth && (keep == nullptr || keep[p + 1]);
    for (int64_t j = 0; j < n; j += kLanes) {
      const T* source = in + p * in_row + j;
      for (int64_t i = 0; i < kValues<E>; ++i) __builtin_prefetch(source + (kAhead + i) * in_row);
      const T* even = keep == nullptr || keep[p] ? source : nullptr;
      store_elements(out + p / kValues<E> * out_row + j, column_elements<E>(even, second ? source + in_row : nullptr, n - j));
    }
  }
}

// B by rows: out[j / kPanel][p][j % kPanel] = element p of in[j * in_row ...], for j < n, p < elements(depth); zeros for j from
// n up to a multiple of kPanel.
template <typename E, typename T>
inline void pack_transposed(const T* in, int64_t in_row, int64_t n, int64_t depth, const uint8_t* keep, E* out) {
  const int64_t steps = elements<E>(depth);
  for (int64_t j = 0; j < round_up(n, kPanel); j += kLanes) {
    E* column = out + j / kPanel * steps * kPanel + j % kPanel;
    for (int64_t p = 0; p < steps; p += kLanes) {
      F rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const bool real = j + i < n && (keep == nullptr || keep[j + i]);
        const T* row = in + (j + i) * in_row + p * kValues<E>;
        __builtin_prefetch(row + kLanes * in_row);
        rows[i] = real ? row_elements<E>(row, depth - p * kValues<E>) : F{};
      }
      transpose(rows);
      for (int i = 0; i < std::min<int64_t>(kLanes, steps - p); ++i) store_elements(column + (p + i) * kPanel, rows[i]);
    }
  }
}

// B by columns: out[j / kPanel][p][j % kPanel] = element p of column j, for j < n, p < elements(depth); zeros for j from n up to
// a multiple of kPanel.
template <typename E, typename T>
inline void pack(const T* in, int64_t in_row, int64_t depth, int64_t n, const uint8_t* keep, E* out) {
  for (int64_t j = 0; j < round_up(n, kPanel); j += kPanel, out += elements<E>(depth) * kPanel) {
    copy_columns(in + j, in_row, depth, std::min<int64_t>(kPanel, n - j), keep, out, kPanel);
    if (n - j <= kLanes)  // the second half of the last panel
      for (int64_t p = 0; p < elements<E>(depth); ++p) store_elements(out + p * kPanel + kLanes, F{});
  }
}

// out[i] = in[i] * factor for i < n, zeros up to n rounded up to kPanel.
template <typename T>
inline void widen(const T* in, int64_t n, float factor, float* out) {
  for (int64_t j = 0; j < round_up(n, kPanel); j += kLanes) store(out + j, load_up_to(in + j, n - j, 0.0f) * factor);
}

}  // namespace
}  // namespace dlm::DLM_ISA
