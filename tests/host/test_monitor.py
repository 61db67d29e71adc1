"""Events: what a uevent means, what a lost one costs, and how a line looks."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator

import pytest

from vfiotool.cli.look.watch import as_line
from vfiotool.cli.main import main
from vfiotool.errors import UsageError
from vfiotool.host import monitor as module
from vfiotool.host.host import Host
from vfiotool.host.monitor import Event, Monitor, State
from vfiotool.host.tree import MemoryTree

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
PF = "/sys/devices/pci0000:00/0000:00:11.0/0000:01:00.0"
VF = "/sys/devices/pci0000:00/0000:00:11.0/0000:01:00.1"


def tree(driver: str | None = "nvme", *, with_vf: bool = False, mdev: bool = False) -> MemoryTree:
    files: dict[str, bytes | int] = {f"{PF}/uevent": b"PCI_ID=1B36:0010\n"}
    links = {"/sys/bus/pci/devices/0000:01:00.0": f"../../..{PF[4:]}"}
    if driver:
        links[f"{PF}/driver"] = f"../../../../bus/pci/drivers/{driver}"
    if with_vf:
        files[f"{VF}/uevent"] = b"PCI_ID=1B36:0010\n"
        links["/sys/bus/pci/devices/0000:01:00.1"] = f"../../..{VF[4:]}"
        links[f"{VF}/physfn"] = "../0000:01:00.0"
        links[f"{PF}/virtfn0"] = "../0000:01:00.1"
    if mdev:
        files[f"/sys/devices/virtual/mtty/mtty/{UUID}/uevent"] = b""
        links[f"/sys/bus/mdev/devices/{UUID}"] = f"../../../devices/virtual/mtty/mtty/{UUID}"
    return MemoryTree(files, links)


def uevent(action: str, path: str, subsystem: str = "pci", **more: str) -> dict[str, str]:
    return {"ACTION": action, "DEVPATH": path[4:], "SUBSYSTEM": subsystem, **more}


def state(found: MemoryTree) -> State:
    return State(Host(found, live=True, name="x"))


def test_unbind_and_bind_name_the_driver_before_and_after() -> None:
    known = state(tree())
    left = known.apply(uevent("unbind", PF))
    assert left is not None
    assert (left.kind, left.device, left.previous_driver) == ("unbind", "0000:01:00.0", "nvme")
    taken = known.apply(uevent("bind", PF, DRIVER="vfio-pci"))
    assert taken is not None and (taken.kind, taken.driver) == ("bind", "vfio-pci")
    again = known.apply(uevent("unbind", PF))
    assert again is not None and again.previous_driver == "vfio-pci"


def test_a_new_vf_is_told_with_its_physical_function_and_index() -> None:
    found = tree()
    known = state(found)
    after = tree(with_vf=True)
    found.files, found.links, found.children = after.files, after.links, after.children
    event = known.apply(uevent("add", VF, PCI_ID="1B36:0010"))
    assert event is not None
    assert (event.kind, event.pf, event.vf_index) == ("vf-add", "0000:01:00.0", 0)
    assert event.pci_id == "1b36:0010"
    gone = known.apply(uevent("remove", VF))
    assert gone is not None and (gone.kind, gone.vf_index) == ("vf-remove", 0)


def test_a_vf_that_is_linked_late_is_told_when_its_change_is_announced() -> None:
    found = tree(with_vf=True)
    link = found.links.pop(f"{VF}/physfn")
    known = state(tree())
    known._host = Host(found, live=True, name="x")
    first = known.apply(uevent("add", VF))
    assert first is not None and first.kind == "add"
    found.links[f"{VF}/physfn"] = link
    late = known.apply(uevent("change", VF))
    assert late is not None and (late.kind, late.vf_index) == ("vf-add", 0)
    assert known.apply(uevent("change", VF)) is None


def test_mediated_devices_have_kinds_of_their_own() -> None:
    known = state(tree())
    known._host = Host(tree(mdev=True), live=True, name="x")
    path = f"/sys/devices/virtual/mtty/mtty/{UUID}"
    made = known.apply(uevent("add", path, "mdev"))
    assert made is not None and (made.kind, made.parent) == ("mdev-add", "mtty")
    gone = known.apply(uevent("remove", path, "mdev"))
    assert gone is not None and (gone.kind, gone.parent, gone.device) == (
        "mdev-remove",
        "mtty",
        UUID,
    )


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"ACTION": "add"},
        uevent("add", PF, "usb"),
        uevent("change", PF),
        uevent("online", PF),
        {"ACTION": "explode", "SUBSYSTEM": "pci", "DEVPATH": "x"},
        uevent("add", VF, SYNTH_UUID="0"),
        uevent("add", PF),
        uevent("remove", VF),
        uevent("bind", PF, DRIVER="nvme"),
    ],
)
def test_what_is_no_event_of_ours_is_passed_over(odd: dict[str, str]) -> None:
    assert state(tree()).apply(odd) is None


class Source:
    """Stands in for pyudev's monitor: what it holds is received, then an interrupt ends it."""

    def __init__(self, *items: dict[str, str] | OSError) -> None:
        self.items = list(items)

    def poll(self, timeout: float | None = None) -> object:
        if not self.items:
            return None
        item = self.items.pop(0)
        if isinstance(item, OSError):
            raise item
        return type("Device", (), {"properties": item})()

    def fileno(self) -> int:
        return 0


@pytest.fixture
def subscribed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    source = Source()
    monkeypatch.setattr(module, "_subscribe", lambda: source)
    yield source


def test_events_that_the_kernel_dropped_are_found_by_comparing(subscribed: Source) -> None:
    found = tree("nvme", with_vf=True)
    with Monitor(Host(found, live=True, name="x")) as watched:
        after = tree("vfio-pci", mdev=True)
        found.files, found.links, found.children = after.files, after.links, after.children
        subscribed.items = [OSError(errno.ENOBUFS, "no buffer space")]
        events = list(watched.events(0.05))
    assert [(event.kind, event.device) for event in events] == [
        ("lost", None),
        ("bind", "0000:01:00.0"),
        ("vf-remove", "0000:01:00.1"),
        ("mdev-add", UUID),
    ]
    assert all(event.found_later for event in events[1:])
    assert events[1].previous_driver == "nvme" and events[1].driver == "vfio-pci"


def test_what_was_queued_before_events_were_dropped_does_not_undo_the_comparison(
    subscribed: Source,
) -> None:
    found = tree("nvme")
    with Monitor(Host(found, live=True, name="x")) as watched:
        after = tree(None)
        found.files, found.links, found.children = after.files, after.links, after.children
        subscribed.items = [
            OSError(errno.ENOBUFS, "no buffer space"),
            uevent("unbind", PF),
            uevent("bind", PF, DRIVER="vfio-pci"),
            OSError(errno.ENOBUFS, "again"),
        ]
        events = list(watched.events(0.05))
    assert [(event.kind, event.driver, event.found_later) for event in events] == [
        ("unbind", None, False),
        ("bind", "vfio-pci", False),
        ("lost", None, False),
        ("unbind", None, True),
    ]


def test_what_a_comparison_found_is_not_told_again(subscribed: Source) -> None:
    found = tree("nvme")
    with Monitor(Host(found, live=True, name="x")) as watched:
        after = tree("vfio-pci")
        found.files, found.links, found.children = after.files, after.links, after.children
        subscribed.items = [OSError(errno.ENOBUFS, "no buffer space")]
        assert [event.kind for event in watched.events(0.05)] == ["lost", "bind"]
        subscribed.items = [uevent("bind", PF, DRIVER="vfio-pci"), uevent("unbind", PF)]
        assert [event.kind for event in watched.events(0.05)] == ["unbind"]


def test_waiting_for_an_event_ends_at_its_limit(subscribed: Source) -> None:
    with Monitor(Host(tree(), live=True, name="x")) as watched:
        assert watched.wait_for(lambda event: event.kind == "bind", 0.02) is None
        subscribed.items = [uevent("unbind", PF), uevent("bind", PF, DRIVER="vfio-pci")]
        found = watched.wait_for(lambda event: event.kind == "bind", 5)
        assert found is not None and found.driver == "vfio-pci" and found.time_s > 0


def test_a_root_that_is_not_the_running_host_cannot_be_watched() -> None:
    with pytest.raises(UsageError, match="nothing happens there"):
        Monitor(Host(tree(), live=False, name="x"))
    assert main(["--root", "fixtures/hosts/no-iommu", "watch"]) == 2


def test_a_line_is_one_line_whatever_a_driver_is_called() -> None:
    event = Event("bind", "pci", "0000:01:00.0", driver="ev\x1b[2J\nil", time_s=1.5)
    assert as_line(event, as_json=False).count("\n") == 0
    assert "\x1b" not in as_line(event, as_json=False)
    line = as_line(event, as_json=True)
    assert "\n" not in line and "\x1b" not in line
    found = json.loads(line)
    assert found["format_version"] == "1.0" and found["driver"] == "ev\x1b[2J\nil"


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            Event("bind", "pci", "0000:01:00.0", driver="vfio-pci"),
            "> bind        0000:01:00.0 to vfio-pci",
        ),
        (Event("unbind", "pci", "0000:01:00.0", previous_driver="nvme"), "from nvme"),
        (
            Event("vf-add", "pci", "0000:01:00.1", pf="0000:01:00.0", vf_index=3),
            "VF 3 of 0000:01:00.0",
        ),
        (Event("mdev-add", "mdev", UUID, parent="mtty"), f"+ mdev-add    {UUID} below mtty"),
        (Event("remove", "pci", "0000:01:00.0", found_later=True), "(found later)"),
        (Event("lost", None, None), "the kernel dropped events"),
    ],
)
def test_events_read_like_sentences(event: Event, text: str) -> None:
    assert text in as_line(event, as_json=False)


def test_watching_without_events_ends_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--timeout", "0.05"]) == 0
    assert main(["watch", "--timeout", "0.05", "--count", "1", "--json"]) == 1
    assert capsys.readouterr().out == ""
