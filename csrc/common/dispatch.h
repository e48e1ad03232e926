// The element types that kernels are compiled for. This header is independent of torch: launchers take a
// DType and raw pointers. scalar_t is the stored type, opmath_t<scalar_t> the computing type.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/host_device.h"

namespace gradkernels {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Calls function(scalar_t()), where scalar_t is the C++ type of `dtype`.
template <typename Function>
GK_HOST_DEVICE auto dispatch(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat64:
      return function(double());
    case DType::kBFloat16:
      return function(BFloat16());
    case DType::kFloat16:
      return function(Float16());
    default:
      return function(float());
  }
}

GK_INLINE int64_t size_of(DType dtype) {
  return dispatch(dtype, [](auto zero) { return static_cast<int64_t>(sizeof(zero)); });
}

}  // namespace gradkernels
