"""The kernels that a guest can boot, and how each comes to be here.

`host` is this machine's own, `6.1` and `6.12` are Debian 12's packages, `iommufd` is built (see
`build`), and a path names a kernel image.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from vfiotool.errors import NotFound, Unsupported
from vfiotool.lab.kernels import build, debian
from vfiotool.lab.kernels.bzimage import image_release
from vfiotool.lab.kernels.cache import locked, verified
from vfiotool.lab.kernels.stored import Kernel, folder, load

DEFAULT = "6.12"
NAMES = ("host", "6.1", "6.12", "iommufd")


@dataclass(frozen=True)
class Status:
    """What `lab kernels` says of one kernel; `get` is the command that makes it ready."""

    name: str
    summary: str
    release: str | None
    ready: bool
    get: str | None
    notes: tuple[str, ...] = ()


def prepare(name: str, *, update: bool = False) -> Kernel:
    """The kernel `name`, fetched or built if it is not in the cache yet (or `update` is set).

    Raises NotFound for a name that is none and no file, Unsupported where this machine cannot
    fetch or build it (the hint says what is missing), KernelError when a download fails.
    """
    if name == "host":
        return _host_kernel()
    if name not in NAMES:
        return _path_kernel(Path(name))
    ready = None if update else load(name)
    if ready is None:
        with locked(f"kernel-{name}"):
            ready = None if update else load(name)
            if ready is None:
                if name == "iommufd":
                    build.iommufd_kernel(folder(name))
                else:
                    debian.fetch(name)
                ready = load(name)
    assert ready is not None
    verified(folder(name))
    return ready


def _host_kernel() -> Kernel:
    release = os.uname().release
    for image in (Path(f"/boot/vmlinuz-{release}"), Path(f"/lib/modules/{release}/vmlinuz")):
        if os.access(image, os.R_OK):
            break
    else:
        raise Unsupported(
            f"this machine's own kernel {release} has no readable image in /boot",
            hint="take another one: vfiotool lab kernels",
        )
    return Kernel("host", release, image, _modules_of(release, None), str(image))


def _path_kernel(image: Path) -> Kernel:
    if not image.is_file():
        raise NotFound(
            f"no kernel named {image}, and no such file",
            hint="vfiotool lab kernels lists the names",
        )
    image = image.resolve()
    release = image_release(image)
    return Kernel(str(image), release, image, _modules_of(release, image), str(image))


def _modules_of(release: str, image: Path | None) -> Path | None:
    """The modules' folder beside an image (an unpacked package) or on this machine."""
    places = [Path("/lib/modules")]
    if image is not None:
        near = image.parent
        places = [near / "lib/modules", near.parent / "lib/modules", *places]
    return next((p / release for p in places if (p / release / "modules.dep").exists()), None)


def statuses() -> list[Status]:
    """What is here and what is missing, for each kernel that has a name."""
    rows = []
    for name in NAMES:
        if name == "host":
            rows.append(_host_status())
            continue
        ready = load(name)
        summary = (
            "iommufd, VFIO character devices, vDPA simulators; built from linux-source-6.12"
            if name == "iommufd"
            else f"Debian 12's {debian.PACKAGES[name]}"
        )
        rows.append(
            Status(
                name,
                summary,
                ready.release if ready else None,
                ready is not None,
                None if ready else f"vfiotool lab kernels --get {name}",
                ready.notes if ready else (),
            )
        )
    return rows


def _host_status() -> Status:
    release = os.uname().release
    try:
        kernel = _host_kernel()
    except Unsupported as error:
        return Status("host", error.message, release, False, None)
    notes = () if kernel.modules else ("without modules: all that a guest needs must be built in",)
    return Status("host", f"this machine's own, {kernel.image}", release, True, None, notes)


def as_json(status: Status) -> dict[str, object]:
    return asdict(status)
