"""The verdict on every layer: thresholds, each with its reason, and the sentence with the figures behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gradkernels import init
from gradkernels.probe import SATURATED_SLOPE, Layer, Probe

# A gradient below this share of the largest one nearer the loss: with one learning rate for all, this layer takes 1,000 steps for one.
VANISHING_SHARE = 1e-3
# Or so small beside its weight that float32 loses the update even with a learning rate of 1.
VANISHING_RATIO = 1e-7
# A gradient this many times as large as its weight: a learning rate of 0.01 writes a new weight.
EXPLODING_RATIO = 100.0
# Or this many times that of the layer nearest the loss.
EXPLODING_SHARE = 1e3
# The share of units (dead) or outputs (saturated) above which a layer is called so. Deep relu networks lose up to half of their units by
# chance. A unit that is off for half of all inputs looks dead in one of 2^16 batches of 16, the fewest that are judged by.
DEAD_SHARE = 2 / 3
SATURATED_SHARE = 0.5
LEAST_SAMPLES = 16
# The deviation of a weight over that of the initialisation its activation asks for. torch's own default is at 0.31 (sigmoid) to 0.58.
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
    layers = found.layers
    with_gradient = [layer for layer in layers if layer.gradient is not None]
    last = with_gradient[-1].gradient if with_gradient else None
    largest_behind = 0.0
    earlier_learn = _earlier_learn(layers)
    for layer in reversed(layers):
        reasons: dict[str, str] = {}
        for judge in (_not_finite, _switched_off, _flat, _few_samples):
            reasons |= judge(layer)
        reasons |= _scale(layer, earlier_learn[layer.name])
        if layer.gradient is None:
            reasons[NO_GRADIENT] = "never called" if not layer.called else "the loss does not depend on it"
        elif NON_FINITE not in reasons:
            reasons |= _flow(layer, largest_behind, last)
            largest_behind = max(largest_behind, layer.gradient)
        words = tuple(word for word in VERDICTS if word in reasons) or (HEALTHY,)
        why = "; ".join(reasons[word] for word in words if word in reasons)
        judged.append(Verdict(layer.name, type(layer.module).__name__, words, why, layer))
    return judged[::-1]


def _earlier_learn(layers: Sequence[Layer]) -> dict[str, bool]:
    """Whether any layer before this one has a gradient that is not 0; true of the first one."""
    learn, found = not layers, {}
    for number, layer in enumerate(layers):
        found[layer.name] = learn or number == 0
        learn = learn or bool(layer.gradient)
    return found


def _not_finite(layer: Layer) -> dict[str, str]:
    where = [] if layer.finite else ["its output"]
    if layer.nonfinite:
        where.append(f"{layer.nonfinite} elements of its gradient")
    return {NON_FINITE: f"{' and '.join(where)} not finite"} if where else {}


def _flow(layer: Layer, largest_behind: float, last: float | None) -> dict[str, str]:
    gradient = layer.gradient or 0.0
    if layer.weight and gradient > EXPLODING_RATIO * layer.weight:
        return {EXPLODING: f"gradient {gradient / layer.weight:.2g} times as large as its weight"}
    if last and gradient > EXPLODING_SHARE * last:
        return {EXPLODING: f"gradient {gradient / last:.2g} times that of the layer nearest the loss"}
    if gradient == 0:
        return {VANISHING: "gradient exactly 0"}
    if gradient < VANISHING_SHARE * largest_behind:
        return {VANISHING: f"gradient {gradient / largest_behind:.2g} times the largest nearer the loss"}
    if gradient < VANISHING_RATIO * layer.weight:
        return {VANISHING: f"gradient {gradient / layer.weight:.2g} times its weight, less than float32 adds"}
    return {}


def _switched_off(layer: Layer) -> dict[str, str]:
    if layer.dead is None or layer.samples < LEAST_SAMPLES or layer.dead <= DEAD_SHARE:
        return {}
    return {DEAD: f"{layer.dead:.0%} of the units behind {layer.act} are 0 for all {layer.samples} values"}


def _flat(layer: Layer) -> dict[str, str]:
    if layer.saturated is None or layer.saturated <= SATURATED_SHARE:
        return {}
    return {
        SATURATED: f"{layer.saturated:.0%} of the outputs of {layer.act} lie where its slope is below {SATURATED_SLOPE:g} of its steepest"
    }


def _few_samples(layer: Layer) -> dict[str, str]:
    if layer.batch is None or (layer.batch[0] >= LEAST_BATCH and layer.batch[1] >= LEAST_BATCH_VALUES):
        return {}
    return {TINY_BATCH: f"statistics of {layer.batch[0]} samples, {layer.batch[1]} values to a channel"}


def _scale(layer: Layer, earlier_learn: bool) -> dict[str, str]:
    module = layer.module
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or not isinstance(weight, nn.Parameter) or weight.numel() < 2:
        return {}
    with torch.no_grad():
        std, first = weight.double().std(correction=0).item(), weight.flatten()[0].item()
    if std == 0:
        # Zeros are at home at the end of a residual branch, which the gradient goes around.
        harmless = earlier_learn if first == 0 else len(weight) == 1
        return {} if harmless else {BADLY_INITIALISED: f"all weights are {first:g}"}
    if layer.normalised:
        return {}
    asked = init.expected_std(module, layer.act)
    if LEAST_SCALE <= std / asked <= MOST_SCALE:
        return {}
    return {BADLY_INITIALISED: f"weights deviate by {std:.2g}, {layer.act or 'a linear layer'} asks for {asked:.2g}"}


def origin_sentence(found: Probe) -> str | None:
    if not found.finite_inputs:
        return "the batch itself holds nan or inf"
    trouble = not math.isfinite(found.loss) or any(layer.nonfinite or not layer.finite for layer in found.layers)
    if not trouble:
        return None
    origin = found.origin
    if origin is None:
        return f"the loss is {found.loss:g} and no operator made it so: a parameter or a buffer holds nan or inf already"
    where = f"in or behind layer {origin.layer}" if origin.layer is not None else "before the first layer"
    if origin.phase == "backward":
        where = (
            f"in the backward pass, at layer {origin.layer} or just before it"
            if origin.layer is not None
            else "in the backward pass of the loss"
        )
    return f"non-finite values began {where}: {origin.operator} made them out of finite numbers"
