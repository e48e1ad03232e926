"""Training batch norm + activation: gk.BatchNormAct* compared with act(bn(x) + residual) of torch.nn.

Least traffic, E = bytes of x: forward 2E, backward 3E; with a residual 3E and 4E. float64 is not measured: the reference is no better than
what it would have to prove (bench_accuracy.py has long double). The last ten cases are drawn anew in each run; the header has their seed.
oneDNN, which fuses relu too, is measured where g++ finds it (onednn.cpp); it always writes into the same outputs.
"""

import copy
import ctypes
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import COMPILED, EAGER, OURS, PARTS, WHOLE, Case, answers, arguments, called, compiled, gk, header, prove, run
from models.frozen import FrozenBatchNorm2d

ACTS = {"relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "swish": F.silu}
MORE_ACTS = {"gelu": F.gelu, "hardswish": F.hardswish, "mish": F.mish}
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
    *((shape, "relu", LAST) for shape in ((32, 64, 56, 56), (12, 192, 33, 33), (20, 1536, 7, 7), (24, 80, 48, 48), (6, 17, 150, 150))),
)
DRAWN_ELEMENTS = range(1 << 16, 1 << 23)


def drawn(numbers: random.Random, count: int = 10) -> Iterator[tuple[tuple[int, ...], str, dict[str, Any]]]:
    """More of CASES: channels from 3 to 2,048, most of them no power of two, and any batch and sides."""
    while count:
        n, c, h, w = numbers.randint(1, 64), int(2 ** numbers.uniform(1.6, 11)), numbers.randint(5, 160), numbers.randint(5, 160)
        if n * c * h * w in DRAWN_ELEMENTS:
            count -= 1
            yield (n, c, h, w), numbers.choice(list(ACTS)), {"residual": numbers.random() < 0.5} | numbers.choice(({}, LAST))


@cache
def onednn() -> ctypes.CDLL | None:
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/onednn.so"
        command = ["g++", "-O2", "-shared", "-fPIC", str(Path(__file__).with_name("onednn.cpp")), "-o", library, "-ldnnl"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        found = ctypes.CDLL(library)
    found.onednn_step.restype = ctypes.c_void_p
    return found


def with_onednn(x: Tensor, weight: Tensor, grad_y: Tensor) -> tuple[dict[str, Callable[[], None]], dict[str, Tensor]]:
    """oneDNN as a provider, if it is here, and the outputs that it writes."""
    library, outputs = onednn(), {"y": torch.empty_like(x), "gradient 0": torch.empty_like(x)}
    if library is None:
        return {}, {}
    tensors = (x, weight, grad_y, *outputs.values())
    step = library.onednn_step(*map(ctypes.c_int64, x.shape), *(ctypes.c_void_p(each.data_ptr()) for each in tensors))

    def call(_: tuple[Tensor, ...] = tensors) -> None:
        library.onednn_run(ctypes.c_void_p(step))

    return {"oneDNN": call}, outputs


class Eager(nn.Module):
    """What a network writes without gradkernels."""

    def __init__(self, norm: nn.Module, act: str) -> None:
        super().__init__()
        self.norm = norm
        self.act = (ACTS | MORE_ACTS)[act]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return self.act(y if residual is None else y + residual)


def norms(shape: tuple[int, ...], act: str, groups: int | None, frozen: bool) -> tuple[nn.Module, nn.Module]:
    """torch's normalisation and ours with the activation: batch norm, frozen or not, group norm or, of volumes, instance norm."""
    channels = shape[1]
    if frozen:
        return FrozenBatchNorm2d(channels), gk.FrozenBatchNormAct2d(channels, act=act)
    if groups is None:
        theirs, ours = (nn.BatchNorm1d, gk.BatchNormAct1d) if len(shape) == 2 else (nn.BatchNorm2d, gk.BatchNormAct2d)
        return theirs(channels), ours(channels, act=act)
    if len(shape) == 5:
        return nn.InstanceNorm3d(channels, affine=True), gk.InstanceNormAct3d(channels, affine=True, act=act)
    return nn.GroupNorm(groups, channels), gk.GroupNormAct(groups, channels, act=act)


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
    groups: int | None = None,
    frozen: bool = False,
) -> Case:
    channels_last = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    memory_format = channels_last if layout == "channels_last" else torch.contiguous_format
    # Not around zero: the running means would be sums that cancel, and not one digit could be proved.
    drawn = [torch.randn(shape).add_(0.5).to(dtype).contiguous(memory_format=memory_format) for _ in range(2 + residual)]
    grad_y, operands = drawn[0], [each.requires_grad_() for each in drawn[1:]]
    theirs, ours = norms(shape, act, groups, frozen)
    modules: dict[str, nn.Module] = {EAGER: Eager(theirs, act), OURS: ours}
    weight = torch.empty(shape[1]).uniform_(0.5, 1.5)
    for module in (theirs, ours):
        module.weight.data.copy_(weight)

    def check() -> None:
        wide, exact = [each.detach().double().requires_grad_() for each in operands], copy.deepcopy(modules[EAGER]).double()
        before_act = copy.deepcopy(exact.norm)(wide[0]) + (wide[1] if residual else 0)
        # Rounding decides on which side of the kink such an element lies. In place, because oneDNN has the address.
        grad_y.masked_fill_(before_act.detach().abs() < 1e-5, 0)
        right = results(exact, wide, grad_y.double())
        prove(*(results(modules[name], operands, grad_y) for name in (OURS, EAGER)), right)
        for call in of_onednn.values():
            call()
        for name, output in outputs.items():
            torch.testing.assert_close(output, right[name].float(), rtol=1e-2, atol=1e-2)

    has_onednn = (act, residual, layout, direction, groups, frozen) == ("relu", False, "channels_last", WHOLE, None, False)
    of_onednn, outputs = with_onednn(operands[0], weight, grad_y) if has_onednn else ({}, {})
    forwards = {EAGER: modules[EAGER]} | ({COMPILED: compiled(modules[EAGER])} if with_compiler else {}) | {OURS: modules[OURS]}
    inputs = {provider: [*operands, *module.parameters()] for provider, module in forwards.items()}
    least = {"forward": (2 + residual) * grad_y.nbytes, "backward": (3 + residual - frozen) * grad_y.nbytes}
    return Case(
        operator="FrozenBatchNormAct2d" if frozen else "batch_norm_act" if groups is None else "group_norm_act",
        name=f"{act}{' + residual' * residual} {shape}",
        providers={name: called(direction, partial(each, *operands), inputs[name], grad_y) for name, each in forwards.items()} | of_onednn,
        prove=check,
        bytes=least.get(direction) or sum(least.values()),
        copied=grad_y.nbytes,
        direction=direction,
        dtype=dtype,
        layout=layout,
    )


if __name__ == "__main__":
    options, seed = arguments(__doc__), random.randrange(1000)
    chosen = CASES[:2] if options.quick else (*CASES, *drawn(random.Random(seed)))
    cases = [partial(case, shape, act, **settings) for shape, act, settings in chosen]
    run("batch norm + activation, training", cases, options, header(options.quick) | {"seed of the drawn cases": seed})
