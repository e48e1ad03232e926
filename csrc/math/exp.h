// exp, expm1 and the logistic function without branches or table, for scalars and SIMD vectors alike: libm's versions do not vectorise.
// Argument reduction x = n ln 2 + r with |r| <= ln(2) / 2 (Cody and Waite), Taylor's series of e^r - 1, scaling by 2^n. The series ends
// where its remainder is below 0.1 ulp. Results carry their own rounding error beside them where a caller goes on computing: elu and swish
// and their gradients stay within 2 ulp of the exact value where the processor has fma (tests/test_activation.py) and 4 where not. nan
// stays nan; the ends saturate to 0, -1 and inf; denormal results are kept.
#pragma once

#include "common/host_device.h"
#include "math/sum.h"

namespace gradkernels::math {

template <typename scalar_t>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int kTerms = 7;
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2High = 0.693359375f;  // nine bits: n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440054690583e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  static constexpr float kUnderflow = -170.0f;  // far below where e^x rounds to 0; half of its exponent is still a normal one
  static constexpr float kOverflow = 89.0f;
  static constexpr uint32_t kOneBits = 0x3F800000u;
  static constexpr int kMantissaBits = 23;
  using bits_t = uint32_t;
};

template <>
struct ExpConstants<double> {
  static constexpr int kTerms = 13;
  static constexpr double kLog2E = 1.44269504088896338700e+00;
  static constexpr double kLn2High = 6.93145751953125e-1;  // twenty bits
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kUnderflow = -1400.0;
  static constexpr double kOverflow = 710.0;
  static constexpr uint64_t kOneBits = 0x3FF0000000000000u;
  static constexpr int kMantissaBits = 52;
  using bits_t = uint64_t;
};

template <int K>
struct InverseFactorial {
  static constexpr double value = InverseFactorial<K - 1>::value / K;
};
template <>
struct InverseFactorial<0> {
  static constexpr double value = 1.0;
};

// 1/K! + r/(K+1)! + ... by Horner's rule
template <int K, typename T>
GK_HOST_DEVICE T taylor_of_exp(T r) {
  using scalar_t = scalar_of_t<T>;
  const T coefficient(static_cast<scalar_t>(InverseFactorial<K>::value));
  if constexpr (K == ExpConstants<scalar_t>::kTerms) {
    return coefficient;
  } else {
    return fma(taylor_of_exp<K + 1>(r), r, coefficient);
  }
}

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

template <typename T>
GK_HOST_DEVICE T round_to_integer(T x) {
  const T round(ExpConstants<scalar_of_t<T>>::kRound);
  return (x + round) - round;
}

// e^x = 2^n (1 + r + r^2 q)
template <typename T>
struct ReducedExp {
  T n;
  T r;
  T q;
};

template <typename T>
GK_HOST_DEVICE ReducedExp<T> reduce_exp(T x) {
  using C = ExpConstants<scalar_of_t<T>>;
  const T n = round_to_integer(x * T(C::kLog2E));
  const T r = fma(n, T(-C::kLn2Low), fma(n, T(-C::kLn2High), x));
  return {n, r, taylor_of_exp<2>(r)};
}

// e^r - 1 = r + r^2 q
template <typename T>
GK_HOST_DEVICE Sum<T> expm1_of_reduced(const ReducedExp<T>& reduced) {
  const T square = reduced.r * reduced.r;
  const T high = fma(square, reduced.q, reduced.r);
  return {high, fma(square, reduced.q, reduced.r - high)};
}

// e^x = (high + low) tail: high alone is right to one ulp, and the two together to a third of one. 2^n is applied in two halves, since it
// leaves the normal range itself where the result is denormal or just below overflow; a caller who multiplies by something large before the
// tail keeps the digits that a denormal e^x has lost.
template <typename T>
struct SplitExp {
  T high;
  T low;
  T tail;
};

template <typename T>
GK_HOST_DEVICE SplitExp<T> split_exp(T x) {
  using C = ExpConstants<scalar_of_t<T>>;
  const auto vanishes = x < T(C::kUnderflow);
  x = select(vanishes, T(C::kUnderflow), x);
  x = select(x > T(C::kOverflow), T(C::kOverflow), x);
  const ReducedExp<T> reduced = reduce_exp(x);
  const Sum<T> expm1 = expm1_of_reduced(reduced);
  const Sum<T> exp = fast_two_sum(T(1), expm1.high);
  const T half = round_to_integer(reduced.n * T(scalar_of_t<T>(0.5)));
  const T head = exp2_of_integer(half);
  return {exp.high * head, (exp.low + expm1.low) * head, select(vanishes, T(0), exp2_of_integer(reduced.n - half))};
}

// e^x - 1 for x <= 0, exact near zero where the subtraction would cancel: 2^n (e^r - 1) + (2^n - 1)
template <typename T>
GK_HOST_DEVICE Sum<T> expm1_of_nonpositive(T x) {
  const T floor(scalar_of_t<T>(-60));  // the result is -1 to the last bit long before
  const ReducedExp<T> reduced = reduce_exp(select(x < floor, floor, x));
  const Sum<T> expm1 = expm1_of_reduced(reduced);
  const T scale = exp2_of_integer(reduced.n);
  const Sum<T> sum = fast_two_sum(scale - T(1), scale * expm1.high);
  return {sum.high, fma(scale, expm1.low, sum.low)};
}

// sigmoid(x) = 1 / (1 + e^-x) = numerator / denominator * tail, and 1 - sigmoid(x) = complement / denominator, with only e^-|x| inside: no
// overflow, and full relative accuracy on both sides of zero.
template <typename T>
struct Logistic {
  Sum<T> numerator;
  T tail;
  T complement;
  Sum<T> denominator;
};

template <typename T>
GK_HOST_DEVICE Logistic<T> logistic(T x) {
  const auto negative = x < T(0);
  const SplitExp<T> split = split_exp(select(negative, x, -x));
  const T e = split.high * split.tail;
  Sum<T> denominator = fast_two_sum(T(1), e);
  denominator.low = fma(split.low, split.tail, denominator.low);
  return {{select(negative, split.high, T(1)), select(negative, split.low, T(0))},
          select(negative, split.tail, T(1)),
          select(negative, T(1), e),
          denominator};
}

// a / d, where 1/d.high is at hand, with the rounding error of the quotient
template <typename T>
GK_HOST_DEVICE Sum<T> divide(Sum<T> a, Sum<T> d, T inverse) {
  const T quotient = a.high * inverse;
  const T remainder = fma(-quotient, d.low, fma(-quotient, d.high, a.high) + a.low);
  return {quotient, remainder * inverse};
}

}  // namespace gradkernels::math
