"""Calls of batch_norm_act for tests of accuracy: operands, hard inputs, results, the size of their terms.

Also used by bench/bench_accuracy.py, which prints the errors that tests/test_batch_norm_act.py bounds.
"""

import numpy as np
import torch

import gradkernels as gk
from accuracy import exact_batch_norm_act, extended
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


def arguments(shape, dtype=torch.float32, *, x=None, residual=False, seed=0):
    """The operands of a call, none of them constant: x, four vectors per channel, a residual or None, grad_y."""
    torch.manual_seed(seed)
    channels = shape[1]
    if x is None:
        x = torch.randn(shape, dtype=dtype) * 2 + torch.randn(channels, dtype=dtype).view(1, -1, *[1] * (len(shape) - 2))
    return {
        "x": x,
        "running_mean": torch.randn(channels, dtype=dtype),
        "running_var": torch.rand(channels, dtype=dtype) + 0.5,
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


def without_kinks(given, training, act, eps=1e-5):
    """`given` with a grad_y of 0 near the kinks, where rounding decides about the slope."""
    kinks = KINKS.get(act, ())
    wide = cast(given, torch.float64)
    u = reference.batch_norm_act(
        *(wide[name] for name in ("x", "running_mean", "running_var", "weight", "bias")),
        training,
        0.0,
        eps,
        act="identity",
        residual=wide["residual"],
    )
    near = sum((u - kink).abs() < 1e-5 for kink in kinks) > 0 if kinks else torch.zeros_like(u, dtype=torch.bool)
    return given | {"grad_y": torch.where(near, 0, given["grad_y"])}


def scales_of(given, training, act, momentum, eps):
    """The size of the terms of each result: for sums over a channel their norm, for y and grad_x the largest.

    A mean in float64 has an error of half an ulp, because there is no wider type. In every result that
    contains x - mean, mean * invstd is therefore one of the terms. The activations of STEEPEST halve a small argument,
    whose rounding counts then.
    """
    x, grad_y = extended(given["x"]), extended(given["grad_y"])
    axes = (0, *range(2, x.ndim))
    mean, var = (x.mean(axes), x.var(axes)) if training else (extended(given["running_mean"]), extended(given["running_var"]))
    invstd = 1 / np.sqrt(var + eps)
    normalised = np.moveaxis(np.moveaxis(x, 1, -1) - mean, -1, 1) * invstd.reshape(1, -1, *[1] * (x.ndim - 2))
    norm, norm_of_weight = (np.sqrt(np.square(terms).sum(axes)) for terms in (grad_y, grad_y * normalised))
    gain = invstd * abs(extended(1.0 if given["weight"] is None else given["weight"]))
    offset = abs(mean) * invstd if given["x"].dtype == torch.float64 else 0 * invstd
    gain_of_gradient = gain * abs(grad_y).max(axes) * STEEPEST.get(act, 1)
    argument = (abs(normalised) * abs(extended(1.0 if given["weight"] is None else given["weight"])).reshape(-1, *[1] * (x.ndim - 2))).max()
    return {
        "y": max((offset * gain).max(), argument if act in STEEPEST else 0),
        "grad_weight": np.maximum(norm, norm_of_weight) + offset * norm,
        "grad_bias": norm,
        "grad_x": (gain_of_gradient + offset * gain * norm_of_weight / (x.size // x.shape[1])).max(),
        "running_mean": abs(momentum) * np.sqrt(np.square(x).sum(axes)) / (x.size // x.shape[1]),
    }


def exact_result(given, training, act, momentum=0.1, eps=1e-5):
    """The same as call(), with more digits."""
    if given["x"].dtype != torch.float64:
        return call(reference.batch_norm_act, cast(given, torch.float64), training, act, momentum, eps)
    operands = (given[name] for name in ("x", "running_mean", "running_var", "weight", "bias"))
    param = {"residual": given["residual"], "grad_y": given["grad_y"], "act": act, "act_param": ACTS[act]}
    return exact_batch_norm_act(*operands, training, momentum, eps, **param)


def judged(given, training, act, momentum=0.1, eps=1e-5):
    """name -> (ours, torch's, exact, size of the terms), for y, the gradients and the running statistics."""
    given = without_kinks(given, training, act, eps)
    ours = call(gk.batch_norm_act, given, training, act, momentum, eps)
    theirs = call(reference.batch_norm_act, given, training, act, momentum, eps)
    exact = exact_result(given, training, act, momentum, eps)
    scales = scales_of(given, training, act, momentum, eps)
    return {name: (ours[name], theirs[name], exact[name], scales.get(name, 0.0)) for name in ours if ours[name] is not None}
