"""What GradientMonitor records in forward hooks: the order of first calls, and statistics of outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradkernels.diagnosis.deferred import Stopwatch, Unread
from gradkernels.layers import by_first_call, unit_dim


class ActivationStatistics(NamedTuple):
    """Statistics of the output of one module.

    Attributes:
        mean: the mean of all elements.
        std: their standard deviation.
        negative: the share of elements below 0.
        dead: the share of units that are above 0 for no sample of the batch.
    """

    mean: float
    std: float
    negative: float
    dead: float


def statistics_of(y: Tensor, dim: int) -> Tensor:
    """ActivationStatistics of y as a tensor, in float32 or more. Units lie along dimension dim."""
    y = y.detach()
    if y.dtype in (torch.float16, torch.bfloat16):
        y = y.float()
    std, mean = torch.std_mean(y, correction=0)
    negative = (y < 0).sum() / y.numel()
    dims = [other for other in range(y.dim()) if other != dim % y.dim()]
    largest = y.amax(dims) if dims else y
    dead = (largest <= 0).sum() / largest.numel()
    return torch.stack([number.to(std.dtype) for number in (mean, std, negative, dead)])


class _Hook:
    """A hook of a module that calls a recorder. In a copy or pickle of the module it does nothing."""

    def __init__(self, receive: Callable[..., None] | None = None) -> None:
        self._receive = receive

    def __call__(self, *call: object) -> None:
        # is_compiling is asked first, so that torch.compile traces nothing else.
        if not torch.compiler.is_compiling() and self._receive is not None:
            self._receive(*call)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class CallOrder:
    """The order in which modules are first called.

    Args:
        names: module -> its name.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self.names = dict(names)
        self._places: dict[str, int] = {}
        self._waiting: dict[nn.Module, RemovableHandle] = {}

    def hooks(self) -> Iterator[RemovableHandle]:
        """Register a hook on each module that was not called yet. The hook goes with the first call."""
        self._waiting.clear()
        for module, name in self.names.items():
            if name not in self._places:
                self._waiting[module] = module.register_forward_pre_hook(_Hook(self._before_first_call))
                yield self._waiting[module]

    def _before_first_call(self, module: nn.Module, args: object) -> None:
        self._places.setdefault(self.names[module], len(self._places))
        if module in self._waiting:
            self._waiting.pop(module).remove()

    def sort(self, names: Iterable[str]) -> list[str]:
        return by_first_call(names, self._places)


class ActivationRecorder:
    """Records statistics of the outputs of modules, in the first forward pass in training mode of some steps.

    Args:
        model: the model, whose mode counts.
        modules: module -> its name.
        every: the interval between recorded steps; None records none.
        unread: where the numbers wait.

    Attributes:
        statistics: step -> module name -> ActivationStatistics.
        stopwatch: the time that recording took.
    """

    def __init__(self, model: nn.Module, modules: Mapping[nn.Module, str], every: int | None, unread: Unread) -> None:
        self.modules, self.every = dict(modules), every
        self.statistics: dict[int, dict[str, ActivationStatistics]] = {}
        self.stopwatch = Stopwatch()
        self._model, self._unread = model, unread
        self._recorded: set[nn.Module] = set()
        self._unit_dim = 1
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Forward passes from now on belong to this step."""
        self._step = step
        self._recorded.clear()

    def hooks(self) -> Iterator[RemovableHandle]:
        if self.every is not None:
            for module in self.modules:
                yield module.register_forward_hook(_Hook(self._after_forward))

    def _after_forward(self, module: nn.Module, args: object, output: object) -> None:
        if self.every is None or self._step % self.every or module in self._recorded or not self._model.training:
            return
        self._unit_dim = unit_dim(module, self._unit_dim)
        y = output[0] if isinstance(output, tuple) and output else output
        if isinstance(y, Tensor) and y.is_floating_point() and y.numel() and y.dim() >= 2:
            self._recorded.add(module)
            self.stopwatch.time(y.device, lambda: self._record(self.modules[module], y))

    @torch.no_grad()
    def _record(self, name: str, y: Tensor) -> None:
        self._unread.add(statistics_of(y, self._unit_dim), partial(self._receive, self._step, name))

    def _receive(self, step: int, name: str, numbers: Tensor) -> None:
        self.statistics.setdefault(step, {})[name] = ActivationStatistics(*numbers.tolist())
