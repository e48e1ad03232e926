"""batch_norm_act and its modules: act(batch_norm(x) + residual) as one operator.

The modules are torch's BatchNorm with another forward: the same fields, state_dict and signed weight. An
error leaves the running statistics and the count of batches unchanged. Under torch.compile the call is one
custom operator: it reads x fewer times than the kernels that the compiler generates from torch's operators.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradkernels import _native, reference
from gradkernels.acts import has_param, resolve_act


@_native.unscriptable
def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    act: str = "leaky_relu",
    act_param: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch norm, an optional residual and an activation; arguments as torch.nn.functional.batch_norm.

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    With training=True, mean and var are computed from the batch, per channel. Then the running statistics are
    updated, with the unbiased estimate of var: running = (1 - momentum) running + momentum batch. With
    training=False, mean and var are running_mean and running_var.

    Args:
        input: x; (N, C) or (N, C, ...), floating point.
        running_mean: (C,), written with training=True; may be None in training.
        running_var: (C,), written with training=True; may be None in training.
        weight: (C,); None is 1.
        bias: (C,); None is 0.
        training: normalise with the statistics of this batch.
        momentum: the weight of this batch in the running statistics; no unit.
        eps: added to the variance, in units of x squared.
        act: the name of an activation: a key of gradkernels.acts.ACTS, such as "identity", "relu" or "swish".
        act_param: the parameter of act (negative_slope, alpha or beta). None is its default (0.01, 1 and 1).
        residual: added before the activation; has the shape, dtype and device of x. Under autocast another
            dtype is allowed, and x and residual are promoted as in their sum.

    Returns:
        y, with the shape and dtype of x.

    Raises:
        ValueError: act is unknown; act_param is set and act has no parameter; training with one value per
            channel; torch rejects eps.
        TypeError: act_param is a tensor or a string, or momentum is None.
        RuntimeError: residual has another shape, dtype or device than x; a per-channel tensor does not have C
            elements; training=False without running statistics.
        NotImplementedError: x has an integer or complex dtype.

    Source: Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift", 2015.

    Example:
        >>> import torch, gradkernels as gk
        >>> x = torch.tensor([[1.0, -2.0], [3.0, 2.0]])
        >>> gk.batch_norm_act(x, torch.zeros(2), torch.ones(2), eps=0.0, act="relu")
        tensor([[1., 0.],
                [3., 2.]])
    """
    if momentum is None:
        # None means the average over all counted batches, and only the modules count them.
        raise TypeError("batch_norm_act(): argument 'momentum' (position 7) must be float, not NoneType")
    return _batch_norm_act(input, running_mean, running_var, weight, bias, residual, None, training, momentum, eps, act, act_param)


def _batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    act: str,
    act_param: float | None,
) -> Tensor:
    x, residual = promoted(x, residual)
    tensors = (x, running_mean, running_var, weight, bias, residual, num_batches_tracked)
    native = _native.library(*tensors)
    if native is not None or (_native.uses_custom_operator(*tensors) and (training or not _native.is_exported())):
        act_param = reference.check_batch_norm_act(x, residual, training, eps, act, act_param)
        # None averages over all counted batches. Without a count nn.BatchNorm does not update its statistics.
        if momentum is None and num_batches_tracked is None:
            momentum = 0.0
        y: Tensor
        if native is None:
            y = torch.ops.gradkernels.batch_norm_act.default(*tensors, training, momentum, eps, act, act_param)[0]
            return y
        try:
            y = native.batch_norm_act(*tensors, training, momentum, eps, act, act_param)
            return y
        except TypeError:
            # torch's function below raises its own error for a wrong type.
            pass
    return reference.batch_norm_act(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        act=act,
        act_param=act_param,
        residual=residual,
        num_batches_tracked=num_batches_tracked,
    )


def promoted(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and residual; under autocast in the dtype of their sum."""
    if isinstance(residual, Tensor) and residual.dtype != x.dtype and torch.is_autocast_enabled(x.device.type):
        dtype = torch.promote_types(x.dtype, residual.dtype)
        return x.to(dtype), residual.to(dtype)
    return x, residual


def forward_of(bn: _BatchNorm, x: Tensor, residual: Tensor | None, act: str, act_param: float) -> Tensor:
    """act(bn(x) + residual), from the fields and the mode of any of torch's batch normalisations."""
    bn._check_input_dim(x)
    # For five tensors, nn.Module.__getattr__ would take a tenth of a small call. A tensor that is not registered, such
    # as a parametrized weight, is another attribute.
    registered = {**bn._parameters, **bn._buffers}

    def tensor(name: str) -> Tensor | None:
        return registered[name] if name in registered else getattr(bn, name)

    running_mean, running_var = tensor("running_mean"), tensor("running_var")
    training = bn.training or (running_mean is None and running_var is None)
    num_batches_tracked = None
    if bn.training:
        if bn.track_running_stats:
            num_batches_tracked = tensor("num_batches_tracked")
        else:
            running_mean = running_var = None
    tensors = (x, running_mean, running_var, tensor("weight"), tensor("bias"), residual, num_batches_tracked)
    return _batch_norm_act(*tensors, training, bn.momentum, bn.eps, act, act_param)


class _NormAct(nn.Module):
    """A normalisation that applies an activation of its own. A subclass defines _forward."""

    act: str
    act_param: float

    __prepare_scriptable__ = _native.refuse_script

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, torch.fx.Proxy):
            path = input.tracer.path_of_module(self)
            if path:
                # torch.fx.symbolic_trace records only torch's modules as one call; this one is a call too.
                call: Tensor = input.tracer.create_proxy("call_module", path, (input,) if residual is None else (input, residual), {})
                return call
        return self._forward(input, residual, self.act, self._param())

    def _forward(self, x: Tensor, residual: Tensor | None, act: str, act_param: float) -> Tensor:
        raise NotImplementedError

    def _param(self) -> float:
        # After `bn.act = "relu"`, act_param still belongs to the activation before it.
        return self.act_param if has_param(self.act) else 0.0

    def _act_repr(self) -> str:
        return f"act={self.act!r}" + (f", act_param={self.act_param}" if has_param(self.act) else "")


class _AffineNormAct(_NormAct):
    """A normalisation with parameters, or with None for each."""

    def _complete(self, bias: bool, act: str | nn.Module, act_param: float | None) -> None:
        """What torch's constructor leaves to do: the activation, and `bias`, which torch 2.11 has no argument for."""
        if not bias:
            self.register_parameter("bias", None)
        self.act, self.act_param = resolve_act(act, act_param)

    def reset_parameters(self) -> None:
        # torch 2.11 assumes that every affine layer has a bias.
        for parameter, fill in ((self._parameters["weight"], nn.init.ones_), (self._parameters["bias"], nn.init.zeros_)):
            if parameter is not None:
                fill(parameter)


class _BatchNormAct(_AffineNormAct, _BatchNorm):
    """The base of BatchNormAct1d, 2d and 3d. Their other base, torch's class, checks the dimensions of x."""

    _forward = forward_of

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
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
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, bias={self.bias is not None}, "
            f"track_running_stats={self.track_running_stats}, {self._act_repr()}"
        )


class BatchNormAct1d(_BatchNormAct, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, an optional residual and an activation; x is (N, C) or (N, C, L).

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Arguments, errors and source are those of BatchNormAct2d.

    Example:
        >>> import torch, gradkernels as gk
        >>> bn = gk.BatchNormAct1d(3, act="elu")
        >>> bn(torch.randn(8, 3)).shape
        torch.Size([8, 3])
    """


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, an optional residual and an activation; x is (N, C, H, W).

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Call it as bn(x) or bn(x, residual). Its state_dict and that of torch.nn.BatchNorm2d load into each other.
    Tools that rebuild a BatchNorm from its fields, such as torch.nn.SyncBatchNorm.convert_sync_batchnorm and
    torch.nn.utils.fusion.fuse_conv_bn_eval, silently drop the activation.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance, in units of x squared.
        momentum: the weight of a batch in the running statistics; no unit. None gives all batches the same
            weight.
        affine: learn weight and bias, (C,) each.
        track_running_stats: keep running statistics and use them in evaluation.
        device: the device of parameters and buffers.
        dtype: the dtype of parameters and buffers.
        bias: False leaves out the bias of an affine layer.
        act: the name of an activation (a key of gradkernels.acts.ACTS), or a module that computes one:
            torch's, or LeakyReLU, ELU or Swish of this package. act="identity" computes torch.nn.BatchNorm2d.
        act_param: the parameter of act (negative_slope, alpha or beta). None is its default (0.01, 1 and 1),
            or the parameter of the module that is passed as act.

    Raises:
        ValueError: act is unknown; act_param is set and act has no parameter or is a module; in forward, the
            errors of torch.nn.BatchNorm2d.
        TypeError: act is another module, or act_param is a tensor or a string.
        RuntimeError: in forward, residual has another shape, dtype or device than x.

    Source: Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift", 2015.

    Example:
        >>> import torch, gradkernels as gk
        >>> bn = gk.BatchNormAct2d(3, act=torch.nn.ReLU(inplace=True))
        >>> x = torch.randn(2, 3, 4, 4)
        >>> y = bn(x, residual=x)
        >>> y.shape, bool((y >= 0).all())
        (torch.Size([2, 3, 4, 4]), True)
    """


class BatchNormAct3d(_BatchNormAct, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d, an optional residual and an activation; x is (N, C, D, H, W).

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Arguments, errors and source are those of BatchNormAct2d.

    Example:
        >>> import torch, gradkernels as gk
        >>> bn = gk.BatchNormAct3d(3, act="swish", act_param=2.0)
        >>> bn(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """
