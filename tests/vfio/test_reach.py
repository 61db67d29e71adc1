"""Whether a device can be reached, over a configuration space that is bytes."""

from __future__ import annotations

import os
import struct
import threading

import pytest

from vfiotool.errors import KernelError, UsageError
from vfiotool.native.library import Window
from vfiotool.vfio.reach import Reach

PM, EXPRESS, AF = 0x40, 0x50, 0x90


class FakeConfig:
    """Configuration space with power management, PCI Express and AF; `gone` answers ones."""

    def __init__(self) -> None:
        self.bytes = bytearray(256)
        struct.pack_into("<HH", self.bytes, 4, 0x0006, 0x0010)
        self.bytes[0x34] = PM
        for place, identity, following in ((PM, 1, EXPRESS), (EXPRESS, 0x10, AF), (AF, 0x13, 0)):
            self.bytes[place : place + 2] = bytes([identity, following])
        self.gone = False
        self.fails = False

    def read(self, offset: int, width: int) -> int:
        if self.fails:
            raise KernelError("read: EIO", errno_name="EIO")
        if self.gone:
            return (1 << 8 * width) - 1
        return int.from_bytes(self.bytes[offset : offset + width], "little")


@pytest.fixture
def config() -> FakeConfig:
    return FakeConfig()


@pytest.fixture
def window() -> Window:
    fd = os.memfd_create("bar")
    os.ftruncate(fd, 4096)
    made = Window(fd, 0, 0, 4096, 3, 0)
    os.close(fd)
    return made


@pytest.fixture
def reach(config: FakeConfig, window: Window) -> Reach:
    made = Reach("0000:01:00.0", config.read)
    made.refresh()
    made.add(window)
    return made


def store(reach: Reach, config: FakeConfig, offset: int, data: bytes) -> list[str | None]:
    """Write as Config does; the reason during the write, and after it."""
    with reach.writing(offset, data):
        during = reach.reason
        config.bytes[offset : offset + len(data)] = data
    return [during, reach.reason]


@pytest.mark.parametrize("begin", range(5))
@pytest.mark.parametrize("length", range(1, 9))
def test_any_write_that_turns_decode_off_shuts_before_and_after(
    reach: Reach, config: FakeConfig, window: Window, begin: int, length: int
) -> None:
    data = bytearray(config.bytes[begin : begin + length])
    if not begin <= 4 < begin + length:
        assert store(reach, config, begin, bytes(data)) == [None, None]
        return
    data[4 - begin] &= ~2
    during, after = store(reach, config, begin, bytes(data))
    assert during == after and "does not decode memory" in str(after)
    with pytest.raises(UsageError, match="does not decode memory"):
        window.read32(0)
    with pytest.raises(UsageError, match="does not decode memory"):
        reach.refuse()
    data[4 - begin] |= 2
    # Shut until the device has said so.
    during, after = store(reach, config, begin, bytes(data))
    assert "decode" in str(during) and after is None
    assert window.read32(0) == 0


@pytest.mark.parametrize("begin", range(PM, PM + 6))
@pytest.mark.parametrize("length", (1, 2, 4, 8))
@pytest.mark.parametrize("state", (0, 1, 2, 3))
def test_only_d3hot_shuts(
    reach: Reach, config: FakeConfig, window: Window, begin: int, length: int, state: int
) -> None:
    data = bytearray(config.bytes[begin : begin + length])
    if begin <= PM + 4 < begin + length:
        data[PM + 4 - begin] = state
    else:
        state = 0
    during, after = store(reach, config, begin, bytes(data))
    assert ("D3hot" in str(during), "D3hot" in str(after)) == (state == 3, state == 3)


def test_writes_that_change_nothing_of_reach_disturb_nobody(
    reach: Reach, config: FakeConfig
) -> None:
    # Bus mastering on, and all of the rest.
    assert store(reach, config, 4, b"\x06\x00") == [None, None]
    assert store(reach, config, 0x10, bytes(24)) == [None, None]
    assert store(reach, config, EXPRESS + 8, b"\x10\x20") == [None, None]


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (EXPRESS + 9, b"\x80"),
        (EXPRESS + 8, b"\x00\x80"),
        (EXPRESS + 6, b"\x00\x00\x00\x80"),
        (AF + 4, b"\x01"),
        (AF, b"\x13\x00\x06\x03\x01"),
    ],
)
def test_a_function_reset_shuts_while_it_lasts(
    reach: Reach, config: FakeConfig, offset: int, data: bytes
) -> None:
    during, after = store(reach, config, offset, data)
    assert "reset" in str(during) and after is None


def test_low_power_holds_whatever_is_written_and_checked(
    reach: Reach, config: FakeConfig, window: Window
) -> None:
    reach.low_power(True, lambda: None)
    store(reach, config, 4, b"\x04\x00")
    store(reach, config, 4, b"\x06\x00")
    reach.refresh()
    with reach.resetting():
        pass
    with pytest.raises(UsageError, match="may sleep"):
        window.read32(0)
    late = os.memfd_create("late")
    os.ftruncate(late, 4096)
    another = Window(late, 0, 0, 4096, 3, 0)
    reach.add(another)
    with pytest.raises(UsageError, match="may sleep"):
        another.read32(0)
    reach.low_power(False, lambda: None)
    assert (window.read32(0), another.read32(0)) == (0, 0)
    os.close(late)


def test_a_sleep_or_wake_that_failed_leaves_all_as_it_was(reach: Reach, window: Window) -> None:
    def fail() -> None:
        raise KernelError("no", errno_name="EIO")

    with pytest.raises(KernelError):
        reach.low_power(True, fail)
    assert window.read32(0) == 0
    reach.low_power(True, lambda: None)
    with pytest.raises(KernelError):
        reach.low_power(False, fail)
    with pytest.raises(UsageError):
        window.read32(0)


@pytest.mark.parametrize("way", ["gone", "fails"])
def test_a_device_that_is_gone_is_refused(
    reach: Reach, config: FakeConfig, window: Window, way: str
) -> None:
    setattr(config, way, True)
    reach.refresh()
    with pytest.raises(UsageError, match="gone"):
        window.read32(0)
    setattr(config, way, False)
    reach.refresh()
    assert window.read32(0) == 0
    reach.close()
    reach.refresh()
    with pytest.raises(UsageError, match="closed"):
        window.read32(0)


def test_a_capability_list_that_goes_in_circles_ends(config: FakeConfig) -> None:
    config.bytes[AF + 1] = PM
    assert Reach("x", config.read)._capabilities == {1: PM, 0x10: EXPRESS, 0x13: AF}
    config.fails = True
    # Not opened rather than mapped without knowing where its power stands.
    with pytest.raises(KernelError):
        Reach("x", config.read)


def test_a_window_never_opens_for_a_moment(
    reach: Reach, config: FakeConfig, window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When one reason goes and another comes, there is no time between."""
    orders: list[bool] = []
    watched = reach.windows[0]
    monkeypatch.setattr(
        type(watched), "_block", lambda self, blocked: orders.append(blocked), raising=False
    )
    with reach.resetting():
        config.bytes[4] &= ~2
    store(reach, config, PM + 4, b"\x03")
    reach.low_power(True, lambda: None)
    store(reach, config, 4, b"\x06")
    reach.low_power(False, lambda: None)
    assert orders and all(orders)


def test_a_child_does_not_wait_for_a_lock_that_its_parent_held(reach: Reach) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with reach.lock:
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    child = os.fork()
    if child == 0:
        os._exit(0 if reach.lock.acquire(timeout=5) else 1)
    assert os.waitpid(child, 0)[1] == 0
    leave.set()
    thread.join()
