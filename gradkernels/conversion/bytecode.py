"""What the bytecode of a function does with names: it reads, calls, writes and compares. No code is run.

Python 3.10 to 3.13 have different instructions. Their names are only in this file.
"""

import dis
import functools
import inspect
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import accumulate, pairwise
from types import CodeType, FrameType, FunctionType, MappingProxyType, ModuleType
from typing import Any, NamedTuple

# Stands for the value of a name or an attribute that has none.
MISSING: Any = object()
# Stands for the offset of every instruction of a code.
EVERYWHERE = -1
# How code asks for the class of an object. isinstance and issubclass give the same answer for a subclass. The
# other ways give the class itself.
CLASS_TESTS = frozenset(("isinstance", "issubclass"))
CLASS_ATTRIBUTES = frozenset(("__class__", "_get_name", "typename"))
CLASS_FUNCTION = "type"

_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_WRITES = ("STORE_ATTR", "DELETE_ATTR", "COPY", "DUP_TOP")
_READS_OF_ITEMS = ("BINARY_SUBSCR", "BINARY_SLICE")
_WRITES_OF_ITEMS = ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
_EXCEPTS = ("CHECK_EXC_MATCH", "CHECK_EG_MATCH", "JUMP_IF_NOT_EXC_MATCH")
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
# Instructions that stand between others and compute nothing.
_FILLERS = ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "RESUME", "NOP")
_START_OF_GENERATOR = bytes((dis.opmap.get("RESUME", 0), 0))
# The names of methods that write into a list, a dict or a set, and of functions of Python that do.
_THAT_FILL = frozenset(
    (
        *{name for kind in (list, dict, set) for name in dir(kind)}.difference(*map(dir, (tuple, frozenset, MappingProxyType))),
        *("__ior__", "setitem", "delitem", "iadd", "iconcat", "imul", "ior"),
        *("shuffle", "heapify", "heappush", "heappop", "heapreplace", "insort"),
    )
)


class Read(NamedTuple):
    """A global name or a variable of an enclosing function, as far as a code follows its attributes.

    Attributes:
        offset: where the code loads the name.
        names: the name, then the attributes.
        value: the value at the end; MISSING if there is none.
        holder: the object that has the last attribute; None without attributes.
        is_written: whether an attribute of the value is set or deleted.
        is_called: whether the value is called, or is an argument of isinstance or issubclass.
    """

    offset: int
    names: list[str]
    value: Any
    holder: Any
    is_written: bool
    is_called: bool


def reads(code: CodeType, closure: Mapping[str, Any], global_names: Mapping[str, Any]) -> Iterator[Read]:
    """What a code reads of enclosing functions and global names, through modules, classes and functions."""
    instructions = _instructions(code)
    for place, instruction in enumerate(instructions):
        values: Mapping[str, Any] = {}
        if instruction.opname in _GLOBALS:
            values = global_names
        elif instruction.opname == "LOAD_DEREF" and instruction.argval != "__class__":
            values = closure
        value, holder, names = values.get(instruction.argval, MISSING), None, [instruction.argval]
        last = after = instruction
        for after in instructions[place + 1 :]:
            if after.opname not in _ATTRIBUTES or not isinstance(value, (ModuleType, type, FunctionType)):
                break
            names.append(after.argval)
            # getattr_static runs neither a __getattr__ nor a property.
            attribute = inspect.getattr_static(value, after.argval, MISSING)
            last, holder, value = after, value, attribute.__func__ if isinstance(attribute, staticmethod) else attribute
        if value is not MISSING or len(names) > 1:
            is_tested = after.opname.startswith(("CALL", "PRECALL", "BUILD_TUPLE", "LOAD_GLOBAL")) and any(
                before.argval in CLASS_TESTS for before in instructions[max(place - 8, 0) : place]
            )
            yield Read(instruction.offset, names, value, holder, after.opname in _WRITES, is_tested or _is_for_call(last))


def refusals(code: CodeType, closure: Container[str]) -> Iterator[tuple[int, str]]:
    """What no graph can stand for: the offset of an instruction, and why a forward must not get there.

    Args:
        code: the code of one function.
        closure: the names of variables of enclosing functions.
    """
    instructions = _instructions(code)
    for place, (instruction, after) in enumerate(pairwise(instructions)):
        is_attribute = instruction.opname in _ATTRIBUTES
        if is_attribute and instruction.argval == "__class__":
            yield instruction.offset, "reads __class__, which conversion changes"
        if is_attribute and not _is_for_call(instruction) and _is_of_super(instructions, place):
            yield instruction.offset, f"reads super().{instruction.argval}"
        if _is_comparison_by_is(after):
            for operand in _operands(instructions, place + 1):
                at = instructions.index(operand)
                is_known = operand.opname.startswith(("LOAD_", "STORE_")) or _is_getattr(instructions, at) or _keywords_got(code, at)
                if not is_known:
                    yield after.offset, "compares a value by `is`"
        if instruction.opname == "IMPORT_NAME":
            yield instruction.offset, f"imports {instruction.argval}"
        is_closure = instruction.opname == "STORE_DEREF" and instruction.argval in closure
        if is_closure or instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            yield instruction.offset, f"writes {instruction.argval}"
        if instruction.opname.startswith("MATCH_"):
            yield instruction.offset, "matches a value with a pattern"
        if instruction.opname in _EXCEPTS or (instruction.opname, after.opname) == ("PUSH_EXC_INFO", "POP_TOP"):
            # What an except clause catches may not happen while the forward is read.
            yield EVERYWHERE, "catches exceptions"


def with_places(code: CodeType) -> Iterator[tuple[int | None, CodeType]]:
    """Like with_nested, with the offset at which `code` makes the function; None for `code` itself."""
    yield None, code
    for instruction in _instructions(code):
        if isinstance(instruction.argval, CodeType):
            yield from ((instruction.offset, nested) for nested in with_nested(instruction.argval))


@functools.lru_cache(maxsize=4096)
def starts(code: CodeType) -> dict[int, int]:
    """For the offset of each instruction, the one that a frame has when Python is about to run it.

    They differ for an instruction whose argument has more than one byte.
    """
    at, first = {}, None
    for instruction in _with_fillers(code):
        first = instruction.offset if first is None else first
        at[instruction.offset] = first
        first = first if instruction.opname == "EXTENDED_ARG" else None
    return at


@functools.lru_cache(maxsize=4096)
def locals_compared(code: CodeType) -> dict[int, tuple[list[str], bool]]:
    """The comparisons by `is` between local names, and of `**name.get(...)`.

    Returns:
        For the offset of each such instruction: the names, those of keywords with two stars, and whether one side is
        None.
    """
    instructions = _instructions(code)
    comparisons = {}
    for place, instruction in enumerate(instructions):
        if not _is_comparison_by_is(instruction):
            continue
        operands = _operands(instructions, place)
        with_none = instruction.opname != "IS_OP" or operands[-1].argval is None
        locals_ = [last.argval for last in operands if "_FAST" in last.opname or last.opname in ("LOAD_DEREF", "STORE_DEREF")]
        # An instruction that loads two names holds them as a tuple.
        names = [name for argval in locals_ for name in (argval if isinstance(argval, tuple) else (argval,))]
        names += [f"**{name}" for last in operands for name in _keywords_got(code, instructions.index(last))]
        if names:
            comparisons[starts(code)[instruction.offset]] = names, with_none
    return comparisons


def asks_for_class(code: CodeType, wraps_forward: bool = False) -> bool:
    """Whether a code asks for the class itself of an object that may be a module.

    `self.__class__.__name__` and f"{self.__class__}" do not count: conversion keeps the name. What a forward returns is no module.

    Args:
        code: the code of one function.
        wraps_forward: it is a decorator's, and calls the forward that it wraps.
    """
    instructions = _instructions(code)
    results = _results(code, instructions) if wraps_forward else set()
    for place, instruction in enumerate(instructions):
        # Code does not end with a name.
        if instruction.opname in _GLOBALS and instruction.argval == CLASS_FUNCTION and instructions[place + 1].argval not in results:
            return True
        if instruction.opname in _ATTRIBUTES and instruction.argval in CLASS_ATTRIBUTES:
            # Code neither begins nor ends with an attribute.
            before, after = instructions[place - 1], instructions[place + 1]
            is_of_self = "_FAST" in before.opname and (_last_name(before),) == code.co_varnames[:1]
            is_for_text = after.argval in ("__name__", "__qualname__", "__module__") or after.opname.startswith("FORMAT_")
            if not (is_of_self and is_for_text):
                return True
    return False


def _results(code: CodeType, instructions: list[dis.Instruction]) -> set[str]:
    """The local variables that a code returns, and that hold nothing but what calls have returned."""
    pairs = pairwise(instructions)
    returned = {before.argval for before, after in pairs if before.opname.startswith("LOAD_FAST") and after.opname == "RETURN_VALUE"}
    return returned & _computed(code, instructions, ("CALL",))


def _computed(code: CodeType, instructions: list[dis.Instruction], by: tuple[str, ...], layers: Iterable[str] = ()) -> set[str]:
    """The local variables that hold nothing but what certain instructions have computed.

    Args:
        code: the code of one function.
        instructions: its instructions.
        by: how the names of these instructions begin.
        layers: attributes of the first argument whose calls count too.
    """
    arguments, *others = inspect.getargs(code)
    computed = set()
    # Another object, or another layer, may have this name then.
    stored = {name for each in instructions if each.opname.startswith(("STORE", "DELETE")) for name in _names(each)}
    layers = () if code.co_varnames[:1] == () or code.co_varnames[0] in stored else set(layers).difference(stored)
    # An instruction for more than 256 variables is two, and the first one is the target of a jump.
    far = {offset for offset, start in starts(code).items() if offset != start}
    for before, after in pairwise(instructions):
        if after.opname.startswith("STORE_FAST"):
            # An instruction of Python 3.13 that stores and does more has a tuple of names.
            is_known = before.opname.startswith(by) and before.opname not in _READS_OF_ITEMS
            is_known = is_known or (before.opname.startswith("CALL") and _attribute_called(code, before.offset) in layers)
            if is_known and not isinstance(after.argval, tuple) and not after.is_jump_target and after.offset not in far:
                computed.add(after.argval)
            else:
                others += after.argval if isinstance(after.argval, tuple) else [after.argval]
    return computed.difference(arguments, others)


def writes_items(code: CodeType, layers: Iterable[str] = ()) -> bool:
    """Whether a code may write into a list, a dict or a set.

    layers: the attributes of its first argument that return none of these when they are called.
    """
    if not _THAT_FILL.isdisjoint(code.co_names):
        return True
    instructions = _instructions(code)
    places = [place for place, instruction in enumerate(instructions) if _is_in_place(instruction, instructions[place - 1])]
    # What has been computed is none of the lists that were there. A call may return its argument, if it is not that of a layer.
    computed = _computed(code, instructions, ("BINARY", "INPLACE"), layers) if places else set()
    is_written = any(instructions[place + 1].argval not in computed for place in places)
    return is_written or any(instruction.opname in _WRITES_OF_ITEMS for instruction in instructions)


def _attribute_called(code: CodeType, offset: int) -> str | None:
    """The attribute of a code's first argument that a call calls: `bn`, if it ends `self.bn(f(x))`. None for any other call."""
    instructions = _with_fillers(code)
    end = begin = next(place for place, instruction in enumerate(instructions) if instruction.offset == offset) + 1
    depth = 1
    while depth > 0 and begin > 0:
        begin -= 1
        depth -= dis.stack_effect(instructions[begin].opcode, instructions[begin].arg)
    first, method, *rest = instructions[begin:end]
    if any(each.opcode in _JUMPS for each in (first, method, *rest)) or any(each.is_jump_target for each in (method, *rest)):
        return None
    if not (_loads_variable(first, code.co_varnames[:1]) and _is_for_call(method)):
        return None
    # The method and its object stay below the arguments until this call, which may be two instructions.
    arguments = rest[:-2] if rest[-2:-1] and rest[-2].opname == "PRECALL" else rest[:-1]
    depths = accumulate(dis.stack_effect(each.opcode, each.arg) for each in arguments)
    return str(method.argval) if all(depth >= 0 for depth in depths) else None


def _is_in_place(instruction: dis.Instruction, before: dis.Instruction) -> bool:
    """Whether an instruction is `a += b` or the like, which writes into a list `a`; not `a += 1`, of which a list has none."""
    if not (instruction.opname.startswith("INPLACE_") or (instruction.opname == "BINARY_OP" and instruction.argrepr.endswith("="))):
        return False
    is_product = instruction.opname == "INPLACE_MULTIPLY" or instruction.argrepr == "*="
    return is_product or before.opname != "LOAD_CONST" or type(before.argval) is not int


def attributes_of_self(code: CodeType, self: tuple[str, ...]) -> Iterator[str]:
    """The attributes that a method's code reads of its first argument, whose name is the one in `self`."""
    for before, instruction in pairwise(_instructions(code)):
        if instruction.opname in _ATTRIBUTES and _loads_variable(before, self):
            yield instruction.argval


def names_looked_for(code: CodeType, self: tuple[str, ...]) -> Iterator[str]:
    """The texts that a code may look for in an object other than the variable whose name is the one in `self`."""
    if not {"getattr", "hasattr", "vars", "__dict__"}.isdisjoint(code.co_names):
        for before, instruction in pairwise(_instructions(code)):
            is_text = instruction.opname == "LOAD_CONST" and isinstance(instruction.argval, str)
            if is_text and not _loads_variable(before, self):
                yield instruction.argval


def names_in(code: CodeType) -> set[str]:
    """Every global name, attribute and text in a code."""
    return {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}


def with_nested(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, then the code of the functions that are written inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from with_nested(constant)


def is_attribute_written_out(frame: FrameType) -> bool:
    """Whether a frame reads an attribute as `value.name` now, not by getattr, hasattr or isinstance."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] in _ATTRIBUTES


def attribute_after(frame: FrameType) -> str | None:
    """The attribute that a frame reads next of what it reads now by `value.name`; None for any other use."""
    instructions = _instructions(frame.f_code)
    place = next((place for place, instruction in enumerate(instructions) if instruction.offset == frame.f_lasti), None)
    if place is None or instructions[place].opname not in _ATTRIBUTES:
        return None
    after = instructions[place + 1]
    return str(after.argval) if after.opname in _ATTRIBUTES and not _is_for_call(after) else None


def unpacked_count(frame: FrameType) -> int | None:
    """The number of names into which a frame unpacks a value now; None if it does something else."""
    opcode, argument = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
    return argument if dis.opname[opcode] == "UNPACK_SEQUENCE" else None


def is_generator_under_way(frame: FrameType) -> bool:
    """Whether a frame belongs to a generator that has run before, and is continued or closed now."""
    is_generator = bool(frame.f_code.co_flags & inspect.CO_GENERATOR)
    return is_generator and frame.f_lasti > 0 and frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2] != _START_OF_GENERATOR


@functools.lru_cache(maxsize=4096)
def _with_fillers(code: CodeType) -> list[dis.Instruction]:
    return [*dis.get_instructions(code)]


@functools.lru_cache(maxsize=4096)
def _instructions(code: CodeType) -> list[dis.Instruction]:
    return [instruction for instruction in _with_fillers(code) if instruction.opname not in _FILLERS]


def _is_comparison_by_is(instruction: dis.Instruction) -> bool:
    return instruction.opname == "IS_OP" or instruction.opname.endswith(("IF_NONE", "IF_NOT_NONE"))


def _operands(instructions: list[dis.Instruction], place: int) -> list[dis.Instruction]:
    """The last instruction of each side of a comparison by `is`.

    `x is None` may be one instruction for the comparison and None. Then there is only one side.
    """
    if instructions[place].opname != "IS_OP":
        return instructions[place - 1 : place]
    right = place - 1
    while instructions[right].opname in _ATTRIBUTES:
        right -= 1
    return instructions[max(right - 1, 0) : right + 1]


def _loads_variable(instruction: dis.Instruction, name: tuple[str, ...]) -> bool:
    """Whether an instruction loads the variable whose name is the one in `name`."""
    # Python 3.13 has STORE_FAST_LOAD_FAST too.
    return ("LOAD_FAST" in instruction.opname or instruction.opname == "LOAD_DEREF") and (_last_name(instruction),) == name


def _names(instruction: dis.Instruction) -> tuple[Any, ...]:
    return instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)


def _last_name(instruction: dis.Instruction) -> Any:
    """The name that an instruction loads; the second, if it loads two."""
    return instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval


def _is_for_call(instruction: dis.Instruction) -> bool:
    """Whether an instruction loads a value that is called next.

    Python 3.10 does not record this for a global name. The answer is False then.
    """
    if instruction.opname == "LOAD_METHOD":
        return True
    since = {"LOAD_GLOBAL": (3, 11), "LOAD_ATTR": (3, 12), "LOAD_SUPER_ATTR": (3, 12)}.get(instruction.opname)
    return since is not None and sys.version_info >= since and bool((instruction.arg or 0) & 1)


def _is_of_super(instructions: list[dis.Instruction], place: int) -> bool:
    """Whether an instruction reads an attribute of super().

    It does if a call ends just before it, and `super` is among the last two global names.
    """
    if instructions[place].opname == "LOAD_SUPER_ATTR":
        return True
    return instructions[place - 1].opname.startswith("CALL") and "super" in _globals_before(instructions, place)[-2:]


def _is_getattr(instructions: list[dis.Instruction], place: int) -> bool:
    """Whether an instruction ends a call of getattr: it is a call, and the last global name is `getattr`."""
    return instructions[place].opname.startswith("CALL") and _globals_before(instructions, place)[-1:] == ["getattr"]


def _keywords_got(code: CodeType, place: int) -> list[str]:
    """The name of the `**` argument of a code, if an instruction ends a call of its method `get` with constants."""
    keywords = inspect.getargs(code).varkw
    if keywords is None:
        return []
    instructions = _instructions(code)
    if not instructions[place].opname.startswith("CALL") or any(
        each.opname.startswith("STORE") and keywords in (each.argval, _last_name(each)) for each in instructions
    ):
        return []
    before = place - 1
    while instructions[before].opname in ("PRECALL", "LOAD_CONST"):
        before -= 1
    is_get = instructions[before].opname in _ATTRIBUTES and instructions[before].argval == "get"
    return [keywords] if is_get and _loads_variable(instructions[before - 1], (keywords,)) else []


def _globals_before(instructions: list[dis.Instruction], place: int) -> list[str]:
    return [before.argval for before in instructions[:place] if before.opname in _GLOBALS]
