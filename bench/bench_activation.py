"""leaky_relu, elu and swish, forward + backward, beside torch's.

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
}
ELEMENTS = {"16 elements": 16, "64 KiB": 16 << 10, "4 MiB": 1 << 20, "64 MiB": 16 << 20}


def case(name: str, size: str, compiled: bool) -> Case:
    ours, eager, exact = FUNCTIONS[name]
    x = torch.randn(ELEMENTS[size], requires_grad=True)
    grad_y = torch.randn(ELEMENTS[size])

    def step(function: Callable[..., Any], x: torch.Tensor = x, grad_y: torch.Tensor = grad_y) -> dict[str, torch.Tensor]:
        y = function(x)
        (grad_x,) = torch.autograd.grad(y, x, grad_y)
        return {"y": y.detach(), "grad_x": grad_x}

    providers = {"eager": partial(step, eager), "gradkernels": partial(step, ours)}
    if compiled:
        providers["torch.compile"] = partial(step, torch.compile(eager))
    x_bytes = x.nbytes
    return Case(
        name=f"{name} {size}",
        providers=dict(sorted(providers.items(), key=lambda item: item[0] == "gradkernels")),
        bytes=4 * x_bytes + x_bytes // 16 if name == "leaky_relu" else 5 * x_bytes,
        copied=x_bytes,
        prove=lambda: prove(f"{name} {size}", step(ours), step(eager), step(exact, x.detach().double().requires_grad_(), grad_y.double())),
    )


if __name__ == "__main__":
    options = arguments(__doc__, "compile")
    run("activations, float32", [partial(case, name, size, options.compile) for name in FUNCTIONS for size in ELEMENTS], options)
