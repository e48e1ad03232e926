"""The CUDA kernels of clipping and RMSprop, run on the host (tests/simt): pieces of a list, norms, results.

The code between a launcher and a user (operators, autograd) is tested on the CPU and on a GPU.
"""

import ctypes
import math

import numpy as np
import pytest
import torch

from accuracy import DTYPES, SIXTEEN_BITS, assert_bitwise_equal, extended
from simt_library import DTYPE_NUMBERS, Guarded, load

pytestmark = pytest.mark.slow

NORMS = {1.0: 0, 2.0: 1, math.inf: 2}
# Sizes around an octet, a packet for each thread, a slot (2,048 octets), and several slots.
SIZES = [0, 1, 7, 8, 9, 2047, 2049, 16_383, 16_384, 16_385, 40_001]
# The entries of a TensorTable.
MOST_TENSORS = 2705

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def call():
    return load("clip_grad")


@pytest.fixture(scope="module")
def call_optim():
    return load("optim")


@pytest.fixture
def guarded():
    memory = Guarded()
    yield memory
    memory.check()


def array(values, kind=ctypes.c_int64):
    """The values as a C array."""
    return (kind * max(len(values), 1))(*values)


def runs(tensors):
    """The arguments that describe a list of tensors to a launcher."""
    return (
        len(tensors),
        array([DTYPE_NUMBERS[tensor.dtype] for tensor in tensors]),
        array([tensor.numel() for tensor in tensors]),
        array([tensor.data_ptr() for tensor in tensors], ctypes.c_void_p),
    )


def mixed(guarded, sizes, *, scale=1.0):
    """Tensors of every dtype in turn; every third begins one element after a packet."""
    return [
        guarded.copy((torch.randn(size, dtype=torch.float64) * scale).to(DTYPES[i % 4]), offset=i % 3 == 1) for i, size in enumerate(sizes)
    ]


def norms_of(call, guarded, tensors, norm_type):
    count = len(tensors)
    norms, max_abs, total = (guarded.empty(size, torch.float64) for size in (count, count, 1))
    nonfinite = guarded.empty(count, torch.int64)
    call("grad_norms", *runs(tensors), NORMS[norm_type], norms, max_abs, nonfinite, total)
    return norms, max_abs, nonfinite, total


def exact_norm(values, norm_type):
    magnitude = np.abs(values)
    if norm_type == math.inf:
        return magnitude.max(initial=0)
    return magnitude.sum() if norm_type == 1 else np.sqrt(np.square(magnitude).sum())


def assert_near(name, actual, exact, sixteen_bits=False):
    """Within the roundings of float64 sums; with 16 bits, three roundings of float32 come first, if the norm has sums."""
    error = np.abs(extended(actual) - np.asarray(exact)) / np.maximum(np.abs(exact), 1e-300)
    bound = np.where(sixteen_bits, 3 * 2.0**-24, 4 * 2.0**-52)
    assert (error <= bound).all(), f"{name}: {actual}, exact {exact}"


@pytest.mark.parametrize(
    "counts",
    [
        [0],
        [1],
        [5, 0, 0, 16_384, 3],
        [16_383, 16_385, 1, 50_000, 8],
        [7] * (2 * MOST_TENSORS + 1),
        [3, (1 << 30) + 5, 2],
        [1 << 30],
        [(1 << 31) + 77],
        [(1 << 30) - 16, 9, 1],
    ],
    ids=lambda counts: f"{len(counts)} tensors, {sum(counts)} elements",
)
def test_every_element_has_one_piece(call, counts):
    room = sum(counts) // 16_384 + 4 * len(counts) + 16
    out, found = np.zeros((room, 4), np.int64), np.zeros(2, np.int64)
    addresses = array([0] * len(counts), ctypes.c_void_p)
    call("pieces", len(counts), array([3] * len(counts)), array(counts), addresses, room, torch.from_numpy(out), torch.from_numpy(found))
    tables, slots = found
    assert slots <= room - 8
    assert tables == 1 or len(counts) > MOST_TENSORS or sum(counts) > 8 * (1 << 27) - 64
    pieces = out[:slots]
    firsts = pieces[pieces[:, 3] == 1]
    assert firsts[:, 0].tolist() == list(range(len(counts)))
    assert (firsts[:, 1] == 0).all()
    pieces = pieces[pieces[:, 2] > 0]
    assert (pieces[:, 2] <= 16_384).all()
    for tensor, count in enumerate(counts) if len(counts) < 100 else [(0, 7), (MOST_TENSORS, 7), (2 * MOST_TENSORS, 7)]:
        mine = pieces[pieces[:, 0] == tensor]
        ends = mine[:, 1] + mine[:, 2]
        assert np.array_equal(mine[1:, 1], ends[:-1])
        assert (ends[-1] if count else 0) == count


@pytest.mark.parametrize("norm_type", NORMS)
def test_norms(call, guarded, norm_type):
    tensors = mixed(guarded, [*SIZES, *SIZES[3:7], 12, 5, 300])
    norms, max_abs, nonfinite, total = norms_of(call, guarded, tensors, norm_type)
    values = [extended(tensor) for tensor in tensors]
    sixteen_bits = [tensor.element_size() == 2 and norm_type != math.inf for tensor in tensors]
    assert_near("norms", norms, [exact_norm(each, norm_type) for each in values], sixteen_bits)
    assert_near("max_abs", max_abs, [exact_norm(each, math.inf) for each in values])
    assert not nonfinite.any()
    assert_near("total", total, [exact_norm(np.concatenate(values), norm_type)], any(sixteen_bits))


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_the_whole_range_of_16_bits(call, guarded, dtype, norm_type):
    """float32 holds the squares of magnitudes around one only; eight elements with one exponent, and with mixed ones."""
    numbers = torch.finfo(dtype)
    exponents = torch.arange(math.log2(numbers.tiny) - 7, math.log2(numbers.max), dtype=torch.float64)
    alike = torch.exp2(exponents).repeat_interleave(64) * (1 + torch.rand(64 * len(exponents), dtype=torch.float64))
    mixed = alike[torch.randperm(len(alike))]
    tensors = [guarded.copy(each.clamp(max=numbers.max).to(dtype)) for each in (*alike.split(64), *mixed.split(64), torch.zeros(64))]
    tensors += [guarded.copy(torch.tensor([0.0, 0, 0, value, 0, 0, 0, 0], dtype=dtype)) for value in (numbers.max, numbers.smallest_normal)]
    norms, _, _, total = norms_of(call, guarded, tensors, norm_type)
    values = [extended(tensor) for tensor in tensors]
    assert_near("norms", norms, [exact_norm(each, norm_type) for each in values], True)
    assert_near("total", total, [exact_norm(np.concatenate(values), norm_type)], True)


def test_the_largest_element_stands_anywhere(call, guarded):
    tensors = [guarded.copy(torch.tensor([0.0] * i + [-3.0] + [0.0] * (7 - i)).to(dtype)) for dtype in DTYPES for i in range(8)]
    for norm_type in NORMS:
        _, max_abs, _, _ = norms_of(call, guarded, tensors, norm_type)
        assert (max_abs == 3).all()


def test_norms_of_many_tensors(call, guarded):
    tensors = [guarded.copy(torch.randn(1 + i % 3)) for i in range(MOST_TENSORS + 2)]
    norms, _, _, total = norms_of(call, guarded, tensors, 2.0)
    values = [extended(tensor) for tensor in tensors]
    assert_near("norms", norms, [exact_norm(each, 2.0) for each in values])
    assert_near("total", total, [exact_norm(np.concatenate(values), 2.0)])


@pytest.mark.parametrize("scale", [1.0, 1e170])
def test_a_tensor_of_more_slots_than_a_warp_merges(call, guarded, scale):
    """Between tensors of one slot each; 512 slots of 16,384 elements are the most for a warp."""
    sizes = [3] * 10 + [513 * 16_384 + 1] + [5] * 10
    tensors = [guarded.copy(torch.rand(size, dtype=torch.float64) * scale) for size in sizes]
    norms, _, _, total = norms_of(call, guarded, tensors, 2.0)
    values = [extended(tensor) for tensor in tensors]
    assert_near("norms", norms, [exact_norm(each, 2.0) for each in values])
    assert_near("total", total, [exact_norm(np.concatenate(values), 2.0)])


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_squares_that_leave_float64(call, guarded, scale):
    tensors = [guarded.copy(torch.rand(size, dtype=torch.float64) * scale) for size in (5, 20_000)]
    tensors += [guarded.copy(torch.randn(9)), guarded.copy(torch.zeros(3, dtype=torch.float64))]
    norms, _, _, total = norms_of(call, guarded, tensors, 2.0)
    values = [extended(tensor) for tensor in tensors]
    assert_near("norms", norms, [exact_norm(each, 2.0) for each in values])
    assert_near("total", total, [exact_norm(np.concatenate(values), 2.0)])


@each_dtype
@pytest.mark.parametrize("norm_type", NORMS)
def test_nan_and_inf(call, guarded, norm_type, dtype):
    tensors = [guarded.copy(torch.randn(size).to(dtype), offset=size % 2) for size in (9, 17_001, 30)]
    tensors[0][0] = math.inf
    tensors[1][[0, 16_999, 17_000]] = torch.tensor([math.nan, -math.inf, math.nan], dtype=dtype)
    for grads, total_is in ((tensors, math.nan), ([tensors[0], tensors[2]], math.inf)):
        norms, max_abs, nonfinite, total = norms_of(call, guarded, grads, norm_type)
        expected = torch.ops.gradkernels.grad_norms(grads, norm_type)
        torch.testing.assert_close(norms, expected[0], equal_nan=True)
        torch.testing.assert_close(max_abs, expected[1], equal_nan=True)
        assert nonfinite.tolist() == expected[2].tolist()
        assert total.item() == total_is or (math.isnan(total_is) and math.isnan(total.item()))


@pytest.mark.parametrize("total", [10.0, 0.5, 1e-9, 1e39, math.inf, math.nan, 1e300])
def test_clipping_by_a_norm(call, guarded, total):
    tensors = mixed(guarded, [*SIZES, 12, 5, 300], scale=100.0)
    expected = [tensor.clone() for tensor in tensors]
    torch.ops.gradkernels.clip_grads_with_norm_(expected, 1.0, torch.tensor(total, dtype=torch.float64))
    call("clip_with_norm", *runs(tensors), 1.0, torch.tensor([total], dtype=torch.float64))
    for actual, each in zip(tensors, expected, strict=True):
        assert_bitwise_equal(f"{actual.numel()} {actual.dtype}", actual, each)


@pytest.mark.parametrize("limit", [0.5, 0.0, -1.0, math.inf, math.nan])
def test_clipping_by_value(call, guarded, limit):
    tensors = mixed(guarded, [*SIZES, 12, 5, 300])
    for tensor in tensors:
        tensor[3:5] = torch.tensor([math.nan, math.inf])[: len(tensor[3:5])]
    expected = [tensor.clone() for tensor in tensors]
    torch.ops.gradkernels.clip_grad_value_(expected, limit)
    call("clamp", *runs(tensors), limit)
    for actual, each in zip(tensors, expected, strict=True):
        assert_bitwise_equal(f"{actual.numel()} {actual.dtype}", actual, each)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-170, 1e170])
def test_adaptive_clipping(call, guarded, scale, norm_type):
    """Units of one thread, of a warp and of a block, and more tensors than a table has entries."""
    shapes = [(1, 1), (5, 7), (3, 2047), (3, 2048), (2, 20_001), (1, 40_000), *[(2, 3)] * 1000]
    params, grads, dtypes = [], [], []
    for i, (units, elements) in enumerate(shapes):
        # float64 alone has squares that leave float64.
        dtypes.append(DTYPES[i % 4] if scale == 1.0 else torch.float64)
        param = torch.randn(units, elements, dtype=torch.float64) * scale
        grad = torch.randn(units, elements, dtype=torch.float64) * scale * 0.1 ** torch.randint(0, 4, (units, 1))
        params.append(guarded.copy(param.to(dtypes[-1]), offset=i % 3 == 1))
        grads.append(guarded.copy(grad.to(dtypes[-1]), offset=i % 3 == 2))
    grads[1][3], params[3][1] = math.nan, math.inf
    expected = [grad.reshape(shape).clone() for grad, shape in zip(grads, shapes, strict=True)]
    reshaped = [param.reshape(shape) for param, shape in zip(params, shapes, strict=True)]
    for kind in DTYPES:
        chosen = [i for i, dtype in enumerate(dtypes) if dtype == kind]
        if chosen:
            torch.ops.gradkernels.adaptive_clip_grad_([reshaped[i] for i in chosen], [expected[i] for i in chosen], 0.01, 0.0, norm_type)
    elements, units = array([shape[1] for shape in shapes]), array([shape[0] for shape in shapes])
    numbers = array([DTYPE_NUMBERS[dtype] for dtype in dtypes])
    addresses = (array([each.data_ptr() for each in tensors], ctypes.c_void_p) for tensors in (grads, params))
    grad_addresses, param_addresses = addresses
    call("adaptive_clip", len(shapes), numbers, elements, grad_addresses, units, param_addresses, NORMS[norm_type], 0.01, 0.0)
    for actual, each in zip(grads, expected, strict=True):
        # Norms differ in their last bits, and with them the rounding of an element.
        numbers = torch.finfo(each.dtype)
        rtol = (16 if each.dtype == torch.float64 else 2) * numbers.eps
        torch.testing.assert_close(actual, each.flatten(), rtol=rtol, atol=numbers.smallest_normal * numbers.eps, equal_nan=True)


@each_dtype
@pytest.mark.parametrize("centered", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop(call_optim, guarded, momentum, centered, dtype):
    options = (0.01, 0.9, 1e-8, 0.1, momentum, 0.5)
    states = []
    for i, size in enumerate([0, 1, 7, 8, 9, 2049, 16_385, 2050]):
        values = [torch.randn(size), torch.randn(size), torch.rand(size) + 1, torch.rand(size) / 2, torch.randn(size)]
        states.append([guarded.copy(each.to(dtype), offset=i % 3 == 1) for each in values])
    expected = [[each.clone() for each in state] for state in states]
    lists = [list(each) for each in zip(*expected, strict=True)]
    torch.ops.gradkernels.rmsprop_(*lists[:3], lists[3] if centered else [], lists[4] if momentum else [], *options)
    used = [True, True, True, centered, momentum > 0]
    pointers = [each.data_ptr() if use else None for state in states for each, use in zip(state, used, strict=True)]
    counts = [state[0].numel() for state in states]
    dtypes = array([DTYPE_NUMBERS[dtype]] * len(states))
    call_optim("rmsprop", len(states), dtypes, array(counts), array(pointers, ctypes.c_void_p), *options)
    for state, each in zip(states, expected, strict=True):
        for name, actual, wanted in zip(("param", "grad", "square_avg", "grad_avg", "momentum_buffer"), state, each, strict=True):
            assert_bitwise_equal(f"{name} of {actual.numel()}", actual, wanted)
