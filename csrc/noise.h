// The Gumbel noise of jax.random.gumbel, made in registers: threefry2x32 with 20 rounds in its partitionable form, then
// -log(-log(u)).
#pragma once

#include "simd.h"

namespace dlm::DLM_ISA {
namespace {

constexpr float kMostNoise = 15.95f;  // no draw exceeds -log(-log(1 - 2^-23)) = 15.943

inline U rotate(U x, int by) { return (x << by) | (x >> (32 - by)); }

// Both words, xored, of threefry2x32 of each of N vectors of counters (high, low) under key.
template <int N>
[[gnu::always_inline]] inline void threefry_bits(const uint32_t* key, uint32_t high, const U* low, U* bits) {
  constexpr uint32_t kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDAu};
  U a[N], b[N];
#define DLM_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)
  DLM_EACH a[i] = U{} + (high + keys[0]);
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
  DLM_EACH bits[i] = a[i] ^ b[i];
#undef DLM_EACH
}

// What jax.random.gumbel makes of bits: -log(-log(u)) of a uniform u in [0, 1).
inline F gumbel(U bits) { return -log(-log(as_float((bits >> 9) | 0x3F800000u) - 1.0f + 0x1p-126f)); }

// gumbel(bits) <= kMostBound - shortfall(bits), by at most 0.07 for draws above 3: -log(u) is at least 1 - u, of which ~bits are a
// lower bound, and log2(1 - u) is at least what its bits say if the mantissa is read as the fraction.
constexpr float kLn2 = 0.693147181f;
constexpr float kMostBound = (127 + 31) * kLn2 + 1e-4f;  // 1e-4: rounding
[[gnu::always_inline]] inline F shortfall(U bits) {
  const F left = __builtin_convertvector((I)(0x7FFFFFFFu - (bits >> 1)), F);  // 2^31 (1 - u), or less
  return __builtin_convertvector((I)as_bits(left), F) * (kLn2 * 0x1p-23f);
}

}  // namespace
}  // namespace dlm::DLM_ISA
