"""A device's eswitch mode over devlink: how a network card switches between its VFs.

Source: include/uapi/linux/devlink.h; Documentation/networking/devlink/devlink-eswitch-attr.rst.
As in netlink_route.py, what changes makes a `Request`, which `Host.netlink` sends.
"""

from __future__ import annotations

import errno

from vfiotool.errors import KernelError
from vfiotool.netlink.codec import (
    NETLINK_GENERIC,
    Message,
    Request,
    Socket,
    as_int,
    generic,
    parse_generic,
    resolve_family,
    string,
    u16,
)

FAMILY = "devlink"
_BUS = "pci"
_VERSION = 1
_CMD_ESWITCH_GET = 29
_CMD_ESWITCH_SET = 30
_ATTR_BUS_NAME = 1
_ATTR_DEV_NAME = 2
_ATTR_ESWITCH_MODE = 25
# enum devlink_eswitch_mode.
MODES = ("legacy", "switchdev")


def get_eswitch(family: int, address: str) -> Request:
    """The question for a PCI function's mode; it wants CAP_NET_ADMIN, as all of devlink's do."""
    payload = generic(_CMD_ESWITCH_GET, _VERSION, *_handle(address))
    return Request(NETLINK_GENERIC, family, payload, 0, f"read the eswitch mode of {address}")


def set_eswitch(family: int, address: str, mode: str) -> Request:
    """The request that gives a PCI function one of `MODES`. Raises KernelError for another."""
    if mode not in MODES:
        raise KernelError(f"{mode[:40]!r} is no eswitch mode", errno_name="EINVAL")
    attributes = (*_handle(address), u16(_ATTR_ESWITCH_MODE, MODES.index(mode)))
    payload = generic(_CMD_ESWITCH_SET, _VERSION, *attributes)
    return Request(NETLINK_GENERIC, family, payload, what=f"set {address} to eswitch mode {mode}")


def _handle(address: str) -> tuple[bytes, bytes]:
    return string(_ATTR_BUS_NAME, _BUS), string(_ATTR_DEV_NAME, address)


def parse_eswitch(message: Message) -> str | None:
    """The mode in an answer to `get_eswitch`; None if it holds none that this code knows."""
    number = as_int(parse_generic(message)[1].get(_ATTR_ESWITCH_MODE))
    return None if number is None or number >= len(MODES) else MODES[number]


def read_eswitch(address: str, timeout_s: float) -> str | None:
    """A PCI function's mode on this machine; None if its driver has no eswitch.

    Raises NotPermitted without CAP_NET_ADMIN, KernelError for any other refusal.
    """
    with Socket(NETLINK_GENERIC, timeout_s) as channel:
        request = get_eswitch(resolve_family(channel, FAMILY), address)
        try:
            answers = channel.request(request.type, request.payload, request.flags, request.what)
        except KernelError as error:
            # No devlink instance at all, or one whose driver has no such operation.
            if error.errno in (errno.ENODEV, errno.EOPNOTSUPP):
                return None
            raise
    return next((mode for mode in map(parse_eswitch, answers) if mode is not None), None)
