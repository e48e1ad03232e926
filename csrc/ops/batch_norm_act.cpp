// batch_norm_act's operators: check, allocate, describe the layout, hand to the kernels. The output takes x's memory format, as torch's.
// Cases that torch's batch norm treats apart (empty batches, one value a channel, mixed dtypes, statistics with gaps) go to it, and so do
// its errors.
#include "ops/batch_norm_act.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/relu6.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>

#include "common/allocate.h"
#include "common/check.h"
#include "ops/composite.h"
#include "ops/layout.h"

namespace gradkernels {

using composite::BatchNormActResult;
using composite::OptionalTensor;

namespace {

using math::Activation;
using math::ActivationKind;

Activation activation(std::string_view name, double parameter) {
  constexpr std::pair<std::string_view, ActivationKind> kKinds[] = {
      {"identity", ActivationKind::kIdentity},    {"relu", ActivationKind::kRelu}, {"relu6", ActivationKind::kRelu6},
      {"leaky_relu", ActivationKind::kLeakyRelu}, {"elu", ActivationKind::kElu},   {"swish", ActivationKind::kSwish}};
  for (const auto& [known, kind] : kKinds) {
    if (name == known) return {kind, parameter};
  }
  TORCH_CHECK_VALUE(false, "act must be one of identity, relu, relu6, leaky_relu, elu, swish, got '", name, "'");
}

bool is_given(const OptionalTensor& x) { return x.has_value() && x->defined(); }

const void* data_of(const OptionalTensor& x) { return is_given(x) ? x->const_data_ptr() : nullptr; }
const void* data_of(const at::Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }
void* mutable_data_of(const OptionalTensor& x) { return is_given(x) ? x->mutable_data_ptr() : nullptr; }

at::Tensor empty_mask(const at::Tensor& x, const Layout& layout, bool needed) {
  return at::empty_symint({needed ? mask_bytes(layout.rows, layout.channels, layout.inner) : c10::SymInt(0)}, x.options().dtype(at::kByte));
}

at::ScalarType parameter_dtype(const at::Tensor& x, std::initializer_list<OptionalTensor> parameters) {
  const auto first = std::find_if(parameters.begin(), parameters.end(), is_given);
  return first == parameters.end() ? x.scalar_type() : (*first)->scalar_type();
}

// Whether every given one holds a value a channel, all in one dtype: that of x, or float32 beside an x of 16 bits.
bool per_channel(const at::Tensor& x, std::initializer_list<OptionalTensor> parameters) {
  const at::ScalarType dtype = parameter_dtype(x, parameters);
  if (dtype != x.scalar_type() && !(dtype == at::kFloat && x.element_size() == 2)) return false;
  return std::all_of(parameters.begin(), parameters.end(), [&](const OptionalTensor& values) {
    return !is_given(values) || (values->scalar_type() == dtype && values->device() == x.device() && values->dim() == 1 &&
                                 values->sym_size(0) == x.sym_size(1) && values->is_contiguous());
  });
}

void check_residual(const at::Tensor& x, const OptionalTensor& residual) {
  if (!is_given(residual)) return;
  TORCH_CHECK(residual->sym_sizes() == x.sym_sizes(), "residual must have the shape of x, ", x.sym_sizes(), ", got ",
              residual->sym_sizes());
  TORCH_CHECK(residual->scalar_type() == x.scalar_type(), "residual must have the dtype of x, ", x.scalar_type(), ", got ",
              residual->scalar_type());
  TORCH_CHECK(residual->device() == x.device(), "residual must be on the device of x, ", x.device(), ", got ", residual->device());
}

void check_num_batches_tracked(const OptionalTensor& count) {
  TORCH_CHECK(!is_given(count) || (count->scalar_type() == at::kLong && count->numel() == 1),
              "num_batches_tracked must be one int64 element");
}

}  // namespace

bool composite::batch_norm_act_has_kernel(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                          const OptionalTensor& weight, const OptionalTensor& bias, bool training) {
  if (!has_kernel(x) || x.element_size() == 2 || x.dim() < 2 || x.dim() > 5 || x.sym_numel() == 0) return false;
  if (training ? x.sym_numel() == x.sym_size(1) : !is_given(running_mean)) return false;
  if (is_given(running_mean) != is_given(running_var)) return false;
  return per_channel(x, {running_mean, running_var, weight, bias});
}

at::Tensor composite::add_and_activate(at::Tensor z, const OptionalTensor& residual, std::string_view act, double act_param) {
  if (is_given(residual)) z = z + *residual;
  switch (activation(act, act_param).kind) {
    case ActivationKind::kIdentity:
      return z;
    case ActivationKind::kRelu:
      return at::relu(z);
    case ActivationKind::kRelu6:
      return at::relu6(z);
    case ActivationKind::kLeakyRelu:
      return at::leaky_relu(z, act_param);
    case ActivationKind::kElu:
      return at::elu(z, act_param);
    case ActivationKind::kSwish:
      return composite::swish(z, act_param);
  }
  TORCH_INTERNAL_ASSERT(false);
}

BatchNormActResult composite::batch_norm_act(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                             const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                                             const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
                                             double eps, std::string_view act, double act_param) {
  activation(act, act_param);
  check_residual(x, residual);
  check_num_batches_tracked(num_batches_tracked);
  const bool counts = training && is_given(num_batches_tracked);
  double factor = momentum.value_or(0.0);
  if (counts && !momentum.has_value()) factor = 1.0 / static_cast<double>(num_batches_tracked->item<int64_t>() + 1);
  const auto batch_norm = [&](const OptionalTensor& mean, const OptionalTensor& var) {
    return at::batch_norm(x, weight, bias, mean, var, training, factor, eps, at::globalContext().userEnabledCuDNN());
  };
  // ATen writes the running statistics before it finds that weight or bias is elsewhere: let it fail on copies.
  const bool elsewhere = (is_given(weight) && weight->device() != x.device()) || (is_given(bias) && bias->device() != x.device());
  if (elsewhere && is_given(running_mean) && is_given(running_var)) batch_norm(running_mean->clone(), running_var->clone());
  const at::Tensor z = batch_norm(running_mean, running_var);
  if (counts) num_batches_tracked->add_(1);
  const at::Tensor none = at::empty({0}, x.options());
  return {add_and_activate(z, residual, act, act_param), none.to(at::kDouble), none.to(at::kDouble), none.to(at::kByte)};
}

namespace {

BatchNormActResult batch_norm_act(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                  const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                                  c10::string_view act, double act_param) {
  if (!composite::batch_norm_act_has_kernel(x, running_mean, running_var, weight, bias, training)) {
    return composite::batch_norm_act(x, running_mean, running_var, weight, bias, residual, num_batches_tracked, training, momentum, eps,
                                     act, act_param);
  }
  const Activation activation_of_y = activation(act, act_param);
  check_residual(x, residual);
  check_num_batches_tracked(num_batches_tracked);
  const Layout layout(x);
  const at::Tensor source = x.contiguous(layout.format);
  const at::Tensor added = is_given(residual) ? residual->contiguous(layout.format) : at::Tensor();
  at::Tensor y = on_huge_pages(at::empty_like(source, layout.format));
  at::Tensor mean = at::empty_symint({layout.channels}, x.options().dtype(at::kDouble));
  at::Tensor invstd = at::empty_like(mean);
  at::Tensor mask = empty_mask(x, layout, added.defined() && activation_of_y.has_two_slopes());
  double factor = momentum.value_or(0.0);
  int64_t* count = training && is_given(num_batches_tracked) ? num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr;
  if (count != nullptr && !momentum.has_value()) factor = 1.0 / static_cast<double>(*count + 1);
  const DType parameters = dtype_of(parameter_dtype(x, {running_mean, running_var, weight, bias}));
  cpu::batch_norm_act_forward({dtype_of(x), parameters, layout.shape(), activation_of_y, training, factor, eps, source.const_data_ptr(),
                               data_of(added), data_of(weight), data_of(bias), mutable_data_of(running_mean), mutable_data_of(running_var),
                               mean.mutable_data_ptr<double>(), invstd.mutable_data_ptr<double>(), y.mutable_data_ptr(),
                               mask.numel() == 0 ? nullptr : mask.mutable_data_ptr<uint8_t>()});
  if (count != nullptr) ++*count;
  return {y, mean, invstd, mask};
}

BatchNormActResult batch_norm_act_meta(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                       const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                                       const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                                       c10::string_view act, double act_param) {
  if (!composite::batch_norm_act_has_kernel(x, running_mean, running_var, weight, bias, training)) {
    return composite::batch_norm_act(x, running_mean, running_var, weight, bias, residual, num_batches_tracked, training, momentum, eps,
                                     act, act_param);
  }
  const Activation activation_of_y = activation(act, act_param);
  check_residual(x, residual);
  check_num_batches_tracked(num_batches_tracked);
  const Layout layout(x);
  at::Tensor mean = at::empty_symint({layout.channels}, x.options().dtype(at::kDouble));
  return {at::empty_like(x, layout.format), mean, at::empty_like(mean),
          empty_mask(x, layout, is_given(residual) && activation_of_y.has_two_slopes())};
}

using BatchNormActGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The checks and the outputs of the backward operator, for kernels and tracing alike. Outputs nobody needs have no elements.
struct Backward {
  Activation act;
  Layout layout;
  BatchNormActGradients gradients;

  Backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd, const OptionalTensor& weight,
           const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask, c10::string_view name, double act_param,
           std::array<bool, 4> output_mask)
      : act(activation(name, act_param)), layout((check(grad_y, x, mean, invstd, weight, bias, residual), x)) {
    if (is_given(mask)) {
      TORCH_CHECK(act.has_two_slopes() && mask->scalar_type() == at::kByte && mask->device() == x.device() && mask->is_contiguous() &&
                      mask->sym_numel() == mask_bytes(layout.rows, layout.channels, layout.inner),
                  "batch_norm_act_backward: the mask does not fit act and x");
    } else {
      TORCH_CHECK(!is_given(residual) || !act.has_two_slopes(), "batch_norm_act_backward: ", name, " with a residual needs the mask");
    }
    const at::Tensor none = at::empty({0}, x.options());
    const at::TensorOptions of_parameters = x.options().dtype(parameter_dtype(x, {weight, bias}));
    gradients = {output_mask[0] ? at::empty_like(x, layout.format) : none,
                 output_mask[1] ? at::empty_symint({layout.channels}, of_parameters) : at::empty_like(none),
                 output_mask[2] ? at::empty_symint({layout.channels}, of_parameters) : at::empty_like(none),
                 output_mask[3] ? at::empty_like(x, layout.format) : at::empty_like(none)};
  }

 private:
  static void check(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd,
                    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual) {
    TORCH_CHECK_NOT_IMPLEMENTED(has_kernel(x), "\"batch_norm_act_backward\" not implemented for '", x.scalar_type(), "' on ", x.device());
    TORCH_CHECK(x.dim() >= 2 && x.dim() <= 5 && x.sym_numel() > 0,
                "batch_norm_act_backward: x must have 2 to 5 dimensions and elements, got ", x.sym_sizes());
    TORCH_CHECK(same_dtype_and_device(grad_y, x) && grad_y.sym_sizes() == x.sym_sizes(),
                "batch_norm_act_backward: grad_y must have x's dtype, device and shape ", x.sym_sizes(), ", got ", grad_y.sym_sizes());
    for (const at::Tensor& statistic : {mean, invstd}) {
      TORCH_CHECK(statistic.scalar_type() == at::kDouble && statistic.device() == x.device() && statistic.dim() == 1 &&
                      statistic.sym_size(0) == x.sym_size(1) && statistic.is_contiguous(),
                  "batch_norm_act_backward: mean and invstd must be float64 of ", x.sym_size(1), " elements");
    }
    TORCH_CHECK(per_channel(x, {weight, bias}),
                "batch_norm_act_backward: weight and bias must have x's dtype, or float32 beside one of 16 ", "bits, and ", x.sym_size(1),
                " elements");
    check_residual(x, residual);
  }
};

BatchNormActGradients batch_norm_act_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
                                              const at::Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& residual, const OptionalTensor& mask, bool training,
                                              c10::string_view act, double act_param, std::array<bool, 4> output_mask) {
  Backward b(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, output_mask);
  auto& [grad_x, grad_weight, grad_bias, grad_residual] = b.gradients;
  on_huge_pages(grad_x);
  on_huge_pages(grad_residual);
  const at::MemoryFormat format = b.layout.format;
  const at::Tensor source_of_grad_y = grad_y.contiguous(format);
  const at::Tensor source = x.contiguous(format);
  const at::Tensor added = is_given(residual) ? residual->contiguous(format) : at::Tensor();
  const auto wanted = [&](int i, const at::Tensor& gradient) { return output_mask[i] ? gradient.mutable_data_ptr() : nullptr; };
  cpu::batch_norm_act_backward({dtype_of(x), dtype_of(parameter_dtype(x, {weight, bias})), b.layout.shape(), b.act, training,
                                source_of_grad_y.const_data_ptr(), source.const_data_ptr(), data_of(added),
                                static_cast<const uint8_t*>(data_of(mask)), data_of(weight), data_of(bias), mean.const_data_ptr<double>(),
                                invstd.const_data_ptr<double>(), wanted(0, grad_x), wanted(1, grad_weight), wanted(2, grad_bias),
                                wanted(3, grad_residual)});
  return b.gradients;
}

BatchNormActGradients batch_norm_act_backward_meta(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
                                                   const at::Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                                   const OptionalTensor& residual, const OptionalTensor& mask, bool, c10::string_view act,
                                                   double act_param, std::array<bool, 4> output_mask) {
  return Backward(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, output_mask).gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) {
  m.impl("batch_norm_act", batch_norm_act);
  m.impl("batch_norm_act_backward", batch_norm_act_backward);
}

TORCH_LIBRARY_IMPL(gradkernels, Meta, m) {
  m.impl("batch_norm_act", batch_norm_act_meta);
  m.impl("batch_norm_act_backward", batch_norm_act_backward_meta);
}

// Devices without kernels.
TORCH_LIBRARY_IMPL(gradkernels, CompositeExplicitAutograd, m) { m.impl("batch_norm_act", composite::batch_norm_act); }

// vmap: ATen's operators have batching rules.
TORCH_LIBRARY_IMPL(gradkernels, FuncTorchBatched, m) { m.impl("batch_norm_act", composite::batch_norm_act); }

}  // namespace gradkernels
