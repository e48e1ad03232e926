"""The layers of the source tree as a table, and what holds for every file: includes, names, and what the compiled objects contain.

A rule is checked on the code without its comments and strings. Folders that are still to come have their rows already.
"""

import ast
import inspect
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import gradkernels
from gradkernels import _native

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
STEMS = ("activation", "batch_norm_act", "clip_grad", "group_norm_act")
# The stems with a launcher.
SEAMS = (*STEMS, "optim")
# The headers of cpu/ that the kernels are written in.
VECTORS = ("vector", "half_vector", "double_vector", "load_store", "mask_bits", "uniform_numbers", "lines", "functor")
SUFFIXES = {".cpp", ".h", ".cu", ".cuh", ".py", ".pyi"}

STANDARD = r"<[a-z_0-9]+>"
TORCH = r"<(ATen|c10|torch)/.*>"
OWN_TORCH_FREE = r'"(common/(host_device|dispatch|half|shape)|math/\w+)\.h"'
SEAM = rf'"ops/({"|".join(SEAMS)})\.h"'


@dataclass(frozen=True)
class Layer:
    """files: globs below csrc/; includes: what may stand after #include; must_not: what may not stand in the code."""

    files: tuple[str, ...]
    includes: tuple[str, ...]
    must_not: tuple[str, ...] = ()


LAUNCH = "<<<"
ATEN = r"\b(at|c10|torch)::"
ALLOCATION = r"\b(malloc|calloc|realloc|new)\b"
THREADS = r"\b(parallel_for|std::thread|#\s*pragma\s+omp)\b"
CUDA_RUNTIME = r"\bcuda[A-Z]\w*\("

LAYERS = {
    "schema": Layer(("schema.cpp",), (r'"common/library\.h"',), (LAUNCH, "data_ptr", r"\bfor\b")),
    "module": Layer(
        ("module.cpp",),
        (TORCH, r"<pybind11/.*>", STANDARD, r'"(build_info|common/check|ops/operators|autograd/recompute|cpu/kernels)\.h"'),
        (LAUNCH, "data_ptr"),
    ),
    "portable": Layer(
        ("portable.cpp",),
        (STANDARD, OWN_TORCH_FREE, SEAM, r'"(build_info|cpu/kernels|common/(extents|huge_pages))\.h"'),
        (ATEN, r"\btorch::", THREADS, LAUNCH, ALLOCATION),
    ),
    "build info": Layer(("build_info.cpp", "build_info.h"), (r'"build_(info|stamp)\.h"',), (ATEN,)),
    "units": Layer(("units/*.cpp",), (r'"(schema|module|(ops|autograd)/\w+)\.cpp"',), (r"\S",)),
    "common": Layer(
        ("common/*",), (STANDARD, TORCH, r"<(sys/mman|cuda_(bf|fp)16)\.h>", r'"common/\w+\.h"'), (LAUNCH, r"\bfor\b", r"\basm\b")
    ),
    "common without torch": Layer(
        tuple(f"common/{stem}.h" for stem in ("host_device", "dispatch", "half", "shape", "extents", "huge_pages")),
        (STANDARD, r"<(sys/mman|cuda_(bf|fp)16)\.h>", OWN_TORCH_FREE),
        (ATEN,),
    ),
    "math": Layer(
        ("math/*",),
        (r"<(cstdint|type_traits)>", r'"common/host_device\.h"', r'"math/\w+\.h"'),
        (ATEN, CUDA_RUNTIME, ALLOCATION, THREADS, LAUNCH, r"\bstd::(exp|expm1|log|pow|tanh)\b"),
    ),
    "math without PTX": Layer(
        tuple(f"math/{stem}.h" for stem in ("activation", "batch_norm_act", "clip_grad", "optim", "sum")), (r".*",), (r"\basm\b",)
    ),
    "seam": Layer(tuple(f"ops/{stem}.h" for stem in SEAMS), (STANDARD, OWN_TORCH_FREE, r'"ops/batch_norm_act\.h"'), (ATEN, LAUNCH)),
    "ops": Layer(
        ("ops/*",),
        (STANDARD, TORCH, r'"(common|ops|math)/\w+\.h"'),
        (LAUNCH, r"torch::autograd", r"\brequires_grad", r"<torch/csrc/autograd", THREADS),
    ),
    "autograd": Layer(
        ("autograd/*",),
        (STANDARD, TORCH, r'"autograd/\w+\.h"', r'"common/(check|library)\.h"', r'"ops/(operators|composite)\.h"'),
        (LAUNCH, "data_ptr", r"\b(cpu|cuda|math)::"),
    ),
    "cpu": Layer(
        ("cpu/*",),
        (STANDARD, r"<immintrin\.h>", OWN_TORCH_FREE, SEAM, r'"cpu/\w+\.h"', r"<torch/csrc/stable/c/shim\.h>"),
        (LAUNCH, ATEN, ALLOCATION, r"\bcuda::", r"#\s*pragma\s+omp"),
    ),
    "kernels compiled per instruction set": Layer(
        ("cpu/isa_*.cpp", "cpu/*_kernel.h", *(f"cpu/{stem}.h" for stem in VECTORS), "cpu/kernels_table.h"),
        (r"<cstdint>", r"<immintrin\.h>", OWN_TORCH_FREE, rf'"cpu/(kernels|kernels_table|{"|".join(VECTORS)}|\w+_kernel)\.h"'),
        (THREADS, r"\bstd::", r"\bstatic\s+\w+\s+\w+\s*[;=]"),
    ),
    "cuda": Layer(
        ("cuda/*.cu", "cuda/*.cuh", "cuda/*.h"),
        (STANDARD, r"<cuda\w*\.h>", OWN_TORCH_FREE, SEAM, r'"cuda/\w+\.cuh"', r'"cuda/(device|channel_cut)\.h"'),
        (ATEN, LAUNCH, r"\bcpu::", r"\bcub\b", r"\basm\b", ALLOCATION),
    ),
    "the cut by channels, which g++ alone compiles": Layer(("cuda/channel_cut.h",), (STANDARD, r'"common/shape\.h"'), (r"__\w+__",)),
    "cuda's way to torch": Layer(
        ("cuda/device.cpp",), (STANDARD, r"<c10/cuda/\w+\.h>", r'"(build_stamp|cuda/device)\.h"'), (r"\b(at|torch)::", LAUNCH)
    ),
}
LAYOUT_OF_A_STEM = (
    *("csrc/math/{}.h", "csrc/ops/{}.h", "csrc/ops/{}.cpp", "csrc/autograd/{}.cpp", "csrc/cpu/{}.cpp"),
    *("gradkernels/{}.py", "tests/test_{}.py", "bench/bench_{}.py"),
)
# Group norm has batch norm's formulas, node and bench.
SHARED_WITH_BATCH_NORM = {"csrc/math/{}.h", "csrc/autograd/{}.cpp", "bench/bench_{}.py"}
# The files and packages of gradkernels/ from the ground up: each may import what stands in a row before its own, and nothing else. So the
# operators know nothing of conversion and diagnosis, and those nothing of each other.
PACKAGE = (
    ("acts", "layers", "preserved", "sharded", "text"),
    ("reference",),
    ("portable",),
    ("_native",),
    ("clipping", "gradients", "recompute"),
    ("activation", "batch_norm_act", "clip_grad", "selftest"),
    ("group_norm_act", "init", "optim", "sync_batch_norm_act"),
    ("frozen_batch_norm_act",),
    ("conversion", "diagnosis"),
    ("integrations",),
    ("__init__",),
    ("__main__",),
)
# The only file of cpu/ that knows torch, and of it the C functions of its thread pool alone.
POOL = "cpu/parallel.h"
MOST_TORCH_UNITS = 2
# A library with CUDA has one more, which knows c10 alone.
CUDA_TORCH_UNIT = "cuda/device.cpp"


def sources():
    """Every source file of the project."""
    for folder in ("csrc", "gradkernels", "examples", "tests", "bench", "docs", "torch-ext"):
        yield from (path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES)
    yield ROOT / "setup.py"


def code_of(path):
    """The text with comments removed and strings emptied; #include lines keep theirs."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
    lines = [re.sub(r"//.*", "", line) for line in text.splitlines()]
    return "\n".join(line if line.lstrip().startswith("#") else re.sub(r'"(\\.|[^"\\])*"', '""', line) for line in lines)


def includes_of(path):
    return re.findall(r'^\s*#\s*include\s+(<[^>]+>|"[^"]+")', code_of(path), flags=re.M)


def includes_torch(path):
    """Whether a file includes torch's C++, itself or through ours."""
    for include in includes_of(path):
        name = include[1:-1]
        if include.startswith('"'):
            if (CSRC / name).exists() and includes_torch(CSRC / name):
                return True
        elif re.match(r"(ATen|c10|torch|pybind11)/", name) and name != "torch/csrc/stable/c/shim.h":
            return True
    return False


@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer):
    rules = LAYERS[layer]
    broken = []
    for path in (path for pattern in rules.files for path in sorted(CSRC.glob(pattern))):
        for include in includes_of(path):
            if not any(re.fullmatch(allowed, include) for allowed in rules.includes):
                broken.append(f"{path.relative_to(ROOT)} includes {include}")
        # An include is judged above, as what it is.
        code = re.sub(r"^\s*#\s*include.*", "", code_of(path), flags=re.M)
        for forbidden in rules.must_not:
            broken += [f"{path.relative_to(ROOT)} has {found.group()!r}" for found in re.finditer(forbidden, code)]
    assert not broken, "\n".join(broken)


def test_every_source_has_a_layer():
    covered = {path for rules in LAYERS.values() for pattern in rules.files for path in CSRC.glob(pattern)}
    stray = [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.is_file() and path not in covered]
    assert not stray, f"no row of the table holds for {stray}"


def test_torchs_thread_pool_is_reached_in_one_file():
    knows_torch = [
        f"cpu/{path.name}"
        for path in sorted((CSRC / "cpu").glob("*"))
        if any(include.startswith("<torch/") for include in includes_of(path))
    ]
    assert knows_torch == [POOL]


def test_translation_units_that_include_torch():
    """Few, as a clean build waits for torch's headers: every other file that includes torch is a part of one of them."""
    units = sorted((CSRC / "units").glob("*.cpp"))
    assert 0 < len(units) <= MOST_TORCH_UNITS
    parts = [CSRC / include[1:-1] for unit in units for include in includes_of(unit)]
    including = [path for path in CSRC.rglob("*.cpp") if path not in units and includes_torch(path)]
    including.remove(CSRC / CUDA_TORCH_UNIT)
    assert sorted(parts) == sorted(including)


@pytest.mark.parametrize("stem", STEMS)
def test_stem_stands_on_every_layer(stem):
    patterns = [pattern for pattern in LAYOUT_OF_A_STEM if stem != "group_norm_act" or pattern not in SHARED_WITH_BATCH_NORM]
    missing = [pattern.format(stem) for pattern in patterns if not (ROOT / pattern.format(stem)).exists()]
    assert not missing, f"{stem} has no {missing}"


def test_no_file_is_named_after_nothing():
    named = [str(path.relative_to(ROOT)) for path in sources() if re.search(r"(^|_)(utils?|helpers?|misc|common)(_|$)", path.stem)]
    assert not named, named


def test_nothing_is_left_to_do_or_silenced():
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|# *noqa|# *type: *ignore|NOLINT")
    left = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if words.search(line)
    ]
    assert not left, "\n".join(left)


def test_every_file_opens_by_saying_what_it_is():
    silent = [str(path.relative_to(ROOT)) for path in sources() if not path.read_text().startswith(("// ", '"""', "# "))]
    assert not silent, silent


def test_macros_are_ours_and_in_common():
    """Except those that -D sets, to measure other numbers."""
    defined = [
        (path.relative_to(CSRC).as_posix(), name)
        for path in sorted(CSRC.rglob("*"))
        if path.is_file()
        for name in re.findall(r"^\s*#\s*define\s+(\w+)", code_of(path), flags=re.M)
    ]
    measured = [("cuda/channel_cut.h", name) for name in ("GK_BYTES_IN_FLIGHT", "GK_SUM_WAVES", "GK_RESULT_WAVES")]
    strangers = [each for each in defined if each not in measured and not (each[0].startswith("common/") and each[1].startswith("GK_"))]
    assert not strangers, strangers


def test_the_compiled_module_is_reached_through_one_file():
    """Every other Python file asks _native for it, which knows whether it can be loaded.

    __init__.py imports by name too: the modules of its table, which are loaded at first use.
    """
    assert "_C" not in gradkernels._AT_FIRST_USE.values()
    importers = []
    for path in sorted((ROOT / "gradkernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            by_name = isinstance(node, ast.ImportFrom) and any(alias.name == "_C" for alias in node.names)
            as_module = isinstance(node, ast.Import) and any(alias.name.endswith("gradkernels._C") for alias in node.names)
            loader = isinstance(node, ast.Attribute) and node.attr == "import_module" and path.name != "__init__.py"
            if by_name or as_module or loader:
                importers.append(path.name)
    assert importers == ["_native.py"]


# what was compiled


def instruction_set_objects():
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("binutils (nm, readelf) are not installed")
    # Those of `make sanitize` and `make coverage`, which stand beside them, are not what anybody loads.
    objects = sorted((ROOT / "build").glob("temp.*/**/isa_*.o"))
    if not objects:
        pytest.skip("build/ holds no isa_*.o: the library was not built in this checkout")
    return objects


def weak_symbols(path):
    symbols = subprocess.run(["nm", "--defined-only", path], check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in symbols if line.split()[-2] in "WwVvui"]


def test_objects_of_an_instruction_set_define_nothing_weak():
    """The linker keeps one of several weak definitions, for every file: one compiled for AVX-512 would crash an older processor."""
    for path in instruction_set_objects():
        weak = weak_symbols(path)
        assert not weak, f"{path.name}:\n" + "\n".join(weak)


def test_objects_of_an_instruction_set_run_nothing_when_loaded():
    for path in instruction_set_objects():
        sections = subprocess.run(["readelf", "--sections", "--wide", path], check=True, capture_output=True, text=True).stdout
        assert ".init_array" not in sections and ".ctors" not in sections, f"{path.name} has a static initialiser"


def parameters_in_docstring(function):
    """The number of parameters in the signature that pybind11 writes into the first line of a docstring."""
    signature = re.match(r"\w+\((.*)\) -> ", inspect.getdoc(function)).group(1)
    depth, count = 0, 0
    for character in signature:
        depth += (character in "([") - (character in ")]")
        count += depth == 0 and character == ":"
    return count


def test_stub_is_the_module():
    native = _native.C
    assert native is not None, f"{_native.reason}; {_native.remedy}"
    stub = ast.parse((ROOT / "gradkernels/_C.pyi").read_text())
    functions = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert sorted(functions) == sorted(name for name in dir(native) if not name.startswith("_"))
    for name, node in functions.items():
        assert not node.args.args and not node.args.kwonlyargs, f"{name}: all parameters are positional"
        assert len(node.args.posonlyargs) == parameters_in_docstring(getattr(native, name)), f"{name}: {getattr(native, name).__doc__}"
    (keys,) = [
        [field.target.id for field in node.body] for node in stub.body if isinstance(node, ast.ClassDef) and node.name == "_BuildInfo"
    ]
    assert sorted(keys) == sorted(native.build_info())


def room_of(path):
    """The file or the package of gradkernels/ that a path lies in."""
    return path.relative_to(ROOT / "gradkernels").parts[0].removesuffix(".py")


def imports_of(path):
    """The rooms of gradkernels/ that a file imports, also inside functions."""
    rooms = {room for row in PACKAGE for room in row}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative imports are not used"
            names = [[*node.module.split("."), alias.name] for alias in node.names]
        else:
            continue
        yield from (name[1] if name[1:] and name[1] in rooms else "__init__" for name in names if name[0] == "gradkernels")


def test_imports_of_the_package_go_downwards():
    row_of = {room: number for number, row in enumerate(PACKAGE) for room in row}
    files = sorted((ROOT / "gradkernels").rglob("*.py"))
    assert {room_of(path) for path in files} == row_of.keys()
    upwards = [
        f"{path.relative_to(ROOT)} imports {room}"
        for path in files
        for room in imports_of(path)
        if room != room_of(path) and row_of[room] >= row_of[room_of(path)]
    ]
    assert not upwards, "\n".join(upwards)


def test_no_line_is_longer_than_140_columns():
    """The formatter leaves comments alone."""
    for path in CSRC.rglob("*.*"):
        long = [number for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 140]
        assert not long, f"{path.relative_to(ROOT)}: lines {long}"
