"""The record of activations agrees with the kernels, and everything that lists activations reads it."""

import ast
import re

import pytest
import torch
from torch import nn

import gradkernels as gk
from batch_norm_act_calls import ACTS, arguments
from gradkernels import acts
from memory import saved_by
from test_layout import CSRC, ROOT

each_act = pytest.mark.parametrize("act", acts.ACTS.values(), ids=lambda act: act.name)
# Files that may name an activation. diagnose has a rule of its own for relu6, because relu6 saturates.
KNOW_RELU6 = {"gradkernels/acts.py", "gradkernels/diagnosis/probe.py", "csrc/math/activation.h", "csrc/ops/batch_norm_act.cpp"}


def test_the_kernels_have_the_same_activations():
    operands = (torch.randn(4, 3), None, None, None, None, None, None, True, 0.1, 1e-5)
    with pytest.raises(ValueError, match="act must be one of") as error:
        torch.ops.gradkernels.batch_norm_act(*operands, "none of them", 0.0)
    names = re.search(r"one of (.*), got", str(error.value)).group(1)
    assert names.split(", ") == [*acts.ACTS]


@each_act
def test_backward_keeps_what_the_record_says(act):
    """For "value" the residual, for "mask" one bit for each element."""
    given = arguments((4, 8, 6, 6), residual=True)
    x, residual = (given[name].requires_grad_() for name in ("x", "residual"))
    _, kept = saved_by(lambda: gk.batch_norm_act(x, None, None, training=True, act=act.name, act_param=ACTS[act.name], residual=residual))
    memory = {each.untyped_storage().data_ptr() for each in kept}
    assert (residual.untyped_storage().data_ptr() in memory) == (act.saves == "value")
    assert any(each.dtype == torch.uint8 and each.numel() == x.numel() // 8 for each in kept) == (act.saves == "mask")


@each_act
def test_module_and_spellings_compute_the_function(act):
    x = torch.randn(50, dtype=torch.float64) * 4
    param = acts.check_act(act.name, None)
    expected = act.function(x, param)
    torch.testing.assert_close(act.module(param)(x), expected)
    option = {} if act.option is None else dict([act.option])
    for kind in act.modules:
        torch.testing.assert_close(act.module(param, kind)(x.clone()), expected)
    for spelling in act.spellings:
        function = spelling if callable(spelling) else getattr(torch.Tensor, spelling)
        torch.testing.assert_close(function(x.clone(), **option), expected)
        assert acts.act_of_spelling(spelling, option) is act
    assert acts.act_of_module(act.module(param)) is act


@each_act
def test_readers_of_the_record_know_the_activation(act):
    """init, convert and fold, on a model with this activation after a batch norm."""
    module = act.module(act.default, next(iter(act.modules)))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), module, nn.Conv2d(4, 2, 3))
    x = torch.randn(8, 3, 9, 9)
    if act.name != "identity":
        assert act.name in str(gk.init.apply_(model).table())
    folded = gk.fold(model)
    report = gk.convert(model)
    assert f"batch_norm_act({act.name})" in str(report) or act.name == "identity"
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gk.fold(model)(x), folded(x), rtol=1e-4, atol=1e-4)


def strings_of(path):
    """Every string of a file except docstrings, and every name after a dot."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif isinstance(node, ast.Attribute):
            yield node.attr


def test_an_activation_is_known_in_few_files():
    """relu6 stands for all activations.

    gradkernels has no function or module of that name, so a file that names relu6 would also have to name the
    next activation.
    """
    found = {
        *(path for path in (ROOT / "gradkernels").rglob("*.py") if any(re.search("relu6", text, re.I) for text in strings_of(path))),
        *(path for path in CSRC.rglob("*.*") if re.search("relu6", re.sub("//.*", "", path.read_text()), re.I)),
    }
    assert {str(path.relative_to(ROOT)) for path in found} <= KNOW_RELU6
