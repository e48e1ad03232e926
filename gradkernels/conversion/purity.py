"""What a forward may read besides its module and its input: globals, closures, and what functions of torch and Python answer.

A trace runs a forward once, so that whatever it read there would be a constant from then on. Hence each Python function that a forward
gets to is judged by the names in its code before it runs: functions and classes are taken to stay, functions of torch, math and Python
to answer for their arguments alone where they are known to; every other name is a reason to leave the forward alone. So is what no graph
has: an except clause, a context manager of the forward's own, `is` between tensors.
"""

import builtins
import dis
import functools
import gc
import inspect
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import BuiltinFunctionType, CellType, CodeType, FrameType, FunctionType, MethodDescriptorType, ModuleType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import Proxy

_MISSING = object()
_OF_PYTHON = frozenset(
    getattr(builtins, name)
    for name in (
        *("abs", "all", "any", "divmod", "getattr", "hasattr", "isinstance", "issubclass", "iter", "len", "max", "min", "next"),
        *("pow", "repr", "round", "sorted", "sum"),
    )
)
_OF_THEIR_ARGUMENTS = (
    *("math", "_operator", "operator", "_functools", "functools", "typing", "torch.nn.functional"),
    *("gradkernels.activation", "gradkernels.batch_norm_act"),
)
_OF_TORCH = frozenset({torch._assert, torch._jit_internal.is_scripting})
# Modules of Python's library whose classes keep nothing but what they are given.
_OF_VALUES = ("abc", "collections", "collections.abc", "dataclasses", "decimal", "enum", "fractions", "functools", "itertools", "numbers")
# Py_TPFLAGS_HEAPTYPE, which classes written in Python have.
_HEAP_TYPE = 1 << 9
# torch's contexts and decorators that switch modes.
_OF_MODES = ("torch.autograd.grad_mode", "torch.autograd.graph", "torch.amp.autocast_mode", "torch.utils._contextlib")
_CALL_OR_WALK = ("_wrapped_call_impl", "_call_impl", "__getattr__", "children", "named_children", "modules", "named_modules")
# The methods of every module that write, give tensors, or tell of classes.
_OF_MODULES = {
    function.__code__: name
    for name, function in vars(nn.Module).items()
    if isinstance(function, FunctionType) and name not in (*_CALL_OR_WALK, "__call__", "get_submodule", "extra_repr")
}
_NAMES = ("LOAD_GLOBAL", "LOAD_NAME")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_WRITES = ("STORE_ATTR", "DELETE_ATTR", "COPY", "DUP_TOP")
_EXCEPTS = ("CHECK_EXC_MATCH", "CHECK_EG_MATCH", "JUMP_IF_NOT_EXC_MATCH")
_BETWEEN = ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "RESUME", "NOP")
# What a method that freezes or switches modules names, and what one that writes into a list, a dict or a set.
_SWITCHES = frozenset(("eval", "train", "training", "requires_grad", "requires_grad_"))
_FILLS = frozenset(("append", "extend", "insert", "pop", "remove", "clear", "update", "setdefault", "popitem", "add", "discard"))
_BEGIN = bytes((dis.opmap.get("RESUME", 0), 0))
# Where a named tuple has its defaults.
_DEFAULTS = "_field_defaults"
_LIBRARIES = frozenset(("torch", "gradkernels", *sys.stdlib_module_names))
_RETURN = TypeVar("_RETURN")


class Unreadable(Exception):
    """A graph would not stand for this forward; the message says why, after the words "its forward"."""


def is_torchs(frame: FrameType) -> bool:
    """Whether the code of a frame is torch's or this package's."""
    return _top(frame) in ("torch", "gradkernels")


def _top(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def is_attribute_written_out(frame: FrameType) -> bool:
    """Whether a frame is at an attribute, and not at a call of getattr, hasattr or isinstance."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] in _ATTRIBUTES


def unpacked_count(frame: FrameType) -> int | None:
    """How many names a frame is about to unpack a value into; None where it does anything else."""
    opcode, argument = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
    return argument if dis.opname[opcode] == "UNPACK_SEQUENCE" else None


def run_watched(function: Callable[[], _RETURN]) -> _RETURN:
    """Calls a function; Unreadable where it calls one that reads or writes what may change, before any of that runs.

    It runs in a thread of its own, which has no profiler, no tracer and none of torch's modes: the caller's are not touched.
    """
    seen: set[Any] = set()
    problems: list[Unreadable] = []

    def on_call(frame: FrameType, event: str, argument: object) -> None:
        if event != "call":
            return
        # Two functions of one code differ in what they close over.
        key = (frame.f_code, *(id(frame.f_locals.get(name)) for name in frame.f_code.co_freevars))
        if key not in seen and frame.f_code not in seen:
            try:
                is_of_forward = _judge_call(frame)
            except Unreadable as problem:
                # f_locals of other frames is looked at where it has to be alone.
                if _is_no_part_of_the_forward(frame):
                    return
                problems.append(problem)
                raise
            if not is_of_forward:
                return
            seen.add(key)
            seen.update(each for each in _nested(frame.f_code) if each is not frame.f_code or not each.co_freevars)
        if _compared(frame.f_code):
            sys.settrace(lambda *_: None)
            frame.f_trace, frame.f_trace_opcodes = on_opcode, True
            # Python 3.12 begins with opcodes when the function is set, 3.13 when the frame asks for them.
            sys.settrace(lambda *_: None)

    def on_opcode(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if event == "opcode":
            names, with_none = _compared(frame.f_code).get(frame.f_lasti, ((), False))
            for name in names:
                value: Any = frame.f_locals.get(name)
                # Arguments that are None go to the forward itself.
                if issubclass(type(value), Proxy) and not (with_none and value.node.op == "placeholder"):
                    problems.append(Unreadable("compares a value by `is`"))
                    raise problems[-1]
        return on_opcode

    def run() -> _RETURN:
        sys.setprofile(on_call)
        try:
            return function()
        finally:
            sys.setprofile(None)
            sys.settrace(None)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        future.exception()
    # The forward itself may have caught it.
    if problems:
        raise problems[0]
    return future.result()


def _is_no_part_of_the_forward(frame: FrameType) -> bool:
    """Whether a frame belongs to what is finalized or imported meanwhile."""
    of_collector = [getattr(each, "__code__", None) for each in gc.callbacks]
    each: FrameType | None = frame
    while each is not None:
        code = each.f_code
        if code in of_collector or each.f_globals.get("__name__") in ("importlib._bootstrap", "_frozen_importlib"):
            return True
        # A generator that was begun before is closed.
        if code.co_flags & inspect.CO_GENERATOR and each.f_lasti > 0 and code.co_code[each.f_lasti : each.f_lasti + 2] != _BEGIN:
            return True
        first: Any = each.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if code.co_name == "__del__" and gc.is_finalized(first):
            return True
        if issubclass(type(first), weakref.ReferenceType) and first() is None:
            return True
        each = each.f_back
    return False


def _judge_call(frame: FrameType) -> bool:
    """Whether a frame runs code of the forward, and neither torch's nor Python's; Unreadable where it must not run."""
    name, caller = frame.f_code.co_name, frame.f_back
    if is_torchs(frame):
        if caller is None or is_torchs(caller):
            return False
        if frame.f_code in _OF_MODULES:
            raise Unreadable(f"calls {_OF_MODULES[frame.f_code]} of a module, which no graph records")
        if frame.f_globals.get("__name__") in _OF_MODES:
            raise Unreadable("switches gradients, autocast or checkpointing on or off")
        if name in ("__init__", "__enter__"):
            kind = type(frame.f_locals.get(frame.f_code.co_varnames[0]))
            raise Unreadable(f"makes or enters a {kind.__name__}, which no graph records")
        return False
    if _is_pythons(frame):
        # Its functions are judged where they are named, but for the decorator that warns; torch.fx calls them too.
        if _top(frame) == "warnings" and caller is not None and not (is_torchs(caller) or _is_pythons(caller)):
            raise Unreadable("warns")
        return False
    if name == "__exit__":
        raise Unreadable("enters a context manager of its own")
    _judge(frame)
    return True


def _is_pythons(frame: FrameType) -> bool:
    return _top(frame) in sys.stdlib_module_names or _top(frame).startswith("namedtuple_")


@functools.lru_cache(maxsize=4096)
def _compared(code: CodeType) -> dict[int, tuple[list[str], bool]]:
    """Where a code compares by `is`: the place -> the local names among the two, and whether the other is None."""
    instructions = _instructions(code)
    found = {}
    for place, each in enumerate(instructions):
        if not (each.opname == "IS_OP" or each.opname.endswith(("IF_NONE", "IF_NOT_NONE"))):
            continue
        operands = _operands(instructions, place)
        with_none = each.opname != "IS_OP" or operands[-1].argval is None
        # Two at once are a tuple, of which the last is on top.
        of_names = [each.argval for each in operands if "_FAST" in each.opname or each.opname in ("LOAD_DEREF", "STORE_DEREF")]
        names = [name for argval in of_names for name in (argval if isinstance(argval, tuple) else (argval,))]
        if names:
            found[each.offset] = names, with_none
    return found


def _operands(instructions: list[dis.Instruction], place: int) -> list[dis.Instruction]:
    """The last instructions of what a comparison by `is` compares, without None where the comparison implies it."""
    if instructions[place].opname.endswith(("IF_NONE", "IF_NOT_NONE")):
        return instructions[place - 1 : place]
    right = place - 1
    while instructions[right].opname in _ATTRIBUTES:
        right -= 1
    return instructions[max(right - 1, 0) : right + 1]


def _last(instruction: dis.Instruction) -> Any:
    return instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval


@functools.lru_cache(maxsize=4096)
def _instructions(code: CodeType) -> list[dis.Instruction]:
    return [each for each in dis.get_instructions(code) if each.opname not in _BETWEEN]


def _nested(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions written in it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _nested(each)


def names_from_forward(kind: type) -> set[str]:
    """Every name that the forward of a class has in its code, and the methods and functions that these names lead to; torch's left out."""
    return {name for code in _codes_from(kind, ["forward"]) for name in _own_names(code)}


def goes_by_names(kind: type) -> bool:
    """Whether the forward of a class comes to submodules by the names in its code alone, and not through objects or names made up."""
    functions: list[FunctionType] = []
    for code, function in _functions_from(kind, ["forward"]):
        functions.append(function)
        for path, value, holder, *_ in _read(code, {}, {**vars(builtins), **function.__globals__}):
            if path[-1] in ("getattr", "attrgetter", "methodcaller", "vars", "eval", "exec"):
                return False
            if not (_is_constant(value) or _stays(value, holder) or isinstance(value, BuiltinFunctionType)):
                return False
    cells = [cell.cell_contents for each in functions for cell in each.__closure__ or () if cell != CellType()]
    return all(_is_constant(each) or _stays(each, None) for each in cells)


def classes_asked(kind: type) -> Iterator[set[Any]]:
    """For each code in which a forward, or a method that switches modes, asks for a class: the classes and the texts in it.

    An empty set where there is nothing that the class could be compared with.
    """
    for code, function in _functions_from(kind, ["forward", "__call__", "train", "eval"]):
        if _asks_for_class(code):
            yield _classes_in(code, function)
    for function in (each for of in own_classes(kind) for each in vars(of).values() if isinstance(each, FunctionType)):
        for code in _nested(function.__code__):
            if _asks_for_class(code) and not _SWITCHES.isdisjoint(code.co_names):
                yield _classes_in(code, function)


def _classes_in(code: CodeType, function: FunctionType) -> set[Any]:
    values = [value for _, value, *_ in _read(code, {}, function.__globals__)]
    classes = {each for each in values if isinstance(each, type) and each is not type}
    # A name is for a text, or is compared with one.
    return classes | {each for each in code.co_consts if isinstance(each, str)} if classes or "__name__" in code.co_names else set()


def _asks_for_class(code: CodeType) -> bool:
    instructions = _instructions(code)
    for place, each in enumerate(instructions):
        if each.opname in _NAMES and each.argval == "type":
            return True
        if each.opname in _ATTRIBUTES and each.argval in ("__class__", "_get_name", "typename"):
            # The class of a converted block has the names of the block's. A code neither begins nor ends with an attribute.
            before, after = instructions[place - 1], instructions[place + 1]
            is_own = "_FAST" in before.opname and (_last(before),) == code.co_varnames[:1]
            if not (is_own and after.argval in ("__name__", "__qualname__", "__module__")):
                return True
    return False


def writes_into_containers(kind: type) -> bool:
    """Whether the forward of a class may write into a list or a dict that it is given."""
    for code in _codes_from(kind, ["forward", "__call__"]):
        if any(each.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE") for each in _instructions(code)):
            return True
        if not _FILLS.isdisjoint(code.co_names):
            return True
    return False


def _module_of(function: FunctionType) -> str:
    return (function.__module__ or "").partition(".")[0]


def _own_names(code: CodeType) -> set[str]:
    return {*code.co_names, *(each for each in code.co_consts if isinstance(each, str))}


def _codes_from(kind: type, methods: list[str]) -> Iterator[CodeType]:
    return (code for code, _ in _functions_from(kind, methods))


def _functions_from(kind: type, methods: list[str]) -> Iterator[tuple[CodeType, FunctionType]]:
    """The codes of methods of a class, and of the methods and functions that these lead to, each with the function that it is part of."""
    seen: set[CodeType] = set()
    stack: list[Any] = [each.__dict__.get(method) for method in methods for each in kind.__mro__]
    while stack:
        function = stack.pop()
        if isinstance(function, (staticmethod, classmethod)):
            function = function.__func__
        elif isinstance(function, property):
            function = function.fget
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        if _module_of(function) in ("torch", "gradkernels"):
            continue
        seen.add(function.__code__)
        stack += [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        for code in _nested(function.__code__):
            yield code, function
            own = _own_names(code)
            names = own if "super" in own else set(_of_self(code, function.__code__.co_varnames[:1]))
            stack += [each.__dict__.get(name) for each in kind.__mro__ for name in names]
            stack += [value for _, value, *_ in _read(code, {}, function.__globals__)]


def _of_self(code: CodeType, self: tuple[str, ...]) -> Iterator[str]:
    """The attributes that a method's code reads of its first argument."""
    for before, each in pairwise(_instructions(code)):
        # Python 3.13 has STORE_FAST_LOAD_FAST too.
        if each.opname in _ATTRIBUTES and ("LOAD_FAST" in before.opname or before.opname == "LOAD_DEREF") and (_last(before),) == self:
            yield each.argval


def _judge(frame: FrameType) -> None:
    closure = {name: frame.f_locals[name] for name in frame.f_code.co_freevars if name in frame.f_locals}
    for code in _nested(frame.f_code):
        instructions = _instructions(code)
        for place, (each, after) in enumerate(pairwise(instructions)):
            if each.opname in _ATTRIBUTES and each.argval == "__class__":
                raise Unreadable("reads __class__, which conversion changes")
            if each.opname in _ATTRIBUTES and not _calls(each) and _is_of_super(instructions, place):
                raise Unreadable(f"reads super().{each.argval}")
            if after.opname == "IS_OP" or after.opname.endswith(("IF_NONE", "IF_NOT_NONE")):
                for operand in _operands(instructions, place + 1):
                    if not operand.opname.startswith(("LOAD_", "STORE_")) and not _is_getattr(instructions, instructions.index(operand)):
                        raise Unreadable("compares a value by `is`")
            if each.opname == "IMPORT_NAME":
                raise Unreadable(f"imports {each.argval}")
            if each.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (each.opname == "STORE_DEREF" and each.argval in closure):
                raise Unreadable(f"writes {each.argval}")
            if each.opname.startswith("MATCH_"):
                raise Unreadable("matches a value with a pattern")
            if each.opname in _EXCEPTS or (each.opname, after.opname) == ("PUSH_EXC_INFO", "POP_TOP"):
                raise Unreadable("catches exceptions")
        for names, value, holder, is_written, is_called in _read(code, closure, {**frame.f_builtins, **frame.f_globals}):
            dotted = ".".join(names)
            if is_written:
                raise Unreadable(f"writes an attribute of {dotted}")
            if isinstance(value, type) and not is_of_library(value) and not is_called:
                raise Unreadable(f"reads {dotted}, a class with attributes, which may change without notice")
            if (len(names) == 1 and names[0] in closure and _is_constant(value)) or _stays(value, holder):
                continue
            if callable(value):
                raise Unreadable(f"calls {dotted}, which no graph records")
            if value is _MISSING:
                raise Unreadable(f"reads {dotted}, which is made when it is asked for")
            raise Unreadable(f"reads {dotted}, a {type(value).__name__}, which may change without notice")


def _read(code: CodeType, closure: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[tuple[list[str], Any, Any, bool, bool]]:
    """What a code reads of a closure and of global names, through modules, classes and functions.

    The names, the value, what has it, whether an attribute of the value is written, and whether it is called or asked about.
    """
    instructions = _instructions(code)
    for place, each in enumerate(instructions):
        known = names if each.opname in _NAMES else closure if each.opname == "LOAD_DEREF" and each.argval != "__class__" else {}
        value, holder, path = known.get(each.argval, _MISSING), None, [each.argval]
        last, after = each, each
        for after in instructions[place + 1 :]:
            if after.opname not in _ATTRIBUTES or not isinstance(value, (ModuleType, type, FunctionType)):
                break
            path.append(after.argval)
            # Past a __getattr__ and a property, which would run.
            held = inspect.getattr_static(value, after.argval, _MISSING)
            last, holder, value = after, value, held.__func__ if isinstance(held, staticmethod) else held
        if value is not _MISSING or len(path) > 1:
            asked = after.opname.startswith(("CALL", "PRECALL", "BUILD_TUPLE", "LOAD_GLOBAL")) and any(
                before.argval in ("isinstance", "issubclass") for before in instructions[max(place - 8, 0) : place]
            )
            yield path, value, holder, after.opname in _WRITES and not _is_constant(value), asked or _calls(last)


def _calls(instruction: dis.Instruction) -> bool:
    """Whether what an instruction loads is called. Python 3.10 does not say so of a global name, which then counts as not called."""
    if instruction.opname == "LOAD_METHOD":
        return True
    since = {"LOAD_GLOBAL": (3, 11), "LOAD_ATTR": (3, 12), "LOAD_SUPER_ATTR": (3, 12)}.get(instruction.opname)
    return since is not None and sys.version_info >= since and bool((instruction.arg or 0) & 1)


def _is_of_super(instructions: list[dis.Instruction], place: int) -> bool:
    if instructions[place].opname == "LOAD_SUPER_ATTR":
        return True
    loads = [each.argval for each in instructions[:place] if each.opname in _NAMES]
    return instructions[place - 1].opname.startswith("CALL") and "super" in loads[-2:]


def _is_getattr(instructions: list[dis.Instruction], place: int) -> bool:
    """Whether an instruction ends a call of getattr: its name is the last global one before it."""
    loads = [each.argval for each in instructions[:place] if each.opname in _NAMES]
    return instructions[place].opname.startswith("CALL") and loads[-1:] == ["getattr"]


def _is_constant(value: object) -> bool:
    """What the closure of a function holds and nothing can change but the function that made it."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device))


def _stays(value: Any, holder: Any) -> bool:
    """Whether a value, an attribute of `holder` if that is not None, is the same for every call."""
    if isinstance(value, type):
        return _is_class_of_values(value)
    if callable(value):
        return is_function_of_its_arguments(value)
    if isinstance(holder, ModuleType) and holder.__name__ in ("math", "torch"):
        return isinstance(value, (float, torch.dtype, torch.layout, torch.memory_format))
    return type(value).__module__ == "typing"


def is_function_of_its_arguments(function: Any) -> bool:
    """Whether a function reads no state, or one of Python that will be judged when it is called."""
    if not isinstance(function, (FunctionType, BuiltinFunctionType, MethodDescriptorType)):
        return False
    if function in (operator.is_, operator.is_not):
        return False
    if function in _OF_PYTHON or function in _OF_TORCH or function in _of_tensors():
        return True
    module = function.__module__ or ""
    top = module.partition(".")[0]
    if module in _OF_THEIR_ARGUMENTS:
        return True
    if top in _LIBRARIES:
        # relu_ and its like are not among those that a subclass of Tensor may override.
        return top == "torch" and isinstance(function, BuiltinFunctionType) and function.__name__.endswith("_")
    if not isinstance(function, FunctionType):
        return False
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return all(_is_constant(each) or _stays(each, None) for each in defaults)


def _is_class_of_values(kind: type) -> bool:
    """Whether a class keeps no state but in its instances; one that is written in Python is judged when it is called."""
    top = kind.__module__.partition(".")[0]
    if top == "builtins":
        # Conversion changes what type() gives.
        return kind is not type
    if top in sys.stdlib_module_names:
        return kind.__module__ in _OF_VALUES or issubclass(kind, BaseException)
    # Lists and dicts of a class are shared by all that is made of it.
    shared = [value for each in own_classes(kind) for name, value in vars(each).items() if not name.startswith("__") and name != _DEFAULTS]
    return top == "torch" or (bool(kind.__flags__ & _HEAP_TYPE) and not any(isinstance(each, (list, dict, set)) for each in shared))


def is_of_library(kind: type) -> bool:
    """Whether a class is torch's, this package's or Python's."""
    return kind.__module__.partition(".")[0] in _LIBRARIES


def own_classes(kind: type) -> list[type]:
    """Which classes of an inheritance are of no library."""
    return [each for each in kind.__mro__ if not is_of_library(each)]


@functools.cache
def _of_tensors() -> frozenset[Any]:
    """torch's functions that take a tensor; those that ask for a mode or make a tensor are not among them."""
    return frozenset(torch.overrides.get_testing_overrides())
