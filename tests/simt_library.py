"""Compiles the kernels of csrc/cuda for the host (tests/simt) and calls them on CPU tensors.

load("activation") is csrc/cuda/activation.cu with its launchers, bound by tests/simt/activation.cpp.
races("activation") runs the main function of this file under ThreadSanitizer. Both are kept in build/simt,
and their names contain a hash of all their sources. Tensors that kernels write come from Guarded, which fails
a test that writes outside of them.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build/simt"
SOURCES = ("csrc/common/*.h", "csrc/math/*.h", "csrc/ops/*.h", "csrc/cuda/*", "tests/simt/*")
# The flags of setup.py with less optimisation, so that a kernel compiles in seconds.
FLAGS = (
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Itests/simt",
    "-Icsrc",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
)
RACES = ("-g", "-DSIMT_RACES")
CANARY = 0x5A
CANARY_BYTES = 256

# DType of csrc
DTYPE_NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def compiled(stem, output, *, races=False):
    """The shared library of a stem or, with races=True, its program. It is built if it does not exist yet."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler to compile the kernels for the host")
    paths = [path for pattern in SOURCES for path in ROOT.glob(pattern) if path.suffix != ".cu" or path.stem == stem]
    return kept(BUILT / f"{stem}{output}", paths, (compiler, FLAGS, RACES), lambda target: build(compiler, stem, target, races))


def kept(file, paths, command, make):
    """The file with a hash of the sources and the command in its name, made by make(path) if it does not exist yet."""
    content = hashlib.sha256(repr(command).encode())
    for path in sorted(paths):
        content.update(path.name.encode() + path.read_bytes())
    target = file.with_name(f"{file.stem}-{content.hexdigest()[:16]}{file.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        # One worker of pytest-xdist makes it, the others wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            mine = target.with_suffix(f".{os.getpid()}")
            make(mine)
            os.replace(mine, target)
    return target


def build(compiler, stem, target, races):
    common = [compiler, *FLAGS, "-fPIC", *(RACES if races else ())]
    sanitized = ["-fsanitize=thread"] if races else []
    shim, kernels = f"{target}.shim.o", f"{target}.kernels.o"
    jobs = [
        subprocess.Popen([*common, "-c", "tests/simt/simt.cpp", "-o", shim], cwd=ROOT),
        subprocess.Popen([*common, *sanitized, "-c", "-x", "c++", f"csrc/cuda/{stem}.cu", "-o", kernels], cwd=ROOT),
    ]
    assert not any([job.wait() for job in jobs]), f"{stem} does not compile for the host"
    link = [*common, *sanitized, *(() if races else ("-shared",)), f"tests/simt/{stem}.cpp", shim, kernels, "-o", str(target)]
    subprocess.run(link, cwd=ROOT, check=True)
    for each in (shim, kernels):
        os.unlink(each)


def load(stem):
    """The launchers of a stem, as ctypes functions that return nothing."""
    library = ctypes.CDLL(str(compiled(stem, ".so")))

    def call(name, *arguments):
        library.begin_call()
        function = getattr(library, name)
        function.restype = None
        function(*(as_c(argument) for argument in arguments))

    def sectors(name, *arguments):
        """Calls the launcher; returns its 32-byte sectors: (touched, needed) by loads and by stores."""
        found = (ctypes.c_int64 * 4)()
        library.count_sectors(1)
        try:
            call(name, *arguments)
        finally:
            library.count_sectors(0)
        library.sectors(found)
        return {"loads": tuple(found[:2]), "stores": tuple(found[2:])}

    call.sectors = sectors
    return call


def as_c(argument):
    """The argument for ctypes: a tensor's address, a dtype's number in DType, a null pointer for None."""
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, ctypes.Array):
        return argument
    if isinstance(argument, torch.dtype):
        return ctypes.c_int(DTYPE_NUMBERS[argument])
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return ctypes.c_int64(argument)


class Guarded:
    """Makes tensors of chosen alignment between canary bytes, and checks that no canary was written."""

    def __init__(self):
        self.memories = []

    def empty(self, count, dtype, *, offset=0):
        """`count` elements that begin `offset` elements after an address that is aligned to a packet."""
        size = torch.empty(0, dtype=dtype).element_size()
        memory = torch.full((2 * CANARY_BYTES + (offset + count) * size,), CANARY, dtype=torch.uint8)
        begin = CANARY_BYTES - memory.data_ptr() % 16 + offset * size
        self.memories.append((memory, begin, begin + count * size))
        return torch.frombuffer(memory.numpy(), dtype=dtype, count=count, offset=begin) if count else torch.empty(0, dtype=dtype)

    def copy(self, tensor, *, offset=0):
        return self.empty(tensor.numel(), tensor.dtype, offset=offset).copy_(tensor.flatten())

    def check(self):
        for memory, begin, end in self.memories:
            outside = torch.cat([memory[:begin], memory[end:]])
            assert (outside == CANARY).all(), "a kernel wrote outside of its tensors"


def races(stem, **settings):
    """ThreadSanitizer's reports on a run of the stem's main function. tests/simt/simt.cpp lists the settings."""
    program = compiled(stem, "", races=True)
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    # The sanitizer of older compilers does not start with randomised addresses.
    command = ["setarch", platform.machine(), "-R", str(program)] if shutil.which("setarch") else [str(program)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in run.stderr or "personality" in run.stderr:
        pytest.skip(f"ThreadSanitizer does not start here: {run.stderr.splitlines()[0]}")
    assert run.returncode in (0, 66), run.stderr
    return re.sub(r"=+\n", "", run.stderr)
