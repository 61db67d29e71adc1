"""For all tests: commands' JSON is held against its schema, no test sleeps its time away, and
hypothesis draws the same examples each time (but in `make proofs`, which searches further).

The summary's last lines tell what the tests inside guests came to, and why some were skipped.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.oracles.printed import listen, schema_of


def hold_against_schema(command: str, payload: dict[str, Any]) -> None:
    """Fails the test whose command printed something else than what is published."""
    from tests.oracles.schemas import faults

    wrong = faults(schema_of(command, payload), payload)
    if wrong:
        # No Exception: what a command meets is told as an error of the command's.
        pytest.fail(f"what `{command}` printed is not as published: {wrong[:5]}")


# A shell leaves SIGINT ignored for what it runs in the background, and tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})

# Here and not in a fixture: once for all tests.
listen(hold_against_schema)


IN_GUEST = bool(os.environ.get("VFIOTOOL_LAB_MACHINE"))
# Inside a guest each import crosses 9p, on an emulated processor, once a boot.
if not IN_GUEST:
    from hypothesis import settings

    from tests.guests.begin import begin_at_once, is_file_in_guest
    from tests.guests.runs import PROOFS_WANTED

    settings.register_profile("same-each-time", derandomize=True, deadline=None)
    settings.register_profile("searching", print_blob=True, deadline=None)
    settings.load_profile("searching" if os.environ.get(PROOFS_WANTED) else "same-each-time")

# What a test may sleep in all, in this process: time is injected (tests/fakes/kernel.py).
SLEEP_LIMIT_S = 1.0
LONGEST_FILES = 12


@pytest.fixture(autouse=True)
def no_real_waiting(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Fails a test that slept for longer than SLEEP_LIMIT_S; those of guests and proofs, which
    are long by their nature, are let off."""
    excused = any(request.node.get_closest_marker(name) for name in ("lab", "proof"))
    if excused or IN_GUEST:
        yield
        return
    real, main, slept = time.sleep, os.getpid(), 0.0

    def sleep(seconds: float) -> None:
        nonlocal slept
        # Not threads that stand for a device, nor forked children, nor subprocess's wait for one.
        here = os.getpid() == main and threading.current_thread() is threading.main_thread()
        if here and sys._getframe(1).f_globals.get("__name__") != "subprocess":
            slept += seconds
        real(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    yield
    assert slept <= SLEEP_LIMIT_S, f"slept for {slept:.1f} s: wait for a condition, or inject time"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """An interrupt that leaves a test fails that test, where it would end a worker of xdist and
    with it the whole run. A person's Ctrl-C reaches the process that hands out the tests too."""
    try:
        return (yield)
    except KeyboardInterrupt:
        if "PYTEST_XDIST_WORKER" in os.environ:
            pytest.fail("a KeyboardInterrupt left the test")
        raise


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if IN_GUEST:
        return
    # Spread over processes file by file, what takes longest has to begin first.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    # Files in guests last: what boots guests of its own has run beside them by then.
    items.sort(key=lambda item: (is_file_in_guest(item), item.path not in slow))
    if os.environ.get(PROOFS_WANTED):
        return
    for item in items:
        if item.get_closest_marker("proof"):
            item.add_marker(pytest.mark.skip(reason="left to make proofs: long"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    if not IN_GUEST:
        begin_at_once(session)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tallies: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, set[str]] = defaultdict(set)
    skips: Counter[str] = Counter()
    figures = []
    again: list[tuple[str, str, str]] = []
    files: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call":
                continue
            for name, tally in getattr(report, "user_properties", []):
                if name == "layout":
                    text = ", ".join(f"{key} {value}" for key, value in tally.items())
                    terminalreporter.write_line(f"layout: {text}")
                if name == "guest":
                    _add(tally, tallies, reasons, skips)
                    files[tally["file"]] += round(tally["seconds"])
                    if tally["again"]:
                        again.append((tally["file"], tally["kernel"], tally["again"]))
                    figures += [
                        (tally["kernel"], test.rpartition("/")[2], measured)
                        for test, measured in sorted(tally["measured"].items())
                    ]
    if not tallies:
        return
    terminalreporter.section("tests inside guests")
    for kernel, tally in sorted(tallies.items()):
        counts = ", ".join(f"{tally[word]} {word}" for word in ("passed", "failed", "skipped"))
        terminalreporter.write_line(f"kernel {kernel}: {counts} in {tally['seconds']} s of tests")
    longest = ", ".join(f"{name} {count} s" for name, count in files.most_common(LONGEST_FILES))
    terminalreporter.write_line(f"  longest on all kernels together: {longest}")
    for name, kernel, why in sorted(again):
        terminalreporter.write_line(f"  the guest for {name} on {kernel} was started twice: {why}")
    for reason, count in skips.most_common():
        where = ", ".join(sorted(reasons[reason]))
        terminalreporter.write_line(f"  skipped {count} on {where}: {reason}")
    for kernel, test, measured in figures:
        text = ", ".join(f"{name} {value}" for name, value in measured.items())
        terminalreporter.write_line(f"  measured on {kernel}, {test}: {text}")


def _add(
    tally: dict[str, Any],
    tallies: dict[str, Counter[str]],
    reasons: dict[str, set[str]],
    skips: Counter[str],
) -> None:
    counts = tallies[tally["kernel"]]
    counts["passed"] += tally["passed"]
    counts["failed"] += tally["failed"]
    counts["skipped"] += len(tally["skipped"])
    counts["seconds"] += round(tally["seconds"])
    for reason in tally["skipped"]:
        skips[reason] += 1
        reasons[reason].add(f"{tally['kernel']}/{tally['machine']}")
