"""What a snapshot keeps of big tables: the lines that concern the captured host."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress

from vfiotool.devices.pci import parse_uevent
from vfiotool.host.paths import PROC_MODULES
from vfiotool.snapshot.text import MAX_FILE_BYTES

_PCI_IDS = "/usr/share/misc/pci.ids"


def reduce_tables(files: dict[str, bytes | int], *, live: bool) -> None:
    """Cut `modules.alias` and `pci.ids` down to what the captured devices can want of them.

    A live host's snapshot always has a table of names, empty if the host had none: it never takes
    names from the machine that it is opened on. A root without a table does, and so does its
    snapshot.
    """
    ids = _ids_of(files)
    table: bytes | None = b"" if live else None
    for path, content in list(files.items()):
        name = path.rpartition("/")[2]
        if name == "modules.alias" and isinstance(content, bytes):
            wanted = (b"alias vfio_pci:", b"alias vfio-pci:")
            kept = [line for line in content.splitlines(True) if line.startswith(wanted)]
            files[path] = b"".join(kept)
        elif path == PROC_MODULES and isinstance(content, bytes):
            # What an unprivileged reader sees: where the kernel lies is nobody's business.
            files[path] = re.sub(rb"\b0x[0-9a-f]{8,16}\b", b"0x0000000000000000", content)
        elif name in ("pci.ids", "pci.ids.gz"):
            del files[path]
            if isinstance(content, bytes):
                table = table or _unpacked(content)
    if table is not None:
        files[_PCI_IDS] = reduce_pci_ids(table, ids)


def _unpacked(content: bytes) -> bytes:
    if content.startswith(b"\x1f\x8b"):
        with suppress(OSError, EOFError, zlib.error):
            return gzip.decompress(content)[:MAX_FILE_BYTES]
    return content


def _ids_of(files: Mapping[str, bytes | int]) -> set[tuple[str, str]]:
    """The id pairs present: (vendor, device), (subsystem pair), ("C", class code)."""
    found = set()
    for path, content in files.items():
        if isinstance(content, int) or not path.endswith("/uevent"):
            continue
        keys = parse_uevent(content.decode("utf-8", "replace"))
        for key in ("PCI_ID", "PCI_SUBSYS_ID"):
            vendor, _, device = keys.get(key, "").lower().partition(":")
            if device:
                found.add((vendor.zfill(4), device.zfill(4)))
        if "PCI_CLASS" in keys:
            found.add(("C", keys["PCI_CLASS"].lower().zfill(6)))
    return found


def reduce_pci_ids(table: bytes, ids: set[tuple[str, str]]) -> bytes:
    """The lines of a `pci.ids` file that name the given ids, in the file's order.

    `ids` holds (vendor, device) pairs, subsystems' among them, and ("C", six-digit class code).
    Source: the format's description at the head of pci.ids.
    """
    heads = {vendor for vendor, _ in ids if vendor != "C"}
    codes = {code for letter, code in ids if letter == "C"}
    kept = []
    head = entry = ""
    for line in table.decode("utf-8", "surrogateescape").splitlines():
        words = line.split(None, 2)
        if not words or line.startswith("#"):
            continue
        depth = len(line) - len(line.lstrip("\t"))
        if depth == 0:
            head = f"C {words[1]}" if words[0] == "C" and len(words) > 1 else words[0]
            entry = ""
        elif depth == 1:
            entry = words[0]
        if head.startswith("C "):
            code = head[2:] + entry + (words[0] if depth == 2 else "")
            wanted = any(known.startswith(code) for known in codes)
        elif depth == 2:
            wanted = (head, entry) in ids and tuple(words[:2]) in ids
        else:
            wanted = (head, entry) in ids if depth else head in heads
        if wanted:
            kept.append(line)
    return "".join(f"{line}\n" for line in kept).encode("utf-8", "surrogateescape")
