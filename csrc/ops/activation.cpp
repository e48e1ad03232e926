// The activations' operators: check, allocate, hand to the kernels. Elementwise work goes over storage order, whatever the strides, as long
// as the elements fill it without gaps; other tensors are copied first, as ATen's TensorIterator would walk them.
#include "ops/activation.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include "common/allocate.h"
#include "common/check.h"
#include "ops/composite.h"

namespace gradkernels {

namespace composite {

at::Tensor leaky_relu(const at::Tensor& x, double negative_slope) { return at::leaky_relu(x, negative_slope); }
void leaky_relu_(at::Tensor x, double negative_slope) { at::leaky_relu_(x, negative_slope); }
at::Tensor elu(const at::Tensor& x, double alpha) { return at::elu(x, alpha); }
void elu_(at::Tensor x, double alpha) { at::elu_(x, alpha); }
at::Tensor swish(const at::Tensor& x, double beta) { return beta == 1.0 ? at::silu(x) : x * at::sigmoid(x * beta); }
at::Tensor swish_backward(const at::Tensor& grad_y, const at::Tensor& x, double beta) {
  const at::Tensor s = at::sigmoid(x * beta);
  return grad_y * (s * (1 + x * beta * (1 - s)));
}

}  // namespace composite

namespace {

using math::Activation;
using math::ActivationKind;

// x itself where its elements fill their storage in some order, else a copy that does.
at::Tensor dense(const at::Tensor& x) { return x.is_non_overlapping_and_dense() ? x : at::empty_like(x).copy_(x); }

// grad_y in the storage order that `stride` describes.
at::Tensor in_order(const at::Tensor& grad_y, at::IntArrayRef stride) {
  for (int64_t d = 0; d < grad_y.dim(); ++d) {
    if (grad_y.size(d) != 1 && grad_y.stride(d) != stride[d]) {
      return at::empty_strided(grad_y.sizes(), stride, grad_y.options()).copy_(grad_y);
    }
  }
  return grad_y;
}

at::Tensor mask_like(const at::Tensor& x) { return at::empty_symint({(x.sym_numel() + 7) / 8}, x.options().dtype(at::kByte)); }

void check_backward(const char* name, const at::Tensor& grad_y, const at::Tensor& saved) {
  TORCH_CHECK(has_kernel(grad_y) && has_kernel(saved) && same_dtype_and_device(grad_y, saved), name, ": grad_y is ", grad_y.scalar_type(),
              " on ", grad_y.device(), " and the saved tensor ", saved.scalar_type(), " on ", saved.device());
  TORCH_CHECK(grad_y.sym_sizes() == saved.sym_sizes(), name, ": grad_y has shape ", grad_y.sym_sizes(), ", the saved tensor ",
              saved.sym_sizes());
}

// Without a mask to write, `mask` is undefined.
at::Tensor forward(Activation act, const at::Tensor& x, const at::Tensor& mask = {}) {
  const at::Tensor source = dense(x);
  const at::Tensor y = on_huge_pages(at::empty_like(source));
  cpu::activation_forward(dtype_of(x), act, x.numel(), source.const_data_ptr(), y.mutable_data_ptr(),
                          mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr);
  return y;
}

void forward_(Activation act, const at::Tensor& x, const at::Tensor& mask = {}) {
  at::assert_no_internal_overlap(x);
  const at::Tensor target = dense(x);
  cpu::activation_forward(dtype_of(x), act, x.numel(), target.const_data_ptr(), target.mutable_data_ptr(),
                          mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr);
  if (!target.is_same(x)) x.copy_(target);
}

at::Tensor backward(Activation act, Saved kind, const at::Tensor& grad_y, const at::Tensor& saved_tensor) {
  const at::Tensor saved = dense(saved_tensor);
  const at::Tensor source = in_order(grad_y, saved.strides());
  const at::Tensor grad_x = on_huge_pages(at::empty_like(saved));
  cpu::activation_backward(dtype_of(saved), act, kind, saved.numel(), source.const_data_ptr(), saved.const_data_ptr(),
                           grad_x.mutable_data_ptr());
  return grad_x;
}

at::Tensor leaky_relu(const at::Tensor& x, double negative_slope) {
  if (!has_kernel(x)) return composite::leaky_relu(x, negative_slope);
  return forward({ActivationKind::kLeakyRelu, negative_slope}, x);
}

void leaky_relu_(at::Tensor x, double negative_slope) {
  if (!has_kernel(x)) return composite::leaky_relu_(x, negative_slope);
  forward_({ActivationKind::kLeakyRelu, negative_slope}, x);
}

void check_maskable(const at::Tensor& x) {
  TORCH_CHECK_NOT_IMPLEMENTED(has_kernel(x), "\"leaky_relu_with_mask\" not implemented for '", x.scalar_type(), "' on ", x.device());
}

std::tuple<at::Tensor, at::Tensor> leaky_relu_with_mask(const at::Tensor& x, double negative_slope) {
  check_maskable(x);
  at::Tensor mask = mask_like(x);
  return {forward({ActivationKind::kLeakyRelu, negative_slope}, x, mask), mask};
}

at::Tensor leaky_relu_with_mask_(at::Tensor x, double negative_slope) {
  check_maskable(x);
  at::Tensor mask = mask_like(x);
  forward_({ActivationKind::kLeakyRelu, negative_slope}, x, mask);
  return mask;
}

void check_mask(const at::Tensor& grad_y, const at::Tensor& mask, size_t strides) {
  check_maskable(grad_y);
  TORCH_CHECK(mask.scalar_type() == at::kByte && mask.device() == grad_y.device() && mask.dim() == 1 && mask.is_contiguous() &&
                  mask.sym_numel() == (grad_y.sym_numel() + 7) / 8,
              "leaky_relu_backward: the mask must be uint8 with one bit for each of ", grad_y.sym_numel(), " elements, got ",
              mask.scalar_type(), " of shape ", mask.sym_sizes());
  TORCH_CHECK(static_cast<int64_t>(strides) == grad_y.dim(), "leaky_relu_backward: ", strides, " strides for a tensor of ", grad_y.dim(),
              " dimensions");
}

at::Tensor leaky_relu_backward(const at::Tensor& grad_y, const at::Tensor& mask, c10::SymIntArrayRef stride, double negative_slope) {
  check_mask(grad_y, mask, stride.size());
  const at::Tensor source = in_order(grad_y, C10_AS_INTARRAYREF_SLOW(stride));
  TORCH_CHECK(source.is_non_overlapping_and_dense(), "leaky_relu_backward: strides ", stride, " leave gaps in a tensor of shape ",
              grad_y.sizes());
  const at::Tensor grad_x = on_huge_pages(at::empty_like(source));
  cpu::activation_backward(dtype_of(source), {ActivationKind::kLeakyRelu, negative_slope}, Saved::kMask, source.numel(),
                           source.const_data_ptr(), mask.const_data_ptr(), grad_x.mutable_data_ptr());
  return grad_x;
}

at::Tensor elu(const at::Tensor& x, double alpha) {
  if (!has_kernel(x)) return composite::elu(x, alpha);
  return forward({ActivationKind::kElu, alpha}, x);
}

void elu_(at::Tensor x, double alpha) {
  if (!has_kernel(x)) return composite::elu_(x, alpha);
  forward_({ActivationKind::kElu, alpha}, x);
}

at::Tensor elu_backward(const at::Tensor& grad_y, const at::Tensor& self_or_result, double alpha, bool is_result) {
  check_backward("elu_backward", grad_y, self_or_result);
  return backward({ActivationKind::kElu, alpha}, is_result ? Saved::kOutput : Saved::kInput, grad_y, self_or_result);
}

at::Tensor swish(const at::Tensor& x, double beta) {
  if (!has_kernel(x)) return composite::swish(x, beta);
  return forward({ActivationKind::kSwish, beta}, x);
}

at::Tensor swish_backward(const at::Tensor& grad_y, const at::Tensor& x, double beta) {
  check_backward("swish_backward", grad_y, x);
  return backward({ActivationKind::kSwish, beta}, Saved::kInput, grad_y, x);
}

// Shapes and strides alone, for tracing.
namespace meta {

at::Tensor like(const at::Tensor& x, double) { return at::empty_like(x); }
void in_place(at::Tensor, double) {}
std::tuple<at::Tensor, at::Tensor> with_mask(const at::Tensor& x, double) { return {at::empty_like(x), mask_like(x)}; }
at::Tensor with_mask_(at::Tensor x, double) { return mask_like(x); }
at::Tensor leaky_relu_backward(const at::Tensor& grad_y, const at::Tensor& mask, c10::SymIntArrayRef stride, double) {
  check_mask(grad_y, mask, stride.size());
  return at::empty_strided_symint(grad_y.sym_sizes(), stride, grad_y.options());
}
at::Tensor elu_backward(const at::Tensor& grad_y, const at::Tensor& self_or_result, double, bool) {
  check_backward("elu_backward", grad_y, self_or_result);
  return at::empty_like(self_or_result);
}
at::Tensor swish_backward(const at::Tensor& grad_y, const at::Tensor& x, double) {
  check_backward("swish_backward", grad_y, x);
  return at::empty_like(x);
}

}  // namespace meta
}  // namespace

TORCH_LIBRARY_IMPL(gradkernels, CPU, m) {
  m.impl("leaky_relu", leaky_relu);
  m.impl("leaky_relu_", leaky_relu_);
  m.impl("leaky_relu_with_mask", leaky_relu_with_mask);
  m.impl("leaky_relu_with_mask_", leaky_relu_with_mask_);
  m.impl("leaky_relu_backward", leaky_relu_backward);
  m.impl("elu", elu);
  m.impl("elu_", elu_);
  m.impl("elu_backward", elu_backward);
  m.impl("swish", swish);
  m.impl("swish_backward", swish_backward);
}

TORCH_LIBRARY_IMPL(gradkernels, Meta, m) {
  m.impl("leaky_relu", meta::like);
  m.impl("leaky_relu_", meta::in_place);
  m.impl("leaky_relu_with_mask", meta::with_mask);
  m.impl("leaky_relu_with_mask_", meta::with_mask_);
  m.impl("leaky_relu_backward", meta::leaky_relu_backward);
  m.impl("elu", meta::like);
  m.impl("elu_", meta::in_place);
  m.impl("elu_backward", meta::elu_backward);
  m.impl("swish", meta::like);
  m.impl("swish_backward", meta::swish_backward);
}

// Devices without kernels.
TORCH_LIBRARY_IMPL(gradkernels, CompositeExplicitAutograd, m) {
  m.impl("leaky_relu", composite::leaky_relu);
  m.impl("leaky_relu_", composite::leaky_relu_);
  m.impl("elu", composite::elu);
  m.impl("elu_", composite::elu_);
  m.impl("swish", composite::swish);
}

// vmap: ATen's operators have batching rules.
TORCH_LIBRARY_IMPL(gradkernels, FuncTorchBatched, m) {
  m.impl("leaky_relu", composite::leaky_relu);
  m.impl("leaky_relu_", composite::leaky_relu_);
  m.impl("elu", composite::elu);
  m.impl("elu_", composite::elu_);
  m.impl("swish", composite::swish);
}

}  // namespace gradkernels
