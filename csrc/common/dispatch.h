// The stored element types that kernels are compiled for, without torch: launchers take a DType beside raw pointers.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace gradkernels {

enum class DType : uint8_t { kFloat32, kFloat64 };

// Calls function(scalar_t()) with the C++ type of `dtype`.
template <typename Function>
GK_INLINE auto dispatch(DType dtype, const Function& function) {
  return dtype == DType::kFloat32 ? function(float()) : function(double());
}

GK_INLINE int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 8; }

}  // namespace gradkernels
