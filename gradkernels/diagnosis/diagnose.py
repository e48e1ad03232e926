"""diagnose: a verdict for every layer of a model after one step, what it rests on, and the cures in the order in which to try them.

The figures come from probe.py, the verdicts from verdicts.py and the cures from cures.py; here they are put together for a person, and the
safe cures are tried on a copy.
"""

from __future__ import annotations

import copy
import math
import textwrap
from collections import Counter
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradkernels import init, text
from gradkernels.diagnosis import plots
from gradkernels.diagnosis.cures import CLIPPING, INITIALISATION, LEARNING_RATE, MAX_NORM, clipped, cures, learning_rate
from gradkernels.diagnosis.probe import Layer, Probe, probe
from gradkernels.diagnosis.verdicts import HEALTHY, NON_FINITE, VERDICTS, Verdict, origin_sentence, output_layers, verdicts
from gradkernels.layers import kind_of, unwrapped
from gradkernels.preserved import preserved


class Diagnosis:
    """What diagnose found; str() is for a person.

    Attributes:
        layers: a Verdict for each module with parameters of its own that require a gradient and have elements, in the order in
            which they ran.
        cures: the Cures, the one to try first at the top.
        loss: of the batch.
        total_norm: of all gradients as one vector.
        origin: the sentence on where nan or inf in the loss or the gradients began; None where both are finite.
        after: with apply=True, the Diagnosis of the copy with the safe cures; else None.
        applied: with apply=True, what was done to the copy.

    Example:
        >>> import torch, gradkernels as gk
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> batch = torch.randn(32, 8), torch.randint(2, (32,))
        >>> diagnosis = gk.diagnose(model, batch, torch.nn.functional.cross_entropy)
        >>> [(layer.name, layer.verdicts) for layer in diagnosis.layers]
        [('0', ('healthy',)), ('2', ('healthy',))]
    """

    def __init__(self, title: str, found: Probe) -> None:
        self.title = title
        self.loss, self.total_norm = found.loss, found.total_norm
        self.origin = origin_sentence(found)
        self.layers = verdicts(found)
        self.cures = cures(self.layers, found)
        self.after: Diagnosis | None = None
        self.applied: list[str] = []
        self.loss_after_step: float | None = None
        self._first, self._last = _ends(self.layers)

    def counts(self) -> dict[str, int]:
        """Verdict -> number of layers, the worst first."""
        counts = Counter(verdict for layer in self.layers for verdict in layer.verdicts)
        return {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]}

    def first_to_last(self) -> float:
        """The gradient norm of the first layer over that of the output layer it came through; nan where there are no two."""
        if self._first is None or self._last is None or not self._last.gradient:
            return math.nan
        return (self._first.gradient or 0.0) / self._last.gradient

    def headline(self) -> str:
        """What is to be known first: a loss that is not finite, then how many layers have which verdict."""
        counts = self.counts()
        layers = ", ".join(f"{verdict} {count}" for verdict, count in counts.items()) + f" of {len(self.layers)} layers"
        if math.isfinite(self.loss):
            return layers
        finite = "" if NON_FINITE in counts else "every gradient is finite: "
        return f"the loss is {self.loss:g}; {finite}{layers}"

    def table(self) -> str:
        """A line for each layer: gradient, weight, output, activation, verdict."""
        lines = [["layer", "|g|", "|w|", "output std", "activation", "units off", "flat", "verdict"]]
        for each in self.layers:
            layer = each.layer
            figures = [text.three_digits(value) for value in (layer.gradient, layer.weight, layer.output_std)]
            shares = ["-" if share is None else f"{share:.0%}" for share in (layer.dead, layer.saturated)]
            lines.append([each.name, *figures, layer.act or "-", *shares, ", ".join(each.verdicts)])
        return "\n".join(text.columns(lines, left=(0, 4, 7)))

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.headline()}"]
        if self.origin is not None:
            lines.append(self.origin)
        lines.append(f"loss {self.loss:.4g}, gradient of all layers together {self.total_norm:.4g}")
        if self._first is not None and self._last is not None:
            ends = (self._first, self._last)
            lines.append(text.first_to_last({layer.name: layer.gradient for layer in ends if layer.gradient is not None}))
        lines += ["", self.table()]
        reasons = self._reasons()
        if reasons:
            lines += ["", "why", *reasons]
        if self.cures:
            lines += ["", "cures, the first to try at the top"]
            for number, cure in enumerate(self.cures, start=1):
                lines += [f"{number:>3}. {cure.name}{' (safe)' if cure.safe else ''}: {cure.why}", f"         {cure.line}"]
        if self.after is not None:
            lines += ["", "the safe cures, applied to a copy", *(f"  {line}" for line in self.applied), *self._before_and_after(self.after)]
        elif self.applied:
            lines += ["", *self.applied]
        return "\n".join(lines)

    def _reasons(self) -> list[str]:
        """One line for all layers with the same verdict: the reason of the first of them."""
        alike: dict[tuple[str, ...], list[Verdict]] = {}
        for each in self.layers:
            if each.verdicts != (HEALTHY,):
                alike.setdefault(each.verdicts, []).append(each)
        return [
            f"  {text.some([each.name for each in group])}: {group[0].why}{f' (that is {group[0].name})' if len(group) > 1 else ''}"
            for group in alike.values()
        ]

    def _before_and_after(self, after: Diagnosis) -> list[str]:
        rows = [
            ("", "before", "after"),
            ("first / last layer", f"{self.first_to_last():.2g}", f"{after.first_to_last():.2g}"),
            ("gradient of all layers", f"{self.total_norm:.3g}", f"{after.total_norm:.3g}"),
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
        """Everything as lists and numbers that json takes."""
        return {
            "loss": self.loss,
            "total_norm": self.total_norm,
            "origin": self.origin,
            "layers": [
                {"name": each.name, "kind": each.kind, "verdicts": list(each.verdicts), "why": each.why, **each.figures()}
                for each in self.layers
            ],
            "cures": [cure._asdict() for cure in self.cures],
            "applied": list(self.applied),
            "after": None if self.after is None else self.after.to_dict(),
        }

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the gradient norm of every layer over depth, in the colour of its verdict, beside the cures.

        Args:
            path: the file to write, .png, .pdf or .svg.

        Raises:
            ImportError: matplotlib is not installed.
        """
        after = None
        if self.after is not None:
            norms = {each.name: each.layer.gradient for each in self.after.layers}
            after = [norms[each.name] for each in self.layers]
        remarks = [self.headline(), f"loss {self.loss:.4g}", *([self.origin] if self.origin else [])]
        for number, cure in enumerate(self.cures, start=1):
            remarks += ["", f"{number}. {cure.name}{' (safe)' if cure.safe else ''}: {cure.why}", f"    {cure.line.partition('    #')[0]}"]
        plots.verdicts(
            path,
            f"{self.title}: gradient of every layer, first layer at the top",
            [(each.name, each.verdicts[0]) for each in self.layers],
            [any(parameter.dim() > 1 for parameter in each.layer.module.parameters(recurse=False)) for each in self.layers],
            [each.layer.gradient for each in self.layers],
            after,
            remarks,
        )


def _ends(layers: list[Verdict]) -> tuple[Layer | None, Layer | None]:
    """The first layer with a gradient, and of the output layers that this came through the one with the largest."""
    first = next((each.layer for each in layers if each.layer.gradient is not None), None)
    if first is None or not first.behind:
        return first, None
    return first, max(output_layers(first), key=lambda layer: layer.gradient or 0.0, default=None)


def diagnose(model: nn.Module, batch: tuple[Any, Any], loss_fn: Callable[[Any, Any], Any], *, apply: bool = False) -> Diagnosis:
    """Find out from one forward and one backward pass which layers do not learn, why, and what to do.

        non-finite          the loss or a gradient holds nan or inf, and so does this layer's output or gradient; what made it is named
        dead                more than two thirds of the units of a relu pass nothing on, whatever the sample
        saturated           more than half of the outputs of an activation lie where its slope is below a tenth of its steepest
        exploding           |g| > 100 |w|, or |g| > 1e3 times that of the output layer
        vanishing           |g| < 1e-3 of the largest |g| nearer the loss (no normalisation), or |g| < 1e-7 |w|
        badly initialised   all weights equal, or of a deviation that multiplies both the signal and its gradient by less than 1/4 or by
                            more than 5/2; an output layer the signal by more than 5/2
        BN with tiny batch  statistics of fewer than 4 samples, or fewer than 16 values to a channel
        no gradient         never called, or the loss does not depend on it
        healthy             none of these

    g and w are the gradient and the weights of a layer. Nearer the loss are those that g came through on its way back, wherever they
    run; of several heads the output layer is the one with the largest gradient. A weight keeps the signal at gain / sqrt(inputs summed)
    and its gradient at gain / sqrt(outputs entered), so that He's, Xavier's, LeCun's and torch's initialisation are all healthy
    whatever the shape; a weight that is too small is healthy too where a residual connection goes around it, and so is any before a
    normalisation. So are all layers of a residual branch whose last factors are 0 or next to it (up to 1e-3), as zero gammas and
    LayerScale begin: it opens as it learns. nan and inf that reach neither the loss nor a gradient, such as the -inf of an attention
    mask, are not mentioned. A recurrent layer is one layer: what vanishes between its steps is not seen.

    The model, its gradients, running statistics, buffers, training flags and hooks, the batch, and the random numbers of torch,
    Python and numpy are afterwards as they were, also where this raises. A model in evaluation is looked at in training mode.

    Args:
        model: with parameters that require a gradient; on any device.
        batch: (inputs, targets), for loss_fn(model(inputs), targets); where the model is.
        loss_fn: returns one number as a tensor, such as torch.nn.functional.cross_entropy.
        apply: apply the cures that are safe (initialisation, clipping, learning rate) to a copy, and show before and after.

    Returns:
        A Diagnosis.

    Raises:
        TypeError: model is no torch.nn.Module or holds a torch.jit.ScriptModule; batch is no pair; loss_fn cannot be called; the loss is
            no tensor of real numbers.
        ValueError: batch is empty or has not two entries; no parameter requires a gradient, or one has no values; the loss is not one
            number.
        RuntimeError: the loss does not depend on a parameter.

    Source: Glorot, Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010; He, Zhang, Ren,
    Sun, "Delving Deep into Rectifiers", 2015; Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
    networks", 2013.

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
    _check(batch, loss_fn)
    inputs, targets = batch
    diagnosis = Diagnosis(title, probe(model, inputs, targets, loss_fn))
    if apply:
        _apply(diagnosis, model, inputs, targets, loss_fn)
    return diagnosis


def _check(batch: object, loss_fn: object) -> None:
    pair = "batch is the pair (inputs, targets), for loss_fn(model(inputs), targets), not"
    if not isinstance(batch, tuple | list):
        raise TypeError(f"{pair} {kind_of(batch)}")
    if len(batch) != 2:
        raise ValueError(f"{pair} a {type(batch).__name__} of {len(batch)}")
    if isinstance(loss_fn, type) or not callable(loss_fn):
        raise TypeError(f"loss_fn is a function of the model's outputs and the targets, not {kind_of(loss_fn)}")
    if batch[0] is None or isinstance(batch[0], bool | int | float | complex):
        raise TypeError(f"the inputs of batch are a tensor, or something that holds tensors, not {kind_of(batch[0])}")
    tensors = [leaf for leaf in tree_leaves(batch[0]) if isinstance(leaf, Tensor)]
    if tensors and not any(leaf.numel() for leaf in tensors):
        raise ValueError(f"batch is empty: its inputs have the shape {tuple(tensors[0].shape)}")


def _apply(before: Diagnosis, model: nn.Module, inputs: Any, targets: Any, loss_fn: Callable[[Any, Any], Any]) -> None:
    """Puts into `before` what was done to a copy and what came of it."""
    safe = [cure.name for cure in before.cures if cure.safe]
    if not safe:
        before.applied += ["none of the cures is safe to try"] if before.cures else []
        return
    with torch.inference_mode(False), torch.enable_grad(), preserved(model, inputs, targets):
        try:
            trial = copy.deepcopy(unwrapped(model))
        except Exception as error:
            # A tensor computed from others, a lock, an open file: whatever an attribute may hold.
            reason = textwrap.shorten(f"{type(error).__name__}, {error}", 150, placeholder=" ...")
            before.applied.append(f"the safe cures were not tried, since {before.title} cannot be copied: {reason}")
            return
        if INITIALISATION in safe:
            before.applied.append(f"gk.init.apply_(model): {_initialise_(trial)}")
        found = probe(trial, inputs, targets, loss_fn)
        before.after = Diagnosis(before.title, found)
        shortened = clipped(found.total_norm) if CLIPPING in safe else 1.0
        if CLIPPING in safe:
            words = f"{found.total_norm:.3g} becomes {found.total_norm * shortened:.3g}"
            before.applied.append(f"gk.clip_grad_norm_(model, max_norm={MAX_NORM}): {words}")
        rate = learning_rate(before.after.layers, shortened)
        if LEARNING_RATE in safe and rate is not None and math.isfinite(found.total_norm):
            before.applied.append(f"torch.optim.SGD(model.parameters(), lr={rate:g})")
            if not trial.training:
                trial.train()
            parameters = [parameter for parameter in trial.parameters() if parameter.requires_grad]
            grads = torch.autograd.grad(loss_fn(trial(inputs), targets), parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, grad in zip(parameters, grads, strict=True):
                    if grad is not None:
                        parameter.sub_(grad, alpha=rate * shortened)
            before.after.loss_after_step = probe(trial, inputs, targets, loss_fn).loss


def _initialise_(trial: nn.Module) -> str:
    try:
        counts = Counter(each.scheme for each in init.apply_(trial).layers)
    except ValueError as error:
        return str(error)
    return ", ".join(f"{scheme} for {count}" for scheme, count in counts.items()) + " layers"
