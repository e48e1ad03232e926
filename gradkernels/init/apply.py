"""apply_: initialise every layer of a model for the activation that follows it, with a report."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradkernels import text
from gradkernels.init.fill import fans, fill_, standard_deviation
from gradkernels.init.following import BY_TRACING, SELF_INITIALISED, Activation, following_activations
from gradkernels.init.gain import NONLINEARITIES, calculate_gain
from gradkernels.layers import WEIGHTS, unwrapped

_SCHEMES = ("xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "lecun_uniform", "lecun_normal")
# The distribution is the one of the paper.
_AUTO = {"he": "he_normal", "lecun": "lecun_normal", "xavier": "xavier_uniform"}


class Initialised(NamedTuple):
    """One layer that apply_ wrote.

    Attributes:
        name: the layer, as in named_modules().
        scheme: the function that filled the weight, such as "he_normal_".
        gain: the gain of the activation that follows.
        std: the standard deviation of the weight.
        activation: the activation that follows, with its parameters, or "nothing".
        reason: how the activation is known: "by tracing", or "by the order of modules" or "assumed", and why
            the model could not be traced.
    """

    name: str
    scheme: str
    gain: float
    std: float
    activation: str
    reason: str


@dataclass(frozen=True)
class InitReport:
    """What apply_ did; str() gives the table.

    Attributes:
        layers: an Initialised for each layer that was written.
        kept: (name, reason) for each module with parameters, and each bias, that was not changed.
    """

    layers: list[Initialised]
    kept: list[tuple[str, str]]

    def table(self) -> str:
        """Return one line for each layer, and below them what was guessed and what was not changed.

        A question mark after an activation means that it was guessed.
        """
        guessed = [(layer.name, layer.reason) for layer in self.layers if layer.reason != BY_TRACING]
        lines = [("layer", "init", "gain", "std", "followed by")]
        for layer in self.layers:
            mark = "" if layer.reason == BY_TRACING else " ?"
            lines.append((layer.name, layer.scheme, f"{layer.gain:.4g}", f"{layer.std:.4g}", layer.activation + mark))
        rows = text.columns(lines, left=(0, 1, 4))
        for heading, pairs in (("?", guessed), ("not changed,", self.kept)):
            for reason in dict.fromkeys(reason for _, reason in pairs):
                names = [name for name, other in pairs if other == reason]
                rows.append(f"{heading} {reason}: {text.first_names(names, 3)}")
        return "\n".join(rows)

    def __str__(self) -> str:
        return self.table()


def apply_(model: nn.Module, scheme: str = "auto", generator: torch.Generator | None = None) -> InitReport:
    """Initialise every linear and convolutional layer of a model for the activation that follows it.

        xavier  std = gain sqrt(2 / (fan_in + fan_out))  sigmoid, tanh, softsign, their hard versions, ...
        lecun   std = 1 / sqrt(fan_in)                   selu, or no activation
        he      std = gain / sqrt(fan_in)                the others: relu, elu, swish, gelu, ...

    The activation is found by tracing the model with torch.fx, through batch norm, dropout, additions and
    reshapes. It may be a module, a function or a method. If a module cannot be traced, the order in which
    modules are registered decides for a layer whose next module is an activation, and for the last layer. Any
    other layer is assumed to be followed by relu, because its gain lies between those of all activations. The
    report says for each layer how its activation was found.

    Biases become 0. Normalisations, embeddings, recurrent layers and attention are not changed. Neither are
    weights that are frozen, parametrised, empty or tied to an embedding. If layers share a weight, the first
    of them decides. In a transposed convolution each output sums fan_in / stride products, and its weight is
    scaled for that number.

    Args:
        model: on any device. It is changed in place.
        scheme: "auto" picks he_normal, xavier_uniform or lecun_normal for each layer. "xavier_uniform",
            "xavier_normal", "he_uniform", "he_normal", "lecun_uniform" or "lecun_normal" is used for all
            layers. The gain is that of the activation, except in lecun, where it is 1.
        generator: the source of the random numbers. None is torch's default generator.

    Returns:
        An InitReport: what was written to which layer, and what was not changed.

    Raises:
        TypeError: model is not a torch.nn.Module, or holds a torch.jit.ScriptModule.
        ValueError: scheme is unknown, the model has no layer to initialise, or calculate_gain raises for one
            of its activations. Nothing is written then.

    Source: Glorot, Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010;
    He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", 2015; LeCun, Bottou, Orr, Müller, "Efficient
    BackProp", 1998.

    Example:
        >>> import torch, gradkernels as gk
        >>> model = torch.nn.Sequential(torch.nn.Linear(200, 100), gk.ELU(), torch.nn.Linear(100, 25))
        >>> print(gk.init.apply_(model))
        layer  init            gain      std  followed by
        0      he_normal_     1.245  0.08805  elu(1)
        2      lecun_normal_      1      0.1  nothing
    """
    if scheme != "auto" and scheme not in _SCHEMES:
        raise ValueError(f"scheme must be one of 'auto', {', '.join(map(repr, _SCHEMES))}, not {scheme!r}")
    model = unwrapped(model)
    following = following_activations(model)
    # The memory of a weight that must not be written again -> the layer that it belongs to.
    owners = {_memory(module.weight): "an embedding" for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    to_fill: list[tuple[nn.Linear | nn.modules.conv._ConvNd, str]] = []
    layers: list[Initialised] = []
    kept: list[tuple[str, str]] = []
    # All gains are computed before the first weight is written: an activation without a gain is an error.
    for name, module in _outermost(model):
        reason = _reason_to_keep(module, owners)
        if reason is not None:
            kept.append((name or type(model).__name__, reason))
        elif isinstance(module, WEIGHTS):
            activation = following[module].activation or Activation("linear")
            chosen = _AUTO[NONLINEARITIES[activation.name].scheme] if scheme == "auto" else scheme
            gain = 1.0 if chosen.startswith("lecun") else calculate_gain(*activation)
            family, distribution = chosen.split("_")
            std = standard_deviation(family, gain, *fans(module))
            to_fill.append((module, distribution))
            if module.bias is not None and not module.bias.requires_grad:
                kept.append((f"{name}.bias".lstrip("."), "frozen"))
            owners[_memory(module.weight)] = name
            followed_by = "nothing" if activation.name == "linear" else str(activation)
            layers.append(Initialised(name, f"{chosen}_", gain, std, followed_by, following[module].reason))
    if not layers:
        reasons = "".join(f"; {name}, {reason}" for name, reason in kept)
        raise ValueError(f"{type(model).__name__} has no linear or convolutional layer to initialise{reasons}")
    for (module, distribution), layer in zip(to_fill, layers, strict=True):
        fill_(module.weight, layer.std, distribution, generator)
        if module.bias is not None and module.bias.requires_grad:
            nn.init.zeros_(module.bias)
    return InitReport(layers, kept)


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module that holds parameters, with its name, but no module inside a self-initialised one."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inside:
            is_whole = isinstance(module, SELF_INITIALISED) or nn.utils.parametrize.is_parametrized(module)
            if is_whole:
                inside.update(module.modules())
            if is_whole or any(True for _ in module.parameters(recurse=False)):
                yield name, module


def _memory(weight: Tensor) -> int:
    """A number for the memory of a weight, the same for weights that share it."""
    lazy = isinstance(weight, nn.parameter.UninitializedParameter)
    return id(weight) if lazy else weight.data_ptr() or id(weight)


def _reason_to_keep(module: nn.Module, owners: Mapping[int, str]) -> str | None:
    """Why a module is not initialised; None for a layer that is."""
    kind = type(module).__name__
    if nn.utils.parametrize.is_parametrized(module):
        return f"{kind} whose weight is computed by a parametrization"
    if not isinstance(module, WEIGHTS):
        return kind
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return f"{kind} that has no shape before its first batch"
    if not isinstance(module.weight, nn.Parameter):
        return f"{kind} whose weight is not a parameter"
    if not module.weight.requires_grad:
        return f"{kind}, frozen"
    if not module.weight.numel():
        return f"{kind} without elements"
    if module.weight.itemsize == 1:
        return f"{kind} of {module.weight.dtype}, in which torch cannot draw random numbers"
    if _memory(module.weight) in owners:
        return f"{kind}, tied to {owners[_memory(module.weight)]}"
    return None
