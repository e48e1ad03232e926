// The SIMD loops of batch_norm_act and group_norm_act, over the lines of cpu/lines.h. The moments of a tile are computed about
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
constexpr int64_t kSampleShare = 4;
GK_INLINE int64_t sample_end(int64_t begin, int64_t end) { return begin + (end - begin + kSampleShare - 1) / kSampleShare; }
GK_INLINE Lines sample_of(const Lines& tile) {
  Lines sample = tile;
  if (tile.row_end - tile.row_begin >= kSampleShare) {
    sample.row_end = sample_end(tile.row_begin, tile.row_end);
  } else {
    sample.end = sample_end(tile.begin, tile.end);
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

// The moments of each channel of the lines.
struct ChannelMoments {
  double count = 0.0;
  Columns<double> mean, mean_low, m2, m2_low;

  explicit GK_INLINE ChannelMoments(const Lines& lines) : mean(lines), mean_low(lines), m2(lines), m2_low(lines) {}

  // Merges `added` elements more into the moments of each of the first `channels` channels. `sums` are about `about`.
  GK_CALLED void merge(int64_t channels, double added, const Columns<double>& about, const Columns<double> (&sums)[2]) {
    using D = Vec<double>;
    for (int64_t c = 0; c < channels; c += D::kLanes) {
      const auto merged = math::merge(math::Moments<D>{D(count), mean.load(c), m2.load(c), mean_low.load(c), m2_low.load(c)},
                                      math::moments_about(about.load(c), D(added), sums[0].load(c), sums[1].load(c)));
      mean.store(c, merged.mean);
      mean_low.store(c, merged.mean_low);
      m2_low.store(c, merged.m2_low);
      m2.store(c, merged.m2);
    }
    count += added;
  }
};

template <typename scalar_t>
GK_FLATTEN void short_run_moments(const scalar_t* x, const Lines& lines, math::Moments<double>* out) {
  using opmath = opmath_t<scalar_t>;
  using V = Vec<opmath>;
  // Many rows, so that merges cost little; few enough that the sample stays in the second-level cache.
  constexpr int64_t kTileRows = 256;
  const int64_t channels = lines.channels();
  const int64_t whole = lines.whole_end();
  ChannelMoments moments(lines);
  Columns<double> about_of_channel(lines), sums_of_channel[2];
  for (Columns<double>& sum : sums_of_channel) sum.clear(lines);
  Lines tile = lines;
  for (; tile.row_begin < lines.row_end; tile.row_begin = tile.row_end) {
    if (tile.row_begin < whole) {
      tile.row_end = tile.row_begin + kTileRows < whole ? tile.row_begin + kTileRows : whole;
      tile.last_end = tile.end;
    } else {
      tile.row_end = lines.row_end;
      tile.end = tile.last_end = lines.last_end;
    }
    Lines sample = tile;
    sample.row_end = sample_end(tile.row_begin, tile.row_end);
    const V weight(static_cast<opmath>(1.0 / static_cast<double>(sample.elements_per_channel())));
    Columns<opmath> about(sample);
    for_each_position(sample, Streamed<scalar_t>{nullptr, 1}, RunAhead{}, [&](Position at, auto lanes) {
      about.store(at.column, fma(load(x + at.element, lanes), weight, about.load(at.column)));
    });
    for (int64_t c = 0; c < channels; ++c) {
      const scalar_t* first = x + sample.offset + c * lines.inner;
      opmath mean(0), magnitude(0);
      ShortRuns::for_each_column_of(tile, c, [&](int64_t i) { mean += about.value[i]; });
      for (int64_t row = sample.row_begin; row < sample.row_end && row < sample.row_begin + 4; ++row) {
        magnitude = magnitude + math::negative_magnitude(static_cast<opmath>(first[row * sample.row_stride]));
      }
      mean = static_cast<opmath>(static_cast<scalar_t>(on_grid(mean, magnitude)));
      ShortRuns::for_each_column_of(tile, c, [&](int64_t i) { about.value[i] = mean; });
      about_of_channel.value[c] = static_cast<double>(mean);
    }
    ShortRuns::Sums<opmath, 2> sums(tile);
    for (int64_t row = tile.row_begin; row < tile.row_end; row += kTerms) {
      const int64_t rows = row + kTerms < tile.row_end ? kTerms : tile.row_end - row;
      const scalar_t* line = x + tile.offset + row * tile.row_stride;
      for_each_vector<opmath>(0, tile.end, [&](int64_t column, auto lanes) {
        const V center = about.load(column);
        Accumulators<opmath, 2> added;
        if (decltype(lanes)::kAll && rows == kTerms) {
          add_differences(added, line + column, tile.row_stride, center);
        } else {
          for (int64_t i = 0; i < rows; ++i) add_difference(added, load(line + i * tile.row_stride + column, lanes, center) - center);
        }
        sums.add(column, added);
      });
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int n = 0; n < 2; ++n) sums_of_channel[n].value[c] = sums.of_channel(tile, c, n);
    }
    moments.merge(channels, static_cast<double>(tile.elements_per_channel()), about_of_channel, sums_of_channel);
  }
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = {moments.count, moments.mean.value[c], moments.m2.value[c], moments.mean_low.value[c], moments.m2_low.value[c]};
  }
}

void batch_norm_moments_kernel(const BatchNormForward& p, Slab slab, math::Moments<double>* out) {
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* x = static_cast<const scalar_t*>(p.x);
    if (has_long_runs(p.shape)) {
      LongRuns::for_each_lines<opmath_t<scalar_t>>(
          p.shape, slab, [&](const Lines& lines) { out[lines.channel_begin - slab.channel_begin] = long_run_moments(x, lines); });
    } else {
      ShortRuns::for_each_lines<opmath_t<scalar_t>>(p.shape, slab, [&](const Lines& lines) { short_run_moments(x, lines, out); });
    }
  });
}

// ---- Forward

GK_CALLED double channel_value(DType dtype, const void* values, int64_t channel, double otherwise) {
  if (values == nullptr) return otherwise;
  return dispatch(dtype, [&](auto zero) { return static_cast<double>(static_cast<const decltype(zero)*>(values)[channel]); });
}

// The set of channels whose statistics a channel has. A division takes as long as the rest of a channel's coefficients on
// older processors.
template <typename Arguments>
GK_INLINE int64_t set_of(const Arguments& p, int64_t channel) {
  return p.set_channels == 1 ? channel : channel / p.set_channels;
}

// Arguments is BatchNormForward or BatchNormBackward, so that both passes have the same normalisation.
template <typename opmath, typename Arguments>
GK_INLINE math::Normalisation<opmath> channel_normalisation(const Arguments& p, int64_t channel) {
  const int64_t set = set_of(p, channel);
  return math::normalisation<opmath>(p.mean[set], p.invstd[set], channel_value(p.parameter_dtype, p.weight, channel, 1.0),
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
        Runs::template for_each_lines<opmath>(p.shape, slab, [=, &p, &function](const Lines& lines) GK_INLINE_LAMBDA {
          const typename Runs::template Coefficients<math::Normalisation, opmath> coefficients(
              lines, [&](int64_t channel) GK_INLINE_LAMBDA { return channel_normalisation<opmath>(p, channel); });
          Runs::template for_each<scalar_t>(
              lines, streamed(p.shape, y, p.mask), [&](int64_t column) GK_INLINE_LAMBDA { return coefficients.at(column); },
              [&](const auto& normalise, Position at, auto lanes) { function(normalise(load(x + at.element, lanes)), at, lanes); });
        });
      };
      if (p.mask != nullptr) {
        FewActivations::visit_two_slopes<scalar_t>(p.act, [&](auto f) GK_FLATTEN {
          for_each_vector_of_slab([=, mask = p.mask](V u, Position at, auto lanes) {
            u = u + load_first(residual, at, lanes);
            store_bits<opmath>(mask + at.mask_byte, lanes, f.passes(u));
            store_first(y, at, lanes, f.forward(u));
          });
        });
      } else {
        FewActivations::visit<scalar_t>(p.act, [&](auto f) GK_FLATTEN {
          for_each_vector_of_slab([=](V u, Position at, auto lanes) {
            if (residual != nullptr) u = u + load_first(residual, at, lanes);
            store_first(y, at, lanes, f.forward(u));
          });
        });
      }
    });
  });
}

// ---- Backward

// Calls function(dz), where dz(normalise, x, at, lanes) is the gradient at the output of the normalisation.
// It is read from `copied`, or computed if that is null.
template <typename Activations, typename scalar_t, typename Function>
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
    Activations::template visit_two_slopes<scalar_t>(p.act, [&](auto f) GK_FLATTEN {
      function([=](const auto&, V, Position at, auto lanes) GK_INLINE_LAMBDA {
        return f.backward_from_mask(load_first(grad_y, at, lanes), load_bits<opmath>(mask + at.mask_byte, lanes));
      });
    });
  } else {
    Activations::template visit<scalar_t>(p.act, [&](auto f) GK_FLATTEN {
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
      visit_gradient<FewActivations, scalar_t>(p, nullptr, [&](auto dz_of) GK_FLATTEN {
        Runs::template for_each_lines<opmath>(p.shape, slab, [=, &p](const Lines& lines) GK_INLINE_LAMBDA {
          const typename Runs::template Coefficients<math::Normalisation, opmath> coefficients(
              lines, [&](int64_t channel) GK_INLINE_LAMBDA { return channel_normalisation<opmath>(p, channel); });
          typename Runs::template Sums<opmath, 2> sums(lines);
          sums.add(
              lines, past_caches, [&](int64_t column) GK_INLINE_LAMBDA { return coefficients.at(column); },
              [&](const auto& normalise, Position at, auto lanes, auto& terms) {
                const Vec<opmath> x = load_first(x_data, at, lanes);
                const Vec<opmath> dz = dz_of(normalise, x, at, lanes);
                if (grad_residual != nullptr) store_first(grad_residual, at, lanes, dz);
                if (copy != nullptr) store(copy + at.copied, lanes, dz);
                // The other lanes are columns too if rows are folded, and their dz is nan if the normalised 0 is inf.
                const Vec<opmath> term = used_lanes(lanes, dz);
                terms.template add<0>(term);
                terms.template add_product<1>(term, used_lanes(lanes, x - normalise.mean_high));
              });
          for (int64_t c = 0; c < lines.channels(); ++c) {
            const int64_t channel = lines.channel_begin + c;
            const double mean_high = static_cast<double>(channel_normalisation<opmath>(p, channel).mean_high);
            out[channel - slab.channel_begin] = math::about_mean({sums.of_channel(lines, c, 0), sums.of_channel(lines, c, 1)},
                                                                 math::mean_low(p.mean[set_of(p, channel)], mean_high));
          }
        });
      });
    });
  });
}

// A channel's normalisation and the InputGradient that shares its mean and its scale.
template <typename T>
struct GradientCoefficients {
  math::Normalisation<T> normalise;
  T dz_mean_high;
  T slope;
  T offset;

  static GK_INLINE GradientCoefficients of(const BatchNormBackward& p, int64_t channel, double count, const math::GradientSums* sums) {
    const auto normalise = channel_normalisation<T>(p, channel);
    const auto input = math::input_gradient<T>(p.mean[channel], normalise.mean_high, p.invstd[channel],
                                               channel_value(p.parameter_dtype, p.weight, channel, 1.0), count, sums[channel]);
    return {normalise, input.dz_mean_high, input.slope, input.offset};
  }
  GK_INLINE T grad_x(bool training, T dz, T x) const {
    const math::InputGradient<T> input{normalise.mean_high, dz_mean_high, normalise.scale, slope, offset};
    return training ? input.training(dz, x) : input.evaluation(dz);
  }
  template <typename U, typename Function>
  GK_INLINE GradientCoefficients<U> map(const Function& function) const {
    return {normalise.template map<U>(function), function(dz_mean_high), function(slope), function(offset)};
  }
};

// The same for a channel in a set of several.
template <typename T>
struct SetGradientCoefficients {
  math::Normalisation<T> normalise;
  T dz_mean_high;
  T scale;
  T slope;
  T offset;
  T weight;

  static GK_INLINE SetGradientCoefficients of(const BatchNormBackward& p, int64_t channel, double count, const math::GradientSums* sums) {
    const int64_t set = channel / p.set_channels;
    const auto normalise = channel_normalisation<T>(p, channel);
    const auto input = math::input_gradient<T>(p.mean[set], normalise.mean_high, p.invstd[set], 1.0, count, sums[set]);
    const double weight = channel_value(p.parameter_dtype, p.weight, channel, 1.0);
    return {normalise, input.dz_mean_high, input.scale, input.slope, input.offset, static_cast<T>(weight)};
  }
  GK_INLINE T grad_x(bool, T dz, T x) const {
    return math::InputGradient<T>{normalise.mean_high, dz_mean_high, scale, slope, offset}.in_set(weight, dz, x);
  }
  template <typename U, typename Function>
  GK_INLINE SetGradientCoefficients<U> map(const Function& function) const {
    return {
        normalise.template map<U>(function), function(dz_mean_high), function(scale), function(slope), function(offset), function(weight)};
  }
};

template <template <typename> class C, typename Activations>
void gradient_input(const BatchNormBackward& p, const BatchNormBackward& source, Slab slab, const math::GradientSums* sums,
                    const void* dz_copy) {
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    using opmath = opmath_t<scalar_t>;
    using V = Vec<opmath>;
    const scalar_t* x_data = static_cast<const scalar_t*>(p.x);
    scalar_t* grad_x = static_cast<scalar_t*>(p.grad_x);
    const double count = static_cast<double>(p.shape.rows * p.shape.inner * p.set_channels);
    const bool training = p.training;
    visit_runs(p.shape, [&](auto runs) {
      using Runs = decltype(runs);
      visit_gradient<Activations, scalar_t>(source, static_cast<const opmath*>(dz_copy), [&](auto dz_of) GK_FLATTEN {
        Runs::template for_each_lines<opmath>(p.shape, slab, [=, &p, mask = source.mask](const Lines& lines) GK_INLINE_LAMBDA {
          const typename Runs::template Coefficients<C, opmath> coefficients(
              lines, [&](int64_t channel) GK_INLINE_LAMBDA { return C<opmath>::of(p, channel, count, sums); });
          Runs::template for_each<scalar_t>(
              lines, streamed(p.shape, grad_x, mask), [&](int64_t column) GK_INLINE_LAMBDA { return coefficients.at(column); },
              [&](const auto& c, Position at, auto lanes) {
                const V x = load_first(x_data, at, lanes);
                store_first(grad_x, at, lanes, c.grad_x(training, dz_of(c.normalise, x, at, lanes), x));
              });
        });
      });
    });
  });
}

void batch_norm_gradient_input_kernel(const BatchNormBackward& p, Slab slab, const math::GradientSums* sums, const void* dz_copy) {
  BatchNormBackward source = p;
  if (p.grad_residual != nullptr && (size_of(p.dtype) > 2 || (dz_copy == nullptr && p.act.has_exponential()))) {
    // The first pass has written dz. dz of 16 bits is rounded: it is only read to avoid an exponential.
    source.grad_y = p.grad_residual;
    source.act.kind = math::ActivationKind::kIdentity;
    source.mask = nullptr;
    source.residual = nullptr;
  }
  if (p.set_channels == 1) {
    gradient_input<GradientCoefficients, FewActivations>(p, source, slab, sums, dz_copy);
  } else {
    gradient_input<SetGradientCoefficients, ActivationsWithoutExponential>(p, source, slab, sums, dz_copy);
  }
}

}  // namespace
}  // namespace gradkernels::cpu
