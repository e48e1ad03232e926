// The schema of every operator: the contract between Python, autograd and the kernels. If torch has the
// operator, names and the order of arguments are torch's. An operator writes its arguments of type
// Tensor(a!).
#include "common/library.h"

GK_LIBRARY(m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // mask: uint8 [ceil(numel / 8)]; bit i % 8 of byte i / 8 is x > 0 for element i in storage order. stride:
  // the strides of the tensor that the mask was made from, because grad_y may have another storage order.
  m.def("leaky_relu(Tensor x, float negative_slope=0.01) -> Tensor", tags);
  m.def("leaky_relu_(Tensor(a!) x, float negative_slope=0.01) -> ()", tags);
  m.def("leaky_relu_with_mask(Tensor x, float negative_slope) -> (Tensor y, Tensor mask)", tags);
  m.def("leaky_relu_with_mask_(Tensor(a!) x, float negative_slope) -> Tensor mask", tags);
  m.def("leaky_relu_backward(Tensor grad_y, Tensor mask, SymInt[] stride, float negative_slope) -> Tensor grad_x", tags);

  m.def("elu(Tensor x, float alpha=1.0) -> Tensor", tags);
  m.def("elu_(Tensor(a!) x, float alpha=1.0) -> ()", tags);
  m.def("elu_backward(Tensor grad_y, Tensor self_or_result, float alpha, bool is_result) -> Tensor grad_x", tags);

  m.def("swish(Tensor x, float beta=1.0) -> Tensor", tags);
  m.def("swish_backward(Tensor grad_y, Tensor x, float beta) -> Tensor grad_x", tags);

  // weight, beta: one element, or x.size(1) elements. output_mask: the gradients to compute; the others are
  // empty.
  m.def("swish.Tensor(Tensor x, Tensor beta) -> Tensor", tags);
  m.def("swish_backward.Tensor(Tensor grad_y, Tensor x, Tensor beta, bool[2] output_mask) -> (Tensor grad_x, Tensor grad_beta)", tags);
  m.def("prelu(Tensor x, Tensor weight) -> Tensor", tags);
  m.def("prelu_backward(Tensor grad_y, Tensor x, Tensor weight, bool[2] output_mask) -> (Tensor grad_x, Tensor grad_weight)", tags);

  // Training only. seed: int64, one element; an element's slope depends on the seed and on its index in
  // storage order. mask, stride: as above.
  m.def("rrelu_with_mask(Tensor x, Tensor seed, float lower, float upper) -> (Tensor y, Tensor mask)", tags);
  m.def("rrelu_with_mask_(Tensor(a!) x, Tensor seed, float lower, float upper) -> Tensor mask", tags);
  m.def("rrelu_backward(Tensor grad_y, Tensor mask, SymInt[] stride, Tensor seed, float lower, float upper) -> Tensor grad_x", tags);

  // mean, invstd: float64 [C], the statistics that were applied. mask: uint8, empty unless act has two slopes
  // and there is a residual; a bit is 1 where the slope of act is 1, in an order that only the kernels know (mask_bytes
  // in ops/batch_norm_act.h is its size). num_batches_tracked: it is incremented in training, and momentum None then
  // means 1 / num_batches_tracked.
  m.def(
      "batch_norm_act(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, str act, float act_param) "
      "-> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)",
      tags);
  // output_mask: the gradients to compute; the others are empty.
  m.def(
      "batch_norm_act_backward(Tensor grad_y, Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor? mask, "
      "bool training, str act, float act_param, bool[4] output_mask) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
      tags);

  // The steps of batch_norm_act for a batch that is spread over several processes. They exchange moments and
  // sums between the steps. moments: float64 [1 + 2 C]: the number of elements of a channel, the mean of each
  // channel, and M2 = sum (x - mean)^2 of each channel. The moments of all processes are [ranks, 1 + 2 C].
  // The running statistics are updated with the statistics of all processes together, unless these have no
  // elements.
  m.def("batch_norm_act_stats(Tensor x) -> Tensor moments", tags);
  m.def(
      "batch_norm_act_gather_stats(Tensor moments, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
      "float? momentum, float eps) -> (Tensor mean, Tensor invstd, Tensor count)",
      tags);
  m.def(
      "batch_norm_act_elemt(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual, str act, "
      "float act_param) -> (Tensor y, Tensor mask)",
      tags);
  // sums: float64 [2 C]: sum dz and sum dz (x - mean) of each channel. dz is the gradient at the output of
  // the normalisation, and also the gradient of the residual.
  m.def(
      "batch_norm_act_backward_reduce(Tensor grad_y, Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, "
      "Tensor? residual, Tensor? mask, str act, float act_param, bool residual_g) -> (Tensor sums, Tensor grad_residual)",
      tags);
  // sums, count: the totals over all processes.
  m.def(
      "batch_norm_act_backward_elemt(Tensor grad_y, Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, "
      "Tensor? residual, Tensor? mask, str act, float act_param, Tensor sums, Tensor count) -> Tensor grad_x",
      tags);

  // mean, invstd: float64 [N num_groups], of the groups of each sample in turn. mask: as above.
  m.def(
      "group_norm_act(Tensor x, int num_groups, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str act, float act_param) "
      "-> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)",
      tags);
  m.def(
      "group_norm_act_backward(Tensor grad_y, Tensor x, Tensor mean, Tensor invstd, int num_groups, Tensor? weight, Tensor? bias, "
      "Tensor? residual, Tensor? mask, str act, float act_param, bool[4] output_mask) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
      tags);
  // The second half of group_norm_act, from its statistics.
  m.def(
      "group_norm_act_elemt(Tensor x, Tensor mean, Tensor invstd, int num_groups, Tensor? weight, Tensor? bias, Tensor? residual, "
      "str act, float act_param) -> (Tensor y, Tensor mask)",
      tags);

  // grads: at least one. norms, max_abs: float64, the norm and max |g| of each gradient. nonfinite: int64,
  // the number of elements that are nan or inf. total_norm: float64, the norm of all gradients as one vector.
  // norm_type: 1, 2 or inf.
  m.def("grad_norms(Tensor[] grads, float norm_type) -> (Tensor norms, Tensor max_abs, Tensor nonfinite, Tensor total_norm)", tags);
  m.def("clip_grads_with_norm_(Tensor(a!)[] grads, float max_norm, Tensor total_norm) -> ()", tags);
  m.def("clip_grad_value_(Tensor(a!)[] grads, float clip_value) -> ()", tags);
  // params: one for each gradient. norm_type: 1, 2 or inf.
  m.def("adaptive_clip_grad_(Tensor[] params, Tensor(a!)[] grads, float clip_factor, float eps, float norm_type) -> ()", tags);

  // One step. Each gradient is multiplied with grad_coefficient first, but not written. grad_avgs: empty
  // unless centered. momentum_buffers: empty without momentum.
  m.def(
      "rmsprop_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] grad_avgs, Tensor(d!)[] momentum_buffers, "
      "float lr, float alpha, float eps, float weight_decay, float momentum, float grad_coefficient) -> ()",
      tags);
}
