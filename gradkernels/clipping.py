"""Policies of clipping: how attach_clipping chooses the bound of a step from the norms of the steps before.

A policy holds its options and never changes. The state belongs to the ClippingHandle: tensors on the device of
the gradients, updated there without waiting for the device.
"""

import math
import operator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

State: TypeAlias = dict[str, Tensor]

# Of Kumar et al.: the number of steps that only measure, and what keeps the z-score finite if all norms are equal.
_WARM_UP_STEPS = 25
_EPS = 1e-6


@dataclass(frozen=True)
class Percentile:
    """Clips to a percentile of the total norms so far (AutoClip).

        max_norm = numpy.percentile(the last `window` total norms and this one's, q)

    Interpolation is linear. The norm of this step counts, so the first step is not clipped. Total norms that
    are not finite are not recorded, and neither are those of skipped steps.

    Args:
        q: the percentile, from 0 to 100.
        window: the number of norms, at least 1; the paper keeps all norms.

    Raises:
        ValueError: q is outside [0, 100], or window is less than 1.
        TypeError: q is not a number, or window is not an integer.

    Source: Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: Adaptive Gradient Clipping for Source Separation
    Networks", 2020.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = torch.zeros(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = gk.attach_clipping(optimizer, gk.clipping.Percentile(q=50.0))
        >>> for norm in (1.0, 3.0):
        ...     weight.grad = torch.tensor([norm])
        ...     optimizer.step()
        >>> weight.grad
        tensor([2.0000])
    """

    q: float = 10.0
    window: int = 1000

    def __post_init__(self) -> None:
        if not 0 <= self.q <= 100:
            raise ValueError(f"q must be a percentile from 0 to 100, got {self.q}")
        if operator.index(self.window) < 1:
            raise ValueError(f"window must be at least 1 norm, got {self.window}")

    def initial_state(self, total_norm: Tensor) -> State:
        """The state before the first step, on the device of this norm."""
        # nan stands for a norm that is still to come. sort() puts it last.
        return {"norms": total_norm.new_full((self.window,), math.nan), "count": total_norm.new_zeros((), dtype=torch.int64)}

    def bound(self, state: State, total_norm: Tensor) -> tuple[Tensor, State]:
        """The largest norm allowed in this step, and the state after it."""
        count = state["count"] + 1
        is_here = torch.arange(self.window, device=total_norm.device) == state["count"] % self.window
        norms = torch.where(is_here, total_norm, state["norms"])
        position = (count.clamp(max=self.window) - 1).to(total_norm.dtype) * (self.q / 100)
        below = position.floor()
        neighbours = norms.sort().values.index_select(0, torch.stack([below, position.ceil()]).long())
        return torch.lerp(neighbours[0], neighbours[1], position - below), {"norms": norms, "count": count}


@dataclass(frozen=True)
class ZScore:
    """Clips a total norm that is far above its running mean (ZClip, with reciprocal clipping).

        z = (total_norm - mean) / (std + 1e-6)
        max_norm = mean + threshold^2 / z std                   if z > threshold; else nothing is clipped
        mean = decay mean + (1 - decay) norm                    norm = min(total_norm, max_norm)
        std^2 = decay std^2 + (1 - decay) (norm - mean)^2

    The first 25 steps are not clipped; mean and std are then those of their norms. Total norms that are not
    finite do not change mean and std, and neither do those of skipped steps.

    Args:
        threshold: the largest z-score that is not clipped, greater than 0.
        decay: the weight of the old mean and variance, in [0, 1).

    Raises:
        ValueError: threshold is not positive, or decay is outside [0, 1).
        TypeError: threshold or decay is not a number.

    Source: Kumar, Owen, Roy Chowdhury, Guera, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = torch.zeros(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = gk.attach_clipping(optimizer, gk.clipping.ZScore())
        >>> for norm in [0.9, 1.1] * 13 + [100.0]:
        ...     weight.grad = torch.tensor([norm])
        ...     optimizer.step()
        >>> weight.grad < 1.01
        tensor([True])
    """

    threshold: float = 2.5
    decay: float = 0.97

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be a positive z-score, got {self.threshold}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")

    def initial_state(self, total_norm: Tensor) -> State:
        """The state before the first step, on the device of this norm."""
        count = total_norm.new_zeros((), dtype=torch.int64)
        return {"mean": torch.zeros_like(total_norm), "variance": torch.zeros_like(total_norm), "count": count}

    def bound(self, state: State, total_norm: Tensor) -> tuple[Tensor, State]:
        """The largest norm allowed in this step, inf if it is not clipped, and the state after it."""
        mean, variance, count = state["mean"], state["variance"], state["count"] + 1
        warms_up = count <= _WARM_UP_STEPS
        std = variance.sqrt()
        z = (total_norm - mean) / (std + _EPS)
        is_spike = (z > self.threshold) & ~warms_up
        spike_bound = mean + self.threshold * (self.threshold / z) * std
        norm = torch.where(is_spike, spike_bound, total_norm)
        # In the warm-up each norm has the same weight, which Welford's update of the variance needs.
        weight = torch.where(warms_up, 1 / count.to(mean.dtype), 1 - self.decay)
        new_mean = torch.lerp(mean, norm, weight)
        deviation = (norm - new_mean) * (norm - torch.where(warms_up, mean, new_mean))
        new_state = {"mean": new_mean, "variance": torch.lerp(variance, deviation, weight), "count": count}
        return torch.where(is_spike, spike_bound, math.inf), new_state


@dataclass(frozen=True)
class Adaptive:
    """Clips each unit by the norm of its weights, as adaptive_clip_grad_ (AGC). It has no state.

    Args:
        clip_factor: the largest ratio of the norm of a gradient to that of its weights, greater than 0.

    Raises:
        ValueError: clip_factor is not positive.
        TypeError: clip_factor is not a number.

    Source: Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without
    Normalization", 2021.

    Example:
        >>> import torch, gradkernels as gk
        >>> weight = torch.ones(4, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = gk.attach_clipping(optimizer, gk.clipping.Adaptive())
        >>> weight.grad = torch.full((4,), 3.0)
        >>> optimizer.step()
        >>> weight.grad, handle.last_norm
        (tensor([0.0100, 0.0100, 0.0100, 0.0100]), tensor(6.))
    """

    clip_factor: float = 0.01

    def __post_init__(self) -> None:
        if not self.clip_factor > 0:
            raise ValueError(f"clip_factor must be a positive ratio of norms, got {self.clip_factor}")


# The policies whose bound depends on the norms of the steps before.
Tracking: TypeAlias = Percentile | ZScore
Policy: TypeAlias = Tracking | Adaptive
