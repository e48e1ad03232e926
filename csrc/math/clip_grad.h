// The arithmetic of clipping by global norm (Pascanu, Mikolov and Bengio 2013) and of adaptive gradient
// clipping (Brock et al. 2021), in float64: float32 squares overflow from 1.8e19 on.
#pragma once

#include "common/host_device.h"

namespace gradkernels::math {

// torch's coefficient, max_norm / (total_norm + 1e-6). Every gradient is multiplied with it, unless
// leaves_unscaled.
GK_HOST_DEVICE double clip_coefficient(double total_norm, double max_norm) { return max_norm / (total_norm + 1e-6); }

// False for nan: as in torch, all gradients then become nan.
GK_HOST_DEVICE bool leaves_unscaled(double coefficient) { return coefficient >= 1.0; }

// The coefficient of a unit with weights w and gradients g in adaptive gradient clipping, with timm's bounds:
// clip_factor max(|w|, eps) / max(|g|, 1e-6), or 1 if |g| < clip_factor max(|w|, eps). It is nan if a norm is.
GK_HOST_DEVICE double adaptive_clip_coefficient(double param_norm, double grad_norm, double clip_factor, double eps) {
  const double max_norm = (param_norm < eps ? eps : param_norm) * clip_factor;
  return grad_norm < max_norm ? 1.0 : max_norm / (grad_norm < 1e-6 ? 1e-6 : grad_norm);
}

// min(max(x, -limit), limit), in torch's order, which matters if limit < 0. nan stays nan.
template <typename T>
GK_HOST_DEVICE T clamp(T x, T limit) {
  const T raised = select(x < -limit, -limit, x);
  return select(raised > limit, limit, raised);
}

// The larger of two magnitudes; nan if either is nan.
template <typename T>
GK_HOST_DEVICE T max_or_nan(T maximum, T x) {
  return select((x > maximum) | (x != x), x, maximum);
}

// A sum of float64 squares outside these bounds has lost digits to overflow or denormals, although the norm
// may be representable. It is then computed again over x * factor. The factor is a power of two that brings
// the largest magnitude near one, which is exact. The squares of float32 numbers are 0 or within the bounds.
constexpr double kSmallestSafeSquareSum = 1e-280;
constexpr double kLargestSafeSquareSum = 1e300;

GK_HOST_DEVICE bool is_safe_square_sum(double sum) { return sum >= kSmallestSafeSquareSum && sum <= kLargestSafeSquareSum; }

// Whether the squares of a tensor have overflowed or underflowed although its norm may be representable.
GK_HOST_DEVICE bool squares_are_lost(double sum, double max_abs) {
  return max_abs - max_abs == 0.0 && max_abs != 0.0 && !is_safe_square_sum(sum);
}

struct Rescaling {
  double factor;
  double inverse;
};

GK_HOST_DEVICE Rescaling rescaling(double max_magnitude) {
  if (max_magnitude > 1e-140 && max_magnitude < 1e140) return {1.0, 1.0};
  return max_magnitude > 1.0 ? Rescaling{0x1p-600, 0x1p600} : Rescaling{0x1p600, 0x1p-600};
}

}  // namespace gradkernels::math
