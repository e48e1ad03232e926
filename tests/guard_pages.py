"""Calls every operator on operands next to a page that must not be read or written.

    python tests/guard_pages.py

An operand ends where the page begins, or begins where the page ends. A kernel that reads or writes one byte
too far ends the process, so this runs in a process of its own. Each call is printed before it is made.
"""

import ctypes
import faulthandler
import itertools
import mmap

import torch

import gradkernels as gk
from accuracy import DTYPES

SHAPES = (
    *((size,) for size in (*range(1, 36), 63, 64, 65, 127, 129, 1025)),
    *((4, 3), (3, 17), (5, 65), (2, 3, 5), (2, 1, 63), (2, 3, 64), (1, 2, 67), (3, 5, 7, 7), (2, 17, 3, 3), (2, 3, 9, 8)),
)
FORBIDDEN = 0
SIZE_OF_GUARD = 1 << 16  # bytes: whole pages on every processor

libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor, at_end):
    """A copy of the tensor in the same storage order, next to a page that must not be accessed."""
    nbytes = tensor.numel() * tensor.element_size()
    room = -(-nbytes // SIZE_OF_GUARD) * SIZE_OF_GUARD
    memory = mmap.mmap(-1, room + 2 * SIZE_OF_GUARD)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + SIZE_OF_GUARD + room):
        if libc.mprotect(ctypes.c_void_p(guard), SIZE_OF_GUARD, FORBIDDEN) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = SIZE_OF_GUARD + (room - nbytes if at_end else 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def calls(shape, dtype, at_end):
    """Names and calls; each call has operands of its own."""

    def operand(*of_shape, memory_format=torch.contiguous_format):
        return guarded(torch.randn(of_shape).to(dtype).contiguous(memory_format=memory_format), at_end)

    def backward(y, *leaves):
        torch.autograd.grad(y, leaves, operand(*y.shape))

    def activation(function, *parameters):
        leaves = [each.requires_grad_() for each in (operand(*shape), *parameters)]
        backward(function(*leaves), *leaves)

    channels = shape[1] if len(shape) > 1 else 1
    yield "leaky_relu", lambda: activation(gk.leaky_relu)
    yield "elu", lambda: activation(gk.elu)
    yield "swish", lambda: activation(lambda x: gk.swish(x, 1.5))
    yield "rrelu", lambda: activation(lambda x: gk.rrelu(x, training=True))
    yield "in place", lambda: [gk.leaky_relu(operand(*shape), inplace=True), gk.elu(operand(*shape), inplace=True)]
    yield "prelu", lambda: activation(gk.prelu, operand(channels))
    yield "swish with a tensor", lambda: activation(gk.swish, operand(channels))

    def clip():
        parameters = [torch.nn.Parameter(torch.empty(0)), torch.nn.Parameter(torch.empty(shape, dtype=dtype))]
        parameters[1].grad = operand(*shape)
        gk.clip_grad_norm_(parameters, 1e-3)
        gk.clip_grad_value_(parameters, 1e-4)
        gk.grad_report(parameters)
        weights = torch.nn.Parameter(operand(*shape))
        weights.grad = operand(*shape)
        gk.adaptive_clip_grad_(weights, 1e-4)

    def rmsprop():
        parameter = torch.nn.Parameter(operand(*shape))
        parameter.grad = operand(*shape)
        gk.optim.RMSprop([parameter], momentum=0.9, centered=True).step()

    yield "clipping", clip
    yield "rmsprop", rmsprop

    def batch_norm_act(act, training, with_residual, memory_format):
        leaves = [operand(*shape, memory_format=memory_format), operand(channels), operand(channels)]
        leaves += [operand(*shape, memory_format=memory_format)] if with_residual else []
        leaves = [each.requires_grad_() for each in leaves]
        x, weight, bias, *residual = leaves
        stats = operand(channels), operand(channels).abs_().add_(0.5)
        backward(gk.batch_norm_act(x, *stats, weight, bias, training, act=act, residual=residual[0] if residual else None), *leaves)

    def group_norm_act(act, num_groups, memory_format):
        leaves = [operand(*shape, memory_format=memory_format), operand(channels), operand(channels)]
        leaves = [each.requires_grad_() for each in (*leaves, operand(*shape, memory_format=memory_format))]
        x, weight, bias, residual = leaves
        backward(gk.group_norm_act(x, num_groups, weight, bias, act=act, residual=residual), *leaves)

    if len(shape) > 2:
        for act, num_groups in itertools.product(("leaky_relu", "swish"), {1, channels}):
            for memory_format in (torch.contiguous_format, torch.channels_last) if len(shape) == 4 else (torch.contiguous_format,):
                arguments = act, num_groups, memory_format
                yield f"group_norm_act {arguments}", lambda arguments=arguments: group_norm_act(*arguments)
    if len(shape) > 1:
        for act, training, with_residual in itertools.product(("relu6", "leaky_relu", "swish"), (True, False), (True, False)):
            for memory_format in (torch.contiguous_format, torch.channels_last) if len(shape) == 4 else (torch.contiguous_format,):
                arguments = act, training, with_residual, memory_format
                yield f"batch_norm_act {arguments}", lambda arguments=arguments: batch_norm_act(*arguments)


def main():
    faulthandler.enable()
    made = 0
    for shape, dtype, at_end in itertools.product(SHAPES, DTYPES, (True, False)):
        for name, call in calls(shape, dtype, at_end):
            print(name, shape, dtype, "end" if at_end else "begin", flush=True)
            call()
            made += 1
    print(f"{made} calls")


if __name__ == "__main__":
    main()
