"""Hosts and policies from the field: what the kernel would refuse is said before anything runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.kernel import FakeKernel
from vfiotool.change.plans.bind import plan_bind
from vfiotool.change.plans.facts import read_facts
from vfiotool.change.remarks import remarks
from vfiotool.cli.main import main
from vfiotool.devices.drivers import canonical_name, kernel_name, read_missing
from vfiotool.errors import Foretold, UsageError
from vfiotool.policy.facts import read_policy_facts
from vfiotool.policy.parse import parse_policy
from vfiotool.policy.plan import plan_policy
from vfiotool.snapshot.load import open_root

FIELD = Path(__file__).resolve().parents[2] / "fixtures/field"


def case(number: str) -> Path:
    (found,) = FIELD.glob(f"{number}-*")
    return found


def run(
    capsys: pytest.CaptureFixture[str], host: Path, *words: str, as_json: bool = True
) -> tuple[int, Any, str]:
    code = main(["--root", str(host), *(["--json"] if as_json else []), *words])
    seen = capsys.readouterr()
    return code, json.loads(seen.out) if as_json else seen.out, seen.err


def bound_to(payload: Any) -> list[tuple[str, str]]:
    return [(step["verb"], step["to"]) for step in payload["steps"]]


def test_a_variant_driver_is_named_as_the_kernel_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    host = case("01")
    # The capture shows no interface of the VF, which is a reason to refuse.
    unseen = ("--allow", "unseen:0000:65:00.2")
    _, payload, _ = run(capsys, host / "root.txt", "bind", "0000:65:00.2", "--dry-run", *unseen)
    assert bound_to(payload) == [("bind-driver", "mlx5_vfio_pci")]
    _, payload, _ = run(capsys, host / "root-gh200.txt", "bind", "0009:01:00.0", "--dry-run")
    assert [step["target"] for step in payload["steps"]] == ["nvgrace_gpu_vfio_pci", "0009:01:00.0"]
    assert payload["steps"][-1]["to"] == "nvgrace_gpu_vfio_pci"


def test_a_function_on_its_variant_driver_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    host = case("01")
    code, payload, _ = run(capsys, host / "root-bound.txt", "plan", str(host / "variant.toml"))
    assert code == 0
    # Only the override that would keep it there over a re-probe can be missing.
    assert all(step["from"] == step["to"] == "mlx5_vfio_pci" for step in payload["steps"])


@pytest.mark.parametrize(
    ("number", "policy", "kind", "said"),
    [
        ("05", "vgpu.toml", "no-such-type", "1148 (NVIDIA L40S-1Q), 1150 (NVIDIA L40S-3Q)"),
        ("29", "sevenvfs.toml", "no-vf-memory", "gave the VFs of 0000:00:02.0 no memory"),
        ("55", "nvidia51.toml", "no-instance-left", "no instance of nvidia-51 left"),
    ],
)
def test_what_the_kernel_will_refuse_is_a_refusal_of_the_plan(
    capsys: pytest.CaptureFixture[str], number: str, policy: str, kind: str, said: str
) -> None:
    host = case(number)
    code, payload, _ = run(capsys, host / "root.txt", "plan", str(host / policy))
    assert (code, payload["in_sync"]) == (4, False)
    (refusal,) = payload["refusals"]
    assert refusal["kind"] == kind
    assert said in refusal["detail"]
    assert refusal["evidence"]
    # And apply refuses it in the same words.
    code, payload, _ = run(capsys, host / "root.txt", "apply", str(host / policy), "--dry-run")
    assert (code, payload["error"]["kind"]) == (4, "refused")
    assert said in payload["error"]["message"]
    assert run(capsys, host / "root.txt", "status", str(host / policy))[0] == 1


def test_a_driver_spelt_with_an_underscore_is_understood(
    capsys: pytest.CaptureFixture[str],
) -> None:
    host = case("41")
    _, payload, _ = run(capsys, host / "root.txt", "plan", str(host / "underscore.toml"))
    assert bound_to(payload) == [("bind-driver", "vfio-pci")]
    assert canonical_name("vfio_pci") == "vfio-pci"
    assert canonical_name("xe_vfio_pci") == "xe-vfio-pci"
    assert canonical_name("pci_stub") == "pci-stub"
    assert canonical_name("mlx5-vfio-pci") == "mlx5_vfio_pci"
    assert canonical_name("nvme") == "nvme"
    # What is registered counts more than what is known of it.
    assert kernel_name("mlx5_vfio_pci", ["mlx5-vfio-pci"]) == "mlx5-vfio-pci"
    assert kernel_name("snd-hda-intel", ["snd_hda_intel"]) == "snd_hda_intel"


def host_with_modules(**files: str) -> FakeKernel:
    kernel = FakeKernel()
    kernel.add_driver("nvme", ["1b36:0010"])
    kernel.add_function("0000:01:00.0", "1b36:0010", driver="nvme", group=1)
    kernel.files["/proc/sys/kernel/osrelease"] = b"6.12.0\n"
    for name, text in files.items():
        kernel.files[f"/lib/modules/6.12.0/modules.{name}"] = text.encode()
    return kernel


def test_a_name_that_no_driver_has_is_refused_before_anything_is_written() -> None:
    kernel = host_with_modules(dep="kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/a.ko\n")
    host = kernel.host()
    facts = read_facts(host, ["0000:01:00.0"], drivers_wanted=["nvm"])
    with pytest.raises(Foretold, match="no driver named nvm is registered") as refused:
        plan_bind(facts, ["0000:01:00.0"], "nvm")
    assert refused.value.hint == "did you mean nvme?"
    assert kernel.writes == []
    facts = read_facts(host, ["0000:01:00.0"], drivers_wanted=["vfio_pci"])
    assert [step.verb for step in plan_bind(facts, ["0000:01:00.0"], "vfio_pci")] == [
        "load-module",
        "bind-driver",
    ]


def test_a_record_without_a_list_of_modules_says_that_a_name_could_not_be_checked() -> None:
    host = host_with_modules().host()

    def notes(driver: str) -> tuple[str, ...]:
        facts = read_facts(host, ["0000:01:00.0"], drivers_wanted=[driver])
        return remarks(host, plan_bind(facts, ["0000:01:00.0"], driver))

    (note,) = notes("nvm")
    assert note.startswith("no driver named nvm is registered, and whether a module brings it")
    assert note.endswith("did you mean nvme?")
    assert "did you mean" not in notes("uio_pci_generic")[0]
    # Names that vfiotool knows, and a list that was read, leave nothing to say.
    assert notes("vfio-pci") == notes("none") == ()
    host = host_with_modules(dep="kernel/drivers/uio/uio_pci_generic.ko:\n").host()
    assert notes("uio_pci_generic") == ()


def test_a_driver_may_be_built_in_loaded_or_an_alias_and_is_not_missing_then() -> None:
    kernel = host_with_modules(
        dep="extra/ours.ko: \n", builtin="kernel/drivers/inside.ko\n", alias="alias other ours\n"
    )
    names = ["ours", "inside", "other", "none", "nvme", "absent"]
    assert read_missing(kernel.host(), names, frozenset({"nvme"})) == {"absent"}


def test_without_a_list_of_modules_no_name_is_called_missing() -> None:
    kernel = host_with_modules(builtin="kernel/drivers/inside.ko\n")
    assert read_missing(kernel.host(), ["absent"], frozenset()) == frozenset()


def test_vfs_on_the_next_bus_are_planned_where_there_is_a_next_bus(
    capsys: pytest.CaptureFixture[str],
) -> None:
    host = case("56")
    code, payload, _ = run(capsys, host / "root.txt", "plan", str(host / "cross.toml"))
    assert code == 0
    assert payload["steps"][-1]["target"] == "0000:82:00.0"


PORT, CARD = "0000:00:1c.0", "0000:81:00.1"


def behind_a_port(last: str, *, offset: int = 129, card: str = CARD) -> FakeKernel:
    kernel = FakeKernel()
    kernel.add_driver("mlx5_core", ["15b3:1017"])
    kernel.add_driver("vfio-pci")
    kernel.add_function(PORT, "8086:a338", class_code="060400", group=1)
    kernel.add_function(card, "15b3:1017", driver="mlx5_core", group=2, total_vfs=127)
    base = f"/sys/devices/pci0000:00/{PORT}/{card}"
    # Behind a port, as a card is: the fake kernel hangs all functions on the root bus.
    for path in [name for name in kernel.files if f"/{card}/" in name]:
        kernel.files[path.replace(f"pci0000:00/{card}", f"pci0000:00/{PORT}/{card}")] = (
            kernel.files[path]
        )
    kernel.links[f"/sys/bus/pci/devices/{card}"] = f"../../../devices/pci0000:00/{PORT}/{card}"
    kernel.files[f"{base}/sriov_offset"] = f"{offset}\n".encode()
    kernel.files[f"/sys/devices/pci0000:00/{PORT}/subordinate_bus_number"] = last.encode()
    return kernel


def planned_count(kernel: FakeKernel, pf: str, count: int) -> list[str]:
    from vfiotool.change.plans.sriov import plan_vf_count

    facts = read_facts(kernel.host(), [pf])
    return [step.verb for step in plan_vf_count(facts, pf, count)]


def test_vfs_over_the_last_bus_behind_a_port_are_foretold() -> None:
    assert "set-vf-count" in planned_count(behind_a_port("130\n"), CARD, 127)
    kernel = behind_a_port("129\n")
    with pytest.raises(Foretold, match=r"VF 126 of 0000:81:00.1 would be on bus 82") as refused:
        planned_count(kernel, CARD, 127)
    assert refused.value.reason == "no-bus-number"
    assert "at most 126 VFs fit" in str(refused.value.hint)
    assert "set-vf-count" in planned_count(kernel, CARD, 126)


def test_vfs_over_the_last_bus_of_all_are_foretold_and_no_address_is_made_up() -> None:
    kernel = behind_a_port("255\n", card="0000:ff:00.1")
    with pytest.raises(Foretold, match="on bus 100, and the buses there end at ff"):
        planned_count(kernel, "0000:ff:00.1", 127)


def test_a_count_above_the_total_is_refused_by_its_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    host = case("58") / "root.txt"
    code, payload, _ = run(capsys, host, "vf", "set", "0000:00:02.0", "8", "--dry-run")
    assert code == UsageError.exit_code
    assert payload["error"]["message"] == "0000:00:02.0 can have 0 to 7 VFs, not 8"


@pytest.mark.parametrize(
    ("number", "root", "said"),
    [
        ("14", "root.txt", ('address = "0000:02:00.0", id = "10de:1b80"', 'driver = "vfio-pci"')),
        ("14", "root-vf.txt", ('{ index = 0, driver = "mlx5_vfio_pci" }', "nvgrace_gpu_vfio_pci")),
        ("03", "root.txt", ("{ index = 0, vgpu_type = 1150 }",)),
        ("16", "root.txt", ('["assign_adapter", "0x05"]', '["assign_domain", "0x00ab"]')),
    ],
)
def test_all_that_stands_is_exported_and_what_is_exported_is_in_sync(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    number: str,
    root: str,
    said: tuple[str, ...],
) -> None:
    host = case(number) / root
    code, payload, _ = run(capsys, host, "export")
    assert code == 0
    for text in said:
        assert text in payload["policy"]
    exported = tmp_path / "exported.toml"
    exported.write_text(payload["policy"])
    code, payload, _ = run(capsys, host, "status", str(exported))
    assert (code, payload["in_sync"]) == (0, True)


@pytest.mark.parametrize("host", sorted((FIELD.parent / "hosts").iterdir()), ids=lambda h: h.name)
def test_every_fixture_is_in_sync_with_its_own_export(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, host: Path
) -> None:
    exported = tmp_path / "exported.toml"
    exported.write_text(run(capsys, host, "export")[1]["policy"])
    assert run(capsys, host, "status", str(exported))[0] == 0


def test_a_vgpu_that_is_ready_is_not_taken_from_its_driver(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    host = case("03") / "root.txt"
    code, payload, _ = run(capsys, host, "bind", "0000:41:00.4", "--dry-run")
    assert code == 4
    assert "is a vGPU of type 1150, ready on nvidia as it stands" in payload["error"]["message"]
    policy = tmp_path / "p.toml"
    policy.write_text(
        'version = 1\n[[sriov]]\nmatch = { address = "0000:41:00.0" }\nvfs = 2\n'
        'vf = [ { index = 0, driver = "vfio-pci" } ]\n'
    )
    code, payload, _ = run(capsys, host, "plan", str(policy))
    assert (code, [entry["device"] for entry in payload["refusals"]]) == (4, ["0000:41:00.4"])


def test_a_vf_without_a_vgpu_type_is_told_to_get_one_and_not_to_go_to_vfio_pci(
    capsys: pytest.CaptureFixture[str],
) -> None:
    host = case("03") / "root.txt"
    _, payload, _ = run(capsys, host, "why", "0000:41:00.5")
    path = "/sys/bus/pci/devices/0000:41:00.5/nvidia/current_vgpu_type"
    assert payload["next"][0] == f"echo 1148 > {path}"
    assert not any("bind" in line for line in payload["next"])
    assert any("1150 (NVIDIA L40S-3Q)" in note for note in payload["notes"])
    code, payload, _ = run(capsys, host, "vm", "check", "0000:41:00.5")
    assert (code, payload["ready"]) == (1, False)
    assert payload["findings"][0]["next"] == "vfiotool why 0000:41:00.5"


def test_a_host_without_mdev_types_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    code, payload, _ = run(capsys, case("31") / "root.txt", "mdev", "types")
    assert (code, payload["types"]) == (0, [])
    assert "enable_gvt=N: boot with i915.enable_gvt=1" in payload["reason"]
    _, payload, _ = run(capsys, case("03") / "root.txt", "mdev", "types")
    assert "types of virtual functions" in payload["reason"]
    _, payload, _ = run(capsys, case("58") / "root.txt", "mdev", "types")
    assert "their host driver makes them" in payload["reason"]


def test_options_for_a_device_of_another_host_say_what_is_not_ready_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    host = FIELD.parent / "hosts/storage-in-use"
    code, _, notes = run(capsys, host, "vm", "qemu", "0000:01:00.0")
    assert code == 0
    assert "0000:01:00.0 is not ready there: it is on nvme" in notes
    assert "is mounted on /mnt/a" in notes


@pytest.mark.parametrize(
    ("wanted", "lists", "said"),
    [
        (9999, {}, None),
        (9999, {0: {}}, "none"),
        (9999, {1: {1148: "A"}}, "1148 (A)"),
        (1148, {1: {1148: "A"}}, None),
        (0, {0: {1148: "A"}}, None),
    ],
)
def test_a_vgpu_type_is_held_against_what_can_be_created(
    wanted: int, lists: dict[int, dict[int, str]], said: str | None
) -> None:
    """`lists` by the VF's index: one that lists nothing has the types of its card's others."""
    host = open_root(str(case("05") / "root.txt"))
    text = 'version = 1\n[[sriov]]\nmatch = { address = "0000:41:00.0" }\nvfs = 2\n'
    policy = parse_policy(f"{text}vf = [ {{ index = 0, vgpu_type = {wanted} }} ]\n")
    facts = read_policy_facts(host, policy)
    vfs = facts.facts.devices["0000:41:00.0"].sriov.vfs  # type: ignore[union-attr]
    # Neither VF has a type now: the lists speak of what can be created.
    numbers = {**facts.numbers, **{(vf, "nvidia/current_vgpu_type"): 0 for vf in vfs}}
    numbers[vfs[0], "nvidia/current_vgpu_type"] = None if wanted == 0 else 0
    creatable = {vfs[index]: types for index, types in lists.items()}
    facts = replace(facts, creatable=creatable, numbers=numbers)
    if said is None:
        plan_policy(policy, facts)
        return
    with pytest.raises(Foretold, match=re.escape(f"it can create {said}")):
        plan_policy(policy, facts)
