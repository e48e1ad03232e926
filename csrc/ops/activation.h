// The interface between the operators of the activations and their kernels: the launchers and their
// arguments, the same for every device.
#pragma once

#include "common/dispatch.h"
#include "common/shape.h"
#include "math/activation.h"

namespace gradkernels {

// What the forward pass saved for the gradient: x, y, or one bit for each element (bit i % 8 of byte i / 8,
// in storage order).
enum class Saved : uint8_t { kInput, kOutput, kMask };

// The activations with a learnt parameter for each channel: prelu's weight (the slope), swish's beta.
enum class Parametric : uint8_t { kPrelu, kSwish };

struct ParametricForward {
  DType dtype;
  ChannelShape shape;
  Parametric act;
  const void* x;
  const void* parameter;
  void* y;
};

// Gradients that are not needed are null.
struct ParametricBackward {
  DType dtype;
  ChannelShape shape;
  Parametric act;
  const void* grad_y;
  const void* x;
  const void* parameter;
  void* grad_x;
  void* grad_parameter;
};

// The slopes of rrelu: the seed, in memory of the tensors' device, and the bounds.
struct SeededSlopes {
  const int64_t* seed;
  double lower;
  double upper;
};

namespace cpu {

// y = act(x) over `count` elements in storage order; y may be x. Unless `mask` is null, its bits are written
// too; act must have two slopes.
void activation_forward(DType dtype, math::Activation act, int64_t count, const void* x, void* y, uint8_t* mask);

// grad_x = grad_y act'(x); grad_x may be grad_y.
void activation_backward(DType dtype, math::Activation act, Saved kind, int64_t count, const void* grad_y, const void* saved, void* grad_x);

void parametric_forward(const ParametricForward& p);
void parametric_backward(const ParametricBackward& p);

// leaky_relu with a random slope for each element. The mask has one bit for each element, as above.
void rrelu_forward(DType dtype, SeededSlopes slopes, int64_t count, const void* x, void* y, uint8_t* mask);
void rrelu_backward(DType dtype, SeededSlopes slopes, int64_t count, const void* grad_y, const uint8_t* mask, void* grad_x);

}  // namespace cpu

// The same for GPUs, in a library built with CUDA.
namespace cuda {

decltype(cpu::activation_forward) activation_forward;
decltype(cpu::activation_backward) activation_backward;
decltype(cpu::parametric_forward) parametric_forward;
decltype(cpu::parametric_backward) parametric_backward;
decltype(cpu::rrelu_forward) rrelu_forward;
decltype(cpu::rrelu_backward) rrelu_backward;

}  // namespace cuda
}  // namespace gradkernels
