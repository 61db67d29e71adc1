"""`metrics`: devices and servers in Prometheus' text format."""

from __future__ import annotations

import typer

from vfiotool.change.audit import read_audit
from vfiotool.cli import output
from vfiotool.cli.context import area, examples, host_of
from vfiotool.devices.details import DetailReader
from vfiotool.devices.identity import role_of
from vfiotool.devices.pci import list_addresses, read_functions
from vfiotool.devices.sriov import read_vfs
from vfiotool.errors import VfiotoolError
from vfiotool.host.host import Host
from vfiotool.usage.standing import Standings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vfiotool.virtio.prometheus import Family

app = area()


@app.command(
    "metrics",
    epilog=examples(
        "vfiotool metrics",
        "cd /var/lib/prometheus/node-exporter && vfiotool metrics > vfiotool.new && "
        "mv vfiotool.new vfiotool.prom",
    ),
)
def metrics(context: typer.Context) -> int:
    """Print devices with their verdicts, and what running servers do, for Prometheus."""
    from vfiotool.virtio.prometheus import Family, format_families, server_families

    host = host_of(context)
    families = [
        Family("vfiotool_device_info", "A PCI function: its driver, IOMMU group and verdict."),
        Family("vfiotool_devices", "PCI functions with one verdict."),
    ]
    counts = {"ready": 0, "available": 0, "blocked": 0}
    for address, labels in _devices(host):
        families[0].add(1, pci_address=address, **labels)
        counts[labels["verdict"]] = counts.get(labels["verdict"], 0) + 1
    for verdict, count in counts.items():
        families[1].add(count, verdict=verdict)
    families += _vfs(host)
    if host.live:
        from vfiotool.cli.serving import all_servers

        families += _changes()
        families += _drift(host)
        families += server_families(all_servers())
    output.text(format_families(families))
    return 0


def _vfs(host: Host) -> list[Family]:
    """Of each physical function that has VFs: how many, and how many are on a VFIO driver."""
    from vfiotool.virtio.prometheus import Family

    enabled = Family("vfiotool_vfs", "Virtual functions that a physical function has.")
    vfio = Family("vfiotool_vfs_on_vfio", "Those of them that a virtual machine can open.")
    for function in read_functions(host, list_addresses(host), links=False):
        if function.sriov is None or not function.sriov.num_vfs:
            continue
        vfs = read_vfs(host, function.address)
        enabled.add(len(vfs), pci_address=function.address)
        on_vfio = sum(role_of(vf.driver) == "vfio" for vf in vfs)
        vfio.add(on_vfio, pci_address=function.address)
    return [enabled, vfio]


def _changes() -> list[Family]:
    """When the last change of each outcome was begun, from the audit trail."""
    from vfiotool.virtio.prometheus import Family

    last = Family(
        "vfiotool_last_change_timestamp_seconds", "When the last change of an outcome was begun."
    )
    try:
        found = read_audit()
    except OSError:
        return []
    for outcome, at in {change.outcome or "open": change.at for change in found}.items():
        last.add(at, outcome=outcome)
    return [last]


def _drift(host: Host) -> list[Family]:
    """How far the host is from the policy that was applied last; nothing where none was, or where
    it may not be read."""
    from vfiotool.change.journal import Journal
    from vfiotool.cli.change.policy import make_plan
    from vfiotool.policy.saved import DesiredState
    from vfiotool.virtio.prometheus import Family

    steps = Family(
        "vfiotool_policy_drift_steps",
        "Steps from the host's state to the policy that was applied last.",
    )
    refused = Family(
        "vfiotool_policy_refusals", "Rules of that policy that cannot be followed on this host now."
    )
    try:
        policy = DesiredState().load()
        if policy is None:
            return []
        plan = make_plan(host, Journal.existing(host), policy, absent_ok=True, collect=True)
    except VfiotoolError as error:
        output.warn(f"vfiotool: no drift in the metrics: {error.message}")
        return []
    steps.add(len(plan.steps))
    refused.add(len(plan.refusals) + len(plan.absent))
    return [steps, refused]


def _devices(host: Host) -> list[tuple[str, dict[str, str]]]:
    """Each function that is no bridge, with its labels."""
    functions = DetailReader(host).functions(list_addresses(host))
    standings = Standings(host, {function.address: function for function in functions})
    return [
        (
            function.address,
            {
                "driver": function.driver or "",
                "iommu_group": "" if function.iommu_group is None else str(function.iommu_group),
                "verdict": standings.of(function).verdict,
            },
        )
        for function in functions
        if not function.is_bridge
    ]
