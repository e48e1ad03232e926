"""The hooks of Lightning's callbacks, without its Callback class, which has two homes (integrations/__init__.py)."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from torch.optim import Optimizer

from gradkernels.diagnosis.monitor import GradientMonitor
from gradkernels.diagnosis.watch import Alarm
from gradkernels.integrations.metric_rows import MetricRows
from gradkernels.optim import ClippingHandle, attach_clipping


class ClipGradients:
    """Clip inside the optimizers of a Trainer, with gradkernels.attach_clipping, and log the norm before clipping.

    Unlike gradient_clip_val this works with fused optimizers in 16-bit mixed precision. Each optimizer clips its
    own gradients. The metric is "gradient_norm", with a number if there are several optimizers.

    A checkpoint holds the state of a policy and the number of skipped steps, and fit(ckpt_path=) goes on with
    them. If max_norm is another kind of policy by then, it begins without a history, and a warning says so.

    Args:
        max_norm: as in attach_clipping, also a policy.
        **options: further arguments of attach_clipping.

    Raises:
        ValueError: when fit() starts, if the Trainer has gradient_clip_val.
    """

    def __init__(self, max_norm: Any, **options: Any) -> None:
        self.max_norm, self.options = max_norm, options
        self.handles: list[ClippingHandle] = []
        # The states of the handles: those of a checkpoint, for the next fit(), and those at the end of the last.
        self._loaded: list[dict[str, Any]] = []
        self._last: list[dict[str, Any]] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # test(ckpt_path=) loads a state too, which is not for a later fit().
        self._loaded = []

    def state_dict(self) -> dict[str, Any]:
        return {"handles": [handle.state_dict() for handle in self.handles] or self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["handles"]
        self._load()

    def _load(self) -> None:
        """Give the handles the states of a checkpoint. Some strategies load it after on_fit_start."""
        if self.handles:
            for handle, state in zip(self.handles, self._loaded, strict=False):
                try:
                    handle.load_state_dict(state)
                except ValueError as error:
                    warnings.warn(f"ClipGradients begins without a history: {error}", RuntimeWarning, stacklevel=2)
            self._loaded = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.gradient_clip_val:
            raise ValueError(f"ClipGradients and gradient_clip_val={trainer.gradient_clip_val} would both clip: remove one of them")
        for optimizer in trainer.optimizers:
            self.handles.append(attach_clipping(optimizer, self.max_norm, **self.options))
        self._load()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        for place, handle in enumerate(self.handles):
            if handle.last_norm is not None:
                pl_module.log("gradient_norm" + f"_{place}" * (len(self.handles) > 1), handle.last_norm)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        self._last = self.state_dict()["handles"]
        while self.handles:
            self.handles.pop().remove()


class WatchGradients:
    """Watch the gradients of the LightningModule with gradkernels.GradientMonitor, and log what it records.

    The alarm hears of every step. Recorded and logged is each step whose number is a multiple of the Trainer's
    log_every_n_steps: gradient_norm/LAYER, weight_norm/LAYER, update_ratio/LAYER and the statistics of
    activations, to every logger of the Trainer. Gradients are read before the Trainer clips them.

    Args:
        alarm: as in GradientMonitor.
        **options: further arguments of GradientMonitor. every and activations_every are log_every_n_steps unless
            they are given.

    Attributes:
        monitor: the GradientMonitor, from the start of fit() on; its records stay afterwards.
    """

    def __init__(self, alarm: Alarm | Literal["warn"] | None = "warn", **options: Any) -> None:
        self.alarm, self.options = alarm, options
        self.monitor: GradientMonitor | None = None
        self._rows: MetricRows | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        interval = max(trainer.log_every_n_steps, 1)
        options = {"every": interval, "activations_every": interval, **self.options}
        self.monitor = GradientMonitor(pl_module, alarm=self.alarm, **options)
        self._rows = MetricRows(self.monitor, trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        # A fused optimizer divides by the scale itself, in its step.
        if self.monitor is not None and not (has_scaler and getattr(optimizer, "_step_supports_amp_scaling", False)):
            self.monitor.record_gradients()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            self._log(trainer)

    def _log(self, trainer: Any) -> None:
        if self._rows is not None:
            for step, metrics in self._rows.new().items():
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step=step)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._log(trainer)
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        if self.monitor is not None:
            self.monitor.remove()
