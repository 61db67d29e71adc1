"""`apply --confirm-within`: a change that rolls itself back unless somebody confirms it.

The watcher is armed before the first write. It must outlive the shell, the terminal and the SSH
connection, which the change itself may cut off: a transient systemd timer where systemd runs, a
process of its own session elsewhere. It reverts its own change alone, through the guard as
everybody does; where that fails it says so and tries again until it works or the change is
confirmed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import syslog
import time
from dataclasses import asdict, dataclass, replace

from vfiotool.change.folder import safe_name
from vfiotool.change.journal import Journal, Record, started_at
from vfiotool.change.locks import held
from vfiotool.change.recover import recover
from vfiotool.change.sealed import seal, unseal
from vfiotool.change.steps.registry import held_values
from vfiotool.change.undo import undo_number
from vfiotool.errors import KernelError, NotFound, Refused, UsageError, VfiotoolError
from vfiotool.host.child import CALLOUT_ENVIRONMENT
from vfiotool.host.host import Host
from vfiotool.host.paths import PROC

_SYSTEMD = "/run/systemd/system"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 60.0


@dataclass(frozen=True)
class Pending:
    """A change that waits to be confirmed.

    `pid` and `since` name the process that makes it, `after` the last change before it;
    `transaction` is its number once it is committed, `failed` why reverting it did not work.
    """

    pid: int
    since: str | None
    after: int
    transaction: int | None = None
    failed: str | None = None


def arm(host: Host, journal: Journal, seconds: float) -> str:
    """Start the watcher, and return the token by which `confirm` stops it.

    The process that arms ignores the loss of its terminal from here on, so that it ends the
    change that it began.
    """
    token = f"{time.time_ns():x}-{os.getpid()}"
    after = max((record.number for record in journal.history()), default=0)
    _save(journal, token, Pending(os.getpid(), started_at(host, os.getpid()), after))
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
    entry = _load(journal, token)
    if entry is not None:
        _save(journal, token, replace(entry, transaction=transaction))


def confirm(host: Host, journal: Journal) -> list[int]:
    """Keep every change that waits to be confirmed. Returns their numbers.

    Raises NotFound if there is none; one that is still being made, or half done, keeps its
    watcher.
    """
    kept = []
    unfinished: list[str] = []
    for token in journal.pending.names():
        with held(journal.locks, [f"confirm-{token}"], 5.0):
            entry = _load(journal, token)
            if entry is None:
                continue
            number = entry.transaction or _committed_by(journal, entry)
            if number is None:
                unfinished.append(entry.failed or _state(host, entry))
                continue
            journal.pending.remove(token)
            kept.append(number)
    if not kept and unfinished:
        raise NotFound(
            f"the change cannot be confirmed: {unfinished[0]}",
            hint="confirm it when it is done; if it is half done: vfiotool recover",
        )
    if not kept:
        raise NotFound(
            "no change waits to be confirmed: it was rolled back, or confirmed already",
            hint="vfiotool history",
        )
    return kept


def _state(host: Host, entry: Pending) -> str:
    return "it is still being made" if _runs(host, entry) else "it was left half done"


def revert_unconfirmed(
    host: Host, journal: Journal, token: str, timeout_s: float, tries: int | None = None
) -> str | None:
    """Revert the token's change, unless it is confirmed. Returns what was done, None if nothing.

    A change that was cut off before it was committed is undone as `recover` does. What fails is
    logged, kept for `confirm` to show, and tried again, at most `tries` times (None: until it
    works); the last failure is raised.
    """
    pause = _FIRST_PAUSE_S
    while True:
        _await_maker(host, journal, token, timeout_s)
        try:
            # `confirm` waits for this lock: a change is either kept or reverted.
            with held(journal.locks, [f"confirm-{token}"], timeout_s):
                entry = _load(journal, token)
                if entry is None:
                    return None
                done = _revert(host, journal, entry, timeout_s)
                journal.pending.remove(token)
                return done
        except VfiotoolError as error:
            tries = None if tries is None else tries - 1
            _say_failed(journal, token, error)
            if tries == 0:
                raise
        host.clock.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_S)


def _revert(host: Host, journal: Journal, entry: Pending, timeout_s: float) -> str:
    """Undo the entry's own change and no other. Raises VfiotoolError where it stands still."""
    number = entry.transaction or _committed_by(journal, entry)
    if number is not None:
        undo_number(host, journal, number, timeout_s=timeout_s)
        return f"undone {number}"
    mine = [record.number for record in journal.history() if _is_own(record, entry)]
    results = [
        result
        for own in mine
        for result in recover(host, journal, timeout_s=timeout_s, finish=False, only=own)
    ]
    for result in results:
        if result.result != "undone":
            raise KernelError(
                f"change {result.number} is {result.result}: {result.detail or result.title}",
                hint="vfiotool recover",
            )
    return "; ".join(f"{one.number} {one.result}" for one in results) or "nothing to do"


def _is_own(record: Record, entry: Pending) -> bool:
    return record.pid == entry.pid and record.number > entry.after


def _await_maker(host: Host, journal: Journal, token: str, timeout_s: float) -> None:
    """Wait while the process that makes the change works; one that is stopped is ended.

    SIGTERM has it roll back by itself; if it does not within `timeout_s` it is killed, and what it
    left is undone like that of any crash.
    """
    asked_at: float | None = None
    while True:
        entry = _load(journal, token)
        if entry is None or entry.transaction is not None or not _runs(host, entry):
            return
        now = host.clock.monotonic()
        if asked_at is not None and now - asked_at > timeout_s:
            _signal_maker(host, entry, signal.SIGKILL)
        elif asked_at is None and _is_stopped(host, entry.pid):
            asked_at = now
            _signal_maker(host, entry, signal.SIGTERM, signal.SIGCONT)
        elif asked_at is not None and _is_stopped(host, entry.pid):
            _signal_maker(host, entry, signal.SIGCONT)
        host.clock.sleep(0.1)


def _signal_maker(host: Host, entry: Pending, *numbers: int) -> None:
    """Signal the process that the entry names: it, and not a later one of its number."""
    try:
        descriptor = os.pidfd_open(entry.pid)
    except OSError:
        return
    try:
        if _runs(host, entry):
            for number in numbers:
                signal.pidfd_send_signal(descriptor, number)
    except OSError:
        # It has just ended.
        return
    finally:
        os.close(descriptor)


def _is_stopped(host: Host, pid: int) -> bool:
    stat = host.read(f"{PROC}/{pid}/stat")
    return stat is not None and stat.rpartition(")")[2].split()[:1] in (["T"], ["t"])


def _say_failed(journal: Journal, token: str, error: VfiotoolError) -> None:
    """To the system's log, and where `confirm` finds it."""
    text = error.message.replace("\n", " ")[:1000]
    syslog.openlog("vfiotool", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_ERR, f"the unconfirmed change was not rolled back: {text}")
    try:
        entry = _load(journal, token)
        if entry is not None:
            _save(journal, token, replace(entry, failed=f"rolling it back failed: {text}"))
    except (VfiotoolError, OSError):
        # The log has it; what matters is to try again.
        return


def _save(journal: Journal, token: str, entry: Pending) -> None:
    journal.pending.replace(token, seal(asdict(entry)))


def _load(journal: Journal, token: str) -> Pending | None:
    """Raises KernelError for a damaged entry."""
    try:
        data = journal.pending.read(safe_name(token))
        if data is None:
            return None
        return Pending(**held_values(Pending, unseal(data.removesuffix(b"\n"))))
    except (ValueError, TypeError, UsageError, Refused) as error:
        raise KernelError(
            f"{journal.pending.path}/{token} is damaged: {error}",
            hint="see vfiotool history, undo the change by hand if it must go, and remove that "
            "file",
        ) from error


def _runs(host: Host, entry: Pending) -> bool:
    """Whether the process that armed is still there: it, and not a later one of its number."""
    stat = host.read(f"{PROC}/{entry.pid}/stat")
    if stat is None or stat.rpartition(")")[2].split()[:1] in (["Z"], ["X"]):
        return False
    since = started_at(host, entry.pid)
    return since is not None and since == entry.since


def _committed_by(journal: Journal, entry: Pending) -> int | None:
    """The change of a process that ended between committing it and telling the watcher."""
    mine = (
        record.number
        for record in journal.history()
        if _is_own(record, entry) and record.outcome == "committed"
    )
    return next(mine, None)


def command(token: str) -> list[str]:
    """The command that a timer runs at the deadline."""
    return [sys.executable, "-I", "-m", "vfiotool", "undo", "--unconfirmed", token]


def _arm_timer(token: str, seconds: float) -> None:
    run = ["systemd-run", "--quiet", "--collect", f"--on-active={seconds:g}s"]
    run += ["--timer-property=AccuracySec=100ms", f"--unit=vfiotool-confirm-{token}"]
    run += ["--", *command(token)]
    done = subprocess.run(run, env=CALLOUT_ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(
            f"systemd-run could not arm the revert: {done.stderr.strip()}",
            hint="nothing was changed; apply without --confirm-within, or fix systemd",
        )


def _arm_process(run_folder: str, token: str, seconds: float) -> None:
    """A grandchild in a session of its own, which holds none of our descriptors."""
    child = os.fork()
    if child:
        # Its own child alone: the caller may have others.
        os.waitpid(child, 0)
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
