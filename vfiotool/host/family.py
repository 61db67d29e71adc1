"""The numbers that the kernel gave to its generic-netlink families (genetlink(7))."""

from __future__ import annotations

from vfiotool.errors import KernelError
from vfiotool.host.host import Host
from vfiotool.netlink.codec import family_of, family_request

# Of a question: what changes the host has the deadline of its caller.
QUESTION_DEADLINE_S = 5.0


def family_number(host: Host, name: str) -> int | None:
    """A generic-netlink family's number; None if the kernel has no such family.

    Raises KernelError or NotPermitted, and Stuck if there is no answer in time.
    """
    try:
        answers = host.ask_netlink(family_request(name), QUESTION_DEADLINE_S)
    except KernelError as error:
        if error.errno_name != "ENOENT":
            raise
        return None
    return family_of(answers, name)
