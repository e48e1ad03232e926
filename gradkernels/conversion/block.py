"""The class of a converted block. Its instances run their rewritten forward.

A pickle of a converted model names `new_block`, and nothing else that is internal to this package. The
rewritten forward is not in the pickle: it is made again from the forward of the block's class where the
pickle is loaded. So a pickle works with later versions of this package and of the block, as it would without
conversion.
"""

import abc
import functools
import types
from typing import Any, Protocol, cast

from torch import nn

from gradkernels._native import refuse_script
from gradkernels.conversion.attributes import BASE, base_class
from gradkernels.conversion.guard import FORWARD, RewrittenForward
from gradkernels.conversion.rewrite import Reader, rewrite_forward

# The function that pickle calls to make an object of a class without a __reduce__ of its own.
_NEW_OBJECT = object().__reduce_ex__(2)[0]


def new_block(base: type[nn.Module], *args: Any) -> Any:
    """A new instance of converted_class(base), whose state pickle sets next."""
    kind = converted_class(base)
    return kind.__new__(kind, *args)


def why_not_derived(kind: type[nn.Module]) -> str | None:
    """Why a subclass would be seen by code other than this package's; None if it would not."""
    bases = [base for base in kind.__mro__ if base.__module__ != "builtins"]
    if any("__init_subclass__" in base.__dict__ for base in bases if base.__module__ != "typing"):
        return "has an __init_subclass__, which would see the class of a converted block"
    if any("__reduce__" in base.__dict__ or "__reduce_ex__" in base.__dict__ for base in bases):
        return "has its own method for pickling, which would name the class of a converted block"
    if type(kind) not in (type, abc.ABCMeta, type(Protocol)):
        return f"has the metaclass {type(kind).__name__}, which would see the class of a converted block"
    return None


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def converted_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the same name, whose instances run their rewritten forward while its conditions hold.

    Every call with one base returns the same class. The class has no other base: for some classes of blocks a
    second base would change the layout of instances, and Python refuses such a change of class.
    """
    if base in _CLASSES:
        return _CLASSES[base]

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        rewritten = self.__dict__.get(FORWARD)
        while isinstance(rewritten, RewrittenForward) and base.forward is rewritten.original:
            arguments = rewritten.arguments(args, kwargs)
            if arguments is not None and rewritten.holds(self):
                return rewritten.function(self, *arguments[0], **arguments[1])
            rewritten = rewritten.otherwise
        return base.forward(self, *args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # Pickle cannot find this class by its name, so new_block makes it from `base`.
        reduced: Any = base.__reduce_ex__(self, max(2, protocol))
        if isinstance(reduced, tuple) and reduced[0] is _NEW_OBJECT:
            (_, *args), *rest = reduced[1:]
            return new_block, (base, *args), *rest
        return reduced

    def __setstate__(self: nn.Module, state: Any) -> None:
        base.__setstate__(self, state)
        pickled = self.__dict__.get(FORWARD)
        # Version 0.1.0 wrote whether additions were fused, and nothing else.
        if isinstance(pickled, (bool, tuple)):
            self.__dict__.pop(FORWARD)
            residual, calls = pickled if isinstance(pickled, tuple) else (pickled, ((),))
            # Forwards of children are read too, if they are written out in this one.
            kinds = [(part, type(part)) for part in self.modules()]
            try:
                for part, kind in kinds:
                    object.__setattr__(part, "__class__", base_class(kind) or kind)
                rewritten = rewrite_forward(self, residual, Reader(), calls).forward
            finally:
                for part, kind in kinds:
                    object.__setattr__(part, "__class__", kind)
            if rewritten is not None:
                self.__dict__[FORWARD] = rewritten

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
