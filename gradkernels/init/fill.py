"""Xavier, He and LeCun for one weight, and the standard deviation that each of them gives to a layer."""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from gradkernels.init.gain import NONLINEARITIES, Param, calculate_gain

Mode: TypeAlias = Literal["fan_in", "fan_out"]

xavier_uniform_ = nn.init.xavier_uniform_
"""torch.nn.init.xavier_uniform_ itself."""

xavier_normal_ = nn.init.xavier_normal_
"""torch.nn.init.xavier_normal_ itself."""


def standard_deviation(family: str, gain: float, fan_in: float, fan_out: float) -> float:
    """The standard deviation of a weight.

    He and LeCun keep the size of activations. Xavier is a compromise between activations and gradients.
    """
    return gain * math.sqrt(2 / (fan_in + fan_out)) if family == "xavier" else gain / math.sqrt(fan_in)


def fans(module: nn.Linear | nn.modules.conv._ConvNd) -> tuple[float, float]:
    """The number of products that an output sums, and the number of products that an input enters."""
    weight = module.weight
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight[: module.in_channels // module.groups].transpose(0, 1))
        return max(fan_in / math.prod(module.stride), 1.0), fan_out
    counts: tuple[int, int] = nn.init._calculate_fan_in_and_fan_out(weight)
    return counts


def expected_std(module: nn.Linear | nn.modules.conv._ConvNd, activation: str | None) -> float:
    """The standard deviation with which a weight keeps the size of its inputs: gain / sqrt(fan_in).

    An activation that calculate_gain does not know counts as linear.
    """
    gain = calculate_gain(activation if activation in NONLINEARITIES else "linear")
    return standard_deviation("he", gain, *fans(module))


def fill_(tensor: Tensor, std: float, distribution: str, generator: torch.Generator | None) -> Tensor:
    """Fill a tensor with random numbers of mean 0 from a "normal" or a "uniform" distribution."""
    with torch.no_grad():
        if distribution == "normal":
            return tensor.normal_(0, std, generator=generator)
        bound = math.sqrt(3.0) * std
        return tensor.uniform_(-bound, bound, generator=generator)


def _he_(tensor: Tensor, a: Param, mode: Mode, nonlinearity: str, distribution: str, generator: torch.Generator | None) -> Tensor:
    if a is None and nonlinearity == "leaky_relu":
        a = 0.0
    gain = calculate_gain(nonlinearity, a)
    if 0 in tensor.shape:
        return tensor
    fan: int = nn.init._calculate_correct_fan(tensor, mode)
    return fill_(tensor, standard_deviation("he", gain, fan, fan), distribution, generator)


def he_uniform_(
    tensor: Tensor, a: Param = None, mode: Mode = "fan_in", nonlinearity: str = "leaky_relu", generator: torch.Generator | None = None
) -> Tensor:
    """Fill a weight with He's initialisation from a uniform distribution.

        U(-b, b),  b = gain sqrt(3 / fan)

    The same as torch.nn.init.kaiming_uniform_, for every activation of calculate_gain.

    Args:
        tensor: a weight of two or more dimensions, (outputs, inputs, ...). It is written.
        a: the param of calculate_gain. None is 0 for leaky_relu, as in torch, and else the default of the
            activation.
        mode: "fan_in" keeps the size of activations, "fan_out" that of gradients.
        nonlinearity: the activation that follows the layer.
        generator: the source of the random numbers. None is torch's default generator.

    Returns:
        tensor.

    Raises:
        ValueError: tensor has fewer than two dimensions, or mode or nonlinearity is unknown.

    Source: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", 2015.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = gk.init.he_uniform_(torch.empty(64, 300), nonlinearity="elu")
        >>> bool(weight.abs().max() <= gk.init.calculate_gain("elu") * (3 / 300) ** 0.5)
        True
    """
    return _he_(tensor, a, mode, nonlinearity, "uniform", generator)


def he_normal_(
    tensor: Tensor, a: Param = None, mode: Mode = "fan_in", nonlinearity: str = "leaky_relu", generator: torch.Generator | None = None
) -> Tensor:
    """Fill a weight with He's initialisation from a normal distribution.

        N(0, gain^2 / fan)

    The same as torch.nn.init.kaiming_normal_, for every activation of calculate_gain. Arguments, errors and
    source are those of he_uniform_.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = gk.init.he_normal_(torch.empty(1000, 200), nonlinearity="relu")
        >>> bool((weight.std() - 0.1).abs() < 0.001)
        True
    """
    return _he_(tensor, a, mode, nonlinearity, "normal", generator)


def lecun_uniform_(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill a weight with LeCun's initialisation from a uniform distribution.

        U(-b, b),  b = sqrt(3 / fan_in)

    It is right for a linear output and for selu, which keep the size of a signal themselves.

    Args:
        tensor: a weight of two or more dimensions, (outputs, inputs, ...). It is written.
        generator: the source of the random numbers. None is torch's default generator.

    Returns:
        tensor.

    Raises:
        ValueError: tensor has fewer than two dimensions.

    Source: LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998. For selu: Klambauer et al.,
    "Self-Normalizing Neural Networks", 2017.

    Example:
        >>> import torch, gradkernels as gk
        >>> bool(gk.init.lecun_uniform_(torch.empty(64, 300)).abs().max() <= 0.1)
        True
    """
    return he_uniform_(tensor, nonlinearity="linear", generator=generator)


def lecun_normal_(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill a weight with LeCun's initialisation from a normal distribution.

        N(0, 1 / fan_in)

    Arguments, errors and source are those of lecun_uniform_.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = gk.init.lecun_normal_(torch.empty(1000, 100))
        >>> bool((weight.std() - 0.1).abs() < 0.001)
        True
    """
    return he_normal_(tensor, nonlinearity="linear", generator=generator)
