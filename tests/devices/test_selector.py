"""Selectors: every way to name a device, and never a guess."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfiotool.devices.selector import path_of, resolve, resolve_all
from vfiotool.errors import Ambiguous, NotFound, UsageError, VfiotoolError
from vfiotool.host.host import Host
from vfiotool.host.tree import MemoryTree

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
PORT = "pci0000:00/0000:00:1c.0"


def dsn_config(serial: bytes) -> bytes:
    config = bytearray(4096)
    config[0x06] = 0x10
    config[0x34], config[0x40] = 0x40, 0x10
    config[0x100:0x104] = (0x0002 | 0x1 << 16 | 0x140 << 20).to_bytes(4, "little")
    config[0x140:0x144] = (0x0003 | 0x1 << 16).to_bytes(4, "little")
    config[0x144:0x14C] = serial[::-1]
    return bytes(config)


def vpd(*fields: tuple[bytes, bytes]) -> bytes:
    body = b"".join(key + bytes([len(value)]) + value for key, value in fields)
    return b"\x82\x04\x00Card\x90" + len(body).to_bytes(2, "little") + body + b"\x78"


def build() -> Host:
    files: dict[str, bytes | int] = {}
    links: dict[str, str] = {}

    def function(path: str, pci_id: str, subsystem: str = "1AF4:1100") -> str:
        address = path.rpartition("/")[2]
        files[f"/sys/devices/{path}/uevent"] = (
            f"PCI_ID={pci_id}\nPCI_SUBSYS_ID={subsystem}\nPCI_SLOT_NAME={address}\n".encode()
        )
        links[f"/sys/bus/pci/devices/{address}"] = f"../../../devices/{path}"
        return f"/sys/devices/{path}"

    function(PORT, "8086:A110")
    gpu = function(f"{PORT}/0000:02:00.0", "10DE:2684", "1043:88E2")
    files[f"{gpu}/label"] = b"PCIe Slot 2\n"
    function(f"{PORT}/0000:02:00.1", "10DE:22BA")
    nic = function("pci0000:00/0000:00:1d.0/0000:05:00.0", "8086:10C9")
    files[f"{nic}/config"] = dsn_config(bytes.fromhex("001b21ffffaabbcc"))
    files[f"{nic}/net/eth0/address"] = b"00:1b:21:aa:bb:cc\n"
    for index in range(2):
        vf = f"0000:05:10.{index}"
        function(f"pci0000:00/0000:00:1d.0/{vf}", "8086:10CA")
        links[f"{nic}/virtfn{index}"] = f"../{vf}"
        links[f"/sys/devices/pci0000:00/0000:00:1d.0/{vf}/physfn"] = "../0000:05:00.0"
    for bus, serial in (("06", "twin-a"), ("07", "twin-b")):
        disk = function(f"pci0000:00/0000:00:1e.{int(bus) - 6}/0000:{bus}:00.0", "1B36:0010")
        files[f"{disk}/nvme/nvme{int(bus) - 6}/serial"] = f"{serial}\n".encode()
        subsystem = f"/sys/devices/virtual/nvme-subsystem/nvme-subsys{int(bus) - 6}"
        name = f"nvme{int(bus) - 6}"
        links[f"{subsystem}/{name}"] = f"../../../..{disk[4:]}/nvme/{name}"
        files[f"{subsystem}/{name}n1/size"] = b"100\n"
        links[f"/sys/class/block/{name}n1"] = (
            f"../../devices/virtual/nvme-subsystem/nvme-subsys{int(bus) - 6}/{name}n1"
        )
        links[f"/sys/devices/virtual/block/dm-0/slaves/{name}n1"] = "../../x"
    links["/sys/class/block/dm-0"] = "../../devices/virtual/block/dm-0"
    links["/sys/class/block/loop0"] = "../../devices/virtual/block/loop0"
    card = function("pci10000:00/10000:00:02.0", "8086:A808")
    files[f"{card}/vpd"] = vpd((b"PN", b"X-1"), (b"SN", b"S3R1AL\0\0"), (b"RV", b"\0"))
    files["/sys/devices/pci0000:00/0000:00:1c.0/vpd"] = errno.EIO
    links["/sys/class/net/eth0"] = f"../../{nic[5:]}/net/eth0"
    links["/sys/class/net/bond0"] = "../../devices/virtual/net/bond0"
    links["/sys/devices/virtual/net/bond0/lower_eth0"] = "../../eth0"
    links["/sys/class/net/lo"] = "../../devices/virtual/net/lo"
    files["/sys/bus/pci/slots/4/address"] = b"0000:05:00\n"
    files["/sys/bus/pci/slots/5/address"] = b"0000:1f:00\n"
    links[f"/sys/bus/mdev/devices/{UUID}"] = f"../../../devices/virtual/mtty/mtty/{UUID}"
    directories = ["/sys/devices/virtual/net/lo", f"/sys/devices/virtual/mtty/mtty/{UUID}"]
    return Host(MemoryTree(files, links, directories), live=False, name="built")


HOST = build()
# A busy machine draws its examples slowly.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(
    ("selector", "device"),
    [
        ("0000:02:00.0", "0000:02:00.0"),
        ("02:00.0", "0000:02:00.0"),
        ("02:00.0".upper(), "0000:02:00.0"),
        ("10000:00:02.0", "10000:00:02.0"),
        ("id:10de:2684", "0000:02:00.0"),
        ("id:10DE:2684:1043:88E2", "0000:02:00.0"),
        ("serial:00-1b-21-ff-ff-aa-bb-cc", "0000:05:00.0"),
        ("serial:001B21FFFFAABBCC", "0000:05:00.0"),
        ("serial:twin-a", "0000:06:00.0"),
        ("serial:twin-b", "0000:07:00.0"),
        ("serial:S3R1AL", "10000:00:02.0"),
        ("slot:4", "0000:05:00.0"),
        ("slot:PCIe Slot 2", "0000:02:00.0"),
        ("path:0000:00:1c.0/0000:02:00.0", "0000:02:00.0"),
        ("path:00:1c.0/00.1", "0000:02:00.1"),
        ("00:1c.0/0.1", "0000:02:00.1"),
        ("vf:05:00.0/1", "0000:05:10.1"),
        ("vf:net:eth0/0", "0000:05:10.0"),
        ("net:eth0", "0000:05:00.0"),
        ("net:bond0", "0000:05:00.0"),
        ("block:nvme0n1", "0000:06:00.0"),
        ("block:/dev/nvme1n1", "0000:07:00.0"),
        (UUID, UUID),
        (UUID.upper(), UUID),
        (f"mdev:{UUID}", UUID),
    ],
)
def test_each_way_to_name_a_device_gives_its_canonical_name(selector: str, device: str) -> None:
    assert resolve(HOST, selector) == device


def test_what_names_several_devices_is_an_error_that_lists_them() -> None:
    with pytest.raises(Ambiguous) as caught:
        resolve(HOST, "id:1b36:0010")
    assert caught.value.exit_code == 3
    assert "0000:06:00.0, 0000:07:00.0" in caught.value.message
    assert "path:0000:00:1e.0/00.0" in (caught.value.hint or "")
    assert resolve_all(HOST, "id:1b36:0010") == ["0000:06:00.0", "0000:07:00.0"]


def test_a_volume_over_two_disks_names_both() -> None:
    assert resolve_all(HOST, "block:dm-0") == ["0000:06:00.0", "0000:07:00.0"]


def test_no_serial_number_is_corrected_to_that_of_another_device() -> None:
    with pytest.raises(NotFound) as missing:
        resolve(HOST, "serial:twin-c")
    assert "twin-a" not in str(missing.value.hint)
    assert "only while the host's driver has the disk" in str(missing.value.hint)


@pytest.mark.parametrize(
    ("selector", "hint"),
    [
        ("02:00.7", "0000:02:00.0"),
        ("00:02.0", "10000:00:02.0, in another domain"),
        ("id:10de:2685", "id:10de:2684"),
        ("class:12", "vfiotool devices"),
        ("driver:nome", "driver:none"),
        ("group:999", "vfiotool groups"),
        ("00:1f", "vfiotool devices"),
        ("/dev/nvme0n2", "lsblk"),
        ("slot:44", "slot:4"),
        ("slot:5", "vfiotool devices"),
        ("path:00:1c.0/00.5", "path:0000:00:1c.0/00.0"),
        ("vf:05:00.0/7", "vfiotool vf list 0000:05:00.0"),
        ("vf:02:00.0/0", "vfiotool vf list"),
        ("net:eth1", "net:eth0"),
        ("net:lo", "vfiotool devices"),
        ("block:nvme0n2", "block:nvme0n1"),
        ("block:loop0", "vfiotool devices"),
        (UUID[:-1] + "2", UUID),
    ],
)
def test_what_names_nothing_is_not_found_with_the_nearest(selector: str, hint: str) -> None:
    with pytest.raises(NotFound) as caught:
        resolve(HOST, selector)
    assert caught.value.exit_code == 3
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("selector", "hint"),
    [
        ("eth0", "net:eth0"),
        ("nvme0n1", "block:nvme0n1"),
        ("10de:2684", "id:10de:2684"),
        ("NET:eth0", "net:eth0"),
        ("Block:nvme0n1", "block:nvme0n1"),
        ("NET:" + "x" * 5000, "write"),
        ("id:10de", "four hexadecimal digits"),
        ("id:10de:*", "four hexadecimal digits"),
        ("vf:05:00.0", "vf:PF/INDEX"),
        ("vf:05:00.0/-1", "vf:PF/INDEX"),
        ("vf:05:00.0/99999999", "vf:PF/INDEX"),
        ("path:../../etc", "the bridges"),
        ("serial:", "write"),
        ("", "write"),
        ("../../../etc/passwd", "write"),
        ("net:../../x\n", "write"),
        ("0000:02:00.0\x1b[31m", "write"),
        ("vf:" * 100 + "05:00.0" + "/0" * 100, "write"),
        ("x" * 5000, "write"),
    ],
)
def test_what_is_no_selector_is_a_usage_error(selector: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(HOST, selector)
    assert caught.value.exit_code == 2
    assert hint in (caught.value.hint or "")
    assert caught.value.message.isprintable() and len(caught.value.message) < 200


@relaxed
@given(
    st.text(max_size=60)
    | st.sampled_from(["vf:", "net:", "path:", "slot:"]).flatmap(
        lambda kind: st.text(max_size=40).map(lambda rest: kind + rest)
    )
)
def test_any_text_gives_a_device_or_one_clear_error(text: str) -> None:
    try:
        assert resolve(HOST, text)
    except VfiotoolError as error:
        assert error.exit_code in (2, 3)
        assert error.message.isprintable()


def test_the_path_of_a_device_names_it_again_whatever_its_bus_number() -> None:
    for address in ("0000:02:00.1", "0000:05:00.0", "10000:00:02.0", "0000:00:1c.0"):
        assert resolve(HOST, f"path:{path_of(HOST, address)}") == address
    assert path_of(HOST, "0000:02:00.1") == "0000:00:1c.0/00.1"


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("group:12", None),
        ("06:00", "06:00.0"),
        ("0000:06:00", "06:00.0"),
        ("/dev/nvme0n1", "block:nvme0n1"),
        ("/sys/bus/pci/devices/0000:06:00.0", "06:00.0"),
        ("/sys/class/net/eth0", "net:eth0"),
    ],
)
def test_filters_and_what_other_tools_write(selector: str, found: str | None) -> None:
    if found is not None:
        assert set(resolve_all(HOST, found)) <= set(resolve_all(HOST, selector))


def test_the_number_of_a_group_is_not_a_selector_and_the_right_one_is_named() -> None:
    from vfiotool.snapshot.load import open_root

    host = open_root(str(Path(__file__).parents[2] / "fixtures" / "hosts" / "vfs-enabled"))
    for number, hint in (("10", "did you mean group:10?"), ("99", "write 0000:05:01.0")):
        with pytest.raises(UsageError) as caught:
            resolve(host, number)
        assert (caught.value.hint or "").startswith(hint)


def test_a_driver_and_a_group_name_all_that_they_have() -> None:
    from vfiotool.devices.pci import list_addresses, read_identity
    from vfiotool.snapshot.load import open_root

    root = Path(__file__).resolve().parents[2] / "fixtures" / "hosts" / "vfs-enabled"
    host = open_root(str(root))
    identities = {address: read_identity(host, address) for address in list_addresses(host)}
    drivers = {name: found.driver for name, found in identities.items() if found is not None}
    igbvf = [name for name, driver in drivers.items() if driver == "igbvf"]
    assert igbvf and resolve_all(host, "driver:igbvf") == igbvf
    assert igbvf[0] in resolve_all(host, "group:10")
    unbound = [name for name, driver in drivers.items() if driver is None]
    assert resolve_all(host, "driver:none") == unbound
    network = resolve_all(host, "class:network")
    assert set(igbvf) < set(network)
    assert resolve_all(host, "class:02") == resolve_all(host, "class:0x0200") == network
    with pytest.raises(UsageError, match="not a device selector"):
        resolve_all(host, "class:nonsense")
