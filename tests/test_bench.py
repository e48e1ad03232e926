"""The benchmark measures what it says and compares as it says: harness, compare.py, the table and the pictures on made-up figures.

That every script runs is a slow test: bench --quick, each script by itself.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_scaling
import compare
import harness
import pictures
import table
from gradkernels import __main__ as command_line

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("bench_*.py"))
MACHINE = "A machine, x86_64"


def row(case="elu 4 MiB", provider="gradkernels", outputs="fresh", median=100.0, spread=0.02, eager=200.0, compiled=None, **fields):
    """A row of the harness whose p20 and p80 are `spread` beside its median."""
    return {
        "case": case,
        "provider": provider,
        "direction": "forward + backward",
        "dtype": "float32",
        "layout": "contiguous",
        "outputs": outputs,
        "median_us": median,
        "p20_us": median * (1 - spread),
        "p80_us": median * (1 + spread),
        "faults": 0.0,
        "bytes": 20 << 20,
        "gb_per_s": (20 << 20) / median / 1e3,
        "of_copy": 0.5,
        "times_eager": eager / median,
        "times_compile": None if compiled is None else compiled / median,
    } | fields


def pair(median, eager, case="elu 4 MiB", compiled=None, **fields):
    rows = [
        row(case, "eager", median=eager, eager=eager, compiled=compiled),
        row(case, median=median, eager=eager, compiled=compiled, **fields),
    ]
    return rows + ([row(case, "torch.compile", median=compiled, eager=eager, compiled=compiled)] if compiled else [])


def results(rows, **header):
    script = {"title": "activations", "rows": rows, "seconds": 1.0}
    return {"header": {"machine": MACHINE, harness.COPY: 20.0} | header, "scripts": {"activation": script}}


def compared(tmp_path, before, after):
    for name, found in (("a", before), ("b", after)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    return compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])


# compare


@pytest.mark.parametrize(
    ("median", "spread", "status", "word"),
    [
        (100.0, 0.02, 0, None),  # the same
        (103.0, 0.02, 0, None),  # p20-p80 overlap
        (105.0, 0.01, 0, "slower"),  # beyond noise, within 10 %
        (109.0, 0.01, 0, "slower"),
        (112.0, 0.01, 1, "REGRESSED"),
        (130.0, 0.25, 0, None),  # 30 % slower and all of it noise
        (80.0, 0.01, 0, "faster"),
    ],
)
def test_compare_tells_change_from_noise(tmp_path, capsys, median, spread, status, word):
    assert compared(tmp_path, results([row(spread=0.02)]), results([row(median=median, spread=spread)])) == status
    lines = capsys.readouterr().out.splitlines()
    changed = [line for line in lines if line.startswith(("REGRESSED", "slower", "faster"))]
    assert [line.split()[0] for line in changed] == ([word] if word else [])
    assert lines[-1].startswith(f"1 rows in both, {len(changed)} changed beyond noise, {status} regressed")


def test_compare_does_not_blame_torchs_own_rows(tmp_path, capsys):
    before, after = (results([row(provider="eager", median=median), row()]) for median in (100.0, 200.0))
    assert compared(tmp_path, before, after) == 0
    assert "+100.0%" in capsys.readouterr().out


def test_compare_keeps_apart_rows_that_differ_in_one_field(tmp_path):
    fields = ({}, {"outputs": "warm"}, {"dtype": "bfloat16"}, {"layout": "channels_last"}, {"case": "elu 64 MiB"}, {"n": 4}, {"n": 8})
    before = results([row(median=100.0 * 2**i, **each) for i, each in enumerate(fields)])
    assert compared(tmp_path, before, before) == 0
    for i, each in enumerate(fields):
        after = json.loads(json.dumps(before))
        after["scripts"]["activation"]["rows"][i] = row(median=115.0 * 2**i, **each)
        assert compared(tmp_path, before, after) == 1
        assert len(list(compare.changes(before, after))) == 1


def test_compare_reads_a_single_scripts_file_in_milliseconds_and_says_what_differs_in_the_header(tmp_path, capsys):
    def file(median, torch_version):
        fields = {"network": "ResNet-18", "provider": "gradkernels", "median_ms": median, "p20_ms": median, "p80_ms": median}
        return {"title": "a step", "header": {"torch": torch_version}, "rows": [fields]}

    assert compared(tmp_path, file(10.0, "2.11.0"), file(11.5, "2.13.0")) == 1
    printed = capsys.readouterr().out
    assert "torch: 2.11.0 -> 2.13.0" in printed and "10 -> 11.5 ms" in printed and "ResNet-18" in printed


def test_compare_of_files_without_a_common_row_is_no_success(tmp_path):
    assert compared(tmp_path, results([row()]), results([row("swish 4 MiB")])) == 2


# harness


def tiny_case(elements=1024, **fields):
    x = torch.randn(elements)
    return harness.Case(
        **{
            "name": "tiny",
            "providers": {"eager": lambda: x.clone(), "torch.compile": lambda: x + 0, "gradkernels": lambda: x + 0},
            "bytes": 2 * x.nbytes,
            "copied": x.nbytes,
            "prove": lambda: None,
        }
        | fields
    )


def test_rows_are_consistent():
    rows = harness.rows_of(tiny_case(), blocks=5, seconds=1e-3)
    assert [row.provider for row in rows] == ["eager", "torch.compile", "gradkernels"]
    by_provider = {row.provider: row for row in rows}
    for each in rows:
        assert 0 < each.p20_us <= each.median_us <= each.p80_us
        assert each.gb_per_s == pytest.approx(each.bytes / each.median_us / 1e3)
        assert each.times_eager == pytest.approx(by_provider["eager"].median_us / each.median_us)
        assert each.times_compile == pytest.approx(by_provider["torch.compile"].median_us / each.median_us)
        assert each.outputs == "fresh"
    without = tiny_case(providers={"eager": lambda: None, "gradkernels": lambda: None})
    assert {each.times_compile for each in harness.rows_of(without, 3, 1e-4)} == {None}


@pytest.mark.skipif(harness.c_library() is None, reason="the states of memory are glibc's")
def test_large_outputs_are_measured_in_both_states_which_differ_in_page_faults():
    elements = (40 << 20) // 4
    rows = harness.rows_of(tiny_case(elements), blocks=3, seconds=1e-3)
    faults = {(row.provider, row.outputs): row.faults for row in rows}
    assert set(faults) == {(provider, state) for provider in ("eager", "torch.compile", "gradkernels") for state in ("fresh", "warm")}
    # Huge pages may stand for 512 of the small ones; a warm block faults not at all, but for what the interpreter does.
    assert faults["eager", "fresh"] >= 4 * elements / (2 << 20) / 2
    assert faults["eager", "warm"] < faults["eager", "fresh"] / 4
    in_place = harness.rows_of(tiny_case(elements, outputs="none"), blocks=3, seconds=1e-3)
    assert {row.outputs for row in in_place} == {"none"}


def test_wrong_answer_ends_the_script_before_anything_is_timed():
    exact = {"y": torch.rand(100, dtype=torch.float64)}
    right = {"y": exact["y"].float()}
    harness.prove("right", right, right, exact)
    wrong = {"y": right["y"].clone()}
    wrong["y"][7] += 1e-3
    with pytest.raises(SystemExit, match="nothing is timed"):
        harness.prove("wrong", wrong, right, exact)
    wrong["y"][7] = math.nan
    with pytest.raises(SystemExit, match="nothing is timed"):
        harness.prove("not a number", wrong, right, exact)


def test_geometric_means_are_of_what_was_measured():
    rows = [harness.Row(**each) for each in (*pair(100.0, 200.0), *pair(100.0, 800.0, "elu 64 MiB", compiled=300.0))]
    assert harness.means(rows) == {
        "times eager, float32, fresh outputs": "geometric mean 4.00, least 2.00, 2 rows",
        "times torch.compile, float32, fresh outputs": "geometric mean 3.00, least 3.00, 1 rows",
    }


def test_fit_finds_the_line_and_has_no_negative_cost():
    fixed, each = bench_scaling.fit([(n, 5e-6 + 3e-9 * n) for n in (1, 10, 1000, 10**6)])
    assert (fixed, each) == (pytest.approx(5e-6), pytest.approx(3e-9))
    falling = bench_scaling.fit([(1, 4.0), (2, 3.0), (4, 2.0)])
    assert falling[1] == 0 and falling[0] > 0


# table and pictures


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"median": 101.0}, "within noise"),
        ({"median": 150.0, "bytes": 320}, "the cost of a call rules: 50.0 us more"),
        ({"median": 150.0, "faults": 5000.0}, "page faults of fresh outputs: 5,000 a call"),
        ({"median": 150.0, "of_copy": 0.9}, "not explained"),
    ],
)
def test_rows_that_torch_wins_stand_first_with_the_reason(fields, why):
    text = table.markdown(results([*pair(50.0, 100.0, "swish 4 MiB"), *pair(eager=100.0, **fields)]), [])
    wins = text.partition("## Where torch or the compiler wins")[2].partition("##")[0]
    assert "elu 4 MiB: torch takes" in wins and why in wins
    assert "swish 4 MiB" not in wins
    assert text.index("## Where torch") < text.index("| case |")


def test_pictures_are_drawn(tmp_path):
    found = results([*pair(100.0, 200.0, compiled=150.0), *pair(100.0, 80.0, "swish 64 MiB"), row(outputs="warm")])
    points = [(n, [1e-5 * n] * 3) for n in (1, 2, 4)]
    rows = [vars(each) for each in bench_scaling.rows_of("all_reduce", "processes", points, offset=1)]
    found["scripts"]["scaling"] = {"title": "cost against size", "rows": rows, "seconds": 1.0}
    drawn = pictures.draw(found, tmp_path, "machine")
    assert [path.name for path in drawn] == [f"machine_{what}.png" for what in ("ratio", "roofline", "scaling")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


# the command


def test_command_says_where_the_benchmark_is_when_it_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line.gradkernels, "__file__", str(tmp_path / "gradkernels" / "__init__.py"))
    assert command_line.main(["bench", "--quick"]) == 2
    assert "not part of the installed package" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stem", SCRIPTS)
def test_script_runs_quickly(stem, tmp_path):
    name = stem.removeprefix("bench_")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    command = [sys.executable, "-m", "gradkernels", "bench", "--quick", "--only", name, "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert found["quick"] and found["scripts"][name]["rows"]
    assert (tmp_path / f"{file.stem}.md").read_text().startswith("# Benchmark on ")
