"""Which port merges a group, by the kernel's rules; on real kernels: test_acs_on_kernels.py."""

from __future__ import annotations

import struct

import pytest

from tests.fakes.config_space import build
from tests.fakes.small_host import ROOT_BUS, SmallHost
from vfiotool.devices.acs import REQUIRED, find_mergers

ROOT_PORT, UPSTREAM, DOWNSTREAM, TO_PCI, ENDPOINT = 4, 5, 6, 7, 0
ALL = 0x1D
PORT = "0000:00:1c.0"
DEVICE = "0000:01:00.0"


def config(
    kind: int | None,
    acs: tuple[int, int] | None = None,
    *,
    many: bool = False,
    bridge: bool = False,
) -> bytes:
    """A configuration space: PCI Express of that port type, ACS capability and control bits."""
    standard = [] if kind is None else [(0x10, struct.pack("<H", 2 | kind << 4) + bytes(56))]
    extended = [] if acs is None else [(0x0D, 1, struct.pack("<HH", *acs))]
    data = build(standard, extended, bridge=bridge)
    data[0x0E] |= 0x80 if many else 0
    return bytes(data)


def below(port: bytes, device: bytes | None = None) -> tuple[SmallHost, str]:
    small = SmallHost()
    small.function(PORT, class_code="060400", config=port)
    device = device or config(ENDPOINT)
    return small, small.function(DEVICE, under=[PORT], config=device)


def reasons(small: SmallHost, path: str, address: str = DEVICE) -> list[str]:
    return [merger.reason for merger in find_mergers(small.host(), address, path)]


def test_a_root_port_with_all_of_acs_on_isolates() -> None:
    small, path = below(config(ROOT_PORT, (ALL, ALL), bridge=True))
    assert reasons(small, path) == []


def test_a_port_without_the_capability_is_named() -> None:
    small, path = below(config(ROOT_PORT, bridge=True))
    (merger,) = find_mergers(small.host(), DEVICE, path)
    assert (merger.address, merger.missing) == (PORT, tuple(REQUIRED.values()))
    assert merger.reason == f"the root port {PORT} has no ACS capability"


@pytest.mark.parametrize(
    ("bit", "words"),
    [
        (0x01, "source validation"),
        (0x04, "request redirect"),
        (0x08, "completion redirect"),
        (0x10, "upstream forwarding"),
    ],
)
def test_the_one_bit_that_is_off_is_named(bit: int, words: str) -> None:
    small, path = below(config(DOWNSTREAM, (ALL, ALL & ~bit), bridge=True))
    (merger,) = find_mergers(small.host(), DEVICE, path)
    assert merger.missing == (words,)
    assert merger.reason == f"the downstream port {PORT} has ACS {words} switched off"


def test_a_bit_that_the_port_cannot_control_counts_as_on() -> None:
    small, path = below(config(ROOT_PORT, (ALL & ~0x08, ALL & ~0x08), bridge=True))
    assert reasons(small, path) == []


def test_direct_translated_and_translation_blocking_do_not_matter() -> None:
    small, path = below(config(ROOT_PORT, (0x5F, ALL), bridge=True))
    assert reasons(small, path) == []


def test_each_port_of_a_switch_is_judged_and_its_upstream_port_passed_over() -> None:
    small = SmallHost()
    ports = ["0000:00:1c.0", "0000:01:00.0", "0000:02:01.0"]
    kinds = [
        config(ROOT_PORT, (ALL, ALL), bridge=True),
        config(UPSTREAM, bridge=True),
        config(DOWNSTREAM, bridge=True),
    ]
    for depth, (port, data) in enumerate(zip(ports, kinds, strict=True)):
        small.function(port, under=ports[:depth], class_code="060400", config=data)
    path = small.function("0000:03:00.0", under=ports, config=config(ENDPOINT))
    assert reasons(small, path, "0000:03:00.0") == [
        "the downstream port 0000:02:01.0 has no ACS capability"
    ]


def test_behind_a_bridge_to_conventional_pci_all_share_one_identity() -> None:
    small, path = below(config(TO_PCI, bridge=True), config(None))
    assert reasons(small, path) == [
        f"behind {PORT}, a bridge to conventional PCI, all devices share one identity"
    ]


def test_a_conventional_bridge_cannot_isolate() -> None:
    small, path = below(config(None, bridge=True), config(None))
    assert reasons(small, path) == [f"{PORT} is a conventional PCI bridge, which cannot isolate"]


def test_functions_of_one_device_are_judged_by_their_own_acs() -> None:
    for acs, expected in (
        (None, [f"the multi-function device {DEVICE[:-2]} has no ACS capability"]),
        ((ALL, ALL), []),
    ):
        small, path = below(
            config(ROOT_PORT, (ALL, ALL), bridge=True), config(ENDPOINT, acs, many=True)
        )
        small.function(f"{DEVICE[:-1]}1", under=[PORT], config=config(ENDPOINT, acs, many=True))
        assert reasons(small, path) == expected


def test_a_lone_function_needs_no_acs_of_its_own() -> None:
    small, path = below(
        config(ROOT_PORT, (ALL, ALL), bridge=True), config(ENDPOINT, None, many=True)
    )
    assert reasons(small, path) == []


def test_conventional_functions_of_one_device_cannot_be_isolated() -> None:
    small = SmallHost()
    data = config(None, many=True)
    path = small.function("0000:00:1f.0", config=data)
    small.function("0000:00:1f.2", config=data)
    assert path == f"{ROOT_BUS}/0000:00:1f.0"
    assert reasons(small, path, "0000:00:1f.0") == [
        "0000:00:1f is a conventional multi-function device, which cannot isolate"
    ]


def test_a_bridge_is_told_why_it_shares_the_group_of_what_is_below_it() -> None:
    small, path = below(config(TO_PCI, bridge=True), config(None))
    bridge = path.rpartition("/")[0]
    assert reasons(small, bridge, PORT) == reasons(small, path)
    isolating, path = below(config(ROOT_PORT, (ALL, ALL), bridge=True))
    assert reasons(isolating, path.rpartition("/")[0], PORT) == []


def test_a_port_that_the_kernel_trusts_all_the_same_is_not_blamed() -> None:
    """A quirk keeps the port out of the group, so something else must have merged it."""
    small, path = below(config(ROOT_PORT, bridge=True))
    host = small.host()
    assert find_mergers(host, DEVICE, path, {DEVICE, "0000:09:00.0"}) == ()
    assert len(find_mergers(host, DEVICE, path, {DEVICE, PORT})) == 1


def test_without_root_the_port_is_named_and_nothing_is_claimed_missing() -> None:
    small, path = below(config(ROOT_PORT, bridge=True)[:64])
    (merger,) = find_mergers(small.host(), DEVICE, path)
    assert merger.missing == ()
    assert "cannot be read without root" in merger.reason
