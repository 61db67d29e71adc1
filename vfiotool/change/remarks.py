"""What whoever changes a host should know of a plan, though it is no reason to refuse it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from vfiotool.change.steps.base import Step
from vfiotool.devices.drivers import is_listed
from vfiotool.devices.iommu import is_vfio_driver
from vfiotool.devices.sriov import read_vfs
from vfiotool.devices.vdpa import DRIVERS as VDPA_DRIVERS
from vfiotool.host.host import Host
from vfiotool.host.paths import SYS_PCI_DEVICES, SYS_PCI_DRIVERS


def remarks(host: Host, steps: Iterable[Step]) -> tuple[str, ...]:
    """VFs that the steps destroy, other managers of them, VFs that a token will guard, and modules
    of which it is not known whether there are any.

    To be asked before the steps run.
    """
    steps = tuple(steps)
    return (
        *_destroyed(host, steps),
        *_managers(host, steps),
        *_tokens(host, steps),
        *_unlisted(host, steps),
    )


def _destroyed(host: Host, steps: tuple[Step, ...]) -> Iterator[str]:
    """Each physical function whose VFs there are now will be gone, also if others follow."""
    for pf in dict.fromkeys(step.remakes_vfs_of for step in steps):
        vfs = read_vfs(host, pf) if pf is not None else ()
        if vfs:
            listed = ", ".join(f"{vf.address} ({vf.driver or 'no driver'})" for vf in vfs)
            yield f"all VFs of {pf} are removed first: {listed}"


def _managers(host: Host, steps: tuple[Step, ...]) -> Iterator[str]:
    changed = {step.sets_vfs_of for step in steps} - {None}
    if not changed:
        return
    # All this is for changes of VFs alone, and few hosts have such a claim.
    from vfiotool.devices.inventory import read_inventory
    from vfiotool.doctor.claims import VF_TOOLS, read_claims, resolve_claim

    claims = [claim for claim in read_claims(host) if claim.tool in VF_TOOLS]
    inventory = read_inventory(host) if claims else None
    for claim in claims:
        assert inventory is not None
        for pf in changed & set(resolve_claim(host, inventory, claim)):
            yield (
                f"{claim.tool} sets the VFs of {pf} too and may undo this "
                f"({claim.setting} in {claim.file})"
            )


def _tokens(host: Host, steps: tuple[Step, ...]) -> Iterator[str]:
    """The physical functions on vfio-pci of VFs that the steps make or bind.

    Source: drivers/vfio/pci/vfio_pci_core.c, vfio_pci_validate_vf_token.
    """
    rebindings = [step.rebinding for step in steps]
    drivers = {item.name: item.after.driver for item in rebindings if item is not None}
    owners = dict.fromkeys(step.token_owner(host) for step in steps)
    for owner in owners:
        if owner is None:
            continue
        driver = drivers.get(owner, host.linkname(f"{SYS_PCI_DEVICES}/{owner}/driver"))
        if driver is not None and is_vfio_driver(driver):
            yield (
                f"{owner} is on {driver}: its VFs open only with the VF token that the program "
                "which opens it sets (vfiotool vm qemu VF --vf-token UUID)"
            )


def _unlisted(host: Host, steps: tuple[Step, ...]) -> Iterator[str]:
    """Drivers of names unknown here whose module may not be there: a recorded host has no list."""
    for driver in dict.fromkeys(step.loads for step in steps):
        if driver is None or is_vfio_driver(driver) or driver in VDPA_DRIVERS:
            continue
        if is_listed(host, driver) is None:
            near = difflib.get_close_matches(driver, sorted(host.listdir(SYS_PCI_DRIVERS)), n=1)
            yield (
                f"no driver named {driver} is registered, and whether a module brings it cannot be "
                "told here: the list of modules (modules.dep) is missing"
                + (f"; did you mean {near[0]}?" if near else "")
            )
