"""The CUDA kernels of group_norm_act, run on the host (tests/simt): the bounds of the operators, every seam.

They are those of batch_norm_act with samples and sets, so tests/test_simt_batch_norm_act.py has the seams of a sample. A
tensor here is (samples, channels, pixels), in memory contiguous or channels_last.
"""

import itertools
import math

import pytest
import torch

from accuracy import DTYPES, SIXTEEN_BITS, assert_accurate, assert_bitwise_equal
from batch_norm_act_calls import (
    ACTS,
    HARD_INPUTS,
    NUMBERS,
    TWO_SLOPES,
    arguments,
    cast,
    exact_result,
    hard_input,
    norm_act,
    scales_of,
    without_kinks,
)
from batch_norm_act_calls import call as call_operator
from gradkernels import reference
from simt_library import Guarded, load
from test_simt_activation import KINDS
from test_simt_batch_norm_act import Kernels as BatchNorm
from test_simt_batch_norm_act import each_act, each_dtype, mask_bytes

pytestmark = pytest.mark.slow

# The kernels are those of batch norm.
STEM = "batch_norm_act"
# (samples, channels, pixels), groups. Sets of one channel, of a few, of all; sets within a slab and across slabs; one sample
# and many; samples of one row and of several parts, whose masks end within a byte.
SHAPES = [
    *[((1, 4, 1), 2), ((3, 6, 1), 3), ((70, 64, 1), 8), ((5, 65, 1), 13), ((2, 520, 1), 1), ((9, 12, 1), 4)],
    *[((2, 6, 7), 2), ((3, 12, 9), 12), ((2, 40, 49), 4), ((1, 96, 16), 4), ((4, 3, 63), 3), ((2, 30, 5), 1)],
    *[((2, 6, 64), 3), ((3, 4, 65), 1), ((2, 10, 72), 5), ((1, 2, 2049), 2), ((2, 20, 100), 4), ((3, 5, 196), 5), ((33, 2, 71), 1)],
    *[((2, 3, 4099), 3), ((2, 2, 5000), 1), ((1, 40, 700), 8), ((2, 64, 300), 32), ((2, 3, 2731), 1)],
]
LAYOUTS = (False, True)


@pytest.fixture(scope="module")
def call():
    return load(STEM)


@pytest.fixture
def guarded():
    memory = Guarded()
    yield memory
    memory.check()


class Kernels:
    """The forward and backward of gk.group_norm_act by the launchers, and all their results by name."""

    def __init__(self, call, guarded, given, groups, act, channels_last, *, offset=0):
        self.call, self.guarded, self.channels_last = call, guarded, channels_last
        samples, channels, pixels = given["x"].shape
        self.given = {name: self.in_memory(tensor, offset) for name, tensor in given.items()}
        self.shape, self.dtype = (samples, *((pixels, channels, 1) if channels_last else (1, channels, pixels))), given["x"].dtype
        parameter_dtype = next((given[name].dtype for name in ("weight", "bias") if given[name] is not None), self.dtype)
        self.problem = (self.dtype, parameter_dtype, *self.shape, channels // groups, KINDS[act], float(NUMBERS[act]))
        masked = given["residual"] is not None and act in TWO_SLOPES
        self.mask = guarded.empty(samples * mask_bytes(self.shape[1:]), torch.uint8) if masked else None
        self.mean, self.invstd = (guarded.empty(samples * groups, torch.float64) for _ in range(2))
        self.y, self.grad_x, self.grad_residual = (guarded.empty(given["x"].numel(), self.dtype, offset=offset) for _ in range(3))
        self.grad_weight, self.grad_bias = (
            None if given[name] is None else guarded.empty(channels, parameter_dtype) for name in ("weight", "bias")
        )
        if given["residual"] is None:
            self.grad_residual = None

    def in_memory(self, tensor, offset):
        if tensor is None or tensor.dim() == 1:
            return None if tensor is None else self.guarded.copy(tensor)
        return self.guarded.copy(tensor.transpose(1, 2) if self.channels_last else tensor, offset=offset)

    def from_memory(self, tensor):
        if tensor is None:
            return None
        samples, rows, channels, inner = self.shape
        return tensor.view(samples, rows, channels).transpose(1, 2) if self.channels_last else tensor.view(samples, channels, inner)

    def forward(self, eps=1e-5):
        self.call("group_norm_act_forward", *self.forward_operands(), eps)

    def forward_operands(self):
        given = [self.given[name] for name in ("x", "residual", "weight", "bias")]
        return (*self.problem, *given, self.mean, self.invstd, self.y, self.mask)

    def backward(self):
        residual = None if self.mask is not None else self.given["residual"]
        known = (self.given["grad_y"], self.given["x"], residual, self.mask, self.given["weight"], self.given["bias"])
        gradients = (self.grad_x, self.grad_weight, self.grad_bias, self.grad_residual)
        self.call("group_norm_act_backward", *self.problem, *known, self.mean, self.invstd, *gradients)

    def result(self):
        found = {name: self.from_memory(getattr(self, name)) for name in ("y", "grad_x", "grad_residual")}
        return found | {"grad_weight": self.grad_weight, "grad_bias": self.grad_bias}


def assert_all_accurate(result, given, groups, act, most=math.inf):
    theirs = call_operator(norm_act(reference, groups), given, True, act)
    exact = exact_result(given, True, act, num_groups=groups)
    scales = scales_of(given, True, act, 0.1, 1e-5, groups)
    for name, actual in result.items():
        if actual is not None:
            assert_accurate(name, actual, theirs[name], exact[name], per="tensor", scale=scales.get(name, 0.0), most=most)


def operands(shape, dtype=torch.float32, **options):
    return arguments(shape, dtype, running=False, **options)


def sample(shape, groups, dtype, act, *, residual):
    given = cast(operands(shape, residual=residual), dtype) if dtype in SIXTEEN_BITS else operands(shape, dtype, residual=residual)
    return without_kinks(given, True, act, num_groups=groups)


@each_dtype
def test_shapes(call, guarded, dtype):
    acts_in_turn = itertools.cycle(ACTS)
    for index, ((shape, groups), channels_last) in enumerate(itertools.product(SHAPES, LAYOUTS)):
        # 16-bit dtypes differ only in conversions.
        if dtype == torch.float16 and index % 3 > 0:
            continue
        act = next(acts_in_turn)
        given = sample(shape, groups, dtype, act, residual=index % 4 > 1)
        kernels = Kernels(call, guarded, given, groups, act, channels_last, offset=index % 5 == 4)
        kernels.forward()
        kernels.backward()
        assert_all_accurate(kernels.result(), given, groups, act)


@each_dtype
@each_act
def test_activations(call, guarded, dtype, act):
    for channels_last, residual in itertools.product(LAYOUTS, (False, True)):
        given = sample((3, 12, 70), 3, dtype, act, residual=residual)
        kernels = Kernels(call, guarded, given, 3, act, channels_last)
        kernels.forward()
        # gk.recompute's second pass.
        y = kernels.y.clone()
        kernels.y.zero_()
        call("group_norm_act_elemt", *kernels.forward_operands())
        assert_bitwise_equal("y", kernels.y, y)
        kernels.backward()
        assert_all_accurate(kernels.result(), given, 3, act)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_16_bits_with_float32_parameters(call, guarded, dtype):
    for channels_last, act in itertools.product(LAYOUTS, ("relu", "swish")):
        wide = operands((2, 24, 72), residual=True)
        given = without_kinks(wide | cast({name: wide[name] for name in ("x", "residual", "grad_y")}, dtype), True, act, num_groups=6)
        kernels = Kernels(call, guarded, given, 6, act, channels_last)
        kernels.forward()
        kernels.backward()
        assert_all_accurate(kernels.result(), given, 6, act)


@pytest.mark.parametrize("left_out", ["weight", "bias", "weight bias"])
def test_operands_left_out(call, guarded, left_out):
    for channels_last, groups in itertools.product(LAYOUTS, (4, 20)):
        given = sample((3, 20, 136), groups, torch.float32, "elu", residual=True) | dict.fromkeys(left_out.split())
        kernels = Kernels(call, guarded, given, groups, "elu", channels_last)
        kernels.forward()
        kernels.backward()
        # Not torch's, which has no gradient of a bias without a weight.
        exact = exact_result(cast(given, torch.float64), True, "elu", num_groups=groups)
        for name, actual in kernels.result().items():
            assert (actual is None) == (exact[name] is None), name
            if actual is not None:
                expected = torch.from_numpy(exact[name].astype("float32"))
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_of_zero_and_of_many_sizes(call, guarded, dtype):
    """A channel with a weight of 0 still has the gradient that its elements get by the statistics of their set."""
    for channels_last in LAYOUTS:
        given = operands((2, 8, 99), dtype)
        given["weight"] = torch.tensor([0.0, 1.0, -1e-3, 1e3, 0.0, 0.0, 0.0, 0.0], dtype=dtype)
        kernels = Kernels(call, guarded, given, 2, "swish", channels_last)
        kernels.forward()
        kernels.backward()
        assert_all_accurate(kernels.result(), given, 2, "swish")
        grad_x = kernels.result()["grad_x"]
        assert grad_x[:, 0].count_nonzero() == grad_x[:, 0].numel() and not grad_x[:, 4:].any()


@pytest.mark.parametrize("inputs", HARD_INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_statistics_of_hard_inputs(call, guarded, dtype, inputs):
    """At most 16 ulp, as in tests/test_simt_batch_norm_act.py."""
    shape, groups = (2, 6, 2731), 2
    x = hard_input(inputs, shape, dtype)
    if not x.isfinite().all():
        pytest.skip(f"{inputs} overflows in {dtype}")
    for channels_last in LAYOUTS:
        given = operands(shape, torch.float32 if dtype in SIXTEEN_BITS else dtype, x=x)
        given = without_kinks(given | {"grad_y": given["grad_y"].to(dtype)}, True, "leaky_relu", num_groups=groups)
        kernels = Kernels(call, guarded, given, groups, "leaky_relu", channels_last)
        kernels.forward()
        kernels.backward()
        assert_all_accurate(kernels.result(), given, groups, "leaky_relu", most=16.0)


@each_dtype
def test_nan_and_infinity_stay_in_their_set(call, guarded, dtype):
    for (shape, groups), channels_last in itertools.product([((3, 12, 9), 6), ((3, 12, 136), 6), ((3, 6, 49), 6)], LAYOUTS):
        given = cast(operands(shape), dtype)
        clean = Kernels(call, guarded, given, groups, "identity", channels_last)
        clean.forward()
        clean.backward()
        x, of_set = given["x"].clone(), shape[1] // groups
        given["x"] = x
        x[1, 2 * of_set, 0], x[0, 4 * of_set, -1] = math.nan, math.inf
        x[2, 5 * of_set, 0] = x[2, 6 * of_set - 1, -1] = -math.inf
        x[0, 0, 0], x[0, of_set - 1, 1] = math.inf, -math.inf
        kernels = Kernels(call, guarded, given, groups, "identity", channels_last)
        kernels.forward()
        kernels.backward()
        touched = torch.zeros(shape[0], groups, dtype=torch.bool)
        touched[1, 2] = touched[0, 4] = touched[2, 5] = touched[0, 0] = True
        expected = torch.tensor([math.nan, math.inf, math.nan, -math.inf], dtype=torch.float64)
        assert_bitwise_equal("mean", kernels.mean.view(touched.shape)[touched], expected)
        assert kernels.invstd.isnan().equal(touched.flatten())
        by_element = touched.repeat_interleave(of_set, 1)
        for name in ("y", "grad_x"):
            actual, wanted = kernels.result()[name], clean.result()[name]
            assert actual[by_element].isnan().all()
            assert_bitwise_equal(f"{name} elsewhere", actual[~by_element], wanted[~by_element])


def test_a_constant_set_without_eps(call, guarded):
    """invstd is inf, and y nan, as torch's."""
    for channels_last, groups in itertools.product(LAYOUTS, (2, 4)):
        given = operands((2, 4, 70)) | {"x": torch.full((2, 4, 70), 2.0)}
        kernels = Kernels(call, guarded, given, groups, "identity", channels_last)
        kernels.forward(eps=0.0)
        assert (kernels.invstd == math.inf).all() and (kernels.mean == 2.0).all() and kernels.y.isnan().all()


def test_only_the_gradients_that_are_needed(call, guarded):
    """Gradients that are not needed are null pointers; the others do not change."""
    names = ("grad_x", "grad_weight", "grad_bias", "grad_residual")
    for channels_last, groups in itertools.product(LAYOUTS, (4, 20)):
        kernels = Kernels(call, guarded, operands((3, 20, 70), residual=True), groups, "swish", channels_last)
        kernels.forward()
        kernels.backward()
        whole = {name: getattr(kernels, name) for name in names}
        for wanted in (*[(name,) for name in names], ("grad_weight", "grad_bias"), ("grad_x", "grad_bias")):
            for name in names:
                setattr(kernels, name, torch.full_like(whole[name], 7.0) if name in wanted else None)
            kernels.backward()
            for name in wanted:
                assert_bitwise_equal(name, getattr(kernels, name), whole[name])


def test_results_do_not_depend_on_the_order_of_blocks(call, guarded, monkeypatch):
    for shape, groups, channels_last in (((2, 20, 2049), 4, True), ((3, 6, 8193), 2, False), ((3, 12, 49), 3, False)):
        results = []
        for order in ("0", "1"):
            monkeypatch.setenv("SIMT_REVERSED", order)
            results.append(Kernels(call, guarded, operands(shape, residual=True), groups, "relu", channels_last))
            results[-1].forward()
            results[-1].backward()
        for name, tensor in results[0].result().items():
            assert_bitwise_equal(f"{shape} {name}", tensor, results[1].result()[name])


def test_every_byte_of_the_mask_is_written(call, guarded):
    """Also those that no element has a bit in."""
    for shape, channels_last in itertools.product([(3, 5, 49), (2, 9, 63), (3, 3, 65), (2, 5, 7)], LAYOUTS):
        masks = []
        for before in (0, 255):
            kernels = Kernels(call, guarded, operands(shape, residual=True), 1, "relu", channels_last)
            kernels.mask.fill_(before)
            kernels.forward()
            masks.append(kernels.mask)
        assert_bitwise_equal(f"mask of {shape}", *masks)


def test_mask_equals_the_cpus(call, guarded):
    """As in tests/test_simt_batch_norm_act.py; not with a row of 48 to 63 pixels, where the CPU has other bytes."""
    for (shape, channels_last), act in itertools.product([((3, 4, 65), False), ((2, 6, 200), False), ((2, 65, 70), True)], TWO_SLOPES):
        given = operands(shape, residual=True)
        kernels = Kernels(call, guarded, given, 1, act, channels_last)
        kernels.forward()
        images = {name: given[name].unsqueeze(-1) for name in ("x", "residual")}
        if channels_last:
            images = {name: image.contiguous(memory_format=torch.channels_last) for name, image in images.items()}
        known = (images["x"], 1, given["weight"], given["bias"], images["residual"])
        parts = torch.ops.gradkernels.group_norm_act(*known, 1e-5, act, NUMBERS[act])
        assert_bitwise_equal("mask", kernels.mask, parts[3])


def test_a_sample_has_the_bits_that_it_has_alone(call, guarded):
    """The cut of a sample depends on how many there are; without parts, its sums do not."""
    for channels_last, groups in itertools.product(LAYOUTS, (4, 20)):
        given = operands((3, 20, 65), residual=True)
        batch = Kernels(call, guarded, given, groups, "relu", channels_last)
        batch.forward()
        batch.backward()
        for i in range(3):
            elements = {name: None if tensor is None or tensor.dim() == 1 else tensor[i : i + 1] for name, tensor in given.items()}
            alone = Kernels(call, guarded, given | {k: v for k, v in elements.items() if v is not None}, groups, "relu", channels_last)
            alone.forward()
            alone.backward()
            for name in ("y", "grad_x", "grad_residual"):
                assert_bitwise_equal(f"{name} of sample {i}", batch.result()[name][i : i + 1], alone.result()[name])
            assert_bitwise_equal("mask", batch.mask.view(3, -1)[i], alone.mask)


def test_one_group_of_one_sample_is_batch_norm(call, guarded):
    """With sets of one channel and one sample, both norms launch the same kernels on the same numbers."""
    for dtype in DTYPES:
        given = sample((1, 20, 70), 20, dtype, "swish", residual=True)
        group = Kernels(call, guarded, given, 20, "swish", False)
        batch = BatchNorm(call, guarded, given, "swish")
        group.forward()
        batch.forward(True)
        group.backward()
        batch.backward(True)
        for name, tensor in group.result().items():
            assert_bitwise_equal(name, tensor, batch.result()[name])
