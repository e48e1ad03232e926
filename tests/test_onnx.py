"""Both exporters of torch.onnx and torch.jit.script, on converted and folded models and on our modules.

In evaluation onnxruntime has to compute the same values as the model. In training the exported nodes have to
be those of the same model made of torch's modules.
"""

import contextlib
import copy
import importlib
import io
import logging
import warnings

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import gradkernels as gk
from batch_norm_act_calls import PARAMS
from gradkernels import acts
from models.resnet import BasicBlock

CHANNELS = 3


class Each(nn.Module):
    """Calls each module on x: the first with one spatial dimension, the second with three, all others with 2."""

    def __init__(self, modules):
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, x):
        first, second, *others = self.each
        return first(x.flatten(2)), second(x.unsqueeze(-1)), *(module(x) for module in others)


class WithResidual(nn.Module):
    def __init__(self, bn, act=None):
        super().__init__()
        self.bn, self.act = bn, act

    def forward(self, x):
        return self.bn(x, x) if self.act is None else self.act(self.bn(x) + x)


class Functions(nn.Module):
    """Calls this package's functions or torch's."""

    def __init__(self, leaky_relu, elu, swish, prelu):
        super().__init__()
        self.functions = leaky_relu, elu, swish, prelu
        self.weight = nn.Parameter(torch.tensor([0.5, 0.1, -0.2]))

    def forward(self, x):
        leaky_relu, elu, swish, prelu = self.functions
        return prelu(swish(elu(leaky_relu(x, 0.3), 0.5, True)), self.weight)


class Network(nn.Module):
    """A residual block with a downsample, a Sequential, functions in place and not, a batch norm of (N, C)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(CHANNELS, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU())
        self.block = BasicBlock(4, 6, 2)
        self.conv, self.bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.fc, self.fc_bn = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = F.leaky_relu(self.bn(self.conv(self.block(self.stem(x)))), 0.1)
        return F.elu_(self.fc_bn(self.fc(x.mean((2, 3))))), self.conv(F.elu(F.silu(x)))


def converted():
    model = Network()
    ours = copy.deepcopy(model)
    assert {row.becomes is not None for row in gk.convert(ours).rows} == {True}
    return model, ours


def modules():
    theirs = [WithResidual(nn.BatchNorm1d(CHANNELS), nn.ELU()), WithResidual(nn.BatchNorm3d(CHANNELS), nn.ReLU())]
    ours = [WithResidual(gk.BatchNormAct1d(CHANNELS, act="elu")), WithResidual(gk.BatchNormAct3d(CHANNELS, act="relu"))]
    for act, record in acts.ACTS.items():
        (kind, attribute), *_ = record.modules.items()
        act_param = None if attribute is None else PARAMS[act]
        module = record.module(act_param, kind)
        theirs += [nn.Sequential(nn.BatchNorm2d(CHANNELS), module), WithResidual(nn.BatchNorm2d(CHANNELS), module)]
        arguments = {"act": act, "act_param": act_param}
        ours += [gk.BatchNormAct2d(CHANNELS, **arguments), WithResidual(gk.BatchNormAct2d(CHANNELS, **arguments))]
    theirs += [nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ELU()), nn.LeakyReLU(), nn.ELU(), nn.SiLU(), nn.PReLU(CHANNELS)]
    ours += [gk.SyncBatchNormAct(CHANNELS, act="elu"), gk.LeakyReLU(), gk.ELU(), gk.Swish(), gk.PReLU(CHANNELS)]
    theirs += [WithResidual(nn.GroupNorm(1, CHANNELS), nn.SiLU()), nn.Sequential(nn.InstanceNorm2d(CHANNELS), nn.LeakyReLU())]
    ours += [WithResidual(gk.GroupNormAct(1, CHANNELS, act="swish")), gk.InstanceNormAct2d(CHANNELS)]
    theirs += [Functions(F.leaky_relu, F.elu, F.silu, F.prelu)]
    ours += [Functions(gk.leaky_relu, gk.elu, gk.swish, gk.prelu)]
    return Each(theirs), Each(ours)


def folded():
    layers = nn.Conv2d(CHANNELS, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 5, 1), gk.BatchNormAct2d(5, act="elu")
    return gk.fold(nn.Sequential(*layers))


class OfEvaluation(nn.Module):
    """Modules and functions that torch does not have, or that it cannot export in training."""

    def __init__(self):
        super().__init__()
        self.swish, self.learnable = gk.Swish(2.0), gk.Swish(0.5, learnable=True, num_parameters=CHANNELS)
        self.rrelu, self.momentless = gk.RReLU(), gk.BatchNormAct2d(CHANNELS, momentum=None, affine=False)

    def forward(self, x):
        return self.swish(x), self.learnable(x), self.rrelu(x), self.momentless(x), gk.rrelu(x), gk.leaky_relu(x * 1.0, -0.5, True)


# name -> a model of torch's modules, and the same model of this package's modules
PAIRS = {"converted": converted, "modules": modules}
MODELS = {**{name: lambda pair=pair: pair()[1] for name, pair in PAIRS.items()}, "folded": folded, "in evaluation alone": OfEvaluation}


def of_training(model):
    """The model with statistics and parameters that are not the initial ones."""
    with torch.no_grad():
        for name, each in (*model.named_buffers(), *model.named_parameters()):
            if each.is_floating_point() and ("bn" in name or each.dim() == 1):
                each.uniform_(0.5, 1.5)
    return model


def export(model, x, dynamo, is_dynamic, training):
    file = io.BytesIO()
    keywords = {"dynamo": dynamo}
    if dynamo:
        keywords["dynamic_shapes"] = ({0: torch.export.Dim("batch", min=2)},) if is_dynamic else None
    else:
        keywords["training"] = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
        keywords |= {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}} if is_dynamic else None}
    # The newer exporter prints its progress and logs which packages are missing.
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(model.train(training), (x,), file, **keywords)
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load_model_from_string(file.getvalue())


def check_values(exported, model, x):
    assert {node.domain for node in exported.graph.node} == {""} and not exported.functions
    session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(x.clone())
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(tuple(map(torch.from_numpy, found)), expected)


each_exporter = pytest.mark.parametrize("dynamo", [False, True], ids=["older", "dynamo"])
pytestmark = pytest.mark.filterwarnings(
    # torch deprecates its older exporter and torch.jit.
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning",
    # The package and torch set this filter when they are imported, and pytest removes it.
    "ignore::torch.jit.TracerWarning",
)


@pytest.mark.parametrize(("dynamo", "is_dynamic"), [(False, False), (False, True), (True, True)], ids=["older", "older, dynamic", "dynamo"])
@pytest.mark.parametrize("name", MODELS)
def test_evaluation(name, dynamo, is_dynamic):
    model = of_training(MODELS[name]()).eval()
    x = torch.randn(4, CHANNELS, 4, 4)
    exported = export(model, x, dynamo, is_dynamic, training=False)
    check_values(exported, model, torch.randn(6, CHANNELS, 4, 4) if is_dynamic else x)


@pytest.mark.slow
@each_exporter
@pytest.mark.parametrize("name", PAIRS)
def test_training(name, dynamo):
    x = torch.randn(4, CHANNELS, 4, 4)
    theirs, ours = (export(each, x, dynamo, False, training=True).graph.node for each in PAIRS[name]())
    assert [(node.domain, node.op_type) for node in ours] == [(node.domain, node.op_type) for node in theirs]


def test_exported_program():
    """torch.export makes the program without knowing about ONNX."""
    model = of_training(converted()[1]).eval()
    x = torch.randn(4, CHANNELS, 4, 4)
    program = torch.export.export(model, (x,))
    assert not any("gradkernels" in str(node.target) for node in program.graph.nodes)
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exported = torch.onnx.export(program, dynamo=True)
    finally:
        logging.disable(logging.NOTSET)
    check_values(exported.model_proto, model, x)


def is_converted(model):
    gk.convert(model)
    return model


class HasFunctions(nn.Module):
    def forward(self, x):
        return F.silu(F.elu(x))


SCRIPTS = {
    **{each.__name__: each for each in (gk.LeakyReLU, gk.ELU, gk.PReLU, gk.RReLU, gk.Swish)},
    **{each.__name__: lambda each=each: each(3) for each in (gk.BatchNormAct1d, gk.BatchNormAct2d, gk.BatchNormAct3d, gk.SyncBatchNormAct)},
    "SiLU": lambda: is_converted(nn.SiLU()),
    "HasFunctions": lambda: is_converted(HasFunctions()),
    "Network": lambda: is_converted(Network()),
}


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "in a model"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_refused(name, inside):
    module = SCRIPTS[name]()
    with pytest.raises(
        RuntimeError, match=rf"^{name} is computed by gradkernels, which torch.jit.script cannot compile: use torch.export or"
    ):
        torch.jit.script(nn.Sequential(nn.ReLU(), module) if inside else module)


@pytest.mark.parametrize(
    "function", [gk.leaky_relu, gk.elu, gk.swish, gk.prelu, gk.rrelu, gk.batch_norm_act, gk.group_norm_act], ids=lambda each: each.__name__
)
def test_script_of_a_function_is_refused(function):
    def calls(x):
        return function(x)

    for each in (function, calls):
        with pytest.raises(
            RuntimeError, match=f"^TorchScript error: {function.__name__} is computed by gradkernels, which torch.jit.script"
        ):
            torch.jit.script(each)


def test_alternatives_named_in_the_refusal_work():
    model, ours = (each.eval() for each in converted())
    x = torch.randn(4, CHANNELS, 4, 4)
    expected = model(x)
    assert_close(torch.jit.trace(ours, (x,))(x), expected)
    assert_close(torch.export.export(ours, (x,)).module()(x), expected)
    assert_close(torch.jit.script(gk.revert(ours))(x), expected)


def test_trace_warns_about_no_line_of_gradkernels():
    x = torch.randn(2, CHANNELS, 4, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The import sets its filter again, because pytest has removed the first.
        importlib.reload(gk)
        torch.jit.trace(gk.BatchNormAct2d(CHANNELS), (x, x))
        torch.jit.trace(gk.Swish(learnable=True), x)
    assert not [str(each) for each in caught if issubclass(each.category, torch.jit.TracerWarning) and "gradkernels" in each.filename]
