"""The experiments of examples/ have the expected results, and report it if a part of gradkernels is replaced.

One experiment runs as a user starts it, in a process of its own. The others run in this process, where parts
can be replaced.
"""

import gzip
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.table import Table
from torch import nn

import gradkernels as gk
from examples import __main__ as demo
from examples import chain_rule, clipping, cures, dying_relu, experiment, parity, simple_net, spikes
from gradkernels import _native

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = [*demo.EXPERIMENTS]


@pytest.fixture(autouse=True)
def one_thread():
    """As the demonstration runs; its main() sets this for the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return experiment.load(seed=0)


@pytest.fixture
def progress():
    return []


@pytest.fixture
def setting(digits, progress):
    return experiment.Setting(digits, 0, True, lambda **counts: progress.append((counts["completed"], counts["total"])))


def assert_drawn(path, panels):
    image = imread(path)
    for panel in range(panels):
        pixels = image[:, panel * image.shape[1] // panels : (panel + 1) * image.shape[1] // panels, :3]
        assert (pixels.min(axis=2) < 0.5).mean() > 0.005, f"panel {panel} is nearly empty"


def row(output, name):
    """The cells of the table row that starts with `name`."""
    (line,) = [line for line in output.splitlines() if re.match(rf"│ {re.escape(name)} +│", line)]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


# The program


@pytest.mark.slow
def test_parity_as_a_user_starts_it(tmp_path):
    command = [sys.executable, "-m", "examples", "parity", "--quick", "--output", str(tmp_path / "demo.png")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COLUMNS", "FORCE_COLOR"))}
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    assert "\x1b" not in process.stdout, "control sequences although the output is not a terminal"
    assert_drawn(tmp_path / "demo-parity.png", panels=3)
    ratios = {network: float(row(process.stdout, network.name)[0]) for network in parity.NETWORKS}
    assert ratios[parity.SIGMOID] < 1e-6 < 0.1 < ratios[parity.CURED]
    for network in parity.NETWORKS:
        distance, allowed = map(float, row(process.stdout, network.name)[-2:])
        assert distance <= allowed == network.ulp_limit


def test_the_named_experiments_run_in_order_and_write_pictures(tmp_path, capsys):
    assert demo.main(["matrices", "sigmoid", "--output", str(tmp_path / "picture.png")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture-matrices.png", "picture-sigmoid.png"]
    output = capsys.readouterr().out
    assert output.index("The gradient of sigmoid") < output.index("The gradients of a product")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sigmoid", "gravity"], "there is no experiment gravity. The experiments are sigmoid, .*dying-relu"),
        (["--output", "missing/demo.png"], "there is no folder missing"),
        (["sigmoid", "--output", "."], r"--output \. is a folder: name a file in it, such as demo\.png"),
        (["--seed", "-1"], "argument --seed: -1 is not between 0 and 4294967295"),
        (["--seed", "4294967296"], "argument --seed: 4294967296 is not between 0 and 4294967295"),
        (["--seed", "one"], "argument --seed: invalid _seed value: 'one'"),
    ],
)
def test_wrong_arguments_end_before_any_training(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        demo.main(arguments)
    output = capsys.readouterr()
    assert re.search(words, output.err) and output.out == ""
    assert not any(tmp_path.iterdir())


def test_without_the_native_library_the_program_says_what_to_do(monkeypatch):
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "reason", "the library has not been built")
    with pytest.raises(SystemExit, match=r"not been built.*" + re.escape(_native.remedy)):
        demo.main(["--quick"])


def test_the_page_of_the_documentation_describes_every_experiment():
    page = (ROOT / "docs" / "examples.md").read_text()
    headings = "".join(re.findall("^### .*", page, re.M))
    assert sorted(re.findall("`(.+?)`", headings)) == sorted(EXPERIMENTS)
    pictures = {ROOT / "docs" / picture for picture in re.findall(r"!\[.+?\]\((.+?)\)", page)}
    assert pictures == {*(ROOT / "docs" / "examples").iterdir()}
    assert all(picture.stat().st_size < 150_000 for picture in pictures)
    assert all(row(page, name)[0] == f"{reported:.4f}" for name, (reported, _) in simple_net.ROWS.items())


# The experiments


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "parity"])
def test_experiment_has_the_expected_result(name, setting, progress, tmp_path):
    *tables, figure = demo.EXPERIMENTS[name][1](setting)
    assert tables and all(isinstance(table, Table) and table.row_count for table in tables)
    if progress:
        total = len(progress) - 1
        assert progress == [(done, total) for done in range(total + 1)]
    assert all(axes.get_title(loc="left") for axes in figure.axes)
    figure.savefig(tmp_path / "figure.png")
    assert_drawn(tmp_path / "figure.png", len(figure.axes))


@pytest.mark.slow
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_has_the_expected_result_with_other_seeds(name, seed, quick):
    setting = experiment.Setting(experiment.load(seed), seed, quick, lambda **counts: None)
    assert [*demo.EXPERIMENTS[name][1](setting)]


def perturb_gradient(module, inputs, output):
    if output.requires_grad:
        output.register_hook(lambda grad: grad * (1 + 1e-4))


class PerturbedSwish(gk.Swish):
    def __init__(self):
        super().__init__()
        self.register_forward_hook(perturb_gradient)


@pytest.mark.parametrize(
    ("name", "module", "attribute", "replacement", "words"),
    [
        ("sigmoid", gk, "elu", torch.sigmoid, "the gradient of ELU to be near 1"),
        ("matrices", gk, "clip_grad_norm_", nn.utils.clip_grad_norm_, "norm to be that of float64, .*; it is inf"),
        ("numeric", gk, "Swish", PerturbedSwish, "to agree to 8 digits in float64"),
        ("dying-relu", dying_relu, "ACTIVATIONS", {"ReLU": nn.ReLU, "PReLU": nn.ReLU}, "PReLU to revive the dead units; 100% are"),
        ("simple-net", simple_net, "ORDERS", dict.fromkeys("ab", simple_net.norm_then_relu), "a mean of 0 after batch norm"),
    ],
)
def test_an_unexpected_result_is_reported(name, module, attribute, replacement, words, setting, monkeypatch):
    monkeypatch.setattr(dying_relu, "EPOCHS", 1)
    monkeypatch.setattr(simple_net, "EPOCHS", 2)
    monkeypatch.setattr(module, attribute, replacement)
    run = demo.EXPERIMENTS[name][1](setting)
    assert isinstance(next(run), Table)
    with pytest.raises(SystemExit, match=f"the demonstration failed: expected .*{words}"):
        list(run)


def test_the_product_is_that_of_float64():
    largest, _, clipped = chain_rule.multiply(torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    product = torch.eye(4, dtype=torch.float64)
    for _ in range(chain_rule.MATRICES):
        product = product @ torch.randn(4, 4, generator=generator).double()
    assert largest[-1] == pytest.approx(product.abs().max().item(), rel=1e-3)
    assert clipped["gradkernels"][1].norm().item() == pytest.approx(1, abs=1e-5)


def test_a_cure_without_effect_is_reported():
    sigmoid = cures.Outcome(cures.SIGMOID, 1e-4, 0.1)
    batch_norm = next(cure for cure in cures.CURES if cure.batch_norm)
    cures.check_outcome(cures.Outcome(batch_norm, 0.5, 0.95), sigmoid)
    for outcome, words in (
        (cures.Outcome(batch_norm, 1e-3, 0.95), "expected 'batch norm' to raise .* 100-fold; it rose 10-fold"),
        (cures.Outcome(batch_norm, 0.5, 0.7), r"expected an accuracy of 80% to 100% with 'batch norm'; it is 70\.0%"),
        (cures.Outcome(cures.SIGMOID, 1e-4, 0.7), "expected an accuracy of 0% to 20% with 'sigmoid, SGD'"),
    ):
        with pytest.raises(SystemExit, match=words):
            cures.check_outcome(outcome, sigmoid)


@pytest.mark.parametrize("cure", cures.CURES, ids=lambda cure: cure.name)
def test_a_cure_changes_what_its_fields_say(cure):
    model = cures.build(cure, seed=0)
    kinds = {type(module) for module in model.modules()}
    assert type(cure.act()) in kinds
    assert (gk.BatchNormAct1d in kinds) == cure.batch_norm
    assert (cures.Residual in kinds) == cure.residual
    assert [layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear)] == [*cures.SIZES[:-1]]
    # torch's own initialisation is uniform with the bound 1 / sqrt(fan_in).
    assert (next(model.parameters()).abs().max() <= 1 / 8).item() == (cure.scheme is None)


def test_dead_share_counts_the_units_of_both_layers(digits):
    model = dying_relu.build(nn.ReLU, seed=0)
    nn.init.zeros_(model[2].bias)
    with torch.no_grad():
        model[0].weight[:50].zero_()
        model[0].bias[50:].fill_(100.0)
        model[2].weight.fill_(1.0)
    assert dying_relu.dead_share(model, digits) == 0.25


def test_training_ends_at_nan():
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    batches = [(x, torch.zeros(4, 1)), (x * math.nan, torch.zeros(4, 1)), (x, torch.zeros(4, 1))]
    run = clipping.descend(model, [batches, batches], nn.functional.mse_loss, 1e-3, 6, math.inf)
    assert (run.first_nan, len(run.losses), len(run.norms)) == (1, 2, 1)
    assert run.clipped_norms == pytest.approx(run.norms)


def test_clipping_without_effect_is_reported():
    learned = experiment.Run([1.0, 0.5], [20.0, 20.0], [1.0, 1.0])
    lost = experiment.Run([1.0, math.nan], [20.0], [20.0])
    clipping.check_clipping("it", lost, learned)
    for unclipped, clipped, words in (
        (learned, learned, "expected it to end in nan without clipping"),
        (experiment.Run([1.0, math.nan], [2.0], [2.0]), learned, "to explode; its norm is 2"),
        (lost, lost, "expected it to stay finite with clipping; it is nan from step 1"),
        (lost, experiment.Run([1.0], [20.0], [1.1]), r"of at most 1; one has 1\.1"),
    ):
        with pytest.raises(SystemExit, match=words):
            clipping.check_clipping("it", unclipped, clipped)


def test_gradient_through_time_is_that_of_the_rest_of_the_network(digits):
    """torch runs the rest of the network at once, from the hidden state after each of a few steps."""
    reader, (x, target) = clipping.Reader(seed=0), digits.first_batch(0)
    through_time = clipping.gradient_through_time(reader, x, target)
    assert len(through_time) == 100
    sequence = clipping.as_sequence(x)
    for step in (1, 8, 50, 99):
        state = reader.rnn(sequence[:step])[1].detach().requires_grad_()
        last = reader.rnn(sequence[step:], state)[1]
        nn.functional.cross_entropy(reader.classify(last[0]), target).backward()
        assert through_time[100 - step] == pytest.approx(state.grad.norm().item(), rel=1e-4)


# Spikes


def test_only_the_planted_batches_are_spoilt(digits):
    healthy = [batch for epoch in digits.epochs(0, range(10)) for batch in epoch]
    for step, (found, expected) in enumerate(zip(spikes.batches(digits, 0), healthy, strict=False), start=1):
        x, target = expected
        is_spoilt, has_nan = step in spikes.SPOILT, step == spikes.WITH_NAN
        assert torch.equal(found[0].nan_to_num(x[0, 0].item()), 255 * x if is_spoilt else x)
        assert found[0].isnan().sum() == has_nan
        assert torch.equal(found[1].sort().values, target.sort().values)
        assert torch.equal(found[1], target) != is_spoilt
    assert step == spikes.STEPS


@pytest.mark.parametrize("network", spikes.NETWORKS)
def test_a_spoilt_batch_makes_the_gradient_about_a_thousand_times_larger(network, digits):
    model, (first, *_) = spikes.NETWORKS[network](0), spikes.SPOILT
    optimizer = torch.optim.Adam(model.parameters(), lr=spikes.LR)
    handle, norms = gk.attach_clipping(optimizer, 1.0), []
    for x, target in itertools.islice(spikes.batches(digits, 0), first):
        experiment.forward_backward(model, x, target)
        optimizer.step()
        norms.append(handle.last_norm.item())
    assert 300 < norms[-1] / statistics.median(norms[-11:-1]) < 3000


def test_an_unexpected_course_is_reported():
    nan = math.nan
    courses = {way: spikes.Course([1.0, nan], before_nan=0.9) for way in spikes.WAYS}
    courses[spikes.NOT_CLIPPED] = spikes.Course([1.0, nan], before_nan=0.1)
    courses[spikes.SKIP] = spikes.Course([1.0, 1.0], before_nan=0.9, skipped=4)
    spikes.check_courses("small", courses)
    agc = next(way for way in spikes.WAYS if way.name == "AGC")
    for way, course, words in (
        (agc, spikes.Course([1.0, 1.0], before_nan=0.9), "only 'ZClip and skip' to survive a nan; the small network, AGC, survives"),
        (spikes.SKIP, spikes.Course([1.0, nan], before_nan=0.9, skipped=4), "the small network, ZClip and skip, is lost"),
        (agc, spikes.Course([1.0, nan], before_nan=0.12), r"AGC, to learn more than 10\.0%, .* its accuracy is 12\.0%"),
        (spikes.SKIP, spikes.Course([1.0, 1.0], before_nan=0.9, skipped=3), "4 skipped steps of the small network; there are 3"),
    ):
        with pytest.raises(SystemExit, match=words):
            spikes.check_courses("small", {**courses, way: course})


# Parity


@pytest.mark.parametrize(
    ("network", "operators"),
    [
        (parity.CURED, {"batch_norm_act", "batch_norm_act_backward"}),
        (parity.CLIPPED, {"leaky_relu", "leaky_relu_backward", "grad_norms", "clip_grads_with_norm_"}),
    ],
    ids=["batch norm", "leaky relu"],
)
def test_the_converted_network_runs_native_operators(network, operators, digits):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        parity.one_step(parity.OURS, network, network.initial_state(0), *digits.first_batch(0))
    assert {f"gradkernels::{name}" for name in operators} <= {event.key for event in profile.key_averages()}


def perturb_variance(module, inputs, output):
    module.running_var.mul_(1 + 1e-4)


@pytest.mark.parametrize(
    ("layer", "hook", "tensor"), [(0, perturb_gradient, r"the gradient of 0\.weight"), (1, perturb_variance, r"1\.running_var")]
)
def test_a_step_that_differs_is_reported(layer, hook, tensor, digits, monkeypatch):
    build, network, state = parity.Network.build, parity.NOTES, parity.NOTES.initial_state(0)
    assert parity.largest_distance(network, state, *digits.first_batch(0))[0] <= network.ulp_limit

    def build_perturbed(self, library):
        model = build(self, library)
        if library == parity.OURS:
            model[layer].register_forward_hook(hook)
        return model

    monkeypatch.setattr(parity.Network, "build", build_perturbed)
    distance, name = parity.largest_distance(network, state, *digits.first_batch(0))
    assert re.fullmatch(tensor, name)
    with pytest.raises(SystemExit, match=rf"{tensor} of gradkernels is \S+ ulp from torch\.nn's; the limit is 64"):
        parity.check_network(network, {}, distance, name)


@pytest.mark.parametrize(
    ("network", "ratio", "losses", "accuracies", "words"),
    [
        (parity.SIGMOID, 1e-3, [2.0], (0.1, 0.1), "expected the gradient of 'sigmoid' with torch.nn to vanish"),
        (parity.CURED, 1e-3, [2.0], (0.9, 0.9), "expected 'cured' with torch.nn to keep its gradient"),
        (parity.EXPLODING, 1.0, [2.0], (0.1, 0.1), "only 'not clipped' to end in nan; 'not clipped' with torch.nn does not"),
        (parity.CLIPPED, 1.0, [math.nan], (0.9, 0.9), "only 'not clipped' to end in nan; 'clipped' with torch.nn does"),
        (parity.NOTES, 1.0, [2.0], (0.95, 0.8), r"expected '64-300-100-10' with gradkernels to learn; its accuracy is 80\.0%"),
        (parity.NOTES, 1.0, [2.0], (0.99, 0.91), r"is 99\.0% with torch\.nn and 91\.0% with gradkernels; rounding explains 3%"),
    ],
)
def test_an_unexpected_training_is_reported(network, ratio, losses, accuracies, words):
    run = experiment.Run(losses)
    trainings = [parity.Training([ratio, 1.0], [], run, accuracy) for accuracy in accuracies]
    with pytest.raises(SystemExit, match=words):
        parity.check_network(network, dict(zip((parity.TORCH, parity.OURS), trainings, strict=True)), 0.0, "")


def test_ulp():
    eps, nan = torch.finfo(torch.float32).eps, math.nan
    assert parity.ulp(torch.tensor([4.0, 4 * 3 * eps]), torch.tensor([4.0, 0.0])) == pytest.approx(3)
    assert parity.ulp(torch.zeros(2), torch.zeros(2)) == 0
    assert parity.ulp(torch.tensor([nan, 1.0]), torch.tensor([0.0, 1.0])) == math.inf
    assert parity.ulp(torch.tensor([1.0]), torch.tensor([0.0])) == math.inf


# What diagnose says about the networks


NETWORKS = {cure.name: partial(cures.build, cure, 0) for cure in cures.CURES[:10]}
NETWORKS |= {f"dead {name}": partial(dying_relu.build, act, 0) for name, act in dying_relu.ACTIVATIONS.items()}
NETWORKS["recurrent"] = partial(clipping.Reader, 0)
FINDINGS = {"sigmoid, SGD": ("vanishing", "activation"), "dead ReLU": ("dead", "activation"), "recurrent": ("exploding", "clipping")}


@pytest.mark.parametrize("name", NETWORKS)
def test_diagnose_finds_what_the_experiment_shows(name, digits):
    result = gk.diagnose(NETWORKS[name](), digits.first_batch(0), nn.functional.cross_entropy)
    verdict, cure = FINDINGS.get(name, ("healthy", None))
    assert verdict in result.counts()
    # With dead biases, Leaky ReLU passes on so little of the gradient that it vanishes, too.
    assert result.counts().keys() <= {verdict, "healthy", *(["vanishing"] if name.startswith("dead") else [])}
    assert cure is None or cure in [suggestion.name for suggestion in result.cures]


# MNIST, with small files


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5), (4, 28, 28), (2, 1, 3, 2)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_file_is_read_as_written(shape, suffix, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_idx(tmp_path / f"file{suffix}", array)
    np.testing.assert_array_equal(simple_net.read_idx(tmp_path / f"file{suffix}"), array, strict=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not an IDX file"),
        (b"\0\0\x08", "is not an IDX file"),
        (b"\x89PNG\r\n", "is not an IDX file of bytes: it begins with 89 50 4e 47"),
        (b"\0\0\x0d\x01" + bytes(8), "is not an IDX file of bytes"),
        (b"\0\0\x08\x03\0\0\0\x01", "ends within its header"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "should contain 5 bytes and contains 3"),
        (b"\0\0\x08\x02\0\0\0\x01\0\0\0\x02abc", "should contain 1x2 bytes and contains 3"),
    ],
)
def test_a_broken_idx_file_is_reported(content, words, tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=rf"train-images-idx3-ubyte {words}"):
        simple_net.read_idx(path)


@pytest.fixture
def small_mnist(digits, tmp_path):
    """scikit-learn's digits, enlarged, as the four files of MNIST in both spellings of their names."""
    data = simple_net.enlarged(digits)
    for part, x, y in (("train", data.x_train, data.y_train), ("t10k", data.x_test, data.y_test)):
        pixels = ((x - x.min()) / (x.max() - x.min()) * 255).round()
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", pixels.numpy().reshape(-1, 28, 28))
        write_idx(tmp_path / f"{part}-labels.idx1-ubyte.gz", y.numpy())
    return tmp_path


def test_mnist_is_read(small_mnist, digits):
    data = simple_net.read_mnist(small_mnist)
    assert torch.equal(data.y_train, digits.y_train) and torch.equal(data.y_test, digits.y_test)
    assert (data.batch_size, data.x_train.shape, data.x_train.dtype) == (200, (1437, 784), torch.float32)
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("t10k-labels.idx1-ubyte.gz", np.zeros(3), "t10k has 360 images and 3 labels"),
        ("t10k-labels.idx1-ubyte.gz", None, r"has no t10k-labels\?idx1-ubyte\*\. To get them: npm pack"),
        ("train-images-idx3-ubyte", np.zeros((2, 8, 8)), r"images of train should have 28 x 28 pixels; the array is \(2, 8, 8\)"),
    ],
)
def test_files_that_are_missing_or_do_not_fit_are_reported(name, array, words, small_mnist):
    (small_mnist / name).unlink()
    if array is not None:
        write_idx(small_mnist / name, array)
    with pytest.raises(SystemExit, match=words):
        simple_net.read_mnist(small_mnist)


def test_mnist_is_compared_with_the_notes(small_mnist, tmp_path, capsys, monkeypatch):
    """scikit-learn's digits are too few for the accuracy of the notes: an error, after table and picture."""
    monkeypatch.setattr(simple_net, "MNIST_EPOCHS", 2)
    arguments = ["--mnist", str(small_mnist), "--output", str(tmp_path / "demo.png")]
    with pytest.raises(SystemExit, match=r"expected 'He, ELU, batch norm' .* 0\.9652 on MNIST, as in the notes; it is 0\.\d{4}$"):
        demo.main(arguments)
    output = capsys.readouterr().out
    assert "gradient of sigmoid" not in output, "--mnist alone runs no other experiment"
    assert "(1437 training and 360 test images)" in " ".join(output.split())
    reported, accuracy, difference = row(output, "He, ELU, batch norm")
    assert reported == "0.9652"
    assert float(accuracy) - float(reported) == pytest.approx(float(difference), abs=2e-4)
    assert row(output, "He, ELU, clipped by value to 1")[0] == "0.8957"
    assert_drawn(tmp_path / "demo-mnist.png", panels=1)

    monkeypatch.setattr(simple_net, "TOLERANCE", 1.0)
    assert demo.main(arguments) == 0


def test_the_networks_for_mnist_are_those_of_the_notes():
    normed, clipped = (simple_net.build_for_mnist(batch_norm, seed=0) for batch_norm in (True, False))
    assert [layer.in_features for layer in normed if isinstance(layer, nn.Linear)] == [784, 300, 100]
    assert [module.act for module in normed if isinstance(module, gk.BatchNormAct1d)] == ["elu", "elu", "identity"]
    assert [type(module) for module in clipped] == [nn.Linear, gk.ELU, nn.Linear, gk.ELU, nn.Linear]
    for parameter in clipped.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    _, clip_ = simple_net.ROWS["He, ELU, clipped by value to 1"]
    clip_(clipped.parameters())
    assert all((parameter.grad == -1).all() for parameter in clipped.parameters())
