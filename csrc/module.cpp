// The Python module gradkernels._C. Loading it registers the operators; its functions are short ways to the dispatcher for what Python
// calls most (torch.ops costs more a call: it resolves overloads by trial).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string_view>
#include <vector>

#include "build_stamp.h"
#include "common/check.h"
#include "cpu/kernels.h"
#include "ops/operators.h"

namespace py = pybind11;

namespace gradkernels {
namespace {

using at::Tensor;
using ops::OptionalTensor;

// gradkernels/_native.py looks for these bytes in the file before it loads it: built for another torch, loading can end the process.
__attribute__((used)) constexpr char kStamp[] = "gradkernels-built-for-torch=" GK_BUILT_FOR_TORCH;

py::dict build_info() {
  py::list instruction_sets;
  instruction_sets.append(cpu::kernels_base.name);
#if defined(__x86_64__)
  instruction_sets.append(cpu::kernels_avx2.name);
  instruction_sets.append(cpu::kernels_avx512.name);
#endif
  py::dict info;
  info["torch"] = GK_BUILT_FOR_TORCH;
  info["instruction_sets"] = instruction_sets;
  info["cuda_architectures"] = py::str(GK_CUDA_ARCHITECTURES).attr("split")();
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["commit"] = GK_COMMIT;
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

bool clip_grad_applies(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) {
    if (!has_kernel(tensor) || tensor.element_size() == 2 || !tensor.device().is_cpu() || tensor.key_set().has(c10::DispatchKey::Python))
      return false;
  }
  return true;
}

Tensor get_total_norm(const std::vector<Tensor>& tensors, double norm_type) { return call<ops::GetTotalNorm>(tensors, norm_type); }

void clip_grads_with_norm_(const std::vector<Tensor>& grads, double max_norm, const Tensor& total_norm) {
  call<ops::ClipGradsWithNormInplace>(grads, max_norm, total_norm);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // Kernels take the time; other Python threads go on meanwhile.
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def("build_info", build_info);
  m.def("instruction_set", [] { return cpu::kernels().name; });
  m.def("leaky_relu", leaky_relu, without_gil);
  m.def("elu", elu, without_gil);
  m.def("swish", swish, without_gil);
  m.def("swish_tensor", swish_tensor, without_gil);
  m.def("prelu", prelu, without_gil);
  m.def("rrelu", rrelu, without_gil);
  m.def("batch_norm_act", batch_norm_act, without_gil);
  m.def("clip_grad_applies", clip_grad_applies);
  m.def("get_total_norm", get_total_norm, without_gil);
  m.def("clip_grads_with_norm_", clip_grads_with_norm_, without_gil);
}

}  // namespace gradkernels
