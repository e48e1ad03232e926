"""How everything here is measured.

A case proves its answer against float64 before anything is timed. Then its providers take turns in blocks of calls, because a provider that
is measured call by call inherits the page faults of the one before it; the first calls of a block are not timed. One provider is a copy
of as many bytes as the case's own tensor into memory that is already there: report.py compares bandwidths with it. Cases whose tensors
exceed 16 MiB are measured with fresh and with warm outputs. A script has its seconds and divides the rest of them among the cases that are
left: blocks become shorter first, then fewer; a case that would begin after the end is left out. The file of results is written after each
case; a case that fails is named in it, and the others are measured.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Scripts measure the checkout that they stand in. The networks, and what counts bytes and ulp, are those of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gradkernels as gk
from accuracy import ULP_BOUND
from gradkernels import _native, reference
from report import COMPILED, COPY, EAGER, OURS, PARTS, WHOLE, Head, Row, text_of, write

__all__ = ["COMPILED", "COPY", "EAGER", "OURS", "PARTS", "WHOLE", "Block", "Blocks", "Case", "WrongAnswer", "answers", "arguments"]
__all__ += ["called", "compiled", "copy_of", "gk", "header", "prove", "reference", "run", "text_of", "write"]

STARTED = time.monotonic()
# Seconds that a script may take. All but cuda and networks take less than sixteen minutes together, with START_SECONDS each; quickly one.
SECONDS = {"accuracy": 15, "activation": 110, "batch_norm_act": 180, "clip_grad": 120, "cuda": 170, "group_norm_act": 170}
SECONDS |= {"more_acts": 170, "networks": 240, "training": 150}
QUICK_SECONDS = 4
START_SECONDS = 4
# Blocks of each provider and the seconds of a block, in full and with --quick.
BLOCKS, LEAST_BLOCKS = ((11, 0.1), (3, 0.01)), 3
BOUND = 2 * ULP_BOUND  # The terms of a gradient are larger than it, and float64's reference is rounded too.
HEADER_COPY_BYTES = 64 << 20
# Blocks below this stay in the process in any case.
TWO_STATES_BYTES = 16 << 20


class WrongAnswer(Exception):
    """A result that is neither as near to float64 as torch's nor within BOUND ulp."""


@dataclass
class Case:
    """One thing to do, the providers that do it, and what it costs at least.

    providers: name -> a call; ratios are those to "eager". prove: raises unless the answers are right. bytes: the least that a call has to
    move, 0 where they are not counted. copied: bytes of the tensor that the copy copies. in_place: a call allocates no outputs. extra:
    provider -> `kept_bytes` and `part_us` of its row.
    """

    operator: str
    name: str
    providers: dict[str, Callable[[], Any]]
    prove: Callable[[], None]
    bytes: int = 0
    copied: int = 0
    direction: str = WHOLE
    dtype: torch.dtype | str = torch.float32
    layout: str = "contiguous"
    in_place: bool = False
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Block:
    """What one call of a block cost on average. cores: the process' time on all cores over the time that passed."""

    seconds: float
    faults: float = 0.0
    cores: float | None = None


Blocks = dict[str, list[Block]]
# Times a case until a moment, quickly or not: states of its outputs, each with the blocks of every provider.
Timer = Callable[[Case, float, bool], Iterator[tuple[str, Blocks]]]


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small cases in few blocks: shows that they run, not how fast")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write FOLDER/<machine>/<script>.json as well")
    parser.add_argument("--seconds", type=float, metavar="N", help="how long to measure, roughly; more seconds give more blocks")
    return parser.parse_args()


def answers(forward: Callable[[], Tensor], inputs: Sequence[Tensor], grad_y: Tensor) -> dict[str, Tensor]:
    """The output of a forward, and the gradients of its inputs."""
    y = forward()
    return {"y": y.detach()} | {f"gradient {i}": grad for i, grad in enumerate(torch.autograd.grad(y, inputs, grad_y))}


def called(direction: str, forward: Callable[[], Tensor], inputs: Sequence[Tensor], grad_y: Tensor) -> Callable[[], Any]:
    """The call to be timed. A backward alone is that of one recorded forward, again and again; torch.compile refuses that."""
    if direction == WHOLE:
        return lambda: torch.autograd.grad(forward(), inputs, grad_y)
    return forward if direction == "forward" else partial(torch.autograd.grad, forward(), inputs, grad_y, retain_graph=True)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without the reset torch runs eagerly, and says nothing, after eight compilations of one forward."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def prove(actual: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Every tensor is as near to its float64 reference as eager's, or within BOUND ulp of the largest element."""
    for key, expected in exact.items():
        ulp = torch.finfo(actual[key].dtype).eps * expected.abs().max().item()
        ours, theirs = ((each[key].double() - expected).abs().max().item() for each in (actual, eager))
        if not ours <= max(theirs, BOUND * ulp):
            raise WrongAnswer(f"{key} is wrong by {ours:.3g}, torch's by {theirs:.3g}, an ulp is {ulp:.3g}; nothing is timed")


# Parameters of glibc's mallopt. FRESH is where they come to rest by themselves in a process that trains: a block above 32 MiB is mapped
# anew for each call, page by page. They are pinned, because they move with what is freed, and the order of cases would count. With WARM,
# freed blocks stay in the process whatever their size, as with jemalloc.
MALLOPT = {"M_TRIM_THRESHOLD": -1, "M_MMAP_THRESHOLD": -3, "M_MMAP_MAX": -4}
FRESH = {"M_MMAP_MAX": 65536, "M_MMAP_THRESHOLD": 32 << 20, "M_TRIM_THRESHOLD": 64 << 20}
WARM = {"M_MMAP_MAX": 0, "M_TRIM_THRESHOLD": (1 << 31) - 1}


@functools.cache
def c_library() -> ctypes.CDLL | None:
    """glibc, or None: other C libraries have other parameters."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@contextlib.contextmanager
def memory_of_outputs(state: str) -> Iterator[None]:
    library = c_library()

    def set_to(settings: dict[str, int]) -> None:
        for name, value in settings.items():
            if library is not None and library.mallopt(MALLOPT[name], value) != 1:
                raise RuntimeError(f"the C library refuses {name} = {value}")

    set_to(WARM if state == "warm" else FRESH)
    try:
        yield
    finally:
        set_to(FRESH)
        if library is not None:
            library.malloc_trim(0)


def block_of(call: Callable[[], Any], count: int) -> Block:
    faults, cpu, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time_ns(), time.perf_counter_ns()
    for _ in range(count):
        call()
    passed, cpu = max(1, time.perf_counter_ns() - start), time.process_time_ns() - cpu
    return Block(passed / 1e9 / count, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / count, cpu / passed)


def blocks_of(providers: dict[str, Callable[[], Any]], blocks: int, seconds: float, until: float) -> Blocks:
    """`blocks` blocks of `seconds` each for every provider, to be done at `until`: else shorter ones, then fewer, LEAST_BLOCKS at least."""
    one = {}
    for name, call in providers.items():
        call()
        one[name] = max(block_of(call, 1).seconds, 1e-9)
    left = max(0.0, until - time.monotonic())
    # Before the calls of a block come a quarter as many, or one, that are not timed.
    seconds = min(seconds, left / (len(providers) * blocks * 1.25))
    calls = {name: max(1, min(100_000, int(seconds / each))) for name, each in one.items()}
    turn = sum(each * (calls[name] + max(1, calls[name] // 4)) for name, each in one.items())
    blocks = max(LEAST_BLOCKS, min(blocks, int(left / turn)))
    measured: Blocks = {name: [] for name in providers}
    order = list(providers)
    gc.collect()
    gc.disable()
    try:
        for _ in range(blocks):
            for name in order:
                block_of(providers[name], max(1, calls[name] // 4))
                measured[name].append(block_of(providers[name], calls[name]))
            # The first one comes last, so that a provider does not always follow the same one.
            order.append(order.pop(0))
    finally:
        gc.enable()
    return measured


def copy_of(size: int) -> Callable[[], Tensor]:
    source = torch.ones(max(size // 4, 1))
    destination = torch.empty_like(source).copy_(source)
    return lambda: destination.copy_(source)


def on_cpu(case: Case, until: float, quick: bool) -> Iterator[tuple[str, Blocks]]:
    has_two = case.copied > TWO_STATES_BYTES and c_library() is not None
    states = ("in place",) if case.in_place else ("fresh", "warm") if has_two else ("fresh",)
    providers = case.providers | ({COPY: copy_of(case.copied)} if case.copied else {})
    for number, state in enumerate(states):
        share = time.monotonic() + max(0.0, until - time.monotonic()) / (len(states) - number)
        with memory_of_outputs(state):
            yield state, blocks_of(providers, *BLOCKS[quick], share)


def rows_from(case: Case, outputs: str, measured: Blocks) -> list[Row]:
    """A row for each provider, the copy among them, whose bytes are those that it reads and writes."""
    rows = []
    for name, blocks in measured.items():
        p20, _, _, p80 = statistics.quantiles([block.seconds * 1e6 for block in blocks], n=5, method="inclusive")
        cores = [block.cores for block in blocks if block.cores is not None]
        rows.append(
            Row(
                *(case.operator, case.name, name, case.direction, str(case.dtype).removeprefix("torch."), case.layout, outputs),
                *(statistics.median(block.seconds * 1e6 for block in blocks), p20, p80, len(blocks)),
                bytes=2 * case.copied if name == COPY else case.bytes,
                faults=statistics.median(block.faults for block in blocks),
                cores=statistics.median(cores) if cores else None,
                **case.extra.get(name, {}),
            )
        )
    return rows


def header(quick: bool) -> Head:
    """What the numbers hold for; ends the script where the kernels to be measured are not there."""
    if _native.C is None:
        raise SystemExit(f"nothing to measure: gradkernels is not native, {_native.reason}. To fix this, run: {_native.remedy}")
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", flags=re.M)
    processor = model.group(1) if model else platform.processor()
    copies = blocks_of({COPY: copy_of(HEADER_COPY_BYTES)}, 7, 0.05, time.monotonic() + 0.5)[COPY]
    head = {
        "machine": f"{processor}, {platform.machine()}, {platform.system()} {platform.release()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gradkernels": gk.__version__,
        "commit": _native.C.build_info()["commit"],
        "instruction set": f"{_native.C.instruction_set()} (torch: {torch.backends.cpu.get_cpu_capability()})",
        "copy of 64 MiB, GB/s": round(2 * HEADER_COPY_BYTES / statistics.median(block.seconds for block in copies) / 1e9, 1),
    }
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    return head | ({"ATEN_CPU_CAPABILITY": asked} if asked else {}) | ({"quick": True} if quick else {})


def measured(make: Callable[[], Case], ends: float, left: int, quick: bool, timer: Timer) -> list[Row]:
    """The rows of a case, which may be timed for an even part of what remains until `ends` for `left` cases."""
    case = make()
    case.prove()
    # Compiling would use up the time of the case.
    for call in case.providers.values():
        call()
    until = time.monotonic() + max(0.0, ends - time.monotonic()) / left
    return [row for state, blocks in timer(case, until, quick) for row in rows_from(case, state, blocks)]


def run(title: str, cases: Sequence[partial[Case]], options: argparse.Namespace, head: Head | None = None, timer: Timer = on_cpu) -> None:
    """Measures the cases; each is made when its turn comes, because some are large."""
    stem = Path(sys.argv[0]).stem.removeprefix("bench_")
    head = head or header(options.quick)
    part = {"title": title, "header": head, "rows": []}
    ends = STARTED + (options.seconds or (QUICK_SECONDS if options.quick else SECONDS[stem]))
    failed: list[str] = []
    for number, make in enumerate(cases):
        left = len(cases) - number
        if number and time.monotonic() > ends and not options.quick:
            break
        try:
            rows = measured(make, ends, left, options.quick, timer)
            times = {row.provider: row.median_us for row in reversed(rows)}
            said = f"{rows[0]}: " + (f"{times[EAGER] / times[OURS]:.2f} times as fast as torch" if OURS in times else "measured")
            part["rows"] += rows
        except Exception as error:
            said = f"{' '.join(map(str, make.args))}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            failed.append(said)
            head["failed"] = "; ".join(failed)
        print(f"{stem} {number + 1}/{len(cases)} {said}", file=sys.stderr)
        part["header"] = head | ({"left out": f"{left - 1} of {len(cases)} cases, for lack of time"} if left > 1 else {})
        write(stem, part, options.out)
        # A case's functions refer to each other.
        gc.collect()
    print(text_of(stem, part))
    if failed:
        raise SystemExit(f"failed: {head['failed']}")
