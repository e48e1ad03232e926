"""The alarm of GradientMonitor: faults planted in one layer are reported with its name, and healthy trainings are not.

Every deviation and share is compared with a plain transcription of the docstring's formula.
"""

import copy
import logging
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradkernels as gk
from gradkernels.diagnosis import watch

LAYERS = ["0", "2", "4"]
WARM_UP = watch.WARM_UP_STEPS


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


class Idle(torch.optim.Optimizer):
    """Gradients that are nan do not reach the weights."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        pass


def train(model, optimizer, steps, before_step=lambda step: None):
    """Train on random batches whose classes can be learned; before_step(step) comes after backward."""
    for step in range(steps):
        x = torch.randn(32, 6)
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        before_step(step)
        optimizer.step()


def plant(model, layer, factors):
    """A function that multiplies the gradient of a layer by factors[step]."""

    def multiply(step):
        for parameter in model.get_submodule(layer).parameters():
            parameter.grad.mul_(factors.get(step, 1.0))

    return multiply


class Heard(list):
    """An alarm that keeps its calls."""

    def __call__(self, name, step, reason, value):
        self.append((name, step, reason, value))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_layer_that_explodes_is_named(layer):
    model, heard = network(), Heard()
    with gk.GradientMonitor(model, alarm=heard):
        train(model, torch.optim.SGD(model.parameters(), lr=1e-3), 60, plant(model, layer, {50: 300.0}))
    ((name, step, reason, value),) = heard
    assert (name, step, reason) == (layer, 50, "exploding")
    assert value >= 6


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_collapses_is_named_if_that_lasts(layer):
    model, heard = network(), Heard()
    small = dict.fromkeys((45, 47, 48, 50, 51, 52, 53), 1 / 300)
    with gk.GradientMonitor(model, alarm=heard):
        train(model, torch.optim.SGD(model.parameters(), lr=1e-3), 60, plant(model, layer, small))
    ((name, step, reason, value),) = heard
    assert (name, step, reason) == (layer, 52, "collapsing")
    assert value <= -6


def expected_alarms(rows):
    """The docstring's rules in float64. rows: for each step the norms of all layers, in their order."""
    alarms, before = [], set()
    means, variances, counts, zeros, below = ([0.0] * len(rows[0]) for _ in range(5))
    for step, row in enumerate(rows):
        found = {}
        for place, norm in enumerate(row):
            if not math.isfinite(norm):
                found[place, "non-finite"] = norm
                continue
            if norm == 0:
                zeros[place] += 1
                below[place] = 0
                continue
            zeros[place] = 0
            deviation = max(variances[place] ** 0.5, 0.25)
            difference = math.log(norm) - means[place]
            far = difference / deviation if counts[place] >= 25 else 0.0
            below[place] = below[place] + 1 if far <= -6 else 0
            if far >= 6 or below[place] >= 3:
                found[place, "exploding" if far > 0 else "collapsing"] = far
            counts[place] += 1
            if counts[place] >= 25:
                difference = max(-3 * deviation, min(3 * deviation, difference))
            weight = max(1 / counts[place], 0.03)
            means[place] += weight * difference
            variances[place] = (1 - weight) * (variances[place] + weight * difference**2)
        usual = {place: math.exp(means[place]) for place in range(len(row)) if counts[place] >= 25}
        usual |= {place: 0.0 for place in range(len(row)) if zeros[place] >= 25}
        for place, norm in usual.items():
            largest = max((usual[after] for after in usual if after > place), default=0.0)
            if norm == 0 or norm < 1e-3 * largest:
                found[place, "vanishing"] = norm and norm / largest
        alarms += [(str(2 * place), step, reason, value) for (place, reason), value in found.items() if (place, reason) not in before]
        before = {*found}
    return sorted(alarms)


@pytest.mark.parametrize("read_every", [1, 32, 1000])
def test_alarms_are_those_of_the_formula(read_every):
    """Gradients whose norms drift, jump, vanish, are 0 for a while, and are nan or inf."""
    model, heard = network(), Heard()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(1)
    rows = (torch.randn(400, 3, generator=generator, dtype=torch.float64) * 0.4 + torch.linspace(0, 3, 400)[:, None]).exp()
    rows[100:110, 1] *= 1e4
    rows[150:, 0] *= 1e-7
    rows[200:260, 1] = 0
    rows[300, 2], rows[301, 2], rows[305, 1] = math.nan, math.inf, math.inf
    rows[torch.rand(400, 3, generator=generator) < 0.01] *= 50
    with gk.GradientMonitor(model, alarm=heard, read_every=read_every) as monitor:
        for row in rows.tolist():
            for layer, norm in zip(LAYERS, row, strict=True):
                for parameter in model.get_submodule(layer).parameters():
                    parameter.grad = torch.zeros_like(parameter)
                model.get_submodule(layer).weight.grad[0, 0] = norm
            optimizer.step()
    expected = expected_alarms(monitor.to_dict()["gradient_norm"])
    assert {reason for _, _, reason, _ in expected} == {"exploding", "collapsing", "vanishing", "non-finite"}
    assert [each[:3] for each in sorted(heard)] == [each[:3] for each in expected]
    assert [each[3] for each in sorted(heard)] == pytest.approx([each[3] for each in expected], rel=1e-9, nan_ok=True)
    assert [step for _, step, _, _ in heard] == sorted(step for _, step, _, _ in heard)


def test_a_layer_that_vanishes_is_named():
    """Of the layers before the sigmoids, the gradient is a thousandth; of the normalisation it may be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), *[layer for _ in range(6) for layer in (nn.Linear(6, 6), nn.Sigmoid())], nn.Linear(6, 3))
    heard = Heard()
    with gk.GradientMonitor(model, alarm=heard) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), WARM_UP + 1)
    assert {(step, reason) for _, step, reason, _ in heard} == {(WARM_UP - 1, "vanishing")}
    assert [name for name, *_ in heard] == ["1", "3", "5"]
    found = monitor.to_dict()
    mean = torch.tensor(found["gradient_norm"][:WARM_UP]).log().mean(0).exp()
    usual = dict(zip(found["layers"], mean.tolist(), strict=True))
    for name, _, _, share in heard:
        assert share == pytest.approx(usual[name] / max(usual.values()), rel=1e-5)
        assert share < 1e-3
    assert usual["0"] < 1e-3 * max(usual.values())


def test_a_layer_without_any_gradient_vanishes():
    model, heard = network(), Heard()
    with gk.GradientMonitor(model, alarm=heard):
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 3 * WARM_UP, plant(model, "2", dict.fromkeys(range(10, 500), 0.0)))
    assert heard == [("2", 10 + WARM_UP - 1, "vanishing", 0.0)]


def test_a_network_without_any_gradient_vanishes(recwarn):
    """As behind a relu that is dead for every sample."""
    model = network()
    layers = ("0", "2", "4")
    heard = Heard()
    with gk.GradientMonitor(model, alarm=heard), gk.GradientMonitor(model, alarm="warn"):
        train(model, Idle(model.parameters()), 2 * WARM_UP, lambda step: [plant(model, name, {step: 0.0})(step) for name in layers])
    assert heard == [(name, WARM_UP - 1, "vanishing", 0.0) for name in layers]
    assert [str(each.message) for each in recwarn] == [
        f"step {WARM_UP - 1}: vanishing gradient in 0, 2, 4; the norm in 0 is 0 for 25 steps"
    ]


def test_a_reason_is_reported_when_it_begins():
    model, heard = network(), Heard()
    with gk.GradientMonitor(model, alarm=heard, read_every=1):
        train(model, Idle(model.parameters()), 20, plant(model, "2", dict.fromkeys((3, 4, 5, 9), math.nan)))
    assert [each[:3] for each in heard] == [("2", 3, "non-finite"), ("2", 9, "non-finite")]


@pytest.mark.slow
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d])
def test_a_healthy_training_raises_no_alarm(norm):
    layers = [layer for _ in range(5) for layer in (nn.Linear(32, 32), norm(32), nn.ReLU())]
    model = nn.Sequential(nn.Linear(6, 32), *layers, nn.Linear(32, 3))
    heard = Heard()
    with gk.GradientMonitor(model, every=10**6, activations_every=None, alarm=heard):
        train(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 3000)
    assert not heard


@pytest.mark.parametrize("read_every", [1, 7, 100])
def test_the_alarm_hears_at_read_every_at_a_report_and_at_the_end(read_every):
    model, heard = network(), Heard()
    optimizer = Idle(model.parameters())
    spoil = plant(model, "4", dict.fromkeys(range(0, 100, 2), math.inf))
    heard_before = []
    with gk.GradientMonitor(model, alarm=heard, read_every=read_every) as monitor:
        train(model, optimizer, 10, lambda step: heard_before.append(len(heard)) or spoil(step))
        assert heard_before == [(max(step - 1, 0) // read_every * read_every + 1) // 2 for step in range(10)]
        str(monitor)
        assert [step for _, step, _, _ in heard] == [0, 2, 4, 6, 8]
        train(model, optimizer, 1, spoil)
        train(model, optimizer, 1)
    assert [step for _, step, _, _ in heard] == [0, 2, 4, 6, 8, 10]


CLIPPED = {
    "attached": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "attached, fused": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, fused=True),
    "RMSprop's own": lambda parameters: gk.optim.RMSprop(parameters, lr=1e-5, max_norm=0.1),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_a_spike_is_seen_before_it_is_clipped(name):
    """After clipping, the layer with the spike has a usual norm, and all others seem to collapse."""
    model, heard = network(), Heard()
    optimizer = CLIPPED[name](model.parameters())
    if name.startswith("attached"):
        gk.attach_clipping(optimizer, 0.1)
    with gk.GradientMonitor(model, alarm=heard) as monitor:
        train(model, optimizer, 45, plant(model, "2", {40: 1e3}))
    assert [each[:3] for each in heard] == [("2", 40, "exploding")]
    assert max(map(max, monitor.to_dict()["gradient_norm"])) > 10


def test_clipping_before_step_needs_record_gradients():
    model, heard = network(), Heard()
    spoil = plant(model, "2", {40: 1e3})

    def clip(step):
        spoil(step)
        monitor.record_gradients()
        gk.clip_grad_norm_(model, 0.1)

    with gk.GradientMonitor(model, alarm=heard, every=25) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=1e-3), 45, clip)
    assert [each[:3] for each in heard] == [("2", 40, "exploding")]


@pytest.mark.parametrize("fused", [False, True])
def test_with_grad_scaler_gradients_are_unscaled(fused):
    model, heard = network(), Heard()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    gradients = []
    with gk.GradientMonitor(model, alarm=heard) as monitor:
        for _ in range(3):
            x = torch.randn(32, 6)
            loss = F.cross_entropy(model(x), x[:, :3].argmax(1))
            gradients.append([grad.norm().item() for grad in torch.autograd.grad(loss, [model[4].weight], retain_graph=True)])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update(2.0**16)
    weight_and_bias = [row[2] for row in monitor.to_dict()["gradient_norm"]]
    assert all(norm <= found <= 2 * norm for (norm,), found in zip(gradients, weight_and_bias, strict=True))


def test_with_a_closure_gradients_are_read_after_the_step():
    model, heard = network(), Heard()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=1)

    def closure():
        optimizer.zero_grad()
        x = torch.randn(32, 6)
        loss = F.cross_entropy(model(x), x[:, :3].argmax(1))
        loss.backward()
        return loss

    with gk.GradientMonitor(model, alarm=heard) as monitor:
        for _ in range(3):
            optimizer.step(closure)
            expected = math.hypot(*(parameter.grad.norm().item() for parameter in model[2].parameters()))
            assert monitor.to_dict()["gradient_norm"][-1][1] == pytest.approx(expected, rel=1e-6)
    assert not heard


def test_steps_that_are_not_recorded_are_heard_of():
    model, heard = network(), Heard()
    with gk.GradientMonitor(model, every=30, alarm=heard) as monitor:
        train(model, Idle(model.parameters()), 45, plant(model, "0", {7: math.nan, 41: 1e3}))
    assert [each[:3] for each in heard] == [("0", 7, "non-finite"), ("0", 41, "exploding")]
    found = monitor.to_dict()
    assert found["steps"] == [0, 30]
    assert all(value is not None for name in ("gradient_norm", "weight_norm", "update_ratio") for row in found[name] for value in row)
    assert len(found["update_ratio"]) == 2


def test_optimizers_that_take_turns_are_judged_together():
    """The first layer vanishes only compared with layers that another optimizer holds."""
    model, heard = network(), Heard()
    body, head = torch.optim.SGD(model[0].parameters(), lr=0.0), torch.optim.SGD(model[2:].parameters(), lr=0.0)
    spoil = plant(model, "0", dict.fromkeys(range(100), 1e-6))
    with gk.GradientMonitor(model, alarm=heard, read_every=1):
        train(model, head, WARM_UP, lambda step: (spoil(step), body.step()))
    assert [each[:3] for each in heard] == [("0", WARM_UP - 1, "vanishing")]


def trained(alarm):
    torch.manual_seed(3)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    spoil = plant(model, "2", {30: 1e3, 33: 1e3})
    monitor = gk.GradientMonitor(model, alarm=alarm, read_every=2)
    train(model, optimizer, 40, spoil)
    monitor.remove()
    return [*model.state_dict().values(), torch.get_rng_state()]


def failing(name, step, reason, value):
    raise ZeroDivisionError("the alarm itself fails")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("alarm", [failing, "warn"])
def test_an_exception_in_the_alarm_is_reported_once_and_changes_nothing(alarm, caplog):
    """With filterwarnings=error, the warning of alarm="warn" is an exception, too."""
    expected = trained(None)
    assert all(map(torch.equal, trained(alarm), expected))
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "the alarm of GradientMonitor raised an exception" in record.message
    assert record.exc_info[0] is (ZeroDivisionError if alarm is failing else RuntimeWarning)


def test_an_alarm_may_read_reports():
    model, heard = network(), Heard()

    def alarm(*event):
        heard(*event)
        assert f"step {event[1]}" in monitor.table(event[1])

    with gk.GradientMonitor(model, alarm=alarm) as monitor:
        train(model, Idle(model.parameters()), 70, plant(model, "2", dict.fromkeys((3, 5, 33, 60, 69), math.nan)))
    assert [step for _, step, _, _ in heard] == [3, 5, 33, 60, 69]
    assert not monitor._recorder.watch._has_failed


def test_what_stops_a_program_is_not_held_back():
    def interrupt(name, step, reason, value):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(interrupt)


def test_warnings():
    model = network()

    def spoil(step):
        plant(model, "2", {40: 1e3, 42: math.nan})(step)
        plant(model, "4", {42: math.inf})(step)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        with gk.GradientMonitor(model, alarm="warn"):
            train(model, Idle(model.parameters()), 41, spoil)
            train(model, Idle(model.parameters()), 2, lambda step: spoil(step + 41))
    assert [warning.category for warning in caught] == [RuntimeWarning] * 2
    first, second = (str(warning.message) for warning in caught)
    assert first.startswith("step 40: exploding gradient in 2; the norm in 2 is ")
    assert first.endswith(
        "standard deviations above its past. gradkernels.attach_clipping(optimizer, gradkernels.clipping.ZScore()) clips such steps"
    )
    finds = "gradkernels.diagnose(model, batch, loss_fn) finds the operator that produced it"
    assert second == f"step 42: non-finite gradient in 2, 4; the norm in 2 is nan. {finds}"


def test_a_monitor_can_be_pickled_between_backward_and_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twins = []

    def pickle_and_copy(step):
        twins.append(pickle.loads(pickle.dumps(monitor)))
        twins.append(copy.deepcopy(monitor))

    with gk.GradientMonitor(model, alarm="warn") as monitor:
        train(model, optimizer, 1)
        train(model, optimizer, 1, pickle_and_copy)
        twins.append(pickle.loads(pickle.dumps(monitor)))
    found = monitor.to_dict()
    for twin, steps in zip(twins, (1, 1, 2), strict=True):
        records = twin.to_dict()
        assert records["gradient_norm"] == found["gradient_norm"][:steps]
        assert records["activations"] == {step: values for step, values in found["activations"].items()}


@pytest.mark.parametrize(
    ("alarm", "error", "words"),
    [
        ("print", ValueError, "alarm must be a function or \"warn\", not 'print'"),
        (3, TypeError, "alarm must be a function of \\(name, step, reason, value\\), not int"),
        (True, TypeError, "not bool"),
    ],
)
def test_wrong_alarms(alarm, error, words):
    model = network()
    with pytest.raises(error, match=words):
        gk.GradientMonitor(model, alarm=alarm)
    assert not any(module._forward_pre_hooks for module in model.modules())
