"""leaky_relu, prelu, rrelu, elu, swish and their modules: values, gradients, memory, and torch's machinery.

"torch's" result is that of gradkernels.reference in the tensor's dtype, the "exact" one has more digits
(accuracy.py). Gradients of parameters and random slopes have sections of their own at the end.
"""

import contextlib
import copy
import functools
import itertools
import math
import pickle
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.library import opcheck
from torch.testing import assert_close, make_tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import DeterministicGuard, noncontiguous_like
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from accuracy import (
    DTYPES,
    ROUTED_DTYPES,
    SIXTEEN_BITS,
    SWISH_GRADIENT,
    ULP_BOUND,
    activation_scales,
    assert_accurate,
    assert_bitwise_equal,
    assert_same_outcome,
    exact_activation,
    extended,
    outcome,
)
from gradkernels import _native, reference
from memory import saved_by, skip_unless_free

OPS = torch.ops.gradkernels


@dataclass(frozen=True)
class Activation:
    """function(x, param), its reference, torch's function, and the modules. formula: the name in accuracy.py."""

    name: str
    formula: str
    function: Any
    reference: Any
    torchs: Any
    module: Any
    default: float
    params: tuple
    torch_module: Any = None
    has_inplace: bool = True

    def __repr__(self):
        return self.name


def with_weight(function):
    """function(x, weight) with the weight as a number, which every dtype has to hold exactly."""
    return lambda x, weight=0.25: function(x, torch.full((1,), weight, dtype=x.dtype, device=x.device))


def with_beta(function):
    return lambda x, beta=1.0: function(x, torch.full((1,), beta, dtype=x.dtype, device=x.device))


def around(function):
    """rrelu in evaluation: its slope is the middle of its bounds."""
    return lambda x, slope=0.25, inplace=False: function(x, slope - 0.125, slope + 0.125, False, inplace)


def drawn(function):
    """rrelu in training with equal bounds, which leave one slope to draw."""
    return lambda x, slope=0.25, inplace=False: function(x, slope, slope, True, inplace)


def sloped(x, slope=0.25, inplace=False):
    """rrelu for around() and drawn().

    torch's rrelu loses the strides and has no vmap and no float16 training.
    """
    return F.leaky_relu(x, slope, inplace)


def in_float32(param):
    """The parameter as the kernels round it, so that this rounding does not count as an error."""
    return torch.tensor(param, dtype=torch.float32).item()


SLOPES = (0.25, 0.0, 1.5, -0.5)
ACTIVATIONS = [
    Activation(
        *("leaky_relu", "leaky_relu", gk.leaky_relu, reference.leaky_relu, F.leaky_relu),
        *(gk.LeakyReLU, 0.01, (0.01, 0.25, 0.0, 1.5, -0.5), nn.LeakyReLU),
    ),
    Activation(
        *("prelu", "leaky_relu", with_weight(gk.prelu), with_weight(reference.prelu), with_weight(F.prelu)),
        *(lambda weight=0.25: gk.PReLU(init=weight), 0.25, SLOPES, nn.PReLU, False),
    ),
    Activation(
        *("rrelu", "leaky_relu", around(gk.rrelu), around(reference.rrelu), sloped),
        *(lambda slope=0.25: gk.RReLU(slope - 0.125, slope + 0.125).eval(), 0.25, SLOPES),
    ),
    Activation(
        *("rrelu in training", "leaky_relu", drawn(gk.rrelu), reference.leaky_relu, sloped),
        *(lambda slope=0.25: gk.RReLU(slope, slope), 0.25, SLOPES),
    ),
    Activation(
        *("elu", "elu", gk.elu, reference.elu, F.elu, gk.ELU, 1.0, (1.0, in_float32(1.3), 0.0, -0.75), nn.ELU),
    ),
    Activation(
        *("swish", "swish", gk.swish, reference.swish, F.silu, gk.Swish, 1.0, (1.0, in_float32(1.7), 0.0, -0.5), nn.SiLU, False),
    ),
    Activation(
        *("swish with a tensor", "swish", with_beta(gk.swish), with_beta(reference.swish), F.silu),
        *(lambda beta=1.0: gk.Swish(beta, learnable=True), 1.0, (1.0, 1.75, 0.0, -0.5), None, False),
    ),
]
BY_NAME = {act.name: act for act in ACTIVATIONS}
INPLACE = [act for act in ACTIVATIONS if act.has_inplace]
# The last two are next to the chunk of a thread.
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1009, 32767, 32769]
LAYOUTS = {
    "0-d": lambda make: make(()),
    "empty": lambda make: make(3, 0, 2),
    "contiguous": lambda make: make(5, 13),
    "transposed": lambda make: make(13, 5).t(),
    "permuted": lambda make: make(4, 3, 5).permute(2, 0, 1),
    "channels_last": lambda make: make(2, 5, 4, 3).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda make: make(2, 5, 2, 4, 3).contiguous(memory_format=torch.channels_last_3d),
    "expanded": lambda make: make(1, 13).expand(5, 13),
    "every second": lambda make: make(5, 26)[:, ::2],
    "rows cut out": lambda make: make(7, 13)[1:6],
    "columns cut out": lambda make: make(5, 17)[:, 1:14],
    "storage offset": lambda make: make(68)[3:],
}

each_act = pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
each_inplace = pytest.mark.parametrize("act", INPLACE, ids=repr)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_param = pytest.mark.parametrize("act,param", [(act, param) for act in ACTIVATIONS for param in act.params], ids=str)


def leaf(tensor):
    return tensor.detach().requires_grad_()


def value_and_grad(function, x, grad_y, *args):
    x = leaf(x)
    y = function(x, *args)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    return y.detach(), grad_x


def away_from_kink(*size, dtype=torch.float64):
    """Values so far from the kink at 0 that finite differences do not cross it."""
    x = torch.randn(*size, dtype=dtype)
    return x + x.sign() * 0.1


def scales(act, x, grad_y, param):
    """elu computes its gradient from the output, except in 16 bits and for a negative alpha."""
    return activation_scales(x, grad_y, act.formula, param, reads_output=x.dtype not in SIXTEEN_BITS and param >= 0)


# values

# Bounds of gradients that are not ULP_BOUND, in ulp of the terms.
GRADIENT_BOUNDS = {"swish": SWISH_GRADIENT}


def exact_value_and_grad(act, x, grad_y, param):
    if x.dtype == torch.float64:
        return exact_activation(x, grad_y, act.formula, param)
    return value_and_grad(act.reference, x.double(), grad_y.double(), param)


@each_dtype
@each_param
def test_value_and_gradient(act, param, dtype):
    for size in SIZES if param == act.params[0] else (4099,):
        x, grad_y = torch.randn(size, dtype=dtype) * 4, torch.randn(size, dtype=dtype)
        y, grad_x = value_and_grad(act.function, x, grad_y, param)
        torch_y, torch_grad_x = value_and_grad(act.reference, x, grad_y, param)
        exact_y, exact_grad_x = exact_value_and_grad(act, x, grad_y, param)
        y_scale, grad_scale = scales(act, x, grad_y, param)
        assert_accurate(f"y, size {size}", y, torch_y, exact_y, scale=y_scale)
        bound = GRADIENT_BOUNDS.get(act.formula, ULP_BOUND)
        assert_accurate(f"grad_x, size {size}", grad_x, torch_grad_x, exact_grad_x, scale=grad_scale, bound=bound)
        assert_bitwise_equal(f"y without grad, size {size}", act.function(x, param), y)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("act,param", [(act, param) for act in ACTIVATIONS for param in act.params[:2]], ids=str)
def test_every_value_of_16_bits_is_rounded_once(act, param, dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    grad_y = torch.randn(x.shape).to(dtype)
    y, grad_x = value_and_grad(act.function, x, grad_y, param)
    exact_y, exact_grad_x = value_and_grad(act.reference, x.double(), grad_y.double(), param)
    told = exact_grad_x.isfinite()
    y_scale, grad_scale = scales(act, x, grad_y, param)
    assert_accurate("y", y, y, exact_y, scale=y_scale)
    grad_scale = np.broadcast_to(grad_scale, x.shape)[told.cpu()]
    bound = GRADIENT_BOUNDS.get(act.formula, ULP_BOUND)
    assert_accurate("grad_x", grad_x[told], grad_x[told], exact_grad_x[told], scale=grad_scale, bound=bound)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_assert_accurate_in_16_bits(dtype):
    """It accepts exact values rounded once, but not their neighbours or an error of 1/4 ulp before rounding."""
    exact = torch.randn(4099, dtype=torch.float64) * torch.logspace(-9, 4, 4099, dtype=torch.float64)
    rounded = exact.to(dtype)
    assert_accurate("rounded", rounded, rounded, exact)
    one_ulp_off = (rounded.view(torch.int16) + (torch.arange(4099) == 4000)).view(dtype)
    a_quarter_off = (exact * (1 + torch.finfo(dtype).eps / 4)).to(dtype)
    for wrong in (one_ulp_off, a_quarter_off):
        with pytest.raises(AssertionError, match="ulp"):
            assert_accurate("wrong", wrong, wrong, exact)


@each_act
def test_reference_in_float64_is_exact(act):
    for param in act.params:
        x, grad_y = torch.randn(1009, dtype=torch.float64) * 4, torch.randn(1009, dtype=torch.float64)
        y, grad_x = value_and_grad(act.reference, x, grad_y, param)
        exact_y, exact_grad_x = exact_activation(x, grad_y, act.formula, param)
        y_scale, grad_scale = scales(act, x, grad_y, param)
        assert_accurate("y", y, torch.from_numpy(exact_y.astype(np.float64)), exact_y, scale=8 * y_scale)
        assert_accurate("grad_x", grad_x, torch.from_numpy(exact_grad_x.astype(np.float64)), exact_grad_x, scale=8 * grad_scale)


@each_dtype
@each_param
def test_far_from_zero(act, param, dtype):
    """Where exp overflows or underflows, results are right to 2 ulp of 1 or of the result."""
    x = torch.linspace(-1100, 1100, 4001, dtype=torch.float64).to(dtype)
    grad_y = torch.ones_like(x)
    y, grad_x = value_and_grad(act.function, x, grad_y, param)
    torch_y, torch_grad_x = value_and_grad(act.reference, x, grad_y, param)
    exact_y, exact_grad_x = exact_activation(x, grad_y, act.formula, param)
    assert_accurate("y", y, torch_y, exact_y, scale=1)
    assert_accurate("grad_x", grad_x, torch_grad_x, exact_grad_x, scale=1)


@each_dtype
@each_act
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_stay_where_they_are(act, dtype, value):
    """test_special_values.py tests the results at these elements."""
    for size in SIZES[1:-2]:
        x, grad_y = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)
        clean_y, clean_grad_x = value_and_grad(act.function, x, grad_y)
        x[0] = x[-1] = value
        y, grad_x = value_and_grad(act.function, x, grad_y)
        assert_bitwise_equal(f"y between, size {size}", y[1:-1], clean_y[1:-1])
        assert_bitwise_equal(f"grad_x between, size {size}", grad_x[1:-1], clean_grad_x[1:-1])


@each_act
@each_dtype
def test_same_bits_for_any_number_of_threads(act, dtype, each_thread_count):
    x, grad_y = torch.randn(100_003, dtype=dtype), torch.randn(100_003, dtype=dtype)
    one, two = each_thread_count(lambda: value_and_grad(act.function, x, grad_y))
    again = value_and_grad(act.function, x, grad_y)
    for name, each, other, repeated in zip(("y", "grad_x"), one, two, again, strict=True):
        assert_bitwise_equal(f"{name} with 2 threads", other, each)
        assert_bitwise_equal(f"{name} run again", repeated, each)


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act.name != "rrelu in training"], ids=repr)
@pytest.mark.parametrize("dtype", ROUTED_DTYPES, ids=str)
def test_other_dtypes_equal_torchs(act, dtype):
    x = (torch.randn(65) * 4).to(dtype)
    assert_same_outcome("y", outcome(act.function, x), outcome(act.torchs, x))
    if act.has_inplace:
        actual, expected = x.clone(), x.clone()
        assert_same_outcome(
            "y in place", outcome(act.function, actual, act.default, True), outcome(act.torchs, expected, act.default, True)
        )
        assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        *(gk.leaky_relu, gk.elu, gk.swish, gk.rrelu),
        lambda x: gk.prelu(x, torch.ones(1)),
        lambda x: gk.leaky_relu(x, -0.5, inplace=True),
        lambda x: gk.elu(x, inplace=True),
        lambda x: gk.rrelu(x, training=True),
        lambda x: gk.rrelu(x, training=True, inplace=True),
        lambda x: gk.swish(x, 2.0),
        lambda x: gk.swish(x, torch.ones(1)),
    ],
)
@pytest.mark.parametrize("wrong", [[1.0], 1.0, None], ids=str)
def test_x_that_is_not_a_tensor_is_a_type_error(function, wrong, monkeypatch):
    with pytest.raises(TypeError):
        function(wrong)
    monkeypatch.setattr(_native, "C", None)
    with pytest.raises(TypeError):
        function(wrong)


@each_act
def test_meta(act):
    x = torch.randn(4, 6, device="meta").t()
    y = act.function(x)
    assert y.is_meta and y.shape == x.shape and y.stride() == x.stride()


# layouts


@each_act
@each_dtype
@each_layout
def test_layout(act, dtype, layout):
    x = LAYOUTS[layout](lambda *size: torch.randn(*size, dtype=dtype))
    grad_y = torch.randn(x.shape, dtype=dtype)
    y, grad_x = value_and_grad(act.function, x, grad_y)
    torch_y, torch_grad_x = value_and_grad(act.torchs, x, grad_y)
    assert_close(y, torch_y)
    assert_close(grad_x, torch_grad_x)
    assert y.stride() == torch_y.stride(), f"y has strides {y.stride()}, torch's {torch_y.stride()}"


@each_act
@each_layout
def test_layout_of_grad_y(act, layout):
    grad_y = LAYOUTS[layout](torch.randn)
    for x in (torch.randn(grad_y.shape), torch.randn_like(grad_y)):
        _, grad_x = value_and_grad(act.function, x, grad_y)
        _, torch_grad_x = value_and_grad(act.torchs, x, grad_y)
        assert_close(grad_x, torch_grad_x)


@each_act
def test_grad_y_of_zeros_and_of_a_sum(act):
    x = torch.randn(65, requires_grad=True)
    y = act.function(x)
    (zero,) = torch.autograd.grad(y, x, torch.zeros(65))
    assert_bitwise_equal("grad_x", zero.abs(), torch.zeros(65))
    (summed,) = torch.autograd.grad(act.function(x).sum(), x)
    assert_close(summed, value_and_grad(act.torchs, x, torch.ones(65))[1])


# in place


@each_dtype
@each_inplace
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
def test_inplace(act, dtype, layout):
    root = LAYOUTS[layout](lambda *size: torch.randn(*size, dtype=dtype))
    grad_y = torch.randn(root.shape, dtype=dtype)
    for param in (param for param in act.params if param >= 0):
        results = []
        for function in (act.function, act.torchs):
            start = leaf(root)
            x = start * 1
            version = x._version
            y = function(x, param, inplace=True)
            assert y is x
            assert x._version == version + 1
            results.append((y, *torch.autograd.grad(y, start, grad_y)))
        assert_close(results[0], results[1])
        assert results[0][0].stride() == results[1][0].stride()
    with torch.no_grad():
        x = root.clone()
        assert_bitwise_equal("in place without grad", act.function(x, inplace=True), act.function(root))


@each_inplace
def test_inplace_writes_nothing_outside(act):
    base = torch.randn(9, 11)
    expected = base.clone()
    expected[1:7, 2:9:2] = act.function(expected[1:7, 2:9:2])
    act.function(base[1:7, 2:9:2], inplace=True)
    assert_bitwise_equal("base", base, expected)


@each_inplace
def test_inplace_through_a_view(act):
    start = torch.randn(12)
    results = []
    for function in (act.function, act.torchs):
        root = leaf(start)
        base = root * 2
        function(base[3:9], inplace=True)
        assert base._version == 1
        (base * torch.arange(12)).sum().backward()
        results.append((base, root.grad))
    assert_close(results[0], results[1])


@each_inplace
def test_inplace_on_a_leaf_is_refused_before_writing(act):
    x = torch.randn(17, requires_grad=True)
    before = x.detach().clone()
    expected = outcome(act.torchs, x, act.default, True)
    assert expected[0] is RuntimeError
    assert outcome(act.function, x, act.default, True) == expected
    assert_bitwise_equal("x", x.detach(), before)
    assert x._version == 0


@each_inplace
def test_inplace_on_overlapping_memory_is_refused_before_writing(act):
    x = torch.randn(1, 5)
    before = x.clone()
    expected = outcome(act.torchs, x.expand(3, 5), act.default, True)
    assert expected[0] is RuntimeError
    assert outcome(act.function, x.expand(3, 5), act.default, True) == expected
    assert_bitwise_equal("x", x, before)


@each_dtype
@pytest.mark.parametrize("act", [act for act in INPLACE if act.formula == "leaky_relu"], ids=repr)
def test_inplace_with_a_negative_slope_uses_the_mask(act, dtype):
    root, grad_y = torch.randn(131, dtype=dtype, requires_grad=True), torch.randn(131, dtype=dtype)
    y = act.function(root * 1, -0.5, inplace=True)
    (grad_x,) = torch.autograd.grad(y, root, grad_y)
    torch_y, torch_grad_x = value_and_grad(F.leaky_relu, root, grad_y, -0.5)
    assert_bitwise_equal("y", y.detach(), torch_y)
    assert_bitwise_equal("grad_x", grad_x, torch_grad_x)


def test_inplace_elu_with_a_negative_alpha_is_torchs_error():
    root = torch.randn(9, requires_grad=True)
    expected = outcome(lambda: F.elu(root * 1, -0.5, inplace=True).sum().backward())
    assert expected[0] is RuntimeError
    assert outcome(lambda: gk.elu(root * 1, -0.5, inplace=True).sum().backward()) == expected
    assert root.grad is None
    assert_close(gk.elu(root.detach() * 1, -0.5, inplace=True), F.elu(root.detach(), -0.5))


@each_inplace
def test_y_written_after_an_inplace_call(act):
    """The leaky family saves the mask, so this is allowed; elu saves y, and its backward reports the write."""
    root = torch.randn(9, requires_grad=True)
    y = act.function(root * 1, inplace=True)
    with torch.no_grad():
        y.mul_(2)
    if act.formula == "leaky_relu":
        (grad_x,) = torch.autograd.grad(y, root, torch.ones(9))
        assert_close(grad_x, torch.where(root > 0, 1.0, act.default))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_leaky_relu_does_not_need_x_again():
    root, grad_y = torch.randn(131, requires_grad=True), torch.randn(131)
    x = root * 1
    y = gk.leaky_relu(x, -0.5)
    with torch.no_grad():
        x.zero_()
    (grad_x,) = torch.autograd.grad(y, root, grad_y)
    assert_bitwise_equal("grad_x", grad_x, value_and_grad(F.leaky_relu, root, grad_y, -0.5)[1])


# memory


@each_dtype
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_leaky_relu_keeps_one_bit_per_element(dtype, size, inplace):
    x = torch.randn(size, dtype=dtype, requires_grad=True) * 1
    _, saved = saved_by(lambda: gk.leaky_relu(x, inplace=inplace))
    assert [(each.dtype, each.numel()) for each in saved] == [(torch.uint8, (size + 7) // 8)]


@each_dtype
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_rrelu_keeps_one_bit_per_element_and_a_seed(dtype, inplace):
    x = torch.randn(1009, dtype=dtype, requires_grad=True) * 1
    _, saved = saved_by(lambda: gk.rrelu(x, training=True, inplace=inplace))
    assert sorted(((each.dtype, each.numel()) for each in saved), key=str) == [(torch.int64, 1), (torch.uint8, 127)]


# name -> ours, torch's, and the bytes that ours saves for n elements of `size` bytes
KEPT = {
    "leaky_relu": (gk.leaky_relu, F.leaky_relu, lambda n, size: n / 8),
    "leaky_relu in place": (lambda x: gk.leaky_relu(x, inplace=True), lambda x: F.leaky_relu(x, inplace=True), lambda n, size: n / 8),
    "rrelu in eval": (gk.rrelu, F.rrelu, lambda n, size: n / 8),
    "rrelu in training": (lambda x: gk.rrelu(x, training=True), lambda x: F.rrelu(x, training=True), lambda n, size: n / 8 + 8),
    "rrelu in training, in place": (
        lambda x: gk.rrelu(x, training=True, inplace=True),
        lambda x: F.rrelu(x, training=True, inplace=True),
        lambda n, size: n / 8 + 8,
    ),
    "prelu": (lambda x: gk.prelu(x, slopes_for(x)), lambda x: F.prelu(x, slopes_for(x)), lambda n, size: (n + 8) * size),
    "elu": (gk.elu, F.elu, lambda n, size: n * size),
    "elu in place": (lambda x: gk.elu(x, inplace=True), lambda x: F.elu(x, inplace=True), lambda n, size: n * size),
    "swish": (gk.swish, F.silu, lambda n, size: n * size),
    "swish, beta 1.5": (lambda x: gk.swish(x, 1.5), lambda x: x * torch.sigmoid(1.5 * x), lambda n, size: n * size),
    "swish, beta a tensor": (
        lambda x: gk.swish(x, slopes_for(x)),
        lambda x: x * torch.sigmoid(slopes_for(x)[:, None] * x),
        lambda n, size: (n + 8) * size,
    ),
}


def slopes_for(x):
    return torch.full((8,), 0.25, dtype=x.dtype, requires_grad=True)


def bytes_kept(function, dtype):
    """The bytes saved for 8192 elements; memory that is saved twice counts once."""
    x = torch.randn(2, 8, 512, dtype=dtype, requires_grad=True) * 1
    return sum({each.data_ptr(): each.numel() * each.element_size() for each in saved_by(lambda: function(x))[1]}.values())


@each_dtype
@pytest.mark.parametrize("what", KEPT)
def test_bytes_kept_for_backward(what, dtype):
    ours, torchs, expected = KEPT[what]
    kept = bytes_kept(ours, dtype)
    assert kept == expected(8192, dtype.itemsize)
    if not (what.startswith("rrelu in training") and dtype == torch.float16):
        assert kept <= bytes_kept(torchs, dtype)


@each_act
def test_nothing_is_kept_without_grad(act):
    x = torch.randn(65)
    assert saved_by(lambda: act.function(x))[1] == []
    with torch.no_grad():
        assert saved_by(lambda: act.function(leaf(x)))[1] == []


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act.formula != "leaky_relu" or act.name == "prelu"], ids=repr)
def test_saved_tensors_are_not_copies(act):
    x = torch.randn(65, requires_grad=True) * 1
    y, saved = saved_by(lambda: act.function(x))
    assert [each.data_ptr() in (x.data_ptr(), y.data_ptr()) for each in saved if each.numel() > 1] == [True]


def test_elu_in_16_bits_keeps_its_input():
    for dtype in SIXTEEN_BITS:
        x = torch.randn(65, dtype=dtype, requires_grad=True) * 1
        assert [each.data_ptr() for each in saved_by(lambda x=x: gk.elu(x))[1]] == [x.data_ptr()]


# derivatives


@each_param
def test_gradcheck(act, param):
    for x in (away_from_kink(3, 7), away_from_kink(5, 4).t()):
        inputs = (leaf(x),)
        assert gradcheck(lambda x: act.function(x, param), inputs, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(lambda x: act.function(x, param), inputs, fast_mode=True, check_batched_grad=True)


@each_inplace
def test_gradcheck_inplace(act):
    inputs = (leaf(away_from_kink(3, 7)),)
    assert gradcheck(lambda x: act.function(x * 1, act.params[1], inplace=True), inputs, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(lambda x: act.function(x * 1, act.params[1], inplace=True), inputs, fast_mode=True)


@each_act
def test_second_derivatives_are_torchs(act):
    x, grad_y = torch.randn(65, requires_grad=True), torch.randn(65, requires_grad=True)
    results = []
    for function in (act.function, act.torchs):
        (grad_x,) = torch.autograd.grad(function(x), x, grad_y, create_graph=True)
        results.append((grad_x, *torch.autograd.grad(grad_x.square().sum(), (x, grad_y), allow_unused=True, materialize_grads=True)))
    assert_close(results[0], results[1])


@each_act
def test_backward_again_and_after_the_graph_is_freed(act):
    x = torch.randn(9, requires_grad=True)
    y = act.function(x * 1)
    y.sum().backward(retain_graph=True)
    once = x.grad.clone()
    y.sum().backward()
    assert_close(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


# every way torch calls an operator


OPCHECKED = [
    *("leaky_relu", "leaky_relu_", "leaky_relu_with_mask", "leaky_relu_with_mask_", "leaky_relu_backward"),
    *("rrelu_with_mask", "rrelu_with_mask_", "rrelu_backward", "prelu", "prelu_backward"),
    *("elu", "elu_", "elu_backward", "swish", "swish_backward", "swish.Tensor", "swish_backward.Tensor"),
]


def opcheck_samples():
    """operator -> a list of its arguments"""
    forward, samples = [], {}
    layouts = ("0-d", "empty", "contiguous", "transposed", "channels_last", "expanded", "every second")
    for layout in layouts:
        for requires_grad in (False, True):
            forward.append(LAYOUTS[layout](torch.randn).detach().requires_grad_(requires_grad))
    samples["leaky_relu"] = [(x, 0.1) for x in forward]
    samples["elu"] = [(x, alpha) for x in forward for alpha in (1.3, -0.5)]
    samples["swish"] = [(x, 1.7) for x in forward]
    plain = [torch.randn(3, 5), torch.randn(5, 3, dtype=torch.float64).t(), torch.randn(0), torch.randn(3, 10)[:, ::2].bfloat16()]
    seed = torch.tensor(1234567890123)
    for name in ("leaky_relu_", "leaky_relu_with_mask", "leaky_relu_with_mask_", "elu_"):
        samples[name] = [(x, 0.1) for x in plain]
    samples["rrelu_with_mask"] = [(x, seed, 0.1, 0.3) for x in (*plain, *forward)]
    samples["rrelu_with_mask_"] = [(x, seed, 0.1, 0.3) for x in plain]
    backward = ("leaky_relu_backward", "rrelu_backward", "elu_backward", "swish_backward", "prelu_backward", "swish_backward.Tensor")
    samples |= {name: [] for name in ("prelu", "swish.Tensor", *backward)}
    for dtype in DTYPES:
        for requires_grad in (False, True) if dtype == torch.float32 else (True,):
            x, grad_y = (torch.randn(3, 5, dtype=dtype, requires_grad=requires_grad) for _ in range(2))
            mask = OPS.leaky_relu_with_mask(x.detach(), 0.1)[1]
            samples["leaky_relu_backward"].append((grad_y, mask, x.stride(), 0.1))
            samples["rrelu_backward"].append((grad_y, mask, x.stride(), seed, 0.1, 0.3))
            samples["elu_backward"] += [(grad_y, x, -1.3, False), (grad_y, x, 1.3, True)]
            samples["swish_backward"].append((grad_y, x, 1.7))
            for shape, wanted in (((), [True, True]), ((1,), [True, False]), ((5,), [False, True]), ((5,), [True, True])):
                parameter = torch.rand(shape, dtype=dtype, requires_grad=requires_grad)
                for name in ("prelu_backward", "swish_backward.Tensor"):
                    samples[name].append((grad_y, x, parameter, wanted))
    for layout in layouts:
        for requires_grad in (False, True):
            x = LAYOUTS[layout](torch.randn).detach().requires_grad_(requires_grad)
            for channels in {1, x.shape[1] if x.dim() > 1 else 1}:
                parameter = torch.rand(channels, requires_grad=requires_grad)
                samples["prelu"].append((x, parameter))
                samples["swish.Tensor"].append((x, parameter))
    return samples


@pytest.mark.parametrize("op", OPCHECKED)
def test_opcheck(op):
    name, _, overload = op.partition(".")
    for args in opcheck_samples()[op]:
        opcheck(getattr(getattr(OPS, name), overload or "default"), args)


def test_every_operator_is_checked():
    registered = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("gradkernels::")}
    mine = {name for name in registered if name.split("::")[1].startswith(("leaky_relu", "rrelu", "prelu", "elu", "swish"))}
    assert mine == {f"gradkernels::{op.partition('.')[0]}" for op in OPCHECKED}


def test_operators_compute_what_their_schema_says():
    x, grad_y = torch.randn(131), torch.randn(131)
    y, mask = OPS.leaky_relu_with_mask(x, 0.1)
    bits = (mask.repeat_interleave(8) >> (torch.arange(mask.numel() * 8) % 8)) & 1
    assert_bitwise_equal("mask", bits[:131].bool(), x > 0)
    assert_bitwise_equal("y", y, OPS.leaky_relu(x, 0.1))
    inplace = x.clone()
    assert_bitwise_equal("mask in place", OPS.leaky_relu_with_mask_(inplace, 0.1), mask)
    assert_bitwise_equal("y in place", inplace, y)
    assert_bitwise_equal(
        "leaky_relu_backward", OPS.leaky_relu_backward(grad_y, mask, x.stride(), 0.1), value_and_grad(F.leaky_relu, x, grad_y, 0.1)[1]
    )
    elu_grad = value_and_grad(F.elu, x, grad_y, 1.3)[1]
    assert_close(OPS.elu_backward(grad_y, x, 1.3, False), elu_grad)
    assert_close(OPS.elu_backward(grad_y, F.elu(x, 1.3), 1.3, True), elu_grad)
    assert_close(OPS.swish_backward(grad_y, x, 1.7), value_and_grad(reference.swish, x, grad_y, 1.7)[1])
    seed = torch.tensor(-5)
    y, mask = OPS.rrelu_with_mask(x, seed, 0.1, 0.3)
    assert_bitwise_equal("mask of rrelu", mask, OPS.leaky_relu_with_mask(x, 0.1)[1])
    inplace = x.clone()
    assert_bitwise_equal("mask in place", OPS.rrelu_with_mask_(inplace, seed, 0.1, 0.3), mask)
    assert_bitwise_equal("y in place", inplace, y)
    assert_bitwise_equal("rrelu_backward", OPS.rrelu_backward(x, mask, x.stride(), seed, 0.1, 0.3), y)
    assert not torch.equal(OPS.rrelu_with_mask(x, torch.tensor(-5 + 2**32), 0.1, 0.3)[0], y), "the upper half of the seed has no effect"


@each_act
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(act, dynamic):
    module = act.module(act.params[1])

    def forward(x):
        y = act.function(x * 1, act.params[1], inplace=True) if act.has_inplace else act.function(x * 1, act.params[1])
        return y + module(x)

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((5, 13), (7, 9)):
        x, grad_y = torch.randn(size), torch.randn(size)
        assert_close(value_and_grad(compiled, x, grad_y), value_and_grad(forward, x, grad_y))


@each_act
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_compiled_model_contains_torchs_operators_only(act, dtype):
    targets = []

    def look(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    model = nn.Sequential(nn.Linear(6, 6, dtype=dtype), act.module().to(dtype))
    x = torch.randn(4, 6, dtype=dtype)
    y = torch.compile(model, fullgraph=True, backend=backend)(x)
    y.sum().backward()
    assert_close(y, model(x))
    assert any("aten." in target for target in targets)
    assert [target for target in targets if "gradkernels" in target] == []


@pytest.mark.parametrize("op", ["leaky_relu", "elu", "swish", "swish.Tensor", "prelu", "rrelu_with_mask"])
def test_compile_of_the_operator_itself(op):
    name, _, overload = op.partition(".")
    operator = getattr(getattr(OPS, name), overload or "default")
    tensor = torch.tensor([0.3])
    args = {"swish.Tensor": (tensor,), "prelu": (tensor,), "rrelu_with_mask": (torch.tensor(5), 0.1, 0.3)}.get(op, (1.3,))

    def forward(x):
        y = operator(x, *args)
        return y[0] if isinstance(y, tuple) else y

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((5, 13), (7, 9)):
        x, grad_y = torch.randn(size), torch.randn(size)
        assert_close(value_and_grad(compiled, x, grad_y), value_and_grad(forward, x, grad_y))


@pytest.mark.slow
def test_compiled_autograd():
    """After other nodes, because torch traces their gradients as placeholders without a true shape."""
    parameter, channel = torch.tensor([0.3]).requires_grad_(), torch.tensor([0.3, -0.2, 1.5]).requires_grad_()

    def through_views(x):
        z = x * 1
        gk.leaky_relu(z[1:, :2], 0.2, inplace=True)
        return z

    def loss(x):
        terms = [act.function(x, param) for act in ACTIVATIONS for param in act.params]
        terms += [act.function(x * 1, inplace=True) for act in INPLACE]
        terms += [gk.elu(x.bfloat16()), gk.elu(gk.swish(x.transpose(0, 1)).square() - 1), through_views(x)]
        terms += [act.function(x, each) for act in PARAMETRICS for each in (parameter, channel, channel.detach())]
        terms += [gk.rrelu(x, training=True), gk.rrelu(x * 1, training=True, inplace=True)]
        return sum(each.square().sum() for each in terms)

    torch._dynamo.reset()
    for size in (5, 9):
        x = torch.randn(size, 3, 7).requires_grad_()
        for leaves in ((x, parameter, channel), (channel,)):
            results = []
            for context in (contextlib.nullcontext(), compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True))):
                torch.manual_seed(0)
                y = loss(x)
                with context:
                    results.append(torch.autograd.grad(y, leaves))
            for eager, compiled in zip(*results, strict=True):
                assert_bitwise_equal("gradient", compiled, eager)


def test_compiled_autograd_of_another_slope_and_after_the_graph_is_freed():
    torch._dynamo.reset()
    x = torch.randn(9).requires_grad_()
    for slope in (0.1, 0.2, 0.1):
        y = gk.leaky_relu(x, slope).square().sum()
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            (grad,) = torch.autograd.grad(y, x)
        assert_close(grad, 2 * x.detach() * torch.where(x > 0, 1.0, slope * slope))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward()


@each_act
@pytest.mark.filterwarnings("error::UserWarning")
def test_functorch(act):
    x, tangent = torch.randn(4, 7), torch.randn(4, 7)

    vmap = functools.partial(torch.func.vmap, randomness="same")

    def loss(function):
        return lambda x: function(x).square().sum()

    for name, transform in {
        "grad": lambda f: torch.func.grad(loss(f))(x),
        "vmap": lambda f: vmap(f)(x),
        "vmap over columns": lambda f: vmap(f, in_dims=1, out_dims=1)(x),
        "vmap of grad": lambda f: vmap(torch.func.grad(loss(f)))(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (tangent,)),
        "vjp": lambda f: torch.func.vjp(f, x)[1](tangent),
        "jacrev": lambda f: torch.func.jacrev(f)(x),
        "jacfwd": lambda f: torch.func.jacfwd(f, randomness="same")(x),
        "hessian": lambda f: torch.func.jacfwd(torch.func.jacrev(loss(f)), randomness="same")(x),
    }.items():
        assert_close(transform(act.function), transform(act.torchs), msg=lambda text, name=name: f"{name}: {text}")


def test_fused_path_after_functorch():
    torch.func.grad(lambda x: gk.leaky_relu(x).sum())(torch.randn(9))
    assert [each.dtype for each in saved_by(lambda: gk.leaky_relu(torch.randn(9, requires_grad=True)))[1]] == [torch.uint8]


@each_inplace
def test_functorch_inplace(act):
    x = torch.randn(4, 7)
    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f), randomness="same")):
        results = [
            transform(lambda x, function=function: function(x * 1, inplace=True).square().sum())(x)
            for function in (act.function, act.torchs)
        ]
        assert_close(results[0], results[1])


@each_act
def test_forward_ad(act):
    x, tangent = torch.randn(65), torch.randn(65)
    results = []
    for function in (act.function, act.torchs):
        with forward_ad.dual_level():
            results.append(tuple(forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))))
    assert_close(results[0], results[1])


@each_act
def test_export(act):
    exported = torch.export.export(act.module().eval(), (torch.randn(4, 6),), dynamic_shapes=[{0: torch.export.Dim("batch", min=2)}])
    x = torch.randn(9, 6)
    assert_close(exported.module()(x), act.function(x))
    assert_close(exported.run_decompositions().module()(x), act.function(x))


@each_act
def test_inference_mode(act):
    x = torch.randn(65)
    expected = act.function(x)
    with torch.inference_mode():
        y = act.function(x)
        assert y.is_inference() and not y.requires_grad
        assert_bitwise_equal("y", y, expected)
        if act.has_inplace:
            inference_x = x.clone()
            assert_bitwise_equal("in place on an inference tensor", act.function(inference_x, inplace=True), expected)
            assert_bitwise_equal("in place on a normal tensor", act.function(x, inplace=True), expected)
            assert x._version == 1


@each_act
def test_inference_tensor_is_not_written_outside_inference_mode(act):
    if not act.has_inplace:
        return
    with torch.inference_mode():
        x = torch.randn(65)
    before = x.clone()
    came = outcome(act.function, x, inplace=True)
    assert_bitwise_equal("x", x, before)
    assert came == outcome(F.leaky_relu, x, inplace=True) and came[0] is RuntimeError


@pytest.mark.parametrize("function,torchs", [(gk.leaky_relu, F.leaky_relu), (gk.elu, F.elu)], ids=["leaky_relu", "elu"])
@pytest.mark.parametrize("number", ["a", None, [0.1], 1j, torch.tensor([0.1, 0.2]), torch.tensor(0.1, requires_grad=True)], ids=str)
def test_parameter_that_is_not_a_number(function, torchs, number):
    """The binding would turn a tensor that requires grad into a number and lose its gradient."""
    x = torch.randn(3)
    came = outcome(function, x, number)
    assert came == outcome(torchs, x, number) and came[0] in (TypeError, RuntimeError)


@pytest.mark.parametrize("beta", [1.0, 2.0, torch.tensor(2.0)], ids=str)
def test_swish_of_integers(beta):
    assert outcome(gk.swish, torch.arange(3), beta) == outcome(F.silu, torch.arange(3))
    assert outcome(OPS.swish, torch.arange(3), beta) == outcome(F.silu, torch.arange(3))


@each_act
def test_autocast_has_torchs_dtypes(act, device):
    """The dtype of the input, except for prelu, which torch runs in the lower precision."""
    x, grad_y = torch.randn(65), torch.randn(65)
    with torch.autocast(device, dtype=torch.bfloat16):
        for each in (x, x.bfloat16()):
            y, grad_x = value_and_grad(act.function, each, grad_y.to(act.torchs(each).dtype))
            torch_y, torch_grad_x = value_and_grad(act.torchs, each, grad_y.to(y.dtype))
            assert y.dtype == (torch.bfloat16 if act.name == "prelu" else each.dtype)
            assert_close(y, torch_y)
            assert_close(grad_x, torch_grad_x)


@each_act
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoint(act, use_reentrant):
    x, grad_y = torch.randn(65), torch.randn(65)
    if use_reentrant:
        x.requires_grad_()
        y = checkpoint(act.function, x, use_reentrant=True)
        y.backward(grad_y)
        checkpointed = y.detach(), x.grad
    else:
        checkpointed = value_and_grad(lambda x: checkpoint(act.function, x, use_reentrant=False), x, grad_y)
    assert_close(checkpointed, value_and_grad(act.function, x, grad_y), rtol=0, atol=0)


@each_act
def test_saved_tensors_may_be_moved_by_hooks(act, device):
    x, grad_y = torch.randn(65), torch.randn(65)
    expected = value_and_grad(act.function, x, grad_y)
    with saved_tensors_hooks(lambda tensor: tensor.cpu().numpy().copy(), lambda kept: torch.from_numpy(kept).to(device)):
        assert_close(value_and_grad(act.function, x, grad_y), expected, rtol=0, atol=0)


@each_act
def test_deterministic_mode(act):
    """Fresh memory is nan in this mode, so elements that a kernel does not write would change the bits."""
    for size in (65, 70_001):
        x, grad_y = torch.randn(size), torch.randn(size)
        expected = value_and_grad(act.function, x, grad_y)
        with DeterministicGuard(True):
            assert torch.empty(3).isnan().all()
            actual = value_and_grad(act.function, x, grad_y)
        for name, each, other in zip(("y", "grad_x"), actual, expected, strict=True):
            assert_bitwise_equal(f"{name}, size {size}", each, other)


# torch's own samples

# name in op_db and module_db -> ours, torch's, modules of both
SAMPLED = {
    "leaky_relu": (gk.leaky_relu, F.leaky_relu, gk.LeakyReLU, nn.LeakyReLU),
    "elu": (gk.elu, F.elu, gk.ELU, nn.ELU),
    "silu": (gk.swish, F.silu, gk.Swish, nn.SiLU),
    "prelu": (gk.prelu, F.prelu, gk.PReLU, nn.PReLU),
    "rrelu": (gk.rrelu, F.rrelu, gk.RReLU, nn.RReLU),
}
each_sampled = pytest.mark.parametrize("name", SAMPLED)


def op_of(name, variant=""):
    return next(op for op in op_db if op.name == f"nn.functional.{name}" and op.variant_test_name == variant)


def samples_of(op, device, dtype, requires_grad):
    samples = list(op.sample_inputs(device, dtype, requires_grad=requires_grad))
    if op.reference_inputs_func is not None:
        samples += op.reference_inputs(device, dtype, requires_grad=requires_grad)
    for sample in samples:
        yield sample
        # Each operator has three samples of a million elements: too slow to run in a second layout.
        if sample.input.numel() < 100_000:
            yield sample.noncontiguous()


def value_and_grads(function, args, kwargs, grad_y):
    """The value, and a gradient for each tensor among the arguments."""
    # Detached, because some samples are views, which are no leaves.
    args, kwargs = (
        [leaf(each) if torch.is_tensor(each) else each for each in args],
        kwargs | {key: leaf(each) for key, each in kwargs.items() if torch.is_tensor(each)},
    )
    y = function(*args, **kwargs)
    tensors = [each for each in (*args, *kwargs.values()) if torch.is_tensor(each)]
    return y.detach(), *torch.autograd.grad(y, tensors, grad_y)


def assert_sum_is_accurate(name, actual, exact, terms):
    """For a sum in float64 of terms that have errors of 2 ulp of float32 (or of float64) in either direction."""
    scale = float(terms.double().square().sum().sqrt())
    assert_accurate(name, actual, actual, exact, scale=scale if math.isfinite(scale) else 0.0)


def assert_drew_slopes(x, y, grad_x, lower, upper):
    """y and its gradient for a grad_y of ones have the same slopes: 1 where x > 0, else in [lower, upper]."""
    lower, upper = (torch.tensor(each).to(x.dtype).item() for each in (lower, upper))
    assert torch.equal(grad_x[x > 0], torch.ones_like(grad_x[x > 0]))
    assert ((grad_x >= lower) & (grad_x <= upper) | (x > 0)).all()
    # x may be nan, or the largest number of its dtype.
    assert_close(y, grad_x * x, equal_nan=True)


@each_sampled
@each_dtype
def test_op_db_samples(name, dtype, device):
    ours, torchs = SAMPLED[name][:2]
    count = 0
    op = op_of(name)
    if dtype not in op.supported_dtypes(device):
        assert (name, dtype, device) == ("rrelu", torch.float16, "cpu")
        return
    for sample in samples_of(op, device, dtype, True):
        args, kwargs = (sample.input, *sample.args), sample.kwargs
        count += 1
        if kwargs.get("training"):
            y, grad_x = value_and_grads(ours, args, kwargs, torch.ones_like(sample.input))
            assert_drew_slopes(sample.input.detach(), y, grad_x, kwargs["lower"], kwargs["upper"])
            continue
        grad_y = torch.randn_like(sample.input)
        y, grad_x, *grad_weight = value_and_grads(ours, args, kwargs, grad_y)
        torch_y, torch_grad_x, *_ = value_and_grads(torchs, args, kwargs, grad_y)
        assert_close(y, torch_y, equal_nan=True)
        if name == "rrelu":
            # torch's rrelu returns contiguous tensors.
            torch_y = F.leaky_relu(sample.input.detach())
        assert y.stride() == torch_y.stride() or y.numel() == 0
        # At a nan torch's gradient of elu is nan in whole vectors, and grad_y in the elements left over.
        told = ~sample.input.isnan()
        assert_close(grad_x[told], torch_grad_x[told], equal_nan=True)
        for actual in grad_weight:
            # Not compared with torch's sum, whose terms are rounded to 16 bits.
            in_double = [each.double() if torch.is_tensor(each) else each for each in (*args, *kwargs.values())]
            exact = value_and_grads(torchs, in_double, {}, grad_y.double())[2]
            assert_sum_is_accurate("grad_weight", actual, exact, sample.input.detach() * grad_y)
    assert count >= 10


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_op_db_samples_of_complex_silu(dtype, device):
    for sample in samples_of(op_of("silu", "complex"), device, dtype, False):
        assert_same_outcome("y", outcome(gk.swish, sample.input), outcome(F.silu, sample.input))


@each_sampled
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex128], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_dtypes_that_torch_does_not_support(name, dtype, training, device):
    ours, torchs = SAMPLED[name][:2]
    assert dtype not in op_of(name).supported_dtypes(device)
    x = make_tensor((20,), dtype=dtype, device=device)
    args = (torch.ones(1, dtype=dtype),) if name == "prelu" else ()
    kwargs = {"training": training} if name == "rrelu" else {}
    assert_same_outcome("y", outcome(ours, x, *args, **kwargs), outcome(torchs, x, *args, **kwargs))


@each_sampled
def test_op_db_error_inputs(name, device):
    ours, torchs = SAMPLED[name][:2]
    op = op_of(name)
    # This fails once torch adds error inputs for the others: then add their names.
    assert (op.error_inputs_func is not None) == (name in ("prelu", "rrelu"))
    for error in op.error_inputs(device) if op.error_inputs_func is not None else ():
        sample = error.sample_input
        expected = outcome(torchs, sample.input, *sample.args, **sample.kwargs)
        assert expected[0] is error.error_type
        assert outcome(ours, sample.input, *sample.args, **sample.kwargs) == expected


def module_value_and_grads(module, x, grad_y):
    x = leaf(x)
    y = module(x)
    return y.detach(), *torch.autograd.grad(y, (x, *module.parameters()), grad_y)


@each_sampled
@each_dtype
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_module_db_inputs(name, dtype, training, device):
    info = next((info for info in module_db if info.module_cls is SAMPLED[name][3]), None)
    assert (info is None) == (name == "rrelu")
    inputs = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training) if info else ()
    for each in inputs:
        constructor, (x,) = each.constructor_input, each.forward_input.args
        module, torch_module = (cls(*constructor.args, **constructor.kwargs).to(dtype).train(training) for cls in SAMPLED[name][2:])
        for given in (x, noncontiguous_like(x)):
            grad_y = torch.randn_like(x)
            y, grad_x, *grad_weight = module_value_and_grads(module, given, grad_y)
            torch_y, torch_grad_x, *_ = module_value_and_grads(torch_module, given, grad_y)
            assert_close((y, grad_x), (torch_y, torch_grad_x))
            exact = module_value_and_grads(copy.deepcopy(torch_module).double(), given.double(), grad_y.double())
            for actual, expected in zip(grad_weight, exact[2:], strict=True):
                assert_sum_is_accurate("grad_weight", actual, expected, given.detach() * grad_y)


# modules


PLAIN = [act for act in ACTIVATIONS if act.name in ("leaky_relu", "elu", "swish")]


@pytest.mark.parametrize("act", PLAIN, ids=repr)
def test_module(act):
    module = act.module()
    assert module.state_dict() == {} and list(module.parameters()) == []
    x = torch.randn(65)
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_bitwise_equal("y", each(x), act.function(x))
    module = act.module(0.3)
    assert_bitwise_equal("y", module(x), act.function(x, 0.3))
    assert "0.3" in repr(module)


@pytest.mark.parametrize("act", [act for act in PLAIN if act.has_inplace], ids=repr)
def test_module_inplace(act):
    module, torch_module = act.module(0.3, inplace=True), act.torch_module(0.3, inplace=True)
    x = torch.randn(65)
    expected = act.function(x, 0.3)
    y = module(x)
    assert y is x
    assert_bitwise_equal("y", y, expected)
    assert repr(module) == repr(torch_module)


def test_prelu_module():
    module, torch_module = gk.PReLU(3, init=0.5, dtype=torch.float64), nn.PReLU(3, init=0.5, dtype=torch.float64)
    assert isinstance(module, nn.PReLU) and repr(module) == repr(torch_module)
    assert_close(module.state_dict(), torch_module.state_dict())
    assert gk.PReLU(device="meta").weight.is_meta
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_bitwise_equal("y", each(x), torch_module(x))


def test_rrelu_module():
    module, torch_module = gk.RReLU(0.2, 0.4, inplace=True), nn.RReLU(0.2, 0.4, inplace=True)
    assert isinstance(module, nn.RReLU) and repr(module) == repr(torch_module) and module.state_dict() == {}
    x = torch.randn(65)
    trained = module(x.clone())
    assert_drew_slopes(x, trained, torch.where(x > 0, 1.0, trained / x), 0.2, 0.4)
    for each in (module.eval(), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        given = x.clone()
        y = each(given)
        assert y is given
        assert_bitwise_equal("y in eval", y, torch_module.eval()(x.clone()))


def test_swish_module_with_a_parameter():
    module = gk.Swish(1.5, learnable=True, num_parameters=3, dtype=torch.float64)
    assert {name: (each.shape, each.dtype) for name, each in module.state_dict().items()} == {"beta": ((3,), torch.float64)}
    assert isinstance(module.beta, nn.Parameter) and module.beta.tolist() == [1.5] * 3
    assert "1.5" in repr(module) and "learnable" in repr(module) and "3" in repr(module)
    assert gk.Swish(learnable=True, device="meta").beta.is_meta
    assert gk.Swish(learnable=True).beta.shape == (1,)
    assert [name for name, _ in gk.Swish(1.5).named_parameters()] == []
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        module.beta[1] = 0.5
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_bitwise_equal("y", each(x), gk.swish(x, module.beta))
    loaded = gk.Swish(learnable=True, num_parameters=3)
    loaded.load_state_dict(module.state_dict())
    assert loaded.beta.tolist() == [1.5, 0.5, 1.5]


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("beta", [torch.tensor(1.0), "a", "1", None, 1j], ids=str)
def test_swish_module_takes_a_number(beta, learnable):
    with pytest.raises(TypeError, match=f"takes beta as a number, not as {type(beta).__name__}"):
        gk.Swish(beta, learnable)


def test_swish_module_resets_its_parameter():
    module = gk.Swish(1.5, learnable=True, num_parameters=3)
    with torch.no_grad():
        module.beta.zero_()
    module.reset_parameters()
    assert module.beta.tolist() == [1.5] * 3


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_rrelu_of_float16_without_the_library(inplace):
    x = torch.randn(1009).half()
    given = x.clone()
    y = reference.rrelu(given, 0.25, 0.5, True, inplace)
    assert (y is given) == inplace and y.dtype == torch.float16
    slopes = (y.double() / x.double())[x < 0]
    assert_bitwise_equal("y where x > 0", y[x > 0], x[x > 0])
    assert 0.249 < slopes.min() < 0.3 < 0.45 < slopes.max() < 0.501


def test_swish_learns_beta():
    """Gradient descent finds the beta of each channel that made the targets."""
    target = torch.tensor([0.5, 1.0, 2.0])
    x = torch.randn(256, 3)
    module = gk.Swish(1.0, learnable=True, num_parameters=3)
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (module(x) - x * torch.sigmoid(target * x)).square().mean().backward()
        optimizer.step()
    assert_close(module.beta.detach(), target, rtol=0.01, atol=0)


def test_tensors_with_the_negative_bit():
    """The imaginary part of a conjugate is such a tensor: torch marks it as negated and does not write it."""
    for ours, theirs in ((gk.leaky_relu, F.leaky_relu), (gk.elu, F.elu)):
        for inplace, inference in itertools.product((False, True), repeat=2):
            with torch.inference_mode(inference):
                x = torch.view_as_complex(torch.randn(5, 2)).conj().imag
                assert x.is_neg()
                expected = theirs(x.clone().resolve_neg())
                y = ours(x, inplace=inplace)
            torch.testing.assert_close(y.resolve_neg(), expected)
            assert not inplace or y is x


def test_rrelu_of_a_seed_with_the_negative_bit():
    x, seed = torch.randn(50), torch.tensor(7)
    expected = x.clone()
    OPS.rrelu_with_mask_(expected, seed, 0.1, 0.3)
    OPS.rrelu_with_mask_(x, torch._neg_view(-seed), 0.1, 0.3)
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


# prelu and swish with a tensor: the gradient of the parameter


@dataclass(frozen=True)
class Parametric:
    """function(x, parameter), and composed, which is the same function made of torch's operators.

    shares(x, grad_y, parameter): what each element adds to the gradient of the parameter, and the size of its
    terms. share_error, grad_x_error: the bounds of the two gradients, in ulp of their terms.
    """

    name: str
    function: Any
    composed: Any
    shares: Any
    share_error: float
    grad_x_error: float

    def __repr__(self):
        return self.name


def across(parameter, x):
    """The parameter in a shape that broadcasts along dimension 1 of x."""
    return parameter.reshape(()) if parameter.size == 1 else parameter.reshape(1, -1, *[1] * (x.ndim - 2))


def composed_swish(x, beta):
    beta = beta.reshape(()) if beta.numel() == 1 else beta.view(-1, *[1] * (x.dim() - 2))
    return x * torch.sigmoid(beta * x)


def swish_shares(x, grad_y, beta):
    z = across(beta, x) * x
    share = grad_y * x * x / (1 + np.exp(-z)) / (1 + np.exp(z))
    # exp amplifies the rounding error of z.
    return share, share * (1 + abs(z))


PARAMETRICS = [
    Parametric("prelu", gk.prelu, F.prelu, lambda x, grad_y, weight: (np.where(x > 0, 0, grad_y * x),) * 2, 2.0, 0.5),
    Parametric("swish", gk.swish, composed_swish, swish_shares, 5.0, SWISH_GRADIENT),
]
each_parametric = pytest.mark.parametrize("act", PARAMETRICS, ids=repr)
# Runs of a channel's elements, and rows of channels, around the size of a register and of one partial sum.
CHANNEL_SHAPES = [
    *((1, 1), (5, 1), (3, 2), (4, 7), (3, 8), (2, 9), (67, 17), (300, 65), (1, 3, 1), (2, 3, 7), (3, 5, 8), (2, 2, 63), (2, 3, 64)),
    *((1, 2, 65), (2, 3, 1009), (1, 2, 40009), (70, 3, 129), (2, 7, 3, 5), (2, 16, 5, 5), (2, 3, 4, 3, 2), (0, 3, 2), (2, 3, 0), (2, 0, 3)),
]


def parameter_values(count, dtype):
    return torch.linspace(-0.75, 1.75, count + 1, dtype=torch.float64)[1:].to(dtype)


def parametric_results(function, x, parameter, grad_y):
    """y, grad_x and the gradient of the parameter."""
    x, parameter = leaf(x), leaf(parameter)
    y = function(x, parameter)
    return y.detach(), *torch.autograd.grad(y, (x, parameter), grad_y)


def assert_parametric(act, x, parameter, grad_y):
    y, grad_x, grad_parameter = parametric_results(act.function, x, parameter, grad_y)
    torch_y, torch_grad_x, torch_grad_parameter = parametric_results(act.composed, x, parameter, grad_y)
    exact_x, exact_grad_y, exact_parameter = extended(x), extended(grad_y), extended(parameter)
    exact_y, exact_grad_x = exact_activation(x, grad_y, "leaky_relu" if act.name == "prelu" else "swish", across(exact_parameter, exact_x))
    y_scale = grad_scale = 0.0
    if act.name == "swish":
        z = across(exact_parameter, exact_x) * exact_x
        gate = 1 / (1 + np.exp(-z))
        spread = 1 + abs(z) * (1 - gate)
        y_scale, grad_scale = abs(exact_x) * gate * spread, abs(exact_grad_y) * gate * spread * spread
    assert_accurate("y", y, torch_y, exact_y, scale=y_scale)
    assert_accurate("grad_x", grad_x, torch_grad_x, exact_grad_x, scale=grad_scale, bound=act.grad_x_error)
    shares, sizes = act.shares(exact_x, exact_grad_y, exact_parameter)
    axes = tuple(range(x.ndim)) if parameter.numel() == 1 else (0, *range(2, x.ndim))
    assert grad_parameter.shape == torch_grad_parameter.shape == parameter.shape
    assert_accurate(
        "gradient of the parameter",
        grad_parameter,
        torch_grad_parameter,
        shares.sum(axes).reshape(parameter.shape),
        scale=np.sqrt(np.square(sizes).sum(axes)).reshape(parameter.shape),
        bound=act.share_error,
    )
    assert (y.stride(), grad_x.stride()) == (torch_y.stride(), torch.empty_like(x).stride())
    assert_bitwise_equal("y without grad", act.function(x, parameter), y)


@each_dtype
@each_parametric
@pytest.mark.parametrize("shape", CHANNEL_SHAPES, ids=str)
def test_parameter_for_each_channel(act, dtype, shape):
    formats = [torch.contiguous_format]
    if len(shape) > 3:
        formats.append(torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    for memory_format in formats:
        x = (torch.randn(shape, dtype=dtype) * 4).contiguous(memory_format=memory_format)
        assert_parametric(act, x, parameter_values(shape[1], dtype), torch.randn(shape, dtype=dtype))


@each_dtype
@each_parametric
@each_layout
@pytest.mark.parametrize("parameter_shape", [(), (1,), "channels"], ids=str)
def test_parameter_and_layout(act, dtype, layout, parameter_shape):
    x = LAYOUTS[layout](lambda *size: torch.randn(*size, dtype=dtype) * 4)
    if parameter_shape == "channels":
        parameter_shape = (x.shape[1],) if x.dim() > 1 else (1,)
    parameter = parameter_values(math.prod(parameter_shape), dtype).reshape(parameter_shape)
    for grad_y in (torch.randn(x.shape, dtype=dtype), torch.randn_like(x), torch.randn((), dtype=dtype).expand(x.shape)):
        assert_parametric(act, x, parameter, grad_y)


@each_parametric
def test_parameter_that_is_not_contiguous(act):
    parameter = parameter_values(10, torch.float32)[::2]
    assert_parametric(act, torch.randn(3, 5, 7), parameter, torch.randn(3, 5, 7))


@each_parametric
@each_dtype
def test_parameter_on_many_short_tensors(act, dtype):
    for size in range(1, 40):
        assert_parametric(act, torch.randn(size, dtype=dtype), torch.tensor([0.5], dtype=dtype), torch.randn(size, dtype=dtype))
        assert_parametric(act, torch.randn(3, size, dtype=dtype), parameter_values(size, dtype), torch.randn(3, size, dtype=dtype))


@each_parametric
@each_dtype
@pytest.mark.parametrize("shape", [(100_003,), (3, 7, 9001), (1, 2, 70_001), (5000, 33), (40, 64, 7, 7)], ids=str)
def test_parameter_same_bits_for_any_number_of_threads(act, dtype, shape, each_thread_count):
    x, grad_y = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    for parameter in (torch.tensor([0.3], dtype=dtype), parameter_values(shape[1] if len(shape) > 1 else 1, dtype)):
        one, two = each_thread_count(lambda parameter=parameter: parametric_results(act.function, x, parameter, grad_y))
        for name, each, other in zip(("y", "grad_x", "gradient of the parameter"), one, two, strict=True):
            assert_bitwise_equal(name, other, each)
        if x.dim() == 4:
            in_rows = parametric_results(act.function, x.contiguous(memory_format=torch.channels_last), parameter, grad_y)
            assert_bitwise_equal("y in channels_last", in_rows[0], one[0])


@each_parametric
def test_gradient_of_the_parameter_is_summed_in_float64(act):
    """Terms of one sign, so many that a float32 sum would be wrong by hundreds of ulp; and terms that cancel."""
    x, grad_y = torch.full((2, 100_003), -1.0), torch.rand(2, 100_003)
    assert_parametric(act, x, torch.tensor([0.3]), grad_y)
    assert_parametric(act, torch.cat([x, x]), torch.tensor([0.3]), torch.cat([grad_y * 1e4 + 1, grad_y * -1e4]))


@each_parametric
def test_parametric_gradients_one_at_a_time(act):
    x, parameter, grad_y = torch.randn(3, 5, 7), parameter_values(5, torch.float32), torch.randn(3, 5, 7)
    _, both_x, both_parameter = parametric_results(act.function, x, parameter, grad_y)
    only_x, only_parameter = leaf(x), leaf(parameter)
    assert_bitwise_equal("grad_x", torch.autograd.grad(act.function(only_x, parameter), only_x, grad_y)[0], both_x)
    (alone,) = torch.autograd.grad(act.function(x, only_parameter), only_parameter, grad_y)
    assert_bitwise_equal("gradient of the parameter", alone, both_parameter)
    y = act.function(only_x, only_parameter)
    assert_bitwise_equal("one of two", torch.autograd.grad(y, only_parameter, grad_y)[0], both_parameter)


@each_parametric
@each_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_stay_in_their_channel(act, dtype, value):
    for shape in ((3, 5), (2, 3, 7), (2, 3, 129)):
        x, grad_y = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        parameter = parameter_values(shape[1], dtype)
        clean = parametric_results(act.function, x, parameter, grad_y)
        for position in (0, -1):
            given = x.clone()
            given.view(-1)[position] = value
            actual = parametric_results(act.function, given, parameter, grad_y)
            in_float32 = (each if dtype == torch.float64 else each.float() for each in (given, parameter, grad_y))
            expected = [each.to(dtype) for each in parametric_results(act.composed, *in_float32)]
            assert_bitwise_equal(
                "gradient elsewhere",
                actual[2].roll(-position - 1)[:-1] if position else actual[2][1:],
                clean[2].roll(-position - 1)[:-1] if position else clean[2][1:],
            )
            # The composed gradient is nan where it multiplies an inf by a factor that underflowed to 0.
            # Ours may be finite there.
            told = expected[1].isfinite() | (act.name == "prelu")
            assert_close(actual[1][told], expected[1][told], equal_nan=True)
            if act.name == "prelu" or math.isnan(value):
                assert torch.equal(actual[2].isnan(), expected[2].isnan())
                assert torch.equal(actual[2].isinf(), expected[2].isinf())


@each_parametric
@pytest.mark.parametrize("parameter_shape", [(), (1,), (5,)], ids=str)
def test_parametric_gradcheck(act, parameter_shape):
    for x in (away_from_kink(3, 5), away_from_kink(5, 3).t(), away_from_kink(2, 5, 2, 2).contiguous(memory_format=torch.channels_last)):
        inputs = leaf(x), leaf(parameter_values(math.prod(parameter_shape), torch.float64).reshape(parameter_shape))
        assert gradcheck(act.function, inputs, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(act.function, inputs, fast_mode=True, check_batched_grad=True)


@each_parametric
def test_parametric_second_derivatives_are_torchs(act):
    leaves = [leaf(torch.randn(3, 5)), leaf(parameter_values(5, torch.float32)), leaf(torch.randn(3, 5))]
    results = []
    for function in (act.function, act.composed):
        first = torch.autograd.grad(function(*leaves[:2]), leaves[:2], leaves[2], create_graph=True)
        total = sum(each.square().sum() for each in first)
        results.append((*first, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)))
    assert_close(results[0], results[1])


@each_parametric
def test_parametric_functorch(act):
    x, parameter, tangent = torch.randn(4, 3, 5), parameter_values(3, torch.float32), torch.randn(3)

    def loss(function):
        return lambda x, parameter: function(x, parameter).square().sum()

    for name, transform in {
        "grad": lambda f: torch.func.grad(loss(f), argnums=(0, 1))(x, parameter),
        "vmap over x": lambda f: torch.func.vmap(f, (0, None))(x.unsqueeze(1), parameter),
        "vmap over both": lambda f: torch.func.vmap(f)(x.unsqueeze(1), torch.stack([parameter] * 4)),
        "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(loss(f), argnums=1), (0, None))(x.unsqueeze(1), parameter),
        "jvp": lambda f: torch.func.jvp(lambda parameter: f(x, parameter), (parameter,), (tangent,)),
        "jacrev": lambda f: torch.func.jacrev(f, argnums=1)(x, parameter),
        "jacfwd": lambda f: torch.func.jacfwd(f, argnums=1)(x, parameter),
        "hessian": lambda f: torch.func.hessian(loss(f), argnums=1)(x, parameter),
    }.items():
        assert_close(transform(act.function), transform(act.composed), msg=lambda text, name=name: f"{name}: {text}")


# torch's own rule for vmap of prelu's gradient confuses the samples with the outputs if there are as many of
# both, and raises if not.
@each_parametric
@pytest.mark.parametrize(("batch", "outputs"), [(3, 3), (3, 5), (4, 2), (4, 4), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_parametric_derivatives_of_each_sample(act, batch, outputs, channels):
    x = torch.randn(batch, 3, 4, dtype=torch.float64)
    weight = torch.rand(channels, dtype=torch.float64)
    weights = torch.rand(batch, channels, dtype=torch.float64)
    factors = torch.arange(1.0, outputs + 1, dtype=torch.float64)

    def function(x, weight):
        return act.function(x.unsqueeze(0), weight).flatten()[:outputs] * factors

    def loss(x, weight):
        return function(x, weight).square().sum()

    one_by_one = torch.autograd.functional
    for transform, of, of_a_sample in (
        (torch.func.jacrev, function, one_by_one.jacobian),
        (torch.func.jacfwd, function, one_by_one.jacobian),
        (torch.func.grad, loss, one_by_one.jacobian),
        (torch.func.hessian, loss, one_by_one.hessian),
    ):
        for given, in_dims in ((weights, (0, 0)), (weight, (0, None))):
            found = torch.func.vmap(transform(of, argnums=(0, 1)), in_dims)(x, given)
            samples = zip(x, given.expand(batch, channels), strict=True)
            expected = tree_map(lambda *each: torch.stack(each), *[of_a_sample(of, sample) for sample in samples])
            assert_close(found, expected, msg=lambda text, name=transform.__name__: f"{name}: {text}")


@each_parametric
def test_parametric_forward_ad(act):
    x, parameter = torch.randn(4, 3), parameter_values(3, torch.float32)
    results = []
    for function in (act.function, act.composed):
        with forward_ad.dual_level():
            duals = forward_ad.make_dual(x, torch.ones(4, 3)), forward_ad.make_dual(parameter, torch.ones(3))
            results.append(tuple(forward_ad.unpack_dual(function(*duals))))
    assert_close(results[0], results[1])


@each_parametric
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_parametric_compile(act, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(act.function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((4, 3), (5, 3, 7)):
        x, parameter, grad_y = torch.randn(shape), parameter_values(3, torch.float32), torch.randn(shape)
        assert_close(parametric_results(compiled, x, parameter, grad_y), parametric_results(act.function, x, parameter, grad_y))


@each_parametric
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_parametric_checkpoint(act, use_reentrant):
    given = torch.randn(4, 3), parameter_values(3, torch.float32), torch.randn(4, 3)
    x, parameter = leaf(given[0]), leaf(given[1])
    checkpoint(act.function, x, parameter, use_reentrant=use_reentrant).backward(given[2])
    assert_close((x.grad, parameter.grad), parametric_results(act.function, *given)[1:], rtol=0, atol=0)


@each_parametric
def test_parameter_changed_before_backward_is_an_error(act):
    x, parameter = leaf(torch.randn(4, 3)), leaf(parameter_values(3, torch.float32))
    y = act.function(x, parameter)
    with torch.no_grad():
        parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_parametric
def test_parametric_module_may_be_called_with_other_parameters(act):
    module = gk.PReLU(3) if act.name == "prelu" else gk.Swish(learnable=True, num_parameters=3)
    (name,) = module.state_dict()
    x, parameter = torch.randn(4, 3), parameter_values(3, torch.float32)
    assert_bitwise_equal("y", torch.func.functional_call(module, {name: parameter}, (x,)), act.function(x, parameter))


@pytest.mark.parametrize("weight_shape", [(2,), (4,), (0,), (3, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (3,), (), (2, 3, 4)], ids=str)
def test_prelu_with_a_weight_of_the_wrong_shape_is_torchs_error(shape, weight_shape):
    x, weight = torch.randn(shape), torch.ones(weight_shape)
    expected = outcome(F.prelu, x, weight)
    assert expected[0] is RuntimeError
    assert outcome(gk.prelu, x, weight) == expected


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prelu_with_a_weight_of_another_dtype_equals_torchs(dtype, weight_dtype):
    x, weight = torch.randn(4, 3, dtype=dtype), torch.ones(3).to(weight_dtype) / 4
    assert_same_outcome("y", outcome(gk.prelu, x, weight), outcome(F.prelu, x, weight))


@pytest.mark.parametrize(
    "shape,length,channels", [((5, 3), 2, 3), ((5, 3), 5, 3), ((2, 7, 4), 4, 7), ((5,), 3, 1), ((5,), 5, 1), ((), 2, 1), ((2, 3, 4), 0, 3)]
)
def test_swish_with_a_beta_of_the_wrong_length_names_both(shape, length, channels):
    for call in (gk.swish, lambda x, beta: gk.swish(x.requires_grad_(), beta)):
        with pytest.raises(RuntimeError) as error:
            call(torch.randn(shape), torch.ones(length))
        assert {str(length), str(channels)} <= set(re.findall(r"\d+", str(error.value)))


def test_a_learnable_swish_of_the_wrong_length_names_both():
    with pytest.raises(RuntimeError, match=r"3.*2"):
        gk.Swish(learnable=True, num_parameters=2)(torch.randn(4, 3))
    with pytest.raises(ValueError, match="learnable"):
        gk.Swish(num_parameters=2)


@pytest.mark.parametrize("beta_shape", [(), (1,), (3,)], ids=str)
@pytest.mark.parametrize("beta_dtype", [*DTYPES, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beta_of_another_dtype_is_promoted(dtype, beta_dtype, beta_shape):
    """As in x * torch.sigmoid(beta * x)."""
    x, beta = torch.randn(4, 3, dtype=dtype), torch.full(beta_shape, 2).to(beta_dtype)
    expected = x * torch.sigmoid(beta * x)
    y = gk.swish(x, beta)
    assert y.dtype == expected.dtype
    # In 16 bits the composed function rounds twice more.
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-3} if dtype in SIXTEEN_BITS else {}
    assert_close(y, expected, **tolerance)
    if beta_dtype.is_floating_point:
        grad_y = torch.randn(4, 3, dtype=y.dtype)
        actual, expected = (parametric_results(f, x, beta, grad_y) for f in (gk.swish, lambda x, beta: x * torch.sigmoid(beta * x)))
        assert [each.dtype for each in actual] == [each.dtype for each in expected]
        assert_close(actual, expected, **({"rtol": 0.05, "atol": 0.05} if {dtype, beta_dtype} & set(SIXTEEN_BITS) else {}))


def test_swish_of_one_channel_equals_that_of_one_element():
    x = torch.randn(5, 1, 7)
    assert_bitwise_equal("y", gk.swish(x, torch.tensor([0.7])), gk.swish(x, torch.tensor(0.7)))
    assert gk.swish(torch.tensor(0.5), torch.tensor([0.7])).shape == ()


@each_dtype
def test_swish_with_a_tensor_of_ones_is_silu(dtype):
    x = torch.randn(4, 3, dtype=dtype)
    for beta in (torch.ones((), dtype=dtype), torch.ones(3, dtype=dtype)):
        assert_close(gk.swish(x, beta), F.silu(x))
        assert_bitwise_equal("y", gk.swish(x, beta), gk.swish(x))


def test_prelu_module_gradient_equals_torchs():
    x = torch.randn(4, 3, 5)
    grads = []
    for cls in (gk.PReLU, nn.PReLU):
        module = cls(3)
        module(x).square().sum().backward()
        grads.append(module.weight.grad)
    assert_close(grads[0], grads[1])


# rrelu in training: slopes that are drawn


def drawn_slopes(count, lower=1 / 8, upper=1 / 3, dtype=torch.float32):
    return -gk.rrelu(torch.full((count,), -1.0, dtype=dtype), lower, upper, training=True)


def test_slopes_are_uniform():
    """Kolmogorov-Smirnov test: the largest distance exceeds 1.95 / sqrt(n) in 1 of 1000 uniform samples."""
    count = 1_000_000
    for lower, upper in ((1 / 8, 1 / 3), (0.0, 1.0), (-2.0, 5.0)):
        slopes = drawn_slopes(count, lower, upper, torch.float64)
        assert lower <= slopes.min() and slopes.max() <= upper
        expected = lower + (upper - lower) * (torch.arange(count) + 0.5) / count
        assert ((slopes.sort().values - expected).abs().max() / (upper - lower)).item() < 1.95 / math.sqrt(count)
        # Both ends are reached: about 20 of a million slopes are expected in each interval.
        assert (slopes < lower + 2e-5 * (upper - lower)).any() and (slopes > upper - 2e-5 * (upper - lower)).any()


def test_slopes_are_uniform_in_each_place_of_a_packet():
    """Chi-square test of 64 places and 16 bins: with 1023 degrees of freedom 1 of 1000 samples exceeds 1168."""
    slopes = drawn_slopes(1 << 20, 0.0, 1.0)
    bins = torch.bincount(torch.arange(1 << 20) % 64 * 16 + (slopes * 16).long(), minlength=1024).double()
    assert (((bins - 1024) ** 2) / 1024).sum() < 1168


def test_slopes_do_not_depend_on_their_neighbours_nor_on_the_last_draw():
    count = 1_000_000
    first, second = (drawn_slopes(count, -1.0, 1.0, torch.float64) * math.sqrt(3) for _ in range(2))
    for shift in (1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 32768):
        assert abs((first[shift:] * first[:-shift]).mean()) < 4.5 / math.sqrt(count)
    assert abs((first * second).mean()) < 4.5 / math.sqrt(count)
    assert first.unique().numel() > 0.95 * count


def test_slopes_between_equal_and_close_bounds():
    assert_bitwise_equal("slopes", drawn_slopes(65, 0.3, 0.3), torch.full((65,), 0.3))
    for dtype in SIXTEEN_BITS:
        slopes = drawn_slopes(100_003, 0.1, 0.1004, dtype)
        assert slopes.min() >= torch.tensor(0.1).to(dtype) and slopes.max() <= torch.tensor(0.1004).to(dtype)


@each_dtype
def test_slopes_depend_only_on_the_seed_and_the_place(dtype, each_thread_count):
    """Not on the dtype, the layout, the number of threads, on in place or not, or on a gradient."""
    x = torch.randn(3, 8, 50, 50, dtype=dtype)

    def run(x, **kwargs):
        torch.manual_seed(7)
        return gk.rrelu(x, training=True, **kwargs)

    expected = run(x)
    assert_bitwise_equal("with a gradient", run(leaf(x)).detach(), expected)
    assert_bitwise_equal("in place", run(x.clone(), inplace=True), expected)
    for each in each_thread_count(lambda: run(x)):
        assert_bitwise_equal("threads", each, expected)
    if dtype != torch.float64:
        assert_bitwise_equal("rounded from float32", run(x.float()).to(dtype), expected)
    transposed = x.permute(3, 1, 0, 2)
    assert_bitwise_equal("in storage order", run(transposed).permute(2, 1, 3, 0), expected)
    assert_bitwise_equal("the first elements", run(x.view(-1)[:1009]), expected.view(-1)[:1009])
    assert not torch.equal(gk.rrelu(x, training=True), expected)


def test_the_seed_is_drawn_from_torchs_generator(device):
    x = torch.full((65,), -1.0)
    # Each device has a generator of its own.
    generator = torch.random if device == "cpu" else torch.cuda
    before = generator.get_rng_state()
    first = gk.rrelu(x, training=True)
    assert not torch.equal(generator.get_rng_state(), before)
    assert not torch.equal(gk.rrelu(x, training=True), first)
    generator.set_rng_state(before)
    assert_bitwise_equal("again", gk.rrelu(x, training=True), first)
    with torch.random.fork_rng():
        gk.rrelu(x, training=True)
    state = generator.get_rng_state()
    gk.rrelu(x)
    assert torch.equal(generator.get_rng_state(), state), "eval draws nothing"


@each_dtype
@each_layout
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_gradient_has_the_slopes_of_its_own_output(dtype, layout, inplace):
    if inplace and layout == "expanded":
        return
    x = LAYOUTS[layout](lambda *size: torch.randn(*size, dtype=dtype))
    for grad_y in (torch.randn(x.shape, dtype=dtype), torch.randn_like(x)):
        torch.manual_seed(3)
        start = leaf(x)
        y = gk.rrelu(start * 1 if inplace else start, 0.25, 0.75, training=True, inplace=inplace)
        (grad_x,) = torch.autograd.grad(y, start, grad_y)
        # The same seed draws the same slopes again, in the storage order of y.
        torch.manual_seed(3)
        slopes = -gk.rrelu(torch.full_like(y.detach(), -1.0, dtype=torch.float64), 0.25, 0.75, training=True)
        assert_close(y.detach(), torch.where(x > 0, x, slopes * x).to(dtype))
        assert_close(grad_x, torch.where(x > 0, grad_y, slopes * grad_y).to(dtype))
        assert y.stride() == F.leaky_relu(x).stride()


@each_dtype
def test_nan_inf_and_zero_in_rrelu(dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0] * 13, dtype=dtype)
    y, grad_x = value_and_grad(lambda x: gk.rrelu(x, 0.25, 0.75, training=True), x, torch.ones_like(x))
    assert_bitwise_equal("y", y, x)
    # torch draws no slope for a nan.
    assert ((grad_x == 1) == ((x == math.inf) | x.isnan())).all() and (grad_x.isfinite() & (grad_x >= 0.25)).all()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_rrelu_checkpoint_draws_the_same_slopes_again(use_reentrant):
    x = leaf(torch.full((1009,), -1.0))
    y = checkpoint(lambda x: gk.rrelu(x * 1, training=True), x, use_reentrant=use_reentrant)
    y.sum().backward()
    assert_bitwise_equal("slopes", x.grad, -y.detach())


def test_rrelu_second_derivatives():
    """The gradient is linear in grad_y, with the slopes of the output."""
    x, grad_y = torch.randn(65, dtype=torch.float64, requires_grad=True), torch.randn(65, dtype=torch.float64, requires_grad=True)
    y = gk.rrelu(x, training=True)
    (grad_x,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
    (slopes,) = torch.autograd.grad(grad_x, grad_y, torch.ones_like(grad_x))
    assert_close(slopes * x.detach(), y.detach())


def test_rrelu_functorch():
    """Each gradient has the slopes of its output."""
    x = torch.full((4, 65), -1.0)

    def slopes_and_gradient(x):
        y, vjp = torch.func.vjp(lambda x: gk.rrelu(x, training=True), x)
        return -y, vjp(torch.ones_like(y))[0]

    slopes, grad_x = slopes_and_gradient(x)
    assert_close(grad_x, slopes)
    y, tangent = torch.func.jvp(lambda x: gk.rrelu(x, training=True), (x,), (torch.ones_like(x),))
    assert_close(tangent, -y)
    for randomness in ("different", "same"):
        slopes, grad_x = torch.func.vmap(slopes_and_gradient, randomness=randomness)(x)
        assert_close(grad_x, slopes)
        assert ((slopes >= 1 / 8) & (slopes <= 1 / 3)).all() and slopes[0].unique().numel() > 60
        assert torch.equal(slopes[0], slopes[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: gk.rrelu(x, training=True))(x)


def test_rrelu_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gk.rrelu(x, training=True), fullgraph=True, backend="aot_eager")
    x = torch.full((1009,), -1.0)
    y, grad_x = value_and_grad(compiled, x, torch.ones_like(x))
    assert_close(grad_x, -y)
    assert_drew_slopes(x, y, grad_x, 1 / 8, 1 / 3)
    assert y.unique().numel() > 900


def test_rrelu_in_eval_equals_torchs_in_every_bit():
    for dtype in DTYPES:
        x, grad_y = torch.randn(1009, dtype=dtype), torch.randn(1009, dtype=dtype)
        for bounds in ((), (0.1, 0.7), (-0.3, 0.1)):
            for ours, torchs in zip(value_and_grad(gk.rrelu, x, grad_y, *bounds), value_and_grad(F.rrelu, x, grad_y, *bounds), strict=True):
                assert_bitwise_equal("rrelu in eval", ours, torchs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
@pytest.mark.parametrize("bounds", [(0.5, 0.25), (math.nan, 0.5), (0.5, math.nan), (0.0, math.inf), (-math.inf, 0.0)], ids=str)
def test_rrelu_with_bounds_that_torch_refuses(bounds, inplace, training):
    x = torch.tensor([1.0, -1.0])
    expected = outcome(F.rrelu, x.clone(), *bounds, training, inplace)
    given = x.clone()
    actual = outcome(gk.rrelu, given, *bounds, training, inplace)
    if isinstance(expected, tuple):
        assert actual == expected
        assert_bitwise_equal("x", given, x)
    else:
        assert isinstance(actual, torch.Tensor)


# the whole range


# (name, parameter) -> largest errors of y and of the gradient, in ulp of their terms, as the docstrings state
# them
SWEPT = {
    ("leaky_relu", 0.01): (0.5, 0.5),
    ("elu", 1.0): (1.0, 1.0),
    ("swish", 1.0): (max(2.2, ULP_BOUND), max(2.6, ULP_BOUND)),
    ("swish", 1.7): (max(2.2, ULP_BOUND), max(2.6, ULP_BOUND)),
}


def swept():
    """float32 numbers of every size, denormals too, and many where exp saturates; then inf, 0 and nan."""
    bits = (2.0 ** torch.arange(-149, 128, dtype=torch.float64)).float().view(torch.int32)
    neighbours = (bits[:, None] + torch.arange(-64, 65)).clamp(0, 0x7F7FFFFF).to(torch.int32).view(torch.float32).flatten()
    random_bits = torch.randint(0, 0x7F800000, (200_000,), dtype=torch.int32).view(torch.float32)
    dense = torch.cat([torch.rand(200_000) * 4, torch.rand(100_000) * 110])
    ends = torch.cat([torch.linspace(start, start + 3, 20_001) for start in (15.0, 16.5, 86.5, 87.0, 88.0, 102.0, 103.5)])
    largest = torch.tensor([torch.finfo(torch.float32).max, math.inf, 0.0])
    positive = torch.cat([neighbours, random_bits, dense, ends, largest])
    # nan is not last, because torch's gradient at a nan differs in the elements left over from whole vectors.
    return torch.cat([torch.tensor([math.nan]), positive, -positive])


@pytest.mark.parametrize("name,param", SWEPT)
def test_accuracy_over_the_whole_range(name, param):
    act, bounds, param = BY_NAME[name], SWEPT[name, param], in_float32(param)
    x = swept()
    grad_y = torch.ones_like(x)
    y, grad_x = value_and_grad(act.function, x, grad_y, param)
    torch_y, torch_grad_x = value_and_grad(act.reference, x, grad_y, param)
    exact_y, exact_grad_x = value_and_grad(act.reference, x.double(), grad_y.double(), param)
    scale = scales(act, x, grad_y, param)
    for what, bound, each, torchs, exact, size in zip(
        ("y", "grad_x"), bounds, (y, grad_x), (torch_y, torch_grad_x), (exact_y, exact_grad_x), scale, strict=True
    ):
        told = ~exact.isnan()
        assert_bitwise_equal(f"nan in {what}", each.isnan(), ~told)
        size = np.broadcast_to(size, x.shape)[told.cpu()]
        assert_accurate(what, each[told], torchs[told], exact[told], scale=size)
        assert_accurate(what, each[told], each[told], exact[told], scale=size, most=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name,param", [("elu", 1.0), ("elu", -1.0), ("swish", 1.0)])
def test_an_element_does_not_depend_on_its_neighbours(name, param, dtype):
    """A vector with an x far from zero in any lane takes another path through exp."""
    act = BY_NAME[name]
    x, grad_y = torch.randn(4099, dtype=dtype) * 8, torch.randn(4099, dtype=dtype)
    if name == "elu":
        # At the ends of the range of float32 the order of the factors changes the result.
        x[1:3], grad_y[1:3] = -0.5, torch.tensor([3e38, 1e-38], dtype=dtype)
    beside = x.clone()
    beside[::7] = torch.tensor([-math.inf, -300.0, -90.0, -50.0, 50.0, 300.0, math.nan], dtype=dtype).repeat(84)[: len(beside[::7])]
    same = torch.arange(len(x)) % 7 != 0
    for what, each, other in zip(
        ("y", "grad_x"),
        value_and_grad(act.function, x, grad_y, param),
        value_and_grad(act.function, beside, grad_y, param),
        strict=True,
    ):
        assert_bitwise_equal(what, each[same], other[same])


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(memory_to_itself):
    """The index of an element and of its bit in the mask does not fit into int32."""
    count = 2**31 + 77
    skip_unless_free(8 * count)
    root = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    x = root * torch.ones(count, dtype=torch.bfloat16)
    edge = get_gradient_edge(x)
    end = torch.randn(200).bfloat16()
    with torch.no_grad():
        x[-200:] = end
    y = gk.leaky_relu(x, 0.25, inplace=True)
    expected_y, expected_grad_x = value_and_grad(F.leaky_relu, end, end, 0.25)
    assert_bitwise_equal("y at the end", y.detach()[-200:], expected_y)
    assert y.detach()[:-200].min() == 1
    grad_y = torch.full((count,), 2.0, dtype=torch.bfloat16)
    grad_y[-200:] = end
    (grad_x,) = torch.autograd.grad(y, edge, grad_y)
    assert_bitwise_equal("grad_x at the end", grad_x[-200:], expected_grad_x)
    assert grad_x[:-200].min() == grad_x[:-200].max() == 2
