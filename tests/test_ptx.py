"""nvcc's PTX of the CUDA kernels, executed on the CPU (tests/ptx): the tests that run the kernels' sources, on the PTX.

docs/design/ptx.md says what that shows and what it does not.
"""

import itertools
import re
from functools import cache

import pytest
import torch

import ptx_library
import test_simt_activation as activation
import test_simt_batch_norm_act as bn
import test_simt_clip_grad as clip_grad
import test_simt_group_norm_act as gn
from accuracy import DTYPES
from activation_calls import PARAMETRICS
from ptx.faults import FAULTS, Fault

pytestmark = pytest.mark.slow

SIMT = {"activation": activation, "batch_norm_act": bn, "clip_grad": clip_grad, "group_norm_act": gn}
STEMS = ("activation", "batch_norm_act", "clip_grad", "optim")
# They launch no kernel.
OF_THE_HOST = ("test_every_element_has_one_piece", "test_a_gpu_that_nothing_was_built_for")


def of_the_sources():
    for stem, module in SIMT.items():
        for name, function in vars(module).items():
            if name.startswith("test_") and name not in OF_THE_HOST:
                yield name.replace("test_", f"test_{stem}_", 1), function


globals().update(of_the_sources())


# By how many ulps ex2.approx and rcp.approx are away from the nearest number: as many as the PTX ISA admits, in all directions.
ULPS = [(2, 1), (-2, -1), (2, -1), (-2, 1)]
# The tests that run with the first `count` of them. The others run with the nearest numbers.
WITH_ULPS = {
    activation.test_every_value_of_16_bits_is_rounded_once: 4,
    activation.test_swish_of_16_bits_at_special_values: 4,
    activation.test_forward_and_backward: 2,
    activation.test_learnt_parameter: 1,
    bn.test_activations: 2,
    bn.test_16_bits_with_float32_parameters: 2,
}


def pytest_generate_tests(metafunc):
    if metafunc.function in WITH_ULPS:
        metafunc.parametrize("approximations", ULPS[: WITH_ULPS[metafunc.function]], indirect=True, ids=str)


@pytest.fixture(autouse=True)
def approximations(request):
    ptx_library.machine().approximate(*getattr(request, "param", (0, 0)))


@pytest.fixture
def call(request):
    name = request.function.__module__.removeprefix("test_simt_")
    return ptx_library.load(name if name in STEMS else SIMT[name].STEM)


@pytest.fixture
def call_optim():
    return ptx_library.load("optim")


@pytest.fixture
def guarded():
    memory = ptx_library.DeviceMemory()
    yield memory
    memory.forget()
    memory.check()


# (rows, channels, inner): rows across channels and long runs, of packets of 16 bytes; with an offset of one element packets are
# single elements, and with one of four elements packets of 16 bits have 8 bytes.
OF_EACH_KERNEL = [(9, 24, 1), (3, 5, 72)]
MANGLED = {torch.float32: "f", torch.float64: "d", torch.bfloat16: r"NS_8BFloat16E", torch.float16: r"NS_7Float16E"}


@bn.each_dtype
@pytest.mark.parametrize("shape", OF_EACH_KERNEL, ids=str)
def test_every_kernel_of_both_norms_runs(guarded, shape, dtype):
    """Each width, with and without residual, with each activation, for one process and as one of several; in group norm, with sets."""
    call = ptx_library.load("batch_norm_act")
    for offset, residual, act in itertools.product((0, 1, 4), (False, True), bn.ACTS):
        given = bn.sample(shape, dtype, act, True, residual=residual)
        kernels = bn.Kernels(call, guarded, given, act, offset=offset)
        kernels.forward(True)
        kernels.backward(True)
        bn.assert_all_accurate(kernels.result(), given, True, act)
        kernels.grad_x.fill_(torch.nan)
        sums, count = guarded.empty(2 * shape[1], torch.float64), guarded.copy(torch.tensor([float(shape[0] * shape[2])]).double())
        call("batch_norm_act_backward_reduce", *kernels.backward_operands(), kernels.grad_residual, sums)
        call("batch_norm_act_backward_elemt", *kernels.backward_operands(), kernels.grad_x, sums, count)
        bn.assert_all_accurate(kernels.result(), given, True, act)
    columns = shape[2] == 1
    for offset, residual in itertools.product((0, 1, 4), (False, True)):
        given = gn.sample((2, 24, 72), 6, dtype, "swish", residual=residual)
        kernels = gn.Kernels(call, guarded, given, 6, "swish", columns, offset=offset)
        kernels.forward()
        kernels.backward()
        gn.assert_all_accurate(kernels.result(), given, 6, "swish")
        # grad_x then comes from the residual, and not from its gradient.
        kernels.grad_residual = None
        kernels.backward()
        gn.assert_all_accurate(kernels.result(), given, 6, "swish")
    assert not ptx_library.never_run("batch_norm_act", rf"kernelI{MANGLED[dtype]}Li\dELb{columns:d}E")
    if columns:
        assert not ptx_library.never_run("batch_norm_act", f"group_norm_act_\\w+_kernelI{'d' if dtype == torch.float64 else 'f'}E")


# The tests that notice the faults of tests/ptx/faults.py: the stem, and a function of its launchers and of memory.
CAUGHT_BY = {
    "forward of swish": (
        "activation",
        lambda *given: [activation.test_forward_and_backward(*given, "swish", dtype) for dtype in DTYPES[::2]],
    ),
    "mask": ("activation", lambda *given: activation.test_mask(*given, "leaky_relu", torch.float32)),
    "rrelu": ("activation", lambda *given: activation.test_rrelu_draws_what_the_cpu_draws(*given, torch.float32)),
    "special values": ("activation", lambda *given: activation.test_swish_of_16_bits_at_special_values(*given, 1.0, torch.bfloat16)),
    "learnt parameter": ("activation", lambda *given: activation.test_learnt_parameter(*given, PARAMETRICS[0], torch.float32)),
    "shapes of batch norm": ("batch_norm_act", lambda *given: bn.test_shapes(*given, torch.bfloat16)),
    "mask of batch norm": ("batch_norm_act", lambda *given: bn.test_mask_equals_the_cpus(*given)),
    "norms": ("clip_grad", lambda *given: clip_grad.test_norms(*given, 2.0)),
    "norms of nan": ("clip_grad", lambda *given: clip_grad.test_nan_and_inf(*given, 2.0, torch.float32)),
    "largest": ("clip_grad", lambda *given: clip_grad.test_the_largest_element_stands_anywhere(*given)),
    "total norm": ("clip_grad", lambda *given: clip_grad.test_clipping_by_a_norm(*given, 10.0)),
    "units": ("clip_grad", lambda *given: clip_grad.test_adaptive_clipping(*given, 1.0, 2.0)),
    "clamp": ("clip_grad", lambda *given: clip_grad.test_clipping_by_value(*given, 0.5)),
    "rmsprop": ("optim", lambda *given: clip_grad.test_rmsprop(*given, 0.9, True, torch.float32)),
}


@cache
def marks_of(name):
    """What a test of CAUGHT_BY executes, by ptx_library.marks_of. It must pass."""
    stem, test = CAUGHT_BY[name]
    memory = ptx_library.DeviceMemory()
    with torch.random.fork_rng():
        marks = ptx_library.marks_of(stem, lambda: test(ptx_library.load(stem), memory))
    memory.forget()
    memory.check()
    return marks


def assert_caught(guarded, fault, message=None):
    stem, test = CAUGHT_BY[fault.test]
    with ptx_library.planted(stem, fault, marks_of(fault.test)), pytest.raises(AssertionError, match=message):
        test(ptx_library.load(stem), guarded)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_is_caught(guarded, fault):
    assert_caught(guarded, fault)


@pytest.mark.parametrize(
    "opcode", ["add.rz.f32", "fma.rn.ftz.f32", "cvt.rn.relu.bf16.f32", "add.f16", "cp.async.commit_group", "st.global.cg.u32"]
)
def test_an_unknown_opcode_fails_by_its_name(guarded, opcode):
    fault = Fault(opcode, "clamp_kernel", r"ret;", f"{opcode}; ret;", "clamp")
    assert_caught(guarded, fault, f"unknown opcode {re.escape(opcode)},")


@pytest.mark.parametrize("stem", STEMS)
def test_both_architectures_have_the_same_code(stem):
    """So it is enough to run one of them."""
    one, other = (ptx_library.ptx_of(stem, architecture).replace(architecture, "") for architecture in ("sm_90", "sm_80"))
    assert one == other
