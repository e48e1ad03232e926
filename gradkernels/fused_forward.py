"""The forward that a converted block has instead of its own.

A fused forward holds only for what was read when it was made: before each call it compares the attributes that the block's own forward
read, the names of its submodules, the classes of those it calls differently and their hooks; where anything differs, the block's own
forward runs, on submodules that are what they were. So a hook added later, a replaced batch norm or a switched flag is always right.
"""

import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from gradkernels import _native, reference
from gradkernels.batch_norm_act import forward_of
from gradkernels.dataflow import Missing, Path

# Where the fused forward stands in a block's __dict__.
ATTRIBUTE = "_fused_forward"


def normalize(bn: _BatchNorm, x: Tensor, residual: Tensor | None, act: str, act_param: float, writes: bool = False) -> Tensor:
    """What stands in a fused forward for act(bn(x) + residual); with `writes` it is the sum that bn(x).add_(residual) gives."""
    if residual is not None and (
        not isinstance(residual, Tensor) or residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device
    ):
        # A sum that broadcasts or promotes; bn itself is without an activation and unhooked, else the forward would not hold.
        y = forward_of(bn, x, None, "identity", 0.0)
        return reference.ACTIVATIONS[act][1](y.add_(residual) if writes else y + residual, act_param)
    return forward_of(bn, x, residual, act, act_param)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module calls anything besides its class's forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


@dataclass(frozen=True)
class Expected:
    """A submodule that is called differently, or not at all: its classes, without hooks. attribute: one that has to be `value`."""

    path: Path
    kinds: tuple[type[nn.Module], ...]
    attribute: str | None
    value: object

    def holds(self, block: nn.Module) -> bool:
        module = child(block, self.path)
        if type(module) not in self.kinds or has_hooks(module):
            return False
        return self.attribute is None or getattr(module, self.attribute, Missing) == self.value


@dataclass(frozen=True)
class FusedForward:
    """source: of a function `forward`; names: the globals that it needs. residual: whether additions were to be fused.

    attributes, children, expected: what has to hold. Immutable, so that a block and its copies share it; a pickle has `residual` in its
    place (fused_block.py).
    """

    source: str
    names: Mapping[str, Any]
    attributes: tuple[tuple[Path, str, Any], ...]
    children: tuple[tuple[Path, tuple[tuple[str, bool], ...]], ...]
    expected: tuple[Expected, ...]
    residual: bool
    function: Callable[..., Any] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        namespace = dict(self.names)
        file = f"<fused forward {hash(self.source) & 0xFFFFFFFF:08x}>"
        # Tracebacks show its lines.
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(True), file)
        exec(compile(self.source, file, "exec"), namespace)
        object.__setattr__(self, "function", namespace["forward"])

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, (self.residual,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedForward":
        return self

    def holds(self, block: nn.Module) -> bool:
        if _has_any_global_hook() or torch.fx._symbolic_trace.is_fx_symbolic_tracing() or _native.is_for_onnx():
            return False
        for path, name, value in self.attributes:
            found = getattr(child(block, path), name, Missing)
            # A tensor that took the place of a number has an == of its own.
            if type(found) is not type(value) or found != value:
                return False
        for path, names in self.children:
            if children_of(child(block, path)) != names:
                return False
        return all(each.holds(block) for each in self.expected)


def child(block: nn.Module, path: Path) -> nn.Module:
    """The submodule at a path, empty for the block itself; a module without anything where it is no longer there."""
    module = block
    for name in path:
        module = module._modules.get(name) or _NOTHING
    return module


_NOTHING = nn.Module()


def children_of(module: nn.Module) -> tuple[tuple[str, bool], ...]:
    """The names of its submodules, parameters and buffers, and which are None: what a forward goes through and compares with None."""
    owned: tuple[dict[str, Any], ...] = (module._modules, module._parameters, module._buffers)
    return tuple((name, each is None) for own in owned for name, each in own.items())
