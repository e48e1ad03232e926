"""What changed from one file of results to another, beyond noise: python bench/compare.py A.json B.json

A row changed where its p20-p80 in A and in B do not overlap; it regressed where its median grew by more than 10 % as well. Exits with 1 if
any gradkernels row did; what torch's rows do is printed, since it tells of another machine or another torch.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_GROWTH = 0.10
# The name of a duration ends in its unit; what follows median_ follows p20_ and p80_ too.
UNITS = ("us", "ms", "s")
IDENTITY = ("case", "network", "provider", "direction", "dtype", "layout", "outputs", "n")


@dataclass
class Change:
    what: str
    provider: str
    before: float
    after: float
    unit: str

    @property
    def growth(self) -> float:
        return self.after / self.before - 1

    @property
    def regressed(self) -> bool:
        return self.growth > MOST_GROWTH and not self.provider.startswith(("eager", "torch"))

    def __str__(self) -> str:
        word = "REGRESSED" if self.regressed else "slower" if self.growth > 0 else "faster"
        return f"{word:<9}  {self.growth:+7.1%}  {self.before:,.4g} -> {self.after:,.4g} {self.unit}  {self.provider}: {self.what}"


def timed_rows(results: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any], str]]:
    """(what makes a row this one, the row, its unit) for every row that has p20 and p80. Takes a script's file and one of the suite."""
    scripts = results.get("scripts", {"": results})
    for stem, script in scripts.items():
        for row in script["rows"]:
            for unit in UNITS:
                if {f"median_{unit}", f"p20_{unit}", f"p80_{unit}"} <= row.keys():
                    yield (stem, *(str(row[name]) for name in IDENTITY if name in row)), row, unit


def changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """The rows of both whose p20-p80 do not overlap."""
    olds = {key: row for key, row, _ in timed_rows(before)}
    for key, new, unit in timed_rows(after):
        old = olds.get(key)
        if old is None or (new[f"p20_{unit}"] <= old[f"p80_{unit}"] and old[f"p20_{unit}"] <= new[f"p80_{unit}"]):
            continue
        provider = new.get("provider", "gradkernels")
        what = ", ".join(part for part in key if part and part != provider)
        yield Change(what, provider, old[f"median_{unit}"], new[f"median_{unit}"], unit)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    arguments = parser.parse_args(argv)
    before, after = (json.loads(path.read_text()) for path in (arguments.before, arguments.after))
    for name in sorted(before["header"].keys() | after["header"].keys()):
        old, new = before["header"].get(name), after["header"].get(name)
        if old != new:
            print(f"{name}: {old} -> {new}")
    shared = {key for key, _, _ in timed_rows(before)} & {key for key, _, _ in timed_rows(after)}
    if not shared:
        print("these files have no row in common")
        return 2
    found = sorted(changes(before, after), key=lambda change: -change.growth)
    for change in found:
        print(change)
    regressed = sum(change.regressed for change in found)
    print(f"{len(shared)} rows in both, {len(found)} changed beyond noise, {regressed} regressed by more than {MOST_GROWTH:.0%}")
    return 1 if regressed else 0


if __name__ == "__main__":
    sys.exit(main())
