"""Numbers and times that stay on their device until they are read, so that recording does not wait."""

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor


class Stopwatch:
    """The time that some work took: on the device if that is CUDA, else in the caller."""

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


class Unread:
    """Numbers that still lie on their devices, each with the function that receives them.

    A monitor may be pickled at any time, so these are partials of methods and not local functions.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Callable[[Tensor], None]]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, numbers: Tensor, receive: Callable[[Tensor], None]) -> None:
        self._waiting.append((numbers, receive))

    def fetch(self) -> None:
        """Fetch all numbers in float64, with one transfer for each device and dtype."""
        groups = defaultdict(list)
        for numbers, receive in self._waiting:
            groups[numbers.device, numbers.dtype].append((numbers, receive))
        self._waiting.clear()
        for group in groups.values():
            fetched = torch.cat([numbers for numbers, _ in group]).cpu().double()
            for part, (_, receive) in zip(fetched.split([len(numbers) for numbers, _ in group]), group, strict=True):
                receive(part)
