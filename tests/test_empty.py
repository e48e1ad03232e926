"""Models whose parameters have no elements, have no gradient or are frozen, and models without parameters.

Parameters without elements change no result of the others. If a model is refused, nothing in it is written.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import gradkernels as gk
from gradkernels import _native

# torch's constructors warn about layers without elements.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")


class LowRank(nn.Module):
    """A layer with a low-rank update. The rank may be 0; None leaves the update out."""

    def __init__(self, rank, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.rank = rank
        if rank is not None:
            self.down, self.up = nn.Linear(6, rank, bias=bias), nn.Linear(rank, 6, bias=bias)
            self.table, self.scales = nn.Embedding(0, 4), nn.Parameter(torch.ones(0, 3))
            if bias:
                nn.init.ones_(self.up.bias)

    def forward(self, x):
        y = torch.relu(self.body(x))
        return self.head(y if self.rank is None else y + self.up(torch.relu(self.down(x))))


def batch():
    torch.manual_seed(1)
    return torch.randn(20, 6) * 10, torch.randint(2, (20,))


def with_gradients(model):
    x, targets = batch()
    F.cross_entropy(model(x), targets).backward()
    return model


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "RMSprop": lambda parameters: gk.optim.RMSprop(parameters, momentum=0.9, centered=True, max_norm=0.1),
}


@pytest.mark.parametrize("library", ["native", "reference"])
def test_clipping_ignores_an_update_of_rank_0(library, monkeypatch):
    if library == "reference":
        monkeypatch.setattr(_native, "C", None)
    for clip in (
        lambda model: gk.clip_grad_norm_(model, 0.01),
        lambda model: gk.clip_grad_norm_(model, 0.01, 3.0),
        lambda model: gk.clip_grad_value_(model, 0.01),
        gk.adaptive_clip_grad_,
        lambda model: gk.clip_grads_with_norm_(model, 0.01, torch.tensor(3.0)),
        lambda model: gk.get_total_norm([each.grad for each in model.parameters() if each.grad is not None]),
        lambda model: gk.grad_report(model).clip_(0.01),
    ):
        found, wanted = with_gradients(LowRank(0)), with_gradients(LowRank(None))
        assert_close(clip(found), clip(wanted), rtol=0, atol=0)
        grads = dict(found.named_parameters())
        for name, parameter in wanted.named_parameters():
            assert_close(grads[name].grad, parameter.grad, rtol=0, atol=0)
    report = gk.grad_report(with_gradients(LowRank(0)))
    figures = dict(
        zip(report.names, zip(report.norms.tolist(), report.max_abs.tolist(), report.nonfinite.tolist(), strict=True), strict=True)
    )
    assert figures["down.weight"] == figures["up.weight"] == (0, 0, 0)
    assert report.first_nonfinite() is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_ignores_an_update_of_rank_0(name):
    trained = []
    for rank in (0, None):
        model = LowRank(rank)
        optimizer = OPTIMIZERS[name](model.parameters())
        handle = gk.attach_clipping(optimizer, 0.1)
        with gk.GradientMonitor(model, activations_every=1) as monitor:
            for _ in range(3):
                optimizer.zero_grad()
                with_gradients(model)
                optimizer.step()
        record = monitor.to_dict()
        assert record["layers"] == ["body", "head"]
        assert "first layer, body," in monitor.table() and "of the last, head" in monitor.table()
        trained.append((model.body.weight, model.head.bias, handle.last_norm, record["gradient_norm"], record["update_ratio"]))
    assert_close(trained[0], trained[1], rtol=0, atol=0)


def test_monitor_of_an_update_of_rank_0(tmp_path):
    model = LowRank(0, bias=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gk.GradientMonitor(model) as monitor:
        with_gradients(model)
        optimizer.step()
    assert monitor.to_dict()["layers"] == ["body", "up", "head"], "the bias of up has elements"
    monitor.plot(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").stat().st_size > 0


@pytest.mark.parametrize("scheme", ["auto", "xavier_uniform", "he_normal", "lecun_normal"])
def test_initialisation_keeps_and_reports_empty_layers(scheme):
    model = LowRank(0, bias=True)
    report = gk.init.apply_(model, scheme)
    assert [layer.name for layer in report.layers] == ["body", "head"]
    assert dict(report.kept)["down"] == dict(report.kept)["up"] == "Linear without elements"
    assert (model.up.bias == 1).all() and not model.body.bias.any()
    assert not torch.equal(model.body.weight, LowRank(0).body.weight)
    with pytest.raises(ValueError, match="no linear or convolutional layer to initialise; Linear, Linear without elements"):
        gk.init.apply_(nn.Linear(0, 0))


@pytest.mark.parametrize(
    "conv", [lambda: nn.Conv2d(0, 3, 3), lambda: nn.ConvTranspose2d(3, 0, 2, stride=2), lambda: nn.ConvTranspose1d(0, 4, 1)]
)
def test_initialisation_skips_convolutions_without_channels(conv):
    model = nn.ModuleList([nn.Linear(3, 3), conv()])
    assert [layer.name for layer in gk.init.apply_(model).layers] == ["0"]


@pytest.mark.parametrize("bias", [False, True])
def test_diagnosis_ignores_layers_without_elements(bias):
    model = LowRank(0, bias)
    diagnosis = gk.diagnose(model, batch(), F.cross_entropy, apply=True)
    found = {layer.name: layer.verdicts for layer in diagnosis.layers}
    wanted = gk.diagnose(LowRank(None), batch(), F.cross_entropy)
    assert {name: found[name] for name in ("body", "head")} == {layer.name: layer.verdicts for layer in wanted.layers}
    assert {*found} == {"body", "head", *(["up"] if bias else [])}
    assert "nan" not in str(diagnosis).replace("nan or", "")
    assert diagnosis.layers[0].layer.dead == wanted.layers[0].layer.dead
    for module in (nn.Linear(6, 2).requires_grad_(False), nn.ReLU(), nn.Embedding(0, 3)):
        with pytest.raises(ValueError, match="has no parameters that require a gradient: there is nothing to diagnose"):
            gk.diagnose(module, batch(), F.cross_entropy)


def test_conversion_with_an_update_of_rank_0():
    model, x = LowRank(0), batch()[0]
    expected = model(x)
    report = gk.convert(model, check=x)
    assert_close(model(x), expected)
    gk.revert(model)
    assert_close(gk.fold(model)(x), expected)
    assert str(report)


# Without gradients, without parameters


NOTHING = {
    "an empty list": lambda: [],
    "a module without parameters": nn.ReLU,
    "no gradients": lambda: nn.Linear(3, 2),
    "all frozen": lambda: nn.Linear(3, 2).requires_grad_(False),
    "one parameter without a gradient": lambda: nn.Parameter(torch.ones(2)),
    "pairs without a gradient": lambda: [*nn.Linear(3, 2).named_parameters()],
}


@pytest.mark.parametrize("library", ["native", "reference"])
@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_clip(name, library, monkeypatch):
    if library == "reference":
        monkeypatch.setattr(_native, "C", None)
    nothing = NOTHING[name]()
    for norm_type in (1.0, 2.0, math.inf, 3.0):
        assert_close(gk.clip_grad_norm_(nothing, 1.0, norm_type, error_if_nonfinite=True), torch.tensor(0.0))
    for foreach in (None, True, False):
        assert gk.clip_grad_value_(nothing, 1.0, foreach) is None
        assert gk.clip_grads_with_norm_(nothing, 1.0, torch.tensor(2.0), foreach) is None
    report = gk.grad_report(nothing)
    assert report.total_norm == 0 and report.first_nonfinite() is None
    assert_close(report.clip_(1.0), torch.tensor(0.0, dtype=torch.float64))
    assert report.table().splitlines()[-1].split() == ["total", "0", "0", "0"]


def test_clip_grad_value_checks_its_arguments_without_gradients():
    for wrong in (lambda: gk.clip_grad_value_([], "much"), lambda: gk.clip_grad_value_([3], 1.0)):
        with pytest.raises((TypeError, ValueError)):
            wrong()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_without_gradients_and_then_with_one(name):
    model = LowRank(2)
    optimizer = OPTIMIZERS[name](model.parameters())
    handle = gk.attach_clipping(optimizer, 0.5)
    before = [each.detach().clone() for each in model.parameters()]
    with gk.GradientMonitor(model) as monitor:
        optimizer.step()
        assert_close([*model.parameters()], before, rtol=0, atol=0)
        assert handle.last_norm == 0
        model.head.weight.grad = torch.ones(2, 6)
        optimizer.step()
    assert_close(handle.last_norm, torch.tensor(math.sqrt(12)))
    none, some = monitor.to_dict()["gradient_norm"]
    assert none == [None] * 4 and [value is None for value in some].count(False) == 1
    assert "no layer has a gradient" in monitor.table(0)


# A refused model is unchanged


@pytest.mark.parametrize("scheme", ["auto", "xavier_normal"])
@pytest.mark.parametrize("last", [nn.LeakyReLU(math.nan), nn.ELU(math.inf)])
def test_an_activation_without_a_gain_leaves_the_model_as_it_was(last, scheme):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), last, nn.Linear(4, 2))
    before = [each.detach().clone() for each in model.parameters()]
    with pytest.raises(ValueError, match=r"no gain|not a valid parameter"):
        gk.init.apply_(model, scheme)
    assert_close([*model.parameters()], before, rtol=0, atol=0)


def test_initialisation_skips_a_dtype_without_random_numbers():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = nn.Parameter(model[2].weight.detach().to(torch.float8_e4m3fn))
    report = gk.init.apply_(model)
    assert [layer.name for layer in report.layers] == ["0"]
    assert dict(report.kept)["2"] == "Linear of torch.float8_e4m3fn, in which torch cannot draw random numbers"
