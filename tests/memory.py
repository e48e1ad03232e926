"""What tests ask of memory: the tensors that a call keeps for backward, and whether there is room for a large one."""

import pytest
from torch.autograd.graph import saved_tensors_hooks


def saved_by(function):
    """What the function returns, and the tensors that autograd has saved meanwhile."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    return y, saved


def skip_unless_free(size):
    """Skips the test where the machine has fewer bytes than `size` to give."""
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if free < size:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free")
