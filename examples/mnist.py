"""The notes' own table, on MNIST: 784-300-100-10, He, ELU and plain gradient descent, with batch norm, or clipped by value without it.

The four files in the IDX format are read from a folder, as they are or packed by gzip; nothing is ever fetched. The notes' figures are the
least that is expected, less a tolerance for their other framework's split and random numbers.
"""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

import gradkernels as gk
from examples.harness import Advance, Digits, Report, Setting, accuracy, fit, require
from examples.telling import new_figure, new_table
from gradkernels.diagnosis.plots import FAIR, GOOD, INK, dress

SIZES = (784, 300, 100, 10)
LR, BATCH_SIZE, EPOCHS = 0.01, 200, 20
TOLERANCE = 0.02


@dataclass(frozen=True)
class Row:
    """A line of the notes' table; expected is the accuracy that they report."""

    name: str
    expected: float
    batch_norm: bool
    clip_: Callable[[nn.Module], object] | None = None


ROWS = (
    Row("He, ELU, batch norm", 0.9652, batch_norm=True),
    Row("He, ELU, clipped by value to 1", 0.8957, batch_norm=False, clip_=partial(gk.clip_grad_value_, clip_value=1.0)),
)


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """An array of bytes in the IDX format: two zeros, the type (8 is uint8), the number of dimensions, big-endian sizes, then the data."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    require(content[:3] == b"\0\0\x08" and len(content) > 3, f"{path} is no IDX file of bytes: it begins with {content[:4].hex(' ')}")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    require(len(content) >= start, f"{path} ends within its header")
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    data = np.frombuffer(content, np.uint8, offset=start)
    require(data.size == np.prod(shape), f"{path} is to hold {'x'.join(map(str, shape))} bytes and holds {data.size}")
    return data.reshape(shape)


def read(folder: Path) -> Digits:
    """Pixels in [0, 1]."""

    def find(name: str) -> Path:
        names = [spelling + suffix for spelling in (name, name.replace("-idx", ".idx")) for suffix in ("", ".gz")]
        found = next((folder / each for each in names if (folder / each).is_file()), None)
        require(found is not None, f"{folder} is to hold the four files of MNIST, and has none of {', '.join(names)}")
        assert found is not None
        return found

    def part(name: str) -> tuple[Tensor, Tensor]:
        images, labels = read_idx(find(f"{name}-images-idx3-ubyte")), read_idx(find(f"{name}-labels-idx1-ubyte"))
        require(images.shape[1:] == (28, 28), f"images of {name} are to have 28 x 28 pixels, and the array is {images.shape}")
        require(labels.shape == images.shape[:1], f"{name} has {len(images)} images and {len(labels)} labels")
        return torch.from_numpy(images.reshape(len(images), -1) / np.float32(255)), torch.from_numpy(labels.astype(np.int64))

    (x_train, y_train), (x_test, y_test) = part("train"), part("t10k")
    require(len(y_train) >= BATCH_SIZE, f"there are {len(y_train)} images to learn, fewer than a batch of {BATCH_SIZE}")
    return Digits(x_train, y_train, x_test, y_test, BATCH_SIZE)


def build(row: Row, seed: int) -> nn.Sequential:
    model = nn.Sequential()
    for depth, (fan_in, fan_out) in enumerate(pairwise(SIZES), start=1):
        act = "elu" if depth < len(SIZES) - 1 else "identity"
        model.append(nn.Linear(fan_in, fan_out, bias=not row.batch_norm))
        if row.batch_norm:
            model.append(gk.BatchNormAct1d(fan_out, act=act))
        elif act == "elu":
            model.append(gk.ELU())
    gk.init.apply_(model, "he_normal", torch.Generator().manual_seed(seed))
    return model


def train(row: Row, data: Digits, seed: int, epochs: int, advance: Advance) -> list[float]:
    """The test accuracy after each epoch."""
    model = build(row, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    accuracies = []
    batches = data.batches(seed, epochs)
    for _ in range(epochs):
        fit(model, (next(batches) for _ in range(data.batches_per_epoch)), optimizer, advance, row.clip_)
        accuracies.append(accuracy(model, data))
    return accuracies


def run(data: Digits, setting: Setting) -> Report:
    advance = setting.begin("MNIST", len(ROWS) * EPOCHS * data.batches_per_epoch)
    found = [train(row, data, setting.seed, EPOCHS, advance) for row in ROWS]
    yield new_table(
        f"MNIST, {len(data.y_train)} to learn and {len(data.y_test)} to test, {'-'.join(map(str, SIZES))}, gradient descent {LR:g}, "
        f"batch {BATCH_SIZE}, {EPOCHS} epochs: test accuracy",
        ("", "the notes", "found", "difference"),
        (
            [row.name, f"{row.expected:.4f}", f"{accuracies[-1]:.4f}", f"{accuracies[-1] - row.expected:+.4f}"]
            for row, accuracies in zip(ROWS, found, strict=True)
        ),
    )
    yield draw(found)
    for row, accuracies in zip(ROWS, found, strict=True):
        require(
            accuracies[-1] >= row.expected - TOLERANCE,
            f"{row.name!r} was to have {row.expected:.4f} of MNIST's test digits right, as in the notes, and has {accuracies[-1]:.4f}",
        )


def draw(found: list[list[float]]) -> Figure:
    figure = new_figure(10, 5)
    axes = figure.subplots()
    for row, accuracies, colour in zip(ROWS, found, (GOOD, FAIR), strict=True):
        axes.plot(range(1, EPOCHS + 1), accuracies, "o-", color=colour, markersize=4, label=f"{row.name}: {accuracies[-1]:.4f}")
        axes.axhline(row.expected, color=colour, linestyle=":")
        axes.annotate(f"the notes: {row.expected:.4f}", (1, row.expected), (0, 3), textcoords="offset points", color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower right")
    dress(axes, "MNIST, the notes' network: found (lines) and reported (dotted)", "epoch", "test accuracy")
    return figure
