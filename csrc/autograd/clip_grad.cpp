// Clipping and RMSprop are not differentiated; torch's run under no_grad. The operators fall through
// autograd, and only bump versions.
#include "autograd/function.h"
#include "common/library.h"

namespace gradkernels::autograd {
namespace {

void check_versions_count(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) check_version_counts(tensor);
}

void increment_versions(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) increment_version(tensor);
}

void clip_grads_with_norm_(at::TensorList grads, double max_norm, const at::Tensor& total_norm) {
  check_versions_count(grads);
  call_below_version_counting<ops::ClipGradsWithNormInplace>(grads, max_norm, total_norm);
  increment_versions(grads);
}

void clip_grad_value_(at::TensorList grads, double clip_value) {
  check_versions_count(grads);
  call_below_version_counting<ops::ClipGradValueInplace>(grads, clip_value);
  increment_versions(grads);
}

void adaptive_clip_grad_(at::TensorList params, at::TensorList grads, double clip_factor, double eps, double norm_type) {
  check_versions_count(grads);
  call_below_version_counting<ops::AdaptiveClipGradInplace>(params, grads, clip_factor, eps, norm_type);
  increment_versions(grads);
}

void rmsprop_(at::TensorList params, at::TensorList grads, at::TensorList square_avgs, at::TensorList grad_avgs,
              at::TensorList momentum_buffers, double lr, double alpha, double eps, double weight_decay, double momentum,
              double grad_coefficient) {
  const at::TensorList written[] = {params, square_avgs, grad_avgs, momentum_buffers};
  for (const at::TensorList& tensors : written) check_versions_count(tensors);
  call_below_version_counting<ops::RmspropInplace>(params, grads, square_avgs, grad_avgs, momentum_buffers, lr, alpha, eps, weight_decay,
                                                   momentum, grad_coefficient);
  for (const at::TensorList& tensors : written) increment_versions(tensors);
}

}  // namespace

GK_LIBRARY_IMPL(Autograd, m) {
  for (const char* name : {"grad_norms", "clip_grads_with_norm_", "clip_grad_value_", "adaptive_clip_grad_", "rmsprop_"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

GK_LIBRARY_IMPL(ADInplaceOrView, m) {
  m.impl("clip_grads_with_norm_", clip_grads_with_norm_);
  m.impl("clip_grad_value_", clip_grad_value_);
  m.impl("adaptive_clip_grad_", adaptive_clip_grad_);
  m.impl("rmsprop_", rmsprop_);
}

}  // namespace gradkernels::autograd
