"""Which tools claim a device: two that want it differently undo each other's work at each boot."""

from __future__ import annotations

from collections.abc import Iterable

from vfiotool.doctor.claims import VF_TOOLS, Claim, ResolvedClaim
from vfiotool.doctor.finding import PARAMETERS_PAGE, SRIOV_PAGE, VFIO_PAGE, Finding
from vfiotool.host.paths import PROC_CMDLINE

_PAGES = {
    "NetworkManager": "https://networkmanager.dev/docs/api/latest/settings-sriov.html",
    "systemd.link": "https://www.freedesktop.org/software/systemd/man/systemd.link.html",
    "netplan": "https://netplan.readthedocs.io/en/stable/netplan-yaml/",
    "driverctl": "https://gitlab.com/driverctl/driverctl",
    "mdevctl": "https://github.com/mdevctl/mdevctl",
    "libvirt": "https://libvirt.org/formatdomain.html#host-device-assignment",
    "modprobe.d": VFIO_PAGE,
    "kernel command line": PARAMETERS_PAGE,
    "vfiotool": SRIOV_PAGE,
}
# The same option of the same module, twice: said twice, not against each other.
_ID_OPTIONS = {"modprobe.d", "kernel command line"}
# A tool that binds at start, whatever another one wanted a second before.
_BINDERS = {"driverctl", "modprobe.d", "kernel command line", "vfiotool"}


def judge_conflicts(resolved: Iterable[ResolvedClaim]) -> list[Finding]:
    """One finding for each device that several tools claim, and for each claim on VFs or ids."""
    by_device: dict[str, list[Claim]] = {}
    findings = []
    for entry in resolved:
        claim, devices = entry.claim, entry.devices
        for device in devices:
            by_device.setdefault(device, []).append(claim)
        if claim.tool in VF_TOOLS:
            findings.append(_vf_manager(claim, devices))
        if claim.device.startswith("id:") and len(devices) > 1:
            findings.append(_greedy_ids(claim, devices))
    findings += [
        _conflict(device, claims) for device, claims in by_device.items() if _clash(claims)
    ]
    if not findings:
        summary = "no device is claimed by two tools"
        findings.append(Finding("conflict", "ok", summary, f"{len(by_device)} devices are claimed"))
    return findings


def _clash(claims: list[Claim]) -> bool:
    """Several tools, unless it is only libvirt's domains taking turns or naming what is bound."""
    tools = {claim.tool for claim in claims}
    if len(tools) < 2 or tools <= _ID_OPTIONS:
        return False
    if tools <= VF_TOOLS or len(tools & _BINDERS) > 1:
        return True
    return any("managed" in claim.setting or claim.tool in VF_TOOLS for claim in claims)


def _conflict(device: str, claims: list[Claim]) -> Finding:
    said = "; ".join(f"{claim.tool} ({claim.setting})" for claim in claims)
    files = ", ".join(dict.fromkeys(claim.file for claim in claims))
    return Finding(
        "conflict",
        "warning",
        f"{device} is claimed by several tools: {said}",
        files,
        ("leave the device to one of them",),
        _PAGES.get(claims[0].tool),
    )


def _vf_manager(claim: Claim, devices: tuple[str, ...]) -> Finding:
    where = ", ".join(devices) or f"{claim.device}, not present"
    return Finding(
        "vf-manager",
        "warning" if devices else "note",
        f"{claim.tool} sets the VFs of {where} ({claim.setting}): vfiotool vf set would be undone",
        claim.file,
        (f"remove the setting from {claim.file}",),
        _PAGES[claim.tool],
    )


def _greedy_ids(claim: Claim, devices: tuple[str, ...]) -> Finding:
    ident = claim.device.partition(":")[2]
    return Finding(
        "ids-option",
        "warning",
        f"vfio-pci.ids takes all devices with the id {ident}: {', '.join(devices)}",
        claim.file,
        (f"name the device by its address in a policy: vfiotool import {PROC_CMDLINE}",),
        _PAGES[claim.tool],
    )
