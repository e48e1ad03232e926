"""What convert(check=batch) compares: outputs, gradients and bytes kept for backward."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradkernels.preserved import preserved


@dataclass(frozen=True)
class Difference:
    """The largest difference between two calls.

    Attributes:
        difference: the largest absolute difference of two elements.
        magnitude: the largest absolute value of the first call.
        name: the output or the parameter with the largest difference; "" if there was nothing to compare.
    """

    difference: float
    magnitude: float
    name: str

    def __str__(self) -> str:
        if not self.name:
            return "none, there is nothing to compare"
        return f"{self.difference:.2g} where the largest value is {self.magnitude:.2g} ({self.name})"


class Observation:
    """One call of a model, forward and backward, which leaves the model as it was.

    Attributes:
        saved_bytes: the bytes that the call kept for backward, without parameters and buffers.
        output_type: the name of the output's class.
        outputs: the tensors in the output, by "output 0", "output 1" and so on.
        grads: the gradients of the parameters, by name.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        keywords = dict(batch) if isinstance(batch, Mapping) else {}
        arguments = () if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        of_model = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        # The storages are held until they are counted: a freed address may be used again.
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(x: Tensor) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with preserved(model, batch), torch.enable_grad():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                output = model(*arguments, **keywords)
            self.saved_bytes = sum(storage.nbytes() for address, storage in saved.items() if address not in of_model)
            saved.clear()
            self.output_type = type(output).__name__
            tensors = {f"output {place}": tensor for place, tensor in enumerate(_tensors_of(output))}
            self.outputs = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            roots = [tensor for tensor in tensors.values() if tensor.requires_grad]
            # Random weights: the gradient of a plain sum is zero below a batch norm.
            generator = torch.Generator("cpu").manual_seed(0)
            weights = [torch.randn(root.shape, generator=generator, device="cpu").to(root) for root in roots]
            grads = torch.autograd.grad(roots, list(parameters.values()), weights, allow_unused=True) if roots and parameters else ()
            self.grads = {name: grad for name, grad in zip(parameters, grads, strict=False) if grad is not None}


def _tensors_of(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors_of(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _tensors_of(getattr(output, field.name))
    else:
        for leaf in pytree.tree_leaves(output):
            if leaf is not output:
                yield from _tensors_of(leaf)


def largest_difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Difference:
    """The largest difference of all tensors, and the largest value of all of them in `before`.

    There is one magnitude for all tensors. A tensor that is zero but for rounding, such as the gradient of a
    bias below a batch norm, has no scale of its own.
    """
    tensors = {**before, **after}
    floating = [name for name, x in tensors.items() if x.numel() and (x.is_floating_point() or x.is_complex())]
    magnitude = max((before[name].abs().max().item() for name in floating if name in before), default=0.0)
    distances = [(_distance(before.get(name), after.get(name)), name) for name in floating]
    # nan counts as the largest, although it compares as neither larger nor smaller.
    difference, name = max(distances, key=lambda pair: (math.isnan(pair[0]), pair[0]), default=(0.0, ""))
    return Difference(difference, magnitude, name)


def _distance(before: Tensor | None, after: Tensor | None) -> float:
    """The largest difference of two tensors. A missing one counts as zeros. Two shapes differ infinitely."""
    if before is None or after is None:
        return sum(x.abs().max().item() for x in (before, after) if x is not None)
    return (after - before).abs().max().item() if before.shape == after.shape else math.inf
