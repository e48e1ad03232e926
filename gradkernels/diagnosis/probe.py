"""One forward and one backward pass with every layer looked at, which leaves the model as it was.

Gradients come from torch.autograd.grad: nothing is accumulated, so .grad, hooks behind accumulation (optimizers that step in backward) and
the reducer of DistributedDataParallel see nothing. Activations are seen where torch's dispatcher runs them, whether a module or a function
called them, and belong to the layer that ran last. There too nan and inf are followed from where they come from to the loss and the
gradients: those that reach neither, such as the -inf of an attention mask, are nobody's concern.
"""

import math
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from gradkernels.acts import ACTS
from gradkernels.diagnosis.backward_graph import BackwardGraph
from gradkernels.gradients import tensor_norms
from gradkernels.layers import NORMS, WEIGHTS, by_first_call, layer_name, learns, unit_dim, unwrapped
from gradkernels.preserved import preserved

# An activation is saturated where its slope is below this share of its steepest one.
SATURATED_SLOPE = 0.1

# These, and no activation, pass a factor on to what follows.
_HOMOGENEOUS = (None, "relu", "leaky_relu", "prelu", "rrelu")

# The sigmoid inside of these is a gate, which no other activation can stand for and which may well be shut; so is one that is multiplied by
# something else that is learned.
_GATED = (nn.RNNBase, nn.RNNCellBase)

# These write the numbers that they are given, or hand out memory that holds anything.
_CONSTANT = ("empty", "new_empty", "full", "new_full", "fill", "masked_fill", "where", "scalar_tensor", "lift_fresh", "detach")

# Operators that are activations, by the name without aten:: and without the underscore of the version in place.
_ACTS = {
    **{name: name for name in ("sigmoid", "tanh", "hardsigmoid", "celu", "gelu", "mish", "hardswish")},
    **{name: act.name for act in ACTS.values() for name in act.operators},
    **{"_prelu_kernel": "prelu", "prelu": "prelu", "rrelu_with_noise": "rrelu"},
    **{"leaky_relu_with_mask": "leaky_relu", "rrelu_with_mask": "rrelu", "hardtanh": "hardtanh", "batch_norm_act": "batch_norm_act"},
}


@dataclass(eq=False)
class Layer:
    """A module with parameters of its own, and what was seen of it.

    called: how often; gradient, weight: norms, gradient None where the loss does not depend on it; output_std: of the first call;
    finite: whether every output was; act: the activations that ran behind it; dead: share of units that no sample switches on;
    saturated: share of outputs on a flat part; samples: how many values of one unit that was judged by; batch: samples and values of a
    unit in its first output; dims: of that output; batch_statistics: whether it is a batch norm that took its statistics from there;
    growth: elements of the output over those of the input; normalised: whether a normalisation comes next, or behind layers that pass the
    scale on to it, so that this does not matter; behind: the layers its gradient came through, in the order in which they ran; around:
    whether a gradient reaches some layer before it without passing it, as along a residual connection; through: those of behind that
    its gradient cannot go around; closed_by: a layer behind whose
    weights are all 0; gated: whether its activation is a gate.
    """

    name: str
    module: nn.Module
    parameters: list[str] = field(default_factory=list)
    called: int = 0
    gradient: float | None = None
    nonfinite: int = 0
    weight: float = 0.0
    output_std: float | None = None
    finite: bool = True
    act: str | None = None
    act_module: str | None = None
    dead: float | None = None
    saturated: float | None = None
    samples: int = 0
    batch: tuple[int, int] | None = None
    dims: int = 2
    batch_statistics: bool = False
    growth: float = 1.0
    normalised: bool = False
    behind: list["Layer"] = field(default_factory=list)
    around: bool = False
    through: list["Layer"] = field(default_factory=list)
    closed_by: str | None = None
    gated: bool = False
    _outputs: int = 0
    _flat: int = 0
    _ever_on: Tensor | None = None

    def see_output(self, y: Tensor, given: list[Tensor], dim: int) -> None:
        """given: what the module was called with; dim: the dimension of y along which its units lie."""
        self.finite &= bool(y.isfinite().all())
        if self.output_std is None:
            self.output_std = float(y.detach().double().std(correction=0))
            self.dims, self.growth = y.dim(), y.numel() / max(given[0].numel(), 1) if given else 1.0
            if y.dim() > 1:
                self.batch = y.shape[0], y.numel() // y.shape[dim]

    def see_activation(self, act: str, y: Tensor, flat: Tensor | None, off: Tensor | None, dim: int) -> None:
        """flat: where an output is saturated; off: where a unit passes nothing on."""
        self.act = act
        if flat is not None:
            self._outputs += flat.numel()
            self._flat += int(flat.sum())
            self.saturated = self._flat / max(self._outputs, 1)
        if off is not None and y.dim() >= 2:
            ever_on = ~off.all(dim=[each for each in range(y.dim()) if each != dim % y.dim()])
            if self._ever_on is not None and self._ever_on.shape == ever_on.shape:
                ever_on |= self._ever_on
            self._ever_on = ever_on
            self.samples += y.numel() // max(len(ever_on), 1)
            self.dead = 1 - float(ever_on.double().mean())


class Origin(NamedTuple):
    """Where nan or inf comes from.

    phase: "forward", "loss" or "backward" where an operator made it; "constant" where code wrote it with `operator`; "batch",
    "parameter" or "buffer" where it was there before, and `operator` is its name. where: in words. order: the how many-th it is.
    """

    phase: str
    operator: str
    where: str = ""
    order: int = 0


@dataclass
class Probe:
    """layers: in the order in which they ran first; total_norm: of all gradients; origin: of what is not finite in loss and gradients."""

    layers: list[Layer]
    loss: float
    total_norm: float
    origin: Origin | None = None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and not any(layer.nonfinite for layer in self.layers)


class _Trail:
    """Where the nan and inf of each tensor come from.

    By storage, so that views count. A storage that was given back may be another's now, but what is not finite there has been written, and
    so recorded, since.
    """

    def __init__(self) -> None:
        self._origins: dict[int, Origin] = {}

    def record(self, tensors: Iterable[Tensor], origin: Origin) -> None:
        self._origins |= {_storage(tensor): origin for tensor in tensors}

    def origin_of(self, tensors: Iterable[Tensor]) -> Origin | None:
        """The first one that is no constant, else the first."""
        origins = [self._origins[_storage(tensor)] for tensor in tensors if _storage(tensor) in self._origins]
        return min(origins, key=lambda origin: (origin.phase == "constant", origin.order), default=None)


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


class _Given(NamedTuple):
    """What an operator was given: where what is not finite comes from, whether there is any, whether it holds nan."""

    origin: Origin | None
    nonfinite: bool
    nan: bool


class _Watch(TorchDispatchMode):
    """Looks at the output of every operator."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.phase = "forward"
        self.layer: Layer | None = None
        # A module without parameters that is running, which may be an activation.
        self.module: str | None = None
        self.dim = 1
        self.gated = False
        self.trail = _Trail()
        self.events = 0
        # Outputs of sigmoids by storage, which lives on as long as the graph that needs it.
        self.gates: dict[int, Layer] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.rstrip("_")
        # What it writes has to be looked at before; other arguments only once something came out that is not finite.
        written = [value for argument, value in zip(func._schema.arguments, args, strict=False) if _is_written(argument)]
        given = self._given((args, kwargs)) if func._schema.is_mutable else None
        result = func(*args, **kwargs)
        lost = _nonfinite((result, written))
        if lost:
            empty = any(isinstance(value, Tensor) and not value.numel() for value in tree_leaves((args, kwargs)))
            self._follow(name, " of an empty tensor" * empty, given or self._given((args, kwargs)), lost)
        if self.phase != "backward" and self.layer is not None and not self.gated and name in _ACTS and args[0].numel():
            y = args[0] if _is_written(func._schema.arguments[0]) else result
            _see(self.layer, _ACTS[name], args, y, self.dim)
            self.layer.act_module = self.module
            if "sigmoid" in name:
                self.gates[_storage(result)] = self.layer
        if name == "mul" and self.phase == "forward":
            for one, other in (args, args[::-1]):
                if isinstance(one, Tensor) and isinstance(other, Tensor) and other.requires_grad and _storage(one) in self.gates:
                    self.gates[_storage(one)].gated = True
        return result

    def look_at_what_is_there(self, model: nn.Module, batch: Any) -> None:
        self.trail.record(_tensors(_nonfinite(batch)), Origin("batch", ""))
        for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in named:
                self.trail.record(_tensors(_nonfinite(tensor.detach())), Origin(kind, name))

    def _given(self, values: Any) -> _Given:
        nonfinite = _nonfinite(values)
        return _Given(self.trail.origin_of(_tensors(nonfinite)), bool(nonfinite), _holds_nan(nonfinite))

    def _follow(self, name: str, remark: str, given: _Given, lost: list[Tensor | float]) -> None:
        self.events += 1
        where = self._where()
        made = Origin(self.phase, _operator(name) + remark, where, self.events)
        origin = given.origin
        if origin is None:
            # Numbers, and tensors that nobody saw being made, the code has from somewhere.
            name = "tensor" if name == "lift_fresh" else name
            origin = Origin("constant", name, where, self.events) if given.nonfinite or name.startswith(_CONSTANT) else made
        if origin.phase == "constant" and given.nonfinite and not given.nan and _holds_nan(lost):
            # Such as softmax where everything is masked.
            origin = made
        self.trail.record(_tensors(lost), origin)

    def _where(self) -> str:
        if self.phase == "loss":
            return "in the loss"
        if self.phase == "forward":
            return "before the first layer" if self.layer is None else f"in or behind layer {self.layer.name}"
        return "in the backward pass" + ("" if self.layer is None else f", at layer {self.layer.name} or just before it")


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _operator(name: str) -> str:
    """The operator; in the backward pass that of the node of the graph, since its parts are anonymous products."""
    node = torch._C._current_autograd_node()
    return name if node is None else node.name().rstrip("0123456789").rpartition("::")[2]


def _nonfinite(values: Any) -> list[Tensor | float]:
    """The tensors and numbers among them that hold nan or inf."""
    return [value for value in tree_leaves(values) if _is_nonfinite(value)]


def _is_nonfinite(value: object) -> bool:
    if not isinstance(value, Tensor):
        return isinstance(value, float) and not math.isfinite(value)
    # torch cannot tell of 8-bit floats.
    numbers = value.is_complex() or (value.is_floating_point() and value.itemsize > 1)
    return numbers and value.layout == torch.strided and not bool(value.isfinite().all())


def _tensors(values: Iterable[Tensor | float]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _holds_nan(values: Iterable[Tensor | float]) -> bool:
    return any(bool(value.isnan().any()) if isinstance(value, Tensor) else math.isnan(value) for value in values)


def _see(layer: Layer, act: str, args: tuple[Any, ...], result: Any, dim: int) -> None:
    y: Tensor = (result[0] if isinstance(result, tuple | list) else result).detach()
    param: Any = args[1] if len(args) > 1 else 1.0
    if act == "batch_norm_act":
        act, param = args[-2:]
        if act == "identity":
            return
    low, high = (args[1], args[2]) if act == "hardtanh" and len(args) > 2 else (-1.0, 1.0)
    flat: Tensor | None = None
    if act == "hardtanh" and (low, high) == (0.0, 6.0):
        act = "relu6"
    if act == "sigmoid":
        flat = y * (1 - y) < SATURATED_SLOPE / 4
    elif act == "tanh":
        flat = 1 - y.square() < SATURATED_SLOPE
    elif act == "elu" and isinstance(param, int | float):
        # The slope left of zero is y + alpha; selu is an elu with a scale behind it.
        scale = args[2] if len(args) > 2 and isinstance(args[2], float) else 1.0
        flat = y < (SATURATED_SLOPE - 1) * param * scale
    elif act == "hardsigmoid":
        flat = (y <= 0) | (y >= 1)
    elif act == "hardtanh":
        flat = (y <= low) | (y >= high)
    elif act == "relu6":
        flat = y >= 6
    layer.see_activation(act, y, flat, y <= 0 if act in ("relu", "relu6") else None, dim)


def probe(model: nn.Module, inputs: Any, targets: Any, loss_fn: Callable[[Any, Any], Any]) -> Probe:
    """Runs loss_fn(model(inputs), targets) forward and backward once, in training mode, and says what was seen.

    A model in training mode keeps the flags of its modules (some may be frozen); one in evaluation is switched whole.
    """
    model = unwrapped(model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if learns(parameter)}
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameters that require a gradient: there is nothing to diagnose")
    if any(map(is_lazy, parameters.values())):
        raise ValueError(f"{type(model).__name__} has parameters without a shape: run it on a batch first")
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError(f"{type(model).__name__} has parameters without values, on the meta device: move it to another with to_empty()")
    layers: dict[str, Layer] = {}
    for name in parameters:
        layer = layers.setdefault(layer_name(name), Layer(layer_name(name), model.get_submodule(name.rpartition(".")[0])))
        layer.parameters.append(name)
    outputs: dict[str, list[Node]] = {name: [] for name in layers}
    watch = _Watch()
    called: dict[str, int] = {}
    handles: list[RemovableHandle] = []

    def entered(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            layer.called += 1
            called.setdefault(layer.name, len(called))
            watch.layer, watch.dim, watch.gated = layer, unit_dim(module, watch.dim), isinstance(module, _GATED)

        return hook

    def left(layer: Layer) -> Callable[..., None]:
        # What holds other layers passes on their work.
        alone = not any(True for child in layer.module.children() for _ in child.parameters())

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            watch.gated = False
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                layer.batch_statistics |= module.training or module.running_mean is None
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            for y in tree_leaves(output):
                if isinstance(y, Tensor) and y.is_floating_point() and y.numel():
                    if y.requires_grad:
                        handles.append(y.register_hook(reached(layer)))
                    if alone:
                        layer.see_output(y, given, watch.dim)
                    if alone and y.grad_fn is not None:
                        outputs[layer.name].append(y.grad_fn)

        return hook

    def reached(layer: Layer) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            watch.layer = layer

        return hook

    def running(name: str | None) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            watch.module = name

        return hook

    with preserved(model, inputs, targets), ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        watch.look_at_what_is_there(model, (inputs, targets))
        for layer in layers.values():
            handles.append(layer.module.register_forward_pre_hook(entered(layer)))
            handles.append(layer.module.register_forward_hook(left(layer), with_kwargs=True))
        for name, module in model.named_modules():
            if not any(True for _ in module.children()) and not any(True for _ in module.parameters()):
                handles += [module.register_forward_pre_hook(running(name)), module.register_forward_hook(running(None))]
        try:
            if not model.training:
                model.train()
            with watch:
                y = model(inputs)
                watch.phase = "loss"
                loss = loss_fn(y, targets)
                _check(loss)
                watch.phase, watch.layer = "backward", None
                grads = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
            if all(grad is None for grad in grads):
                raise RuntimeError(
                    "the loss does not depend on any parameter of the model itself: one that computes with copies of them, as under "
                    "FullyShardedDataParallel, is diagnosed before it is wrapped"
                )
        finally:
            for handle in handles:
                handle.remove()
        in_order = [layers[name] for name in by_first_call(layers, called)]
        for following, layer in pairwise(reversed(in_order)):
            carried = following.normalised and isinstance(following.module, WEIGHTS) and layer.act in _HOMOGENEOUS
            layer.normalised = isinstance(following.module, NORMS) or carried
        graph = BackwardGraph(loss, {layer.name: [parameters[name] for name in layer.parameters] for layer in in_order}, outputs)
        for layer in in_order:
            layer.behind = [layers[name] for name in graph.behind[layer.name]]
            layer.around = layer.name in graph.around
            layer.through = [each for each in layer.behind if layer.name not in graph.around.get(each.name, ())]
        total_norm = _read_norms(in_order, parameters, grads)
        origin = watch.trail.origin_of(_tensors(_nonfinite(loss.detach()))) or watch.trail.origin_of(_tensors(_nonfinite(grads)))
        return Probe(in_order, loss.item(), total_norm, origin)


def _check(loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned {type(loss).__name__}, not a tensor: it has to return the loss itself, without .item()")
    if not loss.is_floating_point():
        raise TypeError(f"loss_fn returned a tensor of {loss.dtype}, not a real floating-point number")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn returned a tensor of shape {tuple(loss.shape)}, not one number: take its mean")
    if not loss.requires_grad:
        raise RuntimeError(
            "the loss does not depend on any parameter that requires a gradient: is there a detach() or no_grad() on the way?"
        )


def _read_norms(layers: list[Layer], parameters: dict[str, nn.Parameter], grads: tuple[Tensor | None, ...]) -> float:
    """Norms of weights and gradients, in one pass over both; returns that of all gradients together."""
    given = {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    weights = [parameter.detach() for parameter in parameters.values()]
    norms, _, nonfinite, _ = tensor_norms([*weights, *given.values()])
    weight = dict(zip(parameters, norms.tolist(), strict=False))
    gradient = dict(zip(given, norms[len(weights) :].tolist(), strict=True))
    counts = dict(zip(given, nonfinite[len(weights) :].tolist(), strict=True))
    for layer in layers:
        graded = [name for name in layer.parameters if name in given]
        if graded:
            layer.gradient = math.hypot(*(gradient[name] for name in graded))
            layer.nonfinite = sum(counts[name] for name in graded)
        layer.weight = math.hypot(*(weight[name] for name in layer.parameters))
    return math.hypot(*gradient.values())
