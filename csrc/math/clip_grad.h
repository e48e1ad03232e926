// The arithmetic of clipping by global norm (Pascanu, Mikolov and Bengio 2013), in float64: float32 squares overflow from 1.8e19 on.
#pragma once

#include "common/host_device.h"

namespace gradkernels::math {

// What every gradient is multiplied with, before the comparison below: max_norm / (total_norm + 1e-6), torch's.
GK_HOST_DEVICE double clip_coefficient(double total_norm, double max_norm) { return max_norm / (total_norm + 1e-6); }

// False for nan, which has to spread as torch's does.
GK_HOST_DEVICE bool leaves_unscaled(double coefficient) { return coefficient >= 1.0; }

// min(max(x, -limit), limit), torch's order, which decides where limit < 0; nan stays.
template <typename T>
GK_HOST_DEVICE T clamp(T x, T limit) {
  const T raised = select(x < -limit, -limit, x);
  return select(raised > limit, limit, raised);
}

// max |x| that keeps a nan once it has seen one; x is a magnitude.
template <typename T>
GK_HOST_DEVICE T max_or_nan(T maximum, T x) {
  return select((x > maximum) | (x != x), x, maximum);
}

// A sum of squares of float64 values outside these bounds has lost digits to overflow or to denormals, although the norm may be
// representable: it is taken again over x * factor with a power of two that brings the largest magnitude near one, which loses nothing.
// Squares of float32 values never leave the bounds, but for zero.
constexpr double kSmallestSafeSquareSum = 1e-280;
constexpr double kLargestSafeSquareSum = 1e300;

GK_HOST_DEVICE bool is_safe_square_sum(double sum) { return sum >= kSmallestSafeSquareSum && sum <= kLargestSafeSquareSum; }

struct Rescaling {
  double factor;
  double inverse;
};

GK_HOST_DEVICE Rescaling rescaling(double max_magnitude) {
  if (max_magnitude > 1e-140 && max_magnitude < 1e140) return {1.0, 1.0};
  return max_magnitude > 1.0 ? Rescaling{0x1p-600, 0x1p600} : Rescaling{0x1p600, 0x1p-600};
}

}  // namespace gradkernels::math
