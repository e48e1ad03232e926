"""What GradientMonitor adds to a training step of ResNet-18. Activations are looked at in every step here; by default it is every tenth.

It moves 8G at least, G = bytes of all gradients: a copy of the weights before the step (2G), the difference behind it (3G) and one pass
over gradients, weights and updates (3G). That does not grow with the batch, and a step does, so the share is that of one batch size.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import arguments, gk, header, measure, report

# Not more of a step than this, of the first case.
MOST_SHARE = 0.03
MODES = {
    "eager": None,
    "gradients and weights": {"activations_every": None},
    "with activations": {"activations_every": 1},
}


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


def resnet18() -> nn.Sequential:
    """He et al., "Deep Residual Learning for Image Recognition", 2015, table 1."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(inputs, width, stride), BasicBlock(width, width, 1)]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


@dataclass
class Row:
    case: str
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
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


def rows_of(images: int, pixels: int, blocks: int, seconds: float) -> list[Row]:
    x, target = torch.randn(images, 3, pixels, pixels), torch.randint(1000, (images,))
    models: dict[str, nn.Module] = {provider: resnet18() for provider in MODES}
    monitors = []
    for provider, model in models.items():
        model.load_state_dict(models["eager"].state_dict())
        if (options := MODES[provider]) is not None:
            monitors.append(gk.GradientMonitor(model, **options))
    steps = {provider: training_step(model, x, target) for provider, model in models.items()}
    prove(models, steps)
    times = measure(steps, {}, blocks, seconds)
    for monitor in monitors:
        monitor.remove()
    eager = statistics.median(times["eager"])
    rows = []
    for provider, each in times.items():
        p20, _, _, p80 = statistics.quantiles(each, n=5, method="inclusive")
        median = statistics.median(each)
        rows.append(Row(f"ResNet-18, ({images}, 3, {pixels}, {pixels})", provider, median * 1e3, p20 * 1e3, p80 * 1e3, median / eager - 1))
    return rows


def run(options: argparse.Namespace) -> list[Row]:
    if options.quick:
        return rows_of(8, 64, blocks=2, seconds=0.1)
    return [row for images, pixels in ((32, 224), (32, 64)) for row in rows_of(images, pixels, blocks=9, seconds=1.0)]


if __name__ == "__main__":
    options = arguments(__doc__)
    rows = run(options)
    report(
        "a training step that is monitored",
        header() | {"most that gradients and weights may add to the first case": f"{MOST_SHARE:.0%}"},
        {
            "case": lambda row: row.case,
            "provider": lambda row: row.provider,
            "median ms": lambda row: f"{row.median_ms:,.1f}",
            "p20": lambda row: f"{row.p20_ms:,.1f}",
            "p80": lambda row: f"{row.p80_ms:,.1f}",
            "added": lambda row: f"{row.share:+.1%}",
        },
        rows,
        options.json,
    )
