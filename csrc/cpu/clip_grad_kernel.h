// The SIMD loops of gradient clipping, over one contiguous run of elements. Squares are computed and summed
// in float64 for every element type, so that the square of a float32 gradient cannot overflow or underflow.
// Compiled once per instruction set.
#pragma once

#include "cpu/double_vector.h"
#include "cpu/kernels.h"
#include "cpu/load_store.h"
#include "cpu/vector.h"
#include "math/clip_grad.h"
#include "math/sum.h"

namespace gradkernels::cpu {
namespace {

// The largest magnitude in each lane. Magnitudes are compared as integers, which order nan above inf and inf
// above every number: a nan is kept without a test for it.
template <typename T>
struct LargestMagnitude {
  using V = Vec<T>;
  using Integer = typename IntegerOf<T>::type;
  typename V::Bits bits[V::kRegisters] = {};

  GK_INLINE void add(V x) {
    for (int i = 0; i < V::kRegisters; ++i) {
      const typename V::Bits magnitude = reinterpret_cast<typename V::Bits>(x.part[i]) & static_cast<Integer>(~(Integer(1) << kSignBit));
      bits[i] = magnitude > bits[i] ? magnitude : bits[i];
    }
  }
  GK_INLINE double value() const {
    Integer lane[V::kLanes];
    __builtin_memcpy(lane, bits, sizeof(lane));
    Integer largest = 0;
    for (int i = 0; i < V::kLanes; ++i) largest = lane[i] > largest ? lane[i] : largest;
    T value;
    __builtin_memcpy(&value, &largest, sizeof(value));
    return static_cast<double>(value);
  }

 private:
  static constexpr int kSignBit = 8 * sizeof(T) - 1;
};

// sum + |x|^p for p = 1 and p = 2; sum for p = inf.
template <Norm norm>
GK_INLINE Vec<double> accumulate(Vec<double> sum, Vec<double> x) {
  if constexpr (norm == Norm::kTwo) return fma(x, x, sum);
  if constexpr (norm == Norm::kOne) return sum + select(x < Vec<double>(0.0), -x, x);
  return sum;
}

template <Norm norm, typename scalar_t>
GK_INLINE PartialNorm partial_norm(int64_t count, const scalar_t* x, double factor) {
  using T = opmath_t<scalar_t>;
  using V = Vec<T>;
  using D = Vec<double>;
  constexpr int kParts = V::kLanes / D::kLanes;
  // Several independent sums hide the latency of an addition.
  constexpr int kSums = 4;
  constexpr int kStepElements = kSums * D::kLanes;
  // A lane adds up 64 squares; its sum is then added to the total, which keeps the rounding error.
  constexpr int64_t kBlockElements = 64 * kStepElements;
  const auto term = [factor](V value, int part) GK_INLINE_LAMBDA {
    const D wide = widen(value, part);
    // Only the squares of float64 elements can overflow or underflow float64.
    if constexpr (sizeof(T) == 8) return wide * D(factor);
    return wide;
  };

  math::Sum<D> total{D(0.0), D(0.0)};
  LargestMagnitude<T> largest;
  for (int64_t begin = 0; begin < count; begin += kBlockElements) {
    const int64_t end = count - begin < kBlockElements ? count : begin + kBlockElements;
    D sum[kSums] = {D(0.0), D(0.0), D(0.0), D(0.0)};
    int64_t i = begin;
    for (; i + kStepElements <= end; i += kStepElements) {
      for (int v = 0; v < kSums / kParts; ++v) {
        const V value = load(x + i + v * V::kLanes, AllLanes());
        largest.add(value);
        for (int part = 0; part < kParts; ++part) sum[v * kParts + part] = accumulate<norm>(sum[v * kParts + part], term(value, part));
      }
    }
    for_each_vector<T>(i, end, [&](int64_t j, auto lanes) GK_INLINE_LAMBDA {
      const V value = load(x + j, lanes);
      largest.add(value);
      for (int part = 0; part < kParts; ++part) sum[part] = accumulate<norm>(sum[part], term(value, part));
    });
    if constexpr (norm != Norm::kInfinity) math::add(total, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  PartialNorm result{sum_of_lanes(total.high) + sum_of_lanes(total.low), largest.value(), 0};
  // Rare: a gradient with a nan or an inf is read twice.
  if (!(result.max_abs - result.max_abs == 0.0)) {
    for_each_vector<T>(0, count, [&](int64_t i, auto lanes) GK_INLINE_LAMBDA {
      const V value = load(x + i, lanes);
      result.nonfinite += __builtin_popcount(to_bits<T>(!(value - value == V(T(0)))));
    });
  }
  return result;
}

PartialNorm partial_norm_kernel(DType dtype, Norm norm, int64_t count, const void* x, double factor) {
  return dispatch(dtype, [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(x);
    if (norm == Norm::kTwo) return partial_norm<Norm::kTwo>(count, data, factor);
    if (norm == Norm::kOne) return partial_norm<Norm::kOne>(count, data, factor);
    return partial_norm<Norm::kInfinity>(count, data, factor);
  });
}

// The product is computed in float64 and rounded once, because a coefficient may be too small for float32
// when the product is not. For 16-bit elements it is computed in float32 if the coefficient is a normal
// float32: the rounding to 16 bits hides that of float32.
void scale_kernel(DType dtype, int64_t count, void* x_data, double coefficient) {
  using D = Vec<double>;
  const double magnitude = coefficient < 0.0 ? -coefficient : coefficient;
  const bool fits_float = !(magnitude < 0x1p-126 || magnitude > 0x1p127) || magnitude == 0.0;
  dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    scalar_t* x = static_cast<scalar_t*>(x_data);
    if (sizeof(scalar_t) == 2 && fits_float) {
      using T = opmath_t<scalar_t>;
      const Vec<T> factor(static_cast<T>(coefficient));
      for_each_vector<T>(0, count, [&](int64_t i, auto lanes) GK_INLINE_LAMBDA { store(x + i, lanes, load(x + i, lanes) * factor); });
      return;
    }
    int64_t i = 0;
    for (; i + D::kLanes <= count; i += D::kLanes) store_double(x + i, load_double(x + i) * D(coefficient));
    for (; i < count; ++i) x[i] = static_cast<scalar_t>(static_cast<double>(x[i]) * coefficient);
  });
}

// A block is written only if one of its elements exceeds the limit.
void clamp_kernel(DType dtype, int64_t count, void* x_data, double limit) {
  constexpr int64_t kBlockElements = 1024;
  dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = opmath_t<scalar_t>;
    scalar_t* x = static_cast<scalar_t*>(x_data);
    for (int64_t begin = 0; begin < count; begin += kBlockElements) {
      const int64_t end = count - begin < kBlockElements ? count : begin + kBlockElements;
      LargestMagnitude<T> largest;
      for_each_vector<T>(begin, end, [&](int64_t i, auto lanes) GK_INLINE_LAMBDA { largest.add(load(x + i, lanes)); });
      if (largest.value() <= limit) continue;
      for_each_vector<T>(begin, end, [&](int64_t i, auto lanes) GK_INLINE_LAMBDA {
        store(x + i, lanes, math::clamp(load(x + i, lanes), Vec<T>(static_cast<T>(limit))));
      });
    }
  });
}

}  // namespace
}  // namespace gradkernels::cpu
