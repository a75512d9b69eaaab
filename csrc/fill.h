// Rows of an output written vector by vector, past the caches where it is large.
#pragma once

#include <algorithm>

#include "pages.h"
#include "simd.h"

namespace dlm::DLM_ISA {
namespace {

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

// Whether an output of n values is too large for a reader to find it in the caches; malloc maps such memory anew for every call.
template <typename T>
bool is_large(T* out, int64_t n) {
  const int64_t bytes = n * (int64_t)sizeof(T);
  if (bytes < kLargeBytes) return false;
  prefer_huge_pages(out, bytes);
  return true;
}

}  // namespace
}  // namespace dlm::DLM_ISA
