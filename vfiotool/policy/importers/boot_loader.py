"""Where boot loaders keep the kernel's command line: GRUB, loader entries, rEFInd, kernelstub, Nix.

Sources: GRUB's manual (GRUB_CMDLINE_LINUX), the Boot Loader Specification (type 1 entries),
rEFInd's manual (refind_linux.conf, refind.conf), kernelstub's configuration file, and the NixOS
options `boot.kernelParams` and `boot.extraModprobeConfig`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from vfiotool.policy.importers.kernel import (
    CommandLine,
    import_modprobe,
    split_words,
)
from vfiotool.policy.importers.rules import Findings, to_toml_value

_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Z][A-Z0-9_]*)(\+?)=(.*)")
# grub-mkconfig puts the first before the second; the recovery entry has the first alone.
_GRUB = ("GRUB_CMDLINE_LINUX", "GRUB_CMDLINE_LINUX_DEFAULT")
_ENTRY_KEYS = re.compile(r"(linux|efi|initrd|title|options|version|machine-id|sort-key)\s")
_NIX_PARAMS = re.compile(r"\bkernelParams\s*=[^\[;]*\[(.*?)\]", re.DOTALL)
_NIX_MODPROBE = re.compile(
    r"\bextraModprobeConfig\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|''(.*?)'')", re.DOTALL
)
_NIX_STRING = re.compile(r"\"((?:[^\"\\]|\\.)*)\"")
_NIX_TOLD = re.compile(r"vfio|iommu|kernelModules|blacklist|pci-stub|pci_stub", re.IGNORECASE)


def import_grub(text: str, where: str) -> Findings:
    """From /etc/default/grub: the command line that grub-mkconfig makes of its variables."""
    found = Findings()
    values: dict[str, list[tuple[str, list[str]]]] = {}
    others = 0
    for number, line in enumerate(text.splitlines(), 1):
        match = _ASSIGNMENT.match(line.strip())
        place = f"{where}:{number}"
        if match is None or match[1] not in _GRUB:
            others += bool(line.strip()) and not line.strip().startswith("#")
            continue
        name, more, value = match.groups()
        words = [word for part in split_words(value) for word in split_words(part)]
        itself = {f"${name}", f"${{{name}}}"}
        kept = values.setdefault(name, [])
        if not more and not itself & set(words):
            for earlier, _ in kept:
                found.leave(earlier, name, f"{place} sets it again, and counts")
            kept.clear()
        kept.append((place, [word for word in words if word not in itself]))
    command = CommandLine(found)
    for name in _GRUB:
        for place, words in values.get(name, ()):
            command.take(place, words)
    command.finish()
    found.rest(where, others)
    return found


def is_loader_entry(text: str) -> bool:
    keys = {match[1] for line in text.splitlines() if (match := _ENTRY_KEYS.match(line.strip()))}
    return "options" in keys and bool(keys & {"linux", "efi", "initrd", "title"})


def import_loader_entry(text: str, where: str) -> Findings:
    """From /boot/loader/entries/NAME.conf: its `options` lines, which are joined."""
    found = Findings()
    command = CommandLine(found)
    for number, line in enumerate(text.splitlines(), 1):
        key, _, value = line.strip().partition(" ")
        if key == "options":
            command.take(f"{where}:{number}", split_words(value))
        elif key and not key.startswith("#"):
            found.leave(f"{where}:{number}", line.strip(), "describes the boot entry")
    command.finish()
    return found


def import_refind(text: str, where: str) -> Findings:
    """From refind_linux.conf (`"title" "options"`) or refind.conf (`options "…"`).

    Of several entries the first counts, which rEFInd boots unless it is told otherwise.
    """
    found = Findings()
    command = CommandLine(found)
    taken: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        place = f"{where}:{number}"
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        parts = split_words(stripped)
        if parts[:1] in (["options"], ["add_options"]) and len(parts) > 1:
            options = " ".join(parts[1:])
        elif stripped.startswith('"') and len(parts) == 2:
            options = parts[1]
        else:
            found.leave(place, stripped, "describes the boot entry")
            continue
        if taken is None:
            command.take(place, split_words(options))
            taken = place
        else:
            found.leave(place, stripped, f"another boot entry than the first, {taken}")
    command.finish()
    return found


def is_kernelstub(text: str) -> bool:
    return text.lstrip().startswith("{") and '"kernel_options"' in text


def import_kernelstub(text: str, where: str) -> Findings:
    """From /etc/kernelstub/configuration: what the user set counts before the default."""
    found = Findings()
    try:
        value = json.loads(text)
        sections = {name: value.get(name) or {} for name in ("default", "user")}
        options = {name: part.get("kernel_options") or [] for name, part in sections.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        found.leave(where, where, f"not kernelstub's JSON: {str(error)[:80]}")
        return found
    command = CommandLine(found)
    chosen = "user" if options["user"] else "default"
    if chosen == "user" and options["default"]:
        found.leave(f"{where}: default", "kernel_options", "the user's own options count")
    words = options[chosen]
    listed = split_words(words) if isinstance(words, str) else [str(word) for word in words]
    command.take(f"{where}: {chosen}", listed)
    command.finish()
    return found


def import_nix(text: str, where: str) -> Findings:
    """From a NixOS module: `boot.kernelParams` and `boot.extraModprobeConfig`.

    Nix is a language, of which only strings that stand there literally are understood.
    """
    found = Findings()
    bare = re.sub(r"(?m)(^|\s)#.*$", lambda match: " " * len(match[0]), text)
    used: set[int] = set()
    command = CommandLine(found)
    for block in _NIX_PARAMS.finditer(bare):
        for string in _NIX_STRING.finditer(block[1]):
            line = _line_at(bare, block.start(1) + string.start())
            command.take(f"{where}:{line}", split_words(string[1]))
        used |= set(range(_line_at(bare, block.start()), _line_at(bare, block.end()) + 1))
    for block in _NIX_MODPROBE.finditer(bare):
        part = 1 if block[1] is not None else 2
        first = _line_at(bare, block.start(part))
        value = block[part].replace("\\n", "\n")
        used |= set(range(_line_at(bare, block.start()), _line_at(bare, block.end()) + 1))
        _nix_modprobe(found, command, value, where, first)
    command.finish()
    _nix_rest(found, bare, where, used)
    return found


def _nix_modprobe(
    found: Findings, command: CommandLine, value: str, where: str, first: int
) -> None:
    inner = import_modprobe({where: "\n" * (first - 1) + value})
    for rule in inner.rules:
        if command.has_ids:
            # kmod appends the command line's own options, and the last one counts.
            why = "the kernel's command line sets ids as well, and counts"
            found.leave(rule.where, to_toml_value(rule.values["match"]), why)
        else:
            found.add(rule)
    found.leftovers += inner.leftovers


def _nix_rest(found: Findings, text: str, where: str, used: set[int]) -> None:
    others = 0
    for number, line in enumerate(text.splitlines(), 1):
        if number in used or not re.search(r"\w", line):
            continue
        if _NIX_TOLD.search(line):
            found.leave(f"{where}:{number}", line.strip(), "not a setting that a policy has")
        else:
            others += 1
    found.rest(where, others)


def _line_at(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def boot_kinds(name: str, text: str) -> Iterator[str]:
    """The kind of a boot loader's file by its name and content, if it is one."""
    if name.endswith(".nix") or "boot.kernelParams" in text or "boot.extraModprobeConfig" in text:
        yield "nix"
    elif name in ("refind_linux.conf", "refind.conf"):
        yield "refind"
    elif is_kernelstub(text):
        yield "kernelstub"
    elif is_loader_entry(text):
        yield "loader-entry"
    elif re.search(r"(?m)^\s*(export\s+)?GRUB_[A-Z_]+\+?=", text):
        yield "grub"
