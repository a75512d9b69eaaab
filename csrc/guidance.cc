// Guidance mixing: streams of logits combined element by element.
#include "guidance.h"

#include <algorithm>

#include "kernels.h"
#include "pages.h"

namespace dlm::DLM_ISA {
namespace {

constexpr int64_t kColumns = 16384;  // columns of a row that one tile writes

// Calls body(row, first, n) for every piece [first, first + n) of every row.
template <typename Body>
void for_pieces(int64_t rows, int64_t columns, const Parallel& parallel, Body&& body) {
  const int64_t pieces = (columns + kColumns - 1) / kColumns;
  parallel(rows * pieces, [&](int64_t index) {
    const int64_t first = index % pieces * kColumns;
    body(index / pieces, first, std::min(kColumns, columns - first));
  });
}

// out[j] = value(j, load) for j < n, a vector, where load(p) is what the value takes from p.
template <typename T, typename Value>
void fill(T* out, int64_t n, bool large, Value&& value) {
  const auto whole = [](const T* p) { return load(p); };
  const auto first = [&](int64_t count) { return [count](const T* p) { return load_first(p, count, 0.0f); }; };
  int64_t j = 0;
  if (large) {
    constexpr int64_t kBytes = kLanes * 4;  // as aligned as a whole vector, whatever T is
    const int64_t odd_ones = std::min(n, (kBytes - (int64_t)((uintptr_t)out % kBytes)) % kBytes / (int64_t)sizeof(T));
    for (; j < odd_ones; j += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, odd_ones - j);
      store_first(out + j, count, value(j, first(count)));
    }
    j = odd_ones;
    const auto even = [](const T* p) { return load_half<0>(p); };
    const auto odd = [](const T* p) { return load_half<1>(p); };
    for (; j + 2 * kLanes <= n; j += 2 * kLanes) store_halves_past_caches(out + j, value(j, even), value(j, odd));
    finish_stores_past_caches();
  }
  for (; j + kLanes <= n; j += kLanes) store(out + j, value(j, whole));
  if (j < n) store_first(out + j, n - j, value(j, first(n - j)));
}

// Whether the output is too large for a reader to find it in the caches; malloc maps such memory anew for every call.
template <typename T>
bool is_large(const MixArgs& args) {
  const int64_t bytes = args.r * args.v * (int64_t)sizeof(T);
  if (bytes < kLargeBytes) return false;
  prefer_huge_pages(args.out, bytes);
  return true;
}

template <typename T>
void mix_rows(const MixArgs& args, const Parallel& parallel) {
  const bool large = is_large<T>(args);
  for_pieces(args.r, args.v, parallel, [&](int64_t row, int64_t first, int64_t n) {
    const int64_t at = row * args.v + first;
    const T* conditional = static_cast<const T*>(args.logits[0]) + at;
    const T* unconditional = static_cast<const T*>(args.logits[1]) + at;
    T* out = static_cast<T*>(args.out) + at;
    const float scale = args.weights[row];
    // A stream of weight zero must not matter, even where it is -inf or NaN.
    if (scale == 0 || scale == 1) {
      std::copy_n(scale == 0 ? unconditional : conditional, n, out);
    } else {
      fill(out, n, large, [&](int64_t j, auto&& load) { return mix(load(conditional + j), load(unconditional + j), scale); });
    }
  });
}

template <typename T>
void combine_rows(const MixArgs& args, const Parallel& parallel) {
  const bool large = is_large<T>(args);
  for_pieces(args.r, args.v, parallel, [&](int64_t row, int64_t first, int64_t n) {
    const T* logits = static_cast<const T*>(args.logits[0]) + row * args.v + first;
    fill(static_cast<T*>(args.out) + row * args.v + first, n, large, [&](int64_t j, auto&& load) {
      F sum = F{};
      I forbidden = I{};
      for (int64_t stream = 0; stream < args.streams; ++stream) {
        const float weight = args.weights[stream * args.r + row];
        if (weight == 0) continue;
        const F x = load(logits + stream * args.r * args.v + j);
        sum += weight * x;
        forbidden |= x == -kInfinity;
      }
      return select(forbidden, splat(-kInfinity), sum);
    });
  });
}

}  // namespace

void mix_guidance(const MixArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { mix_rows<decltype(of)>(args, parallel); });
}

void combine_guidance(const MixArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { combine_rows<decltype(of)>(args, parallel); });
}

}  // namespace dlm::DLM_ISA
