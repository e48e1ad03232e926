// The kernels of the CPU as C functions, which gradkernels/portable.py calls through ctypes. The library asks
// torch for one C function, the one that runs torch's threads (cpu/parallel.h). So one file works with every
// torch that has this function, and with every Python.
//
// Nothing is checked here: the caller does. A function that computes returns 0, or 1 if there is not enough
// memory. Tensors of a list are described by arrays: their dtypes, their numbers of elements, and the addresses
// of their first elements.
#include <algorithm>
#include <cmath>
#include <new>
#include <string>
#include <vector>

#include "build_info.h"
#include "common/extents.h"
#include "common/huge_pages.h"
#include "cpu/kernels.h"
#include "math/batch_norm_act.h"
#include "ops/activation.h"
#include "ops/batch_norm_act.h"
#include "ops/clip_grad.h"
#include "ops/group_norm_act.h"
#include "ops/optim.h"

namespace gradkernels {
namespace {

using math::ActivationKind;

// portable.py counts the dtypes, norms, saved tensors and parametric activations in this order.
static_assert(DType{0} == DType::kFloat32 && DType{1} == DType::kFloat64 && DType{2} == DType::kBFloat16 && DType{3} == DType::kFloat16);
static_assert(Norm{0} == Norm::kOne && Norm{1} == Norm::kTwo && Norm{2} == Norm::kInfinity);
static_assert(Saved{0} == Saved::kInput && Saved{1} == Saved::kOutput && Saved{2} == Saved::kMask);
static_assert(Parametric{0} == Parametric::kPrelu && Parametric{1} == Parametric::kSwish);

// Vectors of GCC 11 and newer call this function for an impossible size. The standard library of older systems
// does not have it.
[[noreturn]] __attribute__((used, visibility("hidden"))) void throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_alloc(); }

template <typename Function>
int run(const Function& function) {
  try {
    function();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// A fresh output of `count` elements.
void* fresh(DType dtype, int64_t count, void* y) {
  if (y != nullptr) request_huge_pages(y, static_cast<size_t>(count * size_of(dtype)));
  return y;
}

// The arguments that both directions of batch norm and of group norm have. `statistics` are mean and invstd, one after the
// other.
template <typename Arguments>
Arguments norm_act(DType dtype, DType parameter_dtype, const ChannelShape& shape, int64_t set_channels, math::Activation act, int training,
                   const void* x, const void* residual, uint8_t* mask, const void* weight, const void* bias, double* statistics) {
  Arguments p{};
  p.dtype = dtype;
  p.parameter_dtype = parameter_dtype;
  p.shape = shape;
  p.set_channels = std::max<int64_t>(set_channels, 1);
  p.act = act;
  p.training = training != 0;
  p.x = x;
  p.residual = residual;
  p.mask = mask;
  p.weight = weight;
  p.bias = bias;
  p.mean = statistics;
  p.invstd = statistics + shape.samples * shape.channels / p.set_channels;
  return p;
}

// Calls launch(runs, count) for all runs at once or, if some share memory, for one after the other.
template <typename RunType, typename Launch>
void launch_disjoint(const std::vector<RunType>& runs, const std::vector<Extent>& written, const Launch& launch) {
  const int64_t count = static_cast<int64_t>(runs.size());
  if (disjoint(written)) return launch(runs.data(), count);
  for (const RunType& each : runs) launch(&each, 1);
}

Extent extent_of(DType dtype, int64_t count, const void* data) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  return {begin, begin + static_cast<uintptr_t>(count * size_of(dtype))};
}

std::vector<Run> runs_of(int64_t run_count, const DType* dtypes, const int64_t* counts, void* const* data) {
  std::vector<Run> runs;
  runs.reserve(run_count);
  for (int64_t i = 0; i < run_count; ++i) runs.push_back({dtypes[i], counts[i], data[i]});
  return runs;
}

template <typename Launch>
void write_runs(const std::vector<Run>& runs, const Launch& launch) {
  std::vector<Extent> written;
  for (const Run& each : runs) {
    if (each.count != 0) written.push_back(extent_of(each.dtype, each.count, each.data));
  }
  launch_disjoint(runs, written, launch);
}

void clip_with_norm(const std::vector<Run>& runs, double max_norm, const double* total_norm) {
  write_runs(runs, [=](const Run* some, int64_t count) { cpu::clip_with_norm(some, count, max_norm, total_norm); });
}

}  // namespace
}  // namespace gradkernels

extern "C" {
#pragma GCC visibility push(default)

using namespace gradkernels;

// torch's version and the commit of the build, the compiler, and the instruction sets, one per line.
const char* gk_build_info() {
  static const std::string info =
      std::string(build_info().torch) + "\n" + build_info().commit + "\n" + build_info().compiler + "\n" + cpu::instruction_sets();
  return info.c_str();
}

// The instruction set in use.
const char* gk_instruction_set() { return cpu::kernels().name; }

// The name of an activation by its number, or null after the last one.
const char* gk_activation_name(ActivationKind kind) { return math::traits_of(kind).name; }

int gk_activation_forward(DType dtype, ActivationKind kind, double parameter, int64_t count, const void* x, void* y, uint8_t* mask) {
  return run([&] { cpu::activation_forward(dtype, {kind, parameter}, count, x, y == x ? y : fresh(dtype, count, y), mask); });
}

int gk_activation_backward(DType dtype, ActivationKind kind, double parameter, Saved saved_kind, int64_t count, const void* grad_y,
                           const void* saved, void* grad_x) {
  return run([&] { cpu::activation_backward(dtype, {kind, parameter}, saved_kind, count, grad_y, saved, fresh(dtype, count, grad_x)); });
}

int gk_parametric_forward(DType dtype, Parametric act, int64_t rows, int64_t channels, int64_t inner, const void* x, const void* parameter,
                          void* y) {
  return run(
      [&] { cpu::parametric_forward({dtype, {rows, channels, inner}, act, x, parameter, fresh(dtype, rows * channels * inner, y)}); });
}

int gk_parametric_backward(DType dtype, Parametric act, int64_t rows, int64_t channels, int64_t inner, const void* grad_y, const void* x,
                           const void* parameter, void* grad_x, void* grad_parameter) {
  return run([&] {
    void* const fresh_grad_x = fresh(dtype, rows * channels * inner, grad_x);
    cpu::parametric_backward({dtype, {rows, channels, inner}, act, grad_y, x, parameter, fresh_grad_x, grad_parameter});
  });
}

// Group norm goes to torch below.
int64_t gk_least_pixels() { return kLeastPixels; }

int64_t gk_mask_bytes(int64_t rows, int64_t channels, int64_t inner) { return mask_bytes(rows, channels, inner); }

// Batch norm if `set_channels` is 0, otherwise group norm. `counted` is num_batches_tracked or null; in training 1 is added
// to it, and if `cumulative`, it replaces the momentum.
int gk_norm_act_forward(DType dtype, DType parameter_dtype, int64_t samples, int64_t rows, int64_t channels, int64_t inner,
                        int64_t set_channels, ActivationKind kind, double act_param, int training, const void* x, const void* residual,
                        uint8_t* mask, const void* weight, const void* bias, double* statistics, double momentum, int cumulative,
                        double eps, void* running_mean, void* running_var, void* y, int64_t* counted) {
  return run([&] {
    auto p = norm_act<BatchNormForward>(dtype, parameter_dtype, {rows, channels, inner, samples}, set_channels, {kind, act_param}, training,
                                        x, residual, mask, weight, bias, statistics);
    p.momentum = momentum;
    p.batches = cumulative != 0 ? counted : nullptr;
    p.eps = eps;
    p.running_mean = running_mean;
    p.running_var = running_var;
    p.y = fresh(dtype, samples * rows * channels * inner, y);
    (set_channels == 0 ? cpu::batch_norm_act_forward : cpu::group_norm_act_forward)(p);
    if (counted != nullptr) ++*counted;
  });
}

int gk_norm_act_backward(DType dtype, DType parameter_dtype, int64_t samples, int64_t rows, int64_t channels, int64_t inner,
                         int64_t set_channels, ActivationKind kind, double act_param, int training, const void* x, const void* residual,
                         uint8_t* mask, const void* weight, const void* bias, double* statistics, const void* grad_y, void* grad_x,
                         void* grad_weight, void* grad_bias, void* grad_residual) {
  return run([&] {
    auto p = norm_act<BatchNormBackward>(dtype, parameter_dtype, {rows, channels, inner, samples}, set_channels, {kind, act_param},
                                         training, x, residual, mask, weight, bias, statistics);
    p.grad_y = grad_y;
    p.grad_x = fresh(dtype, samples * rows * channels * inner, grad_x);
    p.grad_weight = grad_weight;
    p.grad_bias = grad_bias;
    p.grad_residual = fresh(dtype, samples * rows * channels * inner, grad_residual);
    (set_channels == 0 ? cpu::batch_norm_act_backward : cpu::group_norm_act_backward)(p);
  });
}

int gk_grad_norms(int64_t run_count, const DType* dtypes, const int64_t* counts, void* const* grads, Norm norm, double* norms,
                  double* max_abs, int64_t* nonfinite, double* total_norm) {
  return run([&] {
    const std::vector<Run> runs = runs_of(run_count, dtypes, counts, grads);
    cpu::grad_norms(runs.data(), run_count, norm, {norms, max_abs, nonfinite, total_norm});
  });
}

// Writes total_norm. Clips unless `refuses_nonfinite` and total_norm is not finite.
int gk_clip_grad_norm(int64_t run_count, const DType* dtypes, const int64_t* counts, void* const* grads, Norm norm, double max_norm,
                      int refuses_nonfinite, double* total_norm) {
  return run([&] {
    std::vector<double> norms(run_count), max_abs(run_count);
    std::vector<int64_t> nonfinite(run_count);
    const std::vector<Run> runs = runs_of(run_count, dtypes, counts, grads);
    cpu::grad_norms(runs.data(), run_count, norm, {norms.data(), max_abs.data(), nonfinite.data(), total_norm});
    if (refuses_nonfinite != 0 && !std::isfinite(*total_norm)) return;
    clip_with_norm(runs, max_norm, total_norm);
  });
}

int gk_clip_with_norm(int64_t run_count, const DType* dtypes, const int64_t* counts, void* const* grads, double max_norm,
                      const double* total_norm) {
  return run([&] { clip_with_norm(runs_of(run_count, dtypes, counts, grads), max_norm, total_norm); });
}

int gk_clamp(int64_t run_count, const DType* dtypes, const int64_t* counts, void* const* grads, double limit) {
  return run([&] {
    write_runs(runs_of(run_count, dtypes, counts, grads), [=](const Run* some, int64_t count) { cpu::clamp(some, count, limit); });
  });
}

// `elements` are those of a unit; gradients have at least one.
int gk_adaptive_clip(int64_t run_count, const DType* dtypes, const int64_t* counts, void* const* grads, const void* const* params,
                     const int64_t* elements, Norm norm, double clip_factor, double eps) {
  return run([&] {
    std::vector<UnitRun> runs;
    std::vector<Extent> written;
    for (int64_t i = 0; i < run_count; ++i) {
      runs.push_back({dtypes[i], counts[i] / elements[i], elements[i], params[i], grads[i]});
      written.push_back(extent_of(dtypes[i], counts[i], grads[i]));
    }
    launch_disjoint(runs, written, [&](const UnitRun* units, int64_t count) { cpu::adaptive_clip(units, count, norm, clip_factor, eps); });
  });
}

// Lists of state that the options do not need are null.
int gk_rmsprop(int64_t run_count, const DType* dtypes, const int64_t* counts, void* const* params, const void* const* grads,
               void* const* square_avgs, void* const* grad_avgs, void* const* momentum_buffers, double lr, double alpha, double eps,
               double weight_decay, double momentum, double grad_coefficient) {
  return run([&] {
    const math::RmspropOptions options{lr, alpha, eps, weight_decay, momentum, grad_coefficient};
    std::vector<RmspropRun> runs;
    std::vector<Extent> written;
    for (int64_t i = 0; i < run_count; ++i) {
      runs.push_back({dtypes[i], counts[i], params[i], grads[i], square_avgs[i], grad_avgs == nullptr ? nullptr : grad_avgs[i],
                      momentum_buffers == nullptr ? nullptr : momentum_buffers[i]});
      if (counts[i] != 0) written.push_back(extent_of(dtypes[i], counts[i], params[i]));
    }
    launch_disjoint(runs, written, [&](const RmspropRun* some, int64_t count) { cpu::rmsprop(some, count, options); });
  });
}

#pragma GCC visibility pop
}  // extern "C"
