"""Live events of the devices that vfiotool deals in, as typed values.

The kernel's uevents come through pyudev, from the kernel itself and not from udev: they are there
without a udev daemon, and a rule cannot hold them up. What a burst makes the socket lose is found
again by comparing the host with what was known of it.

Source: Documentation/core-api/kobject.rst (uevents), lib/kobject_uevent.c; drivers/base/dd.c
(bind and unbind); drivers/pci/iov.c (VFs).
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vfiotool.errors import Unsupported, UsageError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_MDEV_DEVICES, SYS_PCI_DEVICES, SYS_VDPA_DEVICES

if TYPE_CHECKING:
    import pyudev

_FOLDERS = {"pci": SYS_PCI_DEVICES, "mdev": SYS_MDEV_DEVICES, "vdpa": SYS_VDPA_DEVICES}
_BUFFER_BYTES = 8 << 20
# A message takes its buffer's overhead at least (include/linux/skbuff.h, SKB_TRUESIZE).
_MOST_QUEUED = _BUFFER_BYTES // 512
_ACTIONS = frozenset({"add", "remove", "bind", "unbind", "change"})


@dataclass(frozen=True, slots=True)
class Known:
    """What the monitor last knew of a device."""

    driver: str | None = None
    pf: str | None = None
    vf_index: int | None = None
    parent: str | None = None
    pci_id: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a device.

    `kind` is `add`, `remove`, `bind`, `unbind`, `vf-add`, `vf-remove`, `mdev-add`, `mdev-remove`,
    or `lost`: the kernel dropped events, and those that follow with `found_later` were found by
    looking. `bus` is `pci`, `mdev` or `vdpa`; `driver` the driver now, `previous_driver` the one
    before; `pf` and `vf_index` say whose VF it is, `parent` where an mdev or vDPA device belongs;
    `time_s` is the wall clock when the event was read.
    """

    kind: str
    bus: str | None
    device: str | None
    driver: str | None = None
    previous_driver: str | None = None
    pf: str | None = None
    vf_index: int | None = None
    parent: str | None = None
    pci_id: str | None = None
    found_later: bool = False
    time_s: float = 0.0


class State:
    """What is known of each device, and how a uevent changes it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.known: dict[tuple[str, str], Known] = {}
        for bus, folder in _FOLDERS.items():
            for device in host.listdir(folder):
                self.known[bus, device] = self._look(bus, device)

    def _look(self, bus: str, device: str, pci_id: str | None = None) -> Known:
        # Links only: they are read without the device's lock, which a stuck unbind holds.
        base = f"{_FOLDERS[bus]}/{device}"
        driver = self._host.linkname(f"{base}/driver")
        if bus != "pci":
            path = self._host.realpath(base) or ""
            return Known(driver=driver, parent=path.split("/")[-2] if "/" in path else None)
        pf = self._host.linkname(f"{base}/physfn")
        index = None if pf is None else self._index(pf, device)
        return Known(driver=driver, pf=pf, vf_index=index, pci_id=pci_id)

    def _index(self, pf: str, device: str) -> int | None:
        base = f"{SYS_PCI_DEVICES}/{pf}"
        for name in self._host.listdir(base):
            number = name.removeprefix("virtfn")
            if number != name and number.isdecimal():
                link = self._host.linkname(f"{base}/{name}")
                if link == device:
                    return int(number)
        return None

    def apply(self, uevent: Mapping[str, str]) -> Event | None:
        """The event that a uevent stands for, or None if it tells nothing new."""
        bus, action = uevent.get("SUBSYSTEM", ""), uevent.get("ACTION", "")
        if bus not in _FOLDERS or action not in _ACTIONS:
            return None
        if "SYNTH_UUID" in uevent:
            # Somebody wrote to a uevent file, as `udevadm trigger` does: nothing happened.
            return None
        device = uevent.get("DEVPATH", "").rpartition("/")[2]
        before = self.known.get((bus, device))
        if self._is_old(action, before, uevent.get("DRIVER")):
            return None
        if action == "remove":
            self.known.pop((bus, device), None)
            return _event("remove", bus, device, before or Known(), None)
        if action == "add":
            pci_id = uevent.get("PCI_ID")
            now = self._look(bus, device, pci_id and pci_id.lower())
            # A driver that has it already announces itself by an event of its own.
            self.known[bus, device] = replace(now, driver=None)
            return _event("add", bus, device, replace(now, driver=None), None)
        if action == "change":
            return self._late_vf(bus, device, before)
        previous = before.driver if before is not None else None
        driver = uevent.get("DRIVER") if action == "bind" else None
        now = replace(before or self._look(bus, device), driver=driver)
        self.known[bus, device] = now
        if action == "bind":
            return _event("bind", bus, device, now, None)
        return _event("unbind", bus, device, now, previous)

    @staticmethod
    def _is_old(action: str, before: Known | None, driver: str | None) -> bool:
        """Whether the state already holds what is announced: a comparison was faster."""
        if action in ("add", "remove"):
            return (before is None) == (action == "remove")
        if before is None or action == "change":
            return False
        return before.driver == (driver if action == "bind" else None)

    def _late_vf(self, bus: str, device: str, before: Known | None) -> Event | None:
        """The kernel adds a VF first, links it to its PF, and then announces a change."""
        if bus != "pci" or before is None or before.pf is not None:
            return None
        now = self._look(bus, device, before.pci_id)
        if now.pf is None:
            return None
        self.known[bus, device] = replace(now, driver=before.driver)
        return _event("add", bus, device, self.known[bus, device], None)

    def compare(self) -> list[Event]:
        """What changed on the host without having been announced; the state is then up to date."""
        fresh = State(self._host).known
        found = []
        for key, was in list(self.known.items()):
            if key not in fresh:
                found.append(_event("remove", *key, was, None))
            elif fresh[key].driver != was.driver:
                now = replace(was, driver=fresh[key].driver)
                kind = "bind" if now.driver is not None else "unbind"
                found.append(_event(kind, *key, now, was.driver))
        for key, now in fresh.items():
            if key not in self.known:
                found.append(_event("add", *key, now, None))
        self.known = fresh
        return [replace(event, found_later=True) for event in found]


def _event(action: str, bus: str, device: str, known: Known, previous: str | None) -> Event:
    kind = action
    if action in ("add", "remove"):
        prefix = "vf-" if known.pf is not None else "mdev-" if bus == "mdev" else ""
        kind = prefix + action
    return Event(
        kind=kind,
        bus=bus,
        device=device,
        driver=known.driver,
        previous_driver=previous,
        pf=known.pf,
        vf_index=known.vf_index,
        parent=known.parent,
        pci_id=known.pci_id,
    )


class Monitor:
    """A subscription to events, from its making on: what happens while nobody reads is queued.

    Raises UsageError for a host that is not the running one, Unsupported without libudev.
    """

    def __init__(self, host: Host) -> None:
        if not host.live:
            raise UsageError(
                f"{host.name} is not the running host: nothing happens there",
                hint="leave out --root",
            )
        self._source = _subscribe()
        # After subscribing, so that nothing falls between the two.
        self._state = State(host)
        self._queue: deque[Event] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the socket back; events that were not read are dropped."""
        if self._source is not None:
            # The socket closes with libudev's last reference.
            self._source = None

    def fileno(self) -> int:
        """Readable when there may be an event, for select and asyncio."""
        assert self._source is not None
        return int(self._source.fileno())

    def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event, or None after `timeout_s` seconds without one (None: no limit)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._queue:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not self._receive(left) and deadline is not None and time.monotonic() >= deadline:
                return None
        return self._queue.popleft()

    def events(self, timeout_s: float | None = None) -> Iterator[Event]:
        """Events as they come, until `timeout_s` seconds have passed in all."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            event = self.next(left)
            if event is not None:
                yield event

    def wait_for(self, wanted: Callable[[Event], bool], timeout_s: float) -> Event | None:
        """The first event that `wanted` accepts, or None after `timeout_s` seconds."""
        return next((event for event in self.events(timeout_s) if wanted(event)), None)

    def _receive(self, timeout_s: float | None) -> bool:
        assert self._source is not None
        now = time.time()
        try:
            device = self._source.poll(timeout=timeout_s)
        except OSError as error:
            if not self._is_overrun(error):
                raise
            self._drain()
            self._queue.append(Event("lost", None, None, time_s=now))
            self._queue.extend(replace(event, time_s=now) for event in self._state.compare())
            return True
        if device is None:
            return False
        self._take(device)
        return True

    def _take(self, device: pyudev.Device) -> None:
        event = self._state.apply(_Properties(device))
        if event is not None:
            self._queue.append(replace(event, time_s=time.time()))

    def _drain(self) -> None:
        """Take what the socket still holds: it is older than what was lost, and than the host."""
        assert self._source is not None
        for _ in range(_MOST_QUEUED):
            try:
                device = self._source.poll(timeout=0)
            except OSError as error:
                if not self._is_overrun(error):
                    raise
                continue
            if device is None:
                return
            self._take(device)

    def _is_overrun(self, error: OSError) -> bool:
        # pyudev's poll tells of a socket's error without its number.
        return (error.errno or self._socket_error()) == errno.ENOBUFS

    def _socket_error(self) -> int:
        """The socket's pending error, which is cleared by asking for it (socket(7), SO_ERROR)."""
        with socket.socket(fileno=os.dup(self.fileno())) as handle:
            return handle.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


class _Properties(Mapping[str, str]):
    """A uevent's properties, fetched when asked for: most events need four of twenty."""

    def __init__(self, device: pyudev.Device) -> None:
        self._properties = device.properties

    def __getitem__(self, key: str) -> str:
        return str(self._properties[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._properties)

    def __len__(self) -> int:
        return len(self._properties)


def _subscribe() -> pyudev.Monitor:
    try:
        import pyudev

        monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
    except (ImportError, OSError) as error:
        raise Unsupported(
            f"cannot watch events: {error}",
            hint="install pyudev and the library libudev1 (Debian) or systemd-libs (Fedora)",
        ) from error
    for bus in _FOLDERS:
        monitor.filter_by(bus)
    with suppress(OSError):
        # More than rmem_max takes CAP_NET_ADMIN; without it bursts are found by comparison.
        monitor.set_receive_buffer_size(_BUFFER_BYTES)
    monitor.start()
    return monitor
