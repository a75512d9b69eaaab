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
  int64_t j = 0;
  const auto fill_up_to = [&](int64_t end) {
    for (; j < end; j += kLanes)
      store_up_to(out + j, end - j, value(j, [&](const T* p) { return load_up_to(p, end - j, 0.0f); }));
    j = end;
  };
  if (large) {
    constexpr int64_t kBytes = kLanes * 4;  // as aligned as a whole vector, whatever T is
    const int64_t odd_ones = std::min(n, (kBytes - (int64_t)((uintptr_t)out % kBytes)) % kBytes / (int64_t)sizeof(T));
    fill_up_to(odd_ones);
    const auto even = [](const T* p) { return load_half<0>(p); };
    const auto odd = [](const T* p) { return load_half<1>(p); };
    for (; j + 2 * kLanes <= n; j += 2 * kLanes) store_halves_past_caches(out + j, value(j, even), value(j, odd));
    finish_stores_past_caches();
  }
  fill_up_to(n);
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
