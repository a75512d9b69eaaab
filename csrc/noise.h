// The Gumbel noise of jax.random.gumbel, made in registers: threefry2x32 with 20 rounds in its partitionable form, then
// -log(-log(u)).
#pragma once

#include "simd.h"

namespace dlm::DLM_ISA {
namespace {

constexpr float kMostNoise = 15.95f;  // no draw exceeds -log(-log(1 - 2^-23)) = 15.943

inline U rotate(U x, int by) { return (x << by) | (x >> (32 - by)); }

// Both words of threefry2x32 of each of N vectors of counters (high, low) under key, xored into low.
template <int N>
[[gnu::always_inline]] inline void threefry_bits(const uint32_t* key, const U* high, U* low) {
  constexpr uint32_t kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDAu};
  U a[N], b[N];
#define DLM_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)
  DLM_EACH a[i] = high[i] + keys[0];
  DLM_EACH b[i] = low[i] + keys[1];
#pragma GCC unroll 5
  for (uint32_t group = 0; group < 5; ++group) {
#pragma GCC unroll 4
    for (int round = 0; round < 4; ++round) {
      DLM_EACH a[i] += b[i];
      DLM_EACH b[i] = rotate(b[i], kRotations[group % 2][round]) ^ a[i];
    }
    DLM_EACH a[i] += keys[(group + 1) % 3];
    DLM_EACH b[i] += keys[(group + 2) % 3] + group + 1;
  }
  DLM_EACH low[i] = a[i] ^ b[i];
#undef DLM_EACH
}

// A uniform number in [1, 2) of each counter + offset, offsets below 2^32, from which jax.random.gumbel makes its draw.
template <int N>
[[gnu::always_inline]] inline void draw_uniform(const uint32_t* key, uint64_t counter, const U* offset, F* uniform) {
  U low[N], high[N];
  for (int i = 0; i < N; ++i) {
    low[i] = offset[i] + (uint32_t)counter;
    // A lane whose low word wrapped around belongs to the next high word; a true comparison is -1.
    high[i] = (uint32_t)(counter >> 32) - (U)(low[i] < offset[i]);
  }
  threefry_bits<N>(key, high, low);
  for (int i = 0; i < N; ++i) uniform[i] = as_float((low[i] >> 9) | 0x3F800000u);
}

inline F gumbel(F uniform) { return -log(-log(uniform - 1.0f + 0x1p-126f)); }

// At least gumbel(uniform), by at most 0.07 for draws above 3: -log(u) >= 1 - u, and log2(1 - u) is at least what its bits say if
// the mantissa is read as the fraction.
[[gnu::always_inline]] inline F most_gumbel(F uniform) {
  constexpr float kLn2 = 0.693147181f;
  return __builtin_convertvector((I)as_bits(2.0f - uniform), F) * (-kLn2 * 0x1p-23f) + (127 * kLn2 + 1e-4f);  // 1e-4: rounding
}

}  // namespace
}  // namespace dlm::DLM_ISA
