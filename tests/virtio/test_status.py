"""Asking a running server: status, limits, resize, metrics; and strangers that ask nonsense."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.virtio.frontend import Frontend
from tests.virtio.test_serve import connect, run, running
from vfiotool.virtio import control
from vfiotool.virtio.prometheus import Family, format_families, server_families

MIB = 1 << 20


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    (tmp_path / "image").write_bytes(bytes(MIB))
    made = tmp_path / "exports.toml"
    made.write_text(
        f'version = 1\n[[export]]\nname = "vm1"\nblk_file = "{tmp_path}/image"\n'
        f'socket_path = "{tmp_path}/vm1"\ngroup = "g"\n'
    )
    return made


@pytest.fixture
def front(file: Path) -> Iterator[Frontend]:
    with running("exports", str(file), sockets=(file.parent / "vm1",)) as process:
        found = connect(file.parent / "vm1", process)
        found.up()
        yield found
        found.close()


def export_of(file: Path) -> dict[str, object]:
    code, out, said = run("status", "--json", str(file))
    assert (code, said) == (0, "")
    found: dict[str, object] = json.loads(out)["servers"][0]["exports"][0]
    return found


def test_status_counts_what_was_done_and_limits_change(file: Path, front: Frontend) -> None:
    front.write(0, b"s" * 1024)
    front.read(0, 512)
    front.write(1 << 40, b"s" * 512)
    found = export_of(file)
    figures = found["figures"]
    assert isinstance(figures, dict)
    assert (figures["reads"], figures["writes"], figures["failed"]) == (1, 2, 1)
    assert (figures["bytes_read"], figures["bytes_written"]) == (512, 1024)
    assert found["size"] == MIB and found["group"] == "g"
    code, out, _ = run("status")
    assert code == 0 and "vm1" in out and "running" in out
    assert run("limit", str(file), "vm1", "--iops-limit", "5000", "--weight", "7")[0] == 0
    found = export_of(file)
    assert (found["iops_limit"], found["weight"]) == (5000, 7)
    assert run("limit", str(file), "--group", "g", "--bandwidth-limit", "1G")[0] == 0
    text = json.loads(run("status", "--json")[1])["servers"][0]["groups"]
    assert text == [{"name": "g", "iops_limit": None, "bandwidth_limit": 1 << 30, "burst": 0.05}]


def test_a_grown_image_is_told_by_a_command(file: Path, front: Frontend) -> None:
    assert run("resize", str(file), "vm1")[1] == "unchanged\n"
    os.truncate(file.parent / "image", 2 * MIB)
    assert front.write(3 * MIB // 1024, b"r" * 512) == 1
    assert run("resize", str(file), "vm1")[1] == "resized\n"
    assert front.write(3 * MIB // 1024, b"r" * 512) == 0
    # An image that is replaced under its name is another one.
    os.rename(file.parent / "image", file.parent / "old")
    (file.parent / "image").write_bytes(bytes(4 * MIB))
    assert run("resize", str(file), "vm1")[1] == "unchanged\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["limit", "FILE", "nobody", "--iops-limit", "5"], 2, "nobody"),
        (["limit", "FILE", "--group", "nobody", "--iops-limit", "5"], 2, "nobody"),
        (["limit", "FILE", "vm1", "--iops-limit", "0"], 2, "iops_limit"),
        (["limit", "FILE", "vm1", "--weight", "0"], 2, "weight"),
        (["limit", "FILE"], 2, "--group"),
        (["resize", "FILE", "nobody"], 2, "nobody"),
        (["status", "/nowhere"], 3, "no server"),
        (["exports", "/nowhere", "--take-over"], 5, "/nowhere"),
    ],
)
def test_what_cannot_be_asked_is_one_error(
    file: Path, front: Frontend, arguments: list[str], code: int, words: str
) -> None:
    found, out, said = run(*(word.replace("FILE", str(file)) for word in arguments))
    assert (found, out) == (code, "") and words in said and "Traceback" not in said


def test_nothing_to_take_over_is_said(file: Path) -> None:
    code, _, said = run("exports", str(file), "--take-over")
    assert code == 5 and "connect to" in said
    assert not (file.parent / "vm1").exists()


def test_strangers_on_the_control_socket_stop_nothing(file: Path, front: Frontend) -> None:
    path, rng = control.control_path(str(file)) or "", random.Random(6)
    assert os.stat(path).st_mode & 0o077 == 0
    asks = [b"", b"\n", b"{}\n", b"[]\n", b'{"ask": 5}\n', b'{"ask": "x"}\n', b"\xff\n"]
    asks += [b'{"ask": "limit"}\n', b'{"ask": "limit", "export": []}\n', b"[" * 60000 + b"\n"]
    asks += [b'{"ask": "limit", "export": "vm1", "iops_limit": {}}\n', rng.randbytes(70000)]
    asks += [
        b'{"ask": "limit", "group": [], "iops_limit": 5}\n',
        b'{"ask": "limit", "group": {}}\n',
    ]
    for turn in range(60):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.settimeout(5)
            client.sendall(asks[turn % len(asks)])
            if turn % 3:
                client.shutdown(socket.SHUT_WR)
                client.recv(1000)
    idle = [socket.socket(socket.AF_UNIX) for _ in range(30)]
    for client in idle:
        client.connect(path)
    for client in idle:
        client.close()
    assert front.write(0, b"a" * 512) == 0
    assert export_of(file)["name"] == "vm1"


def test_metrics_are_what_prometheus_reads(file: Path, front: Frontend) -> None:
    import subprocess
    import sys

    front.write(0, b"m" * 512)
    command = [sys.executable, "-m", "vfiotool", "metrics"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    server = Path(control.control_path(str(file)) or "").stem
    labels = f'server="{server}",export="vm1",kind="writes"'
    assert f"vfiotool_serve_requests_total{{{labels}}} 1" in lines
    assert "# TYPE vfiotool_serve_requests_total counter" in lines
    assert any(line.startswith("vfiotool_device_info{pci_address=") for line in lines) or not (
        os.listdir("/sys/bus/pci/devices")
    )
    # Every family is described once, before its samples.
    seen: set[str] = set()
    for line in lines:
        name = line.split()[2] if line.startswith("# HELP") else None
        assert name is None or name not in seen
        seen |= {name} if name else set()
        if not line.startswith("#"):
            assert line.partition("{")[0].split()[0] in seen


def test_a_server_that_does_not_answer_is_not_none_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    assert "no server runs" in run("status")[2]
    (tmp_path / "serve").mkdir()
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "serve" / "x.sock"))
    code, _, said = run("status")
    assert code == 0 and "no server answers" in said and "ECONNREFUSED" in said
    dead.close()


def test_labels_are_escaped() -> None:
    family = Family("a", "x\ny")
    family.add(1, name='q"\\\n')
    family.add(None, name="absent")
    assert format_families([family, Family("b", "empty")]) == (
        '# HELP a x\\ny\n# TYPE a gauge\na{name="q\\"\\\\\\n"} 1\n'
    )
    assert server_families([]) == []
