// Packets of stored elements as values in the computing type, and back. 16-bit types move in pairs: one
// instruction widens an element of a bfloat16 pair, and one rounds two elements.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"

namespace gradkernels::cuda {

// Rounds two elements, which become neighbours.
__device__ __forceinline__ void round_pair(float first, float second, BFloat16* to) {
#if defined(__CUDA_ARCH__)
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  __builtin_memcpy(to, &pair, sizeof(pair));
#else
  to[0] = BFloat16(first), to[1] = BFloat16(second);
#endif
}
__device__ __forceinline__ void round_pair(float first, float second, Float16* to) {
#if defined(__CUDA_ARCH__)
  const __half2 pair = __floats2half2_rn(first, second);
  __builtin_memcpy(to, &pair, sizeof(pair));
#else
  to[0] = Float16(first), to[1] = Float16(second);
#endif
}

// Widens two neighbours, the first of which is in the lower half.
__device__ __forceinline__ void widen_pair(uint32_t pair, BFloat16, float& first, float& second) {
  first = float_of(pair << 16);
  second = float_of(pair & 0xFFFF0000u);
}
__device__ __forceinline__ void widen_pair(uint32_t pair, Float16, float& first, float& second) {
  Float16 half[2];
  __builtin_memcpy(half, &pair, sizeof(half));
  first = static_cast<float>(half[0]);
  second = static_cast<float>(half[1]);
}

// W elements in the computing type.
template <typename scalar_t, int W>
struct Values {
  using opmath = opmath_t<scalar_t>;
  opmath element[W];

  // `packet` has the bits of W elements.
  template <typename Stored>
  __device__ __forceinline__ static Values of(const Stored& packet) {
    static_assert(sizeof(packet) == W * sizeof(scalar_t), "a packet of W elements");
    Values values;
    if constexpr (sizeof(scalar_t) == 2 && W % 2 == 0) {
      uint32_t pair[W / 2];
      __builtin_memcpy(pair, &packet, sizeof(pair));
#pragma unroll
      for (int i = 0; i < W; i += 2) widen_pair(pair[i / 2], scalar_t(0.0f), values.element[i], values.element[i + 1]);
    } else {
      scalar_t element[W];
      __builtin_memcpy(element, &packet, sizeof(element));
#pragma unroll
      for (int i = 0; i < W; ++i) values.element[i] = static_cast<opmath>(element[i]);
    }
    return values;
  }

  __device__ __forceinline__ Packet<scalar_t, W> rounded() const {
    Packet<scalar_t, W> packet;
    if constexpr (sizeof(scalar_t) == 2 && W % 2 == 0) {
#pragma unroll
      for (int i = 0; i < W; i += 2) round_pair(element[i], element[i + 1], &packet.element[i]);
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) packet.element[i] = static_cast<scalar_t>(element[i]);
    }
    return packet;
  }
};

// A byte of a mask from the bits of W neighbours each: those of the threads that share a byte, which the first of them
// writes. Whole warps must call it.
template <int W>
__device__ __forceinline__ unsigned byte_of_bits(unsigned bits) {
  constexpr int kLanes = W < 8 ? 8 / W : 1;
  bits <<= W * (static_cast<int>(threadIdx.x) % kLanes);
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) bits |= __shfl_xor_sync(kWholeWarp, bits, distance);
  return bits;
}

}  // namespace gradkernels::cuda
