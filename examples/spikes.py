"""Batches that spoil a training, and six ways to clip: a recurrent and a convolutional network.

Three batches have pixels that are 255 times too large and shuffled labels, which makes the gradient about a
thousand times larger. A later batch has a pixel that is nan.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import gradkernels as gk
from examples.clipping import MAX_NORM, Reader
from examples.experiment import Batch, Digits, Results, Setting, accuracy, check, forward_backward, new_figure, new_table
from gradkernels.diagnosis.plots import BAD, FAIR, GOOD, INK, PALE
from gradkernels.optim import ClippingHandle

SPOILT, WITH_NAN, STEPS, MEASURED_EVERY = (50, 80, 110), 130, 150, 10
SCALE, LR = 255, 1e-3


@dataclass(frozen=True)
class Way:
    """A way to clip. `attach` is None if nothing is clipped."""

    name: str
    colour: str
    attach: Callable[[torch.optim.Optimizer], ClippingHandle] | None = None


NOT_CLIPPED = Way("not clipped", BAD)
SKIP = Way("ZClip and skip", GOOD, lambda optimizer: gk.attach_clipping(optimizer, gk.clipping.ZScore(), nonfinite="skip", skip_above=5.0))
WAYS = (
    NOT_CLIPPED,
    Way(f"clipped to {MAX_NORM:g}", INK, lambda optimizer: gk.attach_clipping(optimizer, MAX_NORM)),
    Way("AutoClip", FAIR, lambda optimizer: gk.attach_clipping(optimizer, gk.clipping.Percentile())),
    Way("ZClip", "#2471a3", lambda optimizer: gk.attach_clipping(optimizer, gk.clipping.ZScore())),
    Way("AGC", "#9b59b6", lambda optimizer: gk.attach_clipping(optimizer, gk.clipping.Adaptive())),
    SKIP,
)


def convolutional(seed: int) -> nn.Sequential:
    """Without batch norm, which would take the factor out of the pixels."""
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), gk.LeakyReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), gk.LeakyReLU(), nn.Flatten(), nn.Linear(512, 10)),
    )
    gk.init.apply_(model, generator=torch.Generator().manual_seed(seed))
    return model


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"recurrent": Reader, "convolutional": convolutional}


def batches(data: Digits, seed: int) -> Iterator[Batch]:
    """The batches of the steps from 1 on, the same for all ways to clip."""
    generator = torch.Generator().manual_seed(seed)
    healthy = itertools.chain.from_iterable(data.epochs(seed, itertools.count()))
    for step, (x, target) in enumerate(itertools.islice(healthy, STEPS), start=1):
        if step in SPOILT:
            x, target = SCALE * x, target[torch.randperm(len(target), generator=generator)]
        if step == WITH_NAN:
            x[0, 0] = math.nan
        yield x, target


@dataclass
class Course:
    """The course of a training: the loss of the test digits every few steps, and their accuracy twice."""

    losses: list[float]
    before_nan: float = 0.0
    at_end: float = 0.0
    skipped: int = 0

    @property
    def is_lost(self) -> bool:
        return math.isnan(self.losses[-1])


def train(model: nn.Module, way: Way, data: Digits, seed: int) -> Course:
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    handle = None if way.attach is None else way.attach(optimizer)
    course = Course([])
    for step, (x, target) in enumerate(batches(data, seed), start=1):
        if step == WITH_NAN:
            course.before_nan = accuracy(model, data)
        forward_backward(model, x, target)
        optimizer.step()
        if step % MEASURED_EVERY == 0:
            with torch.no_grad():
                course.losses.append(F.cross_entropy(model(data.x_test), data.y_test).item())
    course.at_end = accuracy(model, data)
    course.skipped = 0 if handle is None else int(handle.skipped)
    return course


def check_courses(network: str, courses: dict[Way, Course]) -> None:
    """Checks the courses of one run."""
    worst, skipped, expected = courses[NOT_CLIPPED].before_nan, courses[SKIP].skipped, len(SPOILT) + 1
    for way, course in courses.items():
        name = f"the {network} network, {way.name},"
        outcome = "is lost" if course.is_lost else "survives"
        check(course.is_lost == (way is not SKIP), f"expected only {SKIP.name!r} to survive a nan; {name} {outcome}")
        message = f"expected {name} to learn more than {worst:.1%}, the accuracy without clipping; its accuracy is {course.before_nan:.1%}"
        check(way is NOT_CLIPPED or course.before_nan > worst + 0.03, message)
    check(skipped == expected, f"expected {expected} skipped steps of the {network} network; there are {skipped}")


def run(setting: Setting) -> Results:
    seeds = [setting.seed + place for place in setting.epochs(3, 1)]
    courses: dict[str, dict[Way, list[Course]]] = {network: {way: [] for way in WAYS} for network in NETWORKS}
    for network, way, seed in setting.track([*itertools.product(NETWORKS, WAYS, seeds)]):
        courses[network][way].append(train(NETWORKS[network](seed), way, setting.data, seed))
    yield new_table(
        f"Test accuracy before the nan and at the end, median of {len(seeds)}",
        ("", *NETWORKS, "skipped steps"),
        ([way.name, *(accuracies(of_ways[way]) for of_ways in courses.values()), skipped_steps(courses, way)] for way in WAYS),
    )
    for network, of_ways in courses.items():
        for place in range(len(seeds)):
            check_courses(network, {way: of_way[place] for way, of_way in of_ways.items()})
    yield draw(courses)


def accuracies(courses: list[Course]) -> str:
    before, at_end = (statistics.median(each) for each in zip(*((course.before_nan, course.at_end) for course in courses), strict=True))
    return f"{before:.1%}, {'nan' if any(course.is_lost for course in courses) else f'{at_end:.1%}'}"


def skipped_steps(courses: dict[str, dict[Way, list[Course]]], way: Way) -> str:
    return str(max(course.skipped for of_ways in courses.values() for course in of_ways[way]))


def draw(courses: dict[str, dict[Way, list[Course]]]) -> Figure:
    figure, panels = new_figure(
        ("A recurrent network: any clipping helps,\nmost the one that clips the first steps, too", "step", "test loss, median of the runs"),
        ("A convolutional network: any clipping is\nenough, but only skipping survives a nan", "step", ""),
        height=5.2,
    )
    title = f"Dotted: batches with pixels {SCALE} times too large and shuffled labels, and one with a nan. Cross: nan from then on"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for axes, of_ways in zip(panels, courses.values(), strict=True):
        for way, of_way in of_ways.items():
            losses = torch.tensor([course.losses for course in of_way]).median(dim=0).values
            finite = losses[losses.isfinite()]
            steps = MEASURED_EVERY * torch.arange(1, len(finite) + 1)
            # The line of SKIP lies below the others, which are near it.
            width, order = (5, 1) if way is SKIP else (1.6, 2)
            axes.plot(steps, finite, color=way.colour, linewidth=width, zorder=order, label=way.name)
            if len(finite) < len(losses):
                axes.plot(steps[-1], finite[-1], "X", color=way.colour, markersize=8)
        for step in (*SPOILT, WITH_NAN):
            axes.axvline(step, color=PALE, linestyle=":", linewidth=1, zorder=0)
            label = "nan" if step == WITH_NAN else f"x {SCALE}"
            axes.text(step + 1, 0.99, label, color=INK, fontsize=9, transform=axes.get_xaxis_transform(), va="top")
        axes.set_yscale("log")
        axes.set_ylim(top=12)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS), frameon=False)
    return figure
