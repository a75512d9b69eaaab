// The most likely tokens of each row alone. The least logit that is kept is found as a radix sort would find it, by its bits from
// the highest: the mass and the number of the tokens in each bin of the highest bits tell which bin it lies in, those of the next
// bits, of that bin's tokens alone, which part of that bin, and so on.
#include <algorithm>

#include "fill.h"
#include "kernels.h"
#include "scratch.h"

namespace dlm::DLM_ISA {
namespace {

// Probability mass (of exponentials, not yet divided by their sum) and number of some tokens; in double the mass of a whole
// vocabulary is as good as exact.
typedef double Weight __attribute__((vector_size(16)));

// A float32 as store_at_least leaves it.
struct Bits {
  uint32_t bits;
};
inline float to_float(Bits x) { return from_bits(x.bits); }
inline F load(const Bits* p) { return as_float(load(&p->bits)); }

constexpr int kShifts[] = {21, 10, 0};  // of the 11 bits of a key that are looked at
constexpr int kBins = 1 << 11;
constexpr int kTables = 2;  // that take turns: an addition to a bin would wait for the one just before it
constexpr int kUnroll = 4;  // vectors
constexpr int64_t kBlock = kUnroll * kLanes;

// Bits that are ordered as the numbers are, those of -0 as of 0. No number is NaN.
inline U key_of(F x) {
  const U bits = as_bits(x + F{});
  return bits ^ ((U)((I)bits >> 31) | 0x80000000u);
}

inline float of_key(uint32_t key) { return from_bits(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// The logits [j, j + kLanes) of n; -inf past the last.
template <typename T>
inline F load_within(const T* logits, int64_t n, int64_t j) {
  if (j + kLanes <= n) return load(logits + j);
  return load_first(logits + std::min(j, n), std::max<int64_t>(0, n - j), -kInfinity);
}

// Adds n logits to the bins of the 11 bits of their keys from `shift` on. A mass is e^(inverse * (logit - top)), or 0.
template <typename T>
void add_to_bins(const T* logits, int64_t n, int shift, float top, float inverse, bool weigh, Weight (*bins)[kTables]) {
  alignas(64) float masses[kBlock] = {};
  alignas(64) uint32_t bin[kBlock];
  for (int64_t j = 0; j < n; j += kBlock) {
    F x[kUnroll];
    for (int i = 0; i < kUnroll; ++i) {
      x[i] = load_within(logits, n, j + i * kLanes);
      store(bin + i * kLanes, key_of(x[i]) >> shift & (uint32_t)(kBins - 1));
    }
    if (weigh) {
      for (F& each : x) each = (each - top) * inverse;
      exp_each<kUnroll>(x);
      for (int i = 0; i < kUnroll; ++i) store(masses + i * kLanes, x[i]);
    }
    const int64_t count = std::min(kBlock, n - j);
    for (int64_t i = 0; i < count; ++i) bins[bin[i]][i % kTables] += Weight{masses[i], 1};
  }
}

// Copies to `list` those of n logits whose keys begin as `key` does, down to the bit `shift`; returns how many. Writes up to
// kLanes more, and no further than it has read, so that `list` may be `logits`.
template <typename T>
int64_t copy_of_bin(const T* logits, int64_t n, int shift, uint32_t key, Bits* list) {
  int64_t found = 0;
  for (int64_t j = 0; j < n; j += kLanes) {
    const F x = load_within(logits, n, j);
    const I in_bin = key_of(x) >> shift == key >> shift;
    if (any(in_bin)) found += store_at_least(1, select(in_bin, splat(1), F{}), as_bits(x), &list[found].bits);
  }
  return std::min(found, n);  // -inf past the last may be in the bin too
}

// The least logit that is kept: the tokens above it have less mass than top_p of all, and are fewer than top_k.
template <typename T>
float least_kept(const T* logits, int64_t n, float top, float inverse, float top_p, double top_k) {
  Scratch& scratch = thread_scratch();
  constexpr int64_t kTableBytes = kBins * kTables * sizeof(Weight);
  scratch.reset(kTableBytes + (n + kLanes) * (int64_t)sizeof(Bits) + 2 * 64);
  auto bins = reinterpret_cast<Weight(*)[kTables]>(scratch.take<Weight>(kBins * kTables));
  Bits* list = scratch.take<Bits>(n + kLanes);
  const bool weigh = !(top_p >= 1);  // 1 is all, and so is no limit
  Weight limit = {kInfinity, top_k}, above = {};
  uint32_t key = 0;
  for (const int shift : kShifts) {
    const bool first = shift == kShifts[0];
    std::memset(bins, 0, kTableBytes);
    if (first) {
      add_to_bins(logits, n, shift, top, inverse, weigh, bins);
    } else {
      add_to_bins(list, n, shift, top, inverse, weigh, bins);
    }
    if (first && weigh) {
      Weight total[kTables] = {};
      for (int bin = 0; bin < kBins; ++bin)
        for (int table = 0; table < kTables; ++table) total[table] += bins[bin][table];
      limit[0] = top_p * (total[0] + total[1])[0];
    }
    // From the greatest down, until it is enough. Where it never is, by rounding or as all are kept, the last bin decides.
    uint32_t deciding = 0;
    Weight reached = above;
    for (int bin = kBins - 1; bin >= 0; --bin) {
      const Weight inside = bins[bin][0] + bins[bin][1];
      if (inside[1] == 0) continue;
      deciding = bin;
      above = reached;
      reached += inside;
      if (!(reached[0] < limit[0] && reached[1] < limit[1])) break;
    }
    key |= deciding << shift;
    if (shift > 0) n = first ? copy_of_bin(logits, n, shift, key, list) : copy_of_bin(list, n, shift, key, list);
  }
  return of_key(key);
}

// The greatest logit; NaN where one is NaN or +inf.
template <typename T>
float greatest(const T* logits, int64_t n) {
  F top[kUnroll];
  I undefined = {};
  for (F& each : top) each = splat(-kInfinity);
  for (int64_t j = 0; j < n; j += kBlock) {
    for (int i = 0; i < kUnroll; ++i) {
      const F x = load_within(logits, n, j + i * kLanes);
      undefined |= ~(x < kInfinity);
      top[i] = max(top[i], x);
    }
  }
  if (any(undefined)) return __builtin_nanf("");
  for (int i = 1; i < kUnroll; ++i) top[0] = max(top[0], top[i]);
  return max_lane(top[0]);
}

template <typename T>
void truncate_rows(const TruncateArgs& args, const Parallel& parallel) {
  const bool large = is_large(static_cast<T*>(args.out), args.r * args.v);
  const int64_t work = args.r * args.v * 16;
  parallel(
      args.r,
      [&](int64_t row) {
        const T* logits = static_cast<const T*>(args.logits) + row * args.v;
        T* out = static_cast<T*>(args.out) + row * args.v;
        const float top = greatest(logits, args.v);
        if (!(top > -kInfinity)) {
          std::copy_n(logits, args.v, out);
          return;
        }
        const float top_p = args.top_p == nullptr ? 1 : args.top_p[row];
        const double top_k = args.top_k == nullptr ? (double)kInfinity : args.top_k[row];
        const float least = least_kept(logits, args.v, top, args.inverse_temperature[row], top_p, top_k);
        fill(out, args.v, large, [&](int64_t j, auto&& load) {
          const F x = load(logits + j);
          return select(x >= least, x, splat(-kInfinity));
        });
      },
      work);
}

}  // namespace

void truncate_logits(const TruncateArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { truncate_rows<decltype(of)>(args, parallel); });
}

}  // namespace dlm::DLM_ISA
