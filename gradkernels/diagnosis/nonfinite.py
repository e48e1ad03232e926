"""Where nan and inf come from: the operator that produced them, or the tensor or number that brought them in.

Every operator of a step runs through NonfiniteTracker. In the end only the origin of what is not finite in
the loss and the gradients counts. Infinities that reach neither, such as the -inf of an attention mask, are
ignored.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# These operators write the numbers that the code gives them, or return memory with any content.
_CONSTANT = ("empty", "new_empty", "full", "new_full", "fill", "masked_fill", "where", "scalar_tensor", "lift_fresh", "detach")


class Origin(NamedTuple):
    """Where nan or inf came from.

    Attributes:
        phase: "forward", "loss" or "backward" if an operator produced it; "constant" if the code passed it to
            an operator; "batch", "parameter" or "buffer" if it was there before the step.
        operator: the name of the operator, the parameter or the buffer.
        where: the place in words, such as "in the loss".
        order: its position among the operators with a result that is not finite.
        tensors: with the phase "batch", Python for each tensor of the batch, such as "inputs[0]".
    """

    phase: str
    operator: str
    where: str = ""
    order: int = 0
    tensors: tuple[str, ...] = ()


class _Operands(NamedTuple):
    """What is not finite among the arguments of an operator.

    Attributes:
        origin: where it came from; None if that was not recorded.
        nonfinite: whether there is any.
        nan: whether it holds nan.
    """

    origin: Origin | None
    nonfinite: bool
    nan: bool


class NonfiniteTracker:
    """Runs operators and records the origin of every tensor that is not finite.

    Tensors are known by their storage, so views share an origin. The storage of a freed tensor may be used
    again, but whatever is not finite in it by then was written, and recorded, later.
    """

    def __init__(self) -> None:
        self._origins: dict[int, Origin] = {}
        self._order = 0

    def record_initial_nonfinite(self, model: nn.Module, inputs: Any, targets: Any) -> None:
        """Record what is not finite in the batch, the parameters and the buffers before the step."""
        for name, value in (*_leaves("inputs", inputs), *_leaves("targets", targets)):
            for tensor in nonfinite(value):
                # Inputs and targets may be views of one storage.
                known = self.origin_of([tensor])
                self._record([tensor], Origin("batch", "", tensors=(*(known.tensors if known else ()), name)))
        for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in named:
                self._record(nonfinite(tensor.detach()), Origin(kind, name))

    def run(self, func: Any, args: Any, kwargs: Any, phase: str, where: Callable[[], str]) -> Any:
        """Run an operator of torch's dispatcher, and record the origin of what is not finite in its result.

        Args:
            func: the operator.
            args: its positional arguments.
            kwargs: its keyword arguments.
            phase: "forward", "loss" or "backward".
            where: returns the place in words.

        Returns:
            The result of the operator.
        """
        # An argument that the operator writes has to be looked at before. Other arguments can wait until a
        # result is not finite, which is rare.
        written = [value for argument, value in zip(func._schema.arguments, args, strict=False) if is_written(argument)]
        operands = self._look_at((args, kwargs)) if func._schema.is_mutable else None
        result = func(*args, **kwargs)
        lost = nonfinite((result, written))
        if lost:
            is_empty = any(isinstance(value, Tensor) and not value.numel() for value in tree_leaves((args, kwargs)))
            remark = " of an empty tensor" if is_empty else ""
            self._follow(operator_name(func), remark, operands or self._look_at((args, kwargs)), lost, phase, where())
        return result

    def origin_of(self, values: Iterable[Tensor | float]) -> Origin | None:
        """The origin of values that are not finite: the first that is not a constant, else the first.

        If it is the batch, it names the tensors of all the values that come from the batch.
        """
        storages = [storage_of(value) for value in values if isinstance(value, Tensor)]
        origins = [self._origins[storage] for storage in storages if storage in self._origins]
        first = min(origins, key=lambda origin: (origin.phase == "constant", origin.order), default=None)
        if first is None or first.phase != "batch":
            return first
        return first._replace(tensors=tuple(dict.fromkeys(name for origin in origins for name in origin.tensors)))

    def _record(self, values: Iterable[Tensor | float], origin: Origin) -> None:
        self._origins |= {storage_of(value): origin for value in values if isinstance(value, Tensor)}

    def _look_at(self, values: Any) -> _Operands:
        lost = nonfinite(values)
        return _Operands(self.origin_of(lost), bool(lost), _holds_nan(lost))

    def _follow(self, name: str, remark: str, operands: _Operands, lost: list[Tensor | float], phase: str, where: str) -> None:
        self._order += 1
        produced = Origin(phase, _operator_or_node(name) + remark, where, self._order)
        origin = operands.origin
        if origin is None:
            # Numbers, and tensors whose making was not seen, are constants of the code.
            name = "tensor" if name == "lift_fresh" else name
            origin = Origin("constant", name, where, self._order) if operands.nonfinite or name.startswith(_CONSTANT) else produced
        if origin.phase == "constant" and operands.nonfinite and not operands.nan and _holds_nan(lost):
            # The operator turned inf into nan, as softmax does with a row that is all -inf.
            origin = produced
        self._record(lost, origin)


def _leaves(name: str, values: Any) -> Iterator[tuple[str, Any]]:
    """Python for each entry of dicts, lists and tuples inside each other, and the entry."""
    if isinstance(values, (Mapping, list, tuple)):
        for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from _leaves(f"{name}[{key!r}]", value)
    else:
        yield name, values


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's storage."""
    address: int = tensor.untyped_storage()._cdata
    return address


def is_written(argument: Any) -> bool:
    """Whether an operator writes this argument of its schema."""
    return argument.alias_info is not None and argument.alias_info.is_write


def operator_name(func: Any) -> str:
    """The name of an operator without aten:: and without the underscore of its in-place version."""
    name: str = func.overloadpacket.__name__
    return name.rstrip("_")


def _operator_or_node(name: str) -> str:
    """The operator; in the backward pass the autograd node, because its operators are plain products."""
    node = torch._C._current_autograd_node()
    return name if node is None else node.name().rstrip("0123456789").rpartition("::")[2]


def nonfinite(values: Any) -> list[Tensor | float]:
    """The tensors and numbers in values that hold nan or inf."""
    return [value for value in tree_leaves(values) if _is_nonfinite(value)]


def _is_nonfinite(value: object) -> bool:
    if not isinstance(value, Tensor):
        return isinstance(value, float) and not math.isfinite(value)
    # torch has no isfinite for 8-bit floats.
    has_nonfinite = value.is_complex() or (value.is_floating_point() and value.itemsize > 1)
    return has_nonfinite and value.layout == torch.strided and not bool(value.isfinite().all())


def _holds_nan(values: Iterable[Tensor | float]) -> bool:
    return any(bool(value.isnan().any()) if isinstance(value, Tensor) else math.isnan(value) for value in values)
