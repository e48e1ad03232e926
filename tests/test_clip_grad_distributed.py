"""Clipping of DTensors over real Gloo processes: FSDP2, tensor parallelism, several meshes, plain tensors.

Each rank compares its part with the whole gradients, which every rank makes from the same seed, and counts
the collectives. The tests of a rank that dies, or that does not take part, start processes of their own.
"""

import datetime
import itertools
import math
import os
import time

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import gradkernels as gk
from accuracy import assert_bitwise_equal
from gradkernels import _native

TIMEOUT_S = 120
# How long the other ranks of a group wait for a rank that fails.
FAILING_TIMEOUT_S = 5


def run(rank, world_size, file, scenarios):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size, timeout=timeout)
    try:
        for scenario in scenarios:
            torch.manual_seed(0)
            try:
                scenario()
            except BaseException as error:
                raise AssertionError(f"{scenario.__name__} on rank {rank}") from error
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def spawn(world_size, tmp_path, *arguments, target=run):
    context = multiprocessing.spawn(target, (world_size, str(tmp_path / "store"), *arguments), nprocs=world_size, join=False)
    deadline = datetime.datetime.now() + datetime.timedelta(seconds=TIMEOUT_S)
    try:
        while not context.join(timeout=5):
            assert datetime.datetime.now() < deadline, "the processes did not end"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def sharded(full, mesh, placements):
    """A parameter whose gradient is `full`, distributed over the mesh."""
    parameter = nn.Parameter(distribute_tensor(torch.zeros_like(full), mesh, placements))
    parameter.grad = distribute_tensor(full, mesh, placements)
    return parameter


def plain(full):
    parameter = nn.Parameter(torch.zeros_like(full))
    parameter.grad = full.clone()
    return parameter


def whole(grad):
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def assert_clips(make, reduces, returns_dtensor):
    """Clips parameters and compares each with its whole gradient.

    make: returns the parameters and their whole gradients.
    reduces: the number of all-reduces of one total norm.
    """
    for norm_type in (2.0, 1.0, math.inf):
        for max_norm in (0.37, 1e9):
            params, fulls = make()
            expected_params = [plain(full) for full in fulls]
            expected = gk.clip_grad_norm_(expected_params, max_norm, norm_type)
            assert_close(whole(gk.get_total_norm([param.grad for param in params], norm_type)), expected)
            with CommDebugMode() as communication:
                total = gk.clip_grad_norm_(params, max_norm, norm_type)
            counts = {str(operation): count for operation, count in communication.get_comm_counts().items()}
            assert sum(counts.values()) == reduces, counts
            assert all("reduce" in operation for operation in counts), counts
            assert isinstance(total, DTensor) == returns_dtensor
            total = whole(total)
            assert total.dtype == expected.dtype and total.dim() == 0
            # Both are rounded once from float64.
            assert_close(total, expected, rtol=2 * torch.finfo(total.dtype).eps, atol=0)
            for param, expected_param in zip(params, expected_params, strict=True):
                assert_close(whole(param.grad), expected_param.grad)
                if isinstance(param.grad, DTensor):
                    assert param.grad._version > 0 or max_norm > 1e6


class NothingIndexedByLists(TorchFunctionMode):
    """Refuses lists as indices, because torch waits when it copies a list to a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            assert not isinstance(args[1], list)
        return function(*args, **(kwargs or {}))


def mesh_1d():
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def gradients(dtype=torch.float32):
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in ((7, 3), (16,), (1, 5), (33, 2))]


def scenario_one_mesh():
    mesh = mesh_1d()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):

        def make(dtype=dtype):
            torch.manual_seed(1)
            fulls = gradients(dtype)
            placements = [Shard(0), Replicate(), Shard(1), Shard(0)]
            return [sharded(full, mesh, [placement]) for full, placement in zip(fulls, placements, strict=True)], fulls

        # In float64 the largest norm is reduced first, because squares may overflow or underflow.
        assert_clips(make, 2 if dtype == torch.float64 else 1, True)


def scenario_replicated():
    mesh = mesh_1d()

    def make():
        torch.manual_seed(1)
        fulls = gradients()
        return [sharded(full, mesh, [Replicate()]) for full in fulls], fulls

    assert_clips(make, 0, True)


def scenario_adaptive_clipping():
    """Units that lie on one rank, and units in pieces."""
    mesh = mesh_1d()
    torch.manual_seed(1)
    for weight, grad in zip(gradients(), gradients(), strict=True):
        expected = nn.Parameter(weight)
        expected.grad = grad.clone()
        gk.adaptive_clip_grad_(expected, 0.5)
        for placement in (Shard(0), Shard(grad.dim() - 1), Replicate()):
            param = nn.Parameter(distribute_tensor(weight, mesh, [placement]))
            param.grad = distribute_tensor(grad, mesh, [placement])
            gk.adaptive_clip_grad_(param, 0.5)
            assert_close(whole(param.grad), expected.grad)


def scenario_with_plain_tensors():
    mesh = mesh_1d()

    def make():
        torch.manual_seed(1)
        fulls = gradients()
        return [plain(fulls[0]), sharded(fulls[1], mesh, [Shard(0)]), plain(fulls[2]), sharded(fulls[3], mesh, [Shard(0)])], fulls

    assert_clips(make, 1, False)


def scenario_two_dimensions():
    mesh = init_device_mesh("cpu", (2, distributed.get_world_size() // 2), mesh_dim_names=("dp", "tp"))

    def make():
        torch.manual_seed(1)
        fulls = gradients()
        placements = [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(0), Replicate()), (Replicate(), Replicate())]
        return [sharded(full, mesh, placement) for full, placement in zip(fulls, placements, strict=True)], fulls

    assert_clips(make, 2, True)


def scenario_two_meshes():
    mesh = init_device_mesh("cpu", (2, distributed.get_world_size() // 2), mesh_dim_names=("dp", "tp"))

    def make():
        torch.manual_seed(1)
        fulls = gradients()
        return [
            sharded(fulls[0], mesh["dp"], [Shard(0)]),
            sharded(fulls[1], mesh["tp"], [Shard(0)]),
            plain(fulls[2]),
            sharded(fulls[3], mesh["dp"], [Shard(0)]),
        ], fulls

    assert_clips(make, 2, False)


def scenario_what_is_not_finite():
    mesh = mesh_1d()
    for value in (math.nan, math.inf):
        for place in (0, -1):
            full = torch.randn(9, 2)
            full[place, 0] = value
            for norm_type in (2.0, 1.0, math.inf):
                params, expected = [sharded(full, mesh, [Shard(0)]), sharded(torch.randn(3), mesh, [Replicate()])], plain(full)
                total = whole(gk.get_total_norm([param.grad for param in params], norm_type))
                assert_close(total, gk.get_total_norm([expected.grad], norm_type), equal_nan=True)
                named = {"first": params[1], "second": params[0]}.items()
                with pytest.raises(RuntimeError, match=r"is non-finite.*that of second"):
                    gk.clip_grad_norm_(named, 1.0, norm_type, error_if_nonfinite=True)
                assert_close(whole(params[0].grad), full, rtol=0, atol=0, equal_nan=True)
                gk.clip_grad_norm_(params[:1], 1.0, norm_type)
                gk.clip_grad_norm_([expected], 1.0, norm_type)
                assert_close(whole(params[0].grad), expected.grad, equal_nan=True)


def scenario_squares_that_leave_float64():
    mesh = mesh_1d()
    for scale in (1e300, 1e-300):
        full = torch.randn(9, 2, dtype=torch.float64) * scale
        total = whole(gk.clip_grad_norm_([sharded(full, mesh, [Shard(0)])], 1.0))
        assert_close(total / scale, (full / scale).norm(), rtol=1e-14, atol=0)


def scenario_report():
    mesh = mesh_1d()
    torch.manual_seed(1)
    fulls = gradients()
    fulls[3][20, 1] = math.inf
    placements = [Shard(0), Replicate(), Shard(1), Shard(0)]
    params = [sharded(full, mesh, [placement]) for full, placement in zip(fulls, placements, strict=True)]
    params.insert(2, nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Shard(0)])))
    expected_params = [plain(full) for full in fulls]
    expected_params.insert(2, nn.Parameter(torch.zeros(3)))
    for norm_type in (2.0, 1.0, math.inf):
        with NothingIndexedByLists():
            report, expected = gk.grad_report(params, norm_type), gk.grad_report(expected_params, norm_type)
        for name in ("norms", "max_abs", "nonfinite", "total_norm"):
            assert_close(getattr(report, name), getattr(expected, name), rtol=1e-14, atol=0, equal_nan=True)
        assert report.first_nonfinite() == "4"


def scenario_without_the_library():
    mesh = mesh_1d()
    torch.manual_seed(1)
    fulls = gradients()
    params, expected = [plain(fulls[0]), *(sharded(full, mesh, [Shard(0)]) for full in fulls[1:])], [plain(full) for full in fulls]
    assert_close(gk.grad_report(params).norms, gk.grad_report(expected).norms, rtol=1e-14, atol=0)
    library, _native.C = _native.C, None
    try:
        assert_close(whole(gk.clip_grad_norm_(params, 0.37)), gk.clip_grad_norm_(expected, 0.37))
        gk.clip_grad_value_(params, 1e-3)
        gk.clip_grad_value_(expected, 1e-3)
    finally:
        _native.C = library
    assert_close([whole(param.grad) for param in params], [param.grad for param in expected])


def scenario_pipeline():
    """get_total_norm, reduced over the stages of a pipeline, then clip_grads_with_norm_; clip_grad_value_."""
    mesh = mesh_1d()
    torch.manual_seed(1)
    fulls = gradients()
    params, expected = [sharded(full, mesh, [Shard(0)]) for full in fulls], [plain(full) for full in fulls]
    total = gk.get_total_norm([param.grad for param in params])
    for given in (total, total.full_tensor()):
        gk.clip_grads_with_norm_(params, 0.5, given)
        gk.clip_grads_with_norm_(expected, 0.5, total.full_tensor())
        assert_close([whole(param.grad) for param in params], [param.grad for param in expected])
    gk.clip_grad_value_(params, 1e-3)
    gk.clip_grad_value_(expected, 1e-3)
    assert_close([whole(param.grad) for param in params], [param.grad for param in expected])


def scenario_partial():
    """torch reduces partial gradients."""
    mesh = mesh_1d()
    parameter = nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()]))
    parameter.grad = DTensor.from_local(torch.full((3,), 2.0), mesh, [Partial()])
    total = whole(gk.clip_grad_norm_([parameter], 1e9))
    assert_close(total, torch.tensor(2.0 * distributed.get_world_size() * math.sqrt(3)))


def trained(model, clip, steps=3):
    """The norm of each step, and the whole parameters after the last step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = torch.arange(40.0).view(8, 5) / 10
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        norms.append(whole(clip(model, optimizer)))
        optimizer.step()
    return norms, [whole(param.detach()) for param in model.parameters()]


def a_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def scenario_fsdp_ddp_and_tensor_parallel():
    """All ranks have the same batch, so each trains the same model as one process."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def clip(model, optimizer):
        return gk.clip_grad_norm_(model.parameters(), 0.5)

    expected = trained(a_model(), clip)
    model = a_model()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh_1d())
    assert all(isinstance(param, DTensor) for param in model.parameters())
    assert_close(trained(model, clip), expected, rtol=1e-4, atol=1e-5)
    tensor_parallel = parallelize_module(a_model(), mesh_1d(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert_close(trained(tensor_parallel, clip), expected, rtol=1e-4, atol=1e-5)
    assert_close(trained(nn.parallel.DistributedDataParallel(a_model()), clip), expected, rtol=1e-4, atol=1e-5)

    attached = fully_shard(a_model(), mesh=mesh_1d())
    handles = []

    def attach(model, optimizer):
        if not handles:
            handles.append(gk.attach_clipping(optimizer, 0.5))
        return torch.zeros(())

    assert_close(trained(attached, attach)[1], expected[1], rtol=1e-4, atol=1e-5)
    assert_close(whole(handles[0].last_norm), expected[0][-1], rtol=1e-4, atol=1e-5)


def a_flattened_model(**options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(a_model(), device_id=torch.device("cpu"), **options)


def scenario_fsdp1_is_refused():
    """Each rank has a piece of a gradient as a plain tensor, whose norm is not that of the gradient."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    def backward(model):
        model(torch.arange(40.0).view(8, 5) / 10).square().sum().backward()
        return model

    plain_model = backward(a_model())
    expected = gk.clip_grad_norm_(plain_model, 0.5)
    strategies = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)
    for use_orig_params, strategy in itertools.product((False, True), strategies):
        model = backward(a_flattened_model(use_orig_params=use_orig_params, sharding_strategy=strategy))
        params = [*model.parameters()]
        before = [None if param.grad is None else param.grad.clone() for param in params]
        for refused in (
            lambda model=model: gk.clip_grad_norm_(model, 0.5),
            lambda model=model: gk.clip_grad_norm_(model.module, 0.5),
            lambda params=params: gk.clip_grad_norm_(params, 0.5, 3.0),
            lambda model=model: gk.clip_grad_norm_(model.named_parameters(), 0.5),
            lambda model=model: gk.grad_report(model),
            lambda params=params: gk.attach_clipping(torch.optim.SGD(params, lr=0.1, fused=True), 0.5),
            gk.optim.RMSprop(params, lr=0.1, max_norm=0.5).step,
        ):
            with pytest.raises(
                RuntimeError, match=r"FullyShardedDataParallel model.*call model\.clip_grad_norm_\(max_norm\) before the step"
            ):
                refused()
        # The step refuses a group that is added later.
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, fused=True)
        gk.attach_clipping(optimizer, 0.5)
        optimizer.add_param_group({"params": params})
        with pytest.raises(RuntimeError, match=r"call model\.clip_grad_norm_"):
            optimizer.step()
        assert_close([param.grad for param in params], before, rtol=0, atol=0)
        gk.optim.RMSprop(params, lr=0.0).step()
        if use_orig_params:
            # Here the gradients are whole, as the error message advises.
            with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
                assert_close(gk.grad_report(model).total_norm, expected.double())
        # The method that the message names computes the right norm, and pieces are scaled right with it.
        total = model.clip_grad_norm_(1e9)
        assert_close(total, expected)
        gk.clip_grads_with_norm_(model, 0.5, total)
        assert_close(model.clip_grad_norm_(1e9), torch.tensor(0.5))
    whole_model = backward(a_flattened_model(use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD))
    assert_close(gk.clip_grad_norm_(whole_model, 0.5), expected)
    assert_close([param.grad for param in whole_model.parameters()], [param.grad for param in plain_model.parameters()])


def scenario_optimizers_that_wrap_others():
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

    def zero(params):
        return ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.SGD, lr=0.1, fused=True)

    def local(params):
        return PostLocalSGDOptimizer(torch.optim.SGD(params, lr=0.1, fused=True), PeriodicModelAverager(period=1))

    def stepped(make, clip):
        params = [plain(torch.full((5,), float(i + 1))) for i in range(4)]
        optimizer = make(params)
        handle = clip(params, optimizer)
        optimizer.step()
        return handle, [param.detach() for param in params]

    total, expected = stepped(lambda params: torch.optim.SGD(params, lr=0.1), lambda params, _: gk.clip_grad_norm_(params, 0.5))
    for make in (zero, local):
        handle, found = stepped(make, lambda _, optimizer: gk.attach_clipping(optimizer, 0.5))
        assert_close(found, expected)
        assert_close(handle.last_norm, total)
    overlapping = ZeroRedundancyOptimizer([plain(torch.ones(3))], torch.optim.SGD, overlap_with_ddp=True, lr=0.1)
    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer with overlap_with_ddp=True: its step"):
        gk.attach_clipping(overlapping, 0.5)


def scenario_default_device_elsewhere():
    mesh = mesh_1d()
    params = [sharded(full, mesh, [Shard(0)]) for full in gradients()]
    expected = gk.grad_report([plain(whole(param.grad)) for param in params])
    without = nn.Parameter(torch.zeros(2))
    with torch.device("cuda:99"):
        report = gk.grad_report([*params, without])
        gk.clip_grad_norm_(params, 1e9)
        # There is no kernel for a bound that float16 cannot hold.
        for bound in (1e30, 0.5):
            gk.clip_grad_value_(params, bound)
    assert_close(report.norms[:-1], expected.norms)
    assert max(whole(param.grad).abs().max() for param in params) == 0.5


SCENARIOS = [
    scenario_one_mesh,
    scenario_replicated,
    scenario_adaptive_clipping,
    scenario_with_plain_tensors,
    scenario_what_is_not_finite,
    scenario_squares_that_leave_float64,
    scenario_report,
    scenario_without_the_library,
    scenario_pipeline,
    scenario_partial,
    scenario_fsdp_ddp_and_tensor_parallel,
    scenario_fsdp1_is_refused,
    scenario_optimizers_that_wrap_others,
    scenario_default_device_elsewhere,
]


def test_on_two_ranks(tmp_path):
    spawn(2, tmp_path, SCENARIOS)


@pytest.mark.slow
def test_on_four_ranks(tmp_path):
    spawn(4, tmp_path, [*SCENARIOS, scenario_two_dimensions, scenario_two_meshes])


def fail(rank, world_size, file, dtype, reduces, failure):
    """The last rank dies or sleeps instead of its all-reduce number `reduces`."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    distributed.barrier()
    mesh = DeviceMesh.from_group(distributed.new_group(timeout=datetime.timedelta(seconds=FAILING_TIMEOUT_S)), "cpu")
    torch.manual_seed(1)
    params = [sharded(full, mesh, [Shard(0)]) for full in gradients(dtype)]
    before = [param.grad.to_local().clone() for param in params]
    failing = rank == world_size - 1
    if failing:
        all_reduce, seen = distributed.all_reduce, []

        def all_reduce_or_fail(*args, **kwargs):
            seen.append(args)
            if len(seen) == reduces:
                os._exit(0) if failure == "dies" else time.sleep(2 * FAILING_TIMEOUT_S)
            return all_reduce(*args, **kwargs)

        distributed.all_reduce = all_reduce_or_fail
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        gk.clip_grad_norm_(params, 1e-3)
    assert failing or time.monotonic() - begin < 2 * FAILING_TIMEOUT_S
    for param, was in zip(params, before, strict=True):
        assert_bitwise_equal("a gradient", param.grad.to_local(), was)
    # Without the usual cleanup, which would wait for the dead rank.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["dies", "does not come"])
@pytest.mark.parametrize(("dtype", "reduces"), [(torch.float32, 1), (torch.float64, 2)], ids=str)
def test_a_rank_that_fails_while_norms_are_reduced(tmp_path, dtype, reduces, failure):
    """The other ranks get torch.distributed's error within the group's timeout, and no gradient changes."""
    spawn(2, tmp_path, dtype, reduces, failure, target=fail)
