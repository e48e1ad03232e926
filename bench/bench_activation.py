"""The activations, forward + backward, beside torch's; swish with a learnt beta beside x * sigmoid(beta * x).

Least traffic, E = bytes of x: forward 2E, backward 3E; with leaky_relu's mask of one bit an element forward 2E + E/32, backward 2E + E/32
(in 16-bit types E/16). Beside the compiler stand torch's function compiled and ours compiled, which must not be slower. 4 MiB is measured
forward and backward apart as well. The least size, 16 elements, is what a call costs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import Case, arguments, forward_and_backward, gk, prove, reference, run

FUNCTIONS = {
    "leaky_relu": (gk.leaky_relu, F.leaky_relu, reference.leaky_relu),
    "elu": (gk.elu, F.elu, reference.elu),
    "swish": (gk.swish, F.silu, reference.swish),
    "swish with learnt beta": (gk.swish, reference.swish, reference.swish),
    "prelu": (gk.prelu, F.prelu, reference.prelu),
    # In training its slopes are drawn, so that there is no answer to prove but what holds of equal bounds.
    "rrelu": (partial(gk.rrelu, training=True), partial(F.rrelu, training=True), None),
}
WITH_PARAMETER = ("swish with learnt beta", "prelu")
# Bytes of x in every dtype; 16 elements are as many in every dtype.
SIZES = {"16 elements": None, "64 KiB": 64 << 10, "4 MiB": 4 << 20, "64 MiB": 64 << 20}
# What moves as many bytes and computes less.
SIMPLER = {"elu": "leaky_relu", "swish": "leaky_relu", "swish with learnt beta": "swish", "prelu": "leaky_relu", "rrelu": "leaky_relu"}
COMPILED = {("leaky_relu", "4 MiB"), ("elu", "4 MiB"), ("swish", "4 MiB"), ("swish with learnt beta", "4 MiB")}


def case(name: str, size: str, dtype: torch.dtype, compiled: bool) -> Case:
    ours, eager, exact = FUNCTIONS[name]
    elements = 16 if SIZES[size] is None else SIZES[size] // dtype.itemsize
    x = torch.randn(elements).to(dtype)
    operands = [each.requires_grad_() for each in ([x, torch.full((1,), 0.7, dtype=dtype)] if name in WITH_PARAMETER else [x])]
    # Off zero, or the gradient of a parameter would be a sum that cancels, of which no digit can be proved.
    grad_y = torch.rand(elements).to(dtype)

    def step(function: Callable[..., Any], operands: list[Tensor] = operands, grad_y: Tensor = grad_y) -> dict[str, Tensor]:
        y = function(*operands)
        grads = torch.autograd.grad(y, operands, grad_y)
        return {"y": y.detach(), **{f"gradient {i}": grad for i, grad in enumerate(grads)}}

    def check() -> None:
        exactly = [each.detach().double().requires_grad_() for each in operands]
        if exact is not None:
            answers = (step(ours), step(eager), step(exact, exactly, grad_y.double()))
        else:
            slope = {"lower": 0.25, "upper": 0.25}
            answers = (
                step(partial(ours, **slope)),
                step(partial(eager, **slope)),
                step(partial(F.leaky_relu, negative_slope=0.25), exactly, grad_y.double()),
            )
        prove(f"{name} {size}", *answers)

    providers = {"eager": partial(step, eager)}
    if compiled:
        torch.compiler.reset()
        providers["torch.compile"] = partial(step, torch.compile(eager, dynamic=False))
        providers["gradkernels, compiled"] = partial(step, torch.compile(ours, dynamic=False))
    least = (2 * x.nbytes + x.numel() // 8,) * 2 if name == "leaky_relu" else (2 * x.nbytes, 3 * x.nbytes)
    forward = {"eager": partial(eager, *operands), "gradkernels": partial(ours, *operands)}
    made = Case(
        name=f"{name} {size}",
        providers=providers | {"gradkernels": partial(step, ours)},
        bytes=sum(least),
        copied=x.nbytes,
        prove=check,
        dtype=str(dtype).removeprefix("torch."),
        apart=(size, dtype) == ("4 MiB", torch.float32),
        saves=forward,
    )
    made.parts = lambda: forward_and_backward(made, forward, dict.fromkeys(forward, operands), grad_y, least)
    if name in SIMPLER:
        made.instead["what it computes"] = partial(case, SIMPLER[name], size, dtype, False)
    if dtype != torch.float32:
        made.instead[made.dtype] = partial(case, name, size, torch.float32, False)
    return made


if __name__ == "__main__":
    options = arguments(__doc__)
    cases = [partial(case, name, size, torch.float32, (name, size) in COMPILED) for name in FUNCTIONS for size in SIZES]
    cases += [partial(case, name, "4 MiB", torch.bfloat16, False) for name in FUNCTIONS]
    cases += [partial(case, name, "4 MiB", dtype, False) for dtype in (torch.float16, torch.float64) for name in ("leaky_relu", "swish")]
    run("activations", cases, options)
