"""The rewritten forward of a converted block, and the conditions under which it may run.

A rewritten forward is right only while what the block's own forward read is unchanged. So each call first
compares attributes, the names of submodules, and the classes and hooks of the submodules that are called
differently. If anything differs, the block's own forward runs. A hook that is added later, a replaced batch
norm or a switched flag therefore always has its effect.
"""

import inspect
import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import _has_any_global_hook

from gradkernels import _native
from gradkernels.acts import ACTS
from gradkernels.batch_norm_act import _NormAct, forward_of
from gradkernels.conversion.attributes import Path, class_before, is_same, own_constant
from gradkernels.conversion.bytecode import MISSING
from gradkernels.conversion.trace import Given, optional_arguments, required_arguments
from gradkernels.frozen_batch_norm_act import FrozenBatchNormAct2d
from gradkernels.group_norm_act import GroupNormAct, InstanceNormAct2d

# The name in a block's __dict__ of its rewritten forward.
FORWARD = "_rewritten_forward"
# The name of each child, and what is compared of it.
Children = tuple[tuple[str, Any], ...]


def normalize(
    bn: nn.Module, x: Tensor, residual: Tensor | None, act: str, act_param: float, writes: bool = False, is_second: bool = False
) -> Tensor:
    """act(bn(x) + residual): the call in a rewritten forward that replaces a chain.

    Args:
        bn: a norm without hooks and without an activation of its own, which RewrittenForward.holds
            checks.
        x: the input of the norm.
        residual: None without an addition.
        act: a key of ACTS.
        act_param: the parameter of act.
        writes: the addition was bn(x).add_(residual), whose sum keeps the shape and the dtype of its first term.
        is_second: the addition was residual + bn(x), whose sum has the memory format of its first term.
    """
    is_summed_apart = residual is not None and (
        not isinstance(residual, Tensor)
        or residual.shape != x.shape
        or residual.dtype != x.dtype
        or residual.device != x.device
        or (is_second and residual.stride() != x.stride())
    )
    is_known = has_kernel(bn, x)
    if is_summed_apart or not is_known:
        # The kernel has no sum that broadcasts, promotes or changes the memory format.
        y = _apply(bn, x, None, "identity", 0.0) if is_known else type(bn).forward(bn, x)
        if residual is not None:
            first, second = (residual, y) if is_second else (y, residual)
            y = first.add_(second) if writes else first + second
        return ACTS[act].function(y, act_param)
    return _apply(bn, x, residual, act, act_param)


def has_kernel(bn: Any, x: Tensor) -> bool:
    """Whether the kernel computes what a norm does. A frozen batch norm of another library promotes and broadcasts."""
    if isinstance(bn, (_BatchNorm, nn.GroupNorm, _InstanceNorm, _NormAct)):
        return True
    return x.dim() == 4 and x.shape[1] == len(bn.weight) and all(each.dtype == x.dtype for each in bn.buffers())


def _apply(norm: nn.Module, x: Tensor, residual: Tensor | None, act: str, act_param: float) -> Tensor:
    y: Tensor = next(forward for kind, forward in _FORWARDS if isinstance(norm, kind))(norm, x, residual, act, act_param)
    return y


# What computes act(norm(x) + residual), also for torch's modules.
_FORWARDS: tuple[tuple[type[nn.Module], Any], ...] = (
    (_BatchNorm, forward_of),
    (nn.GroupNorm, GroupNormAct._forward),
    (_InstanceNorm, InstanceNormAct2d._forward),
    (nn.Module, FrozenBatchNormAct2d._forward),
)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs anything besides the forward of its class."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


@dataclass(frozen=True)
class Expected:
    """The condition on a submodule that a rewritten forward calls differently, or not at all.

    Attributes:
        path: where the submodule is.
        kinds: the classes that it may have. It must have no hooks.
        attribute: the name of an attribute whose value is compared, or None.
        value: the value that the attribute must have.
    """

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
class WrittenOut:
    """The condition on a submodule whose forward is part of the rewritten forward, which does not call it.

    Attributes:
        path: where the submodule is.
        kind: the class that it had before conversion.
        forward: the forward of this class at that time.
    """

    path: Path
    kind: type[nn.Module]
    forward: Callable[..., Any]

    def holds(self, block: nn.Module) -> bool:
        module = child(block, self.path)
        if class_before(module) is not self.kind or has_hooks(module) or module._compiled_call_impl is not None:
            return False
        return self.kind.forward is self.forward


@dataclass(frozen=True)
class RewrittenForward:
    """A forward and its conditions. It is immutable, so a block and its copies share it.

    A pickle holds only `residual` and `calls`. The forward is written again where the pickle is loaded (block.py).

    Attributes:
        source: the code of a function `forward`.
        names: the global names that the code needs.
        attributes: (path of a module, name, value) of each attribute that the block's own forward read.
        children: for the path of each module on the way to another, its children at that time.
        expected: the conditions on submodules that are called differently, or whose forward is written out.
        residual: whether additions were allowed to be fused.
        original: the block's own forward.
        asks_for_classes: the block's own forward calls isinstance or issubclass, so the classes of children
            count.
        shared: paths that led to one object at that time. The code uses the first of them.
        kinds: (place among the arguments, name, class) of each argument whose class the block's own forward
            asks for.
        given: the optional arguments that a call gives, and the last required one if it is None.
        otherwise: the rewritten forward for other calls; None if there is none.
    """

    source: str
    names: Mapping[str, Any]
    attributes: tuple[tuple[Path, str, Any], ...]
    children: tuple[tuple[Path, Children], ...]
    expected: tuple[Expected | WrittenOut, ...]
    residual: bool
    original: Callable[..., Any]
    asks_for_classes: bool
    shared: tuple[tuple[Path, ...], ...]
    kinds: tuple[tuple[int, str, type], ...] = ()
    given: Given = ()
    otherwise: "RewrittenForward | None" = None
    optional: Mapping[str, tuple[bool, Any]] = field(init=False, compare=False, repr=False)
    by_place: tuple[str, ...] = field(init=False, compare=False, repr=False)
    required: int = field(init=False, compare=False, repr=False)
    function: Callable[..., Any] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        namespace = dict(self.names)
        file = f"<forward rewritten by gradkernels.convert {hash(self.source) & 0xFFFFFFFF:08x}>"
        # A traceback shows lines of the code only from here.
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(True), file)
        exec(compile(self.source, file, "exec"), namespace)
        object.__setattr__(self, "function", namespace["forward"])
        given = dict(self.given)
        more = [name for name in required_arguments(self.original) if name in given]
        optional = {name: inspect.signature(self.original, follow_wrapped=False).parameters[name] for name in more}
        optional |= optional_arguments(self.original)
        object.__setattr__(self, "optional", {name: (name in given, given.get(name, each.default)) for name, each in optional.items()})
        computed = sum(value is Tensor for value in given.values())
        object.__setattr__(self, "required", namespace["forward"].__code__.co_argcount - 1 - computed)
        places = tuple(name for name, argument in optional.items() if argument.kind is argument.POSITIONAL_OR_KEYWORD)
        object.__setattr__(self, "by_place", places)

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, ((self.residual, tuple({repr(given): given for given in self.calls()}.values())),)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewrittenForward":
        return self

    def calls(self) -> tuple[Given, ...]:
        """The optional arguments that calls of the block give."""
        return (self.given, *(() if self.otherwise is None else self.otherwise.calls()))

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of the function; None if the graph is not that of a call with these arguments."""
        if self.optional:
            more = dict(zip(self.by_place, args[self.required :], strict=False))
            if len(args) > self.required + len(more) or not more.keys().isdisjoint(kwargs):
                return None
            more |= {name: value for name, value in kwargs.items() if name in self.optional}
            args, kwargs = args[: self.required], {name: value for name, value in kwargs.items() if name not in more}
            if len(args) + len(kwargs) != self.required:
                return None
            for name, (is_given, value) in self.optional.items():
                if value is Tensor and name in more:
                    kwargs[name] = more[name]
                elif not is_same(more[name], value) if name in more else is_given:
                    return None
        for place, name, kind in self.kinds:
            if type(args[place] if place < len(args) else kwargs.get(name)) is not kind:
                return None
        # A forward may compare an argument with None, which no graph records.
        return None if any(argument is None for argument in (*args, *kwargs.values())) else (args, kwargs)

    def holds(self, block: nn.Module) -> bool:
        """Whether the block meets every condition now, and nothing else needs the block's own forward."""
        if _has_any_global_hook() or torch.fx._symbolic_trace.is_fx_symbolic_tracing() or _native.is_for_onnx():
            return False
        for path, name, value in self.attributes:
            if not is_same(attribute(block, path, name), value):
                return False
        for path, children in self.children:
            if children_of(child(block, path), self.asks_for_classes) != children:
                return False
        for first, *others in self.shared:
            if any(owned(block, path) is not owned(block, first) for path in others):
                return False
        return all(condition.holds(block) for condition in self.expected)


def attribute(block: nn.Module, path: Path, name: str) -> Any:
    """An attribute of a submodule, or of its value if the name has a dot; MISSING if there is none."""
    module = child(block, path)
    name, _, of_value = name.partition(".")
    value: Any = class_before(module) if name == "__class__" else getattr(module, name, MISSING)
    if of_value:
        return own_constant(value, of_value)
    return value.__func__ if isinstance(value, MethodType) else value


def child(block: nn.Module, path: Path) -> nn.Module:
    """The submodule at a path, or the block for an empty path. If it is gone: a module without children."""
    module = block
    for name in path:
        # An attribute in __dict__ hides a submodule of that name.
        submodule = None if name in module.__dict__ else module._modules.get(name)
        module = _NOTHING if submodule is None else submodule
    return module


_NOTHING = nn.Module()


def owned(block: nn.Module, path: Path) -> Any:
    """The submodule, parameter or buffer at a path; None if there is none."""
    owners = _owners(child(block, path[:-1]))
    return next((owner[path[-1]] for owner in owners if path[-1] in owner), None)


def _owners(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._modules, module._parameters, module._buffers


def shared_in(block: nn.Module) -> tuple[tuple[Path, ...], ...]:
    """The paths of each submodule, parameter and buffer that has more than one."""
    paths: dict[int, list[Path]] = {}
    for named in (block.named_modules, block.named_parameters, block.named_buffers):
        for name, value in named(remove_duplicate=False):
            paths.setdefault(id(value), []).append(tuple(name.split(".")))
    return tuple(tuple(same) for same in paths.values() if len(same) > 1)


def children_of(module: nn.Module, with_classes: bool) -> Children:
    """The names of a module's submodules, parameters and buffers, and which of them are None.

    A forward may loop over them or compare them with None.

    Args:
        module: the module.
        with_classes: adds the classes of the submodules before conversion, for a forward that asks for them.
    """
    names = tuple((name, value is None) for owner in _owners(module) for name, value in owner.items())
    return names + tuple((name, class_before(value)) for name, value in module._modules.items() if with_classes)
