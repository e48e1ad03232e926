"""A sigmoid network whose gradient vanishes layer by layer, and each cure alone: what it does to the gradient and whether it learns then.

All start from torch's own initialisation of nn.Linear, but for the cures that are one. Not every cure of gradients cures this: clipping
bounds what explodes, and an optimizer changes no gradient, though the adaptive ones divide by its size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeAlias

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

import gradkernels as gk
from examples.harness import Advance, Digits, Report, Setting, accuracy, fit, forward_backward, require
from examples.telling import new_figure, new_table
from gradkernels.diagnosis.plots import BAD, FAIR, GOOD, INK, PALE, dress

SIZES = (64, 100, 100, 100, 100, 10)
LR = 0.5

Optimizer: TypeAlias = Callable[..., torch.optim.Optimizer]
GRADIENT_DESCENT = partial(torch.optim.SGD, lr=LR)


@dataclass(frozen=True)
class Cure:
    """One change to the sigmoid network, or several; expected of it is an accuracy within learns and a ratio that is raised raises-fold.

    The ratio is that of the gradient's norm in the first layer to that in the last, in the first step.
    """

    family: str
    name: str
    learns: tuple[float, float]
    raises: float = 1.0
    act: Callable[[], nn.Module] = nn.Sigmoid
    scheme: str | None = None
    batch_norm: bool = False
    residual: bool = False
    clip_: Callable[[nn.Module], object] | None = None
    optimizer: Optimizer = GRADIENT_DESCENT


NOTHING, SOMETHING, WELL = (0.0, 0.2), (0.2, 1.0), (0.8, 1.0)
SICK = Cure("", "sigmoid, SGD", NOTHING)
CURES = (
    SICK,
    Cure("activation", "ReLU", WELL, 100, act=nn.ReLU),
    Cure("activation", "Leaky ReLU", WELL, 100, act=gk.LeakyReLU),
    Cure("activation", "ELU", WELL, 100, act=gk.ELU),
    Cure("activation", "Swish", WELL, 100, act=gk.Swish),
    Cure("initialisation", "Xavier", SOMETHING, 10, scheme="xavier_normal"),
    Cure("initialisation", "He", SOMETHING, 10, scheme="he_normal"),
    Cure("initialisation", "LeCun", NOTHING, 2, scheme="lecun_normal"),
    Cure("network", "batch norm", WELL, 100, batch_norm=True),
    Cure("network", "residual", WELL, 10, residual=True),
    Cure("clipping", "clipped by norm, 1", NOTHING, clip_=partial(gk.clip_grad_norm_, max_norm=1.0)),
    Cure("clipping", "clipped by value, 0.1", NOTHING, clip_=partial(gk.clip_grad_value_, clip_value=0.1)),
    Cure("optimizer", "momentum 0.9", NOTHING, optimizer=partial(torch.optim.SGD, lr=LR, momentum=0.9)),
    Cure("optimizer", "AdaGrad", SOMETHING, optimizer=partial(torch.optim.Adagrad, lr=0.01)),
    Cure("optimizer", "RMSProp", SOMETHING, optimizer=partial(gk.optim.RMSprop, lr=0.003)),
    Cure("optimizer", "Adam", SOMETHING, optimizer=partial(torch.optim.Adam, lr=0.003)),
    Cure(
        "together",
        "ELU, He, batch norm,\nresidual, clipped, Adam",
        WELL,
        100,
        act=gk.ELU,
        scheme="he_normal",
        batch_norm=True,
        residual=True,
        clip_=partial(gk.clip_grad_norm_, max_norm=1.0),
        optimizer=partial(torch.optim.Adam, lr=0.003),
    ),
)


class Residual(nn.Module):
    """y = F(x) + x."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x) + x
        return y


@dataclass(frozen=True)
class Treated:
    """layer_norms: of the gradient of each layer's weight in the first step."""

    cure: Cure
    layer_norms: list[float]
    accuracy: float

    @property
    def ratio(self) -> float:
        return self.layer_norms[0] / self.layer_norms[-1]


def build(cure: Cure, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential()
    *hidden, (width, classes) = pairwise(SIZES)
    for fan_in, fan_out in hidden:
        layer = nn.Sequential(nn.Linear(fan_in, fan_out))
        if cure.batch_norm:
            layer.append(gk.BatchNormAct1d(fan_out, act="identity"))
        layer.append(cure.act())
        model.append(Residual(layer) if cure.residual and fan_in == fan_out else layer)
    model.append(nn.Linear(width, classes))
    if cure.scheme is not None:
        gk.init.apply_(model, cure.scheme)
    return model


def treat(cure: Cure, data: Digits, seed: int, epochs: int, advance: Advance) -> Treated:
    model = build(cure, seed)
    forward_backward(model, *next(data.batches(seed, epochs=1)))
    report = gk.grad_report(layer.weight for layer in model.modules() if isinstance(layer, nn.Linear))
    fit(model, data.batches(seed, epochs), cure.optimizer(model.parameters()), advance, cure.clip_)
    return Treated(cure, report.norms.tolist(), accuracy(model, data))


def require_expected(treated: Treated, sick: Treated) -> None:
    cure, name = treated.cure, " ".join(treated.cure.name.split())
    raised = treated.ratio / sick.ratio
    require(
        raised >= cure.raises,
        f"{name!r} was to raise the first layer's gradient against the last one's {cure.raises:g}-fold, and raises it {raised:.2g}-fold",
    )
    least, most = cure.learns
    require(
        least <= treated.accuracy <= most,
        f"the network with {name!r} was to have {least:.0%} to {most:.0%} of the test digits right, and has {treated.accuracy:.1%}",
    )


def run(setting: Setting) -> Report:
    data, seed, epochs = setting.data, setting.seed, 20 if setting.quick else 30
    advance = setting.begin("cures, one at a time", len(CURES) * epochs * data.batches_per_epoch)
    found = [treat(cure, data, seed, epochs, advance) for cure in CURES]
    yield table_of(found)
    sick = found[0]
    require(sick.ratio < 1e-2, f"the sigmoid network was to lose its gradient, and its first layer has {sick.ratio:.1e} of the last one's")
    for treated in found:
        require_expected(treated, sick)
    yield draw(found)


def table_of(found: list[Treated]) -> Table:
    def rows() -> Iterator[list[str]]:
        sick = found[0]
        for before, treated in zip([sick, *found], found, strict=False):
            if treated.cure.family != before.cure.family:
                yield []
            times = "" if treated is sick else f"{treated.ratio / sick.ratio:,.0f}"
            yield [treated.cure.name, f"{treated.ratio:.1e}", times, f"{treated.accuracy:.1%}"]

    return new_table(
        f"Sigmoid, {'-'.join(map(str, SIZES))}, and one cure at a time",
        ("", "gradient,\nfirst / last layer", "times\nsigmoid's", "test\naccuracy"),
        rows(),
    )


def colour_of(treated: Treated) -> str:
    """Of what it has learnt."""
    return BAD if treated.accuracy <= NOTHING[1] else GOOD if treated.accuracy >= WELL[0] else FAIR


# Drawn layer by layer: of each family one, where it does something to the gradient.
DRAWN_BY_LAYER = ("sigmoid, SGD", "LeCun", "He", "residual", "Swish", "ELU", "batch norm")


def draw(found: list[Treated]) -> Figure:
    figure = new_figure(15, 6.4)
    left, middle, right = figure.subplots(1, 3, width_ratios=(5, 4, 3))
    layers = range(1, len(SIZES))
    for treated in found:
        if treated.cure.name in DRAWN_BY_LAYER:
            left.plot(layers, treated.layer_norms, "o-", color=colour_of(treated), markersize=4)
            left.annotate(
                treated.cure.name,
                (1, treated.layer_norms[0]),
                (-8, 0),
                textcoords="offset points",
                color=colour_of(treated),
                ha="right",
                va="center",
            )
    left.set_yscale("log")
    left.set_xlim(-0.4, len(SIZES) - 0.8)
    left.set_xticks(layers)
    dress(left, "Layer by layer the gradient vanishes;\na cure keeps it", "layer", "gradient norm in the first step")

    # Families stand apart by half a row.
    families = [treated.cure.family for treated in found]
    places = [row + 0.5 * len({*families[1 : row + 1]}) for row in range(len(found))]
    colours = [colour_of(treated) for treated in found]
    for axes in (middle, right):
        axes.set_yticks(places, [treated.cure.name for treated in found] if axes is middle else [""] * len(found))
        axes.set_ylim(places[-1] + 0.9, places[0] - 0.9)
    middle.axvline(found[0].ratio, color=BAD, linestyle=":", linewidth=1)
    middle.scatter([treated.ratio for treated in found], places, color=colours, zorder=2)
    middle.set_xscale("log")
    middle.set_xlim(right=2)
    dress(middle, "What the first layer gets\nof the last one's gradient", "first / last layer, first step", "")
    bars = right.barh(places, [100 * treated.accuracy for treated in found], color=colours, height=0.7)
    right.bar_label(bars, fmt="%.0f", padding=3, color=INK)
    right.axvline(10, color=PALE, linestyle=":", linewidth=1)
    right.set_xlim(0, 112)
    dress(right, "and what the network learns\n(dotted: by chance)", "test digits right, %", "")
    return figure
