"""GradientMonitor: what each layer's gradient, weight, update and activation do while a model trains.

Gradients, weights and updates are read in one pass behind every optimizer step, through torch's hook for all optimizers, so that nothing in
the training loop changes. Results stay on their device and are fetched many steps at a time: a step never waits for them. Activations
have to be read again, by forward hooks, and so are looked at every tenth step only. Layers are told in the order in which they run.
"""

from __future__ import annotations

import math
import sys
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from os import PathLike
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from gradkernels import text
from gradkernels.diagnosis import plots
from gradkernels.gradients import tensor_norms
from gradkernels.layers import by_first_call, layer_name, learns, unit_dim, unwrapped

# Results wait on their device for this many steps: 3 numbers to a parameter, 200 KB for a network of 100 layers.
_STEPS_PER_READ = 128


class Writer(Protocol):
    """What to_tensorboard asks of a writer; torch.utils.tensorboard.SummaryWriter is one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


class ActivationStatistics(NamedTuple):
    """Of one output: mean, standard deviation, share of elements below zero, share of units that are above zero nowhere in the batch."""

    mean: float
    std: float
    negative: float
    dead: float


def _is_running(optimizer: Optimizer) -> bool:
    """Whether a step of an optimizer is on the stack: one that raised ends without its hook."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_locals.get("self") is optimizer:
            return True
    return False


def statistics_of(y: Tensor, dim: int) -> Tensor:
    """ActivationStatistics as a tensor, float64 where the device has it."""
    y = y.detach()
    if y.dtype in (torch.float16, torch.bfloat16):
        y = y.float()
    std, mean = torch.std_mean(y, correction=0)
    negative = (y < 0).sum() / y.numel()
    dims = [each for each in range(y.dim()) if each != dim % y.dim()]
    largest = y.amax(dims) if dims else y
    dead = (largest <= 0).sum() / largest.numel()
    return torch.stack([each.to(std.dtype) for each in (mean, std, negative, dead)])


class _Stopwatch:
    """Time spent in some work: the device's where that is CUDA, else the caller's. Waits for nothing before it is read."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, device: torch.device, work: Callable[[], None]) -> None:
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            work()
            stop.record(stream)
            self._events.append((start, stop))
        else:
            begin = time.perf_counter()
            work()
            self._seconds += time.perf_counter() - begin

    def seconds(self) -> float:
        for start, stop in self._events:
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1e3
        self._events.clear()
        return self._seconds


class _Unread:
    """Numbers that still lie on their devices, each with who is to get them."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Callable[[Tensor], None]]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, values: Tensor, receive: Callable[[Tensor], None]) -> None:
        self._waiting.append((values, receive))

    def fetch(self) -> None:
        """One transfer for each device and dtype; received in float64."""
        grouped = defaultdict(list)
        for values, receive in self._waiting:
            grouped[values.device, values.dtype].append((values, receive))
        self._waiting.clear()
        for group in grouped.values():
            numbers = torch.cat([values for values, _ in group]).cpu().double()
            for part, (_, receive) in zip(numbers.split([len(values) for values, _ in group]), group, strict=True):
                receive(part)


_GRADIENT, _WEIGHT, _UPDATE = range(3)


class _Step:
    """Norms of one step, [3, P] for gradients, weights and updates of P parameters; one not given had no gradient, or was not stepped."""

    def __init__(self, parameters: int) -> None:
        self.norms = torch.zeros(3, parameters, dtype=torch.float64, device="cpu")
        self.given = torch.zeros(3, parameters, dtype=torch.bool, device="cpu")

    def receive(self, kind: int, places: list[int], norms: Tensor) -> None:
        self.norms[kind, places] = norms
        self.given[kind, places] = True


class _Hook:
    """Tells a monitor of a call of a module. A copy or pickle of the module keeps a hook that tells nobody."""

    def __init__(self, tell: Callable[..., None] | None = None) -> None:
        self._tell = tell

    def __call__(self, *call: object) -> None:
        # Asked first, so that torch.compile sees no more of this.
        if not torch.compiler.is_compiling() and self._tell is not None:
            self._tell(*call)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class GradientMonitor:
    """Records per layer and step what vanishes and what explodes; a context manager.

        gradient norm   |g|        of a layer's parameters as one vector, as the optimizer gets it
        weight norm     |w|        after the step
        update          |dw| / |w| what the step changed, relative to the weight; about 1e-3 is usual

    and of each module's output mean, standard deviation, the share of negative elements and the share of units that are above
    zero nowhere in the batch (behind a relu these are dead). A step is a call of step() of any optimizer that holds parameters of
    the model; several optimizers that take turns make one step together. Gradients that are clipped before step(), or in it by
    attach_clipping or RMSprop(max_norm=), are recorded clipped, unless record_gradients() is called before that.

    Layers are in the order in which their first forward pass entered them. A frozen layer is recorded from the first step on in which
    it requires a gradient, however late that is; a layer that is added to the model, or replaced, needs a new monitor. Parameters
    without elements do not count. A sparse gradient counts as the dense one would. Entered once more, a monitor goes on with the next
    step.

    Works under DistributedDataParallel (activations are those of this process) and torch.compile, which leaves activations out, and
    layers in the order in which they are registered. Of a FullyShardedDataParallel model (FSDP1) norms are those of this rank's
    pieces; torch.distributed.fsdp.fully_shard has whole ones.

    Args:
        model: with parameters that require a gradient.
        every: record every so many steps.
        activations_every: look at activations every so many steps, in the first forward pass in training mode; None never.

    Raises:
        TypeError: model is no torch.nn.Module, or holds a torch.jit.ScriptModule.
        ValueError: a model without parameters that require a gradient; every or activations_every no whole number from 1 on.

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
    """

    def __init__(self, model: nn.Module, every: int = 1, activations_every: int | None = 10) -> None:
        if not all(isinstance(count, Integral) and count >= 1 for count in (every, 1 if activations_every is None else activations_every)):
            raise ValueError(f"every and activations_every count steps from 1 on, not {every!r} and {activations_every!r}")
        self.model = unwrapped(model)
        named = [*self.model.named_parameters()]
        # Of all parameters, which grows as layers are unfrozen: those that there are figures for.
        self._learning = {place for place, (_, parameter) in enumerate(named) if learns(parameter)}
        if not self._learning:
            raise ValueError(f"{type(self.model).__name__} has no parameters that require a gradient: there is nothing to monitor")
        self.every = every
        self.activations_every = activations_every
        self._parameters = [parameter for _, parameter in named]
        self._place_of = {parameter: place for place, parameter in enumerate(self._parameters)}
        self._layer_of_place = [layer_name(name) for name, _ in named]
        self._snapshots: dict[int, Tensor] = {}

        self._step = -1
        self._stepped: set[int] = set()
        # The optimizer whose step is running.
        self._running: weakref.ref[Optimizer] | None = None
        # What record_gradients read, with the last step before it.
        self._gradients: tuple[int, list[int], Tensor] | None = None
        self._unread = _Unread()
        self._steps: dict[int, _Step] = {}
        self._activations: dict[int, dict[str, ActivationStatistics]] = {}
        self._written: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

        self._modules = {module: name for name, module in self.model.named_modules() if name and not any(True for _ in module.children())}
        with_layers = {name or "(model)": module for name, module in self.model.named_modules()}
        # All that a table has a line for.
        self._told = {module: name for name, module in with_layers.items() if module in self._modules or name in self._layer_of_place}
        # The place of each in the order of first calls, and the hooks that still wait for one.
        self._called: dict[str, int] = {}
        self._uncalled: dict[nn.Module, RemovableHandle] = {}
        self._watched: set[nn.Module] = set()
        self._watching = activations_every is not None
        self._unit_dim = 1
        self._gradients_time, self._activations_time = _Stopwatch(), _Stopwatch()

        self._handles: list[RemovableHandle] = []
        self._attach()

    def _attach(self) -> None:
        try:
            for handle in self._registered():
                self._handles.append(handle)
        except BaseException:
            self.remove()
            raise

    def _registered(self) -> Iterator[RemovableHandle]:
        yield register_optimizer_step_pre_hook(self._before_step)
        yield register_optimizer_step_post_hook(self._after_step)
        for module, name in self._told.items():
            if name not in self._called:
                self._uncalled[module] = module.register_forward_pre_hook(_Hook(self._before_first_call))
                yield self._uncalled[module]
        if self.activations_every is not None:
            for module in self._modules:
                yield module.register_forward_hook(_Hook(self._after_forward))

    def remove(self) -> None:
        """Takes every hook away; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._uncalled.clear()
        self._snapshots.clear()
        self._running = None

    def __enter__(self) -> GradientMonitor:
        if not self._handles:
            self._attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    # Recording

    def record_gradients(self) -> None:
        """Read the gradients now, between backward() and clipping, instead of behind the next step."""
        if (self._step + 1) % self.every == 0:
            self._gradients_time.time(self._device_of(self._learning), self._read_gradients)

    def _device_of(self, places: Iterable[int]) -> torch.device:
        return self._parameters[next(iter(places))].device

    @torch.no_grad()
    def _read_gradients(self) -> None:
        places, grads = self._given(self._learning_of(range(len(self._parameters))))
        self._gradients = self._step, places, tensor_norms(grads)[0]

    def _places(self, optimizer: Optimizer) -> list[int]:
        """Which of the model's parameters an optimizer holds that learn now."""
        held = (self._place_of.get(parameter) for group in optimizer.param_groups for parameter in group["params"])
        return self._learning_of(place for place in held if place is not None)

    def _learning_of(self, places: Iterable[int]) -> list[int]:
        """Those that learn now, of which there are figures from now on."""
        learning = [place for place in places if learns(self._parameters[place]) and not is_lazy(self._parameters[place])]
        self._learning.update(learning)
        return learning

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        places = self._places(optimizer)
        if not places or torch.compiler.is_compiling():
            return
        running = None if self._running is None else self._running()
        if running is not None and running is not optimizer and _is_running(running) and {*self._places(running)}.issuperset(places):
            # One that steps inside of another's step, as in ZeroRedundancyOptimizer, takes part of that step.
            return
        self._running = weakref.ref(optimizer)
        if self._step < 0 or not self._stepped.isdisjoint(places):
            self._begin_step()
        self._stepped.update(places)
        if self._step % self.every == 0:
            self._gradients_time.time(self._device_of(places), lambda: self._take_snapshots(places))

    def _begin_step(self) -> None:
        self._step += 1
        self._stepped.clear()
        self._watching = self.activations_every is not None and (self._step + 1) % self.activations_every == 0
        self._watched.clear()
        if self._step % _STEPS_PER_READ == 0:
            self._unread.fetch()

    def _take_snapshots(self, places: list[int]) -> None:
        for place in places:
            parameter, snapshot = self._parameters[place], self._snapshots.get(place)
            # model.double() changes parameters in place.
            if snapshot is None or (snapshot.shape, snapshot.dtype, snapshot.device) != (
                parameter.shape,
                parameter.dtype,
                parameter.device,
            ):
                self._snapshots[place] = torch.empty_like(parameter)
        torch._foreach_copy_([self._snapshots[place] for place in places], [self._parameters[place] for place in places])

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if self._running is None or self._running() is not optimizer:
            return
        self._running = None
        places = [place for place in self._places(optimizer) if place in self._snapshots]
        if places and self._step >= 0 and self._step % self.every == 0 and not torch.compiler.is_compiling():
            # What the step scaled gradients by as it read them, which they do not show.
            scale = getattr(optimizer, "_folded_coefficient", 1.0)
            self._gradients_time.time(self._device_of(places), lambda: self._record_step(places, scale))

    def _record_step(self, places: list[int], scale: float) -> None:
        step = self._steps.setdefault(self._step, _Step(len(self._parameters)))
        weights = [self._parameters[place].detach() for place in places]
        updates = [self._snapshots[place] for place in places]
        torch._foreach_sub_(updates, weights)
        if self._gradients is not None and self._gradients[0] >= self._step - 1:
            _, recorded, norms = self._gradients
            graded, grads = self._given(())
            self._unread.add(norms, lambda norms: step.receive(_GRADIENT, recorded, norms))
        else:
            graded, grads = self._given(places)

        def receive(norms: Tensor) -> None:
            count = len(places)
            step.receive(_WEIGHT, places, norms[:count])
            step.receive(_UPDATE, places, norms[count : 2 * count])
            step.receive(_GRADIENT, graded, norms[2 * count :] * scale)

        self._unread.add(tensor_norms(weights + updates + grads)[0], receive)

    def _given(self, places: Iterable[int]) -> tuple[list[int], list[Tensor]]:
        """The places that have a gradient, and the gradients."""
        given = [(place, grad) for place in places if (grad := self._parameters[place].grad) is not None]
        return [place for place, _ in given], [grad for _, grad in given]

    def _before_first_call(self, module: nn.Module, args: object) -> None:
        self._called.setdefault(self._told[module], len(self._called))
        if module in self._uncalled:
            self._uncalled.pop(module).remove()

    def _after_forward(self, module: nn.Module, args: object, output: object) -> None:
        if not self._watching or module in self._watched or not self.model.training:
            return
        self._unit_dim = unit_dim(module, self._unit_dim)
        y = output[0] if isinstance(output, tuple) and output else output
        if isinstance(y, Tensor) and y.is_floating_point() and y.numel() and y.dim() >= 2:
            self._watched.add(module)
            self._activations_time.time(y.device, lambda: self._record_activation(self._modules[module], y))

    @torch.no_grad()
    def _record_activation(self, name: str, y: Tensor) -> None:
        found = self._activations.setdefault(self._step + 1, {})

        def receive(numbers: Tensor) -> None:
            found[name] = ActivationStatistics(*numbers.tolist())

        self._unread.add(statistics_of(y, self._unit_dim), receive)

    # Reading

    def _fetch(self) -> None:
        self._unread.fetch()
        if not self._steps:
            raise RuntimeError(
                "GradientMonitor has recorded no step yet: it does so whenever an optimizer that holds parameters of the model takes one"
            )

    def _figures(self, numbers: Sequence[int]) -> tuple[list[str], list[list[list[float | None]]]]:
        """The L layers, and of each of S steps gradient norm, weight norm and relative update of each layer, [S][3][L]."""
        learning = sorted(self._learning)
        names = [self._layer_of_place[place] for place in learning]
        layers = by_first_call(dict.fromkeys(names), self._called)
        place_of = {name: place for place, name in enumerate(layers)}
        norms = torch.stack([self._steps[number].norms[:, learning] for number in numbers])
        given = torch.stack([self._steps[number].given[:, learning] for number in numbers])
        layer = torch.tensor([place_of[name] for name in names], device="cpu").expand_as(norms)
        empty = norms.new_zeros(*norms.shape[:2], len(layers))
        # Divided by the largest of its layer first, since the square of 1e200 is infinite.
        largest = empty.scatter_reduce(2, layer, norms, "amax")
        scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
        found = empty.scatter_add(2, layer, (norms / scale.gather(2, layer)).square()).sqrt() * scale
        there = empty.scatter_add(2, layer, given.double()) > 0
        # A weight that was 0 has no relative size.
        found[:, _UPDATE] /= found[:, _WEIGHT]
        there[:, _UPDATE] &= there[:, _WEIGHT] & (largest[:, _WEIGHT] != 0)
        pairs = zip(found.tolist(), there.tolist(), strict=True)
        return layers, [
            [[value if known else None for value, known in zip(*row, strict=True)] for row in zip(*pair, strict=True)] for pair in pairs
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything recorded, as lists and numbers that json takes.

        Returns:
            A dict of "steps" and "layers", the layers in the order in which they run; "gradient_norm", "weight_norm" and
            "update_ratio", for each step a list with one number for each layer, None where the layer had none; "activations": step ->
            module name -> mean, std, negative, dead; "milliseconds": the cost of a recorded step, for gradients and weights and for
            activations.

        Raises:
            RuntimeError: no step has been recorded.
        """
        self._fetch()
        layers, figures = self._figures([*self._steps])
        return {
            "steps": [*self._steps],
            "layers": layers,
            **{name: [rows[kind] for rows in figures] for kind, name in enumerate(("gradient_norm", "weight_norm", "update_ratio"))},
            "activations": {
                step: {name: found._asdict() for name, found in modules.items()} for step, modules in self._activations.items()
            },
            "milliseconds": self._milliseconds(),
        }

    def table(self, step: int | None = None) -> str:
        """One step for a person: a line for each layer, below what stands out and what it cost.

        never>0 is the share of units called dead in to_dict(): before a sigmoid or a tanh such a unit is as alive as any.

        Args:
            step: one of those recorded; None is the last one. Activations are those looked at last, up to then.

        Raises:
            RuntimeError: no step has been recorded, or not this one.
        """
        self._fetch()
        number = max(self._steps) if step is None else step
        if number not in self._steps:
            raise RuntimeError(
                f"step {number} was not recorded; those from {min(self._steps)} to {max(self._steps)} are, every {self.every}"
            )
        layers, (figures,) = self._figures([number])
        rows = dict(zip(layers, zip(*figures, strict=True), strict=True))
        looked_at = max((each for each in self._activations if each <= number), default=None)
        activations = {} if looked_at is None else self._activations[looked_at]
        order = [name for name in by_first_call(self._told.values(), self._called) if name in rows or name in activations]
        lines: list[Sequence[str]] = [("layer", "|g|", "|w|", "|dw|/|w|", "mean", "std", "negative", "never>0")]
        for name in order:
            norms = [text.three_digits(value) for value in rows.get(name, (None, None, None))]
            found = activations.get(name)
            shares = (
                ["-"] * 4
                if found is None
                else [text.three_digits(found.mean), text.three_digits(found.std), f"{found.negative:.0%}", f"{found.dead:.0%}"]
            )
            lines.append((name, *norms, *shares))
        title = f"step {number}" + ("" if looked_at is None else f", activations of step {looked_at}")
        return "\n".join([title, *text.columns(lines), *self._remarks(rows, looked_at)])

    def _remarks(self, rows: Mapping[str, tuple[float | None, ...]], looked_at: int | None) -> list[str]:
        gradients = {name: gradient for name, (gradient, *_) in rows.items() if gradient is not None}
        remarks = [f"gradient of all layers together: {math.hypot(*gradients.values()):.4g}"]
        remarks.append(text.first_to_last(gradients))
        without = [name for name in rows if name not in gradients]
        if without:
            remarks.append(f"without a gradient: {text.some(without)}")
        nonfinite = [name for name, gradient in gradients.items() if not math.isfinite(gradient)]
        if nonfinite:
            remarks.append(f"gradient not finite: {text.some(nonfinite)}")
        called = {name for modules in self._activations.values() for name in modules}
        silent = [name for module, name in self._modules.items() if name not in called and any(True for _ in module.parameters())]
        if looked_at is not None and silent:
            remarks.append(f"never called in training mode, or without an output to look at: {text.some(silent)}")
        elif looked_at is None and self.activations_every is not None:
            remarks.append("no activation seen: no forward pass in training mode outside torch.compile")
        counts = {"gradients and weights": len(self._steps), "activations": len(self._activations)}
        costs = [f"{what} {spent:.3g} ms in each of {counts[what]} steps" for what, spent in self._milliseconds().items() if counts[what]]
        return [*remarks, f"cost: {', '.join(costs)}"]

    def _milliseconds(self) -> dict[str, float]:
        """What a step that was recorded cost."""
        return {
            "gradients and weights": self._gradients_time.seconds() * 1e3 / max(len(self._steps), 1),
            "activations": self._activations_time.seconds() * 1e3 / max(len(self._activations), 1),
        }

    def __str__(self) -> str:
        return self.table()

    def to_tensorboard(self, writer: Writer) -> None:
        """Write every step recorded since the last call to a TensorBoard writer.

        Tags are gradient_norm/LAYER, weight_norm/LAYER, update_ratio/LAYER and activation_mean/MODULE, activation_std/MODULE,
        activation_negative/MODULE, activation_dead/MODULE.

        Args:
            writer: a torch.utils.tensorboard.SummaryWriter, or whatever has its add_scalar.

        Raises:
            RuntimeError: no step has been recorded.
        """
        self._fetch()
        last = self._written.get(writer, -1)
        numbers = [number for number in self._steps if number > last]
        layers, figures = self._figures(numbers) if numbers else ([], [])
        for number, rows in zip(numbers, figures, strict=True):
            for kind, values in zip(("gradient_norm", "weight_norm", "update_ratio"), rows, strict=True):
                for layer, value in zip(layers, values, strict=True):
                    if value is not None:
                        writer.add_scalar(f"{kind}/{layer}", value, number)
        for number in sorted(each for each in self._activations if last < each <= max(self._steps)):
            for name, found in self._activations[number].items():
                for kind, value in found._asdict().items():
                    writer.add_scalar(f"activation_{kind}/{name}", value, number)
        self._written[writer] = max(self._steps)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw gradient flow over depth, and a heat map of every layer over the steps, into a picture.

        Args:
            path: the file to write, .png, .pdf or .svg.

        Raises:
            RuntimeError: no step has been recorded.
            ImportError: matplotlib is not installed.
        """
        self._fetch()
        numbers = [*self._steps]
        layers, figures = self._figures(numbers)
        norms = [rows[_GRADIENT] for rows in figures]
        weights = {name for parameter, name in zip(self._parameters, self._layer_of_place, strict=True) if parameter.dim() > 1}
        last = {name: norm for name, norm in zip(layers, norms[-1], strict=True) if norm is not None}
        plots.gradient_flow(path, layers, [name in weights for name in layers], numbers, norms, text.first_to_last(last))
