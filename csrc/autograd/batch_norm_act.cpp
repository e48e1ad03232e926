// batch_norm_act's gradient. Kept for it: x, mean and invstd, from which the argument of the activation is rebuilt; with a residual one bit
// an element where the activation has two slopes, else the residual itself. Running statistics are never kept: a training step between an
// evaluation's forward and backward would change them. Under create_graph the forward is composed again of ATen's operators and
// differentiated. Under gradkernels.recompute what the output is computed from is kept beside that, the residual in any case.
#include "autograd/recompute.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorGeometry.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/where.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <limits>

#include "autograd/function.h"
#include "ops/composite.h"

namespace gradkernels::autograd {

using ops::OptionalTensor;
using torch::autograd::SavedVariable;

struct RecomputedOutput {
  // Of what there is not, undefined tensors.
  SavedVariable x, weight, bias, residual, mean, invstd;
  std::string act;
  double act_param;
  // Over x, those of recomputed inputs among them.
  int passes;
  // Those of the output as forward left it.
  c10::weak_intrusive_ptr<c10::StorageImpl> storage{c10::intrusive_ptr<c10::StorageImpl>()};
  at::TensorGeometry geometry;
  at::ScalarType dtype;

  // Once more, bit for bit: the operator's second pass, with the statistics that it applied.
  at::Tensor compute() const {
    return std::get<0>(call_below_autograd<ops::BatchNormActElemt>(x.unpack(), mean.unpack(), invstd.unpack(), weight.unpack(),
                                                                   bias.unpack(), residual.unpack(), act, act_param));
  }

  // What was written has another version, what was assigned to y.data lies elsewhere or otherwise.
  bool is_unchanged(const at::Tensor& y) const {
    return y._version() == 0 && y.has_storage() && storage.lock().get() == y.storage().unsafeGetStorageImpl() &&
           y.sym_sizes() == geometry.sym_sizes() && y.sym_strides() == geometry.sym_strides() &&
           y.sym_storage_offset() == geometry.sym_storage_offset() && y.scalar_type() == dtype && !y.is_neg();
  }
};

namespace {

using ConstOutput = std::shared_ptr<const RecomputedOutput>;

struct BatchNormActGradient : Gradient<BatchNormActGradient, 4> {
  static constexpr const char* kName = "BatchNormActBackward";
  // Of what is not kept, undefined tensors.
  SavedVariable x, weight, bias, residual, mean, invstd, mask;
  bool training;
  double eps;
  std::string act;
  double act_param;
  // Null where the output is kept. Atomic, since mutex_ may be held by who waits for Python's lock.
  ConstOutput output;

  template <typename Self, typename F>
  static void members(Self& self, const F& f) {
    f(self.x, self.weight, self.bias, self.residual, self.mean, self.invstd, self.mask, self.training, self.eps, self.act, self.act_param);
  }

  variable_list backward(const at::Tensor& grad_y, std::array<bool, 4> wanted) {
    return at::GradMode::is_enabled() ? differentiable_gradients(grad_y, wanted) : gradients(grad_y, wanted);
  }

  void release_variables() override {
    Gradient::release_variables();
    std::atomic_store(&output, ConstOutput());
  }

  ConstOutput recomputed_output() const { return std::atomic_load(&output); }

 private:
  variable_list gradients(const at::Tensor& grad_y, std::array<bool, 4> wanted) {
    std::array<bool, 4> computed = wanted;
    // The gradient of the residual is then grad_y as it stands.
    if (composite::gradient_is_grad_y(act)) computed[3] = false;
    auto [grad_x, grad_weight, grad_bias, grad_residual] =
        call_below_autograd<ops::BatchNormActBackward>(grad_y, x.unpack(), mean.unpack(), invstd.unpack(), weight.unpack(), bias.unpack(),
                                                       residual.unpack(), mask.unpack(), training, act, act_param, computed);
    variable_list result(4);
    if (wanted[0]) result[0] = grad_x;
    if (wanted[1]) result[1] = grad_weight;
    if (wanted[2]) result[2] = grad_bias;
    if (wanted[3]) result[3] = computed[3] ? grad_residual : grad_y;
    return result;
  }

  variable_list differentiable_gradients(const at::Tensor& grad_y, std::array<bool, 4> wanted) {
    // Differentiated by these aliases: the originals may be one tensor, or depend on each other, and each would be given the gradient of
    // both.
    const auto alias = [](const at::Tensor& original) { return original.defined() ? original.view_as(original) : original; };
    const at::Tensor inputs[] = {alias(x.unpack()), alias(weight.unpack()), alias(bias.unpack()), alias(residual.unpack())};
    const at::Tensor of_two_slopes = mask.unpack();
    at::Tensor output = normalised(inputs[0], inputs[1], inputs[2]);
    at::Tensor grad_output = grad_y;
    if (of_two_slopes.defined()) {
      // act' takes two values and is constant around x: the factor on grad_y is the gradient that the mask makes of ones. Where the mask
      // makes 0 of inf, the gradient is 0 for any grad_y.
      const auto gradient_of = [&](double value) {
        const at::NoGradGuard no_grad;
        return std::get<3>(call<ops::BatchNormActBackward>(
            at::full_like(grad_y, value), inputs[0], mean.unpack(), invstd.unpack(), ops::OptionalTensor(), ops::OptionalTensor(),
            ops::OptionalTensor(), of_two_slopes, false, act, act_param, std::array<bool, 4>{false, false, false, true}));
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
    // Outside of `output`, the residual is added to it.
    if (wanted[3] && !inputs[3].defined()) result[3] = grad_output;
    return result;
  }

  // batch_norm(x), to be differentiated again: through the batch's statistics in training, with constant ones in evaluation.
  at::Tensor normalised(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) const {
    if (training) return at::batch_norm(x, weight, bias, {}, {}, true, 0.0, eps, false);
    std::vector<int64_t> per_channel(x.dim(), 1);
    per_channel[1] = -1;
    at::Tensor z = (x - mean.unpack().view(per_channel)) * invstd.unpack().view(per_channel);
    if (weight.defined()) z = z * weight.view(per_channel);
    if (bias.defined()) z = z + bias.view(per_channel);
    return z.to(x.scalar_type());
  }
};

// No output costs more. In a chain of residual blocks each takes that of the block before: every third is kept.
constexpr int kMostPasses = 2;

PyObject* recomputing_hook = nullptr;

bool is_recomputing() {
  const at::impl::SavedTensorDefaultHooksTLS& hooks = at::SavedTensorDefaultHooks::get_tls_state();
  return recomputing_hook != nullptr && !hooks.is_tracing && !hooks.stack.empty() &&
         hooks.stack.top().first.ptr(getPyInterpreter()) == recomputing_hook;
}

// What x is computed from, where it is an output to be recomputed, still as forward left it; else null.
ConstOutput recomputed(const at::Tensor& x) {
  if (!x.defined() || x.is_view()) return nullptr;
  const auto* node = dynamic_cast<const BatchNormActGradient*>(torch::autograd::impl::grad_fn_unsafe(x));
  ConstOutput output = node != nullptr ? node->recomputed_output() : nullptr;
  return output && output->is_unchanged(x) ? output : nullptr;
}

int passes_of(const at::Tensor& x) {
  const ConstOutput output = recomputed(x);
  return output ? output->passes : 0;
}

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Result batch_norm_act(const at::Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                      const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                      c10::string_view act, double act_param) {
  // It is incremented last, which torch would refuse then.
  if (training) torch::autograd::check_no_requires_grad(num_batches_tracked, "num_batches_tracked", "batch_norm_act");
  if (!composite::batch_norm_act_has_kernel(x, running_mean, running_var, weight, bias, num_batches_tracked, training) ||
      differentiates_through_aten(x, weight, bias, residual)) {
    return composite::batch_norm_act(x, running_mean, running_var, weight, bias, residual, num_batches_tracked, training, momentum, eps,
                                     act, act_param);
  }
  torch::autograd::check_no_requires_grad(running_mean, "running_mean", "native_batch_norm");
  torch::autograd::check_no_requires_grad(running_var, "running_var", "native_batch_norm");
  const auto compute = [&] {
    return call_below_autograd<ops::BatchNormAct>(x, running_mean, running_var, weight, bias, residual, num_batches_tracked, training,
                                                  momentum, eps, act, act_param);
  };
  if (!records(x, weight, bias, residual)) return compute();
  const bool recomputing = is_recomputing();
  const auto keep = [&](const OptionalTensor& input) {
    const at::Tensor tensor = input.value_or(at::Tensor());
    // Python is called for those only that are not to be kept.
    std::optional<PastHooks> past_hooks;
    if (recomputing && passes_of(tensor) == 0) past_hooks.emplace();
    return SavedVariable(tensor, /*is_output=*/false);
  };
  const auto node = gradient_of<BatchNormActGradient>(x, weight, bias, residual);
  // What may not be kept is an error before the running statistics are written.
  node->x = keep(x);
  node->weight = keep(weight);
  node->bias = keep(bias);
  node->training = training;
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

// Counts the versions of what compute() writes.
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

// Not the fallback of the other parts, which goes past the counting of versions.
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
  // Detached, since x may be an output of the very node that saves it.
  const at::Tensor detached = x.detach();
  const PastHooks past_hooks;
  return {SavedVariable(detached, /*is_output=*/false), nullptr};
}

at::Tensor unpack(const Packed& packed) { return packed.output ? packed.output->compute() : packed.kept.unpack(); }

void recompute_under(PyObject* pack_hook) { recomputing_hook = pack_hook; }

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
