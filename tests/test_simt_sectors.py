"""How the CUDA kernels touch memory, counted on the host (tests/simt): 32-byte sectors over those needed.

A GPU moves whole sectors. A warp that touches more of them than its bytes need wastes bandwidth, or at least
the requests of the SM; results do not show it.
"""

import ctypes
import itertools
from functools import partial

import pytest
import torch

from accuracy import DTYPES
from simt_library import DTYPE_NUMBERS, Guarded, load
from test_simt_activation import INPUT, KINDS, MASK, PRELU, SWISH
from test_simt_clip_grad import NORMS, array, runs

pytestmark = pytest.mark.slow

MOST = 1.1
# Of runs of 14 x 14 elements in 16 bits. They have 392 bytes and begin within a sector, so the 256 bytes of a warp touch one
# sector more than the eight that could hold them, and another one where they go on in the next row.
MOST_OF_CUT_SECTORS = 1.18
# Several tiles, and an end that is not a packet.
SIZE = 40_003
# (rows, channels, inner) of a learnt parameter, whose runs or rows are whole packets.
RUNS, COLUMNS = (3, 5, 1024), (300, 64, 1)
# Of batch norm: long runs that cut sectors in 16 bits, and that are whole sectors in every type; rows across channels; short
# runs, whose packets of 4 columns lie across channels.
CUT = (3, 8, 196)
BATCH_NORM = (CUT, (3, 8, 3136), (600, 64, 1), (4, 16, 49))
# Of group norm, (samples, rows, channels, inner) with four channels in a set: runs and rows.
GROUP_NORM = ((2, 1, 8, 3136), (2, 300, 64, 1))


@pytest.fixture
def guarded():
    memory = Guarded()
    yield memory
    memory.check()


def tensors(guarded, count, size, dtype, *, offset=0):
    return [guarded.copy(torch.randn(size, dtype=torch.float64).abs().to(dtype), offset=offset) for _ in range(count)]


def activation_forward(act, masks, guarded, dtype):
    x, y = tensors(guarded, 2, SIZE, dtype)
    return "activation_forward", dtype, KINDS[act], 1.0, SIZE, x, y, guarded.empty((SIZE + 7) // 8, torch.uint8) if masks else None


def activation_backward(act, saved, guarded, dtype):
    grad_y, x, grad_x = tensors(guarded, 3, SIZE, dtype)
    return "activation_backward", dtype, KINDS[act], 1.0, saved, SIZE, grad_y, x, grad_x


def rrelu(direction, guarded, dtype):
    x, y = tensors(guarded, 2, SIZE, dtype)
    mask = guarded.empty((SIZE + 7) // 8, torch.uint8)
    return f"rrelu_{direction}", dtype, torch.tensor(7), 0.1, 0.3, SIZE, x, *((y, mask) if direction == "forward" else (mask, y))


def parametric_forward(act, shape, guarded, dtype):
    x, y = tensors(guarded, 2, torch.Size(shape).numel(), dtype)
    (parameter,) = tensors(guarded, 1, shape[1], dtype)
    return "parametric_forward", dtype, *shape, act, x, parameter, y


def parametric_backward(act, shape, guarded, dtype):
    grad_y, x, grad_x = tensors(guarded, 3, torch.Size(shape).numel(), dtype)
    parameter, grad_parameter = tensors(guarded, 2, shape[1], dtype)
    return "parametric_backward", dtype, *shape, act, grad_y, x, parameter, grad_x, grad_parameter


def batch_norm(direction, shape, guarded, dtype):
    x, y, grad_y, grad_x = tensors(guarded, 4, torch.Size(shape).numel(), dtype)
    weight, grad_weight = tensors(guarded, 2, shape[1], torch.float32)
    mean, invstd = tensors(guarded, 2, shape[1], torch.float64)
    problem = dtype, torch.float32, *shape, KINDS["leaky_relu"], 0.1
    if direction == "forward":
        return "batch_norm_act_forward", *problem, x, None, weight, None, mean, invstd, y, None, 1, 0.1, 1e-5, None, None, None, None
    known = grad_y, x, None, None, weight, None, mean, invstd
    return "batch_norm_act_backward", *problem, *known, 1, grad_x, grad_weight, None, None


def group_norm(direction, shape, guarded, dtype):
    samples, _, channels, _ = shape
    x, residual, y, grad_y, grad_x, grad_residual = tensors(guarded, 6, torch.Size(shape).numel(), dtype)
    weight, grad_weight = tensors(guarded, 2, channels, torch.float32)
    mean, invstd = tensors(guarded, 2, samples * channels // 4, torch.float64)
    problem = dtype, torch.float32, *shape, 4, KINDS["swish"], 1.0
    if direction == "forward":
        return "group_norm_act_forward", *problem, x, residual, weight, None, mean, invstd, y, None, 1e-5
    known = grad_y, x, residual, None, weight, None, mean, invstd
    return "group_norm_act_backward", *problem, *known, grad_x, grad_weight, None, grad_residual


def grad_norms(norm_type, offset, guarded, dtype):
    grads = tensors(guarded, 2, SIZE, dtype, offset=offset)
    norms, max_abs, total = tensors(guarded, 3, 2, torch.float64)
    return "grad_norms", *runs(grads), NORMS[norm_type], norms, max_abs, guarded.empty(2, torch.int64), total


def clip_with_norm(offset, guarded, dtype):
    return "clip_with_norm", *runs(tensors(guarded, 2, SIZE, dtype, offset=offset)), 1.0, torch.tensor([2.0], dtype=torch.float64)


def clamp(guarded, dtype):
    return "clamp", *runs(tensors(guarded, 2, SIZE, dtype)), 0.01


def rmsprop(guarded, dtype):
    state = tensors(guarded, 5, SIZE, dtype)
    pointers = array([each.data_ptr() for each in state], ctypes.c_void_p)
    return "rmsprop", 1, array([DTYPE_NUMBERS[dtype]]), array([SIZE]), pointers, 0.01, 0.9, 1e-8, 0.1, 0.9, 1.0


# library, what it calls, the arguments of the call
CALLS = [
    ("activation", "elu", partial(activation_forward, "elu", False)),
    ("activation", "leaky_relu with a mask", partial(activation_forward, "leaky_relu", True)),
    ("activation", "gradient of swish", partial(activation_backward, "swish", INPUT)),
    ("activation", "gradient from a mask", partial(activation_backward, "leaky_relu", MASK)),
    ("activation", "rrelu", partial(rrelu, "forward")),
    ("activation", "gradient of rrelu", partial(rrelu, "backward")),
    *(("activation", f"prelu {shape}", partial(parametric_forward, PRELU, shape)) for shape in (RUNS, COLUMNS, CUT)),
    *(("activation", f"gradient of swish {shape}", partial(parametric_backward, SWISH, shape)) for shape in (RUNS, COLUMNS, CUT)),
    *(
        ("batch_norm_act", f"batch norm {direction} {shape}", partial(batch_norm, direction, shape))
        for shape, direction in itertools.product(BATCH_NORM, ("forward", "backward"))
    ),
    *(
        ("batch_norm_act", f"group norm {direction} {shape}", partial(group_norm, direction, shape))
        for shape, direction in itertools.product(GROUP_NORM, ("forward", "backward"))
    ),
    *(("clip_grad", f"norms {norm_type}", partial(grad_norms, norm_type, 0)) for norm_type in NORMS),
    ("clip_grad", "clipping by a norm", partial(clip_with_norm, 0)),
    # Views of a flat buffer.
    ("clip_grad", "norms of unaligned gradients", partial(grad_norms, 2.0, 1)),
    ("clip_grad", "clipping unaligned gradients by a norm", partial(clip_with_norm, 1)),
    ("clip_grad", "clipping by value", clamp),
    ("optim", "rmsprop", rmsprop),
]


def waste(sectors):
    """Sectors touched over sectors needed, of loads and of stores."""
    return {which: touched / needed for which, (touched, needed) in sectors.items() if needed}


@pytest.mark.parametrize(("stride", "expected"), [(0, 1), (1, 1), (2, 2), (8, 8), (9, 8)])
def test_what_is_counted(stride, expected):
    """32 lanes load 4 bytes each, at most one from each sector: eight times the sectors that 128 bytes need."""
    assert waste(load("clip_grad").sectors("strided", stride, torch.zeros(8 + 32 * stride))) == {"loads": expected}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("library", "name", "arguments"), CALLS, ids=[each[1] for each in CALLS])
def test_sectors(library, name, arguments, guarded, dtype):
    found = waste(load(library).sectors(*arguments(guarded, dtype)))
    most = MOST_OF_CUT_SECTORS if str(CUT) in name and dtype.itemsize == 2 else MOST
    assert found and max(found.values()) <= most, found
