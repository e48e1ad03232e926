"""The class of a converted block, which gives it its fused forward.

A pickle of a converted model names nothing of this package but `new_block` here and modules that users may name themselves, and a fused
forward is not in it: that is made anew from what the block's class does where the pickle is loaded. So a pickle serves later versions of
this package and of the block, as one of the model before conversion does.
"""

import abc
import functools
import types
from typing import Any, Protocol, cast

from torch import nn

from gradkernels._native import refuse_script
from gradkernels.conversion.guard import ATTRIBUTE, BASE, RewrittenForward
from gradkernels.conversion.rewrite import rewrite_forward

# What an object without a __reduce__ of its own is made again by.
_NEW_OBJECT = object().__reduce_ex__(2)[0]


def new_block(base: type[nn.Module], *args: Any) -> Any:
    """An instance of converted_class(base) before its state is set."""
    kind = converted_class(base)
    return kind.__new__(kind, *args)


def why_not_derived(kind: type[nn.Module]) -> str | None:
    """Why a class can have no subclass that nobody but this package sees."""
    if any("__init_subclass__" in each.__dict__ for each in kind.__mro__ if each.__module__ not in ("builtins", "typing")):
        return "has an __init_subclass__, which would see the class of a converted block"
    if any("__reduce__" in each.__dict__ or "__reduce_ex__" in each.__dict__ for each in kind.__mro__ if each.__module__ != "builtins"):
        return "is pickled by a method of its own, which would name the class of a converted block"
    if type(kind) not in (type, abc.ABCMeta, type(Protocol)):
        return f"is made by {type(kind).__name__}, which would see the class of a converted block"
    return None


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def converted_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the same name whose instances run their fused forward where they have one that holds; the same for every call.

    It has no other base, which would change the layout of instances of classes whose own first base has no __dict__.
    """
    if base in _CLASSES:
        return _CLASSES[base]

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        rewritten = self.__dict__.get(ATTRIBUTE)
        # A forward may ask an argument whether it is None, which no graph records.
        nothing = any(each is None for each in (*args, *kwargs.values()))
        if isinstance(rewritten, RewrittenForward) and base.forward is rewritten.of and not nothing and rewritten.holds(self):
            return rewritten.function(self, *args, **kwargs)
        return base.forward(self, *args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # The class has no name to be found by; it is made again from the one below it.
        reduced: Any = base.__reduce_ex__(self, max(2, protocol))
        if isinstance(reduced, tuple) and reduced[0] is _NEW_OBJECT:
            (_, *args), *rest = reduced[1:]
            return new_block, (base, *args), *rest
        return reduced

    def __setstate__(self: nn.Module, state: Any) -> None:
        base.__setstate__(self, state)
        residual = self.__dict__.get(ATTRIBUTE)
        if isinstance(residual, bool):
            self.__dict__.pop(ATTRIBUTE)
            kind = type(self)
            object.__setattr__(self, "__class__", base)
            forward = rewrite_forward(self, residual).forward
            object.__setattr__(self, "__class__", kind)
            if forward is not None:
                self.__dict__[ATTRIBUTE] = forward

    own = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__setstate__": __setstate__,
        BASE: base,
        "__prepare_scriptable__": refuse_script,
    }
    named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    kind = types.new_class(base.__name__, (base,), exec_body=lambda namespace: namespace.update(own | named))
    _CLASSES[base] = cast(type[nn.Module], kind)
    return _CLASSES[base]
