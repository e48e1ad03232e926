"""Batch norms that apply an activation in their own forward, as timm's BatchNormAct2d does.

Such a forward reads self.training, so it is traced once in each mode. convert and fold take it if both graphs
are exactly a batch norm and submodules that are applied to its output one after another.
"""

import inspect
import operator

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from gradkernels.acts import act_of_module, resolve_act
from gradkernels.conversion.guard import Expected, RewrittenForward, children_of, has_hooks, normalize
from gradkernels.conversion.patterns import expected, is_identity
from gradkernels.conversion.result import RewriteResult, Site
from gradkernels.conversion.trace import Reading, read

_ARGUMENTS = list(inspect.signature(F.batch_norm).parameters)
_STATE = ["running_mean", "running_var", "weight", "bias"]


def applied_modules(bn: _BatchNorm) -> list[nn.Module] | None:
    """The submodules that a batch norm applies in its own forward; None if the forward does anything else."""
    names = names_after(bn, read(bn, torch.Tensor, (), {}))
    return None if names is None else [bn.get_submodule(name) for name in names]


def rewrite_norm_act(block: nn.Module, reading: Reading, residual: bool) -> RewriteResult:
    """The result for such a batch norm; without sites for any other module."""
    names = names_after(block, reading)
    if not names:
        return RewriteResult()
    *before, act = layers = [block.get_submodule(name) for name in names]
    site = Site(block, ", ".join(type(module).__name__ for module in (block, *layers)))
    if any(map(has_hooks, layers)):
        site.why = "a module that it applies has a hook"
    elif not all(map(is_identity, before)):
        site.why = f"{type(before[0]).__name__} is applied before its activation"
    elif act_of_module(act) is None or any(True for _ in act.parameters()):
        site.why = f"there is no kernel for {type(act).__name__} with batch norm"
    not_called: tuple[Expected, ...] = ()
    if site.why:
        site.label = "batch_norm_act(identity)"
        result = "normalize(self, x, None, 'identity', 0.0)"
        for name in names:
            result = f"self.{name}({result})"
    else:
        act_name, act_param = resolve_act(act, None)
        not_called = tuple(expected((name,), module) for name, module in zip(names, layers, strict=True))
        site.label, site.is_fused, site.absorbed = f"batch_norm_act({act_name})", act_name != "identity", (act,)
        site.why = "" if site.is_fused else "its activation is nn.Identity"
        result = f"normalize(self, x, None, {act_name!r}, {act_param!r})"
    source = f"def forward(self, x):\n    return {result}\n"
    children = (((), children_of(block, False)),)
    names_used, original = {"normalize": normalize}, type(block).forward
    forward = RewrittenForward(source, names_used, reading.attributes, children, not_called, residual, original, False, ())
    return RewriteResult([site], forward)


def names_after(block: nn.Module, reading: Reading) -> list[str] | None:
    """The names of the submodules that are applied, if they are the same in both modes."""
    if not isinstance(block, _BatchNorm) or reading.by_mode is None:
        return None
    training, evaluation = (_names_in(block, each.graph, mode) for each, mode in zip(reading.by_mode, (True, False), strict=True))
    return training if training == evaluation else None


def _names_in(block: _BatchNorm, graph: Graph | None, training: bool) -> list[str] | None:
    assert graph is not None
    nodes = list(graph.nodes)
    output = nodes[-1]
    if len(output.all_input_nodes) != 1:
        return None
    (node,) = output.all_input_nodes
    checked = {output}
    names: list[str] = []
    while node.op == "call_module" and len(node.all_input_nodes) == 1 and node.args == tuple(node.all_input_nodes):
        names.insert(0, str(node.target))
        checked.add(node)
        (node,) = node.all_input_nodes
    if node.target is not F.batch_norm:
        return None
    arguments = [str(value.target) if isinstance(value, Node) else value for value in (*node.args, *node.kwargs.values())]
    inputs = [str(other.target) for other in nodes if other.op == "placeholder"]
    by_name = list(node.kwargs)
    if arguments != [*inputs, *_STATE, training, block.momentum, block.eps] or by_name != _ARGUMENTS[len(_ARGUMENTS) - len(by_name) :]:
        return None
    checked.add(node)
    counted = 0
    for node in nodes:
        if node in checked or node.op in ("placeholder", "get_attr"):
            continue
        if node.target == "add_" and [str(argument) for argument in node.args] == ["num_batches_tracked", "1"]:
            counted += 1
        elif node.target not in (getattr, operator.eq, torch._assert):
            return None
    return names if counted == training else None
