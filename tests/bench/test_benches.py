"""The benches that need no guest still run, each for a moment: for its lines, not its figures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest


def printed(bench: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"tests.bench.bench_{bench}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_registers_are_measured_against_c() -> None:
    assert "bulk / C, unrolled" in printed("mmio", "--rounds", "1", "--count", "2000")


@pytest.mark.slow
def test_starting_is_measured_against_python() -> None:
    lines = printed("startup", "--runs", "1").splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["python", "--version"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_shared_queue_is_measured_with_one_thread_and_with_four() -> None:
    lines = printed("shared_queue", "--rounds", "1", "--seconds", "0.05", "--delays-us", "0")
    assert "four to one" in lines


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_a_driver_that_wakes_late_is_measured() -> None:
    lines = printed("late_driver", "--rounds", "1", "--seconds", "0.05", "--late", "0,50")
    assert [line.split()[0] for line in lines.splitlines()] == ["0", "50"]
