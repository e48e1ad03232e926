"""What GradientMonitor records, as the metrics of a logger: one dict for each step."""

from __future__ import annotations

from contextlib import suppress

from gradkernels.diagnosis.monitor import GradientMonitor
from gradkernels.diagnosis.recorder import NothingRecordedError


class MetricRows:
    """A writer for GradientMonitor.to_tensorboard that collects the scalars of a step.

    Args:
        monitor: the monitor.
        first_step: the trainer's number of the monitor's step 0.
    """

    def __init__(self, monitor: GradientMonitor, first_step: int) -> None:
        self._monitor, self._first_step = monitor, first_step
        self._rows: dict[int, dict[str, float]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        # MLflow takes no parentheses.
        name = tag.replace("(model)", "model")
        self._rows.setdefault(self._first_step + global_step, {})[name] = scalar_value

    def new(self) -> dict[int, dict[str, float]]:
        """The trainer's step -> metrics, of the steps recorded since the last call."""
        # GradScaler may have skipped every step so far.
        with suppress(NothingRecordedError):
            self._monitor.to_tensorboard(self)
        rows, self._rows = self._rows, {}
        return rows
