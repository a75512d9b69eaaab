// Outputs too large for malloc to keep: it maps them anew for every call, and the system clears each page at its first touch.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace dlm {

constexpr int64_t kLargeBytes = 16 << 20;

// Lets the system clear 2 MiB at a time where it can: of small pages, 16000 faults in 64 MiB take longer than writing does.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;  // a multiple of a larger page size would be refused, harmlessly
  const uintptr_t begin = ((uintptr_t)data + kPage - 1) / kPage * kPage, end = ((uintptr_t)data + bytes) / kPage * kPage;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace dlm
