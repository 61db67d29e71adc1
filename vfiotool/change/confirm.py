"""`apply --confirm-within`: a change that takes itself back unless somebody confirms it.

The watcher is armed before the first write. It must outlive the shell, the terminal and the SSH
connection, which the change itself may cut off: a transient systemd timer where systemd runs, a
process of its own session elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from vfiotool.change.apply import recover, undo_number
from vfiotool.change.folder import safe_name
from vfiotool.change.journal import Journal, started_at
from vfiotool.errors import KernelError, NotFound
from vfiotool.host.child import CALLOUT_ENVIRONMENT
from vfiotool.host.host import Host

_SYSTEMD = "/run/systemd/system"


def arm(host: Host, journal: Journal, seconds: float) -> str:
    """Start the watcher, and return the token by which `confirm` stops it.

    The process that arms ignores the loss of its terminal from here on, so that it ends the
    change that it began.
    """
    token = f"{time.time_ns():x}-{os.getpid()}"
    entry = {
        "transaction": None,
        "pid": os.getpid(),
        "since": started_at(host, os.getpid()),
        "after": max((record.number for record in journal.history()), default=0),
    }
    journal.pending.replace(token, json.dumps(entry).encode())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    systemd = os.path.isdir(_SYSTEMD)
    if systemd and shutil.which("systemd-run", path=CALLOUT_ENVIRONMENT["PATH"]):
        _arm_timer(token, seconds)
    else:
        _arm_process(journal.run_folder, token, seconds)
    return token


def attach(journal: Journal, token: str, transaction: int | None) -> None:
    """Tell the watcher which transaction is its own; None if there was nothing to do."""
    if transaction is None:
        journal.pending.remove(token)
        return
    data = journal.pending.read(token)
    if data is not None:
        entry = {**json.loads(data), "transaction": transaction}
        journal.pending.replace(token, json.dumps(entry).encode())


def confirm(host: Host, journal: Journal) -> list[int]:
    """Keep every change that waits to be confirmed. Returns their numbers.

    Raises NotFound if there is none; one that is still being made keeps its watcher.
    """
    kept = []
    running = False
    for token in journal.pending.names():
        entry = _read_entry(journal, token)
        if entry is None:
            continue
        number = entry["transaction"] or _committed_by(journal, entry)
        if number is None and _runs(host, entry):
            running = True
            continue
        journal.pending.remove(token)
        if number is not None:
            kept.append(number)
    if not kept and running:
        raise NotFound("the change is still being made", hint="confirm it when it is done")
    if not kept:
        raise NotFound(
            "no change waits to be confirmed: it was taken back, or confirmed already",
            hint="vfiotool history",
        )
    return kept


def revert_unconfirmed(host: Host, journal: Journal, token: str, timeout_s: float) -> str | None:
    """Take the token's change back, unless it was confirmed. Returns what was done.

    A change that was cut off before it was committed is undone by `recover`.
    """
    entry = _read_entry(journal, token)
    while entry is not None and entry["transaction"] is None and _runs(host, entry):
        # The change itself takes longer than its user wanted to wait for it.
        host.clock.sleep(0.1)
        entry = _read_entry(journal, token)
    if entry is None:
        return None
    journal.pending.remove(token)
    number = entry["transaction"] or _committed_by(journal, entry)
    if number is None:
        results = recover(host, journal, timeout_s=timeout_s, finish=False)
        return "; ".join(f"{one.number} {one.result}" for one in results) or "nothing to do"
    undo_number(host, journal, number, timeout_s=timeout_s)
    return f"undone {number}"


def _read_entry(journal: Journal, token: str) -> dict[str, Any] | None:
    data = journal.pending.read(safe_name(token))
    if data is None:
        return None
    entry: dict[str, Any] = json.loads(data)
    return entry


def _runs(host: Host, entry: dict[str, Any]) -> bool:
    """Whether the process that armed is still there: it, and not a later one of its number."""
    since = started_at(host, entry["pid"])
    return since is not None and since == entry["since"]


def _committed_by(journal: Journal, entry: dict[str, Any]) -> int | None:
    """The change of a process that ended between committing it and telling the watcher."""
    mine = (
        record.number
        for record in journal.history()
        if record.pid == entry["pid"] and record.number > entry["after"]
        if record.outcome == "committed"
    )
    return next(mine, None)


def command(token: str) -> list[str]:
    """The command that a timer runs at the deadline."""
    return [sys.executable, "-m", "vfiotool", "undo", "--unconfirmed", token]


def _arm_timer(token: str, seconds: float) -> None:
    run = ["systemd-run", "--quiet", "--collect", f"--on-active={seconds:g}s"]
    run += ["--timer-property=AccuracySec=100ms", f"--unit=vfiotool-confirm-{token}"]
    run += ["--", *command(token)]
    done = subprocess.run(run, env=CALLOUT_ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(
            f"systemd-run could not arm the revert: {done.stderr.strip()}",
            hint="nothing was changed; apply without --confirm-within, or mend systemd",
        )


def _arm_process(run_folder: str, token: str, seconds: float) -> None:
    """A grandchild in a session of its own, which holds none of our descriptors."""
    if os.fork():
        os.wait()
        return
    try:
        os.setsid()
        if os.fork() == 0:
            _watch(run_folder, token, seconds)
    finally:
        os._exit(0)


def _watch(run_folder: str, token: str, seconds: float) -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    os.closerange(0, 1 << 16)
    for _ in range(3):
        os.open(os.devnull, os.O_RDWR)
    time.sleep(seconds)
    host = Host.local()
    revert_unconfirmed(host, Journal(host, run_folder), token, 30.0)
