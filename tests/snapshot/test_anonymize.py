"""--anonymize: nothing that identifies the owner remains, and what belongs together still does."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfiotool.devices.config.vpd import parse_vpd
from vfiotool.devices.mdev import read_mdevs
from vfiotool.devices.selector import resolve
from vfiotool.host.host import Host
from vfiotool.snapshot.anonymize import anonymized
from vfiotool.snapshot.load import tree_of
from vfiotool.snapshot.mask import Mask
from vfiotool.snapshot.text import NOT_CAPTURED, Snapshot, format_snapshot, parse_snapshot

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
DISK_UUID = "0f3d9f42-1111-4a4b-8c8c-aabbccddeeff"
MAC = "00:1b:21:aa:bb:cc"
SERIAL = "S4EWNX0R123456"
NIC = "/sys/devices/pci0000:00/0000:00:1d.0/0000:05:00.0"
DISK = "/sys/devices/pci0000:00/0000:00:1e.0/0000:06:00.0"
KEY = b"k" * 32
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def vpd() -> bytes:
    fields = ((b"PN", b"X710-DA2"), (b"SN", SERIAL.encode()), (b"V0", b"asset 4711"))
    body = b"".join(key + bytes([len(value)]) + value for key, value in fields) + b"RV\x01"
    head = b"\x82\x04\x00Card\x90" + (len(body) + 1).to_bytes(2, "little") + body
    return head + bytes([-sum(head) & 0xFF]) + b"\x78"


def config() -> bytes:
    data = bytearray(4096)
    data[0:4] = bytes.fromhex("8680c910")
    data[0x06], data[0x34], data[0x40] = 0x10, 0x40, 0x10
    data[0x100:0x104] = (0x0003 | 0x1 << 16).to_bytes(4, "little")
    data[0x104:0x10C] = bytes.fromhex("001b21ffffaabbcc")[::-1]
    return bytes(data)


def taken() -> Snapshot:
    files: dict[str, bytes | int] = {
        f"{NIC}/config": config(),
        f"{NIC}/vpd": vpd(),
        f"{NIC}/uevent": b"PCI_ID=8086:10C9\n",
        f"{NIC}/net/enp5s0/address": f"{MAC}\n".encode(),
        f"{NIC}/net/enx001b21aabbcd/address": b"00:1b:21:aa:bb:cd\n",
        f"{DISK}/uevent": b"PCI_ID=144D:A808\n",
        f"{DISK}/nvme/nvme0/serial": f"{SERIAL}      \n".encode(),
        f"{DISK}/nvme/nvme0/model": b"Samsung SSD 970\n",
        f"{DISK}/nvme/nvme0/nvme0n1/wwid": b"eui.002538b331b0c1d2\n",
        f"{DISK}/nvme/nvme0/subsysnqn": f"nqn.1994-11.com.samsung:nvme:{SERIAL}\n".encode(),
        "/sys/devices/virtual/block/dm-0/dm/uuid": b"LVM-" + b"aB3" * 21 + b"x\n",
        "/sys/class/drm/card0/edid": b"\0\xff\xff\xff\0serial!",
        "/proc/sys/kernel/hostname": b"build-server-7\n",
        "/proc/cmdline": f"root=UUID={DISK_UUID} ip=192.0.2.17::192.0.2.1 "
        f"BOOTIF=01-{MAC.replace(':', '-')} nfsroot=storage.example.net:/x\n".encode(),
        "/proc/self/mountinfo": b"30 1 0:5 / /mnt rw - nfs4 storage.example.net:/export rw\n"
        b"31 1 0:6 / /home rw - ext4 /dev/mapper/build--server--7-home rw\n",
        "/proc/net/route": b"Iface\tDestination\tGateway\tFlags\tMask\n"
        b"eth0\t00000000\t010200C0\t0003\t00000000\neth0\t000200C0\t00000000\t0001\t00FFFFFF\n",
        "/proc/net/ipv6_route": b"20010db8000000000000000000000005 80 " + b"0" * 32 + b" 00 lo\n",
        "/proc/vfiotool/addresses": b"eth0\t192.0.2.17/24\neth0\t2001:db8::5/64\nlo\t::1/128\n",
        "/etc/os-release": b"ID=debian\nVERSION_ID=12\n",
    }
    links = {
        "/sys/bus/pci/devices/0000:05:00.0": f"../../..{NIC[4:]}",
        "/sys/bus/pci/devices/0000:06:00.0": f"../../..{DISK[4:]}",
        "/sys/class/net/enp5s0": f"../..{NIC[4:]}/net/enp5s0",
        f"/sys/bus/mdev/devices/{UUID}": f"../../../devices/virtual/mtty/mtty/{UUID}",
        f"/sys/devices/virtual/mtty/mtty/{UUID}/mdev_type": "../mdev_supported_types/mtty-2",
    }
    return Snapshot({"machine": "x"}, files, links)


def masked() -> Snapshot:
    return anonymized(taken(), KEY)


def test_nothing_that_identifies_the_owner_remains() -> None:
    text = format_snapshot(masked()).lower()
    secrets = (UUID, DISK_UUID, MAC, MAC.replace(":", "-"), MAC.replace(":", ""), SERIAL, "server")
    secrets += ("001b21", "192.0.2", "0200c0", "2001:db8", "20010db8", "storage", "b331b0c1")
    secrets += (SERIAL.encode().hex(), "4711", "ab3ab3", "ccbbaaffff211b00", "asset", "serial!")
    for secret in secrets:
        assert secret.lower() not in text, secret


def test_what_the_answers_need_is_kept() -> None:
    found = masked()
    assert found.files[f"{DISK}/nvme/nvme0/model"] == b"Samsung SSD 970\n"
    assert found.files["/etc/os-release"] == taken().files["/etc/os-release"]
    assert found.files[f"{NIC}/uevent"] == b"PCI_ID=8086:10C9\n"
    assert found.files["/sys/class/drm/card0/edid"] == NOT_CAPTURED
    assert found.header["anonymized"] == "yes"
    plain, changed = config(), found.files[f"{NIC}/config"]
    assert isinstance(changed, bytes)
    assert changed[:0x104] == plain[:0x104] and changed[0x10C:] == plain[0x10C:]


def test_one_value_has_one_stand_in_wherever_it_turns_up() -> None:
    found = masked()
    serial = found.files[f"{DISK}/nvme/nvme0/serial"]
    nqn = found.files[f"{DISK}/nvme/nvme0/subsysnqn"]
    product = found.files[f"{NIC}/vpd"]
    assert isinstance(serial, bytes) and isinstance(nqn, bytes) and isinstance(product, bytes)
    word = serial.strip().decode()
    assert len(word) == len(SERIAL) and word.encode() in nqn
    assert dict(parse_vpd(product).fields)["SN"] == word
    cmdline, hostname = found.files["/proc/cmdline"], found.files["/proc/sys/kernel/hostname"]
    mounts, mac = found.files["/proc/self/mountinfo"], found.files[f"{NIC}/net/enp5s0/address"]
    assert isinstance(cmdline, bytes) and isinstance(mac, bytes) and isinstance(hostname, bytes)
    assert isinstance(mounts, bytes)
    assert mac.strip().replace(b":", b"-") in cmdline
    assert hostname.strip().replace(b"-", b"--") in mounts


def test_vpd_keeps_its_shape_and_a_right_checksum() -> None:
    changed = masked().files[f"{NIC}/vpd"]
    assert isinstance(changed, bytes) and len(changed) == len(vpd())
    assert parse_vpd(vpd()).checksum_ok and parse_vpd(changed).checksum_ok
    assert dict(parse_vpd(changed).fields)["PN"] == "X710-DA2"


def test_the_masked_host_can_still_be_asked() -> None:
    host = Host(tree_of(masked(), "x"), live=False, name="x")
    (mdev,) = read_mdevs(host)
    assert mdev.type == "mtty-2" and mdev.uuid != UUID and resolve(host, mdev.uuid) == mdev.uuid
    assert resolve(host, "net:enp5s0") == "0000:05:00.0"
    text = format_snapshot(masked())
    assert parse_snapshot(text.encode(), "x").files == masked().files


def test_another_key_gives_other_stand_ins_and_the_same_key_the_same() -> None:
    assert format_snapshot(masked()) == format_snapshot(masked())
    assert format_snapshot(anonymized(taken())) != format_snapshot(anonymized(taken()))


def test_routes_and_addresses_of_one_network_stay_in_one_network() -> None:
    found = masked()
    addresses, route = found.files["/proc/vfiotool/addresses"], found.files["/proc/net/route"]
    assert isinstance(addresses, bytes) and isinstance(route, bytes)
    interface, six, loop = (line.split("\t")[1] for line in addresses.decode().splitlines())
    words = [line.split("\t") for line in route.decode().splitlines()[1:]]
    gateway = IPv4Address(bytes.fromhex(words[0][2])[::-1])
    network = IPv4Address(bytes.fromhex(words[1][1])[::-1])
    assert ip_network(interface, strict=False) == ip_network(f"{network}/24")
    assert gateway in ip_network(interface, strict=False)
    assert words[0][1] == "00000000" and words[1][4] == "00FFFFFF"
    assert loop == "::1/128" and six.endswith("/64")


@relaxed
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_two_addresses_never_share_a_stand_in_and_share_prefixes_as_before(a: int, b: int) -> None:
    mask = Mask(KEY)
    one, two = a.to_bytes(4, "big"), b.to_bytes(4, "big")
    new_one, new_two = mask.ipv4(one), mask.ipv4(two)
    if one[0] in (0, 127, 255) or two[0] in (0, 127, 255):
        return
    for length in range(1, 5):
        assert (one[:length] == two[:length]) == (new_one[:length] == new_two[:length])


@relaxed
@given(st.binary(min_size=16, max_size=16))
def test_an_ipv6_address_keeps_its_kind(packed: bytes) -> None:
    before, after = IPv6Address(packed), IPv6Address(Mask(KEY).ipv6(packed))
    assert before.is_link_local == after.is_link_local
    assert before.is_multicast == after.is_multicast or packed[0] != 0xFF


@pytest.mark.parametrize("text", ["fe80::1", "fe81::1", "febf:ffff::1"])
def test_every_link_local_prefix_is_kept(text: str) -> None:
    """Link-local is fe80::/10: fe81:: would have become a global address."""
    assert IPv6Address(Mask(KEY).ipv6(IPv6Address(text).packed)).is_link_local


@pytest.mark.parametrize(
    "text", ["0000:05:00.0", "10000:e1:00.0", "8086:10c9", "1-2:1.0", "pci0000:00", "6.12.117"]
)
def test_what_only_looks_like_an_address_is_left_alone(text: str) -> None:
    assert Mask(KEY).text(text) == text


@relaxed
@given(st.text(max_size=80))
def test_masking_any_text_ends_and_leaves_no_mac(text: str) -> None:
    once = Mask(KEY).text(f"{text} {MAC}")
    assert MAC not in once and not re.search("001b21aabbcc", once)


def test_a_link_local_address_that_was_given_by_hand_stays_one() -> None:
    """`why` says the same of a host and of its anonymized snapshot."""
    given, made = IPv6Address("fe80::1"), IPv6Address("fe80::5054:ff:fe12:3456")
    assert IPv6Address(Mask(KEY).ipv6(given.packed)) == given
    assert int(IPv6Address(Mask(KEY).ipv6(made.packed))) >> 32 & 0xFFFFFFFF
