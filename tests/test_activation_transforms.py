"""Every way torch calls the operators of the activations: opcheck, compile, functorch, autocast, checkpoint, export."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck
from torch.testing import assert_close
from torch.testing._internal.common_utils import DeterministicGuard
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from accuracy import DTYPES, assert_bitwise_equal, outcome
from activation_calls import ACTIVATIONS, INPLACE, LAYOUTS, PARAMETRICS, each_act, each_inplace, value_and_grad
from gradkernels import reference
from memory import saved_by

OPS = torch.ops.gradkernels

OPCHECKED = [
    *("leaky_relu", "leaky_relu_", "leaky_relu_with_mask", "leaky_relu_with_mask_", "leaky_relu_backward"),
    *("rrelu_with_mask", "rrelu_with_mask_", "rrelu_backward", "prelu", "prelu_backward"),
    *("elu", "elu_", "elu_backward", "swish", "swish_backward", "swish.Tensor", "swish_backward.Tensor"),
]


def opcheck_samples():
    """operator -> a list of its arguments"""
    forward, samples = [], {}
    layouts = ("0-d", "empty", "contiguous", "transposed", "channels_last", "expanded", "every second")
    for layout in layouts:
        for requires_grad in (False, True):
            forward.append(LAYOUTS[layout](torch.randn).detach().requires_grad_(requires_grad))
    samples["leaky_relu"] = [(x, 0.1) for x in forward]
    samples["elu"] = [(x, alpha) for x in forward for alpha in (1.3, -0.5)]
    samples["swish"] = [(x, 1.7) for x in forward]
    plain = [torch.randn(3, 5), torch.randn(5, 3, dtype=torch.float64).t(), torch.randn(0), torch.randn(3, 10)[:, ::2].bfloat16()]
    seed = torch.tensor(1234567890123)
    for name in ("leaky_relu_", "leaky_relu_with_mask", "leaky_relu_with_mask_", "elu_"):
        samples[name] = [(x, 0.1) for x in plain]
    samples["rrelu_with_mask"] = [(x, seed, 0.1, 0.3) for x in (*plain, *forward)]
    samples["rrelu_with_mask_"] = [(x, seed, 0.1, 0.3) for x in plain]
    backward = ("leaky_relu_backward", "rrelu_backward", "elu_backward", "swish_backward", "prelu_backward", "swish_backward.Tensor")
    samples |= {name: [] for name in ("prelu", "swish.Tensor", *backward)}
    for dtype in DTYPES:
        for requires_grad in (False, True) if dtype == torch.float32 else (True,):
            x, grad_y = (torch.randn(3, 5, dtype=dtype, requires_grad=requires_grad) for _ in range(2))
            mask = OPS.leaky_relu_with_mask(x.detach(), 0.1)[1]
            samples["leaky_relu_backward"].append((grad_y, mask, x.stride(), 0.1))
            samples["rrelu_backward"].append((grad_y, mask, x.stride(), seed, 0.1, 0.3))
            samples["elu_backward"] += [(grad_y, x, -1.3, False), (grad_y, x, 1.3, True)]
            samples["swish_backward"].append((grad_y, x, 1.7))
            every = (((), [True, True]), ((1,), [True, False]), ((5,), [False, True]), ((5,), [True, True]))
            for shape, wanted in every if dtype == torch.float32 else every[-1:]:
                parameter = torch.rand(shape, dtype=dtype, requires_grad=requires_grad)
                for name in ("prelu_backward", "swish_backward.Tensor"):
                    samples[name].append((grad_y, x, parameter, wanted))
    for layout in layouts:
        for requires_grad in (False, True):
            x = LAYOUTS[layout](torch.randn).detach().requires_grad_(requires_grad)
            for channels in {1, x.shape[1] if x.dim() > 1 else 1}:
                parameter = torch.rand(channels, requires_grad=requires_grad)
                samples["prelu"].append((x, parameter))
                samples["swish.Tensor"].append((x, parameter))
    return samples


@pytest.mark.parametrize("op", OPCHECKED)
def test_opcheck(op):
    name, _, overload = op.partition(".")
    for args in opcheck_samples()[op]:
        opcheck(getattr(getattr(OPS, name), overload or "default"), args)


def test_every_operator_is_checked():
    registered = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("gradkernels::")}
    mine = {name for name in registered if name.split("::")[1].startswith(("leaky_relu", "rrelu", "prelu", "elu", "swish"))}
    assert mine == {f"gradkernels::{op.partition('.')[0]}" for op in OPCHECKED}


def test_operators_compute_what_their_schema_says():
    x, grad_y = torch.randn(131), torch.randn(131)
    y, mask = OPS.leaky_relu_with_mask(x, 0.1)
    bits = (mask.repeat_interleave(8) >> (torch.arange(mask.numel() * 8) % 8)) & 1
    assert_bitwise_equal("mask", bits[:131].bool(), x > 0)
    assert_bitwise_equal("y", y, OPS.leaky_relu(x, 0.1))
    inplace = x.clone()
    assert_bitwise_equal("mask in place", OPS.leaky_relu_with_mask_(inplace, 0.1), mask)
    assert_bitwise_equal("y in place", inplace, y)
    assert_bitwise_equal(
        "leaky_relu_backward", OPS.leaky_relu_backward(grad_y, mask, x.stride(), 0.1), value_and_grad(F.leaky_relu, x, grad_y, 0.1)[1]
    )
    elu_grad = value_and_grad(F.elu, x, grad_y, 1.3)[1]
    assert_close(OPS.elu_backward(grad_y, x, 1.3, False), elu_grad)
    assert_close(OPS.elu_backward(grad_y, F.elu(x, 1.3), 1.3, True), elu_grad)
    assert_close(OPS.swish_backward(grad_y, x, 1.7), value_and_grad(reference.swish, x, grad_y, 1.7)[1])
    seed = torch.tensor(-5)
    y, mask = OPS.rrelu_with_mask(x, seed, 0.1, 0.3)
    assert_bitwise_equal("mask of rrelu", mask, OPS.leaky_relu_with_mask(x, 0.1)[1])
    inplace = x.clone()
    assert_bitwise_equal("mask in place", OPS.rrelu_with_mask_(inplace, seed, 0.1, 0.3), mask)
    assert_bitwise_equal("y in place", inplace, y)
    assert_bitwise_equal("rrelu_backward", OPS.rrelu_backward(x, mask, x.stride(), seed, 0.1, 0.3), y)
    assert not torch.equal(OPS.rrelu_with_mask(x, torch.tensor(-5 + 2**32), 0.1, 0.3)[0], y), "the upper half of the seed has no effect"


@each_act
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(act, dynamic):
    module = act.module(act.params[1])

    def forward(x):
        y = act.function(x * 1, act.params[1], inplace=True) if act.has_inplace else act.function(x * 1, act.params[1])
        return y + module(x)

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((5, 13), (7, 9)):
        x, grad_y = torch.randn(size), torch.randn(size)
        assert_close(value_and_grad(compiled, x, grad_y), value_and_grad(forward, x, grad_y))


@each_act
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_compiled_model_contains_torchs_operators_only(act, dtype):
    targets = []

    def look(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    model = nn.Sequential(nn.Linear(6, 6, dtype=dtype), act.module().to(dtype))
    x = torch.randn(4, 6, dtype=dtype)
    y = torch.compile(model, fullgraph=True, backend=backend)(x)
    y.sum().backward()
    assert_close(y, model(x))
    assert any("aten." in target for target in targets)
    assert [target for target in targets if "gradkernels" in target] == []


@pytest.mark.parametrize("op", ["leaky_relu", "elu", "swish", "swish.Tensor", "prelu", "rrelu_with_mask"])
def test_compile_of_the_operator_itself(op):
    name, _, overload = op.partition(".")
    operator = getattr(getattr(OPS, name), overload or "default")
    tensor = torch.tensor([0.3])
    args = {"swish.Tensor": (tensor,), "prelu": (tensor,), "rrelu_with_mask": (torch.tensor(5), 0.1, 0.3)}.get(op, (1.3,))

    def forward(x):
        y = operator(x, *args)
        return y[0] if isinstance(y, tuple) else y

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((5, 13), (7, 9)):
        x, grad_y = torch.randn(size), torch.randn(size)
        assert_close(value_and_grad(compiled, x, grad_y), value_and_grad(forward, x, grad_y))


@pytest.mark.slow
def test_compiled_autograd():
    """After other nodes, because torch traces their gradients as placeholders without a true shape."""
    parameter, channel = torch.tensor([0.3]).requires_grad_(), torch.tensor([0.3, -0.2, 1.5]).requires_grad_()

    def through_views(x):
        z = x * 1
        gk.leaky_relu(z[1:, :2], 0.2, inplace=True)
        return z

    def loss(x):
        terms = [act.function(x, param) for act in ACTIVATIONS for param in act.params]
        terms += [act.function(x * 1, inplace=True) for act in INPLACE]
        terms += [gk.elu(x.bfloat16()), gk.elu(gk.swish(x.transpose(0, 1)).square() - 1), through_views(x)]
        terms += [act.function(x, each) for act in PARAMETRICS for each in (parameter, channel, channel.detach())]
        terms += [gk.rrelu(x, training=True), gk.rrelu(x * 1, training=True, inplace=True)]
        return sum(each.square().sum() for each in terms)

    torch._dynamo.reset()
    for size in (5, 9):
        x = torch.randn(size, 3, 7).requires_grad_()
        for leaves in ((x, parameter, channel), (channel,)):
            results = []
            for context in (contextlib.nullcontext(), compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True))):
                torch.manual_seed(0)
                y = loss(x)
                with context:
                    results.append(torch.autograd.grad(y, leaves))
            for eager, compiled in zip(*results, strict=True):
                assert_bitwise_equal("gradient", compiled, eager)


def test_compiled_autograd_of_another_slope_and_after_the_graph_is_freed():
    torch._dynamo.reset()
    x = torch.randn(9).requires_grad_()
    for slope in (0.1, 0.2, 0.1):
        y = gk.leaky_relu(x, slope).square().sum()
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            (grad,) = torch.autograd.grad(y, x)
        assert_close(grad, 2 * x.detach() * torch.where(x > 0, 1.0, slope * slope))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward()


@each_act
@pytest.mark.filterwarnings("error::UserWarning")
def test_functorch(act):
    x, tangent = torch.randn(4, 7), torch.randn(4, 7)

    vmap = functools.partial(torch.func.vmap, randomness="same")

    def loss(function):
        return lambda x: function(x).square().sum()

    for name, transform in {
        "grad": lambda f: torch.func.grad(loss(f))(x),
        "vmap": lambda f: vmap(f)(x),
        "vmap over columns": lambda f: vmap(f, in_dims=1, out_dims=1)(x),
        "vmap of grad": lambda f: vmap(torch.func.grad(loss(f)))(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (tangent,)),
        "vjp": lambda f: torch.func.vjp(f, x)[1](tangent),
        "jacrev": lambda f: torch.func.jacrev(f)(x),
        "jacfwd": lambda f: torch.func.jacfwd(f, randomness="same")(x),
        "hessian": lambda f: torch.func.jacfwd(torch.func.jacrev(loss(f)), randomness="same")(x),
    }.items():
        assert_close(transform(act.function), transform(act.torchs), msg=lambda text, name=name: f"{name}: {text}")


def test_fused_path_after_functorch():
    torch.func.grad(lambda x: gk.leaky_relu(x).sum())(torch.randn(9))
    assert [each.dtype for each in saved_by(lambda: gk.leaky_relu(torch.randn(9, requires_grad=True)))[1]] == [torch.uint8]


@each_inplace
def test_functorch_inplace(act):
    x = torch.randn(4, 7)
    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f), randomness="same")):
        results = [
            transform(lambda x, function=function: function(x * 1, inplace=True).square().sum())(x)
            for function in (act.function, act.torchs)
        ]
        assert_close(results[0], results[1])


@each_act
def test_forward_ad(act):
    x, tangent = torch.randn(65), torch.randn(65)
    results = []
    for function in (act.function, act.torchs):
        with forward_ad.dual_level():
            results.append(tuple(forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))))
    assert_close(results[0], results[1])


@each_act
def test_export(act):
    exported = torch.export.export(act.module().eval(), (torch.randn(4, 6),), dynamic_shapes=[{0: torch.export.Dim("batch", min=2)}])
    x = torch.randn(9, 6)
    assert_close(exported.module()(x), act.function(x))
    assert_close(exported.run_decompositions().module()(x), act.function(x))


@each_act
def test_inference_mode(act):
    x = torch.randn(65)
    expected = act.function(x)
    with torch.inference_mode():
        y = act.function(x)
        assert y.is_inference() and not y.requires_grad
        assert_bitwise_equal("y", y, expected)
        if act.has_inplace:
            inference_x = x.clone()
            assert_bitwise_equal("in place on an inference tensor", act.function(inference_x, inplace=True), expected)
            assert_bitwise_equal("in place on a normal tensor", act.function(x, inplace=True), expected)
            assert x._version == 1


@each_act
def test_inference_tensor_is_not_written_outside_inference_mode(act):
    if not act.has_inplace:
        return
    with torch.inference_mode():
        x = torch.randn(65)
    before = x.clone()
    came = outcome(act.function, x, inplace=True)
    assert_bitwise_equal("x", x, before)
    assert came == outcome(F.leaky_relu, x, inplace=True) and came[0] is RuntimeError


@pytest.mark.parametrize("function,torchs", [(gk.leaky_relu, F.leaky_relu), (gk.elu, F.elu)], ids=["leaky_relu", "elu"])
@pytest.mark.parametrize("number", ["a", None, [0.1], 1j, torch.tensor([0.1, 0.2]), torch.tensor(0.1, requires_grad=True)], ids=str)
def test_parameter_that_is_not_a_number(function, torchs, number):
    """The binding would turn a tensor that requires grad into a number and lose its gradient."""
    x = torch.randn(3)
    came = outcome(function, x, number)
    assert came == outcome(torchs, x, number) and came[0] in (TypeError, RuntimeError)


@pytest.mark.parametrize("beta", [1.0, 2.0, torch.tensor(2.0)], ids=str)
def test_swish_of_integers(beta):
    assert outcome(gk.swish, torch.arange(3), beta) == outcome(F.silu, torch.arange(3))
    assert outcome(OPS.swish, torch.arange(3), beta) == outcome(F.silu, torch.arange(3))


@each_act
def test_autocast_has_torchs_dtypes(act, device):
    """The dtype of the input, except for prelu, which torch runs in the lower precision."""
    x, grad_y = torch.randn(65), torch.randn(65)
    with torch.autocast(device, dtype=torch.bfloat16):
        for each in (x, x.bfloat16()):
            y, grad_x = value_and_grad(act.function, each, grad_y.to(act.torchs(each).dtype))
            torch_y, torch_grad_x = value_and_grad(act.torchs, each, grad_y.to(y.dtype))
            assert y.dtype == (torch.bfloat16 if act.name == "prelu" else each.dtype)
            assert_close(y, torch_y)
            assert_close(grad_x, torch_grad_x)


@each_act
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoint(act, use_reentrant):
    x, grad_y = torch.randn(65), torch.randn(65)
    if use_reentrant:
        x.requires_grad_()
        y = checkpoint(act.function, x, use_reentrant=True)
        y.backward(grad_y)
        checkpointed = y.detach(), x.grad
    else:
        checkpointed = value_and_grad(lambda x: checkpoint(act.function, x, use_reentrant=False), x, grad_y)
    assert_close(checkpointed, value_and_grad(act.function, x, grad_y), rtol=0, atol=0)


@each_act
def test_saved_tensors_may_be_moved_by_hooks(act, device):
    x, grad_y = torch.randn(65), torch.randn(65)
    expected = value_and_grad(act.function, x, grad_y)
    with saved_tensors_hooks(lambda tensor: tensor.cpu().numpy().copy(), lambda kept: torch.from_numpy(kept).to(device)):
        assert_close(value_and_grad(act.function, x, grad_y), expected, rtol=0, atol=0)


@each_act
def test_deterministic_mode(act):
    """Fresh memory is nan in this mode, so elements that a kernel does not write would change the bits."""
    for size in (65, 70_001):
        x, grad_y = torch.randn(size), torch.randn(size)
        expected = value_and_grad(act.function, x, grad_y)
        with DeterministicGuard(True):
            assert torch.empty(3).isnan().all()
            actual = value_and_grad(act.function, x, grad_y)
        for name, each, other in zip(("y", "grad_x"), actual, expected, strict=True):
            assert_bitwise_equal(f"{name}, size {size}", each, other)
