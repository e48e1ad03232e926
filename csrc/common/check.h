// Which tensors have kernels. Other tensors go to ATen, which either computes the result or raises its own
// error.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include "common/dispatch.h"

namespace gradkernels {

inline bool device_has_kernels(const c10::Device& device) {
#if defined(GK_WITH_CUDA)
  if (device.is_cuda()) return true;
#endif
  return device.is_cpu() || device.is_meta();
}

inline bool has_kernel(const at::Tensor& x) {
  const at::ScalarType dtype = x.scalar_type();
  return device_has_kernels(x.device()) && x.layout() == at::kStrided && !x.is_nested() && !x.is_neg() &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf);
}

// Precondition: the dtype is one that has_kernel accepts.
inline DType dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

inline DType dtype_of(const at::Tensor& x) { return dtype_of(x.scalar_type()); }

inline bool same_dtype_and_device(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.device() == b.device();
}

}  // namespace gradkernels
