"""What an RTM_NEWLINK says of the interface that another stands on."""

from __future__ import annotations

import struct

import pytest

from vfiotool.netlink.codec import attribute, nested, string, u32
from vfiotool.netlink.route import parse_link

LINK, LINKINFO, NAMESPACE = 5, 18, 37
KIND, DATA, VXLAN_LINK = 1, 2, 3


def link(index: int, kind: str, *attributes: bytes, data: bytes = b"") -> bytes:
    head = struct.pack("=BxHiII", 0, 1, index, 0, 0)
    info = string(KIND, kind) + (nested(DATA, data, flag=False) if data else b"")
    return head + b"".join(attributes) + nested(LINKINFO, info, flag=False)


def test_an_interface_stands_on_what_the_kernel_links_it_with() -> None:
    away = attribute(NAMESPACE, struct.pack("=i", 4))
    parsed = parse_link(link(7, "macvlan", u32(LINK, 3), away))
    assert (parsed.lower, parsed.lower_namespace) == (3, 4)


@pytest.mark.parametrize(("lower", "told"), [(3, 3), (0, None), (None, None)])
def test_a_vxlan_stands_on_what_it_was_made_with_and_not_on_itself(
    lower: int | None, told: int | None
) -> None:
    """In another namespace than its lower interface's the kernel links it with its own index."""
    away = attribute(NAMESPACE, struct.pack("=i", 0))
    data = u32(1, 42) + (b"" if lower is None else u32(VXLAN_LINK, lower))
    parsed = parse_link(link(7, "vxlan", u32(LINK, 7), away, data=data))
    assert (parsed.lower, parsed.lower_namespace) == (told, 0)
