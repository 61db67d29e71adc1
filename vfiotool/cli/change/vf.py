"""`vf list|set`: SR-IOV virtual functions, with what their physical functions can have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated

import typer

from vfiotool.change.journal import Journal
from vfiotool.change.plans.facts import read_facts
from vfiotool.change.plans.sriov import plan_vf_count
from vfiotool.change.steps.base import Step
from vfiotool.change.steps.vf_network import read_settings
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
from vfiotool.cli.context import area, examples, host_of, wants_json
from vfiotool.devices.pci import PciFunction, list_addresses, read_functions
from vfiotool.devices.selector import resolve
from vfiotool.devices.sriov import VirtualFunction, read_vfs
from vfiotool.errors import NotFound, Unsupported, UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES
from vfiotool.netlink.devlink import MODES
from vfiotool.netlink.route import VfSettings

app = area("List and create SR-IOV virtual functions (VFs) of physical functions (PFs).")


@app.command("list", epilog=examples("vfiotool vf list", "vfiotool vf list 0000:01:00.0"))
def vf_list(
    context: typer.Context,
    pf: Annotated[
        str | None,
        typer.Argument(
            metavar="PF",
            help="Only this physical function, by any selector.",
            autocompletion=candidates.physical_functions,
        ),
    ] = None,
) -> int:
    """List the functions that can have VFs, how many each has, and the VFs."""
    host = host_of(context)
    functions = _functions(host, pf)
    vfs = {function.address: read_vfs(host, function.address) for function in functions}
    settings = {address: _settings(host, address) for address, found in vfs.items() if found}
    if wants_json(context):
        output.emit(
            {
                "vfs": [
                    asdict(vf) | _settings_as_json(settings[vf.pf].get(vf.index))
                    for found in vfs.values()
                    for vf in found
                ],
                "pfs": [_pf_as_json(function) for function in functions],
            }
        )
        return 0
    rows = [
        row
        for function in functions
        for row in _rows(function, vfs[function.address], settings.get(function.address, {}))
    ]
    output.table(("ADDRESS", "VFS", "GROUP", "DRIVER", "MAC", "VLAN", "TRUST"), rows)
    if not rows:
        output.say("vfiotool: no device of this host can have VFs (SR-IOV)")
    return 0


def _functions(host: Host, pf: str | None) -> list[PciFunction]:
    """The functions that can have VFs; raises for one that was named and cannot."""
    if pf is None:
        found = read_functions(host, list_addresses(host), links=False)
        return [function for function in found if function.sriov is not None]
    address = resolve(host, pf)
    base = f"{SYS_PCI_DEVICES}/{address}"
    if not host.exists(base):
        raise NotFound(
            f"no PCI function {address}", hint="vfiotool devices lists them", device=address
        )
    if not host.exists(f"{base}/sriov_totalvfs"):
        raise Unsupported(
            f"{address} has no SR-IOV capability that the kernel would drive",
            hint="vfiotool vf list shows those that have",
            device=address,
        )
    return list(read_functions(host, [address], links=False))


def _settings(host: Host, pf: str) -> dict[int, VfSettings]:
    """What the PF's driver holds for its VFs, by index; nothing where it cannot be asked."""
    try:
        return {item.index: item for item in read_settings(host, pf) or ()}
    except VfiotoolError:
        return {}


def _settings_as_json(settings: VfSettings | None) -> dict[str, object]:
    return {
        "mac": None if settings is None else settings.mac,
        "vlan": None if settings is None else settings.vlan,
        "trust": None if settings is None else settings.trust,
    }


def _pf_as_json(function: PciFunction) -> dict[str, object]:
    sriov = function.sriov
    return {
        "address": function.address,
        "driver": function.driver,
        "num_vfs": None if sriov is None else sriov.num_vfs,
        "total_vfs": None if sriov is None else sriov.total_vfs,
        "autoprobe": None if sriov is None else sriov.autoprobe,
    }


def _rows(
    function: PciFunction, vfs: tuple[VirtualFunction, ...], settings: Mapping[int, VfSettings]
) -> list[list[output.Part]]:
    sriov = function.sriov
    count = "-" if sriov is None else f"{sriov.num_vfs} of {sriov.total_vfs}"
    group = "-" if function.iommu_group is None else str(function.iommu_group)
    first: list[output.Part] = [(function.address, "bold"), count, group, function.driver or "-"]
    rows = [[*first, "", "", ""]]
    for vf in vfs:
        found = settings.get(vf.index) or VfSettings(vf.index)
        rows.append(
            [
                f"  {vf.address}",
                f"vf {vf.index}",
                "-" if vf.iommu_group is None else str(vf.iommu_group),
                vf.driver or "-",
                found.mac or "-",
                "-" if found.vlan is None else str(found.vlan),
                {True: "on", False: "off", None: "-"}[found.trust],
            ]
        )
    return rows


@app.command(
    "set",
    epilog=examples(
        "vfiotool vf set 0000:01:00.0 4",
        "vfiotool vf set net:eth1 4 --no-autoprobe",
        "vfiotool vf set 0000:01:00.0 0",
    ),
)
def vf_set(
    context: typer.Context,
    pf: Annotated[
        str,
        typer.Argument(
            metavar="PF",
            help="The physical function, by any selector.",
            autocompletion=candidates.physical_functions,
        ),
    ],
    count: Annotated[
        int, typer.Argument(metavar="COUNT", min=0, help="How many VFs; 0 removes all.")
    ],
    autoprobe: Annotated[
        bool | None,
        typer.Option(help="Offer the new VFs to host drivers; default: keep the kernel's setting."),
    ] = None,
    eswitch: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            help="legacy or switchdev; default: keep the card's mode.",
            autocompletion=candidates.words(*MODES),
        ),
    ] = None,
    allow: Allow = None,
    dry_run: DryRun = False,
    timeout: Timeout = DEADLINE_S,
) -> int:
    """Set how many VFs a physical function has. Changing the number removes those that stand."""
    host = host_of(context)
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

    def report(done: Changed) -> Report:
        vfs = read_vfs(host, address)
        already = "" if done.steps else "already "
        lines = [f"  vf {vf.index}: {vf.address}  {vf.driver or 'no driver'}" for vf in vfs]
        keys = {"vfs": [asdict(vf) for vf in vfs]}
        return keys, [f"{address}: {already}{len(vfs)} VFs", *lines]

    title = f"vf set {address} {count}"
    return run_change(context, title, make, report, dry_run=dry_run, timeout_s=timeout, allow=allow)
