"""Dead ReLU units: their biases are so negative that no digit makes them positive, as after a step too long.

Where a ReLU unit is negative, its gradient is 0. If it is negative for every digit, its weights never change
again. Leaky ReLU, PReLU and RReLU have a slope there (constant, learned, random), and the same weights learn.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import gradkernels as gk
from examples.experiment import Digits, Results, Setting, accuracy, check, new_figure, new_table, train
from gradkernels.diagnosis.plots import BAD, GOOD

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"ReLU": nn.ReLU, "Leaky ReLU": gk.LeakyReLU, "PReLU": gk.PReLU, "RReLU": gk.RReLU}
DEAD_BIAS = -2.0
EPOCHS = 10


def build(act: Callable[[], nn.Module], seed: int) -> nn.Sequential:
    """Every activation starts from the same weights, which suit ReLU."""
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    gk.init.apply_(model, generator=torch.Generator().manual_seed(seed))
    for layer in (0, 2):
        nn.init.constant_(model.get_parameter(f"{layer}.bias"), DEAD_BIAS)
        model[layer + 1] = act()
    return model


def dead_share(model: nn.Sequential, data: Digits) -> float:
    """The share of the hidden units that no training digit makes positive."""
    x, dead = data.x_train, []
    with torch.no_grad():
        for layer in (0, 2):
            x = model[layer](x)
            dead.append((x <= 0).all(dim=0))
            x = model[layer + 1](x)
    return torch.cat(dead).float().mean().item()


def run(setting: Setting) -> Results:
    data, seed, dead, accuracies = setting.data, setting.seed, {}, {}
    for name in setting.track([*ACTIVATIONS]):
        torch.manual_seed(seed)  # RReLU draws from torch's default generator
        model = build(ACTIVATIONS[name], seed)
        at_start, optimizer = dead_share(model, data), torch.optim.Adam(model.parameters(), lr=0.01)
        dead[name] = [at_start, *train(model, data.epochs(seed, range(EPOCHS)), optimizer, partial(dead_share, model, data)).measures]
        accuracies[name] = accuracy(model, data)
    yield new_table(
        f"Dead units: 64-100-100-10, biases {DEAD_BIAS:g}, Adam",
        ("", "dead units\nat the start", "\nepoch 1", f"\nepoch {EPOCHS}", "test\naccuracy"),
        ([name, *(f"{dead[name][epoch]:.0%}" for epoch in (0, 1, EPOCHS)), f"{accuracies[name]:.1%}"] for name in dead),
    )
    for name, learned in accuracies.items():
        start, end = dead[name][0], dead[name][-1]
        check(start > 0.9, f"expected nearly all {name} units to be dead at the start; {start:.0%} are")
        if name == "ReLU":
            check(end >= start, f"expected dead ReLU units to stay dead; their share went from {start:.0%} to {end:.0%}")
            check(learned < 0.2, f"expected the dead ReLU network to learn nothing; its accuracy is {learned:.1%}")
        else:
            check(end < 0.1, f"expected {name} to revive the dead units; {end:.0%} are still dead")
            check(learned > 0.85, f"expected the network with {name} to learn; its accuracy is {learned:.1%}")

    figure, (left, right) = new_figure(
        ("Dead ReLU units stay dead.\nA slope for x < 0 revives them", "epoch", "dead hidden units, %"),
        ("A revived network learns", "test accuracy, %", ""),
    )
    colours = [BAD if name == "ReLU" else GOOD for name in dead]
    for (name, shares), colour, style in zip(dead.items(), colours, ("-", "-", "--", "-."), strict=True):
        left.plot([100 * share for share in shares], color=colour, linestyle=style, linewidth=2, label=name)
    left.legend(frameon=False, loc="center right")
    left.set_ylim(-2, 105)
    bars = right.barh([*accuracies], [100 * share for share in accuracies.values()], color=colours)
    right.bar_label(bars, fmt="%.0f", padding=3)
    right.invert_yaxis()
    right.set_xlim(0, 115)
    yield figure
