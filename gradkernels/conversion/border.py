"""Writes out children in the graph of their parent, so that a norm and its activation stand in one graph.

A norm may end the forward of a child, while the addition and the activation after it stand in the
parent. An activation may begin the forward of a child, while the norm before it stands in the parent or
in a sibling. The nodes of such a child then replace its call in the graph of the parent. The child itself does
not change: a call from elsewhere computes what it did.

The conditions under which the graph of the child is right become conditions of the parent's forward. They are
compared when the parent is called. So a child is not written out if a call before it in the parent's forward
may change the child, its norms or what its forward reads.
"""

import copy
import operator
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from gradkernels.conversion.attributes import HOOKED, Path, class_before, reachable
from gradkernels.conversion.guard import WrittenOut, has_hooks
from gradkernels.conversion.norm_act_layers import names_after
from gradkernels.conversion.patterns import (
    ADDITIONS,
    Activation,
    activation_after,
    called_module,
    is_activation,
    is_fusible,
    is_identity,
    is_norm,
    name_of,
    way_to_user,
)
from gradkernels.conversion.purity import ASKED, own_classes
from gradkernels.conversion.result import Site
from gradkernels.conversion.trace import Reading, has_own_forward, is_users_function

# Keys in a node's `meta`: its Place, and the name of the node in the parent's own graph that it comes from.
PLACE = "gradkernels_place"
ROOT = "gradkernels_root"


class Ends:
    """How the forwards of modules begin and end. Each is looked at once for all parents.

    Args:
        read: reads the forward of a module.
    """

    def __init__(self, read: Callable[[nn.Module], Reading]) -> None:
        self.read = read
        self._last: dict[nn.Module, tuple[nn.Module, Node] | None] = {}
        self._begins: dict[nn.Module, bool] = {}
        self._applied: dict[nn.Module, list[str] | None] = {}
        self._reachable: dict[nn.Module, frozenset[int]] = {}

    def graph_of(self, child: nn.Module) -> Graph | None:
        """The graph of a child that holds for every call with its required arguments; None if there is none."""
        if not has_own_forward(child) or is_norm(child):
            return None
        reading = self.read(child)
        graph = reading.graph
        if graph is None or reading.asks_for_class or any(ASKED in node.meta for node in graph.nodes):
            return None
        return graph if isinstance(graph.output_node().args[0], Node) else None

    def last_norm(self, child: nn.Module) -> tuple[nn.Module, Node] | None:
        """The call of the norm whose output, or a sum with it, a child returns; None if it returns another value.

        The call is a node in the graph of the child or of a module below it, which is returned with it.
        """
        if child not in self._last:
            # A module that contains itself ends here.
            self._last[child] = None
            # A Sequential is read at once.
            has_graph = has_own_forward(child) and (type(child).forward is nn.Sequential.forward or any(map(is_norm, child.modules())))
            if has_graph:
                graph = self.graph_of(child)
                self._last[child] = None if graph is None else self.norm_of(child, graph.output_node().args[0])
        return self._last[child]

    def norm_of(self, block: nn.Module, value: Any) -> tuple[nn.Module, Node] | None:
        """The call of the norm whose output, or a sum with it, a value in the graph of a block is."""
        if not isinstance(value, Node):
            return None
        module = called_module(block, value)
        if module is None:
            terms = value.args if value.target in ADDITIONS else ()
            return next((call for term in terms if (call := self.norm_of(block, term)) is not None), None)
        if is_norm(module):
            return (block, value) if self.is_norm_alone(module) else None
        if is_identity(module):
            return self.norm_of(block, value.args[0] if value.args else None)
        return self.last_norm(module)

    def begins_with_activation(self, child: nn.Module) -> bool:
        """Whether a child does nothing with its first argument but apply an activation that the kernel computes."""
        if child not in self._begins:
            self._begins[child] = False
            graph = self.graph_of(child)
            first = None if graph is None else next(iter(graph.find_nodes(op="placeholder")), None)
            self._begins[child] = first is not None and self.is_activated(child, first)
        return self._begins[child]

    def is_activated(self, block: nn.Module, value: Node) -> bool:
        """Whether the only use of a value in the graph of a block is an activation that the kernel computes."""
        users, why = way_to_user(block, value)
        if why:
            return False
        module = called_module(block, users[-1])
        if module is None or is_activation(module):
            return isinstance(activation_after(users[-1], module), Activation)
        return users[-1].args[:1] == ([value, *users][-2],) and self.begins_with_activation(module)

    def is_norm_alone(self, module: nn.Module) -> bool:
        """Whether a module is a norm that the kernel computes, or one that applies nothing but modules that return their argument."""
        if is_fusible(module):
            return True
        names = self.applied_by(module)
        return names is not None and all(is_identity(module.get_submodule(name)) for name in names)

    def applied_by(self, module: nn.Module) -> list[str] | None:
        """The names of the submodules that a norm applies in its own forward; None if it does anything else."""
        if module not in self._applied:
            is_known = has_own_forward(module) and not any(map(has_hooks, module.modules()))
            self._applied[module] = names_after(module, self.read(module)) if is_known else None
        return self._applied[module]

    def reachable(self, module: nn.Module) -> frozenset[int]:
        """id() of each module and tensor that the code of a module may come to."""
        if module not in self._reachable:
            self._reachable[module] = frozenset(reachable(module))
        return self._reachable[module]


class Border:
    """The graph of one forward, in which children are written out.

    Attributes:
        graph: a copy of the graph that was read.
        attributes: (path of a module, name, value) of each attribute that this graph depends on.
        conditions: on the children that are written out.
        left: a site for each norm at the end of a child that could not be written out.
    """

    def __init__(self, block: nn.Module, reading: Reading, graph: Graph, ends: Ends) -> None:
        self.block = block
        self.graph = copy.deepcopy(graph)
        self.ends = ends
        self.attributes = list(reading.attributes)
        self.conditions: list[WrittenOut] = []
        self.left: list[Site] = []
        for node, original in zip(self.graph.nodes, graph.nodes, strict=True):
            node.meta[PLACE], node.meta[ROOT] = (block, original.name), original.name

    def write_out(self) -> None:
        """Writes out each child across whose border a norm may be fused."""
        looked_at: set[Node] = set()
        # The nodes of a child may call children of its own.
        while nodes := {node for node in self.graph.nodes if node not in looked_at and self._would_help(node)}:
            looked_at |= nodes
            # id() of a module -> the first call that may change it.
            changed: dict[int, Node] = {}
            for node in list(self.graph.nodes):
                called = self._written_out(node, changed) if node in nodes else [node]
                for each in called:
                    for part in self._changed_by(each):
                        changed.setdefault(part, each)

    def _written_out(self, node: Node, changed: dict[int, Node]) -> list[Node]:
        """Writes out the child that a node calls if it can, and returns the nodes that stand there then."""
        child = self.block.get_submodule(str(node.target))
        why, call = self._why_not(node, child, changed), self.ends.last_norm(child)
        if not why:
            return self._write_out(node, child)
        if call is not None:
            owner, last = call
            bn = called_module(owner, last)
            self.left.append(Site(bn, type(bn).__name__, why=why, place=(owner, last.name)))
        return [node]

    def _would_help(self, node: Node) -> bool:
        child = called_module(self.block, node)
        if child is None or is_norm(child) or is_activation(child):
            return False
        if self.ends.last_norm(child) is not None and self._is_continued(node):
            return True
        before = node.args[0] if node.args else None
        if not isinstance(before, Node) or self.ends.norm_of(self.block, before) is None:
            return False
        return way_to_user(self.block, before)[1] == "" and self.ends.begins_with_activation(child)

    def _is_continued(self, node: Node) -> bool:
        """Whether an activation or an addition follows a call."""
        users, why = way_to_user(self.block, node)
        return not why and (users[-1].target in ADDITIONS or self.ends.is_activated(self.block, node))

    def _why_not(self, node: Node, child: nn.Module, changed: dict[int, Node]) -> str:
        """Why a child cannot be written out in the place of a call; "" if it can.

        Args:
            node: the call.
            child: the child.
            changed: id() of each module that a call before may change -> the call.
        """
        name = type(child).__name__
        if has_hooks(child) or child._compiled_call_impl is not None:
            return f"{name}, which ends with it, has a hook or is compiled"
        if self._arguments(node, child) is None:
            return f"{name}, which ends with it, is called with optional arguments"
        graph = self.ends.graph_of(child)
        assert graph is not None
        called = [module for each in graph.nodes if (module := called_module(child, each)) is not None and is_norm(module)]
        read = [child.get_submodule(".".join(path)) for path, _, _ in self.ends.read(child).attributes]
        parts = [HOOKED, *map(id, (child, *read, *(part for bn in called for part in bn.modules())))]
        earlier = next((changed[part] for part in parts if part in changed), None)
        return "" if earlier is None else f"{name}, which ends with it, may be changed by {name_of(earlier)}, which is called before"

    def _changed_by(self, node: Node) -> set[int]:
        """id() of each module that a call may change, and HOOKED if it runs a hook."""
        values = [operator.attrgetter(str(each.target))(self.block) for each in node.all_input_nodes if each.op == "get_attr"]
        modules = [module for module in (called_module(self.block, node), *values) if isinstance(module, nn.Module)]
        parts = [part for module in modules for part in module.modules()]
        changed = {HOOKED} if any(map(has_hooks, parts)) else set()
        if is_users_function(node.target) or any(own_classes(type(part)) for part in parts):
            changed.update(*map(self.ends.reachable, modules))
        return changed

    def _arguments(self, node: Node, child: nn.Module) -> dict[str, Any] | None:
        """The required arguments of a call by name; None if the call has others."""
        graph = self.ends.graph_of(child)
        assert graph is not None
        names = [str(placeholder.target) for placeholder in graph.find_nodes(op="placeholder")]
        arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
        is_exact = len(node.args) + len(node.kwargs) == len(names) and arguments.keys() == set(names)
        return arguments if is_exact and all(isinstance(value, Node) for value in arguments.values()) else None

    def _write_out(self, node: Node, child: nn.Module) -> list[Node]:
        path: Path = tuple(str(node.target).split("."))
        graph, arguments = self.ends.graph_of(child), self._arguments(node, child)
        assert graph is not None and arguments is not None
        values: dict[Node, Any] = {}
        written: list[Node] = []
        with self.graph.inserting_before(node):
            for other in graph.nodes:
                if other.op == "placeholder":
                    values[other] = arguments[str(other.target)]
                    continue
                if other.op == "output":
                    node.replace_all_uses_with(values[other.args[0]])
                    continue
                copied = values[other] = self.graph.node_copy(other, values.__getitem__)
                written.append(copied)
                copied.meta[PLACE], copied.meta[ROOT] = (child, other.name), node.meta[ROOT]
                if copied.op in ("call_module", "get_attr"):
                    copied.target = ".".join((*path, str(other.target)))
        self.graph.erase_node(node)
        self.attributes += [((*path, *place), name, value) for place, name, value in self.ends.read(child).attributes]
        kind: Any = class_before(child)
        self.conditions.append(WrittenOut(path, kind, kind.forward))
        return written
