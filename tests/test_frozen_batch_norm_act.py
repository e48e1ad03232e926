"""FrozenBatchNormAct2d, and freezing and unfreezing the batch norms of a model."""

import copy
import pickle

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn import functional as F

import gradkernels as gk
from accuracy import DTYPES, assert_accurate, assert_bitwise_equal, exact_batch_norm_act
from batch_norm_act_calls import ACTS, NUMBERS
from gradkernels import acts, reference
from models.frozen import BUFFERS, FrozenBatchNorm2d

each_act = pytest.mark.parametrize("act", ACTS)


def randomised(bn):
    with torch.no_grad():
        for name in BUFFERS:
            value = getattr(bn, name)
            if value is not None:
                value.copy_(torch.rand_like(value) + 0.5 if name == "running_var" else torch.randn_like(value))
    return bn


def gradients(function, *tensors):
    leaves = [each.detach().clone().requires_grad_() for each in tensors]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, torch.cos(y.detach()))]


@each_act
@pytest.mark.parametrize("residual", (False, True), ids=("plain", "residual"))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients(act, residual, memory_format, dtype):
    bn = randomised(gk.FrozenBatchNormAct2d(5, act=act, act_param=ACTS[act]))
    if dtype == torch.float64:
        bn.double()
    tensors = [torch.randn(3, 5, 7, 6).to(dtype).contiguous(memory_format=memory_format) for _ in range(1 + residual)]
    ours = gradients(bn, *tensors)
    values = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    param = NUMBERS[act] or None
    theirs = gradients(lambda x, z=None: reference.batch_norm_act(x, *values, act=act, act_param=param, residual=z), *tensors)
    exact = exact_batch_norm_act(
        tensors[0],
        *values,
        False,
        0.0,
        bn.eps,
        act=act,
        act_param=NUMBERS[act],
        residual=tensors[1] if residual else None,
        grad_y=torch.cos(ours[0].detach()),
    )
    assert ours[0].is_contiguous(memory_format=memory_format)
    for name, our, their in zip(("y", "grad_x", "grad_residual"), ours, theirs, strict=False):
        assert_accurate(name, our.detach(), their.detach(), exact[name], per="tensor")


def test_gradcheck():
    bn = randomised(gk.FrozenBatchNormAct2d(2, act="swish").double())
    operands = [torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(bn, operands)
    assert torch.autograd.gradgradcheck(bn, operands)


def test_has_no_parameters_and_no_mode():
    bn = randomised(gk.FrozenBatchNormAct2d(4, act="relu"))
    before = copy.deepcopy(bn.state_dict())
    x = torch.randn(2, 4, 3, 3)
    in_training, in_evaluation = bn.train()(x), bn.eval()(x)
    assert_bitwise_equal("y", in_training, in_evaluation)
    assert not list(bn.parameters()) and list(bn.state_dict()) == list(BUFFERS)
    for name, value in bn.state_dict().items():
        assert_bitwise_equal(name, value, before[name])
    assert not bn(x).requires_grad


def test_state_dicts_of_others():
    theirs = randomised(FrozenBatchNorm2d(6))
    ours = gk.FrozenBatchNormAct2d(6, act="identity")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    FrozenBatchNorm2d(6).load_state_dict(ours.state_dict())
    # num_batches_tracked, as in old files and in those of nn.BatchNorm2d, also inside of a model.
    model = nn.Sequential(nn.Conv2d(6, 6, 1), randomised(nn.BatchNorm2d(6))).eval()
    frozen = nn.Sequential(nn.Conv2d(6, 6, 1), gk.FrozenBatchNormAct2d(6, act="identity"))
    state = model.state_dict()
    frozen.load_state_dict(state)
    assert "1.num_batches_tracked" in state
    torch.testing.assert_close(frozen(x), model(x))


@each_act
def test_freeze_and_unfreeze_give_back_what_was_there(act):
    bn = randomised(gk.BatchNormAct2d(4, eps=1e-3, momentum=None, act=act, act_param=ACTS[act]))
    bn(torch.randn(3, 4, 5, 5))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn).eval()
    state, shown, x = copy.deepcopy(model.state_dict()), repr(model), torch.randn(2, 3, 9, 9)
    expected = model(x)
    called = []
    bn.register_forward_hook(lambda *_: called.append(True))
    assert gk.freeze_batch_norm(model) == ["1.weight", "1.bias"]
    assert model[1] is bn and type(bn) is gk.FrozenBatchNormAct2d and bn.act == act
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert_bitwise_equal("y", model.train()(x), expected)
    assert called
    assert gk.freeze_batch_norm(model) == []
    assert gk.unfreeze_batch_norm(model) == ["1.weight", "1.bias"]
    assert repr(model) == shown and gk.unfreeze_batch_norm(model) == []
    assert set(model.state_dict()) == set(state)
    for name, value in model.state_dict().items():
        assert_bitwise_equal(name, value, state[name])
    assert_bitwise_equal("y", model.eval()(x), expected)
    model.train()(x).sum().backward()
    assert bn.weight.grad is not None and bn.num_batches_tracked == 2


@pytest.mark.parametrize(
    "bn",
    [
        lambda: nn.BatchNorm2d(4),
        lambda: nn.BatchNorm2d(4, affine=False),
        lambda: nn.SyncBatchNorm(4),
        lambda: gk.SyncBatchNormAct(4, act="elu"),
        lambda: gk.BatchNormAct2d(4, act="relu", bias=False),
    ],
)
def test_every_class_gets_its_own_back(bn):
    bn = bn().eval()
    if bn.weight is not None:
        bn.weight.requires_grad_(False)
    x, kind, state = torch.randn(2, 4, 5, 5), type(bn), copy.deepcopy(bn.state_dict())
    attributes, expected = set(vars(bn)), bn(x)
    learnt = [name for name, _ in bn.named_parameters()]
    assert gk.freeze_batch_norm(bn) == learnt
    torch.testing.assert_close(bn(x), expected)
    assert gk.unfreeze_batch_norm(bn) == learnt
    assert type(bn) is kind and set(vars(bn)) == attributes
    assert [name for name, _ in bn.named_parameters()] == learnt
    assert bn.weight is None or not bn.weight.requires_grad
    for name, value in bn.state_dict().items():
        assert_bitwise_equal(name, value, state[name])


def test_an_activation_that_was_set_while_frozen_stays():
    bn = nn.BatchNorm2d(4)
    gk.freeze_batch_norm(bn)
    bn.act = "relu"
    gk.unfreeze_batch_norm(bn)
    assert type(bn) is gk.BatchNormAct2d and bn.act == "relu"


def test_unfreeze_what_was_made_frozen():
    bn = randomised(gk.FrozenBatchNormAct2d(4, act="gelu", dtype=torch.float64))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = bn(x)
    assert gk.unfreeze_batch_norm(bn) == ["weight", "bias"]
    assert_bitwise_equal("y", bn.eval()(x), expected)
    bn.train()(x).sum().backward()
    assert bn.num_batches_tracked == 1 and bn.weight.grad.dtype == torch.float64
    nn.BatchNorm2d(4).load_state_dict(bn.state_dict())


def test_what_stays():
    class Mine(nn.BatchNorm2d):
        pass

    taken = nn.BatchNorm2d(4)
    taken.act = nn.ReLU()
    stay = [Mine(4), nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), taken]
    kinds = [type(each) for each in stay]
    assert gk.freeze_batch_norm(nn.ModuleList(stay)) == [] == gk.unfreeze_batch_norm(nn.ModuleList(stay))
    assert [type(each) for each in stay] == kinds
    for function in (gk.freeze_batch_norm, gk.unfreeze_batch_norm):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not list"):
            function(stay)


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].weight = model[0].weight
    assert gk.freeze_batch_norm(model) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert model[1].weight is model[0].weight and model[1].bias is not model[0].bias
    gk.unfreeze_batch_norm(model)
    assert model[1].weight is model[0].weight and isinstance(model[0].weight, nn.Parameter)


def test_a_pruned_batch_norm_stays():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    assert gk.freeze_batch_norm(model) == ["1.weight", "1.bias"] and type(model[0]) is nn.BatchNorm2d


def test_a_synchronised_batch_norm_of_volumes():
    bn = randomised(nn.SyncBatchNorm(4)).eval()
    x = torch.randn(2, 4, 3, 3, 3)
    expected = bn(x)
    gk.freeze_batch_norm(bn)
    torch.testing.assert_close(bn(x), expected)


def test_an_optimizer_built_before_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    x = torch.randn(2, 3, 6, 6)
    model(x).square().sum().backward()
    gk.freeze_batch_norm(model)
    before = copy.deepcopy(model[1].state_dict())
    optimizer.step()
    for name, value in model[1].state_dict().items():
        assert_bitwise_equal(name, value, before[name])


def test_copies_and_transforms():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), gk.BatchNormAct2d(4, act="swish"))
    gk.freeze_batch_norm(model)
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_bitwise_equal("y", copied(x), expected)
        assert gk.unfreeze_batch_norm(copied) == ["1.weight", "1.bias"] and type(copied[1]) is gk.BatchNormAct2d
    assert_bitwise_equal("y", torch.fx.symbolic_trace(model)(x), expected)
    assert_bitwise_equal("y", torch.func.functional_call(model, dict(model.named_parameters()), (x,)), expected)
    torch.testing.assert_close(torch.vmap(model[1])(torch.stack([x[:, [0, 1, 2, 0]]] * 2))[0], model[1](x[:, [0, 1, 2, 0]]))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("act,act_param,error", [("none", None, ValueError), ("relu", 0.1, ValueError), (nn.PReLU(), None, TypeError)])
def test_wrong_activations(act, act_param, error):
    with pytest.raises(error, match="act"):
        gk.FrozenBatchNormAct2d(4, act=act, act_param=act_param)


def test_wrong_inputs():
    bn = gk.FrozenBatchNormAct2d(4)
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        bn(torch.randn(2, 4, 5))
    with pytest.raises(RuntimeError, match="4"):
        bn(torch.randn(2, 3, 5, 5))
    with pytest.raises(RuntimeError, match="residual"):
        bn(torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 1))


def test_default_act_is_leaky_relu():
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(gk.FrozenBatchNormAct2d(4, eps=0.0)(x), F.leaky_relu(x))
    assert acts.ACTS["leaky_relu"].default == 0.01
