"""diagnose: each verdict on a model with this fault and on one without it, the cures, and an unchanged model.

Thresholds are tested on both sides with figures made by hand. Models are small, and their faults are put in
on purpose.
"""

import contextlib
import json
import math
import random
import re
import subprocess
import sys
import threading
from fractions import Fraction

import numpy
import pytest
import torch
from matplotlib.image import imread
from torch import nn
from torch.nn import functional as F

import gradkernels as gk
from gradkernels.diagnosis import command, cures, thresholds, verdicts
from gradkernels.diagnosis.probe import Layer, Probe
from gradkernels.init.fill import expected_std

WIDTH, CLASSES = 16, 4


def mlp(act, depth=12, std=None, norm=False):
    model = nn.Sequential()
    for number in range(depth):
        model.add_module(f"linear{number}", nn.Linear(WIDTH, WIDTH))
        if norm:
            model.add_module(f"bn{number}", nn.BatchNorm1d(WIDTH))
        model.add_module(f"act{number}", act())
    model.add_module("head", nn.Linear(WIDTH, CLASSES))
    if std is not None:
        for linear in (module for module in model if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=std / math.sqrt(WIDTH))
    return model


def batch(count=64):
    return torch.randn(count, WIDTH), torch.randint(CLASSES, (count,))


def diagnosed(model, count=64, **keywords):
    return gk.diagnose(model, batch(count), F.cross_entropy, **keywords)


def words(diagnosis):
    return {each.name: each.verdicts for each in diagnosis.layers}


class Net(nn.Module):
    """A layer, a function, a head."""

    def __init__(self, function):
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self.body(x)))


class Recurrent(nn.Module):
    def __init__(self, std):
        super().__init__()
        self.inward, self.recur, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        nn.init.normal_(self.recur.weight, std=std / math.sqrt(WIDTH))

    def forward(self, x):
        h = torch.zeros_like(x)
        for _ in range(30):
            h = F.leaky_relu(self.inward(x) + self.recur(h), 0.2)
        return self.head(h)


# Verdicts


def test_vanishing():
    diagnosis = diagnosed(mlp(nn.Sigmoid))
    assert words(diagnosis)["linear0"] == ("vanishing",) and words(diagnosis)["head"] == ("healthy",)
    assert diagnosis.first_to_last() < 1e-6
    assert [cure.name for cure in diagnosis.cures] == ["activation", "initialisation", "batch norm", "residual connections"]
    text = str(diagnosis)
    assert "vanishing" in text and "exploding" not in text
    assert "the gradient of the first layer, linear0, is" in text and "at most 0.25" in text


# Made in the test, whose seed makes them the same each time.
@pytest.mark.parametrize("make", [lambda: mlp(nn.LeakyReLU, std=6), lambda: Recurrent(4.0)], ids=["depth", "time"])
def test_exploding(make):
    diagnosis = diagnosed(make())
    assert "exploding" in next(iter(words(diagnosis).values()))
    names = [cure.name for cure in diagnosis.cures]
    assert names[:2] == ["initialisation", "clipping"] and "learning rate" in names
    assert "exploding" in str(diagnosis) and "vanishing" not in str(diagnosis)


@pytest.mark.parametrize(
    "make", [lambda: mlp(nn.ELU, norm=True), lambda: Recurrent(1.3), lambda: mlp(nn.ReLU, 3)], ids=["batch norm", "recurrent", "shallow"]
)
def test_healthy(make):
    diagnosis = diagnosed(make())
    assert set(words(diagnosis).values()) == {("healthy",)}
    assert diagnosis.cures == []
    text = str(diagnosis)
    assert not any(word in text for word in verdicts.VERDICTS if word != "healthy")


@pytest.mark.parametrize(
    "relu",
    [
        F.relu,
        lambda z: z.relu_(),
        F.relu6,
        nn.ReLU(inplace=True),
        gk.BatchNormAct1d(WIDTH, affine=False, act="relu", track_running_stats=False).eval(),
    ],
)
def test_dead(relu):
    model = Net(relu)
    if isinstance(relu, gk.BatchNormAct1d):
        model.function = nn.Sequential(gk.BatchNormAct1d(WIDTH, act="relu"))
        nn.init.constant_(model.function[0].bias, -20.0)
    else:
        nn.init.constant_(model.body.bias, -20.0)
    diagnosis = diagnosed(model)
    sick = next(each for each in diagnosis.layers if "dead" in each.verdicts)
    assert sick.layer.dead == 1 and "100% of the units after relu" in sick.why
    assert "activation" in [cure.name for cure in diagnosis.cures]
    few = diagnosed(model, count=8)
    assert all("dead" not in each.verdicts for each in few.layers), "eight samples are too few to call a unit dead"


@pytest.mark.parametrize("act", [torch.sigmoid, torch.tanh, F.hardtanh, F.hardsigmoid, lambda z: gk.elu(z - 20), nn.Tanh(), nn.SELU()])
def test_saturated(act):
    model = Net(act)
    nn.init.normal_(model.body.weight, std=10.0)
    if isinstance(act, nn.SELU):
        nn.init.constant_(model.body.bias, -200.0)
    assert "saturated" in words(diagnosed(model))["body"]
    nn.init.normal_(model.body.weight, std=0.25)
    if not isinstance(act, nn.SELU) and act(torch.zeros(())).abs() < 0.9:
        assert words(diagnosed(model))["body"] == ("healthy",)


def test_badly_initialised():
    model = mlp(nn.ReLU, 3)
    nn.init.constant_(model.linear1.weight, 0.01)
    assert "badly initialised" in words(diagnosed(model))["linear1"]
    nn.init.normal_(model.linear1.weight, std=3.0)
    assert "badly initialised" in words(diagnosed(model))["linear1"]
    nn.init.zeros_(model.linear1.weight)
    assert "all weights are 0" in str(diagnosed(model))


def test_zeros_at_the_end_of_a_residual_branch_are_healthy():
    class Branch(Net):
        def forward(self, x):
            return self.head(x + self.last(F.relu(self.body(x))))

    model = Branch(None)
    model.first, model.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    model.forward = lambda x: Branch.forward(model, model.first(x))
    nn.init.zeros_(model.last.weight)
    assert "badly initialised" not in words(diagnosed(model))["last"]


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), factor))

    def forward(self, x):
        return x * self.gamma


def closing_norm(factor):
    norm = nn.BatchNorm1d(WIDTH)
    nn.init.constant_(norm.weight, factor)
    return norm


def closing_linear(factor):
    linear = nn.Linear(WIDTH, WIDTH)
    nn.init.constant_(linear.weight, factor)
    return linear


class Branch(nn.Module):
    def __init__(self, end, around=True):
        super().__init__()
        self.wide, self.back, self.around = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), around
        if isinstance(end, nn.Module):
            self.end = end
        else:
            self.factor = nn.Parameter(torch.full((WIDTH,), end))

    def forward(self, x):
        y = self.back(F.relu(self.wide(x)))
        y = y * self.factor if hasattr(self, "factor") else self.end(y)
        return x + y if self.around else y


@pytest.mark.parametrize(
    "end",
    [
        *(lambda: closing_norm(0.0), lambda: closing_linear(0.0), lambda: Scale(0.0), lambda: Scale(1e-6), lambda: Scale(1e-4)),
        *(lambda: 0.0, lambda: 1e-6),
    ],
    ids=["norm of 0", "linear of 0", "scale of 0", "scale of 1e-6", "scale of 1e-4", "factor of 0", "factor of 1e-6"],
)
def test_a_residual_branch_that_starts_near_zero_is_healthy(end):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Branch(end()) for _ in range(3)), nn.Linear(WIDTH, CLASSES))
    diagnosis = diagnosed(model)
    assert set(words(diagnosis).values()) == {("healthy",)}
    assert diagnosis.cures == []
    assert cures.learning_rate(diagnosis.layers) > 1e-4


def test_factors_near_zero_do_not_make_a_dead_layer_or_a_branch_without_a_skip_healthy():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), Branch(Scale(0.0)), nn.Linear(WIDTH, CLASSES))
    nn.init.constant_(model[0].bias, -50.0)
    found = words(diagnosed(model))
    assert found["0"] == ("dead", "vanishing"), "the dead layer is before the branch"
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Branch(Scale(1e-6), around=False), nn.Linear(WIDTH, CLASSES))
    assert words(diagnosed(model))["0"] == ("vanishing",), "there is no skip connection"


def test_the_reason_names_the_layer_whose_units_are_all_off():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    nn.init.constant_(model[1].bias, -50.0)
    assert diagnosed(model).layers[0].why == "gradient exactly 0, because all units of 1 are off"


@pytest.mark.parametrize(("count", "bad"), [(3, True), (8, True), (16, False)])
def test_batch_norm_of_a_tiny_batch(count, bad):
    diagnosis = diagnosed(mlp(nn.ReLU, 2, norm=True), count)
    assert (words(diagnosis)["bn0"] == ("BN with tiny batch",)) == bad
    assert ("convert_sync_batch_norm" in str(diagnosis)) == bad
    cure = next((cure for cure in diagnosis.cures if cure.name == "batch statistics"), None)
    assert bad == (cure is not None and cure.line.startswith('gk.GroupNormAct(2, 16, act="relu")    # instead of bn0 and its activation'))
    frozen = mlp(nn.ReLU, 2, norm=True)
    frozen.bn0.eval()
    assert words(diagnosed(frozen, count))["bn0"] == ("healthy",)


def poisoned_weight():
    model = Net(F.relu)
    with torch.no_grad():
        model.body.weight[2, 3] = math.nan
    return model


@pytest.mark.parametrize(
    ("model", "origin", "line"),
    [
        (Net(torch.log), "log produced the first nan or inf, in or after layer body", "torch.log(x.clamp_min(1e-12))"),
        (
            Net(lambda z: torch.sqrt((z - z).square())),
            "SqrtBackward produced the first nan or inf, in the backward pass, at layer head or just before it",
            "torch.sqrt(x.clamp_min(1e-12))",
        ),
        (Net(lambda z: z / F.relu(z)), "div produced the first nan or inf, in or after layer body", "x / y.clamp_min(1e-12)"),
        (mlp(nn.ReLU, 40, std=100.0), "addmm produced the first nan or inf", "gk.init.apply_(model)"),
        (poisoned_weight(), "parameter body.weight already holds nan or inf", "model.load_state_dict"),
    ],
    ids=["log", "sqrt backward", "div", "growth", "weight"],
)
def test_non_finite_and_its_origin(model, origin, line):
    diagnosis = diagnosed(model)
    assert origin in diagnosis.origin
    assert diagnosis.cures[0].line.startswith(line)
    assert "non-finite" in next(iter(words(diagnosis).values()))
    assert diagnosis.origin in str(diagnosis)


def plus(value):
    """Cross entropy and a constant: every gradient is finite."""
    return lambda y, target: F.cross_entropy(y, target) + value


@pytest.mark.parametrize(
    ("loss_fn", "origin", "line"),
    [
        (plus(math.nan), "the code itself passes nan or inf to add, in the loss", "torch.finfo(x.dtype).min"),
        (lambda *_: plus(torch.tensor(math.inf))(*_), "the code itself passes nan or inf to tensor, in the", "torch.finfo("),
        (lambda *_: plus(-torch.zeros(()).log())(*_), "log produced the first nan or inf, in the loss", "torch.log(x.clamp_min"),
        (
            lambda y, target: F.cross_entropy(y, target * 0 - 100),
            "nll_loss_forward produced the first nan or inf, in the loss",
            "F.cross_entropy(y, tar",
        ),
        (
            lambda y, target: F.mse_loss(y[:0], y[:0]),
            "mse_loss of an empty tensor produced the first nan or inf, in the loss",
            "loss_fn(y, targets) if len(",
        ),
    ],
    ids=["number", "tensor", "log", "all targets ignored", "nothing selected"],
)
def test_a_loss_that_is_not_finite_comes_first_and_has_a_cure(loss_fn, origin, line):
    diagnosis = gk.diagnose(mlp(nn.ELU, 1), batch(), loss_fn)
    assert not math.isfinite(diagnosis.loss) and math.isfinite(diagnosis.total_norm)
    first, second, *_ = str(diagnosis).splitlines()
    assert re.match("Sequential: the loss is (nan|inf); every gradient is finite: ", first)
    assert second == diagnosis.origin and origin in second
    assert [cure.name for cure in diagnosis.cures] == ["arithmetic"] and diagnosis.cures[0].line.startswith(line)


def test_nan_from_the_loss_that_spreads():
    diagnosis = gk.diagnose(mlp(nn.ELU, 1), batch(), lambda y, target: F.cross_entropy(y, target) + y.sum().mul(0).log().mul(0))
    assert str(diagnosis).startswith("Sequential: the loss is nan; non-finite 2 of 2 layers\nlog produced the first nan")


class Summing(nn.Linear):
    """The sum of what a linear layer makes of each tensor of a dict."""

    def forward(self, input):
        return sum(map(super().forward, input["x"]))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize(
    ("bad", "line"),
    [
        (["inputs['x'][1]"], "inputs['x'][1].nan_to_num_()"),
        (["targets"], "targets = torch.nan_to_num(targets)"),
        (["inputs['x'][0]", "targets"], "inputs['x'][0].nan_to_num_(); targets = torch.nan_to_num(targets)"),
    ],
)
def test_a_batch_that_is_not_finite(bad, line, value):
    # One storage, so that the storage alone does not say which of them is not finite.
    parts = torch.randn(3, 8, 4).unbind()
    inputs, targets = {"x": parts[:2], "unused": torch.full((2,), math.nan)}, parts[2]
    names = {"inputs": inputs, "targets": targets, "torch": torch}
    for name in bad:
        eval(name, names)[0, 0] = value
    diagnosis = gk.diagnose(Summing(4, 4), (inputs, targets), F.mse_loss)
    assert diagnosis.origin == f"the batch itself holds nan or inf, in {', '.join(bad)}"
    assert diagnosis.cures[0].line.startswith(f"{line}    #")
    exec(diagnosis.cures[0].line, names)
    assert all(x.isfinite().all() for x in (*names["inputs"]["x"], names["targets"]))


MINUS_INFINITY = torch.eye(WIDTH).log()


class Masked(Net):
    """A buffer with -inf. The function gets the model."""

    def __init__(self, function):
        super().__init__(function)
        self.register_buffer("mask", MINUS_INFINITY[:1].roll(1))

    def forward(self, x):
        return self.head(self.function(self, self.body(x)))


HARMLESS = {
    "filled": lambda model, z: torch.softmax(z.masked_fill(z > z.mean(), -math.inf), 1),
    "from a buffer": lambda model, z: torch.softmax(z[:, 1:2] * 0 + model.mask, 1) + z,
    "from elsewhere": lambda model, z: torch.softmax(z + MINUS_INFINITY[:1], 1) + z,
    "computed": lambda model, z: torch.softmax(z + torch.log((z.detach() < z.max()).float()), 1),
    "not selected": lambda model, z: torch.where(z < 99, z, torch.log(torch.zeros_like(z))),
    "overwritten": lambda model, z: z + torch.log(torch.zeros_like(z)).zero_(),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_infinities_that_reach_neither_loss_nor_gradients_are_not_mentioned(name):
    diagnosis = diagnosed(Masked(HARMLESS[name]))
    assert diagnosis.origin is None and diagnosis.cures == []
    assert not re.search("inf|nan|non-finite", str(diagnosis))


@pytest.mark.parametrize("name", HARMLESS)
def test_the_origin_is_that_of_values_which_reach_the_loss(name):
    diagnosis = diagnosed(Masked(lambda model, z: torch.sqrt(HARMLESS[name](model, z) - 99)))
    assert diagnosis.origin == "sqrt produced the first nan or inf, in or after layer body"


@pytest.mark.parametrize(
    ("function", "made"),
    [
        (
            lambda model, z: torch.softmax(z.masked_fill(z < 99, -math.inf), 1),
            "_softmax produced the first nan or inf, in or after layer body",
        ),
        (lambda model, z: torch.softmax(z + torch.zeros(WIDTH).log(), 1), "log produced the first nan or inf, in or after layer body"),
        (lambda model, z: torch.softmax(z + model.mask[:, :1], 1), "buffer mask already holds nan or inf"),
        (lambda model, z: z.log_().sqrt_(), "log produced the first nan or inf, in or after layer body"),
        (lambda model, z: gk.elu(z.log(), inplace=True).exp(), "log produced the first nan or inf, in or after layer body"),
        (
            lambda model, z: (z * (z > 0)).log().nan_to_num(neginf=0),
            "LogBackward produced the first nan or inf, in the backward pass, at layer head",
        ),
    ],
    ids=["all masked", "all masked by log", "all masked by a buffer", "in place", "our own in place", "backward"],
)
def test_where_infinities_turn_to_nan(function, made):
    assert made in diagnosed(Masked(function)).origin


def test_never_called_and_without_influence():
    model = Net(F.relu)
    model.idle = nn.Linear(2, 2)
    model.cut = nn.Linear(WIDTH, WIDTH)
    model.function = lambda z: z + model.cut(z).detach()
    diagnosis = diagnosed(model)
    reasons = {each.name: each.why for each in diagnosis.layers}
    assert words(diagnosis)["idle"] == words(diagnosis)["cut"] == ("no gradient",)
    assert reasons["idle"] == "never called" and reasons["cut"] == "the loss does not depend on it"


def test_a_head_of_zeros_is_the_reason_why_no_layer_before_it_learns():
    model = mlp(nn.ReLU, 2)
    nn.init.zeros_(model.head.weight)
    diagnosis = diagnosed(model)
    assert words(diagnosis) == {"linear0": ("vanishing",), "linear1": ("vanishing",), "head": ("badly initialised",)}
    assert diagnosis.layers[0].why == "gradient exactly 0 until the first step, because all weights of head are 0"
    assert [cure.name for cure in diagnosis.cures] == ["initialisation"]
    for layer in (model.linear0, model.linear1):
        layer.requires_grad_(False)
    assert words(diagnosed(model)) == {"head": ("healthy",)}, "no layer before it learns"


def test_initialisation_is_not_a_cure_for_layers_that_it_does_not_change():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.RNN(WIDTH, WIDTH, nonlinearity="relu"), nn.Linear(WIDTH, CLASSES)
            nn.init.normal_(self.rnn.weight_hh_l0, std=0.6)

        def forward(self, x):
            return self.head(self.rnn(x.expand(60, -1, -1))[0][-1])

    diagnosis = diagnosed(Recurrent())
    assert "exploding" in words(diagnosis)["rnn"]
    assert diagnosis.cures[0].name == "clipping"


def test_a_model_that_computes_with_copies_of_its_parameters_is_refused():
    class Copies(Net):
        def forward(self, x):
            return F.linear(x, self.body.weight.detach().requires_grad_())

    with pytest.raises(
        RuntimeError, match=r"does not depend on any parameter of the model itself\. .* has to be diagnosed before it is wrapped"
    ):
        diagnosed(Copies(None))


class TwoHeads(nn.Module):
    """An auxiliary head that runs before or after the layers that it skips."""

    def __init__(self, last):
        super().__init__()
        self.body, self.deep = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.main, self.auxiliary, self.last = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES), last

    def forward(self, x):
        z = F.relu(self.body(x))
        aside = None if self.last else self.auxiliary(z)
        y = self.main(F.relu(self.deep(z)))
        return y, self.auxiliary(z) if self.last else aside


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("share", [1e-6, 1.0])
def test_an_auxiliary_head_does_not_change_the_verdicts_on_other_layers(last, share):
    def loss_fn(y, target):
        return F.cross_entropy(y[0], target) + share * F.cross_entropy(y[1], target)

    diagnosis = gk.diagnose(TwoHeads(last), batch(), loss_fn)
    assert set(words(diagnosis).values()) == {("healthy",)}, str(diagnosis)
    behind = {each.name: [layer.name for layer in each.layer.layers_after] for each in diagnosis.layers}
    assert behind["deep"] == ["main"] and behind["main"] == behind["auxiliary"] == []
    assert sorted(behind["body"]) == ["auxiliary", "deep", "main"]
    if share < 1:
        assert f"is {diagnosis.first_to_last():.3g} times that of the last, main" in str(diagnosis)


def test_a_gradient_that_vanishes_on_one_of_two_paths():
    model = TwoHeads(True)
    nn.init.constant_(model.main.weight, 1e-6)
    nn.init.normal_(model.main.weight, std=1e-6)
    diagnosis = gk.diagnose(model, batch(), lambda y, target: F.cross_entropy(y[0], target) + F.cross_entropy(y[1], target))
    assert words(diagnosis)["deep"] == ("vanishing",)
    assert [name for name, each in words(diagnosis).items() if each == ("healthy",)] == ["body", "main", "auxiliary"]


def layers_with_skip(model, *shape):
    x = torch.randn(8, *(shape or (WIDTH,)))
    return [each.name for each in gk.diagnose(model, (x, None), lambda y, _: y.square().mean()).layers if each.layer.has_skip]


class Paths(nn.Module):
    """Four layers that a function connects."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda m, x: m.d(m.c(m.b(m.a(x)))), ""),
        (lambda m, x: m.d((z := m.a(x)) + m.c(m.b(z))), "bc"),
        (lambda m, x: m.d(m.c(m.b(z := m.a(x))) + z), "bc"),
        (lambda m, x: m.d(m.b(z := m.a(x)) * m.c(z)), "bc"),
        (lambda m, x: m.d(x + m.c(m.b(m.a(x)))), ""),
        (lambda m, x: (z := m.a(x)) + m.d(m.c(m.b(z))), "bcd"),
        (lambda m, x: m.d(m.b(z := m.a(x)) + m.c(z.detach())), ""),
        (lambda m, x: m.d(torch.cat([m.b(z := m.a(x))[:, :8], (z + m.c(z))[:, 8:]], 1)), "bc"),
        (lambda m, x: m.d(m.c(m.b(m.a(m.b(m.a(x)))))), ""),
        (lambda m, x: m.d(m.b(m.a(x) + m.b(m.a(x) + m.b(m.a(x))))), ""),
        (lambda m, x: m.d(m.a(x) + m.b(m.a(x) + m.b(m.a(x)))), "b"),
        (lambda m, x: m.d(m.a(x)[:, :8] @ m.b(m.a(x))[:8, :8].mT @ m.c.weight[:8]), "b"),
    ],
)
def test_which_layers_a_gradient_skips(function, found):
    assert "".join(layers_with_skip(Paths(function))) == found


def test_the_graph_with_repeated_calls_a_tied_weight_and_a_parameter_of_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.recur, self.head = nn.Embedding(8, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
            self.head.weight = self.words.weight
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            h = self.words(x[:, 0]) * self.scale
            for step in range(1, x.shape[1]):
                h = torch.tanh(self.recur(h) + self.words(x[:, step]))
            return self.head(h)

    diagnosis = gk.diagnose(Model(), (torch.randint(8, (64, 5)), torch.randint(8, (64,))), F.cross_entropy)
    behind = {each.name: [layer.name for layer in each.layer.layers_after] for each in diagnosis.layers}
    # The scale comes after the first word only.
    assert behind == {"(model)": ["recur", "head"], "words": ["recur", "head"], "recur": ["head"], "head": []}
    assert diagnosis.layers[0].layer.output_std is None


def judged(**figures):
    """The verdicts on a layer with these figures, before a last layer with a gradient and a weight of 1."""
    module = nn.Module()
    last = Layer("last", module, called=1, gradient=1.0, weight=1.0)
    first = Layer("first", module, called=1, gradient=1.0, weight=1.0, layers_after=[last])
    loss = figures.pop("loss", 1.0)
    for name, value in figures.items():
        setattr(first, name, value)
    return verdicts.verdicts(Probe([first, last], loss, total_norm=1.0))[0].verdicts


@pytest.mark.parametrize(
    ("below", "above", "verdict"),
    [
        ({"gradient": 1.01e-3}, {"gradient": 0.99e-3}, "vanishing"),
        ({"gradient": 1.0, "weight": 0.99e7}, {"gradient": 1.0, "weight": 1.01e7}, "vanishing"),
        ({"gradient": 99.0}, {"gradient": 101.0}, "exploding"),
        ({"gradient": 999.0, "weight": 1e6}, {"gradient": 1001.0, "weight": 1e6}, "exploding"),
        ({"dead": 0.66, "samples": 16, "act": "relu"}, {"dead": 0.67, "samples": 16, "act": "relu"}, "dead"),
        ({"dead": 1.0, "samples": 15, "act": "relu"}, {"dead": 1.0, "samples": 16, "act": "relu"}, "dead"),
        ({"saturated": 0.5, "act": "tanh"}, {"saturated": 0.51, "act": "tanh"}, "saturated"),
        ({"batch": (4, 16), "batch_statistics": True}, {"batch": (3, 1000), "batch_statistics": True}, "BN with tiny batch"),
        ({"batch": (4, 16), "batch_statistics": True}, {"batch": (15, 15), "batch_statistics": True}, "BN with tiny batch"),
        ({"batch": (1, 1)}, {"batch": (1, 1), "batch_statistics": True}, "BN with tiny batch"),
        ({"finite": False}, {"finite": False, "loss": math.nan}, "non-finite"),
        ({"nonfinite": 0}, {"nonfinite": 1}, "non-finite"),
    ],
)
def test_thresholds(below, above, verdict):
    assert judged(**below) == ("healthy",)
    assert judged(**above) == (verdict,)


def scaled(linear, std, *, act="relu", head=False, has_skip=False, normalised=False):
    """The verdicts on a linear layer with weights of this standard deviation."""
    nn.init.normal_(linear.weight, std=std)
    last = Layer("last", nn.Module(), called=1, gradient=1.0, weight=1.0)
    layer = Layer("layer", linear, called=1, gradient=1.0, weight=1.0, act=act, normalised=normalised)
    layer.growth, layer.layers_after = linear.out_features / linear.in_features, [] if head else [last]
    layer.has_skip = has_skip
    return verdicts.verdicts(Probe([layer, last], 1.0, 1.0))[0].verdicts


@pytest.mark.parametrize(("scale", "bad"), [(0.2, True), (0.26, False), (2.4, False), (2.6, True)])
@pytest.mark.parametrize("act", ["relu", "swish", "tanh", None])
def test_threshold_of_the_scale_of_weights(scale, bad, act):
    linear = nn.Linear(400, 400)
    std = scale * expected_std(linear, act)
    assert scaled(linear, std, act=act) == (("badly initialised",) if bad else ("healthy",))
    assert scaled(linear, std, act=act, normalised=True) == ("healthy",)
    assert scaled(linear, std, act=act, head=True) == (("badly initialised",) if scale > 2.5 else ("healthy",)), "no layer follows a head"
    assert scaled(linear, std, act=act, has_skip=True) == (("badly initialised",) if scale > 2.5 else ("healthy",)), (
        "the signal takes the skip connection"
    )


@pytest.mark.parametrize("sizes", [(64, 1024), (1024, 64), (256, 256)])
def test_a_weight_is_bad_only_if_neither_the_signal_nor_its_gradient_keeps_its_size(sizes):
    linear = nn.Linear(*sizes)
    for fan in sizes:
        keeps = math.sqrt(2 / fan)
        assert scaled(linear, keeps) == ("healthy",)
    assert scaled(linear, 0.2 * math.sqrt(2 / max(sizes))) == ("badly initialised",)
    assert scaled(linear, 2.7 * math.sqrt(2 / min(sizes))) == ("badly initialised",)


def test_a_scale_that_a_later_normalisation_cancels_is_not_bad():
    def build(act):
        model = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), act, nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)
        )
        for module in (model[0], model[2]):
            nn.init.normal_(module.weight, std=0.01)
        return model

    assert words(diagnosed(build(nn.LeakyReLU())))["0"] == ("healthy",)
    assert words(diagnosed(build(nn.Tanh())))["0"] == ("badly initialised",)


@pytest.mark.parametrize("around", [True, False])
def test_small_weights_are_healthy_if_the_signal_skips_them(around):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.back = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
            nn.init.normal_(self.back.weight, std=0.001)

        def forward(self, x):
            return x * around + self.back(F.relu(self.wide(x))) if around else self.back(F.relu(self.wide(x)))

    diagnosis = diagnosed(nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), nn.Linear(WIDTH, CLASSES)))
    assert ("badly initialised" in words(diagnosis)["1.back"]) != around


SCHEMES = {
    "torch's own": lambda weight: nn.init.kaiming_uniform_(weight, a=math.sqrt(5)),
    "He, fan in": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "He, fan out": lambda weight: nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu"),
    "Xavier": nn.init.xavier_uniform_,
    "Xavier with a gain": lambda weight: nn.init.xavier_normal_(weight, nn.init.calculate_gain("relu")),
    "LeCun": lambda weight: gk.init.lecun_normal_(weight),
    "orthogonal": nn.init.orthogonal_,
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.GELU])
def test_known_schemes_are_healthy_in_every_shape(scheme, act):
    weights = [nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 16, 3, stride=2), nn.ConvTranspose2d(16, 8, 4, 2)]
    weights += [nn.Linear(8 * 8 * 8, 16), nn.Linear(16, 200)]
    model = nn.Sequential(*[layer for weight in weights for layer in (weight, act())], nn.Linear(200, 10))
    model.insert(6, nn.Flatten())
    for module in model[:-1]:
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            SCHEMES[scheme](module.weight)
    diagnosis = gk.diagnose(model, (torch.randn(16, 3, 8, 8), torch.randint(10, (16,))), F.cross_entropy)
    assert "badly initialised" not in diagnosis.counts(), str(diagnosis)


# Cures


def test_the_line_of_code_runs_and_cures():
    model, namespace = mlp(nn.Sigmoid), {"gk": gk}
    namespace["model"] = model
    before = diagnosed(model)
    exec(before.cures[0].line, namespace)
    assert isinstance(model.act0, gk.ELU)
    for number in range(1, 12):
        setattr(model, f"act{number}", gk.ELU())
    exec(before.cures[1].line, namespace)
    assert set(words(diagnosed(model)).values()) == {("healthy",)}


def test_a_numbered_module_is_written_with_an_index():
    model = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(WIDTH, WIDTH), nn.Sigmoid())], nn.Linear(WIDTH, CLASSES))
    line = diagnosed(model).cures[0].line
    assert line.startswith("model[1] = gk.ELU()")
    exec(line, {"gk": gk, "model": model})
    assert isinstance(model[1], gk.ELU)


@pytest.mark.parametrize(
    "operator",
    [
        *("log", "SqrtBackward", "LinalgVectorNormBackward", "div", "reciprocal", "exp", "pow", "addmm"),
        *("_softmax", "nll_loss_forward", "mse_loss", "mean", "StdBackward", "var"),
    ],
)
def test_every_line_that_fixes_an_operator_runs(operator):
    line = cures.fix_line(operator)
    names = {"torch": torch, "F": F, "x": torch.tensor([-1.0, 0.0, 2.0]), "p": 0.5, "gk": gk, "model": nn.Linear(2, 2)}
    names |= {"y": torch.zeros(2, 3), "targets": torch.full((2,), -100), "mask": torch.ones(3).bool(), "loss_fn": F.cross_entropy}
    if operator == "mse_loss":
        names |= {"y": torch.zeros(0, 3), "targets": torch.zeros(0)}
    result = eval(line, names)
    assert not isinstance(result, torch.Tensor) or bool(result.isfinite().all())


def enormous(y, _):
    """A loss with which every gradient explodes."""
    return 1e9 * y.square().mean()


def normalisation(diagnosis):
    return next((cure for cure in diagnosis.cures if cure.name.endswith(" norm")), None)


def test_batch_norm_is_not_recommended_after_the_output_layer():
    cure = normalisation(gk.diagnose(mlp(nn.LeakyReLU, 2), batch(), enormous))
    assert cure.name == "batch norm" and "after linear0" in cure.line
    only_the_head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    diagnosis = gk.diagnose(only_the_head, batch(), enormous)
    assert "exploding" in diagnosis.counts() and diagnosis.cures and normalisation(diagnosis) is None


@pytest.mark.parametrize("count", [2, 16])
def test_batch_norm_is_not_recommended_for_a_tiny_batch_nor_for_sequences(count):
    images = nn.Sequential(nn.Conv2d(3, 24, 3), nn.LeakyReLU(), nn.Conv2d(24, 8, 3), nn.Flatten(), nn.Linear(32, CLASSES))
    linears = mlp(nn.LeakyReLU, 2)
    sequences = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(), nn.Flatten(), nn.Linear(5 * WIDTH, CLASSES))
    for model, shape, few, many in (
        (images, (3, 6, 6), 'gk.GroupNormAct(8, 24, act="leaky_relu")', 'gk.BatchNormAct2d(24, act="leaky_relu")'),
        (linears, (WIDTH,), 'gk.GroupNormAct(2, 16, act="leaky_relu")', 'gk.BatchNormAct1d(16, act="leaky_relu")'),
        (sequences, (5, WIDTH), "nn.LayerNorm(16)", "nn.LayerNorm(16)"),
    ):
        x = torch.randn(count, *shape)
        diagnosis = gk.diagnose(model, (x, None), enormous)
        cure = normalisation(diagnosis)
        assert cure.line.startswith(few if count == 2 else many), str(diagnosis)
        assert (cure.name == "batch norm") == cure.line.startswith("gk.BatchNormAct")
        assert (cure.name == "group norm") == cure.line.startswith("gk.GroupNormAct")
        y = diagnosis.layers[0].layer.module(x)
        assert eval(cure.line, {"nn": nn, "gk": gk})(y).shape == y.shape


def test_residual_connections_are_not_recommended_to_a_model_that_has_them():
    class Residual(nn.Module):
        def __init__(self, skip):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(12))
            self.head, self.skip = nn.Linear(WIDTH, CLASSES), skip

        def forward(self, x):
            for layer in self.layers:
                y = 1e-3 * torch.sigmoid(layer(x))
                x = x + y if self.skip else y
            return self.head(x * 1e4)

    names = {skip: [cure.name for cure in diagnosed(Residual(skip)).cures] for skip in (False, True)}
    assert "residual connections" in names[False] and names[True] and "residual connections" not in names[True]


def test_an_activation_after_the_output_layer_belongs_to_the_loss():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(), nn.Linear(WIDTH, 1), nn.Sigmoid())
    nn.init.constant_(model[2].bias, -20.0)
    data = torch.randn(64, WIDTH), torch.ones(64, 1)
    diagnosis = gk.diagnose(model, data, F.binary_cross_entropy)
    assert words(diagnosis)["2"][0] == "saturated"
    lines = {cure.name: cure.line for cure in diagnosis.cures}
    assert "activation" not in lines and lines["loss"].startswith("F.binary_cross_entropy_with_logits(")
    model[3] = nn.Tanh()
    assert "without tanh" in {cure.name: cure.line for cure in gk.diagnose(model, data, F.mse_loss).cures}["loss"]


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.LSTMCell])
def test_gates_are_not_activations(cell):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = cell(WIDTH, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            y, *_ = self.cell(x)
            return F.relu(self.head(y))

    model = Gated()
    for weight in model.cell.parameters():
        nn.init.normal_(weight, std=20)
    first, last = diagnosed(model).layers
    assert first.layer.act is None and "saturated" not in first.verdicts
    assert last.layer.act == "relu"


class Gate(Net):
    """Squeeze and excitation: a sigmoid is multiplied by the value that it was computed from."""

    def __init__(self, gate):
        super().__init__(None)
        self.squeeze, self.gate = nn.Linear(WIDTH, WIDTH), gate
        nn.init.constant_(self.squeeze.bias, -20.0)

    def forward(self, x):
        z = self.body(x)
        return self.head(z * self.gate(self.squeeze(z)))


@pytest.mark.parametrize("gate", [torch.sigmoid, F.hardsigmoid, nn.Sigmoid()])
def test_a_shut_gate_is_not_a_saturated_activation(gate):
    diagnosis = diagnosed(Gate(gate))
    assert "saturated" not in words(diagnosis)["squeeze"]
    assert "vanishing" in words(diagnosis)["squeeze"] and "activation" not in [cure.name for cure in diagnosis.cures]


def test_a_sigmoid_before_dropout_is_not_a_gate():
    model = Net(lambda z: F.dropout(torch.sigmoid(20 * z), 0.1))
    assert words(diagnosed(model))["body"] == ("saturated",)


@pytest.mark.parametrize(
    ("module", "gradient", "verdict"),
    [(nn.BatchNorm1d(4), 1.01e-7, "healthy"), (nn.BatchNorm1d(4), 0.99e-7, "vanishing"), (nn.Embedding(4, 4), 0.99e-3, "vanishing")],
)
def test_the_gradient_of_a_normalisation_is_not_compared_with_those_of_weights(module, gradient, verdict):
    last = Layer("last", nn.Identity(), called=1, gradient=1.0, weight=1.0)
    layer = Layer("layer", module, called=1, gradient=gradient, weight=1.0, layers_after=[last])
    assert verdicts.verdicts(Probe([layer, last], 1.0, 1.0))[0].verdicts == (verdict,)


def test_gates_written_out_are_not_activations():
    class Cell(Net):
        def forward(self, x):
            opened, value = self.body(x).chunk(2, dim=1)
            return self.head(torch.cat([torch.sigmoid(opened) * torch.tanh(value)] * 2, dim=1))

    model = Cell(None)
    nn.init.normal_(model.body.weight, std=20)
    assert "saturated" not in words(diagnosed(model))["body"]


@pytest.mark.parametrize("largest", [1.01, 1.49, 1.5, 1.99, 2.01, 7.0, 9.99, 123.0])
def test_a_suggested_learning_rate_is_rounded_down(largest):
    layer = Layer("layer", nn.Module(), called=1, gradient=largest, weight=1.0)
    rate = cures.learning_rate(verdicts.verdicts(Probe([layer], 1.0, 1.0)))
    assert 0.5 * cures.LARGEST_UPDATE < rate * largest <= cures.LARGEST_UPDATE
    assert float(f"{rate:.0e}") == rate == float(f"{rate:g}")


def test_the_learning_rate_shown_is_the_one_that_was_tried():
    diagnosis = diagnosed(mlp(nn.LeakyReLU, std=6), apply=True)
    line = next(cure.line for cure in diagnosis.cures if cure.name == "learning rate")
    assert 1e-4 < float(re.search(r"lr=(.*)\)", line).group(1)) < 1, "with clipping, which stands above it"
    (shown,) = re.findall(r"lr=(.*)\)", "".join(diagnosis.applied))
    after = diagnosis.after
    step = float(shown) * min(1 / after.total_norm, 1)
    changes = [step * each.layer.gradient / each.layer.weight for each in after.layers]
    assert 0.5 * cures.LARGEST_UPDATE < max(changes) <= cures.LARGEST_UPDATE


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        (lambda model: threading.Lock(), "TypeError, cannot pickle '_thread.lock' object"),
        (lambda model: model.linear0.weight * 2, "RuntimeError, Only Tensors created explicitly by the user"),
        (lambda model: (each for each in ()), "TypeError, cannot pickle 'generator' object"),
    ],
    ids=["lock", "tensor with a graph", "generator"],
)
def test_a_model_that_cannot_be_copied_is_still_diagnosed(attribute, said):
    model = mlp(nn.LeakyReLU, std=6)
    model.extra = attribute(model)
    diagnosis = diagnosed(model, apply=True)
    assert diagnosis.after is None and "exploding" in diagnosis.counts()
    last = str(diagnosis).splitlines()[-1]
    assert last.startswith(f"the safe cures were not tried, because Sequential cannot be copied: {said}") and len(last) < 250


def test_apply_shows_before_and_after_and_leaves_the_model():
    model = mlp(nn.LeakyReLU, std=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    diagnosis = diagnosed(model, apply=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(words(diagnosis.after).values()) == {("healthy",)}
    assert diagnosis.after.total_norm < 1e3 < diagnosis.total_norm
    assert diagnosis.after.loss_after_step < diagnosis.after.loss
    text = str(diagnosis)
    for part in (
        "the safe cures, applied to a copy",
        "before",
        "after",
        "gk.init.apply_(model): he_normal_ for 12",
        "clip_grad_norm_",
        "lr=",
    ):
        assert part in text


def test_apply_takes_a_step_also_without_grad_mode_and_in_evaluation():
    model = mlp(nn.LeakyReLU, std=6).eval()
    data = batch()
    with torch.inference_mode():
        diagnosis = gk.diagnose(model, data, F.cross_entropy, apply=True)
    assert diagnosis.after.loss_after_step < diagnosis.after.loss
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_an_activation_that_is_flat_on_one_side_is_replaced_by_another():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ELU(), nn.Linear(WIDTH, CLASSES))
    nn.init.constant_(model[0].bias, -20.0)
    line = next(cure.line for cure in diagnosed(model).cures if cure.name == "activation")
    assert line.startswith("model[1] = gk.LeakyReLU()")


def test_apply_without_a_safe_cure_says_so():
    diagnosis = diagnosed(Net(torch.log), apply=True)
    assert diagnosis.after is None
    assert "none of the cures is safe to try" in str(diagnosis)
    assert "safe" not in str(diagnosed(mlp(nn.ELU, norm=True), apply=True))


# The model stays as it was


class Noisy(nn.Module):
    """Batch norm, dropout, and buffers that forward replaces and writes. It raises where `fail` says."""

    def __init__(self, fail):
        super().__init__()
        self.body, self.bn, self.drop, self.head = nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, CLASSES)
        self.frozen = nn.BatchNorm1d(8).eval()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("nothing", None)
        self.fail = fail

    def forward(self, x):
        y = self.frozen(self.drop(self.bn(self.body(x))))
        self.count += 1
        self.mean = y.detach().mean(0)
        self.features = y
        if self.fail == "forward":
            raise ZeroDivisionError
        return self.head(y)


def snapshot(model):
    """Everything that must not change. Gradients and buffers are compared by identity and by value."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    hook_kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "identity": {name: id(value) for name, value in {**tensors, **grads}.items()},
        "values": {name: value.detach().clone().tolist() for name, value in tensors.items()},
        "gradients": {name: None if grad is None else grad.clone().tolist() for name, grad in grads.items()},
        "versions": [parameter._version for parameter in model.parameters()],
        "attributes": [set(module.__dict__) for module in model.modules()],
        "flags": [module.training for module in model.modules()],
        "hooks": [dict(getattr(module, kind)) for module in model.modules() for kind in hook_kinds],
        "tensor hooks": [parameter._backward_hooks for parameter in model.parameters()],
        "random numbers": torch.get_rng_state().tolist(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), len(torch.overrides._get_current_function_mode_stack())),
    }


@pytest.mark.parametrize("apply", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fail", ["nowhere", "forward", "loss"])
def test_everything_is_as_it_was(fail, training, apply):
    model = Noisy(fail).train(training)
    model.frozen.eval()
    nn.init.constant_(model.body.weight, 0.01)
    model.head.weight.grad = torch.randn_like(model.head.weight)
    accumulated = []
    model.body.weight.register_post_accumulate_grad_hook(accumulated.append)
    before = snapshot(model)

    def loss_fn(y, target):
        if fail == "loss":
            raise ZeroDivisionError
        return F.cross_entropy(y, target)

    data = batch()
    before["random numbers"] = torch.get_rng_state().tolist()
    try:
        with torch.no_grad():
            gk.diagnose(model, data, loss_fn, apply=apply)
    except ZeroDivisionError:
        assert fail != "nowhere"
    else:
        assert fail == "nowhere"
    after = snapshot(model)
    for part, value in before.items():
        assert after[part] == value, part
    assert accumulated == []
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


class Writing(nn.Module):
    """Its forward writes all that a forward may write: weights, the batch, generators of random numbers."""

    def __init__(self, fail):
        super().__init__()
        self.words, self.head, self.fail = nn.Embedding(8, WIDTH, max_norm=0.1), nn.Linear(WIDTH, CLASSES), fail
        self.register_buffer("lost", torch.full((2,), math.nan))

    def forward(self, x):
        y = self.words(x) + random.random() + float(numpy.random.rand()) + torch.rand(())
        with torch.no_grad():
            self.head.weight.clamp_(-0.1, 0.1)
        torch.autograd.backward(self.head(y).sum())
        x.zero_()
        if self.fail:
            raise ZeroDivisionError
        return self.head(y.detach() * self.words.weight.mean())


@pytest.mark.parametrize("apply", [False, True])
@pytest.mark.parametrize("fail", [False, True])
def test_what_a_forward_writes_is_as_it_was(fail, apply):
    model = Writing(fail)
    nn.init.constant_(model.head.bias, 1.0)
    model.words.weight.grad = torch.ones_like(model.words.weight)
    x, target = torch.randint(1, 8, (64,)), torch.randint(CLASSES, (64,))
    kept = x.clone()
    before = snapshot(model)
    generators = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
    expectation = pytest.raises(ZeroDivisionError) if fail else contextlib.nullcontext()
    with expectation:
        gk.diagnose(model, (x, target), F.cross_entropy, apply=apply)
    after = snapshot(model)
    for part in ("identity", "gradients", "attributes", "flags"):
        assert after[part] == before[part], part
    assert str(after["values"]) == str(before["values"])
    assert torch.equal(x, kept)
    assert (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()) == generators
    assert model.lost._version == 0, "a nan that stays nan is not written"


def test_numpy_is_not_imported_to_keep_its_random_numbers():
    program = """
import sys
sys.modules["numpy"] = None
import torch, gradkernels as gk
print(gk.diagnose(torch.nn.Linear(2, 2), (torch.ones(4, 2), torch.zeros(4).long()), torch.nn.functional.cross_entropy).headline())
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout == "healthy 1 of 1 layers\n"


def test_a_model_in_evaluation_is_observed_in_training_mode_and_frozen_parts_stay_frozen():
    model = Noisy("nowhere")
    model.frozen.eval()
    seen = {}
    model.bn.register_forward_hook(lambda module, *_: seen.update(bn=module.training))
    model.frozen.register_forward_hook(lambda module, *_: seen.update(frozen=module.training))
    diagnosed(model)
    assert seen == {"bn": True, "frozen": False}
    diagnosed(model.eval())
    assert seen == {"bn": True, "frozen": True}


def test_a_module_that_returns_its_parameter_keeps_no_hook():
    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(WIDTH))

        def forward(self):
            return self.weight

    model = Net(F.relu)
    model.position = Position()
    model.function = lambda z: F.relu(z + model.position())
    assert words(diagnosed(model))["position"] == ("healthy",)
    assert not model.position.weight._backward_hooks


@pytest.mark.parametrize("wrap", ["compile", "DistributedDataParallel"])
def test_wrapped_models(wrap, request):
    model = mlp(nn.Sigmoid)
    if wrap == "compile":
        diagnosis = diagnosed(torch.compile(model, backend="eager"))
    else:
        request.getfixturevalue("process_group")
        diagnosis = diagnosed(nn.parallel.DistributedDataParallel(model))
    assert words(diagnosis)["linear0"] == ("vanishing",)
    assert diagnosis.layers[0].layer.act == "sigmoid"


def test_figures_are_those_of_the_step():
    model = mlp(nn.Tanh, 2)
    data = batch()
    diagnosis = gk.diagnose(model, data, F.cross_entropy)
    loss = F.cross_entropy(model(data[0]), data[1])
    loss.backward()
    assert diagnosis.loss == loss.item()
    for each in diagnosis.layers:
        module = model.get_submodule(each.name)
        expected = torch.cat([parameter.grad.flatten().double() for parameter in module.parameters()]).norm().item()
        assert each.figures()["gradient_norm"] == pytest.approx(expected, rel=1e-7)
    total = torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()]).norm().item()
    assert diagnosis.total_norm == pytest.approx(total, rel=1e-7)


def test_sparse_and_16_bit_gradients():
    model = nn.Sequential(nn.EmbeddingBag(10, WIDTH, sparse=True), nn.Linear(WIDTH, CLASSES))
    diagnosis = gk.diagnose(model, (torch.randint(10, (64, 3)), torch.randint(CLASSES, (64,))), F.cross_entropy)
    assert set(words(diagnosis).values()) == {("healthy",)}
    x, target = batch()
    assert gk.diagnose(mlp(nn.ELU, 2).bfloat16(), (x.bfloat16(), target), F.cross_entropy).counts() == {"healthy": 3}


# The report


def test_picture_and_dict(tmp_path):
    diagnosis = diagnosed(mlp(nn.Sigmoid), apply=True)
    diagnosis.plot(tmp_path / "diagnosis.png")
    image = imread(tmp_path / "diagnosis.png")[..., :3]
    width = image.shape[1]
    for panel in (image[:, : width // 2], image[:, width * 3 // 5 :]):
        assert (panel.min(axis=2) < 0.6).mean() > 0.005
    found = json.loads(json.dumps(diagnosis.to_dict()))
    assert found["layers"][0]["verdicts"] == ["vanishing"] and found["cures"][0]["name"] == "activation"
    assert found["after"]["layers"][-1]["name"] == "head"
    diagnosed(mlp(nn.ReLU, 40, std=100.0)).plot(tmp_path / "nan.png")
    assert imread(tmp_path / "nan.png").size


@pytest.mark.parametrize(
    ("model", "arguments", "error", "said"),
    [
        (nn.ReLU(), (batch(), F.cross_entropy), ValueError, "ReLU has no parameters that require a gradient: there is nothing to diagnose"),
        (nn.LazyLinear(3), (batch(), F.cross_entropy), ValueError, "LazyLinear has parameters without a shape: run it on a batch first"),
        (nn.Linear, (batch(), F.cross_entropy), TypeError, "model must be a torch.nn.Module, not the class Linear"),
        ([mlp(nn.ReLU, 1)], (batch(), F.cross_entropy), TypeError, "model must be a torch.nn.Module, not list"),
        (mlp(nn.ReLU, 1).to("meta"), (batch(), F.cross_entropy), ValueError, "has parameters without values, on the meta device"),
        (mlp(nn.ReLU, 1), (torch.randn(2, 3), F.cross_entropy), TypeError, r"batch must be a pair \(inputs, targets\), .*, not Tensor"),
        (mlp(nn.ReLU, 1), (3, F.cross_entropy), TypeError, "batch must be a pair .*, not int"),
        (mlp(nn.ReLU, 1), ((*batch(), 1), F.cross_entropy), ValueError, "batch must be a pair .*, not a tuple of 3"),
        (
            mlp(nn.ReLU, 1),
            ((1.5, 2), F.cross_entropy),
            TypeError,
            "the inputs in batch must be a tensor, or something that holds tensors, not float",
        ),
        (mlp(nn.ReLU, 1), ((None, 2), F.cross_entropy), TypeError, "not NoneType"),
        (mlp(nn.ReLU, 1), (batch(0), F.cross_entropy), ValueError, r"batch is empty: its inputs have the shape \(0, 16\)"),
        (mlp(nn.ReLU, 1), (batch(), 1.5), TypeError, "loss_fn must be a function of the model's outputs and the targets, not float"),
        (mlp(nn.ReLU, 1), (batch(), nn.CrossEntropyLoss), TypeError, "not the class CrossEntropyLoss"),
        (mlp(nn.ReLU, 1), (batch(), lambda y, target: y.sum().item()), TypeError, "loss_fn returned float, not a tensor"),
        (mlp(nn.ReLU, 1), (batch(), lambda y, target: (y.sum(), y)), TypeError, "loss_fn returned tuple, not a tensor"),
        (mlp(nn.ReLU, 1), (batch(), lambda y, target: y.sum().long()), TypeError, "a tensor of torch.int64, not a real"),
        (mlp(nn.ReLU, 1), (batch(), lambda y, target: y.sum() * 1j), TypeError, "a tensor of torch.complex64, not a real"),
        (mlp(nn.ReLU, 1), (batch(), lambda y, target: y), ValueError, r"of shape \(64, 4\), not one number: take its mean"),
        (mlp(nn.ReLU, 1), (batch(), lambda y, target: y.sum().detach()), RuntimeError, "does not depend on any parameter"),
    ],
)
def test_wrong_arguments_are_explained(model, arguments, error, said):
    with pytest.raises(error, match=said):
        gk.diagnose(model, *arguments)


@pytest.mark.parametrize("look", [lambda model: gk.diagnose(model, batch(), F.cross_entropy), gk.GradientMonitor, gk.init.apply_])
def test_scripted_modules_and_other_objects_are_refused(look):
    scripted = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, CLASSES)))
    with pytest.raises(TypeError, match=r"^model is a torch.jit.ScriptModule, .* pass the module it was made from"):
        look(scripted)
    with pytest.raises(TypeError, match=r"^1 is a torch.jit.ScriptModule"):
        look(nn.Sequential(nn.Linear(WIDTH, WIDTH), scripted))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not the class Linear"):
        look(nn.Linear)


def test_an_empty_batch_is_refused_before_the_model_runs_and_an_empty_part_is_accepted():
    model, ran = mlp(nn.ReLU, 1), []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match="batch is empty"):
        gk.diagnose(model, batch(0), F.cross_entropy)
    assert not ran
    x, target = batch()
    pairs = Net(F.relu)
    pairs.function = lambda x: x
    pairs.forward = lambda both: Net.forward(pairs, both[0])
    assert gk.diagnose(pairs, ((x, x[:0]), target), F.cross_entropy).counts() == {"healthy": 2}


def test_the_docstring_has_every_verdict():
    table = [line[8:27].strip() for line in gk.diagnose.__doc__.splitlines() if re.match(" {8}[a-zB]", line)]
    assert set(verdicts.VERDICTS) <= set(table)


def test_the_docstring_has_the_figure_of_every_threshold():
    numbers = {float(Fraction(number)) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?(?:/\d+)?", gk.diagnose.__doc__)}
    figures = {name: value for name, value in vars(thresholds).items() if name.isupper()}
    assert len(figures) == 13
    assert {name for name, value in figures.items() if value not in numbers} == set()


USERS_MODULE = """
import torch
from torch import nn

def vanishing():
    return nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.Sigmoid())], nn.Linear(16, 4))

def data():
    return torch.randn(32, 16), torch.randint(4, (32,))

def summed(outputs, targets):
    return outputs.square().sum()

def elementwise(outputs, targets):
    return outputs - targets

def one_output():
    return nn.Linear(16, 1)

def two_outputs():
    model = nn.Linear(16, 4)
    model.register_forward_hook(lambda module, args, y: (y, y))
    return model

def no_parameters():
    return nn.ReLU()

def double():
    return nn.Linear(16, 4).double()

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)
    def forward(self, x):
        return self.layer(x)

def wants(argument):
    return nn.Linear(2, 2)

def fails():
    raise LookupError("no such weights")

not_a_model = list
three = 3
"""


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    (tmp_path / "users_module.py").write_text(USERS_MODULE)
    (tmp_path / "importing.py").write_text("import absent")
    (tmp_path / "broken.py").write_text("def model(:")
    (tmp_path / "raising.py").write_text("1 / 0")
    torch.save((torch.randn(32, 16), torch.randint(4, (32,))), tmp_path / "batch.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_module", raising=False)
    return tmp_path


def test_command_line(users_folder):
    command = [sys.executable, "-m", "gradkernels", "diagnose", "users_module:vanishing", "--batch", "users_module:data", "--apply"]
    environment = {"PYTHONPATH": f"{users_folder}:{gk.__path__[0]}/..", "PATH": ""}
    process = subprocess.run(command, cwd=users_folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert "vanishing" in process.stdout and "cures" in process.stdout and "applied to a copy" in process.stdout
    assert process.stdout.endswith("wrote diagnosis.png\n")
    assert imread(users_folder / "diagnosis.png").size


@pytest.mark.parametrize(
    ("wanted", "loss"),
    [("64,16", "cross_entropy"), ("64,16", "mse_loss"), ("batch.pt", "cross_entropy"), ("users_module:data", "users_module:summed")],
)
def test_command_line_batches_and_losses(users_folder, capsys, wanted, loss):
    arguments = ["users_module:vanishing", "--batch", wanted, "--loss", loss, "--output", "here.svg"]
    assert command.main(arguments) == 0
    assert "vanishing" in capsys.readouterr().out
    assert (users_folder / "here.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["users_module", "--batch", "2,16"], "'users_module' is not of the form MODULE:NAME"),
        (["users_module:absent", "--batch", "2,16"], "users_module:absent was not found"),
        (["no_such_module:model", "--batch", "2,16"], "no_such_module:model was not found: No module named 'no_such_module'"),
        (["users_module:not_a_model", "--batch", "2,16"], "returned list, not a torch.nn.Module"),
        (["users_module:vanishing", "--batch", "users_module:vanishing"], "does not hold a pair"),
        (["users_module:vanishing", "--batch", "2,16", "--loss", "no_loss"], "torch.nn.functional has no no_loss"),
        (["users_module:vanishing", "--batch", "2,16", "--output", "missing/x.png"], "there is no folder missing"),
        (["users_module:vanishing"], "--batch"),
        (["users_module:three", "--batch", "2,16"], "users_module:three is int, which cannot be called"),
        (
            ["users_module:wants", "--batch", "2,16"],
            "users_module:wants() failed: TypeError: wants() missing 1 required positional argument",
        ),
        (["users_module:no_parameters", "--batch", "2,16"], "ReLU has no parameters that require a gradient"),
        (["importing:model", "--batch", "2,16"], "importing:model was not found: No module named 'absent'"),
        (["broken:model", "--batch", "2,16"], "broken cannot be imported: SyntaxError: "),
        (["users_module:vanishing:x", "--batch", "2,16"], "'users_module:vanishing:x' is not of the form MODULE:NAME"),
        (
            ["users_module:vanishing", "--batch", "absent.pt"],
            "--batch absent.pt is not a size such as 32,3,224,224, not an existing file, and not",
        ),
        (["users_module:vanishing", "--batch", "2,,16"], "--batch 2,,16 is not a size"),
        (["users_module:vanishing", "--batch", "2,-16"], "--batch 2,-16 is not a size"),
        (
            ["users_module:vanishing", "--batch", "99999999999999999999,8"],
            "torch cannot make a tensor of the size --batch 99999999999999999999,8: ",
        ),
        (
            ["users_module:vanishing", "--batch", "10000000,1000000"],
            "torch cannot make a tensor of the size --batch 10000000,1000000: RuntimeError",
        ),
        (["users_module:vanishing", "--batch", f"{'9' * 5000}"], "torch cannot make a tensor of the size --batch 999"),
        (["users_module:vanishing", "--batch", "x" * 300], "is not a size such as 32,3,224,224, not an existing file, and not"),
        (["users_module:vanishing", "--batch", "2,16", "--output", f"{'x' * 300}/x.png"], "there is no folder xxx"),
        (["users_module:vanishing", "--batch", "0,16"], "batch is empty: its inputs have the shape (0, 16)"),
        (
            ["users_module:vanishing", "--batch", "users_module.py"],
            "torch.load(weights_only=True) cannot read tensors from users_module.py",
        ),
        (
            ["users_module:vanishing", "--batch", "2,17"],
            "with the loss cross_entropy: RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        ),
        (
            ["users_module:vanishing", "--batch", "2,16", "--loss", "users_module:data"],
            "with the loss users_module:data: TypeError: data() takes",
        ),
        (
            ["users_module:vanishing", "--batch", "2,16", "--loss", "users_module:elementwise"],
            "loss_fn returned a tensor of shape (2, 4), not one number",
        ),
        (["users_module:vanishing", "--batch", "2,16", "--output", "x.doc"], "--output x.doc does not end in .png, .pdf, .svg"),
        (["users_module:one_output", "--batch", "2,16"], "cross_entropy needs scores of two or more classes, not outputs of the shape"),
        (["users_module:two_outputs", "--batch", "2,16"], "the model returned tuple"),
    ],
)
def test_command_line_explains_wrong_arguments(users_folder, capsys, arguments, said):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    usage, _, words = capsys.readouterr().err.partition("python -m gradkernels diagnose: error: ")
    assert usage.startswith("usage: ") and said in words and words.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words", "line"),
    [
        (["users_module:fails", "--batch", "2,16"], "users_module:fails() failed: LookupError: no such weights", "raise LookupError"),
        (["users_module:vanishing", "--batch", "users_module:fails"], "users_module:fails() failed: LookupError", "raise LookupError"),
        (["raising:model", "--batch", "2,16"], "raising cannot be imported: ZeroDivisionError: division by zero", "1 / 0"),
        (["users_module:Deep", "--batch", "2,16"], "users_module:Deep does not run on the batch 2,16 with", "return self.layer(x)"),
    ],
)
def test_command_line_shows_the_users_code_alone_in_a_traceback(users_folder, capsys, arguments, words, line):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    first, *traceback = capsys.readouterr().err.partition("error: ")[2].splitlines()
    assert first.startswith(words)
    assert any(line in each for each in traceback)
    files = {each for each in traceback if each.startswith("  File")}
    assert len(files) == 1 and str(users_folder) in files.pop()


def test_command_line_draws_numbers_in_the_dtype_of_the_model(users_folder, capsys):
    assert command.main(["users_module:double", "--batch", "64,16"]) == 0


def test_command_line_without_matplotlib(users_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command.main(["users_module:vanishing", "--batch", "64,16"]) == 0
    out = capsys.readouterr().out
    assert "vanishing" in out and "no picture: a picture needs matplotlib: pip install matplotlib" in out


def test_progress_is_one_line_in_a_terminal_and_nothing_in_a_log(users_folder, capsys, monkeypatch):
    command.main(["users_module:vanishing", "--batch", "64,16"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    command.main(["users_module:vanishing", "--batch", "64,16"])
    err = capsys.readouterr().err
    assert "forward and backward" in err and "\n" not in err and err.endswith("\x1b[K")


def test_importing_the_package_imports_nothing_to_draw_with():
    program = "import sys, gradkernels; print(sorted({'matplotlib', 'rich', 'sklearn', 'torch._dynamo'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
