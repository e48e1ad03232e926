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

// Arrays with a number for each run.
struct GradNorms {
  double* norms;
  double* max_abs;
  int64_t* nonfinite;
};

namespace cpu {

// Fills `out` and returns the norm of all elements of all runs as if they were one vector. nan and inf come through.
double grad_norms(const Run* runs, int64_t run_count, Norm norm, const GradNorms& out);

// Every element times `coefficient`. No two runs may share memory.
void scale(const Run* runs, int64_t run_count, double coefficient);

// Every element to [-limit, limit], nan left as it is; where limit < 0, to limit. No two runs may share memory.
void clamp(const Run* runs, int64_t run_count, double limit);

}  // namespace cpu
}  // namespace gradkernels
