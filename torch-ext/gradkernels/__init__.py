"""Activations and gradient clipping of gradkernels, as a kernel of the Hugging Face hub.

The operators are those of torch.ops.gradkernels, in a namespace of their own. The builder writes _ops.py, which
knows its name.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ._ops import ops

__all__ = ["clip_grad_norm_", "clip_grad_value_", "elu", "leaky_relu", "prelu", "swish"]


def leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    """torch.nn.functional.leaky_relu. Backward reads one bit for each element."""
    y: Tensor = ops.leaky_relu(x, negative_slope)
    return y


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """torch.nn.functional.elu."""
    y: Tensor = ops.elu(x, alpha)
    return y


def swish(x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """x * sigmoid(beta * x). A tensor beta has one element, or one for each channel of x, and may be learned."""
    # Of a tensor with one element, the first overload would take the number, and lose its gradient.
    y: Tensor = ops.swish.Tensor(x, beta) if isinstance(beta, Tensor) else ops.swish(x, beta)
    return y


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """torch.nn.functional.prelu."""
    y: Tensor = ops.prelu(x, weight)
    return y


def _grads(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    tensors = [parameters] if isinstance(parameters, Tensor) else parameters
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for dense gradients on the CPU.

    Args:
        parameters: a tensor or an iterable of tensors. Those without a gradient are skipped.
        max_norm: the largest total norm allowed, in units of the gradients.
        norm_type: 1, 2 or inf.

    Returns:
        The total norm before clipping: 0-d, with the dtype of the first gradient; gradkernels promotes the dtypes of all.
    """
    grads = _grads(parameters)
    if not grads:
        return torch.tensor(0.0)
    total_norm: Tensor = ops.grad_norms(grads, norm_type)[3]
    ops.clip_grads_with_norm_(grads, max_norm, total_norm)
    return total_norm.to(grads[0].dtype)


@torch.no_grad()
def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """torch.nn.utils.clip_grad_value_ for dense gradients on the CPU.

    Args:
        parameters: a tensor or an iterable of tensors. Those without a gradient are skipped.
        clip_value: the largest magnitude allowed, in units of the gradients.
    """
    grads = _grads(parameters)
    if grads:
        ops.clip_grad_value_(grads, clip_value)
