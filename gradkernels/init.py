"""Initialisation: Xavier, He and LeCun, the gain of every activation, and the right one of them for each layer of a model.

The gain of an activation f is 1 / sqrt(E[f(z)^2]) with z from N(0, 1), computed and not looked up, so that it exists for every activation
and every parameter of one. That keeps the mean square of a signal from layer to layer; torch.nn.init.calculate_gain says the same of the
relu family and of linear layers, and has other numbers for sigmoid (1), tanh (5/3) and selu (3/4).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gradkernels.activation import Swish
from gradkernels.batch_norm_act import _BatchNormAct
from gradkernels.untouched import untouched

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

Param: TypeAlias = float | tuple[float, float] | None
_Mode: TypeAlias = Literal["fan_in", "fan_out"]

xavier_uniform_ = nn.init.xavier_uniform_
xavier_normal_ = nn.init.xavier_normal_


class _Activation(NamedTuple):
    """scheme: who derived the initialisation for it; second_moment: E[f(z)^2] for its parameter; default: that parameter."""

    scheme: str
    second_moment: Callable[[Any], float]
    default: Param = None


def _quadrature(f: Callable[[Tensor, Any], Tensor]) -> Callable[[Any], float]:
    """E[f(z, param)^2] for z from N(0, 1).

    Each half line by the trapezoidal rule after z = exp(pi / 2 sinh t): it converges exponentially for an f that is smooth but at 0,
    whatever the scale on which it bends, since the nodes lie as densely at 1e-9 as at 1.
    """

    def second_moment(param: Any) -> float:
        t = torch.linspace(-4, 2, 1025, dtype=torch.float64)
        half = (math.pi / 2 * t.sinh()).exp()
        weight = half * t.cosh() * (math.pi / 2) * (t[1] - t[0]) * (-half.square() / 2).exp() / math.sqrt(2 * math.pi)
        values = f(torch.stack([half, -half]), param).square()
        # Far out e^x - 1 may overflow where the weight is 0.
        moment: float = torch.where(weight > 0, values * weight, 0.0).sum().item()
        return moment

    return second_moment


def _line(slope: float | tuple[float, float]) -> float:
    """Of x where x > 0, a x elsewhere; two slopes are the bounds of a uniform one."""
    lower, upper = slope if isinstance(slope, tuple) else (slope, slope)
    return (1 + (lower * lower + lower * upper + upper * upper) / 3) / 2


def _relu(_: Any) -> float:
    return 0.5


def _linear(_: Any) -> float:
    return 1.0


_LINEAR = _Activation("lecun", _linear)
_SWISH = _Activation("he", _quadrature(lambda z, beta: z * torch.sigmoid(beta * z)), 1.0)

# The names are those of torch.nn.functional; swish is ours.
_ACTIVATIONS: dict[str, _Activation] = {
    **dict.fromkeys(("linear", "identity", "conv1d", "conv2d", "conv3d"), _LINEAR),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _LINEAR),
    "relu": _Activation("he", _relu),
    "relu6": _Activation("he", _quadrature(lambda z, _: F.relu6(z))),
    "leaky_relu": _Activation("he", _line, 0.01),
    "prelu": _Activation("he", _line, 0.25),
    "rrelu": _Activation("he", _line, (1 / 8, 1 / 3)),
    "elu": _Activation("he", _quadrature(lambda z, alpha: F.elu(z, alpha)), 1.0),
    "swish": _SWISH,
    "silu": _SWISH,
    "gelu": _Activation("he", _quadrature(lambda z, _: F.gelu(z))),
    "mish": _Activation("he", _quadrature(lambda z, _: F.mish(z))),
    "hardswish": _Activation("he", _quadrature(lambda z, _: F.hardswish(z))),
    "selu": _Activation("lecun", _quadrature(lambda z, _: F.selu(z))),
    "sigmoid": _Activation("xavier", _quadrature(lambda z, _: z.sigmoid())),
    "tanh": _Activation("xavier", _quadrature(lambda z, _: z.tanh())),
}


def calculate_gain(nonlinearity: str, param: Param = None) -> float:
    """What the standard deviation of weights is multiplied by for the activation that follows them.

        gain = 1 / sqrt(E[f(z)^2]),  z from N(0, 1)

    Equal to torch.nn.init.calculate_gain for relu, leaky_relu and linear layers. torch gives 1 for sigmoid, 5/3 for tanh and
    3/4 for selu, where the definition gives 1.8462, 1.5925 and 1, and has nothing for elu, swish, prelu, rrelu and gelu.

    The mean square 1 that is kept is a stable one for the relu family, elu, selu, sigmoid and tanh. After swish, gelu, mish and
    hardswish a signal that is smaller shrinks and a larger one grows, so deep networks of these need batch norm as well.

    Args:
        nonlinearity: "linear" (or a convolution's name), "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "swish" or
            "silu", "gelu", "mish", "hardswish", "selu", "sigmoid" or "tanh".
        param: the activation's own: negative_slope (None is 0.01), the slope of prelu (0.25), (lower, upper) of rrelu
            (1/8, 1/3), alpha of elu (1), beta of swish (1). Ignored where it has none.

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
    try:
        second_moment = activation.second_moment(activation.default if param is None else param)
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


_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)

# These have weights that belong together and an initialisation of their own.
_WHOLES = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

# A value that goes through one of these is no longer the sum of products that a layer made.
_ENDS = ("matmul", "bmm", "einsum", "softmax", "log_softmax", "scaled_dot_product_attention", "cross_entropy")

# The position of the parameter in a call of torch.nn.functional, and its name.
_PARAMS = {"leaky_relu": "negative_slope", "elu": "alpha"}


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module is, or that a fused batch norm applies; None where it is no activation known here."""
    if isinstance(module, _BatchNormAct):
        has_param = _ACTIVATIONS[module.act].default is not None
        return None if module.act == "identity" else Activation(module.act, module.act_param if has_param else None)
    if isinstance(module, nn.PReLU):
        return Activation("prelu", module.weight.detach().double().square().mean().sqrt().item())
    if isinstance(module, nn.RReLU):
        return Activation("rrelu", (module.lower, module.upper))
    if isinstance(module, nn.LeakyReLU):
        return Activation("leaky_relu", module.negative_slope)
    if isinstance(module, nn.ELU):
        return Activation("elu", module.alpha)
    if isinstance(module, Swish):
        beta = module.beta
        return Activation("swish", beta.detach().double().mean().item() if isinstance(beta, Tensor) else beta)
    if isinstance(module, nn.SiLU):
        return Activation("swish", 1.0)
    plain = {nn.ReLU6: "relu6", nn.ReLU: "relu", nn.GELU: "gelu", nn.Mish: "mish", nn.Hardswish: "hardswish", nn.SELU: "selu"}
    plain |= {nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}
    return next((Activation(name) for kind, name in plain.items() if isinstance(module, kind)), None)


class _Tracer(fx.Tracer):
    """Sees layers and activations whole and looks into everything else that is not torch's own."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        known = isinstance(module, _LAYERS) or activation_of(module) is not None or type(module).__module__.startswith("gradkernels.")
        return known or super().is_leaf_module(module, qualified_name)


def _call(node: fx.Node, root: nn.Module) -> str | nn.Module:
    """What a node calls: a module, or a function's name without the underscore of the version in place."""
    if node.op == "call_module":
        return root.get_submodule(str(node.target))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.rstrip("_")


def _activation_at(node: fx.Node, root: nn.Module) -> Activation | None:
    called = _call(node, root)
    if isinstance(called, nn.Module):
        found = activation_of(called)
    elif called in _ACTIVATIONS and _ACTIVATIONS[called] is not _LINEAR:
        param: Any = _ACTIVATIONS[called].default
        if called in _PARAMS:
            param = node.args[1] if len(node.args) > 1 else node.kwargs.get(_PARAMS[called], param)
        found = Activation("swish" if called == "silu" else called, param if isinstance(param, int | float) else None)
    else:
        return None
    # x * sigmoid(x), written out.
    if found is not None and found.name == "sigmoid":
        source = node.all_input_nodes[0]
        if any(user in source.users and _call(user, root) in ("mul", "imul") for user in node.users):
            return Activation("swish", 1.0)
    return found


def _follows(node: fx.Node, root: nn.Module) -> Activation | None:
    """The nearest activation that the value of a node reaches before another layer."""
    reached, seen = [node], {node}
    for each in reached:
        for user in each.users:
            found = _activation_at(user, root)
            if found is not None:
                return found
            called = _call(user, root)
            ends = called in _ENDS if isinstance(called, str) else isinstance(called, (*_LAYERS, *_WHOLES))
            if user not in seen and not ends:
                seen.add(user)
                reached.append(user)
    return None


def _following(model: nn.Module) -> dict[nn.Module, Activation | None]:
    """For every layer that runs, the activation that follows it, by dataflow; by the order of modules where Python cannot be traced."""
    try:
        # Its forward runs once, on stand-ins for tensors, which it may store.
        with untouched(model):
            graph = _Tracer().trace(model)
    except Exception:
        return _following_in_order(model)
    found: dict[nn.Module, Activation | None] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(layer := model.get_submodule(str(node.target)), _LAYERS):
            found[layer] = found.get(layer) or _follows(node, model)
    return found


def _following_in_order(model: nn.Module) -> dict[nn.Module, Activation | None]:
    found: dict[nn.Module, Activation | None] = {}
    waiting: nn.Module | None = None
    for child in model.children():
        activation = activation_of(child)
        if isinstance(child, _LAYERS):
            found[child] = None
            waiting = child
        elif activation is not None and waiting is not None:
            found[waiting] = activation
            waiting = None
        elif any(True for _ in child.children()) and not isinstance(child, _WHOLES):
            inside = _following(child)
            found |= inside
            waiting = next((layer for layer in reversed(inside) if inside[layer] is None and layer is [*inside][-1]), None)
    return found


# A whole model


class Initialised(NamedTuple):
    """One layer that apply_ wrote: its name, the function that filled the weight, the gain, the deviation and what follows the layer."""

    name: str
    scheme: str
    gain: float
    std: float
    activation: str


@dataclass(frozen=True)
class InitReport:
    """What apply_ did.

    Attributes:
        layers: of every layer written, an Initialised.
        kept: (name, reason) of every module with parameters that was left as it was.
    """

    layers: list[Initialised]
    kept: list[tuple[str, str]]

    def table(self) -> str:
        """The report for a person: a line for each layer, below what was left as it was."""
        lines = [("layer", "init", "gain", "std", "followed by")]
        lines += [(each.name, each.scheme, f"{each.gain:.4g}", f"{each.std:.4g}", each.activation) for each in self.layers]
        first, second, last = (max(len(line[column]) for line in lines) for column in (0, 1, 4))
        rows = [
            f"{name:<{first}}  {scheme:<{second}}  {gain:>6}  {std:>9}  {activation:<{last}}".rstrip()
            for name, scheme, gain, std, activation in lines
        ]
        for reason in dict.fromkeys(reason for _, reason in self.kept):
            names = [name for name, each in self.kept if each == reason]
            rows.append(f"left as they are, {reason}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
        return "\n".join(rows)

    def __str__(self) -> str:
        return self.table()


_SCHEMES = ("xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "lecun_uniform", "lecun_normal")
# Each as its paper has it.
_AUTO = {"he": "he_normal", "lecun": "lecun_normal", "xavier": "xavier_uniform"}


def apply_(model: nn.Module, scheme: str = "auto", generator: torch.Generator | None = None) -> InitReport:
    """Initialise every linear and convolutional layer of a model for the activation that follows it.

        he        std = gain / sqrt(fan_in)                       relu, leaky_relu, prelu, rrelu, elu, swish, gelu
        xavier    std = gain sqrt(2 / (fan_in + fan_out))         sigmoid, tanh
        lecun     std = 1 / sqrt(fan_in)                          nothing, selu

    The activation is found by tracing the model with torch.fx, through batch norm, dropout, additions and reshapes, also where
    it is called as a function; of a model that cannot be traced, by the order of its modules. Biases become 0. Normalisations,
    embeddings, recurrent layers and attention stay as they are, and so does what is frozen, parametrised or tied to one of them.
    Each output of a transposed convolution sums fan_in / stride products, which is accounted for.

    Args:
        model: changed in place, on whatever device.
        scheme: "auto" picks for each layer: he_normal, xavier_uniform or lecun_normal; or one of "xavier_uniform",
            "xavier_normal", "he_uniform", "he_normal", "lecun_uniform", "lecun_normal" for all. The gain is that of the
            activation, in lecun 1.
        generator: where numbers are drawn from; None is torch's own.

    Returns:
        An InitReport: what was done to which layer, and what was left.

    Raises:
        ValueError: unknown scheme, or a model without a layer that could be initialised.

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
    following = _following(model)
    embedded: set[Tensor] = {module.weight for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    layers: list[Initialised] = []
    kept: list[tuple[str, str]] = []
    written: set[Tensor] = set()
    for name, module in _outermost(model):
        reason = _reason_to_keep(module, embedded)
        if reason is not None:
            kept.append((name or type(model).__name__, reason))
        elif isinstance(module, _LAYERS) and module.weight not in written:
            activation = following.get(module) or Activation("linear")
            chosen = _AUTO[_ACTIVATIONS[activation.name].scheme] if scheme == "auto" else scheme
            gain = 1.0 if chosen.startswith("lecun") else calculate_gain(*activation)
            family, distribution = chosen.split("_")
            std = _std(family, gain, *_fans(module))
            _fill_(module.weight, std, distribution, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            written.add(module.weight)
            layers.append(Initialised(name, f"{chosen}_", gain, std, "nothing" if activation.name == "linear" else str(activation)))
    if not layers:
        reasons = "".join(f"; {name}, {reason}" for name, reason in kept)
        raise ValueError(f"{type(model).__name__} has no linear or convolutional layer to initialise{reasons}")
    return InitReport(layers, kept)


def _outermost(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold parameters, those that initialise themselves whole; names as in named_modules()."""
    whole = isinstance(model, _WHOLES) or nn.utils.parametrize.is_parametrized(model)
    if whole or any(True for _ in model.parameters(recurse=False)):
        yield name, model
    for child_name, child in [] if whole else model.named_children():
        yield from _outermost(child, f"{name}.{child_name}".lstrip("."))


def _reason_to_keep(module: nn.Module, embedded: set[Tensor]) -> str | None:
    kind = type(module).__name__
    if nn.utils.parametrize.is_parametrized(module):
        return f"{kind} whose weight is computed by a parametrization"
    if not isinstance(module, _LAYERS):
        return kind
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return f"{kind} that has no shape before its first batch"
    if not isinstance(module.weight, nn.Parameter):
        return f"{kind} whose weight is no parameter"
    if not module.weight.requires_grad:
        return f"{kind}, frozen"
    if module.weight in embedded:
        return f"{kind}, tied to an embedding"
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
