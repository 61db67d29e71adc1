"""The lab's guests: what crosses the channel, how a lost guest looks, and that nothing remains."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guests.runs import need_lab
from vfiotool.lab.guest import Guest, GuestLost, GuestTimeout, NoSuchCommand
from vfiotool.lab.run import run

pytestmark = pytest.mark.lab
KERNEL = "6.12"
CLI = [sys.executable, "-m", "vfiotool", "lab", "run", "--kernel", KERNEL]


@pytest.fixture(scope="module", autouse=True)
def lab_is_possible() -> None:
    need_lab(KERNEL)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared with space")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder where a guest has a file system of its own, with awkward characters."""
    path = tmp_path_factory.mktemp("it's a, folder")
    (path / "note").write_text("carried in")
    return path


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drive") / "disk.raw"
    path.write_bytes(b"first sector".ljust(1 << 20, b"\0"))
    return path


@pytest.fixture(scope="module")
def guest(shared: Path, folder: Path, drive: Path) -> Iterator[Guest]:
    options = {"share": (shared,), "cwd": folder, "extra_drives": (drive,)}
    with Guest("basic", KERNEL, load=("virtio_blk",), **options) as running:
        yield running


def sh(guest: Guest, script: str) -> str:
    done = guest.exec(["sh", "-ec", script])
    assert done.exit_code == 0, done.stderr.decode()
    return done.text


def wait_until(condition: Callable[[], bool], limit_s: float = 30.0) -> bool:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("true", 0)])
def test_exit_code_is_the_commands_own(guest: Guest, script: str, code: int) -> None:
    assert guest.exec(["sh", "-c", script]).exit_code == code


def test_streams_come_back_apart_or_merged_in_order(guest: Guest) -> None:
    command = ["sh", "-c", "echo one; echo two >&2; echo three"]
    apart = guest.exec(command)
    assert (apart.stdout, apart.stderr) == (b"one\nthree\n", b"two\n")
    assert guest.exec(command, merge=True).stdout == b"one\ntwo\nthree\n"


def test_output_of_any_bytes_and_size_arrives_whole(guest: Guest) -> None:
    program = "import os; [os.write(1, bytes(range(256)) * 256) for _ in range(96)]"
    expected = hashlib.sha256(bytes(range(256)) * 256 * 96).hexdigest()
    done = guest.exec(["python3", "-c", f"import sys; {program}"])
    assert len(done.stdout) == 6 << 20
    assert hashlib.sha256(done.stdout).hexdigest() == expected


def test_arguments_arrive_as_they_were_given(guest: Guest) -> None:
    nasty = ["a b", "it's", '"q"', "$HOME", "a\nb", "*", "", "--", "-n", "\\", "ü→", ";exit 9"]
    program = "import sys, json; print(json.dumps(sys.argv[1:]))"
    done = guest.exec(["python3", "-c", program, *nasty])
    assert json.loads(done.text) == nasty


def test_input_reaches_the_command_and_ends(guest: Guest) -> None:
    data = os.urandom(3 << 20)
    done = guest.exec(["sha256sum"], input=data)
    assert done.text.split()[0] == hashlib.sha256(data).hexdigest()
    assert guest.exec(["cat"]).stdout == b""


def test_input_that_nobody_reads_harms_nothing(guest: Guest) -> None:
    assert guest.exec(["true"], input=bytes(1 << 20)).exit_code == 0
    assert guest.exec(["true"]).exit_code == 0


def test_program_or_folder_that_is_not_there_is_not_found(guest: Guest) -> None:
    with pytest.raises(NoSuchCommand, match="no-such-program"):
        guest.exec(["no-such-program"])
    with pytest.raises(NoSuchCommand, match="/no/such/folder"):
        guest.exec(["true"], cwd=Path("/no/such/folder"))
    assert guest.exec(["true"]).exit_code == 0


def test_command_over_its_limit_is_killed_and_the_guest_lives_on(guest: Guest) -> None:
    with pytest.raises(GuestTimeout, match="sh did not end within 1 s"):
        guest.exec(["sh", "-c", "while sleep 0.1; do echo busy-loop-marker; done"], timeout_s=1)
    assert sh(guest, "pgrep -f busy-loop-[m]arker || echo gone") == "gone\n"


def test_a_daemon_left_behind_does_not_hold_the_command(guest: Guest) -> None:
    assert sh(guest, "sleep 600 & echo $!").strip().isdigit()


def test_command_can_have_a_terminal_of_a_size(guest: Guest) -> None:
    done = guest.exec(["sh", "-c", "tty && stty size"], terminal=(33, 77))
    lines = done.text.split("\r\n")
    assert lines[0].startswith("/dev/pts/")
    assert lines[1] == "33 77"


def test_working_folder_is_there_and_changes_to_it_stay_in_the_guest(
    guest: Guest, folder: Path
) -> None:
    assert sh(guest, "pwd; cat note; echo changed > note; cat note") == (
        f"{folder}\ncarried inchanged\n"
    )
    assert [path.name for path in folder.iterdir()] == ["note"]
    assert (folder / "note").read_text() == "carried in"


def test_only_a_shared_folder_takes_what_the_guest_writes(guest: Guest, shared: Path) -> None:
    sh(guest, f"echo out > '{shared}/result'; echo lost > /etc/lost-in-the-guest")
    assert (shared / "result").read_text() == "out\n"
    assert not Path("/etc/lost-in-the-guest").exists()


def test_extra_drive_is_read_and_never_written(guest: Guest, drive: Path) -> None:
    assert sh(guest, "head -c 12 /dev/vda") == "first sector"
    sh(guest, "echo overwritten > /dev/vda; sync; head -c 11 /dev/vda")
    assert drive.read_bytes().startswith(b"first sector\0")


def test_device_can_be_plugged_in_and_out(guest: Guest) -> None:
    def functions() -> set[str]:
        return set(sh(guest, "ls /sys/bus/pci/devices").split())

    before = functions()
    guest.qmp.device_add("edu", id="plugged", bus="rp9")
    assert wait_until(lambda: len(functions()) == len(before) + 1)
    guest.qmp.device_del("plugged")
    assert wait_until(lambda: functions() == before)


def test_a_command_that_does_not_exist_ends_as_in_a_shell(tmp_path: Path) -> None:
    """With 127, and --quiet says nothing beside the error."""
    done = subprocess.run(
        [*CLI, "--quiet", "--", "nosuchcmd"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 127
    assert done.stdout == ""
    assert done.stderr.splitlines()[0].startswith("vfiotool: the guest cannot run nosuchcmd")
    assert "lab:" not in done.stderr


def test_guest_that_powers_off_is_lost_and_not_failed(tmp_path: Path) -> None:
    done = subprocess.run(
        [*CLI, "--", "sh", "-c", "echo before; /run/lab/busybox poweroff -f; sleep 60"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 125
    assert done.stdout == "before\n"
    assert "the guest was lost: it ended while sh ran" in done.stderr


def test_guest_that_panics_is_lost_and_its_last_words_are_shown() -> None:
    with pytest.raises(GuestLost, match=r"(?s)its console ended with.*Kernel panic.*sysrq"):
        run(["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 60"], kernel=KERNEL)


def test_guest_that_does_not_come_up_in_time_is_lost() -> None:
    begin = time.monotonic()
    with (
        pytest.raises(GuestLost, match=r"did not come up within 0\.5 s"),
        Guest("basic", KERNEL, boot_limit_s=0.5),
    ):
        pass
    assert time.monotonic() - begin < 30


def test_guest_whose_kernel_finds_no_root_ends_by_itself() -> None:
    with pytest.raises(GuestLost, match=r"(?s)ended while it booted.*lab: cannot load"):
        run(["true"], kernel=KERNEL, kernel_arguments=("initcall_blacklist=init_v9fs",))


def descendants(pid: int) -> set[int]:
    """All processes below `pid`, from /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found: set[int] = set()
    while more := {p for p, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("which", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_interrupted_lab_leaves_no_process_and_no_file(
    which: signal.Signals, code: int, tmp_path: Path
) -> None:
    with (
        subprocess.Popen(
            [*CLI, "--", "sh", "-c", "echo up; sleep 600"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            # A shell that starts the tests in the background leaves them with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as lab,
        contextlib.ExitStack() as clean,
    ):
        clean.callback(lab.kill)
        assert lab.stdout is not None
        assert lab.stdout.readline() == b"up\n"
        children = descendants(lab.pid)
        assert children
        assert list(tmp_path.iterdir())
        lab.send_signal(which)
        assert lab.wait(timeout=30) == code
    assert wait_until(lambda: not any(runs(pid) for pid in children), 10)
    if which != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []
