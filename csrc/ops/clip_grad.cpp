// The clipping operators: describe the gradients as runs of elements, hand them to the kernels.
#include "ops/clip_grad.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "common/check.h"
#include "math/clip_grad.h"

namespace gradkernels {
namespace {

Norm norm_of(double norm_type) {
  TORCH_CHECK_VALUE(norm_type == 2.0 || norm_type == std::numeric_limits<double>::infinity(), "norm_type must be 2 or inf, got ",
                    norm_type);
  return norm_type == 2.0 ? Norm::kTwo : Norm::kInfinity;
}

void check_tensors(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK_NOT_IMPLEMENTED(has_kernel(tensor), "\"clip_grad\" not implemented for '", tensor.scalar_type(), "' on ", tensor.device());
  }
}

Run run_of(const at::Tensor& dense) { return {dtype_of(dense), dense.numel(), dense.data_ptr()}; }

// Whether no two runs share memory. A gradient that is listed twice is scaled twice, as torch does it, one after the other.
bool disjoint(std::vector<Run> runs) {
  std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return std::less<void*>()(a.data, b.data); });
  return std::adjacent_find(runs.begin(), runs.end(), [](const Run& a, const Run& b) {
           return std::less<void*>()(b.data, static_cast<char*>(a.data) + a.count * size_of(a.dtype));
         }) == runs.end();
}

at::Tensor get_total_norm(at::TensorList tensors, double norm_type) {
  const Norm norm = norm_of(norm_type);
  check_tensors(tensors);
  std::vector<at::Tensor> copies;
  std::vector<Run> runs;
  runs.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    if (tensor.is_non_overlapping_and_dense()) {
      runs.push_back(run_of(tensor));
    } else {
      copies.push_back(tensor.contiguous());
      runs.push_back(run_of(copies.back()));
    }
  }
  at::Tensor total = at::empty({}, at::kDouble);
  *total.mutable_data_ptr<double>() = cpu::total_norm(runs.data(), static_cast<int64_t>(runs.size()), norm);
  return total;
}

void clip_grads_with_norm_(at::TensorList grads, double max_norm, const at::Tensor& total_norm) {
  check_tensors(grads);
  // Before anything is written.
  for (const at::Tensor& grad : grads) at::assert_no_internal_overlap(grad);
  const double coefficient = math::clip_coefficient(total_norm.item<double>(), max_norm);
  if (math::leaves_unscaled(coefficient)) return;
  std::vector<Run> runs;
  runs.reserve(grads.size());
  for (const at::Tensor& grad : grads) {
    if (grad.is_non_overlapping_and_dense()) {
      runs.push_back(run_of(grad));
    } else {
      const at::Tensor copy = grad.contiguous();
      const Run run = run_of(copy);
      cpu::scale(&run, 1, coefficient);
      grad.copy_(copy);
    }
  }
  if (disjoint(runs)) {
    cpu::scale(runs.data(), static_cast<int64_t>(runs.size()), coefficient);
  } else {
    for (const Run& run : runs) cpu::scale(&run, 1, coefficient);
  }
}

// Shapes alone, for tracing.
at::Tensor get_total_norm_meta(at::TensorList tensors, double norm_type) {
  norm_of(norm_type);
  check_tensors(tensors);
  return at::empty({}, at::TensorOptions(at::kDouble).device(at::kMeta));
}

void clip_grads_with_norm_meta(at::TensorList grads, double, const at::Tensor&) { check_tensors(grads); }

}  // namespace

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) {
  m.impl("get_total_norm", get_total_norm);
  m.impl("clip_grads_with_norm_", clip_grads_with_norm_);
}

TORCH_LIBRARY_IMPL(gradkernels, Meta, m) {
  m.impl("get_total_norm", get_total_norm_meta);
  m.impl("clip_grads_with_norm_", clip_grads_with_norm_meta);
}

}  // namespace gradkernels
