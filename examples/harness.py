"""What the experiments of the demonstration share: digits to learn, a training step, and a sentence where the outcome is not the expected.

An experiment is a generator: it yields its tables as they come about and its figure last, and requires on the way what it is to show.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from matplotlib.figure import Figure
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

Advance: TypeAlias = Callable[[], None]
Report: TypeAlias = Iterator[Table | Figure]


def require(condition: bool, message: str) -> None:
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

    def batches(self, seed: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(self.y_train), generator=generator)
            for rows in order[: self.batches_per_epoch * self.batch_size].split(self.batch_size):
                yield self.x_train[rows], self.y_train[rows]


def digits(seed: int) -> Digits:
    """1,797 images of 8 x 8 pixels, split 80/20 with every digit in its share; pixels in [0, 1], less the training part's mean image."""
    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=seed)
    mean = x_train.mean(axis=0)
    return Digits(
        torch.from_numpy(x_train - mean).float(),
        torch.from_numpy(y_train),
        torch.from_numpy(x_test - mean).float(),
        torch.from_numpy(y_test),
    )


@dataclass(frozen=True)
class Setting:
    """What an experiment gets. begin(description, steps) starts its progress bar and returns what advances it by a step."""

    data: Digits
    seed: int
    quick: bool
    begin: Callable[[str, int], Advance]

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Experiment:
    name: str
    about: str
    run: Callable[[Setting], Report]


def forward_backward(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    model.zero_grad()
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    return loss.detach()


def fit(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    advance: Advance,
    clip_: Callable[[nn.Module], object] | None = None,
) -> list[float]:
    """One step for each batch; returns their losses."""
    losses = []
    for x, target in batches:
        losses.append(forward_backward(model, x, target).item())
        if clip_ is not None:
            clip_(model)
        optimizer.step()
        advance()
    return losses


def accuracy(model: nn.Module, data: Digits) -> float:
    model.eval()
    with torch.no_grad():
        hits = model(data.x_test).argmax(dim=1) == data.y_test
    model.train()
    return int(hits.sum()) / len(hits)
