"""Reads what a module's forward does with its submodules, as a torch.fx graph in which every submodule is a leaf.

A graph is a forward without its Python, so it stands for one only where nothing is lost: no branch over data or optional arguments,
nothing read outside (outside.py), no state written, no gradient or autocast mode switched, and the same graph in training and in
evaluation. Whatever else a forward does is a reason to leave it alone. Reading changes nothing: mode and attributes are put back.
"""

import copy
import inspect
import math
import operator
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer

from gradkernels.outside import Unreadable, is_function_of_its_arguments, is_torchs, watched

Path = tuple[str, ...]

# Where a module has its path and the record of reads while it is read.
_READS = "_reads"


class Missing:
    """Stands for the value of an attribute that a forward asked for and that was not there."""


# What nn.Module keeps for itself; `training` is read by forwards, the rest is not theirs.
OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training"}
# What of it gives a forward tensors that are not proxies.
_ALL_TENSORS = frozenset(
    ("parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "_parameters", "_buffers", "__dict__")
)
_GUARDED = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    type,
)
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift", "irshift")


@dataclass(frozen=True)
class Reading:
    """graph: of forward, None where `problem` says why not. attributes: what it read, as (path of the module, name, value).

    by_mode: the graphs of training and evaluation of a forward that reads `training` and is readable but for that.
    """

    graph: Graph | None
    problem: str | None
    attributes: tuple[tuple[Path, str, Any], ...] = ()
    by_mode: tuple[Graph, Graph] | None = None


def _in_place(name: str) -> Callable[[Proxy, Any], Proxy]:
    function = getattr(operator, name)

    def method(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


def _asked_for_its_class(proxy: Proxy) -> type[Proxy]:
    if not is_torchs(sys._getframe(1)):
        raise Unreadable("asks for the type of its input")
    return _ReadingProxy


# A proxy that records in-place operators as such, which Proxy does not, and notices a forward that asks whether it was given a tensor.
_ReadingProxy = type(
    "_ReadingProxy", (Proxy,), {"__class__": property(_asked_for_its_class), **{f"__{name}__": _in_place(name) for name in IN_PLACE}}
)


def _modes() -> tuple[object, ...]:
    """What a with statement or a decorator may switch and a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._len_torch_function_stack(),
    )


class _Tracer(Tracer):
    # Buffers written in place are then nodes; as plain tensors they would be written while reading.
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        # This package's functions are nodes as torch's are; traced through, they would be the operators they are composed of.
        modules: Any = (math, sys.modules[__package__])
        super().__init__(autowrap_modules=modules)
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: Node) -> Proxy:
        proxy: Proxy = _ReadingProxy(node, self)
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if _modes() != self.modes:
            raise Unreadable("switches gradients, autocast or checkpointing on or off")
        return super().create_node(*args, **kwargs)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is to be read: it is nn.Sequential's, or neither torch's nor compiled."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    forward = type(module).forward
    # The forward that torch.fx makes is of no module.
    return forward is nn.Sequential.forward or not (getattr(forward, "__module__", None) or "").startswith("torch.")


def read(module: nn.Module) -> Reading:
    """The forward of one module as it stands now."""
    problem = _problem_of_class(module)
    if problem is not None:
        return Reading(None, problem)
    try:
        (training, reads), (evaluation, evaluation_reads) = (_trace(module, mode) for mode in (True, False))
    except Unreadable as reason:
        return Reading(None, str(reason))
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        return Reading(None, f"is no graph for torch.fx: {type(error).__name__}: {first_line}")
    attributes = evaluation_reads | reads
    modes = sorted(path for path, name in attributes if name == "training")
    if modes:
        return Reading(None, f"reads {'.'.join(('self', *modes[0]))}.training", by_mode=(training, evaluation))
    if str(training) != str(evaluation):
        return Reading(None, "does one thing in training and another in evaluation")
    return Reading(training, None, tuple((*place, value) for place, value in sorted(attributes.items())))


def read_evaluation(module: nn.Module) -> tuple[Graph, set[Path]] | None:
    """The graph of evaluation alone and the submodules that it reads attributes of; None where there is none.

    The module's attributes are taken to stay as they are.
    """
    if _problem_of_class(module) is not None:
        return None
    try:
        graph, reads = _trace(module, training=False)
    except Exception:
        return None
    return graph, {path for path, name in reads if path and name != "training"}


def _problem_of_class(module: nn.Module) -> str | None:
    if isinstance(module, torch.fx.GraphModule):
        return "belongs to a torch.fx.GraphModule, whose class is its own"
    if "forward" in module.__dict__:
        return "is set on the instance"
    for parameter in list(inspect.signature(type(module).forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.default is not parameter.empty:
            return f"has an optional argument, {parameter.name}"
    return None


def _is_guarded(value: Any) -> bool:
    """Whether == tells later if the value is still the same, in a copy of the module too. Functions may read state of their own."""
    if type(value) in (list, tuple, set, frozenset):
        return all(map(_is_guarded, value))
    if type(value) is dict:
        return all(map(_is_guarded, value)) and all(map(_is_guarded, value.values()))
    return isinstance(value, _GUARDED) or is_function_of_its_arguments(value)


def _trace(module: nn.Module, training: bool) -> tuple[Graph, dict[tuple[Path, str], Any]]:
    """The graph in one mode, and the attributes of the module and its submodules that were read on the way."""
    reads: dict[tuple[Path, str], Any] = {}
    with _undisturbed(module):
        for name, each in list(module.named_modules()):
            if not isinstance(each, torch.jit.ScriptModule):
                each.training = training
                each.__dict__[_READS] = tuple(name.split(".")) if name else (), reads
                each.__class__ = _recording(type(each))
        with watched():
            graph = _Tracer().trace(module)
    for node in graph.nodes:
        node.type = None
        if node.op == "get_attr" and not _resolves(module, str(node.target)):
            raise Unreadable("makes a tensor")
    return graph, reads


def _resolves(module: nn.Module, target: str) -> bool:
    try:
        operator.attrgetter(target)(module)
    except AttributeError:
        return False
    return True


_RECORDING: dict[Any, Any] = {}


def _recording(kind: Any) -> Any:
    """A subclass of a class for the time of reading, whose instances note which of their own attributes are asked for."""
    if kind in _RECORDING:
        return _RECORDING[kind]

    def __getattribute__(self: nn.Module, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        own = object.__getattribute__(self, "__dict__")
        if name in _ALL_TENSORS and not is_torchs(sys._getframe(1)):
            raise Unreadable(f"reads {_dotted(own[_READS][0], name)}, which gives tensors and no names")
        if (name in own or _is_of_class(kind, name)) and name not in OF_EVERY_MODULE and name != _READS:
            path, reads = own[_READS]
            _note(path, reads, name, value)
        return value

    def __getattr__(self: nn.Module, name: str) -> Any:
        path, reads = object.__getattribute__(self, "__dict__")[_READS]
        try:
            value = kind.__getattr__(self, name)
        except AttributeError:
            _note(path, reads, name, Missing)
            raise
        if value is None:
            _note(path, reads, name, value)
        return value

    body = {
        "__getattribute__": __getattribute__,
        "__getattr__": __getattr__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    _RECORDING[kind] = types.new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(body))
    return _RECORDING[kind]


def _is_of_class(kind: type[nn.Module], name: str) -> bool:
    """Whether a class has a plain value of that name, the default of what an instance may set later."""
    for each in kind.__mro__:
        if name in each.__dict__:
            value = each.__dict__[name]
            return not (hasattr(type(value), "__get__") or isinstance(value, type) or hasattr(nn.Module, name))
    return False


def _note(path: Path, reads: dict[tuple[Path, str], Any], name: str, value: Any) -> None:
    # A proxy is what the forward itself has written there.
    if (path, name) in reads or type(value) is _ReadingProxy:
        return
    if not _is_guarded(value):
        raise Unreadable(f"reads {_dotted(path, name)}, a {type(value).__name__}, which may change without notice")
    reads[path, name] = copy.deepcopy(value)


def _dotted(path: Path, name: str) -> str:
    return ".".join(("self", *path, name))


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Puts back modes, attributes and torch's generator; Unreadable where the forward wrote attributes or drew numbers."""
    before = [(each, type(each), dict(each.__dict__)) for each in module.modules() if not isinstance(each, torch.jit.ScriptModule)]
    contents = [
        (name, each, copy.copy(each)) for _, _, state in before for name, value in state.items() for each in containers(value, set())
    ]
    generator = torch.get_rng_state()
    written: list[str] = []
    try:
        yield
    finally:
        for name, container, content in contents:
            if _identities(container) != _identities(content):
                written.append(name)
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for each, kind, state in before:
            if type(each) is not kind:
                each.__class__ = kind
            now = {name: value for name, value in each.__dict__.items() if name not in ("training", _READS)}
            written += [name for name in {**now, **state} if name != "training" and now.get(name, Missing) is not state.get(name, Missing)]
            each.__dict__.clear()
            each.__dict__.update(state)
        drew = not torch.equal(torch.get_rng_state(), generator)
        torch.set_rng_state(generator)
    if written:
        raise Unreadable(f"writes self.{written[0]}")
    if drew:
        raise Unreadable("draws random numbers")


def containers(value: Any, seen: set[int]) -> Iterator[Any]:
    """A plain container and those in it."""
    if not isinstance(value, (list, dict, set, tuple)) or id(value) in seen:
        return
    seen.add(id(value))
    yield value
    for each in value.values() if isinstance(value, dict) else value:
        yield from containers(each, seen)


def _identities(container: Any) -> list[tuple[int, ...]]:
    """Contents by identity: == of what they hold may be elementwise, or a proxy."""
    return (
        [(id(key), id(value)) for key, value in container.items()] if isinstance(container, dict) else [(id(each),) for each in container]
    )
