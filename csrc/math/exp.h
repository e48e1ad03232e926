// exp, expm1 and the logistic function without branches or tables, for scalars and SIMD vectors: compilers
// cannot vectorise libm's.
//
// The steps are: argument reduction x = n ln 2 + r with |r| <= ln(2) / 2 (Cody and Waite), a minimax
// polynomial for (e^r - 1 - r) / r^2, and scaling by 2^n. Scaling comes last, so that a denormal result is
// rounded once. On processors with fma, the errors of elu and swish are at most 2.2 ulp, and those of their
// gradients at most 2.6 and 4 ulp of the largest term (tests/test_activation.py); without fma they are at
// most 4. mish has at most 2.6 ulp, its gradient 5.6 (tests/test_batch_norm_act.py). nan stays nan. Arguments that are
// too large or too small give 0, -1 or inf.
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

// A constant as a T. Vectors that have too few registers for the constants of an exponential specialise this
// (cpu/vector.h).
template <typename T, const scalar_of_t<T>& kValue>
struct Constant {
  static GK_HOST_DEVICE T get() { return T(kValue); }
};
template <typename T, const scalar_of_t<T>& kValue>
GK_HOST_DEVICE T constant() {
  return Constant<T, kValue>::get();
}

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
  static constexpr float kOne = 1.0f;
  static constexpr float kExpm1Floor = -60.0f;  // e^x - 1 rounds to -1 for far larger x already
  static constexpr float kLog2E = 1.44269504088896341f;
  // ln 2 = high + low, both negated here. The high part has nine bits: n * kMinusLn2High is exact.
  static constexpr float kMinusLn2High = -0.693359375f;
  static constexpr float kMinusLn2Low = 2.12194440054690583e-4f;
  static constexpr float kNear = -44.0f;        // see is_near
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  static constexpr float kUnderflow = -170.0f;  // e^x rounds to 0 for far larger x already; half the exponent is still normal
  static constexpr float kZero = -109.0f;       // x e^x rounds to 0 for smaller x
  static constexpr float kLift = 32.0f;         // e^kZero 2^kLift is normal
  static constexpr float kDrop = 0x1p-32f;
  static constexpr uint32_t kOneBits = 0x3F800000u;
  static constexpr int kMantissaBits = 23;
  using bits_t = uint32_t;

  static constexpr float kSeries0 = 0.49999994f, kSeries1 = 0.16666521f, kSeries2 = 0.041668266f, kSeries3 = 0.0083686756f,
                         kSeries4 = 0.0013820690f;

  // (e^r - 1 - r) / r^2: e^r to 3.2e-9. In Estrin's order: a shorter chain than Horner's for the same
  // operations.
  template <typename T>
  static GK_HOST_DEVICE T series(T r, T square) {
    const T lower = fma(constant<T, kSeries1>(), r, constant<T, kSeries0>());
    const T upper = fma(constant<T, kSeries3>(), r, constant<T, kSeries2>());
    return fma(fma(constant<T, kSeries4>(), square, upper), square, lower);
  }
};

template <>
struct ExpConstants<double> {
  static constexpr double kOne = 1.0;
  static constexpr double kExpm1Floor = -60.0;
  static constexpr double kLog2E = 1.44269504088896338700e+00;
  static constexpr double kMinusLn2High = -6.93145751953125e-1;  // twenty bits
  static constexpr double kMinusLn2Low = -1.42860682030941723212e-6;
  static constexpr double kNear = -44.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kUnderflow = -1400.0;
  static constexpr double kZero = -752.0;
  static constexpr double kLift = 80.0;
  static constexpr double kDrop = 0x1p-80;
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

// 2^n from n + kRound, for an integer n that is the exponent of a normal number. Otherwise it is arbitrary.
template <typename scalar_t>
GK_HOST_DEVICE scalar_t exp2_of_rounded(scalar_t rounded) {
  using C = ExpConstants<scalar_t>;
  union {
    scalar_t value;
    typename C::bits_t bits;
  } pun;
  pun.value = rounded;
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
GK_HOST_DEVICE Exp2Halves<T> exp2_halves(T rounded) {
  const T round(ExpConstants<scalar_of_t<T>>::kRound);
  const T n = rounded - round;
  const T half = fma(n, T(scalar_of_t<T>(0.5)), round);
  return {exp2_of_rounded(half), exp2_of_rounded(n - (half - round) + round)};
}

// x 2^n from rounded = n + kRound, for an integer n that is the exponent of a normal number.
template <typename T>
GK_HOST_DEVICE T scale_by_exp2(T x, T rounded) {
  return x * exp2_of_rounded(rounded);
}

// The same, where x and the result must be normal numbers; other results are arbitrary. The
// overload for vectors adds n to the bits of the exponent.
template <typename scalar_t>
GK_HOST_DEVICE scalar_t add_exponent(scalar_t x, scalar_t rounded) {
  return x * exp2_of_rounded(rounded);
}

// a / b for a normal b whose inverse is normal. A vector overloads it if that is faster than its division.
template <typename T>
GK_HOST_DEVICE T quotient(T a, T b) {
  return a / b;
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

// e^x = 2^n (1 + expm1), with rounded = n + kRound
template <typename T>
struct ReducedExp {
  T rounded;
  T expm1;
};

// Valid for |x| <= -kUnderflow. For other x, the result is arbitrary.
template <typename T>
GK_HOST_DEVICE ReducedExp<T> reduce_exp(T x) {
  using C = ExpConstants<scalar_of_t<T>>;
  const T rounded = fma(x, constant<T, C::kLog2E>(), constant<T, C::kRound>());
  const T n = rounded - constant<T, C::kRound>();
  const T r = fma(n, constant<T, C::kMinusLn2Low>(), fma(n, constant<T, C::kMinusLn2High>(), x));
  const T square = r * r;
  return {rounded, fma(square, C::series(r, square), r)};
}

// Whether e^x is a normal number, for all lanes of a vector x <= 0 and by a wide margin: 2^n then needs no two
// factors, and neither does its inverse. nan is not near. A vector whose lanes are all near takes a shorter way. For a
// scalar, the branch would cost more than it saves, so the answer is always false.
template <typename scalar_t>
GK_HOST_DEVICE constexpr bool all_near(scalar_t) {
  return false;
}
// The lanes that are near.
template <typename scalar_t>
GK_HOST_DEVICE constexpr bool is_near(scalar_t) {
  return false;
}

// a b e^x for x <= 0 and a number b that is not tiny. 2^n alone may be denormal or 0 although the product is
// not, so it is applied in two factors. If x is near, b is multiplied with both of them before a, which may be
// very large: a lane's result then does not depend on the other lanes. The same order is used if a is inf or
// nan. As in torch, inf then gives nan if b e^x rounds to 0.
template <typename T>
GK_HOST_DEVICE T multiply_exp(T a, T b, T x) {
  using C = ExpConstants<scalar_of_t<T>>;
  const ReducedExp<T> exp = reduce_exp(at_least(constant<T, C::kUnderflow>(), x));
  b = fma(b, exp.expm1, b);
  if (all_near(x)) return a * scale_by_exp2(b, exp.rounded);
  const Exp2Halves<T> scale = exp2_halves(exp.rounded);
  const T part = b * scale.first;
  return select((x >= T(C::kNear)) | (a - a != T(0)), a * (part * scale.second), a * part * scale.second);
}

// e^x / kDrop for x <= 0, which is normal where e^x is denormal; 0 where x e^x rounds to 0. A product with it keeps its
// digits if kDrop is the last factor.
template <typename T>
GK_HOST_DEVICE T lifted_exp(T x) {
  using C = ExpConstants<scalar_of_t<T>>;
  const T zero = constant<T, C::kZero>();
  const ReducedExp<T> reduced = reduce_exp(at_least(zero, x));
  const T scale = exp2_of_rounded(reduced.rounded + constant<T, C::kLift>());
  return select(x < zero, T(0), fma(scale, reduced.expm1, scale));
}

// e^x - 1 for x <= 0, as 2^n (e^r - 1) + (2^n - 1). Near zero it has full precision, where the subtraction
// e^x - 1 would cancel.
template <typename T>
GK_HOST_DEVICE T expm1_of_nonpositive(T x) {
  using C = ExpConstants<scalar_of_t<T>>;
  const ReducedExp<T> reduced = reduce_exp(at_least(constant<T, C::kExpm1Floor>(), x));
  const T scale = exp2_of_rounded(reduced.rounded);
  return fma(scale, reduced.expm1, scale - constant<T, C::kOne>());
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
  GK_HOST_DEVICE T times(T a) const { return scaled(a * gate); }
  // gate (1 + b c complement). b c may be inf when b and c are not, and would then be multiplied with 0.
  GK_HOST_DEVICE T slope(T b, T c) const { return fma(b * gate, c * complement, gate); }
};

// The same with scale = 1, if every number in 1 / (1 + e^-x) is normal.
template <typename T>
struct NearLogistic {
  ReducedExp<T> exp;  // e^-x
  T gate;
  T complement;

  GK_HOST_DEVICE T scaled(T product) const { return product; }
  // Divides by 1 + e^-x = (1 + 2^n expm1) + 2^n, which is rounded less than 1 + (1 + expm1) 2^n.
  GK_HOST_DEVICE T times(T a) const {
    const T power = exp2_of_rounded(exp.rounded);
    return quotient(a, fma(power, exp.expm1, constant<T, ExpConstants<scalar_of_t<T>>::kOne>()) + power);
  }
  // Here b c is finite.
  GK_HOST_DEVICE T slope(T b, T c) const { return fma(b * (c * complement), gate, gate); }
};

template <typename T>
GK_HOST_DEVICE NearLogistic<T> near_logistic(const ReducedExp<T>& exp) {
  const T one = constant<T, ExpConstants<scalar_of_t<T>>::kOne>();
  const T e = add_exponent(one + exp.expm1, exp.rounded);
  const T gate = quotient(one, one + e);
  return {exp, gate, e * gate};
}

// function(logistic) with a NearLogistic if that is precise for x, otherwise with a Logistic. The result of a
// lane does not depend on the other lanes.
template <typename T, typename Function>
GK_HOST_DEVICE auto with_logistic(T x, const Function& function) {
  const T distance = negative_magnitude(x);
  const auto near = function(near_logistic(reduce_exp(-x)));
  if (all_near(distance)) return near;
  // e^-|x|. Below the floor it is 0 and not a tiny number, so that swish(-inf) is nan, as in torch.
  const T floor(ExpConstants<scalar_of_t<T>>::kUnderflow);
  const ReducedExp<T> far = reduce_exp(at_least(floor, distance));
  const Exp2Halves<T> scale = exp2_halves(far.rounded);
  const T e = (T(1) + far.expm1) * scale.first * scale.second;
  const T inverse = inverse_of_one_plus(e);
  const T part = select(x < floor, T(0), inverse * scale.first);
  const auto negative = x < T(0);
  return select(is_near(distance), near,
                function(Logistic<T>{select(negative, fma(part, far.expm1, part), inverse), select(negative, scale.second, T(1)),
                                     select(negative, inverse, e * inverse)}));
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

// quotient(a, b) to `precision`. Vectors always have full precision.
template <Precision precision, typename T>
GK_HOST_DEVICE T quotient_to(T a, T b) {
  if constexpr (kIsHalfScalar<T, precision>) {
    return a * approximate_inverse(b);
  } else {
    return quotient(a, b);
  }
}

// e^x - 1 for x <= 0. Near zero it is the start of the series, because the subtraction would cancel.
GK_HOST_DEVICE float half_precise_expm1(float x) {
  const float difference = approximate_exp2(x * ExpConstants<float>::kLog2E) - 1.0f;
  const float series = x * horner(x, 1.0f, 0.5f, 1.0f / 6.0f, 1.0f / 24.0f);
  return select(x > -0.125f, series, difference);
}

// sigmoid(beta x) = kUnit / (kUnit + e) with e = kUnit e^-(beta x): the sum has a normal inverse as long as the gate is
// at least the smallest denormal number. From beta x = -104 down the gate is 0, as torch's is from -88.8, and so is the
// complement, also if e is inf. The relative error of e is up to 2^-20 + 2^-24 |beta x|.
GK_HOST_DEVICE Logistic<float> half_precise_logistic(float beta, float x) {
  constexpr float kUnit = 0x1p-24f;
  const float e = approximate_exp2(fma(beta * -ExpConstants<float>::kLog2E, x, -24.0f));
  const float inverse = approximate_inverse(kUnit + e);
  return {inverse * kUnit, 1.0f, multiply_saturated(e, inverse)};
}

// with_logistic(beta x, function) to `precision`. Vectors always have full precision.
template <Precision precision, typename T, typename Function>
GK_HOST_DEVICE auto with_logistic_to(T beta, T x, const Function& function) {
  if constexpr (kIsHalfScalar<T, precision>) {
    return function(half_precise_logistic(beta, x));
  } else {
    return with_logistic(beta * x, function);
  }
}

}  // namespace gradkernels::math
