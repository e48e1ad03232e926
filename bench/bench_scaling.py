"""How cost grows with elements, channels, tensors and processes: measured points beside the formula fitted to them.

Processes are Gloo's on this machine, one thread each, so that beyond its cores they also wait for one another. What no machine here
can hold is reckoned from constants of the sources and printed apart, marked as a model: none of it was measured.
"""

import datetime
import itertools
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, multiprocessing, nn

from harness import COPY, arguments, gk, header, measure, prove, reference, report

PROCESSES = (1, 2, 4, 8)
TIMEOUT_S = 120
CALLS = 10
CHANNELS_ELEMENTS = 1 << 22

Measured = tuple[int, list[float]]


@dataclass
class Row:
    """formula: in n, the thing that grows. fitted_us: what it says of this n."""

    case: str
    provider: str
    against: str
    n: int
    median_us: float
    p20_us: float
    p80_us: float
    formula: str
    fitted_us: float


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(fixed, each) >= 0 of time = fixed + each * n with the least sum of squared relative errors."""
    n, t = (torch.tensor(each, dtype=torch.float64) for each in zip(*points, strict=True))
    columns = torch.stack([1 / t, n / t], 1)
    target = torch.ones(len(points), 1, dtype=torch.float64)
    best, least = (0.0, 0.0), math.inf
    for kept in ([0, 1], [0], [1]):
        coefficients = torch.zeros(2, 1, dtype=torch.float64)
        coefficients[kept] = torch.linalg.lstsq(columns[:, kept], target, driver="gelsd").solution
        error = (columns @ coefficients - target).square().sum().item()
        if (coefficients >= 0).all() and error < least:
            best, least = (coefficients[0].item(), coefficients[1].item()), error
    return best


def time_text(seconds: float) -> str:
    for unit, size in (("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-12:.3g} ps"


def rows_of(case: str, against: str, points: Sequence[Measured], offset: int = 0) -> list[Row]:
    """offset: what is taken from n in the formula."""
    median = [statistics.median(times) for _, times in points]
    fixed, each = fit([(n - offset, value) for (n, _), value in zip(points, median, strict=True)])
    formula = f"{time_text(fixed)} + {time_text(each)} x {f'(n - {offset})' if offset else 'n'}"
    rows = []
    for (n, times), value in zip(points, median, strict=True):
        p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
        rows.append(
            Row(
                case=case,
                provider="gradkernels",
                against=against,
                n=n,
                median_us=value * 1e6,
                p20_us=p20 * 1e6,
                p80_us=p80 * 1e6,
                formula=formula,
                fitted_us=(fixed + each * (n - offset)) * 1e6,
            )
        )
    return rows


def times_of(call: Callable[[], Any], quick: bool) -> list[float]:
    return measure({"gradkernels": call}, {}, *((3, 0.005) if quick else (9, 0.05)))["gradkernels"]


def available_bytes() -> int:
    """What can be allocated without anything being written to disk."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.M)
    return int(found.group(1)) * 1000 if found else 4 << 30


def elu_step(x: Tensor, grad_y: Tensor) -> Tensor:
    (grad_x,) = torch.autograd.grad(gk.elu(x), x, grad_y)
    return grad_x


def elements(quick: bool) -> Iterator[Row]:
    # x, y and the two gradients, in half of what is free.
    most = 1 << 16 if quick else available_bytes() // 2 // 16
    points = []
    for n in itertools.takewhile(lambda n: n <= most, (4**power for power in itertools.count(5))):
        x = torch.randn(n).requires_grad_()
        grad_y = torch.randn(n)
        if n == 4**5:
            exact = x.detach().double().requires_grad_()
            (expected,) = torch.autograd.grad(reference.elu(exact), exact, grad_y.double())
            (eager,) = torch.autograd.grad(nn.functional.elu(x), x, grad_y)
            prove("elu", {"grad_x": elu_step(x, grad_y)}, {"grad_x": eager}, {"grad_x": expected})
        points.append((n, times_of(lambda x=x, grad_y=grad_y: elu_step(x, grad_y), quick)))
    yield from rows_of("elu, forward + backward", "elements", points)


def channels(quick: bool) -> Iterator[Row]:
    """(16, C, L) with 16 C L the same for every C."""
    points = []
    for n in (4**power for power in range(1, 4 if quick else 8)):
        module = gk.BatchNormAct1d(n, act="swish")
        x, grad_y = (torch.randn(16, n, CHANNELS_ELEMENTS // 16 // n) for _ in range(2))
        operands = [x.requires_grad_(), *module.parameters()]

        def step(module: nn.Module = module, operands: list[Tensor] = operands, grad_y: Tensor = grad_y) -> None:
            torch.autograd.grad(module(operands[0]), operands, grad_y)

        points.append((n, times_of(step, quick)))
    yield from rows_of(f"BatchNormAct1d swish, forward + backward, {CHANNELS_ELEMENTS:,} elements", "channels", points)


def tensors(quick: bool) -> Iterator[Row]:
    points = []
    for n in (10**power for power in range(3 if quick else 6)):
        parameters = [nn.Parameter(torch.zeros(256)) for _ in range(n)]
        for parameter in parameters:
            parameter.grad = torch.randn(256)
        points.append((n, times_of(lambda parameters=parameters: gk.clip_grad_norm_(parameters, 1e9), quick)))
    yield from rows_of("clip_grad_norm_, not clipping, tensors of 256", "tensors", points)


def on_rank(rank: int, processes: Sequence[int], file: str, blocks: int, answer: str) -> None:
    """Times both collective operations in the first 1, 2, 4, ... ranks; the others wait. Rank 0 writes what it saw."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes[-1], timeout=timeout)
    x, grad_y = torch.randn(16, 64, 14, 14, requires_grad=True), torch.randn(16, 64, 14, 14)
    norm = torch.ones((), dtype=torch.float64)
    found: dict[str, list[Measured]] = {"SyncBatchNormAct": [], "all_reduce": []}
    for count in processes:
        group = distributed.new_group(range(count))
        if rank < count:
            module = gk.SyncBatchNormAct(64, process_group=group)
            calls: dict[str, Callable[[], Any]] = {
                "SyncBatchNormAct": lambda module=module: torch.autograd.grad(module(x), x, grad_y),
                "all_reduce": lambda group=group: distributed.all_reduce(norm, group=group),
            }
            for name, call in calls.items():
                times = []
                for block in range(blocks + 1):
                    distributed.barrier(group)
                    start = time.perf_counter()
                    for _ in range(CALLS):
                        call()
                    # The first block is not measured.
                    times += [(time.perf_counter() - start) / CALLS] if block else []
                norm.fill_(1)
                found[name].append((count, times))
        distributed.barrier()
    distributed.destroy_process_group()
    if rank == 0:
        Path(answer).write_text(json.dumps(found))


def processes(quick: bool) -> Iterator[Row]:
    counts = PROCESSES[:2] if quick else PROCESSES
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        arguments_ = (counts, f"{folder}/store", 3 if quick else 11, str(answer))
        context = multiprocessing.spawn(on_rank, arguments_, nprocs=counts[-1], join=False)
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise SystemExit(f"{counts[-1]} processes of Gloo did not end within {TIMEOUT_S} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        found = json.loads(answer.read_text())
    titles = {
        "SyncBatchNormAct": "SyncBatchNormAct, (16, 64, 14, 14) each, forward + backward",
        "all_reduce": "all_reduce of one float64, what a sharded norm sends",
    }
    for name, title in titles.items():
        yield from rows_of(title, "processes", found[name], offset=1)


# Of csrc/cpu/chunks.h: elements of a chunk, and bytes of its entry in the table.
CHUNK_ELEMENTS, CHUNK_BYTES = 65536, 24
# Of csrc/cuda/tensor_table.cuh, for one pointer a tensor: entries and elements that one launch takes.
LAUNCH_ENTRIES, LAUNCH_ELEMENTS = 2704, 8 * ((1 << 27) - 1)
PARAMETERS = 10**12
MODEL_TENSORS = 2000


MODEL_TITLE = (
    f"A model, nothing of it measured: clip_grad_norm_ of 10^{math.log10(PARAMETERS):.0f} float32 gradients in {MODEL_TENSORS:,} tensors"
)
MODEL_NOTE = (
    "Shards of even size, read at the copy's bandwidth of the header; all-reduces as the code issues them, one of one float64 for each "
    "dimension of the mesh that shards; launches, chunks and the bytes of their table from the constants of the sources."
)


def model(copy_gb_per_s: float) -> list[dict[str, Any]]:
    """For numbers of ranks that nobody here has."""
    rows = []
    for mesh in ((256,), (1024,), (128, 8), (2048, 8)):
        elements_ = PARAMETERS // math.prod(mesh)
        chunks = elements_ // CHUNK_ELEMENTS + MODEL_TENSORS
        rows.append(
            {
                "mesh": " x ".join(map(str, mesh)),
                "ranks": math.prod(mesh),
                "GB_a_rank": 4 * elements_ / 1e9,
                "least_seconds": 4 * elements_ / 1e9 / copy_gb_per_s,
                "all_reduces": len(mesh),
                "GPU_launches": max(math.ceil(MODEL_TENSORS / LAUNCH_ENTRIES), math.ceil(elements_ / LAUNCH_ELEMENTS)),
                "chunks_on_a_CPU": chunks,
                "table_MB": chunks * CHUNK_BYTES / 1e6,
            }
        )
    return rows


if __name__ == "__main__":
    options = arguments(__doc__)
    head = header()
    rows: list[Row] = []
    series = (elements, channels, tensors, processes)
    for number, make in enumerate(series, 1):
        rows += make(options.quick)
        print(f"{number}/{len(series)} {make.__name__}: {rows[-1].formula}", file=sys.stderr)
    reckoned = {"title": MODEL_TITLE, "note": MODEL_NOTE, "rows": model(head[COPY])}
    report(
        "cost against size",
        head,
        {
            "case": lambda row: row.case,
            "against": lambda row: row.against,
            "n": lambda row: f"{row.n:,}",
            "median us": lambda row: f"{row.median_us:,.1f}",
            "p20": lambda row: f"{row.p20_us:,.1f}",
            "p80": lambda row: f"{row.p80_us:,.1f}",
            "formula": lambda row: row.formula,
            "says us": lambda row: f"{row.fitted_us:,.1f}",
            "off by": lambda row: f"{row.fitted_us / row.median_us - 1:+.0%}",
        },
        rows,
        options.json,
        reckoned,
    )
    table = Table(*(name.replace("_", " ") for name in reckoned["rows"][0]), title=MODEL_TITLE, caption=MODEL_NOTE)
    for row in reckoned["rows"]:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
