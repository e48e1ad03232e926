"""Real models of torchvision, timm, transformers, ultralytics, segmentation_models_pytorch, monai and diffusers, with random weights.

Building one imports its library. Nothing is downloaded.
"""

import functools
import importlib
import os
import re
import tempfile

import torch


def images(size=64, channels=3, dimensions=2):
    return torch.randn(4 if size < 200 else 2, channels, *(size,) * dimensions)


def torchvision(name, **settings):
    return importlib.import_module("torchvision.models").get_model(name, weights=None, **settings)


def frozen_resnet50():
    utils = importlib.import_module("torchvision.models.detection.backbone_utils")
    frozen = importlib.import_module("torchvision.ops").FrozenBatchNorm2d
    return utils.resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=frozen, trainable_layers=5)


def timm(name):
    return importlib.import_module("timm").create_model(name, pretrained=False)


def ultralytics(name):
    # Otherwise it writes settings into the user's folder.
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
    # The parameters of a new model are frozen.
    return importlib.import_module("ultralytics").YOLO(f"{name}.yaml").model.requires_grad_()


def segmentation_models_pytorch(name):
    return importlib.import_module("segmentation_models_pytorch").create_model(*name.split("+"), encoder_weights=None)


def transformers(name, **settings):
    library = importlib.import_module("transformers")
    config = getattr(library, re.sub("(For[A-Z][A-Za-z]*|Model|Backbone)$", "", name) + "Config")
    return getattr(library, name)(config(**settings))


def monai(name, **settings):
    return getattr(importlib.import_module("monai.networks.nets"), name)(**settings)


class OfTimeStep(torch.nn.Module):
    """A model of diffusers, called with the images and whatever else it needs; returns what it computes."""

    def __init__(self, model, more):
        super().__init__()
        self.model, self.more = model, more

    def forward(self, x):
        return self.model(x, **self.more).sample


def diffusers(name, more, **settings):
    settings = {"in_channels": 3, "out_channels": 3, "block_out_channels": (32, 64), "norm_num_groups": 8, **settings}
    return OfTimeStep(getattr(importlib.import_module("diffusers"), name)(**settings), more)


class OfLevels(torch.nn.Module):
    """The head of a detector, called with the levels of a pyramid."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head([x, x[..., ::2, ::2]])


def detection_head(name):
    """The head of torchvision's FCOS, or of its second RetinaNet, with group norm."""
    detection = importlib.import_module("torchvision.models.detection")
    if name == "fcos":
        return OfLevels(detection.fcos.FCOSHead(64, 1, 3))
    return OfLevels(detection.retinanet.RetinaNetHead(64, 2, 3, norm_layer=functools.partial(torch.nn.GroupNorm, 32)))


# Names, with the size of the images if that is not 64.
NAMES = {
    torchvision: (
        "resnet18 resnet50 resnext50_32x4d regnet_y_400mf regnet_y_1_6gf regnet_y_3_2gf regnet_x_400mf regnet_x_3_2gf densenet121 "
        "densenet201 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_b2 efficientnet_v2_s mnasnet1_0 "
        "shufflenet_v2_x1_0"
    ),
    timm: (
        "resnet18 resnet50 resnet26d resnext50_32x4d seresnet50 skresnet18 ecaresnet26t resnest14d res2net50_26w_4s regnetx_008 "
        "regnety_008 regnetz_b16 regnetz_005 efficientnet_b0 efficientnetv2_rw_t tf_efficientnet_lite0 mixnet_s mobilenetv1_100 "
        "mobilenetv2_100 dla34 dpn68 mobilenetv3_large_100 mobilenetv4_conv_small mnasnet_100 fbnetc_100 hardcorenas_a lcnet_100 "
        "tinynet_a ghostnet_100 ghostnetv2_100 rexnet_100 densenet121 dla60_res2net hrnet_w18_small inception_v3@96 xception41 "
        "cspresnet50 cspdarknet53 cs3darknet_m darknet17 darknet21 repvgg_a0 repvgg_a2 repghostnet_100 ese_vovnet19b_dw gernet_s "
        "mobileone_s0 hgnet_tiny hgnetv2_b0 repvit_m1 levit_128s@224 levit_conv_128s@224 efficientformer_l1@224 "
        "efficientformerv2_s0@224 efficientvit_b0 efficientvit_m0@224 mobilevit_s mobilevitv2_050 fastvit_t8 convmixer_768_32 "
        "tiny_vit_5m_224@224 visformer_tiny@224 botnet26t_256@256 halonet26t@256 lambda_resnet26t@256 starnet_s1 "
        "coatnet_nano_rw_224@224 swiftformer_xs@224 shvit_s1@224 resnet50_gn@224 resnetv2_50x1_bit@224"
    ),
    ultralytics: (
        "yolov3-tiny yolov5n yolov5s yolov6n yolov8n yolov8s yolov8n-cls yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-ghost yolov9t "
        "yolov9s yolov10n yolo11n yolo11s yolo11n-seg yolo12n yolo26n"
    ),
    segmentation_models_pytorch: (
        "unet+resnet18 unet+efficientnet-b0 unet+densenet121 unet+tu-regnety_008 unetplusplus+resnet18 linknet+resnet18 fpn+resnet18 "
        "pspnet+resnet18 pan+resnet18@128 deeplabv3+resnet18 deeplabv3plus+mobilenet_v2 upernet+resnet18"
    ),
}
FLAT, SOLID = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}, {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
UNET = {"channels": (16, 32, 64, 128), "strides": (2, 2, 2), "norm": "batch", "num_res_units": 2}
DYNAMIC = {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
UNET_2D = {
    "more": {"timestep": 3},
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
UNET_2D_OF_STATES = {
    "more": {"timestep": 3, "encoder_hidden_states": torch.ones(4, 5, 16, dtype=torch.float64)},
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
AUTOENCODER = {"more": {}, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
CONFORMER = {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 576, "hidden_size": 144, "hidden_act": "swish"}
LARGE, VOLUMES, NO_BACKBONE = functools.partial(images, 224), functools.partial(images, 32, 1, 3), {"weights_backbone": None}
# A function and its arguments; what makes the input.
OTHERS = (
    ((torchvision, "googlenet", {"init_weights": False}), functools.partial(images, 96)),
    ((torchvision, "inception_v3", {"init_weights": False}), functools.partial(images, 299)),
    *(((torchvision, f"{name}_mobilenet_v3_large", NO_BACKBONE), images) for name in ("lraspp", "deeplabv3")),
    *(
        ((transformers, f"{name}Model", {}), images)
        for name in ("ResNet", "RegNet", "MobileNetV1", "MobileNetV2", "MobileViT", "MobileViTV2")
    ),
    *(((transformers, f"{name}Model", {}), LARGE) for name in ("TextNet", "Levit", "SwiftFormer", "Cvt")),
    *(((transformers, f"{name}ForImageClassification", {}), images) for name in ("HGNetV2", "PPLCNet")),
    *(((transformers, name, {}), images) for name in ("RTDetrResNetBackbone", "SegformerForSemanticSegmentation")),
    ((transformers, "EfficientNetModel", {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}), images),
    ((transformers, "PPOCRV5MobileDetForObjectDetection", {}), images),
    ((transformers, "EfficientLoFTRModel", {}), lambda: images(96).view(2, 2, 3, 96, 96)),
    # Its masks are random numbers of numpy's.
    ((transformers, "Wav2Vec2ConformerModel", CONFORMER | {"mask_time_prob": 0.0}), lambda: torch.randn(2, 8000)),
    ((transformers, "ParakeetEncoder", CONFORMER), lambda: torch.randn(2, 128, 80)),
    ((monai, "DenseNet121", FLAT), images),
    ((monai, "resnet18", {"spatial_dims": 2, "n_input_channels": 3}), images),
    ((monai, "SEResNet50", {"spatial_dims": 2, "in_channels": 3}), images),
    ((monai, "UNet", FLAT | UNET | {"act": "relu"}), images),
    ((monai, "UNet", SOLID | UNET | {"act": "leakyrelu"}), VOLUMES),
    ((monai, "BasicUNet", FLAT | {"norm": "batch"}), images),
    ((monai, "AttentionUnet", FLAT | {name: UNET[name] for name in ("channels", "strides")}), images),
    ((monai, "SegResNet", SOLID | {"norm": "batch"}), VOLUMES),
    ((monai, "HighResNet", SOLID), functools.partial(images, 16, 1, 3)),
    ((monai, "VNet", {"spatial_dims": 2}), functools.partial(images, 64, 1)),
    ((monai, "DynUNet", FLAT | DYNAMIC | {"norm_name": "batch"}), images),
    (
        (monai, "DynUNet", SOLID | {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "res_block": True}),
        VOLUMES,
    ),
    ((monai, "UNet", SOLID | UNET | {"norm": "instance", "act": "leakyrelu"}), VOLUMES),
    ((monai, "BasicUNet", FLAT), functools.partial(images, 128)),
    ((monai, "SegResNet", SOLID), VOLUMES),
    ((diffusers, "UNet2DModel", UNET_2D), functools.partial(images, 32)),
    ((diffusers, "UNet2DConditionModel", UNET_2D_OF_STATES), functools.partial(images, 32)),
    ((diffusers, "AutoencoderKL", AUTOENCODER), functools.partial(images, 32)),
    ((monai, "EfficientNetBN", {"model_name": "efficientnet-b0", "pretrained": False}), images),
    ((monai, "RegUNet", FLAT | {"num_channel_initial": 16, "depth": 3}), images),
)


def every_model():
    """For each model: its library, its name, what builds it, and what makes its input."""
    for library, names in NAMES.items():
        for name, _, size in (each.partition("@") for each in names.split()):
            yield library.__name__, name, functools.partial(library, name), functools.partial(images, int(size or 64))
    yield "torchvision", "resnet50, FrozenBatchNorm2d", frozen_resnet50, images
    for name in ("fcos", "retinanet"):
        yield "torchvision", f"head of {name}, GroupNorm", functools.partial(detection_head, name), functools.partial(images, 16, 64)
    for (library, name, settings), make_input in OTHERS:
        yield library.__name__, name, functools.partial(library, name, **settings), make_input
