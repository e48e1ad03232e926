// Sums over the threads of a warp, of a block and of a grid. The order depends only on their number, so that
// every run gives the same bits. There are no float atomics: the last block to finish combines the results
// that the blocks left in memory.
//
// T is a number or a trivially copyable struct; its size is a multiple of 4 bytes. combine(a, b) merges two
// values; a comes from the lower threads. `scratch` is a BlockScratch<T> in shared memory.
#pragma once

#include "cuda/launch.cuh"
#include "math/sum.h"

namespace gradkernels::cuda {

constexpr int kMostWarps = 32;

// Shared memory of a block reduction: one T for each warp.
template <typename T>
using BlockScratch = T[kMostWarps];

// The value of the thread `distance` lanes above, or the thread's own value if there is none. All lanes of
// the warp must call it.
template <typename T>
__device__ __forceinline__ T from_lane_above(T value, int distance) {
  constexpr int kWords = sizeof(T) / sizeof(unsigned);
  static_assert(sizeof(T) % sizeof(unsigned) == 0, "moved in words");
  unsigned word[kWords];
  __builtin_memcpy(word, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) word[i] = __shfl_down_sync(kWholeWarp, word[i], distance);
  __builtin_memcpy(&value, word, sizeof(T));
  return value;
}

// Combines the values of a warp. Only lane 0 gets the result.
template <typename T, typename Combine>
__device__ __forceinline__ T warp_reduce(T value, const Combine& combine) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) value = combine(value, from_lane_above(value, distance));
  return value;
}

// Combines the values of all threads of the block. Only thread 0 gets the result. blockDim must be
// (kWarpThreads * warps, 1, 1), and there must be a barrier between two uses of one scratch.
template <typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, BlockScratch<T>& scratch, const T& identity, const Combine& combine) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int warps = static_cast<int>(blockDim.x) / kWarpThreads;
  value = warp_reduce(value, combine);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_reduce(lane < warps ? scratch[lane] : identity, combine);
  return value;
}

// The same; every thread gets the result.
template <typename T, typename Combine>
__device__ __forceinline__ T block_all_reduce(T value, BlockScratch<T>& scratch, const T& identity, const Combine& combine) {
  value = block_reduce(value, scratch, identity, combine);
  if (threadIdx.x == 0) scratch[0] = value;
  __syncthreads();
  return scratch[0];
}

struct Add {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Whether this block is the last of `blocks` that call this function; all threads of the block get the same
// answer. The last block sees what every block wrote before its call. The counter is in global memory, and
// must be 0 before the first call; it is 0 again after the last one. `flag` is a word of shared memory.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned blocks, unsigned* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    // The first fence: a block that sees this increment sees what this block wrote. The second fence: this
    // block sees what the blocks wrote whose increments it sees.
    __threadfence();
    *flag = atomicAdd(counter, 1u) + 1 == blocks ? 1u : 0u;
    __threadfence();
    if (*flag != 0u) atomicExch(counter, 0u);
  }
  __syncthreads();
  return *flag != 0u;
}

// Global memory for the results that blocks leave for the last block: `values` of type T for each part,
// uninitialised, and counters, which are 0. A single part leaves none, and there is no memory.
template <typename T>
class Partials {
 public:
  Partials(int64_t parts, int64_t values, int64_t counters)
      : value_bytes_(parts > 1 ? static_cast<size_t>(parts * values) * sizeof(T) : 0),
        counter_bytes_(parts > 1 ? static_cast<size_t>(counters) * sizeof(unsigned) : 0),
        memory_(value_bytes_ + counter_bytes_) {
    static_assert(alignof(T) % alignof(unsigned) == 0, "counters stand behind the values");
    if (parts > 1) check(cudaMemsetAsync(this->counters(), 0, counter_bytes_, current_stream()));
  }
  T* values() const { return static_cast<T*>(memory_.data()); }
  unsigned* counters() const { return reinterpret_cast<unsigned*>(static_cast<unsigned char*>(memory_.data()) + value_bytes_); }

 private:
  size_t value_bytes_, counter_bytes_;
  Workspace memory_;
};

// Adds sums that have rounding errors.
struct AddSums {
  __device__ __forceinline__ math::Sum<double> operator()(const math::Sum<double>& a, const math::Sum<double>& b) const {
    return math::sum_of(a, b);
  }
};

// A float64 sum of terms of type opmath; the terms may cancel. For float64 terms it keeps the rounding
// errors.
template <typename opmath>
struct ThreadSum {
  double total = 0.0;

  __device__ __forceinline__ void add(double x) { total += x; }
  __device__ __forceinline__ void add(const math::Sum<double>& x) { total += x.high; }
  __device__ __forceinline__ math::Sum<double> value() const { return {total, 0.0}; }
  __device__ __forceinline__ double rounded() const { return total; }
  // Adds up the sums of `lanes` neighbouring threads, a power of two that divides a warp; each of them gets
  // the result. All threads of the warp must call it.
  __device__ __forceinline__ void add_over_lanes(int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) total += __shfl_xor_sync(kWholeWarp, total, distance);
  }
};
template <>
struct ThreadSum<double> {
  math::Sum<double> total{0.0, 0.0};

  __device__ __forceinline__ void add(double x) { math::add(total, x); }
  __device__ __forceinline__ void add(const math::Sum<double>& x) {
    math::add(total, x.high);
    total.low += x.low;
  }
  __device__ __forceinline__ math::Sum<double> value() const { return total; }
  __device__ __forceinline__ double rounded() const { return math::rounded(total); }
  __device__ __forceinline__ void add_over_lanes(int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      const double high = __shfl_xor_sync(kWholeWarp, total.high, distance);
      const double low = __shfl_xor_sync(kWholeWarp, total.low, distance);
      total = math::sum_of(total, {high, low});
    }
  }
};

}  // namespace gradkernels::cuda
