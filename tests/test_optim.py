"""attach_clipping, compared with clip_grad_norm_ and a step; and RMSprop, compared with torch's.

The error of a parameter after one step is at most max(torch's error, 2 ulp); the exact step is float64's.
"""

import copy
import gc
import itertools
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.library import opcheck
from torch.testing import assert_close

import gradkernels as gk
from accuracy import DTYPES, assert_bitwise_equal
from gradkernels import _native

OPS = torch.ops.gradkernels

SIZES = [(0,), (1,), (7,), (8,), (9,), (15,), (16,), (17,), (65,), (3, 1009)]
OPTIONS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "small alpha": {"alpha": 0.3, "centered": True},
    "everything": {"alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.9, "centered": True, "maximize": True},
}

each_options = pytest.mark.parametrize("options", OPTIONS)


def parameters(sizes=SIZES, dtype=torch.float32):
    made = []
    for size in sizes:
        made.append(nn.Parameter(torch.randn(size, dtype=torch.float64).to(dtype)))
        made[-1].grad = torch.randn(size, dtype=torch.float64).to(dtype)
    return made


def copies(params, dtype=None):
    made = []
    for param in params:
        made.append(nn.Parameter(param.detach().to(dtype or param.dtype, copy=True)))
        made[-1].grad = None if param.grad is None else param.grad.to(dtype or param.dtype, copy=True)
    return made


def ulps(actual, exact, before):
    """The largest error of the finite elements, in ulp of the largest term that a step adds."""
    exact, before = exact.detach().double(), before.detach().double()
    largest = torch.stack([exact.abs(), before.abs(), (exact - before).abs()]).amax(0)
    unit = (largest * torch.finfo(actual.dtype).eps).clamp(min=torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps)
    errors = ((actual.detach().double() - exact).abs() / unit)[exact.isfinite() & before.isfinite()]
    return errors.max().item() if errors.numel() else 0.0


# RMSprop


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_options
def test_rmsprop_steps_like_torchs(options, dtype):
    """Each of three steps begins with torch's state."""
    # The default of 1e-8 is 0 in float16, and torch would divide by it.
    options = {"eps": 1e-3, **OPTIONS[options]}
    theirs = parameters(dtype=dtype)
    exact, ours = copies(theirs, torch.float64), copies(theirs)
    torchs = torch.optim.RMSprop(theirs, lr=0.01, **options)
    exacts = torch.optim.RMSprop(exact, lr=0.01, **options)
    optimizer = gk.optim.RMSprop(ours, lr=0.01, **options)
    for step in range(3):
        for their, our, wide in zip(theirs, ours, exact, strict=True):
            their.grad.copy_(torch.randn_like(their))
            for copied in (our, wide):
                copied.data.copy_(their.data)
                copied.grad.copy_(their.grad)
        if step:
            optimizer.load_state_dict(copy.deepcopy(torchs.state_dict()))
            exacts.load_state_dict(copy.deepcopy(torchs.state_dict()))
        before = [{"param": param.detach().clone(), **copy.deepcopy(torchs.state[param])} for param in theirs]
        for each in (torchs, exacts, optimizer):
            each.step()
        for i, (their, our, wide) in enumerate(zip(theirs, ours, exact, strict=True)):
            all_of = [{"param": param, **each.state[param]} for param, each in ((our, optimizer), (their, torchs), (wide, exacts))]
            assert list(all_of[0]) == list(all_of[1])
            for name, our_value, their_value, exact_value in ((name, *(each[name] for each in all_of)) for name in all_of[1]):
                assert our_value.dtype == their_value.dtype and our_value.shape == their_value.shape
                start = before[i].get(name, torch.zeros_like(their_value))
                # The terms of a variance or of a momentum may cancel, which amplifies their rounding errors,
                # in torch too.
                bound = 8.0 if options.get("centered") or options.get("momentum") else 2.0
                if dtype == torch.float64:
                    assert ulps(our_value, their_value, start) <= 4 * bound, (name, i, step)
                else:
                    bound = max(bound, ulps(their_value, exact_value, start))
                    assert ulps(our_value, exact_value, start) <= bound, (name, i, step)


def test_rmsprop_of_large_parameters():
    """Parameters of several chunks, which begin at an offset."""
    ours = parameters([(65_535,), (65_537,), (3,), (200_003,)])
    theirs = copies(ours)
    for params, kind in ((ours, gk.optim.RMSprop), (theirs, torch.optim.RMSprop)):
        optimizer = kind(params, momentum=0.9, centered=True)
        optimizer.step()
        optimizer.step()
    assert_close([our.detach() for our in ours], [their.detach() for their in theirs])


@each_options
def test_rmsprop_equals_torchs_over_a_training(options):
    start = nn.Sequential(nn.Linear(5, 17), nn.Tanh(), nn.Linear(17, 3)).double()
    x = torch.randn(8, 5, dtype=torch.float64)
    results = []
    for kind in (gk.optim.RMSprop, torch.optim.RMSprop):
        model = copy.deepcopy(start)
        optimizer = kind(model.parameters(), lr=0.01, **OPTIONS[options])

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure) for _ in range(20)]
        results.append((losses, list(model.parameters()), optimizer.state_dict()))
    assert_close(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])
    assert results[0][2]["param_groups"] == results[1][2]["param_groups"]
    for ours, theirs in zip(results[0][2]["state"].values(), results[1][2]["state"].values(), strict=True):
        assert list(ours) == list(theirs)
        assert_close(ours, theirs)


def test_rmsprop_is_native(monkeypatch):
    """Except with foreach or differentiable, which take torch's step."""
    calls = []
    native = _native.C.rmsprop_
    monkeypatch.setattr(_native.C, "rmsprop_", lambda *args: calls.append(1) or native(*args))
    for options, expected in (
        ({}, 1),
        ({"lr": torch.tensor(0.01)}, 1),
        ({"foreach": True}, 0),
        ({"foreach": False}, 0),
        ({"differentiable": True}, 0),
    ):
        calls.clear()
        params = parameters()
        if options.get("differentiable"):
            params = [param.detach().clone() for param in params]
            for param in params:
                param.grad = torch.randn_like(param)
        theirs = [param.detach().clone() for param in params]
        for their, param in zip(theirs, params, strict=True):
            their.grad = param.grad.clone()
        gk.optim.RMSprop(params, **options).step()
        torch.optim.RMSprop(theirs, **options).step()
        assert len(calls) == expected, options
        assert_close([param.detach() for param in params], [their.detach() for their in theirs])


def test_rmsprop_without_a_kernel():
    wide = torch.randn(6, 8)
    for param, grad in (
        (torch.randn(5, dtype=torch.complex64), torch.randn(5, dtype=torch.complex64)),
        (wide[:, ::2], torch.randn(6, 4)),
        (torch.randn(6, 4), torch.randn(4, 6).t()),
        (torch.randn(6, 4), torch.randn(1, 4).expand(6, 4)),
    ):
        results = []
        for kind in (gk.optim.RMSprop, torch.optim.RMSprop):
            parameter = nn.Parameter(param.clone(memory_format=torch.preserve_format))
            parameter.grad = grad
            optimizer = kind([parameter], weight_decay=0.1)
            optimizer.step()
            optimizer.step()
            results.append(parameter.detach())
        assert_close(results[0], results[1])


def test_rmsprop_of_channels_last_parameters():
    results = []
    start, grad = (torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    for kind in (gk.optim.RMSprop, torch.optim.RMSprop):
        parameter = nn.Parameter(start.clone())
        parameter.grad = grad.clone()
        kind([parameter], momentum=0.9).step()
        results.append(parameter.detach())
    assert_close(results[0], results[1])


def test_rmsprop_of_parameters_that_share_memory():
    """They are updated one after the other, as in torch's loop. They are so large that threads could collide."""
    memory, *grads = (torch.randn(size, dtype=torch.float64) for size in (100_003, *[70_003] * 3))
    found = []
    for optimizer, options in ((gk.optim.RMSprop, {}), (torch.optim.RMSprop, {"foreach": False})):
        own = memory.clone()
        params = [nn.Parameter(own[start : start + 70_003]) for start in (0, 30_000, 11)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        made = optimizer(params, lr=0.1, momentum=0.9, weight_decay=0.1, **options)
        for _ in range(2):
            made.step()
        found.append(own)
    assert_close(*found, rtol=1e-9, atol=1e-9)
    assert not torch.equal(found[0], memory)


def test_rmsprop_loads_what_torchs_saved_and_the_other_way_round():
    for first, second in itertools.permutations((gk.optim.RMSprop, torch.optim.RMSprop)):
        params = parameters()
        optimizer = first(params, momentum=0.9, centered=True)
        optimizer.step()
        other_params = copies(params)
        other = second(other_params, momentum=0.9, centered=True)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
        other.step()
        assert_close([param.detach() for param in params], [param.detach() for param in other_params])


def test_rmsprop_uses_its_kernel_with_a_step_count_on_any_device(monkeypatch):
    """torch makes the step count on the default device, which is meta here."""
    monkeypatch.setattr(gk.optim, "rmsprop", None)
    params = parameters()
    theirs = copies(params)
    optimizer, torchs = gk.optim.RMSprop(params), torch.optim.RMSprop(theirs)
    for made in (optimizer, torchs):
        made.step()
    with torch.device("meta"):
        optimizer.step()
    torchs.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [2] * len(params)

    for each in optimizer.state.values():
        each["step"] = each["step"].to("meta")
    optimizer.step()
    torchs.step()
    assert_close([param.detach() for param in params], [param.detach() for param in theirs])

    made_on_meta = gk.optim.RMSprop(params)
    with torch.device("meta"):
        made_on_meta.step()
    assert all(made_on_meta.state[param]["step"].is_meta for param in params)


def test_rmsprop_copies_and_pickles():
    params = parameters([(5,)])
    optimizer = gk.optim.RMSprop(params, max_norm=0.5, norm_type=math.inf)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (other.max_norm, other.norm_type) == (0.5, math.inf)
        other.step()
        assert other.last_norm is not None


def test_rmsprop_refuses_with_torchs_messages():
    for options in ({"lr": -1.0}, {"alpha": -1.0}, {"eps": -1.0}, {"momentum": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError) as theirs:
            torch.optim.RMSprop(parameters([(3,)]), **options)
        with pytest.raises(ValueError) as ours:
            gk.optim.RMSprop(parameters([(3,)]), **options)
        assert str(ours.value) == str(theirs.value)
    parameter = nn.Parameter(torch.randn(3))
    parameter.grad = torch.eye(3)[0].to_sparse()
    with pytest.raises(RuntimeError, match="RMSprop does not support sparse gradients"):
        gk.optim.RMSprop([parameter]).step()


def test_rmsprop_skips_parameters_without_a_gradient_and_counts_versions():
    params = parameters([(3,), (4,)])
    params[0].grad = None
    before = params[0].detach().clone()
    versions = [param._version for param in params]
    optimizer = gk.optim.RMSprop(params)
    optimizer.step()
    assert_bitwise_equal("without a gradient", params[0].detach(), before)
    assert [param._version for param in params] == [versions[0], versions[1] + 1]
    assert params[0] not in optimizer.state or not optimizer.state[params[0]]
    assert optimizer.state[params[1]]["step"].item() == 1


def test_rmsprop_has_the_same_bits_for_any_number_of_threads(each_thread_count):
    start = parameters([(3, 50_021), (200_003,), (5,)])

    def run():
        params = copies(start)
        optimizer = gk.optim.RMSprop(params, momentum=0.9, centered=True, max_norm=1.0)
        optimizer.step()
        optimizer.step()
        return [param.detach() for param in params]

    for one, two in zip(*each_thread_count(run), strict=True):
        assert_bitwise_equal("parameter", one, two)


@pytest.mark.parametrize("max_norm", [0.37, 1e9, 0.0, -1.0, 1e-42, math.nan], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0], ids=str)
def test_rmsprop_clips_over_all_groups(norm_type, max_norm):
    ours = parameters()
    theirs = copies(ours)
    optimizer = gk.optim.RMSprop([{"params": ours[:4]}, {"params": ours[4:], "lr": 0.1}], max_norm=max_norm, norm_type=norm_type)
    torchs = torch.optim.RMSprop([{"params": theirs[:4]}, {"params": theirs[4:], "lr": 0.1}])
    for _ in range(2):
        expected = gk.clip_grad_norm_(theirs, max_norm, norm_type)
        torchs.step()
        optimizer.step()
        assert_close(optimizer.last_norm, expected, rtol=1e-5, atol=0)
        assert_close([our.detach() for our in ours], [their.detach() for their in theirs], equal_nan=True, rtol=1e-4, atol=1e-5)
        for our, their in zip(ours, theirs, strict=True):
            their.grad.copy_(torch.randn_like(their))
            our.grad = their.grad.clone()


def test_rmsprop_clips_where_a_group_takes_torchs_step():
    ours = parameters([(5,), (9,)])
    theirs = copies(ours)
    optimizer = gk.optim.RMSprop([{"params": ours[:1]}, {"params": ours[1:], "foreach": True}], max_norm=0.1)
    torchs = torch.optim.RMSprop([{"params": theirs[:1]}, {"params": theirs[1:], "foreach": True}])
    gk.clip_grad_norm_(theirs, 0.1)
    torchs.step()
    optimizer.step()
    assert_close([our.detach() for our in ours], [their.detach() for their in theirs])


def test_without_the_library(monkeypatch):
    ours = parameters()
    theirs = copies(ours)
    gk.clip_grad_norm_(theirs, 0.1)
    torch.optim.RMSprop(theirs).step()
    monkeypatch.setattr(_native, "C", None)
    gk.optim.RMSprop(ours, max_norm=0.1).step()
    assert_close([our.detach() for our in ours], [their.detach() for their in theirs], rtol=1e-4, atol=1e-5)
    fused = parameters([(5,), (7,)])
    attached = torch.optim.SGD(fused, lr=0.1, fused=True)
    gk.attach_clipping(attached, 0.1)
    attached.step()
    assert_close(torch.cat([param.grad for param in fused]).norm(), torch.tensor(0.1), rtol=1e-4, atol=0)


def test_rmsprop_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        params, grads, square_avgs, grad_avgs, buffers = (
            [torch.rand(size, dtype=dtype) for size in ((3, 5), (0,), (17,))] for _ in range(5)
        )
        numbers = (0.1, 0.9, 1e-8, 0.1, 0.9, -0.5)
        opcheck(OPS.rmsprop_.default, (params, grads, square_avgs, grad_avgs, buffers, *numbers))
        opcheck(OPS.rmsprop_.default, (params, grads, square_avgs, [], [], *numbers))


def test_rmsprop_operator_refuses_before_it_writes():
    params, square_avgs = [torch.ones(3), torch.ones(4)], [torch.ones(3), torch.ones(4)]
    numbers = (0.1, 0.9, 1e-8, 0.0, 0.0, 1.0)
    for grads in (
        [torch.ones(3)],
        [torch.ones(3), torch.ones(5)],
        [torch.ones(3), torch.ones(4).double()],
        [torch.ones(3), torch.ones(8)[::2]],
    ):
        with pytest.raises(RuntimeError, match="rmsprop_"):
            OPS.rmsprop_(params, grads, square_avgs, [], [], *numbers)
    assert_bitwise_equal("the first parameter", params[0], torch.ones(3))


# attach_clipping


FUSED = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    # torch's Adagrad is fused only on the CPU.
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, fused=params[0].device.type == "cpu"),
}
OPTIMIZERS = FUSED | {
    "SGD, not fused": lambda params: torch.optim.SGD(params, lr=0.1),
    "AdamW, not fused": lambda params: torch.optim.AdamW(params, lr=0.1),
    "groups": lambda params: torch.optim.AdamW([{"params": params[:3]}, {"params": params[3:], "lr": 0.01}], fused=True),
    "a group that is not fused": lambda params: torch.optim.SGD(
        [{"params": params[:3], "fused": True}, {"params": params[3:], "fused": False}], lr=0.1
    ),
    "our RMSprop": lambda params: gk.optim.RMSprop(params, lr=0.1),
}

each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
each_fused = pytest.mark.parametrize("optimizer", FUSED)


SMALL = [(0,), (5,), (4,), (17,), (3, 1009)]


def details(params):
    return [param.detach() for param in params], [param.grad for param in params if param.grad is not None]


@each_optimizer
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0], ids=str)
@pytest.mark.parametrize("max_norm", [0.37, 1e9])
def test_attached_clipping_is_clip_grad_norm_and_a_step(max_norm, norm_type, optimizer):
    ours = parameters(SMALL)
    ours[2].grad = None
    theirs = copies(ours)
    our_optimizer, torchs = OPTIMIZERS[optimizer](ours), OPTIMIZERS[optimizer](theirs)
    handle = gk.attach_clipping(our_optimizer, max_norm, norm_type)
    for _ in range(3):
        expected = gk.clip_grad_norm_(theirs, max_norm, norm_type)
        torchs.step()
        our_optimizer.step()
        # For norm_type 3 torch sums in float32.
        assert_close(handle.last_norm, expected, rtol=1e-5, atol=0)
        assert_close(details(ours), details(theirs), rtol=1e-5, atol=1e-6)
        assert not {"grad_scale", "found_inf"} & set(vars(our_optimizer))
        for our, their in zip(ours, theirs, strict=True):
            if our.grad is not None:
                their.grad.copy_(torch.randn_like(their))
                our.grad.copy_(their.grad)


@each_fused
def test_a_fused_optimizer_scales_gradients_itself(optimizer, monkeypatch):
    """clip_grad_norm_ would write the gradients before the step."""
    params = parameters([(5,)])
    grad = params[0].grad.clone()
    seen = []
    ours = FUSED[optimizer](params)
    if not getattr(ours, "_step_supports_amp_scaling", False):
        pytest.skip(f"{optimizer} of torch {torch.__version__} does not read grad_scale")
    gk.attach_clipping(ours, 0.1)
    ours.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append((params[0].grad.clone(), optimizer.grad_scale.item())))
    ours.step()
    ((before, scale),) = seen
    assert_bitwise_equal("gradient before the step", before, grad)
    assert scale == pytest.approx((grad.norm().item() + 1e-6) / 0.1)


@each_optimizer
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("max_norm", [1.0, 0.0, -1.0, math.nan, math.inf, 1e-42], ids=str)
def test_attached_clipping_spreads_what_is_not_finite(max_norm, value, optimizer):
    for place in (None, 1):
        ours = parameters([(5,), (4,), (3,), (9,)])
        if place is not None:
            ours[place].grad[2] = value
        theirs = copies(ours)
        our_optimizer, torchs = OPTIMIZERS[optimizer](ours), OPTIMIZERS[optimizer](theirs)
        gk.attach_clipping(our_optimizer, max_norm)
        gk.clip_grad_norm_(theirs, max_norm)
        torchs.step()
        our_optimizer.step()
        assert_close([our.grad for our in ours], [their.grad for their in theirs], equal_nan=True) if "RMSprop" not in optimizer else None
        assert_close([our.detach() for our in ours], [their.detach() for their in theirs], equal_nan=True, rtol=1e-5, atol=1e-6)


@each_optimizer
@pytest.mark.parametrize("as_keyword", [False, True])
def test_attached_clipping_waits_for_the_closure(as_keyword, optimizer):
    start = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    x = torch.randn(8, 5) * 10
    results = []
    for attached in (True, False):
        model = copy.deepcopy(start)
        ours = OPTIMIZERS[optimizer](list(model.parameters()))
        if attached:
            handle = gk.attach_clipping(ours, 0.5)

        def closure(model=model, ours=ours, attached=attached):
            assert torch.is_grad_enabled()
            ours.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            if not attached:
                gk.clip_grad_norm_(model, 0.5)
            return loss

        losses = [(ours.step(closure=closure) if as_keyword else ours.step(closure)) for _ in range(3)]
        results.append((losses, [param.detach() for param in model.parameters()]))
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert handle.last_norm > 0.5


@each_optimizer
@pytest.mark.parametrize("unscales", [False, True])
def test_attached_clipping_with_grad_scaler(unscales, optimizer, device):
    """One of the steps has an inf and is skipped."""
    start = parameters([(5,), (4,), (3,), (9,)])
    results = []
    for attached in (True, False):
        params = copies(start)
        ours = OPTIMIZERS[optimizer](params)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0)
        handle = gk.attach_clipping(ours, 0.5) if attached else None
        norms = []
        for step in range(4):
            ours.zero_grad()
            loss = sum((param * (step + 2)).square().sum() for param in params)
            scaler.scale(loss * (math.inf if step == 1 else 1.0)).backward()
            if unscales or not attached:
                scaler.unscale_(ours)
            if not attached:
                norms.append(gk.clip_grad_norm_(params, 0.5))
            scaler.step(ours)
            scaler.update()
            assert not {"grad_scale", "found_inf"} & set(vars(ours))
            if attached:
                norms.append(handle.last_norm)
        results.append(([norm for step, norm in enumerate(norms) if step != 1], [param.detach() for param in params], scaler.get_scale()))
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert results[0][2] == 512.0


class CallsSuper(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


# The optimizer, and the gradient of a parameter.
NOT_SCALED_BY_TORCH = {
    "a step that calls super": (lambda params: CallsSuper(params, lr=0.1, momentum=0.9, fused=True), torch.zeros_like),
    "without the library": (FUSED["SGD"], torch.zeros_like),
    "DTensor": (FUSED["AdamW"], torch.zeros_like),
    **{
        f"{optimizer}, {layout}": (FUSED[optimizer], grad_of)
        for optimizer in FUSED
        for layout, grad_of in {
            "transposed": lambda param: torch.zeros(4, 3).t(),
            "gaps": lambda param: torch.full((3, 4, 2), 7.0)[..., 0],
        }.items()
    },
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("case", NOT_SCALED_BY_TORCH)
def test_gradients_that_a_fused_step_cannot_scale(case, scaled, device, monkeypatch, request):
    """With GradScaler, one of the steps has an inf and is skipped."""
    make, grad_of = NOT_SCALED_BY_TORCH[case]
    tensor = torch.ones(3, 4)
    if case == "DTensor":
        request.getfixturevalue("process_group")
        tensor = distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])
    elif device != "cpu" and "," in case:
        pytest.skip("on a GPU torch refuses gradients with other strides than their parameters")
    elif case == "without the library":
        monkeypatch.setattr(_native, "C", None)
    results = []
    for attached in (True, False):
        param = nn.Parameter(tensor.clone())
        param.grad = grad_of(param)
        optimizer = make([param])
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            pytest.skip(f"{type(optimizer).__name__} of torch {torch.__version__} does not read grad_scale")
        scaler = torch.amp.GradScaler(tensor.device.type, init_scale=1024.0, enabled=scaled)
        handle = gk.attach_clipping(optimizer, 0.5) if attached else None
        for step in range(4):
            optimizer.zero_grad(set_to_none=False)
            loss = (param * (step + 2)).square().sum() * (math.inf if scaled and step == 1 else 1.0)
            scaler.scale(loss).backward()
            if not attached:
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_([param], 0.5)
            scaler.step(optimizer)
            scaler.update()
            assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
            results.append((handle.last_norm if attached else norm, param.detach().clone(), param.grad.clone()))
        if "gaps" in case:
            assert (param.grad._base[..., 1] == 7).all()
    assert_close(results[:4], results[4:], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not results[0][1].isnan().any()


@each_fused
def test_an_expanded_gradient_is_refused_before_anything_is_written(optimizer):
    params = parameters([(5,), (2000,)])
    params[1].grad = torch.ones(1).expand(2000)
    before = copies(params)
    ours = FUSED[optimizer](params)
    gk.attach_clipping(ours, 0.1)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory location"):
        ours.step()
    assert_close(details(params), details(before), rtol=0, atol=0)
    assert not {"grad_scale", "found_inf"} & set(vars(ours))


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_calls_super_clips_once(with_closure):
    """torch wraps the step() of both classes, because it made optimizers of both."""
    weight = nn.Parameter(torch.zeros(2))
    torch.optim.SGD([weight])
    optimizer = CallsSuper([weight], lr=1.0)
    handle = gk.attach_clipping(optimizer, 1.0)

    def closure():
        weight.grad = torch.tensor([3.0, 4.0])

    for step in (1, 2):
        closure()
        optimizer.step(*[closure] * with_closure)
        assert handle.last_norm == 5
        assert_close(weight.detach(), torch.tensor([-0.6, -0.8]) * step)


@each_optimizer
@pytest.mark.parametrize("scaled", [False, True])
def test_an_exception_in_a_step_leaves_nothing_behind(scaled, optimizer, device):
    params = parameters([(5,), (4,), (3,), (9,)])
    ours = OPTIMIZERS[optimizer](params)
    gk.attach_clipping(ours, 0.1)

    def fail(*_):
        raise ValueError("on purpose")

    hook = ours.register_step_pre_hook(fail)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="on purpose"):
        if scaled:
            scaler.step(ours)
        else:
            ours.step()
    assert not {"grad_scale", "found_inf"} & set(vars(ours))
    hook.remove()

    def closure():
        raise ValueError("in the closure")

    with pytest.raises(ValueError, match="in the closure"):
        ours.step(closure)
    assert not {"grad_scale", "found_inf"} & set(vars(ours))
    ours.step()


@each_optimizer
def test_attached_clipping_does_not_change_the_state_dict(optimizer):
    params = parameters([(5,), (4,), (3,), (9,)])
    ours = OPTIMIZERS[optimizer](params)
    ours.step()
    before = copy.deepcopy(ours.state_dict())
    handle = gk.attach_clipping(ours, 0.1)
    assert_close(ours.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert ours.state_dict()["param_groups"] == before["param_groups"]
    ours.load_state_dict(before)
    ours.step()
    assert handle.last_norm is not None


@each_optimizer
def test_copies_and_pickles_do_not_clip_and_work(optimizer):
    params = parameters([(5,), (4,), (3,), (9,)])
    ours = OPTIMIZERS[optimizer](params)
    handle = gk.attach_clipping(ours, 1e-3)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        handle.last_norm = None
        copied = [param for group in other.param_groups for param in group["params"]]
        for param in copied:
            param.grad = torch.ones_like(param)
        other.step()
        assert handle.last_norm is None and all((param.grad == 1).all() for param in copied)
    ours.step()
    assert handle.last_norm is not None


def test_removed_clipping_no_longer_clips():
    params = parameters([(5,)])
    ours = torch.optim.SGD(params, lr=0.1, fused=True)
    assert "step" not in vars(ours)
    handle = gk.attach_clipping(ours, 1e-3)
    handle.remove()
    handle.remove()
    assert "step" not in vars(ours)
    grad = params[0].grad.clone()
    ours.step()
    assert_bitwise_equal("gradient", params[0].grad, grad)


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_with_a_learning_rate_scheduler(scheduler_first, recwarn):
    params = parameters([(5,)])
    ours = torch.optim.SGD(params, lr=0.1, fused=True)
    if scheduler_first:
        scheduler = torch.optim.lr_scheduler.StepLR(ours, 1)
    handle = gk.attach_clipping(ours, 1e-3)
    if not scheduler_first:
        scheduler = torch.optim.lr_scheduler.StepLR(ours, 1)
    ours.step()
    scheduler.step()
    assert params[0].grad.norm() < 1.1e-3
    handle.remove()
    params[0].grad.fill_(1.0)
    ours.step()
    scheduler.step()
    assert (params[0].grad == 1).all()
    assert not recwarn.list


def test_two_handles_and_a_changed_bound():
    params = parameters([(5,)])
    ours = torch.optim.SGD(params, lr=0.1, fused=True)
    first, second = gk.attach_clipping(ours, 1.0), gk.attach_clipping(ours, 0.5)
    params[0].grad.copy_(torch.randn(5) * 10)
    ours.step()
    assert_close(params[0].grad.norm(), torch.tensor(0.5), rtol=1e-5, atol=0)
    first.remove()
    second.max_norm = 0.25
    params[0].grad.copy_(torch.randn(5) * 10)
    ours.step()
    assert_close(params[0].grad.norm(), torch.tensor(0.25), rtol=1e-5, atol=0)


def test_nothing_to_clip():
    ours = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1, fused=True)
    handle = gk.attach_clipping(ours, 1.0)
    ours.step()
    assert handle.last_norm == 0


@pytest.mark.parametrize("given", [None, nn.Linear(2, 2)], ids=["None", "a model"])
def test_an_object_that_is_no_optimizer_is_refused(given):
    with pytest.raises(TypeError, match="is not an Optimizer"):
        gk.attach_clipping(given, 1.0)


class Accelerated(torch.optim.Optimizer):
    """Like accelerate's wrapper: holds the optimizer, and with a scaler restores the step that it first found."""

    def __init__(self, optimizer, scaler=None):
        self.optimizer, self.scaler = optimizer, scaler
        self._original_step = optimizer.step

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        if self.scaler is None:
            self.optimizer.step(closure)
        else:
            self.optimizer.step = lambda *args, **kwargs: self._original_step(*args, **kwargs)
            self.scaler.step(self.optimizer, closure)
            self.scaler.update()
            self.optimizer.step = self._original_step


class Lightened:
    """Like Lightning's wrapper: a subclass of the optimizer's class, with its attributes except step."""

    def __init__(self, optimizer):
        self.__dict__ = {name: value for name, value in optimizer.__dict__.items() if name != "step"}
        self.__class__ = type("Lightened" + type(optimizer).__name__, (Lightened, type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)


class LookedAhead(torch.optim.Optimizer):
    """Like timm's Lookahead: the optimizer has another name in it, and its step does not call its hooks."""

    def __init__(self, optimizer):
        self._optimizer_step_pre_hooks = {}
        self._base_optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self, closure=None):
        return self._base_optimizer.step(closure)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("wrap", [Accelerated, Lightened, LookedAhead, lambda optimizer: Accelerated(LookedAhead(optimizer))])
def test_clipping_of_a_wrapper_is_attached_to_its_optimizer(wrap, fused):
    params = parameters([(5,), (3, 2)])
    expected = copies(params)
    total = gk.clip_grad_norm_(expected, 0.1)
    torch.optim.SGD(expected, lr=1.0).step()
    inner = torch.optim.SGD(params, lr=1.0, fused=fused)
    wrapper = wrap(inner)
    handle = gk.attach_clipping(wrapper, 0.1)
    wrapper.step()
    assert_close(params, expected)
    assert_close(handle.last_norm, total)
    assert not {"grad_scale", "found_inf"} & {*inner.__dict__, *wrapper.__dict__}
    handle.remove()
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    wrapper.step()
    assert_close([param.detach() for param in params], [param - 1 for param in before])


@pytest.mark.parametrize("attached_first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_wrapper_with_a_grad_scaler(fused, attached_first, device):
    params = parameters([(5,), (3, 2)])
    expected = copies(params)
    total = gk.clip_grad_norm_(expected, 0.1)
    torch.optim.SGD(expected, lr=1.0).step()
    inner = torch.optim.SGD(params, lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    if attached_first:
        handle = gk.attach_clipping(inner, 0.1)
    wrapper = Accelerated(inner, scaler)
    if not attached_first:
        handle = gk.attach_clipping(wrapper, 0.1)
    for _ in range(2):
        scaler.scale(torch.ones(()))
        before = [param.detach().clone() for param in params]
        for param, again in zip(params, expected, strict=True):
            param.grad = again.grad * 1024 * (total / 0.1)
        wrapper.step()
        assert_close(
            [old - param for old, param in zip(before, params, strict=True)], [each.grad for each in expected], rtol=1e-3, atol=1e-6
        )
        assert_close(handle.last_norm, total, rtol=1e-4, atol=0)
        assert not {"grad_scale", "found_inf"} & {*inner.__dict__}


def test_a_wrapper_without_exactly_one_optimizer_is_refused():
    one, other = (torch.optim.SGD(parameters([(3,)]), lr=0.1) for _ in range(2))

    class Engine:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    class Two(LookedAhead):
        def __init__(self, optimizer, other):
            super().__init__(optimizer)
            self.other = other

    with pytest.raises(TypeError, match="Engine is not an Optimizer; pass the SGD in it, if this rank has whole gradients"):
        gk.attach_clipping(Engine(one), 1.0)
    deepspeeds = Accelerated(one)
    deepspeeds.optimizer = Engine(one)
    for wrapper, holds in ((Two(one, other), "2 optimizers"), (deepspeeds, "no optimizer of torch")):
        with pytest.raises(TypeError, match=rf"cannot use {type(wrapper).__name__}: .* it holds {holds}\. .*gradient_clipping"):
            gk.attach_clipping(wrapper, 1.0)
    with pytest.raises(ValueError, match="LBFGS"):
        gk.attach_clipping(Accelerated(torch.optim.LBFGS(parameters([(3,)]))), 1.0)


def test_a_subclass_whose_step_does_not_read_grad_scale():
    class Plain(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for param in self.param_groups[0]["params"]:
                    param.sub_(param.grad, alpha=self.param_groups[0]["lr"])

    weight = nn.Parameter(torch.zeros(2))
    optimizer = Plain([weight], lr=1.0, fused=True)
    gk.attach_clipping(optimizer, 1.0)
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))


def test_lbfgs_is_refused():
    with pytest.raises(ValueError, match="LBFGS: it evaluates the closure several times"):
        gk.attach_clipping(torch.optim.LBFGS(parameters([(3,)])), 1.0)


def test_an_optimizer_with_clipping_is_freed():
    ours = torch.optim.SGD(parameters([(5,)]), lr=0.1, fused=True)
    gk.attach_clipping(ours, 1.0)
    ours.step()
    freed = weakref.ref(ours)
    del ours
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("option", ["lr", "alpha", "eps", "weight_decay", "momentum"])
def test_an_integer_that_no_double_holds_is_refused_before_anything_is_written(option):
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = gk.optim.RMSprop([parameter], lr=0.1, momentum=0.9)
    optimizer.step()
    before = parameter.detach().clone()
    optimizer.param_groups[0][option] = 10**400
    with pytest.raises(OverflowError):
        optimizer.step()
    assert_bitwise_equal("parameter", parameter.detach(), before)
    assert optimizer.state[parameter]["step"] == 1
