"""The CUDA kernels in which threads meet, run on the host (tests/simt) under ThreadSanitizer: no races, and one where order is taken away.

What is launched stands in the main of tests/simt/<stem>.cpp.
"""

import pytest

from simt_library import races

# A GPU whose shared memory holds the sums of a block and no slab beside them.
TWO_PASSES = {"SIMT_SHARED_BYTES": 41_000, "SIMT_COMPUTE_CAPABILITY": 80}
# Of these there are several in each kernel, of which no two order the same.
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
def test_order_taken_away_is_a_race(stem, removed):
    assert "data race" in races(stem, **removed)
