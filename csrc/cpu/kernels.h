// The table of kernels that each instruction set exports. A kernel works on one piece of an operand. The
// drivers (cpu/<stem>.cpp), which are compiled once, cut operands into pieces, run threads and merge partial
// results in a fixed order.
#pragma once

#include "math/batch_norm_act.h"
#include "ops/activation.h"
#include "ops/batch_norm_act.h"
#include "ops/clip_grad.h"
#include "ops/optim.h"

namespace gradkernels::cpu {

// A part of an operand that is seen by channel (common/shape.h). If runs are short (has_long_runs), a
// slab has whole runs, and at most kMaxColumns elements of a row.
struct Slab {
  int64_t channel_begin, channel_end;
  int64_t row_begin, row_end;
  int64_t inner_begin, inner_end;
};

constexpr int64_t kMaxColumns = 1024;

// The norm of a piece of a gradient x. Only float64 gradients may have a `factor` other than 1.
struct PartialNorm {
  double sum;         // of |x factor|^p, for p = 1 and p = 2
  double max_abs;     // of x
  int64_t nonfinite;  // elements that are nan or inf
};

struct Kernels {
  const char* name;

  void (*activation_forward)(DType, math::Activation, int64_t count, const void* x, void* y, uint8_t* mask);
  void (*activation_backward)(DType, math::Activation, Saved, int64_t count, const void* grad_y, const void* saved, void* grad_x);
  void (*parametric_forward)(const ParametricForward&, Slab);
  // Writes grad_parameter of each channel of the slab to out[0...].
  void (*parametric_backward)(const ParametricBackward&, Slab, double* out);
  // `first` is the index of the first element in the tensor, a multiple of 8.
  void (*rrelu_forward)(DType, math::RandomSlopes, int64_t first, int64_t count, const void* x, void* y, uint8_t* mask);
  void (*rrelu_backward)(DType, math::RandomSlopes, int64_t first, int64_t count, const void* grad_y, const uint8_t* mask, void* grad_x);

  // Writes the moments of each channel of the slab to out[0...].
  void (*batch_norm_moments)(const BatchNormForward&, Slab, math::Moments<double>* out);
  void (*batch_norm_normalise)(const BatchNormForward&, Slab);
  // Writes the sums of each channel of the slab to out[0...], and grad_residual unless it is null. Unless
  // dz_copy is null, dz of the slab is written there, line by line, in the computing type.
  void (*batch_norm_gradient_sums)(const BatchNormBackward&, Slab, math::GradientSums* out, void* dz_copy);
  // Writes grad_x from the sums of all channels, or of all sets of channels (set_channels). dz is read from dz_copy, unless
  // that is null; else from grad_residual, which may be the same memory as grad_x. A grad_residual of 16 bits is rounded,
  // and is only read for activations with an exponential. Otherwise dz is computed again.
  void (*batch_norm_gradient_input)(const BatchNormBackward&, Slab, const math::GradientSums* sums, const void* dz_copy);

  PartialNorm (*partial_norm)(DType, Norm, int64_t count, const void* x, double factor);
  void (*scale)(DType, int64_t count, void* x, double coefficient);
  void (*clamp)(DType, int64_t count, void* x, double limit);

  // Updates elements [begin, begin + count) of the run.
  void (*rmsprop)(const RmspropRun&, int64_t begin, int64_t count, const math::RmspropOptions&);
};

extern const Kernels kernels_base;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// The best table that this processor can run. ATEN_CPU_CAPABILITY (default, avx2, avx512) can choose a lesser
// one.
const Kernels& kernels();

// The names of all tables, the least first, separated by spaces.
const char* instruction_sets();

}  // namespace gradkernels::cpu
