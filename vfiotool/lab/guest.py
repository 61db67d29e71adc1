"""One running guest: boot it, run commands in it, end it without leaving anything behind."""

from __future__ import annotations

import compileall
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vfiotool.errors import NotFound, Unsupported, VfiotoolError
from vfiotool.lab import image, machines, qemu
from vfiotool.lab.channel import Channel, ChannelClosed, Kind
from vfiotool.lab.kernels import catalogue as kernels
from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.cache import progress
from vfiotool.lab.qmp import Qmp
from vfiotool.lab.scratch import scratch_folder

BOOT_LIMIT_S = 180.0
# How many times as long a boot may take on a machine that lets it wait for a processor.
PATIENCE = 5
Frame = tuple[Kind, int, bytes]
PACKAGE = Path(__file__).resolve().parents[1]
# Folders of the root that a guest has a file system of its own on.
MASKED = ("tmp", "run", "dev", "proc", "sys")
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off nokaslr audit=0 "
    "no_timer_check tsc=reliable rcupdate.rcu_expedited=1 random.trust_cpu=on 8250.nr_uarts=1 "
    "nowatchdog apparmor=0 selinux=0"
)
IOMMU_ARGUMENTS = {"intel": "intel_iommu=on", "amd": "", "virtio": "", "none": ""}


class GuestLost(VfiotoolError):
    """The guest died or never came up: nothing is known of the command's result.

    Its exit code is none of the contract's, as the command's own code is passed through: 125, as
    with other tools that run a command elsewhere.
    """

    kind = "guest-lost"
    exit_code = 125


class NoSuchCommand(NotFound):
    """The guest has no such program or folder (exit code 127, as shells have it)."""

    exit_code = 127


class GuestTimeout(VfiotoolError):
    """The command ran into its limit and was killed (exit code 124, as timeout(1) has it)."""

    kind = "guest-timeout"
    exit_code = 124


@dataclass(frozen=True)
class Options:
    """What a guest is started with beside machine and kernel.

    `extra_drives` are raw files that the guest sees as virtio disks (writes are thrown away),
    `share` folders that it may write to, `load` modules that it loads at start, `served` devices
    that processes serve over vfio-user. `newer_qemu` is for `qemu_arguments` that only QEMU 11
    knows.
    """

    memory_mib: int | None = None
    vcpus: int = 1
    qemu_arguments: tuple[str, ...] = ()
    kernel_arguments: tuple[str, ...] = ()
    extra_drives: tuple[Path, ...] = ()
    share: tuple[Path, ...] = ()
    load: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    boot_limit_s: float = BOOT_LIMIT_S
    served: tuple[machines.VfioUserDevice, ...] = ()
    newer_qemu: bool = False


@dataclass(frozen=True)
class Completed:
    """What a command in the guest did. `exit_code` is 128 + n for one that signal n ended."""

    exit_code: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")


Sink = Callable[[Kind, bytes], None]


class Guest:
    """A guest, from `with Guest(...)` to the end of the block. Not for use by several threads.

    Keywords beside machine and kernel are the fields of `Options`. The guest ends with the thread
    that started it, at the latest.

    Starting raises NotFound for an unknown machine or kernel, Unsupported where this machine
    lacks something, GuestLost when the guest does not come up within its limit.
    """

    def __init__(
        self,
        machine: str | machines.Machine = machines.DEFAULT,
        kernel: str = kernels.DEFAULT,
        **options: Any,
    ) -> None:
        self.machine = machines.find(machine) if isinstance(machine, str) else machine
        self.options = Options(**options)
        self.kernel = kernels.prepare(kernel)
        served = self.options.served or self.machine.served
        newer = served or self.options.newer_qemu
        self.qemu = qemu.find_newer() if newer else qemu.find()
        self.qemu.require(self.machine)
        self.accelerator = qemu.accelerator(self.qemu, self.kernel.image)
        self.cwd = (self.options.cwd or Path.cwd()).resolve()
        self._clean = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._next_number = 1
        self._waiting: list[tuple[Kind, int, bytes]] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Boot the guest and wait for its agent."""
        # A guest that finds no compiled modules compiles them for each command anew.
        compileall.compile_dir(str(PACKAGE), quiet=2)
        try:
            self._boot()
        except BaseException:
            self.stop()
            raise

    def _boot(self) -> None:
        self.scratch = self._clean.enter_context(scratch_folder("guest"))
        self.console = self.scratch / "console"
        ours, theirs = socket.socketpair()
        self._clean.callback(ours.close)
        qmp_ours, qmp_theirs = socket.socketpair()
        self._clean.callback(qmp_ours.close)
        with theirs, qmp_theirs:
            command = self.command_line(theirs.fileno(), qmp_theirs.fileno())
            progress("booting")
            self._errors = open(self.scratch / "qemu-errors", "w+b")  # noqa: SIM115
            self._clean.callback(self._errors.close)
            self._process = subprocess.Popen(
                [*qemu.died_with_parent(), *command],
                env=self.qemu.env(),
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=(theirs.fileno(), qmp_theirs.fileno()),
                # Ctrl-C is for this process, which then ends QEMU itself.
                start_new_session=True,
            )
            self._clean.callback(self._end_process)
        self.channel = Channel(ours)
        self.qmp = Qmp(qmp_ours)
        pid, limit = self._process.pid, self.options.boot_limit_s
        try:
            frame = within(limit, lambda: waited_s(pid), self.channel.receive)
        except ChannelClosed:
            raise self.lost("ended while it booted") from None
        if frame is None:
            waited = waited_s(pid)
            also = f" (it waited {waited:.0f} s for a processor)" if waited > limit / 2 else ""
            raise self.lost(f"did not come up within {limit:g} s{also}")

    def describe(self) -> str:
        """Kernel, machine and accelerator in one line, with the reason for the last."""
        how = self.accelerator
        return (
            f"Linux {self.kernel.release} on machine {self.machine.name}, "
            f"{how.name.upper()} ({how.reason})"
        )

    def missing_models(self) -> tuple[str, ...]:
        """The machine's optional device models that this QEMU lacks."""
        return machines.missing_models(self.machine, self.qemu.models)

    def command_line(self, channel_fd: int, qmp_fd: int) -> list[str]:
        """QEMU's arguments; writes the initramfs and makes the disks below `self.scratch`."""
        options = self.options
        layer = packages.layer()
        initramfs = self.scratch / "initramfs"
        initramfs.write_bytes(
            image.initramfs(_busybox(layer), self.kernel.modules, self._settings(layer))
        )
        disk_files = {}
        for disk in self.machine.disks:
            disk_files[disk.id] = str(self.scratch / f"{disk.id}.raw")
            with open(disk_files[disk.id], "wb") as handle:
                handle.truncate(disk.size_mib << 20)
        command = [
            *self.qemu.command,
            *self.accelerator.arguments(),
            *("-m", str(options.memory_mib or self.machine.memory_mib)),
            *("-smp", str(options.vcpus)),
            *("-no-reboot", "-display", "none"),
            *("-kernel", str(self.kernel.image), "-initrd", str(initramfs)),
            *("-append", self._kernel_arguments()),
            *machines.arguments(self.machine, disk_files, self.qemu.models),
            *self._served_arguments(),
            *("-chardev", f"file,id=console,path={_escaped(self.console)}"),
            *("-serial", "chardev:console"),
            *("-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "qmp,mode=control"),
            *("-chardev", f"socket,id=lab,fd={channel_fd}"),
            *("-device", "virtio-serial-pci,id=labserial,bus=pcie.0,addr=0x1e.0,multifunction=on"),
            *("-device", "virtserialport,bus=labserial.0,chardev=lab,name=vfiotool.lab"),
        ]
        shares: list[tuple[str, Path, bool]] = [("root", Path("/"), True)]
        if layer is not None:
            shares.append(("layer", layer, True))
        shares += [(f"share{n}", path, False) for n, path in enumerate(options.share, start=1)]
        for number, (tag, path, read_only) in enumerate(shares, start=1):
            command += _share_arguments(number, tag, path, read_only)
        for number, path in enumerate(options.extra_drives):
            command += [
                "-drive",
                f"if=none,id=extra{number},format=raw,snapshot=on,file={_escaped(path)}",
                "-device",
                f"virtio-blk-pci,drive=extra{number},serial=extra{number}",
            ]
        return [*command, *options.qemu_arguments]

    def _served_arguments(self) -> list[str]:
        """Devices over vfio-user; they reach the guest's memory, which is shared for it."""
        served = (*self.machine.served, *self.options.served)
        if not served:
            return []
        size = self.options.memory_mib or self.machine.memory_mib
        result = _shared_memory(size, self.machine.numa_nodes)
        for one in served:
            result += ["-device", one.argument()]
        return result

    def _kernel_arguments(self) -> str:
        words = [KERNEL_ARGUMENTS, IOMMU_ARGUMENTS[self.machine.iommu]]
        words += [*self.machine.kernel_arguments, *self.options.kernel_arguments]
        return " ".join(word for word in words if word)

    def _settings(self, layer: Path | None) -> dict[str, str | Sequence[str]]:
        modules = self.kernel.modules
        carried = [self.cwd, Path(sys.prefix), PACKAGE.parent]
        return {
            "LAYER": str(layer or ""),
            "RELEASE": self.kernel.release,
            "IMAGE": str(self.kernel.image.resolve()),
            "MODULES": str(modules.resolve()) if modules else "",
            "RW_SIZE": "75%",
            "HIDDEN": hidden_folders(carried),
            "SHARED": [str(path.resolve()) for path in self.options.share],
            "LOAD": " ".join([*self.machine.load, *self.options.load]),
            "PYTHON": os.path.realpath(sys.executable),
        }

    def environment(self) -> dict[str, str]:
        """What a command in the guest finds in its environment, nothing of the host's secrets."""
        system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {
            "PATH": f"{Path(sys.prefix) / 'bin'}:{system}",
            "HOME": "/run/lab/home",
            "LANG": "C.UTF-8",
            "TERM": os.environ.get("TERM", "dumb"),
            "VFIOTOOL_LAB_MACHINE": self.machine.name,
            "VFIOTOOL_LAB_KERNEL": self.kernel.name,
            **self.options.env,
        }

    def exec(
        self,
        command: Sequence[str],
        *,
        timeout_s: float | None = 60.0,
        input: bytes | None = None,
        merge: bool = False,
        sink: Sink | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        terminal: tuple[int, int] | None = None,
    ) -> Completed:
        """Run `command` in the guest and wait for its end.

        With `terminal` (rows, columns) it has one, and everything is its output. With `merge`
        stderr goes where stdout goes, in order. `sink` is given each piece of output (Kind.OUTPUT
        or Kind.ERROR) as it arrives, and then Completed holds none. Raises NoSuchCommand when there
        is no such program or folder, GuestTimeout after `timeout_s` (the command is killed, the
        guest lives on), GuestLost when the guest ends first.
        """
        number = self._next_number
        self._next_number += 1
        output: dict[Kind, bytearray] = {Kind.OUTPUT: bytearray(), Kind.ERROR: bytearray()}

        def collect(kind: Kind, data: bytes) -> None:
            output[kind].extend(data)

        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            self.channel.run(
                number,
                command,
                cwd=str(cwd or self.cwd),
                env={**self.environment(), **(env or {})},
                merge=merge,
                terminal=terminal,
            )
            if input:
                self.channel.input(number, input)
            if terminal is None:
                self.channel.close_input(number)
            code = self._follow(number, command, sink or collect, deadline)
            if code is None:
                self._kill(number, command, sink or collect)
                raise GuestTimeout(
                    f"{command[0]} did not end within {timeout_s:g} s in the guest; it was killed",
                    hint="give it more time: vfiotool lab run --timeout SECONDS",
                )
        except ChannelClosed:
            raise self.lost(f"ended while {command[0]} ran") from None
        return Completed(code, bytes(output[Kind.OUTPUT]), bytes(output[Kind.ERROR]))

    def begin(self, command: Sequence[str]) -> int:
        """Run `command` and leave it to itself: `tell` talks to it, by the number that is given.
        What it puts out while another command is followed is lost."""
        number = self._next_number
        self._next_number += 1
        try:
            self.channel.run(
                number,
                command,
                cwd=str(self.cwd),
                env=self.environment(),
                merge=False,
                terminal=None,
            )
        except ChannelClosed:
            raise self.lost(f"ended before {command[0]} ran") from None
        return number

    def tell(
        self, number: int, data: bytes, sink: Sink, over: Callable[[], bool], timeout_s: float
    ) -> int | None:
        """Give `data` to a command that has begun, and its output to `sink` until that makes it
        `over`: None; or until the command ends: its exit code. Raises as `exec` does; a command
        that runs into the limit goes on."""
        try:
            self.channel.input(number, data)
            code = self._follow(number, ("it",), sink, time.monotonic() + timeout_s, over)
        except ChannelClosed:
            raise self.lost("ended while a command ran") from None
        if code is None and not over():
            raise GuestTimeout(f"no answer within {timeout_s:g} s from a command in the guest")
        return code

    def _follow(
        self,
        number: int,
        command: Sequence[str],
        sink: Sink,
        deadline: float | None,
        over: Callable[[], bool] = lambda: False,
    ) -> int | None:
        """Hand frames of `number` to `sink` until its end; None when the deadline comes first, or
        when it is `over`."""
        while not over():
            frame = self.channel.receive(deadline)
            if frame is None:
                return None
            kind, whose, payload = frame
            if whose != number:
                continue  # the last words of a command that was given up
            if kind in (Kind.OUTPUT, Kind.ERROR):
                sink(kind, payload)
            elif kind is Kind.REFUSED:
                raise NoSuchCommand(f"the guest cannot run {command[0]}: {payload.decode()}")
            elif kind is Kind.EXIT:
                code = int(struct.unpack("<i", payload)[0])
                return 128 - code if code < 0 else code
        return None

    def _kill(self, number: int, command: Sequence[str], sink: Sink) -> None:
        self.channel.signal(number, signal.SIGKILL)
        # A process in an uninterruptible wait does not die; its frames are dropped later.
        with contextlib.suppress(NotFound):
            self._follow(number, command, sink, time.monotonic() + 3.0)

    def waited_s(self) -> float:
        """The seconds that it has waited for a processor, of those that it has been there."""
        return 0.0 if self._process is None else waited_s(self._process.pid)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def console_tail(self, lines: int = 15) -> str:
        """The last lines of the guest's console, and before them the panic if it named one."""
        try:
            text = self.console.read_bytes().decode(errors="replace")
        except OSError:
            return ""
        everything = text.replace("\r", "").rstrip().splitlines()
        earlier, tail = everything[:-lines], everything[-lines:]
        panic = [line for line in earlier if "Kernel panic" in line or "BUG: " in line]
        return "\n".join([*panic[:3], *tail])

    def lost(self, what: str) -> GuestLost:
        """The error for a guest that `what` happened to, with all that is known of its end."""
        self._errors.flush()
        errors = (self.scratch / "qemu-errors").read_bytes().decode(errors="replace").strip()
        parts = [f"the guest was lost: it {what} ({self.describe()})"]
        if errors:
            parts.append(f"QEMU said:\n{errors[-2000:]}")
        if tail := self.console_tail():
            parts.append(f"its console ended with:\n{tail}")
        return GuestLost(
            "\n".join(parts), hint="see what happens by hand: vfiotool lab shell (same options)"
        )

    def stop(self) -> None:
        """End the guest at once; nothing of it remains. Harmless when it has ended already."""
        self._clean.close()

    def _end_process(self) -> None:
        process = self._process
        if process is not None:
            process.kill()
            process.wait()


def within(
    limit_s: float, waited: Callable[[], float], receive: Callable[[float], Frame | None]
) -> Frame | None:
    """What `receive(deadline)` gives within `limit_s`, else None. What the guest `waited` for a
    processor does not count, up to PATIENCE times as much: a machine with too much to do is slow,
    and nothing is wrong with the guest."""
    begun, granted = time.monotonic(), 0.0
    while (frame := receive(begun + limit_s + granted)) is None:
        more = min(waited(), (PATIENCE - 1) * limit_s)
        if more < granted + limit_s / 20:
            return None
        granted = more
    return frame


def waited_s(pid: int) -> float:
    """The seconds that the thread of `pid` which waited longest for a processor did so; 0 where
    that is not told (Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat)."""
    longest = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            longest = max(longest, int(thread.read_text(encoding="ascii").split()[1]))
    return longest / 1e9


def hidden_folders(folders: Sequence[Path]) -> list[str]:
    """Those of `folders` that lie where the guest has its own file systems, each once.

    A folder inside another of them comes with that one.
    """
    hidden = sorted({path for path in folders if path.parts[1:2] and path.parts[1] in MASKED})
    return [
        str(path)
        for path in hidden
        if not any(path != o and path.is_relative_to(o) for o in hidden)
    ]


def _busybox(layer: Path | None) -> Path:
    places = [layer / "usr/bin/busybox"] if layer else []
    found = shutil.which("busybox")
    for place in [*places, *([Path(found)] if found else [])]:
        if place.exists():
            return place
    raise Unsupported(
        "the lab needs a static busybox for the guest's first steps",
        hint="install your distribution's busybox-static",
    )


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")


def _shared_memory(size_mib: int, nodes: int) -> list[str]:
    """Memory that devices reach by its descriptors, on one NUMA node or spread over several."""
    share = size_mib // nodes
    if nodes == 1:
        backend = ["-object", f"memory-backend-memfd,id=shared,size={share}M,share=on"]
        return [*backend, "-machine", "memory-backend=shared"]
    result = ["-m", f"{share * nodes}"]
    for node in range(nodes):
        result += ["-object", f"memory-backend-memfd,id=shared{node},size={share}M,share=on"]
        result += ["-numa", f"node,nodeid={node},memdev=shared{node}"]
    return result


def _share_arguments(number: int, tag: str, path: Path, read_only: bool) -> list[str]:
    more = ",readonly=on" if read_only else ""
    return [
        "-fsdev",
        f"local,id={tag},path={_escaped(path)},security_model=none,multidevs=remap{more}",
        "-device",
        f"virtio-9p-pci,fsdev={tag},mount_tag={tag},bus=pcie.0,addr=0x1e.{number},multifunction=on",
    ]
