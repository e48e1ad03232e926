"""untouched: run a model, or trace it, and leave no trace in it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@contextmanager
def untouched(model: nn.Module, *others: object) -> Iterator[None]:
    """Puts buffers, training flags, every other attribute of the modules and torch's random numbers back, whatever happens inside.

    Parameters are left alone: a forward pass does not write them. What an attribute refers to, such as a list, is not copied. others: what
    else holds tensors, for the devices whose random numbers are meant.
    """
    attributes = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    copies = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    tensors = [*model.parameters(), *(buffer for buffer, _ in copies)]
    tensors += [leaf for leaf in tree_leaves(others) if isinstance(leaf, Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.device.type in ("cuda", "xpu")}
    with ExitStack() as stack:
        # Without a device it is the CPU's alone.
        for kind in {device.type for device in devices} or {"cuda"}:
            indices = sorted(device.index for device in devices if device.type == kind)
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        try:
            yield
        finally:
            for module, fields, buffers in attributes:
                module.__dict__.clear()
                module.__dict__.update(fields)
                module._buffers.clear()
                module._buffers.update(buffers)
            with torch.no_grad():
                for buffer, copy in copies:
                    # Not written in vain: that would count as a change.
                    if not torch.equal(buffer, copy):
                        buffer.copy_(copy)
