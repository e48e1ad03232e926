// The interface between the operators of group_norm_act and their kernels. The arguments are those of batch_norm_act:
// shape.samples and set_channels say which elements share mean and invstd, of which there are samples x channels /
// set_channels; mask_bytes is the size of one sample's mask. There are no running statistics, and training is true.
#pragma once

#include "ops/batch_norm_act.h"

namespace gradkernels {

// Samples of fewer pixels go to torch: the coefficients of a channel take longer than its pass over a few pixels.
constexpr int64_t kLeastPixels = 48;

namespace cpu {

void group_norm_act_forward(const BatchNormForward& p);
void group_norm_act_backward(const BatchNormBackward& p);
// y and mask. Reads mean and invstd.
void group_norm_act_elemt(const BatchNormForward& p);

}  // namespace cpu

// The same for GPUs, in a library built with CUDA.
namespace cuda {

decltype(cpu::group_norm_act_forward) group_norm_act_forward;
decltype(cpu::group_norm_act_backward) group_norm_act_backward;
decltype(cpu::group_norm_act_elemt) group_norm_act_elemt;

}  // namespace cuda
}  // namespace gradkernels
