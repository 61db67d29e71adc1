"""Frames, the switch, and network cards driven by a front end of our own."""

from __future__ import annotations

import asyncio
import random
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.virtio.frontend import DATA, Frontend
from tests.virtio.test_device import connected
from tests.virtio.test_device_classes import wait_for
from vfiotool.errors import UsageError
from vfiotool.virtio.frames import (
    HEADER,
    Frame,
    Gso,
    NetFeature,
    checksum,
    parse_frame,
    segments,
    with_checksum,
)
from vfiotool.virtio.host import Served
from vfiotool.virtio.net import AGE_S, NetCard, Switch, _Bucket

A, B, C = (bytes([0x52, 0x54, 0, 0, 0, number]) for number in (1, 2, 3))
ALL = b"\xff" * 6


def ethernet(to: bytes, sender: bytes, payload: bytes = b"payload", kind: int = 0x88B5) -> bytes:
    return to + sender + kind.to_bytes(2, "big") + payload


def tcp4(payload: bytes, *, flags: int = 0x18, complete: bool = True) -> bytes:
    """A TCP segment over IPv4; unless `complete`, its checksum is the pseudo header's sum."""
    source, target = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
    length = 20 + len(payload)
    head = struct.pack(">HHIIBBHHH", 1000, 2000, 0xFFFF_FF00, 7, 0x50, flags, 512, 0, 0)
    pseudo = source + target + struct.pack(">IHH", length, 0, 6)
    start = checksum(pseudo)
    value = ~checksum(pseudo + head + payload) & 0xFFFF if complete else start
    head = head[:16] + value.to_bytes(2, "big") + head[18:]
    network = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 77, 0, 64, 6, 0) + source + target
    network = network[:10] + (~checksum(network) & 0xFFFF).to_bytes(2, "big") + network[12:]
    return ethernet(B, A, network + head + payload, 0x0800)


def tcp6(payload: bytes) -> bytes:
    addresses = bytes(15) + b"\1" + bytes(15) + b"\2"
    length = 20 + len(payload)
    start = checksum(addresses + struct.pack(">IHH", length, 0, 6))
    head = struct.pack(">HHIIBBHHH", 1000, 2000, 5, 7, 0x50, 0x18, 512, start, 0)
    network = struct.pack(">IHBB", 0x6000_0000, length, 6, 64) + addresses
    return ethernet(B, A, network + head + payload, 0x86DD)


def is_whole(data: bytes) -> bool:
    """Whether the checksums of a TCP segment hold and its lengths are right."""
    kind, packet = data[12:14], data[14:]
    if kind == b"\x08\0":
        if checksum(packet[:20]) != 0xFFFF or int.from_bytes(packet[2:4], "big") != len(packet):
            return False
        addresses, segment = packet[12:20], packet[20:]
    else:
        if int.from_bytes(packet[4:6], "big") != len(packet) - 40:
            return False
        addresses, segment = packet[8:40], packet[40:]
    return checksum(addresses + struct.pack(">IHH", len(segment), 0, 6) + segment) == 0xFFFF


# Frames


def test_a_checksum_that_was_left_out_is_computed() -> None:
    wanted = tcp4(b"odd number")
    given = Frame(tcp4(b"odd number", complete=False), flags=1, checksum_start=34)
    given = Frame(given.data, 1, checksum_start=34, checksum_offset=16)
    assert with_checksum(given).data == wanted and is_whole(wanted)
    assert with_checksum(given).flags == 0


@pytest.mark.parametrize("size", [1, 100, 999, 1000, 1001, 4000])
@pytest.mark.parametrize("kind", [Gso.TCPV4, Gso.TCPV6])
def test_segments_are_whole_and_together_what_was_sent(size: int, kind: Gso) -> None:
    payload = random.Random(size).randbytes(size)
    data = tcp4(payload, flags=0x99) if kind is Gso.TCPV4 else tcp6(payload)
    tcp = 34 if kind is Gso.TCPV4 else 54
    made = segments(Frame(data, 1, kind, tcp + 20, 1000, tcp, 16))
    assert len(made) == -(-size // 1000)
    assert all(is_whole(piece.data) and piece.flags == 0 for piece in made)
    assert b"".join(piece.data[tcp + 20 :] for piece in made) == payload
    sequences = [int.from_bytes(piece.data[tcp + 4 : tcp + 8], "big") for piece in made]
    first = int.from_bytes(data[tcp + 4 : tcp + 8], "big")
    assert sequences == [(first + 1000 * n) & 0xFFFF_FFFF for n in range(len(made))]
    flags = [piece.data[tcp + 13] for piece in made]
    assert all(not flag & 0x09 for flag in flags[:-1]) and flags[-1] & 0x08
    assert all(not flag & 0x80 for flag in flags[1:])


@pytest.mark.parametrize(
    ("flags", "gso", "size", "start", "offset"),
    [
        (1, 0, 0, 60_000, 16),
        (1, 0, 0, 34, 60_000),
        (1, 1, 0, 34, 16),
        (0, 1, 1000, 34, 16),
        (1, 4, 1000, 34, 16),
        (1, 3, 1000, 34, 16),
        (1, 77, 1000, 34, 16),
    ],
)
def test_headers_that_contradict_their_frame_are_worth_nothing(
    flags: int, gso: int, size: int, start: int, offset: int
) -> None:
    header = HEADER.pack(flags, gso, 54, size, start, offset, 1)
    assert parse_frame(header + tcp4(b"x" * 100), 12) is None


def test_random_packets_break_nothing() -> None:
    chance = random.Random(3)
    for _ in range(20_000):
        data = bytearray(HEADER.pack(1, chance.choice([0, 1, 4]), 54, 100, 34, 16, 1))
        data += tcp4(b"x" * 300)
        for _ in range(chance.randrange(6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        frame = parse_frame(bytes(data[: chance.randrange(len(data))]), 12)
        if frame is not None:
            assert segments(frame)


# The switch


class Wire:
    def __init__(self) -> None:
        self.got: list[Frame] = []

    def deliver(self, frame: Frame) -> None:
        self.got.append(frame)


def test_the_switch_learns_and_forgets() -> None:
    now = [0.0]
    switch = Switch(lambda: now[0])
    one, two, three = Wire(), Wire(), Wire()
    for port in (one, two, three):
        switch.add(port)
    switch.forward(one, Frame(ethernet(B, A)))
    assert [len(port.got) for port in (one, two, three)] == [0, 1, 1]
    switch.forward(two, Frame(ethernet(A, B)))
    assert [len(port.got) for port in (one, two, three)] == [1, 1, 1]
    switch.forward(one, Frame(ethernet(B, A)))
    assert [len(port.got) for port in (one, two, three)] == [1, 2, 1]
    switch.forward(one, Frame(ethernet(ALL, A)))
    assert [len(port.got) for port in (one, two, three)] == [1, 3, 2]
    now[0] += AGE_S + 1
    switch.forward(one, Frame(ethernet(B, A)))
    assert [len(port.got) for port in (one, two, three)] == [1, 4, 3]
    # To a station of its own side, and between bridges: not forwarded.
    switch.forward(one, Frame(ethernet(A, A)))
    switch.forward(one, Frame(ethernet(b"\x01\x80\xc2\0\0\x0e", A)))
    assert [len(port.got) for port in (one, two, three)] == [1, 4, 3]
    switch.remove(two)
    switch.forward(one, Frame(ethernet(B, A)))
    assert [len(port.got) for port in (one, two, three)] == [1, 4, 4]


def test_a_machine_that_floods_addresses_fills_no_memory() -> None:
    switch = Switch(lambda: 0.0)
    one, two = Wire(), Wire()
    switch.add(one)
    switch.add(two)
    for number in range(10_000):
        switch.forward(one, Frame(ethernet(ALL, b"\2\0" + number.to_bytes(4, "big"))))
    assert len(switch._learned) == 4096


def test_a_rate_is_kept_and_a_frame_may_overdraw_it() -> None:
    bucket, now, sent = _Bucket(1000, 0.0), 0.0, 0
    while now < 10:
        if wait := bucket.wait(now):
            now += wait
            continue
        bucket.take(300, now)
        sent += 300
    assert 10_000 <= sent <= 11_300


# Cards


@contextmanager
def cards(tmp_path: Path, macs: list[bytes], **options: int) -> Iterator[list[NetCard]]:
    """Cards of one switch, each behind a socket NUMBER.sock, in a loop of a thread."""
    made: list[NetCard] = []
    ready, box = threading.Event(), []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        switch, until = Switch(loop.time), asyncio.Event()
        box.extend((loop, until))
        made.extend(NetCard(switch, mac, **options) for mac in macs)
        async with AsyncExitStack() as stack:
            for number, card in enumerate(made):
                await stack.enter_async_context(
                    Served(card, str(tmp_path / f"{number}.sock"), print)
                )
            ready.set()
            await until.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert ready.wait(20)
        yield made
    finally:
        box[0].call_soon_threadsafe(box[1].set)
        thread.join(30)
        assert not thread.is_alive()


class Machine(Frontend):
    """A driver of a card: 16 receive buffers of `buffer` bytes, and one frame sent at a time."""

    def prepare(self, buffer: int = 2048, without: int = 0) -> None:
        self.buffer = buffer
        self.negotiate(without)
        self.share()
        self.start(0)
        self.start(1)
        for number in range(16):
            self.offer(number)

    def place(self, number: int) -> int:
        return DATA + 0x10_0000 + number * 0x4000

    def offer(self, number: int) -> None:
        self.put(self.rings[0], number, [(self.place(number), self.buffer, True)])
        self.add(self.rings[0], number)

    def transmit(self, frame: bytes, header: bytes = bytes(12)) -> None:
        at, packet = DATA, header + frame
        self.memory[at : at + len(packet)] = packet
        self.put(
            self.rings[1], 0, [(at, len(header), False), (at + len(header), len(frame), False)]
        )
        self.add(self.rings[1], 0)
        assert self.wait(self.rings[1]) == [(0, 0)]

    def hear(self) -> tuple[bytes, bytes]:
        """The next packet: its header and frame; its buffers are offered again."""
        ((head, written),) = self.wait(self.rings[0])
        packet = self.memory[self.place(head) : self.place(head) + written]
        count = struct.unpack_from("<H", packet, 10)[0]
        heads = [head]
        for number, size in self.wait(self.rings[0], count - 1):
            heads.append(number)
            packet += self.memory[self.place(number) : self.place(number) + size]
        for number in heads:
            self.offer(number)
        return packet[:12], packet[12:]


@contextmanager
def machines(tmp_path: Path, count: int, **how: int) -> Iterator[list[Machine]]:
    with ExitStack() as stack:
        found = []
        for number in range(count):
            machine = Machine(str(tmp_path / f"{number}.sock"), queues=2)
            stack.callback(machine.close)
            machine.prepare(**how)
            found.append(machine)
        yield found


def test_machines_hear_what_is_meant_for_them(tmp_path: Path) -> None:
    with cards(tmp_path, [A, B, C]) as made, machines(tmp_path, 3) as (one, two, three):
        one.transmit(ethernet(ALL, A, b"who has"))
        assert two.hear()[1] == three.hear()[1] == ethernet(ALL, A, b"who has")
        for number in range(40):
            two.transmit(ethernet(A, B, b"%d" % number))
            assert one.hear()[1] == ethernet(A, B, b"%d" % number)
        three.transmit(ethernet(B, C, b"last"))
        assert two.hear()[1] == ethernet(B, C, b"last")
        assert (made[0].figures.sent, made[0].figures.received) == (1, 40)
        # Not what two said to one.
        assert made[2].figures.received == 1


def test_large_frames_pass_through_many_buffers_as_they_are(tmp_path: Path) -> None:
    payload = random.Random(5).randbytes(20_000)
    header = HEADER.pack(1, Gso.TCPV4, 54, 1448, 34, 16, 0)
    with cards(tmp_path, [A, B]), machines(tmp_path, 2) as (one, two):
        frame = tcp4(payload, complete=False)
        one.transmit(frame, header)
        got_header, got = two.hear()
        assert got == frame and got_header == HEADER.pack(1, 1, 54, 1448, 34, 16, 10)


def test_a_machine_without_offloads_gets_whole_segments(tmp_path: Path) -> None:
    payload = random.Random(6).randbytes(5000)
    header = HEADER.pack(1, Gso.TCPV4, 54, 1448, 34, 16, 0)
    without = int(NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4 | NetFeature.GUEST_TSO6)
    with cards(tmp_path, [A, B]), machines(tmp_path, 2, without=without) as (one, two):
        one.transmit(tcp4(payload, complete=False), header)
        pieces = [two.hear() for _ in range(4)]
        assert all(is_whole(frame) for _, frame in pieces)
        assert b"".join(frame[54:] for _, frame in pieces) == payload
        assert {head[0] for head, _ in pieces} == {0}


def test_a_machine_that_gives_no_buffers_costs_only_its_own_frames(tmp_path: Path) -> None:
    with cards(tmp_path, [A, B, C]) as made, machines(tmp_path, 3) as (one, two, three):
        for number in range(400):
            one.transmit(ethernet(ALL, A, b"%d" % number))
            assert three.hear()[1] == ethernet(ALL, A, b"%d" % number)
        # `two` took 16 into its buffers, 256 wait for it, the others are gone.
        assert made[1].figures.received == 16 and made[1].figures.dropped == 400 - 16 - 256
        for number in range(16 + 256):
            assert two.hear()[1] == ethernet(ALL, A, b"%d" % number)


def test_hostile_packets_are_counted_and_dropped(tmp_path: Path) -> None:
    with cards(tmp_path, [A, B]) as made, machines(tmp_path, 2) as (one, two):
        one.transmit(b"short")
        one.transmit(tcp4(b"x"), HEADER.pack(1, 0, 0, 0, 60_000, 16, 0))
        one.transmit(tcp4(b"x"), HEADER.pack(1, 1, 0, 0, 34, 16, 0))
        one.transmit(ethernet(B, A, b"fine"))
        assert two.hear()[1] == ethernet(B, A, b"fine")
        assert made[0].figures.malformed == 3


def test_a_card_that_comes_back_is_known_again(tmp_path: Path) -> None:
    with cards(tmp_path, [A, B]), machines(tmp_path, 1) as (one,):
        for turn in range(3):
            with connected(tmp_path / "1.sock", queues=2) as bare:
                bare.negotiate()
            with ExitStack() as stack:
                two = Machine(str(tmp_path / "1.sock"), queues=2)
                stack.callback(two.close)
                two.prepare()
                one.transmit(ethernet(ALL, A, b"%d" % turn))
                assert two.hear()[1] == ethernet(ALL, A, b"%d" % turn)
                two.transmit(ethernet(A, B, b"yes"))
                assert one.hear()[1] == ethernet(A, B, b"yes")


def test_addresses_that_no_card_has_are_refused() -> None:
    switch = Switch(lambda: 0.0)
    for mac in (ALL, b"\1" + bytes(5), bytes(5)):
        with pytest.raises(UsageError, match="not a MAC"):
            NetCard(switch, mac)
    with pytest.raises(UsageError, match="rate"):
        NetCard(switch, A, rate=0)


def test_the_command_connects_two_machines_until_sigterm(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.sock") for number in (0, 1)]
    command = [sys.executable, "-m", "vfiotool", "serve", "vhost-user-net"]
    command += ["--socket-path", paths[0], "--socket-path", paths[1]]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_for(process, paths[1])
    try:
        with machines(tmp_path, 2) as (one, two):
            one.transmit(ethernet(ALL, A, b"hello"))
            assert two.hear()[1] == ethernet(ALL, A, b"hello")
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, b"")
    assert not any(Path(path).exists() for path in paths)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--tap", "a/b"], 2, "interface's name"),
        (["--rate-limit", "fast"], 2, "not a size"),
        (["--rate-limit", "0"], 2, "not positive"),
        (["--socket-path", "SAME"], 2, "twice"),
    ],
)
def test_bad_options_are_one_clear_error_and_leave_nothing(
    tmp_path: Path, options: list[str], code: int, said: str
) -> None:
    path = str(tmp_path / "0.sock")
    command = [sys.executable, "-m", "vfiotool", "serve", "vhost-user-net", "--socket-path", path]
    command += [path if option == "SAME" else option for option in options]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == code and said in done.stderr.decode()
    assert b"Traceback" not in done.stderr and not Path(path).exists()
