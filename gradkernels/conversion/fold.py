"""fold(model): a copy for inference, with batch norms folded into the layers before them.

A convolution or linear layer is folded only if nothing but the batch norm uses its output, and if both are
called once in all forwards. Forwards are read as convert reads them. The new weights are computed in float64
and rounded once.
"""

import collections
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn.modules.batchnorm import _BatchNorm

from gradkernels.acts import ACTS
from gradkernels.batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from gradkernels.conversion import trace
from gradkernels.conversion.attributes import OF_EVERY_MODULE, held, is_comparable
from gradkernels.conversion.bytecode import CLASS_ATTRIBUTES, CLASS_FUNCTION, CLASS_TESTS
from gradkernels.conversion.convert import revert
from gradkernels.conversion.guard import has_hooks
from gradkernels.conversion.norm_act_layers import applied_modules
from gradkernels.conversion.patterns import CONTAINERS, NORMS, is_batch_norm, is_frozen_elsewhere
from gradkernels.conversion.purity import goes_by_names, names_from_forward, own_classes
from gradkernels.frozen_batch_norm_act import FrozenBatchNormAct2d
from gradkernels.layers import check_model

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
# Names by which a forward reaches submodules that its code does not name, or switches the mode of all.
_BY_OTHER_NAMES = frozenset(
    (
        *("__dict__", "_modules", "modules", "named_modules", "children", "named_children", "get_submodule", "vars"),
        *("apply", "eval", "train", "parameters", "named_parameters", "buffers", "named_buffers", "state_dict"),
    )
)
# Methods that Python calls for a[b], for iteration and for names.
_BY_PYTHON = frozenset(("__iter__", "__getitem__", "__getattr__"))
# Names by which a forward can tell a batch norm from its replacement.
_ASKING = CLASS_TESTS | CLASS_ATTRIBUTES | {CLASS_FUNCTION}


class FoldedBatchNorm1d(nn.Identity):
    """Replaces a batch norm that was folded into a linear layer, which is right for inputs (N, C) only."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 2:
            raise ValueError(
                f"expected 2D input (got {input.dim()}D input): a batch norm over (N, C, L) cannot be folded into a linear layer"
            )
        return input


def fold(model: nn.Module) -> nn.Module:
    """A copy of a model for inference, with each batch norm folded into the layer before it.

        weight' = weight s,  bias' = (bias - mean) s + beta,  s = gamma / sqrt(var + eps)

    The copy is in evaluation mode. Its outputs are those of the model in evaluation, up to rounding.
    Activations stay. A batch norm stays if it does not follow a convolution or a linear layer, or if forwards
    cannot be read for certain. The model may be converted or not, and is not changed. Use only the forward of
    the copy: another method that calls a folded layer gives other results.

    Args:
        model: any module. Batch norms without running statistics stay.

    Returns:
        The copy. It has nn.Identity, or the activation that the batch norm applied, in place of a batch norm.

    Raises:
        TypeError: model is not a module.
        ValueError: in the forward of the copy, if the input of a folded linear layer is not (N, C).

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2017.

    Example:
        >>> import torch, gradkernels as gk
        >>> from torch import nn
        >>> gk.fold(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    check_model(model)
    # In a holder, so that a model that is itself a batch norm can be replaced.
    holder = nn.ModuleList([revert(copy.deepcopy(model)).eval()])
    graphs, used_once = _uses(holder[0])
    tied = _tied_parameters(holder)
    for block, graph in graphs.items():
        for node in list(graph.nodes):
            pair = _pair(block, node)
            if pair is None or not used_once.issuperset(pair):
                continue
            layer, bn = pair
            if tied.isdisjoint(map(id, layer.parameters())):
                replacement = _replacement(layer, bn)
                if replacement is not None:
                    _fold(layer, bn)
                    _replace(holder, bn, replacement.train(False))
    return holder[0]


def _uses(model: nn.Module) -> tuple[dict[nn.Module, Graph], set[nn.Module]]:
    """The graphs of forwards that can be read, and the modules that they call once and nothing else uses."""
    graphs: dict[nn.Module, Graph] = {}
    # Modules that a forward, a hook or another method may use in a way that no graph shows.
    within_reach: set[nn.Module] = set()
    uses: collections.Counter[nn.Module] = collections.Counter()
    for block in model.modules():
        if has_hooks(block):
            within_reach.update(block.modules())
        if trace.has_own_forward(block):
            reading = trace.read_evaluation(block)
            if reading is None:
                within_reach.update(_within_reach(block, names_from_forward(type(block)), is_first=True))
                continue
            if not _ASKING.isdisjoint(names_from_forward(type(block))):
                # Code that asks for a class could tell nn.Identity from a batch norm.
                within_reach.update(module for child in block.children() for module in _with_contents(child))
            graph, paths = reading
            graphs[block] = graph
            uses.update(block.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module")
            # A module whose attributes or submodules are used must stay, so it counts as used twice.
            targets = [str(node.target).split(".") for node in graph.nodes if node.op in ("get_attr", "call_module")]
            paths |= {tuple(target[:depth]) for target in targets for depth in range(1, len(target))}
            uses.update({block.get_submodule(".".join(path)): 2 for path in paths if path})
    used_once = {module for module, count in uses.items() if count == 1 and not has_hooks(module)}
    return graphs, used_once - within_reach


def _with_contents(child: nn.Module) -> Iterator[nn.Module]:
    """A submodule and, if it is a container that a forward may loop over, the modules in it."""
    yield child
    if isinstance(child, CONTAINERS):
        for module in child.children():
            yield from _with_contents(module)


def _within_reach(block: nn.Module, names: set[str], is_first: bool = False) -> Iterator[nn.Module]:
    """The modules that a forward may use other than by calling blocks, if it could not be read.

    Args:
        block: the module whose forward it is, or a module below it that it reaches.
        names: the names in the code of the forward.
        is_first: whether `block` is the module whose forward it is.
    """
    own = [value for name, value in block.__dict__.items() if name not in OF_EVERY_MODULE]
    if is_first:
        is_known = goes_by_names(type(block)) and all(map(_is_plain, own))
    else:
        # A method of the user's may use any module below it.
        is_known = _own_members(type(block)).isdisjoint(names | _BY_PYTHON)
    if not is_known:
        yield from block.modules()
        return
    all_children = is_first or isinstance(block, CONTAINERS) or not names.isdisjoint(_BY_OTHER_NAMES)
    for name, child in block.named_children():
        if all_children or name in names:
            yield child
            yield from _within_reach(child, names)
    for value in own:
        for module in held(value):
            if isinstance(module, nn.Module):
                yield from module.modules()


def _is_plain(value: Any) -> bool:
    """Whether a value holds modules only where _within_reach looks for them."""
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (nn.Module, Tensor)) or is_comparable(value)


def _own_members(kind: type) -> set[str]:
    """The names of the methods and properties of a class that are not torch's, without forward."""
    return {name for base in own_classes(kind) for name in vars(base)} - {"forward"}


def _tied_parameters(model: nn.Module) -> set[int]:
    """id() of the parameters that more than one module has."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _pair(block: nn.Module, node: Node) -> tuple[nn.Module, nn.Module] | None:
    """A layer and a batch norm, if a node calls the batch norm with the output of the layer, its only use."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    bn = block.get_submodule(str(node.target))
    (before,) = node.args
    if not is_batch_norm(bn) or not isinstance(before, Node) or before.op != "call_module" or len(before.users) != 1:
        return None
    layer = block.get_submodule(str(before.target))
    if type(layer) not in _LAYERS or len(before.args) != 1 or before.kwargs:
        return None
    return layer, bn


def _replacement(layer: Any, bn: Any) -> nn.Module | None:
    """The module that replaces the batch norm; None if the batch norm has to stay."""
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    # Some models keep a batch norm in training mode in eval(). It normalises by the batch.
    if bn.running_mean is None or bn.running_var is None or len(bn.running_mean) != channels:
        return None
    if bn.training and isinstance(bn, _BatchNorm):
        return None
    place: nn.Module = FoldedBatchNorm1d() if isinstance(layer, nn.Linear) else nn.Identity()
    if type(bn) in NORMS or is_frozen_elsewhere(bn):
        return place
    if isinstance(bn, (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, FrozenBatchNormAct2d)):
        return place if bn.act == "identity" else nn.Sequential(place, ACTS[bn.act].module(bn.act_param))
    layers = applied_modules(bn)
    return None if layers is None else nn.Sequential(place, *layers)


def _fold(layer: Any, bn: Any) -> None:
    """Writes the weights of a layer that compute the batch norm too."""
    with torch.no_grad():
        running_mean, running_var = (x.double() for x in (bn.running_mean, bn.running_var) if x is not None)
        scale = (running_var + bn.eps).rsqrt()
        if bn.weight is not None:
            scale = scale * bn.weight.double()
        shift = torch.zeros_like(scale) if bn.bias is None else bn.bias.double()
        bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double()
        weight = layer.weight.double()
        if type(layer) in _TRANSPOSED:
            # The weight is (in, out / groups, ...): each group has its own inputs.
            grouped = weight.view(layer.groups, -1, *weight.shape[1:])
            weight = (grouped * scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).view_as(weight)
        else:
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        bias = (bias - running_mean) * scale + shift
        layer.weight = nn.Parameter(weight.to(layer.weight), layer.weight.requires_grad)
        layer.bias = nn.Parameter(bias.to(layer.weight), layer.weight.requires_grad)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
