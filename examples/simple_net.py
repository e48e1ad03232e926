"""SimpleNet, 784-300-100-10 with Adam, in the order of the notes, Linear, ReLU, batch norm, and in the usual one, Linear, batch norm, ReLU.

Both learn. What differs is what the next layer gets: numbers of mean 0 and deviation 1, or their positive half.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import gradkernels as gk
from examples.harness import Advance, Digits, Report, Setting, accuracy, fit, require
from examples.telling import new_figure, new_table
from gradkernels.diagnosis.plots import FAIR, GOOD, INK, dress

SIZES = (784, 300, 100, 10)
EPOCHS = 8


def relu_then_norm(fan_in: int, fan_out: int) -> list[nn.Module]:
    return [nn.Linear(fan_in, fan_out), nn.ReLU(), gk.BatchNormAct1d(fan_out, act="identity")]


def norm_then_relu(fan_in: int, fan_out: int) -> list[nn.Module]:
    return [nn.Linear(fan_in, fan_out, bias=False), gk.BatchNormAct1d(fan_out, act="relu")]


ORDERS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "Linear, ReLU, batch norm": relu_then_norm,
    "Linear, batch norm, ReLU": norm_then_relu,
}


@dataclass(frozen=True)
class Trained:
    """received: what the last layer gets for the test digits, [360, 100]."""

    losses: list[float]
    accuracies: list[float]
    received: Tensor


def enlarged(data: Digits) -> Digits:
    """The digits with 28 x 28 pixels, interpolated."""

    def enlarge(x: Tensor) -> Tensor:
        return F.interpolate(x.view(-1, 1, 8, 8), size=(28, 28), mode="bilinear", align_corners=False).flatten(1)

    return replace(data, x_train=enlarge(data.x_train), x_test=enlarge(data.x_test))


def build(hidden: Callable[[int, int], list[nn.Module]], seed: int) -> nn.Sequential:
    *widths, (width, classes) = pairwise(SIZES)
    model = nn.Sequential(*(module for fans in widths for module in hidden(*fans)), nn.Linear(width, classes))
    gk.init.apply_(model, generator=torch.Generator().manual_seed(seed))
    return model


def train(hidden: Callable[[int, int], list[nn.Module]], data: Digits, seed: int, epochs: int, advance: Advance) -> Trained:
    model = build(hidden, seed)
    optimizer = torch.optim.Adam(model.parameters())
    losses, accuracies = [], []
    batches = data.batches(seed, epochs)
    for _ in range(epochs):
        losses += fit(model, (next(batches) for _ in range(data.batches_per_epoch)), optimizer, advance)
        accuracies.append(accuracy(model, data))
    model.eval()
    with torch.no_grad():
        return Trained(losses, accuracies, model[:-1](data.x_test))


def run(setting: Setting) -> Report:
    data = enlarged(setting.data)
    advance = setting.begin("batch norm after ReLU and before it", len(ORDERS) * EPOCHS * data.batches_per_epoch)
    found = {name: train(hidden, data, setting.seed, EPOCHS, advance) for name, hidden in ORDERS.items()}
    yield new_table(
        f"SimpleNet {'-'.join(map(str, SIZES))}, digits of 28 x 28, Adam",
        ("", *(name.replace(", b", ",\nb", 1) for name in found)),
        (
            *(
                [f"test accuracy, epoch {epoch}", *(f"{each.accuracies[epoch - 1]:.1%}" for each in found.values())]
                for epoch in range(1, EPOCHS + 1)
            ),
            ["mean that the last layer gets", *(f"{each.received.mean():.2f}" for each in found.values())],
            ["its deviation", *(f"{each.received.std():.2f}" for each in found.values())],
        ),
    )
    for name, trained in found.items():
        require(trained.accuracies[-1] > 0.9, f"{name} was to learn, and has {trained.accuracies[-1]:.1%} of the test digits right")
    notes, usual = found.values()
    apart = abs(notes.accuracies[-1] - usual.accuracies[-1])
    require(apart < 0.05, f"the two orders were to learn alike, and are {apart:.1%} of the test digits apart")
    centred, shifted = notes.received.mean().item(), usual.received.mean().item()
    require(abs(centred) < 0.15, f"batch norm last was to hand on a mean of 0, and it is {centred:.2g}")
    require(shifted > 0.2, f"ReLU last was to hand on a positive mean, and it is {shifted:.2g}")
    yield draw(found)


def draw(found: dict[str, Trained]) -> Figure:
    figure = new_figure(15, 4.8)
    left, middle, right = figure.subplots(1, 3)
    epochs = range(1, EPOCHS + 1)
    for (name, trained), colour in zip(found.items(), (FAIR, GOOD), strict=True):
        left.plot(trained.losses, color=colour, label=name, linewidth=1.4)
        middle.plot(epochs, [100 * share for share in trained.accuracies], "o-", color=colour)
        right.hist(trained.received.flatten(), bins=50, range=(-1.5, 3.5), color=colour, alpha=0.55)
    left.set_yscale("log")
    left.legend(frameon=False)
    dress(left, "Batch norm after ReLU, as in the notes, and before it:\nboth learn", "step", "training loss")
    ends = ", ".join(f"{trained.accuracies[-1]:.1%}" for trained in found.values())
    middle.text(0.95, 0.1, f"at the end {ends}", color=INK, transform=middle.transAxes, ha="right")
    middle.set_ylim(top=100)
    dress(middle, "and equally well", "epoch", "test digits right, %")
    right.set_yscale("log")
    dress(right, "What the last layer gets differs: centred at 0,\nor nothing below it", "inputs of the last layer", "how many")
    return figure
