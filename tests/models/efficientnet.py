"""The blocks of EfficientNet.

Tan, Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019.

Expansion, depthwise convolution, squeeze-and-excitation (Hu, Shen, Sun, 2018), projection; SiLU is a
function.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.SiLU()
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class MBConv(nn.Module):
    def __init__(self, channels: int, width: int, expansion: int, size: int, stride: int) -> None:
        super().__init__()
        expanded = channels * expansion
        self.expand = nn.Conv2d(channels, expanded, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(expanded, eps=1e-3, momentum=0.01)
        self.depthwise = nn.Conv2d(expanded, expanded, size, stride, size // 2, groups=expanded, bias=False)
        self.bn2 = nn.BatchNorm2d(expanded, eps=1e-3, momentum=0.01)
        self.se = SqueezeExcite(expanded, max(1, channels // 4))
        self.project = nn.Conv2d(expanded, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)
        self.is_residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn1(self.expand(x)))
        y = F.silu(self.bn2(self.depthwise(y)))
        y = self.bn3(self.project(self.se(y)))
        return x + y if self.is_residual else y


class EfficientNetBlocks(nn.Sequential):
    """A stem and the first stages of B0."""

    def __init__(self) -> None:
        stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32, eps=1e-3, momentum=0.01), nn.SiLU(inplace=True))
        super().__init__(stem, MBConv(32, 16, 1, 3, 1), MBConv(16, 24, 6, 3, 2), MBConv(24, 24, 6, 3, 1), MBConv(24, 40, 6, 5, 2))
