// Large outputs on huge pages. The C library returns freed blocks of several MiB to the system, and the
// system hands out new ones page by page: a fresh output costs a page fault for every 4 KiB. If the system
// grants huge pages on request (transparent_hugepage is madvise, the usual setting), it costs one for every 2
// MiB.
#pragma once

#include <cstddef>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gradkernels {

constexpr size_t kHugePageBytes = size_t{2} << 20;

// Call it for memory of a CPU tensor that has just been allocated, before anything is written there.
inline void request_huge_pages(void* fresh, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * kHugePageBytes) return;
  const size_t begin = (reinterpret_cast<size_t>(fresh) + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const size_t end = (reinterpret_cast<size_t>(fresh) + bytes) / kHugePageBytes * kHugePageBytes;
  // The result is ignored: after a refusal the pages are as they were.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace gradkernels
