// The seam between the clipping operators and their kernels: what a launcher is given, the same for every device.
#pragma once

#include "common/dispatch.h"

namespace gradkernels {

// The elements of one tensor in storage order.
struct Run {
  DType dtype;
  int64_t count;
  void* data;
};

enum class Norm : uint8_t { kOne, kTwo, kInfinity };

// Arrays with a number for each run, and the norm of all; they lie where the runs do.
struct GradNorms {
  double* norms;
  double* max_abs;
  int64_t* nonfinite;
  double* total_norm;
};

namespace cpu {

// Fills `out`, total_norm with the norm of all elements of all runs as if they were one vector. nan and inf come through.
void grad_norms(const Run* runs, int64_t run_count, Norm norm, const GradNorms& out);

// Clips by a total norm that lies where the runs do: every element times math::clip_coefficient, unless that leaves them unscaled. No two
// runs may share memory.
void clip_with_norm(const Run* runs, int64_t run_count, double max_norm, const double* total_norm);

// Every element to [-limit, limit], nan left as it is; where limit < 0, to limit. No two runs may share memory.
void clamp(const Run* runs, int64_t run_count, double limit);

}  // namespace cpu

// The same on a GPU, in a library built with CUDA.
namespace cuda {

decltype(cpu::grad_norms) grad_norms;
decltype(cpu::clip_with_norm) clip_with_norm;
decltype(cpu::clamp) clamp;

}  // namespace cuda
}  // namespace gradkernels
