// The 16-bit types as they are stored, and the conversions from and to float32, the computing type. Rounding
// is to the nearest, ties to even, as in torch. CUDA has instructions for the conversions.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>

#include "common/host_device.h"

namespace gradkernels {

// A float32 as its bits, and back.
GK_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}
GK_HOST_DEVICE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// The upper half of a float32.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  GK_HOST_DEVICE explicit BFloat16(float x) {
#if defined(__CUDA_ARCH__)
    bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    const uint32_t wide = bits_of(x);
    bits = x == x ? static_cast<uint16_t>((wide + 0x7FFFu + (wide >> 16 & 1u)) >> 16) : uint16_t(0x7FC0);
#endif
  }
  GK_HOST_DEVICE explicit BFloat16(double x) : BFloat16(static_cast<float>(x)) {}
  GK_HOST_DEVICE explicit operator float() const { return float_of(static_cast<uint32_t>(bits) << 16); }
  GK_HOST_DEVICE explicit operator double() const { return static_cast<float>(*this); }
};

// IEEE binary16: 5 bits of exponent, 10 of mantissa.
struct Float16 {
  uint16_t bits;

  Float16() = default;
  GK_HOST_DEVICE explicit Float16(float x) {
#if defined(__CUDA_ARCH__)
    bits = __half_as_ushort(__float2half_rn(x));
#else
    const uint32_t wide = bits_of(x);
    const uint32_t magnitude = wide & 0x7FFFFFFFu;
    uint32_t narrow;
    if (magnitude > 0x7F800000u) {
      narrow = 0x7E00u;
    } else if (magnitude >= 0x477FF000u) {
      narrow = 0x7C00u;  // from 65520 on, which is half a spacing above the largest number
    } else if (magnitude < 0x38800000u) {
      narrow = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;  // denormals are multiples of 2^-24, the spacing of numbers at 0.5
    } else {
      narrow = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
    }
    bits = static_cast<uint16_t>(narrow | (wide >> 16 & 0x8000u));
#endif
  }
  GK_HOST_DEVICE explicit Float16(double x) : Float16(static_cast<float>(x)) {}
  GK_HOST_DEVICE explicit operator float() const {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFFu) << 13;
    // inf and nan get the largest exponent of float32. The product is exact, and normalises denormals.
    const float value = magnitude >= 0x0F800000u ? float_of(magnitude | 0x7F800000u) : float_of(magnitude) * 0x1p112f;
    return float_of(bits_of(value) | sign);
#endif
  }
  GK_HOST_DEVICE explicit operator double() const { return static_cast<float>(*this); }
};

template <typename scalar_t>
struct OpmathOf {
  using type = scalar_t;
};
template <>
struct OpmathOf<BFloat16> {
  using type = float;
};
template <>
struct OpmathOf<Float16> {
  using type = float;
};

// The computing type of scalar_t.
template <typename scalar_t>
using opmath_t = typename OpmathOf<scalar_t>::type;

}  // namespace gradkernels
