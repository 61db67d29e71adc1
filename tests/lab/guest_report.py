"""A pytest plugin for the guest: each test's outcome as one line of JSON on descriptor 3.

So are the objects that commands print: the host holds them against their schemas.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.oracles.printed import listen

REPORT_FD = 3
_at_work = [""]


def _send(**row: object) -> None:
    data = json.dumps(row).encode() + b"\n"
    while data:
        data = data[os.write(REPORT_FD, data) :]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported, or that skips itself as a whole."""
    file = report.nodeid.partition("::")[0]
    if report.failed:
        _send(file=file, test=report.nodeid, outcome="failed", text=report.longreprtext)
    elif report.skipped:
        _send(file=file, test=report.nodeid, outcome="skipped", text=_reason(report))


def _printed(command: str, payload: dict[str, Any]) -> None:
    test = _at_work[0]
    file = test.partition("::")[0]
    _send(file=file, test=test, outcome="printed", command=command, payload=payload)


listen(_printed)


def pytest_runtest_logstart(nodeid: str) -> None:
    _at_work[0] = nodeid
    _send(file=nodeid.partition("::")[0], test=nodeid, outcome="started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One row a test, and one more for a set-up or tear-down that did not pass."""
    if report.when != "call" and report.passed:
        return
    text = _reason(report) if report.skipped else report.longreprtext
    if report.failed:
        text += "".join(f"\n{title}\n{content}" for title, content in report.sections)
    _send(
        file=report.nodeid.partition("::")[0],
        test=report.nodeid,
        outcome=report.outcome,
        text=text,
        seconds=report.duration,
        measured=dict(report.user_properties),
    )


def pytest_sessionfinish(exitstatus: int) -> None:
    _send(file="", test="", outcome="finished", status=int(exitstatus))


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return report.longreprtext
