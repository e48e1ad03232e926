"""The policies of attach_clipping, compared with plain transcriptions of the papers' rules in float64, and steps that are skipped."""

import copy
import io
import math
import pickle
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import gradkernels as gk
from gradkernels import gradients, optim
from gradkernels.clipping import Adaptive, Percentile, ZScore

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.3, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "SGD, not fused": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.3),
    "AdamW, not fused": lambda params: torch.optim.AdamW(params, lr=0.1),
    "our RMSprop": lambda params: gk.optim.RMSprop(params, lr=0.1, momentum=0.9),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@pytest.fixture(params=["the host knows", "only the device knows"])
def where_the_norm_is(request, monkeypatch):
    """Whether the host reads norms at once, as on the CPU, or leaves the decision to torch's fused step, as on a GPU."""
    if request.param == "only the device knows":
        monkeypatch.setattr(optim, "_is_on_host", lambda tensor: False)


def parameters(dtype=torch.float64):
    return [nn.Parameter(torch.randn(size, dtype=dtype)) for size in ((5,), (3, 7), (33,))]


def copies(params):
    return [nn.Parameter(param.detach().clone()) for param in params]


def set_gradients(params, norm, seed, scale=1.0):
    """Gradients with this total norm, the same for every list of parameters with these shapes."""
    generator = torch.Generator("cpu").manual_seed(seed)
    grads = [torch.randn(param.shape, dtype=torch.float64, generator=generator, device="cpu") for param in params]
    factor = norm * scale / math.sqrt(sum(grad.square().sum().item() for grad in grads))
    for param, grad in zip(params, grads, strict=True):
        param.grad = (grad * factor).to(param)


def norms_with_spikes(steps):
    generator = torch.Generator("cpu").manual_seed(0)
    norms = torch.exp(0.3 * torch.randn(steps, dtype=torch.float64, generator=generator, device="cpu")).tolist()
    return [norm * (40.0 if step in (30, 31, 55) else 1.0) for step, norm in enumerate(norms)]


def autoclip(q, window):
    """Seetharaman et al. 2020, algorithm 1, over the last `window` norms."""
    history = deque(maxlen=window)

    def bound(norm):
        history.append(norm)
        return np.percentile(history, q)

    return bound


def zclip(threshold, decay):
    """Kumar et al. 2025, algorithm 1 with reciprocal clipping, a warm-up of 25 steps, and the eps of the authors' program."""
    warm_up = []
    mean = variance = None

    def bound(norm):
        nonlocal mean, variance
        if mean is None:
            warm_up.append(norm)
            if len(warm_up) == 25:
                mean = sum(warm_up) / 25
                variance = sum((each - mean) ** 2 for each in warm_up) / 25
            return math.inf
        std = math.sqrt(variance)
        z = (norm - mean) / (std + 1e-6)
        clipped = mean + threshold**2 / z * std if z > threshold else norm
        mean = decay * mean + (1 - decay) * clipped
        variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
        return clipped if z > threshold else math.inf

    return bound


POLICIES = {
    "Percentile": (Percentile(), lambda: autoclip(10, 1000)),
    "Percentile with a window": (Percentile(q=61.7, window=20), lambda: autoclip(61.7, 20)),
    "ZScore": (ZScore(), lambda: zclip(2.5, 0.97)),
    "ZScore with options": (ZScore(threshold=1.5, decay=0.8), lambda: zclip(1.5, 0.8)),
}
each_policy = pytest.mark.parametrize("policy", POLICIES)


@each_optimizer
@each_policy
def test_a_policy_clips_as_in_the_paper(policy, optimizer, where_the_norm_is):
    """In a training in which three spikes are planted."""
    made, transcription = POLICIES[policy]
    bound = transcription()
    ours = parameters()
    theirs = copies(ours)
    our_optimizer, their_optimizer = OPTIMIZERS[optimizer](ours), OPTIMIZERS[optimizer](theirs)
    handle = gk.attach_clipping(our_optimizer, made)
    clipped = []
    for step, norm in enumerate(norms_with_spikes(80)):
        for params in (ours, theirs):
            set_gradients(params, norm, step)
        our_optimizer.step()
        largest = bound(norm)
        clipped.append(largest < norm)
        torch.nn.utils.clip_grad_norm_(theirs, largest)
        their_optimizer.step()
        assert_close(handle.last_norm.item(), norm, rtol=1e-12, atol=0)
        # A fused step of torch divides by a float32.
        assert_close([param.detach() for param in ours], [param.detach() for param in theirs], rtol=1e-6, atol=1e-6)
    assert clipped[30] and clipped[31] and clipped[55]


@each_optimizer
@pytest.mark.parametrize("scaled", [False, True])
def test_adaptive_clipping_in_a_step(scaled, optimizer):
    ours = parameters(torch.float32)
    theirs = copies(ours)
    our_optimizer, their_optimizer = OPTIMIZERS[optimizer](ours), OPTIMIZERS[optimizer](theirs)
    handle = gk.attach_clipping(our_optimizer, Adaptive(clip_factor=0.1), nonfinite="skip")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
    for step in range(3):
        scaler.scale(torch.ones(()))
        set_gradients(ours, 3.0, step, scaler.get_scale())
        set_gradients(theirs, 3.0, step)
        scaler.step(our_optimizer)
        scaler.update()
        gk.adaptive_clip_grad_(theirs, 0.1)
        their_optimizer.step()
        assert_close([param.detach() for param in ours], [param.detach() for param in theirs])
        assert_close(handle.last_norm, torch.tensor(3.0))
    set_gradients(ours, math.nan, 0)
    our_optimizer.step()
    assert handle.skipped == 1 and handle.state_dict()["policy"] == "Adaptive"


@pytest.mark.parametrize("bound", [None, 0.5, Percentile(q=50.0), ZScore(), Adaptive()], ids=str)
def test_complex_gradients_have_a_real_norm(bound):
    """No kernel takes them, and torch's total norm of them is real."""
    params = [nn.Parameter(torch.randn(3, dtype=dtype)) for dtype in (torch.complex64, torch.float32)]
    for param in params:
        param.grad = torch.randn_like(param)
    expected = torch.nn.utils.get_total_norm([param.grad for param in params])
    optimizer = torch.optim.SGD([{"params": params, "max_norm": 0.5}], lr=0.1)
    handle = gk.attach_clipping(optimizer, bound, nonfinite="skip")
    optimizer.step()
    assert_close(handle.last_norm, expected)


@each_policy
def test_a_saved_policy_goes_on_exactly(policy):
    made, _ = POLICIES[policy]
    norms = norms_with_spikes(60)
    start = parameters()
    results = []
    for interrupted in (False, True):
        params = copies(start)
        optimizer = torch.optim.SGD(params, lr=0.1)
        handle = gk.attach_clipping(optimizer, made, nonfinite="skip")
        for step, norm in enumerate(norms):
            if interrupted and step in (0, 28, 31):
                file = io.BytesIO()
                torch.save(handle.state_dict(), file)
                file.seek(0)
                handle.remove()
                handle = gk.attach_clipping(optimizer, made, nonfinite="skip")
                handle.load_state_dict(torch.load(file, weights_only=True))
            set_gradients(params, math.inf if step in (3, 29) else norm, step)
            optimizer.step()
        assert handle.skipped == 2
        results.append(([param.detach() for param in params], handle.state_dict()["state"]))
    assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_a_state_of_another_policy_is_refused():
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    states = {}
    for max_norm in (1.0, Percentile(window=3), Percentile(window=4), ZScore()):
        handle = gk.attach_clipping(optimizer, max_norm)
        set_gradients(params, 1.0, 0)
        optimizer.step()
        states[max_norm] = handle.state_dict()
        handle.remove()
    handle = gk.attach_clipping(optimizer, Percentile(window=4))
    handle.load_state_dict(states[Percentile(window=4)])
    before = copy.deepcopy(handle.state_dict())
    for max_norm, words in (
        (1.0, "the state is that of a number, but this handle clips to Percentile"),
        (ZScore(), "the state is that of ZScore, but this handle clips to Percentile"),
        (Percentile(window=3), r"the state has 'norms' of shape \[3\], but Percentile\(q=10.0, window=4\) needs \[4\]"),
    ):
        with pytest.raises(ValueError, match=words):
            handle.load_state_dict(states[max_norm])
    with pytest.raises(KeyError):
        handle.load_state_dict({"policy": "Percentile"})
    assert_close(handle.state_dict()["state"], before["state"], equal_nan=True)


def test_a_state_that_cannot_be_copied_changes_nothing():
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    handle = gk.attach_clipping(optimizer, ZScore())
    set_gradients(params, 1.0, 0)
    optimizer.step()
    with pytest.raises(AttributeError):
        handle.load_state_dict({"policy": "ZScore", "state": {}, "skipped": 2})
    assert handle.state_dict()["state"]["count"] == 1


def test_a_copy_to_the_host_is_waited_for():
    """torch's other copies from a GPU are read before they have arrived."""
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1, fused=True)
    handle = gk.attach_clipping(optimizer, Percentile(), nonfinite="skip")

    class Watches(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            is_unsafe = function is torch.Tensor.to and args[1] == torch.device("cpu") and (kwargs or {}).get("non_blocking")
            assert not is_unsafe
            return function(*args, **(kwargs or {}))

    for norm in (1.0, 1.0, math.nan, 1.0):
        set_gradients(params, norm, 0)
        with Watches():
            optimizer.step()
    assert handle.skipped == 1


def test_a_changed_bound_holds_from_the_next_step_on():
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    handle = gk.attach_clipping(optimizer, Percentile())
    for max_norm, norm, expected in (
        (handle.max_norm, 8.0, 8.0),
        (2.0, 8.0, 2.0),
        (Percentile(q=0.0), 8.0, 8.0),
        (Percentile(q=0.0), 9.0, 8.0),
    ):
        handle.max_norm = max_norm
        set_gradients(params, norm, 0)
        optimizer.step()
        assert_close(gk.get_total_norm([param.grad for param in params]).item(), expected, rtol=1e-6, atol=0)
    assert handle.state_dict()["state"]["count"] == 2
    with pytest.raises(ValueError, match=r"param_group\[\"max_norm\"\], which no group has"):
        handle.max_norm = None
    assert handle.max_norm == Percentile(q=0.0)


# skipped steps


def snapshot(params, optimizer):
    state = {key: value for key, value in copy.deepcopy(optimizer.state_dict())["state"].items()}
    return [param.detach().clone() for param in params], state


STEPS = {
    "not finite": (math.nan, {"nonfinite": "skip"}),
    "above": (1e6, {"skip_above": 8.0}),
}


@each_optimizer
@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("bound", [1.0, ZScore()], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_skipped_step_did_not_happen(scaled, bound, case, optimizer, where_the_norm_is):
    """Steps 0, 29, and 30 are bad. The result is that of a training without them."""
    bad, options = STEPS[case]
    # ZScore has no bound in its first 25 steps.
    skips = {29, 30} if case == "above" and bound != 1.0 else {0, 29, 30}
    ours = parameters(torch.float32 if scaled else torch.float64)
    theirs = copies(ours)
    our_optimizer, their_optimizer = OPTIMIZERS[optimizer](ours), OPTIMIZERS[optimizer](theirs)
    handle = gk.attach_clipping(our_optimizer, bound, **options)
    reference = gk.attach_clipping(their_optimizer, bound)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000, enabled=scaled)
    for step in range(34):
        scaler.scale(torch.ones(()))
        for params, each in ((ours, our_optimizer), (theirs, their_optimizer)):
            if step in skips and params is theirs:
                continue
            set_gradients(params, bad if step in skips else 2.0 + step % 3, step, scaler.get_scale())
            scaler.step(each)
        if step in skips and math.isfinite(bad):
            assert not {"grad_scale", "found_inf"} & set(vars(our_optimizer))
        # A step that GradScaler skips is its own, and its scale would change.
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        if step in (1, 29, 30, 33):
            assert_close(snapshot(ours, our_optimizer), snapshot(theirs, their_optimizer), rtol=1e-5, atol=1e-6)
            assert_close(handle.state_dict()["state"], reference.state_dict()["state"], rtol=1e-6, atol=1e-6, equal_nan=True)
    counts = 0 if scaled and not math.isfinite(bad) else len(skips)
    assert handle.skipped == counts
    assert len(our_optimizer.state_dict()["state"]) == 3


class CallsSuper(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, CallsSuper])
def test_a_step_that_grad_scaler_skips_first_leaves_no_momentum(kind):
    """torch's fused SGD would leave an uninitialised buffer, and use it in the next step."""
    params = parameters(torch.float32)
    expected = copies(params)
    optimizer = kind(params, lr=0.1, momentum=0.9, dampening=0.3, fused=True)
    gk.attach_clipping(optimizer, 1e9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for norm in (math.inf, 1.0):
        scaler.scale(torch.ones(()))
        set_gradients(params, norm, 0, scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        if norm == math.inf:
            assert not optimizer.state_dict()["state"]
    set_gradients(expected, 1.0, 0)
    OPTIMIZERS["SGD"](expected).step()
    assert_close(params, expected)


@each_optimizer
def test_skipping_with_a_closure_and_accumulation(optimizer):
    """The second of two micro-batches has an inf. The step returns the loss of the closure."""
    model = nn.Linear(4, 2)
    ours = OPTIMIZERS[optimizer](list(model.parameters()))
    handle = gk.attach_clipping(ours, Percentile(), nonfinite="skip")
    before = [param.detach().clone() for param in model.parameters()]
    for factor in (math.inf, 1.0):

        def closure(factor=factor):
            ours.zero_grad()
            for weight in (1.0, factor):
                loss = model(torch.ones(3, 4)).square().sum() * weight
                loss.backward()
            return loss

        loss = ours.step(closure)
        assert loss.isinf() == math.isinf(factor)
        same = all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        assert same == math.isinf(factor)
    assert handle.skipped == 1 and handle.state_dict()["state"]["count"] == 1


@each_optimizer
def test_what_is_not_finite_raises_before_anything_is_written(optimizer):
    params = parameters()
    named = [("first", params[0]), ("second", params[1]), ("third", params[2])]
    for given, name in ((named, "second"), (params, "parameter 1")):
        ours = OPTIMIZERS[optimizer](given)
        handle = gk.attach_clipping(ours, ZScore(), nonfinite="raise")
        set_gradients(params, 1.0, 0)
        ours.step()
        before, policy = snapshot(params, ours), copy.deepcopy(handle.state_dict()["state"])
        set_gradients(params, 1.0, 0)
        params[1].grad[0, 0] = math.nan
        grads = [param.grad.clone() for param in params]
        with pytest.raises(RuntimeError, match=f"order 2.0 .* is non-finite, so it cannot be clipped.* is that of {name}$"):
            ours.step()
        assert_close(snapshot(params, ours), before, rtol=0, atol=0)
        assert_close([param.grad for param in params], grads, rtol=0, atol=0, equal_nan=True)
        assert_close(handle.state_dict()["state"], policy, rtol=0, atol=0)
        assert not {"grad_scale", "found_inf"} & set(vars(ours))
        handle.remove()


def test_raise_leaves_inf_to_grad_scaler():
    params = parameters(torch.float32)
    optimizer = OPTIMIZERS["AdamW"](params)
    gk.attach_clipping(optimizer, 1.0, nonfinite="raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    set_gradients(params, math.inf, 0)
    before = copies(params)
    scaler.step(optimizer)
    assert_close([param.detach() for param in params], [param.detach() for param in before], rtol=0, atol=0)


@each_optimizer
def test_an_exception_leaves_the_policy_as_it_was(optimizer):
    params = parameters()
    ours = OPTIMIZERS[optimizer](params)
    handle = gk.attach_clipping(ours, Percentile(q=50.0), skip_above=100.0)
    set_gradients(params, 1.0, 0)
    ours.step()
    before, policy = snapshot(params, ours), copy.deepcopy(handle.state_dict()["state"])

    def fail(*_):
        raise ValueError("on purpose")

    hook = ours.register_step_pre_hook(fail)
    set_gradients(params, 3.0, 1)
    with pytest.raises(ValueError, match="on purpose"):
        ours.step()
    hook.remove()
    assert_close(snapshot(params, ours), before, rtol=0, atol=0)
    assert_close(handle.state_dict()["state"], policy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_gradients_in_a_step(make, monkeypatch):
    """An embedding with sparse gradients, and a dense layer. Before torch 2.14, clipping them is torch's error."""
    torch_clips = gradients._TORCH_CLIPS_SPARSE
    start = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))

    def trained(clips_sparse, sparse):
        monkeypatch.setattr("gradkernels.gradients._TORCH_CLIPS_SPARSE", clips_sparse)
        model = copy.deepcopy(start)
        model[0].sparse = sparse
        optimizer = make(model.parameters(), lr=0.1)
        handle = gk.attach_clipping(optimizer, Percentile(q=50.0), nonfinite="skip")
        for factor in (3.0, 1.0, math.nan, 2.0):
            optimizer.zero_grad()
            (model(torch.tensor([1, 3, 1])).square().sum() * factor).backward()
            optimizer.step()
        return [param.detach() for param in model.parameters()], handle.skipped, handle.last_norm

    assert_close(trained(True, True), trained(True, False))
    if not torch_clips:
        with pytest.raises(NotImplementedError, match=r"linalg_vector_norm.*Sparse"):
            trained(False, True)


def test_two_handles_skip_each_for_itself():
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    first, second = gk.attach_clipping(optimizer, 1.0, skip_above=50.0), gk.attach_clipping(optimizer, 0.5, skip_above=1.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for norm in (100.0, 1.0, 0.6):
        set_gradients(params, norm, 0)
        optimizer.step()
        scheduler.step()
    assert (first.skipped, second.skipped) == (1, 1)


def test_a_monitor_records_the_steps_around_a_skipped_one():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gk.attach_clipping(optimizer, 1.0, nonfinite="skip")
    with gk.GradientMonitor(model) as monitor:
        for factor in (1.0, math.nan, 1.0):
            optimizer.zero_grad()
            (model(torch.ones(3, 4)).square().sum() * factor).backward()
            optimizer.step()
        assert "nan" not in monitor.table()


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_runs_no_post_hooks_and_the_alarm_hears_of_it(fused):
    weight, hooks, heard = nn.Linear(4, 2, bias=False), [], []
    optimizer = torch.optim.Adam(weight.parameters(), fused=fused)
    optimizer.register_step_post_hook(lambda *_: hooks.append("post"))
    gk.attach_clipping(optimizer, 1.0, nonfinite="skip")
    for is_early in (False, True):
        with gk.GradientMonitor(weight, alarm=lambda *event: heard.append(event[:3])) as monitor:
            for value in (1.0, math.nan, 1.0):
                weight.weight.grad = torch.full_like(weight.weight, value)
                if is_early:
                    monitor.record_gradients()
                optimizer.step()
    assert hooks == ["post"] * 4
    assert heard == [("(model)", 1, "non-finite")] * 2


# groups


def groups(params):
    return [{"params": params[:1], "max_norm": 0.5}, {"params": params[1:2], "max_norm": None}, {"params": params[2:], "max_norm": 0.25}]


GROUPED = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True),
    "AdamW, not fused": lambda groups: torch.optim.AdamW(groups, lr=0.1),
}


@pytest.mark.parametrize("optimizer", GROUPED)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf], ids=str)
def test_groups_with_bounds_of_their_own(norm_type, scaled, optimizer):
    ours = parameters(torch.float32)
    theirs = copies(ours)
    our_optimizer, their_optimizer = GROUPED[optimizer](groups(ours)), GROUPED[optimizer](groups(theirs))
    handle = gk.attach_clipping(our_optimizer, None, norm_type, nonfinite="skip", skip_above=1e6)
    checkpoint = copy.deepcopy(our_optimizer.state_dict())
    for group in checkpoint["param_groups"]:
        del group["max_norm"]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
    for step in range(4):
        if step == 2:
            # A checkpoint without the key: the values seen first hold.
            our_optimizer.load_state_dict({**checkpoint, "state": our_optimizer.state_dict()["state"]})
            assert "max_norm" not in our_optimizer.param_groups[0]
        scaler.scale(torch.ones(()))
        set_gradients(ours, 3.0, step, scaler.get_scale())
        set_gradients(theirs, 3.0, step)
        scaler.step(our_optimizer)
        scaler.update()
        total = gk.get_total_norm([param.grad for param in theirs], norm_type)
        gk.clip_grad_norm_(theirs[:1], 0.5, norm_type)
        gk.clip_grad_norm_(theirs[2:], 0.25, norm_type)
        their_optimizer.step()
        assert_close(handle.last_norm, total)
        assert_close([param.detach() for param in ours], [param.detach() for param in theirs])
    our_optimizer.param_groups[1]["max_norm"] = 1e-9
    set_gradients(ours, 3.0, 0)
    our_optimizer.step()
    assert handle.skipped == 1
    our_optimizer.param_groups[1]["max_norm"] = "much"
    with pytest.raises(ValueError, match="could not convert string to float"):
        our_optimizer.step()


# refused


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        (lambda params: Percentile(q=-0.1), ValueError, r"q must be a percentile from 0 to 100, got -0.1"),
        (lambda params: Percentile(q=100.5), ValueError, r"q must be a percentile from 0 to 100, got 100.5"),
        (lambda params: Percentile(q=math.nan), ValueError, r"q must be a percentile from 0 to 100, got nan"),
        (lambda params: Percentile(window=0), ValueError, r"window must be at least 1 norm, got 0"),
        (lambda params: Percentile(window=2.5), TypeError, "integer"),
        (lambda params: Percentile("much"), TypeError, "not supported between"),
        (lambda params: Adaptive(clip_factor=-0.01), ValueError, "clip_factor must be a positive ratio of norms, got -0.01"),
        (
            lambda params: gk.attach_clipping(torch.optim.SGD(params), Adaptive(), skip_above=2.0),
            ValueError,
            "skip_above multiplies a bound of the total norm, and Adaptive has none",
        ),
        (lambda params: ZScore(threshold=0), ValueError, "threshold must be a positive z-score, got 0"),
        (lambda params: ZScore(decay=1.0), ValueError, r"decay must be in \[0, 1\), got 1.0"),
        (lambda params: gk.attach_clipping(torch.optim.LBFGS(params), Percentile()), ValueError, "does not support LBFGS"),
        (
            lambda params: gk.attach_clipping(torch.optim.SGD(params), None),
            ValueError,
            r'^max_norm=None reads param_group\["max_norm"\], which no group has; not to clip, do not attach$',
        ),
        (lambda params: gk.attach_clipping(torch.optim.SGD(params), Percentile), TypeError, "must be a string or a real number"),
        (lambda params: gk.attach_clipping(torch.optim.SGD(params), 1.0, nonfinite="ignore"), ValueError, "got 'ignore'"),
        (
            lambda params: gk.attach_clipping(torch.optim.SGD(params), 1.0, skip_above=0),
            ValueError,
            "positive multiple of the bound, got 0",
        ),
        (lambda params: gk.attach_clipping(torch.optim.SGD(params), 1.0, skip_above=math.nan), ValueError, "got nan"),
    ],
)
def test_wrong_arguments_are_refused(wrong, kind, words):
    with pytest.raises(kind, match=words):
        wrong(parameters())


def test_a_policy_is_immutable():
    with pytest.raises(AttributeError):
        Percentile().q = 20.0
    assert len({Percentile(), Percentile(q=10.0), ZScore()}) == 2


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_is_not_copied(copied):
    """A copy could neither change nor stop the clipping of its optimizer."""
    handle = gk.attach_clipping(torch.optim.SGD(parameters()), 1.0)
    with pytest.raises(TypeError, match="cannot be copied or pickled, because it belongs to one optimizer"):
        copied(handle)
