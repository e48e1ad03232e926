"""Measures of memory: the tensors that a call saves for backward, the bytes that it keeps, and free memory."""

import gc

import pytest
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_by(function):
    """The result of the function, and the tensors that autograd saved during the call."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    return y, saved


class _Storages(TorchDispatchMode):
    """Weak references to memory that operators allocate, and its bytes; not the memory of their arguments."""

    def __init__(self):
        super().__init__()
        self.given = {}
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.note(self.given, (args, kwargs))
        result = function(*args, **(kwargs or {}))
        self.note(self.made, result)
        return result

    def note(self, where, tensors):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.given and storage._cdata not in self.made:
                    where[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())


def bytes_kept_by(function):
    """The bytes allocated in a call that its result and its graph keep alive, under any saved-tensor hooks."""
    with _Storages() as storages:
        y = function()
    gc.collect()
    kept = sum(size for reference, size in storages.made.values() if not reference.expired())
    del y
    return kept


def skip_unless_free(size):
    """Skips the test on a machine with less than `size` bytes of free memory."""
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if free < size:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free")
