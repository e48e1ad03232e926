// The two passes of batch norm and group norm: results of each channel in a first pass, and a second pass that applies
// them. A set is the channels whose statistics are computed together: in batch norm one channel, in group norm
// `set_channels` neighbours in one sample (common/shape.h).
//
// If slabs (cpu/slabs.h) hold whole sets, one task takes a slab through both passes, and the second one finds it in the
// cache. If sets are too few or too large for that, all slabs of one or more samples go through the first pass before
// any goes through the second, which walks back from the last slab.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/slabs.h"

namespace gradkernels::cpu {

// The merged result of `parts` results, `stride` apart. Sums about the first one's mean take no divisions, of which
// math::merge has several for each part. What cancels in them is at most `parts` times what remains.
inline math::Moments<double> merged_parts(const math::Moments<double>* first, int64_t parts, int64_t stride) {
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
inline math::GradientSums merged_parts(const math::GradientSums* first, int64_t parts, int64_t stride) {
  math::GradientSums merged = *first;
  for (int64_t i = 1; i < parts; ++i) merged = math::merge(merged, first[i * stride]);
  return merged;
}

// The moments of the channels [begin, end) of x together, from their merged moments. They are computed again, in
// float64, if they are not finite: a square may have been too large for float32, or an element is inf or nan.
inline math::Moments<double> moments_of_channels(DType dtype, const void* x, const ChannelShape& shape, int64_t begin, int64_t end,
                                                 const math::Moments<double>& merged) {
  if (std::isfinite(merged.m2)) return math::rounded(merged);
  return dispatch(dtype, [&](auto zero) {
    const auto each = [&](const auto& function) {
      for (int64_t row = 0; row < shape.rows; ++row) {
        const auto* const run = static_cast<const decltype(zero)*>(x) + row * shape.channels * shape.inner;
        for (int64_t i = begin * shape.inner; i < end * shape.inner; ++i) {
          if (!function(static_cast<double>(run[i]))) return;
        }
      }
    };
    return math::rounded(math::moments_of(merged.count, each));
  });
}

// Where lines are folded (cpu/lines.h), the bits of a mask follow each other without gaps, and its last bytes are
// not used. They are written nonetheless: a result must not depend on what was in its memory.
inline void clear_end_of_mask(const BatchNormForward& p) {
  if (p.mask == nullptr || has_long_runs(p.shape)) return;
  const int64_t bytes = mask_bytes(p.shape.rows, p.shape.channels, p.shape.inner);
  const int64_t used = divide_up(p.shape.rows * p.shape.channels * p.shape.inner, 8);
  for (int64_t sample = 0; sample < p.shape.samples; ++sample) std::memset(p.mask + sample * bytes + used, 0, bytes - used);
}

inline void advance(const void*& data, int64_t bytes) {
  if (data != nullptr) data = static_cast<const char*>(data) + bytes;
}
inline void advance(void*& data, int64_t bytes) {
  if (data != nullptr) data = static_cast<char*>(data) + bytes;
}

// The arguments for one sample.
template <typename Arguments>
Arguments of_sample(Arguments p, int64_t sample) {
  const ChannelShape& shape = p.shape;
  const int64_t bytes = sample * shape.rows * shape.channels * shape.inner * size_of(p.dtype);
  const int64_t sets = sample * (shape.channels / p.set_channels);
  advance(p.x, bytes);
  advance(p.residual, bytes);
  if (p.mask != nullptr) p.mask += sample * mask_bytes(shape.rows, shape.channels, shape.inner);
  p.mean += sets;
  p.invstd += sets;
  if constexpr (std::is_same_v<Arguments, BatchNormForward>) {
    advance(p.y, bytes);
  } else {
    advance(p.grad_y, bytes);
    advance(p.grad_x, bytes);
    advance(p.grad_residual, bytes);
  }
  return p;
}

// reduce(sample, slab, out, copy) writes a result for each channel of a slab of `reduced`. finish(sample, begin, end,
// results) receives the results of the sample's channels, of which [begin, end) are whole sets, and apply(sample, slab,
// results, copy) runs after it for slabs of `applied`. If one task does all three, `copy` is memory of `copy_bytes` for
// each element of the slab. Otherwise, and for 0 bytes, `copy` is null. A channel of `reduced` may be several of
// `applied`.
template <typename Result, typename Reduce, typename Finish, typename Apply>
void reduce_then_apply(const Slabs& reduced, const Slabs& applied, int64_t copy_bytes, const Reduce& reduce, const Finish& finish,
                       const Apply& apply) {
  const ChannelShape &shape = reduced.shape(), &applied_shape = applied.shape();
  const int64_t samples = shape.samples, channels = shape.channels, parts = reduced.parts();
  const int64_t ratio = applied_shape.channels / channels;
  // A slab of short runs that is cut otherwise might be too wide.
  if (reduced.hold_sets() && (ratio == 1 || has_long_runs(applied_shape))) {
    // Allocated before the threads start: finish may update running statistics, and an error must not come after that.
    std::vector<Result> results(samples * channels);
    const auto prepare = [&](int64_t elements) { return std::vector<char>(elements * copy_bytes); };
    reduced.for_each_of_samples(0, samples, prepare, [&](int64_t sample, int64_t i, std::vector<char>& memory) {
      const Slab slab = reduced[i];
      Result* const of_sample = results.data() + sample * channels;
      void* const copy = copy_bytes == 0 ? nullptr : memory.data();
      reduce(sample, slab, of_sample + slab.channel_begin, copy);
      finish(sample, slab.channel_begin, slab.channel_end, of_sample);
      apply(sample, Slab{slab.channel_begin * ratio, slab.channel_end * ratio, 0, applied_shape.rows, 0, applied_shape.inner}, of_sample,
            copy);
    });
    return;
  }
  const auto nothing = [](int64_t) { return 0; };
  const int64_t together = std::clamp<int64_t>(kSlabsTogether / reduced.size(), 1, samples);
  std::vector<Result> results(together * parts * channels);
  for (int64_t begin = 0, end; begin < samples; begin = end) {
    end = std::min(begin + together, samples);
    const auto results_of = [&](int64_t sample) { return results.data() + (sample - begin) * parts * channels; };
    reduced.for_each_of_samples(begin, end, nothing, [&](int64_t sample, int64_t i, int) {
      reduce(sample, reduced[i], results_of(sample) + reduced.part(i) * channels + reduced[i].channel_begin, nullptr);
    });
    for (int64_t sample = begin; sample < end; ++sample) {
      Result* const of_sample = results_of(sample);
      for (int64_t c = 0; c < channels; ++c) of_sample[c] = merged_parts(&of_sample[c], parts, channels);
      finish(sample, 0, channels, of_sample);
    }
    applied.for_each_of_samples(begin, end, nothing, [&](int64_t sample, int64_t i, int) {
      const int64_t last = begin + end - 1 - sample;
      apply(last, applied[applied.size() - 1 - i], results_of(last), nullptr);
    });
  }
}

// Both passes of a gradient. finish is that of reduce_then_apply; sums_of(sample, results) are the sums that the kernel
// of grad_x reads for a sample.
template <typename Finish, typename SumsOf>
void reduce_then_apply_gradient(BatchNormBackward p, const Finish& finish, const SumsOf& sums_of) {
  const Slabs slabs(p.shape, /*goes_twice=*/true, p.set_channels);
  const Kernels& isa = kernels();
  // An exponential costs more than a copy of dz, in the cache or, if channels are cut, in memory. The copy
  // in memory is written where grad_x will be: backward then moves 6 times the bytes of x, instead of 5.
  const bool keeps_dz = p.grad_x != nullptr && p.act.has_exponential();
  const bool copies_dz = keeps_dz && (p.grad_residual == nullptr || size_of(p.dtype) == 2);
  if (keeps_dz && !slabs.hold_sets() && p.grad_residual == nullptr) p.grad_residual = p.grad_x;
  reduce_then_apply<math::GradientSums>(
      slabs, slabs, copies_dz ? (p.dtype == DType::kFloat64 ? 8 : 4) : 0,
      [&](int64_t sample, Slab slab, math::GradientSums* out, void* dz_copy) {
        isa.batch_norm_gradient_sums(of_sample(p, sample), slab, out, dz_copy);
      },
      finish,
      [&](int64_t sample, Slab slab, const math::GradientSums* results, const void* dz_copy) {
        if (p.grad_x != nullptr) isa.batch_norm_gradient_input(of_sample(p, sample), slab, sums_of(sample, results), dz_copy);
      });
}

}  // namespace gradkernels::cpu
