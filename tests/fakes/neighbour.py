"""A neighbour that meddles with a device between two accesses of a change, at any of them.

A change that is said to be done must have been done when it was last looked at: a neighbour that
came before that look was noticed, or put right. Used on the fake kernel by test_contention.py and
on real ones by lab/test_contention.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.change.changing import Make, do, run_folder
from tests.fakes.kernel import PCI, FakeKernel
from vfiotool.change import apply as apply_module
from vfiotool.change.journal import Journal
from vfiotool.change.recover import recover
from vfiotool.change.steps.state import Binding, read_binding
from vfiotool.errors import VfiotoolError
from vfiotool.host.host import Host
from vfiotool.host.tree import OsTree, Tree

READS = ("read", "listdir", "readlink", "exists", "isdir")


def _unbind(name: str) -> list[tuple[str, str]]:
    """From whichever of the two drivers it has."""
    return [(f"{PCI}/drivers/{driver}/unbind", name) for driver in ("nvme", "vfio-pci")]


# Writes as another tool makes them: what to write where, and what it may refuse is no matter.
INTERFERENCES: dict[str, Callable[[str], list[tuple[str, str]]]] = {
    "unbind": _unbind,
    "probe": lambda name: [(f"{PCI}/drivers_probe", name)],
    "clear the override": lambda name: [(f"{PCI}/devices/{name}/driver_override", "\n")],
    "park": lambda name: [(f"{PCI}/devices/{name}/driver_override", "none\n"), *_unbind(name)],
}


class Watch:
    """Counts a change's accesses and lets the neighbour act before number `at` (0: never)."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.at, self._act = at, act
        self.count = 0
        # Number of the last access of each path, up to the end of the change's verification.
        self.seen: dict[str, int] = {}
        self.verified = False

    def access(self, path: str) -> None:
        self.count += 1
        if self.count == self.at:
            self._act()
        if not self.verified:
            self.seen[path] = self.count


class WatchedKernel:
    """A fake kernel under watch."""

    def __init__(self, kernel: FakeKernel, watch: Watch) -> None:
        self._kernel, self._watch = kernel, watch

    def read_many(
        self, folder: str, files: tuple[str, ...], links: tuple[str, ...] = ()
    ) -> tuple[list[bytes | int], list[str | int]]:
        # One by one, each under watch.
        return Tree.read_many(self, folder, files, links)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._kernel, name)
        return _watched(method, self._watch) if name in (*READS, "write_attribute") else method


class WatchedTree(OsTree):
    """The machine itself under watch."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        for name in READS:
            setattr(self, name, _watched(getattr(self, name), watch))
        self._watch = watch

    def read_many(
        self, folder: str, files: tuple[str, ...], links: tuple[str, ...] = ()
    ) -> tuple[list[bytes | int], list[str | int]]:
        # One by one, each under watch.
        return Tree.read_many(self, folder, files, links)

    def child(self) -> Any:
        return _WatchedChild(super().child(), self._watch)


class _WatchedChild:
    def __init__(self, child: Any, watch: Watch) -> None:
        self._child, self._watch = child, watch

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._child, name)
        return _watched(method, self._watch) if name in ("read", "write_attribute") else method


def _watched(method: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    def call(path: str, *arguments: Any) -> Any:
        watch.access(path)
        return method(path, *arguments)

    return call


class Meddling:
    """One change of `device`, disturbed at every access in every way, and the tally of it.

    `connect` makes a host under a watch; `write` is the neighbour's bare write. The device is the
    nvme driver's (or `driver`'s, None for a device without one) before each case.
    """

    def __init__(
        self,
        connect: Callable[[Watch], Host],
        write: Callable[[str, str], None],
        device: str,
        driver: str | None = "nvme",
    ) -> None:
        self._connect, self._write = connect, write
        self._plain = connect(Watch(0, lambda: None))
        self.device = device
        self.home = Binding(driver, None)
        self.tally: Counter[str] = Counter()

    def everywhere(
        self, make: Make, goal: Binding, prepare: Make | None = None, every: int = 1
    ) -> None:
        """Disturb `make`, which comes to `goal`, at each access; `prepare` is done before it.

        With `every` at each so many, another way of disturbing at others: a guest is slow.
        """
        for first, kind in enumerate(INTERFERENCES):
            at = accesses = first % every + 1
            while at <= accesses:
                with run_folder() as folder:
                    if prepare is not None:
                        do(self._plain, Journal(self._plain, folder), prepare)
                    accesses = self._once(folder, kind, at, make, goal)
                self.bring_home()
                at += every

    def bring_home(self) -> None:
        """By bare writes: what a disturbed change left may be what it was told to leave."""
        self._bare(INTERFERENCES["clear the override"](self.device) + _unbind(self.device))
        self._bare(INTERFERENCES["probe"](self.device))
        assert self._found() == self.home

    def _found(self) -> Binding:
        return read_binding(self._plain, "pci", self.device)

    def _bare(self, writes: list[tuple[str, str]]) -> None:
        for path, text in writes:
            try:
                self._write(path, text)
            except OSError:
                continue

    def _once(self, folder: str, kind: str, at: int, make: Make, goal: Binding) -> int:
        around: list[Binding] = []

        def act() -> None:
            around.append(self._found())
            self._bare(INTERFERENCES[kind](self.device))
            around.append(self._found())

        watch = Watch(at, act)
        journal = Journal(self._plain, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(apply_module, "verify_all", _marking(watch))
            try:
                do(self._connect(watch), journal, make)
                word = self._judge(watch, around, goal)
            except VfiotoolError:
                word = "reported"
        self.tally[word] += 1
        # What could not be taken back while the neighbour was at it can be now.
        results = recover(self._plain, journal)
        assert all(entry.result != "stuck" for entry in results), (kind, at, word, results, around)
        assert all(record.outcome is not None for record in journal.history())
        return watch.count

    def _judge(self, watch: Watch, around: list[Binding], goal: Binding) -> str:
        """What became of an interference with a change that says that it is done."""
        found = self._found()
        if not around or around[0] == around[1]:
            assert found == goal
            return "without effect"
        if found == goal:
            return "put right"
        base = f"{PCI}/devices/{self.device}"
        for path, differs in (
            (f"{base}/driver", found.driver != goal.driver),
            (f"{base}/driver_override", found.override != goal.override),
        ):
            assert not differs or watch.at > watch.seen[path], (
                f"before access {watch.at} a neighbour made {around[0]} {around[1]}; {path} was "
                f"looked at after that, and {found} was said to be {goal}"
            )
        return "after the last look"


def _marking(watch: Watch) -> Callable[..., None]:
    """The executor's verification, with its end marked in the watch."""
    verify = apply_module.verify_all

    def verify_all(*arguments: Any) -> None:
        verify(*arguments)
        watch.verified = True

    return verify_all
