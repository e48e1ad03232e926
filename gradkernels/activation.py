"""leaky_relu, prelu, rrelu, elu and swish, as functions and as modules.

For backward the kernels keep one bit per element (leaky_relu, and rrelu together with a seed), the output
(elu with alpha >= 0 and more than 16 bits) or the input (elu otherwise, swish, prelu). 16-bit types are
computed in float32 and rounded once. torch.compile gets torch's operators instead, because it can fuse them
with their neighbours.
"""

import math
from numbers import Real

import torch
from torch import Tensor, nn

from gradkernels import _native, reference
from gradkernels.acts import ACTS


@_native.unscriptable
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """Leaky rectified linear unit, as torch.nn.functional.leaky_relu.

        y = x                   where x > 0
        y = negative_slope x    elsewhere

    Backward keeps only the sign of x, one bit per element, and not x itself. A negative slope works in place
    too, which torch's backward does not support.

    Args:
        input: x; any shape, floating point.
        negative_slope: the slope where x is not positive; no unit.
        inplace: write y into input.

    Returns:
        y, with the shape and dtype of x; with inplace=True, input itself.

    Raises:
        NotImplementedError: x has an integer or complex dtype.

    Source: Maas, Hannun, Ng, "Rectifier Nonlinearities Improve Neural Network Acoustic Models", 2013.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.leaky_relu(torch.tensor([-2.0, 0.0, 3.0]), 0.5)
        tensor([-1.,  0.,  3.])
    """
    native = _native.library(input)
    # The binding would turn a tensor into a number and lose its gradient.
    if native is not None and (type(negative_slope) is float or not isinstance(negative_slope, Tensor)):
        try:
            y: Tensor = native.leaky_relu(input, negative_slope, inplace)
            return y
        except TypeError:
            # torch's function below raises its own error for a wrong type.
            pass
    return reference.leaky_relu(input, negative_slope, inplace)


@_native.unscriptable
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Exponential linear unit, as torch.nn.functional.elu.

        y = x                   where x > 0
        y = alpha (e^x - 1)     elsewhere

    For float32 and alpha=1, y is within 1 ulp of the exact value. The gradient is computed from y and is
    within 1 ulp of alpha: below x = -17 it is 0, where the exact gradient is less than 5e-8 alpha.
    (batch_norm_act and torch.nn.functional.elu keep their inputs and are exact there.) Backward needs y, so
    modifying y in place before backward is an error.

    Args:
        input: x; any shape, floating point.
        alpha: y approaches -alpha for large negative x; in units of y.
        inplace: write y into input; backward then needs alpha >= 0, as in torch.

    Returns:
        y, with the shape and dtype of x; with inplace=True, input itself.

    Raises:
        NotImplementedError: x has an integer or complex dtype.

    Source: Clevert, Unterthiner, Hochreiter, "Fast and Accurate Deep Network Learning by Exponential Linear
    Units (ELUs)", 2015.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.elu(torch.tensor([-100.0, 0.0, 3.0]), alpha=0.5)
        tensor([-0.5000,  0.0000,  3.0000])
    """
    native = _native.library(input)
    # The binding would turn a tensor into a number and lose its gradient.
    if native is not None and (type(alpha) is float or not isinstance(alpha, Tensor)):
        try:
            y: Tensor = native.elu(input, alpha, inplace)
            return y
        except TypeError:
            # torch's function below raises its own error for a wrong type.
            pass
    return reference.elu(input, alpha, inplace)


@_native.unscriptable
def swish(input: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """Swish, with beta=1 as torch.nn.functional.silu.

        y = x sigmoid(beta x)

    For float32 and beta=1, y is within 2.2 ulp of the exact value, and the gradient within 2.6 ulp of its
    largest term. Both bounds are 4 ulp where the kernels have no fused multiply-add: on x86-64 without AVX2,
    and on aarch64. One pass computes the gradients of x and of a tensor beta. The gradient of beta is summed
    in float64, and the number of threads does not change its bits.

    Args:
        input: x; any shape, floating point.
        beta: sharpness of the gate, in units of 1/x: 0 gives x / 2, large values approach relu. A number, or
            a tensor with 1 element or C, the number of channels (dimension 1 of x).

    Returns:
        y, with the shape and dtype of x; if beta is a tensor of another dtype, y has the promoted dtype.

    Raises:
        NotImplementedError: x has an integer dtype.
        RuntimeError: beta has neither 1 element nor C.

    Source: Elfwing, Uchibe, Doya, "Sigmoid-Weighted Linear Units for Neural Network Function Approximation in
    Reinforcement Learning", 2017; Ramachandran, Zoph, Le, "Searching for Activation Functions", 2017.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.swish(torch.tensor([-2.0, 0.0, 4.0]), beta=0.5)
        tensor([-0.5379,  0.0000,  3.5232])
    """
    y: Tensor
    # The first comparison is for speed: isinstance(beta, Tensor) runs Python code of Tensor's metaclass.
    if type(beta) is not float and isinstance(beta, Tensor):
        native = _native.library(input, beta)
        if native is None or input is None:
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
    """Leaky rectified linear unit with a learnable slope, as torch.nn.functional.prelu.

        y = x             where x > 0
        y = weight x      elsewhere

    One pass computes the gradients of x and of weight. The gradient of weight is summed in float64, and the
    number of threads does not change its bits.

    Args:
        input: x; any shape, floating point.
        weight: the slope where x is not positive; no unit. 1 element, or C, the number of channels (dimension
            1 of x).

    Returns:
        y, with the shape and dtype of x.

    Raises:
        RuntimeError: weight has neither 1 element nor C, or another dtype than x.
        NotImplementedError: x has an integer or complex dtype.

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
            # torch's function below raises its own error for a wrong type.
            pass
    return reference.prelu(input, weight)


@_native.unscriptable
def rrelu(input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False) -> Tensor:
    """Randomised leaky rectified linear unit, as torch.nn.functional.rrelu.

        y = x       where x > 0
        y = a x     elsewhere; a is uniform in [lower, upper] for each element in training, else (lower + upper) / 2

    In training, one seed is drawn from torch's generator, and all slopes are computed from the seed. So
    backward keeps no tensor of slopes. The slopes differ from those that torch draws after the same
    torch.manual_seed.

    Args:
        input: x; any shape, floating point.
        lower: the smallest slope; no unit.
        upper: the largest slope; no unit.
        training: draw random slopes.
        inplace: write y into input.

    Returns:
        y, with the shape and dtype of x; with inplace=True, input itself.

    Raises:
        RuntimeError: lower is greater than upper.
        NotImplementedError: x has an integer or complex dtype.

    Source: Xu, Wang, Chen, Li, "Empirical Evaluation of Rectified Activations in Convolution Network", 2015;
    random numbers: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.rrelu(torch.tensor([-2.0, 3.0]), lower=0.25, upper=0.75)
        tensor([-1.,  3.])
    """
    # torch's function raises the error for other bounds.
    has_slopes = -math.inf < lower <= upper < math.inf
    if has_slopes and not training:
        return leaky_relu(input, (lower + upper) / 2, inplace)
    native = _native.library(input) if has_slopes else None
    if native is None or input is None:
        return reference.rrelu(input, lower, upper, training, inplace)
    # Not random_(): vmap(randomness="different") does not support it.
    seed = torch.randint(2**63 - 1, (), device=input.device)
    y: Tensor = native.rrelu(input, seed, lower, upper, inplace)
    return y


class LeakyReLU(nn.LeakyReLU):
    """The module of leaky_relu, as torch.nn.LeakyReLU.

        y = x                   where x > 0
        y = negative_slope x    elsewhere

    Args:
        negative_slope: the slope where x is not positive; no unit.
        inplace: write y into the input.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.LeakyReLU(0.5)(torch.tensor([-2.0, 3.0]))
        tensor([-1.,  3.])
    """

    __prepare_scriptable__ = _native.refuse_script

    def forward(self, input: Tensor) -> Tensor:
        return leaky_relu(input, self.negative_slope, self.inplace)


class ELU(nn.ELU):
    """The module of elu, as torch.nn.ELU.

        y = x                   where x > 0
        y = alpha (e^x - 1)     elsewhere

    Args:
        alpha: y approaches -alpha for large negative x; in units of y.
        inplace: write y into the input; backward then needs alpha >= 0, as in torch.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.ELU(alpha=0.5)(torch.tensor([-100.0, 3.0]))
        tensor([-0.5000,  3.0000])
    """

    __prepare_scriptable__ = _native.refuse_script

    def forward(self, input: Tensor) -> Tensor:
        return elu(input, self.alpha, self.inplace)


class PReLU(nn.PReLU):
    """The module of prelu, as torch.nn.PReLU.

        y = x             where x > 0
        y = weight x      elsewhere

    Args:
        num_parameters: the number of slopes: 1, or the number of channels of the input.
        init: the initial value of every slope; no unit.
        device: the device of weight.
        dtype: the dtype of weight.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.PReLU(init=0.5)(torch.tensor([-2.0, 3.0])).detach()
        tensor([-1.,  3.])
    """

    __prepare_scriptable__ = _native.refuse_script

    def forward(self, input: Tensor) -> Tensor:
        return prelu(input, self.weight)


class RReLU(nn.RReLU):
    """The module of rrelu, as torch.nn.RReLU.

        y = x       where x > 0
        y = a x     elsewhere; a is uniform in [lower, upper] for each element in training, else (lower + upper) / 2

    Args:
        lower: the smallest slope; no unit.
        upper: the largest slope; no unit.
        inplace: write y into the input.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.RReLU(0.25, 0.75).eval()(torch.tensor([-2.0, 3.0]))
        tensor([-1.,  3.])
    """

    __prepare_scriptable__ = _native.refuse_script

    def forward(self, input: Tensor) -> Tensor:
        return rrelu(input, self.lower, self.upper, self.training, self.inplace)


class Swish(nn.Module):
    """The module of swish; with beta=1 as torch.nn.SiLU.

        y = x sigmoid(beta x)

    Args:
        beta: sharpness of the gate, in units of 1/x.
        learnable: make beta a Parameter of shape (num_parameters,). Otherwise beta is a number and not in
            state_dict.
        num_parameters: 1, or the number of channels of the input.
        device: the device of the Parameter.
        dtype: the dtype of the Parameter.

    Raises:
        TypeError: beta is not a real number, but for example a tensor.
        ValueError: num_parameters is not 1, and learnable is False.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.Swish(beta=2.0)
        Swish(beta=2.0)
        >>> gk.Swish(learnable=True, num_parameters=3).beta.shape
        torch.Size([3])
    """

    beta: float | Tensor
    init: float

    def __init__(
        self,
        beta: float = 1.0,
        learnable: bool = False,
        num_parameters: int = 1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(beta, Real):
            advice = "; use learnable=True to make it a Parameter" if isinstance(beta, Tensor) else ""
            raise TypeError(f"Swish takes beta as a number, not as {type(beta).__name__}{advice}")
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
    """torch.nn.SiLU computed by swish, for convert; by torch for inplace=True, which swish does not have."""

    __prepare_scriptable__ = _native.refuse_script

    def forward(self, input: Tensor) -> Tensor:
        # The attribute may be set after conversion.
        return super().forward(input) if self.inplace else swish(input)


for _name, _module, _function in (("leaky_relu", LeakyReLU, leaky_relu), ("elu", ELU, elu), ("swish", Swish, swish)):
    ACTS[_name].modules[_module] = ACTS[_name].spellings[_function] = ACTS[_name].param
