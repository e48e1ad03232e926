// The SIMD loops of the activations, over one contiguous run of elements. Compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "math/activation.h"

namespace gradkernels::cpu {
namespace {

void activation_forward_kernel(DType dtype, math::Activation act, int64_t count, const void* x_data, void* y_data, uint8_t* mask) {
  dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    using opmath = opmath_t<scalar_t>;
    using V = Vec<opmath>;
    const scalar_t* x = static_cast<const scalar_t*>(x_data);
    scalar_t* y = static_cast<scalar_t*>(y_data);
    if (mask == nullptr) {
      math::visit<V>(act, [&](auto f) {
        for_each_vector<opmath>(0, count,
                                [&](int64_t i, auto lanes) GK_INLINE_LAMBDA { store(y + i, lanes, f.forward(load(x + i, lanes))); });
      });
    } else {
      math::visit_two_slopes<V>(act, [&](auto f) {
        for_each_vector<opmath>(0, count, [&](int64_t i, auto lanes) GK_INLINE_LAMBDA {
          const V value = load(x + i, lanes);
          store_bits<opmath>(mask + i / 8, lanes, f.passes(value));
          store(y + i, lanes, f.forward(value));
        });
      });
    }
  });
}

void activation_backward_kernel(DType dtype, math::Activation act, Saved kind, int64_t count, const void* grad_y_data,
                                const void* saved_data, void* grad_x_data) {
  dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    using opmath = opmath_t<scalar_t>;
    using V = Vec<opmath>;
    const scalar_t* grad_y = static_cast<const scalar_t*>(grad_y_data);
    scalar_t* grad_x = static_cast<scalar_t*>(grad_x_data);
    if (kind == Saved::kMask) {
      const uint8_t* mask = static_cast<const uint8_t*>(saved_data);
      math::visit_two_slopes<V>(act, [&](auto f) {
        for_each_vector<opmath>(0, count, [&](int64_t i, auto lanes) GK_INLINE_LAMBDA {
          store(grad_x + i, lanes, f.backward_from_mask(load(grad_y + i, lanes), load_bits<opmath>(mask + i / 8, lanes)));
        });
      });
    } else if (kind == Saved::kOutput) {
      const math::Elu<V> f{V(static_cast<opmath>(act.parameter))};
      const scalar_t* y = static_cast<const scalar_t*>(saved_data);
      for_each_vector<opmath>(0, count, [&](int64_t i, auto lanes) GK_INLINE_LAMBDA {
        store(grad_x + i, lanes, f.backward_from_output(load(grad_y + i, lanes), load(y + i, lanes)));
      });
    } else {
      const scalar_t* x = static_cast<const scalar_t*>(saved_data);
      math::visit<V>(act, [&](auto f) {
        for_each_vector<opmath>(0, count, [&](int64_t i, auto lanes) GK_INLINE_LAMBDA {
          store(grad_x + i, lanes, f.backward(load(grad_y + i, lanes), load(x + i, lanes)));
        });
      });
    }
  });
}

}  // namespace
}  // namespace gradkernels::cpu
