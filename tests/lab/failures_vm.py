"""What `vm check` foretells, made to happen with the cards of tests/guests/failing_cards.py: QEMU,
or the kernel, says the words that are quoted here, the check says so before, and its remedy helps.

Run in the guest by tests/guests/test_preflight_failures.py.
"""

from __future__ import annotations

import ctypes
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.commands import modprobe
from tests.lab.vfio_guest import PCI, bind_vfio, unbind
from tests.lab.vm_starts import bare_machine, findings, options, run, start, started
from vfiotool.lab.inside import vm

MIB, GIB = 1 << 20, 1 << 30
NODE1 = Path("/sys/devices/system/node/node1")
MAPPINGS = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
SLOT = 5
# include/uapi/linux/mempolicy.h; set_mempolicy of x86-64.
PREFERRED, BIND, SET_MEMPOLICY = 1, 2, 238


def card(number: int) -> str:
    """The address of the card with this device number."""
    for device in sorted(PCI.iterdir()):
        ids = [(device / name).read_text().strip() for name in ("vendor", "device")]
        if ids == ["0x1234", f"{number:#06x}"]:
            return device.name
    raise AssertionError(f"no card {number:#x}")


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    modprobe("vfio-pci", "vfio_iommu_type1", "uio_pci_generic")


@pytest.fixture
def wide() -> Iterator[str]:
    address = card(0x0F00)
    bind_vfio(address)
    yield address
    unbind(address)


def mark(*addresses: str) -> vm.Marks:
    """What a first VM leaves in the devices."""
    marks: vm.Marks = {}
    vm.start(list(addresses), lambda one: vm.mark(one, marks))
    assert sorted(marks) == sorted(addresses)
    return marks


def kept(marks: vm.Marks) -> list[str]:
    """In which of them the next VM finds it."""
    found: list[str] = []
    vm.start(
        list(marks),
        lambda one: found.append(one.name) if vm.has_mark(one, marks[one.name]) else None,
    )
    return found


def alone_on_the_root_bus(address: str) -> list[str]:
    """A machine in which the device's own address registers are all that a firmware would set."""
    return ["-m", "64M", "-device", f"vfio-pci,host={address},bus=pcie.0,addr={SLOT:#x}"]


def test_a_function_that_is_reset_with_its_bus_of_which_the_host_has_the_rest() -> None:
    first, second = card(0x0A00), card(0x0A01)
    bind_vfio(first)
    # The kernel found this reset before it had seen the second function, and refuses it now.
    assert (PCI / first / "reset_method").read_text().split() == ["bus"]
    found = findings(first)["reset"]
    assert found["severity"] == "warning" and second in found["detail"]
    marks = mark(first)
    _, said, _ = started(options(first))
    assert f"Cannot reset device {first}, depends on group" in said and "is not owned" in said
    assert kept(marks) == [first], "the second start finds what the first one left"
    # Both remedies: the other function on a VFIO driver, or in the same VM.
    run(*shlex.split(found["remedy"][1])[1:], code=0)
    assert findings(first)["reset"]["severity"] == "note"
    assert kept(mark(first)) == []
    check = shlex.split(found["remedy"][0])[1:]
    assert findings(*check[2:])["reset"]["severity"] == "note"
    marks = mark(first, second)
    assert started(options(first, second))[:2] == (0, "") and kept(marks) == []
    for address in (first, second):
        unbind(address)


def test_two_functions_of_one_group_that_are_reset_with_their_bus() -> None:
    first, second = card(0x0C00), card(0x0C01)
    bind_vfio(first)
    found = findings(first)["reset"]
    assert found["severity"] == "warning" and second in found["detail"]
    marks = mark(first)
    start(options(first))
    assert kept(marks) == [first]
    bind_vfio(second)
    assert findings(first)["reset"]["severity"] == "note"
    marks = mark(first)
    assert started(options(first))[:2] == (0, "") and kept(marks) == []
    for address in (first, second):
        unbind(address)


def test_a_function_without_a_reset() -> None:
    address = card(0x0D00)
    bind_vfio(address)
    found = findings(address)["reset"]
    assert found["severity"] == "warning" and found["detail"].startswith("works once, not twice")
    marks = mark(address)
    _, said, _ = started(options(address))
    assert f"Cannot reset device {address}, no available reset mechanism" in said
    assert kept(marks) == [address]
    unbind(address)


def test_memory_beyond_the_width_of_the_iommu(wide: str) -> None:
    found = findings(wide, "--memory", "520G")["iommu-width"]
    assert found["severity"] == "blocker" and "39 bits" in found["detail"]
    overcommit = Path("/proc/sys/vm/overcommit_memory")
    before = overcommit.read_text()
    overcommit.write_text("1")
    try:
        # Little of it below 4 GiB, as that is pinned before.
        words = ["-machine", "max-ram-below-4g=64M", *options(wide, "--memory", "520G")]
        said = start(words)
    finally:
        overcommit.write_text(before)
    assert re.search(r"dma_map\(.*0x100000000, .* = -22 \(Invalid argument\)", said), said
    most = re.search(r"at most ([\d.]+) GiB", found["next"])
    assert most is not None
    assert "iommu-width" not in findings(wide, "--memory", f"{int(float(most[1]))}G")
    assert "iommu-width" not in findings(wide, "--memory", "64M")
    assert not start(options(wide, "--memory", "64M"))


@pytest.mark.parametrize(("bits", "works"), [(40, False), (39, True)])
def test_a_window_above_the_width_of_the_iommu(
    wide: str, bits: int, works: bool, tmp_path: Path
) -> None:
    found = findings(wide)["mmio-window"]
    assert found["next"].endswith("host-phys-bits-limit=39") and found["number"] == 39
    said = tmp_path / "said"
    with bare_machine(alone_on_the_root_bus(wide), said) as machine:
        # As a firmware does whose window ends with what the processor addresses.
        at = 1 << bits - 1
        machine.config(SLOT, 0x10, at & 0xFFFFFFFF)
        machine.config(SLOT, 0x14, at >> 32)
        machine.config(SLOT, 0x04, 0x0006)
    refused = "-22 (Invalid argument)" in said.read_text()
    assert refused != works, said.read_text()


def test_more_mappings_than_a_container_takes(wide: str, tmp_path: Path) -> None:
    before, said = MAPPINGS.read_text(), tmp_path / "said"
    words = ["-device", "intel-iommu,caching-mode=on,aw-bits=39", *alone_on_the_root_bus(wide)]
    try:
        MAPPINGS.write_text("64")
        found = findings(wide, "--memory", "64M", "--viommu")["mappings"]
        assert found["number"] == (64 * MIB >> 12) - 64
        map_pages(words, 100, said)
        assert re.search(r"dma_map\(.*\) = -28 \(No space left on device\)", said.read_text())
        subprocess.run(["sh", "-c", found["next"]], check=True)
        assert "mappings" not in findings(wide, "--memory", "64M", "--viommu")
        map_pages(words, 100, said)
        assert not said.read_text()
    finally:
        MAPPINGS.write_text(before)


def map_pages(words: list[str], pages: int, said: Path) -> None:
    """Have a virtual IOMMU translate so many pages that do not lie side by side.

    Intel VT-d specification 4.1, 9.1 (root entry), 9.3 (context entry), 9.8 (second-stage tables),
    11.4 (registers, at q35's 0xfed90000): one table of each of 39 bits' three levels.
    """
    root, context, tables, data, registers = 0x100000, 0x101000, 0x102000, 0x200000, 0xFED90000
    with bare_machine(words, said) as machine:
        machine.write64(root, context | 1)
        entry = context + (SLOT << 3) * 16
        machine.write64(entry, tables | 1)
        machine.write64(entry + 8, 1 << 8 | 1)
        machine.write64(tables, tables + 0x1000 | 3)
        machine.write64(tables + 0x1000, tables + 0x2000 | 3)
        for page in range(pages):
            machine.write64(tables + 0x2000 + 8 * page, data + page * 0x2000 | 3)
        machine.write64(registers + 0x20, root)
        for command in (1 << 30, 1 << 31):
            machine.write32(registers + 0x18, command)


def test_a_container_that_takes_too_few_mappings_for_any_guest(wide: str) -> None:
    before = MAPPINGS.read_text()
    words = options(wide, "--memory", "64M")
    try:
        MAPPINGS.write_text("4")
        found = findings(wide, "--memory", "64M")["mappings"]
        assert found["severity"] == "blocker"
        assert "-28 (No space left on device)" in start(words)
        subprocess.run(["sh", "-c", found["next"]], check=True)
        assert "mappings" not in findings(wide, "--memory", "64M") and not start(words)
    finally:
        MAPPINGS.write_text(before)


@pytest.fixture
def huge(tmp_path: Path) -> Iterator[Path]:
    """A file system of huge pages, of which node 1 has eight of 2 MiB."""
    reserved = NODE1 / "hugepages/hugepages-2048kB/nr_hugepages"
    reserved.write_text("8")
    subprocess.run(["mount", "-t", "hugetlbfs", "none", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)
    reserved.write_text("0")


def test_too_few_huge_pages(wide: str, huge: Path) -> None:
    found = findings(wide, "--memory", "64M")["hugepages"]
    assert found["number"] == (64 - 16) * MIB
    words = options(wide, "--memory", "64M")
    in_huge_pages = [*words, "-mem-path", str(huge)]
    said = start(in_huge_pages)
    assert "unable to map backing store for guest RAM: Cannot allocate memory" in said
    assert not start(words), "as the finding says, it starts without them"
    subprocess.run(["sh", "-c", found["next"]], check=True)
    assert "hugepages" not in findings(wide, "--memory", "64M") and not start(in_huge_pages)


def test_a_vm_that_is_bound_to_a_node_too_small_for_it(wide: str) -> None:
    (free,) = re.findall(r"MemFree:\s+(\d+) kB", (NODE1 / "meminfo").read_text())
    memory = f"{(int(free) >> 10) + 100}M"
    found = findings(wide, "--memory", memory)["numa"]
    assert found["severity"] == "warning" and "memory more than it has free" in found["detail"]
    assert "--preferred=1" in found["next"]
    words = options(wide, "--memory", memory)

    def on_node_1(mode: int) -> None:
        # What numactl's --membind and --preferred do: it is not in this guest.
        nodes = ctypes.c_ulong(1 << 1)
        ctypes.CDLL(None).syscall(SET_MEMPOLICY, mode, ctypes.byref(nodes), 64)

    code, said, _ = started(words, prepare=lambda: on_node_1(BIND))
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    assert (code, said) == (-9, "")
    assert re.search(r"oom-kill:constraint=CONSTRAINT_MEMORY_POLICY,nodemask=1,.*qemu", log)
    assert not start(words, prepare=lambda: on_node_1(PREFERRED))
    assert findings(wide, "--memory", "64M")["numa"]["severity"] == "note"


def test_a_vm_that_is_to_be_migrated(wide: str) -> None:
    found = findings(wide)["migration"]
    assert "cannot be migrated" in found["detail"] and "device_del" in found["next"]
    words = ["-m", "64M", *options(wide)]
    migrate = 'migrate "exec:cat >/dev/null"\ninfo migrate\nquit\n'
    assert "VFIO migration is not supported in kernel" in said_by_monitor(words, migrate)
    assert "--only-migratable" in start([*words, "-only-migratable"])
    assert "Migration status: completed" in said_by_monitor(["-m", "64M"], migrate)


def said_by_monitor(words: list[str], commands: str) -> str:
    """What QEMU's monitor says, without the echo that it edits."""
    _, _, text = started(words, commands=commands)
    return re.sub(r"\x1b\[[KD]", "", text)


def test_a_node_that_is_not_there(wide: str) -> None:
    words = options(wide)
    node = Path("/dev/vfio") / (PCI / wide / "iommu_group").resolve().name
    node.unlink()
    found = findings(wide)["no-node"]
    said = start(words)
    assert f"Could not open '{node}': No such file or directory" in said
    subprocess.run(["sh", "-c", found["next"]], check=True)
    assert "no-node" not in findings(wide) and not start(words)


def test_a_neighbour_that_its_host_driver_takes_back() -> None:
    first, second = card(0x0B00), card(0x0B01)
    bind_vfio(first)
    words = options(first)
    found = findings(first)["returns-to-host"]
    assert second in found["detail"] and not start(words)
    driver = PCI.parent / "drivers/uio_pci_generic"
    # It is loaded, so to say: from here on there is a driver for the card.
    (driver / "new_id").write_text("1234 0b01")
    assert (PCI / second / "driver").resolve().name == "uio_pci_generic"
    assert f"group {group_of(first)} is not viable" in start(words)
    run(*shlex.split(found["next"])[1:], code=0)
    (PCI.parent / "drivers_probe").write_text(second)
    assert "returns-to-host" not in findings(first) and not start(words)
    (driver / "remove_id").write_text("1234 0b01")
    (PCI / second / "driver_override").write_text("\n")
    unbind(first)


def group_of(address: str) -> str:
    return (PCI / address / "iommu_group").resolve().name


def sleeper() -> str:
    return card(0x0E00)


def test_a_card_that_does_not_wake() -> None:
    """The model is gone once it has been in D3hot, where vfio-pci puts what nobody uses."""
    bind_vfio(sleeper())
    said = start(options(sleeper()))
    assert "No such device" in said or "stuck in D3" in said, said
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    assert f"{sleeper()}: Unable to change power state from D3" in log
    found = findings(sleeper())["d3cold"]
    assert found["severity"] == "warning" and "disable_idle_d3=1" in found["remedy"][-1]
    unbind(sleeper())


def test_a_card_that_does_not_wake_is_kept_awake() -> None:
    """After it was without power: it is there again, and would not wake again."""
    subprocess.run(["modprobe", "-r", "vfio-pci"], check=True)
    subprocess.run(["modprobe", "vfio-pci", "disable_idle_d3=1"], check=True)
    bind_vfio(sleeper())
    for _ in range(2):
        assert "d3cold" not in findings(sleeper()) and not start(options(sleeper()))
    unbind(sleeper())
