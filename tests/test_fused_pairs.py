"""What tests/fused_pairs.py counts, on networks whose pairs are counted by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradkernels as gk
from fused_pairs import UNNAMED, Fused, Pairs, tensors_in


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.act, self.drop = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU6(inplace=True), nn.Dropout(0.0)
        self.group, self.instance = nn.GroupNorm(1, 3), nn.InstanceNorm2d(3)
        self.compute = forward

    def forward(self, x):
        return self.compute(self, x)


def read_twice(net, x):
    y = net.a(x)
    return F.relu(y) + y


def in_place(net, x):
    y = net.a(x)
    y += x
    return y.relu_()


def returned(net, x):
    y = net.a(x)
    return F.relu(y), y


# A forward, and for each pair the activation and the batch norms that reach it.
COUNTED = {
    "function": (lambda net, x: F.silu(net.a(x)), [("swish", {"a"})]),
    "module": (lambda net, x: net.act(net.b(net.act(net.a(x)))), [("relu6", {"a"}), ("relu6", {"b"})]),
    "in place": (in_place, [("relu", {"a"})]),
    "sum of two batch norms": (lambda net, x: F.relu(net.a(x) + net.b(x)), [("relu", {"a", "b"})]),
    "function sum": (lambda net, x: F.relu(sum([net.a(x), net.b(x), x])), [("relu", {"a", "b"})]),
    "sum with a number": (lambda net, x: F.relu(net.a(x) + 1), []),
    "dropout that is off": (lambda net, x: F.relu(net.drop(net.a(x))), [("relu", {"a"})]),
    "sum of other shapes": (lambda net, x: F.relu(net.a(x) + x[:1]), []),
    "sum with a factor": (lambda net, x: F.relu(torch.add(net.a(x), x, alpha=2)), []),
    "product": (lambda net, x: F.relu(net.a(x) * x), []),
    "read twice": (read_twice, []),
    "returned": (returned, []),
    "group norm": (lambda net, x: F.silu(net.group(x) + x), [("swish", {"group"})]),
    "instance norm": (lambda net, x: F.silu(net.instance(x)), [("swish", {"instance"})]),
    "no kernel": (lambda net, x: F.softplus(net.a(x)), []),
}


@pytest.mark.parametrize("name", COUNTED)
def test_pairs(name):
    forward, expected = COUNTED[name]
    net = Net(forward)
    pairs = Pairs(net)
    with pairs:
        y = net(torch.randn(4, 3, 5, 5))
    assert pairs.found(tensors_in(y)) == expected


def test_a_pair_is_fused_if_the_kernel_computes_it():
    net, x = nn.Sequential(nn.BatchNorm2d(3), nn.ELU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), torch.randn(4, 3, 5, 5)

    def fused():
        with Fused(net) as run:
            net(x)
        return +run.calls

    assert not fused()
    gk.convert(net)
    assert fused() == {("elu", "0"): 1}
    # The hook has to get the output of ELU, so that the forward of Sequential runs.
    net[1].register_forward_hook(lambda *_: None)
    assert not fused()


def test_a_norm_without_parameters_has_no_name():
    net = nn.Sequential(nn.InstanceNorm2d(3), nn.ELU(), nn.GroupNorm(1, 3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    gk.convert(net)
    with Fused(net) as run:
        net(torch.randn(4, 3, 8, 8))
    assert run.calls == {("elu", UNNAMED): 1, ("relu", "2"): 1}
