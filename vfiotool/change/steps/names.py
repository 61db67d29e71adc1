"""What names of devices, drivers and types may look like: each becomes a path part in sysfs.

Wherever a name comes from (a command line, a policy, a saved plan, a journal), it passes one of
these anchored patterns before it is put into a path or handed to modprobe.
"""

from __future__ import annotations

import re

from vfiotool.devices.pci import Address
from vfiotool.errors import UsageError

# A driver's folder below bus/*/drivers, and a module as modprobe takes it.
DRIVER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+ -]{0,63}", re.ASCII)
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
# An mdev parent and a type, a vDPA device: one path part.
PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:+ -]{0,127}", re.ASCII)
# An attribute below a device's folder, which may lie in a folder of its own (`vendor/budget`).
ATTRIBUTE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*", re.ASCII)

# What another tool has set as an override is put back as it was: a line, whatever stands in it.
OVERRIDE = re.compile(r"[^\x00\n]{1,4094}")


def require(what: str, pattern: re.Pattern[str], text: str | None) -> None:
    """Raise UsageError unless `text` matches the whole of `pattern` (None passes)."""
    if text is not None and pattern.fullmatch(text) is None:
        raise UsageError(f"{text[:80]!r} cannot be {what}")


def require_address(text: str) -> None:
    """Raise UsageError unless `text` is a full PCI address in the form that sysfs shows."""
    if not Address.is_address(text) or str(Address.parse(text)) != text:
        raise UsageError(f"{text[:80]!r} is not a PCI address")
