"""Will the device work in a guest, and a second time: BARs, vectors, reset, power, its siblings.

Sources: drivers/pci/pci.c (pci_reset_fn_methods, pci_parent_bus_reset), drivers/vfio/pci/
vfio_pci_core.c (hot reset, disable_idle_d3); QEMU: hw/vfio/pci.c, hw/vfio/igd.c,
docs/igd-assign.txt; PCI Express Base Specification 6.0, 7.8.6 (resizable BARs).
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence

from vfiotool.devices.pci import PciFunction
from vfiotool.host.paths import (
    PROC_IOMEM,
    SYS_DEBUG_VFIO,
    SYS_MDEV_DEVICES,
    SYS_NET,
    SYS_PCI_DEVICES,
)
from vfiotool.vm.facts import ReadyCheck
from vfiotool.vm.finding import (
    BLOCKER,
    NOTE,
    WARNING,
    PreflightFinding,
    WantedGuest,
    finding,
    words_of,
)
from vfiotool.vm.machine import GuestMachine

# What a q35 guest's firmware has below 4 GiB for 32-bit BARs, and an older OVMF above it.
_WINDOW_32 = 512 << 20
_WINDOW_64 = 32 << 30
# AMD cards that a bus reset does not bring back: Polaris, Vega, Navi 10 to 14 (the list of the
# module vendor-reset; Documentation/PCI has none).
_BAD_RESET = tuple(
    range(first, last + 1)
    for first, last in (
        (0x67C0, 0x67DF),
        (0x67E0, 0x67FF),
        (0x6980, 0x699F),
        (0x6FDF, 0x6FDF),
        (0x6860, 0x687F),
        (0x69A0, 0x69AF),
        (0x66A0, 0x66AF),
        (0x7310, 0x731F),
        (0x7340, 0x734F),
    )
)
# Variant drivers that can save and load a device's state.
_MIGRATING = (
    "mlx5_vfio_pci",
    "hisi_acc_vfio_pci",
    "pds_vfio_pci",
    "qat_vfio_pci",
    "virtio_vfio_pci",
    "xe-vfio-pci",
)


def judge_card(
    check: ReadyCheck, chosen: Collection[str], wanted: WantedGuest, guest: GuestMachine
) -> list[PreflightFinding]:
    """What is said of one device; `chosen` names all that go to the same virtual machine."""
    if not check.device.through_vfio:
        return _served(check, wanted)
    found = []
    if check.device.function is not None:
        function = check.device.function
        found += _reset(check, function, chosen)
        found += _power(function)
        if guest.kind == "q35":
            found += _bars(check, function, wanted)
        found += _vectors(check, wanted)
        found += _rom(function)
        found += _graphics(function, wanted)
        found += _other_functions(check, chosen)
        found += _returning(check, chosen)
        found += _interface(check)
    found += _migration(check)
    return found


def _served(check: ReadyCheck, wanted: WantedGuest) -> list[PreflightFinding]:
    """A vDPA device or a socket: whether it is there, and that the memory must be shared."""
    device, found = check.device, []
    if not check.exists:
        if device.model == "vdpa":
            detail = "it has no vhost-vdpa node: it is not on vhost_vdpa"
            remedy = f"vfiotool vdpa bind {shlex.quote(device.name)} vhost_vdpa"
            found.append(finding(device.name, "no-node", BLOCKER, detail, device.name, remedy))
        else:
            detail = f"there is no socket {device.path}: nothing serves it"
            remedy = {
                "vhost-user-blk": "vfiotool serve vhost-user-blk --socket-path "
                + shlex.quote(device.path),
            }.get(device.model, "start the program that serves it")
            found.append(finding(device.name, "no-socket", BLOCKER, detail, device.path, remedy))
    share = {
        "libvirt": "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
        "cloud-hypervisor": "--memory size=…,shared=on",
    }.get(wanted.hypervisor)
    share = share or "-object memory-backend-memfd,id=vfiotool-mem,size=…,share=on"
    detail = "its memory has to be shared: with private memory its queues carry nothing"
    found.append(
        finding(device.name, "shared-memory", NOTE, detail, f"{device.model} {device.path}", share)
    )
    return found


def _interface(check: ReadyCheck) -> list[PreflightFinding]:
    """A VF asks its PF for its address and its link; one that is down does not answer."""
    if not check.interfaces_down:
        return []
    name = check.interfaces_down[0]
    detail = (
        f"its PF's interface {name} is down: the VM's has no link, and makes up a MAC address in "
        "place of the one that was set"
    )
    evidence = f"{SYS_NET}/{name}/flags: not up"
    return [
        finding(
            check.device.name,
            "pf-down",
            WARNING,
            detail,
            evidence,
            f"ip link set {shlex.quote(name)} up",
        )
    ]


def _reset(
    check: ReadyCheck, function: PciFunction, chosen: Collection[str]
) -> list[PreflightFinding]:
    """The verdict before the first start: works once and not twice, or again and again."""
    name, methods = function.address, function.reset_methods
    evidence = f"{SYS_PCI_DEVICES}/{name}/reset_method: {' '.join(methods) or 'none'}"
    if methods == ("bus",) and function.vendor == "1002" and _resets_badly(function):
        detail = (
            "works once, not twice: its only reset is that of the bus, which this family of "
            "AMD cards does not survive; a second start finds it dead until the host reboots"
        )
        lines = ("modprobe vendor-reset", f"echo device_specific > {_method_path(name)}")
        return [finding(name, "reset", WARNING, detail, evidence, *lines)]
    if methods == ("pm",):
        detail = "its only reset is through D3hot, which need not clear everything"
        return [finding(name, "reset", NOTE, detail, evidence)]
    alone = "/" not in function.path.partition("/pci")[2].partition("/")[2]
    # The kernel finds out when it comes upon a function, before it has seen those behind it on the
    # bus: function 0 keeps a reset of the bus that is refused ever after (pci_init_reset_methods).
    refused = methods == ("bus",) and bool(check.bus) and not alone
    if methods and not refused:
        return []
    if not refused and check.case is not None and not check.case.no_reset:
        return []
    others = [other for other in check.bus if other.address not in chosen]
    if not check.bus or alone:
        detail = (
            "works once, not twice: the kernel has no way to reset it, so that the next VM finds "
            "it as this one left it; a second start may need a reboot of the host"
        )
        return [finding(name, "reset", WARNING, detail, evidence, "reboot between two starts")]
    return [_reset_with_bus(function, others, evidence)]


def _reset_with_bus(
    function: PciFunction, others: Sequence[PciFunction], evidence: str
) -> PreflightFinding:
    """`others` are the functions on its bus that the VM does not have.

    vfio-pci resets a bus all of whose functions it has: when the last of them is closed, and when
    who asks has the groups of all (vfio_pci_dev_set_try_reset, vfio_pci_dev_set_hot_reset).
    """
    name = function.address
    told = ", ".join(other.address for other in others)
    remedy = f"vfiotool vm check {' '.join([name, *(other.address for other in others)])}"
    if any(not other.on_vfio for other in others):
        free = [other.address for other in others if not other.on_vfio]
        detail = (
            "works once, not twice: it can only be reset with its bus, whose other functions are "
            f"neither given to the same VM nor on a VFIO driver: {', '.join(free)}"
        )
        binds = (f"vfiotool bind {' '.join(free)}",)
        return finding(name, "reset", WARNING, detail, evidence, remedy, *binds, number=len(free))
    if any(other.iommu_group != function.iommu_group for other in others):
        detail = (
            "it is reset with its bus when its VM ends, as long as nobody else has the bus's "
            f"other functions ({told}); not when the guest reboots"
        )
        return finding(name, "reset", NOTE, detail, evidence, remedy, number=len(others))
    detail = "it is reset with its bus, whose functions this VM has all"
    if others:
        detail = f"it is reset with its bus, whose other functions are in its group: {told}"
    return finding(name, "reset", NOTE, detail, evidence)


def _method_path(name: str) -> str:
    return f"{SYS_PCI_DEVICES}/{name}/reset_method"


def _resets_badly(function: PciFunction) -> bool:
    number = int(function.device or "0", 16)
    return any(number in ids for ids in _BAD_RESET)


def _power(function: PciFunction) -> list[PreflightFinding]:
    if function.power_state != "D3cold":
        return []
    base = f"{SYS_PCI_DEVICES}/{function.address}"
    detail = "it is without power (D3cold): one that does not wake reads all ones in the guest"
    remedy = (
        f"echo 0 > {base}/d3cold_allowed",
        f"echo on > {base}/power/control",
        "in /etc/modprobe.d/vfio.conf: options vfio-pci disable_idle_d3=1",
    )
    evidence = f"{base}/power_state is D3cold"
    return [finding(function.address, "d3cold", WARNING, detail, evidence, *remedy)]


def _bars(check: ReadyCheck, function: PciFunction, wanted: WantedGuest) -> list[PreflightFinding]:
    """BARs against the windows that a guest's firmware makes, and what resizing would give."""
    name, found = function.address, []
    evidence = f"{SYS_PCI_DEVICES}/{name}/resource"
    memory = [region for region in function.regions if region.kind == "mem" and region.index < 6]
    low = sum(region.size for region in memory if region.bits == 32)
    if low > _WINDOW_32:
        detail = f"its 32-bit BARs take {words_of(low)} below 4 GiB, where a guest has about "
        detail += words_of(_WINDOW_32)
        # SeaBIOS has its window behind the configuration space at 0xb0000000, whatever the memory.
        remedy = "-machine q35,max-ram-below-4g=1G with OVMF (SeaBIOS has no larger window)"
        found.append(
            finding(name, "bar-32", WARNING, detail, evidence, remedy, number=low, unit="bytes")
        )
    high = sum(region.size for region in memory if region.bits == 64)
    if high > _WINDOW_64 and wanted.hypervisor != "cloud-hypervisor":
        mib = 1 << (2 * high - 1).bit_length() - 20
        # Since edk2-stable202211 it takes an eighth of what the CPU addresses.
        detail = f"its 64-bit BARs take {words_of(high)}, an OVMF from before November 2022 has "
        detail += f"{words_of(_WINDOW_64)} for them unless it is told otherwise"
        remedy = f"-fw_cfg name=opt/ovmf/X-PciMmio64Mb,string={mib}"
        found.append(
            finding(name, "bar-64", WARNING, detail, evidence, remedy, number=high, unit="bytes")
        )
    rebar = None if check.config is None else check.config.find("rebar")
    entries = rebar.fields.get("bars") if rebar is not None else None
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        sizes, size, bar = entry.get("sizes"), entry.get("size"), entry.get("bar")
        most = sizes[-1] if isinstance(sizes, list) and sizes else None
        if isinstance(most, int) and isinstance(size, int) and most > size:
            bit = most.bit_length() - 21
            detail = f"BAR {bar} has {words_of(size)} and could have {words_of(most)}; a guest "
            detail += "cannot change it"
            remedy = f"before bind: echo {bit} > {SYS_PCI_DEVICES}/{name}/resource{bar}_resize"
            found.append(
                finding(
                    name,
                    "resizable-bar",
                    NOTE,
                    detail,
                    evidence,
                    remedy,
                    number=most,
                    unit="bytes",
                )
            )
    return found


def _vectors(check: ReadyCheck, wanted: WantedGuest) -> list[PreflightFinding]:
    msix = None if check.config is None else check.config.find("msi-x")
    vectors = msix.fields.get("vectors") if msix is not None else None
    if not isinstance(vectors, int) or wanted.vcpus is None or vectors >= wanted.vcpus:
        return []
    detail = f"it has {vectors} MSI-X vectors for {wanted.vcpus} vCPUs: fewer queues than vCPUs"
    return [
        finding(
            check.device.name,
            "vectors",
            NOTE,
            detail,
            f"{SYS_PCI_DEVICES}/{check.device.name}/config: MSI-X",
            number=vectors,
            unit="vectors",
        )
    ]


def _rom(function: PciFunction) -> list[PreflightFinding]:
    """Graphics cards want their ROM for a picture before the guest's driver runs."""
    if not (function.class_code or "").startswith("03") or function.physfn is not None:
        return []
    base = f"{SYS_PCI_DEVICES}/{function.address}"
    romfile = "romfile=/path/to/the.rom at its -device option (libvirt: <rom file='…'/>)"
    if function.boot_vga:
        detail = (
            "it was the firmware's display: what its ROM BAR shows may be the copy that the "
            "firmware has changed"
        )
        read = f"echo 1 > {base}/rom && cp {base}/rom card.rom; echo 0 > {base}/rom"
        return [
            finding(
                function.address, "rom", WARNING, detail, f"{base}/boot_vga is 1", read, romfile
            )
        ]
    if any(region.index == 6 for region in function.regions):
        return []
    detail = "it has no ROM BAR: the guest's firmware shows no picture on it"
    return [finding(function.address, "rom", NOTE, detail, f"{base}/resource, line 7", romfile)]


def _graphics(function: PciFunction, wanted: WantedGuest) -> list[PreflightFinding]:
    """Intel's integrated graphics: its OpRegion and place are not the device's own."""
    slot = function.address.partition(":")[2]
    integrated = function.vendor == "8086" and slot == "00:02.0" and function.physfn is None
    if not integrated or not (function.class_code or "").startswith("03"):
        return []
    detail = (
        "Intel's integrated graphics: the guest needs its OpRegion, and its driver looks for it "
        "at 00:02.0"
    )
    remedy = "-device vfio-pci,host=…,bus=pcie.0,addr=0x2,x-igd-opregion=on"
    if wanted.hypervisor == "libvirt":
        remedy = "<address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='0x0'/>"
    evidence = f"{PROC_IOMEM}; {SYS_PCI_DEVICES}/{function.address}"
    return [finding(function.address, "intel-graphics", WARNING, detail, evidence, remedy)]


def _other_functions(check: ReadyCheck, chosen: Collection[str]) -> list[PreflightFinding]:
    """A card's other functions that stay behind, such as a GPU's audio."""
    left = [other for other in check.card if other.address not in chosen and not other.is_bridge]
    name = check.device.name
    if not left or name != min([name, *(other for other in chosen if _same_slot(other, name))]):
        return []
    told = ", ".join(f"{other.address} ({other.driver or 'no driver'})" for other in left)
    graphics = check.device.function and (check.device.function.class_code or "")[:2] == "03"
    detail = f"other functions of its card stay with the host: {told}"
    remedy = f"vfiotool vm check {' '.join([name, *(other.address for other in left)])}"
    evidence = f"{SYS_PCI_DEVICES}/{name.rpartition('.')[0]}.*"
    severity = WARNING if graphics else NOTE
    return [finding(name, "other-functions", severity, detail, evidence, remedy, number=len(left))]


def _same_slot(one: str, other: str) -> bool:
    return one.rpartition(".")[0] == other.rpartition(".")[0]


def _returning(check: ReadyCheck, chosen: Collection[str]) -> list[PreflightFinding]:
    """Members of the group without a driver that nothing keeps from their host driver.

    A probe asks the devices alone that have no driver: one on vfio-pci stays there
    (drivers/base/dd.c, __driver_attach).
    """
    free = [
        member.address
        for member in check.members
        if not member.is_bridge
        and member.driver_override is None
        and member.driver is None
        and member.address != check.device.name
    ]
    if not free:
        return []
    detail = (
        "come back to their host driver when it is loaded or the bus is probed again (no "
        f"driver_override): {', '.join(free)}"
    )
    remedy = tuple(
        f"vfiotool bind {name}" if name in chosen else f"vfiotool bind {name} --driver none"
        for name in free
    )
    evidence = f"{SYS_PCI_DEVICES}/{free[0]}/driver_override is (null)"
    return [
        finding(
            check.device.name,
            "returns-to-host",
            NOTE,
            detail,
            evidence,
            *remedy,
            number=len(free),
        )
    ]


def _migration(check: ReadyCheck) -> list[PreflightFinding]:
    """Whether the VM can still be migrated: VFIO can where the driver saves a device's state."""
    device = check.device
    if check.features is not None:
        evidence = f"{SYS_DEBUG_VFIO}/{device.name}/migration/features"
        words = check.features.split()
        if any(word.lower().replace("_", "-") in ("stop-copy", "p2p") for word in words):
            detail = f"the VM can be migrated: the driver offers {' '.join(words)}"
            return [finding(device.name, "migration", NOTE, detail, evidence)]
        detail = "the VM cannot be migrated: the driver offers no way to save the device's state"
        return [finding(device.name, "migration", NOTE, detail, evidence)]
    if device.is_mdev:
        detail = "whether the VM can be migrated is the business of the mediated device's driver"
        evidence = f"{SYS_MDEV_DEVICES}/{device.name}/driver"
        remedy = f"vfiotool device info {device.name}"
        return [finding(device.name, "migration", NOTE, detail, evidence, remedy)]
    driver = device.function.driver if device.function else None
    evidence = f"{SYS_PCI_DEVICES}/{device.name}/driver is {driver}"
    if driver in _MIGRATING:
        detail = f"the VM can be migrated if the device's firmware lets {driver} save its state"
        remedy = f"vfiotool device info {device.name}"
        return [finding(device.name, "migration", NOTE, detail, evidence, remedy)]
    if driver != "vfio-pci":
        return []
    detail = "the VM cannot be migrated: vfio-pci cannot save a device's state"
    remedy = "unplug it for the migration: device_del (libvirt: <teaming type='transient'/>)"
    return [finding(device.name, "migration", NOTE, detail, evidence, remedy)]


def told_of(checks: Sequence[ReadyCheck]) -> frozenset[str]:
    """The names of all devices of one virtual machine."""
    return frozenset(check.device.name for check in checks)
