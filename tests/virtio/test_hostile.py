"""A sanitized server under hostile front ends: it stays, keeps nothing, and serves on."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cext.build import build_with_sanitizers
from tests.models.served import serving
from tests.native.test_cext import sanitizer_libraries
from tests.virtio.frontend import Frontend
from tests.virtio.hostile import attack
from tests.virtio.test_serve import connect
from vfiotool.models.nvme import NvmeModel

ROOT = Path(__file__).resolve().parents[2]
MILLION = 1_000_000


def sanitized(file: Path) -> subprocess.Popen[str]:
    """`serve exports` with its C under the sanitizers; what it says goes to a file."""
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(sanitizer_libraries()),
        # Memory of a front end that shrinks raises SIGBUS, which is answered.
        "ASAN_OPTIONS": "detect_leaks=0:handle_sigbus=0:quarantine_size_mb=16",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(build_with_sanitizers()),
        "RUNTIME_DIRECTORY": str(file.parent / "run"),
    }
    command = [sys.executable, "-P", "-m", "vfiotool", "serve", "exports", str(file)]
    with (file.parent / "said").open("w") as said:
        return subprocess.Popen([*command, "--threads", "2"], env=environment, stderr=said)  # type: ignore[return-value]


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def assert_flat(pid: int, before: int, settled: int) -> None:
    """A server has the descriptors and about the KiB of memory that it had once it was warm."""
    deadline = time.monotonic() + 20
    while descriptors(pid) > before + 16:
        assert time.monotonic() < deadline, "descriptors were left open"
    grown = resident_kib(pid) - settled
    print(f"descriptors {before} and {descriptors(pid)}, {settled} KiB, {grown:+}")
    assert grown < 64 << 10, f"{grown} KiB more than at the beginning"


def check(honest: Frontend, number: int) -> None:
    data = number.to_bytes(8, "little") * 64
    assert honest.write(number % 1000, data) == 0
    assert honest.read(number % 1000, 512) == data


def exports(tmp_path: Path, controller: str | None) -> Path:
    """An exports file of two disks, images or ranges of an NVMe controller's namespace, and one in
    memory for front ends that are hostile."""
    file = tmp_path / "exports.toml"
    text = "version = 1\n"
    for number, name in enumerate(("hostile", "honest")):
        image = tmp_path / f"{name}.raw"
        with image.open("wb") as raw:
            raw.truncate(1 << 20)
        disk = f'blk_file = "{image}"'
        if controller is not None:
            disk = f'nvme = "{controller}/1"\noffset = {number << 20}\nsize = {1 << 20}'
        text += f'[[export]]\nname = "{name}"\n{disk}\nqueues = 2\n'
        text += f'socket_path = "{tmp_path / name}"\n'
    text += '[[export]]\nname = "memory"\nram = "1M"\nqueues = 2\n'
    text += f'socket_path = "{tmp_path / "memory"}"\n'
    file.write_text(text)
    return file


def bombard(tmp_path: Path, count: int, seed: int, controller: str | None = None) -> None:
    """Send so many malformed messages and rings."""
    file = exports(tmp_path, controller)
    server, rng, sent, connections = sanitized(file), random.Random(seed), 0, 0
    try:
        honest = connect(tmp_path / "honest", server)
        honest.up()
        began = time.monotonic()
        paths = [str(tmp_path / name) for name in ("hostile", "hostile", "memory")]
        before = settled = 0
        while sent < count:
            sent += attack(paths[connections % len(paths)], rng)
            connections += 1
            if connections % 20 == 0:
                check(honest, connections)
            if connections == 200:
                before, settled = descriptors(server.pid), resident_kib(server.pid)
        check(honest, connections)
        assert server.poll() is None
        if settled:
            took = time.monotonic() - began
            print(f"{sent} messages and rings, {connections} connections, {took:.0f} s,")
            assert_flat(server.pid, before, settled)
        honest.close()
    finally:
        server.terminate()
        server.wait(timeout=60)
    said = (tmp_path / "said").read_text()
    assert server.returncode == 0 and "Sanitizer" not in said and "runtime error" not in said, said[
        -3000:
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_hostile_front_ends_harm_nobody_else(tmp_path: Path) -> None:
    bombard(tmp_path, 2_000, seed=1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_hostile_front_ends_of_an_nvme_disk_write_in_their_range_alone(tmp_path: Path) -> None:
    model = NvmeModel(3 << 11)
    model.disk[2 << 20 :] = b"\xa5" * (1 << 20)
    with serving(model) as served:
        bombard(tmp_path, int(os.environ.get("VFIOTOOL_HOSTILE", 1_000)), 3, served.name)
    assert set(model.disk[2 << 20 :]) == {0xA5}
    # The honest one wrote these, and nobody else to its range.
    for number in range(1000):
        found = bytes(model.disk[(1 << 20) + 512 * number :][:512])
        assert found == bytes(512) or found[:8] * 64 == found
        assert int.from_bytes(found[:8], "little") in (0, *range(number, 1 << 20, 1000))


@pytest.mark.proof
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_million_malformed_messages_and_rings(tmp_path: Path) -> None:
    bombard(tmp_path, int(os.environ.get("VFIOTOOL_HOSTILE", MILLION)), seed=2)
