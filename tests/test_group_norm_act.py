"""group_norm_act, GroupNormAct and InstanceNormAct1d/2d/3d: values, gradients, running statistics, errors, torch's machinery.

Errors are counted as in test_batch_norm_act.py. A channel of fewer than 48 pixels has no kernel: torch computes it.
"""

import contextlib
import copy
import functools
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import DeterministicGuard

import batch_norm_act_calls
import gradkernels as gk
from accuracy import DTYPES, SIXTEEN_BITS, WIDE_DTYPES, assert_accurate, assert_bitwise_equal, outcome
from batch_norm_act_calls import (
    ACTS,
    HARD_INPUTS,
    MEMORY_FORMATS,
    NUMBERS,
    TWO_SLOPES,
    call,
    cast,
    exact_result,
    hard_input,
    judged,
    norm_act,
    without_kinks,
)
from gradkernels import _native, acts, reference
from gradkernels.group_norm_act import _instance_norm_act
from memory import bytes_kept_by, saved_by
from test_batch_norm_act import assert_same_bits, bits_of, compiled_backward, each_act, each_dtype, each_residual, each_use
from test_recompute import unpacked

OPS = torch.ops.gradkernels
INSTANCE_NORMS = {1: (gk.InstanceNormAct1d, nn.InstanceNorm1d), 2: (gk.InstanceNormAct2d, nn.InstanceNorm2d)}
INSTANCE_NORMS |= {3: (gk.InstanceNormAct3d, nn.InstanceNorm3d)}
arguments = functools.partial(batch_norm_act_calls.arguments, running=False)
OPERANDS = ("x", "weight", "bias", "residual", "grad_y")
# Shape, and numbers of groups: sets of one channel, of some and of all; samples of 7 x 7 pixels and of fewer, which go
# to torch; channels that are no multiple of 8, and whole slabs of them.
CASES = [
    *[((2, 6, 7, 7), groups) for groups in (1, 2, 6)],
    *[((1, 16, 8, 9), 4), ((3, 5, 7, 7), 5), ((2, 65, 51), 13), ((5, 24, 7, 8), 3), ((2, 3, 4, 4, 4), 3), ((2, 8, 3, 5, 7), 2)],
    *[((2, 6, 6, 7), 3), ((3, 4), 2), ((2, 40, 9, 11), 1), ((1, 1, 64), 1)],
]
WITH_KERNEL = [(shape, groups) for shape, groups in CASES if math.prod(shape[2:]) >= 48]
# Sets that are larger than a slab: cut into rows, into parts of a run or into columns. The last one has too many
# channels for a slab.
LARGE_CASES = [((1, 2, 300, 450), 1), ((1, 1, 600, 601), 1), ((2, 17, 90, 91), 17), ((1, 96, 30, 30), 3), ((1, 2056, 7, 7), 8)]
each_format = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
each_groups = pytest.mark.parametrize("groups", [1, 2, 6], ids="{} groups".format)


def in_format(given, channels_last):
    memory_format = MEMORY_FORMATS.get(given["x"].dim()) if channels_last else None
    if memory_format is None:
        return given
    moved = {name: given[name].contiguous(memory_format=memory_format) for name in ("x", "residual", "grad_y") if given[name] is not None}
    return given | moved


def assert_all_accurate(given, act, groups, eps=1e-5, most=math.inf):
    for name, (ours, theirs, exact, scale) in judged(given, True, act, 0.1, eps, groups).items():
        assert_accurate(name, ours, theirs, exact, per="tensor", scale=scale, most=most)


def results(library, given, act, groups):
    return call(norm_act(library, groups), given, True, act)


# values


@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_act
def test_value_and_gradients(act, dtype, channels_last):
    """Each second case has a residual."""
    # Long doubles take ten times as long, and in 16 bits torch's results are not rounded once.
    for i, (shape, groups) in enumerate(WITH_KERNEL[:6] if dtype != torch.float32 else CASES):
        parameters = torch.float32 if dtype == torch.float16 else dtype
        given = arguments(shape, parameters, residual=i % 2 == channels_last)
        given |= cast({name: given[name] for name in ("x", "residual", "grad_y")}, dtype)
        given = in_format(given, channels_last)
        assert_all_accurate(given, act, groups)


@each_format
# Not swish in 16 bits, whose gradient is rounded twice: docs/numerics.md.
@pytest.mark.parametrize("act,residual,dtype", [("leaky_relu", True, torch.bfloat16), ("swish", False, torch.float32)])
@pytest.mark.parametrize("shape,groups", LARGE_CASES, ids=str)
def test_large_sets(shape, groups, act, residual, dtype, channels_last):
    assert_all_accurate(in_format(arguments(shape, dtype, residual=residual), channels_last), act, groups)


@pytest.mark.parametrize("inputs", HARD_INPUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_format
def test_statistics_of_hard_inputs(channels_last, dtype, inputs):
    x = hard_input(inputs, (2, 4, 31, 33), dtype, channels_last)
    if not x.isfinite().all():
        pytest.skip(f"{inputs} overflows in {dtype}")
    given = arguments(x.shape, dtype if dtype in WIDE_DTYPES else torch.float32, x=x)
    for groups in (1, 2, 4):
        assert_all_accurate(given | {"grad_y": given["grad_y"].to(dtype)}, "leaky_relu", groups, most=16.0)


@each_dtype
def test_reference_in_float64_is_exact(dtype):
    """accuracy.py's formulas and gradkernels.reference agree within the rounding errors of float64 sums."""
    for act, (shape, groups) in itertools.product(ACTS, CASES[:4]):
        given = without_kinks(cast(arguments(shape, dtype, residual=True), torch.float64), True, act, num_groups=groups)
        exact = exact_result(given, True, act, num_groups=groups)
        for name, tensor in bits_of(results(reference, given, act, groups)).items():
            assert_close(tensor, torch.tensor(exact[name].astype(np.float64)), rtol=1e-12, atol=1e-12)


@each_format
@pytest.mark.parametrize("left_out", ["weight", "bias", "weight bias"])
def test_operands_left_out(left_out, channels_last):
    for act, (shape, groups) in itertools.product(("relu", "swish"), WITH_KERNEL):
        whole = in_format(arguments(shape, torch.float64, residual=True), channels_last)
        neutral = {name: torch.full_like(whole[name], name == "weight") for name in left_out.split()}
        whole = without_kinks(whole | neutral, True, act, num_groups=groups)
        # torch's own gradient fails with a bias and no weight.
        ours = bits_of(results(gk, whole | dict.fromkeys(neutral), act, groups))
        expected = results(reference, whole, act, groups)
        assert_close(ours, {name: expected[name] for name in ours}, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.6, 1])
def test_eps(eps):
    assert_all_accurate(arguments((2, 6, 7, 7)), "leaky_relu", 3, eps=eps)


@pytest.mark.parametrize("param", [0.0, -0.5, 1.5, None])
@pytest.mark.parametrize("act", [name for name, act in acts.ACTS.items() if act.param])
def test_other_parameters(act, param):
    for residual in (False, True):
        given = without_kinks(arguments((2, 6, 7, 7), residual=residual), True, "relu", num_groups=2)
        ours, theirs = (call(norm_act(library, 2), given, True, act, act_param=param) for library in (gk, reference))
        assert_close(bits_of(ours), bits_of(theirs), rtol=1e-5, atol=1e-5)


def kinds(tensor):
    """0 for a number, 1 for inf, 2 for -inf, 3 for nan."""
    return (tensor == math.inf) + 2 * (tensor == -math.inf) + 3 * tensor.isnan()


@pytest.mark.parametrize("groups,channels_last", [(1, True), (2, False), (6, True)])
@each_act
def test_special_values(act, groups, channels_last):
    """In each operand and place nan and inf appear and spread as in torch or as in exact arithmetic, and not to another sample."""
    shape = (3, 6, 7, 8)
    clean = without_kinks(in_format(arguments(shape, residual=True), channels_last), True, act, num_groups=groups)
    expected = results(gk, clean, act, groups)
    places = {"x": (1, 0, 0, 0), "residual": (1, 2, 3, 4), "grad_y": (1, 5, 6, 7), "weight": (0,), "bias": (5,)}
    info = torch.finfo(torch.float32)
    values = (math.nan, math.inf, -math.inf, 0.0, -0.0, info.smallest_normal / 32, info.max, -info.max)
    for (name, place), value in itertools.product(places.items(), values):
        here = clean | {name: clean[name].clone()}
        here[name][place] = value
        ours, theirs = (results(library, here, act, groups) for library in (gk, reference))
        with np.errstate(all="ignore"):
            exact = exact_result(cast(here, torch.float64), True, act, num_groups=groups)
        for what, actual in bits_of(ours).items():
            text = f"{what} where {name} is {value}"
            if actual.dim() > 1 and len(place) > 1:
                assert_bitwise_equal(text, actual[::2], expected[what][::2])
            # At a nan, torch's gradients of these are 0, nan or grad_y, depending on the place of the element.
            if what.startswith("grad") and act in ("relu6", "elu", "hardswish") and theirs["y"].isnan().any():
                continue
            same = (kinds(actual) == kinds(theirs[what])) | (kinds(actual) == kinds(torch.from_numpy(exact[what].astype(np.float64))))
            if name == "weight":
                # A factor of sums here, and of their terms in torch, which may be inf - inf.
                same |= ~actual.isfinite() & ~theirs[what].isfinite()
            assert same.all(), f"{text}: {actual[~same][:3]}, torch has {theirs[what][~same][:3]}, exact {exact[what][~same.numpy()][:3]}"


@pytest.mark.parametrize("act", ["leaky_relu", "swish"])
@pytest.mark.parametrize("shape,groups", [*LARGE_CASES, ((9, 64, 16, 16), 8), ((2, 64, 40, 40), 64)], ids=str)
def test_same_bits_for_any_number_of_threads(shape, groups, act, each_thread_count):
    for channels_last in (False, True):
        given = in_format(arguments(shape, residual=True), channels_last)
        one, *others = each_thread_count(lambda given=given: results(gk, given, act, groups), counts=(1, 2, 5, 2))
        for other in others:
            assert_same_bits(other, one)


# layouts


LAYOUTS = {
    "every second column": lambda: torch.randn(2, 6, 7, 16)[..., ::2],
    "transposed rows": lambda: torch.randn(2, 6, 8, 7).transpose(2, 3),
    "expanded": lambda: torch.randn(2, 6, 7, 1).expand(2, 6, 7, 8),
    "one sample": lambda: torch.randn(1, 6, 7, 8).expand(2, 6, 7, 8),
    "offset": lambda: torch.randn(2 * 6 * 7 * 8 + 3)[3:].view(2, 6, 7, 8),
    "cut out channels": lambda: torch.randn(2, 9, 7, 8)[:, 2:8],
    "reversed": lambda: torch.randn(8, 7, 6, 2).permute(3, 2, 1, 0),
}


@each_groups
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, groups):
    strange = LAYOUTS[layout]()
    for name, channels_last in itertools.product(("x", "residual", "grad_y"), (False, True)):
        given = in_format(arguments((2, 6, 7, 8), residual=True), channels_last) | {name: strange}
        for act in ("leaky_relu", "elu"):
            assert_all_accurate(given, act, groups)
    given = arguments((2, 6, 7, 8), x=strange, residual=True)
    assert_all_accurate(given | {"residual": strange}, "relu", groups)
    y, theirs = (results(library, given, "elu", groups)["y"] for library in (gk, reference))
    assert y.stride() == theirs.stride()


@each_groups
def test_gaps_and_the_negative_bit(groups):
    """Elements between those of a parameter are nan, and are not read. The imaginary part of a conjugate is negated."""
    given = arguments((2, 6, 7, 8), residual=True)
    expected = results(gk, given, "elu", groups)
    strange = {name: torch._neg_view(-given[name]) for name in OPERANDS}
    gapped = {name: torch.stack([given[name], *[torch.full_like(given[name], math.nan)] * 2], -1)[..., 0] for name in OPERANDS}
    for name, each in (*strange.items(), *gapped.items()):
        assert_close(bits_of(results(gk, given | {name: each}, "elu", groups)), bits_of(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 7, 7), (2, 6, 0), (2, 6, 0, 4), (2, 0, 7, 7)], ids=str)
def test_no_elements(shape):
    given = arguments(shape, residual=True)
    ours, theirs = (outcome(results, library, given, "leaky_relu", 2) for library in (gk, reference))
    assert_close(bits_of(ours), bits_of(theirs), rtol=0, atol=0, equal_nan=True)


# errors


X = torch.randn(2, 6, 7, 8)
# name -> arguments that torch refuses too
REFUSED = {
    **{f"num_groups {groups!r}": (X, groups) for groups in (0, -1, -2, 4, 2**40, 2**64, True, 2.0, "2", None, [2])},
    "no dimensions": (torch.tensor(1.0), 1),
    "one dimension": (X[:, 0, 0, 0], 1),
    "one element to a group": (torch.randn(1, 6, 1, 1), 6),
    "one element to a group that does not divide": (torch.randn(1, 3), 2),
    **{str(dtype): (X.to(dtype), 2) for dtype in (torch.int64, torch.bool, torch.complex64)},
    "no tensor": ([1.0, 2.0], 1),
    "sparse": (X.to_sparse(), 2),
    "channels of weight": (X, 2, torch.ones(5)),
    "dimensions of weight": (X, 2, torch.ones(6, 1)),
    "channels of bias": (X, 2, None, torch.ones(5)),
    "weight on meta": (X, 2, torch.ones(6, device="meta")),
    "weight of float64": (X, 2, torch.ones(6, dtype=torch.float64)),
    "bias of float64": (X, 2, None, torch.ones(6, dtype=torch.float64)),
    "weight of float16": (X, 2, torch.ones(6).half(), torch.ones(6).half()),
    "weight of float64 and x of bfloat16": (X.bfloat16(), 2, torch.ones(6, dtype=torch.float64)),
    "weight of two dtypes": (X.bfloat16(), 2, torch.ones(6).bfloat16(), torch.ones(6)),
    "weight that is no tensor": (X, 2, 1.0),
    "eps of a string": (X, 2, None, None, "a"),
    "eps of None": (X, 2, None, None, None),
}


@pytest.mark.parametrize("library", ["native", "reference"])
@pytest.mark.parametrize("name", REFUSED)
def test_errors_are_torchs(name, library, monkeypatch):
    if library == "reference":
        monkeypatch.setattr(_native, "C", None)
    expected = outcome(F.group_norm, *REFUSED[name])
    assert isinstance(expected[0], type), "torch accepts this call"
    assert outcome(gk.group_norm_act, *REFUSED[name]) == expected


def test_num_groups_that_torch_accepts():
    expected = gk.group_norm_act(X, 2)
    for groups in (torch.tensor(2), np.int64(2)):
        assert_close(gk.group_norm_act(X, groups), expected)


@pytest.mark.parametrize("library", ["native", "reference"])
def test_errors_of_act_and_residual(library, monkeypatch):
    if library == "reference":
        monkeypatch.setattr(_native, "C", None)
    of_residual = (RuntimeError, "residual must have the shape, dtype and device of x")
    for options, (kind, words) in (
        ({"act": "selu"}, (ValueError, "selu")),
        ({"act": "relu", "act_param": 0.3}, (ValueError, "'relu', which has no parameter")),
        ({"act_param": "0.3"}, (TypeError, "not str")),
        ({"residual": X[:1]}, of_residual),
        ({"residual": X.double()}, of_residual),
        ({"residual": X.to("meta")}, of_residual),
        ({"residual": 1.0}, (TypeError, "residual must be Tensor, not float")),
    ):
        calls = [lambda options=options: gk.group_norm_act(X, 2, **options)]
        if "residual" in options:
            modules = gk.GroupNormAct(2, 6), gk.InstanceNormAct2d(6), gk.InstanceNormAct2d(6, track_running_stats=True).eval()
            calls += [lambda module=module, residual=options["residual"]: module(X, residual) for module in modules]
            one = options["residual"][0, 1:] if isinstance(options["residual"], torch.Tensor) else 1.0
            calls.append(lambda one=one: gk.InstanceNormAct2d(6)(X[0], one))
        else:
            calls += [lambda options=options: gk.GroupNormAct(2, 6, **options), lambda options=options: gk.InstanceNormAct1d(6, **options)]
        for each in calls:
            came = outcome(each)
            assert came[0] is kind and words in came[1], came


X_OF_INSTANCES = {
    "other channels": torch.randn(4, 5, 8, 8),
    "other channels without a batch": torch.randn(5, 8, 8),
    **{f"{len(shape)} dimensions": torch.randn(shape) for shape in ((), (3,), (4, 3), (4, 3, 2, 2, 2))},
    "one pixel": torch.randn(4, 3, 1, 1),
    "one pixel without a batch": torch.randn(3, 1, 1),
    "no pixels": torch.randn(4, 3, 0, 8),
    **{str(dtype): (torch.randn(4, 3, 8, 8) * 4).to(dtype) for dtype in (torch.int64, torch.complex64, torch.float64, *SIXTEEN_BITS)},
    "no tensor": [1.0],
}


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("name", X_OF_INSTANCES)
def test_errors_and_warnings_of_instance_norm_are_torchs(name, recwarn):
    """An error leaves the running statistics as they are."""
    for affine, track, training in itertools.product((False, True), repeat=3):
        options = {"affine": affine, "track_running_stats": track}
        came = []
        for module in (gk.InstanceNormAct2d(3, act="identity", **options), nn.InstanceNorm2d(3, **options)):
            recwarn.clear()
            y = outcome(module.train(training), X_OF_INSTANCES[name])
            warned = [(each.category, str(each.message)) for each in recwarn.list]
            came.append((*((y.shape, y.dtype) if isinstance(y, torch.Tensor) else y), warned))
            if not isinstance(y, torch.Tensor):
                assert_close(module.state_dict(), nn.InstanceNorm2d(3, **options).state_dict(), rtol=0, atol=0)
        assert came[0] == came[1], options


# modules


def modules():
    """name -> ours, torch's, x"""
    made = {}
    for affine in (True, False):
        pair = (functools.partial(gk.GroupNormAct, 2, 6, affine=affine), functools.partial(nn.GroupNorm, 2, 6, affine=affine))
        made[f"GroupNorm, affine={affine}"] = *pair, torch.randn(2, 6, 7, 8)
        for dim, track in itertools.product(INSTANCE_NORMS, (False, True)):
            options = {"affine": affine, "track_running_stats": track}
            pair = (functools.partial(each, 6, **options) for each in INSTANCE_NORMS[dim])
            made[f"InstanceNorm{dim}d, {options}"] = *pair, torch.randn(3, 6, 8, 9, 2)[(..., *[0] * (3 - dim))].contiguous() * 2 + 1
    return made


each_module = pytest.mark.parametrize("name", modules())


@pytest.mark.parametrize("library", ["native", "reference"])
@each_module
def test_module_is_torchs_module_then_act(name, library, monkeypatch):
    """With and without a batch, in training and then in evaluation, for three steps."""
    if library == "reference":
        monkeypatch.setattr(_native, "C", None)
    make, make_torchs, x = modules()[name]
    for act in ("identity", "relu", "leaky_relu", "swish"):
        record = acts.ACTS[act]
        torch_act = record.module(record.default, next(iter(record.modules)))
        options = {"momentum": None if act == "relu" else 0.3} if name.endswith("True}") else {}
        module, torchs = make(act=act, **options), make_torchs(**options)
        assert isinstance(module, type(torchs))
        for step, training in ((1, True), (2, True), (3, False)):
            for each in (x + step, *([(x + step)[0]] if "Instance" in name else [])):
                module.train(training), torchs.train(training)
                residual = torch.randn_like(each)
                assert_close(module(each), torch_act(torchs(each)), rtol=1e-4, atol=1e-5)
                assert_close(module(each, residual=residual), torch_act(torchs(each) + residual), rtol=1e-4, atol=1e-5)
                assert_close(module.state_dict(), torchs.state_dict())


@each_module
def test_state_dict_both_ways_and_copies(name):
    make, make_torchs, x = modules()[name]
    module, torchs = make(act=nn.ELU(1.3)), make_torchs()
    module(x)
    assert list(module.state_dict()) == list(torchs.state_dict())
    assert module.state_dict()._metadata == torchs.state_dict()._metadata
    torchs.load_state_dict(module.state_dict())
    assert_close(torchs.state_dict(), module.state_dict(), rtol=0, atol=0)
    torchs(x + 1)
    module.load_state_dict(torchs.state_dict())
    assert_close(torchs.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert repr(module).endswith(", act='elu', act_param=1.3)")
    # torch 2.11 does not print the bias.
    assert repr(module).partition("(")[2].startswith(repr(torchs).partition("(")[2].partition(", bias")[0].rstrip(")"))
    expected = module.eval()(x)
    for each in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_bitwise_equal("y", each(x), expected)
        assert repr(each) == repr(module)
    traced = torch.fx.symbolic_trace(nn.Sequential(module))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert_bitwise_equal("y of the trace", traced(x), expected)
    assert make(device="meta")(x.to("meta")).is_meta
    with pytest.raises(RuntimeError, match=f"^{type(module).__name__} is computed by gradkernels, which torch.jit.script cannot compile"):
        torch.jit.script(module)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_statistics_of_instances(dtype, momentum):
    """Those of float64, also of instances that are constant or far from 0."""
    parameters = dtype if dtype == torch.float64 else torch.float32
    x = (torch.randn(4, 3, 9, 9) * 2 + 30).to(dtype)
    x[:, 1] = 3.7
    module = gk.InstanceNormAct2d(3, momentum=momentum, track_running_stats=True, dtype=parameters)
    torchs = nn.InstanceNorm2d(3, momentum=momentum, track_running_stats=True, dtype=torch.float64)
    for step in range(3):
        module(x * (step + 1)), torchs((x * (step + 1)).double())
    for name, each in module.named_buffers():
        if name.startswith("running"):
            # torch's sums are float64 too.
            tolerance = 1e-13 if dtype == torch.float64 else 5e-7
            assert_close(each.double(), getattr(torchs, name), rtol=tolerance, atol=tolerance)


def test_options_of_the_modules():
    x = torch.randn(2, 6, 7, 8)
    for make, torchs in ((gk.GroupNormAct, nn.GroupNorm(2, 6)), (gk.InstanceNormAct2d, nn.InstanceNorm2d(6, affine=True))):
        operands = (2, 6) if make is gk.GroupNormAct else (6,)
        without_bias = make(*operands, affine=True, bias=False, act="identity")
        assert without_bias.bias is None and list(without_bias.state_dict()) == ["weight"] and "bias=False" in repr(without_bias)
        assert_close(without_bias(x), torchs(x))
        wide = make(*operands, eps=1e-3, affine=True, dtype=torch.float64)
        assert wide.weight.dtype == wide(x.double()).dtype == torch.float64 and wide.eps == 1e-3
        wide.act = "relu"
        assert_bitwise_equal("y", wide(x.double()), make(*operands, eps=1e-3, affine=True, dtype=torch.float64, act="relu")(x.double()))
        for wrong, kind in ((nn.PReLU(), TypeError), ("selu", ValueError)):
            with pytest.raises(kind, match="act"):
                make(*operands, act=wrong)
    assert outcome(gk.GroupNormAct, 4, 6) == outcome(nn.GroupNorm, 4, 6)


def test_state_of_a_module_that_does_not_track_is_refused_as_in_torch():
    state = nn.InstanceNorm2d(3, track_running_stats=True).state_dict()
    ours, theirs = (pytest.raises(RuntimeError) for _ in range(2))
    with ours:
        gk.InstanceNormAct2d(3).load_state_dict(state)
    with theirs:
        nn.InstanceNorm2d(3).load_state_dict(state)
    assert str(ours.excinfo.value) == str(theirs.excinfo.value).replace("InstanceNorm2d", "InstanceNormAct2d")


# torch's own samples


def sampled(name, device, dtype):
    """Samples of an operator, also with rows of 49 pixels, which have a kernel, and not contiguous."""
    samples = list(next(op for op in op_db if op.name == name).sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) >= 6
    for sample in samples:
        yield sample
        yield sample.noncontiguous()
        if sample.input.dim() > 2 and name != "nn.functional.layer_norm":
            wide = copy.copy(sample)
            wide.input = torch.randn(*sample.input.shape[:-1], 49, dtype=dtype)
            yield wide


def of_layer(function, x, shape, weight=None, bias=None, eps=1e-5):
    """layer_norm: each row is a sample of one group, and each of its elements a channel."""
    flat = (None if each is None else each.flatten() for each in (weight, bias))
    return function(x.reshape(-1, math.prod(shape)), 1, *flat, eps).view(x.shape)


def instance_norm_act(
    x,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
    *,
    act,
    act_param,
    residual,
):
    """The function of InstanceNormAct with the arguments of torch's."""
    operands = x, running_mean, running_var, weight, bias, residual
    return _instance_norm_act(*operands, use_input_stats, momentum, eps, act, act_param)


# torch's operator -> ours
SAMPLED = {"nn.functional.group_norm": gk.group_norm_act, "nn.functional.instance_norm": instance_norm_act}


@each_dtype
@each_use
@pytest.mark.parametrize("name", SAMPLED)
def test_op_db_samples(name, act, residual, dtype, device):
    torchs_function = getattr(F, name.rpartition(".")[2])

    def ours(x, *args, residual, **kwargs):
        return SAMPLED[name](x, *args, **kwargs, act=act, act_param=ACTS[act], residual=residual)

    def torchs(x, *args, residual, **kwargs):
        z = torchs_function(x, *args, **kwargs)
        return acts.ACTS[act].function(z if residual is None else z + residual, ACTS[act])

    for sample in sampled(name, device, dtype):
        added = torch.randn_like(sample.input) if residual else None
        came = []
        for function in (ours, torchs):
            kwargs = {key: each.detach().clone() if isinstance(each, torch.Tensor) else each for key, each in sample.kwargs.items()}
            leaves = [sample.input.detach().clone(memory_format=torch.preserve_format).requires_grad_()]
            leaves += [kwargs[key].requires_grad_() for key in ("weight", "bias") if kwargs.get(key) is not None]
            leaves += [added.clone().requires_grad_()] if residual else []

            def run(function=function, leaves=leaves, kwargs=kwargs, sample=sample):
                y = function(leaves[0], *sample.args, **kwargs, residual=leaves[-1] if residual else None)
                grads = torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape))
                return y.detach(), *grads, *(kwargs[key] for key in kwargs if key.startswith("running"))

            came.append(outcome(run))
        if isinstance(came[1][0], type):
            assert came[0] == came[1]
        else:
            assert_close(came[0], came[1], equal_nan=True, msg=lambda text, sample=sample: f"{sample}: {text}")


@each_dtype
def test_op_db_samples_of_layer_norm_as_one_group(dtype, device):
    for sample in sampled("nn.functional.layer_norm", device, dtype):
        if sample.input.numel() in (0, 1):
            continue
        leaves = [each.detach().requires_grad_() for each in (sample.input, *sample.args[1:])]
        came = []
        for layer_norm in (functools.partial(of_layer, functools.partial(gk.group_norm_act, act="identity")), F.layer_norm):
            y = layer_norm(leaves[0], sample.args[0], *leaves[1:], **sample.kwargs)
            came.append((y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape))))
        assert_close(came[0], came[1], equal_nan=True)


@pytest.mark.parametrize("name", [*SAMPLED, "nn.functional.layer_norm"])
def test_op_db_error_inputs(name, device):
    op = next(op for op in op_db if op.name == name)
    assert (op.error_inputs_func is not None) == (name == "nn.functional.group_norm"), "torch has error inputs that are not run here"
    for each in op.error_inputs(device) if op.error_inputs_func else []:
        call_of = each.sample_input.input, *each.sample_input.args
        expected = outcome(F.group_norm, *call_of, **each.sample_input.kwargs)
        assert expected[0] is each.error_type
        assert outcome(gk.group_norm_act, *call_of, **each.sample_input.kwargs) == expected


@each_dtype
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@each_use
@pytest.mark.parametrize("name", ["GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"])
def test_module_db_inputs(name, act, residual, training, dtype, device):
    torch_class, module_class = getattr(nn, name), getattr(gk, name.replace("Norm", "NormAct"))
    info = next(info for info in module_db if info.module_cls is torch_class)
    options = {"device": device, "dtype": dtype, "requires_grad": True, "training": training}
    inputs = info.module_inputs_func(info, **options)
    assert len(inputs) >= 6
    for each in inputs:
        constructor, (given,) = each.constructor_input, each.forward_input.args
        # The samples of InstanceNorm are of 15 and 36 pixels, which have no kernel.
        for x in (given, *([torch.randn(*given.shape[:-1], 49, dtype=dtype)] if given.dim() > 2 or "Instance" in name else [])):
            for memory_format in (torch.contiguous_format, *([MEMORY_FORMATS[x.dim()]] if x.dim() in MEMORY_FORMATS else [])):
                module = module_class(*constructor.args, **constructor.kwargs, dtype=dtype, act=act, act_param=ACTS[act]).train(training)
                torchs = torch_class(*constructor.args, **constructor.kwargs, dtype=dtype).train(training)
                added = torch.randn_like(x)
                came = []
                for cls in (module, torchs):
                    leaves = [
                        tensor.detach().clone().contiguous(memory_format=memory_format).requires_grad_()
                        for tensor in (x, added)[: 1 + residual]
                    ]
                    if cls is module:
                        y = cls(*leaves)
                    else:
                        y = acts.ACTS[act].function(cls(leaves[0]) + leaves[1] if residual else cls(leaves[0]), ACTS[act])
                    y.backward(torch.linspace(-1, 1, x.numel(), dtype=dtype).view(x.shape))
                    came.append((y, [leaf.grad for leaf in leaves], [param.grad for param in cls.parameters()], cls.state_dict()))
                tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
                assert_close(came[0], came[1], **tolerance, msg=lambda text, each=each: f"{each.desc}: {text}")
    for each in info.module_error_inputs_func(info, **options) if info.module_error_inputs_func else []:
        with pytest.raises(each.error_type, match=each.error_regex):
            constructor = each.module_error_input.constructor_input
            module_class(*constructor.args, **constructor.kwargs)(*each.module_error_input.forward_input.args)


# memory


@each_residual
@each_act
def test_bytes_kept_for_backward(act, residual):
    """x, mean and invstd.

    With a residual also the residual or, for two slopes, a mask: a bit for each element.
    """
    for shape, groups in (((4, 8, 6, 8), 2), ((4, 8, 16, 24), 8), ((3, 5, 99), 1)):
        for channels_last in (False, True):
            given = in_format(arguments(shape, residual=True), channels_last)
            module = gk.GroupNormAct(groups, shape[1], act=act)
            x, z = given["x"].requires_grad_(), given["residual"].requires_grad_() if residual else None
            y, saved = saved_by(lambda module=module, x=x, z=z: module(x, z))
            owned = {tensor.data_ptr() for tensor in (x, z, y, module.weight, module.bias) if tensor is not None}
            extra = [tensor for tensor in saved if tensor.numel() and tensor.data_ptr() not in owned]
            masks = [tensor for tensor in extra if tensor.dtype == torch.uint8]
            assert sum(tensor.nbytes for tensor in extra if tensor.dtype != torch.uint8) == 2 * 8 * shape[0] * groups
            assert len(masks) == (residual and act in TWO_SLOPES)
            for mask in masks:
                assert math.ceil(x.numel() / 8) <= mask.numel() <= math.ceil(x.numel() / 8) + shape[0] * shape[1]
            kept = {tensor.data_ptr() for tensor in saved}
            assert z is None or (z.data_ptr() in kept) == (acts.ACTS[act].saves == "value")


@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recomputed_bits(dtype, channels_last):
    for (shape, groups), act in itertools.product(WITH_KERNEL[1::2], ("identity", "relu", "swish")):
        given = in_format(arguments(shape, dtype, residual=True), channels_last)
        given["residual"][0, 0, ..., -4:] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
        with gk.recompute():
            y = gk.group_norm_act(given["x"].requires_grad_(), groups, given["weight"], act=act, residual=given["residual"])
            found = unpacked(y)
        assert found.data_ptr() != y.data_ptr() and found.stride() == y.stride()
        assert_bitwise_equal(f"{shape} {groups} {act}", found.detach(), y.detach())


def test_recompute_keeps_less_and_changes_no_gradient():
    given = arguments((2, 6, 7, 8))
    x, weight, bias = (given[name].requires_grad_() for name in OPERANDS[:3])

    def forward(context):
        with context:
            return F.conv2d(gk.group_norm_act(x, 3, weight, bias, act="swish"), torch.ones(1, 6, 1, 1, requires_grad=True))

    nothing, operands = contextlib.nullcontext(), (x, weight, bias)
    assert bytes_kept_by(lambda: forward(gk.recompute())) <= bytes_kept_by(lambda: forward(nothing)) - 0.9 * x.nbytes
    for one, other in zip(*(torch.autograd.grad(forward(each).sum(), operands) for each in (nothing, gk.recompute())), strict=True):
        assert_bitwise_equal("gradient", one, other)


def test_nothing_is_kept_without_grad():
    with torch.no_grad():
        assert saved_by(lambda: gk.group_norm_act(X.clone().requires_grad_(), 2))[1] == []
    assert saved_by(lambda: gk.group_norm_act(X, 2))[1] == []


@each_groups
@each_residual
def test_frozen_operands_get_no_gradient(residual, groups):
    given = arguments((2, 6, 7, 8), residual=residual)
    full = results(gk, given, "relu6", groups)
    names = [name for name in OPERANDS[:4] if given[name] is not None]
    for chosen in range(1, 2 ** len(names)):
        leaves = {name: given[name].clone().requires_grad_(bool(chosen >> i & 1)) for i, name in enumerate(names)}
        y = gk.group_norm_act(leaves["x"], groups, leaves["weight"], leaves["bias"], act="relu6", residual=leaves.get("residual"))
        y.backward(given["grad_y"])
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                assert_bitwise_equal(f"grad_{name} of {chosen}", leaf.grad, full[f"grad_{name}"])
            else:
                assert leaf.grad is None


# derivatives


def differentiable(act, *, shape=(1, 4, 7, 7), groups=2, residual=True, channels_last=False):
    """A function of x, weight, bias and residual, and inputs for it that stay off the kinks."""
    given = in_format(without_kinks(arguments(shape, torch.float64, residual=residual), True, act, num_groups=groups), channels_last)
    # Not near a kink, as grad_y says; the others are left out of the function's result.
    counts = given["grad_y"] != 0

    def function(x, weight, bias, residual=None):
        y = gk.group_norm_act(x, groups, weight, bias, act=act, act_param=ACTS[act], residual=residual)
        return y * counts

    return function, tuple(given[name].requires_grad_() for name in OPERANDS[: 3 + residual])


@each_format
@each_residual
@each_act
def test_gradcheck(act, residual, channels_last):
    for groups in (1, 2):
        function, inputs = differentiable(act, residual=residual, groups=groups, channels_last=channels_last)
        assert gradcheck(function, inputs, fast_mode=True, check_batched_grad=True)
        assert gradgradcheck(function, inputs, fast_mode=True)


@each_act
def test_gradcheck_of_forward_mode(act):
    function, inputs = differentiable(act)
    assert gradcheck(function, inputs, fast_mode=True, check_forward_ad=True, check_backward_ad=False)


@each_act
@pytest.mark.parametrize("relation", ["apart", "the same tensor", "x of residual", "residual of x"])
def test_second_derivatives_are_torchs(relation, act):
    given = arguments((2, 4, 7, 7), torch.float64, residual=True)
    came = []
    for library in (gk, reference):
        leaf, grad_y, weight, bias, other = (given[name].clone().requires_grad_() for name in ("x", "grad_y", "weight", "bias", "residual"))
        pairs = {
            "apart": (leaf, other),
            "the same tensor": (leaf, leaf),
            "x of residual": (leaf.sin(), leaf),
            "residual of x": (leaf, leaf.sin()),
        }
        x, residual = pairs[relation]
        y = library.group_norm_act(x, 2, weight, bias, act=act, residual=residual)
        leaves = leaf, weight, bias
        grads = torch.autograd.grad(y, leaves, grad_y, create_graph=True)
        loss = sum(grad.square().sum() for grad in grads)
        came.append((grads, torch.autograd.grad(loss, (*leaves, grad_y, other), allow_unused=True, materialize_grads=True)))
    assert_close(came[0], came[1])


# every way torch calls an operator


def opcheck_samples():
    for requires_grad, act, residual, channels_last, shape, dtype in (
        (True, "relu6", True, True, (2, 6, 7, 7), torch.float64),
        (True, "swish", True, False, (1, 6, 4, 4, 4), torch.float32),
        (True, "identity", False, False, (3, 6), torch.float64),
        (False, "leaky_relu", True, False, (2, 6, 7, 7), torch.float32),
    ):
        given = in_format(arguments(shape, dtype, residual=residual), channels_last)
        for name in OPERANDS[: 3 + residual]:
            given[name] = given[name].requires_grad_(requires_grad)
        yield given["x"], 3, given["weight"], given["bias"], given["residual"], 1e-5, act, NUMBERS[act]
    yield X.transpose(2, 3).requires_grad_(), 6, None, None, X.transpose(2, 3), 0.0, "identity", 0.0


def test_opcheck():
    for args in opcheck_samples():
        opcheck(OPS.group_norm_act.default, args)


@pytest.mark.parametrize("act,residual,channels_last", [("relu", True, True), ("relu", True, False), ("swish", False, True)])
def test_opcheck_of_the_other_operators(act, residual, channels_last):
    given = in_format(arguments((2, 6, 7, 8), residual=residual), channels_last)
    x, weight, bias, added, grad_y = (given[name] for name in OPERANDS)
    y, mean, invstd, mask = OPS.group_norm_act(x, 3, weight, bias, added, 1e-5, act, 0.0)
    of_mask = mask if mask.numel() else None
    backward = (grad_y, x, mean, invstd, 3, weight, bias, added, of_mask, act, 0.0, [True, True, True, residual])
    opcheck(OPS.group_norm_act_backward.default, backward)
    forward = (x, mean, invstd, 3, weight, bias, added, act, 0.0)
    opcheck(OPS.group_norm_act_elemt.default, forward)
    assert_bitwise_equal("y", OPS.group_norm_act_elemt(*forward)[0], y)
    assert_bitwise_equal("mask", OPS.group_norm_act_elemt(*forward)[1], mask)
    # create_graph=True takes another path; differentiating these operators by themselves is an error.
    for operator, args in ((OPS.group_norm_act_backward, backward), (OPS.group_norm_act_elemt, forward)):
        with pytest.raises(RuntimeError, match="not implemented"):
            operator(args[0].clone().requires_grad_(), *args[1:])[0].sum().backward()


class Block(nn.Module):
    """Each module, with the input added."""

    def __init__(self):
        super().__init__()
        self.group = gk.GroupNormAct(2, 6, act="elu")
        self.instance = gk.InstanceNormAct2d(6, affine=True, act="relu")
        self.tracking = gk.InstanceNormAct2d(6, track_running_stats=True, act="swish")

    def forward(self, x):
        return self.tracking(self.instance(self.group(x), x), x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compile(training):
    torch._dynamo.reset()
    eager = Block().train(training)
    block = copy.deepcopy(eager)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    came = []
    for each in (compiled, eager):
        leaf = X.clone().requires_grad_()
        y = each(leaf)
        y.square().sum().backward()
        came.append((y, leaf.grad))
    came[0] += (block.state_dict(), [parameter.grad for parameter in block.parameters()])
    came[1] += (eager.state_dict(), [parameter.grad for parameter in eager.parameters()])
    assert_close(came[0], came[1], rtol=1e-4, atol=1e-4)


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    module = gk.GroupNormAct(2, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 6, 7, 8), (3, 6, 9, 10), (2, 6, 3, 3)):
        x = torch.randn(shape)
        assert_close(compiled(x), module(x))


@pytest.mark.slow
@each_residual
def test_compiled_autograd(residual):
    given = arguments((2, 6, 7, 8), residual=residual)
    leaves = [given[name].requires_grad_() for name in OPERANDS[: 3 + residual]]
    torch._dynamo.reset()

    def loss():
        operands = (given["x"], 2, given["weight"], given["bias"])
        return sum(gk.group_norm_act(*operands, act=act, residual=given["residual"]).square().sum() for act in ("relu", "swish"))

    for wanted in (leaves, leaves[1:2], leaves[-1:]):
        expected = torch.autograd.grad(loss(), wanted)
        with compiled_backward():
            actual = torch.autograd.grad(loss(), wanted)
        for one, other in zip(actual, expected, strict=True):
            assert_bitwise_equal("gradient", one, other)


@pytest.mark.filterwarnings("error::UserWarning")
def test_functorch():
    given = arguments((2, 6, 7, 8), residual=True)
    x, weight, bias, residual, grad_y = (given[name] for name in OPERANDS)
    batches = torch.stack([x, grad_y])

    def of(library):
        return lambda x, weight, bias: library.group_norm_act(x, 3, weight, bias, act="elu", residual=residual)

    def loss(function):
        return lambda *operands: function(*operands).square().sum()

    for name, transform in {
        "grad": lambda f: torch.func.grad(loss(f), argnums=(0, 1, 2))(x, weight, bias),
        "jvp": lambda f: torch.func.jvp(f, (x, weight, bias), (grad_y, bias, weight)),
        "vjp": lambda f: torch.func.vjp(f, x, weight, bias)[1](grad_y),
        "vmap": lambda f: torch.func.vmap(f, in_dims=(0, None, None))(batches, weight, bias),
        "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(loss(f)), in_dims=(0, None, None))(batches, weight, bias),
        "hessian": lambda f: torch.func.hessian(loss(f), argnums=1)(x, weight, bias),
    }.items():
        assert_close(transform(of(gk)), transform(of(reference)), rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_per_sample_gradients():
    came = []
    for module in (gk.GroupNormAct(2, 6, act="identity"), nn.GroupNorm(2, 6)):

        def loss(params, sample, module=module):
            return torch.func.functional_call(module, params, (sample[None],)).square().mul(X[0]).sum()

        came.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(module.named_parameters()), X))
    assert_close(came[0], came[1], rtol=1e-4, atol=1e-4)


def test_forward_ad():
    given = arguments((2, 6, 7, 8), residual=True)
    came = []
    for library in (gk, reference):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(given["x"], given["grad_y"])
            y = library.group_norm_act(x, 2, given["weight"], given["bias"], act="swish", residual=given["residual"])
            came.append(tuple(forward_ad.unpack_dual(y)))
    assert_close(came[0], came[1])


@pytest.mark.parametrize("decompose,training", [(False, True), (True, False)], ids=["training", "evaluation, decomposed"])
def test_export(decompose, training):
    block = Block().train(training)
    eager = copy.deepcopy(block)
    exported = torch.export.export(block, (torch.randn(4, 6, 7, 8),), dynamic_shapes=[{0: torch.export.Dim("batch", min=2)}])
    loaded = (exported.run_decompositions() if decompose else exported).module()
    x = torch.randn(7, 6, 7, 8)
    assert_close(loaded(x), eager(x), rtol=1e-4, atol=1e-4)
    assert_close(dict(loaded.named_buffers()), dict(eager.named_buffers()))


@each_module
def test_inference_mode(name):
    make, _, x = modules()[name]
    module, other = make(), make()
    with torch.inference_mode():
        y, inside = module(x), make()
        assert y.is_inference()
        assert_bitwise_equal("y of a module made in inference mode", inside(x), y)
        assert_close(inside.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert_bitwise_equal("y", y.clone(), other(x).detach())
    assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0)


@each_module
def test_autocast(name, device):
    make, make_torchs, x = modules()[name]
    module, torchs = make(act="relu"), make_torchs()
    with torch.autocast(device, dtype=torch.bfloat16):
        for each in (x, x.bfloat16(), x.half()):
            assert_close(module(each), F.relu(torchs(each)), rtol=0.02, atol=0.02)
        mixed, expected = module(x.bfloat16(), x), F.relu(torchs(x.bfloat16()) + x)
    assert mixed.dtype == torch.float32
    assert_close(mixed, expected, rtol=0, atol=0.05)
    with pytest.raises(RuntimeError, match="residual"):
        module(x.bfloat16(), x)


@pytest.mark.parametrize("act", ["identity", "relu", "swish"])
def test_deterministic_mode(act):
    """Fresh memory is nan in this mode, so elements that a kernel does not write would change the bits."""
    for (shape, groups), channels_last in itertools.product(WITH_KERNEL, (False, True)):
        given = in_format(arguments(shape, residual=True), channels_last)
        expected = results(gk, given, act, groups)
        with DeterministicGuard(True):
            assert_same_bits(results(gk, given, act, groups), expected)


@pytest.mark.parametrize("shape", [(3, 1, 49), (3, 5, 7, 7), (2, 17, 9, 9), (1, 3, 241, 1)], ids=str)
@each_format
def test_a_mask_is_written_whole(channels_last, shape):
    given = in_format(arguments(shape), channels_last)
    with DeterministicGuard(True):
        *_, mask = OPS.group_norm_act(given["x"], 1, None, None, given["x"] - 100, 1e-5, "relu", 0.0)
    assert mask.numel() > 0
    assert not mask.any()


def test_backward_again_and_after_the_graph_is_freed():
    x = X.clone().requires_grad_()
    y = gk.GroupNormAct(2, 6)(x).square().sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    assert_close(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()
    x = X.clone().requires_grad_() * 1
    y = gk.group_norm_act(x, 2)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_error_while_saving_for_backward_writes_nothing():
    module = gk.InstanceNormAct2d(6, affine=True, track_running_stats=True)
    with torch.inference_mode():
        x = X.clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        module(x)
    assert_close(module.state_dict(), gk.InstanceNormAct2d(6, affine=True, track_running_stats=True).state_dict(), rtol=0, atol=0)
