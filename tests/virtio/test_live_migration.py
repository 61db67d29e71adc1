"""A running guest moves between QEMUs while it uses a served disk, and finds all that it wrote."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.guests.runs import need_lab
from tests.virtio import moving
from vfiotool.errors import VfiotoolError
from vfiotool.lab.kernels.newer_qemu import newer_qemu

pytestmark = pytest.mark.lab

MIB = 1 << 20
# A server that says it logs what it writes, and does not.
FORGETFUL = """
import sys
from vfiotool.virtio.backend import Frontend
from vfiotool.cli.main import main
Frontend._dirty_log_of = lambda *_: None
sys.exit(main())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    need_lab(moving.KERNEL)
    try:
        newer_qemu()
    except VfiotoolError as error:
        pytest.skip(error.message)
    moving.initramfs(tmp_path)
    with (tmp_path / "disk").open("wb") as raw:
        raw.truncate(16 * MIB)
    return tmp_path


def serve(folder: Path, name: str, python: tuple[str, ...] = ("-m", "vfiotool")) -> list[str]:
    command = [sys.executable, *python, "serve", "vhost-user-blk"]
    command += ["--blk-file", str(folder / "disk"), "--lock", "running"]
    return [*command, "--socket-path", str(folder / name)]


@pytest.mark.parametrize(
    ("servers", "in_flight", "packed"),
    [
        pytest.param(1, False, False, id="one-server"),
        pytest.param(2, True, True, id="two-servers-in-flight-packed"),
        pytest.param(1, True, False, id="one-server-in-flight", marks=pytest.mark.proof),
        pytest.param(1, False, True, id="one-server-packed", marks=pytest.mark.proof),
        pytest.param(2, False, False, id="two-servers", marks=pytest.mark.proof),
        pytest.param(2, True, False, id="two-servers-in-flight", marks=pytest.mark.proof),
    ],
)
def test_a_running_guest_moves_there_and_back_and_finds_what_it_wrote_and_read(
    folder: Path, servers: int, in_flight: bool, packed: bool
) -> None:
    with ExitStack() as stack:
        sockets = [folder / f"socket{number}" for number in range(servers)]
        for path in sockets:
            stack.enter_context(moving.served(serve(folder, path.name), path))
        told = moving.there_and_back(
            folder, (sockets[0], sockets[-1]), in_flight=in_flight, packed=packed
        )
    assert len(told) == 2
    for one in told:
        print(f"{one['total-time']} ms in all, {one['downtime']} ms down")


@pytest.mark.proof
def test_a_guest_that_moves_is_harmed_where_written_pages_are_not_logged(folder: Path) -> None:
    command = serve(folder, "socket", ("-c", FORGETFUL))
    with (
        moving.served(command, folder / "socket"),
        pytest.raises(AssertionError, match=r"^bad: memory|does not come to its end|does no work"),
    ):
        moving.there_and_back(folder, (folder / "socket",) * 2, limit_s=20)
