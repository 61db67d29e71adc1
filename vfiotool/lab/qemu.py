"""QEMU on this machine: where it is, what it can emulate, and whether KVM really works."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vfiotool.errors import KernelError, Unsupported
from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.cache import cache_root, digest, locked, progress

PROGRAM = "qemu-system-x86_64"
KVM_NODE = Path("/dev/kvm")
KVM_TRIAL_S = 15.0


@dataclass(frozen=True)
class Qemu:
    """A QEMU that can be started: command prefix, its environment, version, device models."""

    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    version: str
    models: frozenset[str]

    def env(self) -> dict[str, str]:
        return {**os.environ, **dict(self.environment)}


@functools.cache
def find() -> Qemu:
    """The lab's own QEMU from the layer, or else this machine's. Raises Unsupported without one."""
    if os.uname().machine != "x86_64":
        raise Unsupported(
            f"the lab runs x86-64 guests on x86-64 machines; this is {os.uname().machine}",
            hint="reading commands work here with --root on a snapshot",
        )
    folder = packages.layer()
    if folder is not None:
        share = folder / "usr/share"
        command = [str(folder / "usr/bin" / PROGRAM)]
        for part in ("seabios", "qemu"):
            command += ["-L", str(share / part)]
        environment = {
            "LD_LIBRARY_PATH": packages.library_path(folder),
            "QEMU_MODULE_DIR": str(folder / "usr/lib/x86_64-linux-gnu/qemu"),
        }
        return _probe(tuple(command), tuple(environment.items()))
    found = shutil.which(PROGRAM)
    if found is None:
        raise Unsupported(
            f"the lab needs {PROGRAM}, and can fetch it by itself on Debian only",
            hint="install QEMU for x86 (10.0 or newer for igb) with your package manager",
        )
    return _probe((found,), ())


def _probe(command: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> Qemu:
    """Ask QEMU for its version and device models, and remember the answer for this binary."""
    stamp = Path(command[0]).stat()
    store = cache_root() / f"qemu-{digest(command[0], str(stamp.st_mtime_ns))}.json"
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known is None:
        text = {}
        for option in ("-version", "-device help"):
            done = subprocess.run(
                [*command, *option.split()],
                env={**os.environ, **dict(environment)},
                capture_output=True,
                text=True,
                timeout=60,
            )
            if done.returncode:
                raise KernelError(
                    f"{command[0]} does not start: {done.stderr.strip()[-300:]}",
                    hint="remove the lab's cache folder and try again",
                )
            text[option] = done.stdout
        version = re.search(r"version (\S+)", text["-version"])
        models = re.findall(r'^name "([^"]+)"', text["-device help"], flags=re.MULTILINE)
        known = {"version": version.group(1) if version else "unknown", "models": models}
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(known), encoding="utf-8")
    return Qemu(command, environment, known["version"], frozenset(known["models"]))


@dataclass(frozen=True)
class Accelerator:
    """What QEMU runs guests with, and why."""

    name: str
    reason: str

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
        if known.get("boot_id") != this_boot or known.get("qemu") != qemu.version:
            works, reason = _try_kvm(qemu, image)
            known = {"boot_id": this_boot, "qemu": qemu.version, "works": works, "reason": reason}
            store.write_text(json.dumps(known), encoding="utf-8")
    return Accelerator("kvm" if known["works"] else "tcg", known["reason"])


def _try_kvm(qemu: Qemu, image: Path) -> tuple[bool, str]:
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
                    return True, "a trial boot worked"
                if child.poll() is not None:
                    assert child.stderr is not None
                    words = child.stderr.read().decode(errors="replace").strip()
                    last = words.rpartition("\n")[2] or f"exit code {child.returncode}"
                    return False, f"KVM's trial boot failed: {last}"
                time.sleep(0.05)
            return False, f"{KVM_NODE} exists, but a trial boot hung for {KVM_TRIAL_S:g} s"
        finally:
            child.kill()
            child.communicate()


def died_with_parent() -> Sequence[str]:
    """A prefix that has the kernel kill the command when this process ends, however it ends."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
