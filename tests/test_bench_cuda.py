"""bench/bench_cuda.py and profile_cuda.py without a GPU: that both states of the L2 cache are timed, and that the cases can be made."""

import inspect
from itertools import product

import pytest
import torch

import bench_activation
import bench_clip_grad
import bench_cuda
import harness
import profile_cuda


def test_calls_are_timed_with_a_cold_and_a_warm_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"L2_cache_size": 1000}))
    flushed = []
    monkeypatch.setattr(bench_cuda, "milliseconds", lambda call, flush: (flushed.append(flush and flush.__self__.nbytes), [call()] * 3)[-1])
    case = harness.Case("swish", "tiny", {"eager": lambda: 4.0, "gradkernels": lambda: 2.0}, prove=lambda: None)
    rows = [row for state, blocks in bench_cuda.on_gpu(case, 0.0, False) for row in harness.rows_from(case, state, blocks)]
    assert [(row.outputs, row.provider, row.median_us, row.cores) for row in rows] == [
        (f"{state} L2", name, time, None) for state in ("cold", "warm") for name, time in (("eager", 4000.0), ("gradkernels", 2000.0))
    ]
    assert flushed == [4000, 4000, None, None]


def test_cases_are_made_as_the_other_scripts_make_them():
    """Every argument fits, the norms have every shape in both types and layouts, EfficientNet's with swish; what is compiled is last."""
    made = bench_cuda.cases()
    bound = [inspect.signature(make.func).bind(*make.args, **make.keywords).arguments for make in made]
    assert [bool(each.get("with_compiler")) for each in bound] == [False] * (len(made) - 4) + [True] * 4
    batch_norms = [each for each in bound if "act" in each and "layout" in each and "groups" not in each]
    kinds = {(each["shape"], each["layout"], each["dtype"]) for each in batch_norms}
    assert kinds == set(product(bench_cuda.SHAPES, ("contiguous", "channels_last"), (torch.bfloat16, torch.float32)))
    assert {each["shape"] for each in batch_norms if each["act"] == "swish"} == set(bench_cuda.SWISH_SHAPES)
    assert sum("groups" in each for each in bound) == 4 * len(bench_cuda.GROUP_NORMS)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", bench_activation.WITH_PARAMETER)
def test_a_parameter_for_each_channel_is_proved(name, layout):
    case = bench_activation.case(name, (3, 5, 8, 8), torch.bfloat16, layout=layout)
    case.prove()
    assert (case.name, case.layout, case.bytes) == ("(3, 5, 8, 8)", layout, 5 * 2 * 3 * 5 * 64)


@pytest.mark.parametrize(("what", "passes"), [("clips", 3), ("need not clip", 1)])
def test_clipping_in_16_bits_is_proved_and_goes_on_from_call_to_call(what, passes):
    case = bench_clip_grad.case(f"clip_grad_norm_ that {what}", "1,000 tensors of 256", torch.bfloat16)
    case.prove()
    first, *_, last = (case.providers["gradkernels"]() for _ in range(20))
    assert case.bytes == passes * 512_000 and (last < first) == (what == "clips")


def test_profiled_cases_have_every_shape_and_can_be_called(monkeypatch):
    """Made small, each part of each case returns what torch's does, in shape and type."""
    monkeypatch.setattr(profile_cuda, "ELEMENTWISE_BYTES", 64)
    made = list(profile_cuda.cases())
    assert len(made) == len(dict(made))
    bound = [inspect.signature(make.func).bind(*make.args, **make.keywords).arguments for _, make in made]
    kinds = {(each["shape"], each["channels_last"], each["dtype"]) for each in bound if "act" in each and "groups" not in each}
    assert kinds == set(product(bench_cuda.SHAPES, (False, True), (torch.bfloat16, torch.float32)))
    for (name, make), arguments in zip(made, bound, strict=True):
        small = {"shape": tuple(min(each, 5) for each in arguments.get("shape", ())), "shapes": [(3,), (2, 2)]}
        small["groups"] = 5 if arguments.get("groups") == arguments.get("shape", (0, 0))[1] else 1
        measured = make.func(**arguments | {key: value for key, value in small.items() if key in arguments})
        assert set(measured.providers) == {"gradkernels", "eager"}, name
        for part in measured.least:
            results = [calls[part]() for calls in measured.providers.values()]
            ours, torchs = (
                [(each.shape, each.dtype) for each in (result if isinstance(result, tuple) else (result,))] for result in results
            )
            assert ours == torchs, (name, part)
