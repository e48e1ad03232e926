// What a formula may use on every target: the function qualifier, and for plain scalars the few operations that math/ is written in. SIMD
// vectors (cpu/vector.h) bring overloads of the same names, which argument-dependent lookup finds, so that one template is compiled for a
// scalar, a vector and a CUDA thread. Every function is forced inline: the linker would use a function that was emitted out of line from an
// AVX-512 file in other files too.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GK_HOST_DEVICE inline __attribute__((always_inline))
#endif

// The same for what runs on the host alone; the second form stands between a lambda's parameters and its body.
#define GK_INLINE inline __attribute__((always_inline))
#define GK_INLINE_LAMBDA __attribute__((always_inline))

namespace gradkernels::math {

// The element type of a scalar is itself; a vector specialises this.
template <typename T>
struct ScalarOf {
  using type = T;
};
template <typename T>
using scalar_of_t = typename ScalarOf<T>::type;

template <typename T>
GK_HOST_DEVICE T select(bool condition, T if_true, T if_false) {
  return condition ? if_true : if_false;
}

// a * b + c in one rounding where the target has the instruction. Forward and backward call it in the same form, so they agree to the bit.
GK_HOST_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GK_HOST_DEVICE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

GK_HOST_DEVICE float sqrt(float x) { return __builtin_sqrtf(x); }
GK_HOST_DEVICE double sqrt(double x) { return __builtin_sqrt(x); }

GK_HOST_DEVICE float fabs(float x) { return __builtin_fabsf(x); }
GK_HOST_DEVICE double fabs(double x) { return __builtin_fabs(x); }

GK_HOST_DEVICE float exp2(float x) { return __builtin_exp2f(x); }

}  // namespace gradkernels::math
