"""Whole training steps, with clipping and SGD: torch's, those after gk.convert with gk.clip_grad_norm_, and those in gk.recompute as well,
where backward computes outputs again. Then what gk.GradientMonitor adds to a step.

kept: what autograd keeps for backward, the batch among it. The part of batch norm, activation and addition is their self time in
torch.profiler; additions of gradients count on both sides. The monitor looks at activations in every step here, by default in every tenth.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from harness import EAGER, OURS, Case, WrongAnswer, arguments, gk, run
from memory import bytes_kept_by
from models.darknet import DarkNet
from models.efficientnet import EfficientNetBlocks
from models.resnet import resnet18, resnet50
from models.unet import UNet

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "EfficientNet blocks, SiLU": EfficientNetBlocks,
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "DarkNet-53, LeakyReLU": DarkNet,
    "U-Net, ELU": UNet,
}
SHAPE, PROVED_SHAPE, QUICK_SHAPE = (16, 3, 64, 64), (4, 3, 64, 64), (2, 3, 32, 32)
RECOMPUTE = f"{OURS}, recompute"
# As the profiler calls batch norm, activations and the additions of residuals.
PART = ("batch_norm", "relu", "threshold_backward", "silu", "elu", "hardtanh", "aten::add", "gradkernels::")
LEARNING_RATE = 1e-3
# After two steps in float64, of the largest element of a tensor or of LEARNING_RATE: some gradients are zero but for rounding.
BOUND = 1e-6
# The arguments of GradientMonitor by provider. The alarm hears of every step, and the first step alone is recorded.
MONITORS = {
    "alarm": {"every": 10**9, "activations_every": None, "alarm": "warn"},
    "gradients and weights": {"activations_every": None},
    "and activations": {"activations_every": 1},
}


class Training:
    """A network, its optimizer, and how it is trained; 16 bits mean autocast and channels_last."""

    def __init__(self, provider: str, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.context: Callable[[], AbstractContextManager[None]] = gk.recompute if provider == RECOMPUTE else nullcontext
        self.clip = torch.nn.utils.clip_grad_norm_ if provider == EAGER else gk.clip_grad_norm_
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        self.is_mixed = dtype.itemsize == 2

    def loss(self, x: Tensor) -> Tensor:
        with self.context(), torch.autocast(x.device.type, torch.bfloat16, enabled=self.is_mixed):
            return sum((each.square().mean() for each in tree_leaves(self.model(x))), start=x.new_zeros(()))

    def backward(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(x).backward()

    def step(self, x: Tensor) -> None:
        self.backward(x)
        self.clip(self.model.parameters(), 1.0)
        self.optimizer.step()


def trainings(model: nn.Module, dtype: torch.dtype) -> dict[str, Training]:
    models = {provider: copy.deepcopy(model) for provider in (EAGER, OURS, RECOMPUTE)}
    gk.convert(models[OURS])
    gk.convert(models[RECOMPUTE])
    return {provider: Training(provider, each, dtype) for provider, each in models.items()}


def prove(model: nn.Module) -> None:
    """After two steps in float64 weights and statistics are torch's up to rounding, and recomputing changes not one bit."""
    x = torch.randn(PROVED_SHAPE, dtype=torch.float64)
    found = {}
    for provider, training in trainings(copy.deepcopy(model).double(), torch.float64).items():
        torch.manual_seed(0)  # for dropout
        for _ in range(2):
            training.step(x)
        found[provider] = training.model.state_dict()
    for key, expected in found[EAGER].items():
        for provider in (OURS, RECOMPUTE):
            difference, largest = (found[provider][key] - expected).abs().max().item(), expected.abs().max().item()
            if not difference <= BOUND * max(largest, LEARNING_RATE):
                raise WrongAnswer(f"{key} of {provider} differs by {difference:.3g}, the largest is {largest:.3g}; nothing is timed")
        # On a GPU convolutions differ from run to run.
        if x.device.type == "cpu" and not torch.equal(found[OURS][key], found[RECOMPUTE][key]):
            raise WrongAnswer(f"recomputing changes {key}; nothing is timed")


def part_us(training: Training, x: Tensor, steps: int) -> float:
    """Microseconds in the operators of PART themselves, of a forward and a backward: the optimizer adds too."""
    training.backward(x)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            training.backward(x)
    events = (each for each in seen.key_averages() if "::" in each.key and each.key != "aten::addmm")
    return sum(each.self_cpu_time_total for each in events if any(name in each.key for name in PART)) / steps


def case(network: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, profiled_steps: int = 3) -> Case:
    torch.manual_seed(0)
    model, x = NETWORKS[network](), torch.randn(shape)
    if dtype.itemsize == 2:
        model, x = (each.to(memory_format=torch.channels_last) for each in (model, x))
    made = trainings(model, dtype)
    extra = {}

    def check() -> None:
        prove(model)
        for name, each in made.items():
            part = part_us(each, x, profiled_steps) if profiled_steps else None
            extra[name] = {"kept_bytes": bytes_kept_by(partial(each.loss, x)) + x.nbytes, "part_us": part}

    return Case(
        operator="training step",
        name=f"{network} {shape}",
        providers={name: partial(each.step, x) for name, each in made.items()},
        prove=check,
        dtype="bfloat16, autocast" if dtype.itemsize == 2 else dtype,
        extra=extra,
    )


def monitored(shape: tuple[int, ...]) -> Case:
    x, target = torch.randn(shape), torch.randint(1000, shape[:1])
    first = resnet18(classes=1000)
    models = {provider: copy.deepcopy(first) for provider in (EAGER, *MONITORS)}
    # Their hooks are of all optimizers, and nothing removes them: these cases come last.
    monitors = {provider: gk.GradientMonitor(models[provider], **keywords) for provider, keywords in MONITORS.items()}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for name, model in models.items()}
    steps = {name: partial(step, models[name], optimizers[name]) for name in models}

    def check() -> None:
        for _ in range(2):
            for each in steps.values():
                each()
        for name, model in models.items():
            if not all(map(torch.equal, model.state_dict().values(), models[EAGER].state_dict().values())):
                raise WrongAnswer(f"monitoring {name} changes the training; nothing is timed")
            if name != EAGER and len(monitors[name].to_dict()["steps"]) != (1 if "every" in MONITORS[name] else 2):
                raise WrongAnswer(f"monitoring {name} does not record every step; nothing is timed")

    return Case(operator="GradientMonitor", name=f"ResNet-18 {shape}", providers=steps, prove=check)


if __name__ == "__main__":
    options = arguments(__doc__)
    cases = [*(partial(case, name, SHAPE) for name in NETWORKS), partial(monitored, (32, 3, 64, 64)), partial(monitored, (16, 3, 224, 224))]
    if options.quick:
        cases = [partial(case, next(iter(NETWORKS)), QUICK_SHAPE, profiled_steps=1), partial(monitored, QUICK_SHAPE)]
    run("training steps", cases, options)
