// Which functors of math/activation.h a loop is compiled for. A loop that is compiled for every activation
// dominates the time of a build. Loops for x86-64 processors without AVX2 therefore call a function for each
// vector. Only loops with a mask are inlined there.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vector.h"
#include "math/activation.h"

namespace gradkernels::cpu {
namespace {

#if defined(__x86_64__)
constexpr bool kCallsActivation = kRegisterBytes == 16;
#else
constexpr bool kCallsActivation = false;
#endif

template <typename Functor, typename V>
GK_CALLED GK_FLATTEN V forward_of(const Functor& f, V x) {
  return f.forward(x);
}
template <typename Functor, typename V>
GK_CALLED GK_FLATTEN V backward_of(const Functor& f, V grad_y, V x) {
  return f.backward(grad_y, x);
}

template <typename V, typename Functor>
struct CalledActivation {
  Functor f;
  GK_INLINE V forward(V x) const { return forward_of(f, x); }
  GK_INLINE V backward(V grad_y, V x) const { return backward_of(f, grad_y, x); }
};

// The activations with an exponential and without a parameter are long and rare.
template <typename Functor>
constexpr bool kIsRare = Functor::kHasExponential && __is_empty(Functor);

// math::AnyActivation, but for a rare activation, which is called: inlined in every such loop, it would cost the build more
// than it saves.
template <typename V>
struct AnyActivation {
  math::Activation act;
  GK_INLINE V forward(V x) const {
    visit([&](auto f) GK_INLINE_LAMBDA { x = f.forward(x); });
    return x;
  }
  GK_INLINE V backward(V grad_y, V x) const {
    visit([&](auto f) GK_INLINE_LAMBDA { grad_y = f.backward(grad_y, x); });
    return grad_y;
  }

 private:
  template <typename Function>
  GK_INLINE void visit(const Function& function) const {
    math::visit<V, math::Precision::kFull>(act, [&](auto f) GK_INLINE_LAMBDA {
      if constexpr (kIsRare<decltype(f)>) {
        function(CalledActivation<V, decltype(f)>{f});
      } else {
        function(f);
      }
    });
  }
};

// Calls function(functor) for elements of type scalar_t.
template <typename scalar_t, typename Function>
GK_INLINE void visit_functor(math::Activation act, const Function& function) {
  using V = Vec<opmath_t<scalar_t>>;
  if constexpr (kCallsActivation) {
    function(CalledActivation<V, math::AnyActivation<V, math::Precision::kFull>>{{act}});
  } else {
    math::visit<V, math::Precision::kFull>(act, function);
  }
}
template <typename scalar_t, typename Function>
GK_INLINE void visit_functor_with_parameter(math::Activation act, const Function& function) {
  using V = Vec<opmath_t<scalar_t>>;
  if constexpr (kCallsActivation) {
    function(CalledActivation<V, math::AnyActivation<V, math::Precision::kFull>>{{act}});
  } else {
    math::visit_with_parameter<V, math::Precision::kFull>(act, function);
  }
}
template <typename V, typename Function>
GK_INLINE void visit_functor_of_two_slopes(math::Activation act, const Function& function) {
  if constexpr (kCallsActivation) {
    function(math::AnyTwoSlopes<V>{act});
  } else {
    math::visit_two_slopes<V>(act, function);
  }
}

// The same for loops of which there are many variants. For float32, each activation has its own loop. In 16 bits relu,
// leaky_relu and swish have one. Another loop chooses among the rest for each vector, which takes up to a fifth longer; in
// float64 it chooses among all.
struct FewActivations {
  template <typename scalar_t, typename Function>
  static GK_INLINE void visit(math::Activation act, const Function& function) {
    using V = Vec<opmath_t<scalar_t>>;
    if constexpr (kCallsActivation || sizeof(scalar_t) == 4) {
      visit_functor<scalar_t>(act, function);
    } else if constexpr (sizeof(scalar_t) == 2) {
      const V parameter(static_cast<float>(act.parameter));
      switch (act.kind) {
        case math::ActivationKind::kRelu:
          return function(math::Relu<V>{});
        case math::ActivationKind::kLeakyRelu:
          return function(math::LeakyRelu<V>{parameter});
        case math::ActivationKind::kSwish:
          return function(math::Swish<V, math::Precision::kFull>{parameter});
        default:
          return function(AnyActivation<V>{act});
      }
    } else {
      function(AnyActivation<V>{act});
    }
  }
  template <typename scalar_t, typename Function>
  static GK_INLINE void visit_two_slopes(math::Activation act, const Function& function) {
    using V = Vec<opmath_t<scalar_t>>;
    if constexpr (sizeof(scalar_t) == 4) {
      visit_functor_of_two_slopes<V>(act, function);
    } else {
      function(math::AnyTwoSlopes<V>{act});
    }
  }
};

// One loop for all activations without an exponential. Group norm keeps dz of the others (reduce_then_apply_gradient in
// cpu/norm_passes.h), so this loop never sees them.
template <typename V>
struct AnyWithoutExponential {
  math::Activation act;
  GK_INLINE V backward(V grad_y, V x) const {
    math::visit<V, math::Precision::kFull>(act, [&](auto f) GK_INLINE_LAMBDA {
      if constexpr (!decltype(f)::kHasExponential) grad_y = f.backward(grad_y, x);
    });
    return grad_y;
  }
};
struct ActivationsWithoutExponential {
  template <typename scalar_t, typename Function>
  static GK_INLINE void visit(math::Activation act, const Function& function) {
    using V = Vec<opmath_t<scalar_t>>;
    if constexpr (kCallsActivation) {
      function(CalledActivation<V, AnyWithoutExponential<V>>{{act}});
    } else {
      function(AnyWithoutExponential<V>{act});
    }
  }
  template <typename scalar_t, typename Function>
  static GK_INLINE void visit_two_slopes(math::Activation act, const Function& function) {
    function(math::AnyTwoSlopes<Vec<opmath_t<scalar_t>>>{act});
  }
};

// Calls function(functor_of); functor_of(parameter) is the functor.
template <typename V, typename Function>
GK_INLINE void visit_parametric(Parametric act, const Function& function) {
  if (act == Parametric::kPrelu) {
    function([](V parameter) GK_INLINE_LAMBDA { return math::LeakyRelu<V>{parameter}; });
  } else {
    function([](V parameter) GK_INLINE_LAMBDA { return math::Swish<V, math::Precision::kFull>{parameter}; });
  }
}

template <typename V>
GK_CALLED GK_FLATTEN V forward_of(Parametric act, V parameter, V x) {
  visit_parametric<V>(act, [&](auto functor_of) GK_INLINE_LAMBDA { x = functor_of(parameter).forward(x); });
  return x;
}
template <typename V>
GK_CALLED GK_FLATTEN V backward_of(Parametric act, V parameter, V grad_y, V x, V& grad_parameter) {
  visit_parametric<V>(act, [&](auto functor_of) GK_INLINE_LAMBDA { grad_y = functor_of(parameter).backward(grad_y, x, grad_parameter); });
  return grad_y;
}

template <typename V>
struct CalledParametric {
  Parametric act;
  V parameter;
  GK_INLINE V forward(V x) const { return forward_of(act, parameter, x); }
  GK_INLINE V backward(V grad_y, V x, V& grad_parameter) const { return backward_of(act, parameter, grad_y, x, grad_parameter); }
};

template <typename scalar_t, typename Function>
GK_INLINE void visit_functor_of_parameter(Parametric act, const Function& function) {
  using V = Vec<opmath_t<scalar_t>>;
  if constexpr (kCallsActivation) {
    function([=](V parameter) GK_INLINE_LAMBDA { return CalledParametric<V>{act, parameter}; });
  } else {
    visit_parametric<V>(act, function);
  }
}

}  // namespace
}  // namespace gradkernels::cpu
