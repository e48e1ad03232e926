"""torchvision.ops.FrozenBatchNorm2d, for where torchvision is not installed; detectron2's has the same buffers and formula."""

import torch
from torch import Tensor, nn

BUFFERS = ("weight", "bias", "running_mean", "running_var")


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in BUFFERS:
            self.register_buffer(name, torch.ones(num_features) if name in ("weight", "running_var") else torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (getattr(self, name).reshape(1, -1, 1, 1) for name in BUFFERS)
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)
