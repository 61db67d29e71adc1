"""Selectors that pick many devices at once: by class, by driver, by IOMMU group.

Each function gives the devices found, in bus order, and the spellings that would find one.
"""

from __future__ import annotations

import re

from vfiotool.devices.pci import Address, list_addresses, read_identity
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_IOMMU_GROUPS

Found = tuple[list[str], set[str]]

# Words for class codes (PCI Code and ID Assignment Specification 1.11, section 1): how a code
# begins. The rest of a class is written in hexadecimal.
CLASSES = {
    "storage": "01",
    "nvme": "0108",
    "sata": "0106",
    "network": "02",
    "ethernet": "0200",
    "display": "03",
    "gpu": "03",
    "vga": "0300",
    "multimedia": "04",
    "audio": "0403",
    "memory": "05",
    "bridge": "06",
    "serial": "0700",
    "usb": "0c03",
    "crypto": "10",
    "accelerator": "12",
}
_CODE = r"(?ai)(0x)?([0-9a-f]{2}|[0-9a-f]{4}|[0-9a-f]{6})"


def class_prefix(text: str) -> str | None:
    """How the class codes that `text` means begin: `gpu` -> `03`, `0x0108` -> `0108`; None if it
    is neither a known word nor 2, 4 or 6 hexadecimal digits."""
    word = CLASSES.get(text.lower())
    if word is not None:
        return word
    match = re.fullmatch(_CODE, text)
    return None if match is None else match[2].lower()


def by_class(host: Host, prefix: str) -> Found:
    """The functions whose class code begins so."""
    found: list[str] = []
    known: set[str] = set()
    for address in list_addresses(host):
        identity = read_identity(host, address)
        code = None if identity is None else identity.class_code
        if code is not None:
            known.add(f"class:{code[:4]}")
            if code.startswith(prefix):
                found.append(address)
    return found, known


def by_driver(host: Host, driver: str) -> Found:
    """The functions on a driver; on none for `none`. A dash is as good as an underscore."""
    found: list[str] = []
    known: set[str] = {"driver:none"}
    wanted = driver.replace("_", "-")
    for address in list_addresses(host):
        identity = read_identity(host, address)
        if identity is None:
            continue
        own = identity.driver or "none"
        known.add(f"driver:{own}")
        if own.replace("_", "-") == wanted:
            found.append(address)
    return found, known


def by_group(host: Host, number: str) -> Found:
    """The PCI functions and mediated devices of an IOMMU group."""
    known = {f"group:{name}" for name in host.listdir(SYS_IOMMU_GROUPS)}
    names = host.listdir(f"{SYS_IOMMU_GROUPS}/{number}/devices") if number.isdecimal() else []
    return sorted(names, key=lambda name: (not Address.is_address(name), name)), known
