"""DarkNet-53, the backbone of YOLOv3: Redmon, Farhadi, "YOLOv3: An Incremental Improvement", 2018.

Convolution, batch norm and LeakyReLU(0.1) in a Sequential; the residual is added after the activation.
"""

from torch import Tensor, nn


def convolution(channels: int, width: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, size, stride, size // 2, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.1))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = convolution(channels, channels // 2, 1)
        self.expand = convolution(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(self.squeeze(x))


class DarkNet(nn.Module):
    """Feature maps at strides 8, 16 and 32."""

    def __init__(self, depths: tuple[int, ...] = (1, 2, 8, 8, 4), width: int = 32) -> None:
        super().__init__()
        self.stem = convolution(3, width, 3)
        self.stages = nn.ModuleList()
        for depth in depths:
            residuals = (Residual(2 * width) for _ in range(depth))
            self.stages.append(nn.Sequential(convolution(width, 2 * width, 3, 2), *residuals))
            width *= 2

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[-3:]
