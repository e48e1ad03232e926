"""diagnose: verdicts on every layer of a model after one step, their reasons, and the cures, ranked.

The figures come from probe.py, the verdicts from verdicts.py and the cures from cures.py. This file puts them
together in a report and tries the safe cures on a copy.
"""

from __future__ import annotations

import copy
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradkernels import init, text
from gradkernels.diagnosis import plots
from gradkernels.diagnosis.cures import CLIPPING, INITIALISATION, LEARNING_RATE, MAX_NORM, clip_coefficient, cures, learning_rate
from gradkernels.diagnosis.probe import Layer, Probe, probe
from gradkernels.diagnosis.verdicts import (
    HEALTHY,
    NON_FINITE,
    VERDICTS,
    Verdict,
    origin_sentence,
    output_layers,
    verdict_over_time,
    verdicts,
)
from gradkernels.layers import kind_of, unwrapped
from gradkernels.preserved import preserved


class Diagnosis:
    """What diagnose found; str() gives the report.

    Attributes:
        layers: a Verdict for each module with parameters of its own that require a gradient and have
            elements, in the order in which the modules ran.
        time_steps: recurrent layer -> the norm of the gradient of its hidden state after each time step, in
            the order in which the steps ran. Of an LSTM the state is h and c.
        cures: the Cures, in the order to try them. loss: the loss of the batch. total_norm: the norm of all
            gradients as one vector.
        origin: the sentence on where nan or inf in the loss or the gradients came from; None if both are
            finite.
        after: with apply=True, the Diagnosis of the copy after the safe cures; else None.
        applied: with apply=True, one line for each cure that was applied to the copy, or the reason why none
            was.
        loss_after_step: in `after`, the loss after one step of SGD; None if no step was made.

    Example:
        >>> import torch, gradkernels as gk
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> batch = torch.randn(32, 8), torch.randint(2, (32,))
        >>> diagnosis = gk.diagnose(model, batch, torch.nn.functional.cross_entropy)
        >>> [(layer.name, layer.verdicts) for layer in diagnosis.layers]
        [('0', ('healthy',)), ('2', ('healthy',))]
    """

    def __init__(self, title: str, probed: Probe) -> None:
        self.title = title
        self.loss, self.total_norm = probed.loss, probed.total_norm
        self.origin = origin_sentence(probed)
        self.layers = verdicts(probed)
        self.time_steps = {time_steps.name: time_steps.norms for time_steps in probed.time_steps}
        self.cures = cures(self.layers, probed)
        self.after: Diagnosis | None = None
        self.applied: list[str] = []
        self.loss_after_step: float | None = None
        self._first, self._last = _ends(self.layers)

    def counts(self) -> dict[str, int]:
        """Return verdict -> number of layers, the worst verdict first."""
        counts = Counter(verdict for layer in self.layers for verdict in layer.verdicts)
        return {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]}

    def first_to_last(self) -> float:
        """Return the gradient norm of the first layer divided by that of the output layer, or nan."""
        if self._first is None or self._last is None or not self._last.gradient:
            return math.nan
        return (self._first.gradient or 0.0) / self._last.gradient

    def headline(self) -> str:
        """Return the first line of the report: the loss if it is not finite, then the layers per verdict."""
        counts = self.counts()
        layers = ", ".join(f"{verdict} {count}" for verdict, count in counts.items()) + f" of {len(self.layers)} layers"
        if math.isfinite(self.loss):
            return layers
        finite = "" if NON_FINITE in counts else "every gradient is finite: "
        return f"the loss is {self.loss:g}; {finite}{layers}"

    def table(self) -> str:
        """Return a table with a line for each layer: norms, output, activation and verdicts."""
        lines = [["layer", "|g|", "|w|", "output std", "activation", "units off", "flat", "verdict"]]
        for judged in self.layers:
            layer = judged.layer
            figures = [text.three_digits(value) for value in (layer.gradient, layer.weight, layer.output_std)]
            shares = ["-" if share is None else f"{share:.0%}" for share in (layer.dead, layer.saturated)]
            lines.append([judged.name, *figures, layer.act or "-", *shares, ", ".join(judged.verdicts)])
        return "\n".join(text.columns(lines, left=(0, 4, 7)))

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.headline()}"]
        if self.origin is not None:
            lines.append(self.origin)
        lines.append(f"loss {self.loss:.4g}, total gradient norm {self.total_norm:.4g}")
        if self._first is not None and self._last is not None:
            ends = (self._first, self._last)
            lines.append(text.first_to_last({layer.name: layer.gradient for layer in ends if layer.gradient is not None}))
        lines += ["", self.table()]
        if self.time_steps:
            lines += ["", *text.columns(self._rows_over_time(), left=(0, 5))]
        reasons = self._reasons()
        if reasons:
            lines += ["", "why", *reasons]
        if self.cures:
            lines += ["", "cures, in the order to try them"]
            for number, cure in enumerate(self.cures, start=1):
                lines += [f"{number:>3}. {cure.name}{' (safe)' if cure.safe else ''}: {cure.why}", f"         {cure.line}"]
        if self.after is not None:
            lines += ["", "the safe cures, applied to a copy", *(f"  {line}" for line in self.applied), *self._before_and_after(self.after)]
        elif self.applied:
            lines += ["", *self.applied]
        return "\n".join(lines)

    def _rows_over_time(self) -> list[Sequence[str]]:
        rows: list[Sequence[str]] = [("hidden state", "time steps", "first |g|", "last |g|", "first / last", "verdict")]
        for name, norms in self.time_steps.items():
            first, last = norms[0], next(norm for norm in reversed(norms) if norm)
            figures = [text.three_digits(value) for value in (first, last, first / last)]
            rows.append((name, str(len(norms)), *figures, verdict_over_time(norms)))
        return rows

    def _reasons(self) -> list[str]:
        """One line for all layers with the same verdicts, with the reason of the first of them."""
        groups: dict[tuple[str, ...], list[Verdict]] = {}
        for judged in self.layers:
            if judged.verdicts != (HEALTHY,):
                groups.setdefault(judged.verdicts, []).append(judged)
        return [
            f"  {text.first_names([judged.name for judged in group])}: {group[0].why}"
            + (f" (figures of {group[0].name})" if len(group) > 1 else "")
            for group in groups.values()
        ]

    def _before_and_after(self, after: Diagnosis) -> list[str]:
        rows = [
            ("", "before", "after"),
            ("first / last layer", f"{self.first_to_last():.2g}", f"{after.first_to_last():.2g}"),
            ("total gradient norm", f"{self.total_norm:.3g}", f"{after.total_norm:.3g}"),
            (
                "healthy layers",
                f"{self.counts().get(HEALTHY, 0)} of {len(self.layers)}",
                f"{after.counts().get(HEALTHY, 0)} of {len(after.layers)}",
            ),
            ("loss", f"{self.loss:.4g}", f"{after.loss:.4g}"),
        ]
        if after.loss_after_step is not None:
            rows.append(("loss after one step of SGD", "", f"{after.loss_after_step:.4g}"))
        return [f"  {line}" for line in text.columns(rows)]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists, strings and numbers, as json takes them."""
        return {
            "loss": self.loss,
            "total_norm": self.total_norm,
            "origin": self.origin,
            "layers": [
                {"name": judged.name, "kind": judged.kind, "verdicts": list(judged.verdicts), "why": judged.why, **judged.figures()}
                for judged in self.layers
            ],
            "time_steps": {name: list(norms) for name, norms in self.time_steps.items()},
            "cures": [cure._asdict() for cure in self.cures],
            "applied": list(self.applied),
            "after": None if self.after is None else self.after.to_dict(),
        }

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the gradient norm of every layer over depth, in the colour of its verdict, next to the cures.

        Of a model with recurrent layers, a second picture below shows the gradient norm of the hidden states
        over the time steps.

        Args:
            path: the file to write: .png, .pdf or .svg.

        Raises:
            ImportError: matplotlib is not installed.
        """
        after = None
        if self.after is not None:
            norms = {judged.name: judged.layer.gradient for judged in self.after.layers}
            after = [norms[judged.name] for judged in self.layers]
        remarks = [self.headline(), f"loss {self.loss:.4g}", *([self.origin] if self.origin else [])]
        for number, cure in enumerate(self.cures, start=1):
            remarks += ["", f"{number}. {cure.name}{' (safe)' if cure.safe else ''}: {cure.why}", f"    {cure.line.partition('    #')[0]}"]
        plots.verdicts(
            path,
            f"{self.title}: gradient of every layer, first layer at the top",
            [(judged.name, judged.verdicts[0]) for judged in self.layers],
            [any(parameter.dim() > 1 for parameter in judged.layer.module.parameters(recurse=False)) for judged in self.layers],
            [judged.layer.gradient for judged in self.layers],
            after,
            remarks,
            [(name, verdict_over_time(norms), norms) for name, norms in self.time_steps.items()],
        )


def _ends(layers: list[Verdict]) -> tuple[Layer | None, Layer | None]:
    """The first layer with a gradient, and the output layer that this gradient came through.

    If it came through several output layers, the one with the largest gradient counts.
    """
    first = next((judged.layer for judged in layers if judged.layer.gradient is not None), None)
    if first is None or not first.layers_after:
        return first, None
    return first, max(output_layers(first), key=lambda layer: layer.gradient or 0.0, default=None)


def diagnose(model: nn.Module, batch: tuple[Any, Any], loss_fn: Callable[[Any, Any], Any], *, apply: bool = False) -> Diagnosis:
    """Find out from one forward and one backward pass which layers do not learn, why, and what to do.

        non-finite          nan or inf in the loss or a gradient, and in the output or gradient of this layer
        dead                more than 2/3 of the units of a relu are 0 for every one of at least 16 values
        saturated           more than 1/2 of the outputs of an activation lie where its slope is below 0.1
                            times its steepest slope
        exploding           |g| > 100 |w|, or |g| > 1e3 times that of the output layer
        vanishing           |g| < 1e-3 times the largest |g| closer to the loss (except for a normalisation),
                            or |g| < 1e-7 |w|
        badly initialised   all weights are equal, or the weight multiplies both the signal and its gradient
                            by less than 0.25, or both by more than 2.5
        BN with tiny batch  batch statistics of fewer than 4 samples, or fewer than 16 values per channel
        no gradient         never called, or the loss does not depend on it
        healthy             none of these

    g is the gradient of a layer and w its weight. The layers closer to the loss are those that g came through
    on its way back, in whatever order they ran. If it came through several output layers, the one with the
    largest gradient counts.

    A weight keeps the size of the signal at a standard deviation of gain / sqrt(inputs summed), and the size
    of the gradient at gain / sqrt(outputs entered). So the initialisations of He, Xavier, LeCun and torch are
    healthy in every shape. Weights before a normalisation are not judged by their size, nor are small weights
    that a residual connection skips. An output layer is badly initialised only if it multiplies the signal by
    more than 2.5.

    Layers of a residual branch that ends in factors up to 1e-3, as zero gammas and LayerScale do, are not
    vanishing: the branch opens as it learns. nan and inf that reach neither the loss nor a gradient, such as
    the -inf of an attention mask, are ignored.

    A recurrent layer is one layer. What happens between its time steps is shown below the table: the norm of
    the gradient of the hidden state after each step. It is vanishing over time if that of the first step is
    below 1e-3 times the largest one, and exploding over time if it is above 1e3 times that of the last step.
    Observed are torch's RNN, LSTM and GRU, whose steps are computed one by one for this, their cells, and any
    module with a matrix as parameter that is called 3 times or more and each time depends on its last output.
    If the loss reads every step and not only the last ones, the gradient of a state includes that of its own
    step.

    Afterwards the model, its gradients, running statistics, buffers, training flags and hooks, the batch, and
    the random numbers of torch, Python and numpy are as before, also after an exception. A model in
    evaluation mode is observed in training mode.

    Args:
        model: a model with parameters that require a gradient, on any device.
        batch: (inputs, targets), for loss_fn(model(inputs), targets), on the device of the model.
        loss_fn: returns the loss as a tensor of one element, such as torch.nn.functional.cross_entropy.
        apply: whether to apply the safe cures (initialisation, clipping, learning rate) to a copy and to show
            the figures before and after.

    Returns:
        A Diagnosis.

    Raises:
        TypeError: model is not a torch.nn.Module, or holds a torch.jit.ScriptModule; batch is not a pair;
            loss_fn cannot be called; or the loss is not a tensor of real numbers.
        ValueError: batch is empty or does not have two entries; no parameter requires a gradient; a parameter
            has no values; or the loss is not one number.
        RuntimeError: the loss does not depend on a parameter.

    Source: Glorot, Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010;
    He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", 2015; Pascanu, Mikolov, Bengio, "On the difficulty of
    training recurrent neural networks", 2013.

    Example:
        >>> import torch, gradkernels as gk
        >>> layers = [layer for _ in range(12) for layer in (torch.nn.Linear(16, 16), torch.nn.Sigmoid())]
        >>> model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 2))
        >>> batch = torch.randn(64, 16), torch.randint(2, (64,))
        >>> diagnosis = gk.diagnose(model, batch, torch.nn.functional.cross_entropy)
        >>> diagnosis.layers[0].verdicts, diagnosis.cures[0].name
        (('vanishing',), 'activation')
    """
    title = type(unwrapped(model)).__name__
    _check_arguments(batch, loss_fn)
    inputs, targets = batch
    diagnosis = Diagnosis(title, probe(model, inputs, targets, loss_fn))
    if apply:
        _apply(diagnosis, model, inputs, targets, loss_fn)
    return diagnosis


def _check_arguments(batch: object, loss_fn: object) -> None:
    pair = "batch must be a pair (inputs, targets), for loss_fn(model(inputs), targets), not"
    if not isinstance(batch, tuple | list):
        raise TypeError(f"{pair} {kind_of(batch)}")
    if len(batch) != 2:
        raise ValueError(f"{pair} a {type(batch).__name__} of {len(batch)}")
    if isinstance(loss_fn, type) or not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of the model's outputs and the targets, not {kind_of(loss_fn)}")
    if batch[0] is None or isinstance(batch[0], bool | int | float | complex):
        raise TypeError(f"the inputs in batch must be a tensor, or something that holds tensors, not {kind_of(batch[0])}")
    tensors = [leaf for leaf in tree_leaves(batch[0]) if isinstance(leaf, Tensor)]
    if tensors and not any(leaf.numel() for leaf in tensors):
        raise ValueError(f"batch is empty: its inputs have the shape {tuple(tensors[0].shape)}")


def _apply(before: Diagnosis, model: nn.Module, inputs: Any, targets: Any, loss_fn: Callable[[Any, Any], Any]) -> None:
    """Apply the safe cures to a copy, and add to `before` what was done and the diagnosis of the copy."""
    safe = [cure.name for cure in before.cures if cure.safe]
    if not safe:
        before.applied += ["none of the cures is safe to try"] if before.cures else []
        return
    with torch.inference_mode(False), torch.enable_grad(), preserved(model, inputs, targets):
        try:
            trial = copy.deepcopy(unwrapped(model))
        except Exception as error:
            # An attribute may hold anything: a tensor computed from others, a lock, an open file.
            reason = textwrap.shorten(f"{type(error).__name__}, {error}", 150, placeholder=" ...")
            before.applied.append(f"the safe cures were not tried, because {before.title} cannot be copied: {reason}")
            return
        if INITIALISATION in safe:
            before.applied.append(f"gk.init.apply_(model): {_initialise_(trial)}")
        probed = probe(trial, inputs, targets, loss_fn)
        before.after = Diagnosis(before.title, probed)
        coefficient = clip_coefficient(probed.total_norm) if CLIPPING in safe else 1.0
        if CLIPPING in safe:
            norms = f"{probed.total_norm:.3g} becomes {probed.total_norm * coefficient:.3g}"
            before.applied.append(f"gk.clip_grad_norm_(model, max_norm={MAX_NORM}): {norms}")
        rate = learning_rate(before.after.layers, coefficient)
        if LEARNING_RATE in safe and rate is not None and math.isfinite(probed.total_norm):
            before.applied.append(f"torch.optim.SGD(model.parameters(), lr={rate:g})")
            if not trial.training:
                trial.train()
            parameters = [parameter for parameter in trial.parameters() if parameter.requires_grad]
            grads = torch.autograd.grad(loss_fn(trial(inputs), targets), parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, grad in zip(parameters, grads, strict=True):
                    if grad is not None:
                        parameter.sub_(grad, alpha=rate * coefficient)
            before.after.loss_after_step = probe(trial, inputs, targets, loss_fn).loss


def _initialise_(trial: nn.Module) -> str:
    """Initialise the copy, and return which scheme was used for how many layers."""
    try:
        counts = Counter(layer.scheme for layer in init.apply_(trial).layers)
    except ValueError as error:
        return str(error)
    return ", ".join(f"{scheme} for {count}" for scheme, count in counts.items()) + " layers"
