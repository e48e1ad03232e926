"""prelu, and swish with a tensor: the gradient of the parameter, for one number and for one in each channel."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from accuracy import DTYPES, SIXTEEN_BITS, assert_accurate, assert_bitwise_equal, assert_same_outcome, exact_activation, extended, outcome
from activation_calls import LAYOUTS, across, away_from_kink, each_dtype, each_layout, each_parametric, exact_shares, leaf

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
    exact_y, exact_grad_x = exact_activation(x, grad_y, act.formula, across(exact_parameter, exact_x))
    y_scale = grad_scale = 0.0
    if act.name == "swish":
        z = across(exact_parameter, exact_x) * exact_x
        gate = 1 / (1 + np.exp(-z))
        spread = 1 + abs(z) * (1 - gate)
        y_scale, grad_scale = abs(exact_x) * gate * spread, abs(exact_grad_y) * gate * spread * spread
    assert_accurate("y", y, torch_y, exact_y, scale=y_scale)
    assert_accurate("grad_x", grad_x, torch_grad_x, exact_grad_x, scale=grad_scale, bound=act.grad_x_error)
    shares, sizes = exact_shares(exact_x, exact_grad_y, exact_parameter, act.name)
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
