"""Every bench script in turn, each in a process of its own, and what they found as one file, a table and pictures.

  python -m gradkernels bench [--only STEM] [--quick] [--out FOLDER]

Writes FOLDER/<machine>.json, .md and _*.png; FOLDER is bench/results. How long each script may take stands in harness.py. With --quick a
run says that everything works, and its numbers say nothing, so it writes into a new temporary folder unless --out names one.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import pictures
import table
from harness import OTHER, SECONDS, START_SECONDS

HERE = Path(__file__).resolve().parent


def slug(machine: str) -> str:
    """The processor's name as a file's."""
    return re.sub(r"\W+", "-", machine.partition(",")[0]).strip("-").lower()


def run_script(script: Path, quick: bool, file: Path, advance: Any) -> str:
    """Runs one script and calls advance(share done, what was done) for each of its cases; "" or the last it said before it failed."""
    command = [sys.executable, str(script), "--json", str(file), *(["--quick"] if quick else [])]
    process = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    printed: list[str] = []
    # Both pipes are read: a full one would stop the script.
    reader = threading.Thread(target=lambda: printed.extend(process.stdout or ()))
    reader.start()
    last = ""
    for line in process.stderr or ():
        last = line.strip() or last
        found = re.match(r"(\d+)/(\d+) (.*)", line)
        if found:
            advance(int(found.group(1)) / int(found.group(2)), found.group(3))
    reader.join()
    return "" if process.wait() == 0 else last or f"exit status {process.returncode}"


def main(argv: list[str] | None = None) -> int:
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    parser = argparse.ArgumentParser(prog="python -m gradkernels bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=scripts, metavar="STEM", help=f"one script: {', '.join(scripts)}")
    parser.add_argument("--quick", action="store_true", help="under a minute: does everything run, not how fast is it")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go; bench/results, with --quick a temporary folder")
    options = parser.parse_args(argv)
    if options.only:
        scripts = {options.only: scripts[options.only]}
    folder = options.out or (Path(tempfile.mkdtemp(prefix="gradkernels-bench-")) if options.quick else HERE / "results")
    folder.mkdir(parents=True, exist_ok=True)

    console = Console(stderr=True)
    weights = {stem: SECONDS.get(stem, OTHER)[options.quick] + START_SECONDS for stem in scripts}
    results: dict[str, Any] = {"header": {}, "scripts": {}}
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as temporary:
        task = progress.add_task("bench", total=sum(weights.values()))
        done = 0
        for stem, script in scripts.items():
            progress.update(task, description=stem, completed=done)

            def advance(share: float, what: str, stem: str = stem, done: float = done) -> None:
                progress.update(task, description=f"{stem}: {what}", completed=done + share * weights[stem])

            file = Path(temporary) / f"{stem}.json"
            start = time.monotonic()
            why = run_script(script, options.quick, file, advance)
            seconds[stem] = time.monotonic() - start
            done += weights[stem]
            if why:
                failed[stem] = why
                progress.console.print(f"{stem} failed: {why}", highlight=False, markup=False)
                continue
            if not file.exists():
                progress.console.print(f"{stem}: nothing to measure on this machine", highlight=False, markup=False)
                continue
            found = json.loads(file.read_text())
            results["header"] = results["header"] or found["header"]
            # A script's own lines stay with it.
            own = {name: each for name, each in found["header"].items() if name not in results["header"]}
            results["scripts"][stem] = found | {"header": own, "seconds": round(seconds[stem], 1)}
        progress.update(task, description="bench", completed=done)

    if results["scripts"]:
        results["quick"] = options.quick
        name = slug(results["header"]["machine"])
        (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        drawn = pictures.draw(results, folder, name)
        (folder / f"{name}.md").write_text(table.markdown(results, drawn))
        for path in (folder / f"{name}.json", folder / f"{name}.md", *drawn):
            print(path)
    total = sum(seconds.values())
    print(f"{len(scripts) - len(failed)} of {len(scripts)} scripts in {total:.0f} s{''.join(f'; {each} failed' for each in failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
