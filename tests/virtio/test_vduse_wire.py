"""VDUSE's wire format against the header's sizes; tests/lab/test_vduse.py has the kernel."""

from __future__ import annotations

import errno
import fcntl
import struct
from pathlib import Path

import pytest

from vfiotool.cli.main import main
from vfiotool.errors import KernelError, UsageError
from vfiotool.virtio import vduse_wire as wire
from vfiotool.virtio.vduse_wire import VduseRequest, VduseRequestType


def test_numbers_of_ioctls_hold_the_sizes_of_the_header() -> None:
    """As `linux/vduse.h` of 6.12 gives them on x86-64."""
    assert wire._CREATE_DEV == 0x41508102
    assert wire._DESTROY_DEV == 0x41008103
    assert wire._IOTLB_GET_FD == 0xC0208110
    assert wire._SET_CONFIG == 0x40088112
    assert wire._VQ_SETUP == 0x40208114
    assert wire._VQ_GET_INFO == 0xC0308115
    assert wire._VQ_SETUP_KICKFD == 0x40088116


@pytest.mark.parametrize(
    ("kind", "body", "wanted"),
    [
        (0, struct.pack("<I", 3), VduseRequest(VduseRequestType.GET_VQ_STATE, 9, 3)),
        (1, b"\x0f\xff", VduseRequest(VduseRequestType.SET_STATUS, 9, 15)),
        (2, bytes(16), VduseRequest(VduseRequestType.UPDATE_IOTLB, 9, 0)),
        (3, struct.pack("<II", 1, 2), VduseRequest(VduseRequestType.SET_VQ_GROUP_ASID, 9, 1, 2)),
        (77, bytes(16), VduseRequest(None, 9)),
    ],
)
def test_requests_are_read_by_their_kind(kind: int, body: bytes, wanted: VduseRequest) -> None:
    data = struct.pack("<II16x", kind, 9) + body.ljust(128, b"\0")
    assert len(data) == 152 and wire.parse_request(data) == wanted
    # A kernel that gives less than it says takes nobody down.
    wire.parse_request(data[:4])


def test_a_response_names_its_request_and_the_queues_state() -> None:
    request = VduseRequest(VduseRequestType.GET_VQ_STATE, 9, 3)
    data = wire.format_response(request, ok=True, base=77)
    assert len(data) == 152
    assert struct.unpack_from("<II16xIH", data) == (9, 0, 3, 77)
    assert struct.unpack_from("<II", wire.format_response(request, ok=False)) == (9, 1)


@pytest.mark.parametrize("name", ["", "a/b", ".", "..", "control", "x" * 256])
def test_names_that_no_device_can_have_are_refused_before_the_kernel_is_asked(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a VDUSE device's name"):
        wire.create(-1, name, 2, 0, 1, b"", version=0)


@pytest.mark.skipif(Path("/dev/vduse/control").exists(), reason="this machine has VDUSE")
def test_a_kernel_without_vduse_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "vduse-blk", "vd0", "--ram", "1M"]) == 8
    assert "CONFIG_VDPA_USER" in capsys.readouterr().err


class _Kernel:
    """What /dev/vduse/control was asked; `newest` is the API version that it knows."""

    def __init__(self, newest: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.newest = newest
        self.asked: list[tuple[int, bytes]] = []
        monkeypatch.setattr(fcntl, "ioctl", self)

    def __call__(self, fd: int, number: int, data: bytearray) -> int:
        self.asked.append((number, bytes(data)))
        version = int.from_bytes(data[:8], "little")
        if number == wire._SET_API_VERSION and version > self.newest:
            raise OSError(errno.EINVAL, "Invalid argument")
        return 0


@pytest.mark.parametrize("newest", [0, 1])
def test_the_newest_version_that_the_kernel_knows_is_agreed_on(
    newest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the device is made as that version wants it: 0 refuses what is not zero, 1 refuses a
    device without a group and an address space (vduse_validate_config)."""
    kernel = _Kernel(newest, monkeypatch)
    assert wire.set_api_version(3) == newest
    wire.create(3, "vd0", 2, 7, 4, b"config", version=newest)
    number, data = kernel.asked[-1]
    assert number == wire._CREATE_DEV
    assert struct.unpack_from("<IIQIIII", data, 256) == (0, 2, 7, 4, 4096, newest, newest)
    assert data[288:332] == bytes(44) and struct.unpack_from("<I", data, 332) == (6,)
    assert data[336:] == b"config"


def test_a_kernel_that_knows_no_version_of_ours_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _Kernel(-1, monkeypatch)
    with pytest.raises(KernelError, match="agree on VDUSE's version"):
        wire.set_api_version(3)
