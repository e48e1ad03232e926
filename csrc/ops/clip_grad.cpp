// The operators over lists of gradients, clipping and RMSprop: describe the tensors as runs of elements, hand them to the kernels. A
// gradient with gaps goes through a dense copy. Gradients that may share memory are written one after the other, in the list's order.
#include "ops/clip_grad.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/device.h"
#include "math/clip_grad.h"
#include "ops/optim.h"

namespace gradkernels {
namespace {

Norm norm_of(double norm_type) {
  if (norm_type == 2.0) return Norm::kTwo;
  if (norm_type == 1.0) return Norm::kOne;
  TORCH_CHECK_VALUE(norm_type == std::numeric_limits<double>::infinity(), "norm_type must be 1, 2 or inf, got ", norm_type);
  return Norm::kInfinity;
}

// All for kernels, on one device.
void check_tensors(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.device() == tensors.front().device(),
                "Expected all tensors to be on the same device, but found at least two devices, ", tensors.front().device(), " and ",
                tensor.device(), "!");
    TORCH_CHECK_NOT_IMPLEMENTED(has_kernel(tensor), "\"clip_grad\" not implemented for '", tensor.scalar_type(), "' on ", tensor.device());
  }
}

Run run_of(const at::Tensor& dense) { return {dtype_of(dense), dense.numel(), dense.data_ptr()}; }

// Whether no two tensors can share memory, judged by their first and last elements.
bool disjoint(at::TensorList tensors) {
  std::vector<std::pair<uintptr_t, uintptr_t>> extents;
  extents.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    int64_t last = tensor.numel() - 1;
    if (!tensor.is_non_overlapping_and_dense()) {
      last = 0;
      for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    }
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    extents.emplace_back(begin, begin + static_cast<uintptr_t>(last + 1) * tensor.element_size());
  }
  std::sort(extents.begin(), extents.end());
  return std::adjacent_find(extents.begin(), extents.end(), [](const auto& a, const auto& b) { return b.first < a.second; }) ==
         extents.end();
}

// Calls kernel(runs, count) so that it writes every element of every gradient.
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

// Before anything is written.
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
  // Read where the gradients lie, so that nobody waits for a GPU.
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

// Every list but an empty one has a tensor for each parameter, of its dtype and strides, without gaps.
void check_rmsprop(at::TensorList params, std::initializer_list<at::TensorList> lists) {
  check_tensors(params);
  for (const at::TensorList& list : lists) {
    if (list.empty()) continue;
    TORCH_CHECK(list.size() == params.size(), "rmsprop_: ", params.size(), " parameters and a list of ", list.size(), " tensors");
    for (size_t i = 0; i < params.size(); ++i) {
      TORCH_CHECK(same_dtype_and_device(list[i], params[i]) && list[i].sizes() == params[i].sizes() &&
                      list[i].strides() == params[i].strides() && params[i].is_non_overlapping_and_dense(),
                  "rmsprop_: gradient and state of parameter ", i, " must be dense and have its dtype, shape and strides");
    }
  }
}

void rmsprop_(at::TensorList params, at::TensorList grads, at::TensorList square_avgs, at::TensorList grad_avgs,
              at::TensorList momentum_buffers, double lr, double alpha, double eps, double weight_decay, double momentum,
              double grad_coefficient) {
  check_rmsprop(params, {grads, square_avgs, grad_avgs, momentum_buffers});
  TORCH_CHECK(grads.size() == params.size() && square_avgs.size() == params.size(), "rmsprop_: a parameter without gradient or square_avg");
  const math::RmspropOptions options{lr, alpha, eps, weight_decay, momentum, grad_coefficient};
  std::vector<RmspropRun> runs;
  runs.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    runs.push_back({dtype_of(params[i]), params[i].numel(), params[i].data_ptr(), grads[i].data_ptr(), square_avgs[i].data_ptr(),
                    grad_avgs.empty() ? nullptr : grad_avgs[i].data_ptr(),
                    momentum_buffers.empty() ? nullptr : momentum_buffers[i].data_ptr()});
  }
  if (params.empty()) return;
  const auto launch = GK_LAUNCHER(params.front(), rmsprop);
  if (disjoint(params)) {
    launch(runs.data(), static_cast<int64_t>(runs.size()), options);
  } else {
    for (const RmspropRun& run : runs) launch(&run, 1, options);
  }
}

// Shapes alone, for tracing.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> grad_norms_meta(at::TensorList grads, double norm_type) {
  norm_of(norm_type);
  check_tensors(grads);
  const at::TensorOptions real = at::TensorOptions(at::kDouble).device(at::kMeta);
  const int64_t count = static_cast<int64_t>(grads.size());
  return {at::empty({count}, real), at::empty({count}, real), at::empty({count}, real.dtype(at::kLong)), at::empty({}, real)};
}

void clip_grads_with_norm_meta(at::TensorList grads, double, const at::Tensor&) { check_tensors(grads); }

void clip_grad_value_meta(at::TensorList grads, double) { check_tensors(grads); }

void rmsprop_meta(at::TensorList params, at::TensorList grads, at::TensorList square_avgs, at::TensorList grad_avgs,
                  at::TensorList momentum_buffers, double, double, double, double, double, double) {
  check_rmsprop(params, {grads, square_avgs, grad_avgs, momentum_buffers});
}

void add_kernels(torch::Library& m) {
  m.impl("grad_norms", on_device<grad_norms>);
  m.impl("clip_grads_with_norm_", on_device<clip_grads_with_norm_>);
  m.impl("clip_grad_value_", on_device<clip_grad_value_>);
  m.impl("rmsprop_", on_device<rmsprop_>);
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) { add_kernels(m); }
#if defined(GK_WITH_CUDA)
TORCH_LIBRARY_IMPL(gradkernels, CUDA, m) { add_kernels(m); }
#endif

TORCH_LIBRARY_IMPL(gradkernels, Meta, m) {
  m.impl("grad_norms", grad_norms_meta);
  m.impl("clip_grads_with_norm_", clip_grads_with_norm_meta);
  m.impl("clip_grad_value_", clip_grad_value_meta);
  m.impl("rmsprop_", rmsprop_meta);
}

}  // namespace gradkernels
