// The seam between RMSprop's operator and its kernel.
#pragma once

#include "common/dispatch.h"
#include "math/optim.h"

namespace gradkernels {

// One parameter with what belongs to it, element for element in one storage order; null where the options do not want it.
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

// One step of every parameter. No two may share memory.
void rmsprop(const RmspropRun* runs, int64_t run_count, const math::RmspropOptions& options);

}  // namespace cpu

// The same on a GPU, in a library built with CUDA.
namespace cuda {

decltype(cpu::rmsprop) rmsprop;

}  // namespace cuda
}  // namespace gradkernels
