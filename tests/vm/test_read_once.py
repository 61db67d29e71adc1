"""What a check of devices reads of them: each word of configuration space is a question to one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vfiotool.cli.main import main
from vfiotool.host.host import Host
from vfiotool.usage import case

HOST = str(Path(__file__).resolve().parents[2] / "fixtures" / "hosts" / "two-socket-server")
CARDS = ("0000:1b:00.0", "0000:1c:00.0", "0000:9b:00.0")


@pytest.fixture
def spaces(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function's whole configuration space is read."""
    found: Counter[str] = Counter()
    read_at = Host.read_at

    def counted(self: Host, path: str, offset: int, count: int, *more: float) -> bytes:
        if path.endswith("/config") and count > 64:
            found[path.split("/")[-2]] += 1
        return read_at(self, path, offset, count, *more)

    monkeypatch.setattr(Host, "read_at", counted)
    return found


def test_vm_check_reads_each_device_s_configuration_space_once(spaces: Counter[str]) -> None:
    main(["--root", HOST, "vm", "check", *CARDS])
    assert spaces == dict.fromkeys(CARDS, 1)


def test_what_a_hypervisor_needs_is_told_by_one_look_and_without_configuration_spaces(
    spaces: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[object] = []
    sight = case.Sight

    def counted(*words: object) -> object:
        looks.append(words)
        return sight(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(case, "Sight", counted)
    main(["--root", HOST, "vm", "qemu", *CARDS])
    assert not spaces and len(looks) == 1
