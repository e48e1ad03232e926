"""Clipping inside optimizers: attach_clipping for torch's, and a fused RMSprop, which torch does not have.

torch's fused optimizers divide gradients by the attribute `grad_scale` while they read them. attach_clipping
sets it, so gradients are read once for the norm and once for the step.
"""

import functools
import inspect
import math
import sys
import types
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.rmsprop import rmsprop

from gradkernels import _native, sharded
from gradkernels.clip_grad import clip_grad_norm_
from gradkernels.gradients import Gradients

_Closure: TypeAlias = Callable[[], Any]

# These read grad_scale if all of their groups are fused.
_WITH_GRAD_SCALE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)

# GradScaler and ClippingHandle set these on an optimizer for the duration of a step.
_AMP_ATTRIBUTES = ("grad_scale", "found_inf")

# The code of torch's wrapper around step(), which runs the hooks. torch wraps step() of each class of which an
# optimizer was made.
_STEP_WITH_HOOKS = torch.optim.Optimizer.profile_hook_step(torch.optim.Optimizer.step).__code__


def running_steps(optimizer: torch.optim.Optimizer) -> int:
    """The number of step() of this optimizer that run now, with hooks: 2 in super().step() if torch wrapped both.

    A count in hooks would be wrong after a step that raised an error, so the stack is read.
    """
    count = 0
    frame: types.FrameType | None = None if torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None:
        count += frame.f_code is _STEP_WITH_HOOKS and frame.f_locals["self"] is optimizer
        frame = frame.f_back
    return count


def _is_normal_float32(value: float) -> bool:
    """Whether float32 represents the value with full precision."""
    limits = torch.finfo(torch.float32)
    return limits.tiny <= abs(value) <= limits.max


class RMSprop(torch.optim.RMSprop):
    """torch.optim.RMSprop, and clipping, in one pass over parameters, gradients and state.

        g = c grad + weight_decay param                         c = min(1, max_norm / (total_norm + 1e-6)), -c with maximize
        square_avg = alpha square_avg + (1 - alpha) g^2
        grad_avg = grad_avg + (1 - alpha) (g - grad_avg)        with centered; v = square_avg - grad_avg^2, else square_avg
        buffer = momentum buffer + g / (sqrt(v) + eps)          with momentum
        param = param - lr buffer                               without momentum param - lr g / (sqrt(v) + eps)

    The state_dict and torch's load into each other. A step is within 2 ulp of torch's foreach step, in ulp of
    the largest term, and within 8 ulp if the momentum or the difference in v cancels. bfloat16 and float16
    are computed in float32 and rounded once, whereas torch rounds every intermediate result. torch's step
    runs for groups with capturable, differentiable or foreach set, for complex parameters, and on devices
    without kernels.

    Args:
        params: as in torch: parameters, named parameters or groups.
        lr: learning rate.
        alpha: weight of the old square_avg and grad_avg; no unit.
        eps: added to sqrt(v), in units of the gradients.
        weight_decay: weight of param in g.
        momentum: weight of the old buffer; no unit. 0 has no buffer.
        centered: subtract grad_avg^2 in v.
        capturable: as in torch, with torch's step.
        foreach: as in torch, with torch's step unless it is None.
        maximize: maximize the loss.
        differentiable: as in torch, with torch's step.
        max_norm: the largest total norm of the gradients of all groups, in units of the gradients; None does
            not clip. On the CPU, gradients are scaled as they are read and do not change in memory, unless
            torch's step runs.
        norm_type: p of the total norm; 1, 2 and inf have kernels.

    Attributes:
        last_norm: the total norm before clipping in the last step, as clip_grad_norm_ returns it; None
            without max_norm.

    Raises:
        ValueError: an option of torch's is negative. max_norm is not checked, as in clip_grad_norm_.
        RuntimeError: a gradient is sparse; or max_norm is set and parameters are pieces of a
            FullyShardedDataParallel model (FSDP1): call model.clip_grad_norm_(max_norm).

    Source: Hinton, "Neural Networks for Machine Learning", lecture 6e, 2012; centered: Graves, "Generating
    Sequences With Recurrent Neural Networks", 2013.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> optimizer = gk.optim.RMSprop([weight], lr=0.05, max_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.detach(), optimizer.last_norm
        (tensor([0.5000, 1.5000]), tensor(5.))
    """

    # The last step multiplied gradients by this factor as it read them. GradientMonitor reads the factor,
    # because the gradients in memory are unscaled.
    _folded_coefficient = 1.0

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        max_norm: float | None = None,
        norm_type: float = 2.0,
    ) -> None:
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable)
        self.max_norm = None if max_norm is None else float(max_norm)
        self.norm_type = float(norm_type)
        self.last_norm: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Adds our attributes, which torch's copies and pickles leave out."""
        return {**super().__getstate__(), "max_norm": self.max_norm, "norm_type": self.norm_type, "last_norm": self.last_norm}

    def step(self, closure: _Closure | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the gradients again and returns the loss.

        Returns:
            The result of the closure; None without a closure.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            native = _native.library()
            groups = [(group, *self._state_of(group)) for group in self.param_groups]
            supported = [self._supports(*group_and_state[:-1]) for group_and_state in groups]
            coefficient = self._folded_coefficient = self._clip(all(supported))
            for (group, has_complex, params, grads, square_avgs, momentum_buffers, grad_avgs, steps), is_supported in zip(
                groups, supported, strict=True
            ):
                options = {name: group[name] for name in ("alpha", "eps", "weight_decay", "momentum")}
                if native is None or not is_supported:
                    rmsprop(
                        params,
                        grads,
                        square_avgs,
                        grad_avgs,
                        momentum_buffers,
                        steps,
                        lr=group["lr"],
                        centered=group["centered"],
                        foreach=group["foreach"],
                        maximize=group["maximize"],
                        differentiable=group["differentiable"],
                        capturable=group["capturable"],
                        has_complex=has_complex,
                        **options,
                    )
                elif params:
                    if all(step.is_cpu for step in steps):
                        # A tensor, because torch would convert a number to one tensor per parameter.
                        torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=1.0)
                    else:
                        torch._foreach_add_(steps, 1)
                    native.rmsprop_(
                        *(params, grads, square_avgs, grad_avgs, momentum_buffers, float(group["lr"])),
                        *options.values(),
                        -coefficient if group["maximize"] else coefficient,
                    )
        return loss

    def _state_of(
        self, group: dict[str, Any]
    ) -> tuple[bool, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Whether parameters are complex; the parameters with a gradient, and their gradients and states."""
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        init_group: Callable[..., bool] = self._init_group
        has_complex = init_group(group, *lists)
        params, grads, square_avgs, momentum_buffers, grad_avgs, steps = lists
        return has_complex, params, grads, square_avgs, momentum_buffers, grad_avgs, steps

    def _supports(
        self,
        group: dict[str, Any],
        has_complex: bool,
        params: list[Tensor],
        grads: list[Tensor],
        square_avgs: list[Tensor],
        momentum_buffers: list[Tensor],
        grad_avgs: list[Tensor],
    ) -> bool:
        """Whether the kernel supports a group."""
        native = _native.library()
        needs_torch = group["capturable"] or group["differentiable"] or group["foreach"] is not None or has_complex
        if native is None or needs_torch:
            return False
        supported: bool = native.rmsprop_supports(params, [grads, square_avgs, momentum_buffers, grad_avgs])
        return supported

    def _clip(self, folds: bool) -> float:
        """The factor for gradients as the step reads them; 1 if they are scaled in place, or not at all."""
        if self.max_norm is None:
            return 1.0
        params = [param for group in self.param_groups for param in group["params"]]
        sharded.refuse_fsdp1_pieces(params)
        grads = [param.grad for param in params if param.grad is not None]
        # The kernel takes the factor from the host. Reading it from a GPU would wait, so a GPU scales in
        # place.
        if not folds or not grads or not grads[0].is_cpu:
            self.last_norm = clip_grad_norm_(params, self.max_norm, self.norm_type)
            return 1.0
        gradients = Gradients(grads)
        total_norm = gradients.total_norm(self.norm_type)
        self.last_norm = gradients.as_torch_returns(total_norm)
        coefficient = self.max_norm / (total_norm.item() + 1e-6)
        if coefficient >= 1:
            return 1.0
        if coefficient == 0 or math.isnan(coefficient) or _is_normal_float32(coefficient):
            return coefficient
        gradients.scale_(self.max_norm, total_norm)
        return 1.0


class ClippingHandle:
    """The result of attach_clipping; `remove()` stops the clipping.

    Attributes:
        max_norm: the largest total norm allowed, in units of the gradients; may be changed between steps.
        norm_type: p; may be changed between steps.
        last_norm: the total norm before clipping in the last step, without GradScaler's scale, as
            clip_grad_norm_ returns it; None before the first step. If GradScaler skips a step, the optimizer
            does not run and last_norm stays the same. torch's fused optimizers do run, and skip the update
            themselves; last_norm is then not finite.

    Example:
        >>> import torch, gradkernels as gk
        >>> optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
        >>> handle = gk.attach_clipping(optimizer, max_norm=1.0)
        >>> handle.max_norm, handle.last_norm
        (1.0, None)
        >>> handle.remove()
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float) -> None:
        self.max_norm = float(max_norm)
        self.norm_type = float(norm_type)
        self.last_norm: Tensor | None = None
        self._optimizer = optimizer
        # The pre-hook runs after all earlier pre-hooks. The wrapper of step() cleans up, also after an
        # exception.
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        self._outer_step = optimizer.__dict__.get("step")
        inner_step = optimizer.step

        @functools.wraps(inner_step)
        def step(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            before = {name: optimizer.__dict__[name] for name in _AMP_ATTRIBUTES if name in optimizer.__dict__}
            try:
                result = inner_step(*args, **kwargs)
            except BaseException:
                # Only GradScaler sets found_inf, and it does not remove its two attributes after an
                # exception.
                _set_amp_attributes(optimizer, {} if "found_inf" in before else before)
                raise
            _set_amp_attributes(optimizer, before)
            return result

        # A method, because torch's learning-rate schedulers read its __func__.
        self._step = types.MethodType(step, optimizer)
        optimizer.__dict__["step"] = self._step

    def remove(self) -> None:
        """Stop the clipping; a second call does nothing."""
        self._hook.remove()
        # A later wrapper of step() keeps calling ours, which now does nothing.
        if self._optimizer.__dict__.get("step") is self._step:
            del self._optimizer.__dict__["step"]
            if self._outer_step is not None:
                self._optimizer.__dict__["step"] = self._outer_step

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if running_steps(optimizer) > 1:
            return None
        # args[0] is the optimizer.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._clip(optimizer)
            return None

        # The gradients exist only after the closure.
        def clipping_closure() -> Any:
            loss = closure()
            self._clip(optimizer)
            return loss

        return ((args[0], clipping_closure, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": clipping_closure})

    @torch.no_grad()
    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        sharded.refuse_fsdp1_pieces(params)
        grads = [param.grad for param in params if param.grad is not None]
        supports_amp = getattr(optimizer, "_step_supports_amp_scaling", False)
        amp_scale = getattr(optimizer, "grad_scale", None) if supports_amp else None
        gradients = Gradients(grads) if supports_amp and _reads_grad_scale(optimizer) else None
        if gradients is None or not _are_scaled_by_torch(params, gradients):
            if amp_scale is not None:
                for grad in grads:
                    # A scale does not fit into float16.
                    wide = torch.promote_types(grad.dtype, amp_scale.dtype)
                    grad.copy_(grad.to(wide) / amp_scale.to(grad.device))
                # found_inf stays: by it, the step skips the update. GradScaler deletes both attributes.
                optimizer.__dict__["grad_scale"] = None
            self.last_norm = clip_grad_norm_(params, self.max_norm, self.norm_type)
            return
        scaled_norm = gradients.total_norm(self.norm_type)
        divisor = torch.ones_like(scaled_norm) if amp_scale is None else amp_scale.to(scaled_norm)
        total_norm = scaled_norm / divisor
        self.last_norm = gradients.as_torch_returns(total_norm)
        coefficient = torch.clamp(self.max_norm / (total_norm + 1e-6), max=1.0)
        divisor = divisor / coefficient
        if divisor.is_cpu:
            value = coefficient.item()
            if value == 1:
                return
            # A coefficient of 0 or nan gives a divisor of inf or nan, with the right gradients.
            if value != 0 and not math.isnan(value) and not _is_normal_float32(divisor.item()):
                gradients.scale_(self.max_norm, total_norm)
                return
        optimizer.__dict__["grad_scale"] = divisor.float()


def _set_amp_attributes(optimizer: torch.optim.Optimizer, attributes: dict[str, Any]) -> None:
    for name in _AMP_ATTRIBUTES:
        optimizer.__dict__.pop(name, None)
    optimizer.__dict__.update(attributes)


def _reads_grad_scale(optimizer: torch.optim.Optimizer) -> bool:
    # A subclass may have a step of its own, which need not read it.
    inherited = next((kind for kind in _WITH_GRAD_SCALE if isinstance(optimizer, kind)), None)
    return (
        inherited is not None
        and inspect.unwrap(type(optimizer).step) is inspect.unwrap(inherited.step)
        and all(group.get("fused") for group in optimizer.param_groups)
    )


def _are_scaled_by_torch(params: list[Tensor], gradients: Gradients) -> bool:
    """Whether torch's fused step can divide these gradients: plain tensors on the CPU or on a GPU.

    On the CPU it writes a gradient with the strides of its parameter, which for other gradients is the wrong
    memory. On a GPU it raises an error for them.
    """
    if not gradients.tensors or gradients.is_sharded:
        return False
    if gradients.kernels is None:
        return all(type(grad) is Tensor and grad.is_cuda for grad in gradients.tensors)
    have_same_strides: bool = gradients.kernels.rmsprop_supports([param for param in params if param.grad is not None], [gradients.tensors])
    return have_same_strides


def _optimizer_with_hooks(optimizer: torch.optim.Optimizer, wrappers: tuple[torch.optim.Optimizer, ...] = ()) -> torch.optim.Optimizer:
    """The optimizer whose step() runs hooks: this one, or the one inside wrappers without hooks."""
    name = type(optimizer).__name__
    inner = [candidate for candidate in _inner_optimizers(optimizer) if not any(candidate is wrapper for wrapper in wrappers)]
    if not isinstance(optimizer, torch.optim.Optimizer):
        advice = f"; pass the {type(inner[0]).__name__} in it, if this rank has whole gradients" if inner else ""
        raise TypeError(f"{name} is not an Optimizer{advice}")
    # ZeroRedundancyOptimizer has hooks and clips itself: the optimizer in it holds only this rank's share of
    # the parameters.
    if getattr(type(optimizer).step, "hooked", False):
        return optimizer
    if len(inner) != 1:
        holds = "no optimizer of torch" if not inner else f"{len(inner)} optimizers"
        raise TypeError(
            f"attach_clipping cannot use {name}: it never called Optimizer.__init__, so its step() runs no hooks, and it holds {holds}. "
            "Pass the optimizer that computes the step; with DeepSpeed, set its gradient_clipping"
        )
    return _optimizer_with_hooks(inner[0], (*wrappers, optimizer))


def _inner_optimizers(wrapper: object) -> list[torch.optim.Optimizer]:
    attributes = getattr(wrapper, "__dict__", {}).values()
    unique = {id(attribute): attribute for attribute in attributes if isinstance(attribute, torch.optim.Optimizer)}
    return [attribute for attribute in unique.values() if attribute is not wrapper]


def attach_clipping(optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float = 2.0) -> ClippingHandle:
    """Make optimizer.step() clip the gradients of all its parameters, as clip_grad_norm_ before the step.

        g = g min(1, max_norm / (total_norm + 1e-6))

    torch's fused SGD, Adam, AdamW and Adagrad scale gradients as they read them, which saves the pass that
    writes clipped gradients. For other optimizers, for DTensors, and if a gradient does not have the strides
    of its parameter, the gradients are scaled in place. With torch.amp.GradScaler the norm is that of the
    unscaled gradients, and the same step unscales, clips, and skips on inf. A step leaves nothing on the
    optimizer, also if it raises an error. The state_dict does not change. A copy or a pickle of the optimizer
    does not clip, because it has no hooks.

    Args:
        optimizer: any optimizer except LBFGS. Gradients of a closure are clipped after each call of the
            closure. If the optimizer wraps another one (accelerate's, Lightning's,
            torch.distributed.optim.PostLocalSGDOptimizer), the inner optimizer clips.
        max_norm: the largest total norm allowed, in units of the gradients.
        norm_type: p; 1, 2 and inf have kernels.

    Returns:
        A handle with `.remove()` and `.last_norm`.

    Raises:
        ValueError: optimizer is LBFGS, or a ZeroRedundancyOptimizer with overlap_with_ddp=True.
        TypeError: optimizer is not an Optimizer, or it is a wrapper without hooks that does not hold exactly
            one optimizer.
        RuntimeError: the parameters are pieces of a FullyShardedDataParallel model (FSDP1): call
            model.clip_grad_norm_(max_norm).

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
        >>> handle = gk.attach_clipping(optimizer, max_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.detach(), handle.last_norm
        (tensor([-0.6000, -0.8000]), tensor(5.))
        >>> handle.remove()
    """
    optimizer = _optimizer_with_hooks(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "attach_clipping does not support LBFGS: it evaluates the closure several times in a step and estimates the curvature "
            "from differences of gradients, which clipping would falsify"
        )
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            f"attach_clipping does not support {type(optimizer).__name__} with overlap_with_ddp=True: its step() does nothing, because "
            "backward updates the parameters before the norm of all gradients is known"
        )
    sharded.refuse_fsdp1_pieces(param for group in optimizer.param_groups for param in group["params"])
    return ClippingHandle(optimizer, max_norm, norm_type)
