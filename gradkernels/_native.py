"""Finds and loads a library, decides which calls it computes, and raises the error for torch.jit.script.

The native library is gradkernels._C, which is built for one torch. Without it the portable library (portable.py)
computes, and without both, reference.py does. A native library built for another torch fails to load with a
mangled symbol, or crashes later. So the torch version in the file is read before the file is loaded. Nothing is
raised: `reason` says why the native library cannot be used, `portable_reason` why the portable one cannot be
either, and `remedy` is the command that builds both.
"""

import importlib
import shlex
import struct
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from gradkernels import portable

_STAMP = b"gradkernels-built-for-torch="
_FOLDER = Path(__file__).resolve().parent

# torch's dispatcher handles fake tensors, functorch and autograd for our operators. Other subclasses
# (DTensor, a user's) may not support our operators, so they get the reference, which calls torch's.
_SUPPORTED = frozenset((Tensor, Parameter, FakeTensor, type(None)))


def _is_whole(image: mmap) -> bool:
    """Whether an ELF file contains all of its segments. Loading a truncated file can end in SIGBUS."""
    if image[:5] != b"\x7fELF\x02":
        return True
    (offset,) = struct.unpack_from("<Q", image, 32)
    size, count = struct.unpack_from("<HH", image, 54)
    segments = (struct.unpack_from("<8xQ16xQ", image, offset + size * i) for i in range(count))
    return all(start + length <= len(image) for start, length in segments)


def _built_for(library: Path) -> str | None:
    """The torch version stamped into the file; None without a stamp or if the file is truncated."""
    try:
        with library.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as image:
            start = image.find(_STAMP)
            if start < 0 or not _is_whole(image):
                return None
            start += len(_STAMP)
            return image[start : image.find(b"\0", start)].decode(errors="replace")
    except (OSError, ValueError, OverflowError, struct.error):
        return None


def native_file() -> Path | None:
    """The file of the native library, whether it can be used or not."""
    return next((_FOLDER / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES if (_FOLDER / f"_C{suffix}").exists()), None)


def _load_native() -> tuple[ModuleType | None, str | None]:
    """gradkernels._C and None; or None and the reason."""
    library = native_file()
    if library is None:
        return None, f"the native library has not been built (_C{EXTENSION_SUFFIXES[0]} is missing in the folder of the package)"
    built_for = _built_for(library)
    if built_for is None:
        return None, f"{library.name} is damaged (it does not say which torch it was built for)"
    if built_for != torch.__version__:
        return None, f"{library.name} was built for torch {built_for}, but this is torch {torch.__version__}"
    try:
        return importlib.import_module(f"{__package__}._C"), None
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        return None, f"{library.name} does not load ({type(error).__name__}: {first_line})"


def load_portable() -> tuple[ModuleType | None, str | None]:
    """gradkernels.portable and None; or None and the reason."""
    library = _FOLDER / "_portable.so"
    if not library.exists():
        return None, f"the portable library has not been built ({library.name} is missing in the folder of the package)"
    if _built_for(library) is None:
        return None, f"{library.name} is damaged"
    try:
        portable.load(library)
    except Exception as error:
        return None, f"{library.name} does not load ({type(error).__name__}: {error})"
    return portable, None


def _remedy() -> str:
    """One command line for the running interpreter. A checkout is imported in place, so it is built there."""
    python = shlex.quote(sys.executable)
    if (_FOLDER.parent / "setup.py").exists():
        return f"cd {shlex.quote(str(_FOLDER.parent))} && {python} setup.py build_ext --inplace --force"
    return f"{python} -m pip install --no-build-isolation --force-reinstall --no-deps .  # in the source folder of gradkernels"


C, reason = _load_native()
PORTABLE, portable_reason = load_portable() if C is None else (None, None)
remedy = _remedy()


def is_exported() -> bool:
    """Whether torch.export (not strict=True) records this call; its program may run without gradkernels."""
    # is_exporting() of torch 2.11 is True under torch.compile too.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def is_for_onnx() -> bool:
    """Whether torch.onnx records this call, through torch.jit.trace or torch.export."""
    # is_in_onnx_export() takes a microsecond, so it comes last. torch.compile cannot trace _is_tracing().
    return (torch.compiler.is_compiling() or torch._C._is_tracing()) and torch.onnx.is_in_onnx_export()


def library(*tensors: Tensor | None) -> ModuleType | None:
    """C or PORTABLE, which have the same functions, if this is an eager call and they support the types of these tensors."""
    kernels = PORTABLE if C is None else C
    if kernels is None or torch.compiler.is_compiling() or not _SUPPORTED.issuperset(map(type, tensors)):
        return None
    return None if torch._C._is_tracing() and is_for_onnx() else kernels


def uses_custom_operator(*tensors: Tensor | None) -> bool:
    """Whether torch.compile or torch.export must record torch.ops.gradkernels, as they cannot trace _C."""
    if C is None or not torch.compiler.is_compiling() or is_for_onnx():
        return False
    return _SUPPORTED.issuperset(map(type, tensors))


_UNSCRIPTABLE = (
    "is computed by gradkernels, which torch.jit.script cannot compile: use torch.export or torch.jit.trace, or script the model before "
    "gradkernels.convert (gradkernels.revert undoes the conversion)"
)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def refuse_script(module: nn.Module) -> NoReturn:
    """For __prepare_scriptable__, which torch.jit.script calls on every module before it compiles any."""
    raise RuntimeError(f"{type(module).__name__} {_UNSCRIPTABLE}")


def unscriptable(function: _Function) -> _Function:
    """Marks a function as torch marks torch.autocast, so that torch.jit.script raises our error."""
    cast(Any, function).__script_unsupported = f"{function.__name__} {_UNSCRIPTABLE}"
    return function
