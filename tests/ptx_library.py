"""Compiles the kernels of csrc/cuda to PTX with nvcc, and calls them on CPU tensors by the machine of tests/ptx.

load("activation") is what simt_library.load is, but the launchers' kernels run as nvcc's PTX. What is compiled is kept
in build/ptx, and the names contain a hash of all sources. Tensors come from DeviceMemory, so that the machine knows
where they begin and end.
"""

import ctypes
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from functools import cache
from typing import ClassVar

import pytest
import torch

import simt_library
from simt_library import ROOT, Guarded, as_c, compiled, kept

BUILT = ROOT / "build/ptx"
SOURCES = ("csrc/common/*.h", "csrc/math/*.h", "csrc/ops/*.h", "csrc/cuda/*")
# Those of setup.py, and those that torch's BuildExtension adds.
NVCC_FLAGS = (
    "-O2",
    "-fmad=false",
    "-std=c++17",
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "--expt-relaxed-constexpr",
    "-Icsrc",
)
# A loop over lanes has to become vector instructions; the machine runs where it is compiled.
MACHINE_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra")
# nvcc and g++ name the anonymous namespace in their own ways.
ANONYMOUS = re.compile(r"\d+_GLOBAL__N_(?:1|_[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8})(?=\d|$)")


def required(compiler):
    path = shutil.which(compiler)
    if path is None:
        pytest.skip(f"there is no {compiler}, and the kernels' PTX was not executed")
    return path


@cache
def ptx_of(stem, architecture):
    """nvcc's PTX of csrc/cuda/<stem>.cu."""
    nvcc = required("nvcc")
    paths = [path for pattern in SOURCES for path in ROOT.glob(pattern) if path.suffix != ".cu" or path.stem == stem]
    command = [nvcc, "-ptx", f"-arch={architecture}", *NVCC_FLAGS, f"csrc/cuda/{stem}.cu", "-o"]
    file = BUILT / f"{stem}-{architecture}.ptx"
    return kept(file, paths, command, lambda target: subprocess.run([*command, str(target)], cwd=ROOT, check=True)).read_text()


def kernels_of(text):
    """The PTX of each kernel by its mangled name. What stands before the kernels may only name the shared memory."""
    common, *kernels = re.sub(r"//.*", "", text).split("\n.entry ")
    declared = re.sub(r"\.(version [\d.]+|target sm_\d+|address_size 64)\n", "", common).strip()
    shared = re.fullmatch(r"(?:\.extern \.shared \.align 16 \.b8 (\w+)\[\];)?", declared)
    assert shared, f"declarations that the machine does not know: {declared}"
    return {re.match(r"\w+", kernel)[0]: kernel.replace(shared[1] or "\0", "shared_memory") for kernel in kernels}


def of_both_compilers(name):
    """A mangled name without the name of the anonymous namespace."""
    return ANONYMOUS.sub("N", name)


@cache
def machine():
    """tests/ptx as a library."""
    # Without it there is nothing to run.
    required("nvcc")
    folder = ROOT / "tests/ptx"
    command = [
        required(os.environ.get("CXX", "g++")),
        *MACHINE_FLAGS,
        "-fPIC",
        "-shared",
        *map(str, sorted(folder.glob("*.cpp"))),
        "-o",
    ]
    path = kept(BUILT / "machine.so", folder.glob("*.[ch]*"), command, lambda target: subprocess.run([*command, str(target)], check=True))
    library = ctypes.CDLL(str(path))
    library.take_error.restype = ctypes.c_char_p
    return library


@cache
def addresses_of(stem):
    """Where the host's functions are that launchers take for kernels, by of_both_compilers."""
    path = compiled(stem, ".so")
    listed = subprocess.run(["nm", path], check=True, capture_output=True, text=True).stdout
    offsets = {symbol: int(offset, 16) for offset, symbol in re.findall(r"^(\w+) [tT] (\w+)$", listed, re.MULTILINE)}
    base = ctypes.cast(ctypes.CDLL(str(path)).begin_call, ctypes.c_void_p).value - offsets["begin_call"]
    return {of_both_compilers(symbol): base + offset for symbol, offset in offsets.items()}


def bind(stem, kernels):
    """The machine runs these kernels (kernels_of) from now on when a launcher of the stem launches them."""
    for name, text in kernels.items():
        machine().bind_kernel(ctypes.c_void_p(addresses_of(stem)[of_both_compilers(name)]), text.encode())


def marks_of(stem, run):
    """Of each kernel of the stem, a byte for each character of its text, which is 1 where run() executes the instruction."""
    load(stem)
    kernels = kernels_of(ptx_of(stem, "sm_90"))
    bind(stem, kernels)
    run()
    marks = {name: ctypes.create_string_buffer(len(text)) for name, text in kernels.items()}
    for name, buffer in marks.items():
        machine().mark_run(ctypes.c_void_p(addresses_of(stem)[of_both_compilers(name)]), buffer)
    return {name: buffer.raw for name, buffer in marks.items()}


@contextmanager
def planted(stem, fault, marks):
    """Kernels of the stem with a fault (tests/ptx/faults.py) instead of those that nvcc made, where marks_of is 1."""
    whole = kernels_of(ptx_of(stem, "sm_90"))
    faulty = {}
    for name, text in whole.items():
        matches = list(re.finditer(fault.old, text)) if re.search(fault.kernel, name) else []
        matches = [match for match in matches if any(marks[name][match.start() : match.end()])]
        if fault.which < len(matches):
            match = matches[fault.which]
            faulty[name] = text[: match.start()] + match.expand(fault.new) + text[match.end() :]
    if not faulty:
        raise LookupError(f"{fault.what}: nothing to replace")
    bind(stem, faulty)
    try:
        yield
    finally:
        bind(stem, {name: whole[name] for name in faulty})


def never_run(stem, pattern):
    """The kernels with such a name that no launcher has launched yet."""
    names = [name for name in kernels_of(ptx_of(stem, "sm_90")) if re.search(pattern, name)]
    assert names, pattern
    return [name for name in names if not machine().runs_of(ctypes.c_void_p(addresses_of(stem)[of_both_compilers(name)]))]


@cache
def load(stem):
    """The launchers of a stem, whose kernels run as PTX of sm_90."""
    bind(stem, kernels_of(ptx_of(stem, "sm_90")))
    host = ctypes.CDLL(str(compiled(stem, ".so")))
    runner = [ctypes.cast(getattr(machine(), name), ctypes.c_void_p) for name in ("launch_kernel", "allocated", "released", "filled")]
    call_host = simt_library.load(stem)

    def call(name, *arguments):
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and not DeviceMemory.knows(argument):
                allow(argument, True)
        # The library is the one that other tests run with fibers.
        host.run_on(*runner)
        try:
            call_host(name, *arguments)
        finally:
            host.run_on(*[None] * len(runner))
            error = machine().take_error().decode()
        assert not error, error

    return call


def allow(tensor, is_written):
    machine().allow(as_c(tensor), ctypes.c_size_t(tensor.nbytes), int(is_written))


class DeviceMemory(Guarded):
    """Tensors that the machine knows by their bounds; those of empty() must be written before they are read."""

    bounds: ClassVar = []

    @classmethod
    def knows(cls, tensor):
        begin = tensor.data_ptr()
        return any(first <= begin and begin + tensor.nbytes <= end for first, end in cls.bounds)

    def empty(self, count, dtype, *, offset=0):
        tensor = super().empty(count, dtype, offset=offset)
        allow(tensor, False)
        self.bounds.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
        return tensor

    def copy(self, tensor, *, offset=0):
        copied = super().copy(tensor, offset=offset)
        allow(copied, True)
        return copied

    def forget(self):
        self.bounds.clear()
        machine().forbid_all()
