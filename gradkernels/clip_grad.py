"""Gradients as one vector: its norm, clipping by norm and by value, and a report of which parameter is large or not finite.

One pass reads every gradient once and sums in float64; gradients that are short enough are not written. What the kernels do not serve
(other norms, dtypes, layouts, devices) goes to torch's functions whole; DTensors go by their local shards (sharded.py).
"""

import math
import types
import warnings
from collections.abc import Iterable
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from gradkernels import _native, reference, sharded, text
from gradkernels.gradients import NORM_TYPES, Gradients, tensor_norms

Parameters: TypeAlias = Tensor | nn.Module | Iterable[Tensor | tuple[str, Tensor]]
_Entries: TypeAlias = list[Tensor | tuple[str, Tensor]]


def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients in place so that their total norm is at most max_norm, as torch.nn.utils.clip_grad_norm_.

        total_norm = (sum of |g|^p over every element of every gradient)^(1/p)
        g = g min(1, max_norm / (total_norm + 1e-6))

    A total norm that is not finite spreads as in torch: nan makes every gradient nan, inf makes them 0 or nan. Norm and
    coefficient are float64 until they are used, so that gradients are clipped where torch's norm overflows or vanishes:
    float32 from about 1e19 on, float16 where the norm passes 65504. What is returned is rounded to the gradients' dtype, inf
    where that has no such number, and error_if_nonfinite asks the unrounded one.

    Args:
        parameters: a tensor, an iterable of tensors, a module, or (name, parameter) pairs; those without a gradient are
            skipped. DTensors may stand beside plain tensors, which are taken to be the same on every rank.
        max_norm: the largest total norm allowed, in units of the gradients.
        norm_type: p; 1, 2 and inf have kernels.
        error_if_nonfinite: raise, before anything is scaled, where the total norm is nan or inf.
        foreach: which of its implementations torch is to use where the kernels do not serve.

    Returns:
        The total norm before clipping: 0-d, of the promoted dtype of the gradients, on the device of the first one. A
        replicated DTensor where all gradients are DTensors on one mesh.

    Raises:
        RuntimeError: the total norm is not finite and error_if_nonfinite is set; it names the first parameter at fault, by
            its place among the parameters where names are not known. Or parameters are those of a FullyShardedDataParallel
            model (FSDP1), of which each rank holds a piece: call model.clip_grad_norm_(max_norm).
        TypeError: what is among parameters is no tensor and no pair of a name and a tensor, or max_norm is no number.

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
    sharded.refuse_pieces(_tensors(entries))
    norm_type = float(norm_type)
    max_norm = float(max_norm)
    error_if_nonfinite = bool(error_if_nonfinite)

    native = _native.library()
    if native is not None and norm_type in NORM_TYPES:
        # The whole call in one, which walks over the parameters in C++; None if a gradient is not for the kernels.
        result = native.clip_grad_norm_(entries, max_norm, norm_type, error_if_nonfinite)
        if result is not None:
            total_norm: Tensor
            total_norm, is_refused = result
            if is_refused:
                raise RuntimeError(_nonfinite_message(norm_type) + _first_nonfinite(entries))
            return total_norm

    tensors = _tensors(entries)
    gradients = Gradients(_grads(tensors))
    with torch.no_grad():
        if gradients.supports(norm_type):
            total_norm = gradients.total_norm(norm_type)
            if error_if_nonfinite and not total_norm.isfinite():
                raise RuntimeError(_nonfinite_message(norm_type) + _first_nonfinite(entries))
            gradients.scale_(max_norm, total_norm)
            return gradients.as_torch_returns(total_norm)
    try:
        return reference.clip_grad_norm_(tensors, max_norm, norm_type, error_if_nonfinite, foreach)
    except RuntimeError as error:
        if str(error) != _nonfinite_message(norm_type):
            raise
        raise RuntimeError(str(error) + _first_nonfinite(entries)) from None


def get_total_norm(
    tensors: Tensor | Iterable[Tensor], norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    """The norm of all tensors as one vector, as torch.nn.utils.get_total_norm.

        total_norm = (sum of |x|^p over every element of every tensor)^(1/p)

    Args:
        tensors: a tensor or an iterable of tensors, which are gradients themselves and not parameters. Of a
            FullyShardedDataParallel model (FSDP1) they are this rank's pieces, which nothing marks, and so is the norm:
            model.clip_grad_norm_(max_norm) returns that of all.
        norm_type: p; 1, 2 and inf have kernels.
        error_if_nonfinite: raise where the total norm is nan or inf.
        foreach: which of its implementations torch is to use where the kernels do not serve.

    Returns:
        The total norm: 0-d, of the promoted dtype of the tensors, on the device of the first one; 0 of no tensors. A
        replicated DTensor where all are DTensors on one mesh. Of float16 it is inf past 65504, as torch's:
        grad_report(...).total_norm is float64.

    Raises:
        RuntimeError: the total norm is not finite and error_if_nonfinite is set.
        TypeError: what is among tensors is none, as the None of a parameter without a gradient.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    norm_type = float(norm_type)
    if not all(isinstance(each, Tensor) for each in tensors):
        raise _wrong_kind("tensors must be tensors", tensors)
    gradients = Gradients(tensors)
    with torch.no_grad():
        if not gradients.supports(norm_type):
            return reference.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
        total_norm = gradients.total_norm(norm_type)
        if error_if_nonfinite and not total_norm.isfinite():
            raise RuntimeError(_nonfinite_message(norm_type))
        return gradients.as_torch_returns(total_norm)


def clip_grads_with_norm_(parameters: Parameters, max_norm: float, total_norm: Tensor, foreach: bool | None = None) -> None:
    """Scale gradients in place by what a total norm asks for, as torch.nn.utils.clip_grads_with_norm_.

        g = g min(1, max_norm / (total_norm + 1e-6))

    The coefficient is computed in float64; nothing is written where it is at least 1.

    Args:
        parameters: as those of clip_grad_norm_.
        max_norm: the largest total norm allowed, in units of the gradients.
        total_norm: 0-d; from get_total_norm, or of float16 from grad_report, reduced over whatever ranks hold other
            parameters.
        foreach: which of its implementations torch is to use where the kernels do not serve.

    Returns:
        Nothing.

    Raises:
        RuntimeError: elements of a gradient share memory.
        TypeError: total_norm is no tensor; as clip_grad_norm_.

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
        if gradients.supports(2.0):
            gradients.scale_(float(max_norm), sharded.full(total_norm))
        else:
            reference.clip_grads_with_norm_(tensors, max_norm, total_norm, foreach)


def clip_grad_value_(parameters: Parameters, clip_value: float, foreach: bool | None = None) -> None:
    """Clamp every element of every gradient in place, as torch.nn.utils.clip_grad_value_.

        g = min(max(g, -clip_value), clip_value)

    nan stays nan. What lies within the bounds is read and not written. Where no parameter has a gradient, which is an error in
    torch, nothing happens.

    Args:
        parameters: as those of clip_grad_norm_.
        clip_value: the largest magnitude allowed, in units of the gradients.
        foreach: which of its implementations torch is to use where the kernels do not serve.

    Returns:
        Nothing.

    Raises:
        RuntimeError: elements of a gradient share memory.
        TypeError: what is among parameters is no tensor and no pair of a name and a tensor, or clip_value is no number.

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
        if gradients.supports(2.0):
            gradients.clamp_(clip_value)
        elif gradients.tensors:
            reference.clip_grad_value_(tensors, clip_value, foreach)


class GradReport:
    """What grad_report found: norm, largest magnitude and non-finite elements of each parameter's gradient.

    Attributes:
        names: of the parameters, in their order; its place as a number where a parameter came without a name.
        norms: float64 [len(names)], of each gradient, nan where there is none; in units of the gradients.
        max_abs: float64 [len(names)], the largest magnitude, likewise.
        nonfinite: int64 [len(names)], how many elements are nan or inf.
        total_norm: float64, 0-d, the norm of all gradients as one vector.

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
        self._versions = _versions(parameters)

    def first_nonfinite(self) -> str | None:
        """The name of the first parameter whose gradient holds nan or inf; None where there is none."""
        places = self.nonfinite.nonzero()
        return self.names[int(places[0])] if len(places) else None

    def table(self) -> str:
        """The report for a person: a line for each parameter, the total below."""
        has_gradient = ~self.norms.isnan() | (self.nonfinite > 0)
        norms, max_abs, nonfinite = self.norms.tolist(), self.max_abs.tolist(), self.nonfinite.tolist()
        rows = [
            (name, f"{norm:.4g}", f"{largest:.4g}", str(count)) if given else (name, "-", "-", "no gradient")
            for name, norm, largest, count, given in zip(self.names, norms, max_abs, nonfinite, has_gradient.tolist(), strict=True)
        ]
        given = self.max_abs[has_gradient]
        largest = given.max().item() if len(given) else 0.0
        rows.append(("total", f"{self.total_norm.item():.4g}", f"{largest:.4g}", str(sum(nonfinite))))
        return "\n".join(text.columns([("parameter", "norm", "max |g|", "non-finite"), *rows]))

    def clip_(self, max_norm: float) -> Tensor:
        """Scale the gradients as clip_grad_norm_ would, without reading them again.

        Args:
            max_norm: the largest total norm allowed, in units of the gradients.

        Returns:
            The total norm before clipping, float64.

        Raises:
            RuntimeError: gradients have been replaced or written since the report, by clip_ itself too; nothing is scaled.
        """
        if _versions(self._parameters) != self._versions:
            raise RuntimeError("the gradients have changed since the report was made, which its norm is no longer that of; make another")
        clip_grads_with_norm_(self._parameters, max_norm, self.total_norm)
        return self.total_norm

    def __repr__(self) -> str:
        return self.table()


def grad_report(parameters: Parameters, norm_type: float = 2.0) -> GradReport:
    """Find out in one pass how large each parameter's gradient is and whether it is finite.

        norms[i] = (sum of |g|^p over the elements of gradient i)^(1/p)

    Everything stays on the gradients' device; nothing waits for it until a result is read. Of DTensors the report is
    about the whole tensor, the same on every rank, all of which must call it; float64 ones are waited for once, lest
    a square leave float64. A sparse gradient counts as the dense one would, for which a GPU is waited for.

    Args:
        parameters: as those of clip_grad_norm_, best a module or (name, parameter) pairs; those without a gradient are
            listed with norm nan.
        norm_type: p; 1, 2 and inf have kernels.

    Returns:
        A GradReport.

    Raises:
        RuntimeError: parameters are pieces of a FullyShardedDataParallel model (FSDP1); with use_orig_params=True they are
            whole in `with FullyShardedDataParallel.summon_full_params(model, with_grads=True)`.
        TypeError: what is among parameters is no tensor and no pair of a name and a tensor.

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
    names = [_named(entry)[0] or str(i) for i, entry in enumerate(entries)]
    tensors = _tensors(entries)
    sharded.refuse_pieces(tensors)
    grads = _grads(tensors)
    with torch.no_grad():
        norms = tensor_norms(grads, float(norm_type))
        if len(grads) != len(tensors):
            each, max_abs, nonfinite, total_norm = norms
            places = sharded.index_on(each.device, [i for i, tensor in enumerate(tensors) if tensor.grad is not None])
            each, max_abs, nonfinite = (_spread(values, places, len(tensors)) for values in (each, max_abs, nonfinite))
            norms = each, max_abs, nonfinite, total_norm
    return GradReport(names, tensors, norms)


def _versions(parameters: list[Tensor]) -> list[tuple[int, int] | None]:
    """What tells whether gradients are the same and have not been written."""
    grads = [parameter.grad for parameter in parameters]
    return [None if grad is None else (id(grad), 0 if grad.is_inference() else grad._version) for grad in grads]


def _entries(parameters: Parameters) -> _Entries:
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, nn.Module):
        return [*parameters.named_parameters()]
    # list() refuses what cannot be iterated in the words that torch's loop has.
    return list(parameters)


def _named(entry: Tensor | tuple[str, Tensor]) -> tuple[str | None, Tensor]:
    """The name, where it has one; a tuple of anything else counts as a tensor, which it is not."""
    named = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
    return cast("tuple[str, Tensor]", entry) if named else (None, cast(Tensor, entry))


def _tensors(entries: _Entries) -> list[Tensor]:
    return [_named(entry)[1] if isinstance(entry, tuple) else entry for entry in entries]


def _grads(tensors: list[Tensor]) -> list[Tensor]:
    try:
        return [grad for grad in [tensor.grad for tensor in tensors] if grad is not None]
    except AttributeError:
        if all(isinstance(tensor, Tensor) for tensor in tensors):
            raise
        raise _wrong_kind("parameters must be tensors or (name, tensor) pairs", tensors) from None


def _wrong_kind(expected: str, tensors: list[Tensor]) -> TypeError:
    kind = next(type(each).__name__ for each in tensors if not isinstance(each, Tensor))
    return TypeError(f"{expected}, not {kind}{'; of a dict take its items() or values()' if kind == 'str' else ''}")


def _spread(values: Tensor, places: Tensor, count: int) -> Tensor:
    """values[i] at places[i] of `count`, nan (0 of integers) elsewhere."""
    spread = values.new_full((count,), math.nan if values.is_floating_point() else 0)
    return spread.index_copy_(0, places, values)


def _nonfinite_message(norm_type: float) -> str:
    """torch's words."""
    return (
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be clipped. "
        "To disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
    )


def _first_nonfinite(entries: _Entries) -> str:
    """What an error adds; nothing where every gradient is finite and only their norm is not."""
    report = grad_report(entries)
    name = report.first_nonfinite()
    if name is None:
        return ""
    named = _named(entries[report.names.index(name)])[0] is not None
    return f". The first gradient that is not finite is that of {name if named else f'parameter {name}'}"
