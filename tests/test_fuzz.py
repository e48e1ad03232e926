"""Every function on operands that hypothesis lays out in memory: torch's result or a clean exception.

An operand is a view into a larger buffer, with any order of dimensions, gaps, an offset, expanded dimensions,
or elements that share memory. A function that writes in place may change the elements of the view and nothing
else in the buffer. Raw calls of the schemas, and reads at the edge of a page that must not be read, run in
processes of their own. `make fuzz` tries 10,000 examples of each test, `make test` 200.
"""

import copy
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import gradkernels as gk
from accuracy import DTYPES, ROUTED_DTYPES, SIXTEEN_BITS, assert_bitwise_equal, exact_batch_norm_act
from activation_calls import BY_NAME
from gradkernels import acts, reference

pytestmark = pytest.mark.slow

OPS = torch.ops.gradkernels
FOLDER = Path(__file__).parent
# The path of other processes: this package, and the files in this folder.
PATH = os.pathsep.join([str(Path(gk.__file__).parents[1]), str(FOLDER)])
# Sizes around packets, chunks of short runs and lines. Most are small: five large ones exceed LARGEST.
EXTENTS = st.one_of(st.integers(1, 5), st.sampled_from([0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129]))
NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.25, -0.5, 3.0]), st.floats(-4, 4, width=32))
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 100.0, -100.0]
LARGEST = 20_000
KINDS = ("plain", "plain", "format", "strided", "strided", "expanded", "sharing")
# Operands that a function may write. In place torch refuses expanded dimensions, and its result for other
# elements that share memory depends on the order of the writes.
WRITABLE = ("plain", "format", "strided", "strided")
IN_PLACE = (*WRITABLE, "expanded")


@dataclass
class Operand:
    """A tensor and the buffer it is a view of."""

    buffer: torch.Tensor
    view: torch.Tensor

    def copy(self):
        buffer = self.buffer.clone()
        return Operand(buffer, buffer.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()))

    def outside(self):
        """The buffer with the elements of the view set to 0."""
        copy = self.copy()
        copy.view.zero_()
        return copy.buffer


@st.composite
def shapes(draw, dims=(0, 5)):
    shape = draw(st.lists(EXTENTS, min_size=dims[0], max_size=dims[1]))
    assume(math.prod(shape) <= LARGEST)
    return tuple(shape)


@st.composite
def operands(draw, shape, dtype, *, kinds=KINDS, special=False):
    """An operand of this shape, in one of torch's memory formats or with any strides."""
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=len(shape), max_size=len(shape)))
    kind = draw(st.sampled_from(kinds))
    expanded = draw(st.sets(st.sampled_from(range(len(shape))))) if kind == "expanded" and shape else set()
    strides, extent = [1] * len(shape), 1
    if kind == "format" and len(shape) > 2:
        order, kind = (1, *range(len(shape) - 1, 1, -1), 0), "ordered"
    elif kind in ("plain", "format"):
        order = range(len(shape) - 1, -1, -1)
    for d in order:
        if kind == "sharing":
            continue
        if d in expanded:
            strides[d] = 0
            continue
        strides[d] = extent
        extent *= max(shape[d], 1) * (steps[d] if kind in ("strided", "expanded") else 1)
    offset = draw(st.integers(0, 9))
    needed = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size > 1) + 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    buffer = (torch.randn(needed + 9, generator=generator) * 3).to(dtype)
    if special and dtype.is_floating_point and draw(st.booleans()):
        value = draw(st.sampled_from(SPECIAL))
        buffer[draw(st.integers(0, needed - 1))] = value
    return Operand(buffer, buffer.as_strided(shape, strides, offset))


def outcome_of(function):
    try:
        return function(), None
    except Exception as error:
        return None, error


def assert_like_torch(ours, theirs, wide=None, terms=1.0):
    """Fails unless our results equal torch's or `wide`, torch's in a wider dtype.

    We may accept a call that torch refuses, but not the other way round.
    """
    (our, our_error), (their, their_error) = ours, theirs
    if our_error is not None:
        assert their_error is not None, f"torch accepts a call that gradkernels refuses: {our_error!r}"
        # If a call has two errors, either may be reported.
        kind = RuntimeError if isinstance(their_error, RuntimeError) else type(their_error)
        assert isinstance(our_error, kind), f"{our_error!r}, where torch raises {their_error!r}"
    elif their_error is None:
        of_results = terms if isinstance(terms, list) else [terms] * len(our)
        for i, (actual, expected, of_result) in enumerate(zip(our, their, of_results, strict=True)):
            assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"result {i}: {actual.dtype} {actual.shape}"
            assert_near(f"result {i}", actual, expected, expected if wide is None else wide[i], of_result)


def assert_near(name, actual, torchs, exact, terms):
    """Fails unless each element is `exact` within a few roundings, or equals torch's.

    terms: the size of the largest terms of the result, which are rounded more often (for 16 bits in float32).
    """
    if not actual.dtype.is_floating_point:
        return assert_close(actual, torchs, equal_nan=True)
    exact = exact.to(actual.dtype).double()
    eps = torch.finfo(actual.dtype).eps
    largest = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    slack = 64 * min(eps, torch.finfo(torch.float32).eps) * max(terms, largest)
    right = torch.isclose(actual.double(), exact, rtol=4 * eps, atol=slack, equal_nan=True)
    right |= (actual == torchs) | (actual.isnan() & torchs.isnan())
    assert right.all(), f"{name}: {actual[~right][:5]} is not {exact[~right][:5]}, torch has {torchs[~right][:5]}"


def product_of(x, grad_y):
    """The size of grad_y x^2, the largest term in the gradient of swish's beta."""
    return (1.0 + largest_of(x)) ** 2 * (1.0 + largest_of(grad_y))


def largest_of(x):
    return x[x.isfinite()].double().abs().max().item() if x.isfinite().any() else 0.0


def value_and_grads(function, leaves, grad_y):
    """The result, and the gradients of `leaves`, which keep the strides that were drawn."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))]


def in_float64(tensors):
    return [tensor.double() for tensor in tensors]


ELEMENTWISE = {name: (BY_NAME[name].function, BY_NAME[name].reference) for name in ("leaky_relu", "elu", "swish", "rrelu in training")}


@given(data=st.data())
def test_activation(data):
    ours, theirs = ELEMENTWISE[data.draw(st.sampled_from(sorted(ELEMENTWISE)))]
    shape, param = data.draw(shapes()), data.draw(NUMBERS)
    dtype = data.draw(st.sampled_from(DTYPES))
    x = data.draw(operands(shape, dtype, special=True)).view
    grad_y = x if data.draw(st.booleans()) else data.draw(operands(shape, dtype)).view
    mine = outcome_of(lambda: value_and_grads(lambda x: ours(x, param), [x], grad_y))
    torchs = outcome_of(lambda: value_and_grads(lambda x: theirs(x, param), [x], grad_y))
    wide = value_and_grads(lambda x: theirs(x, param), in_float64([x]), grad_y)
    if ours is gk.elu:
        # Where x is nan, torch's gradient is grad_y in the elements left over from whole vectors.
        for results in (torchs[0], wide):
            results[1] = torch.where(x.isnan(), math.nan, results[1])
    assert_like_torch(mine, torchs, wide, product_of(x, grad_y))


@given(data=st.data())
def test_activation_in_place(data):
    ours, theirs = ELEMENTWISE[data.draw(st.sampled_from(["leaky_relu", "elu", "rrelu in training"]))]
    dtype = data.draw(st.sampled_from(DTYPES + ROUTED_DTYPES))
    param = data.draw(NUMBERS)
    x = data.draw(operands(data.draw(shapes()), dtype, kinds=IN_PLACE, special=True))
    mine, torchs = x.copy(), x.copy()
    result = outcome_of(lambda: [ours(mine.view, param, inplace=True)])
    assert_like_torch(result, outcome_of(lambda: [theirs(torchs.view, param, inplace=True)]))
    if result[1] is None:
        assert result[0][0] is mine.view
        assert_bitwise_equal("memory outside x", mine.outside(), x.outside())
    else:
        assert_bitwise_equal("x after an error", mine.buffer, x.buffer)


@given(data=st.data())
def test_activation_with_a_tensor(data):
    ours, theirs = data.draw(st.sampled_from([(gk.prelu, reference.prelu), (gk.swish, reference.swish)]))
    shape = data.draw(shapes())
    dtype = data.draw(st.sampled_from(DTYPES))
    channels = shape[1] if len(shape) > 1 else 1
    parameter_shape = data.draw(st.sampled_from([(channels,), (channels,), (1,), (), (channels + 1,), (1, channels)]))
    x = data.draw(operands(shape, dtype)).view
    parameter = data.draw(operands(parameter_shape, dtype)).view
    grad_y = x if data.draw(st.booleans()) else data.draw(operands(shape, dtype)).view
    wide = outcome_of(lambda: value_and_grads(theirs, in_float64([x, parameter]), grad_y))
    # There is no wider dtype than float64. torch's roundings of the terms, mostly of 1 - sigmoid, add up in
    # the gradient of the parameter to 4 eps for each term, while assert_near allows 64 eps for the sum.
    size = product_of(x, grad_y)
    added = max(x.numel() / 16, 1.0) if dtype == torch.float64 else 1.0
    assert_like_torch(
        outcome_of(lambda: value_and_grads(ours, [x, parameter], grad_y)),
        outcome_of(lambda: value_and_grads(theirs, [x, parameter], grad_y)),
        wide[0],
        [size, size, size * added],
    )


@given(data=st.data())
def test_other_dtypes(data):
    ours, theirs = ELEMENTWISE[data.draw(st.sampled_from(["leaky_relu", "elu", "swish"]))]
    x = data.draw(operands(data.draw(shapes()), data.draw(st.sampled_from(ROUTED_DTYPES)))).view
    param = data.draw(NUMBERS)
    assert_like_torch(outcome_of(lambda: [ours(x, param)]), outcome_of(lambda: [theirs(x, param)]))


def per_channel(data, shape, dtype, **options):
    """Usually a vector with one element for each channel; sometimes None or a vector of another length."""
    channels = shape[1] if len(shape) > 1 else 1
    length = data.draw(st.sampled_from([channels] * 8 + [channels + 1, None]))
    return None if length is None else data.draw(operands((length,), dtype, **options))


def view_of(operand):
    return None if operand is None else operand.view


def copy_of(operand):
    return None if operand is None else operand.copy()


def without_kinks(grad_y, wide_z):
    """grad_y set to 0 near a kink, where rounding decides about the slope of the activation."""
    slack = 64 * torch.finfo(grad_y.dtype).eps * max(largest_of(wide_z), 1.0)
    return torch.where((wide_z.abs() < slack) | ((wide_z - 6).abs() < slack), 0, grad_y)


def terms_of(x, mean, var, weight, bias, residual, act, param, grad_y, groups=None):
    """The size of the terms of y and of the gradients: for sums over a channel their norm, else the largest.

    x - mean keeps few digits of values that are far from zero, close to each other or scaled by a large
    weight. The curvature of swish and elu carries this error into every gradient; no library has these
    digits. If mean and var are None, they are those of the batch or, with `groups`, of the groups of each sample.
    """
    x, grad_y = x.double(), grad_y.double().abs()
    dims, per_channel = [0, *range(2, x.dim())], (-1, *[1] * (x.dim() - 2))

    def mean_of(values):
        if groups is None:
            return values.mean(dims, True)
        of_channels = values.reshape(len(x), groups, -1).mean(2).repeat_interleave(x.shape[1] // groups, 1)
        return of_channels.view(*x.shape[:2], *[1] * (x.dim() - 2))

    if mean is None:
        mean = mean_of(x)
        var = mean_of((x - mean).square())
    else:
        mean, var = mean.double().view(per_channel), var.double().view(per_channel)
    invstd = (var + 1e-5).rsqrt()
    size = torch.ones(()) if weight is None else weight.double().abs().view(per_channel)
    gain = invstd * size
    normalised = (x.abs() + mean.abs()) * invstd
    z = (x.abs() + mean.abs()) * gain
    z = z if bias is None else z + bias.double().abs().view(per_channel)
    z = z if residual is None else z + residual.double().abs()
    dz = grad_y * (1 + param + (param * z if acts.ACTS[act].saves == "value" else 0))
    weighted = dz * size
    grad_x = invstd * (weighted + mean_of(weighted) + normalised * mean_of(weighted * normalised))
    sizes = [(1 + param) * z, grad_x]
    sizes += [] if weight is None else [(dz * normalised).square().sum(dims).sqrt()]
    sizes += [] if bias is None else [dz.square().sum(dims).sqrt()]
    sizes += [] if residual is None else [dz]
    return [each.max().item() for each in sizes]


@given(data=st.data())
def test_batch_norm_act(data):
    shape = data.draw(shapes(dims=(2, 5)))
    dtype = data.draw(st.sampled_from(DTYPES))
    of_parameters = data.draw(st.sampled_from([dtype, torch.float32]))
    act = data.draw(st.sampled_from(sorted(acts.ACTS)))
    training = data.draw(st.booleans())
    x = data.draw(operands(shape, dtype)).view
    residual = data.draw(st.sampled_from([None, "x", "another"]))
    if residual is not None:
        residual = x if residual == "x" else data.draw(operands(shape, dtype)).view
    weight = view_of(per_channel(data, shape, of_parameters))
    bias = weight if data.draw(st.booleans()) else view_of(per_channel(data, shape, of_parameters))
    mean, var = per_channel(data, shape, of_parameters, kinds=WRITABLE), per_channel(data, shape, of_parameters, kinds=WRITABLE)
    if var is not None:
        var.buffer.abs_().add_(0.5)
    grad_y = data.draw(operands(shape, dtype)).view
    param = data.draw(st.floats(0, 2, width=32))

    def call(function, convert):
        running = [copy_of(mean), copy_of(var)]
        given = [None if each is None else convert(each).detach() for each in (x, weight, bias, residual)]
        for each in given:
            if each is not None:
                each.requires_grad_()
        stats = [None if each is None else convert(each.view) for each in running]

        def run():
            y = function(given[0], *stats, given[1], given[2], training, act=act, act_param=param, residual=given[3])
            leaves = [each for each in given if each is not None]
            grads = torch.autograd.grad(y, leaves, grad_y.to(y.dtype))
            return [y.detach(), *grads, *[each for each in stats if each is not None]]

        return outcome_of(run), running

    wide_z = outcome_of(
        lambda: reference.batch_norm_act(
            x.double(),
            *[None if each is None else each.view.double() for each in (copy_of(mean), copy_of(var))],
            *[None if each is None else each.double() for each in (weight, bias)],
            training,
            act="identity",
            residual=None if residual is None else residual.double(),
        )
    )[0]
    if wide_z is not None:
        grad_y = without_kinks(grad_y, wide_z)
    ours, running = call(gk.batch_norm_act, lambda tensor: tensor)
    theirs, _ = call(reference.batch_norm_act, lambda tensor: tensor)
    wide, _ = call(reference.batch_norm_act, lambda tensor: tensor.double())
    if dtype in SIXTEEN_BITS and ours[1] is None and theirs[1] is not None:
        theirs = None if wide[0] is None else [exact.to(mine.dtype) for exact, mine in zip(wide[0], ours[0], strict=True)], wide[1]
    terms = [1.0] * len(ours[0] or ())
    if ours[1] is None and x.numel():
        stats = (None, None) if training else (mean.view, var.view)
        sizes = terms_of(x, *stats, weight, bias, residual, act, param, grad_y)
        terms[: len(sizes)] = sizes
        if dtype == torch.float64 and theirs[1] is None:
            # torch's own statistics of thousands of values have thousands of rounding errors.
            given = (x, view_of(mean), view_of(var), weight, bias, training, 0.1, 1e-5)
            exact = exact_batch_norm_act(*given, act=act, act_param=param, residual=residual, grad_y=grad_y)
            wide = [torch.from_numpy(each.astype(np.float64)) for each in exact.values() if each is not None], None
    assert_like_torch(ours, theirs, wide[0], terms)
    for before, after in zip((mean, var), running, strict=True):
        if before is not None:
            assert_bitwise_equal("memory outside a running statistic", after.outside(), before.outside())
            if ours[1] is not None or not training:
                assert_bitwise_equal("a running statistic", after.buffer, before.buffer)


@given(data=st.data())
def test_group_norm_act(data):
    # Enough pixels for a kernel, or fewer, which go to torch.
    shape = data.draw(shapes(dims=(2, 4)))
    shape = (*shape, data.draw(st.sampled_from([1, 48, 50, 67]))) if math.prod(shape) <= LARGEST // 67 else shape
    channels = shape[1]
    groups = data.draw(st.sampled_from([each for each in range(1, channels + 1) if channels % each == 0] or [1]))
    groups = data.draw(st.sampled_from([groups] * 8 + [channels + 1]))
    dtype = data.draw(st.sampled_from(DTYPES))
    of_parameters = data.draw(st.sampled_from([dtype, torch.float32]))
    act = data.draw(st.sampled_from(sorted(acts.ACTS)))
    x = data.draw(operands(shape, dtype)).view
    residual = data.draw(st.sampled_from([None, "x", "another"]))
    if residual is not None:
        residual = x if residual == "x" else data.draw(operands(shape, dtype)).view
    weight, bias = view_of(per_channel(data, shape, of_parameters)), view_of(per_channel(data, shape, of_parameters))
    grad_y = data.draw(operands(shape, dtype)).view
    param = data.draw(st.floats(0, 2, width=32))

    def call(function, convert):
        given = [None if each is None else convert(each).detach().requires_grad_() for each in (x, weight, bias, residual)]

        def run():
            y = function(given[0], groups, given[1], given[2], act=act, act_param=param, residual=given[3])
            return [y.detach(), *torch.autograd.grad(y, [each for each in given if each is not None], grad_y.to(y.dtype))]

        return outcome_of(run)

    wide_z = outcome_of(
        lambda: reference.group_norm_act(
            x.double(),
            groups,
            *[None if each is None else each.double() for each in (weight, bias)],
            act="identity",
            residual=None if residual is None else residual.double(),
        )
    )[0]
    if wide_z is not None:
        grad_y = without_kinks(grad_y, wide_z)
    ours, theirs = call(gk.group_norm_act, lambda tensor: tensor), call(reference.group_norm_act, lambda tensor: tensor)
    wide = call(reference.group_norm_act, lambda tensor: tensor.double())
    if dtype in SIXTEEN_BITS and ours[1] is None and theirs[1] is not None:
        theirs = None if wide[0] is None else [exact.to(mine.dtype) for exact, mine in zip(wide[0], ours[0], strict=True)], wide[1]
    terms = [1.0] * len(ours[0] or ())
    if ours[1] is None and x.numel():
        terms = terms_of(x, None, None, weight, bias, residual, act, param, grad_y, groups)
    assert_like_torch(ours, theirs, wide[0], terms)


@given(data=st.data())
def test_batch_norm_act_of_many_processes(data):
    """The operators on parts of a batch, some of them empty, compared with the whole batch in float64."""
    shape = data.draw(shapes(dims=(2, 5)))
    assume(shape[1] > 0)
    dtype = data.draw(st.sampled_from(DTYPES))
    of_parameters = data.draw(st.sampled_from([dtype, torch.float32]))
    act, param = data.draw(st.sampled_from(sorted(acts.ACTS))), data.draw(st.floats(0, 2, width=32))
    ends = sorted(data.draw(st.lists(st.integers(0, shape[0]), max_size=5)))
    shares = [slice(begin, end) for begin, end in zip([0, *ends], [*ends, shape[0]], strict=True)]

    def operand_or_none(*given, **options):
        return data.draw(st.none() | operands(*given, **options))

    x, grad_y = (data.draw(operands(shape, dtype)).view for _ in range(2))
    residual, weight, bias = map(view_of, (operand_or_none(shape, dtype), *(operand_or_none(shape[1:2], of_parameters) for _ in range(2))))
    running = [operand_or_none(shape[1:2], of_parameters, kinds=WRITABLE) for _ in range(2)]
    momentum = data.draw(st.sampled_from([None, 0.0, 0.1, 1.0]))
    batches = torch.tensor(3) if momentum is None or data.draw(st.booleans()) else None

    def share_of(tensor, share):
        return None if tensor is None else tensor[share]

    def whole(x, weight, bias, residual, stats, act):
        options = {"act": act, "act_param": param, "residual": residual, "all_gather": lambda moments: moments[None]}
        batch = copy.deepcopy(batches)
        y = reference.sync_batch_norm_act(x, *stats, weight, bias, momentum, 1e-5, num_batches_tracked=batch, **options)
        return y, [each for each in (*stats, batch) if each is not None]

    def merged(stats):
        batch = copy.deepcopy(batches)
        moments = torch.stack([OPS.batch_norm_act_stats(x[share]) for share in shares])
        mean, invstd, count = OPS.batch_norm_act_gather_stats(moments, *stats, batch, momentum, 1e-5)
        y, grad_residual, sums, operands_of = [], [], 0, []
        for share in shares:
            forward = (x[share], mean, invstd, weight, bias, share_of(residual, share))
            y_share, mask = OPS.batch_norm_act_elemt(*forward, act, param)
            operands_of.append((grad_y[share], *forward, mask if mask.numel() else None, act, param))
            sums_share, grad_share = OPS.batch_norm_act_backward_reduce(*operands_of[-1], residual is not None)
            sums = sums + sums_share
            y.append(y_share)
            grad_residual.append(grad_share)
        grad_x = [OPS.batch_norm_act_backward_elemt(*each, sums, count) for each in operands_of]
        grads = [
            torch.cat(grad_x),
            None if weight is None else (sums[shape[1] :] * invstd).to(weight.dtype),
            None if bias is None else sums[: shape[1]].to(bias.dtype),
            None if residual is None else torch.cat(grad_residual),
        ]
        return [torch.cat(y), *[each for each in grads if each is not None], *[each for each in (*stats, batch) if each is not None]]

    def reference_of(convert, stats):
        leaves = [None if each is None else convert(each).detach().requires_grad_() for each in (x, weight, bias, residual)]
        y, stats = whole(*leaves, stats, act)
        return [y.detach(), *torch.autograd.grad(y, [each for each in leaves if each is not None], grad_y.to(y.dtype)), *stats]

    def widened(tensor):
        return None if tensor is None else tensor.double()

    wide_z = outcome_of(lambda: whole(*map(widened, (x, weight, bias, residual)), (None, None), "identity")[0])[0]
    if wide_z is not None:
        grad_y = without_kinks(grad_y, wide_z)
    written = [copy_of(each) for each in running]
    ours = outcome_of(lambda: merged([view_of(each) for each in written]))
    theirs = outcome_of(lambda: reference_of(lambda tensor: tensor, [view_of(copy_of(each)) for each in running]))
    wide = outcome_of(lambda: reference_of(widened, [widened(view_of(each)) for each in running]))
    terms = [1.0] * len(ours[0] or ())
    if ours[1] is None and x.numel():
        sizes = terms_of(x, None, None, weight, bias, residual, act, param, grad_y)
        terms[: len(sizes)] = sizes
    assert_like_torch(ours, theirs, wide[0], terms)
    for before, after in zip(running, written, strict=True):
        if before is not None:
            assert_bitwise_equal("memory outside a running statistic", after.outside(), before.outside())
            if ours[1] is not None:
                assert_bitwise_equal("a running statistic after an error", after.buffer, before.buffer)


@st.composite
def gradients(draw):
    """A list of gradients. Some may be the same tensor or have elements that share memory."""
    dtype = draw(st.sampled_from([*DTYPES, None]))
    made = []
    for _ in range(draw(st.integers(1, 5))):
        own = dtype or draw(st.sampled_from(DTYPES))
        made.append(draw(operands(draw(shapes(dims=(0, 4))), own, kinds=IN_PLACE)))
    if draw(st.sampled_from([False, False, True])):
        made.append(made[0])
    return made


def parameters_with(grads):
    made = []
    for grad in grads:
        parameter = nn.Parameter(torch.empty_like(grad.view))
        parameter.grad = grad.view
        made.append(parameter)
    return made


def copies_of(grads):
    """Copies, with one copy for a gradient that is in the list twice."""
    copies = {id(grad): grad.copy() for grad in grads}
    return [copies[id(grad)] for grad in grads]


CLIPPINGS = {
    "clip_grad_norm_": lambda library, p, bound, norm_type: library.clip_grad_norm_(p, bound, norm_type),
    "clip_grad_norm_ that refuses": lambda library, p, bound, norm_type: library.clip_grad_norm_(p, bound, norm_type, True),
    "clip_grad_value_": lambda library, p, bound, _: library.clip_grad_value_(p, bound),
    "clip_grads_with_norm_": lambda library, p, bound, _: library.clip_grads_with_norm_(p, bound, torch.tensor(7.0, dtype=torch.float64)),
    "get_total_norm": lambda library, p, _, norm_type: library.get_total_norm([each.grad for each in p], norm_type),
}


@given(data=st.data())
def test_clipping(data):
    function = CLIPPINGS[data.draw(st.sampled_from(sorted(CLIPPINGS)))]
    grads = data.draw(gradients())
    bound = data.draw(st.sampled_from([1.0, 0.1, 1e6, 0.0, -1.0, math.inf]))
    norm_type = data.draw(st.sampled_from([2.0, 1.0, math.inf, 3.0]))
    if norm_type == math.inf:
        # torch refuses to take the largest element of an empty gradient.
        grads = [grad for grad in grads if grad.view.numel()] or [Operand(torch.ones(1), torch.ones(1))]
    mine, torchs = copies_of(grads), copies_of(grads)

    def run(library, given):
        total = function(library, parameters_with(given), bound, norm_type)
        return [each.view for each in given] + ([] if total is None else [total])

    ours, theirs = outcome_of(lambda: run(gk, mine)), outcome_of(lambda: run(nn.utils, torchs))
    # torch rounds the norms and the coefficient to the precision of the gradients. Its sums are float32,
    # eight at a time, with an error of half an eps for each term.
    least_precise = max((each.view.dtype for each in grads), key=lambda dtype: torch.finfo(dtype).eps)
    if ours[1] is None and theirs[1] is None and least_precise != torch.float64:
        terms = max(each.view.numel() for each in grads) / 8
        tolerance = 32 * torch.finfo(least_precise).eps + terms / 2 * torch.finfo(torch.float32).eps
        for actual, expected in zip(ours[0], theirs[0], strict=True):
            assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    else:
        assert_like_torch(ours, theirs)
    for before, after in zip(grads, mine, strict=True):
        assert_bitwise_equal("memory outside a gradient", after.outside(), before.outside())
        # For other norms torch scales one gradient after the other, until it refuses one.
        if ours[1] is not None and norm_type != 3.0:
            assert_bitwise_equal("a gradient after an error", after.buffer, before.buffer)


@given(data=st.data())
def test_grad_report(data):
    grads = data.draw(gradients())
    report = gk.grad_report(parameters_with(grads))
    for grad, norm, largest, nonfinite in zip(grads, report.norms, report.max_abs, report.nonfinite, strict=True):
        magnitude = grad.view.double().abs()
        assert_close(norm, magnitude.norm())
        assert_close(largest, magnitude.max() if magnitude.numel() else norm.new_zeros(()))
        assert nonfinite == (~magnitude.isfinite()).sum()


@given(data=st.data())
def test_rmsprop(data):
    shape = data.draw(shapes(dims=(0, 4)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    param, grad = data.draw(operands(shape, dtype, kinds=WRITABLE)), data.draw(operands(shape, dtype))
    options = {
        "momentum": data.draw(st.sampled_from([0.0, 0.9])),
        "centered": data.draw(st.booleans()),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1])),
    }

    def steps(optimizer):
        mine = param.copy()
        parameter = nn.Parameter(mine.view)
        # backward makes gradients with the strides of their parameter; an assigned gradient may have others.
        parameter.grad = grad.view
        made = optimizer([parameter], lr=0.1, **options)
        for _ in range(2):
            made.step()
        return [parameter.detach(), mine.outside()]

    ours = outcome_of(lambda: steps(gk.optim.RMSprop))
    assert_like_torch(ours, outcome_of(lambda: steps(torch.optim.RMSprop)))
    if ours[1] is None:
        assert_bitwise_equal("memory outside a parameter", ours[0][1], param.outside())


def run_alone(file, *arguments):
    environment = {**os.environ, "PYTHONPATH": PATH}
    command = [sys.executable, str(FOLDER / file), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")


def test_schema_calls():
    """Wrong arguments cause an exception before anything is written, or a result, but never a crash."""
    calls = settings().max_examples
    result = run_alone("schema_calls.py", 0 if calls <= 200 else torch.seed() % 2**32, calls // 4)
    last = result.stdout.splitlines()[-1:]
    assert result.returncode == 0, f"exit {result.returncode} after {last}\n{result.stderr[-3000:]}"


def test_nothing_is_touched_beyond_an_operand():
    result = run_alone("guard_pages.py")
    assert result.returncode == 0, f"exit {result.returncode} after {result.stdout.splitlines()[-1:]}\n{result.stderr[-3000:]}"


def test_guard_pages_end_the_process():
    """The process that reads one byte beyond an operand ends."""
    code = "import ctypes, torch, guard_pages; ctypes.string_at(guard_pages.guarded(torch.ones(3), True).data_ptr(), 13)"
    environment = {**os.environ, "PYTHONPATH": PATH}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGSEGV
