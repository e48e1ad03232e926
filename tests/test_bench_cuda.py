"""bench/bench_cuda.py on recorded times: its rows, table and file, and that its cases are what the other scripts make. No GPU is needed."""

import json
from functools import partial

import torch

import bench_cuda
from harness import Case, report_cases

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


def test_cases_are_made_as_the_other_scripts_make_them():
    """Every argument fits what is called, and each shape of batch norm comes in both types and layouts."""
    made = list(bench_cuda.cases())
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
        for max_norm in (1e9, 1e-3):
            case = partial(bench_cuda.clipping, 7, 33, max_norm, dtype)()
            case.prove()
            before = [case.providers[name]() for name in ("gradkernels", "eager")]
            assert all(norm > 0 for norm in before) and case.bytes == (3 if max_norm < 1 else 1) * case.copied
