"""Rewrites a forward so that one kernel computes a batch norm, an addition and an activation.

These calls are fused only if nothing else uses the values between them. Without an addition, the kernel is
called where the batch norm was called. With an addition, the kernel is called where the last of the fused
calls was. No call between the two places may then write what the kernel reads (aliasing.py).
"""

import copy
import dataclasses
import keyword
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from gradkernels import activation
from gradkernels.acts import act_of_spelling
from gradkernels.conversion.aliasing import Aliasing
from gradkernels.conversion.attributes import NOT_COMPARABLE, Path, Reads, is_comparable
from gradkernels.conversion.bytecode import CLASS_TESTS, MISSING
from gradkernels.conversion.guard import (
    Children,
    Expected,
    RewrittenForward,
    attribute,
    children_of,
    has_hooks,
    is_same,
    normalize,
    shared_in,
)
from gradkernels.conversion.norm_act_layers import rewrite_norm_act
from gradkernels.conversion.patterns import (
    ACTIVATION_FUNCTIONS,
    CONTAINERS,
    FUSIBLE,
    HAS_SCALE,
    OTHER_FUNCTIONS,
    WRITING_ADDITIONS,
    Chain,
    activation_after,
    activation_name,
    addend,
    called_module,
    expected,
    has_scale,
    is_activation,
    keeps_output,
    name_of,
    why_kept,
)
from gradkernels.conversion.purity import names_from_forward
from gradkernels.conversion.result import IS_IN_PLACE, KEEPS_ITS_OUTPUT, NOTHING_TO_FUSE, Reason, RewriteResult, Site
from gradkernels.conversion.trace import Reading, read
from gradkernels.sync_batch_norm_act import SyncBatchNormAct

_ChildrenOnTheWay = tuple[tuple[Path, Children], ...]


class Reader:
    """Reads forwards, each only once for all blocks that do not differ in what the forward reads."""

    def __init__(self) -> None:
        # The shape of a block and the class of arguments -> what was read, and which attributes were.
        self._known: dict[Any, list[tuple[Reads, Reading]]] = {}

    def read(self, block: nn.Module, kind: type = torch.Tensor) -> Reading:
        """Reads the forward of one block as it is now.

        Args:
            block: any module.
            kind: the class of the arguments whose class the forward asks for.
        """
        known = self._known.setdefault((_shape(block), kind), [])
        reading = next((reading for reads, reading in known if _is_read_again(block, reads)), None)
        if reading is None:
            reads: Reads = {}
            reading = read(block, kind, reads)
            # Reading sets the mode itself.
            known.append(({place: value for place, value in reads.items() if place[1] != "training"}, reading))
        # Rewriting changes the graph.
        return reading if reading.graph is None else dataclasses.replace(reading, graph=copy.deepcopy(reading.graph))


def _shape(block: nn.Module) -> tuple[Any, ...]:
    """What a reading may depend on besides the attributes that it records."""
    parts = dict(block.named_modules())
    kinds = [(name, type(part), has_hooks(part), children_of(part, False)) for name, part in parts.items()]
    return tuple(kinds), shared_in(block)


def _is_read_again(block: nn.Module, reads: Reads) -> bool:
    """Whether a block has the attributes that were read of another one."""
    pairs = ((attribute(block, *place), value) for place, value in reads.items())
    return all(not is_comparable(current) if value is NOT_COMPARABLE else is_same(current, value) for current, value in pairs)


def rewrite_forward(block: nn.Module, residual: bool, reader: Reader) -> RewriteResult:
    """Reads the forward of one block and returns a rewritten one. The block is not changed.

    Args:
        block: any module.
        residual: whether additions may be fused.
        reader: reads the forward.
    """
    reading = reader.read(block)
    result = _rewrite(block, reading, residual)
    if reading.asks_for_class:
        # A forward that asks whether its argument is a tensor gets a list or a tensor.
        of_list = _rewrite(block, reader.read(block, list), residual)
        result.sites += [site for site in of_list.sites if site not in result.sites]
        result.kept |= of_list.kept
        if result.forward is None or of_list.forward is None:
            result.forward = result.forward or of_list.forward
        else:
            result.forward = dataclasses.replace(result.forward, otherwise=of_list.forward)
        result.problem = result.problem and of_list.problem
    return result


def _rewrite(block: nn.Module, reading: Reading, residual: bool) -> RewriteResult:
    try:
        if reading.graph is None:
            result = rewrite_norm_act(block, reading, residual)
        else:
            result = Rewriter(block, reading.graph, reading, residual).run()
    except (LookupError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        return RewriteResult(problem=f"cannot be rewritten: {error}")
    if not result.sites:
        result.problem = reading.problem
    return result


class Rewriter:
    """Finds the sites (result.py) in the graph of one forward, and fuses calls in the graph where it can."""

    def __init__(self, block: nn.Module, graph: Graph, reading: Reading, residual: bool) -> None:
        self.block = block
        self.graph = graph
        self.reading = reading
        self.residual = residual
        self.aliasing = Aliasing(block, graph)
        self.expected: dict[Path, Expected] = {}
        self.changed = False
        looked_for = [(block.get_submodule(".".join(path)), name) for path, name, value in reading.attributes if value is MISSING]
        self.kept = {module: why for module, name in looked_for if (why := why_kept(module, (name,)))}
        self.asks_for_classes = not names_from_forward(type(block)).isdisjoint(CLASS_TESTS)

    def run(self) -> RewriteResult:
        children = _children_on_the_way(self.block, self.graph, self.asks_for_classes)
        result = RewriteResult(kept=self.kept)
        fused: set[Node] = set()
        nodes = list(self.graph.nodes)
        for node in nodes:
            _pass_by_position(node, self.module(node))
        for node in nodes:
            module = self.module(node)
            if isinstance(module, _BatchNorm) and node not in fused:
                site, chain = self.at_batch_norm(node, module)
                result.sites.append(site)
                if chain is not None:
                    fused.update(chain.nodes)
                    self.fuse(chain)
        for node in nodes:
            if node not in fused:
                result.sites += self.at_activation(node)
        if self.changed:
            _check_names(self.graph)
            result.forward = self.forward(children)
        return result

    def module(self, node: Node) -> nn.Module | None:
        return called_module(self.block, node)

    def at_batch_norm(self, node: Node, module: _BatchNorm) -> tuple[Site, Chain | None]:
        """The site of a call of a batch norm, and the chain that starts at the call.

        The chain is None if nothing is fused with the batch norm.
        """
        site = Site(module, type(module).__name__)
        if type(module) not in FUSIBLE:
            is_sync = isinstance(module, (nn.SyncBatchNorm, SyncBatchNormAct))
            unknown = f"{type(module).__name__} may compute something else"
            site.why = "its statistics are computed over several processes" if is_sync else unknown
        elif why := self.kept.get(module) or why_kept(module):
            site.why = why
        elif has_hooks(module):
            site.why = Reason("it has a hook, which would get a different tensor if the calls were fused", "remove the hook")
        elif getattr(module, "act", "identity") != "identity" or len(node.args) != 1 or node.kwargs:
            site.why = "it already has an activation or a residual"
        if site.why:
            return site, None
        chain, site.why = self.chain_from(node)
        if len(chain.nodes) == 1:
            before = node.all_input_nodes[0] if node.all_input_nodes else None
            name = None if before is None else activation_name(before, self.module(before))
            if name is not None:
                site.why = f"its activation, {name}, comes before it; only an activation after it can be fused"
            return site, None
        site.found = ", ".join([site.found, *chain.names])
        site.label = f"batch_norm_act({', '.join([chain.act] + ['residual'] * (chain.residual is not None))})"
        site.is_fused, site.absorbed = True, tuple(chain.absorbed)
        return site, chain

    def chain_from(self, node: Node) -> tuple[Chain, str]:
        """Finds what can be fused with a batch norm: an addition after it, an activation after that, or both.

        Returns:
            The chain, and the reason why the chain has no activation. The reason is "" if it has one.
        """
        bn_alone = Chain([node], [node])
        users, why = self.way_to_user(node)
        if why:
            return bn_alone, why
        residual = addend(users[-1], [node, *users][-2])
        if residual is None:
            if users[-1].target in WRITING_ADDITIONS:
                return bn_alone, Reason("the sum is written into the other term", "write y = y + bn(x), and not y += bn(x)")
            return bn_alone, self.add_activation(bn_alone, users)
        if not self.residual:
            return bn_alone, Reason("an addition follows, and residual=False", "convert with residual=True")
        chain = Chain([node, *users], [node, *users[:-1]], residual=residual, addition=users[-1], names=["add"])
        users_of_sum, why = self.way_to_user(users[-1])
        why = why or self.add_activation(chain, users_of_sum)
        obstacle = self.aliasing.why_it_cannot_move(chain, residual, users[-1])
        return (bn_alone, obstacle) if obstacle else (chain, why)

    def way_to_user(self, node: Node) -> tuple[list[Node], str]:
        """Follows the value of a node to its only user, past any nn.Identity.

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
            module = self.module(node)
            if type(module) is not nn.Identity or has_hooks(module) or len(node.args) != 1:
                return users, ""

    def add_activation(self, chain: Chain, users: list[Node]) -> str:
        """Adds `users` to a chain if the last of them is an activation that the kernel computes.

        Returns:
            The reason why `users` were not added; "" if they were added.
        """
        last = activation_after(users[-1], self.module(users[-1]))
        if isinstance(last, str):
            return last
        chain.nodes += users
        chain.expected += users if last.module is not None else users[:-1]
        chain.act, chain.act_param = last.act, last.act_param
        chain.names.append(last.name)
        if last.module is not None:
            chain.absorbed.append(last.module)
        return ""

    def fuse(self, chain: Chain) -> None:
        """Replaces a chain by one call of the kernel."""
        first, last = chain.nodes[0], chain.nodes[-1]
        with self.graph.inserting_before(first if chain.residual is None else last):
            bn = self.graph.get_attr(str(first.target))
            (x,) = first.args
            writes = chain.addition is not None and chain.addition.target in WRITING_ADDITIONS
            is_second = chain.addition is not None and chain.addition.args[0] is chain.residual
            arguments = (bn, x, chain.residual, chain.act, chain.act_param, *[writes, is_second] * (writes or is_second))
            kernel = self.graph.call_function(normalize, arguments)
        last.replace_all_uses_with(kernel)
        for node in reversed(chain.nodes):
            self.graph.erase_node(node)
        for node in chain.expected:
            module = self.module(node)
            if module is not None:
                self.expect(node, module)
        self.changed = True

    def is_only_reader(self, node: Node) -> bool:
        """Whether nothing but this node reads its input, so that the node may as well leave it unwritten.

        The modules that compute the input are expected to stay if the answer is True.
        """
        if len(node.all_input_nodes) != 1:
            return False
        (x,) = node.all_input_nodes
        passed = [x]
        while type(self.module(x)) is nn.Identity and len(x.args) == 1 and len(x.all_input_nodes) == 1:
            (x,) = x.all_input_nodes
            passed.append(x)
        modules = {value: module for value in passed if (module := self.module(value)) is not None}
        is_known = not any(has_hooks(module) or module._modules for module in modules.values())
        if not is_known or not self.aliasing.is_fresh(x) or any(len(value.users) != 1 for value in passed):
            return False
        for value, module in modules.items():
            self.expect(value, module)
        return True

    def expect(self, node: Node, module: nn.Module) -> None:
        path = tuple(str(node.target).split("."))
        self.expected[path] = expected(path, module)

    def at_activation(self, node: Node) -> Iterator[Site]:
        """The site of an activation that is not fused. Yields nothing for any other node."""
        module = self.module(node)
        if module is not None:
            if self.is_silu_in_place(node, module):
                # The module keeps its class: another forward may call it for what it writes.
                self.expect(node, module)
                node.op, node.target = "call_function", activation.swish
                self.changed = True
                yield Site(module, type(module).__name__, "swish", absorbed=(module,))
            elif is_activation(module):
                # A call with other arguments may write it where this graph does not.
                keeps = keeps_output(module) and (self.reading.is_partial or self.aliasing.may_be_written(node))
                yield Site(module, type(module).__name__, why=KEEPS_ITS_OUTPUT if keeps else "", keeps_output=keeps)
            return
        if node.op not in ("call_function", "call_method"):
            return
        name = name_of(node)
        if node.target in ACTIVATION_FUNCTIONS:
            yield self.at_function(node, name)
        elif node.target in (F.batch_norm, torch.batch_norm):
            yield Site(
                None, name, why=Reason("it is a call of the function; only modules are fused", "use a module, such as nn.BatchNorm2d")
            )
        elif act_of_spelling(node.target) is not None and getattr(node.target, "__module__", "") != activation.__name__:
            yield Site(None, name, why=NOTHING_TO_FUSE)
        elif node.target in OTHER_FUNCTIONS:
            yield Site(None, name, why=f"there is no kernel for {name}")

    def is_silu_in_place(self, node: Node, module: nn.Module) -> bool:
        """Whether a node calls a SiLU in place, and one that is not in place can take its place."""
        is_in_place = type(module) is nn.SiLU and module.inplace and not has_hooks(module)
        return is_in_place and len(node.args) == 1 and not node.kwargs and self.is_only_reader(node)

    def at_function(self, node: Node, name: str) -> Site:
        """The site of a call of one of ACTIVATION_FUNCTIONS. Makes the node call our function if it can."""
        is_elu_out_of_place = node.target is F.elu and not (len(node.args) > 2 or node.kwargs.get("inplace"))
        is_silu_in_place = node.target is F.silu and (node.kwargs.get("inplace") or len(node.args) > 1)
        if is_silu_in_place and not self.is_only_reader(node):
            return Site(None, name, why=IS_IN_PLACE)
        if has_scale(node):
            return Site(None, name, why=f"it {HAS_SCALE}")
        if is_elu_out_of_place and self.aliasing.may_be_written(node):
            return Site(None, name, why=KEEPS_ITS_OUTPUT)
        if node.target is F.silu:
            node.args = node.args[:1]
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        if node.target in (F.leaky_relu_, F.elu_):
            node.kwargs = {**node.kwargs, "inplace": True}
        ours = ACTIVATION_FUNCTIONS[node.target]
        node.target = ours
        self.changed = True
        return Site(None, name, ours.__name__)

    def forward(self, children: _ChildrenOnTheWay) -> RewrittenForward:
        code = self.graph.python_code("self")
        # torch.fx adds names to every graph. Only those that the code uses are kept.
        names = {name: value for name, value in code.globals.items() if re.search(rf"(?<![\w.]){name}(?!\w)", code.src)}
        return RewrittenForward(
            code.src,
            names,
            self.reading.attributes,
            children,
            tuple(self.expected.values()),
            self.residual,
            type(self.block).forward,
            self.asks_for_classes,
            shared_in(self.block),
            self.reading.kinds,
        )


def _pass_by_position(node: Node, module: nn.Module | None) -> None:
    """Turns self.bn(input=x) into self.bn(x)."""
    if module is None or node.kwargs.keys() != {"input"} or has_hooks(module):
        return
    if type(module) in FUSIBLE or is_activation(module):
        node.args, node.kwargs = (node.kwargs["input"],), {}


def _children_on_the_way(block: nn.Module, graph: Graph, with_classes: bool) -> _ChildrenOnTheWay:
    """The children of every module through which the forward may have reached another module."""
    paths: set[Path] = {()}
    called: set[Path] = set()
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            path = tuple(str(node.target).split("."))
            paths.update(path[:length] for length in range(len(path)))
            if node.op == "call_module":
                called.add(path)
    for name, module in block.named_modules():
        path = tuple(name.split("."))
        # A container that is empty now may be filled later.
        if isinstance(module, CONTAINERS) and not any(path[:length] in called for length in range(1, len(path) + 1)):
            paths.add(path if name else ())
    return tuple((path, children_of(block.get_submodule(".".join(path)), with_classes)) for path in sorted(paths))


def _check_names(graph: Graph) -> None:
    """Raises ValueError if the name of a submodule cannot be written as `self.name`."""
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    for name in (name for target in targets for name in target.split(".")):
        if keyword.iskeyword(name) or unicodedata.normalize("NFKC", name) != name or any(character in name for character in '"\\\n\r'):
            raise ValueError(f"the name {name!r} of a submodule cannot be written as self.name")
