"""On a GPU: the cases of the other scripts beside eager, torch.compile and a copy, in 16 and 32 bits, with a cold and with a warm L2 cache.

Time is between two events on the stream, behind a kernel that waits until the calls are enqueued: it is the GPU's, not Python's. Cold:
memory of several times the L2 is written between two calls, outside the events. Bytes are those of the least traffic possible. The shapes
of batch norm are those of ResNet-50, EfficientNet-B0 and a YOLO of 640 pixels. What is not measured in SECONDS_IN_ALL is left out.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import bench_activation
import bench_batch_norm_act
from harness import COPY, HEADER_COPY_BYTES, Block, Case, Row, arguments, copy_of, gk, header, report_cases, rows_from

SHAPES = (
    *((64, 64, 112, 112), (64, 64, 56, 56), (64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7)),
    *((256, 64, 112, 112), (256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7)),
    *((64, 64, 320, 320), (64, 256, 80, 80), (64, 512, 40, 40), (64, 1024, 20, 20)),
    *((128, 32, 112, 112), (128, 96, 112, 112), (128, 144, 56, 56), (128, 240, 28, 28), (128, 672, 14, 14), (128, 1152, 7, 7)),
)
WITH_RESIDUAL = ((64, 256, 56, 56), (64, 2048, 7, 7))
CLIPPING = ((1000, 256, 1e9), (64, 1 << 20, 1e9), (64, 1 << 20, 1e-3))
# In bench/on_gpu.sh's share of time for it.
SECONDS_IN_ALL = 120.0
# A row's share of the time: a few calls before, some of which compile, then as many as fit.
SECONDS_OF_A_ROW = 0.08
CALLS_BEFORE = 3
LEAST_CALLS = 5
L2_TIMES = 4
# About a third of a millisecond, in which a forward and a backward pass are enqueued.
WAIT_CYCLES = 600_000


def clipping(count: int, elements: int, max_norm: float, dtype: torch.dtype) -> Case:
    parameters = [nn.Parameter(torch.empty(elements, dtype=dtype)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    size = sum(parameter.nbytes for parameter in parameters)

    def check() -> None:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        exact = torch.nn.utils.get_total_norm([grad.double() for grad in grads])
        torch.testing.assert_close(gk.get_total_norm(grads).double(), exact, rtol=torch.finfo(dtype).eps, atol=0)

    return Case(
        name=f"clip_grad_norm_ of {count} times {elements}{' that clips' * (max_norm < 1)}",
        providers={
            "eager": partial(torch.nn.utils.clip_grad_norm_, parameters, max_norm),
            "gradkernels": partial(gk.clip_grad_norm_, parameters, max_norm),
        },
        bytes=3 * size if max_norm < 1 else size,
        copied=size,
        prove=check,
        direction="in place",
        dtype=str(dtype).removeprefix("torch."),
    )


def cases() -> Iterator[Callable[[], Case]]:
    """What decides first; beside the compiler, which takes seconds for each case, in one dtype and layout."""
    bf16 = torch.bfloat16
    for name in bench_activation.FUNCTIONS:
        yield partial(bench_activation.case, name, "64 MiB", bf16, name != "rrelu")
    for each in CLIPPING:
        yield partial(clipping, *each, bf16)
    for shape in SHAPES:
        yield partial(bench_batch_norm_act.case, shape, "leaky_relu", False, "contiguous", bf16, True)
    for shape in WITH_RESIDUAL:
        yield partial(bench_batch_norm_act.case, shape, "relu", True, "contiguous", bf16, True)
    for dtype, layout in ((bf16, "channels_last"), (torch.float32, "contiguous"), (torch.float32, "channels_last")):
        for shape in SHAPES:
            yield partial(bench_batch_norm_act.case, shape, "leaky_relu", False, layout, dtype, False)
    for name in bench_activation.FUNCTIONS:
        yield partial(bench_activation.case, name, "64 MiB", torch.float32, False)
    for each in CLIPPING:
        yield partial(clipping, *each, torch.float32)


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


def main() -> None:
    options = arguments(__doc__)
    if not torch.cuda.is_available():
        print("bench_cuda: there is no GPU that torch can use, nothing is measured")
        return
    end_at = time.perf_counter() + SECONDS_IN_ALL
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
    rows: list[Row] = []
    made = list(cases())[: 1 if options.quick else None]
    for number, make in enumerate(made, 1):
        if time.perf_counter() > end_at:
            head["left out"] = f"{len(made) - number + 1} of {len(made)} cases, for want of time"
            break
        case = make()
        rows += rows_of(case, over_l2.zero_)
        print(f"{number}/{len(made)} {case.name}", file=sys.stderr)
        del case
        torch.cuda.empty_cache()
    report_cases("on a GPU", head, rows, options.json)


if __name__ == "__main__":
    main()
