"""State files whose every line carries a checksum: what was damaged is refused, never guessed at.

A line is eight hexadecimal digits (CRC-32 of what follows the space), a space, and one JSON
object. Checksums find accidents; who may write to the folder is `folder.py`'s concern, and what
values may be is checked by whoever reads them.
"""

from __future__ import annotations

import binascii
import json
from typing import Any


def seal(entry: dict[str, Any]) -> bytes:
    """The entry as a line of its own."""
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (binascii.crc32(text), text)


def unseal(line: bytes) -> dict[str, Any]:
    """The entry of a line without its newline. Raises ValueError for anything else."""
    found, _, text = line.partition(b" ")
    if len(found) != 8 or found != b"%08x" % binascii.crc32(text):
        raise ValueError("its checksum is wrong")
    try:
        entry = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(entry, dict):
        raise ValueError("it holds no object")
    return entry


def is_sealed(line: bytes) -> bool:
    """Whether it is a whole line."""
    try:
        unseal(line)
    except ValueError:
        return False
    return True
