"""Results as Markdown: first the rows that torch or the compiler wins, in words and with the reason, then a table for each script.

A reason is something measured in the same run: the smallest case of the same operator for the cost of a call, the same case with warm
outputs for the cost of fresh memory, the same case but for its activation, its residual, its layout or its dtype, the bytes kept for
backward for what has to be computed again, the cores kept busy, the copy's bandwidth. It has to account for half of what is lost; where
nothing does, the text says so and what it is not. Forward and backward, measured apart for such cases, say where it is lost.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import PARTS, WHOLE, label

Row = dict[str, Any]

# Below this a case is the cost of calling, not of moving bytes.
SMALL_BYTES = 1 << 20
# Both sides above this share of the copy's bandwidth are at the limit.
AT_THE_LIMIT = 0.8
# A reason accounts for this share of what is lost, or for this many cores that are idle.
MOST_OF_IT = 0.5
# A process that got less of a core than this while it computed had to share it.
DISTURBED_CORES = 0.9
IDENTITY = ("case", "direction", "dtype", "layout", "outputs")
OURS = "gradkernels"

# What a case is -> its rows by provider.
Cases = dict[tuple[Any, ...], dict[str, Row]]


def grouped(rows: Iterable[Row]) -> Cases:
    found: Cases = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in IDENTITY), {})[row["provider"]] = row
    return found


def cases(rows: Iterable[Row]) -> Iterator[tuple[Row, dict[str, Row]]]:
    """(what a case is, its rows by provider), for rows of the harness."""
    for key, providers in grouped(rows).items():
        if OURS in providers and "eager" in providers:
            yield dict(zip(IDENTITY, key, strict=True)), providers


def is_of_harness(rows: Sequence[Row]) -> bool:
    return bool(rows) and {*IDENTITY, "times_eager", "times_compile", "of_copy"} <= rows[0].keys()


def is_of_steps(rows: Sequence[Row]) -> bool:
    """Of whole training steps beside torch's, not beside what is added to them."""
    return bool(rows) and {"case", "provider", "median_ms", "p20_ms", "p80_ms", "times_eager"} <= rows[0].keys()


def warm(case: Row) -> str:
    """Of what is measured twice, which of the two it is; on a GPU that is the L2 cache."""
    return {"fresh": "", "none": "", "warm": ", warm outputs"}.get(case["outputs"], f", {case['outputs']}")


def behind(providers: dict[str, Row] | None, mine: str, other: str) -> float | None:
    """Microseconds that `mine` takes more than `other`; None where one of them was not measured."""
    if providers is None or mine not in providers or other not in providers:
        return None
    return providers[mine]["median_us"] - providers[other]["median_us"]


def at(case: Row, found: Cases, /, **fields: str) -> dict[str, Row] | None:
    """The same case but for these fields."""
    return found.get(tuple((case | fields)[name] for name in IDENTITY))


def smallest(case: Row, found: Cases) -> dict[str, Row]:
    """The least bytes of the same operator; such cases are named operator, number, unit."""
    operator = case["case"].rsplit(" ", 2)[0]
    same = [key for key in found if key[0].rsplit(" ", 2)[0] == operator and key[1:4] == tuple(case[name] for name in IDENTITY[1:4])]
    return found[min(same, key=lambda key: found[key][OURS]["bytes"] if OURS in found[key] else math.inf)]


def reason(case: Row, mine: str, other: str, found: Cases) -> str:
    """Why `other` took less time, by what else was measured in the run; and where."""
    providers = found[tuple(case[name] for name in IDENTITY)]
    ours, theirs = providers[mine], providers[other]
    lost = ours["median_us"] - theirs["median_us"]
    why, beyond = [], []
    least = smallest(case, found)
    of_a_call = behind(least, mine, other)
    if least is providers and ours["bytes"] < SMALL_BYTES:
        why.append(f"the cost of a call, {lost:.1f} us more for {ours['bytes']:,} bytes")
    elif least is not providers and of_a_call is not None and of_a_call >= MOST_OF_IT * lost:
        why.append(f"the cost of a call, {of_a_call:.1f} us more already for {least[mine]['bytes']:,} bytes")
    of_warm = behind(at(case, found, outputs="warm"), mine, other) if case["outputs"] == "fresh" else None
    if of_warm is not None and lost - of_warm >= MOST_OF_IT * lost:
        faults = f"{ours['faults']:,.0f} page faults a call, theirs {theirs['faults']:,.0f}"
        why.append(f"fresh memory, with warm outputs the difference is {of_warm:+,.0f} us ({faults})")
    if ours["cores"] is not None and theirs["cores"] is not None and theirs["cores"] - ours["cores"] >= MOST_OF_IT:
        why.append(f"{ours['cores']:.1f} cores are busy, theirs {theirs['cores']:.1f}")
    if min(ours["of_copy"], theirs["of_copy"]) >= AT_THE_LIMIT:
        why.append(f"both are near the copy's bandwidth, {ours['of_copy']:.0%} and {theirs['of_copy']:.0%} of it")
    for what, fields in (ours.get("instead") or {}).items() if ours["bytes"] >= SMALL_BYTES else ():
        of_other = behind(at(case, found, **fields), mine, other)
        if of_other is None:
            continue
        changed = ", ".join(value for field, value in fields.items() if value != case[field])
        text = f"{what} (with {changed} the difference is {of_other:+,.0f} us, here it is {lost:+,.0f})"
        if lost - of_other >= MOST_OF_IT * lost:
            why.append(text)
        else:
            beyond.append(f"not {text}")
    whole = at(case, found, direction=WHOLE) if case["direction"] in PARTS else None
    of_whole = behind(whole, mine, other)
    if of_whole is not None and of_whole < 0:
        kept, theirs_kept = whole[mine]["saved_bytes"], whole[other]["saved_bytes"]
        if case["direction"] == "backward" and None not in (kept, theirs_kept) and kept <= MOST_OF_IT * theirs_kept:
            why.append(f"less is kept for it, {cell(kept / 1e6)} MB, theirs {cell(theirs_kept / 1e6)}, and the rest computed again")
        beyond.append(f"the whole takes {whole[mine]['median_us']:,.0f} us, theirs {whole[other]['median_us']:,.0f}")
    if not why:
        shares = f"{ours['of_copy']:.0%} of the copy's bandwidth, theirs {theirs['of_copy']:.0%}"
        why.append(f"no reason found; {shares}, {ours['faults']:,.0f} page faults a call, theirs {theirs['faults']:,.0f}")
    if whole is None:
        where = {part: behind(at(case, found, direction=part), mine, other) for part in PARTS}
        told = [f"{part} {us:+,.0f} us" for part, us in where.items() if us is not None]
        beyond += [f"measured apart: {', '.join(told)}"] if told else []
    return "; ".join([*why, *beyond])


def losses_of_steps(rows: Iterable[Row]) -> Iterator[tuple[bool, str]]:
    """(whether beyond noise, text) of whole training steps that torch is ahead in, and what the profiler saw to differ."""
    eager = {row["case"]: row for row in rows if row["provider"] == "eager"}
    for row in rows:
        other = eager.get(row["case"])
        if other is None or row["median_ms"] <= other["median_ms"]:
            continue
        parts = {
            name.removesuffix("_ms").replace("_", " "): row[name] - other[name]
            for name in row
            if name.endswith("_ms") and not name.startswith(("median", "p20", "p80"))
        }
        beyond = row["p20_ms"] > other["p80_ms"]
        why = "; " + ", ".join(f"{part} {ms:+,.1f} ms" for part, ms in parts.items()) if beyond and parts else ""
        who = "" if row["provider"] == OURS else f" beside {row['provider']}"
        yield beyond, f"a step of {row['case']}: torch takes {other['median_ms'] / row['median_ms']:.2f} of the time{who}{why}"


def losses(results: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Cases that torch or the compiler wins, beyond noise and within it; what is measured apart only where the whole is not lost."""
    beyond, within = [], []
    for script in results["scripts"].values():
        if is_of_steps(script["rows"]):
            for is_beyond, text in losses_of_steps(script["rows"]):
                (beyond if is_beyond else within).append(text)
        if not is_of_harness(script["rows"]):
            continue
        found = grouped(script["rows"])
        told = set()
        # The whole before its parts.
        for case, providers in sorted(cases(script["rows"]), key=lambda pair: pair[0]["direction"] in PARTS):
            for mine, other in ((OURS, "eager"), (OURS, "torch.compile"), (f"{OURS}, compiled", "torch.compile")):
                lost = behind(providers, mine, other)
                whole = tuple(case[name] for name in IDENTITY if name != "direction")
                if lost is None or lost <= 0 or (case["direction"] in PARTS and (whole, mine, other) in told):
                    continue
                ours, theirs = providers[mine], providers[other]
                who = {"eager": "torch", "torch.compile": "torch.compile"}[other]
                beside = "" if mine == OURS else " beside gradkernels compiled"
                text = f"{label(case)}{warm(case)}: {who} takes {theirs['median_us'] / ours['median_us']:.2f} of the time{beside}"
                if ours["p20_us"] <= theirs["p80_us"]:
                    within.append(text)
                else:
                    told.add((whole, mine, other))
                    beyond.append(f"{text}; {reason(case, mine, other, found)}")
    return beyond, within


def disturbed(results: dict[str, Any]) -> str | None:
    """Whether other processes took the cores meanwhile, in words; None where they did not."""
    cores = [row["cores"] for script in results["scripts"].values() for row in script["rows"] if row.get("cores") is not None]
    few = sum(each < DISTURBED_CORES for each in cores)
    return f"{few} of {len(cores)} rows had less than {DISTURBED_CORES:g} of a core: something else ran meanwhile." if few else None


def cell(value: Any) -> str:
    """A figure with as many digits as say something; nothing where it was not measured."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return " / ".join(cell(each) for each in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def in_bytes(size: float) -> str:
    """With the unit that it reaches."""
    unit, of = next(((unit, of) for unit, of in (("MB", 1e6), ("kB", 1e3)) if size >= of), ("B", 1.0))
    return f"{cell(size / of)} {unit}"


def lines_of(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join('---' if column < left else '---:' for column in range(len(columns)))}|"
    yield from (f"| {' | '.join(each.replace('|', '/') for each in row)} |" for row in rows)


def table_of_cases(rows: Sequence[Row]) -> Iterator[str]:
    columns = (
        "case",
        "outputs",
        "torch us",
        "compile us",
        "ours us",
        "p20-p80",
        "times torch",
        "times compile",
        "faults",
        "GB/s",
        "of copy",
        "saved, torch / ours",
        "peak, torch / ours",
    )
    texts = []
    for case, providers in cases(rows):
        ours, eager, compiled = providers[OURS], providers["eager"], providers.get("torch.compile")
        texts.append(
            (
                label(case),
                "" if case["outputs"] == "none" else case["outputs"],
                cell(eager["median_us"]),
                cell(compiled and compiled["median_us"]),
                cell(ours["median_us"]),
                f"{cell(ours['p20_us'])}-{cell(ours['p80_us'])}",
                f"{ours['times_eager']:.2f}",
                "" if ours["times_compile"] is None else f"{ours['times_compile']:.2f}",
                f"{ours['faults']:,.0f}",
                f"{ours['gb_per_s']:.1f}",
                f"{ours['of_copy']:.0%}",
                *(
                    "" if ours[name] is None or eager[name] is None else f"{in_bytes(eager[name])} / {in_bytes(ours[name])}"
                    for name in ("saved_bytes", "peak_bytes")
                ),
            )
        )
    yield from lines_of(columns, texts, 2)
    beside = [row for row in rows if row["provider"] not in (OURS, "eager", "torch.compile")]
    if beside:
        yield ""
        columns = ("beside them", "case", "us", "times torch", "times compile")
        yield from lines_of(
            columns,
            [
                (row["provider"], label(row) + warm(row), *(cell(row[name]) for name in ("median_us", "times_eager", "times_compile")))
                for row in beside
            ],
            2,
        )


# What is no heading as it stands; any other name of a field is one, with spaces.
HEADINGS = {
    "part_ms": "batch norm, activation, addition ms",
    "part_times_eager": "these, times torch",
    "times_eager": "times torch",
    "batch_norm_act_add_ms": "batch norm, activation, addition ms",
    "share": "added",
}
SHARES = ("share", "off_by")


def heading(name: str) -> str:
    return HEADINGS.get(name) or re.sub(r"\bmb$", "MB", name.replace("_", " "))


def fields_of(row: Row) -> dict[str, str]:
    """heading -> text; a field that has names itself is a column for each of them."""
    texts = {}
    for name, value in row.items():
        if isinstance(value, dict):
            texts |= {each: cell(of) for each, of in value.items()}
        else:
            texts[heading(name)] = f"{value:+.1%}" if name in SHARES else cell(value)
    return texts


def table_of_fields(rows: Sequence[Row]) -> Iterator[str]:
    """Any other script's rows, a column for each field."""
    texts = [fields_of(row) for row in rows]
    columns = list(dict.fromkeys(name for each in texts for name in each))
    left = sum(isinstance(value, str) for value in rows[0].values()) if rows else 0
    yield from lines_of(columns, [[each.get(name, "") for name in columns] for each in texts], left)


def markdown(results: dict[str, Any], drawn: Sequence[Path]) -> str:
    lines = [f"# Benchmark on {results['header']['machine']}", ""]
    if results.get("quick"):
        lines += ["**A quick run: it shows that everything works. Its numbers mean nothing.**", ""]
    lines += [f"* {name}: {value}" for name, value in results["header"].items() if name != "machine"]
    for stem, why in results.get("failed", {}).items():
        left = "its figures below are what it left, or of an earlier run" if stem in results["scripts"] else "there are no figures of it"
        lines += ["", f"**bench/bench_{stem}.py did not end when it was last run ({why}): {left}.**"]
    if (told := disturbed(results)) is not None:
        lines += ["", f"**{told}**"]
    beyond, within = losses(results)
    if beyond or any(is_of_harness(script["rows"]) for script in results["scripts"].values()):
        lines += ["", "## Where torch or the compiler wins", ""]
        lines += [f"* {line}" for line in beyond] or ["Nowhere in this run beyond noise."]
    if within:
        lines += ["", "Ahead of ours, but p20-p80 of both overlap:", "", *(f"* {line}" for line in within)]
    lines += [""]
    for path in drawn:
        lines += [f"![{path.stem.rpartition('_')[2]}]({path.name})", ""]
    # What takes how long, then the rest.
    for stem, script in sorted(results["scripts"].items(), key=lambda pair: not is_of_harness(pair[1]["rows"])):
        lines += [f"## {script['title']}", "", f"`bench/bench_{stem}.py`, {script['seconds']:.0f} s", ""]
        lines += [f"* {name}: {value}" for name, value in script.get("header", {}).items()]
        lines += [""] if script.get("header") else []
        lines += table_of_cases(script["rows"]) if is_of_harness(script["rows"]) else table_of_fields(script["rows"])
        if "model" in script:
            lines += ["", f"### {script['model']['title']}", "", script["model"]["note"], "", *table_of_fields(script["model"]["rows"])]
        lines += [""]
    return "\n".join(lines)
