"""Two networks whose gradient explodes, each trained with and without its norm clipped to 1: a deep one, and one that recurs 100 times.

Without clipping a single step leads to nan. What is asked is that it does, that with clipping the very same network learns, and that every
clipped gradient has the norm it was clipped to.
"""

import copy
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import gradkernels as gk
from examples.harness import Advance, Report, Setting, accuracy, require
from examples.telling import new_figure, new_table
from gradkernels.diagnosis.plots import BAD, GOOD, dress

MAX_NORM = 1.0


@dataclass
class Run:
    """Of each step: loss, and norm of the gradient before and after clipping."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    clipped_norms: list[float] = field(default_factory=list)

    @property
    def first_nan(self) -> int | None:
        return next((step for step, loss in enumerate(self.losses) if math.isnan(loss)), None)


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    lr: float,
    steps: int,
    max_norm: float = math.inf,
    advance: Advance | None = None,
) -> Run:
    """Gradient descent whose learning rate falls to 0 along a cosine; max_norm inf measures only. It ends at the first nan."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    run = Run()
    for x, target in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(x), target)
        loss.backward()
        run.losses.append(loss.item())
        if run.first_nan is not None:
            break
        run.norms.append(gk.clip_grad_norm_(model, max_norm).item())
        run.clipped_norms.append(gk.grad_report(model).total_norm.item())
        optimizer.step()
        schedule.step()
        if advance is not None:
            advance()
    return run


def require_cured(network: str, without: Run, clipped: Run) -> None:
    require(without.first_nan is not None, f"{network} was to end in nan without clipping, and its loss stayed finite")
    require(without.norms[0] > 5, f"the gradient of {network} was to explode, and its norm is {without.norms[0]:.3g}")
    require(clipped.first_nan is None, f"{network} was to stay finite when clipped, and is nan from step {clipped.first_nan} on")
    longest = max(clipped.clipped_norms)
    require(
        longest < MAX_NORM * (1 + 1e-6),
        f"clipped gradients of {network} were to have norms of at most {MAX_NORM:g}, and one has {longest:.7g}",
    )


def table_of(title: str, without: Run, clipped: Run, learned: tuple[str, str, str]) -> Table:
    """learned: what it is called, and the cell of each run."""
    return new_table(
        title,
        ("", "not clipped", "clipped"),
        (
            ["gradient norm, step 0", f"{without.norms[0]:.3g}", f"{clipped.norms[0]:.3g}"],
            ["largest", f"{max(without.norms):.3g}", f"{max(clipped.norms):.3g}"],
            ["after clipping, at most", "", f"{max(clipped.clipped_norms):.3g}"],
            ["nan from step", *("never" if run.first_nan is None else str(run.first_nan) for run in (without, clipped))],
            learned,
        ),
    )


def draw_losses(axes: Axes, without: Run, clipped: Run) -> None:
    """A cross stands where the run without clipping was last finite, or at the upper edge where that is far above."""
    axes.plot(clipped.losses, color=GOOD)
    top = 1e3 * max(clipped.losses)
    lost = [min(loss, top) for loss in without.losses if math.isfinite(loss)]
    end = (len(lost) - 1, lost[-1])
    axes.plot(lost, color=BAD)
    axes.plot(*end, "X", color=BAD, markersize=11, clip_on=False)
    axes.set_yscale("log")
    axes.annotate(f"not clipped: nan from step {without.first_nan} on", end, (12, 3), textcoords="offset points", color=BAD)


def draw_norms(axes: Axes, clipped: Run) -> None:
    axes.plot(clipped.norms, color=BAD)
    axes.plot(clipped.clipped_norms, color=GOOD)
    axes.set_yscale("log")
    axes.set_ylim(MAX_NORM / 3)
    axes.annotate("after clipping: 1", (0, MAX_NORM), (0, -14), textcoords="offset points", color=GOOD)


# A deep network

DEEP = (100, 1000, 1000, 1000, 1000, 1)
SAMPLES, BATCH_SIZE = 256, 64


def deep_network(generator: torch.Generator) -> nn.Sequential:
    model = nn.Sequential()
    for fan_in, fan_out in pairwise(DEEP):
        model.extend([nn.Linear(fan_in, fan_out), nn.ReLU()])
    del model[-1]
    gk.init.apply_(model, generator=generator)
    return model


def regression(generator: torch.Generator, steps: int) -> list[tuple[Tensor, Tensor]]:
    """A batch for each step, of samples whose target is the positive part of a random projection."""
    x = torch.randn(SAMPLES, DEEP[0], generator=generator)
    target = (x @ torch.randn(DEEP[0], 1, generator=generator) / math.sqrt(DEEP[0])).relu()
    batches = [*zip(x.split(BATCH_SIZE), target.split(BATCH_SIZE), strict=True)]
    return [batches[step % len(batches)] for step in range(steps)]


def deep_net(setting: Setting) -> Report:
    steps = 60 if setting.quick else 120
    advance = setting.begin("a deep network, clipped", steps)
    generator = setting.generator()
    model, batches = deep_network(generator), regression(generator, steps)
    without = train(copy.deepcopy(model), batches, F.mse_loss, 0.03, steps)
    clipped = train(model, batches, F.mse_loss, 0.03, steps, MAX_NORM, advance)
    # A pass over all samples.
    passage = SAMPLES // BATCH_SIZE
    before, after = (statistics.fmean(losses) for losses in (clipped.losses[:passage], clipped.losses[-passage:]))
    yield table_of(
        f"Exploding: {'-'.join(map(str, DEEP))}, ReLU, He, clipped to norm 1",
        without,
        clipped,
        ("loss at the end", f"{without.losses[-1]:.2g}", f"{after:.2g}"),
    )
    require_cured("the deep network", without, clipped)
    require(after < before / 4, f"the clipped deep network was to learn, and its loss falls from {before:.3g} to {after:.3g} only")

    figure = new_figure(12, 4.8)
    left, right = figure.subplots(1, 2)
    draw_norms(left, clipped)
    dress(left, "The gradient of 100-1000x4-1 is much longer than 1;\nclipped, it keeps its direction", "step", "gradient norm")
    draw_losses(right, without, clipped)
    right.text(0.3, 0.45, f"clipped: loss {before:.2g} -> {after:.2g}", color=GOOD, transform=right.transAxes)
    dress(right, "A step along the whole of it ends in nan;\nsteps of bounded length learn", "step", "training loss")
    yield figure


# A recurrent network

STEPS_OF_TIME = 100
HIDDEN = 64
RECURRENT_GAIN = 1.05


def rows_and_silence(x: Tensor) -> Tensor:
    """Digits [batch, 64] as a sequence [steps, batch, 8]: a row in each of the first 8 steps, then nothing."""
    sequence = x.new_zeros(STEPS_OF_TIME, len(x), 8)
    sequence[:8] = x.view(-1, 8, 8).transpose(0, 1)
    return sequence


class Reader(nn.Module):
    """Reads a digit row by row in 8 steps, waits for 92 more and says then which it was.

    The recurrent weight starts as a multiple of the identity (Le, Jaitly, Hinton, "A Simple Way to Initialize Recurrent Networks of
    Rectified Linear Units", 2015), beyond 1: what is read, and its gradient, grow by it in every step of time.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rnn = nn.RNN(8, HIDDEN, nonlinearity="relu")
        self.classify = nn.Linear(HIDDEN, 10)
        with torch.no_grad():
            self.rnn.get_parameter("weight_hh_l0").copy_(RECURRENT_GAIN * torch.eye(HIDDEN))
        gk.init.lecun_normal_(self.rnn.get_parameter("weight_ih_l0"))
        for name in ("bias_ih_l0", "bias_hh_l0"):
            nn.init.zeros_(self.rnn.get_parameter(name))

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.rnn(rows_and_silence(x))[0][-1]
        logits: Tensor = self.classify(last)
        return logits


def gradient_through_time(reader: Reader, x: Tensor, target: Tensor) -> list[float]:
    """Norm of the gradient of the loss with respect to the hidden state after each step of time, the last one first."""
    hidden, states = x.new_zeros(1, len(x), HIDDEN), []
    for step in rows_and_silence(x):
        hidden = reader.rnn(step.unsqueeze(0), hidden)[1]
        states.append(hidden)
    gradients = torch.autograd.grad(F.cross_entropy(reader.classify(hidden[0]), target), states)
    return [gradient.norm().item() for gradient in reversed(gradients)]


def rnn(setting: Setting) -> Report:
    data, seed = setting.data, setting.seed
    epochs = 6 if setting.quick else 12
    steps = epochs * data.batches_per_epoch
    advance = setting.begin("a recurrent network, clipped", steps)
    lost, reader = Reader(seed), Reader(seed)
    through_time = gradient_through_time(reader, *next(data.batches(seed, epochs=1)))
    without = train(lost, data.batches(seed, epochs), F.cross_entropy, 0.02, steps)
    clipped = train(reader, data.batches(seed, epochs), F.cross_entropy, 0.02, steps, MAX_NORM, advance)
    learned = accuracy(reader, data)
    yield table_of(
        f"Exploding: a recurrent network over {STEPS_OF_TIME} steps, ReLU, weight {RECURRENT_GAIN:g} times the identity, clipped to norm 1",
        without,
        clipped,
        ("test accuracy", f"{accuracy(lost, data):.1%}", f"{learned:.1%}"),
    )
    require_cured("the recurrent network", without, clipped)
    grown = through_time[-1] / through_time[0]
    require(grown > 10, f"the gradient was to grow on its way back through {STEPS_OF_TIME} steps, and grew {grown:.2g}-fold")
    require(learned > 0.5, f"the clipped recurrent network was to learn, and has {learned:.1%} of the test digits right")
    yield draw_rnn(through_time, without, clipped, learned)


def draw_rnn(through_time: list[float], without: Run, clipped: Run, learned: float) -> Figure:
    figure = new_figure(15, 4.8)
    left, middle, right = figure.subplots(1, 3)
    left.plot(range(STEPS_OF_TIME, 0, -1), through_time, color=BAD)
    left.set_yscale("log")
    left.invert_xaxis()
    left.text(95, through_time[-1], f"{through_time[-1] / through_time[0]:.0f}-fold from step {STEPS_OF_TIME} to 1", color=BAD, va="center")
    dress(
        left,
        f"The gradient grows on its way back through\n{STEPS_OF_TIME} steps of time",
        "step of time, backwards",
        "gradient norm of the hidden state",
    )
    draw_norms(middle, clipped)
    dress(middle, "The weights sum it over all steps; clipped,\nit keeps its direction", "training step", "gradient norm")
    draw_losses(right, without, clipped)
    right.text(0.3, 0.5, f"clipped: {learned:.0%} of the\ntest digits right", color=GOOD, transform=right.transAxes)
    dress(right, "One step along the whole of it ends in nan;\nsteps of bounded length learn", "training step", "training loss")
    return figure
