// The SIMD loops of batch_norm_act, over the lines of cpu/lines.h. The moments of a tile are computed about
// the mean of a part of the tile, which is in the cache then. Sums whose terms may cancel are float64: the
// sums of x - mean, of dz and of dz (x - mean). Compiled once per instruction set.
#pragma once

#include "cpu/double_vector.h"
#include "cpu/functor.h"
#include "cpu/kernels.h"
#include "cpu/lines.h"
#include "cpu/load_store.h"
#include "cpu/mask_bits.h"
#include "cpu/vector.h"
#include "math/activation.h"
#include "math/batch_norm_act.h"
#include "math/sum.h"

namespace gradkernels::cpu {
namespace {

// ---- Statistics

// Adds a vector of differences x - about, and their squares.
template <typename opmath>
GK_INLINE void add_difference(Accumulators<opmath, 2>& sums, Vec<opmath> difference) {
  sums.template add<0>(difference);
  sums.template add_product<1>(difference, difference);
}

// The same for kTerms vectors of x, `stride` elements apart. Float32 terms are added up in float32 before
// they enter a float64 sum.
template <typename scalar_t>
GK_INLINE void add_differences(Accumulators<opmath_t<scalar_t>, 2>& sums, const scalar_t* x, int64_t stride,
                               Vec<opmath_t<scalar_t>> about) {
  using V = Vec<opmath_t<scalar_t>>;
  static_assert(kTerms == 8);
  if constexpr (sizeof(scalar_t) == sizeof(double)) {
    for (int k = 0; k < 8; ++k) add_difference(sums, load(x + k * stride) - about);
  } else {
    V difference[4], square[4];
    for (int k = 0; k < 4; ++k) {
      const V a = load(x + k * stride) - about;
      const V b = load(x + (k + 4) * stride) - about;
      difference[k] = a + b;
      square[k] = fma(b, b, a * a);
    }
    sums.template add<0>((difference[0] + difference[1]) + (difference[2] + difference[3]));
    sums.template add<1>((square[0] + square[1]) + (square[2] + square[3]));
  }
}

// Rounds `about` to the spacing of numbers of this magnitude. With more digits than the elements have, every
// x - about would be rounded in the same direction, and these errors would add up.
template <typename T>
GK_INLINE T on_grid(T about, T magnitude) {
  return (about + magnitude) - magnitude;
}

// The first quarter of a tile, or more. Differences from the sample's mean m are safe from cancellation,
// whatever the order of the elements: if the sample is the share f of the tile, the variance of the tile is
// at least f / (1 - f) times the square of the distance between m and the mean of the tile.
GK_INLINE Lines sample_of(const Lines& tile) {
  constexpr int64_t kShare = 4;
  Lines sample = tile;
  if (tile.row_end - tile.row_begin >= kShare) {
    sample.row_end = tile.row_begin + (tile.row_end - tile.row_begin + kShare - 1) / kShare;
  } else {
    sample.end = tile.begin + (tile.end - tile.begin + kShare - 1) / kShare;
  }
  return sample;
}

// Approximately the mean of the sample. It is a number that scalar_t can represent, because it also fills the
// unused lanes of a vector.
template <typename scalar_t>
GK_INLINE opmath_t<scalar_t> approximate_mean(const scalar_t* x, const Lines& sample) {
  using V = Vec<opmath_t<scalar_t>>;
  constexpr int64_t kStep = 4 * V::kLanes;
  // Each term is weighted: the sum of unweighted terms might overflow.
  const V weight(static_cast<opmath_t<scalar_t>>(1.0 / static_cast<double>(sample.elements_per_channel())));
  V sum[4] = {V(0), V(0), V(0), V(0)};
  for (int64_t row = sample.row_begin; row < sample.row_end; ++row) {
    const scalar_t* run = x + sample.offset + row * sample.row_stride;
    int64_t i = sample.begin;
    for (; i + kStep <= sample.end; i += kStep) {
      for (int k = 0; k < 4; ++k) sum[k] = fma(load(run + i + k * V::kLanes), weight, sum[k]);
    }
    for_each_vector<opmath_t<scalar_t>>(i, sample.end, [&](int64_t j, auto lanes) { sum[0] = fma(load(run + j, lanes), weight, sum[0]); });
  }
  const scalar_t* first = x + sample.offset + sample.row_begin * sample.row_stride + sample.begin;
  const int64_t width = sample.end - sample.begin;
  const V some = width < V::kLanes ? load(first, SomeLanes{static_cast<int>(width)}) : load(first);
  const auto mean = static_cast<opmath_t<scalar_t>>(sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])));
  const auto magnitude = static_cast<opmath_t<scalar_t>>(sum_of_lanes(negative_magnitude(some)));
  return static_cast<opmath_t<scalar_t>>(static_cast<scalar_t>(on_grid(mean, magnitude)));
}

template <typename scalar_t>
GK_FLATTEN math::Moments<double> long_run_moments(const scalar_t* x, const Lines& lines) {
  using V = Vec<opmath_t<scalar_t>>;
  // 16 KiB of float32 or 32 KiB of float64: the sample of the mean is still in the first-level cache.
  constexpr int64_t kTileElements = 4096;
  constexpr int64_t kStep = kTerms * V::kLanes;
  const RunAhead run_ahead = LongRuns::run_ahead<scalar_t>(lines);
  const int64_t width = lines.end - lines.begin < kTileElements ? lines.end - lines.begin : kTileElements;
  math::Moments<double> moments{};
  for_each_tile(lines, kTileElements / width, width, [&](const Lines& tile) GK_INLINE_LAMBDA {
    const double count = static_cast<double>(tile.elements_per_channel());
    const auto about = approximate_mean(x, sample_of(tile));
    Accumulators<opmath_t<scalar_t>, 2> accumulators;
    for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
      const scalar_t* run = x + tile.offset + row * tile.row_stride;
      const int64_t ahead = run_ahead.of_row(lines, row);
      int64_t i = tile.begin;
      for (; i + kStep <= tile.end; i += kStep) {
        if (ahead != 0) {
          for (int64_t k = 0; k < kStep; k += V::kLanes) prefetch(run + i + k + ahead);
        }
        add_differences(accumulators, run + i, V::kLanes, V(about));
      }
      for_each_vector<opmath_t<scalar_t>>(i, tile.end, [&](int64_t j, auto lanes) {
        if (ahead != 0) prefetch(run + j + ahead);
        add_difference(accumulators, load(run + j, lanes, V(about)) - V(about));
      });
    }
    const LongRuns::Sums<opmath_t<scalar_t>, 2> sums(accumulators);
    moments = math::merge(moments,
                          math::moments_about(static_cast<double>(about), count, sums.of_channel(tile, 0, 0), sums.of_channel(tile, 0, 1)));
  });
  return moments;
}

// The moments of each column of the lines.
struct ColumnMoments {
  Columns<double> mean, mean_low, m2, m2_low;

  explicit GK_INLINE ColumnMoments(const Lines& lines) : mean(lines), mean_low(lines), m2(lines), m2_low(lines) {}

  // Merges the moments of `rows` rows more into those of a vector of columns.
  GK_CALLED void merge(int64_t column, double rows_before, double rows, Vec<double> about, Vec<double> sum, Vec<double> sum_of_squares) {
    using D = Vec<double>;
    const auto merged =
        math::merge(math::Moments<D>{D(rows_before), mean.load(column), m2.load(column), mean_low.load(column), m2_low.load(column)},
                    math::moments_about(about, D(rows), sum, sum_of_squares));
    mean.store(column, merged.mean);
    mean_low.store(column, merged.mean_low);
    m2_low.store(column, merged.m2_low);
    m2.store(column, merged.m2);
  }
};

// The columns of a channel are merged at the end.
template <typename scalar_t>
GK_FLATTEN void short_run_moments(const scalar_t* x, const Lines& lines, math::Moments<double>* out) {
  using opmath = opmath_t<scalar_t>;
  using V = Vec<opmath>;
  using D = Vec<double>;
  ColumnMoments moments(lines);
  double rows_before = 0.0;
  // Many rows, so that merges cost little (and for float64, where every merge rounds, are few); few enough
  // for the second-level cache.
  for_each_tile(lines, sizeof(opmath) == sizeof(double) ? 128 : 64, lines.end, [&](const Lines& tile) GK_INLINE_LAMBDA {
    const double rows = static_cast<double>(tile.row_end - tile.row_begin);
    const V weight(static_cast<opmath>(1.0 / rows));
    Columns<opmath> about(tile);
    for_each_position(tile, Streamed<scalar_t>{nullptr, 1}, RunAhead{}, [&](Position at, auto lanes) {
      about.store(at.column, fma(load(x + at.element, lanes), weight, about.load(at.column)));
    });
    for_each_vector<opmath>(0, lines.end, [&](int64_t i, auto lanes) {
      const scalar_t* column = x + tile.offset + tile.row_begin * tile.row_stride + i;
      const scalar_t* const end = x + tile.offset + tile.row_end * tile.row_stride + i;
      V magnitude(0);
      for (const scalar_t* some = column; some < end && some < column + 4 * tile.row_stride; some += tile.row_stride) {
        magnitude = magnitude + negative_magnitude(load(some, lanes));
      }
      const V mean = on_grid(about.load(i), magnitude);
      Accumulators<opmath, 2> accumulators;
      if constexpr (decltype(lanes)::kAll) {
        for (; column + 8 * tile.row_stride <= end; column += 8 * tile.row_stride) {
          add_differences(accumulators, column, tile.row_stride, mean);
        }
      }
      for (; column < end; column += tile.row_stride) add_difference(accumulators, load(column, lanes, mean) - mean);
      for_each_part<opmath>([&](auto part) GK_INLINE_LAMBDA {
        const int64_t j = i + part.kIndex * D::kLanes;
        const auto sum_of = [&](int n) GK_INLINE_LAMBDA { return accumulators.sum(n, part).high + accumulators.sum(n, part).low; };
        moments.merge(j, rows_before, rows, widen(mean, part.kIndex), sum_of(0), sum_of(1));
      });
    });
    rows_before += rows;
  });
  for (int64_t c = 0; c < lines.channels(); ++c) {
    const int64_t first = c * lines.inner;
    out[c] = math::merge_of_equal_counts(rows_before, lines.inner, moments.mean.value + first, moments.mean_low.value + first,
                                         moments.m2.value + first, moments.m2_low.value + first);
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

GK_CALLED double channel_value(DType dtype, const void* values, int64_t channel, double otherwise) {
  if (values == nullptr) return otherwise;
  return dispatch(dtype, [&](auto zero) { return static_cast<double>(static_cast<const decltype(zero)*>(values)[channel]); });
}

// Arguments is BatchNormForward or BatchNormBackward, so that both passes have the same normalisation.
template <typename opmath, typename Arguments>
GK_INLINE math::Normalisation<opmath> channel_normalisation(const Arguments& p, int64_t channel) {
  return math::normalisation<opmath>(p.mean[channel], p.invstd[channel], channel_value(p.parameter_dtype, p.weight, channel, 1.0),
                                     channel_value(p.parameter_dtype, p.bias, channel, 0.0));
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
      const auto for_each_vector_of_slab = [&](const auto& function) {
        Runs::for_each_lines(p.shape, slab, [=, &p, &function](const Lines& lines) GK_INLINE_LAMBDA {
          const typename Runs::template Coefficients<math::Normalisation, opmath> coefficients(
              lines, [&](int64_t channel) GK_INLINE_LAMBDA { return channel_normalisation<opmath>(p, channel); });
          Runs::template for_each<scalar_t>(
              lines, streamed(p.shape, y, p.mask), [&](int64_t column) GK_INLINE_LAMBDA { return coefficients.at(column); },
              [&](const auto& normalise, Position at, auto lanes) { function(normalise(load(x + at.element, lanes)), at, lanes); });
        });
      };
      if (p.mask != nullptr) {
        visit_few_functors_of_two_slopes<scalar_t>(p.act, [&](auto f) GK_FLATTEN {
          for_each_vector_of_slab([=, mask = p.mask](V u, Position at, auto lanes) {
            u = u + load_first(residual, at, lanes);
            store_bits<opmath>(mask + at.mask_byte, lanes, f.passes(u));
            store(y + at.element, lanes, f.forward(u), at.past_caches);
          });
        });
      } else {
        visit_few_functors<scalar_t>(p.act, [&](auto f) GK_FLATTEN {
          for_each_vector_of_slab([=](V u, Position at, auto lanes) {
            if (residual != nullptr) u = u + load_first(residual, at, lanes);
            store(y + at.element, lanes, f.forward(u), at.past_caches);
          });
        });
      }
    });
  });
}

// ---- Backward

// Calls function(dz), where dz(normalise, x, at, lanes) is the gradient at the output of the normalisation.
// It is read from `copied`, or computed if that is null.
template <typename scalar_t, typename Function>
GK_INLINE void visit_gradient(const BatchNormBackward& p, const opmath_t<scalar_t>* copied, const Function& function) {
  using opmath = opmath_t<scalar_t>;
  using V = Vec<opmath>;
  if (copied != nullptr) {
    function([=](const auto&, V, Position at, auto lanes) GK_INLINE_LAMBDA { return load(copied + at.copied, lanes); });
    return;
  }
  const scalar_t* grad_y = static_cast<const scalar_t*>(p.grad_y);
  const scalar_t* residual = static_cast<const scalar_t*>(p.residual);
  if (p.mask != nullptr) {
    const uint8_t* mask = p.mask;
    visit_few_functors_of_two_slopes<scalar_t>(p.act, [&](auto f) GK_FLATTEN {
      function([=](const auto&, V, Position at, auto lanes) GK_INLINE_LAMBDA {
        return f.backward_from_mask(load_first(grad_y, at, lanes), load_bits<opmath>(mask + at.mask_byte, lanes));
      });
    });
  } else {
    visit_few_functors<scalar_t>(p.act, [&](auto f) GK_FLATTEN {
      function([=](const auto& normalise, V x, Position at, auto lanes) GK_INLINE_LAMBDA {
        V u = normalise(x);
        if (residual != nullptr) u = u + load_first(residual, at, lanes);
        return f.backward(load_first(grad_y, at, lanes), u);
      });
    });
  }
}

void batch_norm_gradient_sums_kernel(const BatchNormBackward& p, Slab slab, math::GradientSums* out, void* dz_copy) {
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    using opmath = opmath_t<scalar_t>;
    const scalar_t* x_data = static_cast<const scalar_t*>(p.x);
    scalar_t* grad_residual = static_cast<scalar_t*>(p.grad_residual);
    opmath* copy = static_cast<opmath*>(dz_copy);
    // The second pass finds dz of a whole channel in the cache. It does not read dz of 16 bits.
    const int64_t elements = (slab.row_end - slab.row_begin) * (slab.inner_end - slab.inner_begin);
    const bool is_read_next = sizeof(scalar_t) > 2 && elements == p.shape.rows * p.shape.inner;
    const auto past_caches = streamed<scalar_t>(p.shape, is_read_next ? nullptr : grad_residual, p.mask);
    visit_runs(p.shape, [&](auto runs) {
      using Runs = decltype(runs);
      visit_gradient<scalar_t>(p, nullptr, [&](auto dz_of) GK_FLATTEN {
        Runs::for_each_lines(p.shape, slab, [=, &p](const Lines& lines) GK_INLINE_LAMBDA {
          const typename Runs::template Coefficients<math::Normalisation, opmath> coefficients(
              lines, [&](int64_t channel) GK_INLINE_LAMBDA { return channel_normalisation<opmath>(p, channel); });
          typename Runs::template Sums<opmath, 2> sums(lines);
          sums.add(
              lines, past_caches, [&](int64_t column) GK_INLINE_LAMBDA { return coefficients.at(column); },
              [&](const auto& normalise, Position at, auto lanes, auto& terms) {
                const Vec<opmath> x = load_first(x_data, at, lanes);
                const Vec<opmath> dz = dz_of(normalise, x, at, lanes);
                if (grad_residual != nullptr) store(grad_residual + at.element, lanes, dz, at.past_caches);
                if (copy != nullptr) store(copy + at.copied, lanes, dz);
                terms.template add<0>(dz);
                terms.template add_product<1>(dz, x - normalise.mean_high);
              });
          for (int64_t c = 0; c < lines.channels(); ++c) {
            const int64_t channel = lines.channel_begin + c;
            const double mean_high = static_cast<double>(channel_normalisation<opmath>(p, channel).mean_high);
            out[channel - slab.channel_begin] =
                math::about_mean({sums.of_channel(lines, c, 0), sums.of_channel(lines, c, 1)}, math::mean_low(p.mean[channel], mean_high));
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

void batch_norm_gradient_input_kernel(const BatchNormBackward& p, Slab slab, const math::GradientSums* sums, const void* dz_copy) {
  BatchNormBackward source = p;
  if (p.grad_residual != nullptr && (size_of(p.dtype) > 2 || (dz_copy == nullptr && p.act.has_exponential()))) {
    // The first pass has written dz. dz of 16 bits is rounded: it is only read to avoid an exponential.
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
      visit_gradient<scalar_t>(source, static_cast<const opmath*>(dz_copy), [&](auto dz_of) GK_FLATTEN {
        Runs::for_each_lines(p.shape, slab, [=, &p, mask = source.mask](const Lines& lines) GK_INLINE_LAMBDA {
          const typename Runs::template Coefficients<GradientCoefficients, opmath> coefficients(
              lines, [&](int64_t channel) GK_INLINE_LAMBDA {
                return GradientCoefficients<opmath>{
                    channel_normalisation<opmath>(p, channel),
                    math::input_gradient<opmath>(p.mean[channel], p.invstd[channel],
                                                 channel_value(p.parameter_dtype, p.weight, channel, 1.0), count, sums[channel])};
              });
          Runs::template for_each<scalar_t>(
              lines, streamed(p.shape, grad_x, mask), [&](int64_t column) GK_INLINE_LAMBDA { return coefficients.at(column); },
              [&](const auto& c, Position at, auto lanes) {
                const V x = load_first(x_data, at, lanes);
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
