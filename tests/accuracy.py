"""How near a result must be, in one place: its error is at most torch's own error or 2 ulp, whichever is larger.

Float64 has no wider type to compute in, and gets half an ulp more. Bfloat16 and float16 are computed in float32 and rounded once: half an
ulp for the rounding, 0.01 for what float32 missed before it, whatever torch's own error is.

Exact means more digits than the result has: below float64 gradkernels.reference run in float64, for float64 the same formulas in numpy's
long double (64 bits of mantissa on x86), which stand here and are held against gradkernels.reference by the tests that use them.
"""

import numpy as np
import torch

from gradkernels import _native

# Without an instruction that multiplies and adds in one rounding, as csrc/math/exp.h has it.
ULP_BOUND = 2.0 if _native.C is None or _native.C.instruction_set() != "base" else 4.0
# In ulp of the terms, under any grad_y.
SWISH_GRADIENT = 3.4
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
ROUNDED_ONCE = 0.51


def extended(tensor):
    """The tensor's values as numpy long doubles; numbers and None pass through, as they do through torch's functions."""
    if isinstance(tensor, torch.Tensor):
        # numpy has no bfloat16.
        return (tensor.double() if tensor.dtype in SIXTEEN_BITS else tensor).detach().cpu().numpy().astype(np.longdouble)
    return tensor if tensor is None else np.asarray(tensor, np.longdouble)


def spacing(magnitude, dtype):
    """The distance of neighbouring numbers of dtype at a magnitude, which may lie between two of them; that of the largest beyond it."""
    info = torch.finfo(dtype)
    # Each of the four types has its spacings in float64, whose frexp is ten times that of long double.
    clamped = np.clip(magnitude, info.smallest_normal, info.max).astype(np.float64)
    return np.ldexp(info.eps, np.frexp(clamped)[1] - 1)


def ulps(actual, exact, dtype, unit):
    """|actual - exact| in units in the last place of dtype; 0 where both are the same inf or nan, inf where only one of them is."""
    with np.errstate(all="ignore"):
        largest = np.longdouble(torch.finfo(dtype).max)
        rounded = np.where(np.abs(exact) >= largest + spacing(largest, dtype) / 2, np.copysign(np.inf, exact), exact)
        same = (actual == rounded) | (np.isnan(actual) & np.isnan(exact))
        error = np.abs(actual - exact) / unit
        return np.where(same & ~np.isfinite(rounded), 0, np.where(np.isfinite(error), error, np.inf))


def errors_in_ulps(actual, torchs, exact, *, per="element", scale=0.0, bound=ULP_BOUND):
    """The errors of `actual` and of `torchs`, element by element, and the bound on ours, as assert_accurate says."""
    dtype = actual.dtype
    exact = extended(exact)
    magnitude = np.abs(exact)
    if per == "tensor":
        finite = magnitude[np.isfinite(magnitude)]
        magnitude = np.full_like(magnitude, finite.max() if finite.size else 1)
    magnitude = np.maximum(np.where(np.isfinite(magnitude), magnitude, 1), extended(scale))
    if per == "tensor":
        info = torch.finfo(dtype)
        unit = np.maximum(magnitude * info.eps, spacing(0, dtype))
    else:
        unit = spacing(magnitude, dtype)
    if dtype in SIXTEEN_BITS:
        # Where bound float32 ulp of the terms are more than 0.01 ulp of the result, so much more is allowed.
        own = spacing(np.where(np.isfinite(exact), np.abs(exact), 1), dtype)
        unit = own / ROUNDED_ONCE * np.maximum(ROUNDED_ONCE, 0.5 + bound * spacing(magnitude, torch.float32) / own)
        bound = ROUNDED_ONCE
    elif dtype == torch.float64:
        bound += 0.5
    return ulps(extended(actual), exact, dtype, unit), ulps(extended(torchs), exact, dtype, unit), bound


def assert_accurate(name, actual, torchs, exact, *, per="element", scale=0.0, bound=ULP_BOUND, most=np.inf):
    """Fails, saying where and by how much, unless the largest error of `actual` is at most max(largest error of `torchs`, `bound`).

    An ulp is that of the exact element, or with per="tensor" the largest exact element times the dtype's epsilon: what a sum of terms that
    cancel can be held to.
    `scale` (a number, or one per element) is the size of the terms where they are larger than the result they cancel to. Where torch is
    lost (inf or nan instead of a number) its error counts for nothing; `most` bounds ours where torch's is known to be large.

    16 bits: `bound` float32 ulp of the larger of result and scale, at least 0.01 ulp of the result, and half an ulp of it to round.
    """
    assert actual.shape == torchs.shape and actual.dtype == torchs.dtype, (
        f"{name}: {actual.shape} {actual.dtype}, torch has {torchs.shape} {torchs.dtype}"
    )
    exact = extended(exact)
    assert tuple(exact.shape) == tuple(actual.shape), f"{name}: {tuple(actual.shape)}, the reference has {tuple(exact.shape)}"
    if exact.size == 0:
        return
    ours, theirs, bound = errors_in_ulps(actual, torchs, exact, per=per, scale=scale, bound=bound)
    if actual.dtype in SIXTEEN_BITS:
        most = bound
    bound = min(max(float(theirs[np.isfinite(theirs)].max(initial=0)), bound), most)
    if float(ours.max()) <= bound:
        return
    worst = np.unravel_index(np.argmax(ours), ours.shape)
    index = tuple(int(i) for i in worst)
    raise AssertionError(
        f"{name} at {index} of {tuple(actual.shape)} is {actual[index].item()!r}, off by {float(ours[worst]):.3g} ulp; "
        f"exact {float(exact[worst])!r}; torch {torchs[index].item()!r}, off by {float(theirs[worst]):.3g} ulp there and at most "
        f"{float(theirs.max()):.3g} anywhere; {int((ours > bound).sum())} of {ours.size} elements are off by more than {bound:.3g} ulp"
    )


def assert_bitwise_equal(name, actual, expected):
    """Fails, saying where, unless both hold the same bits; any nan equals any nan, +0 does not equal -0."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
        f"{name}: {actual.shape} {actual.dtype}, not {expected.shape} {expected.dtype}"
    )
    if actual.dtype.is_floating_point:
        same = (actual == expected) & (actual.signbit() == expected.signbit()) | (actual.isnan() & expected.isnan())
    else:
        same = actual == expected
    if not same.all():
        first = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int((~same).sum())} of {same.numel()} elements differ, first at {first}: "
            f"{actual[first].item()!r} is not {expected[first].item()!r}"
        )


def outcome(function, *args, **kwargs):
    """What a call comes to: its result, or the type and the words of its exception."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error).splitlines()[0]


def assert_same_outcome(name, actual, expected):
    """Fails unless both calls returned equal tensors of one dtype, or raised the same exception with the same first line."""
    if isinstance(expected, tuple) and isinstance(expected[0], type):
        assert actual == expected, f"{name}: {actual}, where torch raises {expected}"
    else:
        assert isinstance(actual, torch.Tensor), f"{name}: {actual}, where torch returns {expected}"
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}")


def exact_act(u, act, param):
    """act(u) and its derivative, with torch's choice at the kinks."""
    one, zero = np.ones_like(u), np.zeros_like(u)
    if act == "identity":
        return u, one
    if act == "relu":
        return np.maximum(u, 0), np.where(u > 0, one, zero)
    if act == "relu6":
        return np.clip(u, 0, 6), np.where((u > 0) & (u < 6), one, zero)
    if act == "leaky_relu":
        return np.where(u > 0, u, param * u), np.where(u > 0, one, param * one)
    if act == "elu":
        return np.where(u > 0, u, param * np.expm1(np.minimum(u, 0))), np.where(u > 0, one, param * np.exp(np.minimum(u, 0)))
    with np.errstate(over="ignore"):
        gate = 1 / (1 + np.exp(-param * u))
        return u * gate, gate + param * u * gate / (1 + np.exp(param * u))


def exact_activation(x, grad_y, act, param):
    """y and grad_x of an activation."""
    y, slope = exact_act(extended(x), act, extended(param))
    return y, extended(grad_y) * slope


def activation_scales(x, grad_y, act, param, *, reads_output=False):
    """The size of what y and grad_x of an activation are computed from, where rounding it costs more than 2 ulp of the result.

    elu's gradient may be read off the output, grad_y * (y + alpha); swish rounds beta * x (not for beta = 1), which exp magnifies by
    |beta x|, and its gradient is the sum of two terms of either sign.
    """
    x, grad_y, param = extended(x), abs(extended(grad_y)), extended(param)
    if act == "elu":
        return 0.0, grad_y * abs(param) * reads_output
    if act == "swish":
        with np.errstate(all="ignore"):
            z = param * x
            gate = 1 / (1 + np.exp(-z))
            magnified = 1 + abs(z) * (1 - gate) * (param != 1)
            return tuple(np.nan_to_num(each) for each in (abs(x) * gate * magnified, grad_y * gate * (1 + abs(z) * (1 - gate)) * magnified))
    return 0.0, 0.0


def exact_batch_norm_act(x, running_mean, running_var, weight, bias, training, momentum, eps, *, act, act_param, residual, grad_y):
    """y, every gradient and the running statistics afterwards, by name; None where there is no such thing."""
    x, grad_y = extended(x), extended(grad_y)
    axes = (0, *range(2, x.ndim))
    per_channel = (1, -1, *([1] * (x.ndim - 2)))
    count = x.size // x.shape[1]
    running_mean, running_var, weight, bias = (extended(each) for each in (running_mean, running_var, weight, bias))
    if training:
        mean = x.mean(axes)
        centred = x - mean.reshape(per_channel)
        var = np.square(centred).mean(axes)
        if running_mean is not None:
            momentum = np.longdouble(momentum)
            running_mean = (1 - momentum) * running_mean + momentum * mean
            running_var = (1 - momentum) * running_var + momentum * var * count / (count - 1)
    else:
        var = running_var
        centred = x - running_mean.reshape(per_channel)
    invstd = (1 / np.sqrt(var + np.longdouble(eps))).reshape(per_channel)
    normalised = centred * invstd
    gain = np.ones_like(invstd) if weight is None else weight.reshape(per_channel)
    u = normalised * gain
    if bias is not None:
        u = u + bias.reshape(per_channel)
    if residual is not None:
        u = u + extended(residual)
    y, slope = exact_act(u, act, extended(act_param))
    grad_u = grad_y * slope
    grad_weight = (grad_u * normalised).sum(axes)
    grad_bias = grad_u.sum(axes)
    grad_x = grad_u * gain * invstd
    if training:
        grad_x = grad_x - gain * invstd * (grad_bias.reshape(per_channel) + normalised * grad_weight.reshape(per_channel)) / count
    return {
        "y": y,
        "grad_x": grad_x,
        "grad_weight": None if weight is None else grad_weight,
        "grad_bias": None if bias is None else grad_bias,
        "grad_residual": None if residual is None else grad_u,
        "running_mean": running_mean,
        "running_var": running_var,
    }
