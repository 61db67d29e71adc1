"""`snapshot --anonymize`: a snapshot that can be given away.

Replaced, everywhere and consistently: serial numbers (of drives, in VPD and as Device Serial
Number in configuration space), world-wide names, MAC and IP addresses, UUIDs, this host's name
and those of the servers it mounts from. Kept: models, drivers, topology, paths of mounts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from vfiotool.devices.firmware import IOMMU_TABLES
from vfiotool.host.paths import MOUNTS, PROC, PROC_CMDLINE, PROC_MOUNTINFO, PROC_ROUTE, PROC_ROUTE6
from vfiotool.snapshot.mask import Mask
from vfiotool.snapshot.text import NOT_CAPTURED, Snapshot

_HOSTNAME = f"{PROC}/sys/kernel/hostname"
_SERIAL_FILES = frozenset({"serial", "wwid", "nguid", "eui", "unique_id", "hostnqn", "hostid"})
# Binary files whose content is understood here; any other loses its content.
_KNOWN_BYTES = frozenset({"config", "vpd", *IOMMU_TABLES})
# Host names that say nothing, and would hit the distribution's own name.
_COMMON_NAMES = frozenset({"localhost", "debian", "linux", "fedora", "ubuntu", "host", "none"})
_MIN_SECRET = 6
# A server in a mount's source, or the one that the root is mounted from.
_SERVER = re.compile(
    r"(?: - \S+ (?:[^ @/]+@)?(?://|(?=[A-Za-z0-9.-]+:/))|nfsroot=)([A-Za-z0-9][A-Za-z0-9.-]*)"
)
_CAP_DSN = 0x0003


def anonymized(snapshot: Snapshot, key: bytes | None = None) -> Snapshot:
    """The snapshot with what identifies its owner replaced, under `key` (random if not given)."""
    mask = Mask(os.urandom(32) if key is None else key)
    scrub = _Scrubber(mask, snapshot)
    return Snapshot(
        header={**snapshot.header, "anonymized": "yes"},
        files={scrub.text(path): scrub.content(path) for path in snapshot.files},
        links={scrub.text(path): scrub.text(to) for path, to in snapshot.links.items()},
        directories=frozenset(scrub.text(path) for path in snapshot.directories),
        cut_off=snapshot.cut_off,
    )


class _Scrubber:
    def __init__(self, mask: Mask, snapshot: Snapshot) -> None:
        self.mask = mask
        self.files = snapshot.files
        self.hostname = self._hostname()
        self.secrets: dict[str, str] = {
            secret: self._stand_in(secret)
            for path, content in snapshot.files.items()
            if isinstance(content, bytes)
            for secret in _secrets_in(path, content)
        }
        names = {*self._servers(), *([self.hostname] if self.hostname else [])}
        for name in names:
            new = f"host-{self.mask.digest('host', name.encode(), 3).hex()}"
            self.secrets[name] = new
            # Device-mapper doubles the dashes of a volume group's name.
            self.secrets.setdefault(name.replace("-", "--"), new.replace("-", "--"))
        known = sorted(self.secrets, key=len, reverse=True)
        # A short serial number would hit what only looks like it.
        long_enough = (word for word in known if len(word) >= _MIN_SECRET or word in names)
        words = "|".join(re.escape(word) for word in long_enough)
        self.pattern = re.compile(rf"(?<![0-9A-Za-z])(?:{words})(?![0-9A-Za-z])") if words else None

    def _hostname(self) -> str | None:
        content = self.files.get(_HOSTNAME)
        name = content.decode("utf-8", "replace").strip() if isinstance(content, bytes) else ""
        return name if len(name) > 2 and name not in _COMMON_NAMES else None

    def _servers(self) -> set[str]:
        texts = (self.files.get(path) for path in (PROC_MOUNTINFO, MOUNTS, PROC_CMDLINE))
        found = {
            name
            for text in texts
            if isinstance(text, bytes)
            for name in _SERVER.findall(text.decode("utf-8", "replace"))
        }
        # An address is replaced as such.
        return {name for name in found if not re.fullmatch(r"[0-9.]+", name)}

    def _stand_in(self, secret: str) -> str:
        # `nvme.`, `eui.`, `naa.`, `t10.`: the kind of name, not a part of it.
        kind, dot, rest = secret.partition(".")
        if dot and len(kind) <= 4 and not secret.startswith("nqn."):
            return kind + dot + self.mask.shape(rest)
        plain = self.mask.text(secret)
        return plain if plain != secret else self.mask.shape(secret)

    def text(self, text: str) -> str:
        if self.pattern is not None:
            text = self.pattern.sub(lambda match: self.secrets[match[0]], text)
        return self.mask.text(text)

    def content(self, path: str) -> bytes | int:
        content = self.files[path]
        if isinstance(content, int):
            return content
        name = path.rpartition("/")[2]
        if name in ("config", "vpd"):
            return _scrub_config(content, self.mask) if name == "config" else self._vpd(content)
        if b"\0" in content:
            return content if name in _KNOWN_BYTES else NOT_CAPTURED
        text = content.decode("utf-8", "surrogateescape")
        if path == PROC_ROUTE:
            text = re.sub(r"\b[0-9A-F]{8}\b", self._route_word, text)
        elif path == PROC_ROUTE6:
            text = re.sub(r"\b[0-9a-f]{32}\b", self._route6_word, text)
        elif name == "os-release":
            return content
        elif path == _HOSTNAME:
            text = self.secrets.get(text.strip(), "host") + "\n"
        elif name in _SERIAL_FILES and len(text.strip()) < _MIN_SECRET:
            text = self.mask.shape(text)
        return self.text(text).encode("utf-8", "surrogateescape")

    def _route_word(self, match: re.Match[str]) -> str:
        octets = bytes.fromhex(match[0])[::-1]
        # A mask has its ones first; /proc/net/route prints little-endian words.
        number = int.from_bytes(octets, "big")
        if bin(number)[2:].zfill(32).rstrip("0").count("0") == 0:
            return match[0]
        return self.mask.ipv4(octets)[::-1].hex().upper()

    def _route6_word(self, match: re.Match[str]) -> str:
        return self.mask.ipv6(bytes.fromhex(match[0])).hex()

    def _vpd(self, content: bytes) -> bytes:
        return _scrub_vpd(content, self.mask)


def _secrets_in(path: str, content: bytes) -> Iterator[str]:
    name = path.rpartition("/")[2]
    if name in _SERIAL_FILES:
        text = content.decode("utf-8", "surrogateescape").strip()
        if text:
            yield text
    elif name == "vpd":
        for start, size, keyword in _vpd_fields(content):
            if keyword == b"SN":
                text = content[start : start + size].decode("latin-1").strip("\0 ")
                if text.isprintable() and text:
                    yield text


def _scrub_config(content: bytes, mask: Mask) -> bytes:
    """The Device Serial Number replaced (PCI Express Base Specification, 7.9.3)."""
    config = bytearray(content)
    offset, hops = 0x100, 0
    while 0x100 <= offset <= len(config) - 12 and hops < 960:
        head = int.from_bytes(config[offset : offset + 4], "little")
        if head & 0xFFFF == _CAP_DSN:
            serial = bytes(config[offset + 4 : offset + 12])
            config[offset + 4 : offset + 12] = mask.digest("dsn", serial, 8)
        offset, hops = head >> 20 & 0xFFC, hops + 1
    return bytes(config)


def _vpd_fields(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(offset, size, keyword) of each field in the VPD-R and VPD-W resources (PCI 3.0, I)."""
    at = 0
    while at + 3 <= len(content) and content[at] in (0x82, 0x90, 0x91):
        size = int.from_bytes(content[at + 1 : at + 3], "little")
        end = min(at + 3 + size, len(content))
        field = at + 3
        while content[at] != 0x82 and field + 3 <= end:
            length = min(content[field + 2], end - field - 3)
            yield field + 3, length, content[field : field + 2]
            field += 3 + length
        at = end


def _scrub_vpd(content: bytes, mask: Mask) -> bytes:
    """Serial number, asset tag and vendors' own fields replaced, and the checksum put right."""
    vpd = bytearray(content)
    for start, size, keyword in _vpd_fields(content):
        if keyword == b"RV" and size:
            vpd[start] = -sum(vpd[:start]) & 0xFF
        elif keyword == b"SN" or keyword[:1] in (b"V", b"Y"):
            text = content[start : start + size].decode("latin-1")
            core = text.strip("\0 ")
            new = text.replace(core, mask.shape(core)) if core else text
            vpd[start : start + size] = new.encode("latin-1", "replace")
    return bytes(vpd)
