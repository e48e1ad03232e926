"""What GradientMonitor adds to a training step of ResNet-18. Activations are looked at in every step here; by default it is every tenth.

It moves 8G at least, G = bytes of all gradients: a copy of the weights before the step (2G), the difference behind it (3G) and one pass
over gradients, weights and updates (3G). That does not grow with the batch, and a step does, so the share is that of one batch size.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import ROOT, STEP_COLUMNS, Budget, StepRow, arguments, gk, header, measure, report, spread

# The network is that of the tests.
sys.path.insert(0, str(ROOT / "tests"))

from models.resnet import resnet18

# Not more of a step than this, of the first case.
MOST_SHARE = 0.03
MODES = {
    "eager": None,
    "gradients and weights": {"activations_every": None},
    "with activations": {"activations_every": 1},
}


@dataclass
class Row(StepRow):
    share: float


def training_step(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def prove(models: dict[str, nn.Module], steps: dict[str, Callable[[], None]]) -> None:
    """After two steps every network is still the same, to the bit."""
    for step in steps.values():
        step()
        step()
    for provider, model in models.items():
        pairs = zip(model.state_dict().values(), models["eager"].state_dict().values(), strict=True)
        if not all(torch.equal(ours, theirs) for ours, theirs in pairs):
            raise SystemExit(f"{provider}: monitoring changed the training, nothing is timed")


def rows_of(images: int, pixels: int, quick: bool, until: float) -> list[Row]:
    x, target = torch.randn(images, 3, pixels, pixels), torch.randint(1000, (images,))
    models: dict[str, nn.Module] = {provider: resnet18(classes=1000) for provider in MODES}
    monitors = []
    for provider, model in models.items():
        model.load_state_dict(models["eager"].state_dict())
        if (options := MODES[provider]) is not None:
            monitors.append(gk.GradientMonitor(model, **options))
    steps = {provider: training_step(model, x, target) for provider, model in models.items()}
    prove(models, steps)
    times = measure(steps, {}, *((2, 0.1) if quick else (9, 1.0)), until)
    for monitor in monitors:
        monitor.remove()
    eager = statistics.median(times["eager"])
    rows = []
    for provider, each in times.items():
        p20, median, p80 = spread(each)
        rows.append(Row(f"ResNet-18, ({images}, 3, {pixels}, {pixels})", provider, median * 1e3, p20 * 1e3, p80 * 1e3, median / eager - 1))
    return rows


if __name__ == "__main__":
    options = arguments(__doc__)
    sizes = [(8, 64)] if options.quick else [(32, 224), (32, 64)]
    budget = Budget(options.seconds, len(sizes))
    rows: list[Row] = []
    for number, (images, pixels) in enumerate(sizes, 1):
        rows += rows_of(images, pixels, options.quick, budget.share())
        print(f"{number}/{len(sizes)} {rows[-1].case}", file=sys.stderr)
    report(
        "a training step that is monitored",
        header() | {"most that gradients and weights may add to the first case": f"{MOST_SHARE:.0%}"},
        {
            **STEP_COLUMNS,
            "added": lambda row: f"{row.share:+.1%}",
        },
        rows,
        options.json,
    )
