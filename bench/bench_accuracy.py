"""How exact batch norm + activation is: the largest error of each result in ulp, ours and torch's, for each class of input that statistics
must survive. The bound that tests assert of these numbers, and how an ulp is counted: tests/accuracy.py. Exact means float64, and for
float64 long double.
"""

import torch

from harness import arguments, header, text_of, write

# isort: split
from accuracy import SIXTEEN_BITS, errors_in_ulps
from batch_norm_act_calls import HARD_INPUTS, hard_input, judged
from batch_norm_act_calls import arguments as operands

SHAPE = (8, 2, 90, 91)
TITLE = f"largest error of batch_norm_act in ulp, ours / torch's, training, {SHAPE}"


def row(inputs: str, dtype: torch.dtype, channels_last: bool) -> dict[str, str]:
    """Empty where the dtype cannot hold the inputs."""
    x = hard_input(inputs, SHAPE, dtype, channels_last)
    if not x.isfinite().all():
        return {}
    given = operands(SHAPE, torch.float32 if dtype in SIXTEEN_BITS else dtype, x=x)
    results = judged(given | {"grad_y": given["grad_y"].to(dtype)}, True, "leaky_relu")
    texts = {"inputs": inputs, "dtype": str(dtype).removeprefix("torch."), "layout": "channels_last" if channels_last else "contiguous"}
    for name, (actual, torchs, exact, scale) in results.items():
        ours, theirs, _ = errors_in_ulps(actual, torchs, exact, per="tensor", scale=scale)
        texts[name] = f"{float(ours.max()):.3g} / {float(theirs.max()):.2g}"
    return texts


if __name__ == "__main__":
    options = arguments(__doc__)
    chosen = list(HARD_INPUTS)[: 1 if options.quick else None]
    dtypes = (torch.float32, torch.float64, *SIXTEEN_BITS)
    rows = [row(inputs, dtype, last) for dtype in dtypes for inputs in chosen for last in (False, True)]
    part = {"title": TITLE, "header": header(options.quick), "rows": [each for each in rows if each]}
    write("accuracy", part, options.out)
    print(text_of("accuracy", part))
