"""Attributes of mediated devices that cannot be read back as they are written.

An AP matrix is filled by writing `assign_adapter` and so on, and read from `matrix` and
`control_domains` (Documentation/arch/s390/vfio-ap.rst, drivers/s390/crypto/vfio_ap_ops.c).
"""

from __future__ import annotations

from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_MDEV_DEVICES

_ADAPTER, _DOMAIN, _CONTROL = "assign_adapter", "assign_domain", "assign_control_domain"
# Read as they are written: what a vGPU was given (NVIDIA's vGPU software, vgpu_params).
_READABLE = ("nvidia/vgpu_params",)


def parse_matrix(matrix: str, control: str) -> tuple[tuple[str, str], ...]:
    """The pairs that make an AP matrix again, from its `matrix` and `control_domains`.

    `matrix` holds a line `05.00ab` for each adapter with each domain, `05.` or `.00ab` while it
    has the one and not the other. Lines of another form are passed over.
    """
    adapters: dict[int, None] = {}
    domains: dict[int, None] = {}
    for line in matrix.split():
        first, dot, second = line.partition(".")
        try:
            adapter = int(first, 16) if first else None
            domain = int(second, 16) if second else None
        except ValueError:
            continue
        if dot and adapter is not None:
            adapters[adapter] = None
        if dot and domain is not None:
            domains[domain] = None
    rows = [(_ADAPTER, f"{number:#04x}") for number in adapters]
    rows += [(_DOMAIN, f"{number:#06x}") for number in domains]
    numbers = (word for word in control.split() if all(c in "0123456789abcdefABCDEF" for c in word))
    rows += [(_CONTROL, f"{int(word, 16):#06x}") for word in numbers]
    return tuple(rows)


def read_matrix(host: Host, uuid: str) -> tuple[tuple[str, str], ...] | None:
    """The pairs of an AP matrix; None for an mdev that is none."""
    base = f"{SYS_MDEV_DEVICES}/{uuid}"
    matrix = host.read(f"{base}/matrix")
    if matrix is None:
        return None
    return parse_matrix(matrix, host.read(f"{base}/control_domains") or "")


def read_standing_attributes(host: Host, uuid: str) -> tuple[tuple[str, str], ...]:
    """All attributes of an mdev that a policy has to give for it to be made alike."""
    pairs = list(read_matrix(host, uuid) or ())
    for name in _READABLE:
        text = host.read(f"{SYS_MDEV_DEVICES}/{uuid}/{name}")
        if text and text.isprintable():
            pairs.append((name, text))
    return tuple(pairs)


def same_assignment(name: str, value: str, held: tuple[tuple[str, str], ...]) -> bool:
    """Whether an AP matrix has what this write would assign. Numbers count, not their form."""
    return any(known == name and _number(text) == _number(value) for known, text in held)


def _number(text: str) -> int | str:
    try:
        return int(text, 0)
    except ValueError:
        return text
