"""The parts of a rehearsal, played in the twin by `python -m vfiotool.lab.inside.rehearsal`.

The parts are functions of `_PARTS`. Each line of standard input has a JSON object: `part` is which
one, `policy` a file's path, `devices` what the policy takes, `mark` those of them on which the
second start is looked at. What each command did is printed as one JSON object a line: name, exit
code (null: it did not end in time), seconds, what it printed; after a part `end` with its name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from vfiotool.lab.inside.forked import ForkedCommand

VM = "vfiotool.lab.inside.vm"
PCI = Path("/sys/bus/pci/devices")
STATE = Path("/run/vfiotool")
AWAY = Path("/run/vfiotool.away")
BEFORE = Path("/run/rehearsal.json")
HOLDER = Path("/run/rehearsal.holder")
# A command that waits for a device longer than this is given up; a guest that is emulated on a busy
# machine can be slow.
COMMAND_LIMIT_S = 120.0
WRITE_LIMIT_S = 5
# The kernel waits 60 s for a device that is gone, and so does who reads its configuration space.
STUCK_LIMIT_S = 25.0
QEMU_LIMIT_S = 60.0
# A start is given up this long after the kernel began to wait for a device (it waits 60 s).
_LOOK_S = 2.0
_HANGS_S = 6.0
_WATCHED = ("driver_override", "sriov_numvfs", "sriov_drivers_autoprobe")


class Part:
    """What a part is played with."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.policy: str = told["policy"]
        self.devices: list[str] = told.get("devices", [])
        self.mark: list[str] = told.get("mark", [])
        self.with_qemu: bool = told.get("qemu", True)

    def tool(
        self, *words: str, name: str | None = None, limit_s: float = COMMAND_LIMIT_S
    ) -> dict[str, Any]:
        """Run a command of vfiotool with --json, and report it."""
        return played(name or words[0], tool(*words), limit_s)


class Child(Protocol):
    """A command that runs: of Popen's interface what is used here."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float) -> int: ...

    def kill(self) -> None: ...


Start = Callable[[BinaryIO, BinaryIO], Child]


def tool(*words: str) -> Start:
    """A command of vfiotool."""
    return lambda out, error: ForkedCommand(["--json", *words], out, error)


def program(*words: str) -> Start:
    """Any other program."""
    return lambda out, error: subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=out, stderr=error
    )


@dataclass(frozen=True)
class Ran:
    """What a command did; `code` is None where it did not end."""

    code: int | None
    seconds: float
    out: bytes
    error: bytes
    pid: int


def run(start: Start, limit_s: float, hopeless: Callable[[], bool] = lambda: False) -> Ran:
    """Run a command to its end, to its limit, or until it is `hopeless`."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        child = start(out, error)
        code: int | None = None
        while code is None:
            left = limit_s - (time.monotonic() - begun)
            try:
                code = child.wait(max(0.0, min(_LOOK_S, left)))
            except subprocess.TimeoutExpired:
                if left <= _LOOK_S or hopeless():
                    # It may wait in the kernel, where no signal ends it: it is left behind.
                    child.kill()
                    break
        texts = []
        for file in (out, error):
            file.seek(0)
            texts.append(file.read())
    return Ran(code, time.monotonic() - begun, texts[0], texts[1], child.pid)


def played(
    name: str, start: Start, limit_s: float, hopeless: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """`run` a command, and report it."""
    ran = run(start, limit_s, hopeless)
    return {**report(name, ran.code, ran.seconds, ran.out, ran.error), "pid": ran.pid}


def report(
    name: str, code: int | None, seconds: float, out: bytes = b"", error: bytes = b""
) -> dict[str, Any]:
    """Print what a command did, and return it."""
    try:
        found = json.loads(out) if out.strip() else None
    except ValueError:
        found = None
    done = {
        "name": name,
        "exit_code": code,
        "seconds": round(seconds, 1),
        "json": found,
        "text": error.decode(errors="replace")[-600:],
    }
    print(json.dumps(done), flush=True)
    return done


def state() -> dict[str, Any]:
    """What a policy can change, as sysfs has it."""
    return {path.name: of(path) for path in sorted(PCI.iterdir())}


def of(path: Path) -> list[str | None]:
    """What of one function a policy can change."""
    return [_driver(path), *(_read(path / name) for name in _WATCHED)]


def _driver(path: Path) -> str | None:
    link = path / "driver"
    return os.readlink(link).rpartition("/")[2] if link.is_symlink() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def compare() -> None:
    """Report what is not as it was before the rehearsal began."""
    before, now = json.loads(BEFORE.read_text(encoding="utf-8")), state()
    changed = {name: [before.get(name), now.get(name)] for name in before | now}
    changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    row = {"name": "compare", "exit_code": int(bool(changed)), "json": changed}
    print(json.dumps(row), flush=True)


def as_planned(part: Part) -> None:
    """The policy's life: applied, handed over twice, taken back."""
    BEFORE.write_text(json.dumps(state()), encoding="utf-8")
    planned = part.tool("plan", part.policy)
    if planned["exit_code"] not in (0, 4):
        return
    steps = (planned["json"] or {}).get("steps", [])
    applied = part.tool("apply", part.policy)
    if applied["exit_code"] == 0:
        # A device that is to be made, as a virtual function, is there now.
        wanted = [step["target"] for step in steps if step["verb"] == "bind-driver"]
        part.devices = [one for one in wanted if (PCI / one).exists()]
        part.tool("status", part.policy)
        if "serial" in Path(part.policy).read_text(encoding="utf-8"):
            _status_after_a_reboot(part)
        if part.devices:
            part.tool("vm", "check", *part.devices, name="vm check")
            if start(part)["exit_code"] is None:
                report("kernel log", 0, 0.0, b"", waited_for().encode())
                return
            if part.with_qemu:
                nested(part)
        part.tool("undo")
    compare()


def _status_after_a_reboot(part: Part) -> None:
    """A reboot empties /run; what vfio-pci takes early then never was on its host driver."""
    STATE.rename(AWAY)
    try:
        part.tool("status", part.policy, name="status after a reboot")
    finally:
        shutil.rmtree(STATE, ignore_errors=True)
        AWAY.rename(STATE)


def start(part: Part) -> dict[str, Any]:
    """Both starts of what stands in for a VM."""
    words = []
    for address in part.mark:
        if address in part.devices:
            words += ["--mark", address]
    since: list[float] = []

    def hangs() -> bool:
        if not since and waited_for():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] > _HANGS_S

    words += part.devices
    both = partial(ForkedCommand, words, module=VM)
    done = played("start twice", both, COMMAND_LIMIT_S, hangs)
    HOLDER.write_text(str(done["pid"]), encoding="utf-8")
    return done


def waited_for() -> str:
    """What the kernel says of devices that do not come back (drivers/pci/pci.c, pci_dev_wait)."""
    done = subprocess.run(["dmesg"], capture_output=True, check=False)
    lines = done.stdout.decode(errors="replace").splitlines()
    return "\n".join(line for line in lines if "not ready" in line or "giving up" in line)


def nested(part: Part) -> None:
    """A QEMU of the guest's own opens the devices, as `vm qemu` has it."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        report("qemu", 127, 0.0)
        return
    told = run(tool("vm", "qemu", *part.devices), COMMAND_LIMIT_S)
    if told.code != 0:
        report("qemu", told.code, told.seconds, told.out, told.error)
        return
    line = [qemu, "-machine", "q35,accel=tcg", "-m", "64", "-nodefaults", "-display", "none"]
    # Stopped: realizing its devices opens, maps and resets them; its monitor has no more input.
    line += ["-S", "-monitor", "stdio", *json.loads(told.out)["arguments"]]
    played("qemu", program("sh", "-c", 'echo quit | exec "$@"', "sh", *line), QEMU_LIMIT_S)


def killed(part: Part) -> None:
    """The change is killed as soon as anything of the host has changed."""
    before, begun = state(), time.monotonic()
    watched = {name: before[name] for name in part.devices if name in before} or before
    with open(os.devnull, "r+b") as nothing:
        child = ForkedCommand(["--json", "apply", part.policy], nothing, nothing)
    while child.poll() is None:
        late = time.monotonic() - begun > COMMAND_LIMIT_S
        if late or any(of(PCI / name) != was for name, was in watched.items()):
            child.kill()
            child.wait(COMMAND_LIMIT_S)
            break
        # Often enough for a step of some milliseconds, and little of a guest's one processor.
        time.sleep(0.001)
    report("apply, killed", child.returncode, time.monotonic() - begun)
    done = part.tool("recover")
    if done["exit_code"] == 0 and child.returncode == 0:
        # It was over before the signal came.
        part.tool("undo")
    compare()


def held(part: Part) -> None:
    """Applied, and a process has the devices open."""
    if part.tool("apply", part.policy)["exit_code"]:
        return
    begun = time.monotonic()
    with open("/run/rehearsal.out", "w+b") as out:
        child = ForkedCommand(["--hold", *part.devices], out, out, module=VM)
        while child.poll() is None and time.monotonic() - begun < COMMAND_LIMIT_S:
            if Path(out.name).stat().st_size:
                break
            time.sleep(0.05)
    HOLDER.write_text(str(child.pid), encoding="utf-8")
    report("start", 0 if child.poll() is None else 5, time.monotonic() - begun)


def let_go(part: Part) -> None:
    """The process is killed, and the change taken back while its device does not let go."""
    os.kill(int(HOLDER.read_text(encoding="utf-8")), 9)
    undo(part)


def undo(part: Part) -> None:
    part.tool("undo", "--timeout", str(WRITE_LIMIT_S), limit_s=STUCK_LIMIT_S)


def after(part: Part) -> None:
    """Once the device answers again: what is half done is ended, and the rest taken back."""
    begun = time.monotonic()
    while _lives(int(HOLDER.read_text(encoding="utf-8"))):
        if time.monotonic() - begun > COMMAND_LIMIT_S:
            break
        time.sleep(0.5)
    while True:
        done = part.tool("recover")
        if done["exit_code"] == 0 or time.monotonic() - begun > COMMAND_LIMIT_S:
            break
        time.sleep(1.0)
    if BEFORE.read_text(encoding="utf-8") != json.dumps(state()):
        part.tool("undo", "--timeout", "60")
    compare()


def _lives(pid: int) -> bool:
    """Whether a process is there still: one that was killed ends when the kernel lets it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


_PARTS: dict[str, Callable[[Part], None]] = {
    "as-planned": as_planned,
    "killed": killed,
    "held": held,
    "let-go": let_go,
    "undo": undo,
    "after": after,
}


def main() -> None:
    """Play one part after another, as they are asked for."""
    for line in sys.stdin:
        told = json.loads(line)
        _PARTS[told["part"]](Part(told))
        print(json.dumps({"end": told["part"]}), flush=True)


if __name__ == "__main__":
    main()
