"""Blocks like those of timm, Ultralytics and torchvision, for machines without these libraries.

timm's batch norm applies its activation in its own forward. Ultralytics' blocks share one activation, an
attribute of their class. torchvision's blocks are subclasses of Sequential.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchNormAct2d(nn.BatchNorm2d):
    """Like timm.layers.BatchNormAct2d."""

    def __init__(
        self, num_features: int, apply_act: bool = True, act_layer: type[nn.Module] = nn.ReLU, drop: nn.Module | None = None
    ) -> None:
        super().__init__(num_features)
        self.drop = nn.Identity() if drop is None else drop
        self.act = act_layer(inplace=True) if apply_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        exponential_average_factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            exponential_average_factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        bn_training = True if self.training else self.running_mean is None and self.running_var is None
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            bn_training,
            exponential_average_factor,
            self.eps,
        )
        x = self.drop(x)
        return self.act(x)


class Conv(nn.Module):
    """Like ultralytics.nn.modules.conv.Conv."""

    default_act = nn.SiLU()

    def __init__(self, channels: int, width: int, size: int = 1, stride: int = 1, act: bool | nn.Module = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = self.default_act if act is True else act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class C2f(nn.Module):
    """Like ultralytics.nn.modules.block.C2f, with its Bottleneck."""

    class Bottleneck(nn.Module):
        def __init__(self, channels: int, shortcut: bool) -> None:
            super().__init__()
            self.cv1 = Conv(channels, channels, 3)
            self.cv2 = Conv(channels, channels, 3)
            self.add = shortcut

        def forward(self, x: Tensor) -> Tensor:
            return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))

    def __init__(self, channels: int, width: int, depth: int, shortcut: bool = True) -> None:
        super().__init__()
        self.c = width // 2
        self.cv1 = Conv(channels, 2 * self.c)
        self.cv2 = Conv((2 + depth) * self.c, width)
        self.m = nn.ModuleList(self.Bottleneck(self.c, shortcut) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Conv2dNormActivation(nn.Sequential):
    """Like torchvision.ops.Conv2dNormActivation."""

    def __init__(self, channels: int, width: int, stride: int = 1, activation_layer: type[nn.Module] | None = nn.ReLU) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)]
        if activation_layer is not None:
            layers.append(activation_layer(inplace=True))
        super().__init__(*layers)
        self.out_channels = width
