"""A machine that has an old QEMU installed, really: Debian 12's own 7.2, or what this Debian has.

It is fetched and unpacked into a folder of its own, and found as an installed one is; the lab's own
QEMU is out of sight. Each machine boots with it, or is refused in words before anything starts.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.guests.runs import need_lab
from vfiotool.cli.main import main
from vfiotool.errors import VfiotoolError
from vfiotool.lab import machines, qemu
from vfiotool.lab.kernels import packages

pytestmark = [pytest.mark.lab, pytest.mark.proof]

KERNEL = "6.12"
# What a guest is asked: which functions it has, and whether vfiotool lists them.
LOOK = "lspci -n && vfiotool devices >/dev/null"
IDS = {
    "edu": "1234:11e8",
    "nvme": "1b36:0010",
    "e1000e": "8086:10d3",
    "igb": "8086:10c9",
    "VGA": "1234:1111",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release's own QEMU as a program of that name in a folder `bin`."""
    need_lab(KERNEL)
    try:
        if not packages.is_debian():
            pytest.skip("an old QEMU is fetched on Debian only")
        folder = tmp_path_factory.mktemp("old-qemu")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            (folder / "cache").mkdir(mode=0o700)
            apt = packages.Apt("old-qemu", packages.os_release()["VERSION_CODENAME"])
            apt.update()
            files = apt.download_missing("qemu-system-x86")
    except VfiotoolError as error:
        pytest.skip(f"no old QEMU here: {error.message}")
    root = folder / "root"
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for file in files:
        if file.name.partition("_")[0] not in packages.NEVER_LAYERED:
            packages.unpack(file, root)
    command, environment = qemu._from_layer(root)
    script = folder / "bin" / qemu.PROGRAM
    script.parent.mkdir()
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment)
    script.write_text(f'#!/bin/sh\nexec env {settings} {shlex.join(command)} "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture(autouse=True)
def installed(program: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[qemu.Qemu]:
    """The old QEMU is what this machine has; the layer has the guests' tools and no QEMU."""
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(qemu, "packages", SimpleNamespace(layer=lambda: None))
    qemu.find.cache_clear()
    found = qemu.find()
    assert found.command == (str(program),)
    yield found
    qemu.find.cache_clear()


@pytest.mark.parametrize("name", machines.MACHINES)
def test_each_machine_boots_or_is_refused_in_words(
    name: str, installed: qemu.Qemu, capfd: pytest.CaptureFixture[str]
) -> None:
    machine = machines.find(name)
    try:
        installed.require(machine)
        lacking = ""
    except VfiotoolError as error:
        lacking = error.message
    command = ["lab", "run", "--machine", name, "--kernel", KERNEL]
    code = main([*command, "--", "sh", "-c", LOOK])
    said = capfd.readouterr()
    if lacking:
        assert code == 8, said
        assert lacking in said.out + said.err
        return
    assert code == 0, said
    for item in machine.devices:
        # What it can do without, an old QEMU may lack.
        there = not item.optional or item.model in installed.models
        assert (IDS.get(item.model, "") in said.out) == there, item.model


def test_a_qemu_without_the_devices_is_refused_in_words(
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Debian's package brings one for small machines, which has none of the lab's."""
    small = tmp_path / "bin" / qemu.PROGRAM
    small.parent.mkdir()
    script = program.read_text()
    assert f"/{qemu.PROGRAM} " in script
    small.write_text(script.replace(f"/{qemu.PROGRAM} ", f"/{qemu.PROGRAM}-microvm ", 1))
    small.chmod(0o755)
    monkeypatch.setenv("PATH", f"{small.parent}:{os.environ['PATH']}")
    qemu.find.cache_clear()
    for words in (["lab", "run", "--kernel", KERNEL, "--", "true"], ["lab", "demo"]):
        assert main(words) == 8
        said = capfd.readouterr().err
        assert str(small) in said and "edu, pci-testdev" in said


def test_the_demonstration_passes_or_is_refused_in_words(
    installed: qemu.Qemu, capfd: pytest.CaptureFixture[str]
) -> None:
    code = main(["lab", "demo", "--kernel", KERNEL])
    said = capfd.readouterr()
    assert code == 0, said.out[-3000:] + said.err[-3000:]
    assert "scenes" in said.out
