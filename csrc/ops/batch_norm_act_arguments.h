// From tensors to the arguments of the kernels of batch_norm_act and group_norm_act: checks, outputs, and the structs of
// ops/batch_norm_act.h. Only group norm passes `num_groups`.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string_view>
#include <tuple>

#include "common/allocate.h"
#include "common/check.h"
#include "ops/batch_norm_act.h"
#include "ops/composite.h"
#include "ops/layout.h"

namespace gradkernels {

using composite::OptionalTensor;

// The activation with the name `act`. Other names are a ValueError.
math::Activation activation(std::string_view act, double act_param);

inline bool is_given(const OptionalTensor& x) { return x.has_value() && x->defined(); }

inline const void* data_of(const OptionalTensor& x) { return is_given(x) ? x->const_data_ptr() : nullptr; }
inline const void* data_of(const at::Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }
inline void* mutable_data_of(const OptionalTensor& x) { return is_given(x) ? x->mutable_data_ptr() : nullptr; }

inline at::Tensor empty_mask(const at::Tensor& x, const Layout& layout, bool needed) {
  const c10::SymInt bytes = needed ? layout.samples * mask_bytes(layout.rows, layout.channels, layout.inner) : c10::SymInt(0);
  return at::empty_symint({bytes}, x.options().dtype(at::kByte));
}

inline bool kernels_take(const at::Tensor& x) { return has_kernel(x) && x.dim() >= 2 && x.dim() <= 5 && x.sym_numel() > 0; }

inline bool divides(int64_t num_groups, const at::Tensor& x) { return num_groups > 0 && x.sym_size(1) % num_groups == 0; }

inline at::ScalarType parameter_dtype(const at::Tensor& x, std::initializer_list<OptionalTensor> parameters) {
  const auto first = std::find_if(parameters.begin(), parameters.end(), is_given);
  return first == parameters.end() ? x.scalar_type() : (*first)->scalar_type();
}

// Whether each of these tensors that exists has one number for each channel, dense in memory. They must have
// one dtype: that of x, or float32 if x has 16 bits.
inline bool per_channel(const at::Tensor& x, std::initializer_list<OptionalTensor> parameters) {
  const at::ScalarType dtype = parameter_dtype(x, parameters);
  if (dtype != x.scalar_type() && !(dtype == at::kFloat && x.element_size() == 2)) return false;
  return std::all_of(parameters.begin(), parameters.end(), [&](const OptionalTensor& values) {
    return !is_given(values) ||
           (values->scalar_type() == dtype && values->device() == x.device() && values->layout() == at::kStrided && values->dim() == 1 &&
            values->sym_size(0) == x.sym_size(1) && values->is_contiguous() && !values->is_neg());
  });
}

inline void check_residual(const at::Tensor& x, const OptionalTensor& residual) {
  if (!is_given(residual)) return;
  TORCH_CHECK(residual->sym_sizes() == x.sym_sizes(), "residual must have the shape of x, ", x.sym_sizes(), ", got ",
              residual->sym_sizes());
  TORCH_CHECK(residual->scalar_type() == x.scalar_type(), "residual must have the dtype of x, ", x.scalar_type(), ", got ",
              residual->scalar_type());
  TORCH_CHECK(residual->device() == x.device(), "residual must be on the device of x, ", x.device(), ", got ", residual->device());
}

inline void check_statistic(const at::Tensor& statistic, const at::Tensor& x, const Layout& layout) {
  TORCH_CHECK(statistic.scalar_type() == at::kDouble && statistic.device() == x.device() && statistic.dim() == 1 &&
                  statistic.sym_size(0) == layout.sets() && statistic.is_contiguous(),
              "mean and invstd must be float64 tensors of ", layout.sets(), " elements on the device of x");
}

// Whether x can be incremented; a bool, for example, cannot. It is checked before anything is written,
// because the increment comes last.
inline bool can_count(const at::Tensor& x) {
  const at::ScalarType dtype = x.scalar_type();
  const bool of_numbers = at::isIntegralType(dtype, /*includeBool=*/false) || dtype == at::kFloat || dtype == at::kDouble ||
                          dtype == at::kBFloat16 || dtype == at::kHalf;
  return of_numbers && x.layout() == at::kStrided && !x.is_nested() && !x._is_zerotensor();
}

inline void check_num_batches_tracked(const OptionalTensor& count) {
  TORCH_CHECK(!is_given(count) || (can_count(*count) && count->sym_numel() == 1), "num_batches_tracked must be one number, got ",
              count->scalar_type(), " of layout ", count->layout(), " and shape ", count->sym_sizes());
}

// num_batches_tracked on the device of x, so that reading it does not wait for a GPU; undefined unless the
// momentum depends on it.
inline at::Tensor batches_on_device_of(const at::Tensor& x, const OptionalTensor& num_batches_tracked, std::optional<double> momentum) {
  if (!is_given(num_batches_tracked) || momentum.has_value()) return {};
  return num_batches_tracked->to(x.device(), at::kLong).resolve_neg();
}

inline const int64_t* data_of_batches(const at::Tensor& batches) { return batches.defined() ? batches.const_data_ptr<int64_t>() : nullptr; }

inline void count_batch(const at::Tensor& num_batches_tracked) {
  if (num_batches_tracked.is_cpu() && num_batches_tracked.scalar_type() == at::kLong && !num_batches_tracked.is_neg()) {
    ++*num_batches_tracked.mutable_data_ptr<int64_t>();
  } else {
    num_batches_tracked.add_(1);
  }
}

// num_batches_tracked, if kernels on the device of x can add 1 to it, which saves a kernel of its own; otherwise
// null, and count_batch does.
inline int64_t* counted_by_kernel(const at::Tensor& x, const OptionalTensor& num_batches_tracked) {
  const bool can = is_given(num_batches_tracked) && x.is_cuda() && x.numel() > 0 && num_batches_tracked->device() == x.device() &&
                   num_batches_tracked->scalar_type() == at::kLong && !num_batches_tracked->is_neg();
  return can ? num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr;
}

// The operands in the layout of the kernels; operands in another layout are copied.
struct Operands {
  at::Tensor x, residual, grad_y;

  Operands(const Layout& layout, const at::Tensor& x, const OptionalTensor& residual, const at::Tensor& grad_y = {})
      : x(x.contiguous(layout.format)),
        residual(is_given(residual) ? residual->resolve_neg().contiguous(layout.format) : at::Tensor()),
        grad_y(grad_y.defined() ? grad_y.contiguous(layout.format) : at::Tensor()) {}
};

// The checks and the outputs of the forward operators, for the kernels and for tracing.
struct Forward {
  math::Activation act;
  Layout layout;
  at::Tensor y, mask;

  Forward(const at::Tensor& x, const OptionalTensor& residual, c10::string_view name, double act_param,
          std::optional<int64_t> num_groups = {})
      : act(activation(name, act_param)),
        layout((check_residual(x, residual), x), num_groups),
        y(at::empty_like(x, layout.format)),
        mask(empty_mask(x, layout, is_given(residual) && act.has_two_slopes())) {}

  // Memory for mean or invstd.
  at::Tensor statistic() const { return at::empty_symint({layout.sets()}, y.options().dtype(at::kDouble)); }

  // The arguments of the kernels, without the running statistics.
  BatchNormForward arguments(const Operands& operands, const OptionalTensor& weight, const OptionalTensor& bias, const at::Tensor& mean,
                             const at::Tensor& invstd) const {
    BatchNormForward p{};
    p.dtype = dtype_of(y);
    p.parameter_dtype = dtype_of(parameter_dtype(y, {weight, bias}));
    p.shape = layout.shape();
    p.set_channels = layout.set_channels.expect_int();
    p.act = act;
    p.x = operands.x.const_data_ptr();
    p.residual = data_of(operands.residual);
    p.weight = data_of(weight);
    p.bias = data_of(bias);
    p.mean = mean.mutable_data_ptr<double>();
    p.invstd = invstd.mutable_data_ptr<double>();
    p.y = on_huge_pages(y).mutable_data_ptr();
    p.mask = mask.numel() == 0 ? nullptr : mask.mutable_data_ptr<uint8_t>();
    return p;
  }
};

using BatchNormActGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The checks and the outputs of the backward operators, for the kernels and for tracing. Outputs that are not
// needed have no elements.
struct Backward {
  math::Activation act;
  Layout layout;
  at::Tensor grad_x, grad_weight, grad_bias, grad_residual;

  Backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& invstd, const OptionalTensor& weight,
           const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& mask, c10::string_view name, double act_param,
           std::array<bool, 4> output_mask, std::optional<int64_t> num_groups = {})
      : act(activation(name, act_param)), layout((check(grad_y, x, num_groups), x), num_groups) {
    for (const at::Tensor& statistic : {mean, invstd}) check_statistic(statistic, x, layout);
    TORCH_CHECK(per_channel(x, {weight, bias}), kName, ": weight and bias must have ", x.sym_size(1),
                " elements in the dtype of x, or in float32 if x has 16 bits");
    check_residual(x, residual);
    if (is_given(mask)) {
      TORCH_CHECK(act.has_two_slopes() && mask->scalar_type() == at::kByte && mask->device() == x.device() && mask->is_contiguous() &&
                      mask->sym_numel() == layout.samples * mask_bytes(layout.rows, layout.channels, layout.inner),
                  kName, ": this mask does not belong to act and x");
    } else {
      TORCH_CHECK(!is_given(residual) || !act.has_two_slopes(), kName, ": with a residual, ", name, " needs the mask");
    }
    const at::TensorOptions of_parameters = x.options().dtype(parameter_dtype(x, {weight, bias}));
    const auto like_x = [&](bool wanted) { return wanted ? at::empty_like(x, layout.format) : at::empty({0}, x.options()); };
    const auto like_weight = [&](bool wanted) { return at::empty_symint({wanted ? layout.channels : c10::SymInt(0)}, of_parameters); };
    grad_x = like_x(output_mask[0]);
    grad_weight = like_weight(output_mask[1]);
    grad_bias = like_weight(output_mask[2]);
    grad_residual = like_x(output_mask[3]);
  }

  BatchNormActGradients gradients() const { return {grad_x, grad_weight, grad_bias, grad_residual}; }

  // The arguments of the kernels.
  BatchNormBackward arguments(const Operands& operands, const at::Tensor& mean, const at::Tensor& invstd, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& mask, bool training) const {
    const auto written = [](const at::Tensor& gradient) { return gradient.numel() == 0 ? nullptr : gradient.mutable_data_ptr(); };
    BatchNormBackward p{};
    p.dtype = dtype_of(operands.x);
    p.parameter_dtype = dtype_of(grad_weight);
    p.shape = layout.shape();
    p.set_channels = layout.set_channels.expect_int();
    p.act = act;
    p.training = training;
    p.grad_y = operands.grad_y.const_data_ptr();
    p.x = operands.x.const_data_ptr();
    p.residual = data_of(operands.residual);
    p.mask = static_cast<const uint8_t*>(data_of(mask));
    p.weight = data_of(weight);
    p.bias = data_of(bias);
    p.mean = mean.const_data_ptr<double>();
    p.invstd = invstd.const_data_ptr<double>();
    p.grad_x = written(on_huge_pages(grad_x));
    p.grad_weight = written(grad_weight);
    p.grad_bias = written(grad_bias);
    p.grad_residual = written(on_huge_pages(grad_residual));
    return p;
  }

 private:
  static constexpr const char* kName = "the gradient of a normalisation";

  static void check(const at::Tensor& grad_y, const at::Tensor& x, std::optional<int64_t> num_groups) {
    TORCH_CHECK_NOT_IMPLEMENTED(has_kernel(x), kName, " is not implemented for '", x.scalar_type(), "' on ", x.device());
    TORCH_CHECK(x.dim() >= 2 && x.dim() <= 5 && x.sym_numel() > 0, kName,
                ": x must have 2 to 5 dimensions and at least one element, got shape ", x.sym_sizes());
    TORCH_CHECK(same_dtype_and_device(grad_y, x) && grad_y.sym_sizes() == x.sym_sizes(), kName,
                ": grad_y must have the dtype, the device and the shape of x, ", x.sym_sizes(), ", got ", grad_y.sym_sizes());
    TORCH_CHECK(!num_groups.has_value() || divides(*num_groups, x), kName, ": num_groups must divide the channels of x, ", x.sym_size(1),
                ", got ", num_groups.value_or(0));
  }
};

}  // namespace gradkernels
