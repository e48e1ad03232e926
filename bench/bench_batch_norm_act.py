"""Training batch norm + activation: gk.BatchNormAct* compared with act(bn(x) + residual) of torch.nn.

Least traffic, E = bytes of x: forward 2E, backward 3E; with a residual 3E and 4E. float64 is not measured: the reference is no better than
what it would have to prove (bench_accuracy.py has long double).
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import COMPILED, EAGER, OURS, PARTS, WHOLE, Case, answers, arguments, called, compiled, gk, prove, run

ACTS = {"relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "swish": F.silu}
LAST, BFLOAT16 = {"layout": "channels_last"}, {"dtype": torch.bfloat16}
# shape, act, and what is not as usual
CASES = (
    ((128, 300), "leaky_relu", {}),
    ((4, 8, 5, 5), "swish", {}),
    ((32, 64, 56, 56), "leaky_relu", {"with_compiler": True}),
    ((32, 64, 56, 56), "leaky_relu", LAST | {"with_compiler": True}),
    ((32, 64, 56, 56), "relu", {"residual": True, "with_compiler": True}),
    ((32, 64, 56, 56), "elu", {}),
    *(((32, 64, 56, 56), "leaky_relu", settings | {"direction": part}) for settings in ({}, LAST) for part in PARTS),
    ((32, 256, 56, 56), "leaky_relu", {"residual": True}),
    ((32, 512, 28, 28), "swish", {"residual": True} | LAST),
    ((32, 1024, 14, 14), "leaky_relu", {"with_compiler": True}),
    ((32, 1024, 14, 14), "elu", {"residual": True}),
    ((32, 2048, 7, 7), "leaky_relu", {"with_compiler": True}),
    ((8, 64, 160, 160), "swish", {}),
    ((16, 144, 56, 56), "swish", {"with_compiler": True}),
    ((16, 144, 56, 56), "swish", {"residual": True} | LAST),
    ((32, 64, 56, 56), "leaky_relu", BFLOAT16),
    ((32, 1024, 14, 14), "swish", {"residual": True} | LAST | BFLOAT16),
    ((32, 64, 56, 56), "leaky_relu", {"dtype": torch.float16}),
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


def results(module: nn.Module, operands: list[Tensor], grad_y: Tensor) -> dict[str, Tensor]:
    """Output, gradients and running statistics of a copy of the module, by the same names for ours and torch's."""
    module = copy.deepcopy(module)
    found = answers(partial(module, *operands), [*operands, *module.parameters()], grad_y)
    return found | {name.rpartition(".")[2]: each for name, each in module.named_buffers() if each.is_floating_point()}


def case(
    shape: tuple[int, ...],
    act: str,
    residual: bool = False,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    direction: str = WHOLE,
    with_compiler: bool = False,
) -> Case:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    # Not around zero: the running means would be sums that cancel, and not one digit could be proved.
    drawn = [torch.randn(shape).add_(0.5).to(dtype).contiguous(memory_format=memory_format) for _ in range(2 + residual)]
    grad_y, operands = drawn[0], [each.requires_grad_() for each in drawn[1:]]
    bn, ours = (nn.BatchNorm1d, gk.BatchNormAct1d) if len(shape) == 2 else (nn.BatchNorm2d, gk.BatchNormAct2d)
    modules: dict[str, nn.Module] = {EAGER: Eager(bn(shape[1]), act), OURS: ours(shape[1], act=act)}
    weight = torch.empty(shape[1]).uniform_(0.5, 1.5)
    for module in modules.values():
        next(module.parameters()).data.copy_(weight)

    def check() -> None:
        wide, exact = [each.detach().double().requires_grad_() for each in operands], copy.deepcopy(modules[EAGER]).double()
        before_act = copy.deepcopy(exact.bn)(wide[0]) + (wide[1] if residual else 0)
        # Rounding decides on which side of the kink such an element lies.
        given = torch.where(before_act.detach().abs() < 1e-5, 0, grad_y)
        prove(*(results(modules[name], operands, given) for name in (OURS, EAGER)), results(exact, wide, given.double()))

    forwards = {EAGER: modules[EAGER]} | ({COMPILED: compiled(modules[EAGER])} if with_compiler else {}) | {OURS: modules[OURS]}
    inputs = {provider: [*operands, *module.parameters()] for provider, module in forwards.items()}
    least = {"forward": (2 + residual) * grad_y.nbytes, "backward": (3 + residual) * grad_y.nbytes}
    return Case(
        operator="batch_norm_act",
        name=f"{act}{' + residual' * residual} {shape}",
        providers={name: called(direction, partial(each, *operands), inputs[name], grad_y) for name, each in forwards.items()},
        prove=check,
        bytes=least.get(direction) or sum(least.values()),
        copied=grad_y.nbytes,
        direction=direction,
        dtype=dtype,
        layout=layout,
    )


if __name__ == "__main__":
    options = arguments(__doc__)
    cases = [partial(case, shape, act, **settings) for shape, act, settings in (CASES[:2] if options.quick else CASES)]
    run("batch norm + activation, training", cases, options)
