"""How the experiments are told: tables of one make, and figures in which red is what goes wrong and green what is cured."""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

BAD, FAIR, GOOD, INK, PALE = "#c0392b", "#c8860a", "#1f7a4d", "#444444", "#8a8a8a"


def new_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]] = (), caption: str | None = None) -> Table:
    """The first column to the left, figures to the right; a row without cells is a line."""
    table = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    for place, header in enumerate(headers):
        table.add_column(header, justify="right" if place else "left")
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    return table


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """In inches, of 100 pixels each."""
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
