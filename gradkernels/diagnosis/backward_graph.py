"""Which layers a gradient passes on its way from the loss to a parameter, and which of them it can avoid.

Both are read from the graph that autograd walks. The order in which layers run or are registered does not
show them: an auxiliary head may run last, and a residual connection skips the layers inside it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import Node


class BackwardGraph:
    """The layers between the loss and each layer.

    Args:
        loss: the loss.
        parameters: layer -> its parameters.
        outputs: layer -> the nodes that made its outputs, none if other layers made them.

    Attributes:
        layers_after: layer -> the layers that its gradient came through, in the order of `parameters`.
        skip_targets: layer -> the layers before it that a gradient reaches without passing it, in the order
            of `parameters`. Layers without any are left out.
    """

    def __init__(self, loss: Tensor, parameters: Mapping[str, Sequence[Tensor]], outputs: Mapping[str, Sequence[Node]]) -> None:
        # A set of layers is an int with a bit for each layer, so that one pass over the graph is enough for
        # all.
        bits = {name: 1 << place for place, name in enumerate(parameters)}
        leaves = {id(parameter): bits[name] for name, group in parameters.items() for parameter in group}
        below = {} if loss.grad_fn is None else _layers_below(loss.grad_fn, leaves)
        before = {name: _union(below, outputs[name]) & ~bit for name, bit in bits.items()}
        self.layers_after = {name: [other for other in before if before[other] & bit] for name, bit in bits.items()}
        # Layers that are called in turn are before and after each other, and neither is skipped.
        strictly = {name: layers & ~sum(bits[other] for other in self.layers_after[name]) for name, layers in before.items()}
        targets = {} if loss.grad_fn is None else _skip_targets(loss.grad_fn, below, outputs, strictly)
        self.skip_targets = {name: [other for other in before if layers & bits[other]] for name, layers in targets.items() if layers}


def _next_nodes(node: Node) -> list[Node]:
    return [following for following, _ in node.next_functions if following is not None]


def _union(below: Mapping[Node, int], nodes: Iterable[Node]) -> int:
    union = 0
    for node in nodes:
        union |= below.get(node, 0)
    return union


def _layers_below(root: Node, leaves: Mapping[int, int]) -> dict[Node, int]:
    """For each node, the layers whose parameters can be reached from it."""
    below: dict[Node, int] = {}
    waiting = [root]
    while waiting:
        node = waiting[-1]
        next_nodes = _next_nodes(node)
        unknown = [] if node in below else [following for following in next_nodes if following not in below]
        if unknown:
            waiting += unknown
            continue
        waiting.pop()
        if node not in below:
            below[node] = leaves.get(id(getattr(node, "variable", None)), 0) | _union(below, next_nodes)
    return below


def _skip_targets(
    root: Node, below: Mapping[Node, int], outputs: Mapping[str, Sequence[Node]], before: Mapping[str, int]
) -> dict[str, int]:
    """For each layer, the layers before it that a gradient reaches without passing it.

    The walk starts at the loss and visits a node after all nodes that lead to it. When it visits a layer's
    output, the open nodes are those that the gradient reaches without the layer. Whatever lies below them can
    be reached so.
    """
    owners = {node: name for name, nodes in outputs.items() for node in nodes}
    missing = Counter(following for node in below for following in _next_nodes(node))
    ready, opened, targets = [root], {root}, dict[str, int]()
    while ready:
        node = ready.pop()
        opened.discard(node)
        name = owners.get(node)
        if name is not None and name not in targets:
            targets[name] = _union(below, opened) & before[name]
        next_nodes = _next_nodes(node)
        opened.update(next_nodes)
        missing.subtract(next_nodes)
        ready += dict.fromkeys(following for following in next_nodes if not missing[following])
    return targets
