"""Vendor, device, subsystem and class names from the system's pci.ids.

The file is read on the first question and searched as bytes: only the vendors and classes that a
host really has are ever parsed. Source of the format: pci.ids(5), https://pci-ids.ucw.cz/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfiotool.host.host import Host

# Debian and Arch, Fedora, Alpine, `update-pciids` of old; compressed where the distribution does.
_PATHS = (
    "/usr/share/misc/pci.ids",
    "/usr/share/hwdata/pci.ids",
    "/usr/share/pci.ids",
    "/var/lib/pciutils/pci.ids",
    "/usr/share/misc/pci.ids.gz",
    "/usr/share/hwdata/pci.ids.gz",
)
_BLOCK_END = re.compile(rb"\n[^\t#\n]")
_DEVICE_END = re.compile(rb"\n\t?[^\t#\n]")


@dataclass(frozen=True, slots=True)
class DeviceNames:
    """What the table calls one function; None where it has no entry."""

    vendor: str | None = None
    device: str | None = None
    subsystem: str | None = None
    class_name: str | None = None


class Names:
    """The names in one pci.ids table. `Names(None)` knows none and answers None to everything."""

    def __init__(self, table: bytes | None) -> None:
        self._table = b"" if table is None else b"\n" + table + b"\n"
        self._blocks: dict[str, tuple[int, int]] = {}
        self._seen: dict[tuple[str | None, ...], DeviceNames] = {}

    def __bool__(self) -> bool:
        return bool(self._table)

    def lookup(
        self,
        vendor: str | None,
        device: str | None,
        subsystem_vendor: str | None = None,
        subsystem_device: str | None = None,
        class_code: str | None = None,
    ) -> DeviceNames:
        """The names of one function, by its identifiers (four hexadecimal digits, class six)."""
        key = (vendor, device, subsystem_vendor, subsystem_device, class_code)
        found = self._seen.get(key)
        if found is None:
            found = self._seen[key] = DeviceNames(
                vendor=self.vendor(vendor),
                device=self.device(vendor, device),
                subsystem=self.subsystem(vendor, device, subsystem_vendor, subsystem_device),
                class_name=self.class_name(class_code),
            )
        return found

    def vendor(self, vendor: str | None) -> str | None:
        return None if vendor is None else self._name(f"\n{vendor}  ", *self._block(vendor))

    def device(self, vendor: str | None, device: str | None) -> str | None:
        if vendor is None or device is None:
            return None
        return self._name(f"\n\t{device}  ", *self._block(vendor))

    def subsystem(
        self,
        vendor: str | None,
        device: str | None,
        subsystem_vendor: str | None,
        subsystem_device: str | None,
    ) -> str | None:
        if None in (vendor, device, subsystem_vendor, subsystem_device):
            return None
        begin, end = self._block(str(vendor))
        begin = self._table.find(f"\n\t{device}  ".encode(), begin, end)
        if begin < 0:
            return None
        after = _DEVICE_END.search(self._table, begin + 1, end)
        end = end if after is None else after.start()
        return self._name(f"\n\t\t{subsystem_vendor} {subsystem_device}  ", begin, end)

    def class_name(self, class_code: str | None) -> str | None:
        """The subclass's name, or the base class's where the subclass has none."""
        if class_code is None or len(class_code) != 6:
            return None
        head = f"C {class_code[:2]}"
        block = self._block(head)
        subclass = self._name(f"\n\t{class_code[2:4]}  ", *block)
        return subclass or self._name(f"\n{head}  ", *block)

    def _block(self, head: str) -> tuple[int, int]:
        """Where the block of a vendor or class begins and ends in the table; (-1, -1) if absent."""
        found = self._blocks.get(head)
        if found is None:
            needle = f"\n{head}  ".encode()
            # Classes stand at the very end of the file, vendors before them.
            find = self._table.rfind if head.startswith("C ") else self._table.find
            begin = find(needle)
            end = -1
            if begin >= 0:
                after = _BLOCK_END.search(self._table, begin + 1)
                end = len(self._table) - 1 if after is None else after.start()
            found = self._blocks[head] = (begin, end)
        return found

    def _name(self, needle: str, begin: int, end: int) -> str | None:
        if begin < 0:
            return None
        prefix = needle.encode()
        at = self._table.find(prefix, begin, end)
        if at < 0:
            return None
        at += len(prefix)
        name = self._table[at : self._table.index(b"\n", at)]
        return name.decode("utf-8", "backslashreplace").strip()


def read_names(host: Host) -> Names:
    """The host's own table; where it has none, that of the machine that vfiotool runs on."""
    for candidate in (host, None if host.live else Host.local()):
        table = None if candidate is None else _read_table(candidate)
        if table is not None:
            return Names(table)
    return Names(None)


def _read_table(host: Host) -> bytes | None:
    for path in _PATHS:
        try:
            data = host.read_bytes(path)
        except OSError:
            continue
        if not path.endswith(".gz"):
            return data
        import gzip
        import zlib

        try:
            return gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            continue
    return None
