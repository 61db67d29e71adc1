"""How this distribution sets kernel options, module options and its initramfs.

Each answer is a command that can be typed as it stands. Sources: update-grub(8) and
/etc/default/grub.d on Debian; grubby(8); proxmox-boot-tool; kernel-install(8); mkinitcpio(8);
dracut(8); bootctl(1).
"""

from __future__ import annotations

from dataclasses import dataclass

from vfiotool.host.host import Host

_FAMILIES = {
    "debian": "debian",
    "ubuntu": "debian",
    "proxmox": "debian",
    "fedora": "fedora",
    "rhel": "fedora",
    "centos": "fedora",
    "arch": "arch",
    "suse": "suse",
    "opensuse": "suse",
    "sles": "suse",
}
_LOADER_ENTRIES = ("/boot/loader/entries", "/efi/loader/entries", "/boot/efi/loader/entries")


@dataclass(frozen=True, slots=True)
class Distribution:
    """`family`: debian, fedora, arch, suse or unknown; `loader`: grub, grubby, proxmox,
    systemd-boot or unknown; `initramfs`: the command that rebuilds it, or None."""

    name: str
    family: str
    loader: str
    entries: str | None
    initramfs: str | None

    def kernel_option(self, option: str) -> tuple[str, ...]:
        """The commands that add an option to the kernel's command line for the next boot."""
        if self.loader == "proxmox":
            return (f"sed -i '1s/$/ {option}/' /etc/kernel/cmdline", "proxmox-boot-tool refresh")
        if self.loader == "grubby":
            return (f'grubby --update-kernel=ALL --args="{option}"',)
        if self.loader == "systemd-boot":
            if self.entries is None:
                add = f"sed -i '1s/$/ {option}/' /etc/kernel/cmdline"
                return (add, self.initramfs or "kernel-install add-all")
            return (f"sed -i '/^options /s/$/ {option}/' {self.entries}/*.conf",)
        if self.loader != "grub":
            return (f"add {option} to the kernel's command line in the boot loader's settings",)
        if self.family == "debian":
            line = f'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT {option}"'
            return (f"echo '{line}' >> /etc/default/grub.d/vfio.cfg", "update-grub")
        edit = f"sed -i 's/^GRUB_CMDLINE_LINUX_DEFAULT=\"/&{option} /' /etc/default/grub"
        tool = "grub2-mkconfig" if self.family in ("suse", "fedora") else "grub-mkconfig"
        folder = tool.removesuffix("-mkconfig")
        return (edit, f"{tool} -o /boot/{folder}/grub.cfg")

    def module_option(self, module: str, option: str) -> tuple[str, ...]:
        """The commands that set a module's option from its next loading on."""
        write = f"echo 'options {module} {option}' >> /etc/modprobe.d/vfio.conf"
        return (write, *([self.initramfs] if self.initramfs else []))

    def module_hint(self, module: str) -> tuple[str, ...]:
        """The commands that load a module now and at each boot."""
        return (f"modprobe {module}", f"echo {module} >> /etc/modules-load.d/vfio.conf")


def read_distribution(host: Host) -> Distribution:
    """From os-release and the boot loader's files."""
    keys = {}
    for line in (host.read("/etc/os-release") or "").splitlines():
        name, separator, value = line.partition("=")
        if separator:
            keys[name] = value.strip().strip("\"'")
    ids = [keys.get("ID", ""), *keys.get("ID_LIKE", "").split()]
    family = next((_FAMILIES[name] for name in ids if name in _FAMILIES), "unknown")
    if family == "unknown" and any(name.startswith("opensuse") for name in ids):
        family = "suse"
    loader, entries = _loader(host, family)
    return Distribution(
        name=keys.get("PRETTY_NAME") or keys.get("ID") or "unknown distribution",
        family=family,
        loader=loader,
        entries=entries,
        initramfs=_initramfs(host, family),
    )


def _loader(host: Host, family: str) -> tuple[str, str | None]:
    if host.exists("/etc/kernel/proxmox-boot-uuids"):
        return "proxmox", None
    if family == "fedora" and host.exists("/usr/sbin/grubby"):
        return "grubby", None
    if host.exists("/etc/default/grub"):
        return "grub", None
    for folder in _LOADER_ENTRIES:
        if any(name.endswith(".conf") for name in host.listdir(folder)):
            return "systemd-boot", folder
    if host.exists("/etc/kernel/cmdline"):
        return "systemd-boot", None
    return "unknown", None


def _initramfs(host: Host, family: str) -> str | None:
    tools = (
        ("/usr/sbin/update-initramfs", "update-initramfs -u -k all"),
        ("/usr/bin/mkinitcpio", "mkinitcpio -P"),
        ("/usr/bin/dracut", "dracut --force --regenerate-all"),
        ("/usr/sbin/dracut", "dracut --force --regenerate-all"),
    )
    for path, command in tools:
        if host.exists(path):
            return command
    by_family = {"debian": tools[0][1], "arch": tools[1][1], "fedora": tools[2][1]}
    return by_family.get(family)
