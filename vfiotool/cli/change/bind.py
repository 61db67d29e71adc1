"""`bind` and `release`: one-step plans through the journalled write path."""

from __future__ import annotations

from typing import Annotated

import typer

from vfiotool.change.journal import Journal
from vfiotool.change.plans.bind import plan_bind, plan_release
from vfiotool.change.plans.facts import read_facts
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.state import read_binding
from vfiotool.cli import candidates, output
from vfiotool.cli.change.changing import (
    DEADLINE_S,
    Allow,
    Changed,
    DryRun,
    Report,
    Timeout,
    run_change,
)
from vfiotool.cli.context import DevicesArgument, area, examples, host_of
from vfiotool.devices.iommu import IommuGroup, read_group
from vfiotool.devices.selector import resolve
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES

app = area()
_KEEP = "until reboot; to keep it: vfiotool export > policy.toml; vfiotool boot enable policy.toml"


@app.command(
    "bind",
    epilog=examples(
        "vfiotool bind 0000:05:01.0",
        "vfiotool bind net:eth1 --dry-run",
        "vfiotool bind 01:00.0 --whole-group",
        "vfiotool bind 01:00.0 --driver none",
    ),
)
def bind(
    context: typer.Context,
    devices: DevicesArgument,
    driver: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help='A driver other than the best VFIO driver; "none" leaves it without a driver.',
            autocompletion=candidates.drivers,
        ),
    ] = None,
    whole_group: Annotated[
        bool, typer.Option("--whole-group", help="Also bind the group's other endpoints.")
    ] = False,
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    """Unbind devices from their host drivers and bind them to a VFIO driver (vfio-pci).

    Refused, with exit code 4, for what the host uses. It lasts until reboot: to keep it, export
    it as a policy and let that be applied at every boot (vfiotool boot enable).
    """
    host = host_of(context)
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

    def report(done: Changed) -> Report:
        bound = [step.target for step in done.steps if step.verb == "bind-driver"]
        keys, lines = _report_devices(host, list(dict.fromkeys([*addresses, *bound])), done)
        if bound and driver != "none":
            output.say(_KEEP)
        return keys, lines

    title = f"bind {' '.join(addresses)}" + (f" to {driver}" if driver else "")
    return run_change(context, title, make, report, dry_run=dry_run, timeout_s=timeout, allow=allow)


@app.command(
    "release",
    epilog=examples("vfiotool release 0000:05:01.0", "vfiotool release 05:01.0 --dry-run"),
)
def release(
    context: typer.Context,
    devices: DevicesArgument,
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    """Unbind devices from the VFIO driver and give them back to the driver they had before."""
    host = host_of(context)
    addresses = [resolve(host, text) for text in devices]

    def make(host: Host, journal: Journal | None) -> tuple[Step, ...]:
        return plan_release(read_facts(host, addresses, journal, variants_wanted=False), addresses)

    def report(done: Changed) -> Report:
        return _report_devices(host, addresses, done)

    title = f"release {' '.join(addresses)}"
    return run_change(context, title, make, report, dry_run=dry_run, timeout_s=timeout, allow=allow)


def _report_devices(host: Host, addresses: list[str], done: Changed) -> Report:
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
    changed = {step.target for step in done.steps}
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
    lines = []
    for address, binding, number in rows:
        already = "" if address in changed else "already "
        place = "no IOMMU group" if number is None else f"group {number}"
        lines.append(f"{address}: {already}{binding.driver or 'no driver'} ({place})")
    return {"devices": listed}, lines


def _viable(group: IommuGroup | None) -> bool | None:
    return None if group is None else group.viable


def _warn_not_viable(group: IommuGroup, taken: set[str]) -> None:
    named = sorted(member.address for member in group.devices if member.address in taken)
    if not named:
        return
    way = [member for member in group.devices if member.role == "host"]
    others = ", ".join(f"{member.address} ({member.driver})" for member in way)
    output.say(f"vfiotool: group {group.id} is not viable yet: {others} in the way")
    bridges = group.bridges_in_the_way
    for bridge in bridges:
        output.say(f"  vfiotool bind {bridge} --driver none")
    if len(bridges) < len(way):
        output.say(f"  vfiotool bind {named[0]} --whole-group")
