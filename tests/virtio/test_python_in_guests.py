"""Devices in Python under Linux's own drivers: a disk that is killed in mid-request, beside a
source of entropy and a console, and a network of two guests through the switch."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.guests.runs import need_lab
from tests.virtio.peers import find_net
from tests.virtio.python_devices import FILE
from tests.virtio.test_in_guests import FIND, wait_for
from vfiotool.lab.guest import Completed, Guest

pytestmark = [pytest.mark.lab, pytest.mark.proof]

KERNEL = "6.12"
MIB = 1 << 20
DEVICES = Path(__file__).with_name("python_devices.py")
NET_GUEST = Path(__file__).with_name("net_guest.py")
SHARED = (
    *("-object", "memory-backend-memfd,id=shared,size=1024M,share=on"),
    *("-machine", "memory-backend=shared"),
)
# Every driver is kept at work while the disk is killed.
WORK = (
    FIND.replace("SERIAL", "python-disk")
    + """
modprobe virtio_rng
modprobe virtio_console
mkfs.ext4 -q -F $DISK
mkdir -p /run/t && mount $DISK /run/t
for turn in 1 2 3 4; do
    fio --name=v --directory=/run/t --size=16m --bs=4k --rw=randwrite --ioengine=libaio \
        --iodepth=8 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal \
        >/run/fio.out || { cat /run/fio.out; exit 1; }
    grep -q virtio /sys/class/misc/hw_random/rng_current
    [ $(dd if=/dev/hwrng bs=1k count=64 2>/dev/null | sort -u | wc -c) -gt 1000 ]
    python3 - <<'EOF'
import glob, os, select, tty
# The lab's own channel is a port without a console.
port = os.open(sorted(glob.glob("/dev/hvc*"))[0], os.O_RDWR)
tty.setraw(port)
for number in range(20):
    text = b"line %d of a console" % number
    got = b""
    while text.upper() not in got:
        # What was under way when the device was killed may be lost, as on a serial line.
        os.write(port, text)
        while select.select([port], [], [], 5)[0] and text.upper() not in got:
            got += os.read(port, 4096)
EOF
    echo turn $turn
done
umount /run/t
fsck.ext4 -fn $DISK
"""
)
NET = """
modprobe virtio_net
for n in $(seq 100); do
    for path in /sys/class/net/*; do
        [ -e $path/device/driver ] && NET=${path##*/}
    done
    [ -n "$NET" ] && break
    sleep 0.1
done
ip addr add 10.9.0.NUMBER/24 dev $NET && ip link set $NET up
python3 - <<'EOF'
import hashlib, random, socket, time
data = random.Random(9).randbytes(8 << 20)
if NUMBER == 1:
    listener = socket.create_server(("10.9.0.1", 9))
    peer, _ = listener.accept()
else:
    for _ in range(300):
        try:
            peer = socket.create_connection(("10.9.0.1", 9), timeout=5)
            break
        except OSError:
            time.sleep(1)
peer.settimeout(200)
def take():
    got = b""
    while len(got) < len(data):
        piece = peer.recv(1 << 20)
        assert piece, len(got)
        got += piece
    assert got == data
# One way, then the other.
for turn in (1, 2):
    if turn == NUMBER:
        peer.sendall(data)
    else:
        take()
print("good")
EOF
ethtool -S $NET 2>/dev/null | head -3 || true
"""


@contextmanager
def devices(folder: Path, image: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The servers of a disk, an entropy source and a console, which the list may replace."""
    servers = [start(folder, number, image) for number in range(3)]
    try:
        yield servers
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            assert server.wait(timeout=60) == 0


NAMES = (f"{DEVICES}:FileStorage", "vfiotool.virtio.entropy:EntropySource", f"{DEVICES}:Shouting")


def start(folder: Path, number: int, image: Path) -> subprocess.Popen[bytes]:
    path = folder / f"{number}.sock"
    command = [sys.executable, "-m", "vfiotool", "serve", "vhost-user", NAMES[number]]
    environment = {**os.environ, FILE: str(image)}
    server = subprocess.Popen([*command, "--socket-path", str(path)], env=environment)
    wait_for(path, server)
    return server


def arguments(folder: Path) -> tuple[str, ...]:
    kinds = (
        "vhost-user-blk-pci,chardev=c0,num-queues=1",
        "vhost-user-rng-pci,chardev=c1",
        "vhost-user-test-device-pci,chardev=c2,virtio-id=3,num_vqs=2,config_size=12",
    )
    words = list(SHARED)
    for number, kind in enumerate(kinds):
        # QEMU connects again for disks; without their server the others end it (11.1.3).
        again = "" if number else ",reconnect-ms=500"
        words += ["-chardev", f"socket,id=c{number},path={folder / f'{number}.sock'}{again}"]
        words += ["-device", kind]
    return tuple(words)


def test_linux_drives_python_devices_of_which_the_disk_is_killed(tmp_path: Path) -> None:
    need_lab(KERNEL)
    image = tmp_path / "image.raw"
    with image.open("wb") as file:
        file.truncate(48 * MIB)
    done: list[Completed] = []
    up, ended = threading.Event(), threading.Event()

    def run() -> None:
        try:
            options = {"qemu_arguments": arguments(tmp_path), "newer_qemu": True}
            with Guest("basic", KERNEL, **options) as guest:
                up.set()
                done.append(guest.exec(["sh", "-c", WORK], timeout_s=1500))
        finally:
            up.set()
            ended.set()

    kills = 0
    with devices(tmp_path, image) as servers:
        thread = threading.Thread(target=run)
        thread.start()
        # QEMU ends if a server does while it makes its device.
        up.wait()
        while not ended.wait(5.0):
            servers[0].kill()
            servers[0].wait()
            servers[0] = start(tmp_path, 0, image)
            kills += 1
        thread.join()
    assert done and done[0].exit_code == 0, done and done[0].text + done[0].stderr.decode()
    assert "turn 4" in done[0].text
    print(kills, "kills")


def two_guests(folder: Path, scripts: tuple[str, str]) -> tuple[str, str]:
    """What two guests printed that ran these, each at a port of one switch."""
    paths = [folder / f"port{number}.sock" for number in (1, 2)]
    command = [sys.executable, "-m", "vfiotool", "serve", "vhost-user-net"]
    for path in paths:
        command += ["--socket-path", str(path)]
    done: dict[int, Completed] = {}

    def run(number: int) -> None:
        words = (
            *SHARED,
            *("-chardev", f"socket,id=net,path={paths[number - 1]}"),
            *("-netdev", "vhost-user,id=net0,chardev=net"),
            *("-device", f"virtio-net-pci,netdev=net0,mac=52:54:00:00:09:0{number},romfile="),
        )
        with Guest("basic", KERNEL, qemu_arguments=words) as guest:
            done[number] = guest.exec(["sh", "-ec", scripts[number - 1]], timeout_s=900)

    with ExitStack() as stack:
        server = subprocess.Popen(command)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        for path in paths:
            wait_for(path, server)
        threads = [threading.Thread(target=run, args=(number,)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in (1, 2):
        assert number in done
        assert done[number].exit_code == 0, done[number].text + done[number].stderr.decode()
    return done[1].text, done[2].text


def test_two_guests_talk_through_the_switch(tmp_path: Path) -> None:
    need_lab(KERNEL)
    one, two = (NET.replace("NUMBER", str(number)) for number in (1, 2))
    assert all("good" in said for said in two_guests(tmp_path, (one, two)))


def test_iperf3_and_data_of_two_guests_go_through_the_switch(tmp_path: Path) -> None:
    need_lab(KERNEL)
    iperf3 = find_net()
    if isinstance(iperf3, str):
        pytest.skip(iperf3)
    line = shlex.join([str(NET_GUEST), "NUMBER", *iperf3.command("iperf3")])
    script = f"modprobe virtio_net\nexec python3 {line}\n"
    one, two = (script.replace("NUMBER", str(number)) for number in (1, 2))
    said = two_guests(tmp_path, (one, two))
    first, second = (json.loads(text.splitlines()[-1]) for text in said)
    assert (first["bad checksums"], second["bad checksums"]) == (0, 0)
    for kind in ("offloads", "plain"):
        for name in ("data", "data after"):
            here, there = first[kind][name], second[kind][name]
            assert (here["sent"], here["taken"]) == (there["taken"], there["sent"])
            assert here["sent"] != there["sent"]
        for way in ("there", "back"):
            sums = second[kind][way]
            assert sums["sum_received"]["bytes"] > 0
            rate, again = sums["sum_received"]["bits_per_second"], sums["sum_sent"]["retransmits"]
            print(f"{kind}, {way}: {rate / 1e6:.0f} Mbit/s, {again} sent again")
