// What one instruction set exports: a table of its kernels. They work on one piece of an operand; cutting into pieces, threads and the
// order in which partial results meet belong to the drivers, cpu/<stem>.cpp, which are compiled once.
#pragma once

#include "math/batch_norm_act.h"
#include "ops/activation.h"
#include "ops/batch_norm_act.h"
#include "ops/clip_grad.h"
#include "ops/optim.h"

namespace gradkernels::cpu {

// A part of an operand that is seen by channel. Where runs are short (kShortRunElements) it holds whole runs, and at most kMaxColumns
// elements of a row.
struct Slab {
  int64_t channel_begin, channel_end;
  int64_t row_begin, row_end;
  int64_t inner_begin, inner_end;
};

constexpr int64_t kMaxColumns = 1024;

// Of a piece of a gradient: sum |x factor|^p for p of 1 and 2, max |x|, and how many elements are nan or inf. `factor` other than 1 is for
// float64 alone.
struct PartialNorm {
  double sum;
  double max_abs;
  int64_t nonfinite;
};

struct Kernels {
  const char* name;

  void (*activation_forward)(DType, math::Activation, int64_t count, const void* x, void* y, uint8_t* mask);
  void (*activation_backward)(DType, math::Activation, Saved, int64_t count, const void* grad_y, const void* saved, void* grad_x);
  void (*parametric_forward)(const ParametricForward&, Slab);
  // grad_parameter of each channel of the slab into out[0...].
  void (*parametric_backward)(const ParametricBackward&, Slab, double* out);
  // `first` is the index of the first element, a multiple of 8.
  void (*rrelu_forward)(DType, math::RandomSlopes, int64_t first, int64_t count, const void* x, void* y, uint8_t* mask);
  void (*rrelu_backward)(DType, math::RandomSlopes, int64_t first, int64_t count, const void* grad_y, const uint8_t* mask, void* grad_x);

  // Per channel of the slab, into out[0...].
  void (*batch_norm_moments)(const BatchNormForward&, Slab, math::Moments<double>* out);
  void (*batch_norm_normalise)(const BatchNormForward&, Slab);
  // Per channel of the slab, into out[0...]; writes grad_residual where it is asked for. dz_copy: null, or where dz of the slab is left,
  // line by line, in the type it is computed in.
  void (*batch_norm_gradient_sums)(const BatchNormBackward&, Slab, math::GradientSums* out, void* dz_copy);
  // From the sums of all channels. dz is read from dz_copy unless that is null, or else from grad_residual, which may be where grad_x goes;
  // of 16 bits, where it is rounded, only for activations with an exponential.
  void (*batch_norm_gradient_input)(const BatchNormBackward&, Slab, const math::GradientSums* sums, const void* dz_copy);

  PartialNorm (*partial_norm)(DType, Norm, int64_t count, const void* x, double factor);
  void (*scale)(DType, int64_t count, void* x, double coefficient);
  void (*clamp)(DType, int64_t count, void* x, double limit);

  // Elements [begin, begin + count) of the run.
  void (*rmsprop)(const RmspropRun&, int64_t begin, int64_t count, const math::RmspropOptions&);
};

extern const Kernels kernels_base;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// The best table this processor runs, or the one that ATEN_CPU_CAPABILITY (default, avx2, avx512) names if that is less.
const Kernels& kernels();

}  // namespace gradkernels::cpu
