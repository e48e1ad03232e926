"""clip_grad_norm_: gradients scaled so that their norm, taken over all of them as one vector, is at most max_norm.

The norm is summed and kept in float64 until it is returned; gradients that are short enough are read once and not written.
What the kernels do not serve (other norms, dtypes, layouts, devices, tensor subclasses) goes to torch's function whole.
"""

import functools
import math
import types
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gradkernels import _native, reference


def clip_grad_norm_(
    parameters: Tensor | nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients in place so that their total norm is at most max_norm, as torch.nn.utils.clip_grad_norm_.

        total_norm = (sum of |g|^p over every element of every gradient)^(1/p)
        g = g min(1, max_norm / (total_norm + 1e-6))

    A total norm that is not finite spreads as in torch: nan makes every gradient nan, inf makes them 0 or nan. Where torch's
    float32 sum of squares overflows, at elements of about 1e19, this one does not.

    Args:
        parameters: a tensor, an iterable of tensors, a module, or (name, parameter) pairs; those without a gradient are skipped.
        max_norm: the largest total norm allowed, in units of the gradients.
        norm_type: p; 2 and inf have kernels.
        error_if_nonfinite: raise, before anything is scaled, where the total norm is nan or inf.
        foreach: which of its implementations torch is to use where the kernels do not serve.

    Returns:
        The total norm before clipping: 0-d, of the promoted dtype of the gradients, on the device of the first one.

    Raises:
        RuntimeError: the total norm is not finite and error_if_nonfinite is set; it names the first parameter at fault
            where names are known.

    Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gk.clip_grad_norm_([weight], max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    entries: list[Tensor | tuple[str, Tensor]]
    if isinstance(parameters, Tensor):
        entries = [parameters]
    elif isinstance(parameters, nn.Module):
        entries = [*parameters.named_parameters()]
    else:
        entries = [*parameters]
        if not entries and isinstance(parameters, types.GeneratorType):
            warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2)
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    grads = [grad for grad in [tensor.grad for tensor in tensors] if grad is not None]
    norm_type = float(norm_type)
    max_norm = float(max_norm)
    message = (
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be clipped. "
        "To disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
    )

    native = None if torch.compiler.is_compiling() else _native.C
    if native is None or not grads or norm_type not in (2.0, math.inf) or not native.clip_grad_applies(grads):
        if not error_if_nonfinite:
            return reference.clip_grad_norm_(tensors, max_norm, norm_type, foreach=foreach)
        try:
            return reference.clip_grad_norm_(tensors, max_norm, norm_type, True, foreach)
        except RuntimeError as error:
            if str(error) != message:
                raise
            raise RuntimeError(message + _first_nonfinite(entries)) from None

    with torch.no_grad():
        total_norm: Tensor = native.get_total_norm(grads, norm_type)
        if error_if_nonfinite and not total_norm.isfinite():
            raise RuntimeError(message + _first_nonfinite(entries))
        native.clip_grads_with_norm_(grads, max_norm, total_norm)
        dtype = functools.reduce(torch.promote_types, {grad.dtype for grad in grads})
        return total_norm.to(grads[0].device, dtype)


def _first_nonfinite(entries: list[Tensor | tuple[str, Tensor]]) -> str:
    """What an error adds where names are known; nothing where every gradient is finite and only their norm is not."""
    for entry in entries:
        if isinstance(entry, tuple):
            name, tensor = entry
            if tensor.grad is not None and not tensor.grad.isfinite().all():
                return f". The first gradient that is not finite is that of {name}"
    return ""
