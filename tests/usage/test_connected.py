"""What is connected through a function, the IOMMU that is one, and the host's memory on one."""

from __future__ import annotations

import pytest

from tests.fakes.small_host import SmallHost
from vfiotool.change.guard import Allowance, uses_left
from vfiotool.change.plans.bind import group_endpoints
from vfiotool.change.plans.facts import read_facts
from vfiotool.change.steps.bind import BindDriver
from vfiotool.change.steps.state import Binding, read_binding
from vfiotool.host import paths
from vfiotool.usage.case import read_case
from vfiotool.usage.survey import survey
from vfiotool.usage.verdict import explain

UNIT, CARD = "0000:00:00.2", "0000:05:00.0"


def kinds(small: SmallHost, address: str) -> list[tuple[str, str]]:
    return [(entry.kind, entry.subject) for entry in survey(small.host(), address).blockers]


def amd(*, shown: bool) -> SmallHost:
    small = SmallHost()
    path = small.function(UNIT, class_code="080600" if not shown else "ff0000", group=0)
    if shown:
        small.link(f"{paths.SYS_IOMMU}/ivhd0", f"{path}/iommu/ivhd0")
    return small


@pytest.mark.parametrize("shown", [False, True])
def test_an_iommu_that_is_a_pci_function_stays(shown: bool) -> None:
    """AMD's has no driver, and so nothing else stood against it; a virtio one is told by sysfs."""
    small = amd(shown=shown)
    assert kinds(small, UNIT) == [("platform", "ivhd0" if shown else UNIT)]
    small.folders.add("/sys/bus/pci/drivers/vfio-pci")
    verdict = explain(read_case(small.host(), UNIT, reasons=True))
    assert (verdict.word, verdict.next) == ("blocked", ())
    assert "is an IOMMU of this host" in verdict.warnings[0]


def test_no_word_permits_taking_an_iommu() -> None:
    host = amd(shown=True).host()
    after = Binding("vfio-pci", "vfio-pci")
    step = BindDriver(UNIT, read_binding(host, "pci", UNIT), after)
    (left,) = uses_left(host, (step,), [Allowance("platform", "ivhd0")])
    assert left.kind == "platform"


def test_memory_of_a_cxl_card_may_be_the_hosts() -> None:
    small = SmallHost()
    small.function(CARD, class_code="050210", driver="cxl_pci")
    assert kinds(small, CARD) == []
    small.folders |= {paths.SYS_CXL, f"{paths.SYS_CXL}/region0", f"{paths.SYS_CXL}/mem0"}
    assert kinds(small, CARD) == [("platform", "region0")]


@pytest.mark.parametrize(("status", "found"), [("1", []), ("2", [("connected", "1-1")])])
def test_a_usb_device_that_another_machine_has_is_a_use(
    status: str, found: list[tuple[str, str]]
) -> None:
    small = SmallHost()
    path = small.function(CARD, class_code="0c0330", driver="xhci_hcd")
    small.link(f"{paths.SYS_USBIP_HOST}/1-1", f"{path}/usb1/1-1")
    small.file(f"{paths.SYS_USBIP_HOST}/1-1/usbip_status", status)
    assert kinds(small, CARD) == found


def test_a_radio_is_used_while_something_is_connected_to_it() -> None:
    small = SmallHost()
    path = small.function(CARD, class_code="0c0330", driver="xhci_hcd")
    adapter = f"{path}/usb1/1-2/1-2:1.0/bluetooth/hci0"
    small.link(f"{paths.SYS_BLUETOOTH}/hci0", adapter)
    assert kinds(small, CARD) == []
    small.link(f"{paths.SYS_BLUETOOTH}/hci0:71", f"{adapter}/hci0:71")
    assert kinds(small, CARD) == [("connected", "hci0:71")]


@pytest.mark.parametrize(("authorized", "count"), [("0", 0), ("1", 1)])
def test_a_thunderbolt_port_is_used_by_what_the_host_has_let_in(
    authorized: str, count: int
) -> None:
    small = SmallHost()
    path = small.function(CARD, class_code="0c0340", driver="thunderbolt")
    for name, state in (("0-0", "1"), ("0-1", authorized)):
        place = f"{path}/domain0/0-0" + ("/0-1" if name == "0-1" else "")
        small.link(f"{paths.SYS_THUNDERBOLT}/{name}", place)
        small.file(f"{paths.SYS_THUNDERBOLT}/{name}/authorized", state)
    assert kinds(small, CARD) == [("connected", "0-1")] * count


def test_the_terminal_of_a_virtio_console_is_a_node_of_it() -> None:
    """A getty on hvc0: sysfs shows the terminal without a parent."""
    small = SmallHost()
    path = small.function(CARD, class_code="078000", driver="virtio-pci")
    where = "/sys/devices/virtual/tty/hvc0"
    small.file(paths.OPEN_NODES, f"7\tagetty\t/dev/hvc0\t{where}\n.")
    assert kinds(small, CARD) == []
    small.link(f"{path}/virtio2/driver", "/sys/bus/virtio/drivers/virtio_console")
    assert kinds(small, CARD) == [("open-file", "/dev/hvc0")]


def test_a_program_that_speaks_with_the_machines_host_is_a_use_of_the_socket_device() -> None:
    small = SmallHost()
    path = small.function(CARD, class_code="078000", driver="virtio-pci")
    small.link(f"{path}/virtio2/driver", "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport")
    small.file(paths.NET_TRAFFIC, "eth1\tudp port 67\n.")
    assert kinds(small, CARD) == []
    small.file(paths.NET_TRAFFIC, f"{paths.VSOCK}\ta program listens on port 22\n.")
    assert kinds(small, CARD) == [("connected", "vsock")]


def test_a_device_that_the_kernel_unbinds_with_it_is_a_use() -> None:
    """A Thunderbolt port's USB controller is a consumer of the port: keyboards go with it."""
    small = SmallHost()
    small.function(CARD, class_code="0c0340", driver="thunderbolt")
    for name, status in (
        (f"pci:{CARD}--pci:0000:00:0d.0", "active"),
        (f"pci:{CARD}--pci:0000:00:0d.1", "not tracked"),
        ("pci:0000:09:00.0--pci:0000:00:0d.2", "active"),
    ):
        small.folders.add(f"{paths.SYS_DEVICE_LINKS}/{name}")
        small.file(f"{paths.SYS_DEVICE_LINKS}/{name}/status", status)
    assert kinds(small, CARD) == [("connected", "0000:00:0d.0")]


@pytest.mark.parametrize(("driver", "found"), [("kmem", 1), ("device_dax", 0)])
def test_memory_that_the_kernel_took_from_a_device_is_the_hosts(driver: str, found: int) -> None:
    small = SmallHost()
    path = small.function(CARD, class_code="ff0000", driver="virtio-pci")
    small.link(f"{paths.SYS_DAX}/dax0.0", f"{path}/virtio1/ndbus0/region0/dax0.0/dax0.0")
    small.link(f"{path}/virtio1/ndbus0/region0/dax0.0/dax0.0/driver", f"/sys/bus/dax/{driver}")
    small.link(f"{paths.SYS_DAX}/dax0.0/driver", f"/sys/bus/dax/drivers/{driver}")
    assert kinds(small, CARD) == [("platform", "dax0.0")] * found


def test_a_virtio_memory_device_is_the_hosts_while_it_gives_some() -> None:
    small = SmallHost()
    path = small.function(CARD, class_code="00ff00", driver="virtio-pci")
    small.link(f"{path}/virtio1/driver", "/sys/bus/virtio/drivers/virtio_mem")
    small.file(paths.PROC_IOMEM, "100000000-17fffffff : System RAM")
    assert kinds(small, CARD) == []
    small.file(paths.PROC_IOMEM, "140000000-14fffffff : System RAM (virtio_mem)")
    assert kinds(small, CARD) == [("platform", "virtio_mem")]


def test_an_iommu_in_the_group_does_not_go_along_with_it() -> None:
    small = amd(shown=False)
    small.function(CARD, driver="e1000e", group=0)
    facts = read_facts(small.host(), [CARD], None, whole_groups=True)
    assert group_endpoints(facts, CARD) == (CARD,)
