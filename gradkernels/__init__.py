"""Cures for vanishing and exploding gradients as fused kernels: activations, batch normalisation, clipping.

All public names are in this namespace. Importing it always works: without the native library the portable one
computes, and without both torch's operators do. A warning says why and which command fixes it.
"""

import importlib
import warnings
from typing import TYPE_CHECKING

import torch

from gradkernels import _native, clipping, optim
from gradkernels.activation import ELU, LeakyReLU, PReLU, RReLU, Swish, elu, leaky_relu, prelu, rrelu, swish
from gradkernels.batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, batch_norm_act
from gradkernels.clip_grad import (
    GradReport,
    adaptive_clip_grad_,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
    grad_report,
)
from gradkernels.frozen_batch_norm_act import FrozenBatchNormAct2d, freeze_batch_norm, unfreeze_batch_norm
from gradkernels.group_norm_act import GroupNormAct, InstanceNormAct1d, InstanceNormAct2d, InstanceNormAct3d, group_norm_act
from gradkernels.optim import ClippingHandle, attach_clipping
from gradkernels.recompute import recompute
from gradkernels.sync_batch_norm_act import SyncBatchNormAct, convert_sync_batch_norm

# Loaded at first use, by the table below: together they take longer to load than all the rest, and the
# operators do not need them.
if TYPE_CHECKING:
    from gradkernels import init
    from gradkernels.conversion.convert import convert, revert
    from gradkernels.conversion.fold import fold
    from gradkernels.conversion.report import ConversionReport
    from gradkernels.diagnosis.diagnose import Diagnosis, diagnose
    from gradkernels.diagnosis.monitor import GradientMonitor

__version__ = "0.2.0.dev0"

__all__ = [
    "ELU",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "ClippingHandle",
    "ConversionReport",
    "Diagnosis",
    "FrozenBatchNormAct2d",
    "GradReport",
    "GradientMonitor",
    "GroupNormAct",
    "InstanceNormAct1d",
    "InstanceNormAct2d",
    "InstanceNormAct3d",
    "LeakyReLU",
    "PReLU",
    "RReLU",
    "Swish",
    "SyncBatchNormAct",
    "__version__",
    "adaptive_clip_grad_",
    "attach_clipping",
    "batch_norm_act",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clipping",
    "convert",
    "convert_sync_batch_norm",
    "diagnose",
    "elu",
    "fold",
    "freeze_batch_norm",
    "get_total_norm",
    "grad_report",
    "group_norm_act",
    "init",
    "leaky_relu",
    "optim",
    "prelu",
    "recompute",
    "revert",
    "rrelu",
    "swish",
    "unfreeze_batch_norm",
]

# Name -> the module to load, which has the name or is it.
_AT_FIRST_USE = {
    "ConversionReport": "conversion.report",
    "Diagnosis": "diagnosis.diagnose",
    "GradientMonitor": "diagnosis.monitor",
    "conversion": "conversion",
    "convert": "conversion.convert",
    "diagnose": "diagnosis.diagnose",
    "diagnosis": "diagnosis",
    "fold": "conversion.fold",
    "init": "init",
    "revert": "conversion.convert",
}

# A type checker that saw __getattr__ would accept every name.
if not TYPE_CHECKING:

    def __getattr__(name):
        if name not in _AT_FIRST_USE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_AT_FIRST_USE[name]}")
        if name not in globals():
            globals()[name] = getattr(module, name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_AT_FIRST_USE})


# As torch does for its own modules. Our comparisons of sizes only check arguments, and a trace may leave them
# out.
warnings.filterwarnings("ignore", category=torch.jit._trace.TracerWarning, module=__name__)

# A portable wheel has no native library, and nothing to warn of.
if _native.library() is None:
    warnings.warn(
        f"gradkernels runs without its kernels, on torch's operators: {_native.reason}, and {_native.portable_reason}. "
        f"To fix this, run: {_native.remedy}",
        RuntimeWarning,
        stacklevel=2,
    )
elif _native.C is None and _native.native_file() is not None:
    warnings.warn(
        f"gradkernels runs on its portable library: {_native.reason}. For the native one, run: {_native.remedy}",
        RuntimeWarning,
        stacklevel=2,
    )
