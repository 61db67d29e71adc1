"""The C of the NVMe queues, under the sanitizers, against a controller that is a thread."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CEXT = Path(__file__).resolve().parents[3] / "cext"
NAMES = (
    "vfio/fork.c",
    "nvme/nvme_queue.c",
    "nvme/nvme_load.c",
    "tests/nvme_queue_test.c",
    "tests/nvme_load_test.c",
)
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["address,undefined", "thread"]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_queues_hold_under_the_sanitizers(tmp_path: Path, sanitizer: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path / "nvme_queue_test"
    sources = [CEXT / name for name in NAMES]
    # A starved controller thread must not look like a dead one; a dead one must be found soon.
    silence = ["-DVT_NVME_SILENCE_NS=3000000000u"]
    flags = ["-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    if sanitizer == "thread":
        flags.append("-Wno-tsan")  # it knows of no fences; those are for the controller
    built = [*WARNINGS, *flags, *silence, f"-I{CEXT}", *map(str, sources), "-pthread"]
    subprocess.run([compiler, *built, "-o", str(program)], check=True, timeout=120)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
