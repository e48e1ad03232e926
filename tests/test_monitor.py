"""GradientMonitor: its numbers against float64, and that it changes no result and leaves no hook.

A step must not wait for a device. Each wait is a read of a scalar, and these are counted.
"""

import copy
import json
import math
import pickle
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn
from torch.nn import functional as F
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import gradkernels as gk
from gradkernels import text
from gradkernels.diagnosis import plots

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "RMSprop of gradkernels": lambda parameters: gk.optim.RMSprop(parameters, lr=0.01, max_norm=0.1),
    "LBFGS, with a closure": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=1),
}


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))


def batch():
    return torch.randn(32, 6), torch.randint(3, (32,))


def loss_of(model, x, target):
    return F.cross_entropy(model(x), target)


def step(model, optimizer, clip=None):
    x, target = batch()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x, target)
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        if clip is not None:
            clip()
        optimizer.step()


def norms_of(model, values):
    """For each layer, the norm of values(parameter) of all its parameters as one vector, in float64."""
    norms = {}
    for name, parameter in model.named_parameters():
        norms.setdefault(name.rpartition(".")[0], []).append(values(name, parameter).detach().double().flatten())
    return [torch.cat(each).norm().item() for each in norms.values()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norms_are_those_of_the_step(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    expected = {"gradient_norm": [], "weight_norm": [], "update_ratio": []}
    with gk.GradientMonitor(model) as monitor:
        for _ in range(4):
            before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
            step(model, optimizer)
            weights = norms_of(model, lambda _, parameter: parameter)
            updates = norms_of(model, lambda key, parameter, before=before: parameter - before[key])
            # RMSprop clips gradients as it reads them, and does not write them.
            scale = getattr(optimizer, "_folded_coefficient", 1.0)
            expected["gradient_norm"].append(norms_of(model, lambda _, parameter, scale=scale: parameter.grad * scale))
            expected["weight_norm"].append(weights)
            expected["update_ratio"].append([update / weight for update, weight in zip(updates, weights, strict=True)])
    found = monitor.to_dict()
    assert found["layers"] == ["0", "1", "3", "5"]
    assert found["steps"] == [0, 1, 2, 3]
    for key, rows in expected.items():
        torch.testing.assert_close(
            torch.tensor(found[key], dtype=torch.float64), torch.tensor(rows, dtype=torch.float64), rtol=1e-7, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = nn.Linear(6, 3).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with gk.GradientMonitor(model, activations_every=1) as monitor:
        model(torch.randn(4, 6, dtype=dtype)).square().sum().backward()
        optimizer.step()
    assert monitor.to_dict()["gradient_norm"] == [pytest.approx(norms_of(model, lambda _, parameter: parameter.grad), rel=1e-12)]


class Reversed(nn.Module):
    """Layers that run in another order than they are registered, one that never runs, and a parameter."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(5, 3)
        self.spare = nn.Linear(2, 2)
        self.act = nn.ReLU()
        self.first = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.last(self.act(self.first(self.scale * x)))


IN_ORDER = ["(model)", "first", "last", "spare"]


@pytest.mark.parametrize("activations_every", [None, 1])
def test_layers_are_in_the_order_in_which_they_run(activations_every, monkeypatch):
    model = Reversed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gk.GradientMonitor(model, activations_every=activations_every) as monitor:
        step(model, optimizer)
        step(model, optimizer)
    found = monitor.to_dict()
    assert found["layers"] == IN_ORDER
    by_layer = dict(zip(IN_ORDER, found["gradient_norm"][1], strict=True))
    assert by_layer["last"] == pytest.approx(math.hypot(model.last.weight.grad.norm(), model.last.bias.grad.norm()), rel=1e-6)
    assert by_layer["(model)"] == pytest.approx(model.scale.grad.norm().item(), rel=1e-6)
    assert by_layer["spare"] is None
    names = [line.split()[0] for line in monitor.table().splitlines()[2:]]
    assert names[: 4 + (activations_every == 1)] == [
        name for name in ("(model)", "first", "act", "last", "spare") if activations_every or name != "act"
    ]
    assert "the gradient of the first layer, (model), is" in monitor.table()
    drawn = []
    monkeypatch.setattr(plots, "gradient_flow", lambda *arguments: drawn.append(arguments))
    monitor.plot("flow.png")
    assert drawn[0][1:3] == (IN_ORDER, [False, True, True, True])


def test_layers_that_were_never_called_keep_the_order_of_registration():
    model = Reversed()
    with gk.GradientMonitor(model) as monitor:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert monitor.to_dict()["layers"] == ["(model)", "last", "spare", "first"]


def test_a_hook_for_the_first_call_is_removed_by_it():
    model = network()
    with gk.GradientMonitor(model, activations_every=None):
        assert all(module._forward_pre_hooks for module in model)
        model(batch()[0])
        assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("before_clipping", [False, True])
def test_sparse_gradients_count_as_dense_ones(before_clipping):
    torch.manual_seed(0)
    sparse = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))
    dense = copy.deepcopy(sparse)
    dense[0].sparse = False
    # Rows that occur twice, whose gradients are summed.
    x, target = torch.randint(3, (8, 3)), torch.randint(3, (8,))
    found = []
    for model in (sparse, dense):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gk.GradientMonitor(model, activations_every=1) as monitor:
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(model, x, target).backward()
                assert model[0].weight.grad.is_sparse == (model is sparse)
                if before_clipping:
                    monitor.record_gradients()
                optimizer.step()
        found.append(monitor.to_dict())
    for key in ("gradient_norm", "weight_norm", "update_ratio"):
        torch.testing.assert_close(torch.tensor(found[0][key]), torch.tensor(found[1][key]))


def test_norms_whose_squares_overflow():
    model = nn.Linear(6, 3).double()
    with gk.GradientMonitor(model) as monitor:
        for scale in (3e200, 3e-200):
            model.weight.grad, model.bias.grad = torch.zeros_like(model.weight), torch.zeros_like(model.bias)
            model.weight.grad[0, 0], model.bias.grad[0] = scale, 4 / 3 * scale
            torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert monitor.to_dict()["gradient_norm"] == [[pytest.approx(5e200)], [pytest.approx(5e-200)]]


def test_every_and_activations_every():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gk.GradientMonitor(model, every=3, activations_every=4) as monitor:
        for _ in range(9):
            step(model, optimizer)
            model.eval()(batch()[0])
            model.train()
    found = monitor.to_dict()
    assert found["steps"] == [0, 3, 6]
    assert [*found["activations"]] == [0, 4, 8]
    assert gk.GradientMonitor(model, activations_every=None).remove() is None
    assert "activations of step 0" in monitor.table(3)
    with pytest.raises(RuntimeError, match="step 4 was not recorded; recorded are steps 0 to 6 with every=3"):
        monitor.table(4)


class Watched(nn.Module):
    """A convolution with one dead channel, and tokens whose units lie along the last dimension."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.relu = nn.ReLU()
        self.tokens = nn.Linear(36, 5)
        nn.init.constant_(self.conv.bias, 0.0)
        with torch.no_grad():
            self.conv.bias[1] = -100
            self.tokens.bias[:2] = -100

    def forward(self, x):
        return torch.relu(self.tokens(self.relu(self.conv(x)).flatten(2))).sum((1, 2))


def test_activations():
    model = Watched()
    x = torch.randn(8, 2, 8, 8)
    seen = {}

    def see(module, _, y):
        seen.setdefault(module, y.detach().double())

    handles = [module.register_forward_hook(see) for module in model.children()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gk.GradientMonitor(model) as monitor:
        model(x).sum().backward()
        model(x + 1)
        optimizer.step()
    for handle in handles:
        handle.remove()
    found = monitor.to_dict()["activations"][0]
    for name, dead in (("conv", 1 / 4), ("relu", 1 / 4), ("tokens", 2 / 5)):
        y = seen[model.get_submodule(name)]
        assert found[name]["mean"] == pytest.approx(y.mean().item(), rel=1e-5)
        assert found[name]["std"] == pytest.approx(y.std(correction=0).item(), rel=1e-5)
        assert found[name]["negative"] == pytest.approx((y < 0).double().mean().item())
        assert found[name]["dead"] == pytest.approx(dead)
    assert " 25%" in monitor.table() and " 40%" in monitor.table()


def test_gradients_before_clipping():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []

    def clip():
        expected.append(norms_of(model, lambda _, parameter: parameter.grad))
        monitor.record_gradients()
        gk.clip_grad_norm_(model, 1e-3)

    with gk.GradientMonitor(model) as monitor:
        step(model, optimizer, clip)
        step(model, optimizer, lambda: gk.clip_grad_norm_(model, 1e-3))
        step(model, optimizer, clip)
    first, clipped, third = monitor.to_dict()["gradient_norm"]
    assert first == pytest.approx(expected[0], rel=1e-7)
    assert third == pytest.approx(expected[1], rel=1e-7)
    assert math.hypot(*clipped) == pytest.approx(1e-3, rel=1e-2), "an early record counts for one step only"


@pytest.mark.parametrize("every", [1, 2, 3])
def test_gradients_recorded_in_a_closure_belong_to_its_step(every):
    """The first two steps record theirs before clipping, and the third does not."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, *batch())
        loss.backward()
        if len(expected) < 2:
            monitor.record_gradients()
        expected.append(norms_of(model, lambda _, parameter: parameter.grad))
        gk.clip_grad_norm_(model, 1e-3)
        return loss

    with gk.GradientMonitor(model, every=every) as monitor:
        for _ in range(3):
            optimizer.step(closure)
    found = dict(zip(monitor.to_dict()["steps"], monitor.to_dict()["gradient_norm"], strict=True))
    assert [*found] == [*range(0, 3, every)]
    for step in {0, 1} & {*found}:
        assert found[step] == pytest.approx(expected[step], rel=1e-7)
    if 2 in found:
        assert math.hypot(*found[2]) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("early", [False, True], ids=["after step()", "by record_gradients()"])
@pytest.mark.parametrize(
    "clipping",
    {
        "attached": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "attached, fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
        "RMSprop's own": lambda parameters: gk.optim.RMSprop(parameters, max_norm=1e-3),
        "RMSprop's own, in memory": lambda parameters: gk.optim.RMSprop(parameters, max_norm=1e-3, foreach=True),
    }.items(),
    ids=lambda item: item[0],
)
def test_gradients_are_recorded_as_they_are_clipped_inside_the_step(clipping, early):
    name, make = clipping
    model = network()
    optimizer = make(model.parameters())
    clips = gk.attach_clipping(optimizer, 1e-3) if name.startswith("attached") else optimizer
    with gk.GradientMonitor(model) as monitor:
        step(model, optimizer, monitor.record_gradients if early else None)
    (gradients,) = monitor.to_dict()["gradient_norm"]
    assert clips.last_norm > 0.1
    assert math.hypot(*gradients) == pytest.approx(clips.last_norm.item() if early else 1e-3, rel=1e-5)


@pytest.mark.parametrize("held_from_the_start", [False, True])
def test_a_layer_that_is_unfrozen_later_is_recorded_from_then_on(held_from_the_start):
    model = network()
    model[0].requires_grad_(False)
    model[3].requires_grad_(False)
    frozen = (*model[0].parameters(), *model[3].parameters())
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    if held_from_the_start:
        optimizer.add_param_group({"params": frozen})
    with gk.GradientMonitor(model) as monitor:
        step(model, optimizer)
        model[0].requires_grad_(True)
        if not held_from_the_start:
            optimizer.add_param_group({"params": frozen})
        step(model, optimizer, monitor.record_gradients)
        step(model, optimizer)
        expected = norms_of(model, lambda _, parameter: parameter.grad if parameter.grad is not None else torch.zeros(1))
        model[0].requires_grad_(False)
        model.zero_grad()
        step(model, optimizer)
    found = monitor.to_dict()
    assert found["layers"] == ["0", "1", "5"], "a layer that stayed frozen has no figures"
    for name in ("gradient_norm", "weight_norm", "update_ratio"):
        assert [row[0] is None for row in found[name]] == [True, False, False, True]
        assert all(None not in row[1:] for row in found[name])
    assert found["gradient_norm"][2] == pytest.approx([expected[0], expected[1], expected[3]], rel=1e-6)
    assert monitor.table(0).splitlines()[2].split()[:4] == ["0", "-", "-", "-"]


def test_the_parameters_of_an_optimizer_are_read_at_every_step():
    model = network()
    optimizer = torch.optim.SGD([model[0].weight, model[3].weight], lr=0.1)
    with gk.GradientMonitor(model) as monitor:
        step(model, optimizer)
        optimizer.param_groups[0]["params"] = [model[3].weight, model[5].weight]
        step(model, optimizer)
    first, second = monitor.to_dict()["gradient_norm"]
    assert [value is None for value in first] == [False, True, False, True]
    assert [value is None for value in second] == [True, True, False, False]


def test_optimizers_that_take_turns_make_one_step():
    model = network()
    body, head = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[3:].parameters())
    stranger = nn.Linear(2, 2)
    other = torch.optim.SGD(stranger.parameters(), lr=0.1)
    with gk.GradientMonitor(model) as monitor:
        for _ in range(2):
            stranger(torch.randn(1, 2)).sum().backward()
            other.step()
            loss_of(model, *batch()).backward()
            head.step()
            body.step()
    found = monitor.to_dict()
    assert found["steps"] == [0, 1]
    assert all(norms[1] is None and None not in (norms[0], *norms[2:]) for norms in found["gradient_norm"])
    assert "without a gradient: 1" in monitor.table()


def step_and_fail(model, optimizer):
    """A step, and one that raises an error."""
    step(model, optimizer)
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="half way"):
        step(model, optimizer)
    optimizer.fails = False


def test_an_optimizer_that_steps_another_makes_one_step():
    class Outer(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})
            first, *rest = self.param_groups[0]["params"]
            self.parts = [torch.optim.SGD([first], lr=0.1), torch.optim.Adam(rest)]
            self.fails = False

        def step(self, closure=None):
            for part in self.parts:
                part.step()
                if self.fails:
                    raise RuntimeError("half way")

    model = network()
    optimizer = Outer(model.parameters())
    with gk.GradientMonitor(model) as monitor:
        step_and_fail(model, optimizer)
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        step(model, optimizer)
    found = monitor.to_dict()
    assert found["steps"] == [0, 2], "the second one was not completed"
    updates = norms_of(model, lambda key, parameter: parameter - before[key])
    weights = norms_of(model, lambda _, parameter: parameter)
    assert found["update_ratio"][1] == pytest.approx([update / weight for update, weight in zip(updates, weights, strict=True)], rel=1e-6)


def test_a_step_that_calls_super_is_one_step():
    """torch wraps the step() of both classes, because it made optimizers of both."""

    class ThenShrinks(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            super().step(closure)
            if self.fails:
                raise RuntimeError("half way")
            torch._foreach_mul_([parameter.data for parameter in self.param_groups[0]["params"]], 0.5)

    model = network()
    torch.optim.SGD(model.parameters())
    optimizer = ThenShrinks(model.parameters(), lr=1e-4)
    with gk.GradientMonitor(model) as monitor:
        step_and_fail(model, optimizer)
        step(model, optimizer)
    found = monitor.to_dict()
    assert found["steps"] == [0, 2], "the second one was not completed"
    assert found["update_ratio"][0] == pytest.approx([1.0] * 4, rel=1e-2)


# It changes nothing


class Failing(torch.optim.SGD):
    def step(self, closure=None):
        raise ValueError("this step fails")


def test_steps_after_one_that_raised_are_recorded():
    model = network()
    failing, sgd = Failing(model.parameters(), 0.1), torch.optim.SGD(model[5].parameters(), 0.1)
    with gk.GradientMonitor(model, activations_every=None) as monitor:
        loss_of(model, *batch()).backward()
        with pytest.raises(ValueError, match="this step fails"):
            failing.step()
        sgd.step()
        sgd.step()
    assert len(monitor.to_dict()["gradient_norm"]) >= 2


def test_updates_after_the_model_has_changed_its_dtype():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    sgd = torch.optim.SGD(model.parameters(), 1e-10)
    with gk.GradientMonitor(model, activations_every=None) as monitor:
        for dtype in (torch.float32, torch.float64, torch.float64):
            model.to(dtype)
            model[0].weight.grad = torch.ones_like(model[0].weight)
            sgd.step()
    last, before = (each[0] for each in monitor.to_dict()["update_ratio"][:0:-1])
    assert last == pytest.approx(before) == pytest.approx(1e-10 * 6**0.5 / model[0].weight.norm().item())


def trained(watched):
    torch.manual_seed(3)
    model = nn.Sequential(network(), nn.Dropout(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with gk.GradientMonitor(model, every=2, activations_every=2) if watched else nullcontext():
        for _ in range(5):
            step(model, optimizer)
    return [*model.state_dict().values(), torch.get_rng_state()]


def test_training_is_the_same_to_the_bit():
    assert all(map(torch.equal, trained(True), trained(False)))


def hooks_of(model):
    everywhere = [torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_modules = [getattr(module, kind) for module in model.modules() for kind in kinds]
    return [dict(each) for each in everywhere + on_modules], [parameter._backward_hooks for parameter in model.parameters()]


def test_hooks_are_removed_also_after_an_exception():
    model = network()
    before = hooks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), gk.GradientMonitor(model) as monitor:
        step(model, optimizer)
        assert hooks_of(model) != before
        raise ZeroDivisionError
    assert hooks_of(model) == before
    monitor.remove()
    step(model, optimizer)
    assert monitor.to_dict()["steps"] == [0], "after remove() it records nothing and keeps its records"


def test_a_monitor_that_is_entered_again_goes_on():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = hooks_of(model)
    monitor = gk.GradientMonitor(model, activations_every=2)
    for _ in range(2):
        with monitor as entered:
            assert entered is monitor
            step(model, optimizer)
            step(model, optimizer)
        assert hooks_of(model) == before
        step(model, optimizer)
    found = monitor.to_dict()
    assert found["steps"] == [0, 1, 2, 3], "steps in between are not recorded"
    assert [*found["activations"]] == [0, 2]
    assert found["gradient_norm"][3] != found["gradient_norm"][1]


def test_no_hook_stays_if_one_cannot_be_registered():
    class Unhookable(nn.ReLU):
        def register_forward_hook(self, *arguments, **keywords):
            raise RuntimeError("no hooks here")

    model = nn.Sequential(nn.Linear(6, 3), Unhookable())
    before = hooks_of(model)
    with pytest.raises(RuntimeError, match="no hooks here"):
        gk.GradientMonitor(model)
    assert hooks_of(model) == before


def test_reading_costs_the_same_for_each_parameter():
    """Counted in lines of Python, which grow with the parameters, not with parameters times layers."""

    def lines(layers):
        model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(layers)])
        with gk.GradientMonitor(model, activations_every=None) as monitor:
            model(torch.ones(1, 1)).sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        count = 0

        def trace(frame, event, _):
            nonlocal count
            count += event == "line"
            return trace

        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            monitor.to_dict()
        finally:
            sys.settrace(previous)
        return count

    assert lines(200) < 12 * lines(20)


def test_copies_and_pickles_of_the_model_are_not_recorded():
    model = network()
    with gk.GradientMonitor(model) as monitor:
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            step(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
        assert len(monitor._recorder.unread) == 0
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert monitor.to_dict()["steps"] == [0]


class CountReads(TorchDispatchMode):
    """How many times Python waited for a number."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def reads(model, optimizer, steps):
    with CountReads() as counted:
        for _ in range(steps):
            step(model, optimizer)
    return counted.count


@pytest.mark.parametrize("alarm", [None, "warn"])
def test_a_step_does_not_wait_and_norms_are_fetched_for_many_steps(alarm):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    without = reads(model, optimizer, 5)
    with gk.GradientMonitor(model, activations_every=2, alarm=alarm, read_every=6) as monitor:
        assert reads(model, optimizer, 5) == without
        assert len(monitor._recorder.unread) > 5
        step(model, optimizer)
        step(model, optimizer)
        kinds = 3 if alarm is None else 4
        assert len(monitor._recorder.unread) == kinds, "the first six steps were fetched together, and the seventh was not"
    assert len(monitor.to_dict()["steps"]) == 7


# Wrappers


def test_distributed_data_parallel_without_its_prefix(process_group):
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gk.GradientMonitor(model) as monitor:
        step(model, optimizer)
    found = monitor.to_dict()
    assert found["layers"] == ["0", "1", "3", "5"]
    assert found["gradient_norm"] == [pytest.approx(norms_of(model.module, lambda _, parameter: parameter.grad), rel=1e-7)]
    assert [*found["activations"][0]] == [str(place) for place in range(6)]


@pytest.mark.parametrize("monitored_first", [True, False])
def test_under_compile_gradients_are_recorded_without_activations(monitored_first):
    torch._dynamo.reset()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    if not monitored_first:
        step(compiled, optimizer)
    with gk.GradientMonitor(compiled) as monitor:
        step(compiled, optimizer)
        step(compiled, optimizer)
    found = monitor.to_dict()
    assert found["layers"] == ["0", "1", "3", "5"]
    assert found["gradient_norm"][1] == pytest.approx(norms_of(model, lambda _, parameter: parameter.grad), rel=1e-7)
    assert found["activations"] == {}
    assert "no activations: there was no forward pass in training mode outside torch.compile" in monitor.table()


# The reports


@pytest.fixture(scope="module")
def vanishing():
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(6, 6), nn.Sigmoid())], nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gk.GradientMonitor(model) as monitor:
        for _ in range(3):
            step(model, optimizer)
    return monitor


def test_table_shows_what_vanishes_and_the_cost(vanishing):
    lines = str(vanishing).splitlines()
    assert lines[0] == "step 2, activations of step 0"
    first = next(line for line in lines if line.startswith("0 ")).split()
    last = next(line for line in lines if line.startswith("24 ")).split()
    assert float(first[1]) < 1e-6 * float(last[1])
    assert any(line.startswith("the gradient of the first layer, 0, is ") and "times that of the last, 24" in line for line in lines)
    assert lines[-1].startswith("cost: gradients and weights") and "activations" in lines[-1] and "in each of 3 steps" in lines[-1]


def test_dict_is_json(vanishing):
    found = vanishing.to_dict()
    assert json.loads(json.dumps(found))["gradient_norm"] == found["gradient_norm"]
    assert found["milliseconds"]["gradients and weights"] > 0 < found["milliseconds"]["activations"]


def test_plot_draws_both_panels(vanishing, tmp_path):
    vanishing.plot(tmp_path / "flow.png")
    image = imread(tmp_path / "flow.png")[..., :3]
    width = image.shape[1]
    flow, heat = image[:, : width * 2 // 5], image[:, width // 2 : width * 9 // 10]
    assert (flow.min(axis=2) < 0.5).mean() > 0.005
    assert len({tuple(pixel) for pixel in (heat[:: heat.shape[0] // 40, heat.shape[1] // 2] * 255).round().astype(int)}) > 8


def gradient_flow(path, norms):
    """Draw with every warning an error, and return the scale, the words and the range of the picture."""
    figures = []

    def keep(figure, *arguments, **keywords):
        figures.append(figure)
        return saved(figure, *arguments, **keywords)

    saved = Figure.savefig
    layers = [f"layer{place}" for place in range(len(norms[0]))]
    last = {name: norm for name, norm in zip(layers, norms[-1], strict=True) if norm is not None}
    remark = text.first_to_last(last)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(Figure, "savefig", keep)
        plots.gradient_flow(path, layers, [True] * len(layers), [*range(0, 10 * len(norms), 10)], norms, remark)
    flow, heat, *scale = figures[0].axes
    labels = [] if flow.get_legend() is None else [text.get_text() for text in flow.get_legend().get_texts()]
    ticks = [label.get_text() for label in heat.get_xticklabels() if label.get_text()]
    words = " ".join(text.get_text() for text in flow.texts)
    title = flow.get_title(loc="left").replace("\n", " ")
    return {"scale": bool(scale), "legend": labels, "steps": ticks, "words": words, "title": title, "range": flow.get_xlim()}


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([[1e-3, 0.5]], {"legend": ["step 0"], "steps": ["0"]}),
        (
            [[0.5], [0.4]],
            {"legend": ["step 0", "step 10", "all steps"], "title": "step 10: only layer layer0 has a gradient: 0.4"},
        ),
        (
            [[NAN, NAN]],
            {
                "scale": False,
                "legend": [],
                "title": "step 0: the gradient of the first layer, layer0, is nan, and that of the last, layer1, nan",
            },
        ),
        (
            [[0.0, 0.0]],
            {
                "scale": False,
                "legend": [],
                "title": "step 0: the gradient of the first layer, layer0, is 0, and that of the last, layer1, 0",
            },
        ),
        ([[None, None]], {"scale": False, "title": "step 0: no layer has a gradient", "words": "no norm to draw"}),
        ([[1.0, 1.0], [NAN, INF]], {"legend": ["step 0", "all steps"], "scale": True, "words": "nan inf"}),
        ([[1e-320, 1e-99, 1e99, 1e300]] * 2, {"scale": True, "words": "9.99989e-321 1e+300"}),
    ],
)
def test_pictures_of_one_step_of_one_layer_and_of_norms_that_are_not_drawn(norms, expected, tmp_path):
    drawn = gradient_flow(tmp_path / "flow.png", norms)
    assert {key: drawn[key] for key in expected} == expected


def test_points_keep_away_from_the_edges(tmp_path):
    """With a single point the axis gets its smallest range, and the point must not lie half outside."""
    figure = plots._figure(1, 6)
    axes = figure.subplots()
    plots._draw_flow(axes, [0.3], [True], plots.INK, "")
    plots._mark_edges(axes, [0.3], [plots.INK])
    lowest, highest = axes.get_xlim()
    assert highest / lowest > 1e4
    assert highest > 0.3 * 1.1


def test_what_vanishes_is_on_the_axis(tmp_path):
    drawn = gradient_flow(tmp_path / "flow.png", [[10.0**-place for place in range(12)], [3 * 10.0**-place for place in range(12)]])
    lowest, highest = drawn["range"]
    assert lowest < 1e-11
    assert highest > 3


def test_plot_and_table_of_gradients_that_are_not_finite_zero_or_absent(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gk.GradientMonitor(model) as monitor:
        for gradient in (1.0, float("inf"), float("nan"), 0.0):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            model[5].weight.grad = None
            optimizer.step()
            assert ("gradient not finite: 0, 1, 3" in monitor.table()) == (not math.isfinite(gradient))
    monitor.plot(tmp_path / "odd.png")
    assert imread(tmp_path / "odd.png").size
    norms = monitor.to_dict()["gradient_norm"]
    assert [row[3] for row in norms] == [None] * 4
    assert [row[0] for row in norms] == [pytest.approx(56**0.5), math.inf, pytest.approx(math.nan, nan_ok=True), 0]


class Scalars(list):
    """A writer that cannot be hashed, and has no weak references."""

    __slots__ = ()

    def add_scalar(self, tag, scalar_value, global_step):
        self.append((tag, scalar_value, global_step))


def test_tensorboard_gets_each_step_once():
    model, writer = network(), Scalars()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gk.GradientMonitor(model, activations_every=2) as monitor:
        step(model, optimizer)
        monitor.to_tensorboard(writer)
        first = len(writer)
        assert first == 3 * 4 + 4 * 6
        step(model, optimizer)
        step(model, optimizer)
        monitor.to_tensorboard(writer)
    assert len(writer) == first + 2 * 3 * 4 + 4 * 6
    assert len({(tag, number) for tag, _, number in writer}) == len(writer)
    other = Scalars()
    monitor.to_tensorboard(other)
    assert sorted(other) == sorted(writer)
    found = monitor.to_dict()
    values = {(tag, number): value for tag, value, number in writer}
    assert values["gradient_norm/3", 1] == found["gradient_norm"][1][2]
    assert values["activation_dead/2", 2] == found["activations"][2]["2"]["dead"]


def test_tensorboard_of_torch(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    model = network()
    with gk.GradientMonitor(model) as monitor, tensorboard.SummaryWriter(tmp_path) as writer:
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))
        monitor.to_tensorboard(writer)
    assert any(tmp_path.iterdir())


# Wrong arguments


def test_no_step_yet():
    monitor = gk.GradientMonitor(network())
    for read in (monitor.table, monitor.to_dict, lambda: monitor.plot("never.png"), lambda: monitor.to_tensorboard(Scalars())):
        with pytest.raises(RuntimeError, match="has not recorded a step yet: it records when an optimizer"):
            read()
    monitor.remove()


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)])
def test_nothing_to_monitor(model):
    with pytest.raises(ValueError, match="has no parameters that require a gradient: there is nothing to monitor"):
        gk.GradientMonitor(model)


@pytest.mark.parametrize("count", [0, -1, 2.5, 1.0, "2", math.nan])
@pytest.mark.parametrize("name", ["every", "activations_every", "read_every"])
def test_intervals_are_whole_numbers_from_one_on(name, count):
    before = hooks_of(network())
    with pytest.raises(ValueError, match=f"^{name} must be a whole number from 1 on, not {count!r}"):
        gk.GradientMonitor(network(), **{name: count})
    assert hooks_of(network()) == before
    with pytest.raises(ValueError, match="every must be a whole number from 1 on, not None"):
        gk.GradientMonitor(network(), every=None)


def test_a_module_that_is_never_called_is_named():
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "unused": nn.Linear(6, 3)})
    model.forward = lambda x: model["used"](x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gk.GradientMonitor(model) as monitor:
        loss_of(model, *batch()).backward()
        optimizer.step()
    assert "without a gradient: unused" in monitor.table()
    assert "no activations, because never called in training mode or without a suitable output: unused" in monitor.table()
