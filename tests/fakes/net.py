"""What RTM_SETLINK says of a VF, as the fake kernel understands it (uapi/linux/if_link.h)."""

from __future__ import annotations

import struct
from typing import Any


def vf_values(kind: int, data: bytes) -> dict[str, Any]:
    """The settings in one IFLA_VF_* attribute."""
    if kind == 1:
        return {"mac": data[4:10].hex(":")}
    words = struct.unpack_from(f"={len(data) // 4}I", data)
    if kind == 2:
        return {"vlan": words[1], "qos": words[2]}
    if kind == 6:
        return {"min_rate_mbps": words[1], "max_rate_mbps": words[2]}
    name = {4: "spoof_check", 9: "trust", 5: "link_state"}[kind]
    return {name: words[1] if name == "link_state" else bool(words[1])}
