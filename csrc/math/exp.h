// exp, expm1 and the logistic function without branches or tables, for scalars and SIMD vectors: compilers
// cannot vectorise libm's.
//
// The steps are: argument reduction x = n ln 2 + r with |r| <= ln(2) / 2 (Cody and Waite), a minimax
// polynomial for (e^r - 1 - r) / r^2, and scaling by 2^n. Scaling comes last, so that a denormal result is
// rounded once. On processors with fma, the errors of elu and swish are at most 2.2 ulp, and those of their
// gradients at most 2.6 ulp of the largest term (tests/test_activation.py); without fma they are at most 4.
// nan stays nan. Arguments that are too large or too small give 0, -1 or inf.
#pragma once

#include <type_traits>

#include "common/host_device.h"

namespace gradkernels::math {

// The precision of a result. kFull: the last digits of the computing type. kHalf, for results that are
// rounded to 16 bits: a relative error of at most 2^-17.5, which is 0.01 ulp of float16. Results below 1e-10,
// which only bfloat16 can represent, have a relative error of at most 2^-16. If e^-|x| is a denormal float32,
// its spacing bounds the error: 0.001 / beta ulp of bfloat16 for swish.
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
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  static constexpr float kUnderflow = -170.0f;  // e^x rounds to 0 for far larger x already; half the exponent is still normal
  static constexpr uint32_t kOneBits = 0x3F800000u;
  static constexpr int kMantissaBits = 23;
  using bits_t = uint32_t;

  // (e^r - 1 - r) / r^2: e^r to 3.2e-9. In Estrin's order: a shorter chain than Horner's for the same
  // operations.
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

// 2^n for an integer n that is the exponent of a normal number
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

// 2^n as the product of two normal powers of two. The integer n may be twice as large as the exponent of a
// normal number.
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

// x 2^n, for the same n. A vector overloads scale_by_exp2 if its instruction set has an instruction for it.
template <typename T>
GK_HOST_DEVICE T scale_by_halves(T x, T n) {
  const Exp2Halves<T> scale = exp2_halves(n);
  return x * scale.first * scale.second;
}
template <typename scalar_t>
GK_HOST_DEVICE scalar_t scale_by_exp2(scalar_t x, scalar_t n) {
  return scale_by_halves(x, n);
}

// x 2^n for an integer n. x and the result must be normal numbers; other results are arbitrary. The overload
// for vectors adds n to the bits of the exponent.
template <typename scalar_t>
GK_HOST_DEVICE scalar_t scale_normal_by_exp2(scalar_t x, scalar_t n) {
  return x * exp2_of_integer(n);
}

// 1 / x to at least 12 bits. A Newton step refines it.
template <typename scalar_t>
GK_HOST_DEVICE scalar_t approximate_inverse(scalar_t x) {
  return scalar_t(1) / x;
}

#if defined(__CUDA_ARCH__)
// Within one ulp if x and its inverse are normal. __fdividef would test for other numbers too.
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

// The larger of the two; x if x is nan.
template <typename scalar_t>
GK_HOST_DEVICE scalar_t at_least(scalar_t bound, scalar_t x) {
  return bound > x ? bound : x;
}

// The smaller of the two; bound if x is nan.
template <typename scalar_t>
GK_HOST_DEVICE scalar_t at_most(scalar_t bound, scalar_t x) {
  return select(x < bound, x, bound);
}
#if defined(__CUDA_ARCH__)
GK_HOST_DEVICE float at_most(float bound, float x) { return fminf(x, bound); }
#endif

// 1 / (1 + e) for e in [0, 1]. The residual 1 - (1 + e) estimate is computed without rounding 1 + e.
template <typename T>
GK_HOST_DEVICE T inverse_of_one_plus(T e) {
  const T estimate = approximate_inverse(T(1) + e);
  return fma(estimate, fma(-e, estimate, T(1) - estimate), estimate);
}

// The same for every e >= 0 with a normal inverse. For a small estimate, 1 - estimate would be rounded; 1 - e
// estimate is rounded less.
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

// Valid for |x| <= -kUnderflow. For other x, n is far (see kFarExponent) and expm1 is arbitrary.
template <typename T>
GK_HOST_DEVICE ReducedExp<T> reduce_exp(T x) {
  using C = ExpConstants<scalar_of_t<T>>;
  const T round(C::kRound);
  const T n = fma(x, T(C::kLog2E), round) - round;
  const T r = fma(n, T(-C::kLn2Low), fma(n, T(-C::kLn2High), x));
  const T square = r * r;
  return {n, fma(square, C::series(r, square), r)};
}

// An exponent below this is far: 2^n must then be applied in two factors. Exponents above 0 do not occur
// where this matters.
constexpr int kFarExponent = -64;

// Whether any lane of a vector has a far exponent; nan counts as far. A vector without one takes a shorter
// way. For a scalar, the branch would cost more than it saves, so the answer is always true.
template <typename scalar_t>
GK_HOST_DEVICE constexpr bool has_far_exponent(scalar_t) {
  return true;
}
// The lanes whose exponents are not far.
template <typename scalar_t>
GK_HOST_DEVICE constexpr bool is_near_exponent(scalar_t) {
  return false;
}

// The product of a, b and 2^n, for an integer n <= 0 and a number b that is not tiny. 2^n alone may be
// denormal or 0 although the product is not, so it is applied in two factors. If n is not far, b is
// multiplied with both of them before a, which may be very large: a lane's result then does not depend on the
// other lanes. The same order is used if a is inf or nan. As in torch, inf then gives nan if b 2^n rounds to
// 0.
template <typename T>
GK_HOST_DEVICE T multiply_scaled(T a, T b, T n) {
  if (!has_far_exponent(n)) return a * scale_by_exp2(b, n);
  const Exp2Halves<T> scale = exp2_halves(n);
  const T part = b * scale.first;
  return select((n >= T(scalar_of_t<T>(kFarExponent))) | (a - a != T(0)), a * (part * scale.second), a * part * scale.second);
}

// e^x - 1 for x <= 0, as 2^n (e^r - 1) + (2^n - 1). Near zero it has full precision, where the subtraction
// e^x - 1 would cancel.
template <typename T>
GK_HOST_DEVICE T expm1_of_nonpositive(T x) {
  const T floor(scalar_of_t<T>(-60));  // the result rounds to -1 for far larger x already
  const ReducedExp<T> reduced = reduce_exp(at_least(floor, x));
  const T scale = exp2_of_integer(reduced.n);
  return fma(scale, reduced.expm1, scale - T(1));
}

// sigmoid(x) = gate scale and 1 - sigmoid(x) = complement, both with full relative precision for every x.
// gate is below 1, and scale is a power of two of at most 1: a number that is multiplied with gate first, and
// then with scale, does not overflow.
template <typename T>
struct Logistic {
  T gate;
  T scale;
  T complement;

  // a sigmoid(x), where product is a gate
  GK_HOST_DEVICE T scaled(T product) const { return product * scale; }
};

// The same with scale = 1.
template <typename T>
struct NearLogistic {
  T gate;
  T complement;

  GK_HOST_DEVICE T scaled(T product) const { return product; }
};

// Calls function(logistic) with a NearLogistic if that is precise for x, otherwise with a Logistic. The
// result of a lane does not depend on the other lanes.
template <typename T, typename Function>
GK_HOST_DEVICE void with_logistic(T x, const Function& function) {
  // sigmoid(x) = 1 / (1 + e^-x), if every number in it is normal.
  const ReducedExp<T> near = reduce_exp(-x);
  const T distance = negative_magnitude(near.n);
  const T near_exp = scale_normal_by_exp2(T(1) + near.expm1, near.n);
  const T near_gate = inverse_of_one_plus_any(near_exp);
  // Each expression where its rounding error is smallest: 1 - gate for a gate below 1/2, whose rounding error
  // is negligible compared with 1.
  const auto negative = x < T(0);
  const T near_complement = select(negative, T(1) - near_gate, near_exp * near_gate);
  if (!has_far_exponent(distance)) return function(NearLogistic<T>{near_gate, near_complement});
  // Otherwise with e^-|x|. Below the floor it is 0 and not a tiny number, so that swish(-inf) is nan, as in
  // torch.
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

// e^x for x <= 0, and 1 / x for x >= 1, to Precision::kHalf.
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

// a sigmoid(x) to Precision::kHalf, for every x.
template <typename T>
GK_HOST_DEVICE T multiply_half_precise_sigmoid(T a, T x) {
  const T e = half_precise_exp(negative_magnitude(x));
  const T inverse = half_precise_inverse(T(1) + e);
  return a * select(x < T(0), e * inverse, inverse);
}

// ---- Precision::kHalf for scalars: only GPUs compute single numbers in float32

template <typename T, Precision precision>
constexpr bool kIsHalfScalar = precision == Precision::kHalf && std::is_same<T, float>::value;

// 2^x, and 0 if that is below the smallest normal number.
GK_HOST_DEVICE float approximate_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return x < -126.0f ? 0.0f : exp2(x);
#endif
}

// a b for a product of at most 1, and 0 for nan.
GK_HOST_DEVICE float multiply_saturated(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __saturatef(a * b);
#else
  const float product = a * b;
  return product > 0.0f ? (product < 1.0f ? product : 1.0f) : 0.0f;
#endif
}

// e^(x / 2) for x <= 0, which is a normal number down to x = -174, and 0 below: e^x would be denormal from -87
// on. The relative error is up to 2^-22 (1 + |x| / 2).
GK_HOST_DEVICE float half_precise_root_of_exp(float x) { return approximate_exp2(x * (0.5f * ExpConstants<float>::kLog2E)); }

// e^x - 1 for x <= 0. Near zero it is the start of the series, because the subtraction would cancel.
GK_HOST_DEVICE float half_precise_expm1(float x) {
  const float difference = approximate_exp2(x * ExpConstants<float>::kLog2E) - 1.0f;
  const float series = x * horner(x, 1.0f, 0.5f, 1.0f / 6.0f, 1.0f / 24.0f);
  return select(x > -0.125f, series, difference);
}

// sigmoid(beta x) = kUnit / (kUnit + e) with e = kUnit e^-(beta x): the sum has a normal inverse as long as the gate is
// at least the smallest denormal number. From beta x = -104 down the gate is 0, as torch's is from -88.8, and so is the
// complement, also if e is inf. The relative error of e is up to 2^-20 + 2^-24 |beta x|.
GK_HOST_DEVICE NearLogistic<float> half_precise_logistic(float beta, float x) {
  constexpr float kUnit = 0x1p-24f;
  const float e = approximate_exp2(fma(beta * -ExpConstants<float>::kLog2E, x, -24.0f));
  const float inverse = approximate_inverse(kUnit + e);
  return {inverse * kUnit, multiply_saturated(e, inverse)};
}

// with_logistic(beta x, function) to `precision`. Vectors always have full precision.
template <Precision precision, typename T, typename Function>
GK_HOST_DEVICE void with_logistic_to(T beta, T x, const Function& function) {
  if constexpr (kIsHalfScalar<T, precision>) {
    function(half_precise_logistic(beta, x));
  } else {
    with_logistic(beta * x, function);
  }
}

}  // namespace gradkernels::math
