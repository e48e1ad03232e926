"""A whole training step, forward, loss, backward, clipping and SGD: torch's, and the same network converted with gk.clip_grad_norm_.

Time, memory and where it goes: peak is resident memory above what is resident between two steps, saved is what autograd keeps for backward,
the parts are self times of operators by torch.profiler. Proved in float64: after two steps both networks have the same weights.
"""

import copy
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from harness import ROOT, STEP_COLUMNS, Budget, StepRow, arguments, gk, header, measure, peak_bytes, report, spread

# The networks are those of the tests.
sys.path.insert(0, str(ROOT / "tests"))

from models.darknet import DarkNet
from models.resnet import resnet18

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18": (resnet18, (32, 3, 96, 96)),
    "DarkNet-53, YOLOv3's backbone": (DarkNet, (8, 3, 128, 128)),
}
PROVED_SHAPE = (4, 3, 64, 64)
QUICK_SHAPE = (2, 3, 32, 32)
MAX_NORM = 1.0
# The share of a network's seconds that goes into its time; the profiler is slow.
MEASURED = 0.6
BOUND = 1e-6
CLIP = {"eager": torch.nn.utils.clip_grad_norm_, "gradkernels": gk.clip_grad_norm_}
# Parts by what the profiler calls their operators; the first that fits. What backward adds up of gradients counts among the additions.
PARTS = {
    "convolution": re.compile(r"conv|mkldnn|dnnl"),
    "batch_norm_act_add": re.compile(r"batch_norm|relu|threshold_backward|silu|elu|aten::add_?$|gradkernels::"),
}


@dataclass
class Row(StepRow):
    times_eager: float
    peak_mb: float | None
    saved_mb: float
    convolution_ms: float
    batch_norm_act_add_ms: float
    clipping_ms: float
    optimizer_ms: float
    rest_ms: float


def training_step(model: nn.Module, clip: Callable[..., Tensor], x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        y = model(x)
        sum(each.square().mean() for each in (y if isinstance(y, list) else [y])).backward()
        with record_function("clipping"):
            clip(model.parameters(), MAX_NORM)
        optimizer.step()

    return step


def prove(name: str, model: nn.Module) -> None:
    models = {"eager": copy.deepcopy(model).double(), "gradkernels": copy.deepcopy(model).double()}
    gk.convert(models["gradkernels"])
    x = torch.randn(PROVED_SHAPE, dtype=torch.float64)
    for provider, each in models.items():
        step = training_step(each, CLIP[provider], x)
        step()
        step()
    actual, expected = models["gradkernels"].state_dict(), models["eager"].state_dict()
    for key, tensor in expected.items():
        difference, magnitude = (actual[key] - tensor).abs().max().item(), tensor.abs().max().item()
        if not difference <= BOUND * magnitude:
            raise SystemExit(f"{name}: {key} differs by {difference:.3g} where the largest is {magnitude:.3g}: nothing is timed")


def part_of(event: FunctionEvent) -> str:
    above: FunctionEvent | None = event
    while above is not None:
        if above.name == "clipping":
            return "clipping"
        if above.name.startswith("Optimizer.step"):
            return "optimizer"
        above = above.cpu_parent
    return next((part for part, names in PARTS.items() if names.search(event.name)), "rest")


def parts_ms(step: Callable[[], None], steps: int) -> dict[str, float]:
    """Milliseconds a step of each part."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            step()
    parts = dict.fromkeys([*PARTS, "clipping", "optimizer", "rest"], 0.0)
    for event in seen.events():
        parts[part_of(event)] += event.self_cpu_time_total / 1e3 / steps
    return parts


def rows_of(name: str, quick: bool, until: float) -> list[Row]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    x = torch.randn(QUICK_SHAPE if quick else shape)
    models = {"eager": make(), "gradkernels": make()}
    models["gradkernels"].load_state_dict(models["eager"].state_dict())
    prove(name, models["eager"])
    found = gk.convert(models["gradkernels"], check=x)
    saved = {"eager": found.saved_bytes_before or 0, "gradkernels": found.saved_bytes_after or 0}
    steps = {provider: training_step(model, CLIP[provider], x) for provider, model in models.items()}
    # The memory and the profile take what is left: some steps each.
    times = measure(steps, {}, *((2, 0.01) if quick else (9, 0.5)), time.monotonic() + MEASURED * max(0.0, until - time.monotonic()))
    median = {provider: statistics.median(each) for provider, each in times.items()}
    rows = []
    for provider, step in steps.items():
        p20, _, p80 = spread(times[provider])
        peak = peak_bytes(step)
        rows.append(
            Row(
                case=f"{name}, {' x '.join(map(str, x.shape))}",
                provider=provider,
                median_ms=median[provider] * 1e3,
                p20_ms=p20 * 1e3,
                p80_ms=p80 * 1e3,
                times_eager=median["eager"] / median[provider],
                peak_mb=None if peak is None else peak / 1e6,
                saved_mb=saved[provider] / 1e6,
                **{f"{part}_ms": ms for part, ms in parts_ms(step, 1 if quick else 3).items()},
            )
        )
    return rows


if __name__ == "__main__":
    options = arguments(__doc__)
    head = header()
    rows: list[Row] = []
    names = list(NETWORKS)[: 1 if options.quick else None]
    budget = Budget(options.seconds, len(names))
    for number, name in enumerate(names, 1):
        rows += rows_of(name, options.quick, budget.share())
        print(f"{number}/{len(names)} {name}: {rows[-1].times_eager:.2f} times as fast as eager", file=sys.stderr)
    report(
        "one training step with clipping and SGD, float32",
        head,
        {
            **STEP_COLUMNS,
            "times eager": lambda row: f"{row.times_eager:.2f}",
            "peak MB": lambda row: "" if row.peak_mb is None else f"{row.peak_mb:.0f}",
            "saved MB": lambda row: f"{row.saved_mb:.0f}",
            **{
                part: lambda row, part=part: f"{getattr(row, f'{part}_ms'):.1f}"
                for part in ("convolution", "batch_norm_act_add", "clipping", "optimizer", "rest")
            },
        },
        rows,
        options.json,
    )
