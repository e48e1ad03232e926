"""One forward and one backward pass with every layer looked at, which leaves the model as it was.

Gradients come from torch.autograd.grad: nothing is accumulated, so .grad, hooks behind accumulation (optimizers that step in backward) and
the reducer of DistributedDataParallel see nothing. Activations are seen where torch's dispatcher runs them, whether a module or a function
called them, and belong to the layer that ran last; there too is found which operator first made nan or inf.
"""

import math
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from gradkernels import clip_grad
from gradkernels.monitor import layer_name, unit_dim, unwrapped
from gradkernels.untouched import untouched

# An activation is saturated where its slope is below this share of its steepest one.
SATURATED_SLOPE = 0.1

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

# These make nan and inf on purpose, or hand out memory that holds anything.
_ALLOWED = ("empty", "new_empty", "full", "new_full", "fill", "masked_fill", "where", "scalar_tensor", "lift_fresh", "detach")

# Operators that are activations, by the name without aten:: and without the underscore of the version in place.
_ACTS = {
    **{name: name for name in ("relu", "sigmoid", "tanh", "hardsigmoid", "elu", "celu", "gelu", "mish", "hardswish", "leaky_relu")},
    **{"silu": "swish", "swish": "swish", "_prelu_kernel": "prelu", "prelu": "prelu", "rrelu_with_noise": "rrelu"},
    **{"leaky_relu_with_mask": "leaky_relu", "rrelu_with_mask": "rrelu", "hardtanh": "hardtanh", "batch_norm_act": "batch_norm_act"},
}


@dataclass
class Layer:
    """A module with parameters of its own, and what was seen of it.

    called: how often; gradient, weight: norms, gradient None where the loss does not depend on it; output_std: of the first call;
    finite: whether every output was; act: the activations that ran behind it; dead: share of units that no sample switches on;
    saturated: share of outputs on a flat part; samples: how many values of one unit that was judged by; batch: samples and values of a
    channel that a batch norm took its statistics over.
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
    normalised: bool = False
    _outputs: int = 0
    _flat: int = 0
    _ever_on: Tensor | None = None

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


@dataclass
class Origin:
    """Where nan or inf first came out of finite numbers: in which pass, of which operator, in or behind which layer."""

    phase: str
    operator: str
    layer: str | None


@dataclass
class Probe:
    """layers: in the order in which they ran first; total_norm: of all gradients; finite_inputs: whether the batch was."""

    layers: list[Layer]
    loss: float
    total_norm: float
    origin: Origin | None
    finite_inputs: bool


class _Watch(TorchDispatchMode):
    """Looks at the output of every operator."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.phase = "forward"
        self.layer: Layer | None = None
        # A module without parameters that is running, which may be an activation.
        self.module: str | None = None
        self.dim = 1
        self.origin: Origin | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.rstrip("_")
        look = self.origin is None and not name.startswith(_ALLOWED)
        # What it writes has to be looked at before; other arguments only once something came out that is not finite.
        written = func._schema.is_mutable
        finite = look and written and _all_finite(tree_leaves((args, kwargs)))
        result = func(*args, **kwargs)
        if look and not _all_finite(result if isinstance(result, tuple | list) else (result,)):
            finite = finite if written else _all_finite(tree_leaves((args, kwargs)))
            if finite:
                self.origin = Origin(self.phase, _operator(name), None if self.layer is None else self.layer.name)
        if self.phase == "forward" and self.layer is not None and name in _ACTS:
            _see(self.layer, _ACTS[name], args, result, self.dim)
            self.layer.act_module = self.module
        return result


def _operator(name: str) -> str:
    """The operator; in the backward pass that of the node of the graph, since its parts are anonymous products."""
    node = torch._C._current_autograd_node()
    return name if node is None else node.name().rstrip("0123456789").rpartition("::")[2]


def _all_finite(values: Iterable[Any]) -> bool:
    tensors = (value for value in values if isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point())
    return all(bool(value.isfinite().all()) for value in tensors)


def _see(layer: Layer, act: str, args: tuple[Any, ...], result: Any, dim: int) -> None:
    y = (result[0] if isinstance(result, tuple | list) else result).detach()
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
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameters that require a gradient: there is nothing to diagnose")
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in parameters.values()):
        raise ValueError(f"{type(model).__name__} has parameters without a shape: run it on a batch first")
    layers: dict[str, Layer] = {}
    for name in parameters:
        layer = layers.setdefault(layer_name(name), Layer(layer_name(name), model.get_submodule(name.rpartition(".")[0])))
        layer.parameters.append(name)
    watch, order = _Watch(), _Order()
    handles: list[RemovableHandle] = []

    def entered(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            layer.called += 1
            order.place(layer)
            watch.layer, watch.dim = layer, unit_dim(module, watch.dim)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
                (x,) = args[:1]
                layer.batch = x.shape[0], x.numel() // max(x.shape[1], 1)

        return hook

    def left(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for y in tree_leaves(output):
                if isinstance(y, Tensor) and y.is_floating_point() and y.numel():
                    layer.finite &= bool(y.isfinite().all())
                    if layer.output_std is None:
                        layer.output_std = float(y.detach().double().std(correction=0))
                    if y.requires_grad:
                        handles.append(y.register_hook(reached(layer)))

        return hook

    def reached(layer: Layer) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            watch.layer = layer

        return hook

    def running(name: str | None) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            watch.module = name

        return hook

    with untouched(model, inputs, targets), ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in layers.values():
            handles += [layer.module.register_forward_pre_hook(entered(layer)), layer.module.register_forward_hook(left(layer))]
        for name, module in model.named_modules():
            if not any(True for _ in module.children()) and not any(True for _ in module.parameters()):
                handles += [module.register_forward_pre_hook(running(name)), module.register_forward_hook(running(None))]
        try:
            if not model.training:
                model.train()
            with watch:
                loss = loss_fn(model(inputs), targets)
                _check(loss)
                watch.phase = "backward"
                grads = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        in_order = order.of(layers)
        # Whether a normalisation comes next decides whether the scale of a weight matters.
        for layer, following in pairwise(in_order):
            layer.normalised = isinstance(following.module, _NORMS)
        total_norm = _read_norms(in_order, parameters, grads)
        return Probe(
            layers=in_order,
            loss=loss.item(),
            total_norm=total_norm,
            origin=watch.origin,
            finite_inputs=_all_finite(tree_leaves((inputs, targets))),
        )


def _check(loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned {type(loss).__name__}, not a tensor: it has to return the loss itself, without .item()")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn returned a tensor of shape {tuple(loss.shape)}, not one number: take its mean")
    if not loss.requires_grad:
        raise RuntimeError(
            "the loss does not depend on any parameter that requires a gradient: is there a detach() or no_grad() on the way?"
        )


class _Order:
    """The layers in the order in which they ran first; one that was never entered follows the one registered before it."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def place(self, layer: Layer) -> None:
        self._places.setdefault(layer.name, len(self._places))

    def of(self, layers: dict[str, Layer]) -> list[Layer]:
        keys, last = {}, -1.0
        for number, name in enumerate(layers):
            last = self._places.get(name, last)
            keys[name] = (last, number if name not in self._places else -1)
        return sorted(layers.values(), key=lambda layer: keys[layer.name])


def _read_norms(layers: list[Layer], parameters: dict[str, nn.Parameter], grads: tuple[Tensor | None, ...]) -> float:
    """Norms of weights and gradients, in one pass over both; returns that of all gradients together."""
    given = {name: _dense(grad) for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    weights = [parameter.detach() for parameter in parameters.values()]
    norms, _, nonfinite, _ = clip_grad.tensor_norms([*weights, *given.values()])
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


def _dense(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad
