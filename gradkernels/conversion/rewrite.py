"""Finds batch normalisations, additions and activations in the graph of one forward, and writes the forward that fuses them.

Only nodes whose value nobody else sees are fused. Without a residual the fused operator stands where the batch norm stood; with one it
stands where the activation did, so what lies between must neither write to nor alias what is then read later.
"""

import inspect
import keyword
import operator
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from gradkernels import activation
from gradkernels.acts import ACTS, act_of_module, act_of_spelling, check_act, resolve_act
from gradkernels.batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from gradkernels.conversion.attributes import OF_EVERY_MODULE, Path, held
from gradkernels.conversion.bytecode import CLASS_TESTS
from gradkernels.conversion.guard import Expected, FusedForward, children_of, has_hooks, normalize, shared_in
from gradkernels.conversion.purity import is_of_library, names_from_forward
from gradkernels.conversion.trace import IN_PLACE, Reading, read
from gradkernels.sync_batch_norm_act import SyncBatchNormAct

# torch's class -> ours, which computes the same on its own; with a call that tells of an activation it computes that too.
BATCH_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNormAct1d,
    nn.BatchNorm2d: BatchNormAct2d,
    nn.BatchNorm3d: BatchNormAct3d,
}
# The same for activations that stand alone.
ACTIVATION_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    nn.LeakyReLU: activation.LeakyReLU,
    nn.ELU: activation.ELU,
    nn.PReLU: activation.PReLU,
    nn.SiLU: activation.SiLU,
}
# What a forward may go through instead of calling it.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CALLABLE = {*BATCH_NORMS, *BATCH_NORMS.values()}

# A function of torch's -> ours. F.silu is ours only where it is not in place, which ours is not.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), activation.leaky_relu),
    **dict.fromkeys((F.elu, F.elu_), activation.elu),
    F.silu: activation.swish,
    F.prelu: activation.prelu,
}
_OTHER_FUNCTIONS = {
    getattr(F, name): name
    for name in (
        "celu",
        "gelu",
        "glu",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "logsigmoid",
        "mish",
        "rrelu",
        "selu",
        "softplus",
        "softsign",
    )
} | {F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", "sigmoid": "sigmoid", torch.tanh: "tanh", "tanh": "tanh", F.tanh: "tanh"}
_WRITING_ADDITIONS = (operator.iadd, "add_")
_ADDITIONS = (operator.add, torch.add, "add", *_WRITING_ADDITIONS)

# Calls that write nothing and whose result shares no memory with what they are given.
_FRESH_MODULES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, *_CALLABLE),
)
_FRESH_FUNCTIONS = (operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.cat, normalize)


KEEPS_ITS_OUTPUT = "gradkernels.ELU keeps its output for the gradient, and torch's its input: what reads the output may write into it"


def keeps_output(module: nn.Module) -> bool:
    """Whether ours keeps the output for the gradient where torch's keeps the input."""
    return isinstance(module, nn.ELU) and not module.inplace


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation, with a kernel or without."""
    return (
        (act_of_module(module) is not None and not isinstance(module, nn.Identity))
        or (type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention))
        or isinstance(module, (activation.PReLU, activation.RReLU))
    )


@dataclass
class Site:
    """One place in a forward where a batch norm or an activation is called.

    module: that which is called, None for a function. found: what stands there. fused: how it is called from now on; None where the
    call is left, and `why` says why. keeps_output: it is an ELU whose output may be written, which ours must not find written.
    """

    module: nn.Module | None
    found: str
    fused: str | None = None
    is_fused: bool = False
    why: str = ""
    absorbed: tuple[nn.Module, ...] = ()
    keeps_output: bool = False


@dataclass
class Fusion:
    """Of one block: its sites, and the forward to give it, None where it keeps its own. problem: why it could not be read."""

    sites: list[Site] = field(default_factory=list)
    forward: FusedForward | None = None
    problem: str | None = None


@dataclass
class _Chain:
    """Nodes from a batch norm to the last one that is computed with it, each of them read by the next alone."""

    nodes: list[Node]
    expected: list[Node]
    act: str = "identity"
    act_param: float = 0.0
    residual: Node | None = None
    addition: Node | None = None
    names: list[str] = field(default_factory=list)
    absorbed: list[nn.Module] = field(default_factory=list)


def fuse(block: nn.Module, residual: bool) -> Fusion:
    """What can be done with the forward of one block; nothing is changed."""
    reading = read(block)
    try:
        fuser = _Fuser(block, reading.graph, reading.attributes, residual) if reading.graph is not None else None
        fusion = _fuse_norm_act(block, reading, residual) if fuser is None else fuser.run()
    except (LookupError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        return Fusion(problem=f"cannot be written anew: {error}")
    if not fusion.sites:
        fusion.problem = reading.problem
    return fusion


class _Fuser:
    def __init__(self, block: nn.Module, graph: Graph, attributes: tuple[tuple[Path, str, Any], ...], residual: bool) -> None:
        self.block = block
        self.graph = graph
        self.attributes = attributes
        self.residual = residual
        self.expected: dict[Path, Expected] = {}
        self.changed = False
        self.asks_for_classes = not names_from_forward(type(block)).isdisjoint(CLASS_TESTS)

    def run(self) -> Fusion:
        children = self.children()
        fusion = Fusion()
        taken: set[Node] = set()
        order = list(self.graph.nodes)
        for node in order:
            module = self.module(node)
            if module is None or node.kwargs.keys() != {"input"} or has_hooks(module):
                continue
            if type(module) in _CALLABLE or is_activation(module):
                # self.bn(input=x) is self.bn(x).
                node.args, node.kwargs = (node.kwargs["input"],), {}
        for node in order:
            module = self.module(node)
            if isinstance(module, _BatchNorm) and node not in taken:
                site, chain = self.at_batch_norm(node, module)
                fusion.sites.append(site)
                if chain is not None:
                    taken.update(chain.nodes)
                    self.write(chain, module)
        for node in order:
            if node not in taken:
                fusion.sites += self.at_activation(node)
        if self.changed:
            fusion.forward = self.forward(children)
        return fusion

    def module(self, node: Node | None) -> nn.Module | None:
        return self.block.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None

    def at_batch_norm(self, node: Node, module: _BatchNorm) -> tuple[Site, _Chain | None]:
        site = Site(module, type(module).__name__)
        if type(module) not in _CALLABLE:
            is_sync = isinstance(module, (nn.SyncBatchNorm, SyncBatchNormAct))
            site.why = "its statistics are those of many processes" if is_sync else f"{type(module).__name__} may compute something else"
        elif has_hooks(module):
            site.why = "it is hooked: its hook would see another tensor"
        elif getattr(module, "act", "identity") != "identity" or len(node.args) != 1 or node.kwargs:
            site.why = "has an activation or a residual already"
        if site.why:
            return site, None
        chain, site.why = self.extend(node)
        if len(chain.nodes) == 1:
            before = self.activation_name(node.all_input_nodes[0]) if node.all_input_nodes else None
            if before is not None:
                site.why = f"its activation, {before}, stands before it: only one after it can be fused"
            return site, None
        site.found = ", ".join([site.found, *chain.names])
        site.fused = f"batch_norm_act({', '.join([chain.act] + ['residual'] * (chain.residual is not None))})"
        site.is_fused = True
        site.absorbed = tuple(chain.absorbed)
        return site, chain

    def extend(self, node: Node) -> tuple[_Chain, str]:
        """Follows the value of a batch norm through an addition to an activation; and what ended it, "" after an activation."""
        chain = _Chain([node], [node])
        after, why = self.follow(node)
        if why:
            return chain, why
        residual = self.addend(after[-1], [node, *after][-2])
        if residual is None:
            if after[-1].target in _WRITING_ADDITIONS:
                return chain, "its sum is written over the other term"
            return chain, self.take_activation(chain, after)
        if not self.residual:
            return chain, "an addition follows, and residual=False"
        whole = _Chain([node, *after], [node, *after[:-1]], residual=residual, addition=after[-1], names=["add"])
        beyond, why = self.follow(after[-1])
        why = why or self.take_activation(whole, beyond)
        hindrance = self.hinders_move(whole, residual, after[-1])
        return (chain, hindrance) if hindrance else (whole, why)

    def follow(self, node: Node) -> tuple[list[Node], str]:
        """The only reader of a value, behind any nn.Identity; or what is there instead."""
        after: list[Node] = []
        while True:
            readers = list(node.users)
            if not readers:
                return after, "nothing reads its output"
            times = sum(sum(each is node for each in (*reader.args, *reader.kwargs.values())) or 1 for reader in readers)
            if times > 1:
                return after, f"its output is read {times} times"
            (node,) = readers
            after.append(node)
            module = self.module(node)
            if type(module) is not nn.Identity or has_hooks(module) or len(node.args) != 1:
                return after, ""

    def take_activation(self, chain: _Chain, after: list[Node]) -> str:
        node = after[-1]
        found = self.activation(node)
        if isinstance(found, str):
            return found
        act, act_param, module, name = found
        chain.nodes += after
        chain.expected += after if module is not None else after[:-1]
        chain.act, chain.act_param = act, act_param
        chain.names.append(name)
        if module is not None:
            chain.absorbed.append(module)
        return ""

    def activation(self, node: Node) -> tuple[str, float, nn.Module | None, str] | str:
        """What a node computes, or why it is not an activation that a kernel has."""
        module = self.module(node)
        if module is not None:
            kind = type(module).__name__
            if not is_activation(module):
                return f"{kind} follows, no activation"
            if act_of_module(module) is None:
                return f"there is no kernel for {kind} with batch norm"
            if any(True for _ in module.parameters()):
                return f"the parameter of {kind} is learnt"
            if has_hooks(module):
                return f"{kind} is hooked: its hook would see another tensor"
            if len(node.args) != 1 or node.kwargs:
                return f"{kind} is called with more than one argument"
            return *resolve_act(module, None), module, kind
        if node.op == "output":
            return "its output is returned, no activation follows"
        if node.target is normalize:
            return "its output is the residual of another"
        name = _name(node)
        act = act_of_spelling(node.target) if node.op in ("call_function", "call_method") else None
        if act is None:
            return f"there is no kernel for {name}" if node.target in _OTHER_FUNCTIONS else f"{name} follows, no activation"
        if _is_scaled(node):
            return f"{name} scales besides"
        parameter = act.spellings[node.target]
        value: Any = None
        if parameter is not None:
            value = node.args[1] if len(node.args) > 1 else node.kwargs.get(parameter)
        if not (value is None or type(value) in (int, float)):
            return f"the parameter of {name} is computed"
        return act.name, check_act(act.name, value), None, name

    def activation_name(self, node: Node) -> str | None:
        module = self.module(node)
        if module is not None:
            return type(module).__name__ if is_activation(module) else None
        is_known = act_of_spelling(node.target) is not None or node.target in _FUNCTIONS or node.target in _OTHER_FUNCTIONS
        return _name(node) if is_known else None

    def addend(self, node: Node, value: Node) -> Node | None:
        """What a node adds to `value`; None where it does something else, or writes the sum into the other."""
        if node.target not in _ADDITIONS or node.kwargs or len(node.args) != 2 or not all(isinstance(each, Node) for each in node.args):
            return None
        left, right = node.args
        if left is value:
            return right if isinstance(right, Node) else None
        return left if isinstance(left, Node) and node.target not in _WRITING_ADDITIONS else None

    # what lies between

    def hinders_move(self, chain: _Chain, residual: Node, addition: Node) -> str:
        """Why the batch norm cannot be computed where the chain ends instead of where it begins, or the residual be read there."""
        # With what is fused by now in the place of what it was.
        order = list(self.graph.nodes)
        first, sum_at, last = (order.index(each) for each in (chain.nodes[0], addition, chain.nodes[-1]))
        bn = self.module(chain.nodes[0])
        state = self.state_of(bn, chain)
        read_later = self.aliases(chain.nodes[0].all_input_nodes[0], chain)
        residual_aliases = self.aliases(residual, chain)
        for place in range(first + 1, last):
            node = order[place]
            if node in chain.nodes:
                continue
            if place > sum_at:
                read_later |= residual_aliases
            module = self.module(node)
            if module is not None and any(each is bn or _keeps(each, bn) for each in module.modules()):
                return "it may be called again before its sum is complete"
            if state.intersection(node.all_input_nodes):
                if node.target is normalize:
                    return "it may be called again before its sum is complete"
                return f"{_name(node)}, between it and its activation, may read or write its statistics"
            if not self.is_fresh(node) and read_later.intersection(node.all_input_nodes):
                return f"{_name(node)}, between it and its activation, may write what it reads"
        if ACTS[chain.act].saves == "value":
            for node in residual_aliases:
                writers = [each for each in node.users if order.index(each) > last and not self.is_fresh(each) and self.writes(each)]
                if writers:
                    return f"{_name(writers[0])} writes the residual, which the gradient of {chain.act} needs"
        return ""

    def state_of(self, bn: nn.Module | None, chain: _Chain) -> set[Node]:
        """Every node whose value is the batch norm itself or may share memory with its parameters and buffers."""
        found: set[Node] = set()
        for node in self.graph.nodes:
            if node.op == "get_attr" and bn is not None:
                value = operator.attrgetter(str(node.target))(self.block)
                if value is bn:
                    found.add(node)
                elif any(value is each for each in (*bn.parameters(), *bn.buffers())):
                    found |= self.aliases(node, chain)
        return found

    def aliases(self, node: Node, chain: _Chain) -> set[Node]:
        """Every node whose value may share memory with that of `node`."""
        found: set[Node] = set()
        stack = [node]
        while stack:
            node = stack.pop()
            if node in found or node in chain.nodes:
                continue
            found.add(node)
            if node.op in ("placeholder", "get_attr"):
                # Two arguments may be one tensor.
                stack += [each for each in self.graph.nodes if each.op in ("placeholder", "get_attr")]
            elif not self.is_fresh(node):
                stack += node.all_input_nodes
            stack += [each for each in node.users if not self.is_fresh(each)]
        return found

    def is_fresh(self, node: Node) -> bool:
        module = self.module(node)
        if module is not None:
            parts = [each for each in module.modules() if type(each) is not nn.Sequential]
            return bool(parts) and all(map(_is_fresh_module, parts)) and not any(map(has_hooks, module.modules()))
        if node.op != "call_function" or node.target not in _FRESH_FUNCTIONS or "out" in node.kwargs:
            return False
        # A sum of lists has their tensors.
        return node.target is torch.cat or not any(isinstance(each, (list, tuple)) for each in node.args)

    def writes(self, node: Node) -> bool:
        module = self.module(node)
        if module is not None:
            return any(getattr(each, "inplace", False) or not is_of_library(type(each)) for each in module.modules())
        return (
            "out" in node.kwargs
            or _name(node).endswith("_")
            or _name(node) in IN_PLACE
            or any(each is True for each in (*node.args, node.kwargs.get("inplace")))
        )

    # standalone activations

    def may_be_written(self, node: Node) -> bool:
        """Whether a value, or what shares its memory, may be written after it was computed: it is returned, or read by what may."""
        return not all(self.is_fresh(each) and not self.writes(each) for each in node.users)

    def at_activation(self, node: Node) -> Iterator[Site]:
        module = self.module(node)
        if module is not None:
            if is_activation(module):
                keeps = keeps_output(module) and self.may_be_written(node)
                yield Site(module, type(module).__name__, why=KEEPS_ITS_OUTPUT if keeps else "", keeps_output=keeps)
            return
        if node.op not in ("call_function", "call_method"):
            return
        name = _name(node)
        if node.target in _FUNCTIONS:
            site = Site(None, name)
            if node.target is F.silu and (node.kwargs.get("inplace") or len(node.args) > 1):
                site.why = "it is in place, which ours is not"
            elif _is_scaled(node):
                site.why = "it scales besides"
            elif node.target is F.elu and not (len(node.args) > 2 or node.kwargs.get("inplace")) and self.may_be_written(node):
                site.why = KEEPS_ITS_OUTPUT
            else:
                if node.target is F.silu:
                    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
                if node.target in (F.leaky_relu_, F.elu_):
                    node.kwargs = {**node.kwargs, "inplace": True}
                node.target = _FUNCTIONS[node.target]
                site.fused = node.target.__name__
                self.changed = True
            yield site
        elif node.target in (F.batch_norm, torch.batch_norm):
            yield Site(None, name, why="it is a call of the function: only modules are joined with what follows")
        elif act_of_spelling(node.target) is not None and getattr(node.target, "__module__", "") != activation.__name__:
            yield Site(None, name, why="torch's own is kept: alone there is nothing to fuse")
        elif node.target in _OTHER_FUNCTIONS:
            yield Site(None, name, why=f"there is no kernel for {name}")

    # writing

    def write(self, chain: _Chain, module: _BatchNorm) -> None:
        place = chain.nodes[0] if chain.residual is None else chain.nodes[-1]
        last = chain.nodes[-1]
        with self.graph.inserting_before(place):
            bn = self.graph.get_attr(str(chain.nodes[0].target))
            (x,) = chain.nodes[0].args
            writes = chain.addition is not None and chain.addition.target in _WRITING_ADDITIONS
            is_second = chain.addition is not None and chain.addition.args[0] is chain.residual
            arguments = (bn, x, chain.residual, chain.act, chain.act_param, *[writes, is_second] * (writes or is_second))
            fused = self.graph.call_function(normalize, arguments)
        last.replace_all_uses_with(fused)
        for node in reversed(chain.nodes):
            self.graph.erase_node(node)
        for node in chain.expected:
            self.expect(node)
        self.changed = True

    def expect(self, node: Node) -> None:
        path = tuple(str(node.target).split("."))
        module = self.module(node)
        if isinstance(module, _BatchNorm):
            self.expected[path] = Expected(path, (BATCH_NORMS.get(type(module), type(module)),), "act", "identity")
        elif module is not None:
            self.expected[path] = expected_act(path, module)

    def children(self) -> tuple[tuple[Path, tuple[tuple[str, Any], ...]], ...]:
        """What the forward may have gone through on its way to what it calls."""
        paths: set[Path] = {()}
        for node in self.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                path = tuple(str(node.target).split("."))
                paths.update(path[:length] for length in range(len(path)))
        called = {tuple(str(node.target).split(".")) for node in self.graph.nodes if node.op == "call_module"}
        for name, each in self.block.named_modules():
            path = tuple(name.split("."))
            # What it goes through may be empty, and filled later.
            if isinstance(each, CONTAINERS) and not any(path[:length] in called for length in range(1, len(path) + 1)):
                paths.add(path if name else ())
        return tuple((path, children_of(self.block.get_submodule(".".join(path)), self.asks_for_classes)) for path in sorted(paths))

    def forward(self, children: tuple[tuple[Path, tuple[tuple[str, Any], ...]], ...]) -> FusedForward:
        code = self.graph.python_code("self")
        # Without what torch.fx adds for every graph.
        names = {name: value for name, value in code.globals.items() if re.search(rf"(?<![\w.]){name}(?!\w)", code.src)}
        for part in (part for node in self.graph.nodes if node.op in ("call_module", "get_attr") for part in str(node.target).split(".")):
            if keyword.iskeyword(part) or unicodedata.normalize("NFKC", part) != part or any(each in part for each in '"\\\n\r'):
                raise ValueError(f"a submodule is named {part!r}")
        expected, of, shared = tuple(self.expected.values()), type(self.block).forward, shared_in(self.block)
        return FusedForward(code.src, names, self.attributes, children, expected, self.residual, of, self.asks_for_classes, shared)


def _is_fresh_module(module: nn.Module) -> bool:
    return type(module) in _FRESH_MODULES or (is_activation(module) and not getattr(module, "inplace", False))


def _keeps(module: nn.Module, bn: nn.Module | None) -> bool:
    """Whether a module has another in a list or a dict of its own."""
    values = [value for name, value in module.__dict__.items() if name not in OF_EVERY_MODULE]
    return any(each is bn for value in values for each in held(value))


def _is_scaled(node: Node) -> bool:
    """torch.nn.functional.elu_ has two factors more than elu."""
    return node.target is F.elu_ and (len(node.args) > 2 or not node.kwargs.keys() <= {"input", "alpha"})


def _name(node: Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def applied_after(bn: _BatchNorm) -> list[nn.Module] | None:
    """What a batch norm applies to its result in its own forward, as timm's BatchNormAct2d does; None where it does anything else."""
    path = _norm_act(bn, read(bn))
    return None if path is None else [bn.get_submodule(each) for each in path]


def _fuse_norm_act(block: nn.Module, reading: Reading, residual: bool) -> Fusion:
    path = _norm_act(block, reading)
    if not path:
        return Fusion()
    act = block.get_submodule(path[-1])
    passed = [block.get_submodule(each) for each in path[:-1]]
    site = Site(block, ", ".join([type(block).__name__, *(type(each).__name__ for each in (*passed, act))]))
    expected: list[Expected] = []
    if any(map(has_hooks, (*passed, act))):
        why = "what it applies is hooked"
    elif any(type(each) is not nn.Identity for each in passed):
        why = f"{type(passed[0]).__name__} stands before its activation"
    elif act_of_module(act) is None or any(True for _ in act.parameters()):
        why = f"there is no kernel for {type(act).__name__} with batch norm"
    else:
        why = ""
    result = "normalize(self, x, None, 'identity', 0.0)"
    if why:
        site.fused, site.why = "batch_norm_act(identity)", why
        for each in path:
            result = f"self.{each}({result})"
    else:
        name, act_param = resolve_act(act, None)
        expected = [Expected((each,), (nn.Identity,), None, None) for each in path[:-1]] + [expected_act((path[-1],), act)]
        site.fused, site.is_fused, site.absorbed = f"batch_norm_act({name})", name != "identity", (act,)
        result = f"normalize(self, x, None, {name!r}, {act_param!r})"
    source = f"def forward(self, x):\n    return {result}\n"
    children = (((), children_of(block, False)),)
    forward = FusedForward(source, {"normalize": normalize}, (), children, tuple(expected), residual, type(block).forward, False, ())
    return Fusion([site], forward)


def _norm_act(block: nn.Module, reading: Reading) -> list[str] | None:
    """Where both modes are exactly a batch norm and submodules applied one after another: the names of these."""
    if not isinstance(block, _BatchNorm) or reading.by_mode is None:
        return None
    training, evaluation = (_norm_act_in(block, graph, mode) for graph, mode in zip(reading.by_mode, (True, False), strict=True))
    return training if training == evaluation else None


def _norm_act_in(block: _BatchNorm, graph: Graph, training: bool) -> list[str] | None:
    nodes = list(graph.nodes)
    seen = {nodes[-1]}
    path: list[str] = []
    if len(nodes[-1].all_input_nodes) != 1:
        return None
    (node,) = nodes[-1].all_input_nodes
    while node.op == "call_module" and len(node.all_input_nodes) == 1 and node.args == tuple(node.all_input_nodes):
        path.insert(0, str(node.target))
        seen.add(node)
        (node,) = node.all_input_nodes
    if node.target is not F.batch_norm:
        return None
    given = [str(each.target) if isinstance(each, Node) else each for each in (*node.args, *node.kwargs.values())]
    inputs = [str(each.target) for each in nodes if each.op == "placeholder"]
    fields = ["running_mean", "running_var", "weight", "bias"]
    named = list(node.kwargs)
    if given != [*inputs, *fields, training, block.momentum, block.eps] or named != list(_BATCH_NORM)[len(_BATCH_NORM) - len(named) :]:
        return None
    seen.add(node)
    counted = 0
    for each in nodes:
        if each in seen or each.op in ("placeholder", "get_attr"):
            continue
        if each.target == "add_" and [str(arg) for arg in each.args] == ["num_batches_tracked", "1"]:
            counted += 1
        elif each.target not in (getattr, operator.eq, torch._assert):
            return None
    return path if counted == training else None


_BATCH_NORM = inspect.signature(F.batch_norm).parameters


def expected_act(path: Path, module: nn.Module) -> Expected:
    """An activation that is not called: the class that it has, or the one that convert gives it where it is called elsewhere."""
    act = act_of_module(module)
    attribute = None if act is None else act.modules[type(module)]
    kinds = tuple({type(module), ACTIVATION_MODULES.get(type(module), type(module))})
    return Expected(path, kinds, attribute, None if attribute is None else getattr(module, attribute))
