"""bench/on_gpu.sh without a GPU: a machine with one is lent for minutes, so what can go wrong there is rehearsed here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "on_gpu.sh"
# Python, for the parts of the script: `sleep` hangs, and does not end by Ctrl-C alone.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> calls
case "$*" in
  *is_available*) exit ${AVAILABLE:-0} ;;
  *setup.py*) exit ${BUILD:-0} ;;
  *profile_cuda.py*) echo measured > build/on_gpu/profile.json; trap '' INT; [ -z "${HANGS:-}" ] || sleep 60 ;;
  *pytest*) echo tested > build/on_gpu/tests.xml; echo "${SAYS:-8 passed}" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    if shutil.which("timeout") is None or subprocess.run(["env", "--default-signal=INT", "true"], check=False).returncode != 0:
        pytest.skip("needs timeout and env of coreutils 8.31")
    programs = {"python3": PYTHON, "nvidia-smi": "#!/bin/sh\necho 9.0\n", "nvcc": "#!/bin/sh\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    shutil.copy(SCRIPT, tmp_path / "bench")

    def call(*parts, **settings):
        environment = (
            os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python3", "OUT": str(tmp_path / "out")} | settings
        )
        done = subprocess.run(
            ["bash", "bench/on_gpu.sh", *parts], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
        return done, calls, {path.name for path in (tmp_path / "out").iterdir()}

    return call


def test_the_parts_that_decide_most_come_first(run):
    done, calls, files = run()
    assert done.returncode == 0 and "failed: nothing" in done.stdout, done.stdout + done.stderr
    places = [calls.index(part) for part in ("setup.py", "-k a_little", "profile_cuda.py", "--junitxml")]
    assert places == sorted(places) and files == {"profile.json", "smoke.log", "tests.xml"}


def test_nothing_runs_after_a_failed_build(run):
    done, calls, _ = run(BUILD="1")
    assert done.returncode == 1 and "build: " in done.stdout and "pytest" not in calls and "profile" not in calls


def test_without_torchs_gpu_nothing_passes(run):
    done, calls, _ = run("smoke", AVAILABLE="1")
    assert done.returncode == 1 and "torch finds no GPU" in done.stdout and "pytest" not in calls


def test_a_smoke_test_that_is_skipped_fails(run):
    done, _, _ = run("smoke", SAYS="8 skipped, 109 deselected")
    assert done.returncode == 1 and "failed: smoke" in done.stdout


def test_a_limit_that_is_no_number_is_refused(run):
    done, calls, _ = run(ENDS="soon")
    assert done.returncode == 2 and "ENDS is a number of seconds, not soon" in done.stdout and not calls


def test_a_part_that_hangs_is_stopped_and_what_was_written_is_kept(run):
    done, _, files = run("smoke", "profile", "test", HANGS="1", ENDS="2", KILL_AFTER="1")
    assert done.returncode == 1 and "failed: profile, test on a GPU" in done.stdout, done.stdout
    assert files == {"profile.json", "smoke.log", "tests.xml"}
