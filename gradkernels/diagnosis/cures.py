"""The cures: which verdict asks for which, and each in a sentence and a line of code for the model at hand.

They are ranked by how many layers ask for them and how much. Safe are those that change no architecture: initialisation, clipping, learning
rate; diagnose may try these on a copy.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from decimal import ROUND_DOWN, Context
from typing import Any, NamedTuple

from torch import nn

from gradkernels.acts import ACTS
from gradkernels.diagnosis.probe import Layer, Origin, Probe
from gradkernels.diagnosis.verdicts import (
    BADLY_INITIALISED,
    DEAD,
    EXPLODING,
    SATURATED,
    TINY_BATCH,
    VANISHING,
    Verdict,
    enough_for_statistics,
    is_shut,
)
from gradkernels.layers import WEIGHTS

# The update relative to the weight that a suggested learning rate is to make at most.
LARGEST_UPDATE = 1e-2
# What gradients are clipped to, as the notes on clipping have it and most recipes.
MAX_NORM = 1.0

ACTIVATION, INITIALISATION, BATCH_NORM, RESIDUAL = "activation", "initialisation", "batch norm", "residual connections"
CLIPPING, LEARNING_RATE, STATISTICS, ARITHMETIC, LOSS = "clipping", "learning rate", "batch statistics", "arithmetic", "loss"
SAFE = (INITIALISATION, CLIPPING, LEARNING_RATE)
# How much each verdict asks for each cure; cures are ranked by the sum over layers.
_ASKS_FOR: dict[str, dict[str, float]] = {
    EXPLODING: {INITIALISATION: 3, CLIPPING: 2.5, BATCH_NORM: 2, LEARNING_RATE: 1},
    VANISHING: {INITIALISATION: 3, BATCH_NORM: 2.5, RESIDUAL: 2},
    DEAD: {ACTIVATION: 3, INITIALISATION: 2, LEARNING_RATE: 1},
    SATURATED: {ACTIVATION: 4, INITIALISATION: 3, BATCH_NORM: 2},
    BADLY_INITIALISED: {INITIALISATION: 4},
    TINY_BATCH: {STATISTICS: 3},
}
# Where one of these overflows, numbers have grown from layer to layer; elsewhere the operator itself is to be mended.
_GROWTH = ("addmm", "mm", "bmm", "baddbmm", "convolution", "add", "mul", "linear", "native_batch_norm", "batch_norm_act", "leaky_relu")
_GREW: dict[str, float] = {INITIALISATION: 9, CLIPPING: 2, LEARNING_RATE: 1}
_SATURATING = ("sigmoid", "tanh", "hardsigmoid", "hardtanh")
# What vanishes behind one of these does so because of it.
_VANISHING_AND_SATURATING: dict[str, float] = {ACTIVATION: 4}


class Cure(NamedTuple):
    """What to do, why, the line of code, and whether diagnose may try it on a copy."""

    name: str
    why: str
    line: str
    safe: bool


def cures(layers: list[Verdict], found: Probe) -> list[Cure]:
    """Those that the verdicts ask for, the one asked for most first."""
    scores: dict[str, float] = defaultdict(float)
    if not found.finite:
        grew = found.origin is not None and found.origin.phase == "forward" and found.origin.operator in _GROWTH
        scores.update(_GREW if grew else {ARITHMETIC: 9 * max(len(layers), 1)})
    for each in layers:
        # Gradients beside nan say nothing of how they flow.
        for verdict in each.verdicts if found.finite else {*each.verdicts} - {VANISHING, EXPLODING}:
            asks_for: Mapping[str, float] = _ASKS_FOR.get(verdict, {})
            if verdict == VANISHING and each.layer.closed_by is not None:
                # That layer asks for what is needed.
                asks_for = {}
            elif verdict == VANISHING and _saturates(each.layer):
                asks_for = {**asks_for, **_VANISHING_AND_SATURATING}
            for cure, weight in asks_for.items():
                if cure == INITIALISATION and not isinstance(each.layer.module, WEIGHTS):
                    # What init.apply_ leaves as it is.
                    continue
                # What follows the last layer belongs to the loss.
                scores[LOSS if cure == ACTIVATION and not each.layer.behind else cure] += weight
    ranked = sorted(scores, key=lambda name: -scores[name])
    shortened = clipped(found.total_norm) if CLIPPING in scores else 1.0
    return [cure for cure in (_describe(name, layers, found, shortened) for name in ranked) if cure is not None]


def _describe(name: str, layers: list[Verdict], found: Probe, shortened: float) -> Cure | None:
    """A cure in words and code for this model; None where there is no place for it."""
    weights = [each for each in layers if isinstance(each.layer.module, WEIGHTS)]
    described: tuple[str, str] | None
    if name == ACTIVATION:
        described = _activation(layers)
    elif name == LOSS:
        described = _loss(layers)
    elif name == BATCH_NORM:
        return _normalisation(weights)
    elif name == INITIALISATION:
        why = "weights of the scale that each activation keeps (He, LeCun, Xavier); begins anew"
        described = (why, "gk.init.apply_(model)") if weights else None
    elif name == RESIDUAL:
        lacking = len(weights) > 5 and not any(each.layer.around for each in weights)
        described = ("the gradient then reaches every layer undiminished", "x = x + block(x)") if lacking else None
    elif name == CLIPPING:
        length = f"; the gradient is {found.total_norm:.3g} long" if math.isfinite(found.total_norm) else ""
        described = f"bounds every step{length}", f"gk.clip_grad_norm_(model, max_norm={MAX_NORM})    # between backward() and step()"
    elif name == LEARNING_RATE:
        rate = learning_rate(layers, shortened)
        described = "smaller steps, if it was healthy before some step", "lr = lr / 10"
        if rate is not None:
            why = f"SGD {'with clipping ' if shortened < 1 else ''}then changes no weight by more than {LARGEST_UPDATE:.0%}"
            described = why, f"torch.optim.SGD(model.parameters(), lr={rate:g})"
    elif name == STATISTICS:
        at = next(each for each in layers if TINY_BATCH in each.verdicts)
        line = "model = gk.convert_sync_batch_norm(model)    # or, on one machine, nn.GroupNorm or a larger batch"
        described = f"layer {at.name} has {at.why}", line
    else:
        described = _arithmetic(found.origin)
    return None if described is None else Cure(name, *described, safe=name in SAFE)


def _activation(layers: list[Verdict]) -> tuple[str, str]:
    """For the first layer whose activation is at fault; the rest follow its example."""
    at = next(each for each in layers if each.layer.behind and _is_at_fault(each))
    act = at.layer.act
    if act == "sigmoid":
        why = "the slope of sigmoid is 0.25 at most, and every layer multiplies by it"
    else:
        why = f"{act} lets no gradient through where it is {'off' if DEAD in at.verdicts else 'flat'}"
    module, function = ("ELU", "elu") if act in _SATURATING else ("LeakyReLU", "leaky_relu")
    if at.layer.act_module is None:
        return why, f"gk.{function}(x)    # instead of {act}(x) behind {at.name}"
    return why, f"{_assign(at.layer.act_module)} = gk.{module}()    # and so behind all other layers"


def _is_at_fault(each: Verdict) -> bool:
    return bool({DEAD, SATURATED} & {*each.verdicts}) or (VANISHING in each.verdicts and _saturates(each.layer))


def _saturates(layer: Layer) -> bool:
    return layer.act in _SATURATING and not layer.gated


def _loss(layers: list[Verdict]) -> tuple[str, str]:
    """For an activation behind an output layer: no other one can stand for it, but the loss may contain it."""
    at = next(each for each in layers if not each.layer.behind and _is_at_fault(each))
    why = f"{at.layer.act} behind the output layer {at.name} lets no gradient through where it is flat"
    if at.layer.act == "sigmoid":
        line = "F.binary_cross_entropy_with_logits(logits, targets)    # and no sigmoid in the model"
        return f"{why}; a loss that contains it does", line
    return why, f"return {at.name.rpartition('.')[2]}(x)    # without {at.layer.act}, or its outputs scaled down"


def _normalisation(weights: list[Verdict]) -> Cure | None:
    """Behind the first weight that is followed by none and by another layer: outputs are not to be normalised."""
    layer = next((each.layer for each in weights if not each.layer.normalised and each.layer.behind), None)
    if layer is None:
        return None
    module = layer.module
    units: Any = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    name, line = BATCH_NORM, ""
    if isinstance(module, nn.Linear) and (layer.dims > 2 or layer.called > 1):
        # Batch norm takes a sequence's channels as dimension 1, and has one mean for all calls.
        name, line = "layer norm", f"nn.LayerNorm({units})    # behind {layer.name}, before its activation, and so on"
    elif layer.batch is not None and not enough_for_statistics(layer.batch):
        line = f"nn.GroupNorm({math.gcd(units, 32)}, {units})    # behind {layer.name}, before its activation, and so on"
        name = "group norm"
    else:
        dimension = next((digit for digit in "23" if f"{digit}d" in type(module).__name__), "1")
        act = layer.act if layer.act in ACTS else "elu"
        line = f'gk.BatchNormAct{dimension}d({units}, act="{act}")    # behind {layer.name}, in place of its activation, and so on'
    return Cure(name, "every layer then gets inputs of deviation 1, whatever came before", line, safe=False)


def _arithmetic(origin: Origin | None) -> tuple[str, str]:
    if origin is None or origin.phase in ("parameter", "buffer"):
        return "what is lost stays lost", "model.load_state_dict(...)    # of a checkpoint before it happened"
    if origin.phase == "batch":
        return "nothing is learnt from nan", "inputs = torch.nan_to_num(inputs)    # better: find out where the data get it from"
    if origin.phase == "constant":
        return "what is not finite is written in the code", "torch.finfo(x.dtype).min    # for a mask, in place of -inf; nan is of no use"
    return f"{origin.operator} leaves what the numbers can hold", mend(origin.operator)


def mend(operator: str) -> str:
    """The line of code for the operator that made nan or inf."""
    word = operator.lower()
    for name, line in {
        "empty": "loss_fn(y, targets) if len(targets) else y.sum() * 0    # of nothing the mean is 0 / 0",
        "softmax": "x.masked_fill(mask, torch.finfo(x.dtype).min).softmax(-1)    # in place of -inf: where all is masked that is 0 / 0",
        "nll_loss": "F.cross_entropy(y, targets, reduction='sum') / (targets != -100).sum().clamp_min(1)    # no target, no mean",
        "var": "x.var(correction=0)    # of one number the deviation with a correction is 0 / 0",
        "std": "x.std(correction=0)    # of one number the deviation with a correction is 0 / 0",
        "log": "torch.log(x.clamp_min(1e-12))    # log_softmax, logsigmoid and cross_entropy need no log of yours",
        "sqrt": "torch.sqrt(x.clamp_min(1e-12))    # the slope of sqrt at 0 is infinite",
        "norm": "torch.sqrt(x.square().sum() + 1e-12)    # the slope of a norm at 0 is not defined",
        "div": "x / y.clamp_min(1e-12)",
        "reciprocal": "y.clamp_min(1e-12).reciprocal()",
        "exp": "torch.exp(x.clamp_max(80))",
        "pow": "x.clamp_min(1e-12).pow(p)",
    }.items():
        if name in word:
            return line
    return "gk.init.apply_(model)    # if it grew until it overflowed; in 16 bits bfloat16, or torch.amp.GradScaler"


def _assign(module: str) -> str:
    """Python for a submodule, where a name may be the number of an entry."""
    parts = module.split(".")
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)


def learning_rate(layers: list[Verdict], shortened: float = 1.0) -> float | None:
    """What keeps the largest relative update of plain SGD at LARGEST_UPDATE, of gradients times `shortened`; rounded down to one digit."""
    judged = [each.layer for each in layers if each.layer.weight and not is_shut(each.layer)]
    ratios = [layer.gradient / layer.weight for layer in judged if layer.gradient is not None]
    largest = max(ratios, default=0.0) * shortened
    if not 0 < largest < math.inf:
        return None
    return float(Context(prec=1, rounding=ROUND_DOWN).create_decimal_from_float(LARGEST_UPDATE / largest))


def clipped(total_norm: float) -> float:
    """What clipping to MAX_NORM multiplies a gradient by."""
    return MAX_NORM / max(total_norm, MAX_NORM)
