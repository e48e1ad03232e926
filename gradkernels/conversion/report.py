"""ConversionReport: what convert did at each norm and activation, and why it did no more."""

import collections
from collections.abc import Iterator
from dataclasses import dataclass

from gradkernels import _native, text
from gradkernels.conversion.check import Difference
from gradkernels.conversion.result import Reason


@dataclass(frozen=True)
class Row:
    """One place where a norm or an activation is called.

    Attributes:
        name: the name of the module that is called; for a function, of the block that calls it. "" is the
            model itself.
        found: the norm or the activation that is called there, and what is fused with it.
        becomes: what computes it now; None if it was left as it was.
        why: why it was left as it was, or why no more was fused with it. The printed report groups rows that
            differ in nothing but the name, and ends with each reason and what would help.
        is_fused: whether one kernel computes more than one call.
    """

    name: str
    found: str
    becomes: str | None
    why: str
    is_fused: bool = False


@dataclass(frozen=True)
class ConversionReport:
    """What convert did with a model. Print it.

    Attributes:
        rows: a Row for each place where a norm or an activation is called.
        notes: remarks on the whole model.
        saved_bytes_before: the bytes that one call kept for backward before conversion, without parameters
            and buffers. This and the next three are None without `check`.
        saved_bytes_after: the same after conversion.
        output_difference: the largest Difference of the outputs.
        gradient_difference: the largest Difference of the gradients of the parameters.

    Example:
        >>> import torch, gradkernels as gk
        >>> from torch import nn
        >>> report = gk.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ELU()))
        >>> [(row.name, row.found, row.becomes) for row in report.rows]
        [('1', 'BatchNorm2d, ELU', 'batch_norm_act(elu)')]
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    saved_bytes_before: int | None = None
    saved_bytes_after: int | None = None
    output_difference: Difference | None = None
    gradient_difference: Difference | None = None

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        fused = sum(row.is_fused for row in self.rows)
        left = sum(row.becomes is None for row in self.rows)
        replaced = len(self.rows) - fused - left
        yield f"convert: {fused} fused, {replaced} replaced, {left} left of {len(self.rows)} norms and activations"
        yield from (f"  {note}" for note in self.notes)
        if self.saved_bytes_before is not None and self.saved_bytes_after is not None:
            before, after = map(_size, (self.saved_bytes_before, self.saved_bytes_after))
            change = f" ({self.saved_bytes_after / self.saved_bytes_before - 1:+.1%})" if self.saved_bytes_before else ""
            yield f"  saved for backward: {before} before, {after} after{change}"
            if fused and _native.C is not None and self.saved_bytes_after >= self.saved_bytes_before:
                yield "  less in `with gradkernels.recompute():`, where backward computes outputs of batch_norm_act again"
            yield f"  largest difference of outputs: {self.output_difference}"
            yield f"  largest difference of gradients: {self.gradient_difference}"
        if not self.rows:
            return
        first_names: dict[tuple[str, str, str], str] = {}
        counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
        for row in self.rows:
            cells = row.found, row.becomes or "left as it is", row.why
            first_names.setdefault(cells, row.name or "(the model)")
            counts[cells] += 1
        lines = [(name + f" x {counts[cells]}" * (counts[cells] > 1), *cells) for cells, name in first_names.items()]
        yield from (f"  {line}" for line in text.columns([("module", "found", "becomes", "why"), *lines], left=range(4)))
        reasons = collections.Counter(row.why for row in self.rows if row.why)
        if reasons:
            yield "  reasons, and what would help:"
        for why, count in reasons.most_common():
            yield f"    {count} x {why}" + (f": {why.remedy}" if isinstance(why, Reason) else "")


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
