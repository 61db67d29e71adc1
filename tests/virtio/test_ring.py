"""The virtqueue engine in C, under the sanitizers: honest, fast and hostile drivers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CEXT = Path(__file__).resolve().parents[2] / "cext"
RING = ("memory", "ring", "packed", "packed_log", "inflight")
PROGRAMS = ("ring_test", "packed_test")
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wconversion"]
SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(name: str, folder: Path, options: list[str]) -> Path:
    """A test program of cext/tests with the ring engine."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    sources = [*(CEXT / f"virtio/{part}.c" for part in RING), CEXT / f"tests/{name}.c"]
    command = [compiler, *options, f"-I{CEXT}", *map(str, sources), "-pthread"]
    subprocess.run([*command, "-o", str(folder / name)], check=True, timeout=120)
    return folder / name


@pytest.fixture(scope="session", params=PROGRAMS)
def program(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return build(request.param, tmp_path_factory.mktemp("ring"), [*WARNINGS, *SANITIZERS])


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


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_driver_in_a_thread_of_its_own_races_with_nothing(name: str, tmp_path: Path) -> None:
    """Under TSan, which does not know fences: what it knows are the words that both ends use."""
    options = ["-std=gnu11", "-g", "-O1", "-fsanitize=thread", "-Wno-tsan"]
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }")
    try:
        compiler = ["cc", *options[3:4], str(probe), "-o", str(tmp_path / "probe")]
        subprocess.run(compiler, check=True, capture_output=True)
        subprocess.run([tmp_path / "probe"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no thread sanitizer here")
    run(build(name, tmp_path, options), 200, 1)
