"""The self-test: it passes here, and says what is wrong and returns 1 where an operator is made to compute something else.

Most tests run a few of its checks; the whole of it is slow.
"""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import gradkernels as gk
from gradkernels import _native, selftest
from gradkernels.__main__ import main


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Three operators in two dtypes."""
    chosen = ("elu", "batch_norm_act swish", "clip_grad_norm_")
    monkeypatch.setattr(selftest, "OPERATORS", {name: selftest.OPERATORS[name] for name in chosen})
    monkeypatch.setattr(selftest, "DTYPES", (torch.float32, torch.float64))


def test_passes(capsys):
    assert main(["selftest"]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 checks passed" in printed and "FAILED" not in printed
    for operator in selftest.OPERATORS:
        assert operator in printed


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.elu(x)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y


def refused(x):
    raise RuntimeError("no such luck")


@pytest.mark.parametrize(
    "elu,words",
    [
        (lambda x: F.elu(x) * (1 + 1e-3), "its error is"),
        (lambda x: F.elu(x) * float("nan"), "its error is nan"),
        (WithoutGradient.apply, "its gradient differs from finite differences"),
        (lambda x: F.elu(x) * (1 + torch.finfo(x.dtype).eps * torch.get_num_threads()), "its bits depend on the number of threads"),
        (refused, "RuntimeError: no such luck"),
    ],
    ids=["error", "nan", "gradient", "threads", "exception"],
)
def test_an_operator_that_is_wrong(elu, words, monkeypatch, capsys):
    monkeypatch.setattr(gk, "elu", elu)
    assert main(["selftest"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "FAILED elu, torch.float64, cpu" in printed and words in printed, printed
    assert "FAILED batch_norm_act" not in printed and "FAILED clip" not in printed


def test_threads_are_put_back():
    before = torch.get_num_threads()
    assert main(["selftest"]) == 0
    assert torch.get_num_threads() == before


def test_with_the_portable_library(monkeypatch, capsys):
    monkeypatch.setattr(_native, "PORTABLE", _native.load_portable()[0])
    monkeypatch.setattr(_native, "C", None)
    assert main(["selftest"]) == 0
    assert "portable library" in capsys.readouterr().out


def test_without_a_library(monkeypatch, capsys):
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "reason", "it was sold")
    assert main(["selftest"]) == 1
    printed = capsys.readouterr().out
    assert "it was sold" in printed and _native.remedy in printed


@pytest.mark.slow
def test_all_of_it():
    result = subprocess.run([sys.executable, "-m", "gradkernels", "selftest"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "104 of 104 checks passed" in result.stdout or torch.cuda.is_available()
