"""The CUDA kernels of batch_norm_act, run on the host (tests/simt): the bounds of the operators, every seam.

A tensor here is (rows, channels, inner). For (N, C, *, *) inner is the number of pixels of an image, for
channels_last and (N, C) it is 1. The simulated GPU runs 2 to 8 blocks at once.
"""

import itertools
import math

import pytest
import torch

from accuracy import DTYPES, SIXTEEN_BITS, ULP_BOUND, assert_accurate, assert_bitwise_equal
from batch_norm_act_calls import ACTS, HARD_INPUTS, NUMBERS, TWO_SLOPES, arguments, cast, exact_result, hard_input, scales_of, without_kinks
from batch_norm_act_calls import call as call_operator
from gradkernels import reference
from simt_library import Guarded, load
from test_simt_activation import KINDS

pytestmark = pytest.mark.slow

# From this length on, the kernels process each run of a channel by itself (csrc/common/shape.h).
LONG_RUN = 64
# The CPU's kernels also do so from this length on if there is one row, and their mask is larger.
LONG_RUN_OF_ONE_ROW = 48
# (rows, channels, inner). A block has 256 threads in long runs; in short ones 352 if packets have several columns, and
# 512 for single elements. A thread takes packets of 1 to 8 elements, up to 8 of them before it sums. Rows that are not
# whole packets, or not whole bytes of the mask; groups of channels that are not full.
SHAPES = [
    *[(2, 1, 1), (3, 3, 1), (9, 64, 1), (5, 65, 1), (33, 8, 1), (257, 64, 1), (1025, 65, 1), (700, 100, 1), (67, 12, 1), (3000, 20, 1)],
    *[(2, 3, 2), (5, 65, 7), (4, 3, 49), (6, 8, 49), (3, 65, 49), (65, 9, 16), (2, 5, 63)],
    *[
        (1, 1, 64),
        (2, 3, 65),
        (3, 2, 71),
        (5, 65, 72),
        (1, 1, 2047),
        (2, 1, 2049),
        (1, 3, 4096),
        (3, 2, 2731),
        (2, 1, 8193),
        (9, 1, 3136),
        (5, 3, 196),
        # Several parts of 8-byte packets, in lines that are padded to bytes of the mask.
        (90, 1, 196),
        (40, 2, 100),
    ],
    # Several parts of packets of 8 bytes, in rows across channels.
    (3000, 20, 1),
]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_act = pytest.mark.parametrize("act", ACTS)


@pytest.fixture(scope="module")
def call():
    return load("batch_norm_act")


@pytest.fixture
def guarded():
    memory = Guarded()
    yield memory
    memory.check()


def mask_bytes(shape):
    rows, channels, inner = shape
    long = inner >= LONG_RUN or (rows == 1 and inner >= LONG_RUN_OF_ONE_ROW)
    return rows * channels * ((inner + 7) // 8) if long else rows * ((channels * inner + 7) // 8)


class Kernels:
    """The forward and backward of gk.batch_norm_act by the launchers, and all their results by name."""

    def __init__(self, call, guarded, given, act, *, offset=0):
        self.call, self.guarded = call, guarded
        self.shape, self.dtype = tuple(given["x"].shape), given["x"].dtype
        self.given = {
            name: None if tensor is None else guarded.copy(tensor, offset=offset if tensor.dim() == 3 else 0)
            for name, tensor in given.items()
        }
        self.parameter_dtype = next((given[name].dtype for name in ("weight", "running_mean") if given[name] is not None), self.dtype)
        self.act = (KINDS[act], float(NUMBERS[act]))
        masked = given["residual"] is not None and act in TWO_SLOPES
        self.mask = guarded.empty(mask_bytes(self.shape), torch.uint8) if masked else None
        self.mean, self.invstd = (guarded.empty(self.shape[1], torch.float64) for _ in range(2))
        self.y, self.grad_x = self.like_x(offset), self.like_x(offset)
        self.grad_residual = None if given["residual"] is None else self.like_x(offset)
        self.grad_weight, self.grad_bias = (
            None if given[name] is None else guarded.empty(self.shape[1], self.parameter_dtype) for name in ("weight", "bias")
        )

    def like_x(self, offset):
        return self.guarded.empty(math.prod(self.shape), self.dtype, offset=offset)

    def problem(self, *operands):
        return (self.dtype, self.parameter_dtype, *self.shape, *self.act, *operands, self.given["weight"], self.given["bias"])

    def forward_operands(self):
        return (*self.problem(self.given["x"], self.given["residual"]), self.mean, self.invstd, self.y, self.mask)

    def backward_operands(self):
        given = self.given
        residual = None if self.mask is not None else given["residual"]
        return (*self.problem(given["grad_y"], given["x"], residual, self.mask), self.mean, self.invstd)

    def forward(self, training, momentum=0.1, eps=1e-5, batches=None):
        """batches: num_batches_tracked, which decides the momentum and is counted."""
        statistics = (self.given["running_mean"], self.given["running_var"], batches, batches)
        self.call("batch_norm_act_forward", *self.forward_operands(), int(training), momentum, eps, *statistics)

    def backward(self, training):
        gradients = (self.grad_x, self.grad_weight, self.grad_bias, self.grad_residual)
        self.call("batch_norm_act_backward", *self.backward_operands(), int(training), *gradients)

    def result(self):
        found = {"y": self.y, "grad_x": self.grad_x, "grad_residual": self.grad_residual}
        found = {name: None if tensor is None else tensor.view(self.shape) for name, tensor in found.items()}
        found |= {"grad_weight": self.grad_weight, "grad_bias": self.grad_bias}
        return found | {name: self.given[name] for name in ("running_mean", "running_var")}


def assert_all_accurate(result, given, training, act, momentum=0.1, eps=1e-5, most=math.inf):
    theirs = call_operator(reference.batch_norm_act, given, training, act, momentum, eps)
    exact = exact_result(given, training, act, momentum, eps)
    scales = scales_of(given, training, act, momentum, eps)
    for name, actual in result.items():
        if actual is not None:
            assert_accurate(name, actual, theirs[name], exact[name], per="tensor", scale=scales.get(name, 0.0), most=most)


def sample(shape, dtype, act, training, *, residual):
    given = cast(arguments(shape, residual=residual), dtype) if dtype in SIXTEEN_BITS else arguments(shape, dtype, residual=residual)
    return without_kinks(given, training, act)


@each_dtype
def test_shapes(call, guarded, dtype):
    acts = list(ACTS)
    for index, shape in enumerate(SHAPES):
        # 16-bit dtypes differ only in conversions.
        if dtype == torch.float16 and index % 3 > 0:
            continue
        act, residual = acts[index % len(acts)], index % 2 == 1
        given = sample(shape, dtype, act, True, residual=residual)
        kernels = Kernels(call, guarded, given, act, offset=index % 5 == 4)
        kernels.forward(True)
        kernels.backward(True)
        assert_all_accurate(kernels.result(), given, True, act)


@each_dtype
@each_act
def test_activations(call, guarded, dtype, act):
    for shape, training, residual in itertools.product([(9, 20, 7), (2, 3, 152)], [True, False], [True, False]):
        given = sample(shape, dtype, act, training, residual=residual)
        kernels = Kernels(call, guarded, given, act)
        kernels.forward(training)
        # gk.recompute's second pass.
        y = kernels.y.clone()
        kernels.y.zero_()
        call("batch_norm_act_elemt", *kernels.forward_operands())
        assert_bitwise_equal("y", kernels.y, y)
        kernels.backward(training)
        assert_all_accurate(kernels.result(), given, training, act)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("shape", [(65, 24, 1), (3, 8, 49), (2, 3, 200)], ids=str)
def test_16_bits_with_float32_parameters(call, guarded, dtype, shape):
    for act in ("relu", "swish"):
        wide = arguments(shape, residual=True)
        given = without_kinks(wide | cast({name: wide[name] for name in ("x", "residual", "grad_y")}, dtype), True, act)
        kernels = Kernels(call, guarded, given, act)
        kernels.forward(True)
        kernels.backward(True)
        assert_all_accurate(kernels.result(), given, True, act)


@pytest.mark.parametrize("left_out", ["weight", "bias", "weight bias", "running_mean running_var"])
def test_operands_left_out(call, guarded, left_out):
    for shape in ((129, 20, 1), (2, 3, 136)):
        given = without_kinks(arguments(shape, residual=True) | dict.fromkeys(left_out.split()), True, "elu")
        kernels = Kernels(call, guarded, given, "elu")
        kernels.forward(True)
        kernels.backward(True)
        exact = call_operator(reference.batch_norm_act, cast(given, torch.float64), True, "elu")
        for name, actual in kernels.result().items():
            assert (actual is None) == (exact.get(name) is None), name
            if actual is not None:
                torch.testing.assert_close(actual, exact[name].float(), rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("inputs", HARD_INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_statistics_of_hard_inputs(call, guarded, dtype, inputs):
    """The table of tests/test_batch_norm_act.py: at most 16 ulp, even where torch is far off."""
    for shape in ((5, 2, 8190), (20_011, 2, 1)):
        x = hard_input(inputs, shape, dtype)
        if not x.isfinite().all():
            pytest.skip(f"{inputs} overflows in {dtype}")
        given = arguments(shape, torch.float32 if dtype in SIXTEEN_BITS else dtype, x=x)
        given = without_kinks(given | {"grad_y": given["grad_y"].to(dtype)}, True, "leaky_relu")
        kernels = Kernels(call, guarded, given, "leaky_relu")
        kernels.forward(True)
        kernels.backward(True)
        assert_all_accurate(kernels.result(), given, True, "leaky_relu", most=16.0)


@each_dtype
def test_nan_and_infinity_stay_in_their_channel(call, guarded, dtype):
    for shape in ((70, 20, 1), (3, 9, 49), (2, 9, 136), (3, 7, 8193)):
        given = cast(arguments(shape), dtype)
        clean = Kernels(call, guarded, given, "identity")
        clean.forward(True)
        given["x"] = given["x"].clone()
        given["x"][1, 2, 0], given["x"][0, 4, -1] = math.nan, math.inf
        given["x"][0, 5, 0] = given["x"][-1, 5, -1] = -math.inf
        given["x"][0, 6, 0], given["x"][-1, 6, -1] = math.inf, -math.inf
        kernels = Kernels(call, guarded, given, "identity")
        kernels.forward(True)
        kernels.backward(True)
        touched = torch.zeros(shape[1], dtype=torch.bool)
        touched[[2, 4, 5, 6]] = True
        assert_bitwise_equal("mean", kernels.mean[touched], torch.tensor([math.nan, math.inf, -math.inf, math.nan], dtype=torch.float64))
        assert_bitwise_equal("running_mean", kernels.result()["running_mean"][touched], kernels.mean[touched].to(dtype))
        y, clean_y = kernels.result()["y"], clean.result()["y"]
        assert y[:, touched].isnan().all() and kernels.result()["grad_x"][:, touched].isnan().all()
        assert_bitwise_equal("y elsewhere", y[:, ~touched], clean_y[:, ~touched])
        assert kernels.invstd.isnan().equal(touched) and kernels.result()["running_var"].isnan().equal(touched)


def test_gradients_of_large_x(call, guarded):
    """The cases of test_gradients_at_the_ends_of_the_range in which grad_x depends on the slope of x."""
    for shape, (of_x, of_grad_y) in itertools.product([(700, 9, 1), (2, 3, 2731)], [(1e12, 1e-20), (1e15, 1e-10), (1e17, 1e-8)]):
        given = arguments(shape)
        given = without_kinks(given | {"x": given["x"] * of_x, "grad_y": given["grad_y"] * of_grad_y}, True, "leaky_relu")
        kernels = Kernels(call, guarded, given, "leaky_relu")
        kernels.forward(True)
        kernels.backward(True)
        assert_all_accurate(kernels.result(), given, True, "leaky_relu", most=ULP_BOUND)


def test_statistics_in_evaluation_are_those_given(call, guarded):
    for shape in ((5, 65, 1), (1, 3, 1), (2, 3, 136)):
        for dtype in DTYPES:
            given = sample(shape, dtype, "swish", False, residual=True)
            kernels = Kernels(call, guarded, given, "swish")
            kernels.forward(False, eps=1e-3)
            assert_bitwise_equal("mean", kernels.mean, given["running_mean"].double())
            assert_bitwise_equal("running_var", kernels.result()["running_var"], given["running_var"])
            torch.testing.assert_close(kernels.invstd, (given["running_var"].double() + 1e-3).rsqrt(), rtol=1e-15, atol=0)


def test_momentum_from_the_number_of_batches(call, guarded):
    for shape in ((70, 20, 1), (2, 3, 136)):
        given = arguments(shape)
        counted, told = (Kernels(call, guarded, given, "identity") for _ in range(2))
        batches = torch.tensor([3])
        counted.forward(True, momentum=0.7, batches=batches)
        assert batches.item() == 4
        told.forward(True, momentum=0.25)
        for name in ("running_mean", "running_var"):
            assert_bitwise_equal(name, counted.result()[name], told.result()[name])


def test_only_the_gradients_that_are_needed(call, guarded):
    """Gradients that are not needed are null pointers; the others do not change."""
    for shape, training in itertools.product([(70, 20, 1), (2, 3, 136)], (True, False)):
        given = arguments(shape)
        kernels = Kernels(call, guarded, given, "swish")
        kernels.forward(training)
        kernels.backward(training)
        names = ("grad_x", "grad_weight", "grad_bias")
        whole = {name: getattr(kernels, name) for name in names}
        for wanted in (("grad_x",), ("grad_weight",), ("grad_weight", "grad_bias"), ("grad_x", "grad_bias")):
            for name in names:
                setattr(kernels, name, torch.full_like(whole[name], 7.0) if name in wanted else None)
            kernels.backward(training)
            for name in wanted:
                assert_bitwise_equal(name, getattr(kernels, name), whole[name])


def test_results_do_not_depend_on_the_order_of_blocks(call, guarded, monkeypatch):
    for shape in ((2049, 20, 1), (41, 9, 49), (3, 2, 8193)):
        results = []
        for order in ("0", "1"):
            monkeypatch.setenv("SIMT_REVERSED", order)
            results.append(Kernels(call, guarded, arguments(shape, residual=True), "relu"))
            results[-1].forward(True)
            results[-1].backward(True)
        for name, tensor in results[0].result().items():
            assert_bitwise_equal(f"{shape} {name}", tensor, results[1].result()[name])


def test_mask_equals_the_cpus(call, guarded):
    """The CPU's kernels write the same bits, in the same bytes where they do not fold rows (csrc/cpu/lines.h)."""
    for shape, act in itertools.product([(3, 65, 1), (5, 12, 1), (9, 64, 1), (3, 9, 49), (2, 5, 139), (2, 3, 196)], TWO_SLOPES):
        given = arguments(shape, residual=True)
        kernels = Kernels(call, guarded, given, act)
        kernels.forward(True)
        operands = [given[name] for name in ("x", "running_mean", "running_var", "weight", "bias", "residual")]
        parts = torch.ops.gradkernels.batch_norm_act(*operands, None, True, 0.1, 1e-5, act, NUMBERS[act])
        assert_bitwise_equal("mask", kernels.mask, parts[3])


@each_dtype
def test_parts_for_many_processes(call, guarded, dtype):
    """Moments, their merge, y, sums and grad_x of parts of a batch, compared with one call on the whole batch."""
    for index, (rows, channels, inner) in enumerate([(70, 20, 1), (6, 9, 49), (4, 3, 2731)]):
        shape = (rows, channels, inner)
        act, residual = ("relu", True) if index == 1 else ("swish", index == 2)
        given = sample(shape, dtype, act, True, residual=residual)
        whole = Kernels(call, guarded, given, act)
        whole.forward(True)
        whole.backward(True)
        cuts = [slice(0, rows // 3), slice(rows // 3, rows)]
        elementwise = [name for name, tensor in given.items() if tensor is not None and tensor.dim() == 3]
        shares = [Kernels(call, guarded, given | {name: given[name][cut].contiguous() for name in elementwise}, act) for cut in cuts]
        moments = guarded.empty(3 * (1 + 2 * channels), torch.float64).view(3, -1).zero_()
        for rank, share in zip((0, 2), shares, strict=True):
            call("batch_norm_act_stats", dtype, *share.shape, share.given["x"], moments[rank])
        running = [guarded.copy(given[name]) for name in ("running_mean", "running_var")]
        mean, invstd = (guarded.empty(channels, torch.float64) for _ in range(2))
        gather = ("batch_norm_act_gather_stats", dtype, channels, 3, moments, 0.1, 1e-5, *running, None, mean, invstd)
        call(*gather)
        # The elements of a tile may be added up in float32 first.
        bound = 1e-12 if dtype == torch.float64 else 1e-7
        torch.testing.assert_close(mean, whole.mean, rtol=bound, atol=bound)
        torch.testing.assert_close(invstd, whole.invstd, rtol=bound, atol=0)
        sums = guarded.empty(4 * channels, torch.float64).view(2, -1)
        for share, of_share in zip(shares, sums, strict=True):
            share.mean.copy_(mean)
            share.invstd.copy_(invstd)
            call("batch_norm_act_elemt", *share.forward_operands())
            call("batch_norm_act_backward_reduce", *share.backward_operands(), share.grad_residual, of_share)
        total, count = guarded.copy(sums.sum(0)), guarded.copy(torch.tensor([float(rows * inner)], dtype=torch.float64))
        for share in shares:
            call("batch_norm_act_backward_elemt", *share.backward_operands(), share.grad_x, total, count)
        names = ("y", "grad_x", "grad_residual") if residual else ("y", "grad_x")
        found = {name: torch.cat([share.result()[name] for share in shares]) for name in names}
        found |= {"grad_weight": (total[channels:] * invstd).to(dtype), "grad_bias": total[:channels].to(dtype)}
        found |= dict(zip(("running_mean", "running_var"), running, strict=True))
        assert_all_accurate(found, given, True, act)


def test_moments_of_infinities(call, guarded):
    """An infinity on one process, the same on both, and two that differ."""
    means = torch.tensor([[math.inf, 1.0, -math.inf, math.inf, 2.0], [3.0, -math.inf, -math.inf, -math.inf, 4.0]], dtype=torch.float64)
    m2 = torch.where(means.isinf(), math.nan, 1.0)
    moments = guarded.copy(torch.cat([torch.full((2, 1), 4.0, dtype=torch.float64), means, m2], 1).view(-1))
    running = [guarded.copy(torch.full((5,), 0.5)) for _ in range(2)]
    mean, invstd = (guarded.empty(5, torch.float64) for _ in range(2))
    call("batch_norm_act_gather_stats", torch.float32, 5, 2, moments, 0.1, 1e-2, *running, None, mean, invstd)
    assert_bitwise_equal("mean", mean, torch.tensor([math.inf, -math.inf, -math.inf, math.nan, 3.0], dtype=torch.float64))
    assert_bitwise_equal("running_mean", running[0].isfinite(), mean.isfinite())
    assert invstd.isnan().tolist() == running[1].isnan().tolist() == [True] * 4 + [False]


def test_moments_of_one_value_and_of_none(call, guarded):
    """Running statistics do not change, because there is no variance to average."""
    for count, mean_of_all, invstd_of_all in ((1.0, 3.0, 10.0), (0.0, 0.0, 0.0)):
        moments = guarded.copy(torch.tensor([0.0, 9.0, 9.0, count, 3.0, 0.0], dtype=torch.float64))
        running = [guarded.copy(torch.tensor([0.5])) for _ in range(2)]
        mean, invstd = (guarded.empty(1, torch.float64) for _ in range(2))
        call("batch_norm_act_gather_stats", torch.float32, 1, 2, moments, 0.1, 1e-2, *running, None, mean, invstd)
        assert mean.item() == mean_of_all and invstd.item() == pytest.approx(invstd_of_all)
        assert running[0].item() == running[1].item() == 0.5
