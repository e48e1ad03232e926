"""Fixtures of every test: the native library, seeded data, the number of threads.

Without the native library a test fails, because it would pass on the reference. test_native.py, which is
about a missing library, and test_layout.py, which is about the sources, run without it. If torch has a GPU,
the tests of the operators run a second time with the GPU as the default device.

hypothesis tries the same 200 examples each time, and 10,000 new ones with --hypothesis-profile=fuzz.
"""

import fcntl
import os
import sys
import unittest
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import distributed

from gradkernels import _native

# The modules of torch's samples define test classes that derive from expecttest's. The tests here use nothing
# else of expecttest, so these stand-ins are enough on a machine without it.
if find_spec("expecttest") is None:
    expecttest = module_from_spec(ModuleSpec("expecttest", loader=None))
    expecttest.TestCase, expecttest.ACCEPT = unittest.TestCase, False
    sys.modules["expecttest"] = expecttest

import torch.testing._internal.common_utils

# The import above loads a hypothesis profile of torch's, with ten examples: it has to come before these
# lines. Fixtures of function scope are allowed, because seed() and native() do the same for every example.
ALWAYS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("test", max_examples=200, derandomize=True, **ALWAYS)
settings.register_profile("fuzz", max_examples=10_000, print_blob=True, **ALWAYS)
settings.load_profile("test")

WITHOUT_NATIVE = {"test_native", "test_layout"}
ON_A_GPU_TOO = {
    *("test_activation", "test_activation_parameter", "test_activation_samples", "test_activation_transforms", "test_rrelu"),
    *("test_batch_norm_act", "test_clip_grad", "test_clipping", "test_optim"),
}


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run each Nth test only")


# After pytest has left out what -m does not choose.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    items[:] = items[:: config.getoption("--every")]


def pytest_configure(config):
    """Divides torch's threads among the workers of pytest-xdist and the processes that they start.

    Each has two at least, so that operators are cut.
    """
    if hasattr(config, "workerinput"):
        threads = max(2, torch.get_num_threads() // config.workerinput["workercount"])
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


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
    """Calls a function under each number of threads, 1 and 2 by default, and returns the results."""
    if device != "cpu":
        pytest.skip("only the CPU's kernels use threads")
    before = torch.get_num_threads()

    def run(function, counts=(1, 2)):
        results = []
        for threads in counts:
            torch.set_num_threads(threads)
            results.append(function())
        return results

    yield run
    torch.set_num_threads(before)


@pytest.fixture
def process_group():
    """torch.distributed with this process alone.

    The group outlives what the test makes. DistributedDataParallel keeps the group too, and if it is the last to
    do so, its destructor waits for Gloo's threads, which may be waiting for Python's lock.
    """
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    group = distributed.group.WORLD
    yield group
    distributed.destroy_process_group()


@pytest.fixture
def memory_to_itself(tmp_path_factory):
    """For a test that needs most of the memory: no other worker of pytest-xdist runs such a test meanwhile."""
    folder = tmp_path_factory.getbasetemp()
    with open((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
