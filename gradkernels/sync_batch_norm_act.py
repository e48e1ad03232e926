"""SyncBatchNormAct: batch_norm_act with the statistics of the batches of all processes of a group.

In one all_gather each process sends the count, mean and M2 (the sum of squared deviations) of each channel of
its share, in float64. Every process merges them in the order of ranks, so all get the same bits. Backward is
one all_reduce of two sums per channel. Only the first call waits for the device: it compares the number of
channels.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradkernels import _native, reference
from gradkernels.acts import ACTS, check_act
from gradkernels.batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, _BatchNormAct
from gradkernels.layers import check_model, why_not_replaced

_TORCH_CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_BATCH_NORM_ACTS = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The vectors of all ranks as rows, in the order of ranks."""
    # torch 2.13 deprecates the name all_gather_into_tensor.
    gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    # Gloo writes into a concatenated tensor, not into a stacked one.
    gathered = x.new_empty(dist.get_world_size(group) * x.numel())
    gather_into(gathered, x, group)
    return gathered.view(-1, x.numel())


def _apply(function: Any, *arguments: Any) -> Tensor:
    """Function.apply with a type, which torch does not declare."""
    return cast(Tensor, function.apply(*arguments))


class _AllReduce(torch.autograd.Function):
    """The sum over all ranks. Each rank's loss depends on x of all ranks, so backward sums gradients too."""

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
    """_all_gather that can be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(_AllReduce, grads[0], ctx.group)[dist.get_rank(ctx.group)], None


class _Normalise(torch.autograd.Function):
    """y from the statistics of all processes, through which its gradient reaches x of every process."""

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
        # As in batch_norm_act, an activation with two slopes keeps one bit per element instead of the
        # residual.
        keeps_mask = mask.numel() > 0
        keeps_residual = ACTS[act].saves != "nothing" and not keeps_mask
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
    # Otherwise the gradient of the residual is grad_y.
    computes_residual = needs_residual and ACTS[act].saves != "nothing"
    if not (needs_x or needs_weight or needs_bias or computes_residual):
        return [None, None, None, grad_y]
    sums, dz = torch.ops.gradkernels.batch_norm_act_backward_reduce.default(
        grad_y, *statistics, residual, mask, act, act_param, computes_residual
    )
    channels = x.shape[1]
    grad_weight = (sums[channels:] * invstd).to(weight.dtype) if needs_weight else None
    # A copy, because all_reduce overwrites the sums below.
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
    """For create_graph: repeats forward with differentiable operators, and differentiates it."""
    x, mean, invstd, weight, bias, residual, mask, _ = ctx.saved_tensors
    # Differentiate by aliases: if two inputs are the same tensor, or one depends on the other, each would get
    # the gradients of both.
    x = x.view_as(x)
    weight, bias, residual = (None if operand is None else operand.view_as(operand) for operand in (weight, bias, residual))
    act, act_param = ctx.act, ctx.act_param
    if mask is not None:
        # act' is piecewise constant, so it is a factor without a gradient: what backward returns for ones.
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
    operands = {i: operand for i, operand in enumerate((x, weight, bias, residual)) if operand is not None and ctx.needs_input_grad[i]}
    if operands:
        computed = torch.autograd.grad(y, list(operands.values()), grad_y, create_graph=True)
        for i, gradient in zip(operands, computed, strict=True):
            gradients[i] = gradient
    # A residual that was not kept is only added; the factor of a mask is in grad_y already.
    if ctx.needs_input_grad[3] and residual is None:
        gradients[3] = grad_y
    return gradients


# It is not a subclass of nn.SyncBatchNorm, which DistributedDataParallel refuses on the CPU.
class SyncBatchNormAct(_BatchNormAct):
    """torch.nn.SyncBatchNorm, an optional residual and an activation.

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    In training, mean and var are computed per channel over the batches of all processes of the group. The
    batches may have different sizes or be empty. In evaluation, without torch.distributed, and in a group of
    one process the module computes the same as BatchNormAct1d, 2d or 3d. Unlike torch.nn.SyncBatchNorm it
    works on the CPU (Gloo) too, and can be differentiated twice.

    Call it as bn(x) or bn(x, residual), on all processes of the group and with the same C. As in torch, the
    gradients of weight and bias are those of this process's batch, and DistributedDataParallel averages them.
    The state_dict and that of torch.nn.BatchNorm2d load into each other.

    Args:
        num_features: C, the number of channels; x is (N, C) or (N, C, ...).
        eps: added to the variance, in units of x squared.
        momentum: the weight of a batch in the running statistics; no unit. None gives all batches the same
            weight.
        affine: learn weight and bias, (C,) each.
        track_running_stats: keep running statistics and use them in evaluation.
        process_group: the processes that share statistics; None is all processes.
        device: the device of parameters and buffers.
        dtype: the dtype of parameters and buffers.
        bias: False leaves out the bias of an affine layer.
        act: as for BatchNormAct2d.
        act_param: as for BatchNormAct2d.

    Raises:
        ValueError: act is unknown; act_param is set and act has no parameter or is a module. In forward: x
            has fewer than two dimensions or no channels; on the CPU, all batches together have one value per
            channel.
        TypeError: act is another module, or act_param is a tensor or a string.
        RuntimeError: in forward, residual has another shape, dtype or device than x; C differs between
            processes (every process raises this, in the first training step that is not compiled); the errors
            of torch.distributed, for example after an error on another process alone.

    Source: Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift", 2015. Merging: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances", 1979.

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
        return super().forward(input, residual) if group is None else self._synchronised_forward(group, input, residual)

    def _group(self) -> dist.ProcessGroup | None:
        """The processes that share statistics; None if this process is alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def _synchronised_forward(self, group: dist.ProcessGroup, x: Tensor, residual: Tensor | None) -> Tensor:
        tracked = self.track_running_stats
        running_mean, running_var = (self.running_mean, self.running_var) if tracked else (None, None)
        num_batches_tracked = self.num_batches_tracked if tracked else None
        # An error on one process alone leaves the others waiting, so the check that fails on all is first.
        if not (self._channels_agree or torch.compiler.is_compiling()):
            self._compare_channels(group, x)
        act_param = reference.check_batch_norm_act(x, residual, True, self.eps, self.act, self._param(), is_share=True)
        self._check_channels(x)
        momentum = 0.0 if self.momentum is None and num_batches_tracked is None else self.momentum
        tensors = (x, running_mean, running_var, self.weight, self.bias, residual, num_batches_tracked)
        if _native.C is None or (_native.library(*tensors) is None and not _native.uses_custom_operator(*tensors)):
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
        """Raises on every process if channels differ; the next collectives would hang or mix channels up."""
        has_channels = any(values is not None for values in (self.running_mean, self.running_var, self.weight, self.bias))
        counts = [x.shape[1], self.num_features if has_channels else x.shape[1]]
        counts_of_ranks = _all_gather(torch.tensor(counts, device=x.device), group).tolist()
        if any(pair != [counts_of_ranks[0][0]] * 2 for pair in counts_of_ranks):
            first_rank_with = {tuple(pair): rank for rank, pair in reversed(list(enumerate(counts_of_ranks)))}
            differences = ", ".join(
                f"{of_x} in x and {of_module} in the module on rank {rank}"
                for (of_x, of_module), rank in sorted(first_rank_with.items(), key=lambda item: item[1])
            )
            raise RuntimeError(f"SyncBatchNormAct: the number of channels must be the same on every process, but is {differences}")
        self._channels_agree = True

    def __getstate__(self) -> dict[str, Any]:
        # A copy may run with other processes, so it must compare channels again.
        state = self.__dict__.copy()
        state.pop("_channels_agree", None)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNormAct:
        # A process group cannot be copied. The copied module uses the same group.
        memo[id(self.process_group)] = self.process_group
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        cast(Any, result).__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return result


def convert_sync_batch_norm(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Turn batch norms of a model into SyncBatchNormAct, as torch.nn.SyncBatchNorm.convert_sync_batchnorm.

    BatchNormAct1d, 2d and 3d keep their activation; torch.nn.BatchNorm1d, 2d, 3d and SyncBatchNorm get
    act="identity". Only the class of a module changes, in place: parameters, buffers, hooks and the mode stay
    the same, and so do all references to the module.

    Args:
        model: any module, also a batch norm itself.
        process_group: the processes that share statistics. None is all processes, but a
            torch.nn.SyncBatchNorm or a SyncBatchNormAct keeps its group.

    Returns:
        model.

    Raises:
        TypeError: model is not a module.

    Warns:
        UserWarning: the model has batch norms that are not converted: those of other classes, because a
            subclass may compute something else, and those with an attribute of their own that
            SyncBatchNormAct would replace, such as act.

    Example:
        >>> import torch, gradkernels as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), gk.BatchNormAct2d(8, act="elu"))
        >>> gk.convert_sync_batch_norm(model)[1]
        SyncBatchNormAct(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, act='elu', act_param=1.0)
    """
    check_model(model)
    unconverted = []
    for name, module in model.named_modules():
        why = ""
        if type(module) in (*_TORCH_CLASSES, *_BATCH_NORM_ACTS):
            why = why_not_replaced(module, SyncBatchNormAct)
        elif not isinstance(module, SyncBatchNormAct):
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            why = f"{type(module).__name__} may compute something else"
        if why:
            unconverted.append(f"{name or 'the model itself'} ({why})")
            continue
        if type(module) in _TORCH_CLASSES:
            module.act, module.act_param = "identity", check_act("identity", None)
        group = getattr(module, "process_group", None) if process_group is None else process_group
        if not isinstance(module, SyncBatchNormAct):
            module.__class__ = SyncBatchNormAct
        module.process_group = group
        module._channels_agree = False
    if unconverted:
        warnings.warn(f"convert_sync_batch_norm does not convert these batch norms: {', '.join(unconverted)}", stacklevel=2)
    return model
