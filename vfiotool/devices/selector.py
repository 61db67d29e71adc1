"""What an operator may call a device, and the one canonical name that it stands for.

    0000:01:00.0  01:00.0         a PCI address, full or short (domain 0000)
    id:10de:2684                  vendor and device (and :subvendor:subdevice)
    serial:twin-a                 Device Serial Number, VPD's SN, or a drive's serial number
    slot:4  slot:"PCIe Slot 2"    a physical slot, or the firmware's label of the device
    path:0000:00:1c.0/00.0        the way from the root bus, free of bus numbers
    vf:01:00.0/3                  a virtual function by its PF (any selector) and index
    net:eth0  block:nvme0n1p2     the device behind an interface or a disk, through volumes
    class:gpu  class:0108         all of a class: a word (filters.CLASSES) or how its code begins
    driver:igb  driver:none       all on a driver, or on none
    group:12                      all of an IOMMU group
    00:03                         all functions in a slot, as lspci -s takes it
    /dev/nvme0n1                  what a disk's node names; /sys/… a device's directory
    83b8f4f2-509f-382f-3c1e-…     a mediated device's UUID

A selector is never guessed at: what names several devices is an error that lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from vfiotool.devices.filters import CLASSES, by_class, by_driver, by_group, class_prefix
from vfiotool.devices.pci import Address, list_addresses, read_identity
from vfiotool.devices.sriov import read_vfs
from vfiotool.errors import Ambiguous, NotFound, UsageError
from vfiotool.host.host import Host
from vfiotool.host.paths import (
    DEV,
    SYS,
    SYS_BLOCK,
    SYS_IOMMU_GROUPS,
    SYS_MDEV_DEVICES,
    SYS_NET,
    SYS_PCI_DEVICES,
    SYS_PCI_SLOTS,
)

# Compiled by `re` when first used: most commands are given an address.
_UUID = r"(?ai)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_ID = r"(?ai)[0-9a-f]{4}:[0-9a-f]{4}(:[0-9a-f]{4}:[0-9a-f]{4})?"
_STEP = r"(?ai)([01]?[0-9a-f])\.([0-7])"
_SLOT = r"(?ai)([0-9a-f]{4,8}:)?[0-9a-f]{2}:[01][0-9a-f]"
_INDEX = r"(?a)[0-9]{1,5}"
_MAX_SELECTOR = 512
_MAX_LISTED = 16
_MAX_DEPTH = 32


def resolve(host: Host, text: str) -> str:
    """The one device that `text` names: a full PCI address, or a mediated device's UUID.

    Raises UsageError if it is no selector, NotFound if it names nothing here (with the nearest
    that there is as a hint), Ambiguous with the candidates if it names several.
    """
    found = resolve_all(host, text)
    if len(found) == 1:
        return found[0]
    listed = ", ".join(found[:_MAX_LISTED])
    more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
    raise Ambiguous(
        f"{_shown(text)} names {len(found)} devices: {listed}{more}",
        hint=f"name one of them by its address, or by its path: path:{path_of(host, found[0])}",
    )


def resolve_all(host: Host, text: str) -> list[str]:
    """All devices that `text` names, in bus order; at least one. Raises as `resolve` does."""
    return _match(host, text, 0)


def path_of(host: Host, address: str) -> str:
    """The way to a function from the root bus, as `path:` takes it: `0000:00:1c.0/00.0`.

    It stays the same when bus numbers change, as long as the card stays in its slot. For what is
    no PCI function, its name.
    """
    chain = _chain(host, address)
    return "/".join([*chain[:1], *(name.rpartition(":")[2] for name in chain[1:])]) or address


def _match(host: Host, text: str, depth: int) -> list[str]:
    if len(text) > _MAX_SELECTOR or not text.isprintable() or depth > _MAX_DEPTH:
        raise _malformed(text)
    if Address.is_address(text):
        return _address(host, text)
    if re.fullmatch(_UUID, text):
        return _mdev(host, text)
    kind, colon, rest = text.partition(":")
    if kind == "vf" and rest:
        return _vf(host, text, rest, depth)
    matcher = _MATCHERS.get(kind) if colon and rest else None
    if matcher is not None:
        return matcher(host, text, rest)
    if re.fullmatch(_SLOT, text):
        return _functions_in(host, text)
    if text.startswith(f"{DEV}/"):
        return _by_block(host, text, text)
    if text.startswith(f"{SYS}/"):
        return _by_sysfs(host, text)
    if "/" in text:
        return _path(host, text, text)
    raise _malformed(text, _suggestion(host, text))


def _shown(text: str) -> str:
    return text if text and len(text) <= 80 and text.isprintable() else ascii(text[:80])


def _malformed(text: str, hint: str | None = None) -> UsageError:
    return UsageError(
        f"{_shown(text)} is not a device selector",
        hint=hint
        or "write 0000:05:01.0, 05:01.0, id:10de:2684, serial:…, slot:…, path:00:1c.0/00.0, "
        "vf:01:00.0/3, net:eth0, block:nvme0n1, class:gpu, driver:igb, group:12 or an mdev's UUID",
    )


def _suggestion(host: Host, text: str) -> str | None:
    """The selector that was probably meant by a bare name."""
    for kind, folder in (("net", SYS_NET), ("block", SYS_BLOCK)):
        if text in host.listdir(folder):
            return f"did you mean {kind}:{text}?"
    if text.isdecimal() and text in host.listdir(SYS_IOMMU_GROUPS):
        return f"did you mean group:{text}?"
    kind, colon, rest = text.partition(":")
    if colon and len(text) <= 80 and kind != kind.lower() and kind.lower() in _MATCHERS:
        return f"did you mean {kind.lower()}:{rest}?"
    return f"did you mean id:{text}?" if re.fullmatch(_ID, text) else None


def _none(text: str, known: Iterable[str], listing: str = "vfiotool devices") -> NotFound:
    import difflib

    near = difflib.get_close_matches(text, list(known), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return NotFound(
        f"no device {_shown(text)} on this host", hint=f"{hint}{listing} lists them", device=text
    )


def _address(host: Host, text: str) -> list[str]:
    wanted = str(Address.parse(text))
    if host.exists(f"{SYS_PCI_DEVICES}/{wanted}"):
        return [wanted]
    known = list_addresses(host)
    place = wanted.partition(":")[2]
    elsewhere = [name for name in known if name.partition(":")[2] == place]
    if elsewhere:
        raise NotFound(
            f"no device {wanted} on this host",
            hint=f"did you mean {' or '.join(elsewhere[:_MAX_LISTED])}, in another domain?",
            device=wanted,
        )
    raise _none(wanted, known)


def _functions_in(host: Host, text: str) -> list[str]:
    place = text.lower() if text.count(":") == 2 else f"0000:{text.lower()}"
    known = list_addresses(host)
    found = [name for name in known if name.rpartition(".")[0] == place]
    if not found:
        raise _none(text, sorted({name.rpartition(".")[0] for name in known}))
    return found


def _by_sysfs(host: Host, text: str) -> list[str]:
    owner = _owner(host, host.realpath(text.rstrip("/")))
    if owner is None:
        raise _none(text, ())
    return [owner]


def _by_class(host: Host, text: str, wanted: str) -> list[str]:
    prefix = class_prefix(wanted)
    if prefix is None:
        raise _malformed(
            text, f"write class:03, class:0300, or one of {', '.join(sorted(CLASSES))}"
        )
    found, known = by_class(host, prefix)
    if not found:
        raise _none(text, sorted(known))
    return found


def _by_driver(host: Host, text: str, wanted: str) -> list[str]:
    found, known = by_driver(host, wanted)
    if not found:
        raise _none(text, sorted(known))
    return found


def _by_group(host: Host, text: str, wanted: str) -> list[str]:
    found, known = by_group(host, wanted)
    if not found:
        raise _none(text, sorted(known), "vfiotool groups")
    return found


def _mdev(host: Host, text: str) -> list[str]:
    wanted = text.lower()
    # The kernel keeps the case in which an instance was created (lib/uuid.c: names are text).
    for name in host.listdir(SYS_MDEV_DEVICES):
        if name.lower() == wanted:
            return [name]
    raise _none(wanted, host.listdir(SYS_MDEV_DEVICES), "vfiotool mdev list")


def _by_id(host: Host, text: str, wanted: str) -> list[str]:
    if not re.fullmatch(_ID, wanted):
        raise _malformed(text, "write id:VENDOR:DEVICE, four hexadecimal digits each")
    found: list[str] = []
    known: set[str] = set()
    for address in list_addresses(host):
        identity = read_identity(host, address)
        if identity is None:
            continue
        pair = f"{identity.vendor}:{identity.device}"
        whole = f"{pair}:{identity.subsystem_vendor}:{identity.subsystem_device}"
        known.add(f"id:{pair}")
        if wanted.lower() in (pair, whole):
            found.append(address)
    if not found:
        raise _none(text.lower(), sorted(known))
    return found


def _by_serial(host: Host, text: str, wanted: str) -> list[str]:
    from vfiotool.devices.serial import same_serial, serials_of

    found = [
        address
        for address in list_addresses(host)
        if any(same_serial(serial, wanted) for serial in serials_of(host, address))
    ]
    if not found:
        # Never the nearest one: what is like it is another device, maybe one in use.
        raise NotFound(
            f"no device {_shown(text)} shows that serial number on this host",
            hint="a disk's own number shows only while the host's driver has the disk; "
            "vfiotool devices lists them",
            device=text,
        )
    return found


def _by_slot(host: Host, text: str, wanted: str) -> list[str]:
    slots = host.listdir(SYS_PCI_SLOTS)
    addresses = list_addresses(host)
    if wanted in slots:
        place = host.read(f"{SYS_PCI_SLOTS}/{wanted}/address") or ""
        found = [name for name in addresses if place and _is_in_slot(name, place)]
        if not found:
            raise NotFound(f"the slot {wanted} is empty", hint="vfiotool devices lists them all")
        return found
    labels = {name: host.read(f"{SYS_PCI_DEVICES}/{name}/label") for name in addresses}
    found = [name for name, label in labels.items() if label == wanted]
    if not found:
        known = [f"slot:{name}" for name in (*slots, *filter(None, labels.values()))]
        raise _none(text, known)
    return found


def _is_in_slot(address: str, place: str) -> bool:
    # A slot's address is `domain:bus:device`, or `domain:bus` where a bus has one slot only
    # (drivers/pci/slot.c, address_read_file).
    return address.rpartition(".")[0] == place or address.rpartition(":")[0] == place


def _path(host: Host, text: str, wanted: str) -> list[str]:
    steps = wanted.strip("/").split("/")
    if not all(Address.is_address(step) or re.fullmatch(_STEP, step) for step in steps):
        raise _malformed(text, "write path:0000:00:1c.0/00.0: the bridges, then the device")
    known = list_addresses(host)
    found = [name for name in known if _leads(_chain(host, name), steps)]
    if not found:
        raise _none(text, (f"path:{path_of(host, name)}" for name in known))
    return found


def _leads(chain: list[str], steps: list[str]) -> bool:
    if len(chain) != len(steps):
        return False
    for name, step in zip(chain, steps, strict=True):
        match = re.fullmatch(_STEP, step)
        if match is None:
            if str(Address.parse(step)) != name:
                return False
        elif name.rpartition(":")[2] != f"{int(match[1], 16):02x}.{match[2]}":
            return False
    return True


def _chain(host: Host, address: str) -> list[str]:
    """The addresses of the bridges above a function, from the root bus, and its own."""
    path = host.realpath(f"{SYS_PCI_DEVICES}/{address}") or ""
    return [part for part in path.split("/") if Address.is_address(part)]


def _vf(host: Host, text: str, rest: str, depth: int) -> list[str]:
    pf_text, slash, number = rest.rpartition("/")
    if not slash or not pf_text or not re.fullmatch(_INDEX, number):
        raise _malformed(text, "write vf:PF/INDEX, such as vf:0000:01:00.0/3")
    pfs = _match(host, pf_text, depth + 1)
    vfs = {pf: read_vfs(host, pf) for pf in pfs}
    found = [vf.address for pf in pfs for vf in vfs[pf] if vf.index == int(number)]
    if not found:
        count = sum(len(known) for known in vfs.values())
        raise NotFound(
            f"no VF {number} of {', '.join(pfs[:_MAX_LISTED])}: it has {count or 'none'} enabled",
            hint=f"vfiotool vf list {pfs[0]}",
            device=pfs[0],
        )
    return found


def _by_net(host: Host, text: str, name: str) -> list[str]:
    if "/" in name or name not in host.listdir(SYS_NET):
        raise _none(text, (f"net:{known}" for known in host.listdir(SYS_NET)), "ip link")
    owner = _owner(host, host.realpath(f"{SYS_NET}/{name}"))
    if owner is not None:
        return [owner]
    below = [
        entry.removeprefix("lower_")
        for entry in host.listdir(f"{SYS_NET}/{name}")
        if entry.startswith("lower_")
    ]
    owners = {_owner(host, host.realpath(f"{SYS_NET}/{lower}")) for lower in below}
    return _in_bus_order(text, name, {owner for owner in owners if owner is not None})


def _by_block(host: Host, text: str, name: str) -> list[str]:
    # The kernel writes `!` for a slash in a disk's name (cciss!c0d0).
    kernel_name = name.removeprefix(f"{DEV}/").replace("/", "!")
    if kernel_name not in host.listdir(SYS_BLOCK):
        raise _none(text, (f"block:{known}" for known in host.listdir(SYS_BLOCK)), "lsblk")
    owners: set[str] = set()
    pending, seen = [kernel_name], set[str]()
    while pending:
        disk = pending.pop()
        if disk in seen:
            continue
        seen.add(disk)
        path = host.realpath(f"{SYS_BLOCK}/{disk}")
        owner = _owner(host, path)
        if owner is not None:
            owners.add(owner)
            continue
        owners |= _controllers(host, path)
        pending += host.listdir(f"{SYS_BLOCK}/{disk}/slaves")
    return _in_bus_order(text, name, owners)


def _controllers(host: Host, path: str | None) -> set[str]:
    """The functions below an NVMe subsystem: with native multipath a disk hangs there."""
    parts = (path or "").split("/")
    heads = [index for index, part in enumerate(parts) if part.startswith("nvme-subsys")]
    if not heads:
        return set()
    folder = "/".join(parts[: heads[-1] + 1])
    links = (f"{folder}/{name}" for name in host.listdir(folder) if name.startswith("nvme"))
    owners = (_owner(host, host.realpath(link)) for link in links if host.readlink(link))
    return {owner for owner in owners if owner is not None}


def _owner(host: Host, path: str | None) -> str | None:
    """The innermost PCI function or mediated device on a path below `/sys/devices`."""
    for part in reversed((path or "").split("/")):
        if Address.is_address(part) and host.exists(f"{SYS_PCI_DEVICES}/{part}"):
            return part
        if re.fullmatch(_UUID, part) and host.exists(f"{SYS_MDEV_DEVICES}/{part}"):
            return part
    return None


def _in_bus_order(text: str, name: str, owners: set[str]) -> list[str]:
    if not owners:
        raise NotFound(
            f"{_shown(text)}: {name} is on no PCI function or mediated device",
            hint="vfiotool devices lists the PCI functions",
        )
    return sorted(owners, key=lambda one: (not Address.is_address(one), *_sort_key(one)))


def _sort_key(name: str) -> tuple[object, ...]:
    return Address.parse(name) if Address.is_address(name) else (name,)


_MATCHERS: dict[str, Callable[[Host, str, str], list[str]]] = {
    "id": _by_id,
    "serial": _by_serial,
    "slot": _by_slot,
    "path": _path,
    "class": _by_class,
    "driver": _by_driver,
    "group": _by_group,
    "net": _by_net,
    "block": _by_block,
    "mdev": lambda host, _, uuid: _mdev(host, uuid),
}
