// The Python module gradkernels._C. Loading it registers the operators. Its functions call the dispatcher for
// the operators that Python calls most. They are faster than torch.ops, which tries one overload after the
// other.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "autograd/recompute.h"
#include "build_info.h"
#include "common/check.h"
#include "cpu/kernels.h"
#include "ops/operators.h"

namespace py = pybind11;

namespace gradkernels {
namespace {

using at::Tensor;
using ops::OptionalTensor;

py::dict build_info_dict() {
  const BuildInfo& built = build_info();
  py::dict info;
  info["torch"] = built.torch;
  info["instruction_sets"] = py::str(cpu::instruction_sets()).attr("split")();
  info["cuda_architectures"] = py::str(built.cuda_architectures).attr("split")();
  info["compiler"] = built.compiler;
  info["commit"] = built.commit;
  return info;
}

Tensor leaky_relu(Tensor x, double negative_slope, bool inplace) {
  if (!inplace) return call<ops::LeakyRelu>(x, negative_slope);
  call<ops::LeakyReluInplace>(x, negative_slope);
  return x;
}

Tensor elu(Tensor x, double alpha, bool inplace) {
  if (!inplace) return call<ops::Elu>(x, alpha);
  call<ops::EluInplace>(x, alpha);
  return x;
}

Tensor swish(const Tensor& x, double beta) { return call<ops::Swish>(x, beta); }

Tensor swish_tensor(const Tensor& x, const Tensor& beta) { return call<ops::SwishTensor>(x, beta); }

Tensor prelu(const Tensor& x, const Tensor& weight) { return call<ops::Prelu>(x, weight); }

Tensor rrelu(Tensor x, const Tensor& seed, double lower, double upper, bool inplace) {
  if (!inplace) return std::get<0>(call<ops::RreluWithMask>(x, seed, lower, upper));
  call<ops::RreluWithMaskInplace>(x, seed, lower, upper);
  return x;
}

Tensor batch_norm_act(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& weight,
                      const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& num_batches_tracked, bool training,
                      std::optional<double> momentum, double eps, std::string_view act, double act_param) {
  return std::get<0>(call<ops::BatchNormAct>(x, running_mean, running_var, weight, bias, residual, num_batches_tracked, training, momentum,
                                             eps, act, act_param));
}

Tensor group_norm_act(const Tensor& x, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& residual, double eps, std::string_view act, double act_param) {
  return std::get<0>(call<ops::GroupNormAct>(x, num_groups, weight, bias, residual, eps, act, act_param));
}

using Tensors = std::vector<Tensor>;

bool clips(const Tensor& grad) { return has_kernel(grad) && !grad.is_meta() && !grad.key_set().has(c10::DispatchKey::Python); }

bool clip_grad_supports(const Tensors& tensors) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [&](const Tensor& tensor) { return clips(tensor) && tensor.device() == tensors.front().device(); });
}

// The gradients of a list of parameters or of (name, parameter) pairs. Nothing if a gradient has no kernel,
// or if torch would warn (a tensor that is not a leaf and does not retain its gradient). In Python, walking
// the list would take longer than reading small gradients.
std::optional<Tensors> grads_of(const py::list& parameters) {
  Tensors grads;
  grads.reserve(parameters.size());
  for (const py::handle& entry : parameters) {
    PyObject* parameter = entry.ptr();
    const bool is_named = PyTuple_Check(parameter) && PyTuple_GET_SIZE(parameter) == 2 && PyUnicode_Check(PyTuple_GET_ITEM(parameter, 0));
    if (is_named) parameter = PyTuple_GET_ITEM(parameter, 1);
    if (!THPVariable_Check(parameter)) return std::nullopt;
    const Tensor& tensor = THPVariable_Unpack(parameter);
    if (tensor.key_set().has(c10::DispatchKey::Python) || !(tensor.is_leaf() || tensor.retains_grad())) return std::nullopt;
    const Tensor& grad = tensor.grad();
    if (!grad.defined()) continue;
    if (!clips(grad) || (!grads.empty() && grad.device() != grads.front().device())) return std::nullopt;
    grads.push_back(grad);
  }
  return grads.empty() ? std::nullopt : std::optional(std::move(grads));
}

// The total norm, and whether it is not finite and the gradients were therefore not clipped. Nothing if
// grads_of returns nothing.
std::optional<std::tuple<Tensor, bool>> clip_grad_norm_(const py::list& parameters, double max_norm, double norm_type,
                                                        bool error_if_nonfinite) {
  const std::optional<Tensors> grads = grads_of(parameters);
  if (!grads.has_value()) return std::nullopt;
  const py::gil_scoped_release without_gil;
  const at::NoGradGuard no_grad;
  const Tensor total_norm = std::get<3>(call<ops::GradNorms>(*grads, norm_type));
  const bool refused = error_if_nonfinite && !std::isfinite(total_norm.item<double>());
  if (!refused) call<ops::ClipGradsWithNormInplace>(*grads, max_norm, total_norm);
  c10::ScalarType dtype = grads->front().scalar_type();
  for (const Tensor& grad : *grads) {
    if (grad.scalar_type() != dtype) dtype = c10::promoteTypes(dtype, grad.scalar_type());
  }
  return std::tuple(total_norm.to(dtype), refused);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grad_norms(const Tensors& grads, double norm_type) {
  return call<ops::GradNorms>(grads, norm_type);
}

void clip_grads_with_norm_(const Tensors& grads, double max_norm, const Tensor& total_norm) {
  call<ops::ClipGradsWithNormInplace>(grads, max_norm, total_norm);
}

void clip_grad_value_(const Tensors& grads, double clip_value) { call<ops::ClipGradValueInplace>(grads, clip_value); }

void adaptive_clip_grad_(const Tensors& params, const Tensors& grads, double clip_factor, double eps, double norm_type) {
  call<ops::AdaptiveClipGradInplace>(params, grads, clip_factor, eps, norm_type);
}

// Whether every parameter has a kernel and no gaps, and its gradient and state have its dtype, shape and
// strides.
bool rmsprop_supports(const Tensors& params, const std::vector<Tensors>& lists) {
  for (size_t i = 0; i < params.size(); ++i) {
    if (!clips(params[i]) || params[i].device() != params.front().device() || !params[i].is_non_overlapping_and_dense()) return false;
    for (const Tensors& list : lists) {
      if (list.empty()) continue;
      if (!clips(list[i]) || !same_dtype_and_device(list[i], params[i]) || list[i].sizes() != params[i].sizes() ||
          list[i].strides() != params[i].strides()) {
        return false;
      }
    }
  }
  return true;
}

void rmsprop_(const Tensors& params, const Tensors& grads, const Tensors& square_avgs, const Tensors& grad_avgs,
              const Tensors& momentum_buffers, double lr, double alpha, double eps, double weight_decay, double momentum,
              double grad_coefficient) {
  call<ops::RmspropInplace>(params, grads, square_avgs, grad_avgs, momentum_buffers, lr, alpha, eps, weight_decay, momentum,
                            grad_coefficient);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // Other Python threads run while a kernel does.
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def("build_info", build_info_dict);
  m.def("instruction_set", [] { return cpu::kernels().name; });
  m.def("leaky_relu", leaky_relu, without_gil);
  m.def("elu", elu, without_gil);
  m.def("swish", swish, without_gil);
  m.def("swish_tensor", swish_tensor, without_gil);
  m.def("prelu", prelu, without_gil);
  m.def("rrelu", rrelu, without_gil);
  m.def("batch_norm_act", batch_norm_act, without_gil);
  m.def("group_norm_act", group_norm_act, without_gil);
  m.def("clip_grad_supports", clip_grad_supports);
  m.def("clip_grad_norm_", clip_grad_norm_);
  m.def("grad_norms", grad_norms, without_gil);
  m.def("clip_grads_with_norm_", clip_grads_with_norm_, without_gil);
  m.def("clip_grad_value_", clip_grad_value_, without_gil);
  m.def("adaptive_clip_grad_", adaptive_clip_grad_, without_gil);
  m.def("rmsprop_supports", rmsprop_supports);
  m.def("rmsprop_", rmsprop_, without_gil);
  py::class_<autograd::Packed>(m, "_Packed");
  m.def("pack_hook", autograd::pack);
  m.def("unpack_hook", autograd::unpack, without_gil);
  autograd::recompute_under(m.attr("pack_hook").ptr());
}

}  // namespace gradkernels
