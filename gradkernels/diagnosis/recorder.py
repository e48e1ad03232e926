"""What GradientMonitor records of a training, through hooks of optimizers and modules. monitor.py reports it.

Gradients, weights and updates are read in one pass after every optimizer step, through torch's hooks for all
optimizers, so the training loop does not change. The norms stay on their device and are fetched for many
steps at a time, so no step waits for them. Activations have to be read once more, in forward hooks, which is
why that happens only in some steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from gradkernels.diagnosis.deferred import Stopwatch, Unread
from gradkernels.diagnosis.forward_hooks import ActivationRecorder, CallOrder
from gradkernels.diagnosis.watch import Alarm, Watch
from gradkernels.gradients import tensor_norms
from gradkernels.layers import NORMS, layer_name, learns
from gradkernels.optim import running_steps

GRADIENT, WEIGHT, UPDATE = range(3)


class NothingRecordedError(RuntimeError):
    """There is no step to report."""


class StepNorms:
    """The norms of one step for P parameters.

    Attributes:
        norms: [3, P], float64: of gradients, weights and updates.
        known: [3, P], bool: whether there is a norm. There is none without a gradient, or without a step.
    """

    def __init__(self, parameters: int) -> None:
        self.norms = torch.zeros(3, parameters, dtype=torch.float64, device="cpu")
        self.known = torch.zeros(3, parameters, dtype=torch.bool, device="cpu")

    def receive(self, kind: int, places: list[int], norms: Tensor) -> None:
        self.norms[kind, places] = norms
        self.known[kind, places] = True


class _GradientNorms(NamedTuple):
    """Norms of gradients that were read before the optimizer's step.

    Attributes:
        last: the last step that they belong to.
        places: the places of the parameters with a gradient.
        norms: their norms.
    """

    last: int
    places: list[int]
    norms: Tensor


class Recorder:
    """Records the norms of gradients, weights and updates in every optimizer step.

    A parameter is known by its place in the order of registration.

    Args:
        model: the model.
        every: the interval between recorded steps.
        activations_every: the interval between steps with activations; None records none.
        alarm: as in GradientMonitor.
        read_every: the interval between steps in which numbers are fetched from their device.

    Attributes:
        parameters: the parameters of the model.
        layers: the layer of each parameter.
        learning: the places of parameters with norms. There are more of them when layers are unfrozen.
        order: the order in which layers and modules run.
        activations: the recorder of activations.
        unread: norms that were not fetched yet.
        watch: judges the gradient norms of every step; None without an alarm.
        steps: step -> its norms, once they are fetched.
        stopwatch: the time that recording took, without activations.
    """

    def __init__(
        self, model: nn.Module, every: int, activations_every: int | None, alarm: Alarm | Literal["warn"] | None, read_every: int
    ) -> None:
        named = [*model.named_parameters()]
        self.parameters = [parameter for _, parameter in named]
        self.layers = [layer_name(name) for name, _ in named]
        self.learning = {place for place, parameter in enumerate(self.parameters) if learns(parameter)}
        if not self.learning:
            raise ValueError(f"{type(model).__name__} has no parameters that require a gradient: there is nothing to monitor")
        modules = {module: name for name, module in model.named_modules() if name and not any(True for _ in module.children())}
        named_modules = {name or "(model)": module for name, module in model.named_modules()}
        self.order = CallOrder({module: name for name, module in named_modules.items() if module in modules or name in self.layers})
        self.watch: Watch | None = None
        if alarm is not None:
            normalisations = {name for name, module in named_modules.items() if isinstance(module, NORMS)}
            self.watch = Watch(alarm, self.layers, self.order, normalisations)
        self.unread = Unread()
        self.activations = ActivationRecorder(model, modules, activations_every, self.unread)
        self.steps: dict[int, StepNorms] = {}
        self.stopwatch = Stopwatch()
        self._every, self._read_every = every, read_every
        self._place_of = {parameter: place for place, parameter in enumerate(self.parameters)}
        self._step = -1
        # The places that optimizers have stepped in this step.
        self._stepped: set[int] = set()
        # The optimizer whose step is running.
        self._running: weakref.ref[Optimizer] | None = None
        # Gradients that record_gradients() has read, and those at the start of the step that is running.
        self._early: _GradientNorms | None = None
        self._at_start: _GradientNorms | None = None
        # Place -> its weight before the step.
        self._snapshots: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle has no hooks. The pickle of a handle would hold the hooks of all optimizers."""
        return {**self.__dict__, "_handles": [], "_running": None}

    def attach(self) -> None:
        """Register all hooks, or after an error none. Does nothing if they are registered."""
        if not self._handles:
            try:
                for handle in self._hooks():
                    self._handles.append(handle)
            except BaseException:
                self.detach()
                raise

    def _hooks(self) -> Iterator[RemovableHandle]:
        yield register_optimizer_step_pre_hook(self._before_step)
        yield register_optimizer_step_post_hook(self._after_step)
        yield from self.order.hooks()
        yield from self.activations.hooks()

    def detach(self) -> None:
        """Remove all hooks, and judge the last steps. What was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._snapshots.clear()
        self._running = None
        self._judge(self._step + 1)

    def _judge(self, end: int) -> None:
        """Fetch all norms, if there is an alarm, and judge the steps before this one."""
        if self.watch is not None:
            self.unread.fetch()
            self.watch.judge(range(end))

    def fetch(self) -> None:
        """Fetch all norms.

        Raises:
            NothingRecordedError: no step was recorded.
        """
        self.unread.fetch()
        # Another optimizer may still belong to the last step.
        self._judge(self._step)
        if not self.steps:
            raise NothingRecordedError(
                "GradientMonitor has not recorded a step yet: it records when an optimizer that holds parameters of the model steps"
            )

    def record_gradients(self) -> None:
        """Read the gradients now instead of after the next step, or the step that is running."""
        running = None if self._running is None else self._running()
        is_inside = running is not None and running_steps(running) > 0
        step = self._step if is_inside else self._step + 1
        if self._is_read(step):
            self._time(step, self.learning, lambda: self._read_early(step))

    @torch.no_grad()
    def _read_early(self, step: int) -> None:
        self._early = self._read_gradients(step, self._learning_of(range(len(self.parameters))))

    def _is_recorded(self, step: int) -> bool:
        return step % self._every == 0

    def _is_read(self, step: int) -> bool:
        """Whether the gradients of a step are read: to record them, or for the alarm."""
        return self._is_recorded(step) or self.watch is not None

    def _time(self, step: int, places: Iterable[int], work: Callable[[], None]) -> None:
        """Do work of a step, and measure its time if the step is recorded."""
        if self._is_recorded(step):
            self.stopwatch.time(self._device_of(places), work)
        else:
            work()

    def _device_of(self, places: Iterable[int]) -> torch.device:
        return self.parameters[next(iter(places))].device

    def _gradients_of(self, places: Iterable[int]) -> tuple[list[int], list[Tensor]]:
        """The places that have a gradient, and the gradients."""
        pairs = [(place, grad) for place in places if (grad := self.parameters[place].grad) is not None]
        return [place for place, _ in pairs], [grad for _, grad in pairs]

    def _read_gradients(self, step: int, places: Iterable[int]) -> _GradientNorms:
        with_gradient, grads = self._gradients_of(places)
        return _GradientNorms(step, with_gradient, tensor_norms(grads)[0])

    def _places_of(self, optimizer: Optimizer) -> list[int]:
        """The places of the parameters that an optimizer holds and that learn now."""
        held = (self._place_of.get(parameter) for group in optimizer.param_groups for parameter in group["params"])
        return self._learning_of(place for place in held if place is not None)

    def _learning_of(self, places: Iterable[int]) -> list[int]:
        """The places of parameters that learn now. They have norms from now on."""
        learning = [place for place in places if learns(self.parameters[place]) and not is_lazy(self.parameters[place])]
        self.learning.update(learning)
        return learning

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        places = self._places_of(optimizer)
        if not places or torch.compiler.is_compiling():
            return
        running = None if self._running is None else self._running()
        if running is not None and running_steps(running) > (running is optimizer) and {*self._places_of(running)}.issuperset(places):
            # A step inside another step, as super().step() or in ZeroRedundancyOptimizer, is part of that
            # step.
            return
        self._running = weakref.ref(optimizer)
        if self._step < 0 or not self._stepped.isdisjoint(places):
            self._begin_step()
        self._stepped.update(places)
        self._at_start = None
        # args[0] is the optimizer.
        has_closure = (args[1] if len(args) > 1 else kwargs.get("closure")) is not None
        if self._is_read(self._step):
            self._time(self._step, places, lambda: self._read_before_step(optimizer, places, has_closure))

    def _begin_step(self) -> None:
        self._step += 1
        self._stepped.clear()
        self.activations.begin_step(self._step + 1)
        if self._step % self._read_every == 0:
            self.unread.fetch()
            self._judge(self._step)

    def _read_before_step(self, optimizer: Optimizer, places: list[int], has_closure: bool) -> None:
        if self._is_recorded(self._step):
            self._take_snapshots(places)
        # An alarm has to see gradients before attach_clipping clips them, and also those of a step that it skips,
        # after which no post-hook runs. With a closure they do not exist yet.
        if self.watch is not None and not has_closure:
            read = self._early if self._early is not None and self._has_early() else self._read_scaled(optimizer, places)
            self._at_start = read
            self.unread.add(read.norms, partial(self.watch.receive, self._step, read.places))

    def _read_scaled(self, optimizer: Optimizer, places: list[int]) -> _GradientNorms:
        """Read the gradients, without the scale of a GradScaler that leaves the division to a fused optimizer."""
        read = self._read_gradients(self._step, places)
        scale = getattr(optimizer, "grad_scale", None)
        return read if scale is None else read._replace(norms=read.norms / scale.to(read.norms))

    def _has_early(self) -> bool:
        return self._early is not None and self._step <= self._early.last

    def _take_snapshots(self, places: list[int]) -> None:
        for place in places:
            parameter, snapshot = self.parameters[place], self._snapshots.get(place)
            # model.double() changes parameters in place.
            if snapshot is None or any(getattr(snapshot, kind) != getattr(parameter, kind) for kind in ("shape", "dtype", "device")):
                self._snapshots[place] = torch.empty_like(parameter)
        torch._foreach_copy_([self._snapshots[place] for place in places], [self.parameters[place] for place in places])

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if self._running is None or self._running() is not optimizer or running_steps(optimizer) > 1:
            return
        self._running = None
        places = self._places_of(optimizer)
        if places and self._step >= 0 and self._is_read(self._step) and not torch.compiler.is_compiling():
            # An optimizer that clips scales the gradients as it reads them, and leaves .grad as it was.
            scale = getattr(optimizer, "_folded_coefficient", 1.0)
            self._time(self._step, places, lambda: self._record_step(places, scale))

    def _record_step(self, places: list[int], scale: float) -> None:
        """Read the norms of this step, one pass over all tensors, and leave them on their device."""
        weights: list[Tensor] = []
        updates: list[Tensor] = []
        read = self._early if self._has_early() else self._at_start
        with_gradient, grads = self._gradients_of(places if read is None else ())
        if self._is_recorded(self._step):
            places = [place for place in places if place in self._snapshots]
            weights = [self.parameters[place].detach() for place in places]
            updates = [self._snapshots[place] for place in places]
        if updates:
            torch._foreach_sub_(updates, weights)
        norms = tensor_norms(weights + updates + grads)[0]
        of_weights, of_updates, of_grads = norms.split([len(weights), len(updates), len(grads)])
        if read is None:
            read = _GradientNorms(self._step, with_gradient, of_grads * scale)
        if self._is_recorded(self._step):
            step = self.steps.setdefault(self._step, StepNorms(len(self.parameters)))
            self.unread.add(of_weights, partial(step.receive, WEIGHT, places))
            self.unread.add(of_updates, partial(step.receive, UPDATE, places))
            self.unread.add(read.norms, partial(step.receive, GRADIENT, read.places))
        if self.watch is not None and self._at_start is None:
            self.unread.add(read.norms, partial(self.watch.receive, self._step, read.places))
