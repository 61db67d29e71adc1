"""Open what `--root` names: a directory laid out like `/`, or a snapshot's file.

Every reading command on a snapshot begins here, so what writes snapshots is not imported.
"""

from __future__ import annotations

import os
import stat
import sys
import zlib
from contextlib import suppress
from dataclasses import replace

from vfiotool.errors import UsageError, from_oserror
from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree
from vfiotool.snapshot.text import MAX_TEXT_BYTES, Snapshot, parse_snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lzma import LZMADecompressor


def load(path: str) -> Snapshot:
    """Read a snapshot file, packed or not. Raises UsageError; see `parse_snapshot`."""
    try:
        with open(path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{path} is not a regular file")
            packed = file.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError as error:
        raise UsageError(
            f"{path}: no such file or directory",
            hint="--root takes a directory laid out like /, or a file of vfiotool snapshot",
        ) from error
    except OSError as error:
        raise from_oserror(f"read {path}", error) from error
    data, cut_off = unpack(packed, path)
    snapshot = parse_snapshot(data, path)
    if cut_off and snapshot.cut_off is None:
        return replace(snapshot, cut_off=f"{path} is damaged after the end of its text")
    return snapshot


def unpack(packed: bytes, name: str) -> tuple[bytes, bool]:
    """The text of a packed or plain file, and whether the packing was cut off or damaged.

    Raises UsageError if it unpacks to more than MAX_TEXT_BYTES.
    """
    unpacker: zlib._Decompress | LZMADecompressor
    damage: type[Exception]
    if packed.startswith(b"\x1f\x8b"):
        unpacker, damage = zlib.decompressobj(wbits=31), zlib.error
    elif packed.startswith(b"\xfd7zXZ"):
        from lzma import LZMADecompressor, LZMAError

        unpacker, damage = LZMADecompressor(memlimit=256 << 20), LZMAError
    else:
        return packed, False
    try:
        data = unpacker.decompress(packed, MAX_TEXT_BYTES + 1)
    except damage:
        # Not even a first block, or damage within: take what can be had byte by byte.
        data = _salvage(packed)
        return data, True
    if len(data) > MAX_TEXT_BYTES:
        raise UsageError(f"{name} unpacks to more than {MAX_TEXT_BYTES} bytes")
    return data, not unpacker.eof or bool(unpacker.unused_data)


def _salvage(packed: bytes) -> bytes:
    if not packed.startswith(b"\x1f\x8b"):
        return b""
    unpacker = zlib.decompressobj(wbits=31)
    data = bytearray()
    with suppress(zlib.error):
        for offset in range(0, len(packed), 64):
            data += unpacker.decompress(packed[offset : offset + 64], MAX_TEXT_BYTES - len(data))
            if len(data) >= MAX_TEXT_BYTES:
                break
    return bytes(data)


def tree_of(snapshot: Snapshot, name: str) -> MemoryTree:
    """The snapshot as a tree that a `Host` can stand on."""
    return MemoryTree(snapshot.files, snapshot.links, snapshot.directories, name=name)


def open_root(path: str) -> Host:
    """What `--root PATH` names, as a host that is only read.

    A directory laid out like `/`, a fixture's directory (with a `sys.txt`), or a snapshot file.
    A truncated snapshot is used as far as it goes, with a warning on standard error. Raises
    UsageError for anything else.
    """
    fixture = os.path.join(path, "sys.txt")
    if os.path.isfile(fixture):
        path = fixture
    elif os.path.isdir(path):
        return Host.at(path)
    snapshot = load(path)
    if snapshot.cut_off is not None:
        sys.stderr.write(f"vfiotool: warning: {snapshot.cut_off}; what came before is used\n")
    return Host(tree_of(snapshot, path), live=False, name=path)
