"""The cures: which verdict asks for which cure, and each as a sentence and a line of code for the model.

Cures are ranked by the number of layers that ask for them and by how much each verdict asks. A cure is safe
if it does not change the architecture: initialisation, clipping and learning rate. diagnose may try these on
a copy.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from decimal import ROUND_DOWN, Context
from typing import Any, NamedTuple

from torch import nn

from gradkernels.acts import ACTS
from gradkernels.diagnosis.nonfinite import Origin
from gradkernels.diagnosis.probe import Layer, Probe
from gradkernels.diagnosis.recurrent import TimeSteps
from gradkernels.diagnosis.verdicts import (
    BADLY_INITIALISED,
    DEAD,
    EXPLODING,
    EXPLODING_OVER_TIME,
    SATURATED,
    TINY_BATCH,
    VANISHING,
    VANISHING_OVER_TIME,
    Verdict,
    has_enough_statistics,
    is_near_zero,
    verdict_over_time,
)
from gradkernels.layers import WEIGHTS

# A suggested learning rate changes no weight by more than this share of it.
LARGEST_UPDATE = 1e-2
# The suggested norm for clipping, which is that of most recipes.
MAX_NORM = 1.0
# Clipping that compares a step with the steps before it, for gradients that explode in some steps only.
POLICY_LINE = "gradkernels.attach_clipping(optimizer, gradkernels.clipping.ZScore())"

ACTIVATION, INITIALISATION, BATCH_NORM, RESIDUAL = "activation", "initialisation", "batch norm", "residual connections"
CLIPPING, LEARNING_RATE, STATISTICS, ARITHMETIC, LOSS = "clipping", "learning rate", "batch statistics", "arithmetic", "loss"
POLICY, RECURRENCE = "clipping policy", "recurrence"
SAFE = (INITIALISATION, CLIPPING, LEARNING_RATE)
# Verdict -> cure -> how much the verdict asks for it. The sum over all layers ranks the cures.
_ASKS_FOR: dict[str, dict[str, float]] = {
    EXPLODING: {INITIALISATION: 3, CLIPPING: 2.5, POLICY: 2.25, BATCH_NORM: 2, LEARNING_RATE: 1},
    VANISHING: {INITIALISATION: 3, BATCH_NORM: 2.5, RESIDUAL: 2},
    DEAD: {ACTIVATION: 3, INITIALISATION: 2, LEARNING_RATE: 1},
    SATURATED: {ACTIVATION: 4, INITIALISATION: 3, BATCH_NORM: 2},
    BADLY_INITIALISED: {INITIALISATION: 4},
    TINY_BATCH: {STATISTICS: 3},
    EXPLODING_OVER_TIME: {CLIPPING: 2.5, POLICY: 2.25},
    VANISHING_OVER_TIME: {RECURRENCE: 3},
}
# A group norm over fewer values is noise, as a batch norm over few samples.
_LEAST_VALUES = 8
# A gradient that vanishes because of one of these activations asks for another activation, too.
_SATURATING = ("sigmoid", "tanh", "hardsigmoid", "hardtanh")
_VANISHING_AND_SATURATING: dict[str, float] = {ACTIVATION: 4}
# If one of these operators overflows, values have grown from layer to layer. Any other operator has to be
# fixed itself.
_GROWTH = ("addmm", "mm", "bmm", "baddbmm", "convolution", "add", "mul", "linear", "native_batch_norm", "batch_norm_act", "leaky_relu")
_GREW: dict[str, float] = {INITIALISATION: 9, CLIPPING: 2, LEARNING_RATE: 1}


class Cure(NamedTuple):
    """One thing to do.

    Attributes:
        name: the cure.
        why: what it does.
        line: the line of code for this model.
        safe: whether diagnose may try it on a copy, because it does not change the architecture.
    """

    name: str
    why: str
    line: str
    safe: bool


def cures(judged: list[Verdict], probed: Probe) -> list[Cure]:
    """Return the cures that the verdicts ask for, the one asked for most first."""
    scores: dict[str, float] = defaultdict(float)
    if not probed.finite:
        has_grown = probed.origin is not None and probed.origin.phase == "forward" and probed.origin.operator in _GROWTH
        scores.update(_GREW if has_grown else {ARITHMETIC: 9 * max(len(judged), 1)})
    for layer_verdict in judged:
        layer = layer_verdict.layer
        # If some values are nan, the gradients of other layers do not show how gradients flow.
        for verdict in layer_verdict.verdicts if probed.finite else {*layer_verdict.verdicts} - {VANISHING, EXPLODING}:
            asks_for: Mapping[str, float] = _ASKS_FOR.get(verdict, {})
            if verdict == VANISHING and layer.blocked_by is not None:
                # The layer that blocks the gradient asks for the cure.
                asks_for = {}
            elif verdict == VANISHING and _saturates(layer):
                asks_for = {**asks_for, **_VANISHING_AND_SATURATING}
            for cure, weight in asks_for.items():
                if cure == INITIALISATION and not isinstance(layer.module, WEIGHTS):
                    # init.apply_ does not change this layer.
                    continue
                # The activation after an output layer belongs to the loss.
                scores[LOSS if cure == ACTIVATION and not layer.layers_after else cure] += weight
    for time_steps in probed.time_steps if probed.finite else ():
        for cure, weight in _ASKS_FOR.get(verdict_over_time(time_steps.norms), {}).items():
            scores[cure] += weight
    ranked = sorted(scores, key=lambda name: -scores[name])
    coefficient = clip_coefficient(probed.total_norm) if CLIPPING in scores else 1.0
    return [cure for cure in (_describe(name, judged, probed, coefficient) for name in ranked) if cure is not None]


def _describe(name: str, judged: list[Verdict], probed: Probe, coefficient: float) -> Cure | None:
    """Describe a cure in words and code for this model; None if the model has no place for it."""
    weighted = [layer_verdict.layer for layer_verdict in judged if isinstance(layer_verdict.layer.module, WEIGHTS)]
    described: tuple[str, str] | None
    if name == ACTIVATION:
        described = _activation(judged)
    elif name == LOSS:
        described = _loss(judged)
    elif name == BATCH_NORM:
        return _normalisation(weighted)
    elif name == INITIALISATION:
        why = "gives weights the size with which each activation keeps the signal (He, LeCun, Xavier); training starts over"
        described = (why, "gk.init.apply_(model)") if weighted else None
    elif name == RESIDUAL:
        lacks_skips = len(weighted) > 5 and not any(layer.has_skip for layer in weighted)
        described = ("the gradient then reaches every layer undiminished", "x = x + block(x)") if lacks_skips else None
    elif name == CLIPPING:
        norm = f"; the total gradient norm is {probed.total_norm:.3g}" if math.isfinite(probed.total_norm) else ""
        described = f"bounds every step{norm}", f"gk.clip_grad_norm_(model, max_norm={MAX_NORM})    # between backward() and step()"
    elif name == POLICY:
        why = "compares the norm of a step with those before it, for a model that is healthy in most steps and explodes in some"
        described = why, f"{POLICY_LINE}    # instead of a fixed max_norm"
    elif name == RECURRENCE:
        described = _recurrence(probed.time_steps)
    elif name == LEARNING_RATE:
        rate = learning_rate(judged, coefficient)
        described = "makes smaller steps, if the model was healthy before some step", "lr = lr / 10"
        if rate is not None:
            why = f"SGD {'with clipping ' if coefficient < 1 else ''}then changes no weight by more than {LARGEST_UPDATE:.0%}"
            described = why, f"torch.optim.SGD(model.parameters(), lr={rate:g})"
    elif name == STATISTICS:
        first = next(layer_verdict for layer_verdict in judged if TINY_BATCH in layer_verdict.verdicts)
        units: Any = first.layer.module.num_features
        instead = f"instead of {first.name} and its activation; over several processes gk.convert_sync_batch_norm(model)"
        described = f"layer {first.name} has {first.why}", f"{_group_norm(first.layer, units, 'identity')}    # {instead}"
    else:
        described = _arithmetic(probed.origin)
    return None if described is None else Cure(name, *described, safe=name in SAFE)


def _activation(judged: list[Verdict]) -> tuple[str, str]:
    """The cure for the first layer whose activation is at fault, as an example for the other layers."""
    first = next(layer_verdict for layer_verdict in judged if layer_verdict.layer.layers_after and _is_at_fault(layer_verdict))
    act = first.layer.act
    if act == "sigmoid":
        why = "the slope of sigmoid is at most 0.25, and every layer multiplies the gradient by it"
    else:
        why = f"{act} passes no gradient where it is {'off' if DEAD in first.verdicts else 'flat'}"
    module, function = ("ELU", "elu") if act in _SATURATING else ("LeakyReLU", "leaky_relu")
    if first.layer.act_module is None:
        return why, f"gk.{function}(x)    # instead of {act}(x) after {first.name}"
    return why, f"{_submodule(first.layer.act_module)} = gk.{module}()    # and likewise after all other layers"


def _recurrence(sequences: list[TimeSteps]) -> tuple[str, str] | None:
    """The cure for the first recurrent layer whose gradient vanishes over time; None for gates without biases."""
    first = next(time_steps for time_steps in sequences if verdict_over_time(time_steps.norms) == VANISHING_OVER_TIME)
    module, name, count = first.module, first.module_name, len(first.norms)
    if isinstance(module, nn.LSTM | nn.LSTMCell | nn.GRU | nn.GRUCell):
        if not module.bias:
            return None
        # Tallec, Ollivier, "Can recurrent neural networks warp time?", 2018. The second gate of both keeps the
        # state. The first one of an LSTM adds to it: shut, so that the sum of many steps does not saturate.
        units, size = module.hidden_size, f"{math.log(count):.2g}"
        why = f"the gate of {first.name} that keeps the state then stays open for {count} steps; at 0 it halves the state in each"
        line = f"bias = {_submodule(name)}.bias_hh{first.suffix}.data; bias[{units}:{2 * units}] = {size}"
        if isinstance(module, nn.LSTM | nn.LSTMCell):
            line += f"; bias[:{units}] = -{size}"
        return why, f"{line}    # log of the number of steps; training starts over"
    why = f"{first.name} multiplies the gradient by its weight in every step, and a gated cell passes it on by a sum"
    if isinstance(module, nn.RNN):
        return why, f"{_submodule(name)} = nn.LSTM({module.extra_repr()})    # or nn.GRU"
    if isinstance(module, nn.RNNCell):
        return why, f"{_submodule(name)} = nn.LSTMCell({module.input_size}, {module.hidden_size})    # or nn.GRUCell"
    return why, f"nn.LSTMCell(inputs, units)    # or nn.GRUCell, instead of {first.name}"


def _is_at_fault(layer_verdict: Verdict) -> bool:
    """Whether the activation after the layer is the reason for a verdict."""
    verdicts = layer_verdict.verdicts
    return bool({DEAD, SATURATED} & {*verdicts}) or (VANISHING in verdicts and _saturates(layer_verdict.layer))


def _saturates(layer: Layer) -> bool:
    return layer.act in _SATURATING and not layer.gated


def _loss(judged: list[Verdict]) -> tuple[str, str]:
    """The cure for an activation after an output layer, which only the loss can replace."""
    first = next(layer_verdict for layer_verdict in judged if not layer_verdict.layer.layers_after and _is_at_fault(layer_verdict))
    act = first.layer.act
    why = f"{act} after the output layer {first.name} passes no gradient where it is flat"
    if act == "sigmoid":
        line = "F.binary_cross_entropy_with_logits(logits, targets)    # and no sigmoid in the model"
        return f"{why}; a loss that includes the sigmoid passes it", line
    return why, f"return {first.name.rpartition('.')[2]}(x)    # without {act}, or with smaller outputs"


def _normalisation(weighted: list[Layer]) -> Cure | None:
    """A normalisation after the first layer that lacks one. Outputs of the model are not to be normalised."""
    layer = next((layer for layer in weighted if not layer.normalised and layer.layers_after), None)
    if layer is None:
        return None
    module = layer.module
    units: Any = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    before, instead = (f"after {layer.name}, {place} its activation, and likewise for other layers" for place in ("before", "instead of"))
    name = BATCH_NORM
    if isinstance(module, nn.Linear) and (layer.dims > 2 or layer.called > 1):
        # Batch norm takes dimension 1 of a sequence for its channels, and has one mean for all calls.
        name, line = "layer norm", f"nn.LayerNorm({units})    # {before}"
    elif layer.batch is not None and not has_enough_statistics(layer.batch):
        name, line = "group norm", f"{_group_norm(layer, units, 'elu')}    # {instead}"
    else:
        dimension = next((digit for digit in "23" if f"{digit}d" in type(module).__name__), "1")
        act = _act(layer, "elu")
        line = f'gk.BatchNormAct{dimension}d({units}, act="{act}")    # {instead}'
    return Cure(name, "every layer then gets inputs of standard deviation 1", line, safe=False)


def _group_norm(layer: Layer, units: int, otherwise: str) -> str:
    """The line that makes a group norm for a layer, with its activation, or `otherwise` if there is no kernel for that."""
    groups = math.gcd(units, 32)
    # Without pixels, a group is as many values as it has units.
    while layer.batch is not None and layer.batch[0] == layer.batch[1] and groups > 1 and units // groups < _LEAST_VALUES:
        groups //= 2
    act = _act(layer, otherwise)
    return f'gk.GroupNormAct({groups}, {units}, act="{act}")'


def _act(layer: Layer, otherwise: str) -> str:
    """The name of the activation of a layer for the modules of this package; `otherwise` if they do not have it."""
    return next((name for name, act in ACTS.items() if layer.act in act.operators), otherwise)


def _arithmetic(origin: Origin | None) -> tuple[str, str]:
    if origin is None or origin.phase in ("parameter", "buffer"):
        return "training does not remove nan or inf from a model", "model.load_state_dict(...)    # of an earlier checkpoint"
    if origin.phase == "batch":
        # The tuple that holds an entry cannot be written.
        lines = [f"{name}.nan_to_num_()" if name.endswith("]") else f"{name} = torch.nan_to_num({name})" for name in origin.tensors]
        return "a model cannot learn from nan or inf", f"{'; '.join(lines)}    # better: find where the data get it from"
    if origin.phase == "constant":
        return "the code itself writes nan or inf", "torch.finfo(x.dtype).min    # for a mask, instead of -inf; nan has no use"
    return f"{origin.operator} has no finite result for its inputs", fix_line(origin.operator)


def fix_line(operator: str) -> str:
    """Return the line of code that fixes an operator which produced nan or inf."""
    word = operator.lower()
    for name, line in {
        "empty": "loss_fn(y, targets) if len(targets) else y.sum() * 0    # the mean of no elements is 0 / 0",
        "softmax": "x.masked_fill(mask, torch.finfo(x.dtype).min).softmax(-1)    # a row that is all -inf gives 0 / 0",
        "nll_loss": "F.cross_entropy(y, targets, reduction='sum') / (targets != -100).sum().clamp_min(1)    # without targets: 0 / 0",
        "var": "x.var(correction=0)    # with a correction, the variance of one number is 0 / 0",
        "std": "x.std(correction=0)    # with a correction, the deviation of one number is 0 / 0",
        "log": "torch.log(x.clamp_min(1e-12))    # or log_softmax, logsigmoid, cross_entropy instead of a log",
        "sqrt": "torch.sqrt(x.clamp_min(1e-12))    # the slope of sqrt at 0 is infinite",
        "norm": "torch.sqrt(x.square().sum() + 1e-12)    # the slope of a norm at 0 is not defined",
        "div": "x / y.clamp_min(1e-12)",
        "reciprocal": "y.clamp_min(1e-12).reciprocal()",
        "exp": "torch.exp(x.clamp_max(80))",
        "pow": "x.clamp_min(1e-12).pow(p)",
    }.items():
        if name in word:
            return line
    return "gk.init.apply_(model)    # if values grew until they overflowed; in 16 bits: bfloat16, or torch.amp.GradScaler"


def _submodule(name: str) -> str:
    """Python for a submodule of model. A part of its name may be the number of an entry."""
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))


def learning_rate(judged: list[Verdict], coefficient: float = 1.0) -> float | None:
    """Return the learning rate with which SGD changes no weight by more than LARGEST_UPDATE of its norm.

    Gradients are multiplied by coefficient first. The rate is rounded down to one digit; None if there is
    none.
    """
    layers = [layer_verdict.layer for layer_verdict in judged]
    ratios = [layer.gradient / layer.weight for layer in layers if layer.weight and layer.gradient is not None and not is_near_zero(layer)]
    largest = max(ratios, default=0.0) * coefficient
    if not 0 < largest < math.inf:
        return None
    return float(Context(prec=1, rounding=ROUND_DOWN).create_decimal_from_float(LARGEST_UPDATE / largest))


def clip_coefficient(total_norm: float) -> float:
    """The factor by which clipping to MAX_NORM multiplies gradients of this norm."""
    return MAX_NORM / max(total_norm, MAX_NORM)
