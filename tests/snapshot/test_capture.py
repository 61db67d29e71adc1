"""Snapshots: the text form, packing, truncation, hostile input, capture, comparison."""

from __future__ import annotations

import errno
import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfiotool.cli.main import main
from vfiotool.devices.inventory import read_inventory
from vfiotool.devices.names import read_names
from vfiotool.errors import UsageError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES
from vfiotool.host.tree import MemoryTree
from vfiotool.snapshot.capture import capture, expand, save
from vfiotool.snapshot.diff import compare
from vfiotool.snapshot.load import load, open_root, unpack
from vfiotool.snapshot.reduce import reduce_pci_ids
from vfiotool.snapshot.text import (
    MAX_TEXT_BYTES,
    NOT_CAPTURED,
    Snapshot,
    escape,
    format_snapshot,
    parse_snapshot,
    unescape,
)

EDU = "/sys/devices/pci0000:00/0000:00:01.0"
ODD_DOMAIN = "/sys/devices/pci10000:00/10000:00:02.0"


def small_host() -> Host:
    files: dict[str, bytes | int] = {
        f"{EDU}/uevent": b"DRIVER=edu\nPCI_CLASS=FF00\nPCI_ID=1234:11E8\n"
        b"PCI_SUBSYS_ID=1AF4:1100\nPCI_SLOT_NAME=0000:00:01.0\n",
        f"{EDU}/config": bytes.fromhex("3412e811") + bytes(252),
        f"{EDU}/class": b"0x00ff00\n",
        f"{EDU}/label": b"a\nname \x1b[31m\\ with \xff escapes ",
        f"{EDU}/vpd": errno.EIO,
        f"{ODD_DOMAIN}/uevent": b"PCI_CLASS=20000\nPCI_ID=8086:10C9\n",
        "/proc/sys/kernel/osrelease": b"6.12.1\n",
        "/usr/share/misc/pci.ids": b"1234  Technical Corp.\n\t11e8  QEMU Educational Device\n"
        b"8086  Intel\n\t0001  Other\n\t10c9  82576\nC 02  Network controller\n",
    }
    links = {
        f"{SYS_PCI_DEVICES}/0000:00:01.0": "../../../devices/pci0000:00/0000:00:01.0",
        f"{SYS_PCI_DEVICES}/10000:00:02.0": "../../../devices/pci10000:00/10000:00:02.0",
        f"{EDU}/driver": "../../../bus/pci/drivers/edu",
        f"{EDU}/iommu_group": "../../../kernel/iommu_groups/3",
        "/sys/kernel/iommu_groups/3/devices/0000:00:01.0": f"../../../..{EDU[4:]}",
    }
    tree = MemoryTree(files, links, ["/sys/bus/pci/drivers/edu", "/sys/class/iommu"])
    return Host(tree, live=False, name="small")


def test_a_snapshot_gives_the_same_inventory_and_names_as_the_host(tmp_path: Path) -> None:
    host = small_host()
    taken = capture(host, [read_inventory, read_names], header={"machine": "small"})
    for name in ("a.txt", "a.gz", "a.xz"):
        file = tmp_path / name
        save(taken, str(file))
        opened = open_root(str(file))
        assert read_inventory(opened) == read_inventory(host)
        assert read_names(opened).device("1234", "11e8") == "QEMU Educational Device"
        assert not opened.live
        again = load(str(file))
        assert (again.header, again.files, again.links) == (taken.header, taken.files, taken.links)


def test_what_only_a_command_reads_is_captured_because_it_is_run_on_a_recorder() -> None:
    odd = "/sys/module/some_module/parameters/knob"
    tree = MemoryTree({odd: b"1\n"}, {})
    host = Host(tree, live=False, name="x")
    assert odd not in capture(host).files
    assert capture(host, [lambda seen: seen.read(odd)]).files[odd] == b"1\n"


def test_a_listed_directory_lists_the_same_names_from_the_snapshot() -> None:
    tree = MemoryTree(
        {"/sys/x/a": b"1\n", "/sys/x/b": errno.EACCES, "/sys/x/c/d": b""}, {"/sys/x/l": "c"}
    )
    taken = capture(Host(tree, live=False, name="x"), [lambda seen: seen.listdir("/sys/x")])
    copy = MemoryTree(taken.files, taken.links, taken.directories)
    assert sorted(copy.listdir("/sys/x")) == ["a", "b", "c", "l"]
    assert copy.isdir("/sys/x/c") and not copy.isdir("/sys/x/a") and copy.readlink("/sys/x/l")


def test_a_repeated_question_gets_the_first_answer_so_that_all_commands_see_one_host() -> None:
    tree = MemoryTree({"/sys/count": b"1\n"}, {})

    def count(seen: Host) -> None:
        assert seen.read("/sys/count") == "1"
        tree.files["/sys/count"] = b"2\n"

    assert capture(Host(tree, live=False, name="x"), [count, count]).files["/sys/count"] == b"1\n"


def test_listing_processes_does_not_put_them_all_into_the_snapshot() -> None:
    tree = MemoryTree({"/proc/7/comm": b"qemu\n", "/proc/8/comm": b"editor\n"}, {})
    taken = capture(Host(tree, live=False, name="x"), [lambda seen: seen.listdir("/proc")])
    assert not [path for path in (*taken.files, *taken.directories) if path.startswith("/proc/")]


def test_a_reading_that_hangs_reads_as_nothing_from_the_snapshot_too() -> None:
    class HangingHost(Host):
        def read_guarded(
            self, paths: Iterable[str], timeout_s: float = 2.0
        ) -> dict[str, str | None]:
            return dict.fromkeys(paths)

    path = f"{EDU}/driver_override"
    source = HangingHost(MemoryTree({path: b"x\n"}, {}), live=True, name="x")
    taken = capture(source, [lambda seen: seen.read_guarded([path])])
    assert taken.files[path] == errno.ETIMEDOUT


def test_capturing_a_snapshot_again_gives_the_same_text(tmp_path: Path) -> None:
    first = capture(small_host(), [read_inventory, read_names])
    save(first, str(tmp_path / "a.gz"))
    again = capture(open_root(str(tmp_path / "a.gz")), [read_inventory, read_names])
    assert format_snapshot(again) == format_snapshot(first)


NAMES = (
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=20)
    | st.binary(max_size=20).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
).filter(lambda name: name not in ("", ".", "..") and not set(name) & {"/", "\0"})
CONTENT = st.binary(max_size=200) | st.text(max_size=80).map(lambda t: t.encode("utf-8", "replace"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(NAMES, CONTENT | st.integers(1, 600), max_size=6),
    st.dictionaries(NAMES, NAMES, max_size=3),
)
def test_every_tree_survives_the_text_form(
    files: dict[str, bytes | int], links: dict[str, str]
) -> None:
    taken = Snapshot(
        {"machine": "x"},
        {f"/sys/{name}": content for name, content in files.items()},
        {f"/proc/l/{name}": to for name, to in links.items()},
        frozenset({"/dev/empty"}),
    )
    back = parse_snapshot(format_snapshot(taken).encode(), "x")
    assert (back.header, back.files, back.links) == (taken.header, taken.files, taken.links)
    assert "/dev/empty" in back.directories and back.cut_off is None


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=100))
def test_escaping_is_undone_and_leaves_one_printable_line(data: bytes) -> None:
    text = escape(data)
    assert unescape(text) == data
    assert text.isprintable() and not text.endswith(" ")


def test_the_text_is_readable_and_diffable() -> None:
    text = format_snapshot(capture(small_host(), [read_inventory]))
    assert "class = 0x00ff00\n" in text
    assert "uevent |\n| DRIVER=edu\n| PCI_CLASS=FF00\n" in text
    assert "config # 256\n# 000: 3412e811" in text
    assert "vpd ! EIO\n" in text
    assert "driver -> ../../../bus/pci/drivers/edu\n" in text
    assert "| name \\x1b[31m\\\\ with \\xff escapes\\x20\n" in text


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_a_truncated_snapshot_still_lists_what_came_before(
    tmp_path: Path, keep: float, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = capture(small_host(), [read_inventory])
    file = tmp_path / f"a{suffix}"
    save(whole, str(file))
    data = file.read_bytes()
    file.write_bytes(data[: max(200, int(len(data) * keep))])
    host = open_root(str(file))
    warning = capsys.readouterr().err
    assert "cut off after line" in warning or "damaged after the end" in warning
    for path, content in host.tree.files.items():  # type: ignore[attr-defined]
        assert content in (whole.files[path], errno.EIO)
    read_inventory(host)


def test_a_file_cut_in_its_middle_is_unreadable_rather_than_wrong() -> None:
    text = format_snapshot(Snapshot({}, {"/sys/config": bytes(range(200))}, {}))
    head = text[: text.index("# 060")]
    cut = parse_snapshot(head.encode(), "x")
    assert cut.cut_off is not None and cut.files["/sys/config"] == errno.EIO


def body(*lines: str) -> bytes:
    text = ["vfiotool snapshot 1", "", *lines]
    return "\n".join([*text, f"[end {len(text)}]", ""]).encode()


@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        (b"something else\n", 1, "begins with"),
        (b"", 1, "begins with"),
        (body("name = before any section"), 3, "before the first section"),
        (body("[/sys/../etc]"), 3, "absolute"),
        (body("[sys]"), 3, "absolute"),
        (body("[/sys//x]"), 3, "absolute"),
        (body("[/sys", "a = 1"), 3, "a section is written"),
        (body("[/sys]", "[/sys]"), 4, "twice"),
        (body("[/sys]", "a = 1", "a = 2"), 5, "twice"),
        (body("[/sys]", "a = 1", "a -> b"), 5, "twice"),
        (body("[/sys]", ".. = 1"), 4, "one path component"),
        (body("[/sys]", "a/b = 1"), 4, "one path component"),
        (body("[/sys]", f"{'a' * 300} = 1"), 4, "255"),
        (body("[/sys]", "a = \\q"), 4, "backslash"),
        (body("[/sys]", "a = \\x4"), 4, "backslash"),
        (body("[/sys]", "nonsense"), 4, "not an entry"),
        (body("[/sys]", "a ! ENOSUCHERRNO"), 4, "errno"),
        (body("[/sys]", "a ->"), 4, "target"),
        (body("[/sys]", "a ? b"), 4, "nothing follows"),
        (body("[/sys]", "a | b"), 4, "follows `|`"),
        (body("[/sys]", "a |", "|x"), 5, "begins with"),
        (body("[/sys]", "a # many"), 4, "number of bytes"),
        (body("[/sys]", "a # 99999999"), 4, "at most"),
        (body("[/sys]", "a # 4", "# 000: 0102030405"), 5, "beyond"),
        (body("[/sys]", "a # 4", "# 000: 010"), 5, "hexadecimal"),
        (body("[/sys]", "a # 4", "# 002: 01", "# 001: 01"), 6, "out of order"),
        (body("[/sys]", *(f"a{n} # 4194304" for n in range(17))), 20, "holds at most"),
        (body("[/sys]", "a = 1", "[/sys/a]", "b = 2"), 5, "something else"),
        (body("[/sys]", "a -> b", "[/sys/a/c]"), 5, "something else"),
        (body("[/sys]", "a = 1") + b"more\n", 6, "after the end"),
        (b"vfiotool snapshot 1\n\n[/sys]\na = 1\n[end 99]\n", 5, "counts 99"),
        (b"vfiotool snapshot 1\nBad Header\n", 2, "header"),
        (b"vfiotool snapshot 1\nkey: 1\nkey: 2\n", 3, "twice"),
        (b"vfiotool snapshot 1\n\n[/sys]\na = \xff\xfe\n", 4, "UTF-8"),
        (b"vfiotool snapshot 1\n\n[/sys]\na = " + b"x" * (1 << 20) + b"\n", 4, "a line has"),
    ],
)
def test_hostile_text_is_refused_with_the_line(data: bytes, line: int, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_snapshot(data, "evil")
    assert caught.value.message.startswith(f"evil:{line}: ")
    assert reason in caught.value.message
    assert caught.value.exit_code == 2


def test_a_small_file_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(MAX_TEXT_BYTES + 1))
    with pytest.raises(UsageError, match="unpacks to more"):
        unpack(bomb, "bomb")


def test_links_in_a_snapshot_lead_nowhere_outside_of_it() -> None:
    data = body("[/sys/bus/pci/devices]", "0000:00:01.0 -> ../../../../../../etc", "up -> /etc")
    tree = parse_snapshot(data, "x")
    memory = MemoryTree(tree.files, tree.links, tree.directories)
    for name in ("0000:00:01.0", "up"):
        with pytest.raises(FileNotFoundError):
            memory.read(f"/sys/bus/pci/devices/{name}/hostname")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_text_is_refused_or_read_and_never_crashes(data: st.DataObject) -> None:
    text = bytearray(format_snapshot(capture(small_host(), [read_inventory])).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        piece = data.draw(st.binary(max_size=6) | st.sampled_from([b"[/", b"\n", b" -> ", b"# "]))
        text[at : at + data.draw(st.integers(0, 6))] = piece
    try:
        found = parse_snapshot(bytes(text), "x")
    except UsageError:
        return
    tree = MemoryTree(found.files, found.links, found.directories)
    read_inventory(Host(tree, live=False, name="x"))


@pytest.mark.parametrize("name", ["missing.gz", "a-directory", "device"])
def test_a_root_that_is_none_is_refused_with_exit_code_2(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-directory").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    assert main(["--root", str(tmp_path / name), "snapshot", "x", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "usage"


def test_rules_name_paths_by_pattern() -> None:
    tree = MemoryTree({"/a/x1/f": b"", "/a/x2/g": b"", "/a/y/f": b""}, {})
    assert list(expand(tree, "/a/x*/{f,h}")) == ["/a/x1/f"]
    assert list(expand(tree, "/a/*/g*")) == ["/a/x2/g"]


def test_a_table_of_names_is_cut_to_the_ids_of_the_host() -> None:
    table = (
        b"# comment\n1af4  Red Hat\n\t1041  Virtio network\n\t\t1af4 1100  Machine\n"
        b"\t\t1af4 2200  Other\n\t1042  Virtio block\n8086  Intel\n\t1041  Elsewhere\n"
        b"C 02  Network\n\t00  Ethernet\n\t01  Token ring\n\t\t05  Interface\nC 03  Display\n"
    )
    ids = {("1af4", "1041"), ("1af4", "1100"), ("C", "020000")}
    assert reduce_pci_ids(table, ids) == (
        b"1af4  Red Hat\n\t1041  Virtio network\n\t\t1af4 1100  Machine\n"
        b"C 02  Network\n\t00  Ethernet\n"
    )


def test_a_live_host_without_names_has_none_in_its_snapshot_either() -> None:
    files: dict[str, bytes | int] = {f"{EDU}/uevent": b"PCI_ID=8086:10C9\n"}
    for live in (True, False):
        host = Host(MemoryTree(files, {}), live=live, name="x")
        taken = capture(host, [read_names])
        assert (taken.files.get("/usr/share/misc/pci.ids") == b"") is live


def test_a_comparison_names_what_changed_and_nothing_else() -> None:
    before = Snapshot(
        {"taken": "1"},
        {"/sys/same": b"1\n", "/sys/gone": b"x\n", "/sys/text": b"a\nb\nc\n", "/sys/n": errno.EIO},
        {"/sys/driver": "drivers/nvme"},
    )
    after = Snapshot(
        {"taken": "2"},
        {"/sys/same": b"1\n", "/sys/text": b"a\nB\nc\n", "/sys/n": b"", "/sys/rom": NOT_CAPTURED},
        {"/sys/driver": "drivers/vfio-pci"},
    )
    lines = [line for change in compare(before, after) for line in change.lines()]
    assert lines == [
        "~ /sys/driver: -> drivers/nvme => -> drivers/vfio-pci",
        "- /sys/gone: x",
        "~ /sys/n: ! EIO => ",
        "+ /sys/rom: ?",
        "~ /sys/text:",
        "    -b",
        "    +B",
    ]
