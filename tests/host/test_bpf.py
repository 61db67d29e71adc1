"""Programs of tcx, as a kernel answers for them; tests/lab/test_blockers_unseen.py attaches one."""

from __future__ import annotations

import ctypes
import errno
import struct

import pytest

from vfiotool.host import bpf, observe_net
from vfiotool.host.bpf import has_tcx


class Kernel:
    """Answers bpf(2): how many programs an interface's hook has, or an errno."""

    def __init__(self, attached: dict[tuple[int, int], int], failure: int = 0) -> None:
        self.attached, self.failure = attached, failure

    def syscall(
        self, number: int, command: int, query: ctypes.Array[ctypes.c_char], size: int
    ) -> int:
        assert (number, command, size) == (321, 16, len(query))
        # Flags, attach flags, where to put the ids and how many: nothing of them is asked for.
        assert not any(bytes(query)[8:])
        if self.failure:
            ctypes.set_errno(self.failure)
            return -1
        asked = struct.unpack_from("=II", bytes(query))
        struct.pack_into("=I", query, 24, self.attached.get(asked, 0))
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(bpf.os, "uname", lambda: type("Uname", (), {"machine": "x86_64"}))
    return monkeypatch


@pytest.mark.parametrize("hook", [46, 47])
def test_a_program_of_either_way_counts(machine: pytest.MonkeyPatch, hook: int) -> None:
    kernel = Kernel({(3, hook): 2})
    machine.setattr(bpf, "libc", lambda: kernel)
    assert has_tcx(3)
    assert not has_tcx(4)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOENT, errno.ENODEV])
def test_a_kernel_without_the_hook_has_no_program_there(
    machine: pytest.MonkeyPatch, number: int
) -> None:
    machine.setattr(bpf, "libc", lambda: Kernel({}, number))
    assert not has_tcx(3)


def test_what_may_not_be_asked_or_cannot_is_unseen(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(bpf, "libc", lambda: Kernel({}, errno.EPERM))
    with pytest.raises(PermissionError):
        has_tcx(3)
    assert "!\twhich interfaces BPF programs are attached to (tcx): EPERM" in (
        observe_net.net_traffic().splitlines()
    )
    machine.setattr(bpf.os, "uname", lambda: type("Uname", (), {"machine": "abacus"}))
    with pytest.raises(OSError, match=r"\[Errno 38\]"):
        has_tcx(3)


def test_an_interface_with_a_program_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe_net, "has_tcx", lambda index: index == 1)
    assert "lo\tprogrammed" in observe_net.net_traffic().splitlines()
