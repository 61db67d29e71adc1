"""DMA buffers over an address space without a kernel: what the IOMMU may still map is never freed,
and what is in use is never closed."""

from __future__ import annotations

import gc
import mmap
import pickle
import weakref
from collections.abc import Iterator

import numpy
import pytest

from tests.vfio.fake_space import FakeSpace
from vfiotool.errors import KernelError, UsageError
from vfiotool.vfio import Dma, StillMapped, dma_of
from vfiotool.vfio import dma as dma_module

PAGE = 4096


@pytest.fixture
def space() -> Iterator[FakeSpace]:
    made = FakeSpace()
    yield made
    made.refuse_unmap.clear()
    made.close()


@pytest.fixture
def dma(space: FakeSpace) -> Dma:
    return dma_of(space)


def is_memory(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= address < end:
                return True
    return False


def test_one_space_has_one_set_of_buffers(space: FakeSpace, dma: Dma) -> None:
    assert dma_of(space) is dma


def test_buffers_and_spaces_are_not_pickled_and_say_why(space: FakeSpace, dma: Dma) -> None:
    with dma.alloc(PAGE) as buffer:
        for thing in (buffer, space, dma):
            with pytest.raises(TypeError, match="cannot be pickled or copied: it holds"):
                pickle.dumps(thing)


def test_a_roll_back_that_failed_keeps_memory_and_addresses(space: FakeSpace, dma: Dma) -> None:
    probe = dma.alloc(PAGE)
    place = probe.iova
    probe.close()
    space.fail_at = 3
    space.refuse_unmap.add(place)
    kept = len(dma_module._quarantine)
    with pytest.raises(StillMapped):
        dma.alloc_many(5, PAGE)
    # The others were taken back and are free; this one's memory and address stay.
    assert list(space.mapped) == [place]
    assert len(dma_module._quarantine) == kept + 1
    assert is_memory(space.mapped[place][0])
    assert dma.iovas.used_bytes == PAGE
    with pytest.raises(UsageError, match="in use"):
        dma.alloc(PAGE, iova=place)


def test_a_mapping_that_failed_as_a_whole_frees_everything(space: FakeSpace, dma: Dma) -> None:
    space.fail_at = 3
    for _ in range(3):
        with pytest.raises(KernelError, match="ENOMEM"):
            dma.alloc_many(5, PAGE)
        assert space.mapped == {}
        assert dma.iovas.used_bytes == 0
    # What the user mapped by hand at a place is not taken away by our failing there.
    space.fail_at = None
    space.map(0, 0x100000, PAGE, read=True, write=True)
    with pytest.raises(UsageError, match="something is mapped"):
        dma.alloc(PAGE, iova=0x100000)
    assert 0x100000 in space.mapped


@pytest.mark.parametrize("many", [False, True])
def test_an_interrupt_between_the_mapping_and_its_note_leaves_nothing_mapped(
    space: FakeSpace, dma: Dma, many: bool
) -> None:
    space.interrupt_after_map = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        dma.alloc_many(3, PAGE) if many else dma.alloc(PAGE)
    assert space.mapped == {}
    assert dma.iovas.used_bytes == 0
    # And if it cannot be taken away, the memory stays.
    space.interrupt_after_map = None
    place = dma.alloc(PAGE)
    space.refuse_unmap.add(place.iova)
    iova = place.iova
    with pytest.raises(KernelError, match="EIO"):
        place.close()
    assert is_memory(space.mapped[iova][0])


def test_a_pinned_buffer_is_not_closed_and_its_memory_outlives_the_space(
    space: FakeSpace, dma: Dma
) -> None:
    buffer = dma.alloc(PAGE)
    buffer.pin()
    buffer.pin()
    with pytest.raises(UsageError, match="in use") as caught:
        buffer.close()
    assert caught.value.hint
    buffer.unpin()
    with pytest.raises(UsageError, match="in use"):
        buffer.close()
    address = buffer.address
    space.close()
    assert buffer.closed and is_memory(address)
    buffer.unpin()
    assert not is_memory(address)
    with pytest.raises(UsageError, match="closed"):
        buffer.pin()
    buffer.close()


def test_own_memory_is_mapped_by_whole_pages_and_given_back(space: FakeSpace, dma: Dma) -> None:
    for memory in (
        mmap.mmap(-1, 3 * PAGE),
        bytearray(100),
        numpy.zeros(1000, dtype="<u4"),
        numpy.zeros((30, 30)),
    ):
        with dma.map(memory) as buffer:
            ((iova, (address, size)),) = space.mapped.items()
            assert address % PAGE == iova % PAGE == size % PAGE == 0
            assert buffer.iova - iova == buffer.address - address < PAGE
            assert iova + size >= buffer.iova + buffer.size
            buffer.view[:4] = b"mine"
            assert bytes(memoryview(memory).cast("B")[:4]) == b"mine"
        assert space.mapped == {}
    assert dma.iovas.used_bytes == 0
    resizable = bytearray(PAGE)
    buffer = dma.map(resizable)
    with pytest.raises(BufferError):
        resizable.append(0)
    buffer.close()
    resizable.append(0)


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0 bytes"), (-1, "-1 bytes"), ("4k", "'4k' bytes"), (1.5, "1.5 bytes")],
)
def test_a_size_that_is_none_is_refused_in_words(dma: Dma, size: object, said: str) -> None:
    for ask in (lambda: dma.alloc(size), lambda: dma.alloc_many(2, size)):  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=said):
            ask()
    with pytest.raises(UsageError, match="neither read nor write"):
        dma.alloc(PAGE, read=False, write=False)


def test_a_buffer_is_indexed_as_bytes(dma: Dma) -> None:
    with dma.alloc(PAGE) as buffer:
        buffer[:4] = b"edu!"
        assert (len(buffer), buffer[:4], bytes(buffer.view[:4])) == (PAGE, b"edu!", b"edu!")
        with pytest.raises(ValueError):
            buffer[:4] = b"five!"
    with pytest.raises(UsageError, match="closed"):
        buffer[:1]


def test_a_space_that_is_dropped_is_collected_with_its_buffers_and_says_so() -> None:
    space = FakeSpace()
    buffer = dma_of(space).alloc(PAGE)
    gone = weakref.ref(space)
    with pytest.warns(ResourceWarning, match="was not closed"):
        del space, buffer
        gc.collect()
    assert gone() is None
