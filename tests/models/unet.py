"""U-Net with ELU: feature maps of the way down are concatenated on the way up.

Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015. ELU:
Clevert, Unterthiner, Hochreiter, 2015.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DoubleConvolution(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.act = nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(x)))


class UNet(nn.Module):
    def __init__(self, width: int = 16, depth: int = 3, classes: int = 2) -> None:
        super().__init__()
        widths = [width << level for level in range(depth)]
        self.down = nn.ModuleList(DoubleConvolution(*each) for each in zip([3, *widths], widths, strict=False))
        self.bottom = DoubleConvolution(widths[-1], 2 * widths[-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * each, each, 2, 2) for each in reversed(widths))
        self.join = nn.ModuleList(DoubleConvolution(2 * each, each) for each in reversed(widths))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for block in self.down:
            x = block(x)
            maps.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([maps.pop(), up(x)], 1))
        return self.head(x)
