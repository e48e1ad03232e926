// What a launcher asks of torch, without torch: the current stream, memory for the length of a call, an error in its words. device.cpp
// answers with c10, and is the only file of cuda/ that knows it; tests/simt answers without a GPU.
//
// The operators (ops/) have made the tensors' device the current one.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace gradkernels::cuda {

cudaStream_t current_stream();

struct DeviceLimits {
  int processors;          // SMs
  int shared_bytes;        // that a block may ask for
  int compute_capability;  // 80 for 8.0
  int64_t l2_bytes;
};

// Of the current device, asked for once; each device has its own at an address of its own.
const DeviceLimits& device_limits();

// Memory for one call from torch's allocator, on the current stream; null for no bytes. It may be given back while kernels still use it:
// whoever gets it next on this stream comes after them.
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

// Raises torch's error unless `status` is success; where the GPU's code is missing, one that says without_code.
void check(cudaError_t status);

// What was built, which is not for this GPU, and what mends it.
inline std::string without_code(const std::string& architectures, int compute_capability) {
  const std::string capability = std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10);
  return "gradkernels was built for " + architectures + ", and this GPU has compute capability " + capability +
         ". Build it again: FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=\"" + capability +
         "\" python -m pip install --no-build-isolation --force-reinstall --no-deps .";
}

}  // namespace gradkernels::cuda
