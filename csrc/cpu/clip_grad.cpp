// Gradient clipping on the CPU: one pass over all tensors computes the norms, another one writes. Partial
// results are merged in the order of the elements, whichever thread computed them.
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
    if (norm == Norm::kInfinity) {
      out.norms[r] = max_abs;
    } else if (norm == Norm::kOne) {
      out.norms[r] = sum;
    } else if (nonfinite != 0 || max_abs == 0.0 || math::is_safe_square_sum(sum)) {
      out.norms[r] = math::sqrt(sum);
    } else {
      out.norms[r] = rescaled_norm(runs[r], max_abs);
      rescued = true;
    }
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
  const double coefficient = math::clip_coefficient(*total_norm, max_norm);
  if (math::leaves_unscaled(coefficient)) return;
  const Chunks chunks = chunks_of(runs, run_count);
  const auto scale_chunk = kernels().scale;
  chunks.for_each_reversed([&](int64_t i) {
    const Chunk& chunk = chunks[i];
    scale_chunk(runs[chunk.tensor].dtype, chunk.count, data_of(runs, chunk), coefficient);
  });
}

void clamp(const Run* runs, int64_t run_count, double limit) {
  const Chunks chunks = chunks_of(runs, run_count);
  const auto clamp_chunk = kernels().clamp;
  chunks.for_each([&](int64_t i) {
    const Chunk& chunk = chunks[i];
    clamp_chunk(runs[chunk.tensor].dtype, chunk.count, data_of(runs, chunk), limit);
  });
}

}  // namespace gradkernels::cpu
