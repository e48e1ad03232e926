"""Gains against closed forms, torch's and 50 layers of random weights; fills against torch's; and which layers of a model get which.

The second moment behind finitely many random weights wanders: over 50 layers of 512 relu units by a factor of 2 (one deviation), where a
gain wrong by 3 % makes a factor of 19.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradkernels as gk

ALPHA, BETA = 0.7, 1.7

FUNCTIONS = {
    "linear": (None, lambda z: z),
    "relu": (None, F.relu),
    "relu6": (None, F.relu6),
    "leaky_relu": (0.2, lambda z: F.leaky_relu(z, 0.2)),
    "prelu": (0.4, lambda z: F.leaky_relu(z, 0.4)),
    "rrelu": ((0.1, 0.9), lambda z: F.rrelu(z, 0.1, 0.9, training=True)),
    "elu": (ALPHA, lambda z: F.elu(z, ALPHA)),
    "swish": (BETA, lambda z: z * torch.sigmoid(BETA * z)),
    "gelu": (None, F.gelu),
    "mish": (None, F.mish),
    "hardswish": (None, F.hardswish),
    "selu": (None, F.selu),
    "sigmoid": (None, torch.sigmoid),
    "tanh": (None, torch.tanh),
}


def normal_cdf(x):
    return math.erfc(-x / math.sqrt(2)) / 2


@pytest.fixture(scope="module")
def fifty_layers():
    return torch.randn(50, 512, 512, generator=torch.Generator().manual_seed(0)) / math.sqrt(512)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gain_keeps_the_second_moment_through_50_layers(name, fifty_layers):
    param, f = FUNCTIONS[name]
    gain = gk.init.calculate_gain(name, param)
    z, grown = torch.randn(32, 512), 0.0
    for weight in fifty_layers:
        z = f(z) @ (gain * weight)
        # Behind these a small deviation from 1 grows of itself, so each layer starts from 1.
        if name in ("swish", "gelu", "mish", "hardswish"):
            moment = z.square().mean(1, keepdim=True)
            grown += moment.log().mean().item()
            z /= moment.sqrt()
    assert 1 / 10 < math.exp(grown) * z.square().mean().item() < 10


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose3d", "relu", "leaky_relu"])
def test_gain_is_torchs_where_the_definition_is(name):
    assert gk.init.calculate_gain(name) == pytest.approx(nn.init.calculate_gain(name), rel=1e-15)
    assert gk.init.calculate_gain("leaky_relu", 0.3) == pytest.approx(nn.init.calculate_gain("leaky_relu", 0.3), rel=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 5.0])
def test_gain_of_elu_in_closed_form(alpha):
    half = math.exp(2) * normal_cdf(-2) - 2 * math.exp(0.5) * normal_cdf(-1) + 0.5
    assert gk.init.calculate_gain("elu", alpha) == pytest.approx((0.5 + alpha**2 * half) ** -0.5, rel=1e-13)


@pytest.mark.parametrize(("beta", "gain"), [(0.0, 2.0), (1e9, math.sqrt(2)), (-1e9, math.sqrt(2))])
def test_gain_of_swish_at_its_ends(beta, gain):
    assert gk.init.calculate_gain("swish", beta) == pytest.approx(gain, rel=1e-9)


def test_gain_of_the_rest_by_sampling():
    z = torch.randn(1_000_000, dtype=torch.float64)
    for name in ("gelu", "mish", "hardswish", "sigmoid", "tanh"):
        second_moment = FUNCTIONS[name][1](z).square().mean().item()
        assert gk.init.calculate_gain(name) == pytest.approx(second_moment**-0.5, rel=3e-3)
    assert gk.init.calculate_gain("selu") == pytest.approx(1, abs=1e-7), "selu is defined by this"
    slopes = torch.empty_like(z).uniform_(-0.5, 0.9)
    assert gk.init.calculate_gain("rrelu", (-0.5, 0.9)) == pytest.approx(
        torch.where(z > 0, z, slopes * z).square().mean().item() ** -0.5, rel=3e-3
    )


@pytest.mark.parametrize("arguments", [("softmax",), ("elu", float("nan")), ("elu", math.inf), ("leaky_relu", "steep"), ("rrelu", (1.0,))])
def test_gain_refuses(arguments):
    with pytest.raises(ValueError, match=arguments[0]):
        gk.init.calculate_gain(*arguments)


# fills


def filled(function, *arguments, shape=(12, 6, 3, 3), **keywords):
    return function(torch.empty(shape), *arguments, generator=torch.Generator().manual_seed(3), **keywords)


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
@pytest.mark.parametrize("keywords", [{}, {"a": 0.3}, {"mode": "fan_out"}, {"nonlinearity": "relu"}, {"nonlinearity": "linear"}])
def test_he_is_torchs_kaiming_to_the_bit(distribution, keywords):
    ours, torchs = getattr(gk.init, f"he_{distribution}_"), getattr(nn.init, f"kaiming_{distribution}_")
    assert torch.equal(filled(ours, **keywords), filled(torchs, **keywords))


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_lecun_and_he_for_elu_scale_the_same_numbers(distribution):
    he, lecun = getattr(gk.init, f"he_{distribution}_"), getattr(gk.init, f"lecun_{distribution}_")
    unit = filled(he, nonlinearity="linear") * math.sqrt(6 * 9)
    torch.testing.assert_close(filled(lecun), unit / math.sqrt(6 * 9))
    gain = gk.init.calculate_gain("elu", 0.5)
    torch.testing.assert_close(filled(he, 0.5, nonlinearity="elu"), gain * unit / math.sqrt(6 * 9))


@pytest.mark.parametrize("name", ["xavier_uniform_", "xavier_normal_"])
def test_xavier_is_torchs(name):
    assert torch.equal(filled(getattr(gk.init, name), 1.5), filled(getattr(nn.init, name), 1.5))


@pytest.mark.parametrize("function", [gk.init.he_normal_, gk.init.he_uniform_, gk.init.lecun_normal_, gk.init.lecun_uniform_])
def test_fills_refuse_vectors_in_torchs_words_and_leave_what_is_empty(function):
    with pytest.raises(ValueError, match="fewer than 2 dimensions"):
        function(torch.zeros(3))
    assert function(torch.zeros(0, 3)).shape == (0, 3)


# whole models


def schemes(report):
    return {each.name: (each.scheme, each.activation) for each in report.layers}


class Mixed(nn.Module):
    """Activations as modules, as functions, in place, shared, behind batch norm and an addition, fused, and written out."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.branch = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.fused = gk.BatchNormAct2d(8, act="elu", act_param=0.5)
        self.down = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=2)
        self.gated = nn.Linear(8, 8)
        self.squash = nn.Linear(8, 8)
        self.leaky = nn.Linear(8, 8)
        self.selu = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = self.relu(self.bn(self.stem(x)))
        y = self.fused(self.branch(y))
        y = self.relu(y + self.down(y))
        y = gk.elu(self.up(y), 0.25).mean((2, 3))
        z = self.gated(y)
        y = z * torch.sigmoid(z)
        y = self.squash(y).tanh_()
        y = F.leaky_relu(self.leaky(y), negative_slope=0.2)
        y = torch.selu(self.selu(y))
        return self.head(y)


def test_auto_follows_the_data():
    model = Mixed()
    report = gk.init.apply_(model)
    assert schemes(report) == {
        "stem": ("he_normal_", "relu"),
        "branch": ("he_normal_", "elu(0.5)"),
        "down": ("he_normal_", "relu"),
        "up": ("he_normal_", "elu(0.25)"),
        "gated": ("he_normal_", "swish(1)"),
        "squash": ("xavier_uniform_", "tanh"),
        "leaky": ("he_normal_", "leaky_relu(0.2)"),
        "selu": ("lecun_normal_", "selu"),
        "head": ("lecun_normal_", "nothing"),
    }
    assert [name for name, _ in report.kept] == ["bn", "fused"]
    assert all(not parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))
    model(torch.randn(2, 3, 8, 8)).sum().backward()


@pytest.mark.parametrize("scheme", ["auto", "xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "lecun_uniform", "lecun_normal"])
def test_what_is_reported_is_what_was_written(scheme):
    model = nn.Sequential(nn.Linear(600, 400), nn.Tanh(), nn.Linear(400, 500), gk.PReLU(init=0.5), nn.Conv2d(500, 200, 1, bias=False))
    for each in gk.init.apply_(model, scheme).layers:
        weight = model.get_submodule(each.name).weight
        assert weight.std().item() == pytest.approx(each.std, rel=0.01)
        assert scheme in ("auto", each.scheme.rstrip("_"))
        if "uniform" in each.scheme:
            assert weight.abs().max() <= math.sqrt(3) * each.std * (1 + 1e-6)


def test_generator_makes_it_repeatable_and_leaves_torchs_own_alone():
    state = torch.get_rng_state()
    models = [nn.Linear(5, 5), nn.Linear(5, 5)]
    torch.set_rng_state(state)
    for model in models:
        gk.init.apply_(model, generator=torch.Generator().manual_seed(1))
    assert torch.equal(models[0].weight, models[1].weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(4, 2, 1), (3, 1, 1), (4, 2, 4), (2, 2, 2)])
def test_a_transposed_convolution_keeps_the_second_moment(kernel, stride, groups):
    model = nn.ConvTranspose2d(64, 64, kernel, stride, groups=groups)
    gk.init.apply_(model)
    inner = model(torch.randn(4, 64, 24, 24))[..., 8:-8, 8:-8]
    assert inner.square().mean().item() == pytest.approx(1, rel=0.15)


class Branching(nn.Module):
    """Python that no tracer follows, around a block that can be traced."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(), nn.ELU()), nn.Linear(4, 4), nn.Tanh())
        self.first = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.act = nn.SiLU()
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.act(self.norm(self.first(self.block(x))))) if x.sum() > 0 else x


def test_order_of_modules_serves_where_tracing_cannot():
    activations = {each.name: each.activation for each in gk.init.apply_(Branching()).layers}
    assert activations == {"block.0": "elu(1)", "block.2": "tanh", "first": "swish(1)", "last": "nothing"}


def test_tracing_leaves_no_trace():
    class Storing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            self.calls += 1
            y = self.layer(x)
            self.mean = y.mean(0)
            self.features = y
            return torch.tanh(y)

    model = Storing().eval()
    before = dict(model.__dict__), dict(model.named_buffers())
    assert schemes(gk.init.apply_(model)) == {"layer": ("xavier_uniform_", "tanh")}
    assert dict(model.__dict__) == before[0]
    assert all(value is before[1][name] and not value.any() for name, value in model.named_buffers())


def test_what_is_not_its_own_to_set_is_kept_with_a_reason():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "tied": nn.Linear(4, 5, bias=False),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "lazy": nn.LazyLinear(3),
            "attention": nn.MultiheadAttention(4, 2),
            "encoder": nn.TransformerEncoderLayer(4, 2),
            "lstm": nn.LSTM(4, 4),
            "twin": nn.Linear(4, 4),
            "own": nn.Linear(4, 4),
        }
    )
    model["tied"].weight = model["embedding"].weight
    model["twin"].weight = model["own"].weight
    before = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("lazy")}
    report = gk.init.apply_(model)
    assert [each.name for each in report.layers] == ["twin"], "one weight is written once"
    assert {name for name, _ in report.kept} == set(model) - {"twin", "own"}
    changed = {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == {"twin", "own"}
    for word in ("tied to an embedding", "frozen", "parametrization", "no shape before its first batch", "MultiheadAttention: attention"):
        assert word in str(report)


def test_refusals_are_said_in_words():
    with pytest.raises(ValueError, match=r"scheme is one of 'auto', 'xavier_uniform'.*not 'best'"):
        gk.init.apply_(nn.Linear(2, 2), scheme="best")
    with pytest.raises(ValueError, match=r"ReLU has no linear or convolutional layer to initialise"):
        gk.init.apply_(nn.ReLU())
    with pytest.raises(ValueError, match=r"Sequential has no .* layer to initialise; 0, Linear, frozen"):
        gk.init.apply_(nn.Sequential(nn.Linear(2, 2).requires_grad_(False)))


def test_a_shared_layer_takes_the_activation_it_has_anywhere():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(F.relu(self.layer(x)))

    assert schemes(gk.init.apply_(Shared())) == {"layer": ("he_normal_", "relu")}
