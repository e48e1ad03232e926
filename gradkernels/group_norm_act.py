"""group_norm_act and its modules: act(group_norm(x) + residual) as one operator, and the same with instance norm.

Instance norm is group norm with one channel in each group. The modules are torch's GroupNorm and InstanceNorm with
another forward: the same fields, state_dict and errors.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from gradkernels import _native, reference
from gradkernels.batch_norm_act import _AffineNormAct, _batch_norm_act, promoted


@_native.unscriptable
def group_norm_act(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: str = "leaky_relu",
    act_param: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Group norm, an optional residual and an activation; arguments as torch.nn.functional.group_norm.

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    mean and var are those of a group of C / num_groups neighbouring channels of one sample. num_groups = C is
    instance norm.

    Args:
        input: x; (N, C) or (N, C, ...), floating point.
        num_groups: the number of groups; C is a multiple of it.
        weight: (C,); None is 1.
        bias: (C,); None is 0.
        eps: added to the variance, in units of x squared.
        act: the name of an activation: a key of gradkernels.acts.ACTS, such as "identity", "relu" or "swish".
        act_param: the parameter of act (negative_slope, alpha or beta). None is its default (0.01, 1 and 1).
        residual: added before the activation; has the shape, dtype and device of x. Under autocast another
            dtype is allowed, and x and residual are promoted as in their sum.

    Returns:
        y, with the shape and dtype of x.

    Raises:
        ValueError: act is unknown; act_param is set and act has no parameter; x has a single element in all.
        TypeError: act_param is a tensor or a string, or num_groups is not an int.
        RuntimeError: C is not a multiple of num_groups; weight or bias does not have C elements; residual has
            another shape, dtype or device than x.
        NotImplementedError: x has an integer or complex dtype.

    Source: Wu, He, "Group Normalization", 2018; Ulyanov, Vedaldi, Lempitsky, "Instance Normalization: The
    Missing Ingredient for Fast Stylization", 2016.

    Example:
        >>> import torch, gradkernels as gk
        >>> x = torch.tensor([[1.0, 3.0, -2.0, 2.0]])
        >>> gk.group_norm_act(x, 2, eps=0.0, act="relu")
        tensor([[0., 1., 0., 1.]])
    """
    return _group_norm_act(_autocast(input), num_groups, weight, bias, residual, eps, act, act_param)


def _autocast(x: Tensor) -> Tensor:
    """Under autocast on CUDA, torch computes group norm in float32, and returns float32; not so instance norm."""
    if isinstance(x, Tensor) and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled("cuda"):
        return x.float()
    return x


def _group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
    act_param: float | None,
) -> Tensor:
    x, residual = promoted(x, residual)
    native = _native.library(x, weight, bias, residual)
    # F.group_norm, and not the operator, raises torch's errors for other arguments.
    if native is not None and type(num_groups) is int and x.dim() > 1 and 0 < num_groups < x.numel() and x.shape[1] % num_groups == 0:
        act_param = reference.check_norm_act(x, residual, act, act_param)
        try:
            y: Tensor = native.group_norm_act(x, num_groups, weight, bias, residual, eps, act, act_param)
            return y
        except TypeError:
            # torch's function below raises its own error for a wrong type.
            pass
    elif _native.uses_custom_operator(x, weight, bias, residual) and not _native.is_exported():
        act_param = reference.check_norm_act(x, residual, act, act_param)
        y = torch.ops.gradkernels.group_norm_act.default(x, num_groups, weight, bias, residual, eps, act, act_param)[0]
        return y
    return reference.group_norm_act(x, num_groups, weight, bias, eps, act=act, act_param=act_param, residual=residual)


def _instance_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    act: str,
    act_param: float,
) -> Tensor:
    """act(instance_norm(x) + residual), as F.instance_norm."""
    if running_mean is not None and running_var is not None and not use_input_stats:
        # F.instance_norm accepts mixtures of dtypes that F.batch_norm refuses.
        dtypes = {each.dtype for each in (running_mean, running_var, weight, bias) if each is not None}
        if len(dtypes) == 1 and (x.dtype in dtypes or x.element_size() == 2):
            return _batch_norm_act(x, running_mean, running_var, weight, bias, residual, None, False, 0.0, eps, act, act_param)
    tensors = (x, running_mean, running_var, weight, bias, residual)
    native = _native.library(*tensors)
    pixels = math.prod(x.shape[2:])
    # F.instance_norm raises torch's errors for other inputs. Of a constant instance with eps = 0, torch's group norm
    # returns nan, and its instance norm the bias.
    is_group_norm = use_input_stats and x.is_floating_point() and x.numel() > 0 and pixels > 1 and eps > 0
    if is_group_norm and running_mean is None and running_var is None and (native is not None or _native.uses_custom_operator(*tensors)):
        return _group_norm_act(x, x.shape[1], weight, bias, residual, eps, act, act_param)
    if is_group_norm and running_mean is not None and running_var is not None and native is not None:
        x, residual = promoted(x, residual)
        act_param = reference.check_norm_act(x, residual, act, act_param)
        arguments = x, x.shape[1], weight, bias, residual, eps, act, act_param
        y: Tensor
        if native is _native.C:
            y, mean, invstd, _ = torch.ops.gradkernels.group_norm_act.default(*arguments)
        else:
            y, (mean, invstd) = native.group_norm_act_and_statistics(*arguments)
        if mean.numel() > 0:
            with torch.no_grad():
                # The rounding of invstd can make the variance of a constant instance negative.
                var = (invstd.square().reciprocal() - eps).clamp(min=0) * (pixels / (pixels - 1))
                # All are computed before one is written: there may not be enough memory.
                pairs = ((running_mean, mean), (running_var, var))
                moved = [each * (1 - momentum) + new.view(x.shape[:2]).mean(0) * momentum for each, new in pairs]
                for running, value in zip((running_mean, running_var), moved, strict=True):
                    running.copy_(value)
            return y
    return reference.instance_norm_act(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        use_input_stats,
        momentum,
        eps,
        act=act,
        act_param=act_param,
        residual=residual,
    )


class GroupNormAct(_AffineNormAct, nn.GroupNorm):
    """torch.nn.GroupNorm, an optional residual and an activation.

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Call it as gn(x) or gn(x, residual); x is (N, C) or (N, C, ...). Its state_dict and that of
    torch.nn.GroupNorm load into each other.

    Args:
        num_groups: the number of groups that the channels are divided into.
        num_channels: C, a multiple of num_groups.
        eps: added to the variance, in units of x squared.
        affine: learn weight and bias, (C,) each.
        device: the device of parameters.
        dtype: the dtype of parameters.
        bias: False leaves out the bias of an affine layer.
        act: the name of an activation (a key of gradkernels.acts.ACTS), or a module that computes one:
            torch's, or LeakyReLU, ELU or Swish of this package. act="identity" computes torch.nn.GroupNorm.
        act_param: the parameter of act (negative_slope, alpha or beta). None is its default (0.01, 1 and 1),
            or the parameter of the module that is passed as act.

    Raises:
        ValueError: num_channels is not a multiple of num_groups; act is unknown; act_param is set and act has
            no parameter or is a module.
        TypeError: act is another module, or act_param is a tensor or a string.
        RuntimeError: in forward, the errors of group_norm_act.

    Source: Wu, He, "Group Normalization", 2018.

    Example:
        >>> import torch, gradkernels as gk
        >>> gn = gk.GroupNormAct(4, 16, act="swish")
        >>> x = torch.randn(1, 16, 8, 8)
        >>> gn(x, residual=x).shape
        torch.Size([1, 16, 8, 8])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | nn.Module = "leaky_relu",
        act_param: float | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self._complete(bias, act, act_param)

    def _forward(self, x: Tensor, residual: Tensor | None, act: str, act_param: float) -> Tensor:
        return _group_norm_act(_autocast(x), self.num_groups, self.weight, self.bias, residual, self.eps, act, act_param)

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, bias={self.bias is not None}, "
            f"{self._act_repr()}"
        )


class _InstanceNormAct(_AffineNormAct, _InstanceNorm):
    """The base of InstanceNormAct1d, 2d and 3d. Their other base, torch's class, checks the dimensions of x."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | nn.Module = "leaky_relu",
        act_param: float | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._complete(bias, act, act_param)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        super().reset_parameters()

    def extra_repr(self) -> str:
        return f"{_InstanceNorm.extra_repr(self)}, {self._act_repr()}"

    def _forward(self, x: Tensor, residual: Tensor | None, act: str, act_param: float) -> Tensor:
        untyped: Any = self
        untyped._check_input_dim(x)
        has_batch = x.dim() != untyped._get_no_batch_dim()
        if x.shape[1 if has_batch else 0] != self.num_features:
            # Raises torch's error or warns.
            _InstanceNorm.forward(self, x)
        if not has_batch:
            x, residual = x.unsqueeze(0), residual.unsqueeze(0) if isinstance(residual, Tensor) else residual
        use_input_stats = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        tensors = (x, self.running_mean, self.running_var, self.weight, self.bias, residual)
        y = _instance_norm_act(*tensors, use_input_stats, momentum, self.eps, act, act_param)
        return y if has_batch else y.squeeze(0)


class InstanceNormAct1d(_InstanceNormAct, nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d, an optional residual and an activation; x is (N, C, L) or (C, L).

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Arguments, errors and source are those of InstanceNormAct2d.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.InstanceNormAct1d(3, act="elu")(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """


class InstanceNormAct2d(_InstanceNormAct, nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d, an optional residual and an activation; x is (N, C, H, W) or (C, H, W).

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Call it as norm(x) or norm(x, residual). Its state_dict and that of torch.nn.InstanceNorm2d load into each
    other.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance, in units of x squared.
        momentum: the weight of a batch in the running statistics; no unit.
        affine: learn weight and bias, (C,) each.
        track_running_stats: keep running statistics and use them in evaluation.
        device: the device of parameters and buffers.
        dtype: the dtype of parameters and buffers.
        bias: False leaves out the bias of an affine layer.
        act: the name of an activation (a key of gradkernels.acts.ACTS), or a module that computes one:
            torch's, or LeakyReLU, ELU or Swish of this package. act="identity" computes torch.nn.InstanceNorm2d.
        act_param: the parameter of act (negative_slope, alpha or beta). None is its default (0.01, 1 and 1),
            or the parameter of the module that is passed as act.

    Raises:
        ValueError: act is unknown; act_param is set and act has no parameter or is a module; in forward, the
            errors of torch.nn.InstanceNorm2d.
        TypeError: act is another module, or act_param is a tensor or a string.
        RuntimeError: in forward, residual has another shape, dtype or device than x.

    Source: Ulyanov, Vedaldi, Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization",
    2016.

    Example:
        >>> import torch, gradkernels as gk
        >>> norm = gk.InstanceNormAct2d(3, affine=True, act="leaky_relu", act_param=0.2)
        >>> norm(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """


class InstanceNormAct3d(_InstanceNormAct, nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d, an optional residual and an activation; x is (N, C, D, H, W) or (C, D, H, W).

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Arguments, errors and source are those of InstanceNormAct2d.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.InstanceNormAct3d(3, act="relu")(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """
