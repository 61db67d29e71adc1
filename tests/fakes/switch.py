"""The fake kernel with network cards that have more to their VFs than a number.

Eswitch modes over devlink, with each driver's own order (mlx5: eswitch_offloads.c, esw/legacy.c;
ice: ice_eswitch.c, ice_eswitch_mode_set), MSI-X counts (drivers/pci/iov.c,
sriov_vf_msix_count_store), and VFs that vfio-pci makes (vfio_pci_core.c,
vfio_pci_core_sriov_configure and vfio_pci_bus_notifier).
"""

from __future__ import annotations

import errno
import struct

from tests.fakes.kernel import FakeKernel, _error
from tests.fakes.vdpa import netlink_message
from vfiotool.errors import KernelError
from vfiotool.host.paths import ESWITCH
from vfiotool.netlink.codec import Message, Request, as_int, parse_attributes, string, u16
from vfiotool.netlink.devlink import MODES

FAMILY = 0x1D
MLX, ICE = "0000:0a:00.0", "0000:0b:00.0"
DEFAULT_MSIX = 12


class SwitchKernel(FakeKernel):
    """See the module. `modes` holds the eswitch mode of each function that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: dict[str, str] = {}
        self.add_driver("vfio-pci")
        self.add_driver("mlx5_core", ["15b3:101d", "15b3:101e"])
        self.add_driver("ice", ["8086:1593"])
        self.add_driver("iavf", ["8086:1889"])
        self._put("/sys/module/vfio_pci/parameters/enable_sriov", b"N\n")
        for number, (address, driver, ids, vf_ids) in enumerate(
            ((MLX, "mlx5_core", "15b3:101d", "15b3:101e"), (ICE, "ice", "8086:1593", "8086:1889"))
        ):
            self.add_function(
                address,
                ids,
                class_code="020000",
                driver=driver,
                group=40 + number,
                total_vfs=8,
                vf_ids=vf_ids,
                offset=2,
                net=7 + number,
            )
            self.modes[address] = "legacy"

    def read(self, path: str) -> bytes:
        if path.startswith(f"{ESWITCH}/"):
            pf = path.rpartition("/")[2]
            if pf in self.locked:
                return b"unknown ETIMEDOUT\n"
            switches = self.driver_of(pf) in ("mlx5_core", "ice")
            return f"{self.modes[pf] if switches else 'none'}\n".encode()
        return super().read(path)

    def allow_vfio_vfs(self) -> None:
        self._put("/sys/module/vfio_pci/parameters/enable_sriov", b"Y\n")

    # Eswitch

    def answer_netlink(self, request: Request, timeout_s: float) -> list[Message]:
        if request.type == 0x10 and b"devlink\0" in request.payload:
            return [netlink_message(0x10, 1, u16(1, FAMILY), string(2, "devlink"))]
        if request.type != FAMILY:
            return super().answer_netlink(request, timeout_s)
        command, _, _ = struct.unpack_from("=BBH", request.payload)
        assert command == 30, f"the fake kernel does not model devlink command {command}"
        attributes = parse_attributes(request.payload[4:])
        assert attributes[1] == b"pci\0"
        pf = attributes[2].rstrip(b"\0").decode()
        mode = MODES[as_int(attributes[25]) or 0]
        self._admit(request, timeout_s, pf, lambda: self._switch(pf, mode))
        return []

    def _switch(self, pf: str, mode: str) -> None:
        vfs = [self.vf_address(pf, index) for index in range(self.num_vfs(pf))]
        if self.modes[pf] == mode:
            return
        if self.driver_of(pf) == "ice" and vfs:
            raise KernelError("there are VFs", errno_name="EOPNOTSUPP")
        if any(self.driver_of(vf) is not None for vf in vfs):
            raise KernelError("a VF is bound", errno_name="EBUSY")
        self.modes[pf] = mode

    def num_vfs(self, pf: str) -> int:
        return int(self.files[f"{self._real(pf)}/sriov_numvfs"])

    # VFs

    def _set_vfs(self, path: str, pf: str, count: int, partial: bool) -> None:
        driver = self.driver_of(pf)
        enabled = self.files["/sys/module/vfio_pci/parameters/enable_sriov"] == b"Y\n"
        if driver == "vfio-pci" and not enabled:
            raise _error(errno.ENOENT, path)
        if driver == "mlx5_core" and count and self.modes[pf] == "switchdev":
            raise _error(errno.EINVAL, path)
        super()._set_vfs(path, pf, count, partial)

    def _make_vf(self, pf: str, index: int) -> None:
        super()._make_vf(pf, index)
        address = self.vf_address(pf, index)
        self._capture(address)
        self._put(f"{self._real(address)}/sriov_vf_msix_count", b"")
        self._put(f"{self._real(address)}/config", _config(DEFAULT_MSIX))

    def _probe(self, address: str) -> None:
        self._capture(address)
        super()._probe(address)

    def _capture(self, address: str) -> None:
        """vfio-pci sets the override as a VF of its function appears, before it is offered."""
        link = self.links.get(f"{self._real(address)}/physfn", "")
        pf = link.rpartition("/")[2]
        if pf and self.driver_of(pf) == "vfio-pci" and self.override_of(address) is None:
            self._put(f"{self._real(address)}/driver_override", b"vfio-pci\n")

    def _effect(self, path: str, name: str, target: str, text: str, partial: bool) -> None:
        if name != "sriov_vf_msix_count":
            super()._effect(path, name, target, text, partial)
            return
        if not self.exists(path):
            raise _error(errno.ENOENT, path)
        if self.driver_of(target) is not None:
            raise _error(errno.EBUSY, path)
        if not text.strip().isdecimal() or int(text) > 64:
            raise _error(errno.EINVAL, path)
        self._put(f"{self._real(target)}/config", _config(int(text) or DEFAULT_MSIX))

    def state(self) -> dict[object, object]:
        """Everything of FakeKernel's, the modes, and the vectors of each VF."""
        vectors = {
            path: data
            for path, data in self.files.items()
            if path.endswith("/config") and path.startswith("/sys/devices")
        }
        return super().state() | vectors | {"modes": tuple(sorted(self.modes.items()))}


def _config(vectors: int) -> bytes:
    """A configuration space with one capability, MSI-X of so many vectors."""
    data = bytearray(256)
    data[0x06], data[0x34] = 0x10, 0x40
    data[0x40:0x44] = struct.pack("<BBH", 0x11, 0, vectors - 1)
    return bytes(data)
