"""The texts that `boot enable` installs: units, udev rules, initramfs hooks.

Sources: systemd.unit(5), systemd.special(7), udev(7), modprobe.d(5), initramfs-tools(7),
dracut.conf(5). What goes into a text has been checked before: addresses, ids, module names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from vfiotool.boot.files import BootFile
from vfiotool.boot.places import (
    DRACUT_CONF,
    INITRAMFS_HOOK,
    LATE,
    MODPROBE,
    POLICY,
    SERVICE,
    UDEV_RULES,
    UNITS,
    WANTED,
)
from vfiotool.errors import UsageError

# Who must find the devices in place: networks, VM managers, and what would open a GPU.
BEFORE = (
    "network-pre.target",
    "libvirtd.service",
    "virtqemud.service",
    "virtnodedevd.service",
    "virtnetworkd.service",
    "libvirt-guests.service",
    "pve-guests.service",
    "incus.service",
    "lxd.service",
    "xendomains.service",
    "kubelet.service",
    "display-manager.service",
    "nvidia-persistenced.service",
)
AFTER = ("local-fs.target", "systemd-modules-load.service", "systemd-udev-trigger.service")
START_LIMIT_S = 180


# Made by `boot run` before it looks for devices: what appears earlier, that run finds itself.
STARTED = "run/vfiotool/boot-started"


@dataclass(frozen=True)
class LateRule:
    """Which events tell of a device that the policy wants: one udev rule for each action.

    `keys` are udev match keys as they are written (`KERNEL=="0000:05:01.0"`). `bind` is the event
    of a driver that has taken the device: VFs are made by their physical function's driver.
    """

    keys: tuple[str, ...]
    actions: tuple[str, ...] = ("add",)


def quote_argument(text: str) -> str:
    """One word of an ExecStart= line. Raises UsageError for what systemd could not carry."""
    if not text.isprintable():
        raise UsageError(f"{text[:80]!r} cannot stand in a unit file")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _exec_start(command: tuple[str, ...], *arguments: str) -> str:
    # The first word is a path, in which systemd expands no variables and wants no `$$`.
    first = quote_argument(command[0]).replace("$$", "$")
    return " ".join([first, *(quote_argument(word) for word in command[1:]), *arguments])


def service(command: tuple[str, ...], mounts: Iterable[str], wait_s: int) -> str:
    """The unit that applies the policy at boot.

    Without default dependencies: it must stand before network-pre.target, which cloud-init and
    others pull in front of sysinit.target, so an ordering after basic.target would be a cycle.
    """
    return f"""[Unit]
Description=Hand devices over as the vfiotool policy says
Documentation=man:vfiotool-boot(1)
DefaultDependencies=no
After={" ".join(AFTER)}
Before={" ".join(BEFORE)}
Wants=network-pre.target
Before=shutdown.target
Conflicts=shutdown.target
RequiresMountsFor={" ".join(quote_argument(path) for path in mounts)}
ConditionPathExists=/{POLICY}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={_exec_start(command, "boot", "run", "--wait", str(wait_s))}
TimeoutStartSec={START_LIMIT_S}
StandardOutput=journal
StandardError=journal

[Install]
WantedBy=multi-user.target
"""


def late_service(command: tuple[str, ...], mounts: Iterable[str]) -> str:
    """The unit that an event of a late device starts; the instance names the device."""
    return f"""[Unit]
Description=Hand over the late device %i as the vfiotool policy says
Documentation=man:vfiotool-boot(1)
DefaultDependencies=no
After={SERVICE} {" ".join(AFTER)}
Before=shutdown.target
Conflicts=shutdown.target
RequiresMountsFor={" ".join(quote_argument(path) for path in mounts)}
ConditionPathExists=/{POLICY}
StartLimitIntervalSec=0

[Service]
Type=oneshot
ExecStart={_exec_start(command, "boot", "run", "--late", '"%i"')}
TimeoutStartSec={START_LIMIT_S}
StandardOutput=journal
StandardError=journal
"""


def udev_rules(rules: Iterable[LateRule]) -> str:
    """Rules that start the late unit. No RUN: udev kills what works for long in its workers."""
    lines = ["# Installed by vfiotool boot enable; taken away by vfiotool boot disable."]
    lines += dict.fromkeys(
        _udev_line(action, rule.keys) for rule in rules for action in rule.actions
    )
    return "\n".join(lines) + "\n"


def _udev_line(action: str, keys: tuple[str, ...]) -> str:
    # systemd starts a wanted unit once for each time a device appears: a driver's coming is
    # another event, and so another instance.
    instance = "%k" if action == "add" else f"%k-{action}"
    matches = ", ".join([f'ACTION=="{action}"', *keys, f'TEST=="/{STARTED}"'])
    return f'{matches}, TAG+="systemd", ENV{{SYSTEMD_WANTS}}+="{LATE}@{instance}.service"'


def modprobe_conf(ids: Iterable[str], before: Iterable[str]) -> str:
    """Options and soft dependencies: vfio-pci loads first and takes the devices of these ids."""
    lines = ["# Installed by vfiotool boot enable --early; taken away by vfiotool boot disable."]
    lines.append(f"options vfio-pci ids={','.join(ids)}")
    lines += [f"softdep {module} pre: vfio-pci" for module in before]
    return "\n".join(lines) + "\n"


def initramfs_hook() -> str:
    """initramfs-tools: carry the modules; /etc/modprobe.d is copied by mkinitramfs itself."""
    return """#!/bin/sh
# Installed by vfiotool boot enable --early; taken away by vfiotool boot disable.
if [ "$1" = prereqs ]; then
    exit 0
fi
. /usr/share/initramfs-tools/hook-functions
manual_add_modules vfio_pci vfio vfio_iommu_type1
"""


def dracut_conf() -> str:
    """dracut: force_drivers loads before udev starts, with the options of modprobe.d."""
    return (
        "# Installed by vfiotool boot enable --early; taken away by vfiotool boot disable.\n"
        'force_drivers+=" vfio_pci vfio vfio_iommu_type1 "\n'
        f'install_items+=" /{MODPROBE} "\n'
    )


def unit_files(
    policy: str,
    command: tuple[str, ...],
    mounts: tuple[str, ...],
    late: Iterable[LateRule],
    wait_s: int,
) -> list[BootFile]:
    """What every `boot enable` installs."""
    return [
        BootFile(POLICY, policy),
        BootFile(f"{UNITS}/{SERVICE}", service(command, mounts, wait_s)),
        BootFile(f"{UNITS}/{LATE}@.service", late_service(command, mounts)),
        BootFile(UDEV_RULES, udev_rules(late)),
        BootFile(WANTED, link=f"../{SERVICE}"),
    ]


def early_files(
    ids: tuple[str, ...], before: tuple[str, ...], *, initramfs_tools: bool, dracut: bool
) -> list[BootFile]:
    """What `--early` adds, for the initramfs builders that this system has."""
    files = [BootFile(MODPROBE, modprobe_conf(ids, before))]
    if initramfs_tools:
        files.append(BootFile(INITRAMFS_HOOK, initramfs_hook(), 0o755))
    if dracut:
        files.append(BootFile(DRACUT_CONF, dracut_conf()))
    return files


def udev_value(text: str) -> str:
    """A udev match value in quotes. Raises UsageError for what is a pattern or breaks out."""
    if not text.isprintable() or set(text) & set('"\\*?[]|{}$%'):
        raise UsageError(f"{text[:80]!r} cannot stand in a udev rule")
    return json.dumps(text)
