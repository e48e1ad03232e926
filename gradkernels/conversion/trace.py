"""Reads what a module's forward does with its submodules, as a torch.fx graph in which every submodule is a leaf.

A graph is a forward without its Python, so it stands for one only where nothing is lost: no branch over data or optional arguments,
nothing read outside (purity.py), no attribute written, no mode switched, and the same graph in training and in evaluation. Whatever else
a forward does is a reason to leave it alone. Reading changes nothing: what it did change is put back.
"""

import dataclasses
import inspect
import math
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, GetSetDescriptorType
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.proxy import Attribute
from torch.utils._python_dispatch import TorchDispatchMode

from gradkernels.conversion.attributes import HOOKED, Path, Reads, containers, in_mode, recorded
from gradkernels.conversion.bytecode import is_attribute_written_out, unpacked_count
from gradkernels.conversion.purity import Unreadable, is_torchs, own_classes, run_watched, writes_into_containers

# torch.fx patches nn.Module while it reads a forward, and attributes.py does too.
_ONE_AT_A_TIME = threading.Lock()
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


class _Recorded(Proxy):
    """A proxy that refuses what no node would stand for."""

    def __getattr__(self, name: str) -> Any:
        frame = sys._getframe(1)
        kind = inspect.getattr_static(torch.Tensor, name, None)
        if is_torchs(frame) or (kind is not None and not isinstance(kind, (GetSetDescriptorType, property))):
            return _ReadingAttribute(self, name)
        if kind is None and not is_attribute_written_out(frame):
            raise Unreadable(f"asks a value whether it has {name}, which tensors do not have")
        # Where it is read, and not where it is used: a method that writes may stand between.
        return self._asked(getattr, name)

    def __getitem__(self, key: Any) -> Proxy:
        return self._asked(operator.getitem, key)

    def __iter__(self) -> Iterator[Proxy]:
        count = unpacked_count(sys._getframe(1))
        if count is None:
            iterator: Iterator[Proxy] = self.tracer.iter(self)
            return iterator
        values = self.tracer.create_proxy("call_function", unpack, (self, count), {})
        return iter([self.tracer.create_proxy("call_function", operator.getitem, (values, place), {}) for place in range(count)])

    def _asked(self, function: Callable[..., Any], name: Any) -> Proxy:
        proxy: Proxy = self.tracer.create_proxy("call_function", function, (self, name), {})
        if not is_torchs(sys._getframe(2)):
            cast(_Tracer, self.tracer).asked.append(proxy.node)
        return proxy

    def __setattr__(self, name: str, value: object) -> None:
        if not is_torchs(sys._getframe(1)):
            raise Unreadable(f"writes the attribute {name} of a tensor")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise Unreadable(f"deletes the attribute {name} of a tensor")

    def __hash__(self) -> int:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.fx", "gradkernels")):
            raise Unreadable("uses a value as a key")
        return super().__hash__()

    def __repr__(self) -> str:
        if not is_torchs(sys._getframe(1)):
            cast(_Tracer, self.tracer).written.append(self.node)
        return super().__repr__()


def unpack(values: Any, count: int) -> tuple[Any, ...]:
    """What a graph has for `a, b = values`, which takes any iterable of that length."""
    taken = tuple(values)
    if len(taken) != count:
        raise ValueError(
            f"not enough values to unpack (expected {count}, got {len(taken)})"
            if len(taken) < count
            else f"too many values to unpack (expected {count})"
        )
    return taken


def _asked_for_its_class(proxy: Proxy) -> type[Proxy]:
    if not is_torchs(sys._getframe(1)):
        raise Unreadable("asks for the type of its input")
    return _ReadingProxy


# In-place operators are recorded as such, which Proxy does not; and a forward is noticed that asks whether it was given a tensor.
_RECORDED = {"__class__": property(_asked_for_its_class), **{f"__{name}__": _in_place(name) for name in IN_PLACE}}
_ReadingProxy: type[Proxy] = type("_ReadingProxy", (_Recorded,), _RECORDED)
_ReadingAttribute: type[Attribute] = type("_ReadingAttribute", (_Recorded, Attribute), _RECORDED)


def _modes() -> tuple[object, ...]:
    """What a with statement or a decorator may switch and a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._len_torch_function_stack(),
    )


class _NoTensors(TorchDispatchMode):
    """A forward that is read computes with proxies alone: a tensor of its own would be a constant, and may be a random one."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler at the first operation.
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Unreadable("makes a tensor")


class _Tracer(Tracer):
    # Buffers written in place are then nodes; as plain tensors they would be written while reading.
    proxy_buffer_attributes = True

    def __init__(self, called: set[int]) -> None:
        # This package's functions are nodes as torch's are; traced through, they would be the operators they are composed of.
        modules: Any = (math, sys.modules["gradkernels"])
        super().__init__(autowrap_modules=modules)
        self.modes = _modes()
        # What the forward asked for by name or number, and what it wrote as text.
        self.asked: list[Node] = []
        self.written: list[Node] = []
        # Lists and dicts that its modules keep, and modules called that may write attributes: by id().
        self.containers: set[int] = set()
        self.called = called
        self.thread = threading.get_ident()

    def traced(self, module: nn.Module) -> Graph:
        # By identity: a graph has a copy of each at each place where it is used.
        self.containers = {id(each) for part in module.modules() for value in part.__dict__.values() for each in containers(value)}
        no_tensors: Any = _NoTensors
        with no_tensors():
            graph = self.trace(module)
        # Of an assertion that holds nobody reads the text.
        texts = [each for node in graph.nodes if node.target is torch._assert for each in node.args if isinstance(each, str)]
        for node in self.written:
            if not any(f"Proxy({node.name})" in each for each in texts):
                raise Unreadable("writes a value as text")
        for node in self.asked:
            if not node.users and node not in self.written:
                raise Unreadable(f"asks for {node.args[1]} of a value, and no graph records what for")
        return graph

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # torch.fx patches nn.Module for every thread.
        return attr_val if threading.get_ident() != self.thread else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if any("__call__" in kind.__dict__ for kind in own_classes(type(m))):
            raise Unreadable(f"calls a {type(m).__name__}, whose class has a __call__ of its own")
        if any(map(own_classes, map(type, m.modules()))):
            self.called.update(map(id, m.modules()))
            given = [each for value in (*args, *kwargs.values()) for each in containers(value) if not isinstance(each, tuple)]
            if given and any(writes_into_containers(type(part)) for part in m.modules()):
                raise Unreadable(f"gives a {type(given[0]).__name__} to a {type(m).__name__}, which may write into it")
        if any(each._forward_hooks or each._forward_pre_hooks for each in m.modules()):
            self.called.add(HOOKED)
        return super().call_module(m, forward, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, (list, dict, set, tuple)) and not isinstance(a, torch.Size):
            if type(a) not in (list, dict, set, tuple) and not hasattr(a, "_fields"):
                raise Unreadable(f"makes a {type(a).__name__}, which a graph has as another class")
            if id(a) in self.containers and not isinstance(a, tuple):
                raise Unreadable(f"passes on a {type(a).__name__} that its module keeps")
        elif isinstance(a, (int, float, complex, str, bytes)) and type(a) not in (bool, int, float, complex, str, bytes):
            raise Unreadable(f"computes with a {type(a).__name__}, which a graph has as a number or text of Python")
        elif dataclasses.is_dataclass(type(a)) and (hasattr(a, "__post_init__") or not all(each.init for each in dataclasses.fields(a))):
            raise Unreadable(f"makes a {type(a).__name__}, which a graph would make again from its fields")
        return super().create_arg(a)

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
    return graph, {path for path, name in reads if path and name not in ("training", "__class__")}


def _problem_of_class(module: nn.Module) -> str | None:
    if isinstance(module, torch.fx.GraphModule):
        return "belongs to a torch.fx.GraphModule, whose class is its own"
    if "forward" in module.__dict__:
        return "is set on the instance"
    if not isinstance(inspect.getattr_static(type(module), "forward"), FunctionType):
        return "is no plain function"
    # What a decorator wraps is not what is called.
    for parameter in list(inspect.signature(type(module).forward, follow_wrapped=False).parameters.values())[1:]:
        if parameter.name == "self":
            return "has a second argument named self"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.default is not parameter.empty:
            return f"has an optional argument, {parameter.name}"
    return None


def _trace(module: nn.Module, training: bool) -> tuple[Graph, Reads]:
    """The graph in one mode, and the attributes of the module and its submodules that were read on the way."""
    reads: Reads = {}
    called: set[int] = set()

    def trace() -> Graph:
        with recorded(module, reads, called):
            return _Tracer(called).traced(module)

    with _ONE_AT_A_TIME, in_mode(module, training):
        graph = run_watched(trace)
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
