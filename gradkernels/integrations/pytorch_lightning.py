"""Callbacks for the Trainer of pytorch_lightning: clip inside the optimizer, and watch the gradients."""

from pytorch_lightning import Callback

from gradkernels.integrations import lightning_hooks


class ClipGradients(lightning_hooks.ClipGradients, Callback):
    __doc__ = lightning_hooks.ClipGradients.__doc__


class WatchGradients(lightning_hooks.WatchGradients, Callback):
    __doc__ = lightning_hooks.WatchGradients.__doc__
