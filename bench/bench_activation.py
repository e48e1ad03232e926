"""The activations, forward + backward, beside torch's; swish with a learnt beta beside x * sigmoid(beta * x).

Least traffic, E = bytes of x: forward 2E, backward 3E; with leaky_relu's mask of one bit an element forward 2E + E/32, backward 2E + E/32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from harness import Case, arguments, gk, prove, reference, run

FUNCTIONS = {
    "leaky_relu": (gk.leaky_relu, F.leaky_relu, reference.leaky_relu),
    "elu": (gk.elu, F.elu, reference.elu),
    "swish": (gk.swish, F.silu, reference.swish),
    "swish with learnt beta": (gk.swish, reference.swish, reference.swish),
    "prelu": (gk.prelu, F.prelu, reference.prelu),
}
WITH_PARAMETER = ("swish with learnt beta", "prelu")
ELEMENTS = {"16 elements": 16, "64 KiB": 16 << 10, "4 MiB": 1 << 20, "64 MiB": 16 << 20}


def case(name: str, size: str, compiled: bool) -> Case:
    ours, eager, exact = FUNCTIONS[name]
    x = torch.randn(ELEMENTS[size])
    operands = [each.requires_grad_() for each in ([x, torch.full((1,), 0.7)] if name in WITH_PARAMETER else [x])]
    # Off zero, or the gradient of a parameter would be a sum that cancels, of which no digit can be proved.
    grad_y = torch.rand(ELEMENTS[size])

    def step(
        function: Callable[..., Any], operands: list[torch.Tensor] = operands, grad_y: torch.Tensor = grad_y
    ) -> dict[str, torch.Tensor]:
        y = function(*operands)
        grads = torch.autograd.grad(y, operands, grad_y)
        return {"y": y.detach(), **{f"gradient {i}": grad for i, grad in enumerate(grads)}}

    providers = {"eager": partial(step, eager), "gradkernels": partial(step, ours)}
    if compiled:
        providers["torch.compile"] = partial(step, torch.compile(eager))
    exactly = [each.detach().double().requires_grad_() for each in operands]
    x_bytes = x.nbytes
    return Case(
        name=f"{name} {size}",
        providers=dict(sorted(providers.items(), key=lambda item: item[0] == "gradkernels")),
        bytes=4 * x_bytes + x_bytes // 16 if name == "leaky_relu" else 5 * x_bytes,
        copied=x_bytes,
        prove=lambda: prove(f"{name} {size}", step(ours), step(eager), step(exact, exactly, grad_y.double())),
    )


if __name__ == "__main__":
    options = arguments(__doc__, "compile")
    run("activations, float32", [partial(case, name, size, options.compile) for name in FUNCTIONS for size in ELEMENTS], options)
