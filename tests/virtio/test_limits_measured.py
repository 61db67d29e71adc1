"""Limits and weights on a running server, measured by its clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.virtio.frontend import Frontend
from tests.virtio.load import Tenant, busy, measured
from vfiotool.native.limits import UNLIMITED, Rate
from vfiotool.virtio.block import BlockDisk, DiskSettings
from vfiotool.virtio.exports import GroupSettings
from vfiotool.virtio.listener import listen
from vfiotool.virtio.server import Export, Server

MIB = 1 << 20
BURST_NS = 300_000_000


@contextmanager
def tenants(folder: Path, count: int, **options: int) -> Iterator[tuple[Server, list[Tenant]]]:
    """A server of so many disks in memory, each with a client."""
    with ExitStack() as stack:
        server = stack.enter_context(Server(report=print, **options))
        for number in range(count):
            disk = BlockDisk(DiskSettings(size=4 * MIB))
            server.add(Export(f"t{number}", disk, listen(str(folder / f"t{number}"))))
        thread = threading.Thread(target=server.run)
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.stop)
        found = []
        for number in range(count):
            front = Frontend(str(folder / f"t{number}"))
            stack.callback(front.close)
            front.up()
            found.append(Tenant(front))
        yield server, found


def limit(server: Server, number: int, rate: Rate, weight: int = 100, group: str | None = None):  # type: ignore[no-untyped-def]
    """As control does it, and waited for."""
    done = threading.Event()

    def change() -> None:
        server.limit(f"t{number}", rate, weight, group)
        done.set()

    server.soon(change)
    assert done.wait(20)


def near(found: float, wanted: float, part: float) -> bool:
    return abs(found - wanted) <= part * wanted


def test_a_limit_is_kept_and_lifted_while_requests_wait_for_it(tmp_path: Path) -> None:
    """Rough, as the machine may be busy: never above, and not stuck below."""
    with tenants(tmp_path, 2, poll_us=20) as (server, (first, second)):
        limit(server, 0, Rate(requests=1000))
        limit(server, 1, Rate(bytes=500 * 4112))
        found = measured([first, second], 0.4)
        assert 500 < found[0] < 1100 and 250 < found[1] < 550, found
        # One request a minute; what waits for that goes on at once when the limit goes.
        limit(server, 0, Rate(bytes=70, burst_ns=0))
        busy([first], 0.1)
        stuck = first.done
        busy([first], 0.1)
        assert first.done <= stuck + 1
        limit(server, 0, UNLIMITED)
        busy([first], 0.1)
        assert first.done > stuck + 100


@pytest.mark.proof
@pytest.mark.parametrize("threads", [1, 2])
def test_ten_tenants_get_their_limits_and_weights_within_5_percent(
    tmp_path: Path, threads: int
) -> None:
    """Slow enough that the clients, which share the machine, always have requests waiting, and with
    a burst that outlasts a worker's being kept from the processor."""
    with tenants(tmp_path, 10, threads=threads) as (server, found):
        wanted = [10.0 * (number + 1) for number in range(10)]
        for number, rate in enumerate(wanted):
            limit(server, number, Rate(round(rate), 0, BURST_NS))
        rates = measured(found, 6)
        print("limits", rates)
        for got, want in zip(rates, wanted, strict=True):
            assert near(got, want, 0.05), (got, want)
        group = GroupSettings("g", Rate(550, 0, BURST_NS))
        server.soon(lambda: server.limit_groups([group]))
        weights = [50 * (number + 1) for number in range(10)]
        for number, weight in enumerate(weights):
            limit(server, number, UNLIMITED, weight, "g")
        rates = measured(found, 6)
        print("group", rates)
        for got, weight in zip(rates, weights, strict=True):
            assert near(got, 550 * weight / sum(weights), 0.05), (got, weight, rates)


@pytest.mark.proof
def test_limits_hold_while_they_are_changed_a_thousand_times(tmp_path: Path) -> None:
    with tenants(tmp_path, 10) as (server, found):
        rates, changes = [50, 150], 0

        def change() -> None:
            nonlocal changes
            if changes < 1000:
                number, turn = changes % 10, changes // 10
                limit(server, number, Rate(rates[(turn + number) % 2], 0, BURST_NS))
                changes += 1

        for number in range(10):
            limit(server, number, Rate(rates[number % 2], 0, BURST_NS))
        busy(found, 0.2)
        before = [tenant.done for tenant in found]
        began = time.monotonic()
        while changes < 1000:
            busy(found, 0.02)
            change()
        took = time.monotonic() - began
        got = [(t.done - was) / took for t, was in zip(found, before, strict=True)]
        print("changed", got)
        for rate in got:
            assert near(rate, 100, 0.05), got
