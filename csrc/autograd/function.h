// What the operators' autograd kernels share: when a gradient is recorded, by whom, and the call of the operator below.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/operators.h"

namespace gradkernels::autograd {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline bool has_tangent(const at::Tensor& x) { return x.defined() && x._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const ops::OptionalTensor& x) { return x.has_value() && has_tangent(*x); }

inline bool requires_grad(const at::Tensor& x) { return x.defined() && x.requires_grad(); }
inline bool requires_grad(const ops::OptionalTensor& x) { return x.has_value() && requires_grad(*x); }

// True where ATen's operators must differentiate: in forward mode, and under functorch, whose transforms refuse a C++ autograd::Function.
// (functorchTLSAccessor() is no test for them: it stays set afterwards.)
template <typename... Tensors>
bool differentiates_through_aten(const Tensors&... tensors) {
  return c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
         (has_tangent(tensors) || ...);
}

template <typename... Tensors>
bool records(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

template <typename Operator, typename... Args>
auto call_below_autograd(Args&&... args) {
  at::AutoDispatchBelowAutograd guard;
  return call<Operator>(std::forward<Args>(args)...);
}

// For what an autograd::Function marks dirty: that counts the version, and the ADInplaceOrView kernel must not count it again.
template <typename Operator, typename... Args>
auto call_below_version_counting(Args&&... args) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return call<Operator>(std::forward<Args>(args)...);
}

// Kernels write through pointers, which counts no version by itself; saved tensors are checked by it.
inline void increment_version(const at::Tensor& x) {
  if (x.defined() && !x.is_inference()) torch::autograd::impl::bump_version(x);
}

}  // namespace gradkernels::autograd
