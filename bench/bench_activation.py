"""The activations compared with torch's; swish with a learnt beta is compared with x * sigmoid(beta * x).

Least traffic, E = bytes of x: forward 2E, backward 3E; leaky_relu keeps a mask of one bit an element instead of x, forward and backward
2E + E/32 each (E/16 in 16-bit types). 16 elements show what a call costs.
"""

from functools import partial

import torch
import torch.nn.functional as F

from harness import COMPILED, EAGER, OURS, PARTS, WHOLE, Case, answers, arguments, called, compiled, gk, prove, reference, run

# ours, torch's, what is exact in float64
FUNCTIONS = {
    "leaky_relu": (gk.leaky_relu, F.leaky_relu, reference.leaky_relu),
    "elu": (gk.elu, F.elu, reference.elu),
    "swish": (gk.swish, F.silu, reference.swish),
    "swish with a learnt beta": (gk.swish, reference.swish, reference.swish),
    "prelu": (gk.prelu, F.prelu, reference.prelu),
    "rrelu": (partial(gk.rrelu, training=True), partial(F.rrelu, training=True), None),
}
# The slopes of rrelu are drawn, so that only equal bounds have an answer to prove.
EQUAL = {"lower": 0.25, "upper": 0.25, "training": True}
PROVED = {"rrelu": (partial(gk.rrelu, **EQUAL), partial(F.rrelu, **EQUAL), partial(F.leaky_relu, negative_slope=0.25))}
WITH_PARAMETER = ("swish with a learnt beta", "prelu")
# Bytes of x in every dtype.
SIZES = {"16 elements": None, "64 KiB": 64 << 10, "4 MiB": 4 << 20, "64 MiB": 64 << 20}
COMPILED_FUNCTIONS = ("leaky_relu", "elu", "swish", "swish with a learnt beta")


def case(
    name: str,
    size: str | tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    direction: str = WHOLE,
    with_compiler: bool = False,
    layout: str = "contiguous",
) -> Case:
    """size is a row of SIZES, or a shape, whose second dimension has a parameter for each channel."""
    elements = SIZES[size] if isinstance(size, str) else None
    shape = size if isinstance(size, tuple) else (16 if elements is None else elements // dtype.itemsize,)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    parameters = [torch.full(shape[1:2] or (1,), 0.7, dtype=dtype)] if name in WITH_PARAMETER else []
    operands = [each.requires_grad_() for each in (x, *parameters)]
    # Not around zero: the gradient of a parameter would be a sum that cancels, and not one digit could be proved.
    grad_y = torch.rand(shape).to(dtype).contiguous(memory_format=memory_format)

    def check() -> None:
        ours, eager, exact = PROVED.get(name, FUNCTIONS[name])
        wide = [each.detach().double().requires_grad_() for each in operands]
        exactly = answers(partial(exact, *wide), wide, grad_y.double())
        prove(*(answers(partial(function, *operands), operands, grad_y) for function in (ours, eager)), exactly)

    ours, eager, _ = FUNCTIONS[name]
    functions = {EAGER: eager} | ({COMPILED: compiled(eager)} if with_compiler else {}) | {OURS: ours}
    least = {"forward": 2 * x.nbytes, "backward": 3 * x.nbytes}
    least = dict.fromkeys(PARTS, 2 * x.nbytes + x.numel() // 8) if name == "leaky_relu" else least
    return Case(
        operator=name,
        name=str(size),
        providers={provider: called(direction, partial(each, *operands), operands, grad_y) for provider, each in functions.items()},
        prove=check,
        bytes=least.get(direction) or sum(least.values()),
        copied=x.nbytes,
        direction=direction,
        dtype=dtype,
        layout=layout,
    )


if __name__ == "__main__":
    options = arguments(__doc__)
    sizes = ("16 elements",) if options.quick else ("16 elements", "64 KiB", "64 MiB")
    cases = [partial(case, name, size) for name in FUNCTIONS for size in sizes]
    if not options.quick:
        cases += [partial(case, name, "4 MiB", with_compiler=name in COMPILED_FUNCTIONS) for name in FUNCTIONS]
        cases += [partial(case, name, "4 MiB", direction=direction) for name in FUNCTIONS for direction in PARTS]
        cases += [partial(case, name, "4 MiB", torch.bfloat16) for name in FUNCTIONS]
        cases += [partial(case, name, "4 MiB", dtype) for dtype in (torch.float16, torch.float64) for name in ("leaky_relu", "swish")]
    run("activations", cases, options)
