"""Results as files, as Markdown, as a chart, and compared with other results. It needs no torch.

A script writes FOLDER/<machine>/<script>.json, a part: its title, the header that it was measured under, and its rows, one a line. It
replaces the file as a whole and leaves those of other scripts. The text of a machine names first where torch or its compiler wins.
"""

import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OURS, EAGER, COMPILED, COPY = "gradkernels", "eager", "torch.compile", "copy"
WHOLE, PARTS = "forward + backward", ("forward", "backward")
# What a header has only if there is something to say.
REMARKS = ("quick", "failed", "left out")
# A process that got less of a core than this while it computed had to share it.
DISTURBED_CORES = 0.9
# In a comparison a row has regressed where its p20-p80 moved away from what they were and its median grew by more than this.
MOST_GROWTH = 0.10
# Why torch wins a row, where the reason is known: a sentence written by hand.
REASONS = {
    "rrelu, 16 elements": "this is the cost of a call",
    "rrelu, 4 MiB, backward": "ours keeps a bit an element and computes the slopes again, torch's keeps all of them",
}


@dataclass
class Row:
    """One provider in one case.

    bytes: the least to be moved, of the copy what it moves. faults: minor page faults a call. cores: busy ones; threads that wait in a loop
    count. kept_bytes: what autograd keeps for backward. part_us: of a training step, what batch norm, activation and addition take.
    """

    operator: str
    case: str
    provider: str
    direction: str
    dtype: str
    layout: str
    outputs: str
    median_us: float
    p20_us: float
    p80_us: float
    blocks: int
    bytes: int
    faults: float = 0.0
    cores: float | None = None
    kept_bytes: int | None = None
    part_us: float | None = None

    @property
    def what(self) -> tuple[str, ...]:
        """All that a row shares with its rivals."""
        return (self.operator, self.case, self.direction, self.dtype, self.layout, self.outputs)

    def __str__(self) -> str:
        usual = (WHOLE, "float32", "contiguous", "fresh", "in place")
        outputs = "warm outputs" if self.outputs == "warm" else self.outputs
        return ", ".join([self.operator, self.case, *(each for each in (*self.what[2:5], outputs) if each not in usual)])


# Of one case, by provider.
Rivals = dict[str, Row]
Head = dict[str, Any]
Part = dict[str, Any]


def timed(parts: Iterable[Part]) -> list[Row]:
    return [row for part in parts for row in part["rows"] if isinstance(row, Row)]


def grouped(rows: Iterable[Row]) -> list[Rivals]:
    found: dict[tuple[str, ...], Rivals] = {}
    for row in rows:
        found.setdefault(row.what, {})[row.provider] = row
    return list(found.values())


def slug(head: Head) -> str:
    """The name of a machine's folder. An instruction set that was asked for and a quick run have folders of their own."""
    isa = head["instruction set"].partition(" ")[0] if "ATEN_CPU_CAPABILITY" in head else ""
    texts = (re.sub(r"\(\w+\)|processor|cpu|@.*", "", head["machine"].partition(",")[0].lower()), isa, "quick" if "quick" in head else "")
    return "-".join(re.sub(r"\W+", "-", text).strip("-") for text in texts if text)


def write(stem: str, part: Part, out: Path | None) -> None:
    if out is None:
        return
    rows = [asdict(row) if isinstance(row, Row) else row for row in part["rows"]]
    rows = [{name: float(f"{each:.6g}") if isinstance(each, float) else each for name, each in row.items()} for row in rows]
    lines = ",\n".join(map(json.dumps, rows))
    file = out / slug(part["header"]) / f"{stem}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(f'{{"title": {json.dumps(part["title"])},\n"header": {json.dumps(part["header"])},\n"rows": [\n{lines}\n]}}\n')
    os.replace(new, file)


def read(folder: Path) -> dict[str, Part]:
    """Script -> part."""
    parts: dict[str, Part] = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    for part in parts.values():
        part["rows"] = [Row(**row) if "median_us" in row else row for row in part["rows"]]
    return parts


def losses(rows: Iterable[Row]) -> tuple[list[str], list[str]]:
    """Where torch or its compiler was faster: beyond noise, and with p20-p80 that overlap."""
    beyond: list[str] = []
    within: list[str] = []
    for rivals in grouped(rows):
        for ours in (row for name, row in rivals.items() if name.startswith(OURS)):
            for other in (rivals[name] for name in (EAGER, COMPILED) if name in rivals):
                is_beyond = ours.p20_us > other.p80_us
                if ours.median_us > other.median_us:
                    who = "torch" if other.provider == EAGER else other.provider
                    whom = "" if ours.provider == OURS else f" of {ours.provider}"
                    reason = REASONS.get(str(ours)) if is_beyond and other.provider == EAGER else None
                    text = f"{ours}: {who} takes {other.median_us / ours.median_us:.2f} of the time{whom}{f'; {reason}' if reason else ''}"
                    (beyond if is_beyond else within).append(text)
    return beyond, within


def figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(us: float, *others: float) -> str:
    """A time in the unit that it reaches, and others in the same unit."""
    unit, size = next(((unit, size) for unit, size in (("s", 1e6), ("ms", 1e3)) if us >= size), ("us", 1.0))
    return f"{figure(us / size)} {unit}" + (f" ({'-'.join(figure(each / size) for each in others)})" if others else "")


def share_of_copy(row: Row, rivals: Rivals) -> float | None:
    """The bandwidth of a row over that of the copy measured in the same blocks."""
    if not row.bytes or COPY not in rivals:
        return None
    return row.bytes / row.median_us / (rivals[COPY].bytes / rivals[COPY].median_us)


def cells(row: Row, rivals: Rivals) -> dict[str, str]:
    """Heading -> text."""
    torch, compiler, share = rivals[EAGER], rivals.get(COMPILED), share_of_copy(row, rivals)
    kept, part = ((getattr(torch, name), getattr(row, name)) for name in ("kept_bytes", "part_us"))
    return {
        "case": str(row),
        "by": "" if row.provider == OURS else row.provider.removeprefix(f"{OURS}, "),
        "torch": duration(torch.median_us),
        "compile": duration(compiler.median_us) if compiler else "",
        "ours (p20-p80)": duration(row.median_us, row.p20_us, row.p80_us),
        "times torch": f"{torch.median_us / row.median_us:.2f}",
        "times compile": f"{compiler.median_us / row.median_us:.2f}" if compiler else "",
        "page faults, torch / ours": f"{torch.faults:,.0f} / {row.faults:,.0f}" if max(torch.faults, row.faults) >= 1 else "",
        "GB/s": f"{row.bytes / row.median_us / 1e3:.1f}" if row.bytes else "",
        "of copy": "" if share is None else f"{share:.0%}",
        "batch norm, activation, addition: times torch": "" if None in part else f"{part[0] / part[1]:.2f}",
        "kept MB, torch / ours": "" if None in kept else " / ".join(figure(each / 1e6) for each in kept),
    }


def lines_of(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """A Markdown table without the columns that are empty everywhere."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    for row in (dict(zip(columns, columns, strict=True)), dict.fromkeys(columns, "---"), *rows):
        yield f"| {' | '.join(row[name] for name in columns)} |"


def text_of(stem: str, part: Part) -> str:
    """The section of one script: a line for each provider that is compared with torch."""
    said = ", ".join(f"{name} {value}" for name, value in part["header"].items() if name not in ("machine", "script", *REMARKS))
    script = part["header"].get("script", f"bench/bench_{stem}.py")
    lines = [f"## {part['title']}", "", f"`{script}`: {said}.", ""]
    groups = [rivals for rivals in grouped(timed([part])) if EAGER in rivals]
    shown = [(row, rivals) for rivals in groups for name, row in rivals.items() if name not in (EAGER, COMPILED, COPY)]
    lines += lines_of([cells(row, rivals) for row, rivals in shown] or part["rows"])
    ratios = [rivals[EAGER].median_us / row.median_us for row, rivals in shown if row.provider == OURS and row.direction not in PARTS]
    if ratios:
        lines += ["", f"Times torch: geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}, {len(ratios)} rows."]
    return "\n".join([*lines, ""])


def markdown(parts: dict[str, Part], picture: str) -> str:
    heads, rows = {stem: part["header"] for stem, part in parts.items()}, timed(parts.values())
    lines = [f"# Benchmark on {next(iter(heads.values()))['machine']}", ""]
    if any("quick" in head for head in heads.values()):
        lines += ["**A quick run: it shows that everything works. Its numbers mean nothing.**", ""]
    lines += [f"**{stem}, {word}: {head[word]}**\n" for stem, head in heads.items() for word in REMARKS[1:] if word in head]
    few = sum(row.cores is not None and row.cores < DISTURBED_CORES for row in rows)
    if few:
        lines += [f"**{few} of {len(rows)} rows had less than {DISTURBED_CORES} of a core: another process ran. Measure again.**", ""]
    beyond, within = losses(rows)
    lines += ["## Where torch or its compiler wins", "", *(f"* {each}" for each in beyond or ["In none of the rows, beyond noise."]), ""]
    lines += ["Faster than ours, but p20-p80 overlap:", "", *(f"* {each}" for each in within), ""] if within else []
    return "\n".join([*lines, f"![how many times as fast as torch]({picture})", "", *(text_of(*item) for item in parts.items())])


def chart(rows: Iterable[Row], file: Path) -> None:
    """A line for each operator, on it a dot for each case: how many times as fast as torch."""
    import matplotlib.pyplot as plt

    times: dict[str, list[float]] = {}
    for rivals in grouped(rows):
        if OURS in rivals and EAGER in rivals and rivals[OURS].direction not in PARTS:
            times.setdefault(rivals[OURS].operator, []).append(rivals[EAGER].median_us / rivals[OURS].median_us)
    names = sorted(times, key=lambda name: statistics.median(times[name]))
    picture, axis = plt.subplots(figsize=(8, 0.3 * len(names) + 1), layout="constrained")
    for place, name in enumerate(names):
        middle = statistics.median(times[name])
        axis.barh(place, math.log2(middle), height=0.6, color="#d9ead3")
        colours = ["#1b7837" if each >= 1 else "#b35806" for each in times[name]]
        axis.scatter([math.log2(each) for each in times[name]], [place] * len(colours), s=22, zorder=3, alpha=0.8, c=colours)
        axis.text(1.01, place, f"{middle:.2f}", transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    axis.axvline(0, color="black", linewidth=0.9)
    axis.set_yticks(range(len(names)), names)
    axis.xaxis.set_major_formatter(lambda value, _: f"{2**value:.3g}")
    axis.grid(axis="x", linewidth=0.4)
    title = "how many times as fast as torch: a dot is a case, orange where torch is faster; bar and number are the median"
    picture.suptitle(title, x=0.01, ha="left", fontsize=9)
    picture.savefig(file, dpi=120)
    plt.close(picture)


def publish(folder: Path) -> list[Path]:
    """Writes <folder>.md and <folder>.png of the results in a machine's folder."""
    text, picture = (folder.with_name(folder.name + suffix) for suffix in (".md", ".png"))
    parts = read(folder)
    chart(timed(parts.values()), picture)
    text.write_text(markdown(parts, picture.name))
    return [text, picture]


def compare(before: Path, after: Path) -> int:
    """Prints what changed from one machine's folder to another beyond noise; returns 1 if a row of ours regressed."""
    old_rows, new_rows = ({(row.what, row.provider): row for row in timed(read(folder).values())} for folder in (before, after))
    pairs = [(old, new_rows[key]) for key, old in old_rows.items() if key in new_rows]
    if not pairs:
        print("these folders do not have one row in common")
        return 2
    changed = [(old, new) for old, new in pairs if new.p20_us > old.p80_us or old.p20_us > new.p80_us]
    regressed = 0
    for old, new in sorted(changed, key=lambda pair: pair[0].median_us / pair[1].median_us):
        growth = new.median_us / old.median_us - 1
        is_worse = new.provider.startswith(OURS) and growth > MOST_GROWTH
        word = "REGRESSED" if is_worse else "slower" if growth > 0 else "faster"
        print(f"{word:<9}  {growth:+7.1%}  {duration(old.median_us)} -> {duration(new.median_us)}  {new.provider}: {new}")
        regressed += is_worse
    print(f"{len(pairs)} rows in both, {len(changed)} changed beyond noise, {regressed} regressed by more than {MOST_GROWTH:.0%}")
    return 1 if regressed else 0
