// Sums that keep what rounding takes away.
#pragma once

#include "common/host_device.h"

namespace gradkernels::math {

// high + low, the second being what rounding took from the first.
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

// What a sum comes to. Beyond the largest number its low part may be nan, or an inf of the other sign; it then does not count.
template <typename T>
GK_HOST_DEVICE T rounded(const Sum<T>& sum) {
  return sum.high + zero_unless_finite(sum.low);
}

// sum <- sum + x, nearly exactly (Knuth's TwoSum). Beyond the largest number the error would be nan; it then does not count.
template <typename T>
GK_HOST_DEVICE void add(Sum<T>& sum, T x) {
  const T high = sum.high + x;
  const T part_of_x = high - sum.high;
  const T lost = (sum.high - (high - part_of_x)) + (x - part_of_x);
  sum.high = high;
  sum.low = sum.low + zero_if_nan(lost);
}

// Of two sums, the same bits whichever comes first.
template <typename T>
GK_HOST_DEVICE Sum<T> sum_of(const Sum<T>& a, const Sum<T>& b) {
  Sum<T> sum{a.high, T(0)};
  add(sum, b.high);
  sum.low += a.low + b.low;
  return sum;
}

// a b, with what rounding takes from it.
template <typename T>
GK_HOST_DEVICE Sum<T> product_of(T a, T b) {
  const T product = a * b;
  return {product, fma(a, b, -product)};
}

// sum / count, likewise.
GK_HOST_DEVICE Sum<double> quotient_of(const Sum<double>& sum, double count) {
  const double quotient = sum.high / count;
  return {quotient, (fma(-quotient, count, sum.high) + sum.low) / count};
}

}  // namespace gradkernels::math
