"""The activations and their modules on torch's own samples; what the modules keep, print and pickle."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close, make_tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import noncontiguous_like

import gradkernels as gk
from accuracy import assert_accurate, assert_bitwise_equal, assert_same_outcome, outcome
from activation_calls import ACTIVATIONS, assert_drew_slopes, each_dtype, leaf
from gradkernels import reference

OPS = torch.ops.gradkernels

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
