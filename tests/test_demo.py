"""The demonstration ends well where gradkernels is right, and with a sentence where it is not.

The quick demo runs once, as a user starts it; that it can fail is shown in this process, where it can be tampered with.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from matplotlib.image import imread

import gradkernels as gk
from gradkernels import _native, demo


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The finished process and the picture it wrote."""
    picture = tmp_path_factory.mktemp("demo") / "demo.png"
    command = [sys.executable, "-m", "gradkernels", "demo", "--quick", "--output", str(picture)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COLUMNS", "FORCE_COLOR"))}
    return subprocess.run(command, capture_output=True, text=True, env=environment), picture


def test_ends_well_and_quietly(quick):
    process, _ = quick
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    assert "\x1b" not in process.stdout, "control sequences where the output is no terminal"


def row(output: str, name: str) -> list[str]:
    """The cells of the table row that starts with name."""
    (line,) = [line for line in output.splitlines() if re.match(rf"│ {re.escape(name)} +│", line)]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_tables_tell_the_three_findings(quick):
    output = quick[0].stdout
    torch_lost, lost, torch_kept, kept = map(float, row(output, "first / last layer"))
    assert max(torch_lost, lost) < 1e-6 < 0.1 < min(torch_kept, kept)
    assert row(output, "nan from step") == ["1", "1", "never", "never"]
    assert row(output, "after clipping")[2:] == ["1", "1"]
    assert len(row(output, "accuracy, epoch 4")) == 2
    assert all(float(cell) > 0 for cell in row(output, "ms per step, 1 thread"))


@pytest.mark.parametrize("network", [demo.SIGMOID, demo.CURED, demo.UNCLIPPED, demo.CLIPPED, demo.NOTES], ids=lambda network: network.name)
def test_agreement_is_told_with_its_limit(quick, network):
    apart, allowed, torch_error, our_error = map(float, row(quick[0].stdout, network.name))
    assert allowed == network.ulp_limit
    assert apart <= allowed
    assert our_error <= torch_error + apart + 1e-2 * torch_error, "farther from float64 than the triangle allows"


def test_writes_a_picture_with_three_panels_of_ink(quick):
    image = imread(quick[1])
    height, width = image.shape[:2]
    assert (height, width) == (520, 1500)
    for panel in range(3):
        pixels = image[:, panel * width // 3 : (panel + 1) * width // 3, :3]
        assert (pixels.min(axis=2) < 0.5).mean() > 0.005, f"panel {panel} is all but empty"


def test_without_the_native_library_says_what_mends_it(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "reason", "the library has not been built")
    with pytest.raises(SystemExit, match=r"not been built.*" + re.escape(_native.remedy)) as exit:
        demo.main(["--quick", "--output", str(tmp_path / "demo.png")])
    assert exit.value.code not in (None, 0)
    assert not any(tmp_path.iterdir())


def test_a_missing_folder_is_told_before_any_training(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--output", str(tmp_path / "missing" / "demo.png")])
    assert "there is no folder" in capsys.readouterr().err


@pytest.fixture
def first_batch():
    return next(demo.digits(seed=0).batches(seed=0, epochs=1))


def test_an_operator_that_did_not_run_is_named(first_batch, monkeypatch):
    monkeypatch.setattr(gk, "LeakyReLU", torch.nn.LeakyReLU)
    with pytest.raises(SystemExit, match=r"'clipped' ran without the native operators leaky_relu, leaky_relu_backward$"):
        demo.require_native(demo.CLIPPED, *first_batch)


def test_a_perturbed_gradient_is_named(first_batch, monkeypatch):
    forward = gk.BatchNormAct1d.forward

    def perturbed(self, x, residual=None):
        y = forward(self, x, residual)
        y.register_hook(lambda grad_y: grad_y * (1 + 1e-4))
        return y

    state = demo.NOTES.initial_state(seed=0)
    demo.require_agreement(demo.NOTES, state, *first_batch, step=0)
    monkeypatch.setattr(gk.BatchNormAct1d, "forward", perturbed)
    with pytest.raises(SystemExit, match=r"at step 0 of '64-300-100-10'.* the gradient of \S+ of gradkernels is \S+ ulp from torch\.nn's"):
        demo.require_agreement(demo.NOTES, state, *first_batch, step=0)


def test_perturbed_running_statistics_are_named(first_batch, monkeypatch):
    forward = gk.BatchNormAct1d.forward

    def perturbed(self, x, residual=None):
        y = forward(self, x, residual)
        self.running_var.mul_(1 + 1e-4)
        return y

    monkeypatch.setattr(gk.BatchNormAct1d, "forward", perturbed)
    with pytest.raises(SystemExit, match="running_var of gradkernels is"):
        demo.require_agreement(demo.NOTES, demo.NOTES.initial_state(seed=0), *first_batch, step=0)


def test_ulp():
    eps = torch.finfo(torch.float32).eps
    exact = torch.tensor([4.0, 1e-9], dtype=torch.float64)
    assert demo.ulp(torch.tensor([4.0, 0.0]), torch.tensor([4.0, 4 * 3 * eps]), exact) == pytest.approx(3)
    nan, inf = float("nan"), float("inf")
    assert demo.ulp(torch.tensor([nan, inf]), torch.tensor([nan, inf]), exact) == 0
    assert demo.ulp(torch.tensor([nan, 1.0]), torch.tensor([0.0, 1.0]), exact) == inf
    assert demo.ulp(torch.tensor([1.0]), torch.tensor([2.0]), torch.zeros(1)) == inf
