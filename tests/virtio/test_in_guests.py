"""Disks of one server in real guests: file systems, verification, and a server that dies."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guests.runs import need_lab
from vfiotool.lab.guest import Completed, Guest

pytestmark = pytest.mark.lab

KERNEL = "6.12"
MIB = 1 << 20
# The disk is found by its serial: which letter it gets is the guest's affair.
FIND = """
set -e
modprobe virtio_blk
modprobe ext4
for n in $(seq 100); do
    for disk in /sys/block/vd*; do
        [ "$(cat $disk/serial 2>/dev/null)" = SERIAL ] && DISK=/dev/${disk##*/} && break 2
    done
    sleep 0.1
done
[ -b "$DISK" ]
"""
FILE_SYSTEM = (
    FIND
    + """
mkfs.ext4 -q -F $DISK
mkdir -p /run/t && mount $DISK /run/t
fio --name=v --directory=/run/t --size=24m --bs=4k --rw=randwrite --ioengine=libaio --iodepth=16 \
    --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal >/run/fio.out
umount /run/t
fsck.ext4 -fn $DISK >/run/fsck.out 2>&1 || { cat /run/fsck.out; exit 1; }
blockdev --getsize64 $DISK
"""
)
# The 35th character is VIRTIO_F_RING_PACKED.
UNDER_KILLS = (
    FIND
    + """
[ $(cut -c35 /sys/block/${DISK#/dev/}/device/features) = PACKED ]
for turn in 1 2 3 4 5 6; do
    fio --name=v --filename=$DISK --size=48m --bs=4k --rw=randwrite --ioengine=libaio \
        --iodepth=16 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal \
        >/run/fio.out || { cat /run/fio.out; exit 1; }
done
"""
)


# As long as the host disturbs the server.
FOR_LONG = (
    FIND
    + """
end=$(($(cut -d. -f1 /proc/uptime) + SECONDS))
until [ "$(cut -d. -f1 /proc/uptime)" -ge $end ]; do
    fio --name=v --filename=$DISK --size=32m --bs=4k --rw=randwrite --ioengine=libaio \
        --iodepth=16 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal \
        >/run/fio.out || { cat /run/fio.out; exit 1; }
    echo turn
done
dmesg | grep -i -E 'I/O error|timeout|hung' && exit 1
exit 0
"""
)


def with_disk(path: Path, *, packed: bool = False) -> tuple[str, ...]:
    """QEMU's options for a disk over a socket; memory has to be shared for it."""
    return (
        "-object",
        "memory-backend-memfd,id=shared,size=1024M,share=on",
        "-machine",
        "memory-backend=shared",
        "-chardev",
        f"socket,id=blk,path={path},reconnect=1",
        "-device",
        "vhost-user-blk-pci,chardev=blk,num-queues=1" + ",packed=on" * packed,
    )


def serve(file: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vfiotool", "serve", "exports", str(file), *options]
    return subprocess.Popen(command)


@pytest.fixture
def exports(tmp_path: Path) -> Path:
    need_lab(KERNEL)
    file = tmp_path / "exports.toml"
    text = "version = 1\n"
    for name in ("first", "second"):
        image = tmp_path / f"{name}.raw"
        with image.open("wb") as raw:
            raw.truncate(64 * MIB)
        text += f'[[export]]\nname = "{name}"\nblk_file = "{image}"\n'
        text += f'socket_path = "{tmp_path / name}.sock"\n'
    file.write_text(text)
    return file


def in_guest(
    exports: Path,
    name: str,
    script: str,
    then: Callable[[Completed], None],
    *,
    packed: bool = False,
    ready: threading.Event | None = None,
) -> None:
    """Run a script in a guest with a served disk; `ready` is set once the guest is up."""
    options = with_disk(exports.parent / f"{name}.sock", packed=packed)
    with Guest("basic", KERNEL, qemu_arguments=options) as guest:
        if ready is not None:
            ready.set()
        then(guest.exec(["sh", "-c", script.replace("SERIAL", name)], timeout_s=400))


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    waiting = threading.Event()
    while not path.exists():
        assert process.poll() is None
        waiting.wait(0.05)


def test_two_guests_have_file_systems_on_one_process(exports: Path) -> None:
    server = serve(exports)
    done: dict[str, Completed] = {}
    try:
        for name in ("first", "second"):
            wait_for(exports.parent / f"{name}.sock", server)
        threads = [
            threading.Thread(
                target=in_guest,
                args=(exports, name, FILE_SYSTEM, lambda got, name=name: done.update({name: got})),
            )
            for name in ("first", "second")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        server.terminate()
        assert server.wait(timeout=20) == 0
    for name in ("first", "second"):
        assert done[name].exit_code == 0, done[name].text + done[name].stderr.decode()
        assert done[name].text.split()[-1] == str(64 * MIB)


@pytest.mark.parametrize(
    "packed", [pytest.param(False, marks=pytest.mark.proof), True], ids=["split", "packed"]
)
def test_a_guest_sees_a_delay_only_while_the_server_is_killed(exports: Path, packed: bool) -> None:
    server = serve(exports)
    ended, kills = threading.Event(), 0
    done: list[Completed] = []

    def run() -> None:
        try:
            script = UNDER_KILLS.replace("PACKED", str(int(packed)))
            in_guest(exports, "first", script, done.append, packed=packed)
        finally:
            ended.set()

    path = exports.parent / "first.sock"
    wait_for(path, server)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not ended.wait(3.0):
            server.kill()
            server.wait()
            kills += 1
            server = serve(exports)
    finally:
        thread.join()
        server.terminate()
        server.wait(timeout=20)
    assert done and done[0].exit_code == 0, done and done[0].text + done[0].stderr.decode()
    assert kills >= 3


def killed(server: subprocess.Popen[bytes], exports: Path) -> subprocess.Popen[bytes]:
    """Another server after one that was killed in whatever it was doing."""
    server.kill()
    server.wait()
    return serve(exports)


def updated(server: subprocess.Popen[bytes], exports: Path) -> subprocess.Popen[bytes]:
    """Another server in the place of one that runs."""
    successor = serve(exports, "--take-over")
    assert server.wait(timeout=60) == 0
    return successor


@pytest.mark.proof
@pytest.mark.parametrize("disturb", [killed, updated])
def test_two_guests_see_delays_only_while_their_server_is_replaced_twenty_times(
    exports: Path,
    disturb: Callable[[subprocess.Popen[bytes], Path], subprocess.Popen[bytes]],
) -> None:
    server = serve(exports)
    done: dict[str, Completed] = {}
    script = FOR_LONG.replace("SECONDS", "150")

    up = {name: threading.Event() for name in ("first", "second")}

    def run(name: str) -> None:
        in_guest(exports, name, script, lambda got: done.update({name: got}), ready=up[name])

    for name in ("first", "second"):
        wait_for(exports.parent / f"{name}.sock", server)
    threads = [threading.Thread(target=run, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    times = 0
    try:
        # The first ones meet the firmware and the guests' boot, the others a disk under load.
        while times < 20:
            if times == 5:
                assert all(event.wait(300) for event in up.values()), done
            threads[0].join(4.0)
            assert any(thread.is_alive() for thread in threads), done
            server = disturb(server, exports)
            times += 1
    finally:
        for thread in threads:
            thread.join()
        server.terminate()
        assert server.wait(timeout=20) == 0
    for name in ("first", "second"):
        assert done[name].exit_code == 0, done[name].text + done[name].stderr.decode()
        assert "turn" in done[name].text
        print(name, done[name].text.count("turn"), "turns of 32 MiB verified")
