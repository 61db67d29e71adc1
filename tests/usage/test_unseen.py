"""What was not seen is not absent: each look of a survey fails in turn, and is cut short."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from tests.fakes.small_host import SmallHost
from tests.usage.why_page import PAGE
from vfiotool.devices.pci import read_function
from vfiotool.host import paths
from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree
from vfiotool.usage.sight import Sight
from vfiotool.usage.standing import Standings
from vfiotool.usage.survey import look, survey

DISK, NIC, GPU, USB = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0", "0000:04:00.0"
ENGINE = "0000:05:00.0"
DEVICES = (DISK, NIC, GPU, USB, ENGINE)
ERRNOS = (
    *(errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.ELOOP),
)
TABLES = (
    *(paths.MOUNTS, paths.OPEN_NODES, paths.BLOCK_LOOPS, paths.BLOCK_TARGETS),
    *(paths.NET_LINKS, paths.NET_ROUTES, paths.NET_ADDRESSES, paths.NET_KINDS, paths.NET_CALLER),
    paths.NET_TRAFFIC,
)
Call = tuple[str, str]


class FailingTree(MemoryTree):
    """Remembers what is asked of it; `failing` fails with `number` from then on."""

    failing: Call | None = None
    number = errno.EIO

    def __init__(self, small: SmallHost) -> None:
        super().__init__(small.files, small.links, small.folders)
        self.asked: dict[Call, None] = {}

    def _note(self, call: Call) -> None:
        self.asked[call] = None
        if call == self.failing:
            raise OSError(self.number, "injected", call[1])

    def read(self, path: str) -> bytes:
        self._note(("read", path))
        return super().read(path)

    def listdir(self, path: str) -> list[str]:
        self._note(("listdir", path))
        return super().listdir(path)

    def readlink(self, path: str) -> str:
        self._note(("readlink", path))
        return super().readlink(path)


def quiet_host() -> SmallHost:
    """A running host with a disk, a card, a display and a USB controller that nobody uses."""
    small = SmallHost()
    small.folders.add("/sys/bus/pci/drivers/vfio-pci")
    small.file("/proc/interrupts", " 31: 0 0 IR-PCI-MSIX-0000:00:1e.0 0-edge virtio0")
    for table in TABLES:
        small.file(table, ".")
    small.file(paths.PROC_SWAPS, "Filename Type Size Used Priority")
    small.nvme(DISK, "nvme0n1", "259:0", group=1)
    small.file(f"{paths.BLOCK_CLAIM}/nvme0n1", "free")
    small.block("loop0", "/sys/devices/virtual/block/loop0", "7:0")
    small.network(NIC, "eth1")
    small.file(paths.NET_ADDRESSES, "lo\t127.0.0.1/8\n.")
    path = "/sys/devices/pci0000:00/0000:02:00.0"
    small.file(paths.NET_LINKS, f"self\t1\tlo\t\t\t\t\t\t\t\nself\t2\teth1\t\t\t\t\t{path}\t\t\n.")
    small.function(GPU, class_code="030000", driver="bochs-drm", group=3)
    small.function(USB, class_code="0c0330", driver="xhci_hcd", group=4)
    small.function(ENGINE, class_code="0b4000", driver="4xxx", group=5)
    small.file(
        paths.PROC_CRYPTO, "name : cbc(aes)\ndriver : qat_aes\nmodule : intel_qat\nrefcnt : 1"
    )
    small.folders |= {"/sys/class/input", "/sys/class/drm", "/sys/bus/mdev/devices"}
    return small


def verdict(tree: MemoryTree, address: str) -> str:
    host = Host(tree, live=True, name="live")
    function = read_function(Host(MemoryTree(tree.files, tree.links), live=True, name="x"), address)
    assert function is not None
    return Standings(host).of(function).verdict


@pytest.mark.parametrize("address", DEVICES)
def test_a_host_that_is_seen_whole_has_available_devices(address: str) -> None:
    assert verdict(FailingTree(quiet_host()), address) == "available"


def looks(address: str) -> list[Call]:
    """All that a survey of the device asks of the host."""
    tree = FailingTree(quiet_host())
    host = Host(tree, live=True, name="live")
    function = read_function(host, address)
    tree.asked.clear()
    look(Sight(host), address, function)
    return list(tree.asked)


def documented() -> list[str]:
    """The first column of the page's table of what is looked at."""
    page = PAGE.read_text()
    rows = page.partition("| looked at | for |")[2].partition("\n\n")[0].splitlines()[2:]
    return [word.strip("` ") for row in rows for word in row.split("|")[1].split(",")]


def test_the_page_lists_what_is_looked_at_and_nothing_else() -> None:
    names = documented()
    asked = {path for address in DEVICES for _, path in looks(address)}
    own = [value for value in vars(paths).values() if isinstance(value, str)]
    for path in sorted(asked):
        said = path.removeprefix(paths.OBSERVED).removeprefix("/sys/devices/pci0000:00")
        if path.startswith("/sys/devices"):
            continue  # The device's own folder.
        assert any(said == name or said.startswith(f"{name}/") for name in names), path
    # And each that the page names is one that the code spells.
    for name in names:
        assert name in own or paths.OBSERVED + name in own, name


def failures() -> Iterator[tuple[str, Call]]:
    for address in DEVICES:
        for call in looks(address):
            yield address, call


@pytest.mark.parametrize(("address", "call"), list(failures()))
def test_a_look_that_fails_never_reads_as_unused(address: str, call: Call) -> None:
    for number in ERRNOS:
        tree = FailingTree(quiet_host())
        tree.failing, tree.number = call, number
        assert verdict(tree, address) == "blocked", (errno.errorcode[number], call)


@pytest.mark.parametrize("address", DEVICES)
@pytest.mark.parametrize("table", TABLES)
def test_an_observation_that_is_absent_on_a_running_host_blocks(address: str, table: str) -> None:
    asked = {path for _, path in looks(address)}
    small = quiet_host()
    del small.files[table]
    assert verdict(FailingTree(small), address) == ("blocked" if table in asked else "available")


@pytest.mark.parametrize("table", TABLES)
def test_an_observation_that_is_cut_short_anywhere_blocks(table: str) -> None:
    for address in DEVICES:
        if ("read", table) not in looks(address):
            continue
        whole = quiet_host().files[table]
        assert isinstance(whole, bytes)
        for length in range(len(whole) - 1):
            small = quiet_host()
            small.files[table] = whole[:length]
            assert verdict(FailingTree(small), address) == "blocked", whole[:length]


@pytest.mark.parametrize(
    "answer", ["unknown EMFILE", "unknown ENOENT", "unknown ETIMEDOUT", "", "x"]
)
def test_a_claim_that_was_not_answered_blocks(answer: str) -> None:
    small = quiet_host()
    small.file(f"{paths.BLOCK_CLAIM}/nvme0n1", answer)
    assert verdict(FailingTree(small), DISK) == "blocked"


def test_a_device_that_cannot_be_read_is_not_a_device_that_is_gone() -> None:
    tree = FailingTree(quiet_host())
    tree.failing, tree.number = ("read", f"/sys/bus/pci/devices/{DISK}/uevent"), errno.EMFILE
    found = survey(Host(tree, live=True, name="live"), DISK)
    assert {blocker.kind for blocker in found.blockers} == {"unseen"}


@pytest.mark.parametrize(
    ("address", "attribute"), [(NIC, "sriov_totalvfs"), (GPU, "boot_vga"), (NIC, "virtfn0")]
)
def test_a_function_that_was_read_while_that_failed_is_asked_again(
    address: str, attribute: str
) -> None:
    """The caller's reading took the failure for an absent attribute; the look must not."""
    tree = FailingTree(quiet_host())
    path = f"/sys/bus/pci/devices/{address}"
    call = ("listdir", path) if attribute == "virtfn0" else ("read", f"{path}/{attribute}")
    tree.files[f"/sys/devices/pci0000:00/{address}/sriov_totalvfs"] = b"7\n"
    tree.failing, tree.number = call, errno.EMFILE
    host = Host(tree, live=True, name="live")
    function = read_function(host, address)
    found = survey(host, address, {} if function is None else {address: function}).blockers
    assert "unseen" in [blocker.kind for blocker in found]


def test_what_was_not_seen_can_be_allowed_by_its_name() -> None:
    small = quiet_host()
    small.file(paths.OPEN_NODES, "!\tthe open files of 3 processes\n.")
    (entry,) = survey(small.host(live=True), DISK).blockers
    assert (entry.kind, entry.subject) == ("unseen", "open-nodes")


@pytest.mark.parametrize(
    ("class_code", "driver", "child", "expected"),
    [
        ("010601", "ahci", "ata1", []),
        ("010601", "ahci", None, ["unseen"]),
        ("020000", "mlx5_core", None, ["unseen"]),
        ("020700", "mlx5_core", "infiniband", []),
        ("020000", None, None, []),
        ("020000", "vfio-pci", None, []),
        ("120000", "habanalabs", None, []),
    ],
)
def test_a_driver_of_disks_or_networks_that_shows_none_blocks(
    class_code: str, driver: str | None, child: str | None, expected: list[str]
) -> None:
    small = quiet_host()
    path = small.function("0000:09:00.0", class_code=class_code, driver=driver)
    if child is not None:
        small.folders.add(f"{path}/{child}")
    found = survey(small.host(live=True), "0000:09:00.0").blockers
    assert [blocker.kind for blocker in found] == expected


def test_a_table_of_swap_areas_without_its_first_line_was_cut_short() -> None:
    small = quiet_host()
    small.files[paths.PROC_SWAPS] = b""
    (entry,) = look(Sight(small.host(live=True)), DISK).blockers
    assert (entry.kind, entry.subject) == ("unseen", paths.PROC_SWAPS)
