"""Judges what convert fuses, without its code and its report: from the calls of one run before and of one run after conversion.

A pair is the call of an activation that a kernel computes after a norm, if its input is the output of a batch, group or instance norm, or
the sum of such an output and tensors of its shape, and if nothing else reads the output and the sums. So an activation is in one pair, also
after a sum of several norms. A pair is fused if batch_norm_act or group_norm_act computes it in a run of the converted model.
"""

import collections
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradkernels.acts import act_of_module, act_of_spelling

NORMS = (F.batch_norm, F.group_norm, F.instance_norm)
UNNAMED = "(no parameters)"
ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass(eq=False)
class Value:
    """The result of a call. readers: the calls that take it, and the model if it returns it."""

    norm: str = ""
    terms: tuple = ()
    readers: int = 0

    def norms(self):
        """The names of the norms whose outputs reach this value, directly or through sums, and no other reader."""
        if self.readers != 1:
            return set()
        return {self.norm} if self.norm else {name for term in self.terms for name in term.norms()}


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def owners(model):
    """The address of a parameter or a buffer -> the name of its module."""
    own = ((name, tensor) for name, module in model.named_modules() for tensor in (*module.parameters(False), *module.buffers(False)))
    return {tensor.data_ptr(): name for name, tensor in own}


class Pairs(TorchFunctionMode):
    """Records the values of one run."""

    def __init__(self, model):
        super().__init__()
        self.owners, self.values, self.activated = owners(model), {}, {}
        self.tensors = []  # A tensor that is freed gives its id to another one.
        for name, module in model.named_modules():
            act = act_of_module(module)
            if act is not None and not isinstance(module, nn.Identity):
                module.register_forward_pre_hook(functools.partial(self.note_activation, act))
            if "FrozenBatchNormAct" in type(module).__name__:
                module.drop.register_forward_pre_hook(functools.partial(self.note_input, name))
            elif "FrozenBatchNorm" in type(module).__name__ or isinstance(module, _InstanceNorm):
                module.register_forward_hook(functools.partial(self.note_output, name))

    def note_activation(self, act, module, arguments):
        self.activated[self.value(arguments[0])] = act.name

    def note_output(self, name, module, arguments, y):
        # It calls no function of batch norm, or has no parameter that could tell its name.
        self.value(y).norm = name

    def note_input(self, name, module, arguments):
        self.value(arguments[0]).norm = name

    def value(self, tensor):
        if id(tensor) not in self.values:
            self.new_value(tensor)
        return self.values[id(tensor)]

    def new_value(self, tensor):
        self.tensors.append(tensor)
        self.values[id(tensor)] = Value()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, given = getattr(function, "__name__", ""), tensors_in((args, kwargs))
        versions = [tensor._version for tensor in given]
        result = function(*args, **(kwargs or {}))
        results, is_write = tensors_in(result), versions != [tensor._version for tensor in given]
        # It computes nothing if it returns no tensor, or its argument, as a dropout that is off.
        if not is_write and all(any(each is tensor for tensor in given) for each in results):
            return result
        inputs = [self.value(tensor) for tensor in given]
        for value in inputs:
            value.readers += 1
        if act := act_of_spelling(function, kwargs or {}) or act_of_spelling(name, kwargs or {}):
            self.activated[inputs[0]] = act.name
        # A call in place returns its argument, which has another value from now on.
        for tensor in results:
            self.new_value(tensor)
        if function in NORMS:
            self.value(result).norm = next((self.owners[each.data_ptr()] for each in given[1:] if each.data_ptr() in self.owners), UNNAMED)
        # The first sum of the function sum adds 0.
        elif (
            name in ADDITIONS and not kwargs and all(each.shape == result.shape if isinstance(each, Tensor) else each == 0 for each in args)
        ):
            self.value(result).terms = tuple(inputs)
        return result

    def found(self, outputs):
        """For each pair, the activation and the names of the norms that a kernel could compute with it."""
        for tensor in outputs:
            self.value(tensor).readers += 1
        pairs = ((act, value.norms()) for value, act in self.activated.items())
        return [(act, names) for act, names in pairs if names]


class Fused(TorchDispatchMode):
    """Counts the calls of batch_norm_act and group_norm_act with an activation, by the activation and the name of the norm.

    A norm without parameters and buffers is UNNAMED.
    """

    def __init__(self, model):
        super().__init__()
        self.owners, self.calls = owners(model), collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.gradkernels.batch_norm_act.default, torch.ops.gradkernels.group_norm_act.default):
            act = next(each for each in args if isinstance(each, str))
            own = (self.owners[each.data_ptr()] for each in tensors_in(args[1:5]) if each.data_ptr() in self.owners)
            self.calls[act, next(own, UNNAMED)] += act != "identity"
        return function(*args, **(kwargs or {}))
