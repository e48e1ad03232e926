"""recompute: outputs of batch_norm_act that backward computes again, so that the graph need not keep them.

The hooks are C++ (csrc/autograd/recompute.h): they run for every tensor that an operation saves. Nothing is stored on modules; what is
recomputed was decided when the graph was recorded.
"""

from torch.autograd.graph import saved_tensors_hooks

from gradkernels import _native


class recompute(saved_tensors_hooks):
    """Context in which the outputs of batch_norm_act and BatchNormAct are not kept for backward but computed again when it needs them.

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Batch norm keeps x and the statistics for its own gradient. The operation that takes y, mostly the next convolution, would keep y
    as well; in this context it keeps a reference from which y is computed bit for bit as it was, by one pass over x and the residual.
    Running statistics do not move again, and loss and gradients are those without the context. In a chain of residual blocks every
    third output is kept, so that no output takes more than two passes.

    Of use where models are converted (`convert`) or built of BatchNormAct. It is one of torch's contexts for saved tensors, as
    torch.autograd.graph.save_on_cpu: enter it around forward, in the thread that runs forward; backward may run outside. Of nested ones the
    innermost counts, torch.utils.checkpoint among them. What torch.compile has compiled, and SyncBatchNormAct, keep what they keep without
    it. Compiled autograd leaves its graph for each output that it computes again, as for save_on_cpu: it needs fullgraph=False, and
    compiles for long. Without the compiled library it does nothing.

    Raises:
        RuntimeError: in backward, in torch's words: what is needed was modified in place since, x and the residual now among it. A write
            to y itself is no error, and gradients are right, unless it goes past autograd (`y.data.add_(1)`) and before y is used, which
            is not seen.

    Source: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016; Rota Bulo, Porzi, Kontschieder, "In-Place
    Activated BatchNorm for Memory-Optimized Training of DNNs", 2018.

    Example:
        >>> import torch, gradkernels as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), gk.BatchNormAct2d(8, act="relu"), torch.nn.Conv2d(8, 1, 3))
        >>> with gk.recompute():
        ...     loss = model(torch.randn(2, 3, 8, 8)).square().mean()
        >>> loss.backward()
    """

    def __init__(self) -> None:
        if _native.C is not None:
            super().__init__(_native.C.pack_hook, _native.C.unpack_hook)

    def __enter__(self) -> None:
        if _native.C is not None:
            super().__enter__()

    def __exit__(self, *args: object) -> None:
        if _native.C is not None:
            super().__exit__(*args)
