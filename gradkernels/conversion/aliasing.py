"""Which values in a graph may share memory, and which calls may write into it.

A norm with a residual is computed where its activation was called, later than its own call. This is
right only if no call in between writes what the norm reads. Most calls are unknown code, which may
write an argument and may return a view of it.
"""

import operator

import torch
from torch import nn
from torch.fx import Graph, Node

from gradkernels.acts import ACTS
from gradkernels.conversion.border import Ends
from gradkernels.conversion.guard import has_hooks, normalize
from gradkernels.conversion.patterns import (
    WRITING_ADDITIONS,
    Chain,
    called_module,
    is_activation,
    is_fusible,
    is_identity,
    is_norm,
    name_of,
)
from gradkernels.conversion.purity import is_of_library
from gradkernels.conversion.trace import IN_PLACE, is_users_function

# Calls that write nothing, and whose result shares no memory with their arguments.
_FRESH_MODULES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
)
_FRESH_FUNCTIONS = (operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.cat, normalize)


class Aliasing:
    """Answers for one graph, as it is at the time of the question: rewriting changes it."""

    def __init__(self, block: nn.Module, graph: Graph, ends: Ends) -> None:
        self.block = block
        self.graph = graph
        self.ends = ends

    def may_be_written(self, node: Node) -> bool:
        """Whether a value may be written after it was computed.

        It may if it is returned, or if a call that uses it may write it or return a view of it.
        """
        return not all(self.is_fresh(user) and not self._writes(user) for user in node.users)

    def why_it_cannot_move(self, chain: Chain, residual: Node, addition: Node) -> str:
        """Why the kernel cannot be called where the chain ends; "" if it can.

        The chain then gets the calls that this relies on.
        """
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        first, last = chain.nodes[0], chain.nodes[-1]
        bn = called_module(self.block, first)
        assert bn is not None
        tensors = {*map(id, bn.parameters()), *map(id, bn.buffers())}
        state = self._state_of(bn, tensors, chain)
        read_at_end = self._aliases(first.all_input_nodes[0], chain)
        residual_aliases = self._aliases(residual, chain)
        for node, place in order.items():
            if not order[first] < place < order[last] or node in chain.nodes:
                continue
            if place > order[addition]:
                read_at_end |= residual_aliases
            module = called_module(self.block, node)
            reached = frozenset() if module is None else self.ends.reachable(module)
            if id(bn) in reached:
                return "it may be called again before its output is added"
            if state.intersection(node.all_input_nodes) or not tensors.isdisjoint(reached):
                if node.target is normalize:
                    return "it may be called again before its output is added"
                return f"{name_of(node)}, called between it and its activation, may read or write its statistics"
            if self.is_fresh(node):
                chain.relied_on += [node] * bool(module is not None and read_at_end.intersection(node.all_input_nodes))
                continue
            if read_at_end.intersection(node.all_input_nodes):
                return f"{name_of(node)}, called between it and its activation, may write its input or the residual"
            # It cannot write what the call before the norm has just made.
            chain.relied_on += [value for value in first.all_input_nodes if value.op == "call_module" and self.is_fresh(value)]
        if ACTS[chain.act].saves == "value":
            for node in residual_aliases:
                writers = [user for user in node.users if order[user] > order[last] and not self.is_fresh(user) and self._writes(user)]
                if writers:
                    return f"{name_of(writers[0])} writes the residual, which the gradient of {chain.act} needs"
        return ""

    def _state_of(self, bn: nn.Module, tensors: set[int], chain: Chain) -> set[Node]:
        """The nodes whose value leads to the norm, or may share memory with its parameters and buffers, `tensors`."""
        nodes: set[Node] = set()
        for node in self.graph.nodes:
            if node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self.block)
                if isinstance(value, nn.Module) and id(bn) in self.ends.reachable(value):
                    nodes.add(node)
                elif id(value) in tensors:
                    nodes |= self._aliases(node, chain)
        return nodes

    def _aliases(self, node: Node, chain: Chain) -> set[Node]:
        """The nodes outside the chain whose value may share memory with that of `node`."""
        aliases: set[Node] = set()
        stack = [node]
        while stack:
            node = stack.pop()
            if node in aliases or node in chain.nodes:
                continue
            aliases.add(node)
            if node.op in ("placeholder", "get_attr"):
                # Two arguments may be one tensor.
                stack += [other for other in self.graph.nodes if other.op in ("placeholder", "get_attr")]
            elif not self.is_fresh(node):
                stack += node.all_input_nodes
            stack += [user for user in node.users if not self.is_fresh(user)]
        return aliases

    def is_fresh(self, node: Node) -> bool:
        """Whether a node certainly writes no argument and shares no memory with one."""
        module = called_module(self.block, node)
        if module is not None:
            return self._is_fresh_module(module)
        if node.op != "call_function" or node.target not in _FRESH_FUNCTIONS or "out" in node.kwargs:
            return False
        # The sum of two lists holds their tensors.
        return node.target is torch.cat or not any(isinstance(argument, (list, tuple)) for argument in node.args)

    def _is_fresh_module(self, module: nn.Module) -> bool:
        if has_hooks(module):
            return False
        if type(module) is nn.Sequential:
            return len(module) > 0 and all(map(self._is_fresh_module, module))
        if is_norm(module) and not is_fusible(module):
            return self.ends.is_norm_alone(module)
        if is_fusible(module) or type(module) in _FRESH_MODULES:
            return True
        return is_activation(module) and not getattr(module, "inplace", False)

    def private(self, node: Node) -> list[Node] | None:
        """The calls of modules that make a value which nothing reads but its one user; None if there may be others."""
        calls = [node] if node.op == "call_module" else []
        if len(node.users) != 1:
            return None
        module = called_module(self.block, node)
        if node.args and (node.target in WRITING_ADDITIONS or (module is not None and is_identity(module) and not has_hooks(module))):
            before = self.private(node.args[0]) if isinstance(node.args[0], Node) else None
            return None if before is None else [*calls, *before]
        return calls if self.is_fresh(node) or (module is not None and self._makes_its_result(module)) else None

    def _makes_its_result(self, module: nn.Module) -> bool:
        """Whether the forward of a module of the user's returns what a function in it has just computed, as squeeze-excite does."""
        graph = None if has_hooks(module) else self.ends.graph_of(module)
        if graph is None or type(module).forward is nn.Sequential.forward:
            return False
        result = graph.output_node().args[0]
        return isinstance(result, Node) and Aliasing(module, graph, self.ends).private(result) == []

    def _writes(self, node: Node) -> bool:
        """Whether a node is known to write an argument, or calls a module of unknown code."""
        module = called_module(self.block, node)
        if module is not None:
            return any(getattr(part, "inplace", False) or not is_of_library(type(part)) for part in module.modules())
        if is_users_function(node.target):
            return True
        name = name_of(node)
        is_in_place = any(argument is True for argument in (*node.args, node.kwargs.get("inplace")))
        return "out" in node.kwargs or name.endswith("_") or name in IN_PLACE or is_in_place
