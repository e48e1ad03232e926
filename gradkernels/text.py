"""Text that several reports share: tables, figures, lists of names, the first and the last gradient."""

import math
from collections.abc import Collection, Mapping, Sequence


def columns(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Return the lines of a table. Columns in `left` are aligned on the left, all others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def three_digits(value: float | None) -> str:
    """Return a figure with three digits; a dash for None."""
    return "-" if value is None else f"{value:.3g}"


def first_names(names: Sequence[str], count: int = 5) -> str:
    """Return the first `count` names, and the number of names that follow."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def first_to_last(gradients: Mapping[str, float]) -> str:
    """Return the sentence that compares the gradient of the first layer with that of the last.

    Args:
        gradients: layer -> gradient norm, in the order in which layers run.
    """
    if not gradients:
        return "no layer has a gradient"
    first, last = next(iter(gradients)), next(reversed([*gradients]))
    if first == last:
        return f"only layer {first} has a gradient: {three_digits(gradients[first])}"
    if not all(map(math.isfinite, (gradients[first], gradients[last]))) or not gradients[last]:
        return (
            f"the gradient of the first layer, {first}, is {three_digits(gradients[first])}, "
            f"and that of the last, {last}, {three_digits(gradients[last])}"
        )
    return f"the gradient of the first layer, {first}, is {three_digits(gradients[first] / gradients[last])} times that of the last, {last}"
