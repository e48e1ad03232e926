"""The class of a converted block, which gives it its fused forward.

A pickle of a converted model names nothing of this package but `new_block` here and modules that users may name themselves, and a fused
forward is not in it: that is made anew from what the block's class does where the pickle is loaded. So a pickle serves later versions of
this package and of the block, as one of the model before conversion does.
"""

import functools
import types
from typing import Any, cast

from torch import nn

from gradkernels._native import refuse_script
from gradkernels.fused_forward import ATTRIBUTE, FusedForward
from gradkernels.fusion import fuse

# What an object without a __reduce__ of its own is made again by.
_NEW_OBJECT = object().__reduce_ex__(2)[0]


class Fused:
    """What the class of every converted block has first among its bases; second is the class that the block had."""

    __prepare_scriptable__ = refuse_script

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name to be found by; it is made again from the one below it.
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        if isinstance(reduced, tuple) and reduced[0] is _NEW_OBJECT:
            (kind, *args), *rest = reduced[1:]
            return new_block, (base_class(kind), *args), *rest
        return reduced

    def __setstate__(self, state: Any) -> None:
        parent: Any = super()
        parent.__setstate__(state)
        residual = self.__dict__.get(ATTRIBUTE)
        if isinstance(residual, bool):
            block = cast(nn.Module, self)
            block.__dict__.pop(ATTRIBUTE)
            forward = fuse(block, residual).forward
            if forward is not None:
                block.__dict__[ATTRIBUTE] = forward


def new_block(base: type[nn.Module], *args: Any) -> Any:
    """An instance of fused_class(base) before its state is set."""
    kind = fused_class(base)
    return kind.__new__(kind, *args)


def base_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of the block before it was converted."""
    return kind.__bases__[1]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the same name whose instances run their fused forward where they have one that holds; the same for every call."""
    if base in _CLASSES:
        return _CLASSES[base]

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fused = self.__dict__.get(ATTRIBUTE)
        if isinstance(fused, FusedForward) and fused.holds(self):
            return fused.function(self, *args, **kwargs)
        return base.forward(self, *args, **kwargs)

    body = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    kind = types.new_class(base.__name__, (Fused, base), exec_body=lambda namespace: namespace.update(body))
    _CLASSES[base] = cast(type[nn.Module], kind)
    return _CLASSES[base]
