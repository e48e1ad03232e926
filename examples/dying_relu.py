"""Dead ReLU units: biases so far below zero that no digit makes them positive, as a step that was too long leaves them.

The same weights go on learning with each activation. ReLU passes no gradient to a unit that is negative for every digit, so that nothing
ever changes; a slope on that side, fixed, learnt or random, brings the units back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import nn

import gradkernels as gk
from examples.harness import Advance, Digits, Report, Setting, accuracy, fit, require
from examples.telling import new_figure, new_table
from gradkernels.diagnosis.plots import BAD, GOOD, dress

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"ReLU": nn.ReLU, "Leaky ReLU": gk.LeakyReLU, "PReLU": gk.PReLU, "RReLU": gk.RReLU}
DEAD_BIAS = -2.0
EPOCHS = 10


@dataclass(frozen=True)
class Revival:
    """dead: the share of hidden units that no training digit makes positive, at the start and after each epoch."""

    dead: list[float]
    accuracy: float


def build(act: Callable[[], nn.Module], seed: int) -> nn.Sequential:
    """The weights are those for ReLU, whatever the activation."""
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    gk.init.apply_(model, generator=torch.Generator().manual_seed(seed))
    for place in (0, 2):
        nn.init.constant_(model.get_parameter(f"{place}.bias"), DEAD_BIAS)
        model[place + 1] = act()
    return model


def dead_share(model: nn.Sequential, data: Digits) -> float:
    x, dead = data.x_train, []
    with torch.no_grad():
        *hidden, _ = model
        for module in hidden:
            x = module(x)
            if isinstance(module, nn.Linear):
                dead.append((x <= 0).all(dim=0))
    return torch.cat(dead).float().mean().item()


def revive(act: Callable[[], nn.Module], data: Digits, seed: int, epochs: int, advance: Advance) -> Revival:
    # RReLU draws from torch's own generator.
    torch.manual_seed(seed)
    model = build(act, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    dead = [dead_share(model, data)]
    batches = data.batches(seed, epochs)
    for _ in range(epochs):
        fit(model, (next(batches) for _ in range(data.batches_per_epoch)), optimizer, advance)
        dead.append(dead_share(model, data))
    return Revival(dead, accuracy(model, data))


def run(setting: Setting) -> Report:
    data = setting.data
    advance = setting.begin("dying ReLU", len(ACTIVATIONS) * EPOCHS * data.batches_per_epoch)
    found = {name: revive(act, data, setting.seed, EPOCHS, advance) for name, act in ACTIVATIONS.items()}
    yield new_table(
        f"Dying ReLU: 64-100-100-10, biases {DEAD_BIAS:g}, Adam",
        ("", "dead units\nat the start", "\nepoch 1", f"\nepoch {EPOCHS}", "test\naccuracy"),
        ([name, *(f"{revival.dead[epoch]:.0%}" for epoch in (0, 1, EPOCHS)), f"{revival.accuracy:.1%}"] for name, revival in found.items()),
    )
    for name, revival in found.items():
        started, ended = revival.dead[0], revival.dead[-1]
        require(started > 0.9, f"nearly all units of {name} were to be dead at the start, and {started:.0%} are")
        if name == "ReLU":
            require(ended >= started, f"dead units of ReLU were to stay dead, and of {started:.0%} there are {ended:.0%} left")
            require(revival.accuracy < 0.2, f"a dead network of ReLU was to learn nothing, and has {revival.accuracy:.1%} right")
        else:
            require(ended < 0.1, f"{name} was to revive the dead units, and {ended:.0%} are dead still")
            require(revival.accuracy > 0.85, f"the network revived by {name} was to learn, and has {revival.accuracy:.1%} right")
    yield draw(found)


def draw(found: dict[str, Revival]) -> Figure:
    figure = new_figure(12, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for (name, revival), style in zip(found.items(), ("-", "-", "--", "-."), strict=True):
        colour = BAD if name == "ReLU" else GOOD
        left.plot([100 * share for share in revival.dead], color=colour, linestyle=style, linewidth=2, label=name)
    left.legend(frameon=False, loc="center right")
    left.set_ylim(-2, 105)
    dress(left, "Dead ReLU units stay dead;\na slope below zero brings them back", "epoch", "dead hidden units, %")

    names = list(found)
    bars = right.barh(names, [100 * found[name].accuracy for name in names], color=[BAD if name == "ReLU" else GOOD for name in names])
    right.bar_label(bars, fmt="%.0f %%", padding=3)
    right.invert_yaxis()
    right.set_xlim(0, 115)
    dress(right, "and the network learns", "test digits right, %", "")
    return figure
