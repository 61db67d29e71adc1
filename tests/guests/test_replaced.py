"""Another device at an address that a change is about: nothing of the change is meant for it.

A device is plugged in, and a change of it is killed half way or committed. Then it is unplugged,
and a disk is plugged into its place, takes the address, and comes into use. Whatever is asked of
vfiotool then, the disk stays with its driver and its file system takes writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.guests.runs import need_lab
from vfiotool.lab.guest import Guest

pytestmark = [pytest.mark.lab, pytest.mark.proof]

KERNELS = ("6.1", "6.12", "iommufd")
LIMIT_S = 300.0
ADDRESS = "0000:01:00.0"
SPARE_MIB = 64

# In the guest, once the device is there: a change of it that stands, or that is killed at its
# second write, or one more that waits to be confirmed.
CHANGE = """
import sys
from tests.change.changing import binding
from tests.lab.commands import driver_of, modprobe, vfiotool
from tests.lab.test_uses import PCI, killed, wait_for
from pathlib import Path
address, what = sys.argv[1:]
wait_for(lambda: Path(f"{PCI}/devices/{address}/vendor").exists())
modprobe("vfio-pci")
if what == "killed":
    killed(2, binding(address))
else:
    assert vfiotool("bind", address).code == 0
assert driver_of(address) == "vfio-pci", driver_of(address)
"""

# In the guest, once the disk is there: it is mounted, the command runs, the file system is
# written to; what came of it is printed.
USE = """
import json, os, re, subprocess, sys
from pathlib import Path
from tests.lab.commands import driver_of, override_of, vfiotool
from tests.lab.test_uses import PCI, wait_for
address, *command = sys.argv[1:]
def disk():
    for path in Path(f"{PCI}/devices/{address}").glob("nvme/nvme*/nvme*"):
        found = re.fullmatch(r"(nvme\\d+)(c\\d+)?(n\\d+)", path.name)
        node = f"/dev/{found[1]}{found[3]}" if found else ""
        if found and os.path.exists(node):
            return node
wait_for(disk)
node = disk()
point = "/run/mounted"
os.makedirs(point, exist_ok=True)
subprocess.run(["mkfs.ext4", "-qF", node], check=True)
subprocess.run(["mount", node, point], check=True)
before = driver_of(address), override_of(address)
done = vfiotool(*command)
with open(f"{point}/written", "w") as file:
    file.write("still there")
    file.flush()
    os.fsync(file.fileno())
after = driver_of(address), override_of(address)
subprocess.run(["umount", point], check=True)
history = vfiotool("history", "--json").json
print(json.dumps([before, after, done.code, done.out, done.err, history]))
subprocess.run(["rm", "-rf", "/run/vfiotool"], check=True)
"""


@pytest.fixture(scope="module", params=KERNELS)
def guest(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    need_lab(request.param)
    spare = tmp_path_factory.mktemp("spare") / "disk.raw"
    with open(spare, "wb") as file:
        file.truncate(SPARE_MIB << 20)
    # A node of its own outlives the device that it is plugged in with.
    node = f"driver=raw,node-name=spare,file.driver=file,file.filename={spare}"
    arguments = ("-blockdev", node)
    with Guest("basic", request.param, load=("nvme",), qemu_arguments=arguments) as running:
        running.exec(["modprobe", "ext4"])
        yield running


def in_guest(guest: Guest, script: str, *arguments: str) -> str:
    done = guest.exec(["python", "-c", script, *arguments], timeout_s=LIMIT_S)
    assert done.exit_code == 0, (done.stdout + done.stderr).decode()
    return done.text


@pytest.fixture
def replaced(guest: Guest) -> Iterator[Callable[..., Any]]:
    """Has a change, then puts a disk into the device's place; what a command did to that."""

    def replace(what: str, *command: str) -> Any:
        guest.qmp.device_add("edu", id="first", bus="rp9")
        in_guest(guest, CHANGE, ADDRESS, what)
        guest.qmp.device_del("first", limit_s=LIMIT_S)
        guest.qmp.device_add("nvme", id="second", bus="rp9", drive="spare", serial="second")
        return json.loads(in_guest(guest, USE, ADDRESS, *command))

    yield replace
    guest.qmp.device_del("second", limit_s=LIMIT_S)


@pytest.mark.parametrize(
    ("what", "command", "code", "outcome"),
    [
        ("killed", ("recover",), 0, "rolled-back"),
        ("killed", ("recover", "--undo"), 0, "rolled-back"),
        ("killed", ("recover", "--finish"), 0, "rolled-back"),
        ("bound", ("undo",), 4, "committed"),
        ("bound", ("release", ADDRESS), 0, "committed"),
        ("bound", ("bind", ADDRESS), 4, "committed"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_disk_that_took_the_place_of_a_changed_device_is_left_alone(
    replaced: Callable[..., Any],
    what: str,
    command: tuple[str, ...],
    code: int,
    outcome: str,
) -> None:
    before, after, got, out, err, history = replaced(what, *command)
    assert before == after == ["nvme", None]
    assert (got, history["history"][0]["outcome"]) == (code, outcome), out + err
