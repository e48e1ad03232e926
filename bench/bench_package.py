"""What the package costs before it computes anything: seconds that its import adds to torch's, and with --build the time of a clean build.

Imports are measured in pairs of new processes, one after the other, since a process imports once; the build compiles a copy of the files
that git does not ignore, with two jobs.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT, Budget, arguments, header, report, spread

LEAST_PAIRS, MOST_PAIRS = 3, 11
JOBS = 2


@dataclass
class Row:
    case: str
    provider: str
    median_s: float
    p20_s: float
    p80_s: float
    samples: int


def seconds_to_run(*command: str, folder: Path = ROOT, **environment: str) -> float:
    start = time.perf_counter()
    process = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}\n{process.stdout}\n{process.stderr}")
    return time.perf_counter() - start


def row(what: str, provider: str, seconds: list[float]) -> Row:
    p20, median, p80 = spread(seconds) if len(seconds) > 1 else seconds * 3
    return Row(what, provider, median, p20, p80, len(seconds))


def imports(quick: bool, until: float) -> list[Row]:
    python = (sys.executable, "-W", "error", "-c")
    seconds_to_run(*python, "import torch, gradkernels")
    alone, both = [], []
    while not alone or (not quick and len(alone) < MOST_PAIRS and (len(alone) < LEAST_PAIRS or time.monotonic() < until)):
        alone.append(seconds_to_run(*python, "import torch"))
        both.append(seconds_to_run(*python, "import torch, gradkernels"))
    added = [two - one for one, two in zip(alone, both, strict=True)]
    return [
        row("process that imports torch", "eager", alone),
        row("process that imports torch and gradkernels", "gradkernels", both),
        row("what gradkernels adds to it, pair by pair", "gradkernels", added),
    ]


def build() -> Row:
    """Files that git does not ignore, in a folder without anything built."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        for name in listed.rstrip("\0").split("\0"):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        seconds = seconds_to_run(sys.executable, "setup.py", "build_ext", "--inplace", folder=Path(folder), MAX_JOBS=str(JOBS))
    return row(f"clean native build, {JOBS} jobs", "gradkernels", [seconds])


if __name__ == "__main__":
    options = arguments(__doc__, "build")
    head = header()
    rows = imports(options.quick, Budget(options.seconds, 1).share())
    if options.build:
        rows.append(build())
    report(
        "the package",
        head,
        {
            "case": lambda row: row.case,
            "median s": lambda row: f"{row.median_s:.3f}",
            "p20": lambda row: f"{row.p20_s:.3f}",
            "p80": lambda row: f"{row.p80_s:.3f}",
            "samples": lambda row: str(row.samples),
        },
        rows,
        options.json,
    )
