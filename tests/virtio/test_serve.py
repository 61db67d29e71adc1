"""`serve` as an operator runs it: options, files, signals, and nothing left behind."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.virtio.frontend import Closed, Frontend
from vfiotool.errors import UsageError
from vfiotool.virtio.exports import parse_exports, parse_size

VFIOTOOL = [sys.executable, "-m", "vfiotool"]
MIB = 1 << 20


@contextmanager
def running(
    *arguments: str, sockets: tuple[Path, ...] = (), **options: object
) -> Iterator[subprocess.Popen[str]]:
    """The command, from when its sockets answer until SIGTERM, which has to end it with 0."""
    command = [*VFIOTOOL, "serve", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    try:
        for path in sockets:
            connect(path, process).close()
        yield process
    finally:
        process.terminate()
        _, said = process.communicate(timeout=20)
    assert process.returncode == 0, said


def connect(path: Path, process: subprocess.Popen[str]) -> Frontend:
    """A front end on a socket that may not be there yet; fails if the command ended."""
    while True:
        try:
            return Frontend(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            assert process.poll() is None, process.communicate()[1]
            select.select([], [], [], 0.01)


def run(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*VFIOTOOL, "serve", *arguments], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_a_disk_is_served_until_sigterm_and_the_socket_goes(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with running("vhost-user-blk", "--socket-path", str(path), "--ram", "1M", sockets=(path,)) as p:
        front = connect(path, p)
        front.up()
        assert front.write(0, b"s" * 512) == 0
        front.close()
        front = connect(path, p)
        front.up()
        assert front.read(0, 512) == b"s" * 512
        front.close()
    assert not path.exists()


def test_a_connection_that_was_handed_over_is_served_and_ends_the_program(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "l"))
    listener.listen()
    front = Frontend(str(tmp_path / "l"))
    connection, _ = listener.accept()
    number = connection.fileno()
    command = [*VFIOTOOL, "serve", "vhost-user-blk", "--fd", str(number), "--ram", "1M"]
    process = subprocess.Popen(command, pass_fds=[number])
    connection.close()
    front.up()
    assert front.write(0, bytes(512)) == 0
    front.close()
    assert process.wait(timeout=20) == 0
    listener.close()


def test_a_listening_socket_that_was_handed_over_is_served_to_one_front_end_after_another(
    tmp_path: Path,
) -> None:
    path = tmp_path / "l"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    number = listener.fileno()
    with running(
        "vhost-user-blk", "--fd", str(number), "--ram", "1M", sockets=(path,), pass_fds=[number]
    ) as process:
        for written in (b"1", b"2"):
            front = connect(path, process)
            front.up()
            assert front.write(0, written * 512) == 0
            front.close()
    listener.close()
    assert path.exists()  # whoever made it removes it


def test_a_queue_that_starts_signals_what_a_server_that_died_may_have_left_unsaid(
    tmp_path: Path,
) -> None:
    """A driver whose last completion was shown and not signalled would wait for ever."""
    path = tmp_path / "s"
    with running("vhost-user-blk", "--socket-path", str(path), "--ram", "1M", sockets=(path,)) as p:
        front = connect(path, p)
        front.up()
        assert select.select([front.rings[0].call], [], [], 20)[0]
        front.close()


def test_capabilities_are_printed_as_libvirt_reads_them() -> None:
    code, out, _ = run("vhost-user-blk", "--print-capabilities")
    assert code == 0 and json.loads(out)["type"] == "block"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--ram", "1M"], 2, "--socket-path"),
        (["--socket-path", "s", "--ram", "1M", "--blk-file", "x"], 2, "--blk-file"),
        (["--socket-path", "s", "--ram", "1000"], 2, "multiple"),
        (["--socket-path", "s", "--ram", "huge"], 2, "not a size"),
        (["--socket-path", "s", "--ram", "1M", "--offset", "512"], 2, "--offset"),
        (["--socket-path", "s", "--blk-file", "absent"], 5, "absent"),
        (["--socket-path", "s", "--ram", "1M", "--threads", "0"], 2, "--threads"),
        (["--socket-path", "s", "--ram", "1M", "--poll-us", "-1"], 2, "--poll-us"),
        (["--socket-path", "nowhere/s", "--ram", "1M"], 5, "nowhere/s"),
        (["--fd", "77", "--ram", "1M"], 2, "--fd 77"),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.chdir(tmp_path)
    found, out, said = run("vhost-user-blk", *arguments)
    assert (found, out) == (code, "") and words in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_is_served_is_refused_to_another(tmp_path: Path) -> None:
    path, image = tmp_path / "s", tmp_path / "image"
    image.write_bytes(bytes(MIB))
    with running(
        "vhost-user-blk", "--socket-path", str(path), "--blk-file", str(image), sockets=(path,)
    ):
        other = ["--socket-path", str(tmp_path / "t"), "--blk-file", str(image)]
        code, _, said = run("vhost-user-blk", *other)
        assert code == 4 and "in use" in said
        code, _, said = run("vhost-user-blk", "--socket-path", str(path), "--ram", "1M")
        assert code == 4 and "another program listens" in said


EXPORT = '[[export]]\nname = "{name}"\nsocket_path = "{path}"\n{disk}\n'


def test_the_file_is_followed_and_what_did_not_change_goes_on(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("one", "two", "three")}
    file = tmp_path / "exports.toml"

    def write(**disks: str) -> None:
        text = "version = 1\n"
        for name, disk in disks.items():
            text += EXPORT.format(name=name, path=paths[name], disk=disk)
        file.write_text(text)

    write(one='ram = "1M"', two='ram = "1M"')
    with running("exports", str(file), sockets=(paths["one"], paths["two"])) as process:
        kept, changed = connect(paths["one"], process), connect(paths["two"], process)
        kept.up()
        changed.up()
        kept.write(0, b"k" * 512)
        write(one='ram = "1M"', two='ram = "2M"', three='ram = "1M"')
        process.send_signal(signal.SIGHUP)
        connect(paths["three"], process).close()
        with pytest.raises(Closed):
            changed.stop()
        changed.close()
        assert kept.read(0, 512) == b"k" * 512
        # A file with a fault changes nothing.
        file.write_text("version = 1\n[[export]]\nname = 7\n")
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        assert "not followed" in process.stderr.readline()
        assert kept.read(0, 512) == b"k" * 512
        write(one='ram = "1M"')
        process.send_signal(signal.SIGHUP)
        while paths["three"].exists():
            assert process.poll() is None
            select.select([], [], [], 0.01)
        assert kept.read(0, 512) == b"k" * 512
        kept.close()


def test_limits_change_without_disturbing_an_export(tmp_path: Path) -> None:
    path, file = tmp_path / "one", tmp_path / "exports.toml"

    def write(limits: str, groups: str = "") -> None:
        export = EXPORT.format(name="one", path=path, disk='ram = "1M"\n' + limits)
        file.write_text("version = 1\n" + export + groups)

    write("iops_limit = 1\nburst = 0.001", '[[group]]\nname = "g"\niops_limit = 5')
    with running("exports", str(file), sockets=(path,)) as process:
        front = connect(path, process)
        front.up()
        assert front.write(0, b"l" * 512) == 0
        # The next one waits for a second, and the changed limit lets it go.
        threading.Timer(
            0.05, lambda: (write("weight = 5"), process.send_signal(signal.SIGHUP))
        ).start()
        began = time.monotonic()
        for _ in range(20):
            assert front.read(0, 512) == b"l" * 512
        assert time.monotonic() - began < 15
        front.close()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("iops_limit = 0", "iops_limit"),
        ("iops_limit = -5", "iops_limit"),
        ("iops_limit = 1.5", "iops_limit"),
        ("iops_limit = true", "iops_limit"),
        ('bandwidth_limit = "fast"', "bandwidth_limit"),
        ("burst = 0.1", "no limit that it belongs to"),
        ("iops_limit = 5\nburst = nan", "burst"),
        ("iops_limit = 5\nburst = 100", "burst"),
        ("weight = 0", "weight"),
        ("weight = 99999999999999999999", "weight"),
        ('group = "a b"', "group"),
        ('group = "typo"', "is not defined"),
        ('blk_file = "/x\\u0000y"', "give one of"),
    ],
)
def test_limits_that_make_no_sense_are_named(lines: str, words: str) -> None:
    text = "version = 1\n" + EXPORT.format(name="e", path="/run/e", disk='ram = "1M"\n' + lines)
    text += '[[group]]\nname = "g"\niops_limit = 5\n'
    with pytest.raises(UsageError, match=words):
        parse_exports(text, "f.toml")


def test_every_fault_of_a_file_is_named() -> None:
    text = """
version = 2
odd = 1
[[export]]
name = "a"
socket_path = "/run/a"
ram = "1M"
[[export]]
name = "a"
socket_path = "/run/a"
blk_file = "/x"
[[export]]
name = "../b"
socket_path = "/run/b"
ram = "1M"
[[export]]
name = "c"
socket_path = "relative"
ram = "1M"
[[export]]
name = "d"
socket_path = "/run/d"
queues = "4"
[[export]]
name = "e"
socket_path = "/run/e"
iops = 4
"""
    with pytest.raises(UsageError) as caught:
        parse_exports(text, "f.toml")
    for words in (
        "version = 2",
        "unknown key 'odd'",
        "name 'a' is defined twice",
        "socket_path '/run/a' is defined twice",
        "'../b'",
        "not an absolute path",
        "queues = '4'",
        "unknown key 'iops'",
    ):
        assert words in caught.value.message, words


def test_sizes_have_binary_units() -> None:
    assert parse_size("4k", "x") == 4096 and parse_size("1GiB", "x") == 1 << 30
    assert [parse_size(text, "x") for text in ("512", "0", "1M", "2g")] == [
        512,
        0,
        1 << 20,
        2 << 30,
    ]
    for text in ("", "-1", "1.5G", "1e9", "9" * 40):
        with pytest.raises(UsageError):
            parse_size(text, "x")


def test_a_disk_behind_a_full_descriptor_table_is_refused_in_words(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    path = tmp_path / "s"
    with running("vhost-user-blk", "--socket-path", str(path), "--ram", "1M", sockets=(path,)) as p:
        resource.prlimit(p.pid, resource.RLIMIT_NOFILE, (12, hard))
        for _ in range(3):
            front = connect(path, p)
            with pytest.raises((Closed, AssertionError, TimeoutError)):
                front.socket.settimeout(2)
                front.up()
            front.close()
        resource.prlimit(p.pid, resource.RLIMIT_NOFILE, (soft, hard))
        front = connect(path, p)
        front.up()
        assert front.write(0, bytes(512)) == 0
        front.close()
    assert os.path.exists(tmp_path)
