// The gradients of the activations. leaky_relu saves one bit for each element, rrelu the bits and a seed,
// swish and prelu their input. elu saves its output, which the next layer saves too, if the output determines
// the gradient, and otherwise its input.
//
// Under create_graph, gradients that are linear in grad_y record the same operator again. Other gradients are
// then computed by ATen's differentiable operators.
#include <ATen/autocast_mode.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include "autograd/function.h"
#include "common/check.h"
#include "common/library.h"
#include "ops/composite.h"

namespace gradkernels::autograd {
namespace {

using torch::autograd::SavedVariable;

using Strides = std::vector<c10::SymInt>;

// The strides of x or, if x has gaps, of the copy that the kernel works on.
Strides strides_of(const at::Tensor& x) { return (x.is_non_overlapping_and_dense() ? x : at::empty_like(x)).sym_strides().vec(); }

// ---- leaky_relu

struct LeakyReluGradient : Gradient<LeakyReluGradient, 1> {
  static constexpr const char* kName = "LeakyReluBackward";
  SavedVariable mask;
  Strides stride;
  double negative_slope;

  template <typename Self, typename F>
  static void members(Self& self, const F& f) {
    f(self.mask, self.stride, self.negative_slope);
  }
  void keep(const at::Tensor& mask_, Strides stride_, double negative_slope_) {
    mask = SavedVariable(mask_, false);
    stride = std::move(stride_);
    negative_slope = negative_slope_;
  }
  variable_list backward(const at::Tensor& grad_y, std::array<bool, 1>) {
    return {call_in_backward<ops::LeakyReluBackward>(grad_y, mask.unpack(), stride, negative_slope)};
  }
};

at::Tensor leaky_relu(const at::Tensor& x, double negative_slope) {
  if (!has_kernel(x) || differentiates_through_aten(x)) return composite::leaky_relu(x, negative_slope);
  if (!records(x)) return call_below_autograd<ops::LeakyRelu>(x, negative_slope);
  const auto node = gradient_of<LeakyReluGradient>(x);
  auto [y, mask] = call_below_autograd<ops::LeakyReluWithMask>(x, negative_slope);
  node->keep(mask, y.sym_strides().vec(), negative_slope);
  return recorded(y, node);
}

void leaky_relu_(at::Tensor x, double negative_slope) {
  if (!has_kernel(x) || differentiates_through_aten(x)) return composite::leaky_relu_(x, negative_slope);
  // Raises torch's error before anything is written.
  torch::autograd::check_inplace(x, records(x));
  if (!records(x)) return call_below_autograd<ops::LeakyReluInplace>(x, negative_slope);
  const auto node = gradient_of<LeakyReluGradient>(x);
  const at::Tensor mask = call_below_autograd<ops::LeakyReluWithMaskInplace>(x, negative_slope);
  node->keep(mask, strides_of(x), negative_slope);
  torch::autograd::rebase_history(x, node);
}

at::Tensor leaky_relu_backward(const at::Tensor& grad_y, const at::Tensor& mask, c10::SymIntArrayRef stride, double negative_slope) {
  at::Tensor grad_x = call_below_autograd<ops::LeakyReluBackward>(grad_y, mask, stride, negative_slope);
  if (!records(grad_y)) return grad_x;
  const auto node = gradient_of<LeakyReluGradient>(grad_y);
  node->keep(mask, stride.vec(), negative_slope);
  return recorded(grad_x, node);
}

// ---- rrelu

struct RreluGradient : Gradient<RreluGradient, 1> {
  static constexpr const char* kName = "RreluBackward";
  SavedVariable mask, seed;
  Strides stride;
  double lower, upper;

  template <typename Self, typename F>
  static void members(Self& self, const F& f) {
    f(self.mask, self.seed, self.stride, self.lower, self.upper);
  }
  void keep(const at::Tensor& mask_, const at::Tensor& seed_, Strides stride_, double lower_, double upper_) {
    mask = SavedVariable(mask_, false);
    seed = SavedVariable(seed_, false);
    stride = std::move(stride_);
    lower = lower_;
    upper = upper_;
  }
  variable_list backward(const at::Tensor& grad_y, std::array<bool, 1>) {
    return {call_in_backward<ops::RreluBackward>(grad_y, mask.unpack(), stride, seed.unpack(), lower, upper)};
  }
};

std::tuple<at::Tensor, at::Tensor> rrelu_with_mask(const at::Tensor& x, const at::Tensor& seed, double lower, double upper) {
  if (!has_kernel(x) || differentiates_through_aten(x)) return composite::rrelu_with_mask(x, seed, lower, upper);
  if (!records(x)) return call_below_autograd<ops::RreluWithMask>(x, seed, lower, upper);
  const auto node = gradient_of<RreluGradient>(x);
  auto [y, mask] = call_below_autograd<ops::RreluWithMask>(x, seed, lower, upper);
  node->keep(mask, seed, y.sym_strides().vec(), lower, upper);
  return {recorded(y, node), mask};
}

at::Tensor rrelu_with_mask_(at::Tensor x, const at::Tensor& seed, double lower, double upper) {
  if (!has_kernel(x) || differentiates_through_aten(x)) return composite::rrelu_with_mask_(x, seed, lower, upper);
  torch::autograd::check_inplace(x, records(x));
  if (!records(x)) return call_below_autograd<ops::RreluWithMaskInplace>(x, seed, lower, upper);
  const auto node = gradient_of<RreluGradient>(x);
  at::Tensor mask = call_below_autograd<ops::RreluWithMaskInplace>(x, seed, lower, upper);
  node->keep(mask, seed, strides_of(x), lower, upper);
  torch::autograd::rebase_history(x, node);
  return mask;
}

at::Tensor rrelu_backward(const at::Tensor& grad_y, const at::Tensor& mask, c10::SymIntArrayRef stride, const at::Tensor& seed,
                          double lower, double upper) {
  at::Tensor grad_x = call_below_autograd<ops::RreluBackward>(grad_y, mask, stride, seed, lower, upper);
  if (!records(grad_y)) return grad_x;
  const auto node = gradient_of<RreluGradient>(grad_y);
  node->keep(mask, seed, stride.vec(), lower, upper);
  return recorded(grad_x, node);
}

// ---- elu

struct EluGradient : Gradient<EluGradient, 1> {
  static constexpr const char* kName = "EluBackward";
  SavedVariable self_or_result;
  double alpha;
  bool is_result;

  template <typename Self, typename F>
  static void members(Self& self, const F& f) {
    f(self.self_or_result, self.alpha, self.is_result);
  }
  void keep(const at::Tensor& self_or_result_, double alpha_, bool is_result_) {
    self_or_result = SavedVariable(self_or_result_, is_result_);
    alpha = alpha_;
    is_result = is_result_;
  }
  variable_list backward(const at::Tensor& grad_y, std::array<bool, 1>) {
    const at::Tensor saved = is_result ? self_or_result.unpack(getptr()) : self_or_result.unpack();
    return {call_in_backward<ops::EluBackward>(grad_y, saved, alpha, is_result)};
  }
};

at::Tensor elu(const at::Tensor& x, double alpha) {
  if (!has_kernel(x) || differentiates_through_aten(x)) return composite::elu(x, alpha);
  if (!records(x)) return call_below_autograd<ops::Elu>(x, alpha);
  const auto node = gradient_of<EluGradient>(x);
  at::Tensor y = recorded(call_below_autograd<ops::Elu>(x, alpha), node);
  // An output of 16 bits does not have enough digits: near -alpha, they decide the gradient.
  const bool is_result = alpha >= 0.0 && x.element_size() > 2;
  node->keep(is_result ? y : x, alpha, is_result);
  return y;
}

void elu_(at::Tensor x, double alpha) {
  // With alpha < 0 the output does not determine the gradient: ATen raises its error.
  if (!has_kernel(x) || differentiates_through_aten(x) || (alpha < 0.0 && records(x))) return composite::elu_(x, alpha);
  torch::autograd::check_inplace(x, records(x));
  if (!records(x)) return call_below_autograd<ops::EluInplace>(x, alpha);
  const auto node = gradient_of<EluGradient>(x);
  call_below_autograd<ops::EluInplace>(x, alpha);
  torch::autograd::rebase_history(x, node);
  node->keep(x, alpha, true);
}

at::Tensor elu_backward(const at::Tensor& grad_y, const at::Tensor& self_or_result, double alpha, bool is_result) {
  if (records(grad_y, self_or_result)) return at::elu_backward(grad_y, alpha, 1, 1, is_result, self_or_result);
  return call_below_autograd<ops::EluBackward>(grad_y, self_or_result, alpha, is_result);
}

// ---- swish

struct SwishGradient : Gradient<SwishGradient, 1> {
  static constexpr const char* kName = "SwishBackward";
  SavedVariable x;
  double beta;

  template <typename Self, typename F>
  static void members(Self& self, const F& f) {
    f(self.x, self.beta);
  }
  variable_list backward(const at::Tensor& grad_y, std::array<bool, 1>) {
    return {call_in_backward<ops::SwishBackward>(grad_y, x.unpack(), beta)};
  }
};

at::Tensor swish(const at::Tensor& x, double beta) {
  if (!has_kernel(x) || differentiates_through_aten(x)) return composite::swish(x, beta);
  if (!records(x)) return call_below_autograd<ops::Swish>(x, beta);
  const auto node = gradient_of<SwishGradient>(x);
  node->x = SavedVariable(x, false);
  node->beta = beta;
  return recorded(call_below_autograd<ops::Swish>(x, beta), node);
}

at::Tensor swish_backward(const at::Tensor& grad_y, const at::Tensor& x, double beta) {
  if (records(grad_y, x)) return composite::swish_backward(grad_y, x, beta);
  return call_below_autograd<ops::SwishBackward>(grad_y, x, beta);
}

// ---- swish with a tensor, and prelu: Operator(x, parameter), Backward(grad_y, x, parameter, output_mask)

template <typename Backward>
struct ParametricGradient : Gradient<ParametricGradient<Backward>, 2> {
  static constexpr const char* kName = std::is_same_v<Backward, ops::PreluBackward> ? "PreluBackward" : "SwishBackward";
  SavedVariable x, parameter;

  template <typename Self, typename F>
  static void members(Self& self, const F& f) {
    f(self.x, self.parameter);
  }
  variable_list backward(const at::Tensor& grad_y, std::array<bool, 2> wanted) {
    auto [grad_x, grad_parameter] = call_in_backward<Backward>(grad_y, x.unpack(), parameter.unpack(), wanted);
    return {wanted[0] ? grad_x : at::Tensor(), wanted[1] ? grad_parameter : at::Tensor()};
  }
};

template <typename Operator, typename Backward, auto kComposite>
at::Tensor parametric(const at::Tensor& x, const at::Tensor& parameter) {
  if (!composite::parametric_has_kernel(x, parameter) || differentiates_through_aten(x, parameter)) return kComposite(x, parameter);
  if (!records(x, parameter)) return call_below_autograd<Operator>(x, parameter);
  const auto node = gradient_of<ParametricGradient<Backward>>(x, parameter);
  node->x = SavedVariable(x, false);
  node->parameter = SavedVariable(parameter, false);
  return recorded(call_below_autograd<Operator>(x, parameter), node);
}

template <typename Backward, auto kComposite>
std::tuple<at::Tensor, at::Tensor> parametric_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& parameter,
                                                       std::array<bool, 2> output_mask) {
  if (records(grad_y, x, parameter)) return kComposite(grad_y, x, parameter, output_mask);
  return call_below_autograd<Backward>(grad_y, x, parameter, output_mask);
}

// Calls Operator, which writes x, and bumps the version of x.
template <typename Operator, typename... Args>
auto counting_version(at::Tensor x, Args... args) {
  check_version_counts(x);
  if constexpr (std::is_void_v<decltype(call_below_version_counting<Operator>(x, args...))>) {
    call_below_version_counting<Operator>(x, args...);
    increment_version(x);
  } else {
    auto result = call_below_version_counting<Operator>(x, args...);
    increment_version(x);
    return result;
  }
}

// Under autocast, prelu runs in the lower precision, as torch's does.
template <c10::DeviceType kDevice>
at::Tensor prelu_autocast(const at::Tensor& x, const at::Tensor& weight) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  return call<ops::Prelu>(at::autocast::cached_cast(dtype, x, kDevice), at::autocast::cached_cast(dtype, weight, kDevice));
}

}  // namespace

GK_LIBRARY_IMPL(Autograd, m) {
  m.impl("leaky_relu", leaky_relu);
  m.impl("leaky_relu_", leaky_relu_);
  m.impl("leaky_relu_with_mask", torch::autograd::autogradNotImplementedFallback());
  m.impl("leaky_relu_with_mask_", torch::autograd::autogradNotImplementedFallback());
  m.impl("leaky_relu_backward", leaky_relu_backward);
  m.impl("rrelu_with_mask", rrelu_with_mask);
  m.impl("rrelu_with_mask_", rrelu_with_mask_);
  m.impl("rrelu_backward", rrelu_backward);
  m.impl("elu", elu);
  m.impl("elu_", elu_);
  m.impl("elu_backward", elu_backward);
  m.impl("swish", swish);
  m.impl("swish_backward", swish_backward);
  m.impl("swish.Tensor", parametric<ops::SwishTensor, ops::SwishTensorBackward, composite::swish_tensor>);
  m.impl("swish_backward.Tensor", parametric_backward<ops::SwishTensorBackward, composite::swish_tensor_backward>);
  m.impl("prelu", parametric<ops::Prelu, ops::PreluBackward, composite::prelu>);
  m.impl("prelu_backward", parametric_backward<ops::PreluBackward, composite::prelu_backward>);
}

GK_LIBRARY_IMPL(ADInplaceOrView, m) {
  m.impl("leaky_relu_", counting_version<ops::LeakyReluInplace, double>);
  m.impl("leaky_relu_with_mask_", counting_version<ops::LeakyReluWithMaskInplace, double>);
  m.impl("rrelu_with_mask_", counting_version<ops::RreluWithMaskInplace, const at::Tensor&, double, double>);
  m.impl("elu_", counting_version<ops::EluInplace, double>);
}

GK_LIBRARY_IMPL(AutocastCPU, m) { m.impl("prelu", prelu_autocast<c10::DeviceType::CPU>); }
GK_LIBRARY_IMPL(AutocastCUDA, m) { m.impl("prelu", prelu_autocast<c10::DeviceType::CUDA>); }

}  // namespace gradkernels::autograd
