// What formulas in math/ may use on every target: the function qualifier, and the few operations on scalars.
// SIMD vectors (cpu/vector.h) have overloads of the same names, which argument-dependent lookup finds: one
// template works for a scalar, a vector and a CUDA thread. Every function is forced inline. Otherwise the
// linker could use a function that an AVX-512 file emitted in other files too.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GK_HOST_DEVICE inline __attribute__((always_inline))
#endif

// The same for functions that run only on the host. The second form goes between the parameters and the body
// of a lambda.
#define GK_INLINE inline __attribute__((always_inline))
#define GK_INLINE_LAMBDA __attribute__((always_inline))
// Never inlined, also not by GK_FLATTEN: a function for each channel or for the end of a line, which would be
// compiled again in every loop.
#define GK_CALLED __attribute__((noinline))
// Inlines all that a function calls, at once, the lambdas of its loops too. In a deep nest of lambdas this
// takes GCC half the time of lambdas that are forced inline one into the other, each of which is optimised
// again at every level. Such a function captures by value what its loops read: a reference would lead out of
// it, and a store could change what it refers to.
#define GK_FLATTEN __attribute__((flatten))

namespace gradkernels::math {

// The element type of a scalar is the scalar's own type. Vectors specialise this.
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

// a * b + c, rounded once if the target has the instruction. Forward and backward call it in the same form,
// so that they agree to the bit.
GK_HOST_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GK_HOST_DEVICE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

GK_HOST_DEVICE float sqrt(float x) { return __builtin_sqrtf(x); }
GK_HOST_DEVICE double sqrt(double x) { return __builtin_sqrt(x); }

GK_HOST_DEVICE float fabs(float x) { return __builtin_fabsf(x); }
GK_HOST_DEVICE double fabs(double x) { return __builtin_fabs(x); }

GK_HOST_DEVICE float exp2(float x) { return __builtin_exp2f(x); }

}  // namespace gradkernels::math
