// The steps of batch_norm_act for a batch that is spread over several processes, which exchange moments and
// sums between the steps. Each operator checks, allocates and calls a kernel. Devices and dtypes without a
// kernel, and processes with an empty share of the batch, use a composite of ATen's operators.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <vector>

#include "common/check.h"
#include "common/device.h"
#include "common/library.h"
#include "ops/batch_norm_act.h"
#include "ops/batch_norm_act_arguments.h"
#include "ops/composite.h"
#include "ops/layout.h"

namespace gradkernels {
namespace {

bool parts_have_kernel(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias) {
  return kernels_take(x) && per_channel(x, {weight, bias});
}

void check_part(const at::Tensor& x) {
  TORCH_CHECK_NOT_IMPLEMENTED(at::isFloatingType(x.scalar_type()), "\"batch_norm\" not implemented for '", x.scalar_type(), "'");
  TORCH_CHECK(x.dim() >= 2, "batch_norm_act: x must have at least 2 dimensions, got shape ", x.sym_sizes());
}

void check_statistic(const at::Tensor& statistic, const at::Tensor& x, int64_t values_per_channel) {
  TORCH_CHECK(statistic.scalar_type() == at::kDouble && statistic.device() == x.device() && statistic.dim() == 1 &&
                  statistic.sym_size(0) == values_per_channel * x.sym_size(1) && statistic.is_contiguous(),
              "batch_norm_act: statistics must be float64 tensors with ", values_per_channel, " values per channel, on the device of x");
}

void check_count(const at::Tensor& count, const at::Tensor& x) {
  TORCH_CHECK(count.scalar_type() == at::kDouble && count.device() == x.device() && count.dim() == 1 && count.sym_size(0) == 1,
              "batch_norm_act: count must be a float64 tensor of one element, on the device of x");
}

// The composites of ATen's operators. None of them waits for a device.
namespace parts {

std::vector<int64_t> reduced_dims(const at::Tensor& x) {
  std::vector<int64_t> dims = {0};
  for (int64_t d = 2; d < x.dim(); ++d) dims.push_back(d);
  return dims;
}

at::Tensor spread(const at::Tensor& of_channels, const at::Tensor& x) {
  std::vector<int64_t> shape(x.dim(), 1);
  shape[1] = -1;
  return of_channels.view(shape);
}

// A new tensor with the dtype and the memory format of x.
at::Tensor as_output(const at::Tensor& computed, const at::Tensor& x) { return at::empty_like(x, Layout(x).format).copy_(computed); }

at::Tensor zero_unless_finite(const at::Tensor& values) { return at::where(values.isfinite(), values, 0); }

at::ScalarType opmath_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

at::Tensor in_double(const OptionalTensor& values, const at::Tensor& mean, double otherwise) {
  return is_given(values) ? values->to(at::kDouble) : at::full_like(mean, otherwise);
}

// math::moments_about, about the mean that ATen computes in the computing type; about 0 if that mean is inf
// or nan.
at::Tensor stats(const at::Tensor& x) {
  const at::TensorOptions options = x.options().dtype(at::kDouble);
  if (x.sym_numel() == 0) return at::zeros_symint({1 + 2 * x.sym_size(1)}, options);
  const c10::SymInt elements = x.sym_numel() / x.sym_size(1);
  const at::Tensor count = at::full_symint({c10::SymInt(1)}, at::Scalar(elements), options);
  const at::Tensor wide = x.to(opmath_type(x));
  const at::Tensor mean = wide.mean(reduced_dims(x));
  const at::Tensor about = zero_unless_finite(mean);
  const at::Tensor difference = wide - spread(about, x);
  const at::Tensor sum = difference.sum(reduced_dims(x), false, at::kDouble);
  const at::Tensor squares = difference.square().sum(reduced_dims(x), false, at::kDouble);
  const at::Tensor correction = sum / count;
  return at::cat({count, about.to(at::kDouble) + correction, squares - sum * correction});
}

// math::Normalisation as tensors.
struct Normalised {
  at::Tensor centred;  // x - mean_high
  at::Tensor mean_low;
  at::Tensor scale;  // float64
  at::Tensor z;

  Normalised(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd, const OptionalTensor& weight,
             const OptionalTensor& bias) {
    const at::ScalarType opmath = opmath_type(x);
    scale = in_double(weight, mean, 1.0) * invstd;
    const at::Tensor mean_high = at::where(scale.to(opmath).isfinite(), mean.to(opmath), 0);
    mean_low = mean - mean_high.to(at::kDouble);
    mean_low = at::where(mean_low.isnan(), 0, mean_low);
    centred = x.to(opmath) - spread(mean_high, x);
    const at::Tensor shift = in_double(bias, mean, 0.0) - mean_low * scale;
    z = at::addcmul(spread(shift.to(opmath), x), centred, spread(scale.to(opmath), x));
  }

  // The gradient at z.
  at::Tensor gradient(const at::Tensor& grad_y, const OptionalTensor& residual, std::string_view act, double act_param) const {
    return composite::activation_backward(grad_y.to(z.scalar_type()), is_given(residual) ? z + *residual : z, act, act_param);
  }
};

}  // namespace parts

at::Tensor batch_norm_act_stats(const at::Tensor& x) {
  check_part(x);
  if (!parts_have_kernel(x, {}, {})) return parts::stats(x);
  const Layout layout(x);
  const at::Tensor source = x.contiguous(layout.format);
  at::Tensor moments = at::empty_symint({1 + 2 * layout.channels}, x.options().dtype(at::kDouble));
  BatchNormForward p{};
  p.dtype = dtype_of(x);
  p.shape = layout.shape();
  p.x = source.const_data_ptr();
  GK_LAUNCHER(x, batch_norm_act_stats)(p, moments.mutable_data_ptr<double>());
  return moments;
}

at::Tensor batch_norm_act_stats_meta(const at::Tensor& x) {
  check_part(x);
  return at::empty_symint({1 + 2 * x.sym_size(1)}, x.options().dtype(at::kDouble));
}

using GatheredStats = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The checks of batch_norm_act_gather_stats, and its outputs: mean, invstd, count.
GatheredStats gathered_stats(const at::Tensor& moments, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                             const OptionalTensor& num_batches_tracked) {
  TORCH_CHECK(moments.scalar_type() == at::kDouble && moments.dim() == 2 && moments.sym_size(1) % 2 == 1 && moments.is_contiguous(),
              "batch_norm_act_gather_stats: moments must be a float64 tensor of shape [ranks, 1 + 2 C], got ", moments.scalar_type(),
              " of shape ", moments.sym_sizes());
  const c10::SymInt channels = (moments.sym_size(1) - 1) / 2;
  for (const OptionalTensor& running : {running_mean, running_var}) {
    TORCH_CHECK(!is_given(running) || (at::isFloatingType(running->scalar_type()) && running->layout() == at::kStrided &&
                                       running->device() == moments.device() && running->dim() == 1 && running->sym_size(0) == channels &&
                                       running->is_contiguous()),
                "batch_norm_act_gather_stats: running statistics must be floating-point tensors of ", channels,
                " elements, on the device of moments");
  }
  check_num_batches_tracked(num_batches_tracked);
  TORCH_CHECK(!is_given(num_batches_tracked) || num_batches_tracked->device() == moments.device(),
              "batch_norm_act_gather_stats: num_batches_tracked must be on the device of moments");
  at::Tensor mean = at::empty_symint({channels}, moments.options());
  return {mean, at::empty_like(mean), at::empty_symint({c10::SymInt(1)}, moments.options())};
}

GatheredStats batch_norm_act_gather_stats(const at::Tensor& moments, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                          const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  auto [mean, invstd, count] = gathered_stats(moments, running_mean, running_var, num_batches_tracked);
  count.copy_(moments.select(1, 0).sum(0, true));
  // On other devices this check would have to wait for the count. There, the running statistics keep their
  // values instead.
  TORCH_CHECK_VALUE(!count.is_cpu() || *count.const_data_ptr<double>() != 1.0,
                    "Expected more than 1 value per channel when training, got 1 in the batches of all processes together");
  const at::Tensor batches = batches_on_device_of(moments, num_batches_tracked, momentum);
  // The kernel writes float64; copy_ rounds it to the dtype of the running statistics.
  const auto in_double = [](const OptionalTensor& running) {
    return is_given(running) ? running->to(at::kDouble).resolve_neg() : at::Tensor();
  };
  const at::Tensor wide_mean = in_double(running_mean), wide_var = in_double(running_var);
  BatchNormForward p{};
  p.parameter_dtype = DType::kFloat64;
  p.shape = {0, mean.numel(), 0};
  p.momentum = momentum.value_or(0.0);
  p.batches = data_of_batches(batches);
  p.eps = eps;
  p.running_mean = mutable_data_of(wide_mean);
  p.running_var = mutable_data_of(wide_var);
  p.mean = mean.mutable_data_ptr<double>();
  p.invstd = invstd.mutable_data_ptr<double>();
  GK_LAUNCHER(moments, batch_norm_act_gather_stats)(p, moments.size(0), moments.resolve_neg().const_data_ptr<double>());
  if (is_given(running_mean)) running_mean->copy_(wide_mean);
  if (is_given(running_var)) running_var->copy_(wide_var);
  if (is_given(num_batches_tracked)) count_batch(*num_batches_tracked);
  return {mean, invstd, count};
}

// For devices without kernels. All ranks are merged at once, with the weights that Chan's formula gives them
// one after the other.
GatheredStats batch_norm_act_gather_stats_composite(const at::Tensor& moments, const OptionalTensor& running_mean,
                                                    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                                    std::optional<double> momentum, double eps) {
  gathered_stats(moments, running_mean, running_var, num_batches_tracked);
  const c10::SymInt channels = (moments.sym_size(1) - 1) / 2;
  const at::Tensor counts = moments.narrow_symint(1, 0, 1);
  const at::Tensor means = moments.narrow_symint(1, 1, channels);
  const at::Tensor count = counts.sum(0);
  const at::Tensor divisor = count.clamp_min(1);
  const at::Tensor mean = (counts * means).sum(0) / divisor;
  const at::Tensor m2 = moments.narrow_symint(1, 1 + channels, channels).sum(0) + (counts * (means - mean).square()).sum(0);
  const at::Tensor variance = m2 / divisor + eps;
  const at::Tensor invstd = at::where(variance == 0, at::zeros_like(variance), variance.rsqrt());
  at::Tensor factor = at::full_like(count, momentum.value_or(0.0));
  if (is_given(num_batches_tracked)) {
    num_batches_tracked->add_(1);
    if (!momentum.has_value()) factor = num_batches_tracked->to(at::kDouble).reciprocal();
  }
  // One value has no variance, and an empty batch has no mean either: the running statistics keep their
  // values.
  const auto update = [&](const OptionalTensor& running, const at::Tensor& observed) {
    if (!is_given(running)) return;
    const at::Tensor before = running->to(at::kDouble);
    running->copy_(at::where(count > 1, before * (1 - factor) + observed * factor, before));
  };
  update(running_mean, mean);
  update(running_var, m2 / (count - 1));
  return {mean, invstd, count};
}

GatheredStats batch_norm_act_gather_stats_meta(const at::Tensor& moments, const OptionalTensor& running_mean,
                                               const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                               std::optional<double>, double) {
  return gathered_stats(moments, running_mean, running_var, num_batches_tracked);
}

void check_elemt(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd, const OptionalTensor& weight,
                 const OptionalTensor& bias, const OptionalTensor& residual) {
  check_part(x);
  check_statistic(mean, x, 1);
  check_statistic(invstd, x, 1);
  for (const OptionalTensor& parameter : {weight, bias}) {
    TORCH_CHECK(!is_given(parameter) || parameter->device() == x.device(), "batch_norm_act: weight and bias must be on the device of x, ",
                x.device(), ", got ", parameter->device());
  }
  check_residual(x, residual);
}

std::tuple<at::Tensor, at::Tensor> batch_norm_act_elemt(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd,
                                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                                        const OptionalTensor& residual, c10::string_view name, double act_param) {
  check_elemt(x, mean, invstd, weight, bias, residual);
  if (!parts_have_kernel(x, weight, bias)) {
    const parts::Normalised normalised(x, mean, invstd, weight, bias);
    return {parts::as_output(composite::add_and_activate(normalised.z, residual, name, act_param), x),
            at::empty({0}, x.options().dtype(at::kByte))};
  }
  const Forward f(x, residual, name, act_param);
  GK_LAUNCHER(x, batch_norm_act_elemt)(f.arguments(Operands(f.layout, x, residual), weight, bias, mean, invstd));
  return {f.y, f.mask};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_act_elemt_meta(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd,
                                                             const OptionalTensor& weight, const OptionalTensor& bias,
                                                             const OptionalTensor& residual, c10::string_view name, double act_param) {
  check_elemt(x, mean, invstd, weight, bias, residual);
  const Forward f(x, residual, name, act_param);
  return {f.y, parts_have_kernel(x, weight, bias) ? f.mask : at::empty({0}, f.mask.options())};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_act_backward_reduce(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
                                                                  const at::Tensor& invstd, const OptionalTensor& weight,
                                                                  const OptionalTensor& bias, const OptionalTensor& residual,
                                                                  const OptionalTensor& mask, c10::string_view act, double act_param,
                                                                  bool residual_g) {
  check_elemt(x, mean, invstd, weight, bias, residual);
  if (!parts_have_kernel(x, weight, bias)) {
    const parts::Normalised normalised(x, mean, invstd, weight, bias);
    const at::Tensor dz = normalised.gradient(grad_y, residual, act, act_param);
    const at::Tensor dz_sum = dz.sum(parts::reduced_dims(x), false, at::kDouble);
    const at::Tensor dz_x_sum =
        (dz * normalised.centred).sum(parts::reduced_dims(x), false, at::kDouble) - normalised.mean_low * parts::zero_unless_finite(dz_sum);
    return {at::cat({dz_sum, dz_x_sum}), residual_g ? parts::as_output(dz, x) : at::empty({0}, x.options())};
  }
  const Backward b(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, {false, false, false, residual_g});
  at::Tensor sums = at::empty_symint({2 * b.layout.channels}, mean.options());
  const Operands operands(b.layout, x, residual, grad_y);
  GK_LAUNCHER(x, batch_norm_act_backward_reduce)(b.arguments(operands, mean, invstd, weight, bias, mask, /*training=*/true),
                                                 sums.mutable_data_ptr<double>());
  return {sums, b.grad_residual};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_act_backward_reduce_meta(const at::Tensor& grad_y, const at::Tensor& x,
                                                                       const at::Tensor& mean, const at::Tensor& invstd,
                                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                                       const OptionalTensor& residual, const OptionalTensor& mask,
                                                                       c10::string_view act, double act_param, bool residual_g) {
  check_elemt(x, mean, invstd, weight, bias, residual);
  const at::Tensor sums = at::empty_symint({2 * x.sym_size(1)}, mean.options());
  if (!parts_have_kernel(x, weight, bias)) {
    return {sums, residual_g ? at::empty_like(x, Layout(x).format) : at::empty({0}, x.options())};
  }
  const Backward b(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, {false, false, false, residual_g});
  return {sums, b.grad_residual};
}

at::Tensor batch_norm_act_backward_elemt(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd,
                                         const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                                         const OptionalTensor& mask, c10::string_view act, double act_param, const at::Tensor& sums,
                                         const at::Tensor& count) {
  check_elemt(x, mean, invstd, weight, bias, residual);
  check_statistic(sums, x, 2);
  check_count(count, x);
  if (!parts_have_kernel(x, weight, bias)) {
    const parts::Normalised normalised(x, mean, invstd, weight, bias);
    const at::Tensor dz = normalised.gradient(grad_y, residual, act, act_param);
    const std::vector<at::Tensor> mean_of = (sums / count).chunk(2);
    const at::Tensor slope = -invstd * invstd * mean_of[1];
    const at::Tensor dz_mean = mean_of[0] + parts::zero_unless_finite(slope * normalised.mean_low);
    const at::Tensor dz_mean_high = dz_mean.to(dz.scalar_type());
    const at::Tensor offset =
        parts::zero_unless_finite((-normalised.scale * (dz_mean - dz_mean_high.to(at::kDouble))).to(dz.scalar_type()));
    const auto spread = [&](const at::Tensor& of_channels) { return parts::spread(of_channels.to(dz.scalar_type()), x); };
    const at::Tensor centred_dz = at::addcmul(dz - spread(dz_mean_high), normalised.centred, spread(slope));
    return parts::as_output(at::addcmul(spread(offset), centred_dz, spread(normalised.scale)), x);
  }
  const Backward b(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, {true, false, false, false});
  const Operands operands(b.layout, x, residual, grad_y);
  const at::Tensor of_all = count.to(at::kDouble);
  GK_LAUNCHER(x, batch_norm_act_backward_elemt)(b.arguments(operands, mean, invstd, weight, bias, mask, /*training=*/true),
                                                sums.const_data_ptr<double>(), of_all.const_data_ptr<double>());
  return b.grad_x;
}

at::Tensor batch_norm_act_backward_elemt_meta(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean,
                                              const at::Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& residual, const OptionalTensor& mask, c10::string_view act,
                                              double act_param, const at::Tensor& sums, const at::Tensor& count) {
  check_elemt(x, mean, invstd, weight, bias, residual);
  check_statistic(sums, x, 2);
  check_count(count, x);
  if (!parts_have_kernel(x, weight, bias)) return at::empty_like(x, Layout(x).format);
  return Backward(grad_y, x, mean, invstd, weight, bias, residual, mask, act, act_param, {true, false, false, false}).grad_x;
}

}  // namespace

GK_LIBRARY_IMPL(CPU, m) { m.impl("batch_norm_act_gather_stats", on_device<batch_norm_act_gather_stats>); }
#if defined(GK_WITH_CUDA)
GK_LIBRARY_IMPL(CUDA, m) { m.impl("batch_norm_act_gather_stats", on_device<batch_norm_act_gather_stats>); }
#endif

GK_LIBRARY_IMPL(Meta, m) {
  m.impl("batch_norm_act_stats", batch_norm_act_stats_meta);
  m.impl("batch_norm_act_gather_stats", batch_norm_act_gather_stats_meta);
  m.impl("batch_norm_act_elemt", batch_norm_act_elemt_meta);
  m.impl("batch_norm_act_backward_reduce", batch_norm_act_backward_reduce_meta);
  m.impl("batch_norm_act_backward_elemt", batch_norm_act_backward_elemt_meta);
}

// For every device. On a device without kernels, these functions use their composites.
GK_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("batch_norm_act_stats", on_device<batch_norm_act_stats>);
  m.impl("batch_norm_act_gather_stats", batch_norm_act_gather_stats_composite);
  m.impl("batch_norm_act_elemt", on_device<batch_norm_act_elemt>);
  m.impl("batch_norm_act_backward_reduce", on_device<batch_norm_act_backward_reduce>);
  m.impl("batch_norm_act_backward_elemt", on_device<batch_norm_act_backward_elemt>);
}

// As in batch_norm_act.cpp.
GK_LIBRARY_IMPL(Negative, m) { m.impl("batch_norm_act_gather_stats", torch::CppFunction::makeFallthrough()); }

}  // namespace gradkernels
