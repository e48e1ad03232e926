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

// sum <- sum + x, nearly exactly (Knuth's TwoSum). Beyond the largest number the error would be nan; it then does not count.
template <typename T>
GK_HOST_DEVICE void add(Sum<T>& sum, T x) {
  const T high = sum.high + x;
  const T part_of_x = high - sum.high;
  const T lost = (sum.high - (high - part_of_x)) + (x - part_of_x);
  sum.high = high;
  sum.low = sum.low + select(lost == lost, lost, T(0));
}

}  // namespace gradkernels::math
