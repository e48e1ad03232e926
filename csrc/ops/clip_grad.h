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

enum class Norm : uint8_t { kTwo, kInfinity };

namespace cpu {

// The norm of all elements of all runs as if they were one vector.
double total_norm(const Run* runs, int64_t run_count, Norm norm);

// Every element times `coefficient`.
void scale(const Run* runs, int64_t run_count, double coefficient);

}  // namespace cpu
}  // namespace gradkernels
