// The SIMD loops of batch_norm_act, over the lines of cpu/lines.h. The moments of a tile are taken in two passes, the mean first, while the
// tile lies in cache. Sums that may cancel, those of x - mean, of dz and of dz (x - mean), are float64. Compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/lines.h"
#include "cpu/simd.h"
#include "math/activation.h"
#include "math/batch_norm_act.h"
#include "math/sum.h"

namespace gradkernels::cpu {
namespace {

// ---- Statistics
// ----------------------------------------------------------------------------------------------------------------------------

// Sums of (x - about) and of its square over a tile of one channel.
struct DifferenceSums {
  double differences;
  double squares;
};

// Float64, with the rounding errors kept.
GK_INLINE DifferenceSums sum_differences(const double* x, const Lines& tile, double about) {
  using V = Vec<double>;
  LongRuns::Sums<double> differences(tile), squares(tile);
  for_each_position<double>(tile, [&](Position at, auto lanes) GK_INLINE_LAMBDA {
    const V difference = load(x + at.element, lanes, V(about)) - V(about);
    differences.add(0, Part<0>(), difference);
    squares.add_product(0, Part<0>(), difference, difference);
  });
  return {differences.of_channel(tile, 0), squares.of_channel(tile, 0)};
}

// Float32 and narrower: eight differences, and eight squares, meet in float32 before they enter a float64 sum.
template <typename scalar_t>
GK_INLINE DifferenceSums sum_differences(const scalar_t* x, const Lines& tile, float about) {
  using V = Vec<float>;
  constexpr int64_t kStep = 8 * V::kLanes;
  LongRuns::Sums<float> differences(tile), squares(tile);
  const auto take = [&](V difference, V square) GK_INLINE_LAMBDA {
    for_each_part<float>([&](auto part) GK_INLINE_LAMBDA {
      differences.add(0, part, widen(difference, part.kIndex));
      squares.add(0, part, widen(square, part.kIndex));
    });
  };
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    const scalar_t* run = x + tile.offset + row * tile.row_stride;
    int64_t i = tile.begin;
    for (; i + kStep <= tile.end; i += kStep) {
      V difference[4], square[4];
      for (int k = 0; k < 4; ++k) {
        const V a = load(run + i + k * V::kLanes) - V(about);
        const V b = load(run + i + (k + 4) * V::kLanes) - V(about);
        difference[k] = a + b;
        square[k] = fma(b, b, a * a);
      }
      take((difference[0] + difference[1]) + (difference[2] + difference[3]), (square[0] + square[1]) + (square[2] + square[3]));
    }
    for_each_vector<float>(i, tile.end, [&](int64_t j, auto lanes) GK_INLINE_LAMBDA {
      const V difference = load(run + j, lanes, V(about)) - V(about);
      take(difference, difference * difference);
    });
  }
  return {differences.of_channel(tile, 0), squares.of_channel(tile, 0)};
}

// About the mean of a tile: near enough for differences from it not to cancel.
template <typename scalar_t>
GK_INLINE opmath_t<scalar_t> approximate_mean(const scalar_t* x, const Lines& tile, double count) {
  using V = Vec<opmath_t<scalar_t>>;
  constexpr int64_t kStep = 4 * V::kLanes;
  V sum[4] = {V(0), V(0), V(0), V(0)};
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    const scalar_t* run = x + tile.offset + row * tile.row_stride;
    int64_t i = tile.begin;
    for (; i + kStep <= tile.end; i += kStep) {
      for (int k = 0; k < 4; ++k) sum[k] = sum[k] + load(run + i + k * V::kLanes);
    }
    for_each_vector<opmath_t<scalar_t>>(i, tile.end,
                                        [&](int64_t j, auto lanes) GK_INLINE_LAMBDA { sum[0] = sum[0] + load(run + j, lanes); });
  }
  return static_cast<opmath_t<scalar_t>>(sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) / count);
}

template <typename scalar_t>
math::Moments<double> long_run_moments(const scalar_t* x, const Lines& lines) {
  // 16 KiB of float32 or 32 of float64: the second pass finds them in the first-level cache.
  constexpr int64_t kTileElements = 4096;
  const int64_t width = lines.end - lines.begin < kTileElements ? lines.end - lines.begin : kTileElements;
  math::Moments<double> moments{0.0, 0.0, 0.0};
  for_each_tile(lines, kTileElements / width, width, [&](const Lines& tile) GK_INLINE_LAMBDA {
    const double count = static_cast<double>(tile.elements_per_channel());
    const auto about = approximate_mean(x, tile, count);
    const DifferenceSums sums = sum_differences(x, tile, about);
    moments = math::merge(moments, math::moments_about(static_cast<double>(about), count, sums.differences, sums.squares));
  });
  return moments;
}

// Each column by itself; the columns of a channel meet at the end.
template <typename scalar_t>
void short_run_moments(const scalar_t* x, const Lines& lines, math::Moments<double>* out) {
  using opmath = opmath_t<scalar_t>;
  using V = Vec<opmath>;
  using D = Vec<double>;
  Columns<double> means(lines), m2s(lines);
  double rows_before = 0.0;
  // Enough rows to make a merge cheap (and in float64, rare, since each one rounds), few enough to stay in the second-level cache.
  for_each_tile(lines, sizeof(opmath) == sizeof(double) ? 128 : 32, lines.end, [&](const Lines& tile) GK_INLINE_LAMBDA {
    const double rows = static_cast<double>(tile.row_end - tile.row_begin);
    Columns<opmath> about(tile);
    for_each_position<scalar_t>(tile, [&](Position at, auto lanes) GK_INLINE_LAMBDA {
      about.store(at.column, about.load(at.column) + load(x + at.element, lanes));
    });
    for (int64_t i = 0; i < lines.end; i += V::kLanes) about.store(i, about.load(i) / V(static_cast<opmath>(rows)));
    ShortRuns::Sums<opmath> differences(tile), squares(tile);
    for_each_position<scalar_t>(tile, [&](Position at, auto lanes) GK_INLINE_LAMBDA {
      const V difference = load(x + at.element, lanes, about.load(at.column)) - about.load(at.column);
      for_each_part<opmath>([&](auto part) GK_INLINE_LAMBDA {
        const D difference_part = widen(difference, part.kIndex);
        differences.add(at.column, part, difference_part);
        squares.add_product(at.column, part, difference_part, difference_part);
      });
    });
    for (int64_t i = 0; i < lines.end; i += D::kLanes) {
      const auto merged =
          math::merge(math::Moments<D>{D(rows_before), means.load(i), m2s.load(i)},
                      math::moments_about(load_double(about.value + i), D(rows), differences.of_columns(i), squares.of_columns(i)));
      means.store(i, merged.mean);
      m2s.store(i, merged.m2);
    }
    rows_before += rows;
  });
  for (int64_t c = 0; c < lines.channels(); ++c) {
    out[c] = {0.0, 0.0, 0.0};
    for (int64_t i = c * lines.inner; i < (c + 1) * lines.inner; ++i) {
      out[c] = math::merge(out[c], math::Moments<double>{rows_before, means.value[i], m2s.value[i]});
    }
  }
}

void batch_norm_moments_kernel(const BatchNormForward& p, Slab slab, math::Moments<double>* out) {
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* x = static_cast<const scalar_t*>(p.x);
    if (p.shape.inner >= kShortRunElements) {
      LongRuns::for_each_lines(p.shape, slab,
                               [&](const Lines& lines) { out[lines.channel_begin - slab.channel_begin] = long_run_moments(x, lines); });
    } else {
      ShortRuns::for_each_lines(p.shape, slab, [&](const Lines& lines) { short_run_moments(x, lines, out); });
    }
  });
}

// ---- Forward
// -------------------------------------------------------------------------------------------------------------------------------

GK_INLINE double channel_value(DType dtype, const void* values, int64_t channel, double otherwise) {
  if (values == nullptr) return otherwise;
  return dispatch(dtype, [&](auto zero) { return static_cast<double>(static_cast<const decltype(zero)*>(values)[channel]); });
}

// Problem is BatchNormForward or BatchNormBackward: both passes see the same normalisation.
template <typename opmath, typename Problem>
GK_INLINE math::Normalisation<opmath> channel_normalisation(const Problem& p, int64_t channel) {
  return math::normalisation<opmath>(p.mean[channel], p.invstd[channel], channel_value(p.parameter_dtype, p.weight, channel, 1.0),
                                     channel_value(p.parameter_dtype, p.bias, channel, 0.0));
}

// Calls function(functor): one for each activation where it pays, else one that chooses when it runs. What is compiled for every activation
// is most of a build.
template <typename scalar_t>
constexpr bool kCompiledForEach = kRegisterBytes > 16 && sizeof(scalar_t) == 4;

template <typename scalar_t, typename Function>
GK_INLINE void visit_activation(math::Activation act, const Function& function) {
  using V = Vec<opmath_t<scalar_t>>;
  if constexpr (kCompiledForEach<scalar_t>) {
    math::visit<V>(act, function);
  } else {
    function(math::AnyActivation<V>{act});
  }
}
template <typename scalar_t, typename Function>
GK_INLINE void visit_activation_of_two_slopes(math::Activation act, const Function& function) {
  using V = Vec<opmath_t<scalar_t>>;
  if constexpr (kCompiledForEach<scalar_t>) {
    math::visit_two_slopes<V>(act, function);
  } else {
    function(math::AnyTwoSlopes<V>{act});
  }
}

void batch_norm_normalise_kernel(const BatchNormForward& p, Slab slab) {
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    using opmath = opmath_t<scalar_t>;
    using V = Vec<opmath>;
    const scalar_t* x = static_cast<const scalar_t*>(p.x);
    const scalar_t* residual = static_cast<const scalar_t*>(p.residual);
    scalar_t* y = static_cast<scalar_t*>(p.y);
    visit_runs(p.shape, [&](auto runs) {
      using Runs = decltype(runs);
      const auto for_each_vector_of_slab = [&](const auto& function) GK_INLINE_LAMBDA {
        Runs::for_each_lines(p.shape, slab, [&](const Lines& lines) GK_INLINE_LAMBDA {
          const typename Runs::template Coefficients<math::Normalisation, opmath> coefficients(
              lines, [&](int64_t channel) GK_INLINE_LAMBDA { return channel_normalisation<opmath>(p, channel); });
          for_each_position<scalar_t>(lines, streamed(p.shape, y), [&](Position at, auto lanes) GK_INLINE_LAMBDA {
            function(coefficients.at(at.column)(load(x + at.element, lanes)), at, lanes);
          });
        });
      };
      if (p.mask != nullptr) {
        visit_activation_of_two_slopes<scalar_t>(p.act, [&](auto f) {
          for_each_vector_of_slab([&](V u, Position at, auto lanes) GK_INLINE_LAMBDA {
            u = u + load(residual + at.element, lanes);
            store_bits<opmath>(p.mask + at.mask_byte, lanes, f.passes(u));
            store(y + at.element, lanes, f.forward(u), at.past_caches);
          });
        });
      } else {
        visit_activation<scalar_t>(p.act, [&](auto f) {
          for_each_vector_of_slab([&](V u, Position at, auto lanes) GK_INLINE_LAMBDA {
            if (residual != nullptr) u = u + load(residual + at.element, lanes);
            store(y + at.element, lanes, f.forward(u), at.past_caches);
          });
        });
      }
    });
  });
}

// ---- Backward
// ------------------------------------------------------------------------------------------------------------------------------

// Calls function(dz), where dz(normalise, x, at, lanes) is the gradient at the output of the normalisation.
template <typename scalar_t, typename Function>
GK_INLINE void visit_gradient(const BatchNormBackward& p, const Function& function) {
  using opmath = opmath_t<scalar_t>;
  using V = Vec<opmath>;
  const scalar_t* grad_y = static_cast<const scalar_t*>(p.grad_y);
  const scalar_t* residual = static_cast<const scalar_t*>(p.residual);
  if (p.mask != nullptr) {
    const uint8_t* mask = p.mask;
    visit_activation_of_two_slopes<scalar_t>(p.act, [&](auto f) {
      function([=](const auto&, V, Position at, auto lanes) GK_INLINE_LAMBDA {
        return f.backward_from_mask(load(grad_y + at.element, lanes), load_bits<opmath>(mask + at.mask_byte, lanes));
      });
    });
  } else {
    visit_activation<scalar_t>(p.act, [&](auto f) {
      function([=](const auto& normalise, V x, Position at, auto lanes) GK_INLINE_LAMBDA {
        V u = normalise(x);
        if (residual != nullptr) u = u + load(residual + at.element, lanes);
        return f.backward(load(grad_y + at.element, lanes), u);
      });
    });
  }
}

void batch_norm_gradient_sums_kernel(const BatchNormBackward& p, Slab slab, math::GradientSums* out) {
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    using opmath = opmath_t<scalar_t>;
    const scalar_t* x_data = static_cast<const scalar_t*>(p.x);
    scalar_t* grad_residual = static_cast<scalar_t*>(p.grad_residual);
    visit_runs(p.shape, [&](auto runs) {
      using Runs = decltype(runs);
      visit_gradient<scalar_t>(p, [&](auto dz_of) {
        Runs::for_each_lines(p.shape, slab, [&](const Lines& lines) GK_INLINE_LAMBDA {
          const typename Runs::template Coefficients<math::Normalisation, opmath> coefficients(
              lines, [&](int64_t channel) GK_INLINE_LAMBDA { return channel_normalisation<opmath>(p, channel); });
          const typename Runs::Doubles mean(lines, p.mean);
          typename Runs::template Sums<opmath> dz_sum(lines), dz_x_sum(lines);
          for_each_position<scalar_t>(lines, [&](Position at, auto lanes) GK_INLINE_LAMBDA {
            const Vec<opmath> x = load(x_data + at.element, lanes);
            const Vec<opmath> dz = dz_of(coefficients.at(at.column), x, at, lanes);
            if (grad_residual != nullptr) store(grad_residual + at.element, lanes, dz);
            for_each_part<opmath>([&](auto part) GK_INLINE_LAMBDA {
              const Vec<double> dz_part = widen(dz, part.kIndex);
              dz_sum.add(at.column, part, dz_part);
              dz_x_sum.add_product(at.column, part, dz_part, widen(x, part.kIndex) - mean.at(at.column, part.kIndex));
            });
          });
          for (int64_t c = 0; c < lines.channels(); ++c) {
            out[lines.channel_begin + c - slab.channel_begin] = {dz_sum.of_channel(lines, c), dz_x_sum.of_channel(lines, c)};
          }
        });
      });
    });
  });
}

template <typename T>
struct GradientCoefficients {
  math::Normalisation<T> normalise;
  math::InputGradient<T> input;

  template <typename U, typename Function>
  GK_INLINE GradientCoefficients<U> map(const Function& function) const {
    return {normalise.template map<U>(function), input.template map<U>(function)};
  }
};

void batch_norm_gradient_input_kernel(const BatchNormBackward& p, Slab slab, const math::GradientSums* sums) {
  BatchNormBackward source = p;
  if (p.grad_residual != nullptr) {
    // dz is already there: the first pass has left it.
    source.grad_y = p.grad_residual;
    source.act.kind = math::ActivationKind::kIdentity;
    source.mask = nullptr;
    source.residual = nullptr;
  }
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    using opmath = opmath_t<scalar_t>;
    using V = Vec<opmath>;
    const scalar_t* x_data = static_cast<const scalar_t*>(p.x);
    scalar_t* grad_x = static_cast<scalar_t*>(p.grad_x);
    const double count = static_cast<double>(p.shape.rows * p.shape.inner);
    const bool training = p.training;
    visit_runs(p.shape, [&](auto runs) {
      using Runs = decltype(runs);
      visit_gradient<scalar_t>(source, [&](auto dz_of) {
        Runs::for_each_lines(p.shape, slab, [&](const Lines& lines) GK_INLINE_LAMBDA {
          const typename Runs::template Coefficients<GradientCoefficients, opmath> coefficients(
              lines, [&](int64_t channel) GK_INLINE_LAMBDA {
                return GradientCoefficients<opmath>{
                    channel_normalisation<opmath>(p, channel),
                    math::input_gradient<opmath>(p.mean[channel], p.invstd[channel],
                                                 channel_value(p.parameter_dtype, p.weight, channel, 1.0), count, sums[channel])};
              });
          for_each_position<scalar_t>(lines, streamed(p.shape, grad_x), [&](Position at, auto lanes) GK_INLINE_LAMBDA {
            const auto& c = coefficients.at(at.column);
            const V x = load(x_data + at.element, lanes);
            const V dz = dz_of(c.normalise, x, at, lanes);
            store(grad_x + at.element, lanes, training ? c.input.training(dz, x) : c.input.evaluation(dz), at.past_caches);
          });
        });
      });
    });
  });
}

}  // namespace
}  // namespace gradkernels::cpu
