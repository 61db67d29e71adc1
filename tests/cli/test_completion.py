"""Completion, asked as shells ask: in bash, zsh and fish themselves where they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vfiotool.cli.completing import SHELLS, complete, script
from vfiotool.cli.main import main
from vfiotool.errors import UsageError

HOSTS = Path(__file__).resolve().parents[2] / "fixtures" / "hosts"
VFS = str(HOSTS / "vfs-enabled")
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa100"
MDEVS = str(HOSTS / "mdev-parents")


def found(incomplete: str, *words: str) -> list[str]:
    return [value for value, _ in complete(incomplete, words)]


@pytest.mark.parametrize(
    ("incomplete", "words", "expected"),
    [
        ("bi", [], ["bind"]),
        ("", ["vf"], ["list", "set"]),
        ("--ro", [], ["--root"]),
        ("--dr", ["bind"], ["--driver", "--dry-run"]),
        ("--roo", ["vf", "list"], ["--root"]),
        ("0000:02:10.", ["--root", VFS, "bind"], [f"0000:02:10.{n}" for n in (0, 2, 4)]),
        ("02:10.", ["--root", VFS, "why"], [f"02:10.{n}" for n in (0, 2, 4)]),
        ("02:0", ["--root", VFS, "bind", "01:00.0"], ["02:00.0"]),
        ("net:e", ["show", "--root", VFS], ["net:eth0", "net:eth1", "net:eth2", "net:eth3"]),
        ("driver:ig", ["devices", "--root", VFS], ["driver:igb", "driver:igbvf"]),
        ("g", ["--root", VFS, "devices"], ["group:"]),
        ("group:4", ["--root", VFS, "bind"], ["group:4"]),
        ("vho", ["--root", VFS, "vm", "qemu"], ["vhost-user-blk:", "vhost-user-net:"]),
        ("vd", ["--root", VFS, "vm", "check"], ["vdpa:"]),
        ("vfio-user:/sys/bus/p", ["--root", VFS, "vm", "run"], ["vfio-user:/sys/bus/pci"]),
        ("02:10.", ["--root", VFS, "vm", "libvirt"], [f"02:10.{n}" for n in (0, 2, 4)]),
        ("1", ["--root", VFS, "groups"], ["1", "10", "11", "12", "13", "14", "15", "16", "17"]),
        ("vfio", ["--root", VFS, "bind", "02:10.0", "--driver"], ["vfio-pci"]),
        ("--driver=no", ["--root", VFS, "bind", "02:10.0"], ["--driver=none"]),
        ("", ["--root", VFS, "vf", "set"], ["0000:01:00.0", "0000:02:00.0"]),
        ("", ["--root", MDEVS, "mdev", "create"], ["mbochs", "mdpy", "mtty"]),
        ("mt", ["--root", MDEVS, "mdev", "create", "mtty"], ["mtty-1", "mtty-2"]),
        ("83b8", ["--root", MDEVS, "mdev", "remove"], [f"{UUID}1", f"{UUID}2"]),
        ("st", ["lab", "run", "--machine"], ["storage"]),
        ("pci-", ["demo"], ["pci-testdev"]),
        ("z", ["completion"], ["zsh"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_may_stand_there(incomplete: str, words: list[str], expected: list[str]) -> None:
    got = found(incomplete, *words)
    if incomplete == "1":
        assert set(got) >= {"1", "10", "11"} and all(item.startswith("1") for item in got)
    else:
        assert got == expected


def test_policies_are_completed_as_files(tmp_path: Path) -> None:
    for name in ("a.toml", "b.plan", "c.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "d").mkdir()
    got = found(f"{tmp_path}/", "apply")
    assert got == [f"{tmp_path}/{name}" for name in ("a.toml", "b.plan", "d/")]


def test_a_line_that_is_wrong_so_far_has_no_candidates(capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["no-such"], ["--root", "/nowhere", "bind"], ["vf", "no-such"]):
        assert main(["_complete", "x", *words]) in (0, 1)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_a_shell_that_there_is_nothing_for_is_bad_usage() -> None:
    with pytest.raises(UsageError, match="there is no completion for 'csh'"):
        script("csh")


@pytest.fixture
def on_path(tmp_path: Path) -> dict[str, str]:
    """An environment in which `vfiotool` is this checkout's."""
    program = tmp_path / "bin" / "vfiotool"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vfiotool "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"there is no {shell} here")


BASH = """
source <(vfiotool completion bash)
COMP_LINE=$1 COMP_POINT=${#1}
_vfiotool
printf '%s\\n' "${COMPREPLY[@]}"
"""


@needs("bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vfiotool rel", ["release"]),
        # bash takes words apart at colons: what stands before the last one is not to be repeated.
        (f"vfiotool --root {VFS} bind 0000:02:10.", ["10.0", "10.2", "10.4"]),
        (f"vfiotool --root {VFS} why net:eth", ["eth0", "eth1", "eth2", "eth3"]),
        (f"vfiotool bind --root={VFS} --driver=vfio", ["vfio-pci"]),
        ("vfiotool vf ", ["list", "set"]),
    ],
)
def test_bash_completes(line: str, expected: list[str], on_path: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH, "bash", line],
        env=on_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == expected


@needs("bash")
def test_bash_takes_the_script_and_completes_at_its_prompt(on_path: dict[str, str]) -> None:
    """The real thing: a tab on a terminal."""
    import pty

    pid, master = pty.fork()
    if pid == 0:
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], {**on_path, "PS1": "> "})
    try:
        os.write(master, b"source <(vfiotool completion bash)\n")
        os.write(master, f"vfiotool --root {VFS} show --json 0000:02:00\t | wc -c\nexit\n".encode())
        seen = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:
                break
            if not piece:
                break
            seen += piece
    finally:
        os.close(master)
        os.waitpid(pid, 0)
    assert b"show --json 0000:02:00" in seen and b".0 " in seen


ZSH = """
compdef() { }
source <(vfiotool completion zsh)
_describe() { printf '%s\\n' "${(@P)3}" }
words=("${(@)argv}") CURRENT=${#argv}
_vfiotool
"""


@needs("zsh")
def test_zsh_completes(on_path: dict[str, str]) -> None:
    line = ["vfiotool", "--root", VFS, "bind", "0000:02:10."]
    done = subprocess.run(
        ["zsh", "-f", "-c", ZSH, "zsh", *line],
        env=on_path,
        capture_output=True,
        text=True,
        check=True,
    )
    values = [item.replace("\\:", "\0").partition(":")[0] for item in done.stdout.splitlines()]
    assert [value.replace("\0", ":") for value in values] == [f"0000:02:10.{n}" for n in (0, 2, 4)]
    checked = subprocess.run(["zsh", "-n"], input=SHELLS["zsh"], text=True, check=False)
    assert checked.returncode == 0


@needs("zsh")
def test_zsh_finds_the_script_in_its_folder_and_completes_at_its_prompt(
    on_path: dict[str, str], tmp_path: Path
) -> None:
    """As a package installs it, with a tab on a terminal: the first one already completes."""
    import pty

    folder = tmp_path / "site-functions"
    folder.mkdir()
    (folder / "_vfiotool").write_text(SHELLS["zsh"])
    environment = {**on_path, "HOME": str(tmp_path), "TERM": "dumb", "PS1": "> "}
    pid, master = pty.fork()
    if pid == 0:
        os.execvpe("zsh", ["zsh", "-f", "-i"], environment)
    setup = f"fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -D; echo re''ady\n"
    seen = b""

    def read_until(word: bytes) -> None:
        nonlocal seen
        while word not in seen:
            try:
                piece = os.read(master, 65536)
            except OSError:
                return
            if not piece:
                return
            seen += piece

    try:
        os.write(master, setup.encode())
        read_until(b"\nready")
        os.write(master, b"vfiotool comple\t")
        read_until(b"completion")
        os.write(master, b"fis\t")
        read_until(b"fish")
        os.write(master, b"| grep -c complete; exit\n")
        read_until(b"\0never")
    finally:
        os.close(master)
        os.waitpid(pid, 0)
    assert b"completion" in seen and b"\n2" in seen.replace(b"\r", b""), seen


@needs("fish")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"vfiotool --root {VFS} bind 0000:02:10.", [f"0000:02:10.{n}" for n in (0, 2, 4)]),
        ("vfiotool vf ", ["list", "set"]),
        ("vfiotool rel", ["release"]),
    ],
)
def test_fish_completes(line: str, expected: list[str], on_path: dict[str, str]) -> None:
    code = f"vfiotool completion fish | source; complete -C '{line}'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", code], env=on_path, capture_output=True, text=True, check=True
    )
    assert [item.partition("\t")[0] for item in done.stdout.splitlines()] == expected
