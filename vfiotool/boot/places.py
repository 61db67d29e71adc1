"""Every path that `boot enable` ever installs, relative to the root: no other one is removed."""

from __future__ import annotations

POLICY = "etc/vfiotool/boot/policy.toml"
MANIFEST = "etc/vfiotool/boot/manifest.json"
SERVICE = "vfiotool-boot.service"
LATE = "vfiotool-late"
UNITS = "etc/systemd/system"
WANTED = f"{UNITS}/multi-user.target.wants/{SERVICE}"
UDEV_RULES = "etc/udev/rules.d/40-vfiotool.rules"
MODPROBE = "etc/modprobe.d/vfiotool.conf"
INITRAMFS_HOOK = "etc/initramfs-tools/hooks/vfiotool"
DRACUT_CONF = "etc/dracut.conf.d/vfiotool.conf"

FILES = frozenset(
    {
        POLICY,
        MANIFEST,
        f"{UNITS}/{SERVICE}",
        f"{UNITS}/{LATE}@.service",
        WANTED,
        UDEV_RULES,
        MODPROBE,
        INITRAMFS_HOOK,
        DRACUT_CONF,
    }
)
FOLDERS = frozenset(path[:at] for path in FILES for at, letter in enumerate(path) if letter == "/")
