// Clipping is outside differentiation, as torch's, which runs it under no_grad: the operators fall through autograd and only count
// versions.
#include <torch/library.h>

#include "autograd/function.h"

namespace gradkernels::autograd {
namespace {

void clip_grads_with_norm_(at::TensorList grads, double max_norm, const at::Tensor& total_norm) {
  call_below_version_counting<ops::ClipGradsWithNormInplace>(grads, max_norm, total_norm);
  for (const at::Tensor& grad : grads) increment_version(grad);
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkernels, Autograd, m) {
  m.impl("get_total_norm", torch::CppFunction::makeFallthrough());
  m.impl("clip_grads_with_norm_", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(gradkernels, ADInplaceOrView, m) { m.impl("clip_grads_with_norm_", clip_grads_with_norm_); }

}  // namespace gradkernels::autograd
