"""The demonstration ends well where gradkernels is right, and with a sentence where it is not.

Each experiment runs once, the one beside torch.nn as a user starts it; that they can fail is shown in this process, where they can be
tampered with.
"""

import gzip
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.table import Table
from torch import nn

import gradkernels as gk
from examples import __main__ as demo
from examples import chain_rule, clipping, cures, dying_relu, harness, mnist, parity, simple_net
from gradkernels import _native

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The finished process and the picture it wrote."""
    picture = tmp_path_factory.mktemp("demo") / "demo.png"
    command = [sys.executable, "-m", "examples", "parity", "--quick", "--output", str(picture)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COLUMNS", "FORCE_COLOR"))}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment), picture


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


@pytest.mark.parametrize(
    "network", [parity.SIGMOID, parity.CURED, parity.UNCLIPPED, parity.CLIPPED, parity.NOTES], ids=lambda network: network.name
)
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
    return next(harness.digits(seed=0).batches(seed=0, epochs=1))


def test_an_operator_that_did_not_run_is_named(first_batch, monkeypatch):
    monkeypatch.setattr(gk, "LeakyReLU", torch.nn.LeakyReLU)
    with pytest.raises(SystemExit, match=r"'clipped' ran without the native operators leaky_relu, leaky_relu_backward$"):
        parity.require_native(parity.CLIPPED, *first_batch)


def test_a_perturbed_gradient_is_named(first_batch, monkeypatch):
    forward = gk.BatchNormAct1d.forward

    def perturbed(self, x, residual=None):
        y = forward(self, x, residual)
        y.register_hook(lambda grad_y: grad_y * (1 + 1e-4))
        return y

    state = parity.NOTES.initial_state(seed=0)
    parity.require_agreement(parity.NOTES, state, *first_batch, step=0)
    monkeypatch.setattr(gk.BatchNormAct1d, "forward", perturbed)
    with pytest.raises(SystemExit, match=r"at step 0 of '64-300-100-10'.* the gradient of \S+ of gradkernels is \S+ ulp from torch\.nn's"):
        parity.require_agreement(parity.NOTES, state, *first_batch, step=0)


def test_perturbed_running_statistics_are_named(first_batch, monkeypatch):
    forward = gk.BatchNormAct1d.forward

    def perturbed(self, x, residual=None):
        y = forward(self, x, residual)
        self.running_var.mul_(1 + 1e-4)
        return y

    monkeypatch.setattr(gk.BatchNormAct1d, "forward", perturbed)
    with pytest.raises(SystemExit, match="running_var of gradkernels is"):
        parity.require_agreement(parity.NOTES, parity.NOTES.initial_state(seed=0), *first_batch, step=0)


def test_ulp():
    eps = torch.finfo(torch.float32).eps
    exact = torch.tensor([4.0, 1e-9], dtype=torch.float64)
    assert parity.ulp(torch.tensor([4.0, 0.0]), torch.tensor([4.0, 4 * 3 * eps]), exact) == pytest.approx(3)
    nan, inf = float("nan"), float("inf")
    assert parity.ulp(torch.tensor([nan, inf]), torch.tensor([nan, inf]), exact) == 0
    assert parity.ulp(torch.tensor([nan, 1.0]), torch.tensor([0.0, 1.0]), exact) == inf
    assert parity.ulp(torch.tensor([1.0]), torch.tensor([2.0]), torch.zeros(1)) == inf


# The experiments on gradkernels alone


class Counter:
    """Stands for the progress bar."""

    def __init__(self):
        self.total = self.done = 0

    def begin(self, description, steps):
        assert description
        self.total += steps
        return self.advance

    def advance(self):
        self.done += 1


@pytest.fixture(scope="module")
def digits():
    return harness.digits(seed=0)


@pytest.fixture
def setting(digits):
    with demo.one_thread():
        yield harness.Setting(digits, seed=0, quick=True, begin=Counter().begin)


ALONE = [experiment for experiment in demo.EXPERIMENTS if experiment is not demo.PARITY]


@pytest.mark.parametrize("experiment", ALONE, ids=lambda experiment: experiment.name)
def test_experiment_comes_out_and_is_drawn(experiment, setting, tmp_path):
    *tables, figure = experiment.run(setting)
    assert tables and all(isinstance(table, Table) for table in tables)
    counter = setting.begin.__self__
    assert counter.done == counter.total > 0
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "figure.png")
    image = imread(tmp_path / "figure.png")
    assert image.shape[:2] == tuple(round(100 * inches) for inches in reversed(figure.get_size_inches()))
    panels = len(figure.axes)
    for panel in range(panels):
        pixels = image[:, panel * image.shape[1] // panels : (panel + 1) * image.shape[1] // panels, :3]
        assert (pixels.min(axis=2) < 0.5).mean() > 0.005, f"panel {panel} is all but empty"
    for axes in figure.axes:
        assert axes.get_title(loc="left")


@pytest.mark.slow
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize("experiment", ALONE, ids=lambda experiment: experiment.name)
def test_experiment_comes_out_with_other_seeds(experiment, seed, quick):
    with demo.one_thread():
        assert [*experiment.run(harness.Setting(harness.digits(seed), seed, quick, Counter().begin))]


def test_names_choose_and_the_pictures_are_named(tmp_path, capsys):
    assert demo.main(["matrices", "sigmoid", "--output", str(tmp_path / "picture.png")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture-matrices.png", "picture-sigmoid.png"]
    output = capsys.readouterr().out
    assert output.index("The gradient of sigmoid") < output.index("The gradients of a product"), "their order is the demonstration's"


def test_an_unknown_name_is_told_with_those_there_are(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["sigmoid", "gravity", "--output", str(tmp_path / "demo.png")])
    error = capsys.readouterr().err
    assert "no experiment gravity" in error and "dying-relu" in error
    assert not any(tmp_path.iterdir())


def test_every_experiment_has_a_name_of_its_own_and_a_line_in_the_help(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--help"])
    told = capsys.readouterr().out
    assert all(re.search(rf"^  {experiment.name} +{re.escape(experiment.about)}$", told, re.M) for experiment in demo.EXPERIMENTS)
    assert len({experiment.name for experiment in demo.EXPERIMENTS}) == len(demo.EXPERIMENTS)


def test_a_saturating_cure_is_named(setting, monkeypatch):
    monkeypatch.setattr(gk, "elu", torch.sigmoid)
    with pytest.raises(SystemExit, match="the gradient of ELU was to be near 1"):
        [*chain_rule.sigmoid(setting)]


def test_a_norm_that_overflows_is_named(setting, monkeypatch):
    monkeypatch.setattr(gk, "clip_grad_norm_", nn.utils.clip_grad_norm_)
    with pytest.raises(SystemExit, match="clipped gradients were to point where they did"):
        [*chain_rule.matrices(setting)]


def test_the_product_is_that_of_float64():
    found = chain_rule.multiply(torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    product = torch.eye(4, dtype=torch.float64)
    for _ in range(chain_rule.MATRICES):
        product = product @ torch.randn(4, 4, generator=generator).double()
    assert found.largest[-1] == pytest.approx(product.abs().max().item(), rel=1e-3)
    assert found.clipped_total == pytest.approx(1, abs=1e-5)


def test_a_wrong_backward_is_seen_in_the_numeric_gradient(setting, monkeypatch):
    forward = gk.Swish.forward

    def perturbed(self, x):
        y = forward(self, x)
        if y.requires_grad:
            y.register_hook(lambda grad_y: grad_y * (1 + 1e-6))
        return y

    monkeypatch.setattr(gk.Swish, "forward", perturbed)
    with pytest.raises(SystemExit, match="were to agree to 8 digits in float64"):
        [*chain_rule.numeric(setting)]


def test_a_cure_that_does_not_cure_is_named():
    sick = cures.Treated(cures.SICK, [1e-4, 1.0], 0.1)
    batch_norm = next(cure for cure in cures.CURES if cure.batch_norm)
    cures.require_expected(cures.Treated(batch_norm, [0.5, 1.0], 0.95), sick)
    with pytest.raises(SystemExit, match=r"'batch norm' was to raise .* 100-fold, and raises it 10-fold"):
        cures.require_expected(cures.Treated(batch_norm, [1e-3, 1.0], 0.95), sick)
    with pytest.raises(SystemExit, match=r"'batch norm' was to have 80% to 100% of the test digits right, and has 70\.0%"):
        cures.require_expected(cures.Treated(batch_norm, [0.5, 1.0], 0.7), sick)
    with pytest.raises(SystemExit, match="'sigmoid, SGD' was to have 0% to 20%"):
        cures.require_expected(cures.Treated(cures.SICK, [1e-4, 1.0], 0.7), sick)


@pytest.mark.parametrize("cure", cures.CURES, ids=lambda cure: cure.name)
def test_a_cure_changes_what_it_says(cure):
    model = cures.build(cure, seed=0)
    kinds = {type(module) for module in model.modules()}
    assert type(cure.act()) in kinds
    assert (gk.BatchNormAct1d in kinds) == cure.batch_norm
    assert (cures.Residual in kinds) == cure.residual
    assert [layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear)] == [*cures.SIZES[:-1]]
    first = next(model.parameters())
    # torch's own: uniform with 1 / sqrt(fan_in) as its bound.
    assert (first.abs().max() <= 1 / 8).item() == (cure.scheme is None)


def test_residual_adds():
    x = torch.randn(3, 5)
    assert torch.equal(cures.Residual(nn.Tanh())(x), x.tanh() + x)


def test_units_that_stay_dead_are_told(setting, monkeypatch):
    monkeypatch.setattr(dying_relu, "EPOCHS", 1)
    monkeypatch.setattr(dying_relu, "ACTIVATIONS", {"ReLU": nn.ReLU, "PReLU": nn.ReLU})
    with pytest.raises(SystemExit, match="PReLU was to revive the dead units, and 100% are dead still"):
        [*dying_relu.run(setting)]


def test_dead_share(digits):
    model = dying_relu.build(nn.ReLU, seed=0)
    nn.init.zeros_(model[2].bias)
    with torch.no_grad():
        model[0].weight[:50].zero_()
        model[0].bias[50:].fill_(100.0)
        model[2].weight.fill_(1.0)
    assert dying_relu.dead_share(model, digits) == 0.25


def test_an_order_without_its_mark_is_told(setting, monkeypatch):
    monkeypatch.setattr(simple_net, "EPOCHS", 2)
    monkeypatch.setattr(simple_net, "ORDERS", {"first": simple_net.norm_then_relu, "second": simple_net.norm_then_relu})
    with pytest.raises(SystemExit, match="was to hand on a mean of 0"):
        [*simple_net.run(setting)]


def test_training_with_clipping_ends_at_nan_and_is_judged():
    model = nn.Linear(3, 1)
    x = torch.randn(4, 3)
    batches = [(x, torch.zeros(4, 1)), (x * math.nan, torch.zeros(4, 1)), (x, torch.zeros(4, 1))]
    lost = clipping.train(model, batches, nn.functional.mse_loss, 1e-3, 3)
    assert (lost.first_nan, len(lost.losses), len(lost.norms)) == (1, 2, 1)
    assert lost.clipped_norms == pytest.approx(lost.norms)
    kept = clipping.Run([1.0, 0.5], [20.0, 20.0], [1.0, 1.0])
    exploded = clipping.Run([1.0, math.nan], [20.0], [20.0])
    clipping.require_cured("it", exploded, kept)
    for without, clipped, words in (
        (kept, kept, "was to end in nan without clipping"),
        (clipping.Run([1.0, math.nan], [2.0], [2.0]), kept, "was to explode, and its norm is 2"),
        (exploded, exploded, "was to stay finite when clipped, and is nan from step 1"),
        (exploded, clipping.Run([1.0], [20.0], [1.1]), r"at most 1, and one has 1\.1"),
    ):
        with pytest.raises(SystemExit, match=words):
            clipping.require_cured("it", without, clipped)


def test_gradient_through_time_is_that_of_the_rest_of_the_network(digits):
    """From the hidden state after each of some steps, torch runs the rest at once."""
    reader = clipping.Reader(seed=0)
    x, target = next(digits.batches(seed=0, epochs=1))
    with demo.one_thread():
        through_time = clipping.gradient_through_time(reader, x, target)
        assert len(through_time) == 100
        sequence = clipping.rows_and_silence(x)
        for step in (1, 8, 50, 99):
            state = reader.rnn(sequence[:step])[1].detach().requires_grad_()
            last = reader.rnn(sequence[step:], state)[1]
            nn.functional.cross_entropy(reader.classify(last[0]), target).backward()
            assert through_time[100 - step] == pytest.approx(state.grad.norm().item(), rel=1e-4)


# What is known about the experiments' networks, told by diagnose


def diagnosis(model, digits):
    with demo.one_thread():
        return gk.diagnose(model, next(digits.batches(seed=0, epochs=1)), nn.functional.cross_entropy)


@pytest.mark.parametrize("name", ["sigmoid, SGD", "ReLU", "Leaky ReLU", "ELU", "Swish", "He", "batch norm", "residual"])
def test_diagnose_tells_the_sigmoid_network_from_the_cured(name, digits):
    cure = next(cure for cure in cures.CURES if cure.name == name)
    told = diagnosis(cures.build(cure, seed=0), digits)
    if cure is cures.SICK:
        assert "vanishing" in told.layers[0].verdicts
        assert "activation" in [each.name for each in told.cures]
    else:
        assert [*told.counts()] == ["healthy"]


@pytest.mark.parametrize("name", dying_relu.ACTIVATIONS)
def test_diagnose_tells_dead_units_from_those_that_can_be_revived(name, digits):
    told = diagnosis(dying_relu.build(dying_relu.ACTIVATIONS[name], seed=0), digits)
    assert ("dead" in told.counts()) == (name == "ReLU")


def test_diagnose_says_that_the_recurrent_network_explodes_and_clips_it(digits):
    told = diagnosis(clipping.Reader(seed=0), digits)
    assert "exploding" in told.counts()
    assert "gk.clip_grad_norm_(model, max_norm=1.0)" in str(told)


# MNIST's files, written small


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5), (4, 28, 28), (2, 1, 3, 2)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_is_read_as_written(shape, suffix, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_idx(tmp_path / f"file{suffix}", array)
    read = mnist.read_idx(tmp_path / f"file{suffix}")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array, strict=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no IDX file"),
        (b"\0\0\x08", "is no IDX file"),
        (b"\x89PNG\r\n", "is no IDX file of bytes: it begins with 89 50 4e 47"),
        (b"\0\0\x0d\x01" + bytes(8), "is no IDX file of bytes"),
        (b"\0\0\x08\x03\0\0\0\x01", "ends within its header"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "is to hold 5 bytes and holds 3"),
        (b"\0\0\x08\x02\0\0\0\x01\0\0\0\x02abc", "is to hold 1x2 bytes and holds 3"),
    ],
)
def test_a_broken_idx_file_is_told(content, words, tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=rf"train-images-idx3-ubyte {words}"):
        mnist.read_idx(path)


@pytest.fixture
def small_mnist(digits, tmp_path):
    """The four files with the digits of scikit-learn, enlarged."""
    data = simple_net.enlarged(digits)
    for part, x, y in (("train", data.x_train, data.y_train), ("t10k", data.x_test, data.y_test)):
        pixels = ((x - x.min()) / (x.max() - x.min()) * 255).round()
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", pixels.numpy().reshape(-1, 28, 28))
        write_idx(tmp_path / f"{part}-labels.idx1-ubyte.gz", y.numpy())
    return tmp_path


def test_mnist_is_read(small_mnist, digits):
    data = mnist.read(small_mnist)
    assert data.batch_size == 200
    assert torch.equal(data.y_train, digits.y_train) and torch.equal(data.y_test, digits.y_test)
    assert data.x_train.shape == (1437, 784) and data.x_train.dtype == torch.float32
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)


def test_mnist_says_what_is_missing_or_does_not_fit(small_mnist):
    labels = small_mnist / "t10k-labels.idx1-ubyte.gz"
    write_idx(labels, np.zeros(3, np.uint8))
    with pytest.raises(SystemExit, match="t10k has 360 images and 3 labels"):
        mnist.read(small_mnist)
    labels.unlink()
    with pytest.raises(SystemExit, match=r"has none of t10k-labels-idx1-ubyte, t10k-labels-idx1-ubyte\.gz, t10k-labels\.idx1-ubyte"):
        mnist.read(small_mnist)
    write_idx(small_mnist / "train-images-idx3-ubyte", np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(SystemExit, match=r"images of train are to have 28 x 28 pixels, and the array is \(2, 8, 8\)"):
        mnist.read(small_mnist)


def test_the_notes_table_stands_beside_what_is_found(small_mnist, tmp_path, capsys, monkeypatch):
    """The digits of scikit-learn are too few for the notes' figures, which is told after the table and the picture."""
    monkeypatch.setattr(mnist, "EPOCHS", 2)
    arguments = ["--mnist", str(small_mnist), "--output", str(tmp_path / "demo.png")]
    with pytest.raises(SystemExit, match=r"'He, ELU, batch norm' was to have 0\.9652 .* and has 0\.\d{4}$"):
        demo.main(arguments)
    output = capsys.readouterr().out
    assert "gradient of sigmoid" not in output, "the folder alone is asked for"
    assert "digits to learn" not in output, "those are scikit-learn's"
    assert "MNIST, 1437 to learn and 360 to test" in " ".join(output.split())
    expected, found, difference = row(output, "He, ELU, batch norm")
    assert expected == "0.9652"
    assert float(found) - float(expected) == pytest.approx(float(difference), abs=2e-4)
    assert row(output, "He, ELU, clipped by value to 1")[0] == "0.8957"
    assert (tmp_path / "demo-mnist.png").is_file()

    monkeypatch.setattr(mnist, "TOLERANCE", 1.0)
    assert demo.main(arguments) == 0


def test_the_notes_networks_are_theirs():
    normed, clipped = (mnist.build(row, seed=0) for row in mnist.ROWS)
    assert [layer.in_features for layer in normed if isinstance(layer, nn.Linear)] == [784, 300, 100]
    assert [module.act for module in normed if isinstance(module, gk.BatchNormAct1d)] == ["elu", "elu", "identity"]
    assert [type(module) for module in clipped] == [nn.Linear, gk.ELU, nn.Linear, gk.ELU, nn.Linear]
    assert mnist.ROWS[0].clip_ is None
    for parameter in clipped.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    mnist.ROWS[1].clip_(clipped)
    assert all((parameter.grad == -1).all() for parameter in clipped.parameters())
