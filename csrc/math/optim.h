// One step of RMSprop (Hinton 2012; centered: Graves 2013), an element at a time, in torch's order of
// operations.
#pragma once

#include "common/host_device.h"

namespace gradkernels::math {

// torch's options as numbers. grad_coefficient multiplies the gradient before anything else: clipping, and -1
// for maximize.
struct RmspropOptions {
  double lr;
  double alpha;
  double eps;
  double weight_decay;
  double momentum;
  double grad_coefficient;
};

// The state of one element. grad_avg and momentum_buffer are only used if the options need them.
template <typename T>
struct RmspropState {
  T param;
  T square_avg;
  T grad_avg;
  T momentum_buffer;
};

// g = grad_coefficient grad + weight_decay param
// square_avg = alpha square_avg + (1 - alpha) g^2
// grad_avg = grad_avg + (1 - alpha) (g - grad_avg)                 only if centered
// denominator = sqrt(square_avg - grad_avg^2) + eps                without grad_avg^2 unless centered
// momentum_buffer = momentum momentum_buffer + g / denominator     only if momentum > 0
// param = param - lr momentum_buffer                               or param - lr g / denominator without it
//
// 1 - alpha is computed in float64 and then rounded to T. A product is fused with a sum that may cancel.
template <typename T>
struct Rmsprop {
  using scalar_t = scalar_of_t<T>;

  T lr, alpha, one_minus_alpha, eps, weight_decay, momentum, grad_coefficient;
  bool decays, lerps_from_end;

  GK_HOST_DEVICE explicit Rmsprop(const RmspropOptions& options)
      : lr(T(static_cast<scalar_t>(options.lr))),
        alpha(T(static_cast<scalar_t>(options.alpha))),
        one_minus_alpha(T(static_cast<scalar_t>(1.0 - options.alpha))),
        eps(T(static_cast<scalar_t>(options.eps))),
        weight_decay(T(static_cast<scalar_t>(options.weight_decay))),
        momentum(T(static_cast<scalar_t>(options.momentum))),
        grad_coefficient(T(static_cast<scalar_t>(options.grad_coefficient))),
        // Without decay the parameter is not read: 0 times inf would be nan.
        decays(options.weight_decay != 0.0),
        lerps_from_end(1.0 - options.alpha >= 0.5) {}

  template <bool centered, bool has_momentum>
  GK_HOST_DEVICE RmspropState<T> step(RmspropState<T> x, T grad) const {
    T g = grad * grad_coefficient;
    if (decays) g = fma(weight_decay, x.param, g);
    x.square_avg = fma(one_minus_alpha * g, g, x.square_avg * alpha);
    T variance = x.square_avg;
    if constexpr (centered) {
      // The two formulas of torch.lerp, each exact at the end that is nearer.
      const T difference = g - x.grad_avg;
      x.grad_avg = lerps_from_end ? fma(one_minus_alpha - T(scalar_t(1)), difference, g) : fma(one_minus_alpha, difference, x.grad_avg);
      variance = fma(-x.grad_avg, x.grad_avg, variance);
    }
    const T denominator = sqrt(variance) + eps;
    if constexpr (has_momentum) {
      x.momentum_buffer = x.momentum_buffer * momentum + g / denominator;
      x.param = fma(-lr, x.momentum_buffer, x.param);
    } else {
      x.param = x.param - lr * g / denominator;
    }
    return x;
  }
};

}  // namespace gradkernels::math
