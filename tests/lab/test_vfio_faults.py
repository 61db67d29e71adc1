"""The C library's test build: each call into the kernel fails once, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lab.vfio_guest import BACKENDS, EDU, bind_vfio, mdev, nvme_functions

MACHINE = ("basic", "large", "mdev")
KERNELS = ("6.1", "6.12", "iommufd")
PROOF = "long"

ROOT = Path(__file__).resolve().parent.parent.parent
# Which scenarios of faults_vfio.py a machine has the device for.
SCENARIOS = {
    "basic": ("life", "rest"),
    "large": ("resets",),
    "mdev": ("migration", "frame"),
}[os.environ.get("VFIOTOOL_LAB_MACHINE", "basic")]


@pytest.fixture(scope="module")
def test_build() -> Path:
    """The extensions compiled with fault injection: on the host by tests/native/test_cext.py."""
    sys.path.insert(0, str(ROOT))
    from cext.build import build_with_fault_injection

    return build_with_fault_injection()


@pytest.fixture(params=SCENARIOS)
def scenario(request: pytest.FixtureRequest, lab_kernel: str) -> Iterator[tuple[str, str]]:
    """The name of a scenario and the device for it."""
    name = str(request.param)
    if name == "migration" and lab_kernel == "6.1":
        pytest.skip("mtty of Linux 6.1 has no migration")
    with ExitStack() as stack:
        if name == "migration":
            address = stack.enter_context(mdev("mtty", "mtty-1"))
        elif name == "frame":
            address = stack.enter_context(mdev("mbochs", "mbochs-small"))
        elif name == "resets":
            for address in nvme_functions():
                bind_vfio(address)
        else:
            bind_vfio(address := EDU)
        yield name, address


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_kernel_call_failing_once_leaks_nothing_and_gives_one_error(
    backend: str, scenario: tuple[str, str], test_build: Path
) -> None:
    script = str(Path(__file__).parent / "faults_vfio.py")
    done = subprocess.run(
        [sys.executable, script, *scenario, backend, str(test_build)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["problems"] == []
    assert told["calls"] > 15
    # Twice the calls were made to fail. Those that only probe for a feature are taken for a no.
    assert told["refused"] > told["calls"] // 2
