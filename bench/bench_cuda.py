"""On a GPU: the cases of the other scripts beside eager, torch.compile and a copy, in 16 and 32 bits, with a cold and with a warm L2 cache.

Time is between two events on the stream. Cold: memory of several times the L2 is written between two calls, outside the events. Bytes are
those of the least traffic possible. The shapes of batch norm are those of ResNet-50, EfficientNet-B0 and a YOLO of 640 pixels.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import bench_activation
import bench_batch_norm_act
from harness import Case, Row, arguments, gk, header, report

SHAPES = (
    *((64, 64, 112, 112), (64, 64, 56, 56), (64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7)),
    *((256, 64, 112, 112), (256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7)),
    *((64, 64, 320, 320), (64, 256, 80, 80), (64, 512, 40, 40), (64, 1024, 20, 20)),
    *((128, 32, 112, 112), (128, 96, 112, 112), (128, 144, 56, 56), (128, 240, 28, 28), (128, 672, 14, 14), (128, 1152, 7, 7)),
)
WITH_RESIDUAL = ((64, 256, 56, 56), (64, 2048, 7, 7))
DTYPES = (torch.bfloat16, torch.float32)
# A row's share of the time: a few calls before, some of which compile, then as many as fit.
SECONDS_OF_A_ROW = 0.08
CALLS_BEFORE = 3
L2_TIMES = 4


def clipping(count: int, elements: int, max_norm: float) -> Case:
    parameters = [nn.Parameter(torch.empty(elements)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    size = sum(parameter.nbytes for parameter in parameters)

    def check() -> None:
        grads = [parameter.grad for parameter in parameters]
        torch.testing.assert_close(gk.get_total_norm(grads), torch.nn.utils.get_total_norm(grads), rtol=1e-2, atol=0)

    return Case(
        name=f"clip_grad_norm_ of {count} times {elements}{' that clips' * (max_norm < 1)}",
        providers={
            "eager": partial(torch.nn.utils.clip_grad_norm_, parameters, max_norm),
            "gradkernels": partial(gk.clip_grad_norm_, parameters, max_norm),
        },
        bytes=3 * size if max_norm < 1 else size,
        copied=size,
        prove=check,
        direction="",
    )


def cases(compiled: bool) -> Iterator[Callable[[], Case]]:
    for name in bench_activation.FUNCTIONS:
        yield partial(bench_activation.case, name, "64 MiB", compiled)
    for shape in SHAPES:
        for layout in ("contiguous", "channels_last"):
            yield partial(bench_batch_norm_act.case, shape, "leaky_relu", False, layout, compiled)
    for shape in WITH_RESIDUAL:
        yield partial(bench_batch_norm_act.case, shape, "relu", True, "contiguous", compiled)
    for count, elements, max_norm in ((1000, 256, 1e9), (64, 1 << 20, 1e9), (64, 1 << 20, 1e-3)):
        yield partial(clipping, count, elements, max_norm)


def milliseconds(call: Callable[[], Any], flush: Callable[[], Any] | None) -> list[float]:
    for _ in range(CALLS_BEFORE):
        call()
    torch.cuda.synchronize()
    times = []
    end_at = time.perf_counter() + SECONDS_OF_A_ROW
    while time.perf_counter() < end_at or len(times) < 5:
        if flush is not None:
            flush()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def rows_of(case: Case, dtype: torch.dtype, flush: Callable[[], Any]) -> list[Row]:
    case.prove()
    source = torch.empty(case.copied, dtype=torch.uint8)
    destination = torch.empty_like(source)
    providers = case.providers | {"copy": lambda: destination.copy_(source)}
    rows = []
    for cache, between in (("cold", flush), ("warm", None)):
        times = {name: milliseconds(call, between) for name, call in providers.items()}
        median = {name: statistics.median(each) / 1e3 for name, each in times.items()}
        for name in providers:
            p20, _, _, p80 = statistics.quantiles(times[name], n=5, method="inclusive")
            moved = 2 * case.copied if name == "copy" else case.bytes
            rows.append(
                Row(
                    case=case.name,
                    provider=name,
                    direction=case.direction,
                    dtype=str(dtype).removeprefix("torch."),
                    layout=case.layout,
                    outputs=f"{cache} L2",
                    median_us=median[name] * 1e6,
                    p20_us=p20 * 1e3,
                    p80_us=p80 * 1e3,
                    bytes=moved,
                    gb_per_s=moved / median[name] / 1e9,
                    of_copy=moved / median[name] / (2 * case.copied / median["copy"]),
                    times_eager=median["eager"] / median[name],
                )
            )
    return rows


if __name__ == "__main__":
    options = arguments(__doc__, "compile")
    if not torch.cuda.is_available():
        print("bench_cuda: there is no GPU that torch can use, nothing is measured")
        raise SystemExit(0)
    head = header() | {"GPU": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda)}
    torch.set_default_device("cuda")
    over_l2 = torch.empty(L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8)
    rows = []
    for dtype in DTYPES:
        torch.set_default_dtype(dtype)
        for make in list(cases(options.compile))[: 1 if options.quick else None]:
            rows += rows_of(make(), dtype, over_l2.zero_)
            torch.cuda.empty_cache()
    report(
        "on a GPU",
        head,
        {
            "case": lambda row: row.case if row.layout == "contiguous" else f"{row.case} {row.layout}",
            "dtype": lambda row: row.dtype,
            "L2": lambda row: row.outputs,
            "provider": lambda row: row.provider,
            "median us": lambda row: f"{row.median_us:,.1f}",
            "GB/s": lambda row: f"{row.gb_per_s:,.0f}",
            "of copy": lambda row: f"{row.of_copy:.0%}",
            "times eager": lambda row: f"{row.times_eager:.2f}",
        },
        rows,
        options.json,
    )
