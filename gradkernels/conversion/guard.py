"""The forward that a converted block has instead of its own.

A fused forward holds only for what was read when it was made: before each call it compares the attributes that the block's own forward
read, the names of its submodules, the classes of those it calls differently and their hooks; where anything differs, the block's own
forward runs, on submodules that are what they were. So a hook added later, a replaced batch norm or a switched flag is always right.
"""

import linecache
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from gradkernels import _native
from gradkernels.acts import ACTS
from gradkernels.batch_norm_act import forward_of
from gradkernels.conversion.attributes import Path
from gradkernels.conversion.bytecode import MISSING

# Where the fused forward stands in a block's __dict__, and where in that of its class the class stands that the block had.
ATTRIBUTE = "_fused_forward"
BASE = "_fused_from"
# Where the class that a batch norm or an activation had stands in its __dict__.
ORIGINAL = "_converted_from"


def normalize(
    bn: _BatchNorm, x: Tensor, residual: Tensor | None, act: str, act_param: float, writes: bool = False, is_second: bool = False
) -> Tensor:
    """What stands in a fused forward for act(bn(x) + residual); with `writes` it is the sum that bn(x).add_(residual) gives.

    is_second: bn(x) is the second term, and the sum has the memory format of the residual.
    """
    if residual is not None and (
        not isinstance(residual, Tensor)
        or residual.shape != x.shape
        or residual.dtype != x.dtype
        or residual.device != x.device
        or (is_second and residual.stride() != x.stride())
    ):
        # A sum that broadcasts or promotes; bn itself is without an activation and unhooked, else the forward would not hold.
        y = forward_of(bn, x, None, "identity", 0.0)
        total = y.add_(residual) if writes else residual + y if is_second else y + residual
        return ACTS[act].function(total, act_param)
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
        return self.attribute is None or getattr(module, self.attribute, MISSING) == self.value


@dataclass(frozen=True)
class RewrittenForward:
    """source: of a function `forward`; names: the globals that it needs. residual: whether additions were to be fused.

    of: the forward that was read. asks_for_classes: it may ask for the class of a submodule, with isinstance. shared: names of one object,
    which the source has by the first.

    attributes, children, expected: what has to hold. Immutable, so that a block and its copies share it; a pickle has `residual` in its
    place (block.py).
    """

    source: str
    names: Mapping[str, Any]
    attributes: tuple[tuple[Path, str, Any], ...]
    children: tuple[tuple[Path, tuple[tuple[str, Any], ...]], ...]
    expected: tuple[Expected, ...]
    residual: bool
    of: Callable[..., Any]
    asks_for_classes: bool
    shared: tuple[tuple[Path, ...], ...]
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

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewrittenForward":
        return self

    def holds(self, block: nn.Module) -> bool:
        if _has_any_global_hook() or torch.fx._symbolic_trace.is_fx_symbolic_tracing() or _native.is_for_onnx():
            return False
        for path, name, value in self.attributes:
            module = child(block, path)
            found = class_before(module) if name == "__class__" else getattr(module, name, MISSING)
            if isinstance(found, MethodType):
                found = found.__func__
            if not _is_same(found, value):
                return False
        for path, names in self.children:
            if children_of(child(block, path), self.asks_for_classes) != names:
                return False
        for first, *others in self.shared:
            if any(owned(block, path) is not owned(block, first) for path in others):
                return False
        return all(each.holds(block) for each in self.expected)


def _is_same(found: Any, value: Any) -> bool:
    """== that tells 2 from 2.0, 0.0 from -0.0 and one order of a dict from another."""
    # A tensor that took the place of a number has an == of its own.
    if type(found) is not type(value):
        return False
    if isinstance(value, dict):
        return len(found) == len(value) and all(map(_is_same, found.items(), value.items()))
    if isinstance(value, (list, tuple)):
        return len(found) == len(value) and all(map(_is_same, found, value))
    same: bool = found == value
    return same and (type(value) is not float or math.copysign(1.0, found) == math.copysign(1.0, value))


def child(block: nn.Module, path: Path) -> nn.Module:
    """The submodule at a path, empty for the block itself; a module without anything where it is no longer there."""
    module = block
    for name in path:
        found = None if name in module.__dict__ else module._modules.get(name)
        module = _NOTHING if found is None else found
    return module


_NOTHING = nn.Module()


def owned(block: nn.Module, path: Path) -> Any:
    """The submodule, parameter or buffer at a path; None where there is none."""
    owners = _owners(child(block, path[:-1]))
    return next((own[path[-1]] for own in owners if path[-1] in own), None)


def _owners(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._modules, module._parameters, module._buffers


def shared_in(block: nn.Module) -> tuple[tuple[Path, ...], ...]:
    """The names of each submodule, parameter and buffer that has more than one."""
    names: dict[int, list[Path]] = {}
    for owned_by in (block.named_modules, block.named_parameters, block.named_buffers):
        for name, each in owned_by(remove_duplicate=False):
            names.setdefault(id(each), []).append(tuple(name.split(".")))
    return tuple(tuple(paths) for paths in names.values() if len(paths) > 1)


def children_of(module: nn.Module, with_classes: bool) -> tuple[tuple[str, Any], ...]:
    """The names of its submodules, parameters and buffers, and which are None: what a forward goes through and compares with None.

    with_classes: and of which classes the submodules are, before conversion, where a forward asks for that.
    """
    names = tuple((name, each is None) for own in _owners(module) for name, each in own.items())
    return names + tuple((name, class_before(each)) for name, each in module._modules.items() if with_classes)


def base_class(kind: type) -> type[nn.Module] | None:
    """The class of a block before it was converted, None where it was not."""
    base: type[nn.Module] | None = kind.__dict__.get(BASE)
    return base


def class_before(module: nn.Module | None) -> type:
    """The class that a module had before conversion."""
    kind: type = type(module)
    own = {} if module is None else module.__dict__
    return base_class(kind) or own.get(ORIGINAL) or kind
