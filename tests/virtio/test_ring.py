"""The virtqueue engine in C, under the sanitizers: honest, fast and hostile drivers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CEXT = Path(__file__).resolve().parents[2] / "cext"
SOURCES = ("virtio/memory.c", "virtio/ring.c", "virtio/inflight.c", "tests/ring_test.c")
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wconversion"]
SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    built = tmp_path_factory.mktemp("ring") / "ring_test"
    command = [compiler, *WARNINGS, *SANITIZERS, f"-I{CEXT}"]
    command += [*(str(CEXT / name) for name in SOURCES), "-pthread", "-o", str(built)]
    subprocess.run(command, check=True, timeout=120)
    return built


def run(program: Path, rounds: int, seed: int) -> None:
    done = subprocess.run(
        [program, str(rounds), str(seed)], capture_output=True, text=True, timeout=1800
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("seed", range(1, 4))
def test_rings_hold_against_honest_fast_and_hostile_drivers(program: Path, seed: int) -> None:
    run(program, 500, seed)


@pytest.mark.proof
def test_a_million_hostile_rings(program: Path) -> None:
    for seed in range(100, 110):
        run(program, 100_000, seed)
