"""A list of gradients: norms, total norm, scaling and clamping, for plain tensors, DTensors and sparse tensors.

clip_grad.py and optim.py collect the gradients of a call once and call the methods of Gradients. The kernels
compute on this rank's part of each gradient; then sharded.py reduces over the ranks. A sparse gradient counts
as its coalesced values, and its stored values are scaled, which is the same.
"""

import functools
import math
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from gradkernels import _native, reference, sharded

# Per gradient: norm, largest magnitude, number of non-finite elements. Then the norm of all as one vector.
Norms: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]

# The kernels support these.
NORM_TYPES = (2.0, math.inf, 1.0)


# torch clips sparse gradients from this version on. Before, its functions raise an error, and so do ours.
_TORCH_CLIPS_SPARSE = torch.torch_version.TorchVersion(torch.__version__) >= "2.14"


class Gradients:
    """A list of gradients.

    Attributes:
        tensors: the gradients.
        local: this rank's parts of the gradients, dense: the shards of DTensors, the values of sparse tensors,
            and the plain tensors.
        is_sharded: whether some gradients are DTensors, which are all sharded or replicated.
        has_sparse: whether some gradients are sparse and torch clips them; they are scaled, and not clamped.
        kernels: gradkernels._C if it supports `local`, else None; None for an empty list.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.is_sharded = not torch.compiler.is_compiling() and sharded.supports(tensors)
        self.local = sharded.local_tensors(tensors) if self.is_sharded else tensors
        self.has_sparse = _TORCH_CLIPS_SPARSE and not self.is_sharded and any(map(_is_sparse, tensors))
        self._scaled = self.local
        if self.has_sparse:
            self.local = [_values(tensor) for tensor in tensors]
            self._scaled = [tensor._values() if _is_sparse(tensor) else tensor for tensor in tensors]
        self._groups = sharded.groups_of(tensors) if self.is_sharded else []
        self.kernels = kernels_for(self.local)

    def supports(self, norm_type: float = 2.0) -> bool:
        """Whether the methods here can replace torch's functions for these gradients."""
        return norm_type in NORM_TYPES and (self.is_sharded or self.kernels is not None)

    def norms(self, norm_type: float) -> Norms:
        """The Norms of the whole gradients, the same on every rank."""
        if self.is_sharded and norm_type in NORM_TYPES:
            return sharded.reduce_norms(self.local, self._groups, norm_type, _norms(self.local, norm_type, self.kernels))
        return _norms(self.tensors if self.is_sharded else self.local, norm_type, self.kernels)

    def total_norm(self, norm_type: float) -> Tensor:
        """The norm of all gradients as one vector: 0-d, float64, the same on every rank."""
        if not (self.is_sharded and norm_type in NORM_TYPES):
            return self.norms(norm_type)[3]
        counted = [[self.local[i] for i in group.counted] for group in self._groups]
        norms = [_norms(tensors, norm_type, kernels_for(tensors))[3] for tensors in counted]
        return sharded.reduce_total_norm(self.local, self._groups, norm_type, norms)

    def as_torch_returns(self, total_norm: Tensor) -> Tensor:
        """total_norm with the device, dtype and class (Tensor or DTensor) of torch's total norm."""
        dtype = functools.reduce(torch.promote_types, {tensor.dtype.to_real() for tensor in self.tensors})
        total_norm = total_norm.to(self.tensors[0].device, dtype)
        return sharded.as_torch_returns(total_norm, self.tensors) if self.is_sharded else total_norm

    def scale_(self, max_norm: float | Tensor, total_norm: Tensor) -> None:
        """Multiplies by min(1, max_norm / (total_norm + 1e-6)), a float64; does not write if this is 1."""
        if isinstance(max_norm, Tensor):
            # The operator takes a number. A norm with the same coefficient for the bound 1 needs no wait.
            max_norm, total_norm = 1.0, (total_norm + 1e-6) / max_norm - 1e-6
        if self.kernels is not None:
            # The dispatcher looks at the devices of all arguments, so the norm must be on the device of the
            # gradients. If it is, the host does not wait for its value.
            self.kernels.clip_grads_with_norm_(self._scaled, max_norm, total_norm.to(self.local[0].device))
        else:
            _scale_with_torch_(self._scaled, max_norm, total_norm)
        self._increment_versions()

    def clamp_(self, clip_value: float) -> None:
        """Clamps to [-clip_value, clip_value]. If a dtype cannot hold the bound, raises before it writes."""
        if self.kernels is not None and can_be_any_dtype(clip_value):
            self.kernels.clip_grad_value_(self.local, clip_value)
        else:
            reference.refuse_overlap(self.local)
            for dtype in {tensor.dtype for tensor in self.local}:
                torch.zeros((), dtype=dtype, device="cpu").clamp_(-clip_value, clip_value)
            for tensor in self.local:
                tensor.clamp_(-clip_value, clip_value)
        self._increment_versions()

    def _increment_versions(self) -> None:
        if self.is_sharded:
            sharded.increment_versions(self.tensors)
        elif self.has_sparse:
            torch.autograd.graph.increment_version([tensor for tensor in self.tensors if _is_sparse(tensor)])


def can_be_any_dtype(clip_value: float) -> bool:
    """Whether every floating-point dtype holds this bound; torch's functions check larger ones."""
    return abs(clip_value) <= torch.finfo(torch.float16).max or math.isinf(clip_value)


def tensor_norms(tensors: list[Tensor], norm_type: float = 2.0) -> Norms:
    """Gradients(tensors).norms; a sparse tensor counts as a dense one."""
    return Gradients([_values(tensor) for tensor in tensors]).norms(norm_type)


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout == torch.sparse_coo


def _values(tensor: Tensor) -> Tensor:
    return tensor.coalesce().values() if _is_sparse(tensor) else tensor


def kernels_for(tensors: list[Tensor]) -> ModuleType | None:
    """gradkernels._C if it supports all of these tensors, else None; None for an empty list."""
    native = _native.library()
    if native is None or not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    return native if native.clip_grad_supports(tensors) else None


def _norms(tensors: list[Tensor], norm_type: float, kernels: ModuleType | None) -> Norms:
    if kernels is None or norm_type not in NORM_TYPES:
        return norms_by_torch(tensors, norm_type)
    norms: Norms = kernels.grad_norms(tensors, norm_type)
    return norms


def _scale_with_torch_(grads: list[Tensor], max_norm: float, total_norm: Tensor) -> None:
    """torch's clip_grads_with_norm_ for gradients instead of parameters; it does not wait for the device."""
    reference.refuse_overlap(grads)
    coefficient = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
    for grad in grads:
        grad.mul_(coefficient.to(grad.device))


def norms_by_torch(grads: list[Tensor], norm_type: float = 2.0) -> Norms:
    """The Norms of plain tensors, computed with torch's operators."""
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
