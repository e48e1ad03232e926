"""The operators on a GPU beside themselves on the CPU, at the kernels' seams; streams, graphs and what must not wait. Skipped without one.

Short enough for compute-sanitizer (bench/on_gpu.sh). What the operators owe to torch is tested in the files of their stems, there too.
"""

import pytest
import torch

import gradkernels as gk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no GPU to use")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, 8, 9, 255, 2047, 2049, 8193, 100_003]
CHANNEL_SHAPES = [(1, 1, 1), (3, 3, 49), (2, 65, 64), (130, 64), (9, 520), (2, 3, 40_001)]
ACTIVATIONS = {
    "leaky_relu": lambda x: gk.leaky_relu(x, -0.2),
    "elu": lambda x: gk.elu(x, 1.3),
    "swish": lambda x: gk.swish(x, 1.7),
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def near(name, actual, expected):
    """Within a few roundings: the CPU's instructions are not the GPU's."""
    epsilon = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(
        actual.cpu(), expected, rtol=4 * epsilon, atol=8 * epsilon, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def value_and_grads(function, *operands):
    leaves = [each.detach().clone().requires_grad_() for each in operands]
    y = function(*leaves)
    grad_y = torch.linspace(-1, 1, max(y.numel(), 1), dtype=torch.float64)[: y.numel()].to(y).view_as(y)
    return y.detach(), *torch.autograd.grad(y, leaves, grad_y)


def assert_same(name, function, *operands):
    expected = value_and_grads(function, *operands)
    for offset in (0, 1):
        moved = []
        for each in operands:
            room = torch.empty(each.numel() + offset, dtype=each.dtype, device="cuda")
            moved.append(room[offset:].view(each.shape).copy_(each))
        for i, (actual, wanted) in enumerate(zip(value_and_grads(function, *moved), expected, strict=True)):
            near(f"{name}, result {i}, {offset} elements behind a packet", actual, wanted)


@each_dtype
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation(act, dtype):
    for size in SIZES:
        assert_same(f"{act} of {size}", ACTIVATIONS[act], torch.randn(size).to(dtype))


@each_dtype
@pytest.mark.parametrize("function", [gk.prelu, gk.swish], ids=["prelu", "swish"])
def test_learnt_parameter(function, dtype):
    for shape in CHANNEL_SHAPES:
        x, parameter = torch.randn(shape).to(dtype), (torch.rand(shape[1]) + 0.25).to(dtype)
        expected = value_and_grads(function, x, parameter)
        actual = value_and_grads(function, x.cuda(), parameter.cuda())
        near(f"y {shape}", actual[0], expected[0])
        near(f"grad_x {shape}", actual[1], expected[1])
        near(f"grad of the parameter {shape}", actual[2] / x[:, 0].numel(), expected[2] / x[:, 0].numel())


@each_dtype
def test_rrelu_draws_what_the_cpu_draws(dtype):
    seed = torch.tensor(12345)
    for size in SIZES:
        x = torch.randn(size).to(dtype)
        y, mask = torch.ops.gradkernels.rrelu_with_mask(x, seed, 0.1, 0.3)
        on_gpu = torch.ops.gradkernels.rrelu_with_mask(x.cuda(), seed.cuda(), 0.1, 0.3)
        near(f"y of {size}", on_gpu[0], y)
        assert torch.equal(on_gpu[1].cpu(), mask)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clipping(norm_type):
    sizes = [*SIZES, *range(1, 40), 300_001]
    grads = [torch.randn(size).to(DTYPES[i % 4]) for i, size in enumerate(sizes)]
    on_gpu = [grad.cuda() for grad in grads]
    expected = torch.ops.gradkernels.grad_norms(grads, norm_type)
    for actual, wanted in zip(torch.ops.gradkernels.grad_norms(on_gpu, norm_type), expected, strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-12, atol=0)
    torch.ops.gradkernels.clip_grads_with_norm_(grads, 1.0, expected[3])
    torch.ops.gradkernels.clip_grads_with_norm_(on_gpu, 1.0, expected[3].cuda())
    for actual, wanted in zip(on_gpu, grads, strict=True):
        near(f"{wanted.numel()} {wanted.dtype}", actual, wanted)


@each_dtype
def test_rmsprop(dtype):
    options = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "centered": True}
    ours = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in (1, 9, 2049, 70_001)]
    on_gpu = [torch.nn.Parameter(each.detach().cuda()) for each in ours]
    optimizers = gk.optim.RMSprop(ours, **options), gk.optim.RMSprop(on_gpu, **options)
    for _ in range(3):
        for here, there in zip(ours, on_gpu, strict=True):
            here.grad = torch.randn_like(here)
            there.grad = here.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    for here, there in zip(ours, on_gpu, strict=True):
        near(f"{here.numel()}", there.detach(), here.detach())


def step(x, grads):
    y = gk.elu(gk.leaky_relu(x, 0.1), 0.7)
    total = gk.get_total_norm(grads)
    torch.ops.gradkernels.clip_grads_with_norm_(grads, 1.0, total)
    return y, total


def test_nothing_waits_for_the_gpu():
    x, grads = torch.randn(10_000, device="cuda", requires_grad=True), [torch.randn(1000, device="cuda") for _ in range(5)]
    step(x, grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, _ = step(x, grads)
        y.backward(torch.ones_like(y))
        gk.rrelu(x, training=True).sum().backward()
        gk.prelu(x, torch.full((1,), 0.2, device="cuda", requires_grad=True)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_on_new_values():
    x, grads = torch.randn(10_000, device="cuda"), [torch.randn(1000, device="cuda") for _ in range(5)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(x, [grad.clone() for grad in grads])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, total = step(x, grads)
    new_x, new_grads = torch.randn(10_000, device="cuda"), [torch.randn(1000, device="cuda") for _ in range(5)]
    x.copy_(new_x)
    for grad, new in zip(grads, new_grads, strict=True):
        grad.copy_(new)
    graph.replay()
    expected_y, expected_total = step(new_x, new_grads)
    assert torch.equal(y, expected_y) and torch.equal(total, expected_total)
    assert all(torch.equal(grad, new) for grad, new in zip(grads, new_grads, strict=True))


def test_results_are_the_same_bit_for_bit():
    x, beta = torch.randn(64, 33, 1000, device="cuda"), torch.rand(33, device="cuda")
    first, second = (value_and_grads(gk.swish, x, beta) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_kernels_run_on_the_device_of_the_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x = torch.randn(1000)
    near("elu on the second GPU", gk.elu(x.to("cuda:1")), gk.elu(x))
