"""leaky_relu, elu and swish, each with its module.

The kernels keep for backward a bit per element (leaky_relu), the output (elu with alpha >= 0) or the input (swish).
torch.compile sees torch's own operators instead: it fuses those into their neighbours, which it cannot do with ours.
"""

from torch import Tensor, nn

from gradkernels import _native, reference


def leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """Leaky rectified linear unit, as torch.nn.functional.leaky_relu.

        y = x                   where x > 0
        y = negative_slope x    elsewhere

    Backward needs the sign of x only, one bit per element, so x is not kept alive. In place a negative slope is allowed
    too, where torch's backward refuses it.

    Args:
        x: any shape; floating point.
        negative_slope: slope where x is not positive, without unit.
        inplace: write y into x.

    Returns:
        y, of the shape and dtype of x; x itself with inplace=True.

    Raises:
        NotImplementedError: x is of an integer or complex dtype.

    Source: Maas, Hannun, Ng, "Rectifier Nonlinearities Improve Neural Network Acoustic Models", 2013.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.leaky_relu(torch.tensor([-2.0, 0.0, 3.0]), 0.5)
        tensor([-1.,  0.,  3.])
    """
    native = _native.library(x)
    if native is None:
        return reference.leaky_relu(x, negative_slope, inplace)
    y: Tensor = native.leaky_relu(x, negative_slope, inplace)
    return y


def elu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Exponential linear unit, as torch.nn.functional.elu.

        y = x                   where x > 0
        y = alpha (e^x - 1)     elsewhere

    Args:
        x: any shape; floating point.
        alpha: minus the value reached far left of zero, in units of y.
        inplace: write y into x; backward then needs alpha >= 0, as in torch.

    Returns:
        y, of the shape and dtype of x; x itself with inplace=True.

    Raises:
        NotImplementedError: x is of an integer or complex dtype.

    Source: Clevert, Unterthiner, Hochreiter, "Fast and Accurate Deep Network Learning by Exponential Linear Units (ELUs)", 2015.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.elu(torch.tensor([-100.0, 0.0, 3.0]), alpha=0.5)
        tensor([-0.5000,  0.0000,  3.0000])
    """
    native = _native.library(x)
    if native is None:
        return reference.elu(x, alpha, inplace)
    y: Tensor = native.elu(x, alpha, inplace)
    return y


def swish(x: Tensor, beta: float = 1.0) -> Tensor:
    """Swish, with beta=1 as torch.nn.functional.silu.

        y = x sigmoid(beta x)

    Args:
        x: any shape; floating point.
        beta: how sharp the gate is, in units of 1/x: 0 gives x / 2, large values approach relu.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        NotImplementedError: x is of an integer dtype.
        TypeError: beta is a tensor.

    Source: Elfwing, Uchibe, Doya, "Sigmoid-Weighted Linear Units for Neural Network Function Approximation in
    Reinforcement Learning", 2017; Ramachandran, Zoph, Le, "Searching for Activation Functions", 2017.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.swish(torch.tensor([-2.0, 0.0, 4.0]), beta=0.5)
        tensor([-0.5379,  0.0000,  3.5232])
    """
    # A tensor of one element would convert to float, and its gradient be lost in silence. isinstance asks Tensor's metaclass, in Python.
    if type(beta) is not float and isinstance(beta, Tensor):
        raise TypeError("swish takes beta as a number, not as a tensor")
    native = _native.library(x)
    if native is None:
        return reference.swish(x, beta)
    y: Tensor = native.swish(x, beta)
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

    def forward(self, x: Tensor) -> Tensor:
        return leaky_relu(x, self.negative_slope, self.inplace)


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

    def forward(self, x: Tensor) -> Tensor:
        return elu(x, self.alpha, self.inplace)


class Swish(nn.Module):
    """Module of swish, with beta=1 as torch.nn.SiLU.

    Args:
        beta: how sharp the gate is; a number, with no entry in state_dict.

    Raises:
        TypeError: beta is a tensor.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.Swish(beta=2.0)
        Swish(beta=2.0)
    """

    beta: float

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        if isinstance(beta, Tensor):
            raise TypeError("Swish takes beta as a number, not as a tensor")
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return swish(x, self.beta)

    def extra_repr(self) -> str:
        return f"beta={self.beta}"
