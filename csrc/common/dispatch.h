// The stored element types that kernels are compiled for, without torch: launchers take a DType beside raw pointers. scalar_t is what is
// stored, opmath_t<scalar_t> what it is computed in.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/host_device.h"

namespace gradkernels {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Calls function(scalar_t()) with the C++ type of `dtype`.
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
