"""What a forward may read besides its module and its input: globals, closures, and what functions of torch and Python answer.

A trace runs a forward once, so that whatever it read there would be a constant from then on. Hence each Python function that a forward
gets to is judged by the names in its code before it runs: functions and classes are taken to stay, functions of torch, math and Python
to answer for their arguments alone where they are known to; every other name is a reason to leave the forward alone.
"""

import builtins
import dis
import functools
import gc
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
    stack: list[Any] = [inspect.getattr_static(kind, "forward")]
    while stack:
        function = stack.pop()
        stack += [each for each in (getattr(function, name, None) for name in ("__func__", "__wrapped__", "fget")) if each is not None]
        if not isinstance(function, FunctionType) or function.__code__ in seen or (function.__module__ or "").startswith("torch."):
            continue
        seen.add(function.__code__)
        own = {name for code in _nested(function.__code__) for name in (*code.co_names, *code.co_consts) if isinstance(name, str)}
        names |= own
        stack += [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        named = [inspect.getattr_static(kind, name, None) for name in own] + [function.__globals__.get(name) for name in own]
        for value in named:
            is_users = isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in ("torch", *sys.stdlib_module_names)
            stack += [value.__dict__.get(name) for name in own] if is_users else [value]
    return names


def _judge(frame: FrameType) -> None:
    closure = {name: frame.f_locals[name] for name in frame.f_code.co_freevars if name in frame.f_locals}
    for code in _nested(frame.f_code):
        instructions = [each for each in dis.get_instructions(code) if each.opname not in _BETWEEN]
        for place, each in enumerate(instructions):
            if each.opname == "IMPORT_NAME":
                raise Unreadable(f"imports {each.argval}")
            if each.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (each.opname == "STORE_DEREF" and each.argval in closure):
                raise Unreadable(f"writes {each.argval}")
            if each.opname in _NAMES:
                value = frame.f_globals.get(each.argval, frame.f_builtins.get(each.argval, _MISSING))
            elif each.opname == "LOAD_DEREF" and each.argval in closure:
                value = closure[each.argval]
                if _is_constant(value):
                    continue
            else:
                continue
            names, holder = [each.argval], None
            for attribute in instructions[place + 1 :]:
                if attribute.opname not in _ATTRIBUTES or not isinstance(value, (ModuleType, type)):
                    break
                names.append(attribute.argval)
                holder, value = value, getattr(value, attribute.argval, _MISSING)
            if value is not _MISSING and not _stays(value, holder):
                dotted = ".".join(names)
                if callable(value):
                    raise Unreadable(f"calls {dotted}, which no graph records")
                raise Unreadable(f"reads {dotted}, a {type(value).__name__}, which may change without notice")


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
    return frozenset(each for each in torch.overrides.get_testing_overrides() if each.__hash__ is not None)
