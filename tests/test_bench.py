"""The benchmark measures what it says and compares as it says: harness, compare.py, the table and the pictures on made-up figures.

That every script runs is a slow test: bench --quick, each script by itself.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench_scaling
import compare
import harness
import neighbours
import pictures
import suite
import table
from gradkernels import __main__ as command_line

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("bench_*.py"))
MACHINE = "A machine, x86_64"
STATISTICS = ("p20", "median", "p80")


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
        "of_copy": 0.4,
        "times_eager": eager / median,
        "times_compile": None if compiled is None else compiled / median,
        "blocks": 11,
        "cores": 1.9,
        "saved_bytes": 4 << 20,
        "peak_bytes": None,
    } | fields


def pair(median, eager, case="elu 4 MiB", compiled=None, direction="forward + backward", outputs="fresh", **fields):
    which = {"direction": direction, "outputs": outputs}
    fields |= which
    rows = [
        row(case, "eager", median=eager, eager=eager, compiled=compiled, **which),
        row(case, median=median, eager=eager, compiled=compiled, **fields),
    ]
    return rows + ([row(case, "torch.compile", median=compiled, eager=eager, compiled=compiled, **which)] if compiled else [])


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


def test_compare_keeps_apart_rows_that_differ_in_one_field(tmp_path, capsys):
    fields = ({}, {"outputs": "warm"}, {"dtype": "bfloat16"}, {"layout": "channels_last"}, {"case": "elu 64 MiB"}, {"n": 4}, {"n": 8})
    before = results([row(median=100.0 * 2**i, **each) for i, each in enumerate(fields)])
    assert compared(tmp_path, before, before) == 0
    for i, each in enumerate(fields):
        after = json.loads(json.dumps(before))
        after["scripts"]["activation"]["rows"][i] = row(median=115.0 * 2**i, **each)
        assert compared(tmp_path, before, after) == 1
        assert "1 changed beyond noise" in capsys.readouterr().out


def test_compare_reads_a_single_scripts_file_in_milliseconds_and_says_what_differs_in_the_header(tmp_path, capsys):
    def file(median, torch_version):
        fields = {"network": "ResNet-18", "provider": "gradkernels", "median_ms": median, "p20_ms": median, "p80_ms": median}
        return {"title": "a step", "header": {"torch": torch_version}, "rows": [fields]}

    assert compared(tmp_path, file(10.0, "2.11.0"), file(11.5, "2.13.0")) == 1
    printed = capsys.readouterr().out
    assert "torch: 2.11.0 -> 2.13.0" in printed and "10 -> 11.5 ms" in printed and "ResNet-18" in printed


@pytest.mark.parametrize(("seconds", "status", "growth"), [(10.2e-3, 0, None), (13e-3, 1, "+30.0%"), (8e-3, 0, "-20.0%")])
def test_compare_takes_units_for_what_they_are(tmp_path, capsys, seconds, status, growth):
    def of(provider, **times):
        return {"case": "a step", "provider": provider} | {f"{which}_{unit}": time for unit, time in times.items() for which in STATISTICS}

    before = results([of("eager", ms=10.0), of("gradkernels", ms=10.0)])
    # torch's stays in milliseconds; ours has become microseconds, and has a field that it had not.
    ours = of("gradkernels", us=seconds * 1e6) | {"p20_us": seconds * 0.97e6, "median_ms": None, "blocks": 9}
    assert compared(tmp_path, before, results([of("eager", ms=20.0), ours])) == status
    lines = [line for line in capsys.readouterr().out.splitlines() if "gradkernels: " in line]
    assert [line.split()[1] for line in lines] == ([growth] if growth else [])
    assert all(f"10,000 -> {seconds * 1e6:,.0f} us" in line and line.endswith("(torch +100.0%)") for line in lines)


def test_compare_tells_of_each_scripts_own_header(tmp_path, capsys):
    def file(commit, **own):
        scripts = {stem: {"title": stem, "rows": [row()]} for stem in ("activation", "clip_grad", "convert")}
        scripts |= {stem: scripts[stem] | {"header": header} for stem, header in own.items()}
        return {"header": {"machine": MACHINE, "commit": commit}, "scripts": scripts}

    def told(before, after):
        assert compared(tmp_path, before, after) == 0
        return capsys.readouterr().out.splitlines()[:-1]

    after = file("ccc", clip_grad={"commit": "ddd"}, convert={"neighbours": "timm 1.0"})
    assert told(file("aaa", clip_grad={"commit": "bbb"}), after) == [
        "commit: aaa -> ccc in activation convert; bbb -> ddd in clip_grad",
        "neighbours: not recorded -> timm 1.0 in convert",
    ]
    assert told(file("aaa"), file("ccc")) == ["commit: aaa -> ccc"]
    # It stands elsewhere in the file and says the same.
    assert not told(file("aaa", convert={"commit": "bbb"}), file("bbb", activation={"commit": "aaa"}, clip_grad={"commit": "aaa"}))


def test_compare_of_a_scripts_own_file_and_the_suites(tmp_path, capsys):
    before = results([row(), row("swish 4 MiB")])
    before["scripts"]["clip_grad"] = {"title": "clipping", "rows": [row()]}
    after = {"title": "activations", "header": {"machine": MACHINE, harness.COPY: 21.0}, "rows": [row(median=130.0)]}
    assert compared(tmp_path, before, after) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{harness.COPY}: 20.0 -> 21.0" and "gradkernels: elu 4 MiB" in lines[1]
    assert lines[2].endswith("a.json alone: 1 rows") and lines[3].startswith("1 rows in both")
    assert compared(tmp_path, after | {"title": "something else"}, before) == 2


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "3", "{}", '{"header": {}}', '{"rows": []}', '{"header": [1], "rows": []}', '{"header": {}, "rows": [1]}'),
        *('{"header": {}, "scripts": []}', '{"header": {}, "scripts": {"a": {}}}'),
        '{"header": {}, "rows": [{"p20_us": "a", "median_us": 1, "p80_us": 1}]}',
    ],
)
def test_compare_refuses_what_are_no_results(tmp_path, capsys, text):
    (tmp_path / "a.json").write_text(json.dumps(results([row()])))
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert ended.value.code == 2 and str(tmp_path / "b.json") in capsys.readouterr().err


def test_compare_puts_what_regressed_first_and_torchs_own_rows_last(tmp_path, capsys):
    names = ("elu", "swish", "prelu")
    before = results([row(name, provider) for name in names for provider in ("eager", "gradkernels")])
    medians = iter((300.0, 105.0, 50.0, 120.0, 400.0, 60.0))
    after = [row(name, provider, median=next(medians), spread=0.01) for name in names for provider in ("eager", "gradkernels")]
    assert compared(tmp_path, before, results(after)) == 1
    told = [line.split("us  ")[1].partition(" (")[0] for line in capsys.readouterr().out.splitlines() if "us  " in line]
    ours = [f"gradkernels: activation, {name}" for name in ("swish", "elu", "prelu")]
    assert told == [*ours, *(f"eager: activation, {name}" for name in ("prelu", "elu", "swish"))]


def test_compare_of_files_without_a_common_row_is_no_success(tmp_path, capsys):
    assert compared(tmp_path, results([row()]), results([row("swish 4 MiB")])) == 2
    with pytest.raises(SystemExit) as ended:
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "no such file.json")])
    assert ended.value.code == 2 and "No such file" in capsys.readouterr().err


def test_compare_has_torch_beside_ours_and_blames_no_other_package(tmp_path, capsys):
    theirs = ("torch.compile", "inplace_abn", "timm's BatchNormAct2d", "as timm's BatchNormAct2d", "torch, foreach=True")
    before = results([row(provider="eager"), row(), *(row(provider=each) for each in theirs)])
    after = results(
        [row(provider="eager", median=150.0), row(median=105.0, spread=0.01), *(row(provider=each, median=300.0) for each in theirs)]
    )
    assert compared(tmp_path, before, after | {"quick": True}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'b.json'} is of a quick run: its numbers mean nothing"
    (ours,) = [line for line in lines if "gradkernels: " in line]
    assert ours.endswith("(torch +50.0%)") and "100 -> 105 us" in ours
    assert compared(tmp_path, before, results([row(provider="gradkernels, compiled"), row(median=150.0), row("swish 4 MiB")])) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not compared")]
    assert [line.partition(" alone: ")[2] for line in told] == ["6 rows, 6 of activation", "2 rows, 2 of activation"]


# harness


def in_seconds(seconds):
    return time.monotonic() + seconds


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
    rows = harness.rows_of(tiny_case(), blocks=5, seconds=1e-3, until=in_seconds(1))
    assert [row.provider for row in rows] == ["eager", "torch.compile", "gradkernels"]
    by_provider = {row.provider: row for row in rows}
    for each in rows:
        assert 0 < each.p20_us <= each.median_us <= each.p80_us
        assert each.gb_per_s == pytest.approx(each.bytes / each.median_us / 1e3)
        assert each.times_eager == pytest.approx(by_provider["eager"].median_us / each.median_us)
        assert each.times_compile == pytest.approx(by_provider["torch.compile"].median_us / each.median_us)
        assert each.outputs == "fresh"
        assert each.blocks == 5 and each.cores > 0
        assert each.saved_bytes is None and each.peak_bytes is None
    without = tiny_case(providers={"eager": lambda: None, "gradkernels": lambda: None})
    assert {each.times_compile for each in harness.rows_of(without, 3, 1e-4, in_seconds(1))} == {None}


@pytest.mark.skipif(harness.c_library() is None, reason="the states of memory are glibc's")
def test_large_outputs_are_measured_in_both_states_which_differ_in_page_faults():
    elements = (40 << 20) // 4
    rows = harness.rows_of(tiny_case(elements), blocks=3, seconds=1e-3, until=in_seconds(2))
    faults = {(row.provider, row.outputs): row.faults for row in rows}
    assert set(faults) == {(provider, state) for provider in ("eager", "torch.compile", "gradkernels") for state in ("fresh", "warm")}
    # Huge pages may stand for 512 of the small ones; a warm block faults not at all, but for what the interpreter does.
    assert faults["eager", "fresh"] >= 4 * elements / (2 << 20) / 2
    assert faults["eager", "warm"] < faults["eager", "fresh"] / 4
    in_place = harness.rows_of(tiny_case(elements, outputs="none"), blocks=3, seconds=1e-3, until=in_seconds(2))
    assert {row.outputs for row in in_place} == {"none"}


class Clock:
    """Time that passes only in what is measured."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def perf_counter_ns(self):
        return round(self.now * 1e9)

    process_time_ns = perf_counter_ns

    def call(self, seconds):
        def pass_time():
            self.now += seconds

        return pass_time


@pytest.mark.parametrize(
    ("seconds", "blocks", "most"),
    [
        (60.0, 11, 2.8),  # 11 blocks of 0.1 s and a quarter, twice
        (1.4, 11, 1.4),
        (0.2, 6, 0.2),  # a block of the slow one is no shorter than a call and one before it: 20 ms
        (-1.0, harness.LEAST_BLOCKS, 0.1),
    ],
)
def test_blocks_become_shorter_and_then_fewer_until_the_time_is_kept(monkeypatch, seconds, blocks, most):
    clock = Clock()
    monkeypatch.setattr(harness, "time", clock)
    calls = {"fast": clock.call(1e-4), "slow": clock.call(1e-2)}
    measured = harness.measure_blocks(calls, {}, 11, 0.1, clock.now + seconds)
    assert {name: len(each) for name, each in measured.items()} == dict.fromkeys(calls, blocks)
    assert clock.now - 100 <= most
    for name, expected in (("fast", 1e-4), ("slow", 1e-2)):
        assert all(block.seconds == pytest.approx(expected) and block.cores == pytest.approx(1) for block in measured[name])


def test_budget_gives_everything_an_even_part_of_what_is_left(monkeypatch):
    now = 100.0
    monkeypatch.setattr(harness.time, "monotonic", lambda: now)
    budget = harness.Budget(40.0, 4, started=100.0)
    assert budget.share() == 110.0
    now = 119.0  # overrun: the others have less
    assert budget.share() == 126.0
    now = 120.0  # done early: the others have more
    assert budget.share() == 130.0
    now = 200.0
    assert budget.share() == 200.0
    assert budget.share() == 200.0


def test_all_scripts_together_keep_the_times_that_are_promised():
    here = {stem.removeprefix("bench_") for stem in SCRIPTS} - {"cuda", *harness.ALONE}
    full, quick = (sum(harness.SECONDS.get(stem, harness.OTHER)[i] + harness.START_SECONDS for stem in here) for i in (0, 1))
    assert full < 600 and quick < 60


def parted(slow):
    """A case whose gradkernels is slow in its backward, where asked to."""
    x, y = torch.randn(1024), torch.randn(1024)

    def forward(name):
        return lambda: torch.nn.functional.elu(x.requires_grad_())

    def step(name):
        def call():
            torch.autograd.grad(forward(name)(), x, y)
            if slow and name == "gradkernels":
                time.sleep(5e-3)

        return call

    functions = {name: forward(name) for name in ("eager", "gradkernels")}
    case = tiny_case(providers={name: step(name) for name in functions}, saves=functions)
    case.parts = lambda: harness.forward_and_backward(case, functions, {name: [x] for name in functions}, y, (8192, 12288))
    return case


@pytest.mark.parametrize("apart", [True, False])
def test_forward_and_backward_are_measured_apart_where_asked_and_where_eager_wins(apart):
    case = parted(slow=not apart)
    case.apart = apart
    rows = harness.rows_of(case, 5, 1e-3, in_seconds(1))
    assert [(each.direction, each.provider) for each in rows] == [
        (direction, provider) for direction in ("forward + backward", "forward", "backward") for provider in ("eager", "gradkernels")
    ]
    assert [each.bytes for each in rows[2:]] == [8192, 8192, 12288, 12288]
    # torch keeps elu's input, and its output in what was recorded apart.
    assert rows[0].saved_bytes == 4096 and rows[2].saved_bytes is None


def test_a_lost_case_is_measured_with_one_thing_changed_unless_that_was_measured_before():
    made = []

    def cheaper():
        made.append(parted(slow=False))
        made[-1].name = "cheaper"
        return made[-1]

    case = parted(slow=True)
    case.instead = {"what it computes": cheaper}
    rows = harness.rows_of(case, 5, 1e-3, in_seconds(1))
    assert [each.case for each in rows if each.direction == harness.WHOLE] == ["tiny", "tiny", "cheaper", "cheaper"]
    ours = next(each for each in rows if each.provider == "gradkernels")
    assert ours.instead == {"what it computes": {"case": "cheaper", "dtype": "float32", "layout": "contiguous"}}
    again = harness.rows_of(case, 5, 1e-3, in_seconds(1), rows)
    assert {each.case for each in again} == {"tiny"}
    case = parted(slow=False)
    case.instead = {"what it computes": cheaper}
    case.providers["eager"] = case.providers["gradkernels"]
    case.providers["gradkernels"] = lambda: None
    made.clear()
    assert harness.rows_of(case, 5, 1e-3, in_seconds(1))[1].instead is None and not made


def test_memory_that_is_saved_counts_once_and_peaks_are_seen():
    x = torch.randn(8 << 20, requires_grad=True)
    assert harness.saved_bytes(lambda: x * x) == 32 << 20
    if harness.c_library() is not None and Path("/proc/self/clear_refs").exists():
        peak = harness.peak_bytes(lambda: (x.detach() + 1).mul(2))
        # Two outputs, and what Python and the C library want besides.
        assert 63 << 20 <= peak <= 70 << 20


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


def test_each_side_of_a_cache_has_its_own_formula():
    def microseconds(n):
        return 5 + 0.001 * n if n <= 10_000 else 0.004 * n

    points = [(n, [microseconds(n) * 1e-6] * 3) for n in (10, 1000, 10_000, 100_000, 1_000_000)]
    for ends in (20_000, bench_scaling.bend(points)):
        rows = bench_scaling.rows_of("elu", "elements", points, ends)
        assert [row.n for row in rows] == [n for n, _ in points]
        assert all(row.fitted_us == pytest.approx(microseconds(row.n)) and abs(row.off_by) < 1e-9 for row in rows)
        assert rows[0].formula == f"5 us + 1 ns x n for n <= {ends:,}, of 3 points"
        assert rows[-1].formula == f"4 ns x n for n > {ends:,}, of 2 points"
    (formula,) = {row.formula for row in bench_scaling.rows_of("elu", "elements", points[:3])}
    assert formula == "5 us + 1 ns x n, of 3 points"
    (alone,) = bench_scaling.rows_of("elu", "elements", points[:1])
    assert alone.formula == "5.01 us, of 1 point" and alone.off_by == 0
    missed = bench_scaling.rows_of("elu", "elements", [(1, [1e-6] * 3), (2, [1e-6] * 3), (4, [4e-6] * 3)])
    assert max(abs(row.off_by) for row in missed) > 0.2


def test_caches_end_where_a_copy_becomes_slow():
    assert bench_scaling.cache_bytes({1: 100.0, 2: 160.0, 4: 150.0, 8: 90.0, 16: 40.0, 32: 30.0}) == 8
    # A stranger took the core for a moment.
    assert bench_scaling.cache_bytes({1: 1.0, 2: 160.0, 4: 10.0, 8: 150.0, 16: 40.0, 32: 30.0}) == 8


# table and pictures

INSTEAD = {"instead": {"what it computes": {"case": "leaky_relu 4 MiB", "dtype": "float32", "layout": "contiguous"}}}


@pytest.mark.parametrize(
    ("fields", "others", "why"),
    [
        ({"bytes": 320}, [], "the cost of a call, 50.0 us more for 320 bytes"),
        ({}, pair(140.0, 100.0, "elu 16 elements", bytes=320), "the cost of a call, 40.0 us more already for 320 bytes"),
        ({}, pair(110.0, 100.0, "elu 16 elements", bytes=320), "no reason found; 40% of the copy's bandwidth, theirs 40%, 0 page faults"),
        ({"faults": 5000.0}, pair(100.0, 90.0, outputs="warm"), "fresh memory, with warm outputs the difference is +10 us (5,000 page"),
        ({"faults": 5000.0}, pair(140.0, 100.0, outputs="warm"), "no reason found; 40% of the copy's bandwidth, theirs 40%, 5,000 page"),
        ({"cores": 1.0}, [], "1.0 cores are busy, theirs 1.9"),
        ({"of_copy": 0.6}, [], "no reason found; 60% of the copy's bandwidth, theirs 40%"),
        ({"of_copy": 0.9}, [], "no reason found"),  # theirs is not near the limit
        ({}, pair(90.0, 50.0, direction="forward") + pair(60.0, 50.0, direction="backward"), "apart: forward +40 us, backward +10 us"),
        (
            INSTEAD,
            pair(120.0, 100.0, "leaky_relu 4 MiB"),
            "; what it computes (with leaky_relu 4 MiB the difference is +20 us, here it is +50)",
        ),
        (
            INSTEAD,
            pair(140.0, 100.0, "leaky_relu 4 MiB"),
            "; not what it computes (with leaky_relu 4 MiB the difference is +40 us, here it is",
        ),
        (INSTEAD, [], "no reason found"),  # it was not measured
    ],
)
def test_rows_that_torch_wins_stand_first_with_a_reason_that_was_measured(fields, others, why):
    rows = [*pair(50.0, 100.0, "swish 4 MiB"), *pair(150.0, 100.0, **fields), *others]
    text = table.markdown(results(rows), [])
    wins = text.partition("## Where torch or the compiler wins")[2].partition("##")[0]
    (line,) = [line for line in wins.splitlines() if line.startswith("* elu 4 MiB: ")]
    assert "torch takes 0.67 of the time" in line and why in line
    assert "swish 4 MiB" not in wins
    # A part is told of with its whole, which is lost.
    assert "elu 4 MiB, forward" not in wins
    assert text.index("## Where torch") < text.index("| case |")


def test_a_part_that_is_lost_has_its_whole_beside_it_and_what_was_kept_for_it():
    whole = [row("rrelu 4 MiB", "eager", median=8000.0, saved_bytes=8 << 20), row("rrelu 4 MiB", median=1000.0, saved_bytes=1 << 17)]
    text = table.markdown(results([*whole, *pair(500.0, 150.0, "rrelu 4 MiB", direction="backward")]), [])
    (line,) = [line for line in text.splitlines() if line.startswith("* rrelu 4 MiB, backward: torch takes 0.30 of the time; ")]
    assert "less is kept for it, 0.131 MB, theirs 8.39, and the rest computed again" in line
    assert line.endswith("the whole takes 1,000 us, theirs 8,000")


def test_rows_within_noise_have_no_reason_and_stand_apart():
    text = table.markdown(results([*pair(101.0, 100.0), *pair(90.0, 50.0, "swish 4 MiB", direction="forward")]), [])
    wins = text.partition("## Where torch or the compiler wins")[2].partition("##")[0]
    beyond, _, within = wins.partition("p20-p80 of both overlap")
    assert "* elu 4 MiB: torch takes 0.99 of the time" in within.splitlines()
    assert "* swish 4 MiB, forward: torch takes 0.56 of the time; " in beyond


def test_table_says_when_something_else_ran():
    assert "something else ran" not in table.markdown(results(pair(50.0, 100.0)), [])
    assert "**1 of 2 rows had less than 0.9 of a core" in table.markdown(results(pair(50.0, 100.0, cores=0.4)), [])


def test_a_scripts_own_lines_stand_with_its_table():
    found = results(pair(50.0, 100.0))
    found["scripts"]["activation"]["header"] = {"neighbours": "none"}
    assert "## activations\n\n`bench/bench_activation.py`, 1 s\n\n* neighbours: none\n\n| case" in table.markdown(found, [])


def test_table_has_the_bytes_that_are_saved():
    text = table.markdown(results([row("elu 4 MiB", "eager", saved_bytes=8_000_000), row(saved_bytes=4_000_000)]), [])
    assert "| 8 MB / 4 MB |" in text
    text = table.markdown(results([row("elu 16 elements", "eager", saved_bytes=64), row("elu 16 elements", saved_bytes=2_100)]), [])
    assert "| 64 B / 2.1 kB |" in text


def test_a_label_says_nothing_twice():
    tensors = row("1,000 tensors of 256, clipping", layout="1000 tensors", direction="in place")
    assert harness.label(tensors) == "1,000 tensors of 256, clipping"
    assert harness.label(tensors | {"case": "ResNet-50, clipping", "layout": "161 tensors"}) == "ResNet-50, clipping, 161 tensors"


def test_other_tables_have_a_column_for_each_figure():
    rows = [
        {"case": "a", "provider": "eager", "saved_mb": 77.0, "share": 0.0, "errors": {"y": [0.5, 1.0]}},
        {"case": "b", "provider": "gradkernels", "saved_mb": None, "share": -0.0102, "errors": {"y": [0.25, 2.0], "grad_x": [1.0, 3.0]}},
    ]
    assert list(table.table_of_fields(rows)) == [
        "| case | provider | saved MB | added | y | grad_x |",
        "|---|---|---:|---:|---:|---:|",
        "| a | eager | 77 | +0.0% | 0.5 / 1 |  |",
        "| b | gradkernels |  | -1.0% | 0.25 / 2 | 1 / 3 |",
    ]


def test_steps_that_torch_is_ahead_in_are_told_of_with_what_differs():
    def of(case, provider, median, convolution):
        times = {"median_ms": median, "p20_ms": median - 1, "p80_ms": median + 1}
        return {"case": case, "provider": provider, **times, "times_eager": 1.0, "convolution_ms": convolution, "rest_ms": 2.0}

    rows = [
        of("ResNet-18", "eager", 100.0, 80.0),
        of("ResNet-18", "gradkernels", 125.0, 95.5),
        of("ResNet-18", "gradkernels, recompute", 101.0, 80.0),
    ]
    rows += [of("U-Net", "eager", 100.0, 80.0), of("U-Net", "gradkernels", 90.0, 80.0)]
    # What a monitor adds is no loss: its rows have no times_eager.
    monitored = [{name: value for name, value in each.items() if name != "times_eager"} for each in rows]
    found = {
        "header": {"machine": MACHINE},
        "scripts": {"training": {"title": "a step", "rows": rows}, "monitor": {"title": "b", "rows": monitored}},
    }
    assert table.losses(found) == (
        ["a step of ResNet-18: torch takes 0.80 of the time; convolution +15.5 ms, rest +0.0 ms"],
        ["a step of ResNet-18: torch takes 0.99 of the time beside gradkernels, recompute"],
    )
    for script in found["scripts"].values():
        script["seconds"] = 1.0
    assert "\n* a step of ResNet-18: torch takes 0.80 of the time;" in table.markdown(found, [])


def test_bars_within_noise_are_pale_and_panels_have_one_scale():
    found = results([*pair(100.0, 101.0), *pair(100.0, 90.0, "swish 4 MiB"), *pair(100.0, 400.0, "rrelu 4 MiB")])
    found["scripts"]["clip_grad"] = {"title": "clipping", "rows": pair(100.0, 3000.0, "ResNet-50"), "seconds": 1.0}
    figure = pictures.ratios(found)
    first, second = figure.axes
    slow, same, fast = (bar.get_facecolor() for bar in first.patches)
    assert (slow[3], same[3], fast[3]) == (1.0, pictures.WITHIN_NOISE, 1.0)
    assert slow[:3] != fast[:3] == same[:3]
    assert first.get_xlim() == second.get_xlim() and first.get_xlim()[1] > 30
    pictures.plt.close(figure)


# neighbours


def test_neighbours_compute_what_torch_does_and_the_others_have_a_reason(monkeypatch):
    monkeypatch.setattr(neighbours, "SHAPES", ((4, 6, 5, 5),))
    bn = torch.nn.BatchNorm2d(6)
    torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    found = neighbours.of_batch_norm_act(bn, "leaky_relu", (4, 6, 5, 5), torch.float32, False)
    assert found
    expected = torch.nn.functional.leaky_relu(bn(x))
    for name, module in found.items():
        neighbours.prove(name, {"y": module(x)}, {"y": expected})
    with pytest.raises(SystemExit, match="nothing is timed"):
        neighbours.prove("wrong", {"y": expected + 1}, {"y": expected})
    assert neighbours.of_batch_norm_act(bn, "leaky_relu", (4, 6, 5, 5), torch.float32, True) == {}
    # Some elements may lie beyond a kink; one in fifty is another function.
    wrong = {"y": torch.where(torch.rand_like(expected) < 0.02, -expected, expected)}
    with pytest.raises(SystemExit, match="nothing is timed"):
        neighbours.prove("wrong in places", wrong, {"y": expected})
    monkeypatch.setattr(neighbours, "PACKAGES", ("json", "no_such_package"))
    monkeypatch.setattr(neighbours.importlib.metadata, "version", lambda name: "1.0")
    assert neighbours.found() == "json 1.0; no no_such_package (ModuleNotFoundError: No module named 'no_such_package')"


def test_pictures_are_drawn(tmp_path):
    found = results([*pair(100.0, 200.0, compiled=150.0), *pair(100.0, 80.0, "swish 64 MiB"), row(outputs="warm")])
    points = [(n, [1e-5 * n] * 3) for n in (1, 2, 4)]
    rows = [vars(each) for each in bench_scaling.rows_of("all_reduce", "processes", points, offset=1)]
    found["scripts"]["scaling"] = {"title": "cost against size", "rows": rows, "seconds": 1.0}
    drawn = pictures.draw(found, tmp_path, "machine")
    assert [path.name for path in drawn] == [f"machine_{what}.png" for what in ("ratio", "roofline", "scaling")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    # Of a GPU alone.
    of_a_gpu = results([*pair(100.0, 200.0, outputs="cold L2"), *pair(80.0, 90.0, outputs="warm L2")])
    assert len(pictures.draw(of_a_gpu, tmp_path, "gpu")) == 2
    (legend,) = [axis.get_legend() for axis in pictures.roofline(of_a_gpu).axes]
    assert {text.get_text() for text in legend.get_texts()} >= {"cold L2", "warm L2"} and "in place" not in str(legend.get_texts())


# the suite

SCRIPT = """
import json, sys
from pathlib import Path
file = Path(sys.argv[sys.argv.index("--json") + 1])
if not Path(__file__).with_suffix(".fails").exists():
    commit = Path(__file__).with_name("commit").read_text()
    header = {{"machine": {machine!r}, "commit": commit, "copy, 64 MiB, warm, GB/s read + written": 20.0, "of its own": {stem!r}}}
    file.write_text(json.dumps({{"title": {stem!r}, "header": header, "rows": [{{"case": "a", "seconds": 1.5}}]}}))
else:
    print("1/2 half of it", file=sys.stderr)
    sys.exit("the other half is wrong")
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder with scripts of two operators, of a GPU and of the build, for which suite.main() runs."""
    here = tmp_path / "bench"
    here.mkdir()
    monkeypatch.setattr(suite, "HERE", here)
    monkeypatch.setattr(suite, "machine", lambda: MACHINE)
    for stem in ("activation", "build", "clip_grad"):
        (here / f"bench_{stem}.py").write_text(SCRIPT.format(machine=MACHINE, stem=stem))
    (here / "commit").write_text("aaa")
    return here


def recorded(scripts, name="a-machine"):
    file = scripts / "results" / f"{name}.json"
    found = json.loads(file.read_text())
    return found, {stem: part["header"] for stem, part in suite.parts_of(found).items()}, file.with_suffix(".md").read_text()


def test_what_is_not_measured_stays_as_it_was_measured(scripts, capsys):
    assert suite.main([]) == 0
    found, headers, _ = recorded(scripts)
    # A build takes minutes: it is measured when it is named.
    assert list(found["scripts"]) == ["activation", "clip_grad"]
    assert found["header"]["commit"] == "aaa"
    assert found["scripts"]["activation"]["header"] == {} and found["scripts"]["clip_grad"]["header"] == {"of its own": "clip_grad"}
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 of 2 scripts in ")
    (scripts / "commit").write_text("bbb")
    assert suite.main(["--only", "build"]) == 0
    assert suite.main(["--only", "clip_grad"]) == 0
    found, headers, text = recorded(scripts)
    assert {stem: header["commit"] for stem, header in headers.items()} == {"activation": "aaa", "build": "bbb", "clip_grad": "bbb"}
    assert {header["of its own"] for header in headers.values()} == {"activation", "build", "clip_grad"}
    assert found["header"]["commit"] == "bbb" and found["scripts"]["activation"]["header"]["commit"] == "aaa"
    assert "* commit: bbb" in text.partition("## activation")[0] and "* commit: aaa" in text.partition("## activation")[2]
    assert not list((scripts / "results").glob("*.new"))


def test_a_script_that_fails_loses_nothing_and_is_told_of(scripts, capsys):
    assert suite.main([]) == 0
    (scripts / "commit").write_text("bbb")
    (scripts / "bench_activation.fails").touch()
    assert suite.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("; activation failed")
    _, headers, text = recorded(scripts)
    assert {stem: header["commit"] for stem, header in headers.items()} == {"activation": "aaa", "clip_grad": "bbb"}
    told = "**bench/bench_activation.py did not end when it was last run (the other half is wrong): "
    assert f"{told}its figures below are what it left, or of an earlier run.**" in text
    (scripts / "results" / "a-machine.json").unlink()
    assert suite.main([]) == 1
    assert f"{told}there are no figures of it.**" in recorded(scripts)[2]
    # Nothing of torch is there to be compared with.
    assert "Where torch" not in recorded(scripts)[2]
    assert suite.main(["--only", "clip_grad"]) == 0
    assert list(recorded(scripts)[0]["failed"]) == ["activation"] and told in recorded(scripts)[2]
    (scripts / "bench_activation.fails").unlink()
    assert suite.main(["--only", "activation"]) == 0
    assert recorded(scripts)[0]["failed"] == {}


def test_what_was_measured_before_a_run_is_stopped_is_there(scripts, monkeypatch, capsys):
    run_script = suite.run_script

    def stopped_in_the_second(script, *rest):
        if script.stem == "bench_clip_grad":
            raise KeyboardInterrupt
        return run_script(script, *rest)

    monkeypatch.setattr(suite, "run_script", stopped_in_the_second)
    assert suite.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("clip_grad failed")
    found, _, text = recorded(scripts)
    assert list(found["scripts"]) == ["activation"] and "bench_clip_grad.py did not end when it was last run (stopped)" in text


def test_a_quick_run_does_not_touch_what_was_measured(scripts, capsys):
    assert suite.main([]) == 0
    before = (scripts / "results" / "a-machine.json").read_bytes()
    with pytest.raises(SystemExit):
        suite.main(["--quick", "--out", str(scripts / "results")])
    assert "was measured, and a quick run's numbers mean nothing" in capsys.readouterr().err
    assert suite.main(["--quick", "--out", str(scripts / "quick")]) == 0
    assert json.loads((scripts / "quick" / "a-machine.json").read_text())["quick"]
    # What is measured does not stand beside a quick run's numbers.
    assert suite.main(["--only", "activation", "--out", str(scripts / "quick")]) == 0
    assert list(json.loads((scripts / "quick" / "a-machine.json").read_text())["scripts"]) == ["activation"]
    assert (scripts / "results" / "a-machine.json").read_bytes() == before


def test_a_folder_may_hold_other_files(scripts, capsys):
    folder = scripts / "quick"
    folder.mkdir()
    others = {"list.json": "[]", "package.json": '{"name": "x"}', "text.json": "no JSON"}
    for name, text in others.items():
        (folder / name).write_text(text)
    assert suite.main(["--quick", "--out", str(folder)]) == 0
    assert {name: (folder / name).read_text() for name in others} == others
    # Results that say nothing of it were measured, and what is none in their place stays.
    for text, why in (('{"header": {}, "scripts": {}}', "was measured"), ("<<<<<<< HEAD", "holds no results of a benchmark")):
        (folder / "a-machine.json").write_text(text)
        with pytest.raises(SystemExit):
            suite.main(["--quick", "--out", str(folder)])
        assert f"a-machine.json {why}" in capsys.readouterr().err and (folder / "a-machine.json").read_text() == text


def test_parts_keep_their_headers():
    headers = {"activation": {"machine": MACHINE, "left out": None}, "clip_grad": {"machine": MACHINE}, "convert": {"machine": "another"}}
    found = suite.joined({stem: {"title": stem, "rows": [], "header": header} for stem, header in headers.items()})
    assert found["header"] == {"machine": MACHINE}
    assert {stem: part["header"] for stem, part in suite.parts_of(found).items()} == headers
    # Older files have parts without one.
    del found["scripts"]["clip_grad"]["header"]
    assert suite.parts_of(found)["clip_grad"]["header"] == headers["clip_grad"]


def test_a_script_does_not_outlive_a_run_that_is_stopped(tmp_path):
    (tmp_path / "bench_x.py").write_text("import os, sys, time; print('1/2', os.getpid(), file=sys.stderr, flush=True); time.sleep(60)")
    told = []

    def stop(share, what):
        told.append(int(what))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite.run_script(tmp_path / "bench_x.py", True, tmp_path / "x.json", stop)
    # Not even as a zombie.
    with pytest.raises(ProcessLookupError):
        os.kill(told[0], 0)


def test_a_script_that_is_killed_says_where(tmp_path):
    (tmp_path / "bench_x.py").write_text("import os, sys; print('1/2 elu', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)")
    told = []
    assert (
        suite.run_script(tmp_path / "bench_x.py", True, tmp_path / "x.json", lambda *each: told.append(each)) == "signal 9, after: 1/2 elu"
    )
    assert told == [(0.5, "elu")]


def test_a_gpu_has_a_file_of_its_own(scripts):
    (scripts / "bench_cuda.py").write_text(SCRIPT.format(machine="A GPU, " + MACHINE, stem="cuda"))
    assert suite.main([]) == 0
    assert list(recorded(scripts)[0]["scripts"]) == ["activation", "clip_grad"]
    assert list(recorded(scripts, "a-gpu")[0]["scripts"]) == ["cuda"]
    (scripts / "bench_activation.fails").touch()
    assert suite.main([]) == 1
    assert list(recorded(scripts)[0]["failed"]) == ["activation"] and recorded(scripts, "a-gpu")[0]["failed"] == {}


@pytest.mark.parametrize("why", ["fails", "is stopped"])
def test_what_a_script_wrote_before_it_failed_is_kept(why, scripts, capsys):
    (scripts / "bench_cuda.py").write_text(SCRIPT.format(machine="A GPU, " + MACHINE, stem="cuda"))
    assert suite.main(["--only", "cuda"]) == 0
    with open(scripts / "bench_cuda.py", "a") as script:
        stop = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
        script.write("sys.exit('failed: 1 of 2 cases')" if why == "fails" else stop)
    (scripts / "commit").write_text("bbb")
    assert suite.main(["--only", "cuda"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("; cuda failed")
    results, parts, _ = recorded(scripts, "a-gpu")
    assert list(results["failed"]) == ["cuda"] and parts["cuda"]["commit"] == "bbb"


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
    if name in harness.ALONE:
        pytest.skip("a build is never quick")
    command = [sys.executable, "-m", "gradkernels", "bench", "--quick", "--only", name, "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert found["quick"] and found["scripts"][name]["rows"]
    assert (tmp_path / f"{file.stem}.md").read_text().startswith("# Benchmark on ")
