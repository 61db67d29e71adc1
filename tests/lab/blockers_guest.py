"""What the tests of blockers share: `vfiotool why` as typed, tools, and waiting for a condition."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vfiotool.cli.main import main

PCI = Path("/sys/bus/pci/devices")


def why(device: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON of `vfiotool why DEVICE`.

    Run within this process: an interpreter's start costs seconds in an emulated guest.
    """
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(["--json", "why", device])
    return code, json.loads(output.getvalue())


def blockers(device: str, kind: str) -> list[dict[str, Any]]:
    """The blockers of that kind; holds that the exit code agrees with the answer."""
    code, answer = why(device)
    assert code == (0 if answer["passable"] else 1)
    assert answer["passable"] == (answer["blockers"] == [])
    return [entry for entry in answer["blockers"] if entry["kind"] == kind]


def assert_passable(device: str) -> None:
    """`why` says yes: exit 0 and nothing in the way."""
    code, answer = why(device)
    assert (code, answer["blockers"]) == (0, [])


def run(*command: str, timeout_s: float = 60, data: str | None = None) -> str:
    """Run a tool; its output. Fails with what the tool said."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout_s, input=data
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def need(*modules: str, tools: tuple[str, ...] = ()) -> None:
    """Skip, saying why, where this guest's kernel lacks a module or the machine a tool."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine")
    for module in modules:
        done = subprocess.run(["modprobe", module], capture_output=True, text=True, check=False)
        if done.returncode and not Path("/sys/module", module.replace("-", "_")).is_dir():
            pytest.skip(f"this kernel has no {module}")


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 30) -> None:
    """Until the condition holds; fails naming it when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)


def disk_of(address: str) -> str:
    """The name of the one NVMe namespace of a function (`nvme0n1`)."""
    folder = PCI / address / "nvme"
    wait_for(lambda: folder.is_dir() and list(folder.iterdir()), f"a controller below {address}")
    controller = next(folder.iterdir()).name
    name = f"{controller}n1"
    wait_for(lambda: Path("/dev", name).exists(), f"/dev/{name}")
    return name


def driver_of(address: str) -> str | None:
    link = PCI / address / "driver"
    return link.resolve().name if link.exists() else None
