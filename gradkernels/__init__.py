"""Cures for vanishing and exploding gradients as fused kernels: activations, batch normalisation, clipping.

All public names are in this namespace. Importing it always works: if the compiled library cannot be used,
torch's operators compute the same functions, and a warning says why and which command fixes it.
"""

import warnings

import torch

from gradkernels import _native, init, optim
from gradkernels.activation import ELU, LeakyReLU, PReLU, RReLU, Swish, elu, leaky_relu, prelu, rrelu, swish
from gradkernels.batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, batch_norm_act
from gradkernels.clip_grad import GradReport, clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm, grad_report
from gradkernels.conversion.convert import convert, revert
from gradkernels.conversion.fold import fold
from gradkernels.conversion.report import ConversionReport
from gradkernels.diagnosis.diagnose import Diagnosis, diagnose
from gradkernels.diagnosis.monitor import GradientMonitor
from gradkernels.optim import ClippingHandle, attach_clipping
from gradkernels.recompute import recompute
from gradkernels.sync_batch_norm_act import SyncBatchNormAct, convert_sync_batch_norm

__version__ = "0.2.0.dev0"

__all__ = [
    "ELU",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "ClippingHandle",
    "ConversionReport",
    "Diagnosis",
    "GradReport",
    "GradientMonitor",
    "LeakyReLU",
    "PReLU",
    "RReLU",
    "Swish",
    "SyncBatchNormAct",
    "__version__",
    "attach_clipping",
    "batch_norm_act",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "convert",
    "convert_sync_batch_norm",
    "diagnose",
    "elu",
    "fold",
    "get_total_norm",
    "grad_report",
    "init",
    "leaky_relu",
    "optim",
    "prelu",
    "recompute",
    "revert",
    "rrelu",
    "swish",
]

# As torch does for its own modules. Our comparisons of sizes only check arguments, and a trace may leave them
# out.
warnings.filterwarnings("ignore", category=torch.jit._trace.TracerWarning, module=__name__)

if _native.reason is not None:
    warnings.warn(
        f"gradkernels runs without its kernels, on torch's operators: {_native.reason}. To fix this, run: {_native.remedy}",
        RuntimeWarning,
        stacklevel=2,
    )
