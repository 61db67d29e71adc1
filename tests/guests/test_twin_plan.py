"""From a snapshot to its twin's machine, without a guest: every fixture host, and hosts made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vfiotool.cli.main import main
from vfiotool.lab.machines import DeviceModel
from vfiotool.lab.twin_compare import (
    compare_groups,
    compare_plans,
    compare_verdicts,
    is_explained,
)
from vfiotool.lab.twin_facts import TwinFunction, TwinHost, read_twin_host
from vfiotool.lab.twin_lacks import LACKS, TwinLack
from vfiotool.lab.twin_plan import TwinPlan, plan_twin
from vfiotool.lab.twin_run import played, setup_script, twin_machine
from vfiotool.models import ReplayModel, bars_of

HOSTS = Path(__file__).resolve().parents[2] / "fixtures" / "hosts"
NAMES = sorted(path.name for path in HOSTS.iterdir())
BUILT = ("intel-workstation", "two-socket-server", "amd-desktop")
ENDPOINT = bytes(256)


def bridge_config(kind: int, *, acs: bool | None = None) -> bytes:
    config = bytearray(4096)
    config[0x06], config[0x0E], config[0x34] = 0x10, 1, 0x40
    config[0x40:0x44] = bytes((0x10, 0, kind << 4 | 2, 0))
    if acs is not None:
        config[0x100:0x108] = bytes((0x0D, 0, 1, 0, 0x5F, 0, 0x1D if acs else 0, 0))
    return bytes(config)


def function(
    address: str,
    *parents: str,
    port: str | None = None,
    class_code: int = 0x020000,
    root: str = "0000:00",
    acs: bool | None = None,
    **more: Any,
) -> TwinFunction:
    found = TwinFunction(
        address=address, root=root, parents=parents, port=port, class_code=class_code,
        vendor=0x8086, device=0x1234, config=ENDPOINT, resources=(), group="1", numa_node=0,
        driver=None, is_vf=False, vfs=0, acs_on=acs,
    )  # fmt: skip
    return replace(found, **more)


def planned(*functions: TwinFunction, iommu: Any = "intel", bits: int | None = 48) -> TwinPlan:
    return plan_twin(TwinHost("made up", functions, iommu, bits, ()))


def models(plan: TwinPlan) -> list[str]:
    return [item.model if isinstance(item, DeviceModel) else "replay" for item in plan.items]


@pytest.mark.parametrize("name", NAMES)
def test_every_fixture_host_has_a_twin_with_all_its_functions_or_says_why_not(name: str) -> None:
    host = read_twin_host(str(HOSTS / name))
    plan = plan_twin(host)
    for one in host.functions:
        said = any(one.address in line for line in plan.differences)
        assert one.address in plan.addresses or said, one.address
    assert len(set(plan.addresses.values())) == len(plan.addresses)
    # Those hosts that are lab guests: nothing has to move but what is in another domain.
    moved = [old for old, new in plan.addresses.items() if old != new]
    assert name in BUILT or all(
        any(old in line and "domain 0" in line for line in plan.differences) for old in moved
    )
    for one in plan.replays:
        card = ReplayModel(one.original.config, one.original.resources)
        assert (card.config.data[:4], card.config.command) == (one.original.config[:4], 0)
        sizes = {spec.index: spec.size for spec in bars_of(one.original.resources)}
        assert {n: card.region_size(n) for n in sizes} == sizes
        card.close()
    machine = twin_machine(plan, {one.original.address: "/s" for one in plan.replays})
    assert len(machine.devices) + len(machine.served) == len(plan.items)
    ids = [dict(item.properties).get("id") for item in machine.devices]
    buses = {dict(item.properties)["bus"] for item in machine.devices}
    assert buses <= {"pcie.0", *filter(None, ids)}
    script = setup_script(host, plan)
    for one in host.functions:
        if one.driver == "vfio-pci" and one.address in plan.addresses:
            assert f"on {plan.addresses[one.address]} vfio-pci" in script


def test_switches_bridges_and_functions_keep_their_places() -> None:
    plan = planned(
        function("0000:00:00.0", class_code=0x060000),
        function("0000:00:01.0", port="root port", class_code=0x060400, acs=True),
        function("0000:01:00.0", "0000:00:01.0", port="upstream", class_code=0x060400),
        function("0000:02:00.0", "0000:00:01.0", "0000:01:00.0", port="downstream", acs=False),
        function("0000:02:01.0", "0000:00:01.0", "0000:01:00.0", port="downstream", acs=True),
        function("0000:03:00.0", "0000:00:01.0", "0000:01:00.0", "0000:02:00.0"),
        function("0000:03:00.1", "0000:00:01.0", "0000:01:00.0", "0000:02:00.0"),
        function("0000:04:00.0", "0000:00:01.0", "0000:01:00.0", "0000:02:01.0"),
        function("0000:00:1c.0", port="pci"),
        function("0000:05:03.0", "0000:00:1c.0"),
    )
    assert models(plan) == [
        "pcie-root-port", "x3130-upstream", "xio3130-downstream", "replay", "replay",
        "xio3130-downstream", "replay", "pci-bridge", "replay",
    ]  # fmt: skip
    assert plan.addresses["0000:04:00.0"] == "0000:04:00.0"
    assert plan.addresses["0000:05:03.0"] == "0000:05:03.0"
    first = dict(plan.replays[0].properties)
    assert (first["addr"], first["multifunction"]) == ("0x0.0x0", "on")
    assert any("0000:02:01.0" in line and "ACS" in line for line in plan.differences)
    assert plan.acs_off == () and plan.kernel_arguments == ()


def test_a_port_without_isolation_has_it_turned_off_in_the_twin() -> None:
    plan = planned(
        function("0000:00:00.0", class_code=0x060000),
        function("0000:00:01.1", port="root port", acs=None),
        function("0000:00:03.1", port="root port", acs=True),
    )
    assert plan.addresses["0000:00:01.1"] == "0000:00:01.0", "without function 0 it becomes it"
    assert plan.kernel_arguments == ("pci=disable_acs_redir=0000:00:01.0",)


def test_buses_are_numbered_as_firmware_does_and_old_addresses_are_mapped() -> None:
    """An AMD desktop: its buses are numbered otherwise, and nothing is at 1f."""
    plan = planned(
        function("0000:00:00.0", class_code=0x060000, vendor=0x1022),
        function("0000:00:01.2", port="root port", acs=True),
        function("0000:20:00.0", "0000:00:01.2"),
        function("0000:00:03.1", port="root port", acs=True),
        function("0000:2b:00.0", "0000:00:03.1"),
        function("0000:2b:00.1", "0000:00:03.1", class_code=0x040300),
        function("0000:00:1e.0", class_code=0x0C0330),
        iommu="amd",
        bits=None,
    )
    assert plan.addresses["0000:20:00.0"] == "0000:01:00.0"
    assert plan.addresses["0000:2b:00.1"] == "0000:02:00.1"
    moved = plan.addresses["0000:00:1e.0"]
    assert moved == "0000:00:02.0" and any("slot 02" in line for line in plan.differences)
    assert any("host bridge is QEMU's" in line for line in plan.differences)
    assert plan.iommu == "amd"


def test_other_root_buses_keep_their_numbers_and_other_domains_move() -> None:
    plan = plan_twin(
        TwinHost(
            "made up",
            (
                function("0000:00:00.0", class_code=0x060000),
                function("0000:00:02.0"),
                function("0000:80:02.0", root="0000:80", port="root port", acs=True, numa_node=1),
                function("0000:81:00.0", "0000:80:02.0", root="0000:80", numa_node=1),
                function("10000:e0:06.0", root="10000:e0"),
            ),
            "intel", 48, (), nodes=2,
        )
    )  # fmt: skip
    assert plan.addresses["0000:81:00.0"] == "0000:81:00.0"
    assert plan.addresses["10000:e0:06.0"] == "0000:00:01.0"
    (expander,) = [item for item in plan.items if getattr(item, "model", "") == "pxb-pcie"]
    assert isinstance(expander, DeviceModel)
    told = dict(expander.properties)
    assert (told["bus_nr"], told["numa_node"], plan.numa_nodes) == ("128", "1", 2)
    assert sum("root bus" in line and "domain 0" in line for line in plan.differences) == 1


def test_a_further_root_bus_moves_up_where_the_buses_before_it_need_its_number() -> None:
    ports = [function(f"0000:00:{n:02x}.0", port="root port", acs=True) for n in range(1, 5)]
    plan = planned(*ports, function("0000:03:00.0", root="0000:03"))
    assert plan.addresses["0000:03:00.0"] == "0000:05:00.0"
    assert any("root bus 0000:03: its number is 05" in line for line in plan.differences)


def test_virtual_functions_are_made_on_a_stand_in_and_mapped_to_its_own() -> None:
    vfs = [
        function(f"0000:01:10.{number}", "0000:00:01.0", is_vf=True, physfn="0000:01:00.0")
        for number in range(8)
    ]
    functions = (
        function("0000:00:01.0", port="root port", acs=True),
        function("0000:01:00.0", "0000:00:01.0", vfs=8),
        *vfs,
    )
    plan = plan_twin(TwinHost("made up", functions, "intel", 48, ()), {"0000:01:00.0": "sriov"})
    assert models(plan) == ["pcie-root-port", "igb"]
    assert plan.vfs == {"0000:01:00.0": 7}
    assert plan.addresses["0000:01:10.1"] == "0000:01:10.2"
    assert "0000:01:10.7" not in plan.addresses
    assert any(line.startswith("0000:01:10.7: left out") for line in plan.differences)
    assert "echo 7 > /sys/bus/pci/devices/0000:01:00.0/sriov_numvfs" in setup_script(
        TwinHost("made up", functions, "intel", 48, ()), plan
    )


def test_what_cannot_be_is_said() -> None:
    plan = planned(
        function("0000:00:00.0", class_code=0x060000),
        function("0000:00:02.0", vfs=7),
        function("0000:00:02.1", is_vf=True),
        function("0000:00:03.0", config=b""),
        bits=46,
    )
    text = "\n".join(plan.differences)
    for words in (
        "7 virtual functions", "0000:00:02.1: a virtual function", "not in the snapshot",
        "39 or 48, not 46",
    ):  # fmt: skip
        assert words in text
    assert plan.iommu_bits == 39 and "0000:00:03.0" not in plan.addresses


def test_disks_and_cards_in_use_get_stand_ins() -> None:
    host = TwinHost(
        "made up",
        (
            function("0000:00:00.0", class_code=0x060000),
            function("0000:00:02.0", class_code=0x010802, driver="nvme"),
            function("0000:00:03.0", driver="ixgbe"),
            function("0000:00:04.0", driver="ixgbe"),
        ),
        "intel",
        39,
        (),
    )
    kinds: dict[str, Any] = {"0000:00:02.0": "nvme", "0000:00:03.0": "network"}
    plan = plan_twin(host, kinds, frozenset(kinds))
    assert models(plan) == ["replay", "e1000e", "replay"]
    assert plan.replays[0].disk and len(plan.networks) == 1
    script = setup_script(host, plan)
    assert "mkfs.ext4" in script and "ip route add default" in script
    assert "on 0000:00:04.0 uio_pci_generic" in script
    assert "mkfs" not in setup_script(host, plan_twin(host, kinds)), "works, and is in no use"


def test_an_nvme_disk_is_played_with_its_own_ids_and_serial() -> None:
    host = read_twin_host(str(HOSTS / "amd-desktop"))
    plan = plan_twin(host, {"0000:05:00.0": "nvme", "0000:02:00.1": "sata"})
    assert "ich9-ahci" in models(plan)
    (replay,) = [one for one in plan.replays if one.disk]
    model = played(replay)
    assert bytes(model.config.data[:4]).hex() == "4d140aa8"
    assert getattr(model, "serial", None) == b"BUILT-980-0003"
    model.close()


def test_a_card_whose_pin_linux_takes_for_broken_is_played_without_one() -> None:
    pin = bytearray(ENDPOINT)
    pin[0x3D] = 1
    broken = {"device": 0x1572, "config": bytes(pin)}
    plan = planned(
        function("0000:00:02.0", driver="i40e", **broken),
        function("0000:00:03.0", **broken),
        function("0000:00:04.0", driver="ixgbe", config=bytes(pin)),
    )
    pins = []
    for replay in plan.replays:
        card = played(replay)
        pins.append(card.interrupt_counts()[0])
        card.close()
    assert pins == [0, 1, 1]
    assert [lack.line[:12] for lack in plan.lacks if lack.kind == "pin"] == ["0000:00:02.0"]


def test_a_full_root_bus_leaves_out_what_has_no_room() -> None:
    crowd = [function(f"0000:00:{slot:02x}.0") for slot in range(1, 0x1E)]
    plan = planned(*crowd, function("0000:00:1e.0"))
    assert any("the root bus is full" in line for line in plan.differences)
    assert "0000:00:1e.0" not in plan.addresses


ONES = b"\xff" * 256


def lacks(plan: TwinPlan, kind: str) -> str:
    return "; ".join(lack.line for lack in plan.lacks if lack.kind == kind)


def test_what_reads_as_all_ones_is_left_out_with_all_below_and_said() -> None:
    """It was planned, and the whole twin ended when it was to be played."""
    plan = planned(
        function("0000:00:02.0", config=ONES),
        function("0000:00:03.0", config=ONES, class_code=0x060400),
        function("0000:01:00.0", "0000:00:03.0"),
        function("0000:00:04.0", config=b"\0" * 0x0E + b"\2" + bytes(241)),
        function("0000:00:05.0"),
    )
    assert dict(plan.addresses) == {"0000:00:05.0": "0000:00:05.0"}
    assert "0000:00:02.0: its configuration space reads as all ones" in lacks(plan, "config")
    assert "0000:00:04.0: its configuration space is not an endpoint's" in lacks(plan, "config")
    assert "0000:01:00.0" in lacks(plan, "left-out")


@pytest.mark.parametrize("config", [bytes(64), ONES, b""], ids=["64 bytes", "ones", "none"])
def test_ports_whose_capabilities_are_not_there_are_known_by_their_driver(config: bytes) -> None:
    """A snapshot that was taken without root has 64 bytes of each configuration space."""
    from vfiotool.lab.twin_facts import _with_ports

    port: dict[str, Any] = {"config": config, "class_code": 0x060400, "driver": "pcieport"}
    functions = [
        function("0000:00:02.0", group="1", **port),
        function("0000:01:00.0", "0000:00:02.0", group="2", **port),
        function("0000:02:01.0", "0000:00:02.0", "0000:01:00.0", group="3", **port),
        function("0000:03:00.0", "0000:00:02.0", "0000:01:00.0", "0000:02:01.0", group="3"),
        function("0000:00:1c.0", group="4", class_code=0x060400, config=config),
    ]
    found = {one.address: one for one in _with_ports(functions)}
    assert [one.port for one in found.values()] == [
        "root port", "upstream", "downstream", None, "pci",
    ]  # fmt: skip
    assert found["0000:00:02.0"].acs_on and not found["0000:02:01.0"].acs_on
    plan = planned(*found.values())
    assert models(plan)[:3] == ["pcie-root-port", "x3130-upstream", "xio3130-downstream"]
    assert plan.addresses["0000:03:00.0"] == "0000:03:00.0"
    assert "0000:00:02.0" in lacks(plan, "config")


PORTS = ("root port", "upstream", "downstream", "pcie to pci", "pci to pcie", "pci")
# What QEMU takes: a model, and below what it may be.
ROOTS, LINKS = ("pcie.0",), ("pcie-root-port", "xio3130-downstream")
CONVENTIONAL = ("pci-bridge", "pcie-pci-bridge")
PLACES = {
    "pcie-root-port": ROOTS,
    "x3130-upstream": LINKS,
    "xio3130-downstream": ("x3130-upstream",),
    "pcie-pci-bridge": (*ROOTS, *LINKS, "x3130-upstream"),
    "pci-bridge": (*ROOTS, *LINKS, "x3130-upstream", *CONVENTIONAL),
}


@pytest.mark.parametrize("above", PORTS)
@pytest.mark.parametrize("below", PORTS)
def test_bridges_in_odd_places_are_such_as_qemu_takes_there(above: str, below: str) -> None:
    plan = planned(
        function("0000:00:02.0", port=above),
        function("0000:01:03.0", "0000:00:02.0", port=below),
        function("0000:02:05.1", "0000:00:02.0", "0000:01:03.0"),
    )
    by_name = {"pcie.0": "pcie.0"}
    for item in plan.items:
        given = dict(item.properties)
        parent = by_name[given["bus"]]
        if isinstance(item, DeviceModel):
            assert parent in PLACES[item.model], (item.model, parent)
            by_name[given["id"]] = item.model
        assert parent not in LINKS or given["addr"].startswith("0x0."), given
    assert len(plan.addresses) == 3


def test_no_bus_has_a_number_above_ff() -> None:
    ports = [
        function(f"0000:00:{slot:02x}.{number}", port="root port")
        for slot in range(1, 0x1E)
        for number in range(8)
    ]
    switches = [
        function(f"0000:{number + 1:02x}:00.0", port.address, port="upstream")
        for number, port in enumerate(ports[:40])
    ]
    plan = planned(*ports, *switches, function("0000:ff:00.0", ports[-1].address))
    assert all(len(new) == len("0000:00:00.0") for new in plan.addresses.values())
    left = [one.address for one in ports if one.address not in plan.addresses]
    assert left and all(one in lacks(plan, "no-room") for one in left)
    assert "0000:ff:00.0" in lacks(plan, "left-out")


def test_root_buses_without_room_are_left_out_with_their_devices() -> None:
    plan = planned(
        *(
            function(f"0000:{bus:02x}:01.0", root=f"0000:{bus:02x}")
            for bus in range(0, 256, 4)
        )
    )  # fmt: skip
    lost = [f"0000:{bus:02x}:01.0" for bus in range(0, 256, 4)]
    lost = [one for one in lost if one not in plan.addresses]
    assert lost and all(one in lacks(plan, "left-out") for one in lost)


def test_a_wide_bar_takes_the_place_of_the_next_one() -> None:
    wide, narrow = (0x1000, 0x1FFF, 0x140204), (0x4000, 0x4FFF, 0x40200)
    assert [spec.index for spec in bars_of((wide, narrow, narrow))] == [0, 2]


def test_a_host_without_pci_has_no_twin(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "sys/bus/pci/devices").mkdir(parents=True)
    assert main(["lab", "twin", "--plan", str(tmp_path)]) == 3
    assert "no PCI functions" in capsys.readouterr().err


def _group(number: int, *devices: tuple[str, str], viable: bool = True) -> dict[str, Any]:
    rows = [{"address": address, "role": role} for address, role in devices]
    return {"id": number, "viable": viable, "devices": rows}


def test_groups_are_compared_by_the_original_s_addresses() -> None:
    original = [_group(1, ("0000:20:00.0", "host"), ("0000:20:00.1", "host"), viable=False)]
    addresses = {"0000:20:00.0": "0000:01:00.0", "0000:20:00.1": "0000:01:00.1"}
    same = [_group(7, ("0000:01:00.0", "host"), ("0000:01:00.1", "host"), viable=False)]
    assert compare_groups(original, same, addresses) == []
    apart = [
        _group(7, ("0000:01:00.0", "unbound")),
        _group(8, ("0000:01:00.1", "host"), viable=False),
    ]
    found = {(one.device, one.what) for one in compare_groups(original, apart, addresses)}
    assert found == {
        ("0000:20:00.0", "group members"), ("0000:20:00.0", "viable"), ("0000:20:00.0", "role"),
        ("0000:20:00.1", "group members"),
    }  # fmt: skip
    (lost, _) = compare_groups(original, [same[0] | {"devices": []}], addresses)
    assert lost.twin == "none" and "on the host" in lost.line()


def _judged(address: str, verdict: str, *blockers: tuple[str, str]) -> dict[str, Any]:
    rows = [{"kind": kind, "device": device} for kind, device in blockers]
    return {"address": address, "verdict": verdict, "blockers": rows}


def test_verdicts_are_compared_by_what_a_twin_can_act_out() -> None:
    old, new = "0000:20:00.0", "0000:01:00.0"
    there = {old: new}
    swap = [_judged(old, "blocked", ("swap", old))]
    assert compare_verdicts(swap, [_judged(new, "blocked", ("mounted", new))], there) == []
    shown = [_judged(old, "blocked", ("display", old))]
    (found,) = compare_verdicts(shown, [_judged(new, "available")], there)
    assert found.what == "verdict" and is_explained(found, ())
    (lost, blockers) = compare_verdicts(swap, [_judged(new, "available")], there)
    assert (blockers.original, blockers.twin) == (f"disk in use {old}", "none")
    assert not is_explained(lost, ()) and not is_explained(blockers, ())
    assert is_explained(lost, [TwinLack("config", f"{old}: not there")])
    assert not is_explained(lost, [TwinLack("slot", f"{old}: elsewhere")]), "explains no verdict"


def test_plans_are_compared_step_by_step_and_refusal_by_refusal() -> None:
    old, new = "0000:20:00.0", "0000:01:00.0"

    def plan(target: str, *kinds: str, to: str = "vfio-pci") -> dict[str, Any]:
        return {
            "steps": [
                {"verb": "load-module", "target": "vfio-pci", "to": "loaded"},
                {"verb": "bind-driver", "target": target, "to": to},
            ],
            "refusals": [{"kind": kind, "device": target} for kind in kinds],
        }

    there = {old: new}
    assert compare_plans(plan(old, "swap"), plan(new, "mounted"), there) == []
    (found,) = compare_plans(plan(old), plan(new, to="pci-stub"), there)
    assert (found.device, found.what) == (old, "plan")
    (found,) = compare_plans(plan(old, "display"), plan(new), there)
    assert is_explained(found, ())
    (found,) = compare_plans(plan(old, "route"), plan(new), there)
    assert not is_explained(found, ()) and found.original == "network card in use"


def test_each_lack_of_a_twin_is_one_of_the_table() -> None:
    used = {
        lack.kind for name in NAMES for lack in plan_twin(read_twin_host(str(HOSTS / name))).lacks
    }
    assert used <= LACKS.keys() and {"host-bridge", "switch-acs"} <= used


def test_the_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "twin", "--plan", str(HOSTS / "storage-in-use")]) == 0
    told = capsys.readouterr().out
    assert "0000:01:00.0  0000:01:00.0  nvme" in told
    assert main(["lab", "twin", "--json", "--plan", str(HOSTS / "vfs-enabled")]) == 0
    unlike = json.loads(capsys.readouterr().out)["unlike"]
    assert any("virtual function" in line for line in unlike), "the NVMe controller's"
