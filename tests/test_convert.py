"""convert, revert and fold, compared with the same network as torch computes it.

The comparisons are in float64, in which rounding cannot hide another difference. Tests count the operators
that run to see what is fused. LEFT is a table of forwards that must be left alone, with the reasons.
"""

import abc
import collections
import contextlib
import copy
import cProfile
import dataclasses
import functools
import gc
import importlib
import io
import math
import operator
import os
import pathlib
import pickle
import pickletools
import random
import re
import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.random
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.prune import l1_unstructured
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradkernels as gk
from gradkernels import conversion
from gradkernels.acts import resolve_act
from gradkernels.conversion import attributes, border, check, guard, patterns, purity, rewrite, trace
from gradkernels.conversion.result import Reason
from models import libraries
from models.darknet import DarkNet
from models.dcgan import discriminator
from models.efficientnet import EfficientNetBlocks
from models.frozen import FrozenBatchNorm2d
from models.mlp import perceptron, perceptron_activation_first
from models.resnet import BasicBlock, resnet18, resnet50
from models.unet import UNet
from test_frozen_batch_norm_act import randomised

IMAGES = (4, 3, 32, 32)
# The norms whose class conversion may change.
WITH_OUR_CLASS = (_BatchNorm, nn.GroupNorm, _InstanceNorm)
# name -> (the network, the shape of a batch, how often each fused operator runs in a step).
NETWORKS = {
    "ResNet-18": (functools.partial(resnet18, width=16), IMAGES, {"relu": 9, "relu, residual": 8, "identity": 3}),
    "ResNet-50": (functools.partial(resnet50, width=8), (6, 3, 64, 64), {"relu": 33, "relu, residual": 16, "identity": 4}),
    "DarkNet": (functools.partial(DarkNet, (1, 1, 2, 1, 1), 8), IMAGES, {"leaky_relu": 18}),
    "EfficientNet": (EfficientNetBlocks, IMAGES, {"swish": 9, "identity": 3, "identity, residual": 1}),
    "DCGAN": (functools.partial(discriminator, 8), (4, 3, 64, 64), {"leaky_relu": 3}),
    "U-Net": (functools.partial(UNet, 8, 2), IMAGES, {"elu": 10}),
    "MLP": (perceptron, (16, 20), {"relu": 3}),
    "MLP, activation first": (perceptron_activation_first, (16, 20), {"identity": 3}),
    "timm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            libraries.BatchNormAct2d(8, act_layer=nn.SiLU),
            libraries.BatchNormAct2d(8, False),
            libraries.BatchNormAct2d(8, act_layer=nn.Hardswish),
            libraries.BatchNormAct2d(8, act_layer=libraries.GELU),
            libraries.BatchNormAct2d(8, drop=nn.FeatureAlphaDropout(0.0)),
        ),
        IMAGES,
        {"swish": 1, "hardswish": 1, "gelu": 1, "identity": 2},
    ),
    "Ultralytics": (
        lambda: nn.Sequential(libraries.Conv(3, 8, 3), libraries.C2f(8, 8, 2), libraries.Conv(8, 8, act=False)),
        IMAGES,
        {"swish": 7, "identity": 1},
    ),
    "diffusers": (libraries.DiffusionBlocks, IMAGES, {"group swish": 7}),
    "MONAI": (
        lambda: nn.Sequential(libraries.UnetResBlock(3, 8), libraries.UnetResBlock(8, 8)),
        IMAGES,
        {"group leaky_relu": 2, "group leaky_relu, residual": 2, "group identity": 1},
    ),
    "timm, group norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            libraries.GroupNormAct(8),
            libraries.GroupNormAct(8, act=libraries.GELU(), drop=nn.Dropout(0.0)),
            nn.Conv2d(8, 8, 3),
            libraries.GroupNorm(8),
            nn.ReLU6(),
        ),
        IMAGES,
        {"group relu": 1, "group gelu": 1, "group relu6": 1},
    ),
    "torchvision": (
        lambda: nn.Sequential(libraries.Conv2dNormActivation(3, 8), libraries.Conv2dNormActivation(8, 8, 2, None)),
        IMAGES,
        {"relu": 1, "identity": 1},
    ),
}


def network(name, dtype=torch.float64):
    """A network whose batch norms are not the identity, and a batch."""
    make, shape, _ = NETWORKS[name]
    model = make().to(dtype)
    for module in model.modules():
        if isinstance(module, WITH_OUR_CLASS):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return model, torch.randn(shape, dtype=dtype)


def flat(output):
    if isinstance(output, collections.OrderedDict) or dataclasses.is_dataclass(output):
        (output,) = vars(output).values() if dataclasses.is_dataclass(output) else output.values()
    return torch.cat([each.flatten() for each in output if isinstance(each, torch.Tensor)]) if isinstance(output, list) else output


def step(model, x):
    """The results of one training step: the output, gradients of x and of the parameters, and the buffers."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = flat(model(x * 1))
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    grads = {f"gradient of {name}": each.grad for name, each in model.named_parameters()}
    return {"output": y.detach(), "gradient of x": x.grad, **grads, **{name: each.clone() for name, each in model.named_buffers()}}


def assert_same(actual, expected, bound=1e-7):
    """Compares two steps up to rounding in float64, which deep networks enlarge.

    The unit is the largest value of a tensor; for gradients, the largest value of all gradients.
    """
    assert actual.keys() == expected.keys()
    largest = max((each.abs().max() for name, each in expected.items() if name.startswith("gradient") and each is not None), default=0)
    for name, each in expected.items():
        if each is None:
            assert actual[name] is None, name
            continue
        unit = max(each.abs().max().item(), float(largest) if name.startswith("gradient") else 0, 1e-3)
        assert (actual[name] - each).abs().max().item() <= bound * unit, name


class Operators(TorchDispatchMode):
    """Counts the norms and activations that run: ours by act and residual, torch's by name."""

    TORCHS = ("batch_norm", "group_norm", "relu", "elu", "silu", "leaky_relu", "hardtanh", "hardswish")

    def __init__(self):
        super().__init__()
        self.ours, self.torchs = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name == "gradkernels::batch_norm_act":
            self.ours[args[-2] + (", residual" if args[5] is not None else "")] += 1
        elif name == "gradkernels::group_norm_act":
            self.ours["group " + args[-2] + (", residual" if args[4] is not None else "")] += 1
        elif name.startswith("aten::") and any(each in name for each in self.TORCHS):
            self.torchs[name] += 1
        return function(*args, **(kwargs or {}))


def operators(model, *args, **kwargs):
    with torch.no_grad(), Operators() as seen:
        model(*args, **kwargs)
    return seen


# whole networks


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_three_steps_of_a_converted_network_are_those_of_torch(name):
    expected, x = network(name)
    actual = copy.deepcopy(expected)
    # The optimizers are made before conversion, and train the parameters after it.
    optimizers = {model: torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9) for model in (expected, actual)}
    gk.convert(actual)
    for _ in range(3):
        assert_same(step(actual, x), step(expected, x))
        for model in (expected, actual):
            optimizers[model].step()
    assert_same(actual.state_dict(), expected.state_dict())
    with torch.no_grad():
        assert_same({"output": flat(actual.eval()(x))}, {"output": flat(expected.eval()(x))})


@pytest.mark.parametrize("name", NETWORKS)
def test_what_runs_is_fused(name):
    model, x = network(name)
    gk.convert(model)
    seen = operators(model, x)
    assert seen.ours == NETWORKS[name][2]
    assert "aten::native_batch_norm" not in seen.torchs and "aten::_native_batch_norm_legit" not in seen.torchs


@pytest.mark.parametrize("name", NETWORKS)
def test_conversion_keeps_all_but_classes_and_revert_gives_them_back(name):
    model, x = network(name)
    plain = copy.deepcopy(model)
    modules, tensors = dict(model.named_modules()), dict(model.state_dict(keep_vars=True))
    classes = {key: type(module) for key, module in modules.items()}
    states = {key: dict(module.__dict__) for key, module in modules.items()}
    gk.convert(model)
    assert dict(model.named_modules()) == modules and list(model.state_dict()) == list(tensors)
    assert all(each is tensors[key] for key, each in model.state_dict(keep_vars=True).items())
    assert all(
        (isinstance(module, classes[key]) and type(module).__name__ == classes[key].__name__) or isinstance(module, WITH_OUR_CLASS)
        for key, module in modules.items()
        if type(module) not in patterns.ACTIVATION_MODULES.values()
    )
    assert gk.revert(model) is model
    assert {key: type(module) for key, module in model.named_modules()} == classes
    assert {key: module.__dict__ for key, module in model.named_modules()} == states
    assert_same(step(model, x), step(plain, x), bound=0)


def through_pickle(model):
    data = pickle.dumps(model)
    # Another process makes the classes again.
    conversion.block._CLASSES.clear()
    return pickle.loads(data)


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle, through_torch_save], ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", ["ResNet-18", "timm"])
def test_copies_of_a_converted_model(name, copied):
    model, x = network(name)
    expected = step(copy.deepcopy(model), x)
    gk.convert(model)
    made = copied(model)
    assert operators(copy.deepcopy(made), x).ours == NETWORKS[name][2]
    assert_same(step(made, x), expected)
    gk.revert(made)
    assert not any(attributes.base_class(type(module)) for module in made.modules())


def test_a_pickle_names_nothing_internal():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), BasicBlock(8, 8, 1), nn.SiLU(), nn.LeakyReLU(), nn.Conv2d(8, 8, 1), nn.SiLU())
    gk.convert(model)
    strings = [argument for _, argument, _ in pickletools.genops(pickle.dumps(model)) if isinstance(argument, str)]
    # Later versions have to keep these names.
    assert {each for each in strings if "gradkernels" in each or "block" in each.lower()} == {
        "gradkernels.activation",
        "gradkernels.batch_norm_act",
        "gradkernels.conversion.block",
        "new_block",
        "BasicBlock",
    }


def without_the_second(forward):
    @functools.wraps(forward)
    def wrapper(self, x):
        output = forward(self, x)
        if len(output) > 1:
            output = type(output)(output[:1])
        return output

    return wrapper


def of_a_batch_norm(forward):
    @functools.wraps(forward)
    def wrapper(self, x):
        output = self.child.bn
        x = x if type(output) is nn.BatchNorm2d else x * 2
        output = forward(self, x)
        return output

    return wrapper


def of_its_argument(forward):
    @functools.wraps(forward)
    def wrapper(self, x):
        if type(x) is nn.BatchNorm2d:
            x = forward(self, x)
        return x

    return wrapper


@pytest.mark.parametrize(
    ("wrap", "is_read"),
    [(without_the_second, True), (of_a_batch_norm, False), (of_its_argument, False)],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_the_class_of_what_a_forward_returns(wrap, is_read):
    @wrap
    def forward(self, x):
        with torch.enable_grad():
            y = self.child(x)
        return y, x

    child = Changing()
    expected, actual, report = converted(block(forward, child=child.double()))
    assert next(row for row in report.rows if row.name == "child.bn").is_fused == is_read, report
    x = X()
    torch.testing.assert_close(actual(x), expected(x))


class SharesItsActivation(nn.Module):
    """Uses one activation of its class for all instances, as ultralytics' Conv."""

    default, more = nn.SiLU(), {"block": BasicBlock(3, 3, 1), "acts": [nn.LeakyReLU()]}

    def __init__(self):
        super().__init__()
        self.bn, self.act, self.other, self.block = nn.BatchNorm2d(3), self.default, self.more["acts"][0], self.more["block"]

    def forward(self, x):
        return self.other(self.act(x) + self.block(self.act(self.bn(x))))


def test_a_module_of_a_class_keeps_its_class():
    kinds = [type(module) for module in SharesItsActivation().modules()]
    model = SharesItsActivation().double()
    expected = copy.deepcopy(model)
    report = gk.convert(model)
    assert [type(module) for module in SharesItsActivation().modules()] == kinds
    assert next(row.why for row in report.rows if row.name == "other") == (
        "it is an attribute of the class SharesItsActivation, which other models share"
    )
    x = X()
    assert_same(step(model, x), step(expected, x))
    assert operators(model, x).ours == {"swish": 1}


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.bn(x))


def test_a_pickle_computes_what_its_class_does_where_it_is_loaded(monkeypatch):
    model = Changing()
    gk.convert(model)
    data = pickle.dumps(model)
    for forward, act in ((lambda self, x: F.elu(self.bn(x)), "elu"), (lambda self, x, y=None: self.bn(x), "identity")):
        monkeypatch.setattr(Changing, "forward", forward)
        conversion.block._CLASSES.clear()
        assert operators(pickle.loads(data), torch.randn(4, 3, 5, 5)).ours == {act: 1}


@pytest.mark.parametrize("name", ["ResNet-18", "DarkNet", "EfficientNet", "DCGAN", "U-Net", "MLP", "torchvision"])
def test_torch_fx_traces_a_converted_network_as_it_traces_the_network(name):
    model, x = network(name)
    names = [str(node) for node in torch.fx.symbolic_trace(model).graph.nodes if node.op == "call_module" and "bn" in str(node)]
    gk.convert(model)
    traced = torch.fx.symbolic_trace(model)
    assert [str(node) for node in traced.graph.nodes if node.op == "call_module" and "bn" in str(node)] == names
    assert_same({"output": flat(traced(x)).detach()}, {"output": flat(copy.deepcopy(model)(x)).detach()})


def test_torch_fx_sees_the_residual_of_a_leaf_and_no_leaf_in_the_root():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = gk.BatchNormAct2d(3)

        def forward(self, x):
            return self.bn(x, x)

    model, x = Normalised(), torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(gk.BatchNormAct2d(3))


def test_a_copy_computes_with_its_own_parameters():
    model, x = network("ResNet-18")
    gk.convert(model)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert step(copied, x)["output"].abs().max() > 0


def test_torch_compile_takes_it_in_one_graph():
    expected, actual, _ = converted(nn.Sequential(libraries.Conv(3, 8, 3), BasicBlock(8, 8, 1)).double())
    x = X()
    compiled = torch.compile(actual, fullgraph=True, backend="aot_eager")
    assert_same({key.replace("_orig_mod.", ""): each for key, each in step(compiled, x).items()}, step(expected, x))


def test_distributed_data_parallel(process_group):
    model, x = network("MLP")
    expected = step(copy.deepcopy(model), x)
    gk.convert(model)
    actual = step(nn.parallel.DistributedDataParallel(model), x)
    assert_same({key.replace("module.", ""): each for key, each in actual.items()}, expected)


def test_memory_format_and_device_of_the_result():
    model, x = network("ResNet-18", torch.float32)
    model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    expected = model.layer1(model.conv1(x))
    gk.convert(model)
    assert model.layer1(model.conv1(x)).stride() == expected.stride()


def test_autocast():
    model, x = network("ResNet-18", torch.float32)
    plain = copy.deepcopy(model)
    gk.convert(model)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = model(x), plain(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.1, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet-50", "DarkNet"])
def test_large_networks_at_their_own_width(name):
    model = {"ResNet-50": resnet50, "DarkNet": DarkNet}[name]()
    plain, x = copy.deepcopy(model).double(), torch.randn(16, 3, 64, 64)
    report = gk.convert(model, check=x)
    exact = flat(plain(x.double()))
    eager = flat(copy.deepcopy(plain).float()(x))
    gradkernels = flat(model(x))
    errors = [(each - exact).abs().max().item() for each in (gradkernels, eager)]
    assert errors[0] <= 2 * errors[1], report


# one block, written in many ways


class Block(nn.Module):
    """A convolution, a batch norm and an activation. Each test adds a forward."""

    def __init__(self, act):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.act = act
        self.blocks = nn.ModuleList()
        self.flag = True
        self.seen = []


def block(forward, act=None, **attributes):
    model = type("Written", (Block,), {"forward": forward})(nn.ReLU(inplace=True) if act is None else act).double()
    nn.init.uniform_(model.bn.weight, 0.5, 1.5)
    nn.init.uniform_(model.bn.bias, -0.5, 0.5)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def converted(model, **arguments):
    """The model before conversion, the model after conversion, and the report."""
    actual = copy.deepcopy(model)
    report = gk.convert(actual, **arguments)
    return model, actual, report


X = functools.partial(torch.randn, 4, 3, 5, 5, dtype=torch.float64)


def add_(y, x):
    y += x
    return y


WRITTEN = {
    "module": (lambda self, x: self.act(self.bn(self.conv(x))), "relu"),
    "by name": (lambda self, x: self.act(input=self.bn(input=self.conv(input=x))), "relu"),
    "F.relu": (lambda self, x: F.relu(self.bn(x)), "relu"),
    "F.relu by name": (lambda self, x: F.relu(input=self.bn(x)), "relu"),
    "F.relu in place": (lambda self, x: F.relu(self.bn(x), inplace=True), "relu"),
    "F.relu_": (lambda self, x: F.relu_(self.bn(x)), "relu"),
    "torch.relu": (lambda self, x: torch.relu(self.bn(x)), "relu"),
    "method": (lambda self, x: self.bn(x).relu(), "relu"),
    "method in place": (lambda self, x: self.bn(x).relu_(), "relu"),
    "F.relu6": (lambda self, x: F.relu6(self.bn(x)), "relu6"),
    "F.leaky_relu": (lambda self, x: F.leaky_relu(self.bn(x), 0.2), "leaky_relu"),
    "F.leaky_relu by name": (lambda self, x: F.leaky_relu(self.bn(x), negative_slope=0.3, inplace=True), "leaky_relu"),
    "F.leaky_relu_": (lambda self, x: F.leaky_relu_(self.bn(x)), "leaky_relu"),
    "F.elu": (lambda self, x: F.elu(self.bn(x), 0.5), "elu"),
    "F.elu_": (lambda self, x: F.elu_(self.bn(x)), "elu"),
    "F.silu": (lambda self, x: F.silu(self.bn(x), inplace=True), "swish"),
    "gk.elu": (lambda self, x: gk.elu(self.bn(x), alpha=0.7), "elu"),
    "gk.swish": (lambda self, x: gk.swish(self.bn(x), 1.5), "swish"),
    "x + bn": (lambda self, x: self.act(x + self.bn(self.conv(x))), "relu, residual"),
    "bn + x": (lambda self, x: self.act(self.bn(self.conv(x)) + x), "relu, residual"),
    "torch.add": (lambda self, x: self.act(torch.add(self.bn(self.conv(x)), x)), "relu, residual"),
    "method add": (lambda self, x: self.act(self.bn(self.conv(x)).add(x)), "relu, residual"),
    "method add_": (lambda self, x: self.act(self.bn(self.conv(x)).add_(x)), "relu, residual"),
    "bn += x": (lambda self, x: self.act(add_(self.bn(self.conv(x)), x)), "relu, residual"),
    "elu(bn + x)": (lambda self, x: F.elu(self.bn(self.conv(x)) + x), "elu, residual"),
    "residual of another": (lambda self, x: (lambda y: F.elu(self.bn(self.conv(y)) + y))(F.elu(self.blocks[0](x))), "elu, residual", "elu"),
    "input and residual of two": (lambda self, x: F.elu(self.bn(self.conv(F.elu(self.blocks[0](x)))) + x), "elu, residual", "elu"),
    "sum without an activation": (lambda self, x: self.conv(self.bn(self.conv(x)) + x), "identity, residual"),
    "alone": (lambda self, x: self.conv(self.bn(x)), "identity"),
    "in a ModuleList": (lambda self, x: [x := self.act(each(x)) for each in self.blocks][-1], "relu"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_way_to_write_it(name):
    forward, *fused = WRITTEN[name]
    blocks = nn.ModuleList([nn.BatchNorm2d(3)]).double()
    expected, actual, report = converted(block(forward, blocks=blocks))
    x = X()
    assert operators(copy.deepcopy(actual), x).ours == dict.fromkeys(fused, 1), report
    assert_same(step(actual, x), step(expected, x))


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.ELU(0.5), nn.SiLU(), nn.SiLU(True), gk.Swish(1.5), gk.ELU()], ids=repr
)
def test_every_activation_module(module):
    expected, actual, _ = converted(nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), module).double())
    x = X()
    (fused,) = operators(copy.deepcopy(actual), x).ours
    assert fused == resolve_act(module, None)[0]
    assert_same(step(actual, x), step(expected, x))


@pytest.mark.parametrize("dropout", [nn.Dropout(0.0), nn.Dropout(0, inplace=True), nn.Dropout2d(0.0), nn.AlphaDropout(0.0)], ids=repr)
def test_a_dropout_that_drops_nothing(dropout):
    across = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(copy.deepcopy(dropout)))
    own = libraries.BatchNormAct2d(3, drop=copy.deepcopy(dropout))
    expected, actual, report = converted(nn.Sequential(nn.BatchNorm2d(3), dropout, nn.ReLU(), across, nn.ELU(), own).double())
    x = X()
    seen = operators(copy.deepcopy(actual), x).ours
    assert seen == {"relu": 2, "identity": 1}, report
    for p in (0.0, 0.5, torch.tensor(0.5)):
        for model in (expected, actual):
            for module in model.modules():
                if isinstance(module, type(dropout)):
                    module.p = p
        for training in (True, False):
            steps = []
            for model in (actual, expected):
                torch.manual_seed(0)
                steps.append(step(model.train(training), x))
            assert_same(*steps)


@pytest.mark.parametrize(
    "dropout",
    [
        nn.Dropout(0.5),
        nn.Dropout3d(0.0),
        type("Own", (nn.Dropout,), {"forward": lambda self, x: x * 2})(0.0),
    ],
    ids=repr,
)
def test_a_dropout_that_is_not_passed(dropout):
    expected, actual, report = converted(nn.Sequential(nn.BatchNorm2d(3), dropout, nn.ReLU()).double())
    assert not report.rows[0].is_fused and f"{type(dropout).__name__} follows" in report.rows[0].why, report
    x, steps = X(), []
    for model in (actual, expected):
        torch.manual_seed(0)
        steps.append(step(model, x))
    assert_same(*steps)


def writes_attribute(self, x):
    self.flag = False
    return self.act(self.bn(x))


def appends(self, x):
    self.notes.append(1)
    return self.act(self.bn(x))


def without_gradients(self, x):
    with torch.no_grad():
        y = self.bn(x)
    return self.act(y) + x


def in_full_precision(self, x):
    with torch.autocast("cpu", enabled=False):
        y = self.bn(x)
    return self.act(y)


@torch.enable_grad()
def with_gradients(y):
    return y * 2


def twice(self, x):
    y = self.bn(x)
    return self.act(y.clone()) + y


def into_the_other(self, x):
    x = self.conv(x)
    y = x.clone()
    y += self.bn(x)
    return F.relu(y)


def written_between(self, x):
    c = x.mul(2.0)
    y = self.bn(c)
    c.add_(1.0)
    return self.act(y + c)


def view_written_between(self, x):
    c = x.mul(2.0)
    y = self.bn(c)
    c.view(-1).add_(1.0)
    return self.act(y + x)


def residual_written_before_activation(self, x):
    r = x.mul(2.0)
    y = self.bn(x) + r
    r.mul_(0.0)
    return self.act(y) + r


SWITCHES = {"relu": True}
SLOPE = 0.25


def of_a_switch(y):
    return F.relu(y) if SWITCHES["relu"] else y


def through(module, y):
    return module(y) if SWITCHES["relu"] else y


def slope_of_a_switch():
    return 0.25 if SWITCHES["relu"] else 0.5


def draws_and_counts(x, keep):
    try:
        Counting.calls += 1
    except AttributeError:
        return x
    with torch.no_grad():
        mask = torch.floor(keep + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device))
    return x / keep * mask


def of_a_list(flags):
    return lambda self, x: self.act(self.bn(x)) if flags[0] else self.bn(x)


def writes_a_global(self, x):
    global SLOPE
    SLOPE = 0.25
    return self.act(self.bn(x))


def imports(self, x):
    import os

    return self.act(self.bn(x)) if os.sep else x


def catches(self, x):
    try:
        return self.act(self.bn(x)) if of_a_switch(0) else x
    except Exception:
        return self.act(self.bn(x))


def fills_a_nested_list(self, x):
    self.nested["seen"][0].append(1)
    return self.act(self.bn(x))


def called_between(self, x):
    y = self.bn(x)
    z = self.bn(self.conv(x))
    return self.act(y + z.exp())


def statistics_read_between(self, x):
    y = self.bn(self.conv(x))
    mean = torch.mul(self.bn.running_mean, 2.0).sum()
    return self.act(y + x) + mean


def has_act(module):
    return hasattr(module, "act")


def statistics_written_between(self, x):
    y = self.bn(self.conv(x))
    self.bn.running_mean.view(-1).zero_()
    return self.act(y + x)


def fused_again_between(self, x):
    y = self.bn(self.conv(x))
    return self.act(y + self.act(self.bn(x)).exp())


def eval_and_train(self, x):
    self.bn.eval()
    y = self.act(self.bn(x))
    self.bn.train()
    return y


def eval_of_all(self, x):
    for module in self.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return self.act(self.bn(x))


def training_assigned(self, x):
    self.bn.training = False
    return self.act(self.bn(x))


def momentum_for_a_call(self, x):
    momentum, self.bn.momentum = self.bn.momentum, 0.5
    y = self.act(self.bn(x))
    self.bn.momentum = momentum
    return y


def hooked_for_a_call(self, x):
    handle = self.bn.register_forward_hook(lambda module, inputs, output: output * 2)
    y = self.act(self.bn(x))
    handle.remove()
    return y


def data_assigned(self, x):
    self.conv.weight.data = torch.renorm(self.conv.weight.data, 2, 0, 0.1)
    return self.act(self.bn(self.conv(x)))


def tagged(self, x):
    y = self.act(self.bn(x))
    y.tag = "feature"
    return y


def item_assigned(self, x):
    y = self.act(self.bn(x)) * 1
    y[0] = 1.0
    return y


def counts_on_a_class(self, x):
    Counting.calls += 1
    return self.act(self.bn(x))


class Counting:
    calls = 0

    @classmethod
    def count(cls):
        cls.calls += 1


def counts_on_a_function(self, x):
    add_.calls = getattr(add_, "calls", 0) + 1
    return self.act(self.bn(x))


def counted(y, seen=None):
    seen.append(1)
    return y


counted.__defaults__ = ([],)


def catches_what_a_tensor_lacks(self, x):
    try:
        x = x.tag
    except AttributeError:
        x = x + 0
    return self.act(self.bn(x))


def suppresses(self, x):
    with contextlib.suppress(AttributeError):
        x = x.tag
    return self.act(self.bn(x))


def in_a_context_of_its_own(self, x):
    with Suppressing():
        x = x.tag
    return self.act(self.bn(x))


class Suppressing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return True


def recorded_by_a_profiler(self, x):
    with torch.profiler.record_function("block"):
        return self.act(self.bn(x))


def is_same(self, x):
    y = x * 1
    return self.act(self.bn(x)) if y is not x else x


def item_of_a_split_is(self, x):
    first, again = x.chunk(3, 1)[0], x
    return self.act(self.bn(x)) if first is not again else x


def with_options(x, **options):
    return options.get("y") is None


def item_is_none(self, x):
    first = x[0]
    return self.act(self.bn(x)) if first is not None else x


class Config:
    slope = 0.3


def by_another_name(self, x):
    config = Config
    return F.leaky_relu(self.bn(x), config.slope)


def in_an_item(self, x):
    found = {"sum": self.conv(x)}
    return self.act(self.bn(x)) if found["sum"] is not None else x


class Child(nn.Module):
    """A submodule that writes an attribute and a list."""

    def __init__(self):
        super().__init__()
        self.choice = 1

    def forward(self, x, given=None):
        self.choice = 2
        if given is not None:
            given.append(x)
        return x


class Doubled(nn.Identity):
    def __call__(self, x):
        return 2 * super().__call__(x)


def given_a_list(self, x):
    values = [x]
    self.child(x, values)
    return self.act(self.bn(x)) * len(values)


def fills(values, x):
    if x.shape[0] > 3:
        values[0] = x * 2


def shuffles(values, x):
    if x.shape[0] > 3:
        random.Random(1).shuffle(values)


def filled(fill):
    def forward(self, x):
        values = [x * 3, x]
        fill(self, values, x)
        return self.act(self.bn(values[0])) * len(values)

    return forward


class Fills(nn.Module):
    """A submodule that calls a function with a list that it gets."""

    def __init__(self, fill):
        super().__init__()
        self.fill = fill

    def forward(self, values, x):
        self.fill(values)
        return x


def lengthens(values):
    values += values


def repeats(values):
    values *= 2


def lengthens_one_of(values):
    y = values if values else sum(values)
    y += values


def lengthens_an_item(values):
    y = [values][0]
    y += values


def lengthens_what_is_returned(values):
    y = (lambda given: given)(values)
    y += values[:1]


def adds_in_place(values):
    y = values[0] + values[-1]
    y += values[0]
    y = y * 2
    y *= values[0]


def adds_to_layers(self, values, x):
    y = self.layer(torch.stack(values).sum(0))
    y = self.layer(y)
    y += values[0]
    return self.layer(y)


def lengthens_from_identity(self, values, x):
    y = self.same(values)
    y += values[:1]
    return y[0]


def lengthens_from_identity_of_a_layer(self, values, x):
    y = self.same((self.layer(x), values)[1])
    y += values[:1]
    return y[0]


def lengthens_from_a_layer_or_not(self, values, x):
    y = values
    if len(values) > 2:
        y = self.layer(x)
    y += values[:1]
    return y[0]


def lengthens_by_a_choice(self, values, x):
    y = self.layer(x) if len(values) > 2 else values
    y += values[:1]
    return y[0]


def lengthens_from_a_hidden_layer(self, values, x):
    y = self.hidden(values)
    y += values[:1]
    return y[0]


def lengthens_from_another_layer(self, values, x):
    def of_another(self):
        y = self.layer(values)
        y += values[:1]
        return y[0]

    return of_another(self.other)


def lengthens_from_another_self(self, values, x):
    self = self.other
    y = self.layer(values)
    y += values[:1]
    return y[0]


def lengthens_after_a_layer_is_replaced(self, values, x):
    self.layer = self.same
    y = self.layer(values)
    y += values[:1]
    return y[0]


def lengthens_by_a_method_of_another(self, values, x):
    return Layers.lengthens_by_a_layer(self.other, values)


class Layers(nn.Module):
    """A submodule that gets a list, with layers of torch and others."""

    hidden = staticmethod(lambda values: values)

    def __init__(self):
        super().__init__()
        self.layer, self.same, self.other = nn.Softplus(), nn.Identity(), nn.Module()
        self.other.layer = nn.Identity()
        self._modules["hidden"] = nn.Softplus()

    def lengthens_by_a_layer(self, values):
        y = self.layer(values)
        y += values[:1]
        return y[0]


def counts(values):
    count = 0
    for _ in values:
        count += 1
    return count


def of_a_class(kind):
    def forward(self, x):
        config = kind
        return F.leaky_relu(self.bn(x), config.slope)

    return forward


def times(factors):
    return lambda y: y * (factors[0] if isinstance(factors, list) else factors)


MADE_EARLIER = times([2.0])


def by_twins(once, again):
    return lambda self, x: self.act(self.bn(again(once(x))))


def of_a_generator(self, x):
    for y in yields_twice(self, x):
        x = y
    return x


def yields_twice(self, x):
    yield x
    yield of_a_switch(self.bn(x))


def made_by_itself(self, x):
    if self.made is None:
        return lambda y: F.relu(y) if SWITCHES["relu"] else y
    return self.made(self.bn(x))


def matched(self, x):
    match x:
        case [first, _]:
            return first
    return self.act(self.bn(x))


@dataclasses.dataclass
class Halved:
    value: torch.Tensor

    def __post_init__(self):
        self.value = self.value * 0.5


class Sizes:
    """The configuration of a model, as transformers' models have one."""

    def __init__(self):
        self.scale, self.scales, self.computed = 2.0, [2.0], 0

    @property
    def twice(self):
        self.computed += 1
        return 2 * self.scale


def written_out(head, *body, then="pass"):
    """A forward so long that Python needs more than a byte for a jump and for a name."""
    namespace = {}
    source = f"def forward(self, x):\n    {head}\n        " + "\n        ".join(body) + f"\n    {then}\n    return self.act(self.bn(x))"
    exec(source, globals(), namespace)
    return namespace["forward"]


# The forward, and the reason in the report for the first batch norm.
LEFT = {
    "a closure beside its twin": (by_twins(times(3.0), times([2.0])), "reads factors, a list"),
    "a class in a closure": (of_a_class(Config), "reads kind, a class with attributes"),
    "is, twice": (lambda self, x: x if (y := self.conv(x)) is x is not None else self.act(self.bn(y)), "compares a value by `is`"),
    "a key": (lambda self, x: self.act(self.bn(x)) if x.size(1) in {3} else x, "uses a value as a key"),
    "a key of a ModuleDict": (lambda self, x: self.act(self.bn(x)) if x.size(1) in self.parts else x, "uses a value as a key"),
    "a number of NumPy": (lambda self, x: self.act(self.bn(x)) * self.root, "computes with a float64"),
    "a function that a generator calls when it goes on": (of_a_generator, "reads SWITCHES, a dict"),
    "a function that an earlier call made": (made_by_itself, "reads SWITCHES, a dict"),
    "a pattern": (matched, "matches a value with a pattern"),
    "a list of the class": (lambda self, x: self.of_class.append(1) or self.act(self.bn(x)), "writes Written.of_class"),
    "a class by another name": (by_another_name, "reads Config, a class with attributes"),
    "a class by getattr": (lambda self, x: F.leaky_relu(self.bn(x), getattr(Config, "sl" + "ope")), "reads Config, a class"),
    "call is None": (lambda self, x: self.act(self.bn(x)) if self.conv(x) is not None else x, "compares a value by `is`"),
    "item of a dict is None": (in_an_item, "compares a value by `is`"),
    "an option of a function is None": (
        lambda self, x: with_options(x, y=self.conv(x)) or self.act(self.bn(x)),
        "cannot be traced",
    ),
    "an item without a slice is None": (
        lambda self, x: (lambda y: y if y is None else self.act(self.bn(x)))(x[0]),
        "compares a value by `is`",
    ),
    "operator.is_": (lambda self, x: x if operator.is_(self.conv(x), None) else self.act(self.bn(x)), "calls operator.is_"),
    "text for a node": (lambda self, x: torch.einsum(f"{x.ndim}".replace("4", "ij->ij"), self.bn(x)[0, 0]), "turns a value into text"),
    "a list that a submodule fills": (given_a_list, "passes a list to a Child, which may write into it"),
    "a list that a submodule reverses": (filled(lambda self, values, x: self.fills(values, x)), "passes a list to a Fills, which may"),
    "a list that a function fills": (filled(lambda self, values, x: fills(values, x)), "passes a list to fills, which may write into it"),
    "a list that a function shuffles": (
        filled(lambda self, values, x: shuffles(x=x, values=(values, 0)[0])),
        "passes a list to shuffles, which may write into it",
    ),
    "what a submodule writes": (lambda self, x: self.act(self.bn(self.child(x))) * self.child.choice, "reads self.child.choice after"),
    "a submodule with its own __call__": (lambda self, x: self.act(self.bn(self.doubled(x))), "its own __call__"),
    "a dict of another class": (lambda self, x: collections.OrderedDict(out=self.act(self.bn(x))), "makes a OrderedDict"),
    "a dataclass with code of its own": (lambda self, x: Halved(self.act(self.bn(x))), "makes a Halved"),
    "a list that it keeps": (lambda self, x: [self.act(self.bn(x)), self.notes], "passes on a list that is an attribute"),
    "mode of a batch norm": (lambda self, x: self.bn.eval() and self.act(self.bn(x)), "calls eval of a module"),
    "mode and back": (eval_and_train, "calls eval of a module"),
    "mode of all": (eval_of_all, "calls eval of a module"),
    "mode assigned": (training_assigned, "writes self.bn.training"),
    "mode by setattr": (lambda self, x: setattr(self.bn, "training", False) or self.act(self.bn(x)), "calls setattr"),
    "mode past the module's own": (
        lambda self, x: nn.Module.__setattr__(self.bn, "training", False) or self.act(self.bn(x)),
        "calls nn.Module.__setattr__",
    ),
    "mode by the class": (lambda self, x: nn.Module.train(self.bn, False) and self.act(self.bn(x)), "calls nn.Module.train"),
    "momentum for a call": (momentum_for_a_call, "writes self.bn.momentum"),
    "hook for a call": (hooked_for_a_call, "calls register_forward_hook of a module"),
    "counts on a submodule": (lambda self, x: self.bn.__setattr__("calls", 1) or self.act(self.bn(x)), "writes self.bn.calls"),
    "deletes": (lambda self, x: self.__delattr__("spare") or self.act(self.bn(x)), "writes self.spare"),
    "registers a buffer": (lambda self, x: self.register_buffer("steps", None) or self.act(self.bn(x)), "calls register_buffer of a"),
    "freezes parameters": (lambda self, x: self.act(self.bn.requires_grad_(False)(x)), "calls requires_grad_ of a module"),
    "forgets gradients": (lambda self, x: self.zero_grad() or self.act(self.bn(x)), "calls zero_grad of a module"),
    "data assigned": (data_assigned, "writes the attribute data of a tensor"),
    "a tag": (tagged, "writes the attribute tag of a tensor"),
    "an item": (item_assigned, "writes an item of a value"),
    "counts on a class": (counts_on_a_class, "writes an attribute of Counting"),
    "counts in a class method": (lambda self, x: Counting.count() or self.act(self.bn(x)), "reads Counting.count, a classmethod"),
    "counts in its own class": (lambda self, x: self.count() or self.act(self.bn(x)), "reads self.count, a classmethod"),
    "counts on a function": (counts_on_a_function, "writes an attribute of add_"),
    "counts in a default": (lambda self, x: self.act(self.bn(counted(x))), "calls counted"),
    "caches": (lambda self, x: self.act(self.bn(x)) * self.cached(), "reads self.cached, a _lru_cache_wrapper"),
    "catches": (catches_what_a_tensor_lacks, "catches exceptions"),
    "suppresses": (suppresses, "calls contextlib.suppress"),
    "a context manager of the user's": (in_a_context_of_its_own, "enters a context manager that is not torch's"),
    "a profiler's range": (recorded_by_a_profiler, "makes or enters a record_function"),
    "writes a file": (lambda self, x: pathlib.Path(os.devnull).touch() or self.act(self.bn(x)), "calls pathlib.Path"),
    "threads": (lambda self, x: torch.set_num_threads(1) or self.act(self.bn(x)), "calls torch.set_num_threads"),
    "is": (is_same, "compares a value by `is`"),
    "item is None": (item_is_none, "compares a value by `is`"),
    "an item of a split is": (item_of_a_split_is, "compares a value by `is`"),
    "an item of a split is a key": (lambda self, x: self.act(self.bn({x.chunk(3, 1)[0]: x}.popitem()[1])), "uses a value as a key"),
    "an item of a split as text": (lambda self, x: self.act(self.bn(x)) if str(x.chunk(3, 1)[0]) else x, "turns a value into text"),
    "an item of a size": (lambda self, x: x.shape[0] and self.act(self.bn(x)), "cannot be traced"),
    "dtype is": (lambda self, x: self.bn(x * 2 if x.dtype is torch.float64 else x), "reads dtype of a value"),
    "gradient is None": (lambda self, x: self.act(self.bn(x)) if x.grad is None else x, "reads grad of a value"),
    "has an attribute": (lambda self, x: x if hasattr(x, "tag") else self.act(self.bn(x)), "checks whether a value has tag"),
    "text": (lambda self, x: self.act(self.bn(x)) if f"{x.shape[0]}" == "4" else x, "turns a value into text"),
    "class by name": (lambda self, x: self.act(self.bn(x)) if self.bn.__class__ is nn.BatchNorm2d else x, "asks for the class"),
    "optional argument that may change": (lambda self, x, y=[]: self.act(self.bn(x)), "an optional argument, y, whose default may change"),
    "optional argument without a name": (lambda self, x, y=1, /, z=2: self.act(self.bn(x)) * y * z, "y, that must not have a name"),
    "var arguments": (lambda self, *x: self.act(self.bn(*x)), "optional argument, x"),
    "type of what it computes": (
        lambda self, x: self.act(self.bn(x)) if isinstance(self.conv(x), torch.Tensor) else x,
        "checks the type of a value that it computes",
    ),
    "abstract type": (
        lambda self, x: x if isinstance(x, collections.abc.Callable) else self.act(self.bn(x)),
        "checks the type of its input with an abstract class",
    ),
    "type with a dtype": (
        lambda self, x: self.bn(x) if isinstance(x, torch.DoubleTensor) else x,
        "reads torch.DoubleTensor, a class for which",
    ),
    "type while it is read": (
        lambda self, x: self.bn(x) if isinstance(x, torch.fx.Proxy) else x,
        "reads torch.fx.Proxy, a class for which",
    ),
    "an object": (lambda self, x: self.act(self.bn(x)) * getattr(self.config, "sc" + "ale"), "reads self.config, a Sizes"),
    "a property of an object": (lambda self, x: self.act(self.bn(x)) * self.config.twice, "reads self.config, a Sizes"),
    "a list of an object": (lambda self, x: self.act(self.bn(x)) * self.config.scales[0], "reads self.config, a Sizes"),
    "a global name among many": (
        written_out("if not self.flag:", *map("n{}".format, range(300)), then="x = x * SLOPE"),
        "reads SLOPE, a float",
    ),
    "is, before many": (written_out("y = x * 1\n    if y is not None:", *["x = x + 0"] * 100), "compares a value by `is`"),
    "is_tensor": (lambda self, x: self.act(self.bn(x)) if torch.is_tensor(x) else x, "calls torch.is_tensor"),
    "data": (lambda self, x: self.act(self.bn(x)) if x.sum() > -1e9 else x, "cannot be traced by torch.fx: TraceError"),
    "shape": (lambda self, x: self.act(self.bn(x)) if x.shape[0] > 1 else x, "cannot be traced by torch.fx: TraceError"),
    "random": (lambda self, x: self.act(self.bn(x)) if torch.rand(()) < 2 else x, "calls torch.rand, which no graph"),
    "makes a layer": (lambda self, x: self.act(self.bn(x)) if nn.Linear(1, 1).in_features else x, "makes or enters a Linear"),
    "Python's random": (lambda self, x: self.act(self.bn(x)) if random.random() < 2 else x, "calls random.random"),
    "writes an attribute": (writes_attribute, "writes self.flag"),
    "appends to an attribute": (appends, "writes self.notes"),
    "an empty list": (lambda self, x: [self.act(self.bn(x)), *self.seen][0], "reads self.seen, an empty list"),
    "writes a nested list": (fills_a_nested_list, "writes self.nested"),
    "gradient mode": (lambda self, x: self.act(self.bn(x)) if torch.is_grad_enabled() else x, "calls torch.is_grad_enabled"),
    "inference mode": (lambda self, x: self.bn(x) if torch.is_inference_mode_enabled() else x, "calls torch.is_inference_mode_enabled"),
    "autocast mode": (lambda self, x: self.bn(x) if torch.is_autocast_enabled("cpu") else x, "calls torch.is_autocast_enabled"),
    "autocast dtype": (lambda self, x: self.bn(x.to(torch.get_autocast_dtype("cpu")).double()), "calls torch.get_autocast_dtype"),
    "default dtype": (lambda self, x: self.act(self.bn(x).to(torch.get_default_dtype())), "calls torch.get_default_dtype"),
    "compiling": (lambda self, x: x if torch.compiler.is_compiling() else self.bn(x), "calls torch.compiler.is_compiling"),
    "NumPy's random": (lambda self, x: self.act(self.bn(x)) if np.random.rand() < 2 else x, "calls np.random.rand"),
    "a method of a class in C": (lambda self, x: self.act(self.bn(x)) if str.lower("A") else x, "calls str.lower, which no graph"),
    "prints": (lambda self, x: print(end="") or self.act(self.bn(x)), "calls print"),
    "dict of the module's file": (lambda self, x: self.act(self.bn(x)) if SWITCHES["relu"] else x, "reads SWITCHES, a dict"),
    "number of the module's file": (lambda self, x: F.leaky_relu(self.bn(x), SLOPE), "reads SLOPE, a float"),
    "dict in a function": (lambda self, x: of_a_switch(self.bn(x)), "of_a_switch follows, which is not an activation"),
    "dict in a function that gets a module": (lambda self, x: self.act(self.bn(through(self.child, x))), "reads SWITCHES, a dict"),
    "a function that gets nothing of the input": (
        lambda self, x: F.leaky_relu(self.bn(x), slope_of_a_switch()),
        "reads SWITCHES, a dict",
    ),
    "list of a closure": (of_a_list([True]), "reads flags, a list"),
    "environment": (lambda self, x: self.bn(x) if os.environ.get("PATH") else x, "reads os.environ, a _Environ"),
    "writes a global": (writes_a_global, "writes SLOPE"),
    "imports": (imports, "imports os"),
    "catches what would tell": (catches, "catches exceptions"),
    "class among others": (lambda self, x: self.act(self.bn(x)) if type(self.bn) in self.kinds else x, "asks for the class"),
    "name of a class": (lambda self, x: self.act(self.bn(x)) if type(self.bn).__name__ == "BatchNorm2d" else x, "asks for the class"),
    "class of a submodule": (lambda self, x: self.act(self.bn(x)) if type(self.bn) is nn.BatchNorm2d else x, "asks for the class"),
    "plain tensor": (lambda self, x: self.act(self.bn(x)) if self.tensor > 0 else x, "reads self.tensor, a Tensor"),
    "tensors in a dict": (lambda self, x: self.act(self.bn(x)) * self.tensors["one"], "reads self.tensors, a dict"),
    "modules in a list": (lambda self, x: self.unseen[0](self.bn(x)), "reads self.unseen, a list"),
    "all parameters": (lambda self, x: self.bn(x.to(next(self.parameters()).device)), "reads self.parameters"),
    "no_grad": (without_gradients, "switches gradients"),
    "enable_grad": (lambda self, x: torch.set_grad_enabled(True) and self.act(self.bn(x)), "switches gradients"),
    "autocast": (in_full_precision, "switches gradients, autocast"),
    "a tensor of its own": (lambda self, x: self.act(self.bn(x)) * torch.Tensor([2.0]), "makes a tensor"),
    "a module that is loaded when it is asked for": (
        lambda self, x: torch._inductor.config and self.act(self.bn(x)),
        "reads torch._inductor",
    ),
    "decorated": (torch.no_grad()(lambda self, x: self.act(self.bn(x))), "optional argument, args"),
    "checkpoint": (
        lambda self, x: torch.utils.checkpoint.checkpoint(lambda x: self.act(self.bn(x)), x, use_reentrant=False),
        "calls torch.utils.checkpoint.checkpoint",
    ),
    "read twice": (twice, "its output is used 2 times"),
    "doubled": (lambda self, x: self.act((lambda y: y + y)(self.bn(x))), "its output is used 2 times"),
    "written into the other": (into_the_other, "written into the other term"),
    "input written between": (written_between, "add_, called between it and its activation"),
    "view of the input written between": (view_written_between, "view, called between it and its activation"),
    "residual written between": (residual_written_before_activation, "mul_, called between it and its activation"),
    "called again between": (called_between, "called again before its output is added"),
    "fused again between": (fused_again_between, "called again before its output is added"),
    "statistics read between": (statistics_read_between, "mul, called between it and its activation, may read or write its statistics"),
    "statistics written between": (
        statistics_written_between,
        "view, called between it and its activation, may read or write its statistics",
    ),
    "name that ours has": (
        lambda self, x: self.bn(x) if hasattr(self.bn, "act") else self.act(self.bn(x)),
        "looks for an attribute act, which BatchNormAct2d has",
    ),
    "name that ours has, where no graph tells": (
        lambda self, x: self.bn(x) if x.sum() < math.inf and getattr(self.bn, "act", None) else self.act(self.bn(x)),
        "looks for an attribute act, which BatchNormAct2d has",
    ),
    "name that ours has, in a function, where no graph tells": (
        lambda self, x: self.bn(x) if x.sum() < math.inf and has_act(self.bn) else self.act(self.bn(x)),
        "looks for an attribute act, which BatchNormAct2d has",
    ),
    "name that ours has, in its dict, where no graph tells": (
        lambda self, x: self.bn(x) if x.sum() < math.inf and "act" in self.bn.__dict__ else self.act(self.bn(x)),
        "looks for an attribute act, which BatchNormAct2d has",
    ),
    "scalar": (lambda self, x: self.act(self.bn(x) + 1.0), "add follows"),
    "weighted": (lambda self, x: self.act(torch.add(self.bn(x), x, alpha=2)), "add follows"),
    "celu": (lambda self, x: F.celu(self.bn(x)), "no kernel for celu"),
    "activation first": (lambda self, x: self.conv(self.bn(self.act(self.conv(x)))), "its activation, ReLU, comes before it"),
}


# Forwards whose backward torch refuses, or which have none.
NO_BACKWARD = {"decorated", "input written between", "view of the input written between", "statistics written between"}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name):
    forward, why = LEFT[name]
    plain = {
        "tensor": torch.tensor(1.0),
        "tensors": {"one": torch.tensor(1.0)},
        "unseen": [nn.ReLU()],
        "nested": {"seen": ([],)},
        "spare": 1,
        "notes": [0],
        "kinds": (nn.BatchNorm2d,),
    }
    model = block(forward, **plain)
    type(model).calls, type(model).count = 0, Counting.__dict__["count"]
    model.made = None
    model.made = made_by_itself(model, X()) if name == "a function that an earlier call made" else None
    model.child, model.doubled, model.parts, model.fills = Child(), Doubled(), nn.ModuleDict(), Fills(lambda values: values.reverse())
    model.root, type(model).of_class, model.config = np.sqrt(2.0), [0], Sizes()
    type(model).cached = functools.lru_cache(lambda self: 2.0)
    counts = Counting.calls, dict(add_.__dict__), list(counted.__defaults__[0])
    expected, actual, report = converted(model)
    row = next(row for row in report.rows if row.name == "bn")
    assert why in row.why, report
    assert model.calls == 0 and model.of_class == [0] and counts == (Counting.calls, add_.__dict__, counted.__defaults__[0])
    x = X()
    if name in NO_BACKWARD:
        with torch.no_grad():
            assert_same({"output": actual(x), **actual.state_dict()}, {"output": expected(x), **expected.state_dict()})
    else:
        assert_same(step(actual, x), step(expected, x))
    assert (actual.flag, actual.seen, actual.nested) == (expected.flag, expected.seen, expected.nested)


# The attribute of the batch norm, its value, and a forward that uses it.
OWN_ATTRIBUTES = {
    "text": ("act", "gelu", lambda self, x: (lambda y: F.gelu(y) if self.bn.act == "gelu" else y)(self.bn(self.conv(x)))),
    "module": ("act", nn.GELU(), lambda self, x: self.bn.act(self.bn(self.conv(x)))),
    "parameter": ("act", nn.Parameter(torch.ones(1, dtype=torch.float64)), lambda self, x: self.act(self.bn(self.conv(x)) * self.bn.act)),
    "buffer": ("act_param", nn.Buffer(torch.ones(1, dtype=torch.float64)), lambda self, x: self.bn(self.conv(x)) * self.bn.act_param),
    "number": ("act_param", 2.0, lambda self, x: self.act(self.bn(self.conv(x)) * self.bn.act_param)),
    "name of a method": ("_param", 2.0, lambda self, x: self.act(self.bn(self.conv(x)))),
    "name that convert writes": ("_converted_from", 2.0, lambda self, x: self.act(self.bn(self.conv(x))) * self.bn._converted_from),
}


@pytest.mark.parametrize("name", OWN_ATTRIBUTES)
def test_a_batch_norm_with_an_attribute_that_ours_would_replace(name):
    attribute, value, forward = OWN_ATTRIBUTES[name]
    model = block(forward)
    setattr(model.bn, attribute, value)
    expected, actual, report = converted(model)
    row = next(row for row in report.rows if row.name == "bn")
    assert (row.becomes, row.why) == (None, f"it has attributes of its own that BatchNormAct2d would replace: {attribute}")
    assert actual.bn.__dict__.keys() == expected.bn.__dict__.keys() and type(actual.bn) is nn.BatchNorm2d
    x = X()
    assert_same(step(actual, x), step(expected, x))
    assert_same({"output": gk.fold(actual)(x).detach()}, {"output": expected.eval()(x).detach()})


def test_a_name_that_a_forward_looks_for_in_its_own_module_is_no_reason():
    _, actual, report = converted(block(lambda self, x: self.bn(x) if x.sum() > 0 and hasattr(self, "act") else x))
    assert isinstance(actual.bn, gk.BatchNormAct2d), report


def shape_read_before_it_is_written(self, x):
    y = x.mul(1)
    shape = y.shape
    y.unsqueeze_(0)
    return self.act(self.bn(y.reshape(shape)))


def unpacked(self, x):
    n, c, *size = x.shape[0], x.shape[1], -1, 1
    y, _ = torch.chunk(self.act(self.bn(x.view(n, c, *size))), 2, dim=2)
    return y


def asserts(self, x):
    torch._assert(x.ndim == 4, f"expected 4 dimensions, not {x.ndim}")
    return self.act(self.bn(x))


def with_an_off_branch(self, x):
    if not self.flag:
        import warnings

        warnings.warn(f"{SWITCHES} {SLOPE}", stacklevel=1)
        print(random.random(), torch.is_grad_enabled())
        x = torch.utils.checkpoint.checkpoint(self.bn, x)
    return self.act(self.bn(x))


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor = None


def scaled(y, scale=2.0, *, of=F.relu):
    return of(y) * scale


def split_and_indexed(self, x):
    parts = torch.split(self.conv(x), 1, 1)
    part = parts[0]
    found = []
    for place in range(2):
        part = parts[place] if place == 0 else part + parts[place]
        found.append(part)
    return self.act(self.bn(torch.cat([*found, parts[-1]], 1)))


# Forwards that can be read, each similar to one in LEFT.
READ = {
    "shape before it is written": shape_read_before_it_is_written,
    "unpacked": unpacked,
    "asserts": asserts,
    "a number as text": lambda self, x: self.act(self.bn(self.parts[str(0)](x))),
    "a named tuple": lambda self, x: next(iter(Pair(self.act(self.bn(x)), x))),
    "defaults of a function": lambda self, x: scaled(self.bn(x)),
    "attribute is None": lambda self, x: self.act(self.bn(x)) if getattr(self, "down", None) is None else x,
    "submodule is None": lambda self, x: self.act(self.bn(x)) if self.conv.bias is not None else x,
    "class of a submodule": lambda self, x: self.act(self.bn(x)) if isinstance(self.bn, nn.BatchNorm2d) else x,
    "what tensors have": lambda self, x: self.act(self.bn(x)).to(x.dtype).view(x.shape),
    "optional argument": lambda self, x, y=None: self.act(self.bn(x if y is None else y)),
    "optional arguments": lambda self, x, y=1, *, z=2.0, **more: self.act(self.bn(x)) * y * z * (3 if more else 2),
    "type": lambda self, x: self.act(self.bn(x)) if isinstance(x, torch.Tensor) and not isinstance(x, (list, tuple)) else x,
    "a branch that is off": with_an_off_branch,
    "scripting": lambda self, x: x if torch.jit.is_scripting() else self.act(self.bn(x)),
    "an attribute of an object": lambda self, x: self.act(self.bn(x)) * self.config.scale,
    "items of a split": split_and_indexed,
    "a function that reads a dict": lambda self, x: self.act(self.bn(sum(of_a_switch(y) for y in (x, x)))),
    "a function that was made earlier": lambda self, x: self.act(self.bn(MADE_EARLIER(times(1.0)(x)))),
    "a decorated function": lambda self, x: with_gradients(self.act(self.bn(x))),
    "the gradient mode without effect": lambda self, x: self.act(self.bn(x)) * (2 if torch.is_grad_enabled() and not self.flag else 3),
    "an index that is not None": lambda self, x: (lambda y: self.act(self.bn(x)) * y if y is not None else x)(self.conv(x)[:, :1]),
    "what a function of torch returns is not None": lambda self, x: (lambda y: self.act(self.bn(y)) if y is not None else x)(torch.exp(x)),
    "more arguments": lambda self, x, *more, **options: x if len(more) > 0 or options.get("off") is not None else self.act(self.bn(x)),
    "a function that draws and counts": lambda self, x: draws_and_counts(self.act(self.bn(x)), 0.5) + x,
    # torch compares the class of the first argument with that of a tensor.
    "a power of the input": lambda self, x: self.act(self.bn(torch.pow(x, 3))) if isinstance(x, torch.Tensor) else x,
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name):
    expected, actual, report = converted(block(READ[name], parts=nn.ModuleDict({"0": nn.Identity()}), config=Sizes()))
    assert next(row for row in report.rows if row.name == "bn").is_fused, report
    x, steps, calls = X(), [], []
    for model in (actual, expected):
        torch.manual_seed(0)
        before = Counting.calls
        steps.append(step(model, x))
        calls.append(Counting.calls - before)
    assert_same(*steps)
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("fill", "may_write"),
    [
        *((fill, True) for fill in (lengthens, lengthens_one_of, lengthens_an_item, lengthens_what_is_returned, repeats)),
        (lambda values: values.sort(key=len), True),
        *((fill, False) for fill in (adds_in_place, counts, lambda values: len(values))),
    ],
)
def test_a_list_that_a_submodule_may_write_into(fill, may_write):
    forward = filled(lambda self, values, x: self.fills(values, x))
    expected, actual, report = converted(block(forward, fills=Fills(fill)))
    assert report.rows[0].is_fused != may_write, report
    x = X()
    for _ in range(2):
        assert_same(step(actual, x), step(expected, x))


@pytest.mark.parametrize(
    ("forward", "may_write"),
    [
        (adds_to_layers, False),
        *((each, True) for each in (lengthens_from_identity, lengthens_from_identity_of_a_layer, lengthens_from_a_layer_or_not)),
        *((each, True) for each in (lengthens_by_a_choice, lengthens_from_a_hidden_layer, lengthens_from_another_layer)),
        *((each, True) for each in (lengthens_from_another_self, lengthens_after_a_layer_is_replaced, lengthens_by_a_method_of_another)),
    ],
)
def test_a_list_that_a_submodule_adds_to_what_its_layers_return(forward, may_write):
    layers = type("Given", (Layers,), {"forward": forward})()
    expected, actual, report = converted(block(filled(lambda self, values, x: self.layers(values, x)), layers=layers))
    assert report.rows[0].is_fused != may_write, report
    x = X()
    for _ in range(2):
        assert_same(step(actual, x), step(expected, x))


def test_a_layer_is_replaced_that_refused_lists():
    layers = type("Given", (Layers,), {"forward": Layers.lengthens_by_a_layer})()
    expected, actual, report = converted(block(filled(lambda self, values, x: self.layers(values)), layers=layers))
    assert report.rows[0].is_fused
    for each in (actual, expected):
        each.layers.layer = nn.Identity()
    x = X()
    assert_same(step(actual, x), step(expected, x))


def test_a_forward_takes_more_arguments_than_it_was_read_for():
    expected, actual, _ = converted(block(READ["more arguments"]))
    x = X()
    for args, kwargs, is_read in (
        ((x,), {}, True),
        ((), {"x": x}, True),
        ((x, None), {}, False),
        ((x, x), {}, False),
        ((x,), {"off": None}, False),
        ((x,), {"off": x}, False),
        ((x,), {"more": 1}, False),
        ((x,), {"options": 1}, False),
    ):
        torch.testing.assert_close(actual(*args, **kwargs), expected(*args, **kwargs))
        with torch.no_grad(), Operators() as seen:
            copy.deepcopy(actual)(*args, **kwargs)
        assert seen.ours["relu"] == is_read, (args, kwargs, seen.ours)
    for each in (expected, actual):
        with pytest.raises(TypeError):
            each()


class TakesTimeSteps(nn.Module):
    """Like diffusers' ResnetBlock2D: its last required argument may be None."""

    def __init__(self):
        super().__init__()
        self.bn, self.linear = nn.BatchNorm2d(3), nn.Linear(2, 3)

    def forward(self, x, temb, *args, **kwargs):
        if len(args) > 0 or kwargs.get("scale") is not None:
            return x
        if temb is not None:
            temb = self.linear(temb)[:, :, None, None]
        if temb is not None:
            return F.silu(self.bn(x + temb))
        return F.relu(self.bn(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle], ids=lambda each: each.__name__)
@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.body(self.body(x, None), temb=self.step(x)),
        lambda self, x: self.body(x, None) if torch.is_grad_enabled() else self.body(x, self.step(x)),
    ],
    ids=["read", "not read"],
)
def test_a_required_argument_that_may_be_none(copied, forward):
    model = parent(forward, TakesTimeSteps(), step=lambda x: x.mean((2, 3))[:, :2])
    expected, actual, _ = converted(model)
    actual.body = copied(actual.body)
    x = X()
    temb = torch.randn(4, 2, dtype=torch.float64)
    for args, kwargs, ours in (
        ((x, temb), {}, {"swish": 1}),
        ((x, None), {}, {"relu": 1}),
        ((x,), {"temb": temb}, {"swish": 1}),
        ((), {"temb": None, "x": x}, {"relu": 1}),
        ((x, None, 1), {}, {}),
        ((x, temb), {"scale": 1}, {}),
        ((x, temb), {"scale": None}, {"identity": 1}),
    ):
        assert operators(copy.deepcopy(actual.body), *args, **kwargs).ours == ours, (args, kwargs)
        torch.testing.assert_close(actual.body(*args, **kwargs), expected.body(*args, **kwargs))
    for args in ((x,), (None, temb)):
        for each in (expected.body, actual.body):
            with pytest.raises((TypeError, AttributeError)):
                each(*args)
    assert_same(step(actual, x), step(expected, x))


def test_a_required_argument_that_is_not_read_may_be_none():
    expected, actual, _ = converted(block(lambda self, x, temb: self.act(self.bn(x))))
    x = X()
    for args, ours in (((x, x), {"relu": 1}), ((x, None), {"relu": 1}), ((x, 1), {"relu": 1})):
        assert operators(copy.deepcopy(actual), *args).ours == ours
        torch.testing.assert_close(actual(*args), expected(*args))


def test_an_attribute_of_super_is_a_reason():
    class OfSuper(Block):
        def forward(self, x):
            return x if super().dump_patches else self.act(self.bn(x))

    assert "reads super().dump_patches" in gk.convert(OfSuper(nn.ReLU())).rows[0].why


def test_a_property_of_an_object_is_computed_as_often_as_before():
    _, actual, _ = converted(block(LEFT["a property of an object"][0], config=Sizes()))
    assert actual.config.computed == 0
    actual(X())
    assert actual.config.computed == 1


def test_a_function_that_is_held_with_a_list_is_a_reason():
    made = block(lambda self, x: self.act(self.bn(self.made(times((3.0,))(x)))), made=times([2.0]))
    assert "reads self.made, a function" in gk.convert(made).rows[0].why


class Writes(nn.Module):
    """A submodule that writes into what it shares with its parent."""

    def __init__(self, shared):
        super().__init__()
        self.shared = shared

    def forward(self, x):
        if isinstance(self.shared, list):
            self.shared[0] += 1
        else:
            self.shared.scale += 1
        return x * 1


@pytest.mark.parametrize(
    "make,read", [(Sizes, lambda self: self.shared.scale), (lambda: [0], lambda self: self.shared[0])], ids=["object", "list"]
)
def test_what_a_submodule_may_write_is_not_read_after_its_call(make, read):
    shared = make()
    made = block(lambda self, x: self.act(self.bn(self.writes(x))) * read(self), shared=shared, writes=Writes(shared))
    expected, actual, report = converted(made)
    assert "after a call that may write it" in report.rows[0].why
    x = X()
    assert_same(step(actual, x), step(expected, x))


def test_a_name_that_another_branch_looks_for():
    def forward(self, x, scale=None):
        y = self.bn(x)
        if scale is not None:
            y = y * (100 if hasattr(self.bn, "act") else scale)
        return self.act(y)

    expected, actual, _ = converted(block(forward))
    x = X()
    torch.testing.assert_close(actual(x, 2.0), expected(x, 2.0))


def test_an_optional_argument_beside_one_that_must_have_a_name_is_a_reason():
    assert "optional argument, y, beside one that" in gk.convert(block(lambda self, x, y=None, *, z: self.act(self.bn(x)))).rows[0].why


def test_optional_arguments_that_are_given():
    def forward(self, x, y=None, *, scale=2, **more):
        if y is not None:
            x = self.bn(y) * (x + SLOPE)
        return self.act(self.bn(x)) * (scale + len(more))

    expected, actual, _ = converted(block(forward))
    x = X()
    for args, kwargs, is_default in (
        ((x,), {}, True),
        ((), {"x": x}, True),
        ((x, None), {}, True),
        ((x,), {"y": None, "scale": 2}, True),
        ((x, x), {}, False),
        ((x,), {"y": x}, False),
        ((x,), {"scale": 3}, False),
        ((x,), {"other": 3}, False),
        ((x,), {"more": 3}, False),
    ):
        torch.testing.assert_close(actual(*args, **kwargs), expected(*args, **kwargs))
        with torch.no_grad(), Operators() as seen:
            copy.deepcopy(actual)(*args, **kwargs)
        assert seen.ours["relu"] == is_default, (kwargs, seen.ours)
    for args, kwargs in (((), {}), ((x, None, 2), {}), ((x, None), {"y": None}), ((x,), {"x": x})):
        for each in (expected, actual):
            with pytest.raises(TypeError):
                each(*args, **kwargs)


class TakesMore(nn.Module):
    """Takes a residual, a scale, and a list whose tensors it adds."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x, residual=None, scale=1, *, more=(), deep=False, **others):
        y = self.bn(x) if residual is None else self.bn(x) + residual
        for each in more:
            y = y + each
        if scale == 2:
            return F.leaky_relu(y, 0.5)
        return F.relu6(y) if deep else F.relu(y)


class TakesAWriter(nn.Module):
    """Writes its optional argument between its batch norm and the addition."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x, other=None):
        y = self.bn(x)
        if other is not None:
            other.mul_(2.0)
        return F.relu(y + x)


class HandsOn(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = TakesMore()

    def forward(self, x, residual=None, **options):
        return self.body(x, residual)


# The forward of the parent, the child, what is fused when the parent is called, and what the report says.
GIVEN = {
    "a tensor": (lambda self, x: self.body(x, x * 2), TakesMore, {"relu, residual": 1}, ""),
    "by name": (lambda self, x: self.body(residual=x * 2, x=x), TakesMore, {"relu, residual": 1}, ""),
    "the default": (lambda self, x: self.body(x, None, 1), TakesMore, {"relu": 1}, ""),
    "a constant": (lambda self, x: self.body(x, None, 2), TakesMore, {"leaky_relu": 1}, ""),
    "a constant that is computed": (lambda self, x: self.body(x, scale=self.scale * 2), TakesMore, {"leaky_relu": 1}, ""),
    "True": (lambda self, x: self.body(x, scale=True, deep=True), TakesMore, {"relu6": 1}, ""),
    "a tensor and constants": (lambda self, x: self.body(x, x, 2, deep=1), TakesMore, {"leaky_relu, residual": 1}, ""),
    "several calls": (
        lambda self, x: self.body(self.body(x, x * 2), scale=2) + self.body(x) + self.body(x, deep=True),
        TakesMore,
        {"relu, residual": 1, "leaky_relu": 1, "relu": 1, "relu6": 1},
        "",
    ),
    "1 and True": (lambda self, x: self.body(x, deep=1) + self.body(x, deep=True), TakesMore, {"relu6": 2}, ""),
    "through a child": (lambda self, x: self.body(x, x * 2), HandsOn, {"relu, residual": 1}, ""),
    "a list": (
        lambda self, x: self.body(x, more=[x, x]),
        TakesMore,
        {"identity": 1},
        "only in calls without residual, scale, more, deep, others",
    ),
    "a name of **": (lambda self, x: self.body(x, other=1), TakesMore, {"identity": 1}, "no forward that could be read calls TakesMore"),
    "a parent that is not read": (
        lambda self, x: self.body(x, x * 2) if self.training else x,
        TakesMore,
        {"relu, residual": 1},
        "",
    ),
    "a parent that cannot be read": (
        lambda self, x: self.body(x, x * 2) if x.sum() < 1e9 else x,
        TakesMore,
        {"identity": 1},
        "no forward that could be read calls TakesMore",
    ),
    "an argument that is written": (
        lambda self, x: self.body(x * 1, x * 1),
        TakesAWriter,
        {"identity": 1},
        "may write its input or the residual",
    ),
}


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle], ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", GIVEN)
def test_what_a_forward_gives_another(name, copied):
    forward, child, ours, why = GIVEN[name]
    expected, actual, report = converted(parent(forward, child(), scale=1))
    rows = [row for row in report.rows if "BatchNorm" in row.found]
    assert all(row.why == "" if why == "" else why in row.why for row in rows), report
    actual.body = copied(actual.body)
    x = X()
    assert operators(copy.deepcopy(actual), x).ours == ours, report
    for training in (True, False):
        expected.train(training), actual.train(training)
        assert_same(step(actual, x), step(expected, x))


def test_a_call_that_gives_other_arguments_than_the_forward_that_was_read():
    expected, actual, report = converted(parent(lambda self, x: self.body(x, x * 2, scale=2), TakesMore()))
    assert all(row.is_fused and not row.why for row in report.rows if "BatchNorm" in row.found)
    x = X()
    for args, kwargs, is_read in (
        ((x, x), {"scale": 2}, True),
        ((x, x, 2), {}, True),
        ((x,), {"residual": x, "scale": 2, "deep": False, "more": ()}, True),
        ((), {"x": x, "residual": x, "scale": 2}, True),
        ((x, x), {"scale": 2.0}, False),
        ((x, x), {}, False),
        ((x, None, 2), {}, False),
        ((x,), {"scale": 2}, False),
        ((x,), {}, False),
        ((x, x, 2), {"deep": True}, False),
        ((x, x, 2), {"deep": 0}, False),
        ((x, x, 2), {"more": [x]}, False),
        ((x, x, 2), {"other": 1}, False),
    ):
        torch.testing.assert_close(actual.body(*args, **kwargs), expected.body(*args, **kwargs))
        with torch.no_grad(), Operators() as seen:
            copy.deepcopy(actual).body(*args, **kwargs)
        assert seen.ours["leaky_relu, residual"] == is_read, (args, kwargs, seen.ours)
    for args, kwargs in (((), {}), ((x, x, 2, ()), {}), ((x, x), {"residual": x}), ((x,), {"x": x})):
        for each in (expected.body, actual.body):
            with pytest.raises(TypeError):
                each(*args, **kwargs)


def test_a_pickle_of_the_first_version():
    model = Changing()
    gk.convert(model)
    # It held whether additions were fused, and nothing else.
    model.__dict__[guard.FORWARD] = True
    assert operators(pickle.loads(pickle.dumps(model)), X().float()).ours == {"relu": 1}


def of_tensor_or_list(self, x):
    if isinstance(x, torch.Tensor):
        x = [x]
    return self.act(self.bn(torch.cat(x, 0)))


def of_tensor_or_pair(self, x):
    if not isinstance(x, torch.Tensor):
        x, y = x
        return F.elu(self.bn(x) + y)
    return F.leaky_relu(self.bn(x))


class OwnTensor(torch.Tensor):
    pass


@pytest.mark.parametrize("forward", [of_tensor_or_list, of_tensor_or_pair])
def test_a_forward_that_takes_a_tensor_or_a_list(forward):
    expected, actual, report = converted(block(forward))
    assert not any(row.becomes is None for row in report.rows if "Batch" in row.found)
    for x, is_known in (
        (X(), True),
        ([X(), X()], True),
        ((X(), X()), False),
        (nn.Parameter(X()), False),
        (X().as_subclass(OwnTensor), None),
    ):
        torch.testing.assert_close(actual(x), expected(x))
        torch.testing.assert_close(actual(x=x), expected(x=x))
        if is_known is not None:
            assert ("identity" not in operators(copy.deepcopy(actual), x).ours) == is_known
    for x in (X(), X().requires_grad_()):
        torch.testing.assert_close(torch.compile(actual, fullgraph=True, backend="eager")([x, x]), expected([x, x]))


class OfTensorOrList(Block):
    forward = of_tensor_or_list


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle], ids=lambda each: each.__name__)
def test_a_copy_of_a_forward_that_takes_a_tensor_or_a_list(copied):
    expected, actual, _ = converted(OfTensorOrList(nn.ReLU()).double())
    made = copied(actual)
    for x in (X(), [X(), X()]):
        torch.testing.assert_close(made(x), expected(x))
        assert operators(copy.deepcopy(made), x).ours == {"relu": 1}


def test_a_forward_that_takes_only_a_list():
    def forward(self, x):
        if isinstance(x, torch.Tensor):
            raise TypeError("not a list")
        return self.act(self.bn(x[0]))

    expected, actual, report = converted(block(forward))
    assert report.rows[0].is_fused
    x = X()
    torch.testing.assert_close(actual([x]), expected([x]))
    for each in (expected, actual):
        with pytest.raises(TypeError, match="not a list"):
            each(x)


@pytest.mark.parametrize("forward", [lambda self, x, y=None: elu_then(self, x, y), lambda self, x, y: elu_then(self, x, y)])
def test_an_elu_whose_output_another_argument_writes(forward):
    expected, actual, _ = converted(block(forward, nn.ELU()))
    assert type(actual.act) is nn.ELU
    x = X()
    results = [model(x, x) for model in (expected, actual)]
    for result in results:
        result.sum().backward()
    torch.testing.assert_close(results[1], results[0])
    assert_same(*({name: each.grad for name, each in model.named_parameters() if each.grad is not None} for model in (actual, expected)))


def elu_then(self, x, y):
    h = self.act(self.conv(x))
    if y is not None:
        h += y
    return self.conv(h)


@pytest.mark.parametrize("returned", [iter, dict.fromkeys, tuple, list], ids=["generator", "dict", "tuple", "list"])
def test_what_a_submodule_returns_is_unpacked_as_python_does(returned):
    def unpacking(self, x):
        a, b = self.child(self.act(self.bn(x)))
        return a + b

    child = type("Two", (nn.Module,), {"forward": lambda self, x: returned([x, 2 * x])})()
    expected, actual, report = converted(block(unpacking, child=child))
    assert report.rows[0].is_fused
    x = X()
    assert_same(step(actual, x), step(expected, x))
    child = type("Three", (nn.Module,), {"forward": lambda self, x: returned([x, 2 * x, 3 * x])})()
    for each in (expected, actual):
        each.child = child
        with pytest.raises(ValueError, match=r"too many values to unpack \(expected 2\)"):
            each(x)


def test_a_sum_has_the_memory_format_of_its_first_term():
    for forward in (lambda self, x, y: F.relu(y + self.bn(x)), lambda self, x, y: F.relu(self.bn(x) + y)):
        expected, actual, report = converted(block(forward))
        assert report.rows[0].becomes == "batch_norm_act(relu, residual)"
        x, y = X().to(memory_format=torch.channels_last), X()
        for pair in ((x, y), (y, x), (x, x)):
            assert actual(*pair).stride() == expected(*pair).stride()
            torch.testing.assert_close(actual(*pair), expected(*pair))


@pytest.mark.parametrize("writer", ["a module", "out="])
def test_a_residual_that_is_written_later(writer):
    adding = type("Adding", (nn.Module,), {"forward": lambda self, x: x.add_(1.0)})()

    def forward(self, x):
        y = x * 1
        z = F.elu(self.bn(self.conv(x)) + y)
        return z + (self.adding(y) if writer == "a module" else torch.mul(x.detach(), 2, out=y.detach()))

    expected, actual, report = converted(block(forward, adding=adding))
    assert "writes the residual, which the gradient of elu needs" in next(row.why for row in report.rows if row.name == "bn")
    x = X()
    assert_same(step(actual, x), step(expected, x))


@pytest.mark.parametrize("reader", ["+=", "relu_", "returned", "convolution"])
@pytest.mark.parametrize("by", ["module", "function"])
def test_an_elu_alone_whose_output_is_written(by, reader):
    def forward(self, x):
        y = self.act(self.conv(x)) if by == "module" else F.elu(self.conv(x))
        if reader == "+=":
            y += x
        return F.relu_(y) if reader == "relu_" else self.conv(y) if reader == "convolution" else y

    expected, actual, report = converted(block(forward, nn.ELU()))
    row = next(row for row in report.rows if row.found.lower() == "elu" and (row.name == "act") == (by == "module"))
    assert (row.becomes is not None) == (reader == "convolution") and ("keeps its output" in row.why) == (reader != "convolution")
    x = X()
    assert_same(step(actual, x), step(expected, x))


def share_activation(model):
    model.act2 = model.act
    return lambda: setattr(model, "act2", nn.ELU())


def tie_weights(model):
    model.conv2 = nn.Conv2d(3, 3, 1).double()
    model.conv2.weight = model.conv.weight
    return lambda: setattr(model.conv2, "weight", nn.Parameter(torch.ones(3, 3, 1, 1).double()))


@pytest.mark.parametrize("share", [share_activation, tie_weights])
def test_what_was_shared_when_it_was_read(share):
    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        return F.conv2d(x, self.conv2.weight) if hasattr(self, "conv2") else self.act2(x - 1)

    models = [block(forward) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ends = [share(model) for model in models]
    assert next(row for row in gk.convert(models[1]).rows if row.name == "bn").is_fused
    x = X()
    torch.testing.assert_close(models[1](x), models[0](x))
    for end in ends:
        end()
    torch.testing.assert_close(models[1](x), models[0](x))


def test_fold_of_a_batch_norm_that_stays_in_training():
    class Adapting(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].training = True
            return self

    model = Adapting(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).double()
    assert type(gk.fold(model)[1]) is nn.BatchNorm2d


def test_a_submodule_named_by_a_word_of_python():
    model = block(lambda self, x: self.act(self.parts["class"](self.bn(x))), parts=nn.ModuleDict({"class": nn.Conv2d(3, 3, 1)}).double())
    expected, actual, _ = converted(model)
    x = X()
    assert_same(step(actual, x), step(expected, x))


def test_an_argument_that_is_none_goes_to_the_forward_itself():
    expected, actual, report = converted(block(lambda self, x, y: self.act(self.bn(x)) if y is None else self.act(self.bn(x) + y)))
    assert report.rows[0].becomes == "batch_norm_act(relu, residual)"
    x = X()
    torch.testing.assert_close(actual(x, None), expected(x, None))
    torch.testing.assert_close(actual(x, y=None), expected(x, y=None))
    torch.testing.assert_close(actual(x, x), expected(x, x))


def test_a_scripted_submodule_whose_mode_is_switched():
    model = block(lambda self, x: self.scripted.eval() and self.act(self.bn(x)), scripted=torch.jit.script(nn.Sequential(nn.ReLU())))
    assert "reads self.scripted.eval of a scripted module" in gk.convert(model).rows[0].why


def freeze_by_class(self, mode=True):
    nn.Module.train(self, mode)
    for module in self.modules():
        if type(module) is nn.BatchNorm2d:
            module.eval()
    return self


class Refusing(nn.Identity):
    def __setattr__(self, name, value):
        if name == "training" and hasattr(self, "training"):
            raise AttributeError("this module's mode stays")
        super().__setattr__(name, value)


def test_modes_that_cannot_be_set_are_not_set_by_reading():
    model = Traced(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval().append(Refusing())
    gk.convert(model)
    assert [each.training for each in model.modules()] == [False] * 4 + [True]


def test_a_method_that_freezes_by_the_class_of_a_module():
    model = block(WRITTEN["module"][0])
    type(model).freeze = freeze_by_class
    expected, actual, _ = converted(model)
    assert [each.freeze().bn.training for each in (expected, actual)] == [False, False]


def test_asking_for_what_conversion_does_not_change_is_no_reason():
    def forward(self, x, *y):
        if y:
            print(self.__class__.__name__, f"{self.__class__}", type(self.conv) is nn.Linear)
            re.compile("")
        return self.act(self.bn(x))

    model = block(forward)
    expected, actual, report = converted(nn.Sequential(model, nn.Sequential(nn.BatchNorm2d(3).double(), nn.ReLU())))
    assert [row.becomes for row in report.rows if row.name in ("0.bn", "1.0")] == ["batch_norm_act(relu)"] * 2
    x = X()
    assert_same(step(actual, x), step(expected, x))


def test_a_mode_that_is_switched_by_the_class_of_a_module():
    model = block(WRITTEN["module"][0])
    type(model).train = freeze_by_class
    expected, actual, report = converted(model)
    assert {row.becomes for row in report.rows} == {None} and "asks for the class" in report.rows[0].why
    x = X()
    assert_same(step(actual.train(), x), step(expected.train(), x))


# Bases whose instances have no __dict__ of their own, and a registry that refuses a class of the same name.
class Empty:
    __slots__ = ()


class Shape(Protocol):
    def forward(self, x): ...


REGISTRY = {}


class Registered:
    def __init_subclass__(cls):
        super().__init_subclass__()
        if cls.__name__ in REGISTRY:
            raise KeyError(f"{cls.__name__} is registered already")
        REGISTRY[cls.__name__] = cls


def make_block(self):
    nn.Module.__init__(self)
    self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()


@pytest.mark.parametrize("base", [abc.ABC, Generic[TypeVar("T")], Shape, Empty], ids=str)
def test_classes_whose_first_base_has_no_dict(base):
    members = {"__init__": make_block, "forward": WRITTEN["module"][0], "__module__": __name__}
    kind = types.new_class("OfTwoBases", (base, nn.Module), exec_body=lambda namespace: namespace.update(members))
    model = kind().double()
    expected, actual, report = converted(model)
    assert report.rows[0].is_fused
    x = X()
    assert_same(step(copy.deepcopy(actual), x), step(expected, x))
    assert type(gk.revert(actual)) is kind


def test_reading_makes_no_class_that_a_registry_sees():
    class Net(Registered, nn.Module):
        __init__, forward = make_block, WRITTEN["module"][0]

    class Plain(Registered, nn.Module):
        __init__, forward = make_block, LEFT["mode and back"][0]

    model = nn.Sequential(Net(), Plain())
    report = gk.convert(model)
    assert {"Net": Net, "Plain": Plain} == REGISTRY
    assert "the forward of Net stays: its class has an __init_subclass__" in str(report)
    assert [row.why.remedy for row in report.rows if isinstance(row.why, Reason)] == 2 * [
        'change it as the guide says under "What it leaves alone"'
    ]
    assert [type(each) for each in model] == [Net, Plain] and type(model[0].bn) is gk.BatchNormAct2d


class Traced(nn.Sequential):
    """Like nn.Sequential, whose own forward is known and is not traced."""

    def forward(self, x):
        for module in self:
            x = module(x)
        return x


def profiled(kind):
    if kind == "cProfile":
        return cProfile.Profile()
    if kind == "torch.profiler":
        return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True)
    return contextlib.nullcontext()


def seen_by_a_profiler():
    return 1


def is_seen_after(work, profiler):
    with profiled(profiler) as profile:
        work()
        seen_by_a_profiler()
    names = [str(each.code) for each in profile.getstats()] if profiler == "cProfile" else [each.name for each in profile.events()]
    return any("seen_by_a_profiler" in each for each in names)


@pytest.mark.parametrize("of", [gk.convert, gk.fold])
@pytest.mark.parametrize("profiler", ["cProfile", "torch.profiler"])
def test_reading_under_a_profiler(profiler, of):
    model = Traced(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
    made = []
    # The profiler of torch 2.11 does not record functions of Python.
    assert is_seen_after(lambda: made.append(of(copy.deepcopy(model))), profiler) == is_seen_after(lambda: None, profiler)
    assert str(made[0]) == str(of(copy.deepcopy(model)))


def test_reading_leaves_trace_functions_the_collector_and_warnings_alone():
    called = []
    state = gc.isenabled(), gc.get_threshold(), list(gc.callbacks), list(warnings.filters)

    def collected(phase, info):
        called.append(gc.isenabled())

    def traced(frame, event, argument):
        called.append(True)

    tracer = sys.gettrace()
    gc.callbacks.append(collected)
    sys.setprofile(traced)
    try:
        report = gk.convert(Traced(nn.BatchNorm2d(3), nn.ReLU()))
        gc.collect()
        assert sys.getprofile() is traced and sys.gettrace() is tracer
    finally:
        sys.setprofile(None)
        gc.callbacks.remove(collected)
    assert report.rows[0].is_fused and called and all(called)
    assert state == (gc.isenabled(), gc.get_threshold(), gc.callbacks, warnings.filters)


def test_reading_in_one_thread_disturbs_no_other():
    working, stop, rounds = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), threading.Event(), []
    models = [Traced(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(20)]

    def work():
        while not stop.is_set():
            working.steps = torch.rand(1)
            working(torch.randn(2, 3))
            models[0](torch.randn(2, 3, 4, 4))
            rounds.append(trace._ONE_AT_A_TIME.locked())

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(work)
        try:
            fused = [gk.convert(model).rows[0].is_fused for model in models[1:]]
        finally:
            stop.set()
        other.result()
    assert all(fused) and any(rounds)


def test_reading_does_not_depend_on_the_callers_modes():
    model = Traced(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        assert gk.convert(model).rows[0].is_fused


def test_reading_runs_nothing_that_it_refuses():
    models = [block(LEFT[name][0]) for name in ("random", "Python's random", "NumPy's random")]
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for model in models:
        gk.convert(model)
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_what_is_finalized_meanwhile_is_no_part_of_the_forward():
    class Cycle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            SWITCHES.get("relu")

    threshold = gc.get_threshold()
    try:
        Cycle()
        gc.set_threshold(1)
        model = Traced(nn.BatchNorm2d(3), nn.ReLU())
        assert gk.convert(model).rows[0].is_fused
    finally:
        gc.set_threshold(*threshold)
    assert gc.isenabled()


@pytest.mark.parametrize(("of", "why"), [("bn", "it has a hook"), ("act", "ReLU has a hook"), ("conv", "")])
def test_hooks_that_were_there_before_see_what_they_saw(of, why):
    seen = [], []
    model = block(WRITTEN["module"][0])
    expected, actual = model, copy.deepcopy(model)
    for each, its in zip((expected, actual), seen, strict=True):
        getattr(each, of).register_forward_hook(lambda module, inputs, output, its=its: its.append(output.clone()))
    report = gk.convert(actual)
    assert next(row.why for row in report.rows if row.name == "bn").startswith(why)
    x = X()
    assert_same(step(actual, x), step(expected, x))
    assert len(seen[0]) == len(seen[1]) == 1
    torch.testing.assert_close(seen[1], seen[0])


def test_residual_can_be_left_out():
    expected, actual, report = converted(block(WRITTEN["bn + x"][0]), residual=False)
    x = X()
    assert operators(copy.deepcopy(actual), x).ours == {"identity": 1} and "residual=False" in report.rows[0].why
    assert_same(step(actual, x), step(expected, x))


@pytest.mark.parametrize(
    "residual", [torch.randn(3, 1, 1).double(), torch.randn(4, 3, 5, 5), torch.randn(())], ids=["broadcast", "float32", "scalar"]
)
def test_sums_that_broadcast_or_promote(residual):
    model = block(lambda self, x: self.act(self.bn(x) + self.residual))
    model.register_buffer("residual", residual)
    expected, actual, report = converted(model)
    assert report.rows[0].becomes == "batch_norm_act(relu, residual)"
    x = X()
    assert_same(step(actual, x), step(expected, x))


@pytest.mark.parametrize("written", [add_, lambda y, x: y.add_(x)], ids=["+=", "add_"])
def test_a_sum_written_in_place_keeps_dtype_and_shape(written):
    model = block(lambda self, x: self.act(written(self.bn(x), self.residual))).float()
    for residual in (torch.randn(4, 3, 5, 5).double(), torch.randn(3, 1, 1), torch.randn(2, 4, 3, 5, 5)):
        model.register_buffer("residual", residual)
        expected, actual, report = converted(model)
        assert report.rows[0].becomes == "batch_norm_act(relu, residual)"
        x = torch.randn(4, 3, 5, 5)
        if residual.dim() == 5:
            for each in (expected, actual):
                with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
                    each(x)
        else:
            torch.testing.assert_close(actual(x), expected(x))


def test_elu_with_a_scale_is_not_elu():
    expected, actual, report = converted(block(lambda self, x: F.elu_(self.bn(x), 0.5, 2.0) + F.elu_(x * 1, 0.5, 2.0)))
    assert [row.why for row in report.rows][:3] == ["it is called with a scale, which the kernel does not have"] * 2 + [
        "elu_ is called with a scale, which the kernel does not have"
    ], report
    x = X()
    assert_same(step(actual, x), step(expected, x))


def test_one_batch_norm_called_twice_and_one_activation_called_thrice():
    expected, actual, report = converted(block(lambda self, x: self.act(self.bn(self.conv(self.act(self.bn(x)))) + self.act(x * 1))))
    x = X()
    assert operators(copy.deepcopy(actual), x).ours == {"relu": 1, "relu, residual": 1}, report
    assert_same(step(actual, x), step(expected, x))


def test_batch_norm_frozen_and_shared_modules():
    model = block(WRITTEN["module"][0])
    model = nn.Sequential(model, copy.deepcopy(model), model)
    model[0].bn.eval().requires_grad_(False)
    expected, actual, _ = converted(model)
    x = X()
    assert operators(copy.deepcopy(actual), x).ours == {"relu": 3}
    assert_same(step(actual, x), step(expected, x))
    assert actual[0] is actual[2] and not actual[0].bn.training and actual[1].bn.training and actual.training


def test_weights_that_are_tied_stay_tied():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).double()
    model[4].weight, model[3].weight = model[1].weight, model[0].weight
    expected, actual, _ = converted(model)
    assert actual[4].weight is actual[1].weight
    x = X()
    assert_same(step(actual, x), step(expected, x))


# what changes after conversion


def hook_batch_norm(model, seen):
    model.bn.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))


def hook_activation(model, seen):
    model.act.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))


def hook_every_module(model, seen):
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    model(X())
    handle.remove()


CHANGES = {
    "hook on the batch norm": hook_batch_norm,
    "hook on the activation": hook_activation,
    "hook on every module": hook_every_module,
    "flag": lambda model, seen: setattr(model, "flag", False),
    "number that becomes a tensor": lambda model, seen: setattr(model.conv, "scale", torch.tensor([[[2.0]], [[1.0]], [[1.0]]])),
    "nested container": lambda model, seen: model.nested["scales"].append(3.0),
    "attribute that was not there": lambda model, seen: setattr(model, "absent", 3.0),
    "container of the class": lambda model, seen: setattr(model, "shared", [2.0]),
    "attribute of a submodule": lambda model, seen: setattr(model.conv, "scale", 2.0),
    "activation": lambda model, seen: setattr(model, "act", nn.ELU()),
    "parameter of the activation": lambda model, seen: setattr(model.act, "negative_slope", 0.5),
    "batch norm": lambda model, seen: setattr(model, "bn", nn.InstanceNorm2d(3).double()),
    "submodule None": lambda model, seen: setattr(model, "optional", None),
    "buffer that was None": lambda model, seen: setattr(model, "mask", torch.tensor(3.0).double()),
    "buffer None": lambda model, seen: setattr(model, "gain", None),
    "parameter of a submodule None": lambda model, seen: setattr(model.conv, "bias", None),
    "longer ModuleList": lambda model, seen: model.blocks.append(nn.BatchNorm2d(3).double()),
    "mode": lambda model, seen: model.bn.eval(),
    "forward": lambda model, seen: setattr(model, "forward", lambda x: model.conv(x)),
    "pruning": lambda model, seen: l1_unstructured(model.conv, "weight", 0.5),
    "SyncBatchNormAct": lambda model, seen: gk.convert_sync_batch_norm(model),
    "method": lambda model, seen: setattr(model, "scaled", lambda y: y * 3),
    "method of the class": lambda model, seen: setattr(type(model), "scaled", lambda self, y: y * 4),
    "class of a submodule": lambda model, seen: setattr(model, "optional", nn.Identity()),
    "another order": lambda model, seen: model.nested.update(scales=[3.0], order=model.nested.pop("order")),
    "minus zero": lambda model, seen: model.nested["order"].update(b=-0.0),
    "order of a dict": lambda model, seen: model.nested["order"].update(a=model.nested["order"].pop("a")),
    "shadowed submodule": lambda model, seen: model.__dict__.update(act=nn.ELU()),
    "a class": lambda model, seen: setattr(model, "kind", nn.Identity),
    "an attribute of an object": lambda model, seen: setattr(model.config, "scale", 3.0),
    "an attribute of an object that is gone": lambda model, seen: setattr(model, "config", types.SimpleNamespace(scale=3.0)),
    "flag of a branch that is off": lambda model, seen: setattr(model, "is_on", True),
    "longer list in a dict": lambda model, seen: model.stages["a"].append(nn.BatchNorm2d(3).double()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_after_conversion(name):
    def forward(self, x):
        x = x * getattr(self, "absent", 1.0) * self.nested["scales"][-1] * self.shared[0]
        y = self.bn(self.conv(x) * self.conv.scale)
        if self.flag:
            y = self.act(y)
        for each in self.blocks:
            y = each(y)
        y = y if self.mask is None else y * self.mask
        y = y if self.gain is None else y * self.gain
        y = y if self.conv.bias is None else y * 2
        y = self.scaled(y) if isinstance(self.optional, nn.Conv2d) else y
        for number in self.nested["order"].values():
            y = y * math.copysign(2.0, number) + number
        y = y if issubclass(self.kind, nn.Conv2d) else y * 2
        for each in self.stages["a"]:
            y = each(y)
        if self.is_on:
            y = y * SLOPE * len(SWITCHES)
        y = y * self.config.scale
        return y if self.optional is None else self.optional(y)

    model = block(forward, nn.LeakyReLU(0.2), config=Sizes(), is_on=False)
    model.conv.scale = 1.0
    model.nested, type(model).shared, type(model).kind = {"scales": [2.0], "order": {"a": 1.0, "b": 0.0}}, [1.0], nn.Conv2d
    type(model).scaled, model.stages = lambda self, y: y * 2, nn.ModuleDict({"a": nn.ModuleList()})
    model.optional = nn.Conv2d(3, 3, 1).double()
    model.register_buffer("mask", None)
    model.register_buffer("gain", torch.tensor(2.0).double())
    expected, actual, _ = converted(model)
    assert operators(copy.deepcopy(actual), X()).ours == {"leaky_relu": 1}
    seen = [], []
    for each, its in zip((expected, actual), seen, strict=True):
        torch.manual_seed(0)
        CHANGES[name](each, its)
    x = X()
    assert_same(step(actual, x), step(expected, x))
    assert len(seen[0]) == len(seen[1])
    torch.testing.assert_close(seen[1], seen[0])


def test_parts_of_a_converted_sequential():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1)).double()
    expected, actual, _ = converted(model)
    x = X()
    for each in (expected, actual):
        each.append(nn.BatchNorm2d(3).double())
    torch.testing.assert_close(actual[:2](x), expected[:2](x))
    assert_same(step(actual, x), step(expected, x))


def test_converting_twice_is_converting_once():
    model, x = network("ResNet-18")
    first = gk.convert(model)
    classes = [type(module) for module in model.modules()]
    assert gk.convert(model) == first
    assert [type(module) for module in model.modules()] == classes
    assert operators(model, x).ours == NETWORKS["ResNet-18"][2]


def test_revert_leaves_what_was_made_of_a_module_since():
    model, x = network("ResNet-18")
    plain = copy.deepcopy(model)
    gk.convert(model)
    gk.convert_sync_batch_norm(model)
    gk.revert(model)
    assert isinstance(model.bn1, gk.SyncBatchNormAct)
    assert_same(step(model, x), step(plain, x))


# standalone activations


@pytest.mark.parametrize("module", [nn.LeakyReLU(0.2, inplace=True), nn.ELU(0.5), nn.SiLU(), nn.PReLU(3)], ids=repr)
def test_standalone_activations_become_ours(module):
    expected, actual, report = converted(nn.Sequential(nn.Conv2d(3, 3, 1), module, nn.Conv2d(3, 3, 1)).double())
    assert type(actual[1]) is not type(module) and isinstance(actual[1], type(module)) and report.rows[0].becomes
    x = X()
    assert_same(step(actual, x), step(expected, x))
    assert type(gk.revert(actual)[1]) is type(module) and actual[1].__dict__.keys() == module.__dict__.keys()


def test_a_silu_that_becomes_in_place_after_conversion():
    def forward(self, x):
        y = self.act(x)
        return y + x

    expected, actual, _ = converted(block(forward, nn.SiLU()))
    expected.act.inplace = actual.act.inplace = True
    x = X()
    assert_same(step(actual, x), step(expected, x))


@pytest.mark.parametrize(
    "forward",
    [
        F.leaky_relu,
        F.elu,
        F.silu,
        F.leaky_relu_,
        F.elu_,
        lambda x: F.leaky_relu(input=x, negative_slope=0.2),
        lambda x: F.silu(input=x, inplace=False),
        lambda x: F.elu(x, 0.5, True),
    ],
)
def test_standalone_functions_become_ours(forward):
    expected, actual, report = converted(block(lambda self, x: self.conv(forward(self.conv(x)))))
    assert [row.becomes is not None for row in report.rows if row.name == ""] == [True]
    x = X()
    assert not operators(copy.deepcopy(actual), x).torchs
    assert_same(step(actual, x), step(expected, x))


def used_again(self, x):
    y = self.conv(x)
    return self.act(y) + y


def written_through_a_view(self, x):
    y = self.conv(x)
    rows = y.view(-1)
    return self.conv(self.act(y)) * rows.mean()


# A SiLU in place, and whether nothing else reads its input.
SILU_IN_PLACE = {
    "module": (lambda self, x: self.conv(self.act(self.conv(x))), True),
    "function": (lambda self, x: self.conv(F.silu(self.conv(x), inplace=True)), True),
    "function by place": (lambda self, x: self.conv(F.silu(self.conv(x), True)), True),
    "function by name": (lambda self, x: self.conv(F.silu(input=self.conv(x), inplace=True)), True),
    "past an identity": (lambda self, x: self.conv(self.act(self.blocks[0](self.conv(x)))), True),
    "a sum": (lambda self, x: self.conv(self.act(self.conv(x) + x)), True),
    "argument": (lambda self, x: self.act(x), False),
    "argument past an identity": (lambda self, x: self.act(self.blocks[0](x)), False),
    "view of the argument": (lambda self, x: self.act(x.view(x.shape)) + x, False),
    "used again": (used_again, False),
    "used again by a view": (written_through_a_view, False),
    "function used again": (lambda self, x: (lambda y: F.silu(y, inplace=True) + y)(self.conv(x)), False),
    "module of unknown code": (lambda self, x: self.act(self.child(x)), False),
}


@pytest.mark.parametrize("name", SILU_IN_PLACE)
def test_a_silu_in_place(name):
    forward, is_only_reader = SILU_IN_PLACE[name]
    expected, actual, report = converted(block(forward, nn.SiLU(True), child=Child(), blocks=nn.ModuleList([nn.Identity()])))
    row = next(row for row in report.rows if row.found in ("SiLU", "silu") and (row.name == "act") != name.startswith("function"))
    assert (row.becomes == "swish") == is_only_reader and ("it is in place" in row.why) != is_only_reader, report
    assert type(actual.act) is nn.SiLU
    x = X()
    assert_same(step(actual, x), step(expected, x))
    for model in (actual, expected):
        # A tensor that the activation writes.
        y = x.clone()
        with torch.no_grad():
            model.act(y)
        torch.testing.assert_close(y, F.silu(x))


CHANGES_BESIDE_A_SILU = {
    "hook that keeps what the convolution returns": lambda model, seen: model.conv.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    ),
    "hook on the activation": lambda model, seen: model.act.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])),
    "activation": lambda model, seen: setattr(model, "act", nn.ReLU()),
    "convolution": lambda model, seen: setattr(model, "conv", nn.Identity()),
}


@pytest.mark.parametrize("name", CHANGES_BESIDE_A_SILU)
def test_what_changes_beside_a_silu_in_place_after_conversion(name):
    expected, actual, report = converted(block(lambda self, x: self.act(self.conv(x)) * 2, nn.SiLU(True)))
    assert next(row.becomes for row in report.rows if row.name == "act") == "swish"
    seen = [], []
    for each, its in zip((expected, actual), seen, strict=True):
        CHANGES_BESIDE_A_SILU[name](each, its)
    x = X()
    with torch.no_grad():
        inputs = x.clone(), x.clone()
        torch.testing.assert_close(actual(inputs[1]), expected(inputs[0]))
    torch.testing.assert_close(inputs[1], inputs[0])
    torch.testing.assert_close(seen[1], seen[0])


def test_modules_in_a_forward_that_cannot_be_read_take_torchs_keyword():
    def forward(self, x):
        y = self.conv(input=x if x.sum() < math.inf else -x)
        for each in (self.bn, *self.blocks):
            y = each(input=y)
        return y

    blocks = nn.ModuleList([nn.LeakyReLU(), nn.ELU(inplace=True), nn.SiLU(), nn.PReLU()]).double()
    expected, actual, report = converted(block(forward, blocks=blocks))
    assert sum(row.becomes is not None for row in report.rows) == 5, report
    x = X()
    assert_same(step(actual, x), step(expected, x))


@pytest.mark.parametrize(
    ("module", "why"), [(nn.ReLU(), "nothing to fuse"), (nn.SiLU(True), "in place"), (nn.RReLU(), "other slopes"), (nn.CELU(), "no kernel")]
)
def test_activations_that_stay(module, why):
    _, actual, report = converted(nn.Sequential(nn.Identity(), module))
    assert type(actual[1]) is type(module) and report.rows[0].becomes is None and why in report.rows[0].why


# bad input


def quantised():
    return nn.Sequential(nn.BatchNorm2d(3), torch.ao.nn.quantized.Linear(3, 3))


BAD = {
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())), "the model is scripted"),
    "quantised": (quantised, "the model is quantised (1: Linear)"),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d(), nn.ReLU()),
        "the model has parameters without a shape (0: LazyConv2d)",
    ),
    "no batch norm": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), "the model has no batch, group or instance norm"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_and_untouched(name):
    make, note = BAD[name]
    model = make()
    before = [(type(module), repr(module)) for module in model.modules()]
    report = gk.convert(model, check=None if name == "scripted" else torch.randn(2, 3, 4, 4) if name != "quantised" else torch.randn(2, 3))
    assert note in str(report)
    assert [(type(module), repr(module)) for module in model.modules()] == before


def test_a_scripted_submodule_is_left():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())), nn.BatchNorm2d(3), nn.ReLU()).double()
    plain = copy.deepcopy(model)
    report = gk.convert(model)
    assert [row.becomes for row in report.rows] == ["batch_norm_act(relu)"] and report.notes == ("0 is scripted and left as it is",)
    x = X()
    assert_same({"output": model(x).detach()}, {"output": plain(x).detach()})


@pytest.mark.parametrize("function", [gk.convert, gk.revert, gk.fold, gk.convert_sync_batch_norm])
@pytest.mark.parametrize(("model", "kind"), [(torch.ones(1), "Tensor"), ({}, "dict"), (nn.ReLU, "the class ReLU")])
def test_what_is_no_module(function, model, kind):
    with pytest.raises(TypeError, match=rf"^model must be a torch\.nn\.Module, not {kind}$"):
        function(model)


def interrupted(function, after):
    calls = iter(range(after))

    def call(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return call


@pytest.mark.parametrize("converted_before", [False, True])
@pytest.mark.parametrize("during", ["reading", "applying", "check"])
def test_an_exception_leaves_the_model_as_it_was(during, converted_before, monkeypatch):
    model, x = network("ResNet-18")
    if converted_before:
        gk.convert(model)
    before = [(type(module), dict(module.__dict__)) for module in model.modules()]
    buffers = [each.clone() for each in model.buffers()]
    # gradkernels.convert is the function.
    module = importlib.import_module("gradkernels.conversion.convert")
    if during == "reading":
        monkeypatch.setattr(rewrite, "rewrite_forward", interrupted(rewrite.rewrite_forward, 5))
    elif during == "applying":
        monkeypatch.setattr(module, "check_act", interrupted(module.check_act, 5))
    with pytest.raises(RuntimeError if during == "check" else KeyboardInterrupt):
        gk.convert(model, check=x[:, :2] if during == "check" else x)
    assert [(type(module), module.__dict__) for module in model.modules()] == before
    assert all(torch.equal(*each) for each in zip(buffers, model.buffers(), strict=True))


# functions that choose by a shape


def padded(x, layer):
    return F.pad(x, (0, 1)) if x.shape[-1] % 2 else x


def written(x, layer):
    return x.mul_(2.0) if x.shape[-1] % 2 else x


def none_if_even(x, layer):
    return x if x.shape[-1] % 2 else None


def switched(x, layer):
    if x.shape[-1] % 2:
        layer.flag = False
    return x


def frozen(x, layer):
    if x.shape[-1] % 2:
        layer.eval()
    return x


def called_with_flag(self, x):
    x = switched(x, self.child)
    return self.act(self.bn(x)) if self.child.flag else x


def frozen_between(self, x):
    y = self.bn(self.conv(x))
    x = frozen(x, self.bn)
    return self.act(y + x)


def written_by_a_function_between(self, x):
    x = x * 1
    y = self.bn(x)
    return self.act(y + written(x, self.conv))


# The forward, how often each fused operator runs, and a part of the reason if nothing is fused.
CHOOSES = {
    "padded": (lambda self, x: self.act(self.bn(self.conv(padded(x, self.conv)))), {"relu": 1}, ""),
    "residual": (lambda self, x: self.act(self.bn(self.conv(x)) + written(x * 1, self.conv)), {"relu, residual": 1}, ""),
    "None": (lambda self, x: self.act(self.bn(x)) if none_if_even(x, self.conv) is None else x, {}, "compares"),
    "truth": (lambda self, x: self.act(self.bn(x)) if padded(x, self.conv).sum() > 0 else x, {}, "cannot be traced"),
    "flag": (called_with_flag, {}, "reads self.child.flag after a call that may write it"),
    "frozen": (frozen_between, {"identity": 1}, "may read or write its statistics"),
    "written": (written_by_a_function_between, {"identity": 1}, "may write its input"),
}


@pytest.mark.parametrize("name", CHOOSES)
def test_a_function_that_chooses_by_a_shape(name):
    forward, fused, why = CHOOSES[name]
    model = block(forward)
    model.child = Child()
    model.child.flag = True
    expected, actual, report = converted(model.double())
    row = next(row for row in report.rows if row.name == "bn")
    assert row.is_fused == (not why) and why in row.why, report
    for x in (X(), X()[..., :4], X()):
        if fused:
            assert operators(copy.deepcopy(actual), x).ours == fused
        with torch.no_grad():
            assert_same({"output": actual(x.clone()), **actual.state_dict()}, {"output": expected(x.clone()), **expected.state_dict()})
    gk.fold(expected)


def drops(x, p, training):
    if not training:
        return x
    size = len(x.shape)
    return x * torch.rand(size, dtype=x.dtype).lt(p).sum()


def activated_in_evaluation(self, x):
    y = self.bn(x)
    return y.neg() if self.training else self.act(y)


def written_in_evaluation(self, x):
    y = self.act(self.bn(self.conv(x)) if self.training else x * 1)
    if not self.training:
        y += x
    return y


# The forward, what is fused in training, and in evaluation.
BY_MODE = {
    "training": (lambda self, x: self.act(self.bn(x)) if self.training else self.bn(x), {"relu": 1}, {"identity": 1}),
    "mode of a child": (lambda self, x: self.act(self.bn(x)) if self.conv.training else self.bn(x), {"relu": 1}, {"identity": 1}),
    "a function that draws": (
        lambda self, x: drops(self.act(self.bn(x)), 0.5, self.training) + x,
        {"relu": 1},
        {"relu": 1},
    ),
    "residual in evaluation": (
        lambda self, x: self.act(drops(self.bn(x), 0.5, self.training) + x),
        {"identity": 1},
        {"relu, residual": 1},
    ),
    "activated in evaluation": (activated_in_evaluation, {"identity": 1}, {"relu": 1}),
    "written in evaluation": (written_in_evaluation, {"elu": 1}, {}),
    "another batch norm": (
        lambda self, x: F.elu(self.bn(x)) if self.training else self.act(self.blocks[0](x)),
        {"elu": 1},
        {"relu": 1},
    ),
}


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle], ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", BY_MODE)
def test_a_forward_that_reads_its_mode(name, copied, monkeypatch):
    forward, *ours = BY_MODE[name]
    act = nn.ELU() if name == "written in evaluation" else nn.ReLU()
    expected = block(forward, act, blocks=nn.ModuleList([nn.BatchNorm2d(3)])).double()
    monkeypatch.setattr(sys.modules[__name__], "Written", type(expected), raising=False)
    expected, actual, report = converted(expected)
    actual = copied(actual)
    row = next(row for row in report.rows if row.name == "bn")
    assert row.is_fused == any(each != "identity" for each in ours[0]), report
    assert name != "another batch norm" or [row.why for row in report.rows if row.name == "blocks.0"] == ["only in evaluation"]
    for change in (
        lambda each: each.train(),
        lambda each: each.eval(),
        lambda each: each.train(),
        lambda each: each.bn.eval(),
        lambda each: each.conv.eval(),
        lambda each: each.eval(),
    ):
        change(expected), change(actual)
        x, steps = X(), []
        if all(module.training == actual.training for module in actual.modules()):
            assert operators(copy.deepcopy(actual), x).ours == ours[not actual.training]
        for each in (actual, expected):
            torch.manual_seed(0)
            steps.append(step(each, x))
        assert_same(*steps)


def test_a_mode_that_a_hook_may_write_is_a_reason():
    def make():
        torch.manual_seed(0)
        model = block(lambda self, x: self.act(self.bn(self.conv(x))) * (2.0 if self.training else 3.0))
        model.conv.register_forward_hook(lambda *_: setattr(model, "training", not model.training))
        return model

    expected, actual = make(), make()
    assert "reads self.training" in gk.convert(actual).rows[0].why
    x = X()
    for _ in range(2):
        assert_same(step(actual, x), step(expected, x))


def test_a_mode_that_is_read_without_effect():
    def once(self, x):
        y = self.act(self.bn(x))
        return y * 2 if self.training and not self.flag else y

    def twice(self, x):
        y = self.act(self.bn(x))
        return y * 2 if self.training and not self.bn.training else y

    x = X()
    for forward in (once, twice):
        expected, actual, report = converted(block(forward))
        assert report.rows[0].is_fused, report
        for change in (
            lambda each: each.eval(),
            lambda each: each.train(),
            lambda each: each.bn.eval(),
            lambda each: setattr(each, "flag", False),
        ):
            change(expected), change(actual)
            assert_same(step(actual, x), step(expected, x))


class WithDefault:
    scale = 1.0

    def __init__(self):
        self.scale = 2.0


def test_an_attribute_of_an_object_whose_class_has_a_default():
    expected, actual, report = converted(block(lambda self, x: self.act(self.bn(x)) * self.config.scale, config=WithDefault()))
    assert report.rows[0].is_fused
    x = X()
    for change in (lambda config: None, lambda config: setattr(config, "scale", 3.0), lambda config: delattr(config, "scale")):
        change(expected.config), change(actual.config)
        assert_same(step(actual, x), step(expected, x))


# across the border of a module


def ending(width=3, *layers):
    """A child that ends with a batch norm."""
    return nn.Sequential(nn.Conv2d(3, width, 1), *layers, nn.BatchNorm2d(width))


class Parent(nn.Module):
    """Gets its forward as an argument, and calls its child `body`."""

    def __init__(self, forward, body, act=None, **modules):
        super().__init__()
        self.body, self.act, self.own = body, nn.ReLU() if act is None else act, forward
        for name, module in modules.items():
            setattr(self, name, module)


def parent(forward, body, act=None, **modules):
    return type("Written", (Parent,), {"forward": forward})(forward, body, act, **modules).double()


class AddsItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = ending()

    def forward(self, x):
        return self.body(x) + x


class ActivatesFirst(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.act, self.conv = nn.LeakyReLU(0.2) if act is None else act, nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(self.act(x))


class Activates(nn.Module):
    """Nothing but a function that it holds, as the activations of timm and transformers."""

    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, input):
        return self.function(input, **self.options)


class Excites(nn.Module):
    """Like a squeeze-excite module; its flag switches it off."""

    def __init__(self):
        super().__init__()
        self.conv, self.flag = nn.Conv2d(3, 3, 1), True

    def forward(self, x):
        if not self.flag:
            return x
        y = x * torch.sigmoid(self.conv(x.mean((2, 3), keepdim=True)))
        y += x
        return y


def added_to_excited(self, x):
    x = self.conv(x)
    y = self.se(x)
    y += self.body(x)
    return self.act(y) + x


class Between(nn.Module):
    """Hands on what its child returns, past an nn.Identity."""

    def __init__(self, body):
        super().__init__()
        self.body, self.drop, self.flag, self.absent = body, nn.Identity(), True, None

    def forward(self, x, scale=None):
        y = self.drop(self.body(x) if self.flag else x)
        return y if scale is None else y * scale


def activated(self, x):
    return self.act(self.body(x))


def added(self, x):
    return self.act(self.body(x) + x)


def added_first(self, x):
    return self.act(x + self.body(x))


def added_in_place(self, x):
    y = self.body(x)
    y += x
    return self.act(y)


# The network, and how often each fused operator runs.
ACROSS = {
    "a Sequential": (lambda: parent(activated, ending()), {"relu": 1}),
    "a Sequential in a Sequential": (lambda: nn.Sequential(nn.Sequential(nn.Sequential(ending())), nn.SiLU()), {"swish": 1}),
    "three levels": (lambda: parent(activated, Between(nn.Sequential(nn.Conv2d(3, 3, 1), Between(ending())))), {"relu": 1}),
    "residual": (lambda: parent(added, ending()), {"relu, residual": 1}),
    "residual first": (lambda: parent(added_first, Between(ending()), nn.ELU()), {"elu, residual": 1}),
    "residual in place": (lambda: parent(added_in_place, ending(), nn.Hardswish()), {"hardswish, residual": 1}),
    "residual that squeeze-excite has made": (
        lambda: parent(added_to_excited, ending(), se=Excites(), conv=nn.Conv2d(3, 3, 1)),
        {"relu, residual": 1},
    ),
    "a function": (lambda: parent(lambda self, x: F.relu6(self.body(x).add_(x)), ending()), {"relu6, residual": 1}),
    "the addition in a child": (lambda: parent(activated, AddsItsInput()), {"relu, residual": 1}),
    "a block in a block": (
        lambda: nn.Sequential(parent(activated, AddsItsInput()), AddsItsInput()),
        {"relu, residual": 1, "identity, residual": 1},
    ),
    "what a child fuses alone": (
        lambda: parent(activated, ending(3, nn.BatchNorm2d(3), nn.ELU(), nn.Conv2d(3, 3, 1))),
        {"relu": 1, "elu": 1},
    ),
    "two calls": (lambda: parent(lambda self, x: self.act(self.body(self.act(self.body(x)))), ending()), {"relu": 2}),
    "two parents": (
        lambda: (lambda body: nn.Sequential(parent(activated, body), parent(added, body)))(ending()),
        {"relu": 1, "relu, residual": 1},
    ),
    "by name": (lambda: parent(lambda self, x: self.act(self.body(input=x)), ending()), {"relu": 1}),
    "an activation that begins a sibling": (
        lambda: nn.Sequential(ending(), nn.Sequential(nn.LeakyReLU(0.1), nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3), ActivatesFirst()),
        {"leaky_relu": 2},
    ),
    "an activation that begins a child": (
        lambda: parent(
            lambda self, x: self.body(self.bn(x)),
            nn.Sequential(ActivatesFirst(), ending(), ActivatesFirst(nn.ReLU(True))),
            bn=nn.BatchNorm2d(3),
        ),
        {"leaky_relu": 1, "relu": 1},
    ),
    "an activation that begins a child, after a sum": (
        lambda: parent(lambda self, x: self.head(self.body(x) + x), ending(), head=ActivatesFirst()),
        {"leaky_relu, residual": 1},
    ),
    "an activation of the user's": (lambda: parent(activated, ending(), Activates(F.gelu, approximate="tanh")), {"gelu_tanh": 1}),
    "an activation of the user's in a Sequential": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Activates(F.silu, inplace=True)),
        {"swish": 1},
    ),
    "an activation of the user's after a sum": (lambda: parent(added, ending(), Activates(F.mish, inplace=True)), {"mish, residual": 1}),
    "a batch norm that applies nn.Identity": (lambda: parent(added, libraries.BatchNormAct2d(3, False)), {"relu, residual": 1}),
    "mmcv": (lambda: libraries.DarknetBlock(3), {"relu": 1, "relu, residual": 1}),
    "torchvision RegNet": (
        lambda: nn.Sequential(libraries.ResBottleneckBlock(3, 6), libraries.ResBottleneckBlock(6, 6)),
        {"relu": 2, "relu, residual": 2, "identity": 1},
    ),
    "torchvision MobileNetV2": (lambda: libraries.InvertedResidual(3), {"relu6": 1, "identity, residual": 1}),
    "transformers ResNet": (
        lambda: nn.Sequential(libraries.ResNetBasicLayer(3, 6), libraries.ResNetBasicLayer(6, 6)),
        {"relu": 2, "relu, residual": 2, "identity": 1},
    ),
    "transformers MobileNetV2": (
        lambda: parent(
            lambda self, x: (lambda y: y + self.body(y))(self.head(x)),
            nn.Sequential(libraries.MobileNetV2ConvLayer(3, 6), libraries.MobileNetV2ConvLayer(6, 3, act=False)),
            head=libraries.MobileNetV2ConvLayer(3, 3),
        ),
        {"relu6": 2, "identity, residual": 1},
    ),
    "timm RepVGG": (
        lambda: nn.Sequential(libraries.MobileOneBlock(3, 3, 1), libraries.MobileOneBlock(3, 6, 1)),
        {"relu, residual": 2, "identity, residual": 1, "identity": 2},
    ),
    "timm MobileOne": (
        lambda: nn.Sequential(libraries.MobileOneBlock(3, 3, 2, False), libraries.MobileOneBlock(3, 3, 3)),
        {"relu, residual": 2, "identity, residual": 4, "identity": 2},
    ),
}


def across(name):
    model = ACROSS[name][0]().double()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


@pytest.mark.parametrize("name", ACROSS)
def test_across_the_border_of_a_module(name):
    expected, actual, report = converted(across(name))
    x = X()
    for training in (True, False):
        expected.train(training), actual.train(training)
        assert operators(copy.deepcopy(actual), x).ours == ACROSS[name][1], report
        assert_same(step(actual, x), step(expected, x))
    rewritten = [(module, module.__dict__[guard.FORWARD]) for module in actual.modules() if guard.FORWARD in module.__dict__]
    assert rewritten and all(forward.holds(module) for module, forward in rewritten)
    fused = [row for row in report.rows if "batch_norm_act" in (row.becomes or "") and "identity)" not in row.becomes]
    assert all(row.is_fused for row in fused) and list(actual.state_dict()) == list(expected.state_dict())
    # One row for each batch norm.
    norms = {key for key, module in expected.named_modules() if isinstance(module, _BatchNorm)}
    assert {row.name for row in report.rows if "BatchNorm" in row.found} == norms
    if name not in ("two calls", "two parents"):
        assert len([row for row in report.rows if "BatchNorm" in row.found]) == len(norms), report
    gk.revert(actual)
    assert [type(module) for module in actual.modules()] == [type(module) for module in expected.modules()]


@pytest.mark.parametrize(
    ("change", "stays_fused"),
    [
        (lambda model: None, True),
        (lambda model: setattr(model.se, "flag", False), False),
        (lambda model: model.se.register_forward_hook(lambda module, args, y: args[0]), False),
        (lambda model: setattr(model, "se", nn.Identity()), False),
        (lambda model: setattr(model.se, "conv", nn.Identity()), True),
        (lambda model: setattr(model.se, "forward", lambda x: x), False),
    ],
)
def test_what_changes_beside_a_sum_that_is_written_into_the_other_term(change, stays_fused):
    expected, actual, _ = converted(parent(added_to_excited, ending(), se=Excites(), conv=nn.Conv2d(3, 3, 1)))
    change(expected), change(actual)
    x = X()
    with torch.no_grad():
        assert_same({"output": actual(x), **actual.state_dict()}, {"output": expected(x), **expected.state_dict()})
    assert operators(actual, x).ours["relu, residual"] == stays_fused
    # What returns its argument is written into.
    off = Excites()
    off.flag = False
    expected, actual, report = converted(parent(added_to_excited, ending(), se=off, conv=nn.Conv2d(3, 3, 1)))
    assert any("written into the other term" in row.why for row in report.rows), report
    with torch.no_grad():
        assert_same({"output": actual(x)}, {"output": expected(x)})


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save], ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", ["torchvision RegNet", "timm RepVGG", "mmcv", "transformers ResNet"])
def test_copies_of_what_is_fused_across(name, copied):
    expected, actual, _ = converted(across(name))
    made, x = copied(actual), X()
    assert operators(copy.deepcopy(made), x).ours == ACROSS[name][1]
    assert_same(step(made, x), step(expected, x))
    # The copy computes with its own parameters.
    with torch.no_grad():
        for each in actual.parameters():
            each.zero_()
    assert step(made, x)["output"].abs().max() > 0


def test_the_report_names_the_block_in_which_a_border_is_crossed():
    model = nn.Sequential(libraries.ResBottleneckBlock(3, 6), nn.Sequential(nn.Sequential(nn.BatchNorm2d(6)), nn.ReLU()))
    rows = {row.name: (row.found, row.becomes, row.why) for row in gk.convert(model).rows}
    assert rows == {
        "0.proj.1": ("BatchNorm2d", "BatchNormAct2d", "its output is the residual of another norm"),
        "0.f.0.1": ("BatchNorm2d, ReLU", "batch_norm_act(relu)", ""),
        "0.f.1.0.1": ("BatchNorm2d, add, ReLU (in ResBottleneckBlock)", "batch_norm_act(relu, residual)", ""),
        "1.0.0": ("BatchNorm2d, ReLU (in Sequential)", "batch_norm_act(relu)", ""),
    }


def test_a_child_that_is_called_alone_gives_its_own_output():
    expected, actual, _ = converted(parent(added, Between(ending())))
    x = X()
    for each in (lambda model: model.body, lambda model: model.body.body, lambda model: model.body.body[1]):
        assert_same(step(each(actual), x), step(each(expected), x))
    scaled = actual.body(x, scale=2.0), expected.body(x, scale=2.0)
    torch.testing.assert_close(*scaled)


class Gradless(Between):
    def forward(self, x):
        with torch.no_grad():
            x = x * 2
        return super().forward(x)


class Checkpointed(Between):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)


class InFullPrecision(Between):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.body(x)


class ByClass(Between):
    def forward(self, x):
        return self.body(x) if isinstance(x, torch.Tensor) else [self.body(each) for each in x]


class ComparesWithNone(Between):
    def forward(self, x):
        return x if x is None else self.body(x)


class ByMode(Between):
    def forward(self, x):
        y = self.body(x)
        return y * 2 if self.training else y


class ReturnsTwo(Between):
    def forward(self, x):
        y = self.body(x)
        return y, y.mean()


class Keeps(Between):
    def forward(self, x):
        y = self.body(x)
        return y, x


class OwnCall(Between):
    def __call__(self, x):
        return super().__call__(x) * 2


class WritesItsInput(nn.Module):
    def forward(self, x):
        return x.mul_(2.0)


def used_twice(self, x):
    y = self.body(x)
    return self.act(y) + y


def without_gradient_of_the_child(self, x):
    with torch.no_grad():
        y = self.body(x)
    return self.act(y + x)


def residual_from_a_writer(self, x):
    x = x * 1
    y = self.body(x)
    return self.act(y + self.writer(x))


def residual_viewed_and_written(self, x):
    r = x * 1
    y = self.body(r)
    view = r.view(-1)
    view.mul_(2.0)
    return self.act(y + x)


def child_called_between(self, x):
    y = self.body(x)
    z = self.body(x * 2)
    return self.act(y + z.exp())


def output_written(self, x):
    y = self.body(x)
    self.writer(y)
    return self.act(y)


def output_in_a_list(self, x):
    y = self.body(x)
    ys = [y]
    return self.act(y) + torch.cat(ys)


def of_two(self, x):
    y, z = self.body(x)
    return self.act(y) + z


def hooked(module):
    module.register_forward_hook(lambda module, inputs, output: output * 2)
    return module


def compiled(module):
    module.compile(backend="eager")
    return module


# The parent, and what the report says on the last batch norm of its child.
NOT_ACROSS = {
    "used twice": (lambda: parent(used_twice, ending()), "no activation follows"),
    "in a list": (lambda: parent(output_in_a_list, ending()), "no activation follows"),
    "two values": (lambda: parent(of_two, ReturnsTwo(ending())), "no activation follows"),
    "a pair": (lambda: parent(of_two, Keeps(ending())), "no activation follows"),
    "an optional argument": (
        lambda: parent(lambda self, x: self.act(self.body(x, 2.0)), Between(ending())),
        "Between, which ends with it, is called with optional arguments",
    ),
    "the default of an optional argument": (
        lambda: parent(lambda self, x: self.act(self.body(x, None)), Between(ending())),
        "Between, which ends with it, is called with optional arguments",
    ),
    "a hook": (lambda: parent(activated, hooked(ending())), "Sequential, which ends with it, has a hook"),
    "a hook between": (lambda: parent(activated, Between(hooked(ending()))), "Sequential, which ends with it, has a hook"),
    "a hook on the batch norm": (lambda: parent(activated, nn.Sequential(hooked(nn.BatchNorm2d(3)))), "it has a hook"),
    "compiled": (lambda: parent(activated, compiled(ending())), "Sequential, which ends with it, has a hook or is compiled"),
    "a child without gradients": (lambda: parent(activated, Gradless(ending())), "returned to Gradless, whose forward switches gradients"),
    "a child that checkpoints": (
        lambda: parent(activated, Checkpointed(ending())),
        "returned to Checkpointed, whose forward calls torch.utils.checkpoint",
    ),
    "a child in full precision": (
        lambda: parent(activated, InFullPrecision(ending())),
        "returned to InFullPrecision, whose forward switches",
    ),
    "a child that asks for a class": (lambda: parent(activated, ByClass(ending())), "no activation follows"),
    "a child that compares with None": (lambda: parent(activated, ComparesWithNone(ending())), "no activation follows"),
    "a child that reads its mode": (lambda: parent(activated, ByMode(ending())), "no activation follows"),
    "a child with its own call": (lambda: parent(activated, OwnCall(ending())), "returned to Written, whose forward calls a OwnCall"),
    "a parent without gradients": (
        lambda: parent(without_gradient_of_the_child, ending()),
        "returned to Written, whose forward switches gradients",
    ),
    "the residual writes the input": (
        lambda: parent(residual_from_a_writer, nn.Sequential(nn.BatchNorm2d(3)), writer=WritesItsInput()),
        "may write its input",
    ),
    "a view of the input is written": (
        lambda: parent(residual_viewed_and_written, nn.Sequential(nn.BatchNorm2d(3))),
        "may write its input",
    ),
    "called between": (lambda: parent(child_called_between, ending()), "may be called again"),
    "output written": (lambda: parent(output_written, ending(), writer=WritesItsInput()), "no activation follows"),
    "learnt": (lambda: parent(activated, ending(), nn.PReLU()), "no activation follows"),
}


@pytest.mark.parametrize("name", NOT_ACROSS)
def test_what_is_not_fused_across(name):
    make, why = NOT_ACROSS[name]
    torch.manual_seed(0)
    expected = make().double()
    torch.manual_seed(0)
    actual = make().double()
    report = gk.convert(actual)
    rows = [row for row in report.rows if "BatchNorm" in row.found]
    assert not any(row.is_fused for row in rows) and why in rows[0].why, report
    x = X()
    for training in (True, False):
        expected.train(training), actual.train(training)
        if name in ("a view of the input is written", "the residual writes the input"):
            # torch refuses the backward.
            with torch.no_grad():
                assert_same({"output": actual(x), **actual.state_dict()}, {"output": expected(x), **expected.state_dict()})
        else:
            assert_same(step(actual, x), step(expected, x))


def test_a_child_whose_attributes_a_call_before_it_writes():
    def make():
        torch.manual_seed(0)
        body = Between(ending())
        model = parent(lambda self, x: self.act(self.body(self.first(x))), body)
        model.first = hooked(nn.Identity())
        model.first.register_forward_hook(lambda *_: setattr(body, "flag", False))
        return model.double()

    expected, actual = make(), make()
    report = gk.convert(actual)
    assert "may be changed by first, which is called before" in next(row.why for row in report.rows if row.name == "body.body.1"), report
    x = X()
    assert_same({"output": actual(x)}, {"output": expected(x)})


class Holds(nn.Module):
    """Hands on its argument, after a call of its function with what it holds in a list."""

    def __init__(self, function, *held):
        super().__init__()
        self.held = [*held]
        self.function = function

    def forward(self, x):
        self.function(*self.held)
        return x * 0.5


def toggle(module):
    module.flag = not module.flag


def hook_once(module):
    if not module._forward_hooks:
        hooked(module)


def hook_if_odd(x, module):
    if x.shape[-1] % 2:
        hook_once(module)
    return x


def replace_last(module):
    module[-1] = nn.Identity()


def after_first(self, x):
    return self.act(self.body(self.first(x)))


def changed_by(change, place, is_owned=False, body=ending):
    """A parent whose first child, which holds the module at a place in the body, changes this module."""
    model = parent(after_first, body())
    held = operator.attrgetter(f"body{place}")(model)
    model.first = Holds(change, held)
    if is_owned:
        model.first.owned = held
    return model


CHANGED_BEFORE = {
    "flag, in a list": lambda: changed_by(toggle, "", body=lambda: Between(ending())),
    "hook, in a list": lambda: changed_by(hook_once, ".1"),
    "hook on the child": lambda: changed_by(hook_once, ""),
    "hook, on its own child": lambda: changed_by(hook_once, ".1", True),
    "replaced": lambda: changed_by(replace_last, ""),
    "hook, by a function": lambda: parent(lambda self, x: self.act(self.body(hook_if_odd(x, self.body[1]))), ending()),
}


@pytest.mark.parametrize("name", CHANGED_BEFORE)
def test_a_child_that_a_call_before_it_may_change(name):
    expected, actual, report = converted(CHANGED_BEFORE[name]())
    assert "which is called before" in next(row.why for row in report.rows if row.found == "BatchNorm2d"), report
    x = X()
    for _ in range(2):
        with torch.no_grad():
            assert_same({"output": actual(x)}, {"output": expected(x)})


def test_a_long_forward_is_searched_once(monkeypatch):
    def calls(count):
        seen = []
        monkeypatch.setattr(border, "own_classes", lambda kind: seen.append(kind) or purity.own_classes(kind))
        blocks = nn.ModuleList(Between(ending()) for _ in range(count))
        report = gk.convert(
            parent(lambda self, x: functools.reduce(lambda x, each: self.act(each(x) + x), self.blocks, x), None, blocks=blocks)
        )
        assert sum(row.is_fused for row in report.rows) == count
        return len(seen)

    assert calls(40) < 2.5 * calls(20)


class CallsWhatItHolds(nn.Module):
    def __init__(self, *held):
        super().__init__()
        self.held = [*held]

    def forward(self, x):
        return self.held[0](x * 2) * 0.5


class DoublesWhatItHolds(CallsWhatItHolds):
    def forward(self, x):
        with torch.no_grad():
            self.held[0].mul_(2.0)
        return x * 1


def beside_a_batch_norm_that_is_held(kind, held):
    def make():
        model = parent(lambda self, x: self.act(self.body(x) + self.holds(x * 1)), ending())
        model.holds = kind(held(model))
        return model

    return make


HELD = {
    "its child": beside_a_batch_norm_that_is_held(CallsWhatItHolds, lambda model: model.body),
    "a Sequential with it": beside_a_batch_norm_that_is_held(CallsWhatItHolds, lambda model: nn.Sequential(model.body[1])),
    "its running mean": beside_a_batch_norm_that_is_held(DoublesWhatItHolds, lambda model: model.body[1].running_mean),
    "its weight": beside_a_batch_norm_that_is_held(DoublesWhatItHolds, lambda model: model.body[1].weight),
}


@pytest.mark.parametrize("name", HELD)
def test_a_batch_norm_that_another_module_holds_in_a_list(name):
    expected, actual, report = converted(HELD[name]())
    row = next(row for row in report.rows if row.found.startswith("BatchNorm2d"))
    assert not row.is_fused and ("may be called again" in row.why or "may read or write its statistics" in row.why), report
    x = X()
    with torch.no_grad():
        assert_same({"output": actual(x), **actual.state_dict()}, {"output": expected(x), **expected.state_dict()})


class SquaresFirst(libraries.BatchNormAct2d):
    squares = False

    def forward(self, x):
        return super().forward(x * x if self.squares else x)


READS_ITS_FLAG = {
    "alone": (lambda: nn.Sequential(SquaresFirst(3)), ["batch_norm_act(relu)"]),
    "fused": (lambda: parent(added, SquaresFirst(3, False)), ["batch_norm_act(relu, residual)"]),
    "between": (
        lambda: parent(lambda self, x: self.act(self.body(x) + self.own_bn(x)), nn.BatchNorm2d(3), own_bn=SquaresFirst(3, False)),
        ["batch_norm_act(relu, residual)", "batch_norm_act(identity)"],
    ),
}


@pytest.mark.parametrize("name", READS_ITS_FLAG)
def test_a_flag_that_a_batch_norm_with_an_activation_reads(name):
    make, becomes = READS_ITS_FLAG[name]
    expected, actual, report = converted(make().double())
    assert [row.becomes for row in report.rows if row.becomes] == becomes, report
    x = X()
    for squares in (False, True, False):
        for model in (expected, actual):
            for each in model.modules():
                if isinstance(each, SquaresFirst):
                    each.squares = squares
        assert_same(step(actual, x), step(expected, x))


def test_a_batch_norm_whose_activation_is_the_identity_says_so():
    report = gk.convert(nn.Sequential(libraries.BatchNormAct2d(3, False)))
    assert [(row.is_fused, row.why) for row in report.rows] == [(False, "its activation is nn.Identity")]


def test_an_error_where_a_pickle_is_loaded_leaves_the_classes(monkeypatch):
    model = parent(added, nn.Sequential(Changing(), nn.BatchNorm2d(3)))
    gk.convert(model)
    other = copy.copy(model)
    state = {**vars(model), guard.FORWARD: True}
    kinds = [type(each) for each in model.modules()]

    def fails(*arguments):
        raise MemoryError

    monkeypatch.setattr(conversion.block, "rewrite_forward", fails)
    with pytest.raises(MemoryError):
        other.__setstate__(state)
    assert [type(each) for each in other.modules()] == kinds and Changing not in kinds


ACROSS_CHANGES = {
    "hook": lambda model, seen: model.body.register_forward_hook(lambda module, inputs, output: seen.append(output.clone())),
    "hook before": lambda model, seen: model.body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone())),
    "hook on the gradient": lambda model, seen: model.body.register_full_backward_hook(
        lambda module, _, grads: seen.append(grads[0].clone())
    ),
    "hook between": lambda model, seen: model.body.body.register_forward_hook(lambda module, inputs, output: output * 2),
    "hook on the batch norm": lambda model, seen: model.body.body[-1].register_forward_hook(lambda module, inputs, output: output * 2),
    "hook on nn.Identity": lambda model, seen: model.body.drop.register_forward_hook(lambda module, inputs, output: output * 2),
    "hook on the activation": lambda model, seen: model.act.register_forward_hook(lambda module, inputs, output: output * 2),
    "flag": lambda model, seen: setattr(model.body, "flag", False),
    "mode of the child": lambda model, seen: model.body.eval(),
    "mode of the batch norm": lambda model, seen: model.body.body[-1].eval(),
    "frozen": lambda model, seen: model.body.requires_grad_(False),
    "child": lambda model, seen: setattr(model, "body", nn.Conv2d(3, 3, 1).double()),
    "child of the child": lambda model, seen: setattr(model.body, "body", nn.Conv2d(3, 3, 1).double()),
    "batch norm": lambda model, seen: model.body.body.__setitem__(-1, nn.InstanceNorm2d(3).double()),
    "longer": lambda model, seen: model.body.body.append(nn.Conv2d(3, 3, 1).double()),
    "shorter": lambda model, seen: model.body.body.__delitem__(-1),
    "shadowed": lambda model, seen: model.__dict__.update(body=nn.Conv2d(3, 3, 1).double()),
    "None": lambda model, seen: setattr(model.body, "drop", nn.Tanh()),
    "class of the child": lambda model, seen: setattr(model.body, "__class__", ByMode),
    "forward of the instance": lambda model, seen: setattr(model.body, "forward", lambda x: x * 2),
    "forward of the class": lambda model, seen: setattr(type(model.body), "forward", lambda self, x: self.body(x) * 2),
    "compiled": lambda model, seen: compiled(model.body),
    "pruning": lambda model, seen: l1_unstructured(model.body.body[0], "weight", 0.5),
    "parametrization": lambda model, seen: nn.utils.parametrizations.weight_norm(model.body.body[0]),
    "parametrization of the batch norm": lambda model, seen: nn.utils.parametrize.register_parametrization(
        model.body.body[-1], "weight", Doubled()
    ),
    "SyncBatchNormAct": lambda model, seen: gk.convert_sync_batch_norm(model.body),
    "reverted": lambda model, seen: gk.revert(model.body),
    "no running statistics": lambda model, seen: setattr(model.body.body[-1], "track_running_stats", False),
    "average of all batches": lambda model, seen: setattr(model.body.body[-1], "momentum", None),
    "shared": lambda model, seen: setattr(model.body.body, "0", model.body.body[0]),
    "slope": lambda model, seen: setattr(model.act, "negative_slope", 0.7),
}


def test_an_activation_of_the_users_that_changes():
    expected, actual, _ = converted(parent(added, ending(), Activates(F.gelu, approximate="none")))
    x = X()
    for change in (
        lambda model: setattr(model.act, "function", lambda input, approximate: F.softplus(input)),
        lambda model: setattr(model.act, "function", F.gelu),
        lambda model: model.act.options.update(approximate="tanh"),
        lambda model: model.act.register_forward_hook(lambda module, inputs, output: output * 2),
    ):
        change(expected), change(actual)
        assert_same(step(actual, x), step(expected, x))


@pytest.mark.parametrize("name", ACROSS_CHANGES)
def test_what_changes_after_a_border_is_crossed(name):
    kind = type("Between", (Between,), {})
    expected, actual, _ = converted(parent(added, kind(ending()), nn.LeakyReLU(0.2)))
    assert operators(copy.deepcopy(actual), X()).ours == {"leaky_relu, residual": 1}
    seen = [], []
    for each, its in zip((expected, actual), seen, strict=True):
        torch.manual_seed(0)
        ACROSS_CHANGES[name](each, its)
    x = X()
    for _ in range(2):
        assert_same(step(actual, x), step(expected, x))
    torch.testing.assert_close(seen[1], seen[0])


def replicated(model):
    """A replica as nn.DataParallel makes it: its parameters are plain attributes, and not leaves."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            replica._parameters.pop(name, None)
            setattr(replica, name, None if parameter is None else parameter * 1)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    return replicas[model]


@pytest.mark.parametrize("name", ["torchvision RegNet", "timm RepVGG", "mmcv", "transformers MobileNetV2"])
def test_a_replica_of_what_is_fused_across(name):
    expected, actual, _ = converted(across(name))
    x = X()
    seen = operators(replicated(copy.deepcopy(actual)), x)
    # A batch norm of timm's that is alone runs its own forward: its parameters are not registered.
    assert {act: count for act, count in seen.ours.items() if act != "identity"} == {
        act: count for act, count in ACROSS[name][1].items() if act != "identity"
    }
    torch.testing.assert_close(replicated(actual)(x), expected(x))


def test_a_global_hook_sees_what_it_saw():
    expected, actual, _ = converted(across("torchvision RegNet"))
    x, seen = X(), ([], [])
    for each, its in zip((expected, actual), seen, strict=True):
        handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output, its=its: its.append(output.detach().clone()))
        try:
            each(x)
        finally:
            handle.remove()
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("changed", ["conv", "activation in place"])
def test_a_call_that_must_not_write_is_replaced_by_one_that_does(changed):
    act = nn.ReLU6()
    layer = nn.Sequential(nn.Conv2d(3, 3, 1)) if changed == "conv" else nn.Sequential(act)
    expected, actual, _ = converted(
        parent(lambda self, x: self.act(self.body(x) + self.layer(x)), nn.Sequential(nn.BatchNorm2d(3)), layer=layer)
    )
    x = X()
    assert operators(copy.deepcopy(actual), x).ours == {"relu, residual": 1}
    for each in (expected, actual):
        if changed == "conv":
            each.layer[0] = nn.Hardtanh(0, 1, inplace=True)
        else:
            each.layer[0].inplace = True
    with torch.no_grad():
        assert_same({"output": actual(x.clone())}, {"output": expected(x.clone())})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["torchvision RegNet", "timm RepVGG"])
def test_what_is_fused_across_under_torchs_tools(name):
    expected, actual, _ = converted(across(name).eval())
    x = X()
    doubled = {key: each.detach() * 2 for key, each in expected.named_parameters()}
    averaged = [torch.optim.swa_utils.AveragedModel(each) for each in (actual, expected)]
    pairs = {
        "functional_call": [torch.func.functional_call(each, doubled, (x,)) for each in (actual, expected)],
        "symbolic_trace": [torch.fx.symbolic_trace(actual)(x), expected(x)],
        "compile": [torch.compile(actual, fullgraph=True, backend="eager")(x), expected(x)],
        "jit.trace": [torch.jit.trace(actual, (x,))(x), expected(x)],
        "export": [torch.export.export(actual, (x,)).module()(x), expected(x)],
        "fold": [gk.fold(actual)(x), expected(x)],
        "AveragedModel": [each(x) for each in averaged],
    }
    for tool, (output, exact) in pairs.items():
        assert (output - exact).abs().max() < 1e-12, tool
    with torch.autocast("cpu", torch.bfloat16):
        assert actual.float()(x.float()).dtype == expected.float()(x.float()).dtype


# equal blocks are read once


# What differs in the second of two blocks of one class.
DIFFERENCES = {
    "nothing": lambda model: None,
    "flag": lambda model: setattr(model, "flag", False),
    "attribute that was not there": lambda model: setattr(model, "absent", 3.0),
    "attribute that cannot be compared": lambda model: setattr(model, "absent", torch.tensor(3.0)),
    "slope": lambda model: setattr(model.act, "negative_slope", 0.5),
    "activation": lambda model: setattr(model, "act", nn.ELU()),
    "activation in place": lambda model: setattr(model, "act", nn.LeakyReLU(inplace=True)),
    "batch norm": lambda model: setattr(model, "bn", nn.InstanceNorm2d(3).double()),
    "submodule None": lambda model: setattr(model, "conv2", None),
    "one convolution twice": lambda model: setattr(model, "conv2", model.conv),
    "one weight twice": lambda model: setattr(model.conv2, "weight", model.conv.weight),
    "hook": lambda model: model.bn.register_forward_hook(lambda module, inputs, output: output * 2),
    "forward of its own": lambda model: setattr(model, "forward", types.MethodType(lambda self, x: F.elu(self.bn(x)), model)),
    "more modules": lambda model: model.blocks.append(nn.SiLU()),
    "an order of names": lambda model: model._modules.update(conv=model._modules.pop("conv")),
    "a mode": lambda model: model.bn.eval(),
}


def of_two_convolutions(self, x):
    y = self.act(self.bn(self.conv(x))) * getattr(self, "absent", 1.0)
    y = y if self.conv2 is None else F.conv2d(y, self.conv2.weight) + self.conv2(x)
    for module in self.blocks:
        y = module(y)
    return y * 2 if self.flag else y


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_block_that_differs_from_one_that_was_read(name, order, monkeypatch):
    first = block(of_two_convolutions, nn.LeakyReLU(0.2), conv2=nn.Conv2d(3, 3, 1).double())
    second = copy.deepcopy(first)
    DIFFERENCES[name](second)
    read = []
    monkeypatch.setattr(rewrite, "read", lambda *arguments: read.append(arguments) or trace.read(*arguments))
    expected, actual, report = converted(nn.Sequential(*[first, second, copy.deepcopy(first)][::order]))
    x = X()
    assert_same(step(actual, x), step(expected, x))
    assert {row.is_fused for row in report.rows if row.name == ("0.bn" if order == 1 else "2.bn")} == {True}
    reads_more = name not in ("nothing", "slope", "activation in place", "a mode")
    # One is the Sequential.
    assert len(read) == 2 + reads_more


@pytest.mark.parametrize("training", [True, False])
def test_blocks_that_read_their_mode_are_read_once(training, monkeypatch):
    read = []
    monkeypatch.setattr(rewrite, "read", lambda *arguments: read.append(arguments) or trace.read(*arguments))
    model = nn.Sequential(
        *[libraries.BatchNormAct2d(3) for _ in range(3)], block(BY_MODE["training"][0]), block(BY_MODE["mode of a child"][0])
    )
    report = gk.convert(model.train(training))
    assert [row.is_fused for row in report.rows] == [True] * 5
    # The Sequential, the batch norms as one, and two blocks.
    assert len(read) == 4


def test_nothing_is_traced_without_a_batch_norm_or_an_activation_of_ours(monkeypatch):
    monkeypatch.setattr(trace, "_trace", None)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.CELU(), nn.ReLU())

        def forward(self, x):
            return self.inner(x) + x

    report = gk.convert(nn.Sequential(*[Plain() for _ in range(3)]))
    assert {(row.found, row.why) for row in report.rows} == {
        ("CELU", "there is no kernel for CELU"),
        ("ReLU", "torch's is kept: without a norm there is nothing to fuse"),
    }


@pytest.mark.parametrize("name", ["silu", "SiLU"])
def test_functions_of_a_block_without_a_batch_norm_are_found(name):
    function = nn.SiLU if name == "SiLU" else F.silu
    model = block(lambda self, x: self.conv(self.function(self.conv(x))), function=function() if name == "SiLU" else function)
    model.bn = model.act = nn.Identity()
    assert [row.becomes for row in gk.convert(model).rows if row.found == name] == [{"silu": "swish", "SiLU": "gradkernels.SiLU"}[name]]


def test_a_progress_line_is_for_a_terminal(monkeypatch):
    convert, lines = importlib.import_module("gradkernels.conversion.convert"), []
    tqdm = types.SimpleNamespace(tqdm=lambda modules, *_, **__: lines.append(len(modules)) or modules)
    monkeypatch.setitem(sys.modules, "tqdm", tqdm)
    for is_terminal in (False, True):
        monkeypatch.setattr(convert.sys, "stderr", types.SimpleNamespace(isatty=lambda is_terminal=is_terminal: is_terminal))
        assert gk.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())).rows[0].is_fused and len(lines) == is_terminal
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert gk.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())).rows[0].is_fused


# the report


def test_check_measures_and_leaves_no_trace():
    model, x = network("U-Net")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    buffers = {name: each.clone() for name, each in model.named_buffers()}
    generator = torch.get_rng_state()
    report = gk.convert(model, check=x)
    assert all(torch.equal(each, buffers[name]) for name, each in model.named_buffers())
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    for difference in (report.output_difference, report.gradient_difference):
        assert 0 < difference.difference < 1e-9 * difference.magnitude
    assert "saved for backward" in str(report) and report.gradient_difference.name in dict(model.named_parameters())


def test_saved_bytes_are_those_that_autograd_keeps():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ELU(), nn.Conv2d(8, 8, 1))
    x = torch.randn(2, 3, 16, 16)
    report = gk.convert(model, check=x)
    image, statistics = 2 * 8 * 16 * 16 * 4, 2 * 8
    # x; the inputs of batch norm, ELU and convolution; and mean and invstd of each channel.
    assert report.saved_bytes_before == x.nbytes + 3 * image + statistics * 4
    # Our batch norm keeps mean and invstd in float64.
    assert report.saved_bytes_after == x.nbytes + 2 * image + statistics * 8


def test_check_takes_several_arguments():
    model = block(lambda self, x, y: self.act(self.bn(x) + y))
    assert gk.convert(model, check=(X(), X())).output_difference.magnitude > 0


def test_check_takes_arguments_by_name_and_finds_tensors_in_what_is_returned():
    @dataclasses.dataclass
    class Output:
        hidden: torch.Tensor
        rest: object

    class Mapping(collections.OrderedDict):
        pass

    for wrap in (
        lambda y: Output(y, None),
        lambda y: Output(1, {"more": [y]}),
        lambda y: Mapping(y=y),
        lambda y: (1, [{"y": y}]),
    ):
        model = block(lambda self, x, scale, wrap=None: None)
        type(model).forward = lambda self, x, scale, wrap=wrap: wrap(self.part(x) * scale)
        model.part = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).double()
        report = gk.convert(model, check={"scale": 2.0, "x": X()})
        assert report.output_difference.name == "output 0" and report.gradient_difference.magnitude > 0


def test_check_says_where_there_is_nothing_to_compare():
    model = block(lambda self, x: [self.act(self.bn(x)), "words"][1])
    report = gk.convert(model, check=X())
    assert "returned str, in which there is no tensor" in str(report) and "none, there is nothing to compare" in str(report)


def counts(self, x):
    self.count = self.count + 1
    self.calls += 1
    y = self.act(self.bn(x))
    return y + self.conv(x) if self.calls == 1 else y


def test_check_puts_back_what_a_forward_assigns():
    model = block(counts, calls=0)
    model.register_buffer("count", torch.zeros(()))
    count = model.count
    gk.convert(model, check=X())
    assert model.count is count and count == 0 and model.calls == 0


def test_a_gradient_that_is_there_once_only_is_a_difference():
    found = check.largest_difference({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.full((2,), 3.0)})
    assert (found.difference, found.name) == (3.0, "b")
    found = check.largest_difference({"a": torch.ones(2)}, {"a": torch.ones(3)})
    assert found.difference == torch.inf


# Fusing saves memory for every activation but ReLU: for its gradient torch needs only the output, which the
# next convolution keeps too.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("DarkNet", 0.75), ("EfficientNet", 0.8), ("U-Net", 0.8), ("ResNet-50", 1.03)])
def test_saved_bytes_of_whole_networks(name, most):
    model, x = network(name, torch.float32)
    report = gk.convert(model, check=x)
    assert report.saved_bytes_after <= most * report.saved_bytes_before, str(report).splitlines()[1]
    assert ("gradkernels.recompute" in str(report)) == (most > 1)


def test_the_printed_report():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ELU(), nn.CELU())
    assert str(gk.convert(model)) == (
        "convert: 1 fused, 1 replaced, 1 left of 3 norms and activations\n"
        "  module  found              becomes               why\n"
        "  1       BatchNorm2d, ReLU  batch_norm_act(relu)\n"
        "  4       ELU                gradkernels.ELU\n"
        "  5       CELU               left as it is         there is no kernel for CELU\n"
        "  reasons, and what would help:\n"
        "    1 x there is no kernel for CELU"
    )


def test_the_printed_report_groups_equal_rows_and_says_what_would_help():
    parts = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.CELU()]
    model = nn.Sequential(*[nn.Sequential(*copy.deepcopy(parts)) for _ in range(3)], block(LEFT["catches"][0]))
    report = gk.convert(model)
    assert len(report.rows) == 8
    lines = str(report).splitlines()
    assert [line.split("  ")[1] for line in lines[2:6]] == ["0.1 x 3", "0.3 x 3", "3.bn", "3.act"]
    assert lines[6:] == [
        "  reasons, and what would help:",
        "    3 x there is no kernel for CELU",
        '    2 x the forward of Written catches exceptions: change it as the guide says under "What it leaves alone"',
    ]
    assert str(pickle.loads(pickle.dumps(report))) == str(report)


def test_what_would_help_where_a_user_can_change_it():
    model = block(into_the_other, blocks=nn.ModuleList([nn.SiLU(inplace=True)]))
    model.bn.register_forward_hook(lambda *_: None)
    reasons = {row.why.remedy for row in gk.convert(model).rows if isinstance(row.why, Reason)}
    assert reasons == {"remove the hook"}
    for model, name, arguments, remedy in (
        (block(into_the_other), "bn", {}, "write y = y + bn(x), and not y += bn(x)"),
        (block(WRITTEN["bn + x"][0]), "bn", {"residual": False}, "convert with residual=True"),
        (block(lambda self, x: self.act(x), nn.SiLU(True)), "act", {}, "use inplace=False"),
        (block(lambda self, x: self.act(x), nn.ELU()), "act", {}, "write y = y + x after it, and not y += x"),
        (block(LEFT["class of a submodule"][0]), "bn", {}, "use isinstance, and not type() or __class__"),
    ):
        assert next(row.why.remedy for row in gk.convert(model, **arguments).rows if row.name == name) == remedy


def test_the_report_says_what_hides_the_place_of_an_activation():
    report = gk.convert(block(lambda self, *x: self.act(self.bn(*x)) + self.blocks[0](*x), blocks=nn.ModuleList([nn.CELU()])))
    assert [(row.name, row.why) for row in report.rows] == [
        ("bn", "the forward of Written has an optional argument, x"),
        ("act", "the forward of Written has an optional argument, x"),
        ("blocks.0", "there is no kernel for CELU"),
    ]


def test_the_report_of_what_is_no_batch_norm_of_its_own():
    def forward(self, x):
        y = self.act(self.bn(x) + self.blocks[0](x))
        return F.batch_norm(y, None, None, training=True)

    report = gk.convert(block(forward, blocks=nn.ModuleList([nn.BatchNorm2d(3)]).double()), check=X())
    assert [(row.found, row.is_fused, row.why) for row in report.rows] == [
        ("batch_norm", False, "it is a call of the function; only modules are fused"),
        ("BatchNorm2d, add, ReLU", True, ""),
        ("BatchNorm2d", False, "its output is the residual of another norm"),
    ]
    lines = str(report).splitlines()
    assert lines[0] == "convert: 1 fused, 1 replaced, 1 left of 3 norms and activations" and " KiB before" in lines[1]


# fold


@pytest.mark.slow
@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_fold_gives_the_outputs_of_evaluation(name, convert):
    model, x = network(name)
    step(model, x)
    if convert:
        gk.convert(model)
    state = {key: each.clone() for key, each in model.state_dict().items()}
    folded = gk.fold(model)
    assert_same(model.state_dict(), state, bound=0)
    assert model.training and not any(module.training for module in folded.modules())
    with torch.no_grad():
        assert_same({"output": flat(folded(x))}, {"output": flat(model.eval()(x))})
    left = [type(module) for module in folded.modules() if isinstance(module, _BatchNorm)]
    # These batch norms follow another batch norm, or an activation.
    assert len(left) == {"timm": 4, "MLP, activation first": 3}.get(name, 0)


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 9)),
    (nn.Conv3d(4, 6, 1, bias=False), nn.BatchNorm3d(6, affine=False), (2, 4, 3, 3, 3)),
    (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(4, 8, 2, groups=4), nn.BatchNorm3d(8), (2, 4, 3, 3, 3)),
    (nn.Conv2d(4, 6, 3), gk.BatchNormAct2d(6, act="leaky_relu", act_param=0.3), (2, 4, 5, 5)),
    (nn.Conv2d(4, 6, 3), gk.BatchNormAct2d(6, act="relu6"), (2, 4, 5, 5)),
    (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
]


@pytest.mark.parametrize(("layer", "bn", "shape"), CONVOLUTIONS, ids=lambda each: type(each).__name__)
def test_fold_of_every_layer(layer, bn, shape):
    model = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(bn)).double()
    if bn.affine:
        nn.init.uniform_(model[1].weight, 0.5, 1.5)
    x = torch.randn(shape, dtype=torch.float64)
    model(x + 0.5)
    folded = gk.fold(model)
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    assert_same({"output": folded(x).detach()}, {"output": model.eval()(x).detach()})


UNFOLDED = {
    "mode": lambda self, x: self.bn.train()(self.conv(x)),
    "mode of all": lambda self, x: self.train().bn(self.conv(x)),
    "read twice": lambda self, x: (lambda y: self.bn(y) + y)(self.conv(x)),
    "layer called twice": lambda self, x: self.bn(self.conv(self.conv(x))),
    "batch norm called twice": lambda self, x: self.bn(self.bn(self.conv(x))),
    "weight read": lambda self, x: self.bn(self.conv(x)) * self.conv.weight.mean(),
    "number read": lambda self, x: self.bn(self.conv(x)) * self.bn.eps,
    "bias that is not there": lambda self, x: self.bn(self.conv(x)) * (2 if self.conv.bias is None else 3),
    "attribute looked for": lambda self, x: self.bn(self.conv(x)) * getattr(self.bn, "gain", 2.0),
    "module inside its module": lambda self, x: self.bn.inner.inner(self.bn(self.conv(x))),
    "one at a time": lambda self, x: self.bn(self.conv(x)) if x.sum() > -1e9 else self.conv(x),
    "hooked": lambda self, x: self.bn(self.conv(x)),
    "tied": lambda self, x: self.bn(self.conv(x)) + self.blocks[0](x),
    "no running statistics": lambda self, x: self.bn(self.conv(x)),
}


@pytest.mark.parametrize("name", UNFOLDED)
def test_what_is_not_folded(name):
    model = block(UNFOLDED[name], blocks=nn.ModuleList([nn.Conv2d(3, 3, 1)]).double())
    if name == "hooked":
        model.conv.register_forward_hook(lambda module, inputs, output: output * 2)
    elif name == "bias that is not there":
        model.conv.bias = None
    elif name == "module inside its module":
        model.bn.inner = nn.Module()
        model.bn.inner.inner = nn.Identity()
    elif name == "tied":
        model.blocks[0].weight = model.conv.weight
    elif name == "no running statistics":
        model.bn = nn.BatchNorm2d(3, track_running_stats=False).double()
    folded, x = gk.fold(model), X()
    assert isinstance(folded.bn, nn.BatchNorm2d)
    assert_same({"output": folded(x).detach()}, {"output": model.eval()(x).detach()}, bound=1e-12)


@pytest.mark.parametrize(
    ("forward", "arguments"),
    [
        (lambda self, x, y: self.conv(x) if y is None else self.bn(self.conv(x)), (None,)),
        (lambda self, x, y=True: self.bn(self.conv(x)) if y else self.conv(x), (False,)),
        (lambda self, x: self.bn(self.conv(x)) if isinstance(x, torch.Tensor) else self.conv(x[0]), ()),
    ],
)
def test_fold_where_other_arguments_take_another_way(forward, arguments):
    model = block(forward)
    model.bn(X() + 0.5)
    x = X() if arguments else [X()]
    assert_same({"output": gk.fold(model)(x, *arguments).detach()}, {"output": model.eval()(x, *arguments).detach()})


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x))

    def features(self, x):
        return self.conv(x)

    @property
    def first(self):
        return self.conv


class User:
    def __init__(self, cell):
        self.cell = cell

    def use(self, x):
        return self.cell.bn(x)


def use_of(cell, x):
    return cell.bn(x)


def method_after_assignment(self, x, y=None):
    x = x + 0
    return self.more(x) + self.cell(x)


# Forwards that cannot be read, because of the optional argument. They use a cell not only by calling it.
OTHER_USES = {
    "by name": lambda self, x, y=None: self.cell(x) + self.cell.bn(x),
    "in a function": lambda self, x, y=None: self.cell(x) + use_of(self.cell, x),
    "in a list": lambda self, x, y=None: self.cell(x) + self.plain["cells"][0].bn(x),
    "by iteration": lambda self, x, y=None: self.cell(x) + list(self.modules())[-1](x),
    "in a method": lambda self, x, y=None: self.cell(x) + self.more(x),
    "in a method after an assignment": method_after_assignment,
    "by a string": lambda self, x, y=None: self.cell(x) + getattr(self.cell, "b" + "n")(x),
    "its number": lambda self, x, y=None: self.cell(x) * self.cell.bn.eps,
    "its mode": lambda self, x, y=None: self.cell.train()(x),
    "its method": lambda self, x, y=None: self.cell(x) + self.cell.features(x),
    "its property": lambda self, x, y=None: self.cell(x) + self.cell.first(x),
    "its weights": lambda self, x, y=None: self.cell(x) * next(self.cell.parameters()).mean(),
    "an object": lambda self, x, y=None: self.cell(x) + self.user.use(x),
    "a partial": lambda self, x, y=None: self.cell(x) + self.used(x),
    "a name made up": lambda self, x, y=None: self.cell(x) + operator.attrgetter("cell.b" + "n")(self)(x),
    "a method of a class in C": lambda self, x, y=None: self.cell(x) if str.lower("A") else x,
    "none": lambda self, x, y=None: self.cell(x),
}


@pytest.mark.parametrize("name", OTHER_USES)
def test_fold_beside_a_forward_that_cannot_be_read(name):
    model = type("Holder", (nn.Module,), {"forward": OTHER_USES[name], "more": lambda self, x: self.cell.bn(x)})()
    model.cell = Cell()
    model.plain = {"cells": (model.cell,)} if name == "in a list" else {}
    if name in ("an object", "a partial"):
        model.user, model.used = User(model.cell), functools.partial(use_of, model.cell)
    model = model.double()
    model(X() + 0.5)
    folded, x = gk.fold(model), X()
    assert isinstance(folded.cell.bn, nn.BatchNorm2d) == (name != "none")
    assert_same({"output": folded(x).detach()}, {"output": model.eval()(x).detach()}, bound=1e-12)


class TwoValues(nn.BatchNorm2d):
    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)
        return y, x


def test_a_batch_norm_that_returns_two_values():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), TwoValues(3)).double()
    assert [row.why for row in gk.convert(model).rows] == ["TwoValues may compute something else"]
    folded, x = gk.fold(model), X()
    assert type(folded[1]) is TwoValues
    for actual, expected in zip(folded(x), model.eval()(x), strict=True):
        torch.testing.assert_close(actual, expected)


def uses_conv(module, inputs, output):
    return output + module.cell.conv(inputs[0])


@pytest.mark.parametrize("way", ["hook", "instance", "isinstance"])
def test_fold_beside_what_no_class_shows(way):
    def forward(self, x):
        for layer in self.cell.children() if way == "isinstance" else [self.cell]:
            x = layer(x) * 2 if isinstance(layer, nn.BatchNorm2d) else layer(x)
        return x

    model = type("Holder", (nn.Module,), {"forward": forward if way == "isinstance" else lambda self, x: self.cell(x)})()
    model.cell = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) if way == "isinstance" else Cell()
    model = model.double()
    if way == "hook":
        model.register_forward_hook(uses_conv)
    elif way == "instance":
        model.forward = types.MethodType(lambda self, x: self.cell(x) + self.cell.conv(x), model)
    model(X() + 0.5)
    folded, x = gk.fold(model), X()
    if way == "instance":
        folded.forward = types.MethodType(model.forward.__func__, folded)
    assert_same({"output": folded(x).detach()}, {"output": model.eval()(x).detach()}, bound=1e-12)


def test_a_folded_linear_layer_refuses_what_it_cannot_know():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="cannot be folded into a linear layer"):
        gk.fold(model)(torch.randn(2, 4, 5))


# the libraries themselves, if their compiled parts work with this torch


def library(name):
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"{name} does not import: {error}")


LIBRARY_MODELS = [
    *(("torchvision", name) for name in ("resnet18", "efficientnet_b0", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5")),
    *(("timm", name) for name in ("resnet18", "efficientnet_b0", "darknet53", "resnetv2_50", "regnety_002", "mobilenetv3_small_050")),
    *(("ultralytics", name) for name in ("yolov8n.yaml", "yolo11n.yaml", "yolov3-tiny.yaml")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("package", "name"), LIBRARY_MODELS)
def test_models_of_libraries(package, name):
    if package == "torchvision":
        model = getattr(library("torchvision").models, name)(num_classes=10)
    elif package == "timm":
        model = library("timm").create_model(name, num_classes=10)
    else:
        model = importlib.import_module(f"{library('ultralytics').__name__}.nn.tasks").DetectionModel(name, verbose=False)
    model = model.double()
    for module in model.modules():
        # Dropout draws new random numbers at each call.
        if "drop" in type(module).__name__.lower() or "StochasticDepth" in type(module).__name__:
            module.eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    plain = copy.deepcopy(model)
    report = gk.convert(model, check=x)
    assert report.output_difference.difference <= 1e-6 * report.output_difference.magnitude, report
    assert report.gradient_difference.difference <= 1e-4 * report.gradient_difference.magnitude, report
    bn = [module for module in plain.modules() if isinstance(module, _BatchNorm)]
    assert sum(row.becomes is not None and "Batch" in row.found for row in report.rows) == len(bn), report
    with torch.no_grad():
        model.eval(), plain.eval()
        for each in (model, gk.fold(model)):
            for actual, expected in zip(tree_leaves(each(x)), tree_leaves(plain(x)), strict=True):
                if isinstance(expected, torch.Tensor):
                    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


class SwitchedByDefault(nn.Module):
    use = True

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.bn(x)
        return torch.relu(y) if self.use else y


def test_a_default_of_the_class_that_an_instance_sets_later():
    model, expected = SwitchedByDefault(), SwitchedByDefault()
    gk.convert(model)
    x = torch.randn(4, 3, 5, 5)
    for use in (True, False):
        model.use = expected.use = use
        torch.testing.assert_close(model(x), expected(x))


def test_a_forward_set_on_a_batch_norm_afterwards():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    gk.convert(model)
    model[0].forward = lambda x: x + 7
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(model(x), torch.relu(x + 7))


def test_a_graph_module_is_left():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    x = torch.randn(4, 3, 5, 5)
    expected = copy.deepcopy(traced)(x)
    gk.convert(traced)
    torch.testing.assert_close(traced(x), expected)
    gk.fold(traced)


def test_a_difference_that_is_nan_is_the_largest():
    before = {"a": torch.ones(2), "b": torch.ones(2)}
    found = check.largest_difference(before, {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])})
    assert str(found) == "nan where the largest value is 1 (b)"


@pytest.mark.parametrize("library", ["torchvision.ops.misc", "detectron2.layers.batch_norm", None])
def test_frozen_batch_norms(library):
    """Those of other libraries, which are known by name and keep their class, and our own."""
    kind = functools.partial(gk.FrozenBatchNormAct2d, act="identity")
    if library is not None:
        kind = type("FrozenBatchNorm2d", (FrozenBatchNorm2d,), {"__module__": library})

    def forward(self, x):
        return self.act(self.bn2(self.conv2(F.relu(self.bn(self.conv(x))))) + x)

    model = block(forward, nn.GELU(), bn2=randomised(kind(3)), conv2=nn.Conv2d(3, 3, 1))
    model.bn = randomised(kind(3))
    model.double()
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    report = gk.convert(model)
    assert [row.becomes for row in report.rows] == ["batch_norm_act(relu)", "batch_norm_act(gelu, residual)"]
    assert type(model.bn) is type(plain.bn) and vars(model.bn).keys() == vars(plain.bn).keys()
    assert_same(step(model, x), step(plain, x))
    assert operators(model, x).ours == {"relu": 1, "gelu, residual": 1}
    assert_same({"output": gk.fold(model)(x)}, {"output": plain(x)})
    if library is not None:
        # Those promote, and a single channel broadcasts.
        half, plain_half = (copy.deepcopy(each).float() for each in (model, plain))
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = half(x.float()), plain_half(x.float())
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected)
        for wide in (half, plain_half):
            wide.conv, wide.conv2 = nn.Conv2d(3, 1, 1).double().requires_grad_(False), nn.Identity()
        plain_half.conv = half.conv
        assert half(x).dtype == plain_half(x).dtype == torch.float64
        torch.testing.assert_close(half(x), plain_half(x))
    model.bn.register_forward_hook(lambda module, args, y: y * 2)
    plain.bn.register_forward_hook(lambda module, args, y: y * 2)
    assert_same(step(model, x), step(plain, x))
    gk.revert(model)
    assert type(model.bn) is type(plain.bn) and vars(model.bn).keys() == vars(plain.bn).keys()
    assert_same(step(model, x), step(plain, x))


def frozen_norm_acts():
    """Those of timm: fused alone, past a dropout, with a residual across a border, and left."""
    kind = libraries.FrozenBatchNormAct2d
    body = nn.Sequential(nn.Conv2d(3, 3, 1), kind(3, nn.ReLU(True)), kind(3, libraries.GELU(), nn.Dropout(0.0)), kind(3, nn.Tanh()))
    model = nn.Sequential(body, parent(added, nn.Sequential(nn.Conv2d(3, 3, 1), kind(3, nn.Identity())), nn.SiLU()))
    for module in model.modules():
        if isinstance(module, kind):
            randomised(module)
    return model.double()


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle], ids=lambda each: each.__name__)
def test_frozen_batch_norms_that_apply_an_activation(copied, monkeypatch):
    # Pickle looks the class up there.
    for name in ("timm", "timm.layers", "timm.layers.norm_act"):
        monkeypatch.setitem(sys.modules, name, libraries)
    expected, actual, report = converted(frozen_norm_acts())
    monkeypatch.setattr(sys.modules[__name__], "Written", type(expected[1]), raising=False)
    actual, x = copied(actual), X()
    assert operators(copy.deepcopy(actual), x).ours == {"relu": 1, "gelu": 1, "identity": 1, "swish, residual": 1}, report
    assert_same(step(actual, x), step(expected, x))
    assert_same({"output": gk.fold(actual)(x)}, {"output": expected(x)})
    # They promote, and a single channel broadcasts.
    half = X().bfloat16()
    norm_act, ours = expected[0][1].float(), actual[0][1].float()
    assert ours(half).dtype == norm_act(half).dtype == torch.float32
    for given in (half, half[:, :1]):
        torch.testing.assert_close(ours(given), norm_act(given))
    expected.double(), actual.double()
    expected[0][2].drop.p = actual[0][2].drop.p = 0.5
    for change in (
        lambda model: setattr(model[0][2].drop, "p", 0.5),
        lambda model: setattr(model[0][1], "eps", 0.5),
        lambda model: model.eval(),
        lambda model: setattr(model[0][2].drop, "p", 0.0),
        lambda model: setattr(model[0][2], "act", nn.Sigmoid()),
        lambda model: model[0][2].act.register_forward_hook(lambda module, args, y: y * 2),
        lambda model: setattr(model[1].body, "1", nn.Tanh()),
    ):
        steps = []
        for model in (actual, expected):
            change(model)
            torch.manual_seed(0)
            steps.append(step(model, x))
        assert_same(*steps)
    assert [type(module) for module in gk.revert(actual).modules()] == [type(module) for module in expected.modules()]


def test_an_activation_of_the_users_that_a_batch_norm_applies_changes():
    act = Activates(F.gelu, approximate="tanh")
    bn = libraries.BatchNormAct2d(3)
    bn.act = act
    expected, actual, report = converted(nn.Sequential(nn.Conv2d(3, 3, 1), bn).double())
    x = X()
    assert operators(copy.deepcopy(actual), x).ours == {"gelu_tanh": 1}, report
    for change in (
        lambda model: None,
        lambda model: setattr(model[1].act, "function", F.mish) or setattr(model[1].act, "options", {"inplace": True}),
        lambda model: setattr(model[1].act, "function", torch.sigmoid) or setattr(model[1].act, "options", {}),
        lambda model: setattr(model[1], "act", libraries.GELU()),
        lambda model: model[1].act.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    ):
        change(expected), change(actual)
        for training in (True, False):
            assert_same(step(actual.train(training), x), step(expected.train(training), x))


def test_the_report_says_why_the_caller_of_a_block_could_not_be_read():
    def activated_by_size(self, x):
        return self.act(self.body(x)) if x.shape[0] > 1 else x

    for body in (ending(), Between(ending()), nn.Sequential(ending())):
        report = gk.convert(parent(activated_by_size, body))
        assert "returned to Written, whose forward cannot be traced" in next(row.why for row in report.rows if "BatchNorm" in row.found)
    report = gk.convert(parent(activated_by_size, nn.Sequential(ending(), nn.Conv2d(3, 3, 1))))
    assert next(row.why for row in report.rows if "BatchNorm" in row.found) == patterns.IS_RETURNED


# group norm and instance norm

NORMS_OF_GROUPS = {
    "GroupNorm": lambda: nn.GroupNorm(1, 3),
    "GroupNorm without parameters": lambda: nn.GroupNorm(3, 3, affine=False),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(3),
    "InstanceNorm2d with statistics": lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
    "GroupNormAct": lambda: gk.GroupNormAct(1, 3, act="identity"),
}


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle], ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", NORMS_OF_GROUPS)
def test_norms_of_groups(name, copied, monkeypatch):
    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        return F.silu(x + self.bn2(self.conv(y)))

    model = block(forward, nn.LeakyReLU(0.2), bn2=NORMS_OF_GROUPS[name](), bn=NORMS_OF_GROUPS[name]()).double()
    monkeypatch.setattr(sys.modules[__name__], "Written", type(model), raising=False)
    expected, actual, report = converted(nn.Sequential(model, NORMS_OF_GROUPS[name]()).double())
    # torch computes images of few pixels.
    actual, x = copied(actual), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    operator = "instance_norm_act" if "Instance" in name else "group_norm_act"
    labels = [row.becomes for row in report.rows if "Norm" in row.found]
    assert labels[:2] == [f"{operator}(leaky_relu)", f"{operator}(swish, residual)"], report
    for training in (True, False):
        expected.train(training), actual.train(training)
        assert_same(step(actual, x), step(expected, x))
        seen = operators(copy.deepcopy(actual), x)
        kind = "" if "statistics" in name and not training else "group "
        assert seen.ours == {f"{kind}leaky_relu": 1, f"{kind}swish, residual": 1, f"{kind}identity": 1}
    if "Instance" in name:
        torch.testing.assert_close(actual(x[0]), expected(x[0]))
    assert_same({"output": gk.fold(actual)(x)}, {"output": expected.eval()(x)})
    for change in (
        lambda model: setattr(model[0].bn, "eps", 0.5),
        lambda model: setattr(model[0].act, "negative_slope", 0.5),
        lambda model: model[0].bn.register_forward_hook(lambda module, args, y: y * 2),
        lambda model: setattr(model[0], "bn2", nn.BatchNorm2d(3).double()),
    ):
        change(expected), change(actual)
        assert_same(step(actual, x), step(expected, x))
    assert list(actual.state_dict()) == list(expected.state_dict())
    assert [type(module) for module in gk.revert(actual).modules()] == [type(module) for module in expected.modules()]


def test_what_changes_in_a_group_norm_that_applies_an_activation():
    expected, actual, report = converted(nn.Sequential(nn.Conv2d(3, 4, 1), libraries.GroupNormAct(4), libraries.GroupNorm(4), nn.ELU()))
    assert [row.becomes for row in report.rows] == ["group_norm_act(relu)", "group_norm_act(elu)"], report
    x = torch.randn(4, 3, 16, 16)
    for change in (
        lambda model: setattr(model[1], "num_groups", 4),
        lambda model: setattr(model[1], "_fast_norm", True),
        lambda model: setattr(model[2], "fast_norm", True),
        lambda model: setattr(model[1], "drop", nn.Dropout(1.0)),
        lambda model: setattr(model[1], "act", nn.Sigmoid()),
    ):
        change(expected), change(actual)
        torch.testing.assert_close(actual(x), expected(x))


def test_group_norms_that_are_left():
    def forward(self, x):
        return F.relu(F.group_norm(x, 3)) + F.relu(F.instance_norm(x)) + self.act(self.bn(x))

    model = block(forward, nn.PReLU(), bn=type("Own", (nn.GroupNorm,), {"forward": lambda self, x: x.mean()})(1, 3))
    whys = {row.found: row.why for row in gk.convert(model).rows}
    assert "only modules are fused" in whys["group_norm"] and "only modules are fused" in whys["instance_norm"]
    assert whys["Own"] == "Own may compute something else"
    named = nn.GroupNorm(1, 3)
    named.act_param = 2
    report = gk.convert(nn.Sequential(named, nn.ReLU()))
    assert "it has attributes of its own that GroupNormAct would replace: act_param" in report.rows[0].why
