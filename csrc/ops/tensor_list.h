// Checks of the operators over lists of tensors: clipping and RMSprop.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/extents.h"

namespace gradkernels {

// Every tensor must have a kernel, and all must be on one device.
inline void check_tensors(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.device() == tensors.front().device(),
                "Expected all tensors to be on the same device, but found at least two devices, ", tensors.front().device(), " and ",
                tensor.device(), "!");
    TORCH_CHECK_NOT_IMPLEMENTED(has_kernel(tensor), "\"clip_grad\" not implemented for '", tensor.scalar_type(), "' on ", tensor.device());
  }
}

// Whether no two tensors can share memory: whether the ranges from their first to their last elements are
// disjoint.
inline bool disjoint(at::TensorList tensors) {
  std::vector<Extent> extents;
  extents.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    int64_t last = tensor.numel() - 1;
    if (!tensor.is_non_overlapping_and_dense()) {
      last = 0;
      for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    }
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    extents.push_back({begin, begin + static_cast<uintptr_t>(last + 1) * tensor.element_size()});
  }
  return disjoint(std::move(extents));
}

}  // namespace gradkernels
