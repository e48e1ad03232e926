// The formulas of batch norm and group norm: moments and their merge, the normalisation, and the gradient of the
// input. All per-channel numbers are float64. Only numbers that are combined with elements are rounded to the
// computing type. The shift makes up for the rounding error of the mean.
#pragma once

#include "common/host_device.h"
#include "math/sum.h"

namespace gradkernels::math {

// The moments of a set of elements in float64: count, mean and M2 = sum (x - mean)^2. T is double or a vector
// of doubles. mean_low and m2_low are the rounding errors of mean and m2: without them, merging many sets
// would cost the last digits, which float64 data need (bench/bench_accuracy.py).
template <typename T>
struct Moments {
  T count;
  T mean;
  T m2;
  T mean_low;
  T m2_low;
};

// The same moments, with the low parts added to the high parts.
GK_HOST_DEVICE Moments<double> rounded(const Moments<double>& moments) {
  return {moments.count, rounded(Sum<double>{moments.mean, moments.mean_low}), rounded(Sum<double>{moments.m2, moments.m2_low}), 0.0, 0.0};
}

// The moments of a tile from S = sum d and Q = sum d^2, with d = x - about: mean = about + S/n,
// M2 = Q - S^2/n. `about` must be near the mean of the tile, so that the difference does not cancel.
template <typename T>
GK_HOST_DEVICE Moments<T> moments_about(T about, T count, T sum, T sum_of_squares) {
  const T correction = sum / count;
  Sum<T> mean{about, T(0)};
  add(mean, correction);
  return {count, mean.high, sum_of_squares - sum * correction, mean.low, T(0)};
}

// The moments of the union of two disjoint sets (Chan, Golub and LeVeque 1979). The second set must not be
// empty. The order of the products makes an empty first set count for nothing even if delta^2 overflows.
// Means that are inf or nan add up as the elements would, and M2 is then nan.
template <typename T>
GK_HOST_DEVICE Moments<T> merge(const Moments<T>& a, const Moments<T>& b) {
  const T count = a.count + b.count;
  const T weight = b.count / count;
  const T weight_low = fma(-weight, count, b.count) / count;
  Sum<T> delta{b.mean, b.mean_low - a.mean_low};
  add(delta, -zero_unless_finite(a.mean));
  const T step = delta.high * weight;
  Sum<T> mean{a.mean, a.mean_low + (fma(delta.high, weight, -step) + fma(delta.high, weight_low, delta.low * weight))};
  add(mean, step);
  Sum<T> m2{a.m2, a.m2_low + b.m2_low};
  add(m2, b.m2);
  const T rounded_delta = delta.high + delta.low;
  add(m2, rounded_delta * (rounded_delta * (a.count * weight)));
  return {count, mean.high, m2.high, mean.low, m2.low};
}

// moments_about from sums with low parts.
GK_HOST_DEVICE Moments<double> moments_about(double about, double count, const Sum<double>& sum, const Sum<double>& sum_of_squares) {
  const Sum<double> correction = quotient_of(sum, count);
  Sum<double> mean{about, correction.low};
  add(mean, correction.high);
  const Sum<double> product = product_of(sum.high, correction.high);
  Sum<double> m2{sum_of_squares.high, sum_of_squares.low - (product.low + fma(sum.high, correction.low, sum.low * correction.high))};
  add(m2, -product.high);
  return {count, mean.high, m2.high, mean.low, m2.low};
}

// The moments of `count` elements, one after the other and all in float64: for a channel with an inf or a
// nan, which then decides the mean, or with squares that overflow the computing type. each(function) must
// call function(x) for one element after the other, until it returns false.
template <typename Each>
GK_HOST_DEVICE Moments<double> moments_of(double count, const Each& each) {
  double total = 0.0;
  each([&](double x) {
    total += x;
    return total == total;
  });
  const double about = total / count;
  if (zero_unless_finite(about) != about) return {count, about, about - about, 0.0, 0.0};
  Sum<double> sum{0.0, 0.0}, squares{0.0, 0.0};
  each([&](double x) {
    const double difference = x - about;
    add(sum, difference);
    add(squares, difference * difference);
    return true;
  });
  return moments_about(about, count, sum, squares);
}

// The terms of a set in the sums of x - about and of (x - about)^2 over many sets. moments_about of the sums are the
// moments of the union, without a division for each set.
struct TermsAbout {
  Sum<double> first;
  Sum<double> second;
};
GK_HOST_DEVICE TermsAbout terms_about(double about, const Moments<double>& set) {
  Sum<double> difference{set.mean, set.mean_low};
  add(difference, -about);
  Sum<double> first = product_of(set.count, difference.high);
  first.low = fma(set.count, difference.low, first.low);
  Sum<double> second = product_of(first.high, difference.high);
  second.low = fma(first.high, difference.low, fma(first.low, difference.high, second.low)) + set.m2_low;
  add(second, set.m2);
  return {first, second};
}

// 1 / sqrt(var + eps). Every output is multiplied with this number, so one Newton step with the exact
// residual corrects the roundings of the root and of the quotient.
GK_HOST_DEVICE double inverse_std(double variance, double eps) {
  const double v = variance + eps;
  const double r = 1.0 / sqrt(v);
  const double vr = v * r;
  const double residual = fma(-vr, r, 1.0) - fma(v, r, -vr) * r;
  const double corrected = fma(0.5 * r, residual, r);
  return corrected == corrected ? corrected : r;
}

// For the variance of a batch. As in torch, it is 0 for a constant channel with eps = 0.
GK_HOST_DEVICE double inverse_std_of_batch(double variance, double eps) { return variance + eps == 0.0 ? 0.0 : inverse_std(variance, eps); }

// The momentum that makes the running statistics the mean of the statistics of all batches, if `batches` came
// before this one.
GK_HOST_DEVICE double cumulative_momentum(double batches) { return 1.0 / (batches + 1.0); }

// running <- (1 - momentum) running + momentum observed
GK_HOST_DEVICE double update_running(double running, double observed, double momentum) {
  return fma(momentum, observed, (1.0 - momentum) * running);
}

// batch_norm(x) = (x - mean) invstd weight + bias = fma(x - mean_high, scale, shift)
//
// mean = mean_high + mean_low, and the shift contains mean_low: data at 1e4 +- 1e-2 keep their digits
// (test_statistics_of_hard_inputs), which (x - mean) * invstd in float32 would lose. The backward pass
// computes the argument of the activation with the same expression, so that it has the same sign.
template <typename T>
struct Normalisation {
  T mean_high;
  T scale;
  T shift;

  GK_HOST_DEVICE T operator()(T x) const { return fma(x - mean_high, scale, shift); }

  // The same struct with function(member) for each member.
  template <typename U, typename Function>
  GK_HOST_DEVICE Normalisation<U> map(const Function& function) const {
    return {function(mean_high), function(scale), function(shift)};
  }
};

// If the scale is not finite, mean_high is 0: the result is then torch's x scale + (bias - mean scale), and
// has its inf and nan.
template <typename scalar_t>
GK_HOST_DEVICE scalar_t mean_high(double mean, scalar_t scale) {
  return scale - scale == scalar_t(0) ? static_cast<scalar_t>(mean) : scalar_t(0);
}
// 0 if the mean is inf.
GK_HOST_DEVICE double mean_low(double mean, double mean_high) { return zero_if_nan(mean - mean_high); }

template <typename scalar_t>
GK_HOST_DEVICE Normalisation<scalar_t> normalisation(double mean, double invstd, double weight, double bias) {
  const scalar_t scale = static_cast<scalar_t>(weight * invstd);
  const scalar_t high = mean_high(mean, scale);
  return {high, scale, static_cast<scalar_t>(bias - mean_low(mean, static_cast<double>(high)) * static_cast<double>(scale))};
}

// The sums over a channel that every gradient needs: S1 = sum dz and S2 = sum dz (x - mean), where dz is the
// gradient at the output of the normalisation. grad_bias = S1, grad_weight = invstd S2. A term is a product
// in the computing type, and eight terms (on a GPU in 16 bits up to 16, those of a tile) are added up in that
// type: float32 terms of 2^125 (2^124) and more may give inf. The gradients of the channel are then inf too, as
// in torch.
struct GradientSums {
  double dz;
  double dz_x;
};

GK_HOST_DEVICE GradientSums merge(const GradientSums& a, const GradientSums& b) { return {a.dz + b.dz, a.dz_x + b.dz_x}; }

// The sums about the mean, from sum dz and sum dz (x - mean_high). mean_low is ignored if sum dz is not
// finite.
GK_HOST_DEVICE GradientSums about_mean(const GradientSums& about_mean_high, double mean_low) {
  const double dz = zero_unless_finite(about_mean_high.dz);
  return {about_mean_high.dz, fma(-mean_low, dz, about_mean_high.dz_x)};
}

// training:
//   grad_x = weight invstd (dz - S1/N - (x - mean) invstd^2 S2/N)
//          = fma(scale, fma(slope, x - mean_high, dz - dz_mean_high), offset)
// evaluation:
//   grad_x = weight invstd dz
//
// S1/N + slope mean_low is split into dz_mean_high and a low part, as the mean is, so that gradients with a
// large common offset keep their digits. The offset contains the low part if it is finite. slope does not
// contain the scale: their product could underflow float32 for a small gradient at a large x
// (test_gradients_at_the_ends_of_the_range).
//
// The channels of a set of group norm share mean and invstd, and each has a weight. If S1 and S2 are the sums of
// weight dz and of weight dz (x - mean) over the set, and N is the number of its elements:
//   grad_x = invstd (weight dz - S1/N - (x - mean) invstd^2 S2/N)
//          = fma(scale, fma(slope, x - mean_high, fma(weight, dz, -dz_mean_high)), offset), with the scale of weight 1
template <typename T>
struct InputGradient {
  T mean_high;
  T dz_mean_high;
  T scale;
  T slope;
  T offset;

  GK_HOST_DEVICE T training(T dz, T x) const { return fma(scale, fma(slope, x - mean_high, dz - dz_mean_high), offset); }
  GK_HOST_DEVICE T in_set(T weight, T dz, T x) const {
    return fma(scale, fma(slope, x - mean_high, fma(weight, dz, -dz_mean_high)), offset);
  }
  // The statistics are constants, so the result does not depend on x, even if x is inf.
  GK_HOST_DEVICE T evaluation(T dz) const { return scale * dz; }

  template <typename U, typename Function>
  GK_HOST_DEVICE InputGradient<U> map(const Function& function) const {
    return {function(mean_high), function(dz_mean_high), function(scale), function(slope), function(offset)};
  }
};

// high: mean_high of the channel's Normalisation. weight: 1 for a set of several channels.
template <typename scalar_t>
GK_HOST_DEVICE InputGradient<scalar_t> input_gradient(double mean, scalar_t high, double invstd, double weight, double count,
                                                      GradientSums sums) {
  const double scale = weight * invstd;
  const double slope = -invstd * invstd * (sums.dz_x / count);
  const double dz_mean = sums.dz / count + zero_unless_finite(slope * mean_low(mean, static_cast<double>(high)));
  const scalar_t dz_mean_high = static_cast<scalar_t>(dz_mean);
  const double dz_mean_low = dz_mean - static_cast<double>(dz_mean_high);
  return {high, dz_mean_high, static_cast<scalar_t>(scale), static_cast<scalar_t>(slope),
          zero_unless_finite(static_cast<scalar_t>(-scale * dz_mean_low))};
}

}  // namespace gradkernels::math
