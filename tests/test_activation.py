"""leaky_relu, prelu, rrelu, elu and swish: values, layouts, in place, memory, derivatives.

"torch's" result is that of gradkernels.reference in the tensor's dtype, the "exact" one has more digits
(accuracy.py).
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import get_gradient_edge
from torch.testing import assert_close

import gradkernels as gk
from accuracy import (
    ROUTED_DTYPES,
    SIXTEEN_BITS,
    SWISH_GRADIENT,
    ULP_BOUND,
    activation_scales,
    assert_accurate,
    assert_bitwise_equal,
    assert_same_outcome,
    exact_activation,
    outcome,
    swept,
)
from activation_calls import (
    ACTIVATIONS,
    BY_NAME,
    INPLACE,
    LAYOUTS,
    away_from_kink,
    each_act,
    each_dtype,
    each_inplace,
    each_layout,
    in_float32,
    leaf,
    value_and_grad,
)
from gradkernels import _native
from memory import saved_by, skip_unless_free

# The last two are next to the chunk of a thread.
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1009, 32767, 32769]

each_param = pytest.mark.parametrize("act,param", [(act, param) for act in ACTIVATIONS for param in act.params], ids=str)


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


# the whole range


# (name, parameter) -> largest errors of y and of the gradient, in ulp of their terms, as the docstrings state
# them
SWEPT = {
    ("leaky_relu", 0.01): (0.5, 0.5),
    ("elu", 1.0): (1.0, 1.0),
    ("swish", 1.0): (max(2.2, ULP_BOUND), 4.0),
    ("swish", 1.7): (max(2.2, ULP_BOUND), 4.0),
}


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
