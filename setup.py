"""Builds gradkernels._C with torch's BuildExtension; the metadata is in pyproject.toml.

Decided here: which sources are compiled, with which flags, and what the library remembers of its build (build_stamp.h, which
csrc/module.cpp includes).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    sys.exit(
        f"gradkernels: {error}.\n"
        "gradkernels is compiled for the torch that will run it, and pip's isolated build has no torch. With torch installed, type\n"
        "\n"
        '    pip install "setuptools>=77" ninja\n'
        "    pip install --no-build-isolation .\n"
    )

from setuptools import setup

# The folder carries torch's version so that another torch changes every compile command: -isystem hides torch's headers from ninja.
STAMP = Path("build/generated", torch.__version__, "build_stamp.h").absolute()

CUDA_FOUND = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None and torch.cuda.is_available()
CUDA = CUDA_FOUND or os.environ.get("FORCE_CUDA") == "1"
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp")) if CUDA else []
SOURCES = sorted(set(glob("csrc/**/*.cpp", recursive=True)) - set(glob("csrc/cuda/*.cpp")))

# -fno-math-errno and -fno-trapping-math let loops vectorise and change no value; -ffp-contract=off leaves fma to where it is written, so
# that forward and backward agree. Python's own flags come first, with -g on most machines: -g0 takes that back. With -isystem beside the -I
# that torch passes, warnings are about our code only.
CXX_FLAGS = [
    # An -O in CFLAGS would be taken back by ours, which comes after it.
    *([] if re.search(r"(^|\s)-O", os.environ.get("CFLAGS", "")) else ["-O2"]),
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    # A write beyond an array on the stack ends the process, and so do the C library's own where it knows the size. -U: some distributions
    # define it already.
    "-fstack-protector-strong",
    "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=2",
    "-Wall",
    "-Wextra",
    # An activation without a case of its own in one of the switches over ActivationKind does not compile.
    "-Werror=switch",
    "-Wno-unused-parameter",
    "-Wno-maybe-uninitialized",
    *(f"-isystem{path}" for path in cpp_extension.include_paths()),
]
# Every symbol is bound when the library is loaded, where a missing one is an import error, and the table of them is then read-only.
LINK_FLAGS = ["-Wl,-z,relro,-z,now"] if sys.platform == "linux" else []
if CUDA_SOURCES:
    CXX_FLAGS.append("-DGK_WITH_CUDA")
NVCC_FLAGS = ["-O2", "-fmad=false", "-Xcompiler=-fvisibility=hidden"]


def commit() -> str:
    """The commit being built, with -dirty where tracked files differ from it; unknown outside git, as in an sdist."""
    if not Path(".git").exists():
        return "unknown"
    try:
        describe = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cuda_architectures() -> str:
    """sm_80 sm_90 compute_90: what nvcc is told to make, from the flags torch will pass."""
    return " ".join(re.findall(r",code=(\w+)", " ".join(cpp_extension._get_cuda_arch_flags()))) if CUDA_SOURCES else ""


class BuildWithStamp(cpp_extension.BuildExtension):
    def build_extensions(self) -> None:
        compiler = cpp_extension.get_cxx_compiler()
        if shutil.which(compiler) is None:
            sys.exit(
                f"gradkernels: there is no C++ compiler, {compiler} is not found. Install one (apt-get install g++, or dnf install\n"
                "gcc-c++), or name the one to use in the environment variable CXX."
            )
        stamp = (
            f'#define GK_BUILT_FOR_TORCH "{torch.__version__}"\n'
            f'#define GK_COMMIT "{commit()}"\n'
            f'#define GK_CUDA_ARCHITECTURES "{cuda_architectures()}"\n'
        )
        # Left alone when nothing changed, so that ninja compiles module.cpp again only when it must.
        if not STAMP.exists() or STAMP.read_text() != stamp:
            STAMP.parent.mkdir(parents=True, exist_ok=True)
            STAMP.write_text(stamp)
        super().build_extensions()


# A ninja installed beside this interpreter is found though its environment is not activated. Without ninja torch compiles file by file.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

Extension = cpp_extension.CUDAExtension if CUDA_SOURCES else cpp_extension.CppExtension
setup(
    ext_modules=[
        Extension(
            "gradkernels._C",
            SOURCES + CUDA_SOURCES,
            include_dirs=[os.path.abspath("csrc"), str(STAMP.parent)],
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
            extra_link_args=LINK_FLAGS,
        )
    ],
    cmdclass={"build_ext": BuildWithStamp},
)
