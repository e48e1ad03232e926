"""FrozenBatchNormAct2d: batch norm whose statistics and parameters are constants, with residual and activation.

freeze_batch_norm and unfreeze_batch_norm change the batch norms of a model in place: the objects stay, with their
hooks, and so do all references to them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gradkernels.acts import check_act, resolve_act
from gradkernels.batch_norm_act import BatchNormAct2d, _batch_norm_act, _NormAct
from gradkernels.layers import check_model, why_not_replaced
from gradkernels.sync_batch_norm_act import SyncBatchNormAct

_VALUES = ("weight", "bias", "running_mean", "running_var")
_COUNT = "num_batches_tracked"
# The attribute with the class of a frozen module before, and whether each of its parameters required a gradient.
_FROM = "_frozen_from"
# A subclass may compute something else.
_FREEZABLE = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)


class FrozenBatchNormAct2d(_NormAct):
    """Batch norm with constant statistics, weight and bias, an optional residual and an activation.

        y = act((x - running_mean) / sqrt(running_var + eps) * weight + bias + residual)

    Call it as bn(x) or bn(x, residual), with x of shape (N, C, H, W). It has no parameters: weight, bias,
    running_mean and running_var are buffers, (C,) each, and only x and residual get gradients. train() changes
    nothing. Its state_dict and that of torchvision.ops.FrozenBatchNorm2d load into each other; it loads that of
    torch.nn.BatchNorm2d too, and ignores num_batches_tracked.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance, in units of x squared.
        device: the device of the buffers.
        dtype: the dtype of the buffers.
        act: as in BatchNormAct2d.
        act_param: as in BatchNormAct2d.

    Raises:
        ValueError: act is unknown; act_param is set and act has no parameter or is a module; in forward, x does
            not have 4 dimensions.
        TypeError: act is another module, or act_param is a tensor or a string.
        RuntimeError: in forward, x does not have C channels, or residual has another shape, dtype or device.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016 (batch norm fixed for detection).

    Example:
        >>> import torch, gradkernels as gk
        >>> bn = gk.FrozenBatchNormAct2d(3, act="relu")
        >>> bn(torch.randn(2, 3, 4, 4)).shape, len(list(bn.parameters()))
        (torch.Size([2, 3, 4, 4]), 0)
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        act: str | nn.Module = "leaky_relu",
        act_param: float | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        for name in _VALUES:
            fill = torch.ones if name in ("weight", "running_var") else torch.zeros
            self.register_buffer(name, fill(num_features, device=device, dtype=dtype))
        self.act, self.act_param = resolve_act(act, act_param)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(prefix + _COUNT, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _forward(self, x: Tensor, residual: Tensor | None, act: str, act_param: float) -> Tensor:
        # A SyncBatchNorm that was frozen takes other dimensions, too.
        kind, _ = self.__dict__.get(_FROM, (nn.BatchNorm2d, {}))
        kind._check_input_dim(self, x)
        values = (self.running_mean, self.running_var, self.weight, self.bias)
        return _batch_norm_act(x, *values, residual, None, False, 0.0, self.eps, act, act_param)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, {self._act_repr()}"


def freeze_batch_norm(model: nn.Module) -> list[str]:
    """Make constants of the statistics and the parameters of a model's batch norms of images, in place.

    torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm, BatchNormAct2d and SyncBatchNormAct become FrozenBatchNormAct2d,
    with their activation. The modules stay the same objects and keep their hooks. A batch norm without running
    statistics, or whose weight is pruned or parametrized, stays as it is, and so does one of another class, such as
    BatchNorm1d or a subclass, which may compute something else.

    Args:
        model: any module, also a batch norm itself.

    Returns:
        The names of the parameters that the model no longer has. An optimizer that was built before holds them, and
        no longer changes the model by them.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> import torch, gradkernels as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> gk.freeze_batch_norm(model)
        ['1.weight', '1.bias']
    """
    check_model(model)
    # Tied parameters become tied constants.
    constants: dict[Tensor, Tensor] = {}
    frozen = [(name, module) for name, module in model.named_modules() if _is_freezable(module)]
    for _, module in frozen:
        for parameter in module.parameters(recurse=False):
            constants[parameter] = parameter.detach().clone()
    lost = []
    for name, module in frozen:
        requires_grad = {}
        for each, fill in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
            parameter = module._parameters.pop(each)
            if parameter is not None:
                requires_grad[each] = parameter.requires_grad
                lost.append(f"{name}.{each}" if name else each)
            module.register_buffer(each, fill(module.running_mean) if parameter is None else constants[parameter])
        module._non_persistent_buffers_set.add(_COUNT)
        if not hasattr(module, "act"):
            module.act, module.act_param = "identity", check_act("identity", None)
        module.__dict__[_FROM] = (type(module), requires_grad)
        module.__class__ = FrozenBatchNormAct2d
    return lost


def unfreeze_batch_norm(model: nn.Module) -> list[str]:
    """Undo freeze_batch_norm, in place; a FrozenBatchNormAct2d that was made as such becomes BatchNormAct2d.

    A module gets back the class that it had, its settings, and its weight and bias as new parameters. Frozen batch
    norms of other libraries stay as they are.

    Args:
        model: any module, also a batch norm itself.

    Returns:
        The names of the parameters that the model now has. An optimizer that was built before does not hold them:
        add them (torch.optim.Optimizer.add_param_group), or build it again.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> import torch, gradkernels as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), gk.FrozenBatchNormAct2d(8, act="relu"))
        >>> gk.unfreeze_batch_norm(model)
        ['1.weight', '1.bias']
        >>> type(model[1])
        <class 'gradkernels.batch_norm_act.BatchNormAct2d'>
    """
    check_model(model)
    found = []
    parameters: dict[Tensor, nn.Parameter] = {}
    for name, module in model.named_modules():
        if type(module) is not FrozenBatchNormAct2d:
            continue
        kind, requires_grad = module.__dict__.pop(_FROM, (BatchNormAct2d, {"weight": True, "bias": True}))
        if _COUNT not in module._buffers:
            made = BatchNormAct2d(module.weight.numel(), module.eps, device=module.weight.device)
            for setting in ("num_features", "momentum", "affine", "track_running_stats"):
                setattr(module, setting, getattr(made, setting))
            module.register_buffer(_COUNT, made.num_batches_tracked)
        for each in ("weight", "bias"):
            constant = getattr(module, each)
            del module._buffers[each]
            parameter = None
            if each in requires_grad:
                parameter = parameters.setdefault(constant, nn.Parameter(constant, requires_grad[each]))
                found.append(f"{name}.{each}" if name else each)
            module.register_parameter(each, parameter)
        module._non_persistent_buffers_set.discard(_COUNT)
        if kind in (nn.BatchNorm2d, nn.SyncBatchNorm):
            if module.act == "identity":
                del module.act, module.act_param
            else:
                kind = SyncBatchNormAct if kind is nn.SyncBatchNorm else BatchNormAct2d
        module.__class__ = kind
    return found


def _is_freezable(module: Any) -> bool:
    """Whether a module is a batch norm that can be frozen. Pruning and parametrization take weight out of its parameters."""
    if type(module) not in _FREEZABLE or not {"weight", "bias"} <= module._parameters.keys():
        return False
    has_statistics = isinstance(module.running_mean, Tensor) and isinstance(module.running_var, Tensor)
    return has_statistics and not why_not_replaced(module, FrozenBatchNormAct2d)
