"""Initialisation: Xavier, He and LeCun, the gain of every activation, and the right one of them for each layer of a model.

The gain of an activation f is 1 / sqrt(E[f(z)^2]) with z from N(0, 1), computed and not looked up, so that it exists for every activation
and every parameter of one. That keeps the mean square of a signal from layer to layer; torch.nn.init.calculate_gain says the same of the
relu family and of linear layers, and has other numbers for sigmoid (1), tanh (5/3) and selu (3/4).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gradkernels import text
from gradkernels.acts import ACTS, Act, act_of_spelling
from gradkernels.batch_norm_act import _BatchNormAct
from gradkernels.layers import WEIGHTS, unwrapped
from gradkernels.preserved import preserved

__all__ = [
    "InitReport",
    "Initialised",
    "apply_",
    "calculate_gain",
    "he_normal_",
    "he_uniform_",
    "lecun_normal_",
    "lecun_uniform_",
    "xavier_normal_",
    "xavier_uniform_",
]

Param: TypeAlias = float | tuple[float, ...] | None
_Mode: TypeAlias = Literal["fan_in", "fan_out"]

xavier_uniform_ = nn.init.xavier_uniform_
xavier_normal_ = nn.init.xavier_normal_


class _Activation(NamedTuple):
    """scheme: who derived the initialisation for it; second_moment: E[f(z)^2] for its parameters; params: their names and defaults.

    The names are those of the module's attributes and of the function's keywords, in the order of the function's arguments.
    """

    scheme: str
    second_moment: Callable[..., float]
    params: Mapping[str, float] = {}


def _quadrature(f: Callable[..., Tensor]) -> Callable[..., float]:
    """E[f(z, *params)^2] for z from N(0, 1).

    Each half line by the trapezoidal rule after z = exp(pi / 2 sinh t): it converges exponentially for an f that is smooth but at 0,
    whatever the scale on which it bends, since the nodes lie as densely at 1e-9 as at 1. A corner elsewhere, as of hardtanh, leaves a
    relative error of 1e-5, a jump one of 1e-4.
    """

    def second_moment(*params: float) -> float:
        t = torch.linspace(-4, 2, 1025, dtype=torch.float64, device="cpu")
        half = (math.pi / 2 * t.sinh()).exp()
        weight = half * t.cosh() * (math.pi / 2) * (t[1] - t[0]) * (-half.square() / 2).exp() / math.sqrt(2 * math.pi)
        values = f(torch.stack([half, -half]), *params).square()
        # Far out e^x - 1 may overflow where the weight is 0.
        moment: float = torch.where(weight > 0, values * weight, 0.0).sum().item()
        return moment

    return second_moment


def _line(lower: float, upper: float) -> float:
    """Of x where x > 0, a x elsewhere, a uniform between two bounds."""
    return (1 + (lower * lower + lower * upper + upper * upper) / 3) / 2


def _computed(scheme: str, *names: str, **params: float) -> dict[str, _Activation]:
    """Functions of torch.nn.functional."""
    return {name: _Activation(scheme, _quadrature(getattr(F, name)), params) for name in names}


def _of_record(act: Act) -> _Activation:
    if act.param is None or act.default is None:
        return _Activation("he", _quadrature(lambda z: act.function(z, 0.0)))
    return _Activation("he", _quadrature(act.function), {act.param: act.default})


_LINEAR = _Activation("lecun", lambda: 1.0)

# The names are those of torch.nn.functional; swish is ours. He's is for what lets one side through, Xavier's for what treats both alike.
_ACTIVATIONS: dict[str, _Activation] = {
    **{name: _of_record(act) for act in ACTS.values() for name in act.operators},
    **dict.fromkeys(("linear", "identity", "conv1d", "conv2d", "conv3d"), _LINEAR),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _LINEAR),
    "relu": _Activation("he", lambda: _line(0.0, 0.0)),
    "leaky_relu": _Activation("he", lambda slope: _line(slope, slope), {"negative_slope": 0.01}),
    "prelu": _Activation("he", lambda slope: _line(slope, slope), {"weight": 0.25}),
    "rrelu": _Activation("he", _line, {"lower": 1 / 8, "upper": 1 / 3}),
    **_computed("he", "gelu", "mish", "hardswish", "logsigmoid"),
    **_computed("he", "celu", alpha=1.0),
    **_computed("he", "softplus", beta=1.0),
    # What passes the gate is linear, and half of the channels.
    "glu": _Activation("he", _quadrature(torch.sigmoid)),
    **_computed("lecun", "selu"),
    **_computed("xavier", "sigmoid", "tanh", "hardsigmoid", "softsign", "tanhshrink"),
    **_computed("xavier", "softshrink", "hardshrink", lambd=0.5),
    **_computed("xavier", "hardtanh", min_val=-1.0, max_val=1.0),
}


def calculate_gain(nonlinearity: str, param: Param = None) -> float:
    """What the standard deviation of weights is multiplied by for the activation that follows them.

        gain = 1 / sqrt(E[f(z)^2]),  z from N(0, 1)

    Equal to torch.nn.init.calculate_gain for relu, leaky_relu and linear layers. torch gives 1 for sigmoid, 5/3 for tanh and
    3/4 for selu, where the definition gives 1.8462, 1.5925 and 1, and has nothing for the others.

    The mean square 1 that is kept is a stable one for most. After swish, gelu, mish, hardswish, tanhshrink, softshrink and
    hardshrink a signal that is smaller shrinks and a larger one grows, so deep networks of these need batch norm as well.

    Args:
        nonlinearity: "linear" (or a convolution's name), "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "celu",
            "swish" or "silu", "gelu", "mish", "hardswish", "softplus", "logsigmoid", "glu", "selu", "sigmoid", "hardsigmoid",
            "tanh", "hardtanh", "softsign", "tanhshrink", "softshrink" or "hardshrink".
        param: the activation's own: negative_slope (None is 0.01), the slope of prelu (0.25), (lower, upper) of rrelu
            (1/8, 1/3), alpha of elu and celu (1), beta of swish and softplus (1), (min_val, max_val) of hardtanh (-1, 1), lambd
            of softshrink and hardshrink (0.5). Ignored where it has none.

    Returns:
        The gain, without unit.

    Raises:
        ValueError: an activation that is not listed, or a param for which E[f(z)^2] is no positive number.

    Source: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", 2015, whose condition (equation 10) this is for any f.

    Example:
        >>> import gradkernels as gk
        >>> [round(gk.init.calculate_gain(name), 4) for name in ("relu", "elu", "swish", "tanh")]
        [1.4142, 1.2452, 1.6765, 1.5925]
        >>> round(gk.init.calculate_gain("swish", 0.0), 4)
        2.0
    """
    if nonlinearity not in _ACTIVATIONS:
        raise ValueError(f"Unsupported nonlinearity {nonlinearity}")
    activation = _ACTIVATIONS[nonlinearity]
    given = tuple(activation.params.values()) if param is None else param if isinstance(param, tuple) else (param,)
    try:
        params = dict(zip(activation.params, given, strict=True)) if activation.params else {}
        second_moment = activation.second_moment(*params.values())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{param!r} is not a valid parameter of {nonlinearity}") from error
    if not 0 < second_moment < math.inf:
        raise ValueError(f"{nonlinearity} with parameter {param!r} has no gain: E[f(z)^2] is {second_moment}")
    return 1 / math.sqrt(second_moment)


def _std(family: str, gain: float, fan_in: float, fan_out: float) -> float:
    """The deviation of a weight: xavier's is a compromise between keeping the scale of activations and that of gradients."""
    return gain * math.sqrt(2 / (fan_in + fan_out)) if family == "xavier" else gain / math.sqrt(fan_in)


def _fill_(tensor: Tensor, std: float, distribution: str, generator: torch.Generator | None) -> Tensor:
    with torch.no_grad():
        if distribution == "normal":
            return tensor.normal_(0, std, generator=generator)
        bound = math.sqrt(3.0) * std
        return tensor.uniform_(-bound, bound, generator=generator)


def _he_(tensor: Tensor, a: Param, mode: _Mode, nonlinearity: str, distribution: str, generator: torch.Generator | None) -> Tensor:
    if a is None and nonlinearity == "leaky_relu":
        a = 0.0
    gain = calculate_gain(nonlinearity, a)
    if 0 in tensor.shape:
        return tensor
    fan: int = nn.init._calculate_correct_fan(tensor, mode)
    return _fill_(tensor, _std("he", gain, fan, fan), distribution, generator)


def he_uniform_(
    tensor: Tensor, a: Param = None, mode: _Mode = "fan_in", nonlinearity: str = "leaky_relu", generator: torch.Generator | None = None
) -> Tensor:
    """Fill a weight with He's initialisation, as torch.nn.init.kaiming_uniform_, for every activation of calculate_gain.

        U(-b, b),  b = gain sqrt(3 / fan)

    Args:
        tensor: a weight of two or more dimensions, (outputs, inputs, ...); written.
        a: param of calculate_gain; None is 0 for leaky_relu, as in torch, and the activation's own default otherwise.
        mode: "fan_in" keeps the scale of activations, "fan_out" that of gradients.
        nonlinearity: the activation that follows.
        generator: where numbers are drawn from; None is torch's own.

    Returns:
        tensor.

    Raises:
        ValueError: tensor has fewer than two dimensions; unknown mode or nonlinearity.

    Source: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", 2015.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = gk.init.he_uniform_(torch.empty(64, 300), nonlinearity="elu")
        >>> bool(weight.abs().max() <= gk.init.calculate_gain("elu") * (3 / 300) ** 0.5)
        True
    """
    return _he_(tensor, a, mode, nonlinearity, "uniform", generator)


def he_normal_(
    tensor: Tensor, a: Param = None, mode: _Mode = "fan_in", nonlinearity: str = "leaky_relu", generator: torch.Generator | None = None
) -> Tensor:
    """Fill a weight with He's initialisation, as torch.nn.init.kaiming_normal_, for every activation of calculate_gain.

        N(0, gain^2 / fan)

    Arguments, errors and source are those of he_uniform_.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = gk.init.he_normal_(torch.empty(1000, 200), nonlinearity="relu")
        >>> bool((weight.std() - 0.1).abs() < 0.001)
        True
    """
    return _he_(tensor, a, mode, nonlinearity, "normal", generator)


def lecun_uniform_(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill a weight with LeCun's initialisation, which keeps the scale of a signal where the activation does: linear, selu.

        U(-b, b),  b = sqrt(3 / fan_in)

    Args:
        tensor: a weight of two or more dimensions, (outputs, inputs, ...); written.
        generator: where numbers are drawn from; None is torch's own.

    Returns:
        tensor.

    Raises:
        ValueError: tensor has fewer than two dimensions.

    Source: LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998; for selu: Klambauer et al., "Self-Normalizing Neural
    Networks", 2017.

    Example:
        >>> import torch, gradkernels as gk
        >>> bool(gk.init.lecun_uniform_(torch.empty(64, 300)).abs().max() <= 0.1)
        True
    """
    return he_uniform_(tensor, nonlinearity="linear", generator=generator)


def lecun_normal_(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill a weight with LeCun's initialisation.

        N(0, 1 / fan_in)

    Arguments, errors and source are those of lecun_uniform_.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = gk.init.lecun_normal_(torch.empty(1000, 100))
        >>> bool((weight.std() - 0.1).abs() < 0.001)
        True
    """
    return he_normal_(tensor, nonlinearity="linear", generator=generator)


# Which activation follows a layer


class Activation(NamedTuple):
    """An activation found in a model: a name and a param that calculate_gain takes."""

    name: str
    param: Param = None

    def __str__(self) -> str:
        if self.param is None:
            return self.name
        bounds = self.param if isinstance(self.param, tuple) else (self.param,)
        return f"{self.name}({', '.join(f'{each:.4g}' for each in bounds)})"


# These have weights that belong together and an initialisation of their own.
_WHOLES = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

# A value that goes through one of these is no longer the sum of products that a layer made.
_ENDS = ("matmul", "bmm", "einsum", "softmax", "log_softmax", "scaled_dot_product_attention", "cross_entropy")

# LeakyReLU, leaky_relu_ and log_sigmoid are all found without underscores and capitals.
_NAMES = {name.replace("_", ""): name for name, activation in _ACTIVATIONS.items() if activation is not _LINEAR}
_NAMES |= {name.replace("_", ""): act.name for act in ACTS.values() if act.name != "identity" for name in act.operators}

# x f(x), written out; mish is x tanh(softplus(x)).
_GATED = {"sigmoid": "swish", "hardsigmoid": "hardswish", "softplus": "mish"}


def _number(value: object, default: float) -> float:
    """What a model has for a parameter; of a learnt one the root of the mean square, and the default where only a run would tell."""
    if isinstance(value, Tensor) and not value.is_meta:
        return value.detach().double().square().mean().sqrt().item()
    return value if isinstance(value, int | float) else default


def _activation(name: str, given: Sequence[object] = ()) -> Activation:
    """given: its parameters, in the order of the table."""
    defaults = [*_ACTIVATIONS[name].params.values()]
    found = [_number(given[place] if place < len(given) else None, default) for place, default in enumerate(defaults)]
    return Activation(name, tuple(found) if len(found) > 1 else next(iter(found), None))


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module is, or that a fused batch norm applies; None where it is no activation known here."""
    if isinstance(module, _BatchNormAct):
        return None if module.act == "identity" else _activation(module.act, [module.act_param])
    for kind in type(module).__mro__:
        name = _NAMES.get(kind.__name__.lower())
        if name is not None and kind.__module__ in ("torch.nn.modules.activation", "gradkernels.activation"):
            return _activation(name, [getattr(module, param, default) for param, default in _ACTIVATIONS[name].params.items()])
    return None


def _call(node: fx.Node, root: nn.Module) -> str | nn.Module:
    """What a node calls: a module, or a function's name without the underscore of the version in place."""
    if node.op == "call_module":
        return root.get_submodule(str(node.target))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.rstrip("_")


def _given(node: fx.Node, root: nn.Module, names: Iterable[str]) -> list[object]:
    """The arguments of these names, which follow the first; a parameter of the model as it is."""
    values = [node.args[place] if len(node.args) > place else node.kwargs.get(name) for place, name in enumerate(names, start=1)]
    return [attrgetter(str(value.target))(root) if isinstance(value, fx.Node) and value.op == "get_attr" else value for value in values]


def _activation_at(node: fx.Node, root: nn.Module) -> Activation | None:
    called = _call(node, root)
    if isinstance(called, nn.Module):
        found = activation_of(called)
    elif called in ("clamp", "clip", "clamp_min"):
        low, high = _given(node, root, ("min", "max"))
        found = Activation("relu") if (low, high) == (0, None) else None
        if isinstance(low, int | float) and isinstance(high, int | float):
            found = Activation("hardtanh", (low, high))
    elif (name := _NAMES.get(called.replace("_", ""))) is not None:
        act = act_of_spelling(node.target)
        # The second argument of torch's silu is inplace.
        has_param = act is None or act.spellings[node.target] is not None
        found = _activation(name, _given(node, root, _ACTIVATIONS[name].params) if has_param else [])
    else:
        found = None
    if found is not None and found.name in _GATED:
        source = node.all_input_nodes[0]
        gates = [user for user in node.users if _call(user, root) == "tanh"] if found.name == "softplus" else [node]
        if any(user in source.users and _call(user, root) in ("mul", "imul") for gate in gates for user in gate.users):
            return _activation(_GATED[found.name])
    return found


class _Tracer(fx.Tracer):
    """Sees layers, activations and what it is told to whole, and looks into everything else that is not torch's own."""

    def __init__(self, untraceable: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self._untraceable = untraceable

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        known = isinstance(module, (*WEIGHTS, _BatchNormAct)) or activation_of(module) is not None or module in self._untraceable
        return known or super().is_leaf_module(module, qualified_name)


class _Traced(NamedTuple):
    """graph: of the module's forward, up to where it could be followed; why: it could not to its end, None where it could."""

    module: nn.Module
    graph: fx.Graph
    why: str | None


def _trace(module: nn.Module, untraceable: Mapping[nn.Module, str]) -> _Traced:
    tracer = _Tracer(untraceable)
    try:
        return _Traced(module, tracer.trace(module), None)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        return _Traced(module, tracer.graph, f"{type(module).__name__} cannot be traced ({first_line})")


def _trace_parts(model: nn.Module, untraceable: dict[nn.Module, str]) -> list[_Traced]:
    """The model, and where it cannot be traced each module in it, the outermost first; who cannot be is added to untraceable."""
    # A forward runs once here, on stand-ins for tensors, which it may store.
    with preserved(model):
        traced = [_trace(model, untraceable)]
        if traced[0].why is None:
            return traced
        traced.clear()
        # From the inside out, so that what cannot be traced is seen whole by what can.
        for module in reversed([*model.modules()]):
            if module is model or not _Tracer(untraceable).is_leaf_module(module, ""):
                traced.append(_trace(module, untraceable))
                if (why := traced[-1].why) is not None:
                    untraceable[module] = why
        return traced[::-1]


def _follows(node: fx.Node, root: nn.Module, untraceable: Mapping[nn.Module, str], is_whole: bool) -> tuple[Activation | None, bool]:
    """The nearest activation that the value of a node reaches before another layer; without one, whether it goes on unseen.

    is_whole: root is all of the model, whose output goes nowhere.
    """
    reached, seen, goes_on = [node], {node}, False
    for each in reached:
        for user in each.users:
            found = _activation_at(user, root)
            if found is not None:
                return found, False
            called = _call(user, root)
            ends = called in _ENDS if isinstance(called, str) else isinstance(called, (*WEIGHTS, *_WHOLES))
            goes_on = goes_on or called in untraceable or (user.op == "output" and not is_whole)
            if user not in seen and not ends:
                seen.add(user)
                reached.append(user)
    return None, goes_on


class _Following(NamedTuple):
    """What follows a layer, and why it is taken to."""

    activation: Activation | None
    reason: str


_BY_TRACING = "by tracing"
# Its gain, 1.41, lies between those of all: a chain of relu layers with gain 1 loses half of a signal in each.
_ASSUMED = Activation("relu")


def _following(model: nn.Module) -> dict[nn.Module, _Following]:
    """For every layer the activation that follows it: by dataflow; where Python cannot be traced by the order of modules, else assumed."""
    untraceable: dict[nn.Module, str] = {}
    found: dict[nn.Module, _Following] = {}
    nothing: set[nn.Module] = set()
    for module, graph, why in _trace_parts(model, untraceable):
        for node in graph.nodes:
            if node.op == "call_module" and isinstance(layer := module.get_submodule(str(node.target)), WEIGHTS) and layer not in found:
                activation, goes_on = _follows(node, module, untraceable, is_whole=module is model)
                if activation is not None:
                    found[layer] = _Following(activation, _BY_TRACING)
                elif why is None and not goes_on:
                    nothing.add(layer)
    found = {layer: _Following(None, _BY_TRACING) for layer in nothing} | found
    known = [module for module in model.modules() if isinstance(module, WEIGHTS) or activation_of(module) is not None]
    because = "; ".join(dict.fromkeys(untraceable.values())) or "the forward does not reach it"
    for place, layer in enumerate(known):
        if isinstance(layer, WEIGHTS) and layer not in found:
            after = known[place + 1 : place + 2]
            if after and isinstance(after[0], WEIGHTS):
                found[layer] = _Following(_ASSUMED, f"assumed, since {because}")
            else:
                following = activation_of(after[0]) if after else None
                found[layer] = _Following(following, f"by the order of modules, since {because}")
    return found


# A whole model


class Initialised(NamedTuple):
    """One layer that apply_ wrote: its name, the function that filled the weight, the gain, the deviation and what follows the layer.

    reason: how that is known: "by tracing", or "by the order of modules" or "assumed" and why the model could not be traced.
    """

    name: str
    scheme: str
    gain: float
    std: float
    activation: str
    reason: str


@dataclass(frozen=True)
class InitReport:
    """What apply_ did.

    Attributes:
        layers: of every layer written, an Initialised.
        kept: (name, reason) of every module with parameters, and every bias, that was left as it was.
    """

    layers: list[Initialised]
    kept: list[tuple[str, str]]

    def table(self) -> str:
        """The report for a person: a line for each layer, below why those with a question mark are guesses, and what was left as it was."""
        guessed = [(each.name, each.reason) for each in self.layers if each.reason != _BY_TRACING]
        lines = [("layer", "init", "gain", "std", "followed by")]
        for each in self.layers:
            mark = "" if each.reason == _BY_TRACING else " ?"
            lines.append((each.name, each.scheme, f"{each.gain:.4g}", f"{each.std:.4g}", each.activation + mark))
        rows = text.columns(lines, left=(0, 1, 4))
        for words, pairs in (("? ", guessed), ("left as they are, ", self.kept)):
            for reason in dict.fromkeys(reason for _, reason in pairs):
                names = [name for name, each in pairs if each == reason]
                rows.append(f"{words}{reason}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
        return "\n".join(rows)

    def __str__(self) -> str:
        return self.table()


_SCHEMES = ("xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "lecun_uniform", "lecun_normal")
# Each as its paper has it.
_AUTO = {"he": "he_normal", "lecun": "lecun_normal", "xavier": "xavier_uniform"}


def apply_(model: nn.Module, scheme: str = "auto", generator: torch.Generator | None = None) -> InitReport:
    """Initialise every linear and convolutional layer of a model for the activation that follows it.

        he        std = gain / sqrt(fan_in)                       relu and its kin, elu, celu, swish, gelu, mish, softplus, glu
        xavier    std = gain sqrt(2 / (fan_in + fan_out))         sigmoid, tanh, softsign and others that treat both sides alike
        lecun     std = 1 / sqrt(fan_in)                          nothing, selu

    The activation is found by tracing the model with torch.fx, through batch norm, dropout, additions and reshapes, also where
    it is called as a function or as a method. Where the forward of a module cannot be traced, the order in which modules are
    registered serves: of a layer with an activation next, and of the last one. Any other is taken to be followed by a relu,
    whose gain lies between those of all. The report says of each layer which it was.

    Biases become 0. Normalisations, embeddings, recurrent layers and attention stay as they are, and so does what is frozen,
    parametrised, without elements or tied to one of them; of layers that share a weight, the first decides. Each output of a transposed
    convolution sums fan_in / stride products, which is accounted for.

    Args:
        model: changed in place, on whatever device.
        scheme: "auto" picks for each layer: he_normal, xavier_uniform or lecun_normal; or one of "xavier_uniform",
            "xavier_normal", "he_uniform", "he_normal", "lecun_uniform", "lecun_normal" for all. The gain is that of the
            activation, in lecun 1.
        generator: where numbers are drawn from; None is torch's own.

    Returns:
        An InitReport: what was done to which layer, and what was left.

    Raises:
        TypeError: model is no torch.nn.Module, or holds a torch.jit.ScriptModule.
        ValueError: unknown scheme, a model without a layer that could be initialised, or an activation for which
            calculate_gain raises; nothing is written.

    Source: Glorot, Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010; He, Zhang, Ren,
    Sun, "Delving Deep into Rectifiers", 2015; LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998.

    Example:
        >>> import torch, gradkernels as gk
        >>> model = torch.nn.Sequential(torch.nn.Linear(200, 100), gk.ELU(), torch.nn.Linear(100, 25))
        >>> print(gk.init.apply_(model))
        layer  init             gain        std  followed by
        0      he_normal_      1.245    0.08805  elu(1)
        2      lecun_normal_       1        0.1  nothing
    """
    if scheme != "auto" and scheme not in _SCHEMES:
        raise ValueError(f"scheme is one of 'auto', {', '.join(map(repr, _SCHEMES))}, not {scheme!r}")
    model = unwrapped(model)
    following = _following(model)
    # Of each weight that is taken, whose it is.
    taken = {_memory(module.weight): "an embedding" for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    to_fill: list[tuple[nn.Linear | nn.modules.conv._ConvNd, str]] = []
    layers: list[Initialised] = []
    kept: list[tuple[str, str]] = []
    # Chosen for all before the first is written: an activation that has no gain is an error.
    for name, module in _outermost(model):
        reason = _reason_to_keep(module, taken)
        if reason is not None:
            kept.append((name or type(model).__name__, reason))
        elif isinstance(module, WEIGHTS):
            activation = following[module].activation or Activation("linear")
            chosen = _AUTO[_ACTIVATIONS[activation.name].scheme] if scheme == "auto" else scheme
            gain = 1.0 if chosen.startswith("lecun") else calculate_gain(*activation)
            family, distribution = chosen.split("_")
            std = _std(family, gain, *_fans(module))
            to_fill.append((module, distribution))
            if module.bias is not None and not module.bias.requires_grad:
                kept.append((f"{name}.bias".lstrip("."), "frozen"))
            taken[_memory(module.weight)] = name
            followed_by = "nothing" if activation.name == "linear" else str(activation)
            layers.append(Initialised(name, f"{chosen}_", gain, std, followed_by, following[module].reason))
    if not layers:
        reasons = "".join(f"; {name}, {reason}" for name, reason in kept)
        raise ValueError(f"{type(model).__name__} has no linear or convolutional layer to initialise{reasons}")
    for (module, distribution), layer in zip(to_fill, layers, strict=True):
        _fill_(module.weight, layer.std, distribution, generator)
        if module.bias is not None and module.bias.requires_grad:
            nn.init.zeros_(module.bias)
    return InitReport(layers, kept)


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold parameters, those that initialise themselves whole; each once, names as in named_modules()."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inside:
            whole = isinstance(module, _WHOLES) or nn.utils.parametrize.is_parametrized(module)
            if whole:
                inside.update(module.modules())
            if whole or any(True for _ in module.parameters(recurse=False)):
                yield name, module


def _memory(weight: Tensor) -> int:
    """The same for weights that share their memory, also as two parameters; one without any is alone."""
    lazy = isinstance(weight, nn.parameter.UninitializedParameter)
    return id(weight) if lazy else weight.data_ptr() or id(weight)


def _reason_to_keep(module: nn.Module, taken: Mapping[int, str]) -> str | None:
    kind = type(module).__name__
    if nn.utils.parametrize.is_parametrized(module):
        return f"{kind} whose weight is computed by a parametrization"
    if not isinstance(module, WEIGHTS):
        return kind
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return f"{kind} that has no shape before its first batch"
    if not isinstance(module.weight, nn.Parameter):
        return f"{kind} whose weight is no parameter"
    if not module.weight.requires_grad:
        return f"{kind}, frozen"
    if not module.weight.numel():
        return f"{kind} without elements"
    if module.weight.itemsize == 1:
        return f"{kind} of {module.weight.dtype}, which torch draws no random numbers in"
    if _memory(module.weight) in taken:
        return f"{kind}, tied to {taken[_memory(module.weight)]}"
    return None


def expected_std(module: nn.Linear | nn.modules.conv._ConvNd, activation: str | None) -> float:
    """The deviation with which a weight keeps the scale of its inputs, gain / sqrt(fan_in); an activation not known here is linear."""
    gain = calculate_gain(activation if activation in _ACTIVATIONS else "linear")
    return _std("he", gain, *_fans(module))


def _fans(module: nn.Linear | nn.modules.conv._ConvNd) -> tuple[float, float]:
    """How many products each output sums, and each input enters."""
    weight = module.weight
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight[: module.in_channels // module.groups].transpose(0, 1))
        return max(fan_in / math.prod(module.stride), 1.0), fan_out
    fans: tuple[int, int] = nn.init._calculate_fan_in_and_fan_out(weight)
    return fans
