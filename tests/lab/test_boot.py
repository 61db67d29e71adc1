"""`boot` and `import` in a guest: the run that the units call, and real tools' settings."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vfiotool.boot.enable import own_places
from vfiotool.cli.main import main

MACHINE = "mdev"
KERNELS = ("6.1", "6.12")
PROOF = "long"

EDU = "0000:00:01.0"
DEVICE = Path(f"/sys/bus/pci/devices/{EDU}")
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
INSTALLED = Path("/etc/vfiotool/boot")


def vfiotool(*arguments: str, code: int = 0) -> dict[str, Any]:
    """One command in this process: an interpreter's start takes seconds in a guest."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main(["--json", *arguments])
    text = output.getvalue()
    assert status == code, (arguments, status, text, errors.getvalue())
    found: dict[str, Any] = json.loads(text)
    return found


def driver() -> str | None:
    link = DEVICE / "driver"
    return os.readlink(link).rpartition("/")[2] if link.is_symlink() else None


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    assert driver() is None
    yield
    (DEVICE / "driver_override").write_text("\n")
    if driver() is not None:
        (DEVICE / "driver/unbind").write_text(EDU)
    mdev = Path(f"/sys/bus/mdev/devices/{UUID}")
    if mdev.exists():
        (mdev / "remove").write_text("1")
    for folder in ("/etc/driverctl.d", "/etc/mdevctl.d"):
        shutil.rmtree(folder, ignore_errors=True)


def policy_file(tmp_path: Path, *addresses: str) -> str:
    rules = "".join(
        f'[[device]]\nmatch = {{ address = "{address}" }}\ndriver = "vfio-pci"\n'
        for address in addresses
    )
    path = tmp_path / "policy.toml"
    path.write_text(f"version = 1\n{rules}")
    return str(path)


def test_enable_run_status_disable(tmp_path: Path) -> None:
    before = sorted(str(path) for path in Path("/etc").rglob("*vfiotool*"))
    for place in own_places(("/bin/true",)):
        if os.stat(place).st_uid != 0:
            pytest.skip(f"{place} is not root's here: boot enable refuses it, and rightly so")
    installed = vfiotool("boot", "enable", policy_file(tmp_path, EDU, "0000:7f:00.0"))
    assert "/etc/vfiotool/boot/policy.toml" in [file["path"] for file in installed["files"]]
    assert vfiotool("boot", "status")["enabled"] and driver() is None
    done = vfiotool("boot", "run")
    assert driver() == "vfio-pci" and len(done["absent"]) == 1
    assert vfiotool("boot", "run")["steps"] == []
    status = vfiotool("boot", "status", code=1)
    assert status["enabled"] and "0000:7f:00.0" in status["last"]["absent"][0]
    assert {file["state"] for file in status["files"]} == {"ok"}
    removed = vfiotool("boot", "disable")["removed"]
    assert len(removed) == len(installed["files"]) + 1
    assert sorted(str(path) for path in Path("/etc").rglob("*vfiotool*")) == before
    assert vfiotool("boot", "status")["enabled"] is False
    # Taking the settings away gives no device back: that is release's work.
    assert driver() == "vfio-pci"


def test_run_without_a_policy_says_how_to_get_one() -> None:
    assert not INSTALLED.exists()
    error = vfiotool("boot", "run", code=3)["error"]
    assert "boot enable" in error["hint"]


def test_what_driverctl_keeps_is_imported_and_already_so(tmp_path: Path) -> None:
    subprocess.run(["driverctl", "set-override", EDU, "vfio-pci"], check=True, timeout=60)
    found = vfiotool("import", "/etc/driverctl.d")
    assert found["kind"] == "driverctl" and found["leftovers"] == []
    path = tmp_path / "imported.toml"
    path.write_text(found["policy"])
    assert vfiotool("plan", str(path))["in_sync"] is True
    assert vfiotool("status", str(path))["in_sync"] is True


def test_what_mdevctl_keeps_is_imported_and_already_so(tmp_path: Path) -> None:
    for kind in ("callouts", "notifiers"):
        # As the package makes them: mdevctl refuses to work without.
        Path(f"/etc/mdevctl.d/scripts.d/{kind}").mkdir(parents=True, exist_ok=True)
    make = ["-u", UUID, "-p", "mtty", "-t", "mtty-2"]
    subprocess.run(["mdevctl", "start", *make], check=True, timeout=60)
    subprocess.run(["mdevctl", "define", "-a", "-u", UUID], check=True, timeout=60)
    assert Path(f"/etc/mdevctl.d/mtty/{UUID}").exists()
    found = vfiotool("import", "/etc/mdevctl.d")
    assert found["kind"] == "mdevctl"
    assert [rule["uuid"] for rule in found["rules"]] == [UUID]
    path = tmp_path / "imported.toml"
    path.write_text(found["policy"])
    assert vfiotool("plan", str(path))["in_sync"] is True
