"""SyncBatchNormAct: batch normalisation over the batches of all processes of a group, an optional residual, an activation.

Each process sends what it knows of its share, count, mean and M2 of every channel in float64, in one all_gather, and merges
what it gets in the order of ranks: all of them have the same bits. Backward is one all_reduce of two sums a channel. Nothing
waits for the device but the first call, which compares the number of channels.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradkernels import _native, reference
from gradkernels.acts import check_act
from gradkernels.batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, _BatchNormAct

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FUSED = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The vectors of all ranks as rows, in the order of ranks."""
    # torch 2.13 gave it a new name and warns of the old one.
    gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    # Gloo takes the concatenation of all, and not the stack.
    gathered = x.new_empty(dist.get_world_size(group) * x.numel())
    gather_into(gathered, x, group)
    return gathered.view(-1, x.numel())


def _apply(function: Any, *arguments: Any) -> Tensor:
    """Function.apply, which torch leaves without types."""
    return cast(Tensor, function.apply(*arguments))


class _AllReduce(torch.autograd.Function):
    """The sum over all ranks. Every rank's loss depends on every rank's x, so the gradient is the sum of all gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(_AllReduce, grads[0], ctx.group), None


class _AllGather(torch.autograd.Function):
    """_all_gather, differentiable as often as wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(_AllReduce, grads[0], ctx.group)[dist.get_rank(ctx.group)], None


class _Normalise(torch.autograd.Function):
    """From the statistics of all processes to y; its gradient goes through the statistics too, and to x on every process."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        count: Tensor,
        eps: float,
        act: str,
        act_param: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        operands = (x, mean, invstd, weight, bias, residual)
        y, mask = torch.ops.gradkernels.batch_norm_act_elemt.default(*operands, act, act_param)
        # What is kept is what batch_norm_act keeps: of the residual, one bit an element where the activation has two slopes.
        keeps_mask = mask.numel() > 0
        keeps_residual = act != "identity" and not keeps_mask
        ctx.save_for_backward(x, mean, invstd, weight, bias, residual if keeps_residual else None, mask if keeps_mask else None, count)
        ctx.eps, ctx.act, ctx.act_param, ctx.group = eps, act, act_param, group
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        gradients = _differentiable_gradients(ctx, grads[0]) if differentiable else _gradients(ctx, grads[0])
        return *gradients, *[None] * 7


def _gradients(ctx: Any, grad_y: Tensor) -> list[Tensor | None]:
    x, mean, invstd, weight, bias, residual, mask, count = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    statistics = (x, mean, invstd, weight, bias)
    act, act_param = ctx.act, ctx.act_param
    # Of the identity, the gradient of the residual is grad_y as it stands.
    computes_residual = needs_residual and act != "identity"
    if not (needs_x or needs_weight or needs_bias or computes_residual):
        return [None, None, None, grad_y]
    sums, dz = torch.ops.gradkernels.batch_norm_act_backward_reduce.default(
        grad_y, *statistics, residual, mask, act, act_param, computes_residual
    )
    channels = x.shape[1]
    grad_weight = (sums[channels:] * invstd).to(weight.dtype) if needs_weight else None
    # A copy, since the sums are about to become those of all processes.
    grad_bias = sums[:channels].to(bias.dtype, copy=True) if needs_bias else None
    grad_x = None
    if needs_x:
        dist.all_reduce(sums, group=ctx.group)
        source = (
            (dz, *statistics, None, None, "identity", 0.0) if computes_residual else (grad_y, *statistics, residual, mask, act, act_param)
        )
        grad_x = torch.ops.gradkernels.batch_norm_act_backward_elemt.default(*source, sums, count)
    grad_residual = dz if computes_residual else grad_y
    return [grad_x, grad_weight, grad_bias, grad_residual if needs_residual else None]


def _differentiable_gradients(ctx: Any, grad_y: Tensor) -> list[Tensor | None]:
    """Under create_graph: the forward composed again of torch's operators and collectives, and differentiated."""
    x, mean, invstd, weight, bias, residual, mask, _ = ctx.saved_tensors
    # Differentiated by these aliases: the originals may be one tensor, or depend on each other, and each would be given the gradient of
    # both.
    x = x.view_as(x)
    weight, bias, residual = (None if each is None else each.view_as(each) for each in (weight, bias, residual))
    act, act_param = ctx.act, ctx.act_param
    if mask is not None:
        # act' takes two values and is constant around x: the factor on grad_y is the gradient that the mask makes of ones.
        with torch.no_grad():
            statistics = (x, mean, invstd, None, None)
            ones = torch.ones_like(grad_y)
            factor = torch.ops.gradkernels.batch_norm_act_backward_reduce.default(ones, *statistics, None, mask, act, act_param, True)[1]
        grad_y = grad_y * factor
        act, act_param = "identity", 0.0
    y = reference.sync_batch_norm_act(
        x,
        None,
        None,
        weight,
        bias,
        None,
        ctx.eps,
        act=act,
        act_param=act_param,
        residual=residual,
        num_batches_tracked=None,
        all_gather=lambda moments: _apply(_AllGather, moments, ctx.group),
    )
    gradients: list[Tensor | None] = [None] * 4
    wanted = {i: each for i, each in enumerate((x, weight, bias, residual)) if each is not None and ctx.needs_input_grad[i]}
    if wanted:
        found = torch.autograd.grad(y, list(wanted.values()), grad_y, create_graph=True)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
    # Where the residual was not kept, it meets nothing but the identity.
    if ctx.needs_input_grad[3] and residual is None:
        gradients[3] = grad_y
    return gradients


class SyncBatchNormAct(_BatchNormAct):
    """Batch normalisation over the batches of all processes, an optional residual and an activation: torch.nn.SyncBatchNorm, then `act`.

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    mean and var are those of each channel over the batches of all processes of the group, which may be of different sizes, or
    empty. In evaluation, without torch.distributed and in a group of one process it is BatchNormAct1d, 2d or 3d. Works on the
    CPU (Gloo) too, which torch.nn.SyncBatchNorm refuses, and can be differentiated twice. Called as bn(x) or
    bn(x, residual), by all processes of the group alike; x has the same C on all of them. The gradients of weight and bias are those of
    this process's share, as torch's: DistributedDataParallel averages them. The state_dict is that of
    torch.nn.BatchNorm2d, in both directions.

    Args:
        num_features: C, the number of channels; x is (N, C) or (N, C, ...).
        eps: added to the variance, in units of x squared.
        momentum: weight of a batch in the running statistics; None averages over all batches equally.
        affine: learn weight and bias, (C,) each.
        track_running_stats: keep running statistics and use them in evaluation.
        process_group: whose batches are one batch; None is all processes.
        device: where parameters and buffers are made.
        dtype: of parameters and buffers.
        bias: False leaves out the bias of an affine layer.
        act: as of BatchNormAct2d.
        act_param: as of BatchNormAct2d.

    Raises:
        ValueError: unknown act, or act_param for one that has none or beside a module; in forward, x of less than two dimensions or
            without channels, and on the CPU one value per channel in the batches of all processes together.
        TypeError: `act` is a module of another kind, or act_param a tensor or a string.
        RuntimeError: in forward, a residual of another shape, dtype or device than x; C that differs between processes,
            found by all of them in the first training step that is not compiled; what torch.distributed raises when a process is
            gone, or refuses something that the others did not.

    Source: Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
    Shift", 2015. Merging: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979.

    Example:
        >>> import torch, gradkernels as gk
        >>> bn = gk.SyncBatchNormAct(3, act="swish")
        >>> bn(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    process_group: dist.ProcessGroup | None
    _channels_agree = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | nn.Module = "leaky_relu",
        act_param: float | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias, act=act, act_param=act_param)
        self.process_group = process_group

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {x.dim()}D input)")
        if x.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        group = self._group() if self.training else None
        return super().forward(input, residual) if group is None else self._forward_with(group, input, residual)

    def _group(self) -> dist.ProcessGroup | None:
        """The processes to share statistics with, None where there are no others."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def _forward_with(self, group: dist.ProcessGroup, x: Tensor, residual: Tensor | None) -> Tensor:
        tracked = self.track_running_stats
        running_mean, running_var = (self.running_mean, self.running_var) if tracked else (None, None)
        num_batches_tracked = self.num_batches_tracked if tracked else None
        # What one process refuses alone leaves the others waiting, so what they may disagree on comes first.
        if not (self._channels_agree or torch.compiler.is_compiling()):
            self._compare_channels(group, x)
        act_param = reference.check_batch_norm_act(x, residual, True, self.eps, self.act, self._param(), is_share=True)
        self._check_channels(x)
        momentum = 0.0 if self.momentum is None and num_batches_tracked is None else self.momentum
        tensors = (x, running_mean, running_var, self.weight, self.bias, residual, num_batches_tracked)
        if _native.library(*tensors) is None and not _native.uses_custom_operator(*tensors):
            return reference.sync_batch_norm_act(
                x,
                running_mean,
                running_var,
                self.weight,
                self.bias,
                momentum,
                self.eps,
                act=self.act,
                act_param=act_param,
                residual=residual,
                num_batches_tracked=num_batches_tracked,
                all_gather=lambda moments: _apply(_AllGather, moments, group),
            )
        with torch.no_grad():
            moments = _all_gather(torch.ops.gradkernels.batch_norm_act_stats.default(x), group)
            mean, invstd, count = torch.ops.gradkernels.batch_norm_act_gather_stats.default(
                moments, running_mean, running_var, num_batches_tracked, momentum, self.eps
            )
        operands = (x, self.weight, self.bias, residual)
        return _apply(_Normalise, *operands, mean, invstd, count, self.eps, self.act, act_param, group)

    def _check_channels(self, x: Tensor) -> None:
        for name in ("running_mean", "running_var", "weight", "bias"):
            values = getattr(self, name)
            if values is None:
                continue
            if values.numel() != x.shape[1]:
                raise RuntimeError(f"{name} should contain {x.shape[1]} elements not {values.numel()}")
            if values.device != x.device:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {x.device} and {values.device}!"
                )

    def _compare_channels(self, group: dist.ProcessGroup, x: Tensor) -> None:
        """An error on every process where channels differ; else the collectives to come would hang, or mix them up."""
        has_channels = any(each is not None for each in (self.running_mean, self.running_var, self.weight, self.bias))
        own = [x.shape[1], self.num_features if has_channels else x.shape[1]]
        of_ranks = _all_gather(torch.tensor(own, device=x.device), group).tolist()
        if any(of_rank != [of_ranks[0][0]] * 2 for of_rank in of_ranks):
            first_with = {tuple(of_rank): rank for rank, of_rank in reversed(list(enumerate(of_ranks)))}
            found = ", ".join(
                f"{x_has} in x and {module_has} in the module on rank {rank}"
                for (x_has, module_has), rank in sorted(first_with.items(), key=lambda item: item[1])
            )
            raise RuntimeError(f"SyncBatchNormAct: the number of channels must be the same on every process, found {found}")
        self._channels_agree = True

    def __getstate__(self) -> dict[str, Any]:
        # A copy may meet other processes, so it compares again.
        state = self.__dict__.copy()
        state.pop("_channels_agree", None)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNormAct:
        # A process group cannot be copied, and a copy of the module belongs to the same.
        memo[id(self.process_group)] = self.process_group
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        cast(Any, result).__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return result


def convert_sync_batch_norm(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Makes every batch normalisation in a model a SyncBatchNormAct, in place; as torch.nn.SyncBatchNorm.convert_sync_batchnorm.

    BatchNormAct1d, 2d and 3d keep their activation; torch.nn.BatchNorm1d, 2d, 3d and SyncBatchNorm get "identity". The
    modules stay the same objects and change their class only, so parameters, buffers, hooks and their handles, mode and
    whatever else refers to them hold on.

    Args:
        model: any module; a batch normalisation itself too.
        process_group: whose batches are one batch; None is all processes. A torch.nn.SyncBatchNorm or a SyncBatchNormAct keeps the group
            it has unless one is given.

    Returns:
        model.

    Warns:
        UserWarning: names batch normalisations of other classes, which are left as they are: a subclass may compute
            something else.

    Example:
        >>> import torch, gradkernels as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), gk.BatchNormAct2d(8, act="elu"))
        >>> gk.convert_sync_batch_norm(model)[1]
        SyncBatchNormAct(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, act='elu', act_param=1.0)
    """
    left = []
    for name, module in model.named_modules():
        if type(module) in _PLAIN:
            module.act, module.act_param = "identity", check_act("identity", None)
        elif type(module) not in _FUSED and not isinstance(module, SyncBatchNormAct):
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                left.append(f"{name or 'the model itself'} ({type(module).__name__})")
            continue
        group = getattr(module, "process_group", None) if process_group is None else process_group
        if not isinstance(module, SyncBatchNormAct):
            module.__class__ = SyncBatchNormAct
        module.process_group = group
        module._channels_agree = False
    if left:
        warnings.warn(f"convert_sync_batch_norm left subclasses of batch normalisation as they are: {', '.join(left)}", stacklevel=2)
    return model
