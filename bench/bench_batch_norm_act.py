"""Training batch norm + activation, forward + backward: gk.BatchNormAct* beside act(bn(x) + residual) of torch.nn.

Least traffic, E = bytes of x: forward 2E, backward 3E; with a residual 3E and 4E.
"""

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import Case, arguments, gk, prove, reference, run

ACTS = {"identity": lambda x: x, "relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "swish": F.silu}
CASES = (
    ((32, 64, 56, 56), "leaky_relu", False, "contiguous"),
    ((32, 256, 56, 56), "leaky_relu", False, "contiguous"),
    ((32, 1024, 14, 14), "leaky_relu", False, "contiguous"),
    ((32, 2048, 7, 7), "leaky_relu", False, "contiguous"),
    ((128, 300), "leaky_relu", False, "contiguous"),
    ((32, 64, 56, 56), "relu", True, "contiguous"),
    ((32, 1024, 14, 14), "relu", True, "contiguous"),
    ((32, 64, 56, 56), "identity", False, "contiguous"),
    ((32, 64, 56, 56), "elu", False, "contiguous"),
    ((32, 64, 56, 56), "swish", False, "contiguous"),
    ((32, 64, 56, 56), "swish", True, "contiguous"),
    ((32, 64, 56, 56), "leaky_relu", False, "channels_last"),
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


def case(shape: tuple[int, ...], act: str, with_residual: bool, layout: str, compiled: bool) -> Case:
    name = f"{shape} {act}{' + residual' * with_residual}"
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    # Off zero, or the running means would be sums that cancel, of which no digit can be proved.
    x, residual, grad_y = (torch.randn(shape).add_(0.5).contiguous(memory_format=memory_format) for _ in range(3))
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
        exact = answer(
            Exact(copy.deepcopy(bn), act).double(), [each.detach().double().requires_grad_() for each in operands], grad_y.double()
        )
        actual = {key: tensor for (key, _), tensor in zip(exact.items(), answer(ours).values(), strict=True)}
        prove(name, actual, answer(eager), exact)

    providers = {"eager": partial(step, eager)}
    if compiled:
        providers["torch.compile"] = partial(step, torch.compile(eager))
    return Case(
        name=name,
        providers=providers | {"gradkernels": partial(step, ours)},
        bytes=(7 if with_residual else 5) * x.nbytes,
        copied=x.nbytes,
        prove=check,
        layout=layout,
    )


if __name__ == "__main__":
    options = arguments(__doc__, "compile")
    run("batch norm + activation, training, float32", [partial(case, *each, options.compile) for each in CASES], options)
