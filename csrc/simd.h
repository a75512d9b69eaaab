// Vectors of float and uint32, and the few functions on them that kernels need.
//
// GCC's vector extension compiles +, *, comparisons and ?: to the instructions of the target, so that one text serves every
// instruction set; only what it cannot express is written per target. Each kernel source is compiled once per instruction set
// with DLM_ISA set to its name, and all of it lies in namespace dlm::DLM_ISA: an inline function compiled for AVX-512 must
// never be the copy that the linker keeps for a machine without it.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dlm::DLM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// may_alias and aligned to one element: vectors are loaded from wherever an element may lie. ULoad is aligned to 2, for it also
// loads pairs of bfloat16.
typedef float F __attribute__((vector_size(kLanes * 4)));
typedef int32_t I __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U __attribute__((vector_size(kLanes * 4)));
typedef float FLoad __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t ULoad __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef uint16_t H16 __attribute__((vector_size(kLanes * 2)));
typedef uint16_t H16Load __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

constexpr float kInfinity = __builtin_inff();

// x + F{} would cost an addition each time, for it turns -0 into 0.
inline F splat(float x) { return x - F{}; }
inline F as_float(U x) { return (F)x; }
inline U as_bits(F x) { return (U)x; }
inline F magnitude(F x) { return as_float(as_bits(x) & 0x7FFFFFFFu); }
inline F select(I mask, F a, F b) { return (F)(((I)a & mask) | ((I)b & ~mask)); }

// x86's max and min return the second operand where either is NaN; so does this text, on every target.
inline F max(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}

inline F min(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}

inline F load(const float* p) { return *(const FLoad*)p; }
inline void store(float* p, F x) { *(FLoad*)p = x; }
inline U load(const uint32_t* p) { return *(const ULoad*)p; }
inline void store(uint32_t* p, U x) { *(ULoad*)p = x; }

inline F load(const BFloat16* p) {
  const H16 bits = *(const H16Load*)p;
  return as_float(__builtin_convertvector(bits, U) << 16);
}

inline F load(const Float16* p) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  F out;
  for (int i = 0; i < kLanes; ++i) out[i] = to_float(p[i]);
  return out;
#endif
}

// Two vectors' worth of p in two halves. Which values a half has is for store_halves to know: of bfloat16, the even and the odd
// ones take fewer instructions than the first and the last.
template <int Half, typename T>
inline auto load_half(const T* p) {
  return load(p + Half * kLanes);
}

template <int Half>
inline F load_half(const BFloat16* p) {
  const U both = *(const ULoad*)p;
  return as_float(Half == 0 ? both << 16 : both & 0xFFFF0000u);
}

// x as bfloat16 in the upper half of each lane, something in the lower. Rounds to nearest, ties to even; NaN stays NaN.
inline U round_to_bfloat16(F x) {
  const U bits = as_bits(x);
  return (U)select(x != x, as_float(U{} + 0x7FC00000u), as_float(bits + 0x7FFFu + (bits >> 16 & 1u)));
}

inline U join_halves(F even, F odd) { return round_to_bfloat16(even) >> 16 | (round_to_bfloat16(odd) & 0xFFFF0000u); }

inline void store(BFloat16* p, F x) { *(H16Load*)p = __builtin_convertvector(round_to_bfloat16(x) >> 16, H16); }

inline void store(Float16* p, F x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p[i]);
#endif
}

// Two vectors' worth, from the halves that load_half makes.
template <typename T>
inline void store_halves(T* p, F first, F second) {
  store(p, first);
  store(p + kLanes, second);
}

inline void store_halves(BFloat16* p, F even, F odd) { *(ULoad*)p = join_halves(even, odd); }

// Stores without reading the memory into the caches first, nor keeping it there. p is a multiple of the vector's size, and
// finish_stores_past_caches() must come before another thread is told.
template <typename T>
inline void store_past_caches(T* p, F x) {
  alignas(64) T lanes[kLanes];
  store(lanes, x);
#if defined(__AVX512F__)
  if constexpr (sizeof(lanes) == 64) return _mm512_stream_si512((__m512i*)p, *(const __m512i*)lanes);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(lanes) == 32) return _mm256_stream_si256((__m256i*)p, *(const __m256i*)lanes);
  if constexpr (sizeof(lanes) == 16) return _mm_stream_si128((__m128i*)p, *(const __m128i*)lanes);
#endif
  std::memcpy(p, lanes, sizeof(lanes));
}

// The same for two halves.
template <typename T>
inline void store_halves_past_caches(T* p, F first, F second) {
  store_past_caches(p, first);
  store_past_caches(p + kLanes, second);
}

inline void store_halves_past_caches(BFloat16* p, F even, F odd) {
  store_past_caches(reinterpret_cast<float*>(p), as_float(join_halves(even, odd)));
}

inline void finish_stores_past_caches() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first n lanes to p (n <= kLanes); writes nothing past p[n - 1].
template <typename T>
inline void store_first(T* p, int64_t n, F x) {
  for (int i = 0; i < n; ++i) from_float(x[i], p[i]);
}

// The first n lanes from p, none where n is negative, the others `fill`; reads nothing past p[n - 1].
template <typename T>
inline F load_first(const T* p, int64_t n, float fill) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}

// The same, at once where n is kLanes or more. always_inline: an LM head in bfloat16, whose weights
// are packed with it, takes 6% longer where GCC 12 decides.
template <typename T>
[[gnu::always_inline]] inline F load_up_to(const T* p, int64_t n, float fill) {
  return n >= kLanes ? load(p) : load_first(p, n, fill);
}

// The first n lanes to p, at once where n is kLanes or more.
template <typename T>
inline void store_up_to(T* p, int64_t n, F x) {
  if (n >= kLanes) store(p, x);
  else store_first(p, n, x);
}

inline bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t set = 0;
  for (int i = 0; i < kLanes; ++i) set |= mask[i];
  return set != 0;
#endif
}

// Whether some lane of x is not less than that of y.
inline bool any_not_less(F x, F y) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_NLT_UQ) != 0;
#else
  return any(~(x < y));
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each set of lanes, as bits, the lanes in it, from the lowest.
struct LanesOf {
  uint8_t lanes[256][kLanes] = {};
  constexpr LanesOf() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0, n = 0; lane < kLanes; ++lane)
        if (set >> lane & 1) lanes[set][n++] = (uint8_t)lane;
  }
};
constexpr LanesOf kLanesOf;
#endif

// Stores the words beside those lanes of x that are at least `least`, closed up; returns how many. Writes a whole vector.
inline int64_t store_at_least(float least, F x, U words, uint32_t* to) {
#if defined(__AVX512F__)
  // Closed up in a register: into memory the instruction takes a hundred cycles on some processors.
  const __mmask16 set = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(least), _CMP_GE_OQ);
  // Into its own operand: with zeros behind, it would wait for what the register held before.
  store(to, (U)_mm512_mask_compress_epi32((__m512i)words, set, (__m512i)words));
  return __builtin_popcountll(_cvtmask16_u32(set));
#elif defined(__AVX2__)
  const int set = _mm256_movemask_ps((__m256)(x >= least));
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kLanesOf.lanes[set]));
  store(to, (U)_mm256_permutevar8x32_epi32((__m256i)words, lanes));
  return __builtin_popcount((unsigned)set);
#else
  int64_t n = 0;
  for (int i = 0; i < kLanes; ++i) {
    to[n] = words[i];
    n += x[i] >= least;
  }
  return n;
#endif
}

// Lanes of (a, b) by index: GCC before 12 has one builtin for it, Clang the other.
template <int... Lane>
inline F shuffle(F a, F b, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lane...);
#else
  return __builtin_shuffle(a, b, I{Lane...});
#endif
}

// x with the lanes of each pair that is Distance apart exchanged.
template <int Distance, int... Lane>
inline F exchange_lanes(F x, std::integer_sequence<int, Lane...>) {
  return shuffle(x, x, std::integer_sequence<int, (Lane ^ Distance)...>());
}

// join(join(lane 0, lane n / 2), ...) and so on. Halving keeps one order for every width, and rounds less than a running sum.
template <int Lanes = kLanes, typename Join>
inline float fold(F x, Join&& join) {
  if constexpr (Lanes > 1) {
    constexpr std::make_integer_sequence<int, kLanes> lanes;
    return fold<Lanes / 2>(join(x, exchange_lanes<Lanes / 2>(x, lanes)), join);
  }
  return x[0];
}

inline float sum(F x) {
  return fold(x, [](F a, F b) { return a + b; });
}

inline float max_lane(F x) {
  return fold(x, [](F a, F b) { return max(a, b); });
}

// The exponent that stands for all lower ones and for -inf: exp_bounded makes it exactly 0, where -inf would give NaN in a product.
// Without AVX-512, 2^n is built from its exponent bits, which are 0 from n = -127 on.
#if defined(__AVX512F__)
constexpr float kLeastExponent = -104.0f;
#else
constexpr float kLeastExponent = -87.8f;
#endif

// Each of N vectors becomes e^x for kLeastExponent <= x <= 88, NaN for NaN. The relative error is at most 1.6e-7 + 4.5e-8 |x|: the
// terms of a softmax that matter have x near 0. e^0 is 1. Below -87.33 the result is subnormal or 0. One vector alone waits for
// itself at every step: several in turn take half the time.
template <int N>
[[gnu::always_inline]] inline void exp_bounded(F* x) {
  F t[N], n[N], r[N], p[N];
#define DLM_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)
  DLM_EACH t[i] = x[i] * 1.44269504f;  // e^x = 2^t
#if defined(__AVX512F__)
  DLM_EACH n[i] = (F)_mm512_roundscale_ps((__m512)t[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const F shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  F shifted[N];
  DLM_EACH shifted[i] = t[i] + shifter;
  DLM_EACH n[i] = shifted[i] - shifter;
#endif
  DLM_EACH r[i] = t[i] - n[i];  // [-0.5, 0.5]; 2^r follows
  DLM_EACH p[i] = splat(1.326472731e-3f) * r[i] + 9.671513923e-3f;
  DLM_EACH p[i] = p[i] * r[i] + 5.550733954e-2f;
  DLM_EACH p[i] = p[i] * r[i] + 2.402224541e-1f;
  DLM_EACH p[i] = p[i] * r[i] + 6.931470037e-1f;
  DLM_EACH p[i] = p[i] * r[i] + 1.0f;
#if defined(__AVX512F__)
  DLM_EACH x[i] = (F)_mm512_scalef_ps((__m512)p[i], (__m512)n[i]);
#else
  DLM_EACH x[i] = p[i] * as_float((as_bits(shifted[i]) << 23) + 0x3F800000u);  // 2^n; +0 for n = -127
#endif
#undef DLM_EACH
}

// The same for any x <= 88; 0 for -inf.
template <int N>
[[gnu::always_inline]] inline void exp_each(F* x) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = max(splat(kLeastExponent), x[i]);  // NaN is the second operand, so it stays
  exp_bounded<N>(x);
}

// Each of N vectors becomes 2^x, to 1.3 ulp for -126 <= x <= 127; 0 for x < -150 and for -inf, NaN for NaN. Between, where the
// result is no normal number, 0 or to the same absolute error. Larger x is for the caller to exclude.
template <int N>
[[gnu::always_inline]] inline void exp2_each(F* x) {
  F r[N], p[N];
#define DLM_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)
#if defined(__AVX512F__)
  // The distance from the next integer below: 0 for -inf, where a subtraction would give NaN.
  DLM_EACH r[i] = (F)_mm512_reduce_ps((__m512)x[i], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  F below[N];
  DLM_EACH x[i] = max(splat(-126.75f), x[i]);  // rounds to -127, whose power is 0; NaN is the second operand, so it stays
  DLM_EACH below[i] = x[i] - 0.5f + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  DLM_EACH r[i] = x[i] - (below[i] - 12582912.0f);
#endif
  DLM_EACH p[i] = splat(1.87757669e-3f) * r[i] + 8.98933969e-3f;
  DLM_EACH p[i] = p[i] * r[i] + 5.58263175e-2f;
  DLM_EACH p[i] = p[i] * r[i] + 2.40153611e-1f;
  DLM_EACH p[i] = p[i] * r[i] + 6.93153083e-1f;
  DLM_EACH p[i] = p[i] * r[i] + 9.99999940e-1f;
#if defined(__AVX512F__)
  DLM_EACH x[i] = (F)_mm512_scalef_ps((__m512)p[i], (__m512)x[i]);
#else
  DLM_EACH x[i] = p[i] * as_float((as_bits(below[i]) << 23) + 0x3F800000u);  // 2^n; +0 for n = -127
#endif
#undef DLM_EACH
}

inline F exp(F x) {
  exp_each<1>(&x);
  return x;
}

// ln x to 1 ulp for normal x > 0; the vocabulary's uniforms are all normal.
inline F log(F x) {
  I exponent = ((I)as_bits(x) >> 23) - 126;
  F m = as_float((as_bits(x) & 0x007FFFFFu) | 0x3F000000u);  // [0.5, 1)
  const I small = m < 0.707106781186547524f;
  exponent += small;
  m = m + select(small, m, splat(0.0f)) - 1.0f;
  const F e = __builtin_convertvector(exponent, F);
  const F z = m * m;
  F p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  F y = p * m * z;
  y = y + e * -2.12194440e-4f - 0.5f * z;
  return m + y + e * 0.693359375f;
}

inline F tanh(F x) {
  // Odd, from e^-2|x|: no overflow, and 1 for every large |x|. The difference 1 - e loses digits near 0, where x is the answer.
  const F e = exp(-2.0f * magnitude(x));
  const F z = x * x;
  F small = splat(-5.70498872745e-3f);
  small = small * z + 2.06390887954e-2f;
  small = small * z - 5.37397155531e-2f;
  small = small * z + 1.33314422036e-1f;
  small = small * z - 3.33332819422e-1f;
  small = small * z * x + x;
  const F large = as_float(as_bits((1.0f - e) / (1.0f + e)) | (as_bits(x) & 0x80000000u));
  return select(magnitude(x) < 0.625f, small, large);
}

// A logit under a soft cap, which is not 0.
inline F capped(F x, float soft_cap) { return soft_cap * tanh(x / soft_cap); }

// The same, and its slope there.
inline F capped(F x, float soft_cap, F* slope) {
  const F bent = tanh(x / soft_cap);
  *slope = 1.0f - bent * bent;
  return soft_cap * bent;
}

}  // namespace
}  // namespace dlm::DLM_ISA
