"""Which layers a gradient passes on its way from the loss to a parameter, and whether it has a way around one of them.

Read from the graph that autograd walks, since neither the order in which layers run nor that in which they are registered tells it: an
auxiliary head may run last and a residual connection goes around what it spans.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import Node


class BackwardGraph:
    """parameters: by layer; outputs: the nodes that made each layer's outputs, none for one whose outputs hold other layers' work."""

    def __init__(self, loss: Tensor, parameters: Mapping[str, Sequence[Tensor]], outputs: Mapping[str, Sequence[Node]]) -> None:
        self._root, self._outputs = loss.grad_fn, outputs
        # A set of layers is an int with a bit for each: one pass over the graph then serves all layers.
        self._bits = {name: 1 << place for place, name in enumerate(parameters)}
        self._leaves = {id(parameter): self._bits[name] for name, group in parameters.items() for parameter in group}
        below = self._below(())
        reached = {name: self._union(below, outputs.get(name, ())) & ~bit for name, bit in self._bits.items()}
        self._before = reached
        self.behind = {name: [other for other in reached if reached[other] & bit] for name, bit in self._bits.items()}

    def goes_around(self, layer: str) -> bool:
        """Whether some layer before this one is reached by a gradient that has not passed it."""
        if self._root is None:
            return False
        return bool(self._below(self._outputs.get(layer, ())).get(self._root, 0) & self._before[layer])

    @staticmethod
    def _union(below: Mapping[Node, int], nodes: Iterable[Node]) -> int:
        union = 0
        for node in nodes:
            union |= below.get(node, 0)
        return union

    def _below(self, closed: Sequence[Node]) -> dict[Node, int]:
        """The layers whose parameters can be reached from every node, those that are closed left out."""
        below = dict.fromkeys(closed, 0)
        waiting = [] if self._root is None else [self._root]
        while waiting:
            node = waiting[-1]
            following = [each for each, _ in node.next_functions if each is not None]
            unknown = [] if node in below else [each for each in following if each not in below]
            if unknown:
                waiting += unknown
                continue
            waiting.pop()
            if node not in below:
                below[node] = self._leaves.get(id(getattr(node, "variable", None)), 0) | self._union(below, following)
        return below
