"""gradkernels.recompute: the same bits with less memory, writes before backward, torch's machinery.

An output was recomputed if its consumer unpacks another tensor than the one that forward made. Bytes are
counted as the memory that the graph keeps alive (memory.py), because hooks that count would replace
recompute's hooks.
"""

import contextlib
import copy
import gc
import pickle
import re
import threading

import pytest
import torch
from torch import nn, utils
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import gradkernels as gk
from accuracy import DTYPES, assert_bitwise_equal
from batch_norm_act_calls import ACTS, MEMORY_FORMATS, arguments
from gradkernels import _native
from memory import bytes_kept_by
from models.darknet import DarkNet
from models.efficientnet import EfficientNetBlocks
from models.resnet import Bottleneck, ResNet, resnet50
from models.unet import UNet

checkpoint = utils.checkpoint.checkpoint


class PreActivation(nn.Module):
    """Batch norm and activation before each convolution.

    He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", 2016.
    """

    def __init__(self, channels):
        super().__init__()
        self.bn1 = gk.BatchNormAct2d(channels, act="relu")
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = gk.BatchNormAct2d(channels, act="elu")
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x))))


class DenseLayer(nn.Module):
    """Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", 2017."""

    def __init__(self, channels, growth):
        super().__init__()
        self.bn = gk.BatchNormAct2d(channels, act="swish")
        self.conv = nn.Conv2d(channels, growth, 3, padding=1)

    def forward(self, x):
        return torch.cat([x, self.conv(self.bn(x))], 1)


def perceptron():
    return nn.Sequential(
        nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ELU(), nn.Linear(32, 4)
    )


# name -> (network, shape of a batch, largest allowed share of the bytes that are kept without recompute)
NETWORKS = {
    "ResNet": (lambda: ResNet(Bottleneck, (1, 3, 1, 1), width=4), (3, 3, 32, 32), 0.72),
    "pre-activation": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), *[PreActivation(8) for _ in range(3)]), (2, 3, 9, 7), 0.7),
    "DenseNet": (lambda: nn.Sequential(*[DenseLayer(3 + 4 * i, 4) for i in range(4)]), (2, 3, 9, 7), 0.6),
    "DarkNet": (lambda: DarkNet((1, 2, 1, 1, 1), width=4), (2, 3, 32, 32), 0.85),
    "EfficientNet": (EfficientNetBlocks, (2, 3, 16, 16), 0.75),
    "U-Net": (UNet, (1, 3, 16, 16), 0.75),
    "MLP": (perceptron, (16, 12), 0.75),
}


def network(name):
    """A converted network whose batch norms have random parameters, and a batch for it."""
    make, shape, _ = NETWORKS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    gk.convert(model)
    return model, torch.randn(shape)


def loss_of(model, x):
    y = model(x)
    return sum(each.square().mean() for each in (y if isinstance(y, list) else [y]))


def loss_and_gradients():
    """The loss of a network that recomputes (its graph is retained), the parameters and their gradients."""
    model, x = network("ResNet")
    with gk.recompute():
        loss = loss_of(model, x)
    parameters = list(model.parameters())
    return loss, parameters, torch.autograd.grad(loss, parameters, retain_graph=True)


def step(model, x, context):
    """The results of a training step by name: loss, gradients and buffers."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with context:
        loss = loss_of(model, x)
    loss.backward()
    gradients = {f"gradient of {name}": each.grad for name, each in model.named_parameters()}
    return {"loss": loss.detach(), "gradient of x": x.grad, **gradients, **{name: each.clone() for name, each in model.named_buffers()}}


def assert_same_step(model, other, x, context):
    """Fails unless a step of a model, and a step of its copy in this context, give the same bits."""
    expected, actual = step(model, x, contextlib.nullcontext()), step(other, x, context)
    assert actual.keys() == expected.keys()
    for name, each in expected.items():
        assert_bitwise_equal(name, actual[name], each)


class Saves(torch.autograd.Function):
    """The identity function, whose node saves its input: saved_tensors unpacks it."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.clone()

    @staticmethod
    def backward(ctx, grad_y):
        (y,) = ctx.saved_tensors
        return grad_y * torch.ones_like(y)


def unpacked(y):
    # Up to torch 2.12 saved tensors are freed with the output, so `saved` is kept.
    saved = Saves.apply(y)
    (found,) = saved.grad_fn.saved_tensors
    return found


def is_recomputed(y):
    return unpacked(y).data_ptr() != y.data_ptr()


def normalised(x=None, residual=None, act="relu", channels=3, **settings):
    x = torch.randn(4, channels, 5, 5, requires_grad=True) if x is None else x
    return gk.BatchNormAct2d(channels, act=act, **settings)(x, residual)


# values


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_is_the_same_to_the_bit_and_less_is_kept(name):
    model, x = network(name)
    recomputing = copy.deepcopy(model)

    def forward(context):
        with context:
            return loss_of(recomputing, x)

    most = NETWORKS[name][2] * bytes_kept_by(lambda: forward(contextlib.nullcontext()))
    assert bytes_kept_by(lambda: forward(gk.recompute())) <= most
    recomputing.load_state_dict(model.state_dict())
    assert_same_step(model, recomputing, x, gk.recompute())


@pytest.mark.slow
def test_a_resnet_50_keeps_30_percent_less_than_torchs():
    model, x = resnet50(width=16), torch.randn(2, 3, 64, 64)

    def forward():
        with gk.recompute():
            return model(x)

    before = bytes_kept_by(lambda: model(x))
    gk.convert(model)
    assert bytes_kept_by(forward) <= 0.7 * before


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recomputed_bits(dtype, act):
    for shape in ((7, 3), (8, 5, 7), (4, 65, 5, 5), (2, 3, 33, 17), (2, 3, 4, 5, 6)):
        given = arguments(shape, dtype, residual=True)
        given["residual"].view(-1)[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
        strided = given["x"].mT.contiguous().mT
        formats = [MEMORY_FORMATS[len(shape)]] if len(shape) in MEMORY_FORMATS else []
        for x in (given["x"], strided, *(given["x"].contiguous(memory_format=each) for each in formats)):
            for residual in (None, given["residual"]):
                for affine, training in ((True, True), (False, True), (True, False), (False, False)):
                    parameters = [given["weight"], given["bias"]] if affine else [None, None]
                    # In training an inf would turn the statistics into nan.
                    some_infinite = x.detach().clone() if training else x.masked_fill(x > 2, torch.inf)
                    with gk.recompute():
                        y = gk.batch_norm_act(
                            some_infinite.requires_grad_(),
                            given["running_mean"].clone(),
                            given["running_var"].clone(),
                            *parameters,
                            training,
                            act=act,
                            act_param=ACTS[act],
                            residual=residual,
                        )
                        found = unpacked(y)
                    assert found.data_ptr() != y.data_ptr() and found.stride() == y.stride()
                    assert_bitwise_equal(f"{shape}, residual {residual is not None}, {affine}, {training}", found.detach(), y.detach())


def test_recomputed_bits_of_a_tensor_that_is_written_past_the_caches():
    with gk.recompute():
        x = torch.randn(5, 3, 600, 601, requires_grad=True)
        y = normalised(x, x * 2)
        assert_bitwise_equal("y", unpacked(y).detach(), y.detach())


def test_an_empty_batch():
    with gk.recompute():
        x = torch.zeros(0, 3, 5, 5, requires_grad=True)
        y = gk.BatchNormAct2d(3).eval()(x)
        assert unpacked(y).shape == y.shape
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_gradients_of_gradients():
    bn = gk.BatchNormAct1d(3, act="swish").double()
    inputs = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def function(x, residual):
        with gk.recompute():
            y = F.batch_norm(x, None, None, training=True)
            return gk.batch_norm_act(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, act="swish", residual=residual).square()

    assert gradcheck(function, inputs) and gradgradcheck(function, inputs)


def test_create_graph_and_backward_inside_the_context():
    model, x = network("ResNet")
    parameters = list(model.parameters())

    def second_order(context):
        with context:
            first = torch.autograd.grad(loss_of(model, x), parameters, create_graph=True)
            return torch.autograd.grad(sum(each.square().sum() for each in first), parameters, allow_unused=True)

    for expected, actual in zip(second_order(contextlib.nullcontext()), second_order(gk.recompute()), strict=True):
        assert (expected is None and actual is None) or torch.equal(actual, expected)


# what is recomputed


def test_every_third_output_of_a_chain_is_kept():
    with gk.recompute():
        y, found = torch.randn(4, 3, 5, 5, requires_grad=True), []
        for _ in range(7):
            y = normalised(y * 1, residual=y)
            found.append(is_recomputed(y))
        # The same for outputs that are the next x.
        z = normalised()
        for _ in range(3):
            z = normalised(z)
            found.append(is_recomputed(z))
        # An output is kept if both of its operands are recomputed, which takes two passes already.
        assert is_recomputed(normalised(normalised(), torch.zeros(4, 3, 5, 5)))
        assert not is_recomputed(normalised(normalised(), normalised()))
    assert found == [True, True, False, True, True, False, True, True, False, True]


def test_the_residual_is_kept_only_where_it_is_needed():
    x, residual = (torch.randn(4, 3, 5, 5, requires_grad=True) for _ in range(2))

    def kept(context):
        with context:
            return bytes_kept_by(lambda: normalised(x * 1, residual * 1))

    alone, recomputing = kept(contextlib.nullcontext()), kept(gk.recompute())
    assert recomputing == alone + residual.nbytes
    assert kept(saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)) == alone


CHANGES = ["detach", "view", "write", "assign", "assign in another order", "assign negated", "assign as another type", "leave"]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_outputs_are_kept(change):
    with gk.recompute():
        y = normalised()
        if change == "detach":
            y = y.detach().requires_grad_()
        elif change == "view":
            y = y.flatten(1)
        elif change == "write":
            y.mul_(2)
        elif change == "assign":
            y.data = y.data * 2
        elif change == "assign in another order":
            y.data = y.data.transpose(2, 3)
        elif change == "assign negated":
            y.data = torch._neg_view(y.data)
        elif change == "assign as another type":
            y = gk.BatchNormAct2d(3, act="relu").half()(torch.randn(2, 3, 4, 4).half().requires_grad_())
            y.data = y.data.view(torch.bfloat16)
        else:
            assert is_recomputed(y)
            with save_on_cpu():
                y = normalised()
        assert not is_recomputed(y) and torch.equal(unpacked(y), y)


def test_writing_an_output_after_it_was_used_changes_no_gradient():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    bn = gk.BatchNormAct2d(3, act="relu")
    expected = torch.autograd.grad(bn(x).square().sum(), bn.weight)
    with gk.recompute():
        y = bn(x)
        loss = y.square().sum()
    with torch.no_grad():
        y.zero_()
    assert torch.equal(*expected, *torch.autograd.grad(loss, bn.weight))


# writes and frees between forward and backward


def message_of(function):
    with pytest.raises(RuntimeError) as failure:
        function()
    return str(failure.value)


@pytest.mark.parametrize("written", ["x", "residual", "weight", "bias", "kept"])
def test_writing_an_operand_is_torchs_error(written):
    x, residual = (torch.randn(4, 3, 5, 5, requires_grad=True) for _ in range(2))
    operands = {"x": x * 1, "residual": residual * 1, "kept": x * 2}
    bn = gk.BatchNormAct2d(3, act="relu")
    with gk.recompute():
        y = bn(operands["x"], operands["residual"])
        loss = (y.square() * operands["kept"].square()).sum()
    with torch.no_grad():
        (operands | {"weight": bn.weight, "bias": bn.bias})[written].add_(1)
    torchs = torch.ones(4, 3, requires_grad=True) * 1
    loss_of_torchs = torchs.square().sum()
    torchs.detach().add_(1)

    def words(loss):
        text = re.sub(r"at version \d; expected version \d", "at versions", message_of(loss.backward))
        return re.sub(r"\[torch.FloatTensor .*?\]\]?(, which is output 0 of \w+,)?", "[tensor]", text)

    assert words(loss) == words(loss_of_torchs)


def test_a_second_backward_is_torchs_error_unless_the_graph_is_retained():
    loss, parameters, first = loss_and_gradients()
    second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))
    assert "second time" in message_of(loss.backward)


def test_one_of_two_consumers_after_the_other():
    with gk.recompute():
        y = normalised()
        first, second = y.square().sum(), y.exp().sum()
        squares = y.square().sum()
    assert torch.equal(torch.autograd.grad(first, y)[0], 2 * y)
    second.backward()
    # backward freed the batch norm's node, but not the operands from which y is computed.
    assert torch.equal(torch.autograd.grad(squares, y, retain_graph=True)[0], 2 * y)
    # As in torch, the error is that the batch norm's backward runs a second time.
    assert "second time" in message_of(squares.backward)


def test_the_graph_is_freed_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        with gk.recompute():
            x = torch.randn(4, 3, 5, 5, requires_grad=True) * 1
            # exp saves its output.
            hidden = normalised(x, x * 1).exp()
            loss = (unpacked(hidden) * normalised(hidden)).square().sum()
        held = [StorageWeakRef(each.untyped_storage()) for each in (x, hidden)]
        del x, hidden
        assert not any(each.expired() for each in held)
        del loss
        assert all(each.expired() for each in held)
    finally:
        gc.enable()


def test_a_deep_graph_is_freed_without_recursion():
    with gk.recompute():
        y = torch.randn(4, 1, requires_grad=True)
        for _ in range(20_000):
            y = gk.batch_norm_act(y, None, None, training=True, act="leaky_relu")
    del y


# the context


def test_an_exception_leaves_the_context():
    with pytest.raises(ZeroDivisionError), gk.recompute():
        raise ZeroDivisionError
    assert not is_recomputed(normalised())


def test_nested_contexts():
    context = gk.recompute()
    with context:
        with context, gk.recompute():
            assert is_recomputed(normalised())
        assert is_recomputed(normalised())
        with save_on_cpu():
            assert not is_recomputed(normalised())
    with save_on_cpu(), gk.recompute():
        assert is_recomputed(normalised())
    assert not is_recomputed(normalised())


def test_no_grad():
    with gk.recompute(), torch.no_grad():
        y = normalised()
    assert y.grad_fn is None


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_checkpoint(where, use_reentrant):
    model, x = network("MLP")
    model = nn.ModuleDict({"first": model[:3], "second": model[3:]})

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = copy.deepcopy(model)

        def forward(self, x):
            if where == "inside":
                with gk.recompute():
                    return self.model["second"](checkpoint(self.model["first"], x, use_reentrant=use_reentrant))
            return self.model["second"](checkpoint(self.recomputing, x, use_reentrant=use_reentrant))

        def recomputing(self, x):
            with gk.recompute():
                return self.model["first"](x)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = copy.deepcopy(model)

        def forward(self, x):
            return self.model["second"](self.model["first"](x))

    plain, checkpointed = Plain(), Checkpointed()
    expected, actual = step(plain, x, contextlib.nullcontext()), step(checkpointed, x, contextlib.nullcontext())
    # A checkpointed batch norm updates its running statistics twice, also in torch.
    for name in (each for each in expected if "running" not in each and "num_batches" not in each):
        assert_bitwise_equal(name, actual[name], expected[name])


def test_threads():
    """Each thread has its own context, and a thread that waits for a node does not hold Python's lock."""
    model, x = network("ResNet")
    found, barrier = {}, threading.Barrier(3)

    def run(place, context):
        copied = copy.deepcopy(model)
        with context:
            barrier.wait()
            found[place, "recomputes"] = is_recomputed(normalised())
            loss = loss_of(copied, x)
        parameters = list(copied.parameters())
        for _ in range(3):
            found[place] = torch.autograd.grad(loss, parameters, retain_graph=True)

    contexts = [gk.recompute(), contextlib.nullcontext(), gk.recompute()]
    threads = [threading.Thread(target=run, args=each) for each in enumerate(contexts)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert [found[place, "recomputes"] for place in range(3)] == [True, False, True]
    assert all(torch.equal(*each) for place in (1, 2) for each in zip(found[0], found[place], strict=True))


def test_threads_that_share_a_graph():
    loss, parameters, expected = loss_and_gradients()
    found = {}

    def run(place):
        for _ in range(3):
            found[place] = torch.autograd.grad(loss, parameters, retain_graph=True)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert all(all(map(torch.equal, expected, found[place])) for place in range(3))


def test_without_the_library_it_does_nothing(monkeypatch):
    monkeypatch.setattr(_native, "C", None)
    with gk.recompute():
        loss = normalised().square().sum()
    loss.backward()


# with the rest of torch


def test_autocast():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), gk.BatchNormAct2d(8, act="relu"), nn.Conv2d(8, 4, 3))

    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x)

    autocast = Autocast()
    assert_same_step(autocast, copy.deepcopy(autocast), torch.randn(2, 3, 8, 8), gk.recompute())


def test_copies_and_pickles_of_a_model_that_has_run():
    model, x = network("ResNet")
    with gk.recompute():
        loss_of(model, x)
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for each in (copied, loaded):
        assert_same_step(copy.deepcopy(model), each, x, gk.recompute())


def test_hooks_of_modules_see_outputs_as_they_are():
    model, x = network("MLP")
    seen = []
    model[1].register_forward_hook(lambda module, inputs, y: seen.append(y))
    model[1].register_full_backward_hook(lambda module, grad_x, grad_y: seen.append(grad_y[0]))
    with gk.recompute():
        loss = loss_of(model, x)
    loss.backward()
    assert seen[0].shape == seen[1].shape == (16, 32)


def test_fake_tensors():
    with FakeTensorMode(), gk.recompute():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), gk.BatchNormAct2d(8, act="relu"), nn.Conv2d(8, 4, 3))
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        assert model[0].weight.grad.shape == model[0].weight.shape


def test_torch_func_refuses_recompute_like_other_hooks():
    with gk.recompute():
        assert "saved tensor hooks" in message_of(lambda: torch.func.grad(lambda x: normalised(x).sum())(torch.randn(4, 3, 5, 5)))


@pytest.mark.parametrize("where", ["around", "inside"])
def test_compiled(where):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), gk.BatchNormAct2d(8, act="relu"), nn.Conv2d(8, 4, 3))
    compiled = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)

    def inside(x):
        with gk.recompute():
            return compiled[2](compiled[1](compiled[0](x)))

    function = torch.compile(compiled if where == "around" else inside, backend="aot_eager")
    with gk.recompute() if where == "around" else contextlib.nullcontext():
        loss = function(x).square().mean()
    loss.backward()
    expected = step(model, x, contextlib.nullcontext())
    torch.testing.assert_close(loss.detach(), expected["loss"])
    torch.testing.assert_close(compiled[0].weight.grad, expected["gradient of 0.weight"])


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_compiled_autograd():
    """Compiled autograd frees every node before its graph runs."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), gk.BatchNormAct2d(4, act="relu"), nn.Conv2d(4, 2, 1))
    x = torch.randn(4, 3, 5, 5)
    expected = step(copy.deepcopy(model), x, gk.recompute())
    torch._dynamo.reset()
    with gk.recompute():
        loss = loss_of(model, x)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    for name, parameter in model.named_parameters():
        assert_bitwise_equal(name, parameter.grad, expected[f"gradient of {name}"])


def assert_same_in_parallel(rank, world_size, file, synchronised):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model, x = network("ResNet")
    if synchronised:
        model = gk.convert_sync_batch_norm(model)
    assert_same_step(*(DistributedDataParallel(copy.deepcopy(model)) for _ in range(2)), x + rank, gk.recompute())
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    assert_same_in_parallel(0, 1, tmp_path / "store", synchronised=False)


@pytest.mark.slow
@pytest.mark.parametrize("synchronised", [False, True])
def test_distributed_data_parallel_of_two_processes(tmp_path, synchronised):
    torch.multiprocessing.spawn(assert_same_in_parallel, (2, str(tmp_path / "store"), synchronised), nprocs=2)
