"""Two networks whose gradient explodes: a deep one and a recurrent one.

Without clipping, the loss is nan after a few steps. With gradients clipped to norm 1, the network learns.
"""

import copy
import math
import statistics
from collections.abc import Iterable
from functools import partial
from itertools import pairwise

import torch
from matplotlib.axes import Axes
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import gradkernels as gk
from examples.experiment import Batch, LossFunction, Results, Run, Setting, accuracy, check, new_figure, new_table, train
from gradkernels.diagnosis.plots import BAD, GOOD

MAX_NORM = 1.0
LOSS_TITLE = "Without clipping the loss becomes nan.\nWith clipping the network learns"


def descend(model: nn.Module, epochs: Iterable[Iterable[Batch]], loss_fn: LossFunction, lr: float, steps: int, max_norm: float) -> Run:
    """Gradient descent with a learning rate that falls to 0 along a cosine; max_norm inf does not clip."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return train(model, epochs, optimizer, None, partial(gk.clip_grad_norm_, max_norm=max_norm), schedule, loss_fn)


def table_of(title: str, unclipped: Run, clipped: Run, outcome: tuple[str, str, str]) -> Table:
    """`outcome` is the last row: its name, and its value for each of the two runs."""
    rows = (
        ["gradient norm, step 0", f"{unclipped.norms[0]:.3g}", f"{clipped.norms[0]:.3g}"],
        ["largest gradient norm", f"{max(unclipped.norms):.3g}", f"{max(clipped.norms):.3g}"],
        ["largest after clipping", "", f"{max(clipped.clipped_norms):.3g}"],
        ["nan from step", *("never" if run.first_nan is None else str(run.first_nan) for run in (unclipped, clipped))],
        outcome,
    )
    return new_table(f"{title}, clipped to norm {MAX_NORM:g}", ("", "not clipped", "clipped"), rows)


def check_clipping(network: str, unclipped: Run, clipped: Run) -> None:
    check(unclipped.first_nan is not None, f"expected {network} to end in nan without clipping; its loss stayed finite")
    check(unclipped.norms[0] > 5, f"expected the gradient of {network} to explode; its norm is {unclipped.norms[0]:.3g}")
    check(clipped.first_nan is None, f"expected {network} to stay finite with clipping; it is nan from step {clipped.first_nan} on")
    largest, limit = max(clipped.clipped_norms), MAX_NORM * (1 + 1e-6)
    check(largest < limit, f"expected clipped gradients of {network} to have a norm of at most {MAX_NORM:g}; one has {largest:.7g}")


def draw_losses(axes: Axes, unclipped: Run, clipped: Run, outcome: str) -> None:
    """A cross marks the last finite loss without clipping, at the upper edge if it is far above the rest."""
    top = 1e3 * max(clipped.losses)
    finite = [min(loss, top) for loss in unclipped.losses if math.isfinite(loss)]
    end = (len(finite) - 1, finite[-1])
    axes.plot(clipped.losses, color=GOOD)
    axes.plot(finite, color=BAD)
    axes.plot(*end, "X", color=BAD, markersize=11, clip_on=False)
    axes.set_yscale("log")
    axes.annotate(f"not clipped: nan from step {unclipped.first_nan} on", end, (12, 3), textcoords="offset points", color=BAD)
    axes.text(0.3, 0.48, f"clipped: {outcome}", color=GOOD, transform=axes.transAxes)


# A deep network

DEEP, SAMPLES, BATCH_SIZE = (100, 1000, 1000, 1000, 1000, 1), 256, 64


def deep_network(generator: torch.Generator) -> nn.Sequential:
    model = nn.Sequential()
    for fan_in, fan_out in pairwise(DEEP):
        model.extend([nn.Linear(fan_in, fan_out), nn.ReLU()])
    del model[-1]
    gk.init.apply_(model, generator=generator)
    return model


def regression(generator: torch.Generator) -> list[Batch]:
    """The batches of an epoch. The target of a sample is the positive part of a random projection."""
    x = torch.randn(SAMPLES, DEEP[0], generator=generator)
    target = (x @ torch.randn(DEEP[0], 1, generator=generator) / math.sqrt(DEEP[0])).relu()
    return [*zip(x.split(BATCH_SIZE), target.split(BATCH_SIZE), strict=True)]


def deep_net(setting: Setting) -> Results:
    generator = torch.Generator().manual_seed(setting.seed)
    model, batches = deep_network(generator), regression(generator)
    epochs = [batches] * len(setting.epochs(30, 15))
    steps = len(epochs) * len(batches)
    unclipped = descend(copy.deepcopy(model), epochs, F.mse_loss, 0.03, steps, math.inf)
    clipped = descend(model, setting.track(epochs), F.mse_loss, 0.03, steps, MAX_NORM)
    before, after = (statistics.fmean(losses) for losses in (clipped.losses[: len(batches)], clipped.losses[-len(batches) :]))
    outcome = ("loss at the end", f"{unclipped.losses[-1]:.2g}", f"{after:.2g}")
    yield table_of(f"Exploding gradients: {'-'.join(map(str, DEEP))}, ReLU, He", unclipped, clipped, outcome)
    check_clipping("the deep network", unclipped, clipped)
    check(after < before / 4, f"expected the clipped deep network to learn; its loss only went from {before:.3g} to {after:.3g}")

    title = "The gradient of 100-1000x4-1 explodes.\nClipping bounds its norm"
    figure, (left, right) = new_figure((title, "step", "gradient norm"), (LOSS_TITLE, "step", "training loss"))
    left.plot(clipped.norms, color=BAD, label="before clipping")
    left.plot(clipped.clipped_norms, color=GOOD, label="after clipping")
    left.set_yscale("log")
    left.set_ylim(MAX_NORM / 3)
    left.legend(frameon=False, loc="lower left")
    draw_losses(right, unclipped, clipped, f"loss {before:.2g} -> {after:.2g}")
    yield figure


# A recurrent network

TIME_STEPS, HIDDEN, RECURRENT_GAIN = 100, 64, 1.05


def as_sequence(x: Tensor) -> Tensor:
    """Digits [batch, 64] as a sequence [100, batch, 8]: the 8 rows of the image, then zeros."""
    sequence = x.new_zeros(TIME_STEPS, len(x), 8)
    sequence[:8] = x.view(-1, 8, 8).transpose(0, 1)
    return sequence


class Reader(nn.Module):
    """Reads a digit row by row in 8 steps, waits for 92 steps, and then classifies it.

    The recurrent weight starts as a multiple of the identity (Le, Jaitly, Hinton, "A Simple Way to Initialize
    Recurrent Networks of Rectified Linear Units", 2015). Activations and gradients grow by its factor.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rnn = nn.RNN(8, HIDDEN, nonlinearity="relu", bias=False)
        self.classify = nn.Linear(HIDDEN, 10)
        with torch.no_grad():
            self.rnn.get_parameter("weight_hh_l0").copy_(RECURRENT_GAIN * torch.eye(HIDDEN))
        gk.init.lecun_normal_(self.rnn.get_parameter("weight_ih_l0"))

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.rnn(as_sequence(x))[0][-1]
        logits: Tensor = self.classify(last)
        return logits


def gradient_through_time(reader: Reader, x: Tensor, target: Tensor) -> list[float]:
    """Norm of the gradient of the hidden state after each step, from the last step to the first."""
    hidden, states = x.new_zeros(1, len(x), HIDDEN), []
    for step in as_sequence(x):
        hidden = reader.rnn(step.unsqueeze(0), hidden)[1]
        states.append(hidden)
    gradients = torch.autograd.grad(F.cross_entropy(reader.classify(hidden[0]), target), states)
    return [gradient.norm().item() for gradient in reversed(gradients)]


def rnn(setting: Setting) -> Results:
    data, seed, epochs = setting.data, setting.seed, setting.epochs(12, 6)
    steps = len(epochs) * data.batches_per_epoch
    unclipped_reader, reader = Reader(seed), Reader(seed)
    through_time = gradient_through_time(reader, *data.first_batch(seed))
    unclipped = descend(unclipped_reader, data.epochs(seed, epochs), F.cross_entropy, 0.02, steps, math.inf)
    clipped = descend(reader, data.epochs(seed, setting.track(epochs)), F.cross_entropy, 0.02, steps, MAX_NORM)
    learned = accuracy(reader, data)
    outcome = ("test accuracy", f"{accuracy(unclipped_reader, data):.1%}", f"{learned:.1%}")
    title = f"Exploding gradients: a recurrent network over {TIME_STEPS} steps, ReLU, weight {RECURRENT_GAIN:g} times the identity"
    yield table_of(title, unclipped, clipped, outcome)
    check_clipping("the recurrent network", unclipped, clipped)
    growth = through_time[-1] / through_time[0]
    check(growth > 10, f"expected the gradient to grow on its way back through {TIME_STEPS} steps; it grew {growth:.2g}-fold")
    check(learned > 0.5, f"expected the clipped recurrent network to learn; its accuracy is {learned:.1%}")

    title = f"The gradient grows {growth:.0f}-fold\non its way back through {TIME_STEPS} steps"
    labels = (title, "time step, decreasing", "gradient norm of the hidden state")
    figure, (left, right) = new_figure(labels, (LOSS_TITLE, "training step", "training loss"))
    left.plot(range(TIME_STEPS, 0, -1), through_time, color=BAD)
    left.set_yscale("log")
    left.invert_xaxis()
    draw_losses(right, unclipped, clipped, f"test accuracy {learned:.0%}")
    yield figure
