"""A tap interface of this host as a port of a switch.

Linux Documentation/networking/tuntap.rst.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import Callable

from vfiotool.errors import Unsupported, UsageError, from_oserror
from vfiotool.host.paths import DEV_TUN
from vfiotool.virtio.frames import HEADER, Frame, parse_frame
from vfiotool.virtio.net import Switch

# linux/if_tun.h
_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 1, 2, 4
_BATCH = 64
_LARGEST = HEADER.size + 65_550


class TapPort:
    """The tap interface `name`, made if there is none; it goes with this port unless it persists.
    One that is deleted meanwhile is reported, and its frames are dropped from then on.

    Raises UsageError for a name that no interface can have, Unsupported without the tun module,
    NotPermitted without CAP_NET_ADMIN, KernelError if another program has it.
    """

    def __init__(self, name: str, switch: Switch, report: Callable[[str], None]) -> None:
        raw = os.fsencode(name)
        if not 0 < len(raw) < 16 or b"/" in raw or b"%" in raw or name in (".", ".."):
            raise UsageError(f"{name!r} cannot be an interface's name")
        try:
            self._fd = os.open(DEV_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Unsupported(f"{DEV_TUN} is missing", hint="modprobe tun") from None
        except OSError as error:
            raise from_oserror(f"open {DEV_TUN}", error) from error
        try:
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
            fcntl.ioctl(self._fd, _TUNSETIFF, struct.pack("16sH22x", raw, flags))
            fcntl.ioctl(self._fd, _TUNSETVNETHDRSZ, struct.pack("i", HEADER.size))
            fcntl.ioctl(self._fd, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)
        except OSError as error:
            os.close(self._fd)
            raise from_oserror(f"attach to the tap interface {name}", error) from error
        self.dropped = 0
        self.name = name
        self._report = report
        self._switch = switch
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._readable)
        switch.add(self)

    def deliver(self, frame: Frame) -> None:
        """Port.deliver. The kernel completes checksums and segments by itself."""
        try:
            os.writev(self._fd, [frame.header(), frame.data])
        except OSError:
            # A queue that is full or an interface that is down: as on a wire.
            self.dropped += 1

    def _readable(self) -> None:
        for _ in range(_BATCH):
            try:
                packet = os.read(self._fd, _LARGEST)
            except BlockingIOError:
                return
            except OSError as error:
                # It would be ready for ever.
                self._loop.remove_reader(self._fd)
                self._report(f"the tap interface {self.name} is gone: {error.strerror}")
                return
            if (frame := parse_frame(packet, HEADER.size)) is not None:
                self._switch.forward(self, frame)

    def close(self) -> None:
        self._switch.remove(self)
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
