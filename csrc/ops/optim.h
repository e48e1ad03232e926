// The interface between RMSprop's operator and its kernel: the launcher and its arguments, the same for every
// device.
#pragma once

#include "common/dispatch.h"
#include "math/optim.h"

namespace gradkernels {

// A parameter with its gradient and state, all in one storage order. State that the options do not need is
// null.
struct RmspropRun {
  DType dtype;
  int64_t count;
  void* param;
  const void* grad;
  void* square_avg;
  void* grad_avg;
  void* momentum_buffer;
};

namespace cpu {

// One step of every parameter. No two parameters may share memory.
void rmsprop(const RmspropRun* runs, int64_t run_count, const math::RmspropOptions& options);

}  // namespace cpu

// The same for GPUs, in a library built with CUDA.
namespace cuda {

decltype(cpu::rmsprop) rmsprop;

}  // namespace cuda
}  // namespace gradkernels
