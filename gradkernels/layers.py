"""What a layer of a model is: its name, its kind, the order in which layers run, and the dimension of its units."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

# Layers whose weights init writes and diagnose judges.
WEIGHTS = (nn.Linear, nn.modules.conv._ConvNd)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

_UNITS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.RNNBase)
_UNITS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


def kind_of(value: object) -> str:
    """What a value is, for a sentence on an argument of the wrong kind."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel and torch.compile, whose prefixes no name needs; refuses what is no such module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch.nn.Module, not {kind_of(model)}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            reason = "which takes no hooks and cannot be traced: give the module it was made from"
            raise TypeError(f"{name or 'model'} is a torch.jit.ScriptModule, {reason}")
    while True:
        inner = model._modules.get("_orig_mod") or (model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def layer_name(parameter_name: str) -> str:
    """The module that a parameter belongs to; the model's own are those of "(model)"."""
    return parameter_name.rpartition(".")[0] or "(model)"


def learns(parameter: nn.Parameter) -> bool:
    """Whether a gradient says something of it: it requires one and has elements. One that has no shape yet is to get them."""
    return parameter.requires_grad and (is_lazy(parameter) or parameter.numel() > 0)


def by_first_call(names: Iterable[str], called: Mapping[str, int]) -> list[str]:
    """names in the order of their first calls, called; one that never was called follows the one before it."""
    keys, place = [], -1
    for number, name in enumerate(names):
        place = called.get(name, place)
        keys.append((place, -1 if name in called else number, name))
    return [name for _, _, name in sorted(keys)]


def unit_dim(module: nn.Module, otherwise: int) -> int:
    """The dimension along which the units of a module's output lie; an activation keeps that of the layer before it."""
    if isinstance(module, _UNITS_LAST):
        return -1
    return 1 if isinstance(module, _UNITS_SECOND) else otherwise
