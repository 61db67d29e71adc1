"""QEMU on this machine: where it is, what it can emulate, and whether KVM really works."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vfiotool.errors import KernelError, Unsupported
from vfiotool.lab import machines, needs
from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.cache import cache_root, digest, locked, progress
from vfiotool.lab.kernels.newer_qemu import newer_qemu

PROGRAM = "qemu-system-x86_64"
VFIO_USER = "vfio-user-pci"
KVM_NODE = Path("/dev/kvm")
KVM_TRIAL_S = 15.0


# The oldest whose command line is as ours: `-cpu max`, `-accel tcg,tb-size=`, `multidevs=`.
OLDEST = (6, 0)
# What `-device MODEL,help` does not list: every device has it, or its bus gives it.
_ALWAYS_THERE = frozenset({"id", "bus"})


@dataclass(frozen=True)
class Qemu:
    """A QEMU that can be started: command prefix, its environment, version, device models.

    `options` holds the properties of each model that a lab machine uses.
    """

    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    version: str
    models: frozenset[str]
    options: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def env(self) -> dict[str, str]:
        return {**os.environ, **dict(self.environment)}

    def lacks(self, device: machines.DeviceModel) -> str | None:
        """The model, or its first property, that this QEMU does not have; None if it has all."""
        if device.model not in self.models:
            return device.model
        known = self.options.get(device.model)
        if known is None:
            return None
        names = (key for key, _ in device.properties)
        lost = next((key for key in names if key not in known | _ALWAYS_THERE), None)
        return None if lost is None else f"{device.model},{lost}"

    def require(self, machine: machines.Machine) -> None:
        """Raise Unsupported that names what a guest of `machine` needs and this QEMU lacks."""
        needed = (*machines.iommu_devices(machine.iommu), *machine.devices, *machines.LAB_DEVICES)
        lost = dict.fromkeys(self.lacks(item) for item in needed if not item.optional)
        lost.pop(None, None)
        if lost:
            raise Unsupported(
                f"{self.command[0]} (QEMU {self.version}) has no "
                f"{', '.join(str(name) for name in lost)}, which machine {machine.name} needs",
                hint="take a QEMU with all device models (10.0 or newer has them), "
                "or another machine: vfiotool lab machines",
            )


@functools.cache
def find() -> Qemu:
    """The lab's own QEMU from the layer or, where that has none, this machine's.

    Raises Unsupported without one, and where it is too old.
    """
    if os.uname().machine != "x86_64":
        raise Unsupported(
            f"the lab runs x86-64 guests on x86-64 machines; this is {os.uname().machine}",
            hint="reading commands work here with --root on a snapshot",
        )
    folder = packages.layer()
    if folder is not None and (folder / "usr/bin" / PROGRAM).exists():
        return _not_too_old(_probe(*_from_layer(folder)))
    # An installed QEMU that is as new as the release's is not in the layer: it is used in place.
    found = shutil.which(PROGRAM, path=needs.search_path())
    if found is None:
        raise Unsupported(
            f"the lab needs {PROGRAM}, and can fetch it by itself on Debian only",
            hint="install QEMU for x86 (10.0 or newer for igb) with your package manager",
        )
    return _not_too_old(_probe((found,), ()))


def find_here(given: str | None = None) -> Qemu:
    """The QEMU that a user's own machines run on: `given`, the installed one, else the lab's.

    Raises Unsupported without one, and where it is too old.
    """
    found = shutil.which(given or PROGRAM, path=needs.search_path())
    if found is not None:
        return _not_too_old(_probe((found,), ()))
    if given is not None:
        raise Unsupported(f"{given[:200]} is not a program", hint="leave --qemu out")
    return find()


@functools.cache
def find_newer() -> Qemu:
    """A QEMU that has vfio-user devices: this machine's if it does, else one fetched for it.

    Raises Unsupported where there is none, KernelError.
    """
    with contextlib.suppress(Unsupported):
        usual = find()
        if VFIO_USER in usual.models:
            return usual
    return _probe(*newer_qemu())


def _from_layer(folder: Path) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Command and environment of the QEMU that is unpacked in the layer."""
    share = folder / "usr/share"
    command = [str(folder / "usr/bin" / PROGRAM)]
    for part in ("seabios", "qemu"):
        # What is installed here is not in the layer, QEMU's data and firmware among it.
        place = share / part if (share / part).is_dir() else Path("/usr/share") / part
        command += ["-L", str(place)]
    environment = {
        "LD_LIBRARY_PATH": packages.library_path(folder),
        "QEMU_MODULE_DIR": str(folder / "usr/lib/x86_64-linux-gnu/qemu"),
    }
    return tuple(command), tuple(environment.items())


def _not_too_old(qemu: Qemu) -> Qemu:
    numbers = tuple(int(part) for part in re.findall(r"\d+", qemu.version)[:2])
    if numbers and numbers < OLDEST:
        raise Unsupported(
            f"{qemu.command[0]} is QEMU {qemu.version}; the lab needs "
            f"{'.'.join(map(str, OLDEST))} or newer",
            hint="install a newer QEMU for x86 (10.0 or newer has every device)",
        )
    return qemu


def _probe(command: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> Qemu:
    """Ask QEMU for its version and device models, and remember the answer for this binary."""
    stamp = Path(command[0]).stat()
    used = sorted(machines.models_used())
    key = digest(*command, str(stamp.st_mtime_ns), str(stamp.st_size), *used)
    store = cache_root() / f"qemu-{key}.json"
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known is None:
        version = re.search(r"version (\S+)", _ask(command, environment, "-version"))
        text = _ask(command, environment, "-device", "help")
        models = re.findall(r'^name "([^"]+)"', text, flags=re.MULTILINE)
        options = {}
        for model in sorted(set(used) & set(models)):
            shown = _ask(command, environment, "-device", f"{model},help")
            options[model] = re.findall(r"^ +([\w.-]+)=", shown, flags=re.MULTILINE)
        known = {
            "version": version.group(1) if version else "unknown",
            "models": models,
            "options": options,
        }
        store.write_text(json.dumps(known), encoding="utf-8")
    properties = {model: frozenset(names) for model, names in known["options"].items() if names}
    return Qemu(command, environment, known["version"], frozenset(known["models"]), properties)


def _ask(command: tuple[str, ...], environment: tuple[tuple[str, str], ...], *question: str) -> str:
    """What QEMU prints for an option that makes it end at once. Raises KernelError."""
    try:
        done = subprocess.run(
            [*command, *question],
            env={**os.environ, **dict(environment)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{command[0]} does not start: {error}") from error
    if done.returncode:
        raise KernelError(
            f"{command[0]} does not start: {done.stderr.strip()[-300:]}",
            hint=f"see what it says: {command[0]} -version",
        )
    return done.stdout


@dataclass(frozen=True)
class Accelerator:
    """What QEMU runs guests with, and why: in a few words, and in those of the failed trial."""

    name: str
    reason: str
    detail: str = ""

    def arguments(self) -> list[str]:
        if self.name == "kvm":
            return ["-accel", "kvm", "-cpu", "host"]
        return ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,la57=off"]


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def accelerator(qemu: Qemu, image: Path) -> Accelerator:
    """KVM if a bounded trial boot of `image` showed that it works, TCG otherwise.

    The device node alone says little: it can exist and hang for ever. The answer is remembered
    until this machine boots again.
    """
    if not os.access(KVM_NODE, os.R_OK | os.W_OK):
        absent = "may not be opened" if KVM_NODE.exists() else "is not there"
        return Accelerator("tcg", f"{KVM_NODE} {absent}")
    store = cache_root() / "kvm.json"
    this_boot = boot_id()
    with locked("kvm"):
        try:
            known = json.loads(store.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        about = {"boot_id": this_boot, "qemu": qemu.version}
        if about.items() - known.items() or "detail" not in known:
            works, reason, detail = _try_kvm(qemu, image)
            known = {**about, "works": works, "reason": reason, "detail": detail}
            store.write_text(json.dumps(known), encoding="utf-8")
    return Accelerator("kvm" if known["works"] else "tcg", known["reason"], known["detail"])


def _try_kvm(qemu: Qemu, image: Path) -> tuple[bool, str, str]:
    """Boot `image` under KVM until its first console line; within KVM_TRIAL_S or not at all."""
    progress(f"trying KVM for at most {KVM_TRIAL_S:.0f} s")
    with tempfile.TemporaryDirectory(prefix="vfiotool-kvm-") as scratch:
        log = Path(scratch) / "console"
        command = [
            *died_with_parent(),
            *qemu.command,
            *Accelerator("kvm", "").arguments(),
            *("-nodefaults", "-no-reboot", "-display", "none", "-vga", "none", "-m", "512"),
            *("-machine", "q35", "-serial", f"file:{log}", "-kernel", str(image)),
            *("-append", "console=ttyS0 panic=-1"),
        ]
        child = subprocess.Popen(
            command,
            env=qemu.env(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + KVM_TRIAL_S
            while time.monotonic() < end:
                if log.exists() and b"Linux version" in log.read_bytes():
                    return True, "a trial boot worked", ""
                if child.poll() is not None:
                    assert child.stderr is not None
                    words = child.stderr.read().decode(errors="replace").strip()
                    last = words.rpartition("\n")[2] or f"exit code {child.returncode}"
                    return False, "KVM fails a trial boot", last
                time.sleep(0.05)
            return False, "KVM hangs in a trial boot", f"no output in {KVM_TRIAL_S:g} s"
        finally:
            child.kill()
            child.communicate()


def died_with_parent() -> Sequence[str]:
    """A prefix that has the kernel kill the command when this process ends, however it ends."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
