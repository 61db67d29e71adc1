"""Clients that break the protocol in every way: the server goes on, and nothing is left of them."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import socket
import struct
import tempfile
import threading
import time

import pytest

from tests.models.served import open_files, resident_kib, serving
from tests.models.test_conformance import Card, wait_for
from vfiotool.models import BarSpec, DmaFault, Model, ModelServer
from vfiotool.vfio import Device, UserCommand, UserProtocolError, user_message

messages = pytest.mark.parametrize(
    "count", [4000, pytest.param(1_000_000, marks=pytest.mark.proof)], ids=str
)


class Client:
    """A raw connection; `hello` negotiates as a good client does."""

    def __init__(self, server: ModelServer) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(5)
        self.socket.connect(server.path)

    def send(self, data: bytes, files: list[int] | None = None) -> None:
        if files:
            socket.send_fds(self.socket, [data], files)
        else:
            self.socket.sendall(data)

    def ask(self, command: int, payload: bytes = b"", files: list[int] | None = None) -> int:
        """The errno of the answer, 0 for success."""
        self.send(user_message.format_message(7, command, 0, payload), files)
        reply = user_message.receive(self.socket)
        reply.close()
        assert reply.is_reply and reply.number == 7 and reply.command == command
        return reply.error if reply.failed else 0

    def hello(self) -> None:
        data = user_message.format_version(user_message.UserCapabilities())
        assert self.ask(UserCommand.VERSION, data) == 0

    def is_ended(self) -> bool:
        try:
            while self.socket.recv(4096):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        self.socket.close()


def memory_file(size: int, *, sealed: bool = True) -> int:
    import fcntl

    file = os.memfd_create("client", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size)
    if sealed:
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return file


def is_served(server: ModelServer) -> None:
    """A good client is served as if nothing had been."""
    wait_for(lambda: server.session is None)
    with Device.open(server.name) as device:
        assert device.vendor == 0xABCD and device.region(0).read32(0) == 0xC0FFEE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.0\r\n\r\n",
        struct.pack("=HHIII", 1, 1, 15, 0, 0),
        struct.pack("=HHIII", 1, 1, 0xFFFFFFFF, 0, 0),
        struct.pack("=HHIII", 1, 1, 16, 2, 0),
        user_message.format_message(1, 4, 0, b"\0" * 16),
        user_message.format_message(1, 1, 0, b"\0"),
        user_message.format_message(1, 1, 0, struct.pack("=HH", 9, 0)),
        user_message.format_message(1, 1, 0, struct.pack("=HH", 0, 1) + b"{\xff\0"),
        user_message.format_message(1, 1, 0, struct.pack("=HH", 0, 1) + b"[" * 3000 + b"\0"),
        user_message.format_message(
            1, 1, 0, struct.pack("=HH", 0, 1) + b'{"capabilities":{"max_msg_fds":-1}}\0'
        ),
    ],
    ids=[
        "nothing", "text", "short", "huge", "type", "no version", "cut", "major", "utf8", "deep",
        "negative",
    ],
)  # fmt: skip
def test_a_bad_beginning_ends_the_connection_and_nothing_else(data: bytes) -> None:
    with serving(Card()) as server:
        client = Client(server)
        client.send(data)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.is_ended()
        client.close()
        is_served(server)


def test_wrong_commands_are_answered_with_an_errno() -> None:
    card = Card()
    with serving(card) as server:
        client = Client(server)
        client.hello()
        access = user_message.REGION_ACCESS
        file = memory_file(8192)
        dma = user_message.DMA_MAP
        cases: list[tuple[int, bytes, list[int], str]] = [
            (99, b"", [], "ENOTSUP"),
            (UserCommand.VERSION, b"", [], "ENOTSUP"),
            (UserCommand.DEVICE_GET_INFO, b"\0" * 4, [], "EINVAL"),
            (UserCommand.DEVICE_GET_REGION_INFO, struct.pack("=IIIIQQ", 32, 0, 9, 0, 0, 0), [],
             "EINVAL"),
            (UserCommand.DEVICE_GET_IRQ_INFO, struct.pack("=IIII", 16, 0, 77, 0), [], "EINVAL"),
            (UserCommand.REGION_READ, access.pack(0, 0, 0), [], "EINVAL"),
            (UserCommand.REGION_READ, access.pack(0, 1, 4), [], "EINVAL"),
            (UserCommand.REGION_READ, access.pack(4094, 7, 4), [], "EINVAL"),
            (UserCommand.REGION_READ, access.pack((1 << 64) - 1, 0, 0xFFFFFFFF), [], "EINVAL"),
            (UserCommand.REGION_WRITE, access.pack(0, 0, 8) + b"abc", [], "EINVAL"),
            (UserCommand.REGION_WRITE_MULTI, struct.pack("=Q", 1 << 60), [], "EINVAL"),
            (UserCommand.DEVICE_SET_IRQS, struct.pack("=IIIII", 20, 36, 2, 0, 4000000000), [],
             "EINVAL"),
            (UserCommand.DEVICE_SET_IRQS, struct.pack("=IIIII", 20, 36, 2, 0, 2), [file], "EINVAL"),
            (UserCommand.DEVICE_SET_IRQS, struct.pack("=IIIII", 20, 34, 2, 0, 8), [], "EINVAL"),
            (UserCommand.DMA_MAP, dma.pack(32, 3, 0, 0x1000, 0x3000), [file], "EINVAL"),
            (UserCommand.DMA_MAP, dma.pack(32, 3, 1 << 63, 0x1000, 0x1000), [file], "EINVAL"),
            (UserCommand.DMA_MAP, dma.pack(32, 3, 0, 0x1001, 0x1000), [file], "EINVAL"),
            (UserCommand.DMA_MAP, dma.pack(32, 0, 0, 0x1000, 0x1000), [file], "EINVAL"),
            (UserCommand.DMA_MAP, dma.pack(32, 3, 0, (1 << 64) - 4096, 8192), [], "EINVAL"),
            (UserCommand.DMA_MAP, dma.pack(32, 3, 0, 0x1000, 0x1000), [file, file], "EINVAL"),
            (UserCommand.DMA_UNMAP, struct.pack("=IIQQ", 24, 0, 0x1000, 0x1000), [], "ENOENT"),
            (UserCommand.DMA_UNMAP, struct.pack("=IIQQ", 24, 2, 0x1000, 0), [], "EINVAL"),
        ]  # fmt: skip
        before = open_files()
        import errno

        for command, payload, files, name in cases:
            found = client.ask(command, payload, files)
            assert errno.errorcode.get(found) == name, (command, payload)
        assert open_files() == before, "descriptors of refused messages are closed"
        good = dma.pack(32, 3, 0, 0x1000, 0x1000)
        assert client.ask(UserCommand.DMA_MAP, good, [file]) == 0
        assert errno.errorcode[client.ask(UserCommand.DMA_MAP, good, [file])] == "EEXIST"
        part = struct.pack("=IIQQ", 24, 0, 0x1000, 0x800)
        assert errno.errorcode[client.ask(UserCommand.DMA_UNMAP, part)] == "EINVAL"
        everything = struct.pack("=IIQQ", 24, 2, 0, 0)
        assert client.ask(UserCommand.DMA_UNMAP, everything) == 0
        assert open_files() == before
        os.close(file)
        client.close()
        is_served(server)


def test_descriptors_that_are_not_memory_are_refused() -> None:
    with serving(Card()) as server:
        client = Client(server)
        client.hello()
        good = user_message.DMA_MAP.pack(32, 3, 0, 0x1000, 0x1000)
        read_end, write_end = os.pipe()
        folder = os.open("/", os.O_RDONLY)
        null = os.open("/dev/null", os.O_RDWR)
        read_only = os.open("/proc/self/exe", os.O_RDONLY)
        try:
            for file in (read_end, write_end, folder, null):
                assert client.ask(UserCommand.DMA_MAP, good, [file])
            assert client.ask(UserCommand.DMA_MAP, good, [read_only]) == 0
        finally:
            for file in (read_end, write_end, folder, null, read_only):
                os.close(file)
        with pytest.raises(Exception, match="0x1000"):
            _master(client)
            server.model.dma_write(0x1000, b"x")
        client.close()
        is_served(server)


def _master(client: Client) -> None:
    payload = user_message.REGION_ACCESS.pack(4, 7, 2) + b"\x06\0"
    assert client.ask(UserCommand.REGION_WRITE, payload) == 0


def test_an_interrupt_s_descriptor_is_an_eventfd() -> None:
    with serving(Card()) as server, tempfile.TemporaryFile() as file:
        client = Client(server)
        client.hello()
        before = open_files()
        read_end, write_end = os.pipe()
        folder = os.open("/", os.O_RDONLY)
        event = os.eventfd(0)
        asked = struct.pack("=IIIII", 20, 36, 2, 0, 1)
        try:
            for wrong in (read_end, write_end, folder, file.fileno(), client.socket.fileno()):
                assert client.ask(UserCommand.DEVICE_SET_IRQS, asked, [wrong])
            assert client.ask(UserCommand.DEVICE_SET_IRQS, asked, [event]) == 0
        finally:
            for one in (read_end, write_end, folder, event):
                os.close(one)
        assert open_files() == before + 1
        client.close()
        is_served(server)


class Greedy(Card):
    """It fetches memory when it is told to, within the handler."""

    faulted = ""

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        super().region_write(index, offset, data)
        if index == 0:
            try:
                self.dma_read(0x1000, 4)
            except DmaFault as fault:
                self.faulted = str(fault)


def test_commands_that_come_while_the_device_waits_for_memory_do_not_fill_the_server() -> None:
    card = Greedy()
    with serving(card) as server:
        is_served(server)
        wait_for(lambda: server.session is None)
        files, kib = open_files(), resident_kib()
        client = Client(server)
        client.hello()
        _master(client)
        given = user_message.DMA_MAP.pack(32, 3, 0, 0x1000, 0x1000)
        assert client.ask(UserCommand.DMA_MAP, given) == 0
        write = user_message.REGION_ACCESS.pack(4, 0, 4) + bytes(4)
        client.send(user_message.format_message(1, UserCommand.REGION_WRITE, 0, write))
        message = user_message.format_message(1, UserCommand.REGION_WRITE, 16, bytes(60000))
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 3000:
                client.send(message)
                sent += 1
        assert sent < 600
        client.close()
        wait_for(lambda: server.session is None)
        assert "faster than they are answered" in card.faulted
        assert open_files() == files and resident_kib() - kib < 64 << 10
        is_served(server)


def test_bytes_that_come_one_by_one_do_not_keep_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(Card()) as server:
        client = Client(server)
        client.hello()
        assert server.session is not None
        server.session.channel.set_limit(0.3)
        begun = time.monotonic()
        message = user_message.format_message(1, UserCommand.REGION_WRITE, 0, bytes(1000))
        with contextlib.suppress(OSError):
            for at in range(len(message)):
                client.send(message[at : at + 1])
                threading.Event().wait(0.05)
        assert client.is_ended() and time.monotonic() - begun < 12
        client.close()
        is_served(server)


def test_a_large_read_costs_no_more_a_byte_than_small_ones() -> None:
    """Its time grew with the square of its size: one client kept the server for half a minute."""

    class Large(Model):
        bars = (BarSpec(0, 1 << 21, wide=True),)

    with serving(Large()) as server:
        begun = time.process_time()
        for at in range(0, 1 << 18, 1 << 12):
            server.model.region_read(0, at, 1 << 12)
        small = time.process_time() - begun
        begun = time.process_time()
        assert server.model.region_read(0, 0, 1 << 20) == bytes(1 << 20)
        # Four times as much; it was forty.
        assert time.process_time() - begun < 12 * small


def test_memory_that_is_shortened_under_the_device_is_a_fault_and_no_crash() -> None:
    card = Card()
    with serving(card) as server:
        client = Client(server)
        client.hello()
        _master(client)
        file = memory_file(8192, sealed=False)
        good = user_message.DMA_MAP.pack(32, 3, 0, 0x1000, 0x2000)
        assert client.ask(UserCommand.DMA_MAP, good, [file]) == 0
        card.dma_write(0x1000, b"hello")
        assert os.pread(file, 5, 0) == b"hello"
        os.ftruncate(file, 4096)
        with pytest.raises(Exception, match="was shortened"):
            card.dma_read(0x2000, 4)
        with pytest.raises(Exception, match="was shortened"):
            card.dma_write(0x2000, b"x")
        assert os.fstat(file).st_size == 4096
        os.close(file)
        client.close()
        is_served(server)


def test_a_flood_of_mappings_ends_at_the_limit_that_was_told() -> None:
    from vfiotool.models.dma import ClientMemory

    with serving(Card()) as server:
        client = Client(server)
        client.hello()
        assert server.session is not None
        server.session._memory._most = 50
        maps = [
            client.ask(UserCommand.DMA_MAP, user_message.DMA_MAP.pack(32, 3, 0, 4096 * n, 4096))
            for n in range(60)
        ]
        assert maps.count(0) == 50 and os.strerror(maps[-1]) == "No space left on device"
        client.close()
        is_served(server)
    assert ClientMemory.__init__.__defaults__ == (65535,)


def test_a_file_that_is_mapped_page_by_page_is_opened_once() -> None:
    """As QEMU maps memory behind a guest's IOMMU: tens of thousands of messages, a file in each."""
    card = Card()
    with serving(card) as server:
        client = Client(server)
        client.hello()
        _master(client)
        before, pages = open_files(), 300
        file = memory_file(pages // 2 * 4096)
        for page in range(pages):
            if page == pages // 2:
                beyond = user_message.DMA_MAP.pack(32, 3, page * 4096, page * 4096, 4096)
                assert client.ask(UserCommand.DMA_MAP, beyond, [file]) == errno.EINVAL
                os.ftruncate(file, pages * 4096)
            # Backwards in the file: pieces that are neighbours in one are not in the other.
            at = (pages // 2 - 1 - page) * 4096 if page < pages // 2 else page * 4096
            one = user_message.DMA_MAP.pack(32, 3, at, page * 4096, 4096)
            assert client.ask(UserCommand.DMA_MAP, one, [file]) == 0
        assert open_files() <= before + 3, "the client's, the server's, and the mapping's own"
        card.dma_write(4096 - 2, b"ends")
        last = (pages // 2 - 1) * 4096
        assert os.pread(file, 2, last + 4094) + os.pread(file, 2, last - 4096) == b"ends"
        card.dma_write((pages - 1) * 4096, b"late")
        assert card.dma_read((pages - 1) * 4096, 4) == os.pread(file, 4, (pages - 1) * 4096)
        for page in range(pages):
            one = user_message.DMA_UNMAP.pack(24, 0, page * 4096, 4096)
            assert client.ask(UserCommand.DMA_UNMAP, one) == 0
        os.close(file)
        assert open_files() == before
        client.close()
        is_served(server)


def test_descriptors_that_this_process_cannot_open_are_named_as_what_they_are() -> None:
    mine, theirs = socket.socketpair()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with mine, theirs, open(os.devnull, "rb") as file:
        data = user_message.format_message(1, 8, 0, b"")
        socket.send_fds(theirs, [data], [file.fileno()] * 3)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(mine.fileno(), theirs.fileno()), before[1]))
        try:
            with pytest.raises(UserProtocolError, match="as many files open as it may"):
                user_message.receive(mine)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_too_many_descriptors_end_the_connection() -> None:
    with serving(Card()) as server:
        before = open_files()
        client = Client(server)
        client.hello()
        file = os.open("/dev/null", os.O_RDONLY)
        client.send(user_message.format_message(1, 8, 0, b""), [file] * 100)
        assert client.is_ended()
        os.close(file)
        client.close()
        wait_for(lambda: server.session is None)
        assert open_files() == before
        is_served(server)


def _nonsense(source: random.Random) -> bytes:
    """A message that is well formed as far as its header, mostly."""
    draw = source.random()
    command = source.choice([*UserCommand, 0, 14, 99, 65535])
    payload = source.randbytes(source.choice([0, 1, 4, 8, 15, 16, 20, 24, 32, 40, 64, 200]))
    if draw < 0.6 and len(payload) >= 16:
        # Numbers near what is allowed reach further than random ones.
        near = [0, 1, 2, 3, 4, 7, 8, 16, 20, 32, 36, 4095, 4096, 8192, 0xFFFFFFFF]
        words = [source.choice(near) for _ in range(len(payload) // 4)]
        payload = struct.pack(f"={len(words)}I", *words)
    flags = source.choice([0, 0, 0, 0, 16, 1, 32, 33])
    number = source.randrange(65536)
    message = user_message.format_message(number, command, flags, payload)
    if draw > 0.999:
        return message[: source.randrange(len(message))]  # and nothing more: it stays incomplete
    return message


@messages
def test_nonsense_neither_ends_the_server_nor_grows_it(count: int) -> None:
    source = random.Random(20)
    card = Card()
    null = os.open("/dev/null", os.O_RDWR)
    memory = memory_file(1 << 16)
    with serving(card) as server:
        is_served(server)
        wait_for(lambda: server.session is None)
        files, sent, kib = open_files(), 0, 0
        while sent < count:
            client = Client(server)
            client.socket.settimeout(20)
            client.hello()
            with contextlib.suppress(OSError):
                for _ in range(400):
                    given = source.choice([[], [], [], [null], [memory], [null, memory]])
                    client.send(_nonsense(source), given)
                    client.socket.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        while client.socket.recv(1 << 16):
                            pass
                    client.socket.setblocking(True)
                    sent += 1
            client.close()
            wait_for(lambda: server.session is None)
            assert open_files() == files, sent
            if sent > count // 4 and not kib:
                kib = resident_kib()
        assert resident_kib() - kib < 16 << 10, "memory is flat"
        card.faults.gone = False
        card.reset()
        is_served(server)
    os.close(null)
    os.close(memory)


def test_a_message_that_stays_incomplete_is_waited_for_with_a_limit() -> None:
    with serving(Card()) as server:
        client = Client(server)
        client.hello()
        assert server.session is not None
        server.session.channel.set_limit(0.1)
        begun = time.monotonic()
        client.send(struct.pack("=HH", 1, 9))
        assert client.is_ended() and time.monotonic() - begun < 12
        client.close()
        is_served(server)
