"""fold(model): a copy for inference whose batch norms have gone into the weights of the convolutions and linear layers before them.

Where each goes is read as convert reads it. A layer is folded only where the batch norm alone reads its output and both are called in
one place of a forward; the new weights are computed in float64 and rounded once.
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
from gradkernels.conversion.norm_act_layers import layers_after
from gradkernels.conversion.patterns import BATCH_NORMS, CONTAINERS
from gradkernels.conversion.purity import goes_by_names, names_from_forward, own_classes

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
# How a forward comes to a submodule that its code does not name, or switches the modes of all.
_BY_OTHER_NAMES = frozenset(
    (
        *("__dict__", "_modules", "modules", "named_modules", "children", "named_children", "get_submodule", "vars"),
        *("apply", "eval", "train", "parameters", "named_parameters", "buffers", "named_buffers", "state_dict"),
    )
)
# Methods that Python calls for a[b], iteration and names.
_BY_PYTHON = frozenset(("__iter__", "__getitem__", "__getattr__"))
# How a forward tells a batch norm from what stands in its place.
_ASKING = CLASS_TESTS | CLASS_ATTRIBUTES | {CLASS_FUNCTION}


class FoldedBatchNorm1d(nn.Identity):
    """Stands where a batch norm was folded into a linear layer, whose last dimension is that of the channels in (N, C) only."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 2:
            raise ValueError(
                f"expected 2D input (got {input.dim()}D input): a batch norm over (N, C, L) cannot be folded into a linear layer"
            )
        return input


def fold(model: nn.Module) -> nn.Module:
    """A copy of a model for inference with each batch norm folded into the convolution or linear layer before it.

        weight' = weight s,  bias' = (bias - mean) s + beta,  s = gamma / sqrt(var + eps)

    The copy is in evaluation mode and gives the outputs that the model gives there, up to rounding; activations stay. A batch norm whose
    place cannot be read for certain, or that follows no such layer, stays too. The model may be converted or not, and is not changed.
    What counts is the forward: another method that uses a folded layer gives something else.

    Args:
        model: any module; its batch norms have running statistics.

    Returns:
        The copy; where a batch norm was, it has nn.Identity or the activation that the batch norm applied.

    Raises:
        TypeError: model is not a module.
        ValueError: in the copy's forward, an input of a linear layer that is not (N, C).

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2017.

    Example:
        >>> import torch, gradkernels as gk
        >>> gk.fold(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU()))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold takes a torch.nn.Module, not {type(model).__name__}")
    # A holder, so that a model that is itself a batch norm has a place to stand in.
    holder = nn.ModuleList([revert(copy.deepcopy(model)).eval()])
    graphs: dict[nn.Module, Graph] = {}
    within_reach: set[nn.Module] = set()
    # A module that is called once, and of which nothing is read, has 1.
    uses: collections.Counter[nn.Module] = collections.Counter()
    for block in holder[0].modules():
        if has_hooks(block):
            # A hook, or a forward of the instance's own, may use any of them.
            within_reach.update(block.modules())
        if trace.has_own_forward(block):
            reading = trace.read_evaluation(block)
            if reading is None:
                within_reach.update(_within_reach(block, names_from_forward(type(block)), is_first=True))
                continue
            if not _ASKING.isdisjoint(names_from_forward(type(block))):
                # What is an nn.Identity now would be told from a batch norm.
                within_reach.update(each for child in block.children() for each in _walked(child))
            graph, paths = reading
            graphs[block] = graph
            uses.update(block.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module")
            paths |= {tuple(str(node.target).split(".")[:-1]) for node in graph.nodes if node.op == "get_attr"}
            uses.update({block.get_submodule(".".join(path)): 2 for path in paths if path})
    tied = _tied_parameters(holder)
    for block, graph in graphs.items():
        for node in list(graph.nodes):
            pair = _pair(block, node)
            if pair is None or any(uses[each] != 1 or each in within_reach or has_hooks(each) for each in pair):
                continue
            layer, bn = pair
            if tied.isdisjoint(map(id, layer.parameters())):
                replacement = _replacement(layer, bn)
                if replacement is not None:
                    _fold(layer, bn)
                    _replace(holder, bn, replacement.train(False))
    return holder[0]


def _walked(child: nn.Module) -> Iterator[nn.Module]:
    """A submodule, and what it holds where it is a container that a forward goes through."""
    yield child
    if isinstance(child, CONTAINERS):
        for each in child.children():
            yield from _walked(each)


def _within_reach(block: nn.Module, names: set[str], is_first: bool = False) -> Iterator[nn.Module]:
    """What a forward that could not be read may use besides calling blocks: what it names, and what containers and lists hold."""
    own = [value for name, value in block.__dict__.items() if name not in OF_EVERY_MODULE]
    if is_first:
        is_seen = goes_by_names(type(block)) and all(map(_is_plain, own))
    else:
        # A method of its own does with it what it likes.
        is_seen = _own_members(type(block)).isdisjoint(names | _BY_PYTHON)
    if not is_seen:
        yield from block.modules()
        return
    all_of_them = is_first or isinstance(block, CONTAINERS) or not names.isdisjoint(_BY_OTHER_NAMES)
    for name, child in block.named_children():
        if all_of_them or name in names:
            yield child
            yield from _within_reach(child, names)
    for value in own:
        for each in held(value):
            if isinstance(each, nn.Module):
                yield from each.modules()


def _is_plain(value: Any) -> bool:
    """Whether a value holds modules only where _within_reach looks for them."""
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (nn.Module, Tensor)) or is_comparable(value)


def _own_members(kind: type) -> set[str]:
    """Names of the methods and properties of a class that are not torch's, besides forward, which is called."""
    return {name for each in own_classes(kind) for name in vars(each)} - {"forward"}


def _tied_parameters(model: nn.Module) -> set[int]:
    """Parameters that more than one module has."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _pair(block: nn.Module, node: Node) -> tuple[nn.Module, _BatchNorm] | None:
    """The layer and the batch norm of a node that calls the one with the output of the other, which nothing else reads."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    bn = block.get_submodule(str(node.target))
    (before,) = node.args
    if not isinstance(bn, _BatchNorm) or not isinstance(before, Node) or before.op != "call_module" or len(before.users) != 1:
        return None
    layer = block.get_submodule(str(before.target))
    if type(layer) not in _LAYERS or len(before.args) != 1 or before.kwargs:
        return None
    return layer, bn


def _replacement(layer: Any, bn: _BatchNorm) -> nn.Module | None:
    """What is to stand where the batch norm stands, None where it has to stay."""
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    # One that an eval() of its model's keeps in training normalises by the batch.
    if bn.training or bn.running_mean is None or bn.running_var is None or bn.num_features != channels:
        return None
    place: nn.Module = FoldedBatchNorm1d() if isinstance(layer, nn.Linear) else nn.Identity()
    if type(bn) in BATCH_NORMS:
        return place
    if isinstance(bn, (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)):
        return place if bn.act == "identity" else nn.Sequential(place, ACTS[bn.act].module(bn.act_param))
    applied = layers_after(bn)
    return None if applied is None else nn.Sequential(place, *applied)


def _fold(layer: Any, bn: _BatchNorm) -> None:
    with torch.no_grad():
        running_mean, running_var = (each.double() for each in (bn.running_mean, bn.running_var) if each is not None)
        scale = (running_var + bn.eps).rsqrt()
        if bn.weight is not None:
            scale = scale * bn.weight.double()
        shift = torch.zeros_like(scale) if bn.bias is None else bn.bias.double()
        bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double()
        weight = layer.weight.double()
        if type(layer) in _TRANSPOSED:
            # (in, out / groups, ...), of which each group has its own part of the inputs.
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
