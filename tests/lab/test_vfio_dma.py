"""DMA memory on real kernels: kinds of pages, rights, places, limits, life, dirty pages."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from tests.lab.vfio_guest import BACKENDS, EDU, bind_vfio, open_descriptors, status_kib
from vfiotool.drivers.edu import ADDRESS_BITS, Edu
from vfiotool.errors import KernelError, Unsupported, UsageError
from vfiotool.native import library as native
from vfiotool.vfio import Device

MACHINE = "basic"
KERNELS = ("6.1", "6.12", "iommufd")

HUGE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    bind_vfio(EDU)
    with Device.open(EDU, backend=request.param) as opened:
        yield opened


@pytest.fixture
def huge_pages() -> Iterator[None]:
    HUGE.write_text("4")
    if int(HUGE.read_text()) < 2:
        pytest.skip("this guest has no two free huge pages of 2 MiB")
    yield
    HUGE.write_text("0")


@pytest.mark.parametrize("shared", [False, True], ids=["anonymous", "memfd"])
def test_memory_is_zeroed_whole_pages_and_numpy_takes_it(device: Device, shared: bool) -> None:
    with device.dma.alloc(5000, shared=shared) as buffer:
        assert buffer.size == len(buffer.view) == 8192
        assert buffer.address % 4096 == 0 == buffer.iova % 4096
        array = numpy.frombuffer(buffer.view, dtype="<u4")
        assert not array.any()
        array[5] = 0x01020304
        assert bytes(buffer.view[20:24]) == b"\x04\x03\x02\x01"
        del array


@pytest.mark.parametrize("shared", [False, True], ids=["anonymous", "memfd"])
def test_huge_pages_are_mapped_whole_and_reached_by_the_device(
    device: Device, huge_pages: None, shared: bool
) -> None:
    edu = Edu(device)
    with device.dma.alloc(3 << 20, limit_bits=ADDRESS_BITS, pages="2M", shared=shared) as buffer:
        assert buffer.size == 4 << 20
        assert buffer.iova % (2 << 20) == 0 == buffer.address % (2 << 20)
        end = buffer.size - 4096
        buffer.view[end:] = bytes(range(256)) * 16
        edu.dma(buffer.iova + end, 0, 4096, to_memory=False)
        edu.dma(buffer.iova, 0, 4096, to_memory=True)
        assert buffer.view[:4096] == buffer.view[end:]


def test_absent_huge_pages_are_unsupported_and_leave_nothing_behind(device: Device) -> None:
    HUGE.write_text("0")
    before = open_descriptors()
    for shared in (False, True):
        with pytest.raises(Unsupported, match="2M pages") as caught:
            device.dma.alloc(2 << 20, pages="2M", shared=shared)
        assert "nr_hugepages" in (caught.value.hint or "")
    assert open_descriptors() == before
    assert device.dma.iovas.used_bytes == 0


def test_the_device_cannot_write_what_it_may_only_read(device: Device) -> None:
    edu = Edu(device)
    with device.dma.alloc(4096, limit_bits=ADDRESS_BITS, write=False) as buffer:
        buffer.view[:] = b"\x5a" * 4096
        edu.dma(buffer.iova, 0, 4096, to_memory=False)
        edu.dma(buffer.iova, 0, 16, to_memory=True)
        with device.dma.alloc(4096, limit_bits=ADDRESS_BITS, read=False) as other:
            edu.dma(other.iova, 0, 4096, to_memory=True)
            assert other.view[:] == b"\x5a" * 4096
        assert buffer.view[:] == b"\x5a" * 4096


def test_the_device_reads_what_was_written_after_the_mapping(device: Device) -> None:
    """Linux 6.1 would pin the zero page under memory that was never touched."""
    edu = Edu(device)
    check = device.dma.alloc(4096, limit_bits=ADDRESS_BITS)
    single = device.dma.alloc(4096, limit_bits=ADDRESS_BITS, write=False)
    shared = device.dma.alloc(4096, limit_bits=ADDRESS_BITS, write=False, shared=True)
    many = device.dma.alloc_many(2, 4096, limit_bits=ADDRESS_BITS, write=False)
    for buffer in (single, shared, *many):
        sent = os.urandom(64)
        buffer.view[:64] = sent
        edu.dma(buffer.iova, 0, 64, to_memory=False)
        edu.dma(check.iova, 0, 64, to_memory=True)
        assert check.view[:64] == sent


def test_places_can_be_fixed_and_aligned(device: Device) -> None:
    with device.dma.alloc(4096, iova=0x123000) as buffer:
        assert buffer.iova == 0x123000
        with pytest.raises(UsageError, match="in use"):
            device.dma.alloc(4096, iova=0x123000)
    with (
        device.dma.alloc(4096, iova=0x123000) as again,
        device.dma.alloc(4096, align=1 << 24) as aligned,
    ):
        assert again.iova == 0x123000
        assert aligned.iova % (1 << 24) == 0


def test_many_buffers_are_mapped_in_one_call_and_all_or_none(device: Device) -> None:
    edu = Edu(device)
    buffers = device.dma.alloc_many(32, 4096, limit_bits=ADDRESS_BITS)
    assert len({buffer.iova for buffer in buffers}) == 32
    for number, buffer in enumerate(buffers):
        buffer.view[:2] = bytes([number, 255 - number])
    edu.dma(buffers[17].iova, 0, 2, to_memory=False)
    edu.dma(buffers[3].iova + 8, 0, 2, to_memory=True)
    assert buffers[3].view[8:10] == bytes([17, 238])
    for buffer in buffers:
        buffer.close()
    with device.dma.alloc(4096, iova=0x5000) as taken:
        triples = [(taken.address, 0x3000, 4096), (taken.address, 0x5000, 4096)]
        with pytest.raises(UsageError, match="something is mapped there"):
            device.space.map_many(triples, read=True, write=True)
        assert device.space.unmap(0x3000, 4096) == 0
    assert device.dma.iovas.used_bytes == 0


def test_an_unmapped_buffer_is_out_of_the_device_s_reach(device: Device) -> None:
    edu = Edu(device)
    buffer = device.dma.alloc(4096, limit_bits=ADDRESS_BITS)
    keep = buffer.view[:]
    buffer.view[:] = b"\x33" * 4096
    edu.dma(buffer.iova, 0, 4096, to_memory=False)
    keep[:] = bytes(4096)
    buffer.close()
    edu.dma(buffer.iova, 0, 4096, to_memory=True)
    assert keep == bytes(4096)
    keep.release()


def test_a_buffer_that_is_forgotten_stays_mapped_until_the_device_is_closed(
    device: Device,
) -> None:
    """Else its memory would be somebody else's while the device still writes to it."""
    edu = Edu(device)
    buffer = device.dma.alloc(4096, limit_bits=ADDRESS_BITS)
    buffer.view[:] = b"\x21" * 4096
    edu.dma(buffer.iova, 0, 4096, to_memory=False)
    buffer.view[:] = bytes(4096)
    iova, view = buffer.iova, buffer.view[:]
    del buffer
    gc.collect()
    edu.dma(iova, 0, 4096, to_memory=True)
    assert view == b"\x21" * 4096
    device.close()
    assert view == b"\x21" * 4096


def test_closed_buffers_give_their_memory_back(device: Device) -> None:
    for _ in range(20):
        device.dma.alloc(1 << 20).close()
    gc.collect()
    before = status_kib("VmSize")
    for _ in range(200):
        with device.dma.alloc(1 << 20) as buffer:
            buffer.view[0] = 1
    gc.collect()
    assert status_kib("VmSize") - before < 1024
    assert device.dma.iovas.used_bytes == 0


SHORTAGE = """
import os, resource, sys
from vfiotool.errors import KernelError
from vfiotool.vfio import Device
with Device.open(sys.argv[1], backend=sys.argv[2]) as device:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
    os.setresuid(65534, 65534, 65534)
    device.dma.alloc(32768)
    try:
        device.dma.alloc(1 << 20)
    except KernelError as error:
        print(error.errno_name, error.hint)
    device.dma.alloc(4096)
    print("works on")
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_memory_lock_shortage_says_how_much_is_missing(backend: str) -> None:
    bind_vfio(EDU)
    command = [sys.executable, "-c", SHORTAGE, EDU, backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("ENOMEM")
    assert "65536 bytes (RLIMIT_MEMLOCK)" in first
    missing = (1 << 20) - 65536 + (32768 if backend == "type1" else 0)
    assert f"{missing} bytes are missing" in first
    assert "CAP_IPC_LOCK" in first
    assert second == "works on"


def test_dirty_pages_are_told_where_the_iommu_can(device: Device) -> None:
    edu = Edu(device)
    with device.dma.alloc(8 * 4096, limit_bits=ADDRESS_BITS) as buffer:
        try:
            device.space.dirty_track(True)
        except Unsupported as error:
            # QEMU's intel-iommu marks no pages; type1 then calls all pinned pages dirty.
            assert device.backend == "iommufd"
            pytest.skip(f"this IOMMU: {error}")
        edu.dma(buffer.iova + 4096, 0, 4096, to_memory=True)
        bitmap = device.space.dirty_bitmap(buffer.iova, buffer.size)
        device.space.dirty_track(False)
        assert len(bitmap) == 8
        assert bitmap[0] & 0b10


def test_mapping_somebody_else_s_address_is_an_error(device: Device) -> None:
    page = os.sysconf("SC_PAGESIZE")
    with pytest.raises(Exception, match="not memory of this process"):
        device.space.map(page, 0x100000, page, read=True, write=True)
    assert device.space.unmap(0x100000, page) == 0


def test_memory_of_one_s_own_is_mapped_and_reached_by_the_device(device: Device) -> None:
    edu = Edu(device)
    descriptor = os.memfd_create("own")
    os.ftruncate(descriptor, 8192)
    kinds = {
        "mmap": mmap.mmap(-1, 8192),
        "memfd": mmap.mmap(descriptor, 8192),
        "bytearray": bytearray(5000),
        "numpy": numpy.zeros(3000, dtype="<u2"),
        "small": bytearray(64),
    }
    for name, memory in kinds.items():
        view = memoryview(memory).cast("B")  # type: ignore[arg-type]
        sent = os.urandom(min(len(view), 4096))
        with device.dma.map(memory, limit_bits=ADDRESS_BITS) as buffer:
            assert buffer.size == len(view), name
            assert buffer.iova % 4096 == buffer.address % 4096
            view[: len(sent)] = sent
            edu.dma(buffer.iova, 0, len(sent), to_memory=False)
            view[: len(sent)] = bytes(len(sent))
            edu.dma(buffer.iova, 0, len(sent), to_memory=True)
            assert view[: len(sent)] == sent, name
            assert buffer.view[: len(sent)] == sent
        assert view[: len(sent)] == sent
        view.release()
    # Nothing holds them any more.
    kinds["mmap"].close()  # type: ignore[union-attr]
    kinds["bytearray"].append(1)  # type: ignore[union-attr]
    os.close(descriptor)
    assert device.dma.iovas.used_bytes == 0


def test_memory_of_one_s_own_is_held_while_it_is_mapped(device: Device) -> None:
    memory = bytearray(8192)
    buffer = device.dma.map(memory)
    with pytest.raises(BufferError):
        memory.append(1)
    buffer.pin()
    with pytest.raises(UsageError, match="in use"):
        buffer.close()
    buffer.unpin()
    buffer.close()
    memory.append(1)
    for wrong in (bytes(4096), b"", bytearray(0), 5, numpy.zeros((8, 8))[:, ::2]):
        with pytest.raises(UsageError):
            device.dma.map(wrong)  # type: ignore[arg-type]
    with device.dma.map(bytes(4096), write=False) as constant:
        assert constant.view.readonly
    assert device.dma.iovas.used_bytes == 0


def test_a_pinned_buffer_outlives_its_device_as_memory(device: Device) -> None:
    buffer = device.dma.alloc(4096)
    address = buffer.address
    buffer.pin()
    with pytest.raises(UsageError, match="in use"):
        buffer.close()
    device.close()
    assert buffer.closed
    maps = Path("/proc/self/maps").read_text()
    starts = [int(line.split("-")[0], 16) for line in maps.splitlines()]
    assert any(start <= address for start in starts)
    buffer.unpin()
    with pytest.raises(UsageError):
        buffer.pin()


# What both interfaces answer: an operation on a space in which 4 pages at BASE are mapped, and the
# number or the error that comes of it.
BASE, PAGE = 0x10000000, 4096
TABLE = {
    "unmap nothing": (lambda s, a: s.unmap(BASE + (1 << 20), PAGE), 0),
    "unmap the whole": (lambda s, a: s.unmap(BASE, 4 * PAGE), 4 * PAGE),
    "unmap more than it": (lambda s, a: s.unmap(BASE - PAGE, 8 * PAGE), 4 * PAGE),
    "unmap its first page": (lambda s, a: s.unmap(BASE, PAGE), UsageError),
    "unmap its middle": (lambda s, a: s.unmap(BASE + PAGE, PAGE), UsageError),
    "unmap its end": (lambda s, a: s.unmap(BASE + 3 * PAGE, PAGE), UsageError),
    "unmap over its start": (lambda s, a: s.unmap(BASE - PAGE, 2 * PAGE), UsageError),
    "unmap over its end": (lambda s, a: s.unmap(BASE + 3 * PAGE, 2 * PAGE), UsageError),
    "unmap no bytes": (lambda s, a: s.unmap(BASE, 0), UsageError),
    "unmap half a page": (lambda s, a: s.unmap(BASE, PAGE // 2), UsageError),
    "unmap many": (lambda s, a: s.unmap_many([(BASE, 4 * PAGE), (1 << 33, PAGE)]), 4 * PAGE),
    "unmap many with a part": (lambda s, a: s.unmap_many([(BASE, PAGE)]), UsageError),
    "unmap all": (lambda s, a: s.unmap_all(), 4 * PAGE),
    "map over it": (lambda s, a: s.map(a, BASE, PAGE, read=True, write=True), UsageError),
    "map half a page": (lambda s, a: s.map(a, 1 << 33, 100, read=True, write=True), UsageError),
    "map an odd address": (
        lambda s, a: s.map(a + 8, 1 << 33, PAGE, read=True, write=True),
        UsageError,
    ),
    "map no memory": (lambda s, a: s.map(0x10000, 1 << 33, PAGE, read=True, write=True), "EFAULT"),
    "map what cannot be": (
        lambda s, a: s.map(a, 0xFEE00000, PAGE, read=True, write=True),
        "EINVAL",
    ),
    "map beyond": (lambda s, a: s.map(a, 1 << 60, PAGE, read=True, write=True), "EINVAL"),
    "map many over it": (
        lambda s, a: s.map_many([(a, 1 << 33, PAGE), (a, BASE, PAGE)], read=True, write=True),
        UsageError,
    ),
}


@pytest.mark.parametrize("operation", TABLE)
def test_both_interfaces_answer_alike(device: Device, operation: str) -> None:
    space, memory = device.space, mmap.mmap(-1, 4 * PAGE)
    address = native.address_of(memory)
    space.map(address, BASE, 4 * PAGE, read=True, write=True)
    work, wanted = TABLE[operation]
    if isinstance(wanted, int):
        assert work(space, address) == wanted
    elif isinstance(wanted, str):
        with pytest.raises(KernelError) as caught:
            work(space, address)
        assert caught.value.errno_name == wanted
    else:
        with pytest.raises(wanted):
            work(space, address)
    # Nothing was done by halves: the mapping is whole or gone, and the rest is free.
    assert space.unmap(1 << 33, PAGE) == 0
    assert space.unmap(BASE, 4 * PAGE) in (0, 4 * PAGE)
