"""Rewrites a forward so that one kernel computes a norm, an addition and an activation.

These calls are fused only if nothing else uses the values between them. Without an addition, the kernel is
called where the norm was called. With an addition, the kernel is called where the last of the fused
calls was. No call between the two places may then write what the kernel reads (aliasing.py).
"""

import dataclasses
import keyword
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from gradkernels import activation
from gradkernels.acts import act_of_spelling
from gradkernels.conversion.aliasing import Aliasing
from gradkernels.conversion.attributes import NOT_COMPARABLE, Path, Reads, is_comparable, is_same
from gradkernels.conversion.border import PLACE, ROOT, Border, Ends
from gradkernels.conversion.bytecode import CLASS_TESTS, MISSING
from gradkernels.conversion.guard import (
    Expected,
    RewrittenForward,
    WrittenOut,
    attribute,
    children_of,
    has_hooks,
    normalize,
    shared_in,
)
from gradkernels.conversion.norm_act_layers import names_after, rewrite_norm_act
from gradkernels.conversion.patterns import (
    ACTIVATION_FUNCTIONS,
    CONTAINERS,
    HAS_SCALE,
    NORM_FUNCTIONS,
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
    is_fusible,
    is_identity,
    is_norm,
    keeps_output,
    name_of,
    operator_of,
    ours_for,
    way_to_user,
    why_kept,
)
from gradkernels.conversion.purity import is_of_library, names_from_forward
from gradkernels.conversion.result import IS_IN_PLACE, KEEPS_ITS_OUTPUT, NOTHING_TO_FUSE, Reason, RewriteResult, Site
from gradkernels.conversion.trace import Given, Reading, given_by, has_own_forward, optional_arguments, read, without_the_last
from gradkernels.sync_batch_norm_act import SyncBatchNormAct


class Reader:
    """Reads forwards, each only once for all blocks that do not differ in what the forward reads."""

    def __init__(self) -> None:
        # The shape of a block and the arguments -> what was read, and which attributes were.
        self._known: dict[Any, list[tuple[Reads, Reading]]] = {}
        self._readings: dict[tuple[nn.Module, type, str], Reading] = {}
        # The optional arguments that calls in forwards give a block, by their text: 1 and True are equal.
        self._calls: dict[nn.Module, dict[str, Given]] = {}
        self.ends = Ends(self.read)

    def read(self, block: nn.Module, kind: type = torch.Tensor, given: Given = ()) -> Reading:
        """Reads the forward of one block as it is at the first call. Its graph must not be changed.

        Args:
            block: any module.
            kind: the class of the arguments whose class the forward asks for.
            given: the optional arguments that are given.
        """
        place = block, kind, repr(given)
        if place in self._readings:
            return self._readings[place]
        is_sequential = type(block).forward is nn.Sequential.forward
        # Reading such a forward takes no longer than comparing.
        known = [] if is_sequential else self._known.setdefault((_shape(block), *place[1:]), [])
        reading = next((reading for reads, reading in known if _is_read_again(block, reads)), None)
        if reading is None:
            reads: Reads = {}
            reading = read(block, kind, given, reads)
            # Reading sets the mode itself.
            known.append(({place: value for place, value in reads.items() if place[1] != "training"}, reading))
        self._readings[place] = reading
        return reading

    def calls_of(self, block: nn.Module) -> tuple[Given, ...]:
        """The optional arguments that the forwards in which `follow` saw calls of a block give it."""
        return tuple(self._calls.get(block, {}).values())

    def kinds_of_calls(self, block: nn.Module) -> tuple[Given, ...]:
        """The calls for which the forward of a block is read: those that were seen, else one without optional arguments.

        A forward that compares its last required argument with None, or does not read it, is read for None, too.
        """
        calls = self.calls_of(block) or ((),)
        more = [without_the_last(block, self.read(block, torch.Tensor, given)) for given in calls]
        return (*calls, *(given for given in more if given is not None))

    def follow(self, blocks: Iterable[nn.Module]) -> None:
        """Reads the forwards of blocks for the arguments that the forwards of others give them.

        Args:
            blocks: first those that call the others.
        """
        followed: set[nn.Module] = set()
        for first in blocks:
            followed.add(first)
            waiting = [(first, given) for given in self.kinds_of_calls(first)]
            while waiting:
                block, given = waiting.pop()
                for child, its in self._calls_in(block, given):
                    calls = self._calls.setdefault(child, {})
                    if repr(its) not in calls:
                        calls[repr(its)] = its
                        waiting += [(child, its)] * (child in followed)

    def _calls_in(self, block: nn.Module, given: Given) -> Iterator[tuple[nn.Module, Given]]:
        """The modules with optional arguments that a forward calls, and which of them it gives."""
        for kind in self.kinds(block, given):
            reading = self.read(block, kind, given)
            graphs = [each.graph for each in reading.by_mode or (reading,)]
            for node in (node for graph in graphs if graph is not None for node in graph.nodes):
                child = called_module(block, node)
                if child is not None and has_own_forward(child) and optional_arguments(type(child).forward):
                    its = given_by(node, child)
                    if its is not None:
                        yield child, its

    def kinds(self, block: nn.Module, given: Given) -> tuple[type, ...]:
        """The classes of arguments for which a forward is read: one that asks for the class gets a tensor or a list."""
        return (torch.Tensor, list) if self.read(block, torch.Tensor, given).asks_for_class else (torch.Tensor,)


def _shape(block: nn.Module) -> tuple[Any, ...]:
    """What a reading may depend on besides the attributes that it records."""
    parts = dict(block.named_modules())
    kinds = [(name, type(part), has_hooks(part), children_of(part, False)) for name, part in parts.items()]
    return tuple(kinds), shared_in(block)


def _is_read_again(block: nn.Module, reads: Reads) -> bool:
    """Whether a block has the attributes that were read of another one."""
    pairs = ((attribute(block, *place), value) for place, value in reads.items())
    return all(not is_comparable(current) if value is NOT_COMPARABLE else is_same(current, value) for current, value in pairs)


def rewrite_forward(block: nn.Module, residual: bool, reader: Reader, calls: Iterable[Given]) -> RewriteResult:
    """Reads the forward of one block and returns a rewritten one. The block is not changed.

    Args:
        block: any module.
        residual: whether additions may be fused.
        reader: reads the forward.
        calls: the optional arguments that calls of the block give.
    """
    readings = [reader.read(block, kind, given) for given in calls for kind in reader.kinds(block, given)]
    results = [_rewrite_in_modes(block, reading, residual, reader.ends) for reading in readings]
    result = results[-1]
    for other in results[-2::-1]:
        result = _either(other, result, [site for site in result.sites if site not in other.sites])
    return result


def _rewrite_in_modes(block: nn.Module, reading: Reading, residual: bool, ends: Ends) -> RewriteResult:
    if reading.by_mode is None or is_norm(block):
        return _rewrite(block, reading, residual, ends)
    training, evaluation = (_rewrite(block, each, residual, ends) for each in reading.by_mode)
    # The report is on training.
    places = {site.place for site in training.sites}
    more = [site for site in evaluation.sites if site.place not in places]
    for site in more:
        site.why = site.why or "only in evaluation"
    return _either(training, evaluation, more)


def _either(first: RewriteResult, second: RewriteResult, more: list[Site]) -> RewriteResult:
    """The result for two kinds of call. Adds `more` to the sites of the first one."""
    forward = _chained(first.forward, second.forward)
    return RewriteResult([*first.sites, *more], forward, {**first.kept, **second.kept}, first.problem and second.problem)


def _chained(first: RewrittenForward | None, second: RewrittenForward | None) -> RewrittenForward | None:
    if first is None or second is None:
        return first or second
    return dataclasses.replace(first, otherwise=_chained(first.otherwise, second))


def _rewrite(block: nn.Module, reading: Reading, residual: bool, ends: Ends) -> RewriteResult:
    try:
        if reading.graph is None or names_after(block, reading) is not None:
            result = rewrite_norm_act(block, reading, residual, ends.read)
        else:
            border = Border(block, reading, reading.graph, ends)
            border.write_out()
            rewriter = Rewriter(border, reading, residual)
            result = rewriter.run()
            if border.conditions and not rewriter.crosses:
                why_not = [site for site in result.sites if site.place is not None and site.place[0] is not block and site.label is None]
                result = Rewriter(Border(block, reading, reading.graph, ends), reading, residual).run()
                result.sites += why_not
            result.sites += border.left
    except (LookupError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        return RewriteResult(problem=f"cannot be rewritten: {error}")
    if not result.sites:
        result.problem = reading.problem
    return result


class Rewriter:
    """Finds the sites (result.py) in the graph of one forward, and fuses calls in the graph where it can."""

    def __init__(self, border: Border, reading: Reading, residual: bool) -> None:
        self.block = block = border.block
        self.graph = border.graph
        self.attributes = tuple(border.attributes)
        self.ends = border.ends
        self.reading = reading
        self.residual = residual
        self.aliasing = Aliasing(block, self.graph, self.ends)
        self.expected: dict[Path, Expected | WrittenOut] = {condition.path: condition for condition in border.conditions}
        self.paths = _on_the_way(block, self.graph).union(self.expected)
        self.changed = False
        # Whether calls of the block's own forward and calls of children were fused with each other.
        self.crosses = False
        looked_for = [(block.get_submodule(".".join(path)), name) for path, name, value in self.attributes if value is MISSING]
        self.kept = {module: why for module, name in looked_for if (why := why_kept(module, (name,)))}
        kinds = {type(block), *(condition.kind for condition in border.conditions)}
        self.asks_for_classes = any(not names_from_forward(kind).isdisjoint(CLASS_TESTS) for kind in kinds)

    def run(self) -> RewriteResult:
        result = RewriteResult(kept=self.kept)
        fused: set[Node] = set()
        nodes = list(self.graph.nodes)
        for node in nodes:
            _pass_by_position(node, self.module(node))
        of_children = [node for node in nodes if node.meta[PLACE][0] is not self.block]
        # Of the terms of a sum the norm that is called last need not be moved.
        for node in (*(node for node in nodes if node.meta[PLACE][0] is self.block), *reversed(of_children)):
            module = self.module(node)
            if module is not None and is_norm(module) and node not in fused:
                site, chain = self.at_norm(node, module)
                result.sites.append(site)
                if chain is not None:
                    fused.update(chain.nodes)
                    self.fuse(chain)
        for node in nodes:
            if node not in fused:
                result.sites += self.at_activation(node)
        if self.changed:
            _check_names(self.graph)
            result.forward = self.forward()
        return result

    def module(self, node: Node) -> nn.Module | None:
        return called_module(self.block, node)

    def at_norm(self, node: Node, module: nn.Module) -> tuple[Site, Chain | None]:
        """The site of a call of a norm, and the chain that starts at the call.

        The chain is None if nothing is fused with the norm.
        """
        site = Site(module, type(module).__name__, place=node.meta[PLACE])
        if not self.ends.is_norm_alone(module):
            is_sync = isinstance(module, (nn.SyncBatchNorm, SyncBatchNormAct))
            unknown = f"{type(module).__name__} may compute something else"
            site.why = "its statistics are computed over several processes" if is_sync else unknown
        elif why := self.kept.get(module) or why_kept(module):
            site.why = why
        elif has_hooks(module):
            site.why = Reason("it has a hook, which would get a different tensor if the calls were fused", "remove the hook")
        elif (is_fusible(module) and getattr(module, "act", "identity") != "identity") or len(node.args) != 1 or node.kwargs:
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
        site.also = tuple(each.meta[PLACE] for each in chain.nodes)
        if len({block for block, _ in site.also}) > 1:
            site.found += f" (in {type(self.block).__name__})"
        site.label = f"{operator_of(module)}({', '.join([chain.act] + ['residual'] * (chain.residual is not None))})"
        site.is_fused, site.absorbed = True, tuple(chain.absorbed)
        return site, chain

    def chain_from(self, node: Node) -> tuple[Chain, str]:
        """Finds what can be fused with a norm: an addition after it, an activation after that, or both.

        Returns:
            The chain, and the reason why the chain has no activation. The reason is "" if it has one.
        """
        bn_alone = Chain([node], [node])
        users, why = way_to_user(self.block, node)
        if why:
            return bn_alone, why
        before, user = [node, *users][-2:]
        residual = addend(user, before)
        relied_on: list[Node] | None = []
        if user.target in WRITING_ADDITIONS and not user.kwargs and user.args[1:] == (before,) and isinstance(user.args[0], Node):
            # Nothing else may read the sum in the other term.
            relied_on, residual = self.aliasing.private(user.args[0]), user.args[0]
        if residual is None or relied_on is None:
            if user.target in WRITING_ADDITIONS:
                return bn_alone, Reason("the sum is written into the other term", "write y = y + bn(x), and not y += bn(x)")
            return bn_alone, self.add_activation(bn_alone, users)
        if not self.residual:
            return bn_alone, Reason("an addition follows, and residual=False", "convert with residual=True")
        chain = Chain([node, *users], [node, *users[:-1]], residual=residual, addition=user, names=["add"], relied_on=relied_on)
        users_of_sum, why = way_to_user(self.block, user)
        why = why or self.add_activation(chain, users_of_sum)
        obstacle = self.aliasing.why_it_cannot_move(chain, residual, user)
        return (bn_alone, obstacle) if obstacle else (chain, why)

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
        self.crosses = self.crosses or len({node.meta[ROOT] for node in chain.nodes}) > 1
        last.replace_all_uses_with(kernel)
        for node in reversed(chain.nodes):
            self.graph.erase_node(node)
        for node in chain.expected:
            module = self.module(node)
            if module is not None:
                self.expect(node, module)
        for node in chain.relied_on:
            self.rely_on(tuple(str(node.target).split(".")))
        self.changed = True

    def is_only_reader(self, node: Node) -> bool:
        """Whether nothing but this node reads its input, so that the node may as well leave it unwritten.

        The modules that compute the input are expected to stay if the answer is True.
        """
        if len(node.all_input_nodes) != 1:
            return False
        (x,) = node.all_input_nodes
        passed = [x]
        while is_identity(self.module(x)) and len(x.args) == 1 and len(x.all_input_nodes) == 1:
            (x,) = x.all_input_nodes
            passed.append(x)
        modules = {value: module for value in passed if (module := self.module(value)) is not None}
        is_known = not any(has_hooks(module) or module._modules for module in modules.values())
        if not is_known or not self.aliasing.is_fresh(x) or any(len(value.users) != 1 for value in passed):
            return False
        for value, module in modules.items():
            self.expect(value, module)
        return True

    def rely_on(self, path: Path) -> None:
        """Expects a module to stay, which is known to return a new tensor, and to write no argument unless it is of the user's."""
        module = self.block.get_submodule(".".join(path))
        kind = type(module)
        if not is_fusible(module) and not is_of_library(kind):
            if path not in self.expected:
                self.expect_derived(path, module)
            if not is_norm(module):
                self.paths.add(path)
                return
        self.expected.setdefault(path, Expected(path, tuple({kind, ours_for(kind) or kind}), None, None))
        if hasattr(module, "inplace"):
            self.attributes += ((path, "inplace", False),)
        if kind is nn.Sequential:
            self.paths.add(path)
        for name in module._modules:
            self.rely_on((*path, name))

    def expect(self, node: Node, module: nn.Module) -> None:
        path = tuple(str(node.target).split("."))
        if is_norm(module) and not is_fusible(module):
            # What it applies returns its argument.
            self.expect_derived(path, module)
            for name in self.ends.applied_by(module) or ():
                self.expected[(*path, name)] = expected((*path, name), module.get_submodule(name))
        else:
            self.expected[path] = expected(path, module)

    def expect_derived(self, path: Path, module: nn.Module) -> None:
        """Expects a module with a forward of its own to stay, and what this forward has read."""
        self.expected[path] = WrittenOut(path, type(module), type(module).forward)
        self.attributes += tuple(((*path, *place), name, value) for place, name, value in self.ends.read(module).attributes)

    def at_activation(self, node: Node) -> Iterator[Site]:
        """The site of an activation that is not fused. Yields nothing for any other node."""
        module = self.module(node)
        if module is not None:
            if self.is_silu_in_place(node, module):
                # The module keeps its class: another forward may call it for what it writes.
                self.expect(node, module)
                node.op, node.target = "call_function", activation.swish
                self.changed = True
                yield Site(module, type(module).__name__, "swish", absorbed=(module,), place=node.meta[PLACE])
            elif is_activation(module):
                # A call with other arguments may write it where this graph does not.
                keeps = keeps_output(module) and (self.reading.is_partial or self.aliasing.may_be_written(node))
                why = KEEPS_ITS_OUTPUT if keeps else ""
                yield Site(module, type(module).__name__, why=why, keeps_output=keeps, place=node.meta[PLACE])
            return
        if node.op not in ("call_function", "call_method"):
            return
        name = name_of(node)
        if node.target in ACTIVATION_FUNCTIONS:
            yield self.at_function(node, name)
        elif node.target in NORM_FUNCTIONS:
            why = Reason("it is a call of the function; only modules are fused", "use a module, such as nn.BatchNorm2d or nn.GroupNorm")
            yield Site(None, name, why=why, place=node.meta[PLACE])
        elif act_of_spelling(node.target) is not None and getattr(node.target, "__module__", "") != activation.__name__:
            yield Site(None, name, why=NOTHING_TO_FUSE, place=node.meta[PLACE])
        elif node.target in OTHER_FUNCTIONS:
            yield Site(None, name, why=f"there is no kernel for {name}", place=node.meta[PLACE])

    def is_silu_in_place(self, node: Node, module: nn.Module) -> bool:
        """Whether a node calls a SiLU in place, and one that is not in place can take its place."""
        is_in_place = type(module) is nn.SiLU and module.inplace and not has_hooks(module)
        return is_in_place and len(node.args) == 1 and not node.kwargs and self.is_only_reader(node)

    def at_function(self, node: Node, name: str) -> Site:
        """The site of a call of one of ACTIVATION_FUNCTIONS. Makes the node call our function if it can."""
        is_elu_out_of_place = node.target is F.elu and not (len(node.args) > 2 or node.kwargs.get("inplace"))
        is_silu_in_place = node.target is F.silu and (node.kwargs.get("inplace") or len(node.args) > 1)
        site = Site(None, name, place=node.meta[PLACE])
        if is_silu_in_place and not self.is_only_reader(node):
            site.why = IS_IN_PLACE
        elif has_scale(node):
            site.why = f"it {HAS_SCALE}"
        elif is_elu_out_of_place and self.aliasing.may_be_written(node):
            site.why = KEEPS_ITS_OUTPUT
        if site.why:
            return site
        if node.target is F.silu:
            node.args = node.args[:1]
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        if node.target in (F.leaky_relu_, F.elu_):
            node.kwargs = {**node.kwargs, "inplace": True}
        ours = ACTIVATION_FUNCTIONS[node.target]
        node.target = ours
        self.changed = True
        site.label = ours.__name__
        return site

    def forward(self) -> RewrittenForward:
        code = self.graph.python_code("self")
        # torch.fx adds names to every graph. Only those that the code uses are kept.
        names = {name: value for name, value in code.globals.items() if re.search(rf"(?<![\w.]){name}(?!\w)", code.src)}
        return RewrittenForward(
            code.src,
            names,
            self.attributes,
            tuple((path, children_of(self.block.get_submodule(".".join(path)), self.asks_for_classes)) for path in sorted(self.paths)),
            tuple(self.expected.values()),
            self.residual,
            type(self.block).forward,
            self.asks_for_classes,
            shared_in(self.block),
            self.reading.kinds,
            self.reading.given,
        )


def _pass_by_position(node: Node, module: nn.Module | None) -> None:
    """Turns self.bn(input=x) into self.bn(x)."""
    if module is None or node.kwargs.keys() != {"input"} or has_hooks(module):
        return
    if is_fusible(module) or is_activation(module):
        node.args, node.kwargs = (node.kwargs["input"],), {}


def _on_the_way(block: nn.Module, graph: Graph) -> set[Path]:
    """The path of every module through whose children the forward may have reached another module."""
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
    return paths


def _check_names(graph: Graph) -> None:
    """Raises ValueError if the name of a submodule cannot be written as `self.name`."""
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    for name in (name for target in targets for name in target.split(".")):
        if keyword.iskeyword(name) or unicodedata.normalize("NFKC", name) != name or any(character in name for character in '"\\\n\r'):
            raise ValueError(f"the name {name!r} of a submodule cannot be written as self.name")
