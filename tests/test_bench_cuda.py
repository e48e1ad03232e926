"""bench/bench_cuda.py on recorded times: its rows, table and file, and that its cases are what the other scripts make. No GPU is needed."""

import itertools
import json
import math
from dataclasses import replace
from functools import partial

import torch

import bench_cuda
from harness import Case, report_cases, write

# Milliseconds of five calls each, in the order in which providers are measured.
RECORDED = {"eager": [0.4, 0.4, 0.5, 0.4, 0.3], "gradkernels": [0.2] * 5, "copy": [0.1] * 5}


def nothing():
    pass


def recorded_case():
    providers = dict.fromkeys(("eager", "gradkernels"), nothing)
    return Case("swish 64 MiB", providers, bytes=5_000_000, copied=1_000_000, prove=nothing, dtype="bfloat16")


def test_rows_table_and_file(monkeypatch, tmp_path, capsys):
    times = iter(list(RECORDED.values()) * 2)
    flushes = []
    monkeypatch.setattr(bench_cuda, "milliseconds", lambda call, flush: (flushes.append(flush), next(times))[1])
    rows = bench_cuda.rows_of(recorded_case(), nothing)
    assert flushes == [nothing] * 3 + [None] * 3
    assert [(row.provider, row.outputs) for row in rows] == [
        (name, f"{cache} L2") for cache in ("cold", "warm") for name in ("eager", "gradkernels")
    ]
    ours = rows[1]
    assert (ours.median_us, ours.gb_per_s, ours.times_eager, ours.times_compile, ours.blocks) == (200.0, 25.0, 2.0, None, 5)
    # 25 GB/s beside the 20 of a copy that reads and writes 1 MB in 0.1 ms.
    assert ours.of_copy == 1.25

    file = tmp_path / "rows.json"
    report_cases("on a GPU", {"machine": "a GPU"}, rows, file)
    printed = capsys.readouterr().out
    assert "swish 64 MiB" in printed and "cold L2" in printed and "125%" in printed and "2.00" in printed
    found = json.loads(file.read_text())
    assert found["header"] == {"machine": "a GPU"} and [row["provider"] for row in found["rows"]] == ["eager", "gradkernels"] * 2


def test_a_case_that_fails_is_recorded_and_the_others_are_kept(monkeypatch, tmp_path):
    def wrong():
        raise SystemExit("swish: y is wrong by 1: nothing is timed\nand more")

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def unproved_case():
        return replace(recorded_case(), prove=wrong)

    file, head, written = tmp_path / "rows.json", {"machine": "a GPU"}, []
    monkeypatch.setattr(bench_cuda, "milliseconds", lambda call, flush: [0.1] * 5)
    monkeypatch.setattr(bench_cuda, "write", lambda *args: (write(*args), written.append(json.loads(file.read_text()))))
    made = [partial(each) for each in (recorded_case, unproved_case, too_large, recorded_case)]
    rows = bench_cuda.measured(made, nothing, head, file, math.inf)
    assert [len(each["rows"]) for each in written] == [4, 4, 4, 8] and len(rows) == 8
    assert [each["header"].get("left out", "").split()[:1] for each in written] == [["3"], ["2"], ["1"], []]
    assert head["failed"] == written[-1]["header"]["failed"]
    assert head["failed"].startswith("2 of 4 cases. ") and "too_large(): OutOfMemoryError: CUDA out of memory" in head["failed"]
    assert "unproved_case(): SystemExit: swish: y is wrong by 1: nothing is timed;" in head["failed"]
    late = {}
    assert bench_cuda.measured(made, nothing, late, None, -math.inf) == [] and late["left out"].startswith("4 of 4 cases")


def test_cases_are_made_as_the_other_scripts_make_them():
    """Every argument fits what is called, each shape of batch norm comes in both types and layouts, and few are compiled."""
    made = list(bench_cuda.cases())
    assert len({(make.func, make.args) for make in made}) == len(made)
    assert sum(make.args[-1] is True for make in made) == 4
    for make in made:
        names = make.func.__code__.co_varnames[: make.func.__code__.co_argcount]
        assert len(make.args) == len(names), f"{make.func.__name__}{names} called with {make.args}"
    shapes = {make.args[0]: set() for make in made if make.func.__name__ == "case" and isinstance(make.args[0], tuple)}
    for make in made:
        if make.args[0] in shapes and not make.args[2]:
            shapes[make.args[0]].add(make.args[3:5])
    assert set(shapes) == set(bench_cuda.SHAPES)
    assert all(len(each) == 4 for each in shapes.values())


def test_clipping_is_proved_and_run():
    for dtype in (torch.bfloat16, torch.float32):
        for clips in (False, True):
            case = bench_cuda.clipping(7, 33, clips, dtype)
            case.prove()
            norms = [case.providers[name]() for name in ("gradkernels", "eager") * 20]
            assert case.bytes == (3 if clips else 1) * case.copied
            # Every call finds something to clip.
            ours = norms[::2]
            assert all(after < before if clips else after == before for before, after in itertools.pairwise(ours))
