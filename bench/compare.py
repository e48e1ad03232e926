"""What changed from one file of results to another, beyond noise: python bench/compare.py A.json B.json

A row changed where its p20-p80 in A and in B do not overlap; it regressed where its median grew by more than 10 % as well. Exits with 1 if
any row of ours did: those stand first. Beside each row of ours stands what torch's did in the same case: where both grew alike it was the
machine or another torch. Rows of torch and of other packages are printed last and cannot regress. What the headers say is compared script
by script, since each may have been measured at another commit.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_GROWTH = 0.10
# The name of a duration ends in its unit, which is so many seconds; what follows median_ follows p20_ and p80_ too.
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
IDENTITY = ("case", "network", "provider", "direction", "dtype", "layout", "outputs", "n")
# How the names of providers begin that are not ours.
THEIRS = ("eager", "torch", "inplace_abn", "timm", "as timm")
# What most rows have in common is not told of any.
USUAL = ("", "forward + backward", "in place", "float32", "contiguous", "fresh", "none")

# What makes a row this one: the script, then the fields of IDENTITY that it has.
Key = tuple[tuple[str, str], ...]
Results = dict[str, Any]


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass
class Timed:
    """A row's seconds; unit: the one that it was recorded in."""

    p20: float
    median: float
    p80: float
    unit: str


@dataclass
class Change:
    what: str
    provider: str
    before: Timed
    after: Timed
    growth_of_eager: float | None

    @property
    def growth(self) -> float:
        return growth(self.before, self.after)

    @property
    def is_ours(self) -> bool:
        return not self.provider.startswith(THEIRS)

    @property
    def regressed(self) -> bool:
        return self.growth > MOST_GROWTH and self.is_ours

    def __str__(self) -> str:
        word = "REGRESSED" if self.regressed else "slower" if self.growth > 0 else "faster"
        beside = "" if self.growth_of_eager is None else f" (torch {self.growth_of_eager:+.1%})"
        before, after = (figure(each.median / UNITS[self.after.unit]) for each in (self.before, self.after))
        return f"{word:<9}  {self.growth:+7.1%}  {before} -> {after} {self.after.unit}  {self.provider}: {self.what}{beside}"


def growth(before: Timed, after: Timed) -> float:
    return after.median / before.median - 1


def parts_of(results: Results) -> dict[str, Results]:
    """Its scripts, each with its full header again."""
    return {stem: script | {"header": results["header"] | script.get("header", {})} for stem, script in results["scripts"].items()}


def scripts_of(results: Results, other: Results) -> dict[str, Results]:
    """Its scripts by stem, with their full headers; a script's own file has no stem, and beside one only the script of its title counts."""
    if "scripts" not in results:
        return {"": results}
    scripts = parts_of(results)
    if "scripts" in other:
        return scripts
    same = [script for script in scripts.values() if script["title"] == other.get("title")]
    return {"": same[0]} if same else {}


def timed_rows(scripts: dict[str, Results]) -> dict[Key, Timed]:
    """Every row that has p20 and p80."""
    found = {}
    for name, script in scripts.items():
        for row in script["rows"]:
            for unit, seconds in UNITS.items():
                times = [row.get(f"{which}_{unit}") for which in ("p20", "median", "p80")]
                if None not in times:
                    # A network is a case.
                    fields = ((field.replace("network", "case"), str(row[field])) for field in IDENTITY if field in row)
                    found[(("script", name), *fields)] = Timed(*(each * seconds for each in times), unit)
    return found


def changes(olds: dict[Key, Timed], news: dict[Key, Timed]) -> Iterator[Change]:
    """The rows of both whose p20-p80 do not overlap."""
    for key, new in news.items():
        old = olds.get(key)
        if old is None or (new.p20 <= old.p80 and old.p20 <= new.p80):
            continue
        provider = dict(key).get("provider", "gradkernels")
        eager = tuple((name, "eager" if name == "provider" else value) for name, value in key)
        told = (
            f"n = {value}" if name == "n" else "warm outputs" if value == "warm" else value for name, value in key if name != "provider"
        )
        yield Change(
            what=", ".join(each for each in told if each not in USUAL),
            provider=provider,
            before=old,
            after=new,
            growth_of_eager=growth(olds[eager], news[eager])
            if eager in olds and eager in news and not provider.startswith(THEIRS)
            else None,
        )


def differences(olds: dict[str, Results], news: dict[str, Results]) -> Iterator[str]:
    """A line for each name of the headers that says something else in both, with the scripts where that is not all of them."""
    common = sorted(olds.keys() & news.keys())
    for name in sorted({name for stem in common for each in (olds, news) for name in each[stem]["header"]}):
        scripts: dict[str, list[str]] = {}
        for stem in common:
            old, new = (each[stem]["header"].get(name, "not recorded") for each in (olds, news))
            scripts.setdefault("" if old == new else f"{old} -> {new}", []).append(stem)
        told = [what if stems == common else f"{what} in {' '.join(stems)}" for what, stems in scripts.items() if what]
        if told:
            yield f"{name}: {'; '.join(told)}"


def alone(keys: Iterable[Key]) -> str:
    """How many rows, and of which scripts."""
    counts = Counter(dict(key)["script"] for key in keys)
    return f"{counts.total()} rows{''.join(f', {count} of {script}' for script, count in sorted(counts.items()) if script)}"


def read(path: Path) -> Results:
    try:
        results: Results = json.loads(path.read_text())
        timed_rows(scripts_of(results, results))
        dict(results["header"])
    except (KeyError, TypeError, AttributeError):
        print(f"{path}: no results of a benchmark", file=sys.stderr)
        raise SystemExit(2) from None
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
    read_before, read_after = read(arguments.before), read(arguments.after)
    before, after = scripts_of(read_before, read_after), scripts_of(read_after, read_before)
    for line in differences(before, after):
        print(line)
    olds, news = timed_rows(before), timed_rows(after)
    shared = olds.keys() & news.keys()
    if not shared:
        print("these files have no row in common")
        return 2
    found = sorted(changes(olds, news), key=lambda change: (not change.regressed, not change.is_ours, -change.growth))
    for change in found:
        print(change)
    regressed = sum(change.regressed for change in found)
    for path, keys in ((arguments.before, olds.keys() - shared), (arguments.after, news.keys() - shared)):
        if keys:
            print(f"not compared, in {path} alone: {alone(keys)}")
    print(f"{len(shared)} rows in both, {len(found)} changed beyond noise, {regressed} regressed by more than {MOST_GROWTH:.0%}")
    return 1 if regressed else 0


if __name__ == "__main__":
    sys.exit(main())
