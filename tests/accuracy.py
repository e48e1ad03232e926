"""The bounds of the tests: the error of a result is at most torch's own error or 2 ulp, whichever is larger.

float64 is allowed half an ulp more, because there is no wider type to compute in. bfloat16 and float16 are
computed in float32 and rounded once. They are allowed 0.51 ulp, whatever torch's own error is: half an ulp
for the rounding and 0.01 ulp for the error of float32 before it.

"Exact" results have more digits than the result under test. Below float64 they come from
gradkernels.reference run in float64. For float64 they come from the formulas in this file, in numpy's long
double (64 bits of mantissa on x86); the tests compare these formulas with gradkernels.reference.
"""

import math

import numpy as np
import torch

from gradkernels import _native

# 4 ulp on processors that cannot multiply and add with one rounding: csrc/math/exp.h states this bound.
ULP_BOUND = 2.0 if _native.C is None or _native.C.instruction_set() != "base" else 4.0
# The bound of swish's gradient for any grad_y, in ulp of its terms.
SWISH_GRADIENT = 3.4
ROUNDED_ONCE = 0.51

WIDE_DTYPES = (torch.float32, torch.float64)
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
DTYPES = (*WIDE_DTYPES, *SIXTEEN_BITS)
# Dtypes without a kernel of ours: torch's own functions compute them.
ROUTED_DTYPES = (torch.int64, torch.bool, torch.complex64)


def extended(tensor):
    """The values of a tensor or a number as numpy long doubles; None stays None."""
    if isinstance(tensor, torch.Tensor):
        # numpy has no bfloat16, whose values float64 holds exactly.
        return (tensor.double() if tensor.dtype in SIXTEEN_BITS else tensor).detach().cpu().numpy().astype(np.longdouble)
    return tensor if tensor is None else np.asarray(tensor, np.longdouble)


def spacing(magnitude, dtype):
    """The distance between neighbouring numbers of dtype at this magnitude."""
    info = torch.finfo(dtype)
    # float64 holds the spacings of all four dtypes, and its frexp is ten times faster than long double's.
    clamped = np.clip(magnitude, info.smallest_normal, info.max).astype(np.float64)
    return np.ldexp(info.eps, np.frexp(clamped)[1] - 1)


def ulps(actual, exact, dtype, unit):
    """|actual - exact| / unit; 0 where both are the same inf or both are nan, inf where only one of them is.

    An exact number that dtype would round to inf counts as inf.
    """
    with np.errstate(all="ignore"):
        largest = np.longdouble(torch.finfo(dtype).max)
        rounded = np.where(np.abs(exact) >= largest + spacing(largest, dtype) / 2, np.copysign(np.inf, exact), exact)
        same = (actual == rounded) | (np.isnan(actual) & np.isnan(exact))
        error = np.abs(actual - exact) / unit
        return np.where(same & ~np.isfinite(rounded), 0, np.where(np.isfinite(error), error, np.inf))


def errors_in_ulps(actual, torchs, exact, *, per="element", scale=0.0, bound=ULP_BOUND):
    """The errors of `actual` and of `torchs` for each element, and the bound; see assert_accurate."""
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
        # 0.51 ulp of the result, or 0.5 ulp plus `bound` float32 ulp of the terms if that is more.
        own = spacing(np.where(np.isfinite(exact), np.abs(exact), 1), dtype)
        unit = own / ROUNDED_ONCE * np.maximum(ROUNDED_ONCE, 0.5 + bound * spacing(magnitude, torch.float32) / own)
        bound = ROUNDED_ONCE
    elif dtype == torch.float64:
        bound += 0.5
    return ulps(extended(actual), exact, dtype, unit), ulps(extended(torchs), exact, dtype, unit), bound


def assert_accurate(name, actual, torchs, exact, *, per="element", scale=0.0, bound=ULP_BOUND, most=np.inf):
    """Fails unless the largest error of `actual` is at most max(largest error of `torchs`, `bound`).

    per: "element" counts in ulp of the exact element, "tensor" in the largest exact element times the dtype's
    epsilon, because a sum of terms that cancel cannot be more accurate than that.
    scale: the size of the terms (a number, or one for each element), where the terms are larger than the
    result that they cancel to.
    most: limits the bound, where torch's error is known to be large.

    An element that is inf or nan only in `torchs` does not widen the bound.

    In 16 bits the bound is half an ulp of the result for the rounding, plus `bound` float32 ulp of the larger
    of result and scale, but at least 0.01 ulp of the result.
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
    """Fails, with the first difference, unless both hold the same bits. nan equals nan, +0 does not equal -0."""
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
    """The result of a call, or the type of its exception and the first line of the message."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error).splitlines()[0]


def assert_same_outcome(name, actual, expected):
    """Fails unless both calls returned equal tensors of one dtype, or raised the same exception."""
    if isinstance(expected, tuple) and isinstance(expected[0], type):
        assert actual == expected, f"{name}: {actual}, where torch raises {expected}"
    else:
        assert isinstance(actual, torch.Tensor), f"{name}: {actual}, where torch returns {expected}"
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}")


def swept():
    """float32 numbers of every size, denormals too, and many where exp saturates; then inf, 0 and nan."""
    bits = (2.0 ** torch.arange(-149, 128, dtype=torch.float64)).float().view(torch.int32)
    neighbours = (bits[:, None] + torch.arange(-64, 65)).clamp(0, 0x7F7FFFFF).to(torch.int32).view(torch.float32).flatten()
    random_bits = torch.randint(0, 0x7F800000, (200_000,), dtype=torch.int32).view(torch.float32)
    dense = torch.cat([torch.rand(200_000) * 4, torch.rand(100_000) * 110])
    ends = torch.cat([torch.linspace(start, start + 3, 20_001) for start in (15.0, 16.5, 86.5, 87.0, 88.0, 102.0, 103.5)])
    largest = torch.tensor([torch.finfo(torch.float32).max, math.inf, 0.0])
    positive = torch.cat([neighbours, random_bits, dense, ends, largest])
    # nan is not last, because torch's gradient at a nan differs in the elements left over from whole vectors.
    return torch.cat([torch.tensor([math.nan]), positive, -positive])


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
    if act == "hardswish":
        return u * (np.clip(u, -3, 3) + 3) / 6, np.where(u <= -3, zero, np.where(u >= 3, one, (2 * u + 3) / 6))
    if act == "swish":
        with np.errstate(over="ignore"):
            gate = 1 / (1 + np.exp(-param * u))
            return u * gate, gate + param * u * gate / (1 + np.exp(param * u))
    if act == "gelu":
        value, density = normal_distribution(u)
        return u * value, value + u * density
    if act == "gelu_tanh":
        with np.errstate(over="ignore", invalid="ignore"):
            z, slope = gelu_tanh_terms(u)
            gate, complement = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
            # Far from 0 torch's is inf 0.
            return u * gate, gate + np.where((complement == 0) | (gate == 0), u * 0, u * slope * gate * complement)
    if act == "mish":
        with np.errstate(over="ignore"):
            power = np.exp(-abs(u))
            denominator = np.where(u < 0, power * (power + 2) + 2, 1 + 2 * power + 2 * power**2)
            value = np.where(u < 0, power * (power + 2), 1 + 2 * power) / denominator
            slope = 4 * np.where(u < 0, power, power**2) * (1 + power) / denominator**2
        return u * value, value + u * slope
    raise ValueError(f"exact_act does not know {act}")


def normal_distribution(u):
    """The distribution function of the normal distribution, and its density, to the digits of long double."""
    t = np.minimum(np.abs(u), 200)
    density = np.exp(-(t**2) / 2) / np.sqrt(2 * np.longdouble("3.14159265358979323846"))
    near, term = np.zeros_like(t), t
    for i in range(1, 60):
        near, term = near + term, term * t**2 / (2 * i + 1)
    # The continued fraction of Mills' ratio.
    far = t
    for i in range(250, 0, -1):
        far = t + i / np.where(far == 0, 1, far)
    with np.errstate(all="ignore"):
        tail = np.where(t < 2, 0.5 - density * near, density / far)
    return np.where(u < 0, tail, 1 - tail), density


def gelu_tanh_terms(u):
    """z of u sigmoid(z), and its derivative."""
    factor = np.sqrt(8 / np.longdouble("3.14159265358979323846"))
    cubic = np.longdouble("0.044715")
    return factor * (u + cubic * u**3), factor * (1 + 3 * cubic * u**2)


def exact_activation(x, grad_y, act, param):
    """y and grad_x of an activation."""
    y, slope = exact_act(extended(x), act, extended(param))
    return y, extended(grad_y) * slope


def activation_scales(x, grad_y, act, param, *, reads_output=False):
    """The size of the terms of y and grad_x where rounding them costs more than 2 ulp of the result, else 0.

    elu's gradient may be computed from the output, as grad_y * (y + alpha). swish rounds beta * x unless beta
    is 1, and exp multiplies this error by |beta x|; gelu_tanh rounds a polynomial. The gradients of these, of
    hardswish, gelu and mish are sums of two terms of either sign.
    """
    x, grad_y, param = extended(x), abs(extended(grad_y)), extended(param)
    if act == "elu":
        return 0.0, grad_y * abs(param) * reads_output
    if act == "hardswish":
        return 0.0, grad_y * (abs(x) <= 3) * (abs(np.clip(x, -3, 3)) / 3 + 0.5)
    if act == "swish":
        with np.errstate(all="ignore"):
            z = param * x
            gate = 1 / (1 + np.exp(-z))
            magnified = 1 + abs(z) * (1 - gate) * (param != 1)
            return tuple(np.nan_to_num(each) for each in (abs(x) * gate * magnified, grad_y * gate * (1 + abs(z) * (1 - gate)) * magnified))
    if act in ("gelu", "mish"):
        with np.errstate(all="ignore"):
            y, slope = exact_act(x, act, param)
            return 0.0, np.nan_to_num(grad_y * (2 * abs(y / x) + abs(slope)))
    if act == "gelu_tanh":
        with np.errstate(all="ignore"):
            z, slope = gelu_tanh_terms(x)
            gate = 1 / (1 + np.exp(-z))
            magnified = 1 + 2 * abs(z) * (1 - gate)
            terms = grad_y * gate * (1 + abs(x) * slope * (1 - gate)) * magnified
            return tuple(np.nan_to_num(each, posinf=0.0) for each in (abs(x) * gate * magnified, terms))
    return 0.0, 0.0


def means_of_sets(values, num_groups=None):
    """The mean of each set of elements that has common statistics, in a shape that broadcasts to that of values.

    A set is a channel, or, with num_groups, a group of channels of one sample.
    """
    if num_groups is None:
        return values.mean((0, *range(2, values.ndim)), keepdims=True)
    samples, channels = values.shape[:2]
    means = values.reshape(samples, num_groups, -1).mean(2).repeat(channels // num_groups, 1)
    return means.reshape(samples, channels, *[1] * (values.ndim - 2))


def exact_batch_norm_act(
    x, running_mean, running_var, weight, bias, training, momentum, eps, *, act, act_param, residual, grad_y, num_groups=None
):
    """y, the gradients and the running statistics after the call, by name; None for operands left out.

    With num_groups, those of group_norm_act, which has no running statistics and is always in training.
    """
    x, grad_y = extended(x), extended(grad_y)
    axes = (0, *range(2, x.ndim))
    per_channel = (1, -1, *([1] * (x.ndim - 2)))
    count = x.size // x.shape[1]
    running_mean, running_var, weight, bias = (extended(each) for each in (running_mean, running_var, weight, bias))
    if training:
        mean = means_of_sets(x, num_groups)
        centred = x - mean
        var = means_of_sets(np.square(centred), num_groups)
        if running_mean is not None:
            momentum = np.longdouble(momentum)
            running_mean = (1 - momentum) * running_mean + momentum * mean.reshape(-1)
            running_var = (1 - momentum) * running_var + momentum * var.reshape(-1) * count / (count - 1)
    else:
        var = running_var.reshape(per_channel)
        centred = x - running_mean.reshape(per_channel)
    invstd = 1 / np.sqrt(var + np.longdouble(eps))
    normalised = centred * invstd
    gain = np.longdouble(1) if weight is None else weight.reshape(per_channel)
    u = normalised * gain
    if bias is not None:
        u = u + bias.reshape(per_channel)
    if residual is not None:
        u = u + extended(residual)
    y, slope = exact_act(u, act, extended(act_param))
    grad_u = grad_y * slope
    grad_normalised = grad_u * gain
    grad_x = grad_normalised * invstd
    if training:
        of_sets, of_products = (means_of_sets(terms, num_groups) for terms in (grad_normalised, grad_normalised * normalised))
        grad_x = grad_x - invstd * (of_sets + normalised * of_products)
    return {
        "y": y,
        "grad_x": grad_x,
        "grad_weight": None if weight is None else (grad_u * normalised).sum(axes),
        "grad_bias": None if bias is None else grad_u.sum(axes),
        "grad_residual": None if residual is None else grad_u,
        "running_mean": running_mean,
        "running_var": running_var,
    }
