"""The self-test compares this build on this machine with torch, for every operator, dtype and device.

An error is the distance from torch's float64 result, in units of the dtype's epsilon times the largest
element. An operator passes if its error is at most torch's error in the same dtype, or at most BOUND. In
float64 the bound is BOUND_OF_FLOAT64, because both sides round there. Gradients are compared with finite
differences. On the CPU, every bit must be the same with any number of threads. A check that raises an
exception has failed, and the other checks go on.
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
    raise SystemExit(f"gradkernels selftest needs rich ({error}): pip install rich") from error

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BOUND = 4.0
BOUND_OF_FLOAT64 = 256.0
# Enough elements for several threads, and rows that do not fill whole registers.
SHAPE = (4, 16, 31, 33)
# As many pixels as kernels of group norm need.
SMALL_SHAPE = (2, 4, 7, 7)

# In characters, if the output is not a terminal.
WIDTH = 120

Tensors = dict[str, Tensor]
Compute = Callable[[ModuleType, Tensors], Tensors]


def draw(shape: tuple[int, ...]) -> Tensors:
    """The operands of every check, in float64. x avoids kinks, where finite differences are wrong."""
    torch.manual_seed(0)
    x, grad_y, residual = torch.randn(3, *shape, dtype=torch.float64, device="cpu")
    weight, bias, mean, var = torch.rand(4, shape[1], dtype=torch.float64, device="cpu") + 0.5
    x = torch.where(x.abs() < 0.05, 0.5, x)
    return {"x": x, "grad_y": grad_y, "residual": residual, "weight": weight, "bias": bias, "running_mean": mean, "running_var": var}


def differentiate(function: Callable[..., Tensor], *names: str) -> Compute:
    """Computes y = function(library, *operands) and the gradient of each named operand."""

    def compute(library: ModuleType, operands: Tensors) -> Tensors:
        leaves = [operands[name].detach().requires_grad_() for name in names]
        y = function(library, *leaves)
        grads = torch.autograd.grad(y, leaves, operands["grad_y"])
        return {"y": y.detach(), **{f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}}

    return compute


def batch_norm_act(library: ModuleType, operands: Tensors, act: str, training: bool) -> Tensors:
    names = ("x", "weight", "bias", "residual")
    stats = operands["running_mean"].clone(), operands["running_var"].clone()

    def function(library: ModuleType, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = library.batch_norm_act(x, *stats, weight, bias, training, act=act, residual=residual)
        return y

    result = differentiate(function, *names)(library, operands)
    return result | {"running_mean": stats[0], "running_var": stats[1]}


def group_norm_act(library: ModuleType, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, act: str) -> Tensor:
    y: Tensor = library.group_norm_act(x, x.shape[1] // 2, weight, bias, act=act, residual=residual)
    return y


def gradients(operands: Tensors) -> list[nn.Parameter]:
    """Two parameters with gradients."""
    parameters = []
    for name in ("grad_y", "weight"):
        parameter = nn.Parameter(torch.zeros_like(operands[name]))
        parameter.grad = operands[name].clone()
        parameters.append(parameter)
    return parameters


def grads_of(parameters: list[nn.Parameter]) -> Tensors:
    return {f"grad {i}": parameter.grad for i, parameter in enumerate(parameters) if parameter.grad is not None}


def clip_grad_norm_(library: ModuleType, operands: Tensors) -> Tensors:
    parameters = gradients(operands)
    total_norm = library.clip_grad_norm_(parameters, 1.0)
    return {"total_norm": total_norm, **grads_of(parameters)}


def clip_grad_value_(library: ModuleType, operands: Tensors) -> Tensors:
    parameters = gradients(operands)
    library.clip_grad_value_(parameters, 0.5)
    return grads_of(parameters)


def adaptive_clip_grad_(library: ModuleType, operands: Tensors) -> Tensors:
    parameters = gradients(operands)
    library.adaptive_clip_grad_(parameters, 0.1, 1e-3, 2.0)
    return grads_of(parameters)


def grad_norms(library: ModuleType, operands: Tensors) -> Tensors:
    if library is not reference:
        report = library.grad_report(gradients(operands))
        return {"norms": report.norms, "max_abs": report.max_abs}
    norms, max_abs, *_ = norms_by_torch([operands["grad_y"], operands["weight"]])
    return {"norms": norms, "max_abs": max_abs}


def rmsprop(library: ModuleType, operands: Tensors) -> Tensors:
    parameters = gradients(operands)
    optimizer = (torch if library is reference else library).optim.RMSprop(parameters, lr=0.1, eps=1e-3, momentum=0.9)
    for _ in range(2):
        optimizer.step()
    return {f"parameter {i}": parameter.detach() for i, parameter in enumerate(parameters)}


# operator -> a function of a library and the operands, which returns results and gradients
OPERATORS: dict[str, Compute] = {
    "leaky_relu": differentiate(lambda library, x: library.leaky_relu(x, 0.1), "x"),
    "leaky_relu in place": differentiate(lambda library, x: library.leaky_relu(x * 1, 0.1, inplace=True), "x"),
    "prelu": differentiate(lambda library, x, weight: library.prelu(x, weight), "x", "weight"),
    "rrelu": differentiate(lambda library, x: library.rrelu(x), "x"),
    "elu": differentiate(lambda library, x: library.elu(x), "x"),
    "elu in place": differentiate(lambda library, x: library.elu(x * 1, inplace=True), "x"),
    "swish": differentiate(lambda library, x: library.swish(x), "x"),
    "swish, learnable beta": differentiate(lambda library, x, weight: library.swish(x, weight), "x", "weight"),
    **{f"batch_norm_act {act}": partial(batch_norm_act, act=act, training=True) for act in ACTS},
    "batch_norm_act, eval": partial(batch_norm_act, act="leaky_relu", training=False),
    **{
        f"group_norm_act {act}": differentiate(partial(group_norm_act, act=act), "x", "weight", "bias", "residual")
        for act in ("leaky_relu", "swish")
    },
    "clip_grad_norm_": clip_grad_norm_,
    "clip_grad_value_": clip_grad_value_,
    "adaptive_clip_grad_": adaptive_clip_grad_,
    "grad_report": grad_norms,
    "optim.RMSprop": rmsprop,
}
# operator -> the function that gradcheck differentiates by x, weight and bias
DIFFERENTIATED: dict[str, Callable[..., Tensor]] = {
    "leaky_relu": lambda library, x, weight, bias: library.leaky_relu(x, 0.1),
    "prelu": lambda library, x, weight, bias: library.prelu(x, weight),
    "rrelu": lambda library, x, weight, bias: library.rrelu(x),
    "elu": lambda library, x, weight, bias: library.elu(x),
    "swish": lambda library, x, weight, bias: library.swish(x),
    "swish, learnable beta": lambda library, x, weight, bias: library.swish(x, weight),
    **{
        f"batch_norm_act {act}": partial(
            lambda library, x, weight, bias, act: library.batch_norm_act(x, None, None, weight, bias, True, act=act), act=act
        )
        for act, record in ACTS.items()
        if record.saves != "mask"
    },
    "group_norm_act swish": partial(group_norm_act, act="swish"),
}


@dataclass
class Check:
    """One operator in one dtype on one device; `failed` holds the reasons of a failure."""

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
    """The largest error of the results, in units of the dtype's epsilon times the largest element."""
    worst = 0.0
    for name, expected in exact.items():
        unit = torch.finfo(dtype).eps * max(expected.abs().max().item(), torch.finfo(dtype).tiny)
        error = (results[name].double().cpu() - expected).abs().max().item() / unit
        # nan counts as the largest error.
        worst = error if math.isnan(error) else max(worst, error)
    return worst


def run(check: Check, library: ModuleType) -> None:
    """Compares an operator of the library with the reference, and completes the check."""
    compute = OPERATORS[check.operator]
    # Rounded to the dtype first, so that all three computations have the same operands.
    operands = {name: tensor.to(check.dtype).to(check.device) for name, tensor in draw(SHAPE).items()}
    exact = compute(reference, {name: tensor.double().cpu() for name, tensor in operands.items()})
    ours = compute(library, operands)
    check.error, check.torchs = error_of(ours, exact, check.dtype), error_of(compute(reference, operands), exact, check.dtype)
    bound = BOUND_OF_FLOAT64 if check.dtype == torch.float64 else BOUND
    failed = [] if check.error <= max(check.torchs, bound) else [f"its error is {check.error:.3g}, and torch's is {check.torchs:.3g}"]
    if check.device == "cpu":
        with threads(1):
            alone = compute(library, operands)
        with threads(max(torch.get_num_threads(), 2)):
            together = compute(library, operands)
        same = all(torch.equal(alone[name], together[name]) for name in alone)
        check.threads = "same" if same else "differ"
        failed += [] if same else ["its bits depend on the number of threads"]
    if check.dtype == torch.float64 and check.operator in DIFFERENTIATED:
        small = draw(SMALL_SHAPE)
        leaves = [small[name].to(check.device).requires_grad_() for name in ("x", "weight", "bias")]
        right = torch.autograd.gradcheck(partial(DIFFERENTIATED[check.operator], library), leaves, raise_exception=False)
        check.gradient = "right" if right else "wrong"
        failed += [] if right else ["its gradient differs from finite differences"]
    check.failed = "; ".join(failed)


def devices() -> list[str]:
    """The CPU, and the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def all_checks() -> list[Check]:
    return [
        Check(operator, dtype, device)
        for device in devices()
        for operator in OPERATORS
        for dtype in DTYPES
        if not (device == "mps" and dtype == torch.float64)
    ]


def table_of(device: str, checks: list[Check]) -> Table:
    """The results on a device, one line per operator."""
    table = Table(title=f"{device}: our error, torch's error", box=SIMPLE, pad_edge=False)
    table.add_column("operator", no_wrap=True)
    for dtype in DTYPES:
        table.add_column(str(dtype).removeprefix("torch."), justify="right", no_wrap=True)
    for heading in ("gradient", "bits with 1 and more threads"):
        table.add_column(heading)
    for operator in OPERATORS:
        of_operator = {check.dtype: check for check in checks if (check.operator, check.device) == (operator, device)}
        cells = [
            ""
            if dtype not in of_operator
            else f"{of_operator[dtype].error:.2f} {of_operator[dtype].torchs:.2f}"
            if dtype != torch.float64
            else f"{of_operator[dtype].error:.2f}"
            for dtype in DTYPES
        ]
        gradient, bits = (sorted({getattr(check, name) for check in of_operator.values()} - {""}) for name in ("gradient", "threads"))
        failed = any(check.failed for check in of_operator.values())
        table.add_row(operator, *cells, " ".join(gradient), " ".join(bits), style="red" if failed else None)
    return table


def main(library: ModuleType) -> int:
    """Runs every check on a module with the functions of gradkernels; returns 0 if all passed, else 1."""
    kernels = _native.library()
    if kernels is None:
        print("gradkernels runs without its kernels, on torch's operators, so there is nothing to test:")
        print(f"{_native.reason}, and {_native.portable_reason}.")
        print(f"To fix this, run: {_native.remedy}")
        return 1
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    started = time.monotonic()
    checks = all_checks()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking", total=len(checks))
        for check in checks:
            progress.update(task, description=f"{check.operator} {check.dtype}")
            try:
                run(check, library)
            except Exception as error:
                check.failed = f"{type(error).__name__}: {error}".partition("\n")[0]
            progress.advance(task)
    console.print(
        f"gradkernels {library.__version__}, torch {torch.__version__}, {'portable' if _native.C is None else 'native'} library, "
        f"{kernels.instruction_set()}, {torch.get_num_threads()} threads"
    )
    for device in devices():
        console.print(table_of(device, checks))
    console.print(
        "Errors are distances from torch's float64 result, in units of the dtype's epsilon times the largest element. "
        f"An error passes if it is at most torch's or at most {BOUND:g} (float64: {BOUND_OF_FLOAT64:g})."
    )
    failures = [check for check in checks if check.failed]
    for check in failures:
        console.print(f"FAILED {check.operator}, {check.dtype}, {check.device}: {check.failed}", style="red", markup=False)
    console.print(f"{len(checks) - len(failures)} of {len(checks)} checks passed in {time.monotonic() - started:.0f} s")
    return 1 if failures else 0
