// The activations' gradients: leaky_relu keeps one bit an element; elu its output where alpha >= 0, which the next layer keeps anyway, else
// its input; swish its input. Under create_graph leaky_relu's gradient, linear in grad_y, is recorded as the same operator again; the
// others are then written in ATen's differentiable operators.
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "autograd/function.h"
#include "common/check.h"
#include "ops/composite.h"

namespace gradkernels::autograd {
namespace {

// What a gradient made from a mask needs.
void save_mask(AutogradContext* ctx, const at::Tensor& mask, std::vector<c10::SymInt> stride, double negative_slope) {
  ctx->save_for_backward({mask});
  ctx->saved_data["stride"] = std::move(stride);
  ctx->saved_data["negative_slope"] = negative_slope;
  ctx->set_materialize_grads(false);
}

at::Tensor gradient_from_mask(AutogradContext* ctx, const at::Tensor& grad) {
  if (!grad.defined()) return {};
  return call<ops::LeakyReluBackward>(grad, ctx->get_saved_variables()[0], ctx->saved_data["stride"].toSymIntVector(),
                                      ctx->saved_data["negative_slope"].toDouble());
}

struct LeakyRelu : torch::autograd::Function<LeakyRelu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, double negative_slope) {
    auto [y, mask] = call_below_autograd<ops::LeakyReluWithMask>(x, negative_slope);
    save_mask(ctx, mask, y.sym_strides().vec(), negative_slope);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return {gradient_from_mask(ctx, grads[0]), {}}; }
};

struct LeakyReluInplace : torch::autograd::Function<LeakyReluInplace> {
  static at::Tensor forward(AutogradContext* ctx, at::Tensor x, double negative_slope) {
    const at::Tensor mask = call_below_version_counting<ops::LeakyReluWithMaskInplace>(x, negative_slope);
    ctx->mark_dirty({x});
    // The order of the copy that the kernel works on where x has gaps.
    save_mask(ctx, mask, (x.is_non_overlapping_and_dense() ? x : at::empty_like(x)).sym_strides().vec(), negative_slope);
    return x;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return {gradient_from_mask(ctx, grads[0]), {}}; }
};

struct LeakyReluBackward : torch::autograd::Function<LeakyReluBackward> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& grad_y, const at::Tensor& mask, std::vector<c10::SymInt> stride,
                            double negative_slope) {
    at::Tensor grad_x = call_below_autograd<ops::LeakyReluBackward>(grad_y, mask, stride, negative_slope);
    save_mask(ctx, mask, std::move(stride), negative_slope);
    return grad_x;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {gradient_from_mask(ctx, grads[0]), {}, {}, {}};
  }
};

void save_elu(AutogradContext* ctx, const at::Tensor& self_or_result, double alpha, bool is_result) {
  ctx->save_for_backward({self_or_result});
  ctx->saved_data["alpha"] = alpha;
  ctx->saved_data["is_result"] = is_result;
  ctx->set_materialize_grads(false);
}

variable_list elu_gradients(AutogradContext* ctx, const at::Tensor& grad) {
  if (!grad.defined()) return {{}, {}};
  return {call<ops::EluBackward>(grad, ctx->get_saved_variables()[0], ctx->saved_data["alpha"].toDouble(),
                                 ctx->saved_data["is_result"].toBool()),
          {}};
}

struct Elu : torch::autograd::Function<Elu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, double alpha) {
    const at::Tensor y = call_below_autograd<ops::Elu>(x, alpha);
    // An output of 16 bits does not hold the digits that the gradient near its end, -alpha, is read from.
    const bool is_result = alpha >= 0.0 && x.element_size() > 2;
    save_elu(ctx, is_result ? y : x, alpha, is_result);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return elu_gradients(ctx, grads[0]); }
};

struct EluInplace : torch::autograd::Function<EluInplace> {
  static at::Tensor forward(AutogradContext* ctx, at::Tensor x, double alpha) {
    call_below_version_counting<ops::EluInplace>(x, alpha);
    ctx->mark_dirty({x});
    save_elu(ctx, x, alpha, true);
    return x;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return elu_gradients(ctx, grads[0]); }
};

struct Swish : torch::autograd::Function<Swish> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, double beta) {
    ctx->save_for_backward({x});
    ctx->saved_data["beta"] = beta;
    ctx->set_materialize_grads(false);
    return call_below_autograd<ops::Swish>(x, beta);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return {{}, {}};
    return {call<ops::SwishBackward>(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["beta"].toDouble()), {}};
  }
};

// Operator(x, parameter): by ATen where it must, recorded as Function where a gradient will be wanted, else straight below.
template <typename Operator, typename Function, auto kComposite>
at::Tensor unary(const at::Tensor& x, double parameter) {
  if (!has_kernel(x) || differentiates_through_aten(x)) return kComposite(x, parameter);
  if (records(x)) return Function::apply(x, parameter);
  return call_below_autograd<Operator>(x, parameter);
}

template <typename Operator, typename Function, auto kComposite>
void unary_inplace(at::Tensor x, double parameter) {
  if (!has_kernel(x) || differentiates_through_aten(x)) return kComposite(x, parameter);
  // Before anything is written.
  torch::autograd::check_inplace(x, records(x));
  if (records(x)) {
    Function::apply(x, parameter);
  } else {
    call_below_autograd<Operator>(x, parameter);
  }
}

at::Tensor leaky_relu_backward(const at::Tensor& grad_y, const at::Tensor& mask, c10::SymIntArrayRef stride, double negative_slope) {
  if (records(grad_y)) return LeakyReluBackward::apply(grad_y, mask, stride.vec(), negative_slope);
  return call_below_autograd<ops::LeakyReluBackward>(grad_y, mask, stride, negative_slope);
}

// With alpha < 0 the output does not determine the gradient: ATen refuses, in its words.
void elu_(at::Tensor x, double alpha) {
  if (alpha < 0.0 && records(x)) return composite::elu_(x, alpha);
  unary_inplace<ops::EluInplace, EluInplace, composite::elu_>(x, alpha);
}

at::Tensor elu_backward(const at::Tensor& grad_y, const at::Tensor& self_or_result, double alpha, bool is_result) {
  if (records(grad_y, self_or_result)) return at::elu_backward(grad_y, alpha, 1, 1, is_result, self_or_result);
  return call_below_autograd<ops::EluBackward>(grad_y, self_or_result, alpha, is_result);
}

at::Tensor swish_backward(const at::Tensor& grad_y, const at::Tensor& x, double beta) {
  if (records(grad_y, x)) return composite::swish_backward(grad_y, x, beta);
  return call_below_autograd<ops::SwishBackward>(grad_y, x, beta);
}

// Counts the version of x around Operator, which writes it.
template <typename Operator>
auto counting_version(at::Tensor x, double parameter) {
  increment_version(x);
  return call_below_version_counting<Operator>(x, parameter);
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkernels, Autograd, m) {
  m.impl("leaky_relu", unary<ops::LeakyRelu, LeakyRelu, composite::leaky_relu>);
  m.impl("leaky_relu_", unary_inplace<ops::LeakyReluInplace, LeakyReluInplace, composite::leaky_relu_>);
  m.impl("leaky_relu_with_mask", torch::autograd::autogradNotImplementedFallback());
  m.impl("leaky_relu_with_mask_", torch::autograd::autogradNotImplementedFallback());
  m.impl("leaky_relu_backward", leaky_relu_backward);
  m.impl("elu", unary<ops::Elu, Elu, composite::elu>);
  m.impl("elu_", elu_);
  m.impl("elu_backward", elu_backward);
  m.impl("swish", unary<ops::Swish, Swish, composite::swish>);
  m.impl("swish_backward", swish_backward);
}

TORCH_LIBRARY_IMPL(gradkernels, ADInplaceOrView, m) {
  m.impl("leaky_relu_", counting_version<ops::LeakyReluInplace>);
  m.impl("leaky_relu_with_mask_", counting_version<ops::LeakyReluWithMaskInplace>);
  m.impl("elu_", counting_version<ops::EluInplace>);
}

}  // namespace gradkernels::autograd
