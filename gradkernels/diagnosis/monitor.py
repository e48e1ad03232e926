"""GradientMonitor: what the gradient, weight, update and activation of each layer do while a model trains.

recorder.py records them. Here they are put together per layer, in the order in which layers run, and reported
as a table, a picture, a dict or scalars for TensorBoard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Protocol

import torch
from torch import nn

from gradkernels import text
from gradkernels.diagnosis import plots
from gradkernels.diagnosis.recorder import GRADIENT, UPDATE, WEIGHT, Recorder
from gradkernels.diagnosis.watch import Alarm
from gradkernels.layers import kind_of, unwrapped

_FIGURES = ("gradient_norm", "weight_norm", "update_ratio")


class Writer(Protocol):
    """What to_tensorboard needs of a writer, such as a torch.utils.tensorboard.SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


class GradientMonitor:
    """Record for each layer and step what vanishes and what explodes; a context manager.

        gradient norm   |g|        the norm of all gradients of a layer, as the optimizer gets them
        weight norm     |w|        after the step
        update          |dw| / |w| the change in the step relative to the weight, usually about 1e-3

    For each module it also records the mean and the standard deviation of its output, the share of negative
    elements, and the share of units that are above 0 for no sample of the batch. After a relu such units are
    dead.

    A step is a call of step() of any optimizer that holds parameters of the model. Several optimizers that
    take turns make one step together. Gradients that are clipped before step(), or inside it by
    attach_clipping or RMSprop(max_norm=), are recorded clipped, unless record_gradients() is called before.

    An alarm hears of each layer whose gradient is not healthy, as alarm(name, step, reason, value):

        exploding    the norm is 6 standard deviations or more above the past of the layer; value is their
                     number
        collapsing   the norm is 6 or more below its past in 3 steps in a row; value is negative
        vanishing    the usual norm of late is less than 1e-3 times the largest one of the layers after it
                     (except for a normalisation), or 0 for 25 steps; value is the share
        non-finite   the norm is nan or inf; value is the norm

    The past is that of the logarithm of the norm: a mean and a standard deviation (0.25 at least) that move
    with a decay of 0.97, after 25 steps with a gradient. A norm enters it as if it were at most 3 standard
    deviations away. Each layer and reason is reported when it begins. The alarm hears of every step, whatever
    `every` is, but not at once, because a step does not wait for the device: it is called every `read_every`
    steps, when a report is read, and in remove(), for the steps that are complete by then. With an alarm,
    gradients are read when step() is called, before attach_clipping or RMSprop(max_norm=) clips them; with a
    closure they are read after the step. A step that a fused optimizer skips for GradScaler, since the scaled
    gradients overflowed, is reported as non-finite. The alarm hears of steps that attach_clipping skips, but not
    with a closure. If the alarm raises exceptions, the first one is logged with its traceback, and training goes
    on. The alarm may read reports of the monitor; it must not call remove(), because it is called inside a step.
    A monitor whose alarm is a lambda or a local function can be copied, but not pickled.

    Layers are in the order in which their first forward pass began. A frozen layer is recorded from the step
    on in which it first requires a gradient. A layer that is added to the model or replaced needs a new
    monitor. Parameters without elements are ignored. A sparse gradient counts as the dense gradient. A
    monitor that is entered again goes on with the next step.

    It works under DistributedDataParallel, where activations are those of this process. Under torch.compile
    there are no activations, and layers are in the order in which they are registered. With
    FullyShardedDataParallel (FSDP1) norms are those of the parts on this rank; with
    torch.distributed.fsdp.fully_shard they are those of the whole.

    Args:
        model: a model with parameters that require a gradient.
        every: the interval between recorded steps. 1 records each step.
        activations_every: the interval between steps with activations, which are recorded in the first
            forward pass in training mode. None records none.
        alarm: a function of (name, step, reason, value); "warn" for a RuntimeWarning per step and reason;
            None for no alarm.
        read_every: the interval between steps that fetch numbers from the device.

    Raises:
        TypeError: model is not a torch.nn.Module, or holds a torch.jit.ScriptModule; or alarm cannot be
            called.
        ValueError: no parameter requires a gradient; every, activations_every or read_every is not a whole
            number from 1 on; or alarm is a text other than "warn".

    Source: of the past of a norm: Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training",
    2025.

    Example:
        >>> import torch, gradkernels as gk
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with gk.GradientMonitor(model) as monitor:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(16, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> record = monitor.to_dict()
        >>> record["steps"], record["layers"], len(record["gradient_norm"])
        ([0, 1, 2], ['0', '2'], 3)
        >>> print(monitor.table().splitlines()[1].split())
        ['layer', '|g|', '|w|', '|dw|/|w|', 'mean', 'std', 'negative', 'never>0']

        >>> def alarm(name, step, reason, value):
        ...     print(f"step {step}: {name} is {reason}: {value}")
        >>> with gk.GradientMonitor(model, alarm=alarm):
        ...     model[2].weight.grad[0, 0] = torch.nan
        ...     optimizer.step()
        step 0: 2 is non-finite: nan
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        activations_every: int | None = 10,
        *,
        alarm: Alarm | Literal["warn"] | None = None,
        read_every: int = 32,
    ) -> None:
        intervals = {"every": every, "activations_every": activations_every, "read_every": read_every}
        for name, interval in intervals.items():
            is_none = interval is None and name == "activations_every"
            if not is_none and not (isinstance(interval, Integral) and interval >= 1):
                raise ValueError(f"{name} must be a whole number from 1 on, not {interval!r}")
        if isinstance(alarm, str) and alarm != "warn":
            raise ValueError(f'alarm must be a function or "warn", not {alarm!r}')
        if alarm is not None and alarm != "warn" and not callable(alarm):
            raise TypeError(f"alarm must be a function of (name, step, reason, value), not {kind_of(alarm)}")
        self.model = unwrapped(model)
        self.every = every
        self.activations_every = activations_every
        self._recorder = Recorder(self.model, every, activations_every, alarm, read_every)
        # The id of a writer -> the writer and the last step that it got. Writers need not be hashable or have
        # weak references. The id of a writer that is kept is not used again.
        self._written: dict[int, tuple[Writer, int]] = {}
        self._recorder.attach()

    def __enter__(self) -> GradientMonitor:
        self._recorder.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove every hook, and let the alarm hear of the last steps. What was recorded stays."""
        self._recorder.detach()

    def record_gradients(self) -> None:
        """Record the gradients now, between backward() and clipping, instead of after the step.

        The step is the next one, or inside a closure the one that is running.
        """
        self._recorder.record_gradients()

    def to_dict(self) -> dict[str, Any]:
        """Return everything recorded, as dicts, lists and numbers that json takes.

        Returns:
            A dict of S steps and L layers. "steps": S numbers; "layers": L names, in the order in which they run.
            "gradient_norm", "weight_norm", "update_ratio": S lists of L numbers, None if a layer had none. "activations":
            step -> module name -> mean, std, negative, dead. "milliseconds": the cost of a recorded step, for
            "gradients and weights" and for "activations".

        Raises:
            RuntimeError: no step was recorded.
        """
        recorder = self._recorder
        recorder.fetch()
        layers, figures = _figures(recorder, [*recorder.steps])
        return {
            "steps": [*recorder.steps],
            "layers": layers,
            **{name: [rows[kind] for rows in figures] for kind, name in enumerate(_FIGURES)},
            "activations": {
                step: {name: statistics._asdict() for name, statistics in modules.items()}
                for step, modules in recorder.activations.statistics.items()
            },
            "milliseconds": _milliseconds(recorder),
        }

    def table(self, step: int | None = None) -> str:
        """Return a table of one step: a line for each layer, then remarks and what recording cost.

        Column never>0 is the share of units that to_dict() calls dead. Before a sigmoid or a tanh such units
        do learn.

        Args:
            step: a recorded step; None is the last one. Activations are those recorded last, up to this step.

        Raises:
            RuntimeError: no step was recorded, or not this one.
        """
        recorder = self._recorder
        recorder.fetch()
        number = max(recorder.steps) if step is None else step
        if number not in recorder.steps:
            first, last = min(recorder.steps), max(recorder.steps)
            raise RuntimeError(f"step {number} was not recorded; recorded are steps {first} to {last} with every={self.every}")
        layers, (figures,) = _figures(recorder, [number])
        norms = dict(zip(layers, zip(*figures, strict=True), strict=True))
        activations_step = max((other for other in recorder.activations.statistics if other <= number), default=None)
        title = f"step {number}" + ("" if activations_step is None else f", activations of step {activations_step}")
        rows = _rows(recorder, norms, activations_step)
        return "\n".join([title, *text.columns(rows), *_remarks(recorder, norms, activations_step)])

    def __str__(self) -> str:
        return self.table()

    def to_tensorboard(self, writer: Writer) -> None:
        """Write every step that was recorded since the last call to a TensorBoard writer.

        Tags are gradient_norm/LAYER, weight_norm/LAYER, update_ratio/LAYER and activation_mean/MODULE,
        activation_std/MODULE, activation_negative/MODULE, activation_dead/MODULE.

        Args:
            writer: a torch.utils.tensorboard.SummaryWriter, or any object with its add_scalar.

        Raises:
            RuntimeError: no step was recorded.
        """
        recorder = self._recorder
        recorder.fetch()
        _, written = self._written.get(id(writer), (writer, -1))
        newest = max(recorder.steps)
        numbers = [number for number in recorder.steps if number > written]
        layers, figures = _figures(recorder, numbers) if numbers else ([], [])
        for number, rows in zip(numbers, figures, strict=True):
            for kind, values in zip(_FIGURES, rows, strict=True):
                for layer, value in zip(layers, values, strict=True):
                    if value is not None:
                        writer.add_scalar(f"{kind}/{layer}", value, number)
        for number, modules in sorted(recorder.activations.statistics.items()):
            if written < number <= newest:
                for name, statistics in modules.items():
                    for kind, value in statistics._asdict().items():
                        writer.add_scalar(f"activation_{kind}/{name}", value, number)
        self._written[id(writer)] = writer, newest

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the gradient norms over depth, and a heat map of layers and steps.

        Args:
            path: the file to write: .png, .pdf or .svg.

        Raises:
            RuntimeError: no step was recorded.
            ImportError: matplotlib is not installed.
        """
        recorder = self._recorder
        recorder.fetch()
        numbers = [*recorder.steps]
        layers, figures = _figures(recorder, numbers)
        norms = [rows[GRADIENT] for rows in figures]
        weights = {layer for parameter, layer in zip(recorder.parameters, recorder.layers, strict=True) if parameter.dim() > 1}
        last = {name: norm for name, norm in zip(layers, norms[-1], strict=True) if norm is not None}
        plots.gradient_flow(path, layers, [name in weights for name in layers], numbers, norms, text.first_to_last(last))


def _figures(recorder: Recorder, numbers: Sequence[int]) -> tuple[list[str], list[list[list[float | None]]]]:
    """Put the norms of parameters together to those of layers.

    Returns:
        The L layers; and for S steps the gradient norm, weight norm and relative update of each layer,
        [S][3][L], None if a layer had none.
    """
    learning = sorted(recorder.learning)
    names = [recorder.layers[place] for place in learning]
    layers = recorder.order.sort(dict.fromkeys(names))
    place_of = {name: place for place, name in enumerate(layers)}
    norms = torch.stack([recorder.steps[number].norms[:, learning] for number in numbers])
    known = torch.stack([recorder.steps[number].known[:, learning] for number in numbers])
    layer = torch.tensor([place_of[name] for name in names], device="cpu").expand_as(norms)
    empty = norms.new_zeros(*norms.shape[:2], len(layers))
    # Norms are divided by the largest of their layer first, because the square of 1e200 overflows.
    largest = empty.scatter_reduce(2, layer, norms, "amax")
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    of_layers = empty.scatter_add(2, layer, (norms / scale.gather(2, layer)).square()).sqrt() * scale
    is_known = empty.scatter_add(2, layer, known.double()) > 0
    # An update relative to a weight of 0 does not exist.
    of_layers[:, UPDATE] /= of_layers[:, WEIGHT]
    is_known[:, UPDATE] &= is_known[:, WEIGHT] & (largest[:, WEIGHT] != 0)
    pairs = zip(of_layers.tolist(), is_known.tolist(), strict=True)
    return layers, [
        [[value if here else None for value, here in zip(*row, strict=True)] for row in zip(*pair, strict=True)] for pair in pairs
    ]


def _rows(recorder: Recorder, norms: Mapping[str, tuple[float | None, ...]], activations_step: int | None) -> list[Sequence[str]]:
    """The rows of a table: a heading, and each layer or module with norms or activations."""
    activations = {} if activations_step is None else recorder.activations.statistics[activations_step]
    rows: list[Sequence[str]] = [("layer", "|g|", "|w|", "|dw|/|w|", "mean", "std", "negative", "never>0")]
    for name in recorder.order.sort(recorder.order.names.values()):
        if name in norms or name in activations:
            cells = [text.three_digits(value) for value in norms.get(name, (None, None, None))]
            statistics = activations.get(name)
            if statistics is None:
                cells += ["-"] * 4
            else:
                cells += [text.three_digits(statistics.mean), text.three_digits(statistics.std)]
                cells += [f"{statistics.negative:.0%}", f"{statistics.dead:.0%}"]
            rows.append((name, *cells))
    return rows


def _remarks(recorder: Recorder, norms: Mapping[str, tuple[float | None, ...]], activations_step: int | None) -> list[str]:
    """The lines below a table."""
    gradients = {name: gradient for name, (gradient, *_) in norms.items() if gradient is not None}
    remarks = [f"total gradient norm: {math.hypot(*gradients.values()):.4g}", text.first_to_last(gradients)]
    without = [name for name in norms if name not in gradients]
    if without:
        remarks.append(f"without a gradient: {text.first_names(without)}")
    nonfinite = [name for name, gradient in gradients.items() if not math.isfinite(gradient)]
    if nonfinite:
        remarks.append(f"gradient not finite: {text.first_names(nonfinite)}")
    activations = recorder.activations
    recorded = {name for modules in activations.statistics.values() for name in modules}
    missing = [name for module, name in activations.modules.items() if name not in recorded and any(True for _ in module.parameters())]
    if activations_step is not None and missing:
        remarks.append(f"no activations, because never called in training mode or without a suitable output: {text.first_names(missing)}")
    elif activations_step is None and activations.every is not None:
        remarks.append("no activations: there was no forward pass in training mode outside torch.compile")
    counts = {"gradients and weights": len(recorder.steps), "activations": len(activations.statistics)}
    costs = [f"{part} {cost:.3g} ms in each of {counts[part]} steps" for part, cost in _milliseconds(recorder).items() if counts[part]]
    return [*remarks, f"cost: {', '.join(costs)}"]


def _milliseconds(recorder: Recorder) -> dict[str, float]:
    """The cost of a recorded step."""
    activations = recorder.activations
    return {
        "gradients and weights": recorder.stopwatch.seconds() * 1e3 / max(len(recorder.steps), 1),
        "activations": activations.stopwatch.seconds() * 1e3 / max(len(activations.statistics), 1),
    }
