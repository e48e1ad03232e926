// The interface between the operators of batch_norm_act and their kernels: the launchers and their arguments,
// the same for every device.
#pragma once

#include "common/dispatch.h"
#include "common/shape.h"
#include "math/activation.h"

namespace gradkernels {

// The number of bytes of the 1-bit mask that is kept for backward. Every line fills whole bytes; a line is a
// channel's run or, if runs are short, a row across all channels. On the CPU, rows that are folded
// (cpu/lines.h) need less.
template <typename Int>
Int mask_bytes(const Int& rows, const Int& channels, const Int& inner) {
  if (!has_long_runs(rows, inner)) return rows * ((channels * inner + 7) / 8);
  return rows * channels * ((inner + 7) / 8);
}

// y = act(batch_norm(x) + residual)
struct BatchNormForward {
  DType dtype;            // of x, residual and y
  DType parameter_dtype;  // of weight, bias and the running statistics
  ChannelShape shape;
  int64_t set_channels = 1;  // how many neighbouring channels share mean and invstd
  math::Activation act;
  bool training;
  double momentum;
  const int64_t* batches;  // or null; otherwise the momentum is math::cumulative_momentum(*batches)
  double eps;
  const void* x;
  const void* residual;  // or null
  const void* weight;    // or null
  const void* bias;      // or null
  void* running_mean;    // or null; read in evaluation, updated in training
  void* running_var;
  double* mean;  // written: the statistics that are applied
  double* invstd;
  void* y;
  uint8_t* mask;     // or null; act must have two slopes
  int64_t* counted;  // or null; on a GPU, batch_norm_act_elemt adds 1
};

// Gradients that are not needed are null. If there was a residual: act' comes from the mask if act has two
// slopes, otherwise from x and the residual.
struct BatchNormBackward {
  DType dtype;
  DType parameter_dtype;
  ChannelShape shape;
  int64_t set_channels = 1;
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

// The steps of the two, for a batch that is spread over several processes. csrc/schema.cpp has the layout of
// moments and sums.
void batch_norm_act_stats(const BatchNormForward& p, double* moments);
// Merges the moments of `ranks` processes into mean and invstd, and updates the running statistics.
void batch_norm_act_gather_stats(const BatchNormForward& p, int64_t ranks, const double* moments);
// y and mask. Reads mean and invstd.
void batch_norm_act_elemt(const BatchNormForward& p);
// The sums, and grad_residual unless it is null.
void batch_norm_act_backward_reduce(const BatchNormBackward& p, double* sums);
// grad_x, from the sums and the count of all processes; count is one number.
void batch_norm_act_backward_elemt(const BatchNormBackward& p, const double* sums, const double* count);

}  // namespace cpu

// The same for GPUs, in a library built with CUDA.
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
