"""Where the kernel forbids io_uring, as many containers do, requests on files are done at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.virtio.frontend import T_DISCARD, T_FLUSH, Frontend

MIB = 1 << 20
# A seccomp filter (linux/seccomp.h, linux/filter.h) that answers io_uring_setup, 425 everywhere,
# with EPERM; then vfiotool's own command line.
FORBIDDEN = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
code = b"".join(struct.pack("<HBBI", *one) for one in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)))
held = ctypes.create_string_buffer(code)
program = struct.pack("HxxxxxxP", 4, ctypes.addressof(held))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    sys.exit(77)
assert libc.syscall(425, 1, None) == -1 and ctypes.get_errno() == 1
from vfiotool.cli.main import main
sys.exit(main())
"""


def connects(path: Path) -> bool:
    """Whether somebody listens: a socket is there before that."""
    with socket.socket(socket.AF_UNIX) as trial:
        return trial.connect_ex(str(path)) == 0


@pytest.mark.parametrize("direct", [False, True], ids=["page-cache", "direct"])
def test_a_file_is_served_where_io_uring_is_forbidden(tmp_path: Path, direct: bool) -> None:
    image, path = tmp_path / "image", tmp_path / "socket"
    image.write_bytes(b"a" * MIB)
    command = [sys.executable, "-c", FORBIDDEN, "serve", "vhost-user-blk", "--queues", "2"]
    command += ["--blk-file", str(image), "--socket-path", str(path)] + ["--direct"] * direct
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    waiting = threading.Event()
    while not connects(path):
        if process.poll() is not None:
            assert process.stderr is not None
            said = process.stderr.read().decode()
            if process.returncode == 77 or "no direct I/O" in said:
                pytest.skip(f"cannot be had here: {said or 'no seccomp'}")
            raise AssertionError(said)
        waiting.wait(0.02)
    try:
        front = Frontend(str(path), queues=2)
        front.up()
        for turn in range(50):
            block = bytes([turn + 1]) * 4096
            assert front.write(8 * turn, block, index=turn % 2) == 0
            assert front.read(8 * turn, 4096, index=(turn + 1) % 2) == block
        assert front.read(8 * 60, 4096) == b"a" * 4096
        assert front.request(T_FLUSH)[0] == 0
        hole = (8 * 10).to_bytes(8, "little") + (8).to_bytes(4, "little") + bytes(4)
        assert front.request(T_DISCARD, data=hole)[0] == 0
        # Beyond the end is an error, and the next request is done.
        assert front.write(MIB // 512, b"x" * 512) == 1
        assert front.write(0, b"last" * 128) == 0
        front.close()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert process.stderr is not None
        process.stderr.close()
    stored = image.read_bytes()
    assert stored[:512] == b"last" * 128
    assert stored[4096:8192] == bytes([2]) * 4096
    assert os.path.getsize(image) == MIB
