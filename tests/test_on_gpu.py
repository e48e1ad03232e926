"""The operators on a GPU, compared with the CPU, at the seams of the kernels; streams and CUDA graphs.

Skipped without a GPU, and short enough for compute-sanitizer (bench/on_gpu.sh). The files of the operators
test their agreement with torch, also on a GPU.
"""

import itertools
import re

import pytest
import torch

import gradkernels as gk
from accuracy import DTYPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no GPU to use")

SIZES = [0, 1, 7, 8, 9, 255, 2047, 2049, 8193, 100_003]
CHANNEL_SHAPES = [(1, 1, 1), (3, 3, 49), (2, 65, 64), (130, 64), (9, 520), (2, 3, 40_001)]
ACTIVATIONS = {
    "leaky_relu": lambda x: gk.leaky_relu(x, -0.2),
    "elu": lambda x: gk.elu(x, 1.3),
    "swish": lambda x: gk.swish(x, 1.7),
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def near(name, actual, expected):
    """Within a few roundings, because the CPU and the GPU have different instructions."""
    epsilon = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(
        actual.cpu(), expected, rtol=4 * epsilon, atol=8 * epsilon, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def value_and_grads(function, *operands):
    # No copies: these would be aligned to 16 bytes, and assert_same needs pointers that are not.
    leaves = [each.detach().requires_grad_() for each in operands]
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
            near(f"{name}, result {i}, offset {offset}", actual, wanted)


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
    norms, max_abs, nonfinite, total = (each.cpu() for each in torch.ops.gradkernels.grad_norms(on_gpu, norm_type))
    # On a GPU, eight 16-bit terms are summed in float32 first, with three roundings.
    sixteen_bits = torch.tensor([grad.element_size() == 2 for grad in grads])
    for are_16_bits, rtol in ((False, 1e-12), (True, 3 * 2.0**-24)):
        mine = sixteen_bits == are_16_bits
        torch.testing.assert_close(norms[mine], expected[0][mine], rtol=rtol, atol=0)
    torch.testing.assert_close(total, expected[3], rtol=3 * 2.0**-24, atol=0)
    assert torch.equal(max_abs, expected[1]) and torch.equal(nonfinite, expected[2])
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


def batch_norm_act(x, statistics, weight, bias, residual=None, act="swish", training=True):
    return gk.batch_norm_act(x, *statistics, weight, bias, training, 0.1, 1e-5, act=act, residual=residual)


# One shape or more for each kernel: rows of channels, groups of channels, images in packets of 16 and of 8 bytes
# and in single elements, one part and many.
BATCH_NORM_SHAPES = [(130, 64), (1025, 65), (4, 3, 7, 7), (32, 16, 7, 7), (6, 65, 9, 7), (3, 2, 41, 43), (8, 24, 14, 14)]
BATCH_NORM_SHAPES += [(16, 5, 56, 56), (2, 1, 1100, 1100)]


def close_statistics(name, actual, expected, terms=None):
    """The GPU sums in another order than the CPU, and an invstd that it rounds another way changes all terms of a sum alike: by ulps
    of the type that computes, or as many as the exponential of 16 bits is wrong.
    """
    epsilon = torch.finfo(expected.dtype).eps
    computing = {torch.float64: 2**-53, torch.float32: 2**-24}.get(expected.dtype, 2**-19)
    absolute = 32 * epsilon if terms is None else 32 * computing * terms
    torch.testing.assert_close(actual.cpu(), expected, rtol=16 * epsilon, atol=absolute, msg=lambda text: f"{name}: {text}")


@each_dtype
@pytest.mark.parametrize("shape", BATCH_NORM_SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_batch_norm_act(shape, channels_last, dtype):
    if channels_last and len(shape) != 4:
        pytest.skip("there is one layout")
    x, residual = (torch.randn(shape).to(dtype) for _ in range(2))
    if channels_last:
        x, residual = (each.contiguous(memory_format=torch.channels_last) for each in (x, residual))
    weight, bias = ((torch.rand(shape[1]) + 0.5).to(dtype) for _ in range(2))
    for training, act, operands in (
        (True, "elu", (x, weight, bias)),
        (True, "relu", (x, weight, bias, residual)),
        (False, "swish", (x, weight, bias)),
    ):
        statistics = [torch.zeros(shape[1], dtype=dtype), torch.ones(shape[1], dtype=dtype)]
        on_gpu = [each.cuda() for each in statistics]

        def call(x, weight, bias, residual=None, statistics=statistics, act=act, training=training):
            return batch_norm_act(x, statistics, weight, bias, residual, act, training)

        expected = value_and_grads(call, *operands)
        actual = value_and_grads(
            lambda *moved, call=call, on_gpu=on_gpu: call(*moved, statistics=on_gpu), *(each.cuda() for each in operands)
        )
        for i, (one, wanted) in enumerate(zip([*actual, *on_gpu], [*expected, *statistics], strict=True)):
            # Gradients of weight and bias are sums over a channel.
            terms = None if wanted.dim() > 1 or i >= len(expected) else x.numel() / shape[1]
            close_statistics(f"{act}, result {i}", one, wanted, terms)


# (samples, channels, ...), groups. Sets of one channel, of a few and of all; slabs with and without whole sets; samples in
# packets of 16 and of 8 bytes and in single elements, of one part and of many.
GROUP_NORM_SHAPES = [((2, 320, 16, 16), 32), ((3, 64, 7, 7), 8), ((5, 65, 9, 9), 13), ((2, 24, 14, 14), 1), ((1, 6, 300, 301), 2)]
GROUP_NORM_SHAPES += [((4, 32, 40, 40), 32), ((64, 16, 8, 8), 4)]


@each_dtype
@pytest.mark.parametrize(("shape", "groups"), GROUP_NORM_SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_group_norm_act(shape, groups, channels_last, dtype):
    x, residual = (torch.randn(shape).to(dtype) for _ in range(2))
    if channels_last:
        x, residual = (each.contiguous(memory_format=torch.channels_last) for each in (x, residual))
    weight, bias = ((torch.rand(shape[1]) + 0.5).to(dtype) for _ in range(2))
    for act, operands in (("swish", (x, weight, bias)), ("relu", (x, weight, bias, residual))):

        def call(x, weight, bias, residual=None, act=act):
            return gk.group_norm_act(x, groups, weight, bias, act=act, residual=residual)

        expected = value_and_grads(call, *operands)
        for i, (one, wanted) in enumerate(zip(value_and_grads(call, *(each.cuda() for each in operands)), expected, strict=True)):
            # Gradients of weight and bias are sums over a channel.
            close_statistics(f"{act}, result {i}", one, wanted, None if wanted.dim() > 1 else x.numel() / shape[1])


@each_dtype
def test_a_little_of_everything(dtype):
    """Every kernel once, at sizes with a remainder, for compute-sanitizer, which makes each call slow."""
    x, weight = torch.randn(3, 9, 7, 7).to(dtype).cuda(), torch.rand(9).to(dtype).cuda()
    statistics = [torch.zeros_like(weight), torch.ones_like(weight)]
    for each in (x, x[:, :, 0, 0], torch.randn(2, 9, 71).to(dtype).cuda()):
        for act, residual in (("swish", None), ("relu", each.clone()), ("elu", each.clone())):
            value_and_grads(lambda x, w, act=act, residual=residual: batch_norm_act(x, statistics, w, None, residual, act), each, weight)
        batch_norm_act(each, statistics, weight, None, training=False)
        moments = torch.ops.gradkernels.batch_norm_act_stats(each)
        mean, invstd, count = torch.ops.gradkernels.batch_norm_act_gather_stats(moments[None], *statistics, None, 0.1, 1e-5)
        known = (mean, invstd, weight, None, None)
        torch.ops.gradkernels.batch_norm_act_elemt(each, *known, "swish", 1.0)
        sums, _ = torch.ops.gradkernels.batch_norm_act_backward_reduce(each, each, *known, None, "swish", 1.0, False)
        torch.ops.gradkernels.batch_norm_act_backward_elemt(each, each, *known, None, "swish", 1.0, sums, count)
        for function in (gk.prelu, gk.swish):
            value_and_grads(function, each, weight)
    for images, groups in itertools.product((x, x.contiguous(memory_format=torch.channels_last)), (3, 9)):
        for residual in (None, images.clone()):
            settings = {"act": "relu", "residual": residual}
            value_and_grads(lambda x, w, groups=groups, settings=settings: gk.group_norm_act(x, groups, w, **settings), images, weight)
    for function in (gk.leaky_relu, gk.elu, gk.swish, lambda x: gk.rrelu(x, training=True)):
        value_and_grads(function, x.flatten()[:1013])
    parameters = [torch.nn.Parameter(each.clone()) for each in (x, weight)]
    for each in parameters:
        each.grad = torch.randn_like(each)
    for norm_type in (1.0, 2.0, float("inf")):
        gk.clip_grad_norm_(parameters, 0.1, norm_type)
    gk.clip_grad_value_(parameters, 0.01)
    gk.optim.RMSprop(parameters, momentum=0.9, centered=True).step()
    torch.cuda.synchronize()


def parameters_with(grads):
    parameters = [torch.nn.Parameter(torch.empty_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    return parameters


def step(x, grads):
    y = gk.elu(gk.leaky_relu(x, 0.1), 0.7)
    # Four tensors, because views of one tensor share a version counter, which the statistics raise.
    weight, bias, mean, var = (torch.ones(10, device="cuda") for _ in range(4))
    y = batch_norm_act(y.view(-1, 10, 100), (mean, var), weight, bias).view_as(y) + batch_norm_act(
        y.view(-1, 10), (mean, var), weight, bias
    ).view_as(y)
    parameters = parameters_with(grads)
    total = gk.get_total_norm(grads)
    gk.clip_grads_with_norm_(parameters, 1.0, total)
    return y, total, gk.clip_grad_norm_(parameters, 0.5)


def kernels_of(call):
    """The names of our kernels that a call launches."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    launched = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return re.findall(r"gradkernels::cuda::.*?(\w+_kernel)", "\n".join(launched))


def test_batch_norm_act_takes_two_passes():
    x, grad_y = (torch.randn(64, 256, 56, 56, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    module = gk.BatchNormAct2d(256, act="leaky_relu", device="cuda")
    assert kernels_of(lambda: module(x)) == ["batch_norm_act_stats_kernel", "batch_norm_act_normalise_kernel"]
    x.requires_grad_()
    y = module(x)
    backward = ["batch_norm_act_backward_reduce_kernel", "batch_norm_act_backward_elemt_kernel"]
    assert kernels_of(lambda: torch.autograd.grad(y, x, grad_y, retain_graph=True)) == backward


@pytest.mark.parametrize(("groups", "channels_last"), [(32, False), (32, True), (320, True)])
def test_sets_of_group_norm_meet_between_the_passes(groups, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, grad_y = (torch.randn(2, 320, 64, 64, device="cuda").to(torch.bfloat16, memory_format=memory_format) for _ in range(2))
    module = gk.GroupNormAct(groups, 320, act="swish", device="cuda", dtype=torch.bfloat16)
    # What lies like a run, or is a channel, has nothing to merge.
    merged = ["group_norm_act_statistics_kernel"] * (channels_last and groups < 320)
    assert kernels_of(lambda: module(x)) == ["batch_norm_act_stats_kernel", *merged, "batch_norm_act_normalise_kernel"]
    x.requires_grad_()
    y = module(x)
    backward = ["batch_norm_act_backward_reduce_kernel", "group_norm_act_sums_kernel", "batch_norm_act_backward_elemt_kernel"]
    assert kernels_of(lambda: torch.autograd.grad(y, [x, *module.parameters()], grad_y, retain_graph=True)) == backward


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adaptive_clipping(dtype, norm_type):
    """Units of one thread, of a warp and of a block, and more tensors than one launch takes."""
    shapes = [(), (7,), (5, 9), (3, 2047), (3, 2048), (2, 40_001), (300_001,), (16, 8, 3, 3), *[(4, 3)] * 1000]
    params, grads = ([torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2))
    grads = [grad * 0.1 ** (i % 4) for i, grad in enumerate(grads)]
    on_gpu = [grad.cuda() for grad in grads]
    torch.ops.gradkernels.adaptive_clip_grad_(params, grads, 0.01, 1e-3, norm_type)
    torch.ops.gradkernels.adaptive_clip_grad_([param.cuda() for param in params], on_gpu, 0.01, 1e-3, norm_type)
    numbers = torch.finfo(dtype)
    rtol = (16 if dtype == torch.float64 else 2) * numbers.eps
    for actual, wanted in zip(on_gpu, grads, strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=rtol, atol=numbers.smallest_normal * numbers.eps)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_skipped_steps_do_not_wait_for_the_gpu(make):
    grads = [torch.randn(1000, device="cuda") for _ in range(5)]
    parameters = parameters_with(grads)
    optimizer = make(parameters, lr=0.1, fused=True)
    handle = gk.attach_clipping(optimizer, gk.clipping.ZScore(), nonfinite="skip", skip_above=10.0)
    optimizer.step()
    before = [parameter.detach().clone() for parameter in parameters]
    grads[3][2] = torch.nan
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    assert handle.skipped == 1 and handle.state_dict()["state"]["count"] == 1
    handle.max_norm = gk.clipping.Percentile()
    grads[3][2] = 1.0
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        gk.adaptive_clip_grad_(parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_gpu():
    x, grads = torch.randn(10_000, device="cuda", requires_grad=True), [torch.randn(1000, device="cuda") for _ in range(5)]
    module = gk.BatchNormAct1d(10, momentum=None, device="cuda")
    parameters = [*parameters_with(grads), torch.nn.Parameter(torch.empty(3, device="cuda"))]
    step(x, grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, *_ = step(x, grads)
        y.backward(torch.ones_like(y))
        gk.grad_report(parameters).clip_(0.1)
        module(x.view(-1, 10)).sum().backward()
        gk.rrelu(x, training=True).sum().backward()
        gk.prelu(x, torch.full((1,), 0.2, device="cuda", requires_grad=True)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_module_counts_its_batches(momentum):
    here, there = (gk.BatchNormAct2d(3, momentum=momentum, device=device) for device in ("cpu", "cuda"))
    for _ in range(3):
        x = torch.randn(2, 3, 5, 5)
        here(x), there(x.cuda())
        near("running_mean", there.running_mean, here.running_mean)
        assert there.num_batches_tracked.item() == here.num_batches_tracked.item()


def test_a_graph_replays_on_new_values():
    x, grads = torch.randn(10_000, device="cuda"), [torch.randn(1000, device="cuda") for _ in range(5)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x, [grad.clone() for grad in grads])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(x, grads)
    new_x, new_grads = torch.randn(10_000, device="cuda"), [torch.randn(1000, device="cuda") for _ in range(5)]
    x.copy_(new_x)
    for grad, new in zip(grads, new_grads, strict=True):
        grad.copy_(new)
    graph.replay()
    for actual, expected in zip([*results, *grads], [*step(new_x, new_grads), *new_grads], strict=True):
        assert torch.equal(actual, expected)


def test_results_are_the_same_bit_for_bit():
    x, beta = torch.randn(64, 33, 1000, device="cuda"), torch.rand(33, device="cuda")
    statistics = torch.zeros(2, 33, device="cuda").unbind()
    for function in (gk.swish, lambda x, weight: batch_norm_act(x, statistics, weight, None)):
        first, second = (value_and_grads(function, x, beta) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_work_on_another_stream_waits_for_its_operands():
    x, side = torch.randn(64, 33, 1000, device="cuda"), torch.cuda.Stream()
    expected = value_and_grads(gk.swish, x, torch.ones(33, device="cuda"))
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        actual = value_and_grads(gk.swish, x, torch.ones(33, device="cuda"))
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_tensors_on_different_devices_are_refused():
    x, parameter = torch.randn(6, 3, 5, device="cuda"), torch.ones(3)
    statistics = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    calls = {
        "weight": lambda: batch_norm_act(x, statistics, parameter, None),
        "running statistics": lambda: batch_norm_act(x, (torch.zeros(3), torch.ones(3)), None, None),
        "residual": lambda: batch_norm_act(x, statistics, None, None, torch.randn(6, 3, 5)),
        "prelu": lambda: gk.prelu(x, parameter),
        "swish": lambda: gk.swish(x, parameter),
        "clipping": lambda: torch.ops.gradkernels.grad_norms([x, parameter], 2.0),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match="device") as raised:
            call()
        assert "CUDA error" not in str(raised.value), name
    assert not statistics[0].any() and (statistics[1] == 1).all()


def test_a_failed_allocation_leaves_everything_as_it_was():
    x, module = torch.randn(64, 8, 256, 256, device="cuda"), gk.BatchNormAct2d(8, device="cuda")
    before = {name: each.clone() for name, each in module.state_dict().items()}
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (1 << 22)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            module(x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())


def test_kernels_run_on_the_device_of_the_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x = torch.randn(1000)
    near("elu on the second GPU", gk.elu(x.to("cuda:1")), gk.elu(x))
