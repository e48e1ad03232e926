"""leaky_relu, elu, swish and their modules: values, gradients, layouts, memory kept, and every way torch can call an operator.

torch's own means gradkernels.reference in the tensor's dtype; exact means more digits (accuracy.py). Each later dtype or layout is one more
entry of the tables below.
"""

import copy
import math
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from accuracy import ULP_BOUND, assert_accurate, assert_bitwise_equal, assert_same_outcome, exact_activation, extended, outcome
from gradkernels import reference

OPS = torch.ops.gradkernels


@dataclass(frozen=True)
class Activation:
    """function(x, param), what torch has for it, and the modules of both."""

    name: str
    function: Any
    reference: Any
    torchs: Any
    module: Any
    torch_module: Any
    default: float
    params: tuple
    has_inplace: bool = True

    def __repr__(self):
        return self.name


ACTIVATIONS = [
    Activation(
        "leaky_relu", gk.leaky_relu, reference.leaky_relu, F.leaky_relu, gk.LeakyReLU, nn.LeakyReLU, 0.01, (0.01, 0.25, 0.0, 1.5, -0.5)
    ),
    Activation("elu", gk.elu, reference.elu, F.elu, gk.ELU, nn.ELU, 1.0, (1.0, 1.3, 0.0, -0.7)),
    Activation("swish", gk.swish, reference.swish, F.silu, gk.Swish, nn.SiLU, 1.0, (1.0, 1.7, 0.0, -0.5), has_inplace=False),
]
INPLACE = [act for act in ACTIVATIONS if act.has_inplace]
DTYPES = [torch.float32, torch.float64]
ROUTED_DTYPES = [torch.int64, torch.bool, torch.complex64]
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1009, 16383, 16384, 16385, 40009]
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
    """Values no finite difference carries over the kink at 0."""
    x = torch.randn(*size, dtype=dtype)
    return x + x.sign() * 0.1


def scales(act, x, grad_y, param):
    """The size of what y and grad_x are computed from, where rounding it costs more than 2 ulp of the result.

    elu's gradient is read off the output, grad_y * (y + alpha), as in torch's elu_; swish rounds beta * x (not for beta = 1), which exp
    magnifies by |beta x|, and its gradient is the sum of two terms of either sign.
    """
    x, grad_y, param = extended(x), abs(extended(grad_y)), extended(param)
    if act.name == "elu":
        return 0.0, grad_y * abs(param) * (param >= 0)
    if act.name == "swish":
        z = param * x
        gate = 1 / (1 + np.exp(-z))
        magnified = 1 + abs(z) * (1 - gate) * (param != 1)
        return abs(x) * gate * magnified, grad_y * gate * (1 + abs(z) * (1 - gate)) * magnified
    return 0.0, 0.0


def comparable(act, x):
    """Where torch has one gradient: for a nan elu's is nan in its vector loop and grad_y in its loop over the rest."""
    return ~x.isnan() if act.name == "elu" else torch.ones_like(x, dtype=torch.bool)


# values


@each_dtype
@each_param
@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradient(act, param, dtype, size):
    x, grad_y = torch.randn(size, dtype=dtype) * 4, torch.randn(size, dtype=dtype)
    y, grad_x = value_and_grad(act.function, x, grad_y, param)
    torch_y, torch_grad_x = value_and_grad(act.reference, x, grad_y, param)
    if dtype == torch.float64:
        exact_y, exact_grad_x = exact_activation(x, grad_y, act.name, param)
    else:
        exact_y, exact_grad_x = value_and_grad(act.reference, x.double(), grad_y.double(), param)
    y_scale, grad_scale = scales(act, x, grad_y, param)
    assert_accurate("y", y, torch_y, exact_y, scale=y_scale)
    assert_accurate("grad_x", grad_x, torch_grad_x, exact_grad_x, scale=grad_scale, bound=2.6 if act.name == "swish" else ULP_BOUND)
    assert_bitwise_equal("y without grad", act.function(x, param), y)


@each_act
def test_reference_in_float64_is_exact(act):
    for param in act.params:
        x, grad_y = torch.randn(1009, dtype=torch.float64) * 4, torch.randn(1009, dtype=torch.float64)
        y, grad_x = value_and_grad(act.reference, x, grad_y, param)
        exact_y, exact_grad_x = exact_activation(x, grad_y, act.name, param)
        y_scale, grad_scale = scales(act, x, grad_y, param)
        assert_accurate("y", y, torch.from_numpy(exact_y.astype(np.float64)), exact_y, scale=8 * y_scale)
        assert_accurate("grad_x", grad_x, torch.from_numpy(exact_grad_x.astype(np.float64)), exact_grad_x, scale=8 * grad_scale)


@each_dtype
@each_param
def test_far_from_zero(act, param, dtype):
    """Where exp overflows or vanishes: finite, and right to 2 ulp of 1 or of the result."""
    x = torch.linspace(-1100, 1100, 4001, dtype=dtype)
    grad_y = torch.ones_like(x)
    y, grad_x = value_and_grad(act.function, x, grad_y, param)
    torch_y, torch_grad_x = value_and_grad(act.reference, x, grad_y, param)
    exact_y, exact_grad_x = exact_activation(x, grad_y, act.name, param)
    assert_accurate("y", y, torch_y, exact_y, scale=1)
    assert_accurate("grad_x", grad_x, torch_grad_x, exact_grad_x, scale=1)


@each_dtype
@each_act
def test_edge_values(act, dtype):
    """leaky_relu agrees with torch in every bit; elu and swish agree in nan, inf and the sign of zero, and in the rest to 2 ulp."""
    denormal = torch.finfo(dtype).smallest_normal / 100
    largest = torch.finfo(dtype).max
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, denormal, -denormal, largest, -largest, 1.0, -1.0] * 7, dtype=dtype)
    grad_y = torch.ones_like(x)
    y, grad_x = value_and_grad(act.function, x, grad_y, act.default)
    torch_y, torch_grad_x = value_and_grad(act.torchs, x, grad_y)
    if act.name == "leaky_relu":
        assert_bitwise_equal("y", y, torch_y)
        assert_bitwise_equal("grad_x", grad_x, torch_grad_x)
    else:
        assert_accurate("y", y, torch_y, torch_y)
        told = comparable(act, x)
        assert_accurate("grad_x", grad_x[told], torch_grad_x[told], torch_grad_x[told])
        assert_bitwise_equal("y at zero", y[x == 0], torch_y[x == 0])


@each_dtype
@each_act
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_stay_where_they_are(act, dtype, value):
    for size in SIZES[1:-3]:
        x, grad_y = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)
        clean_y, clean_grad_x = value_and_grad(act.function, x, grad_y)
        x[0] = x[-1] = value
        y, grad_x = value_and_grad(act.function, x, grad_y)
        torch_y, torch_grad_x = value_and_grad(act.torchs, x, grad_y)
        assert_bitwise_equal(f"y between, size {size}", y[1:-1], clean_y[1:-1])
        assert_bitwise_equal(f"grad_x between, size {size}", grad_x[1:-1], clean_grad_x[1:-1])
        assert_close(y, torch_y, equal_nan=True)
        assert_close(grad_x[comparable(act, x)], torch_grad_x[comparable(act, x)], equal_nan=True)


@each_dtype
@each_act
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_in_grad_y(act, dtype, value):
    x, grad_y = torch.randn(131, dtype=dtype), torch.randn(131, dtype=dtype)
    grad_y[0] = grad_y[-1] = value
    _, grad_x = value_and_grad(act.function, x, grad_y)
    _, torch_grad_x = value_and_grad(act.torchs, x, grad_y)
    assert_close(grad_x, torch_grad_x, equal_nan=True)


@each_act
def test_nan_as_the_parameter(act):
    x, grad_y = torch.randn(131), torch.randn(131)
    y, grad_x = value_and_grad(act.function, x, grad_y, math.nan)
    torch_y, torch_grad_x = value_and_grad(act.reference, x, grad_y, math.nan)
    assert_close(y, torch_y, equal_nan=True)
    assert_close(grad_x, torch_grad_x, equal_nan=True)


@each_act
@each_dtype
def test_same_bits_for_any_number_of_threads(act, dtype, each_thread_count):
    x, grad_y = torch.randn(100_003, dtype=dtype), torch.randn(100_003, dtype=dtype)
    one, two = each_thread_count(lambda: value_and_grad(act.function, x, grad_y))
    again = value_and_grad(act.function, x, grad_y)
    for name, each, other, repeated in zip(("y", "grad_x"), one, two, again, strict=True):
        assert_bitwise_equal(f"{name} with 2 threads", other, each)
        assert_bitwise_equal(f"{name} run again", repeated, each)


@each_act
@pytest.mark.parametrize("dtype", ROUTED_DTYPES, ids=str)
def test_other_dtypes_are_torchs(act, dtype):
    x = (torch.randn(65) * 4).to(dtype)
    assert_same_outcome("y", outcome(act.function, x), outcome(act.torchs, x))
    if act.has_inplace:
        actual, expected = x.clone(), x.clone()
        assert_same_outcome(
            "y in place", outcome(act.function, actual, act.default, True), outcome(act.torchs, expected, act.default, True)
        )
        assert_close(actual, expected, rtol=0, atol=0)


@each_act
def test_what_is_no_tensor_is_a_type_error(act):
    for wrong in ([1.0], 1.0, None):
        with pytest.raises(TypeError):
            act.function(wrong)


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
def test_grad_y_that_is_zero_or_absent(act):
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
def test_inplace_on_a_leaf_is_refused_unwritten(act):
    x = torch.randn(17, requires_grad=True)
    before = x.detach().clone()
    expected = outcome(act.torchs, x, act.default, True)
    assert expected[0] is RuntimeError
    assert outcome(act.function, x, act.default, True) == expected
    assert_bitwise_equal("x", x.detach(), before)
    assert x._version == 0


@each_inplace
def test_inplace_on_overlapping_memory_is_refused_unwritten(act):
    x = torch.randn(1, 5)
    before = x.clone()
    expected = outcome(act.torchs, x.expand(3, 5), act.default, True)
    assert expected[0] is RuntimeError
    assert outcome(act.function, x.expand(3, 5), act.default, True) == expected
    assert_bitwise_equal("x", x, before)


@each_dtype
def test_inplace_with_a_negative_slope_uses_the_mask(dtype):
    root, grad_y = torch.randn(131, dtype=dtype, requires_grad=True), torch.randn(131, dtype=dtype)
    y = gk.leaky_relu(root * 1, -0.5, inplace=True)
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
    """leaky_relu keeps the mask only, which nothing that happens to y can harm; elu keeps y, and says that it was modified."""
    root = torch.randn(9, requires_grad=True)
    y = act.function(root * 1, inplace=True)
    with torch.no_grad():
        y.mul_(2)
    if act.name == "leaky_relu":
        (grad_x,) = torch.autograd.grad(y, root, torch.ones(9))
        assert_close(grad_x, torch.where(root > 0, 1.0, 0.01))
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


def saved_by(function):
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    return y, saved


@each_dtype
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_leaky_relu_keeps_one_bit_per_element(dtype, size, inplace):
    x = torch.randn(size, dtype=dtype, requires_grad=True) * 1
    _, saved = saved_by(lambda: gk.leaky_relu(x, inplace=inplace))
    assert [(each.dtype, each.numel()) for each in saved] == [(torch.uint8, (size + 7) // 8)]


@each_act
def test_nothing_is_kept_without_grad(act):
    x = torch.randn(65)
    assert saved_by(lambda: act.function(x))[1] == []
    with torch.no_grad():
        assert saved_by(lambda: act.function(leaf(x)))[1] == []


@pytest.mark.parametrize("act", ACTIVATIONS[1:], ids=repr)
def test_elu_and_swish_keep_no_copy(act):
    x = torch.randn(65, requires_grad=True) * 1
    y, saved = saved_by(lambda: act.function(x))
    assert len(saved) == 1
    assert saved[0].data_ptr() in (x.data_ptr(), y.data_ptr())


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
def test_backward_again_and_after_it_was_freed(act):
    x = torch.randn(9, requires_grad=True)
    y = act.function(x * 1)
    y.sum().backward(retain_graph=True)
    once = x.grad.clone()
    y.sum().backward()
    assert_close(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


# every way torch calls an operator


def opcheck_samples():
    """Arguments of every operator, by its name."""
    forward, samples = [], {}
    for layout in ("0-d", "empty", "contiguous", "transposed", "channels_last", "expanded", "every second"):
        for requires_grad in (False, True):
            forward.append(LAYOUTS[layout](torch.randn).detach().requires_grad_(requires_grad))
    samples["leaky_relu"] = [(x, 0.1) for x in forward]
    samples["elu"] = [(x, alpha) for x in forward for alpha in (1.3, -0.5)]
    samples["swish"] = [(x, 1.7) for x in forward]
    plain = [torch.randn(3, 5), torch.randn(5, 3, dtype=torch.float64).t(), torch.randn(0), torch.randn(3, 10)[:, ::2]]
    for name in ("leaky_relu_", "leaky_relu_with_mask", "leaky_relu_with_mask_", "elu_"):
        samples[name] = [(x, 0.1) for x in plain]
    samples |= {"leaky_relu_backward": [], "elu_backward": [], "swish_backward": []}
    for dtype in DTYPES:
        for requires_grad in (False, True):
            x, grad_y = (torch.randn(3, 5, dtype=dtype, requires_grad=requires_grad) for _ in range(2))
            mask = OPS.leaky_relu_with_mask(x.detach(), 0.1)[1]
            samples["leaky_relu_backward"].append((grad_y, mask, x.stride(), 0.1))
            samples["elu_backward"] += [(grad_y, x, -1.3, False), (grad_y, x, 1.3, True)]
            samples["swish_backward"].append((grad_y, x, 1.7))
    return samples


@pytest.mark.parametrize(
    "op",
    [
        *("leaky_relu", "leaky_relu_", "leaky_relu_with_mask", "leaky_relu_with_mask_", "leaky_relu_backward"),
        *("elu", "elu_", "elu_backward", "swish", "swish_backward"),
    ],
)
def test_opcheck(op):
    for args in opcheck_samples()[op]:
        opcheck(getattr(OPS, op).default, args)


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


@each_act
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(act, dynamic):
    def forward(x):
        y = act.function(x * 1, act.params[1], inplace=True) if act.has_inplace else act.function(x * 1, act.params[1])
        return y + act.module(act.params[1])(x)

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((5, 13), (7, 9)):
        x, grad_y = torch.randn(size), torch.randn(size)
        assert_close(value_and_grad(compiled, x, grad_y), value_and_grad(forward, x, grad_y))


@pytest.mark.parametrize("op,param", [("leaky_relu", 0.1), ("elu", 1.3), ("swish", 1.7)])
def test_compile_of_the_operator_itself(op, param):
    def forward(x):
        return getattr(OPS, op)(x, param)

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((5, 13), (7, 9)):
        x, grad_y = torch.randn(size), torch.randn(size)
        assert_close(value_and_grad(compiled, x, grad_y), value_and_grad(forward, x, grad_y))


@each_act
@pytest.mark.filterwarnings("error::UserWarning")
def test_functorch(act):
    x, tangent = torch.randn(4, 7), torch.randn(4, 7)

    def loss(function):
        return lambda x: function(x).square().sum()

    for name, transform in {
        "grad": lambda f: torch.func.grad(loss(f))(x),
        "vmap": lambda f: torch.func.vmap(f)(x),
        "vmap over columns": lambda f: torch.func.vmap(f, in_dims=1, out_dims=1)(x),
        "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(loss(f)))(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (tangent,)),
        "vjp": lambda f: torch.func.vjp(f, x)[1](tangent),
        "jacrev": lambda f: torch.func.jacrev(f)(x),
        "jacfwd": lambda f: torch.func.jacfwd(f)(x),
        "hessian": lambda f: torch.func.hessian(loss(f))(x),
    }.items():
        assert_close(transform(act.function), transform(act.torchs), msg=lambda text, name=name: f"{name}: {text}")


def test_the_fused_path_is_there_after_functorch():
    torch.func.grad(lambda x: gk.leaky_relu(x).sum())(torch.randn(9))
    assert [each.dtype for each in saved_by(lambda: gk.leaky_relu(torch.randn(9, requires_grad=True)))[1]] == [torch.uint8]


@each_inplace
def test_functorch_inplace(act):
    x = torch.randn(4, 7)
    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f))):
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
    exported = torch.export.export(act.module(), (torch.randn(4, 6),), dynamic_shapes=[{0: torch.export.Dim("batch", min=2)}])
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
def test_autocast_leaves_the_dtype(act):
    x = torch.randn(65, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for each in (x, x.bfloat16()):
            assert act.function(each).dtype == act.torchs(each).dtype == each.dtype


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
def test_what_is_kept_may_be_moved_elsewhere(act):
    x, grad_y = torch.randn(65), torch.randn(65)
    expected = value_and_grad(act.function, x, grad_y)
    with saved_tensors_hooks(lambda tensor: tensor.numpy().copy(), torch.from_numpy):
        assert_close(value_and_grad(act.function, x, grad_y), expected, rtol=0, atol=0)


@each_act
def test_deterministic_mode(act):
    torch.use_deterministic_algorithms(True)
    try:
        value_and_grad(act.function, torch.randn(65), torch.randn(65))
    finally:
        torch.use_deterministic_algorithms(False)


# torch's own samples

OP_DB_NAMES = {"leaky_relu": "nn.functional.leaky_relu", "elu": "nn.functional.elu", "swish": "nn.functional.silu"}


def op_of(act):
    return next(op for op in op_db if op.name == OP_DB_NAMES[act.name] and op.variant_test_name == "")


def samples_of(act, dtype, requires_grad):
    op = op_of(act)
    yield from op.sample_inputs("cpu", dtype, requires_grad=requires_grad)
    if op.reference_inputs_func is not None:
        yield from op.reference_inputs("cpu", dtype, requires_grad=requires_grad)


@each_act
@each_dtype
def test_op_db_samples(act, dtype):
    count = 0
    for sample in samples_of(act, dtype, True):
        for each in (sample, sample.noncontiguous()):
            # Not each.input itself: views among them were made without a graph, and are no leaves.
            given = (each.input, torch.randn_like(each.input), *each.args, *each.kwargs.values())
            y, grad_x = value_and_grad(act.function, *given)
            torch_y, torch_grad_x = value_and_grad(act.torchs, *given)
            assert_close(y, torch_y, equal_nan=True)
            told = comparable(act, each.input)
            assert_close(grad_x[told], torch_grad_x[told], equal_nan=True)
            count += 1
    assert count >= 18


@each_act
def test_op_db_has_no_error_inputs(act):
    """When torch writes some, this fails and they are to be run here."""
    assert op_of(act).error_inputs_func is None


@each_act
@each_dtype
def test_module_db_inputs(act, dtype):
    info = next(info for info in module_db if info.module_cls is act.torch_module)
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    assert len(inputs) >= 3
    for each in inputs:
        constructor, (x,) = each.constructor_input, each.forward_input.args
        module, torch_module = (cls(*constructor.args, **constructor.kwargs) for cls in (act.module, act.torch_module))
        grad_y = torch.randn_like(x)
        assert_close(value_and_grad(module, x, grad_y), value_and_grad(torch_module, x, grad_y))


# modules


@each_act
def test_module(act):
    module = act.module()
    assert module.state_dict() == {} and list(module.parameters()) == []
    x = torch.randn(65)
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_bitwise_equal("y", each(x), act.function(x))
    module = act.module(0.3)
    assert_bitwise_equal("y", module(x), act.function(x, 0.3))
    assert "0.3" in repr(module)


@each_inplace
def test_module_inplace(act):
    module, torch_module = act.module(0.3, inplace=True), act.torch_module(0.3, inplace=True)
    x = torch.randn(65)
    expected = act.function(x, 0.3)
    y = module(x)
    assert y is x
    assert_bitwise_equal("y", y, expected)
    assert repr(module) == repr(torch_module)


def test_tensors_with_the_negative_bit_are_torchs():
    """The imaginary part of a conjugate: torch holds it negated, without having written it."""
    for ours, theirs in ((gk.leaky_relu, F.leaky_relu), (gk.elu, F.elu)):
        for inplace in (False, True):
            x = torch.view_as_complex(torch.randn(5, 2)).conj().imag
            assert x.is_neg()
            expected = theirs(x.clone().resolve_neg())
            torch.testing.assert_close(ours(x, inplace=inplace).resolve_neg(), expected)
