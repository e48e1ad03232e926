// The activations: each formula once, for scalars and SIMD vectors on the host and for threads on the device.
//
//   kName                             the activation's name in batch_norm_act
//   kGradientReads                    what the gradient reads besides grad_y
//   kHasExponential                   whether the value or the gradient needs an exponential
//   forward(x)                        the value
//   backward(grad_y, x)               the gradient, from the input
//   backward_from_output(grad_y, y)   the gradient, from the output: only where y determines the derivative
//   passes(x), backward_from_mask     the gradient, from one bit: only where the derivative takes two values
//
// A functor lacks the members that would be wrong: Swish cannot be undone, so an in-place Swish does not
// compile.
//
// To add an activation to batch_norm_act, add a functor, an enumerator of ActivationKind and a case in
// `visit` (and in `visit_two_slopes`, if the gradient reads a mask, and in `visit_with_parameter`, if it has a
// parameter); then a case in composite_of, in
// ops/batch_norm_act.cpp. If one of these is missing, the library does not compile.
//
// Comparisons are those of torch's vector loops on the CPU, which decide the values at nan and at zero. At
// nan, torch's scalar loops over the last elements and torch's kernels on a GPU give other values
// (tests/test_special_values.py).
#pragma once

#include "math/exp.h"
#include "math/normal.h"
#include "math/philox.h"

namespace gradkernels::math {

enum class ActivationKind : uint8_t { kIdentity, kRelu, kRelu6, kLeakyRelu, kElu, kSwish, kHardswish, kGelu, kGeluTanh, kMish };

// What the gradient of an activation reads besides grad_y.
enum class GradientReads : uint8_t {
  kNothing,  // the gradient is grad_y
  kMask,     // one bit for each element; the functor has passes and backward_from_mask
  kValue,    // x
};

// An activation as a run-time value; `parameter` is negative_slope, alpha or beta. The answers are the
// constants of the functor.
struct Activation {
  ActivationKind kind;
  double parameter;

  GK_INLINE bool has_two_slopes() const;
  GK_INLINE bool has_exponential() const;
};

// identity(x) = x
template <typename T>
struct Identity {
  static constexpr const char* kName = "identity";
  static constexpr GradientReads kGradientReads = GradientReads::kNothing;
  static constexpr bool kHasExponential = false;
  GK_HOST_DEVICE T forward(T x) const { return x; }
  GK_HOST_DEVICE T backward(T grad_y, T) const { return grad_y; }
};

// relu(x) = max(x, 0)
template <typename T>
struct Relu {
  static constexpr const char* kName = "relu";
  static constexpr GradientReads kGradientReads = GradientReads::kMask;
  static constexpr bool kHasExponential = false;
  GK_HOST_DEVICE T forward(T x) const { return select(x <= T(0), T(0), x); }
  GK_HOST_DEVICE auto passes(T x) const { return !(x <= T(0)); }
  template <typename Mask>
  GK_HOST_DEVICE T backward_from_mask(T grad_y, Mask pass) const {
    return select(pass, grad_y, T(0));
  }
  GK_HOST_DEVICE T backward(T grad_y, T x) const { return backward_from_mask(grad_y, passes(x)); }
};

// relu6(x) = min(max(x, 0), 6)
template <typename T>
struct Relu6 {
  static constexpr const char* kName = "relu6";
  static constexpr GradientReads kGradientReads = GradientReads::kMask;
  static constexpr bool kHasExponential = false;
  GK_HOST_DEVICE T forward(T x) const { return select(x <= T(0), T(0), select(x >= T(6), T(6), x)); }
  GK_HOST_DEVICE auto passes(T x) const { return (x > T(0)) & (x < T(6)); }
  template <typename Mask>
  GK_HOST_DEVICE T backward_from_mask(T grad_y, Mask pass) const {
    return select(pass, grad_y, T(0));
  }
  GK_HOST_DEVICE T backward(T grad_y, T x) const { return backward_from_mask(grad_y, passes(x)); }
};

// leaky_relu(x) = x for x > 0, negative_slope x otherwise
template <typename T>
struct LeakyRelu {
  static constexpr const char* kName = "leaky_relu";
  static constexpr GradientReads kGradientReads = GradientReads::kMask;
  static constexpr bool kHasExponential = false;
  T negative_slope;
  GK_HOST_DEVICE T forward(T x) const { return select(x > T(0), x, x * negative_slope); }
  GK_HOST_DEVICE auto passes(T x) const { return x > T(0); }
  template <typename Mask>
  GK_HOST_DEVICE T backward_from_mask(T grad_y, Mask pass) const {
    return select(pass, grad_y, grad_y * negative_slope);
  }
  GK_HOST_DEVICE T backward(T grad_y, T x) const { return backward_from_mask(grad_y, passes(x)); }
  // The gradient of x; grad_slope becomes the gradient of negative_slope.
  GK_HOST_DEVICE T backward(T grad_y, T x, T& grad_slope) const {
    grad_slope = select(passes(x), T(0), grad_y * x);
    return backward(grad_y, x);
  }
};

// elu(x) = x for x > 0, alpha (e^x - 1) otherwise
//
// The gradient can be computed from the output, so elu_ can work in place. That needs alpha >= 0: otherwise
// two x give the same y, and autograd/activation.cpp keeps x or raises an error. forward selects on x < 0, so
// that -0 stays -0. `precision` applies to scalars only.
template <typename T, Precision precision = Precision::kFull>
struct Elu {
  static constexpr const char* kName = "elu";
  static constexpr GradientReads kGradientReads = GradientReads::kValue;
  static constexpr bool kHasExponential = true;
  T alpha;
  GK_HOST_DEVICE T forward(T x) const {
    if constexpr (kIsHalfScalar<T, precision>) {
      return select(x < T(0), alpha * half_precise_expm1(x), x);
    } else {
      return select(x < T(0), alpha * expm1_of_nonpositive(x), x);
    }
  }
  GK_HOST_DEVICE T backward(T grad_y, T x) const {
    if constexpr (kIsHalfScalar<T, precision>) {
      // e^x in two factors, so that neither product is far smaller or larger than the result. As in torch, inf
      // gives nan if e^x rounds to 0.
      const T root = select(x <= T(-104), T(0), half_precise_root_of_exp(x));
      return select(x > T(0), grad_y, (grad_y * root) * (alpha * root));
    } else {
      return select(x > T(0), grad_y, multiply_exp(grad_y, alpha, x));
    }
  }
  GK_HOST_DEVICE T backward_from_output(T grad_y, T y) const { return select(y > T(0), grad_y, grad_y * (y + alpha)); }
};

// swish(x) = x s with s = sigmoid(beta x), and with z = beta x: swish'(x) = s (1 + z (1 - s)); the derivative
// by beta is x^2 s (1 - s)
//
// `precision` applies to scalars only. It is relative to y, and to the terms of the gradient: near its zero it is
// their difference.
template <typename T, Precision precision>
struct Swish {
  static constexpr const char* kName = "swish";
  static constexpr GradientReads kGradientReads = GradientReads::kValue;
  static constexpr bool kHasExponential = true;
  T beta;
  GK_HOST_DEVICE T forward(T x) const {
    return with_logistic_to<precision>(beta, x, [&](const auto& s) GK_INLINE_LAMBDA { return s.times(x); });
  }
  GK_HOST_DEVICE T backward(T grad_y, T x) const {
    return with_logistic_to<precision>(beta, x, [&](const auto& s) GK_INLINE_LAMBDA { return s.scaled(grad_y * s.slope(x, beta)); });
  }
  // The gradient of x; grad_beta becomes the gradient of beta.
  GK_HOST_DEVICE T backward(T grad_y, T x, T& grad_beta) const {
    const Gradients both = with_logistic_to<precision>(beta, x, [&](const auto& s) GK_INLINE_LAMBDA {
      return Gradients{s.scaled(grad_y * s.slope(x, beta)), grad_y * (s.scaled(x * s.gate) * (x * s.complement))};
    });
    grad_beta = both.beta;
    return both.x;
  }

 private:
  struct Gradients {
    T x, beta;
  };
  friend GK_HOST_DEVICE Gradients select(decltype(T(0) < T(0)) condition, const Gradients& if_true, const Gradients& if_false) {
    return {select(condition, if_true.x, if_false.x), select(condition, if_true.beta, if_false.beta)};
  }
};

// hardswish(x) = x h with h = min(max(x + 3, 0), 6) / 6; the gradient in between is (2 x + 3) / 6
//
// `precision` applies to scalars only.
template <typename T, Precision precision>
struct Hardswish {
  static constexpr const char* kName = "hardswish";
  static constexpr GradientReads kGradientReads = GradientReads::kValue;
  static constexpr bool kHasExponential = false;
  GK_HOST_DEVICE T forward(T x) const {
    if constexpr (kIsHalfScalar<T, precision>) return x * multiply_saturated(x + T(3), T(1.0f / 6.0f));
    // The quotient by 6 is rounded about once, without a division: 1 / 6 has two parts.
    constexpr bool kIsFloat = sizeof(scalar_of_t<T>) == sizeof(float);
    const scalar_of_t<T> high = kIsFloat ? 0x1.555554p-3 : 0x1.5555555555555p-3, low = kIsFloat ? 0x1.555556p-27 : 0x1.5555555555555p-57;
    const T sum = x + T(3);
    return x * select(x <= T(-3), T(0), select(x >= T(3), T(1), fma(sum, T(high), sum * T(low))));
  }
  GK_HOST_DEVICE T backward(T grad_y, T x) const {
    T slope;
    if constexpr (kIsHalfScalar<T, precision>) {
      slope = fma(x, T(1.0f / 3.0f), T(0.5f));
    } else {
      // 0 at -1.5
      slope = fma(x, T(2), T(3)) * T(static_cast<scalar_of_t<T>>(1.0 / 6.0));
    }
    return select(x <= T(-3), T(0), select(x >= T(3), grad_y, grad_y * slope));
  }
};

// gelu(x) = x Phi(x), with the distribution function of the normal distribution (math/normal.h). This is max(x, 0) - t Phi(-t)
// with t = |x|, which is rounded less; gelu'(x) = Phi(x) + x phi(x), with phi(x) = e^(-x^2 / 2) / sqrt(2 pi)
// (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016)
//
// Near the zero of the gradient, `precision` is relative to its terms.
template <typename T, Precision precision>
struct Gelu {
  static constexpr const char* kName = "gelu";
  static constexpr GradientReads kGradientReads = GradientReads::kValue;
  static constexpr bool kHasExponential = true;
  GK_HOST_DEVICE T forward(T x) const {
    // As in torch, gelu(-inf) is nan: t is bounded for x > 0 only.
    const T minus_t = negative_magnitude(at_most(T(C::kLargest), x));
    return fma(minus_t, lower_probability_to<precision>(minus_t), at_least(T(-scalar_t(0)), x));
  }
  GK_HOST_DEVICE T backward(T grad_y, T x) const {
    const T minus_t = negative_magnitude(x);
    const auto tail = normal_tail_to<precision>(minus_t);
    // Phi(-t) - t phi(t). At inf it is nan, as torch's.
    const T slope = tail.exp_times(fma(minus_t, T(C::kDensity), tail.ratio));
    return grad_y * select(x < T(0), slope, T(1) - slope);
  }

 private:
  using scalar_t = scalar_of_t<T>;
  using C = NormalConstants<scalar_t>;
};

// gelu_tanh(x) = x sigmoid(z) with z = sqrt(8 / pi) (x + 0.044715 x^3), which is x (1 + tanh(z / 2)) / 2
template <typename T, Precision precision>
struct GeluTanh {
  static constexpr const char* kName = "gelu_tanh";
  static constexpr GradientReads kGradientReads = GradientReads::kValue;
  static constexpr bool kHasExponential = true;
  GK_HOST_DEVICE T forward(T x) const {
    return with_logistic_to<precision>(rate(x), x, [&](const auto& s) GK_INLINE_LAMBDA { return s.times(x); });
  }
  GK_HOST_DEVICE T backward(T grad_y, T x) const {
    const T slope = fma(square(x), T(scalar_t(3 * kCubic)), T(scalar_t(kLinear)));
    return with_logistic_to<precision>(rate(x), x, [&](const auto& s) GK_INLINE_LAMBDA { return s.scaled(grad_y * s.slope(x, slope)); });
  }

 private:
  using scalar_t = scalar_of_t<T>;
  static constexpr double kLinear = 1.5957691216057308, kCubic = 0.071354816272600249;
  // x^2 where sigmoid(z) is neither 0 nor 1 after rounding. A square that is inf would be multiplied with 0.
  static GK_HOST_DEVICE T square(T x) { return at_most(T(scalar_t(1000)), x * x); }
  // z = rate(x) x
  static GK_HOST_DEVICE T rate(T x) { return fma(square(x), T(scalar_t(kCubic)), T(scalar_t(kLinear))); }
};

// mish(x) = x tanh(log(1 + e^x)) = x base (1 - c), with e = e^-|x| and
//   base = 1,  c = e^2 / (1/2 + e + e^2)          for x >= 0
//   base = e,  c = e (e + 1) / (2 + 2 e + e^2)    for x < 0
// mish'(x) = base (1 - c) + x (e + 1) (e^2 or 4 e) / denominator^2
// (Misra, "Mish: A Self Regularized Non-Monotonic Activation Function", 2019)
//
// c is below 1/2, so its errors count less. Near the zero of the gradient, the precision is relative to its terms.
template <typename T, Precision precision>
struct Mish {
  static constexpr const char* kName = "mish";
  static constexpr GradientReads kGradientReads = GradientReads::kValue;
  static constexpr bool kHasExponential = true;
  GK_HOST_DEVICE T forward(T x) const {
    const Parts p = parts(x);
    // |x| or |x| e, but -0 for -0. At inf c is 0, and its product must be finite.
    const T whole = x * p.base;
    const T finite = at_most(T(scalar_of_t<T>(1e30)), whole);
    const T y = fma(negative_magnitude(finite), quotient_to<precision>(p.numerator, p.denominator), whole);
    return select(p.negative, y * p.drop, y);
  }
  GK_HOST_DEVICE T backward(T grad_y, T x) const {
    const Parts p = parts(x);
    const T inverse = quotient_to<precision>(T(1), p.denominator);
    const T rest = x * (select(p.negative, T(4) * p.base, p.exp * p.exp) * (p.exp + T(1)));
    const T slope = fma(rest * inverse, inverse, fma(-p.base, p.numerator * inverse, p.base));
    return grad_y * select(p.negative, slope * p.drop, slope);
  }

 private:
  // c = numerator / denominator, and e. Where x is negative, base is e / drop, and both are negative.
  struct Parts {
    decltype(T(0) < T(0)) negative;
    T base, exp, numerator, denominator, drop;
  };
  static GK_HOST_DEVICE Parts parts(T x) {
    Parts p;
    p.negative = x < T(0);
    T lifted;
    if constexpr (kIsHalfScalar<T, precision>) {
      lifted = approximate_exp2(-fabs(x) * ExpConstants<float>::kLog2E);
      p.drop = T(-1);
    } else {
      lifted = lifted_exp(negative_magnitude(x));
      p.drop = T(-ExpConstants<scalar_of_t<T>>::kDrop);
    }
    lifted = -lifted;
    p.exp = lifted * p.drop;
    p.base = select(p.negative, lifted, T(1));
    p.numerator = fma(p.exp, p.exp, select(p.negative, p.exp, T(0)));
    p.denominator = (p.numerator + p.exp) + select(p.negative, T(2), T(scalar_of_t<T>(0.5)));
    return p;
  }
};

// rrelu(x) = x for x > 0, a x otherwise; a is drawn for each element. As in torch, nothing is drawn for a
// nan, whose gradient is grad_y.
template <typename T>
struct Rrelu : LeakyRelu<T> {
  GK_HOST_DEVICE auto passes(T x) const { return !(x <= T(0)); }
};

// The slopes of rrelu, uniform in [lower, upper] and drawn from a seed.
struct RandomSlopes {
  uint64_t seed;
  double lower;
  double upper;

  // The slope for a number uniform in [0, 1).
  template <typename T>
  GK_HOST_DEVICE T slope_of(T uniform) const {
    using scalar_t = scalar_of_t<T>;
    const T bound(static_cast<scalar_t>(upper));
    const T drawn = fma(T(static_cast<scalar_t>(upper - lower)), uniform, T(static_cast<scalar_t>(lower)));
    // The sum may round to more than the bound.
    return at_most(bound, drawn);
  }

  // The slopes of elements [4 block, 4 block + 4), in storage order.
  template <typename scalar_t>
  GK_HOST_DEVICE void draw(uint64_t block, scalar_t* slope) const {
    const PhiloxBlock<uint64_t> random = philox(seed, block);
    for (int i = 0; i < 4; ++i) slope[i] = slope_of(static_cast<scalar_t>(uniform_of(random.word[i])));
  }
};

// Calls function(functor) with the functor of `act`, which computes in T, to `precision`.
template <typename T, Precision precision, typename Function>
GK_HOST_DEVICE constexpr void visit(Activation act, const Function& function) {
  const T parameter(static_cast<scalar_of_t<T>>(act.parameter));
  switch (act.kind) {
    case ActivationKind::kIdentity:
      return function(Identity<T>{});
    case ActivationKind::kRelu:
      return function(Relu<T>{});
    case ActivationKind::kRelu6:
      return function(Relu6<T>{});
    case ActivationKind::kLeakyRelu:
      return function(LeakyRelu<T>{parameter});
    case ActivationKind::kElu:
      return function(Elu<T, precision>{parameter});
    case ActivationKind::kSwish:
      return function(Swish<T, precision>{parameter});
    case ActivationKind::kHardswish:
      return function(Hardswish<T, precision>{});
    case ActivationKind::kGelu:
      return function(Gelu<T, precision>{});
    case ActivationKind::kGeluTanh:
      return function(GeluTanh<T, precision>{});
    case ActivationKind::kMish:
      return function(Mish<T, precision>{});
  }
}

// The same for an activation with a parameter. Only these have operators of their own; the others stand after a batch
// norm.
template <typename T, Precision precision, typename Function>
GK_HOST_DEVICE constexpr void visit_with_parameter(Activation act, const Function& function) {
  const T parameter(static_cast<scalar_of_t<T>>(act.parameter));
  switch (act.kind) {
    case ActivationKind::kElu:
      return function(Elu<T, precision>{parameter});
    case ActivationKind::kSwish:
      return function(Swish<T, precision>{parameter});
    default:
      return function(LeakyRelu<T>{parameter});
  }
}

// Calls function(functor) with the functor of `act`, which must be an activation of two slopes. A switch of
// its own compiles to faster code than a selection from the switch above; the static_assert below compares
// the two.
template <typename T, typename Function>
GK_HOST_DEVICE constexpr void visit_two_slopes(Activation act, const Function& function) {
  switch (act.kind) {
    case ActivationKind::kRelu:
      return function(Relu<T>{});
    case ActivationKind::kRelu6:
      return function(Relu6<T>{});
    default:
      return function(LeakyRelu<T>{T(static_cast<scalar_of_t<T>>(act.parameter))});
  }
}

// The constants of a functor as run-time values.
struct ActivationTraits {
  const char* name;  // null for a value after the last kind
  GradientReads gradient_reads;
  bool has_exponential;
};
GK_INLINE constexpr ActivationTraits traits_of(ActivationKind kind) {
  ActivationTraits traits{};
  visit<float, Precision::kFull>({kind, 0.0}, [&](auto f) GK_INLINE_LAMBDA {
    using Functor = decltype(f);
    traits = {Functor::kName, Functor::kGradientReads, Functor::kHasExponential};
  });
  return traits;
}

constexpr bool is_same_name(const char* a, const char* b) {
  for (; *a == *b; ++a, ++b) {
    if (*a == '\0') return true;
  }
  return false;
}
constexpr bool visits_all_of_two_slopes() {
  for (uint8_t i = 0;; ++i) {
    const ActivationKind kind = static_cast<ActivationKind>(i);
    const ActivationTraits traits = traits_of(kind);
    if (traits.name == nullptr) return true;
    bool visited = false;
    visit_two_slopes<float>({kind, 0.0}, [&](auto f) { visited = is_same_name(decltype(f)::kName, traits.name); });
    if (visited != (traits.gradient_reads == GradientReads::kMask)) return false;
  }
}
constexpr bool visits_all_with_parameter() {
  for (uint8_t i = 0;; ++i) {
    const Activation act{static_cast<ActivationKind>(i), 0.0};
    const char* name = traits_of(act.kind).name;
    if (name == nullptr) return true;
    bool has_parameter = false, visited = false;
    visit<float, Precision::kFull>(act, [&](auto f) { has_parameter = !std::is_empty<decltype(f)>::value; });
    visit_with_parameter<float, Precision::kFull>(act, [&](auto f) { visited = is_same_name(decltype(f)::kName, name); });
    if (visited != has_parameter) return false;
  }
}
static_assert(visits_all_with_parameter(), "visit_with_parameter has no case for an activation that has a parameter");
static_assert(visits_all_of_two_slopes(), "visit_two_slopes has no case for an activation whose gradient reads a mask");

GK_INLINE bool Activation::has_two_slopes() const { return traits_of(kind).gradient_reads == GradientReads::kMask; }
GK_INLINE bool Activation::has_exponential() const { return traits_of(kind).has_exponential; }

// A functor that chooses the activation at each element. A loop over it is compiled once, not once for each
// activation.
template <typename T, Precision precision>
struct AnyActivation {
  Activation act;
  GK_HOST_DEVICE T forward(T x) const {
    visit<T, precision>(act, [&](auto f) GK_INLINE_LAMBDA { x = f.forward(x); });
    return x;
  }
  GK_HOST_DEVICE T backward(T grad_y, T x) const {
    visit<T, precision>(act, [&](auto f) GK_INLINE_LAMBDA { grad_y = f.backward(grad_y, x); });
    return grad_y;
  }
};

template <typename T>
struct AnyTwoSlopes {
  Activation act;
  GK_HOST_DEVICE T forward(T x) const {
    visit_two_slopes<T>(act, [&](auto f) GK_INLINE_LAMBDA { x = f.forward(x); });
    return x;
  }
  GK_HOST_DEVICE auto passes(T x) const {
    auto pass = x > T(0);
    visit_two_slopes<T>(act, [&](auto f) GK_INLINE_LAMBDA { pass = f.passes(x); });
    return pass;
  }
  template <typename Mask>
  GK_HOST_DEVICE T backward_from_mask(T grad_y, Mask pass) const {
    visit_two_slopes<T>(act, [&](auto f) GK_INLINE_LAMBDA { grad_y = f.backward_from_mask(grad_y, pass); });
    return grad_y;
  }
};

}  // namespace gradkernels::math
