"""What every test gets: a native library (missing, a test fails rather than passing on the reference), seeded data, threads put back; and
how many examples hypothesis tries: the same 200 each time, 10,000 new ones with --hypothesis-profile=fuzz.

test_native.py is about the library's absence and test_layout.py about the sources, so these two go without. Where torch has a GPU, the
operators' tests run once more with it as the default device: what they make, they make there.
"""

import sys
import unittest
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec

import pytest
import torch
from hypothesis import HealthCheck, settings

from gradkernels import _native

# torch's tables of samples come with its test classes, which derive from expecttest's. No test here uses more of it than its names, so that
# a machine without it (one with a GPU and no network) runs them too.
if find_spec("expecttest") is None:
    expecttest = module_from_spec(ModuleSpec("expecttest", loader=None))
    expecttest.TestCase, expecttest.ACCEPT = unittest.TestCase, False
    sys.modules["expecttest"] = expecttest

import torch.testing._internal.common_utils

# torch's test module above chooses a profile of its own, of ten examples, when it is first imported: before this and not by a test.
# Seeded data and native() are the same for every example.
ALWAYS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("test", max_examples=200, derandomize=True, **ALWAYS)
settings.register_profile("fuzz", max_examples=10_000, print_blob=True, **ALWAYS)
settings.load_profile("test")

WITHOUT_NATIVE = {"test_native", "test_layout"}
ON_A_GPU_TOO = {"test_activation", "test_batch_norm_act", "test_clip_grad", "test_optim"}


def pytest_generate_tests(metafunc):
    if torch.cuda.is_available() and metafunc.module.__name__.rpartition(".")[2] in ON_A_GPU_TOO:
        metafunc.parametrize("device", ["cpu", "cuda"], indirect=True)


@pytest.fixture(autouse=True)
def device(request):
    name = getattr(request, "param", "cpu")
    if name == "cpu":
        yield name
    else:
        with torch.device(name):
            yield name


@pytest.fixture(autouse=True)
def native(request):
    if request.module.__name__.rpartition(".")[2] not in WITHOUT_NATIVE:
        assert _native.C is not None, f"gradkernels is not native: {_native.reason}; {_native.remedy}"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20240607)


@pytest.fixture
def each_thread_count(device):
    """Calls a function under 1 and under 2 threads and returns both results."""
    if device != "cpu":
        pytest.skip("threads are the CPU's")
    before = torch.get_num_threads()

    def run(function):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(function())
        return results

    yield run
    torch.set_num_threads(before)
