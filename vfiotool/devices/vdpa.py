"""vDPA as a host shows it: parents, devices, their configuration (reading), and the requests.

The parents and the configurations are told only by generic netlink (family `vdpa`, version 1,
include/uapi/linux/vdpa.h); a root that is not a running machine shows what sysfs has: the devices
and their drivers. The requests that change something are built here and sent by `change/` alone.

The kernel handles a request under one lock for all of vDPA, which a device whose daemon died can
hold for ever: every question goes through a child with a deadline.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfiotool.devices.virtio_features import BLOCK, NET, class_name, class_names, feature_names
from vfiotool.errors import KernelError, Unsupported, UsageError
from vfiotool.host.host import Host
from vfiotool.host.paths import DEV, SYS_VDPA_DEVICES

if TYPE_CHECKING:
    from vfiotool.netlink.codec import Message, Request

FAMILY = "vdpa"
DRIVERS = ("vhost_vdpa", "virtio_vdpa")

_VERSION = 1
_CMD_MGMTDEV_GET = 2
_CMD_DEV_NEW = 3
_CMD_DEV_DEL = 4
_CMD_DEV_GET = 5
_CMD_DEV_CONFIG_GET = 6
_CMD_DEV_VSTATS_GET = 7
_CMD_DEV_ATTR_SET = 8

_MGMTDEV_BUS_NAME = 1
_MGMTDEV_DEV_NAME = 2
_MGMTDEV_SUPPORTED_CLASSES = 3
_DEV_NAME = 4
_DEV_ID = 5
_DEV_VENDOR_ID = 6
_DEV_MAX_VQS = 7
_DEV_MAX_VQ_SIZE = 8
_DEV_MIN_VQ_SIZE = 9
_NET_MACADDR = 10
_NET_STATUS = 11  # Declared u8, sent as u16 (vdpa_dev_net_status_config_fill).
_NET_MAX_VQP = 12
_NET_MTU = 13
_NEGOTIATED_FEATURES = 14
_MGMTDEV_MAX_VQS = 15
_SUPPORTED_FEATURES = 16
_DEV_QUEUE_INDEX = 17
_VENDOR_ATTR_NAME = 18
_VENDOR_ATTR_VALUE = 19
_DEV_FEATURES = 20
# 21 is the block device's capacity; to a kernel before 6.3 it was a network device's features.
_BLOCK_CAPACITY = 21
_BLOCK_FIELDS = {
    22: "size_max_bytes",
    23: "block_size_bytes",
    24: "seg_max",
    25: "queues",
    26: "physical_block_exponent",
    27: "alignment_offset_blocks",
    28: "min_io_size_blocks",
    29: "opt_io_size_blocks",
    30: "max_discard_sectors",
    31: "max_discard_segments",
    32: "discard_alignment_sectors",
    33: "max_write_zeroes_sectors",
    34: "max_write_zeroes_segments",
    35: "read_only",
    36: "flush",
}
_STATUS_LINK_UP = 1
_STATUS_ANNOUNCE = 2

# A device's name is a sysfs name; the kernel's own limit is the netlink string's.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class VdpaParent:
    """A management device: what vDPA devices can be made on. `bus` is None for a bare device."""

    bus: str | None
    device: str
    classes: tuple[str, ...]
    max_vqs: int | None
    features: tuple[str, ...]

    @property
    def name(self) -> str:
        """As it is written in commands and policies: `vdpasim_net`, `pci/0000:01:00.2`."""
        return f"{self.bus}/{self.device}" if self.bus else self.device


@dataclass(frozen=True, slots=True)
class VdpaSettings:
    """What a network device can be given when it is made; None leaves it to the parent."""

    mac: str | None = None
    mtu: int | None = None
    max_vqp: int | None = None
    features: int | None = None


@dataclass(frozen=True, slots=True)
class VdpaDevice:
    """A vDPA device. What only netlink tells is None on a root that is not a running machine.

    `node` is the character device while it is on vhost_vdpa; `interfaces` are the host's network
    interfaces or disks while it is on virtio_vdpa. `config` holds its virtio configuration: for
    a network device mac, mtu, max_vqp (pairs) and status, for a disk capacity_sectors (of 512
    bytes), block_size_bytes and so on; a field that its features rule out is left out.
    """

    name: str
    parent: str | None
    type: str | None
    vendor: str | None
    max_vqs: int | None
    min_vq_size: int | None
    max_vq_size: int | None
    driver: str | None
    driver_override: str | None
    node: str | None
    interfaces: tuple[str, ...]
    features: tuple[str, ...]
    negotiated_features: tuple[str, ...] | None
    config: dict[str, object] | None


def check_name(name: str) -> str:
    """`name` if it can be a vDPA device's. Raises UsageError for anything else."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(
            f"{name[:80]!r} is not a name for a vDPA device",
            hint="letters, digits and _ . : - only, at most 64, such as vdpa0",
        )
    return name


def parse_parent(text: str) -> tuple[str | None, str]:
    """`pci/0000:01:00.2` -> (`pci`, `0000:01:00.2`). Raises UsageError for hostile names."""
    bus, slash, device = text.partition("/")
    for part in (bus, device) if slash else (text,):
        if not _NAME.fullmatch(part) or ".." in part:
            raise UsageError(
                f"{text[:80]!r} is not a vDPA parent", hint="vfiotool vdpa parents lists them"
            )
    return (bus, device) if slash else (None, text)


def knows_netlink(host: Host) -> bool:
    """Whether the host can be asked over netlink: a running machine, or a fake one that answers."""
    return host.live and host.tree.answers_netlink


def find_family(host: Host) -> int:
    """The family's number. Raises Unsupported, naming the module, if the kernel has no vDPA."""
    from vfiotool.host.family import family_number

    number = family_number(host, FAMILY)
    if number is None:
        raise Unsupported(
            "the running kernel has no vDPA, or its module is not loaded",
            hint="modprobe vdpa; a kernel built without CONFIG_VDPA (Debian 12's 6.1) has none",
            errno_name="ENOENT",
        )
    return number


def _ask(host: Host, family: int, command: int, *attributes: bytes, dump: bool) -> list[Message]:
    from vfiotool.host.family import QUESTION_DEADLINE_S
    from vfiotool.netlink.codec import NETLINK_GENERIC, NLM_F_DUMP, Request, generic

    what = {
        _CMD_MGMTDEV_GET: "list the vDPA parents",
        _CMD_DEV_GET: "list the vDPA devices",
        _CMD_DEV_CONFIG_GET: "read a vDPA device's configuration",
        _CMD_DEV_VSTATS_GET: "read a vDPA device's statistics",
    }[command]
    request = Request(
        NETLINK_GENERIC,
        family,
        generic(command, _VERSION, *attributes),
        NLM_F_DUMP if dump else 0,
        what,
    )
    return host.ask_netlink(request, QUESTION_DEADLINE_S)


def _texts(attributes: dict[int, bytes], kind: int) -> str | None:
    from vfiotool.netlink.codec import as_text

    return as_text(attributes.get(kind))


def _number(attributes: dict[int, bytes], kind: int) -> int | None:
    from vfiotool.netlink.codec import as_int

    return as_int(attributes.get(kind))


def parse_parent_attributes(attributes: dict[int, bytes]) -> VdpaParent | None:
    """A management device from its netlink attributes, None if it has no name."""
    device = _texts(attributes, _MGMTDEV_DEV_NAME)
    if device is None:
        return None
    classes = _number(attributes, _MGMTDEV_SUPPORTED_CLASSES)
    # With several classes a low feature bit has several meanings.
    single = classes.bit_length() - 1 if classes and classes & (classes - 1) == 0 else None
    return VdpaParent(
        bus=_texts(attributes, _MGMTDEV_BUS_NAME),
        device=device,
        classes=class_names(classes),
        max_vqs=_number(attributes, _MGMTDEV_MAX_VQS),
        features=feature_names(_number(attributes, _SUPPORTED_FEATURES), single),
    )


def read_parents(host: Host) -> tuple[VdpaParent, ...]:
    """All management devices, by name; empty where the host cannot be asked over netlink.

    Raises Unsupported if the running kernel has no vDPA, Stuck if it does not answer in time.
    """
    from vfiotool.netlink.codec import parse_generic

    if not knows_netlink(host):
        return ()
    answers = _ask(host, find_family(host), _CMD_MGMTDEV_GET, dump=True)
    found = (parse_parent_attributes(parse_generic(answer)[1]) for answer in answers)
    return tuple(sorted((item for item in found if item), key=lambda item: item.name))


def read_devices(host: Host) -> tuple[VdpaDevice, ...]:
    """All vDPA devices, by name. On a running machine as netlink and sysfs tell them together.

    Raises Unsupported if the running kernel has no vDPA, Stuck if it does not answer in time.
    """
    from vfiotool.netlink.codec import parse_generic

    if not knows_netlink(host):
        return tuple(_sysfs_device(host, name, {}, {}) for name in host.listdir(SYS_VDPA_DEVICES))
    family = find_family(host)
    found = []
    for answer in _ask(host, family, _CMD_DEV_GET, dump=True):
        attributes = parse_generic(answer)[1]
        name = _texts(attributes, _DEV_NAME)
        if name is not None and "/" not in name:
            config = _read_config(host, family, name)
            found.append(_sysfs_device(host, name, attributes, config))
    return tuple(sorted(found, key=lambda device: device.name))


@dataclass(frozen=True, slots=True)
class VdpaQueueCounters:
    """What a device's vendor counts of one virtqueue, by the vendor's names."""

    queue: int
    counters: tuple[tuple[str, int], ...]


def read_counters(host: Host, device: VdpaDevice) -> tuple[VdpaQueueCounters, ...]:
    """The vendor's statistics of every queue that has some.

    Raises Unsupported where its parent counts nothing, KernelError with the kernel's words as long
    as no driver has set it up (EAGAIN), NotPermitted without CAP_NET_ADMIN.
    """
    from vfiotool.netlink.codec import string, u32

    if not knows_netlink(host):
        raise UsageError(f"{host.name} is not the running host", hint="leave out --root")
    family = find_family(host)
    found: list[VdpaQueueCounters] = []
    for index in range(device.max_vqs or 0):
        name, number = string(_DEV_NAME, device.name), u32(_DEV_QUEUE_INDEX, index)
        try:
            answers = _ask(host, family, _CMD_DEV_VSTATS_GET, name, number, dump=False)
        except KernelError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise Unsupported(
                    f"{device.parent} has no statistics of its queues",
                    device=device.name,
                    errno_name=error.errno_name,
                ) from error
            # A queue beyond those that were negotiated.
            if error.errno in (errno.EINVAL, errno.ERANGE) and found:
                break
            raise
        found += [VdpaQueueCounters(index, parse_counters(answer)) for answer in answers]
    return tuple(found)


def parse_counters(answer: Message) -> tuple[tuple[str, int], ...]:
    """Names and values follow one another; the same two attributes repeat."""
    from vfiotool.netlink.codec import as_int, as_text, iterate_attributes

    found, name = [], None
    # A generic message begins with four bytes of its own (genlmsghdr).
    for kind, data in iterate_attributes(answer.payload[4:]):
        if kind == _VENDOR_ATTR_NAME:
            name = as_text(data)
        elif kind == _VENDOR_ATTR_VALUE and name is not None:
            value = as_int(data)
            if value is not None:
                found.append((name, value))
            name = None
    return tuple(found)


def is_usable(host: Host, name: str) -> bool:
    """Whether what a device's driver makes of it is there: the node of vhost_vdpa, the disk or
    interface of virtio_vdpa with its node. From sysfs and /dev alone, so it never blocks."""
    base = f"{SYS_VDPA_DEVICES}/{name}"
    driver = host.linkname(f"{base}/driver")
    children = host.listdir(base)
    if driver == "vhost_vdpa":
        nodes = [child for child in children if child.startswith("vhost-vdpa-")]
        return any(host.exists(f"{DEV}/{node}") for node in nodes)
    if driver != "virtio_vdpa":
        # None makes nothing of it.
        return True
    for child in children:
        if re.fullmatch(r"virtio\d+", child):
            if host.listdir(f"{base}/{child}/net"):
                return True
            return any(
                host.exists(f"{DEV}/{disk}") for disk in host.listdir(f"{base}/{child}/block")
            )
    return False


def read_device_names(host: Host) -> tuple[str, ...]:
    """The names alone, from sysfs: what steps compare, and never blocking."""
    return tuple(host.listdir(SYS_VDPA_DEVICES))


def _read_config(host: Host, family: int, name: str) -> dict[int, bytes]:
    """Empty where the device's class has no configuration in netlink, or it has vanished.

    One question a device: a dump ends at the first device of a class that it cannot describe.
    """
    from vfiotool.netlink.codec import parse_generic, string

    try:
        answers = _ask(host, family, _CMD_DEV_CONFIG_GET, string(_DEV_NAME, name), dump=False)
    except KernelError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENODEV, errno.EMSGSIZE):
            raise
        return {}
    return parse_generic(answers[0])[1] if answers else {}


def _sysfs_device(
    host: Host, name: str, attributes: dict[int, bytes], config: dict[int, bytes]
) -> VdpaDevice:
    base = f"{SYS_VDPA_DEVICES}/{name}"
    override = host.read(f"{base}/driver_override")
    number = _number(attributes, _DEV_ID)
    vendor = _number(attributes, _DEV_VENDOR_ID)
    bus, parent = _texts(attributes, _MGMTDEV_BUS_NAME), _texts(attributes, _MGMTDEV_DEV_NAME)
    negotiated = _number(config, _NEGOTIATED_FEATURES)
    children = host.listdir(base)
    node = next((child for child in children if child.startswith("vhost-vdpa-")), None)
    return VdpaDevice(
        name=name,
        parent=f"{bus}/{parent}" if bus and parent else parent,
        type=None if number is None else class_name(number),
        vendor=None if vendor is None else f"{vendor:08x}",
        max_vqs=_number(attributes, _DEV_MAX_VQS),
        min_vq_size=_number(attributes, _DEV_MIN_VQ_SIZE),
        max_vq_size=_number(attributes, _DEV_MAX_VQ_SIZE),
        driver=host.linkname(f"{base}/driver"),
        driver_override=None if override in (None, "", "(null)") else override,
        node=None if node is None else f"{DEV}/{node}",
        interfaces=_interfaces(host, base, children),
        features=feature_names(_number(config, _DEV_FEATURES), number),
        negotiated_features=None if negotiated is None else feature_names(negotiated, number),
        config=parse_config(number, config),
    )


def _interfaces(host: Host, base: str, children: list[str]) -> tuple[str, ...]:
    """What the host made of a device on virtio_vdpa: `vdpa0/virtio3/{net,block}/NAME`."""
    return tuple(
        name
        for child in children
        if re.fullmatch(r"virtio\d+", child)
        for kind in ("net", "block")
        for name in host.listdir(f"{base}/{child}/{kind}")
    )


def parse_config(number: int | None, attributes: dict[int, bytes]) -> dict[str, object] | None:
    """A device's virtio configuration by field, None if its class has none in netlink."""
    if number == NET and attributes:
        return _net_config(attributes)
    if number == BLOCK and attributes:
        config: dict[str, object] = {"capacity_sectors": _number(attributes, _BLOCK_CAPACITY)}
        for kind, field in _BLOCK_FIELDS.items():
            value = _number(attributes, kind)
            if value is not None:
                config[field] = bool(value) if field in ("read_only", "flush") else value
        return config
    return None


def _net_config(attributes: dict[int, bytes]) -> dict[str, object]:
    config: dict[str, object] = {}
    mac = attributes.get(_NET_MACADDR)
    if mac is not None and len(mac) == 6:
        config["mac"] = mac.hex(":")
    status = _number(attributes, _NET_STATUS)
    if status is not None:
        config["link"] = "up" if status & _STATUS_LINK_UP else "down"
        config["link_announce"] = bool(status & _STATUS_ANNOUNCE)
    for kind, field in ((_NET_MAX_VQP, "max_vqp"), (_NET_MTU, "mtu")):
        value = _number(attributes, kind)
        if value is not None:
            config[field] = value
    return config


def new_request(family: int, name: str, parent: str, settings: VdpaSettings) -> Request:
    """The request that makes device `name` on `parent`. Raises UsageError for bad names, values."""
    from vfiotool.netlink.codec import (
        NETLINK_GENERIC,
        Request,
        attribute,
        generic,
        string,
        u16,
        u64,
    )

    bus, device = parse_parent(parent)
    parts = [string(_DEV_NAME, check_name(name))]
    if bus is not None:
        parts.append(string(_MGMTDEV_BUS_NAME, bus))
    parts.append(string(_MGMTDEV_DEV_NAME, device))
    if settings.mac is not None:
        parts.append(attribute(_NET_MACADDR, parse_mac(settings.mac)))
    if settings.mtu is not None:
        parts.append(u16(_NET_MTU, _checked("mtu", settings.mtu, 0xFFFF)))
    if settings.max_vqp is not None:
        parts.append(u16(_NET_MAX_VQP, _checked("max_vqp", settings.max_vqp, 0xFFFF)))
    if settings.features is not None:
        parts.append(u64(_DEV_FEATURES, _checked("features", settings.features, (1 << 64) - 1)))
    what = f"make vDPA device {name} on {parent}"
    return Request(NETLINK_GENERIC, family, generic(_CMD_DEV_NEW, _VERSION, *parts), what=what)


def delete_request(family: int, name: str) -> Request:
    """The request that removes device `name`. Raises UsageError for a name that is none."""
    from vfiotool.netlink.codec import NETLINK_GENERIC, Request, generic, string

    payload = generic(_CMD_DEV_DEL, _VERSION, string(_DEV_NAME, check_name(name)))
    return Request(NETLINK_GENERIC, family, payload, what=f"remove vDPA device {name}")


def set_mac_request(family: int, name: str, mac: str) -> Request:
    """The request that gives device `name` another MAC address. Raises UsageError."""
    from vfiotool.netlink.codec import NETLINK_GENERIC, Request, attribute, generic, string

    parts = (string(_DEV_NAME, check_name(name)), attribute(_NET_MACADDR, parse_mac(mac)))
    payload = generic(_CMD_DEV_ATTR_SET, _VERSION, *parts)
    return Request(NETLINK_GENERIC, family, payload, what=f"set {name}'s MAC address")


def parse_mac(text: str) -> bytes:
    """`52:54:00:12:34:56` as six bytes. Raises UsageError."""
    if not _MAC.fullmatch(text):
        raise UsageError(f"{text[:40]!r} is not a MAC address", hint="write 52:54:00:12:34:56")
    return bytes.fromhex(text.replace(":", ""))


def _checked(field: str, value: int, most: int) -> int:
    if not 0 < value <= most:
        raise UsageError(f"{field} {value} is not between 1 and {most}")
    return value
