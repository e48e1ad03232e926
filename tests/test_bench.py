"""The benchmark measures as it says (harness.py), reports what was measured (report.py) and keeps it (suite.py)."""

import argparse
import itertools
import math
import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench_batch_norm_act
import bench_training
import harness
import report
import suite
from gradkernels import __main__ as command_line

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")} - {"cuda", "networks"}
HEAD = {"machine": "A machine, x86_64", "instruction set": "avx512 (torch: AVX512)"}
PART = {"title": "title", "header": HEAD}


def row(provider="gradkernels", median=100.0, noise=0.02, case="4 MiB", **fields):
    usual = {"direction": report.WHOLE, "dtype": "float32", "layout": "contiguous", "outputs": "fresh", "blocks": 11, "bytes": 20_000_000}
    spread = {"p20_us": median * (1 - noise), "p80_us": median * (1 + noise)}
    return report.Row("elu", case, provider, median_us=median, **usual | spread | fields)


def tiny_case(name="tiny", prove=lambda: None, elements=1024, **fields):
    x = torch.randn(elements)
    providers = {"eager": x.clone, "gradkernels": lambda: x + 0}
    return harness.Case("elu", name, providers, prove, bytes=2 * x.nbytes, copied=x.nbytes, **fields)


def test_a_wrong_answer_is_refused():
    exact = {"y": torch.rand(100, dtype=torch.float64)}
    right = {"y": exact["y"].float()}
    harness.prove(right, right, exact)
    for error in (1e-3, float("nan")):
        wrong = {"y": right["y"].clone()}
        wrong["y"][7] += error
        with pytest.raises(harness.WrongAnswer, match="nothing is timed"):
            harness.prove(wrong, right, exact)
    # torch's own error is allowed.
    harness.prove(right, right, {"y": exact["y"] + 1e-3})


def test_a_network_that_conversion_changes_is_refused(monkeypatch):
    model = bench_training.EfficientNetBlocks()
    bench_training.prove(model)
    monkeypatch.setattr(bench_training.gk, "convert", lambda model: next(model.parameters()).data.mul_(1 + 1e-5))
    with pytest.raises(harness.WrongAnswer, match=r"0\.0\.weight of gradkernels differs"):
        bench_training.prove(model)


def test_what_fails_is_not_timed_and_the_others_are(monkeypatch, tmp_path, capsys):
    def wrong():
        raise harness.WrongAnswer("y is wrong; nothing is timed\nand more")

    def run(quick, seconds, cases):
        harness.run("activations", cases, argparse.Namespace(quick=quick, seconds=seconds, out=tmp_path), dict(HEAD))

    monkeypatch.setattr(sys, "argv", ["bench_activation.py"])
    cases = [partial(tiny_case, "first"), partial(tiny_case, "second", wrong), partial(tiny_case, "third")]
    with pytest.raises(SystemExit, match=r"second .*: WrongAnswer: y is wrong; nothing is timed$"):
        run(True, None, cases)
    found = report.read(tmp_path / "a-machine")["activation"]
    assert {each.case for each in found["rows"]} == {"first", "third"} and "| elu, first |" in capsys.readouterr().out
    assert "second" in found["header"]["failed"] and "left out" not in found["header"]
    # A script leaves out the cases that would begin after its time.
    run(False, 1e-9, cases[::2])
    assert report.read(tmp_path / "a-machine")["activation"]["header"]["left out"].startswith("1 of 2 cases")


# At first 11 blocks of 0.1 s and a quarter, twice. A block of the slow one is no shorter than two calls, 20 ms.
@pytest.mark.parametrize(("seconds", "blocks", "most"), [(60.0, 11, 2.8), (1.4, 11, 1.4), (0.2, 6, 0.2), (-1.0, 3, 0.1)])
def test_blocks_take_turns_and_become_shorter_and_then_fewer(monkeypatch, seconds, blocks, most):
    calls, now = [], [100.0]

    def call(name, takes):
        calls.append(name)
        now[0] += takes

    in_ns = {f"{name}_ns": lambda: round(now[0] * 1e9) for name in ("perf_counter", "process_time")}
    monkeypatch.setattr(harness, "time", SimpleNamespace(monotonic=lambda: now[0], **in_ns))
    takes = {"fast": 1e-4, "slow": 1e-2}
    measured = harness.blocks_of({name: partial(call, name, each) for name, each in takes.items()}, 11, 0.1, 100.0 + seconds)
    assert {name: len(each) for name, each in measured.items()} == dict.fromkeys(takes, blocks) and now[0] - 100 <= most
    assert all((block.seconds, block.cores) == pytest.approx((each, 1)) for name, each in takes.items() for block in measured[name])
    # Before the first turn each is called twice. The provider that begins a turn ends the next one.
    assert [name for name, _ in itertools.groupby(calls[4:])] == [("fast", "slow")[turn % 2] for turn in range(blocks + 1)]


@pytest.mark.skipif(harness.c_library() is None, reason="the states of memory are glibc's")
def test_large_outputs_are_measured_in_both_states_which_differ_in_page_faults():
    elements = (40 << 20) // 4
    found = dict(harness.on_cpu(tiny_case(elements=elements), harness.time.monotonic() + 2, True))
    fresh, warm = (found[state]["eager"][-1].faults for state in ("fresh", "warm"))
    # A huge page may replace 512 small ones.
    assert fresh >= 4 * elements / (2 << 20) / 2 and warm < fresh / 4
    assert [state for state, _ in harness.on_cpu(tiny_case(elements=elements, in_place=True), 0.0, True)] == ["in place"]


def test_all_scripts_together_keep_the_times_that_are_promised():
    assert sum(harness.SECONDS[stem] + harness.START_SECONDS for stem in SCRIPTS) < 960
    assert (harness.QUICK_SECONDS + harness.START_SECONDS) * len(SCRIPTS) < 60


def test_the_seed_gives_the_drawn_cases_again():
    first, again, other = (list(bench_batch_norm_act.drawn(random.Random(seed))) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 10
    for shape, act, settings in first:
        assert (1 << 16) <= math.prod(shape) < (1 << 23)
        assert act in bench_batch_norm_act.ACTS
        assert {"residual"} <= settings.keys() <= {"residual", "layout"}


def test_the_results_of_onednn_are_checked(monkeypatch):
    make = partial(bench_batch_norm_act.case, (2, 24, 5, 5), "relu", layout="channels_last")
    make().prove()
    monkeypatch.setattr(bench_batch_norm_act, "with_onednn", lambda x, *_: ({"oneDNN": lambda: None}, {"y": torch.zeros_like(x)}))
    with pytest.raises(AssertionError, match="not close"):
        make().prove()


def test_figures_of_a_row():
    blocks = [harness.Block(each * 1e-6, faults=each, cores=1.5) for each in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]
    case = tiny_case(extra={"eager": {"kept_bytes": 7}})
    eager, copy = harness.rows_from(case, "warm", {"eager": blocks, "copy": [harness.Block(1e-6)] * 3})
    assert (eager.p20_us, eager.median_us, eager.p80_us, eager.blocks) == pytest.approx((2.0, 3.5, 5.0, 6))
    assert (eager.faults, eager.cores, eager.kept_bytes, eager.bytes, copy.bytes, copy.cores) == (3.5, 1.5, 7, 8192, 8192, None)

    ours = row(kept_bytes=4_000_000, part_us=20.0)
    # 16 MB in 50 us are 320 GB/s, the row's 20 MB in 100 us are 200.
    rivals = {"eager": row("eager", 200.0, faults=5e3, kept_bytes=8_000_000, part_us=60.0), "copy": row("copy", 50.0, bytes=16_000_000)}
    assert report.share_of_copy(ours, rivals) == 0.625
    texts = ["elu, 4 MiB", "", "200 us", "150 us", "100 us (98-102)", "2.00", "1.50", "5,000 / 0", "200.0", "62%", "3.00", "8 / 4"]
    assert list(report.cells(ours, rivals | {"torch.compile": row("torch.compile", 150.0)}).values()) == texts
    other = report.cells(row("gradkernels, recompute", 2.5e6, outputs="warm", dtype="bfloat16", bytes=0), rivals)
    assert list(other.values())[:5] == ["elu, 4 MiB, bfloat16, warm outputs", "recompute", "200 us", "", "2.5 s (2.45-2.55)"]


def test_a_text_begins_with_what_failed_and_what_is_lost(monkeypatch):
    plain = report.markdown({"activation": PART | {"rows": [row(), row("eager")]}}, "a.png")
    assert "**" not in plain and "In none of the rows" in plain
    monkeypatch.setitem(report.REASONS, "elu, slow", "it is slow")
    rows = [row(case="fast"), row("eager", 200.0, case="fast"), row(case="slow", cores=0.4), row("eager", 50.0, case="slow")]
    near = {"gradkernels": 100.0, "eager": 99.0, "torch.compile": 90.0, "gradkernels, recompute": 98.0}
    rows += [row(*each, case="near") for each in near.items()]
    text = report.markdown(
        {"activation": {"title": "title", "header": HEAD | {"failed": "elu: wrong", "quick": True}, "rows": rows}}, "a.png"
    )
    first, _, rest = text.partition("## Where torch or its compiler wins\n")
    said = ("Its numbers mean nothing", "**activation, failed: elu: wrong**", "**1 of 8 rows had less than 0.9 of a core")
    assert all(each in first for each in said)
    beyond, _, rest = rest.partition("Faster than ours, but p20-p80 overlap")
    of_recompute = "* elu, near: torch.compile takes 0.92 of the time of gradkernels, recompute"
    lost = ["* elu, slow: torch takes 0.50 of the time; it is slow", "* elu, near: torch.compile takes 0.90 of the time", of_recompute]
    assert beyond.strip().splitlines() == lost
    within, _, tables = rest.partition("## title")
    assert "* elu, near: torch takes 0.99 of the time\n" in within and "| elu, fast | " in tables
    assert "Times torch: geometric mean 1.00, least 0.50, 3 rows." in tables


# beyond noise, within 10 %; beyond both; 30 % and all of it noise
@pytest.mark.parametrize(("median", "noise", "word"), [(109, 0.01, "slower"), (112, 0.01, "REGRESSED"), (130, 0.25, None)])
def test_compare_separates_change_from_noise_and_does_not_blame_torch(tmp_path, capsys, median, noise, word):
    for folder, ours, torchs in (("before", row(), 100.0), ("after", row(median=median, noise=noise), 200.0)):
        report.write("activation", PART | {"rows": [ours, row("eager", torchs), row(case=folder)]}, tmp_path / folder)
    regressed = suite.main(["--compare", *(str(tmp_path / folder / "a-machine") for folder in ("before", "after"))])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "gradkernels: elu" in line] == ([word] if word else [])
    assert any("+100.0%" in line and line.startswith("slower") for line in lines) and regressed == (word == "REGRESSED")
    assert lines[-1].startswith(f"2 rows in both, {1 + (word is not None)} changed beyond noise, {regressed} regressed")


def test_figures_of_readme_and_docs_are_those_of_a_recorded_run():
    """A row has the times and the ratio of one case, and in a column "with AVX2" the ratio of this case in the other run."""
    machines, recorded, checked = {}, {}, 0
    for folder in {file.parent for file in (ROOT / "bench" / "results").glob("*/*.json")}:
        groups = [rivals for rivals in report.grouped(report.timed(report.read(folder).values())) if "gradkernels" in rivals]
        machines[folder.name] = {rivals["eager"].what: report.cells(rivals["gradkernels"], rivals) for rivals in groups}
    for name, cases in machines.items():
        for case, texts in cases.items():
            row = (texts["torch"], texts["ours (p20-p80)"].partition(" (")[0], texts["times torch"])
            recorded.setdefault(row, set()).add(machines.get(f"{name}-avx2", {}).get(case, {}).get("times torch"))
    table = re.compile(r"^\|[^|]*\|[^|]*\|[^|]*\| times as fast \|( with AVX2 \|)?.*\n\|[-|: ]*\n((?:\|.*\n)*)", flags=re.M)
    for file in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for has_avx2, rows in table.findall(file.read_text()):
            for cells in ([cell.strip() for cell in line.split("|")[2:6]] for line in rows.splitlines()):
                assert tuple(cells[:3]) in recorded, f"{file}: {cells}"
                assert not has_avx2 or cells[3] in recorded[tuple(cells[:3])], f"{file}: {cells}"
                checked += 1
    assert checked > 5


def test_figures_of_the_models_of_libraries_are_those_of_the_record():
    (record,) = (ROOT / "bench" / "results").glob("*/real_models.json")
    head = report.read(record.parent)["real_models"]["header"]
    text = " ".join((ROOT / "docs" / "guide" / "convert.md").read_text().split())
    found = re.findall(r"In (\d+) models of .* ([\d,]+) activations .* `convert` fuses ([\d.]+%) of them", text.replace(" %", "%"))
    assert found == [(str(head["models"]), f"{head['pairs']:,}", head["share"])]


SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, {bench!r})
import report
here = Path(__file__)
here.with_suffix(".fails").exists() and sys.exit("it fails")
head = {head!r} | {{name: os.environ[name] for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if name in os.environ}}
head |= {{"commit": here.with_name("commit").read_text()}} | ({{"quick": True}} if "--quick" in sys.argv else {{}})
row = ("elu", "4 MiB", "gradkernels", report.WHOLE, "float32", "contiguous", "fresh", 1.0, 1.0, 1.0, 3, 0)
part = {{"title": here.stem, "header": head, "rows": [report.Row(*row), report.Row(*row[:2], "eager", *row[3:])]}}
report.write(here.stem.removeprefix("bench_"), part, Path(sys.argv[2]))
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder with two scripts, which suite.main() runs."""
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    for stem in ("activation", "clip_grad"):
        (tmp_path / f"bench_{stem}.py").write_text(SCRIPT.format(bench=str(ROOT / "bench"), head=HEAD))
    (tmp_path / "commit").write_text("aaa")
    return tmp_path


def heads(name="commit", machine="a-machine"):
    return [found["header"].get(name) for found in report.read(suite.HERE / "results" / machine).values()]


def test_a_script_that_fails_or_does_not_run_leaves_the_others(scripts, monkeypatch, capsys):
    assert suite.main([]) == 0 and heads() == ["aaa", "aaa"]
    (scripts / "commit").write_text("bbb")
    (scripts / "bench_activation.fails").touch()
    assert suite.main([]) == 1 and capsys.readouterr().out.endswith("failed: activation\n") and heads() == ["aaa", "bbb"]
    text = (scripts / "results" / "a-machine.md").read_text()
    assert "commit aaa" in text.partition("## bench_clip")[0] and "commit bbb" in text.partition("## bench_clip")[2]
    assert (scripts / "results" / "a-machine.png").read_bytes().startswith(b"\x89PNG")
    (scripts / "bench_activation.fails").unlink()
    assert suite.main(["--only", "activation"]) == 0 and heads() == ["bbb", "bbb"]
    # A quick run's numbers stand apart, wherever they are written.
    (scripts / "commit").write_text("ccc")
    assert suite.main(["--quick", "--out", str(scripts / "results")]) == 0
    assert heads() == ["bbb", "bbb"] and heads(machine="a-machine-quick") == ["ccc", "ccc"]

    def stopped_in_the_second(command, run=subprocess.run, **settings):
        if "clip_grad" in command[1]:
            raise KeyboardInterrupt
        return run(command, **settings)

    monkeypatch.setattr(suite.subprocess, "run", stopped_in_the_second)
    assert suite.main([]) == 1 and heads() == ["ccc", "bbb"] and "commit ccc" in (scripts / "results" / "a-machine.md").read_text()


def test_an_instruction_set_reaches_the_processes(scripts, monkeypatch, capsys):
    monkeypatch.setattr(suite, "PRINT_ISA", "print('avx2')")
    assert suite.main(["--isa", "avx2", "--only", "clip_grad"]) == 0
    # Its results have a folder of their own, here named after HEAD's instruction set.
    found = [heads(name, "a-machine-avx512") for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")]
    # A set that the processor lacks is an error before anything is measured.
    with pytest.raises(SystemExit):
        suite.main(["--isa", "base"])
    assert found == [["avx2"], ["AVX2"]] and "--isa base cannot be measured on this processor" in capsys.readouterr().err and not heads()


def test_command_says_where_the_benchmark_is_when_it_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line.gradkernels, "__file__", str(tmp_path / "gradkernels" / "__init__.py"))
    assert command_line.main(["bench", "--quick"]) == 2 and "not part of the installed package" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("extra", [("--only", "batch_norm_act", "--isa", "base"), ()])
def test_a_quick_run(extra, tmp_path):
    command = [sys.executable, "-m", "gradkernels", "bench", "--quick", "--out", str(tmp_path), *extra]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found, (text,) = report.read(next(path for path in tmp_path.iterdir() if path.is_dir())), tmp_path.glob("*.md")
    assert set(found) - {"cuda", "networks"} == ({"batch_norm_act"} if extra else SCRIPTS) and all(each["rows"] for each in found.values())
    assert not extra or found["batch_norm_act"]["header"]["instruction set"] == "base (torch: DEFAULT)"
    assert text.read_text().startswith("# Benchmark on ")
