"""Which attributes of its modules a forward reads, and that it writes none.

At every call a converted block compares these attributes with the values that they had (guard.py). If a value
cannot be compared, the forward is left alone. The same holds if the forward writes an attribute. After
reading, every attribute is as it was before.
"""

import copy
import math
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import GetSetDescriptorType, MemberDescriptorType, MethodType
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy

from gradkernels.conversion.bytecode import MISSING, attribute_after, is_attribute_written_out
from gradkernels.conversion.purity import (
    Unreadable,
    is_constant,
    is_function_of_its_arguments,
    is_held_with_constants,
    is_torchs,
    own_classes,
)

# The names from a block to one of its submodules; empty for the block itself.
Path = tuple[str, ...]
# (the module, the name of an attribute, or two names with a dot for an attribute of its value) -> its value.
Reads = dict[tuple[Path, str], Any]

# Stands for a value that cannot be compared, for which the forward is left alone.
NOT_COMPARABLE = object()
# Stands for a hook in a set of id() of called modules. A hook may write the attributes of any module.
HOOKED = 0
# The attributes that every nn.Module has, without `training`, which forwards may read.
OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training"}
# Names that give a forward tensors in the place of proxies.
_ALL_TENSORS = frozenset(
    ("parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "_parameters", "_buffers", "__dict__")
)
# Of the class of a converted block: the class that the block had.
BASE = "_class_before_conversion"
# Of a norm or an activation that got our class: the class that it had.
ORIGINAL = "_converted_from"
_COMPARABLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def is_comparable(value: Any) -> bool:
    """Whether == can show later that a value is still the same, in a copy of its module too.

    A function counts only if it reads no state.
    """
    if type(value) in (list, tuple, set, frozenset):
        return all(map(is_comparable, value))
    if type(value) is dict:
        return all(map(is_comparable, value)) and all(map(is_comparable, value.values()))
    if isinstance(value, type):
        # A class of the user's has attributes that may change.
        return not own_classes(value)
    return isinstance(value, _COMPARABLE) or (is_function_of_its_arguments(value) and is_held_with_constants(value))


def is_same(current: Any, value: Any) -> bool:
    """Like ==, but 2 and 2.0, 0.0 and -0.0, and two orders of a dict are different."""
    # A tensor in the place of a number has an == of its own.
    if type(current) is not type(value):
        return False
    if isinstance(value, dict):
        return len(current) == len(value) and all(map(is_same, current.items(), value.items()))
    if isinstance(value, (list, tuple)):
        return len(current) == len(value) and all(map(is_same, current, value))
    same: bool = current == value
    return same and (type(value) is not float or math.copysign(1.0, current) == math.copysign(1.0, value))


@contextmanager
def recorded(module: nn.Module, reads: Reads, called: set[int]) -> Iterator[None]:
    """Records the attributes that are read of a module and its submodules.

    nn.Module itself is patched, not the classes of the modules: a registry of subclasses would see a new
    class.

    Args:
        module: the module whose forward is read.
        reads: gets the attributes.
        called: id() of modules that were called and may have written their attributes; HOOKED for all
            modules.

    Raises:
        Unreadable: in the body, where an attribute is written, or is read after a call that may have written
            it.
    """
    paths = {id(part): tuple(name.split(".")) if name else () for name, part in module.named_modules()}
    thread = threading.get_ident()

    def path_of(part: nn.Module) -> Path | None:
        return paths.get(id(part)) if threading.get_ident() == thread else None

    def __getattribute__(self: nn.Module, name: str) -> Any:
        path = path_of(self)
        if path is None:
            return object.__getattribute__(self, name)
        frame = sys._getframe(1)
        if not is_torchs(frame):
            if name in _ALL_TENSORS:
                raise Unreadable(f"reads {_dotted(path, name)}, whose tensors have no names in a graph")
            if name == "__class__" and is_attribute_written_out(frame):
                raise Unreadable(f"reads {_dotted(path, name)}, which conversion changes")
            if issubclass(type(self), torch.jit.ScriptModule) and name != "__class__":
                raise Unreadable(f"reads {_dotted(path, name)} of a scripted module")
            if path:
                # The class decides what the methods do and what isinstance answers.
                reads[path, "__class__"] = class_before(self)
        if issubclass(type(self), torch.jit.ScriptModule):
            return object.__getattribute__(self, name)
        own = object.__getattribute__(self, "__dict__")
        try:
            value = object.__getattribute__(self, name)
        except AttributeError:
            try:
                value = type(self).__getattr__(self, name)
            except AttributeError:
                reads.setdefault((path, name), MISSING)
                raise
            if value is None:
                _note(path, reads, name, value)
            return value
        if (name in own or _is_default(type(self), path, name)) and name not in OF_EVERY_MODULE:
            if id(self) in called or HOOKED in called:
                if name != "training":
                    raise Unreadable(f"reads {_dotted(path, name)} after a call that may write it")
                reads[path, name] = NOT_COMPARABLE
            if isinstance(value, (list, dict, set)) and _is_held_by_one(module, called, value):
                raise Unreadable(f"reads {_dotted(path, name)} after a call that may write it")
            after = None if is_comparable(value) or is_torchs(frame) else attribute_after(frame)
            if after is not None and (of_value := own_constant(value, after)) is not MISSING:
                # Of an object only this attribute is read.
                if called:
                    raise Unreadable(f"reads {_dotted(path, name)}.{after} after a call that may write it")
                reads[path, f"{name}.{after}"] = of_value
            else:
                _note(path, reads, name, value)
        elif not is_torchs(frame) and isinstance(value, MethodType) and value.__self__ is self and own_classes(type(self)):
            # A method that is set on the instance later is another value.
            reads[path, name] = value.__func__
        return value

    def refusing(original: Any) -> Callable[..., None]:
        def write(self: nn.Module, name: str, *value: Any) -> None:
            path = path_of(self)
            if path is not None:
                raise Unreadable(f"writes {_dotted(path, name)}")
            original(self, name, *value)

        return write

    methods = {
        "__getattribute__": __getattribute__,
        "__setattr__": refusing(nn.Module.__setattr__),
        "__delattr__": refusing(nn.Module.__delattr__),
    }
    before = {name: nn.Module.__dict__[name] for name in methods if name in nn.Module.__dict__}
    for name, method in methods.items():
        setattr(nn.Module, name, method)
    try:
        yield
    finally:
        for name in methods:
            if name in before:
                setattr(nn.Module, name, before[name])
            else:
                delattr(nn.Module, name)


def base_class(kind: type) -> type[nn.Module] | None:
    """The class that a block had before conversion; None if `kind` is not the class of a converted block."""
    base: type[nn.Module] | None = kind.__dict__.get(BASE)
    return base


def class_before(module: nn.Module | None) -> type:
    """The class that a module had before conversion."""
    kind: type = type(module)
    own = {} if module is None else module.__dict__
    return base_class(kind) or own.get(ORIGINAL) or kind


def _is_default(kind: type[nn.Module], path: Path, name: str) -> bool:
    """Whether a class has a plain value of that name, which is the default until an instance sets its own."""
    for base in kind.__mro__:
        if name in base.__dict__:
            value = base.__dict__[name]
            if isinstance(value, MemberDescriptorType):
                return True
            if hasattr(type(value), "__get__"):
                function = value.fget if isinstance(value, property) else value.__func__ if isinstance(value, staticmethod) else value
                is_known = isinstance(value, GetSetDescriptorType) or base.__module__.startswith(("torch.", "builtins"))
                if not is_known and not is_function_of_its_arguments(function):
                    # A class method reads the class. A cache would keep what is computed during reading.
                    raise Unreadable(f"reads {_dotted(path, name)}, a {type(value).__name__}, which may change without notice")
                return False
            return base is not nn.Module
    return False


def _note(path: Path, reads: Reads, name: str, value: Any) -> None:
    # The forward itself has put a proxy there.
    if (path, name) in reads or issubclass(type(value), Proxy):
        return
    if not is_comparable(value):
        reads[path, name] = NOT_COMPARABLE
        raise Unreadable(f"reads {_dotted(path, name)}, a {type(value).__name__}, which may change without notice")
    if isinstance(value, (list, dict, set)) and not value:
        reads[path, name] = copy.copy(value)
        raise Unreadable(f"reads {_dotted(path, name)}, an empty {type(value).__name__}, which may be filled later")
    reads[path, name] = copy.deepcopy(value)


def own_constant(value: object, name: str) -> Any:
    """The constant that an object itself has as an attribute, which no code computes; MISSING if there is none."""
    try:
        found = object.__getattribute__(value, "__dict__").get(name, MISSING)
    except AttributeError:
        return MISSING
    # The class may have a constant of that name as the default. Anything else may be a descriptor.
    of_class = next((base.__dict__[name] for base in type(value).__mro__ if name in base.__dict__), None)
    if not is_constant(found) or not is_constant(of_class):
        return MISSING
    return found if getattr(value, name, MISSING) is found else MISSING


def _is_held_by_one(module: nn.Module, called: set[int], container: Any) -> bool:
    """Whether a submodule that was called has this container, and may have written into it."""
    return bool(called) and any(
        part is container
        for submodule in module.modules()
        if id(submodule) in called
        for attribute in vars(submodule).values()
        for part in held(attribute)
    )


def _dotted(path: Path, name: str) -> str:
    return ".".join(("self", *path, name))


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Sets the mode of a module, and puts back all modes and attributes afterwards.

    Raises:
        Unreadable: afterwards, if an attribute was written meanwhile.
    """
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    before = [dict(part.__dict__) for part in parts]
    for part in parts:
        # Not by an assignment, which a __setattr__ of the user's may refuse.
        part.__dict__["training"] = training
    with_mode = [dict(part.__dict__) for part in parts]
    classes = {kind for part in parts for kind in own_classes(type(part))}
    of_classes = {kind: _attributes_of(kind) for kind in classes}
    named = [(f"self.{name}", value) for state in before for name, value in state.items()]
    named += [(f"{kind.__name__}.{name}", value) for kind, state in of_classes.items() for name, value in state.items()]
    contents = [(name, container, _contents(container)) for name, value in named for container in containers(value)]
    written: list[str] = []
    try:
        yield
    finally:
        for name, container, content in contents:
            if not _is_identical(_contents(container), content):
                written.append(name)
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for part, of_mode, original in zip(parts, with_mode, before, strict=True):
            written += [f"self.{name}" for name in _changed(of_mode, part.__dict__)]
            restore(part, original)
        for kind, attributes in of_classes.items():
            for name in _changed(attributes, _attributes_of(kind)):
                written.append(f"{kind.__name__}.{name}")
                setattr(kind, name, attributes[name]) if name in attributes else delattr(kind, name)
    if written:
        raise Unreadable(f"writes {written[0]}")


def restore(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Gives a module the attributes that it had.

    Values are set before others are deleted, so that an interrupt leaves no attribute missing.
    """
    module.__dict__.update(attributes)
    for name in module.__dict__.keys() - attributes.keys():
        del module.__dict__[name]


def _attributes_of(kind: type) -> dict[str, Any]:
    """The attributes of a class, without names with two underscores, which Python may add at first use."""
    return {name: value for name, value in kind.__dict__.items() if not name.startswith("__")}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    if _is_identical(_contents(before), _contents(after)):
        return []
    return [name for name in {**after, **before} if after.get(name, MISSING) is not before.get(name, MISSING)]


def containers(value: Any) -> Iterator[Any]:
    """The value itself if it is a list, dict, set or tuple, and all of these inside it, without repeats."""
    if not isinstance(value, (list, dict, set, tuple)):
        return
    stack, seen = [value], set()
    while stack:
        container = stack.pop()
        if isinstance(container, (list, dict, set, tuple)) and id(container) not in seen:
            seen.add(id(container))
            yield container
            stack += reversed(_items(container))


def held(value: Any) -> Iterator[Any]:
    """A value, and everything inside it if it is a container."""
    yield value
    for container in containers(value):
        yield from _items(container)


def reachable(module: nn.Module) -> set[int]:
    """id() of each module and tensor that the code of a module may come to: itself, what it owns and what plain attributes hold."""
    found: set[int] = set()
    stack: list[Any] = [module]
    while stack:
        value = stack.pop()
        if not isinstance(value, (nn.Module, torch.Tensor)) or id(value) in found:
            continue
        found.add(id(value))
        if isinstance(value, nn.Module):
            stack += [*value._modules.values(), *value._parameters.values(), *value._buffers.values()]
            stack += [each for name, attribute in vars(value).items() if name not in OF_EVERY_MODULE for each in held(attribute)]
    return found


def _items(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _contents(container: Any) -> list[Any]:
    return list(container.items()) if isinstance(container, dict) else list(container)


def _is_identical(left: list[Any], right: list[Any]) -> bool:
    """Whether two contents are the same objects: == may be elementwise, or give a proxy."""
    if len(left) != len(right):
        return False
    return all(
        a is b or (type(a) is type(b) is tuple and len(a) == len(b) and all(map(operator.is_, a, b)))
        for a, b in zip(left, right, strict=True)
    )
