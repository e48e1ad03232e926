"""Gradients as one list: their norms, the total norm, scaling and clamping, for plain tensors and DTensors alike.

The functions of clip_grad.py and the optimizers of optim.py collect a Gradients once and call its methods. The kernels compute on what this
rank holds of each gradient; sums and maxima over the ranks follow (sharded.py).
"""

import functools
import math
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from gradkernels import _native, sharded

Norms: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]

# The norms that have kernels.
NORM_TYPES = (2.0, math.inf, 1.0)


class Gradients:
    """A list of gradients.

    Attributes:
        tensors: the gradients.
        local: what this rank holds of them: the shards of DTensors, plain tensors as they are.
        is_sharded: some are DTensors, and all are sharded or replicated. The kernels then compute on `local`.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.is_sharded = not torch.compiler.is_compiling() and sharded.supports(tensors)
        self.local = sharded.local_tensors(tensors) if self.is_sharded else tensors
        self._groups = sharded.groups_of(tensors) if self.is_sharded else []

    def have_kernels(self) -> bool:
        """Whether the kernels compute on what this rank holds; False for an empty list."""
        return _kernels_for(self.local) is not None

    def supports(self, norm_type: float) -> bool:
        """Whether total_norm and scale_ do what torch's functions do with these gradients."""
        return norm_type in NORM_TYPES and (self.is_sharded or self.have_kernels())

    def norms(self, norm_type: float) -> Norms:
        """The norm, the largest magnitude and the number of non-finite elements of each whole gradient, and the norm of all."""
        if self.is_sharded and norm_type in NORM_TYPES:
            return sharded.reduce_norms(self.local, self._groups, norm_type, _norms(self.local, norm_type))
        return _norms(self.tensors, norm_type)

    def total_norm(self, norm_type: float) -> Tensor:
        """The norm of all gradients as one vector: 0-d, float64, the same on every rank."""
        if not (self.is_sharded and norm_type in NORM_TYPES):
            return _norms(self.tensors, norm_type)[3]
        norms = [_norms([self.local[i] for i in group.counted], norm_type)[3] for group in self._groups]
        return sharded.reduce_total_norm(self.local, self._groups, norm_type, norms)

    def as_torch_returns(self, total_norm: Tensor) -> Tensor:
        """A total norm on the device of the first gradient and of the dtype to which all promote; a DTensor if torch returns one."""
        dtype = functools.reduce(torch.promote_types, {each.dtype for each in self.tensors})
        total_norm = total_norm.to(self.tensors[0].device, dtype)
        return sharded.as_torch_returns(total_norm, self.tensors) if self.is_sharded else total_norm

    def scale_(self, max_norm: float, total_norm: Tensor) -> None:
        """Multiplies by min(1, max_norm / (total_norm + 1e-6)), computed in float64. Nothing is written if that is 1."""
        native = _kernels_for(self.local)
        if native is not None:
            # The dispatcher goes by all devices together, so a norm on another device would select other kernels. A norm that is on the
            # gradients' device is passed as it is, and the host does not wait for it.
            native.clip_grads_with_norm_(self.local, max_norm, total_norm.to(self.local[0].device))
        else:
            _scale_with_torch_(self.local, max_norm, total_norm)
        self._count_versions()

    def clamp_(self, clip_value: float) -> None:
        """Clamps to [-clip_value, clip_value]; torch's error if a dtype cannot hold the bound, before anything is written."""
        native = _kernels_for(self.local)
        # torch refuses a bound that a dtype cannot hold.
        if native is not None and (abs(clip_value) <= torch.finfo(torch.float16).max or math.isinf(clip_value)):
            native.clip_grad_value_(self.local, clip_value)
        else:
            for dtype in {each.dtype for each in self.local}:
                torch.zeros((), dtype=dtype, device="cpu").clamp_(-clip_value, clip_value)
            for each in self.local:
                each.clamp_(-clip_value, clip_value)
        self._count_versions()

    def _count_versions(self) -> None:
        if self.is_sharded:
            sharded.count_versions(self.tensors)


def tensor_norms(tensors: list[Tensor], norm_type: float = 2.0) -> Norms:
    """Gradients(tensors).norms, of a sparse tensor those of its values, where values for the same place are summed."""
    return Gradients([tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]).norms(norm_type)


def _kernels_for(tensors: list[Tensor]) -> ModuleType | None:
    """gradkernels._C if it computes on all of these tensors, else None; None for an empty list."""
    native = _native.library()
    if native is None or not tensors or not all(isinstance(each, Tensor) for each in tensors):
        return None
    return native if native.clip_grad_applies(tensors) else None


def _norms(tensors: list[Tensor], norm_type: float) -> Norms:
    native = _kernels_for(tensors) if norm_type in NORM_TYPES else None
    norms: Norms = norms_by_torch(tensors, norm_type) if native is None else native.grad_norms(tensors, norm_type)
    return norms


def _scale_with_torch_(grads: list[Tensor], max_norm: float, total_norm: Tensor) -> None:
    """torch's clip_grads_with_norm_, which takes parameters, for gradients; the host waits for no device."""
    coefficient = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
    for grad in grads:
        grad.mul_(coefficient.to(grad.device))


def norms_by_torch(grads: list[Tensor], norm_type: float = 2.0) -> Norms:
    """The norm, the largest magnitude and the number of non-finite elements of each gradient, and the norm of all, by torch's operators."""
    if not grads:
        zero = torch.zeros(0, dtype=torch.float64, device="cpu")
        return zero, zero.clone(), zero.to(torch.int64), zero.sum()
    device = grads[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    norms, max_abs, nonfinite = [], [], []
    for grad in grads:
        magnitude = grad.abs().to(dtype)
        zero = magnitude.new_zeros(())
        norms.append((torch.linalg.vector_norm(magnitude, norm_type) if magnitude.numel() else zero).to(device))
        max_abs.append((magnitude.amax() if magnitude.numel() else zero).to(device))
        nonfinite.append((~magnitude.isfinite()).sum().to(device))
    return torch.stack(norms), torch.stack(max_abs), torch.stack(nonfinite), torch.linalg.vector_norm(torch.stack(norms), norm_type)
