"""Three experiments on handwritten digits, each run with torch.nn and with gradkernels, same weights, same batches.

Rounding grows chaotically in training, so two correct programs part after some dozen steps. Held to a number of ulp is therefore one
step from one copied state, at several points of the training; over a whole training only the test accuracy is compared. Whatever does
not hold ends the program with a sentence that says so.
"""

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

import gradkernels as gk
from examples.harness import Advance, Digits, Report, Setting, accuracy, forward_backward, require
from examples.telling import new_figure, new_table
from gradkernels.diagnosis.plots import BAD, GOOD, dress

TORCH, OURS = "torch.nn", "gradkernels"
PROVIDERS = (TORCH, OURS)
CHECKED_STEPS = (0, 10, 50)

# The networks


@dataclass(frozen=True)
class Network:
    """A multilayer perceptron and how it is trained. Weights start as N(0, gain^2 / n), n the inputs of the layer; He is gain sqrt(2)."""

    name: str
    sizes: tuple[int, ...]
    act: str
    gain: float
    batch_norm: bool
    lr: float
    native_operators: tuple[str, ...]
    ulp_limit: float
    accuracy_tolerance: float
    max_norm: float | None = None

    def build(self, provider: str) -> nn.Sequential:
        """The same network, with the same state_dict keys, of either provider's modules."""
        model = nn.Sequential()
        for depth, (fan_in, fan_out) in enumerate(pairwise(self.sizes), start=1):
            act = self.act if depth < len(self.sizes) - 1 else "identity"
            # No bias before batch norm, which subtracts it again: its gradient is exactly 0, and what is computed is rounding noise.
            model.add_module(f"linear{depth}", nn.Linear(fan_in, fan_out, bias=not self.batch_norm))
            if self.batch_norm and provider == OURS:
                model.add_module(f"norm_act{depth}", gk.BatchNormAct1d(fan_out, act=act))
            else:
                if self.batch_norm:
                    model.add_module(f"norm_act{depth}", nn.BatchNorm1d(fan_out))
                model.add_module(f"act{depth}", activation(provider, act))
        return model

    def initial_state(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        model = self.build(TORCH)
        for linear in linears(model):
            nn.init.normal_(linear.weight, std=self.gain / math.sqrt(linear.in_features), generator=generator)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        return model.state_dict()

    def clip_(self, provider: str, model: nn.Module) -> Tensor | None:
        """Clips the gradients where this network is to be clipped; returns their norm before."""
        if self.max_norm is None:
            return None
        clip_grad_norm_ = gk.clip_grad_norm_ if provider == OURS else nn.utils.clip_grad_norm_
        return clip_grad_norm_(model.parameters(), self.max_norm)


# Keras' slope. With 0.01 the clipped network ends at 20 to 60 % at any learning rate: clipping bounds the step, not the weights.
NEGATIVE_SLOPE = 0.3


def activation(provider: str, act: str) -> nn.Module:
    if act == "leaky_relu":
        return (gk.LeakyReLU if provider == OURS else nn.LeakyReLU)(NEGATIVE_SLOPE)
    modules: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "elu": nn.ELU, "identity": nn.Identity}
    return modules[act]()


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


DEEP = (64, *[100] * 19, 10)
HE = math.sqrt(2)
BATCH_NORM_ACT = ("batch_norm_act", "batch_norm_act_backward")
LEAKY_RELU = ("leaky_relu", "leaky_relu_backward")
CLIP_GRAD = ("grad_norms", "clip_grads_with_norm_")

# The limits are four times and more what seeds 0 to 9 gave with AVX-512, and 0 to 2 without: 46 ulp (cured), 1.9 (clipped), 14 (notes).
# The test accuracies were then equal to the digit with batch norm. Of clipped networks, which bounce, providers differed by up to 5 points
# (--quick; 3 in full) and seeds by 8.
SIGMOID = Network(
    "sigmoid",
    DEEP,
    "sigmoid",
    gain=1,
    batch_norm=False,
    lr=0.1,
    native_operators=(),
    ulp_limit=0,
    accuracy_tolerance=0.03,
)
CURED = replace(SIGMOID, name="cured", act="elu", gain=HE, batch_norm=True, native_operators=BATCH_NORM_ACT, ulp_limit=200)
NOTES = replace(CURED, name="64-300-100-10", sizes=(64, 300, 100, 10), ulp_limit=64)
UNCLIPPED = replace(
    SIGMOID,
    name="unclipped",
    act="leaky_relu",
    gain=3 * HE / math.hypot(1, NEGATIVE_SLOPE),
    lr=1.0,
    native_operators=LEAKY_RELU,
    ulp_limit=8,
    accuracy_tolerance=0.08,
)
CLIPPED = replace(UNCLIPPED, name="clipped", native_operators=LEAKY_RELU + CLIP_GRAD, max_norm=1.0)


# Training, and what is seen on the way


class Agreement(NamedTuple):
    """The largest distances over every tensor that a step makes, in ulp: of the two providers, and of each from torch.nn in float64."""

    apart: float
    torch_error: float
    our_error: float


@dataclass
class Run:
    layer_norms: list[float] = field(default_factory=list)  # gradient norm of each layer's weight in the first step, before clipping
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    clipped_norms: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)  # of the test part, after each epoch

    @property
    def first_to_last(self) -> float:
        return self.layer_norms[0] / self.layer_norms[-1]

    @property
    def first_nan(self) -> int | None:
        return next((step for step, loss in enumerate(self.losses) if math.isnan(loss)), None)


@dataclass(frozen=True)
class Pair:
    network: Network
    runs: dict[str, Run]
    agreement: Agreement

    @property
    def accuracy(self) -> dict[str, float]:
        return {provider: run.accuracies[-1] for provider, run in self.runs.items()}


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def train(network: Network, data: Digits, seed: int, epochs: int, advance: Advance) -> Pair:
    """Trains the network of both providers, side by side, and ends the program where the two differ by more than rounding."""
    state = network.initial_state(seed)
    models, schedules, runs = {}, {}, {provider: Run() for provider in PROVIDERS}
    for provider in PROVIDERS:
        models[provider] = network.build(provider)
        models[provider].load_state_dict(state)
        optimizer = torch.optim.SGD(models[provider].parameters(), lr=network.lr)
        schedules[provider] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * data.batches_per_epoch)

    agreements = []
    for step, (x, target) in enumerate(data.batches(seed, epochs)):
        if step == 0:
            require_native(network, x, target)
        if step in CHECKED_STEPS:
            agreements.append(require_agreement(network, models[OURS].state_dict(), x, target, step))
        for provider, run in runs.items():
            model, schedule = models[provider], schedules[provider]
            run.losses.append(forward_backward(model, x, target).item())
            if step == 0:
                run.layer_norms = [float(gradients(linear)[0].norm()) for linear in linears(model)]
            run.norms.append(nn.utils.get_total_norm(gradients(model)).item())
            network.clip_(provider, model)
            run.clipped_norms.append(nn.utils.get_total_norm(gradients(model)).item())
            schedule.optimizer.step()
            schedule.step()
            if (step + 1) % data.batches_per_epoch == 0:
                run.accuracies.append(accuracy(model, data))
        advance()
    pair = Pair(network, runs, Agreement(*map(max, zip(*agreements, strict=True))))
    require_same_accuracy(pair)
    return pair


def require_native(network: Network, x: Tensor, target: Tensor) -> None:
    """Reads from torch's profiler which operators one training step ran; the _backward ones run only after native forward ones."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # below it the profiler announces its own start and stop on stderr
    model = network.build(OURS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        forward_backward(model, x, target)
        network.clip_(OURS, model)
    seen = {event.key for event in profile.key_averages()}
    missing = [name for name in network.native_operators if f"gradkernels::{name}" not in seen]
    require(not missing, f"a step of {network.name!r} ran without the native operators {', '.join(missing)}")


def ulp(a: Tensor, b: Tensor, exact: Tensor) -> float:
    """The largest |a - b|, in float32 units in the last place of the largest |exact|.

    Of the largest, not of each element: where terms cancel, an element is what rounding left of them, and no two orders of summation
    leave the same.
    """
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a.double() - b.double()).abs()).max()
    if apart == 0:
        return 0.0
    distance = (apart / (exact.abs().max() * torch.finfo(torch.float32).eps)).item()
    return math.inf if math.isnan(distance) else distance


def step_tensors(
    network: Network, provider: str, state: dict[str, Tensor], dtype: torch.dtype, x: Tensor, target: Tensor
) -> dict[str, Tensor]:
    """Everything one step from `state` makes: loss, total norm, gradients as the optimizer gets them, running statistics."""
    model = network.build(provider).to(dtype)
    model.load_state_dict(state)
    made = {"the loss": forward_backward(model, x.to(dtype), target)}
    total_norm = network.clip_(provider, model)
    if total_norm is not None:
        made["the total norm"] = total_norm
    made |= {f"the gradient of {name}": parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return made | dict(model.named_buffers())


def require_agreement(network: Network, state: dict[str, Tensor], x: Tensor, target: Tensor, step: int) -> Agreement:
    exact = step_tensors(network, TORCH, state, torch.float64, x, target)
    torchs = step_tensors(network, TORCH, state, torch.float32, x, target)
    ours = step_tensors(network, OURS, state, torch.float32, x, target)
    apart = {name: ulp(ours[name], torchs[name], exact[name]) for name in exact}
    where = max(apart, key=lambda name: apart[name])
    require(
        apart[where] <= network.ulp_limit,
        f"at step {step} of {network.name!r}, one step from the same state differs: {where} of gradkernels is {apart[where]:.3g} ulp from "
        f"torch.nn's, {network.ulp_limit:g} are allowed",
    )
    return Agreement(
        apart[where],
        max(ulp(torchs[name], exact[name], exact[name]) for name in exact),
        max(ulp(ours[name], exact[name], exact[name]) for name in exact),
    )


def require_same_accuracy(pair: Pair) -> None:
    torchs, ours = pair.accuracy[TORCH], pair.accuracy[OURS]
    require(
        abs(ours - torchs) <= pair.network.accuracy_tolerance,
        f"{pair.network.name!r} has {torchs:.1%} of the test digits right with torch.nn and {ours:.1%} with gradkernels; "
        f"rounding explains {pair.network.accuracy_tolerance:.0%}",
    )


# The experiments: each requires what it is to show


@dataclass(frozen=True)
class Vanishing:
    without: Pair
    cured: Pair


def vanishing(data: Digits, seed: int, epochs: int, advance: Advance) -> Vanishing:
    result = Vanishing(train(SIGMOID, data, seed, epochs, advance), train(CURED, data, seed, epochs, advance))
    for provider in PROVIDERS:
        ratio, cured_ratio = (pair.runs[provider].first_to_last for pair in (result.without, result.cured))
        require(
            ratio < 1e-6,
            f"20 sigmoid layers of {provider} were to lose the gradient, and the first layer has {ratio:.1e} of the last one's",
        )
        require(
            cured_ratio > 0.1,
            f"the cure of {provider} was to keep the gradient alive, and the first layer has {cured_ratio:.1e} of the last one's",
        )
        learned = result.cured.accuracy[provider]
        require(learned > 0.85, f"the cured network of {provider} was to learn, and has {learned:.1%} of the test digits right")
    return result


@dataclass(frozen=True)
class Exploding:
    without: Pair
    clipped: Pair


def exploding(data: Digits, seed: int, epochs: int, advance: Advance) -> Exploding:
    result = Exploding(train(UNCLIPPED, data, seed, epochs, advance), train(CLIPPED, data, seed, epochs, advance))
    for provider in PROVIDERS:
        lost, learned = result.without.runs[provider].first_nan, result.clipped.accuracy[provider]
        require(
            lost is not None,
            f"weights 3 times too large were to drive the loss of {provider} to nan without clipping, and it stayed finite",
        )
        require(learned > 0.7, f"the clipped network of {provider} was to learn, and has {learned:.1%} of the test digits right")
    return result


@dataclass(frozen=True)
class NotesNetwork:
    pair: Pair
    milliseconds: dict[str, float]


def notes_network(data: Digits, seed: int, epochs: int, advance: Advance) -> NotesNetwork:
    pair = train(NOTES, data, seed, epochs, advance)
    for provider, learned in pair.accuracy.items():
        require(learned > 0.9, f"the notes' network of {provider} was to learn, and has {learned:.1%} of the test digits right")
    return NotesNetwork(pair, milliseconds_per_step(NOTES, data, seed))


def milliseconds_per_step(network: Network, data: Digits, seed: int) -> dict[str, float]:
    """Medians of whole training steps, in alternating blocks whose first steps go unmeasured: neither inherits the other's caches."""
    x, target = next(data.batches(seed, epochs=1))
    state = network.initial_state(seed)
    models = {provider: network.build(provider) for provider in PROVIDERS}
    optimizers = {provider: torch.optim.SGD(model.parameters(), lr=network.lr) for provider, model in models.items()}
    seconds: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
    for model in models.values():
        model.load_state_dict(state)
    for _ in range(10):
        for provider, model in models.items():
            for step in range(25):
                start = time.perf_counter()
                forward_backward(model, x, target)
                optimizers[provider].step()
                if step >= 5:
                    seconds[provider].append(time.perf_counter() - start)
    return {provider: 1e3 * statistics.median(times) for provider, times in seconds.items()}


# Telling it


def table_of(title: str, pairs: tuple[Pair, ...], rows: dict[str, Callable[[Run], str]]) -> Table:
    """A row per quantity, a column per run."""
    headers = [f"{pair.network.name}\n{provider}" for pair in pairs for provider in PROVIDERS]
    return new_table(
        title,
        ["", *headers],
        ([name, *(show(pair.runs[provider]) for pair in pairs for provider in PROVIDERS)] for name, show in rows.items()),
    )


def vanishing_table(result: Vanishing) -> Table:
    def layer_norm(layer: int) -> Callable[[Run], str]:
        return lambda run: f"{run.layer_norms[layer - 1]:.2g}"

    return table_of(
        "1. Vanishing: sigmoid, weights N(0, 1/n); cured: He, batch norm + ELU",
        (result.without, result.cured),
        {f"gradient norm, layer {layer}": layer_norm(layer) for layer in (1, 5, 10, 15, 20)}
        | {"first / last layer": lambda run: f"{run.first_to_last:.2g}", "test accuracy": lambda run: f"{run.accuracies[-1]:.1%}"},
    )


def exploding_table(result: Exploding) -> Table:
    return table_of(
        "2. Exploding: leaky ReLU, weights 3 x He; clipped: to norm 1",
        (result.without, result.clipped),
        {
            "loss, step 0": lambda run: f"{run.losses[0]:.2g}",
            "loss, last step": lambda run: f"{run.losses[-1]:.2g}",
            "nan from step": lambda run: "never" if run.first_nan is None else str(run.first_nan),
            "gradient norm, step 0": lambda run: f"{run.norms[0]:.2g}",
            "after clipping": lambda run: f"{run.clipped_norms[0]:.2g}",
            "test accuracy": lambda run: f"{run.accuracies[-1]:.1%}",
        },
    )


def notes_network_table(result: NotesNetwork) -> Table:
    def accuracy_after(epoch: int) -> Callable[[Run], str]:
        return lambda run: f"{run.accuracies[epoch]:.1%}"

    pair = result.pair
    table = table_of(
        "3. The notes' network: He, batch norm, ELU, SGD",
        (pair,),
        {f"accuracy, epoch {epoch + 1}": accuracy_after(epoch) for epoch in range(len(pair.runs[OURS].accuracies))},
    )
    table.add_section()
    table.add_row("ms per step, 1 thread", *(f"{result.milliseconds[provider]:.2f}" for provider in PROVIDERS))
    return table


def agreement_table(pairs: list[Pair]) -> Table:
    return new_table(
        f"One step from one state, at steps {', '.join(map(str, CHECKED_STEPS))}: largest distance in ulp",
        ("network", "gradkernels\nto torch.nn", "allowed", "torch.nn\nto float64", "gradkernels\nto float64"),
        (
            [
                pair.network.name,
                *(
                    f"{distance:.3g}"
                    for distance in (
                        pair.agreement.apart,
                        pair.network.ulp_limit,
                        pair.agreement.torch_error,
                        pair.agreement.our_error,
                    )
                ),
            ]
            for pair in pairs
        ),
        caption="of loss, norm, gradients, running statistics; ulp of a tensor's\nlargest value; nan facing nan agrees",
    )


def plot(vanished: Vanishing, exploded: Exploding, notes: NotesNetwork) -> Figure:
    figure = new_figure(
        15, 5.2, "gradkernels (lines) and torch.nn (rings), same weights, same batches; training amplifies the last bit, so they part"
    )
    left, middle, right = figure.subplots(1, 3)

    ratio = vanished.without.runs[OURS].first_to_last
    draw(left, vanished.without, lambda run: list(enumerate(run.layer_norms, start=1)), BAD)
    draw(left, vanished.cured, lambda run: list(enumerate(run.layer_norms, start=1)), GOOD)
    left.set_yscale("log")
    left.set_xticks([1, 5, 10, 15, 20])
    left.text(20, 1e-9, f"sigmoid, weights N(0, 1/n):\n{tested(vanished.without)}", color=BAD, ha="right")
    left.text(1, 1e-2, f"He, batch norm + ELU:\n{tested(vanished.cured)}", color=GOOD)
    title = f"Vanishing: the first sigmoid layer gets {ratio:.0e} of\nthe last one's gradient; cured, all layers get theirs"
    dress(left, title, "layer", "gradient norm in the first step")

    lost = exploded.without.runs[OURS]
    draw(middle, exploded.clipped, epoch_means, GOOD)
    middle.plot(0, lost.losses[0], "X", color=BAD, markersize=11)
    # symlog, since the loss reaches exactly 0: the logits are so large that the softmax of a digit that is right is 1.
    middle.set_yscale("symlog", linthresh=1)
    middle.set_ylim(bottom=0)
    middle.text(25, lost.losses[0], f"not clipped: nan from step {lost.first_nan} on", color=BAD, va="center")
    middle.text(0.05, 0.12, f"clipped to norm 1:\n{tested(exploded.clipped)}", color=GOOD, transform=middle.transAxes)
    dress(
        middle,
        "Exploding: weights 3 times too large end in nan;\nwith the gradient clipped they learn",
        "step",
        "training loss, mean of each epoch",
    )

    draw(right, notes.pair, epoch_means, GOOD)
    right.set_ylim(bottom=0)
    right.text(0.3, 0.4, f"He, batch norm + ELU:\n{tested(notes.pair)}", color=GOOD, transform=right.transAxes)
    dress(right, "The notes' network, 64-300-100-10:\nloss and accuracy as with torch.nn", "step", "training loss, mean of each epoch")
    return figure


def tested(pair: Pair) -> str:
    return f"{pair.accuracy[OURS]:.0%} of the test digits right"


def draw(axes: Axes, pair: Pair, points: Callable[[Run], list[tuple[float, float]]], colour: str) -> None:
    axes.plot(*zip(*points(pair.runs[OURS]), strict=True), color=colour)
    axes.plot(*zip(*points(pair.runs[TORCH]), strict=True), "o", color=colour, markerfacecolor="none", markersize=7, clip_on=False)


def epoch_means(run: Run) -> list[tuple[float, float]]:
    """The loss of the first step, then the mean of each epoch at its middle."""
    length = len(run.losses) // len(run.accuracies)
    means = [statistics.fmean(run.losses[start : start + length]) for start in range(0, len(run.losses), length)]
    return [(0, run.losses[0]), *((length * (epoch + 0.5), mean) for epoch, mean in enumerate(means))]


def run(setting: Setting) -> Report:
    data, seed = setting.data, setting.seed
    deep_epochs, clipped_epochs, notes_epochs = (4, 12, 4) if setting.quick else (10, 24, 12)

    def begin(description: str, epochs: int) -> Advance:
        return setting.begin(description, epochs * data.batches_per_epoch)

    vanished = vanishing(data, seed, deep_epochs, begin("vanishing gradients", 2 * deep_epochs))
    yield vanishing_table(vanished)
    exploded = exploding(data, seed, clipped_epochs, begin("exploding gradients", 2 * clipped_epochs))
    yield exploding_table(exploded)
    notes = notes_network(data, seed, notes_epochs, begin("the notes' network", notes_epochs))
    yield notes_network_table(notes)
    yield agreement_table([vanished.without, vanished.cured, exploded.without, exploded.clipped, notes.pair])
    yield plot(vanished, exploded, notes)
