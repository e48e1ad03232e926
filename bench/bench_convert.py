"""A training step of whole networks as torch computes it, converted, and converted under gk.recompute: its time, the part that batch norm,
activations and additions take of it by torch.profiler, the bytes kept for backward and the peak. The answer of the second is proved in
float64, where only rounding is small; that of the third is the second's to the bit.
"""

import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from harness import ROOT, STEP_COLUMNS, Budget, StepRow, arguments, gk, header, measure, peak_bytes, report, spread

# The networks are those of the tests, and so is what counts bytes.
sys.path.insert(0, str(ROOT / "tests"))

from memory import bytes_kept_by
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
RECOMPUTE = "gradkernels, recompute"


@dataclass
class Row(StepRow):
    part_ms: float
    saved_mb: float
    peak_mb: float | None
    times_eager: float
    part_times_eager: float


@dataclass
class Operator:
    network: str
    provider: str
    operator: str
    calls: float
    ms: float


@dataclass
class Provider:
    model: nn.Module
    context: Callable[[], AbstractContextManager[None]] = nullcontext

    def loss(self, x: Tensor) -> Tensor:
        with self.context():
            y = self.model(x)
            return sum((each.square().mean() for each in (y if isinstance(y, list) else [y])), start=torch.zeros(()))

    def step(self, x: Tensor) -> None:
        self.loss(x).backward()
        self.model.zero_grad()


def prove(name: str, model: nn.Module) -> None:
    found = gk.convert(copy.deepcopy(model).double(), check=torch.randn(4, *SHAPE[1:], dtype=torch.float64))
    for what, difference in (("outputs", found.output_difference), ("gradients", found.gradient_difference)):
        if difference is None or not difference.difference <= BOUND * difference.magnitude:
            raise SystemExit(f"{name}: {what} differ by {difference}: nothing is timed")


def prove_same(name: str, converted: Provider, recomputing: Provider, x: Tensor) -> None:
    parameters = list(converted.model.parameters())
    found = [torch.autograd.grad(each.loss(x), parameters) for each in (converted, recomputing)]
    if not all(map(torch.equal, *found)):
        raise SystemExit(f"{name}: recomputing changes gradients: nothing is timed")


def operators(name: str, provider: str, each: Provider, x: Tensor, steps: int) -> list[Operator]:
    """Time of the operators of PART themselves, per step."""
    each.step(x)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            each.step(x)
    return [
        Operator(name, provider, each.key, each.count / steps, each.self_cpu_time_total / 1e3 / steps)
        for each in seen.key_averages()
        if "::" in each.key and each.key != "aten::addmm" and any(part in each.key for part in PART)
    ]


def rows_of(name: str, quick: bool, until: float) -> tuple[list[Row], list[Operator]]:
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    eager, ours = NETWORKS[name](), NETWORKS[name]()
    ours.load_state_dict(eager.state_dict())
    prove(name, eager)
    gk.convert(ours)
    providers = {"eager": Provider(eager), "gradkernels": Provider(ours), RECOMPUTE: Provider(ours, gk.recompute)}
    prove_same(name, providers["gradkernels"], providers[RECOMPUTE], x)
    # The batch, which the first convolution keeps, was there before.
    saved = {provider: bytes_kept_by(partial(each.loss, x)) + x.nbytes for provider, each in providers.items()}
    peak = {provider: peak_bytes(partial(each.step, x)) for provider, each in providers.items()}
    times = measure(
        {provider: partial(each.step, x) for provider, each in providers.items()}, {}, *((2, 0.1) if quick else (9, 1.0)), until
    )
    spreads = {provider: spread(each) for provider, each in times.items()}
    profiled = {provider: operators(name, provider, each, x, 1 if quick else 3) for provider, each in providers.items()}
    part = {provider: sum(each.ms for each in rows) for provider, rows in profiled.items()}
    rows = []
    for provider in providers:
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
                peak_mb=None if peak[provider] is None else peak[provider] / 1e6,
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
            "peak, MB": lambda row: "" if row.peak_mb is None else f"{row.peak_mb:.1f}",
        },
        rows,
        options.json,
    )
