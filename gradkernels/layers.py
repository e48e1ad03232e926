"""Facts about layers of a model: kinds, names, the order in which they run, the dimension of their units."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

# The layers whose weights init writes and diagnose judges.
WEIGHTS = (nn.Linear, nn.modules.conv._ConvNd)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

_UNITS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.RNNBase)
_UNITS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


def kind_of(value: object) -> str:
    """Describe a value of the wrong kind, for the message of an exception."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_model(model: object) -> None:
    """Raise a TypeError if a model is not a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {kind_of(model)}")


def added_names(kind: type[nn.Module], replacement: type[nn.Module]) -> frozenset[str]:
    """The names that an instance of `replacement` has, and an instance of `kind` does not have."""
    # torch.compile gives classes more names.
    return _names_of_instances((replacement, *dir(replacement))) - _names_of_instances((kind, *dir(kind)))


@functools.cache
def _names_of_instances(kind_and_names: tuple[Any, ...]) -> frozenset[str]:
    # The class alone does not show what __init__ sets. Each class that is replaced takes 1 as its argument, group norm twice.
    kind = kind_and_names[0]
    with torch.device("meta"):
        return frozenset(dir(kind(1, 1) if issubclass(kind, nn.GroupNorm) else kind(1)))


def why_not_replaced(module: nn.Module, replacement: type[nn.Module], *more: str) -> str:
    """Why a module cannot get the class `replacement`, which uses `more` names of instances; "" if it can."""
    taken = sorted((added_names(type(module), replacement) | {*more}) & {*dir(module)})
    return f"it has attributes of its own that {replacement.__name__} would replace: {', '.join(taken)}" if taken else ""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's model inside DistributedDataParallel and torch.compile, so that names have no prefix.

    Raises:
        TypeError: model is not a torch.nn.Module, or holds a torch.jit.ScriptModule.
    """
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            advice = "which has no hooks and cannot be traced: pass the module it was made from"
            raise TypeError(f"{name or 'model'} is a torch.jit.ScriptModule, {advice}")
    while True:
        inner = model._modules.get("_orig_mod") or (model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def layer_name(parameter_name: str) -> str:
    """The name of the module that a parameter belongs to; "(model)" for the model's own parameters."""
    return parameter_name.rpartition(".")[0] or "(model)"


def learns(parameter: nn.Parameter) -> bool:
    """Whether a parameter requires a gradient and has elements. A lazy parameter will have elements."""
    return parameter.requires_grad and (is_lazy(parameter) or parameter.numel() > 0)


def by_first_call(names: Iterable[str], called: Mapping[str, int]) -> list[str]:
    """Sort layers by their first calls. A layer that was never called follows the one before it in `names`.

    Args:
        names: the layers, in the order in which they are registered.
        called: layer -> the position of its first call.
    """
    keys, place = [], -1
    for number, name in enumerate(names):
        place = called.get(name, place)
        keys.append((place, -1 if name in called else number, name))
    return [name for _, _, name in sorted(keys)]


def unit_dim(module: nn.Module, otherwise: int) -> int:
    """The dimension along which the units of a module's output lie.

    `otherwise` is that of the layer before, which an activation keeps.
    """
    if isinstance(module, _UNITS_LAST):
        return -1
    return 1 if isinstance(module, _UNITS_SECOND) else otherwise
