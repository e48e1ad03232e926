"""The gain of an activation: the factor on the weights before it with which a signal keeps its size.

The gain is computed from its definition instead of looked up. So every activation has one, for every value of
its parameters.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from gradkernels.acts import ACTS, Act

Param: TypeAlias = float | tuple[float, ...] | None


class Nonlinearity(NamedTuple):
    """What initialisation knows of an activation f.

    Attributes:
        scheme: the initialisation that was derived for it: "he", "lecun" or "xavier".
        second_moment: E[f(z)^2] for z from N(0, 1), as a function of the parameters of f.
        params: name -> default of each parameter, in the order in which the function takes them. torch's
            modules and functions have the same names.
    """

    scheme: str
    second_moment: Callable[..., float]
    params: Mapping[str, float] = {}


def _quadrature(f: Callable[..., Tensor]) -> Callable[..., float]:
    """Return E[f(z, *params)^2] for z from N(0, 1), as a function of params.

    Each half line is integrated by the trapezoidal rule after z = exp(pi / 2 sinh t). The rule converges
    exponentially for an f that is smooth except at 0, on whatever scale f bends, because the nodes lie as
    densely at 1e-9 as at 1. A corner elsewhere, as in hardtanh, leaves a relative error of 1e-5. A jump
    leaves one of 1e-4.
    """

    def second_moment(*params: float) -> float:
        t = torch.linspace(-4, 2, 1025, dtype=torch.float64, device="cpu")
        half = (math.pi / 2 * t.sinh()).exp()
        weight = half * t.cosh() * (math.pi / 2) * (t[1] - t[0]) * (-half.square() / 2).exp() / math.sqrt(2 * math.pi)
        values = f(torch.stack([half, -half]), *params).square()
        # Far from 0, e^x - 1 can overflow where the weight is 0.
        moment: float = torch.where(weight > 0, values * weight, 0.0).sum().item()
        return moment

    return second_moment


def _leaky_moment(lower: float, upper: float) -> float:
    """E[f(z)^2] for f(x) = x where x > 0, else a x, with a uniform in [lower, upper]."""
    return (1 + (lower * lower + lower * upper + upper * upper) / 3) / 2


def _computed(scheme: str, *names: str, **params: float) -> dict[str, Nonlinearity]:
    """The entries of functions of torch.nn.functional whose moment is integrated numerically."""
    return {name: Nonlinearity(scheme, _quadrature(getattr(F, name)), params) for name in names}


def _of_record(act: Act) -> Nonlinearity:
    if act.param is None or act.default is None:
        return Nonlinearity("he", _quadrature(lambda z: act.function(z, 0.0)))
    return Nonlinearity("he", _quadrature(act.function), {act.param: act.default})


LINEAR = Nonlinearity("lecun", lambda: 1.0)

# Keys are swish and names of functions in torch.nn.functional. He's scheme is for activations that pass one
# side of 0, Xavier's for activations that treat both sides alike.
NONLINEARITIES: dict[str, Nonlinearity] = {
    **{name: _of_record(act) for act in ACTS.values() for name in act.operators},
    **dict.fromkeys(("linear", "identity", "conv1d", "conv2d", "conv3d"), LINEAR),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), LINEAR),
    "relu": Nonlinearity("he", lambda: _leaky_moment(0.0, 0.0)),
    "leaky_relu": Nonlinearity("he", lambda slope: _leaky_moment(slope, slope), {"negative_slope": 0.01}),
    "prelu": Nonlinearity("he", lambda slope: _leaky_moment(slope, slope), {"weight": 0.25}),
    "rrelu": Nonlinearity("he", _leaky_moment, {"lower": 1 / 8, "upper": 1 / 3}),
    **_computed("he", "logsigmoid"),
    **_computed("he", "celu", alpha=1.0),
    **_computed("he", "softplus", beta=1.0),
    # glu(a, b) = a sigmoid(b), and E[a^2] = 1.
    "glu": Nonlinearity("he", _quadrature(torch.sigmoid)),
    **_computed("lecun", "selu"),
    **_computed("xavier", "sigmoid", "tanh", "hardsigmoid", "softsign", "tanhshrink"),
    **_computed("xavier", "softshrink", "hardshrink", lambd=0.5),
    **_computed("xavier", "hardtanh", min_val=-1.0, max_val=1.0),
}


def calculate_gain(nonlinearity: str, param: Param = None) -> float:
    """Return the gain of an activation: the factor on the standard deviation of the weights before it.

        gain = 1 / sqrt(E[f(z)^2]),  z from N(0, 1)

    With this factor the mean square of a signal is 1 in every layer. For relu, leaky_relu and linear layers
    the gain equals torch.nn.init.calculate_gain. For sigmoid, tanh and selu torch has 1, 5/3 and 3/4, where
    the definition gives 1.8462, 1.5925 and 1. torch has no gain for the other activations.

    The mean square of 1 is not stable with swish, gelu, gelu_tanh, mish, hardswish, tanhshrink, softshrink
    and hardshrink: from layer to layer a smaller signal shrinks and a larger one grows. Deep networks of these
    need batch norm as well.

    Args:
        nonlinearity: "linear" (or the name of a convolution), "relu", "relu6", "leaky_relu", "prelu",
            "rrelu", "elu", "celu", "swish" or "silu", "gelu", "gelu_tanh", "mish", "hardswish", "softplus",
            "logsigmoid", "glu", "selu", "sigmoid", "hardsigmoid", "tanh", "hardtanh", "softsign",
            "tanhshrink", "softshrink" or "hardshrink".
        param: the parameter of the activation; None is the default in brackets. It is negative_slope of
            leaky_relu (0.01), the slope of prelu (0.25), (lower, upper) of rrelu (1/8, 1/3), alpha of elu and
            celu (1), beta of swish and softplus (1), (min_val, max_val) of hardtanh (-1, 1), lambd of
            softshrink and hardshrink (0.5). Activations without a parameter ignore it.

    Returns:
        The gain, without a unit.

    Raises:
        ValueError: nonlinearity is not in the list, param is not one number for each parameter, or E[f(z)^2]
            is not a positive number for this param.

    Source: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", 2015. This is its condition (equation 10) for
    any f.

    Example:
        >>> import gradkernels as gk
        >>> [round(gk.init.calculate_gain(name), 4) for name in ("relu", "elu", "swish", "tanh")]
        [1.4142, 1.2452, 1.6765, 1.5925]
        >>> round(gk.init.calculate_gain("swish", 0.0), 4)
        2.0
    """
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"Unsupported nonlinearity {nonlinearity}")
    entry = NONLINEARITIES[nonlinearity]
    values = tuple(entry.params.values()) if param is None else param if isinstance(param, tuple) else (param,)
    try:
        # float() would parse a string.
        params = [math.fsum((value,)) for _, value in zip(entry.params, values, strict=True)] if entry.params else []
        second_moment = entry.second_moment(*params)
    # torch refuses some parameters, such as alpha=0 of celu, with a RuntimeError.
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{param!r} is not a valid parameter of {nonlinearity}") from error
    if not 0 < second_moment < math.inf:
        raise ValueError(f"{nonlinearity} with parameter {param!r} has no gain: E[f(z)^2] is {second_moment}")
    return 1 / math.sqrt(second_moment)
