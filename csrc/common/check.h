// Which tensors the kernels take. What they do not take goes to ATen, which either serves it or words the error.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include "common/dispatch.h"

namespace gradkernels {

inline bool has_kernel(const at::Tensor& x) {
  return (x.device().is_cpu() || x.device().is_meta()) && x.layout() == at::kStrided && !x.is_nested() && !x.is_neg() &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble);
}

// Precondition: has_kernel.
inline DType dtype_of(const at::Tensor& x) { return x.scalar_type() == at::kFloat ? DType::kFloat32 : DType::kFloat64; }

inline bool same_dtype_and_device(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.device() == b.device();
}

}  // namespace gradkernels
