// exp, expm1 and the logistic function without branches or table, for scalars and SIMD vectors alike: libm's versions do not vectorise.
// Argument reduction x = n ln 2 + r with |r| <= ln(2) / 2 (Cody and Waite), a minimax polynomial for (e^r - 1 - r) / r^2, scaling by 2^n as
// the last step, so that results which are denormal are rounded once. Where the processor has fma, elu and swish stay within 2.2 ulp of the
// exact value and their gradients within 2.6 of the size of their terms (tests/test_activation.py); within 4 where it has not. nan stays
// nan; the ends saturate to 0, -1 and inf.
#pragma once

#include "common/host_device.h"

namespace gradkernels::math {

// How near a result comes to the exact one: to the last digits of the type it is computed in, or, to be rounded to 16 bits, within 2^-17.5
// of itself: 0.01 ulp of float16. Below 1e-10, which bfloat16 alone can hold, within 2^-16, and as near as float32's denormals where
// e^-|x| is one: 0.001 / beta ulp of bfloat16 for swish.
enum class Precision { kFull, kHalf };

template <typename scalar_t>
constexpr Precision kPrecisionOf = sizeof(scalar_t) == 2 ? Precision::kHalf : Precision::kFull;

// c0 + c1 r + c2 r^2 + ... by Horner's rule
template <typename T>
GK_HOST_DEVICE T horner(T, scalar_of_t<T> c) {
  return T(c);
}
template <typename T, typename... Rest>
GK_HOST_DEVICE T horner(T r, scalar_of_t<T> c, Rest... rest) {
  return fma(horner(r, rest...), r, T(c));
}

template <typename scalar_t>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2High = 0.693359375f;  // nine bits: n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440054690583e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  static constexpr float kUnderflow = -170.0f;  // far below where e^x rounds to 0; half of its exponent is still a normal one
  static constexpr uint32_t kOneBits = 0x3F800000u;
  static constexpr int kMantissaBits = 23;
  using bits_t = uint32_t;

  // (e^r - 1 - r) / r^2: e^r to 3.2e-9. In Estrin's order: a shorter chain than Horner's for the same operations.
  template <typename T>
  static GK_HOST_DEVICE T series(T r, T square) {
    const T upper = fma(T(0.0013820690f), square, horner(r, 0.041668266f, 0.0083686756f));
    return fma(upper, square, horner(r, 0.49999994f, 0.16666521f));
  }
};

template <>
struct ExpConstants<double> {
  static constexpr double kLog2E = 1.44269504088896338700e+00;
  static constexpr double kLn2High = 6.93145751953125e-1;  // twenty bits
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kUnderflow = -1400.0;
  static constexpr uint64_t kOneBits = 0x3FF0000000000000u;
  static constexpr int kMantissaBits = 52;
  using bits_t = uint64_t;

  // e^r to 7e-20
  template <typename T>
  static GK_HOST_DEVICE T series(T r, T) {
    return horner(r, 0.5, 0.16666666666666682, 0.04166666666666647, 0.0083333333333177, 0.0013888888889004877, 1.9841269894966634e-4,
                  2.480158707599753e-5, 2.7557236090147842e-6, 2.7557486999525657e-7, 2.5111661814385255e-8, 2.0849684066173316e-9);
  }
};

// 2^n for a whole number n within the normal exponents
template <typename scalar_t>
GK_HOST_DEVICE scalar_t exp2_of_integer(scalar_t n) {
  using C = ExpConstants<scalar_t>;
  union {
    scalar_t value;
    typename C::bits_t bits;
  } pun;
  pun.value = n + C::kRound;
  pun.bits = (pun.bits << C::kMantissaBits) + C::kOneBits;
  return pun.value;
}

// 2^n as a product of two powers of two within the normal exponents, for a whole number n of at most twice as many.
template <typename T>
struct Exp2Halves {
  T first;
  T second;
};
template <typename T>
GK_HOST_DEVICE Exp2Halves<T> exp2_halves(T n) {
  const T round(ExpConstants<scalar_of_t<T>>::kRound);
  const T half = fma(n, T(scalar_of_t<T>(0.5)), round) - round;
  return {exp2_of_integer(half), exp2_of_integer(n - half)};
}

// x 2^n, for the same n. A vector brings the instruction for it where there is one.
template <typename T>
GK_HOST_DEVICE T scale_by_halves(T x, T n) {
  const Exp2Halves<T> scale = exp2_halves(n);
  return x * scale.first * scale.second;
}
template <typename scalar_t>
GK_HOST_DEVICE scalar_t scale_by_exp2(scalar_t x, scalar_t n) {
  return scale_by_halves(x, n);
}

// x 2^n for a whole number n, where x and the result are both in the normal range, else anything. A vector adds to the bits of its
// exponents.
template <typename scalar_t>
GK_HOST_DEVICE scalar_t scale_normal_by_exp2(scalar_t x, scalar_t n) {
  return x * exp2_of_integer(n);
}

// 1 / x to 12 bits or better, for a Newton step to refine.
template <typename scalar_t>
GK_HOST_DEVICE scalar_t approximate_inverse(scalar_t x) {
  return scalar_t(1) / x;
}

#if defined(__CUDA_ARCH__)
// One ulp, for normal x with a normal inverse: __fdividef would ask about others.
GK_HOST_DEVICE float approximate_inverse(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}
#endif

// -|x|
template <typename scalar_t>
GK_HOST_DEVICE scalar_t negative_magnitude(scalar_t x) {
  return -fabs(x);
}

// The larger of both, and x where x is nan.
template <typename scalar_t>
GK_HOST_DEVICE scalar_t at_least(scalar_t bound, scalar_t x) {
  return bound > x ? bound : x;
}

// 1 / (1 + e) for e in [0, 1]: the residual 1 - (1 + e) estimate is taken without the rounding of 1 + e.
template <typename T>
GK_HOST_DEVICE T inverse_of_one_plus(T e) {
  const T estimate = approximate_inverse(T(1) + e);
  return fma(estimate, fma(-e, estimate, T(1) - estimate), estimate);
}

// The same for any e >= 0 of a normal inverse: of a small estimate 1 - estimate would round, 1 - e estimate does less.
template <typename T>
GK_HOST_DEVICE T inverse_of_one_plus_any(T e) {
  const T estimate = approximate_inverse(T(1) + e);
  return fma(estimate, fma(-e, estimate, T(1)) - estimate, estimate);
}

// e^x = 2^n (1 + expm1)
template <typename T>
struct ReducedExp {
  T n;
  T expm1;
};

// Of |x| up to -kUnderflow; of others n is far, and the rest anything.
template <typename T>
GK_HOST_DEVICE ReducedExp<T> reduce_exp(T x) {
  using C = ExpConstants<scalar_of_t<T>>;
  const T round(C::kRound);
  const T n = fma(x, T(C::kLog2E), round) - round;
  const T r = fma(n, T(-C::kLn2Low), fma(n, T(-C::kLn2High), x));
  const T square = r * r;
  return {n, fma(square, C::series(r, square), r)};
}

// Below this a power of two may not be applied at once. None that matters is above 0.
constexpr int kFarExponent = -64;

// A vector asks for one in any of its lanes, nan being far, and takes a shorter way where there is none; a scalar is not worth a branch.
template <typename scalar_t>
GK_HOST_DEVICE constexpr bool has_far_exponent(scalar_t) {
  return true;
}
// The lanes that would have taken it.
template <typename scalar_t>
GK_HOST_DEVICE constexpr bool is_near_exponent(scalar_t) {
  return false;
}

// a b 2^n for whole n <= 0 and a b that is not tiny: 2^n itself may be denormal, or 0, where the result is neither. A near n is applied
// before a, which may be as large as there is, and alike whatever the neighbours are. An a of inf meets b 2^n as rounded: nan where that
// is 0, as torch's.
template <typename T>
GK_HOST_DEVICE T multiply_scaled(T a, T b, T n) {
  if (!has_far_exponent(n)) return a * scale_by_exp2(b, n);
  const Exp2Halves<T> scale = exp2_halves(n);
  const T part = b * scale.first;
  return select((n >= T(scalar_of_t<T>(kFarExponent))) | (a - a != T(0)), a * (part * scale.second), a * part * scale.second);
}

// e^x - 1 for x <= 0, exact near zero where the subtraction would cancel: 2^n (e^r - 1) + (2^n - 1)
template <typename T>
GK_HOST_DEVICE T expm1_of_nonpositive(T x) {
  const T floor(scalar_of_t<T>(-60));  // the result is -1 to the last bit long before
  const ReducedExp<T> reduced = reduce_exp(at_least(floor, x));
  const T scale = exp2_of_integer(reduced.n);
  return fma(scale, reduced.expm1, scale - T(1));
}

// sigmoid(x) = gate scale and 1 - sigmoid(x) = complement, both with full relative accuracy on both sides of zero and without an overflow:
// gate is below 1, and a factor may be multiplied with it before the scale, which is a power of two and at most 1.
template <typename T>
struct Logistic {
  T gate;
  T scale;
  T complement;

  // a sigmoid(x), of a product a gate
  GK_HOST_DEVICE T scaled(T product) const { return product * scale; }
};

// The same with a scale of 1.
template <typename T>
struct NearLogistic {
  T gate;
  T complement;

  GK_HOST_DEVICE T scaled(T product) const { return product; }
};

// Calls function(logistic) with the one of the two that x needs. What a lane of a vector gets does not depend on its neighbours.
template <typename T, typename Function>
GK_HOST_DEVICE void with_logistic(T x, const Function& function) {
  // sigmoid(x) = 1 / (1 + e^-x) as long as all that is in it is a normal number.
  const ReducedExp<T> near = reduce_exp(-x);
  const T distance = negative_magnitude(near.n);
  const T near_exp = scale_normal_by_exp2(T(1) + near.expm1, near.n);
  const T near_gate = inverse_of_one_plus_any(near_exp);
  // Each where it rounds least: 1 - gate for a gate below 1/2, whose own rounding is nothing beside 1.
  const auto negative = x < T(0);
  const T near_complement = select(negative, T(1) - near_gate, near_exp * near_gate);
  if (!has_far_exponent(distance)) return function(NearLogistic<T>{near_gate, near_complement});
  // Else with only e^-|x| inside, which is 0 below the floor and not a tiny number: swish(-inf) is nan, as torch's.
  const T floor(ExpConstants<scalar_of_t<T>>::kUnderflow);
  const auto is_near = is_near_exponent(distance);
  const ReducedExp<T> far = reduce_exp(at_least(floor, negative_magnitude(x)));
  const Exp2Halves<T> scale = exp2_halves(far.n);
  const T e = (T(1) + far.expm1) * scale.first * scale.second;
  const T inverse = inverse_of_one_plus(e);
  const T part = select(x < floor, T(0), inverse * scale.first);
  function(Logistic<T>{select(is_near, near_gate, select(negative, fma(part, far.expm1, part), inverse)),
                       select(is_near, T(1), select(negative, scale.second, T(1))),
                       select(is_near, near_complement, select(negative, inverse, e * inverse))});
}

// e^x for x <= 0 and 1 / x for x >= 1, to Precision::kHalf.
template <typename T>
GK_HOST_DEVICE T half_precise_exp(T x) {
  using C = ExpConstants<float>;
  const T round(C::kRound), log2_e(C::kLog2E);
  x = at_least(T(C::kUnderflow), x);
  const T n = fma(x, log2_e, round) - round;
  const T r = fma(x, log2_e, -n);
  return scale_by_exp2(horner(r, 1.0f, 0.69312419f, 0.24024099f, 0.055906425f, 0.0095828532f), n);
}
template <typename T>
GK_HOST_DEVICE T half_precise_inverse(T x) {
  const T estimate = approximate_inverse(x);
  return fma(fma(-x, estimate, T(1)), estimate, estimate);
}

// For a scalar there are instructions.
GK_HOST_DEVICE float half_precise_exp(float x) { return exp2(x * ExpConstants<float>::kLog2E); }
GK_HOST_DEVICE float half_precise_inverse(float x) { return approximate_inverse(x); }

// sigmoid(x), to Precision::kHalf of itself on both sides of zero.
template <typename T>
GK_HOST_DEVICE T half_precise_sigmoid(T x) {
  const T e = half_precise_exp(negative_magnitude(x));
  const T inverse = half_precise_inverse(T(1) + e);
  return select(x < T(0), e * inverse, inverse);
}

}  // namespace gradkernels::math
