"""The journal and its folders: what survives a crash, and what is refused."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.change.changing import EDU, NVME, binding, do, furnished, releasing, run_folder
from tests.fakes.kernel import FakeKernel
from vfiotool.change.folder import Folder
from vfiotool.change.journal import Journal, parse_record, started_at, writer_of
from vfiotool.change.locks import held, try_lock
from vfiotool.change.recover import recover
from vfiotool.change.sealed import seal, unseal
from vfiotool.errors import KernelError, Refused, Stuck, UsageError
from vfiotool.host.host import Host
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.saved import DesiredState


@pytest.fixture
def kernel() -> FakeKernel:
    return furnished()


@pytest.fixture
def folder() -> Iterator[str]:
    with run_folder() as path:
        yield path


def done_file(folder: str) -> Path:
    (path,) = Path(folder).glob("boot-*/*.done")
    return path


def test_the_intent_stands_in_the_journal_before_each_write(
    kernel: FakeKernel, folder: str
) -> None:
    journal = Journal(kernel.host(), folder)
    seen = []

    def look(number: int, path: str, data: str) -> None:
        (name,) = Path(folder).glob("boot-*/*.open")
        last = unseal(name.read_bytes().splitlines()[-1])
        seen.append((last["t"], last["path"], last["data"]) == ("write", path, data))

    kernel.before_write = look
    do(kernel.host(), journal, binding(NVME))
    assert seen == [True, True, True]


def test_every_prefix_of_a_journal_can_be_read(kernel: FakeKernel, folder: str) -> None:
    do(kernel.host(), Journal(kernel.host(), folder), binding(NVME, EDU))
    data = done_file(folder).read_bytes()
    whole = parse_record(data)
    assert whole is not None and whole.outcome == "committed"
    first = data.index(b"\n") + 1
    for end in range(len(data)):
        record = parse_record(data[:end])
        assert (record is None) == (end < first)
        if record is not None:
            assert record.steps == whole.steps
            assert record.done <= whole.done


def test_damage_is_told_apart_from_a_torn_line(kernel: FakeKernel, folder: str) -> None:
    do(kernel.host(), Journal(kernel.host(), folder), binding(EDU))
    lines = done_file(folder).read_bytes().splitlines(keepends=True)
    lines[2] = b"garbage\n"
    with pytest.raises(KernelError, match="damaged at line 3"):
        parse_record(b"".join(lines))


@pytest.mark.parametrize(
    "line", [b"{}", b"5", b'{"t":"begin"}', b'{"t":"begin","number":1,"keys":7}', b"\xff\xfe"]
)
def test_a_damaged_record_is_named_by_its_file(
    kernel: FakeKernel, folder: str, line: bytes
) -> None:
    journal = Journal(kernel.host(), folder)
    do(kernel.host(), journal, binding(EDU))
    path = done_file(folder)
    path.write_bytes(line + b"\n")
    with pytest.raises(KernelError, match=f"{path}: the journal is damaged"):
        journal.history()


def test_a_record_whose_first_line_is_of_another_kind_is_damaged(
    kernel: FakeKernel, folder: str
) -> None:
    do(kernel.host(), Journal(kernel.host(), folder), binding(EDU))
    first, rest = done_file(folder).read_bytes().split(b"\n", 1)
    assert parse_record(seal(unseal(first)) + rest) is not None
    with pytest.raises(KernelError, match="damaged at line 1: 'step' begins no transaction"):
        parse_record(seal({**unseal(first), "t": "step"}) + rest)


@pytest.mark.parametrize("locked", [False, True])
def test_looking_for_open_changes_keeps_no_files_open(
    kernel: FakeKernel, folder: str, locked: bool
) -> None:
    """One that another works on, and one that ended before its first line."""
    journal = Journal(kernel.host(), folder)
    do(kernel.host(), journal, binding(EDU))
    path = done_file(folder)
    data = path.read_bytes()
    path.with_suffix(".open").write_bytes(data[: data.rindex(b"\n", 0, -1) + 1])
    path.unlink()
    empty = path.with_name("2.open")
    empty.touch(mode=0o600)
    with ExitStack() as stack:
        if locked:
            for file in (path.with_suffix(".open"), empty):
                assert try_lock(stack.enter_context(file.open("rb")).fileno())
        before = len(os.listdir("/proc/self/fd"))
        ((record, transaction),) = journal.unfinished()
        assert record.number == 1 and (transaction is None) == locked
        if transaction is not None:
            transaction.release()
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("torn", [False, True])
def test_a_full_disk_under_the_journal_leaves_the_host_as_it_was(
    torn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room runs out at each entry in turn, for good; a torn entry must not swallow the next."""
    real, make = os.write, binding(EDU, NVME)

    def run(room: int) -> str:
        kernel, left = furnished(), [room]

        def write(descriptor: int, data: bytes) -> int:
            if bytes(data[8:13]) != b' {"t"':
                return real(descriptor, data)
            left[0] -= 1
            if left[0] >= 0:
                return real(descriptor, data)
            if torn:
                return real(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        before = kernel.state()
        with run_folder() as folder:
            journal = Journal(kernel.host(), folder)
            monkeypatch.setattr(os, "write", write)
            try:
                do(kernel.host(), journal, make)
            except (KernelError, Stuck) as error:
                assert "No space left" in error.message
                ended = error.kind
            else:
                ended = "done"
            monkeypatch.setattr(os, "write", real)
            recovered = recover(kernel.host(), journal)
            assert [entry.result for entry in recovered] == ["undone"] * (ended == "stuck")
            assert all(record.outcome for record in journal.history())
            assert not [name for name in os.listdir(folder) if name.startswith("new.")]
        assert (kernel.state() == before) == (ended != "done")
        return ended

    ends = []
    while "done" not in ends:
        ends.append(run(len(ends)))
    # Nothing was begun; then it was taken back, and the journal could not say so.
    assert ends[0] == "kernel"
    assert set(ends[1:-1]) == {"stuck"}
    assert len(ends) > 10


def test_the_folders_are_for_their_owner_alone(kernel: FakeKernel, folder: str) -> None:
    do(kernel.host(), Journal(kernel.host(), folder), binding(EDU))
    for path in [Path(folder), *Path(folder).rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_another_boot_begins_a_journal_of_its_own(kernel: FakeKernel, folder: str) -> None:
    do(kernel.host(), Journal(kernel.host(), folder), binding(EDU))
    kernel.files["/proc/sys/kernel/random/boot_id"] = b"another\n"
    assert Journal(kernel.host(), folder).history() == []


def test_a_planted_link_is_refused_at_every_level(kernel: FakeKernel, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (tmp_path / "run").symlink_to(elsewhere)
    with pytest.raises(Refused, match="planted"):
        Journal(kernel.host(), str(tmp_path / "run"))
    run = tmp_path / "good"
    Journal(kernel.host(), str(run))
    (run / "locks").rmdir()
    (run / "locks").symlink_to(elsewhere)
    with pytest.raises(Refused, match="planted"):
        Journal(kernel.host(), str(run))
    assert list(elsewhere.iterdir()) == []


def test_a_link_in_place_of_a_lock_is_refused(kernel: FakeKernel, folder: str) -> None:
    journal = Journal(kernel.host(), folder)
    victim = Path(folder) / "victim"
    os.symlink(victim, f"{folder}/locks/group-1")
    with pytest.raises(Refused, match="a link or another user's file"):
        do(kernel.host(), journal, binding(EDU))
    assert not victim.exists()
    assert kernel.writes == []


def test_a_folder_of_another_user_or_open_to_all_is_refused(
    kernel: FakeKernel, tmp_path: Path
) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    wide.chmod(0o777)
    with pytest.raises(Refused, match="others could change it"):
        Journal(kernel.host(), str(wide))
    if os.geteuid() == 0:
        foreign = tmp_path / "foreign"
        foreign.mkdir(mode=0o700)
        os.chown(foreign, 65534, 65534)
        with pytest.raises(Refused, match="belongs to user 65534"):
            Journal(kernel.host(), str(foreign))


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", ".", "..", "a\nb", "x" * 5000, "-x"])
def test_names_that_leave_a_folder_are_refused(name: str, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "state"))
    with pytest.raises(UsageError):
        folder.replace(name, b"x")
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]


def test_a_folder_is_closed_once(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "state"))
    number = folder.descriptor
    folder.close()
    with pytest.raises(OSError):
        os.fstat(number)
    # Whoever has the number now keeps it.
    other = os.open(os.devnull, os.O_RDONLY)
    os.dup2(other, number)
    folder.close()
    os.fstat(number)
    for opened in {other, number}:
        os.close(opened)


class Waiting:
    """A time of its own, in which `act` happens at the first pause."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.now, self.act = 100.0, act

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert self.now < 200.0, "it waits for ever"
        self.now += seconds
        act, self.act = self.act, lambda: None
        act()


def test_a_lock_is_waited_for_until_its_time_and_no_longer(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = Folder(folder)
    other = locks.open("group-7", os.O_RDWR | os.O_CREAT)
    assert try_lock(other)
    waiting = Waiting(lambda: None)
    monkeypatch.setattr("vfiotool.change.locks.time", waiting)
    with pytest.raises(KernelError, match="has been changing group 7 for over 5 s"):
        held(locks, ["group-7"], 5).__enter__()
    assert 105 <= waiting.now < 106
    waiting.act = lambda: os.close(other)
    with held(locks, ["group-7"], 5):
        assert waiting.now < 107


def test_a_lock_is_waited_for_and_dies_with_its_process(folder: str) -> None:
    locks = Folder(folder)
    code = (
        "import sys, time\n"
        "from vfiotool.change.folder import Folder\n"
        "from vfiotool.change.locks import held\n"
        f"with held(Folder({folder!r}), ['a', 'b'], 5):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(KernelError, match="another vfiotool"), held(locks, ["b"], 0.05):
        pass
    child.kill()
    child.wait()
    child.stdout.close()
    begun = time.monotonic()
    with held(locks, ["a", "b"], 5):
        assert time.monotonic() - begun < 5


def test_desired_state_is_replaced_whole(tmp_path: Path) -> None:
    state = DesiredState(str(tmp_path / "etc"))
    assert state.load() is None
    state.save(parse_policy("version = 1\n", "a"), 1)
    state.save(parse_policy("version = 1\n# two\n", "b"), 2)
    loaded = state.load()
    assert loaded is not None and loaded.name == "b"
    assert [path.name for path in (tmp_path / "etc").iterdir()] == ["applied.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EMFILE])
def test_a_lock_that_cannot_be_made_is_an_error_of_the_kernels(
    kernel: FakeKernel, folder: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    journal, real, before = Journal(kernel.host(), folder), os.open, kernel.state()

    def refusing(path: str, flags: int, *mode: int, dir_fd: int | None = None) -> int:
        if flags & os.O_CREAT and dir_fd is not None:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(KernelError) as caught:
        do(kernel.host(), journal, binding(NVME))
    assert caught.value.errno_name == errno.errorcode[number]
    assert kernel.state() == before


def test_the_change_stands_though_an_old_origin_cannot_be_dropped(
    kernel: FakeKernel, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 5 means rolled back: what fails after the commit is no failure of the change."""
    journal = Journal(kernel.host(), folder)
    do(kernel.host(), journal, binding(NVME))

    def refuse(self: Journal, bus: str, name: str) -> None:
        raise KernelError("remove it: EROFS", errno_name="EROFS")

    monkeypatch.setattr(Journal, "forget", refuse)
    assert do(kernel.host(), journal, releasing(NVME)).transaction == 2
    assert kernel.driver_of(NVME) == "nvme"


def test_a_writer_is_named_by_its_start_as_well_and_none_by_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`recover` waits for that process alone: its id may be another one's by then."""
    host = Host.local()
    monkeypatch.setattr(Host, "writer_pid", lambda _: os.getpid())
    since = started_at(host, os.getpid())
    assert since is not None
    assert started_at(host, 1 << 23) is None  # above any process id
    assert writer_of(host) == {"writer": os.getpid(), "since": since}
    monkeypatch.setattr(Host, "writer_pid", lambda _: None)
    assert writer_of(host) == {"writer": None, "since": None}
