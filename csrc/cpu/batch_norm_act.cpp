// batch_norm_act on the CPU, in the two passes of cpu/norm_passes.h. A set is a channel of the whole batch.
#include "ops/batch_norm_act.h"

#include <vector>

#include "cpu/norm_passes.h"

namespace gradkernels::cpu {
namespace {

void use_running_statistics(const BatchNormForward& p) {
  dispatch(p.parameter_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    for (int64_t c = 0; c < p.shape.channels; ++c) {
      p.mean[c] = static_cast<double>(static_cast<const scalar_t*>(p.running_mean)[c]);
      p.invstd[c] = math::inverse_std(static_cast<double>(static_cast<const scalar_t*>(p.running_var)[c]), p.eps);
    }
  });
}

void finish_channel(const BatchNormForward& p, int64_t channel, const math::Moments<double>& moments) {
  p.mean[channel] = moments.mean;
  p.invstd[channel] = math::inverse_std_of_batch(moments.m2 / moments.count, p.eps);
  const double momentum = p.batches == nullptr ? p.momentum : math::cumulative_momentum(static_cast<double>(*p.batches));
  dispatch(p.parameter_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto update = [&](void* running, double observed) {
      if (running == nullptr) return;
      scalar_t& value = static_cast<scalar_t*>(running)[channel];
      value = static_cast<scalar_t>(math::update_running(static_cast<double>(value), observed, momentum));
    };
    update(p.running_mean, moments.mean);
    update(p.running_var, moments.m2 / (moments.count - 1.0));
  });
}

void finish_channel(const BatchNormBackward& p, int64_t channel, const math::GradientSums& sums) {
  dispatch(p.parameter_dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    if (p.grad_weight != nullptr) static_cast<scalar_t*>(p.grad_weight)[channel] = static_cast<scalar_t>(sums.dz_x * p.invstd[channel]);
    if (p.grad_bias != nullptr) static_cast<scalar_t*>(p.grad_bias)[channel] = static_cast<scalar_t>(sums.dz);
  });
}

// finish(channel, moments) for each channel, and apply(slab) after it.
template <typename Finish, typename Apply>
void reduce_moments(const BatchNormForward& p, const Finish& finish, const Apply& apply) {
  const Slabs slabs(p.shape);
  reduce_then_apply<math::Moments<double>>(
      slabs, slabs, /*copy_bytes=*/0,
      [&](int64_t, Slab slab, math::Moments<double>* out, void*) { kernels().batch_norm_moments(p, slab, out); },
      [&](int64_t, int64_t begin, int64_t end, const math::Moments<double>* found) {
        for (int64_t c = begin; c < end; ++c) finish(c, moments_of_channels(p.dtype, p.x, p.shape, c, c + 1, found[c]));
      },
      [&](int64_t, Slab slab, const math::Moments<double>*, const void*) { apply(slab); });
}

}  // namespace

void batch_norm_act_forward(const BatchNormForward& p) {
  if (!p.training) {
    use_running_statistics(p);
    return batch_norm_act_elemt(p);
  }
  clear_end_of_mask(p);
  reduce_moments(
      p, [&](int64_t channel, const math::Moments<double>& moments) { finish_channel(p, channel, moments); },
      [&](Slab slab) { kernels().batch_norm_normalise(p, slab); });
}

void batch_norm_act_backward(const BatchNormBackward& p) {
  const bool needs_sums = p.grad_weight != nullptr || p.grad_bias != nullptr || p.grad_residual != nullptr || p.training;
  if (!needs_sums) {
    if (p.grad_x == nullptr) return;
    const std::vector<math::GradientSums> none(p.shape.channels, {0.0, 0.0});
    const Slabs slabs(p.shape);
    slabs.for_each([&](int64_t i) { kernels().batch_norm_gradient_input(p, slabs[i], none.data(), nullptr); });
    return;
  }
  reduce_then_apply_gradient(
      p,
      [&](int64_t, int64_t begin, int64_t end, const math::GradientSums* sums) {
        for (int64_t c = begin; c < end; ++c) finish_channel(p, c, sums[c]);
      },
      [](int64_t, const math::GradientSums* sums) { return sums; });
}

void batch_norm_act_stats(const BatchNormForward& p, double* moments) {
  const int64_t channels = p.shape.channels;
  moments[0] = static_cast<double>(p.shape.rows * p.shape.inner);
  reduce_moments(
      p,
      [&](int64_t channel, const math::Moments<double>& found) {
        moments[1 + channel] = found.mean;
        moments[1 + channels + channel] = found.m2;
      },
      [](Slab) {});
}

void batch_norm_act_gather_stats(const BatchNormForward& p, int64_t ranks, const double* moments) {
  const int64_t channels = p.shape.channels;
  for (int64_t c = 0; c < channels; ++c) {
    math::Moments<double> merged{};
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const double* of_rank = moments + rank * (1 + 2 * channels);
      if (of_rank[0] > 0.0) merged = math::merge(merged, {of_rank[0], of_rank[1 + c], of_rank[1 + channels + c], 0.0, 0.0});
    }
    if (merged.count > 0.0) {
      finish_channel(p, c, math::rounded(merged));
    } else {
      p.mean[c] = p.invstd[c] = 0.0;
    }
  }
}

void batch_norm_act_elemt(const BatchNormForward& p) {
  clear_end_of_mask(p);
  const Slabs slabs(p.shape);
  const Kernels& isa = kernels();
  slabs.for_each([&](int64_t i) { isa.batch_norm_normalise(p, slabs[i]); });
}

void batch_norm_act_backward_reduce(const BatchNormBackward& arguments, double* sums) {
  BatchNormBackward p = arguments;
  p.grad_x = nullptr;
  const int64_t channels = p.shape.channels;
  reduce_then_apply_gradient(
      p,
      [&](int64_t, int64_t begin, int64_t end, const math::GradientSums* found) {
        for (int64_t c = begin; c < end; ++c) {
          sums[c] = found[c].dz;
          sums[channels + c] = found[c].dz_x;
        }
      },
      [](int64_t, const math::GradientSums* found) { return found; });
}

void batch_norm_act_backward_elemt(const BatchNormBackward& p, const double* sums, const double* count) {
  const Slabs slabs(p.shape);
  const Kernels& isa = kernels();
  const int64_t channels = p.shape.channels;
  // The kernel divides the sums by the count of its own operand.
  const double share = static_cast<double>(p.shape.rows * p.shape.inner) / *count;
  std::vector<math::GradientSums> of_share(channels);
  for (int64_t c = 0; c < channels; ++c) of_share[c] = {sums[c] * share, sums[channels + c] * share};
  slabs.for_each([&](int64_t i) { isa.batch_norm_gradient_input(p, slabs[i], of_share.data(), nullptr); });
}

}  // namespace gradkernels::cpu
