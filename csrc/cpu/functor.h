// With which functors of math/activation.h a loop is compiled: one for each activation, or, on processors without AVX2, one that calls what
// is chosen at each vector. What is inlined for every activation is most of a build, and those processors are not worth that.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "math/activation.h"

namespace gradkernels::cpu {
namespace {

template <typename V>
__attribute__((noinline)) V forward_of(math::Activation act, V x) {
  return math::AnyActivation<V>{act}.forward(x);
}
template <typename V>
__attribute__((noinline)) V backward_of(math::Activation act, V grad_y, V x) {
  return math::AnyActivation<V>{act}.backward(grad_y, x);
}

template <typename V>
struct CalledActivation {
  math::Activation act;
  GK_INLINE V forward(V x) const { return forward_of(act, x); }
  GK_INLINE V backward(V grad_y, V x) const { return backward_of(act, grad_y, x); }
};

// Calls function(functor).
template <typename V, typename Function>
GK_INLINE void visit_functor(math::Activation act, const Function& function) {
  if constexpr (kRegisterBytes == 16) {
    function(CalledActivation<V>{act});
  } else {
    math::visit<V>(act, function);
  }
}
template <typename V, typename Function>
GK_INLINE void visit_functor_of_two_slopes(math::Activation act, const Function& function) {
  if constexpr (kRegisterBytes == 16) {
    function(math::AnyTwoSlopes<V>{act});
  } else {
    math::visit_two_slopes<V>(act, function);
  }
}

// The functor of an activation whose parameter is learnt.
template <typename V, typename Function>
GK_INLINE void visit_parametric(Parametric act, V parameter, const Function& function) {
  if (act == Parametric::kPrelu) {
    function(math::LeakyRelu<V>{parameter});
  } else {
    function(math::Swish<V>{parameter});
  }
}

template <typename V>
__attribute__((noinline)) V forward_of(Parametric act, V parameter, V x) {
  visit_parametric(act, parameter, [&](auto f) GK_INLINE_LAMBDA { x = f.forward(x); });
  return x;
}
template <typename V>
__attribute__((noinline)) V backward_of(Parametric act, V parameter, V grad_y, V x, V& grad_parameter) {
  visit_parametric(act, parameter, [&](auto f) GK_INLINE_LAMBDA { grad_y = f.backward(grad_y, x, grad_parameter); });
  return grad_y;
}

template <typename V>
struct CalledParametric {
  Parametric act;
  V parameter;
  GK_INLINE V forward(V x) const { return forward_of(act, parameter, x); }
  GK_INLINE V backward(V grad_y, V x, V& grad_parameter) const { return backward_of(act, parameter, grad_y, x, grad_parameter); }
};

// Calls function(functor_of), where functor_of(parameter) is the functor.
template <typename V, typename Function>
GK_INLINE void visit_functor(Parametric act, const Function& function) {
  if constexpr (kRegisterBytes == 16) {
    function([=](V parameter) GK_INLINE_LAMBDA { return CalledParametric<V>{act, parameter}; });
  } else {
    visit_parametric(act, V(0), [&](auto f) { function([](V parameter) GK_INLINE_LAMBDA { return decltype(f){parameter}; }); });
  }
}

}  // namespace
}  // namespace gradkernels::cpu
