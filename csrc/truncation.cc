// The most likely tokens of each row alone. The least logit that is kept is found as a radix sort would find it, by its bits from
// the highest: the mass and the number of the tokens in each bin of the highest bits tell which bin it lies in, those of the next
// bits, of that bin's tokens alone, which part of that bin, and so on. Before it, what is certainly below it is left out.
#include <algorithm>
#include <cmath>
#include <functional>

#include "fill.h"
#include "kernels.h"
#include "scratch.h"

namespace dlm::DLM_ISA {
namespace {

// Probability mass (of exponentials, not yet divided by their sum) and number of some tokens; in double the mass of a whole
// vocabulary is as good as exact.
typedef double Weight __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(kLanes * 8)));

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
constexpr int64_t kRun = 16 * kBlock;  // of which each lane's greatest logit is kept
constexpr int64_t kWork = 16;  // of a logit, in multiply-adds: an exponential is most of it

// Bits that are ordered as the numbers are, those of -0 as of 0. No number is NaN.
inline U key_of(F x) {
  const U bits = as_bits(x + F{});
  return bits ^ ((U)((I)bits >> 31) | 0x80000000u);
}

inline float of_key(uint32_t key) { return from_bits(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// The logits [j, j + kLanes) of n; -inf past the last.
template <typename T>
inline F load_within(const T* logits, int64_t n, int64_t j) {
  return load_up_to(logits + j, n - j, -kInfinity);
}

// Each lane's greatest logit of each run; returns whether none is NaN or +inf.
template <typename T>
bool greatest_of_runs(const T* logits, int64_t n, float* greatest) {
  I undefined = {};
  for (int64_t run = 0; run < n; run += kRun, greatest += kLanes) {
    F top[kUnroll];
    for (F& each : top) each = splat(-kInfinity);
    for (int64_t j = run; j < std::min(run + kRun, n); j += kBlock)
      for (int i = 0; i < kUnroll; ++i) {
        const F x = load_within(logits, n, j + i * kLanes);
        undefined |= ~(x < kInfinity);
        top[i] = max(top[i], x);
      }
    for (int i = 1; i < kUnroll; ++i) top[0] = max(top[0], top[i]);
    store(greatest, top[0]);
  }
  return !any(undefined);
}

// The masses of a block of logits: e^(inverse * (logit - top)).
template <typename T>
inline void masses_of(const T* logits, int64_t n, int64_t j, float top, float inverse, F* x) {
  for (int i = 0; i < kUnroll; ++i) x[i] = (load_within(logits, n, j + i * kLanes) - top) * inverse;
  exp_each<kUnroll>(x);
}

template <typename T>
double total_mass(const T* logits, int64_t n, float top, float inverse) {
  Doubles total = {};
  for (int64_t j = 0; j < n; j += kBlock) {
    F mass[kUnroll];
    masses_of(logits, n, j, top, inverse, mass);
    for (const F& each : mass) total += __builtin_convertvector(each, Doubles);
  }
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += total[i];
  return sum;
}

// Copies to `list` those of n logits that are at least `least`; returns how many. Writes up to kLanes more.
template <typename T>
int64_t copy_at_least(const T* logits, int64_t n, float least, Bits* list) {
  int64_t found = 0;
  for (int64_t j = 0; j < n; j += kLanes) {
    const F x = load_within(logits, n, j);
    found += store_at_least(least, x, as_bits(x), &list[found].bits);
  }
  return std::min(found, n);  // -inf past the last may be among them
}

// Adds n logits to the bins of the 11 bits of their keys from `shift` on, with no mass where there is no limit to it.
void add_to_bins(const Bits* logits, int64_t n, int shift, float top, float inverse, bool weigh, Weight (*bins)[kTables]) {
  alignas(64) float masses[kBlock] = {};
  alignas(64) uint32_t bin[kBlock];
  for (int64_t j = 0; j < n; j += kBlock) {
    for (int i = 0; i < kUnroll; ++i)
      store(bin + i * kLanes, key_of(load_within(logits, n, j + i * kLanes)) >> shift & (uint32_t)(kBins - 1));
    if (weigh) {
      F mass[kUnroll];
      masses_of(logits, n, j, top, inverse, mass);
      for (int i = 0; i < kUnroll; ++i) store(masses + i * kLanes, mass[i]);
    }
    const int64_t count = std::min(kBlock, n - j);
    for (int64_t i = 0; i < count; ++i) bins[bin[i]][i % kTables] += Weight{masses[i], 1};
  }
}

// Leaves in `list`, of n logits, those whose keys begin as `key` does, down to the bit `shift`; returns how many.
int64_t keep_bin(Bits* list, int64_t n, int shift, uint32_t key) {
  int64_t found = 0;
  for (int64_t j = 0; j < n; j += kLanes) {
    const F x = load_within(list, n, j);
    const I in_bin = key_of(x) >> shift == key >> shift;
    if (any(in_bin)) found += store_at_least(1, select(in_bin, splat(1), F{}), as_bits(x), &list[found].bits);
  }
  return std::min(found, n);  // -inf past the last may be in the bin too
}

// The least logit that is kept: the tokens above it have less mass than top_p of all, and are fewer than top_k. NaN where one is
// NaN or +inf, and -inf where all are.
template <typename T>
float least_kept(const T* logits, int64_t n, float inverse, float top_p, double top_k) {
  Scratch& scratch = thread_scratch();
  constexpr int64_t kTableBytes = kBins * kTables * sizeof(Weight);
  const int64_t lanes = (n + kRun - 1) / kRun * kLanes;
  scratch.reset(kTableBytes + lanes * 4 + (n + kLanes) * (int64_t)sizeof(Bits) + 3 * 64);
  auto bins = reinterpret_cast<Weight(*)[kTables]>(scratch.take<Weight>(kBins * kTables));
  float* greatest = scratch.take<float>(lanes);
  Bits* list = scratch.take<Bits>(n + kLanes);
  if (!greatest_of_runs(logits, n, greatest)) return __builtin_nanf("");
  const float top = *std::max_element(greatest, greatest + lanes);
  if (top == -kInfinity) return top;

  float bar = -kInfinity;  // what is below is not kept
  if (top_k < (double)lanes) {
    float* last = greatest + std::max<int64_t>((int64_t)top_k, 1) - 1;
    std::nth_element(greatest, last, greatest + lanes, std::greater<>());
    bar = *last;  // so many logits of different lanes are no less
  }
  Weight limit = {kInfinity, top_k}, above = {};
  const bool weigh = !(top_p >= 1);  // 1 is all, and so is no limit
  if (weigh) {
    const double total = total_mass(logits, n, top, inverse);
    limit[0] = top_p * total;
    // Were all n below it, they would have half of what may be left out; the other half is for rounding.
    const double below = std::log(0.5 * (1 - (double)top_p) * total / (double)n) / inverse;
    bar = below < 0 ? std::max(bar, (float)(top + below)) : top;  // not for a top_p of 0 or NaN
  }
  n = copy_at_least(logits, n, bar, list);

  uint32_t key = 0;
  for (const int shift : kShifts) {
    std::memset(bins, 0, kTableBytes);
    add_to_bins(list, n, shift, top, inverse, weigh, bins);
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
    if (shift > 0) n = keep_bin(list, n, shift, key);
  }
  return of_key(key);
}

template <typename T>
void truncate_rows(const TruncateArgs& args, const Parallel& parallel) {
  const bool large = is_large(static_cast<T*>(args.out), args.r * args.v);
  const int64_t work = args.r * args.v * kWork;
  parallel(
      args.r,
      [&](int64_t row) {
        const T* logits = static_cast<const T*>(args.logits) + row * args.v;
        T* out = static_cast<T*>(args.out) + row * args.v;
        const float top_p = args.top_p == nullptr ? 1 : args.top_p[row];
        const double top_k = args.top_k == nullptr ? (double)kInfinity : args.top_k[row];
        const float least = least_kept(logits, args.v, args.inverse_temperature[row], top_p, top_k);
        if (!(least > -kInfinity)) {
          std::copy_n(logits, args.v, out);
          return;
        }
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
