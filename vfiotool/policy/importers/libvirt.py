"""libvirt's XML: `<hostdev>` and `<interface type='hostdev'>` of domains, node devices, networks.

Sources: libvirt's formatdomain, formatnode and formatnetwork. The text comes from anywhere, so
the parser is expat with document types and entities refused: no expansion, no outside references.
"""

from __future__ import annotations

import re
from typing import NoReturn
from xml.etree import ElementTree
from xml.parsers import expat

from vfiotool.devices.iommu import is_vfio_driver
from vfiotool.devices.pci import Address
from vfiotool.errors import UsageError
from vfiotool.policy.importers.rules import (
    Findings,
    Rule,
    Value,
    attribute_pair,
    check_name,
    parent_name,
    uuid_name,
)

_DEEPEST = 64
_WRAPPER = "documents"


def parse_xml(text: str, where: str) -> ElementTree.Element:
    """The document's root. Raises UsageError for broken XML, a document type or an entity."""
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    depth = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            raise UsageError(f"{where}: XML nested deeper than {_DEEPEST} levels is refused")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> NoReturn:
        raise UsageError(
            f"{where}: XML with a document type or entities is refused",
            hint="libvirt writes none: take the text from virsh dumpxml or virsh nodedev-dumpxml",
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.ExternalEntityRefHandler = refuse
    try:
        parser.Parse(text.encode("utf-8", "replace"), True)
    except expat.ExpatError as error:
        raise UsageError(f"{where}: not well-formed XML: {error}") from error
    return builder.close()


def import_libvirt(text: str, where: str) -> Findings:
    """From one XML document, whatever its root."""
    found = Findings()
    for root in _documents(text, where):
        _document(found, root, where)
    return found


def _documents(text: str, where: str) -> list[ElementTree.Element]:
    """The roots of one document or of several after each other, as virsh prints them in a loop."""
    try:
        return [parse_xml(text, where)]
    except UsageError as error:
        # expat's own words for a second root.
        if "junk after document element" not in error.message:
            raise
    bare = re.sub(r"<\?xml[^?]*\?>", "", text)
    return list(parse_xml(f"<{_WRAPPER}>{bare}</{_WRAPPER}>", where))


def _document(found: Findings, root: ElementTree.Element, where: str) -> None:
    if root.tag == "device":
        _node_device(found, root, where)
        return
    if root.tag == "network":
        _network(found, root, where)
        return
    before = len(found.rules) + len(found.leftovers)
    for element in root.iter():
        if element.tag == "hostdev":
            _hostdev(found, element, where)
        elif element.tag == "interface" and element.get("type") in ("hostdev", "vdpa", "network"):
            _interface(found, element, where)
        elif element.tag == "disk" and element.get("type") == "nvme":
            _nvme_disk(found, element, where)
    if len(found.rules) + len(found.leftovers) == before:
        found.leave(where, f"<{root.tag}>", "holds no <hostdev> and no <interface type='hostdev'>")


def _nvme_disk(found: Findings, element: ElementTree.Element, where: str) -> None:
    """`<disk type='nvme'>`: QEMU drives the controller itself, through VFIO."""
    source = element.find("source")
    address = None if source is None else _address(source.find("address"))
    if source is None or address is None:
        found.leave(where, "<disk type='nvme'>", "without a PCI address that could be read")
        return
    found.device(where, {"address": address}, "vfio-pci")
    _managed(found, source, address, where)
    if source.get("namespace"):
        what = f"namespace {source.get('namespace')} of {address}"
        found.leave(where, what, "belongs to the virtual machine, not to the host")


def _number(text: str | None) -> int | None:
    try:
        return None if text is None else int(text, 0)
    except ValueError:
        return None


def _address(element: ElementTree.Element | None) -> str | None:
    """From `<address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>`."""
    if element is None or element.get("type", "pci") != "pci":
        return None
    parts = [_number(element.get(key, "0")) for key in ("domain", "bus", "slot", "function")]
    return _checked(parts)


def _checked(parts: list[int | None]) -> str | None:
    limits = (1 << 32, 256, 32, 8)
    numbers = [
        part
        for part, limit in zip(parts, limits, strict=True)
        if part is not None and 0 <= part < limit
    ]
    return str(Address(*numbers)) if len(numbers) == 4 else None


def _text(element: ElementTree.Element, path: str) -> str | None:
    text = element.findtext(path)
    return text.strip() if text else None


def _hostdev(found: Findings, element: ElementTree.Element, where: str) -> None:
    kind = element.get("type")
    source = element.find("source/address")
    if element.get("mode") != "subsystem" or kind not in ("pci", "mdev"):
        what = f"<hostdev mode='{element.get('mode')}' type='{kind}'>"
        found.leave(where, what, "not a PCI or mediated device")
        return
    if kind == "mdev":
        uuid = source.get("uuid", "") if source is not None else ""
        check_name(where, uuid)
        why = "its parent and type stand in the node device's XML: virsh nodedev-dumpxml mdev_…"
        found.leave(where, f"mdev {uuid}", why)
        return
    _pci(found, element, source, where)


def _pci(
    found: Findings,
    element: ElementTree.Element,
    source: ElementTree.Element | None,
    where: str,
) -> None:
    address = _address(source)
    if address is None:
        found.leave(where, f"<{element.tag}>", "without a PCI address that could be read")
        return
    driver = element.find("driver")
    model = (driver.get("model") if driver is not None else None) or "vfio-pci"
    check_name(where, model)
    if driver is not None and driver.get("name") not in (None, "vfio"):
        found.leave(where, address, f"for the hypervisor driver {driver.get('name')}, not VFIO")
        return
    found.device(where, {"address": address}, model)
    _managed(found, element, address, where)
    if driver is not None and driver.get("iommufd") is not None:
        what = f"iommufd='{driver.get('iommufd')}' of {address}"
        found.leave(where, what, _belongs("iommufd"))
    if element.find("address/zpci") is not None:
        found.leave(where, f"<zpci> of {address}", _belongs("zpci"))
    for tag in ("rom", "boot", "teaming", "mac", "vlan", "virtualport", "bandwidth"):
        if element.find(tag) is not None:
            found.leave(where, f"<{tag}> of {address}", _belongs(tag))


def _managed(found: Findings, element: ElementTree.Element, address: str, where: str) -> None:
    if element.get("managed") == "yes":
        found.leave(
            where,
            f"managed='yes' of {address}",
            "libvirt would bind and give back the device itself: set managed='no' in the domain",
        )


def _belongs(tag: str) -> str:
    if tag in ("mac", "vlan"):
        return "set on the VF through its PF: write it into the vf list of [[sriov]]"
    return "belongs to the virtual machine, not to the host"


def _interface(found: Findings, element: ElementTree.Element, where: str) -> None:
    if element.get("type") == "network":
        named = element.find("source")
        network = named.get("network", "") if named is not None else ""
        why = "a network by name; if it hands out VFs, import virsh net-dumpxml of it too"
        found.leave(where, f"<interface type='network'> of {network}", why)
        return
    if element.get("type") == "vdpa":
        source = element.find("source")
        path = source.get("dev", "") if source is not None else ""
        found.leave(where, path, "a character device; its vDPA parent is not in the XML: [[vdpa]]")
        return
    _pci(found, element, element.find("source/address"), where)


def _network(found: Findings, root: ElementTree.Element, where: str) -> None:
    forward = root.find("forward")
    if forward is None or forward.get("mode") != "hostdev":
        found.leave(where, "<network>", "without <forward mode='hostdev'>")
        return
    for pf in forward.findall("pf"):
        found.leave(where, f"pf {pf.get('dev')}", "an interface's name; policies want its address")
    for element in forward.findall("address"):
        address = _address(element)
        if address is not None:
            found.device(where, {"address": address}, "vfio-pci")
    if forward.get("managed") == "yes":
        found.leave(where, "managed='yes'", "libvirt would bind the VFs itself: set managed='no'")


def _node_device(found: Findings, root: ElementTree.Element, where: str) -> None:
    name = _text(root, "name") or "<device>"
    for capability in root.findall("capability"):
        if capability.get("type") == "pci":
            _node_pci(found, root, capability, where)
        elif capability.get("type") == "mdev":
            _node_mdev(found, root, capability, where)
        else:
            found.leave(where, name, f"a device of the kind {capability.get('type')}")


def _node_pci(
    found: Findings, root: ElementTree.Element, capability: ElementTree.Element, where: str
) -> None:
    # In a node device these are decimal numbers, unlike in a domain.
    parts = [_number(_text(capability, key)) for key in ("domain", "bus", "slot", "function")]
    address = _checked(parts)
    if address is None:
        found.leave(where, _text(root, "name") or "<device>", "without a PCI address")
        return
    functions = next(
        (item for item in capability.findall("capability") if item.get("type") == "virt_functions"),
        None,
    )
    count = 0 if functions is None else len(functions.findall("address"))
    if count:
        found.add(Rule("sriov", {"match": {"address": address}, "vfs": count}, where))
    driver = _text(root, "driver/name")
    if driver is not None and is_vfio_driver(driver):
        found.device(where, {"address": address}, driver)
    elif not count:
        found.leave(where, address, f"on {driver or 'no driver'}: nothing of VFIO to carry over")


def _node_mdev(
    found: Findings, root: ElementTree.Element, capability: ElementTree.Element, where: str
) -> None:
    name = _text(root, "name") or "<device>"
    kind = capability.find("type")
    given = _text(capability, "uuid") or name.removeprefix("mdev_").replace("_", "-")[:36]
    uuid = uuid_name(where, given)
    parent = _text(capability, "parent_addr") or _parent(_text(root, "parent") or "")
    type_name = parent_name(where, kind.get("id", "")) if kind is not None else None
    if uuid is None or type_name is None or not parent or parent_name(where, parent) is None:
        found.leave(where, name, "without UUID, type and parent a policy cannot make it")
        return
    values: dict[str, Value] = {"parent": parent, "type": type_name, "uuid": uuid}
    attributes: list[Value] = []
    for item in capability.findall("attr"):
        pair, why = attribute_pair(where, item.get("name", ""), item.get("value", ""))
        if pair is None:
            found.leave(where, f"{uuid}: attribute {item.get('name')}", why)
            return
        attributes.append(pair)
    if attributes:
        values["attrs"] = attributes
    if _text(capability, "start") == "manual":
        found.leave(where, uuid, "started by hand; the policy makes it whenever it is applied")
    found.add(Rule("mdev", values, where))


def _parent(name: str) -> str | None:
    """The kernel's name of a parent, which libvirt writes as `SUBSYSTEM_NAME` with underscores.

    `pci_0000_06_00_0` -> `0000:06:00.0`, `css_0_0_0052` -> `0.0.0052`, `mtty_mtty` -> `mtty`;
    None where the underscores may have stood for something else.
    """
    kind, _, rest = name.partition("_")
    parts = rest.split("_")
    if kind == "pci" and len(parts) == 4:
        return f"{parts[0]}:{parts[1]}:{parts[2]}.{parts[3]}"
    if kind == "css" and len(parts) == 3:
        return ".".join(parts)
    return rest if name == "ap_matrix" or (rest == kind and rest) else None
