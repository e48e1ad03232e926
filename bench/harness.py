"""How everything here is measured: the answer is proved first, providers take turns in blocks, time stands beside the bytes to be moved.

A provider measured call by call inherits the page faults of the one before it, so each runs a block of calls, the first ones unmeasured.
One of the providers is a copy of as many bytes as the case's own tensor into memory that is there already (y.copy_(x)): `of copy` is the
bandwidth of a row over that of this copy in the same blocks. Bytes are those of the least traffic possible, whoever moves how many.
Cases whose tensors exceed 16 MiB are measured with fresh and with warm outputs (memory_of_outputs). A script has its seconds (SECONDS) and
shares out what is left of them among the cases that are left: blocks become shorter first, then fewer.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import math
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# The checkout that a script stands in is what it measures; scripts import gradkernels from here.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gradkernels as gk
from gradkernels import _native, reference

__all__ = [
    "ALONE",
    "COPY",
    "OTHER",
    "PARTS",
    "ROOT",
    "SECONDS",
    "SPREAD_COLUMNS",
    "START_SECONDS",
    "STEP_COLUMNS",
    "WHOLE",
    "Block",
    "Budget",
    "Case",
    "Row",
    "StepRow",
    "arguments",
    "copy_of",
    "forward_and_backward",
    "gk",
    "header",
    "label",
    "machine",
    "measure",
    "memory_of_outputs",
    "peak_bytes",
    "prove",
    "reference",
    "report",
    "report_cases",
    "rows_from",
    "run",
    "spread",
    "write",
]

ROOT = Path(__file__).resolve().parent.parent
STARTED = time.monotonic()
# Seconds that a script may take, (in full, with --quick), together below ten minutes and one minute with START_SECONDS each, in which torch
# is imported; others take OTHER.
SECONDS = {
    "accuracy": (12, 2),
    "activation": (75, 2),
    "batch_norm_act": (110, 2),
    "clip_grad": (80, 2),
    "convert": (60, 3),
    "monitor": (65, 3),
    "package": (20, 6),
    "scaling": (50, 6),
    "training": (40, 3),
}
START_SECONDS = 3
OTHER = (40, 3)
# Scripts that take minutes whatever they are told: they run when they are asked for by name.
ALONE = ("build",)
ULP_BOUND = 2.0
HEADER_COPY_BYTES = 64 << 20
COPY = "copy, 64 MiB, warm, GB/s read + written"
# Blocks above this change hands between process and system with every call, see memory_of_outputs.
TWO_STATES_BYTES = 16 << 20
# What a provider gets where nothing was said of a budget, and at least.
MOST_SECONDS = 3.0
LEAST_BLOCKS = 3
# For the parts of a case that was lost, which nobody reckoned with.
SECONDS_OF_A_PART = 0.6
# Smaller ones tell nothing of memory: the C library rounds them up.
LEAST_PEAK_BYTES = 1 << 20
WHOLE = "forward + backward"
PARTS = ("forward", "backward")


def nothing() -> None:
    pass


@dataclass
class Case:
    """One thing to do, the providers that do it, and what it costs at least.

    providers: name -> a call; "eager" is what ratios are taken of, "torch.compile" too where it is there. prepare: name -> what runs before
    each block of it, unmeasured. prove: raises SystemExit unless the answers are right. copied: bytes of the tensor that the copy beside it
    copies. outputs: "fresh", or "none" for what is computed in place. parts: the same thing's forward and backward, each as a case, to be
    measured where apart is set or eager was faster on the whole. saves: name -> what saves tensors for backward and returns its output.
    instead: what -> the same case but for that, measured where eager was faster, to see whether that is why.
    """

    name: str
    providers: dict[str, Callable[[], Any]]
    bytes: int
    copied: int
    prove: Callable[[], None]
    direction: str = WHOLE
    dtype: str = "float32"
    layout: str = "contiguous"
    outputs: str = "fresh"
    prepare: dict[str, Callable[[], None]] = field(default_factory=dict)
    parts: Callable[[], "list[Case]"] | None = None
    apart: bool = False
    saves: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    instead: dict[str, Callable[[], "Case"]] = field(default_factory=dict)


@dataclass
class Row:
    """faults: minor page faults per call. times_eager, times_compile: how many times as fast as those; None where they were not run.
    cores: the process' time on all cores over the time that passed; threads that wait for work in a loop count. blocks: what the
    percentiles are of. saved_bytes: kept by autograd for backward, inputs among it. peak_bytes: resident above what is between two calls.
    instead: what -> case, dtype and layout of the rows that are the same but for that, where this one was slower than eager.
    """

    case: str
    provider: str
    direction: str
    dtype: str
    layout: str
    outputs: str
    median_us: float
    p20_us: float
    p80_us: float
    faults: float
    bytes: int
    gb_per_s: float
    of_copy: float
    times_eager: float
    times_compile: float | None
    blocks: int = 0
    cores: float | None = None
    saved_bytes: int | None = None
    peak_bytes: float | None = None
    instead: dict[str, dict[str, str]] | None = None


@dataclass
class Block:
    """What a call of a block cost on average."""

    seconds: float
    faults: float = 0.0
    cores: float | None = None


class Budget:
    """A script's seconds, from its import of this file on, shared out among the things that it has yet to measure."""

    def __init__(self, seconds: float, things: int, started: float = STARTED) -> None:
        self.ends = started + seconds
        self.things = things

    def share(self) -> float:
        """The moment (of time.monotonic) at which the next thing is to be done: an even part of what is left from now on."""
        now = time.monotonic()
        ends = now + max(0.0, self.ends - now) / max(1, self.things)
        self.things -= 1
        return ends


def arguments(description: str, *options: str) -> argparse.Namespace:
    """--quick, --json FILE, --seconds N and the script's own switches."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="the first case only, in few blocks: does it run, not how fast is it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header and rows to FILE as well")
    parser.add_argument("--seconds", type=float, metavar="N", help="how long to measure, roughly; the more, the more blocks of calls")
    for option in options:
        parser.add_argument(f"--{option}", action="store_true")
    parsed = parser.parse_args()
    if parsed.seconds is None:
        parsed.seconds = SECONDS.get(Path(sys.argv[0]).stem.removeprefix("bench_"), OTHER)[parsed.quick]
    return parsed


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """p20, median, p80."""
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return p20, statistics.median(times), p80


def prove(name: str, actual: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Every tensor is as near to its float64 reference as eager's or 2 ulp of its largest element, else the script ends here."""
    for key, reference_tensor in exact.items():
        ulp = torch.finfo(actual[key].dtype).eps * reference_tensor.abs().max().item()
        ours, theirs = ((each[key].double() - reference_tensor).abs().max().item() for each in (actual, eager))
        if not ours <= max(theirs, ULP_BOUND * ulp):
            raise SystemExit(f"{name}: {key} is wrong by {ours:.3g}, eager's by {theirs:.3g}, an ulp is {ulp:.3g}: nothing is timed")


# The parameters of glibc's mallopt, and what it has come to by itself once a block of 32 MiB was freed, its own limit for them.
MALLOPT = {"M_TRIM_THRESHOLD": -1, "M_MMAP_THRESHOLD": -3, "M_MMAP_MAX": -4}
FRESH = {"M_MMAP_MAX": 65536, "M_MMAP_THRESHOLD": 32 << 20, "M_TRIM_THRESHOLD": 64 << 20}
WARM = {"M_MMAP_MAX": 0, "M_TRIM_THRESHOLD": (1 << 31) - 1}
MAPPED = {"M_MMAP_MAX": 1 << 20, "M_MMAP_THRESHOLD": 64 << 10, "M_TRIM_THRESHOLD": 0}
MEMORY = {"fresh": FRESH, "none": FRESH, "warm": WARM, "mapped": MAPPED}


@functools.cache
def c_library() -> ctypes.CDLL | None:
    """glibc, or None: of other C libraries nothing is known here."""
    if platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


@contextlib.contextmanager
def memory_of_outputs(state: str) -> Iterator[None]:
    """How the C library hands out large blocks meanwhile.

    fresh: as glibc is in a process that has been training for a while: a block above 32 MiB is mapped with each call, page by page,
    smaller ones stay in the process. warm: freed blocks stay in the process whatever their size, as with jemalloc. mapped: blocks above
    64 KiB are mapped and unmapped each by itself, so that resident memory is what is alive; nothing is timed so.
    """
    library = c_library()
    if library is None:
        yield
        return

    def set_to(settings: dict[str, int]) -> None:
        for name, value in settings.items():
            if library.mallopt(MALLOPT[name], value) != 1:
                raise SystemExit(f"the C library refuses {name} = {value}")

    set_to(MEMORY[state])
    try:
        yield
    finally:
        set_to(FRESH)
        library.malloc_trim(0)


def states_of(case: Case) -> Sequence[str]:
    has_two = case.outputs == "fresh" and case.copied > TWO_STATES_BYTES and c_library() is not None
    return ("fresh", "warm") if has_two else (case.outputs,)


def minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def block_of(call: Callable[[], Any], count: int) -> Block:
    faults, cpu = minor_faults(), time.process_time_ns()
    start = time.perf_counter_ns()
    for _ in range(count):
        call()
    passed = max(1, time.perf_counter_ns() - start)
    return Block(passed / 1e9 / count, (minor_faults() - faults) / count, (time.process_time_ns() - cpu) / passed)


def measure_blocks(
    providers: dict[str, Callable[[], Any]], prepare: dict[str, Callable[[], None]], blocks: int, seconds: float, until: float
) -> dict[str, list[Block]]:
    """The blocks of each provider, `blocks` of `seconds` at most: shorter ones, then fewer, down to LEAST_BLOCKS, to be done at `until`."""
    one = {}
    for name, call in providers.items():
        prepare.get(name, nothing)()
        call()
        one[name] = max(block_of(call, 1).seconds, 1e-9)
    left = max(0.0, until - time.monotonic())
    # A block is its calls and, before them, a quarter as many or one that are not measured.
    seconds = min(seconds, left / (len(providers) * blocks * 1.25))
    calls = {name: max(1, min(100_000, int(seconds / each))) for name, each in one.items()}
    round_ = sum(each * (calls[name] + max(1, calls[name] // 4)) for name, each in one.items())
    blocks = max(LEAST_BLOCKS, min(blocks, int(left / round_)))
    measured: dict[str, list[Block]] = {name: [] for name in providers}
    order = list(providers)
    gc.collect()
    gc.disable()
    try:
        for _ in range(blocks):
            for name in order:
                prepare.get(name, nothing)()
                block_of(providers[name], max(1, calls[name] // 4))
                measured[name].append(block_of(providers[name], calls[name]))
            # Whoever came first comes last, so that nobody always follows the same one.
            order.append(order.pop(0))
    finally:
        gc.enable()
    return measured


def measure(
    providers: dict[str, Callable[[], Any]],
    prepare: dict[str, Callable[[], None]],
    blocks: int,
    seconds: float,
    until: float | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each provider, one number for each of its blocks; until: of Budget.share()."""
    if until is None:
        until = time.monotonic() + MOST_SECONDS * len(providers)
    measured = measure_blocks(providers, prepare, blocks, seconds, until)
    return {name: [block.seconds for block in each] for name, each in measured.items()}


def resident_bytes(which: str) -> int:
    """VmRSS, or VmHWM, the most there was since it was last reset."""
    return int(re.search(rf"^{which}:\s*(\d+) kB", Path("/proc/self/status").read_text(), flags=re.M).group(1)) * 1024


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """The most memory that a call has resident above what is resident between two of them; None where it cannot be told."""
    library = c_library()
    if library is None or not Path("/proc/self/clear_refs").exists():
        return None
    with memory_of_outputs("mapped"):
        # What the last call left, gradients above all, moves into blocks of this kind.
        call()
        gc.collect()
        library.malloc_trim(0)
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        call()
        return resident_bytes("VmHWM") - before


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """What autograd keeps for backward, memory of several tensors counted once."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def copy_of(size: int) -> Callable[[], Tensor]:
    source = torch.ones(max(size // 4, 1))
    destination = torch.empty_like(source).copy_(source)
    return lambda: destination.copy_(source)


def forward_and_backward(
    whole: Case, forward: dict[str, Callable[[], Tensor]], inputs: dict[str, Sequence[Tensor]], grad_y: Tensor, bytes: tuple[int, int]
) -> list[Case]:
    """The forward of each provider, recorded for backward, and its backward, of one recorded forward again and again."""
    backward = {name: partial(torch.autograd.grad, call(), inputs[name], grad_y, retain_graph=True) for name, call in forward.items()}
    alone = replace(whole, parts=None, saves={})
    return [
        replace(alone, direction="forward", providers=dict(forward), bytes=bytes[0]),
        replace(alone, direction="backward", providers=backward, bytes=bytes[1]),
    ]


def rows_of(case: Case, blocks: int, seconds: float, until: float, before: Sequence[Row] = ()) -> list[Row]:
    """before: what was measured already."""
    case.prove()
    plan = [(case, state) for state in states_of(case)]
    if case.apart and case.parts is not None:
        plan += [(part, plan[0][1]) for part in case.parts()]
    rows: list[Row] = []
    for number, (each, state) in enumerate(plan):
        now = time.monotonic()
        rows += rows_in_state(each, state, blocks, seconds, now + max(0.0, until - now) / (len(plan) - number))
    slow = [row for row in rows if row.provider == "gradkernels" and lost(row, rows)]
    if case.parts is not None and not case.apart:
        for state in {row.outputs for row in slow}:
            for part in case.parts():
                rows += rows_in_state(part, state, blocks, seconds, time.monotonic() + SECONDS_OF_A_PART)
    for what, make in case.instead.items() if slow else ():
        other = make()
        same = {"case": other.name, "dtype": other.dtype, "layout": other.layout}
        for row in slow:
            row.instead = (row.instead or {}) | {what: same}
        there = {(row.outputs, row.direction) for row in (*before, *rows) if same.items() <= vars(row).items()}
        missing = sorted({(row.outputs, row.direction) for row in slow} - there)
        if missing:
            other.prove()
        for state, direction in missing:
            each = next(each for each in (other, *(other.parts or tuple)()) if each.direction == direction)
            rows += rows_in_state(each, state, blocks, seconds, time.monotonic() + SECONDS_OF_A_PART)
    return rows


def lost(ours: Row, rows: Iterable[Row]) -> bool:
    """Whether eager was faster beyond noise."""
    return any(
        row.provider == "eager" and (row.outputs, row.direction) == (ours.outputs, ours.direction) and row.p80_us < ours.p20_us
        for row in rows
    )


def rows_in_state(case: Case, state: str, blocks: int, seconds: float, until: float) -> list[Row]:
    with memory_of_outputs(state):
        measured = measure_blocks(case.providers | {"copy": copy_of(case.copied)}, case.prepare, blocks, seconds, until)
    rows = rows_from(case, state, measured)
    # Memory is that of fresh outputs; in place there is none to speak of.
    if state == "fresh":
        for row in rows:
            row.saved_bytes = saved_bytes(case.saves[row.provider]) if row.provider in case.saves else None
            row.peak_bytes = peak_bytes(case.providers[row.provider]) if case.copied >= LEAST_PEAK_BYTES else None
    return rows


def rows_from(case: Case, outputs: str, measured: dict[str, list[Block]]) -> list[Row]:
    """A row for each provider of the case but the copy, of which measured has the blocks too."""
    spreads = {name: spread([block.seconds for block in each]) for name, each in measured.items()}
    median = {name: each[1] for name, each in spreads.items()}
    copy_bandwidth = 2 * case.copied / median["copy"]
    rows = []
    for name in case.providers:
        p20, middle, p80 = spreads[name]
        cores = [block.cores for block in measured[name] if block.cores is not None]
        rows.append(
            Row(
                case=case.name,
                provider=name,
                direction=case.direction,
                dtype=case.dtype,
                layout=case.layout,
                outputs=outputs,
                median_us=middle * 1e6,
                p20_us=p20 * 1e6,
                p80_us=p80 * 1e6,
                faults=statistics.median(block.faults for block in measured[name]),
                bytes=case.bytes,
                gb_per_s=case.bytes / middle / 1e9,
                of_copy=case.bytes / middle / copy_bandwidth,
                times_eager=median["eager"] / middle,
                times_compile=median["torch.compile"] / middle if "torch.compile" in median else None,
                blocks=len(measured[name]),
                cores=statistics.median(cores) if cores else None,
            )
        )
    return rows


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*)$", cpuinfo.read_text(), flags=re.M) if cpuinfo.exists() else None
    return f"{found.group(1) if found else platform.processor()}, {platform.machine()}, {platform.system()} {platform.release()}"


def header() -> dict[str, Any]:
    """What the numbers below hold for; ends the script where the kernels to be measured are not there."""
    if _native.C is None:
        raise SystemExit(f"gradkernels is not native, there is nothing to measure: {_native.reason}. To mend it: {_native.remedy}")
    times = measure({"copy": copy_of(HEADER_COPY_BYTES)}, {}, blocks=7, seconds=0.05)["copy"]
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gradkernels": gk.__version__,
        "commit": _native.C.build_info()["commit"],
        "instruction set": _native.C.instruction_set(),
        "caches": "as the call before left them; what they do not hold comes from memory",
        COPY: round(2 * HEADER_COPY_BYTES / statistics.median(times) / 1e9, 1),
    }


def write(title: str, head: dict[str, Any], rows: Iterable[Any], file: Path, model: dict[str, Any] | None = None) -> None:
    """Replaces the file as a whole, so that a script may write what it has so far and be stopped at any time."""
    found = {"title": title, "header": head, "rows": [asdict(row) for row in rows]} | ({} if model is None else {"model": model})
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(new, file)


def report(
    title: str,
    head: dict[str, Any],
    columns: dict[str, Callable[[Any], str]],
    rows: Iterable[Any],
    file: Path | None,
    model: dict[str, Any] | None = None,
) -> None:
    """Prints the header and a table of the named columns, and writes everything to `file`, with a model (title, note, rows) apart."""
    rows = list(rows)
    console = Console(width=None if sys.stdout.isatty() else 180)
    for name, value in head.items():
        console.print(f"{name}: {value}", highlight=False)
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in ("case", "provider", "outputs") else "right")
    for row in rows:
        table.add_row(*(text(row) for text in columns.values()))
    console.print(table)
    if file is not None:
        write(title, head, rows, file, model)


def means(rows: Sequence[Row]) -> dict[str, str]:
    """Geometric means of how many times as fast gradkernels is, over all whole cases in which it can be said, and the least of them."""
    found = {}
    for beside, ratio in (("eager", lambda row: row.times_eager), ("torch.compile", lambda row: row.times_compile)):
        for dtype, outputs in sorted({(row.dtype, row.outputs) for row in rows}):
            chosen = [
                row
                for row in rows
                if row.provider == "gradkernels" and (row.dtype, row.outputs) == (dtype, outputs) and row.direction not in PARTS
            ]
            ratios = [ratio(row) for row in chosen if ratio(row) is not None]
            if ratios:
                mean = math.exp(statistics.fmean(math.log(each) for each in ratios))
                # On a GPU the state is that of the L2 cache.
                state = outputs if outputs.endswith("L2") else f"{outputs} outputs"
                what = f"times {beside}, {dtype}{'' if outputs == 'none' else f', {state}'}"
                found[what] = f"geometric mean {mean:.2f}, least {min(ratios):.2f}, {len(ratios)} rows"
    return found


def in_mb(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:,.3f}"


def label(case: dict[str, Any]) -> str:
    """What a row is of, on one line, without what most of them have in common."""
    usual = ("contiguous", "float32", WHOLE, "in place")
    told = [case[name] for name in ("direction", "layout", "dtype") if case[name] not in usual]
    # "1,000 tensors of 256" says already that there are 1000 tensors.
    return ", ".join([case["case"], *(each for each in told if each not in case["case"].replace(",", ""))])


SPREAD_COLUMNS: dict[str, Callable[[Any], str]] = {
    "median us": lambda row: f"{row.median_us:,.1f}",
    "p20": lambda row: f"{row.p20_us:,.1f}",
    "p80": lambda row: f"{row.p80_us:,.1f}",
}


def report_cases(title: str, head: dict[str, Any], rows: Sequence[Row], file: Path | None) -> None:
    """report() of rows of cases, and their means."""
    report(
        title,
        head,
        {
            "case": lambda row: label(asdict(row)),
            "provider": lambda row: row.provider,
            "outputs": lambda row: row.outputs,
            **SPREAD_COLUMNS,
            "faults": lambda row: f"{row.faults:,.0f}",
            "MB": lambda row: in_mb(row.bytes),
            "GB/s": lambda row: f"{row.gb_per_s:.1f}",
            "of copy": lambda row: f"{row.of_copy:.0%}",
            "times eager": lambda row: f"{row.times_eager:.2f}",
            "times compile": lambda row: "" if row.times_compile is None else f"{row.times_compile:.2f}",
            "saved MB": lambda row: in_mb(row.saved_bytes),
            "peak MB": lambda row: in_mb(row.peak_bytes),
        },
        rows,
        file,
    )
    for what, mean in means(rows).items():
        print(f"{what}: {mean}")


@dataclass
class StepRow:
    """What rows of whole training steps begin with."""

    case: str
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float


STEP_COLUMNS: dict[str, Callable[[Any], str]] = {
    "case": lambda row: row.case,
    "provider": lambda row: row.provider,
    "median ms": lambda row: f"{row.median_ms:,.1f}",
    "p20": lambda row: f"{row.p20_ms:,.1f}",
    "p80": lambda row: f"{row.p80_ms:,.1f}",
}


def run(title: str, cases: Iterable[Callable[[], Case]], options: argparse.Namespace, **head: str) -> None:
    """Measures each case and reports; a case is made only when its turn comes, since some are large. head: more lines of the header."""
    found = header() | head
    rows: list[Row] = []
    made = list(cases)[: 1 if options.quick else None]
    budget = Budget(options.seconds, len(made))
    for number, make in enumerate(made, 1):
        until = budget.share()
        case = make()
        new = rows_of(case, *((3, 0.01) if options.quick else (11, 0.1)), until, rows)
        rows += new
        ours = next(row for row in new if row.provider == "gradkernels")
        print(f"{number}/{len(made)} {case.name}: {ours.times_eager:.2f} times as fast as eager", file=sys.stderr)
    report_cases(title, found, rows, options.json)
