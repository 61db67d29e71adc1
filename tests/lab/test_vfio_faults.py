"""The C library's test build: each call into the kernel fails once, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vfio_guest import BACKENDS, EDU, bind_vfio

MACHINE = "basic"
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def test_build() -> Path:
    """`vfiotool._native` compiled with fault injection: on the host by tests/test_cext.py."""
    sys.path.insert(0, str(ROOT))
    from cext.build import build_with_fault_injection

    return build_with_fault_injection()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_kernel_call_failing_once_leaks_nothing_and_gives_one_error(
    backend: str, test_build: Path
) -> None:
    bind_vfio(EDU)
    script = str(Path(__file__).parent / "faults_vfio.py")
    done = subprocess.run(
        [sys.executable, script, EDU, backend, str(test_build)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["problems"] == []
    assert told["calls"] > 30
    assert told["refused"] > told["calls"]
