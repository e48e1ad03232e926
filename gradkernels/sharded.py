"""Gradients that are DTensors: what this rank holds, and norms reduced over all ranks. The plain pieces of FSDP1 are refused.

No gradient is gathered. The norms of what ranks hold are summed in float64, in one all-reduce for each mesh and each of its dimensions
along which a gradient is sharded; along the other dimensions every rank holds the same.
"""

import math
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def _is_dtensor(x: object) -> bool:
    # There is none before somebody has imported the module, which takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def refuse_pieces(parameters: Iterable[Tensor]) -> None:
    """Raises for parameters of torch's FullyShardedDataParallel (FSDP1) of which each rank holds a piece, as plain tensors.

    FSDP1 marks what it flattens. Pieces are one-dimensional; parameters that it keeps whole, or has put together for now, have their
    shapes, but for a flat parameter that is not sharded at all, which cannot be told from a piece.
    """
    # There is none before somebody has imported the module.
    if torch.compiler.is_compiling() or "torch.distributed.fsdp" not in sys.modules:
        return
    flattened = [each for each in parameters if getattr(each, "_fsdp_flattened", False)]
    if not flattened or any(each.dim() > 1 for each in flattened):
        return
    from torch import distributed

    if distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            "these are parameters of a FullyShardedDataParallel model, of which each rank holds a piece, and their norm would be that of "
            "this rank's alone: call model.clip_grad_norm_(max_norm) before the step, on every rank. Models sharded by "
            "torch.distributed.fsdp.fully_shard are clipped here. For a report, with use_orig_params=True: "
            "with FullyShardedDataParallel.summon_full_params(model, with_grads=True): grad_report(model)"
        )


def supports(grads: list[Tensor]) -> bool:
    """Whether there are DTensors among these and each is sharded or replicated; a partial one is a sum that torch has to make first.

    Of complex gradients torch's norm is real, and nothing here knows them.
    """
    if any(grad.is_complex() for grad in grads):
        return False
    return any(map(_is_dtensor, grads)) and all(
        placement.is_shard() or placement.is_replicate() for grad in grads if _is_dtensor(grad) for placement in _placements(grad)
    )


def local_tensors(grads: list[Tensor]) -> list[Tensor]:
    """This rank's shards; plain tensors as they are."""
    return [_local_tensor(grad) if _is_dtensor(grad) else grad for grad in grads]


def full(total_norm: Tensor) -> Tensor:
    """A total norm as a plain tensor."""
    whole: Tensor = _dtensor(total_norm).full_tensor() if _is_dtensor(total_norm) else total_norm
    return whole


def as_torch_returns(total_norm: Tensor, grads: list[Tensor]) -> Tensor:
    """A replicated DTensor where all gradients are DTensors on one mesh."""
    if not all(map(_is_dtensor, grads)) or len({_dtensor(grad).device_mesh for grad in grads}) != 1:
        return total_norm
    from torch.distributed.tensor import DTensor, Replicate

    mesh = _dtensor(grads[0]).device_mesh
    return DTensor.from_local(total_norm, mesh, [Replicate()] * mesh.ndim, run_check=False)


def count_versions(grads: list[Tensor]) -> None:
    """A DTensor counts its own versions beside those of its local tensor, which was written."""
    torch.autograd.graph.increment_version([grad for grad in grads if _is_dtensor(grad) and not grad.is_inference()])


def index_on(device: torch.device, places: list[int]) -> Tensor:
    """Places as a tensor there. For a GPU they are pinned first: a copy out of other memory waits for all that was launched before."""
    pinned = device.type == "cuda"
    return torch.tensor(places, dtype=torch.int64, device="cpu", pin_memory=pinned).to(device, non_blocking=pinned)


class Group(NamedTuple):
    """The gradients on one mesh.

    mesh: None for plain tensors. dims: the mesh's dimensions to sum over. members: places of the gradients. counted: places of those that
    this rank counts in the sum. A gradient that is replicated along a dimension counts on the first of its ranks alone.
    """

    mesh: Any
    dims: list[int]
    members: list[int]
    counted: list[int]


def groups_of(grads: list[Tensor]) -> list[Group]:
    """The gradients by mesh, in their order. Plain tensors are taken to be the same on every rank."""
    members: dict[Any, list[int]] = {}
    for i, grad in enumerate(grads):
        members.setdefault(_dtensor(grad).device_mesh if _is_dtensor(grad) else None, []).append(i)
    return [_group(grads, mesh, places) for mesh, places in members.items()]


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
    """The norm of all gradients as one vector, float64, the same on every rank, from the norms of what this rank counts of each group."""
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
    """Norm, largest magnitude and number of non-finite elements of each whole gradient, and the norm of all, from those of the shards."""
    norms, max_abs, nonfinite, _ = local_norms
    exponent = _common_exponent(local, groups, [*norms])
    values = _ldexp(norms, -exponent)
    values = values if norm_type != 2 else values.square()
    for group in groups:
        if group.mesh is None:
            continue
        places = index_on(norms.device, group.members)
        mine = torch.zeros(len(local), dtype=torch.bool, device=norms.device).index_fill_(0, index_on(norms.device, group.counted), True)
        values[places] = _reduced(torch.where(mine, values, 0)[places], norm_type, group)
        max_abs[places] = _reduced(max_abs[places], math.inf, group)
        nonfinite[places] = _reduced(torch.where(mine, nonfinite, 0)[places], 1.0, group)
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
    """The sum over the ranks of a mesh; for inf the maximum, which is nan if any is nan, as in torch."""
    if not group.dims or group.mesh.get_coordinate() is None:
        return values
    from torch import distributed

    # The libraries that reduce do not say whether a maximum of nan and a number is nan.
    sent = (
        torch.stack([values.nan_to_num(math.inf, math.inf), values.isnan().to(values.dtype)]) if norm_type == math.inf else values.clone()
    )
    for dim in group.dims:
        operation = distributed.ReduceOp.MAX if norm_type == math.inf else distributed.ReduceOp.SUM
        distributed.all_reduce(sent, operation, group=group.mesh.get_group(dim))
    return torch.where(sent[1] > 0, math.nan, sent[0]) if norm_type == math.inf else sent


def _common_exponent(local: list[Tensor], groups: list[Group], norms: list[Tensor]) -> int:
    """The power of two by which every rank divides its norms before they are squared: 0 unless the squares may leave float64."""
    if not any(each.dtype == torch.float64 for each in local):
        return 0
    largest = torch.stack(norms).amax()
    for group in groups:
        largest = _reduced(largest, math.inf, group)
    value = largest.item()
    return math.frexp(value)[1] if math.isfinite(value) else 0


def _ldexp(values: Tensor, exponent: int) -> Tensor:
    # In two halves: a power of two may itself leave float64 where the product does not.
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half) if exponent else values
