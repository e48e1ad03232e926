// The lower tail of the normal distribution, without branches, for scalars and SIMD vectors:
//
//   Phi(-t) = e^(-t^2 / 2) Q(t),   Q(t) = erfcx(t / sqrt(2)) / 2
//
// (1 / 2 - Q(t)) / t is a minimax polynomial in (t - K) / (t + K) (after Shepherd and Laframboise, "Chebyshev
// approximation of (1 + 2x) exp(x^2) erfc x", 1981): Q(0) is exact. So the tail has a small relative error also where erf rounds to 1.
#pragma once

#include "math/exp.h"

namespace gradkernels::math {

template <typename scalar_t>
struct NormalConstants;

template <>
struct NormalConstants<float> {
  static constexpr float kLargest = 14.4222f;  // e^(-t^2 / 2) rounds to 0 for a larger t, and is above 2^-150.1
  static constexpr float kMinusHalfLog2E = -0.721347520f;
  static constexpr float kLiftedRound = 12582944.0f;  // ExpConstants::kRound + 32
  static constexpr float kDrop = 0x1p-32f;
  static constexpr float kCentre = 3.0f;
  static constexpr float kDensity = 0.398942280f;  // 1 / sqrt(2 pi)

  // (2^f - 1) / f for |f| <= 1/2: 2^f to 3.0e-9
  template <typename T>
  static GK_HOST_DEVICE T exp2_series(T f) {
    return horner(f, 0.693147182f, 0.240226477f, 0.0555035956f, 0.00961849838f, 0.00133909727f, 1.53297602e-4f);
  }
  // (1 / 2 - Q(t)) / t for u = (t - K) / (t + K): Q to 1.6e-9 (1 + t^2)
  template <typename T>
  static GK_HOST_DEVICE T decrease(T u) {
    return horner(u, 0.126162022f, -0.183523148f, 0.073647067f, -0.017168304f, -2.79608794e-4f, 0.001359166f, -5.99478517e-5f,
                  -1.57790128e-4f, -1.39417364e-6f, 1.60266827e-5f);
  }
  // The same: Q to 1.9e-7. Near the zero of gelu's gradient two terms cancel.
  static GK_HOST_DEVICE float half_precise_decrease(float u) {
    return horner(u, 0.126162025f, -0.183523203f, 0.0736468891f, -0.017166089f, -2.78485763e-4f, 0.0013442451f, -6.16168964e-5f,
                  -1.28017557e-4f);
  }
};

template <>
struct NormalConstants<double> {
  static constexpr double kLargest = 38.6057;
  static constexpr double kMinusHalfLog2E = -0.72134752044448170368;
  static constexpr double kLiftedRound = 6755399441055808.0;  // ExpConstants::kRound + 64
  static constexpr double kDrop = 0x1p-64;
  static constexpr double kCentre = 6.0;
  static constexpr double kDensity = 0.39894228040143267794;

  // 2^f to 3.1e-18
  template <typename T>
  static GK_HOST_DEVICE T exp2_series(T f) {
    return horner(f, 0.69314718055994533, 0.240226506959101562, 0.0555041086648199215, 0.00961812910758833497, 0.00133335581467899483,
                  1.5403530462514693e-4, 1.52527334899609462e-5, 1.32154330895701554e-6, 1.01781980337720878e-7, 7.07410562897461007e-9,
                  4.43528082414631085e-10);
  }
  // Q to 1.5e-17 for t up to 10, and to 4.6e-17
  template <typename T>
  static GK_HOST_DEVICE T decrease(T u) {
    return horner(u, 0.072536780945925525, -0.12454077298234789, 0.086369401831099599, -0.055079812956154942, 0.031958280883826742,
                  -0.016645332140442015, 0.0076382956732263789, -0.0029992765217711187, 9.5521586449879821e-4, -2.1665250273863104e-4,
                  1.7681654172887578e-5, 1.0318131499811526e-5, -4.8375355873149694e-6, 5.0504787283674908e-7, 3.2976641086869887e-7,
                  -1.3094842237826339e-7, -7.4715733862276805e-9, 1.6259836934855426e-8, -1.7625683369299159e-9, -1.7603966771648483e-9,
                  3.9411822816574751e-10, 1.9008240853437464e-10, -4.288743190366725e-11, -1.7788442298463882e-11);
  }
};

// Phi(-t) = 2^n (1 + f series) ratio. n is lifted by a power of two, which drop takes away again: factors are then normal where
// e^(-t^2 / 2) is denormal.
template <typename T>
struct NormalTail {
  T rounded;  // n + kLiftedRound
  T f;
  T series;
  T ratio;
  decltype(T(0) < T(0)) vanishes;  // e^(-t^2 / 2) rounds to 0, and the numbers above may be arbitrary

  // Phi(-t) for t up to kLargest. 1 + f series is not rounded.
  GK_HOST_DEVICE T probability() const {
    const T lifted = add_exponent(ratio, rounded);
    return fma(lifted, f * series, lifted) * drop();
  }
  // e^(-t^2 / 2) factor
  GK_HOST_DEVICE T exp_times(T factor) const {
    const T exp = add_exponent(fma(series, f, T(1)), rounded);
    return select(vanishes, T(0), exp) * factor * drop();
  }

 private:
  static GK_HOST_DEVICE T drop() { return T(NormalConstants<scalar_of_t<T>>::kDrop); }
};

// For t >= 0, from -t. On processors with fma, the relative error of Phi is at most (2 + 2.5 t + 1.6 t^2) 2^-24 up to t = 13, and
// 2^-53 for double (test_errors_of_gelu_and_mish): that of t^2 is multiplied by the exponential, and ratio is a difference.
template <typename T>
GK_HOST_DEVICE NormalTail<T> normal_tail(T minus_t) {
  using scalar_t = scalar_of_t<T>;
  using C = NormalConstants<scalar_t>;
  // The exponent -t^2 / (2 ln 2) = n + f
  const T square = minus_t * minus_t;
  const T factor = constant<T, C::kMinusHalfLog2E>();
  const T rounded = fma(square, factor, constant<T, C::kLiftedRound>());
  const T n = rounded - constant<T, C::kLiftedRound>();
  const T f = fma(square, factor, -n);
  // (t - K) / (t + K) as 2 t / (t + K) - 1, whose error is small near 0
  const T u = fma(quotient(minus_t, T(C::kCentre) - minus_t), T(scalar_t(-2)), T(scalar_t(-1)));
  const T ratio = fma(minus_t, C::decrease(u), T(scalar_t(0.5)));
  return {rounded, f, C::exp2_series(f), ratio, minus_t < T(-C::kLargest)};
}

// The same in half precision. Nothing is lifted: where e^(-t^2 / 2) would be denormal it is 0.
struct HalfNormalTail {
  float exp;
  float ratio;
  GK_HOST_DEVICE float probability() const { return exp * ratio; }
  GK_HOST_DEVICE float exp_times(float factor) const { return exp * factor; }
};
GK_HOST_DEVICE HalfNormalTail half_precise_normal_tail(float minus_t) {
  using C = NormalConstants<float>;
  // At inf ratio is finite, and exp is 0.
  const float finite = at_least(-20.0f, minus_t);
  const float exp = approximate_exp2(finite * finite * C::kMinusHalfLog2E);
  const float u = fma(-2.0f * C::kCentre, approximate_inverse(C::kCentre - finite), 1.0f);
  return {exp, fma(finite, C::half_precise_decrease(u), 0.5f)};
}

// normal_tail to `precision`, and Phi(-t). Vectors always have full precision.
template <Precision precision, typename T>
GK_HOST_DEVICE auto normal_tail_to(T minus_t) {
  if constexpr (kIsHalfScalar<T, precision>) {
    return half_precise_normal_tail(minus_t);
  } else {
    return normal_tail(minus_t);
  }
}
template <Precision precision, typename T>
GK_HOST_DEVICE T lower_probability_to(T minus_t) {
  if constexpr (!kIsHalfScalar<T, precision>) minus_t = at_least(T(-NormalConstants<scalar_of_t<T>>::kLargest), minus_t);
  return normal_tail_to<precision>(minus_t).probability();
}

}  // namespace gradkernels::math
