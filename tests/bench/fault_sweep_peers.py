"""The fault sweep from outside: driverctl, mdevctl and vfiotool under strace's fault injection.

Run on the host it boots lab guests and prints one table; what runs in a guest is `in_guest`. Each
case lets one tool do one job while strace fails its open(2) or write(2) of one file, once or
always, or swallows the write and reports success. Then the state is compared:

    before   as it was           after   as it was asked for
    broken   neither             false   the exit code says otherwise than the state

vfiotool's interpreter is forked from a parent that has it imported already, since an interpreter
under strace takes seconds to start; the fork waits for strace before it does anything.

    python tests/bench/fault_sweep_peers.py
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ERRNOS = ("EBUSY", "EIO", "ENODEV", "ENOMEM", "EACCES")
DISK = "0000:01:00.0"
PCI = "/sys/bus/pci"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
MTTY = "/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-1/create"
FILES = ("saved", "definition", "policy")
RUNS = (("storage", "disk"), ("mdev", "mdev"))
CASE_LIMIT_S = 120


@dataclass(frozen=True)
class Case:
    """One fault: which files it hits (all spellings of one), at which call, and how."""

    place: str
    paths: tuple[str, ...]
    call: str
    fault: str
    always: bool

    def inject(self, length: int) -> str:
        when = "1+" if self.always else "1"
        what = f"retval={length}" if self.fault == "swallowed" else f"error={self.fault}"
        return f"inject={self.call}:{what}:when={when}"

    def options(self, length: int) -> list[str]:
        paths = [word for path in self.paths for word in ("-P", path)]
        return [
            "-f",
            "-qqq",
            "-o",
            "/dev/null",
            *paths,
            "-e",
            f"trace={self.call}",
            "-e",
            self.inject(length),
        ]


def cases(places: dict[str, tuple[str, ...]]) -> list[Case]:
    found = []
    for place, paths in places.items():
        for call in ("openat", "write"):
            # sysfs does take writes without effect; a file system that did would be broken.
            lies = call == "write" and place not in FILES
            for fault in (*ERRNOS, *(("swallowed",) if lies else ())):
                found += [Case(place, paths, call, fault, always) for always in (False, True)]
    return found


@dataclass(frozen=True)
class Job:
    """What a tool is asked to do: how to run it under a fault, what the state is, how to reset."""

    tool: str
    run: Callable[[Case], int]
    state: Callable[[], str]
    reset: Callable[[], None]
    places: dict[str, tuple[str, ...]]
    settle: Callable[[], None] = lambda: None


def sweep(job: Job) -> dict[str, object]:
    """Run every case of a job; returns its counts and what was seen of each broken one."""
    counts: Counter[str] = Counter()
    seen: list[str] = []
    # Without a fault the job must get done: else "before" would mean nothing.
    job.reset()
    code = job.run(Case("nowhere", ("/nowhere",), "write", "EIO", False))
    assert (code, job.state()) == (0, "after"), f"{job.tool}: {code}, {job.state()} without a fault"
    for case in cases(job.places):
        job.reset()
        before = job.state()
        assert before == "before", f"{job.tool}: the reset left {before}"
        code = job.run(case)
        state = job.state()
        if code == 6:
            # A declared stuck state: the tool names the way out, which has to lead out.
            job.settle()
            state = job.state()
            counts["declared"] += 1
        word = state if state in ("before", "after") else "broken"
        counts[word] += 1
        if (code == 0) != (state == "after") and code != 6:
            counts["false"] += 1
        if word == "broken" or (code == 0) != (state == "after"):
            always = " always" if case.always else ""
            seen.append(f"{case.call} {case.place} {case.fault}{always}: exit {code}, {state}")
        print(f"{job.tool} {case.place} {case.call} {case.fault}: {code} {state}", file=sys.stderr)
    job.reset()
    return {
        "tool": job.tool,
        "cases": sum(counts[word] for word in ("before", "after", "broken")),
        **counts,
        "seen": seen,
    }


# Running under strace


def run_command(command: list[str], lengths: dict[str, int]) -> Callable[[Case], int]:
    """`lengths` gives what a write to each place takes, for the swallowed ones."""

    def run(case: Case) -> int:
        options = case.options(lengths.get(case.place, 1))
        try:
            done = subprocess.run(
                ["strace", *options, *command],
                capture_output=True,
                timeout=CASE_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return -1
        return done.returncode

    return run


def run_forked(act: Callable[[], int], lengths: dict[str, int]) -> Callable[[Case], int]:
    """`act` in a fork of this process, which strace attaches to before it begins."""

    def run(case: Case) -> int:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            code = 70
            try:
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                code = act()
            finally:
                os._exit(code)
        os.waitpid(child, os.WUNTRACED)
        options = case.options(lengths.get(case.place, 1))
        strace = subprocess.Popen(
            ["strace", *options, "-p", str(child)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: "TracerPid:\t0" not in Path(f"/proc/{child}/status").read_text())
        os.kill(child, signal.SIGCONT)
        status = wait_for_child(child)
        strace.terminate()
        strace.wait()
        return status

    return run


def wait_for(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "a condition was waited for in vain"
        time.sleep(0.01)


def wait_for_child(child: int) -> int:
    deadline = time.monotonic() + CASE_LIMIT_S
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


# A disk to vfio-pci


def driver() -> str | None:
    try:
        return os.readlink(f"{PCI}/devices/{DISK}/driver").rpartition("/")[2]
    except OSError:
        return None


def override() -> str:
    return Path(f"{PCI}/devices/{DISK}/driver_override").read_text().strip()


def put(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def reset_disk() -> None:
    shutil.rmtree("/run/vfiotool", ignore_errors=True)
    shutil.rmtree("/etc/driverctl.d", ignore_errors=True)
    put(f"{PCI}/devices/{DISK}/driver_override", "\n")
    if driver() != "nvme":
        if driver() is not None:
            put(f"{PCI}/devices/{DISK}/driver/unbind", DISK)
        put(f"{PCI}/drivers_probe", DISK)
    wait_for(lambda: driver() == "nvme")


def disk_state(saved: bool) -> Callable[[], str]:
    """With `saved` the tool also keeps what it was asked for, and that is part of the state."""

    def state() -> str:
        kept = Path(f"/etc/driverctl.d/pci-{DISK}")
        text = kept.read_text().strip() if kept.exists() else None
        found = (driver(), override(), text)
        if found == ("nvme", "(null)", None):
            return "before"
        if found == ("vfio-pci", "vfio-pci", "vfio-pci" if saved else None):
            return "after"
        return f"driver {found[0]}, override {found[1]}, saved {found[2]}"

    return state


def disk_jobs() -> Iterable[Job]:
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    places = {
        "driver_override": (f"{PCI}/devices/{DISK}/driver_override",),
        "unbind": (f"{PCI}/drivers/nvme/unbind", f"{PCI}/devices/{DISK}/driver/unbind"),
        "drivers_probe": (f"{PCI}/drivers_probe",),
    }
    # driverctl writes with echo, so with a newline; vfiotool without, but for the override.
    theirs = {"driver_override": len("vfio-pci\n"), "unbind": 13, "drivers_probe": 13}
    saving = {**places, "saved": (f"/etc/driverctl.d/pci-{DISK}",)}
    command = ["driverctl", "set-override", DISK, "vfio-pci"]
    yield Job(
        "driverctl",
        run_command(command, {**theirs}),
        disk_state(saved=True),
        reset_disk,
        saving,
    )
    ours = {"driver_override": len("vfio-pci\n"), "unbind": 12, "drivers_probe": 12}
    yield Job(
        "vfiotool bind",
        run_forked(lambda: vfiotool("bind", DISK), ours),
        disk_state(saved=False),
        reset_disk,
        places,
        lambda: recover(),
    )


def vfiotool(*words: str) -> int:
    from vfiotool.cli.main import main

    return main([*words])


def recover() -> None:
    """`vfiotool recover` without faults, which is what a stuck change names."""
    code = run_plain(lambda: vfiotool("recover"))
    assert code == 0, f"recover ended with {code}"


def run_plain(act: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = act()
        finally:
            os._exit(code)
    return wait_for_child(child)


# An mdev, now and for every boot


def reset_mdev() -> None:
    shutil.rmtree("/run/vfiotool", ignore_errors=True)
    # Its folders of scripts must stay: mdevctl does nothing without them.
    shutil.rmtree("/etc/mdevctl.d/mtty", ignore_errors=True)
    shutil.rmtree("/etc/vfiotool", ignore_errors=True)
    os.makedirs("/etc/mdevctl.d/mtty")
    if os.path.exists(f"/sys/bus/mdev/devices/{UUID}"):
        put(f"/sys/bus/mdev/devices/{UUID}/remove", "1")


def mdev_state() -> str:
    return "after" if os.path.exists(f"/sys/bus/mdev/devices/{UUID}") else "before"


DEFINITION = f"/etc/mdevctl.d/mtty/{UUID}"


def definition_state() -> str:
    if not os.path.exists(DEFINITION):
        return "before"
    try:
        value = json.loads(Path(DEFINITION).read_text())
    except ValueError:
        return f"a definition of {os.path.getsize(DEFINITION)} bytes that is not JSON"
    return "after" if value.get("mdev_type") == "mtty-1" else f"a definition {value}"


POLICY = f'version = 1\n[[mdev]]\nparent = "mtty"\ntype = "mtty-1"\nuuid = "{UUID}"\n'


def installed_state() -> str:
    """vfiotool's counterpart of a definition: the policy's copy, and a manifest that knows it."""
    from vfiotool.boot.enable import read_status

    status = read_status("/")
    copy = Path("/etc/vfiotool/boot/policy.toml")
    if not status.enabled:
        return "before" if not copy.exists() else "a policy that no manifest knows"
    if status.in_order and copy.read_text() == POLICY:
        return "after"
    return f"installed in part: {status.files}"


def install_policy() -> int:
    from vfiotool.boot.enable import disable
    from vfiotool.boot.files import BootFile, install
    from vfiotool.errors import VfiotoolError

    try:
        install("/", [BootFile("etc/vfiotool/boot/policy.toml", POLICY)], {})
    except (VfiotoolError, OSError):
        disable("/")
        return 5
    return 0


def mdev_jobs() -> Iterable[Job]:
    subprocess.run(["modprobe", "mtty"], check=True)
    places = {"create": (MTTY, "/sys/devices/virtual/mtty/mtty/mdev_supported_types/mtty-1/create")}
    make = ["mdevctl", "start", "-u", UUID, "-p", "mtty", "-t", "mtty-1"]
    yield Job("mdevctl start", run_command(make, {"create": 36}), mdev_state, reset_mdev, places)
    yield Job(
        "vfiotool mdev create",
        run_forked(
            lambda: vfiotool("mdev", "create", "mtty", "mtty-1", "--uuid", UUID), {"create": 36}
        ),
        mdev_state,
        reset_mdev,
        places,
        recover,
    )
    define = ["mdevctl", "define", "-a", "-u", UUID, "-p", "mtty", "-t", "mtty-1"]
    yield Job(
        "mdevctl define",
        run_command(define, {}),
        definition_state,
        reset_mdev,
        {"definition": (DEFINITION,)},
    )
    scratch = "/etc/vfiotool/boot/.policy.toml.vfiotool-new"
    yield Job(
        "vfiotool (policy installed)",
        run_forked(install_policy, {}),
        installed_state,
        reset_mdev,
        {"policy": (scratch, ".policy.toml.vfiotool-new")},
    )


def in_guest(what: str) -> None:

    for job in disk_jobs() if what == "disk" else mdev_jobs():
        print(json.dumps(sweep(job)), flush=True)


def main() -> None:
    rows = []
    for machine, what in RUNS:
        command = [
            sys.executable,
            "-m",
            "vfiotool",
            "lab",
            "run",
            "--machine",
            machine,
            "--kernel",
            "6.12",
            "--timeout",
            "3000",
            "--",
            sys.executable,
            "-m",
            "tests.bench.fault_sweep_peers",
            what,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print_table(rows)


def print_table(rows: list[dict[str, object]]) -> None:
    words = ("cases", "before", "after", "broken", "false", "declared")
    print(f"{'tool':28}" + "".join(f"{word:>10}" for word in words))
    for row in rows:
        print(f"{row['tool']:28}" + "".join(f"{row.get(word, 0)!s:>10}" for word in words))
    for row in rows:
        for line in row["seen"]:  # type: ignore[attr-defined]
            print(f"  {row['tool']}: {line}")


if __name__ == "__main__":
    assert all(hasattr(errno, name) for name in ERRNOS)
    if len(sys.argv) > 1:
        in_guest(sys.argv[1])
    else:
        main()
