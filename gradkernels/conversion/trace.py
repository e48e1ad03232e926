"""Reads the forward of one module as a torch.fx graph, in which every submodule is a leaf.

A graph has the calls of a forward, but not its Python code. So it stands for the forward only if nothing is
lost: the forward does not branch on data, reads nothing from elsewhere (purity.py), writes no attribute
(attributes.py), switches no mode, and has the same graph in training and in evaluation. Anything else is a
reason to leave it alone. The graph is that of a call with certain optional arguments, and with arguments of one
class if the forward asks for it. Reading leaves the module as it was.
"""

import dataclasses
import functools
import inspect
import math
import operator
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FunctionType, GetSetDescriptorType
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.proxy import Attribute
from torch.utils._python_dispatch import TorchDispatchMode

from gradkernels.conversion.attributes import (
    HOOKED,
    NOT_COMPARABLE,
    Path,
    Reads,
    class_before,
    containers,
    held,
    in_mode,
    is_same,
    recorded,
)
from gradkernels.conversion.bytecode import is_attribute_written_out, unpacked_count
from gradkernels.conversion.purity import (
    ASKED,
    Unreadable,
    Watched,
    is_constant,
    is_pythons,
    is_torchs,
    of_tensors,
    own_classes,
    run_watched,
    writes_into_containers,
)

# The optional arguments that a call gives, in the order of their names -> their constant, or torch.Tensor for a
# value that is computed. One that equals its default counts as left out. The last required one, too, if it is None.
Given = tuple[tuple[str, Any], ...]
# Functions of the user's that are one call in a graph -> why they could not be read; None if torch.fx could not trace them.
Leaves = dict[FunctionType, Unreadable | None]
# torch.fx patches nn.Module while it reads a forward, and attributes.py does too.
_ONE_AT_A_TIME = threading.Lock()
_OF_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# What returns a tuple of tensors.
_OF_TENSORS = (torch.split, torch.chunk, torch.unbind, torch.tensor_split, "split", "chunk", "unbind", "tensor_split")
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift", "irshift")


@dataclass(frozen=True)
class Reading:
    """What reading a forward gives.

    Attributes:
        graph: the graph of the forward; None if there is a problem.
        problem: why no graph stands for the forward, as a verb that follows "the forward of X".
        attributes: (path of the module, name, value) of each attribute that the forward read.
        kinds: (place among the arguments, name, class) of each argument whose class the forward asks for.
            The graph is that of a call with these classes.
        given: the optional arguments that are given, and the last required one if it is None.
        asks_for_class: whether the forward asks for the class of an argument.
        is_partial: whether other arguments lead to another graph: optional ones, ones of another class, or
            None. Or the mode does.
        by_mode: what was read in training and in evaluation, if the only problem is that the forward reads
            `training`. Each depends on the mode of the modules whose mode was read.
    """

    graph: Graph | None
    problem: str | None
    attributes: tuple[tuple[Path, str, Any], ...] = ()
    kinds: tuple[tuple[int, str, type], ...] = ()
    given: Given = ()
    asks_for_class: bool = False
    is_partial: bool = False
    by_mode: "tuple[Reading, Reading] | None" = None


def _in_place(name: str) -> Callable[[Proxy, Any], Proxy]:
    function = getattr(operator, name)

    def method(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


class _Recorded(Proxy):
    """A proxy that raises Unreadable for uses of a value that no node stands for."""

    def __getattr__(self, name: str) -> Any:
        frame = sys._getframe(1)
        kind = inspect.getattr_static(torch.Tensor, name, None)
        if is_torchs(frame) or (kind is not None and not isinstance(kind, (GetSetDescriptorType, property))):
            return _ReadingAttribute(self, name)
        if kind is None and not is_attribute_written_out(frame):
            raise Unreadable(f"checks whether a value has {name}, which tensors do not have")
        # The node stands where the attribute is read: before its use, a method may write the value.
        return self._read(getattr, name)

    def __getitem__(self, key: Any) -> Proxy:
        return self._read(operator.getitem, key)

    def __iter__(self) -> Iterator[Proxy]:
        count = unpacked_count(sys._getframe(1))
        if count is None:
            iterator: Iterator[Proxy] = self.tracer.iter(self)
            return iterator
        values = self.tracer.create_proxy("call_function", unpack, (self, count), {})
        return iter([self.tracer.create_proxy("call_function", operator.getitem, (values, place), {}) for place in range(count)])

    def _read(self, function: Callable[..., Any], name: Any) -> Proxy:
        proxy: Proxy = self.tracer.create_proxy("call_function", function, (self, name), {})
        if not is_torchs(sys._getframe(2)):
            cast(_Tracer, self.tracer).read_values.append(proxy.node)
        return proxy

    def __setattr__(self, name: str, value: object) -> None:
        if not is_torchs(sys._getframe(1)):
            raise Unreadable(f"writes the attribute {name} of a tensor")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise Unreadable(f"deletes the attribute {name} of a tensor")

    def __setitem__(self, key: Any, value: object) -> None:
        raise Unreadable("writes an item of a value")

    def __hash__(self) -> int:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.fx", "gradkernels")):
            raise Unreadable("uses a value as a key")
        return super().__hash__()

    def __repr__(self) -> str:
        if not is_torchs(sys._getframe(1)):
            cast(_Tracer, self.tracer).printed.append(self.node)
        return super().__repr__()


def unpack(values: Any, count: int) -> tuple[Any, ...]:
    """`a, b = values` in a graph: the values of any iterable of that length, or Python's error."""
    unpacked = tuple(values)
    if len(unpacked) < count:
        raise ValueError(f"not enough values to unpack (expected {count}, got {len(unpacked)})")
    if len(unpacked) > count:
        raise ValueError(f"too many values to unpack (expected {count})")
    return unpacked


def _class_of(proxy: Proxy) -> type:
    frame = sys._getframe(1)
    tracer = cast(_Tracer, proxy.tracer)
    if is_torchs(frame) or (tracer.in_c and tracer.in_c[-1] in of_tensors()):
        # torch takes what has its class for a tensor.
        return _ReadingProxy
    if proxy.node.op != "placeholder":
        raise Unreadable("checks the type of a value that it computes")
    if is_pythons(frame):
        # An abstract class asks for the class of the proxy too.
        raise Unreadable("checks the type of its input with an abstract class")
    tracer.asked.add(str(proxy.node.target))
    proxy.node.meta[ASKED] = True
    return tracer.kind


# Proxy records `a += b` as `a + b`, and answers isinstance with its own class.
_RECORDED = {"__class__": property(_class_of), **{f"__{name}__": _in_place(name) for name in IN_PLACE}}
_ReadingProxy: type[Proxy] = type("_ReadingProxy", (_Recorded,), _RECORDED)
_ReadingAttribute: type[Attribute] = type("_ReadingAttribute", (_Recorded, Attribute), _RECORDED)


def _modes() -> tuple[object, ...]:
    """The modes that a with statement or a decorator may switch. No graph records them."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._len_torch_function_stack(),
    )


class _NoTensors(TorchDispatchMode):
    """Refuses every operation on tensors. A forward that is read has proxies; other tensors may be random."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler at the first operation.
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Unreadable("makes a tensor")


class _Tracer(Tracer):
    # Buffers are nodes then. As plain tensors they would be written in place during reading.
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, called: set[int], kind: type, given: Given, asked: set[str], leaves: Leaves) -> None:
        # The functions of this package are nodes, like torch's. Else torch.fx would trace into them.
        modules: Any = (math, sys.modules["gradkernels"])
        super().__init__(autowrap_modules=modules, autowrap_functions=tuple(leaves))
        self.paths = {id(part): name for name, part in root.named_modules() if name}
        # Values that the forward read by an attribute or an index, and values that it turned into text.
        self.read_values: list[Node] = []
        self.printed: list[Node] = []
        # The lists and dicts that are attributes of the modules. By id(): a graph has a copy of a list at each
        # place where it is used.
        values = [value for part in root.modules() for value in part.__dict__.values()]
        self.containers = {id(container) for value in values for container in containers(value)}
        self.called = called
        # The class of an argument whose class the forward asks for.
        self.kind = kind
        self.given = given
        # The names of these arguments.
        self.asked = asked
        self.leaves = leaves
        # Layers that get no list, so that the forward of the module that has them writes into none.
        self.relied: list[nn.Module] = []

    def traced(self, module: nn.Module, watched: Watched) -> Graph:
        self.watch, self.in_c = watched.begin, watched.in_c
        # Those of the thread that reads.
        self.modes, self.thread = _modes(), threading.get_ident()
        no_tensors: Any = _NoTensors
        with no_tensors():
            graph = self.trace(module)
        # The text of an assertion does not matter while the assertion holds.
        asserts = [node for node in graph.nodes if node.target is torch._assert]
        texts = [text for node in asserts for text in node.args if isinstance(text, str)]
        for node in self.printed:
            if not any(f"Proxy({node.name})" in text for text in texts):
                raise Unreadable("turns a value into text")
        for node in self.read_values:
            # Python alone can do nothing with a tensor but what is watched: `is`, and turning it into text or a key.
            is_tensor = node.target is operator.getitem and isinstance(node.args[1], int) and node.all_input_nodes[0].target in _OF_TENSORS
            if not node.users and node not in self.printed and not is_tensor:
                raise Unreadable(f"reads {node.args[1]} of a value for a use that no graph records")
        return graph

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # torch.fx patches nn.Module for every thread.
        return attr_val if threading.get_ident() != self.thread else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if _has_own_call(m):
            raise Unreadable(f"calls a {type(m).__name__}, whose class has its own __call__")
        parts = _parts(m)
        if any(map(own_classes, map(type, parts))):
            self.called.update(map(id, parts))
            values = [value for part in parts for attribute in vars(part).values() for value in held(attribute)]
            functions = [value for value in values if isinstance(value, FunctionType)]
            self.relied += _check_passed(f"a {type(m).__name__}", [*map(type, parts), *functions], args, kwargs, parts)
        if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
            self.called.add(HOOKED)
        return super().call_module(m, forward, args, kwargs)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any) -> Proxy:
        if target in self.leaves:
            problem = self.leaves[target]
            if problem is not None and any(isinstance(part, nn.Module) for value in (*args, *kwargs.values()) for part in held(value)):
                # It may switch the module, or hook it.
                raise problem
            _check_passed(target.__name__, (target,), args, kwargs)
        return super().create_proxy(kind, target, args, kwargs, *more, **options)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, (list, dict, set, tuple)) and not isinstance(a, torch.Size):
            if type(a) not in (list, dict, set, tuple) and not hasattr(a, "_fields"):
                raise Unreadable(f"makes a {type(a).__name__}, which would have another class in a graph")
            if id(a) in self.containers and not isinstance(a, tuple):
                raise Unreadable(f"passes on a {type(a).__name__} that is an attribute of its module")
        elif isinstance(a, (int, float, complex, str, bytes)) and type(a) not in (bool, int, float, complex, str, bytes):
            raise Unreadable(f"computes with a {type(a).__name__}, which would be a plain number or text in a graph")
        elif id(a) in self.paths:
            # The function that gets it may write its attributes.
            self.called.update(map(id, _parts(a)))
            return self.create_node("get_attr", self.paths[id(a)], (), {})
        elif dataclasses.is_dataclass(type(a)) and (hasattr(a, "__post_init__") or not all(field.init for field in dataclasses.fields(a))):
            raise Unreadable(f"makes a {type(a).__name__}, which a graph would make from its fields alone")
        return super().create_arg(a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        by_name = {}
        if self.given or optional_arguments(root_fn):
            # Python gives the arguments that are left out their defaults.
            names = [name for name in required_arguments(root_fn) if name not in dict(self.given)]
            arguments = [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]
            for name, value in self.given:
                by_name[name] = self.create_proxy("placeholder", name, (), {}) if value is torch.Tensor else value
        else:
            root_fn, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)

        def forward(*arguments: Any) -> Any:
            # What torch.fx does before is no part of the forward.
            self.watch()
            return root_fn(*arguments, **by_name)

        return forward, arguments

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: Node) -> Proxy:
        proxy: Proxy = _ReadingProxy(node, self)
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if _modes() != self.modes:
            raise Unreadable("switches gradients, autocast or checkpointing on or off")
        return super().create_node(*args, **kwargs)


def _check_passed(
    name: str, called: Iterable[type | FunctionType], args: Iterable[Any], kwargs: Mapping[str, Any], parts: Iterable[nn.Module] = ()
) -> list[nn.Module]:
    """Raises Unreadable if a call may write into a list or a dict that it gets: a graph has a copy of it.

    Args:
        name: what is called, for the error.
        called: the functions and the classes of modules that the call runs.
        args: its arguments.
        kwargs: the others.
        parts: the modules of these classes.

    Returns:
        The layers whose classes decide that nothing is written.
    """
    arguments = [container for value in (*args, *kwargs.values()) for container in containers(value)]
    passed = [container for container in arguments if not isinstance(container, tuple)]
    relied: list[nn.Module] = []
    for each in dict.fromkeys(called) if passed else ():
        if writes_into_containers(each):
            own = [part for part in parts if type(part) is each]
            layers = _layers(own)
            if writes_into_containers(each, layers):
                raise Unreadable(f"passes a {type(passed[0]).__name__} to {name}, which may write into it")
            relied += [object.__getattribute__(part, "__dict__")["_modules"][layer] for part in own for layer in layers]
    return relied


def _layers(modules: Iterable[nn.Module]) -> set[str]:
    """The names under which all of these modules have layers of torch for which a list is an error."""
    names: set[str] | None = None
    for module in modules:
        attributes = object.__getattribute__(module, "__dict__")
        hidden = (*attributes, *dir(type(module)))
        own = {name for name, part in attributes["_modules"].items() if _refuses_lists(part) and name not in hidden}
        names = own if names is None else names & own
    return names or set()


def _refuses_lists(module: nn.Module | None) -> bool:
    # A hook before it may change its input, not its result.
    is_layer = type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, (nn.Identity, nn.Sequential))
    return isinstance(module, nn.Module) and is_layer and not module._forward_hooks and "forward" not in module.__dict__


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module has a forward to read: nn.Sequential's, or one neither torch's nor compiled."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    forward = type(module).forward
    # A forward that torch.fx has made has no __module__.
    return forward is nn.Sequential.forward or not (getattr(forward, "__module__", None) or "").startswith("torch.")


@functools.lru_cache(maxsize=1024)
def optional_arguments(forward: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments of a forward that a call may leave out, `*` and `**` included."""
    arguments = _arguments(forward).items()
    return {name: each for name, each in arguments if each.default is not each.empty or each.kind in _OF_ANY_NUMBER}


def required_arguments(forward: Callable[..., Any]) -> list[str]:
    """The names of the other arguments."""
    return [name for name in _arguments(forward) if name not in optional_arguments(forward)]


def _arguments(forward: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments of a forward without the module."""
    # The arguments of the decorator count, not those of the function that it wraps.
    return dict(list(inspect.signature(forward, follow_wrapped=False).parameters.items())[1:])


def without_the_last(module: nn.Module, reading: Reading) -> Given | None:
    """The call with None for the last required argument, if the forward may ask for that or does not read it; None if not."""
    names = required_arguments(type(module).forward)
    if len(names) < 2 or names[-1] in dict(reading.given):
        return None
    graphs = [each.graph for each in reading.by_mode or (reading,) if each.graph is not None]
    takes = {str(node.target) for graph in graphs for node in graph.find_nodes(op="placeholder") if ASKED in node.meta or not node.users}
    return tuple(sorted((*reading.given, (names[-1], None)))) if names[-1] in takes else None


def _sequential(module: nn.Module) -> Graph | None:
    """The graph of a plain nn.Sequential; None for any other module."""
    kind = type(module)
    own = [name for base in own_classes(kind) for name in vars(base)]
    is_plain = kind.forward is nn.Sequential.forward and not {"__iter__", "__getattr__", "__getattribute__", "_modules"}.intersection(own)
    children = module._modules.values()
    if not is_plain or any(child is None or _has_own_call(child) or isinstance(child, torch.jit.ScriptModule) for child in children):
        return None
    graph = Graph()
    value = graph.placeholder("input")
    for name in module._modules:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


def _parts(module: nn.Module) -> list[nn.Module]:
    """A module and all below it. While a forward is read, each call and each attribute of a module takes long."""
    parts, stack = {}, [module]
    while stack:
        part = stack.pop()
        if id(part) not in parts:
            parts[id(part)] = part
            stack += [child for child in object.__getattribute__(part, "__dict__")["_modules"].values() if child is not None]
    return [*parts.values()]


def _has_own_call(module: nn.Module) -> bool:
    return any("__call__" in kind.__dict__ for kind in own_classes(type(module)))


def is_users_function(value: Any) -> bool:
    """Whether a value is a function that neither torch nor this package has made."""
    return isinstance(value, FunctionType) and (value.__module__ or "").partition(".")[0] not in ("torch", "gradkernels")


def given_by(call: Node, module: nn.Module) -> Given | None:
    """The optional arguments that a call in a graph gives a module; None if a graph cannot stand for them."""
    optional = optional_arguments(type(module).forward)
    names = list(_arguments(type(module).forward))
    if len(call.args) > len(names):
        return None
    given = []
    for name, value in sorted({**dict(zip(names, call.args, strict=False)), **call.kwargs}.items()):
        if name not in names or (name in optional and optional[name].kind in _OF_ANY_NUMBER):
            return None
        if name in optional and not (is_constant(value) and is_same(value, optional[name].default)):
            if not isinstance(value, Node) and not is_constant(value):
                return None
            given.append((name, torch.Tensor if isinstance(value, Node) else value))
    return tuple(given)


def read(module: nn.Module, kind: type, given: Given, reads: Reads) -> Reading:
    """Reads the forward of one module as it is now.

    Args:
        module: the module.
        kind: the class of the arguments whose class the forward asks for.
        given: the optional arguments that are given.
        reads: gets the attributes that were read, whether the forward can be read or not.
    """
    problem = _why_not_readable(module) or _why_not_optional(module)
    if problem is not None:
        return Reading(None, problem)
    graph = _sequential(module)
    if graph is not None:
        return Reading(graph, None)
    asked: set[str] = set()
    evaluation: Graph | None = None
    try:
        training = _trace_around(module, True, kind, given, asked, reads)
        # A forward that does not read its mode has the same graph in both.
        if any(name == "training" for _, name in reads):
            evaluation = _trace_around(module, False, kind, given, asked, reads)
    except Unreadable as reason:
        return Reading(None, str(reason), asks_for_class=bool(asked))
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        problem = f"cannot be traced by torch.fx: {type(error).__name__}: {first_line}"
        return Reading(None, problem, asks_for_class=bool(asked))
    arguments = enumerate(str(node.target) for node in training.find_nodes(op="placeholder"))
    kinds = tuple((place, name, kind) for place, name in arguments if name in asked)
    attributes = tuple((*place, value) for place, value in sorted(reads.items()) if place[1] != "training")
    reading = Reading(training, None, attributes, kinds, given, asks_for_class=bool(asked), is_partial=_is_partial(module, training))
    if evaluation is None:
        return reading
    modes = {path: value for (path, name), value in sorted(reads.items()) if name == "training"}
    # With two modes there are more than these two graphs.
    if len(modes) == 1 and _are_equal(training, evaluation):
        return reading
    in_modes = [
        replace(reading, graph=graph, is_partial=True, attributes=(*attributes, *((path, "training", mode) for path in modes)))
        for graph, mode in ((training, True), (evaluation, False))
    ]
    problem = f"reads {'.'.join(('self', *next(iter(modes))))}.training"
    is_written = NOT_COMPARABLE in modes.values()
    return Reading(None, problem, attributes, asks_for_class=bool(asked), by_mode=None if is_written else (in_modes[0], in_modes[1]))


def _are_equal(left: Graph, right: Graph) -> bool:
    """Whether two graphs have the same calls in the same order."""

    def calls(graph: Graph) -> list[tuple[Any, ...]]:
        # Numbers that are equal may be of different types.
        return [(node.name, node.op, node.target, repr(node.args), repr(node.kwargs)) for node in graph.nodes]

    return calls(left) == calls(right)


def read_evaluation(module: nn.Module) -> tuple[Graph, set[Path]] | None:
    """The graph in evaluation and the submodules whose attributes it reads; None if it cannot be read.

    The graph is right only while these attributes stay the same.
    """
    if _why_not_readable(module) is not None:
        return None
    reads: Reads = {}
    try:
        graph = _trace(module, False, torch.Tensor, (), set(), reads)
    except Exception:
        return None
    if _is_partial(module, graph):
        return None
    return graph, {path for path, name in reads if path and name not in ("training", "__class__")}


def _why_not_readable(module: nn.Module) -> str | None:
    """What the class of a module says against reading its forward; None if nothing."""
    if isinstance(module, torch.fx.GraphModule):
        return "belongs to a torch.fx.GraphModule"
    if "forward" in module.__dict__:
        return "is set on the instance"
    if not isinstance(inspect.getattr_static(type(module), "forward"), FunctionType):
        return "is not a plain function"
    arguments = inspect.signature(type(module).forward, follow_wrapped=False).parameters
    for name, parameter in arguments.items():
        if parameter.kind is parameter.VAR_POSITIONAL and not required_arguments(type(module).forward):
            return f"has an optional argument, {name}"
    return "has a second argument named self" if "self" in list(arguments)[1:] else None


def _why_not_optional(module: nn.Module) -> str | None:
    """Why no graph can stand for a call without the optional arguments; None if one can."""
    optional = optional_arguments(type(module).forward)
    required = [_arguments(type(module).forward)[name] for name in required_arguments(type(module).forward)]
    if optional and any(parameter.kind is parameter.KEYWORD_ONLY for parameter in required):
        return f"has an optional argument, {next(iter(optional))}, beside one that must have a name"
    for name, argument in optional.items():
        if argument.kind is argument.POSITIONAL_ONLY:
            return f"has an optional argument, {name}, that must not have a name"
        if argument.kind not in _OF_ANY_NUMBER and not is_constant(argument.default):
            return f"has an optional argument, {name}, whose default may change"
    return None


def _is_partial(module: nn.Module, graph: Graph) -> bool:
    return bool(optional_arguments(type(module).forward)) or any(ASKED in node.meta for node in graph.nodes)


def _trace_around(module: nn.Module, training: bool, kind: type, given: Given, asked: set[str], reads: Reads) -> Graph:
    """The graph in one mode, in which a function of the user's that cannot be read is one call."""
    leaves: Leaves = {}
    while True:
        try:
            return _trace(module, training, kind, given, asked, reads, leaves)
        except Exception as error:
            function = _called_from(type(module).forward, error)
            if function is None:
                raise
            if function in leaves:
                raise leaves[function] or error from None
            leaves[function] = error if isinstance(error, Unreadable) else None


def _called_from(forward: Callable[..., Any], error: Exception) -> FunctionType | None:
    """The function of the user's that a forward calls by a global name and in which an error was raised; None if there is none."""
    functions = {value.__code__: value for value in forward.__globals__.values() if is_users_function(value) and value is not forward}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((functions[frame.f_code] for frame in frames if frame.f_code in functions), None)


def _trace(
    module: nn.Module, training: bool, kind: type, given: Given, asked: set[str], reads: Reads, leaves: Leaves | None = None
) -> Graph:
    """The graph in one mode.

    Args:
        module: the module.
        training: the mode.
        kind: the class of the arguments whose class the forward asks for.
        given: the optional arguments that are given.
        asked: gets the names of these arguments.
        reads: gets the attributes of the module and its submodules that the forward reads.
        leaves: functions that are one call in the graph -> why they could not be read, if that is known.
    """

    def trace(watched: Watched, with_gradients: bool) -> tuple[Graph, bool]:
        called: set[int] = set()
        tracer = _Tracer(module, called, kind, given, asked, leaves or {})
        with torch.set_grad_enabled(with_gradients), recorded(module, reads, called):
            graph = tracer.traced(module, watched)
        for layer in tracer.relied:
            if id(layer) not in tracer.paths:
                raise Unreadable(f"calls a {type(layer).__name__} that it does not have")
            reads[tuple(tracer.paths[id(layer)].split(".")), "__class__"] = class_before(layer)
        return graph, watched.asks_for_gradients

    with _ONE_AT_A_TIME, in_mode(module, training):
        graph, asks_for_gradients = run_watched(functools.partial(trace, with_gradients=True))
        if asks_for_gradients and not _are_equal(graph, run_watched(functools.partial(trace, with_gradients=False))[0]):
            raise Unreadable("calls torch.is_grad_enabled, which no graph records")
    for node in graph.nodes:
        node.type = None
        # Else the code of the graph would announce the function to torch.fx.
        node.meta.pop("is_wrapped", None)
        if node.op == "get_attr" and not _resolves(module, str(node.target)):
            raise Unreadable("makes a tensor")
    return graph


def _resolves(module: nn.Module, target: str) -> bool:
    try:
        operator.attrgetter(target)(module)
    except AttributeError:
        return False
    return True
