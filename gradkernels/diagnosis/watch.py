"""The alarms of GradientMonitor: which layer's gradient explodes, collapses, vanishes or is not finite.

A layer is compared with its own past and with the layers after it. The norms come from recorder.py, some
steps at a time, so a step does not wait for them.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from gradkernels import text
from gradkernels.diagnosis.cures import POLICY_LINE
from gradkernels.diagnosis.forward_hooks import CallOrder
from gradkernels.diagnosis.thresholds import VANISHING_SHARE

Alarm: TypeAlias = Callable[[str, int, str, float], object]

EXPLODING, COLLAPSING, VANISHING, NON_FINITE = "exploding", "collapsing", "vanishing", "non-finite"

# exploding or collapsing: the norm of a layer's gradient is this many standard deviations from its own past,
# on a logarithmic axis. Smaller deviations occur in healthy trainings
# (test_a_healthy_training_raises_no_alarm).
ALARM_DEVIATIONS = 6.0
# A norm enters the past as if it were at most this many standard deviations from it. So a spike hardly moves
# the past, and a change that lasts becomes part of it.
LARGEST_ADDED = 3.0
# Below its past it must stay for this many steps: one batch that the model has learned already is healthy.
COLLAPSING_STEPS = 3
# A smaller standard deviation counts as this one. So a norm must change by a factor of exp(6 * 0.25) = 4.5 at
# least, also if the training is so quiet that a change of 2 % lies far from the past.
MIN_DEVIATION = 0.25
# The past is an exponential moving average with this decay, and is long enough after this many steps (Kumar
# et al., "ZClip", 2025). A gradient that is exactly 0 for so many steps counts as vanishing.
PAST_DECAY = 0.97
WARM_UP_STEPS = 25

# What a warning says of the first layer, whose value takes the place of {}.
_EXPLANATIONS = {
    EXPLODING: f"{{:.3g}} standard deviations above its past. {POLICY_LINE} clips such steps",
    COLLAPSING: "{:.3g} standard deviations below its past",
    VANISHING: "{:.3g} times the largest of the layers after it",
    NON_FINITE: "{}. gradkernels.diagnose(model, batch, loss_fn) finds the operator that produced it",
}
_EXPLANATION_OF_ZERO = f"{{:.3g}} for {WARM_UP_STEPS} steps"

_LOGGER = logging.getLogger(__name__)


class Event(NamedTuple):
    """The arguments of an alarm."""

    name: str
    step: int
    reason: str
    value: float


@dataclass
class Past:
    """The past of a layer: an exponential moving mean and variance of log |g|.

    Attributes:
        count: the number of norms that were added.
        mean: the mean of their logarithms.
        variance: the variance of their logarithms.
        zeros: the number of gradients of 0 since the last other one. They have no logarithm.
        below: the number of norms in a row that were far below the past.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    zeros: int = 0
    below: int = 0

    @property
    def is_long_enough(self) -> bool:
        return self.count >= WARM_UP_STEPS

    def deviations(self, norm: float) -> float:
        """The distance of a norm above 0 from the past, in standard deviations."""
        return (math.log(norm) - self.mean) / max(math.sqrt(self.variance), MIN_DEVIATION)

    def add(self, norm: float) -> None:
        """Add a norm."""
        if norm == 0:
            self.zeros += 1
            return
        self.zeros, self.count = 0, self.count + 1
        difference = math.log(norm) - self.mean
        if self.is_long_enough:
            largest = LARGEST_ADDED * max(math.sqrt(self.variance), MIN_DEVIATION)
            difference = min(max(difference, -largest), largest)
        # The first norms count alike.
        share = max(1 / self.count, 1 - PAST_DECAY)
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference**2)

    def typical(self) -> float | None:
        """The usual norm of late; None if the past is too short to tell."""
        if self.zeros >= WARM_UP_STEPS:
            return 0.0
        return math.exp(self.mean) if self.is_long_enough else None


class Watch:
    """Judges the gradient norms of steps, and calls an alarm.

    Args:
        alarm: the function to call, or "warn".
        layers: the layer of each parameter.
        order: the order in which layers run.
        exempt: layers that are not judged against the layers after them.
    """

    def __init__(self, alarm: Alarm | Literal["warn"], layers: Sequence[str], order: CallOrder, exempt: Collection[str]) -> None:
        self._alarm, self._layers, self._order, self._exempt = alarm, layers, order, exempt
        # Step -> the place of a parameter -> its norm.
        self._waiting: dict[int, dict[int, float]] = {}
        self._pasts: defaultdict[str, Past] = defaultdict(Past)
        # (layer, reason) of the last step in which the layer had a gradient.
        self._known: set[tuple[str, str]] = set()
        self._has_failed = False

    def receive(self, step: int, places: Sequence[int], norms: Tensor) -> None:
        """Take gradient norms of parameters. Several optimizers may each bring a part of a step."""
        self._waiting.setdefault(step, {}).update(zip(places, norms.tolist(), strict=True))

    def judge(self, steps: range) -> None:
        """Judge those of these steps that wait, in their order, and call the alarm."""
        # The alarm may read a report, which judges: by then none of these steps waits any more.
        waiting = {step: self._waiting.pop(step) for step in sorted(self._waiting) if step in steps}
        names = self._order.sort(dict.fromkeys(self._layers)) if waiting else []
        for step, norms in waiting.items():
            norms_of: dict[str, list[float]] = {}
            for place, norm in norms.items():
                norms_of.setdefault(self._layers[place], []).append(norm)
            self._call(self._events(step, {name: math.hypot(*norms_of[name]) for name in names if name in norms_of}))

    def _events(self, step: int, norms: Mapping[str, float]) -> list[Event]:
        """What is new in a step, in the order of the layers."""
        found = {(name, reason): value for name, norm in norms.items() for reason, value in self._compare_with_past(name, norm)}
        found |= {(name, VANISHING): share for name, share in self._vanishing(norms).items()}
        new = [Event(name, step, reason, value) for (name, reason), value in found.items() if (name, reason) not in self._known]
        self._known = {(name, reason) for name, reason in self._known if name not in norms} | {*found}
        return new

    def _compare_with_past(self, name: str, norm: float) -> list[tuple[str, float]]:
        if not math.isfinite(norm):
            return [(NON_FINITE, norm)]
        past = self._pasts[name]
        deviations = past.deviations(norm) if norm and past.is_long_enough else 0.0
        past.add(norm)
        past.below = past.below + 1 if deviations <= -ALARM_DEVIATIONS else 0
        if deviations >= ALARM_DEVIATIONS:
            return [(EXPLODING, deviations)]
        return [(COLLAPSING, deviations)] if past.below >= COLLAPSING_STEPS else []

    def _vanishing(self, norms: Mapping[str, float]) -> dict[str, float]:
        """Layer -> its usual norm as a share of the largest usual norm of the layers after it, if that is too small.

        A usual norm of 0 is too small, whatever the layers after it have.
        """
        shares, largest = {}, 0.0
        for name in reversed([*norms]):
            typical = self._pasts[name].typical()
            if typical is None:
                continue
            if typical == 0 or (typical < VANISHING_SHARE * largest and name not in self._exempt):
                shares[name] = typical and typical / largest
            largest = max(largest, typical)
        return dict(reversed(shares.items()))

    def _call(self, events: list[Event]) -> None:
        calls = [partial(_warn, events)] if self._alarm == "warn" else [partial(self._alarm, *event) for event in events]
        for call in calls:
            try:
                call()
            except Exception:
                self._report_exception()

    def _report_exception(self) -> None:
        """Log the exception that is handled, with its traceback, if it is the first one."""
        if not self._has_failed:
            self._has_failed = True
            _LOGGER.exception("the alarm of GradientMonitor raised an exception; training goes on, and later ones are not reported")


def _warn(events: Sequence[Event]) -> None:
    """One warning for all layers of a step with the same reason."""
    for reason, explanation in _EXPLANATIONS.items():
        group = [event for event in events if event.reason == reason]
        if group:
            first = group[0]
            names = text.first_names([event.name for event in group])
            if reason == VANISHING and first.value == 0:
                explanation = _EXPLANATION_OF_ZERO
            what = f"the norm in {first.name} is {explanation.format(abs(first.value))}"
            warnings.warn(f"step {first.step}: {reason} gradient in {names}; {what}", RuntimeWarning, stacklevel=2)
