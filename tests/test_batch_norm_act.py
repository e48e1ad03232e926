"""batch_norm_act and BatchNormAct1d/2d/3d: values, gradients, running statistics, errors, torch's machinery.

Errors are counted in ulp of the largest element of a tensor, because elements of y and of the gradients are
differences of larger terms; where all elements cancel, they are counted in ulp of the terms. "torch's" result
is that of gradkernels.reference in x's dtype, the "exact" one has more digits (accuracy.py).
"""

import contextlib
import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import DeterministicGuard
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from accuracy import (
    DTYPES,
    SIXTEEN_BITS,
    ULP_BOUND,
    WIDE_DTYPES,
    activation_scales,
    assert_accurate,
    assert_bitwise_equal,
    exact_activation,
    exact_batch_norm_act,
    extended,
    outcome,
    spacing,
    swept,
)
from batch_norm_act_calls import (
    ACTS,
    HARD_INPUTS,
    MEMORY_FORMATS,
    NUMBERS,
    TWO_SLOPES,
    arguments,
    call,
    cast,
    hard_input,
    judged,
    laid_out,
    without_kinks,
)
from gradkernels import acts, reference
from memory import saved_by
from models.resnet import BasicBlock, ResNet

OPS = torch.ops.gradkernels

OPERANDS = ("x", "running_mean", "running_var", "weight", "bias", "residual")
MODULES = {2: (gk.BatchNormAct1d, nn.BatchNorm1d), 3: (gk.BatchNormAct1d, nn.BatchNorm1d)}
MODULES |= {4: (gk.BatchNormAct2d, nn.BatchNorm2d), 5: (gk.BatchNormAct3d, nn.BatchNorm3d)}

# Runs of 1, 5 x 5 and 7 x 7 elements and long ones; 1, 3, 64 and 65 channels; elements of a channel around
# the tiles of 4096 and 8192.
SHAPES = [
    *[(2, 1), (7, 3), (64, 65), (129, 100), (4097, 3)],
    *[(4, 3, 1), (8, 5, 7), (3, 65, 15), (2, 64, 129), (1, 3, 4095), (1, 2, 4096), (1, 3, 4097), (3, 2, 2731), (1, 1, 16385)],
    *[(5, 3, 1, 1), (4, 65, 5, 5), (8, 64, 7, 7), (2, 3, 56, 56), (3, 1, 64, 43), (2, 2, 64, 65), (167, 3, 7, 7)],
    *[(2, 3, 4, 5, 6), (1, 65, 2, 3, 3), (2, 1, 9, 16, 29)],
]

each_dtype = pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
each_act = pytest.mark.parametrize("act", ACTS)
each_training = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
each_residual = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])


def assert_all_accurate(given, training, act, momentum=0.1, eps=1e-5, most=math.inf):
    for name, (ours, theirs, exact, scale) in judged(given, training, act, momentum, eps).items():
        assert_accurate(name, ours, theirs, exact, per="tensor", scale=scale, most=most)


def bits_of(result):
    return {name: tensor for name, tensor in result.items() if tensor is not None}


def assert_same_bits(actual, expected):
    for name, tensor in bits_of(expected).items():
        assert_bitwise_equal(name, actual[name], tensor)


# values


@each_dtype
@each_training
@each_residual
@each_act
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_gradients_and_running_statistics(shape, act, residual, training, dtype):
    assert_all_accurate(arguments(shape, dtype, residual=residual), training, act)


@each_dtype
@each_act
@pytest.mark.parametrize("shape", [(1, 5), (1, 3, 1), (1, 65, 1, 1), (1, 3, 1, 1, 1)], ids=str)
def test_one_value_per_channel_in_evaluation(shape, act, dtype):
    assert_all_accurate(arguments(shape, dtype, residual=True), False, act)


@each_dtype
@each_training
@each_residual
@each_act
@pytest.mark.parametrize("shape", [(4, 65, 5, 5), (2, 3, 33, 17), (5, 1, 7, 3), (5, 3, 1, 1), (2, 5, 3, 4, 5)], ids=str)
def test_channels_last(shape, act, residual, training, dtype):
    memory_format = MEMORY_FORMATS[len(shape)]
    given = arguments(shape, dtype, residual=residual)
    for name in ("x", "grad_y"):
        given[name] = given[name].contiguous(memory_format=memory_format)
    if residual:
        given["residual"] = given["residual"].contiguous(memory_format=memory_format)
    assert_all_accurate(given, training, act)
    y = call(gk.batch_norm_act, given, training, act)["y"]
    assert y.stride() == call(reference.batch_norm_act, given, training, act)["y"].stride()


@each_act
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_act_over_the_whole_range(act, dtype):
    """With a mean of 0, a variance of 1 and no eps, the activation gets x. In 16 bits, every number."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype) if dtype in SIXTEEN_BITS else swept()[::7].to(dtype)
    x = x[: x.numel() // 8 * 8].view(-1, 8).requires_grad_()
    number = torch.tensor(NUMBERS[act], dtype=torch.float32).item()
    y = gk.batch_norm_act(x, torch.zeros(8, dtype=dtype), torch.ones(8, dtype=dtype), eps=0.0, act=act, act_param=ACTS[act] and number)
    torchs = acts.ACTS[act].function(x, number)
    grad_x, torchs_grad_x = (torch.autograd.grad(each, x, torch.ones_like(x))[0] for each in (y, torchs))
    with np.errstate(all="ignore"):
        exact_y, exact_grad_x = exact_activation(x.detach(), torch.ones_like(x), act, number)
        scales = activation_scales(x.detach(), torch.ones_like(x), act, number)
    told = torch.from_numpy(~np.isnan(exact_y))
    assert_bitwise_equal("numbers", ~y.isnan(), told)
    # The bias, which is 0, is added to -0.
    zeros = (y == 0) & (torchs == 0) & (x != 0)
    assert_bitwise_equal("signs of zeros", y[zeros].signbit(), torchs[zeros].signbit())
    for what, *each, scale in (("y", y, torchs, exact_y, scales[0]), ("grad_x", grad_x, torchs_grad_x, exact_grad_x, scales[1])):
        assert_accurate(what, *(of.detach()[told] for of in each[:2]), each[2][told], scale=np.broadcast_to(scale, told.shape)[told])


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
def test_errors_of_gelu_and_mish(dtype):
    """The bounds of docs/numerics.md and csrc/math/normal.h: torch's own errors are far larger at some of these numbers."""
    x = torch.cat([torch.rand(80_000, dtype=torch.float64) * 8 - 4, torch.rand(40_000, dtype=torch.float64) * -12 - 1]).to(dtype)
    x = x.view(-1, 8).requires_grad_()
    allowed = ULP_BOUND / 2
    for act, right_of, ulps_of_y, ulps_of_grad in (("gelu", 0, 1.7, 2.1), ("gelu", -1, 3.0, 2.1), ("mish", -13, 2.6, 5.6)):
        y = gk.batch_norm_act(x, torch.zeros(8, dtype=dtype), torch.ones(8, dtype=dtype), eps=0.0, act=act)
        (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(x))
        exact_y, exact_grad_x = exact_activation(x.detach(), torch.ones_like(x), act, 0.0)
        scale = activation_scales(x.detach(), torch.ones_like(x), act, 0.0)[1]
        right = (x > right_of).numpy()
        for actual, exact, terms, bound in ((y, exact_y, 0, ulps_of_y), (grad_x, exact_grad_x, scale, ulps_of_grad)):
            unit = spacing(np.maximum(abs(exact), terms), dtype) * (1.1 if dtype == torch.float64 else 1)
            assert (abs(extended(actual) - exact) / unit)[right].max() <= allowed * bound
        if act == "gelu":
            t = -extended(x)
            bound = (3 + 2.5 * t + 1.6 * t**2) * torch.finfo(dtype).eps / 2
            assert (abs(extended(y) - exact_y) <= allowed * bound * abs(exact_y))[t > 0].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_hardswish_is_zero_at_its_minimum(dtype):
    x = torch.full((40, 1), -1.5, dtype=dtype, requires_grad=True)
    y = gk.batch_norm_act(x, torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype), eps=0.0, act="hardswish")
    assert_bitwise_equal("gradient", *torch.autograd.grad(y.sum(), x), torch.zeros_like(x))


# Rows of all channels that are no whole vectors, several of which make a line; many parts, each with a last line
# that is shorter. Then channels that are too many for one slab.
@each_dtype
@pytest.mark.parametrize("act", ["leaky_relu", "swish"])
@pytest.mark.parametrize("shape", [(2, 17, 90, 91), (1, 3, 151, 150), (3, 100, 30, 31), (1, 1100, 23, 23), (1, 2056, 23, 23)], ids=str)
def test_rows_that_are_folded_and_cut(shape, act, dtype):
    given = arguments(shape, dtype, residual=True)
    for name in ("x", "grad_y", "residual"):
        given[name] = given[name].contiguous(memory_format=torch.channels_last)
    assert_all_accurate(given, True, act)


@pytest.mark.parametrize("inputs", HARD_INPUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 2, 90, 91), (65_521, 2)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_statistics_of_hard_inputs(inputs, shape, channels_last, dtype):
    """At most 16 ulp, even where torch has no right digit: in its channels_last statistics of 1e4 +- 1e-2."""
    x = hard_input(inputs, shape, dtype, channels_last)
    if not x.isfinite().all():
        pytest.skip(f"{inputs} overflows in {dtype}")
    parameters = dtype if dtype in WIDE_DTYPES else torch.float32
    given = arguments(shape, parameters, x=x)
    assert_all_accurate(given | {"grad_y": given["grad_y"].to(dtype)}, True, "leaky_relu", most=16.0)


@pytest.mark.parametrize("inputs", HARD_INPUTS)
def test_statistics_of_short_runs(inputs):
    """Runs shorter than eight AVX-512 vectors: float32 sums over a run would make the variance wrong by 4 ulp."""
    x = hard_input(inputs, (32, 4, 9, 13), torch.float32, False)
    assert_all_accurate(arguments(x.shape, torch.float32, x=x), True, "leaky_relu", most=16.0)


@each_dtype
@each_residual
def test_reference_in_float64_is_exact(dtype, residual):
    """accuracy.py's formulas and gradkernels.reference agree within the rounding errors of float64 sums."""
    for act in ACTS:
        for training in (True, False):
            given = without_kinks(cast(arguments((6, 5, 4, 7), dtype, residual=residual), torch.float64), training, act)
            operands = (given[name] for name in ("x", "running_mean", "running_var", "weight", "bias"))
            exact = exact_batch_norm_act(
                *operands, training, 0.1, 1e-5, act=act, act_param=ACTS[act], residual=given["residual"], grad_y=given["grad_y"]
            )
            for name, tensor in bits_of(call(reference.batch_norm_act, given, training, act)).items():
                expected = torch.tensor(exact[name].astype(np.float64))
                assert_close(tensor, expected, rtol=1e-13, atol=1e-13, msg=lambda text, name=name, act=act: f"{act} {name}: {text}")


@each_dtype
@each_training
@pytest.mark.parametrize("left_out", ["weight", "bias", "weight bias", "running_mean running_var"])
def test_operands_left_out(left_out, training, dtype):
    if "running" in left_out and not training:
        return
    for shape in ((8, 5, 7), (129, 100), (2, 3, 56, 56)):
        given = without_kinks(arguments(shape, dtype, residual=True) | dict.fromkeys(left_out.split()), training, "leaky_relu")
        ours, theirs = (call(function, given, training, "leaky_relu") for function in (gk.batch_norm_act, reference.batch_norm_act))
        exact = call(reference.batch_norm_act, cast(given, torch.float64), training, "leaky_relu")
        assert ours.keys() == theirs.keys()
        for name, tensor in bits_of(ours).items():
            tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
            assert_close(tensor, exact[name].to(dtype), **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@each_act
def test_default_parameter(act):
    given = arguments((8, 5, 7), residual=True)
    default = acts.ACTS[act].default or 0.0
    assert_same_bits(
        call(gk.batch_norm_act, given, True, act, act_param=None), call(gk.batch_norm_act, given, True, act, act_param=default)
    )


@each_training
@pytest.mark.parametrize("param", [0.0, -0.5, 1.5])
@pytest.mark.parametrize("act", [name for name, act in acts.ACTS.items() if act.param])
def test_other_parameters(act, param, training):
    for residual in (False, True):
        given = without_kinks(arguments((8, 5, 7, 3), residual=residual), training, "relu")
        ours, theirs = (call(f, given, training, act, act_param=param) for f in (gk.batch_norm_act, reference.batch_norm_act))
        assert_close(bits_of(ours), bits_of(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 1.0, 0.9, -1.2])
def test_momentum(momentum):
    assert_all_accurate(arguments((8, 5, 7)), True, "leaky_relu", momentum=momentum)
    if momentum == 0.0:
        given = arguments((8, 5, 7))
        after = call(gk.batch_norm_act, given, True, "leaky_relu", momentum=0.0)
        assert_bitwise_equal("running_mean", after["running_mean"], given["running_mean"])
        assert_bitwise_equal("running_var", after["running_var"], given["running_var"])


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.6])
def test_eps(eps):
    for training in (True, False):
        assert_all_accurate(arguments((8, 5, 7)), training, "leaky_relu", eps=eps)


def on_the_cpu(tensors):
    """On the CPU torch's mean of an inf is inf.

    On a GPU it is nan, because torch updates the mean by differences.
    """
    return {name: None if tensor is None else tensor.cpu() for name, tensor in tensors.items()}


@each_act
@each_training
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf(value, training, act):
    """They spread over their channel as in torch, and to no other channel."""
    for shape in ((9, 5), (4, 5, 7, 7), (2, 3, 56, 56)):
        given = arguments(shape, residual=True)
        clean = call(gk.batch_norm_act, given, training, act)
        x = given["x"].clone()
        x[0, 0].fill_(value) if len(shape) == 2 else x[0, 0].view(-1)[0].fill_(value)
        x[-1, 2].fill_(value) if len(shape) == 2 else x[-1, 2].view(-1)[-1].fill_(value)
        ours = on_the_cpu(call(gk.batch_norm_act, given | {"x": x}, training, act))
        theirs = call(reference.batch_norm_act, on_the_cpu(given | {"x": x}), training, act)
        clean = on_the_cpu(clean)
        for name in bits_of(ours):
            channel = 1 if ours[name].dim() > 1 else 0
            assert_bitwise_equal(name, ours[name].select(channel, 1), clean[name].select(channel, 1))
            # At a nan torch's gradient is 0 for relu6 and nan for elu and hardswish in whole vectors, and grad_y in the
            # elements left over.
            if name.startswith("grad") and act in ("relu6", "elu", "hardswish") and (training or math.isnan(value)):
                continue
            for touched in (0, 2):
                our, their = (each[name].select(channel, touched) for each in (ours, theirs))
                if act == "gelu":
                    # torch's of inf is nan.
                    their = torch.where(their.isnan() & (our == math.inf), our, their)
                assert_close(our, their, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


# Values that one channel has among finite ones.
MET = {"inf": [math.inf], "-inf": [-math.inf], "both": [math.inf, -math.inf], "twice": [math.inf] * 2, "nan": [math.inf, math.nan]}


@pytest.mark.parametrize("met", MET.values(), ids=MET)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_running_statistics_of_infinities(channels_last, dtype, met):
    """A mean is inf or nan as in torch, whichever tile, slab or column the values are in."""
    # The last shape is cut into slabs.
    for shape in ((9, 5), (4, 5, 7, 7), (2, 3, 56, 56), *([(2, 2, 364, 365)] if dtype == torch.float32 else [])):
        parameters = dtype if dtype in WIDE_DTYPES else torch.float32
        given = arguments(shape, parameters)
        given |= {name: given[name].to(dtype) for name in ("x", "grad_y")}
        clean = call(gk.batch_norm_act, given | {"x": laid_out(given["x"], channels_last)}, True, "identity")
        for places in ((0, 1), (0, -1), (-2, -1)):
            x = given["x"].clone()
            for place, value in zip(places, met, strict=False):
                of_channel = x[:, 1].clone()
                of_channel.view(-1)[place] = value
                x[:, 1] = of_channel
            theirs = call(reference.batch_norm_act, on_the_cpu(given | {"x": x}), True, "identity")
            ours = call(gk.batch_norm_act, given | {"x": laid_out(x, channels_last)}, True, "identity")
            for name in ("running_mean", "running_var"):
                assert_bitwise_equal(name, ours[name][1].cpu(), theirs[name][1])
            for name, tensor in bits_of(ours).items():
                channel = 1 if tensor.dim() > 1 else 0
                assert_bitwise_equal(name, tensor.select(channel, 0), clean[name].select(channel, 0))
                if not name.startswith("running"):
                    assert not tensor.select(channel, 1).isfinite().any() or name == "grad_bias", name


# Factors of x, grad_y and weight.
SCALES = [
    *[(1e-40, 1, 1), (1e-25, 1, 1), (1e20, 1, 1), (1e25, 1, 1), (1e30, 1, 1), (1e36, 1, 1)],
    *[(1, 1e-30, 1), (1, 1e-25, 1), (1, 1e25, 1), (1, 1e30, 1), (1, 1, 1e-30), (1, 1, 1e-25), (1, 1, 1e25), (1, 1, 1e30)],
    *[(1e12, 1e-20, 1), (1e15, 1e-10, 1), (1e17, 1e-8, 1), (1e16, 1, 1e-10), (1e25, 1, 1e25), (1e25, 1e-10, 1), (1e-25, 1e25, 1)],
]


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("shape", [(8, 2, 90, 91), (64, 16, 7, 7)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_gradients_at_the_ends_of_the_range(channels_last, shape, scales, device):
    """Results that are normal float32 numbers.

    torch loses x beyond 1e17, so its error does not widen the bound.
    """
    of_x, of_grad_y, of_weight = scales
    if device != "cpu" and of_x >= 1e19:
        pytest.skip("a GPU squares float32 in float32: the variance is inf")
    given = arguments(shape)
    given["x"] = (given["x"].double() * of_x).float()
    given["grad_y"] = (given["grad_y"].double() * of_grad_y).float()
    given["weight"] = (given["weight"].double() * of_weight).float()
    given["x"] = laid_out(given["x"], channels_last)
    for act in ("leaky_relu", "swish"):
        assert_all_accurate(given, True, act, most=ULP_BOUND)


@each_act
@pytest.mark.parametrize("shape", [(97, 3), (101, 17), (2, 3, 101)], ids=str)
def test_sums_do_not_see_the_lanes_after_the_end(shape, act, device):
    """A vector that elements do not fill has zeros after them, which may be farther from the mean than float32 reaches."""
    if device != "cpu":
        pytest.skip("a GPU has no vectors")
    given = arguments(shape)
    given |= {"x": torch.full(shape, 1e30), "running_mean": torch.full(shape[1:2], 1e30), "running_var": torch.full(shape[1:2], 1e-30)}
    for name, tensor in bits_of(call(gk.batch_norm_act, given, False, act, eps=0.0)).items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("shape", [(8, 3, 56, 56), (2, 1, 300, 300), (1000, 300), (32, 64, 7, 7), (100_003, 2)], ids=str)
@pytest.mark.parametrize("act", ["leaky_relu", "swish"])
def test_same_bits_for_any_number_of_threads(shape, act, each_thread_count):
    formats = [torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])]
    for memory_format in formats:
        given = arguments(shape, residual=True)
        given["x"] = given["x"].contiguous(memory_format=memory_format)
        for training in (True, False):
            one, two = each_thread_count(lambda given=given, training=training: call(gk.batch_norm_act, given, training, act))
            assert_same_bits(two, one)
            assert_same_bits(call(gk.batch_norm_act, given, training, act), one)


# layouts


@pytest.mark.parametrize("act,residual", [("leaky_relu", False), ("relu", True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("height", [195, 196], ids="rows of {} elements".format)
def test_outputs_past_the_caches(height, dtype, act, residual):
    # Outputs of 16 MiB and more are written past the caches, from the first aligned element of each line. Few
    # lines of 195 elements begin with it.
    images = -(-(16 << 20) // (97 * height * dtype.itemsize))
    x, grad_y, added = (torch.randn(images, 97, 1, height).to(dtype) for _ in range(3))
    of_channel = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var, weight, bias = (torch.rand(97, dtype=of_channel) + 0.5 for _ in range(4))

    def value_and_gradient(part):
        x_part = x[part].detach().requires_grad_()
        y = gk.batch_norm_act(x_part, mean, var, weight, bias, residual=added[part] if residual else None, act=act)
        return y.detach(), *torch.autograd.grad(y, x_part, grad_y[part])

    large = value_and_gradient(slice(None))
    halves = [value_and_gradient(half) for half in (slice(images // 2), slice(images // 2, None))]
    assert large[0].nbytes >= 16 << 20 > halves[1][0].nbytes
    for whole, *parts in zip(large, *halves, strict=True):
        assert torch.equal(whole, torch.cat(parts))


@each_training
@pytest.mark.parametrize("layout", ["every second column", "transposed rows", "expanded", "offset", "cut out channels"])
def test_layout_of_x(layout, training):
    x = {
        "every second column": lambda: torch.randn(4, 5, 6, 14)[..., ::2],
        "transposed rows": lambda: torch.randn(4, 5, 7, 6).transpose(2, 3),
        "expanded": lambda: torch.randn(4, 5, 6, 1).expand(4, 5, 6, 7),
        "offset": lambda: torch.randn(4 * 5 * 6 * 7 + 3)[3:].view(4, 5, 6, 7),
        "cut out channels": lambda: torch.randn(4, 9, 6, 7)[:, 2:7],
    }[layout]()
    given = arguments((4, 5, 6, 7), x=x, residual=True)
    assert_all_accurate(given, training, "leaky_relu")
    for name in ("residual", "grad_y"):
        assert_all_accurate(arguments((4, 5, 6, 7), residual=True) | {name: x}, training, "elu")


@each_training
@each_residual
def test_grad_y_expanded_and_transposed(residual, training):
    given = arguments((4, 5, 6, 7), residual=residual)
    for grad_y in (
        torch.ones(()).expand(4, 5, 6, 7),
        torch.randn(7, 6, 5, 4).permute(3, 2, 1, 0),
        torch.randn(4, 6, 7, 5).permute(0, 3, 1, 2),
    ):
        assert_all_accurate(given | {"grad_y": grad_y}, training, "swish")


@each_training
def test_x_and_residual_of_different_layouts(training):
    given = arguments((4, 5, 6, 7), residual=True)
    for name in ("x", "residual"):
        assert_all_accurate(given | {name: given[name].contiguous(memory_format=torch.channels_last)}, training, "leaky_relu")
    given["residual"] = given["x"]
    assert_all_accurate(given, training, "leaky_relu")


@each_training
@pytest.mark.parametrize("shape", [(6, 129), (4, 5, 6, 7)], ids=str)
@pytest.mark.parametrize("function", [gk.batch_norm_act, reference.batch_norm_act], ids=["native", "reference"])
def test_layout_of_parameters_and_statistics(function, shape, training):
    """For (N, C) torch's backward takes them for contiguous and reads past their end, which is nan here."""

    def every_third(values):
        return torch.stack([values, *[torch.full_like(values, math.nan)] * 2], 1)[:, 0]

    given = arguments(shape)
    expected = call(function, given, training, "elu")
    for place, name in enumerate(["running_mean", "running_var", "weight", "bias"], 1):

        def with_gaps(*operands, place=place, **options):
            return function(*operands[:place], every_third(operands[place]), *operands[place + 1 :], **options)

        actual = call(with_gaps, given, training, "elu")
        for each in ("y", "grad_x", "grad_weight", "grad_bias"):
            assert_close(
                actual[each], expected[each], rtol=1e-5, atol=1e-5, msg=lambda text, name=name, each=each: f"{name}, {each}: {text}"
            )


UNCOUNTABLE = {
    "bool": lambda: torch.tensor(True),
    "float8": lambda: torch.tensor(3.0).to(torch.float8_e4m3fn),
    "complex": lambda: torch.tensor(3j),
    "a gradient": lambda: torch.tensor(3.0, requires_grad=True),
    "two elements": lambda: torch.tensor([3, 3]),
    "sparse": lambda: torch.tensor([3]).to_sparse(),
    "MKL-DNN": lambda: torch.tensor([3.0]).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.tensor([3.0])]),
    "zeros without memory": lambda: torch._efficientzerotensor((), dtype=torch.int64),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", UNCOUNTABLE)
def test_statistics_do_not_change_if_batches_cannot_be_counted(kind, momentum):
    """In the kernels, in torch's operators and in the merge of processes."""
    moments = torch.rand(2, 7, dtype=torch.float64) + 2
    # The merge is not recorded by autograd, so a count that requires grad does no harm there.
    for shape in ((4, 3), (2, 3, 2, 2, 2, 2), *([] if kind == "a gradient" else [None])):
        running = [torch.zeros(3), torch.ones(3)]
        with pytest.raises(RuntimeError):
            if shape is None:
                OPS.batch_norm_act_gather_stats(moments, *running, UNCOUNTABLE[kind](), momentum, 1e-5)
            else:
                x = torch.randn(shape)
                OPS.batch_norm_act(x, *running, None, None, None, UNCOUNTABLE[kind](), True, momentum, 1e-5, "relu", 0.0)
        assert running[0].eq(0).all() and running[1].eq(1).all()


@each_training
@pytest.mark.parametrize("inference", [False, True], ids=["recorded", "inference mode"])
def test_operands_with_the_negative_bit(inference, training):
    """The imaginary part of a conjugate has this bit.

    torch's own batch norm loses its writes to such statistics.
    """
    given = arguments((4, 3, 5), residual=True)

    def results(negated):
        operands = {name: given[name].clone() for name in OPERANDS} | {"num_batches_tracked": torch.tensor(3)}
        if negated is not None:
            operands[negated] = torch._neg_view(-operands[negated])
        y, *_ = OPS.batch_norm_act(*operands.values(), training, None, 1e-5, "elu", 0.7)
        return [y, *[operands[name].resolve_neg() for name in ("running_mean", "running_var", "num_batches_tracked")]]

    with torch.inference_mode(inference):
        expected = results(None)
        for name in (*OPERANDS, "num_batches_tracked"):
            assert_close(results(name), expected, msg=lambda text, name=name: f"{name}: {text}")


@each_training
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 4, 4), (0, 3, 2, 2, 2), (2, 3, 0), (2, 3, 0, 4)], ids=str)
def test_empty_batch(shape, training):
    given = arguments(shape, residual=True)
    ours, theirs = (outcome(call, function, given, training, "leaky_relu") for function in (gk.batch_norm_act, reference.batch_norm_act))
    if isinstance(theirs, tuple):
        assert ours == theirs
    else:
        assert_close(bits_of(ours), bits_of(theirs), rtol=0, atol=0, equal_nan=True)


# errors, which change nothing


def refusals():
    """name -> the changes to a right call, and the exception; None for torch's own type and message."""
    given = arguments((4, 3, 5))
    x = given["x"]
    return {
        "channels of running_mean": ({"running_mean": torch.zeros(4)}, None),
        "channels of running_var": ({"running_var": torch.ones(2)}, None),
        "channels of weight": ({"weight": torch.ones(4)}, None),
        "channels of bias": ({"bias": torch.ones(2)}, None),
        "one value per channel": ({"x": x[:1, :, :1]}, None),
        "one dimension": ({"x": x[0, :, 0]}, None),
        "int64": ({"x": x.long()}, None),
        "bool": ({"x": x > 0}, None),
        "complex64": ({"x": x.to(torch.complex64)}, None),
        "x on meta": ({"x": x.to("meta")}, None),
        "running statistics on meta": ({"running_mean": torch.zeros(3, device="meta"), "running_var": torch.ones(3, device="meta")}, None),
        "weight on meta": ({"weight": torch.ones(3, device="meta")}, None),
        "float64 weight": ({"weight": torch.ones(3, dtype=torch.float64), "bias": torch.zeros(3, dtype=torch.float64)}, None),
        "float64 bias": ({"bias": torch.zeros(3, dtype=torch.float64)}, None),
        "float64 running_var": ({"running_var": torch.ones(3).double()}, None),
        "bias on meta": ({"bias": torch.zeros(3, device="meta")}, None),
        "running_var on meta": ({"running_var": torch.ones(3, device="meta")}, None),
        "float64 running statistics": ({"running_mean": torch.zeros(3).double(), "running_var": torch.ones(3).double()}, None),
        # Not compared with torch, because torch 2.11 has another message.
        "eps of 0": ({"eps": 0.0}, (ValueError, "batch_norm eps must be positive")),
        "negative eps": ({"eps": -1.0}, (ValueError, "batch_norm eps must be positive")),
        "unknown act": ({"act": "selu"}, (ValueError, "selu")),
        "residual of another shape": ({"residual": torch.randn(4, 3, 1)}, (RuntimeError, "residual")),
        "residual of another dtype": ({"residual": torch.randn(4, 3, 5).double()}, (RuntimeError, "residual")),
        "residual on another device": ({"residual": torch.randn(4, 3, 5, device="meta")}, (RuntimeError, "residual")),
        "residual that is no tensor": ({"residual": 1.0}, (TypeError, "residual must be Tensor, not float")),
        "running_mean that requires grad": ({"running_mean": torch.zeros(3, requires_grad=True)}, None),
    }


def assert_refused(function, stats, torch_function, expected):
    before = {name: (tensor.clone(), tensor._version) for name, tensor in stats.items() if not tensor.is_meta}
    came = outcome(function)
    if expected is None:
        expected = outcome(torch_function)
        assert isinstance(expected, tuple) and isinstance(expected[0], type), "torch accepts this call"
        assert came == expected
    else:
        assert isinstance(came, tuple) and came[0] is expected[0] and expected[1] in came[1], f"{came}, not {expected}"
    for name, (value, version) in before.items():
        assert_bitwise_equal(name, stats[name], value)
        assert stats[name]._version == version, f"{name} was written"


def test_running_statistics_after_an_error_that_torch_finds_late():
    """torch writes the running statistics before it reads the bias."""
    given = arguments((4, 3, 5), torch.bfloat16)
    given["bias"] = given["bias"].half()
    before = {name: given[name].clone() for name in ("running_mean", "running_var")}
    batches = torch.tensor(7)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        OPS.batch_norm_act(
            *(given[name] for name in ("x", "running_mean", "running_var", "weight", "bias")),
            *(None, batches, True, None, 1e-5, "elu", 1.0),
        )
    assert_same_bits(given, before)
    assert batches == 7 and not any(given[name]._version for name in before)


@pytest.mark.parametrize("refused", refusals())
def test_errors_of_the_function(refused):
    changes, expected = refusals()[refused]
    given = arguments((4, 3, 5)) | {"act": "leaky_relu", "residual": None, "eps": 1e-5} | changes

    def run(function):
        operands = [given[name] for name in ("x", "running_mean", "running_var", "weight", "bias")]
        return function(*operands, True, 0.1, given["eps"], act=given["act"], residual=given["residual"])

    def run_torch():
        operands = [given[name].clone() for name in ("x", "running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(*operands, True, 0.1, given["eps"])

    stats = {name: given[name] for name in ("running_mean", "running_var")}
    assert_refused(lambda: run(gk.batch_norm_act), stats, run_torch, expected)
    given["x"] = given["x"].detach().requires_grad_(given["x"].is_floating_point())
    assert_refused(lambda: run(gk.batch_norm_act), stats, run_torch, expected)


def test_momentum_of_none_is_refused():
    x, running = torch.randn(4, 3), (torch.zeros(3), torch.ones(3))
    for function in (F.batch_norm, gk.batch_norm_act):
        with pytest.raises(TypeError, match=r"argument 'momentum' \(position 7\) must be float, not NoneType"):
            function(x, *running, training=True, momentum=None)
    assert torch.equal(running[0], torch.zeros(3)) and torch.equal(running[1], torch.ones(3))


def test_momentum_of_another_type():
    x, stats = torch.randn(4, 3), [torch.zeros(3), torch.ones(3)]
    came = outcome(gk.batch_norm_act, x, *stats, training=True, momentum="a", act="identity")
    assert came == outcome(F.batch_norm, x, *stats, training=True, momentum="a")


@pytest.mark.parametrize("act", [name for name, act in acts.ACTS.items() if not act.param])
def test_act_param_of_an_act_without_one_is_refused(act):
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    for given, kind, words in (
        (0.3, ValueError, f"{act!r}, which has no parameter"),
        (math.nan, ValueError, "nan"),
        ("0.3", TypeError, "not str"),
    ):
        for make in (gk.BatchNormAct1d, gk.SyncBatchNormAct):
            with pytest.raises(kind, match=words):
                make(3, act=act, act_param=given)
        with pytest.raises(kind, match=words):
            gk.batch_norm_act(x, mean, var, training=True, act=act, act_param=given)
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))
    # A module's own act_param is accepted.
    bn = gk.BatchNormAct1d(3, act=act)
    assert gk.BatchNormAct1d(3, act=bn.act, act_param=bn.act_param)(x).shape == x.shape


def test_an_assigned_act():
    bn, x = gk.BatchNormAct1d(3), torch.randn(8, 3)
    bn.act = "relu"
    assert_bitwise_equal("y", bn(x), gk.BatchNormAct1d(3, act="relu")(x))
    bn.act = "unknown"
    with pytest.raises(ValueError, match="unknown act 'unknown'"):
        bn(x)


def test_act_param_is_a_number():
    for given in ("0.3", [0.3], 1j):
        with pytest.raises(TypeError):
            gk.BatchNormAct1d(3, act_param=given)


def test_act_param_is_not_learnt():
    with pytest.raises(TypeError, match="act_param must be a float, not Parameter"):
        gk.BatchNormAct1d(3, act_param=nn.Parameter(torch.tensor(0.2)))


def test_count_of_batches_in_another_dtype_or_elsewhere():
    x = torch.randn(4, 3, 5)
    given = arguments((4, 3, 5), x=x)
    operands = [given[name] for name in ("x", "running_mean", "running_var", "weight", "bias")]
    expected = OPS.batch_norm_act(*(tensor.clone() for tensor in operands), None, None, True, 0.1, 1e-5, "elu", 1.0)[0]
    for count in (torch.tensor(3, dtype=torch.int32), torch.tensor(3.0), torch.tensor(3, device="meta")):
        y = OPS.batch_norm_act(*(tensor.clone() for tensor in operands), None, count, True, 0.1, 1e-5, "elu", 1.0)[0]
        assert_close(y, expected)
        assert count.is_meta or count == 4


def test_error_while_saving_for_backward_writes_nothing():
    module = gk.BatchNormAct1d(3)
    with torch.inference_mode():
        x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        module(x)
    assert_same_bits({"running_mean": module.running_mean}, {"running_mean": torch.zeros(3)})
    assert module.num_batches_tracked == 0


def test_running_statistics_made_in_inference_mode():
    with torch.inference_mode():
        stats = [torch.zeros(3), torch.ones(3)]
    came = outcome(gk.batch_norm_act, torch.randn(4, 3), *stats, training=True)
    assert came[0] is RuntimeError and came[1].startswith("Inplace update to inference tensor outside InferenceMode")
    assert_same_bits({"running_mean": stats[0]}, {"running_mean": torch.zeros(3)})


def test_variance_of_zero_in_evaluation_without_eps():
    x, stats = torch.tensor([[1.0, 0.0]]), [torch.zeros(2), torch.zeros(2)]
    y = gk.batch_norm_act(x, *stats, eps=0.0, act="identity")
    # Not F.batch_norm, which refuses this in torch 2.11.
    assert not y.isfinite().any() and not torch.batch_norm(x, None, None, *stats, False, 0.1, 0.0, False).isfinite().any()


def test_errors_in_evaluation():
    x = torch.randn(4, 3)
    for running_mean, running_var in ((None, None), (torch.zeros(3), None), (None, torch.ones(3))):
        expected = outcome(F.batch_norm, x, running_mean, running_var)
        assert expected[0] is RuntimeError
        assert outcome(gk.batch_norm_act, x, running_mean, running_var) == expected


@pytest.mark.parametrize(
    "refused,x,residual",
    [
        ("channels", (4, 5, 2, 2), None),
        ("dimensions", (4, 3, 2), None),
        ("one value per channel", (1, 3, 1, 1), None),
        ("shape of the residual", (4, 3, 2, 2), (4, 3, 2, 1)),
    ],
)
def test_errors_of_the_module(refused, x, residual):
    module, torch_module = gk.BatchNormAct2d(3), nn.BatchNorm2d(3)
    expected = (RuntimeError, "residual") if residual else None
    x, residual = torch.randn(x), residual and torch.randn(residual)
    assert_refused(lambda: module(x, residual), dict(module.named_buffers()), lambda: torch_module(x), expected)


def test_errors_of_the_module_for_dtypes_and_devices():
    module, torch_module = gk.BatchNormAct2d(3), nn.BatchNorm2d(3)
    for x in (torch.ones(2, 3, 2, 2).long(), torch.ones(2, 3, 2, 2).double(), torch.ones(2, 3, 2, 2, device="meta")):
        assert_refused(lambda x=x: module(x), dict(module.named_buffers()), lambda x=x: torch_module(x), None)


def test_acts_that_are_refused():
    for wrong in (nn.PReLU(), nn.SELU(), nn.ReLU, None):
        with pytest.raises(TypeError, match="act"):
            gk.BatchNormAct2d(3, act=wrong)
    with pytest.raises(ValueError, match="selu"):
        gk.BatchNormAct2d(3, act="selu")
    with pytest.raises(ValueError, match="act_param"):
        gk.BatchNormAct2d(3, act=nn.LeakyReLU(0.2), act_param=0.1)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("parameters", ["of the same type", "float32"])
@each_training
@each_residual
@each_act
@pytest.mark.parametrize(
    "shape,channels_last", [((4, 3, 5, 5), False), ((6, 24, 9, 9), True), ((3, 8, 7, 7), False), ((33, 20), False), ((2, 3, 40, 50), False)]
)
def test_16_bits_are_rounded_once(shape, channels_last, act, residual, training, parameters, dtype):
    given = arguments(shape, residual=residual)
    narrowed = given if parameters == "of the same type" else ("x", "residual", "grad_y")
    given = given | cast({name: given[name] for name in narrowed}, dtype)
    if channels_last:
        given["x"] = given["x"].contiguous(memory_format=torch.channels_last)
    given = without_kinks(given, training, act)
    ours, theirs = (call(function, given, training, act) for function in (gk.batch_norm_act, reference.batch_norm_act))
    exact = call(reference.batch_norm_act, cast(given, torch.float64), training, act)
    assert ours["y"].stride() == theirs["y"].stride()
    for name, tensor in ours.items():
        if tensor is not None:
            assert_accurate(name, tensor, theirs[name], exact[name], per="tensor")


# running statistics


def test_version_counters():
    """Unlike torch we count these writes, so that autograd reports a write to a statistic that was saved."""
    module = gk.BatchNormAct2d(3)
    buffers = dict(module.named_buffers())
    assert buffers.keys() == {"running_mean", "running_var", "num_batches_tracked"}
    made = {name: buffer._version for name, buffer in buffers.items()}

    def writes():
        return {name: buffer._version - made[name] for name, buffer in buffers.items()}

    x = torch.randn(4, 3, 5, 5)
    for steps, each in enumerate((x, x.clone().requires_grad_(), x), 1):
        module(each)
        assert writes() == dict.fromkeys(buffers, steps)
    module.eval()(x)
    gk.batch_norm_act(x, *list(buffers.values())[:2])
    assert writes() == dict.fromkeys(buffers, steps)


@pytest.mark.parametrize("momentum", [None, 0.1, 0.0])
def test_running_statistics_over_steps(momentum):
    module, torch_module = gk.BatchNormAct2d(3, momentum=momentum, act="identity"), nn.BatchNorm2d(3, momentum=momentum)
    for step in range(1, 5):
        x = torch.randn(4, 3, 5, 5) * step + step
        assert_close(module(x), torch_module(x))
        assert_close(module.state_dict(), torch_module.state_dict())
        assert module.num_batches_tracked == step
    assert_close(module.eval()(x), torch_module.eval()(x))
    assert module.num_batches_tracked == step


def test_evaluation_then_training_then_backward():
    """A gradient uses the statistics of its own forward, even if the running statistics have changed since."""
    x1, x2 = torch.randn(4, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 5, 5) * 3 + 1
    module = gk.BatchNormAct2d(3)
    module.running_var.fill_(0.3)
    alone = copy.deepcopy(module).eval()
    expected = torch.autograd.grad(alone(x1).square().sum(), (x1, alone.weight, alone.bias))
    loss = module.eval()(x1).square().sum()
    module.train()(x2)
    actual = torch.autograd.grad(loss, (x1, module.weight, module.bias))
    for name, each, other in zip(("grad_x", "grad_weight", "grad_bias"), actual, expected, strict=True):
        assert_bitwise_equal(name, each, other)


def test_two_training_steps_before_backward():
    """As in GANs: both backwards are right although the running statistics were written twice."""
    module, torch_module = gk.BatchNormAct2d(3, act="relu"), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    x = torch.randn(4, 3, 5, 5)
    for each in (module, torch_module):
        (each(x).square().sum() + each(x * 2 + 1).square().sum()).backward()
    assert_close(module.weight.grad, torch_module[0].weight.grad)
    assert_close(module.running_var, torch_module[0].running_var)


# memory


@each_training
@each_residual
@each_act
@pytest.mark.parametrize("shape", [(4, 8, 6, 4), (4, 8, 16, 24), (8, 5, 7)], ids=str)
def test_bytes_kept_for_backward(shape, act, residual, training):
    """x, mean and invstd.

    With a residual also the residual or, for two slopes, a mask: a bit for each element.
    """
    module = MODULES[len(shape)][0](shape[1], act=act).train(training)
    x = torch.randn(shape, requires_grad=True)
    z = torch.randn(shape, requires_grad=True) if residual else None
    y, saved = saved_by(lambda: module(x, z))
    owned = {tensor.data_ptr() for tensor in (x, z, y, module.weight, module.bias) if tensor is not None}
    extra = [tensor for tensor in saved if tensor.numel() and tensor.data_ptr() not in owned]
    masks = [tensor for tensor in extra if tensor.dtype == torch.uint8]
    assert sum(tensor.nbytes for tensor in extra if tensor.dtype != torch.uint8) == 2 * 8 * shape[1]
    if residual and act in TWO_SLOPES:
        (mask,) = masks
        assert math.ceil(x.numel() / 8) <= mask.numel() <= math.ceil(x.numel() / 8) + shape[0] * (shape[1] if x.numel() > 1024 else 1)
        assert z.data_ptr() not in {tensor.data_ptr() for tensor in saved}
    else:
        assert masks == []


class ResidualBlock(nn.Module):
    def __init__(self, channels, act, native):
        super().__init__()
        self.native = native
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = (gk.BatchNormAct2d(channels, act=act) if native else nn.BatchNorm2d(channels) for _ in range(2))
        self.act = lambda x: acts.ACTS[act].function(x, acts.ACTS[act].default)

    def forward(self, x):
        if self.native:
            return self.bn2(self.conv2(self.bn1(self.conv1(x))), residual=x)
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)


@pytest.mark.parametrize(
    "act,tensors,torchs_tensors", [("relu", 4, 4), *((act, 4, 6) for act in acts.ACTS if act not in ("identity", "relu"))]
)
def test_bytes_kept_by_twenty_residual_blocks(act, tensors, torchs_tensors):
    """The number of tensors of the size of x that a block keeps, as documented. Ours may also keep a mask."""
    x = torch.randn(4, 16, 12, 12)
    kept = []
    for native in (True, False):
        model = nn.Sequential(*(ResidualBlock(16, act, native) for _ in range(20)))
        y, saved = saved_by(lambda model=model: model(x))
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        # The output counts too: the last block or the loss saves it.
        storages = {tensor.data_ptr(): tensor.nbytes for tensor in [*saved, y] if tensor.data_ptr() not in parameters}
        kept.append(sum(storages.values()) / x.nbytes)
    ours, torchs = kept
    of_statistics = 20 * 2 * 2 * 8 * 16 / x.nbytes
    of_masks = 20 / 32 if act in TWO_SLOPES else 0
    assert ours == pytest.approx(1 + 20 * tensors + of_statistics + of_masks)
    assert torchs == pytest.approx(1 + 20 * torchs_tensors, abs=1)


def test_nothing_is_kept_without_grad():
    module = gk.BatchNormAct2d(3)
    x = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        assert saved_by(lambda: module(x.requires_grad_()))[1] == []
    assert saved_by(lambda: gk.batch_norm_act(x.detach(), module.running_mean, module.running_var))[1] == []


@each_training
@each_residual
def test_frozen_operands_get_no_gradient(residual, training):
    given = without_kinks(arguments((4, 5, 6, 7), residual=residual), training, "leaky_relu")
    full = call(gk.batch_norm_act, given, training, "leaky_relu")
    names = [name for name in ("x", "weight", "bias", "residual") if given[name] is not None]
    for chosen in range(1, 2 ** len(names)):
        wanted = [name for i, name in enumerate(names) if chosen >> i & 1]
        leaves = {name: given[name].detach().requires_grad_(name in wanted) for name in names}
        y = gk.batch_norm_act(
            leaves["x"],
            given["running_mean"].clone(),
            given["running_var"].clone(),
            leaves["weight"],
            leaves["bias"],
            training,
            act_param=ACTS["leaky_relu"],
            residual=leaves.get("residual"),
        )
        y.backward(given["grad_y"])
        for name in names:
            if name in wanted:
                assert_bitwise_equal(f"grad_{name} of {wanted}", leaves[name].grad, full[f"grad_{name}"])
            else:
                assert leaves[name].grad is None


def test_x_written_after_forward_is_noticed():
    x = torch.randn(4, 3, 5, 5, requires_grad=True) * 1
    y = gk.BatchNormAct2d(3)(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# derivatives


def differentiable(act, training, *, shape=(4, 3, 5), residual=True, stats=True):
    """A function of x, weight, bias and residual, and inputs for it that stay off the kinks."""
    torch.manual_seed(5)
    channels = shape[1]
    mean, var = (torch.randn(channels).double(), torch.rand(channels).double() + 0.5) if stats else (None, None)

    def function(x, weight, bias, residual=None):
        copies = (None if mean is None else mean.clone(), None if var is None else var.clone())
        return gk.batch_norm_act(x, *copies, weight, bias, training, act=act, act_param=ACTS[act], residual=residual)

    for _ in range(100):
        x, weight, bias = torch.randn(shape).double(), torch.rand(channels).double() + 0.5, torch.randn(channels).double()
        inputs = (x, weight, bias, *([torch.randn(shape).double() * 3] if residual else []))
        u = gk.batch_norm_act(x, mean, var, weight, bias, training, 0.0, act="identity", residual=inputs[3] if residual else None)
        if min(u.abs().min(), (u - 6).abs().min()) > 0.01:
            return function, tuple(tensor.requires_grad_() for tensor in inputs)
    raise AssertionError("no sample away from the kinks in 100 draws")


@each_training
@each_residual
@each_act
def test_gradcheck(act, residual, training):
    function, inputs = differentiable(act, training, residual=residual)
    assert gradcheck(function, inputs, fast_mode=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@each_act
def test_gradcheck_of_forward_mode(act):
    function, inputs = differentiable(act, True, stats=False)
    assert gradcheck(function, inputs, fast_mode=True, check_forward_ad=True, check_backward_ad=False)
    function, inputs = differentiable(act, False)
    assert gradcheck(function, inputs, fast_mode=True, check_forward_ad=True, check_backward_ad=False)


@each_training
def test_gradcheck_of_other_shapes(training):
    for shape in ((6, 3), (3, 2, 2, 2), (2, 2, 2, 2, 2)):
        function, inputs = differentiable("leaky_relu", training, shape=shape)
        assert gradcheck(function, inputs, fast_mode=True)
        assert gradgradcheck(function, inputs, fast_mode=True)


@each_training
@each_residual
@each_act
def test_gradcheck_of_channels_last(act, residual, training):
    function, inputs = differentiable(act, training, shape=(3, 3, 2, 2), residual=residual)
    inputs = tuple(
        each.detach().contiguous(memory_format=torch.channels_last).requires_grad_() if each.dim() == 4 else each for each in inputs
    )
    assert gradcheck(function, inputs, fast_mode=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@each_training
@each_act
def test_second_derivatives_are_torchs(act, training):
    given = arguments((4, 3, 5), torch.float64, residual=True)
    results = []
    for function in (gk.batch_norm_act, reference.batch_norm_act):
        leaves = {name: given[name].clone().requires_grad_() for name in ("x", "weight", "bias", "residual", "grad_y")}
        y = function(
            *(leaves["x"], given["running_mean"].clone(), given["running_var"].clone(), leaves["weight"], leaves["bias"], training),
            act=act,
            residual=leaves["residual"],
        )
        operands = list(leaves.values())[:4]
        grads = torch.autograd.grad(y, operands, leaves["grad_y"], create_graph=True)
        loss = sum(grad.square().sum() for grad in grads)
        results.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True))
    assert_close(results[0], results[1])


@each_training
@each_act
@pytest.mark.parametrize("relation", ["the same tensor", "x of residual", "residual of x"])
def test_second_derivatives_where_x_and_residual_depend_on_each_other(relation, act, training):
    """As in every block of a ResNet."""
    given = arguments((4, 3, 5), torch.float64, residual=True)
    results = []
    for function in (gk.batch_norm_act, reference.batch_norm_act):
        leaf, grad_y = given["x"].clone().requires_grad_(), given["grad_y"].clone().requires_grad_()
        x, residual = {"the same tensor": (leaf, leaf), "x of residual": (leaf.sin(), leaf), "residual of x": (leaf, leaf.sin())}[relation]
        y = function(x, given["running_mean"].clone(), given["running_var"].clone(), training=training, act=act, residual=residual)
        (grad,) = torch.autograd.grad(y, leaf, grad_y, create_graph=True)
        results.append((grad, *torch.autograd.grad(grad.square().sum(), (leaf, grad_y), allow_unused=True, materialize_grads=True)))
    assert_close(results[0], results[1])


# every way torch calls an operator


def opcheck_samples():
    for dtype in WIDE_DTYPES:
        for requires_grad in (False, True):
            for shape, training, act, residual in (
                ((4, 3, 5, 5), True, "leaky_relu", False),
                ((4, 3, 5, 5), True, "relu6", True),
                ((4, 3, 5, 5), False, "elu", True),
                ((6, 3), True, "swish", True),
                ((2, 3, 2, 2, 2), False, "identity", False),
            ):
                given = arguments(shape, dtype, residual=residual)
                for name in ("x", "weight", "bias", "residual"):
                    if given[name] is not None:
                        given[name].requires_grad_(requires_grad)
                rest = (torch.tensor(3), training, None if requires_grad else 0.1, 1e-5, act, NUMBERS[act])
                yield (*(given[name] for name in OPERANDS), *rest)
                if len(shape) == 4 and residual:
                    for name in ("x", "residual"):
                        given[name] = given[name].detach().contiguous(memory_format=torch.channels_last).requires_grad_(requires_grad)
                    yield (*(given[name] for name in OPERANDS), *rest)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    plain = (True, 0.1, 1e-5, "leaky_relu", 0.01)
    yield (x, None, None, None, None, None, None, *plain)
    yield (x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(), None, None, None, None, None, None, *plain)
    yield (x.detach().transpose(2, 3).requires_grad_(), None, None, None, None, x.detach(), None, *plain)
    yield (torch.randn(4, 1, 5, 5), torch.zeros(1), torch.ones(1), torch.ones(1), None, None, None, *plain)
    yield (torch.randn(4, 3, 1, 1, requires_grad=True), torch.zeros(3), torch.ones(3), None, torch.ones(3), None, None, *plain)


def test_opcheck():
    for args in opcheck_samples():
        opcheck(OPS.batch_norm_act.default, args)


@each_training
@pytest.mark.parametrize("act", ["relu", "swish"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck_of_backward(memory_format, act, training):
    for residual in (False, True):
        given = arguments((4, 3, 5, 5), residual=residual)
        given |= {name: given[name].contiguous(memory_format=memory_format) for name in ("x", "grad_y")}
        forward = [given[name] for name in OPERANDS]
        forward[0] = forward[0].requires_grad_()
        _, mean, invstd, mask = OPS.batch_norm_act(*forward, None, training, 0.1, 1e-5, act, NUMBERS[act])
        operands = [given[name].detach() for name in ("grad_y", "x")]
        rest = [given["weight"], given["bias"], given["residual"], mask if mask.numel() else None]
        args = (*operands, mean.detach(), invstd.detach(), *rest, training, act, NUMBERS[act], [True, True, True, residual])
        opcheck(OPS.batch_norm_act_backward.default, args)
        # create_graph=True takes another path; differentiating this operator by itself is an error.
        with pytest.raises(RuntimeError, match="not implemented"):
            grad_x = OPS.batch_norm_act_backward(operands[0].requires_grad_(), *args[1:])[0]
            grad_x.sum().backward()


class Block(nn.Module):
    """Two modules in a row with the input added, as in residual networks."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.first = gk.BatchNormAct2d(3, momentum=momentum, act="elu")
        self.second = gk.BatchNormAct2d(3, momentum=momentum, act="relu")

    def forward(self, x):
        return self.second(self.first(x), x)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compile(momentum):
    torch._dynamo.reset()
    eager = Block(momentum)
    block = copy.deepcopy(eager)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = torch.randn(4, 3, 5, 5) + step
        results = []
        for each in (compiled, eager):
            leaf = x.clone().requires_grad_()
            y = each(leaf)
            y.square().sum().backward()
            results.append((y, leaf.grad))
        assert_close(results[0], results[1])
    assert_close(dict(block.named_buffers()), dict(eager.named_buffers()))
    assert_close([p.grad for p in block.parameters()], [p.grad for p in eager.parameters()])
    assert block.first.num_batches_tracked == 3
    compiled.eval(), eager.eval()
    assert_close(compiled(x), eager(x))
    assert_close(dict(block.named_buffers()), dict(eager.named_buffers()))


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    eager = Block()
    block = copy.deepcopy(eager)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 3, 5, 6), (7, 3, 9, 4), (2, 3, 20, 20)):
        x = torch.randn(shape)
        assert_close(compiled(x), eager(x))
    assert_close(dict(block.named_buffers()), dict(eager.named_buffers()))


def compiled_backward():
    return compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True))


# Otherwise cuDNN's convolutions return other bits each time.
@pytest.mark.slow
@torch.backends.cudnn.flags(enabled=True, deterministic=True)
def test_compiled_autograd_of_a_residual_network():
    """After other nodes, because torch traces their gradients as placeholders without a true shape."""
    model = nn.Sequential(ResNet(BasicBlock, (1, 1, 1, 1), width=4, classes=6), nn.BatchNorm1d(6), nn.ELU(), nn.Linear(6, 4))
    gk.convert(model)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    for size in (3, 5):
        x = torch.randn(size, 3, 32, 32)
        for each in (model, compiled):
            each.zero_grad()
            loss = each(x).square().sum()
            with compiled_backward() if each is compiled else contextlib.nullcontext():
                loss.backward()
        for (name, expected), actual in zip(model.named_parameters(), compiled.parameters(), strict=True):
            assert_bitwise_equal(name, actual.grad, expected.grad)


@pytest.mark.slow
@each_training
@each_residual
def test_compiled_autograd_of_some_gradients(training, residual):
    given = arguments((4, 3, 5, 5), residual=residual)
    leaves = [given[name].requires_grad_() for name in ("x", "weight", "bias", "residual") if given[name] is not None]
    torch._dynamo.reset()

    def loss():
        statistics = given["running_mean"].clone(), given["running_var"].clone()
        operands = given["x"], *statistics, given["weight"], given["bias"], training
        return sum(gk.batch_norm_act(*operands, act=act, residual=given["residual"]).square().sum() for act in ACTS)

    for wanted in (leaves, leaves[1:2], leaves[-1:]):
        expected = torch.autograd.grad(loss(), wanted)
        with compiled_backward():
            actual = torch.autograd.grad(loss(), wanted)
        for one, other in zip(actual, expected, strict=True):
            assert_bitwise_equal("gradient", one, other)


def test_compiled_call_with_bad_arguments_writes_nothing():
    torch._dynamo.reset()
    module = gk.BatchNormAct2d(3)
    compiled = torch.compile(module, backend="aot_eager")
    with pytest.raises(Exception, match="Expected more than 1 value per channel"):
        compiled(torch.randn(1, 3, 1, 1))
    assert_close(dict(module.named_buffers()), dict(nn.BatchNorm2d(3).named_buffers()))


@pytest.mark.filterwarnings("error::UserWarning")
def test_functorch():
    given = arguments((4, 3, 5), residual=True)
    x, weight, bias, residual = (given[name] for name in ("x", "weight", "bias", "residual"))
    tangents = (torch.randn(4, 3, 5), torch.randn(3), torch.randn(3))

    def of(function, training, with_stats):
        stats = (given["running_mean"], given["running_var"]) if with_stats else (None, None)
        return lambda x, weight, bias: function(x, *stats, weight, bias, training, act="elu", residual=residual)

    def loss(function):
        return lambda *operands: function(*operands).square().sum()

    batches = torch.randn(2, 4, 3, 5)
    for training, with_stats in ((True, False), (False, True)):
        ours, theirs = (of(function, training, with_stats) for function in (gk.batch_norm_act, reference.batch_norm_act))
        for name, transform in {
            "grad": lambda f: torch.func.grad(loss(f), argnums=(0, 1, 2))(x, weight, bias),
            "jvp": lambda f: torch.func.jvp(f, (x, weight, bias), tangents),
            "vjp": lambda f: torch.func.vjp(f, x, weight, bias)[1](x),
            "vmap": lambda f: torch.func.vmap(f, in_dims=(0, None, None))(batches, weight, bias),
            "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(loss(f)), in_dims=(0, None, None))(batches, weight, bias),
            "hessian": lambda f: torch.func.hessian(loss(f), argnums=1)(x, weight, bias),
        }.items():
            assert_close(
                transform(ours), transform(theirs), msg=lambda text, name=name, training=training: f"{name}, training={training}: {text}"
            )


def test_functional_call():
    module, torch_module = gk.BatchNormAct1d(3, act="identity"), nn.BatchNorm1d(3)
    x = torch.randn(6, 3)
    results = []
    for each in (module, torch_module):

        def loss(params, buffers, each=each):
            return torch.func.functional_call(each, (params, buffers), (x,)).square().mean()

        buffers = {name: buffer.clone() for name, buffer in each.named_buffers()}
        results.append((torch.func.grad(loss)(dict(each.named_parameters()), buffers), buffers))
    assert_close(results[0], results[1])


def test_per_sample_gradients():
    module, torch_module = gk.BatchNormAct2d(3, act="identity").eval(), nn.BatchNorm2d(3).eval()
    x = torch.randn(5, 3, 4, 4)
    results = []
    for each in (module, torch_module):

        def loss(params, sample, each=each):
            return torch.func.functional_call(each, (params, dict(each.named_buffers())), (sample[None],)).square().sum()

        results.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(each.named_parameters()), x))
    assert_close(results[0], results[1])


@each_training
def test_forward_ad(training):
    given = arguments((4, 3, 5), residual=True)
    tangent = torch.randn(4, 3, 5)
    results = []
    for function in (gk.batch_norm_act, reference.batch_norm_act):
        stats = (None, None) if training else (given["running_mean"], given["running_var"])
        with forward_ad.dual_level():
            x = forward_ad.make_dual(given["x"], tangent)
            y = function(x, *stats, given["weight"], given["bias"], training, act="swish", residual=given["residual"])
            results.append(tuple(forward_ad.unpack_dual(y)))
    assert_close(results[0], results[1])


@each_training
@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
def test_export(decompose, training):
    block = Block().train(training)
    eager = copy.deepcopy(block)
    exported = torch.export.export(block, (torch.randn(4, 3, 5, 5),), dynamic_shapes=[{0: torch.export.Dim("batch", min=2)}])
    loaded = (exported.run_decompositions() if decompose else exported).module()
    x = torch.randn(7, 3, 5, 5)
    assert_close(loaded(x), eager(x))
    assert_close(dict(loaded.named_buffers()), dict(eager.named_buffers()))


def test_inference_mode():
    module, other = gk.BatchNormAct2d(3), gk.BatchNormAct2d(3)
    x = torch.randn(4, 3, 5, 5)
    with torch.inference_mode():
        y = module(x)
        assert y.is_inference()
        inside = gk.BatchNormAct2d(3)
        assert_bitwise_equal("y of a module made in inference mode", inside(x), y)
        assert_close(dict(inside.named_buffers()), dict(module.named_buffers()), rtol=0, atol=0)
    assert_bitwise_equal("y", y.clone(), other(x).detach())
    assert_close(dict(module.named_buffers()), dict(other.named_buffers()), rtol=0, atol=0)


@each_training
def test_autocast(training, device):
    module, torch_module = gk.BatchNormAct2d(3, act="relu").train(training), nn.BatchNorm2d(3).train(training)
    x = torch.randn(4, 3, 5, 5)
    with torch.autocast(device, dtype=torch.bfloat16):
        for each in (x, x.bfloat16()):
            assert_close(module(each), F.relu(torch_module(each)))
    assert_close(dict(module.named_buffers()), dict(torch_module.named_buffers()))


def test_autocast_promotes_a_residual_of_another_dtype(device):
    bn, torch_bn = gk.BatchNormAct2d(3, act="relu"), nn.BatchNorm2d(3)
    h, x = torch.randn(4, 3, 5, 5).bfloat16(), torch.randn(4, 3, 5, 5, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y, expected = bn(h, x), F.relu(torch_bn(h) + x)
    assert y.dtype == expected.dtype == torch.float32
    assert_close(y, expected, rtol=0, atol=0.02)
    assert_close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    with pytest.raises(RuntimeError, match="residual"):
        bn(h, x)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoint(use_reentrant):
    """Forward runs twice, so the running statistics are updated twice, as with torch's module."""
    module, torch_module = gk.BatchNormAct2d(3, act="relu"), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    start = torch.randn(4, 3, 5, 5)
    grads = []
    for each in (module, torch_module):
        x = start.clone().requires_grad_()
        checkpoint(each, x, use_reentrant=use_reentrant).square().sum().backward()
        grads.append(x.grad)
    assert_close(grads[0], grads[1])
    assert_close(module.weight.grad, torch_module[0].weight.grad)
    assert_close(dict(module.named_buffers()), dict(torch_module[0].named_buffers()))


def test_saved_tensors_may_be_moved_by_hooks(device):
    given = arguments((4, 3, 5, 5), residual=True)
    expected = call(gk.batch_norm_act, given, True, "leaky_relu")
    with saved_tensors_hooks(lambda tensor: tensor.detach().cpu().numpy().copy(), lambda kept: torch.from_numpy(kept).to(device)):
        assert_same_bits(call(gk.batch_norm_act, given, True, "leaky_relu"), expected)


def test_hooks_may_return_x_in_another_memory_format(device):
    """The mask has the order of the x that was saved."""
    x, residual, grad_y = torch.randn(3, 2, 8, 7, 9, device=device).unbind()
    x, residual = (each.contiguous(memory_format=torch.channels_last).requires_grad_() for each in (x, residual))
    for norm in (
        lambda: gk.batch_norm_act(x, None, None, training=True, act="relu", residual=residual),
        lambda: gk.group_norm_act(x, 2, act="relu", residual=residual),
    ):
        expected = torch.autograd.grad(norm(), (x, residual), grad_y)
        with saved_tensors_hooks(lambda tensor: tensor.contiguous(), lambda tensor: tensor):
            y = norm()
        assert_close(torch.autograd.grad(y, (x, residual), grad_y), expected)


@each_act
def test_deterministic_mode(act):
    """Fresh memory is nan in this mode, so elements that a kernel does not write would change the bits."""
    for shape, residual in (((4, 3, 5), True), ((4, 3, 5), False), ((5, 17, 9, 9), True)):
        given = arguments(shape, residual=residual)
        for training in (True, False):
            expected = call(gk.batch_norm_act, given, training, act)
            with DeterministicGuard(True):
                assert_same_bits(call(gk.batch_norm_act, given, training, act), expected)


# The rows of the last part are fewer than make a line of whole vectors.
@pytest.mark.parametrize("shape", [(65_537, 1), (7_714, 17), (5, 17)], ids=str)
def test_a_mask_is_written_whole(shape):
    x = torch.randn(shape)
    with DeterministicGuard(True):
        *_, mask = OPS.batch_norm_act(x, None, None, None, None, x - 100, None, True, 0.1, 1e-5, "relu", 0.0)
    assert mask.numel() > 0
    assert not mask.any()


def test_backward_again_and_after_the_graph_is_freed():
    x = torch.randn(4, 3, requires_grad=True)
    y = gk.BatchNormAct1d(3)(x).square().sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    assert_close(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


# torch's own samples


# The operator as in torch, and with everything that it adds.
each_use = pytest.mark.parametrize("act,residual", [("identity", False), ("relu", True), ("swish", True)])


@each_dtype
@each_use
def test_op_db_samples(act, residual, dtype, device):
    op = next(op for op in op_db if op.name == "nn.functional.batch_norm" and op.variant_test_name == "")
    samples = list(op.sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) >= 12

    def ours(x, *operands, residual, **options):
        return gk.batch_norm_act(x, *operands, **options, act=act, act_param=ACTS[act], residual=residual)

    def torchs(x, *operands, residual, **options):
        z = F.batch_norm(x, *operands, **options)
        return acts.ACTS[act].function(z if residual is None else z + residual, ACTS[act])

    for sample in samples:
        in_formats = [sample, sample.noncontiguous()]
        if sample.input.dim() in MEMORY_FORMATS:
            memory_format = MEMORY_FORMATS[sample.input.dim()]
            in_formats.append(sample.transform(lambda x, to=memory_format: x.contiguous(memory_format=to) if x.dim() > 3 else x))
        for each in in_formats:
            results = []
            added = torch.randn_like(each.input) if residual else None
            for function in (ours, torchs):
                running_mean, running_var, weight, bias = (None if arg is None else arg.detach().clone() for arg in each.args)
                leaves = [each.input.detach().clone(memory_format=torch.preserve_format).requires_grad_()]
                leaves += [tensor.requires_grad_() for tensor in (weight, bias) if tensor is not None]
                leaves += [added.clone().requires_grad_()] if residual else []

                def run(function=function, leaves=leaves, stats=(running_mean, running_var), affine=(weight, bias), each=each):
                    y = function(leaves[0], *stats, *affine, **each.kwargs, residual=leaves[-1] if residual else None)
                    return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y)), *(stat for stat in stats if stat is not None)

                results.append(outcome(run))
            if isinstance(results[1][0], type):
                assert results[0] == results[1]
            else:
                assert_close(results[0], results[1], equal_nan=True, msg=lambda text, each=each: f"{each}: {text}")


def test_op_db_has_no_error_inputs():
    """This fails once torch adds error inputs, which then have to be run here."""
    assert all(op.error_inputs_func is None for op in op_db if op.name == "nn.functional.batch_norm")


@each_dtype
@each_training
@each_use
@pytest.mark.parametrize("dim", [3, 4, 5])
def test_module_db_inputs(dim, act, residual, training, dtype, device):
    module_class, torch_class = MODULES[dim]
    info = next(info for info in module_db if info.module_cls is torch_class)
    inputs = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training)
    assert len(inputs) >= 6
    for each in inputs:
        constructor, (x,) = each.constructor_input, each.forward_input.args
        formats = [torch.contiguous_format, *([MEMORY_FORMATS[x.dim()]] if x.dim() in MEMORY_FORMATS else [])]
        for memory_format in formats:
            module = module_class(*constructor.args, **constructor.kwargs, dtype=dtype, act=act, act_param=ACTS[act]).train(training)
            torch_module = torch_class(*constructor.args, **constructor.kwargs, dtype=dtype).train(training)
            module.load_state_dict(torch_module.state_dict())
            grad_y = torch.linspace(-1, 1, x.numel(), dtype=dtype).view(x.shape)
            added = torch.randn_like(x)
            results = []
            for cls in (module, torch_module):
                leaves = [each.detach().clone().contiguous(memory_format=memory_format).requires_grad_() for each in (x, added)]
                if not residual:
                    leaves.pop()
                if cls is module:
                    y = cls(*leaves)
                else:
                    y = acts.ACTS[act].function(cls(leaves[0]) + leaves[1] if residual else cls(leaves[0]), ACTS[act])
                y.backward(grad_y)
                results.append((y, [leaf.grad for leaf in leaves], [parameter.grad for parameter in cls.parameters()], cls.state_dict()))
            # Where hundreds of terms cancel, torch's float32 sums are worse than assert_close allows.
            tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
            assert_close(results[0], results[1], **tolerance, msg=lambda text, each=each: f"{each.desc}: {text}")


# modules


@pytest.mark.parametrize("dim", MODULES)
@each_training
def test_module_equals_batch_norm_then_act(dim, training):
    module_class, torch_class = MODULES[dim]
    shape = (4, 3, 5, 2, 3)[:dim]
    for act, record in acts.ACTS.items():
        torch_act = record.module(record.default, next(iter(record.modules)))
        module, torch_module = module_class(3, act=act).train(training), torch_class(3).train(training)
        x, residual = torch.randn(shape), torch.randn(shape)
        assert_close(module(x), torch_act(torch_module(x)))
        assert_close(module(x, residual), torch_act(torch_module(x) + residual))
        assert_close(module(x, residual=residual), torch_act(torch_module(x) + residual))
        assert_close(module.state_dict(), torch_module.state_dict())
        assert isinstance(module, torch_class)


def test_state_dict_both_ways():
    module, torch_module = gk.BatchNormAct2d(3), nn.BatchNorm2d(3)
    module(torch.randn(4, 3, 5, 5))
    assert list(module.state_dict()) == list(torch_module.state_dict())
    assert module.state_dict()._metadata == torch_module.state_dict()._metadata
    torch_module.load_state_dict(module.state_dict())
    assert_close(torch_module.state_dict(), module.state_dict(), rtol=0, atol=0)
    torch_module(torch.randn(4, 3, 5, 5))
    module.load_state_dict(torch_module.state_dict())
    assert_close(torch_module.state_dict(), module.state_dict(), rtol=0, atol=0)
    old = {name: tensor for name, tensor in torch_module.state_dict().items() if name != "num_batches_tracked"}
    gk.BatchNormAct2d(3).load_state_dict(old)


def test_options_of_the_module():
    x = torch.randn(4, 3, 5, 5) * 2 + 1
    plain = gk.BatchNormAct2d(3, affine=False, act="identity")
    assert plain.weight is None and plain.bias is None
    assert_close(plain(x), nn.BatchNorm2d(3, affine=False)(x))
    without_bias = gk.BatchNormAct2d(3, bias=False, act="identity")
    assert without_bias.bias is None and "bias" not in without_bias.state_dict()
    assert_close(without_bias(x), nn.BatchNorm2d(3)(x))
    untracked, torch_untracked = (
        gk.BatchNormAct2d(3, track_running_stats=False, act="identity"),
        nn.BatchNorm2d(3, track_running_stats=False),
    )
    assert untracked.running_mean is None and list(untracked.state_dict()) == ["weight", "bias"]
    for each in (untracked, untracked.eval()):
        assert_close(each(x), torch_untracked(x))
    wide = gk.BatchNormAct2d(3, 1e-3, 0.3, dtype=torch.float64)
    assert wide.weight.dtype == torch.float64 and (wide.eps, wide.momentum) == (1e-3, 0.3)
    assert wide(x.double()).dtype == torch.float64
    assert gk.BatchNormAct2d(3, device="meta")(x.to("meta")).is_meta


def test_switching_off_the_running_statistics_later():
    module, torch_module = gk.BatchNormAct2d(3, act="identity"), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5) * 2 + 1
    for each in (module, torch_module):
        each.track_running_stats = False
    assert_close(module(x), torch_module(x))
    assert_close(module.state_dict(), torch_module.state_dict())
    assert_close(module.eval()(x), torch_module.eval()(x))


@pytest.mark.parametrize(
    "act,name,param",
    [
        (nn.Identity(), "identity", None),
        (nn.ReLU(), "relu", None),
        (nn.ReLU(inplace=True), "relu", None),
        (nn.ReLU6(), "relu6", None),
        (nn.LeakyReLU(0.3), "leaky_relu", 0.3),
        (nn.ELU(1.3), "elu", 1.3),
        (nn.SiLU(), "swish", 1.0),
        (gk.LeakyReLU(0.3), "leaky_relu", 0.3),
        (gk.ELU(1.3), "elu", 1.3),
        (gk.Swish(1.7), "swish", 1.7),
    ],
    ids=repr,
)
def test_act_as_a_module(act, name, param):
    module = gk.BatchNormAct2d(3, act=act)
    named = gk.BatchNormAct2d(3, act=name, act_param=param)
    x = torch.randn(4, 3, 5, 5)
    assert_bitwise_equal("y", module(x), named(x))
    assert list(module.state_dict()) == list(named.state_dict())
    assert_close(module.eval()(x), act(nn.functional.batch_norm(x, module.running_mean, module.running_var)))


def test_copies_of_the_module():
    module = gk.BatchNormAct2d(3, act=nn.ELU(1.3))
    module(torch.randn(4, 3, 5, 5))
    x = torch.randn(4, 3, 5, 5)
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)))
    expected = module(x)
    for each in copies:
        assert_bitwise_equal("y", each(x), expected)
        assert_close(each.state_dict(), module.state_dict(), rtol=0, atol=0)
        assert repr(each) == repr(module)
    assert "elu" in repr(module) and "1.3" in repr(module)


def test_meta():
    x = torch.randn(4, 3, 5, 5, device="meta").contiguous(memory_format=torch.channels_last)
    y = gk.BatchNormAct2d(3, device="meta")(x, x)
    assert y.is_meta and y.stride() == x.stride()
