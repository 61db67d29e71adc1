"""A Debian root with systemd as init, for what only a real boot can prove.

The base image is made once by debootstrap (its second stage runs in private mount and process
namespaces, so that nothing of it reaches this machine) and kept in the lab's cache: an ext4 image
of Debian 12 with the kernels 6.1 and 6.12, initramfs-tools and dracut's core, and beside it each
kernel with its initramfs. A test boots copy-on-write overlays of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vfiotool.errors import Unsupported
from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.cache import cache_root, digest, filled, locked, progress

BUILD_LIMIT_S = 1500
KERNELS = {"6.1": "linux-image-amd64", "6.12": "linux-image-6.12-amd64"}
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "udev",
    "kmod",
    "python3",
    "initramfs-tools",
    "dracut-core",
    "zstd",
    "e2fsprogs",
    "util-linux",
    "strace",
    "driverctl",
    "mdevctl",
    "pciutils",
)
IMAGE_MIB = 3072

# Runs inside `unshare`: what it mounts and starts ends with it.
_BUILD = r"""
set -eu
root=$1 mirror=$2 security=$3 packages=$4 kernels=$5
debootstrap --variant=minbase --include="$packages" bookworm "$root" "$mirror"
cat >"$root/etc/apt/sources.list" <<END
deb $mirror bookworm main
deb $mirror bookworm-updates main
deb $security bookworm-security main
END
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
cp /etc/resolv.conf "$root/etc/resolv.conf"
mount -t proc proc "$root/proc"
export DEBIAN_FRONTEND=noninteractive LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
chroot "$root" apt-get -q update
chroot "$root" apt-get -q -y --no-install-recommends install $kernels
umount "$root/proc"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/doc \
    "$root"/usr/share/locale "$root"/usr/share/man "$root/usr/sbin/policy-rc.d"
for release in "$root"/lib/modules/*; do
    rm -rf "$release"/kernel/sound "$release"/kernel/drivers/media \
        "$release"/kernel/drivers/net/wireless "$release"/kernel/drivers/infiniband \
        "$release"/kernel/drivers/gpu/drm/amd "$release"/kernel/drivers/gpu/drm/nouveau
    chroot "$root" depmod "$(basename "$release")"
done
mount -t proc proc "$root/proc"
chroot "$root" update-initramfs -u -k all
umount "$root/proc"
echo guest >"$root/etc/hostname"
: >"$root/etc/machine-id"
cat >"$root/etc/fstab" <<END
/dev/vda / ext4 rw,relatime 0 1
/dev/vdb /opt ext4 ro 0 2
END
chroot "$root" passwd -d root >/dev/null
for unit in systemd-timesyncd apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer fstrim.timer getty@tty1 e2scrub_reap; do
    chroot "$root" systemctl mask "$unit" >/dev/null 2>&1 || :
done
"""


@dataclass(frozen=True)
class DebianRoot:
    """A base image (never written to) and the kernels that boot it, by name: (image, initramfs)."""

    image: Path
    kernels: dict[str, tuple[Path, Path]]


def missing() -> str | None:
    """Why the image cannot be made or used here, or None."""
    if load() is not None:
        return None
    try:
        if not packages.is_debian():
            return "making a Debian root needs Debian's apt and archive keys"
    except Unsupported as error:
        return error.message
    if os.geteuid() != 0:
        return "making a Debian root needs root (debootstrap)"
    if subprocess.run(["unshare", "-m", "-p", "-f", "true"], check=False).returncode:
        return "making a Debian root needs private namespaces (unshare -m -p)"
    return None


def _folder() -> Path:
    return cache_root() / f"debian-root-{digest(_BUILD, *PACKAGES, *KERNELS.values())}"


def load() -> DebianRoot | None:
    """The image if it was made already."""
    folder = _folder()
    kernels = {
        name: (folder / f"vmlinuz-{name}", folder / f"initrd-{name}")
        for name in KERNELS
        if (folder / f"initrd-{name}").exists()
    }
    image = folder / "root.ext4"
    return DebianRoot(image, kernels) if image.exists() and kernels else None


def prepare() -> DebianRoot:
    """The image, made on first use (some minutes, at most BUILD_LIMIT_S)."""
    with locked("debian-root"):
        if (ready := load()) is not None:
            return ready
        with filled(_folder()) as partial:
            _build(partial)
    ready = load()
    assert ready is not None
    return ready


def _debootstrap(into: Path) -> dict[str, str]:
    """An environment in which `debootstrap` is found: this machine's own, or an unpacked one."""
    places = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if shutil.which("debootstrap", path=places):
        return {**os.environ, "PATH": places}
    apt = packages.Apt("debootstrap", "bookworm")
    apt.update()
    [package] = apt.download("debootstrap", into=into)
    packages.unpack(package, into / "debootstrap")
    package.unlink()
    return {
        **os.environ,
        "PATH": f"{into}/debootstrap/usr/sbin:{places}",
        "DEBOOTSTRAP_DIR": str(into / "debootstrap/usr/share/debootstrap"),
    }


def _build(partial: Path) -> None:
    progress("making a Debian root with systemd (some minutes, once)")
    environment = _debootstrap(partial)
    root = partial / "root"
    mirror = packages.Apt("debootstrap", "bookworm").sources[0].mirror
    command = ["unshare", "-m", "-p", "-f", "--kill-child", "--propagation", "private"]
    arguments = [mirror, packages.SECURITY_MIRROR, ",".join(PACKAGES), " ".join(KERNELS.values())]
    with open(partial / "build.log", "wb") as log:
        subprocess.run(
            [*command, "sh", "-c", _BUILD, "build", str(root), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=True,
            timeout=BUILD_LIMIT_S,
        )
    for name in KERNELS:
        _take_kernel(root, name, partial)
    image = partial / "root.ext4"
    subprocess.run(["truncate", "-s", f"{IMAGE_MIB}M", str(image)], check=True)
    mkfs, tools = packages.need_tool("mkfs.ext4", "e2fsprogs")
    subprocess.run([*mkfs, "-q", "-F", "-d", str(root), str(image)], env=tools, check=True)
    shutil.rmtree(root)
    shutil.rmtree(partial / "debootstrap", ignore_errors=True)


def _take_kernel(root: Path, name: str, into: Path) -> None:
    [image] = sorted((root / "boot").glob(f"vmlinuz-{name}.*"))
    release = image.name.removeprefix("vmlinuz-")
    shutil.copy(image, into / f"vmlinuz-{name}")
    shutil.copy(root / "boot" / f"initrd.img-{release}", into / f"initrd-{name}")
    (into / f"release-{name}").write_text(release)
