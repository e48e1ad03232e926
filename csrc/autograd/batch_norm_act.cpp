// batch_norm_act's gradient. Kept for it: x, mean and invstd, from which the argument of the activation is rebuilt; with a residual one bit
// an element where the activation has two slopes, else the residual itself. Running statistics are never kept: a training step between an
// evaluation's forward and backward would change them. Under create_graph the forward is composed again of ATen's operators and
// differentiated.
#include <ATen/TensorOperators.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/ones_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "autograd/function.h"
#include "ops/composite.h"

namespace gradkernels::autograd {
namespace {

using ops::OptionalTensor;

struct BatchNormAct : torch::autograd::Function<BatchNormAct> {
  // The differentiable arguments come first: backward asks for gradients by the index of the edge, and absent tensors have none.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& residual, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                               const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                               std::string act, double act_param) {
    auto [y, mean, invstd, mask] = call_below_autograd<ops::BatchNormAct>(x, running_mean, running_var, weight, bias, residual,
                                                                          num_batches_tracked, training, momentum, eps, act, act_param);
    const at::Tensor none;
    const bool keeps_residual = act != "identity" && mask.sym_numel() == 0;
    ctx->save_for_backward({x, mean, invstd, weight.value_or(none), bias.value_or(none), keeps_residual ? residual.value_or(none) : none,
                            mask.sym_numel() == 0 ? none : mask});
    ctx->saved_data["has_residual"] = residual.has_value() && residual->defined();
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["act"] = std::move(act);
    ctx->saved_data["act_param"] = act_param;
    ctx->mark_non_differentiable({mean, invstd, mask});
    ctx->set_materialize_grads(false);
    return {y, mean, invstd, mask};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(12);
    if (!grads[0].defined()) return result;
    const Saved saved(ctx);
    const bool has_residual = ctx->saved_data["has_residual"].toBool();
    std::array<bool, 4> wanted = {ctx->needs_input_grad(0), false, false, false};
    size_t edge = 1;
    if (saved.weight.defined()) wanted[1] = ctx->needs_input_grad(edge++);
    if (saved.bias.defined()) wanted[2] = ctx->needs_input_grad(edge++);
    if (has_residual) wanted[3] = ctx->needs_input_grad(edge++);
    if (at::GradMode::is_enabled()) {
      differentiable_gradients(saved, grads[0], wanted, result);
    } else {
      // Of the identity, the gradient of the residual is grad_y as it stands.
      std::array<bool, 4> computed = wanted;
      if (saved.act == "identity") computed[3] = false;
      auto [grad_x, grad_weight, grad_bias, grad_residual] =
          call<ops::BatchNormActBackward>(grads[0], saved.x, saved.mean, saved.invstd, saved.weight, saved.bias, saved.residual, saved.mask,
                                          saved.training, saved.act, saved.act_param, computed);
      if (wanted[0]) result[0] = grad_x;
      if (wanted[1]) result[1] = grad_weight;
      if (wanted[2]) result[2] = grad_bias;
      if (wanted[3]) result[3] = computed[3] ? grad_residual : grads[0];
    }
    return result;
  }

 private:
  struct Saved {
    at::Tensor x, mean, invstd, weight, bias, residual, mask;
    bool training;
    double eps, act_param;
    std::string act;

    explicit Saved(AutogradContext* ctx)
        : training(ctx->saved_data["training"].toBool()),
          eps(ctx->saved_data["eps"].toDouble()),
          act_param(ctx->saved_data["act_param"].toDouble()),
          act(ctx->saved_data["act"].toStringRef()) {
      const variable_list tensors = ctx->get_saved_variables();
      x = tensors[0];
      mean = tensors[1];
      invstd = tensors[2];
      weight = tensors[3];
      bias = tensors[4];
      residual = tensors[5];
      mask = tensors[6];
    }

    // batch_norm(x), to be differentiated again: through the batch's statistics in training, with constant ones in evaluation.
    at::Tensor normalised() const {
      if (training) return at::batch_norm(x, weight, bias, {}, {}, true, 0.0, eps, false);
      std::vector<int64_t> per_channel(x.dim(), 1);
      per_channel[1] = -1;
      at::Tensor z = (x - mean.view(per_channel)) * invstd.view(per_channel);
      if (weight.defined()) z = z * weight.view(per_channel);
      if (bias.defined()) z = z + bias.view(per_channel);
      return z.to(x.scalar_type());
    }
  };

  static void differentiable_gradients(Saved saved, const at::Tensor& grad_y, std::array<bool, 4> wanted, variable_list& result) {
    // Differentiated by these aliases: the originals may be one tensor, or depend on each other, and each would be given the gradient of
    // both.
    for (at::Tensor* input : {&saved.x, &saved.weight, &saved.bias, &saved.residual}) {
      if (input->defined()) *input = input->view_as(*input);
    }
    at::Tensor output = saved.normalised();
    at::Tensor grad_output = grad_y;
    if (saved.mask.defined()) {
      // act' takes two values and is constant around x: the factor on grad_y is the gradient that the mask makes of ones.
      at::AutoGradMode no_grad(false);
      const at::Tensor factor = std::get<3>(call<ops::BatchNormActBackward>(
          at::ones_like(grad_y), saved.x, saved.mean, saved.invstd, ops::OptionalTensor(), ops::OptionalTensor(), ops::OptionalTensor(),
          saved.mask, false, saved.act, saved.act_param, std::array<bool, 4>{false, false, false, true}));
      at::AutoGradMode grad(true);
      grad_output = grad_y * factor;
    } else if (saved.act != "identity") {
      output = composite::add_and_activate(output, saved.residual, saved.act, saved.act_param);
    }
    const bool residual_inside = saved.residual.defined();
    const at::Tensor candidates[] = {saved.x, saved.weight, saved.bias, saved.residual};
    variable_list inputs;
    std::vector<int> places;
    for (int i = 0; i < 4; ++i) {
      if (!wanted[i] || (i == 3 && !residual_inside)) continue;
      inputs.push_back(candidates[i]);
      places.push_back(i);
    }
    if (!inputs.empty()) {
      const variable_list gradients = torch::autograd::grad({output}, inputs, {grad_output}, /*retain_graph=*/true, /*create_graph=*/true);
      for (size_t i = 0; i < places.size(); ++i) result[places[i]] = gradients[i];
    }
    if (wanted[3] && !residual_inside) result[3] = grad_output;
  }
};

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Result batch_norm_act(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                      const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                      c10::string_view act, double act_param) {
  if (!composite::batch_norm_act_has_kernel(x, running_mean, running_var, weight, bias, training) ||
      differentiates_through_aten(x, weight, bias, residual)) {
    return composite::batch_norm_act(x, running_mean, running_var, weight, bias, residual, num_batches_tracked, training, momentum, eps,
                                     act, act_param);
  }
  if (records(x, weight, bias, residual)) {
    const variable_list outputs = BatchNormAct::apply(x, weight, bias, residual, running_mean, running_var, num_batches_tracked, training,
                                                      momentum, eps, std::string(act), act_param);
    return {outputs[0], outputs[1], outputs[2], outputs[3]};
  }
  return call_below_autograd<ops::BatchNormAct>(x, running_mean, running_var, weight, bias, residual, num_batches_tracked, training,
                                                momentum, eps, act, act_param);
}

Result counting_versions(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                         const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                         const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                         c10::string_view act, double act_param) {
  Result result = call_below_version_counting<ops::BatchNormAct>(x, running_mean, running_var, weight, bias, residual, num_batches_tracked,
                                                                 training, momentum, eps, act, act_param);
  if (training) {
    for (const OptionalTensor& written : {running_mean, running_var, num_batches_tracked})
      increment_version(written.value_or(at::Tensor()));
  }
  return result;
}

using GatheredStats = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Not the fallback of the other parts, which goes past the counting of versions.
GatheredStats gather_stats(const at::Tensor& moments, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  TORCH_CHECK_NOT_IMPLEMENTED(!records(moments), "the derivative for batch_norm_act_gather_stats is not implemented");
  return call_below_autograd<ops::BatchNormActGatherStats>(moments, running_mean, running_var, num_batches_tracked, momentum, eps);
}

GatheredStats gather_stats_counting_versions(const at::Tensor& moments, const OptionalTensor& running_mean,
                                             const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                             std::optional<double> momentum, double eps) {
  GatheredStats result =
      call_below_version_counting<ops::BatchNormActGatherStats>(moments, running_mean, running_var, num_batches_tracked, momentum, eps);
  for (const OptionalTensor& written : {running_mean, running_var, num_batches_tracked}) increment_version(written.value_or(at::Tensor()));
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkernels, Autograd, m) {
  m.impl("batch_norm_act", batch_norm_act);
  m.impl("batch_norm_act_backward", torch::autograd::autogradNotImplementedFallback());
  // Their gradient needs the other processes: gradkernels/sync_batch_norm_act.py has it.
  m.impl("batch_norm_act_stats", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_act_gather_stats", gather_stats);
  m.impl("batch_norm_act_elemt", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_act_backward_reduce", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_act_backward_elemt", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(gradkernels, ADInplaceOrView, m) {
  m.impl("batch_norm_act", counting_versions);
  m.impl("batch_norm_act_gather_stats", gather_stats_counting_versions);
}

}  // namespace gradkernels::autograd
