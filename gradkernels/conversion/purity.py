"""Which values and functions a forward may use besides its module and its input.

A forward is read by running it once. A value that it took from elsewhere would be a constant from then on. So
each Python function that the forward calls is judged by the names in its code before it runs. Functions and
classes are taken to stay the same. Functions of torch, math and Python may be called if their results are
known to depend on their arguments alone. Any other name is a reason to leave the forward alone. So is code
that no graph can hold, such as a context manager of the user's, or `is` between tensors (bytecode.py).

Such an instruction ends the reading when it is about to run. In a branch that is not taken it does not
matter: the values that choose the branch are compared at each call. An except clause ends the reading in any
case.
"""

import builtins
import functools
import gc
import operator
import sys
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import BuiltinFunctionType, CellType, CodeType, FrameType, FunctionType, MethodDescriptorType, ModuleType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import Node, Proxy

from gradkernels.conversion import bytecode
from gradkernels.conversion.bytecode import MISSING, with_nested

_OF_PYTHON = frozenset(
    getattr(builtins, name)
    for name in (
        *("abs", "all", "any", "divmod", "getattr", "hasattr", "isinstance", "issubclass", "iter", "len", "max", "min", "next"),
        *("pow", "repr", "round", "sorted", "sum"),
    )
)
# Modules in which the result of every function depends on its arguments alone.
_OF_THEIR_ARGUMENTS = (
    *("math", "_operator", "operator", "_functools", "functools", "typing", "torch.nn.functional"),
    *("gradkernels.activation", "gradkernels.batch_norm_act"),
)
# A forward that asks for the gradient mode is read in both.
_OF_TORCH = frozenset({torch._assert, torch._jit_internal.is_scripting, torch.is_grad_enabled})
# Modules of Python whose instances hold nothing but their arguments.
_OF_VALUES = ("abc", "collections", "collections.abc", "dataclasses", "decimal", "enum", "fractions", "functools", "itertools", "numbers")
# Py_TPFLAGS_HEAPTYPE, which classes written in Python have.
_HEAP_TYPE = 1 << 9
# torch's contexts and decorators that switch modes.
_OF_MODES = ("torch.autograd.grad_mode", "torch.autograd.graph", "torch.amp.autocast_mode", "torch.utils._contextlib")
_CALL_OR_WALK = ("_wrapped_call_impl", "_call_impl", "__getattr__", "children", "named_children", "modules", "named_modules")
# The methods of every module that write, return tensors or return names of classes.
_OF_MODULES = {
    function.__code__: name
    for name, function in vars(nn.Module).items()
    if isinstance(function, FunctionType) and name not in (*_CALL_OR_WALK, "__call__", "get_submodule", "extra_repr")
}
# Names in a method that freezes modules or switches their mode.
_SWITCHES = frozenset(("eval", "train", "training", "requires_grad", "requires_grad_"))
# The attribute in which a class of named tuples has its defaults.
_DEFAULTS = "_field_defaults"
# The key in a node's `meta` of a value whose class the forward asks for, or that it compares with None.
ASKED = "gradkernels_asked"
_LIBRARIES = frozenset(("torch", "gradkernels", *sys.stdlib_module_names))
_Result = TypeVar("_Result")


class Unreadable(Exception):
    """No graph stands for a forward. The message says why, as a verb that follows "the forward of X"."""


def is_torchs(frame: FrameType) -> bool:
    """Whether the code of a frame is torch's or this package's."""
    return _is_torchs(frame.f_globals.get("__name__"))


@functools.cache
def _is_torchs(module: object) -> bool:
    return str(module).partition(".")[0] in ("torch", "gradkernels")


def _top(frame: FrameType) -> str:
    """The package of a frame's code."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


@dataclass
class Watched:
    """What is known of code while it runs.

    Attributes:
        begin: a function to call when the judging has to begin.
        in_c: the functions written in C that are running, the innermost last.
        asks_for_gradients: whether the code has asked for the gradient mode.
    """

    begin: Callable[[], None]
    in_c: list[Any]
    asks_for_gradients: bool = False


def run_watched(function: Callable[[Watched], _Result]) -> _Result:
    """Calls a function in a thread of its own, and judges code that it calls before that code runs.

    The thread has no profiler, tracer or torch mode; those of the caller are not touched.

    Args:
        function: what is called.

    Raises:
        Unreadable: code may read or write something that changes.
    """
    judged: dict[Any, dict[int, str]] = {}
    held: set[Any] = set()
    codes: set[CodeType] = set()
    problems: list[Unreadable] = []
    in_c: list[Any] = []
    is_grad_enabled = torch.is_grad_enabled

    def on_call(frame: FrameType, event: str, argument: object) -> None:
        # First of all, and without a call of Python's: this function runs at each call and return in the thread.
        if event == "c_call":
            in_c.append(argument)
            if argument is is_grad_enabled and not _is_torchs(frame.f_globals.get("__name__")):
                watched.asks_for_gradients = True
        elif event != "return" and event != "call" and in_c:
            in_c.pop()
        if event != "call":
            return
        if _is_torchs(frame.f_globals.get("__name__")) and (frame.f_back is None or _is_torchs(frame.f_back.f_globals.get("__name__"))):
            return
        # Two functions with the same code differ in the values of their closures.
        key = (frame.f_code, *(id(frame.f_locals.get(name)) for name in frame.f_code.co_freevars))
        if key not in judged and (frame.f_code not in judged or key in held):
            try:
                refused = _judge_call(frame, judged, held)
                # Checked only here: it reads f_locals of other frames.
                if refused and _is_no_part_of_the_forward(frame, codes):
                    return
            except Unreadable as problem:
                if _is_no_part_of_the_forward(frame, codes):
                    return
                problems.append(problem)
                raise
            if refused is None:
                return
            judged[key] = refused
        codes.add(frame.f_code)
        refused = judged.get(key, {})
        compared = bytecode.locals_compared(frame.f_code)
        if refused or compared:
            sys.settrace(lambda *_: None)
            frame.f_trace, frame.f_trace_opcodes = functools.partial(on_opcode, refused, compared), True
            # Again: Python 3.12 starts to trace opcodes only here, Python 3.13 at f_trace_opcodes.
            sys.settrace(lambda *_: None)

    def on_opcode(refused: Any, compared: Any, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            if frame.f_lasti in refused:
                problems.append(Unreadable(refused[frame.f_lasti]))
                raise problems[-1]
            names, with_none = compared.get(frame.f_lasti, ((), False))
            for name in names:
                value: Any = frame.f_locals.get(name)
                if name.startswith("**") and any(issubclass(type(each), Proxy) for each in frame.f_locals[name[2:]].values()):
                    problems.append(Unreadable("compares a value by `is`"))
                    raise problems[-1]
                if not issubclass(type(value), Proxy):
                    continue
                if with_none and _is_tensor(value.node):
                    continue
                if not with_none or value.node.op != "placeholder":
                    problems.append(Unreadable("compares a value by `is`"))
                    raise problems[-1]
                # A call with an argument that is None goes to the forward itself.
                value.node.meta[ASKED] = True
        return frame.f_trace

    def run() -> _Result:
        try:
            return function(watched)
        finally:
            sys.setprofile(None)
            sys.settrace(None)

    watched = Watched(lambda: sys.setprofile(on_call), in_c)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        future.exception()
    # The forward itself may have caught the exception.
    if problems:
        raise problems[0]
    return future.result()


def _is_tensor(node: Node) -> bool:
    """Whether a value is certainly a tensor: what a function of torch returns, or x[:, None]."""
    if node.op != "call_function":
        return False
    key = node.args[1] if node.target is operator.getitem else ()
    return node.target in of_tensors() or (isinstance(key, tuple) and any(isinstance(each, slice) for each in key))


def _is_no_part_of_the_forward(frame: FrameType, codes: Container[CodeType]) -> bool:
    """Whether a frame belongs to a finalizer, the garbage collector, a closed generator or an import.

    Args:
        frame: the frame.
        codes: the codes that the forward has run so far. A generator that began earlier is no part of the forward.
    """
    of_collector = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    caller: FrameType | None = frame
    while caller is not None:
        code = caller.f_code
        if code in of_collector or caller.f_globals.get("__name__") in ("importlib._bootstrap", "_frozen_importlib"):
            return True
        if bytecode.is_generator_under_way(caller) and code not in codes:
            return True
        first: Any = caller.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if code.co_name == "__del__" and gc.is_finalized(first):
            return True
        if issubclass(type(first), weakref.ReferenceType) and first() is None:
            return True
        caller = caller.f_back
    return False


def _judge_call(frame: FrameType, judged: dict[Any, dict[int, str]], held: set[Any]) -> dict[int, str] | None:
    """The offsets of the instructions that a frame must not run, and why; None for code of torch or Python.

    Args:
        frame: the frame.
        judged: gets the functions that are written inside it, in which there is nothing to refuse.
        held: gets the functions that its global names stand for and that hold values of an earlier call of
            their maker. Each is its code and the ids of these values.

    Raises:
        Unreadable: the frame must not run.
    """
    name, caller = frame.f_code.co_name, frame.f_back
    if is_torchs(frame):
        if frame.f_code in _OF_MODULES:
            raise Unreadable(f"calls {_OF_MODULES[frame.f_code]} of a module, which no graph records")
        if frame.f_globals.get("__name__") in _OF_MODES:
            raise Unreadable("switches gradients, autocast or checkpointing on or off")
        if name in ("__init__", "__enter__"):
            kind = type(frame.f_locals.get(frame.f_code.co_varnames[0]))
            raise Unreadable(f"makes or enters a {kind.__name__}, which no graph records")
        return None
    if is_pythons(frame):
        # Functions of Python are judged by name where the forward uses them, and torch.fx calls them too. But
        # the wrapper of warnings.deprecated has the name of the user's function.
        if _top(frame) == "warnings" and caller is not None and not (is_torchs(caller) or is_pythons(caller)):
            raise Unreadable("warns")
        return None
    if name == "__exit__":
        raise Unreadable("enters a context manager that is not torch's")
    refused: dict[int, str] = {}
    closure = {name: frame.f_locals[name] for name in frame.f_code.co_freevars if name in frame.f_locals}
    for place, code in bytecode.with_places(frame.f_code):
        global_names = {**frame.f_builtins, **frame.f_globals}
        functions = [global_names[name] for name in code.co_names if isinstance(global_names.get(name), FunctionType)]
        held.update((function.__code__, *map(id, _closure_of(function))) for function in functions if function.__closure__)
        found = list(_refused(code, closure, global_names))
        if place is not None and not found:
            judged[code] = {}
        for offset, reason in found:
            if offset == bytecode.EVERYWHERE:
                raise Unreadable(reason)
            refused.setdefault(bytecode.starts(frame.f_code)[offset if place is None else place], reason)
    return refused


def is_pythons(frame: FrameType) -> bool:
    """Whether the code of a frame is Python's."""
    return _top(frame) in sys.stdlib_module_names or _top(frame).startswith("namedtuple_")


def _refused(code: CodeType, closure: dict[str, Any], global_names: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """The offset of each instruction of a code that must not run, and why."""
    yield from bytecode.refusals(code, closure)
    for read in bytecode.reads(code, closure, global_names):
        dotted, value = ".".join(read.names), read.value
        if read.is_written and not is_constant(value):
            yield read.offset, f"writes an attribute of {dotted}"
        elif isinstance(value, type) and not is_of_library(value) and not read.is_called:
            yield read.offset, f"reads {dotted}, a class with attributes, which may change without notice"
        elif isinstance(value, type) and (issubclass(value, Proxy) or isinstance(value, type(torch.FloatTensor))):
            # isinstance gives these an answer of their own for a value that torch.fx traces.
            yield read.offset, f"reads {dotted}, a class for which a value is another than while its forward is read"
        elif (len(read.names) == 1 and dotted in closure and is_constant(value)) or _stays(value, read.holder):
            continue
        elif callable(value):
            yield read.offset, f"calls {dotted}, which no graph records"
        elif value is MISSING:
            yield read.offset, f"reads {dotted}, which is made at its first use"
        else:
            yield read.offset, f"reads {dotted}, a {type(value).__name__}, which may change without notice"


def names_from_forward(kind: type) -> set[str]:
    """Every name in the code of a forward and of the methods and functions it leads to, except torch's."""
    return {name for code, _ in _code_from(kind, ["forward"]) for name in bytecode.names_in(code)}


def functions_from_forward(kind: type) -> set[Any]:
    """Every function that the code of a forward names, and of the methods and functions that it leads to."""
    code = _code_from(kind, ["forward"])
    values = [read.value for part, function in code for read in bytecode.reads(part, {}, function.__globals__)]
    return {value for value in values if isinstance(value, (FunctionType, BuiltinFunctionType))}


def goes_by_names(kind: type) -> bool:
    """Whether a forward reaches submodules by names in its code alone, not by objects or computed names."""
    functions: list[FunctionType] = []
    for code, function in _code_from(kind, ["forward"]):
        functions.append(function)
        for read in bytecode.reads(code, {}, {**vars(builtins), **function.__globals__}):
            if read.names[-1] in ("getattr", "attrgetter", "methodcaller", "vars", "eval", "exec"):
                return False
            if not (is_constant(read.value) or _stays(read.value, read.holder) or isinstance(read.value, BuiltinFunctionType)):
                return False
    values = [value for function in functions for value in _closure_of(function)]
    return all(is_constant(value) or _stays(value, None) for value in values)


def classes_asked(kind: type) -> Iterator[set[Any]]:
    """The classes and texts in each code that asks for the class of a module.

    It is code of the forward or of a method that switches modes. A set is empty if its code has nothing with
    which it may compare the class.
    """
    forward = getattr(kind, "forward", None)
    wrappers = set()
    while isinstance(forward, FunctionType) and hasattr(forward, "__wrapped__") and forward.__code__ not in wrappers:
        wrappers.add(forward.__code__)
        forward = forward.__wrapped__
    for code, function in _code_from(kind, ["forward", "__call__", "train", "eval"]):
        is_of_python = (function.__module__ or "").partition(".")[0] in sys.stdlib_module_names
        if not is_of_python and bytecode.asks_for_class(code, code in wrappers):
            yield _classes_in(code, function)
    for function in (value for base in own_classes(kind) for value in vars(base).values() if isinstance(value, FunctionType)):
        for code in with_nested(function.__code__):
            if bytecode.asks_for_class(code) and not _SWITCHES.isdisjoint(code.co_names):
                yield _classes_in(code, function)


def _classes_in(code: CodeType, function: FunctionType) -> set[Any]:
    values = [read.value for read in bytecode.reads(code, {}, function.__globals__)]
    classes = {value for value in values if isinstance(value, type) and value is not type}
    # The name of a class may be written out, or compared with a text.
    texts = {constant for constant in code.co_consts if isinstance(constant, str)}
    return classes | texts if classes or "__name__" in code.co_names else set()


def attributes_looked_for(kind: type) -> set[str]:
    """The names of attributes that a forward may look for in another object than its module."""
    methods = {value.__code__ for base in own_classes(kind) for value in vars(base).values() if isinstance(value, FunctionType)}
    found: set[str] = set()
    for code, _ in _code_from(kind, ["forward", "__call__"]):
        found.update(bytecode.names_looked_for(code, code.co_varnames[:1] if code in methods else ()))
    return found


def writes_into_containers(called: type | FunctionType, layers: Iterable[str] = ()) -> bool:
    """Whether a function, or the forward of a class, may write into a list or a dict that is passed to it.

    layers: the attributes of a module of this class that return no list and no dict when they are called.
    """
    if not isinstance(called, type):
        return any(bytecode.writes_items(part) for part, _ in _code_of([called], ()))
    # Other methods may be called for another object.
    forwards = [vars(base).get("forward") for base in own_classes(called)]
    code = _code_from(called, ["forward", "__call__"])
    return any(bytecode.writes_items(part, layers if function in forwards and part is function.__code__ else ()) for part, function in code)


def _code_from(kind: type, methods: list[str]) -> Iterator[tuple[CodeType, FunctionType]]:
    """The code of methods of a class, and of the methods and functions that they lead to."""
    return _code_of([base.__dict__.get(method) for method in methods for base in kind.__mro__], kind.__mro__)


def _code_of(stack: list[Any], bases: tuple[type, ...]) -> Iterator[tuple[CodeType, FunctionType]]:
    """The code of functions, and of the functions and the methods of `bases` that they lead to.

    With each code comes the function of which it is a part.
    """
    seen: set[CodeType] = set()
    while stack:
        function = stack.pop()
        if isinstance(function, (staticmethod, classmethod)):
            function = function.__func__
        elif isinstance(function, property):
            function = function.fget
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        if (function.__module__ or "").partition(".")[0] in ("torch", "gradkernels"):
            continue
        seen.add(function.__code__)
        stack += _closure_of(function)
        for code in with_nested(function.__code__):
            yield code, function
            names = bytecode.names_in(code)
            if "super" not in names:
                names = set(bytecode.attributes_of_self(code, function.__code__.co_varnames[:1]))
            stack += [base.__dict__.get(name) for base in bases for name in names]
            stack += [read.value for read in bytecode.reads(code, {}, function.__globals__)]


def _closure_of(function: FunctionType) -> list[Any]:
    """The values of the variables of enclosing functions, without those that have none yet."""
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if cell != CellType()]


def is_constant(value: object) -> bool:
    """Whether a value cannot change, so that only an assignment changes a variable that holds it."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(is_constant, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device))


def _stays(value: Any, holder: Any) -> bool:
    """Whether a global name stands for the same value at every call.

    Args:
        value: the value of the name, or of an attribute of it.
        holder: the object that has the attribute; None for the name itself.
    """
    if isinstance(value, type):
        return _is_class_of_values(value)
    if callable(value):
        return is_function_of_its_arguments(value)
    if isinstance(holder, ModuleType) and holder.__name__ in ("math", "torch"):
        return isinstance(value, (float, torch.dtype, torch.layout, torch.memory_format))
    return type(value).__module__ == "typing"


def is_function_of_its_arguments(function: Any) -> bool:
    """Whether the result of a function depends on its arguments alone.

    The answer is True for the user's own function, which is judged when it is called.
    """
    if not isinstance(function, (FunctionType, BuiltinFunctionType, MethodDescriptorType)):
        return False
    if function in (operator.is_, operator.is_not):
        return False
    if function in _OF_PYTHON or function in _OF_TORCH or function in of_tensors():
        return True
    # A method of a class in C has no __module__.
    module = getattr(function, "__module__", None) or ""
    top = module.partition(".")[0]
    if module in _OF_THEIR_ARGUMENTS:
        return True
    if top in _LIBRARIES:
        # A subclass of Tensor cannot override relu_ and its like, so of_tensors does not list them.
        return top == "torch" and isinstance(function, BuiltinFunctionType) and function.__name__.endswith("_")
    if not isinstance(function, FunctionType):
        return False
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return all(is_constant(value) or _stays(value, None) for value in defaults)


def is_held_with_constants(function: Any) -> bool:
    """Whether the variables of enclosing functions that a function uses stand for the same values at every call.

    A call of the function that made it is no reason to judge it: another call made it with other values.
    """
    return all(value is function or is_constant(value) or _stays(value, None) for value in _closure_of(function))


def _is_class_of_values(kind: type) -> bool:
    """Whether only the instances of a class have state. The user's methods are judged when called."""
    top = kind.__module__.partition(".")[0]
    if top == "builtins":
        # Conversion changes the result of type().
        return kind is not type
    if top in sys.stdlib_module_names:
        return kind.__module__ in _OF_VALUES or issubclass(kind, BaseException)
    # All instances share the lists and dicts of their class.
    shared = [value for base in own_classes(kind) for name, value in vars(base).items() if not name.startswith("__") and name != _DEFAULTS]
    return top == "torch" or (bool(kind.__flags__ & _HEAP_TYPE) and not any(isinstance(value, (list, dict, set)) for value in shared))


def is_of_library(kind: type) -> bool:
    """Whether a class is torch's, this package's or Python's."""
    return kind.__module__.partition(".")[0] in _LIBRARIES


def own_classes(kind: type) -> tuple[type, ...]:
    """The class and its bases without those of libraries."""
    return _own_classes(kind.__mro__)


@functools.cache
def _own_classes(kinds: tuple[type, ...]) -> tuple[type, ...]:
    return tuple(kind for kind in kinds if not is_of_library(kind))


@functools.cache
def of_tensors() -> frozenset[Any]:
    """torch's functions that take a tensor, without those that read a mode or make a tensor."""
    return frozenset(torch.overrides.get_testing_overrides())
