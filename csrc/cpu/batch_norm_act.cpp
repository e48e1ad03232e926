// batch_norm_act on the CPU. The operand is cut into slabs, by its shape alone, so that results do not depend on the number of threads. A
// slab that holds its channels whole goes through statistics and normalisation in one task, the second pass finding it in cache; where
// channels are too few or too large for that, all slabs go through one pass before the next, which then walks back from the end.
#include "ops/batch_norm_act.h"

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace gradkernels::cpu {
namespace {

// A channel up to this size is worked on by one thread: two operands of it in float32 fill a second-level cache of 2 MiB.
constexpr int64_t kWholeElements = 256 * 1024;
// With this many channels, threads find enough to do among larger ones too; 4 MiB then wait in the third-level cache.
constexpr int64_t kManyChannels = 16;
constexpr int64_t kWholeElementsOfMany = 1024 * 1024;
// What a task takes of a channel that is cut, and about the least that is worth a thread.
constexpr int64_t kPartElements = 64 * 1024;
constexpr int64_t kGrainElements = 16 * 1024;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Slabs {
 public:
  explicit Slabs(const BatchNormShape& shape) : shape_(shape), rows_(shape.rows), inner_(shape.inner) {
    const int64_t elements = shape.rows * shape.inner;
    int64_t limit = kWholeElements;
    if (shape.inner >= kShortRunElements) {
      channels_ = 1;
      if (shape.channels >= kManyChannels) limit = kWholeElementsOfMany;
    } else {
      // Wide for the loops, narrow for the threads; a multiple of 8 channels keeps the bytes of the mask apart.
      const int64_t wish = std::clamp(elements * shape.channels / 16, kGrainElements, 2 * kPartElements) / shape.rows;
      const int64_t columns = std::clamp<int64_t>(wish, kShortRunElements, kMaxColumns);
      channels_ = std::min(std::max<int64_t>(columns / shape.inner / 8 * 8, 8), shape.channels);
    }
    if (elements * channels_ > limit) {
      const int64_t width = channels_ * shape.inner;
      rows_ = std::clamp<int64_t>(kPartElements / width, 1, shape.rows);
      if (shape.inner >= kShortRunElements) inner_ = std::min(shape.inner, kPartElements);
    }
    channel_slabs_ = divide_up(shape.channels, channels_);
    row_slabs_ = divide_up(shape.rows, rows_);
    inner_slabs_ = divide_up(shape.inner, inner_);
  }

  // Slabs that one channel is cut into.
  int64_t parts() const { return row_slabs_ * inner_slabs_; }
  int64_t size() const { return channel_slabs_ * parts(); }
  int64_t part(int64_t i) const { return i / channel_slabs_; }
  int64_t grain() const { return std::max<int64_t>(1, kGrainElements / (rows_ * inner_ * channels_)); }

  Slab operator[](int64_t i) const {
    const int64_t channel = i % channel_slabs_ * channels_;
    const int64_t row = part(i) / inner_slabs_ * rows_;
    const int64_t inner = part(i) % inner_slabs_ * inner_;
    return {channel, std::min(channel + channels_, shape_.channels), row, std::min(row + rows_, shape_.rows),
            inner,   std::min(inner + inner_, shape_.inner)};
  }

  template <typename Function>
  void for_each(const Function& function) const {
    parallel_for(size(), grain(), function);
  }

 private:
  BatchNormShape shape_;
  int64_t channels_, rows_, inner_;  // of one slab
  int64_t channel_slabs_, row_slabs_, inner_slabs_;
};

void use_running_statistics(const BatchNormForward& p) {
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    for (int64_t c = 0; c < p.shape.channels; ++c) {
      p.mean[c] = static_cast<double>(static_cast<const scalar_t*>(p.running_mean)[c]);
      p.invstd[c] = math::inverse_std(static_cast<double>(static_cast<const scalar_t*>(p.running_var)[c]), p.eps);
    }
  });
}

void finish_channel(const BatchNormForward& p, int64_t channel, const math::Moments<double>& moments) {
  p.mean[channel] = moments.mean;
  p.invstd[channel] = math::inverse_std(moments.m2 / moments.count, p.eps);
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto update = [&](void* running, double observed) {
      if (running == nullptr) return;
      scalar_t& value = static_cast<scalar_t*>(running)[channel];
      value = static_cast<scalar_t>(math::update_running(static_cast<double>(value), observed, p.momentum));
    };
    update(p.running_mean, moments.mean);
    update(p.running_var, moments.m2 / (moments.count - 1.0));
  });
}

void finish_channel(const BatchNormBackward& p, int64_t channel, const math::GradientSums& sums) {
  dispatch(p.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    if (p.grad_weight != nullptr) static_cast<scalar_t*>(p.grad_weight)[channel] = static_cast<scalar_t>(sums.dz_x * p.invstd[channel]);
    if (p.grad_bias != nullptr) static_cast<scalar_t*>(p.grad_bias)[channel] = static_cast<scalar_t>(sums.dz);
  });
}

// Two passes over the slabs: reduce(slab, out) leaves a partial result for each of its channels, finish(channel, result) takes the merged
// one, and only then apply(slab, results) runs. Where a channel is in one slab, that all happens in one task.
template <typename Result, typename Reduce, typename Finish, typename Apply>
void reduce_then_apply(const Slabs& slabs, int64_t channels, const Reduce& reduce, const Finish& finish, const Apply& apply) {
  std::vector<Result> partial(slabs.parts() * channels);
  const auto reduce_slab = [&](int64_t i) { reduce(slabs[i], partial.data() + slabs.part(i) * channels + slabs[i].channel_begin); };
  if (slabs.parts() == 1) {
    slabs.for_each([&](int64_t i) {
      reduce_slab(i);
      for (int64_t c = slabs[i].channel_begin; c < slabs[i].channel_end; ++c) finish(c, partial[c]);
      apply(slabs[i], partial.data());
    });
    return;
  }
  slabs.for_each(reduce_slab);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t part = 1; part < slabs.parts(); ++part) partial[c] = math::merge(partial[c], partial[part * channels + c]);
    finish(c, partial[c]);
  }
  slabs.for_each([&](int64_t i) { apply(slabs[slabs.size() - 1 - i], partial.data()); });
}

}  // namespace

void batch_norm_act_forward(const BatchNormForward& p) {
  const Slabs slabs(p.shape);
  const Kernels& isa = kernels();
  if (p.training) {
    reduce_then_apply<math::Moments<double>>(
        slabs, p.shape.channels, [&](Slab slab, math::Moments<double>* out) { isa.batch_norm_moments(p, slab, out); },
        [&](int64_t channel, const math::Moments<double>& moments) { finish_channel(p, channel, moments); },
        [&](Slab slab, const math::Moments<double>*) { isa.batch_norm_normalise(p, slab); });
  } else {
    use_running_statistics(p);
    slabs.for_each([&](int64_t i) { isa.batch_norm_normalise(p, slabs[i]); });
  }
}

void batch_norm_act_backward(const BatchNormBackward& p) {
  const Slabs slabs(p.shape);
  const Kernels& isa = kernels();
  const bool needs_sums = p.grad_weight != nullptr || p.grad_bias != nullptr || p.grad_residual != nullptr || p.training;
  const auto apply = [&](Slab slab, const math::GradientSums* sums) {
    if (p.grad_x != nullptr) isa.batch_norm_gradient_input(p, slab, sums);
  };
  if (needs_sums) {
    reduce_then_apply<math::GradientSums>(
        slabs, p.shape.channels, [&](Slab slab, math::GradientSums* out) { isa.batch_norm_gradient_sums(p, slab, out); },
        [&](int64_t channel, const math::GradientSums& sums) { finish_channel(p, channel, sums); }, apply);
  } else {
    const std::vector<math::GradientSums> none(p.shape.channels, {0.0, 0.0});
    slabs.for_each([&](int64_t i) { apply(slabs[i], none.data()); });
  }
}

}  // namespace gradkernels::cpu
