// <cuda_runtime.h> for the kernels of csrc/cuda and their launchers when g++ compiles them for the host. The
// threads of a block are fibers of one OS thread, which change only at barriers and shuffles. Blocks run one
// after the other. A barrier that some threads do not reach ends the process with a message. All shared memory
// is dynamic (csrc/cuda/launch.cuh).
//
// ThreadSanitizer takes fibers for threads. Only barriers, shuffles of one warp and fences order them. An
// atomic orders nothing by itself: writes before a fence and an atomic are visible to a thread that has a
// fence after the same atomic.
//
// load, store, load_some and store_some (csrc/cuda/launch.cuh) report their accesses to global memory. A GPU
// moves sectors of 32 bytes, and all that the lanes of a warp touch with one instruction at once. The lanes
// run one after the other here, so accesses belong together if they have the warp, the place in the code and
// their number at this place in common. tests/test_simt_sectors.py compares the sectors that were touched with
// the fewest that could hold the bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice };
// Values of the running thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

// Whether the kernels were built for the GPU.
bool has_code();
// A kernel with its arguments, and with a function that calls it in the running thread.
struct Call {
  const void* kernel;
  void** arguments;
  const size_t* argument_bytes;
  size_t argument_count;
  void (*body)(const void*);
  const void* context;
};
// Calls the kernel in every thread of the grid.
void run(dim3 grid, dim3 block, size_t shared_bytes, const Call& call);
void fill(void* data, int value, size_t bytes);

void* shared_memory();
void block_sync();
void fence();
void before_atomic(void* p);
// The words of all lanes of the running warp; waits until every lane has given its word.
const uint64_t* exchange(uint64_t word);
// Ends the process if a packet is not aligned to its size, which a GPU would refuse.
void check_alignment(const void* p, size_t bytes);
// Counts the sectors of an access by the running thread. The return address is the place in the code.
__attribute__((noinline)) void access(const void* p, size_t bytes, bool writes);

template <typename T>
T lane_value(T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves up to 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = exchange(word)[lane];
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

// Calls the kernel in every thread, with the arguments that the pointers point to.
template <typename... Parameters, size_t... places>
void run(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t shared_bytes, std::index_sequence<places...>) {
  const auto body = [&] { kernel(*static_cast<const Parameters*>(arguments[places])...); };
  const size_t bytes[] = {sizeof(Parameters)...};
  run(grid, block, shared_bytes,
      {reinterpret_cast<const void*>(kernel), arguments, bytes, sizeof...(Parameters),
       [](const void* context) { (*static_cast<const decltype(body)*>(context))(); }, &body});
}

}  // namespace simt

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t) {
  if (!simt::has_code()) return cudaErrorNoKernelImageForDevice;
  simt::run(kernel, grid, block, arguments, shared_bytes, std::index_sequence_for<Parameters...>());
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  simt::fill(data, value, bytes);
  return cudaSuccess;
}

inline void __syncthreads() { simt::block_sync(); }
inline void __threadfence() { simt::fence(); }

// Masks are ignored: csrc/cuda always uses whole warps.
template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
  const int lane = simt::lane() + distance;
  return simt::lane_value(value, lane < 32 ? lane : simt::lane());
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return simt::lane_value(value, simt::lane() ^ mask);
}
template <typename T>
T atomicAdd(T* p, T value) {
  simt::before_atomic(p);
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicExch(T* p, T value) {
  simt::before_atomic(p);
  return __atomic_exchange_n(p, value, __ATOMIC_RELAXED);
}
