"""Every bench script in turn, each in a process of its own, and what they found as one file, a table and pictures.

  python -m gradkernels bench [--only STEM] [--quick] [--out FOLDER]

Writes FOLDER/<machine>.json, .md and _*.png; FOLDER is bench/results, and the machine of bench_cuda is the GPU. A script's part replaces
its last one and leaves the others, each with the header that it was measured under: so does --only, and so does a run in which another
script fails or which is stopped. How long each may take stands in harness.py. With --quick a run says that everything works, and its
numbers say nothing, so it writes into a new temporary folder unless --out names one, and never beside what was measured.
"""

import argparse
import json
import os
import re
import statistics
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
from compare import parts_of
from harness import ALONE, COPY, OTHER, SECONDS, START_SECONDS, machine

HERE = Path(__file__).resolve().parent


def slug(machine: str) -> str:
    """The processor's name as a file's."""
    return re.sub(r"\W+", "-", machine.partition(",")[0]).strip("-").lower()


def run_script(script: Path, quick: bool, file: Path, advance: Any) -> str:
    """Runs one script and calls advance(share done, what was done) for each of its cases; "" or the last it said before it failed."""
    command = [sys.executable, str(script), "--json", str(file), *(["--quick"] if quick else [])]
    printed: list[str] = []
    last = ""
    # Left in any way, it waits for the script.
    with subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        # Both pipes are read: a full one would stop the script.
        reader = threading.Thread(target=lambda: printed.extend(process.stdout or ()))
        reader.start()
        try:
            for line in process.stderr or ():
                last = line.strip() or last
                found = re.match(r"(\d+)/(\d+) (.*)", line)
                if found:
                    advance(int(found.group(1)) / int(found.group(2)), found.group(3))
        except BaseException:
            process.kill()
            raise
        finally:
            reader.join()
    status = process.returncode
    if status < 0:
        return f"signal {-status}, after: {last}"
    return "" if status == 0 else last or f"exit status {status}"


def joined(scripts: dict[str, Any]) -> dict[str, Any]:
    """{"header", "scripts"} of parts with a full header each: what most parts say of what all of them say; the rest stays with its part."""
    headers = [script["header"] for script in scripts.values()]
    shared = [name for name in headers[0] if all(name in header for header in headers)]
    common = {name: statistics.mode(header[name] for header in headers) for name in shared}
    # A bandwidth is measured by each script, and no two are the same.
    common |= {COPY: statistics.median_low(header[COPY] for header in headers)} if COPY in shared else {}
    own = {
        stem: {name: value for name, value in script["header"].items() if name not in common or value != common[name]}
        for stem, script in scripts.items()
    }
    return {"header": common, "scripts": {stem: script | {"header": own[stem]} for stem, script in sorted(scripts.items())}}


def read(file: Path) -> dict[str, Any]:
    """The results in a file; nothing where it is none, or holds something else."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and {"header", "scripts"} <= found.keys() else {}


def recorded(folder: Path, name: str, quick: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """The parts in a machine's file, and what failed when it was last run; a quick run's and measured ones are not mixed."""
    results = read(folder / f"{name}.json")
    return (parts_of(results), results.get("failed", {})) if results and results.get("quick", False) == quick else ({}, {})


def record(folder: Path, name: str, parts: dict[str, Any], quick: bool, failed: dict[str, str]) -> dict[str, Any]:
    """What is in the machine's file from now on, which is replaced as a whole or not at all."""
    results = joined(parts) | {"quick": quick, "failed": failed}
    new = folder / f"{name}.json.new"
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, folder / f"{name}.json")
    return results


def main(argv: list[str] | None = None) -> int:
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    parser = argparse.ArgumentParser(prog="python -m gradkernels bench", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only",
        choices=scripts,
        metavar="STEM",
        help=f"one script, what is there of the others stays: {', '.join(scripts)}; {', '.join(ALONE)} runs only so",
    )
    parser.add_argument("--quick", action="store_true", help="under a minute: does everything run, not how fast is it")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go; bench/results, with --quick a temporary folder")
    options = parser.parse_args(argv)
    chosen = [options.only] if options.only else [stem for stem in scripts if stem not in ALONE]
    folder = options.out or (Path(tempfile.mkdtemp(prefix="gradkernels-bench-")) if options.quick else HERE / "results")
    folder.mkdir(parents=True, exist_ok=True)
    here = slug(machine())
    for file in sorted(folder.glob("*.json")):
        results = read(file)
        if options.quick and results and not results.get("quick", False):
            parser.error(f"{file} was measured, and a quick run's numbers mean nothing: name another folder")
        if file.stem == here and not results:
            parser.error(f"{file} holds no results of a benchmark, and would be replaced by them: move it away")

    # Of what is not run now.
    still_failed = {stem: why for stem, why in recorded(folder, here, options.quick)[1].items() if stem not in chosen}
    console = Console(stderr=True)
    weights = {stem: SECONDS.get(stem, OTHER)[options.quick] + START_SECONDS for stem in chosen}
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    # Of each machine's file that this run writes.
    parts: dict[str, dict[str, Any]] = {}
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
        for stem in chosen:
            progress.update(task, description=stem, completed=done)

            def advance(share: float, what: str, stem: str = stem, done: float = done) -> None:
                progress.update(task, description=f"{stem}: {what}", completed=done + share * weights[stem])

            found = Path(temporary) / f"{stem}.json"
            start = time.monotonic()
            stopped = False
            try:
                why = run_script(scripts[stem], options.quick, found, advance)
            except KeyboardInterrupt:
                why, stopped = "stopped", True
            seconds[stem] = time.monotonic() - start
            done += weights[stem]
            if why:
                failed |= dict.fromkeys(chosen[chosen.index(stem) :] if stopped else [stem], why)
                progress.console.print(f"{stem} failed: {why}", highlight=False, markup=False)
            elif not found.exists():
                progress.console.print(f"{stem}: nothing to measure on this machine", highlight=False, markup=False)
            # A script may have written what it had measured before it failed.
            if found.exists():
                part = json.loads(found.read_text()) | {"seconds": round(seconds[stem], 1)}
                name = slug(part["header"]["machine"])
                parts.setdefault(name, recorded(folder, name, options.quick)[0])[stem] = part
                # At once: whatever becomes of the next script, this one's part is there.
                record(folder, name, parts[name], options.quick, still_failed if name == here else {})
            if stopped:
                break
        progress.update(task, description="bench", completed=done)

    if failed:
        parts.setdefault(here, recorded(folder, here, options.quick)[0])
    for name, each in parts.items():
        if not each:
            continue
        # Beside a GPU's figures stands what failed of them, beside the processor's all.
        of_these = {stem: why for stem, why in failed.items() if stem in each}
        results = record(folder, name, each, options.quick, still_failed | failed if name == here else of_these)
        drawn = pictures.draw(results, folder, name)
        (folder / f"{name}.md").write_text(table.markdown(results, drawn))
        for path in (folder / f"{name}.json", folder / f"{name}.md", *drawn):
            print(path)
    total = sum(seconds.values())
    print(f"{len(chosen) - len(failed)} of {len(chosen)} scripts in {total:.0f} s{''.join(f'; {each} failed' for each in failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
