"""Every bench script in turn, each in a process of its own: python -m gradkernels bench

A script replaces its own file in FOLDER/<machine>/ and leaves the others; FOLDER/<machine>.md and .png are made of all of them. FOLDER is
bench/results, for a quick run a new temporary folder. --isa sets the instruction set in the processes that are started, for gradkernels,
torch, its compiler and oneDNN alike: the machine shows what one without the others will see, and its results have a folder of their own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report

HERE = Path(__file__).resolve().parent
# The names that torch and gradkernels, oneDNN, and MKL have for a set. torch uses a set even if the processor lacks it.
ISA = {"base": ("default", "SSE41", "SSE4_2"), "avx2": ("avx2", "AVX2", "AVX2")}
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
PRINT_ISA = "from gradkernels import _native; print(_native.C.instruction_set() if _native.C else 'no native library')"


def main(argv: list[str] | None = None) -> int:
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    parser = argparse.ArgumentParser(prog="python -m gradkernels bench", description="every operator compared with torch's on this machine")
    parser.add_argument("--only", choices=scripts, metavar="SCRIPT", help=f"one script: {', '.join(scripts)}")
    parser.add_argument("--quick", action="store_true", help="below one minute: shows that everything runs, not how fast")
    parser.add_argument("--isa", choices=ISA, help="use no instructions beyond these; base is what every x86-64 has")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="only compare two folders of results")
    options = parser.parse_args(argv)
    if options.compare:
        return report.compare(*options.compare)
    environment = dict(os.environ)
    if options.isa:
        environment |= dict(zip(VARIABLES, ISA[options.isa], strict=True))
        command = [sys.executable, "-c", PRINT_ISA]
        found = subprocess.run(command, cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        if found != options.isa:
            parser.error(f"--isa {options.isa} cannot be measured on this processor, where gradkernels then uses: {found}")

    folder = options.out or (Path(tempfile.mkdtemp(prefix="gradkernels-bench-")) if options.quick else HERE / "results")
    began, failed = time.time(), []
    for stem in [options.only] if options.only else scripts:
        command = [sys.executable, str(scripts[stem]), "--out", str(folder.resolve()), *["--quick"] * options.quick]
        try:
            status = subprocess.run(command, cwd=HERE.parent, env=environment, check=False).returncode
        except KeyboardInterrupt:
            status = None
        failed += [stem] if status != 0 else []
        if status is None:
            break
    # A GPU's results have a folder of their own.
    for machine in sorted({file.parent for file in folder.glob("*/*.json") if file.stat().st_mtime >= began - 1}):
        print(*report.publish(machine), sep="\n")
    print(f"{time.time() - began:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
