"""The oldest release of another program that takes what is printed for it.

Sources: the programs' change logs and documents ("Since:" in QEMU's qapi/, `:since:` in libvirt's
formatdomain, the release notes of cloud-hypervisor, Incus and KubeVirt).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from vfiotool.errors import Unsupported, UsageError

Release = tuple[int, ...]

# program: feature: (oldest release, what it is).
OLDEST: dict[str, dict[str, tuple[Release, str]]] = {
    "QEMU": {
        "base": ((2, 9), "PCIe root ports and sysfsdev"),
        "vfio-ap": ((3, 1), "vfio-ap"),
        "vfio-ccw": ((2, 10), "vfio-ccw"),
        "iommufd": ((9, 0), "iommufd"),
        "vf-token": ((8, 1), "VF tokens"),
        "vhost-user-blk": ((2, 12), "vhost-user disks"),
        "vhost-user-net": ((2, 12), "shared memory of memfd"),
        "vdpa-net": ((5, 1), "vDPA network devices"),
        "vdpa": ((8, 0), "vDPA devices of any type"),
        "vfio-user": ((10, 1), "vfio-user"),
    },
    "libvirt": {
        "base": ((1, 3), "hostdev elements"),
        "mdev": ((3, 2), "mediated devices"),
        "vfio-ccw": ((4, 4), "vfio-ccw"),
        "vfio-ap": ((4, 9), "vfio-ap"),
        "iommufd": ((12, 1), "iommufd"),
        "vhost-user-blk": ((7, 1), "vhost-user disks"),
        "vhost-user-net": ((1, 3), "vhost-user networks"),
        "vdpa-net": ((6, 9), "vDPA network devices"),
        "vdpa": ((9, 8), "vDPA disks"),
    },
    "cloud-hypervisor": {
        "base": ((0, 3), "--device"),
        "vhost-user-blk": ((0, 3), "vhost-user disks"),
        "vhost-user-net": ((0, 3), "vhost-user networks"),
        "vdpa": ((23,), "--vdpa"),
        "vfio-user": ((18,), "--user-device"),
    },
    "KubeVirt": {"base": ((0, 36), "permittedHostDevices")},
    "Proxmox VE": {"base": ((6, 1), "hostpci with several functions")},
    "Incus": {"base": ((0, 1), "devices of type pci")},
}


def parse_release(text: str) -> Release:
    """`9.0.2` as numbers. Raises UsageError for what is not a release."""
    if re.fullmatch(r"v?\d+(\.\d+){0,3}", text, re.ASCII) is None:
        raise UsageError(f"{text[:40]!r} is not a release", hint="write it as 9.0 or 9.0.2")
    return tuple(int(part) for part in text.removeprefix("v").split("."))


def oldest(program: str, features: Iterable[str]) -> str:
    """The oldest release that has all of these features (and the base), as text."""
    known = OLDEST[program]
    needed = max(known[name][0] for name in {"base", *features} if name in known)
    return ".".join(map(str, needed))


def require_release(program: str, given: str | None, features: Iterable[str]) -> None:
    """Raise Unsupported if `given` is older than a feature, naming the oldest that works."""
    if given is None:
        return
    # 9 is 9.0: a tuple that is shorter would come before it.
    release = (*parse_release(given), 0, 0, 0)
    for name in ("base", *features):
        first, what = OLDEST[program].get(name, ((0,), ""))
        if release < first:
            wanted = oldest(program, features)
            raise Unsupported(
                f"{program} {given} has no {what}: they came with {'.'.join(map(str, first))}",
                hint=f"the oldest {program} that takes these devices is {wanted}",
            )
