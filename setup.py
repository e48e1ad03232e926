"""Builds two libraries with torch's BuildExtension; the metadata is in pyproject.toml.

gradkernels._C is the native library, for the torch of this build. gradkernels/_portable.so has the same kernels of
the CPU for every torch, and is no Python module: gradkernels/portable.py calls its C functions. With
GRADKERNELS_PORTABLE=1 only the second is built, and a wheel fits every Python.

This file selects the sources and the flags, and writes build_stamp.h, with which csrc/build_info.cpp says how
a library was built.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from glob import glob
from gzip import GzipFile
from pathlib import Path

TO_TYPE = """With torch installed, type

    pip install "setuptools>=77" ninja
    pip install --no-build-isolation .
"""
try:
    import setuptools
    import torch
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.sdist import sdist
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    sys.exit(
        f"gradkernels: {error}.\n"
        "gradkernels must be compiled for the torch that runs it, with setuptools 77 or newer. pip's isolated build has no torch.\n"
        f"{TO_TYPE}"
    )
if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f"gradkernels: setuptools {setuptools.__version__} is too old to read pyproject.toml. {TO_TYPE}")

# torch's version is in the folder's name, so that another torch changes every compile command. ninja does not
# notice other headers of torch, because they are included with -isystem.
STAMP = Path("build/generated", torch.__version__, "build_stamp.h").absolute()

CUDA_FOUND = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None and torch.cuda.is_available()
CUDA = CUDA_FOUND or os.environ.get("FORCE_CUDA") == "1"
CUDA_SOURCES = glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp") if CUDA else []
# Of both libraries.
KERNELS = sorted(["csrc/build_info.cpp", *glob("csrc/cpu/*.cpp")])
# The files that include torch are compiled through those of units/.
SOURCES = sorted([*KERNELS, *glob("csrc/units/*.cpp"), *CUDA_SOURCES])
PORTABLE = "gradkernels._portable"
PORTABLE_ONLY = os.environ.get("GRADKERNELS_PORTABLE") == "1"

# -fno-math-errno and -fno-trapping-math let loops vectorise and change no value. -ffp-contract=off uses fma
# only where the source says so, so that forward and backward agree. -g0 undoes the -g among Python's flags.
# -isystem, in addition to torch's -I, hides warnings about torch's headers.
CXX_FLAGS = [
    # Our flags come after CFLAGS, so ours would override an -O there.
    *([] if re.search(r"(^|\s)-O", os.environ.get("CFLAGS", "")) else ["-O2"]),
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    # A write beyond an array ends the process: on the stack, and in functions of the C library that know the
    # size. -U is for distributions that define the macro.
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
# All symbols are bound when the library is loaded. Then a missing symbol is an import error, and the table of
# symbols is read-only.
LINK_FLAGS = ["-Wl,-z,relro,-z,now"] if sys.platform == "linux" else []
if CUDA_SOURCES:
    CXX_FLAGS.append("-DGK_WITH_CUDA")
NVCC_FLAGS = ["-O2", "-fmad=false", "-Xcompiler=-fvisibility=hidden"]


def commit() -> str:
    """The commit, with -dirty if tracked files differ from it; unknown outside git, such as in an sdist."""
    if not Path(".git").exists():
        return "unknown"
    try:
        describe = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cuda_architectures() -> str:
    """The targets of nvcc, such as "sm_80 sm_90 compute_90", from the flags that torch passes."""
    return " ".join(re.findall(r",code=(\w+)", " ".join(cpp_extension._get_cuda_arch_flags()))) if CUDA_SOURCES else ""


class BuildLibraries(cpp_extension.BuildExtension):
    def _define_torch_extension_name(self, extension: setuptools.Extension) -> None:
        """Leaves out the macro, so that one command compiles a kernel for both libraries, and ninja runs it once.

        csrc/common/library.h would also name the operators after it.
        """

    def get_ext_filename(self, ext_name: str) -> str:
        filename = super().get_ext_filename(ext_name)
        # Without the part that names a Python.
        return filename.partition(".")[0] + ".so" if ext_name.endswith("_portable") else filename

    def build_extensions(self) -> None:
        compiler = cpp_extension.get_cxx_compiler()
        if shutil.which(compiler) is None:
            sys.exit(
                f"gradkernels: the C++ compiler {compiler} was not found. Install one (apt-get install g++, or dnf install gcc-c++), or\n"
                "set the environment variable CXX to another compiler."
            )
        stamp = (
            f'#define GK_BUILT_FOR_TORCH "{torch.__version__}"\n'
            f'#define GK_COMMIT "{commit()}"\n'
            f'#define GK_CUDA_ARCHITECTURES "{cuda_architectures()}"\n'
        )
        # Written only if it differs, because ninja compiles build_info.cpp again after every write.
        if not STAMP.exists() or STAMP.read_text() != stamp:
            STAMP.parent.mkdir(parents=True, exist_ok=True)
            STAMP.write_text(stamp)
        super().build_extensions()


# Find a ninja installed for this interpreter also if its environment is not activated. Without ninja, torch
# compiles one file at a time.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


class Sdist(sdist):
    """With SOURCE_DATE_EPOCH, the same files give the same bytes."""

    def make_archive(self, base_name: str, format: str, *args: str | None, **kwargs: str | None) -> str:
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None:
            return super().make_archive(base_name, format, *args, **kwargs)

        def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = int(epoch)
            member.mode = 0o755 if member.mode & 0o100 else 0o644
            return member

        Path(base_name).parent.mkdir(parents=True, exist_ok=True)
        with (
            open(f"{base_name}.tar.gz", "wb") as file,
            GzipFile("", "wb", 9, file, int(epoch)) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            # add() walks a folder in the order of the names.
            archive.add(kwargs["base_dir"], filter=anonymous)
        return f"{base_name}.tar.gz"


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if PORTABLE_ONLY else (python, abi, platform)


def extension(name: str, sources: list[str]) -> setuptools.Extension:
    kind = cpp_extension.CUDAExtension if CUDA_SOURCES else cpp_extension.CppExtension
    return kind(
        name,
        sources,
        include_dirs=[os.path.abspath("csrc"), str(STAMP.parent)],
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cpp", recursive=True)),
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=LINK_FLAGS,
    )


portable = extension(PORTABLE, [*KERNELS, "csrc/portable.cpp"])
# torch's thread pool.
portable.libraries = ["torch_cpu"]
setuptools.setup(
    ext_modules=[portable] if PORTABLE_ONLY else [extension("gradkernels._C", SOURCES), portable],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel, "sdist": Sdist},
)
