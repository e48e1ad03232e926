"""ThreadSanitizer on the CUDA kernels whose threads communicate, run on the host (tests/simt).

It finds no race, and one if a barrier or a fence is removed. The main function of tests/simt/<stem>.cpp
launches the kernels.
"""

import pytest

from simt_library import races

pytestmark = pytest.mark.slow

# Each kernel has several barriers and fences, which order different accesses.
BARRIERS, FENCES = (1, 2, 3), (1, 2)
STEMS = ("activation", "batch_norm_act", "clip_grad")


@pytest.mark.parametrize("stem", STEMS)
def test_no_races(stem):
    assert races(stem) == ""


@pytest.mark.parametrize(
    ("stem", "removed"),
    [
        *((stem, {"SIMT_WITHOUT_BARRIER": which}) for stem in STEMS for which in BARRIERS),
        *((stem, {"SIMT_WITHOUT_FENCE": which}) for stem in STEMS for which in FENCES),
    ],
)
def test_a_removed_barrier_or_fence_is_a_race(stem, removed):
    assert "data race" in races(stem, **removed)
