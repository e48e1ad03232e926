// The kernel of clusters.h, which is never launched: the driver is asked about a kernel.
#include "cuda/clusters.h"

#include "cuda/launch.cuh"

namespace gradkernels::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) cluster_probe_kernel() { cluster_sync(); }

}  // namespace

bool can_run_cluster(unsigned blocks) {
  return compiled_for_clusters(cluster_probe_kernel) &&
         can_run(cluster_probe_kernel, {dim3(blocks), dim3(kThreads), static_cast<size_t>(device_limits().shared_bytes), blocks});
}

}  // namespace gradkernels::cuda
