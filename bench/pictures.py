"""Results as pictures: how many times as fast as torch and the compiler, the bandwidth beside a copy's, and cost against size.

Only rows of gradkernels and what stands beside them are drawn. Colour is the provider, the same one in every picture.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness import COPY, PARTS, label
from table import OURS, SMALL_BYTES, cases, is_of_harness, warm

COLOURS = {OURS: "#1b7837", "eager": "#b35806", "torch.compile": "#542788"}
# Of a bar whose p20-p80 overlap torch's.
WITHIN_NOISE = 0.35
NAMES = {OURS: "gradkernels", "eager": "torch", "torch.compile": "torch.compile"}
GREY = "#777777"
# What a row has of outputs, on a GPU of its L2 cache -> marker, whether it is filled, and what it is called.
MARKERS = {
    "fresh": ("o", False, "fresh outputs"),
    "warm": ("o", True, "warm outputs"),
    "none": ("^", True, "in place"),
    "cold L2": ("o", False, "cold L2"),
    "warm L2": ("o", True, "warm L2"),
}


def in_units(*units: tuple[str, float]) -> Callable[[float, Any], str]:
    """Of an axis: a number in the first of the units that it reaches, else in the last."""

    def formatted(value: float, _: Any) -> str:
        unit, size = next((each for each in units if value >= each[1]), units[-1])
        return f"{value / size:g}{unit}"

    return formatted


sizes = in_units((" GB", 1e9), (" MB", 1e6), (" kB", 1e3), (" B", 1))
counts = in_units(("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1))
# Of microseconds.
durations = in_units((" s", 1e6), (" ms", 1e3), (" us", 1), (" ns", 1e-3))


def figures(value: float, _: Any) -> str:
    return f"{value:g}"


def overlap(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether p20-p80 do."""
    return row["p20_us"] <= other["p80_us"] and other["p20_us"] <= row["p80_us"]


def ratios(results: dict[str, Any]) -> Figure:
    """A panel for each script, all on one scale, a bar for each whole case, its figures beside it; torch wins those that end left of 1."""
    panels = []
    for script in results["scripts"].values():
        found = list(cases(script["rows"])) if is_of_harness(script["rows"]) else []
        found = [pair for pair in found if pair[0]["direction"] not in PARTS]
        if found:
            # The largest win on top.
            found.sort(key=lambda pair: pair[1][OURS]["times_eager"])
            panels.append((script["title"], found))
    heights = [len(found) + 2 for _, found in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 0.24 * sum(heights) + 0.8), squeeze=False, sharex=True, height_ratios=heights, layout="constrained"
    )
    ours = [providers[OURS] for _, found in panels for _, providers in found]
    shown = [1.0, *(row[times] for row in ours for times in ("times_eager", "times_compile") if row[times] is not None)]
    limits = min(0.7, min(shown) / 1.15), max(2.0, max(shown) * 1.15)
    for axis, (title, found) in zip(axes[:, 0], panels, strict=True):
        places = range(len(found))
        eager = [providers[OURS]["times_eager"] for _, providers in found]
        axis.barh(
            places,
            [each - 1 for each in eager],
            left=1,
            height=0.62,
            color=[
                (COLOURS["eager"] if each < 1 else COLOURS[OURS], WITHIN_NOISE if overlap(providers[OURS], providers["eager"]) else 1.0)
                for each, (_, providers) in zip(eager, found, strict=True)
            ],
        )
        compiled = [(place, providers[OURS]["times_compile"]) for place, (_, providers) in zip(places, found, strict=True)]
        compiled = [(place, each) for place, each in compiled if each is not None]
        axis.scatter(
            [each for _, each in compiled], [place for place, _ in compiled], marker="D", s=26, color=COLOURS["torch.compile"], zorder=3
        )
        # In columns of their own, where neither bars nor diamonds are.
        for column, colour, name, texts in (
            (1.02, "#222222", "torch", [(place, f"{each:.2f}") for place, each in zip(places, eager, strict=True)]),
            (1.09, COLOURS["torch.compile"], "compile", [(place, f"{each:.2f}") for place, each in compiled]),
        ):
            for place, text in [(len(found), name), *texts] if texts else ():
                axis.text(column, place, text, transform=axis.get_yaxis_transform(), va="center", ha="left", fontsize=7.5, color=colour)
        axis.axvline(1, color="black", linewidth=0.9)
        axis.set_xscale("log")
        axis.set_xlim(limits)
        axis.set_xticks([tick for tick in (0.1, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 20, 40) if limits[0] <= tick <= limits[1]])
        axis.minorticks_off()
        axis.tick_params(labelbottom=True)
        axis.xaxis.set_major_formatter(FuncFormatter(figures))
        axis.set_yticks(places, [label(case) + warm(case) for case, _ in found], fontsize=7.5)
        axis.set_ylim(-0.7, len(found) - 0.3)
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(axis="x", linewidth=0.4, color="#cccccc")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    title = "how many times as fast as torch (bars: green faster, orange slower, pale within noise) and as torch.compile (diamonds)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def roofline(results: dict[str, Any]) -> Figure:
    """Bytes a call has to move against the bandwidth reached, beside that of a copy into memory that is there already.

    A dash is the copy of the case's own tensor, in the same blocks: small ones are copied from cache to cache. What reads more than it
    writes, or writes where it has read, may be above it: half of what a copy moves is written.
    """
    figure, axis = plt.subplots(figsize=(9, 5.2), layout="constrained")
    least, most, least_bytes, most_bytes = float("inf"), 0.0, float("inf"), 0.0
    drawn = set()
    for provider in ("eager", "torch.compile", OURS):
        for outputs, (marker, filled, _) in MARKERS.items():
            points = [
                (row["bytes"], row["gb_per_s"])
                for script in results["scripts"].values()
                if is_of_harness(script["rows"])
                for row in script["rows"]
                if row["provider"] == provider and row["outputs"] == outputs
            ]
            if not points:
                continue
            drawn.add(outputs)
            x, y = zip(*points, strict=True)
            axis.scatter(
                x,
                y,
                s=30,
                marker=marker,
                facecolors=COLOURS[provider] if filled else "none",
                edgecolors=COLOURS[provider],
                linewidths=1.1,
                alpha=0.85,
                zorder=4 if provider == OURS else 3,
            )
            least, most, least_bytes, most_bytes = min(least, *y), max(most, *y), min(least_bytes, *x), max(most_bytes, *x)
    limit = results["header"][COPY]
    axis.axhline(limit, color="black", linewidth=1.2)
    copies = {
        (row["bytes"], row["gb_per_s"] / row["of_copy"])
        for script in results["scripts"].values()
        if is_of_harness(script["rows"])
        for row in script["rows"]
        if row["provider"] == OURS and row["of_copy"] > 0
    }
    if copies:
        axis.scatter(*zip(*copies, strict=True), marker="_", s=60, color="black", linewidths=1.0, zorder=2)
        most = max(most, *(each for _, each in copies))
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(least_bytes / 2, most_bytes * 2)
    axis.set_ylim(least / 3, max(limit, most) * 2)
    axis.annotate(
        f"copy of 64 MiB in memory: {limit:g} GB/s", (axis.get_xlim()[0], limit), (5, 4), textcoords="offset points", fontsize=8.5
    )
    axis.axvspan(axis.get_xlim()[0], SMALL_BYTES, color="#f2f2f2", zorder=0)
    axis.annotate(
        "below 1 MiB the cost of a call rules",
        (SMALL_BYTES, axis.get_ylim()[0]),
        (-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=GREY,
    )
    axis.xaxis.set_major_formatter(FuncFormatter(sizes))
    axis.yaxis.set_major_formatter(FuncFormatter(figures))
    axis.set_xlabel("least bytes that a call has to move")
    axis.set_ylabel("these bytes over its time, GB/s")
    axis.set_title(
        "bandwidth of every call measured; a copy from memory to memory is the line, of the call's own tensor a dash",
        loc="left",
        fontsize=9.5,
    )
    axis.grid(linewidth=0.4, color="#cccccc")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [
        plt.Line2D([], [], marker="s", linestyle="", color=COLOURS[each], label=NAMES[each]) for each in (OURS, "eager", "torch.compile")
    ]
    handles.append(plt.Line2D([], [], marker="_", linestyle="", color="black", label="copy of the call's tensor"))
    for marker, filled, name in (MARKERS[outputs] for outputs in MARKERS if outputs in drawn):
        handles.append(plt.Line2D([], [], marker=marker, linestyle="", color=GREY, markerfacecolor=GREY if filled else "none", label=name))
    axis.legend(handles=handles, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 0.07))
    return figure


def scaling(rows: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each thing that grows: measured points, p20-p80 as a bar, and a line for each formula as far as it holds."""
    against = list(dict.fromkeys(row["against"] for row in rows))
    columns = min(2, len(against))
    figure, axes = plt.subplots(math.ceil(len(against) / columns), columns, figsize=(11, 7.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, against, strict=False):
        chosen = [row for row in rows if row["against"] == name]
        for case, colour in zip(dict.fromkeys(row["case"] for row in chosen), (COLOURS[OURS], COLOURS["torch.compile"]), strict=False):
            points = sorted((row for row in chosen if row["case"] == case), key=lambda row: row["n"])
            n, median = [row["n"] for row in points], [row["median_us"] for row in points]
            formulas = list(dict.fromkeys(row["formula"] for row in points))
            for formula in formulas:
                held = [row for row in points if row["formula"] == formula]
                text = "\n".join([case, *formulas]) if formula == formulas[0] else None
                # Straight between two points, which axes in powers of ten bend.
                between = numpy.geomspace(held[0]["n"], held[-1]["n"], 100)
                said = numpy.interp(between, [row["n"] for row in held], [row["fitted_us"] for row in held])
                axis.plot(between, said, color=colour, linewidth=1.1, label=text)
            axis.vlines(n, [row["p20_us"] for row in points], [row["p80_us"] for row in points], color=colour, linewidth=1.4)
            axis.plot(n, median, "o", markersize=4.5, color=colour)
        axis.set_xscale("log")
        axis.set_yscale("log")
        ticks = [row["n"] for row in chosen]
        if max(ticks) <= 64:
            axis.set_xticks(ticks)
            axis.minorticks_off()
        axis.xaxis.set_major_formatter(FuncFormatter(counts))
        axis.yaxis.set_major_formatter(FuncFormatter(durations))
        axis.yaxis.set_minor_formatter(NullFormatter())
        # Room for what the lines are, above them.
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** (0.11 * len({(row["case"], row["formula"]) for row in chosen}) + 0.08))
        if high < 10 * low:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        axis.set_xlabel(f"n, {name}")
        axis.legend(fontsize=7.5, loc="upper left", frameon=False)
        axis.grid(linewidth=0.4, color="#cccccc")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(against) :]:
        axis.set_visible(False)
    title = "time of a call: measured points (bars p20-p80) and the formulas fitted to them, as far as each holds"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def draw(results: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Writes what there is to draw and returns the files."""
    drawn: dict[str, Figure] = {}
    if any(is_of_harness(script["rows"]) for script in results["scripts"].values()):
        drawn["ratio"] = ratios(results)
        drawn["roofline"] = roofline(results)
    if "scaling" in results["scripts"]:
        drawn["scaling"] = scaling(results["scripts"]["scaling"]["rows"])
    paths = []
    for what, figure in drawn.items():
        paths.append(folder / f"{name}_{what}.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    return paths
