"""How long a clean build of the library takes, once: minutes, so that it runs only when it is asked for, and not at all with --quick.

It compiles a copy of the files that git does not ignore, in a folder without anything built.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_package import COLUMNS, printed_by, row
from harness import ROOT, arguments, header, report

JOBS = 2


def build() -> float:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        for name in listed.rstrip("\0").split("\0"):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        start = time.perf_counter()
        printed_by(sys.executable, "setup.py", "build_ext", "--inplace", folder=Path(folder), MAX_JOBS=str(JOBS))
        return time.perf_counter() - start


if __name__ == "__main__":
    options = arguments(__doc__)
    head = header()
    if options.quick:
        print("a build is never quick: nothing is measured", file=sys.stderr)
    else:
        report("a clean build", head, COLUMNS, [row(f"setup.py build_ext, {JOBS} jobs", "gradkernels", [build()])], options.json)
