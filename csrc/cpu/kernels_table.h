// The table of kernels for the instruction set that the including file, cpu/isa_*.cpp, has enabled.
#pragma once

#include "cpu/activation_kernel.h"
#include "cpu/batch_norm_act_kernel.h"
#include "cpu/clip_grad_kernel.h"
#include "cpu/kernels.h"
#include "cpu/optim_kernel.h"

namespace gradkernels::cpu {
namespace {

constexpr Kernels kernels_named(const char* name) {
  return {name,
          activation_forward_kernel,
          activation_backward_kernel,
          parametric_forward_kernel,
          parametric_backward_kernel,
          rrelu_forward_kernel,
          rrelu_backward_kernel,
          batch_norm_moments_kernel,
          batch_norm_normalise_kernel,
          batch_norm_gradient_sums_kernel,
          batch_norm_gradient_input_kernel,
          partial_norm_kernel,
          scale_kernel,
          clamp_kernel,
          rmsprop_kernel};
}

}  // namespace
}  // namespace gradkernels::cpu
