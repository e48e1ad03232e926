"""What does the same job on a CPU besides torch and its compiler, where it is installed, and for the others why not.

None of them is a dependency: a case has a provider more where one can be imported. bench/README.md says what was seen of each. Of
torchvision timm needs the Python alone, whose import fails where its operators were built for another torch, as PyPI's are beside a torch
for the CPU: they are declared by name then, and nothing here calls them.
"""

import functools
import importlib
import importlib.metadata
import re
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from harness import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from models import libraries

__all__ = ["found", "of_batch_norm_act", "prove"]

PACKAGES = ("inplace_abn", "timm.layers")
SHAPES = ((32, 64, 56, 56), (32, 1024, 14, 14), (16, 144, 56, 56))
# inplace_abn normalises with |weight| + eps, and undoes the activation in backward: near torch is all that it can be. Of six million
# gradients five on the other side of a kink are 1e-3 of the norm.
NEAR = 1e-2
TIMM_ACTS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "swish": nn.SiLU}
INPLACE_ABN_ACTS = ("identity", "leaky_relu", "elu")


@functools.cache
def package(name: str) -> ModuleType | str:
    """It, or why it cannot be imported: one that was built for another torch fails in any way."""
    missing: set[str] = set()
    while True:
        try:
            return importlib.import_module(name)
        except Exception as error:
            found = re.fullmatch(r"operator (torchvision::\w+) does not exist", str(error))
            if found is None or found.group(1) in missing:
                return f"{type(error).__name__}: {error}"
            missing.add(found.group(1))
            torch.library.define(found.group(1), "(Tensor _) -> Tensor")


def found() -> str:
    """For the header."""
    texts = []
    for name in PACKAGES:
        top = name.partition(".")[0]
        why_not = package(name)
        texts.append(f"no {top} ({why_not})" if isinstance(why_not, str) else f"{top} {importlib.metadata.version(top)}")
    return "; ".join(texts)


class Lent(torch.autograd.Function):
    """x's place in the graph, on memory that whatever follows may overwrite, as it may what a convolution returns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: Tensor) -> Tensor:
        return torch.empty(0, dtype=x.dtype).set_(memory)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return grad_y, None


class InPlace(nn.Module):
    """A layer that overwrites its input. Only the first call sees x: later ones find the last one's y, which takes as long to normalise."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.memory: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.memory is None:
            self.memory = x.detach().clone(memory_format=torch.preserve_format)
        return self.layer(Lent.apply(x, self.memory))


def of_batch_norm_act(bn: nn.Module, act: str, shape: tuple[int, ...], dtype: torch.dtype, with_residual: bool) -> dict[str, nn.Module]:
    """Provider -> module that does what act(bn(x)) does, with bn's weight and bias."""
    modules: dict[str, nn.Module] = {}
    if shape not in SHAPES or dtype != torch.float32 or with_residual:
        return modules
    if act in TIMM_ACTS:
        timm = package("timm.layers")
        name, layers = ("as timm", libraries) if isinstance(timm, str) else ("timm", timm)
        modules[f"{name}'s BatchNormAct2d"] = layers.BatchNormAct2d(shape[1], act_layer=TIMM_ACTS[act])
    abn = package("inplace_abn")
    if act in INPLACE_ABN_ACTS and not isinstance(abn, str):
        parameter = {"leaky_relu": 0.01}.get(act, 1.0)
        modules["inplace_abn"] = InPlace(abn.InPlaceABN(shape[1], activation=act, activation_param=parameter))
    for module in modules.values():
        (module.layer if isinstance(module, InPlace) else module).load_state_dict(bn.state_dict(), strict=False)
    return modules


def prove(name: str, actual: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """Every tensor lies near torch's on the whole, else the script ends here: an element at a kink may fall on its other side."""
    for key, tensor in eager.items():
        difference, magnitude = (torch.linalg.vector_norm(each).item() for each in (actual[key] - tensor, tensor))
        if not difference <= NEAR * magnitude:
            raise SystemExit(f"{name}: {key} differs by {difference:.3g} where its norm is {magnitude:.3g}: nothing is timed")
