// group_norm_act: checks, allocates, describes the layout, and calls the kernels. The output has the memory format of x.
// What has no kernel goes to torch's group norm, which also raises its own errors.
#include "ops/group_norm_act.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/ones_like.h>

#include "common/device.h"
#include "common/library.h"
#include "ops/batch_norm_act_arguments.h"
#include "ops/composite.h"

namespace gradkernels {

using composite::BatchNormActResult;

bool composite::group_norm_act_has_kernel(const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                                          const OptionalTensor& bias) {
  return kernels_take(x) && divides(num_groups, x) && x.sym_numel() >= kLeastPixels * x.sym_size(0) * x.sym_size(1) &&
         per_channel(x, {weight, bias});
}

at::Tensor composite::group_norm(const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
                                 double eps) {
  // With a bias and without a weight, ATen's backward raises an error.
  const bool lacks_weight = is_given(bias) && !is_given(weight) && x.dim() > 1 && bias->sym_sizes() == x.sym_sizes().slice(1, 1);
  const OptionalTensor scale = lacks_weight ? OptionalTensor(at::ones_like(*bias)) : weight;
  return at::group_norm(x, num_groups, scale, bias, eps, at::globalContext().userEnabledCuDNN());
}

BatchNormActResult composite::group_norm_act(const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                                             const OptionalTensor& bias, const OptionalTensor& residual, double eps, std::string_view act,
                                             double act_param) {
  activation(act, act_param);
  check_residual(x, residual);
  return without_statistics(add_and_activate(composite::group_norm(x, num_groups, weight, bias, eps), residual, act, act_param));
}

namespace {

BatchNormActResult group_norm_act(const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& residual, double eps, c10::string_view act, double act_param) {
  if (!composite::group_norm_act_has_kernel(x, num_groups, weight, bias)) {
    return composite::group_norm_act(x, num_groups, weight, bias, residual, eps, act, act_param);
  }
  const Forward f(x, residual, act, act_param, num_groups);
  const at::Tensor mean = f.statistic(), invstd = f.statistic();
  const Operands operands(f.layout, x, residual);
  BatchNormForward p = f.arguments(operands, weight, bias, mean, invstd);
  p.training = true;
  p.eps = eps;
  GK_LAUNCHER(x, group_norm_act_forward)(p);
  return {f.y, mean, invstd, f.mask};
}

BatchNormActResult group_norm_act_meta(const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& residual, double eps, c10::string_view act, double act_param) {
  if (!composite::group_norm_act_has_kernel(x, num_groups, weight, bias)) {
    return composite::group_norm_act(x, num_groups, weight, bias, residual, eps, act, act_param);
  }
  const Forward f(x, residual, act, act_param, num_groups);
  return {f.y, f.statistic(), f.statistic(), f.mask};
}

BatchNormActGradients group_norm_act_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
                                              const at::Tensor& invstd, int64_t num_groups, const OptionalTensor& weight,
                                              const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
                                              c10::string_view act, double act_param, std::array<bool, 4> output_mask) {
  const Backward b(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, output_mask, num_groups);
  const Operands operands(b.layout, x, residual, grad_y);
  GK_LAUNCHER(x, group_norm_act_backward)(b.arguments(operands, mean, invstd, weight, bias, mask, /*training=*/true));
  return b.gradients();
}

BatchNormActGradients group_norm_act_backward_meta(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
                                                   const at::Tensor& invstd, int64_t num_groups, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask,
                                                   c10::string_view act, double act_param, std::array<bool, 4> output_mask) {
  return Backward(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, output_mask, num_groups).gradients();
}

// The checks and the outputs of group_norm_act_elemt.
Forward elemt(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd, int64_t num_groups, const OptionalTensor& weight,
              const OptionalTensor& bias, const OptionalTensor& residual, std::string_view act, double act_param) {
  TORCH_CHECK(composite::group_norm_act_has_kernel(x, num_groups, weight, bias),
              "group_norm_act_elemt: there is no kernel for these arguments");
  Forward f(x, residual, act, act_param, num_groups);
  for (const at::Tensor& statistic : {mean, invstd}) check_statistic(statistic, x, f.layout);
  return f;
}

std::tuple<at::Tensor, at::Tensor> group_norm_act_elemt(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd,
                                                        int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
                                                        const OptionalTensor& residual, c10::string_view act, double act_param) {
  const Forward f = elemt(x, mean, invstd, num_groups, weight, bias, residual, act, act_param);
  GK_LAUNCHER(x, group_norm_act_elemt)(f.arguments(Operands(f.layout, x, residual), weight, bias, mean, invstd));
  return {f.y, f.mask};
}

std::tuple<at::Tensor, at::Tensor> group_norm_act_elemt_meta(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd,
                                                             int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
                                                             const OptionalTensor& residual, c10::string_view act, double act_param) {
  const Forward f = elemt(x, mean, invstd, num_groups, weight, bias, residual, act, act_param);
  return {f.y, f.mask};
}

void add_group_norm_act_kernels(torch::Library& m) {
  m.impl("group_norm_act", on_device<group_norm_act>);
  m.impl("group_norm_act_backward", on_device<group_norm_act_backward>);
  m.impl("group_norm_act_elemt", on_device<group_norm_act_elemt>);
}

}  // namespace

GK_LIBRARY_IMPL(CPU, m) { add_group_norm_act_kernels(m); }
#if defined(GK_WITH_CUDA)
GK_LIBRARY_IMPL(CUDA, m) { add_group_norm_act_kernels(m); }
#endif

GK_LIBRARY_IMPL(Meta, m) {
  m.impl("group_norm_act", group_norm_act_meta);
  m.impl("group_norm_act_backward", group_norm_act_backward_meta);
  m.impl("group_norm_act_elemt", group_norm_act_elemt_meta);
}

// For devices without kernels, and for vmap: ATen's operators have batching rules.
GK_LIBRARY_IMPL(CompositeExplicitAutograd, m) { m.impl("group_norm_act", composite::group_norm_act); }
GK_LIBRARY_IMPL(FuncTorchBatched, m) { m.impl("group_norm_act", composite::group_norm_act); }

}  // namespace gradkernels
