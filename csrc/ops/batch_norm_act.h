// The seam between batch_norm_act's operators and its kernels: what a launcher is given, the same for every device.
#pragma once

#include "common/dispatch.h"
#include "common/shape.h"
#include "math/activation.h"

namespace gradkernels {

// Bytes of the 1-bit mask kept for backward. A line, which fills whole bytes, is a channel's run or, where runs are short, a row over all
// channels.
template <typename Int>
Int mask_bytes(const Int& rows, const Int& channels, const Int& inner) {
  if (inner < kShortRunElements) return rows * ((channels * inner + 7) / 8);
  return rows * channels * ((inner + 7) / 8);
}

// y = act(batch_norm(x) + residual)
struct BatchNormForward {
  DType dtype;            // of x, residual and y
  DType parameter_dtype;  // of weight, bias and the running statistics
  ChannelShape shape;
  math::Activation act;
  bool training;
  double momentum;
  const int64_t* batches;  // or null; else momentum is math::cumulative_momentum of it
  double eps;
  const void* x;
  const void* residual;  // or null
  const void* weight;    // or null
  const void* bias;      // or null
  void* running_mean;    // or null; read in evaluation, updated in training
  void* running_var;
  double* mean;  // written: the statistics that were applied
  double* invstd;
  void* y;
  uint8_t* mask;  // or null; act must have two slopes
};

// Gradients that nobody needs are null. With a residual, act' comes from the mask where act has two slopes, else from x and the residual.
struct BatchNormBackward {
  DType dtype;
  DType parameter_dtype;
  ChannelShape shape;
  math::Activation act;
  bool training;
  const void* grad_y;
  const void* x;
  const void* residual;  // or null
  const uint8_t* mask;   // or null
  const void* weight;    // or null
  const void* bias;      // or null
  const double* mean;
  const double* invstd;
  void* grad_x;
  void* grad_weight;
  void* grad_bias;
  void* grad_residual;
};

namespace cpu {

void batch_norm_act_forward(const BatchNormForward& p);
void batch_norm_act_backward(const BatchNormBackward& p);

// The parts of the two, for a batch that lies on many processes. moments and sums are laid out as csrc/schema.cpp has them.
void batch_norm_act_stats(const BatchNormForward& p, double* moments);
// Merges the moments of `ranks` processes into mean and invstd, and updates the running statistics.
void batch_norm_act_gather_stats(const BatchNormForward& p, int64_t ranks, const double* moments);
// From mean and invstd, which are read.
void batch_norm_act_elemt(const BatchNormForward& p);
// Writes grad_residual where it is asked for.
void batch_norm_act_backward_reduce(const BatchNormBackward& p, double* sums);
// grad_x from the sums and the count of all processes, one number.
void batch_norm_act_backward_elemt(const BatchNormBackward& p, const double* sums, const double* count);

}  // namespace cpu

// The same on a GPU, in a library built with CUDA.
namespace cuda {

decltype(cpu::batch_norm_act_forward) batch_norm_act_forward;
decltype(cpu::batch_norm_act_backward) batch_norm_act_backward;
decltype(cpu::batch_norm_act_stats) batch_norm_act_stats;
decltype(cpu::batch_norm_act_gather_stats) batch_norm_act_gather_stats;
decltype(cpu::batch_norm_act_elemt) batch_norm_act_elemt;
decltype(cpu::batch_norm_act_backward_reduce) batch_norm_act_backward_reduce;
decltype(cpu::batch_norm_act_backward_elemt) batch_norm_act_backward_elemt;

}  // namespace cuda
}  // namespace gradkernels
