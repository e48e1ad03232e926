"""leaky_relu, prelu, rrelu, elu and swish, each with its module.

The kernels keep for backward a bit per element (leaky_relu; rrelu with a seed beside it), the output (elu with alpha >= 0, but
for 16-bit types) or the input (swish, prelu). 16-bit types are computed in float32 and rounded once. torch.compile sees torch's
own operators instead: it fuses those into their neighbours, which it cannot do with ours.
"""

import math

import torch
from torch import Tensor, nn

from gradkernels import _native, reference
from gradkernels.acts import ACTS


@_native.unscriptable
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """Leaky rectified linear unit, as torch.nn.functional.leaky_relu.

        y = x                   where x > 0
        y = negative_slope x    elsewhere

    Backward needs the sign of x only, one bit per element, so x is not kept alive. In place a negative slope is allowed
    too, where torch's backward refuses it.

    Args:
        input: x; any shape, floating point.
        negative_slope: slope where x is not positive, without unit.
        inplace: write y into input.

    Returns:
        y, of the shape and dtype of x; input itself with inplace=True.

    Raises:
        NotImplementedError: x is of an integer or complex dtype.

    Source: Maas, Hannun, Ng, "Rectifier Nonlinearities Improve Neural Network Acoustic Models", 2013.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.leaky_relu(torch.tensor([-2.0, 0.0, 3.0]), 0.5)
        tensor([-1.,  0.,  3.])
    """
    native = _native.library(input)
    # Of a tensor the number would be taken, and its gradient lost.
    if native is not None and (type(negative_slope) is float or not isinstance(negative_slope, Tensor)):
        try:
            y: Tensor = native.leaky_relu(input, negative_slope, inplace)
            return y
        except TypeError:
            # An argument of another type, which torch refuses in its words.
            pass
    return reference.leaky_relu(input, negative_slope, inplace)


@_native.unscriptable
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Exponential linear unit, as torch.nn.functional.elu.

        y = x                   where x > 0
        y = alpha (e^x - 1)     elsewhere

    For float32 and alpha=1, y is within 1 ulp of the exact value, and the gradient, which is read off the output, within 1 ulp
    of alpha: below x = -17 it is 0 where the exact one is less than 5e-8 alpha (batch_norm_act and torch.nn.functional.elu keep
    their inputs and are exact there). The output is what is kept for backward, so y may not be modified in place before it.

    Args:
        input: x; any shape, floating point.
        alpha: minus the value reached far left of zero, in units of y.
        inplace: write y into input; backward then needs alpha >= 0, as in torch.

    Returns:
        y, of the shape and dtype of x; input itself with inplace=True.

    Raises:
        NotImplementedError: x is of an integer or complex dtype.

    Source: Clevert, Unterthiner, Hochreiter, "Fast and Accurate Deep Network Learning by Exponential Linear Units (ELUs)", 2015.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.elu(torch.tensor([-100.0, 0.0, 3.0]), alpha=0.5)
        tensor([-0.5000,  0.0000,  3.0000])
    """
    native = _native.library(input)
    # Of a tensor the number would be taken, and its gradient lost.
    if native is not None and (type(alpha) is float or not isinstance(alpha, Tensor)):
        try:
            y: Tensor = native.elu(input, alpha, inplace)
            return y
        except TypeError:
            # An argument of another type, which torch refuses in its words.
            pass
    return reference.elu(input, alpha, inplace)


@_native.unscriptable
def swish(input: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """Swish, with beta=1 as torch.nn.functional.silu.

        y = x sigmoid(beta x)

    For float32 and beta=1, y is within 2.2 ulp of the exact value, and the gradient within 2.6 ulp of the size of its terms;
    within 4 where the kernels have no fused multiply-add: on x86-64 without AVX2, and on aarch64.
    The gradient of a tensor beta is reduced in the pass that computes that of x, in float64 and in an order that the number of
    threads does not change.

    Args:
        input: x; any shape, floating point.
        beta: how sharp the gate is, in units of 1/x: 0 gives x / 2, large values approach relu. A number, or a tensor with
            one element or with one for each channel of x (dimension 1).

    Returns:
        y, of the shape and dtype of x (of the promoted dtype, where beta is a tensor of another one).

    Raises:
        NotImplementedError: x is of an integer dtype.
        RuntimeError: the length of beta is neither 1 nor the number of channels.

    Source: Elfwing, Uchibe, Doya, "Sigmoid-Weighted Linear Units for Neural Network Function Approximation in
    Reinforcement Learning", 2017; Ramachandran, Zoph, Le, "Searching for Activation Functions", 2017.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.swish(torch.tensor([-2.0, 0.0, 4.0]), beta=0.5)
        tensor([-0.5379,  0.0000,  3.5232])
    """
    y: Tensor
    # isinstance asks Tensor's metaclass, in Python.
    if type(beta) is not float and isinstance(beta, Tensor):
        native = _native.library(input, beta)
        if native is None:
            return reference.swish(input, beta)
        reference.check_beta(input, beta)
        y = native.swish_tensor(input, beta)
        return y
    native = _native.library(input)
    if native is not None:
        try:
            y = native.swish(input, beta)
            return y
        except TypeError:
            pass
    return reference.swish(input, beta)


@_native.unscriptable
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Leaky rectified linear unit whose slope is learnt, as torch.nn.functional.prelu.

        y = x             where x > 0
        y = weight x      elsewhere

    The gradient of weight is reduced in the pass that computes that of x, in float64 and in an order that the number of threads
    does not change.

    Args:
        input: x; any shape, floating point.
        weight: slope where x is not positive, without unit; one element, or one for each channel of x (dimension 1).

    Returns:
        y, of the shape and dtype of x.

    Raises:
        RuntimeError: the length of weight is neither 1 nor the number of channels, or its dtype is not that of x.
        NotImplementedError: x is of an integer or complex dtype.

    Source: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", 2015.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.prelu(torch.tensor([[-2.0, -2.0, 3.0]]), torch.tensor([0.5, 0.25, 0.5]))
        tensor([[-1.0000, -0.5000,  3.0000]])
    """
    native = _native.library(input, weight)
    if native is not None:
        try:
            y: Tensor = native.prelu(input, weight)
            return y
        except TypeError:
            # An argument of another type, which torch refuses in its words.
            pass
    return reference.prelu(input, weight)


@_native.unscriptable
def rrelu(input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False) -> Tensor:
    """Randomised leaky rectified linear unit, as torch.nn.functional.rrelu.

        y = x       where x > 0
        y = a x     elsewhere; a is uniform in [lower, upper] for each element in training, else (lower + upper) / 2

    In training one seed is drawn from torch's generator and every slope follows from it, so that backward keeps no tensor of
    slopes. Under one torch.manual_seed the slopes are not those that torch draws.

    Args:
        input: x; any shape, floating point.
        lower: least slope, without unit.
        upper: largest slope.
        training: draw the slopes.
        inplace: write y into input.

    Returns:
        y, of the shape and dtype of x; input itself with inplace=True.

    Raises:
        RuntimeError: lower is above upper.
        NotImplementedError: x is of an integer or complex dtype.

    Source: Xu, Wang, Chen, Li, "Empirical Evaluation of Rectified Activations in Convolution Network", 2015; the slopes: Salmon,
    Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.rrelu(torch.tensor([-2.0, 3.0]), lower=0.25, upper=0.75)
        tensor([-1.,  3.])
    """
    # Other bounds are torch's error.
    has_slopes = -math.inf < lower <= upper < math.inf
    if has_slopes and not training:
        return leaky_relu(input, (lower + upper) / 2, inplace)
    native = _native.library(input) if has_slopes else None
    if native is None:
        return reference.rrelu(input, lower, upper, training, inplace)
    # Not random_(), which vmap refuses where each slice is to have slopes of its own.
    seed = torch.randint(2**63 - 1, (), device=input.device)
    y: Tensor = native.rrelu(input, seed, lower, upper, inplace)
    return y


class LeakyReLU(nn.LeakyReLU):
    """Module of leaky_relu, as torch.nn.LeakyReLU.

    Args:
        negative_slope: slope where x is not positive, without unit.
        inplace: write the output into the input.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.LeakyReLU(0.5)(torch.tensor([-2.0, 3.0]))
        tensor([-1.,  3.])
    """

    __prepare_scriptable__ = _native.refuse_script

    def forward(self, input: Tensor) -> Tensor:
        return leaky_relu(input, self.negative_slope, self.inplace)


class ELU(nn.ELU):
    """Module of elu, as torch.nn.ELU.

    Args:
        alpha: minus the value reached far left of zero.
        inplace: write the output into the input.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.ELU(alpha=0.5)(torch.tensor([-100.0, 3.0]))
        tensor([-0.5000,  3.0000])
    """

    __prepare_scriptable__ = _native.refuse_script

    def forward(self, input: Tensor) -> Tensor:
        return elu(input, self.alpha, self.inplace)


class PReLU(nn.PReLU):
    """Module of prelu, as torch.nn.PReLU.

    Args:
        num_parameters: 1, or the number of channels of the input.
        init: what every slope starts from.
        device: where weight is made.
        dtype: of weight.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.PReLU(init=0.5)(torch.tensor([-2.0, 3.0])).detach()
        tensor([-1.,  3.])
    """

    __prepare_scriptable__ = _native.refuse_script

    def forward(self, input: Tensor) -> Tensor:
        return prelu(input, self.weight)


class RReLU(nn.RReLU):
    """Module of rrelu, as torch.nn.RReLU.

    Args:
        lower: least slope.
        upper: largest slope.
        inplace: write the output into the input.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.RReLU(0.25, 0.75).eval()(torch.tensor([-2.0, 3.0]))
        tensor([-1.,  3.])
    """

    __prepare_scriptable__ = _native.refuse_script

    def forward(self, input: Tensor) -> Tensor:
        return rrelu(input, self.lower, self.upper, self.training, self.inplace)


class Swish(nn.Module):
    """Module of swish, with beta=1 as torch.nn.SiLU.

    Args:
        beta: how sharp the gate is.
        learnable: make beta a Parameter of shape (num_parameters,), in state_dict; else it is a number and leaves no entry.
        num_parameters: 1, or the number of channels of the input.
        device: where the Parameter is made.
        dtype: of the Parameter.

    Raises:
        TypeError: beta is a tensor.
        ValueError: num_parameters other than 1 without learnable.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.Swish(beta=2.0)
        Swish(beta=2.0)
        >>> gk.Swish(learnable=True, num_parameters=3).beta.shape
        torch.Size([3])
    """

    beta: float | Tensor

    def __init__(
        self,
        beta: float = 1.0,
        learnable: bool = False,
        num_parameters: int = 1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(beta, Tensor):
            raise TypeError("Swish takes beta as a number, not as a tensor; learnable=True makes it a Parameter")
        if not learnable and num_parameters != 1:
            raise ValueError(f"num_parameters={num_parameters} needs learnable=True")
        self.init = beta
        if learnable:
            self.beta = nn.Parameter(torch.full((num_parameters,), float(beta), device=device, dtype=dtype))
        else:
            self.beta = beta

    def reset_parameters(self) -> None:
        if isinstance(self.beta, Tensor):
            nn.init.constant_(self.beta, self.init)

    __prepare_scriptable__ = _native.refuse_script

    def forward(self, input: Tensor) -> Tensor:
        return swish(input, self.beta)

    def extra_repr(self) -> str:
        if isinstance(self.beta, Tensor):
            return f"beta={self.init}, learnable=True, num_parameters={self.beta.numel()}"
        return f"beta={self.beta}"


class SiLU(nn.SiLU):
    """torch.nn.SiLU computed by swish, which convert makes of it; not for inplace=True, which swish does not have."""

    __prepare_scriptable__ = _native.refuse_script

    def forward(self, input: Tensor) -> Tensor:
        return swish(input)


for _name, _module, _function in (("leaky_relu", LeakyReLU, leaky_relu), ("elu", ELU, elu), ("swish", Swish, swish)):
    ACTS[_name].modules[_module] = ACTS[_name].spellings[_function] = ACTS[_name].param
