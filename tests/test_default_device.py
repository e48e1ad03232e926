"""Results of CPU tensors do not depend on the default device, which is the user's setting.

Two default devices are tried: one that does not exist, and one whose tensors have no values. A tensor that
the package makes without naming a device fails on the first and loses its values on the second.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import gradkernels as gk
from gradkernels import _native, selftest


class Made:
    """The operands of the calls below, made before the default device is set."""

    def __init__(self):
        torch.manual_seed(0)
        self.x = torch.randn(20, 6, requires_grad=True)
        self.targets = torch.randint(2, (20,))
        self.mean, self.var, self.slopes = torch.zeros(6), torch.ones(6), torch.full((6,), 0.5)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ELU(), nn.Linear(8, 2))
        self.parameters = [*self.model.parameters()]
        self.halves = [nn.Parameter(torch.zeros(3, dtype=torch.float16)), nn.Parameter(torch.zeros(4, dtype=torch.complex64))]
        for each in (*self.parameters, *self.halves):
            each.grad = torch.randn_like(each) * 10
        self.without_gradients = nn.Linear(6, 2)
        self.sgd = torch.optim.SGD(self.parameters, lr=0.1)
        self.fused = torch.optim.SGD(self.parameters, lr=0.1, fused=True)
        self.rmsprop = gk.optim.RMSprop(self.parameters, max_norm=0.1)
        # The first step makes the optimizer's state on the default device, so it is taken here.
        self.rmsprop.step()
        self.weight = torch.empty(6, 6)
        self.total_norm = torch.tensor(30.0)

    def grads(self):
        return [each.grad for each in self.parameters]


def clipped(clip):
    return lambda made: (clip(made), made.grads())


def forward_and_backward(function):
    def call(made):
        y = function(made)
        return y, torch.autograd.grad(y.sum(), made.x)

    return call


def of_module(make):
    return forward_and_backward(lambda made: make()(made.x))


def attached(optimizer):
    def call(made):
        handle = gk.attach_clipping(getattr(made, optimizer), 1e-3)
        getattr(made, optimizer).step()
        return handle.last_norm, made.parameters

    return call


def monitored(made):
    with gk.GradientMonitor(made.model, activations_every=1) as monitor:
        F.cross_entropy(made.model(made.x), made.targets).backward()
        monitor.record_gradients()
        made.sgd.step()
    monitor.table()
    return {name: figures for name, figures in monitor.to_dict().items() if name != "milliseconds"}


def report_of(made, parameters):
    report = gk.grad_report(parameters)
    report.clip_(0.5)
    return report.table(), report.norms, report.total_norm


def diagnosed(made):
    return str(gk.diagnose(made.model, (made.x.detach(), made.targets), F.cross_entropy, apply=True))


def recomputed(made):
    with gk.recompute():
        y = gk.batch_norm_act(made.x, made.mean, made.var, training=True)
    return torch.autograd.grad(y.sum(), made.x)


def reverted(made):
    gk.convert(made.model)
    gk.revert(made.model)
    return made.model(made.x)


CALLS = {
    "leaky_relu": forward_and_backward(lambda made: gk.leaky_relu(made.x)),
    "elu": forward_and_backward(lambda made: gk.elu(made.x)),
    "swish": forward_and_backward(lambda made: gk.swish(made.x, 2.0) + gk.swish(made.x, made.slopes)),
    "prelu": forward_and_backward(lambda made: gk.prelu(made.x, made.slopes)),
    "rrelu": forward_and_backward(lambda made: gk.rrelu(made.x, training=True) + gk.rrelu(made.x)),
    "batch_norm_act": forward_and_backward(lambda made: gk.batch_norm_act(made.x, made.mean, made.var, training=True, act="swish")),
    "LeakyReLU": of_module(gk.LeakyReLU),
    "ELU": of_module(gk.ELU),
    "RReLU": of_module(gk.RReLU),
    "PReLU": of_module(lambda: gk.PReLU(6, device="cpu")),
    "Swish": of_module(lambda: gk.Swish(learnable=True, num_parameters=6, device="cpu")),
    "BatchNormAct1d": of_module(lambda: gk.BatchNormAct1d(6, momentum=None, device="cpu")),
    "BatchNormAct2d": forward_and_backward(lambda made: gk.BatchNormAct2d(6, device="cpu")(made.x[..., None, None])),
    "BatchNormAct3d": forward_and_backward(lambda made: gk.BatchNormAct3d(6, device="cpu")(made.x[..., None, None, None])),
    "group_norm_act": forward_and_backward(lambda made: gk.group_norm_act(made.x, 2, made.slopes, act="swish", residual=made.x)),
    "GroupNormAct": of_module(lambda: gk.GroupNormAct(1, 6, device="cpu")),
    **{
        f"InstanceNormAct{dim}d": forward_and_backward(
            lambda made, dim=dim: getattr(gk, f"InstanceNormAct{dim}d")(2, track_running_stats=True, device="cpu")(
                made.x.view(10, 2, *[1] * (dim - 1), 6)
            )
        )
        for dim in (1, 2, 3)
    },
    "FrozenBatchNormAct2d": forward_and_backward(lambda made: gk.FrozenBatchNormAct2d(6, device="cpu")(made.x[..., None, None])),
    "freeze_batch_norm": lambda made: (gk.freeze_batch_norm(made.model), made.model(made.x)),
    "unfreeze_batch_norm": lambda made: (gk.freeze_batch_norm(made.model), gk.unfreeze_batch_norm(made.model), made.model(made.x)),
    "SyncBatchNormAct": of_module(lambda: gk.SyncBatchNormAct(6, device="cpu")),
    "convert_sync_batch_norm": lambda made: gk.convert_sync_batch_norm(made.model)(made.x),
    "clip_grad_norm_": clipped(lambda made: gk.clip_grad_norm_(made.model, 1.0)),
    "clip_grad_norm_, p = 3": clipped(lambda made: gk.clip_grad_norm_(made.model, 1.0, 3.0)),
    "clip_grad_norm_ of halves and complex numbers": lambda made: gk.clip_grad_norm_(made.halves, 1.0),
    "clip_grad_value_": clipped(lambda made: gk.clip_grad_value_(made.model, 0.1)),
    "adaptive_clip_grad_": clipped(lambda made: gk.adaptive_clip_grad_(made.model)),
    "clip_grads_with_norm_": clipped(lambda made: gk.clip_grads_with_norm_(made.model, 1.0, made.total_norm)),
    "get_total_norm": lambda made: gk.get_total_norm(made.grads()),
    "grad_report": lambda made: report_of(made, made.model),
    "grad_report of complex numbers": lambda made: report_of(made, made.halves[1]),
    "grad_report where some have none": lambda made: report_of(made, [made.without_gradients.weight, *made.parameters]),
    "grad_report where none has one": lambda made: report_of(made, made.without_gradients),
    "attach_clipping": attached("sgd"),
    "attach_clipping, fused": attached("fused"),
    "RMSprop": lambda made: (made.rmsprop.step(), made.rmsprop.last_norm, made.parameters),
    "GradientMonitor": monitored,
    "diagnose": diagnosed,
    "convert": lambda made: str(gk.convert(made.model, check=made.x.detach())),
    "revert": reverted,
    "fold": lambda made: gk.fold(made.model)(made.x),
    "recompute": recomputed,
    "calculate_gain": lambda made: [gk.init.calculate_gain(name) for name in ("relu", "elu", "swish", "glu")],
    "xavier_uniform_": lambda made: gk.init.xavier_uniform_(made.weight),
    "xavier_normal_": lambda made: gk.init.xavier_normal_(made.weight),
    "he_uniform_": lambda made: gk.init.he_uniform_(made.weight, nonlinearity="elu"),
    "he_normal_": lambda made: gk.init.he_normal_(made.weight, nonlinearity="swish"),
    "lecun_uniform_": lambda made: gk.init.lecun_uniform_(made.weight),
    "lecun_normal_": lambda made: gk.init.lecun_normal_(made.weight),
    "apply_": lambda made: (str(gk.init.apply_(made.model)), made.parameters),
    "the self-test's operands": lambda made: selftest.draw(selftest.SMALL_SHAPE),
}
# Classes of results: the calls above return them.
RESULTS = {"ClippingHandle", "ConversionReport", "Diagnosis", "GradReport", "InitReport", "Initialised"}


def test_every_public_name_is_called():
    public = {name for module in (gk, gk.init) for name in module.__all__ if callable(getattr(module, name))}
    assert public - RESULTS <= {*CALLS}


def result_of(call):
    made = Made()
    torch.manual_seed(1)
    return [each.detach().clone() if isinstance(each, torch.Tensor) else each for each in tree_leaves(call(made))]


@pytest.mark.parametrize("library", ["native", "reference"])
@pytest.mark.parametrize("elsewhere", ["cuda:99", "meta"])
@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_the_default_device(name, elsewhere, library, monkeypatch):
    if library == "reference":
        monkeypatch.setattr(_native, "C", None)
    expected = result_of(CALLS[name])

    def call(made):
        with torch.device(elsewhere):
            return CALLS[name](made)

    for found, wanted in zip(result_of(call), expected, strict=True):
        if isinstance(wanted, torch.Tensor):
            assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        else:
            assert found == wanted


class Net(nn.Module):
    """Initialises itself in its constructor, like large models that are made on the meta device."""

    def __init__(self, initialise):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 8), gk.ELU(), nn.Linear(8, 2)
        self.bn = gk.BatchNormAct1d(8, act=nn.SiLU())
        self.said = initialise(self)

    def forward(self, x):
        return self.fc2(self.bn(self.act(self.fc1(x))))


@pytest.mark.parametrize(
    "initialise",
    [
        lambda net: gk.init.xavier_normal_(net.fc1.weight).shape,
        lambda net: gk.init.he_normal_(net.fc1.weight, nonlinearity="elu").shape,
        lambda net: gk.init.lecun_uniform_(net.fc1.weight).shape,
        lambda net: gk.init.calculate_gain("swish", 1.5),
        lambda net: str(gk.init.apply_(net)),
        lambda net: str(gk.convert(net)),
    ],
    ids=["xavier", "he", "lecun", "gain", "apply_", "convert"],
)
def test_a_model_on_the_meta_device_initialises_itself(initialise):
    with torch.device("meta"):
        net = Net(initialise)
    assert all(each.is_meta for each in (*net.parameters(), *net.buffers()))
    assert net.said == Net(initialise).said
