// What launchers need from torch, declared without torch: the current stream, memory for one call, and
// torch's errors. device.cpp implements it with c10, and is the only file of cuda/ that includes c10;
// tests/simt implements it without a GPU.
//
// The operators (ops/) make the tensors' device the current device first.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace gradkernels::cuda {

cudaStream_t current_stream();

struct DeviceLimits {
  int processors;          // SMs
  int compute_capability;  // 80 for 8.0
  int64_t l2_bytes;
};

// The limits of the current device, read once for each device.
const DeviceLimits& device_limits();

// Memory for one call from torch's allocator, on the current stream; null for 0 bytes. It may be freed while
// kernels still use it: its next user on this stream runs after them.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
};

// Raises torch's error unless `status` is success. If the library has no code for this GPU, the error is
// without_code.
void check(cudaError_t status);

// The message for a library without code for this GPU: what it was built for, and how to build it again.
inline std::string without_code(const std::string& architectures, int compute_capability) {
  const std::string capability = std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10);
  return "gradkernels was built for " + architectures + ", and this GPU has compute capability " + capability +
         ". Build it again: FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=\"" + capability +
         "\" python -m pip install --no-build-isolation --force-reinstall --no-deps .";
}

}  // namespace gradkernels::cuda
