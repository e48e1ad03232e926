"""On a GPU: the cases of the other scripts beside eager, torch.compile and a copy, in 16 and 32 bits, with a cold and with a warm L2 cache.

Time is between two events on the stream, behind a kernel that waits until the calls are enqueued: it is the GPU's, not Python's. Cold:
memory of several times the L2 is written between two calls, outside the events. Bytes are those of the least traffic possible. The shapes
of batch norm are those of ResNet-50, EfficientNet-B0 and a YOLO of 640 pixels. What is not measured in SECONDS_IN_ALL is left out.

The file holds every case as soon as it is measured. One that fails is named in the header with its reason, the others are measured, and the
exit status is 1.
"""

import gc
import itertools
import operator
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bench_activation
import bench_batch_norm_act
from harness import COPY, HEADER_COPY_BYTES, Block, Case, Row, arguments, copy_of, gk, header, report_cases, rows_from, write

TITLE = "on a GPU"

SHAPES = (
    *((64, 64, 112, 112), (64, 64, 56, 56), (64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7)),
    *((256, 64, 112, 112), (256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7)),
    *((64, 64, 320, 320), (64, 256, 80, 80), (64, 512, 40, 40), (64, 1024, 20, 20)),
    *((128, 32, 112, 112), (128, 96, 112, 112), (128, 144, 56, 56), (128, 240, 28, 28), (128, 672, 14, 14), (128, 1152, 7, 7)),
)
WITH_RESIDUAL = ((64, 256, 56, 56), (64, 2048, 7, 7))
# Compiling takes ten times as long as measuring: beside the compiler stand these alone, in bfloat16, contiguous.
COMPILED_FUNCTIONS = ("swish",)
COMPILED_SHAPES = ((64, 256, 56, 56), (128, 672, 14, 14))
COMPILED_WITH_RESIDUAL = ((64, 256, 56, 56),)
# count, elements, whether it clips
CLIPPING = ((1000, 256, False), (64, 1 << 20, False), (64, 1 << 20, True))
# Half of what bench/on_gpu.sh gives: imports come before, and a case that begins in time may compile for half a minute.
SECONDS_IN_ALL = 100.0
# A row's share of the time: a few calls before, some of which compile, then as many as fit.
SECONDS_OF_A_ROW = 0.05
CALLS_BEFORE = 3
LEAST_CALLS = 5
L2_TIMES = 4
# About a millisecond, in which a forward and a backward pass are enqueued.
WAIT_CYCLES = 2_000_000


def clipping(count: int, elements: int, clips: bool, dtype: torch.dtype) -> Case:
    parameters = [nn.Parameter(torch.empty(elements, dtype=dtype)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    size = sum(parameter.nbytes for parameter in parameters)
    # The bound falls from call to call: what was clipped to one is not clipped to it again.
    half_the_norm = 0.5 * (count * elements) ** 0.5
    bounds = itertools.accumulate(itertools.repeat(0.99), operator.mul, initial=half_the_norm) if clips else itertools.repeat(1e9)

    def check() -> None:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        exact = torch.nn.utils.get_total_norm([grad.double() for grad in grads])
        torch.testing.assert_close(gk.get_total_norm(grads).double(), exact, rtol=torch.finfo(dtype).eps, atol=0)

    return Case(
        name=f"clip_grad_norm_ of {count} times {elements}{' that clips' * clips}",
        providers={
            "eager": lambda: torch.nn.utils.clip_grad_norm_(parameters, next(bounds)),
            "gradkernels": lambda: gk.clip_grad_norm_(parameters, next(bounds)),
        },
        bytes=3 * size if clips else size,
        copied=size,
        prove=check,
        direction="in place",
        dtype=str(dtype).removeprefix("torch."),
    )


def cases() -> Iterator[Callable[[], Case]]:
    """What decides first: each operator and shape in bfloat16, as networks are trained, then beside the compiler, then in float32."""
    for dtype in (torch.bfloat16, torch.float32):
        made = [
            partial(bench_activation.case, name, "64 MiB", dtype, dtype == torch.bfloat16 and name in COMPILED_FUNCTIONS)
            for name in bench_activation.FUNCTIONS
        ]
        made += [partial(clipping, *each, dtype) for each in CLIPPING]
        for act, residual, shapes, compiled in (
            ("relu", True, WITH_RESIDUAL, COMPILED_WITH_RESIDUAL),
            ("leaky_relu", False, SHAPES, COMPILED_SHAPES),
        ):
            for shape, layout in itertools.product(shapes, ("contiguous", "channels_last")):
                is_compiled = (dtype, layout) == (torch.bfloat16, "contiguous") and shape in compiled
                made.append(partial(bench_batch_norm_act.case, shape, act, residual, layout, dtype, is_compiled))
        yield from sorted(made, key=lambda each: each.args[-1] is True)


def milliseconds(call: Callable[[], Any], flush: Callable[[], Any] | None) -> list[float]:
    """Of each of its calls."""
    for _ in range(CALLS_BEFORE):
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    end_at = time.perf_counter() + SECONDS_OF_A_ROW
    while time.perf_counter() < end_at or len(times) < LEAST_CALLS:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT_CYCLES)
        if flush is not None:
            flush()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def rows_of(case: Case, flush: Callable[[], Any]) -> list[Row]:
    case.prove()
    source = torch.empty(case.copied, dtype=torch.uint8)
    destination = torch.empty_like(source)
    providers = case.providers | {"copy": lambda: destination.copy_(source)}
    rows = []
    for cache, between in (("cold", flush), ("warm", None)):
        measured = {name: [Block(each / 1e3) for each in milliseconds(call, between)] for name, call in providers.items()}
        rows += rows_from(case, f"{cache} L2", measured)
    return rows


def measured(
    made: Sequence[Callable[[], Case]], flush: Callable[[], Any], head: dict[str, Any], file: Path | None, until: float
) -> list[Row]:
    """The rows of all cases that begin before `until`; the header says what failed and what is left out."""
    rows: list[Row] = []
    failed: list[str] = []
    head["left out"] = f"{len(made)} of {len(made)} cases, for want of time"
    for number, make in enumerate(made, 1):
        if time.perf_counter() > until:
            break
        name = f"{make.func.__module__}.{make.func.__name__}{make.args}"
        try:
            # A case holds itself, by the functions that make its parts.
            gc.collect()
            torch.cuda.empty_cache()
            rows += rows_of(make(), flush)
        except (Exception, SystemExit) as error:
            first_line = str(error).partition("\n")[0]
            failed.append(f"{name}: {type(error).__name__}: {first_line}")
            head["failed"] = f"{len(failed)} of {len(made)} cases. {'; '.join(failed)}"
        if number < len(made):
            head["left out"] = f"{len(made) - number} of {len(made)} cases, for want of time"
        else:
            del head["left out"]
        if file is not None:
            write(TITLE, head, rows, file)
        print(f"{number}/{len(made)} {name}", file=sys.stderr)
    return rows


def main() -> None:
    options = arguments(__doc__)
    if not torch.cuda.is_available():
        print("bench_cuda: there is no GPU that torch can use, nothing is measured")
        return
    until = time.perf_counter() + SECONDS_IN_ALL
    head = header()
    torch.set_default_device("cuda")
    copy_seconds = statistics.median(milliseconds(copy_of(HEADER_COPY_BYTES), None)) / 1e3
    head |= {
        # Results have a file of their own, named after the GPU.
        "machine": f"{torch.cuda.get_device_name()}, {head['machine']}",
        "CUDA": str(torch.version.cuda),
        "caches": "cold L2: flushed before each call; warm L2: as the call before left it",
        COPY: round(2 * HEADER_COPY_BYTES / copy_seconds / 1e9, 1),
    }
    over_l2 = torch.empty(L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8)
    rows = measured(list(cases())[: 1 if options.quick else None], over_l2.zero_, head, options.json, until)
    report_cases(TITLE, head, rows, options.json)
    if "failed" in head:
        raise SystemExit(f"failed: {head['failed']}")


if __name__ == "__main__":
    main()
