"""What changed from one file of results to another, beyond noise: python bench/compare.py A.json B.json

A row changed where its p20-p80 in A and in B do not overlap; it regressed where its median grew by more than 10 % as well. Exits with 1 if
any row of ours did. Beside each row of ours stands what torch's did in the same case: where both grew alike it was the machine or another
torch. Rows of torch and of other packages are printed and cannot regress.
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
# How the names of providers begin that are not ours.
THEIRS = ("eager", "torch", "inplace_abn", "timm", "as timm")


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass
class Change:
    what: str
    provider: str
    before: float
    after: float
    unit: str
    growth_of_eager: float | None

    @property
    def growth(self) -> float:
        return self.after / self.before - 1

    @property
    def regressed(self) -> bool:
        return self.growth > MOST_GROWTH and not self.provider.startswith(THEIRS)

    def __str__(self) -> str:
        word = "REGRESSED" if self.regressed else "slower" if self.growth > 0 else "faster"
        beside = "" if self.growth_of_eager is None else f" (torch {self.growth_of_eager:+.1%})"
        times = f"{figure(self.before)} -> {figure(self.after)} {self.unit}"
        return f"{word:<9}  {self.growth:+7.1%}  {times}  {self.provider}: {self.what}{beside}"


# What makes a row this one: the script's stem, then the fields of IDENTITY that it has.
Key = tuple[tuple[str, str], ...]


def timed_rows(results: dict[str, Any]) -> dict[Key, tuple[dict[str, Any], str]]:
    """(row, its unit) of every row that has p20 and p80. Takes a script's file and one of the suite."""
    found = {}
    for stem, script in results.get("scripts", {"": results}).items():
        for row in script["rows"]:
            for unit in UNITS:
                if {f"median_{unit}", f"p20_{unit}", f"p80_{unit}"} <= row.keys():
                    # A network is a case.
                    fields = ((name.replace("network", "case"), str(row[name])) for name in IDENTITY if name in row)
                    key = (("script", stem), *fields)
                    found[key] = row, unit
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """The rows of both whose p20-p80 do not overlap."""
    olds, news = timed_rows(before), timed_rows(after)

    def growth(key: Key) -> float | None:
        if key not in olds or key not in news:
            return None
        return news[key][0][f"median_{news[key][1]}"] / olds[key][0][f"median_{news[key][1]}"] - 1

    for key, (new, unit) in news.items():
        old = olds[key][0] if key in olds else None
        if old is None or (new[f"p20_{unit}"] <= old[f"p80_{unit}"] and old[f"p20_{unit}"] <= new[f"p80_{unit}"]):
            continue
        provider = new.get("provider", "gradkernels")
        eagers = tuple((name, "eager" if name == "provider" else value) for name, value in key)
        yield Change(
            what=", ".join(f"n = {value}" if name == "n" else value for name, value in key if value and name != "provider"),
            provider=provider,
            before=old[f"median_{unit}"],
            after=new[f"median_{unit}"],
            unit=unit,
            growth_of_eager=None if provider.startswith(THEIRS) else growth(eagers),
        )


def read(path: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if results.get("quick"):
        print(f"{path} is of a quick run: its numbers mean nothing")
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    arguments = parser.parse_args(argv)
    before, after = read(arguments.before), read(arguments.after)
    for name in sorted(before["header"].keys() | after["header"].keys()):
        old, new = before["header"].get(name), after["header"].get(name)
        if old != new:
            print(f"{name}: {old} -> {new}")
    olds, news = timed_rows(before).keys(), timed_rows(after).keys()
    if not olds & news:
        print("these files have no row in common")
        return 2
    found = sorted(changes(before, after), key=lambda change: -change.growth)
    for change in found:
        print(change)
    regressed = sum(change.regressed for change in found)
    if olds ^ news:
        print(f"not compared: {len(olds - news)} rows of {arguments.before} alone, {len(news - olds)} of {arguments.after} alone")
    print(f"{len(olds & news)} rows in both, {len(found)} changed beyond noise, {regressed} regressed by more than {MOST_GROWTH:.0%}")
    return 1 if regressed else 0


if __name__ == "__main__":
    sys.exit(main())
