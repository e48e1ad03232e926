"""The package without its libraries, with one for another torch, with half of one, with each instruction set.

Every case runs in a process of its own, because a process loads a library only once.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gradkernels as gk
from accuracy import ULP_BOUND, assert_accurate
from gradkernels import _native
from gradkernels.__main__ import info

PACKAGE = Path(gk.__file__).parent
ROOT = PACKAGE.parent
STAMP = f"gradkernels-built-for-torch={torch.__version__}".encode() + b"\0"

# Runs in the process under test: imports the package, calls everything, and prints the results as JSON.
USE_EVERYTHING = """
import json, warnings
import torch
from torch import nn
from torch.nn import functional as F

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import gradkernels as gk
    from gradkernels import _native

torch.manual_seed(0)
different = []

def compare(name, ours, theirs):
    if not torch.equal(ours, theirs):
        different.append(name)

x = torch.randn(4, 3, 5, 5)
compare("leaky_relu", gk.leaky_relu(x), F.leaky_relu(x))
compare("leaky_relu in place", gk.leaky_relu(x.clone(), 0.2, inplace=True), F.leaky_relu(x, 0.2))
compare("elu", gk.elu(x, 1.3), F.elu(x, 1.3))
compare("swish", gk.swish(x), F.silu(x))
compare("modules", nn.Sequential(gk.LeakyReLU(), gk.ELU(), gk.Swish())(x), nn.Sequential(nn.LeakyReLU(), nn.ELU(), nn.SiLU())(x))
module, torch_module = gk.BatchNormAct2d(3, act="elu"), nn.BatchNorm2d(3)
leaf, torch_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
y, torch_y = module(leaf, x), F.elu(torch_module(torch_leaf) + x)
y.square().sum().backward()
torch_y.square().sum().backward()
compare("batch_norm_act", y, torch_y)
compare("grad_x", leaf.grad, torch_leaf.grad)
compare("running_var", module.running_var, torch_module.running_var)
compare("num_batches_tracked", module.num_batches_tracked, torch_module.num_batches_tracked)
compare("total_norm", gk.clip_grad_norm_(module, 0.1), nn.utils.clip_grad_norm_(torch_module.parameters(), 0.1))
compare("clipped gradient", module.weight.grad, torch_module.weight.grad)

print(json.dumps({
    "file": gk.__file__,
    "native": _native.C is not None,
    "reason": _native.reason,
    "remedy": _native.remedy,
    "warnings": [[each.category.__name__, str(each.message), each.filename] for each in caught],
    "different": different,
}))
"""


def library():
    files = sorted(PACKAGE.glob("_C*.so"))
    assert files, f"this test needs the native library: {_native.reason}; {_native.remedy}"
    return files[0]


def run(*arguments, folder, **environment):
    """Runs Python with the package in `folder`; returns what it printed."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
    return process.stdout


def copy_of_the_package(folder, image=None, portable=None):
    """With these bytes as the native and as the portable library, or without them."""
    shutil.copytree(PACKAGE, folder / "gradkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name, content in ((library().name, image), ("_portable.so", portable)):
        if content is not None:
            (folder / "gradkernels" / name).write_bytes(content)
    return folder


def portable_image():
    return (PACKAGE / "_portable.so").read_bytes()


def image_for_another_torch():
    image = library().read_bytes()
    assert image.count(STAMP) == 1
    return image.replace(STAMP, STAMP.replace(torch.__version__.encode(), b"9" * len(torch.__version__)))


@pytest.mark.parametrize(
    "image,reason",
    [
        (lambda: None, r"not been built"),
        (image_for_another_torch, rf"built for torch 9{{{len(torch.__version__)}}}.* torch {re.escape(torch.__version__)}"),
        (lambda: library().read_bytes()[: library().stat().st_size // 2], r"damaged|does not load"),
        (lambda: library().read_bytes()[:1000], r"damaged|does not load"),
        (lambda: b"", r"damaged|does not load"),
        (lambda: STAMP * 2, r"damaged|does not load"),
    ],
    ids=["no library", "a library for another torch", "half a library", "the head of a library", "an empty library", "no library at all"],
)
def test_import_without_a_usable_library(image, reason, tmp_path):
    folder = copy_of_the_package(tmp_path, image())
    result = json.loads(run("-c", USE_EVERYTHING, folder=folder))
    assert Path(result["file"]).is_relative_to(folder)
    assert not result["native"]
    assert re.search(reason, result["reason"]), result["reason"]
    assert "pip install" in result["remedy"] or "build_ext" in result["remedy"]
    ((category, message, where),) = result["warnings"]
    assert category == "RuntimeWarning"
    assert result["reason"] in message and result["remedy"] in message
    assert where == "<string>", "the warning has to name the line that imports gradkernels"
    assert result["different"] == [], "the reference is made of torch's operators and has to equal them"


@pytest.mark.parametrize(
    "image,portable,reason",
    [
        (lambda: None, lambda: portable_image()[: len(portable_image()) // 2], r"_portable\.so is damaged"),
        (image_for_another_torch, lambda: STAMP, r"_portable\.so does not load|_portable\.so is damaged"),
    ],
    ids=["half a portable library", "no portable library at all"],
)
def test_import_with_a_damaged_portable_library(image, portable, reason, tmp_path):
    result = json.loads(run("-c", USE_EVERYTHING, folder=copy_of_the_package(tmp_path, image(), portable())))
    ((category, message, _),) = result["warnings"]
    assert category == "RuntimeWarning" and re.search(reason, message), message
    assert result["different"] == []


@pytest.mark.parametrize("image", [lambda: None, image_for_another_torch], ids=["no library", "a library for another torch"])
def test_import_with_the_portable_library(image, tmp_path):
    """Silent in a portable wheel. A native library that cannot be used is a warning."""
    folder = copy_of_the_package(tmp_path, image(), portable_image())
    result = json.loads(run("-c", USE_EVERYTHING, folder=folder))
    assert not result["native"] and set(result["different"]) & {"swish", "batch_norm_act"}, "torch's operators have other bits"
    assert [re.search("portable library: .* built for torch 9", message) is not None for _, message, _ in result["warnings"]] == (
        [] if image() is None else [True]
    )
    text = run("-W", "ignore", "-m", "gradkernels", "info", folder=folder)
    for operator in ("leaky_relu", "elu", "swish", "batch_norm_act", "group_norm_act", "clip_grad_norm_"):
        assert re.search(rf"^{operator}\s+portable\s+float32.*  faster ", text, flags=re.M), text
    assert re.search(r"^rrelu\s+reference ", text, flags=re.M) and "Not native: " in text


@pytest.mark.parametrize("image", [lambda: None, image_for_another_torch], ids=["no library", "a library for another torch"])
def test_info_without_a_usable_library(image, tmp_path):
    folder = copy_of_the_package(tmp_path, image())
    text = run("-W", "ignore", "-m", "gradkernels", "info", folder=folder)
    for operator in ("leaky_relu", "elu", "swish", "batch_norm_act", "clip_grad_norm_"):
        assert re.search(rf"^{operator}\s+reference\s+\S", text, flags=re.M), text
    assert "pip install" in text or "build_ext" in text


def test_the_package_with_its_library(tmp_path):
    folder = copy_of_the_package(tmp_path, library().read_bytes(), portable_image())
    result = json.loads(run("-c", USE_EVERYTHING, folder=folder))
    assert result["native"] and result["reason"] is None and result["warnings"] == []
    text = run("-m", "gradkernels", "info", folder=folder)
    for operator in ("leaky_relu", "elu", "swish", "batch_norm_act", "clip_grad_norm_"):
        assert re.search(rf"^{operator}\s+native\s+\S", text, flags=re.M), text
    assert text.endswith("After an update of torch the portable library computes.\n")


@pytest.mark.parametrize(("architectures", "devices"), [([], "the CPU"), (["sm_90"], "the CPU and CUDA")])
def test_info_names_the_devices_that_were_built_for(architectures, devices, monkeypatch):
    build = {**_native.C.build_info(), "cuda_architectures": architectures}
    monkeypatch.setattr(_native, "C", SimpleNamespace(build_info=lambda: build, instruction_set=lambda: "base"))
    rows = [line for line in info().splitlines() if re.search(r" native +float32", line)]
    assert len(rows) >= 10 and all(re.search(rf" on {devices}[;,]", row) for row in rows), rows


def test_build_info():
    native = _native.C
    assert native is not None, f"{_native.reason}; {_native.remedy}"
    info = native.build_info()
    assert info["torch"] == torch.__version__
    assert native.instruction_set() in info["instruction_sets"]
    assert torch.version.cuda or info["cuda_architectures"] == []
    assert info["compiler"] and re.fullmatch(r"unknown|[0-9a-f]{7,40}(-dirty)?", info["commit"])
    assert library().read_bytes().count(STAMP) == 1


# Runs with each instruction set and saves the results of every operator on the same data. The data is made by
# numpy, because the numbers of torch.randn depend on the instruction set.
COMPUTE = """
import sys
import numpy as np
import torch
import gradkernels as gk
from gradkernels import _native

generator = np.random.default_rng(0)
results = {}
for dtype in (torch.float32, torch.float64):
    def normal(*shape):
        return torch.from_numpy(generator.standard_normal(shape)).to(dtype)

    for size in (7, 65, 20_011):
        for name, function in {"leaky_relu": gk.leaky_relu, "elu": gk.elu, "swish": gk.swish}.items():
            x = normal(size).requires_grad_()
            y = function(x)
            results[f"{name} {dtype} {size}"] = y.detach()
            results[f"{name} gradient {dtype} {size}"] = torch.autograd.grad(y, x, normal(size))[0]
    for shape in ((9, 65), (3, 5, 7, 7), (4, 3, 56, 56)):
        for act in ("identity", "relu6", "leaky_relu", "elu", "swish"):
            x = normal(*shape).requires_grad_()
            running = torch.zeros(shape[1], dtype=dtype), torch.ones(shape[1], dtype=dtype)
            y = gk.batch_norm_act(x, *running, None, None, True, act=act, residual=normal(*shape))
            results[f"batch_norm_act {act} {dtype} {shape}"] = y.detach()
            results[f"batch_norm_act gradient {act} {dtype} {shape}"] = torch.autograd.grad(y, x, normal(*shape))[0]
            results[f"running_var {act} {dtype} {shape}"] = running[1]
    parameter = torch.nn.Parameter(torch.zeros(20_011, dtype=dtype))
    parameter.grad = normal(20_011)
    results[f"total_norm {dtype}"] = gk.clip_grad_norm_(parameter, 0.1)
    results[f"clipped gradient {dtype}"] = parameter.grad
torch.save({"results": results, "used": _native.C.instruction_set(), "torch": torch.backends.cpu.get_cpu_capability()}, sys.argv[1])
"""


SET_IN_USE = "import gradkernels._native as n; print(n.C.instruction_set())"


@pytest.fixture
def best_set(monkeypatch):
    """The largest instruction set of this processor, even if the environment of the tests asks for another."""
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    return run("-c", SET_IN_USE, folder=ROOT).strip()


@pytest.mark.slow
def test_instruction_sets_agree(best_set, tmp_path):
    """ATEN_CPU_CAPABILITY chooses the set, as in torch.

    Values differ by at most 2 ulp. Gradients differ by at most 4, because each has an error of at most 2.
    """
    built = _native.C.build_info()["instruction_sets"]
    saved = {}
    # torch would also use a set that the processor lacks, and end with an illegal instruction.
    for name in built[: built.index(best_set) + 1]:
        file = tmp_path / name
        run("-c", COMPUTE, str(file), folder=ROOT, ATEN_CPU_CAPABILITY="default" if name == "base" else name)
        saved[name] = torch.load(file)
        # On other architectures torch has sets of its own, and we have only base.
        torchs = {"AVX2": "avx2", "AVX512": "avx512"}.get(saved[name]["torch"], "base")
        assert saved[name]["used"] == torchs == name
    base = saved.pop("base")["results"]
    for name, of_set in saved.items():
        for result, tensor in of_set["results"].items():
            per = "element" if re.match(r"leaky_relu|elu torch|total_norm|clipped", result) else "tensor"
            bound = 4.0 if "gradient" in result else ULP_BOUND
            assert_accurate(f"{result} under {name}", tensor, base[result], base[result], per=per, bound=bound)


@pytest.mark.parametrize("capability", ["avx512", "sse9"])
def test_the_processor_decides(capability, best_set):
    """A set that the processor lacks is not chosen, and an unknown value is ignored."""
    assert run("-c", SET_IN_USE, folder=ROOT, ATEN_CPU_CAPABILITY=capability).strip() == best_set
