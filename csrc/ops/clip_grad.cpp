// The clipping operators: they describe the gradients as runs of elements and call the kernels. A gradient
// with gaps goes through a dense copy. Gradients that may share memory are written one after the other, in
// the order of the list.
#include "ops/clip_grad.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/device.h"
#include "math/clip_grad.h"
#include "ops/tensor_list.h"

namespace gradkernels {
namespace {

Norm norm_of(double norm_type) {
  if (norm_type == 2.0) return Norm::kTwo;
  if (norm_type == 1.0) return Norm::kOne;
  TORCH_CHECK_VALUE(norm_type == std::numeric_limits<double>::infinity(), "norm_type must be 1, 2 or inf, got ", norm_type);
  return Norm::kInfinity;
}

Run run_of(const at::Tensor& dense) { return {dtype_of(dense), dense.numel(), dense.data_ptr()}; }

// Calls kernel(runs, count), which writes the gradients or dense copies of them; copies are then written
// back.
template <typename Kernel>
void write_all(at::TensorList grads, const Kernel& kernel) {
  std::vector<Run> runs;
  runs.reserve(grads.size());
  std::vector<std::pair<at::Tensor, at::Tensor>> copies;
  for (const at::Tensor& grad : grads) {
    if (grad.is_non_overlapping_and_dense()) {
      runs.push_back(run_of(grad));
    } else {
      copies.emplace_back(grad, grad.contiguous());
      runs.push_back(run_of(copies.back().second));
    }
  }
  kernel(runs.data(), static_cast<int64_t>(runs.size()));
  for (const auto& [grad, copy] : copies) grad.copy_(copy);
}

template <typename Kernel>
void write_each_once(at::TensorList grads, const Kernel& kernel) {
  if (disjoint(grads)) {
    write_all(grads, kernel);
  } else {
    for (size_t i = 0; i < grads.size(); ++i) write_all(grads.slice(i, 1), kernel);
  }
}

// Called before anything is written.
void check_writable(at::TensorList grads) {
  check_tensors(grads);
  for (const at::Tensor& grad : grads) at::assert_no_internal_overlap(grad);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> grad_norms(at::TensorList grads, double norm_type) {
  const Norm norm = norm_of(norm_type);
  check_tensors(grads);
  std::vector<at::Tensor> copies;
  std::vector<Run> runs;
  runs.reserve(grads.size());
  for (const at::Tensor& grad : grads) {
    if (grad.is_non_overlapping_and_dense()) {
      runs.push_back(run_of(grad));
    } else {
      copies.push_back(grad.contiguous());
      runs.push_back(run_of(copies.back()));
    }
  }
  const int64_t count = static_cast<int64_t>(runs.size());
  const at::TensorOptions real = at::TensorOptions(at::kDouble).device(device_of_first(grads));
  at::Tensor norms = at::empty({count}, real);
  at::Tensor max_abs = at::empty({count}, real);
  at::Tensor nonfinite = at::empty({count}, real.dtype(at::kLong));
  at::Tensor total_norm = at::empty({}, real);
  GK_LAUNCHER(norms, grad_norms)(runs.data(), count, norm,
                                 {norms.mutable_data_ptr<double>(), max_abs.mutable_data_ptr<double>(),
                                  nonfinite.mutable_data_ptr<int64_t>(), total_norm.mutable_data_ptr<double>()});
  return {norms, max_abs, nonfinite, total_norm};
}

void clip_grads_with_norm_(at::TensorList grads, double max_norm, const at::Tensor& total_norm) {
  check_writable(grads);
  if (grads.empty()) return;
  TORCH_CHECK(total_norm.numel() == 1, "a Tensor with ", total_norm.numel(), " elements cannot be converted to Scalar");
  // The kernel reads the norm on the device of the gradients, so that the CPU does not wait for a GPU.
  const at::Tensor here = total_norm.to(at::TensorOptions(at::kDouble).device(device_of_first(grads)));
  const double* norm = here.const_data_ptr<double>();
  write_each_once(grads, [&](const Run* runs, int64_t count) { GK_LAUNCHER(here, clip_with_norm)(runs, count, max_norm, norm); });
}

void clip_grad_value_(at::TensorList grads, double clip_value) {
  check_writable(grads);
  if (grads.empty()) return;
  const at::Tensor& first = grads.front();
  write_each_once(grads, [&](const Run* runs, int64_t count) { GK_LAUNCHER(first, clamp)(runs, count, clip_value); });
}

// For tracing: only shapes.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> grad_norms_meta(at::TensorList grads, double norm_type) {
  norm_of(norm_type);
  check_tensors(grads);
  const at::TensorOptions real = at::TensorOptions(at::kDouble).device(at::kMeta);
  const int64_t count = static_cast<int64_t>(grads.size());
  return {at::empty({count}, real), at::empty({count}, real), at::empty({count}, real.dtype(at::kLong)), at::empty({}, real)};
}

void clip_grads_with_norm_meta(at::TensorList grads, double, const at::Tensor&) { check_tensors(grads); }

void clip_grad_value_meta(at::TensorList grads, double) { check_tensors(grads); }

void add_clip_grad_kernels(torch::Library& m) {
  m.impl("grad_norms", on_device<grad_norms>);
  m.impl("clip_grads_with_norm_", on_device<clip_grads_with_norm_>);
  m.impl("clip_grad_value_", on_device<clip_grad_value_>);
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) { add_clip_grad_kernels(m); }
#if defined(GK_WITH_CUDA)
TORCH_LIBRARY_IMPL(gradkernels, CUDA, m) { add_clip_grad_kernels(m); }
#endif

TORCH_LIBRARY_IMPL(gradkernels, Meta, m) {
  m.impl("grad_norms", grad_norms_meta);
  m.impl("clip_grads_with_norm_", clip_grads_with_norm_meta);
  m.impl("clip_grad_value_", clip_grad_value_meta);
}

}  // namespace gradkernels
