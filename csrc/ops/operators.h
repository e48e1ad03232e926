// The operators as C++ types, for calls through the dispatcher: call<ops::Elu>(x, alpha). If a signature
// differs from schema.cpp, the first call raises an error.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "common/library.h"

namespace gradkernels {
namespace ops {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

struct LeakyRelu {
  static constexpr const char* kName = "leaky_relu";
  using Signature = Tensor(const Tensor&, double);
};
struct LeakyReluInplace {
  static constexpr const char* kName = "leaky_relu_";
  using Signature = void(Tensor, double);
};
struct LeakyReluWithMask {
  static constexpr const char* kName = "leaky_relu_with_mask";
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, double);
};
struct LeakyReluWithMaskInplace {
  static constexpr const char* kName = "leaky_relu_with_mask_";
  using Signature = Tensor(Tensor, double);
};
struct LeakyReluBackward {
  static constexpr const char* kName = "leaky_relu_backward";
  using Signature = Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef, double);
};
struct Elu {
  static constexpr const char* kName = "elu";
  using Signature = Tensor(const Tensor&, double);
};
struct EluInplace {
  static constexpr const char* kName = "elu_";
  using Signature = void(Tensor, double);
};
struct EluBackward {
  static constexpr const char* kName = "elu_backward";
  using Signature = Tensor(const Tensor&, const Tensor&, double, bool);
};
struct Swish {
  static constexpr const char* kName = "swish";
  using Signature = Tensor(const Tensor&, double);
};
struct SwishBackward {
  static constexpr const char* kName = "swish_backward";
  using Signature = Tensor(const Tensor&, const Tensor&, double);
};
struct SwishTensor {
  static constexpr const char* kName = "swish";
  static constexpr const char* kOverload = "Tensor";
  using Signature = Tensor(const Tensor&, const Tensor&);
};
struct SwishTensorBackward {
  static constexpr const char* kName = "swish_backward";
  static constexpr const char* kOverload = "Tensor";
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, std::array<bool, 2>);
};
struct Prelu {
  static constexpr const char* kName = "prelu";
  using Signature = Tensor(const Tensor&, const Tensor&);
};
struct PreluBackward {
  static constexpr const char* kName = "prelu_backward";
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, std::array<bool, 2>);
};
struct RreluWithMask {
  static constexpr const char* kName = "rrelu_with_mask";
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, double, double);
};
struct RreluWithMaskInplace {
  static constexpr const char* kName = "rrelu_with_mask_";
  using Signature = Tensor(Tensor, const Tensor&, double, double);
};
struct RreluBackward {
  static constexpr const char* kName = "rrelu_backward";
  using Signature = Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef, const Tensor&, double, double);
};
struct BatchNormAct {
  static constexpr const char* kName = "batch_norm_act";
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                               const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                                               const OptionalTensor&, bool, std::optional<double>, double, c10::string_view,
                                                               double);
};
struct BatchNormActBackward {
  static constexpr const char* kName = "batch_norm_act_backward";
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                               const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                                               const OptionalTensor&, bool, c10::string_view, double, std::array<bool, 4>);
};
struct BatchNormActElemt {
  static constexpr const char* kName = "batch_norm_act_elemt";
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                               const OptionalTensor&, c10::string_view, double);
};
struct BatchNormActGatherStats {
  static constexpr const char* kName = "batch_norm_act_gather_stats";
  using Signature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                                       std::optional<double>, double);
};
struct GroupNormAct {
  static constexpr const char* kName = "group_norm_act";
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, int64_t, const OptionalTensor&, const OptionalTensor&,
                                                               const OptionalTensor&, double, c10::string_view, double);
};
struct GroupNormActBackward {
  static constexpr const char* kName = "group_norm_act_backward";
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                                                               const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                                               const OptionalTensor&, c10::string_view, double, std::array<bool, 4>);
};
struct GroupNormActElemt {
  static constexpr const char* kName = "group_norm_act_elemt";
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t, const OptionalTensor&,
                                               const OptionalTensor&, const OptionalTensor&, c10::string_view, double);
};
struct GradNorms {
  static constexpr const char* kName = "grad_norms";
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(at::TensorList, double);
};
struct ClipGradsWithNormInplace {
  static constexpr const char* kName = "clip_grads_with_norm_";
  using Signature = void(at::TensorList, double, const Tensor&);
};
struct ClipGradValueInplace {
  static constexpr const char* kName = "clip_grad_value_";
  using Signature = void(at::TensorList, double);
};
struct AdaptiveClipGradInplace {
  static constexpr const char* kName = "adaptive_clip_grad_";
  using Signature = void(at::TensorList, at::TensorList, double, double, double);
};
struct RmspropInplace {
  static constexpr const char* kName = "rmsprop_";
  using Signature = void(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList, double, double, double, double,
                         double, double);
};

}  // namespace ops

// The name of the overload: kOverload of the operator's type, or an empty name.
template <typename Operator, typename = void>
struct OverloadOf {
  static constexpr const char* value = "";
};
template <typename Operator>
struct OverloadOf<Operator, std::void_t<decltype(Operator::kOverload)>> {
  static constexpr const char* value = Operator::kOverload;
};

// Calls the operator through the dispatcher, under the dispatch state of the thread.
template <typename Operator, typename... Args>
auto call(Args&&... args) {
  static const auto handle = [] {
    const std::string name = std::string(GK_QUOTE(GK_NAMESPACE) "::") + Operator::kName;
    return c10::Dispatcher::singleton()
        .findSchemaOrThrow(name.c_str(), OverloadOf<Operator>::value)
        .template typed<typename Operator::Signature>();
  }();
  return handle.call(std::forward<Args>(args)...);
}

}  // namespace gradkernels
