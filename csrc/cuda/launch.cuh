// How kernels are launched, and the functions that they are written with. The same source runs on a GPU and,
// in tests/simt, on the host.
//
//   launch(kernel, {grid, block, shared_bytes}, arguments...)
//       launches on the current stream; does nothing for a grid without blocks; a block has at most 48 KiB of
//       shared memory, which needs no request
//   shared_memory<T>()
//       the block's shared memory, dynamic and 16-byte aligned; T is a struct of its parts
//   Packet, load, store, load_some, store_some
//       elements that are moved together, to and from global memory; the last two move part of a packet
//
// The rest is CUDA (threadIdx, __syncthreads, __shfl_down_sync, __shfl_xor_sync, __threadfence, atomicAdd,
// atomicExch), which tests/simt/cuda_runtime.h implements for the host. PTX is only used in math/, next to its
// implementation for the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "common/dispatch.h"
#include "cuda/device.h"

namespace gradkernels::cuda {

constexpr int kWarpThreads = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
constexpr int kPacketBytes = 16;
// A block may use this much shared memory without a request.
constexpr size_t kPlainSharedBytes = 48 << 10;

// The number of elements in a packet.
template <typename scalar_t>
constexpr int kPacketElements = kPacketBytes / static_cast<int>(sizeof(scalar_t));

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
};

template <typename T>
struct Exactly {
  using type = T;
};

// The arguments are converted to the types of the kernel's parameters. The driver copies those that have this
// type already, and nothing copies them before.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& to, const typename Exactly<Parameters>::type&... arguments) {
  if (to.grid.x == 0 || to.grid.y == 0 || to.grid.z == 0) return;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernel(kernel, to.grid, to.block, pointers, to.shared_bytes, current_stream()));
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

}  // namespace gradkernels::cuda
