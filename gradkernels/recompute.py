"""recompute: backward computes outputs of batch_norm_act again, so that the graph does not keep them.

The hooks are C++ (csrc/autograd/recompute.h), because they run for every tensor that an operation saves.
Nothing is stored on modules: the forward pass decides which outputs backward recomputes.
"""

from torch.autograd.graph import saved_tensors_hooks

from gradkernels import _native


class recompute(saved_tensors_hooks):
    """Context in which backward computes outputs of batch_norm_act and BatchNormAct again, to save memory.

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Batch norm keeps x and the statistics for its own gradient. The next operation, usually a convolution,
    would keep y too. In this context it keeps a reference, from which backward computes y again, with the
    same bits, in one pass over x and the residual. Running statistics are updated once, and loss and
    gradients are the same as without the context. In a chain of residual blocks every third output is kept,
    so that recomputing an output takes at most two passes.

    Use it with converted models (`convert`) and with models built from BatchNormAct. It is a context for
    saved tensors, like torch.autograd.graph.save_on_cpu: enter it around forward, in the thread that runs
    forward; backward may run outside. If such contexts are nested, the innermost one counts;
    torch.utils.checkpoint is one of them. The context has no effect on code compiled by torch.compile, on
    SyncBatchNormAct, or without the compiled library. Compiled autograd needs fullgraph=False and long
    compilations, because it leaves its graph for each recomputed output, as for save_on_cpu.

    Raises:
        RuntimeError: in backward, torch's error if a tensor that backward needs was modified in place. x and
            the residual are such tensors now. Modifying y is not an error, and gradients stay right, with one
            exception that is not detected: a write without autograd (`y.data.add_(1)`) before y is used.

    Source: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016; Rota Bulo,
    Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", 2018.

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
