"""How this distribution sets kernel options, module options and its initramfs.

Each answer is a command that can be typed as it stands, or a sentence where there is none. Which
boot loader runs is told by what it left behind: GRUB passes `BOOT_IMAGE=` (grub-core/loader), an
EFI stub is given `initrd=\\…` by systemd-boot; a configuration file alone may be a leftover.
Sources: update-grub(8) and /etc/default/grub.d on Debian; grubby(8); proxmox-boot-tool;
kernel-install(8); mkinitcpio(8); dracut(8); bootctl(1); rpm-ostree(1) kargs; kernelstub(1);
nixos-rebuild(8); transactional-update(8); sdbootutil; Alpine's update-extlinux.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfiotool.host.host import Host
from vfiotool.host.paths import PROC_CMDLINE

_FAMILIES = {
    "debian": "debian",
    "ubuntu": "debian",
    "proxmox": "debian",
    "pop": "debian",
    "fedora": "fedora",
    "rhel": "fedora",
    "centos": "fedora",
    "arch": "arch",
    "suse": "suse",
    "opensuse": "suse",
    "sles": "suse",
    "alpine": "alpine",
    "gentoo": "gentoo",
    "nixos": "nixos",
}
_LOADER_ENTRIES = ("/boot/loader/entries", "/efi/loader/entries", "/boot/efi/loader/entries")
_GRUB = "/etc/default/grub"
_KERNEL_CMDLINE = "/etc/kernel/cmdline"
# How kernel-install(8) marks the entries that it writes; a person would write neither.
_GENERATED = re.compile(r"^(#.*(generated|created) by|machine-id\s)", re.MULTILINE)
_TRANSACTIONAL = ("microos", "micro", "aeon", "kalpa")


@dataclass(frozen=True, slots=True)
class Distribution:
    """`family`: debian, fedora, arch, suse, alpine, gentoo, nixos or unknown; `loader`: ostree,
    nixos, kernelstub, proxmox, proxmox-grub, grubby, grub, systemd-boot, extlinux, refind or
    unknown; `adding` and `removing`: commands with `{option}` in them; `initramfs`: the command
    that rebuilds it, or None; `grub_options`: what /etc/default/grub says, whoever boots."""

    name: str
    family: str
    loader: str
    adding: tuple[str, ...] = ()
    removing: tuple[str, ...] = ()
    initramfs: str | None = None
    grub_options: tuple[str, ...] = ()

    @property
    def on_grub(self) -> bool:
        """Whether /etc/default/grub is what the kernel's command line is made from."""
        return self.loader in ("grub", "proxmox-grub", "grubby")

    def kernel_option(self, option: str) -> tuple[str, ...]:
        """The commands that add an option to the kernel's command line for the next boot."""
        return tuple(command.replace("{option}", option) for command in self.adding) or (
            f"add {option} to the kernel's command line in the boot loader's settings",
        )

    def without_kernel_option(self, option: str) -> tuple[str, ...]:
        """The commands that take an option off the kernel's command line for the next boot."""
        return tuple(command.replace("{option}", option) for command in self.removing) or (
            f"remove {option} from the kernel's command line in the boot loader's settings",
        )

    def module_option(self, module: str, option: str) -> tuple[str, ...]:
        """The commands that set a module's option from its next loading on."""
        if self.family == "nixos":
            setting = f'boot.extraModprobeConfig = "options {module} {option}";'
            return (f"in /etc/nixos/configuration.nix: {setting}", "nixos-rebuild boot")
        write = f"echo 'options {module} {option}' >> /etc/modprobe.d/vfio.conf"
        return (write, *([self.initramfs] if self.initramfs else []))

    def module_hint(self, module: str) -> tuple[str, ...]:
        """The commands that load a module now and at each boot."""
        if self.family == "nixos":
            setting = f'boot.kernelModules = [ "{module}" ];'
            return (
                f"modprobe {module}",
                f"in /etc/nixos/configuration.nix: {setting}",
                "nixos-rebuild boot",
            )
        file = "/etc/modules" if self.family == "alpine" else "/etc/modules-load.d/vfio.conf"
        return (f"modprobe {module}", f"echo {module} >> {file}")


@dataclass(frozen=True, slots=True)
class _Loader:
    name: str
    adding: tuple[str, ...]
    removing: tuple[str, ...]


def read_distribution(host: Host) -> Distribution:
    """From os-release, the kernel's command line and the boot loader's files."""
    keys = {}
    for line in (host.read("/etc/os-release") or "").splitlines():
        name, separator, value = line.partition("=")
        if separator:
            keys[name] = value.strip().strip("\"'")
    ids = [keys.get("ID", ""), *keys.get("ID_LIKE", "").split()]
    family = next((_FAMILIES[name] for name in ids if name in _FAMILIES), "unknown")
    if family == "unknown" and any(name.startswith("opensuse") for name in ids):
        family = "suse"
    loader = _loader(host, family, ids)
    return Distribution(
        name=keys.get("PRETTY_NAME") or keys.get("ID") or "unknown distribution",
        family=family,
        loader=loader.name,
        adding=loader.adding,
        removing=loader.removing,
        initramfs=_initramfs(host, family, loader.name, ids),
        grub_options=_grub_options(host.read(_GRUB) or ""),
    )


def _loader(host: Host, family: str, ids: list[str]) -> _Loader:
    words = (host.read(PROC_CMDLINE) or "").split()
    by_grub = any(word.startswith("BOOT_IMAGE=") for word in words)
    by_stub = any(word.startswith("initrd=\\") for word in words)
    if host.exists("/run/ostree-booted") or any(word.startswith("ostree=") for word in words):
        return _ostree(host, family)
    if family == "nixos":
        return _NIXOS
    if host.exists("/etc/kernelstub/configuration") or host.exists("/usr/bin/kernelstub"):
        return _KERNELSTUB
    if host.exists("/etc/kernel/proxmox-boot-uuids"):
        # The file only says that the tool copies kernels to the EFI partitions.
        if by_grub or (host.exists(_GRUB) and not by_stub and not host.exists(_KERNEL_CMDLINE)):
            return _grub(host, family, ("proxmox-boot-tool refresh",), "proxmox-grub")
        return _file("proxmox", _KERNEL_CMDLINE, "proxmox-boot-tool refresh")
    if family == "fedora" and not by_stub and _has_grubby(host):
        return _grubby(host)
    if host.exists(_GRUB) and not by_stub:
        return _grub(host, family, (_grub_command(host, family, ids),), "grub")
    if host.exists("/etc/update-extlinux.conf"):
        return _EXTLINUX
    return _entries(host, family)


def _ostree(host: Host, family: str) -> _Loader:
    if family == "fedora" or host.exists("/usr/bin/rpm-ostree"):
        command = "rpm-ostree kargs"
    else:
        command = "ostree admin kargs edit-in-place"
    add, remove = f"{command} --append-if-missing={{option}}", f"{command} --delete-if-present="
    return _Loader("ostree", (add,), (f"{remove}{{option}}",))


_NIXOS = _Loader(
    "nixos",
    (
        'in /etc/nixos/configuration.nix: boot.kernelParams = [ "{option}" ];',
        "nixos-rebuild boot",
    ),
    (
        "remove {option} from boot.kernelParams in /etc/nixos/configuration.nix",
        "nixos-rebuild boot",
    ),
)
_KERNELSTUB = _Loader("kernelstub", ('kernelstub -a "{option}"',), ('kernelstub -d "{option}"',))
_EXTLINUX = _Loader(
    "extlinux",
    (
        "sed -i 's/^default_kernel_opts=\"/&{option} /' /etc/update-extlinux.conf",
        "update-extlinux",
    ),
    ("remove {option} from default_kernel_opts in /etc/update-extlinux.conf", "update-extlinux"),
)


def _has_grubby(host: Host) -> bool:
    """Every Fedora and RHEL has it; a tree that holds none of their programs does not say."""
    folders = ("/usr/sbin", "/usr/bin")
    if any(host.exists(f"{folder}/grubby") for folder in folders):
        return True
    return not any(host.listdir(folder) for folder in folders)


def _grubby(host: Host) -> _Loader:
    # On IBM Z the entries take effect when zipl has written the boot record.
    zipl = ("zipl",) if host.exists("/usr/sbin/zipl") else ()
    command = "grubby --update-kernel=ALL"
    add, remove = f'{command} --args="{{option}}"', f'{command} --remove-args="{{option}}"'
    return _Loader("grubby", (add, *zipl), (remove, *zipl))


def _grub(host: Host, family: str, refresh: tuple[str, ...], name: str) -> _Loader:
    text = host.read(_GRUB) or ""
    variable = "GRUB_CMDLINE_LINUX_DEFAULT"
    if family == "debian":
        line = f'{variable}="${variable} {{option}}"'
        add = f"echo '{line}' >> {_GRUB}.d/vfio.cfg"
    else:
        found = re.search(r"^(GRUB_CMDLINE_LINUX(?:_DEFAULT)?)=(['\"])", text, re.MULTILINE)
        if found is not None and not re.search(rf"^{variable}=['\"]", text, re.MULTILINE):
            variable = found[1]
        quote = re.search(rf"^{variable}=(['\"])", text, re.MULTILINE)
        # The file is a shell script: what it said before is kept.
        append = f"echo '{variable}=\"${variable} {{option}}\"' >> {_GRUB}"
        insert = f"sed -i 's/^{variable}=\"/&{{option}} /' {_GRUB}"
        if quote is None:
            add = append if text else f"grep -q '^{variable}=\"' {_GRUB} && {insert} || {append}"
        elif quote[1] == '"':
            add = insert
        else:
            add = f'sed -i "s/^{variable}=\'/&{{option}} /" {_GRUB}'
    remove = f"remove {{option}} from the kernel's command line in {_GRUB}"
    return _Loader(name, (add, *refresh), (remove, *refresh))


def _grub_command(host: Host, family: str, ids: list[str]) -> str:
    if family == "debian":
        return "update-grub"
    if family == "suse" and any(name.endswith(_TRANSACTIONAL) for name in ids):
        return "transactional-update grub.cfg"
    if family in ("suse", "fedora") or host.isdir("/boot/grub2"):
        command = "grub2-mkconfig -o /boot/grub2/grub.cfg"
        # Fedora's entries keep their own options unless it is told otherwise (10_linux, BLS).
        return f"{command} --update-bls-cmdline" if family == "fedora" else command
    return "grub-mkconfig -o /boot/grub/grub.cfg"


def _file(name: str, file: str, *refresh: str) -> _Loader:
    """A file with the whole command line in its first line."""
    return _Loader(
        name,
        (f"sed -i '1s/$/ {{option}}/' {file}", *refresh),
        (f"remove {{option}} from {file}", *refresh),
    )


def _entries(host: Host, family: str) -> _Loader:
    """systemd-boot, whose entries are written by hand, or by a program from /etc/kernel/cmdline."""
    folder = next(
        (
            folder
            for folder in _LOADER_ENTRIES
            if any(name.endswith(".conf") for name in host.listdir(folder))
        ),
        None,
    )
    names = [] if folder is None else [n for n in host.listdir(folder) if n.endswith(".conf")]
    generated = any(_GENERATED.search(host.read(f"{folder}/{name}") or "") for name in names)
    if folder is not None and not generated:
        return _Loader(
            "systemd-boot",
            (f"sed -i '/^options /s/$/ {{option}}/' {folder}/*.conf",),
            (f"remove {{option}} from the options of {folder}/*.conf",),
        )
    refresh = _entry_generator(host, family, has_entries=folder is not None)
    if host.exists(_KERNEL_CMDLINE):
        return _file("systemd-boot", _KERNEL_CMDLINE, refresh)
    if folder is not None:
        # What kernel-install falls back to, written down so that it can be added to.
        words = r"s/(^| )(initrd|BOOT_IMAGE)=[^ ]*//g"
        add = f"sed -E '{words}; s/$/ {{option}}/' {PROC_CMDLINE} > {_KERNEL_CMDLINE}"
        remove = f"sed -E '{words}; s/(^| ){{option}}( |$)/ /' {PROC_CMDLINE} > {_KERNEL_CMDLINE}"
        return _Loader("systemd-boot", (add, refresh), (remove, refresh))
    if host.exists("/boot/refind_linux.conf"):
        where = "the options in /boot/refind_linux.conf"
        return _Loader(
            "refind", (f"add {{option}} to {where}",), (f"remove {{option}} from {where}",)
        )
    return _Loader("unknown", (), ())


def _entry_generator(host: Host, family: str, *, has_entries: bool) -> str:
    """The program that writes entries or unified kernel images from /etc/kernel/cmdline."""
    for program in ("reinstall-kernels", "sdbootutil"):
        if host.exists(f"/usr/bin/{program}"):
            return "sdbootutil update-all-entries" if program == "sdbootutil" else program
    if family == "arch" and not has_entries:
        return _initramfs(host, family, "systemd-boot", []) or "mkinitcpio -P"
    return "kernel-install add-all"


def _grub_options(text: str) -> tuple[str, ...]:
    found = re.findall(r"^GRUB_CMDLINE_LINUX(?:_DEFAULT)?=(['\"])(.*?)\1", text, re.MULTILINE)
    return tuple(word for _, line in found for word in line.split())


def _initramfs(host: Host, family: str, loader: str, ids: list[str]) -> str | None:
    if loader == "ostree":
        return "rpm-ostree initramfs --enable" if family == "fedora" else None
    if family == "nixos":
        return "nixos-rebuild boot"
    if family == "suse" and any(name.endswith(_TRANSACTIONAL) for name in ids):
        return "transactional-update initrd"
    tools = (
        ("/usr/sbin/update-initramfs", "update-initramfs -u -k all"),
        ("/usr/bin/mkinitcpio", "mkinitcpio -P"),
        ("/usr/bin/dracut", "dracut --force --regenerate-all"),
        ("/usr/sbin/dracut", "dracut --force --regenerate-all"),
        ("/sbin/mkinitfs", "mkinitfs"),
    )
    for path, command in tools:
        if host.exists(path):
            return command
    by_family = {"debian": 0, "arch": 1, "fedora": 2, "suse": 2, "alpine": 4}
    return tools[by_family[family]][1] if family in by_family else None
