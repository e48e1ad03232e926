"""Every operator, composed of torch's operators.

They are used without the compiled library, for torch.onnx, and for torch.compile if pointwise. Tests and
bench compare with them in float64. Checks of arguments that the kernels need too are here once.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from gradkernels import acts


def leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    if inplace and negative_slope < 0 and isinstance(x, Tensor):
        # In place, torch computes the gradient from the sign of y, which is wrong here. Its backward keeps
        # the clone instead.
        return x.copy_(F.leaky_relu(x.clone(), negative_slope))
    return F.leaky_relu(x, negative_slope, inplace)


def elu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    return F.elu(x, alpha, inplace)


def check_beta(x: Tensor, beta: Tensor) -> None:
    """RuntimeError unless beta has one element or one for each channel of x."""
    channels = x.shape[1] if x.dim() > 1 else 1
    if beta.dim() > 1 or beta.numel() not in (1, channels):
        raise RuntimeError(f"swish: beta must have 1 element or {channels}, one per channel of x, but has shape {tuple(beta.shape)}")


def swish(x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    if isinstance(beta, Tensor) and isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
        check_beta(x, beta)
        # A single element keeps its dimension: torch promotes dtypes differently with a 0-d tensor.
        if x.dim() == 0:
            beta = beta.reshape(())
        elif beta.numel() != 1:
            beta = beta.view(-1, *[1] * (x.dim() - 2))
    return acts.swish(x, beta)


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    return F.prelu(x, weight)


def rrelu(x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False) -> Tensor:
    if training and isinstance(x, Tensor) and x.dtype == torch.float16 and x.is_cpu:
        # torch cannot draw slopes for float16 on the CPU.
        y = F.rrelu(x.float(), lower, upper, True).to(x.dtype)
        return x.copy_(y) if inplace else y
    return F.rrelu(x, lower, upper, training, inplace)


def check_norm_act(x: Tensor, residual: Tensor | None, act: str, act_param: float | None) -> float:
    """Raises for a wrong residual or activation; returns check_act's result."""
    act_param = acts.check_act(act, act_param)
    if residual is not None and not isinstance(residual, Tensor):
        raise TypeError(f"residual must be Tensor, not {type(residual).__name__}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        x_is, residual_is = (f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}" for tensor in (x, residual))
        raise RuntimeError(f"residual must have the shape, dtype and device of x: residual is {residual_is}, x is {x_is}")
    return act_param


def check_batch_norm_act(
    x: Tensor, residual: Tensor | None, training: bool, eps: float, act: str, act_param: float | None, *, is_share: bool = False
) -> float:
    """check_norm_act, and F.batch_norm's errors for its own arguments.

    is_share: x is one process's share of the batch, so the number of values per channel is not known yet.
    """
    act_param = check_norm_act(x, residual, act, act_param)
    if training and not is_share and math.prod(x.shape[:1] + x.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    if training and eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    return act_param


def contiguous(values: Tensor | None) -> Tensor | None:
    return values.contiguous() if isinstance(values, Tensor) else values


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: str = "leaky_relu",
    act_param: float | None = None,
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    act_param = check_batch_norm_act(x, residual, training, eps, act, act_param)
    if not training:
        num_batches_tracked = None
    if momentum is None:
        momentum = 0.0 if num_batches_tracked is None else 1.0 / float(num_batches_tracked + 1)
    operands = [operand for operand in (running_mean, running_var, weight, bias) if operand is not None]
    if training and any(operand.dtype != operands[0].dtype or operand.device != x.device for operand in operands):
        # torch writes the running statistics before it checks dtypes and devices, so it gets copies first.
        copied_mean, copied_var = (None if running is None else running.clone() for running in (running_mean, running_var))
        F.batch_norm(x, copied_mean, copied_var, weight, bias, True, momentum, eps)
    # For an (N, C) input, torch's backward on the CPU reads beyond the end of tensors that are not
    # contiguous. Running statistics that are written must not be copied.
    weight = contiguous(weight)
    if not training:
        running_mean, running_var = contiguous(running_mean), contiguous(running_var)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    # Counted here, and not before as in nn.BatchNorm, so that a batch that raised an error is not counted.
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return add_and_activate(y, residual, act, act_param)


def add_and_activate(z: Tensor, residual: Tensor | None, act: str, act_param: float) -> Tensor:
    """The second half of every normalisation with an activation."""
    return acts.ACTS[act].function(z if residual is None else z + residual, act_param)


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: str = "leaky_relu",
    act_param: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    act_param = check_norm_act(x, residual, act, act_param)
    if weight is None and isinstance(bias, Tensor) and bias.shape == x.shape[1:2]:
        # torch's backward on the CPU raises an error for a bias without a weight.
        weight = torch.ones_like(bias)
    return add_and_activate(F.group_norm(x, num_groups, weight, bias, eps), residual, act, act_param)


def instance_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *,
    act: str,
    act_param: float,
    residual: Tensor | None,
) -> Tensor:
    act_param = check_norm_act(x, residual, act, act_param)
    y = F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return add_and_activate(y, residual, act, act_param)


def sync_batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    *,
    act: str,
    act_param: float,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
    all_gather: Callable[[Tensor], Tensor],
) -> Tensor:
    """batch_norm_act in training, where x is one process's share of the batch.

    all_gather stacks one vector of each process, and is differentiable. Statistics and normalisation are
    float64, because double backward differentiates this function.
    """
    channels, elements = x.shape[1], math.prod(x.shape[:1] + x.shape[2:])
    dims, per_channel = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    wide = x.to(torch.float64)
    mean = wide.sum(dims) / max(elements, 1)
    m2 = (wide - mean.view(per_channel)).square().sum(dims)
    counts, means, m2s = all_gather(torch.cat([mean.new_full((1,), elements), mean, m2])).split([1, channels, channels], dim=1)
    count = counts.sum()
    if x.device.type == "cpu" and count == 1:
        raise ValueError("Expected more than 1 value per channel when training, got 1 in the batches of all processes together")
    divisor = count.clamp(min=1)
    mean = (counts * means).sum(0) / divisor
    m2 = m2s.sum(0) + (counts * (means - mean).square()).sum(0)
    with torch.no_grad():
        factor: float | Tensor = 0.0 if momentum is None else momentum
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
            if momentum is None:
                factor = num_batches_tracked.double().reciprocal()
        # Fewer than two values have no variance: the running statistics stay as they are.
        for running, batch in ((running_mean, mean), (running_var, m2 / (count - 1))):
            if running is not None:
                running.copy_(torch.where(count > 1, running * (1 - factor) + batch * factor, running))
    y = (wide - mean.view(per_channel)) * (m2 / divisor + eps).rsqrt().view(per_channel)
    if weight is not None:
        y = y * weight.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    return add_and_activate(y.to(x.dtype), residual, act, act_param)


@torch.no_grad()
def refuse_overlap(grads: Iterable[Tensor | None]) -> None:
    """Raises torch's error if a gradient is expanded. torch's functions notice it after they wrote other gradients."""
    # torch.compile cannot trace strides that it does not know.
    for grad in () if torch.compiler.is_compiling() else grads:
        if grad is None or grad.layout != torch.strided or grad.is_nested:
            continue
        if any(size > 1 and stride == 0 for size, stride in zip(grad.shape, grad.stride(), strict=True)):
            grad.mul_(1)  # writes nothing, and raises


def with_writable_gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    refuse_overlap(tensor.grad for tensor in tensors)
    return tensors


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    return torch.nn.utils.clip_grad_norm_(with_writable_gradients(parameters), max_norm, norm_type, error_if_nonfinite, foreach)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor], norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)


def clip_grads_with_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, total_norm: Tensor, foreach: bool | None = None) -> None:
    torch.nn.utils.clip_grads_with_norm_(with_writable_gradients(parameters), max_norm, total_norm, foreach)


def adaptive_clip_grad_(parameters: list[Tensor], clip_factor: float, eps: float, norm_type: float) -> None:
    parameters = with_writable_gradients(parameters)
    for parameter in parameters:
        if parameter.grad is not None and not (parameter.grad.is_floating_point() or parameter.grad.is_complex()):
            raise RuntimeError(f"adaptive_clip_grad_ does not support gradients of {parameter.grad.dtype}")
    for parameter in parameters:
        grad = parameter.grad
        if grad is None or grad.numel() == 0:
            continue
        dims = None if grad.dim() < 2 else tuple(range(1, grad.dim()))
        wide = torch.promote_types(grad.dtype, torch.float32 if grad.device.type == "mps" else torch.float64)
        param_norm, grad_norm = (
            torch.linalg.vector_norm(each.detach(), norm_type, dims, keepdim=True, dtype=wide) for each in (parameter, grad)
        )
        max_norm = param_norm.clamp(min=eps) * clip_factor
        grad.mul_((max_norm / grad_norm.clamp(min=1e-6)).masked_fill(grad_norm < max_norm, 1.0))


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    torch.nn.utils.clip_grad_value_(with_writable_gradients(parameters), clip_value, foreach)
