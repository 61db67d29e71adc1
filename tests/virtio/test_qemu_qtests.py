"""QEMU's own tests of its vhost-user-blk device, with our server in qemu-storage-daemon's place.

They drive QEMU's device from outside, with no processor running in it and no guest.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracles.qtest import qos_test, write_script
from vfiotool.errors import VfiotoolError
from vfiotool.lab.kernels.newer_qemu import newer_qemu

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "/x86_64/pc/i440FX-pcihost/pci-bus-pc/pci-bus/vhost-user-blk-pci/"
TESTS = (
    "vhost-user-blk/vhost-user-blk-tests/basic",
    "vhost-user-blk/vhost-user-blk-tests/indirect",
    "vhost-user-blk-pci-tests/idx",
    "vhost-user-blk-pci-tests/nxvirtq",
    "vhost-user-blk-pci-tests/hotplug",
    "vhost-user-blk-pci-tests/multiqueue",
)
LIMIT_S = 300

pytestmark = pytest.mark.proof


class QosTest:
    """qos-test, and what it is told of QEMU and of the storage daemon."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.command = command
        self.folder = folder
        qemu, variables = newer_qemu()
        # The tests take the architecture from the program's name.
        program, daemon = folder / "qemu-system-x86_64", folder / "qemu-storage-daemon"
        settings = [f"{name}={value}" for name, value in variables]
        write_script(program, f'exec env {shlex.join([*settings, *qemu])} "$@"')
        adapter = shlex.join([sys.executable, "-m", "tests.oracles.storage_daemon"])
        write_script(daemon, f'PYTHONPATH={shlex.quote(str(ROOT))} exec {adapter} "$@"')
        self.environment = {
            **os.environ,
            "QTEST_QEMU_BINARY": str(program),
            "QTEST_QEMU_STORAGE_DAEMON_BINARY": str(daemon),
        }

    def run(self, *arguments: str) -> tuple[int, str]:
        """Its exit code and what it and all that it started say."""
        process = subprocess.Popen(
            [*self.command, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
        return process.returncode, said


@pytest.fixture(scope="module")
def qtests(tmp_path_factory: pytest.TempPathFactory) -> QosTest:
    command = qos_test()
    if isinstance(command, str):
        pytest.skip(command)
    try:
        return QosTest(command, tmp_path_factory.mktemp("qtests"))
    except VfiotoolError as error:
        pytest.skip(f"no QEMU that has qtest: {error.message}")


@pytest.mark.parametrize("name", TESTS, ids=lambda name: name.rpartition("/")[2])
def test_qemus_own_test_of_the_device_passes_with_our_server(qtests: QosTest, name: str) -> None:
    before = sorted(os.listdir(qtests.folder))
    code, said = qtests.run("-p", DEVICE + name)
    assert code == 0, said
    assert f"ok 1 {DEVICE}{name}\n" in said, said  # and not `# SKIP`
    assert sorted(os.listdir(qtests.folder)) == before


def test_qemu_has_no_test_of_the_device_that_is_not_run_here(qtests: QosTest) -> None:
    code, said = qtests.run("-l")
    assert code == 0, said
    found = {line for line in said.splitlines() if line.startswith(DEVICE)}
    assert found == {DEVICE + name for name in TESTS}
