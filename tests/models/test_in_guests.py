"""QEMU as the client, and a guest's own kernel behind it: drivers bind to models and work."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guests.runs import need_lab
from tests.models.qemu_cases import CASES
from tests.models.served import serving
from tests.models.test_conformance import Card
from vfiotool.lab.guest import Guest
from vfiotool.lab.machines import VfioUserDevice
from vfiotool.models import Model
from vfiotool.models.edu import EduModel
from vfiotool.models.nvme import NvmeModel

pytestmark = pytest.mark.lab

KERNEL = "6.12"
ROOT = Path(__file__).resolve().parents[2]
VFIOTOOL = str(Path(sys.prefix) / "bin/vfiotool")
EDU = f"""
set -e
modprobe vfio-pci
cat /sys/bus/pci/devices/0000:00:05.0/uevent
{VFIOTOOL} bind 00:05.0
{VFIOTOOL} demo edu 00:05.0
{VFIOTOOL} release 00:05.0
"""
FIND = """
set -e
modprobe nvme
modprobe ext4
for n in $(seq 200); do
    for disk in /sys/block/nvme*; do
        grep -q ^vfiotool $disk/device/model 2>/dev/null && DISK=/dev/${disk##*/} && break 2
    done
    sleep 0.1
done
[ -b "$DISK" ] || { dmesg | tail -20; exit 1; }
"""
NVME = (
    FIND
    + """
cat /proc/interrupts | grep nvme | head -3
mkfs.ext4 -q -F $DISK
mkdir -p /run/t && mount $DISK /run/t
dd if=/dev/urandom of=/run/random bs=64k count=160 status=none
cp /run/random /run/t/a; cp /run/random /run/t/b; sync
umount /run/t
fio --name=v --filename=$DISK --offset=40m --size=8m --bs=4k --rw=randwrite --ioengine=libaio \
    --iodepth=16 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal >/run/fio.out \
    || { cat /run/fio.out; exit 1; }
echo 3 > /proc/sys/vm/drop_caches
mount -o ro $DISK /run/t
cmp /run/random /run/t/a && cmp /run/random /run/t/b
umount /run/t
fsck.ext4 -fn $DISK >/run/fsck.out 2>&1 || { cat /run/fsck.out; exit 1; }
echo sum $(dd if=$DISK bs=1M iflag=direct status=none | sha256sum)
"""
)


def ran(model: Model, script: str, **options: object) -> str:
    """What the script prints in a guest that has `model` in slot 5 of its root bus."""
    with serving(model) as server:
        card = VfioUserDevice(server.path, (("bus", "pcie.0"), ("addr", "0x5")))
        with Guest("basic", KERNEL, served=(card,), **options) as guest:
            done = guest.exec(["bash", "-c", script], timeout_s=240, merge=True)
            assert done.exit_code == 0, done.text[-3000:]
            return done.text


@pytest.fixture(autouse=True)
def lab() -> None:
    need_lab(KERNEL)


def test_edu_moves_bytes_and_signals_through_a_guest_s_iommu() -> None:
    model = EduModel()
    said = ran(model, EDU)
    assert "1234:11E8" in said and "0 differ" in said and "1 MSI, cause 0x42" in said, said
    # Each wait of the demo ended by an MSI of the model's, through QEMU and the guest's remapping.
    assert "FAIL" not in said and model.signals.fired[1, 0] >= 4


def test_a_guest_s_nvme_driver_keeps_a_file_system_on_the_model() -> None:
    model = NvmeModel(blocks=(48 << 20) // 512, shared_doorbells=False)
    said = ran(model, NVME)
    # Byte for byte: what the guest reads is what the model holds.
    assert hashlib.sha256(model.disk).hexdigest() in said, said


def test_qemu_as_the_client_passes_the_cases_of_conformance(
    record_property: Callable[[str, object], None],
) -> None:
    script = f"""
set -e
modprobe vfio-pci
{VFIOTOOL} bind 00:05.0
cd {ROOT}
{sys.executable} -m tests.models.qemu_cases 0000:00:05.0
{VFIOTOOL} release 00:05.0
"""
    said = ran(Card(), script)
    assert said.count("passed: ") == len(CASES), said
    record_property("measured", said.partition("a register read: ")[2].partition("\n")[0])
