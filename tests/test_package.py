"""What a user gets besides the operators: the docstrings' examples run, arguments are torch's, and an sdist and a wheel are complete."""

import doctest
import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import gradkernels

ROOT = Path(__file__).resolve().parents[1]
PRIVATE = {"gradkernels._C", "gradkernels._portable", "gradkernels.__main__"}
MODULES = sorted({module.name for module in pkgutil.walk_packages(gradkernels.__path__, "gradkernels.")} - PRIVATE)


@pytest.mark.parametrize("name", gradkernels.__all__)
def test_public_callable_has_an_example(name):
    public = getattr(gradkernels, name)
    assert not callable(public) or ">>>" in public.__doc__


def test_import_loads_only_the_operators():
    """conversion, diagnosis and init take longer to load than all the rest, and are loaded at first use."""
    program = """
import sys, gradkernels
late = {"gradkernels.conversion", "gradkernels.diagnosis", "gradkernels.init"}
assert not late & set(sys.modules), late & set(sys.modules)
assert set(gradkernels.__all__) <= set(dir(gradkernels))
from gradkernels import *
assert late <= set(sys.modules)
assert convert is gradkernels.convert and convert is gradkernels.conversion.convert.convert
assert gradkernels.diagnosis.diagnose.diagnose is diagnose
assert gradkernels.init is init and not hasattr(gradkernels, "nothing")
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_packages_have_their_modules_when_they_are_imported_alone():
    program = """
import gradkernels.conversion, gradkernels.diagnosis
gradkernels.conversion.convert.convert, gradkernels.conversion.fold.fold, gradkernels.conversion.report
gradkernels.diagnosis.diagnose.diagnose, gradkernels.diagnosis.monitor.GradientMonitor
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


FUNCTIONAL, CLIPPING = torch.nn.functional, torch.nn.utils
# Ours -> what it stands for: every argument of that, by its name, in its place and with its default, comes before those of our own.
STANDS_FOR = {
    gradkernels.leaky_relu: FUNCTIONAL.leaky_relu,
    gradkernels.elu: FUNCTIONAL.elu,
    gradkernels.rrelu: FUNCTIONAL.rrelu,
    gradkernels.batch_norm_act: FUNCTIONAL.batch_norm,
    gradkernels.group_norm_act: FUNCTIONAL.group_norm,
    gradkernels.optim.RMSprop: torch.optim.RMSprop,
    **{getattr(gradkernels, name): getattr(torch.nn, name) for name in ("LeakyReLU", "ELU", "PReLU", "RReLU")},
    **{getattr(gradkernels, f"BatchNormAct{n}d"): getattr(torch.nn, f"BatchNorm{n}d") for n in (1, 2, 3)},
    **{getattr(gradkernels, f"InstanceNormAct{n}d"): getattr(torch.nn, f"InstanceNorm{n}d") for n in (1, 2, 3)},
    gradkernels.GroupNormAct: torch.nn.GroupNorm,
    gradkernels.SyncBatchNormAct: torch.nn.SyncBatchNorm,
    **{
        getattr(gradkernels, name): getattr(CLIPPING, name)
        for name in ("clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_")
    },
}


def arguments_of(function):
    parameters = inspect.signature(function).parameters.values()
    # bias of a class is of torch 2.13; our own take it under 2.11 too.
    newer = {"bias"} if isinstance(function, type) else set()
    return [(each.name, each.kind, each.default) for each in parameters if each.name not in newer]


@pytest.mark.parametrize("ours", STANDS_FOR, ids=lambda ours: ours.__name__)
def test_arguments_are_torchs(ours):
    functions = [(ours, STANDS_FOR[ours])]
    if isinstance(ours, type) and issubclass(ours, torch.nn.Module):
        functions.append((ours.forward, STANDS_FOR[ours].forward))
    for each, torchs in functions:
        expected = arguments_of(torchs)
        assert arguments_of(each)[: len(expected)] == expected


def test_what_has_no_signature_takes_torchs_keywords():
    x, weight = torch.randn(2, 3), torch.rand(3)
    assert torch.equal(gradkernels.prelu(input=x, weight=weight), FUNCTIONAL.prelu(input=x, weight=weight))
    torch.testing.assert_close(gradkernels.swish(input=x), FUNCTIONAL.silu(input=x))
    torch.testing.assert_close(gradkernels.Swish()(input=x), FUNCTIONAL.silu(input=x))


def test_the_command_says_its_version():
    result = subprocess.run([sys.executable, "-m", "gradkernels", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"gradkernels {gradkernels.__version__}\n"), result.stderr


@pytest.mark.parametrize("command", [["info"], ["--help"]], ids=lambda command: command[0])
def test_a_reader_that_has_seen_enough_is_no_error(command):
    """As in python -m gradkernels info | true."""
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run([sys.executable, "-m", "gradkernels", *command], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert result.stderr == ""


# Each of these needs the trainer that it is named after.
TRAINERS = {"gradkernels.integrations." + name: name for name in ("lightning", "pytorch_lightning", "transformers", "ultralytics")}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    if name in TRAINERS:
        pytest.importorskip(TRAINERS[name], reason=f"the trainer {TRAINERS[name]} is not installed")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_setup_without_torch_says_what_to_type():
    # -S hides every installed package, as pip's isolated build hides torch.
    result = subprocess.run([sys.executable, "-I", "-S", "setup.py", "egg_info"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install --no-build-isolation ." in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from the sdist of a copy of this tree, outside git."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    copy = shutil.copytree(ROOT, folder / "copy", ignore=left_out)
    sdist = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('..')"]
    subprocess.run(sdist, cwd=copy, check=True)
    shutil.rmtree(copy)
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder]
    subprocess.run([*pip_wheel, *folder.glob("gradkernels-*.tar.gz")], cwd=folder, check=True)
    return next(folder.glob("gradkernels-*.whl"))


@pytest.mark.slow
def test_wheel_from_sdist_is_complete(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = ROOT / "gradkernels"
    sources = {f"gradkernels/{path.relative_to(package)}" for path in package.rglob("*") if path.suffix in (".py", ".pyi", ".typed")}
    libraries = {name for name in names if re.fullmatch(r"gradkernels/(_C\..*|_portable\.)so", name)}
    assert len(libraries) == 2
    assert {name for name in names if ".dist-info/" not in name} == sources | libraries
    assert "gradkernels/py.typed" in names
    assert [name for name in names if re.search(r"LICEN[CS]E|COPYING|NOTICE", name)] == [
        f"gradkernels-{gradkernels.__version__}.dist-info/licenses/LICENSE"
    ]


@pytest.mark.slow
def test_sdist_is_reproducible(tmp_path):
    """The same bytes from a copy of the tree with other times, by the clock and of the files."""
    archives = []
    for place in ("one", "another"):
        copy = shutil.copytree(
            ROOT, tmp_path / place, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
        )
        for path in copy.rglob("*"):
            os.utime(path)
        subprocess.run(
            [sys.executable, "setup.py", "-q", "sdist"], cwd=copy, env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}, check=True
        )
        archives.append(next((copy / "dist").glob("*.tar.gz")).read_bytes())
    assert archives[0] == archives[1]


def run_in_a_venv(wheel, folder, program):
    """Prints of a program, in a venv that has torch and what torch needs, by a path, and this wheel."""
    python = folder / "venv" / "bin" / "python"
    venv.create(folder / "venv", symlinks=True)
    site = next((folder / "venv").glob("lib/*/site-packages"))
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--no-index", wheel], check=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PATH")}
    command = [python, "-W", "error::RuntimeWarning", "-c", program]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return site, json.loads(result.stdout)


@pytest.mark.slow
def test_portable_wheel(tmp_path):
    """As make wheel builds it: for every Python, without a native library, silent."""
    build = ["build", "--build-lib", tmp_path / "lib", "bdist_wheel", "--skip-build", "--bdist-dir", tmp_path / "root"]
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, *build, "--dist-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"GRADKERNELS_PORTABLE": "1"}, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"gradkernels-{re.escape(gradkernels.__version__)}-py3-none-linux_\w+\.whl", wheel.name)
    assert [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")] == ["gradkernels/_portable.so"]
    program = """
import json, torch, gradkernels
from gradkernels import _native
x = torch.linspace(-3, 3, 7, requires_grad=True)
gradkernels.elu(x).sum().backward()
print(json.dumps({"file": gradkernels.__file__, "portable": _native.PORTABLE is not None, "grad": x.grad.tolist()}))
"""
    site, found = run_in_a_venv(wheel, tmp_path, program)
    assert Path(found["file"]).is_relative_to(site) and found["portable"]
    x = torch.linspace(-3, 3, 7, requires_grad=True)
    gradkernels.elu(x).sum().backward()
    assert found["grad"] == x.grad.tolist()


@pytest.mark.slow
def test_wheel_is_native_in_a_venv_of_its_own(wheel, tmp_path):
    program = """
import json, torch, gradkernels
from gradkernels import _native
x = torch.linspace(-3, 3, 7)
same = torch.allclose(gradkernels.elu(x), torch.nn.functional.elu(x))
print(json.dumps({"file": gradkernels.__file__, "info": _native.C.build_info(), "same": same}))
"""
    site, found = run_in_a_venv(wheel, tmp_path, program)
    assert Path(found["file"]).is_relative_to(site)
    assert found["info"]["torch"] == torch.__version__
    assert found["info"]["commit"] == "unknown"
    assert found["same"]
