// device.h, implemented with c10, the only part of torch that cuda/ includes.
#include "cuda/device.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <mutex>

#include "build_stamp.h"

namespace gradkernels::cuda {

cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

const DeviceLimits& device_limits() {
  static std::array<DeviceLimits, C10_COMPILE_TIME_MAX_GPUS> limits;
  static std::array<std::once_flag, C10_COMPILE_TIME_MAX_GPUS> asked;
  const int device = c10::cuda::current_device();
  std::call_once(asked.at(device), [device] {
    const auto attribute = [device](cudaDeviceAttr name) {
      int value;
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
      return value;
    };
    limits[device] = {attribute(cudaDevAttrMultiProcessorCount),
                      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
                      attribute(cudaDevAttrL2CacheSize)};
  });
  return limits[device];
}

Workspace::Workspace(size_t bytes) : data_(bytes > 0 ? c10::cuda::CUDACachingAllocator::raw_alloc(bytes) : nullptr) {}
Workspace::~Workspace() {
  // Some allocators do not accept null: that of backend:cudaMallocAsync would end the process.
  if (data_ != nullptr) c10::cuda::CUDACachingAllocator::raw_delete(data_);
}

void check(cudaError_t status) {
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    static_cast<void>(cudaGetLastError());
    TORCH_CHECK(false, without_code(GK_CUDA_ARCHITECTURES, device_limits().compute_capability));
  }
  C10_CUDA_CHECK(status);
}

}  // namespace gradkernels::cuda
