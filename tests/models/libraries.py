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


class GELU(nn.Module):
    """Like timm.layers.activations.GELU."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input)


class FrozenBatchNormAct2d(nn.Module):
    """Like timm.layers.FrozenBatchNormAct2d, under whose name it is known."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, num_features: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "running_var", "bias", "running_mean"):
            self.register_buffer(name, torch.ones(num_features) if name in ("weight", "running_var") else torch.zeros(num_features))
        self.drop = nn.Identity() if drop is None else drop
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        bias = b - rm * scale
        x = x * scale + bias
        return self.act(self.drop(x))


class GroupNorm(nn.GroupNorm):
    """Like timm.layers.GroupNorm."""

    def __init__(self, num_channels: int, num_groups: int = 2) -> None:
        super().__init__(num_groups, num_channels)
        self.fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fast_norm:
            return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps)
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class GroupNormAct(nn.GroupNorm):
    """Like timm.layers.GroupNormAct."""

    def __init__(self, num_channels: int, num_groups: int = 2, act: nn.Module | None = None, drop: nn.Module | None = None) -> None:
        super().__init__(num_groups, num_channels)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True) if act is None else act
        self._fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        if self._fast_norm:
            x = F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps)
        else:
            x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        x = self.drop(x)
        return self.act(x)


class ResnetBlock2D(nn.Module):
    """Like diffusers.models.resnet.ResnetBlock2D."""

    def __init__(self, channels: int, width: int, time_channels: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(2, channels)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.time_emb_proj = None if time_channels is None else nn.Linear(time_channels, width)
        self.norm2 = nn.GroupNorm(2, width)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.conv_shortcut = None if channels == width else nn.Conv2d(channels, width, 1)
        self.output_scale_factor = 1.0

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: object, **kwargs: object) -> Tensor:
        if len(args) > 0 or kwargs.get("scale") is not None:
            raise ValueError("scale is no longer an argument")
        hidden_states = self.nonlinearity(self.norm1(input_tensor))
        hidden_states = self.conv1(hidden_states)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        if temb is not None:
            hidden_states = hidden_states + temb
        hidden_states = self.norm2(hidden_states)
        hidden_states = self.nonlinearity(hidden_states)
        hidden_states = self.conv2(self.dropout(hidden_states))
        if self.conv_shortcut is not None:
            if self.training:
                input_tensor = input_tensor.contiguous()
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + hidden_states) / self.output_scale_factor


class DiffusionBlocks(nn.Module):
    """Blocks with a time step, and one without, as in an autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList([ResnetBlock2D(8, 8, 3), ResnetBlock2D(8, 16, 3)])
        self.last = ResnetBlock2D(16, 8)
        self.conv_in, self.conv_norm_out, self.conv_act = nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU()
        self.conv_out = nn.Conv2d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        temb = x.mean((2, 3))
        x = self.conv_in(x)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = torch.utils.checkpoint.checkpoint(block, x, temb, use_reentrant=False)
            else:
                x = block(x, temb)
        x = self.last(x, temb=None)
        y: Tensor = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return y


class UnetResBlock(nn.Module):
    """Like monai.networks.blocks.UnetResBlock."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.lrelu = nn.LeakyReLU(0.01, inplace=True)
        self.norm1, self.norm2 = nn.InstanceNorm2d(width, affine=True), nn.InstanceNorm2d(width, affine=True)
        self.downsample = channels != width
        if self.downsample:
            self.conv3, self.norm3 = nn.Conv2d(channels, width, 1), nn.InstanceNorm2d(width, affine=True)

    def forward(self, inp: Tensor) -> Tensor:
        residual = inp
        out = self.conv1(inp)
        out = self.norm1(out)
        out = self.lrelu(out)
        out = self.conv2(out)
        out = self.norm2(out)
        if hasattr(self, "conv3"):
            residual = self.conv3(residual)
        if hasattr(self, "norm3"):
            residual = self.norm3(residual)
        out += residual
        out = self.lrelu(out)
        return out


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


class ConvModule(nn.Module):
    """Like mmcv.cnn.ConvModule: layers in an order of the user's, a batch norm by name, a mode that is read."""

    def __init__(self, channels: int, width: int, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 1, bias=False)
        self.norm_name, self.with_norm, self.with_activation, self.order = "bn", True, act, ("conv", "norm", "act")
        self.efficient_conv_bn_eval_forward = None
        self.add_module(self.norm_name, nn.BatchNorm2d(width))
        if act:
            self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self) -> nn.Module:
        norm: nn.Module = getattr(self, self.norm_name)
        return norm

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        index = 0
        while index < len(self.order):
            layer = self.order[index]
            if layer == "conv":
                is_normalised = index + 1 < len(self.order) and self.order[index + 1] == "norm" and norm and self.with_norm
                if is_normalised and not self.norm.training and self.efficient_conv_bn_eval_forward is not None:
                    self.conv.forward = self.efficient_conv_bn_eval_forward
                    index += 1
                x = self.conv(x)
            elif layer == "norm" and norm and self.with_norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
            index += 1
        return x


class DarknetBlock(nn.Module):
    """A residual block of ConvModules, whose last one has no activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvModule(channels, channels)
        self.conv2 = ConvModule(channels, channels, act=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv2(self.conv1(x))
        out += identity
        return self.relu(out)


class ResBottleneckBlock(nn.Module):
    """Like torchvision.models.regnet.ResBottleneckBlock: both terms of the sum end with a batch norm."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = None if channels == width else Conv2dNormActivation(channels, width, activation_layer=None)
        last = Conv2dNormActivation(width, width, activation_layer=None)
        self.f = nn.Sequential(Conv2dNormActivation(channels, width), nn.Sequential(last))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = (x if self.proj is None else self.proj(x)) + self.f(x)
        return self.activation(x)


class InvertedResidual(nn.Module):
    """Like torchvision.models.mobilenetv2.InvertedResidual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            Conv2dNormActivation(channels, 8, activation_layer=nn.ReLU6), nn.Conv2d(8, channels, 1), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class ResNetConvLayer(nn.Module):
    """Like transformers.models.resnet.modeling_resnet.ResNetConvLayer."""

    def __init__(self, channels: int, width: int, act: bool = True) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, 1, bias=False)
        self.normalization = nn.BatchNorm2d(width)
        self.activation = nn.ReLU() if act else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(self.normalization(self.convolution(input)))


class ResNetBasicLayer(nn.Module):
    """Like transformers.models.resnet.modeling_resnet.ResNetBasicLayer: the sum is written into the first term."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.shortcut = nn.Identity() if channels == width else ResNetConvLayer(channels, width, act=False)
        self.layer = nn.Sequential(ResNetConvLayer(channels, width), ResNetConvLayer(width, width, act=False))
        self.activation = nn.ReLU()

    def forward(self, hidden_state: Tensor) -> Tensor:
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        return self.activation(hidden_state)


class ConvNormAct(nn.Module):
    """Like timm.layers.ConvNormAct."""

    def __init__(self, channels: int, width: int, apply_act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 1, bias=False)
        self.bn = BatchNormAct2d(width, apply_act)
        self.aa = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if self.aa is None else self.aa(x)


class MobileOneBlock(nn.Module):
    """Like timm.models.byobnet.MobileOneBlock, of which RepVGG is a case: a sum of batch norms, then ReLU."""

    def __init__(self, channels: int, width: int, branches: int, scale: bool = True) -> None:
        super().__init__()
        self.identity = BatchNormAct2d(channels, False) if channels == width else None
        self.conv_scale = ConvNormAct(channels, width, False) if scale else None
        self.conv_kxk = nn.ModuleList(ConvNormAct(channels, width, False) for _ in range(branches))
        self.drop_path = nn.Identity()
        self.attn = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity_out: Tensor | int = 0
        if self.identity is not None:
            identity_out = self.identity(x)
        scale_out: Tensor | int = 0
        if self.conv_scale is not None:
            scale_out = self.conv_scale(x)
        out = scale_out
        for ck in self.conv_kxk:
            out += ck(x)
        out = self.drop_path(out)
        out += identity_out
        y: Tensor = self.act(self.attn(out))
        return y


def apply_tf_padding(features: Tensor, conv_layer: nn.Conv2d) -> Tensor:
    """Like the function in transformers.models.mobilenet_v2.modeling_mobilenet_v2: it branches on a shape."""
    height, width = int(features.shape[-2]), int(features.shape[-1])
    stride_height, stride_width = conv_layer.stride
    return F.pad(features, (0, width % (2 * stride_width), 0, height % (2 * stride_height)))


class MobileNetV2ConvLayer(nn.Module):
    """Like the class in transformers.models.mobilenet_v2.modeling_mobilenet_v2."""

    def __init__(self, channels: int, width: int, act: bool = True) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, 1, bias=False)
        self.normalization = nn.BatchNorm2d(width)
        self.activation = nn.ReLU6() if act else None

    def forward(self, features: Tensor) -> Tensor:
        features = apply_tf_padding(features, self.convolution)
        features = self.convolution(features)
        if self.normalization is not None:
            features = self.normalization(features)
        if self.activation is not None:
            features = self.activation(features)
        return features
