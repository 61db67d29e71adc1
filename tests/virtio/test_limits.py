"""Limits and weights, with the clock in the test's hand: what tenants get is what was set."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from vfiotool.native.library import ffi, lib
from vfiotool.native.limits import Level, LimitGroup, LimitShare, Rate

SECOND = 1_000_000_000
START = 1 << 40


@dataclass
class Tenant:
    """A queue that always has work, as its worker sees it."""

    share: LimitShare
    bytes: int = 4096
    demand: int = 64
    took: int = 0
    due: int = 0

    def __post_init__(self) -> None:
        self.turn = ffi.new("struct vt_turn *")
        self.wait = ffi.new("uint64_t *")

    def visit(self, now: int) -> int:
        """What a worker does at one visit; returns how many requests went."""
        if now < self.due:
            return 0
        got = int(lib.vt_share_ask(self.share.handle, self.turn, self.demand, now, self.wait))
        if not got:
            self.due = now + self.wait[0]
            return 0
        lib.vt_share_took(self.share.handle, got, got * self.bytes, now)
        self.took += got
        return got

    def close(self) -> None:
        lib.vt_share_leave(self.share.handle, self.turn)
        self.share.close()


def run(tenants: list[Tenant], start: int, duration: int, step: int = 100_000) -> int:
    """Visit all in turn for a while; returns the time at the end. A worker is late, unevenly."""
    rng = random.Random(start & 0xFFFF)
    now, end = start, start + duration
    while now < end:
        for _ in range(4):
            if not sum(tenant.visit(now) for tenant in tenants):
                break
        now += rng.randrange(step // 2, 3 * step // 2)
    return now


def within(found: float, wanted: float, part: float = 0.05) -> bool:
    return abs(found - wanted) <= part * wanted


def test_ten_tenants_each_get_their_own_limit() -> None:
    tenants = []
    for number in range(10):
        tenants.append(Tenant(LimitShare()))
        tenants[-1].share.set(Rate(requests=200 * (number + 1) ** 2), now=START)
    run(tenants, START, 2 * SECOND)
    for number, tenant in enumerate(tenants):
        assert within(tenant.took, 2 * 200 * (number + 1) ** 2), (number, tenant.took)
        tenant.close()


@pytest.mark.parametrize("rate", [{"requests": 10_000}, {"bytes": 10_000 * 4096}])
def test_ten_tenants_share_a_group_by_their_weights(rate: dict[str, int]) -> None:
    group = LimitGroup(Rate(**rate), now=START)
    weights = [10, 20, 50, 50, 100, 100, 100, 200, 300, 400]
    tenants = [Tenant(LimitShare()) for _ in weights]
    for tenant, weight in zip(tenants, weights, strict=True):
        tenant.share.set(Rate(), weight=weight, group=group, now=START)
    run(tenants, START, 4 * SECOND)
    assert within(sum(tenant.took for tenant in tenants), 40_000)
    for tenant, weight in zip(tenants, weights, strict=True):
        assert within(tenant.took, 40_000 * weight / sum(weights)), (weight, tenant.took)
        tenant.close()
    group.close()


def test_what_one_member_of_a_group_leaves_is_the_others() -> None:
    group = LimitGroup(Rate(requests=10_000), now=START)
    own, idle, rest = (Tenant(LimitShare()) for _ in range(3))
    own.share.set(Rate(requests=1_000), weight=300, group=group, now=START)
    idle.share.set(Rate(), weight=500, group=group, now=START)
    rest.share.set(Rate(), weight=100, group=group, now=START)
    now = run([own, rest], START, 2 * SECOND)
    assert within(own.took, 2_000) and within(rest.took, 18_000)
    # One that comes back has no claim on what it left.
    own.took = rest.took = 0
    run([own, idle, rest], now, 2 * SECOND)
    assert within(own.took, 2_000)
    assert within(idle.took, 18_000 * 5 / 6) and within(rest.took, 18_000 / 6)
    for tenant in (own, idle, rest):
        tenant.close()
    group.close()


def test_limits_hold_while_they_are_changed_a_thousand_times() -> None:
    """Each period is charged at its own rate: no change gives a burst away, none loses time."""
    rng = random.Random(7)
    group = LimitGroup(Rate(requests=20_000), now=START)
    alone, member, other = (Tenant(LimitShare()) for _ in range(3))
    now, wanted, shared = START, 0.0, [0.0, 0.0]
    other.share.set(Rate(), weight=100, group=group, now=now)
    for _ in range(1_000):
        rate = rng.choice([500, 2_000, 10_000, 50_000])
        weight = rng.choice([50, 100, 300])
        total = rng.choice([5_000, 20_000])
        alone.share.set(Rate(requests=rate), now=now)
        member.share.set(Rate(), weight=weight, group=group, now=now)
        group.set(Rate(requests=total), now=now)
        before = now
        now = run([alone, member, other], now, 10_000_000)
        spent = (now - before) / SECOND
        wanted += rate * spent
        shared[0] += total * spent * weight / (weight + 100)
        shared[1] += total * spent * 100 / (weight + 100)
    assert within(alone.took, wanted), (alone.took, wanted)
    assert within(member.took, shared[0]), (member.took, shared)
    assert within(other.took, shared[1]), (other.took, shared)
    for tenant in (alone, member, other):
        tenant.close()
    group.close()


def test_a_request_larger_than_the_burst_passes_and_is_paid_for() -> None:
    tenant = Tenant(LimitShare(), bytes=8 << 20, demand=1)
    tenant.share.set(Rate(bytes=1 << 20), now=START)
    now = run([tenant], START, 33 * SECOND, step=10_000_000)
    assert tenant.took in (4, 5)
    # A higher limit shortens the debt; a lower one does not lengthen it.
    tenant.share.set(Rate(bytes=1 << 30), now=now)
    tenant.took = tenant.due = 0
    run([tenant], now, SECOND)
    assert within(tenant.took, 128, 0.1)
    tenant.close()


@pytest.mark.parametrize("idle", [0, SECOND // 4, 10 * SECOND])
def test_what_was_saved_up_or_is_owed_goes_on_in_another_process(idle: int) -> None:
    """Shares and groups that are made anew from the levels of others do what those would."""
    rate = Rate(requests=1_000, bytes=1 << 22, burst_ns=SECOND // 2)
    took = []
    for replaced in (False, True):
        group = LimitGroup(rate, now=START)
        alone, member = Tenant(LimitShare()), Tenant(LimitShare(), bytes=1 << 20)
        alone.share.set(rate, now=START)
        member.share.set(Rate(), group=group, now=START)
        now = run([alone, member], START, SECOND) + idle
        if replaced:
            levels = [one.share.level(now=now) for one in (alone, member)]
            level = group.level(now=now)
            for one in (alone, member):
                one.close()
            group.close()
            group = LimitGroup(rate, now=now)
            alone, member = Tenant(LimitShare()), Tenant(LimitShare(), bytes=1 << 20)
            alone.share.set(rate, now=now)
            member.share.set(Rate(), group=group, now=now)
            group.set_level(level, now=now)
            for one, was in zip((alone, member), levels, strict=True):
                one.share.set_level(was, now=now)
        before = alone.took, member.took
        alone.due = member.due = 0
        run([alone, member], now, SECOND // 10, step=1_000_000)
        took.append((alone.took - before[0], member.took - before[1]))
        for one in (alone, member):
            one.close()
        group.close()
    assert took[0] == took[1]


def test_a_level_is_bounded_and_is_none_of_what_is_not_limited() -> None:
    tenant = Tenant(LimitShare())
    tenant.share.set_level(Level(1 << 62, 1 << 62, 1 << 62), now=START)
    assert tenant.visit(START) == 64
    tenant.share.set(Rate(bytes=1 << 40), now=START)
    tenant.share.set_level(Level(1 << 62, 1 << 62, 1 << 62), now=START)
    # Of requests it is not limited, and one charge owes some 18 minutes at most.
    level = tenant.share.level(now=START)
    assert level.requests_ns == 0 and SECOND < level.bytes_ns <= (1 << 40) + 50_000_000
    assert tenant.visit(START) == 0
    tenant.due = 0
    assert tenant.visit(START + (1 << 41)) == 1
    tenant.close()


def test_absurd_numbers_overflow_nothing() -> None:
    group = LimitGroup(Rate(requests=1, bytes=1, burst_ns=1), now=START)
    tenant = Tenant(LimitShare(), bytes=(1 << 32) - 1)
    tenant.share.set(Rate(requests=1, bytes=1, burst_ns=0), weight=1, group=group, now=START)
    assert run([tenant], START, SECOND) and tenant.took <= 64
    tenant.share.set(Rate(), now=START + SECOND)
    assert tenant.visit(1 << 62) == 64
    tenant.close()
    group.close()
