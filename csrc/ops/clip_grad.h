// The interface between the clipping operators and their kernels: the launchers and their arguments, the same
// for every device.
#pragma once

#include "common/dispatch.h"

namespace gradkernels {

// The elements of one tensor in storage order.
struct Run {
  DType dtype;
  int64_t count;
  void* data;
};

// A parameter and its gradient as units: the slices along the first dimension; a tensor of fewer than two
// dimensions is one unit. The elements of a unit follow each other in memory, in both tensors, in any order.
struct UnitRun {
  DType dtype;
  int64_t units;
  int64_t elements;  // of a unit, at least 1
  const void* param;
  void* grad;
};

enum class Norm : uint8_t { kOne, kTwo, kInfinity };

// Arrays with one number for each run, and the norm of all runs. They are in memory of the runs' device.
struct GradNorms {
  double* norms;
  double* max_abs;
  int64_t* nonfinite;
  double* total_norm;
};

namespace cpu {

// Fills `out`. total_norm is the norm of all runs together, as one vector. nan and inf give the norms that
// they give in torch.
void grad_norms(const Run* runs, int64_t run_count, Norm norm, const GradNorms& out);

// Multiplies every element with math::clip_coefficient, unless that leaves it unscaled. total_norm is in
// memory of the runs' device. No two runs may share memory.
void clip_with_norm(const Run* runs, int64_t run_count, double max_norm, const double* total_norm);

// Clamps every element to [-limit, limit], or sets it to limit if limit < 0. nan stays nan. No two runs may
// share memory.
void clamp(const Run* runs, int64_t run_count, double limit);

// Multiplies every unit of the gradients with math::adaptive_clip_coefficient, unless that leaves it unscaled.
// No two gradients may share memory.
void adaptive_clip(const UnitRun* runs, int64_t run_count, Norm norm, double clip_factor, double eps);

}  // namespace cpu

// The same for GPUs, in a library built with CUDA.
namespace cuda {

decltype(cpu::grad_norms) grad_norms;
decltype(cpu::clip_with_norm) clip_with_norm;
decltype(cpu::clamp) clamp;
decltype(cpu::adaptive_clip) adaptive_clip;

}  // namespace cuda
}  // namespace gradkernels
