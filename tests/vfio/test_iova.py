"""The IOVA allocator: properties over arbitrary ranges and histories."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiotool.errors import KernelError, UsageError
from vfiotool.vfio.iova import IovaAllocator

PAGE = 4096
# What Intel's IOMMU with 39 bits allows: everything but the MSI window.
X86 = ((0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1))

sizes = st.integers(1, 64 * PAGE)
requests = st.tuples(
    sizes,
    st.sampled_from([0, PAGE, 1 << 16, 1 << 21]),
    st.sampled_from([None, (1 << 28) - 1, (1 << 32) - 1]),
)
ranges = st.lists(
    st.tuples(st.integers(0, 1 << 34), st.integers(0, 1 << 34)).map(lambda p: (min(p), max(p))),
    min_size=1,
    max_size=5,
)


def rounded(size: int) -> int:
    return -(-size // PAGE) * PAGE


@given(ranges, st.lists(requests, max_size=30))
def test_allocations_lie_in_the_ranges_and_apart(
    allowed: list[tuple[int, int]], wanted: list[tuple[int, int, int | None]]
) -> None:
    allocator = IovaAllocator(allowed)
    taken: list[tuple[int, int]] = []
    for size, align, limit in wanted:
        try:
            start = allocator.allocate(size, align=align, limit=limit)
        except KernelError as error:
            assert error.errno_name == "ENOSPC"
            continue
        end = start + rounded(size)
        assert start and start % max(align, PAGE) == 0
        assert limit is None or end - 1 <= limit
        assert any(low <= start and end - 1 <= high for low, high in allocator.ranges)
        assert all(end <= other or start >= stop for other, stop in taken)
        taken.append((start, end))


@given(st.lists(requests, max_size=40), st.randoms(use_true_random=False))
def test_freeing_in_any_order_gives_all_back(
    wanted: list[tuple[int, int, int | None]], random: object
) -> None:
    allocator = IovaAllocator(X86)
    before = allocator.free_ranges()
    places = [allocator.allocate(size, align=align, limit=limit) for size, align, limit in wanted]
    random.shuffle(places)  # type: ignore[attr-defined]
    for place in places:
        allocator.free(place)
    assert allocator.free_ranges() == before
    assert allocator.used_bytes == 0


@given(st.lists(requests, max_size=20), ranges)
def test_narrower_ranges_keep_what_is_in_use(
    wanted: list[tuple[int, int, int | None]], narrower: list[tuple[int, int]]
) -> None:
    allocator = IovaAllocator(X86)
    held = [
        (allocator.allocate(size, align=align, limit=limit), rounded(size))
        for size, align, limit in wanted
    ]
    allocator.set_ranges(narrower)
    for low, last in allocator.free_ranges():
        assert all(last < start or low >= start + size for start, size in held)
    for start, _ in held:
        allocator.free(start)
    pages = [(-(-low // PAGE) * PAGE, (high + 1) // PAGE * PAGE) for low, high in narrower]
    assert sum(last - low + 1 for low, last in allocator.free_ranges()) == covered(pages)


def covered(intervals: list[tuple[int, int]]) -> int:
    total = reach = 0
    for low, high in sorted(intervals):
        total += max(0, high - max(low, reach))
        reach = max(reach, high)
    return total


def test_unlimited_buffers_leave_low_addresses_free() -> None:
    allocator = IovaAllocator(X86)
    assert allocator.allocate(PAGE) == (1 << 32) - PAGE
    assert allocator.allocate(PAGE, limit=(1 << 28) - 1) == (1 << 28) - PAGE


def test_address_zero_is_given_out_only_when_asked_for() -> None:
    allocator = IovaAllocator([(0, 2 * PAGE - 1)])
    assert allocator.allocate(PAGE) == PAGE
    with pytest.raises(KernelError):
        allocator.allocate(PAGE)
    allocator.reserve(0, PAGE)
    allocator.free(0)


@pytest.mark.parametrize(
    ("start", "size", "reason"),
    [
        (0x1001, PAGE, "multiple"),
        (0xFEE00000, PAGE, "outside what the IOMMU allows"),
        (0xFEDFF000, 2 * PAGE, "outside what the IOMMU allows"),
        (1 << 39, PAGE, "outside"),
        (0x10000, PAGE, "in use"),
        (0xF000, 2 * PAGE, "in use"),
        (0x2000, 0, "mapping of 0 bytes"),
    ],
)
def test_fixed_places_are_checked(start: int, size: int, reason: str) -> None:
    allocator = IovaAllocator(X86)
    allocator.reserve(0x10000, PAGE)
    with pytest.raises(UsageError, match=reason):
        allocator.reserve(start, size)


def test_freeing_what_was_not_given_is_an_error() -> None:
    allocator = IovaAllocator(X86)
    place = allocator.allocate(PAGE)
    allocator.free(place)
    with pytest.raises(UsageError, match="not allocated here"):
        allocator.free(place)


def test_exhaustion_names_the_size_and_the_limit() -> None:
    allocator = IovaAllocator([(0, 1 << 20)])
    with pytest.raises(KernelError, match="2097152 bytes below 0x10000000") as caught:
        allocator.allocate(1 << 21, limit=(1 << 28) - 1)
    assert caught.value.errno_name == "ENOSPC"


def test_places_that_a_bus_may_take_are_given_to_nobody_who_did_not_ask() -> None:
    """A read into such a place came back as a data transfer error of QEMU's NVMe: I/O address and
    its own BAR were the same number."""
    allocator = IovaAllocator(X86)
    allocator.avoid = ((0xFD00_0000, 0xFD00_3FFF), (0xFC00_0000, 0xFCFF_FFFF))
    places = []
    while not places or places[-1] > 0xFB00_0000:
        places.append(allocator.allocate(1 << 20))
        allocated = range(places[-1], places[-1] + (1 << 20))
        for low, last in allocator.avoid:
            assert not (low < allocated.stop and allocated.start <= last), hex(places[-1])
    assert min(places) < 0xFC00_0000 < 0xFD00_4000 < max(places)
    allocator.reserve(0xFC00_0000, 4096)
    small = IovaAllocator([(0x1000, 0x3FFF)])
    small.avoid = ((0x2000, 0x2FFF),)
    assert {small.allocate(4096), small.allocate(4096)} == {0x1000, 0x3000}
    with pytest.raises(KernelError):
        small.allocate(4096)
