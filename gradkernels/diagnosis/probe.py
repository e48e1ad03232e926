"""One forward and one backward pass in which every layer is observed. The model is left as it was.

Gradients come from torch.autograd.grad, so nothing is accumulated: .grad does not change, and hooks after
accumulation (optimizers that step in backward, the reducer of DistributedDataParallel) do not run.
Activations are observed in torch's dispatcher, so it makes no difference whether a module or a function
computes them. An activation belongs to the layer that ran last.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from gradkernels.acts import ACTS
from gradkernels.diagnosis.backward_graph import BackwardGraph
from gradkernels.diagnosis.nonfinite import NonfiniteTracker, Origin, is_written, nonfinite, operator_name, storage_of
from gradkernels.diagnosis.recurrent import TimeStepObserver, TimeSteps
from gradkernels.diagnosis.thresholds import FLAT_SLOPE
from gradkernels.gradients import tensor_norms
from gradkernels.layers import NORMS, WEIGHTS, by_first_call, layer_name, learns, unit_dim, unwrapped
from gradkernels.preserved import preserved

# A positive factor on the input of these activations (None is none) is a factor on their output.
_HOMOGENEOUS = (None, "relu", "leaky_relu", "prelu", "rrelu")

# Sigmoids inside of these are gates. A gate may well be shut, and no other activation can replace it. A
# sigmoid whose output is multiplied by something that is learnt is a gate, too.
_GATED = (nn.RNNBase, nn.RNNCellBase)

# Operators that are activations, without aten:: and the underscore of the in-place version -> the activation.
_ACTS = {
    **{name: name for name in ("sigmoid", "tanh", "hardsigmoid", "celu")},
    **{name: act.name for act in ACTS.values() for name in act.operators},
    **{"_prelu_kernel": "prelu", "prelu": "prelu", "rrelu_with_noise": "rrelu"},
    **{"leaky_relu_with_mask": "leaky_relu", "rrelu_with_mask": "rrelu", "hardtanh": "hardtanh", "batch_norm_act": "batch_norm_act"},
}


@dataclass(eq=False)
class Layer:
    """A module with parameters of its own, and what one step showed of it.

    Attributes:
        name: the module, as in named_modules().
        module: the module.
        parameters: the names of its parameters that learn.
        called: the number of its calls.
        gradient: the norm of its gradient; None if the loss does not depend on it.
        nonfinite: the number of elements of its gradient that are nan or inf.
        weight: the norm of its parameters.
        output_std: the standard deviation of its first output.
        finite: whether all its outputs were finite.
        act: the activation that ran last after it.
        act_module: the module that computed this activation; None if a function did.
        dead: the share of units that the activation switched off for every sample.
        saturated: the share of outputs on a flat part of the activation.
        samples: the number of values per unit that `dead` was judged by.
        batch: the number of samples, and of values per unit, in its first output.
        dims: the number of dimensions of its first output.
        batch_statistics: whether it is a batch norm that computed its statistics from the batch.
        growth: the number of elements of its first output divided by that of its input.
        normalised: whether a normalisation comes next, or after layers that pass a factor on to it, so that
            the size of the weight has no effect.
        layers_after: the layers that its gradient came through, in the order in which they ran.
        has_skip: whether a gradient reaches a layer before it without passing it, as in a residual
            connection.
        unavoidable: those of layers_after that its gradient cannot skip.
        blocked_by: the name of a layer after it whose weights are all 0, so that no gradient passes.
        gated: whether its activation is a gate.
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
    layers_after: list["Layer"] = field(default_factory=list)
    has_skip: bool = False
    unavoidable: list["Layer"] = field(default_factory=list)
    blocked_by: str | None = None
    gated: bool = False
    _outputs: int = 0
    _flat: int = 0
    _ever_on: Tensor | None = None

    def observe_output(self, y: Tensor, inputs: Sequence[Tensor], dim: int) -> None:
        """Record an output y of the module. dim is the dimension of y along which its units lie."""
        self.finite &= bool(y.isfinite().all())
        if self.output_std is None:
            self.output_std = float(y.detach().double().std(correction=0))
            self.dims, self.growth = y.dim(), y.numel() / max(inputs[0].numel(), 1) if inputs else 1.0
            if y.dim() > 1:
                self.batch = y.shape[0], y.numel() // y.shape[dim]

    def observe_activation(self, act: str, y: Tensor, flat: Tensor | None, off: Tensor | None, dim: int) -> None:
        """Record an output y of the activation after the module.

        Args:
            act: the activation.
            y: its output.
            flat: bool, in the shape of y: where the activation is flat. None if it is nowhere flat.
            off: bool, in the shape of y: where a unit is off. None if units are never off.
            dim: the dimension of y along which the units lie.
        """
        self.act = act
        if flat is not None:
            self._outputs += flat.numel()
            self._flat += int(flat.sum())
            self.saturated = self._flat / max(self._outputs, 1)
        if off is not None and y.dim() >= 2:
            ever_on = ~off.all(dim=[other for other in range(y.dim()) if other != dim % y.dim()])
            if self._ever_on is not None and self._ever_on.shape == ever_on.shape:
                ever_on |= self._ever_on
            self._ever_on = ever_on
            self.samples += y.numel() // max(len(ever_on), 1)
            self.dead = 1 - float(ever_on.double().mean())


@dataclass
class Probe:
    """What one step showed.

    Attributes:
        layers: in the order in which they first ran.
        loss: the loss.
        total_norm: the norm of all gradients together.
        origin: where nan or inf in the loss or the gradients came from; None if all is finite or it is
            unknown.
        time_steps: the gradients of the hidden states of recurrent layers.
    """

    layers: list[Layer]
    loss: float
    total_norm: float
    origin: Origin | None = None
    time_steps: list[TimeSteps] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and not any(layer.nonfinite for layer in self.layers)


class _Observer(TorchDispatchMode):
    """Observes the calls of layers through hooks, and every operator as a dispatch mode.

    Attributes:
        phase: "forward", "loss" or "backward", as set by the caller.
        layer: the layer whose forward ran last; in the backward pass, whose output got its gradient last.
        called: layer -> the position of its first call among those of all layers.
        outputs: layer -> the nodes of the graph that made its outputs.
        tracker: follows nan and inf.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.phase = "forward"
        self.layer: Layer | None = None
        self.called: dict[str, int] = {}
        self.outputs: dict[str, list[Node]] = {}
        self.tracker = NonfiniteTracker()
        # The running module without parameters, which may be an activation.
        self._module: str | None = None
        # The dimension along which the units of the last output lie.
        self._unit_dim = 1
        self._in_gated = False
        # Storage of a sigmoid's output -> the layer before it. The graph keeps the storage alive.
        self._gates: dict[int, Layer] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        for layer in layers.values():
            self.outputs[layer.name] = []
            self._handles.append(layer.module.register_forward_pre_hook(partial(self._before_layer, layer)))
            self._handles.append(layer.module.register_forward_hook(partial(self._after_layer, layer), with_kwargs=True))
        for name, module in model.named_modules():
            if not any(True for _ in module.children()) and not any(True for _ in module.parameters()):
                self._handles.append(module.register_forward_pre_hook(partial(self._set_module, name)))
                self._handles.append(module.register_forward_hook(partial(self._set_module, None)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_layer(self, layer: Layer, module: nn.Module, args: tuple[Any, ...]) -> None:
        layer.called += 1
        self.called.setdefault(layer.name, len(self.called))
        self.layer, self._unit_dim, self._in_gated = layer, unit_dim(module, self._unit_dim), isinstance(module, _GATED)

    def _after_layer(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._in_gated = False
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            layer.batch_statistics |= module.training or module.running_mean is None
        # A module that holds other layers returns their outputs.
        is_innermost = not any(True for child in module.children() for _ in child.parameters())
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for y in tree_leaves(output):
            if isinstance(y, Tensor) and y.is_floating_point() and y.numel():
                if y.requires_grad:
                    self._handles.append(y.register_hook(partial(self._set_layer, layer)))
                if is_innermost:
                    layer.observe_output(y, inputs, self._unit_dim)
                if is_innermost and y.grad_fn is not None:
                    self.outputs[layer.name].append(y.grad_fn)

    def _set_layer(self, layer: Layer, grad: Tensor) -> None:
        self.layer = layer

    def _set_module(self, name: str | None, *call: Any) -> None:
        self._module = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.tracker.run(func, args, kwargs or {}, self.phase, self._where)
        name = operator_name(func)
        if self.phase != "backward" and self.layer is not None and not self._in_gated and name in _ACTS and args[0].numel():
            y = args[0] if is_written(func._schema.arguments[0]) else result
            _observe_activation(self.layer, _ACTS[name], args, y, self._unit_dim)
            self.layer.act_module = self._module
            if "sigmoid" in name:
                self._gates[storage_of(result)] = self.layer
        if name == "mul" and self.phase == "forward":
            for one, other in (args, args[::-1]):
                if isinstance(one, Tensor) and isinstance(other, Tensor) and other.requires_grad and storage_of(one) in self._gates:
                    self._gates[storage_of(one)].gated = True
        return result

    def _where(self) -> str:
        if self.phase == "loss":
            return "in the loss"
        if self.phase == "forward":
            return "before the first layer" if self.layer is None else f"in or after layer {self.layer.name}"
        return "in the backward pass" + ("" if self.layer is None else f", at layer {self.layer.name} or just before it")


def _observe_activation(layer: Layer, act: str, args: Sequence[Any], result: Any, dim: int) -> None:
    """Record what an operator that is an activation did to the outputs of a layer."""
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
        flat = y * (1 - y) < FLAT_SLOPE / 4
    elif act == "tanh":
        flat = 1 - y.square() < FLAT_SLOPE
    elif act == "elu" and isinstance(param, int | float):
        # The slope left of 0 is y + alpha. selu runs as an elu that is then scaled.
        scale = args[2] if len(args) > 2 and isinstance(args[2], float) else 1.0
        flat = y < (FLAT_SLOPE - 1) * param * scale
    elif act == "hardsigmoid":
        flat = (y <= 0) | (y >= 1)
    elif act == "hardtanh":
        flat = (y <= low) | (y >= high)
    elif act == "relu6":
        flat = y >= 6
    layer.observe_activation(act, y, flat, y <= 0 if act in ("relu", "relu6") else None, dim)


def probe(model: nn.Module, inputs: Any, targets: Any, loss_fn: Callable[[Any, Any], Any]) -> Probe:
    """Run loss_fn(model(inputs), targets) forward and backward once in training mode, and observe it.

    A model in training mode keeps the flags of its modules, because some may be frozen. A model in evaluation
    mode is switched as a whole.
    """
    model = unwrapped(model)
    parameters = _learning_parameters(model)
    layers: dict[str, Layer] = {}
    for name in parameters:
        layer = layers.setdefault(layer_name(name), Layer(layer_name(name), model.get_submodule(name.rpartition(".")[0])))
        layer.parameters.append(name)
    observer, over_time = _Observer(), TimeStepObserver()
    with preserved(model, inputs, targets), ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        observer.tracker.record_initial_nonfinite(model, inputs, targets)
        try:
            observer.attach(model, layers)
            over_time.attach(model)
            if not model.training:
                model.train()
            with observer:
                y = model(inputs)
                observer.phase = "loss"
                loss = loss_fn(y, targets)
                _check_loss(loss)
                over_time.watch()
                observer.phase, observer.layer = "backward", None
                grads = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
            _check_gradients(grads)
        finally:
            observer.detach()
            over_time.detach()
        in_order = [layers[name] for name in by_first_call(layers, observer.called)]
        parameters_of = {layer.name: [parameters[name] for name in layer.parameters] for layer in in_order}
        _relate(in_order, BackwardGraph(loss, parameters_of, observer.outputs))
        total_norm = _read_norms(in_order, parameters, grads)
        tracker = observer.tracker
        origin = tracker.origin_of(nonfinite(loss.detach())) or tracker.origin_of(nonfinite(grads))
        return Probe(in_order, loss.item(), total_norm, origin, over_time.norms())


def _learning_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if learns(parameter)}
    kind = type(model).__name__
    if not parameters:
        raise ValueError(f"{kind} has no parameters that require a gradient: there is nothing to diagnose")
    if any(map(is_lazy, parameters.values())):
        raise ValueError(f"{kind} has parameters without a shape: run it on a batch first")
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError(f"{kind} has parameters without values, on the meta device: move it to another device with to_empty()")
    return parameters


def _check_loss(loss: object) -> None:
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


def _check_gradients(grads: Sequence[Tensor | None]) -> None:
    if all(grad is None for grad in grads):
        raise RuntimeError(
            "the loss does not depend on any parameter of the model itself. A model that computes with copies of its parameters, as "
            "under FullyShardedDataParallel, has to be diagnosed before it is wrapped"
        )


def _relate(in_order: Sequence[Layer], graph: BackwardGraph) -> None:
    """Set what a layer has from the layers around it."""
    for following, layer in pairwise(reversed(in_order)):
        passes_on = following.normalised and isinstance(following.module, WEIGHTS) and layer.act in _HOMOGENEOUS
        layer.normalised = isinstance(following.module, NORMS) or passes_on
    by_name = {layer.name: layer for layer in in_order}
    for layer in in_order:
        layer.layers_after = [by_name[name] for name in graph.layers_after[layer.name]]
        layer.has_skip = layer.name in graph.skip_targets
        layer.unavoidable = [after for after in layer.layers_after if layer.name not in graph.skip_targets.get(after.name, ())]


def _read_norms(layers: Sequence[Layer], parameters: Mapping[str, nn.Parameter], grads: Sequence[Tensor | None]) -> float:
    """Set the norms of weights and gradients, in one pass over both. Return the norm of all gradients."""
    grad_of = {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    weights = [parameter.detach() for parameter in parameters.values()]
    norms, _, nonfinite_counts, _ = tensor_norms([*weights, *grad_of.values()])
    weight = dict(zip(parameters, norms.tolist(), strict=False))
    gradient = dict(zip(grad_of, norms[len(weights) :].tolist(), strict=True))
    counts = dict(zip(grad_of, nonfinite_counts[len(weights) :].tolist(), strict=True))
    for layer in layers:
        names = [name for name in layer.parameters if name in grad_of]
        if names:
            layer.gradient = math.hypot(*(gradient[name] for name in names))
            layer.nonfinite = sum(counts[name] for name in names)
        layer.weight = math.hypot(*(weight[name] for name in layer.parameters))
    return math.hypot(*gradient.values())
