"""Gradients that are DTensors: this rank's shards, and norms reduced over all ranks; an error for FSDP1.

No gradient is gathered. The norms of the shards are summed in float64, with one all-reduce for each mesh and
each of its dimensions along which a gradient is sharded. Along the other dimensions every rank has the same
values.
"""

import math
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def _is_dtensor(x: object) -> bool:
    # Importing the module takes a second, and before that there are no DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def refuse_fsdp1_pieces(parameters: Iterable[Tensor]) -> None:
    """Raises if the parameters are pieces that FullyShardedDataParallel (FSDP1) keeps on this rank.

    FSDP1 marks the parameters that it flattens. Pieces are one-dimensional. Whole parameters have their own
    shapes, except for a flat parameter that is not sharded, which looks like a piece.
    """
    if torch.compiler.is_compiling() or "torch.distributed.fsdp" not in sys.modules:
        return
    flattened = [parameter for parameter in parameters if getattr(parameter, "_fsdp_flattened", False)]
    if not flattened or any(parameter.dim() > 1 for parameter in flattened):
        return
    from torch import distributed

    if distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            "the parameters belong to a FullyShardedDataParallel model. This rank holds only a piece of each, so their norm would be "
            "wrong: call model.clip_grad_norm_(max_norm) before the step, on every rank. For a report, set use_orig_params=True and write "
            "`with FullyShardedDataParallel.summon_full_params(model, with_grads=True): grad_report(model)`. "
            "Models sharded by torch.distributed.fsdp.fully_shard have no such limit"
        )


def supports(grads: list[Tensor]) -> bool:
    """Whether some gradients are DTensors, which are all sharded or replicated, and no gradient is complex.

    torch must first compute the sum that a partial DTensor stands for. The functions here do not support
    complex numbers.
    """
    module = sys.modules.get("torch.distributed.tensor")
    dtensors = [] if module is None else [grad for grad in grads if isinstance(grad, module.DTensor)]
    if not dtensors or any(grad.is_complex() for grad in grads):
        return False
    return all(placement.is_shard() or placement.is_replicate() for grad in dtensors for placement in _placements(grad))


def local_tensors(grads: list[Tensor]) -> list[Tensor]:
    """This rank's shards of DTensors; plain tensors unchanged."""
    return [_local_tensor(grad) if _is_dtensor(grad) else grad for grad in grads]


def full(total_norm: Tensor) -> Tensor:
    """A total norm as a plain tensor."""
    whole: Tensor = _dtensor(total_norm).full_tensor() if _is_dtensor(total_norm) else total_norm
    return whole


def as_torch_returns(total_norm: Tensor, grads: list[Tensor]) -> Tensor:
    """total_norm; as a replicated DTensor if all gradients are DTensors on one mesh."""
    if not all(map(_is_dtensor, grads)) or len({_dtensor(grad).device_mesh for grad in grads}) != 1:
        return total_norm
    from torch.distributed.tensor import DTensor, Replicate

    mesh = _dtensor(grads[0]).device_mesh
    return DTensor.from_local(total_norm, mesh, [Replicate()] * mesh.ndim, run_check=False)


def increment_versions(grads: list[Tensor]) -> None:
    """A DTensor has a version of its own, which writing its local tensor does not increment."""
    torch.autograd.graph.increment_version([grad for grad in grads if _is_dtensor(grad) and not grad.is_inference()])


def index_on(device: torch.device, indices: list[int]) -> Tensor:
    """Indices as a tensor on a device. Pinned for a GPU, because another copy waits for its kernels."""
    pinned = device.type == "cuda"
    return torch.tensor(indices, dtype=torch.int64, device="cpu", pin_memory=pinned).to(device, non_blocking=pinned)


class Group(NamedTuple):
    """The gradients on one mesh.

    Attributes:
        mesh: the mesh; None for plain tensors.
        dims: the dimensions of the mesh to sum over.
        members: the indices of the gradients.
        counted: the indices of the gradients that this rank adds to the sum. Along a dimension on which a
            gradient is replicated, only the first rank adds it.
    """

    mesh: Any
    dims: list[int]
    members: list[int]
    counted: list[int]


def groups_of(grads: list[Tensor]) -> list[Group]:
    """The gradients by mesh, in their order. Plain tensors must be the same on every rank."""
    members: dict[Any, list[int]] = {}
    for i, grad in enumerate(grads):
        members.setdefault(_dtensor(grad).device_mesh if _is_dtensor(grad) else None, []).append(i)
    return [_group(grads, mesh, indices) for mesh, indices in members.items()]


def _group(grads: list[Tensor], mesh: Any, members: list[int]) -> Group:
    if mesh is None:
        return Group(None, [], members, members)
    dims = [dim for dim in range(mesh.ndim) if any(_placements(grads[i])[dim].is_shard() for i in members)]
    coordinate = mesh.get_coordinate() if dims else None
    counted = members
    if coordinate is not None:
        counted = [i for i in members if all(_placements(grads[i])[dim].is_shard() or coordinate[dim] == 0 for dim in dims)]
    return Group(mesh, dims, members, counted)


def reduce_total_norm(local: list[Tensor], groups: list[Group], norm_type: float, norms: list[Tensor]) -> Tensor:
    """The norm of all gradients as one vector: float64, the same on every rank.

    norms: for each group, the norm of the parts that this rank counts.
    """
    norms = [norm.to(local[0].device) for norm in norms]
    exponent = _common_exponent(local, groups, norms)
    parts = []
    for group, norm in zip(groups, norms, strict=True):
        value = _ldexp(norm, -exponent)
        parts.append(_reduced(value if norm_type != 2 else value.square(), norm_type, group))
    if norm_type == math.inf:
        return _ldexp(torch.stack(parts).amax(), exponent)
    total = torch.stack(parts).sum()
    return _ldexp(total if norm_type == 1 else total.sqrt(), exponent)


def reduce_norms(
    local: list[Tensor], groups: list[Group], norm_type: float, local_norms: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gradients.Norms of the whole gradients from those of this rank's parts."""
    norms, max_abs, nonfinite, _ = local_norms
    exponent = _common_exponent(local, groups, [*norms])
    values = _ldexp(norms, -exponent)
    values = values if norm_type != 2 else values.square()
    for group in groups:
        if group.mesh is None:
            continue
        members, counted = index_on(norms.device, group.members), index_on(norms.device, group.counted)
        is_counted = torch.zeros(len(local), dtype=torch.bool, device=norms.device).index_fill_(0, counted, True)
        values[members] = _reduced(torch.where(is_counted, values, 0)[members], norm_type, group)
        max_abs[members] = _reduced(max_abs[members], math.inf, group)
        nonfinite[members] = _reduced(torch.where(is_counted, nonfinite, 0)[members], 1.0, group)
    total = values.amax() if norm_type == math.inf else values.sum()
    if norm_type == 2:
        values, total = values.sqrt(), total.sqrt()
    return _ldexp(values, exponent), max_abs, nonfinite, _ldexp(total, exponent)


def _dtensor(x: Tensor) -> Any:
    return x


def _placements(grad: Tensor) -> Any:
    return _dtensor(grad).placements


def _local_tensor(grad: Tensor) -> Tensor:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    with torch.no_grad():
        local: Tensor = _dtensor(grad).to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def _reduced(values: Tensor, norm_type: float, group: Group) -> Tensor:
    """The sum over the ranks of a mesh; for norm_type inf the maximum, which is nan if any value is nan."""
    if not group.dims or group.mesh.get_coordinate() is None:
        return values
    from torch import distributed

    # The communication libraries do not specify the maximum of nan and a number, so is-nan is reduced
    # separately.
    reduced = (
        torch.stack([values.nan_to_num(math.inf, math.inf), values.isnan().to(values.dtype)]) if norm_type == math.inf else values.clone()
    )
    for dim in group.dims:
        operation = distributed.ReduceOp.MAX if norm_type == math.inf else distributed.ReduceOp.SUM
        distributed.all_reduce(reduced, operation, group=group.mesh.get_group(dim))
    return torch.where(reduced[1] > 0, math.nan, reduced[0]) if norm_type == math.inf else reduced


def _common_exponent(local: list[Tensor], groups: list[Group], norms: list[Tensor]) -> int:
    """Ranks divide norms by 2**exponent before squaring; 0 unless a square may overflow or underflow."""
    if not any(grad.dtype == torch.float64 for grad in local):
        return 0
    largest = torch.stack(norms).amax()
    for group in groups:
        largest = _reduced(largest, math.inf, group)
    value = largest.item()
    return math.frexp(value)[1] if math.isfinite(value) else 0


def _ldexp(values: Tensor, exponent: int) -> Tensor:
    # Two factors: 2.0**exponent alone may overflow although the product does not.
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half) if exponent else values
