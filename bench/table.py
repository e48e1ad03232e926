"""Results as Markdown: first the rows that torch or the compiler wins, in words and with the reason, then a table for each script.

The reason is read off the row itself: noise, the cost of a call, page faults, the copy's bandwidth. Where none of them holds, the text says
that the figures do not explain it.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Below this a case is the cost of calling, not of moving bytes.
SMALL_BYTES = 1 << 20
PAGE_BYTES = 4096
# Both sides above this share of the copy's bandwidth are at the limit.
AT_THE_LIMIT = 0.8
IDENTITY = ("case", "direction", "dtype", "layout", "outputs")
OURS = "gradkernels"


def cases(rows: Iterable[Row]) -> Iterator[tuple[Row, dict[str, Row]]]:
    """(what a case is, its rows by provider), for rows of the harness."""
    grouped: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[name] for name in IDENTITY), {})[row["provider"]] = row
    for key, providers in grouped.items():
        if OURS in providers and "eager" in providers:
            yield dict(zip(IDENTITY, key, strict=True)), providers


def is_of_harness(rows: Sequence[Row]) -> bool:
    return bool(rows) and {*IDENTITY, "times_eager", "times_compile", "of_copy"} <= rows[0].keys()


def label(case: Row) -> str:
    """A case on one line, without what most cases have in common."""
    usual = ("contiguous", "float32", "forward + backward", "in place", "none")
    outputs = "warm outputs" if case["outputs"] == "warm" else "fresh"
    parts = [case["case"], *(case[name] for name in ("layout", "dtype") if case[name] not in usual)]
    return ", ".join(parts + ([outputs] if outputs == "warm outputs" else []))


def reason(ours: Row, theirs: Row) -> str:
    """Why `theirs` took less time, as far as the figures of the two rows tell."""
    if ours["p20_us"] <= theirs["p80_us"]:
        return "within noise: p20-p80 of both overlap"
    behind = ours["median_us"] - theirs["median_us"]
    if ours["bytes"] < SMALL_BYTES:
        return f"the cost of a call rules: {behind:.1f} us more, for {ours['bytes']:,} bytes"
    if ours["faults"] * PAGE_BYTES > ours["bytes"] / 10 and ours["faults"] > theirs["faults"]:
        return f"page faults of fresh outputs: {ours['faults']:,.0f} a call, {theirs['faults']:,.0f} of theirs"
    if min(ours["of_copy"], theirs["of_copy"]) >= AT_THE_LIMIT:
        return f"both are near the copy's bandwidth, {ours['of_copy']:.0%} and {theirs['of_copy']:.0%} of it"
    return f"not explained by these figures: {ours['of_copy']:.0%} of the copy's bandwidth, theirs {theirs['of_copy']:.0%}"


def losses(results: dict[str, Any]) -> list[str]:
    found = []
    for script in results["scripts"].values():
        if not is_of_harness(script["rows"]):
            continue
        for case, providers in cases(script["rows"]):
            pairs = [(OURS, "eager"), (OURS, "torch.compile"), (f"{OURS}, compiled", "torch.compile")]
            for mine, other in pairs:
                if mine in providers and other in providers and providers[mine]["median_us"] > providers[other]["median_us"]:
                    ours, theirs = providers[mine], providers[other]
                    times = ours["median_us"] / theirs["median_us"]
                    who = {"eager": "torch", "torch.compile": "torch.compile"}[other]
                    beside = "" if mine == OURS else " beside gradkernels compiled"
                    found.append(f"{label(case)}: {who} takes {1 / times:.2f} of the time{beside}; {reason(ours, theirs)}")
    return found


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
    )
    texts = []
    for case, providers in cases(rows):
        ours, compiled = providers[OURS], providers.get("torch.compile")
        texts.append(
            (
                label({**case, "outputs": "none"}),
                "" if case["outputs"] == "none" else case["outputs"],
                cell(providers["eager"]["median_us"]),
                cell(compiled and compiled["median_us"]),
                cell(ours["median_us"]),
                f"{cell(ours['p20_us'])}-{cell(ours['p80_us'])}",
                f"{ours['times_eager']:.2f}",
                "" if ours["times_compile"] is None else f"{ours['times_compile']:.2f}",
                f"{ours['faults']:,.0f}",
                f"{ours['gb_per_s']:.1f}",
                f"{ours['of_copy']:.0%}",
            )
        )
    yield from lines_of(columns, texts, 2)
    beside = [row for row in rows if row["provider"] not in (OURS, "eager", "torch.compile")]
    if beside:
        yield ""
        columns = ("beside them", "case", "us", "times torch", "times compile")
        yield from lines_of(
            columns,
            [(row["provider"], label(row), *(cell(row[name]) for name in ("median_us", "times_eager", "times_compile"))) for row in beside],
            2,
        )


def table_of_fields(rows: Sequence[Row]) -> Iterator[str]:
    """Any other script's rows as they are, their fields' names as headings."""
    names = list(rows[0]) if rows else []
    left = sum(isinstance(value, str) for value in rows[0].values()) if rows else 0
    yield from lines_of([name.replace("_", " ") for name in names], [[cell(row[name]) for name in names] for row in rows], left)


def markdown(results: dict[str, Any], drawn: Sequence[Path]) -> str:
    lines = [f"# Benchmark on {results['header']['machine']}", ""]
    if results.get("quick"):
        lines += ["**A quick run: it shows that everything works. Its numbers mean nothing.**", ""]
    lines += [f"* {name}: {value}" for name, value in results["header"].items() if name != "machine"]
    lines += ["", "## Where torch or the compiler wins", ""]
    lines += [f"* {line}" for line in losses(results)] or ["Nowhere in this run."]
    lines += [""]
    for path in drawn:
        lines += [f"![{path.stem.rpartition('_')[2]}]({path.name})", ""]
    for stem, script in results["scripts"].items():
        lines += [f"## {script['title']}", "", f"`bench/bench_{stem}.py`, {script['seconds']:.0f} s", ""]
        lines += table_of_cases(script["rows"]) if is_of_harness(script["rows"]) else table_of_fields(script["rows"])
        if "model" in script:
            lines += ["", f"### {script['model']['title']}", "", script["model"]["note"], "", *table_of_fields(script["model"]["rows"])]
        lines += [""]
    return "\n".join(lines)
