"""Gains against closed forms, torch and 50 random layers; fills against torch; which layer gets which.

After random weights the second moment varies: over 50 layers of 512 relu units by a factor of 2 (one standard
deviation). A gain that is wrong by 3 % makes a factor of 19.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.prune import l1_unstructured

import gradkernels as gk
from examples import cures
from gradkernels.init.following import activation_of

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
    "celu": (ALPHA, lambda z: F.celu(z, ALPHA)),
    "softplus": (BETA, lambda z: F.softplus(z, BETA)),
    "logsigmoid": (None, F.logsigmoid),
    "hardsigmoid": (None, F.hardsigmoid),
    "softsign": (None, F.softsign),
    "tanhshrink": (None, F.tanhshrink),
    "hardtanh": ((-0.5, 2.0), lambda z: F.hardtanh(z, -0.5, 2.0)),
    "softshrink": (0.3, lambda z: F.softshrink(z, 0.3)),
    "hardshrink": (0.3, lambda z: F.hardshrink(z, 0.3)),
    "glu": (None, lambda z: z * torch.sigmoid(torch.randn_like(z))),
}
# After these a small deviation from 1 grows from layer to layer.
UNSTABLE = ("swish", "gelu", "mish", "hardswish", "tanhshrink", "softshrink", "hardshrink")


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
        # The signal is scaled back to 1 after each layer.
        if name in UNSTABLE:
            moment = z.square().mean(1, keepdim=True)
            grown += moment.log().mean().item()
            z /= moment.sqrt()
    assert 1 / 10 < math.exp(grown) * z.square().mean().item() < 10


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose3d", "relu", "leaky_relu"])
def test_gain_equals_torchs(name):
    assert gk.init.calculate_gain(name) == pytest.approx(nn.init.calculate_gain(name), rel=1e-15)
    assert gk.init.calculate_gain("leaky_relu", 0.3) == pytest.approx(nn.init.calculate_gain("leaky_relu", 0.3), rel=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 5.0])
def test_gain_of_elu_in_closed_form(alpha):
    half = math.exp(2) * normal_cdf(-2) - 2 * math.exp(0.5) * normal_cdf(-1) + 0.5
    assert gk.init.calculate_gain("elu", alpha) == pytest.approx((0.5 + alpha**2 * half) ** -0.5, rel=1e-13)


@pytest.mark.parametrize(("beta", "gain"), [(0.0, 2.0), (1e9, math.sqrt(2)), (-1e9, math.sqrt(2))])
def test_gain_of_swish_at_the_ends_of_beta(beta, gain):
    assert gk.init.calculate_gain("swish", beta) == pytest.approx(gain, rel=1e-9)


def test_gain_of_the_rest_by_sampling():
    z = torch.randn(1_000_000, dtype=torch.float64)
    for name in {*FUNCTIONS} - {"rrelu"}:
        param, f = FUNCTIONS[name]
        assert gk.init.calculate_gain(name, param) == pytest.approx(f(z).square().mean().item() ** -0.5, rel=5e-3)
    assert gk.init.calculate_gain("selu") == pytest.approx(1, abs=1e-7), "selu is defined by this"
    slopes = torch.empty_like(z).uniform_(-0.5, 0.9)
    assert gk.init.calculate_gain("rrelu", (-0.5, 0.9)) == pytest.approx(
        torch.where(z > 0, z, slopes * z).square().mean().item() ** -0.5, rel=3e-3
    )


@pytest.mark.parametrize("low", [0.01, 1.0, 3.0])
def test_gain_of_hardtanh_in_closed_form(low):
    """E[f(z)^2] is the part between the corners plus the tails."""
    density = math.exp(-low * low / 2) / math.sqrt(2 * math.pi)
    moment = 2 * (normal_cdf(low) - 0.5 - low * density) + 2 * low * low * normal_cdf(-low)
    assert gk.init.calculate_gain("hardtanh", (-low, low)) == pytest.approx(moment**-0.5, rel=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        ("softmax",),
        ("hardtanh", 1.0),
        ("elu", (1.0, 1.0)),
        ("elu", float("nan")),
        ("elu", math.inf),
        ("celu", 0.0),
        ("elu", 10**400),
        ("leaky_relu", 1j),
        ("leaky_relu", "0.1"),
        ("leaky_relu", torch.ones(2)),
        ("swish", torch.ones(2, 1)),
        ("rrelu", (1.0,)),
    ],
)
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
def test_fills_refuse_vectors_as_torch_does_and_accept_empty_weights(function):
    with pytest.raises(ValueError, match="fewer than 2 dimensions"):
        function(torch.zeros(3))
    assert function(torch.zeros(0, 3)).shape == (0, 3)


# whole models


def schemes(report):
    return {each.name: (each.scheme, each.activation) for each in report.layers}


class Mixed(nn.Module):
    """Activations as modules and functions, in place, shared, after batch norm and additions, and fused."""

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
def test_the_report_matches_the_weights(scheme):
    model = nn.Sequential(nn.Linear(600, 400), nn.Tanh(), nn.Linear(400, 500), gk.PReLU(init=0.5), nn.Conv2d(500, 200, 1, bias=False))
    for each in gk.init.apply_(model, scheme).layers:
        weight = model.get_submodule(each.name).weight
        assert weight.std().item() == pytest.approx(each.std, rel=0.01)
        assert scheme in ("auto", each.scheme.rstrip("_"))
        if "uniform" in each.scheme:
            assert weight.abs().max() <= math.sqrt(3) * each.std * (1 + 1e-6)


def test_a_generator_makes_it_repeatable_and_keeps_torchs_default_generator():
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


class Applied(nn.Module):
    """A layer, and an activation after it."""

    def __init__(self, act):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.act = act

    def forward(self, x):
        return self.act(self.layer(x))


FORMS = [
    *[(kind(), getattr(F, name), name) for name, kind in (("relu6", nn.ReLU6), ("gelu", nn.GELU), ("mish", nn.Mish), ("glu", nn.GLU))],
    *[(kind(), getattr(F, name), name) for name, kind in (("hardswish", nn.Hardswish), ("hardsigmoid", nn.Hardsigmoid))],
    *[(kind(), getattr(F, name), name) for name, kind in (("logsigmoid", nn.LogSigmoid), ("tanhshrink", nn.Tanhshrink))],
    *[(kind(), getattr(F, name), name) for name, kind in (("softsign", nn.Softsign), ("selu", nn.SELU), ("relu", nn.ReLU))],
    (nn.SiLU(), lambda x: F.silu(x, False), "swish(1)"),
    (nn.CELU(0.5), lambda x: F.celu(x, alpha=0.5), "celu(0.5)"),
    (nn.ELU(0.5), lambda x: F.elu_(x, 0.5), "elu(0.5)"),
    (nn.Softplus(2.0), lambda x: F.softplus(x, 2.0), "softplus(2)"),
    (nn.Hardtanh(-2, 3), lambda x: F.hardtanh(x, -2, max_val=3), "hardtanh(-2, 3)"),
    (nn.Hardshrink(0.2), lambda x: x.hardshrink(0.2), "hardshrink(0.2)"),
    (nn.Softshrink(0.2), lambda x: F.softshrink(x, 0.2), "softshrink(0.2)"),
    (nn.RReLU(0.1, 0.2), lambda x: F.rrelu(x, 0.1, upper=0.2), "rrelu(0.1, 0.2)"),
    (nn.ReLU(), lambda x: x.relu_(), "relu"),
    (nn.ReLU(), lambda x: x.clamp(min=0), "relu"),
    (nn.ReLU(), lambda x: torch.clamp_min(x, 0), "relu"),
    (nn.Hardtanh(0, 6), lambda x: x.clamp(0, 6), "hardtanh(0, 6)"),
    (nn.Sigmoid(), lambda x: x.sigmoid(), "sigmoid"),
    (nn.Tanh(), lambda x: x.tanh(), "tanh"),
    (nn.Mish(), lambda x: x * F.softplus(x).tanh(), "mish"),
    (nn.Hardswish(), lambda x: F.hardsigmoid(x) * x, "hardswish"),
]


@pytest.mark.parametrize("place", range(len(FORMS)), ids=[f"{name} {place}" for place, (_, _, name) in enumerate(FORMS)])
def test_an_activation_is_found_as_module_function_and_method(place):
    module, function, name = FORMS[place]
    for act in (module, function):
        (found,) = gk.init.apply_(Applied(act)).layers
        assert (found.activation, found.reason) == (name, "by tracing")
        assert found.gain in (1, pytest.approx(gk.init.calculate_gain(*activation_of(module))))


def test_slopes_of_a_function_are_read_from_the_parameter():
    class Learnt(Applied):
        def __init__(self):
            super().__init__(nn.Identity())
            self.slope = nn.Parameter(torch.tensor([0.5]))

        def forward(self, x):
            return F.prelu(self.layer(x), self.slope)

    assert schemes(gk.init.apply_(Learnt())) == {"layer": ("he_normal_", "prelu(0.5)")}


def test_other_uses_of_clamp_are_not_activations():
    assert schemes(gk.init.apply_(Applied(lambda x: x.clamp(max=1.0)))) == {"layer": ("lecun_normal_", "nothing")}


def test_a_module_that_only_has_the_name_of_an_activation_is_traced():
    class Tanh(nn.Module):
        def forward(self, x):
            return F.relu(x)

    assert schemes(gk.init.apply_(Applied(Tanh()))) == {"layer": ("he_normal_", "relu")}


class Branching(nn.Module):
    """A forward that cannot be traced, around a block that can."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(), nn.ELU()), nn.Linear(4, 4), nn.Tanh())
        self.first = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.act = nn.SiLU()
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.act(self.norm(self.first(self.block(x))))) if x.sum() > 0 else x


def test_the_order_of_modules_decides_where_tracing_fails_and_the_report_says_so():
    report = gk.init.apply_(Branching())
    assert {each.name: each.activation for each in report.layers} == {
        "block.0": "elu(1)",
        "block.2": "tanh",
        "first": "swish(1)",
        "last": "nothing",
    }
    reasons = {each.name: each.reason for each in report.layers}
    assert reasons["block.0"] == reasons["block.2"] == "by tracing"
    because = "because Branching cannot be traced (symbolically traced variables cannot be used as inputs to control flow)"
    assert reasons["first"] == reasons["last"] == f"by the order of modules, {because}"
    assert str(report).endswith(f"? by the order of modules, {because}: first, last\nnot changed, LayerNorm: norm")
    assert any(line.split()[0] == "first" and line.endswith("swish(1) ?") for line in str(report).splitlines())
    assert any(line.split()[0] == "block.0" and line.endswith("elu(1)") for line in str(report).splitlines())


class Functional(nn.Module):
    """Activations that the order of modules does not show, after a branch."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.head = (nn.Linear(300, 300) for _ in range(4))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if x.mean() < 9:
            x = F.relu(self.second(x))
        return self.head(F.relu(self.third(x)))


def test_a_hidden_layer_without_a_known_activation_is_assumed_to_be_followed_by_relu():
    model = Functional()
    report = gk.init.apply_(model)
    assert schemes(report) == {
        "first": ("xavier_uniform_", "tanh"),
        "second": ("he_normal_", "relu"),
        "third": ("he_normal_", "relu"),
        "head": ("lecun_normal_", "nothing"),
    }
    assert [each.reason.partition(",")[0] for each in report.layers] == ["by tracing", "assumed", "assumed", "by the order of modules"]
    assert model.second.weight.std().item() == pytest.approx(math.sqrt(2 / 300), rel=0.02)


def test_an_untraceable_module_is_kept_whole_in_a_traceable_one():
    model = nn.Sequential(nn.Linear(4, 300), Functional(), nn.Linear(300, 4), nn.Sigmoid(), nn.Linear(4, 4))
    found = {each.name: (each.activation, each.reason.partition(",")[0]) for each in gk.init.apply_(model).layers}
    assert found == {
        "0": ("relu", "assumed"),
        "1.first": ("tanh", "by tracing"),
        "1.second": ("relu", "assumed"),
        "1.third": ("relu", "assumed"),
        "1.head": ("relu", "assumed"),
        "2": ("sigmoid", "by tracing"),
        "4": ("nothing", "by tracing"),
    }


def test_the_activation_of_a_layer_that_the_forward_does_not_reach_is_guessed():
    class Spare(Applied):
        def __init__(self):
            super().__init__(nn.Tanh())
            self.spare, self.other = nn.Linear(4, 4), nn.ELU()

    found = {each.name: (each.activation, each.reason) for each in gk.init.apply_(Spare()).layers}
    assert found["layer"] == ("tanh", "by tracing")
    assert found["spare"] == ("elu(1)", "by the order of modules, because the forward does not reach it")


def test_modules_of_this_project_are_traced():
    model = nn.Sequential(cures.Residual(nn.Sequential(nn.Linear(4, 4), gk.BatchNormAct1d(4, act="identity"), gk.ELU())), nn.Linear(4, 4))
    assert schemes(gk.init.apply_(model)) == {"0.branch.0": ("he_normal_", "elu(1)"), "1": ("lecun_normal_", "nothing")}


@pytest.mark.slow
def test_a_compiled_model_is_initialised_like_the_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    found = gk.init.apply_(torch.compile(model, backend="eager")).layers
    assert [(each.name, each.activation, each.reason) for each in found] == [("0", "tanh", "by tracing"), ("2", "nothing", "by tracing")]


def test_tracing_does_not_change_the_model():
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


def test_modules_that_must_not_be_initialised_are_kept_with_a_reason():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "tied": nn.Linear(4, 5, bias=False),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "pruned": l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
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
    assert {name for name, _ in report.kept} == set(model) - {"twin"}
    assert dict(report.kept)["own"] == "Linear, tied to twin"
    changed = {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == {"twin", "own"}
    assert dict(report.kept)["pruned"] == "Linear whose weight is not a parameter"
    for word in ("tied to an embedding", "frozen", "parametrization", "no shape before its first batch", "MultiheadAttention: attention"):
        assert word in str(report)


def test_weights_that_share_memory_are_written_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Embedding(4, 4), nn.Linear(4, 4))
    model[2].weight = nn.Parameter(model[0].weight.data)
    model[5].weight = nn.Parameter(model[4].weight.data)
    embedding = model[4].weight.clone()
    report = gk.init.apply_(model)
    assert schemes(report) == {"0": ("xavier_uniform_", "tanh")}
    assert model[0].weight.abs().max() <= math.sqrt(3) * report.layers[0].std
    assert torch.equal(model[4].weight, embedding)
    assert {"2": "Linear, tied to 0", "5": "Linear, tied to an embedding"}.items() <= dict(report.kept).items()


def test_a_frozen_bias_is_kept_and_reported():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    for layer in (model[0], model[2]):
        nn.init.constant_(layer.bias, 0.5)
    model[2].bias.requires_grad_(False)
    report = gk.init.apply_(model)
    assert not model[0].bias.any()
    assert (model[2].bias == 0.5).all()
    assert report.kept == [("2.bias", "frozen")]
    assert str(report).endswith("not changed, frozen: 2.bias")
    alone = nn.Linear(4, 4)
    alone.bias.requires_grad_(False)
    assert gk.init.apply_(alone).kept == [("bias", "frozen")]


def test_errors_name_their_reason():
    with pytest.raises(ValueError, match=r"scheme must be one of 'auto', 'xavier_uniform'.*not 'best'"):
        gk.init.apply_(nn.Linear(2, 2), scheme="best")
    with pytest.raises(ValueError, match=r"ReLU has no linear or convolutional layer to initialise"):
        gk.init.apply_(nn.ReLU())
    with pytest.raises(ValueError, match=r"Sequential has no .* layer to initialise; 0, Linear, frozen"):
        gk.init.apply_(nn.Sequential(nn.Linear(2, 2).requires_grad_(False)))
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.CELU(0.0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^0\.0 is not a valid parameter of celu$"):
        gk.init.apply_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_shared_layer_gets_the_activation_of_any_of_its_calls():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(F.relu(self.layer(x)))

    assert schemes(gk.init.apply_(Shared())) == {"layer": ("he_normal_", "relu")}
