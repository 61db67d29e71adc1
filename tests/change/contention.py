"""Many processes that change one host at once, and the checks that nothing was lost.

Used by tests/test_contention.py on a fake kernel behind a server process, and by
tests/lab/test_contention.py on a real one. Workers are forked, so that no interpreter starts.
"""

from __future__ import annotations

import os
import random
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.change.changing import Make, binding, counting, creating, do, releasing, removing
from vfiotool.change.journal import Journal, Record
from vfiotool.change.locks import held
from vfiotool.change.steps.bind import BindDriver
from vfiotool.change.steps.mdev import SetMdev
from vfiotool.change.steps.state import read_binding
from vfiotool.errors import Stuck, VfiotoolError
from vfiotool.host.host import Host


def operations(devices: list[str], pf: str | None, uuids: list[str]) -> list[Make]:
    """What a worker draws from."""
    made: list[Make] = []
    for device in devices:
        made += [binding(device), releasing(device), binding(device, driver="none")]
    made.append(binding(*devices))
    if pf is not None:
        made += [counting(pf, 2, False), counting(pf, 0), counting(pf, 1, False)]
    for uuid in uuids:
        made += [creating("mtty", "mtty-1", uuid), removing(uuid)]
    return made


def work(
    connect: Callable[[], Host], folder: str, seed: int, count: int, choices: list[Make]
) -> None:
    """Do `count` operations drawn at random. Ends with exit code 1 at the first that is stuck."""
    chance = random.Random(seed)
    host = connect()
    journal = Journal(host, folder)
    for _ in range(count):
        try:
            do(host, journal, chance.choice(choices))
        except Stuck:
            traceback.print_exc()
            os._exit(1)
        except VfiotoolError:
            # Another worker came first: a disk that is parked has no such mdev, and the like.
            continue


def run_workers(
    connect: Callable[[], Host], folder: str, processes: int, each: int, choices: list[Make]
) -> list[int]:
    """The exit codes of all workers; they run side by side."""
    pids = []
    for seed in range(processes):
        pid = os.fork()
        if pid == 0:
            code = 2
            try:
                work(connect, folder, seed, each, choices)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def check(host: Host, folder: str) -> Counter[str]:
    """That the journal tells one history without gaps, which ends where the host stands.

    Returns how many transactions ended in which way.
    """
    journal = Journal(host, folder)
    history = journal.history()
    assert [record.number for record in history] == list(range(1, len(history) + 1))
    assert all(record.outcome is not None for record in history), "a transaction is open"
    assert journal.unfinished() == []
    for key in os.listdir(f"{folder}/locks"):
        with held(journal.locks, [key], 0.0):
            pass
    assert not list(Path(folder).rglob("new.*")), "a scratch file is left"
    _check_chain(host, history)
    return Counter(str(record.outcome) for record in history)


def _check_chain(host: Host, history: list[Record]) -> None:
    """Each change begins where the one before it on the same device ended: no update is lost."""
    bindings: dict[str, object] = {}
    mdevs: dict[str, bool] = {}
    for record in history:
        if record.outcome != "committed":
            continue
        for step in record.steps:
            if isinstance(step, BindDriver) and not step.fresh:
                known = bindings.get(step.address, step.before)
                assert known == step.before, f"{record.number} lost an update of {step.address}"
                bindings[step.address] = step.after
            elif isinstance(step, SetMdev):
                assert mdevs.get(step.uuid, not step.exists) != step.exists
                mdevs[step.uuid] = step.exists
    for address, wanted in bindings.items():
        assert read_binding(host, "pci", address) == wanted
    for uuid, exists in mdevs.items():
        assert host.exists(f"/sys/bus/mdev/devices/{uuid}") == exists
