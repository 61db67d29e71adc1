"""The fake kernel with vDPA: the netlink family and the bus, as drivers/vdpa/vdpa.c has them.

Two parents, vdpasim_net and vdpasim_blk. A new device is offered to virtio_vdpa unless the bus's
autoprobe is off; what the kernel refuses is refused with its errno, what is not modelled fails.
"""

from __future__ import annotations

import errno
import struct

from tests.fakes.kernel import FakeKernel, _error
from vfiotool.errors import KernelError
from vfiotool.netlink.codec import (
    Message,
    Request,
    attribute,
    encode,
    generic,
    parse_attributes,
    string,
    u16,
    u32,
    u64,
)

FAMILY = 0x1C
BUS = "/sys/bus/vdpa"
PARENTS = {"vdpasim_net": 1, "vdpasim_blk": 2}
NET_FEATURES = 1 << 3 | 1 << 5 | 1 << 16 | 1 << 32
BLOCK_FEATURES = 1 << 6 | 1 << 9 | 1 << 32


class VdpaKernel(FakeKernel):
    """See the module. `made` holds each device's parent, and MAC address and MTU if given."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, tuple[str, bytes | None, int | None]] = {}
        self._put(f"{BUS}/drivers_autoprobe", b"1\n")
        self._put(f"{BUS}/drivers_probe", b"")
        self.children.setdefault(f"{BUS}/devices", set())
        self._adopt(f"{BUS}/devices")
        for driver in ("vhost_vdpa", "virtio_vdpa"):
            for name in ("bind", "unbind"):
                self._put(f"{BUS}/drivers/{driver}/{name}", b"")

    # Netlink

    def answer_netlink(self, request: Request, timeout_s: float) -> list[Message]:
        if request.type == 0x10:
            return [netlink_message(0x10, 1, u16(1, FAMILY), string(2, "vdpa"))]
        if request.type != FAMILY:
            return super().answer_netlink(request, timeout_s)
        command, _, _ = struct.unpack_from("=BBH", request.payload)
        attributes = parse_attributes(request.payload[4:])
        if command in (3, 4, 8):
            return self._change(request, command, attributes, timeout_s)
        if command == 2:
            return [self._parent(name) for name in PARENTS]
        if command == 5:
            return [self._device(name) for name in self.made]
        if command == 7:
            return self._counters(attributes)
        assert command == 6, f"the fake kernel does not model vDPA command {command}"
        return [self._config(attributes[4].rstrip(b"\0").decode())]

    def _change(
        self, request: Request, command: int, attributes: dict[int, bytes], timeout_s: float
    ) -> list[Message]:
        name = attributes[4].rstrip(b"\0").decode()

        def act() -> None:
            if command == 8:
                parent, _, mtu = self.made[name]
                self.made[name] = (parent, attributes[10], mtu)
            elif command == 3:
                self._new(name, attributes)
            else:
                self._delete(name)

        self._admit(request, timeout_s, name, act)
        return []

    def _new(self, name: str, attributes: dict[int, bytes]) -> None:
        parent = attributes[2].rstrip(b"\0").decode()
        if parent not in PARENTS:
            raise KernelError("no such management device", errno_name="ENODEV")
        if name in self.made:
            raise KernelError("there is one of that name", errno_name="EEXIST")
        mtu = attributes.get(13)
        number = None if mtu is None else struct.unpack("=H", mtu)[0]
        self.made[name] = (parent, attributes.get(10), number)
        self._put(f"/sys/devices/{name}/driver_override", b"(null)\n")
        self._link(f"{BUS}/devices/{name}", f"../../../devices/{name}")
        if self.files[f"{BUS}/drivers_autoprobe"] == b"1\n":
            self._attach(name)

    def _delete(self, name: str) -> None:
        if self.made.pop(name, None) is None:
            raise KernelError("no such device", errno_name="ENODEV")
        self._detach_vdpa(name)
        self._remove(f"/sys/devices/{name}")
        self._remove(f"{BUS}/devices/{name}")

    def _parent(self, name: str) -> Message:
        features = NET_FEATURES if PARENTS[name] == 1 else 0
        parts = (string(2, name), u64(3, 1 << PARENTS[name]), u32(15, 3), u64(16, features))
        return netlink_message(FAMILY, 1, *parts)

    def _device(self, name: str) -> Message:
        parent = self.made[name][0]
        parts = (string(2, parent), string(4, name), u32(5, PARENTS[parent]), u32(6, 0))
        return netlink_message(FAMILY, 3, *parts, u32(7, 3), u16(8, 256), u16(9, 1))

    def _counters(self, attributes: dict[int, bytes]) -> list[Message]:
        name = attributes[4].rstrip(b"\0").decode()
        (queue,) = struct.unpack("=I", attributes[17])
        if PARENTS[self.made[name][0]] != 1:
            raise KernelError("read a vDPA device's statistics", errno_name="EOPNOTSUPP")
        if self.vdpa_driver(name) != "virtio_vdpa":
            raise KernelError("feature negotiation not complete", errno_name="EAGAIN")
        if queue > 1:
            raise KernelError("read a vDPA device's statistics", errno_name="EINVAL")
        counted = (string(18, "packets"), u64(19, 7 + queue), string(18, "bytes"), u64(19, 900))
        return [netlink_message(FAMILY, 7, string(4, name), u32(17, queue), *counted)]

    def _config(self, name: str) -> Message:
        if name not in self.made:
            raise KernelError("read a vDPA device's configuration", errno_name="ENODEV")
        parent, mac, mtu = self.made[name]
        if PARENTS[parent] == 1:
            parts = [u64(20, NET_FEATURES), u16(11, 1), u16(13, mtu or 1500)]
            parts.append(attribute(10, mac or bytes(6)))
        else:
            parts = [u64(20, BLOCK_FEATURES), u64(21, 262144), u32(23, 512)]
        return netlink_message(FAMILY, 6, string(4, name), u32(5, PARENTS[parent]), *parts)

    # The bus

    def _effect(self, path: str, name: str, target: str, text: str, partial: bool) -> None:
        if not path.startswith(f"{BUS}/"):
            super()._effect(path, name, target, text, partial)
            return
        if not self.exists(path):
            raise _error(errno.ENOENT, path)
        if path == f"{BUS}/drivers_autoprobe":
            self._put(path, f"{text.strip()}\n".encode())
        elif path == f"{BUS}/drivers_probe":
            self._attach(text.strip())
        elif name == "driver_override":
            value = text.partition("\n")[0]
            self._put(f"/sys/devices/{target}/{name}", f"{value or '(null)'}\n".encode())
        elif name == "unbind":
            if self.vdpa_driver(text) != path.split("/")[-2]:
                raise _error(errno.ENODEV, path)
            self._detach_vdpa(text)
        elif name == "bind":
            if self.vdpa_driver(text) is not None or not self._fits(text, path.split("/")[-2]):
                raise _error(errno.ENODEV, path)
            self._attach(text)
        else:
            raise AssertionError(f"the fake kernel does not model writing {text!r} to {path}")

    def _target(self, path: str, text: str) -> str:
        if path.startswith((f"{BUS}/drivers/", f"{BUS}/drivers_probe")):
            return text.strip()
        return super()._target(path, text)

    def vdpa_driver(self, name: str) -> str | None:
        link = self.links.get(f"/sys/devices/{name}/driver")
        return None if link is None else link.rpartition("/")[2]

    def _fits(self, name: str, driver: str) -> bool:
        override = self.files[f"/sys/devices/{name}/driver_override"].decode().strip()
        return override in ("(null)", driver)

    def _attach(self, name: str) -> None:
        if name not in self.made or self.vdpa_driver(name) is not None:
            return
        for driver in ("virtio_vdpa", "vhost_vdpa"):
            if self._fits(name, driver):
                self._link(f"/sys/devices/{name}/driver", f"../../bus/vdpa/drivers/{driver}")
                return

    def _detach_vdpa(self, name: str) -> None:
        self._remove(f"/sys/devices/{name}/driver")

    def vdpa_state(self) -> dict[str, object]:
        """All that a vDPA change may leave behind."""
        state: dict[str, object] = {"autoprobe": self.files[f"{BUS}/drivers_autoprobe"]}
        for name, made in self.made.items():
            override = self.files[f"/sys/devices/{name}/driver_override"]
            state[name] = (*made, self.vdpa_driver(name), override)
        return state


def netlink_message(kind: int, command: int, *attributes: bytes) -> Message:
    data = encode(kind, 0, 1, generic(command, 1, *attributes))
    return Message(kind, 0, 1, data[16:])
