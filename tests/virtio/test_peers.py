"""Our disks as other programs' front ends see them: qemu-io, qemu-img and blkio-copy."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.virtio import peers
from tests.virtio.test_serve import connect, running

MIB = 1 << 20


@pytest.fixture(scope="module")
def found() -> peers.Peers:
    # Fetching them takes a quarter of a minute and a network; what was fetched is used again.
    got = peers.find() if peers.is_here() else "the peers were not fetched: make bench fetches them"
    if isinstance(got, str):
        pytest.skip(got)
    return got


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A socket and the image behind it, whose bytes are random."""
    path, image = tmp_path / "s", tmp_path / "image"
    image.write_bytes(os.urandom(4 * MIB))
    with running(
        "vhost-user-blk", "--socket-path", str(path), "--blk-file", str(image), sockets=(path,)
    ) as process:
        connect(path, process).close()
        yield path, image


def run(found: peers.Peers, program: str, *arguments: str) -> str:
    done = subprocess.run(
        [*found.command(program), *arguments],
        env=found.env(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def options(path: Path) -> str:
    return f"driver=virtio-blk-vhost-user,path={path},cache.direct=on"


def test_qemu_io_reads_writes_zeroes_discards_and_flushes(
    found: peers.Peers, served: tuple[Path, Path]
) -> None:
    path, image = served
    steps = (
        "write -P 0xa5 64k 128k",
        "read -P 0xa5 64k 128k",
        "write -z 96k 32k",
        "read -P 0 96k 32k",
        "read -P 0xa5 128k 64k",
        "discard 1M 1M",
        "flush",
        "length",
    )
    said = run(found, "qemu-io", "--image-opts", options(path), *(f"-c{step}" for step in steps))
    assert "failed" not in said and "4 MiB" in said
    data = image.read_bytes()
    assert data[64 << 10 : 96 << 10] == b"\xa5" * (32 << 10)
    assert data[96 << 10 : 128 << 10] == bytes(32 << 10)
    assert data[128 << 10 : 192 << 10] == b"\xa5" * (64 << 10)
    assert data[MIB : 2 * MIB] == bytes(MIB)


def test_qemu_img_finds_the_disk_and_its_image_alike_and_benches_it(
    found: peers.Peers, served: tuple[Path, Path], tmp_path: Path
) -> None:
    path, image = served
    copy = tmp_path / "copy"
    copy.write_bytes(image.read_bytes())
    same = f"driver=raw,file.driver=file,file.filename={copy}"
    said = run(found, "qemu-img", "compare", "--image-opts", options(path), same)
    assert "identical" in said
    run(found, "qemu-img", "bench", "--image-opts", "-c", "2000", "-d", "16", options(path))
    run(found, "qemu-img", "bench", "--image-opts", "-w", "-c", "2000", "-d", "16", options(path))


def test_blkio_copy_takes_every_byte(
    found: peers.Peers, served: tuple[Path, Path], tmp_path: Path
) -> None:
    path, image = served
    out = tmp_path / "out"
    out.write_bytes(bytes(4 * MIB))
    source = ["--input-blkio=virtio-blk-vhost-user", f"path={path}"]
    run(found, "blkio-copy", *source, f"--output-file={out}")
    assert out.read_bytes() == image.read_bytes()
