"""A sigmoid network whose gradient vanishes, and the known cures, one at a time.

All networks start from torch's own initialisation of nn.Linear, except where the cure is an initialisation.
Some cures do not help here. Clipping bounds a gradient that explodes. Optimizers do not change the gradient,
but the adaptive ones divide by its size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

import gradkernels as gk
from examples.experiment import Clip, Digits, Results, Setting, accuracy, check, forward_backward, new_figure, new_table, train
from gradkernels.diagnosis.plots import BAD, FAIR, GOOD, INK, PALE

SIZES = (64, 100, 100, 100, 100, 10)
LR = 0.5
GRADIENT_DESCENT = partial(torch.optim.SGD, lr=LR)
# Bounds of the test accuracy.
NOTHING, SOMETHING, WELL = (0.0, 0.2), (0.2, 1.0), (0.8, 1.0)


@dataclass(frozen=True)
class Cure:
    """The changes to the sigmoid network and their expected result.

    The test accuracy is expected within `accuracy`. The ratio of the gradient norms of the first and the last
    layer is expected to be at least `raises` times that of the sigmoid network.
    """

    family: str
    name: str
    accuracy: tuple[float, float]
    raises: float = 1.0
    act: Callable[[], nn.Module] = nn.Sigmoid
    scheme: str | None = None
    batch_norm: bool = False
    residual: bool = False
    clip_: Clip | None = None
    optimizer: Callable[..., torch.optim.Optimizer] = GRADIENT_DESCENT


CLIP_NORM, ADAM = partial(gk.clip_grad_norm_, max_norm=1.0), partial(torch.optim.Adam, lr=0.003)
TOGETHER = Cure("together", "ELU, He, batch norm,\nresidual, clipped, Adam", WELL, 100, gk.ELU, "he_normal", True, True, CLIP_NORM, ADAM)
SIGMOID = Cure("", "sigmoid, SGD", NOTHING)
CURES = (
    SIGMOID,
    Cure("activation", "ReLU", WELL, 100, act=nn.ReLU),
    Cure("activation", "Leaky ReLU", WELL, 100, act=gk.LeakyReLU),
    Cure("activation", "ELU", WELL, 100, act=gk.ELU),
    Cure("activation", "Swish", WELL, 100, act=gk.Swish),
    Cure("initialisation", "Xavier", SOMETHING, 10, scheme="xavier_normal"),
    Cure("initialisation", "He", SOMETHING, 10, scheme="he_normal"),
    Cure("initialisation", "LeCun", NOTHING, 2, scheme="lecun_normal"),
    Cure("network", "batch norm", WELL, 100, batch_norm=True),
    Cure("network", "residual", WELL, 10, residual=True),
    Cure("clipping", "clipped by norm, 1", NOTHING, clip_=CLIP_NORM),
    Cure("clipping", "clipped by value, 0.1", NOTHING, clip_=partial(gk.clip_grad_value_, clip_value=0.1)),
    Cure("optimizer", "momentum 0.9", NOTHING, optimizer=partial(torch.optim.SGD, lr=LR, momentum=0.9)),
    Cure("optimizer", "AdaGrad", SOMETHING, optimizer=partial(torch.optim.Adagrad, lr=0.01)),
    Cure("optimizer", "RMSProp", SOMETHING, optimizer=partial(gk.optim.RMSprop, lr=0.003)),
    Cure("optimizer", "Adam", SOMETHING, optimizer=ADAM),
    TOGETHER,
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
class Outcome:
    cure: Cure
    ratio: float  # gradient norm of the first layer's weight to that of the last layer's, in the first step
    accuracy: float

    @property
    def colour(self) -> str:
        return BAD if self.accuracy <= NOTHING[1] else GOOD if self.accuracy >= WELL[0] else FAIR


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


def train_with(cure: Cure, data: Digits, seed: int, epochs: range) -> Outcome:
    model = build(cure, seed)
    forward_backward(model, *data.first_batch(seed))
    norms = gk.grad_report(layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)).norms.tolist()
    train(model, data.epochs(seed, epochs), cure.optimizer(model.parameters()), clip_=cure.clip_)
    return Outcome(cure, norms[0] / norms[-1], accuracy(model, data))


def check_outcome(outcome: Outcome, sigmoid: Outcome) -> None:
    cure, name = outcome.cure, " ".join(outcome.cure.name.split())
    raised = outcome.ratio / sigmoid.ratio
    check(raised >= cure.raises, f"expected {name!r} to raise the ratio of the gradients {cure.raises:g}-fold; it rose {raised:.2g}-fold")
    least, most, learned = *cure.accuracy, outcome.accuracy
    check(least <= learned <= most, f"expected an accuracy of {least:.0%} to {most:.0%} with {name!r}; it is {learned:.1%}")


def run(setting: Setting) -> Results:
    outcomes = [train_with(cure, setting.data, setting.seed, setting.epochs(30, 20)) for cure in setting.track(CURES)]
    sigmoid = outcomes[0]
    yield new_table(
        f"Sigmoid, {'-'.join(map(str, SIZES))}, and one cure at a time",
        ("", "gradient norm,\nfirst / last layer", "relative to\nsigmoid", "test\naccuracy"),
        ([each.cure.name, f"{each.ratio:.1e}", f"{each.ratio / sigmoid.ratio:,.0f}", f"{each.accuracy:.1%}"] for each in outcomes),
    )
    check(sigmoid.ratio < 1e-2, f"expected the gradient of the sigmoid network to vanish; the first layer has {sigmoid.ratio:.1e} of it")
    for outcome in outcomes:
        check_outcome(outcome, sigmoid)

    figure, (left, right) = new_figure(
        ("The gradient of the first layer,\nrelative to the last layer's", "gradient norm, first / last layer, first step", ""),
        ("What the network learns\n(dotted: by chance)", "test accuracy, %", ""),
        height=5.6,
    )
    # Half a row separates the families.
    families = [outcome.cure.family for outcome in outcomes]
    rows = [row + 0.5 * len({*families[1 : row + 1]}) for row in range(len(outcomes))]
    colours = [outcome.colour for outcome in outcomes]
    for axes, names in ((left, [outcome.cure.name for outcome in outcomes]), (right, [""] * len(outcomes))):
        axes.set_yticks(rows, names)
        axes.set_ylim(rows[-1] + 0.9, rows[0] - 0.9)
    left.axvline(sigmoid.ratio, color=BAD, linestyle=":", linewidth=1)
    left.scatter([outcome.ratio for outcome in outcomes], rows, color=colours, zorder=2)
    left.set_xscale("log")
    left.set_xlim(right=2)
    bars = right.barh(rows, [100 * outcome.accuracy for outcome in outcomes], color=colours, height=0.7)
    right.bar_label(bars, fmt="%.0f", padding=3, color=INK)
    right.axvline(10, color=PALE, linestyle=":", linewidth=1)
    right.set_xlim(0, 112)
    yield figure
