"""Power loss while desired state is written: what the disk holds is the old state or the new one.

A guest replaces its desired state on an ext4 disk as fast as it can. At random instants QEMU is
stopped and the disk's image copied: the copy is what the disk holds if the power goes then, since
what the guest had not written out is not in it. Each copy's journal is replayed by e2fsck, as the
next mount would, and the file read with debugfs. The last instant is a kill -9 of QEMU itself.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from vfiotool.errors import VfiotoolError
from vfiotool.lab.guest import Guest

INSTANTS = 200
WRITER = """
import sys, itertools
from vfiotool.change.policy import parse_policy
from vfiotool.change.saved import DesiredState
state = DesiredState("/mnt/vfiotool")
for number in itertools.count():
    # A changing length moves the file's end over block borders.
    text = "version = 1\\n" + f"# {number} " + "x" * (number * 701 % 9000) + "\\n"
    state.save(parse_policy(text, str(number)), number)
    if number == 0:
        print("writing", flush=True)
"""
START = """
for disk in /sys/block/vd*; do
    [ "$(cat $disk/serial)" = powerloss ] && node=/dev/${disk##*/}
done
mount -t ext4 $node /mnt || exit 1
mkfifo /tmp/ready
python -c "$1" > /tmp/ready 2>/tmp/errors &
read line < /tmp/ready && [ "$line" = writing ]
"""

pytestmark = [pytest.mark.lab, pytest.mark.proof]


def read_desired(image: Path) -> dict[str, object] | None:
    """The desired state on a disk that lost its power; None if there is none yet."""
    fixed = subprocess.run(["e2fsck", "-fy", image], capture_output=True, text=True, check=False)
    # 1: errors corrected, which replaying a journal can count as; above that it is broken.
    assert fixed.returncode in (0, 1), fixed.stdout
    command = ["debugfs", "-R", "cat /vfiotool/applied.json", image]
    done = subprocess.run(command, capture_output=True, check=True)
    if b"File not found" in done.stderr:
        return None
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_desired_state_is_old_or_new_after_a_power_loss(tmp_path: Path) -> None:
    for tool in ("mkfs.ext4", "e2fsck", "debugfs"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} (e2fsprogs) is not here")
    image, copy = tmp_path / "disk.img", tmp_path / "copy.img"
    with image.open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-J", "size=4", image], check=True)
    arguments = (
        "-drive",
        f"if=none,id=powerloss,format=raw,file={image}",
        "-device",
        "virtio-blk-pci,drive=powerloss,serial=powerloss",
    )
    chance = random.Random(1)
    versions: list[int] = []
    try:
        guest = Guest("basic", "6.12", qemu_arguments=arguments, load=("ext4",))
    except VfiotoolError as error:
        pytest.skip(error.message)
    with guest:
        ready = guest.exec(["sh", "-c", START, "start", WRITER], timeout_s=300)
        assert ready.exit_code == 0, ready.text
        for _ in range(INSTANTS - 1):
            # Any instant will do: this spreads them, and waits for nothing.
            time.sleep(chance.random() * 0.15)
            guest.qmp.command("stop")
            subprocess.run(["cp", "--sparse=always", image, copy], check=True)
            guest.qmp.command("cont")
            versions.append(check_copy(copy))
        assert guest._process is not None
        guest._process.kill()
    versions.append(check_copy(image))
    assert versions == sorted(versions), "an older state came back"
    assert len(set(versions)) > INSTANTS // 4


def check_copy(image: Path) -> int:
    """The version that a disk holds, after checking that it is whole."""
    found = read_desired(image)
    assert found is not None
    policy, number = found["policy"], found["transaction"]
    assert isinstance(policy, dict) and isinstance(number, int)
    text = "version = 1\n" + f"# {number} " + "x" * (number * 701 % 9000) + "\n"
    assert policy == {"name": str(number), "text": text}
    return number
