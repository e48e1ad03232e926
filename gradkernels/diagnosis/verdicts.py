"""The verdict on every layer: thresholds, each with its reason, and the sentence with the figures behind it."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from gradkernels.diagnosis.probe import SATURATED_SLOPE, Layer, Probe
from gradkernels.init.fill import expected_std
from gradkernels.layers import NORMS, WEIGHTS

# A gradient below this share of the largest one that it came through: with one learning rate for all, this layer takes 1,000 steps for one.
VANISHING_SHARE = 1e-3
# Or so small beside its weight that float32 loses the update even with a learning rate of 1.
VANISHING_RATIO = 1e-7
# A gradient this many times as large as its weight: a learning rate of 0.01 writes a new weight.
EXPLODING_RATIO = 100.0
# Or this many times that of the output layer that it came through, the largest where there are several heads.
EXPLODING_SHARE = 1e3
# Factors up to this at the end of a residual branch are a branch that begins as next to nothing and opens as it learns: 0 (Goyal et al.,
# "Accurate, Large Minibatch SGD", 2017), 1e-6 to 1e-4 (Touvron et al., "Going deeper with Image Transformers", 2021).
SHUT = 1e-3
# The share of units (dead) or outputs (saturated) above which a layer is called so. Deep relu networks lose up to half of their units by
# chance. A unit that is off for half of all inputs looks dead in one of 2^16 batches of 16, the fewest that are judged by.
DEAD_SHARE = 2 / 3
SATURATED_SHARE = 0.5
LEAST_SAMPLES = 16
# What a weight multiplies the size of a signal by on the way forward, and that of its gradient on the way back; 1 keeps it. Every known
# scheme keeps at least one of the two: He and LeCun either, Xavier both where they can be had together, torch's default 0.31 (sigmoid) to
# 0.58 of the former. So a weight is too small or too large only if it is so for both.
LEAST_SCALE, MOST_SCALE = 0.25, 2.5
# Batch statistics of fewer images or fewer values to a channel are noise (Wu, He, "Group Normalization", 2018, figure 1).
LEAST_BATCH, LEAST_BATCH_VALUES = 4, 16

NON_FINITE, BADLY_INITIALISED, DEAD, SATURATED = "non-finite", "badly initialised", "dead", "saturated"
EXPLODING, VANISHING, TINY_BATCH, NO_GRADIENT, HEALTHY = "exploding", "vanishing", "BN with tiny batch", "no gradient", "healthy"
# The worst first, causes before what they cause.
VERDICTS = (NON_FINITE, DEAD, SATURATED, EXPLODING, VANISHING, BADLY_INITIALISED, TINY_BATCH, NO_GRADIENT, HEALTHY)


@dataclass(frozen=True)
class Verdict:
    """Of one layer: the words, worst first, the sentence behind them and the figures."""

    name: str
    kind: str
    verdicts: tuple[str, ...]
    why: str
    layer: Layer

    def figures(self) -> dict[str, float | int | str | None]:
        """gradient_norm, weight_norm, output_std, activation, dead, saturated; None where there was nothing to see."""
        layer = self.layer
        return {
            "gradient_norm": layer.gradient,
            "weight_norm": layer.weight,
            "output_std": layer.output_std,
            "activation": layer.act,
            "dead": layer.dead,
            "saturated": layer.saturated,
        }


def verdicts(found: Probe) -> list[Verdict]:
    judged = []
    closed = [layer for layer in found.layers if _is_closed(layer, found.layers)]
    for layer in found.layers:
        reasons: dict[str, str] = {}
        for judge in (_switched_off, _flat, _few_samples):
            reasons |= judge(layer)
        reasons |= _scale(layer, layer in closed)
        if not found.finite:
            reasons |= _not_finite(layer)
        if layer.gradient is None:
            reasons[NO_GRADIENT] = "never called" if not layer.called else "the loss does not depend on it"
        elif NON_FINITE not in reasons:
            layer.closed_by = next((each.name for each in closed if each in layer.behind), None)
            reasons |= _flow(layer, _begins_shut(layer, found.layers))
        words = tuple(word for word in VERDICTS if word in reasons) or (HEALTHY,)
        why = "; ".join(reasons[word] for word in words if word in reasons)
        judged.append(Verdict(layer.name, type(layer.module).__name__, words, why, layer))
    return judged


def output_layers(layer: Layer) -> list[Layer]:
    """Of the layers that its gradient came through, those that it came through first; itself where there are none."""
    return [each for each in layer.behind if not each.behind] or ([] if layer.behind else [layer])


def _not_finite(layer: Layer) -> dict[str, str]:
    where = [] if layer.finite else ["its output"]
    if layer.nonfinite:
        where.append(f"{layer.nonfinite} elements of its gradient")
    return {NON_FINITE: f"{' and '.join(where)} not finite"} if where else {}


def is_shut(layer: Layer) -> bool:
    """Whether all its factors are next to nothing; its first step writes them anew, so that their size says nothing."""
    factors = [parameter for name, parameter in layer.module.named_parameters(recurse=False) if name != "bias" and parameter.numel()]
    return bool(factors and layer.gradient) and all(bool((factor.detach().abs() <= SHUT).all()) for factor in factors)


def _begins_shut(layer: Layer, layers: list[Layer]) -> bool:
    """Whether it lies on a residual branch that is shut at its end, by a layer or by a parameter of the module that holds the branch."""
    # What an output layer goes to is not the sum that a branch ends in.
    ends = [each for each in layer.through if each.around and each.behind]
    holders = [each for each in layers if layer.around and layer.name.startswith(f"{each.name}.")]
    return any(is_shut(each) for each in (*ends, *holders))


def _flow(layer: Layer, begins_shut: bool) -> dict[str, str]:
    gradient = layer.gradient or 0.0
    # The scale of a normalisation is often taken away by the next one, so that its gradient is small in the best of networks.
    behind = [] if isinstance(layer.module, NORMS) else layer.behind
    largest = max((each.gradient for each in behind if each.gradient and math.isfinite(each.gradient)), default=0.0)
    nearest = max((each.gradient for each in output_layers(layer) if each.gradient), default=math.nan)
    if layer.weight and gradient > EXPLODING_RATIO * layer.weight and not is_shut(layer):
        return {EXPLODING: f"gradient {gradient / layer.weight:.2g} times as large as its weight"}
    if gradient > EXPLODING_SHARE * nearest:
        return {EXPLODING: f"gradient {gradient / nearest:.2g} times that of the layer nearest the loss"}
    if begins_shut:
        return {}
    if gradient == 0:
        off = next((each.name for each in layer.through if each.dead == 1), None)
        if layer.closed_by:
            return {VANISHING: f"gradient exactly 0, as the weights of {layer.closed_by}, until its first step"}
        return {VANISHING: "gradient exactly 0" + (f", as all units of {off} are off" if off else "")}
    if gradient < VANISHING_SHARE * largest:
        return {VANISHING: f"gradient {gradient / largest:.2g} times the largest nearer the loss"}
    if gradient < VANISHING_RATIO * layer.weight:
        return {VANISHING: f"gradient {gradient / layer.weight:.2g} times its weight, less than float32 adds"}
    return {}


def _switched_off(layer: Layer) -> dict[str, str]:
    if layer.dead is None or layer.samples < LEAST_SAMPLES or layer.dead <= DEAD_SHARE:
        return {}
    return {DEAD: f"{layer.dead:.0%} of the units behind {layer.act} are 0 for all {layer.samples} values"}


def _flat(layer: Layer) -> dict[str, str]:
    if layer.saturated is None or layer.saturated <= SATURATED_SHARE or layer.gated:
        return {}
    return {
        SATURATED: f"{layer.saturated:.0%} of the outputs of {layer.act} lie where its slope is below {SATURATED_SLOPE:g} of its steepest"
    }


def _few_samples(layer: Layer) -> dict[str, str]:
    if layer.batch is None or not layer.batch_statistics or enough_for_statistics(layer.batch):
        return {}
    return {TINY_BATCH: f"statistics of {layer.batch[0]} samples, {layer.batch[1]} values to a channel"}


def enough_for_statistics(batch: tuple[int, int]) -> bool:
    """Whether so many samples and values to a channel have a mean and a deviation to go by."""
    return batch[0] >= LEAST_BATCH and batch[1] >= LEAST_BATCH_VALUES


def _is_closed(layer: Layer, layers: list[Layer]) -> bool:
    """Whether all its weights are 0 and so no gradient gets to any layer before it.

    Zeros are at home at the end of a residual branch, which the gradient goes around, and where nothing before them is to learn.
    """
    module = _weighted(layer)
    if module is None or layer.around or bool(module.weight.detach().any()):
        return False
    return any(layer in other.behind for other in layers)


def _weighted(layer: Layer) -> nn.Linear | nn.modules.conv._ConvNd | None:
    """A linear or convolutional layer whose weight has a scale to speak of."""
    module = layer.module
    if not isinstance(module, WEIGHTS) or not isinstance(module.weight, nn.Parameter) or module.weight.numel() < 2:
        return None
    return module


def _scale(layer: Layer, closed: bool) -> dict[str, str]:
    module = _weighted(layer)
    if module is None:
        return {}
    weight = module.weight
    with torch.no_grad():
        std, first = weight.double().std(correction=0).item(), weight.flatten()[0].item()
    if std == 0:
        harmless = not closed if first == 0 else len(weight) == 1
        return {} if harmless else {BADLY_INITIALISED: f"all weights are {first:g}"}
    if layer.normalised:
        return {}
    # Each product that an output sums is one that an input enters.
    forward = std / expected_std(module, layer.act)
    backward = forward * math.sqrt(layer.growth)
    if not layer.behind:
        # Nothing comes after an output layer that small outputs would be too small for; large ones are a large loss, whatever goes back.
        bad = forward > MOST_SCALE
    else:
        # The signal that goes around a small weight keeps its size.
        bad = min(forward, backward) > MOST_SCALE or (max(forward, backward) < LEAST_SCALE and not layer.around)
    if not bad:
        return {}
    factors = f"multiply the signal by {forward:.2g} and its gradient by {backward:.2g}, where 1 keeps them"
    return {BADLY_INITIALISED: f"weights of deviation {std:.2g} before {layer.act or 'a linear output'} {factors}"}


def origin_sentence(found: Probe) -> str | None:
    """Where nan or inf in the loss or the gradients began; None where there is none."""
    if found.finite:
        return None
    if found.origin is None:
        return "where it became so could not be followed"
    phase, operator, where, _ = found.origin
    if phase == "batch":
        return "the batch itself holds nan or inf"
    if phase in ("parameter", "buffer"):
        return f"{phase} {operator} holds nan or inf already"
    if phase == "constant":
        return f"the code itself brings in nan or inf {where}: {operator} was given it"
    return f"non-finite values began {where}: {operator} made them"
