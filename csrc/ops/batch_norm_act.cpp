// batch_norm_act: checks, allocates, describes the layout, and calls the kernels. As in torch, the output has
// the memory format of x. Special cases of torch's batch norm (empty batches, one value per channel, mixed
// dtypes, statistics with gaps) go to torch, which also raises its own errors.
#include "ops/batch_norm_act.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/mish_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/relu6.h>
#include <ATen/ops/threshold_backward.h>

#include <string>

#include "common/device.h"
#include "common/library.h"
#include "math/batch_norm_act.h"
#include "ops/batch_norm_act_arguments.h"
#include "ops/composite.h"

namespace gradkernels {

using composite::BatchNormActResult;
using math::ActivationKind;

math::Activation activation(std::string_view act, double act_param) {
  uint8_t count = 0;
  for (const char* name; (name = math::traits_of(static_cast<ActivationKind>(count)).name) != nullptr; ++count) {
    if (act == name) return {static_cast<ActivationKind>(count), act_param};
  }
  std::string known = math::traits_of(ActivationKind{}).name;
  for (uint8_t i = 1; i < count; ++i) known += std::string(", ") + math::traits_of(static_cast<ActivationKind>(i)).name;
  TORCH_CHECK_VALUE(false, "act must be one of ", known, ", got '", act, "'");
}

namespace {

// An activation and its gradient at z, as composites of ATen's operators.
struct Composite {
  at::Tensor (*forward)(const at::Tensor& z, double parameter);
  at::Tensor (*backward)(const at::Tensor& grad_y, const at::Tensor& z, double parameter);
};

Composite composite_of(ActivationKind kind) {
  using at::Tensor;
  switch (kind) {
    case ActivationKind::kIdentity:
      return {[](const Tensor& z, double) { return z; }, [](const Tensor& grad_y, const Tensor&, double) { return grad_y; }};
    case ActivationKind::kRelu:
      return {[](const Tensor& z, double) { return at::relu(z); },
              [](const Tensor& grad_y, const Tensor& z, double) { return at::threshold_backward(grad_y, z, 0); }};
    case ActivationKind::kRelu6:
      return {[](const Tensor& z, double) { return at::relu6(z); },
              [](const Tensor& grad_y, const Tensor& z, double) { return at::hardtanh_backward(grad_y, z, 0, 6); }};
    case ActivationKind::kLeakyRelu:
      return {[](const Tensor& z, double slope) { return at::leaky_relu(z, slope); },
              [](const Tensor& grad_y, const Tensor& z, double slope) { return at::leaky_relu_backward(grad_y, z, slope, false); }};
    case ActivationKind::kElu:
      return {[](const Tensor& z, double alpha) { return at::elu(z, alpha); },
              [](const Tensor& grad_y, const Tensor& z, double alpha) { return at::elu_backward(grad_y, alpha, 1, 1, false, z); }};
    case ActivationKind::kSwish:
      return {composite::swish, composite::swish_backward};
    case ActivationKind::kHardswish:
      return {[](const Tensor& z, double) { return at::hardswish(z); },
              [](const Tensor& grad_y, const Tensor& z, double) { return at::hardswish_backward(grad_y, z); }};
    case ActivationKind::kGelu:
      return {[](const Tensor& z, double) { return at::gelu(z); },
              [](const Tensor& grad_y, const Tensor& z, double) { return at::gelu_backward(grad_y, z); }};
    case ActivationKind::kGeluTanh:
      return {[](const Tensor& z, double) { return at::gelu(z, "tanh"); },
              [](const Tensor& grad_y, const Tensor& z, double) { return at::gelu_backward(grad_y, z, "tanh"); }};
    case ActivationKind::kMish:
      return {[](const Tensor& z, double) { return at::mish(z); },
              [](const Tensor& grad_y, const Tensor& z, double) { return at::mish_backward(grad_y, z); }};
  }
  TORCH_INTERNAL_ASSERT(false);
}

// The weight of this batch in the running statistics: the momentum or, without one, the weight in an average
// over all batches up to this one.
double exponential_average_factor(std::optional<double> momentum, const OptionalTensor& num_batches_tracked) {
  if (momentum.has_value() || !is_given(num_batches_tracked)) return momentum.value_or(0.0);
  return math::cumulative_momentum(num_batches_tracked->item<double>());
}

}  // namespace

bool composite::batch_norm_act_has_kernel(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& num_batches_tracked, bool training) {
  if (!kernels_take(x)) return false;
  if (is_given(num_batches_tracked) && !(num_batches_tracked->device() == x.device() && num_batches_tracked->scalar_type() == at::kLong)) {
    return false;
  }
  if (training ? x.sym_numel() == x.sym_size(1) : !is_given(running_mean)) return false;
  if (is_given(running_mean) != is_given(running_var)) return false;
  return per_channel(x, {running_mean, running_var, weight, bias});
}

at::Tensor composite::add_and_activate(at::Tensor z, const OptionalTensor& residual, std::string_view act, double act_param) {
  if (is_given(residual)) z = z + *residual;
  return composite_of(activation(act, act_param).kind).forward(z, act_param);
}

at::Tensor composite::activation_backward(const at::Tensor& grad_y, const at::Tensor& z, std::string_view act, double act_param) {
  return composite_of(activation(act, act_param).kind).backward(grad_y, z, act_param);
}

bool composite::gradient_is_grad_y(std::string_view act) {
  return math::traits_of(activation(act, 0.0).kind).gradient_reads == math::GradientReads::kNothing;
}

bool composite::gradient_reads_value(std::string_view act) {
  return math::traits_of(activation(act, 0.0).kind).gradient_reads == math::GradientReads::kValue;
}

BatchNormActResult composite::batch_norm_act(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                             const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                                             const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
                                             double eps, std::string_view act, double act_param) {
  activation(act, act_param);
  check_residual(x, residual);
  check_num_batches_tracked(num_batches_tracked);
  const OptionalTensor counted = training ? num_batches_tracked : OptionalTensor();
  const double factor = exponential_average_factor(momentum, counted);
  // ATen writes the running statistics before it checks dtypes and devices. If it may raise an error, it gets
  // copies.
  const bool copies = training && is_given(running_mean) && is_given(running_var) && x.dim() >= 2 &&
                      !per_channel(x, {running_mean, running_var, weight, bias});
  const OptionalTensor written_mean = copies ? OptionalTensor(running_mean->clone()) : running_mean;
  const OptionalTensor written_var = copies ? OptionalTensor(running_var->clone()) : running_var;
  // For an (N, C) input, ATen's backward reads tensors that are not contiguous past their end. (In training,
  // the statistics are written and must not be copies.)
  const auto contiguous = [](const OptionalTensor& values) { return is_given(values) ? OptionalTensor(values->contiguous()) : values; };
  const OptionalTensor read_mean = training ? written_mean : contiguous(running_mean);
  const OptionalTensor read_var = training ? written_var : contiguous(running_var);
  const at::Tensor z =
      at::batch_norm(x, contiguous(weight), bias, read_mean, read_var, training, factor, eps, at::globalContext().userEnabledCuDNN());
  const at::Tensor y = add_and_activate(z, residual, act, act_param);
  if (copies) {
    running_mean->copy_(*written_mean);
    running_var->copy_(*written_var);
  }
  if (is_given(counted)) counted->add_(1);
  return without_statistics(y);
}

BatchNormActResult composite::without_statistics(const at::Tensor& y) {
  const auto none = [&](at::ScalarType dtype) { return at::empty({0}, y.options().dtype(dtype)); };
  return {y, none(at::kDouble), none(at::kDouble), none(at::kByte)};
}

namespace {

BatchNormActResult batch_norm_act(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                  const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                                  c10::string_view act, double act_param) {
  if (!composite::batch_norm_act_has_kernel(x, running_mean, running_var, weight, bias, num_batches_tracked, training)) {
    return composite::batch_norm_act(x, running_mean, running_var, weight, bias, residual, num_batches_tracked, training, momentum, eps,
                                     act, act_param);
  }
  const Forward f(x, residual, act, act_param);
  check_num_batches_tracked(num_batches_tracked);
  const Operands operands(f.layout, x, residual);
  const at::Tensor mean = f.statistic(), invstd = f.statistic();
  BatchNormForward p = f.arguments(operands, weight, bias, mean, invstd);
  p.parameter_dtype = dtype_of(parameter_dtype(x, {running_mean, running_var, weight, bias}));
  p.training = training;
  p.eps = eps;
  p.running_mean = mutable_data_of(running_mean);
  p.running_var = mutable_data_of(running_var);
  const OptionalTensor counted = training ? num_batches_tracked : OptionalTensor();
  const at::Tensor batches = batches_on_device_of(x, counted, momentum);
  p.momentum = momentum.value_or(0.0);
  p.batches = data_of_batches(batches);
  p.counted = counted_by_kernel(x, counted);
  GK_LAUNCHER(x, batch_norm_act_forward)(p);
  if (is_given(counted) && p.counted == nullptr) count_batch(*counted);
  return {f.y, mean, invstd, f.mask};
}

BatchNormActResult batch_norm_act_meta(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                       const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                                       const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                                       c10::string_view act, double act_param) {
  if (!composite::batch_norm_act_has_kernel(x, running_mean, running_var, weight, bias, num_batches_tracked, training)) {
    return composite::batch_norm_act(x, running_mean, running_var, weight, bias, residual, num_batches_tracked, training, momentum, eps,
                                     act, act_param);
  }
  const Forward f(x, residual, act, act_param);
  check_num_batches_tracked(num_batches_tracked);
  return {f.y, f.statistic(), f.statistic(), f.mask};
}

BatchNormActGradients batch_norm_act_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
                                              const at::Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& residual, const OptionalTensor& mask, bool training,
                                              c10::string_view act, double act_param, std::array<bool, 4> output_mask) {
  const Backward b(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, output_mask);
  GK_LAUNCHER(x, batch_norm_act_backward)(b.arguments(Operands(b.layout, x, residual, grad_y), mean, invstd, weight, bias, mask, training));
  return b.gradients();
}

BatchNormActGradients batch_norm_act_backward_meta(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
                                                   const at::Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                                   const OptionalTensor& residual, const OptionalTensor& mask, bool, c10::string_view act,
                                                   double act_param, std::array<bool, 4> output_mask) {
  return Backward(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, output_mask).gradients();
}

void add_batch_norm_act_kernels(torch::Library& m) {
  m.impl("batch_norm_act", on_device<batch_norm_act>);
  m.impl("batch_norm_act_backward", on_device<batch_norm_act_backward>);
}

}  // namespace

GK_LIBRARY_IMPL(CPU, m) { add_batch_norm_act_kernels(m); }
#if defined(GK_WITH_CUDA)
GK_LIBRARY_IMPL(CUDA, m) { add_batch_norm_act_kernels(m); }
#endif

GK_LIBRARY_IMPL(Meta, m) {
  m.impl("batch_norm_act", batch_norm_act_meta);
  m.impl("batch_norm_act_backward", batch_norm_act_backward_meta);
}

// For devices without kernels.
GK_LIBRARY_IMPL(CompositeExplicitAutograd, m) { m.impl("batch_norm_act", composite::batch_norm_act); }

// For vmap: ATen's operators have batching rules.
GK_LIBRARY_IMPL(FuncTorchBatched, m) { m.impl("batch_norm_act", composite::batch_norm_act); }

// torch's fallback resolves the negative bit of the arguments that an operator reads. For arguments that an
// operator writes, it takes the first results as the new values, and fails.
GK_LIBRARY_IMPL(Negative, m) { m.impl("batch_norm_act", torch::CppFunction::makeFallthrough()); }

}  // namespace gradkernels
