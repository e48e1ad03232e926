// The SIMD loops of the activations: over one contiguous run of elements, or by channel if each channel has a
// learnt parameter. Compiled once per instruction set.
#pragma once

#include "cpu/functor.h"
#include "cpu/kernels.h"
#include "cpu/lines.h"
#include "cpu/load_store.h"
#include "cpu/mask_bits.h"
#include "cpu/uniform_numbers.h"
#include "cpu/vector.h"
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
      visit_functor_with_parameter<scalar_t>(act, [&](auto f) {
        for_each_vector<opmath>(0, count,
                                [&](int64_t i, auto lanes) GK_INLINE_LAMBDA { store(y + i, lanes, f.forward(load(x + i, lanes))); });
      });
    } else {
      visit_functor_of_two_slopes<V>(act, [&](auto f) {
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
      visit_functor_of_two_slopes<V>(act, [&](auto f) {
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
      visit_functor_with_parameter<scalar_t>(act, [&](auto f) {
        for_each_vector<opmath>(0, count, [&](int64_t i, auto lanes) GK_INLINE_LAMBDA {
          store(grad_x + i, lanes, f.backward(load(grad_y + i, lanes), load(x + i, lanes)));
        });
      });
    }
  });
}

// A channel's parameter, in the form that Coefficients (cpu/lines.h) need.
template <typename T>
struct Parameter {
  T value;

  template <typename U, typename Function>
  GK_INLINE Parameter<U> map(const Function& function) const {
    return {function(value)};
  }
};

// Calls function(scalar_t(), Runs(), functor_of): the element type, the kind of lines (cpu/lines.h), and a
// function that makes the functor from a parameter.
template <typename Arguments, typename Function>
GK_INLINE void visit_parametric_arguments(const Arguments& p, const Function& function) {
  dispatch(p.dtype, [&](auto zero) {
    visit_runs(p.shape, [&](auto runs) {
      visit_functor_of_parameter<decltype(zero)>(p.act, [&](auto functor_of) { function(zero, runs, functor_of); });
    });
  });
}

template <typename scalar_t>
GK_INLINE auto parameter_of_channel(const void* parameter) {
  return [=](int64_t channel) GK_INLINE_LAMBDA {
    return Parameter<opmath_t<scalar_t>>{static_cast<opmath_t<scalar_t>>(static_cast<const scalar_t*>(parameter)[channel])};
  };
}

void parametric_forward_kernel(const ParametricForward& p, Slab slab) {
  visit_parametric_arguments(p, [&](auto zero, auto runs, auto functor_of) GK_FLATTEN {
    using scalar_t = decltype(zero);
    using Runs = decltype(runs);
    const scalar_t* x = static_cast<const scalar_t*>(p.x);
    scalar_t* y = static_cast<scalar_t*>(p.y);
    Runs::template for_each_lines<opmath_t<scalar_t>>(p.shape, slab, [=, &p](const Lines& lines) GK_INLINE_LAMBDA {
      const typename Runs::template Coefficients<Parameter, opmath_t<scalar_t>> parameters(lines,
                                                                                           parameter_of_channel<scalar_t>(p.parameter));
      Runs::template for_each<scalar_t>(
          lines, streamed(p.shape, y, nullptr), [&](int64_t column) GK_INLINE_LAMBDA { return functor_of(parameters.at(column).value); },
          [&](const auto& f, Position at, auto lanes) { store_first(y, at, lanes, f.forward(load(x + at.element, lanes))); });
    });
  });
}

void parametric_backward_kernel(const ParametricBackward& p, Slab slab, double* out) {
  visit_parametric_arguments(p, [&](auto zero, auto runs, auto functor_of) GK_FLATTEN {
    using scalar_t = decltype(zero);
    using opmath = opmath_t<scalar_t>;
    using Runs = decltype(runs);
    using V = Vec<opmath>;
    const scalar_t* grad_y = static_cast<const scalar_t*>(p.grad_y);
    const scalar_t* x = static_cast<const scalar_t*>(p.x);
    scalar_t* grad_x = static_cast<scalar_t*>(p.grad_x);
    Runs::template for_each_lines<opmath_t<scalar_t>>(p.shape, slab, [=, &p](const Lines& lines) GK_INLINE_LAMBDA {
      const typename Runs::template Coefficients<Parameter, opmath> parameters(lines, parameter_of_channel<scalar_t>(p.parameter));
      typename Runs::template Sums<opmath, 1> sums(lines);
      sums.add(
          lines, streamed(p.shape, grad_x, nullptr),
          [&](int64_t column) GK_INLINE_LAMBDA { return functor_of(parameters.at(column).value); },
          [&](const auto& f, Position at, auto lanes, auto& terms) {
            V grad_parameter;
            // Lanes after the end have a grad_y of 0. Their x is 1, so that the gradient is 0 even if the
            // parameter is inf.
            const V gradient = f.backward(load(grad_y + at.element, lanes), load(x + at.element, lanes, V(1)), grad_parameter);
            if (grad_x != nullptr) store_first(grad_x, at, lanes, gradient);
            terms.template add<0>(grad_parameter);
          });
      for (int64_t c = 0; c < lines.channels(); ++c) out[lines.channel_begin + c - slab.channel_begin] = sums.of_channel(lines, c, 0);
    });
  });
}

// Calls function(i, lanes, slopes) for each vector of [0, count), with the slopes of the elements from
// first + i on. `first` must be a multiple of 4, the size of a block of random numbers.
template <typename opmath, typename Function>
GK_INLINE void for_each_vector_with_slopes(const math::RandomSlopes& slopes, int64_t first, int64_t count, const Function& function) {
  constexpr int64_t kDrawn = UniformNumbers::kCount;
  for (int64_t begin = 0; begin < count; begin += kDrawn) {
    const UniformNumbers uniform(slopes.seed, static_cast<uint64_t>((first + begin) / 4));
    for_each_vector<opmath>(begin, count < begin + kDrawn ? count : begin + kDrawn, [&](int64_t i, auto lanes) GK_INLINE_LAMBDA {
      function(i, lanes, slopes.slope_of(uniform.at<opmath>(i - begin)));
    });
  }
}

void rrelu_forward_kernel(DType dtype, math::RandomSlopes slopes, int64_t first, int64_t count, const void* x_data, void* y_data,
                          uint8_t* mask) {
  dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    using opmath = opmath_t<scalar_t>;
    const scalar_t* x = static_cast<const scalar_t*>(x_data);
    scalar_t* y = static_cast<scalar_t*>(y_data);
    for_each_vector_with_slopes<opmath>(slopes, first, count, [&](int64_t i, auto lanes, Vec<opmath> slope) GK_INLINE_LAMBDA {
      const math::Rrelu<Vec<opmath>> f{{slope}};
      const Vec<opmath> value = load(x + i, lanes);
      store_bits<opmath>(mask + i / 8, lanes, f.passes(value));
      store(y + i, lanes, f.forward(value));
    });
  });
}

void rrelu_backward_kernel(DType dtype, math::RandomSlopes slopes, int64_t first, int64_t count, const void* grad_y_data,
                           const uint8_t* mask, void* grad_x_data) {
  dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    using opmath = opmath_t<scalar_t>;
    const scalar_t* grad_y = static_cast<const scalar_t*>(grad_y_data);
    scalar_t* grad_x = static_cast<scalar_t*>(grad_x_data);
    for_each_vector_with_slopes<opmath>(slopes, first, count, [&](int64_t i, auto lanes, Vec<opmath> slope) GK_INLINE_LAMBDA {
      const math::Rrelu<Vec<opmath>> f{{slope}};
      store(grad_x + i, lanes, f.backward_from_mask(load(grad_y + i, lanes), load_bits<opmath>(mask + i / 8, lanes)));
    });
  });
}

}  // namespace
}  // namespace gradkernels::cpu
