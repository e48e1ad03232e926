"""Calls csrc/cuda/channel_cut.h by ctypes, without torch, for tests/test_channel_cut.py and tests/inspect_cuda_code.py."""

import ctypes
import subprocess
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# An H200.
PROCESSORS = 132


@dataclass
class Plan:
    """As tests/simt/channel_cut.cpp fills it in."""

    width: int
    blocks_of_processor: int
    most_threads: int
    block_threads: int
    threads: int
    packets_in_flight: int
    slabs: int
    sample_slabs: int
    group_channels: int
    parts: int
    lanes: int
    line_packets: int
    packets: int

    @property
    def blocks(self) -> int:
        return self.slabs * self.parts

    @property
    def waves(self) -> float:
        return self.blocks / (self.blocks_of_processor * PROCESSORS)


class ChannelCut:
    """The functions of tests/simt/channel_cut.cpp, for tensors of `samples` samples of shape (rows, channels, inner)."""

    def __init__(self, compiler: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "channel_cut.so"
            flags = ["-std=c++17", "-O1", "-Icsrc", "-Wall", "-Wextra", "-fPIC", "-shared"]
            subprocess.run([compiler, *flags, "tests/simt/channel_cut.cpp", "-o", library], cwd=ROOT, check=True)
            self._library = ctypes.CDLL(str(library))

    def plan_of(
        self,
        shape: tuple[int, int, int],
        element_bytes: int,
        operands: int = 1,
        sums: bool = True,
        residual: bool = False,
        masked: bool = False,
        alignment: int = 16,
        processors: int = PROCESSORS,
        samples: int = 1,
    ) -> Plan:
        values = (ctypes.c_int64 * len(fields(Plan)))()
        flags = (int(residual), int(masked), int(sums))
        self._library.plan_of(*map(ctypes.c_int64, (*shape, samples)), element_bytes, alignment, operands, *flags, processors, values)
        return Plan(*values)

    def can_cut(self, shape: tuple[int, int, int], masked: bool, samples: int = 1) -> bool:
        return self._library.can_cut(*map(ctypes.c_int64, (*shape, samples)), int(masked)) != 0
