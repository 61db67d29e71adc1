"""Power loss while desired state is written: what the disk holds is the old state or the new one.

A guest replaces its desired state on an ext4 file system as fast as it can, and notes each version
on the raw disk once `save` has returned. After each loss the file system's journal is replayed by
e2fsck, as the next mount would, and the file read with debugfs.

Two ways to lose it. The disk forgets: what was not flushed survives sector by sector or not, at
200 random instants of one guest; a version that was noted must be there, or the one after it. And
QEMU dies: kill -9 with several disks at work, of which the host keeps what was finished.
"""

from __future__ import annotations

import json
import queue
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.fakes.forgetful_disk import SECTOR, ForgetfulDisk
from vfiotool.errors import VfiotoolError
from vfiotool.lab.guest import Guest

INSTANTS = 200
KILLS, DISKS = 200, 2
FILE_SYSTEM_MIB = 20
NOTE_AT = FILE_SYSTEM_MIB << 20
NOTE_BYTES = 4096
DISK_BYTES = NOTE_AT + NOTE_BYTES

# One thread a disk, so that all have a write in hand: argv holds pairs of node and mount point.
WRITER = f"""
import itertools, mmap, os, sys, threading
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.saved import DesiredState

def write(node, point, ready):
    state = DesiredState(point + "/vfiotool")
    raw = os.open(node, os.O_WRONLY | os.O_DIRECT)
    page = mmap.mmap(-1, {NOTE_BYTES})
    for number in itertools.count(1):
        # A changing length moves the file's end over block borders.
        text = "version = 1\\n" + f"# {{number}} " + "x" * (number * 701 % 9000) + "\\n"
        state.save(parse_policy(text, str(number)), number)
        page[:8] = number.to_bytes(8, "little")
        os.pwrite(raw, page, {NOTE_AT})
        ready.set()

pairs = list(zip(sys.argv[1::2], sys.argv[2::2]))
events = [threading.Event() for _ in pairs]
for (node, point), event in zip(pairs, events):
    threading.Thread(target=write, args=(node, point, event), daemon=True).start()
for event in events:
    event.wait()
print("writing", flush=True)
threading.Event().wait()
"""
START = """
writer=$1 disks=$(($2 * 2)); set --
for disk in /sys/block/vd*; do
    serial=$(cat $disk/serial)
    case $serial in powerloss*) ;; *) continue ;; esac
    mkdir -p /tmp/$serial
    mount -t ext4 /dev/${disk##*/} /tmp/$serial || exit 1
    set -- "$@" /dev/${disk##*/} /tmp/$serial
done
[ $# = $disks ] || exit 1
mkfifo /tmp/ready
python -c "$writer" "$@" > /tmp/ready 2>/tmp/errors &
read line < /tmp/ready && [ "$line" = writing ] || { cat /tmp/errors; exit 1; }
"""

pytestmark = [pytest.mark.lab, pytest.mark.proof]


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk's image with an empty file system, and room for the note behind it."""
    for tool in ("mkfs.ext4", "e2fsck", "debugfs"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} (e2fsprogs) is not here")
    image = tmp_path_factory.mktemp("blank") / "disk.img"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    command = ["mkfs.ext4", "-q", "-b", "1024", "-J", "size=4", image, f"{FILE_SYSTEM_MIB}m"]
    subprocess.run(command, check=True)
    return image


def boot(disks: list[str]) -> Guest:
    """A guest with those block devices (QEMU's words) as disks, not started yet."""
    arguments: list[str] = []
    for number, words in enumerate(disks):
        name = f"powerloss{number}"
        arguments += ["-blockdev", f"node-name={name},{words}"]
        arguments += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
    try:
        return Guest("basic", "6.12", qemu_arguments=tuple(arguments), load=("virtio_blk", "ext4"))
    except VfiotoolError as error:
        pytest.skip(error.message)


def start_writing(guest: Guest, disks: int) -> None:
    command = ["sh", "-c", START, "start", WRITER, str(disks)]
    ready = guest.exec(command, timeout_s=300, merge=True)
    assert ready.exit_code == 0, ready.text


def noted(image: Path) -> int:
    """The last version whose `save` was seen to return."""
    with image.open("rb") as file:
        file.seek(NOTE_AT)
        return int.from_bytes(file.read(8), "little")


def check_disk(image: Path) -> int:
    """The version that a disk holds after it lost its power, once it is seen to be whole."""
    note = noted(image)
    fixed = subprocess.run(["e2fsck", "-fy", image], capture_output=True, text=True, check=False)
    # 1: errors corrected, which replaying a journal can count as; above that it is broken.
    assert fixed.returncode in (0, 1), fixed.stdout
    command = ["debugfs", "-R", "cat /vfiotool/applied.json", image]
    done = subprocess.run(command, capture_output=True, check=True)
    assert b"File not found" not in done.stderr, f"version {note} is gone altogether"
    found = json.loads(done.stdout)
    number = int(found["transaction"])
    text = "version = 1\n" + f"# {number} " + "x" * (number * 701 % 9000) + "\n"
    assert found["policy"] == {"name": str(number), "text": text}
    assert number in (note, note + 1), f"{note} was saved, {number} is there"
    return number


def test_a_disk_that_forgets_keeps_what_was_saved(blank: Path, tmp_path: Path) -> None:
    chance = random.Random(1)
    images: queue.Queue[bytes] = queue.Queue(maxsize=2)
    wanted = False
    lost = 0

    def watch(disk: ForgetfulDisk) -> None:
        nonlocal lost
        # The note is read as the guest sees it: it was written after `save` had returned.
        if not wanted or not int.from_bytes(disk.read(NOTE_AT, SECTOR)[:8], "little"):
            return
        if chance.random() < 0.15:
            image = bytearray(disk.after_power_loss(chance))
            image[NOTE_AT:] = disk.read(NOTE_AT, NOTE_BYTES)
            lost += bool(disk.cache)
            images.put(bytes(image))

    socket_path = tmp_path / "socket"
    copy = tmp_path / "copy.img"
    versions = []
    with ForgetfulDisk(blank.read_bytes(), socket_path, watch) as disk:
        words = f"driver=nbd,server.type=unix,server.path={socket_path}"
        with boot([words]) as guest:
            start_writing(guest, 1)
            wanted = True
            for _ in range(INSTANTS):
                copy.write_bytes(images.get(timeout=120))
                versions.append(check_disk(copy))
            wanted = False
            # A disk that waits for a taker would keep the guest from ending.
            while not images.empty():
                images.get_nowait()
    assert disk.flushes > len(set(versions)), "the guest does not flush: nothing was proved"
    assert lost > INSTANTS // 2, "hardly an instant with something to lose"
    assert len(set(versions)) > INSTANTS // 4


def test_a_killed_qemu_leaves_the_old_state_or_the_new_one(blank: Path, tmp_path: Path) -> None:
    chance = random.Random(1)
    versions = []
    for _ in range(KILLS):
        images = [tmp_path / f"disk{number}.img" for number in range(DISKS)]
        for image in images:
            subprocess.run(["cp", "--sparse=always", blank, image], check=True)
        with boot([f"driver=file,filename={image}" for image in images]) as guest:
            start_writing(guest, DISKS)
            # Any instant will do: this spreads them, and waits for nothing.
            time.sleep(chance.random() * 2)
            assert guest._process is not None
            guest._process.kill()
            guest._process.wait()
        versions += [check_disk(image) for image in images]
    assert len(versions) == KILLS * DISKS
    assert len(set(versions)) > 10
