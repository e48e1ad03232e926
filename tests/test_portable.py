"""The portable library gives the bits of the native one, forward and backward, and sends to torch what it does not take.

Both are loaded into this process. Each test computes with gradkernels._C, then with gradkernels.portable.
"""

import copy
import itertools
import math
import re
import shutil
import subprocess

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import gradkernels as gk
from accuracy import DTYPES, assert_bitwise_equal
from activation_calls import LAYOUTS, each_dtype
from gradkernels import _native, portable, reference
from gradkernels.acts import ACTS

FILE = _native.native_file().with_name("_portable.so")


@pytest.fixture(autouse=True)
def loaded():
    kernels, reason = _native.load_portable()
    assert kernels is portable, reason


@pytest.fixture
def calls(monkeypatch):
    """The names of the C functions that portable called to compute."""
    names = []

    class Recording:
        def __getattr__(self, name):
            if name.removeprefix("gk_") in portable._ARGUMENTS:
                names.append(name.removeprefix("gk_"))
            return getattr(kernels, name)

    kernels = portable._kernels
    monkeypatch.setattr(portable, "_kernels", Recording())
    return names


def of_both(compute):
    """compute(library) with the native library and with the portable one, each from the same seed."""
    results = []
    for library in (_native.C, portable):
        torch.manual_seed(7)
        results.append(compute(library))
    return results


def assert_same_bits(compute):
    native, of_portable = of_both(compute)
    assert native.keys() == of_portable.keys()
    for name, tensor in native.items():
        assert_bitwise_equal(name, of_portable[name], tensor)
        # The stride of a dimension of one element means nothing.
        strides = [[s for s, size in zip(each.stride(), each.shape, strict=True) if size > 1] for each in (tensor, of_portable[name])]
        assert tensor.numel() == 0 or strides[0] == strides[1], name


ACTIVATIONS = {
    "leaky_relu": lambda library, x: library.leaky_relu(x, 0.1, False),
    "leaky_relu in place": lambda library, x: library.leaky_relu(x * 1, -0.5, True),
    "elu": lambda library, x: library.elu(x, 1.3, False),
    "elu, alpha < 0": lambda library, x: library.elu(x, -1.3, False),
    "elu in place": lambda library, x: library.elu(x * 1, 1.3, True),
    "swish": lambda library, x: library.swish(x, 1.7),
    "prelu": lambda library, x: library.prelu(x, per_channel(x)),
    "prelu, 1 slope": lambda library, x: library.prelu(x, torch.full((1,), 0.3, dtype=x.dtype)),
    "swish, tensor": lambda library, x: library.swish_tensor(x, per_channel(x)),
}
each_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def per_channel(x):
    return torch.linspace(-1.0, 2.0, x.shape[1] if x.dim() > 1 else 1, dtype=x.dtype)


def values_and_gradients(function, x, create_graph=False):
    x = x.detach().requires_grad_()
    y = function(x)
    grad_y = torch.randn_like(y).mul_(2)
    (grad_x,) = torch.autograd.grad(y, x, grad_y, create_graph=create_graph)
    return {"y": y.detach(), "grad_x": grad_x if create_graph else grad_x.detach()}


@each_activation
@each_dtype
def test_activation_has_the_bits_of_the_native_library(name, dtype, calls):
    for size in ((33, 7, 61), (1,), (5, 13)):
        assert_same_bits(
            lambda library, size=size: values_and_gradients(lambda x: ACTIVATIONS[name](library, x), torch.randn(size).to(dtype))
        )
    assert {"activation_forward", "activation_backward"} <= {*calls} or {"parametric_forward", "parametric_backward"} <= {*calls}


@each_activation
def test_activation_in_every_layout(name):
    """Layouts other than contiguous and channels_last are copied or, in place, go to torch."""
    for layout, make in LAYOUTS.items():
        native, of_portable = of_both(
            lambda library, make=make: values_and_gradients(lambda x: ACTIVATIONS[name](library, x), make(torch.randn))
        )
        for result, tensor in native.items():
            if layout in ("transposed", "permuted", "expanded") and "in place" in name:
                assert_close(of_portable[result], tensor)
            else:
                assert_bitwise_equal(f"{result} {layout}", of_portable[result], tensor)


SHAPES = {
    "N,C": lambda: torch.randn(37, 5),
    "N,C,L": lambda: torch.randn(4, 5, 71),
    "N,C,H,W": lambda: torch.randn(3, 5, 9, 11),
    "channels_last": lambda: torch.randn(3, 5, 9, 11).contiguous(memory_format=torch.channels_last),
    "channels_last of one channel": lambda: torch.randn(3, 1, 9, 11).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 5, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d),
    "every second channel": lambda: torch.randn(3, 10, 9, 11)[:, ::2],
    "transposed": lambda: torch.randn(5, 37).t(),
}


def norm(library, x, act, *, groups=0, training=True, affine=True, with_residual=False, dtype=None, momentum=0.1):
    """Batch norm, or group norm if there are groups."""
    dtype = x.dtype if dtype is None else dtype
    x = x.detach().requires_grad_()
    channels = x.shape[1]
    weight, bias = torch.linspace(0.5, 2.0, channels).to(dtype), torch.linspace(-1.0, 1.0, channels).to(dtype)
    weight, bias = (weight.requires_grad_(), bias.requires_grad_()) if affine else (None, None)
    residual = torch.randn_like(x).requires_grad_() if with_residual else None
    running = torch.linspace(0.0, 0.1, channels).to(dtype), torch.linspace(1.0, 2.0, channels).to(dtype), torch.tensor(3)
    operands = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    operands = {name: operand for name, operand in operands.items() if operand is not None}
    call = 1e-5, act, ACTS[act].default or 0.0
    if groups:
        y = library.group_norm_act(x, groups, weight, bias, residual, *call)
    else:
        y = library.batch_norm_act(x, *running[:2], weight, bias, residual, running[2], training, momentum, *call)
    gradients = torch.autograd.grad(y, operands.values(), torch.randn_like(y).mul_(2))
    return {
        "y": y.detach(),
        **dict(zip(operands, gradients, strict=True)),
        **dict(zip(("running_mean", "running_var", "num_batches_tracked"), running, strict=True)),
        "versions": torch.tensor([each._version for each in running]),
    }


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_batch_norm_act_has_the_bits_of_the_native_library(act, with_residual, calls):
    for dtype, training, affine in itertools.product(DTYPES, (True, False), (True, False)):
        options = {"training": training, "affine": affine, "with_residual": with_residual}
        assert_same_bits(lambda library, dtype=dtype, options=options: norm(library, torch.randn(3, 5, 9, 11).to(dtype), act, **options))
    assert {*calls} == {"norm_act_forward", "norm_act_backward"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", ["relu", "swish"])
def test_batch_norm_act_in_every_layout(act, shape, calls):
    for with_residual in (False, True):
        assert_same_bits(lambda library, r=with_residual: norm(library, SHAPES[shape](), act, with_residual=r, momentum=None))
    assert "norm_act_forward" in calls


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_group_norm_act_has_the_bits_of_the_native_library(act, with_residual, groups, calls):
    for dtype, channels_last, affine in itertools.product(DTYPES, (False, True), (True, False)):
        options = {"groups": groups, "affine": affine, "with_residual": with_residual}
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.randn(3, 6, 7, 9).to(dtype).contiguous(memory_format=memory_format)
        assert_same_bits(lambda library, x=x, options=options: norm(library, x, act, **options))
    assert {*calls} == {"norm_act_forward", "norm_act_backward"}


# Without kernel: fewer than 48 pixels, and 6 dimensions.
GROUP_NORM_SHAPES = {
    **{name: (make, 5) for name, make in SHAPES.items() if name not in ("N,C", "transposed", "channels_last of one channel")},
    "1 channel": (SHAPES["channels_last of one channel"], 1),
    "1 sample of channels_last": (lambda: torch.randn(2, 8, 9, 11).to(memory_format=torch.channels_last)[1:], 4),
    "48 pixels": (lambda: torch.randn(2, 24, 48), 3),
    "sets larger than a slab": (lambda: torch.randn(1, 2, 300, 450), 1),
    "sets larger than a slab, channels_last": (lambda: torch.randn(1, 96, 30, 30).to(memory_format=torch.channels_last), 3),
    "47 pixels": (lambda: torch.randn(2, 24, 47), None),
    "6 dimensions": (lambda: torch.randn(2, 4, 2, 3, 4, 5), None),
}


@pytest.mark.parametrize("shape", GROUP_NORM_SHAPES)
@pytest.mark.parametrize("act", ["relu", "swish"])
def test_group_norm_act_in_every_layout(act, shape, calls):
    make, groups = GROUP_NORM_SHAPES[shape]
    for with_residual in (False, True):
        assert_same_bits(lambda library, r=with_residual: norm(library, make(), act, groups=groups or 2, with_residual=r))
    assert ("norm_act_forward" in calls) == (groups is not None)


@pytest.mark.parametrize("affine", [False, True], ids=["", "affine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instance_norm_act_has_the_bits_of_the_native_library(dtype, affine, monkeypatch, calls):
    """With running statistics, which are updated with those of the kernels."""

    def compute(library):
        monkeypatch.setattr(_native, "C", library if library is not portable else None)
        monkeypatch.setattr(_native, "PORTABLE", portable)
        parameters = torch.float32 if dtype == torch.float16 else dtype
        norm = gk.InstanceNormAct2d(5, affine=affine, track_running_stats=True, act="elu", dtype=parameters)
        x = torch.randn(3, 5, 9, 11).to(dtype).requires_grad_()
        y = norm(x, residual=torch.randn(3, 5, 9, 11).to(dtype))
        y.backward(torch.randn_like(y))
        return {"y": y.detach(), "grad_x": x.grad, "evaluated": norm.eval()(x.detach()), **norm.state_dict()}

    assert_same_bits(compute)
    assert calls.count("norm_act_forward") == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [0, 5], ids=["batch norm", "group norm"])
def test_norms_with_parameters_of_float32(groups, dtype):
    assert_same_bits(lambda library: norm(library, torch.randn(3, 5, 9, 11).to(dtype), "elu", groups=groups, dtype=torch.float32))


@pytest.mark.parametrize("left_out", ["weight", "bias"])
def test_group_norm_act_without_one_of_its_parameters(left_out, calls):
    """Also the gradient by torch's operators, which have no gradient with a bias and no weight."""
    given = {"weight": torch.rand(6), "bias": torch.rand(6)} | {left_out: None}

    def compute(library, create_graph=False):
        x = torch.randn(2, 6, 49, requires_grad=True)
        y = library.group_norm_act(x, 3, given["weight"], given["bias"], None, 1e-5, "swish", 1.0)
        return {"y": y.detach(), "grad_x": torch.autograd.grad(y.sum(), x, create_graph=create_graph)[0].detach()}

    assert_same_bits(compute)
    assert_same_bits(lambda library: compute(library, create_graph=True))
    assert "norm_act_forward" in calls


def gradients(dtype=torch.float32):
    """Gradients of many sizes, one empty and one channels_last."""
    made = [torch.randn(size).to(dtype) for size in ((3, 4), (70_001,), (0,), (), (5, 3, 2, 2))]
    made[-1] = made[-1].contiguous(memory_format=torch.channels_last)
    return made


@each_dtype
def test_clipping_has_the_bits_of_the_native_library(dtype, calls):
    def compute(library):
        results = {}
        for norm_type in (1.0, 2.0, math.inf):
            grads = gradients(dtype)
            assert library.clip_grad_supports(grads)
            names = (f"norms {norm_type}", f"max_abs {norm_type}", f"nonfinite {norm_type}", f"total {norm_type}")
            results |= dict(zip(names, library.grad_norms(grads, norm_type), strict=True))
            library.clip_grads_with_norm_(grads, 3.0, results[f"total {norm_type}"])
            params = [torch.randn_like(grad) for grad in grads]
            library.adaptive_clip_grad_(params, grads, 0.01, 1e-3, norm_type)
            library.clip_grad_value_(grads, 0.005)
            parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            results[f"returned {norm_type}"], refused = library.clip_grad_norm_(
                [*parameters[:2], ("b", parameters[4])], 0.1, norm_type, True
            )
            assert not refused
            results |= {f"gradient {i} {norm_type}": grad for i, grad in enumerate(grads)}
            results[f"versions {norm_type}"] = torch.tensor([grad._version for grad in grads])
        return results

    assert_same_bits(compute)
    assert {*calls} == {"grad_norms", "clip_with_norm", "adaptive_clip", "clamp", "clip_grad_norm"}


def test_gradients_that_share_memory_are_clipped_one_after_the_other():
    def compute(library):
        whole = torch.randn(100)
        library.clip_grads_with_norm_([whole, whole[10:50]], 1.0, torch.tensor(3.0))
        library.clip_grad_value_([whole, whole], 0.1)
        return {"gradients": whole}

    assert_same_bits(compute)


def test_a_norm_that_is_not_finite_is_refused_before_anything_is_written():
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([1.0, math.inf, 2.0])
    total, refused = portable.clip_grad_norm_([parameter], 1.0, 2.0, True)
    assert refused and total == math.inf and parameter.grad.tolist() == [1.0, math.inf, 2.0]


@each_dtype
@pytest.mark.parametrize("centered", [False, True], ids=["", "centered"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_has_the_bits_of_the_native_library(dtype, centered, momentum):
    def compute(library):
        params, grads = gradients(dtype), gradients(dtype)
        square_avgs = [torch.rand_like(each) + 4 for each in params]
        grad_avgs = [torch.rand_like(each) for each in params] if centered else []
        buffers = [torch.rand_like(each) for each in params] if momentum else []
        assert library.rmsprop_supports(params, [grads, square_avgs, buffers, grad_avgs])
        library.rmsprop_(params, grads, square_avgs, grad_avgs, buffers, 0.01, 0.9, 1e-8, 0.1, momentum, -0.5)
        lists = {"param": params, "square_avg": square_avgs, "grad_avg": grad_avgs, "buffer": buffers}
        return {f"{name} {i}": each for name, tensors in lists.items() for i, each in enumerate(tensors)}

    assert_same_bits(compute)


# what it does not take


class Subclass(torch.Tensor):
    pass


NOT_TAKEN = {
    "another dtype": lambda x: x.to(torch.complex64),
    "another device": lambda x: x.to("meta"),
    "a subclass": lambda x: x.as_subclass(Subclass),
    "a pending negation": lambda x: torch.complex(x, x).conj().imag,
    "sparse": lambda x: x.to_sparse(),
    "a zero tensor": lambda x: torch._efficientzerotensor(x.shape),
}


@pytest.mark.parametrize("kind", NOT_TAKEN)
def test_the_reference_computes_other_tensors(kind, calls):
    x = NOT_TAKEN[kind](torch.randn(4, 3))
    assert not portable.clip_grad_supports([x])
    if kind == "sparse":
        with pytest.raises(NotImplementedError):
            portable.swish(x, 1.0)
    else:
        ours, composed = portable.swish(x, 1.0), reference.swish(x, 1.0)
        assert type(ours) is type(composed) and (ours.is_meta or torch.equal(ours, composed))
    assert calls == []


ALTERED = NOT_TAKEN | {
    "a 16-bit dtype": lambda x: x.half(),
    "another size": lambda x: x[:2].clone(),
    "channels in another order": lambda x: x.t().contiguous().t(),
    "gaps": lambda x: torch.randn(4, 6)[:, ::2],
    "a parameter": nn.Parameter,
    "a tensor of inference mode": lambda x: torch.inference_mode()(torch.clone)(x),
}


@pytest.mark.parametrize("has_guards", [True, False], ids=["", "without guards"])
@pytest.mark.parametrize("kind", ALTERED)
def test_one_other_tensor_in_a_list_is_noticed(kind, has_guards, monkeypatch):
    """A list is compared with an earlier one by torch's guards, which this torch has."""
    assert portable._has_guards
    monkeypatch.setattr(portable, "_has_guards", has_guards)
    params, grads, states = ([torch.randn(4, 3) for _ in range(40)] for _ in range(3))
    description = portable._description(grads)
    assert (portable._description(grads) is description) == has_guards
    assert portable.clip_grad_supports(grads) and portable.rmsprop_supports(params, [grads, states])
    grads[17] = ALTERED[kind](grads[17])
    found, expected = (describe(grads) for describe in (portable._description, portable._description.__wrapped__))
    assert (found is None) == (expected is None) and (found is None or (*found[:2], *found[2]) == (*expected[:2], *expected[2]))
    assert portable.rmsprop_supports(params, [grads, states]) == (kind == "a parameter")


def test_lists_that_guards_do_not_tell_apart():
    grads = [torch.randn(3)]
    with torch.inference_mode():
        assert portable.clip_grad_supports(grads)
        assert not portable.clip_grad_supports([torch.randn(3)])
    assert not portable.clip_grad_supports([torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])])
    assert portable.clip_grad_supports([]) and portable.rmsprop_supports([], [[], []])


def test_a_gradient_of_another_shape_is_refused_and_nothing_is_written():
    params, grads = [torch.randn(3, 4), torch.randn(64, 64)], [torch.ones(3, 4), torch.ones(64, 64)]
    for other in (torch.randn(2, 2), torch.empty(0)):
        params[1] = other
        with pytest.raises(RuntimeError, match="parameter 1 and its gradient must have the same dtype, device and shape"):
            portable.adaptive_clip_grad_(params, grads, 0.01, 1e-3, 2.0)
        assert all((grad == 1).all() for grad in grads)


def test_grad_mode_inside_inference_mode_records_nothing():
    x = torch.randn(2, 6, 7, 7, requires_grad=True)
    with torch.inference_mode(), torch.enable_grad():
        for name, activation in ACTIVATIONS.items():
            assert "in place" in name or not activation(portable, x).requires_grad, name
        assert not portable.group_norm_act(x, 2, None, None, None, 1e-5, "relu", 0.0).requires_grad
        assert not portable.batch_norm_act(x, *[None] * 6, True, 0.1, 1e-5, "relu", 0.0).requires_grad


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode], ids=["inference", "fake"])
def test_the_mode_in_which_the_library_is_loaded_does_not_matter(mode):
    with mode():
        portable.load(FILE)
    assert portable._is_plain(torch.randn(4)) and portable._has_guards
    with torch.inference_mode():
        assert portable._is_plain(torch.randn(4))


@pytest.mark.parametrize("groups", [0, 2])
def test_strides_that_fit_both_layouts(groups):
    x = torch.randn(3, 64, 6).transpose(1, 2).unsqueeze(-1)
    assert_same_bits(lambda library: norm(library, x, "swish", groups=groups))


def test_the_reference_computes_under_transforms_modes_and_traces(calls):
    x = torch.randn(4, 3)
    expected = reference.swish(x, 1.5)

    def swish(x):
        return portable.swish(x, 1.5)

    assert_close(torch.func.vmap(swish)(x), expected)
    assert_close(torch.func.grad(lambda x: swish(x).sum())(x), torch.func.grad(lambda x: reference.swish(x, 1.5).sum())(x))
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(swish(forward_ad.make_dual(x, x))).tangent is not None
    with FlopCounterMode(display=False):
        swish(x)
    torch.jit.trace(swish, x, check_trace=False)
    assert calls == []


def test_gradients_of_gradients(calls):
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    image, other_image = torch.randn(2, 2, 2, 48, dtype=torch.float64).requires_grad_()

    def bn(act, training, with_residual):
        def function(x, weight, residual):
            running = None if training else torch.full((2,), 0.7, dtype=torch.float64)
            operands = x, running, running, weight, weight, residual if with_residual else None, None
            return portable.batch_norm_act(*operands, training, 0.1, 1e-5, act, ACTS[act].default or 0.0)

        return function

    for function in (
        lambda x: portable.leaky_relu(x, 0.1, False),
        lambda x: portable.elu(x, 1.3, False),
        lambda x: portable.elu(x, -1.3, False),
        lambda x: portable.swish(x, 1.5),
    ):
        assert torch.autograd.gradgradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(portable.swish_tensor, (x, weight))
    assert torch.autograd.gradgradcheck(portable.prelu, (x, weight))
    for act, training, with_residual in itertools.product(("identity", "relu", "leaky_relu", "swish"), (True, False), (True, False)):
        assert torch.autograd.gradgradcheck(bn(act, training, with_residual), (x, weight, residual), raise_exception=True)
    for act in ACTS:
        y = bn(act, True, True)(x.detach(), weight.detach(), residual)
        (grad,) = torch.autograd.grad(y.sum(), residual, create_graph=True)
        assert grad.shape == residual.shape
    for act, groups in itertools.product(("identity", "relu", "swish"), (1, 2)):
        assert torch.autograd.gradgradcheck(
            lambda x, weight, residual, act=act, groups=groups: portable.group_norm_act(
                x, groups, weight, weight, residual, 1e-5, act, ACTS[act].default or 0.0
            ),
            (image, weight, other_image),
        )
    assert "norm_act_forward" in calls


def test_batched_gradients():
    """torch.autograd.grad(is_grads_batched=True) calls backward with a batch of functorch's."""

    def compute(library):
        x = torch.randn(4, 3, requires_grad=True)
        residual = torch.randn(4, 3)
        functions = (
            lambda: library.leaky_relu(x, 0.1, False),
            lambda: library.elu(x, 1.3, False),
            lambda: library.swish(x, 1.5),
            lambda: library.prelu(x, torch.tensor([0.1, 0.2, 0.3])),
            lambda: library.batch_norm_act(x, None, None, None, None, residual, None, True, 0.1, 1e-5, "relu", 0.0),
            lambda: library.group_norm_act(x.unsqueeze(2).expand(4, 3, 48), 3, None, None, None, 1e-5, "relu", 0.0).sum(2),
        )
        grads = torch.randn(2, 4, 3)
        return [torch.autograd.grad(function(), x, grads, is_grads_batched=True)[0] for function in functions]

    for native, of_portable in zip(*of_both(compute), strict=True):
        assert_close(of_portable, native)


def test_in_place_writes_what_autograd_allows():
    leaf, view = torch.ones(3, requires_grad=True), torch.ones(4)[1:]
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        portable.leaky_relu(leaf, 0.1, True)
    assert leaf.tolist() == [1.0] * 3
    assert portable.leaky_relu(view, 0.1, True) is view and view._version == 1
    expanded = torch.ones(1).expand(3)
    with pytest.raises(RuntimeError, match="single memory location"):
        portable.elu(expanded, 1.0, True)
    # The output that elu keeps must not be written before backward.
    y = portable.elu(leaf * 1, 1.0, True)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.inference_mode():
        x = torch.full((3,), -1.0)
        assert portable.leaky_relu(x, 0.5, True).tolist() == [-0.5] * 3
        assert portable.swish(x, 1.0).is_inference()


def test_errors_are_torchs_and_nothing_is_written():
    bn = gk.BatchNormAct2d(3)
    mean = bn.running_mean.clone()
    x = torch.randn(2, 4, 5, 5)
    operands = x, bn.running_mean, bn.running_var, bn.weight, bn.bias, None, bn.num_batches_tracked
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 3"):
        portable.batch_norm_act(*operands, True, 0.1, 1e-5, "relu", 0.0)
    assert torch.equal(bn.running_mean, mean) and bn.num_batches_tracked == 0
    with pytest.raises(TypeError, match="not str"):
        portable.leaky_relu(x, "0.1", False)
    with pytest.raises(NotImplementedError, match="not implemented for 'Long'"):
        portable.elu(torch.arange(3), 1.0, False)
    # The least integer that torch refuses, and one that no double holds.
    for number in (2**64, 10**400):
        for act in (lambda number: portable.leaky_relu(x, number, False), lambda number: portable.elu(x, number, True)):
            with pytest.raises(OverflowError, match="int too big to convert"):
                act(number)
    for momentum, eps in ((10**400, 1e-5), (0.1, 10**400)):
        with pytest.raises(OverflowError, match="int too large to convert to float"):
            portable.batch_norm_act(x[:, :3], *operands[1:], True, momentum, eps, "relu", 0.0)


def test_a_model_trains_with_the_bits_of_the_native_library(monkeypatch):
    """Through the public functions, with clipping inside RMSprop."""

    def train():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(7, 16), gk.BatchNormAct1d(16, act="swish"), gk.PReLU(16), nn.Linear(16, 4), gk.ELU(inplace=True))
        optimizer = gk.optim.RMSprop(model.parameters(), max_norm=0.5, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(20, 7)).square().mean().backward()
            gk.clip_grad_value_(model, 0.1)
            optimizer.step()
        return copy.deepcopy(model.state_dict())

    native = train()
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "PORTABLE", portable)
    of_portable = train()
    for name, tensor in native.items():
        assert_bitwise_equal(name, of_portable[name], tensor)


def test_threads_are_torchs(each_thread_count):
    x = torch.randn(1 << 20)
    one, two = each_thread_count(lambda: portable.swish(x, 1.3))
    assert torch.equal(one, two)


# the file


def undefined_symbols(file):
    if shutil.which("nm") is None:
        pytest.skip("binutils (nm) are not installed")
    printed = subprocess.run(["nm", "--dynamic", "--undefined-only", file], check=True, capture_output=True, text=True).stdout
    return [line.split()[-1] for line in printed.splitlines()]


def test_the_library_needs_one_symbol_of_torch():
    symbols = undefined_symbols(FILE)
    unversioned = [symbol for symbol in symbols if "@" not in symbol and not symbol.startswith(("_ITM_", "__gmon", "__cxa_finalize"))]
    assert unversioned == ["torch_parallel_for"]
    assert not [symbol for symbol in symbols if re.search(r"^_ZN?K?(2at|3c10|5torch)|^Py", symbol)]


def test_the_library_runs_on_manylinux_2_24():
    """The versions of that policy. What only newer systems have is avoided in csrc/portable.cpp."""
    most = {"GLIBC": (2, 24), "GLIBCXX": (3, 4, 22), "CXXABI": (1, 3, 10), "GCC": (6, 0, 0)}
    for symbol in undefined_symbols(FILE):
        found = re.search(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)$", symbol)
        if found:
            assert tuple(map(int, found[2].split("."))) <= most[found[1]], symbol
