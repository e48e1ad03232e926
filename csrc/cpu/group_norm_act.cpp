// group_norm_act on the CPU, in the two passes of cpu/norm_passes.h. A set is `set_channels` neighbouring channels of one
// sample. The kernels are those of batch norm: they compute the results of each channel, which are merged here.
#include "ops/group_norm_act.h"

#include <vector>

#include "cpu/norm_passes.h"

namespace gradkernels::cpu {

void group_norm_act_forward(const BatchNormForward& p) {
  clear_end_of_mask(p);
  // If there is one row, a set lies in memory like the run of one channel.
  BatchNormForward sets = p;
  if (p.shape.rows == 1) {
    sets.shape.channels /= p.set_channels;
    sets.shape.inner *= p.set_channels;
    sets.set_channels = 1;
  }
  reduce_then_apply<math::Moments<double>>(
      Slabs(sets.shape, /*goes_twice=*/true, sets.set_channels), Slabs(p.shape, /*goes_twice=*/true, p.set_channels), /*copy_bytes=*/0,
      [&](int64_t sample, Slab slab, math::Moments<double>* out, void*) {
        kernels().batch_norm_moments(of_sample(sets, sample), slab, out);
      },
      [&](int64_t sample, int64_t begin, int64_t end, const math::Moments<double>* found) {
        const BatchNormForward here = of_sample(sets, sample);
        for (int64_t c = begin; c < end; c += here.set_channels) {
          const auto merged = here.set_channels == 1 ? found[c] : merged_parts(&found[c], here.set_channels, 1);
          const auto moments = moments_of_channels(here.dtype, here.x, here.shape, c, c + here.set_channels, merged);
          here.mean[c / here.set_channels] = moments.mean;
          here.invstd[c / here.set_channels] = math::inverse_std(moments.m2 / moments.count, here.eps);
        }
      },
      [&](int64_t sample, Slab slab, const math::Moments<double>*, const void*) {
        kernels().batch_norm_normalise(of_sample(p, sample), slab);
      });
}

void group_norm_act_elemt(const BatchNormForward& p) {
  clear_end_of_mask(p);
  const Slabs slabs(p.shape, /*goes_twice=*/true, p.set_channels);
  slabs.for_each_of_samples(
      0, p.shape.samples, [](int64_t) { return 0; },
      [&](int64_t sample, int64_t i, int) { kernels().batch_norm_normalise(of_sample(p, sample), slabs[i]); });
}

void group_norm_act_backward(const BatchNormBackward& p) {
  const int64_t channels = p.shape.channels, sets = channels / p.set_channels;
  // With sets of one channel, the kernel multiplies with the weight.
  const bool weighted = p.set_channels > 1 && p.weight != nullptr;
  std::vector<double> weight(weighted ? channels : 0);
  if (weighted) {
    dispatch(p.parameter_dtype, [&](auto zero) {
      const auto* const values = static_cast<const decltype(zero)*>(p.weight);
      for (int64_t c = 0; c < channels; ++c) weight[c] = static_cast<double>(values[c]);
    });
  }
  std::vector<math::GradientSums> of_sets(p.shape.samples * sets), of_channels(p.shape.samples * channels);
  reduce_then_apply_gradient(
      p,
      [&](int64_t sample, int64_t begin, int64_t end, const math::GradientSums* sums) {
        for (int64_t c = begin; c < end; ++c) {
          const double factor = weighted ? weight[c] : 1.0;
          math::GradientSums& of_set = of_sets[sample * sets + c / p.set_channels];
          of_set = math::merge(of_set, {factor * sums[c].dz, factor * sums[c].dz_x});
          of_channels[sample * channels + c] = sums[c];
        }
      },
      [&](int64_t sample, const math::GradientSums*) { return of_sets.data() + sample * sets; });
  if (p.grad_weight == nullptr && p.grad_bias == nullptr) return;
  dispatch(p.parameter_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    parallel_for(channels, std::max<int64_t>(1, kGrainElements / p.shape.samples), [&](int64_t c) {
      double grad_weight = 0.0, grad_bias = 0.0;
      for (int64_t sample = 0; sample < p.shape.samples; ++sample) {
        const math::GradientSums& sums = of_channels[sample * channels + c];
        grad_weight += sums.dz_x * p.invstd[sample * sets + c / p.set_channels];
        grad_bias += sums.dz;
      }
      if (p.grad_weight != nullptr) static_cast<scalar_t*>(p.grad_weight)[c] = static_cast<scalar_t>(grad_weight);
      if (p.grad_bias != nullptr) static_cast<scalar_t*>(p.grad_bias)[c] = static_cast<scalar_t>(grad_bias);
    });
  });
}

}  // namespace gradkernels::cpu
