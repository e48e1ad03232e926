"""Calls torch.ops.gradkernels.* with right and wrong arguments.

    python tests/schema_calls.py SEED CALLS_PER_OPERATOR

A crash ends the process, so this runs in a process of its own, and each call is printed before it is made. A
call may write only what its schema says, and nothing if it raises. Arguments are made by their names, so a
new operator is called as soon as it exists.
"""

import faulthandler
import math
import random
import sys
import warnings

import torch

import gradkernels
from accuracy import DTYPES
from gradkernels.acts import ACTS

STRANGE_DTYPES = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
SHAPES = (
    (5, 3),
    (2, 3, 4),
    (2, 0, 3, 3),
    (2, 3, 5, 4),
    (2, 4, 7, 8),
    (1, 1),
    (4, 1, 3),
    (0, 3),
    (3, 0, 2),
    (2, 3, 2, 2, 3),
    (64, 65),
    (7,),
    (),
)
# group_norm_act has no kernel for fewer than 48 pixels.
LARGE_SHAPES = ((2, 4, 7, 8), (1, 3, 50), (0, 3, 50), (2, 6, 4, 4, 4))
HUGE = 2**45


class Case:
    """The shape and dtype of the tensors of one right call."""

    def __init__(self, draw, operator):
        self.draw = draw
        self.shape = draw.choice(LARGE_SHAPES if operator.startswith("group_norm") else SHAPES)
        self.dtype = draw.choice(DTYPES)
        self.format = draw.choice([torch.contiguous_format, torch.channels_last if len(self.shape) == 4 else torch.contiguous_format])
        self.act = draw.choice([*ACTS])
        self.training = draw.random() < 0.5
        self.channels = self.shape[1] if len(self.shape) > 1 else 1
        self.num_groups = draw.choice([1, max(self.channels, 1)])
        self.x = self.of_shape()

    def of_shape(self):
        return torch.randn(self.shape).to(self.dtype).contiguous(memory_format=self.format)

    def per_channel(self, dtype=None):
        return torch.rand(self.channels).to(dtype or self.dtype)

    def statistic(self, operator):
        """One number for each set of channels that has common statistics."""
        samples = self.shape[0] * self.num_groups if operator.startswith("group_norm") and self.shape else self.channels
        return torch.rand(samples, dtype=torch.float64)

    def mask(self, name):
        elements = self.x.numel()
        if name.startswith("group_norm_act"):
            if ACTS[self.act].saves != "mask" or self.x.dim() < 2 or not elements:
                return None
            mask = torch.ops.gradkernels.group_norm_act(self.x, self.num_groups, None, None, self.x, 1e-5, self.act, 0.1)[3]
            return mask if mask.numel() else None
        if name.startswith("batch_norm_act"):
            two_slopes = ACTS[self.act].saves == "mask" and self.x.dim() > 1 and elements
            y = two_slopes and torch.ops.gradkernels.batch_norm_act(
                self.x, self.per_channel(), self.per_channel() + 1, None, None, self.x, None, False, 0.1, 1e-5, self.act, 0.1
            )
            return y[3] if two_slopes else None
        return torch.randint(256, ((elements + 7) // 8,), dtype=torch.uint8)

    def fitting(self, operator, argument):
        """The argument of this name in a right call."""
        draw, channels = self.draw, self.channels
        made = {
            **dict.fromkeys(("x", "grad_y", "self_or_result"), self.of_shape),
            "residual": lambda: draw.choice([None, self.x, self.of_shape()]),
            **dict.fromkeys(("running_mean", "running_var"), self.per_channel),
            **dict.fromkeys(("weight", "bias"), lambda: draw.choice(self.parameters()) if "norm_act" in operator else self.per_channel()),
            "beta": lambda: draw.choice(self.parameters()) if "Tensor" in operator else 1.5,
            **dict.fromkeys(("mean", "invstd"), lambda: self.statistic(operator)),
            "num_batches_tracked": lambda: draw.choice([None, torch.tensor(3)]),
            "mask": lambda: self.mask(operator),
            "num_groups": lambda: self.num_groups,
            "seed": lambda: torch.tensor(7),
            "moments": lambda: torch.rand(draw.choice([0, 1, 3]), 1 + 2 * channels, dtype=torch.float64) + 2,
            "sums": lambda: torch.rand(2 * channels, dtype=torch.float64),
            "count": lambda: torch.tensor([float(max(self.x.numel() // max(channels, 1), 2))], dtype=torch.float64),
            **dict.fromkeys(("grads", "params", "square_avgs"), lambda: [self.x.clone(), torch.rand(9)]),
            **dict.fromkeys(("grad_avgs", "momentum_buffers"), lambda: draw.choice([[], [self.x.clone(), torch.rand(9)]])),
            "total_norm": lambda: torch.tensor(draw.choice([1e-9, 3.0, math.inf, math.nan])),
            "norm_type": lambda: draw.choice([1.0, 2.0, math.inf]),
            "stride": lambda: list(self.x.stride()),
            "output_mask": lambda: [draw.random() < 0.5 for _ in range(4 if "norm_act" in operator else 2)],
            **dict.fromkeys(("training", "is_result", "residual_g"), lambda: draw.random() < 0.5),
            "act": lambda: self.act,
            "momentum": lambda: 0.1 if operator == "rmsprop_" else draw.choice([None, 0.1]),
            "lower": lambda: 0.1,
            "upper": lambda: 0.3,
            **dict.fromkeys(("lr", "alpha", "eps", "weight_decay", "grad_coefficient"), lambda: 0.1),
            **dict.fromkeys(("negative_slope", "act_param", "max_norm", "clip_value", "clip_factor"), lambda: 0.1),
        }
        return made[argument]()

    def parameters(self):
        return [None, self.per_channel(), torch.rand(1).to(self.dtype)]


def strange_tensor(draw, tensor):
    """The tensor with one property changed."""
    # torch's own functions crash on the negated view of a quantized tensor.
    if tensor.is_quantized or tensor.numel() >= HUGE:
        return tensor
    changes = [
        lambda: tensor.to(draw.choice(DTYPES + STRANGE_DTYPES)),
        lambda: tensor.to("meta"),
        lambda: tensor.clone().requires_grad_(),
        lambda: tensor.reshape(-1),
        lambda: tensor.reshape(-1)[:-1],
        lambda: tensor.unsqueeze(0),
        lambda: tensor.unsqueeze(-1),
        lambda: tensor.sum(),
        lambda: tensor[..., :0] if tensor.dim() else tensor.new_empty(0),
        lambda: torch.cat([tensor.reshape(-1)] * 2),
        lambda: torch.stack([tensor, tensor], -1)[..., 0],
        lambda: tensor.transpose(0, -1) if tensor.dim() > 1 else tensor.expand(3, *tensor.shape),
        lambda: tensor.reshape(-1)[:1].expand(tensor.shape) if tensor.numel() else tensor,
        lambda: tensor.reshape(-1)[:1].expand(HUGE),
        lambda: tensor.reshape(-1)[:1].expand(HUGE, 3, 4),
        lambda: tensor.reshape(-1).as_strided((2, max(tensor.numel() - 1, 0)), (1, 1)),
        lambda: tensor.to_sparse(),
        lambda: tensor.reshape(-1, 1).to_sparse_csr(),
        lambda: torch._neg_view(tensor),
        lambda: tensor.float().to_mkldnn(),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([tensor, tensor]),
        lambda: torch.nested.nested_tensor([tensor, tensor], layout=torch.jagged),
        lambda: tensor.new_full(tensor.shape, math.nan),
    ]
    try:
        return draw.choice(changes)()
    except (RuntimeError, TypeError, IndexError, NotImplementedError, ValueError):
        # Not every tensor allows every change.
        return torch.zeros(())


def strange(draw, value):
    """A value that the argument should not have."""
    if draw.random() < 0.1:
        return draw.choice([None, "", "relu\0", b"x", object(), [], [None], 1j, HUGE, -1, torch.empty(0), torch.float32, {}])
    if isinstance(value, torch.Tensor):
        return strange_tensor(draw, value)
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        place = draw.randrange(len(value))
        other = strange_tensor(draw, value[place])
        return draw.choice([value[:-1], [*value, other], [*value[:place], other, *value[place + 1 :]], [other, other], []])
    if isinstance(value, list):
        return draw.choice([value[:-1], [*value, 1], [-1] * len(value), [HUGE] * len(value), [0] * len(value), ["x"], [2**63]])
    if isinstance(value, bool):
        return draw.choice([not value, 2, None, "yes"])
    if isinstance(value, str):
        return draw.choice(["", "Relu", "selu", "relu\0", "é" * 999])
    return draw.choice([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e308, 1e-310, -3, 10**400])


def tensors_in(arguments):
    for value in arguments:
        yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, torch.Tensor))


def bits(tensor):
    """The bytes of the whole storage of a tensor, also those outside the tensor; None if they cannot be read."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested or tensor.is_quantized:
        return None
    return bytes(tensor.untyped_storage())


def written_by(schema, arguments):
    """The addresses of the storages that the schema allows the call to write."""
    allowed = set()
    for argument, value in zip(schema.arguments, arguments, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            allowed |= {each.untyped_storage().data_ptr() for each in tensors_in([value]) if bits(each) is not None}
    return allowed


def make_call(draw, schema, overload):
    operator = schema.name.split("::")[1] + "." + schema.overload_name
    case = Case(draw, operator)
    arguments = [case.fitting(operator.rstrip("."), argument.name) for argument in schema.arguments]
    changed = draw.choice([0, 1, 1, 1, 2, 3])
    for _ in range(changed):
        place = draw.randrange(len(arguments))
        arguments[place] = strange(draw, arguments[place])
    count = draw.random()
    if count < 0.04:
        arguments.pop()
    elif count < 0.08:
        arguments.append(draw.choice([None, 0.5, case.x]))
    print(operator, [describe(value) for value in arguments], flush=True)
    before = [(each, bits(each)) for each in tensors_in(arguments)]
    allowed = written_by(schema, arguments)
    raised = None
    try:
        overload(*arguments)
    except Exception as error:
        raised = error
    for tensor, was in before:
        if was is not None and (raised is not None or tensor.untyped_storage().data_ptr() not in allowed) and bits(tensor) != was:
            raise AssertionError(f"{operator} wrote {describe(tensor)}; it raised {raised!r}")
    return raised


def describe(value):
    if isinstance(value, torch.Tensor):
        return f"{value.layout} {value.dtype} {value.device} {None if value.is_nested else tuple(value.shape)}"
    return [describe(each) for each in value] if isinstance(value, list) else repr(value)[:60]


def main(seed, calls):
    faulthandler.enable()
    warnings.simplefilter("ignore")
    draw = random.Random(seed)
    torch.manual_seed(seed)
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("gradkernels::")]
    for schema in sorted(schemas, key=str):
        overload = getattr(getattr(torch.ops.gradkernels, schema.name.split("::")[1]), schema.overload_name or "default")
        outcomes = [make_call(draw, schema, overload) for _ in range(calls)]
        served = sum(outcome is None for outcome in outcomes)
        assert 0 < served < calls, f"{schema.name}: {served} of {calls} calls returned a result"
    print(f"{len(schemas)} operators, gradkernels {gradkernels.__version__}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
