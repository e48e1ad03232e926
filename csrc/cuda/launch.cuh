// How kernels are launched and what they are written in, so that one source runs on a GPU and, in tests/simt, on the host:
//
//   launch(kernel, {grid, block, shared_bytes, cluster}, arguments...)   on the current stream; no blocks, no launch
//   shared_memory<T>()           the block's shared memory, all of it dynamic and 16-byte aligned: a kernel names its parts in a struct
//   Packet, load, store          elements that are moved at once, to and from global memory; load_some, store_some a part of them
//   cluster_rank, cluster_sync, of_cluster_block    blocks of a cluster and each other's shared memory; without one, a cluster of one
//
// Everything else is CUDA's own (threadIdx, __syncthreads, __shfl_down_sync, __shfl_xor_sync, __threadfence, atomicAdd, atomicExch), which
// tests/simt/cuda_runtime.h has on the host. PTX stands here, beside what it means there, and for one inverse in math/exp.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <map>
#include <mutex>
#include <tuple>

#include "common/dispatch.h"
#include "cuda/device.h"

namespace gradkernels::cuda {

constexpr int kWarpThreads = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
constexpr int kPacketBytes = 16;
// What every block gets without asking.
constexpr size_t kPlainSharedBytes = 48 << 10;
// Larger clusters are not on every GPU that has clusters.
constexpr unsigned kMostPortableCluster = 8;

// Elements of a packet.
template <typename scalar_t>
constexpr int kPacketElements = kPacketBytes / static_cast<int>(sizeof(scalar_t));

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks along x
};

template <typename T>
struct Exactly {
  using type = T;
};

// A launch in the driver's words.
class LaunchConfig {
 public:
  explicit LaunchConfig(const Launch& to) {
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim.x = to.cluster;
    cluster_.val.clusterDim.y = 1;
    cluster_.val.clusterDim.z = 1;
    config_.gridDim = to.grid;
    config_.blockDim = to.block;
    config_.dynamicSmemBytes = to.shared_bytes;
    config_.stream = current_stream();
    config_.attrs = &cluster_;
    config_.numAttrs = to.cluster > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttribute cluster_{};
  cudaLaunchConfig_t config_{};
};

// Asks for what a kernel does not get unasked, on the current device. What is asked for is the kernel's, for all threads that launch it:
// were it what one launch needs, another thread's smaller one could take it back before. So it is all there is.
inline cudaError_t allow(const void* kernel, const Launch& to) {
  cudaError_t status = cudaSuccess;
  if (to.shared_bytes > kPlainSharedBytes) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device_limits().shared_bytes);
  }
  if (status == cudaSuccess && to.cluster > kMostPortableCluster) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return status;
}

// Arguments convert to the kernel's parameters.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& to, typename Exactly<Parameters>::type... arguments) {
  if (to.grid.x == 0 || to.grid.y == 0 || to.grid.z == 0) return;
  check(allow(reinterpret_cast<const void*>(kernel), to));
  check(cudaLaunchKernelEx(LaunchConfig(to).get(), kernel, arguments...));
}

// Whether the device can hold one cluster of it: a small GPU, or a slice of one, may not, and of more blocks than kMostPortableCluster no
// GPU need. Asked for once, since launchers ask in every call.
inline bool can_run(const void* kernel, const Launch& to) {
  static std::mutex mutex;
  static std::map<std::tuple<const DeviceLimits*, const void*, unsigned, size_t, unsigned>, bool> answers;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [answer, is_new] = answers.try_emplace({&device_limits(), kernel, to.block.x, to.shared_bytes, to.cluster}, false);
  if (is_new) {
    int clusters = 0;
    cudaError_t status = allow(kernel, to);
    if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(&clusters, kernel, LaunchConfig(to).get());
    // Or the next call would report what is no error here.
    if (status != cudaSuccess) static_cast<void>(cudaGetLastError());
    if (status == cudaErrorMemoryAllocation) {
      // Kernels are loaded when they are first asked about: no answer yet.
      answers.erase(answer);
      return false;
    }
    answer->second = status == cudaSuccess && clusters > 0;
  }
  return answer->second;
}

template <typename... Parameters>
bool can_run(void (*kernel)(Parameters...), const Launch& to) {
  return can_run(reinterpret_cast<const void*>(kernel), to);
}

// Whether the device has clusters and what it will run of the kernel was compiled for them.
template <typename... Parameters>
bool compiled_for_clusters(void (*kernel)(Parameters...)) {
  if (device_limits().compute_capability < 90) return false;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  return attributes.ptxVersion >= 90;
}

// Blocks for `tiles` pieces of work that a kernel strides over: at most `per_processor` for each SM.
inline dim3 grid_for(int64_t tiles, int per_processor) {
  const int64_t most = static_cast<int64_t>(device_limits().processors) * per_processor;
  return dim3(static_cast<unsigned>(tiles < most ? tiles : most));
}

// a / b of numbers that are not negative; `fit` says that both fit into 32 bits, where division is a fraction of the work.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b, bool fit) {
  return fit ? static_cast<int64_t>(static_cast<unsigned>(a) / static_cast<unsigned>(b)) : a / b;
}

// Whether every pointer stands at the beginning of a packet.
inline bool at_packet(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % kPacketBytes != 0) return false;
  }
  return true;
}

template <typename T>
__device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char gradkernels_shared_memory[];
  return reinterpret_cast<T*>(gradkernels_shared_memory);
#else
  return static_cast<T*>(simt::shared_memory());
#endif
}

// Elements as they are stored: a packet is moved as one.
template <typename scalar_t, int kElements>
struct alignas(sizeof(scalar_t) * kElements) Packet {
  scalar_t element[kElements];
};

namespace packet {

#if defined(__CUDACC__)
// The bits of a packet in the vector type of its size.
template <int kBytes>
struct Bits;
template <>
struct Bits<16> {
  using type = uint4;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<4> {
  using type = unsigned;
};
template <>
struct Bits<2> {
  using type = unsigned short;
};
#endif

}  // namespace packet

// The packet at p, in global memory and aligned to it.
template <typename scalar_t, int kElements>
__device__ __forceinline__ void load(Packet<scalar_t, kElements>& to, const scalar_t* p) {
#if defined(__CUDACC__)
  using Bits = typename packet::Bits<sizeof(to)>::type;
  const Bits bits = *reinterpret_cast<const Bits*>(p);
  __builtin_memcpy(&to, &bits, sizeof(to));
#else
  simt::check_alignment(p, sizeof(to));
  __builtin_memcpy(&to, p, sizeof(to));
#endif
}

// How long the caches are to keep what is stored: briefly, it leaves before anything else.
enum class Keep : uint8_t { kNormally, kBriefly };

template <Keep keep = Keep::kNormally, typename scalar_t, int kElements>
__device__ __forceinline__ void store(scalar_t* p, const Packet<scalar_t, kElements>& from) {
#if defined(__CUDACC__)
  using Bits = typename packet::Bits<sizeof(from)>::type;
  Bits bits;
  __builtin_memcpy(&bits, &from, sizeof(from));
  if constexpr (keep == Keep::kBriefly) {
    __stcs(reinterpret_cast<Bits*>(p), bits);
  } else {
    // Not an assignment, which the compiler may take apart.
    __stwb(reinterpret_cast<Bits*>(p), bits);
  }
#else
  simt::check_alignment(p, sizeof(from));
  __builtin_memcpy(p, &from, sizeof(from));
#endif
}

// The first `valid` elements alone, anywhere in memory; the others become `fill`.
template <typename scalar_t, int kElements>
__device__ __forceinline__ void load_some(Packet<scalar_t, kElements>& to, const scalar_t* p, int64_t valid, scalar_t fill) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) to.element[i] = i < valid ? p[i] : fill;
}

template <typename scalar_t, int kElements>
__device__ __forceinline__ void store_some(scalar_t* p, const Packet<scalar_t, kElements>& from, int64_t valid) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    if (i < valid) p[i] = from.element[i];
  }
}

// clusters: compute capability 9.0

__device__ __forceinline__ unsigned cluster_rank() {
#if !defined(__CUDACC__)
  return simt::cluster_rank();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ __forceinline__ unsigned cluster_blocks() {
#if !defined(__CUDACC__)
  return simt::cluster_blocks();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#else
  return 1;
#endif
}

// Every thread of every block of the cluster; what they wrote to shared memory before is seen by all after. A block may not end while
// others read its shared memory: a last cluster_sync stands behind the last read.
__device__ __forceinline__ void cluster_sync() {
#if !defined(__CUDACC__)
  simt::cluster_sync();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Where block `rank` of the cluster has what this block has at `mine`, in shared memory.
template <typename T>
__device__ __forceinline__ T* of_cluster_block(T* mine, unsigned rank) {
#if !defined(__CUDACC__)
  return static_cast<T*>(simt::of_cluster_block(mine, rank));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  T* theirs;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return theirs;
#else
  return mine;
#endif
}

}  // namespace gradkernels::cuda
