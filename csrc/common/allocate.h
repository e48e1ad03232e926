// Large outputs on huge pages, for tensors of ATen.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/huge_pages.h"

namespace gradkernels {

// Call it for a tensor that has just been allocated, before anything is written to the tensor.
inline at::Tensor on_huge_pages(at::Tensor fresh) {
  if (fresh.device().is_cpu() && fresh.nbytes() >= 2 * kHugePageBytes) request_huge_pages(fresh.mutable_data_ptr(), fresh.nbytes());
  return fresh;
}

}  // namespace gradkernels
