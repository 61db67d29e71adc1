"""What `vm check` foretells, made to happen: QEMU fails with the words quoted here, the check says
so before the start, and the check's own remedy lets QEMU open the devices."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.lab.commands import modprobe
from tests.lab.vfio_guest import EDU, PCI, bind_vfio, unbind
from tests.lab.vm_starts import findings, line_of, options, run, start
from vfiotool.vfio import Device

MACHINE = "full"
KERNELS = ("6.12",)
PROOF = "long: QEMU is started many times within an emulated guest"
LIMIT_S = 3600.0

SHARED, NEIGHBOUR = "0000:05:01.0", "0000:05:02.0"
PF, VF = "0000:01:00.0", "0000:01:00.1"
SMALL_LOCK = 64 << 20


def said_while_running(words: Sequence[str], wanted: str, limit_s: float) -> str:
    """What a running QEMU says until `wanted` is among it, or for `limit_s`."""
    process = subprocess.Popen(line_of(words), stderr=subprocess.PIPE)
    assert process.stderr is not None
    said, end = b"", time.monotonic() + limit_s
    try:
        while wanted.encode() not in said and time.monotonic() < end:
            ready, _, _ = select.select([process.stderr], [], [], 1.0)
            data = os.read(process.stderr.fileno(), 65536) if ready else b" "
            if not data:
                break
            said += data.strip()
    finally:
        process.kill()
        process.wait()
    return said.decode()


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    modprobe("vfio-pci", "vfio_iommu_type1", "uio_pci_generic")


@pytest.fixture
def edu() -> Iterator[str]:
    bind_vfio(EDU)
    yield EDU
    unbind(EDU)


def test_a_device_on_no_vfio_driver() -> None:
    bind_vfio(EDU)
    words = options(EDU)
    unbind(EDU)
    found = findings(EDU)["not-bound"]
    assert "No such file or directory" in start(words)
    run(*found["next"].split()[1:], code=0)
    assert "not-bound" not in findings(EDU) and not start(words)
    unbind(EDU)


def test_a_group_that_is_not_viable() -> None:
    for address in (SHARED, NEIGHBOUR):
        bind_vfio(address)
    words = options(SHARED)
    unbind(NEIGHBOUR)
    (PCI / NEIGHBOUR / "driver_override").write_text("uio_pci_generic")
    (PCI.parent / "drivers_probe").write_text(NEIGHBOUR)
    if not (PCI / NEIGHBOUR / "driver").exists():
        pytest.skip("no host driver takes the other function here")
    found = findings(SHARED)["group-not-viable"]
    assert NEIGHBOUR in found["detail"]
    said = start(words)
    assert "is not viable" in said
    assert "Please ensure all devices within the iommu_group are bound to their vfio bus" in said
    unbind(NEIGHBOUR)
    assert "group-not-viable" not in findings(SHARED) and not start(words)
    unbind(SHARED)


@contextlib.contextmanager
def held_by_another(address: str) -> Iterator[int]:
    """Another process, its pid, that has the group's node open: our own files are no use."""
    group = (PCI / address / "iommu_group").resolve().name
    script = f"exec 3<>/dev/vfio/{group}; echo held; read line"
    pipe = subprocess.PIPE
    with subprocess.Popen(["sh", "-c", script], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process.pid
        process.communicate("\n")


def test_a_second_user_of_the_group(edu: str) -> None:
    words = options(edu)
    with held_by_another(edu) as pid:
        found = findings(edu)["held"]
        assert f"ps -fp {pid}" in found["remedy"]
        assert "Device or resource busy" in start(words)
    assert "held" not in findings(edu) and not start(words)


def test_the_limit_on_locked_memory(edu: str) -> None:
    words = options(edu, "--memory", "256M")

    def limited(size: int) -> list[str]:
        # Whoever has no CAP_IPC_LOCK is held to the limit.
        without = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
        return ["prlimit", f"--memlock={size}:{size}", *without]

    found = findings(edu, "--memory", "256M", prefix=limited(SMALL_LOCK))["memory-lock"]
    said = start(words, limited(SMALL_LOCK))
    assert "Cannot allocate memory" in said
    enough = SMALL_LOCK + found["number"]
    assert f"LimitMEMLOCK={enough}" in " ".join(found["remedy"])
    more = findings(edu, "--memory", "256M", prefix=limited(enough))
    assert "memory-lock" not in more and not start(words, limited(enough))


def test_iommufd_on_a_kernel_without_it(edu: str) -> None:
    if Path("/dev/iommu").exists():
        pytest.skip("this kernel has iommufd")
    words = [*options(edu), "-object", "iommufd,id=iommufd0"]
    words = [f"{w},iommufd=iommufd0" if w.startswith("vfio-pci,") else w for w in words]
    assert "no-iommufd" in findings(edu, "--iommufd")
    said = start(words)
    # The device's own node is looked for first, and such a kernel has none.
    assert "vfio-dev" in said
    assert "no-iommufd" not in findings(edu) and not start(options(edu))


def test_a_vf_whose_pf_is_driven_from_user_space_wants_its_token() -> None:
    enable, token = Path("/sys/module/vfio_pci/parameters/enable_sriov"), str(uuid.uuid4())
    if not enable.exists():
        pytest.skip("vfio-pci of this kernel cannot enable VFs")
    enable.write_text("Y")
    bind_vfio(PF)
    with Device.open(PF, backend="type1") as device:
        device.set_vf_token(uuid.UUID(token))
        (PCI / PF / "sriov_drivers_autoprobe").write_text("0")
        (PCI / PF / "sriov_numvfs").write_text("1")
        bind_vfio(VF)
        words = options(VF, "--vf-token", token)
        without = [word.replace(f",vf-token={token}", "") for word in words]
        assert "vf-token" in findings(VF)
        assert "Permission denied" in start(without)
        assert "vf-token" not in findings(VF, "--vf-token", token) and not start(words)
    (PCI / PF / "sriov_numvfs").write_text("0")
    (PCI / PF / "sriov_drivers_autoprobe").write_text("1")
    unbind(PF)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Starts a server of a disk; its socket."""
    image, socket = tmp_path / "disk.raw", tmp_path / "vm.sock"
    image.write_bytes(bytes(1 << 20))
    running = []

    def serve() -> str:
        words = ("serve", "vhost-user-blk", "--socket-path", str(socket), "--blk-file", str(image))
        running.append(subprocess.Popen([sys.executable, "-m", "vfiotool", *words]))
        end = time.monotonic() + 600
        while not socket.exists():
            assert time.monotonic() < end, "no server came up"
            time.sleep(0.1)
        return f"vhost-user-blk:{socket}"

    yield serve
    for process in running:
        process.terminate()
        process.wait(60)


def test_a_socket_that_nothing_serves(served: Callable[[], str], tmp_path: Path) -> None:
    name = f"vhost-user-blk:{tmp_path / 'vm.sock'}"
    assert "no-socket" in findings(name)
    where = f"socket,id=c,path={tmp_path / 'vm.sock'}"
    said = start(["-m", "64M", "-chardev", where, "-device", "vhost-user-blk-pci,chardev=c"])
    assert "Failed to connect to" in said and "No such file or directory" in said
    assert served() == name
    assert "no-socket" not in findings(name) and not start(options(name, "--memory", "64M"))


def test_memory_that_is_not_shared(served: Callable[[], str]) -> None:
    name = served()
    assert "share=on" in str(findings(name)["shared-memory"]["remedy"])
    words = options(name, "--memory", "64M")
    at = words.index("-object")
    private = [*words[:at], *words[at + 4 :]]
    # The server says why and ends the connection; QEMU says that it did.
    wanted = "vhost start failed: Error starting vhost"
    assert wanted in said_while_running(private, wanted, 300)
    assert wanted not in said_while_running(words, wanted, 30)
