"""python -m gradkernels info | selftest | diagnose | bench, or --version.

info prints what is native on this machine, and why the rest is not; selftest checks what it computes (selftest.py); diagnose looks at a
user's own model (diagnosis/command.py); bench runs bench/suite.py of the checkout that this package stands in, since an installed package
has none.
"""

import argparse
import platform
import subprocess
import sys
from pathlib import Path

import torch

import gradkernels
from gradkernels import _native
from gradkernels.diagnosis import command

# What every kernel serves, on the devices that it was built for; the rest goes to torch's own operators.
_DTYPES = "float32, float64, bfloat16 and float16"
# operator -> what its kernels ask for besides
_SERVED = {
    "leaky_relu": "",
    "prelu": "",
    "rrelu": "",
    "elu": "",
    "swish": "",
    "batch_norm_act": "",
    "clip_grad_norm_": ", norm_type 1, 2 and inf",
    "clip_grad_value_": "",
    "grad_report": ", norm_type 1, 2 and inf",
    "optim.RMSprop": "",
}


def info() -> str:
    """The whole state: versions, instruction set, threads, CUDA, and per operator who serves it and why."""
    native = _native.C
    build = {} if native is None else native.build_info()
    built_for = f"built for torch {build['torch']}" if build else "no native library in use"
    cuda = "torch.cuda available" if torch.cuda.is_available() else "torch.cuda not available"
    rows = [("gradkernels", f"{gradkernels.__version__}, commit {build.get('commit', 'unknown')}")]
    rows += [("torch", f"{torch.__version__}, {built_for}")]
    rows += [("Python", f"{platform.python_version()}, {sys.executable}")]
    rows += [("compiler", build.get("compiler", "unknown"))]
    if native is not None:
        rows += [("instruction set", f"{native.instruction_set()} in use, built: {' '.join(build['instruction_sets'])}")]
    rows += [("threads", str(torch.get_num_threads()))]
    rows += [("CUDA", f"built: {' '.join(build.get('cuda_architectures', [])) or 'none'}; {cuda}")]
    lines = [f"{name:<16}  {state}" for name, state in rows]

    lines += ["", f"{'operator':<16}  {'served by':<10}  why"]
    devices = "the CPU and CUDA" if build.get("cuda_architectures") else "the CPU"
    for operator, besides in _SERVED.items():
        served = f"{_DTYPES} on {devices}{besides}"
        served_by, why = ("native", f"{served}; else torch") if native is not None else ("reference", str(_native.reason))
        lines += [f"{operator:<16}  {served_by:<10}  {why}"]
    if native is None:
        lines += ["", f"To mend it: {_native.remedy}"]
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
    commands.add_parser("info", help="what is native here, and why the rest is not")
    commands.add_parser("selftest", help="whether every operator computes here what torch does: a table, and status 0 if so")
    commands.add_parser("diagnose", help="which layers of your model do not learn, why, and what to do", add_help=False)
    commands.add_parser("bench", help="every operator compared with torch's on this machine", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        return bench(rest)
    if arguments.command == "diagnose":
        return command.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "selftest":
        from gradkernels import selftest

        return selftest.main()
    print(info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
