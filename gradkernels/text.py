"""Text that several reports share: tables in columns, figures of three digits, lists of names, the gradient of first and last layer."""

import math
from collections.abc import Collection, Mapping, Sequence


def columns(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """The lines of a table. Cells of the columns in `left` stand on the left of their column, all others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def three_digits(value: float | None) -> str:
    """Three digits of a figure, a dash where there is none."""
    return "-" if value is None else f"{value:.3g}"


def some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def first_to_last(gradients: Mapping[str, float]) -> str:
    """The sentence that tells vanishing from exploding, of gradient norms in the order in which layers run."""
    if not gradients:
        return "no layer has a gradient"
    first, last = next(iter(gradients)), next(reversed([*gradients]))
    if first == last:
        return f"the gradient of the only layer with one, {first}, is {three_digits(gradients[first])}"
    if not all(map(math.isfinite, (gradients[first], gradients[last]))) or not gradients[last]:
        return (
            f"the gradient of the first layer, {first}, is {three_digits(gradients[first])}, "
            f"and that of the last, {last}, {three_digits(gradients[last])}"
        )
    return f"the gradient of the first layer, {first}, is {three_digits(gradients[first] / gradients[last])} times that of the last, {last}"
