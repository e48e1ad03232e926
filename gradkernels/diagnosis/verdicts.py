"""The verdicts on every layer, each with its reason in figures. The thresholds are in thresholds.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gradkernels import text
from gradkernels.diagnosis.probe import Layer, Probe
from gradkernels.diagnosis.thresholds import (
    DEAD_SHARE,
    EXPLODING_RATIO,
    EXPLODING_SHARE,
    FLAT_SLOPE,
    MAX_SCALE,
    MIN_BATCH,
    MIN_SAMPLES,
    MIN_SCALE,
    MIN_VALUES_PER_CHANNEL,
    NEAR_ZERO,
    SATURATED_SHARE,
    VANISHING_RATIO,
    VANISHING_SHARE,
)
from gradkernels.init.fill import expected_std
from gradkernels.layers import NORMS, WEIGHTS

NON_FINITE, BADLY_INITIALISED, DEAD, SATURATED = "non-finite", "badly initialised", "dead", "saturated"
EXPLODING, VANISHING, TINY_BATCH, NO_GRADIENT, HEALTHY = "exploding", "vanishing", "BN with tiny batch", "no gradient", "healthy"
VANISHING_OVER_TIME, EXPLODING_OVER_TIME = "vanishing over time", "exploding over time"
# The worst first, and causes before their effects.
VERDICTS = (NON_FINITE, DEAD, SATURATED, EXPLODING, VANISHING, BADLY_INITIALISED, TINY_BATCH, NO_GRADIENT, HEALTHY)


@dataclass(frozen=True)
class Verdict:
    """The verdicts on one layer.

    Attributes:
        name: the layer, as in named_modules(); "(model)" for parameters of the model itself.
        kind: the class of the module.
        verdicts: the verdicts, the worst first.
        why: the reasons for the verdicts, with figures.
        layer: everything that was observed of the layer.
    """

    name: str
    kind: str
    verdicts: tuple[str, ...]
    why: str
    layer: Layer

    def figures(self) -> dict[str, float | int | str | None]:
        """Return the figures of the layer by name; None for a figure that was not observed."""
        layer = self.layer
        return {
            "gradient_norm": layer.gradient,
            "weight_norm": layer.weight,
            "output_std": layer.output_std,
            "activation": layer.act,
            "dead": layer.dead,
            "saturated": layer.saturated,
        }


def verdicts(probed: Probe) -> list[Verdict]:
    """Judge every layer."""
    layers = probed.layers
    blocking = [layer for layer in layers if _blocks_gradient(layer, layers)]
    judged = []
    for layer in layers:
        reasons = _dead(layer) | _saturated(layer) | _tiny_batch(layer) | _badly_initialised(layer, layer in blocking)
        if not probed.finite:
            reasons |= _nonfinite(layer)
        if layer.gradient is None:
            reasons[NO_GRADIENT] = "never called" if not layer.called else "the loss does not depend on it"
        elif NON_FINITE not in reasons:
            layer.blocked_by = next((other.name for other in blocking if other in layer.layers_after), None)
            reasons |= _exploding_or_vanishing(layer, _is_on_branch_near_zero(layer, layers))
        names = tuple(verdict for verdict in VERDICTS if verdict in reasons) or (HEALTHY,)
        why = "; ".join(reasons[verdict] for verdict in names if verdict in reasons)
        judged.append(Verdict(layer.name, type(layer.module).__name__, names, why, layer))
    return judged


def verdict_over_time(norms: Sequence[float]) -> str:
    """The verdict on the gradients of hidden states, which flow from the last time step to the first."""
    if not all(map(math.isfinite, norms)):
        return NON_FINITE
    last = next(norm for norm in reversed(norms) if norm)
    if norms[0] > EXPLODING_SHARE * last:
        return EXPLODING_OVER_TIME
    return VANISHING_OVER_TIME if norms[0] < VANISHING_SHARE * max(norms) else HEALTHY


def output_layers(layer: Layer) -> list[Layer]:
    """The output layers that its gradient came through; the layer itself if it is one."""
    return [after for after in layer.layers_after if not after.layers_after] or ([] if layer.layers_after else [layer])


def is_near_zero(layer: Layer) -> bool:
    """Whether all factors of a layer are near zero. The first step overwrites them, whatever their size."""
    factors = [parameter for name, parameter in layer.module.named_parameters(recurse=False) if name != "bias" and parameter.numel()]
    return bool(factors and layer.gradient) and all(bool((factor.detach().abs() <= NEAR_ZERO).all()) for factor in factors)


def has_enough_statistics(batch: tuple[int, int]) -> bool:
    """Whether (samples, values per channel) are enough for a mean and a standard deviation."""
    return batch[0] >= MIN_BATCH and batch[1] >= MIN_VALUES_PER_CHANNEL


# Each of the following returns verdict -> reason, or {}.


def _nonfinite(layer: Layer) -> dict[str, str]:
    places = [] if layer.finite else ["its output"]
    if layer.nonfinite:
        places.append(f"{layer.nonfinite} element{'s' * (layer.nonfinite > 1)} of its gradient")
    return {NON_FINITE: f"nan or inf in {' and in '.join(places)}"} if places else {}


def _dead(layer: Layer) -> dict[str, str]:
    if layer.dead is None or layer.samples < MIN_SAMPLES or layer.dead <= DEAD_SHARE:
        return {}
    return {DEAD: f"{layer.dead:.0%} of the units after {layer.act} are 0 for all {layer.samples} values"}


def _saturated(layer: Layer) -> dict[str, str]:
    if layer.saturated is None or layer.saturated <= SATURATED_SHARE or layer.gated:
        return {}
    reason = f"{layer.saturated:.0%} of the outputs of {layer.act} lie where its slope is below {FLAT_SLOPE:g} times its steepest slope"
    return {SATURATED: reason}


def _exploding_or_vanishing(layer: Layer, is_on_branch_near_zero: bool) -> dict[str, str]:
    gradient = layer.gradient or 0.0
    # A later normalisation often cancels the scale of an earlier one, whose gradient is small then in healthy
    # networks.
    layers_after = [] if isinstance(layer.module, NORMS) else layer.layers_after
    largest = max((other.gradient for other in layers_after if other.gradient and math.isfinite(other.gradient)), default=0.0)
    of_output = max((other.gradient for other in output_layers(layer) if other.gradient), default=math.nan)
    if layer.weight and gradient > EXPLODING_RATIO * layer.weight and not is_near_zero(layer):
        return {EXPLODING: f"gradient {gradient / layer.weight:.2g} times as large as its weight"}
    if gradient > EXPLODING_SHARE * of_output:
        return {EXPLODING: f"gradient {gradient / of_output:.2g} times that of the output layer"}
    if is_on_branch_near_zero:
        return {}
    if gradient == 0:
        dead = next((other.name for other in layer.unavoidable if other.dead == 1), None)
        if layer.blocked_by:
            return {VANISHING: f"gradient exactly 0 until the first step, because all weights of {layer.blocked_by} are 0"}
        return {VANISHING: "gradient exactly 0" + (f", because all units of {dead} are off" if dead else "")}
    if gradient < VANISHING_SHARE * largest:
        return {VANISHING: f"gradient {gradient / largest:.2g} times the largest gradient closer to the loss"}
    if gradient < VANISHING_RATIO * layer.weight:
        return {VANISHING: f"gradient {gradient / layer.weight:.2g} times its weight, an update that float32 loses"}
    return {}


def _badly_initialised(layer: Layer, is_blocking: bool) -> dict[str, str]:
    module = _weighted(layer)
    if module is None:
        return {}
    weight = module.weight
    with torch.no_grad():
        std, first = weight.double().std(correction=0).item(), weight.flatten()[0].item()
    if std == 0:
        is_harmless = not is_blocking if first == 0 else len(weight) == 1
        return {} if is_harmless else {BADLY_INITIALISED: f"all weights are {first:g}"}
    if layer.normalised:
        return {}
    # fan_out = growth * fan_in, because each product has one input and one output.
    forward = std / expected_std(module, layer.act)
    backward = forward * math.sqrt(layer.growth)
    if not layer.layers_after:
        # No layer comes after an output layer, so small outputs do no harm. Large outputs are a large loss.
        is_bad = forward > MAX_SCALE
    else:
        # With a skip connection, small weights do no harm: the signal takes the connection.
        is_bad = min(forward, backward) > MAX_SCALE or (max(forward, backward) < MIN_SCALE and not layer.has_skip)
    if not is_bad:
        return {}
    factors = f"multiply the signal by {forward:.2g} and its gradient by {backward:.2g}, where 1 keeps the size"
    return {BADLY_INITIALISED: f"weights of standard deviation {std:.2g} before {layer.act or 'a linear output'} {factors}"}


def _tiny_batch(layer: Layer) -> dict[str, str]:
    if layer.batch is None or not layer.batch_statistics or has_enough_statistics(layer.batch):
        return {}
    return {TINY_BATCH: f"statistics of {layer.batch[0]} samples, {layer.batch[1]} values per channel"}


def _weighted(layer: Layer) -> nn.Linear | nn.modules.conv._ConvNd | None:
    """The module of a linear or convolutional layer whose weight has a standard deviation."""
    module = layer.module
    if not isinstance(module, WEIGHTS) or not isinstance(module.weight, nn.Parameter) or module.weight.numel() < 2:
        return None
    return module


def _blocks_gradient(layer: Layer, layers: list[Layer]) -> bool:
    """Whether all its weights are 0, so that no layer before it gets a gradient.

    Zero weights are normal at the end of a residual branch, where the gradient takes the skip connection.
    They do no harm if no layer before them learns.
    """
    module = _weighted(layer)
    if module is None or layer.has_skip or bool(module.weight.detach().any()):
        return False
    return any(layer in other.layers_after for other in layers)


def _is_on_branch_near_zero(layer: Layer, layers: list[Layer]) -> bool:
    """Whether the layer is on a residual branch that ends in factors near zero.

    The factors may be those of a layer at the end, or a parameter of the module that holds the branch.
    """
    # An output layer is not the end of a branch, because no sum follows it.
    ends = [other for other in layer.unavoidable if other.has_skip and other.layers_after]
    holders = [other for other in layers if layer.has_skip and layer.name.startswith(f"{other.name}.")]
    return any(is_near_zero(other) for other in (*ends, *holders))


def origin_sentence(probed: Probe) -> str | None:
    """The sentence on where nan or inf in the loss or the gradients came from; None if both are finite."""
    if probed.finite:
        return None
    if probed.origin is None:
        return "where nan or inf came from is unknown"
    phase, operator, where, _, tensors = probed.origin
    if phase == "batch":
        return f"the batch itself holds nan or inf, in {text.first_names(tensors)}"
    if phase in ("parameter", "buffer"):
        return f"{phase} {operator} already holds nan or inf"
    if phase == "constant":
        return f"the code itself passes nan or inf to {operator}, {where}"
    return f"{operator} produced the first nan or inf, {where}"
