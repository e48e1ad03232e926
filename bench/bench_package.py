"""What the package costs before it computes anything: the seconds of its import, beside torch's.

Each sample is a process of its own, since a process imports once; there torch comes first. What a build takes: bench_build.py.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, Budget, arguments, header, report, spread

LEAST_SAMPLES, MOST_SAMPLES = 3, 15
IMPORTS = (
    "from time import perf_counter; start = perf_counter(); import torch; middle = perf_counter(); import gradkernels; "
    "print(middle - start, perf_counter() - middle)"
)


@dataclass
class Row:
    case: str
    provider: str
    median_s: float
    p20_s: float
    p80_s: float
    samples: int


def printed_by(*command: str, folder: Path = ROOT, **environment: str) -> str:
    process = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}\n{process.stdout}\n{process.stderr}")
    return process.stdout


def row(what: str, provider: str, seconds: Sequence[float]) -> Row:
    p20, median, p80 = spread(seconds) if len(seconds) > 1 else tuple(seconds) * 3
    return Row(what, provider, median, p20, p80, len(seconds))


def imports(quick: bool, until: float) -> list[Row]:
    samples: list[list[float]] = []
    # The first process finds files that nothing has read yet.
    printed_by(sys.executable, "-W", "error", "-c", IMPORTS)
    least, most = (1, 1) if quick else (LEAST_SAMPLES, MOST_SAMPLES)
    while len(samples) < least or (len(samples) < most and time.monotonic() < until):
        samples.append([float(each) for each in printed_by(sys.executable, "-W", "error", "-c", IMPORTS).split()])
    of_torch, of_ours = zip(*samples, strict=True)
    return [row("import torch", "eager", of_torch), row("import gradkernels, after torch", "gradkernels", of_ours)]


COLUMNS: dict[str, Callable[[Any], str]] = {
    "case": lambda row: row.case,
    "median s": lambda row: f"{row.median_s:.3f}",
    "p20": lambda row: f"{row.p20_s:.3f}",
    "p80": lambda row: f"{row.p80_s:.3f}",
    "samples": lambda row: str(row.samples),
}


if __name__ == "__main__":
    options = arguments(__doc__)
    head = header()
    report("the package", head, COLUMNS, imports(options.quick, Budget(options.seconds, 1).share()), options.json)
