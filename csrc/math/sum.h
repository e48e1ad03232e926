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

// a + b with its rounding error, where |a| >= |b| or a is 0 (Dekker's Fast2Sum).
template <typename T>
GK_HOST_DEVICE Sum<T> fast_two_sum(T a, T b) {
  const T high = a + b;
  return {high, b - (high - a)};
}

// sum <- sum + x, nearly exactly (Knuth's TwoSum). Beyond the largest number the error would be nan; it then does not count.
template <typename T>
GK_HOST_DEVICE void add(Sum<T>& sum, T x) {
  const T high = sum.high + x;
  const T part_of_x = high - sum.high;
  const T lost = (sum.high - (high - part_of_x)) + (x - part_of_x);
  sum.high = high;
  sum.low = sum.low + select(lost == lost, lost, T(0));
}

// a b with its rounding error, of which only the instruction knows (where fma rounds twice, it is lost)
template <typename T>
GK_HOST_DEVICE Sum<T> multiply(T a, Sum<T> b) {
  const T high = a * b.high;
  return {high, fma(a, b.low, fma(a, b.high, -high))};
}

}  // namespace gradkernels::math
