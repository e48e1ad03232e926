"""A training step of whole networks as torch computes it and converted: its time, the part that batch norm, activations and additions
take of it by torch.profiler, and the bytes saved for backward. The answer is proved in float64, where only rounding is small.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from harness import ROOT, STEP_COLUMNS, Budget, StepRow, arguments, gk, header, measure, report, spread

# The networks are those of the tests.
sys.path.insert(0, str(ROOT / "tests"))

from models.darknet import DarkNet
from models.efficientnet import EfficientNetBlocks
from models.resnet import resnet18, resnet50
from models.unet import UNet

# 16 images of 64 x 64.
SHAPE = (16, 3, 64, 64)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "EfficientNet blocks, SiLU": EfficientNetBlocks,
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "DarkNet-53, LeakyReLU": DarkNet,
    "U-Net, ELU": UNet,
}
# What the profiler calls batch norm, activations and the additions of residuals; additions of gradients are among them on both sides.
PART = ("batch_norm", "relu", "threshold_backward", "silu", "elu", "hardtanh", "aten::add", "gradkernels::")
BOUND = 1e-6


@dataclass
class Row(StepRow):
    part_ms: float
    saved_mb: float
    times_eager: float
    part_times_eager: float


@dataclass
class Operator:
    network: str
    provider: str
    operator: str
    calls: float
    ms: float


def step(model: nn.Module, x: Tensor) -> None:
    y = model(x)
    sum(each.square().mean() for each in (y if isinstance(y, list) else [y])).backward()
    model.zero_grad()


def prove(name: str, model: nn.Module) -> None:
    found = gk.convert(copy.deepcopy(model).double(), check=torch.randn(4, *SHAPE[1:], dtype=torch.float64))
    for what, difference in (("outputs", found.output_difference), ("gradients", found.gradient_difference)):
        if difference is None or not difference.difference <= BOUND * difference.magnitude:
            raise SystemExit(f"{name}: {what} differ by {difference}: nothing is timed")


def operators(name: str, provider: str, model: nn.Module, x: Tensor, steps: int) -> list[Operator]:
    """Time of the operators of PART themselves, per step."""
    step(model, x)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            step(model, x)
    return [
        Operator(name, provider, each.key, each.count / steps, each.self_cpu_time_total / 1e3 / steps)
        for each in seen.key_averages()
        if "::" in each.key and each.key != "aten::addmm" and any(part in each.key for part in PART)
    ]


def rows_of(name: str, quick: bool, until: float) -> tuple[list[Row], list[Operator]]:
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    models = {"eager": NETWORKS[name](), "gradkernels": NETWORKS[name]()}
    models["gradkernels"].load_state_dict(models["eager"].state_dict())
    prove(name, models["eager"])
    found = gk.convert(models["gradkernels"], check=x)
    saved = {"eager": found.saved_bytes_before or 0, "gradkernels": found.saved_bytes_after or 0}
    times = measure(
        {provider: partial(step, model, x) for provider, model in models.items()}, {}, *((2, 0.1) if quick else (9, 1.0)), until
    )
    spreads = {provider: spread(each) for provider, each in times.items()}
    profiled = {provider: operators(name, provider, model, x, 1 if quick else 5) for provider, model in models.items()}
    part = {provider: sum(each.ms for each in rows) for provider, rows in profiled.items()}
    rows = []
    for provider in models:
        p20, median, p80 = spreads[provider]
        rows.append(
            Row(
                case=name,
                provider=provider,
                median_ms=median * 1e3,
                p20_ms=p20 * 1e3,
                p80_ms=p80 * 1e3,
                part_ms=part[provider],
                saved_mb=saved[provider] / 1e6,
                times_eager=spreads["eager"][1] / median,
                part_times_eager=part["eager"] / part[provider],
            )
        )
    return rows, sorted((each for rows in profiled.values() for each in rows), key=lambda each: (each.provider, -each.ms))


if __name__ == "__main__":
    options = arguments(__doc__)
    head = header()
    rows: list[Row] = []
    seen: list[Operator] = []
    names = list(NETWORKS)[: 1 if options.quick else None]
    budget = Budget(options.seconds, len(names))
    for number, name in enumerate(names, 1):
        new = rows_of(name, options.quick, budget.share())
        rows += new[0]
        seen += new[1]
        print(f"{number}/{len(names)} {name}", file=sys.stderr)
    report(
        "operators of one step, self time",
        {},
        {
            "case": lambda row: row.network,
            "provider": lambda row: row.provider,
            "operator": lambda row: row.operator,
            "calls": lambda row: f"{row.calls:.0f}",
            "ms": lambda row: f"{row.ms:.2f}",
        },
        seen,
        None,
    )
    report(
        f"one training step, {' x '.join(map(str, SHAPE))}, float32",
        head,
        {
            **STEP_COLUMNS,
            "times eager": lambda row: f"{row.times_eager:.2f}",
            "BN + act + add, ms": lambda row: f"{row.part_ms:.1f}",
            "times eager, part": lambda row: f"{row.part_times_eager:.2f}",
            "saved, MB": lambda row: f"{row.saved_mb:.1f}",
        },
        rows,
        options.json,
    )
