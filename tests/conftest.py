"""What every test gets: a native library (missing, a test fails rather than passing on the reference), seeded data, threads put back.

test_native.py is about the library's absence and test_layout.py about the sources, so these two go without.
"""

import pytest
import torch

from gradkernels import _native

WITHOUT_NATIVE = {"test_native", "test_layout"}


@pytest.fixture(autouse=True)
def native(request):
    if request.module.__name__.rpartition(".")[2] not in WITHOUT_NATIVE:
        assert _native.C is not None, f"gradkernels is not native: {_native.reason}; {_native.remedy}"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20240607)


@pytest.fixture
def each_thread_count():
    """Calls a function under 1 and under 2 threads and returns both results."""
    before = torch.get_num_threads()

    def run(function):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(function())
        return results

    yield run
    torch.set_num_threads(before)
