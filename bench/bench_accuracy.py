"""How exact batch norm + activation is: the largest error of each result in units in the last place, ours beside torch's.

One row for each class of input that statistics must survive, dtype and layout; what is asserted of the same numbers, and how an ulp is
counted, stands in tests/accuracy.py. Exact means float64, and for float64 long double.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from harness import ROOT, arguments, header, report

sys.path.insert(0, str(ROOT / "tests"))

from accuracy import SIXTEEN_BITS, errors_in_ulps
from batch_norm_act_calls import HARD_INPUTS, hard_input, judged
from batch_norm_act_calls import arguments as operands

SHAPE = (8, 2, 90, 91)
RESULTS = ("running_mean", "running_var", "y", "grad_x", "grad_weight", "grad_bias")


@dataclass
class Row:
    inputs: str
    dtype: str
    layout: str
    errors: dict[str, tuple[float, float]]


def row(inputs: str, dtype: torch.dtype, channels_last: bool) -> Row | None:
    x = hard_input(inputs, SHAPE, dtype, channels_last)
    if not x.isfinite().all():
        return None
    given = operands(SHAPE, torch.float32 if dtype in SIXTEEN_BITS else dtype, x=x)
    results = judged(given | {"grad_y": given["grad_y"].to(dtype)}, True, "leaky_relu")
    errors = {}
    for name in RESULTS:
        actual, torchs, exact, scale = results[name]
        ours, theirs, _ = errors_in_ulps(actual, torchs, exact, per="tensor", scale=scale)
        errors[name] = (float(ours.max()), float(theirs.max()))
    return Row(inputs, str(dtype).removeprefix("torch."), "channels_last" if channels_last else "contiguous", errors)


def rows(quick: bool) -> Iterator[Row]:
    for dtype in (torch.float32, torch.float64, *SIXTEEN_BITS):
        for inputs in list(HARD_INPUTS)[: 1 if quick else None]:
            for channels_last in (False, True):
                made = row(inputs, dtype, channels_last)
                if made is not None:
                    yield made


if __name__ == "__main__":
    options = arguments(__doc__)
    columns = {
        "inputs": lambda row: row.inputs,
        "dtype": lambda row: row.dtype,
        "layout": lambda row: row.layout,
        **{name: lambda row, name=name: "{:.3g} / {:.2g}".format(*row.errors[name]) for name in RESULTS},
    }
    report(
        f"largest error of batch_norm_act in ulp, ours / torch's, training, {SHAPE}", header(), columns, rows(options.quick), options.json
    )
