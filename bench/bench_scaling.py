"""How cost grows with elements, channels, tensors and processes: measured points beside the formula fitted to them, and how far it is off.

A formula holds as far as the machine is one machine: in its caches (their size is measured) and beyond, for long runs and for short ones,
for few tensors and for many (where two lines fit best), for as many processes as cores and for more. Outputs are in warm memory: with fresh
pages the C library's thresholds would be in the formula. Processes are Gloo's, one thread each.
What no machine here can hold is reckoned from constants of the sources and printed apart, marked as a model: none of it was measured.
"""

import datetime
import itertools
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, multiprocessing, nn

from harness import (
    COPY,
    SPREAD_COLUMNS,
    Budget,
    arguments,
    copy_of,
    gk,
    header,
    measure,
    memory_of_outputs,
    prove,
    reference,
    report,
    spread,
)

PROCESSES = (1, 2, 4, 8)
TIMEOUT_S = 240
CALLS = 10
CHANNELS_ELEMENTS = 1 << 22
CHANNELS_BATCH = 16
# Of csrc/common/shape.h: shorter runs of one channel are taken several channels at a time.
SHORT_RUN_ELEMENTS = 64
SYNC_SHAPE = (16, 64, 14, 14)
# What starting the processes and their calls take of the script's seconds.
PROCESSES_SECONDS = 22
POINTS = 24
# A term that adds less than this of the time to its largest part is not told.
LEAST_SHARE = 1e-3
# x, grad_y, y and grad_x of one element.
ELU_BYTES = 16
# Bytes that a copy reads and writes, to see where it leaves the caches.
COPIED_BYTES = tuple(1 << power for power in range(19, 30))

Measured = tuple[int, list[float]]


@dataclass
class Row:
    """formula: in n, the thing that grows; where it holds and of how many points. fitted_us: what it says of this n, off_by: beside the
    median.
    """

    case: str
    provider: str
    against: str
    n: int
    median_us: float
    p20_us: float
    p80_us: float
    formula: str
    fitted_us: float
    off_by: float


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


def bend(points: Sequence[Measured]) -> float:
    """The n up to which one line and beyond which another are nearest to all points, two of them on either side at least."""

    def error(part: Sequence[tuple[float, float]]) -> float:
        fixed, each = fit(part)
        return sum(((fixed + each * n) / t - 1) ** 2 for n, t in part)

    medians = [(n, statistics.median(times)) for n, times in points]
    splits = {medians[i - 1][0]: error(medians[:i]) + error(medians[i:]) for i in range(2, len(points) - 1)}
    return min(splits, key=splits.__getitem__, default=math.inf)


def time_text(seconds: float) -> str:
    for unit, size in (("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)):
        # As it is written below, with three digits.
        if float(f"{seconds:.3g}") >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-12:.3g} ps"


def rows_of(case: str, against: str, points: Sequence[Measured], ends: float = math.inf, offset: int = 0) -> list[Row]:
    """One formula for n up to `ends` and one beyond; offset: what is taken from n in the formula."""
    spreads = {n: spread(times) for n, times in points}
    inside, beyond = [n for n in spreads if n <= ends], [n for n in spreads if n > ends]
    rows = []
    for part, where in ((inside, f"n <= {ends:,.0f}"), (beyond, f"n > {ends:,.0f}")):
        if not part:
            continue
        # One point says nothing of how it grows.
        fixed, each = fit([(n - offset, spreads[n][1]) for n in part]) if len(part) > 1 else (spreads[part[0]][1], 0.0)
        least, most = spreads[part[0]][1], spreads[part[-1]][1]
        terms = {time_text(fixed): fixed / least, f"{time_text(each)} x {f'(n - {offset})' if offset else 'n'}": each * part[-1] / most}
        formula = " + ".join(text for text, share in terms.items() if share > LEAST_SHARE)
        formula += f" for {where}" if inside and beyond else ""
        formula += f", of {len(part)} point{'s' * (len(part) > 1)}"
        for n in part:
            p20, median, p80 = spreads[n]
            said = fixed + each * (n - offset)
            rows.append(
                Row(
                    case=case,
                    provider="gradkernels",
                    against=against,
                    n=n,
                    median_us=median * 1e6,
                    p20_us=p20 * 1e6,
                    p80_us=p80 * 1e6,
                    formula=formula,
                    fitted_us=said * 1e6,
                    off_by=said / median - 1,
                )
            )
    return rows


@dataclass
class Machine:
    """What the series need to know: how long they may take, and where the machine becomes another one."""

    quick: bool
    budget: Budget
    cache_bytes: int

    def times_of(self, call: Callable[[], Any]) -> list[float]:
        with memory_of_outputs("warm"):
            return measure({"gradkernels": call}, {}, *((3, 0.005) if self.quick else (9, 0.05)), self.budget.share())["gradkernels"]


def cache_bytes(gb_per_s: dict[int, float]) -> int:
    """The most bytes that a copy moves at more than the geometric mean of its best bandwidth and the one in memory, that of the last."""
    middle = math.sqrt(max(gb_per_s.values()) * list(gb_per_s.values())[-1])
    return max(size for size, each in gb_per_s.items() if each >= middle)


def copies(quick: bool) -> dict[int, float]:
    """Bandwidth in GB/s of a copy by the bytes that it reads and writes, in the best of its blocks: caches are shared with strangers."""
    found = {}
    for size in COPIED_BYTES[: 8 if quick else None]:
        found[size] = size / 1e9 / min(measure({"copy": copy_of(size // 2)}, {}, blocks=5, seconds=0.01)["copy"])
    return found


def available_bytes() -> int:
    """What can be allocated without anything being written to disk."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.M)
    return int(found.group(1)) * 1000 if found else 4 << 30


def elu_step(x: Tensor, grad_y: Tensor) -> Tensor:
    (grad_x,) = torch.autograd.grad(gk.elu(x), x, grad_y)
    return grad_x


def drawn(n: int) -> Tensor:
    """n numbers, a power of two of them, of which a million are drawn: drawing takes longer than what is measured."""
    few = torch.randn(min(n, 1 << 20))
    return few.repeat(n // len(few))


def elements(machine: Machine) -> Iterator[Row]:
    # In half of what is free.
    most = 1 << 16 if machine.quick else available_bytes() // 2 // ELU_BYTES
    points = []
    powers = list(itertools.takewhile(lambda n: n <= most, (2**power for power in itertools.count(10))))
    # Every other one, and the last.
    for n in dict.fromkeys([*powers[::2], powers[-1]]):
        x, grad_y = drawn(n).requires_grad_(), drawn(n)
        if n == 4**5:
            exact = x.detach().double().requires_grad_()
            (expected,) = torch.autograd.grad(reference.elu(exact), exact, grad_y.double())
            (eager,) = torch.autograd.grad(nn.functional.elu(x), x, grad_y)
            prove("elu", {"grad_x": elu_step(x, grad_y)}, {"grad_x": eager}, {"grad_x": expected})
        points.append((n, machine.times_of(lambda x=x, grad_y=grad_y: elu_step(x, grad_y))))
    yield from rows_of("elu, forward + backward", "elements", points, machine.cache_bytes // ELU_BYTES)


def batch_norm_step(module: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor], grad_y: Tensor) -> dict[str, Tensor]:
    y = module(x)
    grads = torch.autograd.grad(y, [x, *parameters], grad_y)
    return {"y": y.detach(), **{f"gradient {i}": grad for i, grad in enumerate(grads)}}


def exact_batch_norm_step(bn: nn.Module, act: str, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """In float64, with the weight and bias of a layer that has not learnt."""
    weight, bias = torch.ones(x.shape[1], dtype=torch.float64), torch.zeros(x.shape[1], dtype=torch.float64)
    parameters = [each.requires_grad_() for each in (weight, bias)]

    def forward(x: Tensor) -> Tensor:
        return reference.batch_norm_act(x, None, None, *parameters, True, bn.momentum, bn.eps, act=act)

    return batch_norm_step(forward, x.detach().double().requires_grad_(), parameters, grad_y.double())


def channels(machine: Machine) -> Iterator[Row]:
    """(N, C, L) with N C L the same for every C."""
    points = []
    elements = CHANNELS_ELEMENTS >> (6 * machine.quick)
    for n in (4**power for power in range(1, 4 if machine.quick else 8)):
        module = gk.BatchNormAct1d(n, act="swish")
        # Off zero, or the gradients would be sums that cancel, of which no digit can be proved.
        x, grad_y = (torch.randn(CHANNELS_BATCH, n, elements // CHANNELS_BATCH // n).add_(0.5) for _ in range(2))
        step = partial(batch_norm_step, module, x.requires_grad_(), list(module.parameters()), grad_y)
        if n == 4:
            bn = nn.BatchNorm1d(n)
            eager = batch_norm_step(lambda x, bn=bn: nn.functional.silu(bn(x)), x, list(bn.parameters()), grad_y)
            prove("BatchNormAct1d", step(), eager, exact_batch_norm_step(bn, "swish", x, grad_y))
        points.append((n, machine.times_of(step)))
    ends = elements // CHANNELS_BATCH // SHORT_RUN_ELEMENTS
    yield from rows_of(f"BatchNormAct1d swish, forward + backward, {elements:,} elements", "channels", points, ends)


def tensors(machine: Machine) -> Iterator[Row]:
    points = []
    for n in (10**power for power in range(3 if machine.quick else 6)):
        parameters = [nn.Parameter(torch.zeros(256)) for _ in range(n)]
        for parameter in parameters:
            parameter.grad = torch.randn(256)
        if n == 10:
            grads = [parameter.grad for parameter in parameters]
            exact = reference.get_total_norm([grad.double() for grad in grads])
            prove("norm", {"norm": gk.get_total_norm(grads)}, {"norm": torch.nn.utils.get_total_norm(grads)}, {"norm": exact})
        points.append((n, machine.times_of(lambda parameters=parameters: gk.clip_grad_norm_(parameters, 1e9))))
    # What torch and Python keep of a tensor leaves other caches than its elements do.
    yield from rows_of("clip_grad_norm_, not clipping, tensors of 256", "tensors", points, bend(points))


def operands_of(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x, grad_y = (torch.randn(SYNC_SHAPE, generator=generator).add_(0.5) for _ in range(2))
    return x.requires_grad_(), grad_y


def prove_sync(module: nn.Module, count: int, rank: int) -> None:
    """The layer on `count` ranks is batch norm over all their batches; every rank draws them all."""
    x, grad_y = (torch.cat([each.detach() for each in part]) for part in zip(*map(operands_of, range(count)), strict=True))
    x.requires_grad_()
    bn = nn.BatchNorm2d(x.shape[1])
    eager = batch_norm_step(lambda x: nn.functional.leaky_relu(bn(x)), x, [], grad_y)
    exact = exact_batch_norm_step(bn, "leaky_relu", x, grad_y)
    mine = slice(rank * SYNC_SHAPE[0], (rank + 1) * SYNC_SHAPE[0])
    names = ("y", "gradient 0")
    actual = batch_norm_step(module, operands_of(rank)[0], [], operands_of(rank)[1])
    prove("SyncBatchNormAct", actual, {name: eager[name][mine] for name in names}, {name: exact[name][mine] for name in names})


def on_rank(rank: int, processes: Sequence[int], file: str, blocks: int, answer: str) -> None:
    """Times both collective operations in the first 1, 2, 4, ... ranks; the others wait. Rank 0 writes what it saw."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes[-1], timeout=timeout)
    x, grad_y = operands_of(rank)
    norm = torch.ones((), dtype=torch.float64)
    found: dict[str, list[Measured]] = {"SyncBatchNormAct": [], "all_reduce": []}
    for count in processes:
        group = distributed.new_group(range(count))
        if rank < count:
            module = gk.SyncBatchNormAct(SYNC_SHAPE[1], process_group=group)
            prove_sync(module, count, rank)
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


def processes(machine: Machine) -> Iterator[Row]:
    counts = PROCESSES[:2] if machine.quick else PROCESSES
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        arguments_ = (counts, f"{folder}/store", 3 if machine.quick else 11, str(answer))
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
        "SyncBatchNormAct": f"SyncBatchNormAct, {SYNC_SHAPE} each, forward + backward",
        "all_reduce": "all_reduce of one float64, what a sharded norm sends",
    }
    for name, title in titles.items():
        # Beyond its cores the processes wait for one another.
        yield from rows_of(title, "processes", found[name], os.cpu_count() or 1, offset=1)


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
    gb_per_s = copies(options.quick)
    caches = cache_bytes(gb_per_s)
    head = header() | {
        "copy, GB/s by MiB read and written": ", ".join(f"{size / (1 << 20):g}: {each:.0f}" for size, each in gb_per_s.items()),
        "caches, as far as a copy is as fast as in them": f"{caches / (1 << 20):g} MiB",
    }
    rows: list[Row] = []
    series = (elements, channels, tensors, processes)
    machine = Machine(options.quick, Budget(options.seconds - PROCESSES_SECONDS * (not options.quick), POINTS), caches)
    for number, make in enumerate(series, 1):
        rows += make(machine)
        print(f"{number}/{len(series)} {make.__name__}: {rows[-1].formula}", file=sys.stderr)
    reckoned = {"title": MODEL_TITLE, "note": MODEL_NOTE, "rows": model(head[COPY])}
    report(
        "cost against size, warm outputs",
        head,
        {
            "case": lambda row: row.case,
            "against": lambda row: row.against,
            "n": lambda row: f"{row.n:,}",
            **SPREAD_COLUMNS,
            "formula": lambda row: row.formula,
            "says us": lambda row: f"{row.fitted_us:,.1f}",
            "off by": lambda row: f"{row.off_by:+.0%}",
        },
        rows,
        options.json,
        reckoned,
    )
    table = Table(*(name.replace("_", " ") for name in reckoned["rows"][0]), title=MODEL_TITLE, caption=MODEL_NOTE)
    for row in reckoned["rows"]:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
