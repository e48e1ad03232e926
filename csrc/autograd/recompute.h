// What the graph holds for a tensor saved under gradkernels.recompute: the tensor itself or, of an output of batch_norm_act, what computing
// it again takes. That is held beside the output's node and not by it: backward frees a node before the last consumer of its output where
// the graph is compiled, or where there are two graphs.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/python_stub.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>

namespace gradkernels::autograd {

struct RecomputedOutput;

struct Packed {
  torch::autograd::SavedVariable kept;
  // Or null.
  std::shared_ptr<const RecomputedOutput> output;
};

// The pair of hooks, as torch.autograd.graph.saved_tensors_hooks has them. What is kept is checked for changes in place,
// which torch leaves to hooks.
Packed pack(const at::Tensor& x);
at::Tensor unpack(const Packed& packed);

// The Python object by which torch calls `pack`: forward keeps what recomputing takes where this is the innermost of its default hooks.
void recompute_under(PyObject* pack_hook);

}  // namespace gradkernels::autograd
