"""ThreadSanitizer on the CUDA kernels whose threads communicate, run on the host (tests/simt).

It finds no race, and one if a barrier or a fence is removed. The main function of tests/simt/<stem>.cpp
launches the kernels.
"""

import pytest

from simt_library import races

pytestmark = pytest.mark.slow

# A GPU whose shared memory holds the sums of a block, but not a slab as well.
TWO_PASSES = {"SIMT_SHARED_BYTES": 41_000, "SIMT_COMPUTE_CAPABILITY": 80}
# Each kernel has several barriers and fences, which order different accesses.
BARRIERS, FENCES = (1, 2, 3), (1, 2)


@pytest.mark.parametrize(
    ("stem", "gpu"),
    [
        ("activation", {}),
        ("clip_grad", {}),
        pytest.param("batch_norm_act", {}, marks=pytest.mark.slow),
        pytest.param("batch_norm_act", TWO_PASSES, marks=pytest.mark.slow),
    ],
    ids=["activation", "clip_grad", "batch_norm_act in clusters", "batch_norm_act in two passes"],
)
def test_no_races(stem, gpu):
    assert races(stem, **gpu) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "removed"),
    [
        *((stem, {"SIMT_WITHOUT_BARRIER": which}) for stem in ("activation", "clip_grad") for which in BARRIERS),
        *((stem, {"SIMT_WITHOUT_FENCE": which}) for stem in ("activation", "clip_grad") for which in FENCES),
        *(("batch_norm_act", {"SIMT_WITHOUT_BARRIER": which}) for which in BARRIERS[:2]),
        *(("batch_norm_act", {"SIMT_WITHOUT_FENCE": which} | TWO_PASSES) for which in FENCES),
    ],
)
def test_a_removed_barrier_or_fence_is_a_race(stem, removed):
    assert "data race" in races(stem, **removed)
