"""The audit trail: who changed what, kept over reboots, readable by everybody."""

from __future__ import annotations

import os
import socket
import stat
import time
from pathlib import Path

import pytest

from tests.fakes.small_host import SmallHost
from vfiotool.change import audit
from vfiotool.change.audit import FILE, AuditTrail, Caller, read_audit, read_caller
from vfiotool.change.journal import Journal
from vfiotool.change.sealed import seal
from vfiotool.cli.change import history
from vfiotool.cli.change.history import moment_of
from vfiotool.cli.main import main
from vfiotool.errors import UsageError

STEP = {"number": 1, "verb": "bind", "target": "0000:01:00.0", "from": "igb", "to": "vfio-pci"}


def trail(tmp_path: Path, boot: str = "b1", *, log: bool = False) -> AuditTrail:
    return AuditTrail(boot, str(tmp_path / "log"), log=log)


def test_a_change_is_told_with_its_outcome_and_by_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "read_caller", lambda: Caller(0, "root", "anna", "anna"))
    first = trail(tmp_path)
    first.begun(1, "bind 0000:01:00.0", [STEP], ["vfiotool", "bind"], None)
    first.ended(1, "committed")
    later = trail(tmp_path, "b2")
    later.begun(1, "undo", [], ["vfiotool", "undo"], 1)
    later.ended(1, "rolled-back", "EBUSY")
    one, two = read_audit(folder=str(tmp_path / "log"))
    assert (one.boot, one.outcome, one.by["sudo"]) == ("b1", "committed", "anna")
    assert one.steps[0]["to"] == "vfio-pci" and one.command == ("vfiotool", "bind")
    assert (two.boot, two.outcome, two.error) == ("b2", "rolled-back", "EBUSY")
    assert read_audit(time.time() + 1, str(tmp_path / "log")) == ()


def test_a_change_that_the_machine_was_cut_off_in_has_no_outcome(tmp_path: Path) -> None:
    trail(tmp_path).begun(7, "bind", [STEP], [], None)
    with open(tmp_path / "log" / FILE, "ab") as file:
        file.write(b"00000000 {torn")
    (one,) = read_audit(folder=str(tmp_path / "log"))
    assert (one.number, one.outcome) == (7, None)


def test_a_torn_line_does_not_take_the_next_change_with_it(tmp_path: Path) -> None:
    trail(tmp_path).begun(7, "bind", [STEP], [], None)
    with open(tmp_path / "log" / FILE, "ab") as file:
        file.write(b"00000000 {torn")
    later = trail(tmp_path, "b2")
    later.begun(1, "release", [STEP], [], None)
    later.ended(1, "committed")
    found = read_audit(folder=str(tmp_path / "log"))
    assert [(one.boot, one.number, one.outcome) for one in found] == [
        ("b1", 7, None),
        ("b2", 1, "committed"),
    ]


@pytest.mark.parametrize(
    "odd",
    [
        {"by": {}},
        {"by": {"uid": 0, "login": None, "sudo": None}},
        {"by": None},
        {"at": 1e30},
        {"at": float("nan")},
        {"undoes": {}},
        {"steps": [3]},
        {"command": None},
    ],
    ids=str,
)
def test_a_sealed_line_that_is_not_ours_is_passed_over(
    odd: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was an exit code of 70, for the whole history."""
    trail(tmp_path).begun(7, "bind", [STEP], [], None)
    by = {"uid": 0, "user": "root", "login": None, "sudo": None}
    entry = {"t": "begin", "at": 5.0, "boot": "b", "number": 1, "title": "odd", "by": by}
    entry |= {"command": [], "undoes": None, "steps": [], **odd}
    with open(tmp_path / "log" / FILE, "ab") as file:
        file.write(seal(entry))
    monkeypatch.setattr(history, "read_audit", lambda since: read_audit(0, str(tmp_path / "log")))
    assert main(["history", "--since", "today"]) == 0
    shown = capsys.readouterr().out
    assert "bind" in shown and "odd" not in shown


def test_everybody_may_read_it_and_nobody_else_may_write_it(tmp_path: Path) -> None:
    trail(tmp_path).begun(1, "bind", [], [], None)
    folder, file = tmp_path / "log", tmp_path / "log" / FILE
    assert stat.S_IMODE(folder.stat().st_mode) & 0o777 == 0o755
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_a_planted_link_is_not_followed_and_another_users_file_is_not_written(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / FILE).symlink_to(victim)
    trail(tmp_path).begun(1, "bind", [], [], None)
    assert victim.read_text() == "mine"
    (folder / FILE).unlink()
    (folder / FILE).write_text("")
    if os.geteuid() == 0:
        os.chown(folder / FILE, 65534, 65534)
        trail(tmp_path).begun(1, "bind", [], [], None)
        assert (folder / FILE).read_text() == ""


def test_a_place_that_cannot_be_written_fails_no_change(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file where the folder should be")
    trail(tmp_path).begun(1, "bind", [], [], None)
    trail(tmp_path).ended(1, "committed")


def test_the_systems_log_gets_one_line_whatever_a_name_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path)
        server.settimeout(5)
        monkeypatch.setattr(audit, "DEV_LOG", path)
        monkeypatch.setattr(audit, "_JOURNALD", str(tmp_path / "none"))
        trail(tmp_path, log=True).begun(3, "bind evil\nApr 1 sshd: root logged in", [], [], None)
        data = server.recv(4096)
        assert data.startswith(b"<29>vfiotool[") and b"\n" not in data and b"\\x0aApr" in data
        monkeypatch.setattr(audit, "_JOURNALD", path)
        trail(tmp_path, log=True).ended(3, "stuck", "held")
        fields = dict(line.split(b"=", 1) for line in server.recv(4096).splitlines())
        assert fields[b"VFIOTOOL_OUTCOME"] == b"stuck" and fields[b"PRIORITY"] == b"4"
        assert fields[b"MESSAGE"] == b"change 3 stuck: held"


def test_a_large_file_is_put_aside_and_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trail(tmp_path)
    one.begun(1, "first", [], [], None)
    monkeypatch.setattr(audit, "_LARGEST_BYTES", 10)
    one.begun(2, "second", [], [], None)
    assert [item.title for item in read_audit(folder=str(tmp_path / "log"))] == ["first", "second"]
    assert (tmp_path / "log" / f"{FILE}.1").exists()


def test_the_journal_tells_the_trail_of_begin_and_end(tmp_path: Path) -> None:
    host = SmallHost().host(live=True)
    own = trail(tmp_path)
    journal = Journal(host, str(tmp_path / "run"), own)
    journal.begin("bind", (), []).end("committed")
    journal.begin("vf set", (), []).end("rolled-back", "EBUSY")
    held = journal.begin("release", (), [])
    held.note("stuck", message="held by qemu", holders=[42], interrupted=False)
    held.release()
    found = read_audit(folder=str(tmp_path / "log"))
    assert [(item.title, item.outcome, item.error) for item in found] == [
        ("bind", "committed", None),
        ("vf set", "rolled-back", "EBUSY"),
        ("release", "stuck", "held by qemu"),
    ]
    # A journal of a test or of another root is no record of this machine's.
    assert Journal(host, str(tmp_path / "run")).audit is None


def test_whom_sudo_names_counts_for_root_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "mallory")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert read_caller().sudo is None
    assert Caller(0, "root", None, "anna").words == "anna through sudo as root"
    assert Caller(0, "root", "anna", None).words == "anna as root"
    assert Caller(0, "root", None, None).words == "root"


@pytest.mark.parametrize(
    ("text", "before"),
    [("90m", 5400), ("12h", 43200), ("7d", 604800)],
    ids=lambda value: str(value),
)
def test_moments(text: str, before: int) -> None:
    assert moment_of(text, 1e9) == 1e9 - before


def test_days_and_dates_and_what_is_neither() -> None:
    now = time.time()
    assert 0 <= now - moment_of("today", now) < 86400 * 1.05
    assert moment_of("today", now) - moment_of("yesterday", now) in (82800, 86400, 90000)
    assert moment_of("2026-11-30T08:00", now) - moment_of("2026-11-30", now) in (
        28800,
        25200,
        32400,
    )
    for bad in ("", "soon", "7w", "2026-13-01"):
        with pytest.raises(UsageError):
            moment_of(bad, now)


@pytest.mark.parametrize(("told", "login"), [("0", "root"), ("4294967295", None), ("", None)])
def test_who_logged_in_is_told_by_the_kernel_alone(
    told: str, login: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who became root by su or sudo is still known; the last number stands for nobody."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self/loginuid").write_text(told)
    monkeypatch.setattr(audit, "PROC", str(tmp_path))
    assert read_caller().login == login
