"""What a forward may read besides its module and its input: globals, closures, and what functions of torch and Python answer.

A trace runs a forward once, so that whatever it read there would be a constant from then on. Hence each Python function that a forward
gets to is judged by the names in its code before it runs: functions and classes are taken to stay, functions of torch, math and Python
to answer for their arguments alone where they are known to; every other name is a reason to leave the forward alone.
"""

import builtins
import dis
import functools
import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from types import BuiltinFunctionType, CellType, CodeType, FrameType, FunctionType, MethodDescriptorType, ModuleType
from typing import Any

import torch

_MISSING = object()
_OF_PYTHON = frozenset(
    getattr(builtins, name)
    for name in (
        *("abs", "all", "any", "callable", "divmod", "getattr", "hasattr", "isinstance", "issubclass", "iter", "len", "max", "min"),
        *("next", "pow", "repr", "round", "setattr", "sorted", "sum"),
    )
)
_OF_THEIR_ARGUMENTS = ("math", "_operator", "operator", "_functools", "functools", "typing", "gradkernels", "torch.nn.functional")
_OF_TORCH = frozenset({torch._assert, torch._jit_internal.is_scripting})
_NAMES = ("LOAD_GLOBAL", "LOAD_NAME")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_BETWEEN = ("CACHE", "EXTENDED_ARG", "PUSH_NULL")


class Unreadable(Exception):
    """A graph would not stand for this forward; the message says why, after the words "its forward"."""


def is_torchs(frame: FrameType) -> bool:
    """Whether the code of a frame is torch's or this package's."""
    return _top(frame) in ("torch", __package__)


def _top(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


@contextmanager
def watched() -> Iterator[None]:
    """Raises Unreadable where a function is called that reads what may change, before any of it runs."""
    seen: set[CodeType] = set()
    problems: list[Unreadable] = []

    def on_call(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or frame.f_code in seen or is_torchs(frame):
            return
        # The standard library's functions are judged where they are named; torch.fx calls them too.
        if _top(frame) not in sys.stdlib_module_names and not _top(frame).startswith("namedtuple_"):
            seen.update(_nested(frame.f_code))
            try:
                _judge(frame)
            except Unreadable as problem:
                problems.append(problem)
                raise

    # Finalizers of other objects would be taken for what the forward calls.
    collects = gc.isenabled()
    gc.disable()
    before = sys.getprofile()
    sys.setprofile(on_call)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
        # The forward itself may have caught it.
        if problems:
            raise problems[0]


def _nested(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions written in it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _nested(each)


def names_from_forward(kind: type) -> set[str]:
    """Every name that the forward of a class has in its code, and the methods and functions that these names lead to; torch's left out."""
    names: set[str] = set()
    seen: set[CodeType] = set()
    stack: list[Any] = [each.__dict__.get("forward") for each in kind.__mro__]
    while stack:
        function = stack.pop()
        if isinstance(function, (staticmethod, classmethod)):
            function = function.__func__
        elif isinstance(function, property):
            function = function.fget
        if not isinstance(function, FunctionType) or function.__code__ in seen or (function.__module__ or "").startswith("torch."):
            continue
        seen.add(function.__code__)
        stack += [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        for code in _nested(function.__code__):
            own = {*code.co_names, *(each for each in code.co_consts if isinstance(each, str))}
            names |= own
            methods = own if "super" in own else set(_of_self(code, function.__code__.co_varnames[:1]))
            stack += [each.__dict__.get(name) for each in kind.__mro__ for name in methods]
            stack += [value for _, value, _ in _read(code, {}, function.__globals__)]
    return names


def _of_self(code: CodeType, self: tuple[str, ...]) -> Iterator[str]:
    """The attributes that a method's code reads of its first argument."""
    instructions = [each for each in dis.get_instructions(code) if each.opname not in _BETWEEN]
    for before, each in pairwise(instructions):
        loaded = before.argval if isinstance(before.argval, tuple) else (before.argval,)
        # Python 3.13 has STORE_FAST_LOAD_FAST too.
        if each.opname in _ATTRIBUTES and ("LOAD_FAST" in before.opname or before.opname == "LOAD_DEREF") and loaded[-1:] == self:
            yield each.argval


def _judge(frame: FrameType) -> None:
    closure = {name: frame.f_locals[name] for name in frame.f_code.co_freevars if name in frame.f_locals}
    for code in _nested(frame.f_code):
        for each in dis.get_instructions(code):
            if each.opname == "IMPORT_NAME":
                raise Unreadable(f"imports {each.argval}")
            if each.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (each.opname == "STORE_DEREF" and each.argval in closure):
                raise Unreadable(f"writes {each.argval}")
        for names, value, holder in _read(code, closure, {**frame.f_builtins, **frame.f_globals}):
            if (len(names) == 1 and names[0] in closure and _is_constant(value)) or _stays(value, holder):
                continue
            dotted = ".".join(names)
            if callable(value):
                raise Unreadable(f"calls {dotted}, which no graph records")
            raise Unreadable(f"reads {dotted}, a {type(value).__name__}, which may change without notice")


def _read(code: CodeType, closure: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[tuple[list[str], Any, Any]]:
    """What a code reads of a closure and of global names, through modules and classes: the names, the value, and what has it."""
    instructions = [each for each in dis.get_instructions(code) if each.opname not in _BETWEEN]
    for place, each in enumerate(instructions):
        known = names if each.opname in _NAMES else closure if each.opname == "LOAD_DEREF" else {}
        value, holder, path = known.get(each.argval, _MISSING), None, [each.argval]
        for attribute in instructions[place + 1 :]:
            if attribute.opname not in _ATTRIBUTES or not isinstance(value, (ModuleType, type)):
                break
            path.append(attribute.argval)
            holder, value = value, getattr(value, attribute.argval, _MISSING)
        if value is not _MISSING:
            yield path, value, holder


def _is_constant(value: object) -> bool:
    """What the closure of a function holds and nothing can change but the function that made it."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device))


def _stays(value: Any, holder: Any) -> bool:
    """Whether a value, an attribute of `holder` if that is not None, is the same for every call."""
    if isinstance(value, type):
        # While a forward is read, its modules are of other classes, which type() would show.
        return value is not type
    if callable(value):
        return is_function_of_its_arguments(value)
    if isinstance(holder, ModuleType) and holder.__name__ in ("math", "torch"):
        return isinstance(value, (float, torch.dtype, torch.layout, torch.memory_format))
    return type(value).__module__ == "typing"


def is_function_of_its_arguments(function: Any) -> bool:
    """Whether a function reads no state, or one of Python that will be judged when it is called."""
    if not isinstance(function, (FunctionType, BuiltinFunctionType, MethodDescriptorType)):
        return False
    if function in _OF_PYTHON or function in _OF_TORCH or function in _of_tensors():
        return True
    module = function.__module__ or ""
    top = module.partition(".")[0]
    if module in _OF_THEIR_ARGUMENTS or top == __package__:
        return True
    if top in ("torch", *sys.stdlib_module_names):
        # relu_ and its like are not among those that a subclass of Tensor may override.
        return top == "torch" and function.__name__.endswith("_")
    return isinstance(function, FunctionType)


@functools.cache
def _of_tensors() -> frozenset[Any]:
    """torch's functions that take a tensor; those that ask for a mode or make a tensor are not among them."""
    return frozenset(torch.overrides.get_testing_overrides())
