"""Training batch norm + activation, forward + backward: gk.BatchNormAct* beside act(bn(x) + residual) of torch.nn.

Least traffic, E = bytes of x: forward 2E, backward 3E; with a residual 3E and 4E. (32, 64, 56, 56) is measured forward and backward apart
as well, and some cases beside the packages that do the same (neighbours.py). In float64 the reference is no better than what it would have
to prove (bench_accuracy.py has long double). Compiling takes longest: --all compiles each of its 204 cases, --eager-only none; both want
--seconds.
"""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neighbours
from harness import Case, arguments, forward_and_backward, gk, prove, reference, run

ACTS = {"identity": lambda x: x, "relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "swish": F.silu}
SHAPES = (
    *((32, 64, 56, 56), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7)),
    *((8, 64, 160, 160), (16, 144, 56, 56), (128, 300), (4, 8, 5, 5)),
)
# shape, act, with a residual, layout, dtype, beside torch.compile; the first one is small, for --quick.
SELECTION = (
    ((128, 300), "leaky_relu", False, "contiguous", torch.float32, False),
    ((4, 8, 5, 5), "swish", False, "contiguous", torch.float32, True),
    ((32, 64, 56, 56), "leaky_relu", False, "contiguous", torch.float32, True),
    ((32, 64, 56, 56), "leaky_relu", False, "channels_last", torch.float32, True),
    ((32, 64, 56, 56), "relu", True, "contiguous", torch.float32, True),
    ((32, 64, 56, 56), "elu", False, "contiguous", torch.float32, False),
    ((32, 256, 56, 56), "leaky_relu", True, "contiguous", torch.float32, False),
    ((32, 512, 28, 28), "swish", True, "channels_last", torch.float32, False),
    ((32, 1024, 14, 14), "leaky_relu", False, "contiguous", torch.float32, True),
    ((32, 1024, 14, 14), "elu", True, "contiguous", torch.float32, False),
    ((32, 2048, 7, 7), "leaky_relu", False, "contiguous", torch.float32, True),
    ((8, 64, 160, 160), "swish", False, "contiguous", torch.float32, False),
    ((16, 144, 56, 56), "swish", False, "contiguous", torch.float32, True),
    ((16, 144, 56, 56), "swish", True, "channels_last", torch.float32, False),
    ((32, 64, 56, 56), "leaky_relu", False, "contiguous", torch.bfloat16, False),
    ((32, 1024, 14, 14), "swish", True, "channels_last", torch.bfloat16, False),
    ((32, 64, 56, 56), "leaky_relu", False, "contiguous", torch.float16, False),
)
APART = (32, 64, 56, 56)
ALL = tuple(
    (shape, act, with_residual, layout, dtype, True)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in SHAPES
    for layout in (("contiguous",) if len(shape) == 2 else ("contiguous", "channels_last"))
    for act in ("leaky_relu", "elu", "swish")
    for with_residual in (False, True)
)


class Eager(nn.Module):
    """What a network writes without gradkernels."""

    def __init__(self, bn: nn.Module, act: str) -> None:
        super().__init__()
        self.bn = bn
        self.act = ACTS[act]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(x)
        return self.act(y if residual is None else y + residual)


class Exact(nn.Module):
    def __init__(self, bn: nn.Module, act: str) -> None:
        super().__init__()
        self.bn = bn
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        bn = self.bn
        statistics = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        return reference.batch_norm_act(x, *statistics, True, bn.momentum, bn.eps, act=self.act, residual=residual)


def case(shape: tuple[int, ...], act: str, with_residual: bool, layout: str, dtype: torch.dtype, compiled: bool) -> Case:
    name = f"{shape} {act}{' + residual' * with_residual}"
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    # Off zero, or the running means would be sums that cancel, of which no digit can be proved.
    x, residual, grad_y = (torch.randn(shape).add_(0.5).to(dtype).contiguous(memory_format=memory_format) for _ in range(3))
    operands = [each.requires_grad_() for each in ((x, residual) if with_residual else (x,))]
    bn_class, ours_class = (nn.BatchNorm1d, gk.BatchNormAct1d) if len(shape) == 2 else (nn.BatchNorm2d, gk.BatchNormAct2d)
    bn, ours = bn_class(shape[1]), ours_class(shape[1], act=act)
    for module in (bn, ours):
        nn.init.uniform_(module.weight, 0.5, 1.5, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    eager = Eager(bn, act)

    def step(module: nn.Module, operands: list[Tensor] = operands, grad_y: Tensor = grad_y) -> dict[str, Tensor]:
        y = module(*operands)
        parameters = list(module.parameters())
        grads = torch.autograd.grad(y, [*operands, *parameters], grad_y)
        return {"y": y.detach(), **{f"gradient {i}": grad for i, grad in enumerate(grads)}}

    def answer(module: nn.Module, *rest: Any) -> dict[str, Tensor]:
        module = copy.deepcopy(module)
        return step(module, *rest) | {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}

    def check() -> None:
        wide = [each.detach().double().requires_grad_() for each in operands]
        with torch.no_grad():
            u = Exact(copy.deepcopy(bn), "identity").double()(*wide)
        # On which side of the kink such an element lies is up to rounding.
        given = torch.where(u.abs() < 1e-5, 0, grad_y)
        exact = answer(Exact(copy.deepcopy(bn), act).double(), wide, given.double())
        actual = {key: tensor for (key, _), tensor in zip(exact.items(), answer(ours, operands, given).values(), strict=True)}
        prove(name, actual, answer(eager, operands, given), exact)

    providers = {"eager": partial(step, eager)}
    for neighbour, module in neighbours.of_batch_norm_act(bn, act, shape, dtype, with_residual).items():
        neighbours.prove(neighbour, step(copy.deepcopy(module)), step(copy.deepcopy(eager)))
        providers[neighbour] = partial(step, module)
    if compiled:
        # Else the ninth case would be torch eager: what was compiled for the others counts against one limit.
        torch.compiler.reset()
        providers["torch.compile"] = partial(step, torch.compile(eager, dynamic=False))
    modules = {"eager": eager, "gradkernels": ours}
    forward = {provider: partial(module, *operands) for provider, module in modules.items()}
    least = (3 * x.nbytes, 4 * x.nbytes) if with_residual else (2 * x.nbytes, 3 * x.nbytes)
    made = Case(
        name=name,
        providers=providers | {"gradkernels": partial(step, ours)},
        bytes=sum(least),
        copied=x.nbytes,
        prove=check,
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
        apart=(shape, dtype) == (APART, torch.float32),
        saves=forward,
    )

    def parts() -> list[Case]:
        # The backward is that of modules of its own: torch's batch norm keeps running statistics for it, which another forward changes.
        recorded = copy.deepcopy(modules)
        inputs = {provider: [*operands, *module.parameters()] for provider, module in recorded.items()}
        calls = {provider: partial(module, *operands) for provider, module in recorded.items()}
        alone, backward = forward_and_backward(made, calls, inputs, grad_y, least)
        return [replace(alone, providers=forward), backward]

    made.parts = parts
    here = {"act": act, "with_residual": with_residual, "layout": layout, "dtype": dtype}
    for what, simpler in (
        ("the activation", {"act": "identity"}),
        ("the residual", {"with_residual": False}),
        (layout, {"layout": "contiguous"}),
        (made.dtype, {"dtype": torch.float32}),
    ):
        if not simpler.items() <= here.items():
            made.instead[what] = partial(case, shape, **here | simpler, compiled=False)
    return made


if __name__ == "__main__":
    options = arguments(__doc__, "all", "eager-only")
    cases = ALL if options.all else SELECTION
    if options.eager_only:
        cases = tuple((*each[:-1], False) for each in cases)
    run("batch norm + activation, training", [partial(case, *each) for each in cases], options, neighbours=neighbours.found())
