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
    """The names of the C functions that portable called."""
    names = []

    class Recording:
        def __getattr__(self, name):
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


def batch_norm(library, x, act, *, training=True, affine=True, with_residual=False, dtype=None, momentum=0.1):
    dtype = x.dtype if dtype is None else dtype
    x = x.detach().requires_grad_()
    channels = x.shape[1]
    weight, bias = torch.linspace(0.5, 2.0, channels).to(dtype), torch.linspace(-1.0, 1.0, channels).to(dtype)
    weight, bias = (weight.requires_grad_(), bias.requires_grad_()) if affine else (None, None)
    residual = torch.randn_like(x).requires_grad_() if with_residual else None
    running = torch.linspace(0.0, 0.1, channels).to(dtype), torch.linspace(1.0, 2.0, channels).to(dtype), torch.tensor(3)
    operands = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    operands = {name: operand for name, operand in operands.items() if operand is not None}
    call = training, momentum, 1e-5, act, ACTS[act].default or 0.0
    y = library.batch_norm_act(x, *running[:2], weight, bias, residual, running[2], *call)
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
        assert_same_bits(
            lambda library, dtype=dtype, options=options: batch_norm(library, torch.randn(3, 5, 9, 11).to(dtype), act, **options)
        )
    assert {*calls} - {"mask_bytes"} == {"batch_norm_act_forward", "batch_norm_act_backward"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", ["relu", "swish"])
def test_batch_norm_act_in_every_layout(act, shape, calls):
    for with_residual in (False, True):
        assert_same_bits(lambda library, r=with_residual: batch_norm(library, SHAPES[shape](), act, with_residual=r, momentum=None))
    assert "batch_norm_act_forward" in calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batch_norm_act_with_parameters_of_float32(dtype):
    assert_same_bits(lambda library: batch_norm(library, torch.randn(3, 5, 9, 11).to(dtype), "elu", dtype=torch.float32))


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
    assert "batch_norm_act_forward" in calls


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
