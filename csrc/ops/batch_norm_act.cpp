// batch_norm_act's operators: check, allocate, describe the layout, hand to the kernels. The output takes x's memory format, as torch's.
// Cases that torch's batch norm treats apart (empty batches, one value a channel, mixed dtypes, statistics with gaps) go to it, and so do
// its errors.
#include "ops/batch_norm_act.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/relu6.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <string>

#include "common/allocate.h"
#include "common/check.h"
#include "common/device.h"
#include "math/batch_norm_act.h"
#include "ops/composite.h"
#include "ops/layout.h"

namespace gradkernels {

using composite::BatchNormActResult;
using composite::OptionalTensor;

namespace {

using math::Activation;
using math::ActivationKind;

Activation activation(std::string_view name, double parameter) {
  std::string known;
  for (uint8_t i = 0;; ++i) {
    const ActivationKind kind = static_cast<ActivationKind>(i);
    const char* const kind_name = math::traits_of(kind).name;
    TORCH_CHECK_VALUE(kind_name != nullptr, "act must be one of ", known, ", got '", name, "'");
    if (name == kind_name) return {kind, parameter};
    known += (i == 0 ? "" : ", ") + std::string(kind_name);
  }
}

// An activation, and its gradient at z, composed of ATen's operators.
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
  }
  TORCH_INTERNAL_ASSERT(false);
}

bool is_given(const OptionalTensor& x) { return x.has_value() && x->defined(); }

const void* data_of(const OptionalTensor& x) { return is_given(x) ? x->const_data_ptr() : nullptr; }
const void* data_of(const at::Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }
void* mutable_data_of(const OptionalTensor& x) { return is_given(x) ? x->mutable_data_ptr() : nullptr; }

at::Tensor empty_mask(const at::Tensor& x, const Layout& layout, bool needed) {
  return at::empty_symint({needed ? mask_bytes(layout.rows, layout.channels, layout.inner) : c10::SymInt(0)}, x.options().dtype(at::kByte));
}

bool kernels_take(const at::Tensor& x) { return has_kernel(x) && x.dim() >= 2 && x.dim() <= 5 && x.sym_numel() > 0; }

at::ScalarType parameter_dtype(const at::Tensor& x, std::initializer_list<OptionalTensor> parameters) {
  const auto first = std::find_if(parameters.begin(), parameters.end(), is_given);
  return first == parameters.end() ? x.scalar_type() : (*first)->scalar_type();
}

// Whether every given one holds a value a channel in memory, all in one dtype: that of x, or float32 beside an x of 16 bits.
bool per_channel(const at::Tensor& x, std::initializer_list<OptionalTensor> parameters) {
  const at::ScalarType dtype = parameter_dtype(x, parameters);
  if (dtype != x.scalar_type() && !(dtype == at::kFloat && x.element_size() == 2)) return false;
  return std::all_of(parameters.begin(), parameters.end(), [&](const OptionalTensor& values) {
    return !is_given(values) ||
           (values->scalar_type() == dtype && values->device() == x.device() && values->layout() == at::kStrided && values->dim() == 1 &&
            values->sym_size(0) == x.sym_size(1) && values->is_contiguous() && !values->is_neg());
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

// What can be added to once the running statistics are written; torch's bool, for one, cannot.
bool can_count(const at::Tensor& x) {
  const at::ScalarType dtype = x.scalar_type();
  const bool of_numbers = at::isIntegralType(dtype, /*includeBool=*/false) || dtype == at::kFloat || dtype == at::kDouble ||
                          dtype == at::kBFloat16 || dtype == at::kHalf;
  return of_numbers && x.layout() == at::kStrided && !x.is_nested() && !x._is_zerotensor();
}

void check_num_batches_tracked(const OptionalTensor& count) {
  TORCH_CHECK(!is_given(count) || (can_count(*count) && count->sym_numel() == 1), "num_batches_tracked must be one number, got ",
              count->scalar_type(), " of layout ", count->layout(), " and shape ", count->sym_sizes());
}

// The weight of this batch in the running statistics; without a momentum that of an average over the batches counted so far and this one.
double exponential_average_factor(std::optional<double> momentum, const OptionalTensor& num_batches_tracked) {
  if (momentum.has_value() || !is_given(num_batches_tracked)) return momentum.value_or(0.0);
  return math::cumulative_momentum(num_batches_tracked->item<double>());
}

// The number of batches where x lies, so that nobody waits for a GPU: only where momentum, not given, is made of it.
at::Tensor batches_beside(const at::Tensor& x, const OptionalTensor& num_batches_tracked, std::optional<double> momentum) {
  if (!is_given(num_batches_tracked) || momentum.has_value()) return {};
  return num_batches_tracked->to(x.device(), at::kLong).resolve_neg();
}

const int64_t* data_of_batches(const at::Tensor& batches) { return batches.defined() ? batches.const_data_ptr<int64_t>() : nullptr; }

void count_batch(const at::Tensor& num_batches_tracked) {
  if (num_batches_tracked.is_cpu() && num_batches_tracked.scalar_type() == at::kLong && !num_batches_tracked.is_neg()) {
    ++*num_batches_tracked.mutable_data_ptr<int64_t>();
  } else {
    num_batches_tracked.add_(1);
  }
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
  // ATen writes the running statistics before it finds that one of the others is of another dtype or elsewhere: let it write copies then.
  const bool copies = training && is_given(running_mean) && is_given(running_var) && x.dim() >= 2 &&
                      !per_channel(x, {running_mean, running_var, weight, bias});
  const OptionalTensor written_mean = copies ? OptionalTensor(running_mean->clone()) : running_mean;
  const OptionalTensor written_var = copies ? OptionalTensor(running_var->clone()) : running_var;
  // ATen's backward of an (N, C) input reads them past their end where they are not contiguous. In training the statistics are written.
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
  const at::Tensor none = at::empty({0}, x.options());
  return {y, none.to(at::kDouble), none.to(at::kDouble), none.to(at::kByte)};
}

namespace {

// In the layout of the kernels, copied where they are not.
struct Operands {
  at::Tensor x, residual, grad_y;

  Operands(const Layout& layout, const at::Tensor& x, const OptionalTensor& residual, const at::Tensor& grad_y = {})
      : x(x.contiguous(layout.format)),
        residual(is_given(residual) ? residual->resolve_neg().contiguous(layout.format) : at::Tensor()),
        grad_y(grad_y.defined() ? grad_y.contiguous(layout.format) : at::Tensor()) {}
};

// The checks and the outputs of the forward operators, for kernels and tracing alike.
struct Forward {
  Activation act;
  Layout layout;
  at::Tensor y, mask;

  Forward(const at::Tensor& x, const OptionalTensor& residual, c10::string_view name, double act_param)
      : act(activation(name, act_param)),
        layout((check_residual(x, residual), x)),
        y(at::empty_like(x, layout.format)),
        mask(empty_mask(x, layout, is_given(residual) && act.has_two_slopes())) {}

  // What the kernels are given, but for running statistics.
  BatchNormForward problem(const Operands& operands, const OptionalTensor& weight, const OptionalTensor& bias, const at::Tensor& mean,
                           const at::Tensor& invstd) const {
    BatchNormForward p{};
    p.dtype = dtype_of(y);
    p.parameter_dtype = dtype_of(parameter_dtype(y, {weight, bias}));
    p.shape = layout.shape();
    p.act = act;
    p.x = operands.x.const_data_ptr();
    p.residual = data_of(operands.residual);
    p.weight = data_of(weight);
    p.bias = data_of(bias);
    p.mean = mean.mutable_data_ptr<double>();
    p.invstd = invstd.mutable_data_ptr<double>();
    p.y = on_huge_pages(y).mutable_data_ptr();
    p.mask = mask.numel() == 0 ? nullptr : mask.mutable_data_ptr<uint8_t>();
    return p;
  }
};

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
  at::Tensor mean = at::empty_symint({f.layout.channels}, x.options().dtype(at::kDouble));
  at::Tensor invstd = at::empty_like(mean);
  BatchNormForward p = f.problem(operands, weight, bias, mean, invstd);
  p.parameter_dtype = dtype_of(parameter_dtype(x, {running_mean, running_var, weight, bias}));
  p.training = training;
  p.eps = eps;
  p.running_mean = mutable_data_of(running_mean);
  p.running_var = mutable_data_of(running_var);
  const OptionalTensor counted = training ? num_batches_tracked : OptionalTensor();
  const at::Tensor batches = batches_beside(x, counted, momentum);
  p.momentum = momentum.value_or(0.0);
  p.batches = data_of_batches(batches);
  GK_LAUNCHER(x, batch_norm_act_forward)(p);
  if (is_given(counted)) count_batch(*counted);
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
  at::Tensor mean = at::empty_symint({f.layout.channels}, x.options().dtype(at::kDouble));
  return {f.y, mean, at::empty_like(mean), f.mask};
}

using BatchNormActGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The checks and the outputs of the backward operator, for kernels and tracing alike. Outputs nobody needs have no elements.
struct Backward {
  Activation act;
  Layout layout;
  at::Tensor grad_x, grad_weight, grad_bias, grad_residual;

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
    const at::TensorOptions of_parameters = x.options().dtype(parameter_dtype(x, {weight, bias}));
    const auto like_x = [&](bool wanted) { return wanted ? at::empty_like(x, layout.format) : at::empty({0}, x.options()); };
    const auto like_weight = [&](bool wanted) { return at::empty_symint({wanted ? layout.channels : c10::SymInt(0)}, of_parameters); };
    grad_x = like_x(output_mask[0]);
    grad_weight = like_weight(output_mask[1]);
    grad_bias = like_weight(output_mask[2]);
    grad_residual = like_x(output_mask[3]);
  }

  BatchNormActGradients gradients() const { return {grad_x, grad_weight, grad_bias, grad_residual}; }

  // What the kernels are given.
  BatchNormBackward problem(const Operands& operands, const at::Tensor& mean, const at::Tensor& invstd, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& mask, bool training) const {
    const auto written = [](const at::Tensor& gradient) { return gradient.numel() == 0 ? nullptr : gradient.mutable_data_ptr(); };
    BatchNormBackward p{};
    p.dtype = dtype_of(operands.x);
    p.parameter_dtype = dtype_of(grad_weight);
    p.shape = layout.shape();
    p.act = act;
    p.training = training;
    p.grad_y = operands.grad_y.const_data_ptr();
    p.x = operands.x.const_data_ptr();
    p.residual = data_of(operands.residual);
    p.mask = static_cast<const uint8_t*>(data_of(mask));
    p.weight = data_of(weight);
    p.bias = data_of(bias);
    p.mean = mean.const_data_ptr<double>();
    p.invstd = invstd.const_data_ptr<double>();
    p.grad_x = written(on_huge_pages(grad_x));
    p.grad_weight = written(grad_weight);
    p.grad_bias = written(grad_bias);
    p.grad_residual = written(on_huge_pages(grad_residual));
    return p;
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
  const Backward b(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, output_mask);
  GK_LAUNCHER(x, batch_norm_act_backward)(b.problem(Operands(b.layout, x, residual, grad_y), mean, invstd, weight, bias, mask, training));
  return b.gradients();
}

BatchNormActGradients batch_norm_act_backward_meta(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
                                                   const at::Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                                   const OptionalTensor& residual, const OptionalTensor& mask, bool, c10::string_view act,
                                                   double act_param, std::array<bool, 4> output_mask) {
  return Backward(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, output_mask).gradients();
}

// ---- The parts, between which many processes exchange what they have found

bool parts_have_kernel(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias) {
  return kernels_take(x) && per_channel(x, {weight, bias});
}

void check_part(const at::Tensor& x) {
  TORCH_CHECK_NOT_IMPLEMENTED(at::isFloatingType(x.scalar_type()), "\"batch_norm\" not implemented for '", x.scalar_type(), "'");
  TORCH_CHECK(x.dim() >= 2, "batch_norm_act: x must have at least 2 dimensions, got ", x.sym_sizes());
}

void check_statistic(const at::Tensor& statistic, const at::Tensor& x, int64_t values_per_channel) {
  TORCH_CHECK(statistic.scalar_type() == at::kDouble && statistic.device() == x.device() && statistic.dim() == 1 &&
                  statistic.sym_size(0) == values_per_channel * x.sym_size(1) && statistic.is_contiguous(),
              "batch_norm_act: statistics must be float64 of ", values_per_channel, " values a channel, on the device of x");
}

void check_count(const at::Tensor& count, const at::Tensor& x) {
  TORCH_CHECK(count.scalar_type() == at::kDouble && count.device() == x.device() && count.dim() == 1 && count.sym_size(0) == 1,
              "batch_norm_act: count must be float64 of one element, on the device of x");
}

// Composed of ATen's operators: for devices and dtypes without a kernel, empty shares of a batch included. Nothing here waits for a device.
namespace parts {

std::vector<int64_t> reduced_dims(const at::Tensor& x) {
  std::vector<int64_t> dims = {0};
  for (int64_t d = 2; d < x.dim(); ++d) dims.push_back(d);
  return dims;
}

at::Tensor spread(const at::Tensor& of_channels, const at::Tensor& x) {
  std::vector<int64_t> shape(x.dim(), 1);
  shape[1] = -1;
  return of_channels.view(shape);
}

// A tensor of its own, in x's dtype and memory format.
at::Tensor as_output(const at::Tensor& computed, const at::Tensor& x) { return at::empty_like(x, Layout(x).format).copy_(computed); }

at::Tensor zero_unless_finite(const at::Tensor& values) { return at::where(values.isfinite(), values, 0); }

at::ScalarType opmath_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

at::Tensor in_double(const OptionalTensor& values, const at::Tensor& mean, double otherwise) {
  return is_given(values) ? values->to(at::kDouble) : at::full_like(mean, otherwise);
}

// math::moments_about, about the mean that ATen finds in x's own precision; of an inf or a nan about 0, as math::zero_unless_finite has it.
at::Tensor stats(const at::Tensor& x) {
  const at::TensorOptions options = x.options().dtype(at::kDouble);
  if (x.sym_numel() == 0) return at::zeros_symint({1 + 2 * x.sym_size(1)}, options);
  const c10::SymInt elements = x.sym_numel() / x.sym_size(1);
  const at::Tensor count = at::full_symint({c10::SymInt(1)}, at::Scalar(elements), options);
  const at::Tensor wide = x.to(opmath_type(x));
  const at::Tensor mean = wide.mean(reduced_dims(x));
  const at::Tensor about = zero_unless_finite(mean);
  const at::Tensor difference = wide - spread(about, x);
  const at::Tensor sum = difference.sum(reduced_dims(x), false, at::kDouble);
  const at::Tensor squares = difference.square().sum(reduced_dims(x), false, at::kDouble);
  const at::Tensor correction = sum / count;
  return at::cat({count, about.to(at::kDouble) + correction, squares - sum * correction});
}

// What math::Normalisation holds, as tensors.
struct Normalised {
  at::Tensor centred;  // x - mean_high
  at::Tensor mean_low;
  at::Tensor scale;  // float64
  at::Tensor z;

  Normalised(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd, const OptionalTensor& weight,
             const OptionalTensor& bias) {
    const at::ScalarType opmath = opmath_type(x);
    scale = in_double(weight, mean, 1.0) * invstd;
    const at::Tensor mean_high = at::where(scale.to(opmath).isfinite(), mean.to(opmath), 0);
    mean_low = mean - mean_high.to(at::kDouble);
    mean_low = at::where(mean_low.isnan(), 0, mean_low);
    centred = x.to(opmath) - spread(mean_high, x);
    const at::Tensor shift = in_double(bias, mean, 0.0) - mean_low * scale;
    z = at::addcmul(spread(shift.to(opmath), x), centred, spread(scale.to(opmath), x));
  }

  // The gradient at z.
  at::Tensor gradient(const at::Tensor& grad_y, const OptionalTensor& residual, std::string_view act, double act_param) const {
    return composite::activation_backward(grad_y.to(z.scalar_type()), is_given(residual) ? z + *residual : z, act, act_param);
  }
};

}  // namespace parts

at::Tensor batch_norm_act_stats(const at::Tensor& x) {
  check_part(x);
  if (!parts_have_kernel(x, {}, {})) return parts::stats(x);
  const Layout layout(x);
  const at::Tensor source = x.contiguous(layout.format);
  at::Tensor moments = at::empty_symint({1 + 2 * layout.channels}, x.options().dtype(at::kDouble));
  BatchNormForward p{};
  p.dtype = dtype_of(x);
  p.shape = layout.shape();
  p.x = source.const_data_ptr();
  GK_LAUNCHER(x, batch_norm_act_stats)(p, moments.mutable_data_ptr<double>());
  return moments;
}

at::Tensor batch_norm_act_stats_meta(const at::Tensor& x) {
  check_part(x);
  return at::empty_symint({1 + 2 * x.sym_size(1)}, x.options().dtype(at::kDouble));
}

using GatheredStats = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The checks and the outputs of batch_norm_act_gather_stats: mean, invstd, count.
GatheredStats gathered_stats(const at::Tensor& moments, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                             const OptionalTensor& num_batches_tracked) {
  TORCH_CHECK(moments.scalar_type() == at::kDouble && moments.dim() == 2 && moments.sym_size(1) % 2 == 1 && moments.is_contiguous(),
              "batch_norm_act_gather_stats: moments must be float64 of shape [ranks, 1 + 2 C], got ", moments.scalar_type(), " ",
              moments.sym_sizes());
  const c10::SymInt channels = (moments.sym_size(1) - 1) / 2;
  for (const OptionalTensor& running : {running_mean, running_var}) {
    TORCH_CHECK(!is_given(running) || (at::isFloatingType(running->scalar_type()) && running->layout() == at::kStrided &&
                                       running->device() == moments.device() && running->dim() == 1 && running->sym_size(0) == channels &&
                                       running->is_contiguous()),
                "batch_norm_act_gather_stats: running statistics must have ", channels, " elements on the device of moments");
  }
  check_num_batches_tracked(num_batches_tracked);
  TORCH_CHECK(!is_given(num_batches_tracked) || num_batches_tracked->device() == moments.device(),
              "batch_norm_act_gather_stats: num_batches_tracked must be on the device of moments");
  at::Tensor mean = at::empty_symint({channels}, moments.options());
  return {mean, at::empty_like(mean), at::empty_symint({c10::SymInt(1)}, moments.options())};
}

GatheredStats batch_norm_act_gather_stats(const at::Tensor& moments, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                          const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  auto [mean, invstd, count] = gathered_stats(moments, running_mean, running_var, num_batches_tracked);
  count.copy_(moments.select(1, 0).sum(0, true));
  // Elsewhere than on the CPU it would have to be waited for: running statistics then stay as they are.
  TORCH_CHECK_VALUE(!count.is_cpu() || *count.const_data_ptr<double>() != 1.0,
                    "Expected more than 1 value per channel when training, got 1 in the batches of all processes together");
  const at::Tensor batches = batches_beside(moments, num_batches_tracked, momentum);
  // The kernel writes float64, and what is stored is rounded from that.
  const auto in_double = [](const OptionalTensor& running) {
    return is_given(running) ? running->to(at::kDouble).resolve_neg() : at::Tensor();
  };
  const at::Tensor wide_mean = in_double(running_mean), wide_var = in_double(running_var);
  BatchNormForward p{};
  p.parameter_dtype = DType::kFloat64;
  p.shape = {0, mean.numel(), 0};
  p.momentum = momentum.value_or(0.0);
  p.batches = data_of_batches(batches);
  p.eps = eps;
  p.running_mean = mutable_data_of(wide_mean);
  p.running_var = mutable_data_of(wide_var);
  p.mean = mean.mutable_data_ptr<double>();
  p.invstd = invstd.mutable_data_ptr<double>();
  GK_LAUNCHER(moments, batch_norm_act_gather_stats)(p, moments.size(0), moments.resolve_neg().const_data_ptr<double>());
  if (is_given(running_mean)) running_mean->copy_(wide_mean);
  if (is_given(running_var)) running_var->copy_(wide_var);
  if (is_given(num_batches_tracked)) count_batch(*num_batches_tracked);
  return {mean, invstd, count};
}

// Other devices. All ranks are merged at once, with the weights that Chan's formula gives them in turn.
GatheredStats batch_norm_act_gather_stats_composite(const at::Tensor& moments, const OptionalTensor& running_mean,
                                                    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                                    std::optional<double> momentum, double eps) {
  gathered_stats(moments, running_mean, running_var, num_batches_tracked);
  const c10::SymInt channels = (moments.sym_size(1) - 1) / 2;
  const at::Tensor counts = moments.narrow_symint(1, 0, 1);
  const at::Tensor means = moments.narrow_symint(1, 1, channels);
  const at::Tensor count = counts.sum(0);
  const at::Tensor divisor = count.clamp_min(1);
  const at::Tensor mean = (counts * means).sum(0) / divisor;
  const at::Tensor m2 = moments.narrow_symint(1, 1 + channels, channels).sum(0) + (counts * (means - mean).square()).sum(0);
  const at::Tensor variance = m2 / divisor + eps;
  const at::Tensor invstd = at::where(variance == 0, at::zeros_like(variance), variance.rsqrt());
  at::Tensor factor = at::full_like(count, momentum.value_or(0.0));
  if (is_given(num_batches_tracked)) {
    num_batches_tracked->add_(1);
    if (!momentum.has_value()) factor = num_batches_tracked->to(at::kDouble).reciprocal();
  }
  // Of one value, or none, there is no variance.
  const auto update = [&](const OptionalTensor& running, const at::Tensor& observed) {
    if (!is_given(running)) return;
    const at::Tensor before = running->to(at::kDouble);
    running->copy_(at::where(count > 1, before * (1 - factor) + observed * factor, before));
  };
  update(running_mean, mean);
  update(running_var, m2 / (count - 1));
  return {mean, invstd, count};
}

GatheredStats batch_norm_act_gather_stats_meta(const at::Tensor& moments, const OptionalTensor& running_mean,
                                               const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                               std::optional<double>, double) {
  return gathered_stats(moments, running_mean, running_var, num_batches_tracked);
}

void check_elemt(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd, const OptionalTensor& weight,
                 const OptionalTensor& bias, const OptionalTensor& residual) {
  check_part(x);
  check_statistic(mean, x, 1);
  check_statistic(invstd, x, 1);
  for (const OptionalTensor& parameter : {weight, bias}) {
    TORCH_CHECK(!is_given(parameter) || parameter->device() == x.device(), "batch_norm_act: weight and bias must be on the device of x, ",
                x.device(), ", got ", parameter->device());
  }
  check_residual(x, residual);
}

std::tuple<at::Tensor, at::Tensor> batch_norm_act_elemt(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd,
                                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                                        const OptionalTensor& residual, c10::string_view name, double act_param) {
  check_elemt(x, mean, invstd, weight, bias, residual);
  if (!parts_have_kernel(x, weight, bias)) {
    const parts::Normalised normalised(x, mean, invstd, weight, bias);
    return {parts::as_output(composite::add_and_activate(normalised.z, residual, name, act_param), x),
            at::empty({0}, x.options().dtype(at::kByte))};
  }
  const Forward f(x, residual, name, act_param);
  GK_LAUNCHER(x, batch_norm_act_elemt)(f.problem(Operands(f.layout, x, residual), weight, bias, mean, invstd));
  return {f.y, f.mask};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_act_elemt_meta(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd,
                                                             const OptionalTensor& weight, const OptionalTensor& bias,
                                                             const OptionalTensor& residual, c10::string_view name, double act_param) {
  check_elemt(x, mean, invstd, weight, bias, residual);
  const Forward f(x, residual, name, act_param);
  return {f.y, parts_have_kernel(x, weight, bias) ? f.mask : at::empty({0}, f.mask.options())};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_act_backward_reduce(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
                                                                  const at::Tensor& invstd, const OptionalTensor& weight,
                                                                  const OptionalTensor& bias, const OptionalTensor& residual,
                                                                  const OptionalTensor& mask, c10::string_view act, double act_param,
                                                                  bool residual_g) {
  check_elemt(x, mean, invstd, weight, bias, residual);
  if (!parts_have_kernel(x, weight, bias)) {
    const parts::Normalised normalised(x, mean, invstd, weight, bias);
    const at::Tensor dz = normalised.gradient(grad_y, residual, act, act_param);
    const at::Tensor dz_sum = dz.sum(parts::reduced_dims(x), false, at::kDouble);
    const at::Tensor dz_x_sum =
        (dz * normalised.centred).sum(parts::reduced_dims(x), false, at::kDouble) - normalised.mean_low * parts::zero_unless_finite(dz_sum);
    return {at::cat({dz_sum, dz_x_sum}), residual_g ? parts::as_output(dz, x) : at::empty({0}, x.options())};
  }
  const Backward b(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, {false, false, false, residual_g});
  at::Tensor sums = at::empty_symint({2 * b.layout.channels}, mean.options());
  const Operands operands(b.layout, x, residual, grad_y);
  GK_LAUNCHER(x, batch_norm_act_backward_reduce)(b.problem(operands, mean, invstd, weight, bias, mask, /*training=*/true),
                                                 sums.mutable_data_ptr<double>());
  return {sums, b.grad_residual};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_act_backward_reduce_meta(const at::Tensor& grad_y, const at::Tensor& x,
                                                                       const at::Tensor& mean, const at::Tensor& invstd,
                                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                                       const OptionalTensor& residual, const OptionalTensor& mask,
                                                                       c10::string_view act, double act_param, bool residual_g) {
  check_elemt(x, mean, invstd, weight, bias, residual);
  const at::Tensor sums = at::empty_symint({2 * x.sym_size(1)}, mean.options());
  if (!parts_have_kernel(x, weight, bias)) {
    return {sums, residual_g ? at::empty_like(x, Layout(x).format) : at::empty({0}, x.options())};
  }
  const Backward b(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, {false, false, false, residual_g});
  return {sums, b.grad_residual};
}

at::Tensor batch_norm_act_backward_elemt(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd,
                                         const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                                         const OptionalTensor& mask, c10::string_view act, double act_param, const at::Tensor& sums,
                                         const at::Tensor& count) {
  check_elemt(x, mean, invstd, weight, bias, residual);
  check_statistic(sums, x, 2);
  check_count(count, x);
  if (!parts_have_kernel(x, weight, bias)) {
    const parts::Normalised normalised(x, mean, invstd, weight, bias);
    const at::Tensor dz = normalised.gradient(grad_y, residual, act, act_param);
    const std::vector<at::Tensor> mean_of = (sums / count).chunk(2);
    const at::Tensor slope = -invstd * invstd * mean_of[1];
    const at::Tensor dz_mean = mean_of[0] + parts::zero_unless_finite(slope * normalised.mean_low);
    const at::Tensor dz_mean_high = dz_mean.to(dz.scalar_type());
    const at::Tensor offset =
        parts::zero_unless_finite((-normalised.scale * (dz_mean - dz_mean_high.to(at::kDouble))).to(dz.scalar_type()));
    const auto spread = [&](const at::Tensor& of_channels) { return parts::spread(of_channels.to(dz.scalar_type()), x); };
    const at::Tensor centred_dz = at::addcmul(dz - spread(dz_mean_high), normalised.centred, spread(slope));
    return parts::as_output(at::addcmul(spread(offset), centred_dz, spread(normalised.scale)), x);
  }
  const Backward b(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, {true, false, false, false});
  const Operands operands(b.layout, x, residual, grad_y);
  const at::Tensor of_all = count.to(at::kDouble);
  GK_LAUNCHER(x, batch_norm_act_backward_elemt)(b.problem(operands, mean, invstd, weight, bias, mask, /*training=*/true),
                                                sums.const_data_ptr<double>(), of_all.const_data_ptr<double>());
  return b.grad_x;
}

at::Tensor batch_norm_act_backward_elemt_meta(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
                                              const at::Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& residual, const OptionalTensor& mask, c10::string_view act,
                                              double act_param, const at::Tensor& sums, const at::Tensor& count) {
  check_elemt(x, mean, invstd, weight, bias, residual);
  check_statistic(sums, x, 2);
  check_count(count, x);
  if (!parts_have_kernel(x, weight, bias)) return at::empty_like(x, Layout(x).format);
  return Backward(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, {true, false, false, false}).grad_x;
}

void add_kernels(torch::Library& m) {
  m.impl("batch_norm_act", on_device<batch_norm_act>);
  m.impl("batch_norm_act_backward", on_device<batch_norm_act_backward>);
  m.impl("batch_norm_act_gather_stats", on_device<batch_norm_act_gather_stats>);
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) { add_kernels(m); }
#if defined(GK_WITH_CUDA)
TORCH_LIBRARY_IMPL(gradkernels, CUDA, m) { add_kernels(m); }
#endif

TORCH_LIBRARY_IMPL(gradkernels, Meta, m) {
  m.impl("batch_norm_act", batch_norm_act_meta);
  m.impl("batch_norm_act_backward", batch_norm_act_backward_meta);
  m.impl("batch_norm_act_stats", batch_norm_act_stats_meta);
  m.impl("batch_norm_act_gather_stats", batch_norm_act_gather_stats_meta);
  m.impl("batch_norm_act_elemt", batch_norm_act_elemt_meta);
  m.impl("batch_norm_act_backward_reduce", batch_norm_act_backward_reduce_meta);
  m.impl("batch_norm_act_backward_elemt", batch_norm_act_backward_elemt_meta);
}

// Devices without kernels.
TORCH_LIBRARY_IMPL(gradkernels, CompositeExplicitAutograd, m) {
  m.impl("batch_norm_act", composite::batch_norm_act);
  m.impl("batch_norm_act_stats", on_device<batch_norm_act_stats>);
  m.impl("batch_norm_act_gather_stats", batch_norm_act_gather_stats_composite);
  m.impl("batch_norm_act_elemt", on_device<batch_norm_act_elemt>);
  m.impl("batch_norm_act_backward_reduce", on_device<batch_norm_act_backward_reduce>);
  m.impl("batch_norm_act_backward_elemt", on_device<batch_norm_act_backward_elemt>);
}

// vmap: ATen's operators have batching rules.
TORCH_LIBRARY_IMPL(gradkernels, FuncTorchBatched, m) { m.impl("batch_norm_act", composite::batch_norm_act); }

// torch resolves the negative bit of what an operator reads; of what is written it takes the first results for it, and fails afterwards.
TORCH_LIBRARY_IMPL(gradkernels, Negative, m) {
  for (const char* name : {"batch_norm_act", "batch_norm_act_gather_stats"}) m.impl(name, torch::CppFunction::makeFallthrough());
}

}  // namespace gradkernels
