"""The CUDA kernels of the activations, run on the host (tests/simt): the bounds of the operators, every seam.

The code between a launcher and a user (operators, autograd) is tested on the CPU and on a GPU.
"""

import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from accuracy import (
    DTYPES,
    SIXTEEN_BITS,
    SWISH_GRADIENT,
    ULP_BOUND,
    activation_scales,
    assert_accurate,
    assert_bitwise_equal,
    exact_activation,
    extended,
)
from activation_calls import each_parametric, exact_shares, value_and_grad
from batch_norm_act_calls import TWO_SLOPES
from gradkernels.acts import ACTS
from simt_library import Guarded, load

pytestmark = pytest.mark.slow

# The order of math::ActivationKind.
KINDS = {name: kind for kind, name in enumerate(ACTS)}
# The activations that have operators of their own.
WITH_PARAMETER = tuple(name for name, act in ACTS.items() if act.param)
PARAMS = {"leaky_relu": 0.3, "elu": 1.2, "swish": 1.7}
INPUT, OUTPUT, MASK = 0, 1, 2
PRELU, SWISH = 0, 1
# Sizes around a packet, the packets of a warp, a tile (256 threads, 16 packets of 2 to 8 elements), and
# several tiles for each block.
SIZES = [0, 1, 3, 7, 8, 9, 31, 32, 33, 255, 257, 2047, 2048, 2049, 8191, 8193, 16_411, 70_001]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def call():
    return load("activation")


@pytest.fixture
def guarded():
    memory = Guarded()
    yield memory
    memory.check()


def sample(count, dtype):
    """Random numbers, with the kinks among them where there is room."""
    x = torch.randn(count, dtype=torch.float64) * 3
    if count > 6:
        x[:3] = torch.tensor([0.0, -0.0, 6.0])
        x[-2:] = torch.tensor([6.0, -1e-7])
    return x.to(dtype)


def packed(bits):
    """The bits as bytes: bit i is bit i % 8 of byte i / 8."""
    padded = torch.zeros((bits.numel() + 7) // 8 * 8, dtype=torch.uint8)
    padded[: bits.numel()] = bits
    return (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def passes(x, act):
    """Where the slope is 1."""
    if act == "leaky_relu":
        return x > 0
    return ~(x <= 0) if act == "relu" else (x > 0) & (x < 6)


def assert_activation(name, act, param, x, grad_y, y, grad_x):
    exact_y, exact_grad_x = exact_activation(x, grad_y, act, param)
    torch_y, torch_grad_x = value_and_grad(ACTS[act].function, x.clone(), grad_y, param)
    y_scale, grad_scale = activation_scales(x, grad_y, act, param)
    assert_accurate(f"{name}: y", y, torch_y, exact_y, scale=y_scale)
    bound = SWISH_GRADIENT if act == "swish" else ULP_BOUND
    assert_accurate(f"{name}: grad_x", grad_x, torch_grad_x, exact_grad_x, scale=grad_scale, bound=bound)


def tensors(guarded, index, size, dtype):
    """x, grad_y, and memory for y and grad_x.

    In turn all of them begin at a packet, or x and grad_y, or y and grad_x, begin one element after it.
    """
    inputs, outputs = index % 3 == 1, index % 3 == 2
    x = guarded.copy(sample(size, dtype), offset=inputs)
    grad_y = guarded.copy(torch.randn(size).to(dtype), offset=inputs)
    return x, grad_y, guarded.empty(size, dtype, offset=outputs), guarded.empty(size, dtype, offset=outputs)


@each_dtype
@pytest.mark.parametrize("act", WITH_PARAMETER)
def test_forward_and_backward(call, guarded, act, dtype):
    param = PARAMS.get(act, 0.0)
    for index, size in enumerate(SIZES):
        x, grad_y, y, grad_x = tensors(guarded, index, size, dtype)
        call("activation_forward", dtype, KINDS[act], param, size, x, y, None)
        call("activation_backward", dtype, KINDS[act], param, INPUT, size, grad_y, x, grad_x)
        assert_activation(f"{act} of {size}", act, param, x, grad_y, y, grad_x)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("act,param", [("elu", 1.0), ("swish", 1.0), ("swish", 1.7), ("swish", -0.5)])
def test_every_value_of_16_bits_is_rounded_once(call, guarded, act, param, dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = guarded.copy(x[x.isfinite()])
    grad_y = guarded.copy(torch.randn(x.shape).to(dtype))
    y, grad_x = (guarded.empty(x.numel(), dtype) for _ in range(2))
    call("activation_forward", dtype, KINDS[act], param, x.numel(), x, y, None)
    call("activation_backward", dtype, KINDS[act], param, INPUT, x.numel(), grad_y, x, grad_x)
    assert_activation(act, act, param, x, grad_y, y, grad_x)


@each_dtype
@pytest.mark.parametrize("act", TWO_SLOPES)
def test_mask(call, guarded, act, dtype):
    param = -0.7 if act == "leaky_relu" else 0.0
    for index, size in enumerate(SIZES):
        x, grad_y, y, grad_x = tensors(guarded, index, size, dtype)
        mask = guarded.empty((size + 7) // 8, torch.uint8)
        call("activation_forward", dtype, KINDS[act], param, size, x, y, mask)
        assert_bitwise_equal(f"mask of {size}", mask, packed(passes(x, act)))
        call("activation_backward", dtype, KINDS[act], param, MASK, size, grad_y, mask, grad_x)
        assert_activation(f"{act} of {size}", act, param, x, grad_y, y, grad_x)


@each_dtype
def test_elu_backward_reads_the_output(call, guarded, dtype):
    for index, size in enumerate(SIZES):
        y, grad_y, grad_x, _ = tensors(guarded, index, size, dtype)
        call("activation_backward", dtype, KINDS["elu"], 1.5, OUTPUT, size, grad_y, y, grad_x)
        slope = torch.where(y > 0, 1.0, y.double() + 1.5).where(~y.isnan(), math.nan)
        expected = torch.ops.gradkernels.elu_backward(grad_y, y, 1.5, True)
        assert_accurate(f"grad_x of {size}", grad_x, expected, extended(grad_y) * extended(slope), scale=extended(grad_y).__abs__())


@each_dtype
def test_in_place(call, guarded, dtype):
    for index, size in enumerate(SIZES):
        x, grad_y, y, grad_x = tensors(guarded, index, size, dtype)
        call("activation_forward", dtype, KINDS["swish"], 1.0, size, x, y, None)
        call("activation_backward", dtype, KINDS["swish"], 1.0, INPUT, size, grad_y, x, grad_x)
        call("activation_backward", dtype, KINDS["swish"], 1.0, INPUT, size, grad_y, x, grad_y)
        call("activation_forward", dtype, KINDS["swish"], 1.0, size, x, x, None)
        assert_bitwise_equal(f"x of {size}", x, y)
        assert_bitwise_equal(f"grad_y of {size}", grad_y, grad_x)


@each_dtype
def test_rrelu_draws_what_the_cpu_draws(call, guarded, dtype):
    lower, upper, seed = 0.1, 0.4, torch.tensor(1 << 40 | 12345)
    for index, size in enumerate(SIZES):
        x, grad_y, y, grad_x = tensors(guarded, index, size, dtype)
        mask = guarded.empty((size + 7) // 8, torch.uint8)
        call("rrelu_forward", dtype, seed, lower, upper, size, x, y, mask)
        call("rrelu_backward", dtype, seed, lower, upper, size, grad_y, mask, grad_x)
        expected_y, expected_mask = torch.ops.gradkernels.rrelu_with_mask(x, seed, lower, upper)
        expected_grad_x = torch.ops.gradkernels.rrelu_backward(grad_y, expected_mask, [1], seed, lower, upper)
        assert_bitwise_equal(f"mask of {size}", mask, expected_mask)
        assert_bitwise_equal(f"y of {size}", y, expected_y)
        assert_bitwise_equal(f"grad_x of {size}", grad_x, expected_grad_x)


# (rows, channels, inner): one parameter for all elements; runs that are whole packets of 16 bytes, of 8 bytes
# in 16 bits, or neither; rows across channels whose columns are packets of 16 bytes, of 8 bytes or neither,
# and fill a block or do not; channels of more than one part.
CHANNEL_SHAPES = [
    *[(1, 1, 1), (1, 1, 16_385), (1, 1, 40_000)],
    *[(2, 1, 7), (3, 3, 49), (2, 3, 64), (5, 65, 49), (9, 2, 2048)],
    *[(64, 3, 196), (7, 2, 12), (300, 2, 100), (3, 5, 9000), (70, 1, 1028), (2000, 3, 5), (2, 600, 5)],
    *[(1, 3, 1), (257, 3, 1), (65, 64, 1), (130, 65, 1), (8200, 8, 1), (9, 520, 1)],
    *[(70, 12, 1), (900, 20, 1), (300, 136, 1), (4100, 3, 1), (33, 2100, 1)],
]
# The elements by which x and grad_y begin after an address that is aligned to a packet: 4 elements of 16 bits
# are half a packet.
OFFSETS = (0, 1, 4)


@each_dtype
@each_parametric
def test_learnt_parameter(call, guarded, act, dtype):
    number = {"prelu": PRELU, "swish": SWISH}[act.name]
    for index, shape in enumerate(CHANNEL_SHAPES):
        rows, channels, inner = shape
        size = rows * channels * inner
        offset = OFFSETS[index % 3]
        x = guarded.copy(torch.randn(size).to(dtype), offset=offset)
        grad_y = guarded.copy(torch.randn(size).to(dtype), offset=offset)
        y, grad_x = (guarded.empty(size, dtype) for _ in range(2))
        parameter = guarded.copy(torch.rand(channels).to(dtype) + 0.25, offset=index % 5 == 3)
        grad_parameter, alone = guarded.empty(channels, dtype), guarded.empty(channels, dtype)
        call("parametric_forward", dtype, *shape, number, x, parameter, y)
        call("parametric_backward", dtype, *shape, number, grad_y, x, parameter, grad_x, grad_parameter)
        call("parametric_backward", dtype, *shape, number, grad_y, x, parameter, None, alone)
        assert_bitwise_equal(f"grad_parameter alone {shape}", alone, grad_parameter)

        x, grad_y, y, grad_x = (each.view(shape) for each in (x, grad_y, y, grad_x))
        leaf, weight = x.clone().requires_grad_(), parameter.clone().requires_grad_()
        cpu_y = act.function(leaf, weight)
        cpu_y.backward(grad_y)
        across = parameter.view(1, channels, 1)
        exact_y, exact_grad_x = exact_activation(x, grad_y, act.formula, across)
        y_scale, grad_scale = activation_scales(x, grad_y, act.formula, extended(across))
        assert_accurate(f"y {shape}", y, cpu_y.detach(), exact_y, scale=y_scale)
        assert_accurate(f"grad_x {shape}", grad_x, leaf.grad, exact_grad_x, scale=grad_scale, bound=SWISH_GRADIENT)
        shares, sizes = exact_shares(x, grad_y, across, act.name)
        scale = np.sqrt(np.square(sizes).sum((0, 2)))
        exact = shares.sum((0, 2))
        assert_accurate(f"grad_parameter {shape}", grad_parameter, weight.grad, exact, scale=scale, bound=act.share_error)


@each_dtype
@each_parametric
def test_learnt_parameter_does_not_depend_on_the_packets(call, guarded, act, dtype):
    """Packets of 16 bytes, of 8 bytes in 16 bits, and single elements give the same y and grad_x."""
    number = {"prelu": PRELU, "swish": SWISH}[act.name]
    for shape in ((1, 1, 2061), (3, 4, 208), (70, 40, 1)):
        size, channels = math.prod(shape), shape[1]
        x, grad_y = (torch.randn(size).to(dtype) for _ in range(2))
        parameter = guarded.copy(torch.randn(channels).to(dtype))
        results = []
        for offset in OFFSETS:
            operands = [guarded.copy(each, offset=offset) for each in (x, grad_y)]
            y, grad_x = (guarded.empty(size, dtype, offset=offset) for _ in range(2))
            call("parametric_forward", dtype, *shape, number, operands[0], parameter, y)
            call("parametric_backward", dtype, *shape, number, operands[1], operands[0], parameter, grad_x, None)
            results.append((y, grad_x))
        for y, grad_x in results[1:]:
            assert_bitwise_equal(f"y {shape}", y, results[0][0])
            assert_bitwise_equal(f"grad_x {shape}", grad_x, results[0][1])


@each_parametric
def test_more_rows_than_a_thread_sums_at_once(call, guarded, act):
    rows, channels = 4200, 128
    x, grad_y = (guarded.copy(torch.randn(rows * channels).bfloat16()) for _ in range(2))
    parameter = guarded.copy(torch.rand(channels).bfloat16())
    actual = guarded.empty(channels, torch.bfloat16)
    number = {"prelu": PRELU, "swish": SWISH}[act.name]
    call("parametric_backward", torch.bfloat16, rows, channels, 1, number, grad_y, x, parameter, None, actual)
    shares, sizes = exact_shares(x.view(rows, channels), grad_y.view(rows, channels), parameter.view(1, channels), act.name)
    scale = np.sqrt(np.square(sizes).sum(0))
    assert_accurate("grad_parameter", actual, actual, shares.sum(0), scale=scale, bound=act.share_error)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("beta", [1.0, 0.0, -0.0, -1.5, 2.0**-12, 96.0])
def test_swish_of_16_bits_at_special_values(call, guarded, beta, dtype):
    """A GPU computes 16 bits by formulas of its own. They give inf, nan and signed zeros where the CPU's do, unless sigmoid is 0."""
    info = torch.finfo(dtype)
    magnitudes = [0.0, info.smallest_normal / 4, info.smallest_normal, 1.0, 20.0, 86.5, 88.0, 104.0, 178.0, 30_000.0, info.max, math.inf]
    values = torch.tensor([math.nan, *magnitudes, *(-each for each in magnitudes)], dtype=torch.float64).to(dtype)
    x, grad_y = (each.flatten() for each in torch.meshgrid(values, values, indexing="ij"))
    x, grad_y = guarded.copy(x), guarded.copy(grad_y)
    y, grad_x = (guarded.empty(x.numel(), dtype) for _ in range(2))
    call("activation_forward", dtype, KINDS["swish"], beta, x.numel(), x, y, None)
    call("activation_backward", dtype, KINDS["swish"], beta, INPUT, x.numel(), grad_y, x, grad_x)
    expected = torch.ops.gradkernels.swish(x, beta), torch.ops.gradkernels.swish_backward(grad_y, x, beta)
    # torch's sigmoid is 0 from -88.8 down. Then grad_x is grad_y times 0, where the CPU's may be a number.
    gone = beta * x.float() < -103.9
    assert not (grad_x[gone].abs() > 0).any() and not grad_x[gone & x.isfinite() & grad_y.isfinite()].isnan().any()
    for name, actual, cpu, told in zip(("y", "grad_x"), (y, grad_x), expected, (gone | ~gone, ~gone), strict=True):
        actual, cpu = actual[told], cpu[told]
        torch.testing.assert_close(actual, cpu, rtol=info.eps, atol=info.smallest_normal * info.eps, equal_nan=True)
        numbers = ~cpu.isnan()
        assert torch.equal(actual.signbit()[numbers], cpu.signbit()[numbers]), name


def test_a_gpu_that_nothing_was_built_for():
    """The message of csrc/cuda/device.h. tests/simt ends the process where torch would raise."""
    call = "load('activation')('activation_forward', x.dtype, 5, 1.0, 9, x, x, None)"
    script = f"import torch; from simt_library import load; x = torch.ones(9); {call}"
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__), "SIMT_COMPUTE_CAPABILITY": "75", "SIMT_BUILT_FOR": "80"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == -signal.SIGABRT
    assert 'built for sm_90, and this GPU has compute capability 7.5. Build it again: FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="7.5"' in run.stderr


def test_results_do_not_depend_on_the_order_of_blocks(call, guarded, monkeypatch):
    for rows, channels, inner in [(1, 1, 40_000), (8200, 8, 1), (4200, 3, 1), (5, 3, 9001)]:
        size = rows * channels * inner
        x, grad_y = (guarded.copy(torch.randn(size)) for _ in range(2))
        parameter = guarded.copy(torch.rand(channels))
        results = []
        for reversed_order in ("0", "1"):
            monkeypatch.setenv("SIMT_REVERSED", reversed_order)
            results.append(guarded.empty(channels, torch.float32))
            call("parametric_backward", torch.float32, rows, channels, inner, SWISH, grad_y, x, parameter, None, results[-1])
        assert_bitwise_equal(f"{rows, channels, inner}", *results)
