"""Clipping folded into optimizers: into torch's own through the hooks they have, and into RMSprop, which torch has in no fused form.

torch's fused optimizers divide gradients by `grad_scale` as they read them. attach_clipping drives them through it, so that a gradient is
read once for its norm and once for the step.
"""

import functools
import inspect
import math
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

# They read grad_scale where all of their groups are fused.
_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)

# What GradScaler and ClippingHandle lay down on an optimizer for the time of a step.
_AMP_ATTRIBUTES = ("grad_scale", "found_inf")


def _is_normal_float32(value: float) -> bool:
    """Whether float32 holds it with all its digits."""
    limits = torch.finfo(torch.float32)
    return limits.tiny <= abs(value) <= limits.max


class RMSprop(torch.optim.RMSprop):
    """torch.optim.RMSprop with each step in one pass over parameters, gradients and state, and clipping folded into it.

        g = c grad + weight_decay param                         c = min(1, max_norm / (total_norm + 1e-6)), -c with maximize
        square_avg = alpha square_avg + (1 - alpha) g^2
        grad_avg = grad_avg + (1 - alpha) (g - grad_avg)        with centered; v = square_avg - grad_avg^2, else square_avg
        buffer = momentum buffer + g / (sqrt(v) + eps)          with momentum
        param = param - lr buffer                               without momentum param - lr g / (sqrt(v) + eps)

    The state_dict is torch's; either loads the other's. A step equals torch's foreach step to 2 ulp of the largest term, and
    to 8 where a momentum or the difference in v cancels; bfloat16 and float16 are computed in float32 and rounded once,
    where torch rounds each intermediate result. Groups with capturable, differentiable or foreach set, complex parameters and
    other devices take torch's step.

    Args:
        params: this argument and the following ones up to differentiable are torch's.
        max_norm: the largest total norm of the gradients of all groups, in their units; None does not clip. Gradients are
            scaled as they are read and stay in memory as they were, except where torch's step is taken.
        norm_type: that of the total norm.

    Attributes:
        last_norm: the total norm before clipping in the last step, as clip_grad_norm_ returns it; None without max_norm.

    Raises:
        ValueError: one of torch's options is negative, in torch's words. max_norm is taken as clip_grad_norm_ takes it.
        RuntimeError: a gradient is sparse; or, with max_norm, parameters are pieces of a FullyShardedDataParallel model
            (FSDP1): call model.clip_grad_norm_(max_norm).

    Source: Hinton, "Neural Networks for Machine Learning", lecture 6e, 2012; centered: Graves, "Generating Sequences With
    Recurrent Neural Networks", 2013.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> optimizer = gk.optim.RMSprop([weight], lr=0.05, max_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.detach(), optimizer.last_norm
        (tensor([0.5000, 1.5000]), tensor(5.))
    """

    # What the last step multiplied gradients with as it read them, which they do not show: GradientMonitor asks.
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
        """torch's copies and pickles carry nothing else."""
        return {**super().__getstate__(), "max_norm": self.max_norm, "norm_type": self.norm_type, "last_norm": self.last_norm}

    def step(self, closure: _Closure | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients anew.

        Returns:
            What the closure returned; None without one.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            native = _native.library()
            groups = [(group, *self._state_of(group)) for group in self.param_groups]
            served = [self._is_served(*each[:-1]) for each in groups]
            coefficient = self._folded_coefficient = self._clip(all(served))
            for (group, has_complex, params, grads, square_avgs, momentum_buffers, grad_avgs, steps), is_served in zip(
                groups, served, strict=True
            ):
                options = {name: group[name] for name in ("alpha", "eps", "weight_decay", "momentum")}
                if native is None or not is_served:
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
                        # A tensor: of a number torch would make one for each parameter.
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
        """Whether there are complex parameters; parameters with a gradient, gradients, square_avg, momentum_buffer, grad_avg, step."""
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        init_group: Callable[..., bool] = self._init_group
        has_complex = init_group(group, *lists)
        params, grads, square_avgs, momentum_buffers, grad_avgs, steps = lists
        return has_complex, params, grads, square_avgs, momentum_buffers, grad_avgs, steps

    def _is_served(
        self,
        group: dict[str, Any],
        has_complex: bool,
        params: list[Tensor],
        grads: list[Tensor],
        square_avgs: list[Tensor],
        momentum_buffers: list[Tensor],
        grad_avgs: list[Tensor],
    ) -> bool:
        native = _native.library()
        takes_torchs = group["capturable"] or group["differentiable"] or group["foreach"] is not None or has_complex
        if native is None or takes_torchs:
            return False
        served: bool = native.rmsprop_applies(params, [grads, square_avgs, momentum_buffers, grad_avgs])
        return served

    def _clip(self, folds: bool) -> float:
        """What the step is to multiply gradients with; where it cannot, they are scaled here."""
        if self.max_norm is None:
            return 1.0
        params = [param for group in self.param_groups for param in group["params"]]
        sharded.refuse_pieces(params)
        gradients = Gradients([param.grad for param in params if param.grad is not None])
        # The step takes a number of the host: not to wait for a GPU, gradients there are scaled in place.
        if not folds or not gradients.tensors or not gradients.tensors[0].is_cpu:
            self.last_norm = clip_grad_norm_(params, self.max_norm, self.norm_type)
            return 1.0
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
    """What attach_clipping returns; `remove()` ends it.

    Attributes:
        max_norm: as given; may be changed between steps.
        norm_type: likewise.
        last_norm: the total norm before clipping in the last step, without GradScaler's scale, as clip_grad_norm_ returns
            it; None before the first step. A step that GradScaler leaves out is none: the optimizer is not called, unless it is
            one of torch's fused ones, which find out by themselves; their last_norm is then not finite.

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
        # A pre-hook, to come after what others have hooked in before; a step around the step, to clean up whatever happens.
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        self._outer_step = optimizer.__dict__.get("step")
        inner_step = optimizer.step

        @functools.wraps(inner_step)
        def step(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            before = {name: optimizer.__dict__[name] for name in _AMP_ATTRIBUTES if name in optimizer.__dict__}
            try:
                result = inner_step(*args, **kwargs)
            except BaseException:
                # GradScaler, which alone sets found_inf, would not come to take its two away.
                _lay_down(optimizer, {} if "found_inf" in before else before)
                raise
            _lay_down(optimizer, before)
            return result

        # A method, since torch's learning-rate schedulers look for its function.
        self._step = types.MethodType(step, optimizer)
        optimizer.__dict__["step"] = self._step

    def remove(self) -> None:
        """The optimizer no longer clips; a second call does nothing."""
        self._hook.remove()
        # Who has wrapped the step since keeps what is then an empty shell.
        if self._optimizer.__dict__.get("step") is self._step:
            del self._optimizer.__dict__["step"]
            if self._outer_step is not None:
                self._optimizer.__dict__["step"] = self._outer_step

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # args[0] is the optimizer.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._clip(optimizer)
            return None

        # Its gradients are there only when it has run.
        def clipped() -> Any:
            loss = closure()
            self._clip(optimizer)
            return loss

        return ((args[0], clipped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": clipped})

    @torch.no_grad()
    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        sharded.refuse_pieces(params)
        gradients = Gradients([param.grad for param in params if param.grad is not None])
        if not _reads_grad_scale(optimizer, gradients):
            self.last_norm = clip_grad_norm_(params, self.max_norm, self.norm_type)
            return
        amp_scale = getattr(optimizer, "grad_scale", None)
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
            # Of 0 and nan the divisor is inf and nan, which do what they have to.
            if value != 0 and not math.isnan(value) and not _is_normal_float32(divisor.item()):
                gradients.scale_(self.max_norm, total_norm)
                return
        optimizer.__dict__["grad_scale"] = divisor.float()


def _lay_down(optimizer: torch.optim.Optimizer, attributes: dict[str, Any]) -> None:
    for name in _AMP_ATTRIBUTES:
        optimizer.__dict__.pop(name, None)
    optimizer.__dict__.update(attributes)


def _reads_grad_scale(optimizer: torch.optim.Optimizer, gradients: Gradients) -> bool:
    # A subclass may bring a step of its own, which does not.
    inherited = next((each for each in _FUSED if isinstance(optimizer, each)), None)
    return (
        inherited is not None
        and inspect.unwrap(type(optimizer).step) is inspect.unwrap(inherited.step)
        and getattr(optimizer, "_step_supports_amp_scaling", False)
        and all(group.get("fused") for group in optimizer.param_groups)
        and bool(gradients.tensors)
        and not gradients.is_sharded
        and (gradients.have_kernels() or all(type(grad) is Tensor and grad.is_cuda for grad in gradients.tensors))
    )


def _stepping(optimizer: torch.optim.Optimizer, wrappers: tuple[torch.optim.Optimizer, ...] = ()) -> torch.optim.Optimizer:
    """The optimizer whose step() takes hooks: the one given, or the one inside of wrappers that never called Optimizer.__init__."""
    name = type(optimizer).__name__
    inner = [each for each in _held(optimizer) if not any(each is wrapper for wrapper in wrappers)]
    if not isinstance(optimizer, torch.optim.Optimizer):
        held = "".join(f"; the {type(each).__name__} in it is one, for gradients that are whole on this rank" for each in inner[:1])
        raise TypeError(f"{name} is not an Optimizer{held}")
    if getattr(type(optimizer).step, "hooked", False):
        return optimizer
    if len(inner) != 1:
        holds = "no optimizer of torch" if not inner else f"{len(inner)} optimizers"
        raise TypeError(
            f"{name} cannot clip: it never called Optimizer.__init__, so that its step() takes no hooks, and it holds {holds}. "
            "attach_clipping takes the optimizer that computes the step; DeepSpeed clips by its own gradient_clipping"
        )
    return _stepping(inner[0], (*wrappers, optimizer))


def _held(wrapper: object) -> list[torch.optim.Optimizer]:
    """The optimizers among the attributes of an object, each once."""
    held = {id(each): each for each in getattr(wrapper, "__dict__", {}).values() if isinstance(each, torch.optim.Optimizer)}
    return [each for each in held.values() if each is not wrapper]


def attach_clipping(optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float = 2.0) -> ClippingHandle:
    """Make every optimizer.step() clip the gradients of all its parameters, as clip_grad_norm_ before it would.

        g = g min(1, max_norm / (total_norm + 1e-6))

    torch's fused SGD, Adam, AdamW and Adagrad are told to scale gradients as they read them, which saves the pass that would
    write them first; other optimizers find them scaled. With torch.amp.GradScaler the norm is that of the unscaled
    gradients, and unscaling, clipping and skipping a step on inf are one. Nothing is left on the optimizer after a step,
    whether it returned or raised; its state_dict is as before. A copy or a pickle of the optimizer does not clip, as it
    has none of its hooks.

    Args:
        optimizer: any but LBFGS; a closure is clipped after it has run. Of one that wraps another (accelerate's, Lightning's,
            torch.distributed.optim.PostLocalSGDOptimizer) the inner one gets the clipping.
        max_norm: the largest total norm allowed, in units of the gradients.
        norm_type: p; 1, 2 and inf have kernels.

    Returns:
        A handle with `.remove()` and `.last_norm`.

    Raises:
        ValueError: the optimizer is LBFGS, or a ZeroRedundancyOptimizer with overlap_with_ddp=True.
        TypeError: what is given is no optimizer, or its step() takes no hooks and it holds no single optimizer of torch.
        RuntimeError: its parameters are pieces of a FullyShardedDataParallel model (FSDP1): call
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
    optimizer = _stepping(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "attach_clipping does not take LBFGS: it evaluates the closure several times in a step and models the curvature from "
            "differences of gradients, which clipping would falsify"
        )
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            f"attach_clipping does not take {type(optimizer).__name__} with overlap_with_ddp=True: its step() does nothing, since "
            "parameters are updated within backward, before the norm of all gradients is known"
        )
    sharded.refuse_pieces(param for group in optimizer.param_groups for param in group["params"])
    return ClippingHandle(optimizer, max_norm, norm_type)
