"""Which QEMU the lab takes: none here, an old one, a new one, one without a machine's devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from vfiotool.errors import Unsupported
from vfiotool.lab import machines, needs, qemu
from vfiotool.lab.kernels import packages

EVERY_PROPERTY = frozenset(
    key
    for machine in machines.MACHINES.values()
    for item in (*machine.devices, *machines.iommu_devices(machine.iommu))
    for key, _ in item.properties
)


@pytest.fixture(autouse=True)
def found_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is remembered, no QEMU is installed, and there is no layer (as off Debian)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(needs, "SYSTEM_PATH", "/usr/bin:/bin")
    if Path("/usr/bin", qemu.PROGRAM).exists():
        monkeypatch.setattr(needs, "SYSTEM_PATH", "/bin/sh-alone")
    monkeypatch.setattr(packages, "layer", lambda: None)
    qemu.find.cache_clear()
    yield
    qemu.find.cache_clear()


def install(
    folder: Path,
    version: str = "10.0.2",
    without: frozenset[str] = frozenset(),
    lacking: Mapping[str, str] = {},
) -> Path:
    """A program that answers as QEMU does to what the lab asks; `lacking` maps a model to a
    property that it does not have."""
    models = sorted(machines.models_used() - without)
    cases = []
    for model in models:
        known = sorted(EVERY_PROPERTY - {"id", "bus", lacking.get(model, "")})
        lines = "\\n".join(f"  {name}=<str>" for name in known)
        cases.append(f"{model},help) printf '{model} options:\\n{lines}\\n';;")
    listed = "\\n".join(f'name "{model}", bus PCI' for model in models)
    script = f"""#!/bin/sh
while [ "$1" = -L ]; do shift 2; done
case $1 in -version) echo "QEMU emulator version {version} (Debian 1:{version})"; exit;; esac
shift
while [ $# -gt 1 ]; do shift; done
case $1 in
help) printf '{listed}\\n';;
{chr(10).join(cases)}
*) echo "not asked before: $1" >&2; exit 1;;
esac
"""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / qemu.PROGRAM
    program.write_text(script)
    program.chmod(0o755)
    return program


def test_without_any_qemu_the_lab_says_what_to_install() -> None:
    with pytest.raises(Unsupported, match="needs qemu-system-x86_64") as caught:
        qemu.find()
    assert "install QEMU" in str(caught.value.hint)


def test_an_installed_qemu_is_used_where_there_is_no_layer(tmp_path: Path) -> None:
    program = install(tmp_path / "bin")
    found = qemu.find()
    assert found.command == (str(program),)
    assert found.version == "10.0.2"
    for machine in machines.MACHINES.values():
        found.require(machine)


def test_an_installed_qemu_is_used_where_the_layer_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An up-to-date QEMU is not downloaded once more: the layer is there, without a QEMU."""
    program = install(tmp_path / "bin")
    monkeypatch.setattr(packages, "layer", lambda: tmp_path / "layer")
    assert qemu.find().command == (str(program),)


def test_the_layers_qemu_is_taken_before_an_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "bin", "7.2.9")
    newer = install(tmp_path / "layer/usr/bin")
    monkeypatch.setattr(packages, "layer", lambda: tmp_path / "layer")
    found = qemu.find()
    assert found.command[0] == str(newer)
    assert found.version == "10.0.2"


def test_a_qemu_that_is_too_old_is_named_with_its_version(tmp_path: Path) -> None:
    install(tmp_path / "bin", "5.2.0")
    with pytest.raises(Unsupported, match=r"QEMU 5\.2\.0; the lab needs 6\.0 or newer"):
        qemu.find()


def test_an_old_qemu_serves_the_machines_that_it_can(tmp_path: Path) -> None:
    """7.0 has nvme, but not its VFs; igb came with 8.0 and may be left out."""
    without, lacking = frozenset({"igb"}), {"nvme": "sriov_max_vfs"}
    install(tmp_path / "bin", "7.0.0", without, lacking)
    found = qemu.find()
    found.require(machines.find("storage"))
    found.require(machines.find("net"))
    with pytest.raises(Unsupported, match="has no nvme,sriov_max_vfs, which machine sriov needs"):
        found.require(machines.find("sriov"))


def test_a_qemu_without_a_machines_devices_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    """Distributions build QEMU without the devices that no virtual machine in use has."""
    install(tmp_path / "bin", without=frozenset({"edu", "pci-testdev", "intel-iommu"}))
    found = qemu.find()
    with pytest.raises(Unsupported) as caught:
        found.require(machines.find("basic"))
    assert caught.value.exit_code == 8
    assert "has no intel-iommu, edu, pci-testdev, which machine basic needs" in str(caught.value)


def test_a_qemu_without_what_every_guest_has_is_refused_for_all_machines(tmp_path: Path) -> None:
    """Red Hat's is built without file systems over 9p."""
    install(tmp_path / "bin", without=frozenset({"virtio-9p-pci"}))
    found = qemu.find()
    for machine in machines.MACHINES.values():
        with pytest.raises(Unsupported, match="has no virtio-9p-pci, which machine"):
            found.require(machine)


def test_what_a_qemu_can_is_asked_again_when_it_was_replaced(tmp_path: Path) -> None:
    install(tmp_path / "bin", "8.2.0")
    assert qemu.find().version == "8.2.0"
    qemu.find.cache_clear()
    install(tmp_path / "bin", "10.0.21")
    assert qemu.find().version == "10.0.21"
