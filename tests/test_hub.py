"""The kernel of the Hugging Face hub: build.toml lists what its builder copies, and torch-ext/ runs with the compiled files.

The builder needs Nix, and is not run. The slow test compiles the files that are listed with their flags, and writes
what the builder writes: registration.h, _ops.py, and the package with its extension module.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import cpp_extension

import gradkernels as gk
from accuracy import assert_bitwise_equal
from test_layout import weak_symbols

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")

ROOT = Path(__file__).resolve().parent.parent
BUILD = tomllib.loads((ROOT / "build.toml").read_text())
SECTIONS = (BUILD["torch"], *BUILD["kernel"].values())
LISTED = [file for section in SECTIONS for file in section["src"]]
FRONT_END = ROOT / "torch-ext" / BUILD["general"]["name"].replace("-", "_")


def test_the_listed_files_are_those_that_the_sources_include():
    """The builder copies no other file. It writes registration.h."""
    found, remaining = set(), [file for file in LISTED if file.endswith(".cpp")]
    while remaining:
        file = remaining.pop()
        if file not in found:
            found.add(file)
            includes = re.findall(r'^\s*#\s*include "([^"]+)"', (ROOT / file).read_text(), flags=re.M)
            remaining += [f"csrc/{name}" for name in includes if name != "registration.h"]
    assert sorted(LISTED) == sorted(found)


def test_the_settings_are_those_of_the_format():
    """Of edition 6, which allows no other keys."""
    assert BUILD.keys() == {"general", "torch", "kernel"}
    general = BUILD["general"]
    assert general.keys() == {"name", "version", "edition", "license", "backends"}
    assert general["edition"] == 6 and re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", general["name"])
    assert {f"cpp-{backend}" for backend in general["backends"]} == {kernel["language"] for kernel in BUILD["kernel"].values()}
    assert BUILD["torch"].keys() == {"src", "include", "cxx-flags", "minver"}
    assert all(kernel.keys() == {"language", "depends", "src", "include", "cxx-flags"} for kernel in BUILD["kernel"].values())
    of_setup = (ROOT / "setup.py").read_text()
    assert all(f'"{flag}"' in of_setup for section in SECTIONS for flag in section["cxx-flags"])


def test_the_front_end_imports_what_the_hub_allows():
    """The standard library, torch, and itself by relative imports."""
    allowed = {"torch", *sys.stdlib_module_names}
    for path in FRONT_END.rglob("*.py"):
        modules = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), flags=re.M)
        assert not [name for name in modules if not name.startswith(".") and name.partition(".")[0] not in allowed]


NAME = "_gradkernels_cpu_of_a_test"
REGISTRATION = """
#include <Python.h>
#define QUOTE_OF(name) #name
#define QUOTE(name) QUOTE_OF(name)
#define JOIN_OF(a, b) a##b
#define JOIN(a, b) JOIN_OF(a, b)
#define REGISTER_EXTENSION(name) \\
  PyMODINIT_FUNC JOIN(PyInit_, name)() { \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, QUOTE(name), nullptr, 0, nullptr}; \\
    return PyModule_Create(&module); \\
  }
"""
OPS = f"""
import torch
from . import {NAME}
ops = torch.ops.{NAME}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The package as the builder lays it out, with the objects beside the extension module."""
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    shutil.copytree(FRONT_END, folder)
    (folder / "_ops.py").write_text(OPS)
    (folder / "registration.h").write_text(REGISTRATION)
    flags = {flag: None for section in SECTIONS for flag in section["cxx-flags"]}
    includes = [str(ROOT / path) for path in {path for section in SECTIONS for path in section["include"]}]
    units = []
    for file in LISTED:
        if file.endswith(".cpp"):
            # cpp_extension names an object after its stem, which several files share.
            unit = folder / file.replace("/", "-")
            unit.write_text(f'#include "{ROOT / file}"\n')
            units.append(str(unit))
    cpp_extension.load(
        NAME,
        units,
        # The builder compiles with this standard and for this interface of Python.
        extra_cflags=["-std=c++20", "-DCPU_KERNEL", "-DPy_LIMITED_API=0x03090000", *flags],
        extra_include_paths=[*includes, str(folder)],
        build_directory=str(folder),
        is_python_module=False,
    )
    return folder


@pytest.fixture(scope="module")
def kernel(folder):
    """The package under another name, as the hub's loader imports it: this process has gradkernels already."""
    spec = importlib.util.spec_from_file_location("kernel_of_the_hub", folder / "__init__.py", submodule_search_locations=[str(folder)])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_activations_and_clipping_have_the_bits_of_gradkernels(kernel):
    """Both are loaded into one process, each with its own operators."""
    channels = torch.linspace(-0.5, 2.0, 5)
    calls = {
        "leaky_relu": lambda library, x, _: library.leaky_relu(x, 0.1),
        "elu": lambda library, x, _: library.elu(x, 1.3),
        "swish": lambda library, x, _: library.swish(x, 1.7),
        "swish of a tensor": lambda library, x, parameter: library.swish(x, parameter),
        "swish of a tensor of one element": lambda library, x, parameter: library.swish(x, parameter[:1]),
        "prelu": lambda library, x, parameter: library.prelu(x, parameter),
    }
    for name, call in calls.items():
        results = []
        for library in (gk, kernel):
            torch.manual_seed(0)
            x, parameter = nn.Parameter(torch.randn(3, 5, 7, 7)), nn.Parameter(channels.clone())
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                y = call(library, x, parameter)
                y.backward(torch.randn_like(y))
                total = library.clip_grad_norm_([x, parameter, nn.Parameter(channels)], 0.5)
                library.clip_grad_value_(x, 0.01)
            namespaces = {event.name.partition("::")[0] for event in recorded.events()}
            assert namespaces & {"gradkernels", NAME} == {"gradkernels" if library is gk else NAME}
            results.append({"y": y.detach(), "total": total, "grad of x": x.grad})
            results[-1] |= {"grad of the parameter": parameter.grad} if parameter.grad is not None else {}
        assert results[0].keys() == results[1].keys()
        for result, tensor in results[0].items():
            assert_bitwise_equal(f"{name}: {result}", results[1][result], tensor)
    assert kernel.clip_grad_norm_([], 1.0) == 0


@pytest.mark.slow
def test_what_was_compiled(folder):
    """No symbol of libtorch_python, which the builder does not link; no weak symbol of an instruction set."""
    if shutil.which("nm") is None:
        pytest.skip("binutils (nm) are not installed")
    for path in folder.glob("*isa_*.o"):
        assert not weak_symbols(path)

    def symbols(file, which):
        printed = subprocess.run(["nm", "--dynamic", which, file], check=True, capture_output=True, text=True).stdout
        return {line.split()[-1].partition("@")[0] for line in printed.splitlines()}

    libraries = Path(torch.__file__).parent / "lib"
    of_python = symbols(libraries / "libtorch_python.so", "--defined-only")
    linked = symbols(libraries / "libtorch_cpu.so", "--defined-only") | symbols(libraries / "libc10.so", "--defined-only")
    assert not symbols(folder / f"{NAME}.so", "--undefined-only") & (of_python - linked)
