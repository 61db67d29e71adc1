"""What we say of a real kernel's devices, held against lspci and against sysfs itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.oracles.lspci import Comparison, compare, parse
from vfiotool.devices.config.decode import parse_config, read_config
from vfiotool.devices.details import DetailReader, link_of
from vfiotool.devices.inventory import read_inventory
from vfiotool.devices.pci import list_addresses, read_function, read_functions
from vfiotool.host.host import Host

MACHINE = "full"
KERNELS = ("6.1", "6.12", "iommufd")
ALWAYS_ON = ("6.12",)

PCI = Path("/sys/bus/pci")
EDU = "0000:00:01.0"


@pytest.fixture(autouse=True, scope="module")
def virtual_functions() -> Iterator[None]:
    """As many VFs as the functions have: their capabilities and relations are compared too."""
    made = []
    for path in PCI.glob("devices/*/sriov_totalvfs"):
        count = int(path.read_text())
        numvfs = path.parent / "sriov_numvfs"
        if int(numvfs.read_text()) == 0:
            numvfs.write_text(str(count))
            made.append(numvfs)
    yield
    for numvfs in made:
        numvfs.write_text("0")


@pytest.fixture(scope="module")
def host() -> Host:
    return Host.local()


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "vfiotool", "--json", *arguments], capture_output=True, check=True
    )
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def attribute(address: str, name: str) -> str | None:
    try:
        return (PCI / "devices" / address / name).read_text().strip()
    except OSError:
        return None


def test_every_capability_of_every_function_is_what_lspci_decodes() -> None:
    done = subprocess.run(["lspci", "-D", "-vvv", "-xxxx", "-nn"], capture_output=True, check=True)
    functions = parse(done.stdout.decode("utf-8", "replace"))
    assert {item.address for item in functions} == set(os.listdir(PCI / "devices"))
    total = Comparison()
    for function in functions:
        result = compare(function, parse_config(bytes(function.data)))
        total.compared += result.compared
        total.wrong += result.wrong
    print(f"{len(functions)} functions, {total.compared} fields compared with lspci")
    assert total.wrong == []
    assert total.compared > 200


def test_the_capabilities_read_are_those_that_lspci_lists(host: Host) -> None:
    done = subprocess.run(["lspci", "-D", "-vvv", "-nn"], capture_output=True, check=True)
    for function in parse(done.stdout.decode("utf-8", "replace")):
        space = read_config(host, function.address)
        assert space is not None and space.complete
        ours = [(item.offset, item.version) for item in space.capabilities]
        assert ours == [(item.offset, item.version) for item in function.capabilities]


def test_link_and_sriov_registers_agree_with_the_kernels_attributes(host: Host) -> None:
    compared = 0
    for function in read_functions(host, list_addresses(host)):
        space = read_config(host, function.address)
        assert space is not None
        sriov = space.find("sriov")
        assert link_of(space) == function.link
        compared += function.link is not None
        if sriov is not None and function.sriov is not None:
            # A guest that stands still for a while can miss the deadline of a guarded read.
            for _ in range(3):
                if function.sriov is None or function.sriov.num_vfs is not None:
                    break
                function = read_function(host, function.address) or function
            assert function.sriov is not None
            assert sriov.fields["num_vfs"] == function.sriov.num_vfs
            assert sriov.fields["initial_vfs"] >= function.sriov.total_vfs  # type: ignore[operator]
            compared += 1
    assert compared


def test_devices_gives_each_attribute_as_sysfs_has_it() -> None:
    devices = run("devices")["devices"]
    assert [item["address"] for item in devices] == sorted(os.listdir(PCI / "devices"))
    for item in devices:
        address = item["address"]
        for key in ("vendor", "device", "subsystem_vendor", "subsystem_device"):
            assert f"0x{item[key]}" == attribute(address, key)
        assert f"0x{item['class']}" == attribute(address, "class")
        assert f"0x{item['revision']}" == attribute(address, "revision")
        assert item["power_state"] == attribute(address, "power_state")
        assert item["reset_methods"] == (attribute(address, "reset_method") or "").split()
        group = PCI / "devices" / address / "iommu_group"
        assert str(item["iommu_group"]) == os.readlink(group).rpartition("/")[2]
        assert (PCI / "devices" / address / "iommu").resolve().name == item["iommu"]
        driver = PCI / "devices" / address / "driver"
        assert item["driver"] == (driver.resolve().name if driver.exists() else None)


def test_physical_and_virtual_functions_name_each_other(host: Host) -> None:
    inventory, reader = read_inventory(host), DetailReader(host)
    parents = [item for item in inventory.functions if item.sriov and item.sriov.num_vfs]
    if not parents:
        pytest.skip("this QEMU has no igb, and the machine no other function with VFs")
    for parent in parents:
        vfs = reader.read(parent).vfs
        assert parent.sriov is not None and len(vfs) == parent.sriov.num_vfs
        for index, address in enumerate(vfs):
            child = inventory.by_address[address]
            assert (child.physfn, child.vf_index) == (parent.address, index)


def test_the_vfio_driver_and_the_nodes_of_a_bound_function_are_named(lab_machine: str) -> None:
    if lab_machine != "full":
        pytest.skip("the machine has no edu")
    subprocess.run(["modprobe", "-a", "vfio-pci", "vfio_iommu_type1"], check=False)
    device = PCI / "devices" / EDU
    (device / "driver_override").write_text("vfio-pci")
    (PCI / "drivers_probe").write_text(EDU)
    try:
        shown = run("show", EDU)
        number = shown["iommu_group"]
        assert shown["driver"] == "vfio-pci"
        assert shown["driver_override"] == "vfio-pci"
        assert shown["vfio_driver"] == "vfio-pci"
        assert shown["vfio_group_node"] == f"/dev/vfio/{number}"
        assert shown["group"]["viable"] is True
        nodes = os.listdir("/dev/vfio/devices") if os.path.isdir("/dev/vfio/devices") else []
        expected = f"/dev/vfio/devices/{nodes[0]}" if nodes else None
        assert shown["vfio_device_node"] == expected
    finally:
        (device / "driver_override").write_text("\n")
        (device / "driver" / "unbind").write_text(EDU)


def test_mediated_devices_are_shown_under_their_parent(lab_machine: str) -> None:
    if lab_machine != "full" or not Path("/sys/class/mdev_bus/mtty").exists():
        pytest.skip("the machine or the kernel has no mtty")
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    types = Path("/sys/class/mdev_bus/mtty/mdev_supported_types")
    (types / "mtty-2" / "create").write_text(uuid)
    try:
        shown = run("show", uuid)
        assert (shown["parent"], shown["type"]) == ("mtty", "mtty-2")
        assert shown["group"]["devices"][0]["role"] == "mdev"
        assert shown["vfio_group_node"] == f"/dev/vfio/{shown['iommu_group']}"
    finally:
        Path(f"/sys/bus/mdev/devices/{uuid}/remove").write_text("1")


def test_without_root_all_is_listed_and_what_needs_root_is_said() -> None:
    # Once with privileges, so that all modules are loaded: others may not see their folder.
    code = (
        "import contextlib, io, os, sys\n"
        "from vfiotool.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(sys.argv[1:])\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--json", "devices"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    devices = json.loads(done.stdout)["devices"]
    assert len(devices) == len(os.listdir(PCI / "devices"))
    sizes = {item["config"]["size"] for item in devices}
    assert sizes == {64}
    assert any(not item["config"]["complete"] for item in devices)
    port = next(item["address"] for item in devices if item["driver"] == "pcieport")
    done = subprocess.run(
        [sys.executable, "-c", code, "show", port], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"only 64 bytes are readable; the rest needs root" in done.stdout


def test_a_device_that_is_removed_while_the_host_is_listed_breaks_nothing(host: Host) -> None:
    victims = [
        item.address
        for item in read_functions(host, list_addresses(host))
        if item.class_code == "00ff00"
    ]
    assert victims, "no device that can be spared"
    victim = victims[-1]

    def come_and_go() -> None:
        for _ in range(3):
            (PCI / "devices" / victim / "remove").write_text("1")
            Path("/sys/bus/pci/rescan").write_text("1")

    for _ in range(4):
        worker = threading.Thread(target=come_and_go)
        worker.start()
        try:
            inventory, reader = read_inventory(host), DetailReader(host)
            for function in inventory.functions:
                reader.read(function)
        finally:
            worker.join()
        found = {item.address for item in inventory.functions}
        assert found | {victim} == set(os.listdir(PCI / "devices"))
