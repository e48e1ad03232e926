// Gradient clipping on the CPU: one pass over all tensors computes the norms, another one writes; adaptive
// clipping does both for one unit after the other. Partial results are merged in the order of the elements,
// whichever thread computed them.
#include "ops/clip_grad.h"

#include <vector>

#include "cpu/chunks.h"
#include "cpu/kernels.h"
#include "math/clip_grad.h"
#include "math/sum.h"

namespace gradkernels::cpu {
namespace {

Chunks chunks_of(const Run* runs, int64_t run_count) {
  return Chunks(run_count, [runs](int64_t r) { return runs[r].count; });
}

void* data_of(const Run* runs, const Chunk& chunk) {
  const Run& run = runs[chunk.tensor];
  return static_cast<char*>(run.data) + chunk.begin * size_of(run.dtype);
}

std::vector<PartialNorm> partials_of(const Run* runs, const Chunks& chunks, Norm norm, double factor) {
  std::vector<PartialNorm> partials(chunks.size());
  const auto partial_norm = kernels().partial_norm;
  chunks.for_each([&](int64_t i) {
    const Chunk& chunk = chunks[i];
    partials[i] = partial_norm(runs[chunk.tensor].dtype, norm, chunk.count, data_of(runs, chunk), factor);
  });
  return partials;
}

// The 2-norm of float64 elements whose squares overflow or underflow float64; `max_abs` is finite.
double rescaled_norm(const Run& run, double max_abs) {
  const math::Rescaling rescaled = math::rescaling(max_abs);
  math::Sum<double> sum{0.0, 0.0};
  for (const PartialNorm& partial : partials_of(&run, chunks_of(&run, 1), Norm::kTwo, rescaled.factor)) math::add(sum, partial.sum);
  return math::sqrt(sum.high + sum.low) * rescaled.inverse;
}

// The norm of a run, from the sum and the largest magnitude of all its elements.
double norm_of(const Run& run, Norm norm, double sum, double max_abs) {
  if (norm == Norm::kInfinity) return max_abs;
  if (norm == Norm::kOne) return sum;
  return math::squares_are_lost(sum, max_abs) ? rescaled_norm(run, max_abs) : math::sqrt(sum);
}

// The 2-norm of norms whose squares may overflow or underflow float64.
double norm_of_norms(const double* norms, int64_t count) {
  double maximum = 0.0;
  for (int64_t i = 0; i < count; ++i) maximum = math::max_or_nan(maximum, norms[i]);
  const math::Rescaling rescaled = math::rescaling(maximum);
  math::Sum<double> sum{0.0, 0.0};
  for (int64_t i = 0; i < count; ++i) {
    const double norm = norms[i] * rescaled.factor;
    math::add(sum, norm * norm);
  }
  return math::sqrt(sum.high + sum.low) * rescaled.inverse;
}

void scale(const Run* runs, int64_t run_count, double coefficient) {
  if (math::leaves_unscaled(coefficient)) return;
  const Chunks chunks = chunks_of(runs, run_count);
  const auto scale_chunk = kernels().scale;
  chunks.for_each_reversed([&](int64_t i) {
    const Chunk& chunk = chunks[i];
    scale_chunk(runs[chunk.tensor].dtype, chunk.count, data_of(runs, chunk), coefficient);
  });
}

}  // namespace

void grad_norms(const Run* runs, int64_t run_count, Norm norm, const GradNorms& out) {
  const Chunks chunks = chunks_of(runs, run_count);
  const std::vector<PartialNorm> partials = partials_of(runs, chunks, norm, 1.0);
  math::Sum<double> total{0.0, 0.0};
  double total_max = 0.0;
  bool rescued = false;
  for (int64_t r = 0, i = 0; r < run_count; ++r) {
    math::Sum<double> run_sum{0.0, 0.0};
    double max_abs = 0.0;
    int64_t nonfinite = 0;
    for (; i < chunks.size() && chunks[i].tensor == r; ++i) {
      math::add(run_sum, partials[i].sum);
      math::add(total, partials[i].sum);
      max_abs = math::max_or_nan(max_abs, partials[i].max_abs);
      nonfinite += partials[i].nonfinite;
    }
    const double sum = run_sum.high + run_sum.low;
    out.max_abs[r] = max_abs;
    out.nonfinite[r] = nonfinite;
    total_max = math::max_or_nan(total_max, max_abs);
    out.norms[r] = norm_of(runs[r], norm, sum, max_abs);
    rescued |= norm == Norm::kTwo && math::squares_are_lost(sum, max_abs);
  }
  const double sum = total.high + total.low;
  if (norm == Norm::kInfinity) {
    *out.total_norm = total_max;
  } else if (norm == Norm::kOne) {
    *out.total_norm = sum;
  } else {
    // The sum of zeros counts as unsafe too; both ways give 0.
    *out.total_norm = rescued || !math::is_safe_square_sum(sum) ? norm_of_norms(out.norms, run_count) : math::sqrt(sum);
  }
}

void clip_with_norm(const Run* runs, int64_t run_count, double max_norm, const double* total_norm) {
  scale(runs, run_count, math::clip_coefficient(*total_norm, max_norm));
}

void clamp(const Run* runs, int64_t run_count, double limit) {
  const Chunks chunks = chunks_of(runs, run_count);
  const auto clamp_chunk = kernels().clamp;
  chunks.for_each([&](int64_t i) {
    const Chunk& chunk = chunks[i];
    clamp_chunk(runs[chunk.tensor].dtype, chunk.count, data_of(runs, chunk), limit);
  });
}

void adaptive_clip(const UnitRun* runs, int64_t run_count, Norm norm, double clip_factor, double eps) {
  // The elements of a unit and of its gradient, which begin `begin` elements after the first unit's.
  const auto unit_of = [](const UnitRun& run, const void* first, int64_t begin) {
    return Run{run.dtype, run.elements, const_cast<char*>(static_cast<const char*>(first)) + begin * size_of(run.dtype)};
  };
  const auto is_large = [runs](int64_t r) { return runs[r].elements > Chunks::kChunkElements; };
  // A thread measures a unit and scales it while it is in its caches.
  const Chunks chunks(
      run_count, [&](int64_t r) { return is_large(r) ? 0 : runs[r].units * runs[r].elements; },
      [&](int64_t r) { return runs[r].elements; });
  const auto partial_norm = kernels().partial_norm;
  const auto scale_unit = kernels().scale;
  const auto norm_of_unit = [=](const Run& unit) {
    const PartialNorm whole = partial_norm(unit.dtype, norm, unit.count, unit.data, 1.0);
    return norm_of(unit, norm, whole.sum, whole.max_abs);
  };
  chunks.for_each([&](int64_t i) {
    const Chunk& chunk = chunks[i];
    const UnitRun& run = runs[chunk.tensor];
    for (int64_t begin = chunk.begin; begin < chunk.begin + chunk.count; begin += run.elements) {
      const Run grad = unit_of(run, run.grad, begin);
      const double param_norm = norm_of_unit(unit_of(run, run.param, begin));
      const double coefficient = math::adaptive_clip_coefficient(param_norm, norm_of_unit(grad), clip_factor, eps);
      if (!math::leaves_unscaled(coefficient)) scale_unit(grad.dtype, grad.count, grad.data, coefficient);
    }
  });
  // All threads share one large unit after the other.
  for (int64_t r = 0; r < run_count; ++r) {
    if (!is_large(r)) continue;
    for (int64_t unit = 0; unit < runs[r].units; ++unit) {
      const int64_t begin = unit * runs[r].elements;
      const Run pair[2] = {unit_of(runs[r], runs[r].param, begin), unit_of(runs[r], runs[r].grad, begin)};
      double norms[2], max_abs[2], total_norm;
      int64_t nonfinite[2];
      grad_norms(pair, 2, norm, {norms, max_abs, nonfinite, &total_norm});
      scale(pair + 1, 1, math::adaptive_clip_coefficient(norms[0], norms[1], clip_factor, eps));
    }
  }
}

}  // namespace gradkernels::cpu
