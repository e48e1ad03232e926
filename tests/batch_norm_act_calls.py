"""Calls of batch_norm_act and group_norm_act for tests of accuracy: operands, hard inputs, results, the size of their terms.

With num_groups a function here is about group_norm_act, and without it about batch_norm_act. Also used by
bench/bench_accuracy.py, which prints the errors that tests/test_batch_norm_act.py bounds.
"""

import numpy as np
import torch

import gradkernels as gk
from accuracy import exact_batch_norm_act, extended, means_of_sets
from gradkernels import acts, reference

# act -> a parameter that is not the default
PARAMS = {"leaky_relu": 0.2, "elu": 1.3, "swish": 1.7}
ACTS = {name: PARAMS.get(name, act.default) for name, act in acts.ACTS.items()}
# The same as the operators take it: a number also where the act has no parameter.
NUMBERS = {name: param or 0.0 for name, param in ACTS.items()}
TWO_SLOPES = tuple(name for name, act in acts.ACTS.items() if act.saves == "mask")
KINKS = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}
# Slopes that are greater than 1 by more than a tenth.
STEEPEST = {"hardswish": 1.5, "gelu": 1.13, "gelu_tanh": 1.13, "mish": 1.09}
MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}

# Inputs that are hard for the statistics: name -> x, made from normally distributed values.
HARD_INPUTS = {
    "N(0,1)": lambda normal: normal,
    "1e4 +- 1": lambda normal: 1e4 + normal,
    "1e4 +- 1e-2": lambda normal: 1e4 + 1e-2 * normal,
    "first element 1e6": lambda normal: with_element(normal, 0, 1e6),
    "last element 1e6": lambda normal: with_element(normal, -1, 1e6),
    "scale 1e18": lambda normal: 1e18 * normal,
    "scale 1e-18": lambda normal: 1e-18 * normal,
    "constant": lambda normal: torch.full_like(normal, 3.7),
    "drift": lambda normal: normal + torch.linspace(-100, 100, normal.numel(), dtype=normal.dtype).view_as(normal),
}


def with_element(normal, index, value):
    changed = normal.clone()
    changed[(index,) * normal.ndim] = value
    return changed


def laid_out(x, channels_last):
    """x in one of the two layouts that have kernels."""
    if not channels_last:
        return x
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.t().contiguous().t()


def hard_input(name, shape, dtype=torch.float32, channels_last=False):
    torch.manual_seed(3)
    return laid_out(HARD_INPUTS[name](torch.randn(shape)).to(dtype), channels_last)


def arguments(shape, dtype=torch.float32, *, x=None, residual=False, seed=0, running=True):
    """The operands of a call, none of them constant: x, four vectors per channel, a residual or None, grad_y.

    running: with the running statistics, which group_norm_act does not have.
    """
    torch.manual_seed(seed)
    channels = shape[1]
    if x is None:
        x = torch.randn(shape, dtype=dtype) * 2 + torch.randn(channels, dtype=dtype).view(1, -1, *[1] * (len(shape) - 2))
    return {
        "x": x,
        "running_mean": torch.randn(channels, dtype=dtype) if running else None,
        "running_var": torch.rand(channels, dtype=dtype) + 0.5 if running else None,
        "weight": (torch.rand(channels, dtype=dtype) * 2 + 0.5) * torch.randn(channels, dtype=dtype).sign(),
        "bias": torch.randn(channels, dtype=dtype),
        "residual": torch.randn(shape, dtype=dtype) if residual else None,
        "grad_y": torch.randn(shape, dtype=dtype),
    }


def cast(given, dtype):
    return {name: None if tensor is None else tensor.to(dtype) for name, tensor in given.items()}


def call(function, given, training, act, momentum=0.1, eps=1e-5, act_param="of the table"):
    """y, the gradients and the running statistics after the call, by name. `given` does not change."""
    param = ACTS[act] if act_param == "of the table" else act_param
    names = [name for name in ("x", "weight", "bias", "residual") if given[name] is not None]
    leaves = {name: given[name].detach().requires_grad_() for name in names}
    stats = {name: None if given[name] is None else given[name].clone() for name in ("running_mean", "running_var")}
    y = function(
        leaves["x"],
        stats["running_mean"],
        stats["running_var"],
        leaves.get("weight"),
        leaves.get("bias"),
        training,
        momentum,
        eps,
        act=act,
        act_param=param,
        residual=leaves.get("residual"),
    )
    grads = torch.autograd.grad(y, list(leaves.values()), given["grad_y"])
    return {"y": y.detach(), **{f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}, **stats}


def of_groups(function, num_groups):
    """group_norm_act with the arguments of batch_norm_act; without num_groups the function itself."""
    if num_groups is None:
        return function

    def call_of_groups(x, running_mean, running_var, weight, bias, training, momentum, eps, **options):
        assert training and running_mean is None and running_var is None
        return function(x, num_groups, weight, bias, eps, **options)

    return call_of_groups


def norm_act(library, num_groups=None):
    """The function of a library (gradkernels or gradkernels.reference), with the arguments of batch_norm_act."""
    return of_groups(library.batch_norm_act if num_groups is None else library.group_norm_act, num_groups)


def without_kinks(given, training, act, eps=1e-5, num_groups=None):
    """`given` with a grad_y of 0 near the kinks, where rounding decides about the slope."""
    kinks = KINKS.get(act, ())
    wide = cast(given, torch.float64)
    u = norm_act(reference, num_groups)(
        *(wide[name] for name in ("x", "running_mean", "running_var", "weight", "bias")),
        training,
        0.0,
        eps,
        act="identity",
        residual=wide["residual"],
    )
    near = sum((u - kink).abs() < 1e-5 for kink in kinks) > 0 if kinks else torch.zeros_like(u, dtype=torch.bool)
    return given | {"grad_y": torch.where(near, 0, given["grad_y"])}


def scales_of(given, training, act, momentum, eps, num_groups=None):
    """The size of the terms of each result: for sums over a channel their norm, for y and grad_x the largest.

    A mean in float64 has an error of half an ulp, because there is no wider type. In every result that
    contains x - mean, mean * invstd is therefore one of the terms. The activations of STEEPEST halve a small argument,
    whose rounding counts then. The terms of their gradients, and of swish's, cancel near a zero.
    """
    x, grad_y = extended(given["x"]), abs(extended(given["grad_y"]))
    axes, per_channel = (0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
    if training:
        mean = means_of_sets(x, num_groups)
        var = means_of_sets(np.square(x - mean), num_groups)
    else:
        mean, var = (extended(given[name]).reshape(per_channel) for name in ("running_mean", "running_var"))
    invstd = 1 / np.sqrt(var + eps)
    normalised = (x - mean) * invstd
    weight = abs(extended(1.0 if given["weight"] is None else given["weight"])).reshape(per_channel)
    norm, norm_of_weight = (np.sqrt(np.square(terms).sum(axes)) for terms in (grad_y, grad_y * normalised))
    gain = invstd * weight
    offset = abs(mean) * invstd if given["x"].dtype == torch.float64 else 0 * invstd
    offset_of_channels = np.broadcast_to(offset, (len(offset), *x.shape[1:])).max(axes)
    gain_of_gradient = gain * grad_y.max(axes, keepdims=True) * STEEPEST.get(act, 1)
    count = x.size // x.shape[1] if num_groups is None else x[0].size // num_groups
    # The mean of grad_y * weight * normalised over a set.
    of_products = np.sqrt(means_of_sets(np.square(grad_y * normalised * weight), num_groups) / count)
    argument = (abs(normalised) * weight).max()
    return {
        "y": max((offset * gain).max(), argument if act in STEEPEST else 0),
        "grad_weight": np.maximum(norm, norm_of_weight) + offset_of_channels * norm,
        "grad_bias": norm,
        "grad_residual": grad_y.max() if act in ("swish", *STEEPEST) else 0,
        "grad_x": (gain_of_gradient + offset * invstd * of_products).max(),
        "running_mean": abs(momentum) * np.sqrt(np.square(x).sum(axes)) / (x.size // x.shape[1]),
    }


def exact_result(given, training, act, momentum=0.1, eps=1e-5, num_groups=None):
    """The same as call(), with more digits."""
    if given["x"].dtype != torch.float64:
        # In channels_last, torch's group norm subtracts squares of sums, which cancel in float64 too.
        wide = {name: None if tensor is None else tensor.contiguous() for name, tensor in cast(given, torch.float64).items()}
        return call(norm_act(reference, num_groups), wide, training, act, momentum, eps)
    operands = (given[name] for name in ("x", "running_mean", "running_var", "weight", "bias"))
    options = {"residual": given["residual"], "grad_y": given["grad_y"], "act": act, "act_param": ACTS[act], "num_groups": num_groups}
    return exact_batch_norm_act(*operands, training, momentum, eps, **options)


def judged(given, training, act, momentum=0.1, eps=1e-5, num_groups=None):
    """name -> (ours, torch's, exact, size of the terms), for y, the gradients and the running statistics."""
    given = without_kinks(given, training, act, eps, num_groups)
    ours, theirs = (call(norm_act(library, num_groups), given, training, act, momentum, eps) for library in (gk, reference))
    exact = exact_result(given, training, act, momentum, eps, num_groups)
    scales = scales_of(given, training, act, momentum, eps, num_groups)
    return {name: (ours[name], theirs[name], exact[name], scales.get(name, 0.0)) for name in ours if ours[name] is not None}
