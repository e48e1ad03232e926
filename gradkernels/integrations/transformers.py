"""Callbacks for the Trainer of transformers: clip inside the optimizer, and watch the gradients.

The Trainer calls its loggers before the callbacks that it is given, so these add to `logs` what callbacks
after them see, and to the Trainer's log_history.
"""

from __future__ import annotations

from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradkernels.diagnosis.monitor import GradientMonitor
from gradkernels.diagnosis.watch import Alarm
from gradkernels.integrations.metric_rows import MetricRows
from gradkernels.optim import ClippingHandle, attach_clipping


def _add(metrics: dict[str, float], logs: dict[str, float], state: TrainerState) -> None:
    """Add metrics to what is logged now."""
    logs.update(metrics)
    state.log_history[-1].update(metrics)


class ClipGradients(TrainerCallback):
    """Clip inside the optimizer of a Trainer, with gradkernels.attach_clipping, and log the norm before clipping.

    The metric is "gradient_norm". The Trainer calls its loggers before the callbacks it was given; to let them
    have the metric, put the callback first: trainer.callback_handler.callbacks.insert(0, callback).

    A checkpoint does not hold the state of a policy. The guide shows how to save handle.state_dict() with it.

    Args:
        max_norm: as in attach_clipping, also a policy.
        **options: further arguments of attach_clipping.

    Attributes:
        handle: what attach_clipping returned, from the start of train() on.

    Raises:
        ValueError: when train() starts, if the Trainer clips itself: its max_grad_norm is 1 unless it is set to
            0.
    """

    def __init__(self, max_norm: Any, **options: Any) -> None:
        self.max_norm, self.options = max_norm, options
        self.handle: ClippingHandle | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.max_grad_norm:
            raise ValueError(f"ClipGradients and max_grad_norm={args.max_grad_norm} would both clip: set max_grad_norm=0")
        self._remove()
        self.handle = attach_clipping(kwargs["optimizer"], self.max_norm, **self.options)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"] and self.handle is not None and self.handle.last_norm is not None:
            _add({"gradient_norm": self.handle.last_norm.item()}, kwargs["logs"], state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._remove()

    def _remove(self) -> None:
        """Also before train(): one that an exception ended has not called on_train_end."""
        if self.handle is not None:
            self.handle.remove()


class WatchGradients(TrainerCallback):
    """Watch the gradients of the model with gradkernels.GradientMonitor, and log what it records.

    The alarm hears of every step. Recorded is each step whose number is a multiple of logging_steps; what was
    recorded last is logged with the loss: gradient_norm/LAYER, weight_norm/LAYER, update_ratio/LAYER and the
    statistics of activations. As to the loggers, see ClipGradients. The Trainer clips before any callback is
    called, so with its max_grad_norm the alarm hears of clipped gradients: use ClipGradients instead.

    Args:
        alarm: as in GradientMonitor.
        **options: further arguments of GradientMonitor. every and activations_every are logging_steps unless they
            are given.

    Attributes:
        monitor: the GradientMonitor, from the start of train() on; its records stay afterwards.
    """

    def __init__(self, alarm: Alarm | Literal["warn"] | None = "warn", **options: Any) -> None:
        self.alarm, self.options = alarm, options
        self.monitor: GradientMonitor | None = None
        self._rows: MetricRows | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._remove()
        options = {"every": state.logging_steps, "activations_every": state.logging_steps, **self.options}
        self.monitor = GradientMonitor(kwargs["model"], alarm=self.alarm, **options)
        self._rows = MetricRows(self.monitor, state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"] and self._rows is not None:
            rows = self._rows.new()
            if rows:
                _add(rows[max(rows)], kwargs["logs"], state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._remove()

    def _remove(self) -> None:
        """Also before train(): one that an exception ended has not called on_train_end."""
        if self.monitor is not None:
            self.monitor.remove()
