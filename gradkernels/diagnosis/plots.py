"""The pictures of GradientMonitor and diagnose: layers from top to bottom, gradient norms on a log axis.

matplotlib is imported when a picture is drawn, so importing gradkernels does not need it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import cycle
from os import PathLike
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

# The colours of all pictures, also those of the examples.
BAD, FAIR, GOOD, INK, PALE = "#c0392b", "#c8860a", "#1f7a4d", "#444444", "#8a8a8a"
_INCHES_PER_LAYER = 0.21
_INCHES_OVER_TIME = 3.4
# Axes and colours span at least four decades. A smaller difference is normal and must not look like a large
# one.
_MIN_RANGE = 1e4
# Norms outside of this range are not drawn: matplotlib's margins around 1e-320 or 1e300 would leave float64.
_SMALLEST_DRAWN, _LARGEST_DRAWN = 1e-100, 1e100


def _figure(layers: int, width: float) -> Figure:
    """A figure that is high enough for one line of text per layer, up to a page."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a picture needs matplotlib: pip install matplotlib ({error})") from error
    figure = Figure(figsize=(width, min(max(_INCHES_PER_LAYER * layers + 1.6, 3.6), 16)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Give axes a title, labels and no frame on the right and at the top."""
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    """Name the layers along the axis, the first one at the top, and as many of them as there is room for."""
    height = axes.get_window_extent().height / axes.figure.dpi
    shown = range(0, len(names), math.ceil(len(names) * _INCHES_PER_LAYER * 0.8 / height))
    axes.set_yticks([*shown], [names[place] for place in shown], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _draw_flow(axes: Axes, norms: Sequence[float | None], joined: Sequence[bool], colour: str, label: str) -> None:
    """Draw a point for each layer, and a line through the layers that are `joined`.

    Normalisations are not joined, because their gradients are of another size than those of weights.
    """
    axes.set_xscale("log")
    points = [(norm, place) for place, norm in enumerate(norms) if _is_drawn(norm)]
    line = [(norm, place) for norm, place in points if joined[place]]
    if points:
        axes.plot([norm for norm, _ in line], [place for _, place in line], "-", color=colour, linewidth=1.4)
        axes.plot([norm for norm, _ in points], [place for _, place in points], "o", color=colour, markersize=4, label=label)


def _is_drawn(norm: float | None) -> TypeGuard[float]:
    return norm is not None and _SMALLEST_DRAWN <= norm <= _LARGEST_DRAWN


def _is_zero(norm: float | None) -> bool:
    return norm is not None and norm < _SMALLEST_DRAWN


def _is_nonfinite(norm: float | None) -> bool:
    """Whether a norm is nan or too large to draw."""
    return norm is not None and not norm <= _LARGEST_DRAWN


def _mark_edges(axes: Axes, norms: Sequence[float | None], colours: Sequence[str]) -> None:
    """Widen the axis to its smallest range, and write norms that are not drawn, such as 0, at its edges."""
    zeros, nonfinite = [_is_zero(norm) for norm in norms], [_is_nonfinite(norm) for norm in norms]
    if math.isfinite(axes.dataLim.minposx):
        lowest, highest = axes.get_xlim()
        lowest = min(lowest, highest / _MIN_RANGE)
        width = highest / lowest
        axes.set_xlim(lowest / width ** (0.1 if any(zeros) else 0.02), highest * width ** (0.1 if any(nonfinite) else 0.02))
    else:
        axes.set_xticks([], minor=True)
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no norm to draw", color=PALE, ha="center", va="center", transform=axes.transAxes)
    for place, norm in enumerate(norms):
        if zeros[place] or nonfinite[place]:
            x, align = (0.01, "left") if zeros[place] else (0.99, "right")
            transform = axes.get_yaxis_transform()
            axes.text(x, place, f"{norm:g}", color=colours[place], ha=align, va="center", fontsize=9, weight="bold", transform=transform)


def _draw_over_time(axes: Axes, over_time: Sequence[tuple[str, str, Sequence[float]]]) -> None:
    """Draw a line for each recurrent layer, from its first time step to its last."""
    axes.set_yscale("log")
    for (name, verdict, norms), style in zip(over_time, cycle(("-", "--", ":", "-.")), strict=False):
        drawn = [norm if _is_drawn(norm) else math.nan for norm in norms]
        axes.plot(range(len(norms)), drawn, style, marker=".", color=_COLOURS[verdict], label=f"{name}: {verdict}")
    lowest, highest = axes.get_ylim()
    axes.set_ylim(min(lowest, highest / _MIN_RANGE), highest)
    axes.grid(axis="y", color="#e6e6e6")
    axes.legend(frameon=False, fontsize=9)
    dress(axes, "gradient of the hidden state after each time step", "time step", "gradient norm")


def gradient_flow(
    path: str | PathLike[str],
    layers: Sequence[str],
    joined: Sequence[bool],
    steps: Sequence[int],
    norms: Sequence[Sequence[float | None]],
    remark: str,
) -> None:
    """Draw the gradient norms of a training: over depth, and as a heat map of layers and steps.

    Args:
        path: the file to write.
        layers: their names, in the order in which they run.
        joined: for each layer, whether the line over depth goes through it.
        steps: the numbers of the steps.
        norms: norms[i][j] is the norm of layer j in steps[i], or None.
        remark: the sentence on the last step for the title.
    """
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = _figure(len(layers), 13)
    flow, heat = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.25))

    drawn = [[norm for row in norms if _is_drawn(norm := row[place])] for place in range(len(layers))]
    if len(steps) > 1 and any(drawn):
        places = [place for place, values in enumerate(drawn) if values]
        least, most = [min(drawn[place]) for place in places], [max(drawn[place]) for place in places]
        widths = [high - low for low, high in zip(least, most, strict=True)]
        # Sticky edges of bars would round the axis to multiples of its range, which hides norms of 1e-5 times
        # the range.
        flow.use_sticky_edges = False
        flow.barh(places, widths, left=least, height=0.9, color="#b8c4d6", alpha=0.5, linewidth=0, label="all steps")
    if len(steps) > 1:
        _draw_flow(flow, norms[0], joined, "#4a78b5", f"step {steps[0]}")
    _draw_flow(flow, norms[-1], joined, INK, f"step {steps[-1]}")
    _mark_edges(flow, norms[-1], [INK] * len(layers))
    _name_layers(flow, layers)
    flow.grid(axis="x", color="#e6e6e6")
    if flow.get_legend_handles_labels()[1]:
        flow.legend(frameon=False, fontsize=9)
    dress(flow, textwrap.fill(f"step {steps[-1]}: {remark}", 62), "gradient norm", "")

    image = [[norm if _is_drawn(norm) else math.nan for norm in column] for column in zip(*norms, strict=True)]
    highest = max((norm for column in drawn for norm in column), default=1.0)
    lowest = min((norm for column in drawn for norm in column), default=1.0)
    scale = LogNorm(min(lowest, highest / _MIN_RANGE), highest)
    edges = (-0.5, len(steps) - 0.5, len(layers) - 0.5, -0.5)
    shown = heat.imshow(image, aspect="auto", interpolation="nearest", extent=edges, cmap="viridis", norm=scale)
    if any(drawn):
        figure.colorbar(shown, ax=heat, label="gradient norm", pad=0.01)
    legend = []
    for colour, words, holds in (
        (BAD, "not finite", _is_nonfinite),
        ("#000000", "0", _is_zero),
        ("#ffffff", "none", lambda norm: norm is None),
    ):
        mask = [[1.0 if holds(norm) else math.nan for norm in column] for column in zip(*norms, strict=True)]
        if any(value == 1 for column in mask for value in column):
            heat.imshow(mask, aspect="auto", interpolation="nearest", extent=edges, cmap=ListedColormap([colour]))
            legend.append(Patch(facecolor=colour, edgecolor=INK, label=words))
    if legend:
        heat.legend(handles=legend, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9, borderpad=0)
    heat.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    heat.xaxis.set_major_formatter(FuncFormatter(lambda x, _: str(steps[round(x)]) if 0 <= round(x) < len(steps) else ""))
    dress(heat, "" if legend else "every layer over the steps", "step", "")
    figure.savefig(path, dpi=110)


# Blue is a gradient that is too small, red one that is too large, and brown one that is blocked.
_COLOURS = {
    "non-finite": "#000000",
    "exploding": BAD,
    "vanishing": "#2f6fb3",
    "dead": "#8a5a2b",
    "saturated": "#d9902f",
    "badly initialised": "#8e44ad",
    "BN with tiny batch": "#c46fa8",
    "no gradient": "#9a9a9a",
    "healthy": GOOD,
    "vanishing over time": "#2f6fb3",
    "exploding over time": BAD,
}


def verdicts(
    path: str | PathLike[str],
    title: str,
    layers: Sequence[tuple[str, str]],
    joined: Sequence[bool],
    norms: Sequence[float | None],
    after: Sequence[float | None] | None,
    remarks: Sequence[str],
    over_time: Sequence[tuple[str, str, Sequence[float]]],
) -> None:
    """Draw the gradient norm of each layer, and of each time step, in the colour of its verdict.

    Args:
        path: the file to write.
        title: the title.
        layers: (name, worst verdict) of each layer, in the order in which they run.
        joined: for each layer, whether the line over depth goes through it.
        norms: the gradient norm of each layer, or None.
        after: the same after the safe cures; None if they were not applied.
        remarks: the lines next to the picture.
        over_time: (name, verdict, gradient norm of each time step) of each recurrent layer.
    """
    figure = _figure(len(layers), 13)
    of_layers: FigureBase = figure
    if over_time:
        height = figure.get_figheight()
        figure.set_figheight(height + _INCHES_OVER_TIME)
        of_layers, of_steps = figure.subfigures(2, 1, height_ratios=(height, _INCHES_OVER_TIME), squeeze=False)[:, 0]
        _draw_over_time(of_steps.subplots(), over_time)
    flow, words = of_layers.subplots(1, 2, width_ratios=(1.25, 1))
    if after is not None:
        _draw_flow(flow, after, joined, "#8cc5a6", "with the safe cures")
    _draw_flow(flow, norms, joined, "#cccccc", "")
    for verdict, colour in _COLOURS.items():
        places = [place for place, (_, worst) in enumerate(layers) if worst == verdict]
        finite = [place for place in places if _is_drawn(norms[place])]
        if places:
            flow.plot([norms[place] for place in finite], finite, "o", color=colour, markersize=7, label=f"{verdict} ({len(places)})")
    _mark_edges(flow, norms, [_COLOURS[verdict] for _, verdict in layers])
    _name_layers(flow, [name for name, _ in layers])
    for label, (_, verdict) in zip(flow.get_yticklabels(), layers, strict=False):
        label.set_color(INK if len(flow.get_yticklabels()) < len(layers) else _COLOURS[verdict])
    flow.grid(axis="x", color="#e6e6e6")
    flow.legend(frameon=False, fontsize=9)
    dress(flow, title, "gradient norm", "")
    words.axis("off")
    text = "\n".join(line for remark in remarks for line in (textwrap.wrap(remark, 68, subsequent_indent="    ") or [""]))
    words.text(0, 1, text, va="top", fontsize=9, family="monospace", color=INK, transform=words.transAxes)
    figure.savefig(path, dpi=110)
