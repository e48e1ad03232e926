"""What the package costs before it computes anything: seconds that its import adds to torch's, and with --build the time of a clean build.

Imports are measured in pairs of new processes, one after the other, since a process imports once; the build compiles a copy of the files
that git does not ignore, with two jobs.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT, arguments, header, report

PAIRS = 7
JOBS = 2


@dataclass
class Row:
    what: str
    median_s: float
    least_s: float
    most_s: float
    samples: int


def seconds_to_run(*command: str, folder: Path = ROOT, **environment: str) -> float:
    start = time.perf_counter()
    process = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}\n{process.stdout}\n{process.stderr}")
    return time.perf_counter() - start


def row(what: str, seconds: list[float]) -> Row:
    return Row(what, statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def imports(pairs: int) -> list[Row]:
    python = (sys.executable, "-W", "error", "-c")
    seconds_to_run(*python, "import torch, gradkernels")
    alone, both = [], []
    for _ in range(pairs):
        alone.append(seconds_to_run(*python, "import torch"))
        both.append(seconds_to_run(*python, "import torch, gradkernels"))
    added = [two - one for one, two in zip(alone, both, strict=True)]
    return [
        row("process that imports torch", alone),
        row("process that imports torch and gradkernels", both),
        row("added by gradkernels", added),
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
    return row(f"clean native build, {JOBS} jobs", [seconds])


if __name__ == "__main__":
    options = arguments(__doc__, "build")
    rows = imports(1 if options.quick else PAIRS)
    if options.build:
        rows.append(build())
    report(
        "the package",
        header(),
        {
            "case": lambda row: row.what,
            "median s": lambda row: f"{row.median_s:.3f}",
            "least": lambda row: f"{row.least_s:.3f}",
            "most": lambda row: f"{row.most_s:.3f}",
            "samples": lambda row: str(row.samples),
        },
        rows,
        options.json,
    )
