"""The self-test: whether this build computes on this machine what torch computes, for every operator, dtype and device there is.

A result is right if it is at most as far from torch's float64 result as torch's own in that dtype, or within BOUND units (float64 itself
within BOUND_OF_FLOAT64, as both round there); a unit is the dtype's epsilon times the largest element. Gradients are held against finite
differences, and on the CPU every bit must be the same with any number of threads. A check that raises has failed, and the others go on.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from gradkernels import _native, reference
from gradkernels.acts import ACTS
from gradkernels.gradients import norms_by_torch

try:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"gradkernels selftest needs one more package than gradkernels ({error}): pip install rich") from error

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BOUND = 4.0
BOUND_OF_FLOAT64 = 256.0
# Enough elements for several threads, in a shape whose rows end in the middle of a register.
SHAPE = (4, 16, 31, 33)
SMALL_SHAPE = (3, 2, 2, 3)

# Columns of text where there is no terminal to ask.
NARROWEST = 120

Tensors = dict[str, Tensor]
Compute = Callable[[ModuleType, Tensors], Tensors]


def draw(shape: tuple[int, ...]) -> Tensors:
    """Operands of every check, in float64; x stays away from the kinks of the activations, where no finite difference is right."""
    torch.manual_seed(0)
    x, grad_y, residual = torch.randn(3, *shape, dtype=torch.float64, device="cpu")
    weight, bias, mean, var = torch.rand(4, shape[1], dtype=torch.float64, device="cpu") + 0.5
    x = torch.where(x.abs() < 0.05, 0.5, x)
    return {"x": x, "grad_y": grad_y, "residual": residual, "weight": weight, "bias": bias, "running_mean": mean, "running_var": var}


def differentiate(function: Callable[..., Tensor], *names: str) -> Compute:
    """y and the gradient of each named operand of function(library, *operands)."""

    def compute(library: ModuleType, given: Tensors) -> Tensors:
        leaves = [given[name].detach().requires_grad_() for name in names]
        y = function(library, *leaves)
        grads = torch.autograd.grad(y, leaves, given["grad_y"])
        return {"y": y.detach(), **{f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}}

    return compute


def batch_norm_act(library: ModuleType, given: Tensors, act: str, training: bool) -> Tensors:
    names = ("x", "weight", "bias", "residual")
    stats = given["running_mean"].clone(), given["running_var"].clone()

    def function(library: ModuleType, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = library.batch_norm_act(x, *stats, weight, bias, training, act=act, residual=residual)
        return y

    result = differentiate(function, *names)(library, given)
    return result | {"running_mean": stats[0], "running_var": stats[1]}


def gradients(given: Tensors) -> list[nn.Parameter]:
    """A parameter for each of two gradients."""
    parameters = []
    for name in ("grad_y", "weight"):
        parameter = nn.Parameter(torch.zeros_like(given[name]))
        parameter.grad = given[name].clone()
        parameters.append(parameter)
    return parameters


def clip_grad_norm_(library: ModuleType, given: Tensors) -> Tensors:
    parameters = gradients(given)
    total_norm = library.clip_grad_norm_(parameters, 1.0)
    return {"total_norm": total_norm, **{f"grad {i}": each.grad for i, each in enumerate(parameters) if each.grad is not None}}


def clip_grad_value_(library: ModuleType, given: Tensors) -> Tensors:
    parameters = gradients(given)
    library.clip_grad_value_(parameters, 0.5)
    return {f"grad {i}": each.grad for i, each in enumerate(parameters) if each.grad is not None}


def grad_norms(library: ModuleType, given: Tensors) -> Tensors:
    if library is not reference:
        report = library.grad_report(gradients(given))
        return {"norms": report.norms, "max_abs": report.max_abs}
    norms, max_abs, *_ = norms_by_torch([given["grad_y"], given["weight"]])
    return {"norms": norms, "max_abs": max_abs}


def rmsprop(library: ModuleType, given: Tensors) -> Tensors:
    parameters = gradients(given)
    optimizer = (torch if library is reference else library).optim.RMSprop(parameters, lr=0.1, eps=1e-3, momentum=0.9)
    for _ in range(2):
        optimizer.step()
    return {f"parameter {i}": each.detach() for i, each in enumerate(parameters)}


# operator -> what computes it, and the operands by which gradcheck differentiates it
OPERATORS: dict[str, Compute] = {
    "leaky_relu": differentiate(lambda library, x: library.leaky_relu(x, 0.1), "x"),
    "leaky_relu in place": differentiate(lambda library, x: library.leaky_relu(x * 1, 0.1, inplace=True), "x"),
    "prelu": differentiate(lambda library, x, weight: library.prelu(x, weight), "x", "weight"),
    "rrelu": differentiate(lambda library, x: library.rrelu(x), "x"),
    "elu": differentiate(lambda library, x: library.elu(x), "x"),
    "elu in place": differentiate(lambda library, x: library.elu(x * 1, inplace=True), "x"),
    "swish": differentiate(lambda library, x: library.swish(x), "x"),
    "swish, beta learnt": differentiate(lambda library, x, weight: library.swish(x, weight), "x", "weight"),
    **{f"batch_norm_act {act}": partial(batch_norm_act, act=act, training=True) for act in ACTS},
    "batch_norm_act, eval": partial(batch_norm_act, act="leaky_relu", training=False),
    "clip_grad_norm_": clip_grad_norm_,
    "clip_grad_value_": clip_grad_value_,
    "grad_report": grad_norms,
    "optim.RMSprop": rmsprop,
}
DIFFERENTIATED: dict[str, Callable[..., Tensor]] = {
    "leaky_relu": lambda library, x, weight, bias: library.leaky_relu(x, 0.1),
    "prelu": lambda library, x, weight, bias: library.prelu(x, weight),
    "rrelu": lambda library, x, weight, bias: library.rrelu(x),
    "elu": lambda library, x, weight, bias: library.elu(x),
    "swish": lambda library, x, weight, bias: library.swish(x),
    "swish, beta learnt": lambda library, x, weight, bias: library.swish(x, weight),
    **{
        f"batch_norm_act {act}": partial(
            lambda library, x, weight, bias, act: library.batch_norm_act(x, None, None, weight, bias, True, act=act), act=act
        )
        for act, record in ACTS.items()
        if record.saves != "mask"
    },
}


@dataclass
class Check:
    """One operator in one dtype on one device; `failed` says in words what did not hold."""

    operator: str
    dtype: torch.dtype
    device: str
    error: float = math.nan
    torchs: float = math.nan
    gradient: str = ""
    threads: str = ""
    failed: str = ""


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def error_of(results: Tensors, exact: Tensors, dtype: torch.dtype) -> float:
    """The largest distance from the exact results, in units of the dtype's epsilon times the largest element."""
    worst = 0.0
    for name, expected in exact.items():
        unit = torch.finfo(dtype).eps * max(expected.abs().max().item(), torch.finfo(dtype).tiny)
        error = (results[name].double().cpu() - expected).abs().max().item() / unit
        # nan is larger than everything.
        worst = error if math.isnan(error) else max(worst, error)
    return worst


def run(check: Check, library: ModuleType) -> None:
    """Compares a library's operator with the reference, and fills in the check."""
    compute = OPERATORS[check.operator]
    # What all three start from is what the dtype can hold.
    given = {name: tensor.to(check.dtype).to(check.device) for name, tensor in draw(SHAPE).items()}
    exact = compute(reference, {name: tensor.double().cpu() for name, tensor in given.items()})
    ours = compute(library, given)
    check.error, check.torchs = error_of(ours, exact, check.dtype), error_of(compute(reference, given), exact, check.dtype)
    bound = BOUND_OF_FLOAT64 if check.dtype == torch.float64 else BOUND
    failed = [] if check.error <= max(check.torchs, bound) else [f"an error of {check.error:.3g}, torch's is {check.torchs:.3g}"]
    if check.device == "cpu":
        with threads(1):
            alone = compute(library, given)
        with threads(max(torch.get_num_threads(), 2)):
            together = compute(library, given)
        same = all(torch.equal(alone[name], together[name]) for name in alone)
        check.threads = "same" if same else "differ"
        failed += [] if same else ["bits that depend on the number of threads"]
    if check.dtype == torch.float64 and check.operator in DIFFERENTIATED:
        small = draw(SMALL_SHAPE)
        leaves = [small[name].to(check.device).requires_grad_() for name in ("x", "weight", "bias")]
        right = torch.autograd.gradcheck(partial(DIFFERENTIATED[check.operator], library), leaves, raise_exception=False)
        check.gradient = "right" if right else "wrong"
        failed += [] if right else ["a gradient that is not that of finite differences"]
    check.failed = "; ".join(failed)


def devices() -> list[str]:
    """The CPU, and what accelerator torch finds."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def checks() -> list[Check]:
    return [
        Check(operator, dtype, device)
        for device in devices()
        for operator in OPERATORS
        for dtype in DTYPES
        if not (device == "mps" and dtype == torch.float64)
    ]


def table_of(device: str, done: list[Check]) -> Table:
    """A line for each operator."""
    table = Table(title=f"{device}: error, and torch's", box=SIMPLE, pad_edge=False)
    table.add_column("operator", no_wrap=True)
    for dtype in DTYPES:
        table.add_column(str(dtype).removeprefix("torch."), justify="right", no_wrap=True)
    for heading in ("gradient", "bits under threads"):
        table.add_column(heading)
    for operator in OPERATORS:
        of_operator = {check.dtype: check for check in done if (check.operator, check.device) == (operator, device)}
        cells = [
            ""
            if dtype not in of_operator
            else f"{of_operator[dtype].error:.2f} {of_operator[dtype].torchs:.2f}"
            if dtype != torch.float64
            else f"{of_operator[dtype].error:.2f}"
            for dtype in DTYPES
        ]
        gradient, bits = (sorted({getattr(each, name) for each in of_operator.values()} - {""}) for name in ("gradient", "threads"))
        failed = any(each.failed for each in of_operator.values())
        table.add_row(operator, *cells, " ".join(gradient), " ".join(bits), style="red" if failed else None)
    return table


def main(library: ModuleType) -> int:
    """Runs every check of a library with the functions of gradkernels; returns 0 if all of them passed, else 1."""
    if _native.C is None:
        print(f"gradkernels runs on operators composed of torch's own, there is nothing to test: {_native.reason}.")
        print(f"To mend it: {_native.remedy}")
        return 1
    console = Console()
    if not console.is_terminal:
        console = Console(width=NARROWEST)
    started = time.monotonic()
    done = checks()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking", total=len(done))
        for check in done:
            progress.update(task, description=f"{check.operator} {check.dtype}")
            try:
                run(check, library)
            except Exception as error:
                check.failed = f"{type(error).__name__}: {error}".partition("\n")[0]
            progress.advance(task)
    console.print(
        f"gradkernels {library.__version__}, torch {torch.__version__}, {_native.C.instruction_set()}, {torch.get_num_threads()} threads"
    )
    for device in devices():
        console.print(table_of(device, done))
    console.print(
        "Errors are in units of the dtype's epsilon times the largest element, float64 beside torch's. "
        f"Right is what is no worse than torch or within {BOUND:g}, float64 within {BOUND_OF_FLOAT64:g}."
    )
    failures = [check for check in done if check.failed]
    for check in failures:
        console.print(f"FAILED {check.operator}, {check.dtype}, {check.device}: {check.failed}", style="red", markup=False)
    console.print(f"{len(done) - len(failures)} of {len(done)} checks passed in {time.monotonic() - started:.0f} s")
    return 1 if failures else 0
