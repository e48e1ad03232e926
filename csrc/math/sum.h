// Sums that keep their rounding errors.
#pragma once

#include "common/host_device.h"

namespace gradkernels::math {

// high + low, where low is the rounding error of high.
template <typename T>
struct Sum {
  T high;
  T low;
};

template <typename T>
GK_HOST_DEVICE T zero_if_nan(T x) {
  return select(x == x, x, T(0));
}
template <typename T>
GK_HOST_DEVICE T zero_unless_finite(T x) {
  return select(x - x == T(0), x, T(0));
}

// high + low, rounded. After an overflow, low may be nan or an inf of the other sign, and is ignored.
template <typename T>
GK_HOST_DEVICE T rounded(const Sum<T>& sum) {
  return sum.high + zero_unless_finite(sum.low);
}

// sum <- sum + x, nearly exactly (Knuth's TwoSum). After an overflow the rounding error would be nan, and is
// ignored.
template <typename T>
GK_HOST_DEVICE void add(Sum<T>& sum, T x) {
  const T high = sum.high + x;
  const T part_of_x = high - sum.high;
  const T lost = (sum.high - (high - part_of_x)) + (x - part_of_x);
  sum.high = high;
  sum.low = sum.low + zero_if_nan(lost);
}

// a + b. The bits of the result do not depend on the order of a and b.
template <typename T>
GK_HOST_DEVICE Sum<T> sum_of(const Sum<T>& a, const Sum<T>& b) {
  Sum<T> sum{a.high, T(0)};
  add(sum, b.high);
  sum.low += a.low + b.low;
  return sum;
}

// a b and its rounding error.
template <typename T>
GK_HOST_DEVICE Sum<T> product_of(T a, T b) {
  const T product = a * b;
  return {product, fma(a, b, -product)};
}

// sum / count and its rounding error.
GK_HOST_DEVICE Sum<double> quotient_of(const Sum<double>& sum, double count) {
  const double quotient = sum.high / count;
  return {quotient, (fma(-quotient, count, sum.high) + sum.low) / count};
}

}  // namespace gradkernels::math
