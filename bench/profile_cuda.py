"""On a GPU: the time of each kernel by itself, from torch's profiler, with a cold L2 cache.

What a kernel's design predicts is a time without launches, gaps and Python; bench_cuda.py has what a call costs. Each case is measured as
gradkernels and as torch do it. The share in parentheses is the time that a copy of 2 GiB takes for the least traffic, of the time measured.
Least traffic, E = bytes of x: 2E forward and 3E backward; leaky_relu and rrelu, whose backward reads a mask of one bit an element instead
of x, 2E + E/32 each (E/16 in 16-bit types); clipping that clips 3E, and clipping that need not clip E, of gradients of E bytes. The norms
in training read up to E more forward and 2E more backward: what their second pass reads again and the cache has not kept. A line of JSON is
written after each case.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench_activation import FUNCTIONS, WITH_PARAMETER
from bench_batch_norm_act import ACTS
from bench_cuda import GROUP_NORMS, HEADER_COPY_BYTES, L2_TIMES, SHAPES, SWISH_SHAPES, milliseconds
from harness import EAGER, OURS, copy_of, gk

CALLS_BEFORE, CALLS = 2, 5
ELEMENTWISE_BYTES = 64 << 20
CLIPPED = {"ResNet-50, bfloat16": [(2048, 512)] * 20 + [(256,)] * 100, "1,000 tensors of 256": [(256,)] * 1000}
MASKED = ("leaky_relu", "rrelu")

Calls = dict[str, Callable[[], Any]]


class Measured(NamedTuple):
    """A case: the bytes of its tensor, the least bytes that each part moves, and the calls of each provider, by part."""

    bytes: int
    least: dict[str, int]
    providers: dict[str, Calls]


def kernels_of(call: Callable[[], Any], flush: Callable[[], Any]) -> dict[str, float]:
    """Median microseconds of each kernel of a call, by name, in the order of their first launch; the same name twice is summed."""
    for _ in range(CALLS_BEFORE):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            flush()
            # Its kernel marks the beginning and the end of a call.
            torch.cuda._sleep(1000)
            call()
            torch.cuda._sleep(1000)
        torch.cuda.synchronize()
    launched = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    calls: list[dict[str, float]] = []
    inside = False
    for event in sorted(launched, key=lambda event: event.time_range.start):
        if "spin_kernel" in event.name:
            inside = not inside
            calls += [{}] if inside else []
        elif inside:
            calls[-1][event.name] = calls[-1].get(event.name, 0.0) + event.time_range.elapsed_us()
    return {
        name: statistics.median(each.get(name, 0.0) for each in calls) for name in dict.fromkeys(name for each in calls for name in each)
    }


def norm_calls(shape: tuple[int, ...], channels_last: bool, act: str, dtype: torch.dtype, groups: int | None = None) -> Measured:
    """Forward and backward of each provider, in training; with a group for each channel, torch's instance norm."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats[len(shape)] if channels_last else torch.contiguous_format
    x, grad_y = (torch.randn(shape).to(dtype, memory_format=memory_format) for _ in range(2))
    # torch's group norm wants parameters of the type of x.
    weight, bias = ((torch.rand(shape[1]) + least).to(torch.float32 if groups is None else dtype) for least in (0.5, 0.0))
    # One of each for what is recorded for backward, which saves them, and for what is called again and again.
    running, recorded = ((torch.zeros(shape[1]), torch.ones(shape[1])) for _ in range(2))
    leaves = [each.requires_grad_() for each in (x, weight, bias)]
    forwards = {
        OURS: lambda *statistics: gk.batch_norm_act(x, *statistics, weight, bias, True, 0.1, 1e-5, act=act),
        EAGER: lambda *statistics: ACTS[act](F.batch_norm(x, *statistics, weight, bias, True, 0.1, 1e-5)),
    }
    if groups is not None:
        theirs = partial(F.instance_norm, x) if groups == shape[1] else partial(F.group_norm, x, groups)
        forwards = {
            OURS: lambda *_: gk.group_norm_act(x, groups, weight, bias, act=act),
            EAGER: lambda *_: ACTS[act](theirs(weight=weight, bias=bias)),
        }
    providers: dict[str, Calls] = {
        name: {
            "forward": partial(forward, *running),
            "backward": partial(torch.autograd.grad, forward(*recorded), leaves, grad_y, retain_graph=True),
        }
        for name, forward in forwards.items()
    }
    return Measured(x.nbytes, {"forward": 2 * x.nbytes, "backward": 3 * x.nbytes}, providers)


def activation_calls(name: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Measured:
    """Forward and backward of each provider; with a shape, its last dimension has a parameter for each channel."""
    x = torch.randn(shape or (ELEMENTWISE_BYTES // dtype.itemsize,)).to(dtype)
    if shape and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    grad_y, channels = torch.rand(x.shape).to(x), shape[1] if shape else 1
    parameters = [torch.full((channels,), 0.7, dtype=dtype)] if name in WITH_PARAMETER else []
    leaves = [each.requires_grad_() for each in (x, *parameters)]
    ours, eager, _ = FUNCTIONS[name]
    forwards = {OURS: partial(ours, *leaves), EAGER: partial(eager, *leaves)}
    mask_bytes = x.numel() // 8 if name in MASKED else 0
    least = {"forward": 2 * x.nbytes + mask_bytes, "backward": 2 * x.nbytes + mask_bytes if mask_bytes else 3 * x.nbytes}
    providers: dict[str, Calls] = {
        provider: {"forward": forward, "backward": partial(torch.autograd.grad, forward(), leaves, grad_y, retain_graph=True)}
        for provider, forward in forwards.items()
    }
    return Measured(x.nbytes, least, providers)


def clipping_calls(shapes: list[tuple[int, ...]]) -> Measured:
    parameters = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes]
    for each in parameters:
        each.grad = torch.randn_like(each)
    grad_bytes = sum(each.nbytes for each in parameters)
    # Each call clips what the one before has left.
    norms = (0.5**i for i in itertools.count())
    providers: dict[str, Calls] = {
        name: {"clips": lambda clip=clip: clip(parameters, next(norms)), "need not": partial(clip, parameters, 1e9)}
        for name, clip in ((OURS, gk.clip_grad_norm_), (EAGER, torch.nn.utils.clip_grad_norm_))
    }
    return Measured(grad_bytes, {"clips": 3 * grad_bytes, "need not": grad_bytes}, providers)


def cases() -> Iterator[tuple[str, Callable[[], Measured]]]:
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            act = "swish" if shape in SWISH_SHAPES else "leaky_relu"
            for layout in ("contiguous", "channels_last"):
                name = f"batch norm {act} {shape} {layout} {dtype}".replace("torch.", "")
                yield name, partial(norm_calls, shape, layout == "channels_last", act, dtype)
        for (shape, act, groups), layout in itertools.product(GROUP_NORMS, ("contiguous", "channels_last")):
            name = f"group norm {act} {shape} {groups} {layout} {dtype}".replace("torch.", "")
            yield name, partial(norm_calls, shape, layout == "channels_last", act, dtype, groups)
        for function in FUNCTIONS:
            yield f"{function} {dtype}".replace("torch.", ""), partial(activation_calls, function, dtype)
        for function in WITH_PARAMETER:
            for shape in ((64, 64, 56, 56), (64 * 56 * 56, 64), (64, 1024, 14 * 14)):
                yield f"{function} {shape} {dtype}".replace("torch.", ""), partial(activation_calls, function, dtype, shape)
        if dtype == torch.bfloat16:
            for name, shapes in CLIPPED.items():
                yield f"clip_grad_norm_ {name}", partial(clipping_calls, shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON, a line for each case")
    parser.add_argument("--seconds", type=float, default=120, metavar="N", help="cases that would begin later are left out")
    parser.add_argument("--only", nargs="*", default=[""], metavar="TEXT", help="the cases whose names contain one of these")
    parser.add_argument("--providers", nargs="*", default=[OURS, EAGER], choices=[OURS, EAGER])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("profile_cuda: torch finds no GPU here, so that nothing is measured")
    chosen = [(name, make) for name, make in cases() if any(text in name for text in options.only)]
    if not chosen:
        raise SystemExit(f"profile_cuda: no case has {' or '.join(options.only)} in its name")
    ends = time.monotonic() + options.seconds
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    flush = torch.zeros(L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size // 4).sum
    bytes_per_us = 2 * HEADER_COPY_BYTES / statistics.median(milliseconds(copy_of(HEADER_COPY_BYTES))) / 1e3
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"copy of 2 GiB: {bytes_per_us / 1e3:.0f} GB/s")
    left_out = failed = 0
    with options.out.open("w") as file:
        for name, make in chosen:
            if time.monotonic() > ends:
                left_out += 1
                continue
            try:
                case = make()
                row: dict[str, Any] = {"case": name, "bytes": case.bytes, "least_bytes": case.least, "copy_bytes_per_us": bytes_per_us}
                said = []
                for provider in options.providers:
                    for part, call in case.providers.get(provider, {}).items():
                        kernels = kernels_of(call, flush)
                        row[f"{provider}, {part}"] = kernels
                        total = sum(kernels.values())
                        said.append(f"{provider[:2]}{part[0]} {total:.1f} ({case.least[part] / bytes_per_us / total:.0%})")
                print(f"{name}: {'; '.join(said)}", flush=True)
            except Exception as error:
                failed += 1
                row = {"case": name, "failed": f"{type(error).__name__}: {error}"}
                print(f"{name}: {row['failed'][:300]}", flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()
    print(f"{len(chosen)} cases: {left_out} left out for lack of time, {failed} failed")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
