"""What takes both sides of a guest: snapshots opened outside, devices unplugged from outside."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.reading import run
from tests.guests.runs import need_lab
from vfiotool.lab.guest import Guest

pytestmark = [pytest.mark.lab, pytest.mark.proof]

LIMIT_S = 600.0
KERNELS = ("6.1", "6.12", "iommufd")
DISK = "0000:01:00.0"

# In the guest: a disk with VFs, a file system mounted on it and its node held open.
BUSY = """
set -e
cd /sys/bus/pci/devices/$1
modprobe ext4 || true
echo 0 > sriov_drivers_autoprobe
echo 2 > sriov_numvfs
for attempt in $(seq 100); do
    disk=$(ls /sys/class/block | grep -m 1 '^nvme[0-9]*n1$' || true)
    test -e /dev/${disk:-none} && break
    sleep 0.2
done
mkfs.ext4 -q -F /dev/$disk
mkdir /tmp/mounted
mount /dev/$disk /tmp/mounted
sleep 100000 < /dev/nvme0 > /dev/null 2>&1 &
"""

# In the guest: a snapshot, then every reading command's JSON, into the shared folder.
CAPTURE = """
import json, sys
from tests.cli.reading import reading_commands, run
from vfiotool.host.host import Host
folder = sys.argv[1]
assert run(["snapshot", f"{folder}/host.gz"])[0] == 0
found = {name: [command, *run(command)] for name, command in reading_commands(Host.local()).items()}
open(f"{folder}/live.json", "w").write(json.dumps(found))
"""

# In the guest: list as fast as it goes until told to stop, and count what was seen.
LISTING = """
import json, os, sys
from tests.guests.runs import need_lab
from tests.cli.reading import run
seen = {"with": 0, "without": 0, "codes": []}
while not os.path.exists("/tmp/stop"):
    for command in (["devices"], ["groups"], ["tree"], ["doctor"], ["snapshot", "/tmp/during.gz"]):
        code, text = run(command)
        if code not in (0, 1):
            seen["codes"].append([command, code, text[:500]])
        if command == ["devices"]:
            there = any(d["address"] == sys.argv[1] for d in json.loads(text)["devices"])
            seen["with" if there else "without"] += 1
            open("/tmp/seen.tmp", "w").write(json.dumps(seen))
            os.replace("/tmp/seen.tmp", "/tmp/seen")
open("/tmp/done", "w").write(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module", params=KERNELS)
def guest(shared: Path, request: pytest.FixtureRequest) -> Iterator[Guest]:
    need_lab(request.param)
    with Guest("sriov", request.param, share=(shared,), load=("vfio-pci",)) as running:
        yield running


def wait(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {LIMIT_S:g} s for {what}"
        time.sleep(0.2)


def read(guest: Guest, path: str) -> str:
    found = guest.exec(["cat", path])
    return found.stdout.decode() if found.exit_code == 0 else ""


def background(guest: Guest, script: str, *arguments: str) -> None:
    """Start a command in the guest that outlives the call."""
    words = " ".join(f"'{word}'" for word in arguments)
    guest.exec(["sh", "-c", f"{script} {words} </dev/null &"])


def test_a_snapshot_opened_outside_prints_what_the_guest_printed(
    guest: Guest, shared: Path
) -> None:
    made = guest.exec(["sh", "-c", BUSY, "sh", DISK], timeout_s=LIMIT_S)
    assert made.exit_code == 0, made.stderr.decode()
    done = guest.exec(["python", "-c", CAPTURE, str(shared)], timeout_s=LIMIT_S)
    assert done.exit_code == 0, done.stderr.decode()
    live = json.loads((shared / "live.json").read_text())
    assert {"groups", "devices", "doctor", f"show/{DISK}", f"why/{DISK}"} <= live.keys()
    kinds = {blocker["kind"] for blocker in json.loads(live[f"why/{DISK}"][2])["blockers"]}
    assert kinds == {"mounted", "open-file", "vfs-enabled"}
    different = [
        name
        for name, (command, code, text) in live.items()
        if list(run(command, str(shared / "host.gz"))) != [code, text]
    ]
    assert not different


def test_a_device_unplugged_while_watching_and_listing_breaks_nothing(guest: Guest) -> None:
    watch = "python -m vfiotool watch --json --timeout 1800 >/tmp/events 2>/tmp/ready"
    background(guest, watch)
    wait(lambda: read(guest, "/tmp/ready"), "watch to be ready")
    guest.qmp.device_add("edu", id="plugged", bus="rp9")
    wait(lambda: '"add"' in read(guest, "/tmp/events"), "the device to be announced")
    added = [json.loads(line) for line in read(guest, "/tmp/events").splitlines()]
    address = next(event["device"] for event in added if event["id"] == "1234:11e8")

    guest.exec(["sh", "-c", "cat > /tmp/listing.py"], input=LISTING.encode())
    background(guest, "python /tmp/listing.py", address)
    wait(lambda: '"with": 0' not in (read(guest, "/tmp/seen") or '"with": 0'), "a first listing")
    guest.qmp.device_del("plugged", limit_s=LIMIT_S)
    wait(lambda: '"without": 0' not in read(guest, "/tmp/seen"), "a listing without the device")
    guest.exec(["touch", "/tmp/stop"])
    wait(lambda: read(guest, "/tmp/done"), "the last listing to end")

    seen = json.loads(read(guest, "/tmp/done"))
    assert seen["codes"] == [] and seen["with"] > 0 and seen["without"] > 0
    wait(lambda: '"remove"' in read(guest, "/tmp/events"), "the removal to be announced")
    events = [json.loads(line) for line in read(guest, "/tmp/events").splitlines()]
    kinds = [event["event"] for event in events if event["device"] == address]
    assert kinds == ["add", "remove"]
    assert read(guest, "/tmp/ready") == "watching\n", "watch said nothing else"


# In the guest: drive a device and wait for the error that the machine reports of its link.
ERROR = """
import subprocess, sys
from tests.lab.vfio_guest import BACKENDS, bind_vfio
from vfiotool.vfio import Device
bind_vfio(sys.argv[1])
# Linux 6.1 leaves it to each driver to let errors be reported.
subprocess.run(["setpci", "-s", sys.argv[1], "CAP_EXP+8.w=f:f"], check=True)
for backend in BACKENDS:
    with Device.open(sys.argv[1], backend=backend) as device:
        error = device.irqs.error()
        print("ready", flush=True)
        print(backend, error.wait(60), flush=True)
"""


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_error_of_the_link_reaches_the_driver_in_user_space(kernel: str) -> None:
    need_lab(kernel)
    # Of QEMU's cards only virtio's lets its errors be switched on.
    card = "virtio-rng-pci,id=card,bus=rp9,aer=on,disable-legacy=on,iommu_platform=on"
    told = bytearray()
    with Guest("basic", kernel, qemu_arguments=("-device", card)) as guest:

        def hear(_: object, data: bytes) -> None:
            told.extend(data)
            if told.endswith(b"ready\n"):
                line = {"command-line": "pcie_aer_inject_error card POISON_TLP"}
                guest.qmp.command("human-monitor-command", line)

        done = guest.exec(["python", "-c", ERROR, "0000:01:00.0"], timeout_s=LIMIT_S, sink=hear)
    backends = ("type1", "iommufd") if kernel == "iommufd" else ("type1",)
    assert done.exit_code == 0, told.decode()
    assert told.decode() == "".join(f"ready\n{name} 1\n" for name in backends)
