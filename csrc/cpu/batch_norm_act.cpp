// batch_norm_act on the CPU. The operand is cut into slabs (cpu/slabs.h). If slabs hold whole channels, one
// task computes the statistics of a slab and then normalises it, and its second pass finds the slab in the
// cache. If channels are too few or too large for that, all slabs go through the first pass before any goes
// through the second, which walks back from the last slab.
#include "ops/batch_norm_act.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/slabs.h"

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

// The moments of a channel whose slabs are merged. They are computed again, in float64, if they are not
// finite: a square may have been too large for float32, or an element is inf or nan.
math::Moments<double> moments_of_channel(const BatchNormForward& p, int64_t channel, const math::Moments<double>& merged) {
  if (std::isfinite(merged.m2)) return math::rounded(merged);
  return dispatch(p.dtype, [&](auto zero) {
    const auto each = [&](const auto& function) {
      for (int64_t row = 0; row < p.shape.rows; ++row) {
        const auto* run = static_cast<const decltype(zero)*>(p.x) + (row * p.shape.channels + channel) * p.shape.inner;
        for (int64_t i = 0; i < p.shape.inner; ++i) {
          if (!function(static_cast<double>(run[i]))) return;
        }
      }
    };
    return math::rounded(math::moments_of(merged.count, each));
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

// The merged result of `parts` parts of a channel, `stride` results apart. Sums about the first part's mean take no
// divisions, of which math::merge has several for each part. What cancels in them is at most `parts` times what remains.
math::Moments<double> merged_parts(const math::Moments<double>* first, int64_t parts, int64_t stride) {
  const double about = math::zero_unless_finite(first->mean);
  double count = 0.0;
  math::Sum<double> sum{0.0, 0.0}, squares{0.0, 0.0};
  for (int64_t i = 0; i < parts; ++i) {
    const math::TermsAbout terms = math::terms_about(about, first[i * stride]);
    count += first[i * stride].count;
    sum = math::sum_of(sum, terms.first);
    squares = math::sum_of(squares, terms.second);
  }
  return math::moments_about(about, count, sum, squares);
}
math::GradientSums merged_parts(const math::GradientSums* first, int64_t parts, int64_t stride) {
  math::GradientSums merged = *first;
  for (int64_t i = 1; i < parts; ++i) merged = math::merge(merged, first[i * stride]);
  return merged;
}

// Two passes over the slabs. reduce(slab, out, copy) writes a partial result for each channel of the slab.
// finish(channel, result) receives the merged result of a channel, and apply(slab, results, copy) runs after
// it. If slabs hold whole channels, one task does all three for a slab, and `copy` is memory of `copy_bytes`
// for each element of the slab. Otherwise, and for 0 bytes, `copy` is null.
template <typename Result, typename Reduce, typename Finish, typename Apply>
void reduce_then_apply(const Slabs& slabs, int64_t channels, int64_t copy_bytes, const Reduce& reduce, const Finish& finish,
                       const Apply& apply) {
  std::vector<Result> partial(slabs.parts() * channels);
  const auto reduce_slab = [&](int64_t i, void* copy) {
    reduce(slabs[i], partial.data() + slabs.part(i) * channels + slabs[i].channel_begin, copy);
  };
  if (slabs.parts() == 1) {
    slabs.for_each_with_copy(copy_bytes, [&](int64_t i, void* copy) {
      reduce_slab(i, copy);
      for (int64_t c = slabs[i].channel_begin; c < slabs[i].channel_end; ++c) finish(c, partial[c]);
      apply(slabs[i], partial.data(), copy);
    });
    return;
  }
  slabs.for_each([&](int64_t i) { reduce_slab(i, nullptr); });
  for (int64_t c = 0; c < channels; ++c) {
    partial[c] = merged_parts(&partial[c], slabs.parts(), channels);
    finish(c, partial[c]);
  }
  slabs.for_each([&](int64_t i) { apply(slabs[slabs.size() - 1 - i], partial.data(), nullptr); });
}

// Where lines are folded (cpu/lines.h), the bits of a mask follow each other without gaps, and its last bytes are
// not used. They are written nonetheless: a result must not depend on what was in its memory.
void clear_end_of_mask(const BatchNormForward& p) {
  if (p.mask == nullptr || p.shape.inner >= kShortRunElements) return;
  const int64_t used = divide_up(p.shape.rows * p.shape.channels * p.shape.inner, 8);
  std::memset(p.mask + used, 0, mask_bytes(p.shape.rows, p.shape.channels, p.shape.inner) - used);
}

}  // namespace

void batch_norm_act_forward(const BatchNormForward& p) {
  const Slabs slabs(p.shape);
  const Kernels& isa = kernels();
  if (p.training) {
    clear_end_of_mask(p);
    reduce_then_apply<math::Moments<double>>(
        slabs, p.shape.channels, /*copy_bytes=*/0,
        [&](Slab slab, math::Moments<double>* out, void*) { isa.batch_norm_moments(p, slab, out); },
        [&](int64_t channel, const math::Moments<double>& merged) { finish_channel(p, channel, moments_of_channel(p, channel, merged)); },
        [&](Slab slab, const math::Moments<double>*, const void*) { isa.batch_norm_normalise(p, slab); });
  } else {
    use_running_statistics(p);
    batch_norm_act_elemt(p);
  }
}

void batch_norm_act_backward(const BatchNormBackward& arguments) {
  BatchNormBackward p = arguments;
  const Slabs slabs(p.shape);
  const Kernels& isa = kernels();
  const bool needs_sums = p.grad_weight != nullptr || p.grad_bias != nullptr || p.grad_residual != nullptr || p.training;
  const auto apply = [&](Slab slab, const math::GradientSums* sums, const void* dz_copy) {
    if (p.grad_x != nullptr) isa.batch_norm_gradient_input(p, slab, sums, dz_copy);
  };
  if (needs_sums) {
    // An exponential costs more than a copy of dz, in the cache or, if channels are cut, in memory. The copy
    // in memory is written where grad_x will be: backward then moves 6 times the bytes of x, instead of 5.
    const bool keeps_dz = p.grad_x != nullptr && p.act.has_exponential();
    const bool copies_dz = keeps_dz && (p.grad_residual == nullptr || size_of(p.dtype) == 2);
    if (keeps_dz && slabs.parts() > 1 && p.grad_residual == nullptr) p.grad_residual = p.grad_x;
    reduce_then_apply<math::GradientSums>(
        slabs, p.shape.channels, copies_dz ? (p.dtype == DType::kFloat64 ? 8 : 4) : 0,
        [&](Slab slab, math::GradientSums* out, void* dz_copy) { isa.batch_norm_gradient_sums(p, slab, out, dz_copy); },
        [&](int64_t channel, const math::GradientSums& sums) { finish_channel(p, channel, sums); }, apply);
  } else {
    const std::vector<math::GradientSums> none(p.shape.channels, {0.0, 0.0});
    slabs.for_each([&](int64_t i) { apply(slabs[i], none.data(), nullptr); });
  }
}

void batch_norm_act_stats(const BatchNormForward& p, double* moments) {
  const Kernels& isa = kernels();
  const int64_t channels = p.shape.channels;
  moments[0] = static_cast<double>(p.shape.rows * p.shape.inner);
  reduce_then_apply<math::Moments<double>>(
      Slabs(p.shape), channels, /*copy_bytes=*/0,
      [&](Slab slab, math::Moments<double>* out, void*) { isa.batch_norm_moments(p, slab, out); },
      [&](int64_t channel, const math::Moments<double>& merged) {
        const math::Moments<double> found = moments_of_channel(p, channel, merged);
        moments[1 + channel] = found.mean;
        moments[1 + channels + channel] = found.m2;
      },
      [](Slab, const math::Moments<double>*, const void*) {});
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

void batch_norm_act_backward_reduce(const BatchNormBackward& p, double* sums) {
  const Kernels& isa = kernels();
  const int64_t channels = p.shape.channels;
  reduce_then_apply<math::GradientSums>(
      Slabs(p.shape), channels, /*copy_bytes=*/0,
      [&](Slab slab, math::GradientSums* out, void*) { isa.batch_norm_gradient_sums(p, slab, out, nullptr); },
      [&](int64_t channel, const math::GradientSums& found) {
        sums[channel] = found.dz;
        sums[channels + channel] = found.dz_x;
      },
      [](Slab, const math::GradientSums*, const void*) {});
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
