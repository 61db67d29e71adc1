"""The library on real kernels: opening, regions, misuse, sharing, forks, the device left quiet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.lab.vfio_guest import BACKENDS, EDU, PCI, TESTDEV, bind_vfio, open_descriptors
from vfiotool.drivers.edu import Edu
from vfiotool.errors import KernelError, NotFound, Refused, Unsupported, UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.vfio import Device, find, open_space

MACHINE = "basic"
KERNELS = ("6.1", "6.12", "iommufd")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    bind_vfio(EDU)
    bind_vfio(TESTDEV)
    return str(request.param)


@pytest.fixture
def edu(backend: str) -> Iterator[Device]:
    with Device.open(EDU, backend=backend) as device:
        yield device


def test_regions_are_where_sysfs_says(edu: Device) -> None:
    start, end, _ = (int(part, 16) for part in (PCI / EDU / "resource").read_text().split()[:3])
    info = edu.regions[0]
    assert info is not None
    assert info.size == end - start + 1
    assert [(area.offset, area.size) for area in info.areas] == [(0, info.size)]
    config = (PCI / EDU / "config").read_bytes()
    assert edu.config.read_bytes(0, 64)[:4] == config[:4]
    assert edu.regions[8] is None or not edu.regions[8].size


def test_file_and_mapping_see_the_same_registers(edu: Device) -> None:
    region = edu.region(0)
    with region.map() as bar:
        bar.write32(4, 0x11223344)
        assert region.read32(4) == bar.read32(4) == 0xEEDDCCBB
        assert list(bar.read32_many(0, 2)) == [0x010000ED, 0xEEDDCCBB]
        region.write32(4, 0)
        assert bar.read32(4) == 0xFFFFFFFF


def test_part_of_a_region_can_be_mapped_with_region_offsets(edu: Device) -> None:
    with edu.region(0).map(0x1000, 0x1000, alignment=1 << 21) as part:
        assert (part.start, part.size) == (0x1000, 0x1000)
        part.read32(0x1000)
        with pytest.raises(UsageError, match="outside the mapped range"):
            part.read32(0)
    with pytest.raises(UsageError, match="can be mapped at"):
        edu.region(0).map(0xFF000, 0x2000)


def test_a_second_open_is_busy_and_says_who_to_end(edu: Device, backend: str) -> None:
    for other in BACKENDS:
        with pytest.raises(KernelError) as caught:
            Device.open(EDU, backend=other)
        assert caught.value.errno_name == "EBUSY"
        assert "close that Device first" in (caught.value.hint or "")
    assert edu.region(0).read32(0) == 0x010000ED


MISUSES: list[tuple[str, Callable[[Device], object]]] = [
    ("outside it", lambda d: d.region(0).read32(0x100000)),
    ("outside it", lambda d: d.region(0).read_bytes(0xFFFFF, 2)),
    ("outside it", lambda d: d.region(0).write_bytes(0x100000, b"x")),
    ("not aligned", lambda d: d.region(0).read32(2)),
    ("not aligned", lambda d: d.region(0).read(0, 3)),
    ("does not fit", lambda d: d.region(0).write32(0, 1 << 32)),
    ("no region 5", lambda d: d.region(5)),
    ("no region 99", lambda d: d.region(99)),
    ("no region -1", lambda d: d.region(-1)),
    ("cannot be mapped", lambda d: d.region(7).map()),
    ("has no msix", lambda d: d.irqs.msix()),
    ("has 1 msi, not 2", lambda d: d.irqs.msi(2)),
    ("no reset of its own", lambda d: d.reset()),
    ("neither read nor write", lambda d: d.dma.alloc(4096, read=False, write=False)),
    ("buffer of 0 bytes", lambda d: d.dma.alloc(0)),
    ("not a kind of page", lambda d: d.dma.alloc(4096, pages="4G")),
    ("outside what the IOMMU allows", lambda d: d.dma.alloc(4096, iova=0xFEE00000)),
    ("not a multiple", lambda d: d.dma.alloc(4096, iova=0x1234)),
    ("beyond the 28 bits", lambda d: d.dma.alloc(4096, iova=1 << 28, limit_bits=28)),
    ("no I/O address space left", lambda d: d.dma.alloc(1 << 20, limit_bits=19)),
    ("has no feature migration", lambda d: d.feature(1, 1 << 16, bytes(8))),
]


@pytest.mark.parametrize(("reason", "misuse"), MISUSES, ids=[reason for reason, _ in MISUSES])
def test_misuse_is_an_error_and_the_device_works_on(
    edu: Device, reason: str, misuse: Callable[[Device], object]
) -> None:
    with pytest.raises(VfiotoolError, match=reason):
        misuse(edu)
    assert edu.region(0).read32(0) == 0x010000ED


def test_with_memory_decode_off_nothing_is_a_bus_error(edu: Device) -> None:
    bar = edu.region(0).map()
    edu.set_memory_decode(False)
    with pytest.raises(UsageError, match="does not decode memory"):
        bar.read32(0)
    with pytest.raises(KernelError) as caught:
        edu.region(0).read32(0)
    assert caught.value.errno_name == "EIO"
    with pytest.raises(UsageError, match="Memory Space Enable"):
        edu.region(0).map()
    edu.set_memory_decode(True)
    assert bar.read32(0) == 0x010000ED


def test_nothing_works_after_close_and_views_are_revoked(backend: str) -> None:
    device = Device.open(EDU, backend=backend)
    bar = device.region(0).map()
    region = device.region(0)
    buffer = device.dma.alloc(8192)
    view = buffer.view
    part = buffer.view[:4]
    interrupt = device.irqs.msi()[0]
    device.close()
    device.close()
    for use in (
        lambda: bar.read32(0),
        lambda: region.read32(0),
        lambda: region.map(),
        lambda: device.region(0),
        lambda: device.dma.alloc(4096),
        lambda: device.irqs.msi(),
        lambda: interrupt.wait(0),
        lambda: interrupt.trigger(),
        lambda: buffer.view,
        lambda: device.set_bus_master(True),
    ):
        with pytest.raises(UsageError):
            use()
    # A slice keeps ordinary memory alive; nothing is mapped for any device any more.
    part[0] = 1
    assert buffer.closed
    del part
    assert view is not None


def test_the_order_at_close_is_quiesce_bus_master_interrupts(backend: str) -> None:
    seen: list[tuple[str, bool, int]] = []
    device = Device.open(EDU, backend=backend)
    device.set_bus_master(True)
    device.irqs.msi()
    device.on_close(lambda: seen.append(("first", device.bus_master, len(device.irqs.active))))
    device.on_close(lambda: seen.append(("last", device.bus_master, len(device.irqs.active))))
    device.close()
    assert seen == [("last", True, 1), ("first", True, 1)]


def test_a_failing_quiesce_is_reported_and_all_else_is_still_closed(backend: str) -> None:
    before = open_descriptors()
    device = Device.open(EDU, backend=backend)
    device.dma.alloc(4096)

    def fail() -> None:
        raise KernelError("the queue would not stop")

    device.on_close(fail)
    with pytest.raises(KernelError, match="would not stop"):
        device.close()
    assert open_descriptors() == before
    with Device.open(EDU, backend=backend) as again:
        assert again.region(0).read32(0) == 0x010000ED


def test_a_child_is_refused_and_holds_nothing(backend: str) -> None:
    device = Device.open(EDU, backend=backend)
    bar = device.region(0).map()
    buffer = device.dma.alloc(4096)
    stale = buffer.view[:]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        refused = 0
        uses = (
            lambda: bar.read32(0),
            lambda: device.region(0),
            lambda: device.dma.alloc(4096),
            lambda: buffer.view,
            lambda: device.irqs.msi(),
        )
        for use in uses:
            try:
                use()
            except UsageError:
                refused += 1
        held = [name for name in open_descriptors().values() if "vfio" in name or "iommu" in name]
        os.write(writer, bytes([refused, len(held), stale[0]]))
        os.read(reader, 0)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 3) == bytes([5, 0, 0])
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    assert bar.read32(0) == 0x010000ED
    stale.release()
    device.close()
    with Device.open(EDU, backend=backend):
        pass


def test_two_devices_share_one_address_space(backend: str) -> None:
    host = Host.local()
    before = open_descriptors()
    with open_space(find(EDU, host), backend, host) as space:
        edu, testdev = Device.open(EDU, space=space), Device.open(TESTDEV, space=space)
        assert edu.target.group != testdev.target.group
        assert edu.dma is testdev.dma
        buffer = testdev.dma.alloc(4096, limit_bits=28)
        testdev.close()
        # The buffer that one device asked for serves the other, and outlives the first.
        driver = Edu(edu)
        buffer.view[:4] = b"edu!"
        driver.dma(buffer.iova, 0, 4, to_memory=False)
        driver.dma(buffer.iova + 2048, 0, 4, to_memory=True)
        assert buffer.view[2048:2052] == b"edu!"
        with pytest.raises(UsageError, match="in use"):
            edu.dma.alloc(4096, iova=buffer.iova)
    assert edu.closed and buffer.closed
    assert open_descriptors() == before


def test_unmapping_tells_how_much_was_mapped(edu: Device) -> None:
    space = edu.space
    assert space.unmap(0x20000000, 1 << 20) == 0
    with edu.dma.alloc(16384) as buffer:
        assert space.unmap(0x10000000, 4096) == 0
        # Both interfaces say the same.
        for part in (buffer.iova, buffer.iova + 4096, buffer.iova + 12288):
            with pytest.raises(UsageError, match="cut a mapping in two"):
                space.unmap(part, 4096)
        with pytest.raises(UsageError, match="whole pages"):
            space.unmap(buffer.iova + 1, 4096)
        with pytest.raises(UsageError, match="something is mapped there"):
            space.map(buffer.address, buffer.iova, 4096, read=True, write=True)
    buffers = [edu.dma.alloc(4096) for _ in range(3)]
    assert space.unmap_all() == 3 * 4096
    # The library still believes in them: closing says that they were gone.
    for buffer in buffers:
        with pytest.raises(KernelError, match="0 of 4096 bytes"):
            buffer.close()
    edu.dma.buffers.clear()


def test_what_is_no_vfio_device_says_what_to_type() -> None:
    with pytest.raises(NotFound):
        Device.open("0000:7f:1f.7")
    with pytest.raises(UsageError, match="neither a PCI address"):
        Device.open("../../etc")
    (PCI / EDU / "driver_override").write_text("\n")
    (PCI / EDU / "driver" / "unbind").write_text(EDU)
    with pytest.raises(Refused) as caught:
        Device.open(EDU)
    assert caught.value.hint == f"vfiotool bind {EDU}"
    assert "on no driver" in caught.value.message
    bind_vfio(EDU)


def test_backends_are_chosen_by_name_and_told_when_absent(backend: str) -> None:
    with Device.open(EDU) as device:
        assert device.backend == ("iommufd" if "iommufd" in BACKENDS else "type1")
    with pytest.raises(UsageError, match="not a backend"):
        Device.open(EDU, backend="container")
    if "iommufd" not in BACKENDS:
        with pytest.raises(Unsupported, match="no character device for iommufd"):
            Device.open(EDU, backend="iommufd")
