"""convert, revert and fold on whole networks: in float64, where a difference that is not rounding cannot hide, against the same network
as torch computes it. What is fused is counted by the operators that run; what must be left alone is a table of forwards with the reason.
"""

import collections
import copy
import functools
import io
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

import gradkernels as gk
from gradkernels import fused_forward, fusion
from models import libraries
from models.darknet import DarkNet
from models.dcgan import discriminator
from models.efficientnet import EfficientNetBlocks
from models.mlp import perceptron, perceptron_activation_first
from models.resnet import resnet18, resnet50
from models.unet import UNet

IMAGES = (4, 3, 32, 32)
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
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), libraries.BatchNormAct2d(8, act_layer=nn.SiLU), libraries.BatchNormAct2d(8, False)),
        IMAGES,
        {"swish": 1, "identity": 1},
    ),
    "Ultralytics": (
        lambda: nn.Sequential(libraries.Conv(3, 8, 3), libraries.C2f(8, 8, 2), libraries.Conv(8, 8, act=False)),
        IMAGES,
        {"swish": 7, "identity": 1},
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
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return model, torch.randn(shape, dtype=dtype)


def flat(output):
    return torch.cat([each.flatten() for each in output]) if isinstance(output, list) else output


def step(model, x):
    """Everything that one training step gives: output, gradients of x and the parameters, buffers."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = flat(model(x * 1))
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    grads = {f"gradient of {name}": each.grad for name, each in model.named_parameters()}
    return {"output": y.detach(), "gradient of x": x.grad, **grads, **{name: each.clone() for name, each in model.named_buffers()}}


def assert_same(actual, expected, bound=1e-7):
    """Up to rounding of float64 as deep networks enlarge it, in units of the largest value of all gradients or of the tensor itself."""
    assert actual.keys() == expected.keys()
    largest = max((each.abs().max() for name, each in expected.items() if name.startswith("gradient") and each is not None), default=0)
    for name, each in expected.items():
        if each is None:
            assert actual[name] is None, name
            continue
        unit = max(each.abs().max().item(), float(largest) if name.startswith("gradient") else 0, 1e-3)
        assert (actual[name] - each).abs().max().item() <= bound * unit, name


class Operators(TorchDispatchMode):
    """Counts batch norms and activations that run: ours by act and residual, torch's by name."""

    TORCHS = ("batch_norm", "relu", "elu", "silu", "leaky_relu", "hardtanh")

    def __init__(self):
        super().__init__()
        self.ours, self.torchs = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name == "gradkernels::batch_norm_act":
            self.ours[args[-2] + (", residual" if args[5] is not None else "")] += 1
        elif name.startswith("aten::") and any(each in name for each in self.TORCHS):
            self.torchs[name] += 1
        return function(*args, **(kwargs or {}))


def operators(model, x):
    with torch.no_grad(), Operators() as seen:
        model(x)
    return seen


# whole networks


@pytest.mark.parametrize("name", NETWORKS)
def test_three_steps_of_a_converted_network_are_those_of_torch(name):
    expected, x = network(name)
    actual = copy.deepcopy(expected)
    # Made before conversion: it holds the parameters that are trained after it.
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
        (isinstance(module, classes[key]) and type(module).__name__ == classes[key].__name__) or isinstance(module, _BatchNorm)
        for key, module in modules.items()
        if type(module) not in fusion.ACTIVATION_MODULES.values()
    )
    assert gk.revert(model) is model
    assert {key: type(module) for key, module in model.named_modules()} == classes
    assert {key: module.__dict__ for key, module in model.named_modules()} == states
    assert_same(step(model, x), step(plain, x), bound=0)


def through_pickle(model):
    data = pickle.dumps(model)
    # As another process has it: the classes are made again.
    fused_forward._CLASSES.clear()
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
    assert not any(isinstance(module, fused_forward.Fused) for module in made.modules())


def test_a_copy_computes_with_its_own_parameters():
    model, x = network("ResNet-18")
    gk.convert(model)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert step(copied, x)["output"].abs().max() > 0


def test_torch_compile_takes_it_in_one_graph():
    model, x = network("ResNet-18")
    expected = step(copy.deepcopy(model), x)
    gk.convert(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x.requires_grad_())
    assert_same({"output": y.detach()}, {"output": expected["output"]})
    assert compiled.bn1.num_batches_tracked == 1


def test_distributed_data_parallel(tmp_path):
    model, x = network("MLP")
    expected = step(copy.deepcopy(model), x)
    gk.convert(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        actual = step(nn.parallel.DistributedDataParallel(model), x)
    finally:
        torch.distributed.destroy_process_group()
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
    """Convolution, batch norm and an activation, to be called by a forward that a test gives it."""

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
    """The model before and after conversion, and the report."""
    actual = copy.deepcopy(model)
    report = gk.convert(actual, **arguments)
    return model, actual, report


X = functools.partial(torch.randn, 4, 3, 5, 5, dtype=torch.float64)


def add_(y, x):
    y += x
    return y


WRITTEN = {
    "module": (lambda self, x: self.act(self.bn(self.conv(x))), "relu"),
    "F.relu": (lambda self, x: F.relu(self.bn(x)), "relu"),
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
    "sum without an activation": (lambda self, x: self.conv(self.bn(self.conv(x)) + x), "identity, residual"),
    "alone": (lambda self, x: self.conv(self.bn(x)), "identity"),
    "in a ModuleList": (lambda self, x: [x := self.act(each(x)) for each in self.blocks][-1], "relu"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_way_to_write_it(name):
    forward, fused = WRITTEN[name]
    blocks = nn.ModuleList([nn.BatchNorm2d(3)]).double() if "ModuleList" in name else nn.ModuleList()
    expected, actual, report = converted(block(forward, blocks=blocks))
    x = X()
    assert operators(copy.deepcopy(actual), x).ours == {fused: 1}, report
    assert_same(step(actual, x), step(expected, x))


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.ELU(0.5), nn.SiLU(), nn.SiLU(True), gk.Swish(1.5), gk.ELU()], ids=repr
)
def test_every_activation_module(module):
    expected, actual, _ = converted(nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), module).double())
    x = X()
    (fused,) = operators(copy.deepcopy(actual), x).ours
    assert fused == fusion.resolve_act(module, None)[0]
    assert_same(step(actual, x), step(expected, x))


def writes_attribute(self, x):
    self.flag = False
    return self.act(self.bn(x))


def appends(self, x):
    self.seen.append(1)
    return self.act(self.bn(x))


def without_gradients(self, x):
    with torch.no_grad():
        y = self.bn(x)
    return self.act(y) + x


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


def called_between(self, x):
    y = self.bn(x)
    z = self.bn(self.conv(x))
    return self.act(y + z.exp())


# forward -> what the report says of the first batch norm.
LEFT = {
    "optional argument": (lambda self, x, y=None: self.act(self.bn(x if y is None else y)), "optional argument, y"),
    "var arguments": (lambda self, *x: self.act(self.bn(*x)), "optional argument, x"),
    "training": (lambda self, x: self.act(self.bn(x)) if self.training else self.bn(x), "reads self.training"),
    "mode of a child": (lambda self, x: self.act(self.bn(x)) if self.conv.training else self.bn(x), "reads self.conv.training"),
    "type": (lambda self, x: self.act(self.bn(x)) if isinstance(x, torch.Tensor) else x, "asks for the type"),
    "is_tensor": (lambda self, x: self.act(self.bn(x)) if torch.is_tensor(x) else x, "asks for the type"),
    "data": (lambda self, x: self.act(self.bn(x)) if x.sum() > -1e9 else x, "is no graph for torch.fx: TraceError"),
    "shape": (lambda self, x: self.act(self.bn(x)) if x.shape[0] > 1 else x, "is no graph for torch.fx: TraceError"),
    "random": (lambda self, x: self.act(self.bn(x)) if torch.rand(()) < 2 else x, "draws random numbers"),
    "Python's random": (lambda self, x: self.act(self.bn(x)) if random.random() < 2 else x, "draws random numbers"),
    "writes an attribute": (writes_attribute, "writes self.flag"),
    "appends to an attribute": (appends, "writes self.seen"),
    "no_grad": (without_gradients, "switches gradients"),
    "decorated": (torch.no_grad()(lambda self, x: self.act(self.bn(x))), "switches gradients"),
    "checkpoint": (
        lambda self, x: torch.utils.checkpoint.checkpoint(lambda x: self.act(self.bn(x)), x, use_reentrant=False),
        "switches gradients, autocast or checkpointing",
    ),
    "read twice": (twice, "its output is read 2 times"),
    "doubled": (lambda self, x: self.act((lambda y: y + y)(self.bn(x))), "its output is read 2 times"),
    "written into the other": (into_the_other, "written over the other term"),
    "input written between": (written_between, "add_, between it and its activation"),
    "view of the input written between": (view_written_between, "view, between it and its activation"),
    "residual written between": (residual_written_before_activation, "mul_, between it and its activation"),
    "called again between": (called_between, "called again before its sum is complete"),
    "scalar": (lambda self, x: self.act(self.bn(x) + 1.0), "add follows"),
    "weighted": (lambda self, x: self.act(torch.add(self.bn(x), x, alpha=2)), "add follows"),
    "gelu": (lambda self, x: F.gelu(self.bn(x)), "no kernel for gelu"),
    "activation first": (lambda self, x: self.conv(self.bn(self.act(self.conv(x)))), "its activation, ReLU, stands before it"),
}


# Those where torch's own backward refuses, or has nothing to do.
NO_BACKWARD = {"decorated", "input written between", "view of the input written between"}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name):
    forward, why = LEFT[name]
    expected, actual, report = converted(block(forward))
    row = next(row for row in report.rows if row.name == "bn")
    assert why in row.why, report
    x = X()
    if name in NO_BACKWARD:
        with torch.no_grad():
            assert_same({"output": actual(x), **actual.state_dict()}, {"output": expected(x), **expected.state_dict()})
    else:
        assert_same(step(actual, x), step(expected, x))
    assert (actual.flag, actual.seen) == (expected.flag, expected.seen)
