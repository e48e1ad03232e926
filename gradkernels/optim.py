"""Clipping inside optimizers: attach_clipping for torch's, and a fused RMSprop, which torch does not have.

torch's fused optimizers divide gradients by the attribute `grad_scale` while they read them. attach_clipping
sets it, so gradients are read once for the norm and once for the step.
"""

import functools
import inspect
import itertools
import math
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim.rmsprop import rmsprop

from gradkernels import _native, clipping, sharded
from gradkernels.clip_grad import adaptive_clip_grad_, clip_grad_norm_, first_nonfinite_sentence, nonfinite_sentence
from gradkernels.gradients import Gradients

_Closure: TypeAlias = Callable[[], Any]
MaxNorm: TypeAlias = float | clipping.Policy | None

_NONFINITE = ("propagate", "skip", "raise")

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
                    numbers = [float(group["lr"]), *map(float, options.values())]
                    if all(step.is_cpu for step in steps):
                        # A tensor, because torch would convert a number to one tensor per parameter.
                        torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=1.0)
                    else:
                        torch._foreach_add_(steps, 1)
                    native.rmsprop_(
                        *(params, grads, square_avgs, grad_avgs, momentum_buffers),
                        *numbers,
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
        max_norm: what attach_clipping was given: a number in units of the gradients, None for the max_norm of
            each group, or a policy; may be changed between steps. A changed policy begins without a history.
        norm_type: p; may be changed between steps.
        last_norm: the total norm before clipping in the last step, without GradScaler's scale, as
            clip_grad_norm_ returns it; None before the first step. If GradScaler skips a step, the optimizer
            does not run and last_norm stays the same. torch's fused optimizers do run, and skip the update
            themselves; last_norm is then not finite.
        skipped: int64, 0-d: the number of steps that nonfinite="skip" or skip_above has skipped, on the
            device of the gradients. Steps that GradScaler skips do not count.

    Raises:
        TypeError: the handle is copied or pickled. It belongs to one optimizer; state_dict() is what can be
            saved.

    Example:
        >>> import torch, gradkernels as gk
        >>> optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
        >>> handle = gk.attach_clipping(optimizer, max_norm=1.0)
        >>> handle.max_norm, handle.last_norm
        (1.0, None)
        >>> handle.remove()
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, max_norm: MaxNorm, norm_type: float, nonfinite: str, skip_above: float | None
    ) -> None:
        self._optimizer = optimizer
        self._nonfinite = nonfinite
        self._skip_above = skip_above
        self._max_norm: MaxNorm = math.inf
        self._state: clipping.State = {}
        self.max_norm = max_norm
        self.norm_type = float(norm_type)
        self.last_norm: Tensor | None = None
        self.skipped = torch.zeros((), dtype=torch.int64, device="cpu")
        # What skipped and the policy's state become if this step raises no error.
        self._after_step: tuple[Tensor, clipping.State] | None = None
        # The pre-hook runs after all earlier pre-hooks. The wrapper of step() cleans up, also after an
        # exception.
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        self._outer_step = optimizer.__dict__.get("step")
        inner_step = optimizer.step

        @functools.wraps(inner_step)
        def step(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            before = {name: optimizer.__dict__[name] for name in _AMP_ATTRIBUTES if name in optimizer.__dict__}
            self._after_step = None
            try:
                result = inner_step(*args, **kwargs)
            except _StepSkippedError as skipped:
                if skipped.handle is not self:
                    raise
                result, self._after_step = skipped.loss, None
            except BaseException:
                # Only GradScaler sets found_inf, and it does not remove its two attributes after an
                # exception.
                _set_amp_attributes(optimizer, {} if "found_inf" in before else before)
                raise
            _set_amp_attributes(optimizer, before)
            if self._after_step is not None:
                self.skipped, self._state = self._after_step
            return result

        # A method, because torch's learning-rate schedulers read its __func__.
        self._step = types.MethodType(step, optimizer)
        optimizer.__dict__["step"] = self._step

    @property
    def max_norm(self) -> MaxNorm:
        return self._max_norm

    @max_norm.setter
    def max_norm(self, max_norm: MaxNorm) -> None:
        if not isinstance(max_norm, clipping.Policy):
            max_norm = _number_or_none(max_norm)
        elif isinstance(max_norm, clipping.Adaptive) and self._skip_above is not None:
            raise ValueError("skip_above multiplies a bound of the total norm, and Adaptive has none")
        if max_norm is None:
            groups = self._optimizer.param_groups
            if not any("max_norm" in group for group in groups):
                raise ValueError('max_norm=None reads param_group["max_norm"], which no group has; not to clip, do not attach')
            # They hold for groups that lose the key when a checkpoint without it is loaded.
            self._max_norm_of_groups = [_number_or_none(group.get("max_norm")) for group in groups]
        if max_norm != self._max_norm:
            self._state = {}
        self._max_norm = max_norm

    def remove(self) -> None:
        """Stop the clipping; a second call does nothing."""
        self._hook.remove()
        # A later wrapper of step() keeps calling ours, which now does nothing.
        if self._optimizer.__dict__.get("step") is self._step:
            del self._optimizer.__dict__["step"]
            if self._outer_step is not None:
                self._optimizer.__dict__["step"] = self._outer_step

    def state_dict(self) -> dict[str, Any]:
        """What a training needs to go on exactly: the state of the policy, and the number of skipped steps.

        Returns:
            A dict of tensors and strings, for load_state_dict of a handle with the same policy.
        """
        state = {name: value.clone() for name, value in self._state.items()}
        return {"policy": self._policy_name(), "state": state, "skipped": self.skipped.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the handle was whose state_dict this is.

        Args:
            state_dict: from state_dict() of a handle with the same policy.

        Raises:
            ValueError: the state is that of another policy, or of a Percentile with another window. The
                handle does not change.
            KeyError: state_dict is not from state_dict().
        """
        policy, state, skipped = (state_dict[key] for key in ("policy", "state", "skipped"))
        if policy != self._policy_name():
            raise ValueError(f"the state is that of {policy or 'a number'}, but this handle clips to {self._policy_name() or 'a number'}")
        expected = self._max_norm.initial_state(torch.zeros((), device="cpu")) if isinstance(self._max_norm, clipping.Tracking) else {}
        for name in sorted({*expected, *state}) if state else ():
            found, wanted = (list(each[name].shape) if name in each else None for each in (state, expected))
            if found != wanted:
                raise ValueError(f"the state has {name!r} of shape {found}, but {self._max_norm} needs {wanted}")
        self._state, self.skipped = {name: value.clone() for name, value in state.items()}, skipped.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a ClippingHandle cannot be copied or pickled, because it belongs to one optimizer. Call attach_clipping for the other "
            "optimizer, and load_state_dict(handle.state_dict()) to take over the state"
        )

    def _policy_name(self) -> str | None:
        return type(self._max_norm).__name__ if isinstance(self._max_norm, clipping.Policy) else None

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if running_steps(optimizer) > 1:
            return None
        # args[0] is the optimizer.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._clip(optimizer, None)
            return None

        # The gradients exist only after the closure.
        def clipping_closure() -> Any:
            loss = closure()
            self._clip(optimizer, loss)
            return loss

        return ((args[0], clipping_closure, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": clipping_closure})

    @torch.no_grad()
    def _clip(self, optimizer: torch.optim.Optimizer, loss: Any) -> None:
        """Clips, or raises _StepSkippedError. Everything is decided before a gradient is written."""
        params = [param for group in optimizer.param_groups for param in group["params"]]
        sharded.refuse_fsdp1_pieces(params)
        supports_amp = getattr(optimizer, "_step_supports_amp_scaling", False)
        reads_amp = supports_amp and _reads_grad_scale(optimizer)
        amp_scale, found_inf = (getattr(optimizer, name, None) if supports_amp else None for name in _AMP_ATTRIBUTES)
        params = [param for param in params if param.grad is not None]
        is_clip_grad_norm = isinstance(self._max_norm, float) and self._nonfinite == "propagate" and self._skip_above is None
        if not params or (is_clip_grad_norm and not reads_amp and amp_scale is None):
            self.last_norm = clip_grad_norm_(params, self._max_norm if isinstance(self._max_norm, float) else math.inf, self.norm_type)
            return
        gradients = Gradients([param.grad for param in params])
        total_norm, parts, before, after = self._measure(optimizer, gradients, amp_scale)
        self.last_norm = gradients.as_torch_returns(total_norm)
        self._refuse_nonfinite(optimizer, total_norm, found_inf)
        records, skipped = total_norm.isfinite(), self.skipped
        skips = self._skips(optimizer, total_norm, parts, found_inf, reads_amp, loss)
        if skips is not None:
            # torch's fused step reads found_inf on the GPU, and skips its update.
            optimizer.__dict__["found_inf"] = (
                skips.float() if found_inf is None else torch.maximum(found_inf.to(skips.device), skips.float())
            )
            records, skipped = records & ~skips, _moved(skipped, skips.device) + skips
        self._after_step = skipped, {name: torch.where(records, after[name], before[name]) for name in before}
        if reads_amp and isinstance(self._max_norm, float | clipping.Tracking) and _are_scaled_by_torch(params, gradients):
            _fold(optimizer, parts[0], amp_scale)
            return
        if amp_scale is not None:
            for grad in gradients.tensors:
                # A scale does not fit into float16.
                wide = torch.promote_types(grad.dtype, amp_scale.dtype)
                grad.copy_(grad.to(wide) / amp_scale.to(grad.device))
            # found_inf stays: by it, the step skips the update. GradScaler deletes both attributes.
            optimizer.__dict__["grad_scale"] = None
        if isinstance(self._max_norm, clipping.Adaptive):
            adaptive_clip_grad_(params, self._max_norm.clip_factor, norm_type=self.norm_type)
        for part in parts:
            if part.max_norm is not None:
                part.gradients.scale_(part.max_norm, part.norm)

    def _measure(
        self, optimizer: torch.optim.Optimizer, gradients: Gradients, amp_scale: Tensor | None
    ) -> tuple[Tensor, list["_Part"], clipping.State, clipping.State]:
        """The total norm of all gradients, what is clipped together, and the policy's state before and after it."""

        def unscaled(norm: Tensor) -> Tensor:
            return norm if amp_scale is None else norm / amp_scale.to(norm)

        if self._max_norm is None:
            remembered = dict(enumerate(self._max_norm_of_groups))
            bounds = [_number_or_none(group.get("max_norm", remembered.get(i))) for i, group in enumerate(optimizer.param_groups)]
            norms, _, _, total_norm = gradients.norms(self.norm_type)
            counts = [sum(param.grad is not None for param in group["params"]) for group in optimizer.param_groups]
            ends = list(itertools.accumulate(counts))
            parts = [
                _Part(Gradients(gradients.tensors[end - count : end]), unscaled(torch.linalg.vector_norm(part, self.norm_type)), bound)
                for part, count, end, bound in zip(norms.split(counts), counts, ends, bounds, strict=True)
                if count
            ]
            return unscaled(total_norm), parts, {}, {}
        total_norm = unscaled(gradients.total_norm(self.norm_type))
        if not isinstance(self._max_norm, clipping.Tracking):
            max_norm = None if isinstance(self._max_norm, clipping.Adaptive) else self._max_norm
            return total_norm, [_Part(gradients, total_norm, max_norm)], {}, {}
        state = self._state or self._max_norm.initial_state(total_norm)
        before = {name: _moved(value, total_norm.device) for name, value in state.items()}
        bound, after = self._max_norm.bound(before, total_norm)
        return total_norm, [_Part(gradients, total_norm, bound)], before, after

    def _refuse_nonfinite(self, optimizer: torch.optim.Optimizer, total_norm: Tensor, found_inf: Tensor | None) -> None:
        # GradScaler's own search for inf skips the step.
        if self._nonfinite != "raise" or total_norm.isfinite() or (found_inf is not None and found_inf):
            return
        entries = [
            entry
            for group in optimizer.param_groups
            for entry in (zip(group["param_names"], group["params"], strict=True) if "param_names" in group else group["params"])
        ]
        raise RuntimeError(f"{nonfinite_sentence(self.norm_type)}{first_nonfinite_sentence(entries)}")

    def _skips(
        self,
        optimizer: torch.optim.Optimizer,
        total_norm: Tensor,
        parts: list["_Part"],
        found_inf: Tensor | None,
        reads_amp: bool,
        loss: Any,
    ) -> Tensor | None:
        """Raises _StepSkippedError; or whether torch's fused step is to skip, as a tensor on a GPU. None: it is not."""
        # The first step of a fused SGD makes momentum buffers, which it leaves uninitialised if it skips.
        begins_momentum = _begins_momentum(optimizer)
        if found_inf is not None and begins_momentum and found_inf:
            raise _StepSkippedError(self, loss)
        conditions = [~total_norm.isfinite()] if self._nonfinite == "skip" else []
        if self._skip_above is not None:
            conditions += [part.norm > self._skip_above * part.max_norm for part in parts if part.max_norm is not None]
        if not conditions:
            return None
        skips = torch.stack(conditions).any()
        if found_inf is not None:
            # GradScaler skips this step, and counts it.
            skips = skips & (found_inf.to(skips.device) == 0)
        if reads_amp and not begins_momentum and not _is_on_host(skips):
            return skips
        if skips:
            self.skipped = self.skipped.to(skips.device) + 1
            raise _StepSkippedError(self, loss)
        return None


class _Part(NamedTuple):
    """Gradients with one bound."""

    gradients: Gradients
    norm: Tensor  # without GradScaler's scale
    max_norm: float | Tensor | None


class _StepSkippedError(BaseException):
    """Ends a step before the optimizer changes anything; the wrapper of the handle's step() catches it.

    A BaseException, because the step of an optimizer may catch the errors of a closure.
    """

    def __init__(self, handle: ClippingHandle, loss: Any) -> None:
        super().__init__()
        self.handle = handle
        self.loss = loss


def _number_or_none(max_norm: Any) -> float | None:
    return None if max_norm is None else float(max_norm)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without a wait for a GPU unless the host is to read it."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def _is_on_host(tensor: Tensor) -> bool:
    """Whether the host can read the tensor without a wait for a device."""
    return tensor.is_cpu


def _begins_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the next step of an SGD makes momentum buffers."""
    return isinstance(optimizer, torch.optim.SGD) and any(
        param.grad is not None and optimizer.state.get(param, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        if group["momentum"] != 0
        for param in group["params"]
    )


def _fold(optimizer: torch.optim.Optimizer, part: _Part, amp_scale: Tensor | None) -> None:
    """Lets torch's fused step scale the gradients as it reads them, if they need scaling."""
    assert part.max_norm is not None
    coefficient = torch.clamp(part.max_norm / (part.norm + 1e-6), max=1.0)
    divisor = (torch.ones_like(part.norm) if amp_scale is None else amp_scale.to(part.norm)) / coefficient
    if _is_on_host(divisor):
        value = coefficient.item()
        if value == 1:
            return
        # A coefficient of 0 or nan gives a divisor of inf or nan, with the right gradients.
        if value != 0 and not math.isnan(value) and not _is_normal_float32(divisor.item()):
            part.gradients.scale_(part.max_norm, part.norm)
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


def attach_clipping(
    optimizer: torch.optim.Optimizer,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    *,
    nonfinite: str = "propagate",
    skip_above: float | None = None,
) -> ClippingHandle:
    """Make optimizer.step() clip the gradients of all its parameters, as clip_grad_norm_ before the step.

        g = g min(1, max_norm / (total_norm + 1e-6))

    torch's fused SGD, Adam, AdamW and Adagrad scale gradients as they read them, which saves the pass that
    writes clipped gradients. For other optimizers, for DTensors, with max_norm=None or Adaptive, and if a
    gradient does not have the strides of its parameter, the gradients are scaled in place. With
    torch.amp.GradScaler the norm is that of the unscaled gradients, and the same step unscales, clips, and
    skips on inf. A step leaves nothing on the optimizer, also if it raises an error, and the policy's state
    is then as before; gradients that were scaled in place stay scaled. The state_dict does not change. A copy
    or a pickle of the optimizer does not clip, because it has no hooks.

    A skipped step does not change parameters, the optimizer's state, its step counts, or the policy's state.
    torch's fused optimizers skip without a wait for the GPU, except that SGD with momentum waits until its
    first step that is not skipped. Any other optimizer waits once in every step, as GradScaler does. On the
    CPU nothing waits. Post-hooks of step() do not run after a skipped step, unless a fused optimizer skips on a
    GPU.

    Args:
        optimizer: any optimizer except LBFGS. Gradients of a closure are clipped after each call of the
            closure. If the optimizer wraps another one (accelerate's, Lightning's,
            torch.distributed.optim.PostLocalSGDOptimizer), the inner optimizer clips.
        max_norm: the largest total norm allowed, in units of the gradients. None: each group has a bound of
            its own, param_group["max_norm"]; a group whose value is None is not clipped. If a checkpoint
            without this key is loaded, the values seen here hold. Or a policy that chooses the bound of each
            step, gradkernels.clipping.Percentile or ZScore, or that clips each unit, gradkernels.clipping.Adaptive.
        norm_type: p; 1, 2 and inf have kernels.
        nonfinite: what a step does if the total norm is nan or inf. "propagate": it clips, and nan and inf
            spread as in clip_grad_norm_. "skip": it is skipped, and counted in handle.skipped. "raise": it
            raises a RuntimeError with the name of the first parameter whose gradient is not finite, which
            waits for the device in every step. GradScaler skips its own steps under each of them.
        skip_above: skip the step, and count it in handle.skipped, if the norm is above skip_above times the
            bound; with max_norm=None, if the norm of any group is. A policy does not learn from skipped
            steps, so if all later norms are that large, all later steps are skipped.

    Returns:
        A handle with `.remove()`, `.last_norm`, `.skipped`, and the policy's `.state_dict()`.

    Raises:
        ValueError: optimizer is LBFGS, or a ZeroRedundancyOptimizer with overlap_with_ddp=True; no group has
            the max_norm that None refers to; nonfinite is another word; or skip_above is not positive, or
            given with Adaptive.
        TypeError: optimizer is not an Optimizer, or it is a wrapper without hooks that does not hold exactly
            one optimizer; or max_norm is not a number, None or a policy.
        RuntimeError: the parameters are pieces of a FullyShardedDataParallel model (FSDP1): call
            model.clip_grad_norm_(max_norm). In step(): a gradient is sparse, and torch is older than 2.14 or
            max_norm is Adaptive.

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
    if nonfinite not in _NONFINITE:
        raise ValueError(f"nonfinite must be one of {', '.join(map(repr, _NONFINITE))}, got {nonfinite!r}")
    if skip_above is not None and not float(skip_above) > 0:
        raise ValueError(f"skip_above must be a positive multiple of the bound, got {skip_above}")
    return ClippingHandle(optimizer, max_norm, norm_type, nonfinite, None if skip_above is None else float(skip_above))
