"""How everything here is measured: the answer is proved first, providers take turns in blocks, time stands beside the bytes to be moved.

A provider measured call by call inherits the page faults of the one before it, so each runs a block of calls, the first ones unmeasured.
One of the providers is a copy of as many bytes as the case's own tensor into memory that is there already (y.copy_(x)): `of copy` is the
bandwidth of a row over that of this copy in the same blocks. Bytes are those of the least traffic possible, whoever moves how many.
"""

import argparse
import gc
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

# The checkout that a script stands in is what it measures; scripts import gradkernels from here.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gradkernels as gk
from gradkernels import _native, reference

__all__ = ["ROOT", "Case", "arguments", "gk", "header", "prove", "reference", "report", "run"]

ROOT = Path(__file__).resolve().parent.parent
ULP_BOUND = 2.0
HEADER_COPY_BYTES = 64 << 20


def nothing() -> None:
    pass


@dataclass
class Case:
    """One thing to do, the providers that do it, and what it costs at least.

    providers: name -> a call; "eager" is what ratios are taken of. prepare: name -> what runs before each block of it, unmeasured.
    prove: raises SystemExit unless the answers are right. copied: bytes of the tensor that the copy beside it copies.
    """

    name: str
    providers: dict[str, Callable[[], Any]]
    bytes: int
    copied: int
    prove: Callable[[], None]
    direction: str = "forward + backward"
    dtype: str = "float32"
    layout: str = "contiguous"
    outputs: str = "fresh"
    prepare: dict[str, Callable[[], None]] = field(default_factory=dict)


@dataclass
class Row:
    case: str
    provider: str
    direction: str
    dtype: str
    layout: str
    outputs: str
    median_us: float
    p20_us: float
    p80_us: float
    bytes: int
    gb_per_s: float
    of_copy: float
    times_eager: float


def arguments(description: str, *options: str) -> argparse.Namespace:
    """--quick, --json FILE and the script's own switches."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="the first case only, in few blocks: does it run, not how fast is it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header and rows to FILE as well")
    for option in options:
        parser.add_argument(f"--{option}", action="store_true")
    return parser.parse_args()


def prove(name: str, actual: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Every tensor is as near to its float64 reference as eager's or 2 ulp of its largest element, else the script ends here."""
    for key, reference_tensor in exact.items():
        ulp = torch.finfo(actual[key].dtype).eps * reference_tensor.abs().max().item()
        ours, theirs = ((each[key].double() - reference_tensor).abs().max().item() for each in (actual, eager))
        if not ours <= max(theirs, ULP_BOUND * ulp):
            raise SystemExit(f"{name}: {key} is wrong by {ours:.3g}, eager's by {theirs:.3g}, an ulp is {ulp:.3g}: nothing is timed")


def seconds_of(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(count):
        call()
    return (time.perf_counter_ns() - start) / 1e9


def measure(
    providers: dict[str, Callable[[], Any]], prepare: dict[str, Callable[[], None]], blocks: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds per call of each provider, one number for each of its blocks of about `seconds`."""
    calls = {}
    for name, call in providers.items():
        prepare.get(name, nothing)()
        call()
        calls[name] = max(2, min(100_000, int(seconds / max(seconds_of(call, 2) / 2, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in providers}
    order = list(providers)
    gc.collect()
    gc.disable()
    try:
        for _ in range(blocks):
            for name in order:
                prepare.get(name, nothing)()
                seconds_of(providers[name], max(2, calls[name] // 4))
                times[name].append(seconds_of(providers[name], calls[name]) / calls[name])
            # Whoever came first comes last, so that nobody always follows the same one.
            order.append(order.pop(0))
    finally:
        gc.enable()
    return times


def copy_of(size: int) -> Callable[[], Tensor]:
    source = torch.randn(max(size // 4, 1))
    destination = torch.empty_like(source).copy_(source)
    return lambda: destination.copy_(source)


def rows_of(case: Case, blocks: int, seconds: float) -> list[Row]:
    case.prove()
    times = measure(case.providers | {"copy": copy_of(case.copied)}, case.prepare, blocks, seconds)
    median = {name: statistics.median(each) for name, each in times.items()}
    copy_bandwidth = 2 * case.copied / median["copy"]
    rows = []
    for name in case.providers:
        p20, _, _, p80 = statistics.quantiles(times[name], n=5, method="inclusive")
        rows.append(
            Row(
                case=case.name,
                provider=name,
                direction=case.direction,
                dtype=case.dtype,
                layout=case.layout,
                outputs=case.outputs,
                median_us=median[name] * 1e6,
                p20_us=p20 * 1e6,
                p80_us=p80 * 1e6,
                bytes=case.bytes,
                gb_per_s=case.bytes / median[name] / 1e9,
                of_copy=case.bytes / median[name] / copy_bandwidth,
                times_eager=median["eager"] / median[name],
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
        "copy, 64 MiB, warm, GB/s read + written": round(2 * HEADER_COPY_BYTES / statistics.median(times) / 1e9, 1),
    }


def report(title: str, head: dict[str, Any], columns: dict[str, Callable[[Any], str]], rows: Iterable[Any], file: Path | None) -> None:
    """Prints the header and a table of the named columns, and writes everything to `file`."""
    rows = list(rows)
    console = Console(width=None if sys.stdout.isatty() else 160)
    for name, value in head.items():
        console.print(f"{name}: {value}", highlight=False)
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in ("case", "provider", "outputs") else "right")
    for row in rows:
        table.add_row(*(text(row) for text in columns.values()))
    console.print(table)
    if file is not None:
        file.write_text(json.dumps({"header": head, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def run(title: str, cases: Iterable[Callable[[], Case]], options: argparse.Namespace) -> None:
    """Measures each case and reports; a case is made only when its turn comes, since some are large."""
    head = header()
    rows = []
    for make in list(cases)[: 1 if options.quick else None]:
        case = make()
        rows += rows_of(case, blocks=5 if options.quick else 15, seconds=0.05 if options.quick else 0.25)
        print(f"{case.name}: {rows[-1].times_eager:.2f} times as fast as eager", file=sys.stderr)
    report(
        title,
        head,
        {
            "case": lambda row: row.case if row.layout == "contiguous" else f"{row.case} {row.layout}",
            "provider": lambda row: row.provider,
            "outputs": lambda row: row.outputs,
            "median us": lambda row: f"{row.median_us:,.1f}",
            "p20": lambda row: f"{row.p20_us:,.1f}",
            "p80": lambda row: f"{row.p80_us:,.1f}",
            "MB": lambda row: f"{row.bytes / 1e6:,.3f}",
            "GB/s": lambda row: f"{row.gb_per_s:.1f}",
            "of copy": lambda row: f"{row.of_copy:.0%}",
            "times eager": lambda row: f"{row.times_eager:.2f}",
        },
        rows,
        options.json,
    )
