"""Training steps of ResNet-50 and EfficientNet-B0 on a GPU, as they are and with gradkernels: images a second, and the loss of both.

The networks are torchvision's or timm's, where one of them is installed; gradkernels' share is clipping and batch norm with what follows
it. Autocast to bfloat16, channels_last, random images.
"""

import copy
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from harness import gk

BATCH, PIXELS, CLASSES = 64, 224, 1000
WARM_UP, STEPS = 5, 20


def networks() -> dict[str, Callable[[], nn.Module]]:
    if find_spec("torchvision") is not None:
        from torchvision import models

        return {"ResNet-50": models.resnet50, "EfficientNet-B0": models.efficientnet_b0}
    if find_spec("timm") is not None:
        import timm

        return {"ResNet-50": lambda: timm.create_model("resnet50"), "EfficientNet-B0": lambda: timm.create_model("efficientnet_b0")}
    return {}


def train(model: nn.Module, clip: Callable[..., Any]) -> tuple[float, float]:
    """Images a second, and the loss of the last step."""
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, PIXELS, PIXELS, device="cuda").contiguous(memory_format=torch.channels_last)
    targets = torch.randint(CLASSES, (BATCH,), device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    times = []
    loss = torch.zeros(())
    for _ in range(WARM_UP + STEPS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        clip(model.parameters(), 1.0)
        optimizer.step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return BATCH / statistics.median(times[WARM_UP:]) * 1e3, loss.item()


def main() -> None:
    if not torch.cuda.is_available():
        print("train_on_gpu: there is no GPU that torch can use, nothing is trained")
        return
    made = networks()
    if not made:
        print("train_on_gpu: neither torchvision nor timm is installed, nothing is trained")
    for name, make in made.items():
        torch.manual_seed(0)
        model = make().cuda().to(memory_format=torch.channels_last).train()
        ours = copy.deepcopy(model)
        print(gk.convert(ours))
        before, loss_before = train(model, torch.nn.utils.clip_grad_norm_)
        after, loss_after = train(ours, gk.clip_grad_norm_)
        print(f"{name}: {before:.0f} images/s by torch, loss {loss_before:.4f}; {after:.0f} with gradkernels, loss {loss_after:.4f}")


if __name__ == "__main__":
    main()
