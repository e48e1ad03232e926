// How kernels are launched, and the functions that they are written with. The same source runs on a GPU and,
// in tests/simt, on the host.
//
//   launch(kernel, {grid, block, shared_bytes, cluster}, arguments...)
//       launches on the current stream; does nothing for a grid without blocks
//   shared_memory<T>()
//       the block's shared memory, dynamic and 16-byte aligned; T is a struct of its parts
//   Packet, load, store, load_some, store_some
//       elements that are moved together, to and from global memory; the last two move part of a packet
//   cluster_sync, of_cluster_block
//       a cluster of blocks, and their shared memory; without clusters, a cluster has one block
//
// The rest is CUDA (threadIdx, __syncthreads, __shfl_down_sync, __shfl_xor_sync, __threadfence, atomicAdd,
// atomicExch), which tests/simt/cuda_runtime.h implements for the host. PTX is only used here, next to its
// implementation for the host, and in math/exp.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "common/dispatch.h"
#include "cuda/device.h"

namespace gradkernels::cuda {

constexpr int kWarpThreads = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
constexpr int kPacketBytes = 16;
// Every block may use this much shared memory without a request.
constexpr size_t kPlainSharedBytes = 48 << 10;
// The largest cluster that every GPU with clusters supports, if it is not a slice of a GPU.
constexpr unsigned kMostPortableCluster = 8;

// The number of elements in a packet.
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

// A Launch as the driver's struct.
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

// What the driver has been asked about a kernel on a device. Launchers ask in every call, so answers are kept.
struct KernelFacts {
  std::mutex mutex;
  bool may_use_all_shared_memory = false;
  int ptx_version = 0;  // 0: not asked yet
  // For a number of threads, bytes of shared memory and blocks: whether the device can run such a cluster.
  std::map<std::tuple<unsigned, size_t, unsigned>, bool> clusters;
};

inline KernelFacts& facts_of(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const DeviceLimits*, const void*>, KernelFacts> facts;
  const std::pair key(&device_limits(), kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  return facts[key];
}

// Requests the shared memory of a launch on the current device, if the launch needs the request. The request
// applies to the kernel, in all threads. It is for all of the shared memory: a request for what this launch
// needs could be replaced by another thread's smaller request before the launch.
inline void allow(const void* kernel, const Launch& to) {
  if (to.shared_bytes <= kPlainSharedBytes) return;
  KernelFacts& facts = facts_of(kernel);
  const std::lock_guard<std::mutex> lock(facts.mutex);
  if (facts.may_use_all_shared_memory) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device_limits().shared_bytes));
  facts.may_use_all_shared_memory = true;
}

// The arguments are converted to the types of the kernel's parameters. The driver copies those that have this
// type already, and nothing copies them before.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& to, const typename Exactly<Parameters>::type&... arguments) {
  if (to.grid.x == 0 || to.grid.y == 0 || to.grid.z == 0) return;
  allow(reinterpret_cast<const void*>(kernel), to);
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
#if defined(__CUDACC__)
  check(cudaLaunchKernelExC(LaunchConfig(to).get(), reinterpret_cast<const void*>(kernel), pointers));
#else
  check(simt::launch(LaunchConfig(to).get(), kernel, pointers));
#endif
}

// Whether the device can run one cluster of this launch. A small GPU, or a slice of a GPU, may be unable to.
// An error of the query is raised, except the error that means no.
inline bool can_run(const void* kernel, const Launch& to) {
  allow(kernel, to);
  KernelFacts& facts = facts_of(kernel);
  const std::lock_guard<std::mutex> lock(facts.mutex);
  const std::tuple<unsigned, size_t, unsigned> key(to.block.x, to.shared_bytes, to.cluster);
  const auto known = facts.clusters.find(key);
  if (known != facts.clusters.end()) return known->second;
  // Raises an earlier error of the process, which would be cleared below.
  check(cudaPeekAtLastError());
  int clusters = 0;
  const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, kernel, LaunchConfig(to).get());
  if (status == cudaErrorInvalidClusterSize) {
    static_cast<void>(cudaGetLastError());
  } else {
    check(status);
  }
  return facts.clusters[key] = clusters > 0;
}

template <typename... Parameters>
bool can_run(void (*kernel)(Parameters...), const Launch& to) {
  return can_run(reinterpret_cast<const void*>(kernel), to);
}

// Whether the device has clusters, and the code of the kernel that it runs was compiled for them.
template <typename... Parameters>
bool compiled_for_clusters(void (*kernel)(Parameters...)) {
  if (device_limits().compute_capability < 90) return false;
  KernelFacts& facts = facts_of(reinterpret_cast<const void*>(kernel));
  const std::lock_guard<std::mutex> lock(facts.mutex);
  if (facts.ptx_version == 0) {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
    facts.ptx_version = attributes.ptxVersion;
  }
  return facts.ptx_version >= 90;
}

// The blocks of a kernel that strides over `tiles` pieces of work: at most `per_processor` for each SM.
inline dim3 grid_for(int64_t tiles, int per_processor) {
  const int64_t most = static_cast<int64_t>(device_limits().processors) * per_processor;
  return dim3(static_cast<unsigned>(tiles < most ? tiles : most));
}

// a / b for a >= 0 and b > 0. `fit`: both fit into 32 bits, for which division is much faster.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b, bool fit) {
  return fit ? static_cast<int64_t>(static_cast<unsigned>(a) / static_cast<unsigned>(b)) : a / b;
}

// The alignment of all pointers in bytes, at most that of a packet. Null pointers have every alignment.
inline int alignment_of(std::initializer_list<const void*> pointers) {
  uintptr_t bits = kPacketBytes;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return static_cast<int>(bits & ~(bits - 1));
}
inline bool at_packet(std::initializer_list<const void*> pointers) { return alignment_of(pointers) == kPacketBytes; }

template <typename T>
__device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char gradkernels_shared_memory[];
  return reinterpret_cast<T*>(gradkernels_shared_memory);
#else
  return static_cast<T*>(simt::shared_memory());
#endif
}

// Stored elements that are moved together.
template <typename scalar_t, int kElements>
struct alignas(sizeof(scalar_t) * kElements) Packet {
  scalar_t element[kElements];
};

namespace packet {

#if defined(__CUDACC__)
// The vector type with the size of a packet.
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

// Loads the packet at p, which must be in global memory and aligned to the packet.
template <typename scalar_t, int kElements>
__device__ __forceinline__ void load(Packet<scalar_t, kElements>& to, const scalar_t* p) {
#if defined(__CUDACC__)
  using Bits = typename packet::Bits<sizeof(to)>::type;
  const Bits bits = *reinterpret_cast<const Bits*>(p);
  __builtin_memcpy(&to, &bits, sizeof(to));
#else
  simt::check_alignment(p, sizeof(to));
  simt::access(p, sizeof(to), false);
  __builtin_memcpy(&to, p, sizeof(to));
#endif
}

// How long the caches keep a stored packet. kBriefly: it is the first to be evicted.
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
    // The compiler may split an assignment into smaller stores.
    __stwb(reinterpret_cast<Bits*>(p), bits);
  }
#else
  simt::check_alignment(p, sizeof(from));
  simt::access(p, sizeof(from), true);
  __builtin_memcpy(p, &from, sizeof(from));
#endif
}

// Loads only the first `valid` elements; the others become `fill`. p may have any alignment.
template <typename scalar_t, int kElements>
__device__ __forceinline__ void load_some(Packet<scalar_t, kElements>& to, const scalar_t* p, int64_t valid, scalar_t fill) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
#if !defined(__CUDACC__)
    if (i < valid) simt::access(p + i, sizeof(scalar_t), false);
#endif
    to.element[i] = i < valid ? p[i] : fill;
  }
}

template <typename scalar_t, int kElements>
__device__ __forceinline__ void store_some(scalar_t* p, const Packet<scalar_t, kElements>& from, int64_t valid) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
#if !defined(__CUDACC__)
    if (i < valid) simt::access(p + i, sizeof(scalar_t), true);
#endif
    if (i < valid) p[i] = from.element[i];
  }
}

// ---- Clusters, from compute capability 9.0 on

// A barrier for all threads of all blocks of the cluster. After it, all of them see what they wrote to shared
// memory before it. A block must not end while others read its shared memory, so a cluster_sync must follow
// the last such read.
__device__ __forceinline__ void cluster_sync() {
#if !defined(__CUDACC__)
  simt::cluster_sync();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The address, in the shared memory of block `rank` of the cluster, that corresponds to `mine` in this
// block's.
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
