"""The kernel's command line and modprobe.d: `vfio-pci.ids=…`, `options vfio-pci ids=…`.

Sources: Documentation/admin-guide/kernel-parameters.rst, modprobe.d(5), and the `ids` parameter
of drivers/vfio/pci/vfio_pci.c: `vendor:device[:subvendor[:subdevice[:class[:class_mask]]]]`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping

from vfiotool.policy.importers.rules import Findings

_HEX = re.compile(r"(?:0x)?([0-9a-f]{1,8})", re.IGNORECASE | re.ASCII)
_ANY = "ffffffff"
_TAKERS = {"vfio_pci": "vfio-pci", "pci_stub": "pci-stub"}
# What belongs to the boot loader: it decides about the IOMMU or about who probes first.
_BOOT_WORDS = re.compile(
    r"(iommu|intel_iommu|amd_iommu|iommu\.\w+|pcie_acs_override|rd\.driver\.\w+|"
    r"modprobe\.blacklist|module_blacklist|initcall_blacklist|vfio[\w-]*\.\w+|kvm\w*\.\w+|"
    r"xen-pciback\.hide|pci)(=|$)"
)


class CommandLine:
    """Takes the words of one kernel command line in their order, wherever its parts stand."""

    def __init__(self, found: Findings) -> None:
        self._found = found
        self._seen: dict[str, tuple[str, str]] = {}

    @property
    def has_ids(self) -> bool:
        return bool(self._seen)

    def take(self, place: str, words: list[str]) -> None:
        """One line's words. A line of which nothing is to be said is left as a whole."""
        told = False
        for word in words:
            key, equals, value = word.partition("=")
            module, dot, parameter = key.partition(".")
            driver = _TAKERS.get(module.replace("-", "_"))
            if driver and dot and parameter == "ids" and equals:
                told = True
                if driver in self._seen:
                    # The kernel keeps the last assignment of a string parameter.
                    earlier, ids = self._seen[driver]
                    self._found.leave(
                        earlier, f"{key}={ids}", f"{place} sets ids again, and counts"
                    )
                self._seen[driver] = (place, value)
            elif _BOOT_WORDS.match(word):
                told = True
                why = "stays on the kernel's command line; no policy replaces it"
                self._found.leave(place, word, why)
        if words and not told:
            self._found.leave(place, " ".join(words), "says nothing of a device for VFIO")

    def finish(self) -> None:
        """Write the rules for the ids that count."""
        for driver, (place, value) in self._seen.items():
            _ids(self._found, place, driver, value)


def import_command_line(text: str, where: str) -> Findings:
    """From a kernel command line as it is: /proc/cmdline, /etc/kernel/cmdline."""
    found = Findings()
    command = CommandLine(found)
    for number, line in enumerate(text.splitlines(), 1):
        command.take(f"{where}:{number}", list(_words(line)))
    command.finish()
    return found


def _words(line: str) -> Iterator[str]:
    stripped = line.strip()
    if stripped.startswith("#"):
        return
    if re.match(r"[A-Z_]+\+?=\s*[\"']", stripped):
        # A line of a shell's settings: the words are inside the quotes.
        stripped = " ".join(split_words(stripped.partition("=")[2]))
    yield from split_words(stripped)


def split_words(text: str) -> list[str]:
    """A shell's words; where its quotes do not match, what blanks part."""
    try:
        return shlex.split(text, comments=False, posix=True)
    except ValueError:
        return text.replace('"', " ").replace("'", " ").split()


def import_modprobe(files: Mapping[str, str]) -> Findings:
    """From modprobe.d's files, name to content. The last `ids` of a module counts."""
    found = Findings()
    seen: dict[str, list[tuple[str, str]]] = {}
    for name, content in sorted(files.items()):
        for number, line in _logical_lines(content):
            _modprobe_line(found, f"{name}:{number}", line.split(), seen)
    for driver, values in seen.items():
        for place, value in values[:-1]:
            found.leave(place, f"ids={value}", f"{values[-1][0]} sets ids again, and counts")
        _ids(found, values[-1][0], driver, values[-1][1])
    return found


def _logical_lines(content: str) -> Iterator[tuple[int, str]]:
    held, start = "", 0
    for number, line in enumerate(content.splitlines(), 1):
        start = start or number
        held += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        if held.strip() and not held.lstrip().startswith("#"):
            yield start, held
        held, start = "", 0
    if held.strip():
        yield start, held


def _modprobe_line(
    found: Findings, where: str, words: list[str], seen: dict[str, list[tuple[str, str]]]
) -> None:
    line = " ".join(words)
    driver = _TAKERS.get(words[1].replace("-", "_")) if len(words) > 1 else None
    if words[0] == "options" and driver:
        for word in words[2:]:
            key, _, value = word.partition("=")
            if key == "ids":
                seen.setdefault(driver, []).append((where, value.strip('"')))
            else:
                found.leave(where, word, f"an option of {driver} itself, not of a device")
    elif words[0] == "softdep" and any(
        word.replace("_", "-") in _TAKERS.values() for word in words
    ):
        found.leave(where, line, "decides who probes first: vfiotool boot enable POLICY --early")
    elif words[0] in ("blacklist", "install", "alias", "remove", "softdep"):
        found.leave(where, line, "a rule about modules; a policy names devices")
    elif words[0] == "options":
        found.leave(where, line, "an option of another module")
    else:
        found.leave(where, line, "not a line of modprobe.d(5) that vfiotool knows")


def _ids(found: Findings, where: str, driver: str, value: str) -> None:
    for item in value.split(","):
        if not item:
            continue
        fields = [_HEX.fullmatch(part) for part in item.split(":")]
        if len(fields) < 2 or any(part is None for part in fields):
            found.leave(where, item, "not vendor:device in hexadecimal")
            continue
        vendor, device, *narrower = [part.group(1).lower() for part in fields if part]
        subsystem = [text for text in narrower[:2] if text != _ANY]
        if any(text.strip("0") for text in narrower[2:]) or len(subsystem) == 1:
            # Without its narrowing the rule would take devices that the source leaves alone.
            found.leave(where, item, "narrowed by class or half a subsystem id, unlike any rule")
        elif any(text == _ANY or len(text) > 4 for text in (vendor, device, *subsystem)):
            found.leave(where, item, "matches any vendor or device")
        else:
            name = ":".join(f"{text:>04}" for text in (vendor, device, *subsystem))
            found.device(where, {"id": name}, driver)
