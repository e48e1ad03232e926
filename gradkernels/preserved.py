"""preserved: run or trace a model, and put everything back that this may have written.

Tensors are copied before the run and compared after it, so memory holds the model and the batch twice during
the run.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_leaves


@contextmanager
def preserved(model: nn.Module, *others: object) -> Iterator[None]:
    """Put back a model, the tensors in `others` and the random numbers, even after an error.

    Random numbers are those of torch, Python and numpy. Of the model, put back are parameters (an Embedding
    with max_norm writes its weight in forward) and their gradients, buffers, training flags and every other
    attribute of the modules. An object that an attribute refers to, such as a list, is not copied.
    """
    attributes = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    tensors = [*model.parameters(), *model.buffers(), *(leaf for leaf in tree_leaves(others) if isinstance(leaf, Tensor))]
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors if _has_values(tensor)]
    devices = {tensor.device for tensor in tensors if tensor.device.type in ("cuda", "xpu")}
    with ExitStack() as stack:
        # fork_rng always saves the CPU's generator. With "cuda" and no index it saves no other.
        for kind in {device.type for device in devices} or {"cuda"}:
            indices = sorted(device.index for device in devices if device.type == kind)
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        stack.callback(random.setstate, random.getstate())
        # Only a program that has imported numpy can have used its random numbers.
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        try:
            # A backward pass inside must not add to the gradients.
            for parameter, _ in grads:
                parameter.grad = None
            yield
        finally:
            for module, fields, buffers in attributes:
                module.__dict__.clear()
                module.__dict__.update(fields)
                module._buffers.clear()
                module._buffers.update(buffers)
            for parameter, grad in grads:
                parameter.grad = grad
            with torch.no_grad():
                for tensor, copy in copies:
                    # Copy only if the values differ: a write bumps the version counter.
                    if not _are_equal(tensor, copy):
                        tensor.copy_(copy)


def _has_values(tensor: Tensor) -> bool:
    shapeless = isinstance(tensor, UninitializedParameter | UninitializedBuffer)
    return not shapeless and not tensor.is_meta and tensor.layout == torch.strided


def _are_equal(x: Tensor, y: Tensor) -> bool:
    """torch.equal, except that nan equals nan."""
    return torch.equal(x, y) or bool(((x == y) | (x.isnan() & y.isnan())).all())
