"""The netlink half of the write door: one request in a disposable child, with a deadline.

The kernel runs a request inside `sendmsg`, under locks that a stuck device can hold for ever, so
a time limit on the answer alone would not help (net/core/rtnetlink.c, rtnetlink_rcv_msg).
"""

from __future__ import annotations

import os
import pickle
import select
import time
from typing import TYPE_CHECKING

from vfiotool.errors import KernelError, Stuck, VfiotoolError
from vfiotool.host.child import abandon, leave_parent
from vfiotool.netlink.codec import Message, Request, family_of, family_request, send

if TYPE_CHECKING:
    from vfiotool.host.host import Host

# Of a question: what changes the host has the deadline of its caller.
QUESTION_DEADLINE_S = 5.0


def send_in_child(request: Request, timeout_s: float) -> list[Message]:
    """The answers to `request`. Raises as `netlink.Socket.request`, and Stuck after `timeout_s`."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        # Whatever happens, the child must never run on in the parent's code.
        try:
            leave_parent(writer)
            data = pickle.dumps(_attempt(request, timeout_s))
            while data:
                data = data[os.write(writer, data) :]
        finally:
            os._exit(0)
    os.close(writer)
    try:
        data = _read_all(reader, timeout_s, request)
    finally:
        os.close(reader)
        abandon(child)
    try:
        # Our own child's words; one that was killed may have left half of them.
        outcome = pickle.loads(data)
    except (pickle.UnpicklingError, EOFError):
        outcome = _lost(request)
    if isinstance(outcome, VfiotoolError):
        raise outcome
    answers: list[Message] = outcome
    return answers


def _attempt(request: Request, timeout_s: float) -> list[Message] | VfiotoolError:
    try:
        return send(request, timeout_s)
    except VfiotoolError as error:
        return error


def _lost(request: Request) -> KernelError:
    return KernelError(f"{request.what}: the process that sent it ended without an answer")


def _read_all(reader: int, timeout_s: float, request: Request) -> bytes:
    deadline = time.monotonic() + timeout_s
    parts: list[bytes] = []
    while True:
        left = max(deadline - time.monotonic(), 0)
        if not select.select([reader], [], [], left)[0]:
            raise Stuck(
                f"{request.what}: no answer after {timeout_s:g} s",
                hint="end what holds the device, then: vfiotool recover",
            )
        piece = os.read(reader, 1 << 16)
        if not piece:
            return b"".join(parts)
        parts.append(piece)


def family_number(host: Host, name: str) -> int | None:
    """A generic-netlink family's number; None if the kernel has no such family.

    Raises KernelError or NotPermitted, and Stuck if there is no answer in time.
    """
    try:
        answers = host.netlink(family_request(name), QUESTION_DEADLINE_S)
    except KernelError as error:
        if error.errno_name != "ENOENT":
            raise
        return None
    return family_of(answers, name)
