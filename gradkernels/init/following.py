"""Which activation follows each layer of a model: by tracing with torch.fx, else by the order of modules."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from torch import Tensor, fx, nn

from gradkernels.acts import ACTS, act_of_module, act_of_spelling
from gradkernels.batch_norm_act import _NormAct
from gradkernels.init.gain import LINEAR, NONLINEARITIES, Param
from gradkernels.layers import WEIGHTS
from gradkernels.preserved import preserved


class Activation(NamedTuple):
    """An activation found in a model: a name and a param that calculate_gain takes."""

    name: str
    param: Param = None

    def __str__(self) -> str:
        if self.param is None:
            return self.name
        values = self.param if isinstance(self.param, tuple) else (self.param,)
        return f"{self.name}({', '.join(f'{value:.4g}' for value in values)})"


class Following(NamedTuple):
    """The activation that follows a layer, None for none, and how that is known."""

    activation: Activation | None
    reason: str


BY_TRACING = "by tracing"

# The weights of these modules belong together and have an initialisation of their own.
SELF_INITIALISED = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

# The search for an activation stops at these functions: their result is no longer a sum of products of one
# layer.
_SIGNAL_ENDS = ("matmul", "bmm", "einsum", "softmax", "log_softmax", "scaled_dot_product_attention", "cross_entropy")

# Names are compared without underscores and capitals, which finds LeakyReLU, leaky_relu_ and log_sigmoid.
_NAMES = {name.replace("_", ""): name for name, entry in NONLINEARITIES.items() if entry is not LINEAR}
_NAMES |= {name.replace("_", ""): act.name for act in ACTS.values() if act.name != "identity" for name in act.operators}

# Activations written out as x f(x). mish is x tanh(softplus(x)).
_GATED = {"sigmoid": "swish", "hardsigmoid": "hardswish", "softplus": "mish"}

# The gain of relu, 1.41, lies between those of all activations. With gain 1 each relu layer halves the
# signal.
_ASSUMED = Activation("relu")


def _number(value: object, default: float) -> float:
    """The value of an activation's parameter in a model.

    A learnt parameter counts by its root mean square. The default stands for a value that only a run would
    show.
    """
    if isinstance(value, Tensor) and not value.is_meta:
        return value.detach().double().square().mean().sqrt().item()
    return value if isinstance(value, int | float) else default


def _activation(name: str, values: Sequence[object] = ()) -> Activation:
    """The activation of that name, with the values of its parameters in the order of NONLINEARITIES."""
    defaults = [*NONLINEARITIES[name].params.values()]
    numbers = [_number(values[place] if place < len(values) else None, default) for place, default in enumerate(defaults)]
    return Activation(name, tuple(numbers) if len(numbers) > 1 else next(iter(numbers), None))


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module computes or that a fused batch norm applies; None for an unknown one."""
    if isinstance(module, _NormAct):
        return None if module.act == "identity" else _activation(module.act, [module.act_param])
    act = act_of_module(module)
    if act is not None and act.option is not None:
        return _activation(act.name)
    for kind in type(module).__mro__:
        name = _NAMES.get(kind.__name__.lower())
        if name is not None and kind.__module__ in ("torch.nn.modules.activation", "gradkernels.activation"):
            return _activation(name, [getattr(module, param, default) for param, default in NONLINEARITIES[name].params.items()])
    return None


def _callee(node: fx.Node, root: nn.Module) -> str | nn.Module:
    """What a node calls: a module, or a function's name without the underscore of an in-place version."""
    if node.op == "call_module":
        return root.get_submodule(str(node.target))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.rstrip("_")


def _arguments(node: fx.Node, root: nn.Module, names: Iterable[str]) -> list[object]:
    """The arguments after the first one, by name. A parameter of the model is returned as such."""
    values = [node.args[place] if len(node.args) > place else node.kwargs.get(name) for place, name in enumerate(names, start=1)]
    return [attrgetter(str(value.target))(root) if isinstance(value, fx.Node) and value.op == "get_attr" else value for value in values]


def _activation_at(node: fx.Node, root: nn.Module) -> Activation | None:
    """The activation that a node computes."""
    callee = _callee(node, root)
    if isinstance(callee, nn.Module):
        activation = activation_of(callee)
    elif callee in ("clamp", "clip", "clamp_min"):
        low, high = _arguments(node, root, ("min", "max"))
        activation = Activation("relu") if (low, high) == (0, None) else None
        if isinstance(low, int | float) and isinstance(high, int | float):
            activation = Activation("hardtanh", (low, high))
    elif (name := _NAMES.get(callee.replace("_", ""))) is not None:
        act = act_of_spelling(node.target, node.kwargs)
        if act is not None and act.option is not None:
            name = act.name
        # The second argument of torch's silu is inplace.
        has_param = act is None or act.spellings[node.target] is not None
        activation = _activation(name, _arguments(node, root, NONLINEARITIES[name].params) if has_param else [])
    else:
        activation = None
    if activation is not None and activation.name in _GATED:
        source = node.all_input_nodes[0]
        gates = [user for user in node.users if _callee(user, root) == "tanh"] if activation.name == "softplus" else [node]
        if any(user in source.users and _callee(user, root) in ("mul", "imul") for gate in gates for user in gate.users):
            return _activation(_GATED[activation.name])
    return activation


class _Tracer(fx.Tracer):
    """Traces into modules, except layers, activations, untraceable modules and torch's own."""

    def __init__(self, untraceable: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self._untraceable = untraceable

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        known = isinstance(module, (*WEIGHTS, _NormAct)) or activation_of(module) is not None or module in self._untraceable
        return known or super().is_leaf_module(module, qualified_name)


class _Traced(NamedTuple):
    """The graph of a module's forward.

    Attributes:
        module: the module.
        graph: its forward, up to the line that could not be traced.
        error: why tracing stopped there; None if all of it was traced.
    """

    module: nn.Module
    graph: fx.Graph
    error: str | None


def _trace(module: nn.Module, untraceable: Mapping[nn.Module, str]) -> _Traced:
    tracer = _Tracer(untraceable)
    try:
        return _Traced(module, tracer.trace(module), None)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        return _Traced(module, tracer.graph, f"{type(module).__name__} cannot be traced ({first_line})")


def _trace_parts(model: nn.Module, untraceable: dict[nn.Module, str]) -> list[_Traced]:
    """Trace the model, or if that fails each module in it, outermost first.

    Modules that cannot be traced are added to untraceable, each with the error.
    """
    # Tracing runs each forward on stand-ins for tensors, which a forward may store in the model.
    with preserved(model):
        traced = [_trace(model, untraceable)]
        if traced[0].error is None:
            return traced
        traced.clear()
        # Innermost first, so that a module that can be traced keeps the untraceable ones inside it whole.
        for module in reversed([*model.modules()]):
            if module is model or not _Tracer(untraceable).is_leaf_module(module, ""):
                traced.append(_trace(module, untraceable))
                if (error := traced[-1].error) is not None:
                    untraceable[module] = error
        return traced[::-1]


def _next_activation(
    node: fx.Node, root: nn.Module, untraceable: Mapping[nn.Module, str], is_whole: bool
) -> tuple[Activation | None, bool]:
    """Find the nearest activation that the value of a node reaches before another layer.

    Args:
        node: the call of a layer.
        root: the module whose graph the node belongs to.
        untraceable: modules that were kept whole.
        is_whole: whether root is all of the model, so that nothing follows its output.

    Returns:
        The activation or None; then whether the value goes to where it was not traced and an activation may
        follow.
    """
    reached, seen, is_lost = [node], {node}, False
    for value in reached:
        for user in value.users:
            activation = _activation_at(user, root)
            if activation is not None:
                return activation, False
            callee = _callee(user, root)
            ends = callee in _SIGNAL_ENDS if isinstance(callee, str) else isinstance(callee, (*WEIGHTS, *SELF_INITIALISED))
            is_lost = is_lost or callee in untraceable or (user.op == "output" and not is_whole)
            if user not in seen and not ends:
                seen.add(user)
                reached.append(user)
    return None, is_lost


def following_activations(model: nn.Module) -> dict[nn.Module, Following]:
    """Find the activation that follows each layer.

    Tracing decides where it can. Elsewhere the order of modules decides for a layer whose next module is an
    activation, and for the last layer. Any other layer is assumed to be followed by relu.
    """
    untraceable: dict[nn.Module, str] = {}
    following: dict[nn.Module, Following] = {}
    without_activation: set[nn.Module] = set()
    for module, graph, error in _trace_parts(model, untraceable):
        for node in graph.nodes:
            if node.op == "call_module" and isinstance(layer := module.get_submodule(str(node.target)), WEIGHTS) and layer not in following:
                activation, is_lost = _next_activation(node, module, untraceable, is_whole=module is model)
                if activation is not None:
                    following[layer] = Following(activation, BY_TRACING)
                elif error is None and not is_lost:
                    without_activation.add(layer)
    following = {layer: Following(None, BY_TRACING) for layer in without_activation} | following
    known = [module for module in model.modules() if isinstance(module, WEIGHTS) or activation_of(module) is not None]
    reason = "; ".join(dict.fromkeys(untraceable.values())) or "the forward does not reach it"
    for current, after in pairwise([*known, None]):
        if isinstance(current, WEIGHTS) and current not in following:
            if isinstance(after, WEIGHTS):
                following[current] = Following(_ASSUMED, f"assumed, because {reason}")
            else:
                activation = None if after is None else activation_of(after)
                following[current] = Following(activation, f"by the order of modules, because {reason}")
    return following
