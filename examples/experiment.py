"""The parts that the experiments share: digits to learn, training, checks, tables and figures.

An experiment is a generator. It yields its table before it checks the results: a reader sees both.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import gradkernels as gk
from gradkernels.diagnosis.plots import dress

T = TypeVar("T")
Results: TypeAlias = Iterator[Table | Figure]
Batch: TypeAlias = tuple[Tensor, Tensor]
LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Clip: TypeAlias = Callable[[Iterator[nn.Parameter]], object]


def check(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(f"the demonstration failed: {message}")


@dataclass(frozen=True)
class Digits:
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    batch_size: int = 64

    @property
    def batches_per_epoch(self) -> int:
        return len(self.y_train) // self.batch_size

    def epochs(self, seed: int, epochs: Iterable[int]) -> Iterator[Iterator[Batch]]:
        """The batches of each epoch, in random order. Digits that do not fill a batch are left out."""
        generator = torch.Generator().manual_seed(seed)
        for _ in epochs:
            order = torch.randperm(len(self.y_train), generator=generator)[: self.batches_per_epoch * self.batch_size]
            yield ((self.x_train[rows], self.y_train[rows]) for rows in order.split(self.batch_size))

    def first_batch(self, seed: int) -> Batch:
        return next(next(self.epochs(seed, [0])))


def load(seed: int) -> Digits:
    """scikit-learn's 1,797 images of 8 x 8 pixels, in [0, 1] less the mean image; 20% are for the test."""
    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=seed)
    mean = x_train.mean(axis=0)
    x_train, x_test = (torch.from_numpy(x - mean).float() for x in (x_train, x_test))
    return Digits(x_train, torch.from_numpy(y_train), x_test, torch.from_numpy(y_test))


@dataclass(frozen=True)
class Setting:
    """The input of an experiment. `progress(completed=, total=)` moves the progress bar."""

    data: Digits
    seed: int
    quick: bool
    progress: Callable[..., None]

    def epochs(self, full: int, quick: int) -> range:
        return range(quick if self.quick else full)

    def track(self, items: Sequence[T]) -> Iterator[T]:
        """Yields the items and moves the progress bar after each of them."""
        for done, item in enumerate(items):
            self.progress(completed=done, total=len(items))
            yield item
        self.progress(completed=len(items), total=len(items))


@dataclass
class Run:
    """The course of a training. Where gradients are clipped, it has their norm before and after."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    clipped_norms: list[float] = field(default_factory=list)
    measures: list[float] = field(default_factory=list)  # after each epoch, usually the test accuracy

    @property
    def first_nan(self) -> int | None:
        return next((step for step, loss in enumerate(self.losses) if math.isnan(loss)), None)


def forward_backward(model: nn.Module, x: Tensor, target: Tensor, loss_fn: LossFunction = F.cross_entropy) -> Tensor:
    model.zero_grad()
    loss = loss_fn(model(x), target)
    loss.backward()
    return loss.detach()


def train(
    model: nn.Module,
    epochs: Iterable[Iterable[Batch]],
    optimizer: torch.optim.Optimizer,
    measure: Callable[[], float] | None = None,
    clip_: Clip | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    loss_fn: LossFunction = F.cross_entropy,
) -> Run:
    """One step for each batch, and `measure` after each epoch. Training ends when the loss is nan."""
    run = Run()
    for batches in epochs:
        for x, target in batches:
            run.losses.append(forward_backward(model, x, target, loss_fn).item())
            if math.isnan(run.losses[-1]):
                return run
            if clip_ is not None:
                run.norms.append(gk.grad_report(model).total_norm.item())
                clip_(model.parameters())
                run.clipped_norms.append(gk.grad_report(model).total_norm.item())
            optimizer.step()
            if schedule is not None:
                schedule.step()
        if measure is not None:
            run.measures.append(measure())
    return run


def accuracy(model: nn.Module, data: Digits) -> float:
    model.eval()
    with torch.no_grad():
        hits = model(data.x_test).argmax(dim=1) == data.y_test
    model.train()
    return int(hits.sum()) / len(hits)


def new_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """The first column is aligned left, the others right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column, header in enumerate(headers):
        table.add_column(header, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return table


def new_figure(*panels: tuple[str, str, str], height: float = 4.4) -> tuple[Figure, list[Axes]]:
    """Panels in a row, each with a title and the labels of x and y. The height is in inches of 100 pixels."""
    figure = Figure(figsize=((8, 10, 13)[len(panels) - 1], height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [*figure.subplots(1, len(panels), squeeze=False)[0]]
    for panel, labels in zip(axes, panels, strict=True):
        dress(panel, *labels)
    return figure, axes
