// What the graph holds for a tensor that is saved under gradkernels.recompute: the tensor or, for an output
// of batch_norm_act, the inputs that compute it again. The output's node does not own these inputs: backward
// may free a node before the last consumer of the node's output, in a compiled graph or if there are two
// graphs.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/python_stub.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>

namespace gradkernels::autograd {

struct RecomputedOutput;

struct Packed {
  torch::autograd::SavedVariable kept;             // unless there is an output
  std::shared_ptr<const RecomputedOutput> output;  // or null
};

// The pair of hooks for torch.autograd.graph.saved_tensors_hooks. unpack raises torch's error if the tensor
// was changed in place, a check that torch leaves to hooks.
Packed pack(const at::Tensor& x);
at::Tensor unpack(const Packed& packed);

// Sets the Python object of `pack`. If it is the innermost of torch's default hooks, forward keeps the inputs
// that compute the output again.
void recompute_under(PyObject* pack_hook);

}  // namespace gradkernels::autograd
