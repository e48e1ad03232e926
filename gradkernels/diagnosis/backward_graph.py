"""Which layers a gradient passes on its way from the loss to a parameter, and whether it has a way around one of them.

Read from the graph that autograd walks, since neither the order in which layers run nor that in which they are registered tells it: an
auxiliary head may run last and a residual connection goes around what it spans. Each node is looked at a fixed number of times.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import Node


class BackwardGraph:
    """What lies between the loss and each layer.

    parameters: those of each layer; outputs: the nodes that made its outputs, none for one whose outputs are other layers' work.

    Attributes:
        behind: for each layer those that its gradient came through, in the order of `parameters`.
        around: for each layer around which a gradient gets to some before it, those before it, in the order of `parameters`.
    """

    def __init__(self, loss: Tensor, parameters: Mapping[str, Sequence[Tensor]], outputs: Mapping[str, Sequence[Node]]) -> None:
        # A set of layers is an int with a bit for each: one pass over the graph then serves all layers.
        bits = {name: 1 << place for place, name in enumerate(parameters)}
        leaves = {id(parameter): bits[name] for name, group in parameters.items() for parameter in group}
        below = {} if loss.grad_fn is None else _below(loss.grad_fn, leaves)
        before = {name: _union(below, outputs[name]) & ~bit for name, bit in bits.items()}
        self.behind = {name: [other for other in before if before[other] & bit] for name, bit in bits.items()}
        # Of two layers that are called in turn each is before and behind the other, and says nothing.
        strictly = {name: each & ~sum(bits[other] for other in self.behind[name]) for name, each in before.items()}
        reached = {} if loss.grad_fn is None else _around(loss.grad_fn, below, outputs, strictly)
        self.around = {name: [other for other in before if found & bits[other]] for name, found in reached.items() if found}


def _following(node: Node) -> list[Node]:
    return [each for each, _ in node.next_functions if each is not None]


def _union(below: Mapping[Node, int], nodes: Iterable[Node]) -> int:
    union = 0
    for node in nodes:
        union |= below.get(node, 0)
    return union


def _below(root: Node, leaves: Mapping[int, int]) -> dict[Node, int]:
    """The layers whose parameters can be reached from every node."""
    below: dict[Node, int] = {}
    waiting = [root]
    while waiting:
        node = waiting[-1]
        following = _following(node)
        unknown = [] if node in below else [each for each in following if each not in below]
        if unknown:
            waiting += unknown
            continue
        waiting.pop()
        if node not in below:
            below[node] = leaves.get(id(getattr(node, "variable", None)), 0) | _union(below, following)
    return below


def _around(root: Node, below: Mapping[Node, int], outputs: Mapping[str, Sequence[Node]], before: Mapping[str, int]) -> dict[str, int]:
    """Walks from the loss, every node after all that lead to it.

    When a layer's output nearest the loss is reached, open is what can be got to without it, and a way around leads through that.
    """
    owners = {node: name for name, nodes in outputs.items() for node in nodes}
    missing = Counter(each for node in below for each in _following(node))
    ready, opened, around = [root], {root}, dict[str, int]()
    while ready:
        node = ready.pop()
        opened.discard(node)
        name = owners.get(node)
        if name is not None and name not in around:
            around[name] = _union(below, opened) & before[name]
        following = _following(node)
        opened.update(following)
        missing.subtract(following)
        ready += dict.fromkeys(each for each in following if not missing[each])
    return around
