"""On a GPU: the cases of the other scripts, in 16 and 32 bits, with a cold and with a warm L2 cache, and whole training steps.

Time is between two events on the stream, behind a kernel that waits until the call is enqueued: it is the GPU's, not Python's, where a call
is enqueued within a millisecond (clipping 1,000 tensors by torch and training steps are not). Cold: between two calls, outside the events,
several times as many bytes as the L2 holds are read, which leaves nothing to be written back. The shapes of batch norm are those of
ResNet-50, a YOLO of 640 pixels and EfficientNet-B0.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

import bench_activation
import bench_batch_norm_act
import bench_clip_grad
import bench_group_norm_act
import bench_training
from harness import COPY, Block, Blocks, Case, arguments, copy_of, header, run

# EfficientNet's batch norms are followed by swish.
SWISH_SHAPES = ((128, 32, 112, 112), (128, 96, 112, 112), (128, 144, 56, 56), (128, 240, 28, 28), (128, 672, 14, 14), (128, 1152, 7, 7))
SHAPES = (
    *((64, 64, 112, 112), (64, 64, 56, 56), (64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7)),
    *((256, 64, 112, 112), (256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7)),
    *((64, 64, 320, 320), (64, 256, 80, 80), (64, 512, 40, 40), (64, 1024, 20, 20)),
    *SWISH_SHAPES,
)
GROUP_NORMS = (*bench_group_norm_act.DIFFUSION, *bench_group_norm_act.VOLUMES)
WITH_RESIDUAL = ((64, 256, 56, 56), (64, 2048, 7, 7))
# Compiling one takes longer than measuring ten: these come last, in bfloat16.
COMPILED_BATCH_NORMS = (((64, 256, 56, 56), "leaky_relu"), ((128, 672, 14, 14), "swish"), ((64, 256, 56, 56), "relu", True))
# Of a parameter for each channel.
PARAMETRIC_SHAPES = (((64, 64, 56, 56), "contiguous"), ((64, 64, 56, 56), "channels_last"), ((64, 1024, 14, 14), "contiguous"))
CLIPPING = (("1,000 tensors of 256", "need not clip"), ("ResNet-50", "need not clip"), ("ResNet-50", "clips"))
TRAINED = {"ResNet-50": (64, 3, 224, 224), "EfficientNet blocks, SiLU": (64, 3, 224, 224)}
# Beyond any L2.
HEADER_COPY_BYTES = 2 << 30
L2_TIMES = 4
SECONDS_OF_A_PROVIDER = 0.05
CALLS_BEFORE, LEAST_CALLS = 3, 5
# About a millisecond.
WAIT_CYCLES = 2_000_000


def cases_in(dtype: torch.dtype) -> list[partial[Case]]:
    made = [partial(bench_activation.case, name, "64 MiB", dtype) for name in bench_activation.FUNCTIONS]
    parametric = product(bench_activation.WITH_PARAMETER, PARAMETRIC_SHAPES)
    made += [partial(bench_activation.case, name, shape, dtype, layout=layout) for name, (shape, layout) in parametric]
    made += [partial(bench_clip_grad.case, f"clip_grad_norm_ that {what}", model, dtype) for model, what in CLIPPING]
    batch_norms = [(shape, "relu", True) for shape in WITH_RESIDUAL] + [
        (shape, "swish" if shape in SWISH_SHAPES else "leaky_relu", False) for shape in SHAPES
    ]
    layouts = ("contiguous", "channels_last")
    made += [partial(bench_batch_norm_act.case, *each, layout, dtype) for each, layout in product(batch_norms, layouts)]
    group_norms = product(GROUP_NORMS, layouts)
    return made + [
        partial(bench_batch_norm_act.case, shape, act, layout=layout, dtype=dtype, groups=groups)
        for (shape, act, groups), layout in group_norms
    ]


def cases() -> list[partial[Case]]:
    """What decides first: bfloat16, as networks are trained, then whole steps, float32, the compiler."""
    steps = [partial(bench_training.case, name, shape, torch.bfloat16, profiled_steps=0) for name, shape in TRAINED.items()]
    compiled = [partial(bench_activation.case, "swish", "64 MiB", torch.bfloat16, with_compiler=True)]
    compiled += [partial(bench_batch_norm_act.case, *each, dtype=torch.bfloat16, with_compiler=True) for each in COMPILED_BATCH_NORMS]
    return [*cases_in(torch.bfloat16), *steps, *cases_in(torch.float32), *compiled]


def milliseconds(call: Callable[[], Any], flush: Callable[[], Any] | None = None) -> list[float]:
    """Of each call."""
    for _ in range(CALLS_BEFORE):
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    ends = time.perf_counter() + SECONDS_OF_A_PROVIDER
    while time.perf_counter() < ends or len(times) < LEAST_CALLS:
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


def on_gpu(case: Case, until: float, quick: bool) -> Iterator[tuple[str, Blocks]]:
    """One provider after the other, since calls do not fault and the state of the L2 is known; each has the same time."""
    providers = case.providers | ({COPY: copy_of(case.copied)} if case.copied else {})
    more_than_l2 = torch.zeros(L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size // 4)
    for state, flush in (("cold L2", more_than_l2.sum), ("warm L2", None)):
        yield state, {name: [Block(each / 1e3) for each in milliseconds(call, flush)] for name, call in providers.items()}


def main() -> None:
    options = arguments(__doc__)
    if not torch.cuda.is_available():
        print("bench_cuda: torch finds no GPU here, so that nothing is measured")
        return
    head = header(options.quick)
    torch.set_default_device("cuda")
    seconds = statistics.median(milliseconds(copy_of(HEADER_COPY_BYTES))) / 1e3
    del head["copy of 64 MiB, GB/s"]
    head |= {
        "machine": f"{torch.cuda.get_device_name()}, {head['machine']}",
        "CUDA": torch.version.cuda,
        "copy of 2 GiB, GB/s": round(2 * HEADER_COPY_BYTES / seconds / 1e9, 1),
    }
    run("on a GPU", cases()[: 1 if options.quick else None], options, head, on_gpu)


if __name__ == "__main__":
    main()
