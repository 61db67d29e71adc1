"""Names of virtio's device classes and feature bits.

Source: OASIS virtio 1.3, sections 5 (device types), 5.1.3 and 5.2.3 (network and block feature
bits) and 6 (reserved feature bits); the spelling is that of the header files, without prefix.
"""

from __future__ import annotations

CLASSES = {
    1: "net",
    2: "block",
    3: "console",
    4: "rng",
    5: "balloon",
    8: "scsi",
    9: "9p",
    16: "gpu",
    18: "input",
    19: "vsock",
    20: "crypto",
    24: "memory",
    25: "sound",
    26: "fs",
}
NET, BLOCK = 1, 2

_COMMON = {
    24: "NOTIFY_ON_EMPTY",
    27: "ANY_LAYOUT",
    28: "RING_INDIRECT_DESC",
    29: "RING_EVENT_IDX",
    32: "VERSION_1",
    33: "ACCESS_PLATFORM",
    34: "RING_PACKED",
    35: "IN_ORDER",
    36: "ORDER_PLATFORM",
    37: "SR_IOV",
    38: "NOTIFICATION_DATA",
    39: "NOTIF_CONFIG_DATA",
    40: "RING_RESET",
    41: "ADMIN_VQ",
}
_NET = {
    0: "CSUM",
    1: "GUEST_CSUM",
    2: "CTRL_GUEST_OFFLOADS",
    3: "MTU",
    5: "MAC",
    6: "GSO",
    7: "GUEST_TSO4",
    8: "GUEST_TSO6",
    9: "GUEST_ECN",
    10: "GUEST_UFO",
    11: "HOST_TSO4",
    12: "HOST_TSO6",
    13: "HOST_ECN",
    14: "HOST_UFO",
    15: "MRG_RXBUF",
    16: "STATUS",
    17: "CTRL_VQ",
    18: "CTRL_RX",
    19: "CTRL_VLAN",
    20: "CTRL_RX_EXTRA",
    21: "GUEST_ANNOUNCE",
    22: "MQ",
    23: "CTRL_MAC_ADDR",
    52: "HASH_TUNNEL",
    53: "VQ_NOTF_COAL",
    54: "GUEST_USO4",
    55: "GUEST_USO6",
    56: "HOST_USO",
    57: "HASH_REPORT",
    59: "GUEST_HDRLEN",
    60: "RSS",
    61: "RSC_EXT",
    62: "STANDBY",
    63: "SPEED_DUPLEX",
}
_BLOCK = {
    0: "BARRIER",
    1: "SIZE_MAX",
    2: "SEG_MAX",
    4: "GEOMETRY",
    5: "RO",
    6: "BLK_SIZE",
    7: "SCSI",
    9: "FLUSH",
    10: "TOPOLOGY",
    11: "CONFIG_WCE",
    12: "MQ",
    13: "DISCARD",
    14: "WRITE_ZEROES",
    15: "LIFETIME",
    16: "SECURE_ERASE",
    17: "ZONED",
}
_OF_CLASS = {NET: _NET, BLOCK: _BLOCK}


def class_name(number: int) -> str:
    """A device type's name, or `type-N` for one without a name here."""
    return CLASSES.get(number, f"type-{number}")


def class_names(mask: int | None) -> tuple[str, ...]:
    """The classes of a mask in which bit N stands for device type N."""
    return () if mask is None else tuple(class_name(bit) for bit in _bits(mask))


def feature_names(mask: int | None, device_class: int | None) -> tuple[str, ...]:
    """The features of a mask, lowest bit first; `bit-N` where the class gives no name.

    `device_class` is None where several classes are meant: then only the common bits have names.
    """
    if mask is None:
        return ()
    names = {**_COMMON, **_OF_CLASS.get(device_class or 0, {})}
    return tuple(names.get(bit, f"bit-{bit}") for bit in _bits(mask))


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
