// The operators as composites of ATen's operators. They are used for dtypes, devices and tensor types without
// a kernel, and under functorch and forward-mode differentiation, which differentiate ATen's operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace gradkernels::composite {

at::Tensor leaky_relu(const at::Tensor& x, double negative_slope);
void leaky_relu_(at::Tensor x, double negative_slope);
at::Tensor elu(const at::Tensor& x, double alpha);
void elu_(at::Tensor x, double alpha);
at::Tensor swish(const at::Tensor& x, double beta);
at::Tensor swish_backward(const at::Tensor& grad_y, const at::Tensor& x, double beta);
at::Tensor swish_tensor(const at::Tensor& x, const at::Tensor& beta);
std::tuple<at::Tensor, at::Tensor> swish_tensor_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& beta,
                                                         std::array<bool, 2> output_mask);
at::Tensor prelu(const at::Tensor& x, const at::Tensor& weight);
std::tuple<at::Tensor, at::Tensor> prelu_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                                  std::array<bool, 2> output_mask);
// Whether swish and prelu with a parameter for each channel have a kernel for these tensors.
bool parametric_has_kernel(const at::Tensor& x, const at::Tensor& parameter);

// The slopes come from torch's generator and not from the seed. The mask is empty: the gradient goes through
// ATen's operators.
std::tuple<at::Tensor, at::Tensor> rrelu_with_mask(const at::Tensor& x, const at::Tensor& seed, double lower, double upper);
at::Tensor rrelu_with_mask_(at::Tensor x, const at::Tensor& seed, double lower, double upper);

using OptionalTensor = std::optional<at::Tensor>;
using BatchNormActResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// mean, invstd and mask are empty: the gradient goes through ATen's operators.
BatchNormActResult batch_norm_act(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                  const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                                  std::string_view act, double act_param);

// The result of a composite: without statistics and mask, because the gradient goes through ATen's operators.
BatchNormActResult without_statistics(const at::Tensor& y);

at::Tensor group_norm(const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias, double eps);
BatchNormActResult group_norm_act(const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& residual, double eps, std::string_view act, double act_param);

// act(z + residual), the second half of batch_norm_act and group_norm_act.
at::Tensor add_and_activate(at::Tensor z, const OptionalTensor& residual, std::string_view act, double act_param);
// The gradient of act(z) at z.
at::Tensor activation_backward(const at::Tensor& grad_y, const at::Tensor& z, std::string_view act, double act_param);

// GradientReads of act (math/activation.h): whether the gradient is grad_y itself, and whether it reads z and
// not just one bit for each element.
bool gradient_is_grad_y(std::string_view act);
bool gradient_reads_value(std::string_view act);

// Whether batch_norm_act has a kernel for these tensors.
bool batch_norm_act_has_kernel(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                               const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& num_batches_tracked,
                               bool training);
// The same for group_norm_act.
bool group_norm_act_has_kernel(const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias);

}  // namespace gradkernels::composite
