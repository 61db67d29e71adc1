"""After a reboot: install, inspect and take away what applies a policy at boot.

`enable` installs the policy's copy, a unit ordered before networks and VM managers, a udev rule
for devices that come late, and with `early` what lets vfio-pci take devices inside the initramfs.
`disable` removes exactly that. All functions take the root, and touch nothing outside it.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vfiotool.boot.early import Early, plan_early, read_modaliases, read_modules
from vfiotool.boot.files import (
    BootFile,
    Manifest,
    changed_files,
    install,
    read_manifest,
    remove_installed,
)
from vfiotool.boot.places import MODPROBE, POLICY
from vfiotool.boot.texts import LateRule, early_files, udev_value, unit_files
from vfiotool.change.plans.bind import group_endpoints
from vfiotool.devices.pci import list_addresses, read_identity
from vfiotool.errors import Refused, Unsupported
from vfiotool.host.host import Host
from vfiotool.host.tree import follow_links
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.model import Match, Policy

WAIT_S = 10
_BUILDERS = (
    ("usr/sbin/update-initramfs", "update-initramfs -u -k all"),
    ("usr/bin/dracut", "dracut --force --regenerate-all"),
)
_IMAGES = ("initrd.img-*", "initramfs-*.img", "initramfs-*", "initrd-*")


@dataclass(frozen=True)
class Enabling:
    """What `enable` installs, what it cannot do and why, and what is left for the operator."""

    files: tuple[BootFile, ...]
    early: Early | None
    notes: tuple[str, ...]
    next: tuple[str, ...]


@dataclass(frozen=True)
class BootStatus:
    """What is installed below a root. `files` maps each path to ok, changed or missing;
    `stale_images` are initramfs images older than the settings that they should carry."""

    enabled: bool
    early: bool
    command: tuple[str, ...]
    files: dict[str, str]
    stale_images: tuple[str, ...]

    @property
    def in_order(self) -> bool:
        return all(state == "ok" for state in self.files.values()) and not self.stale_images


def own_command() -> tuple[str, ...]:
    """How a unit starts this vfiotool: its script by its resolved path, or the interpreter's `-m`.

    A link on the way could be turned to another program later, by whoever may write where it is.
    """
    script = Path(sys.argv[0])
    if script.name == "vfiotool" and script.is_file() and os.access(script, os.X_OK):
        return (os.path.realpath(script),)
    return (sys.executable, "-I", "-m", "vfiotool")


def own_places(command: tuple[str, ...]) -> tuple[str, ...]:
    """What the unit's command needs to be mounted: itself, this package, the interpreter."""
    package = str(Path(__file__).resolve().parent.parent)
    return tuple(dict.fromkeys([command[0], package, sys.prefix, sys.base_prefix]))


def called_as() -> tuple[str, ...]:
    """The path by which this program was called, as it was written; none without a file."""
    return (os.path.abspath(sys.argv[0]),) if os.path.isfile(sys.argv[0]) else ()


def refuse_foreign_places(paths: Iterable[str]) -> None:
    """Raise Refused if another user than root could change what root would run at boot.

    Looks at each path as it is written and as it resolves: every folder and every link on the way,
    and each link's target; a sticky folder such as /tmp is as safe as what lies in it.
    """
    for path in paths:
        for part in dict.fromkeys(_walked(os.path.abspath(path))):
            facts = os.lstat(part)
            sticky = stat.S_ISDIR(facts.st_mode) and facts.st_mode & stat.S_ISVTX
            writable = facts.st_mode & 0o022 and not stat.S_ISLNK(facts.st_mode)
            if facts.st_uid != 0 or (writable and not sticky):
                raise Refused(
                    f"{part} can be changed by others than root, and root would run what is in it "
                    "at every boot",
                    hint="install vfiotool where only root can write, such as /opt or /usr/local",
                )


def _walked(path: str) -> list[str]:
    """Every file, folder and link that leads to what `path` names. Raises OSError."""
    seen = ["/"]

    def target_of(part: str) -> str | None:
        seen.append(part)
        return os.readlink(part) if os.path.islink(part) else None

    follow_links(path, target_of)
    return seen


def late_rules(host: Host, policy: Policy) -> tuple[LateRule, ...]:
    """The events after which the policy has to be applied again."""
    rules = [LateRule(_match_keys(host, rule.match)) for rule in policy.devices]
    for rule in policy.sriov:
        rules.append(LateRule(_match_keys(host, rule.match), ("add", "bind")))
        if rule.vf:
            rules.append(LateRule(('SUBSYSTEM=="pci"', 'TEST=="physfn"')))
    for mdev in policy.mdevs:
        # The kernel's own event of a new parent (drivers/vfio/mdev/mdev_core.c).
        state = 'ENV{MDEV_STATE}=="registered"'
        rules.append(LateRule((f"KERNEL=={udev_value(mdev.parent)}", state), ("change",)))
    for vdpa in policy.vdpas:
        device = vdpa.parent.rpartition("/")[2]
        rules.append(LateRule((f"KERNEL=={udev_value(device)}",), ("add", "bind")))
    return tuple(dict.fromkeys(rules))


def _match_keys(host: Host, match: Match) -> tuple[str, ...]:
    keys = ['SUBSYSTEM=="pci"']
    if match.address is not None:
        return (*keys, f"KERNEL=={udev_value(match.address)}")
    if match.id is not None:
        names = ("vendor", "device", "subsystem_vendor", "subsystem_device")
        pairs = zip(names, match.id.split(":"), strict=False)
        return (*keys, *(f'ATTR{{{name}}}=="0x{value}"' for name, value in pairs))
    if match.pf is not None:
        return (*keys, 'TEST=="physfn"')
    # A serial number, slot or path shows only when the device is there: look at each newcomer.
    return (*keys, 'ATTR{class}!="0x06*"')


def early_of(host: Host, policy: Policy) -> Early:
    """What the early variant can do for the policy's device rules on this host."""
    found = read_policy_facts(host, replace(policy, sriov=(), mdevs=(), vdpas=()))
    wanted: dict[str, str] = {}
    ids = []
    for rule, names in zip(policy.devices, found.devices, strict=True):
        for name in names:
            if name not in found.facts.devices:
                continue
            chosen = group_endpoints(found.facts, name) if rule.group == "whole" else (name,)
            for address in chosen:
                wanted[address] = rule.driver or found.facts.device(address).best_driver
        if rule.match == Match(id=rule.match.id) and rule.driver in (None, "vfio-pci"):
            ids += [rule.match.id] if rule.match.id and rule.match.id.count(":") == 1 else []
    read = (read_identity(host, address) for address in list_addresses(host))
    functions = [function for function in read if function is not None]
    modaliases = read_modaliases(host, wanted)
    return plan_early(wanted, ids, functions, modaliases, read_modules(host))


def plan_enabling(
    host: Host,
    root: str,
    policy: Policy,
    command: tuple[str, ...],
    places: Iterable[str],
    *,
    early: bool = False,
    wait_s: int = WAIT_S,
) -> Enabling:
    """What `enable` would install; nothing is written.

    Raises Unsupported if `early` was asked for and nothing of the policy can be taken early.
    """
    mounts = tuple(dict.fromkeys([*places, f"/{POLICY}"]))
    files = unit_files(policy.text, command, mounts, late_rules(host, policy), wait_s)
    if not early:
        return Enabling(tuple(files), None, (), ())
    found = early_of(host, policy)
    notes = [f"{device}: not early, {why}" for device, why in found.left]
    if not found.ids:
        raise Unsupported(
            "nothing of this policy can be taken early"
            + "".join(f"; {note}" for note in notes[:4]),
            hint="leave --early out: the unit takes the devices before networks and VM managers",
        )
    if found.vfio_built_in:
        notes.append(
            "vfio-pci is built into this kernel: modprobe.d is not read, only the kernel's command "
            f"line counts; add {found.kernel_words}"
        )
        return Enabling(tuple(files), found, tuple(notes), _command_line(root, found))
    base = Path(root)
    files += early_files(
        found.ids,
        found.soft_dependencies,
        initramfs_tools=(base / "etc/initramfs-tools").is_dir(),
        dracut=(base / "etc/dracut.conf.d").is_dir(),
    )
    if not found.aliases_known:
        notes.append(
            "the kernel's modules.alias could not be read: no soft dependencies were written, so "
            "another driver may be faster"
        )
    notes.append(f"the kernel's command line can do the same: {found.kernel_words}")
    builders = tuple(text for path, text in _BUILDERS if (base / path).exists())
    if not builders:
        notes.append("no initramfs builder is known here: rebuild the initramfs by hand")
    return Enabling(tuple(files), found, tuple(notes), builders[:1])


def _command_line(root: str, early: Early) -> tuple[str, ...]:
    words = early.kernel_words
    base = Path(root)
    if (base / "etc/default/grub").exists():
        sed = f"""sed -i 's/^GRUB_CMDLINE_LINUX="/&{words} /' /etc/default/grub"""
        return (sed, "update-grub")
    if (base / "etc/kernel/cmdline").exists():
        return (f"sed -i 's/$/ {words}/' /etc/kernel/cmdline", "kernel-install add-all")
    return (f"add to the boot loader's kernel options: {words}",)


def enable(root: str, enabling: Enabling, command: tuple[str, ...]) -> Manifest:
    """Install. Raises Refused for strangers' files and planted links, before anything is written.

    The caller has systemd and udev read their files again (`reload`) where `root` is the host's.
    """
    settings: dict[str, Any] = {
        "early": enabling.early is not None,
        "ids": list(enabling.early.ids) if enabling.early else [],
        "command": list(command),
    }
    return install(root, enabling.files, settings)


def disable(root: str, *, changed_too: bool = False) -> tuple[list[str], list[str], bool]:
    """Remove what was installed: (paths removed, paths kept as somebody changed them, whether
    initramfs images still carry the early settings)."""
    manifest = read_manifest(root)
    early = manifest is not None and any(path == MODPROBE for path, _ in manifest.files)
    removed, kept = remove_installed(root, changed_too=changed_too)
    return removed, kept, early


def rebuild_commands(root: str) -> tuple[str, ...]:
    """The command that rebuilds this system's initramfs images, if one is known."""
    base = Path(root)
    return tuple(text for path, text in _BUILDERS if (base / path).exists())[:1]


def read_status(root: str) -> BootStatus:
    """What is installed below `root`, and whether it still is as it was installed."""
    manifest = read_manifest(root)
    if manifest is None:
        return BootStatus(False, False, (), {}, ())
    wrong = changed_files(root, manifest)
    files = {path: wrong.get(path, "ok") for path in manifest.digests()}
    early = MODPROBE in files
    return BootStatus(
        enabled=True,
        early=early,
        command=tuple(str(word) for word in manifest.settings.get("command", [])),
        files=files,
        stale_images=_stale_images(root) if early else (),
    )


def _stale_images(root: str) -> tuple[str, ...]:
    base = Path(root)
    try:
        since = (base / MODPROBE).stat().st_mtime
    except OSError:
        return ()
    images = {path for pattern in _IMAGES for path in (base / "boot").glob(pattern)}
    return tuple(
        sorted(str(path.relative_to(base)) for path in images if path.stat().st_mtime < since)
    )
