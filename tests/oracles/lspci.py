"""What `lspci -vvv -xxxx -nn` says of each function, held against our decoding field by field.

Every flag and value that lspci prints of a capability that it decodes must be found in ours:
a word that no rule here explains is reported like a difference, so nothing is compared silently;
but for an lspci that is newer than the rules, whose new words are left alone.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from tests.oracles.lspci_rules import ANY, FLAGS, NAME_ONLY, OWN_RULES, VALUES
from vfiotool.devices.config.decode import Capability, ConfigSpace
from vfiotool.devices.config.header import Header

_FUNCTION = re.compile(r"^((?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) ")
_HEX = re.compile(r"^([0-9a-f]{2,3}): ((?:[0-9a-f]{2} ?){16})$")
_CAPABILITY = re.compile(r"^\tCapabilities: \[([0-9a-f]+)(?: v(\d+))?\] (.*)$")
_FLAG = re.compile(r"(?<![\w.])([\w.<>/-]*[\w.]:?)([+-])(?=[\s,;)]|$)")


@dataclass
class LspciCapability:
    offset: int
    version: int | None
    title: str
    lines: list[str] = field(default_factory=list)


@dataclass
class LspciFunction:
    address: str
    lines: list[str] = field(default_factory=list)
    capabilities: list[LspciCapability] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)


def parse(text: str) -> list[LspciFunction]:
    """The functions of an `lspci -vvv -xxxx -nn` listing, or of a dump of that form."""
    functions: list[LspciFunction] = []
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            functions.append(LspciFunction(match[1]))
        elif match := _HEX.match(line):
            functions[-1].data += bytes.fromhex(match[2])
        elif match := _CAPABILITY.match(line):
            version = None if match[2] is None else int(match[2])
            capability = LspciCapability(int(match[1], 16), version, match[3])
            functions[-1].capabilities.append(capability)
        elif line.startswith("\t\t") and functions and functions[-1].capabilities:
            functions[-1].capabilities[-1].lines.append(line)
        elif line.startswith("\t") and functions:
            functions[-1].lines.append(line)
    return functions


def segments(capability: LspciCapability) -> Iterator[tuple[str, str]]:
    """`(name, text)` of each line of a capability, continuation lines joined to theirs."""
    name, text = "", capability.title
    for line in capability.lines:
        body = line.strip()
        deep = line.startswith("\t\t\t")
        head = re.match(r"([A-Za-z][\w ]*?\d?):(?:\s|$)", body)
        if deep or head is None:
            text += " " + body
            continue
        yield name, text
        name, text = head[1], body[head.end() :]
    yield name, text


# Every word of this lspci has a rule (Debian 12's).
RULES_ARE_OF = (3, 9, 0)


@dataclass
class Comparison:
    """Counts what was compared; `wrong` names each difference and each unexplained word."""

    compared: int = 0
    wrong: list[str] = field(default_factory=list)

    def equal(self, what: str, ours: object, theirs: object) -> None:
        self.compared += 1
        if ours != theirs:
            self.wrong.append(f"{what}: ours {ours!r}, lspci {theirs!r}")

    def unexplained(self, what: str) -> None:
        if lspci_version() <= RULES_ARE_OF:
            self.wrong.append(what)


@cache
def lspci_version() -> tuple[int, ...]:
    said = subprocess.run(["lspci", "--version"], capture_output=True, text=True, check=True)
    return tuple(int(part) for part in re.findall(r"\d+", said.stdout))


def compare(function: LspciFunction, space: ConfigSpace) -> Comparison:
    """Hold our decoding of a function against lspci's of the same bytes."""
    result = Comparison()
    theirs = list(function.capabilities)
    if theirs and theirs[-1].title in ("<chain looped>", "<chain broken>", "<access denied>"):
        result.equal("broken list", bool(space.problems) or not space.complete, True)
        theirs.pop()
    result.equal(
        f"{function.address} offsets",
        [(item.offset, item.version) for item in space.capabilities],
        [(item.offset, item.version) for item in theirs],
    )
    for ours, other in zip(space.capabilities, theirs, strict=False):
        _compare_capability(result, f"{function.address} {ours.name}@{ours.offset:#x}", ours, other)
    if space.header is not None:
        _compare_header(result, function, space.header)
    return result


def _field(fields: object, path: str) -> object:
    for part in path.split("."):
        if not isinstance(fields, dict) or part not in fields:
            return f"no such field {path}"
        fields = fields[part]
    return fields


def _compare_capability(
    result: Comparison, where: str, ours: Capability, theirs: LspciCapability
) -> None:
    if ours.name in NAME_ONLY:
        result.equal(where, theirs.title.startswith(NAME_ONLY[ours.name]), True)
        return
    if ours.name in OWN_RULES:
        _compare_own(result, where, ours, theirs)
        return
    unknown = re.match(r"(?:Extended )?Capability ID (?:0x)?([0-9a-f]+)", theirs.title)
    if unknown:
        result.equal(where, ours.id, int(unknown[1], 16))
        return
    if ours.name not in VALUES:
        result.unexplained(f"{where}: no rule for {theirs.title!r}")
        return
    for line, text in segments(theirs):
        if ours.name == "dvsec" and line:
            continue  # What CXL defines inside its own structures is not PCI's.
        if line == "Region" or re.match(r"Region \d", line):
            _compare_vf_bar(result, where, ours, line, text)
            continue
        text = re.sub(r"Changed: MRL([+-]) PresDet", r"ChangedMRL\1 ChangedPresDet", text)
        for pattern, path, read in VALUES[ours.name].get(line, []):
            match = re.search(pattern, text)
            if match is None:
                continue
            text = text[: match.start()] + " " + text[match.end() :]
            value = read(match[1])
            if path and value is not ANY:
                result.equal(f"{where} {line} {path}", _field(ours.fields, path), value)
        flags = FLAGS.get(ours.name, {}).get(line, {})
        for match in _FLAG.finditer(text):
            path = flags.get(match[1])
            if path == "":
                continue
            if path is None:
                result.unexplained(f"{where} {line}: no rule for the flag {match[1]!r}")
                continue
            meant = (match[2] == "+") != path.startswith("!")
            result.equal(f"{where} {path}", _field(ours.fields, path.lstrip("!")), meant)
        rest = _FLAG.sub("", text)
        if re.search(r"\w", rest) and ours.name not in ("subsystem", "vendor", "sata"):
            result.unexplained(f"{where} {line}: no rule for {rest.strip()!r}")


def _compare_vf_bar(result: Comparison, where: str, ours: Capability, line: str, text: str) -> None:
    match = re.match(r"Memory at ([0-9a-f]+) \((\d\d)-bit, (non-)?prefetchable\)", text)
    bars = ours.fields.get("vf_bars")
    assert match is not None and isinstance(bars, list), text
    index = int(line.split()[1])
    mine = next((bar for bar in bars if isinstance(bar, dict) and bar["index"] == index), None)
    result.equal(
        f"{where} vf_bars[{index}]",
        mine,
        {
            "index": index,
            "start": int(match[1], 16),
            "bits": int(match[2]),
            "prefetchable": match[3] is None,
        },
    )


_UNITS = {"MB": 20, "GB": 30, "TB": 40, "PB": 50, "EB": 60}


def _size(text: str) -> int | None:
    return None if text == "<unknown>" else int(text[:-2]) << _UNITS[text[-2:]]


def _compare_own(result: Comparison, where: str, ours: Capability, theirs: LspciCapability) -> None:
    text = "\n".join([theirs.title, *theirs.lines])
    if ours.name in ("rebar", "vf-rebar"):
        if "error in resizable BAR" in text or "<unreadable>" in text:
            return
        found = re.findall(r"BAR (\d): current size: (\S+?)(?:, supported: (.*))?$", text, re.M)
        bars = [
            {"bar": int(bar), "size": _size(size), "sizes": [_size(s) for s in sizes.split()]}
            for bar, size, sizes in found
        ]
        result.equal(f"{where} bars", ours.fields["bars"], bars)
    elif ours.name == "tph":
        for words, path in (
            ("Interrupt vector mode", "interrupt_vector_mode"),
            ("Device specific mode", "device_specific_mode"),
            ("Extended requester", "extended_requester"),
        ):
            result.equal(f"{where} {path}", ours.fields[path], words in text)
        places = ("No steering", "TPH capability", "MSI-X table", "Reserved steering")
        place = next(i for i, words in enumerate(places) if words in text)
        result.equal(f"{where} table_location", ours.fields["table_location"], place)
    elif ours.name == "vc":
        result.equal(
            f"{where} low_priority",
            ours.fields["low_priority"],
            int(re.findall(r"LPEVC=(\d)", text)[0]),
        )
        found = re.findall(r"Enable([+-]) ID=(\d) ArbSelect=\S+ TC/VC=([0-9a-f]{2})", text)
        pending = re.findall(r"NegoPending([+-])", text)
        channels = [
            {
                "enabled": enabled == "+",
                "id": int(number),
                "traffic_classes": classes,
                "negotiation_pending": negotiation == "+",
            }
            for (enabled, number, classes), negotiation in zip(found, pending, strict=True)
        ]
        result.equal(f"{where} channels", ours.fields["channels"], channels)
    elif ours.name == "multicast":
        for pattern, path, base in (
            (r"MaxGroups (\d+)", "max_groups", 10),
            (r"NumGroups (\d+)", "groups", 10),
            (r"IndexPos (\d+)", "index_position", 10),
            (r"McastBAR: .*BaseAddr ([0-9a-f]+)", "base", 16),
        ):
            value = int(re.findall(pattern, text)[0], base)
            result.equal(f"{where} {path}", ours.fields[path], value)
        for pattern, path in (
            (r"ReceiveVec: *([0-9a-f]+)", "receive"),
            (r"BlockAllVec: *([0-9a-f]+)", "block_all"),
            (r"BlockUntransVec: *([0-9a-f]+)", "block_untranslated"),
        ):
            result.equal(f"{where} {path}", ours.fields[path], re.findall(pattern, text)[0])
    elif ours.name == "ea":
        result.equal(
            f"{where} count", ours.fields["count"], int(re.findall(r"NumEntries=(\d+)", text)[0])
        )
        entries = ours.fields["entries"]
        assert isinstance(entries, list)
        found = [
            (int(base, 16), int(limit, 16) + 1, enabled == "+", writable == "+")
            for enabled, writable, base, limit in re.findall(
                r"Enable([+-]) Writable([+-])[\s\S]*?Base: ([0-9a-f]+)\s+MaxOffset: ([0-9a-f]+)",
                text,
            )
        ]
        mine = [
            (item["start"], item["size"], item["enabled"], item["writable"])
            for item in entries
            if isinstance(item, dict)
        ]
        result.equal(f"{where} entries", mine, found)
    elif ours.name == "hypertransport":
        kinds = {"MSI Mapping": "msi-mapping", "Slave": "slave", "Host": "host"}
        for words, kind in kinds.items():
            if words in theirs.title:
                result.equal(f"{where} kind", ours.fields["kind"], kind)
    elif ours.name == "pci-x":
        match = re.search(r"Status: Dev=([0-9a-f]{2}):([0-9a-f]{2})\.(\d) 64bit([+-])", text)
        if match:
            status = ours.fields["status"]
            assert isinstance(status, dict)
            mine = (status["bus"], status["device"], status["function"], status["64bit"])
            other = (int(match[1], 16), int(match[2], 16), int(match[3]), match[4] == "+")
            result.equal(f"{where} status", mine, other)
    elif ours.name == "agp":
        version = re.findall(r"AGP version ([0-9a-f]+\.[0-9a-f]+)", text)[0]
        result.equal(f"{where} version", ours.fields["version"], version)


_COMMAND = {
    "I/O": "io",
    "Mem": "memory",
    "BusMaster": "bus_master",
    "SpecCycle": "special_cycles",
    "MemWINV": "write_invalidate",
    "VGASnoop": "vga_snoop",
    "ParErr": "parity",
    "Stepping": "stepping",
    "SERR": "serr",
    "FastB2B": "fast_back_to_back",
    "DisINTx": "intx_disable",
}
_STATUS = {
    "Cap": "capability_list",
    "66MHz": "66mhz",
    "UDF": "user_features",
    "FastB2B": "fast_back_to_back",
    "ParErr": "parity",
    ">TAbort": "signalled_target_abort",
    "<TAbort": "received_target_abort",
    "<MAbort": "received_master_abort",
    ">SERR": "system_error",
    "<PERR": "detected_parity",
    "INTx": "intx",
}
_BRIDGE = {
    "Parity": "parity",
    "SERR": "serr",
    "NoISA": "isa",
    "VGA": "vga",
    "VGA16": "vga_16bit",
    "MAbort": "master_abort",
    ">Reset": "secondary_reset",
    "FastB2B": "fast_back_to_back",
    "PriDiscTmr": "primary_discard_timer",
    "SecDiscTmr": "secondary_discard_timer",
    "DiscTmrStat": "discard_timer_status",
    "DiscTmrSERREn": "discard_timer_serr",
}


def _compare_header(result: Comparison, function: LspciFunction, header: Header) -> None:
    flag = re.compile(r"([<>]?[\w/]+)([+-])(?=\s|$)")
    text = "\n".join(function.lines)
    for name, fields, words in (
        ("Control", header.command, _COMMAND),
        ("Status", header.status, _STATUS),
        ("BridgeCtl", header.bridge_control, _BRIDGE),
    ):
        line = re.search(rf"^\t{name}: (.*(?:\n\t\t.*)?)", text, re.M)
        if line is None or fields is None:
            continue
        for word, sign in flag.findall(line[1]):
            what = f"{function.address} {name} {word}"
            result.equal(what, fields.get(words.get(word, ""), "no rule"), sign == "+")
    if match := re.search(r"Interrupt: pin ([A-D])", text):
        result.equal(f"{function.address} pin", header.interrupt_pin, match[1])
    if match := re.search(r"Cache Line Size: (\d+) bytes", text):
        result.equal(f"{function.address} cache line", header.cache_line_bytes, int(match[1]))
    if match := re.search(r"primary=(\w\w), secondary=(\w\w), subordinate=(\w\w)", text):
        numbers = dict(
            zip(
                ("primary", "secondary", "subordinate"),
                (int(number, 16) for number in match.groups()),
                strict=True,
            )
        )
        result.equal(f"{function.address} bus", header.bus, numbers)
