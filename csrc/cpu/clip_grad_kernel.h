// The SIMD loops of gradient clipping, over one contiguous run of elements. Squares are taken and summed in float64, whatever the element
// type: no gradient that float32 holds can overflow or vanish. Compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "math/clip_grad.h"
#include "math/sum.h"

namespace gradkernels::cpu {
namespace {

// Independent sums hide the latency of an addition.
constexpr int kSums = 4;

// Calls function(vector of float64, index of the sum that takes it) for elements [begin, end), zeros past the end.
template <typename scalar_t, typename Function>
GK_INLINE void for_each_double_vector(const scalar_t* x, int64_t begin, int64_t end, const Function& function) {
  using V = Vec<double>;
  int64_t i = begin;
  for (; i + kSums * V::kLanes <= end; i += kSums * V::kLanes) {
    for (int k = 0; k < kSums; ++k) function(load_double(x + i + k * V::kLanes), k);
  }
  for (; i < end; i += V::kLanes) {
    scalar_t rest[V::kLanes] = {};
    for (int64_t j = i; j < end && j < i + V::kLanes; ++j) rest[j - i] = x[j];
    function(load_double(rest), 0);
  }
}

double sum_of_squares_kernel(DType dtype, int64_t count, const void* x, double factor) {
  using V = Vec<double>;
  // A lane adds up some dozens of squares; what it comes to is added to the total with the rounding error kept.
  constexpr int64_t kBlockElements = 64 * kSums * V::kLanes;
  math::Sum<V> total{V(0.0), V(0.0)};
  dispatch(dtype, [&](auto zero) {
    for (int64_t begin = 0; begin < count; begin += kBlockElements) {
      V sum[kSums] = {V(0.0), V(0.0), V(0.0), V(0.0)};
      for_each_double_vector(static_cast<const decltype(zero)*>(x), begin, count - begin < kBlockElements ? count : begin + kBlockElements,
                             [&](V value, int k) GK_INLINE_LAMBDA {
                               value = value * V(factor);
                               sum[k] = fma(value, value, sum[k]);
                             });
      math::add(total, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  });
  return sum_of_lanes(total.high) + sum_of_lanes(total.low);
}

double max_magnitude_kernel(DType dtype, int64_t count, const void* x) {
  using V = Vec<double>;
  V maximum[kSums] = {V(0.0), V(0.0), V(0.0), V(0.0)};
  dispatch(dtype, [&](auto zero) {
    for_each_double_vector(static_cast<const decltype(zero)*>(x), 0, count, [&](V value, int k) GK_INLINE_LAMBDA {
      maximum[k] = math::max_or_nan(maximum[k], select(value < V(0.0), -value, value));
    });
  });
  double lane[kSums * V::kLanes];
  for (int k = 0; k < kSums; ++k) maximum[k].store(lane + k * V::kLanes);
  double result = 0.0;
  for (const double value : lane) result = math::max_or_nan(result, value);
  return result;
}

// The product is taken in float64 and rounded once: a coefficient may be too small for float32 where the product is not.
void scale_kernel(DType dtype, int64_t count, void* x_data, double factor) {
  using V = Vec<double>;
  dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    scalar_t* x = static_cast<scalar_t*>(x_data);
    int64_t i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes) store_double(x + i, load_double(x + i) * V(factor));
    for (; i < count; ++i) x[i] = static_cast<scalar_t>(static_cast<double>(x[i]) * factor);
  });
}

}  // namespace
}  // namespace gradkernels::cpu
