"""Norms that apply an activation in their own forward, as timm's BatchNormAct2d and GroupNormAct do.

The forward of a batch norm reads self.training, so it is traced once in each mode. convert and fold take it if both
graphs are exactly a batch norm and submodules that are applied to its output one after another. Group norm is the
same in both modes, and so is a frozen batch norm, which is known by its class.
"""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from gradkernels.acts import act_of_module, resolve_act
from gradkernels.conversion.attributes import Path, class_before
from gradkernels.conversion.guard import Children, Expected, RewrittenForward, WrittenOut, children_of, has_hooks, has_kernel, normalize
from gradkernels.conversion.patterns import Activation, activation_after, expected, is_frozen_norm_act, is_identity, operator_of
from gradkernels.conversion.purity import ASKED
from gradkernels.conversion.result import RewriteResult, Site
from gradkernels.conversion.trace import Reading, has_own_forward, read

_STATE = ["running_mean", "running_var", "weight", "bias"]


def applied_modules(bn: nn.Module) -> list[nn.Module] | None:
    """The submodules that a norm applies in its own forward; None if the forward does anything else."""
    names = names_after(bn, read(bn, torch.Tensor, (), {}))
    return None if names is None else [bn.get_submodule(name) for name in names]


def rewrite_norm_act(block: nn.Module, reading: Reading, residual: bool, read: Callable[[nn.Module], Reading]) -> RewriteResult:
    """The result for such a norm; without sites for any other module.

    Args:
        block: any module.
        reading: what was read of its forward.
        residual: whether additions may be fused.
        read: reads the forward of an activation of the user's.
    """
    names = names_after(block, reading)
    if not names:
        return RewriteResult()
    *before, act = layers = [block.get_submodule(name) for name in names]
    site = Site(block, ", ".join(type(module).__name__ for module in (block, *layers)))
    own = _activation_of_the_users(act, read)
    if any(map(has_hooks, layers)):
        site.why = "a module that it applies has a hook"
    elif not all(map(is_identity, before)):
        site.why = f"{type(before[0]).__name__} is applied before its activation"
    elif own is None and (act_of_module(act) is None or any(True for _ in act.parameters())):
        site.why = f"there is no kernel for {type(act).__name__} after a norm"
    conditions: tuple[Expected | WrittenOut, ...] = ()
    attributes = reading.attributes
    children: list[tuple[Path, Children]] = [((), children_of(block, False))]
    if site.why:
        site.label = f"{operator_of(block)}(identity)"
        result = "normalize(self, x, None, 'identity', 0.0)"
        for name in names:
            result = f"self.{name}({result})"
    else:
        conditions = tuple(expected((name,), module) for name, module in zip(names, layers, strict=True))
        act_name, act_param = resolve_act(act, None) if own is None else own
        if own is not None:
            kind: Any = class_before(act)
            conditions = (*conditions[:-1], WrittenOut((names[-1],), kind, kind.forward))
            attributes += tuple(((names[-1], *path), name, value) for path, name, value in read(act).attributes)
            children.append(((names[-1],), children_of(act, False)))
        site.label, site.is_fused, site.absorbed = f"{operator_of(block)}({act_name})", act_name != "identity", (act,)
        site.why = "" if site.is_fused else "its activation is nn.Identity"
        result = f"normalize(self, x, None, {act_name!r}, {act_param!r})"
    original = type(block).forward
    names_used: dict[str, Any] = {"normalize": normalize}
    source = f"    return {result}\n"
    if is_frozen_norm_act(block):
        names_used |= {"has_kernel": has_kernel, "original": original}
        source = f"    if not has_kernel(self, x):\n        return original(self, x)\n{source}"
    source = f"def forward(self, x):\n{source}"
    forward = RewrittenForward(source, names_used, attributes, tuple(children), conditions, residual, original, False, ())
    return RewriteResult([site], forward)


def _activation_of_the_users(module: nn.Module, read: Callable[[nn.Module], Reading]) -> tuple[str, float] | None:
    """The activation and its parameter, if the forward of a module of the user's is nothing but a call of its function."""
    if act_of_module(module) is not None or not has_own_forward(module):
        return None
    reading = read(module)
    nodes = [] if reading.graph is None else list(reading.graph.nodes)
    if len(nodes) != 3 or reading.asks_for_class or any(ASKED in node.meta for node in nodes):
        return None
    x, call, output = nodes
    if call.op == "call_module" or call.all_input_nodes != [x] or output.args != (call,):
        return None
    found = activation_after(call, None)
    return (found.act, found.act_param) if isinstance(found, Activation) else None


def names_after(block: nn.Module, reading: Reading) -> list[str] | None:
    """The names of the submodules that a norm applies in its own forward, if they are the same in both modes; else None."""
    if is_frozen_norm_act(block):
        return None if reading.graph is None else _applied_in(reading.graph)[0]
    if isinstance(block, nn.GroupNorm):
        parameters = [None if getattr(block, name) is None else name for name in ("weight", "bias")]
        return _names_in(reading.graph, F.group_norm, [block.num_groups, *parameters, block.eps])
    if not isinstance(block, _BatchNorm) or reading.by_mode is None:
        return None
    training, evaluation = (
        _names_in(each.graph, F.batch_norm, [*_STATE, mode, block.momentum, block.eps], counted=mode)
        for each, mode in zip(reading.by_mode, (True, False), strict=True)
    )
    return training if training == evaluation else None


def _names_in(graph: Graph | None, function: Callable[..., Any], settings: list[Any], counted: bool = False) -> list[str] | None:
    """The names of the submodules that a graph applies to a norm of its input.

    Args:
        graph: the graph of the norm's forward; None if there is none.
        function: torch's function of the norm.
        settings: its arguments after the first, with the names of tensors.
        counted: whether the graph counts the call as a batch.
    """
    names, node, checked = (None, None, set()) if graph is None else _applied_in(graph)
    if graph is None or names is None or node is None or node.target is not function:
        return None
    nodes, parameters = list(graph.nodes), list(inspect.signature(function).parameters)
    arguments = [str(value.target) if isinstance(value, Node) else value for value in (*node.args, *node.kwargs.values())]
    inputs = [str(other.target) for other in nodes if other.op == "placeholder"]
    by_name = list(node.kwargs)
    if arguments != [*inputs, *settings] or by_name != parameters[len(parameters) - len(by_name) :]:
        return None
    checked.add(node)
    counts = 0
    for node in nodes:
        if node in checked or node.op in ("placeholder", "get_attr"):
            continue
        if node.target == "add_" and [str(argument) for argument in node.args] == ["num_batches_tracked", "1"]:
            counts += 1
        elif node.target not in (getattr, operator.eq, torch._assert):
            return None
    return names if counts == counted else None


def _applied_in(graph: Graph) -> tuple[list[str] | None, Node | None, set[Node]]:
    """The names of the submodules that a graph applies at its end, the value to which it applies them, and the nodes after it.

    None twice if it returns more than one value.
    """
    output = graph.output_node()
    if len(output.all_input_nodes) != 1:
        return None, None, set()
    (node,) = output.all_input_nodes
    after = {output}
    names: list[str] = []
    while node.op == "call_module" and len(node.all_input_nodes) == 1 and node.args == tuple(node.all_input_nodes):
        names.insert(0, str(node.target))
        after.add(node)
        (node,) = node.all_input_nodes
    return names, node, after
