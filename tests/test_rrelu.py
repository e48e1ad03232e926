"""rrelu in training: slopes that are drawn."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from accuracy import DTYPES, SIXTEEN_BITS, assert_bitwise_equal, outcome
from activation_calls import LAYOUTS, assert_drew_slopes, each_dtype, each_layout, leaf, value_and_grad


def drawn_slopes(count, lower=1 / 8, upper=1 / 3, dtype=torch.float32):
    return -gk.rrelu(torch.full((count,), -1.0, dtype=dtype), lower, upper, training=True)


def test_slopes_are_uniform():
    """Kolmogorov-Smirnov test: the largest distance exceeds 1.95 / sqrt(n) in 1 of 1000 uniform samples."""
    count = 1_000_000
    for lower, upper in ((1 / 8, 1 / 3), (0.0, 1.0), (-2.0, 5.0)):
        slopes = drawn_slopes(count, lower, upper, torch.float64)
        assert lower <= slopes.min() and slopes.max() <= upper
        expected = lower + (upper - lower) * (torch.arange(count) + 0.5) / count
        assert ((slopes.sort().values - expected).abs().max() / (upper - lower)).item() < 1.95 / math.sqrt(count)
        # Both ends are reached: about 20 of a million slopes are expected in each interval.
        assert (slopes < lower + 2e-5 * (upper - lower)).any() and (slopes > upper - 2e-5 * (upper - lower)).any()


def test_slopes_are_uniform_in_each_place_of_a_packet():
    """Chi-square test of 64 places and 16 bins: with 1023 degrees of freedom 1 of 1000 samples exceeds 1168."""
    slopes = drawn_slopes(1 << 20, 0.0, 1.0)
    bins = torch.bincount(torch.arange(1 << 20) % 64 * 16 + (slopes * 16).long(), minlength=1024).double()
    assert (((bins - 1024) ** 2) / 1024).sum() < 1168


def test_slopes_do_not_depend_on_their_neighbours_nor_on_the_last_draw():
    count = 1_000_000
    first, second = (drawn_slopes(count, -1.0, 1.0, torch.float64) * math.sqrt(3) for _ in range(2))
    for shift in (1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 32768):
        assert abs((first[shift:] * first[:-shift]).mean()) < 4.5 / math.sqrt(count)
    assert abs((first * second).mean()) < 4.5 / math.sqrt(count)
    assert first.unique().numel() > 0.95 * count


def test_slopes_between_equal_and_close_bounds():
    assert_bitwise_equal("slopes", drawn_slopes(65, 0.3, 0.3), torch.full((65,), 0.3))
    for dtype in SIXTEEN_BITS:
        slopes = drawn_slopes(100_003, 0.1, 0.1004, dtype)
        assert slopes.min() >= torch.tensor(0.1).to(dtype) and slopes.max() <= torch.tensor(0.1004).to(dtype)


@each_dtype
def test_slopes_depend_only_on_the_seed_and_the_place(dtype, each_thread_count):
    """Not on the dtype, the layout, the number of threads, on in place or not, or on a gradient."""
    x = torch.randn(3, 8, 50, 50, dtype=dtype)

    def run(x, **kwargs):
        torch.manual_seed(7)
        return gk.rrelu(x, training=True, **kwargs)

    expected = run(x)
    assert_bitwise_equal("with a gradient", run(leaf(x)).detach(), expected)
    assert_bitwise_equal("in place", run(x.clone(), inplace=True), expected)
    for each in each_thread_count(lambda: run(x)):
        assert_bitwise_equal("threads", each, expected)
    if dtype != torch.float64:
        assert_bitwise_equal("rounded from float32", run(x.float()).to(dtype), expected)
    transposed = x.permute(3, 1, 0, 2)
    assert_bitwise_equal("in storage order", run(transposed).permute(2, 1, 3, 0), expected)
    assert_bitwise_equal("the first elements", run(x.view(-1)[:1009]), expected.view(-1)[:1009])
    assert not torch.equal(gk.rrelu(x, training=True), expected)


def test_the_seed_is_drawn_from_torchs_generator(device):
    x = torch.full((65,), -1.0)
    # Each device has a generator of its own.
    generator = torch.random if device == "cpu" else torch.cuda
    before = generator.get_rng_state()
    first = gk.rrelu(x, training=True)
    assert not torch.equal(generator.get_rng_state(), before)
    assert not torch.equal(gk.rrelu(x, training=True), first)
    generator.set_rng_state(before)
    assert_bitwise_equal("again", gk.rrelu(x, training=True), first)
    with torch.random.fork_rng():
        gk.rrelu(x, training=True)
    state = generator.get_rng_state()
    gk.rrelu(x)
    assert torch.equal(generator.get_rng_state(), state), "eval draws nothing"


@each_dtype
@each_layout
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_gradient_has_the_slopes_of_its_own_output(dtype, layout, inplace):
    if inplace and layout == "expanded":
        return
    x = LAYOUTS[layout](lambda *size: torch.randn(*size, dtype=dtype))
    for grad_y in (torch.randn(x.shape, dtype=dtype), torch.randn_like(x)):
        torch.manual_seed(3)
        start = leaf(x)
        y = gk.rrelu(start * 1 if inplace else start, 0.25, 0.75, training=True, inplace=inplace)
        (grad_x,) = torch.autograd.grad(y, start, grad_y)
        # The same seed draws the same slopes again, in the storage order of y.
        torch.manual_seed(3)
        slopes = -gk.rrelu(torch.full_like(y.detach(), -1.0, dtype=torch.float64), 0.25, 0.75, training=True)
        assert_close(y.detach(), torch.where(x > 0, x, slopes * x).to(dtype))
        assert_close(grad_x, torch.where(x > 0, grad_y, slopes * grad_y).to(dtype))
        assert y.stride() == F.leaky_relu(x).stride()


@each_dtype
def test_nan_inf_and_zero_in_rrelu(dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0] * 13, dtype=dtype)
    y, grad_x = value_and_grad(lambda x: gk.rrelu(x, 0.25, 0.75, training=True), x, torch.ones_like(x))
    assert_bitwise_equal("y", y, x)
    # torch draws no slope for a nan.
    assert ((grad_x == 1) == ((x == math.inf) | x.isnan())).all() and (grad_x.isfinite() & (grad_x >= 0.25)).all()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_rrelu_checkpoint_draws_the_same_slopes_again(use_reentrant):
    x = leaf(torch.full((1009,), -1.0))
    y = checkpoint(lambda x: gk.rrelu(x * 1, training=True), x, use_reentrant=use_reentrant)
    y.sum().backward()
    assert_bitwise_equal("slopes", x.grad, -y.detach())


def test_rrelu_second_derivatives():
    """The gradient is linear in grad_y, with the slopes of the output."""
    x, grad_y = torch.randn(65, dtype=torch.float64, requires_grad=True), torch.randn(65, dtype=torch.float64, requires_grad=True)
    y = gk.rrelu(x, training=True)
    (grad_x,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
    (slopes,) = torch.autograd.grad(grad_x, grad_y, torch.ones_like(grad_x))
    assert_close(slopes * x.detach(), y.detach())


def test_rrelu_functorch():
    """Each gradient has the slopes of its output."""
    x = torch.full((4, 65), -1.0)

    def slopes_and_gradient(x):
        y, vjp = torch.func.vjp(lambda x: gk.rrelu(x, training=True), x)
        return -y, vjp(torch.ones_like(y))[0]

    slopes, grad_x = slopes_and_gradient(x)
    assert_close(grad_x, slopes)
    y, tangent = torch.func.jvp(lambda x: gk.rrelu(x, training=True), (x,), (torch.ones_like(x),))
    assert_close(tangent, -y)
    for randomness in ("different", "same"):
        slopes, grad_x = torch.func.vmap(slopes_and_gradient, randomness=randomness)(x)
        assert_close(grad_x, slopes)
        assert ((slopes >= 1 / 8) & (slopes <= 1 / 3)).all() and slopes[0].unique().numel() > 60
        assert torch.equal(slopes[0], slopes[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: gk.rrelu(x, training=True))(x)


def test_rrelu_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gk.rrelu(x, training=True), fullgraph=True, backend="aot_eager")
    x = torch.full((1009,), -1.0)
    y, grad_x = value_and_grad(compiled, x, torch.ones_like(x))
    assert_close(grad_x, -y)
    assert_drew_slopes(x, y, grad_x, 1 / 8, 1 / 3)
    assert y.unique().numel() > 900


def test_rrelu_in_eval_equals_torchs_in_every_bit():
    for dtype in DTYPES:
        x, grad_y = torch.randn(1009, dtype=dtype), torch.randn(1009, dtype=dtype)
        for bounds in ((), (0.1, 0.7), (-0.3, 0.1)):
            for ours, torchs in zip(value_and_grad(gk.rrelu, x, grad_y, *bounds), value_and_grad(F.rrelu, x, grad_y, *bounds), strict=True):
                assert_bitwise_equal("rrelu in eval", ours, torchs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
@pytest.mark.parametrize("bounds", [(0.5, 0.25), (math.nan, 0.5), (0.5, math.nan), (0.0, math.inf), (-math.inf, 0.0)], ids=str)
def test_rrelu_with_bounds_that_torch_refuses(bounds, inplace, training):
    x = torch.tensor([1.0, -1.0])
    expected = outcome(F.rrelu, x.clone(), *bounds, training, inplace)
    given = x.clone()
    actual = outcome(gk.rrelu, given, *bounds, training, inplace)
    if isinstance(expected, tuple):
        assert actual == expected
        assert_bitwise_equal("x", given, x)
    else:
        assert isinstance(actual, torch.Tensor)
