// The clipping operators: they describe the gradients as runs of elements and call the kernels. A gradient
// with gaps goes through a dense copy. Gradients that may share memory are written one after the other, in
// the order of the list.
#include "ops/clip_grad.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/device.h"
#include "common/library.h"
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

int64_t elements_of_unit(const at::Tensor& x) { return x.dim() < 2 ? x.numel() : x.numel() / x.size(0); }

// x, or a copy of it in which the elements of a unit follow each other. x must have elements.
at::Tensor with_dense_units(const at::Tensor& x) {
  const bool is_one_unit = x.dim() < 2 || x.size(0) == 1;
  return x.is_non_overlapping_and_dense() && (is_one_unit || x.stride(0) == elements_of_unit(x)) ? x : x.contiguous();
}

void check_adaptive(at::TensorList params, at::TensorList grads, double norm_type) {
  norm_of(norm_type);
  check_tensors(params);
  check_tensors(grads);
  TORCH_CHECK(params.size() == grads.size(), "adaptive_clip_grad_: got ", params.size(), " parameters, but ", grads.size(), " gradients");
  for (size_t i = 0; i < grads.size(); ++i) {
    TORCH_CHECK(same_dtype_and_device(params[i], grads[i]) && params[i].sizes() == grads[i].sizes(), "adaptive_clip_grad_: parameter ", i,
                " and its gradient must have the same dtype, device and shape");
  }
}

void adaptive_clip_grad_(at::TensorList params, at::TensorList grads, double clip_factor, double eps, double norm_type) {
  check_adaptive(params, grads, norm_type);
  check_writable(grads);
  if (grads.empty()) return;
  const auto launch = GK_LAUNCHER(grads.front(), adaptive_clip);
  const auto clip = [&](at::TensorList some_params, at::TensorList some_grads) {
    std::vector<UnitRun> runs;
    // Of each pair, to keep copies until the kernel has been launched.
    std::vector<std::pair<at::Tensor, at::Tensor>> dense;
    for (size_t i = 0; i < some_grads.size(); ++i) {
      if (some_grads[i].numel() == 0) continue;
      const auto& [param, grad] = dense.emplace_back(with_dense_units(some_params[i]), with_dense_units(some_grads[i]));
      const int64_t elements = elements_of_unit(grad);
      runs.push_back({dtype_of(grad), grad.numel() / elements, elements, param.const_data_ptr(), grad.data_ptr()});
    }
    launch(runs.data(), static_cast<int64_t>(runs.size()), norm_of(norm_type), clip_factor, eps);
    size_t next = 0;
    for (const at::Tensor& grad : some_grads) {
      if (grad.numel() == 0) continue;
      const at::Tensor& written = dense[next++].second;
      if (!written.is_same(grad)) grad.copy_(written);
    }
  };
  if (disjoint(grads)) return clip(params, grads);
  for (size_t i = 0; i < grads.size(); ++i) clip(params.slice(i, 1), grads.slice(i, 1));
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

void adaptive_clip_grad_meta(at::TensorList params, at::TensorList grads, double, double, double norm_type) {
  check_adaptive(params, grads, norm_type);
}

void add_clip_grad_kernels(torch::Library& m) {
  m.impl("grad_norms", on_device<grad_norms>);
  m.impl("clip_grads_with_norm_", on_device<clip_grads_with_norm_>);
  m.impl("clip_grad_value_", on_device<clip_grad_value_>);
  m.impl("adaptive_clip_grad_", on_device<adaptive_clip_grad_>);
}

}  // namespace

GK_LIBRARY_IMPL(CPU, m) { add_clip_grad_kernels(m); }
#if defined(GK_WITH_CUDA)
GK_LIBRARY_IMPL(CUDA, m) { add_clip_grad_kernels(m); }
#endif

GK_LIBRARY_IMPL(Meta, m) {
  m.impl("grad_norms", grad_norms_meta);
  m.impl("clip_grads_with_norm_", clip_grads_with_norm_meta);
  m.impl("clip_grad_value_", clip_grad_value_meta);
  m.impl("adaptive_clip_grad_", adaptive_clip_grad_meta);
}

}  // namespace gradkernels
