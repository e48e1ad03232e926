"""Gradients as one vector: its norm, clipping by norm and by value; clipping by unit; a report on each parameter.

One pass reads every gradient once and sums in float64 (16-bit gradients on a GPU by eights in float32 first).
Gradients that need no clipping are not written. torch's functions do the whole call if the kernels do not
support it (other norms, dtypes, layouts, devices). For DTensors the kernels compute on the local shards
(sharded.py), and for sparse gradients on their values (gradients.py).
"""

import math
import types
import warnings
from collections.abc import Iterable
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from gradkernels import _native, reference, sharded, text
from gradkernels.gradients import NORM_TYPES, Gradients, can_be_any_dtype, kernels_for, tensor_norms

Parameters: TypeAlias = Tensor | nn.Module | Iterable[Tensor | tuple[str, Tensor]]
Entries: TypeAlias = list[Tensor | tuple[str, Tensor]]


def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients in place to a total norm of at most max_norm, as torch.nn.utils.clip_grad_norm_.

        total_norm = (sum of |g|^p over every element of every gradient)^(1/p)
        g = g min(1, max_norm / (total_norm + 1e-6))

    A total norm of nan makes every gradient nan, and inf makes gradients 0 or nan, as in torch. Norm and
    coefficient are computed in float64, except that a GPU adds eight terms of 16-bit gradients in float32
    first. So gradients are clipped correctly where torch's norm overflows or vanishes: float32 gradients
    from about 1e19 on, and float16 gradients with a norm above 65504. The returned norm is rounded to the
    dtype of the gradients, and may be inf there. error_if_nonfinite checks the norm before rounding.

    Args:
        parameters: a tensor, an iterable of tensors, a module, or (name, parameter) pairs. Parameters without
            a gradient are skipped. DTensors and plain tensors may be mixed; plain tensors must be the same on
            every rank. Sparse gradients are clipped with torch 2.14 or newer, as by torch.
        max_norm: the largest total norm allowed, in units of the gradients.
        norm_type: p; 1, 2 and inf have kernels.
        error_if_nonfinite: raise an error if the total norm is nan or inf, before anything is scaled.
        foreach: passed to torch's function if the kernels do not support the call.

    Returns:
        The total norm before clipping: 0-d, with the promoted dtype of the gradients, on the device of the
        first one. A replicated DTensor if all gradients are DTensors on one mesh.

    Raises:
        RuntimeError: error_if_nonfinite is set and the total norm is not finite; the message contains the
            name, or else the position, of the first parameter with a non-finite gradient. Or parameters
            belong to a FullyShardedDataParallel model (FSDP1), whose ranks hold pieces of them: call
            model.clip_grad_norm_(max_norm).
        TypeError: parameters contains something other than tensors and (name, tensor) pairs, or max_norm is
            no number.
        ValueError: max_norm is a text that float() refuses.

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
    entries = _entries(parameters)
    if not entries and isinstance(parameters, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2)
    sharded.refuse_fsdp1_pieces(_tensors(entries))
    norm_type = float(norm_type)
    max_norm = float(max_norm)
    error_if_nonfinite = bool(error_if_nonfinite)

    native = _native.library()
    if native is not None and norm_type in NORM_TYPES:
        # One call that loops over the parameters in C++; None if the kernels do not support a gradient.
        result = native.clip_grad_norm_(entries, max_norm, norm_type, error_if_nonfinite)
        if result is not None:
            total_norm: Tensor
            total_norm, is_refused = result
            if is_refused:
                raise RuntimeError(_nonfinite_message(norm_type) + first_nonfinite_sentence(entries))
            return total_norm

    tensors = _tensors(entries)
    gradients = Gradients(_grads(tensors))
    with torch.no_grad():
        if gradients.supports(norm_type):
            total_norm = gradients.total_norm(norm_type)
            if error_if_nonfinite and not total_norm.isfinite():
                raise RuntimeError(_nonfinite_message(norm_type) + first_nonfinite_sentence(entries))
            gradients.scale_(max_norm, total_norm)
            return gradients.as_torch_returns(total_norm)
    try:
        return reference.clip_grad_norm_(tensors, max_norm, norm_type, error_if_nonfinite, foreach)
    except RuntimeError as error:
        if str(error) != _nonfinite_message(norm_type):
            raise
        raise RuntimeError(str(error) + first_nonfinite_sentence(entries)) from None


def get_total_norm(
    tensors: Tensor | Iterable[Tensor], norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    """The norm of all tensors as one vector, as torch.nn.utils.get_total_norm.

        total_norm = (sum of |x|^p over every element of every tensor)^(1/p)

    Args:
        tensors: a tensor or an iterable of tensors: the gradients, not the parameters. With
            FullyShardedDataParallel (FSDP1) they are pieces, and the result is the norm of this rank's
            pieces; model.clip_grad_norm_(max_norm) returns the norm of the whole gradients.
        norm_type: p; 1, 2 and inf have kernels.
        error_if_nonfinite: raise an error if the total norm is nan or inf.
        foreach: passed to torch's function if the kernels do not support the call.

    Returns:
        The total norm: 0-d, with the promoted dtype of the tensors, on the device of the first one; 0 without
        tensors. A replicated DTensor if all tensors are DTensors on one mesh. In float16 a norm above 65504
        is inf, as in torch; grad_report(...).total_norm is float64.

    Raises:
        RuntimeError: error_if_nonfinite is set and the total norm is not finite.
        TypeError: tensors contains something else, such as the None of a parameter without a gradient.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    norm_type = float(norm_type)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise _type_error("tensors must be tensors", tensors)
    gradients = Gradients(tensors)
    with torch.no_grad():
        if not gradients.supports(norm_type):
            return reference.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
        total_norm = gradients.total_norm(norm_type)
        if error_if_nonfinite and not total_norm.isfinite():
            raise RuntimeError(_nonfinite_message(norm_type))
        return gradients.as_torch_returns(total_norm)


def clip_grads_with_norm_(parameters: Parameters, max_norm: float, total_norm: Tensor, foreach: bool | None = None) -> None:
    """Scale gradients in place with a known total norm, as torch.nn.utils.clip_grads_with_norm_.

        g = g min(1, max_norm / (total_norm + 1e-6))

    The coefficient is computed in float64. Nothing is written if it is at least 1.

    Args:
        parameters: as for clip_grad_norm_.
        max_norm: the largest total norm allowed, in units of the gradients.
        total_norm: 0-d; from get_total_norm, or for float16 gradients from grad_report. If other ranks hold
            other parameters, it must be reduced over these ranks.
        foreach: passed to torch's function if the kernels do not support the call.

    Raises:
        RuntimeError: a gradient is expanded, so that its elements share memory.
        TypeError: total_norm is not a tensor; else as for clip_grad_norm_.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gk.clip_grads_with_norm_([weight], max_norm=1.0, total_norm=torch.tensor(10.0))
        >>> weight.grad
        tensor([0.3000, 0.4000])
    """
    if not isinstance(total_norm, Tensor):
        raise TypeError(f"total_norm must be Tensor, not {type(total_norm).__name__}")
    tensors = _tensors(_entries(parameters))
    gradients = Gradients(_grads(tensors))
    with torch.no_grad():
        # torch's function raises the error for other total norms.
        if gradients.supports() and total_norm.dim() == 0 and not total_norm.is_complex():
            gradients.scale_(float(max_norm), sharded.full(total_norm))
        else:
            reference.clip_grads_with_norm_(tensors, max_norm, total_norm, foreach)


def clip_grad_value_(parameters: Parameters, clip_value: float, foreach: bool | None = None) -> None:
    """Clamp every element of every gradient in place, as torch.nn.utils.clip_grad_value_.

        g = min(max(g, -clip_value), clip_value)

    nan stays nan. Values within the bounds are read and not written. If no parameter has a gradient, torch
    raises an error, and this function does nothing.

    Args:
        parameters: as for clip_grad_norm_.
        clip_value: the largest magnitude allowed, in units of the gradients.
        foreach: passed to torch's function if the kernels do not support the call.

    Raises:
        RuntimeError: a gradient is expanded, so that its elements share memory.
        TypeError: parameters contains something other than tensors and (name, tensor) pairs, or clip_value is
            no number.
        ValueError: clip_value is a text that float() refuses.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = torch.zeros(3, requires_grad=True)
        >>> weight.grad = torch.tensor([-3.0, 0.5, 4.0])
        >>> gk.clip_grad_value_([weight], clip_value=1.0)
        >>> weight.grad
        tensor([-1.0000,  0.5000,  1.0000])
    """
    tensors = _tensors(_entries(parameters))
    clip_value = float(clip_value)
    gradients = Gradients(_grads(tensors))
    with torch.no_grad():
        if gradients.is_sharded or (gradients.kernels is not None and not gradients.has_sparse and can_be_any_dtype(clip_value)):
            gradients.clamp_(clip_value)
        elif gradients.tensors:
            reference.clip_grad_value_(tensors, clip_value, foreach)


def adaptive_clip_grad_(parameters: Parameters, clip_factor: float = 0.01, eps: float = 1e-3, norm_type: float = 2.0) -> None:
    """Scale each unit's gradient in place to a share of the norm of its weights, as timm's adaptive_clip_grad (AGC).

        g_i = g_i clip_factor max(|w_i|, eps) / max(|g_i|, 1e-6)            if |g_i| >= clip_factor max(|w_i|, eps)

    w_i and g_i are the weights and the gradients of unit i: a slice along the first dimension, such as a row
    of a Linear or a filter of a convolution; a tensor of fewer than two dimensions is one unit. Norms are
    computed in float64, except that a GPU adds eight terms of 16-bit gradients in float32 first. A unit is
    read and scaled while it lies in cache; units that need no scaling are not written.

    Args:
        parameters: as for clip_grad_norm_. The paper leaves out the parameters of the last layer.
        clip_factor: the largest ratio of the norm of a gradient to that of its weights; no unit.
        eps: the least norm of weights, so that weights of zero can train; in units of the weights.
        norm_type: p of the norms; 1, 2 and inf have kernels.

    Raises:
        RuntimeError: a gradient is sparse, expanded, or of integers. Or parameters belong to a
            FullyShardedDataParallel model (FSDP1).
        TypeError: parameters contains something other than tensors and (name, tensor) pairs, or an option is
            no number.
        ValueError: an option is a text that float() refuses.

    Source: Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without
    Normalization", 2021.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = torch.ones(2, 2, requires_grad=True)
        >>> weight.grad = torch.tensor([[3.0, 4.0], [0.003, 0.004]])
        >>> gk.adaptive_clip_grad_(weight)
        >>> weight.grad
        tensor([[0.0085, 0.0113],
                [0.0030, 0.0040]])
    """
    entries = _entries(parameters)
    tensors = _tensors(entries)
    sharded.refuse_fsdp1_pieces(tensors)
    clip_factor, eps, norm_type = float(clip_factor), float(eps), float(norm_type)
    grads = _grads(tensors)
    if any(grad.layout != torch.strided for grad in grads):
        raise RuntimeError("adaptive_clip_grad_ does not support sparse gradients, because their units are not stored whole")
    params = [tensor for tensor in tensors if tensor.grad is not None]
    kernels = kernels_for([*params, *grads]) if norm_type in NORM_TYPES else None
    with torch.no_grad():
        if kernels is not None and all(param.dtype == grad.dtype for param, grad in zip(params, grads, strict=True)):
            kernels.adaptive_clip_grad_(params, grads, clip_factor, eps, norm_type)
        else:
            reference.adaptive_clip_grad_(params, clip_factor, eps, norm_type)


class GradReport:
    """The result of grad_report: norm, largest magnitude and non-finite elements of each gradient.

    Attributes:
        names: the names of the parameters, in their order; the position ("0", "1", ...) of a parameter
            without a name.
        norms: float64, (len(names),): the norm of each gradient, nan without a gradient; in units of the
            gradients.
        max_abs: float64, (len(names),): the largest magnitude of each gradient, nan without a gradient; in
            units of the gradients.
        nonfinite: int64, (len(names),): the number of elements that are nan or inf.
        total_norm: float64, 0-d: the norm of all gradients as one vector; in units of the gradients.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight, bias = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
        >>> weight.grad, bias.grad = torch.tensor([3.0, 4.0]), torch.tensor([float("inf")])
        >>> report = gk.grad_report({"weight": weight, "bias": bias}.items())
        >>> report.first_nonfinite()
        'bias'
        >>> print(report.table())
        parameter  norm  max |g|  non-finite
        weight        5        4           0
        bias        inf      inf           1
        total       inf      inf           1
    """

    def __init__(self, names: list[str], parameters: list[Tensor], norms: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        self.names = names
        self.norms, self.max_abs, self.nonfinite, self.total_norm = norms
        self._parameters = parameters
        self._versions = _gradient_versions(parameters)

    def first_nonfinite(self) -> str | None:
        """The name of the first parameter whose gradient has nan or inf; None if all gradients are finite."""
        positions = self.nonfinite.nonzero()
        return self.names[int(positions[0])] if len(positions) else None

    def table(self) -> str:
        """The report as text: one line per parameter, and the total in the last line."""
        has_gradient = ~self.norms.isnan() | (self.nonfinite > 0)
        norms, max_abs, nonfinite = self.norms.tolist(), self.max_abs.tolist(), self.nonfinite.tolist()
        rows = [
            (name, f"{norm:.4g}", f"{largest:.4g}", str(count)) if has_one else (name, "-", "-", "no gradient")
            for name, norm, largest, count, has_one in zip(self.names, norms, max_abs, nonfinite, has_gradient.tolist(), strict=True)
        ]
        magnitudes = self.max_abs[has_gradient]
        largest = magnitudes.max().item() if len(magnitudes) else 0.0
        rows.append(("total", f"{self.total_norm.item():.4g}", f"{largest:.4g}", str(sum(nonfinite))))
        return "\n".join(text.columns([("parameter", "norm", "max |g|", "non-finite"), *rows]))

    def clip_(self, max_norm: float) -> Tensor:
        """Scale the gradients as clip_grad_norm_ would, without reading them again.

        Args:
            max_norm: the largest total norm allowed, in units of the gradients.

        Returns:
            The total norm before clipping, float64.

        Raises:
            RuntimeError: gradients were replaced or written after the report, also by clip_ itself. Nothing
                is scaled.
        """
        if _gradient_versions(self._parameters) != self._versions:
            raise RuntimeError("the gradients have changed since the report was made, so its norm is out of date; call grad_report again")
        clip_grads_with_norm_(self._parameters, max_norm, self.total_norm)
        return self.total_norm

    def __repr__(self) -> str:
        return self.table()


def grad_report(parameters: Parameters, norm_type: float = 2.0) -> GradReport:
    """Measure each parameter's gradient in one pass: norm, largest magnitude and non-finite elements.

        norms[i] = (sum of |g|^p over the elements of gradient i)^(1/p)

    The results stay on the gradients' device, and the call does not wait for the device, with two exceptions:
    sparse gradients, which count as if they were dense, and DTensors of float64, whose squares may overflow.
    For DTensors all ranks must call grad_report. The report then describes whole tensors and is the same on
    every rank.

    Args:
        parameters: as for clip_grad_norm_, preferably a module or (name, parameter) pairs. The norm of a
            parameter without a gradient is nan.
        norm_type: p; 1, 2 and inf have kernels.

    Returns:
        A GradReport.

    Raises:
        RuntimeError: parameters are pieces of a FullyShardedDataParallel model (FSDP1). With
            use_orig_params=True, `FullyShardedDataParallel.summon_full_params(model, with_grads=True)` is a
            context in which they are whole.
        TypeError: parameters contains something other than tensors and (name, tensor) pairs.

    Example:
        >>> import torch, gradkernels as gk
        >>> model = torch.nn.Linear(2, 1)
        >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> report = gk.grad_report(model)
        >>> report.names, report.norms.tolist(), report.first_nonfinite()
        (['weight', 'bias'], [5.0, 1.0], None)
        >>> report.clip_(1.0)
        tensor(5.0990, dtype=torch.float64)
    """
    entries = _entries(parameters)
    names = [_name_and_tensor(entry)[0] or str(i) for i, entry in enumerate(entries)]
    tensors = _tensors(entries)
    sharded.refuse_fsdp1_pieces(tensors)
    grads = _grads(tensors)
    with torch.no_grad():
        norms = tensor_norms(grads, float(norm_type))
        if len(grads) != len(tensors):
            *per_gradient, total_norm = norms
            positions = sharded.index_on(per_gradient[0].device, [i for i, tensor in enumerate(tensors) if tensor.grad is not None])
            gradient_norms, max_abs, nonfinite = (_scattered(values, positions, len(tensors)) for values in per_gradient)
            norms = gradient_norms, max_abs, nonfinite, total_norm
    return GradReport(names, tensors, norms)


def _gradient_versions(parameters: list[Tensor]) -> list[tuple[int, int] | None]:
    """The identity and the version of each gradient: replacing or writing a gradient changes one of them."""
    grads = [parameter.grad for parameter in parameters]
    return [None if grad is None else (id(grad), 0 if grad.is_inference() else grad._version) for grad in grads]


def _entries(parameters: Parameters) -> Entries:
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, nn.Module):
        return [*parameters.named_parameters()]
    # If parameters cannot be iterated, list() raises the same error as torch's loop.
    return list(parameters)


def _name_and_tensor(entry: Tensor | tuple[str, Tensor]) -> tuple[str | None, Tensor]:
    """The name, or None, and the tensor. Any other tuple counts as a tensor; _grads reports its type."""
    is_pair = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
    return cast("tuple[str, Tensor]", entry) if is_pair else (None, cast(Tensor, entry))


def _tensors(entries: Entries) -> list[Tensor]:
    return [_name_and_tensor(entry)[1] if isinstance(entry, tuple) else entry for entry in entries]


def _grads(tensors: list[Tensor]) -> list[Tensor]:
    try:
        return [grad for grad in [tensor.grad for tensor in tensors] if grad is not None]
    except AttributeError:
        if all(isinstance(tensor, Tensor) for tensor in tensors):
            raise
        raise _type_error("parameters must be tensors or (name, tensor) pairs", tensors) from None


def _type_error(expected: str, tensors: list[Tensor]) -> TypeError:
    kind = next(type(tensor).__name__ for tensor in tensors if not isinstance(tensor, Tensor))
    return TypeError(f"{expected}, not {kind}{'; for a dict, pass its items() or values()' if kind == 'str' else ''}")


def _scattered(values: Tensor, positions: Tensor, count: int) -> Tensor:
    """A vector of length count with values[i] at positions[i], and nan elsewhere (0 for integers)."""
    scattered = values.new_full((count,), math.nan if values.is_floating_point() else 0)
    return scattered.index_copy_(0, positions, values)


def nonfinite_sentence(norm_type: float) -> str:
    """torch's words."""
    return f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be clipped"


def _nonfinite_message(norm_type: float) -> str:
    """torch's message."""
    return (
        f"{nonfinite_sentence(norm_type)}. "
        "To disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
    )


def first_nonfinite_sentence(entries: Entries) -> str:
    """For the end of an error message; empty if all gradients are finite and only their norm is not."""
    report = grad_report(entries)
    name = report.first_nonfinite()
    if name is None:
        return ""
    has_name = _name_and_tensor(entries[report.names.index(name)])[0] is not None
    return f". The first non-finite gradient is that of {name if has_name else f'parameter {name}'}"
