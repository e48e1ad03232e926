"""How the experiments are told: tables and figures of one make; red is what goes wrong, green what is cured."""

from collections.abc import Iterable, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from gradkernels.diagnosis.plots import INK


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
