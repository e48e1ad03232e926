"""Clipping and the gradient report, compared with torch.nn.utils and with an exact norm.

The error of the norm and of each gradient is at most max(torch's error, 2 ulp). float64 gradients have an
error of at most 2 ulp of the value that follows from the returned norm.
"""

import copy
import itertools
import math
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.nn.utils import clip_grad_norm_ as torch_clip_grad_norm_
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.testing._internal.common_utils import DeterministicGuard

import gradkernels as gk
from accuracy import (
    DTYPES,
    SIXTEEN_BITS,
    ULP_BOUND,
    WIDE_DTYPES,
    assert_accurate,
    assert_bitwise_equal,
    assert_same_outcome,
    extended,
    outcome,
)
from gradkernels import _native, sharded
from gradkernels.gradients import norms_by_torch
from memory import skip_unless_free

OPS = torch.ops.gradkernels

# The sizes of the tensors of one call.
SIZES = {
    "one": [1009],
    "seams": [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 0],
    "chunk": [16383, 16384, 16385],
    "many tiny": [1 + i % 5 for i in range(1500)],
    "one large": [3, 200_003, 1],
}

each_dtype = pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
each_sizes = pytest.mark.parametrize("sizes", SIZES)
each_native_norm = pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0], ids=str)


def parameters_with(grads):
    """A parameter for each gradient, which is not copied. None makes a parameter without a gradient."""
    made = []
    for grad in grads:
        parameter = nn.Parameter(torch.empty(0) if grad is None else torch.empty_like(grad))
        parameter.grad = grad
        made.append(parameter)
    return made


def gradients(sizes, dtype=torch.float32):
    return [torch.randn(size, dtype=dtype) for size in sizes]


def clones(grads):
    return [None if grad is None else grad.clone() for grad in grads]


def exact_norm(grads, norm_type):
    flat = np.concatenate([np.zeros(1, np.longdouble), *(abs(extended(grad)).ravel() for grad in grads)])
    return flat.max() if norm_type == math.inf else flat.sum() if norm_type == 1 else np.sqrt(np.square(flat).sum())


def assert_clips(grads, max_norm, norm_type=2.0):
    """Clips copies with torch and with gradkernels, compares ours with the exact result, and returns ours."""
    ours, theirs = clones(grads), clones(grads)
    # torch refuses an empty gradient, because it has no largest element.
    torch_total = torch_clip_grad_norm_(parameters_with([grad for grad in theirs if grad.numel()]), max_norm, norm_type)
    total = gk.clip_grad_norm_(parameters_with(ours), max_norm, norm_type)
    norm = exact_norm(grads, norm_type)
    # If torch's norm overflows or underflows, torch's error does not widen the bound.
    most = np.inf if 0 < torch_total < np.inf or norm == 0 else ULP_BOUND
    assert_accurate("total norm", total, torch_total, norm, most=most)
    if total.dtype == torch.float64:
        # float64 gradients are computed from the rounded norm, and torch's norm is rounded to another number.
        norm, most = extended(total), ULP_BOUND
    coefficient = min(np.longdouble(max_norm) / (norm + np.longdouble(1e-6)), 1)
    for i, (grad, our, their) in enumerate(zip(grads, ours, theirs, strict=True)):
        assert_accurate(f"gradient {i}", our, their, extended(grad) * coefficient, most=most)
        if coefficient == 1:
            assert_bitwise_equal(f"gradient {i}, which needs no clipping,", our, grad)
    return total, ours


# values


@each_dtype
@each_sizes
@each_native_norm
@pytest.mark.parametrize("max_norm", [1.0, 0.37, 1e9], ids=["clips", "clips more", "does not clip"])
def test_clips_like_torch(sizes, dtype, norm_type, max_norm):
    assert_clips(gradients(SIZES[sizes], dtype), max_norm, norm_type)


@each_dtype
@pytest.mark.parametrize("norm_type", [0.5, 0.0, 3.0, -math.inf, -1.0, math.nan], ids=str)
def test_other_norms_are_torchs(norm_type, dtype):
    grads = gradients([1, 64, 1009], dtype)
    ours, theirs = clones(grads), clones(grads)
    total = gk.clip_grad_norm_(parameters_with(ours), 0.1, norm_type)
    torch_total = torch_clip_grad_norm_(parameters_with(theirs), 0.1, norm_type)
    assert_bitwise_equal("total norm", total, torch_total)
    assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_norm_type_may_be_a_string():
    grads = gradients([64, 1009])
    assert_bitwise_equal(
        "total norm",
        gk.clip_grad_norm_(parameters_with(clones(grads)), 0.1, "inf"),
        torch_clip_grad_norm_(parameters_with(grads), 0.1, "inf"),
    )


@each_native_norm
def test_negative_zero_and_infinite_max_norm(norm_type):
    for max_norm in (-1.0, 0.0, math.inf):
        grads = gradients([1, 64, 1009])
        ours, theirs = clones(grads), clones(grads)
        assert_close(
            gk.clip_grad_norm_(parameters_with(ours), max_norm, norm_type),
            torch_clip_grad_norm_(parameters_with(theirs), max_norm, norm_type),
        )
        assert_close(ours, theirs)


@each_dtype
@each_native_norm
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("max_norm", [1.0, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("sizes", ["seams", "chunk", "many tiny"])
def test_nan_and_inf_spread_like_torchs(sizes, max_norm, value, norm_type, dtype):
    for place in (0, -1):
        grads = gradients(SIZES[sizes], dtype)
        [grad for grad in grads if grad.numel()][place][place] = value
        ours, theirs = clones(grads), clones(grads)
        total = gk.clip_grad_norm_(parameters_with(ours), max_norm, norm_type)
        torch_total = torch_clip_grad_norm_(parameters_with([grad for grad in theirs if grad.numel()]), max_norm, norm_type)
        assert_close(total, torch_total, equal_nan=True)
        assert_close(ours, theirs, equal_nan=True)


@each_dtype
@each_native_norm
def test_nan_max_norm_spreads(norm_type, dtype):
    grads = gradients([1, 64, 1009], dtype)
    ours, theirs = clones(grads), clones(grads)
    assert_close(
        gk.clip_grad_norm_(parameters_with(ours), math.nan, norm_type), torch_clip_grad_norm_(parameters_with(theirs), math.nan, norm_type)
    )
    assert_close(ours, theirs, equal_nan=True)
    assert all(grad.isnan().all() for grad in ours)


def test_gradients_whose_squares_overflow_float32():
    """torch's norm is inf and all its gradients become 0, although float32 can hold the norm."""
    grads = [torch.full((1009,), 1e25), -torch.full((64,), 1e25)]
    theirs = clones(grads)
    assert torch_clip_grad_norm_(parameters_with(theirs), 1.0) == math.inf
    assert all((grad == 0).all() for grad in theirs)
    total, ours = assert_clips(grads, 1.0)
    assert total.isfinite()
    assert_close(torch.cat(ours).double().norm(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_gradients_whose_squares_vanish_in_float32():
    """torch's norm is 0."""
    grads = [torch.full((1009,), 1e-30), -torch.full((64,), 1e-30)]
    assert torch_clip_grad_norm_(parameters_with(clones(grads)), 1.0) == 0
    total, _ = assert_clips(grads, 1.0)
    assert_close(total, torch.tensor(1e-30 * math.sqrt(1073)), rtol=1e-6, atol=0)
    assert_clips(grads, 1e-37)


@pytest.mark.parametrize("scale", [1e300, 1e-300, 1e154, 1e-162], ids=str)
def test_gradients_whose_squares_leave_float64(scale):
    grads = [grad * scale for grad in gradients([1009, 64], torch.float64)]
    total, _ = assert_clips(grads, scale)
    assert total.isfinite() and total > 0
    assert_clips(grads, 1e-3)


def test_one_huge_among_tiny_gradients():
    for place in (0, -1):
        grads = gradients([17, 1009])
        grads[place][place] = 3e38
        assert_clips(grads, 1.0)
        assert_clips(grads, 1.0, math.inf)


def test_a_norm_beyond_float32_is_inf_and_still_clips():
    """The returned norm is inf, as torch's, but the coefficient is computed before that rounding."""
    grads = [torch.full((1009,), 3e38)]
    total = gk.clip_grad_norm_(parameters_with(grads), 1.0)
    assert total == math.inf and total.dtype == torch.float32
    assert_close(grads[0].double().norm(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)


@each_dtype
@each_native_norm
def test_same_bits_for_any_number_of_threads(norm_type, dtype, each_thread_count):
    grads = gradients([1, 50_021, 100_003, 3, 40_009, *range(300)], dtype)

    def run():
        ours = clones(grads)
        return gk.clip_grad_norm_(parameters_with(ours), 0.5, norm_type), *ours

    for results in (each_thread_count(run), (run(), run())):
        for i, (one, two) in enumerate(zip(*results, strict=True)):
            assert_bitwise_equal(f"result {i}", two, one)


@each_native_norm
def test_the_norm_does_not_depend_on_how_the_elements_are_cut(norm_type):
    """To 4 ulp of float64, the bound for a gradient that is sharded over ranks."""
    whole = torch.randn(300_007)
    norms = [OPS.grad_norms([*whole.split(size)], norm_type)[3] for size in (300_007, 100_000, 16_384, 4097, 1000)]
    assert all(norm.dtype == torch.float64 and norm.dim() == 0 for norm in norms)
    for norm in norms:
        assert abs(norm - norms[0]) <= 4 * np.spacing(norms[0].item())


# bfloat16 and float16: one rounding of the result in float64


def assert_clips_halves(grads, max_norm, norm_type=2.0):
    ours = clones(grads)
    total = gk.clip_grad_norm_(parameters_with(ours), max_norm, norm_type)
    norm = exact_norm([grad.double() for grad in grads], norm_type)
    assert total.dtype == grads[0].dtype
    assert_bitwise_equal("total norm", total, torch.tensor(float(norm), dtype=torch.float64).to(total.dtype))
    coefficient = float(min(np.longdouble(max_norm) / (norm + np.longdouble(1e-6)), 1))
    for i, (grad, our) in enumerate(zip(grads, ours, strict=True)):
        exact = grad.double() * coefficient
        rounded = exact.to(our.dtype).abs()
        unit = torch.nextafter(rounded, torch.tensor(math.inf, dtype=our.dtype)).double() - rounded.double()
        assert ((our.double() - exact).abs() <= 0.501 * unit).all(), f"gradient {i}"
    return ours


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@each_sizes
@each_native_norm
@pytest.mark.parametrize("max_norm", [1.0, 0.37, 1e9], ids=["clips", "clips more", "does not clip"])
def test_clips_halves(sizes, dtype, norm_type, max_norm):
    grads = [grad.to(dtype) for grad in gradients(SIZES[sizes])]
    if norm_type == 1 and dtype == torch.float16:
        grads = [grad / 16 for grad in grads]
    assert_clips_halves(grads, max_norm, norm_type)


def test_float16_gradients_whose_norm_passes_65504():
    """torch's norm is inf, and all its gradients become 0."""
    grads = [torch.full((1009,), 40000.0, dtype=torch.float16)]
    theirs = clones(grads)
    assert torch_clip_grad_norm_(parameters_with(theirs), 1.0) == math.inf
    assert (theirs[0] == 0).all()
    total = gk.clip_grad_norm_(parameters_with(grads), 1.0)
    assert total == math.inf and total.dtype == torch.float16
    assert_close(grads[0].double().norm(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_the_coefficient_is_not_rounded_to_bfloat16():
    """torch clips this norm of 30 to 3.02, ours to 3."""
    grads = [torch.full((9,), 10.0, dtype=torch.bfloat16)]
    theirs = clones(grads)
    torch_clip_grad_norm_(parameters_with(theirs), 3.01)
    assert_clips_halves(grads, 3.01)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_halves_by_a_coefficient_beyond_float32(dtype):
    grads = [torch.full((17,), 3e4, dtype=dtype), torch.randn(9).to(dtype)]
    ours = assert_clips_halves(grads, 1e-39 if dtype == torch.bfloat16 else 1e-3)
    assert all(our.abs().max() > 0 for our in ours[:1])


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@each_native_norm
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_of_halves_spread_like_torchs(value, norm_type, dtype):
    for sizes in ("seams", "many tiny"):
        for place in (0, -1):
            grads = [grad.to(dtype) for grad in gradients(SIZES[sizes]) if grad.numel()]
            grads[place][place] = value
            ours, theirs = clones(grads), clones(grads)
            total = gk.clip_grad_norm_(parameters_with(ours), 1.0, norm_type)
            assert_close(total, torch_clip_grad_norm_(parameters_with(theirs), 1.0, norm_type), equal_nan=True)
            assert_close(ours, theirs, equal_nan=True)


# kinds of parameters


def test_a_tensor_a_list_a_generator_a_module_and_names():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model(torch.randn(4, 5)).square().sum().backward()
    model[0].bias.grad = None
    expected = copy.deepcopy(model)
    for copied, parameter in zip(expected.parameters(), model.parameters(), strict=True):
        copied.grad = None if parameter.grad is None else parameter.grad.clone()
    before = clones([parameter.grad for parameter in model.parameters()])
    torch_total = torch_clip_grad_norm_(expected.parameters(), 0.1)
    for given in (
        lambda: list(model.parameters()),
        lambda: model.parameters(),
        lambda: tuple(model.parameters()),
        lambda: model,
        lambda: model.named_parameters(),
        lambda: list(model.named_parameters()),
        lambda: dict(model.named_parameters()).items(),
    ):
        for parameter, grad in zip(model.parameters(), before, strict=True):
            parameter.grad = None if grad is None else grad.clone()
        assert_close(gk.clip_grad_norm_(given(), 0.1), torch_total)
        for parameter, copied in zip(model.parameters(), expected.parameters(), strict=True):
            assert (parameter.grad is None) == (copied.grad is None)
            if parameter.grad is not None:
                assert_close(parameter.grad, copied.grad)
    (single,) = parameters_with([torch.full((4,), 3.0)])
    assert_close(gk.clip_grad_norm_(single, 1.0), torch.tensor(6.0))
    assert_close(single.grad, torch.full((4,), 0.5))


def test_nothing_to_clip():
    for nothing in ([], (), parameters_with([None, None])):
        assert_bitwise_equal("total norm", gk.clip_grad_norm_(nothing, 1.0), torch_clip_grad_norm_(nothing, 1.0))
    grads = [torch.empty(0), torch.empty(3, 0)]
    assert_bitwise_equal("total norm", gk.clip_grad_norm_(parameters_with(grads), 1.0), torch_clip_grad_norm_(parameters_with(grads), 1.0))


def test_an_empty_generator_warns():
    with pytest.warns(UserWarning) as torch_warnings:
        torch_clip_grad_norm_((p for p in ()), 1.0)
    with pytest.warns(UserWarning) as our_warnings:
        assert gk.clip_grad_norm_((p for p in ()), 1.0) == 0
    assert [str(each.message) for each in our_warnings] == [str(each.message) for each in torch_warnings]
    assert our_warnings[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gk.clip_grad_norm_([], 1.0)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_changes_nothing(foreach):
    for dtype in (torch.float32, torch.bfloat16):
        grads = gradients([64, 1009], dtype)
        theirs = clones(grads)
        assert_close(gk.clip_grad_norm_(parameters_with(grads), 0.1, foreach=foreach), torch_clip_grad_norm_(parameters_with(theirs), 0.1))
        assert_close(grads, theirs)


def test_a_parameter_given_twice_is_scaled_as_torch_scales_it():
    grads = gradients([64, 1009])
    theirs = clones(grads)
    results = []
    for given, clip in ((grads, gk.clip_grad_norm_), (theirs, torch_clip_grad_norm_)):
        first, second = parameters_with(given)
        results.append(clip([first, second, first], 0.1))
    assert_close(results[0], results[1])
    assert_close(grads, theirs)


def test_a_large_parameter_given_twice_is_scaled_twice():
    """So large that two threads would scale it at the same time."""
    (grad,) = gradients([300000])
    expected = grad.clone()
    (parameter,) = parameters_with([grad])
    coefficient = 0.1 / (exact_norm([grad, grad], 2.0) + 1e-6)
    gk.clip_grad_norm_([parameter, parameter], 0.1)
    assert_close(grad.double(), expected.double() * float(coefficient) ** 2, rtol=1e-6, atol=0)


# dtypes and layouts


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16,),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.bfloat16),
        (torch.complex64,),
    ],
    ids=str,
)
def test_dtypes(dtypes):
    """The result has torch's dtype and device; torch computes dtypes without a kernel."""
    for max_norm in (0.1, 1e9):
        grads = [torch.randn(size).to(dtype) for size, dtype in zip((64, 1009), itertools.cycle(dtypes), strict=False)]
        theirs = clones(grads)
        total = gk.clip_grad_norm_(parameters_with(grads), max_norm)
        torch_total = torch_clip_grad_norm_(parameters_with(theirs), max_norm)
        exactly = {"rtol": 0, "atol": 0} if dtypes == (torch.complex64,) else {}
        # torch rounds the norms and the coefficient to 16 bits.
        if {*dtypes} & {*SIXTEEN_BITS}:
            exactly = {"rtol": 2e-2, "atol": 1e-4}
        assert_close(total, torch_total, **exactly)
        assert_close(grads, theirs, **exactly)


@each_dtype
def test_the_result(dtype):
    total = gk.clip_grad_norm_(parameters_with(gradients([64], dtype)), 1.0)
    assert total.dtype == dtype and total.dim() == 0 and not total.requires_grad


@each_dtype
@each_native_norm
@pytest.mark.parametrize("offset", [0, 1, 3, 7])
def test_unaligned_storage(offset, norm_type, dtype):
    """The gradient is a piece of a buffer, whose other elements are neither counted nor written."""
    for size in (1, 17, 1009, 20_011):
        buffer = torch.randn(size + offset + 9, dtype=dtype) * 100
        piece = buffer[offset : offset + size]
        piece.copy_(torch.randn(size, dtype=dtype))
        before = buffer.clone()
        _, (expected,) = assert_clips([piece], 0.1, norm_type)
        gk.clip_grad_norm_(parameters_with([piece]), 0.1, norm_type)
        assert_bitwise_equal("gradient", piece, expected)
        assert_bitwise_equal("memory before the gradient", buffer[:offset], before[:offset])
        assert_bitwise_equal("memory after the gradient", buffer[offset + size :], before[offset + size :])


@each_native_norm
def test_strided_gradients(norm_type):
    for base, view in (
        (torch.randn(40, 30), lambda base: base.t()),
        (torch.randn(40, 30), lambda base: base[:, ::2]),
        (torch.randn(40, 30), lambda base: base[3:20, 4:9]),
        (torch.randn(2, 5, 6, 7).contiguous(memory_format=torch.channels_last), lambda base: base),
    ):
        other = torch.randn(65)
        before = base.clone()
        mask = torch.zeros_like(base, dtype=torch.bool)
        view(mask).fill_(True)
        theirs = [view(before.clone(memory_format=torch.preserve_format)), other.clone()]
        torch_total = torch_clip_grad_norm_(parameters_with(theirs), 0.1, norm_type)
        assert_close(gk.clip_grad_norm_(parameters_with([view(base), other]), 0.1, norm_type), torch_total)
        assert_close(view(base), theirs[0])
        assert_close(other, theirs[1])
        assert_bitwise_equal("memory outside the view", base[~mask], before[~mask])


def test_a_strided_gradient_is_scaled_as_a_dense_one():
    """With a coefficient that float32 cannot hold."""
    dense = torch.full((3, 4), 1e38)
    strided = torch.full((3, 8), 1e38)[:, ::2]
    gk.clip_grad_norm_(parameters_with([dense, strided]), 1e-6)
    assert_bitwise_equal("the strided gradient", strided.contiguous(), dense)


# errors, which scale nothing


def stepped(optimizer, **bounds):
    gk.attach_clipping(optimizer, **bounds)
    optimizer.step()


@pytest.mark.parametrize("kernels", ["native", "portable", "none"])
@pytest.mark.parametrize(
    "clip",
    {
        "norm": lambda parameters: gk.clip_grad_norm_(parameters, 0.1),
        "known norm": lambda parameters: gk.clip_grads_with_norm_(parameters, 0.1, torch.tensor(2.0)),
        "value": lambda parameters: gk.clip_grad_value_(parameters, 0.1),
        "adaptive": gk.adaptive_clip_grad_,
        "step": lambda parameters: stepped(torch.optim.SGD(parameters, lr=1.0), max_norm=0.1, skip_above=100.0),
    }.items(),
    ids=lambda clip: clip[0],
)
def test_overlapping_gradients_are_refused_before_others_are_written(clip, kernels, monkeypatch):
    if kernels != "native":
        library, reason = _native.load_portable() if kernels == "portable" else (None, None)
        assert library or kernels == "none", reason
        monkeypatch.setattr(_native, "PORTABLE", library)
        monkeypatch.setattr(_native, "C", None)
    grads = [-torch.ones(3), torch.ones(1).expand(3)]
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory location"):
        clip[1](parameters_with(grads))
    assert_bitwise_equal("the first gradient", grads[0], -torch.ones(3))


@each_dtype
@each_native_norm
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_error_if_nonfinite(value, norm_type, dtype):
    grads = gradients([64, 9, 1009], dtype)
    grads[1][-1] = value
    before = clones(grads)
    expected = outcome(torch_clip_grad_norm_, parameters_with(grads), 1.0, norm_type, error_if_nonfinite=True)
    assert expected[0] is RuntimeError
    kind, text = outcome(gk.clip_grad_norm_, parameters_with(grads), 1.0, norm_type, error_if_nonfinite=True)
    assert (kind, text) == (RuntimeError, f"{expected[1]}. The first non-finite gradient is that of parameter 1")
    assert_close(grads, before, rtol=0, atol=0, equal_nan=True)
    names = ["first.weight", "second.weight", "third.weight"]
    named = list(zip(names, parameters_with(grads), strict=True))
    kind, text = outcome(gk.clip_grad_norm_, named, 1.0, norm_type, error_if_nonfinite=True)
    assert kind is RuntimeError and text.startswith(expected[1])
    assert [name for name in names if name in text] == ["second.weight"]
    assert_close(grads, before, rtol=0, atol=0, equal_nan=True)


def test_error_if_nonfinite_through_torch():
    grads = gradients([64, 9])
    grads[0][0] = math.inf
    expected = outcome(torch_clip_grad_norm_, parameters_with(grads), 1.0, 3.0, error_if_nonfinite=True)
    kind, text = outcome(gk.clip_grad_norm_, parameters_with(grads), 1.0, 3.0, error_if_nonfinite=True)
    assert (kind, text) == (RuntimeError, f"{expected[1]}. The first non-finite gradient is that of parameter 0")
    kind, text = outcome(gk.clip_grad_norm_, {"a.b": parameters_with(grads)[0]}.items(), 1.0, 3.0, error_if_nonfinite=True)
    assert kind is expected[0] and text.startswith(expected[1]) and "a.b" in text


def test_error_if_nonfinite_of_finite_gradients():
    total = gk.clip_grad_norm_(parameters_with([torch.full((9,), 1e25)]), 1.0, error_if_nonfinite=True)
    assert_close(total, torch.tensor(3e25))


@pytest.mark.parametrize("sparse_first", [False, True])
def test_sparse_gradients_are_torchs(sparse_first):
    """Before 2.14 torch refuses them and writes nothing; since then it clips them."""
    dense = torch.randn(64)
    sparse = torch.sparse_coo_tensor([[0, 2, 0]], [1.0, 4.0, 2.0], (5,), check_invariants=True)
    grads = [sparse, dense] if sparse_first else [dense, sparse]
    theirs = clones(grads)
    expected = outcome(torch_clip_grad_norm_, parameters_with(theirs), 0.1)
    assert_same_outcome("total norm", outcome(gk.clip_grad_norm_, parameters_with(grads), 0.1), expected)
    for grad, torchs in zip(grads, theirs, strict=True):
        assert_bitwise_equal("gradient", grad.to_dense(), torchs.to_dense())
    grads = [torch.sparse_coo_tensor([[1]], [math.inf], (5,), check_invariants=True), dense]
    expected = outcome(torch_clip_grad_norm_, parameters_with(clones(grads)), 0.1, error_if_nonfinite=True)
    kind, text = outcome(gk.clip_grad_norm_, parameters_with(grads), 0.1, error_if_nonfinite=True)
    assert kind is expected[0] and text.startswith(expected[1])
    assert text == expected[1] or text.endswith("that of parameter 0")


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf], ids=str)
def test_sparse_gradients_are_clipped_as_dense_ones(norm_type, monkeypatch):
    """As from torch 2.14 on, which scales the stored values and takes the norm of the coalesced ones."""
    monkeypatch.setattr("gradkernels.gradients._TORCH_CLIPS_SPARSE", True)
    for sparse in (
        torch.sparse_coo_tensor([[0, 2, 0]], [1.0, 4.0, 2.0], (5,), check_invariants=True),
        torch.sparse_coo_tensor([[3, 1, 3]], torch.randn(3, 4), (5, 4), check_invariants=True),
        torch.eye(3).to_sparse(),
        torch.sparse_coo_tensor(torch.zeros(1, 0), [], (5,), check_invariants=True),
    ):
        for clips in (lambda p: gk.clip_grad_norm_(p, 0.1, norm_type), lambda p: gk.grad_report(p, norm_type).clip_(0.1).float()):
            grads = [torch.randn(64), sparse.clone()]
            dense = [grad.to_dense() for grad in clones(grads)]
            version = grads[1]._version
            total = clips(parameters_with(grads))
            assert_close(total, clips(parameters_with(dense)))
            assert_close([grad.to_dense() for grad in grads], dense)
            assert grads[1]._version > version
    expected = outcome(torch.nn.utils.clip_grad_value_, parameters_with([torch.eye(3).to_sparse()]), 0.1)
    assert_same_outcome("clamped", outcome(gk.clip_grad_value_, parameters_with([torch.eye(3).to_sparse()]), 0.1), expected)


def test_report_on_sparse_gradients():
    """The same report as for dense gradients with these values."""
    sparse = torch.sparse_coo_tensor([[0, 2, 0]], [1.0, math.nan, 2.0], (5,), check_invariants=True)
    grads = [torch.randn(64), sparse, torch.sparse_coo_tensor(torch.zeros(1, 0), [], (5,), check_invariants=True)]
    for norm_type in (2.0, math.inf, 3.0):
        report = gk.grad_report(parameters_with(grads), norm_type)
        expected = gk.grad_report(parameters_with([grad.to_dense() for grad in grads]), norm_type)
        for name in ("norms", "max_abs", "nonfinite", "total_norm"):
            assert_close(getattr(report, name), getattr(expected, name), equal_nan=True)
    assert report.first_nonfinite() == "1"
    report = gk.grad_report(parameters_with([*grads[:1], torch.eye(3).to_sparse()]))
    assert report.clip_(0.5) == report.total_norm > 0.5


def test_a_number_for_parameters_is_torchs_error():
    assert outcome(gk.clip_grad_norm_, 3, 1.0)[0] is outcome(torch_clip_grad_norm_, 3, 1.0)[0] is TypeError


def test_without_the_library(monkeypatch):
    grads = gradients([64, 0, 1009])
    ours, values, theirs = clones(grads), clones(grads), clones(grads)
    native = gk.grad_report(parameters_with(grads))
    expected = gk.clip_grad_norm_(parameters_with(theirs), 0.1)
    monkeypatch.setattr(_native, "C", None)
    report = gk.grad_report(parameters_with(ours))
    assert_close((report.norms, report.max_abs, report.nonfinite), (native.norms, native.max_abs, native.nonfinite), rtol=1e-12, atol=0)
    assert_close(gk.get_total_norm(grads), expected)
    assert_close(report.clip_(0.1).float(), expected)
    assert_close(ours, theirs)
    gk.clip_grad_value_(parameters_with(values), 0.1)
    assert all(grad.abs().le(0.1).all() for grad in values)


# gradients that share memory


def sharing_memory():
    """name -> a buffer, and gradients that overlap in it; both are new in each call."""
    buffer = torch.arange(1.0, 200_001.0)
    table = buffer[:60].view(6, 10)
    return {
        "partly": (buffer, [buffer[:150_000], buffer[100_000:], buffer[3:7]]),
        "dense and gapped": (buffer, [buffer, buffer[::2], table[:, 1:4], buffer[:5]]),
        "gapped, side by side": (buffer, [table[:, :5], table[:, 5:], buffer[60:]]),
        "one inside another, an empty one between": (buffer, [buffer, buffer[5:5], buffer[10:20]]),
    }


@pytest.mark.parametrize("case", sharing_memory())
def test_gradients_that_share_memory_are_scaled_one_after_the_other(case, each_thread_count):
    expected, grads = sharing_memory()[case]
    torch_total = torch_clip_grad_norm_(parameters_with([grad for grad in grads if grad.numel()]), 1.0)

    def run():
        buffer, grads = sharing_memory()[case]
        return gk.clip_grad_norm_(parameters_with(grads), 1.0), buffer

    for total, buffer in each_thread_count(run):
        assert_close(total, torch_total)
        assert_close(buffer, expected)


# get_total_norm and clip_grads_with_norm_


@pytest.mark.parametrize("total_norm", [torch.tensor(5 + 1j), torch.ones(1), torch.ones(2)], ids=str)
def test_clip_grads_with_norm_refuses_what_torch_refuses(total_norm):
    ours, theirs = (parameters_with([torch.ones(3)]) for _ in range(2))
    came = outcome(gk.clip_grads_with_norm_, ours, 0.5, total_norm)
    assert came == outcome(torch.nn.utils.clip_grads_with_norm_, theirs, 0.5, total_norm) and issubclass(came[0], RuntimeError)
    assert_bitwise_equal("gradient", ours[0].grad, torch.ones(3))


@each_dtype
@each_native_norm
@each_sizes
def test_get_total_norm_and_clip_grads_with_norm_are_clip_grad_norm_(sizes, norm_type, dtype):
    grads = gradients(SIZES[sizes], dtype)
    whole, halves = clones(grads), clones(grads)
    expected = gk.clip_grad_norm_(parameters_with(whole), 0.37, norm_type)
    total = gk.get_total_norm(halves, norm_type)
    assert_bitwise_equal("total norm", total, expected)
    assert gk.clip_grads_with_norm_(parameters_with(halves), 0.37, total) is None
    assert_close(halves, whole)


def test_get_total_norm_without_a_kernel_is_torchs():
    for tensors in ([], [torch.randn(3, dtype=torch.complex64)], torch.randn(3), (torch.randn(3) for _ in range(2))):
        given = list(tensors) if not isinstance(tensors, torch.Tensor) else tensors
        assert_close(gk.get_total_norm(given), torch.nn.utils.get_total_norm(given))
    for norm_type in (3.0, 0.5, "inf"):
        tensors = gradients([3, 64])
        assert_close(gk.get_total_norm(tensors, norm_type), torch.nn.utils.get_total_norm(tensors, norm_type))
    sparse = [torch.eye(3).to_sparse()]
    assert outcome(gk.get_total_norm, sparse) == outcome(torch.nn.utils.get_total_norm, sparse)


@pytest.mark.parametrize("norm_type", [2.0, 3.0])
def test_get_total_norm_refuses_what_is_not_finite(norm_type):
    tensors = [torch.tensor([1.0, math.nan])]
    expected = outcome(torch.nn.utils.get_total_norm, tensors, norm_type, error_if_nonfinite=True)
    assert expected[0] is RuntimeError
    assert outcome(gk.get_total_norm, tensors, norm_type, error_if_nonfinite=True) == expected


def test_clip_grads_with_norm_without_a_kernel_is_torchs():
    for grads in ([], [None], [torch.randn(3, dtype=torch.complex64)], [torch.randn(3), None]):
        ours, theirs = clones(grads), clones(grads)
        gk.clip_grads_with_norm_(parameters_with(ours), 0.1, torch.tensor(2.0))
        torch.nn.utils.clip_grads_with_norm_(parameters_with(theirs), 0.1, torch.tensor(2.0))
        assert_close([grad for grad in ours if grad is not None], [grad for grad in theirs if grad is not None])


def test_a_norm_on_the_device_of_the_gradients_is_not_copied(monkeypatch):
    """meta stands for a GPU, whose numbers cannot be read without waiting for it."""
    passed = []
    kernels = types.SimpleNamespace(clip_grads_with_norm_=lambda *arguments: passed.append(arguments))
    monkeypatch.setattr("gradkernels.gradients.kernels_for", lambda tensors: kernels)
    grads, total_norm = [torch.empty(3, device="meta")], torch.empty((), device="meta")
    gk.clip_grads_with_norm_(parameters_with(grads), 1.0, total_norm)
    assert len(passed) == 1 and passed[0][2] is total_norm


def test_a_norm_of_another_device_does_not_choose_the_kernels():
    grad = torch.full((3,), 2.0)
    with pytest.raises(NotImplementedError, match="meta"):
        gk.clip_grads_with_norm_(parameters_with([grad]), 1.0, torch.empty((), device="meta"))
    assert (grad == 2).all()


class Copies(TorchFunctionMode):
    """Records pinned memory and copies without performing them, because both need a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor:
            self.found.append(("pinned" if kwargs.pop("pin_memory", False) else "pageable", str(kwargs["device"])))
        if function is torch.Tensor.to:
            self.found.append((str(args[1]), "does not wait" if kwargs.get("non_blocking") else "waits"))
            return args[0]
        return function(*args, **kwargs)


def test_indices_are_copied_to_a_gpu_without_waiting_for_it():
    with Copies() as copies:
        index = sharded.index_on(torch.device("cuda:1"), [3, 1])
    assert copies.found == [("pinned", "cpu"), ("cuda:1", "does not wait")]
    assert index.tolist() == [3, 1] and index.dtype == torch.int64
    with torch.device("meta"):
        assert sharded.index_on(torch.device("cpu"), [3, 1]).tolist() == [3, 1]
    assert sharded.index_on(torch.device("cpu"), []).tolist() == []


def test_clip_grads_with_norm_takes_a_norm_of_any_dtype():
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        ours, theirs = torch.full((3,), 2.0), torch.full((3,), 2.0)
        gk.clip_grads_with_norm_(parameters_with([ours]), 1.0, torch.tensor(4, dtype=dtype))
        torch.nn.utils.clip_grads_with_norm_(parameters_with([theirs]), 1.0, torch.tensor(4.0))
        assert_close(ours, theirs)


# clip_grad_value_


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_sizes
@pytest.mark.parametrize("clip_value", [1.0, 0.37, 0.0, -0.5, math.inf, 1e9, math.nan], ids=str)
def test_clip_grad_value_is_torchs(clip_value, sizes, dtype):
    grads = [grad.to(dtype) for grad in gradients(SIZES[sizes]) if grad.numel()]
    for place, value in ((0, math.nan), (-1, math.inf), (len(grads) // 2, -math.inf)):
        grads[place][-1] = value
    ours, theirs = clones(grads), clones(grads)
    # 1e9 is an error in float16, which cannot hold it.
    expected = outcome(torch.nn.utils.clip_grad_value_, parameters_with(theirs), clip_value)
    assert outcome(gk.clip_grad_value_, parameters_with(ours), clip_value) == expected
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert_bitwise_equal(f"gradient {i}", our, their)


def test_clip_grad_value_of_strided_overlapping_and_other_gradients():
    base, other = torch.randn(40, 30), torch.randn(65)
    before = base.clone()
    gk.clip_grad_value_(parameters_with([base[:, ::2], other, base[:, :5]]), 0.1)
    expected = before.clone()
    expected[:, ::2].clamp_(-0.1, 0.1)
    expected[:, :5].clamp_(-0.1, 0.1)
    assert_bitwise_equal("base", base, expected)
    assert other.abs().max() <= 0.1
    for grads, value in (([torch.tensor([5, -7])], 3), ([torch.randn(9)], 1e300)):
        ours, theirs = clones(grads), clones(grads)
        expected = outcome(torch.nn.utils.clip_grad_value_, [as_parameter(grad) for grad in theirs], value)
        assert outcome(gk.clip_grad_value_, [as_parameter(grad) for grad in ours], value) == expected
        assert_close(ours, theirs)


def as_parameter(grad):
    """A tensor with this gradient: a parameter cannot have an integer gradient."""
    tensor = torch.empty_like(grad)
    tensor.grad = grad
    return tensor


def test_clip_grad_value_counts_versions_and_leaves_the_neighbours():
    buffer = torch.randn(5000) * 10
    before, piece = buffer.clone(), buffer[3:4000]
    version = piece._version
    gk.clip_grad_value_(parameters_with([piece]), 1.0)
    assert piece._version == version + 1
    assert_bitwise_equal("memory around the gradient", torch.cat([buffer[:3], buffer[4000:]]), torch.cat([before[:3], before[4000:]]))


# adaptive clipping


UNITS = [(), (5,), (70_001,), (4, 7), (300, 9), (33, 65), (2, 70_001), (1, 200_003), (8, 3, 3, 3), (5, 4, 2, 3, 2), (6, 0), (0, 4), (0,)]


def weights_and_gradients(dtype=torch.float32):
    """Weights of usual sizes, of 0 and of 1e3; gradients around the bound of their unit."""
    made = []
    for i, shape in enumerate(UNITS):
        unit = (shape[0], *[1] * (len(shape) - 1)) if len(shape) > 1 else ()
        scale = 10 ** (2 * torch.rand(unit, dtype=torch.float64) - 1)
        weight = torch.randn(shape, dtype=torch.float64) * (1.0, 0.0, 1e3)[i % 3 if i > 3 else 0]
        largest = max(1.0, weight.abs().max().item()) if weight.numel() else 1.0
        made.append(nn.Parameter(weight.to(dtype)))
        made[-1].grad = (torch.randn(shape, dtype=torch.float64) * 0.01 * largest * scale).to(dtype)
    return made


def adaptively_clipped(parameter, clip_factor=0.01, eps=1e-3, norm_type=2.0):
    """The formula of timm's adaptive_clip_grad, in float64."""
    weight, grad = parameter.detach().double(), parameter.grad.double()
    if grad.numel() == 0:
        return grad
    dims = tuple(range(1, grad.dim())) if grad.dim() > 1 else None
    weight_norm, grad_norm = (torch.linalg.vector_norm(each, norm_type, dims, keepdim=True) for each in (weight, grad))
    max_norm = weight_norm.clamp(min=eps) * clip_factor
    return torch.where(grad_norm < max_norm, grad, grad * (max_norm / grad_norm.clamp(min=1e-6)))


def assert_adaptively_clips(parameters, *options, bound=1.0):
    """Each gradient within `bound` ulp of the exact one."""
    expected = [adaptively_clipped(parameter, *options) for parameter in parameters]
    gk.adaptive_clip_grad_(parameters, *options)
    for parameter, exact in zip(parameters, expected, strict=True):
        numbers = torch.finfo(parameter.dtype)
        unit = (exact.abs() * numbers.eps).clamp(min=numbers.smallest_normal * numbers.eps)
        errors = ((parameter.grad.double() - exact).abs() / unit)[exact.isfinite()]
        assert not errors.numel() or errors.max() <= bound, f"{tuple(exact.shape)}: {errors.max()} ulp"
        assert_close(parameter.grad.isnan(), exact.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0], ids=str)
def test_adaptive_clipping_is_timms(norm_type, dtype):
    # In float64, the rounding of torch's norms shows.
    bound = 100.0 if dtype == torch.float64 else 1.0
    for options in ((), (0.05, 0.3), (1e-9,), (1e9,), (-0.01,)):
        options = (*options, *(0.01, 1e-3)[len(options) :], norm_type)
        assert_adaptively_clips(weights_and_gradients(dtype), *options, bound=bound)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf], ids=str)
def test_adaptive_clipping_spreads_what_is_not_finite(norm_type):
    for value in (math.nan, math.inf):
        for of_weights in (False, True):
            parameters = weights_and_gradients()
            for parameter in parameters[1:9]:
                with torch.no_grad():
                    (parameter if of_weights else parameter.grad)[-1].fill_(value)
            assert_adaptively_clips(parameters, 0.01, 1e-3, norm_type)


def test_adaptive_clipping_beyond_float32_and_float64():
    for scale, dtype in ((1e30, torch.float32), (1e-30, torch.float32), (1e200, torch.float64), (1e-200, torch.float64)):
        parameter = nn.Parameter(torch.tensor([[3.0, 4.0], [6.0, 8.0]], dtype=dtype) * scale)
        parameter.grad = parameter.detach() * torch.tensor([[1.0], [1e-3]], dtype=dtype)
        before = parameter.grad.clone()
        gk.adaptive_clip_grad_(parameter, eps=0.0)
        # timm divides by 1e-6 at least.
        coefficient = 0.01 * 5.0 * scale / max(5.0 * scale, 1e-6)
        assert_close(parameter.grad[0], before[0] * coefficient, rtol=1e-6, atol=0)
        assert_close(parameter.grad[1], before[1], rtol=0, atol=0)


def test_adaptive_clipping_of_other_memory_formats():
    """Parameter and gradient lie in orders of their own; some have gaps, or units in pieces."""

    def made(memory):
        torch.manual_seed(0)
        parameter = nn.Parameter(memory(torch.randn(6, 4, 3, 2)))
        parameter.grad = torch.randn(6, 4, 3, 2)
        return parameter

    formats = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "gaps": lambda x: torch.stack([x, x], -1)[..., 0],
        "contiguous": lambda x: x,
    }
    for of_weight, of_grad in itertools.product(formats, formats):
        parameter = made(formats[of_weight])
        parameter.grad = formats[of_grad](parameter.grad)
        version = parameter.grad._version
        assert_adaptively_clips([parameter])
        assert parameter.grad._version > version


def test_adaptive_clipping_has_the_same_bits_for_any_number_of_threads(each_thread_count):
    def run():
        torch.manual_seed(1)
        parameters = weights_and_gradients()
        gk.adaptive_clip_grad_(parameters)
        return [parameter.grad for parameter in parameters]

    for one, two in zip(*each_thread_count(run), strict=True):
        assert_bitwise_equal("gradient", one, two)


def test_adaptive_clipping_writes_the_clipped_units_only(monkeypatch):
    """A module is taken, a parameter without a gradient is not, and torch's operators give the same result."""
    results = []
    for library in (_native.C, None):
        monkeypatch.setattr(_native, "C", library)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
                parameter.grad = torch.full_like(parameter, 1e-3)
        model[1].bias.grad = None
        model[0].weight.grad[2] = 7.0
        before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        assert gk.adaptive_clip_grad_(model) is None
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        changed = [(old != new).any(-1).nonzero().flatten().tolist() for old, new in zip(before, grads, strict=True)]
        assert changed == [[2], [], []]
        results.append(grads)
    assert_close(*results)


def test_adaptive_clipping_refuses_before_it_writes():
    fine = weights_and_gradients()[1]
    before = fine.grad.clone()
    sparse = nn.Parameter(torch.ones(3, 2))
    sparse.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="adaptive_clip_grad_ does not support sparse gradients"):
        gk.adaptive_clip_grad_([fine, sparse])
    whole = as_parameter(torch.arange(3))
    with pytest.raises(RuntimeError, match=r"adaptive_clip_grad_ does not support gradients of torch.int64"):
        gk.adaptive_clip_grad_([fine, whole])
    for wrong in (("much",), (0.01, None)):
        with pytest.raises((TypeError, ValueError)):
            gk.adaptive_clip_grad_([fine], *wrong)
    assert_bitwise_equal("gradient", fine.grad, before)
    with pytest.raises(RuntimeError, match="got 2 parameters, but 1 gradients"):
        OPS.adaptive_clip_grad_([fine, fine], [fine.grad], 0.01, 1e-3, 2.0)
    with pytest.raises(RuntimeError, match="parameter 0 and its gradient must have the same dtype, device and shape"):
        OPS.adaptive_clip_grad_([fine], [fine.grad.double()], 0.01, 1e-3, 2.0)
    with pytest.raises(ValueError, match="norm_type must be 1, 2 or inf, got 3"):
        OPS.adaptive_clip_grad_([fine], [fine.grad], 0.01, 1e-3, 3.0)


def test_adaptive_clipping_under_compile():
    torch._dynamo.reset()
    parameters = [*weights_and_gradients()[1:5], *parameters_with([torch.randn(4, 7).t()])]
    expected = [adaptively_clipped(parameter).float() for parameter in parameters]
    torch.compile(lambda: gk.adaptive_clip_grad_(parameters), fullgraph=True, backend="aot_eager")()
    assert_close([parameter.grad for parameter in parameters], expected)


# the report


@each_dtype
@each_native_norm
@each_sizes
def test_report_of_each_gradient(sizes, norm_type, dtype):
    grads = gradients(SIZES[sizes], dtype)
    for i, grad in enumerate(grads):
        if grad.numel() > 2 and i % 3 == 1:
            grad[-1], grad[1] = math.nan, math.inf
        elif grad.numel() and i % 3 == 2:
            grad[0] = -math.inf
    report = gk.grad_report(parameters_with(grads), norm_type)
    assert report.names == [str(i) for i in range(len(grads))]
    assert report.norms.dtype == report.max_abs.dtype == report.total_norm.dtype == torch.float64
    assert report.nonfinite.tolist() == [int((~grad.isfinite()).sum()) for grad in grads]
    with np.errstate(invalid="ignore"):
        expected = torch.tensor([float(exact_norm([grad], norm_type)) for grad in grads], dtype=torch.float64)
        largest = torch.tensor([float(exact_norm([grad], math.inf)) for grad in grads], dtype=torch.float64)
    assert_close(report.norms, expected, rtol=1e-15, atol=0, equal_nan=True)
    assert_close(report.max_abs, largest, rtol=0, atol=0, equal_nan=True)
    composed = norms_by_torch(grads, norm_type)
    for ours, theirs in zip((report.norms, report.max_abs, report.nonfinite, report.total_norm), composed, strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1e300, 1e-300, 1e154, 1e-162], ids=str)
def test_report_of_gradients_whose_squares_leave_float64(scale):
    """Together with gradients whose squares do not."""
    grads = [torch.randn(1009, dtype=torch.float64) * scale, torch.randn(64, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
    report = gk.grad_report(parameters_with(grads))
    exact = torch.tensor([float(exact_norm([grad], 2.0)) for grad in grads], dtype=torch.float64)
    assert_close(report.norms, exact, rtol=1e-15, atol=0)
    assert_close(report.total_norm.item(), float(exact_norm(grads, 2.0)), rtol=1e-15, atol=0)


def model_with_gradients():
    model = nn.Sequential(nn.Linear(5, 7), nn.ELU(), nn.Linear(7, 3))
    model(torch.randn(4, 5)).square().sum().backward()
    return model


def test_report_names_counts_and_clips():
    model = model_with_gradients()
    model[0].bias.grad = None
    report = gk.grad_report(model)
    assert report.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert report.norms.isnan().tolist() == report.max_abs.isnan().tolist() == [False, True, False, False]
    assert report.nonfinite.tolist() == [0, 0, 0, 0] and report.first_nonfinite() is None
    other = copy.deepcopy(model)
    for parameter, copied in zip(model.parameters(), other.parameters(), strict=True):
        copied.grad = clones([parameter.grad])[0]
    assert_close(report.clip_(0.1).float(), gk.clip_grad_norm_(other, 0.1))
    assert_close([p.grad for p in model.parameters() if p.grad is not None], [p.grad for p in other.parameters() if p.grad is not None])
    table = report.table()
    assert str(report) == table
    lines = table.splitlines()
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1
    assert "no gradient" in lines[2] and lines[-1].startswith("total")


def test_report_finds_what_is_not_finite():
    model = model_with_gradients()
    model[2].weight.grad[1, 2] = math.nan
    model[2].bias.grad[0] = math.inf
    report = gk.grad_report(model.named_parameters())
    assert report.first_nonfinite() == "2.weight"
    assert report.nonfinite.tolist() == [0, 0, 1, 1]
    assert report.total_norm.isnan()
    assert report.table().splitlines()[3].split() == ["2.weight", "nan", "nan", "1"]


def test_report_of_nothing():
    for parameters in ([], parameters_with([None, None])):
        report = gk.grad_report(parameters)
        assert report.total_norm == 0 and report.first_nonfinite() is None and len(report.norms) == len(parameters)
        assert report.table().splitlines()[-1].split() == ["total", "0", "0", "0"]
        report.clip_(1.0)


def test_report_without_a_kernel():
    grads = [torch.randn(64, dtype=torch.complex64), torch.randn(3, dtype=torch.complex64)]
    report = gk.grad_report(parameters_with(grads))
    assert_close(report.norms, torch.stack([grad.to(torch.complex128).norm() for grad in grads]))
    report = gk.grad_report(parameters_with(gradients([9, 64])), 3.0)
    assert report.norms.dtype == torch.float64 and report.norms.shape == (2,)


# torch's machinery


def test_version_counters():
    grads = gradients([64, 1009])
    gk.clip_grad_norm_(parameters_with(grads), 0.1)
    assert [grad._version for grad in grads] == [1, 1]
    x = torch.randn(9, requires_grad=True)
    kept = x.square()
    (parameter,) = parameters_with([kept.detach()])
    loss = kept.square().sum()
    gk.clip_grad_norm_([parameter], 1e-3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_with_a_graph():
    """create_graph=True makes gradients that require grad.

    Clipping is not recorded in the graph, as in torch.
    """
    results = []
    for clip in (gk.clip_grad_norm_, torch_clip_grad_norm_):
        parameter = nn.Parameter(torch.arange(5.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            parameter.pow(3).sum().backward(create_graph=True)
        assert parameter.grad.requires_grad
        results.append((clip([parameter], 1.0), parameter.grad.detach().clone()))
        assert not results[-1][0].requires_grad
    assert_close(results[0], results[1])


def test_opcheck():
    for dtype in WIDE_DTYPES:
        grads = [
            torch.randn(3, 5, dtype=dtype),
            torch.randn(0, dtype=dtype),
            torch.randn(5, 3, dtype=dtype).t(),
            torch.randn(3, 8, dtype=dtype)[:, ::2],
        ]
        for norm_type in (1.0, 2.0, math.inf):
            opcheck(OPS.grad_norms.default, (grads, norm_type))
        total_norm = torch.tensor(7.0, dtype=torch.float64)
        for max_norm in (0.1, 100.0):
            opcheck(OPS.clip_grads_with_norm_.default, (grads, max_norm, total_norm))
        opcheck(OPS.clip_grad_value_.default, (grads, 0.1))
        opcheck(OPS.adaptive_clip_grad_.default, ([torch.randn_like(grad) for grad in grads], grads, 0.1, 1e-3, 2.0))
    opcheck(OPS.grad_norms.default, ([torch.randn(3, requires_grad=True)], 2.0))


def test_operators_compute_what_their_schema_says():
    grads = gradients([64, 1009])
    expected = exact_norm(grads, 2.0)
    *_, total_norm = OPS.grad_norms(grads, 2.0)
    assert total_norm.dtype == torch.float64 and total_norm.dim() == 0
    assert_close(total_norm.item(), float(expected), rtol=1e-14, atol=0)
    ours = clones(grads)
    assert OPS.clip_grads_with_norm_(ours, 0.5, total_norm) is None
    coefficient = np.longdouble(0.5) / (expected + np.longdouble(1e-6))
    for grad, our in zip(grads, ours, strict=True):
        assert_accurate("gradient", our, our, extended(grad) * coefficient)


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
def test_compile(name):
    torch._dynamo.reset()
    grads = [*gradients([64, 1009]), torch.randn(3, 5).t()]
    theirs = clones(grads)
    parameters = parameters_with(grads)
    result = torch.compile(lambda: getattr(gk, name)(parameters, 0.1), fullgraph=True, backend="aot_eager")()
    expected = getattr(torch.nn.utils, name)(parameters_with(theirs), 0.1)
    # clip_grad_value_ returns None.
    assert_close([result, *(parameter.grad for parameter in parameters)], [expected, *theirs])


def test_inference_mode():
    grads = gradients([64, 1009])
    theirs = clones(grads)
    torch_total = torch_clip_grad_norm_(parameters_with(theirs), 0.1)
    with torch.inference_mode():
        total = gk.clip_grad_norm_(parameters_with(grads), 0.1)
        assert_close(total, torch_total)
    assert_close(grads, theirs)


@pytest.mark.parametrize("clip", [gk.clip_grad_norm_, gk.clip_grad_value_])
def test_gradients_made_in_inference_mode_are_not_written_outside(clip):
    parameters = parameters_with(gradients([64]))
    with torch.inference_mode():
        grad = torch.ones(64)
    parameters[0].grad = grad
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        clip(parameters, 0.1)
    assert_close(grad, torch.ones(64))


def test_a_report_does_not_clip_other_gradients():
    parameters = parameters_with(gradients([64, 1009]))
    report = gk.grad_report(parameters)
    report.clip_(0.1)
    clipped = clones([parameter.grad for parameter in parameters])
    for clip_again in (report, gk.grad_report(parameters)):
        if clip_again is not report:
            parameters[0].grad = torch.ones(64)
            clipped[0] = torch.ones(64)
        with pytest.raises(RuntimeError, match="the gradients have changed since the report"):
            clip_again.clip_(0.05)
        assert_close([parameter.grad for parameter in parameters], clipped)


def test_clip_grads_with_norm_of_a_report_in_float16():
    """get_total_norm is inf, as in torch; the report's total norm is float64."""
    parameters = parameters_with([torch.full((4096,), 2000.0, dtype=torch.float16)])
    assert gk.get_total_norm([parameters[0].grad]).isinf()
    gk.clip_grads_with_norm_(parameters, 1.0, gk.grad_report(parameters).total_norm)
    assert_close(parameters[0].grad.double().norm().item(), 1.0, rtol=1e-3, atol=0)


def test_a_norm_that_overflows_names_no_gradient():
    """Norms without a kernel are torch's, which may be inf although every gradient is finite."""
    parameters = parameters_with([torch.full((3,), 1e30)])
    with pytest.raises(RuntimeError, match="is non-finite") as raised:
        gk.clip_grad_norm_(parameters, 1.0, 3.0, error_if_nonfinite=True)
    assert "The first non-finite gradient" not in str(raised.value)
    assert_bitwise_equal("the gradient", parameters[0].grad, torch.full((3,), 1e30))


def test_deterministic_mode():
    """Fresh memory is nan in this mode, so elements that a kernel does not write would change the bits."""
    grads = gradients([64, 70_001])
    results = []
    for deterministic in (False, True):
        parameters = parameters_with([grad.clone() for grad in grads])
        with DeterministicGuard(deterministic):
            report = gk.grad_report(parameters)
            total_norm = gk.clip_grad_norm_(parameters, 0.1)
        results.append([total_norm, report.norms, report.max_abs, report.nonfinite, *(each.grad for each in parameters)])
    for expected, actual in zip(*results, strict=True):
        assert_bitwise_equal("a result", actual, expected)


def test_training_steps_equal_torchs():
    results = []
    start = nn.Sequential(nn.Linear(5, 17), nn.Tanh(), nn.Linear(17, 3))
    x = torch.randn(8, 5)
    for clip in (gk.clip_grad_norm_, torch_clip_grad_norm_):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) * 10).square().sum().backward()
            clip(model.parameters(), 1.0)
            optimizer.step()
        results.append(list(model.parameters()))
    assert_close(results[0], results[1])


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(memory_to_itself):
    count = 2**31 + 77
    skip_unless_free(4 * count)
    grad = torch.zeros(count, dtype=torch.bfloat16)
    grad[:3], grad[-1] = 2.0, 2.0
    (parameter,) = parameters_with([grad])
    report = gk.grad_report([parameter])
    assert (report.total_norm, report.max_abs[0], report.nonfinite[0]) == (4.0, 2.0, 0)
    assert gk.clip_grad_norm_([parameter], 2.0) == 4.0
    assert_close(grad[-2:], torch.tensor([0.0, 1.0], dtype=torch.bfloat16))
    grad[-1] = math.inf
    assert gk.grad_report([parameter]).nonfinite[0] == 1
    gk.clip_grad_value_([parameter], 0.5)
    assert grad[-1] == 0.5


# wrong parameters


def with_a_gradient():
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([3.0, 4.0, 0.0])
    return parameter


PARAMETER = with_a_gradient()
TAKING_PARAMETERS = {
    "clip_grad_norm_": lambda parameters: gk.clip_grad_norm_(parameters, 1.0),
    "of order 3": lambda parameters: gk.clip_grad_norm_(parameters, 1.0, 3.0),
    "clip_grad_value_": lambda parameters: gk.clip_grad_value_(parameters, 1.0),
    "adaptive_clip_grad_": gk.adaptive_clip_grad_,
    "clip_grads_with_norm_": lambda parameters: gk.clip_grads_with_norm_(parameters, 1.0, torch.tensor(5.0)),
    "grad_report": gk.grad_report,
}
WRONG_PARAMETERS = {
    "a dict": ({"weight": PARAMETER}, "not str; for a dict, pass its items"),
    "a list of None": ([PARAMETER, None], "not NoneType"),
    "numbers": ([1.0], "not float"),
    "lists": ([[PARAMETER]], "not list"),
    "groups of an optimizer": (torch.optim.SGD([PARAMETER]).param_groups, "not dict"),
    # A pair of tensors is not a name and a parameter.
    "pairs of parameters": ([(PARAMETER, PARAMETER)], "not tuple"),
    "pairs the wrong way round": ([(PARAMETER, "weight")], "not tuple"),
    "triples": ([("weight", PARAMETER, 3)], "not tuple"),
    "nothing": (None, "'NoneType' object is not iterable"),
    "what makes parameters": (nn.Linear(2, 2).parameters, "'method' object is not iterable"),
}


@pytest.mark.parametrize("function", TAKING_PARAMETERS)
@pytest.mark.parametrize("wrong", WRONG_PARAMETERS)
def test_wrong_parameters_are_refused_before_writing(wrong, function):
    parameters, words = WRONG_PARAMETERS[wrong]
    version = PARAMETER.grad._version
    with pytest.raises(TypeError, match=words):
        TAKING_PARAMETERS[function](parameters)
    assert PARAMETER.grad._version == version


def test_wrong_norms_are_refused():
    for wrong in (5.0, None, "5"):
        with pytest.raises(TypeError, match=f"total_norm must be Tensor, not {type(wrong).__name__}"):
            gk.clip_grads_with_norm_([PARAMETER], 1.0, wrong)
    for wrong in ([None], [PARAMETER.grad, None], {"weight": PARAMETER.grad}):
        for norm_type in (2.0, 3.0):
            with pytest.raises(TypeError, match="tensors must be tensors, not"):
                gk.get_total_norm(wrong, norm_type)
    # These have torch's messages.
    for wrong, error in ((None, TypeError), ([1.0], TypeError), ("a", ValueError), (torch.ones(2), ValueError)):
        messages = []
        for clip in (gk.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
            with pytest.raises(error) as failure:
                clip([PARAMETER], wrong)
            messages.append(str(failure.value))
        assert messages[0] == messages[1]
