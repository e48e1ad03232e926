// The operators of the activations: they check, allocate and call the kernels. Elementwise kernels walk
// tensors in storage order, whatever the strides. A tensor with gaps is copied first, to the order in which
// ATen's TensorIterator would walk it.
#include "ops/activation.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/prelu.h>
#include <ATen/ops/rrelu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/where.h>

#include "common/allocate.h"
#include "common/check.h"
#include "common/device.h"
#include "common/library.h"
#include "ops/composite.h"
#include "ops/layout.h"

namespace gradkernels {

namespace composite {

at::Tensor leaky_relu(const at::Tensor& x, double negative_slope) { return at::leaky_relu(x, negative_slope); }
void leaky_relu_(at::Tensor x, double negative_slope) { at::leaky_relu_(x, negative_slope); }
at::Tensor elu(const at::Tensor& x, double alpha) { return at::elu(x, alpha); }
void elu_(at::Tensor x, double alpha) { at::elu_(x, alpha); }

// Integers go to silu, which raises an error; the product would silently promote them.
at::Tensor swish(const at::Tensor& x, double beta) {
  if (beta == 1.0 || !(x.is_floating_point() || x.is_complex())) return at::silu(x);
  return x * at::sigmoid(x * beta);
}

at::Tensor swish_backward(const at::Tensor& grad_y, const at::Tensor& x, double beta) {
  const at::Tensor s = at::sigmoid(x * beta);
  return grad_y * (s * (1 + x * beta * (1 - s)));
}

namespace {

// The parameter, reshaped so that it broadcasts along the channels of x.
at::Tensor across_channels(const at::Tensor& parameter, const at::Tensor& x) {
  // A parameter of one element keeps its dimension, which matters for type promotion.
  if (parameter.sym_numel() == 1) return x.dim() == 0 ? parameter.reshape({}) : parameter;
  std::vector<int64_t> shape(x.dim() < 2 ? 1 : x.dim(), 1);
  shape[shape.size() == 1 ? 0 : 1] = -1;
  return parameter.reshape(shape);
}

// The gradient of the parameter, from its gradients at each element.
at::Tensor sum_over_channels(const at::Tensor& gradients, const at::Tensor& parameter) {
  if (parameter.sym_numel() == 1) return gradients.sum().reshape_symint(parameter.sym_sizes());
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < gradients.dim(); ++d) {
    if (d != 1) dims.push_back(d);
  }
  return gradients.sum(dims);
}

}  // namespace

at::Tensor swish_tensor(const at::Tensor& x, const at::Tensor& beta) {
  if (!x.is_floating_point() && !x.is_complex()) return swish(x, 1.0);
  return x * at::sigmoid(across_channels(beta, x) * x);
}

std::tuple<at::Tensor, at::Tensor> swish_tensor_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& beta,
                                                         std::array<bool, 2> output_mask) {
  const at::Tensor z = across_channels(beta, x) * x;
  const at::Tensor s = at::sigmoid(z);
  return {output_mask[0] ? grad_y * (s * (1 + z * (1 - s))) : at::empty({0}, x.options()),
          output_mask[1] ? sum_over_channels(grad_y * (x * x) * (s * (1 - s)), beta) : at::empty({0}, beta.options())};
}

namespace {

// x where `passes`, else weight x. Where `passes`, neither x nor its gradient is multiplied with the weight,
// which may be inf.
at::Tensor sloped(const at::Tensor& passes, const at::Tensor& x, const at::Tensor& weight) {
  return at::where(passes, x, weight * at::where(passes, 0, x));
}

}  // namespace

// Only tensors without a kernel go to at::prelu, which also raises errors for them. Under vmap, the gradient
// of at::prelu would confuse batch dimensions.
at::Tensor prelu(const at::Tensor& x, const at::Tensor& weight) {
  return parametric_has_kernel(x, weight) ? sloped(x > 0, x, across_channels(weight, x)) : at::prelu(x, weight);
}

std::tuple<at::Tensor, at::Tensor> prelu_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                                  std::array<bool, 2> output_mask) {
  const at::Tensor passes = x > 0;
  return {output_mask[0] ? sloped(passes, grad_y, across_channels(weight, x)) : at::empty({0}, x.options()),
          output_mask[1] ? sum_over_channels(at::where(passes, 0, x * grad_y), weight) : at::empty({0}, weight.options())};
}

bool parametric_has_kernel(const at::Tensor& x, const at::Tensor& parameter) {
  return has_kernel(x) && has_kernel(parameter) && same_dtype_and_device(x, parameter) && parameter.dim() <= 1 &&
         (parameter.sym_numel() == 1 || (x.dim() >= 2 && parameter.sym_numel() == x.sym_size(1)));
}

namespace {

// A slope where x <= 0; 1 where x is positive or nan. Only tensors without a kernel go to at::rrelu, which
// raises errors for them: it supports neither vmap nor, in place, forward-mode differentiation.
at::Tensor drawn_slopes(const at::Tensor& x, double lower, double upper) {
  return at::where(x <= 0, at::empty_like(x).uniform_(lower, upper), 1);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rrelu_with_mask(const at::Tensor& x, const at::Tensor&, double lower, double upper) {
  return {has_kernel(x) ? x * drawn_slopes(x, lower, upper) : at::rrelu(x, lower, upper, /*training=*/true),
          at::empty({0}, x.options().dtype(at::kByte))};
}

at::Tensor rrelu_with_mask_(at::Tensor x, const at::Tensor&, double lower, double upper) {
  if (has_kernel(x)) {
    x.mul_(drawn_slopes(x, lower, upper));
  } else {
    at::rrelu_(x, lower, upper, /*training=*/true);
  }
  return at::empty({0}, x.options().dtype(at::kByte));
}

}  // namespace composite

namespace {

using math::Activation;
using math::ActivationKind;

// x itself if it has no gaps, otherwise a dense copy.
at::Tensor dense(const at::Tensor& x) { return x.is_non_overlapping_and_dense() ? x : at::empty_like(x).copy_(x); }

// grad_y in the storage order that `stride` describes.
at::Tensor in_order(const at::Tensor& grad_y, at::IntArrayRef stride) {
  for (int64_t d = 0; d < grad_y.dim(); ++d) {
    if (grad_y.size(d) != 1 && grad_y.stride(d) != stride[d]) {
      return at::empty_strided(grad_y.sizes(), stride, grad_y.options()).copy_(grad_y);
    }
  }
  return grad_y;
}

at::Tensor mask_like(const at::Tensor& x) { return at::empty_symint({(x.sym_numel() + 7) / 8}, x.options().dtype(at::kByte)); }

void check_backward(const char* name, const at::Tensor& grad_y, const at::Tensor& saved) {
  TORCH_CHECK(has_kernel(grad_y) && has_kernel(saved) && same_dtype_and_device(grad_y, saved), name, ": grad_y is ", grad_y.scalar_type(),
              " on ", grad_y.device(), ", but the saved tensor is ", saved.scalar_type(), " on ", saved.device());
  TORCH_CHECK(grad_y.sym_sizes() == saved.sym_sizes(), name, ": grad_y has shape ", grad_y.sym_sizes(), ", but the saved tensor has shape ",
              saved.sym_sizes());
}

// `mask` is written unless it is undefined.
at::Tensor forward(Activation act, const at::Tensor& x, const at::Tensor& mask = {}) {
  const at::Tensor source = dense(x);
  const at::Tensor y = on_huge_pages(at::empty_like(source));
  GK_LAUNCHER(x, activation_forward)(dtype_of(x), act, x.numel(), source.const_data_ptr(), y.mutable_data_ptr(),
                                     mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr);
  return y;
}

void forward_(Activation act, const at::Tensor& x, const at::Tensor& mask = {}) {
  at::assert_no_internal_overlap(x);
  const at::Tensor target = dense(x);
  GK_LAUNCHER(x, activation_forward)(dtype_of(x), act, x.numel(), target.const_data_ptr(), target.mutable_data_ptr(),
                                     mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr);
  if (!target.is_same(x)) x.copy_(target);
}

at::Tensor backward(Activation act, Saved kind, const at::Tensor& grad_y, const at::Tensor& saved_tensor) {
  const at::Tensor saved = dense(saved_tensor);
  const at::Tensor source = in_order(grad_y, saved.strides());
  const at::Tensor grad_x = on_huge_pages(at::empty_like(saved));
  GK_LAUNCHER(saved, activation_backward)(dtype_of(saved), act, kind, saved.numel(), source.const_data_ptr(), saved.const_data_ptr(),
                                          grad_x.mutable_data_ptr());
  return grad_x;
}

at::Tensor leaky_relu(const at::Tensor& x, double negative_slope) {
  if (!has_kernel(x)) return composite::leaky_relu(x, negative_slope);
  return forward({ActivationKind::kLeakyRelu, negative_slope}, x);
}

void leaky_relu_(at::Tensor x, double negative_slope) {
  if (!has_kernel(x)) return composite::leaky_relu_(x, negative_slope);
  forward_({ActivationKind::kLeakyRelu, negative_slope}, x);
}

void check_maskable(const char* name, const at::Tensor& x) {
  TORCH_CHECK_NOT_IMPLEMENTED(has_kernel(x), "\"", name, "\" not implemented for '", x.scalar_type(), "' on ", x.device());
}

std::tuple<at::Tensor, at::Tensor> leaky_relu_with_mask(const at::Tensor& x, double negative_slope) {
  check_maskable("leaky_relu_with_mask", x);
  at::Tensor mask = mask_like(x);
  return {forward({ActivationKind::kLeakyRelu, negative_slope}, x, mask), mask};
}

at::Tensor leaky_relu_with_mask_(at::Tensor x, double negative_slope) {
  check_maskable("leaky_relu_with_mask", x);
  at::Tensor mask = mask_like(x);
  forward_({ActivationKind::kLeakyRelu, negative_slope}, x, mask);
  return mask;
}

void check_mask(const char* name, const at::Tensor& grad_y, const at::Tensor& mask, size_t strides) {
  check_maskable(name, grad_y);
  TORCH_CHECK(mask.scalar_type() == at::kByte && mask.device() == grad_y.device() && mask.dim() == 1 && mask.is_contiguous() &&
                  mask.sym_numel() == (grad_y.sym_numel() + 7) / 8,
              name, ": the mask must be a uint8 tensor with one bit for each of ", grad_y.sym_numel(), " elements, got ",
              mask.scalar_type(), " of shape ", mask.sym_sizes());
  TORCH_CHECK(static_cast<int64_t>(strides) == grad_y.dim(), name, ": got ", strides, " strides for a tensor of ", grad_y.dim(),
              " dimensions");
}

// grad_y in the storage order of the mask, and an empty grad_x in the same order.
struct MaskedBackward {
  at::Tensor grad_y, grad_x;

  MaskedBackward(const char* name, const at::Tensor& grad, const at::Tensor& mask, c10::SymIntArrayRef stride) {
    check_mask(name, grad, mask, stride.size());
    grad_y = in_order(grad, C10_AS_INTARRAYREF_SLOW(stride));
    TORCH_CHECK(grad_y.is_non_overlapping_and_dense(), name, ": a tensor of shape ", grad.sizes(), " with strides ", stride, " has gaps");
    grad_x = on_huge_pages(at::empty_like(grad_y));
  }
};

at::Tensor leaky_relu_backward(const at::Tensor& grad_y, const at::Tensor& mask, c10::SymIntArrayRef stride, double negative_slope) {
  const MaskedBackward b("leaky_relu_backward", grad_y, mask, stride);
  GK_LAUNCHER(mask, activation_backward)(dtype_of(b.grad_y), {ActivationKind::kLeakyRelu, negative_slope}, Saved::kMask, b.grad_y.numel(),
                                         b.grad_y.const_data_ptr(), mask.const_data_ptr(), b.grad_x.mutable_data_ptr());
  return b.grad_x;
}

at::Tensor elu(const at::Tensor& x, double alpha) {
  if (!has_kernel(x)) return composite::elu(x, alpha);
  return forward({ActivationKind::kElu, alpha}, x);
}

void elu_(at::Tensor x, double alpha) {
  if (!has_kernel(x)) return composite::elu_(x, alpha);
  forward_({ActivationKind::kElu, alpha}, x);
}

at::Tensor elu_backward(const at::Tensor& grad_y, const at::Tensor& self_or_result, double alpha, bool is_result) {
  check_backward("elu_backward", grad_y, self_or_result);
  return backward({ActivationKind::kElu, alpha}, is_result ? Saved::kOutput : Saved::kInput, grad_y, self_or_result);
}

at::Tensor swish(const at::Tensor& x, double beta) {
  if (!has_kernel(x)) return composite::swish(x, beta);
  return forward({ActivationKind::kSwish, beta}, x);
}

at::Tensor swish_backward(const at::Tensor& grad_y, const at::Tensor& x, double beta) {
  check_backward("swish_backward", grad_y, x);
  return backward({ActivationKind::kSwish, beta}, Saved::kInput, grad_y, x);
}

// x seen by channel. If all channels share one parameter, x is one channel in storage order.
struct ByChannel {
  at::Tensor x;
  ChannelShape shape;

  ByChannel(const at::Tensor& input, const at::Tensor& parameter) {
    if (parameter.numel() == 1) {
      x = dense(input);
      shape = {1, 1, input.numel()};
    } else {
      const Layout layout(input);
      x = input.contiguous(layout.format);
      shape = layout.shape();
    }
  }
};

// Calls fill(target), where target has the storage order of `source`. The result has the strides that torch
// gives an output like x.
template <typename Function>
at::Tensor filled_like(const at::Tensor& x, const at::Tensor& source, const Function& fill) {
  const at::Tensor result = on_huge_pages(at::empty_like(x));
  const at::Tensor target = in_order(result, source.strides()).is_same(result) ? result : at::empty_like(source);
  fill(target);
  if (!target.is_same(result)) result.copy_(target);
  return result;
}

at::Tensor parametric(Parametric act, const at::Tensor& x, const at::Tensor& parameter) {
  const ByChannel by_channel(x, parameter);
  return filled_like(x, by_channel.x, [&](const at::Tensor& y) {
    if (x.numel() == 0) return;
    GK_LAUNCHER(x, parametric_forward)(
        {dtype_of(x), by_channel.shape, act, by_channel.x.const_data_ptr(), parameter.contiguous().const_data_ptr(), y.mutable_data_ptr()});
  });
}

void check_parametric_backward(const char* name, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& parameter) {
  check_backward(name, grad_y, x);
  TORCH_CHECK(composite::parametric_has_kernel(x, parameter), name, ": a parameter of shape ", parameter.sym_sizes(), " and type ",
              parameter.scalar_type(), " does not fit x of shape ", x.sym_sizes(), " and type ", x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> parametric_backward(const char* name, Parametric act, const at::Tensor& grad_y, const at::Tensor& x,
                                                       const at::Tensor& parameter, std::array<bool, 2> output_mask) {
  check_parametric_backward(name, grad_y, x, parameter);
  const ByChannel by_channel(x, parameter);
  const at::Tensor source = in_order(grad_y, by_channel.x.strides());
  const at::Tensor grad_parameter =
      output_mask[1] ? at::empty_like(parameter, at::MemoryFormat::Contiguous) : at::empty({0}, parameter.options());
  void* const parameter_sums = output_mask[1] ? grad_parameter.mutable_data_ptr() : nullptr;
  const auto run = [&](void* grad_x) {
    if (x.numel() == 0) {
      grad_parameter.zero_();
      return;
    }
    GK_LAUNCHER(x, parametric_backward)({dtype_of(x), by_channel.shape, act, source.const_data_ptr(), by_channel.x.const_data_ptr(),
                                         parameter.contiguous().const_data_ptr(), grad_x, parameter_sums});
  };
  if (!output_mask[0]) {
    run(nullptr);
    return {at::empty({0}, x.options()), grad_parameter};
  }
  return {filled_like(x, by_channel.x, [&](const at::Tensor& grad_x) { run(grad_x.mutable_data_ptr()); }), grad_parameter};
}

at::Tensor swish_tensor(const at::Tensor& x, const at::Tensor& beta) {
  if (!composite::parametric_has_kernel(x, beta)) return composite::swish_tensor(x, beta);
  return parametric(Parametric::kSwish, x, beta);
}

std::tuple<at::Tensor, at::Tensor> swish_tensor_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& beta,
                                                         std::array<bool, 2> output_mask) {
  return parametric_backward("swish_backward", Parametric::kSwish, grad_y, x, beta, output_mask);
}

at::Tensor prelu(const at::Tensor& x, const at::Tensor& weight) {
  if (!composite::parametric_has_kernel(x, weight)) return composite::prelu(x, weight);
  return parametric(Parametric::kPrelu, x, weight);
}

std::tuple<at::Tensor, at::Tensor> prelu_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                                  std::array<bool, 2> output_mask) {
  return parametric_backward("prelu_backward", Parametric::kPrelu, grad_y, x, weight, output_mask);
}

void check_rrelu(const at::Tensor& seed, double lower, double upper) {
  TORCH_CHECK(seed.scalar_type() == at::kLong && seed.sym_numel() == 1, "rrelu: the seed must be an int64 tensor of one element, got ",
              seed.scalar_type(), " of shape ", seed.sym_sizes());
  TORCH_CHECK(lower <= upper, "Lower bound should be less than or equal to the upper bound");
}

// The seed on the device of x, so that reading it does not wait for a GPU.
at::Tensor seed_on_device_of(const at::Tensor& x, const at::Tensor& seed) { return seed.to(x.device()).resolve_neg(); }

// Writes y, which may be x, and returns the mask. x and y must be in the same storage order.
at::Tensor rrelu_into(const at::Tensor& y, const at::Tensor& x, const at::Tensor& seed, double lower, double upper) {
  at::Tensor mask = mask_like(x);
  const at::Tensor here = seed_on_device_of(x, seed);
  GK_LAUNCHER(x, rrelu_forward)(dtype_of(x), {here.const_data_ptr<int64_t>(), lower, upper}, x.numel(), x.const_data_ptr(),
                                y.mutable_data_ptr(), mask.mutable_data_ptr<uint8_t>());
  return mask;
}

std::tuple<at::Tensor, at::Tensor> rrelu_with_mask(const at::Tensor& x, const at::Tensor& seed, double lower, double upper) {
  if (!has_kernel(x)) return composite::rrelu_with_mask(x, seed, lower, upper);
  check_rrelu(seed, lower, upper);
  const at::Tensor source = dense(x);
  at::Tensor y = on_huge_pages(at::empty_like(source));
  at::Tensor mask = rrelu_into(y, source, seed, lower, upper);
  return {y, mask};
}

at::Tensor rrelu_with_mask_(at::Tensor x, const at::Tensor& seed, double lower, double upper) {
  if (!has_kernel(x)) return composite::rrelu_with_mask_(x, seed, lower, upper);
  check_rrelu(seed, lower, upper);
  at::assert_no_internal_overlap(x);
  const at::Tensor target = dense(x);
  at::Tensor mask = rrelu_into(target, target, seed, lower, upper);
  if (!target.is_same(x)) x.copy_(target);
  return mask;
}

at::Tensor rrelu_backward(const at::Tensor& grad_y, const at::Tensor& mask, c10::SymIntArrayRef stride, const at::Tensor& seed,
                          double lower, double upper) {
  const MaskedBackward b("rrelu_backward", grad_y, mask, stride);
  check_rrelu(seed, lower, upper);
  const at::Tensor here = seed_on_device_of(mask, seed);
  GK_LAUNCHER(mask, rrelu_backward)(dtype_of(b.grad_y), {here.const_data_ptr<int64_t>(), lower, upper}, b.grad_y.numel(),
                                    b.grad_y.const_data_ptr(), mask.const_data_ptr<uint8_t>(), b.grad_x.mutable_data_ptr());
  return b.grad_x;
}

// For tracing: only shapes and strides.
namespace meta {

at::Tensor like(const at::Tensor& x, double) { return at::empty_like(x); }
void in_place(at::Tensor, double) {}
std::tuple<at::Tensor, at::Tensor> with_mask(const at::Tensor& x, double) { return {at::empty_like(x), mask_like(x)}; }
at::Tensor with_mask_(at::Tensor x, double) { return mask_like(x); }
at::Tensor leaky_relu_backward(const at::Tensor& grad_y, const at::Tensor& mask, c10::SymIntArrayRef stride, double) {
  check_mask("leaky_relu_backward", grad_y, mask, stride.size());
  return at::empty_strided_symint(grad_y.sym_sizes(), stride, grad_y.options());
}
at::Tensor elu_backward(const at::Tensor& grad_y, const at::Tensor& self_or_result, double, bool) {
  check_backward("elu_backward", grad_y, self_or_result);
  return at::empty_like(self_or_result);
}
at::Tensor swish_backward(const at::Tensor& grad_y, const at::Tensor& x, double) {
  check_backward("swish_backward", grad_y, x);
  return at::empty_like(x);
}
at::Tensor swish_tensor(const at::Tensor& x, const at::Tensor& beta) {
  return composite::parametric_has_kernel(x, beta) ? at::empty_like(x) : composite::swish_tensor(x, beta);
}
at::Tensor prelu(const at::Tensor& x, const at::Tensor& weight) {
  return composite::parametric_has_kernel(x, weight) ? at::empty_like(x) : composite::prelu(x, weight);
}
std::tuple<at::Tensor, at::Tensor> parametric_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& parameter,
                                                       std::array<bool, 2> output_mask) {
  check_parametric_backward("gradient of a parameter", grad_y, x, parameter);
  return {output_mask[0] ? at::empty_like(x) : at::empty({0}, x.options()),
          output_mask[1] ? at::empty_like(parameter, at::MemoryFormat::Contiguous) : at::empty({0}, parameter.options())};
}
std::tuple<at::Tensor, at::Tensor> rrelu_with_mask(const at::Tensor& x, const at::Tensor& seed, double lower, double upper) {
  check_rrelu(seed, lower, upper);
  return {at::empty_like(x), mask_like(x)};
}
at::Tensor rrelu_with_mask_(at::Tensor x, const at::Tensor& seed, double lower, double upper) {
  check_rrelu(seed, lower, upper);
  return mask_like(x);
}
at::Tensor rrelu_backward(const at::Tensor& grad_y, const at::Tensor& mask, c10::SymIntArrayRef stride, const at::Tensor& seed,
                          double lower, double upper) {
  check_mask("rrelu_backward", grad_y, mask, stride.size());
  check_rrelu(seed, lower, upper);
  return at::empty_strided_symint(grad_y.sym_sizes(), stride, grad_y.options());
}

}  // namespace meta

void add_activation_kernels(torch::Library& m) {
  m.impl("leaky_relu", on_device<leaky_relu>);
  m.impl("leaky_relu_", on_device<leaky_relu_>);
  m.impl("leaky_relu_with_mask", on_device<leaky_relu_with_mask>);
  m.impl("leaky_relu_with_mask_", on_device<leaky_relu_with_mask_>);
  m.impl("leaky_relu_backward", on_device<leaky_relu_backward>);
  m.impl("elu", on_device<elu>);
  m.impl("elu_", on_device<elu_>);
  m.impl("elu_backward", on_device<elu_backward>);
  m.impl("swish", on_device<swish>);
  m.impl("swish_backward", on_device<swish_backward>);
  m.impl("swish.Tensor", on_device<swish_tensor>);
  m.impl("swish_backward.Tensor", on_device<swish_tensor_backward>);
  m.impl("prelu", on_device<prelu>);
  m.impl("prelu_backward", on_device<prelu_backward>);
  m.impl("rrelu_with_mask", on_device<rrelu_with_mask>);
  m.impl("rrelu_with_mask_", on_device<rrelu_with_mask_>);
  m.impl("rrelu_backward", on_device<rrelu_backward>);
}

void add_composites(torch::Library& m) {
  m.impl("leaky_relu", composite::leaky_relu);
  m.impl("leaky_relu_", composite::leaky_relu_);
  m.impl("elu", composite::elu);
  m.impl("elu_", composite::elu_);
  m.impl("swish", composite::swish);
  m.impl("swish.Tensor", composite::swish_tensor);
  m.impl("prelu", composite::prelu);
  m.impl("rrelu_with_mask", composite::rrelu_with_mask);
  m.impl("rrelu_with_mask_", composite::rrelu_with_mask_);
}

}  // namespace

GK_LIBRARY_IMPL(CPU, m) { add_activation_kernels(m); }
#if defined(GK_WITH_CUDA)
GK_LIBRARY_IMPL(CUDA, m) { add_activation_kernels(m); }
#endif

GK_LIBRARY_IMPL(Meta, m) {
  m.impl("leaky_relu", meta::like);
  m.impl("leaky_relu_", meta::in_place);
  m.impl("leaky_relu_with_mask", meta::with_mask);
  m.impl("leaky_relu_with_mask_", meta::with_mask_);
  m.impl("leaky_relu_backward", meta::leaky_relu_backward);
  m.impl("elu", meta::like);
  m.impl("elu_", meta::in_place);
  m.impl("elu_backward", meta::elu_backward);
  m.impl("swish", meta::like);
  m.impl("swish_backward", meta::swish_backward);
  m.impl("swish.Tensor", meta::swish_tensor);
  m.impl("swish_backward.Tensor", meta::parametric_backward);
  m.impl("prelu", meta::prelu);
  m.impl("prelu_backward", meta::parametric_backward);
  m.impl("rrelu_with_mask", meta::rrelu_with_mask);
  m.impl("rrelu_with_mask_", meta::rrelu_with_mask_);
  m.impl("rrelu_backward", meta::rrelu_backward);
}

// For devices without kernels.
GK_LIBRARY_IMPL(CompositeExplicitAutograd, m) { add_composites(m); }

// For vmap: ATen's operators have batching rules.
GK_LIBRARY_IMPL(FuncTorchBatched, m) { add_composites(m); }

// torch's fallback resolves the negative bit of the arguments that an operator reads. For arguments that an
// operator writes, it takes the first results, if there are any, as the new values.
GK_LIBRARY_IMPL(Negative, m) {
  for (const char* name : {"leaky_relu_", "leaky_relu_with_mask_", "elu_", "rrelu_with_mask_"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace gradkernels
