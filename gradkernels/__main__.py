"""python -m gradkernels info | selftest | diagnose | bench, or --version.

info prints which operators have kernels on this machine, and why the others do not. selftest checks their
results (selftest.py). diagnose examines a user's model (diagnosis/command.py). bench runs bench/suite.py of
the checkout; an installed package does not contain it.
"""

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import gradkernels
from gradkernels import _native, text
from gradkernels.diagnosis import command

# The kernels support these on the devices that they were built for. torch's operators do the rest.
_DTYPES = "float32, float64, bfloat16 and float16"
_NORMS = ", norm_type 1, 2 and inf"
# What the native library adds to the portable one, which sends these calls to torch's operators.
_OF_ACTIVATIONS = "faster small calls; torch.func; views in place"
_OF_LISTS = "faster with many small gradients"
# operator -> further conditions of its kernels, and what the native library adds
_OPERATORS = {
    "leaky_relu": ("", _OF_ACTIVATIONS),
    "prelu": ("", _OF_ACTIVATIONS),
    "rrelu": ("", "kernels for training"),
    "elu": ("", _OF_ACTIVATIONS),
    "swish": ("", _OF_ACTIVATIONS),
    "batch_norm_act": ("", "faster small calls; torch.func; torch.compile; recompute; SyncBatchNormAct"),
    "group_norm_act": (", at least 48 pixels", "faster small calls; torch.func; torch.compile; recompute"),
    "clip_grad_norm_": (_NORMS, _OF_LISTS),
    "clip_grad_value_": ("", _OF_LISTS),
    "adaptive_clip_grad_": (_NORMS, _OF_LISTS),
    "grad_report": (_NORMS, _OF_LISTS),
    "optim.RMSprop": ("", _OF_LISTS),
}


def info() -> str:
    """Versions, instruction set, threads, CUDA, and for each operator what computes it and why."""
    kernels = _native.library()
    build = {} if kernels is None else kernels.build_info()
    is_native = _native.C is not None
    library = "built for" if is_native else "the portable library, built with"
    built_for = f"{library} torch {build['torch']}" if build else "no library in use"
    cuda = "torch.cuda available" if torch.cuda.is_available() else "torch.cuda not available"
    rows = [("gradkernels", f"{gradkernels.__version__}, commit {build.get('commit', 'unknown')}")]
    rows += [("torch", f"{torch.__version__}, {built_for}")]
    rows += [("Python", f"{platform.python_version()}, {sys.executable}")]
    rows += [("compiler", build.get("compiler", "unknown"))]
    if kernels is not None:
        rows += [("instruction set", f"{kernels.instruction_set()} in use, built: {' '.join(build['instruction_sets'])}")]
    rows += [("threads", str(torch.get_num_threads()))]
    rows += [("CUDA", f"built: {' '.join(build.get('cuda_architectures', [])) or 'none'}; {cuda}")]
    devices = "the CPU and CUDA" if build.get("cuda_architectures") else "the CPU"
    table = [("operator", "computed by", "why", "" if is_native or kernels is None else "the native library adds")]
    for operator, (conditions, adds) in _OPERATORS.items():
        why = f"{_DTYPES} on {devices}{conditions}; else torch"
        if is_native:
            table += [(operator, "native", why, "")]
        elif kernels is None:
            table += [(operator, "reference", str(_native.reason), "")]
        elif operator == "rrelu":
            table += [(operator, "reference", "only the native library has a kernel", adds)]
        else:
            table += [(operator, "portable", why, adds)]
    lines = [*text.columns(rows, left=range(2)), "", *text.columns(table, left=range(4)), ""]
    if is_native:
        _, reason = _native.load_portable()
        after = "the portable library computes" if reason is None else f"torch's operators compute, because {reason}"
        return "\n".join([*lines, f"After an update of torch {after}."])
    if kernels is None:
        lines += [f"And {_native.portable_reason}. To fix this, run: {_native.remedy}"]
    else:
        lines += [f"Not native: {_native.reason}. To build it, run: {_native.remedy}"]
    return "\n".join(lines)


def bench(arguments: list[str]) -> int:
    """The benchmark in a process of its own, or the reason why there is none."""
    suite = Path(gradkernels.__file__).resolve().parent.parent / "bench" / "suite.py"
    if not suite.exists():
        print(
            f"The benchmark is not part of the installed package (there is no {suite}).\n"
            "It is the folder bench/ of the repository: clone it and type make bench there.",
            file=sys.stderr,
        )
        return 2
    return subprocess.run([sys.executable, str(suite), *arguments], check=False).returncode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gradkernels")
    parser.add_argument("--version", action="version", version=f"gradkernels {gradkernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="which operators have kernels here, and why the others do not")
    commands.add_parser("selftest", help="compare every operator with torch's: a table, and exit status 0 if all are right")
    commands.add_parser("diagnose", help="which layers of your model do not learn, why, and what to do", add_help=False)
    commands.add_parser("bench", help="measure every operator against torch's on this machine", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        return bench(rest)
    if arguments.command == "diagnose":
        return command.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "selftest":
        from gradkernels import selftest

        return selftest.main(gradkernels)
    print(info())
    return 0


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as head, has seen enough. Python would flush stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
