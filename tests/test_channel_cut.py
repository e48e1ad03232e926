"""How batch norm and group norm on CUDA cut a tensor (csrc/cuda/channel_cut.h), without a GPU: every element is in one
part, and what the cut of the shapes of bench_cuda.py leaves in flight, idle and to be merged on an H200. The table of
docs/design/cuda.md is made here.
"""

import math
import shutil
from itertools import product

import pytest

import channel_cut
from bench_cuda import GROUP_NORMS, SHAPES

# A pass: its name, how many tensors it reads, and whether it is one for sums.
PASSES = {"stats": (1, True), "normalise": (1, False), "backward_reduce": (2, True), "backward_elemt": (2, False)}
LONG_RUN = 64


@pytest.fixture(scope="module")
def cut():
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    return channel_cut.ChannelCut(compiler)


@pytest.fixture
def plan_of(cut):
    return cut.plan_of


def in_layout(shape, layout):
    """(rows, channels, inner) of an image batch."""
    n, channels, height, width = shape
    return (n, channels, height * width) if layout == "contiguous" else (n * height * width, channels, 1)


def elements_of_parts(shape, plan):
    """The (sample, row, column) of every element that the threads of all parts take, by the definition in channel_cut.h."""
    _, channels, inner = shape
    columns = channels * inner if inner < LONG_RUN else inner
    group = plan.group_channels * inner if inner < LONG_RUN else inner
    for slab_of_all, part, first in product(range(plan.slabs), range(plan.parts), range(plan.threads)):
        sample, slab = divmod(slab_of_all, plan.sample_slabs)
        for packet in range(part * plan.threads + first, plan.packets, plan.parts * plan.threads):
            row, place = divmod(packet, plan.line_packets)
            line_begin = slab * group if inner < LONG_RUN else 0
            for k in range(plan.width):
                column = line_begin + place * plan.width + k
                if place * plan.width + k < group and column < columns:
                    yield (sample, slab if inner >= LONG_RUN else 0, row, column)


@pytest.mark.parametrize("element_bytes", [2, 4, 8])
@pytest.mark.parametrize(
    "shape", [(5, 3, 196), (3, 2, 49 * 3), (7, 20, 1), (33, 65, 1), (9, 12, 1), (6, 9, 49), (4, 3, 64), (200, 8, 7)], ids=str
)
def test_each_element_is_in_one_part(plan_of, shape, element_bytes):
    for alignment, masked, samples in product((16, 8, element_bytes), (False, True), (1, 3)):
        plan = plan_of(shape, element_bytes, masked=masked, alignment=alignment, processors=2, samples=samples)
        # Threads that share a byte of the mask are neighbours.
        assert not masked or plan.line_packets * plan.width % 8 == 0 == plan.threads * plan.width % 8
        assert plan.width * element_bytes <= max(alignment, element_bytes)
        # Whole warps, and for each channel of a slab a thread that merges.
        assert max(plan.threads, plan.lanes * plan.group_channels) <= plan.block_threads <= plan.most_threads
        assert plan.block_threads % 32 == 0
        taken = list(elements_of_parts(shape, plan))
        assert len(taken) == len(set(taken)) == samples * shape[0] * shape[1] * shape[2]


@pytest.mark.parametrize(("name", "layout", "element_bytes"), list(product(PASSES, ("contiguous", "channels_last"), (2, 4))))
def test_shapes_of_networks_keep_a_gpu_busy(plan_of, name, layout, element_bytes):
    operands, sums = PASSES[name]
    for shape in SHAPES:
        plan = plan_of(in_layout(shape, layout), element_bytes, operands, sums)
        assert plan.width * element_bytes >= 8, shape
        bytes_in_flight = plan.blocks_of_processor * plan.threads * plan.packets_in_flight * operands * plan.width * element_bytes
        assert bytes_in_flight >= 36 << 10, (shape, plan)
        # Threads without columns, and channels of the last slab that do not exist.
        assert plan.threads >= 0.83 * plan.block_threads, (shape, plan)
        assert layout == "contiguous" or shape[1] >= 0.9 * plan.slabs * plan.group_channels, (shape, plan)
        full = plan.packets / (plan.threads * plan.packets_in_flight)
        assert plan.waves >= 0.8 or plan.parts >= full // 1, (shape, plan)
        assert plan.waves / -(-plan.waves // 1) >= 0.75 or plan.parts >= full // 1, (shape, plan)
        # The last block of a slab reads this, from L2, while nothing else may be left to do.
        assert not sums or plan.parts * plan.group_channels * 24 <= 256 << 10, (shape, plan)
        # It has six waits, each for six parts of a thread.
        assert not sums or plan.parts <= 6 * 6 * plan.lanes, (shape, plan)


@pytest.mark.parametrize(("name", "layout", "element_bytes"), list(product(PASSES, ("contiguous", "channels_last"), (2, 4))))
def test_samples_of_group_norm_leave_no_warp_idle(plan_of, name, layout, element_bytes):
    """However few packets a sample has: what an SM runs at once is as many threads, in more blocks."""
    operands, sums = PASSES[name]
    for (samples, channels, *pixels), *_ in GROUP_NORMS:
        shape = (1, channels, math.prod(pixels)) if layout == "contiguous" else (math.prod(pixels), channels, 1)
        plan = plan_of(shape, element_bytes, operands, sums, samples=samples)
        assert plan.slabs == samples * plan.sample_slabs and plan.width * element_bytes >= 8
        assert plan.threads >= 0.83 * plan.block_threads, (shape, plan)
        assert plan.packets >= plan.parts * plan.threads > 0, (shape, plan)
        assert plan.block_threads == plan.most_threads or plan.packets <= plan.threads * plan.packets_in_flight, (shape, plan)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_few_channels_leave_no_thread_idle(plan_of, channels):
    plan = plan_of((802_816, channels, 1), 2)
    assert plan.threads >= 0.98 * plan.block_threads and plan.line_packets * plan.width == channels


def test_what_32_bits_cannot_count(cut):
    assert cut.can_cut((2**20, 64, 2**12), False) and cut.can_cut((2**20, 64, 2**8), True) and cut.can_cut((1, 1, 2**31 - 1), True)
    assert cut.can_cut((2**20, 64, 2**5), True, 15) and not cut.can_cut((2**20, 64, 2**5), True, 16)
    assert not cut.can_cut((1, 1, 2**31), False) and not cut.can_cut((2**32, 1, 1), True) and cut.can_cut((2**32, 1, 1), False)


def table(plan_of):
    lines = ["| shape | layout | width | blocks | waves | parts | in flight, KiB | to merge, KiB |", "|---|---|---|---|---|---|---|---|"]
    for shape, layout in product(SHAPES, ("contiguous", "channels_last")):
        plan = plan_of(in_layout(shape, layout), 2)
        in_flight = plan.blocks_of_processor * plan.threads * plan.packets_in_flight * plan.width * 2 / 1024
        merged = plan.parts * plan.group_channels * 24 / 1024 if plan.parts > 1 else 0
        numbers = [plan.width, plan.blocks, f"{plan.waves:.2f}", plan.parts, f"{in_flight:.0f}", f"{merged:.0f}"]
        lines.append(f"| {' | '.join(map(str, ['x'.join(map(str, shape)), layout, *numbers]))} |")
    return "\n".join(lines)


def test_the_table_of_the_documentation(plan_of):
    assert table(plan_of) in (channel_cut.ROOT / "docs/design/cuda.md").read_text(), table(plan_of)
