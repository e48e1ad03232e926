"""Calls of the activations for tests: the table of all of them, layouts, values with gradients.

The second table has the functions that take their parameter as a tensor and give it a gradient.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import gradkernels as gk
from accuracy import DTYPES, SWISH_GRADIENT, extended
from gradkernels import reference


@dataclass(frozen=True)
class Activation:
    """function(x, param), its reference, torch's function, and the modules. formula: the name in accuracy.py."""

    name: str
    formula: str
    function: Any
    reference: Any
    torchs: Any
    module: Any
    default: float
    params: tuple
    torch_module: Any = None
    has_inplace: bool = True

    def __repr__(self):
        return self.name


def with_weight(function):
    """function(x, weight) with the weight as a number, which every dtype has to hold exactly."""
    return lambda x, weight=0.25: function(x, torch.full((1,), weight, dtype=x.dtype, device=x.device))


def with_beta(function):
    return lambda x, beta=1.0: function(x, torch.full((1,), beta, dtype=x.dtype, device=x.device))


def around(function):
    """rrelu in evaluation: its slope is the middle of its bounds."""
    return lambda x, slope=0.25, inplace=False: function(x, slope - 0.125, slope + 0.125, False, inplace)


def drawn(function):
    """rrelu in training with equal bounds, which leave one slope to draw."""
    return lambda x, slope=0.25, inplace=False: function(x, slope, slope, True, inplace)


def sloped(x, slope=0.25, inplace=False):
    """rrelu for around() and drawn().

    torch's rrelu loses the strides and has no vmap and no float16 training.
    """
    return F.leaky_relu(x, slope, inplace)


def in_float32(param):
    """The parameter as the kernels round it, so that this rounding does not count as an error."""
    return torch.tensor(param, dtype=torch.float32).item()


SLOPES = (0.25, 0.0, 1.5, -0.5)
ACTIVATIONS = [
    Activation(
        *("leaky_relu", "leaky_relu", gk.leaky_relu, reference.leaky_relu, F.leaky_relu),
        *(gk.LeakyReLU, 0.01, (0.01, 0.25, 0.0, 1.5, -0.5), nn.LeakyReLU),
    ),
    Activation(
        *("prelu", "leaky_relu", with_weight(gk.prelu), with_weight(reference.prelu), with_weight(F.prelu)),
        *(lambda weight=0.25: gk.PReLU(init=weight), 0.25, SLOPES, nn.PReLU, False),
    ),
    Activation(
        *("rrelu", "leaky_relu", around(gk.rrelu), around(reference.rrelu), sloped),
        *(lambda slope=0.25: gk.RReLU(slope - 0.125, slope + 0.125).eval(), 0.25, SLOPES),
    ),
    Activation(
        *("rrelu in training", "leaky_relu", drawn(gk.rrelu), reference.leaky_relu, sloped),
        *(lambda slope=0.25: gk.RReLU(slope, slope), 0.25, SLOPES),
    ),
    Activation(
        *("elu", "elu", gk.elu, reference.elu, F.elu, gk.ELU, 1.0, (1.0, in_float32(1.3), 0.0, -0.75), nn.ELU),
    ),
    Activation(
        *("swish", "swish", gk.swish, reference.swish, F.silu, gk.Swish, 1.0, (1.0, in_float32(1.7), 0.0, -0.5), nn.SiLU, False),
    ),
    Activation(
        *("swish with a tensor", "swish", with_beta(gk.swish), with_beta(reference.swish), F.silu),
        *(lambda beta=1.0: gk.Swish(beta, learnable=True), 1.0, (1.0, 1.75, 0.0, -0.5), None, False),
    ),
]
BY_NAME = {act.name: act for act in ACTIVATIONS}
INPLACE = [act for act in ACTIVATIONS if act.has_inplace]
LAYOUTS = {
    "0-d": lambda make: make(()),
    "empty": lambda make: make(3, 0, 2),
    "contiguous": lambda make: make(5, 13),
    "transposed": lambda make: make(13, 5).t(),
    "permuted": lambda make: make(4, 3, 5).permute(2, 0, 1),
    "channels_last": lambda make: make(2, 5, 4, 3).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda make: make(2, 5, 2, 4, 3).contiguous(memory_format=torch.channels_last_3d),
    "expanded": lambda make: make(1, 13).expand(5, 13),
    "every second": lambda make: make(5, 26)[:, ::2],
    "rows cut out": lambda make: make(7, 13)[1:6],
    "columns cut out": lambda make: make(5, 17)[:, 1:14],
    "storage offset": lambda make: make(68)[3:],
}

each_act = pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
each_inplace = pytest.mark.parametrize("act", INPLACE, ids=repr)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def leaf(tensor):
    return tensor.detach().requires_grad_()


def value_and_grad(function, x, grad_y, *args, create_graph=False):
    x = leaf(x)
    y = function(x, *args)
    (grad_x,) = torch.autograd.grad(y, x, grad_y, create_graph=create_graph)
    return y.detach(), grad_x.detach()


def away_from_kink(*size, dtype=torch.float64):
    """Values so far from the kink at 0 that finite differences do not cross it."""
    x = torch.randn(*size, dtype=dtype)
    return x + x.sign() * 0.1


def assert_drew_slopes(x, y, grad_x, lower, upper):
    """y and its gradient for a grad_y of ones have the same slopes: 1 where x > 0, else in [lower, upper]."""
    lower, upper = (torch.tensor(each).to(x.dtype).item() for each in (lower, upper))
    assert torch.equal(grad_x[x > 0], torch.ones_like(grad_x[x > 0]))
    assert ((grad_x >= lower) & (grad_x <= upper) | (x > 0)).all()
    # x may be nan, or the largest number of its dtype.
    assert_close(y, grad_x * x, equal_nan=True)


@dataclass(frozen=True)
class Parametric:
    """function(x, parameter), and composed, which is the same function made of torch's operators.

    formula: the name in accuracy.py. share_error, grad_x_error: the bounds of the gradients of the parameter
    and of x, in ulp of their terms.
    """

    name: str
    formula: str
    function: Any
    composed: Any
    share_error: float
    grad_x_error: float

    def __repr__(self):
        return self.name


def across(parameter, x):
    """The parameter in a shape that broadcasts along dimension 1 of x."""
    return parameter.reshape(()) if parameter.size == 1 else parameter.reshape(1, -1, *[1] * (x.ndim - 2))


def composed_swish(x, beta):
    beta = beta.reshape(()) if beta.numel() == 1 else beta.view(-1, *[1] * (x.dim() - 2))
    return x * torch.sigmoid(beta * x)


def exact_shares(x, grad_y, parameter, act):
    """What each element adds to the gradient of the parameter, and the size of its terms.

    The size includes the factor by which exp amplifies the rounding error of z.
    """
    x, grad_y = extended(x), extended(grad_y)
    if act == "prelu":
        return (np.where(x > 0, 0, grad_y * x),) * 2
    z = across(extended(parameter), x) * x
    share = grad_y * x * x / (1 + np.exp(-z)) / (1 + np.exp(z))
    return share, share * (1 + abs(z))


PARAMETRICS = [
    Parametric("prelu", "leaky_relu", gk.prelu, F.prelu, 2.0, 0.5),
    Parametric("swish", "swish", gk.swish, composed_swish, 5.0, SWISH_GRADIENT),
]
each_parametric = pytest.mark.parametrize("act", PARAMETRICS, ids=repr)
