// Large outputs on huge pages. The C library gives blocks of some MiB back to the system when they are freed and gets them again page by
// page: a fresh output then costs a page fault for every 4 KiB. Where the system grants huge pages on request (transparent_hugepage is
// madvise, the usual setting), it is one for every 2 MiB.
#pragma once

#include <ATen/core/Tensor.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gradkernels {

constexpr size_t kHugePageBytes = size_t{2} << 20;

// To be called on a tensor that has just been allocated, before anything is written to it.
inline at::Tensor on_huge_pages(at::Tensor fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (fresh.device().is_cpu() && fresh.nbytes() >= 2 * kHugePageBytes) {
    const size_t begin = (reinterpret_cast<size_t>(fresh.mutable_data_ptr()) + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    const size_t end = (reinterpret_cast<size_t>(fresh.mutable_data_ptr()) + fresh.nbytes()) / kHugePageBytes * kHugePageBytes;
    // A refusal leaves the pages as they are, which is all it could mean here.
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return fresh;
}

}  // namespace gradkernels
