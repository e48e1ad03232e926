// What the autograd kernels of all operators share: when a gradient is recorded, the node that records it,
// and calls below autograd.
#pragma once

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

#include "ops/operators.h"

namespace gradkernels::autograd {

using torch::autograd::variable_list;

inline bool has_tangent(const at::Tensor& x) { return x.defined() && x._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const ops::OptionalTensor& x) { return x.has_value() && has_tangent(*x); }

inline bool requires_grad(const at::Tensor& x) { return x.defined() && x.requires_grad(); }
inline bool requires_grad(const ops::OptionalTensor& x) { return x.has_value() && requires_grad(*x); }

// Whether the composite of ATen's operators must differentiate: in forward mode, and under functorch, whose
// transforms raise an error for a C++ autograd::Function. (functorchTLSAccessor() does not tell: it stays set
// after the transform.)
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

// For callers that bump the versions of written tensors themselves: the ADInplaceOrView kernel must not bump
// them again.
template <typename Operator, typename... Args>
auto call_below_version_counting(Args&&... args) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return call<Operator>(std::forward<Args>(args)...);
}

// Raises torch's error. Called before anything is written.
inline void check_version_counts(const at::Tensor& x) {
  TORCH_CHECK(!x.defined() || !x.is_inference() || c10::InferenceMode::is_enabled(),
              "Inplace update to inference tensor outside InferenceMode is not allowed.You can make a clone to get a normal tensor before "
              "doing inplace update.See https://github.com/pytorch/rfcs/pull/17 for more details.");
}

// Kernels write through pointers, which does not bump the version. torch uses the version to check saved
// tensors.
inline void increment_version(const at::Tensor& x) {
  if (x.defined() && !x.is_inference()) torch::autograd::impl::bump_version(x);
}

// For nodes: calls the operator below autograd, unless a graph of the gradient is recorded.
template <typename Operator, typename... Args>
auto call_in_backward(Args&&... args) {
  if (at::GradMode::is_enabled()) return call<Operator>(std::forward<Args>(args)...);
  return call_below_autograd<Operator>(std::forward<Args>(args)...);
}

// A new node whose edges lead to the inputs. Up to 2.12, torch holds nodes by std::shared_ptr.
template <typename Node, typename... Inputs>
auto gradient_of(const Inputs&... inputs) {
  constexpr bool kShared = std::is_same_v<decltype(torch::autograd::Edge::function), std::shared_ptr<torch::autograd::Node>>;
  auto node = [](auto type) {
    using Made = typename decltype(type)::type;
    if constexpr (kShared) {
      // deleteNode, found by argument-dependent lookup, deletes long graphs without recursion.
      return std::shared_ptr<Made>(new Made(), [](auto* made) { deleteNode(made); });
    } else {
      return c10::make_intrusive<Made>();
    }
  }(std::common_type<Node>());
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

// While it exists, tensors are saved without hooks. torch calls this state tracing.
struct PastHooks {
  const bool before = at::SavedTensorDefaultHooks::set_tracing(true);
  PastHooks() = default;
  PastHooks(const PastHooks&) = delete;
  ~PastHooks() { at::SavedTensorDefaultHooks::set_tracing(before); }
};

// A node of the graph, without the overhead of torch::autograd::Function, which is a fifth of the time of an
// activation of few elements. Derived must define
//   static constexpr const char* kName
//   static void members(Self& self, const F& f)
//       calls f(every member); tensors are members of type SavedVariable
//   variable_list backward(const at::Tensor& grad_y, std::array<bool, kInputs> wanted)
//       grad_y is defined; the function reads nothing of the node but its members
template <typename Derived, size_t kInputs>
struct Gradient : torch::autograd::Node {
  std::string name() const override { return Derived::kName; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return apply_to(grads, wanted());
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for_each_member([](auto& member) {
      if constexpr (is_saved<decltype(member)>) member.reset_data();
    });
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    Derived::members(static_cast<const Derived&>(*this), [&](const auto&... member) { (collect(args, member), ...); });
  }

  // Compiled autograd calls this with placeholders, whose shapes are not the true ones. It records a call of
  // compiled_gradients.
  variable_list apply_with_saved(const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables& saved) override {
    using torch::dynamo::autograd::IValuePacker;
    torch::dynamo::autograd::PackedArgs args;
    args.pack(wanted());
    std::vector<at::TypePtr> types = {IValuePacker<std::array<bool, kInputs>>::packed_type()};
    for_each_member([&](auto& member) {
      saved.before(member);
      if constexpr (is_saved<decltype(member)>) {
        args.pack(member.unpack());
        types.push_back(at::TensorType::get());
      } else {
        args.pack(member);
        types.push_back(IValuePacker<std::decay_t<decltype(member)>>::packed_type());
      }
    });
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    // A custom function gets a name that is not in use.
    static const std::string function = compiler->bind_function(saved.get_py_compiler(), Derived::kName, compiled_gradients, types,
                                                                /*is_custom_function=*/true, /*is_traceable=*/true);
    const auto edges = torch::dynamo::autograd::get_input_metadata(next_edges());
    variable_list result = compiler->call_function(saved.get_py_compiler(), "apply_functional", function, grads, args.vec(),
                                                   IValuePacker<std::decay_t<decltype(edges)>>::pack(edges));
    for_each_member([&](auto& member) { saved.after(member); });
    return result;
  }

 private:
  template <typename T>
  static constexpr bool is_saved = std::is_same_v<std::decay_t<T>, torch::autograd::SavedVariable>;

  std::array<bool, kInputs> wanted() const {
    std::array<bool, kInputs> result;
    for (size_t i = 0; i < kInputs; ++i) result[i] = task_should_compute_output(i);
    return result;
  }

  variable_list apply_to(const variable_list& grads, std::array<bool, kInputs> wanted) {
    if (!grads[0].defined()) return variable_list(kInputs);
    return static_cast<Derived*>(this)->backward(grads[0], wanted);
  }

  // The function that a compiled graph calls. It computes the gradients with a node that has the arguments as
  // members.
  static variable_list compiled_gradients(const variable_list& grads, const std::vector<at::IValue>& packed) {
    torch::dynamo::autograd::PackedArgs args(packed);
    const auto wanted = args.unpack<std::array<bool, kInputs>>();
    const auto node = gradient_of<Derived>();
    const PastHooks past_hooks;
    node->for_each_member([&](auto& member) {
      if constexpr (is_saved<decltype(member)>) {
        member = torch::autograd::SavedVariable(args.unpack<at::Tensor>(), /*is_output=*/false);
      } else {
        member = args.unpack<std::decay_t<decltype(member)>>();
      }
    });
    return node->apply_to(grads, wanted);
  }

  template <typename Function>
  void for_each_member(const Function& function) {
    Derived::members(static_cast<Derived&>(*this), [&](auto&... member) { (function(member), ...); });
  }

  template <typename Member>
  static void collect(torch::dynamo::autograd::CompiledNodeArgs& args, const Member& member) {
    if constexpr (is_saved<Member>) {
      args.collect(member, /*is_output=*/true);
    } else {
      args.collect(member);
    }
  }
};

// Makes y the output of `node`.
template <typename Node>
at::Tensor recorded(at::Tensor y, const Node& node) {
  torch::autograd::set_history(y, node);
  return y;
}

}  // namespace gradkernels::autograd
