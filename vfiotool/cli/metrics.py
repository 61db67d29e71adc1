"""`metrics`: devices and servers in Prometheus' text format."""

from __future__ import annotations

import typer

from vfiotool.cli import output
from vfiotool.cli.context import area, examples, host_of
from vfiotool.devices.details import DetailReader
from vfiotool.devices.pci import list_addresses
from vfiotool.host.host import Host
from vfiotool.usage.standing import Standings

app = area()


@app.command(
    "metrics",
    epilog=examples(
        "vfiotool metrics",
        "vfiotool metrics > /var/lib/prometheus/node-exporter/vfiotool.prom",
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
    if host.live:
        from vfiotool.cli.serving import all_servers

        families += server_families(all_servers())
    output.text(format_families(families))
    return 0


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
