"""The kernels of the CPU without torch's C++ interface: the functions of gradkernels._C on a library of plain C functions.

One file of the library works with every torch from 2.11 on, and with every Python (csrc/portable.cpp). Gradients
are torch.autograd.Function. The kernels compute calls that are plainly right: tensors of the CPU in eager mode,
contiguous or channels_last. Every other call goes to gradkernels.reference, which also raises the errors, and so
do gradients that are differentiated again.
"""

import ctypes
import functools
import math
from array import array
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.nn import functional as F
from torch.utils._mode_utils import no_dispatch

from gradkernels import reference
from gradkernels.acts import ACTS

_INT, _REAL, _POINTER, _COUNT = ctypes.c_int, ctypes.c_double, ctypes.c_void_p, ctypes.c_int64
# Rows, channels, elements of a run.
_SHAPE = (_COUNT, _COUNT, _COUNT)
# dtypes, samples, _SHAPE, channels of a set, activation, training; x, residual, mask, weight, bias, statistics.
_NORM_ACT = (_INT, _INT, _COUNT, *_SHAPE, _COUNT, _INT, _REAL, _INT, *[_POINTER] * 6)
# A list of tensors: its length, dtypes, numbers of elements, addresses.
_LIST = (_COUNT, ctypes.c_char_p, _POINTER, _POINTER)
# The functions of csrc/portable.cpp that compute.
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "activation_forward": (_INT, _INT, _REAL, _COUNT, *[_POINTER] * 3),
    "activation_backward": (_INT, _INT, _REAL, _INT, _COUNT, *[_POINTER] * 3),
    "parametric_forward": (_INT, _INT, *_SHAPE, *[_POINTER] * 3),
    "parametric_backward": (_INT, _INT, *_SHAPE, *[_POINTER] * 5),
    "norm_act_forward": (*_NORM_ACT, _REAL, _INT, _REAL, *[_POINTER] * 4),
    "norm_act_backward": (*_NORM_ACT, *[_POINTER] * 5),
    "grad_norms": (*_LIST, _INT, *[_POINTER] * 4),
    "clip_grad_norm": (*_LIST, _INT, _REAL, _INT, _POINTER),
    "clip_with_norm": (*_LIST, _REAL, _POINTER),
    "clamp": (*_LIST, _REAL),
    "adaptive_clip": (*_LIST, _POINTER, _POINTER, _INT, _REAL, _REAL),
    "rmsprop": (*_LIST, *[_POINTER] * 4, *[_REAL] * 6),
}
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NORMS = {1.0: 0, 2.0: 1, float("inf"): 2}
_INPUT, _OUTPUT, _MASK = range(3)
_PRELU, _SWISH = range(2)

_TYPES = frozenset((Tensor, torch.nn.Parameter))
_dtype_of: Callable[[Tensor], torch.dtype] = cast(Any, Tensor.dtype).__get__
_Layout: TypeAlias = tuple[Tensor, tuple[int, ...], torch.memory_format]
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# Of load(): the functions of the library by their names without gk_, and the numbers of the activations.
_kernels: Any = None
_kinds: dict[str, int] = {}
_build_info: list[str] = []
# What the dispatcher sees in a tensor of the CPU that is nothing else: neither sparse, quantized or nested, nor of a
# transform, nor with a pending negation. A tensor of inference mode has other keys.
_keys_of: Callable[[Tensor], Any]
_plain: Any
_plain_of_inference: Any
_has_guards: bool


def _raise_if_failed(code: int) -> None:
    if code:
        raise MemoryError("std::bad_alloc")


def load(file: Path) -> None:
    """Loads the library. An error means that it does not fit this torch, and that this module must not be used."""
    global _kernels, _build_info, _keys_of, _plain, _plain_of_inference, _has_guards
    library = ctypes.CDLL(str(file))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, f"gk_{name}")
        function.argtypes, function.restype = arguments, _raise_if_failed
    library.gk_mask_bytes.argtypes, library.gk_mask_bytes.restype = (_COUNT, _COUNT, _COUNT), _COUNT
    library.gk_least_pixels.restype = _COUNT
    for name in ("build_info", "instruction_set", "activation_name"):
        getattr(library, f"gk_{name}").restype = ctypes.c_char_p
    _kinds.update((library.gk_activation_name(kind).decode(), kind) for kind in range(len(ACTS)))
    _build_info = library.gk_build_info().decode().split("\n")
    _kernels = library
    _keys_of = torch._C._dispatch_keys
    # The caller may be in inference mode, or in a mode whose tensors are others.
    with torch.inference_mode(False), no_dispatch():
        _plain = _keys_of(torch.empty(0, device="cpu"))
        _has_guards = _has_working_guards()
    with torch.inference_mode(), no_dispatch():
        _plain_of_inference = _keys_of(torch.empty(0, device="cpu"))
    _is_eager()


def build_info() -> dict[str, Any]:
    """As gradkernels._C.build_info; "torch" is the version of the headers."""
    version, commit, compiler, sets = _build_info
    return {"torch": version, "instruction_sets": sets.split(), "cuda_architectures": [], "compiler": compiler, "commit": commit}


def instruction_set() -> str:
    name: str = _kernels.gk_instruction_set().decode()
    return name


# ---- which calls the kernels take


def _is_eager() -> bool:
    """Whether no transform, mode or trace would have to see the call."""
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def _is_number(value: Any) -> bool:
    """Whether it is a float, or an int that torch takes wherever it takes a number. torch decides about others."""
    return type(value) is float or (type(value) is int and value.bit_length() < 64)


def _is_plain(x: Tensor) -> bool:
    return type(x) in _TYPES and x.dtype in _DTYPES and _keys_of(x) in (_plain, _plain_of_inference)


def _can_write(x: Tensor) -> bool:
    """Whether autograd allows to write a plain tensor in place, also one that is recorded."""
    if not (_is_dense(x) and (torch.is_inference_mode_enabled() or not x.is_inference())):
        return False
    return not torch.is_grad_enabled() or not (x._is_view() or (x.requires_grad and x.is_leaf))


def _count_versions(written: Iterable[Tensor]) -> None:
    increment_version([tensor for tensor in written if not tensor.is_inference()])


def _records(*tensors: Tensor | None) -> bool:
    # torch.enable_grad inside inference mode records nothing.
    records = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    return records and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _takes_gradient(grad_y: Tensor) -> bool:
    """Whether backward can use a kernel; else its result must be differentiable, or grad_y is a batch of functorch's."""
    return not torch.is_grad_enabled() and _is_eager() and _is_plain(grad_y)


# ---- layouts


def _is_dense(x: Tensor) -> bool:
    dim = x.dim()
    return x.is_contiguous() or (dim in _CHANNELS_LAST and x.is_contiguous(memory_format=_CHANNELS_LAST[dim]))


def _dense(x: Tensor) -> Tensor:
    """x, or a copy that is dense."""
    return x if _is_dense(x) else torch.empty_like(x).copy_(x)


def _in_order(grad_y: Tensor, stride: tuple[int, ...]) -> Tensor:
    """grad_y in the storage order that `stride` describes."""
    if grad_y.stride() == stride or all(size == 1 or a == b for size, a, b in zip(grad_y.shape, grad_y.stride(), stride, strict=True)):
        return grad_y
    return torch.empty_strided(grad_y.shape, stride, dtype=grad_y.dtype, device="cpu").copy_(grad_y)


def _has_strides_of_channels_last(x: Tensor) -> bool:
    """Tensor.suggest_memory_format of C++, where strides of dimensions with one element count too."""
    least = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.stride(dim) < least or (dim == 0 and least == x.stride(1)):
            return False
        least = x.stride(dim) * x.shape[dim]
    return True


def _by_channel(x: Tensor) -> _Layout:
    """x, or a copy in the layout of the kernels; its rows, channels and elements of a run (csrc/common/shape.h); its format."""
    x = _dense(x)
    channels_last = _CHANNELS_LAST.get(x.dim())
    rows, channels = x.shape[:2]
    if channels_last is not None and x.is_contiguous(memory_format=channels_last) and _has_strides_of_channels_last(x):
        return x, (x.numel() // channels, channels, 1), channels_last
    return x.contiguous(), (rows, channels, x.numel() // (rows * channels)), torch.contiguous_format


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


# ---- gradients by torch's operators


def _gradients_by_torch(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], wanted: tuple[bool, ...], grad_y: Tensor
) -> list[Tensor | None]:
    """The gradients of the wanted inputs of a function composed of torch's operators."""
    if not any(is_wanted and x is not None for x, is_wanted in zip(inputs, wanted, strict=True)):
        return [None] * len(inputs)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Two inputs may be one tensor, or depend on each other: the gradient of one must not include the other's.
        aliases = [None if x is None else x.view_as(x) for x in inputs]
        y = function(*aliases)
    wanted_aliases = [alias for alias, is_wanted in zip(aliases, wanted, strict=True) if alias is not None and is_wanted]
    found = iter(torch.autograd.grad(y, wanted_aliases, grad_y, create_graph=create_graph))
    return [next(found) if alias is not None and is_wanted else None for alias, is_wanted in zip(aliases, wanted, strict=True)]


def _masked_gradient(grad_y: Tensor, stride: tuple[int, ...], compute: Callable[[Tensor, Tensor], None]) -> Tensor:
    """The gradient of a slope for each element: compute(grad_y, grad_x) writes it."""
    if _takes_gradient(grad_y):
        source = _in_order(grad_y, stride)
        grad_x = torch.empty_like(source)
        compute(source, grad_x)
        return grad_x
    slopes = torch.empty_strided(grad_y.shape, stride, dtype=grad_y.dtype, device="cpu").fill_(1.0)
    compute(slopes, slopes)
    return grad_y * slopes


# ---- leaky_relu, elu, swish


def _activation_forward(x: Tensor, y: Tensor, act: str, parameter: float, mask: Tensor | None = None) -> None:
    _kernels.gk_activation_forward(
        _DTYPES[x.dtype], _kinds[act], parameter, x.numel(), x.data_ptr(), y.data_ptr(), None if mask is None else mask.data_ptr()
    )


def _mask_like(x: Tensor) -> Tensor:
    return torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device="cpu")


class _Activation(torch.autograd.Function):
    """Saves the input, the output or one bit for each element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: str, parameter: float, saved: int, inplace: bool) -> Tensor:
        source = _dense(x)
        y = x if inplace else torch.empty_like(source)
        mask = _mask_like(x) if saved == _MASK else None
        _activation_forward(source, y, act, parameter, mask)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward((x, y, mask)[saved])
        ctx.call = act, parameter, saved, y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (kept,), (grad_y,) = ctx.saved_tensors, grads
        act, parameter, saved, stride = ctx.call

        def compute(grad_y: Tensor, grad_x: Tensor) -> None:
            source = kept if saved == _MASK else _in_order(kept, stride)
            call = _DTYPES[grad_y.dtype], _kinds[act], parameter, saved, grad_y.numel()
            _kernels.gk_activation_backward(*call, grad_y.data_ptr(), source.data_ptr(), grad_x.data_ptr())

        if saved == _MASK or _takes_gradient(grad_y):
            return _masked_gradient(grad_y, stride, compute), None, None, None, None
        if act == "elu":
            return torch.ops.aten.elu_backward(grad_y, parameter, 1, 1, saved == _OUTPUT, kept), None, None, None, None
        (grad_x,) = _gradients_by_torch(lambda x: reference.swish(x, parameter), (kept,), (True,), grad_y)
        return grad_x, None, None, None, None


# autograd names a node after its class.
_FUNCTIONS: dict[str, Any] = {
    act: type(name, (_Activation,), {}) for act, name in (("leaky_relu", "LeakyRelu"), ("elu", "Elu"), ("swish", "Swish"))
}


def _activation(act: str, x: Tensor, parameter: float, saved: int, inplace: bool) -> Tensor | None:
    """None if the kernels do not take the call."""
    if not (_is_number(parameter) and _is_eager() and _is_plain(x)) or (inplace and not _can_write(x)):
        return None
    if _records(x):
        y: Tensor = _FUNCTIONS[act].apply(x, act, parameter, saved, inplace)
        return y
    source = _dense(x)
    y = x if inplace else torch.empty_like(source)
    _activation_forward(source, y, act, parameter)
    if inplace:
        _count_versions([x])
    return y


def leaky_relu(x: Tensor, negative_slope: float, inplace: bool) -> Tensor:
    y = _activation("leaky_relu", x, negative_slope, _MASK, inplace)
    return reference.leaky_relu(x, negative_slope, inplace) if y is None else y


def elu(x: Tensor, alpha: float, inplace: bool) -> Tensor:
    y = None
    if type(x) in _TYPES and _is_number(alpha) and (alpha >= 0 or not inplace):
        # An output of 16 bits does not have enough digits: near -alpha, they decide the gradient.
        saved = _OUTPUT if alpha >= 0 and (inplace or x.itemsize > 2) else _INPUT
        y = _activation("elu", x, alpha, saved, inplace)
    return reference.elu(x, alpha, inplace) if y is None else y


def swish(x: Tensor, beta: float) -> Tensor:
    y = _activation("swish", x, beta, _INPUT, False)
    return reference.swish(x, beta) if y is None else y


# ---- prelu, and swish with a tensor


def _parametric_layout(x: Tensor, parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """_by_channel; if all channels share the parameter, x is one channel."""
    return (_dense(x), (1, 1, x.numel())) if parameter.numel() == 1 else _by_channel(x)[:2]


class _Parametric(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, act: int) -> Tensor:
        ctx.save_for_backward(x, parameter)
        ctx.act = act
        source, shape = _parametric_layout(x, parameter)
        weight, y = parameter.contiguous(), torch.empty_like(source)
        _kernels.gk_parametric_forward(_DTYPES[x.dtype], act, *shape, source.data_ptr(), weight.data_ptr(), y.data_ptr())
        return _in_order(y, torch.empty_like(x).stride())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, parameter), (grad_y,) = ctx.saved_tensors, grads
        wanted = ctx.needs_input_grad[:2]
        if not _takes_gradient(grad_y):
            function = reference.prelu if ctx.act == _PRELU else reference.swish
            return *_gradients_by_torch(function, (x, parameter), wanted, grad_y), None
        source, shape = _parametric_layout(x, parameter)
        grad_y, weight = _in_order(grad_y, source.stride()), parameter.contiguous()
        grad_x = torch.empty_like(source) if wanted[0] else None
        grad_parameter = torch.empty_like(weight) if wanted[1] else None
        addresses = map(_address, (grad_y, source, weight, grad_x, grad_parameter))
        _kernels.gk_parametric_backward(_DTYPES[x.dtype], ctx.act, *shape, *addresses)
        return None if grad_x is None else _in_order(grad_x, torch.empty_like(x).stride()), grad_parameter, None


_Prelu: Any = type("Prelu", (_Parametric,), {})
_Swish: Any = type("Swish", (_Parametric,), {})


def _parametric(function: Any, act: int, x: Tensor, parameter: Tensor) -> Tensor | None:
    """None if the kernels do not take the call."""
    if not (_is_eager() and _is_plain(x) and _is_plain(parameter) and x.dtype == parameter.dtype and parameter.dim() < 2 and x.numel()):
        return None
    if torch.is_inference_mode_enabled() and torch.is_grad_enabled():
        return None
    fits = parameter.numel() == 1 or (x.dim() > 1 and parameter.numel() == x.shape[1])
    y: Tensor | None = function.apply(x, parameter, act) if fits and not torch.is_autocast_enabled("cpu") else None
    return y


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    y = _parametric(_Prelu, _PRELU, x, weight)
    return reference.prelu(x, weight) if y is None else y


def swish_tensor(x: Tensor, beta: Tensor) -> Tensor:
    y = _parametric(_Swish, _SWISH, x, beta)
    return reference.swish(x, beta) if y is None else y


def rrelu(x: Tensor, seed: Tensor, lower: float, upper: float, inplace: bool) -> Tensor:
    return reference.rrelu(x, lower, upper, True, inplace)


# ---- batch_norm_act and group_norm_act


def _norm_layout(x: Tensor, num_groups: int) -> _Layout:
    """_by_channel, with samples and their rows in front of the shape, and the channels of a set, or 0 in batch norm, at its end."""
    x, (rows, channels, inner), memory_format = _by_channel(x)
    samples, set_channels = (len(x), channels // num_groups) if num_groups else (1, 0)
    return x, (samples, rows // samples, channels, inner, set_channels), memory_format


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor,
    running: tuple[Tensor | None, ...],
    call: tuple[Any, ...],
    keeps_mask: bool,
) -> tuple[Tensor, Tensor | None, _Layout]:
    """y, the mask, and the layout of x. Writes mean and invstd."""
    num_groups, dtype, training, momentum, eps, act, act_param = call
    x, shape, memory_format = layout = _norm_layout(x, num_groups)
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    y = torch.empty_like(x)
    samples, *sizes, _ = shape
    mask = torch.empty(samples * _kernels.gk_mask_bytes(*sizes), dtype=torch.uint8, device="cpu") if keeps_mask else None
    running_mean, running_var, count = running
    _kernels.gk_norm_act_forward(
        *(_DTYPES[x.dtype], _DTYPES[dtype], *shape, _kinds[act], act_param, training),
        *map(_address, (x, residual, mask, weight, bias, statistics)),
        *(0.0 if momentum is None else momentum, momentum is None, eps),
        *map(_address, (running_mean, running_var, y, count)),
    )
    if training:
        _count_versions(tensor for tensor in running if tensor is not None)
    return y, mask, layout


class _NormAct(torch.autograd.Function):
    """Keeps x and the statistics; with a residual also one bit for each element, or the residual if the gradient reads it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: Tensor,
        running: tuple[Tensor | None, ...],
        call: tuple[Any, ...],
    ) -> Tensor:
        saves = ACTS[call[5]].saves
        y, mask, layout = _forward(x, weight, bias, residual, statistics, running, call, residual is not None and saves == "mask")
        ctx.save_for_backward(x, weight, bias, residual if saves == "value" else None, statistics, mask)
        # A hook may return x in another memory format; the mask and the statistics belong to this one.
        ctx.call, ctx.layout = call, layout[1:]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,), wanted = grads, ctx.needs_input_grad[:4]
        # Without an activation the gradient of the residual is that of z, where y = act(z).
        computes_residual = wanted[3] and ACTS[ctx.call[5]].saves != "nothing"
        if _takes_gradient(grad_y):
            gradients = _backward(ctx, grad_y, (*wanted[:3], computes_residual))
            grad_z = grad_y
        else:
            gradients, grad_z = _backward_by_torch(ctx, grad_y, wanted)
        if wanted[3] and gradients[3] is None:
            gradients[3] = grad_z
        return *gradients, None, None, None


_BatchNormAct: Any = type("BatchNormAct", (_NormAct,), {})
_GroupNormAct: Any = type("GroupNormAct", (_NormAct,), {})


def _backward(ctx: Any, grad_y: Tensor, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    x, weight, bias, residual, statistics, mask = ctx.saved_tensors
    _, dtype, training, _, _, act, act_param = ctx.call
    shape, memory_format = ctx.layout
    x = x.contiguous(memory_format=memory_format)
    # Every tensor needs a name here: a temporary would be freed when its address is known.
    grad_y = grad_y.contiguous(memory_format=memory_format)
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    gradients = [
        (torch.empty_like(x) if i in (0, 3) else torch.empty(x.shape[1], dtype=dtype, device="cpu")) if is_wanted else None
        for i, is_wanted in enumerate(wanted)
    ]
    _kernels.gk_norm_act_backward(
        *(_DTYPES[x.dtype], _DTYPES[dtype], *shape, _kinds[act], act_param, training),
        *map(_address, (x, residual, mask, weight, bias, statistics, grad_y, *gradients)),
    )
    return gradients


def _backward_by_torch(ctx: Any, grad_y: Tensor, wanted: tuple[bool, ...]) -> tuple[list[Tensor | None], Tensor]:
    """The gradients, and that of z, where y = act(z)."""
    *inputs, statistics, mask = ctx.saved_tensors
    num_groups, _, training, _, eps, act, act_param = ctx.call
    grad_z = grad_y
    if mask is not None:
        # act' takes two values. Where the gradient of inf is 0, act stops the gradient, so it is 0 for every grad_y.
        of_ones, of_infinities = (
            _backward(ctx, torch.full(grad_y.shape, value, dtype=grad_y.dtype, device="cpu"), (False, False, False, True))[3]
            for value in (1.0, float("inf"))
        )
        assert of_ones is not None and of_infinities is not None
        grad_z = torch.where(of_infinities == 0, 0, grad_y * of_ones)

    def function(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if num_groups:
            z = reference.group_norm_act(x, num_groups, weight, bias, eps, act="identity")
        elif training:
            z = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
        else:
            per_channel = (-1, *[1] * (x.dim() - 2))
            mean, invstd = (each.view(per_channel) for each in statistics)
            z = (x - mean) * invstd
            z = z if weight is None else z * weight.view(per_channel)
            z = (z if bias is None else z + bias.view(per_channel)).to(x.dtype)
        z = z if residual is None else z + residual
        return z if mask is not None else ACTS[act].function(z, act_param)

    return _gradients_by_torch(function, tuple(inputs), wanted, grad_z), grad_z


def _norm_dtype(x: Tensor, operands: tuple[Tensor | None, ...], residual: Tensor | None, eps: float) -> torch.dtype | None:
    """The dtype of the operands with one number for each channel; None if the kernels do not take the call."""
    if not (_is_number(eps) and _is_eager() and _is_plain(x) and 2 <= x.dim() <= 5 and x.numel() > 0):
        return None
    given = [operand for operand in operands if operand is not None]
    dtype = given[0].dtype if given else x.dtype
    if not (dtype == x.dtype or (dtype == torch.float32 and x.itemsize == 2)):
        return None
    for operand in given:
        if not (operand.dtype == dtype and operand.shape == x.shape[1:2] and operand.is_contiguous() and _is_plain(operand)):
            return None
    return dtype if residual is None or _is_plain(residual) else None


def _takes_running(x: Tensor, running: tuple[Tensor | None, ...], training: bool, momentum: float | None) -> bool:
    """Whether batch norm can use these running statistics and this count, or write them in training."""
    running_mean, running_var, count = running
    if not (momentum is None or _is_number(momentum)) or (running_mean is None) != (running_var is None):
        return False
    if not training:
        return running_mean is not None
    if count is not None and not (_keys_of(count) in (_plain, _plain_of_inference) and count.dtype == torch.int64 and count.numel() == 1):
        return False
    can_write = torch.is_inference_mode_enabled()
    written = [tensor for tensor in running if tensor is not None]
    return x.numel() > x.shape[1] and not any(each.requires_grad or (each.is_inference() and not can_write) for each in written)


def _norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: tuple[Tensor | None, ...],
    *call: Any,
) -> tuple[Tensor, Tensor]:
    """y, and mean and invstd."""
    num_groups = call[0]
    sets = len(x) * num_groups if num_groups else x.shape[1]
    statistics = torch.empty((2, sets), dtype=torch.float64, device="cpu")
    if _records(x, weight, bias, residual):
        function = _GroupNormAct if num_groups else _BatchNormAct
        return function.apply(x, weight, bias, residual, statistics, running, call), statistics
    return _forward(x, weight, bias, residual, statistics, running, call, False)[0], statistics


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    act: str,
    act_param: float,
) -> Tensor:
    running = (running_mean, running_var, num_batches_tracked if training else None)
    dtype = _norm_dtype(x, (running_mean, running_var, weight, bias), residual, eps)
    if dtype is None or not _takes_running(x, running, training, momentum):
        return reference.batch_norm_act(
            *(x, running_mean, running_var, weight, bias, training, momentum, eps),
            act=act,
            act_param=act_param,
            residual=residual,
            num_batches_tracked=num_batches_tracked,
        )
    return _norm_act(x, weight, bias, residual, running, 0, dtype, training, momentum, eps, act, act_param)[0]


def group_norm_act_and_statistics(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
    act_param: float,
) -> tuple[Tensor, Tensor]:
    """y, and mean and invstd of the groups of each sample in turn, without elements if torch computes."""
    dtype = _norm_dtype(x, (weight, bias), residual, eps)
    if dtype is None or x.numel() < _kernels.gk_least_pixels() * x.shape[0] * x.shape[1]:
        y = reference.group_norm_act(x, num_groups, weight, bias, eps, act=act, act_param=act_param, residual=residual)
        return y, torch.empty((2, 0), dtype=torch.float64, device="cpu")
    return _norm_act(x, weight, bias, residual, (None, None, None), num_groups, dtype, True, 0.0, eps, act, act_param)


def group_norm_act(*arguments: Any) -> Tensor:
    return group_norm_act_and_statistics(*arguments)[0]


# ---- clipping and RMSprop, on lists of tensors


# With more than these, a program describes its lists anew again and again. 16 lists of 2,000 tensors take 5 MiB.
_MOST_REMEMBERED = 16
_Compute = TypeVar("_Compute", bound=Callable[..., Any])


def _guards_of(tensors: list[Tensor]) -> Any:
    """torch.compile's check that other tensors have the types, dispatch keys, dtypes, sizes and strides of these."""
    sizes, strides = ([*map(list, map(each, tensors))] for each in (Tensor.size, Tensor.stride))
    return cast(Any, torch._C)._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def _has_working_guards() -> bool:
    """Whether this torch has them. They are not public, and lists can be described without them."""
    one, two = (torch.empty(size, device="cpu") for size in (1, 2))
    try:
        guards = _guards_of([one, two])
        return guards.check(one, two) is True and guards.check(two, one) is False
    except Exception:
        return False


def _by_metadata(compute: _Compute) -> _Compute:
    """Remembers the results of compute(tensors, ...) for lists of tensors with the same metadata, on which alone they depend.

    A list of gradients is a new one in each step, and it is checked in a tenth of the time that it takes to describe it.
    """
    remembered: dict[Any, tuple[Any, Any]] = {}

    @functools.wraps(compute)
    def find(tensors: list[Tensor], *options: Any) -> Any:
        ends = (*tensors[:1], *tensors[-1:])
        # In inference mode, guards cannot tell a tensor of that mode from another one. Nor can they while dispatch keys are
        # excluded, which only private functions of torch do.
        if not (ends and _has_guards and _TYPES.issuperset(map(type, ends))) or torch.is_inference_mode_enabled():
            return compute(tensors, *options)
        # A nested tensor has no shape.
        key = len(tensors), *(each.is_nested or each.shape for each in ends), torch.is_grad_enabled(), options
        guards, result = remembered.get(key, (None, None))
        if guards is None or not guards.check(*tensors):
            result = compute(tensors, *options)
            if key not in remembered and len(remembered) >= _MOST_REMEMBERED:
                remembered.clear()
            if result:
                remembered[key] = _guards_of(tensors), result
        return result

    return cast("_Compute", find)


def _words(values: Iterable[int]) -> Any:
    words = array("q", values)
    return (ctypes.c_int64 * len(words)).from_buffer(words) if words else None


def _addresses(tensors: list[Tensor]) -> Any:
    return _words(map(Tensor.data_ptr, tensors))


def _are_contiguous(tensors: list[Tensor]) -> bool:
    return all(map(Tensor.is_contiguous, tensors))


@_by_metadata
def _description(tensors: list[Tensor]) -> tuple[int, bytes, Any] | None:
    """The length, dtypes and numbers of elements of a list; None if the kernels do not take its tensors."""
    if not (_TYPES.issuperset(map(type, tensors)) and all(map(_plain.__eq__, map(_keys_of, tensors)))):
        return None
    dtypes = [*map(_DTYPES.get, map(_dtype_of, tensors))]
    if None in dtypes or not (_are_contiguous(tensors) or all(map(_is_dense, tensors))):
        return None
    return len(tensors), bytes(cast("list[int]", dtypes)), _words(map(Tensor.numel, tensors))


def _described(tensors: list[Tensor]) -> tuple[Any, ...]:
    return *cast(Any, _description(tensors)), _addresses(tensors)


def clip_grad_supports(tensors: list[Tensor]) -> bool:
    return _is_eager() and _description(tensors) is not None


def grad_norms(grads: list[Tensor], norm_type: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norms, max_abs = torch.empty((2, len(grads)), dtype=torch.float64, device="cpu")
    nonfinite = torch.empty(len(grads), dtype=torch.int64, device="cpu")
    total_norm = torch.empty((), dtype=torch.float64, device="cpu")
    results = norms, max_abs, nonfinite, total_norm
    _kernels.gk_grad_norms(*_described(grads), _NORMS[norm_type], *map(Tensor.data_ptr, results))
    return results


def clip_grad_norm_(
    parameters: list[Tensor | tuple[str, Tensor]], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> tuple[Tensor, bool] | None:
    """As gradkernels._C.clip_grad_norm_: the total norm, and whether it is not finite and nothing was clipped."""
    tensors: list[Any] = parameters
    if not _TYPES.issuperset(map(type, tensors)):
        tensors = [entry[1] if type(entry) is tuple and len(entry) == 2 and type(entry[0]) is str else entry for entry in parameters]
        if not _TYPES.issuperset(map(type, tensors)):
            return None
    grads = [grad for grad in [tensor.grad for tensor in tensors] if grad is not None]
    description = _description(grads) if grads and _is_eager() else None
    if description is None:
        return None
    total_norm = ctypes.c_double()
    call = _NORMS[norm_type], max_norm, error_if_nonfinite, ctypes.byref(total_norm)
    _kernels.gk_clip_grad_norm(*description, _addresses(grads), *call)
    is_refused = error_if_nonfinite and not math.isfinite(total_norm.value)
    if not is_refused:
        increment_version(grads)
    dtype = functools.reduce(torch.promote_types, map([*_DTYPES].__getitem__, {*description[1]}))
    return torch.tensor(total_norm.value, dtype=dtype, device="cpu"), is_refused


def clip_grads_with_norm_(grads: list[Tensor], max_norm: float, total_norm: Tensor) -> None:
    _kernels.gk_clip_with_norm(*_described(grads), max_norm, ctypes.byref(ctypes.c_double(float(total_norm))))
    increment_version(grads)


def clip_grad_value_(grads: list[Tensor], clip_value: float) -> None:
    _kernels.gk_clamp(*_described(grads), clip_value)
    increment_version(grads)


def adaptive_clip_grad_(params: list[Tensor], grads: list[Tensor], clip_factor: float, eps: float, norm_type: float) -> None:
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if param.shape != grad.shape:
            raise RuntimeError(f"adaptive_clip_grad_: parameter {i} and its gradient must have the same dtype, device and shape")
    params, filled = ([tensor for tensor in tensors if tensor.numel()] for tensors in (params, grads))
    elements = _words(grad.numel() // (grad.shape[0] if grad.dim() > 1 else 1) for grad in filled)
    described = _described(filled)
    _kernels.gk_adaptive_clip(*described, _addresses(params), elements, _NORMS[norm_type], clip_factor, eps)
    increment_version(grads)


@_by_metadata
def _are_alike(tensors: list[Tensor], count: int) -> bool:
    """Whether the kernels take each of these lists of `count` tensors, in one, and they have the same dtypes, shapes and strides."""
    lists = [tensors[i : i + count] for i in range(0, len(tensors), max(count, 1))]
    if None in map(_description, lists):
        return False
    same: list[Callable[[Tensor], Any]] = [_dtype_of, Tensor.size, *([] if _are_contiguous(tensors) else [Tensor.stride])]
    return all([*map(geometry, each)] == [*map(geometry, lists[0])] for geometry in same for each in lists[1:])


def rmsprop_supports(params: list[Tensor], lists: list[list[Tensor]]) -> bool:
    """Whether every parameter, its gradient and its state are plain, and have one dtype, shape and strides."""
    if any(len(each) not in (0, len(params)) for each in lists):
        return False
    return _is_eager() and _are_alike([*params, *chain.from_iterable(lists)], len(params))


def rmsprop_(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    *options: float,
) -> None:
    _kernels.gk_rmsprop(*_described(params), *map(_addresses, (grads, square_avgs, grad_avgs, momentum_buffers)), *options)
    increment_version([*params, *square_avgs, *grad_avgs, *momentum_buffers])
