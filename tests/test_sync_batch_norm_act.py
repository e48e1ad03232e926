"""SyncBatchNormAct over real Gloo processes, compared with one process on the whole batch; its operators.

Processes take seconds to start. Worlds of 2 and of 4 processes are therefore started once each and run every
check_* function below; each check's result is a test here. accuracy.py has the exact results and the bounds.
"""

import copy
import datetime
import functools
import os
import pickle
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import batch_norm_act_calls
import gradkernels as gk
from accuracy import (
    SIXTEEN_BITS,
    WIDE_DTYPES,
    assert_accurate,
    assert_bitwise_equal,
    exact_batch_norm_act,
    extended,
    outcome,
)
from batch_norm_act_calls import ACTS, NUMBERS
from gradkernels import _native, reference

OPS = torch.ops.gradkernels
MODULES = {2: gk.BatchNormAct1d, 3: gk.BatchNormAct1d, 4: gk.BatchNormAct2d, 5: gk.BatchNormAct3d}
# Of the whole batch: runs of 1, 25, 64 and more elements; rows of channels that are not whole bytes of mask.
SHAPES = [(13, 3), (64, 65), (9, 5, 7), (11, 3, 5, 5), (8, 6, 9, 8), (10, 2, 3, 4, 5)]
SPLITS = ("even", "uneven", "empty")
SECONDS = 60


# The operands of a call on the whole batch.
arguments = functools.partial(batch_norm_act_calls.arguments, residual=True)


def share_of(rank, world, count, split):
    """The rows of the whole batch on a rank. "empty": the last rank has none, the one before it has most."""
    if split == "even":
        ends = [count * (each + 1) // world for each in range(world)]
    elif split == "uneven":
        ends = [count * (each + 1) ** 2 // world**2 for each in range(world)]
    else:
        ends = [*range(1, world - 1), count, count]
    return slice(ends[rank - 1] if rank else 0, ends[rank])


def module_of(given, act, *, module=gk.SyncBatchNormAct, **options):
    """A module with the parameters and the running statistics in `given`."""
    bn = module(given["x"].shape[1], act=act, act_param=ACTS[act], dtype=given["weight"].dtype, **options)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(bn, name) is not None:
                getattr(bn, name).copy_(given[name])
    return bn


def gathered(tensor, group):
    """The tensors of all ranks, in the order of the ranks; their shapes may differ."""
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, tensor.detach(), group=group)
    return found


def call(bn, x, residual, grad_y):
    """y, the gradients and the running statistics after a step, by name."""
    leaves = {"x": x, "residual": residual, "weight": bn.weight, "bias": bn.bias}
    leaves = {
        name: each.detach().requires_grad_() if name in ("x", "residual") else each for name, each in leaves.items() if each is not None
    }
    y = bn(leaves["x"], leaves.get("residual"))
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y)
    stats = {} if bn.running_mean is None else {"running_mean": bn.running_mean.clone(), "running_var": bn.running_var.clone()}
    return {"y": y.detach(), **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}, **stats}


def without_kinks(given, act, with_residual):
    """The same as in batch_norm_act_calls; a residual that the call does not take stays in `given`."""
    taken = given if with_residual else given | {"residual": None}
    return given | {"grad_y": batch_norm_act_calls.without_kinks(taken, True, act)["grad_y"]}


def scales_of(given):
    """The size of the terms of each result."""
    x, grad_y = extended(given["x"]), extended(given["grad_y"])
    axes = (0, *range(2, x.ndim))
    per_channel = (1, -1, *[1] * (x.ndim - 2))
    invstd = 1 / np.sqrt(x.var(axes) + 1e-5)
    normalised = (x - x.mean(axes).reshape(per_channel)) * invstd.reshape(per_channel)
    # The means that processes exchange are float64 and have an error of eps |mean|. M2 contains this error
    # times the differences of the means.
    exchanged = abs(x.mean(axes)) * x.std(axes) if given["x"].dtype == torch.float64 else 0.0
    norm, norm_of_weight = (np.sqrt(np.square(terms).sum(axes)) for terms in (grad_y, grad_y * normalised))
    return {
        "grad_weight": np.maximum(norm, norm_of_weight),
        "grad_bias": norm,
        "grad_x": (invstd * abs(extended(given["weight"])) * abs(grad_y).max(axes)).max(),
        "running_var": 0.1 * exchanged,
        "running_mean": 0.1 * np.sqrt(np.square(x).sum(axes)) / (x.size // x.shape[1]),
    }


def assert_accurate_over(group, given, act, with_residual, split, *, channels_last=False):
    given = without_kinks(given, act, with_residual)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    residual = given["residual"] if with_residual else None
    mine = share_of(rank, world, given["x"].shape[0], split)
    bn = module_of(given, act, process_group=group)
    operands = [None if each is None else each[mine] for each in (given["x"], residual, given["grad_y"])]
    if channels_last:
        operands[0] = operands[0].contiguous(memory_format=torch.channels_last)
    ours = call(bn, *operands)
    if channels_last and ours["y"].numel():
        assert ours["y"].is_contiguous(memory_format=torch.channels_last)

    param = NUMBERS[act]
    names = ("x", "running_mean", "running_var", "weight", "bias")
    exact = exact_batch_norm_act(
        *(given[name] for name in names), True, 0.1, 1e-5, act=act, act_param=param, residual=residual, grad_y=given["grad_y"]
    )
    whole = module_of(given, act, module=MODULES[given["x"].dim()])
    torchs = call_reference(whole, given["x"], residual, given["grad_y"])
    scales = scales_of(given)
    for name, actual in ours.items():
        expected, theirs = exact[name], torchs[name]
        if name in ("y", "grad_x", "grad_residual"):
            # An ulp is relative to the largest element of the whole batch, so the parts are joined.
            actual = torch.cat(gathered(actual, group))
        elif name in ("grad_weight", "grad_bias"):
            # Each rank has the gradient of its part, as in torch. The sum is that of the whole batch.
            actual = sum(each.double() for each in gathered(actual, group)).to(actual.dtype)
        assert_accurate(
            f"{name} of {act}, {split}, {tuple(given['x'].shape)}", actual, theirs, expected, per="tensor", scale=scales.get(name, 0.0)
        )
        if name.startswith("running"):
            for each in gathered(actual, group):
                assert_bitwise_equal(name, each, actual)


def call_reference(bn, x, residual, grad_y):
    """The same as call(), with the reference operators."""
    leaves = {"x": x, "residual": residual, "weight": bn.weight, "bias": bn.bias}
    leaves = {name: each.detach().requires_grad_() for name, each in leaves.items() if each is not None}
    mean, var = bn.running_mean.clone(), bn.running_var.clone()
    y = reference.batch_norm_act(
        leaves["x"],
        mean,
        var,
        leaves["weight"],
        leaves["bias"],
        True,
        0.1,
        act=bn.act,
        act_param=bn.act_param,
        residual=leaves.get("residual"),
    )
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y)
    return {
        "y": y.detach(),
        **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)},
        "running_mean": mean,
        "running_var": var,
    }


# Checks. Every rank of a world runs each check, with a new group.


def check_values_of_shapes(group):
    for i, shape in enumerate(SHAPES):
        for j, split in enumerate(SPLITS):
            act = list(ACTS)[(i + 2 * j) % len(ACTS)]
            dtype = torch.float64 if (i + j) % 2 else torch.float32
            assert_accurate_over(group, arguments(shape, dtype, seed=i), act, (i + j) % 3 == 0, split)


def check_values_of_acts(group):
    for dtype in WIDE_DTYPES:
        given = arguments((9, 5, 3, 4), dtype)
        for act in ACTS:
            for with_residual in (False, True):
                assert_accurate_over(group, given, act, with_residual, "uneven")
    for act, split in (("leaky_relu", "empty"), ("swish", "uneven")):
        assert_accurate_over(group, arguments((9, 16, 5, 5)), act, True, split, channels_last=True)


def check_hard_inputs(group):
    """Values far from zero, and ranks with different means: the merge has to keep the digits."""
    for dtype in WIDE_DTYPES:
        for offset, spread in ((1e4, 1e-2), (1e4, 1.0), (1e18, 1e18)):
            given = arguments((40, 3, 9, 8), dtype)
            given["x"] = (torch.randn(40, 3, 9, 8, dtype=torch.float64) * spread + offset).to(dtype)
            assert_accurate_over(group, given, "identity", False, "uneven")
        drifting = arguments((40, 3, 9, 8), dtype)
        drifting["x"] = drifting["x"] + torch.arange(40, dtype=dtype).view(-1, 1, 1, 1) * 100
        assert_accurate_over(group, drifting, "elu", True, "uneven")


def check_same_bits_from_run_to_run(group):
    given = arguments((64, 65))
    mine = share_of(dist.get_rank(group), dist.get_world_size(group), 64, "uneven")
    results = [
        call(module_of(given, "swish", process_group=group), given["x"][mine], given["residual"][mine], given["grad_y"][mine]) for _ in "ab"
    ]
    for name, tensor in results[0].items():
        assert_bitwise_equal(name, results[1][name], tensor)


def check_options_over_steps(group):
    """Each option, compared with BatchNormAct1d on the whole batch: three steps, then evaluation."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for options in ({"momentum": None}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"eps": 0.5, "momentum": 0.7}):
        whole = gk.BatchNormAct1d(5, act="elu", dtype=torch.float64, **options)
        bn = gk.SyncBatchNormAct(5, act="elu", dtype=torch.float64, process_group=group, **options)
        bn.load_state_dict(whole.state_dict())
        for step in range(3):
            torch.manual_seed(step)
            x = torch.randn(7 + step, 5, 4, dtype=torch.float64)
            mine = share_of(rank, world, len(x), SPLITS[step])
            assert_close(bn(x[mine]), whole(x)[mine], rtol=1e-12, atol=1e-12)
        assert bn.state_dict().keys() == whole.state_dict().keys()
        assert_close(dict(bn.state_dict()), dict(whole.state_dict()), rtol=1e-12, atol=1e-12)
        whole.load_state_dict(bn.state_dict())
        if whole.track_running_stats:
            assert_bitwise_equal("in evaluation", bn.eval()(x), whole.eval()(x))


def counted(function):
    """How often the function calls each collective."""
    counts = {}
    originals = {
        name: getattr(dist, name)
        for name in ("all_gather_single", "all_gather_into_tensor", "all_gather", "all_reduce")
        if hasattr(dist, name)
    }

    def counting(name):
        def collective(*args, **kwargs):
            counts[name.partition("_")[2].partition("_")[0]] = counts.get(name.partition("_")[2].partition("_")[0], 0) + 1
            return originals[name](*args, **kwargs)

        return collective

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        function()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counts


def check_number_of_collectives(group):
    given = arguments((8, 3, 4))
    bn = module_of(given, "leaky_relu", process_group=group)
    x, residual = (given[name][: dist.get_rank(group)].requires_grad_() for name in ("x", "residual"))
    # The first call also compares the number of channels.
    assert counted(lambda: bn(x, residual)) == {"gather": 2}
    results = []
    assert counted(lambda: results.append(bn(x, residual))) == {"gather": 1}
    assert counted(lambda: results[0].sum().backward()) == {"reduce": 1}
    assert counted(lambda: bn(x.detach(), residual).sum().backward()) == {"gather": 1}
    bn.eval()
    assert counted(lambda: bn(x, residual).sum().backward()) == {}


def network():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        gk.BatchNormAct2d(6, act="leaky_relu"),
        nn.Conv2d(6, 5, 3),
        nn.BatchNorm2d(5),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(180, 4),
    )
    return layers.double()


def check_distributed_data_parallel(group):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    whole = network()
    wrapped = DistributedDataParallel(gk.convert_sync_batch_norm(network(), group), process_group=group)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9) for each in (whole, wrapped)]
    for step in range(3):
        torch.manual_seed(step)
        x, target = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.randint(4, (8,))
        mine = share_of(rank, world, 8, "even")
        for model, optimizer, rows in zip((whole, wrapped), optimizers, (slice(None), mine), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), target[rows]).backward()
            optimizer.step()
        # A network amplifies rounding errors; one wrong term would change far more than 1e-9.
        for (name, expected), actual in zip(whole.named_parameters(), wrapped.module.parameters(), strict=True):
            assert_close(actual.grad, expected.grad, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert_close(dict(wrapped.module.state_dict()), dict(whole.state_dict()), rtol=1e-9, atol=1e-9)


def check_double_backward(group):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for i, act in enumerate(ACTS):
        for with_residual in (False, True):
            for split in SPLITS[i % 2 :]:
                given = without_kinks(arguments((9, 3, 4), torch.float64, seed=i), act, with_residual)
                mine = share_of(rank, world, 9, split)

                def second(bn, rows, given=given, with_residual=with_residual):
                    x, residual, grad_y = (given[name][rows].detach().requires_grad_() for name in ("x", "residual", "grad_y"))
                    inputs = [x, bn.weight, bn.bias, *([residual] if with_residual else [])]
                    y = bn(x, residual if with_residual else None)
                    first = torch.autograd.grad(y, inputs, grad_y, create_graph=True)
                    # Only gradients of which each rank has its part: the losses of the ranks add up to that
                    # of the whole batch.
                    loss = first[0].square().sum() + (first[3] * given["x"][rows]).pow(3).sum() if with_residual else first[0].pow(3).sum()
                    return first, torch.autograd.grad(loss, [x, bn.weight, grad_y], allow_unused=True)

                first, (of_x, of_weight, of_grad_y) = second(module_of(given, act, process_group=group), mine)
                expected_first, expected = second(module_of(given, act, module=gk.BatchNormAct1d), slice(None))
                where = {"rtol": 1e-8, "atol": 1e-8, "msg": lambda text, case=(act, with_residual, split): f"{case}: {text}"}
                assert_close(first[0], expected_first[0][mine], **where)
                assert_close(of_x, expected[0][mine], **where)
                assert_close(of_grad_y, expected[2][mine], **where)
                assert_close(sum(gathered(of_weight, group)), expected[1], **where)


def check_double_backward_through_two_modules(group):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    given = arguments((9, 3, 4), torch.float64)
    mine = share_of(rank, world, 9, "uneven")

    def penalty(first, second, rows):
        x = given["x"][rows].detach().requires_grad_()
        y = second(first(x).square(), x)
        (grad,) = torch.autograd.grad(y, x, given["grad_y"][rows], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    actual = penalty(module_of(given, "swish", process_group=group), module_of(given, "elu", process_group=group), mine)
    expected = penalty(module_of(given, "swish", module=gk.BatchNormAct1d), module_of(given, "elu", module=gk.BatchNormAct1d), slice(None))
    assert_close(actual, expected[mine], rtol=1e-8, atol=1e-8)


def statistics_of(bn):
    return [copy.deepcopy(each) for each in (bn.running_mean, bn.running_var, bn.num_batches_tracked)]


def check_channel_counts_that_differ(group):
    """Every rank raises at once, not after the group's timeout, and nothing is written."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    last = rank == world - 1
    for module_has, x_has, words in (
        (4 if last else 3, 4 if last else 3, f"3 in x and 3 in the module on rank 0, 4 in x and 4 in the module on rank {world - 1}"),
        (3, 4 if last else 3, f"3 in x and 3 in the module on rank 0, 4 in x and 3 in the module on rank {world - 1}"),
    ):
        bn = gk.SyncBatchNormAct(module_has, process_group=group)
        before = statistics_of(bn)
        error, message = outcome(bn, torch.randn(4, x_has, 2))
        assert error is RuntimeError
        assert message == f"SyncBatchNormAct: the number of channels must be the same on every process, but is {words}"
        assert_close(statistics_of(bn), before, rtol=0, atol=0)
    # The group still works.
    assert gk.SyncBatchNormAct(3, process_group=group)(torch.randn(4, 3)).shape == (4, 3)


def check_errors_on_every_rank_leave_the_statistics(group):
    x = torch.randn(4, 3, 2)
    for options, args, expected in (
        ({}, (x, x[:2]), RuntimeError),
        ({}, (x, x.double()), RuntimeError),
        ({}, (x.long(),), NotImplementedError),
        ({"eps": 0.0}, (x,), ValueError),
        ({}, (x[0, 0],), ValueError),
        ({}, (x[:, :0],), ValueError),
    ):
        bn = gk.SyncBatchNormAct(3, process_group=group, **options)
        before = statistics_of(bn)
        assert outcome(bn, *args)[0] is expected, (options, expected, outcome(bn, *args))
        assert_close(statistics_of(bn), before, rtol=0, atol=0)
    # Ranks compare their channels once. In later steps each rank checks its own.
    bn = gk.SyncBatchNormAct(3, process_group=group)
    bn(x)
    before = statistics_of(bn)
    for other, words in (
        (torch.randn(4, 5, 2), "running_mean should contain 5 elements not 3"),
        (x.to("meta"), "Expected all tensors to be on the same device, but found at least two devices, meta and cpu!"),
    ):
        assert outcome(bn, other) == (RuntimeError, words)
        assert_close(statistics_of(bn), before, rtol=0, atol=0)


def check_few_values(group):
    """One value on each rank is enough. One value in all is an error on every rank.

    Without any value the running statistics do not change, as in torch.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    given = arguments((world, 3), torch.float64)
    bn = module_of(given, "elu", process_group=group)
    whole = module_of(given, "elu", module=gk.BatchNormAct1d)
    assert_close(bn(given["x"][rank : rank + 1]), whole(given["x"])[rank : rank + 1], rtol=1e-12, atol=1e-12)
    before = statistics_of(bn)
    error, message = outcome(bn, given["x"][:1] if rank == 1 else given["x"][:0])
    assert error is ValueError and message.startswith("Expected more than 1 value per channel when training, got 1 in the batches of all")
    assert_close(statistics_of(bn), before, rtol=0, atol=0)
    x = torch.randn(0, 3, dtype=torch.float64, requires_grad=True)
    y = bn(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3)
    assert_close(statistics_of(bn), [*before[:2], before[2] + 1], rtol=0, atol=0)


def check_nan_and_inf(group):
    """nan and inf on one rank or on two: the channel is nan on every rank, and other channels do not change."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    nan, inf = float("nan"), float("inf")
    for first, last in ((None, nan), (None, inf), (-inf, None), (-inf, -inf), (inf, -inf)):
        given = arguments((8, 3, 2))
        clean = given["x"].clone()
        for sample, value in ((0, first), (-1, last)):
            if value is not None:
                given["x"][sample, 1, 0] = value
        mine = share_of(rank, world, 8, "even")
        bn, expected_bn = (module_of(given, "identity", process_group=group) for _ in range(2))
        y, expected = bn(given["x"][mine]), expected_bn(clean[mine])
        assert y[:, 1].isnan().all() and bn.running_var[1].isnan()
        running_mean = given["running_mean"].clone()
        nn.functional.batch_norm(given["x"], running_mean, given["running_var"].clone(), training=True)
        assert_bitwise_equal("running_mean", bn.running_mean[1], running_mean[1])
        for channel in (0, 2):
            assert_bitwise_equal("y", y[:, channel], expected[:, channel])
            assert_bitwise_equal("running_mean", bn.running_mean[channel], expected_bn.running_mean[channel])


def check_half_types(group):
    """Statistics and normalisation are computed in float32 or more and rounded once."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for dtype in SIXTEEN_BITS:
        for act, with_residual, split in (("leaky_relu", True, "uneven"), ("swish", False, "empty"), ("elu", True, "empty")):
            for wide_parameters in (False, True):
                given = {name: each.to(dtype) for name, each in arguments((12, 5, 4, 3)).items()}
                if wide_parameters:
                    given |= {name: given[name].float() for name in ("weight", "bias", "running_mean", "running_var")}
                mine = share_of(rank, world, 12, split)
                operands = (given["x"], given["residual"] if with_residual else None, given["grad_y"])
                bn = module_of(given, act, process_group=group)
                ours = call(bn, *(None if each is None else each[mine] for each in operands))
                wide = {name: each.float() for name, each in given.items()}
                exact = call(module_of(wide, act, module=gk.BatchNormAct2d), *(None if each is None else each.float() for each in operands))
                for name in ("y", "grad_x", *(["grad_residual"] if with_residual else [])):
                    assert ours[name].dtype == dtype
                    assert_close(
                        ours[name].float(),
                        exact[name][mine],
                        rtol=torch.finfo(dtype).eps,
                        atol=torch.finfo(dtype).eps * float(exact[name].abs().max()),
                    )
                for name in ("running_mean", "running_var"):
                    assert_close(ours[name].float(), exact[name], rtol=torch.finfo(ours[name].dtype).eps, atol=1e-5)


def check_without_the_library(group):
    """The reference, which is used then, gives the same results."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    given = arguments((9, 3, 4), torch.float64)
    for split, with_residual in (("uneven", True), ("empty", False)):
        mine = share_of(rank, world, 9, split)
        operands = (given["x"][mine], given["residual"][mine] if with_residual else None, given["grad_y"][mine])
        expected = call(module_of(given, "elu", process_group=group, momentum=None), *operands)
        library, _native.C = _native.C, None
        try:
            actual = call(module_of(given, "elu", process_group=group, momentum=None), *operands)
            one = outcome(module_of(given, "elu", process_group=group), given["x"][:1, :, 0] if rank == 0 else given["x"][:0, :, 0])
        finally:
            _native.C = library
        assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        assert one[0] is ValueError


def check_frozen_operands(group):
    given = arguments((8, 3, 4))
    names = ("x", "weight", "bias", "residual")
    mine = share_of(dist.get_rank(group), dist.get_world_size(group), 8, "uneven")
    for act in ("leaky_relu", "identity"):
        everything = call(module_of(given, act, process_group=group), *(given[name][mine] for name in ("x", "residual", "grad_y")))
        for wanted in [(name,) for name in names] + [("x", "bias"), ("weight", "residual")]:
            bn = module_of(given, act, process_group=group)
            leaves = {"x": given["x"][mine].clone(), "residual": given["residual"][mine].clone(), "weight": bn.weight, "bias": bn.bias}
            for name, leaf in leaves.items():
                leaf.requires_grad_(name in wanted)
            bn(leaves["x"], leaves["residual"]).backward(given["grad_y"][mine])
            for name, leaf in leaves.items():
                if name in wanted:
                    assert_bitwise_equal(name, leaf.grad, everything[f"grad_{name}"])
                else:
                    assert leaf.grad is None, name


def check_what_is_kept(group):
    """x, the statistics, and one bit for each element of the residual; never the running statistics."""
    given = arguments((16, 8, 10, 10))
    bn = module_of(given, "leaky_relu", process_group=group)
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        bn(given["x"].requires_grad_(), given["residual"].requires_grad_())
    pointers = {each.data_ptr() for each in kept if each.numel()}
    assert not {bn.running_mean.data_ptr(), bn.running_var.data_ptr(), given["residual"].data_ptr()} & pointers
    assert sum(each.nbytes for each in kept) <= given["x"].nbytes * (1 + 1 / 30) + 8 * 8 * 4 + 8


def check_step_between_forward_and_backward(group):
    """A second training step before backward, as in GANs, updates the running statistics but no gradient."""
    given = arguments((8, 3, 4))
    mine = share_of(dist.get_rank(group), dist.get_world_size(group), 8, "even")
    bn = module_of(given, "elu", process_group=group)
    version = bn.running_mean._version
    x = given["x"][mine].requires_grad_()
    (expected,) = torch.autograd.grad(bn(x), x, given["grad_y"][mine])
    assert bn.running_mean._version > version
    y = bn(x)
    bn(x * 2)
    assert_bitwise_equal("grad_x", torch.autograd.grad(y, x, given["grad_y"][mine])[0], expected)


def check_subgroups(group):
    """Pairs of ranks share statistics.

    A copy of the module stays in its group and compares the channels again.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    pairs = [dist.new_group([first, first + 1], timeout=datetime.timedelta(seconds=SECONDS)) for first in range(0, world, 2)]
    pair = pairs[rank // 2]
    given = arguments((4, 3), torch.float64, seed=rank // 2)
    bn = module_of(given, "elu", process_group=pair)
    expected = module_of(given, "elu", module=gk.BatchNormAct1d)(given["x"])
    rows = slice(2 * (rank % 2), 2 * (rank % 2) + 2)
    assert_close(bn(given["x"][rows]), expected[rows], rtol=1e-12, atol=1e-12)
    copied = copy.deepcopy(nn.Sequential(bn))[0]
    assert copied.process_group is pair and copied.weight is not bn.weight
    assert counted(lambda: copied(given["x"][rows])) == {"gather": 2}
    # A rank that is alone in its group calls no collective.
    alone = [dist.new_group([each]) for each in range(world)][rank]
    bn = module_of(given, "elu", process_group=alone)
    assert counted(lambda: bn(given["x"])) == {}


def check_pickle(group):
    bn = gk.SyncBatchNormAct(3, act="swish", act_param=0.5)
    x = torch.randn(4, 3)
    bn(x)
    again = pickle.loads(pickle.dumps(bn))
    assert "_channels_agree" not in again.__dict__ and again.act == "swish"
    assert_bitwise_equal("y", again(x), bn(x))


def check_compile(group):
    """One graph, which torch's SyncBatchNorm does not allow."""
    given = arguments((8, 3, 4))
    mine = share_of(dist.get_rank(group), dist.get_world_size(group), 8, "uneven")
    operands = tuple(given[name][mine] for name in ("x", "residual", "grad_y"))
    eager, traced = (module_of(given, "leaky_relu", process_group=group) for _ in "ab")
    expected = call(eager, *operands)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    x, residual = (each.requires_grad_() for each in operands[:2])
    y = compiled(x, residual)
    grads = torch.autograd.grad(y, [x, residual, traced.weight, traced.bias], operands[2])
    for name, actual in zip(("y", "grad_x", "grad_residual", "grad_weight", "grad_bias"), (y.detach(), *grads), strict=True):
        assert_bitwise_equal(name, actual, expected[name])
    assert_bitwise_equal("running_var", traced.running_var, expected["running_var"])
    assert traced.num_batches_tracked == 1


CHECKS = [value for name, value in globals().items() if name.startswith("check_")]
# Compiling takes seconds in each process, and two processes are enough for this check.
CHECKS_OF_WORLDS = {2: CHECKS, 4: [check for check in CHECKS if check is not check_compile]}


# The worlds.


def run_checks(rank, world, folder):
    """One process: runs every check. At the end the last rank dies while the others wait for it."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    results = {}
    for check in CHECKS_OF_WORLDS[world]:
        try:
            check(dist.new_group(timeout=timeout))
            results[check.__name__] = None
        except Exception:
            results[check.__name__] = traceback.format_exc()
        Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    group = dist.new_group(timeout=timeout)
    bn = gk.SyncBatchNormAct(3, process_group=group)
    x = torch.randn(2, 3, requires_grad=True)
    y = bn(x)
    if rank == world - 1:
        os._exit(0)
    begin = time.monotonic()
    forward, backward = outcome(bn, x), outcome(y.sum().backward)
    results["dead rank"] = (forward, backward), time.monotonic() - begin
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    # Without the usual cleanup, which would wait for the dead rank.
    os._exit(0)


@functools.cache
def results_of(world):
    """The results of the checks of each rank. The first call starts the processes and waits for them."""
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=run_checks, args=(rank, world, folder), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 3 * SECONDS
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        paths = [Path(folder, f"{rank}.pickle") for rank in range(world)]
        return [pickle.loads(path.read_bytes()) if path.exists() else {} for path in paths]


# Four processes show what two do, once more.
WORLDS = [pytest.param(world, marks=[pytest.mark.slow] * (world > 2)) for world in CHECKS_OF_WORLDS]


@pytest.mark.parametrize(
    ("world", "check"),
    [
        pytest.param(world, check.__name__, marks=[pytest.mark.slow] * (world > 2))
        for world, checks in CHECKS_OF_WORLDS.items()
        for check in checks
    ],
)
def test_world(world, check):
    outcomes = [results.get(check, "did not run") for results in results_of(world)]
    failed = [f"rank {rank}: {error}" for rank, error in enumerate(outcomes) if error is not None]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("world", WORLDS)
def test_dead_rank(world):
    """The other ranks get torch.distributed's error from forward and backward, within the group's timeout."""
    for results in results_of(world)[:-1]:
        outcomes, seconds = results["dead rank"]
        assert seconds < 2 * SECONDS
        for error, message in outcomes:
            assert issubclass(error, RuntimeError), (error, message)


# The operators without the module.


def each_op_arguments(given, act, with_residual):
    """The operators and their arguments, which contain the results of the operator before."""
    residual = given["residual"] if with_residual else None
    yield OPS.batch_norm_act_stats, (given["x"],)
    moments = torch.stack([OPS.batch_norm_act_stats(each) for each in given["x"].split([1, 0, given["x"].shape[0] - 1])])
    stats = (given["running_mean"], given["running_var"], torch.tensor(3))
    yield OPS.batch_norm_act_gather_stats, (moments, *stats, None, 1e-5)
    yield OPS.batch_norm_act_gather_stats, (moments, None, None, None, 0.1, 1e-5)
    mean, invstd, count = OPS.batch_norm_act_gather_stats(moments, None, None, None, 0.1, 1e-5)
    statistics = (mean, invstd, given["weight"], given["bias"])
    forward = (given["x"], *statistics, residual, act, NUMBERS[act])
    yield OPS.batch_norm_act_elemt, forward
    mask = OPS.batch_norm_act_elemt(*forward)[1]
    backward = (given["grad_y"], given["x"], *statistics, residual, mask if mask.numel() else None, act, NUMBERS[act])
    yield OPS.batch_norm_act_backward_reduce, (*backward, with_residual)
    sums = OPS.batch_norm_act_backward_reduce(*backward, False)[0]
    yield OPS.batch_norm_act_backward_elemt, (*backward, sums, count)


def like(given, layout):
    """`given` with its large tensors in another layout and with the same values."""
    changes = {
        "contiguous": lambda each: each,
        "channels_last": lambda each: each.contiguous(memory_format=torch.channels_last),
        "transposed": lambda each: each.transpose(2, 3).contiguous().transpose(2, 3),
    }
    return {name: changes[layout](each) if each.dim() > 1 else each for name, each in given.items()}


@pytest.mark.parametrize(
    ("act", "layout", "with_residual", "dtype"),
    [
        ("leaky_relu", "contiguous", True, torch.float32),
        ("swish", "channels_last", True, torch.float64),
        ("identity", "transposed", False, torch.float32),
        ("leaky_relu", "channels_last", True, torch.bfloat16),
        ("elu", "transposed", True, torch.bfloat16),
    ],
)
def test_opcheck(act, layout, with_residual, dtype):
    given = like({name: each.to(dtype) for name, each in arguments((4, 3, 5, 6)).items()}, layout)
    for op, args in each_op_arguments(given, act, with_residual):
        opcheck(op.default, args)


def test_opcheck_of_empty_shares_and_gradients():
    for shape in ((0, 3, 5), (2, 3, 0)):
        given = arguments(shape)
        x = given["x"]
        zeros = torch.zeros(3, dtype=torch.float64)
        forward = (x, zeros, zeros, given["weight"], given["bias"], given["residual"], "leaky_relu", 0.1)
        backward = (given["grad_y"], *forward[:-2], None, *forward[-2:])
        opcheck(OPS.batch_norm_act_stats.default, (x,))
        opcheck(OPS.batch_norm_act_elemt.default, forward)
        opcheck(OPS.batch_norm_act_backward_reduce.default, (*backward, True))
        opcheck(OPS.batch_norm_act_backward_elemt.default, (*backward, torch.zeros(6, dtype=torch.float64), zeros[:1] + 4))
        assert_bitwise_equal("moments", OPS.batch_norm_act_stats(x), torch.zeros(7, dtype=torch.float64))
    # Differentiating one of these operators by itself is an error.
    for op, args in each_op_arguments(arguments((4, 3, 5)), "elu", True):
        first, *others = args
        first = first.clone()
        if op is OPS.batch_norm_act_gather_stats:
            with pytest.raises(NotImplementedError, match="not implemented"):
                op(first.requires_grad_(), *others)
            continue
        result = op(first.requires_grad_(), *others)
        with pytest.raises(RuntimeError, match="not implemented"):
            (result if isinstance(result, torch.Tensor) else result[0]).sum().backward()


@pytest.mark.parametrize("shape", [*SHAPES, (5, 3, 300, 300), (100_003, 2)], ids=str)
def test_parts_of_one_process_are_batch_norm_act(shape):
    """To the bit, because the sums of one process need no rescaling."""
    for act, with_residual, dtype in (("leaky_relu", True, torch.float32), ("swish", False, torch.float64), ("elu", True, torch.float32)):
        given = arguments(shape, dtype)
        residual = given["residual"] if with_residual else None
        stats = [given[name].clone() for name in ("running_mean", "running_var")] + [torch.tensor(4)]
        operands = (given["weight"], given["bias"], residual)
        expected = OPS.batch_norm_act(given["x"], *stats[:2], *operands, stats[2], True, None, 1e-5, act, NUMBERS[act])
        parts_stats = [given[name].clone() for name in ("running_mean", "running_var")] + [torch.tensor(4)]
        mean, invstd, count = OPS.batch_norm_act_gather_stats(OPS.batch_norm_act_stats(given["x"])[None], *parts_stats, None, 1e-5)
        y, mask = OPS.batch_norm_act_elemt(given["x"], mean, invstd, *operands, act, NUMBERS[act])
        names = ("y", "mean", "invstd", "mask", "running_mean", "running_var", "num_batches_tracked")
        for name, actual, each in zip(names, (y, mean, invstd, mask, *parts_stats), (*expected, *stats), strict=True):
            assert_bitwise_equal(name, actual, each)
        assert count.item() == given["x"].numel() / shape[1]
        mask = mask if mask.numel() else None
        backward = (given["grad_y"], given["x"], mean, invstd, *operands, mask)
        param = NUMBERS[act]
        gradients = OPS.batch_norm_act_backward(*backward, True, act, param, [True, True, True, with_residual])
        sums, dz = OPS.batch_norm_act_backward_reduce(*backward, act, param, with_residual)
        assert_bitwise_equal("grad_x", OPS.batch_norm_act_backward_elemt(*backward, act, param, sums, count), gradients[0])
        channels = shape[1]
        assert_bitwise_equal("grad_weight", (sums[channels:] * invstd).to(dtype), gradients[1])
        assert_bitwise_equal("grad_bias", sums[:channels].to(dtype), gradients[2])
        if with_residual:
            assert_bitwise_equal("grad_residual", dz, gradients[3])


@pytest.mark.parametrize("momentum", [None, 0.1, 0.0, 1.0])
@pytest.mark.parametrize("ranks", [1, 2, 7, 64])
def test_merge_of_many_ranks(ranks, momentum):
    """The CPU merges rank after rank, other devices all ranks at once. Both are compared with exact moments."""
    torch.manual_seed(ranks)
    x = torch.randn(500, 5, dtype=torch.float64) + torch.arange(500, dtype=torch.float64).view(-1, 1) / 10 + 1e4
    sizes = torch.randint(0, 2 * 500 // ranks, (ranks - 1,)).clamp(max=500 // ranks).tolist()
    moments = torch.stack([OPS.batch_norm_act_stats(each) for each in x.split([*sizes, 500 - sum(sizes)])])
    wide = extended(x)
    exact_mean, exact_var = wide.mean(0), wide.var(0)
    factor = np.longdouble(1) / 4 if momentum is None else np.longdouble(momentum)
    for dtype in WIDE_DTYPES:
        for op in (OPS.batch_norm_act_gather_stats.default, elsewhere(OPS.batch_norm_act_gather_stats.default)):
            running = torch.full((5,), 0.5, dtype=dtype), torch.full((5,), 2.0, dtype=dtype)
            batches = torch.tensor(3)
            mean, invstd, count = op(moments, *running, batches, momentum, 1e-5)
            assert count.tolist() == [500] and batches == 4
            assert_accurate("mean", mean, mean, exact_mean)
            assert_accurate("invstd", invstd, invstd, 1 / np.sqrt(exact_var + np.longdouble(1e-5)))
            assert_accurate("running_mean", running[0], running[0], (1 - factor) * 0.5 + factor * exact_mean)
            assert_accurate("running_var", running[1], running[1], (1 - factor) * 2 + factor * exact_var * 500 / 499)


def elsewhere(op):
    """The composite for devices without a kernel of their own, called with the CPU's tensors."""
    kernel = torch.library.get_kernel(op, "XPU")
    return lambda *args: kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)


def test_composite_of_the_merge_keeps_the_statistics_where_there_is_no_variance():
    op = elsewhere(OPS.batch_norm_act_gather_stats.default)
    for x in (torch.randn(1, 3), torch.randn(0, 3)):
        running = [torch.randn(3), torch.rand(3), torch.tensor(2)]
        before = copy.deepcopy(running[:2])
        moments = torch.stack([OPS.batch_norm_act_stats(x), OPS.batch_norm_act_stats(x[:0])])
        op(moments, *running, 0.1, 1e-5)
        assert_close(running[:2], before, rtol=0, atol=0)
        assert running[2] == 3


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 7, 11), (12, 5, 1, 2, 1, 2)], ids=str)
def test_moments_of_infinities(shape):
    """Kernels and composites: one infinity, two in two parts, two that differ in one part or in two, none."""
    x = torch.randn(shape)
    for sample, channel, value in ((0, 0, np.inf), (1, 1, -np.inf), (9, 1, -np.inf), (0, 2, np.inf), (1, 2, -np.inf), (1, 3, np.inf)):
        x[(sample, channel, *[-1] * (x.dim() - 2))] = value
    x[-1, 3].fill_(-np.inf)
    moments = torch.stack([OPS.batch_norm_act_stats(each) for each in x.split([5, 0, 7])])
    nan = np.nan
    assert_bitwise_equal("means", moments[0, 1:4], torch.tensor([np.inf, -np.inf, nan], dtype=torch.float64))
    assert moments[0, 6:10].isnan().all() and moments[:, -1].isfinite().all()
    for op in (OPS.batch_norm_act_gather_stats.default, elsewhere(OPS.batch_norm_act_gather_stats.default)):
        running = torch.zeros(5), torch.ones(5)
        mean, invstd, _ = op(moments, *running, None, 0.1, 1e-5)
        for each in (mean, running[0].double()):
            assert_bitwise_equal("mean", each[:4], torch.tensor([np.inf, -np.inf, nan, nan], dtype=torch.float64))
        assert invstd.isnan().tolist() == running[1].isnan().tolist() == [True] * 4 + [False]
        assert_close(mean[4], x[:, 4].double().mean())


def test_merge_counts_batches_in_any_dtype():
    moments = OPS.batch_norm_act_stats(torch.randn(7, 3))[None]
    found = []
    for dtype in (torch.int64, torch.int32, torch.float32):
        running = [torch.zeros(3), torch.ones(3), torch.tensor(3, dtype=dtype)]
        OPS.batch_norm_act_gather_stats(moments, *running, None, 1e-5)
        found.append(running)
        assert running[2] == 4
        assert_close(running[:2], found[0][:2], rtol=0, atol=0)


def test_merge_of_operands_with_the_negative_bit():
    """Also running statistics in float64, which the merge writes without a wider copy."""
    moments = torch.stack([OPS.batch_norm_act_stats(torch.randn(count, 3)) for count in (7, 4)])
    for dtype in WIDE_DTYPES:

        def results(negated, dtype=dtype):
            operands = [moments, torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype), torch.tensor(3)]
            if negated is not None:
                operands[negated] = torch._neg_view(-operands[negated])
            merged = OPS.batch_norm_act_gather_stats(*operands, None, 1e-5)
            return [*merged, *[each.resolve_neg() for each in operands[1:]]]

        expected = results(None)
        for negated in range(4):
            assert_close(results(negated), expected)


@pytest.mark.parametrize("act", ACTS)
def test_composite_of_the_parts(act):
    """The composite for an x without a kernel, here of six dimensions, compared with the kernels."""
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        given = arguments((6, 3, 5, 8), dtype)
        given["x"] = given["x"] + 100
        for with_residual in (False, True):
            given = without_kinks(given, act, with_residual)
            folded = {name: each.reshape(6, 3, 5, 2, 2, 2) if each.dim() == 4 else each for name, each in given.items()}
            both = zip(each_op_arguments(given, act, with_residual), each_op_arguments(folded, act, with_residual), strict=True)
            for (op, args), (_, folded_args) in both:
                expected, actual = op(*args), op(*folded_args)
                if isinstance(expected, torch.Tensor):
                    expected, actual = (expected,), (actual,)
                for each, other in zip(expected, actual, strict=True):
                    if each.dtype != torch.uint8:
                        scale = float(each.abs().max()) if each.numel() else 0.0
                        assert_close(other.reshape(each.shape), each, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("op", ["stats", "elemt", "backward_reduce", "backward_elemt", "gather_stats"])
def test_arguments_that_do_not_fit(op):
    given = arguments((4, 3, 5))
    args = dict(each_op_arguments(given, "swish", True))[getattr(OPS, f"batch_norm_act_{op}")]
    function = getattr(OPS, f"batch_norm_act_{op}")
    for i, each in enumerate(args):
        if isinstance(each, torch.Tensor) and each.is_floating_point():
            bad = [each[..., :-1]] if op != "stats" else []
            bad += [each.long()] if i == 0 else []
            bad += [each.unsqueeze(0)] if each.dtype == torch.float64 else []
            for other in bad:
                tensors = [every for every in args if isinstance(every, torch.Tensor)]
                before = copy.deepcopy(tensors)
                with pytest.raises((RuntimeError, NotImplementedError)):
                    function(*args[:i], other, *args[i + 1 :])
                assert_close(tensors, before, rtol=0, atol=0)


# The module in one process, and the conversion.


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5), (4, 3, 5, 6), (4, 3, 2, 5, 6)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_alone_it_is_batch_norm_act(training, shape):
    given = arguments(shape)
    operands = (given["x"], given["residual"], given["grad_y"])
    actual = call(module_of(given, "relu6").train(training), *operands)
    for name, expected in call(module_of(given, "relu6", module=MODULES[len(shape)]).train(training), *operands).items():
        assert_bitwise_equal(name, actual[name], expected)


def test_constructor_is_torchs():
    positional = (3, 1e-3, 0.2, True, False, None, "cpu", torch.float64)
    ours, torchs = gk.SyncBatchNormAct(*positional, bias=True), nn.SyncBatchNorm(*positional)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "process_group"):
        assert getattr(ours, name) == getattr(torchs, name)
    assert ours.weight.dtype == torch.float64
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    whole = gk.SyncBatchNormAct(3)
    whole.load_state_dict(nn.BatchNorm2d(3).state_dict())
    nn.BatchNorm2d(3).load_state_dict(whole.state_dict())
    assert not isinstance(ours, nn.SyncBatchNorm)
    for x in (torch.randn(3), torch.randn(3, 0)):
        assert outcome(gk.SyncBatchNormAct(3), x) == outcome(nn.SyncBatchNorm(3), x)


def test_convert():
    shared = nn.BatchNorm1d(4)
    model = nn.Sequential(
        gk.BatchNormAct2d(4, act="elu", act_param=0.7, momentum=None, dtype=torch.float64),
        nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, gk.BatchNormAct3d(2, act="relu", affine=False))}),
        nn.BatchNorm3d(3, bias=False) if "bias" in nn.BatchNorm3d.__init__.__code__.co_varnames else nn.BatchNorm3d(3),
        nn.SyncBatchNorm(5, track_running_stats=False),
        nn.InstanceNorm2d(4, affine=True),
        gk.SyncBatchNormAct(2, act="swish"),
    )
    model[0].eval()
    model[0].weight.requires_grad_(False)
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("hook"))
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    keys = list(model.state_dict())
    assert gk.convert_sync_batch_norm(model) is model
    assert list(model.state_dict()) == keys
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor is before[name][0] and tensor.data_ptr() == before[name][1]
    kinds = [type(module) for module in model.modules() if not isinstance(module, (nn.Sequential, nn.ModuleDict))]
    assert kinds == [gk.SyncBatchNormAct] * 5 + [nn.InstanceNorm2d, gk.SyncBatchNormAct]
    assert (model[0].act, model[0].act_param, model[0].training, model[0].momentum) == ("elu", 0.7, False, None)
    assert (shared.act, shared.training, shared.process_group) == ("identity", True, None)
    assert model[1]["b"][1].act == "relu" and model[1]["b"][0] is shared and model[5].act == "swish"
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert_close(model[0](x, residual=x), nn.functional.elu(x / (1 + 1e-5) ** 0.5 + x, 0.7))
    handle.remove()
    model[0](x)
    assert calls == ["hook"]
    assert_close(shared(x[..., 0].float()), nn.BatchNorm1d(4)(x[..., 0].float()))
    copy.deepcopy(model)


def test_convert_of_a_single_module_and_of_a_subclass():
    class Own(nn.BatchNorm2d):
        """A subclass of a user's."""

    assert type(gk.convert_sync_batch_norm(nn.BatchNorm1d(3))) is gk.SyncBatchNormAct
    model = nn.Sequential(Own(3), nn.BatchNorm2d(3))
    with pytest.warns(UserWarning, match=r"does not convert these batch norms: 0 \(Own may compute something else\)$"):
        gk.convert_sync_batch_norm(model)
    assert [type(each) for each in model] == [Own, gk.SyncBatchNormAct]


def test_convert_keeps_attributes_that_it_would_replace():
    model = nn.ModuleList([nn.BatchNorm2d(3), nn.SyncBatchNorm(3), gk.BatchNormAct1d(3), nn.BatchNorm2d(3)])
    model[0].act, model[1].act, model[2].process_group = "gelu", nn.GELU(), "mine"
    before = [(type(each), {*each.__dict__}, {*each._modules}) for each in model[:3]]
    with pytest.warns(UserWarning, match=r": 0 \(it has .* replace: act\), 1 \(it has .* replace: act\), 2 \(it has .*: process_group\)$"):
        gk.convert_sync_batch_norm(model)
    assert [(type(each), {*each.__dict__}, {*each._modules}) for each in model[:3]] == before
    assert (model[0].act, model[2].process_group, type(model[3])) == ("gelu", "mine", gk.SyncBatchNormAct)
