"""nan, inf, signed zeros, denormals and the largest numbers: nan and inf are exactly where torch has them.

Results are compared with torch's vector loops on the CPU, so the tensors are whole vectors. At a nan torch's
gradients of elu and relu6 are nan and 0 in a vector, but grad_y in the elements left over. The tables list
the differences from torch with their reasons.
"""

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gradkernels as gk
from accuracy import DTYPES, SIXTEEN_BITS, assert_bitwise_equal, exact_activation, exact_batch_norm_act
from activation_calls import exact_shares, value_and_grad
from batch_norm_act_calls import ACTS, TWO_SLOPES, cast, laid_out, without_kinks
from batch_norm_act_calls import call as call_batch_norm_act
from gradkernels import reference
from simt_library import ROOT, Guarded, load
from test_simt_activation import INPUT, KINDS, MASK, OUTPUT, PRELU, SWISH, WITH_PARAMETER
from test_simt_batch_norm_act import Kernels

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def special_values(dtype):
    """The values above, then numbers around which e^x and sigmoid underflow in float32 and in float64."""
    info = torch.finfo(dtype)
    denormal = info.smallest_normal / 32
    return [math.nan, math.inf, -math.inf, 0.0, -0.0, denormal, -denormal, info.max, -info.max, 1.0, -1.0, 3.0, -20.0, -95.0, -150.0, -1e3]


def grid(dtype):
    """x and grad_y: every pair of special values, 256 elements."""
    values = torch.tensor(special_values(dtype), dtype=dtype)
    return values.repeat(len(values)), values.repeat_interleave(len(values))


def kinds(tensor):
    """0 for a number, 1 for inf, 2 for -inf, 3 for nan."""
    return (tensor == math.inf) + 2 * (tensor == -math.inf) + 3 * tensor.isnan()


RELATIVE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def is_like(actual, expected):
    """Where actual is nan or inf like expected, or a number near it."""
    return torch.isclose(actual.double(), expected.double(), RELATIVE[actual.dtype], 1e-5, equal_nan=True)


def assert_like_torch(name, actual, torchs, *operands, or_as=None):
    """Fails, with the operands of the first wrong element, unless each element is like torchs or like or_as."""
    assert actual.shape == torchs.shape and actual.dtype == torchs.dtype, f"{name}: {actual.shape} {actual.dtype}, not {torchs.shape}"
    right = is_like(actual, torchs)
    if or_as is not None:
        right |= is_like(actual, or_as)
    if not right.all():
        first = tuple((~right).nonzero()[0].tolist())
        given = [each[first].item() for each in operands]
        raise AssertionError(
            f"{name} at {first}, operands {given}: {actual[first].item()}, torch has {torchs[first].item()}; "
            f"{int((~right).sum())} are wrong"
        )


# ---- pointwise


def full(value, x):
    return torch.tensor([value], dtype=torch.float64).to(x.dtype)


@dataclass(frozen=True)
class Row:
    """ours(x, param) is compared with torchs(x, param).

    eager: computes the expected y and grad_x from x, grad_y, param and create_graph, if torchs does not.
    as_gradient: transforms whose derivative is compared with the gradient, because torch's cannot be used.
    exact: the formula in accuracy.py. Its result is right too, because torch's intermediate results may
    overflow or underflow.
    exact_numbers: the formula's result counts only where it is finite.
    """

    name: str
    ours: Any
    torchs: Any
    params: tuple
    eager: Any = None
    as_gradient: tuple = ()
    has_inplace: bool = False
    exact: str | None = None
    exact_numbers: bool = False

    def __repr__(self):
        return self.name


def elu_in_place(x, grad_y, alpha, create_graph):
    """torch's elu_ saves y, which is -alpha below x = -17 (-37 in float64): there the gradient is 0 * grad_y."""
    if x.dtype in SIXTEEN_BITS or not alpha >= 0:
        return value_and_grad(lambda x: F.elu(x, alpha), x, grad_y, create_graph=create_graph)
    return value_and_grad(lambda x: F.elu(x * 1, alpha, inplace=True), x, grad_y)


def opmath_of(dtype):
    return torch.float32 if dtype in SIXTEEN_BITS else dtype


def in_opmath(tensor):
    return tensor.to(opmath_of(tensor.dtype))


def silu_of_beta(x, grad_y, beta, create_graph):
    """torch's formula of silu with z = beta x, for which torch has no operator.

    The product rule for x * sigmoid(beta * x) would compute inf - inf for every gradient that is inf.
    """
    if beta == 1.0:
        return value_and_grad(F.silu, x, grad_y, create_graph=create_graph)
    # With create_graph torch computes in x's dtype.
    wide, grad_y = (each if create_graph else in_opmath(each) for each in (x, grad_y))
    z = wide * beta
    gate = torch.sigmoid(z)
    return (x * torch.sigmoid(in_opmath(x) * beta)).to(x.dtype), (grad_y * (gate * (1 + z * (1 - gate)))).to(x.dtype)


SLOPES = (0.25, 0.0, -0.5)
PARAMETERS = (*SLOPES, math.inf, math.nan, 1e38)
# Rows with `exact`: torch's exp and sigmoid underflow before the derivative of swish does, and beta x or
# alpha grad_y may overflow.
ROWS = [
    Row("leaky_relu", gk.leaky_relu, F.leaky_relu, PARAMETERS, has_inplace=True),
    # At 0 the slope of torch's jvp of prelu is 1, but that of its gradient is the weight.
    Row(
        *("prelu", lambda x, weight: gk.prelu(x, full(weight, x)), lambda x, weight: F.prelu(x, full(weight, x)), PARAMETERS),
        as_gradient=("jvp",),
    ),
    Row("rrelu", lambda x, slope, *inplace: gk.rrelu(x, slope, slope, False, *inplace), F.leaky_relu, SLOPES, has_inplace=True),
    Row(
        *("rrelu in training", lambda x, slope, *inplace: gk.rrelu(x, slope, slope, True, *inplace)),
        *(lambda x, slope: reference.rrelu(x, slope, slope, True), SLOPES),
        has_inplace=True,
        as_gradient=("jvp", "grad", "vmap(grad)"),
    ),
    Row(
        *("elu", gk.elu, F.elu, (1.0, 1.3, 0.0, -0.75, math.nan)),
        eager=elu_in_place,
        has_inplace=True,
        exact="elu",
        exact_numbers=True,
    ),
    Row("swish", gk.swish, reference.swish, (1.0, 1.7, 0.0, -0.5), eager=silu_of_beta, exact="swish"),
    Row(
        *("swish with a tensor", lambda x, beta: gk.swish(x, full(beta, x)), lambda x, beta: reference.swish(x, full(beta, x))),
        *((1.0, 1.75, 0.0, -0.5), silu_of_beta),
        exact="swish",
    ),
]
each_row = pytest.mark.parametrize("row", ROWS, ids=repr)


def rounded(exact, dtype):
    with np.errstate(over="ignore"):
        return torch.from_numpy(exact.astype(np.float64)).to(dtype)


def assert_row(name, row, param, x, grad_y, actual, torchs):
    """actual and torchs: y and the gradient of x, or y and its tangent."""
    exact = [None, None]
    if row.exact is not None:
        with np.errstate(all="ignore"):
            exact = [rounded(each, x.dtype) for each in exact_activation(x, grad_y, row.exact, param)]
        if row.exact_numbers:
            exact = [torch.where(each.isfinite(), each, their) for each, their in zip(exact, torchs, strict=True)]
    for what, our, their, or_as in zip(("y", "gradient"), actual, torchs, exact, strict=True):
        assert_like_torch(f"{name}: {what} with {param}", our, their, x, grad_y, or_as=or_as)


def expected(row, param, x, grad_y, *, create_graph=False):
    if row.eager is not None:
        return row.eager(x, grad_y, param, create_graph)
    return value_and_grad(lambda x: row.torchs(x, param), x, grad_y, create_graph=create_graph)


# The grid in other shapes and strides. The expected results are rearranged by the same function.
LAYOUTS = {
    "contiguous": lambda grid: grid.clone(),
    "channels_last": lambda grid: grid.view(4, 4, 4, 4).contiguous(memory_format=torch.channels_last),
    "transposed": lambda grid: grid.view(16, 16).t(),
    "every second": lambda grid: torch.stack([grid, grid], 1).view(16, 32)[:, ::2],
    "a tail": lambda grid: grid[3:],
}


@each_dtype
@each_row
def test_gradients(row, dtype):
    x, grad_y = grid(dtype)
    for param in row.params:
        torchs = expected(row, param, x, grad_y)
        for layout, arranged in LAYOUTS.items():
            mine, theirs = [arranged(each) for each in (x, grad_y)], [arranged(each) for each in torchs]
            ours = value_and_grad(lambda x, param=param: row.ours(x, param), *mine)
            assert_row(f"{layout}", row, param, *mine, ours, theirs)
            at_zero = (mine[0] == 0) & ~theirs[0].isnan()
            assert (ours[0].signbit() == theirs[0].signbit())[at_zero].all(), f"{layout}: a 0 of the wrong sign with {param}"
            with torch.no_grad():
                assert_row(f"{layout}, no grad", row, param, *mine, (row.ours(mine[0], param), ours[1]), theirs)
            # torch's elu_ refuses an alpha of nan.
            if row.has_inplace and not math.isnan(param) and not (row.name == "elu" and param < 0):
                written = value_and_grad(lambda x, param=param: row.ours(x * 1, param, True), *mine)
                inplace = expected_in_place(row, param, x, grad_y, torchs)
                assert_row(f"{layout}, in place", row, param, *mine, written, [arranged(each) for each in inplace])


def expected_in_place(row, param, x, grad_y, torchs):
    """In place torch's elu saves its output in 16 bits too."""
    return value_and_grad(lambda x: F.elu(x * 1, param, inplace=True), x, grad_y) if row.name == "elu" else torchs


def tangent_of(function, x, grad_y):
    return torch.func.jvp(function, (x,), (grad_y,))


def functional_grad(function, x, grad_y):
    return function(x), torch.func.grad(lambda x: (function(x) * grad_y).sum())(x)


def batched_grad(function, x, grad_y):
    y, grad_x = torch.func.vmap(lambda x, grad_y: functional_grad(function, x, grad_y), randomness="different")(
        x.view(16, 16), grad_y.view(16, 16)
    )
    return y.flatten(), grad_x.flatten()


TRANSFORMS = {"jvp": tangent_of, "grad": functional_grad, "vmap(grad)": batched_grad}


@each_dtype
@each_row
def test_transforms(row, dtype):
    x, grad_y = grid(dtype)
    for param in row.params:
        mine = value_and_grad(lambda x, param=param: row.ours(x, param), x, grad_y, create_graph=True)
        assert_row("create_graph", row, param, x, grad_y, mine, expected(row, param, x, grad_y, create_graph=True))
        for name, transform in TRANSFORMS.items():
            ours = transform(lambda x, param=param: row.ours(x, param), x, grad_y)
            if name in row.as_gradient:
                theirs = expected(row, param, x, grad_y)
            else:
                theirs = transform(lambda x, param=param: row.torchs(x, param), x, grad_y)
            assert_row(name, row, param, x, grad_y, ours, theirs)


# Functions that learn a parameter -> their rows.
PARAMETRIC = {"prelu": ROWS[1], "swish": ROWS[-1]}
each_parametric = pytest.mark.parametrize("name", PARAMETRIC)


def one_to_a_channel(inner, dtype):
    """x and grad_y of shape (2, 256, inner): each channel has one pair of the grid, and 0.5 elsewhere."""
    result = []
    for special in grid(dtype):
        spread = torch.full((2, len(special), inner), 0.5, dtype=dtype)
        spread[0, :, -1] = special
        result.append(spread)
    return result


def assert_parametric(place, name, x, grad_y, param, grad_x, grad_parameter):
    """Checks the gradients of x and of a parameter that is the same number in all channels."""
    row = PARAMETRIC[name]
    torchs = expected(row, param, x.flatten(), grad_y.flatten())[1].view(x.shape)
    assert_row(f"{name} {place}", row, param, x, grad_y, (x, grad_x), (x, torchs))
    wide, grad = in_opmath(x), in_opmath(grad_y)
    gate = torch.sigmoid(wide * param)
    terms = torch.where(x > 0, 0, wide * grad) if name == "prelu" else grad * (wide * wide) * (gate * (1 - gate))
    with np.errstate(all="ignore"):
        exact = rounded(exact_shares(x, grad_y, param, name)[0].sum((0, 2)), x.dtype)
    assert_like_torch(
        f"{name} {place}: gradient of {param}", grad_parameter, terms.sum((0, 2)).to(x.dtype), x[0, :, -1], grad_y[0, :, -1], or_as=exact
    )


@each_dtype
@each_parametric
def test_gradients_of_learnt_parameters(name, dtype):
    for inner, param in itertools.product((1, 64), PARAMETRIC[name].params):
        x, grad_y = (each.squeeze(-1) if inner == 1 else each for each in one_to_a_channel(inner, dtype))
        parameter = full(param, x).repeat(x.shape[1]).requires_grad_()
        leaf = x.clone().requires_grad_()
        grad_x, grad_parameter = torch.autograd.grad(getattr(gk, name)(leaf, parameter), (leaf, parameter), grad_y)
        shape = (2, -1, inner)
        assert_parametric(f"of runs of {inner}", name, x.view(shape), grad_y.view(shape), param, grad_x.view(shape), grad_parameter)


@pytest.mark.parametrize("name", ["leaky_relu", "prelu", "elu", "swish"])
def test_compiled(name):
    """torch's own function is compiled too, because its decompositions differ from its kernels."""
    row = next(each for each in ROWS if each.name == name)
    x, grad_y = grid(torch.float32)
    torch._dynamo.reset()
    ours, theirs = (
        value_and_grad(
            torch.compile(lambda x, function=function: function(x, 1.3), fullgraph=True, backend="aot_eager_decomp_partition"), x, grad_y
        )
        for function in (row.ours, row.torchs)
    )
    assert_row("compiled", row, 1.3, x, grad_y, ours, theirs)


# ---- batch_norm_act

PER_ELEMENT = ("x", "grad_y", "residual")
PER_CHANNEL = ("running_mean", "running_var", "weight", "bias")
# torch has no operator for another beta: see silu_of_beta.
ACT_PARAMS = ACTS | {"swish": 1.0}


def cells(dtype, names):
    """operand -> value, for each channel: all special values in one operand, all infinities in two operands."""
    info = torch.finfo(dtype)
    alone = [math.nan, math.inf, -math.inf, 0.0, -0.0, info.smallest_normal / 32, info.max, -info.max]
    together = itertools.product(itertools.combinations(names, 2), itertools.product((math.inf, -math.inf), repeat=2))
    return [{name: value} for name in names for value in alone] + [dict(zip(*each, strict=True)) for each in together]


def operands(shape, dtype, parameter_dtype, names):
    """Arguments of a call, and its cells: a cell goes to one element of a channel, or to its parameter.

    shape: without the dimension of the channels.
    """
    of_channels = cells(dtype, names)
    rows, inner = shape[0], shape[1:]
    channels = len(of_channels)
    given = {name: torch.randn(rows, channels, *inner).to(dtype) if name in names else None for name in PER_ELEMENT}
    given |= {"running_mean": torch.randn(channels), "running_var": torch.rand(channels) + 0.5, "bias": torch.randn(channels)}
    given["weight"] = (torch.rand(channels) + 0.5) * torch.randn(channels).sign()
    given |= {name: given[name].to(parameter_dtype) for name in PER_CHANNEL}
    for channel, cell in enumerate(of_channels):
        for name, value in cell.items():
            given[name][channel if name in PER_CHANNEL else (-1, channel, *[-1] * len(inner))] = value
    return given, of_channels


def exact_result(given, training, act):
    """The exact results by name, in the dtypes of the results."""
    if given["x"].dtype == torch.float64:
        named = (given[name] for name in ("x", "running_mean", "running_var", "weight", "bias"))
        param = {"residual": given["residual"], "grad_y": given["grad_y"], "act": act, "act_param": ACT_PARAMS[act]}
        with np.errstate(all="ignore"):
            found = exact_batch_norm_act(*named, training, 0.1, 1e-5, **param)
        return {name: None if each is None else rounded(each, torch.float64) for name, each in found.items()}
    found = call_batch_norm_act(reference.batch_norm_act, cast(given, torch.float64), training, act, act_param=ACT_PARAMS[act])
    return {
        name: None if each is None else each.to((given["x"] if name in ("y", "grad_x", "grad_residual") else given["weight"]).dtype)
        for name, each in found.items()
    }


def per_channel(values, like):
    return values.view(-1) if like.dim() == 1 else values.view(1, -1, *[1] * (like.dim() - 2))


def may_be_lost(name, given, training, opmath):
    """The channels in which a gradient may be nan or inf, whatever torch's and the exact one are.

    grad_x: weight / sqrt(var + eps) is one factor here, which may overflow, and two factors in torch.
    Gradients made of sums: eight terms dz (x - mean) are added in the computing type here, which may overflow
    (csrc/math/batch_norm_act.h); torch adds one. Where weight is inf, x stands for x - mean. The sign of x
    may be another one, which matters if a term or the mean is inf.
    """
    wide = {each: None if tensor is None else tensor.double() for each, tensor in given.items()}
    x, grad_y = (wide[each].transpose(0, 1).flatten(1) for each in ("x", "grad_y"))
    mean, var = (x.mean(1), x.var(1, correction=0)) if training else (wide["running_mean"], wide["running_var"])
    lost = torch.zeros_like(mean, dtype=torch.bool)
    if name == "y":
        # The activation's argument overflows, and those of the family of swish are nan at -inf.
        argument = (x - mean[:, None]) * (wide["weight"] / (var + 1e-5).sqrt())[:, None]
        lost |= wide["weight"].isfinite() & argument.to(opmath).isinf().any(1)
    if name == "grad_x":
        lost |= wide["weight"].isfinite() & (wide["weight"] / (var + 1e-5).sqrt()).to(opmath).isinf()
    if name == "grad_weight" or (name == "grad_x" and training):
        largest_term = (grad_y.abs() * (x - mean[:, None]).abs()).amax(1)
        numbers = x.isfinite().all(1) & grad_y.isfinite().all(1) & mean.isfinite()
        lost |= numbers & (largest_term > torch.finfo(opmath).max / 8)
        lost |= wide["weight"].isinf() & (grad_y.isinf().any(1) | mean.isinf())
    return lost


def assert_channels(name, actual, torchs, exact, of_channels, lost=None):
    """Fails, with the cell of the first wrong channel, unless actual is nan or inf where torchs or exact is."""
    right = (kinds(actual) == kinds(torchs)) | (kinds(actual) == kinds(exact))
    if lost is not None:
        right |= per_channel(lost, actual) & ~actual.isfinite()
    if not right.all():
        first = tuple((~right).nonzero()[0].tolist())
        cell = of_channels[first[0] if actual.dim() == 1 else first[1]]
        raise AssertionError(
            f"{name} at {first}, operands {cell}: {actual[first].item()}, torch has {torchs[first].item()}, exact {exact[first].item()}; "
            f"{int((~right).sum())} are wrong"
        )


def names_of(training, residual):
    return ["x", "grad_y", "weight", "bias", *([] if training else ["running_mean", "running_var"]), *(["residual"] if residual else [])]


# name -> the shape without channels, and channels_last. Each is made of whole vectors of torch's loops.
SHAPES = {"long runs": ((2, 8, 8), False), "short runs": ((8, 4, 4), False), "channels_last": ((8, 4, 4), True)}
each_training = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
each_residual = pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])


@pytest.mark.parametrize("dtype,parameter_dtype", [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32)], ids=str)
@each_training
@each_residual
def test_batch_norm_act(residual, training, dtype, parameter_dtype):
    for (name, (shape, channels_last)), act in itertools.product(SHAPES.items(), ACTS):
        given, of_channels = operands(shape, dtype, parameter_dtype, names_of(training, residual))
        given = without_kinks(given, training, act)
        theirs = call_batch_norm_act(reference.batch_norm_act, given, training, act, act_param=ACT_PARAMS[act])
        exact = exact_result(given, training, act)
        for each in PER_ELEMENT:
            given[each] = None if given[each] is None else laid_out(given[each], channels_last)
        ours = call_batch_norm_act(gk.batch_norm_act, given, training, act, act_param=ACT_PARAMS[act])
        with gk.recompute():
            recomputed = call_batch_norm_act(gk.batch_norm_act, given, training, act, act_param=ACT_PARAMS[act])
        for what, actual in ours.items():
            lost = may_be_lost(what, given, training, opmath_of(dtype))
            assert_channels(f"{act}, {name}: {what}", actual, theirs[what], exact[what], of_channels, lost)
            assert_bitwise_equal(f"{act}, {name}: {what} in recompute", recomputed[what], actual)


def gradients_of_gradients(function, leaves, grad_y):
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, grad_y, create_graph=True)


def functional_gradients(function, leaves, grad_y):
    return function(*leaves), *torch.func.grad(lambda *leaves: (function(*leaves) * grad_y).sum(), argnums=(0, 1, 2, 3))(*leaves)


def tangents(function, leaves, grad_y):
    return torch.func.jvp(function, leaves, (grad_y, *map(torch.ones_like, leaves[1:])))


@each_training
@pytest.mark.parametrize("transform", [gradients_of_gradients, functional_gradients, tangents], ids=["create_graph", "grad", "jvp"])
@pytest.mark.parametrize("act", ACTS)
def test_transforms_of_batch_norm_act(act, transform, training):
    given, of_channels = operands((8, 4, 4), torch.float32, torch.float32, names_of(training, residual=True))
    if transform is gradients_of_gradients and not training:
        # create_graph differentiates (x - mean) / sqrt(var + eps) * weight + bias. An inf weight makes other
        # elements nan there than in torch.
        given["weight"] = torch.where(given["weight"].isinf(), 1.0, given["weight"])
    given = without_kinks(given, training, act)

    def results(function):
        def of_leaves(x, weight, bias, residual):
            running = given["running_mean"].clone(), given["running_var"].clone()
            return function(x, *running, weight, bias, training, act=act, act_param=ACT_PARAMS[act], residual=residual)

        leaves = tuple(given[name].clone().requires_grad_() for name in ("x", "weight", "bias", "residual"))
        return [each.detach() for each in transform(of_leaves, leaves, given["grad_y"])]

    ours, theirs = results(gk.batch_norm_act), results(reference.batch_norm_act)
    found = exact_result(given, training, act)
    exact = [found["y"], *theirs[1:]]
    if transform is gradients_of_gradients:
        exact = [found[name] for name in ("y", "grad_x", "grad_weight", "grad_bias", "grad_residual")]
    of_y = may_be_lost("y", given, training, torch.float32)
    lost = may_be_lost("grad_weight", given, training, torch.float32) if transform is gradients_of_gradients else None
    for i, (our, their, right) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_channels(f"result {i}", our, their, right, of_channels, lost if i else of_y)


# ---- The CUDA kernels on the host


@pytest.fixture
def guarded():
    memory = Guarded()
    yield memory
    memory.check()


@pytest.mark.slow
@each_dtype
def test_cuda_kernels_of_activations(guarded, dtype):
    call = load("activation")
    x, grad_y = (guarded.copy(each) for each in grid(dtype))
    size = x.numel()
    y, grad_x = (guarded.empty(size, dtype) for _ in range(2))
    mask = guarded.empty(size // 8, torch.uint8)
    rows = {row.name: row for row in ROWS}
    with_mask = {"relu": Row("relu", None, lambda x, _: F.relu(x), (0.0,)), "relu6": Row("relu6", None, lambda x, _: F.relu6(x), (0.0,))}
    for act, row in (with_mask | {act: rows[act] for act in WITH_PARAMETER}).items():
        number = KINDS[act]
        for param in row.params[:3]:
            torchs = expected(row, param, x, grad_y)
            if act in TWO_SLOPES:
                call("activation_forward", dtype, number, float(param), size, x, y, mask)
                call("activation_backward", dtype, number, float(param), MASK, size, grad_y, mask, grad_x)
                assert_row(f"{act} on CUDA, from the mask", row, param, x, grad_y, (y, grad_x), torchs)
            if act in with_mask:
                continue
            call("activation_forward", dtype, number, float(param), size, x, y, None)
            call("activation_backward", dtype, number, float(param), INPUT, size, grad_y, x, grad_x)
            # The kernel reads x here, as torch's elu does out of place.
            from_input = expected(dataclasses.replace(row, eager=None), param, x, grad_y) if act == "elu" else torchs
            assert_row(f"{act} on CUDA", row, param, x, grad_y, (y, grad_x), from_input)
            if act == "elu" and param >= 0:
                call("activation_backward", dtype, number, float(param), OUTPUT, size, grad_y, y, grad_x)
                assert_row(f"{act} on CUDA, from y", row, param, x, grad_y, (y, grad_x), expected_in_place(row, param, x, grad_y, torchs))
    row, seed = rows["rrelu in training"], torch.tensor(1)
    for slope in row.params:
        call("rrelu_forward", dtype, seed, slope, slope, size, x, y, mask)
        call("rrelu_backward", dtype, seed, slope, slope, size, grad_y, mask, grad_x)
        assert_row("rrelu on CUDA", row, slope, x, grad_y, (y, grad_x), expected(row, slope, x, grad_y))


@pytest.mark.slow
@each_dtype
@each_parametric
def test_cuda_kernels_of_learnt_parameters(guarded, name, dtype):
    call = load("activation")
    for inner, param in ((1, PARAMETRIC[name].params[0]), (1, 0.0), (64, PARAMETRIC[name].params[0])):
        x, grad_y = (guarded.copy(each).view(each.shape) for each in one_to_a_channel(inner, dtype))
        rows, channels = x.shape[:2]
        parameter, grad_parameter = guarded.copy(full(param, x).expand(channels)), guarded.empty(channels, dtype)
        y, grad_x = (guarded.empty(x.numel(), dtype).view(x.shape) for _ in range(2))
        number = {"prelu": PRELU, "swish": SWISH}[name]
        call("parametric_forward", dtype, rows, channels, inner, number, x, parameter, y)
        call("parametric_backward", dtype, rows, channels, inner, number, grad_y, x, parameter, grad_x, grad_parameter)
        assert_parametric("on CUDA", name, x, grad_y, param, grad_x, grad_parameter)


@pytest.mark.slow
@each_training
@each_residual
def test_cuda_kernels_of_batch_norm_act(guarded, residual, training):
    """float32 and float64 only, because 16 bits are computed in float32.

    These kernels square float32 in float32, so the variance of the largest x overflows.
    """
    call = load("batch_norm_act")
    for dtype, shape, act in itertools.product((torch.float32, torch.float64), ((2, 64), (128, 1)), ACTS):
        given, of_channels = operands(shape, dtype, dtype, names_of(training, residual))
        given = without_kinks(given, training, act)
        theirs = call_batch_norm_act(reference.batch_norm_act, given, training, act, act_param=ACT_PARAMS[act])
        exact = exact_result(given, training, act)
        kernels = Kernels(call, guarded, given, act)
        kernels.act = (KINDS[act], float(ACT_PARAMS[act] or 0.0))
        kernels.forward(training)
        kernels.backward(training)
        for what, actual in kernels.result().items():
            if actual is None:
                continue
            lost = may_be_lost(what, given, training, dtype)
            if training:
                largest = given["x"].transpose(0, 1).flatten(1).abs().amax(1)
                lost |= largest.isfinite() & (largest > torch.finfo(dtype).max / 2)
            assert_channels(f"{act}, {shape}: {what}", actual, theirs[what], exact[what], of_channels, lost)


# ---- RMSprop (clipping: test_clip_grad.py)


@each_dtype
@pytest.mark.parametrize("options", [{}, {"centered": True}, {"momentum": 0.9, "weight_decay": 0.1, "centered": True}], ids=str)
def test_rmsprop(options, dtype):
    """Two steps with each special gradient and each special parameter.

    torch computes 16 bits in 16 bits, so our results may be those of float64 instead.
    """
    param, grad = grid(dtype)
    found = []
    for kind, wide in ((gk.optim.RMSprop, dtype), (torch.optim.RMSprop, dtype), (torch.optim.RMSprop, torch.float64)):
        leaf = param.to(wide, copy=True).requires_grad_()
        optimizer = kind([leaf], lr=0.5, **options)
        for _ in range(2):
            leaf.grad = grad.to(wide)
            optimizer.step()
        found.append(
            {"param": leaf.detach().to(dtype), **{name: each.to(dtype) for name, each in optimizer.state[leaf].items() if name != "step"}}
        )
    ours, torchs, exact = found
    assert ours.keys() == torchs.keys()
    for name in ours:
        right = (kinds(ours[name]) == kinds(torchs[name])) | (kinds(ours[name]) == kinds(exact[name]))
        assert right.all(), f"{name} of {[(param[i].item(), grad[i].item()) for i in (~right).nonzero()[:3, 0]]}"


# ---- Instruction sets


@pytest.mark.slow
def test_other_instruction_sets():
    """Repeats the tests of the kernels with each smaller instruction set, which torch's kernels use then too."""
    capabilities = ["default", "avx2", torch.backends.cpu.get_cpu_capability().lower()]
    others = capabilities[: capabilities.index(capabilities[-1])]
    tests = [
        f"{__file__}::{each.__name__}" for each in (test_gradients, test_gradients_of_learnt_parameters, test_batch_norm_act, test_rmsprop)
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    runs = [subprocess.Popen(command, env={**os.environ, "ATEN_CPU_CAPABILITY": each}, cwd=ROOT, **pipes) for each in others]
    for run in runs:
        output, _ = run.communicate()
        assert run.returncode == 0, output
