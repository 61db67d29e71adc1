"""`bind`, `release`, `vf`, `mdev`: one-step plans through the journalled write path."""

from __future__ import annotations

import uuid as uuids
from dataclasses import asdict
from typing import Annotated

from vfiotool.change.journal import Journal
from vfiotool.change.plans.bind import plan_bind, plan_release
from vfiotool.change.plans.facts import read_facts
from vfiotool.change.plans.mdev import plan_mdev_create, plan_mdev_remove
from vfiotool.change.plans.sriov import plan_vf_count
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.state import read_binding
from vfiotool.change.steps.vf_network import read_settings
from vfiotool.cli import output as render
from vfiotool.cli.change.changing import (
    DEADLINE_S,
    Allow,
    Changed,
    DryRun,
    Timeout,
    Told,
    carry_out,
    print_line,
)
from vfiotool.cli.declare import Argument, Commands, Context, Option
from vfiotool.devices import selector
from vfiotool.devices.iommu import IommuGroup, read_group
from vfiotool.devices.mdev import read_mdev_types, read_mdevs
from vfiotool.devices.pci import Address, list_addresses
from vfiotool.devices.sriov import read_vfs
from vfiotool.errors import NotFound, Unsupported, UsageError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES
from vfiotool.netlink.devlink import MODES

_Devices = Annotated[list[str], Argument(metavar="DEVICE", help="As 0000:05:01.0.")]


def register(app: Commands) -> None:
    """Add this area's commands."""
    app.command(help="Give devices to a VFIO driver (or another, or none).")(bind)
    app.command(help="Give devices back to the driver they had before.")(release)
    vf = Commands(help="SR-IOV virtual functions.")
    vf.command("list", help="List the enabled VFs.")(vf_list)
    vf.command("set", help="Set how many VFs a physical function has.")(vf_set)
    app.add_typer(vf, name="vf")
    mdev = Commands(help="Mediated devices.")
    mdev.command("types", help="List the types that parents offer.")(mdev_types)
    mdev.command("list", help="List the mediated devices.")(mdev_list)
    mdev.command("create", help="Make a mediated device.")(mdev_create)
    mdev.command("remove", help="Remove a mediated device.")(mdev_remove)
    app.add_typer(mdev, name="mdev")


def resolve(host: Host, text: str) -> str:
    """The address of the one device that a selector names."""

    return selector.resolve(host, text)


def bind(
    context: Context,
    devices: _Devices,
    driver: Annotated[
        str | None,
        Option(help="The driver; the best VFIO driver if left out; none parks the device."),
    ] = None,
    whole_group: Annotated[
        bool, Option("--whole-group", help="Take the group's other endpoints along.")
    ] = False,
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    host = render.host(context)
    addresses = [resolve(host, text) for text in devices]

    def make(host: Host, journal: Journal | None) -> tuple[Step, ...]:
        facts = read_facts(
            host,
            addresses,
            journal,
            whole_groups=whole_group,
            variants_wanted=driver is None,
            drivers_wanted=() if driver is None else (driver,),
        )
        return plan_bind(facts, addresses, driver, whole_group=whole_group)

    def tell(done: Changed) -> Told:
        bound = (step.target for step in done.steps if step.verb == "bind-driver")
        return _tell_devices(host, list(dict.fromkeys([*addresses, *bound])))

    title = f"bind {' '.join(addresses)}" + (f" to {driver}" if driver else "")
    return carry_out(context, title, make, tell, dry_run=dry_run, timeout_s=timeout, allow=allow)


def release(
    context: Context,
    devices: _Devices,
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    host = render.host(context)
    addresses = [resolve(host, text) for text in devices]

    def make(host: Host, journal: Journal | None) -> tuple[Step, ...]:
        return plan_release(read_facts(host, addresses, journal, variants_wanted=False), addresses)

    def tell(_: Changed) -> Told:
        return _tell_devices(host, addresses)

    title = f"release {' '.join(addresses)}"
    return carry_out(context, title, make, tell, dry_run=dry_run, timeout_s=timeout, allow=allow)


def _tell_devices(host: Host, addresses: list[str]) -> Told:
    """What became of the devices; says which of their groups still cannot be used."""
    rows = []
    for address in addresses:
        binding = read_binding(host, "pci", address)
        link = host.linkname(f"{SYS_PCI_DEVICES}/{address}/iommu_group")
        number = int(link) if link is not None and link.isdecimal() else None
        rows.append((address, binding, number))
    groups = {number: read_group(host, number) for _, _, number in rows if number is not None}
    for group in groups.values():
        taken = {address for address, binding, _ in rows if binding.taken}
        if group is not None and not group.viable:
            _warn_not_viable(group, taken)
    listed = [
        {
            "address": address,
            "driver": binding.driver,
            "driver_override": binding.override,
            "iommu_group": number,
            "viable": None if number is None else _viable(groups[number]),
        }
        for address, binding, number in rows
    ]
    places = ("no IOMMU group" if number is None else f"group {number}" for *_, number in rows)
    lines = [f"{row[0]}: {row[1]} ({where})" for row, where in zip(rows, places, strict=True)]
    return {"devices": listed}, lines


def _viable(group: IommuGroup | None) -> bool | None:
    return None if group is None else group.viable


def _warn_not_viable(group: IommuGroup, taken: set[str]) -> None:
    named = sorted(member.address for member in group.devices if member.address in taken)
    if not named:
        return
    way = [member for member in group.devices if member.role == "host"]
    others = ", ".join(f"{member.address} ({member.driver})" for member in way)
    render.say(f"vfiotool: group {group.id} is not viable yet: {others} in the way")
    bridges = group.bridges_in_the_way
    for bridge in bridges:
        render.say(f"  vfiotool bind {bridge} --driver none")
    if len(bridges) < len(way):
        render.say(f"  vfiotool bind {named[0]} --whole-group")


def vf_list(
    context: Context,
    pf: Annotated[str | None, Argument(metavar="PF", help="Only this one's.")] = None,
) -> int:
    host = render.host(context)
    if pf is None:
        functions = list_addresses(host)
    else:
        functions = [resolve(host, pf)]
        base = f"{SYS_PCI_DEVICES}/{functions[0]}"
        if not host.exists(base):
            raise NotFound(
                f"no PCI function {functions[0]}",
                hint="vfiotool devices lists them",
                device=functions[0],
            )
        if not host.exists(f"{base}/sriov_totalvfs"):
            raise Unsupported(
                f"{functions[0]} has no SR-IOV capability that the kernel would drive",
                hint="vfiotool devices --json tells which have",
                device=functions[0],
            )
    vfs = [vf for address in functions for vf in read_vfs(host, address)]
    if render.state(context).json:
        render.emit({"vfs": [asdict(vf) for vf in vfs]})
        return 0
    for vf in vfs:
        group = "none" if vf.iommu_group is None else vf.iommu_group
        print_line(
            f"{vf.pf} vf {vf.index}: {vf.address}  {vf.driver or 'no driver'}  group {group}"
        )
    return 0


def vf_set(
    context: Context,
    pf: Annotated[str, Argument(metavar="PF", help="The physical function.")],
    count: Annotated[int, Argument(metavar="COUNT", help="How many VFs; 0 removes all.")],
    autoprobe: Annotated[
        bool | None,
        Option(help="Offer the new VFs to host drivers; as the kernel is set if left out."),
    ] = None,
    eswitch: Annotated[
        str | None,
        Option(metavar="MODE", help="legacy or switchdev; as the card is set if left out."),
    ] = None,
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    host = render.host(context)
    address = resolve(host, pf)
    if eswitch not in (None, *MODES):
        raise UsageError(f"--eswitch {eswitch}: the modes are {' and '.join(MODES)}")

    def make(host: Host, journal: Journal | None) -> tuple[Step, ...]:
        facts = read_facts(host, [address], journal, variants_wanted=False, eswitch_wanted=True)
        return plan_vf_count(
            facts,
            address,
            count,
            autoprobe=autoprobe,
            eswitch=eswitch,
            settings=read_settings(host, address) or (),
        )

    def tell(_: Changed) -> Told:
        vfs = read_vfs(host, address)
        lines = [f"  vf {vf.index}: {vf.address}  {vf.driver or 'no driver'}" for vf in vfs]
        return {"vfs": [asdict(vf) for vf in vfs]}, [f"{address}: {len(vfs)} VFs", *lines]

    title = f"vf set {address} {count}"
    return carry_out(context, title, make, tell, dry_run=dry_run, timeout_s=timeout, allow=allow)


def mdev_types(context: Context) -> int:
    types = read_mdev_types(render.host(context))
    keys = ("parent", "type", "name", "device_api", "available_instances", "description")
    if render.state(context).json:
        render.emit({"types": [{key: getattr(kind, key) for key in keys} for kind in types]})
        return 0
    for kind in types:
        left = "?" if kind.available_instances is None else kind.available_instances
        print_line(f"{kind.parent}  {kind.type}  {kind.name or ''}  {left} left")
    return 0


def mdev_list(context: Context) -> int:
    mdevs = read_mdevs(render.host(context))
    keys = ("uuid", "parent", "type", "iommu_group")
    if render.state(context).json:
        render.emit({"mdevs": [{key: getattr(mdev, key) for key in keys} for mdev in mdevs]})
        return 0
    for mdev in mdevs:
        print_line(f"{mdev.uuid}  {mdev.parent}  {mdev.type}  group {mdev.iommu_group}")
    return 0


def mdev_create(
    context: Context,
    parent: Annotated[str, Argument(metavar="PARENT", help="As mdev types names it.")],
    kind: Annotated[str, Argument(metavar="TYPE", help="As mdev types names it.")],
    uuid: Annotated[
        str | None, Option(metavar="U", help="Its UUID; a random one if left out.")
    ] = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    host = render.host(context)
    wanted = uuid or str(uuids.uuid4())
    if Address.is_address(parent):
        parent = str(Address.parse(parent))

    def make(host: Host, _: Journal | None) -> tuple[Step, ...]:
        return plan_mdev_create(read_mdev_types(host), read_mdevs(host), parent, kind, wanted)

    def tell(_: Changed) -> Told:
        name = wanted.lower()
        found = next((mdev for mdev in read_mdevs(host) if mdev.uuid == name), None)
        group = None if found is None else found.iommu_group
        entry = {"uuid": name, "parent": parent, "type": kind, "iommu_group": group}
        return {"mdevs": [entry]}, [f"{name}: {parent}/{kind} (group {group})"]

    title = f"mdev create {parent} {kind} {wanted}"
    return carry_out(context, title, make, tell, dry_run=dry_run, timeout_s=timeout)


def mdev_remove(
    context: Context,
    uuid: Annotated[str, Argument(metavar="UUID", help="As mdev list names it.")],
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    def make(host: Host, _: Journal | None) -> tuple[Step, ...]:
        return plan_mdev_remove(read_mdevs(host), uuid)

    def tell(_: Changed) -> Told:
        return {}, [f"{uuid.lower()}: removed"]

    title = f"mdev remove {uuid}"
    return carry_out(context, title, make, tell, dry_run=dry_run, timeout_s=timeout, allow=allow)
