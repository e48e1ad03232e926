"""The calls that are recognised as norms, additions and activations, however they are written.

A norm is a batch, group or instance norm.
"""

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from gradkernels import activation
from gradkernels.acts import act_of_module, act_of_spelling, check_act, resolve_act
from gradkernels.batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from gradkernels.conversion.attributes import ORIGINAL, Path, held
from gradkernels.conversion.guard import Expected, has_hooks, normalize
from gradkernels.conversion.purity import functions_from_forward, names_from_forward
from gradkernels.frozen_batch_norm_act import FrozenBatchNormAct2d
from gradkernels.group_norm_act import GroupNormAct, InstanceNormAct1d, InstanceNormAct2d, InstanceNormAct3d
from gradkernels.layers import added_names, why_not_replaced

# torch's class -> ours, which computes the same as long as its `act` is "identity".
NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNormAct1d,
    nn.BatchNorm2d: BatchNormAct2d,
    nn.BatchNorm3d: BatchNormAct3d,
    nn.GroupNorm: GroupNormAct,
    nn.InstanceNorm1d: InstanceNormAct1d,
    nn.InstanceNorm2d: InstanceNormAct2d,
    nn.InstanceNorm3d: InstanceNormAct3d,
}
# Functions that compute what these modules do.
NORM_FUNCTIONS = (F.batch_norm, torch.batch_norm, F.group_norm, torch.group_norm, F.instance_norm, torch.instance_norm)
_FUSIBLE = {*NORMS, *NORMS.values(), FrozenBatchNormAct2d}
# The module and the name of classes of other libraries that compute what FrozenBatchNormAct2d does. They keep their class, of
# which those libraries ask, and whose loading of checkpoints differs.
_FROZEN = (("torchvision.ops.misc", "FrozenBatchNorm2d"), ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"))
# The same for one that then applies submodules.
_FROZEN_NORM_ACT = ("timm.layers.norm_act", "FrozenBatchNormAct2d")
# Activations without a norm: torch's class -> ours.
ACTIVATION_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    nn.LeakyReLU: activation.LeakyReLU,
    nn.ELU: activation.ELU,
    nn.PReLU: activation.PReLU,
    nn.SiLU: activation.SiLU,
}
# torch's function -> ours. Ours for F.silu has no version in place.
ACTIVATION_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), activation.leaky_relu),
    **dict.fromkeys((F.elu, F.elu_), activation.elu),
    F.silu: activation.swish,
    F.prelu: activation.prelu,
}
# Functions and methods that are activations without a kernel.
OTHER_FUNCTIONS = {
    *(F.celu, F.glu, F.hardsigmoid, F.hardtanh, F.logsigmoid, F.rrelu, F.selu, F.softplus, F.softsign),
    *(F.sigmoid, torch.sigmoid, "sigmoid", F.tanh, torch.tanh, "tanh"),
}
# With p = 0 these return their argument itself. The other dropouts do so for some shapes only.
_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout)
# Modules that a forward may loop over or index without calling them.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Additions that write the sum into their first term.
WRITING_ADDITIONS = (operator.iadd, "add_")
ADDITIONS = (operator.add, torch.add, "add", *WRITING_ADDITIONS)


IS_RETURNED = "its output is returned, no activation follows"
HAS_SCALE = "is called with a scale, which the kernel does not have"


@dataclass(frozen=True)
class Activation:
    """A call of an activation that the kernel computes after a norm.

    Attributes:
        act: a key of ACTS.
        act_param: the parameter of the activation.
        module: the module that is called; None for a function.
        name: the name of the class or the function, for the report.
    """

    act: str
    act_param: float
    module: nn.Module | None
    name: str


@dataclass
class Chain:
    """A norm and the calls after it that are fused with it. Each uses the value of the one before it.

    Attributes:
        nodes: all of them, and any module between them that returns its argument.
        expected: those of the nodes that call modules.
        relied_on: calls of modules between them that must neither write nor return what the kernel reads.
        act: a key of ACTS; "identity" without an activation.
        act_param: the parameter of the activation.
        residual: the value that is added; None without an addition.
        addition: the node that adds it.
        names: what is fused with the norm, for the report.
        absorbed: the activation, if it is a module.
    """

    nodes: list[Node]
    expected: list[Node]
    act: str = "identity"
    act_param: float = 0.0
    residual: Node | None = None
    addition: Node | None = None
    names: list[str] = field(default_factory=list)
    absorbed: list[nn.Module] = field(default_factory=list)
    relied_on: list[Node] = field(default_factory=list)


def ours_for(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Our class for a class of norm or of activation; None if there is none."""
    return NORMS.get(kind) or ACTIVATION_MODULES.get(kind)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm, also of a class that may compute something else."""
    return isinstance(module, (_BatchNorm, FrozenBatchNormAct2d)) or is_frozen_elsewhere(module) or is_frozen_norm_act(module)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch, group or instance norm, also of a class that may compute something else."""
    return isinstance(module, (nn.GroupNorm, _InstanceNorm)) or is_batch_norm(module)


def operator_of(norm: nn.Module) -> str:
    """What computes a norm and an activation, for the report."""
    kinds = {nn.GroupNorm: "group_norm_act", _InstanceNorm: "instance_norm_act"}
    return next((name for kind, name in kinds.items() if isinstance(norm, kind)), "batch_norm_act")


def is_fusible(module: nn.Module) -> bool:
    """Whether a module is of a class of norm that can be fused. A subclass may compute something else."""
    return type(module) in _FUSIBLE or is_frozen_elsewhere(module)


def is_frozen_elsewhere(module: nn.Module) -> bool:
    """Whether a module is a frozen batch norm of another library."""
    return (type(module).__module__, type(module).__name__) in _FROZEN


def is_frozen_norm_act(module: nn.Module) -> bool:
    """Whether a module is a frozen batch norm of another library that applies submodules in its own forward."""
    return (type(module).__module__, type(module).__name__) == _FROZEN_NORM_ACT


def is_identity(module: Any) -> bool:
    """Whether a module returns its argument itself: nn.Identity, or a dropout with p = 0."""
    return type(module) is nn.Identity or (type(module) in _DROPOUTS and type(module.p) in (int, float) and module.p == 0)


def called_module(block: nn.Module, node: Node) -> nn.Module | None:
    """The submodule that a node calls; None if it does something else."""
    return block.get_submodule(str(node.target)) if node.op == "call_module" else None


def name_of(node: Node) -> str:
    """The name of the module, function or method that a node calls, for the report."""
    if node.op == "call_module":
        return str(node.target)
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def way_to_user(block: nn.Module, node: Node) -> tuple[list[Node], str]:
    """Follows the value of a node to its only user, past any module that returns its argument and any addition of 0.

    Returns:
        The nodes on the way, of which the last is the user, and the reason why the value has no such user.
        The reason is "" if it has one.
    """
    users: list[Node] = []
    while True:
        if not node.users:
            return users, "nothing uses its output"
        times = sum(sum(argument is node for argument in (*user.args, *user.kwargs.values())) or 1 for user in node.users)
        if times > 1:
            return users, f"its output is used {times} times"
        (node,) = node.users
        users.append(node)
        module = called_module(block, node)
        is_passed = module is not None and is_identity(module) and not has_hooks(module) and len(node.args) == 1
        if not is_passed and not _adds_zero(node):
            return users, ""


def _adds_zero(node: Node) -> bool:
    is_sum = node.target in ADDITIONS and len(node.args) == 2 and not node.kwargs
    return is_sum and any(type(term) is int and term == 0 for term in node.args)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation, with a kernel or without."""
    return (
        (act_of_module(module) is not None and not isinstance(module, nn.Identity))
        or (type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention))
        or isinstance(module, (activation.PReLU, activation.RReLU))
    )


def may_be_rewritten(block: nn.Module) -> bool:
    """Whether the forward of a module may call a norm or an activation that is computed or reported."""
    # A Sequential calls its children. Another forward may come to every module below it.
    is_sequential = type(block).forward is nn.Sequential.forward
    below = block.children() if is_sequential else block.modules()
    if any(isinstance(part, tuple(ACTIVATION_MODULES)) or is_norm(part) for part in below):
        return True
    if is_sequential:
        # A norm may end one child, and the next one may be its activation.
        return len(block._modules) > 1 and any(map(is_norm, block.modules()))
    functions = functions_from_forward(type(block)).union(
        value
        for attribute in block.__dict__.values()
        for value in held(attribute)
        if isinstance(value, (FunctionType, BuiltinFunctionType))
    )
    targets = functions | names_from_forward(type(block))
    return any(_is_activation_function(target) or target in NORM_FUNCTIONS for target in targets)


def _is_activation_function(target: Any) -> bool:
    """Whether a function or the name of a method is an activation, with a kernel or without."""
    return act_of_spelling(target) is not None or target in ACTIVATION_FUNCTIONS or target in OTHER_FUNCTIONS


def activation_name(node: Node, module: nn.Module | None) -> str | None:
    """The name of the activation that a node calls, with a kernel or without; None for another node."""
    if module is not None:
        return type(module).__name__ if is_activation(module) else None
    return name_of(node) if _is_activation_function(node.target) else None


def activation_after(node: Node, module: nn.Module | None) -> Activation | str:
    """The activation that a node calls, or why it cannot be fused with the norm before it."""
    if module is not None:
        return _activation_module(node, module)
    if node.op == "output":
        return IS_RETURNED
    if node.target is normalize:
        return "its output is the residual of another norm"
    name = name_of(node)
    act = act_of_spelling(node.target, node.kwargs) if node.op in ("call_function", "call_method") else None
    if act is None:
        has_no_kernel = activation_name(node, None) is not None
        return f"there is no kernel for {name}" if has_no_kernel else f"{name} follows, which is not an activation"
    if has_scale(node):
        return f"{name} {HAS_SCALE}"
    parameter = act.spellings[node.target]
    value: Any = None
    if parameter is not None:
        value = node.args[1] if len(node.args) > 1 else node.kwargs.get(parameter)
    if not (value is None or type(value) in (int, float)):
        return f"the parameter of {name} is computed"
    return Activation(act.name, check_act(act.name, value), None, name)


def _activation_module(node: Node, module: nn.Module) -> Activation | str:
    name = type(module).__name__
    if not is_activation(module):
        return f"{name} follows, which is not an activation"
    if act_of_module(module) is None:
        return f"there is no kernel for {name} after a norm"
    if any(True for _ in module.parameters()):
        return f"the parameter of {name} is learnt"
    if has_hooks(module):
        return f"{name} has a hook, which would get a different tensor if the calls were fused"
    if len(node.args) != 1 or node.kwargs:
        return f"{name} is called with more than one argument"
    return Activation(*resolve_act(module, None), module, name)


def has_scale(node: Node) -> bool:
    """Whether a node calls torch.nn.functional.elu_ with one of the two factors that elu does not take."""
    return node.target is F.elu_ and (len(node.args) > 2 or not node.kwargs.keys() <= {"input", "alpha"})


def addend(node: Node, value: Node) -> Node | None:
    """The term that a node adds to `value`; None if it adds none, or writes the sum into that term."""
    if node.target not in ADDITIONS or node.kwargs or len(node.args) != 2:
        return None
    left, right = node.args
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    if left is value:
        return right
    return None if node.target in WRITING_ADDITIONS else left


def why_kept(module: nn.Module, looked_for: Collection[str] = ()) -> str:
    """Why a module cannot get our class; "" if it can, or if there is none.

    Args:
        module: the module.
        looked_for: names of attributes that code may look for in the module, and must not find.
    """
    ours = ours_for(type(module))
    if ours is None:
        return ""
    found = sorted(added_names(type(module), ours).intersection(looked_for))
    if found:
        return f"a forward looks for an attribute {found[0]}, which {ours.__name__} has"
    return why_not_replaced(module, ours, ORIGINAL)


def keeps_output(module: nn.Module) -> bool:
    """Whether our class for a module keeps its output for the gradient, where torch's keeps its input."""
    return isinstance(module, nn.ELU) and not module.inplace


def expected(path: Path, module: nn.Module) -> Expected:
    """The condition on a norm, an activation or a dropout that a rewritten forward does not call.

    It may have the class that convert gives it where it is called elsewhere.
    """
    kind = type(module)
    if is_frozen_elsewhere(module):
        return Expected(path, (kind,), None, None)
    if is_norm(module):
        return Expected(path, (NORMS.get(kind, kind),), "act", "identity")
    act = act_of_module(module)
    attribute = "p" if kind in _DROPOUTS else None if act is None else act.attribute_of(kind)
    kinds = tuple({kind, ACTIVATION_MODULES.get(kind, kind)})
    return Expected(path, kinds, attribute, None if attribute is None else getattr(module, attribute))
