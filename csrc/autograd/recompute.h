// What the graph holds for a tensor saved under gradkernels.recompute: the tensor itself or, of an output of batch_norm_act, the node that
// computes it again from what its own gradient keeps. The operator that saves it has an edge to that node already, so this makes no cycle,
// and backward comes to the node, and frees what it keeps, later.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/python_stub.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/saved_variable.h>

namespace gradkernels::autograd {

struct Packed {
  torch::autograd::SavedVariable kept;
  // Or null. torch holds nodes by std::shared_ptr up to 2.12.
  decltype(torch::autograd::Edge::function) node;
};

// The pair of hooks, as torch.autograd.graph.saved_tensors_hooks has them. What is kept is checked for changes in place,
// which torch leaves to hooks.
Packed pack(const at::Tensor& x);
at::Tensor unpack(const Packed& packed);

// The Python object by which torch calls `pack`: forward keeps what recomputing takes where this is the innermost of its default hooks.
void recompute_under(PyObject* pack_hook);

}  // namespace gradkernels::autograd
