// The gradient of batch_norm_act and group_norm_act. It saves x, mean and invstd, from which it computes the argument of the
// activation again. With a residual, it also saves one bit for each element if the activation has two slopes,
// or the residual if the gradient reads the value. It never saves the running statistics, because a training
// step between forward and backward of an evaluation would change them.
//
// Under create_graph, the forward pass is computed again by ATen's operators and differentiated. Under
// gradkernels.recompute, all inputs that compute the output again are kept too, always with the residual.
#include "autograd/recompute.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorGeometry.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/where.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include <limits>

#include "autograd/function.h"
#include "common/library.h"
#include "ops/composite.h"

namespace gradkernels::autograd {

using ops::OptionalTensor;
using torch::autograd::SavedVariable;

struct RecomputedOutput {
  // Undefined for inputs that were not passed.
  SavedVariable x, weight, bias, residual, mean, invstd;
  int64_t num_groups;
  std::string act;
  double act_param;
  // The passes over a tensor that compute() takes, including those that recompute its inputs.
  int passes;
  // Storage, geometry and dtype of the output after forward.
  c10::weak_intrusive_ptr<c10::StorageImpl> storage{c10::intrusive_ptr<c10::StorageImpl>()};
  at::TensorGeometry geometry;
  at::ScalarType dtype;

  // Computes the same output again, bit for bit: the operator's second pass, with the statistics of the first
  // call.
  at::Tensor compute() const {
    if (num_groups > 0) {
      return std::get<0>(call_below_autograd<ops::GroupNormActElemt>(x.unpack(), mean.unpack(), invstd.unpack(), num_groups,
                                                                     weight.unpack(), bias.unpack(), residual.unpack(), act, act_param));
    }
    return std::get<0>(call_below_autograd<ops::BatchNormActElemt>(x.unpack(), mean.unpack(), invstd.unpack(), weight.unpack(),
                                                                   bias.unpack(), residual.unpack(), act, act_param));
  }

  // A write to y changes its version; an assignment to y.data changes its storage or its geometry.
  bool is_unchanged(const at::Tensor& y) const {
    return y._version() == 0 && y.has_storage() && storage.lock().get() == y.storage().unsafeGetStorageImpl() &&
           y.sym_sizes() == geometry.sym_sizes() && y.sym_strides() == geometry.sym_strides() &&
           y.sym_storage_offset() == geometry.sym_storage_offset() && y.scalar_type() == dtype && !y.is_neg();
  }
};

namespace {

using ConstOutput = std::shared_ptr<const RecomputedOutput>;

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct NormActGradient : Gradient<NormActGradient, 4> {
  static constexpr const char* kName = "NormActBackward";
  // Undefined for tensors that are not kept.
  SavedVariable x, weight, bias, residual, mean, invstd, mask;
  bool training;
  int64_t num_groups;  // 0 in batch norm
  int64_t format;      // the memory format of x, in which the kernels wrote the mask
  double eps;
  std::string act;
  double act_param;
  // Null if the output is kept. Accessed atomically and not under mutex_: its owner may be waiting for
  // Python's lock.
  ConstOutput output;

  template <typename Self, typename F>
  static void members(Self& self, const F& f) {
    f(self.x, self.weight, self.bias, self.residual, self.mean, self.invstd, self.mask, self.training, self.num_groups, self.format,
      self.eps, self.act, self.act_param);
  }

  std::string name() const override { return num_groups > 0 ? "GroupNormActBackward" : "BatchNormActBackward"; }

  variable_list backward(const at::Tensor& grad_y, std::array<bool, 4> wanted) {
    return at::GradMode::is_enabled() ? differentiable_gradients(grad_y, wanted) : gradients(grad_y, wanted);
  }

  void release_variables() override {
    Gradient::release_variables();
    std::atomic_store(&output, ConstOutput());
  }

  ConstOutput recomputed_output() const { return std::atomic_load(&output); }

 private:
  // The operator that computes gradients. All saved tensors are unpacked before the call: a hook may compute them again, and
  // needs autograd. A hook may also return x in another memory format.
  Result operator_gradients(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                            const at::Tensor& residual, std::array<bool, 4> computed) const {
    const auto memory_format = static_cast<at::MemoryFormat>(format);
    const at::Tensor as_saved = x.suggest_memory_format() == memory_format ? x : at::empty_like(x, memory_format).copy_(x);
    if (num_groups > 0) {
      return call_in_backward<ops::GroupNormActBackward>(grad_y, as_saved, mean.unpack(), invstd.unpack(), num_groups, weight, bias,
                                                         residual, mask.unpack(), act, act_param, computed);
    }
    return call_in_backward<ops::BatchNormActBackward>(grad_y, as_saved, mean.unpack(), invstd.unpack(), weight, bias, residual,
                                                       mask.unpack(), training, act, act_param, computed);
  }

  variable_list gradients(const at::Tensor& grad_y, std::array<bool, 4> wanted) {
    std::array<bool, 4> computed = wanted;
    // The gradient of the residual is then grad_y itself.
    if (composite::gradient_is_grad_y(act)) computed[3] = false;
    auto [grad_x, grad_weight, grad_bias, grad_residual] =
        operator_gradients(grad_y, x.unpack(), weight.unpack(), bias.unpack(), residual.unpack(), computed);
    variable_list result(4);
    if (wanted[0]) result[0] = grad_x;
    if (wanted[1]) result[1] = grad_weight;
    if (wanted[2]) result[2] = grad_bias;
    if (wanted[3]) result[3] = computed[3] ? grad_residual : grad_y;
    return result;
  }

  variable_list differentiable_gradients(const at::Tensor& grad_y, std::array<bool, 4> wanted) {
    // The gradients are those of aliases. Two of the originals may be the same tensor or depend on each
    // other, and the gradient of one would then include that of the other.
    const auto alias = [](const at::Tensor& original) { return original.defined() ? original.view_as(original) : original; };
    const at::Tensor original_x = x.unpack();
    const at::Tensor inputs[] = {alias(original_x), alias(weight.unpack()), alias(bias.unpack()), alias(residual.unpack())};
    const at::Tensor of_two_slopes = mask.unpack();
    at::Tensor output = normalised(inputs[0], inputs[1], inputs[2]);
    at::Tensor grad_output = grad_y;
    if (of_two_slopes.defined()) {
      // act' takes two values, and does not change near x: it is the gradient that the mask gives for a
      // grad_y of ones. Where an infinite grad_y gives 0, act stops the gradient, so it is 0 for every
      // grad_y.
      const auto gradient_of = [&](double value) {
        const at::NoGradGuard no_grad;
        // Not the alias: a view of one sample in channels_last has other strides, and the mask has the layout of x.
        return std::get<3>(operator_gradients(at::full_like(grad_y, value), original_x, {}, {}, {}, {false, false, false, true}));
      };
      const at::Tensor of_ones = gradient_of(1.0), of_infinities = gradient_of(std::numeric_limits<double>::infinity());
      grad_output = at::where(of_infinities == 0, 0, grad_y * of_ones);
    } else {
      output = composite::add_and_activate(output, inputs[3], act, act_param);
    }
    variable_list result(4);
    variable_list differentiated;
    std::vector<size_t> places;
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i] && inputs[i].defined()) {
        differentiated.push_back(inputs[i]);
        places.push_back(i);
      }
    }
    if (!differentiated.empty()) {
      const variable_list found =
          torch::autograd::grad({output}, differentiated, {grad_output}, /*retain_graph=*/true, /*create_graph=*/true);
      for (size_t i = 0; i < places.size(); ++i) result[places[i]] = found[i];
    }
    // The residual is not part of `output`: it is added, so its gradient is grad_output.
    if (wanted[3] && !inputs[3].defined()) result[3] = grad_output;
    return result;
  }

  // batch_norm(x) or group_norm(x) in differentiable operators. In training, the statistics depend on x; in evaluation, they
  // are constants.
  at::Tensor normalised(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) const {
    if (num_groups > 0) return composite::group_norm(x, num_groups, weight, bias, eps);
    if (training) return at::batch_norm(x, weight, bias, {}, {}, true, 0.0, eps, false);
    std::vector<int64_t> per_channel(x.dim(), 1);
    per_channel[1] = -1;
    at::Tensor z = (x - mean.unpack().view(per_channel)) * invstd.unpack().view(per_channel);
    if (weight.defined()) z = z * weight.view(per_channel);
    if (bias.defined()) z = z + bias.view(per_channel);
    return z.to(x.scalar_type());
  }
};

// An output that would take more passes is kept. In a chain of residual blocks, the output of each block
// needs that of the block before: every third output is kept.
constexpr int kMostPasses = 2;

PyObject* recomputing_hook = nullptr;

bool is_recomputing() {
  const at::impl::SavedTensorDefaultHooksTLS& hooks = at::SavedTensorDefaultHooks::get_tls_state();
  return recomputing_hook != nullptr && !hooks.is_tracing && !hooks.stack.empty() &&
         hooks.stack.top().first.ptr(getPyInterpreter()) == recomputing_hook;
}

// If x is an output that is recomputed, and unchanged since forward: the inputs that compute it. Otherwise
// null.
ConstOutput recomputed(const at::Tensor& x) {
  if (!x.defined() || x.is_view()) return nullptr;
  const auto* node = dynamic_cast<const NormActGradient*>(torch::autograd::impl::grad_fn_unsafe(x));
  ConstOutput output = node != nullptr ? node->recomputed_output() : nullptr;
  return output && output->is_unchanged(x) ? output : nullptr;
}

int passes_of(const at::Tensor& x) {
  const ConstOutput output = recomputed(x);
  return output ? output->passes : 0;
}

// Calls compute() and records the gradient of its output.
template <typename Compute>
Result record(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual, bool training,
              int64_t num_groups, double eps, std::string_view act, double act_param, const Compute& compute) {
  if (!records(x, weight, bias, residual)) return compute();
  const bool recomputing = is_recomputing();
  const auto keep = [&](const OptionalTensor& input) {
    const at::Tensor tensor = input.value_or(at::Tensor());
    // The hooks, which call Python, only run for tensors that are recomputed.
    std::optional<PastHooks> past_hooks;
    if (recomputing && passes_of(tensor) == 0) past_hooks.emplace();
    return SavedVariable(tensor, /*is_output=*/false);
  };
  const auto node = gradient_of<NormActGradient>(x, weight, bias, residual);
  // Saving a tensor may raise an error, so it comes before the running statistics are written.
  node->x = keep(x);
  node->weight = keep(weight);
  node->bias = keep(bias);
  node->training = training;
  node->num_groups = num_groups;
  node->format = static_cast<int64_t>(x.suggest_memory_format());
  node->eps = eps;
  node->act = std::string(act);
  node->act_param = act_param;
  if (composite::gradient_reads_value(act)) node->residual = keep(residual);
  std::shared_ptr<RecomputedOutput> output;
  const int passes = recomputing ? 1 + passes_of(x) + passes_of(residual.value_or(at::Tensor())) : 0;
  if (recomputing && passes <= kMostPasses) {
    output = std::make_shared<RecomputedOutput>();
    output->x = keep(x);
    output->weight = keep(weight);
    output->bias = keep(bias);
    output->residual = keep(residual);
    output->num_groups = num_groups;
    output->act = node->act;
    output->act_param = act_param;
    output->passes = passes;
  }
  Result result = compute();
  const auto& [y, mean, invstd, mask] = result;
  node->mean = keep(mean);
  node->invstd = keep(invstd);
  if (mask.sym_numel() > 0) node->mask = keep(mask);
  if (output) {
    output->mean = keep(mean);
    output->invstd = keep(invstd);
    output->storage = y.storage().getWeakStorageImpl();
    output->geometry = at::TensorGeometry(y);
    output->dtype = y.scalar_type();
    node->output = std::move(output);
  }
  recorded(y, node);
  return result;
}

Result batch_norm_act(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                      const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                      c10::string_view act, double act_param) {
  // The increment comes last, when torch would raise an error too late.
  if (training) torch::autograd::check_no_requires_grad(num_batches_tracked, "num_batches_tracked", "batch_norm_act");
  if (!composite::batch_norm_act_has_kernel(x, running_mean, running_var, weight, bias, num_batches_tracked, training) ||
      differentiates_through_aten(x, weight, bias, residual)) {
    return composite::batch_norm_act(x, running_mean, running_var, weight, bias, residual, num_batches_tracked, training, momentum, eps,
                                     act, act_param);
  }
  torch::autograd::check_no_requires_grad(running_mean, "running_mean", "native_batch_norm");
  torch::autograd::check_no_requires_grad(running_var, "running_var", "native_batch_norm");
  return record(x, weight, bias, residual, training, /*num_groups=*/0, eps, act, act_param, [&] {
    return call_below_autograd<ops::BatchNormAct>(x, running_mean, running_var, weight, bias, residual, num_batches_tracked, training,
                                                  momentum, eps, act, act_param);
  });
}

Result group_norm_act(const at::Tensor& x, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& residual, double eps, c10::string_view act, double act_param) {
  if (!composite::group_norm_act_has_kernel(x, num_groups, weight, bias) || differentiates_through_aten(x, weight, bias, residual)) {
    return composite::group_norm_act(x, num_groups, weight, bias, residual, eps, act, act_param);
  }
  return record(x, weight, bias, residual, /*training=*/true, num_groups, eps, act, act_param,
                [&] { return call_below_autograd<ops::GroupNormAct>(x, num_groups, weight, bias, residual, eps, act, act_param); });
}

// Calls compute(), which writes these tensors, and bumps their versions.
template <typename Compute>
auto counting(const Compute& compute, std::initializer_list<OptionalTensor> written) {
  for (const OptionalTensor& each : written) check_version_counts(each.value_or(at::Tensor()));
  auto result = compute();
  for (const OptionalTensor& each : written) increment_version(each.value_or(at::Tensor()));
  return result;
}

Result counting_versions(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                         const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                         const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                         c10::string_view act, double act_param) {
  const auto compute = [&] {
    return call_below_version_counting<ops::BatchNormAct>(x, running_mean, running_var, weight, bias, residual, num_batches_tracked,
                                                          training, momentum, eps, act, act_param);
  };
  return training ? counting(compute, {running_mean, running_var, num_batches_tracked}) : compute();
}

using GatheredStats = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Not the fallback that the other steps have: it would skip the bumping of versions.
GatheredStats gather_stats(const at::Tensor& moments, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  TORCH_CHECK_NOT_IMPLEMENTED(!records(moments), "the derivative for batch_norm_act_gather_stats is not implemented");
  return call_below_autograd<ops::BatchNormActGatherStats>(moments, running_mean, running_var, num_batches_tracked, momentum, eps);
}

GatheredStats gather_stats_counting_versions(const at::Tensor& moments, const OptionalTensor& running_mean,
                                             const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                             std::optional<double> momentum, double eps) {
  const auto compute = [&] {
    return call_below_version_counting<ops::BatchNormActGatherStats>(moments, running_mean, running_var, num_batches_tracked, momentum,
                                                                     eps);
  };
  return counting(compute, {running_mean, running_var, num_batches_tracked});
}

}  // namespace

Packed pack(const at::Tensor& x) {
  if (ConstOutput output = recomputed(x)) return {SavedVariable(), std::move(output)};
  // Detached, because x may be an output of the node that saves it.
  const at::Tensor detached = x.detach();
  const PastHooks past_hooks;
  return {SavedVariable(detached, /*is_output=*/false), nullptr};
}

at::Tensor unpack(const Packed& packed) { return packed.output ? packed.output->compute() : packed.kept.unpack(); }

void recompute_under(PyObject* pack_hook) { recomputing_hook = pack_hook; }

GK_LIBRARY_IMPL(Autograd, m) {
  m.impl("batch_norm_act", batch_norm_act);
  m.impl("batch_norm_act_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("group_norm_act", group_norm_act);
  m.impl("group_norm_act_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("group_norm_act_elemt", torch::autograd::autogradNotImplementedFallback());
  // The gradient needs the other processes: gradkernels/sync_batch_norm_act.py computes it.
  m.impl("batch_norm_act_stats", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_act_gather_stats", gather_stats);
  m.impl("batch_norm_act_elemt", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_act_backward_reduce", torch::autograd::autogradNotImplementedFallback());
  m.impl("batch_norm_act_backward_elemt", torch::autograd::autogradNotImplementedFallback());
}

GK_LIBRARY_IMPL(ADInplaceOrView, m) {
  m.impl("batch_norm_act", counting_versions);
  m.impl("batch_norm_act_gather_stats", gather_stats_counting_versions);
}

}  // namespace gradkernels::autograd
